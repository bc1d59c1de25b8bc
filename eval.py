"""Scores a run on ScienceQA: `python eval.py --adapter_path RUN ...`, or under torchrun, which divides the questions.

Writes preds.json, generations.jsonl and scores.json to the run's folder; those of a run's early checkpoint to a folder
inside it. Adapter flags are read from the checkpoint. The same command again goes on where it was killed.
"""

from lavin.runtime.startup import prepare_cuda, prepare_imports

if __name__ == "__main__":
    prepare_imports()
    prepare_cuda()

from lavin.runtime.errors import one_line_errors
from util.evaluation.scienceqa import main
from util.evaluation.settings import scienceqa_parser as get_args_parser

if __name__ == "__main__":
    with one_line_errors():
        main(get_args_parser().parse_args())
