"""Talk to finished runs, in the browser or (--cli) in the terminal: `python demo.py --runs FOLDER`.

Without --runs, to those of scripts/quickstart_smollm2.sh, or else to those in this folder.

The frozen base model is loaded once; each question can go to another run. A model too large for one GPU is split over
several: `torchrun --nproc_per_node 2 demo.py --model_parallel_size 2 --runs FOLDER`.
"""

import argparse
import signal
from pathlib import Path

from lavin.runtime import distributed
from lavin.runtime.console import is_main_process, print_rank0, summary
from lavin.runtime.errors import UserError, one_line_errors
from util.chat.address import check_address, credentials
from util.chat.chatbot import Chatbot, Settings, find_runs, read_trained_format
from util.chat.distributed_chatbot import DistributedChatbot
from util.flags import Parser, count, interval, non_empty, non_negative, shared_flags
from util.trained_model import load_model

SMOLLM2_RUNS = "runs/smollm2"  # of scripts/quickstart_smollm2.sh


def get_args_parser() -> argparse.ArgumentParser:
    shared = shared_flags()
    parser = Parser("demo.py", description=summary(__doc__), parents=[shared], epilog=(
        "Flags of model and data that are left out are those of the runs."))
    parser.set_defaults(**dict.fromkeys(vars(shared.parse_args([]))))
    add = parser.add_argument
    add("--runs", "--adapter_path", type=non_empty,
        help=f"folder of finished runs, one of them, or a checkpoint ({SMOLLM2_RUNS} where it has any, else .)")
    add("--cli", action="store_true", help="in the terminal")
    add("--share", action="store_true", help="a public link through gradio.live; else this machine alone can connect")
    add("--server_name", default="127.0.0.1", type=non_empty,
        help="address of this machine that the page listens on; others can connect to any but 127.0.0.1, which needs "
             "--auth (127.0.0.1)")
    add("--port", "--server_port", type=interval(int, "[1, 65535]"), help="of the page (the first free one from 7860)")
    add("--auth", type=credentials, metavar="USER:PASSWORD", help="who may use the page")
    add("--tokenizer_path", help="tokenizer.model (the base model's)")
    add("--generation_temperature", default=0.0, type=non_negative, help="initial sampling temperature (0: greedy)")
    add("--top_p", default=0.75, type=interval(float, "(0, 1]"), help="initial threshold of nucleus sampling (0.75)")
    add("--max_new_tokens", default=128, type=count, help="initial limit on the length of an answer (128)")
    add("--options", nargs="+", help="published flag, without effect")
    return parser


def default_runs() -> str:
    return SMOLLM2_RUNS if any(Path(SMOLLM2_RUNS).glob("*/checkpoint-*.pth")) else "."


def chosen_runs(path: str) -> tuple[dict[str, Path], list[str]]:
    """As find_runs; a checkpoint is a run, too."""
    checkpoint = Path(path)
    if not checkpoint.is_file():
        return find_runs(path)
    read_trained_format(checkpoint)
    return {"/".join(checkpoint.absolute().parts[-2:]): checkpoint}, []


def load_chatbot(args) -> Chatbot:
    """The base model with those of the runs in args.runs that can share it; prints these, and which runs cannot."""
    folder = args.runs or default_runs()
    runs, left_out = chosen_runs(folder)
    for line in (*left_out, f"runs in {folder}: {', '.join(runs)}"):
        print_rank0(line)
    args.adapter_path = str(next(iter(runs.values())))
    model, tokenizer, _ = load_model(args)
    cls = Chatbot if distributed.model_parallel_size == 1 else DistributedChatbot
    bot = cls(model, tokenizer, runs, args.max_seq_len)
    if model.device.type == "cuda":
        print_rank0("warming up: compiling the model and capturing CUDA graphs ...")
        bot.warmup()
    return bot


def choose_interface(args):
    """talk(bot, settings) for the terminal or for the browser."""
    if args.cli:
        from util.chat.terminal import talk
        return talk
    check_address(args.server_name, args.port, args.auth)  # before the model is loaded, which takes long
    try:
        from util.chat.web import serve
    except ImportError as error:
        raise UserError("the page needs Gradio: pip install -r requirements-demo.txt, or take --cli") from error
    return lambda bot, settings: serve(bot, settings, args.data_root, args.port, args.share, args.server_name,
                                       args.auth)


def main(args) -> None:
    if distributed.init(args.model_parallel_size or 1)[1] > 1:
        raise UserError("demo.py runs a single model: set --model_parallel_size to the number of processes, or start "
                        "one process only")
    talk = choose_interface(args)
    bot = load_chatbot(args)
    settings = Settings(args.max_new_tokens, args.generation_temperature, args.top_p)
    if not isinstance(bot, DistributedChatbot):
        talk(bot, settings)
    elif is_main_process():
        with bot.leading():
            talk(bot, settings)
    else:
        bot.follow()
    distributed.close()


if __name__ == "__main__":
    with one_line_errors((signal.SIGTERM, signal.SIGHUP)):  # Ctrl-C stops an answer
        main(get_args_parser().parse_args())
