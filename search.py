"""Searches hyperparameters on validation: `python search.py --study S --trials 64 -- [train.py's flags]`.

A study is a folder, S. The same command again is one more worker, on this node or another, and goes on with what killed
workers left. Flags given after -- have the value given; the others of --space are searched. `python plot_results.py S`
draws the report. Needs `pip install -r requirements/search.txt`.
"""

from lavin.runtime.startup import prepare_imports

if __name__ == "__main__":
    prepare_imports()

from lavin.runtime.errors import one_line_errors
from util.search.command import main
from util.search.settings import get_args_parser

if __name__ == "__main__":
    with one_line_errors():
        main(get_args_parser().parse_args())
