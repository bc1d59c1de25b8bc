r"""Texts of users and models as Markdown without HTML: what looks like a tag is shown as it was written.

A backslash before the `<` does it, which is Markdown's own way, so that a copied text stays Markdown. In code, the `<`
stays as it is. Where it is hard to tell what is code, the text counts as none: then at worst a backslash shows.
"""

import re
from collections.abc import Callable

TAG = re.compile(r"(\\*)<(?=[A-Za-z/!?])")
ESCAPED_TAG = re.compile(r"(\\*)\\<(?=[A-Za-z/!?])")
FENCE = re.compile(r"(`{3,}|~{3,})[\w+#.-]* *")  # the line before a block of code
SPAN = re.compile(r"(?<!`)(`+)(?!`)[^|]*?[^`|]\1(?!`)")  # code within a line; in a table, a | would end it


def without_html(text: str) -> str:
    """Returns a text in which Markdown finds no HTML."""
    return outside_code(text, lambda piece: TAG.sub(r"\1\1\\<", piece))


def with_html(text: str) -> str:
    """Returns the text that `without_html` made this one of."""
    return outside_code(text, lambda piece: ESCAPED_TAG.sub(lambda match: match[1][:len(match[1]) // 2] + "<", piece))


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """Changes a text where it is no code."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")  # Markdown ends a line at either
    in_block = find_blocks(lines)
    if in_block is None:
        return change("\n".join(lines))
    changed = []
    for line, is_code in zip(lines, in_block, strict=True):
        if not is_code and not has_whole_spans(line):
            return change("\n".join(lines))
        changed.append(line if is_code else change_outside_spans(line, change))
    return "\n".join(changed)


def find_blocks(lines: list[str]) -> list[bool] | None:
    """Returns which lines belong to blocks of code, or None where a fence has another form than the usual one."""
    in_block, fence = [], ""
    for line in lines:
        in_block.append(bool(fence))
        if fence:
            fence = "" if re.fullmatch(rf"{fence}[~`]* *", line) else fence
        elif match := FENCE.fullmatch(line):
            fence, in_block[-1] = match[1], True
        elif "```" in line or "~~~" in line:
            return None
    return in_block


def has_whole_spans(line: str) -> bool:
    """Says whether all code that begins in a line ends in it. Else it could end anywhere, and other code with it."""
    return "`" not in SPAN.sub("", line) and "\\`" not in line


def change_outside_spans(line: str, change: Callable[[str], str]) -> str:
    pieces, end = [], 0
    for span in SPAN.finditer(line):
        pieces += [change(line[end:span.start()]), span[0]]
        end = span.end()
    return "".join([*pieces, change(line[end:])])
