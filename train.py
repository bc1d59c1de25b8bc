"""Fine-tunes LaVIN on ScienceQA: `python train.py ...`, or `torchrun --nproc_per_node N train.py ...` for N GPUs.

The run's folder, --output_dir, belongs to one recipe: the same command again goes on, or says that the run is finished.
It gets recipe.json, config.json, log.txt, metrics.jsonl and checkpoint-{epoch}.pth; eval.py adds the scores.
"""

from lavin.runtime.startup import prepare_cuda, prepare_imports

if __name__ == "__main__":
    prepare_imports()
    prepare_cuda()

from lavin.runtime.errors import one_line_errors
from util.training.command import main
from util.training.settings import get_args_parser

if __name__ == "__main__":
    with one_line_errors():
        main(get_args_parser().parse_args())
