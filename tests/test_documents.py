"""The documents keep to the tree: their commands, paths, flags, links and figures exist.

The oracles are the parsers of the commands, bash, the files of the tree, and the tables that were measured.
"""

import ast
import csv
import json
import pkgutil
import re
import subprocess
import textwrap

import pytest

import documents
from documents import Page, read_page
from tiny import ROOT
from util.comparison.methods import named_methods

PATTERNS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md", "benchmarks/README.md",
            "tests/faults/README.md")
PATHS = [path for pattern in PATTERNS for path in sorted(ROOT.glob(pattern))]
PAGES = [read_page(path) for path in PATHS]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
PERFORMANCE = read_page(ROOT / "docs" / "performance.md")


def is_command(span: str) -> bool:
    words = documents.split_environment(span.split())[1]
    return len(words) > 1 and words[0].rpartition("/")[2] in documents.FIRST_WORDS


@pages
def test_blocks_of_shell_have_valid_syntax(page: Page):
    for language, block in page.blocks:
        if language in ("bash", "sh"):
            subprocess.run(["bash", "-n", "-c", block], check=True)


@pages
def test_blocks_of_python_and_json_parse(page: Page):
    for language, block in page.blocks:
        if language == "python":
            try:
                ast.parse(textwrap.dedent(block))
            except SyntaxError:
                ast.parse(f"{{{block}}}")  # an entry of a dict
        elif language == "json":
            json.loads(block if block.lstrip().startswith(("{", "[")) else f"{{{block}}}")


@pages
def test_commands_are_taken_by_their_parsers(page: Page):
    blocks = [block for language, block in page.blocks if language in ("bash", "sh")]
    wrong = {" ".join(words): problem for block in blocks for words in documents.commands_in(block)
             if (problem := documents.wrong_command(words, page))}
    assert wrong == {}


@pages
def test_commands_in_the_text_are_taken_by_their_parsers(page: Page):
    wrong = {span: problem for span in page.spans if is_command(span)
             for words in documents.commands_in(span) if (problem := documents.wrong_command(words, page, whole=False))}
    assert wrong == {}


@pages
def test_flags_in_the_text_exist(page: Page):
    parsers = [*map(documents.parser_of, documents.programs()), documents.torchrun_parser()]
    spans = [span for span in page.spans if span.startswith("--")]
    assert {span: problem for span in spans if (problem := documents.wrong_flag_words(span.split(), parsers))} == {}


@pages
def test_paths_in_the_text_exist(page: Page):
    paths = [span for span in page.spans if documents.looks_like_path(span)]
    assert [path for path in paths if not documents.path_exists(path, page)] == []


@pages
def test_names_of_the_code_in_the_text_exist(page: Page):
    """`util.lr_sched.adjust_learning_rate`, `test_another_recipe_is_refused_by_its_flags`."""
    roots = {path.stem for path in ROOT.glob("*.py")} | {"lavin", "util", "tools", "benchmarks"}
    dotted = [span for span in page.spans if re.fullmatch(r"[a-z_]\w*(\.\w+)+", span) and span.split(".")[0] in roots
              and not span.endswith(documents.SOURCES)]
    tests = [span for span in page.spans if re.fullmatch(r"test_\w+", span)]
    defined = {name for path in (ROOT / "tests").rglob("test_*.py")
               for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)}
    assert [name for name in tests if name not in defined] == []
    assert [name for name in dotted if not is_importable(name)] == []


def test_each_input_has_the_test_that_its_table_names():
    named = re.findall(r"(\w+/test_\w+\.py)::(test_\w+) \|", (ROOT / "tests" / "INPUTS.md").read_text())
    assert len(named) > 50
    assert [(file, name) for file, name in named
            if not re.search(rf"^ *(async )?def {name}\b", (ROOT / "tests" / file).read_text(), re.M)] == []


def is_importable(name: str) -> bool:
    try:
        pkgutil.resolve_name(name)
        return True
    except (ImportError, AttributeError):
        return False


