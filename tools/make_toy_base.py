"""Builds the toy base from a data set: a tokenizer, a small LLaMA in Meta's format, a small ViT in timm's.

    python -m tools.make_toy_base [--data_root data/mini] [--out weights/toy] [--seed 0] [--vit_only] [--split train]

The LLaMA learns which option is right, from problems in a prompt format that fine-tuning does not use and with captions
instead of images. The ViT learns which caption belongs to an image. Fine-tuning then freezes both.
"""

from lavin.runtime.startup import prepare_imports

if __name__ == "__main__":
    prepare_imports()

import io
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from sentencepiece import SentencePieceTrainer
from torch import nn

from lavin.attention import VarlenMetadata
from lavin.llama import Llama, LlamaConfig
from lavin.runtime.console import counted, progress_bar, working_on
from lavin.runtime.errors import UserError, one_line_errors
from lavin.runtime.files import atomic_write, write_json
from lavin.runtime.flags import FlagGroup, Flags, Parser, Role, flag
from lavin.runtime.schema import PathText, Seed, Text
from lavin.timm_compat import timm
from lavin.tokenizer import Tokenizer
from lavin.vision import VisionEncoder
from tools.output import make_folder, save_tensors
from util.data.datasets import load_scienceqa
from util.data.images import load_images
from util.data.prompts import OPTIONS, build_prompt

VOCAB_SIZE = 1600
LLAMA = {"dim": 128, "n_layers": 4, "n_heads": 4, "multiple_of": 32, "norm_eps": 1e-5, "vocab_size": -1}
LLAMA_STEPS, LLAMA_LR = 520, 4e-3
LETTER_WEIGHT = 8.0  # loss weight of the answer's letter; other answer tokens have weight 1
VIT_NAME = "vit_tiny_patch16_224"  # gives the architecture; VIT overrides all sizes
VIT: dict[str, Any] = {"img_size": 48, "patch_size": 8, "embed_dim": 64, "depth": 6, "num_heads": 4, "mlp_ratio": 3.0}
VIT_EPOCHS, VIT_LR = 40, 4e-3
MAX_SHIFT = 3  # pixels of random translation, as augmentation
BATCH_SIZE = 32  # lessons or images per step


@dataclass(frozen=True)
class Toy(FlagGroup):
    """The data set that is learned from, and the base that is written."""

    title: ClassVar[str] = "toy base"
    data_root: PathText = flag("data/mini", "folder of the data set", Role.DATA)
    out: Path = flag(Path("weights/toy"), "folder to write", Role.RUN)
    seed: Seed = flag(0, "seed of the weights and the order of samples", Role.RECIPE)
    split: Text = flag("train", "split of pid_splits.json to learn from", Role.DATA)
    vit_only: bool = flag(False, "the ViT alone, for a LLaMA from elsewhere", Role.RUN)


def get_args_parser() -> Parser:
    return Parser("-m tools.make_toy_base", __doc__, Toy)


def train_tokenizer(data, path: Path) -> Tokenizer:
    """SentencePiece BPE with LLaMA's special tokens; digits are split, unknown characters and newlines become bytes."""
    # a tab replaces the newline, which SentencePiece does not accept in training text; no piece spans a tab
    texts = ["".join(build_prompt(problem, "QCM-ALE", data.captions.get(qid, "")))
             for qid, problem in data.problems.items()]
    SentencePieceTrainer.train(
        sentence_iterator=(text.replace("\n", "\t") for text in texts),
        model_prefix=str(path.with_suffix("")), model_type="bpe", vocab_size=VOCAB_SIZE, hard_vocab_limit=False,
        byte_fallback=True, split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        user_defined_symbols=[f"▁{letter}" for letter in OPTIONS], unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
        minloglevel=2)
    path.with_suffix(".vocab").unlink()
    return Tokenizer(path)


