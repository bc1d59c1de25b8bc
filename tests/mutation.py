"""Mutation testing: puts the faults of mutants.json into a copy of the project, one at a time, and says whether a test
fails.

    python tests/mutation.py                    # all faults, two at a time
    python tests/mutation.py --only 3 17        # the faults with these numbers
    python tests/mutation.py --near             # only the tests of the changed file: a lower bound, in half the time

A fault is a piece of source text that occurs once in the product, and its faulty replacement, which falsifies results
or loses data without a crash. Whoever rewrites that piece rewrites the fault too, or exchanges it for another of its
kind. The tests run until the first one fails, those of the changed file before the others.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import pytest
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
CONTEXT = multiprocessing.get_context("fork")
LIBRARIES = ("torch", "transformers", "scipy.stats", "hypothesis", "matplotlib.pyplot", "optuna", "pydantic")
MUTANTS = Path(__file__).with_name("mutants.json")
SLOWEST = "tests/training/learning.py"  # runs when no other test has failed
SECONDS = 1800  # after which a fault counts as noticed, since no test of an intact project takes as long


def copy_project(folder: Path) -> Path:
    """A copy of all files that git knows or does not ignore, as they lie in the working tree."""
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], cwd=ROOT,
                            capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def find_source(project: Path, text: str) -> Path:
    """The one product file that holds `text` once. Raises ValueError where there is none, or another place too."""
    files = [*project.glob("*.py"), *(project / "lavin").rglob("*.py"), *(project / "util").rglob("*.py"),
             *(project / "scripts").glob("*.sh")]
    counts = {path: path.read_text(encoding="utf-8").count(text) for path in files}
    if sum(counts.values()) != 1:
        raise ValueError(f"occurs {sum(counts.values())} times in the product, not once: {text!r}")
    return max(counts, key=counts.__getitem__)


def ordered_tests(project: Path, source: Path, near: bool) -> list[str]:
    """All test files but the slowest, those that are near the changed file first; with `near`, only these, if any.

    A test is near if it imports the file, or if it or its folder has the name of the file or of its folder.
    """
    parts = source.relative_to(project).with_suffix("").parts
    package, module = re.escape(".".join(parts[:-1])), re.escape(".".join(parts))
    imports = re.compile(rf"^(from|import) {module}\b|^from {package} import .*\b{source.stem}\b", re.MULTILINE)

    def is_far(test: Path) -> tuple[bool, bool]:
        """Whether a test does not import the file, and whether it has other names."""
        return (not imports.search(test.read_text(encoding="utf-8")),
                {test.parent.name, test.stem.removeprefix("test_")}.isdisjoint(parts))

    tests = sorted((project / "tests").rglob("test_*.py"), key=lambda test: (is_far(test), test))
    nearest = [test for test in tests if not all(is_far(test))] if near else []
    return [str(test.relative_to(project)) for test in nearest or tests]


def first_failure(project: Path, tests: list[str]) -> str | None:
    """The name of the first test that fails; None where all pass."""
    log = project.with_suffix(".log")
    process = CONTEXT.Process(target=run_pytest, args=(project, tests, log))
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        return "the limit of time"
    if process.exitcode == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", log.read_text(errors="replace"), re.MULTILINE)
    return failed[1] if failed else f"pytest's exit status {process.exitcode}"


def run_pytest(project: Path, tests: list[str], log: Path) -> None:
    """Runs in a fork of this process, which has imported the libraries already, and ends it."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.chdir(project)
    sys.dont_write_bytecode = True  # source files of one second and one size would share their bytecode
    status = pytest.main(["-x", "-q", "-n", "0", "-p", "no:cacheprovider", *tests])
    sys.stdout.flush()
    os._exit(status)


def noticed_by(project: Path, mutant: dict, near: bool) -> str | None:
    """The test that fails with the fault; None where all pass. near: whether only the nearest tests run."""
    source = find_source(project, mutant["old"])
    intact = source.read_text(encoding="utf-8")
    source.write_text(intact.replace(mutant["old"], mutant["new"]), encoding="utf-8")
    try:
        test = first_failure(project, ordered_tests(project, source, near))
        return test if test or near else first_failure(project, [SLOWEST])
    finally:
        source.write_text(intact, encoding="utf-8")


def try_out(folder: Path, mutant: dict, near: bool) -> tuple[str | None, float]:
    """`noticed_by` in this process's own copy of the project, which lies in `folder`; and the seconds that it took."""
    start, project = time.monotonic(), folder / f"project{os.getpid()}"
    if not project.exists():
        copy_project(project)
    return noticed_by(project, mutant, near), time.monotonic() - start


def main(args) -> None:
    for library in LIBRARIES:
        importlib.import_module(library)
    mutants = dict(enumerate(json.loads(args.mutants.read_text(encoding="utf-8"))))
    chosen, survivors = args.only or list(mutants), []
    for number in chosen:
        find_source(ROOT, mutants[number]["old"])  # a fault that no longer fits is said at once
    # processes, since a fork of a process with several threads may wait for ever for a lock that another thread held
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(args.jobs, CONTEXT) as pool:
        tried = {pool.submit(try_out, Path(folder), mutants[number], args.near): number for number in chosen}
        for done in tqdm(as_completed(tried), total=len(chosen), unit="fault"):
            number, (test, seconds) = tried[done], done.result()
            if test is None:
                survivors.append(number)
            verdict = f"noticed by {test}" if test else "SURVIVED"
            tqdm.write(f"{number:3d} {verdict} ({seconds:.0f} s): {mutants[number]['what']}")
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} faults noticed; survivors: {sorted(survivors) or 'none'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="numbers of the faults to try (all)")
    parser.add_argument("--near", action="store_true", help="only the tests that lie near the changed file")
    parser.add_argument("--jobs", type=int, default=2, help="faults tried at a time (2)")
    parser.add_argument("--mutants", type=Path, default=MUTANTS, help="another file of faults")
    main(parser.parse_args())
