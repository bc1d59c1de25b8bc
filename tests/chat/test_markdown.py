"""Texts as Markdown without HTML, against another parser of CommonMark and tables."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from util.chat.markdown import with_html, without_html

PIECES = ["<b>", "</b>", "<img src=x>", "<!--", "-->", "<?x", "<![CDATA[", "<div", "`", "``", "```", "~~~", "\n",
          "\n\n", " ", "    ", "- ", "> ", "|", "\\", "a", "| a | b |\n|--|--|\n", "[a]: b", "(", ")", "[x]", "\r",
          "\r\r", "1. ", "# ", "![", "](x)"]


def types(tokens):
    for token in tokens:
        yield token.type
        yield from types(token.children or [])


@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
@settings(max_examples=1000)
@example("```<b>\\| a | b |\n|--|--|\n")  # a table's head, and no fence
@example("```<b>\n```\n<b>")
@example("- a `\n- <img> ` b")
@example("\r\r<img src=x>")
@example("\\<b>")
def test_no_text_has_html_and_each_is_read_back(text):
    markdown_it = pytest.importorskip("markdown_it")
    found = set(types(markdown_it.MarkdownIt("commonmark").enable("table").parse(without_html(text))))
    assert not found & {"html_inline", "html_block"}
    assert with_html(without_html(text)) == text.replace("\r\n", "\n").replace("\r", "\n")


@pytest.mark.parametrize("text, shown", [
    ("a < b, x<3", "a < b, x<3"), ("<b>x</b>", r"\<b>x\</b>"), ("use `<b>` or <b>", r"use `<b>` or \<b>"),
    ("```html\n<b>\n```\n<b>", "```html\n<b>\n```\n\\<b>"), (r"\<b>", r"\\\<b>"), ("**bold**", "**bold**")])
def test_code_and_other_markdown_stay(text, shown):
    assert without_html(text) == shown and with_html(shown) == text
