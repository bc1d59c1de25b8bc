"""Test questions of ScienceQA as examples for the chat page."""

from itertools import zip_longest

from lavin.runtime.errors import UserError
from util.data.datasets import load_scienceqa

N_EXAMPLES = 6


def find_examples(data_root: str) -> list[list]:
    """Returns message, context, options and the right option's index of test questions, each on a different skill.

    Questions with and without image alternate where there are both. Returns none where there is no data set: the chat
    works without.
    """
    try:
        data = load_scienceqa(data_root, "test")
    except UserError:
        return []
    examples = {}  # by (has image, skill)
    for qid, problem in data.problems.items():
        path = data.picture_path(qid)
        if path is None or path.is_file():
            examples.setdefault((path is not None, problem.get("skill")), [
                {"text": problem["question"], "files": [str(path)] if path else []}, problem["hint"],
                "\n".join(problem["choices"]), problem["answer"]])
    with_image, text_only = ([example for (has_image, _), example in examples.items() if has_image == wanted]
                             for wanted in (True, False))
    return [example for pair in zip_longest(with_image, text_only) for example in pair if example][:N_EXAMPLES]
