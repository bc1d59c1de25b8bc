"""Talk to finished runs, in the browser or (--cli) in the terminal: `python demo.py --runs FOLDER`.

The frozen base is loaded once; which run answers is chosen from question to question. A model too large for one GPU is
shared by several: `torchrun --nproc_per_node 2 demo.py --model_parallel_size 2 --runs FOLDER`.
"""

import argparse
from contextlib import nullcontext

from eval import load_model
from lavin import parallel
from lavin.errors import UserError, one_line_errors
from util.chat import Chatbot, Settings, find_runs
from util.flags import shared_flags
from util.logging import is_first, say
from util.shared_chat import SharedChatbot


def get_args_parser() -> argparse.ArgumentParser:
    shared = shared_flags()
    parser = argparse.ArgumentParser("demo.py", description=__doc__.splitlines()[0], parents=[shared], epilog=(
        "Flags of model and data that are left out are those of the runs."))
    parser.set_defaults(**dict.fromkeys(vars(shared.parse_args([]))))
    add = parser.add_argument
    add("--runs", default=".", help="folder of finished runs, or one of them (.)")
    add("--cli", action="store_true", help="in the terminal")
    add("--share", action="store_true", help="a public link through gradio.live; else this machine alone can connect")
    add("--port", type=int, help="of http://127.0.0.1 (the first free one from 7860)")
    add("--tokenizer_path", help="tokenizer.model (the base model's)")
    add("--generation_temperature", default=0.0, type=float, help="of sampling, to begin with (0: the likeliest token)")
    add("--top_p", default=0.75, type=float, help="nucleus of sampling, to begin with (0.75)")
    add("--max_new_tokens", default=128, type=int, help="longest answer, to begin with (128)")
    return parser


def load_chatbot(args) -> Chatbot:
    """The base of the runs in args.runs, and those of them that can share it; says which cannot."""
    runs, left_out = find_runs(args.runs)
    for line in left_out:
        say(line)
    args.adapter_path = str(next(iter(runs.values())))
    model, tokenizer, _ = load_model(args)
    bot = (Chatbot if parallel.model_size == 1 else SharedChatbot)(model, tokenizer, runs, args.max_seq_len)
    if model.device.type == "cuda":
        say("first answers, which compile and record the model ...")
        bot.warm_up()
    return bot


def choose_front(args):
    """talk(bot, settings) in the terminal or on the page."""
    if args.cli:
        from util.terminal_chat import talk
        return talk
    try:
        from util.web_chat import serve
    except ImportError as error:
        raise UserError("the page needs Gradio: pip install -r requirements-demo.txt, or take --cli") from error
    return lambda bot, settings: serve(bot, settings, args.data_root, args.port, args.share)


def main(args) -> None:
    if parallel.init(args.model_parallel_size or 1)[1] > 1:
        raise UserError("demo.py is one model: give --model_parallel_size the number of processes, or start one alone")
    talk = choose_front(args)
    bot = load_chatbot(args)
    if not is_first():
        bot.follow()
    else:
        with bot.leading() if parallel.model_size > 1 else nullcontext():
            talk(bot, Settings(args.max_new_tokens, args.generation_temperature, args.top_p))
    parallel.close()


if __name__ == "__main__":
    with one_line_errors():
        main(get_args_parser().parse_args())
