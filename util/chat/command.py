"""The work of demo.py: it finds the runs, loads the model that they share, and serves the page or the terminal."""

from pathlib import Path

from lavin.runtime import distributed
from lavin.runtime.console import is_main_process, print_rank0
from lavin.runtime.errors import UserError
from lavin.runtime.flags import Flags
from lavin.weights.adapters import read_adapters
from util.chat.address import check_address
from util.chat.chatbot import Chatbot, Settings, find_runs, read_trained_format
from util.chat.distributed_chatbot import DistributedChatbot
from util.chat.settings import SMOLLM2_RUNS
from util.runs import last_checkpoint
from util.trained_model import load_model, warn_of_other_tokenization


def default_runs() -> str:
    return SMOLLM2_RUNS if any(Path(SMOLLM2_RUNS).glob("*/checkpoint-*.pth")) else "."


def chosen_runs(path: str) -> tuple[dict[str, Path], list[str]]:
    """Returns the runs that `find_runs` gives for a folder. A checkpoint is a run, too."""
    checkpoint = Path(path)
    if not checkpoint.is_file():
        return find_runs(path)
    read_trained_format(checkpoint)
    return {"/".join(checkpoint.absolute().parts[-2:]): checkpoint}, []


def load_chatbot(args: Flags) -> Chatbot:
    """Loads the base model with those of the runs in args.runs that can share it; prints these, and which runs cannot.
    """
    folder = args.runs or default_runs()
    runs, left_out = chosen_runs(folder)
    for line in (*left_out, f"runs in {folder}: {', '.join(runs)}"):
        print_rank0(line)
    args.adapter_path = str(next(iter(runs.values())))
    model, tokenizer, _ = load_model(args)
    for run in list(runs.values())[1:]:
        path = last_checkpoint(str(run))
        warn_of_other_tokenization(path, read_adapters(path).get("tokenization"), tokenizer)
    cls = Chatbot if distributed.model_parallel_size == 1 else DistributedChatbot
    bot = cls(model, tokenizer, runs, args.max_seq_len)
    if model.device.type == "cuda":
        print_rank0("warming up: compiling the model and capturing CUDA graphs ...")
        bot.warmup()
    return bot


def choose_interface(args: Flags):
    """Returns talk(bot, settings), for the terminal or for the browser."""
    if args.cli:
        from util.chat.terminal import talk
        return talk
    check_address(args.server_name, args.port, args.auth)  # before the model is loaded, which takes long
    try:
        from util.chat.web import serve
    except ImportError as error:
        raise UserError("the page needs Gradio: pip install -r requirements/demo.txt, or take --cli") from error
    return lambda bot, settings: serve(bot, settings, args.data_root, args.port, args.share, args.server_name,
                                       args.auth)


def main(args: Flags) -> None:
    if distributed.init(args.model_parallel_size)[1] > 1:
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