def lesson(data, qid: str, tokenizer: Tokenizer) -> tuple[list[int], list[float]]:
    """One problem as token ids and their loss weights; the caption replaces the image features."""
    prompt, answer = build_prompt(data.problems[qid], "CQM-ALE")
    prompt_ids, answer_ids = tokenizer.encode_segments([prompt, answer])
    _, first_ids = tokenizer.encode_segments([prompt, "The answer is"])
    input_ids = tokenizer.encode(f"Image: {data.captions.get(qid, 'N/A')}", bos=True) + prompt_ids
    answer_ids.append(tokenizer.eos_id)
    weights = [1.0] * len(answer_ids)
    weights[len(first_ids)] = LETTER_WEIGHT
    return input_ids + answer_ids, [0.0] * len(input_ids) + weights


def lesson_loss(model: Llama, lessons: list[tuple[list[int], list[float]]]):
    """Weighted mean cross-entropy, and the fraction of correct letters."""
    ids = torch.tensor([i for ids, _ in lessons for i in ids])
    weights = torch.tensor([w for _, weights in lessons for w in weights])
    positions = weights.nonzero()[:, 0]
    hidden = model(model.tok_embeddings(ids), VarlenMetadata([len(ids) for ids, _ in lessons], "cpu"))
    logits, targets, weights = model.output(hidden[positions - 1]), ids[positions], weights[positions]
    accuracy = (logits.argmax(-1) == targets)[weights == LETTER_WEIGHT].float().mean().item()
    return (F.cross_entropy(logits, targets, reduction="none") * weights).sum() / weights.sum(), accuracy


def fit(parameters: list, batches, loss_of, steps: int, lr: float, description: str) -> None:
    """AdamW with a one-cycle schedule (Smith & Topin 2019, arXiv 1708.07120); loss_of(batch) -> loss, accuracy."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    bar = progress_bar(zip(range(steps), batches, strict=False), description, total=steps, unit="step")
    recent = []  # accuracies of the last 30 steps
    for _, batch in bar:
        loss, accuracy = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        recent = [*recent[-29:], accuracy]
        bar.set_postfix(accuracy=f"{sum(recent) / len(recent):.2f}", refresh=False)


def endless_batches(items: list, size: int, rng: Random):
    """Batches of shuffled items, epoch after epoch."""
    while True:
        order = rng.sample(items, len(items))
        yield from (order[i:i + size] for i in range(0, len(order) - size + 1, size))


def pretrain_llama(data, tokenizer: Tokenizer, seed: int) -> Llama:
    torch.manual_seed(seed)
    model = Llama(LlamaConfig.from_params(LLAMA, tokenizer.n_words))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.05)
    lessons = [lesson(data, qid, tokenizer) for qid in data.problems]
    fit(list(model.parameters()), endless_batches(lessons, BATCH_SIZE, Random(seed)),
        lambda batch: lesson_loss(model, batch), LLAMA_STEPS, LLAMA_LR, "LLaMA")
    return model


def phrases(caption: str) -> list[str]:
    """The caption's words and word pairs: `red at` differs from `red on`."""
    words = caption.rstrip(".").replace(",", "").split()
    return words + [f"{a} {b}" for a, b in zip(words, words[1:], strict=False)]


def caption_bags(captions: list[str]) -> torch.Tensor:
    """Bag of phrases of each caption [captions, phrases], rows normalised to length 1."""
    vocabulary = sorted({phrase for caption in captions for phrase in phrases(caption)})
    bags = torch.tensor([[phrase in present for phrase in vocabulary] for present in map(phrases, captions)]).float()
    return F.normalize(bags)


