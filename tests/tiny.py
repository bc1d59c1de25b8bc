"""Tiny models, examples and problems that the tests share. All texts are invented."""

from pathlib import Path

import torch

from lavin.llama import LlamaConfig
from lavin.mm_adapter import AdapterConfig
from lavin.model import LaVIN, pack
from lavin.timm_compat import timm
from lavin.tokenizer import IMAGE_SLOT, Example

ROOT = Path(__file__).parents[1]  # of the project
VOCABULARY = 50
IMAGE_SIZE = 16
# depth 6 gives six features; CLIP's ViT has a norm before its blocks, no patch bias, and QuickGELU
VITS = {"plain": "vit_tiny_patch16_224", "clip": "vit_base_patch16_clip_quickgelu_224"}
VARIANTS = [("attn", "normal"), ("attn", "router"), ("block", "router_block")]  # adapter_type, visual_adapter_type


def tiny_config(**changes) -> LlamaConfig:
    return LlamaConfig(**{"dim": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "vocab_size": VOCABULARY,
                          "multiple_of": 16, **changes})


def tiny_vit(kind: str = "plain"):
    vit = timm.create_model(VITS[kind], img_size=IMAGE_SIZE, patch_size=8, embed_dim=24, depth=6, num_heads=2,
                            num_classes=0)
    for name, parameter in vit.named_parameters():
        if parameter.ndim == 1:  # norms and biases begin at 1 and 0, where a mistake would not show
            parameter.data += 0.3 * torch.randn_like(parameter)
        elif "embed" in name or "token" in name:
            parameter.data.normal_()
    return vit


def sharpen(llama) -> None:
    """Random norms and attention far from uniform, so that a mistake in either shows."""
    for name, parameter in llama.named_parameters():
        if "adapter" not in name:
            if parameter.ndim == 1:
                parameter.data += 0.3 * torch.randn_like(parameter)
            elif "wq" in name or "wk" in name:
                parameter.data *= 3


def randomise_adapters(model) -> None:
    """Adapters as they are after training: nothing is zero any more."""
    for name, parameter in model.named_parameters():
        if "adapter" in name:
            parameter.data = 0.3 * torch.randn_like(parameter)


def tiny_model(seed: int = 0, trained: bool = True, vit: str = "plain", llama: dict = {}, **adapter) -> LaVIN:
    """A model in evaluation mode with rank 4, scale 0.7 and temperature 2, unless `adapter` says otherwise."""
    torch.manual_seed(seed)
    adapter = {"adapter_dim": 4, "adapter_scale": 0.7, "temperature": 2.0, "hidden_proj": 8, **adapter}
    model = LaVIN(tiny_config(**llama), tiny_vit(vit), AdapterConfig(**adapter))
    sharpen(model.llama)
    if trained:
        randomise_adapters(model)
    return model.eval()


def freeze_in(model: LaVIN, device, dtype) -> LaVIN:
    """As loading leaves it: frozen parameters in `dtype`, trained ones in float32."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(device, torch.float32 if "adapter" in name else dtype)
    return model.to(device)


def tiny_example(seed: int, prompt: int, answer: int = 3, image: bool = False) -> Example:
    """Random tokens in the layout of Tokenizer.example; `answer` 0 is a prompt to be continued."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(3, VOCABULARY, (2 + prompt + answer,), generator=generator).tolist()
    ids = [1, *words[:2], *[IMAGE_SLOT] * (6 * image), *words[2:]]
    picture = torch.randint(0, 256, (3, IMAGE_SIZE, IMAGE_SIZE), generator=generator, dtype=torch.uint8)
    return Example(ids, len(ids) - answer, picture if image else None)


def mixed_examples(answer: int = 3) -> list[Example]:
    """Ragged lengths, with and without pictures."""
    return [tiny_example(1, 5, answer), tiny_example(2, 9, answer, image=True), tiny_example(3, 2, answer),
            tiny_example(4, 7, answer, image=True)]


def problem(**changes) -> dict:
    return {"question": "Which pond is deeper?", "choices": ["the north pond", "the south pond"], "answer": 1,
            "hint": "", "image": None, "task": "closed choice", "grade": "grade3", "subject": "natural science",
            "topic": "ponds", "category": "Ponds", "skill": "Compare ponds", "lecture": "Depth is measured down.",
            "solution": "The south pond goes down further.", "split": "train", **changes}


# small, larger, small again with other contents, without pictures, large again: buffers grow, and sizes come back
BATCHES = [mixed_examples(), [tiny_example(i, 40 + i, 30, image=i % 2 == 0) for i in range(6)], mixed_examples()[::-1],
           [tiny_example(9, 7), tiny_example(8, 30)], [tiny_example(i, 41 + i, 29, image=i % 2 > 0) for i in range(10, 16)]]


def loss_and_gradients(model, examples):
    model.zero_grad()
    loss = model(pack(examples).to(model.device))
    loss.backward()
    # a pass without pictures gives the ViT's adapters no gradient
    return torch.cat([loss.detach()[None], *[p.grad.flatten() for p in model.parameters() if p.grad is not None]])


def imagenet(images):
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (images / 255 - mean[:, None, None]) / std[:, None, None]
