"""`python -m util.series FILE...` makes the runs that these files describe, one after another, also under util.launch.

scripts/run_all_variants.sh writes the files and starts this program. commands.py says what they hold.
"""

from lavin.runtime.startup import prepare_cuda, prepare_imports

if __name__ == "__main__":
    prepare_imports()
    prepare_cuda()

import sys
from pathlib import Path

from lavin.runtime.errors import one_line_errors
from util.series.commands import make_runs

if __name__ == "__main__":
    with one_line_errors():
        make_runs([Path(word) for word in sys.argv[1:]])
