"""A report as a list of parts, and the three forms in which it is read: Markdown, text that fits a terminal, and a page
(page.html) that holds its pictures, needs no network, and can be printed."""

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from textwrap import fill, wrap

from lavin.runtime.console import counted, format_table

PAGE = Path(__file__).with_name("page.html")
LEAST_NAME = 24  # characters of a cell that goes over several lines


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Bullets:
    sentences: list[str]


@dataclass(frozen=True)
class Table:
    """Columns are aligned right, but for the first one, and the last one if it holds flags.

    first: the columns that a terminal shows first, one after the other; the rest is there as a whole or not at all.
    """

    header: list[str]
    rows: list[list[str]]
    first: Sequence[str] = ()

    @property
    def has_flags(self) -> bool:
        return self.header[-1] == "flags"


@dataclass(frozen=True)
class Picture:
    """A file NAME.png beside the report."""

    name: str
    caption: str


Part = str | Heading | Bullets | Table | Picture  # a str is a paragraph


# --- Markdown ---

def to_markdown(parts: Sequence[Part]) -> str:
    return "\n\n".join(map(part_in_markdown, parts)) + "\n"


def part_in_markdown(part: Part) -> str:
    match part:
        case Heading(text):
            return f"## {text}"
        case Bullets(sentences):
            return "\n".join(f"- {sentence}" for sentence in sentences)
        case Table(header, rows):
            alignment = [":--", *["--:"] * (len(header) - 2), ":--" if part.has_flags else "--:"]
            return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |"
                             for row in (header, alignment, *rows))
        case Picture(name, caption):
            return f"{caption}:\n\n![{caption}]({name}.png)"
    return part


# --- Text ---

def to_text(parts: Sequence[Part], width: int, file: str) -> str:
    """Lines of at most `width` characters, 80 or more, without pictures. file: has the columns that find no room."""
    texts, n_left_out, n_tables = [], 0, 0
    for part in parts:
        match part:
            case Heading(text):
                texts.append(text)
            case Bullets(sentences):
                texts.append("\n".join(filled(sentence, width) for sentence in sentences))
            case Table():
                text, n = fitted(part, width)
                texts, n_left_out, n_tables = [*texts, text], n_left_out + n, n_tables + 1
            case str():
                texts.append(filled(part, width))
    if n_left_out:
        note = filled(f"{counted(n_left_out, 'more column')} of the table{'s' * (n_tables > 1)} in a wider "
                      f"terminal, and in {file}.", width)
        texts[-1] += f"\n{note}"
    return "\n\n".join(texts)


def filled(sentence: str, width: int) -> str:
    return fill(sentence.replace("`", ""), width, break_on_hyphens=False)


def fitted(table: Table, width: int) -> tuple[str, int]:
    """An aligned table with the columns that have room, and the number of those that have none.

    The names in the first column, or the flags in the last one, go over several lines where they have to.
    """
    header, rows = table.header, [[cell.replace("`", "") for cell in row] for row in table.rows]
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    long = len(header) - 1 if table.has_flags else 0
    left, shown = width - min(widths[long], LEAST_NAME), [long]
    groups = [[header.index(name)] for name in table.first if name in header]
    for group in [*groups, [i for i in range(len(header)) if i != long and header[i] not in table.first]]:
        needed = sum(widths[i] + 2 for i in group)
        if needed > left:
            break
        shown, left = sorted([*shown, *group]), left - needed
    lines = []
    for row in rows:
        cell, *more = wrapped(row[long], left + min(widths[long], LEAST_NAME))
        lines += [[cell if i == long else row[i] for i in shown],
                  *([part if i == long else "" for i in shown] for part in more)]
    titles = [header[i] for i in shown]
    if long:  # aligned left
        width_of_flags = max(len(line[-1]) for line in (titles, *lines))
        titles, *lines = ([*line[:-1], line[-1].ljust(width_of_flags)] for line in (titles, *lines))
    return format_table(titles, lines), len(header) - len(shown)


def wrapped(cell: str, width: int) -> list[str]:
    """The lines of a cell, in which a flag stays beside its value."""
    lines = wrap(re.sub(r"(--\w+) ", "\\1\N{NO-BREAK SPACE}", cell), width, break_on_hyphens=False)
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines] or [""]


# --- A page ---

def to_page(title: str, facts: dict[str, str], parts: Sequence[Part], folder: Path, prefix: str = "") -> str:
    """The page as HTML. facts: the values that stand below the title, by name. folder, prefix: the folder of the
    pictures, and the beginning of their files' names."""
    rows = "\n".join(f"<dt>{in_html(name)}</dt><dd>{in_html(value)}</dd>" for name, value in facts.items())
    body = "\n".join(part_in_html(part, folder, prefix) for part in parts)
    page = Template(PAGE.read_text(encoding="utf-8")).substitute(title=html.escape(title), facts=rows, body=body)
    return page.encode(errors="replace").decode()  # a path may hold bytes that are no UTF-8


def in_html(text: str) -> str:
    """The text, with what stands between backticks as code, and with flags that no line ends within."""
    escaped = re.sub("`([^`]*)`", r"<code>\1</code>", html.escape(text))
    return re.sub(r"(?<![\w-])--\w+", r'<span class="flag">\g<0></span>', escaped)


def part_in_html(part: Part, folder: Path, prefix: str) -> str:
    match part:
        case Heading(text):
            return f"<h2>{in_html(text)}</h2>"
        case Bullets(sentences):
            return "<ul>" + "".join(f"<li>{in_html(sentence)}</li>" for sentence in sentences) + "</ul>"
        case Table():
            return table_in_html(part)
        case Picture(name, caption):
            data = base64.b64encode((folder / f"{prefix}{name}.png").read_bytes()).decode()
            return (f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
                    f"<figcaption>{in_html(caption)}</figcaption></figure>")
    return f"<p>{in_html(part)}</p>"


def telling_first(table: Table) -> Table:
    names = [*table.first, *table.header]
    order = [0, *sorted(range(1, len(table.header)), key=lambda i: names.index(table.header[i]))]
    return Table([table.header[i] for i in order], [[row[i] for i in order] for row in table.rows])


def table_in_html(table: Table) -> str:
    """The table, the most telling columns first, in a frame that scrolls where it is wider than the page."""
    table = table if table.has_flags else telling_first(table)
    head = "".join(f'<th scope="col">{in_html(cell)}</th>' for cell in table.header)
    rows = "\n".join(f'<tr><th scope="row">{in_html(name)}</th>'
                     + "".join(f"<td>{in_html(cell)}</td>" for cell in cells) + "</tr>" for name, *cells in table.rows)
    kind, name = "table flags" if table.has_flags else "table", f"{table.header[0]}, {counted(len(table.rows), 'row')}"
    return (f'<div class="{kind}" tabindex="0" role="region" aria-label="Table by {html.escape(name)}">'
            f"<table><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>")
