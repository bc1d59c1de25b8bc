"""Talk to finished runs, in the browser or (--cli) in the terminal: `python demo.py --runs FOLDER`.

Without --runs, to those of scripts/quickstart_smollm2.sh, or else to those in this folder.

The frozen base model is loaded once; each question can go to another run. A model too large for one GPU is split over
several: `torchrun --nproc_per_node 2 demo.py --model_parallel_size 2 --runs FOLDER`.
"""

from lavin.runtime.startup import prepare_imports

if __name__ == "__main__":
    prepare_imports()

import signal

from lavin.runtime.errors import one_line_errors
from util.chat.command import main
from util.chat.settings import get_args_parser

if __name__ == "__main__":
    with one_line_errors((signal.SIGTERM, signal.SIGHUP)):  # Ctrl-C stops an answer
        main(get_args_parser().parse_args())
