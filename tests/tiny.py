"""Tiny models, examples and problems shared by the tests. All texts are made up."""

from pathlib import Path

import torch

from lavin.generation.generate import decode
from lavin.llama import LlamaConfig
from lavin.mm_adapter import AdapterConfig
from lavin.model import LaVIN, pack
from lavin.timm_compat import timm
from lavin.tokenizer import IMAGE_SLOT, Example
from lavin.weights.adapters import pack_adapters

ROOT = Path(__file__).parents[1]  # the repository
VOCAB_SIZE = 50
IMAGE_SIZE = 16
# CLIP's ViT has a norm before its blocks, no patch bias, and QuickGELU
VIT_ARCHITECTURES = {"plain": "vit_tiny_patch16_224", "clip": "vit_base_patch16_clip_quickgelu_224"}
VARIANTS = [("attn", "normal"), ("attn", "router"), ("block", "router_block")]  # adapter_type, visual_adapter_type


def tiny_config(**changes) -> LlamaConfig:
    return LlamaConfig(**{"dim": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "vocab_size": VOCAB_SIZE,
                          "multiple_of": 16, **changes})


def tiny_vit(architecture: str = "plain"):
    vit = timm.create_model(VIT_ARCHITECTURES[architecture], img_size=IMAGE_SIZE, patch_size=8, embed_dim=24,
                            depth=6, num_heads=2, num_classes=0)
    for name, parameter in vit.named_parameters():
        if parameter.ndim == 1:  # at their initial 1 and 0, a missing norm or bias would not show
            parameter.data += 0.3 * torch.randn_like(parameter)
        elif "embed" in name or "token" in name:
            parameter.data.normal_()
    return vit


def perturb_weights(llama) -> None:
    """Randomise norms and sharpen attention in place; with the initial weights, errors in either would not show."""
    for name, parameter in llama.named_parameters():
        if "adapter" not in name:
            if parameter.ndim == 1:
                parameter.data += 0.3 * torch.randn_like(parameter)
            elif "wq" in name or "wk" in name:
                parameter.data *= 3


def randomise_adapters(model) -> None:
    """Gives adapters random values, so that none of their parameters is zero, as after training."""
    for name, parameter in model.named_parameters():
        if "adapter" in name:
            parameter.data = 0.3 * torch.randn_like(parameter)


def tiny_model(seed: int = 0, trained: bool = True, vit: str = "plain", llama: dict | None = None,
               **adapter) -> LaVIN:
    """A model in eval mode with adapter rank 4, scale 0.7 and temperature 2; `llama` and `adapter` override configs."""
    torch.manual_seed(seed)
    adapter = {"adapter_dim": 4, "adapter_scale": 0.7, "temperature": 2.0, "hidden_proj": 8, **adapter}
    model = LaVIN(tiny_config(**(llama or {})), tiny_vit(vit), AdapterConfig(**adapter))
    perturb_weights(model.llama)
    if trained:
        randomise_adapters(model)
    return model.eval()


def cast_frozen(model: LaVIN, device, dtype) -> LaVIN:
    """Move to `device` as load_base does: frozen parameters in `dtype`, trained ones in float32."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(device, torch.float32 if "adapter" in name else dtype)
    return model.to(device)


def tiny_example(seed: int, prompt: int, answer: int = 3, image: bool = False) -> Example:
    """Random ids in the layout of Tokenizer.example, with `prompt` and `answer` tokens; 0 for a prompt to continue."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCAB_SIZE, (2 + prompt + answer,), generator=generator).tolist()
    ids = [1, *tokens[:2], *[IMAGE_SLOT] * (6 * image), *tokens[2:]]
    pixels = torch.randint(0, 256, (3, IMAGE_SIZE, IMAGE_SIZE), generator=generator, dtype=torch.uint8)
    return Example(ids, len(ids) - answer, pixels if image else None)


def mixed_examples(answer: int = 3) -> list[Example]:
    """Makes examples of different lengths, with and without images."""
    return [tiny_example(1, 5, answer), tiny_example(2, 9, answer, image=True), tiny_example(3, 2, answer),
            tiny_example(4, 7, answer, image=True)]


def problem(**changes) -> dict:
    return {"question": "Which pond is deeper?", "choices": ["the north pond", "the south pond"], "answer": 1,
            "hint": "", "image": None, "task": "closed choice", "grade": "grade3", "subject": "natural science",
            "topic": "ponds", "category": "Ponds", "skill": "Compare ponds", "lecture": "Depth is measured down.",
            "solution": "The south pond goes down further.", "split": "train", **changes}


# Small, larger, small with other contents, without images, large: static buffers grow, and batch sizes recur.
BATCHES = [mixed_examples(), [tiny_example(i, 40 + i, 30, image=i % 2 == 0) for i in range(6)], mixed_examples()[::-1],
           [tiny_example(9, 7), tiny_example(8, 25), tiny_example(7, 4)],
           [tiny_example(i, 41 + i, 29, image=i % 2 > 0) for i in range(10, 16)]]


def loss_and_gradients(model, examples):
    """The loss and all gradients in one vector."""
    model.zero_grad()
    loss = model(pack(examples, device=model.device))
    loss.backward()
    # without images, the ViT's adapters get no gradient
    return torch.cat([loss.detach()[None], *[p.grad.flatten() for p in model.parameters() if p.grad is not None]])


def greedy(logits):
    return logits.argmax(-1)


def greedy_logits(model, examples, steps: int, draft=()):
    """Logits [steps, B, V] of greedy decoding."""
    logits = []

    def choose(step_logits):
        logits.append(step_logits)
        return greedy(step_logits)

    list(decode(model, examples, steps, choose, draft))
    return torch.stack(logits)


def normalize_imagenet(images):
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (images / 255 - mean[:, None, None]) / std[:, None, None]


def save_adapters(model, path, **extra) -> None:
    """Write a checkpoint with these entries beside the adapters."""
    path.write_bytes(pack_adapters(model, **extra))
