"""Builds the toy base from the train split: a tokenizer, a small LLaMA in Meta's files, a small ViT in timm's.

    python tools/make_toy_base.py [--data_root data/mini] [--out weights/toy] [--seed 0]

The LLaMA reads the problems in forms that fine-tuning does not use, captions in place of pictures, and learns which option
is right. The ViT learns to tell which caption belongs to a picture. Both are frozen by whoever uses them.
"""

import argparse
import sys
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sentencepiece import SentencePieceTrainer
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from lavin.errors import one_line_errors  # noqa: E402
from lavin.llama import Llama, LlamaConfig, PackedPlan  # noqa: E402
from lavin.tokenizer import Tokenizer  # noqa: E402
from lavin.vision import VisionEncoder, timm  # noqa: E402
from lavin.whole_files import whole_file  # noqa: E402
from util.datasets import load_pictures, load_scienceqa  # noqa: E402
from util.files import write_json  # noqa: E402
from util.prompts import OPTIONS, build_prompt  # noqa: E402

VOCABULARY = 1600
LLAMA = {"dim": 128, "n_layers": 4, "n_heads": 4, "multiple_of": 32, "norm_eps": 1e-5, "vocab_size": -1}
LLAMA_STEPS, LLAMA_LR = 520, 4e-3
LETTER_WEIGHT = 8.0  # of the answer's letter in the lessons' loss, where other answer tokens have 1
VIT_NAME = "vit_tiny_patch16_224"  # its class; every size is ours
VIT = {"img_size": 48, "patch_size": 8, "embed_dim": 64, "depth": 6, "num_heads": 4, "mlp_ratio": 3.0}
VIT_EPOCHS, VIT_LR = 40, 4e-3
SHIFT = 3  # pixels by which a picture moves, at most, from epoch to epoch
BATCH = 32  # lessons or pictures a step


def train_tokenizer(data, path: Path) -> Tokenizer:
    """SentencePiece BPE with LLaMA's special tokens; digits apart, unknown characters as bytes, newlines too."""
    # no piece reaches over a tab, which stands for the newline: SentencePiece takes no newlines in
    texts = ["".join(build_prompt(problem, "QCM-ALE", data.captions.get(qid, "")))
             for qid, problem in data.problems.items()]
    SentencePieceTrainer.train(
        sentence_iterator=(text.replace("\n", "\t") for text in texts),
        model_prefix=str(path.with_suffix("")), model_type="bpe", vocab_size=VOCABULARY, hard_vocab_limit=False,
        byte_fallback=True, split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        user_defined_symbols=[f"▁{letter}" for letter in OPTIONS], unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2)
    path.with_suffix(".vocab").unlink()
    return Tokenizer(path)


def lesson(data, qid: str, tokenizer: Tokenizer) -> tuple[list[int], list[float]]:
    """One problem as token ids and the weight of each in the loss; the caption stands where a picture will."""
    prompt, answer = build_prompt(data.problems[qid], "CQM-ALE")
    told = tokenizer.encode(f"Image: {data.captions.get(qid, 'N/A')}", bos=True) + tokenizer.encode(prompt)
    asked = len(tokenizer.encode(prompt))
    said = tokenizer.encode(prompt + answer, eos=True)[asked:]
    weights = [1.0] * len(said)
    weights[len(tokenizer.encode(f"{prompt}The answer is")) - asked] = LETTER_WEIGHT
    return told + said, [0.0] * len(told) + weights


def lesson_loss(model: Llama, lessons: list[tuple[list[int], list[float]]]):
    """Weighted mean cross-entropy, and the share of right letters."""
    ids = torch.tensor([i for ids, _ in lessons for i in ids])
    weights = torch.tensor([w for _, weights in lessons for w in weights])
    said = weights.nonzero()[:, 0]
    hidden = model(model.tok_embeddings(ids), PackedPlan([len(ids) for ids, _ in lessons], "cpu"))
    logits, target, weights = model.output(hidden[said - 1]), ids[said], weights[said]
    right = (logits.argmax(-1) == target)[weights == LETTER_WEIGHT].float().mean().item()
    return (F.cross_entropy(logits, target, reduction="none") * weights).sum() / weights.sum(), right


