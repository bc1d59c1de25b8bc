"""ScienceQA (Lu et al. 2022, arXiv 2209.09513): reads and checks the problems and captions of one split."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationInfo
from typing_extensions import NotRequired, TypedDict

from lavin.runtime.console import counted, print_rank0
from lavin.runtime.errors import UserError
from lavin.runtime.files import json_list_sha256, json_sha256
from lavin.runtime.schema import NonBlankText, PlainName, Text, declared, distinct, read_validated, shown, validate
from util.data.checksums import named_files_sha256
from util.data.prompts import OPTIONS

# the fields that determine what a model is trained on and how its answer is scored
USED_FIELDS = ("question", "choices", "answer", "hint", "image", "lecture", "solution", "grade", "subject")
OWN_FIELDS = ("category", "topic")  # determine the columns of scores where problems lack a grade or a subject
GRADES = [f"grade{i}" for i in range(1, 13)]
SUBJECTS = ("natural science", "social science", "language science")
DISJOINT_SPLITS = ("train", "val", "test")  # others, such as trainval and minitest, are made of these


def names_a_choice(answer: int, info: ValidationInfo) -> int:
    n_choices = len(info.data.get("choices", OPTIONS))  # absent where they are wrong themselves
    if not 0 <= answer < n_choices:
        raise ValueError(f"there is no choice number {answer} among {n_choices}")
    return answer


def known_grade(grade: str) -> str:
    if grade not in GRADES:
        raise ValueError(f"{shown(grade)} is none of {GRADES[0]} to {GRADES[-1]}, ScienceQA's grades: leave grade out "
                         "of your own questions")
    return grade


def known_subject(subject: str) -> str:
    if subject not in SUBJECTS:
        raise ValueError(f"{shown(subject)} is none of {', '.join(SUBJECTS)}, ScienceQA's subjects: write other ones "
                         "as category")
    return subject


@declared
class Problem(TypedDict):
    question: NonBlankText
    choices: Annotated[list[NonBlankText], Field(min_length=2, max_length=len(OPTIONS))]
    answer: Annotated[int, AfterValidator(names_a_choice)]
    hint: Text
    lecture: Text
    solution: Text
    image: PlainName | None
    grade: NotRequired[Annotated[Text, AfterValidator(known_grade)]]
    subject: NotRequired[Annotated[Text, AfterValidator(known_subject)]]
    split: NotRequired[PlainName]
    skill: NotRequired[Text]
    topic: NotRequired[Text]
    category: NotRequired[Text]


# pid_splits.json: the ids of each split; an id names a folder of pictures
Splits = dict[PlainName, Annotated[list[PlainName], AfterValidator(distinct)]]


@declared
class Captions(TypedDict):
    captions: dict[str, Text]


@dataclass
class ScienceQA:
    """One split. problems: the problems, of type Problem, by id, in the split's order. captions: the captions by id.
    bad_pictures: the ids of problems that were dropped, since their picture is missing or broken.
    """

    root: Path
    problems: dict[str, Any]
    captions: dict[str, str]
    bad_pictures: list[str] = field(default_factory=list)

    def picture_path(self, qid: str) -> Path | None:
        problem = self.problems[qid]
        return problem["image"] and self.root / "images" / problem.get("split", "") / qid / problem["image"]

    def sample(self, n: int) -> "ScienceQA":
        """The split with n of its problems, as `sample_ids` draws them."""
        drawn = sample_ids(self.clusters, n)
        return replace(self, problems={qid: problem for qid, problem in self.problems.items() if qid in drawn})

    @property
    def clusters(self) -> dict[str, str]:
        """The cluster of each problem, by id."""
        return {qid: cluster(qid, problem) for qid, problem in self.problems.items()}

    @property
    def picture_paths(self) -> dict[str, Path]:
        """The picture of each problem that has one, by id."""
        return {qid: path for qid in self.problems if (path := self.picture_path(qid))}

    @property
    def pictures_sha256(self) -> str:
        """Equal for pictures of equal content, wherever they are stored."""
        return named_files_sha256(self.picture_paths)

    @property
    def fingerprint(self) -> str:
        """Equal for texts of equal results, wherever and in whichever order of keys they are stored."""
        own = () if has_grades_and_subjects(self.problems.values()) else OWN_FIELDS
        return json_list_sha256([qid, *(problem.get(name) for name in USED_FIELDS), self.captions.get(qid, ""),
                                 *(problem.get(name, "") for name in own)] for qid, problem in self.problems.items())


def has_grades_and_subjects(problems: Iterable[Any]) -> bool:
    """Whether all problems have the grade and the subject by which ScienceQA is scored."""
    return all("grade" in problem and "subject" in problem for problem in problems)


def cluster(qid: str, problem: Any) -> str:
    """Names the problems whose answers depend on the same knowledge: those with the same lecture (by its checksum);
    without one, of the same topic and skill; else the problem alone."""
    if problem["lecture"].strip():
        return f"lecture {json_sha256(problem['lecture'].strip())[:12]}"
    topic, skill = problem.get("topic", ""), problem.get("skill", "")
    return f"{topic}/{skill}" if topic or skill else f"question {qid}"


def sample_ids(clusters: Mapping[str, str], n: int) -> set[str]:
    """n of the question ids (all, where there are fewer): the same ones each time, whatever their order.

    They are whole clusters, but for the last one, so that the other clusters' questions know nothing of them. clusters:
    by question id.
    """
    def place(qid: str) -> list[bytes]:
        return [hashlib.sha256(text.encode()).digest() for text in (clusters[qid], qid)]
    return set(sorted(clusters, key=place)[:n])


def find_problems_file(root: Path) -> Path:
    """Returns the path of problems.json or, where that alone exists, of problem.json, as some READMEs spell it."""
    singular = root / "problem.json"
    return singular if singular.is_file() and not (root / "problems.json").is_file() else root / "problems.json"


def load_scienceqa(data_root: str, split: str, caption_file: str | None = None) -> ScienceQA:
    """Reads one split; without caption_file, captions are empty.

    Raises UserError for missing or broken files, an unknown split, and content that is not as declared above.
    """
    root = Path(data_root)
    path = find_problems_file(root)
    hint = "put ScienceQA's files there, or name their folder with --data_root"
    all_problems = read_validated(path, dict[str, Any], hint)
    problems = {qid: validate(all_problems[qid], Problem, f"{path}: problem {qid}")
                for qid in read_split(root / "pid_splits.json", split, path, all_problems, hint)}
    captions = read_captions(caption_file, problems, all_problems) if caption_file else {}
    warn_of_repeated_choices(problems)
    return ScienceQA(root, problems, captions)


def warn_of_repeated_choices(problems: dict) -> None:
    """Warns of problems that list a choice twice: they can be answered, but only one of the two counts as correct."""
    repeated = [qid for qid, problem in problems.items()
                if len({choice.strip() for choice in problem["choices"]}) < len(problem["choices"])]
    if repeated:
        print_rank0(f"a choice is listed twice in {counted(len(repeated), 'problem')}, the first is {repeated[0]}")


def read_split(path: Path, split: str, problems_path: Path, all_problems: dict, hint: str) -> list[str]:
    """The ids of one split. Raises UserError where there is none, or where test problems are trained on."""
    splits = read_validated(path, Splits, hint)
    if split not in splits:
        raise UserError(f"--split {split}: {path} has {', '.join(splits) or 'no split'}")
    if not splits[split]:
        raise UserError(f"{path} has no problem in split {split}: fetch or write it again")
    for a, b in combinations(DISJOINT_SPLITS, 2):
        shared = sorted(set(splits.get(a, ())) & set(splits.get(b, ())))
        if shared:
            raise UserError(f"{path}: {a} and {b} share {counted(len(shared), 'problem')}, the first is {shared[0]}: "
                            "fetch or write it again")
    missing = [qid for qid in splits[split] if qid not in all_problems]
    if missing:
        raise UserError(f"{problems_path} lacks problem {missing[0]}, which {path.name} lists: the files belong to two "
                        "data sets")
    return splits[split]


def read_captions(path: str, problems: dict, all_problems: dict) -> dict[str, str]:
    """Captions by id. Raises UserError for those of another data set; warns where some are missing or unknown."""
    captions = read_validated(path, Captions, "name it with --caption_file",
                              'write it as {"captions": {id: text}}')["captions"]
    pictures = [qid for qid, problem in problems.items() if problem["image"]]
    if pictures and not captions.keys() & problems.keys():
        raise UserError(f"{path} has a caption for none of this split's {counted(len(problems), 'question')}: "
                        "name that of this data set with --caption_file")
    n_captions, n_unknown = sum(qid in captions for qid in pictures), len(captions.keys() - all_problems.keys())
    if n_captions < len(pictures) or n_unknown:
        print_rank0(f"{path} has captions for {n_captions:,} of {counted(len(pictures), 'picture')}"
                    + (f", and {n_unknown:,} for unknown problems" if n_unknown else ""))
    return captions
