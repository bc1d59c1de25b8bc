"""The tree itself: imports go one way, folders say what they hold, Python's version is one number."""

import ast
import re
from graphlib import TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

from tiny import ROOT
from util import runs
from util.data.datasets import DISJOINT_SPLITS

PACKAGES = ("lavin", "util")
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def folder(module: str) -> str:
    """`lavin.fast.speed_up` and `lavin.fast` -> `lavin.fast`; `lavin.llama` -> `lavin`."""
    path = ROOT.joinpath(*module.split("."))
    return module if path.is_dir() else module.rpartition(".")[0]


def imported_folders(path) -> set[str]:
    """Folders of this project that a file imports from, inside functions too."""
    folders = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            folders |= {folder(f"{node.module}.{alias.name}") if ROOT.joinpath(*node.module.split(".")).is_dir()
                        else folder(node.module) for alias in node.names}
        elif isinstance(node, ast.Import):
            folders |= {folder(alias.name) for alias in node.names}
    return {name for name in folders if name.split(".")[0] in PACKAGES}


def import_graph() -> dict[str, set[str]]:
    graph: dict[str, set[str]] = {}
    for path in FILES:
        name = ".".join(path.parent.relative_to(ROOT).parts)
        graph.setdefault(name, set()).update(imported_folders(path) - {name})
    return graph


def test_imports_between_folders_have_no_cycle():
    graph = import_graph()
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the cycle
    assert order[0] == "lavin.runtime" and {"lavin.kernels", "lavin.weights", "util.chat"} < set(order)


def test_lavin_imports_nothing_of_util():
    assert not any(name.startswith("util") for folder, names in import_graph().items() if folder.startswith("lavin")
                   for name in names)


COMMANDS = sorted(ROOT.glob("*.py"))


def module_name(path) -> str:
    """`lavin/llama.py` -> `lavin.llama`; `lavin/fast/__init__.py` -> `lavin.fast`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in (*COMMANDS, *FILES)}


def imported_names(path) -> set[str]:
    """The modules that a file imports, and the members that it imports of them, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}, line {node.lineno}: import by the path from the project's folder"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def imported_modules(path) -> set[str]:
    """The files of lavin and util, and the commands, that a file imports."""
    return imported_names(path) & MODULES.keys()


def file_of(name: str) -> Path | None:
    """The file of this project that a module's name means, from the project's folder or, for tests, from theirs."""
    places = [root.joinpath(*name.split(".")) for root in (ROOT, ROOT / "tests")]
    return next((file for place in places for file in (place.with_suffix(".py"), place / "__init__.py")
                 if file.is_file()), None)


def test_imports_between_files_have_no_cycle():
    """Imports inside functions count: they hide a cycle from Python, and not from a reader."""
    paths = [path for folder in ("lavin", "util", "tools", "benchmarks", "tests") for path in
             (ROOT / folder).rglob("*.py")]
    graph = {path: set(map(file_of, imported_names(path))) - {None} for path in (*COMMANDS, *paths)}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the cycle

    def place(name: str) -> int:
        return order.index(ROOT / name)

    assert place("lavin/runtime/files.py") < place("lavin/model.py") < place("train.py") < place("tests/tiny_runs.py")
    assert place("tools/output.py") < place("tools/make_easy_vqa.py")
    assert place("tests/tiny.py") < place("tests/conftest.py") < place("tests/data/test_tokenization.py")
    assert place("util/search/study.py") < place("util/search/command.py")
    assert ROOT / "util" / "training" / "run_folder.py" in graph[ROOT / "tests" / "training" / "test_run_folder.py"]


def needed_by(name: str) -> set[str]:
    """The files that a file imports, and those that these import, and so on."""
    found, left = set(), [name]
    while left:
        new = imported_modules(MODULES[left.pop()]) - found
        found |= new
        left += new
    return found


@pytest.mark.parametrize("name", ["train", "eval", "eval_mme", "demo"])
def test_statistics_are_not_imported_where_nothing_is_compared(name):
    """scipy.stats takes half a second, which train.py --help need not wait for."""
    with_scipy = {module for module, path in MODULES.items()
                  if re.search(r"^\s*(import|from) scipy\b", path.read_text(), re.M)}
    assert with_scipy == {"util.comparison.statistics", "util.comparison.planning"}
    assert not with_scipy & needed_by(name) and with_scipy <= needed_by("search") | needed_by("plot_results")


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.name)
def test_commands_import_lavin_and_util_alone(path):
    """A command is no library: what two of them need lies in util."""
    assert all(name.split(".")[0] in PACKAGES for name in imported_modules(path))
    assert imported_modules(path)