@pages
def test_links_lead_somewhere(page: Page):
    wrong = []
    for link in page.links:
        target, _, anchor = link.partition("#")
        path = (page.path.parent / target).resolve() if target else page.path
        if "://" not in link and not (path.exists() and (not anchor or anchor in read_page(path).anchors)):
            wrong.append(link)
    assert wrong == []


@pages
def test_speeds_are_those_of_the_page_on_performance(page: Page):
    if page.name not in ("CHANGELOG.md", "docs/engineering-log.md"):  # both also have the speeds of earlier versions
        assert documents.speeds(page) - documents.speeds(PERFORMANCE) == set()


def test_ratios_follow_from_the_speeds_beside_them():
    """A column `ratio` is that of the column on its left, to a row whose ratio is 1."""
    checked = 0
    for header, *rows in PERFORMANCE.tables:
        for column, title in enumerate(header):
            if not title.startswith("ratio"):
                continue
            speed = max(i for i in range(column) if re.search(r"\w+/s\b", header[i]))
            pairs = [(float(row[column].strip("*")), float(row[speed])) for row in rows if row[column]]
            bases = [value for ratio, value in pairs if ratio == 1]
            for ratio, value in pairs:
                assert any(abs(value / base - ratio) < 0.006 * max(1, ratio) for base in bases), (title, value, ratio)
                checked += 1
    assert checked > 20


@pages
def test_totals_are_sums(page: Page):
    """The row `all` of a table, in columns of numbers alone."""
    for _, *rows in page.tables:
        parts, totals = ([row for row in rows if (row[0] == "all") is is_total] for is_total in (False, True))
        for column in range(1, len(rows[0]) if totals else 0):
            if all(re.fullmatch(r"[\d,]+", row[column]) for row in rows):
                assert documents.as_number(totals[0][column]) == sum(documents.as_number(row[column]) for row in parts)


def published_numbers() -> dict[str, set[float]]:
    """The numbers of each published method: its accuracies, their intervals, and the differences to the base."""
    with open(ROOT / "assets" / "published_table.csv", newline="") as file:
        rows = {row[0]: documents.numbers(" ".join(row[1:])) for row in csv.reader(file)}
    return {method.key: {round(number, 2) for number in rows[method.name]} for method in named_methods()
            if method.name in rows}


def method_named_in(cell: str) -> str | None:
    """The key of the method that the first cell of a row names: by its script, its key or its name."""
    found = re.search(r"finetuning_sqa_7b(?:_(\w+))?\.sh", cell)
    names = {name: method.key for method in named_methods() for name in (method.key, method.name)}
    return names.get((found[1] or "base") if found else cell.strip("`* "))


@pages
def test_published_accuracies_are_those_of_the_table(page: Page):
    """Numbers with two decimals, in rows that name a method and columns of accuracies: other results have one."""
    published, column = published_numbers(), re.compile(r"accuracy|published|vs|against|NAT|SOC|LAN|TXT|IMG|NO|G\d|Avg")
    cells = [(method, cell) for header, *rows in page.tables for row in rows if (method := method_named_in(row[0]))
             for title, cell in zip(header[1:], row[1:], strict=True) if column.search(title)]
    assert [cell for method, cell in cells
            if not {float(number) for number in re.findall(r"\d+\.\d\d\b", cell)} <= published[method]] == []


def test_the_number_of_faults_is_that_of_the_file():
    n_faults = len(json.loads((ROOT / "tests" / "mutants.json").read_text()))
    assert f"holds {n_faults} faults" in read_page(ROOT / "CONTRIBUTING.md").text


