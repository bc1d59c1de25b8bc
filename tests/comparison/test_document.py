"""A report as Markdown, as text for a terminal, and as a page: what is escaped, what fits, and what the page needs."""

import base64
import html.parser
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_comparison import FLAGS, STEP, write_run

import plot_results
from util.comparison import figures
from util.comparison.comparison import Comparison, compare
from util.comparison.report import facts
from util.comparison.tables import rounded_cells, text_table
from util.document import Bullets, Heading, Picture, Table, fitted, to_markdown, to_page, to_text

WICKED = "<script>alert(1)</script> & \"quoted\" 'single' $title ${body} |"


class Reader(html.parser.HTMLParser):
    """The tags of a page, its texts, and what its attributes lead to."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.texts, self.links, self.alternatives = [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "action", "srcset")]
        self.alternatives += [value for name, value in attributes if name == "alt"]

    def handle_data(self, data):
        self.texts.append(data)


def page_of(folder, text: str) -> str:
    (folder / "a.png").write_bytes(b"a picture")
    return to_page(text, {text: text}, [Heading(text), text, Bullets([text]), Table([text, "b"], [[text, "1"]]),
                                        Picture("a", text)], folder)


@given(text=st.text(st.characters(exclude_characters="`", exclude_categories=["Cs", "Cc"]), min_size=1))
def test_every_text_is_escaped_in_a_page(tmp_path_factory, text):
    folder = tmp_path_factory.getbasetemp()
    reader, plain = Reader(page_of(folder, text)), Reader(page_of(folder, "x"))
    assert [tag for tag in reader.tags if tag != "span"] == plain.tags
    assert "".join(reader.texts).count(text) >= 8 and reader.alternatives == [text]


def test_a_page_needs_nothing_but_itself(tmp_path):
    page = page_of(tmp_path, WICKED)
    (link,) = Reader(page).links
    assert base64.b64decode(link.removeprefix("data:image/png;base64,")) == b"a picture"
    assert "script" not in Reader(page).tags and "default-src 'none'" in page
    assert not re.search(r"https?:|url\(|@import", page)


def test_code_and_flags_are_marked(tmp_path):
    reader = Reader(to_page("t", {}, ["`--lr 0.1` of a -- b", "a--b"], tmp_path))
    assert reader.tags.count("code") == 1 and reader.tags.count("span") == 1


def test_the_most_telling_columns_come_first_in_a_page_and_flags_stay_last(tmp_path):
    rows = [["m", "1", "2", "3"]]
    table, flags = Table(["Method", "a", "b", "c"], rows, ["c", "a"]), Table(["trial", "a", "b", "flags"], rows, ["b"])
    for part, header in ((table, ["Method", "c", "a", "b"]), (flags, flags.header)):
        assert re.findall(r'<th scope="col">(.*?)</th>', to_page("t", {}, [part], tmp_path)) == header
    assert re.findall("<td>(.)</td>", to_page("t", {}, [table], tmp_path)) == ["3", "1", "2"]


WORD = st.text("abcdefghijklmnopqrstuvwxyz0123456789.+-", min_size=1, max_size=20)


@given(width=st.integers(80, 200), has_flags=st.booleans(), long=st.lists(WORD, min_size=1, max_size=30),
       others=st.lists(st.lists(WORD, min_size=3, max_size=3), min_size=1))
def test_a_table_fits_and_keeps_every_word_of_its_long_column(width, has_flags, long, others):
    place = 3 if has_flags else 0
    rows = [[*cells[:place], " ".join(long), *cells[place:]] for cells in others]
    header = ["name", "first", "second", "flags" if has_flags else "last"]
    text, n_left_out = fitted(Table(header, rows, ["first"]), width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert ("first" in lines[0].split()) == (n_left_out < 3)
    if n_left_out == 3:
        assert "".join(text.split()).count("".join(long)) >= len(rows)


@pytest.mark.parametrize("width", range(80, 102))
def test_a_flag_stays_beside_its_value(width):
    text, _ = fitted(Table(["trial", "flags"], [["000", "`--learning_rate 0.001 " * 8 + "`"]], ["trial"]), width)
    assert all(line.count("--learning_rate 0.001") == line.count("--") for line in text.splitlines()[2:])
    assert text.count("--learning_rate") == 8 and "`" not in text


def test_markdown_and_text_have_the_same_words():
    parts = [Heading("Trials"), "A `--flag x` sentence.", Bullets(["one", "two"]), Table(["a", "b"], [["x|y", "2"]]),
             Picture("a", "Caption")]
    assert to_markdown(parts) == ("## Trials\n\nA `--flag x` sentence.\n\n- one\n- two\n\n| a | b |\n| :-- | --: |\n"
                                  "| x\\|y | 2 |\n\nCaption:\n\n![Caption](a.png)\n")
    assert to_text(parts, 80, "report.md") == "Trials\n\nA --flag x sentence.\n\none\ntwo\n\na    b\n---  -\nx|y  2"


# --- The page of a comparison ---

@pytest.fixture
def page(tmp_path, monkeypatch) -> str:
    monkeypatch.setattr(figures, "FIGURES", {"dropout": figures.FIGURES["dropout"]})
    runs = tmp_path / "<b>runs<!--"
    write_run(runs / "base", data_root="d", scored={"data": "0123456789abcdef"},
              files={"recipe.json": {"recipe": {"base": "b" * 64}}})
    write_run(runs / "step", "1111000010", llm_model="<i>toy", **STEP)
    plot_results.main(plot_results.get_args_parser().parse_args([str(runs), "--out", str(tmp_path / "out")]))
    return (tmp_path / "out" / "report.html").read_text()


A, B, DIRTY = "a" * 40, "b" * 40, f"{'a' * 40}-dirty"


def compare_code(folder: Path, *configs: dict, scored: dict | None = None) -> Comparison:
    """Compares runs with these entries of config.json, one seed each."""
    return compare([write_run(folder / str(seed), scored=scored, files={"config.json": {
        "flags": {**FLAGS, "seed": seed}, "world_size": 1, **entries}}) for seed, entries in enumerate(configs)])


def test_the_commits_that_runs_began_went_on_and_were_scored_with_are_told(tmp_path):
    comparison = compare_code(tmp_path, {"git_commit": A}, {}, {"git_commit": B, "resumed": [{"git_commit": A}, {}]},
                              scored={"git_commit": DIRTY})
    assert facts(comparison)["Commits of the code"] == "`aaaaaaaaaaaa`, `aaaaaaaaaaaa-dirty`, `bbbbbbbbbbbb`"
    assert "the same code: aaaaaaaaaaaa (2 runs), aaaaaaaaaaaa-dirty (3 runs), bbbbbbbbbbbb (1 run);" in text_table(
        comparison)


@pytest.mark.parametrize("commits, note", [
    ([A, A, None], ""),
    ([None], ""),
    ([A, B, A], "Note: the runs do not all have the same code: aaaaaaaaaaaa (2 runs), bbbbbbbbbbbb (1 run)."),
    ([DIRTY, DIRTY], "Note: the runs may not all have the same code: aaaaaaaaaaaa-dirty (2 runs); -dirty says that it "
                     "was changed since the commit, maybe in another way for each run."),
])
def test_a_note_tells_runs_of_other_code(tmp_path, commits, note):
    text = text_table(compare_code(tmp_path, *({"git_commit": commit} for commit in commits)))
    assert note in text if note else "same code" not in text


def test_the_page_has_no_figure_of_an_earlier_comparison(tmp_path, monkeypatch):
    """The folder keeps it where the new comparison has no such figure."""
    monkeypatch.setattr(figures, "FIGURES", {"dropout": figures.FIGURES["dropout"]})
    write_run(tmp_path / "run")
    (tmp_path / "out").mkdir()
    for name in ("categories", "effects", "losses_by_step"):
        (tmp_path / "out" / f"{name}.png").write_bytes(b"an earlier figure")
    plot_results.main(plot_results.get_args_parser().parse_args([str(tmp_path / "run"), "--out",
                                                                 str(tmp_path / "out")]))
    assert Reader((tmp_path / "out" / "report.html").read_text()).alternatives == ["Dropout of each layer"]


def test_the_page_has_the_table_the_figures_and_how_to_get_them_again(page, tmp_path):
    reader, runs = Reader(page), tmp_path / "<b>runs<!--"
    text = " ".join("".join(reader.texts).split())
    header, rows = rounded_cells(compare([str(runs)]))
    assert {*header, *(cell for row in rows for cell in row)} <= {*reader.texts}
    assert reader.alternatives == ["Dropout of each layer"]
    for words in ("2, 1 seed each", "10 of the test split", "d (checksum 0123456789ab)", f"toy (checksum {'b' * 12})",
                  f"python plot_results.py '{runs}' --out {tmp_path}/out", "one run against another"):
        assert words in text
    assert "b" not in reader.tags and "i" not in reader.tags  # names of folders and models are no tags
    (link,) = reader.links
    assert base64.b64decode(link.partition(",")[2]) == (tmp_path / "out" / "dropout.png").read_bytes()
