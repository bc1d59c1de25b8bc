"""A ScienceQA problem as prompt and answer, in the formats of Lu et al. 2022 (arXiv 2209.09513), `INPUT-OUTPUT`;
an instruction as prompt.

Letters: Q question, C context, M multiple options, L lecture, E explanation (the field `solution`), A answer.
"""

import re

OPTIONS = "ABCDE"
PROMPT_FORMATS = tuple(f"{order}-{output}" for order in ("CQM", "QCM")
                       for output in ("A", "LA", "EA", "LEA", "ELA", "AL", "AE", "ALE", "AEL")) + (
    "QCML-A", "QCME-A", "QCMLE-A", "QCLM-A", "QCEM-A", "QCLEM-A", "QCML-AE")
ANSWER = re.compile(r"The answer is ([A-Z])\.")


def context(problem: dict, caption: str) -> str:
    return " ".join((problem["hint"], caption)).strip() or "N/A"


def explanation(problem: dict, letters: str) -> str:
    """Lecture and solution, as the letters L and E order them; newlines become the two characters `\\n`."""
    fields = {"L": "lecture", "E": "solution"}
    return " ".join(problem[fields[letter]].replace("\n", "\\n") for letter in letters if letter in fields)


def tidy(text: str) -> str:
    return text.replace("  ", " ").strip()


def build_prompt(problem: dict, prompt_format: str, caption: str = "") -> tuple[str, str]:
    """Prompt and answer of one problem. caption: the picture's, where captions are used."""
    order, output = prompt_format.split("-")
    because = f"BECAUSE: {explanation(problem, order)}".strip()
    parts = {
        "Q": f"Question: {problem['question']}",
        "C": f"Context: {context(problem, caption)}",
        "M": "Options: " + " ".join(f"({letter}) {choice}" for letter, choice in zip(OPTIONS, problem["choices"])),
    }
    lines = []
    for letter in order:
        if letter in parts:
            lines.append(parts[letter])
        elif because not in lines:  # L and E share one line
            lines.append(because)
    prompt = tidy("\n".join(line for line in lines if line != "BECAUSE:") + "\nResponse:")
    return prompt, build_answer(problem, output)


def build_answer(problem: dict, output: str) -> str:
    verdict = answer_text(problem["answer"])
    reason = explanation(problem, output)
    if output.startswith("A"):
        return tidy(f"{verdict} BECAUSE: {reason}" if reason.strip() else verdict)
    return tidy(f"{reason} {verdict}")


def instruction_prompt(instruction: str, input: str = "") -> str:
    """The prompt of instruction tuning (Alpaca's and LLaVA-Instruct's records), of the chat and of MME."""
    return tidy(f"Instruction: {instruction} {input}") + "\nResponse:"


def answer_text(index: int) -> str:
    return f"The answer is {OPTIONS[index]}."


def parse_answer(text: str, n_choices: int) -> int | None:
    """Index of the option that a text names, or None where it names none of the n_choices."""
    match = ANSWER.search(text)
    index = OPTIONS.find(match.group(1)) if match else -1
    return index if 0 <= index < n_choices else None