@pytest.mark.parametrize("path", [path for path in FILES if path.name == "__init__.py"],
                         ids=lambda path: path.parent.name)
def test_a_folder_says_in_one_line_what_it_holds(path):
    assert re.fullmatch(r'"""[^\n]+\."""\n', path.read_text())


PROGRAMS = {file.stem for name in ("benchmarks", "tools", "tests/faults") for file in (ROOT / name).glob("[!_]*.py")}


def changes_sys_path(node: ast.AST) -> bool:
    """Whether the node is sys.path.insert(...), sys.path[:0] = ..., sys.path += ... or their like."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AugAssign) else \
        [node.func] if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else []
    return any(re.match(r"sys\.path(\[.*\]|\.\w+)?$", ast.unparse(target)) for target in targets)


def modules_in(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.module else []


def test_files_are_imported_by_their_package_path():
    """`from tools.output import ...`, and not `from output import ...` after a change of sys.path: a module has one
    name, whoever starts it."""
    paths = [path for path in ROOT.rglob("*.py") if not path.relative_to(ROOT).parts[0].startswith(".")]
    wrong = [f"{path}:{node.lineno}" for path in paths for node in ast.walk(ast.parse(path.read_text()))
             if changes_sys_path(node) or PROGRAMS & {name.split(".")[0] for name in modules_in(node)}]
    assert ROOT / "tools" / "output.py" in paths and "output" in PROGRAMS and wrong == []


def test_the_names_of_a_runs_files_stand_in_one_place():
    names = {runs.RECIPE, runs.LOG, runs.METRICS, runs.LAST, *runs.RESULTS}  # Hugging Face has a config.json, too
    places = {path.relative_to(ROOT).as_posix() for path in FILES for node in ast.walk(ast.parse(path.read_text()))
              if isinstance(node, ast.Constant) and node.value in names}
    assert places == {"util/runs.py"}


def strings_in(node: ast.AST) -> set[str]:
    """The strings that a list, tuple or set spells, and those that a dict gives the same value each."""
    if isinstance(node, ast.List | ast.Tuple | ast.Set):
        return {item.value for item in node.elts if isinstance(item, ast.Constant)}
    if isinstance(node, ast.Dict) and len(set(map(ast.unparse, node.values))) == 1:
        return {key.value for key in node.keys if isinstance(key, ast.Constant)}
    return set()


def test_the_names_of_the_splits_stand_in_one_place():
    """A dict that gives each split a value of its own, such as its size, spells them too, as it has to."""
    files = [*FILES, *COMMANDS, *(ROOT / "tools").rglob("*.py")]
    places = {path.relative_to(ROOT).as_posix() for path in files for node in ast.walk(ast.parse(path.read_text()))
              if set(DISJOINT_SPLITS) <= strings_in(node)}
    assert places == {"util/data/datasets.py"}


COUNTED = ("picture", "problem", "record", "row", "prompt", "tensor", "file", "column", "group", "trial", "run", "seed",
           "epoch", "step", "question", "configuration", "token", "piece", "head", "dimension", "element", "number",
           "core", "GPU", "node", "process", "other")  # there may be one


def test_a_count_of_one_has_the_singular():
    """A message says `counted(n, "problem")` of lavin/runtime/console.py, in place of f"{n} problems"."""
    files = [*FILES, *COMMANDS, *(ROOT / "tools").rglob("*.py")]
    # and neither a verb nor a preposition between, as in "lacks files" and "for questions"
    plural = re.compile(rf" (?!for )([a-z]*[a-rt-z] )?({'|'.join(COUNTED)})e?s\b")
    texts = [node.values for path in files for node in ast.walk(ast.parse(path.read_text()))
             if isinstance(node, ast.JoinedStr)]
    wrong = [ast.unparse(value) + text.value for values in texts for value, text in pairwise(values)
             if isinstance(value, ast.FormattedValue) and isinstance(text, ast.Constant) and plural.match(text.value)]
    assert wrong == []


def test_the_promised_python_is_one_number():
    promised = re.search(r'requires-python = ">=(3\.\d+)"', (ROOT / "pyproject.toml").read_text())[1]
    assert f"Python {promised} or newer" in (ROOT / "README.md").read_text()
    assert f"Python {promised} or newer" in (ROOT / "scripts" / "environment.sh").read_text()
    assert f"sys.version_info < ({promised.replace('.', ', ')})" in (ROOT / "scripts" / "environment.sh").read_text()
    assert f'python_version = "{promised}"' in (ROOT / "pyproject.toml").read_text()
