"""Prompts and answers as text: ScienceQA's formats `INPUT-OUTPUT` (Lu et al. 2022, arXiv 2209.09513), and instructions.

`parse_answer` in util/evaluation/answers.py finds the option that a model's text names.

Letters: Q question, C context, M multiple options, L lecture, E explanation (the field `solution`), A answer.
"""

from bisect import bisect_left

OPTIONS = "ABCDE"
PROMPT_FORMATS = tuple(f"{order}-{output}" for order in ("CQM", "QCM")
                       for output in ("A", "LA", "EA", "LEA", "ELA", "AL", "AE", "ALE", "AEL")) + (
    "QCML-A", "QCME-A", "QCMLE-A", "QCLM-A", "QCEM-A", "QCLEM-A", "QCML-AE")
PREFIX_TOKENS = 16  # at most, of the modality token, BOS and "Image: N/A"
RESPONSE = "Response:"  # the end of every prompt
ANSWER_WORDS = "The answer is"  # they come before the letter of the option in every answer


def context(problem: dict, caption: str) -> str:
    return " ".join((problem["hint"], caption)).strip() or "N/A"


def explanation(problem: dict, letters: str) -> str:
    """Lecture and solution, in the order of the letters L and E; newlines become the two characters `\\n`."""
    fields = {"L": "lecture", "E": "solution"}
    return " ".join(problem[fields[letter]].replace("\n", "\\n") for letter in letters if letter in fields)


def tidy(text: str) -> str:
    return text.replace("  ", " ").strip()


def build_prompt(problem: dict, prompt_format: str, caption: str = "") -> tuple[str, str]:
    """Prompt and answer of one problem. caption: the caption of its image, where captions are used."""
    order, output = prompt_format.split("-")
    because = f"BECAUSE: {explanation(problem, order)}".strip()
    options = zip(OPTIONS, problem["choices"], strict=False)
    parts = {
        "Q": f"Question: {problem['question']}",
        "C": f"Context: {context(problem, caption)}",
        "M": "Options: " + " ".join(f"({letter}) {choice}" for letter, choice in options),
    }
    lines = []
    for letter in order:
        if letter in parts:
            lines.append(parts[letter])
        elif because not in lines:  # L and E share one line
            lines.append(because)
    prompt = tidy("\n".join(line for line in lines if line != "BECAUSE:") + f"\n{RESPONSE}")
    return prompt, build_answer(problem, output)


def build_answer(problem: dict, output: str) -> str:
    verdict = answer_text(problem["answer"])
    reason = explanation(problem, output)
    if output.startswith("A"):
        return tidy(f"{verdict} BECAUSE: {reason}" if reason.strip() else verdict)
    return tidy(f"{reason} {verdict}")


def fit_prompt(tokenizer, prompt: str, image, n_prompt: int, max_seq_len: int) -> str:
    """The prompt, without as many words in its middle as are too many for --max_seq_len: training sees no longer texts,
    the question is at the beginning (or, with CQM, in the second half), and the options are at the end."""
    if len(prompt.encode()) + n_prompt + PREFIX_TOKENS < max_seq_len:  # no token is shorter than a byte
        return prompt
    words = prompt.split(" ")

    def without(n: int) -> str:
        start = (len(words) - n) // 2
        return " ".join(words[:start] + words[start + n:])

    def fits(n: int) -> bool:
        return len(tokenizer.example(without(n), None, image, n_prompt).ids) < max_seq_len  # 1: the modality token

    return prompt if fits(0) else without(bisect_left(range(len(words)), True, key=fits))


def instruction_prompt(instruction: str, input: str = "") -> str:
    """The prompt for instruction tuning (Alpaca and LLaVA-Instruct), the chat and MME."""
    return tidy(f"Instruction: {instruction} {input}") + f"\n{RESPONSE}"


def answer_text(index: int) -> str:
    return f"{ANSWER_WORDS} {OPTIONS[index]}."