def pretrain_vit(data, images: dict[str, torch.Tensor], seed: int) -> nn.Module:
    """Trains a ViT as CLIP is trained (Radford et al. 2021, arXiv 2103.00020): it tells which caption an image has.

    A caption's embedding is the sum of its phrases' vectors, an image's embedding its last CLS feature.
    """
    torch.manual_seed(seed)
    vit = timm.create_model(VIT_NAME, num_classes=0, **VIT)
    grid = VIT["img_size"] // VIT["patch_size"]
    # position embeddings start as sines and cosines, which trains faster than random vectors
    vit.pos_embed.data[:, 1:] = timm.layers.build_sincos2d_pos_embed([grid, grid], VIT["embed_dim"])
    encoder = VisionEncoder(vit, VIT["depth"])
    captions = sorted({data.captions[qid] for qid in images})
    bags = caption_bags(captions)
    texts = nn.Linear(bags.shape[1], encoder.width, bias=False)
    nn.init.normal_(texts.weight)
    caption_ids = {qid: captions.index(data.captions[qid]) for qid in images}
    rng = Random(seed)

    def loss_of(qids):
        shift = rng.randint(-MAX_SHIFT, MAX_SHIFT), rng.randint(-MAX_SHIFT, MAX_SHIFT)
        batch = torch.stack([images[qid] for qid in qids]).roll(shift, (2, 3))
        cls = F.layer_norm(encoder(batch)[:, -1], (encoder.width,))
        logits = cls @ texts(bags).t() / encoder.width ** 0.5
        targets = torch.tensor([caption_ids[qid] for qid in qids])
        return F.cross_entropy(logits, targets), (logits.argmax(1) == targets).float().mean().item()

    fit([*encoder.parameters(), *texts.parameters()], endless_batches(list(images), BATCH_SIZE, rng), loss_of,
        VIT_EPOCHS * len(images) // BATCH_SIZE, VIT_LR, "ViT")
    return vit


def check_amount(data, images: dict) -> None:
    """Raises UserError where there is less than a batch to learn from."""
    n_captioned = sum(qid in data.captions for qid in images)
    if n_captioned < len(images):
        raise UserError(f"{data.root}/captions.json lacks {len(images) - n_captioned} of "
                        f"{counted(len(images), 'picture')}: make the data again")
    if len(images) < BATCH_SIZE:  # and so there may be less than a batch of problems
        raise UserError(f"{data.root} has {counted(len(data.problems), 'problem')} and "
                        f"{counted(len(images), 'picture')} to train on, and {BATCH_SIZE} of each are needed: make "
                        "more")


def write_vit(vit: nn.Module, folder: Path) -> None:
    """Writes a ViT as a folder. model.safetensors comes last: where it is, all is there, and of one ViT."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    config = {"architecture": VIT_NAME, "model_args": VIT, "num_classes": 0,
              "pretrained_cfg": {"input_size": [3, VIT["img_size"], VIT["img_size"]], "num_classes": 0}}
    write_json(folder / "config.json", config)
    save_tensors(vit.state_dict(), folder / "model.safetensors")


def write_llama(llama: Llama, folder: Path) -> None:
    write_json(folder / "params.json", LLAMA)
    with atomic_write(folder / "consolidated.00.pth") as path:
        buffer = io.BytesIO()  # torch itself reports a full disk as a bug
        torch.save(llama.state_dict(), buffer)
        path.write_bytes(buffer.getvalue())


def main(args: Flags) -> None:
    out = args.out
    make_folder(out / "vit")
    data = load_scienceqa(args.data_root, args.split, f"{args.data_root}/captions.json")
    images = load_images(data, VIT["img_size"], 2, skip_bad=False)
    check_amount(data, images)
    vit = pretrain_vit(data, images, args.seed)
    if not args.vit_only:
        (out / "consolidated.00.pth").unlink(missing_ok=True)  # written last: where it is, all is of one base
    write_vit(vit, out / "vit")
    print(f"{out / 'vit'}: ViT, {sum(p.numel() for p in vit.parameters()):,} parameters")
    if args.vit_only:
        return
    tokenizer = train_tokenizer(data, out / "tokenizer.model")
    llama = pretrain_llama(data, tokenizer, args.seed)
    write_llama(llama, out)
    print(f"{out}: {counted(tokenizer.n_words, 'piece')}, LLaMA "
          f"{sum(p.numel() for p in llama.parameters()):,} parameters")


if __name__ == "__main__":
    with one_line_errors():
        args = get_args_parser().parse_args()
        with working_on(args.out.name):
            main(args)
