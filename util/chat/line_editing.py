"""Lines that people type: edited with arrow keys, with a history and completed commands, as far as the machine can.

prompt_toolkit does it where it is installed (requirements/demo.txt), or else Python's readline. Standard input that is
no terminal is read line by line. The history ends with the program, since it may hold what nobody else should read.
"""

import sys
from collections.abc import Callable, Sequence

ReadLine = Callable[[str, str], str]  # (the prompt, the text that stands there to be edited) -> the line


def line_reader(words: Sequence[str]) -> ReadLine:
    """Returns the function that reads a line. words: the words that Tab completes at the beginning of a line."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return lambda prompt, text: input(prompt)
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
    except ImportError:
        return readline_reader(words)
    session: PromptSession[str] = PromptSession(
        completer=WordCompleter(list(words), sentence=True), complete_while_typing=False, enable_suspend=True)
    return lambda prompt, text: session.prompt(prompt, default=text)


def readline_reader(words: Sequence[str]) -> ReadLine:
    """`input`, which takes its line from readline once that is imported."""
    try:
        import readline
    except ImportError:  # not every Python has it
        return lambda prompt, text: input(prompt)
    readline.set_completer_delims("")
    readline.set_completer(lambda begun, i: ([word for word in words if word.startswith(begun)] + [None])[i])
    readline.parse_and_bind("tab: complete")

    def read(prompt: str, text: str) -> str:
        readline.set_startup_hook(lambda: readline.insert_text(text))
        try:
            return input(prompt)
        finally:
            readline.set_startup_hook(None)
    return read
