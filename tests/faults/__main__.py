"""Repeats the fault bench: bad inputs, what a machine does to a run, and random kills.

    python -m tests.faults [inputs] [machine] [kills] [--device cuda] [--n 20]

Each bad input must end in one line, or leave the result as it is without it. After each fault of the machine and each
kill, the same command must end with the same bytes. Exit status 1 where something does not.
"""

import argparse
import os
import sys

os.environ["LAVIN_CACHE"] = ""  # no case gets what another has read
os.environ["HF_HUB_OFFLINE"] = "1"  # names of models that do not exist are not asked for on the network

from lavin.runtime.console import format_table, summary
from lavin.runtime.errors import one_line_errors
from tests.faults import inputs, machine


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m tests.faults", description=summary(__doc__))
    parser.add_argument("what", nargs="*", choices=["inputs", "machine", "kills", []], default=[], help="default: all")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="of the runs")
    parser.add_argument("--n", default=20, type=int, help="kills")
    parser.add_argument("--jobs", default=1, type=int, help="runs that are killed side by side")
    parser.add_argument("--match", default="", help="only the inputs and faults whose names contain this")
    return parser


def main(args) -> int:
    """Returns the number of wrong cases."""
    benches = {"inputs": lambda: inputs.bench_inputs(args.match),
               "machine": lambda: machine.bench_machine(args.device, args.match),
               "kills": lambda: machine.bench_kills(args.device, args.n, args.jobs)}
    headers = {"inputs": ["inputs", "cases", *inputs.OUTCOMES]}
    n_wrong = 0
    for what in args.what or benches:
        rows, wrong = benches[what]()
        total = [["all", *map(sum, zip(*(row[1:] for row in rows), strict=True))]] if what == "inputs" else []
        print("\n" + format_table(headers.get(what, machine.HEADER), rows + total), *wrong, "", sep="\n",
              flush=True)
        n_wrong += len(wrong)
    return n_wrong


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main(get_args_parser().parse_args()) > 0)