def fit(parameters: list, batches, loss_of, steps: int, lr: float, what: str) -> None:
    """AdamW under a one-cycle schedule (Smith & Topin 2019, arXiv 1708.07120); loss_of(batch) -> loss, share right."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    bar = tqdm(zip(range(steps), batches), what, total=steps, unit="step", mininterval=0.5)
    recent = []
    for _, batch in bar:
        loss, right = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        recent = [*recent[-29:], right]
        bar.set_postfix(right=f"{sum(recent) / len(recent):.2f}", refresh=False)


def endless(items: list, size: int, rng: Random):
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
    fit(list(model.parameters()), endless(lessons, BATCH, Random(seed)), lambda batch: lesson_loss(model, batch),
        LLAMA_STEPS, LLAMA_LR, "LLaMA")
    return model


def phrases(caption: str) -> list[str]:
    """Its words and pairs of neighbours: `red at` differs from `red on`."""
    words = caption.rstrip(".").replace(",", "").split()
    return words + [f"{a} {b}" for a, b in zip(words, words[1:])]


def caption_bags(captions: list[str]) -> torch.Tensor:
    """Which phrases each caption says [captions, phrases], rows of length 1."""
    known = sorted({phrase for caption in captions for phrase in phrases(caption)})
    bags = torch.tensor([[phrase in said for phrase in known] for said in map(phrases, captions)]).float()
    return F.normalize(bags)


def pretrain_vit(data, pictures: dict[str, torch.Tensor], seed: int) -> nn.Module:
    """CLIP's way (Radford et al. 2021, arXiv 2103.00020): which of all captions is the picture's? A caption is the sum
    of its phrases' vectors; a picture is its last CLS feature."""
    torch.manual_seed(seed)
    vit = timm.create_model(VIT_NAME, num_classes=0, **VIT)
    side = VIT["img_size"] // VIT["patch_size"]
    # places begin as sines and cosines, from which they are told apart sooner than from random vectors
    vit.pos_embed.data[:, 1:] = timm.layers.build_sincos2d_pos_embed([side, side], VIT["embed_dim"])
    encoder = VisionEncoder(vit, VIT["depth"])
    captions = sorted({data.captions[qid] for qid in pictures})
    bags = caption_bags(captions)
    texts = nn.Linear(bags.shape[1], encoder.width, bias=False)
    nn.init.normal_(texts.weight)
    target = {qid: captions.index(data.captions[qid]) for qid in pictures}
    rng = Random(seed)

    def loss_of(qids):
        shift = rng.randint(-SHIFT, SHIFT), rng.randint(-SHIFT, SHIFT)
        images = torch.stack([pictures[qid] for qid in qids]).roll(shift, (2, 3))
        cls = F.layer_norm(encoder(images)[:, -1], (encoder.width,))
        logits = cls @ texts(bags).t() / encoder.width ** 0.5
        right = torch.tensor([target[qid] for qid in qids])
        return F.cross_entropy(logits, right), (logits.argmax(1) == right).float().mean().item()

    fit([*encoder.parameters(), *texts.parameters()], endless(list(pictures), BATCH, rng), loss_of,
        VIT_EPOCHS * len(pictures) // BATCH, VIT_LR, "ViT")
    return vit


def main(args) -> None:
    out = args.out
    (out / "vit").mkdir(parents=True, exist_ok=True)
    data = load_scienceqa(args.data_root, "train", f"{args.data_root}/captions.json")
    tokenizer = train_tokenizer(data, out / "tokenizer.model")
    vit = pretrain_vit(data, load_pictures(data, VIT["img_size"], 2, skip_bad=False), args.seed)
    llama = pretrain_llama(data, tokenizer, args.seed)

    config = {"architecture": VIT_NAME, "model_args": VIT, "num_classes": 0,
              "pretrained_cfg": {"input_size": [3, VIT["img_size"], VIT["img_size"]], "num_classes": 0}}
    with whole_file(out / "vit" / "model.safetensors") as path:
        save_file(vit.state_dict(), path)
    write_json(out / "vit" / "config.json", config)
    write_json(out / "params.json", LLAMA)
    with whole_file(out / "consolidated.00.pth") as path:
        torch.save(llama.state_dict(), path)
    print(f"{out}: {tokenizer.n_words} pieces, LLaMA {sum(p.numel() for p in llama.parameters()):,} parameters, "
          f"ViT {sum(p.numel() for p in vit.parameters()):,}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_root", default="data/mini")
    parser.add_argument("--out", default="weights/toy", type=Path)
    parser.add_argument("--seed", default=0, type=int)
    with one_line_errors():
        main(parser.parse_args())
