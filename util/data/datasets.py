"""ScienceQA (Lu et al. 2022, arXiv 2209.09513): reads and checks the problems and captions of one split."""

from dataclasses import dataclass, field
from pathlib import Path

from lavin.runtime.errors import UserError
from lavin.runtime.files import read_json
from util.data.prompts import OPTIONS

FIELDS = ("question", "choices", "answer", "hint", "image", "grade", "subject", "lecture", "solution")


@dataclass
class ScienceQA:
    """One split. problems: by id, in the split's order. captions: by id. skipped: ids left out for a bad image."""

    root: Path
    problems: dict[str, dict]
    captions: dict[str, str]
    skipped: list[str] = field(default_factory=list)

    def picture_path(self, qid: str) -> Path | None:
        problem = self.problems[qid]
        return problem["image"] and self.root / "images" / problem.get("split", "") / qid / problem["image"]


def find_problems_file(root: Path) -> Path:
    """problems.json, or problem.json, as some READMEs spell it, where only that exists."""
    singular = root / "problem.json"
    return singular if singular.is_file() and not (root / "problems.json").is_file() else root / "problems.json"


def load_scienceqa(data_root: str, split: str, caption_file: str | None = None) -> ScienceQA:
    """Reads one split; without caption_file, captions are empty.

    Raises UserError for missing or broken files, an unknown split, and problems that lack a field.
    """
    root = Path(data_root)
    path = find_problems_file(root)
    hint = "put ScienceQA's files there, or name their folder with --data_root"
    all_problems, splits = read_json(path, hint), read_json(root / "pid_splits.json", hint)
    if split not in splits:
        raise UserError(f"--split {split}: {root / 'pid_splits.json'} has {', '.join(splits)}")
    problems = {}
    for qid in splits[split]:
        if qid not in all_problems:
            raise UserError(f"{path} lacks problem {qid}, which pid_splits.json lists: the files belong to two data "
                            "sets")
        problems[qid] = all_problems[qid]
        check_problem(path, qid, all_problems[qid])
    captions = read_json(caption_file, "name it with --caption_file") if caption_file else {}
    return ScienceQA(root, problems, captions.get("captions", {}))


def check_problem(path: Path, qid: str, problem: dict) -> None:
    missing = [name for name in FIELDS if name not in problem]
    if missing:
        raise UserError(f"{path}: problem {qid} lacks {', '.join(missing)}: fetch the file again")
    if not 2 <= len(problem["choices"]) <= len(OPTIONS):
        raise UserError(f"{path}: problem {qid} has {len(problem['choices'])} choices, not 2 to {len(OPTIONS)}: "
                        "leave it out")
    if not 0 <= problem["answer"] < len(problem["choices"]):
        raise UserError(f"{path}: problem {qid} has no choice number {problem['answer']}: fetch the file again")
