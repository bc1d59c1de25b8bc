"""Scores a run on MME: `python eval_mme.py --adapter_path RUN --mme_root FOLDER`, or under torchrun, like eval.py.

Writes mme_answers.jsonl and mme_scores.json to the run's folder. Adapter flags are read from the checkpoint.
"""

from lavin.runtime.startup import prepare_imports

if __name__ == "__main__":
    prepare_imports()

from lavin.runtime.errors import one_line_errors
from util.evaluation.mme import main
from util.evaluation.settings import mme_parser as get_args_parser

if __name__ == "__main__":
    with one_line_errors():
        main(get_args_parser().parse_args())