WRONG = {
    "```bash\nfor run in a b; python train.py\n```": "shell",
    "```python\nprint(\n```": "blocks",
    "```json\n{\"a\": 1,}\n```": "blocks",
    "python train.py --lr_shedule step": "commands",
    "python train.py --epochs twenty": "commands",
    "python -m tools.export_hf --adapter_path RUN --uot FOLDER": "commands",
    "python -m tools.exprot_hf": "commands",
    "torchrun --nproc_per_nodes 2 train.py": "commands",
    "torchrun --nproc_per_node 2 train.py --model_parallel_sizes 2": "commands",
    "bash scripts/finetuning_sqa_7b_stepp.sh": "commands",
    "bash scripts/finetuning_sqa_7b_step.sh --epoch 5": "commands",
    "SEED='0 1' bash scripts/run_all_variants.sh": "commands",
    "sbatch slurm/one_node.sbatch scripts/finetuning_sqa_7b.sh --batchsize 2": "commands",
    "sbatch slurm/search.sbatch --trails 64": "commands",
    "python search.py --study S -- --lr_schedule linaer": "commands",
    "pip install -r requirements/gguff.txt": "commands",
    "`python eval.py --adapter_paths RUN`": "spans",
    "`--lr_schedule linaer`": "flags",
    "`--gradient_checkpoint`": "flags",
    "`util/attention.py`": "paths",
    "`docs/hardwares.md`": "paths",
    "`RUN/generation.jsonl`": "paths",
    "`util.lr_sched.adjust_rate`": "names",
    "`test_that_nobody_wrote`": "names",
    "[here](#no-such-heading)": "links",
    "[here](hardwares.md)": "links",
    "train.py reaches 74 samples/s": "speeds",
    "| case | n |\n| --- | --- |\n| a | 1,000 |\n| b | 2 |\n| all | 1,003 |": "totals",
    "| method | accuracy |\n| --- | --- |\n| `finetuning_sqa_7b_step.sh` | 87.14 |": "published",
}
CHECKS = {"shell": test_blocks_of_shell_have_valid_syntax, "blocks": test_blocks_of_python_and_json_parse,
          "commands": test_commands_are_taken_by_their_parsers, "flags": test_flags_in_the_text_exist,
          "spans": test_commands_in_the_text_are_taken_by_their_parsers, "paths": test_paths_in_the_text_exist,
          "names": test_names_of_the_code_in_the_text_exist, "links": test_links_lead_somewhere,
          "totals": test_totals_are_sums, "speeds": test_speeds_are_those_of_the_page_on_performance,
          "published": test_published_accuracies_are_those_of_the_table}
RIGHT = """
# A page

[here](#a-page), `RUN/generations.jsonl`, `S/trials`, `checkpoint-9.pth`, `lavin/attention.py`, `meta.py`, `FILE.gguf`,
`../data/anything`, `--lr_schedule step`, `--trials N`, `--resume RUN/checkpoint-3.pth`, `python train.py --help`,
`util.lr_sched.adjust_learning_rate`, `scripts/finetuning_sqa_7b_METHOD.sh`, `scripts/mine.sh`,
`question.json`, `plots/table.md`, `leaf/picture.png`, 68 to 72.0 samples/s

```bash
torchrun --nproc_per_node 4 train.py --model_parallel_size 2   # two replicas
SEEDS="0 1 2" METHODS="base step" bash scripts/run_all_variants.sh --epochs N
python search.py --study S --trials 64 -- FLAGS
for i in 1 2; do python eval.py --adapter_path LaVIN-7B-base && echo done; done > log
python eval.py --adapter_path RUN > log 2>&1
sbatch --time 2:00:00 slurm/one_node.sbatch scripts/finetuning_sqa_7b.sh --epochs 5
python -m tests.faults kills [--device cuda] [--n 20]
flags="--epochs 2
    --lr 0.1"
curl -d @question.json http://127.0.0.1:8000
cp scripts/toy.sh scripts/mine.sh
ssh -L 7860:NODE:7860 LOGIN
```
"""


def page_of(text: str, folder) -> Page:
    (folder / "page.md").write_text(text)
    page = read_page.__wrapped__(folder / "page.md")
    return Page(ROOT / "docs" / "page.md", page.text, page.blocks)


@pytest.mark.parametrize("text, kind", WRONG.items())
def test_what_does_not_exist_is_noticed(tmp_path, text, kind):
    page = page_of(f"```bash\n{text}\n```\n" if kind == "commands" else f"{text}\n", tmp_path)
    with pytest.raises((AssertionError, SyntaxError, ValueError, subprocess.CalledProcessError)):
        CHECKS[kind](page)


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_what_exists_is_not_refused(tmp_path, check):
    page = page_of(RIGHT, tmp_path)
    check(read_page(tmp_path / "page.md") if check is test_links_lead_somewhere else page)
