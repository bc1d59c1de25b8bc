"""ViTs from Hugging Face, OpenAI and timm files: the features equal those of the library that wrote the file."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from lavin.mm_adapter import AdapterConfig
from lavin.runtime.errors import UserError
from lavin.timm_compat import timm
from lavin.weights.load import load_base
from lavin.weights.vision import open_vit
from tiny import IMAGE_SIZE, normalize_imagenet, tiny_vit

IMAGES = torch.randint(0, 256, (2, 3, IMAGE_SIZE, IMAGE_SIZE), generator=torch.Generator().manual_seed(0),
                       dtype=torch.uint8)
WIDTH, PATCH, DEPTH = 128, 8, 6


def error_message(function, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@torch.no_grad()
def features(base, vision_model):
    """The vision features of a model with fresh adapters, which are the identity."""
    adapter = AdapterConfig(visual_adapter_type="router_block")
    model, _ = load_base(str(base.weights), "tiny", str(vision_model), adapter, torch.device("cpu"), torch.float32)
    assert not any(p.requires_grad for name, p in model.vision.named_parameters() if "adapter" not in name)
    return model.eval().vision(IMAGES)


def timm_features(vit):
    layers = vit.eval().forward_intermediates(normalize_imagenet(IMAGES), return_prefix_tokens=True,
                                              intermediates_only=True, norm=False)
    return torch.stack([prefix[:, 0] for _, prefix in layers], 1)


def perturb_parameters(model) -> None:
    """Add noise in place: norms and biases start at 1 and 0, where a missing one would not show."""
    for p in model.parameters():
        p.data += (0.3 if p.ndim == 1 else 0.1) * torch.randn_like(p)


# --- Hugging Face's CLIP ---

def write_clip(folder, class_name="CLIPModel", max_shard_size="1GB", **changes):
    import transformers
    vision = {"hidden_size": WIDTH, "intermediate_size": 160, "num_hidden_layers": DEPTH, "num_attention_heads": 4,
              "image_size": IMAGE_SIZE, "patch_size": PATCH, **changes}
    torch.manual_seed(0)
    if class_name == "CLIPModel":
        text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1,
                "vocab_size": 9, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
        model = transformers.CLIPModel(transformers.CLIPConfig(vision_config=vision, text_config=text))
    else:
        model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**vision))
    perturb_parameters(model)
    model.eval().save_pretrained(folder, max_shard_size=max_shard_size)
    return getattr(model, "vision_model", model)


@torch.no_grad()
def clip_features(tower):
    return torch.stack(tower(normalize_imagenet(IMAGES), output_hidden_states=True).hidden_states[1:], 1)[:, :, 0]


@pytest.mark.parametrize("class_name", ["CLIPModel", "CLIPVisionModel"])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_clip_of_hugging_face(base, tmp_path, class_name, activation):
    tower = write_clip(tmp_path / "clip", class_name, hidden_act=activation)
    expected = clip_features(tower)
    assert expected.std() > 0.1 and expected.shape == (2, 6, WIDTH)
    torch.testing.assert_close(features(base, tmp_path / "clip"), expected, atol=1e-4, rtol=1e-4)


def test_clip_as_saved_before_transformers_5(base, tmp_path):
    """Names prefixed with `vision_model.`, position ids, pytorch_model.bin, and only non-default configuration."""
    tower = write_clip(tmp_path / "clip", "CLIPVisionModel", num_attention_heads=8)
    tensors = {f"vision_model.{name.removeprefix('vision_model.')}": t for name, t in tower.state_dict().items()}
    tensors["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    torch.save(tensors, tmp_path / "clip" / "pytorch_model.bin")
    (tmp_path / "clip" / "model.safetensors").unlink()
    (tmp_path / "clip" / "config.json").write_text(json.dumps({
        "model_type": "clip", "vision_config": {"num_attention_heads": 8}}))
    torch.testing.assert_close(features(base, tmp_path / "clip"), clip_features(tower), atol=1e-4, rtol=1e-4)


# --- OpenAI ---

class OpenAITower(torch.nn.Module):
    """Has the parameter names of OpenAI's VisionTransformer; the tensors are those of a timm ViT."""

    def __init__(self, vit):
        super().__init__()
        self.class_embedding = torch.nn.Parameter(vit.cls_token[0, 0])
        self.positional_embedding = torch.nn.Parameter(vit.pos_embed[0])
        self.proj = torch.nn.Parameter(torch.randn(WIDTH, 5))
        self.conv1, self.ln_pre, self.ln_post = vit.patch_embed.proj, vit.norm_pre, vit.norm
        self.transformer = torch.nn.Module()
        self.transformer.resblocks = torch.nn.ModuleList(map(self.block, vit.blocks))

    @staticmethod
    def block(timm_block):
        block = torch.nn.Module()
        block.attn = torch.nn.Module()
        block.attn.in_proj_weight, block.attn.in_proj_bias = timm_block.attn.qkv.weight, timm_block.attn.qkv.bias
        block.attn.out_proj, block.ln_1, block.ln_2 = timm_block.attn.proj, timm_block.norm1, timm_block.norm2
        block.mlp = torch.nn.Module()
        block.mlp.c_fc, block.mlp.c_proj = timm_block.mlp.fc1, timm_block.mlp.fc2
        return block

    def forward(self, x):
        return self.conv1(x)


class OpenAIClip(torch.nn.Module):
    def __init__(self, vit):
        super().__init__()
        self.visual = OpenAITower(vit)
        self.logit_scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.visual(x)


def clip_vit(seed: int = 0):
    """Two heads of 64, the head dimension of all OpenAI models."""
    torch.manual_seed(seed)
    vit = timm.create_model("vit_large_patch14_clip_quickgelu_224", img_size=IMAGE_SIZE, patch_size=PATCH,
                            embed_dim=WIDTH, depth=DEPTH, num_heads=2, num_classes=0)
    perturb_parameters(vit)
    return vit


def test_torchscript_archive_of_openai(base, tmp_path):
    vit = clip_vit()
    expected = timm_features(vit).detach()
    archive = torch.jit.trace(OpenAIClip(vit), torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE))
    archive.half().save(str(tmp_path / "ViT-L-14.pt"))
    loaded = features(base, tmp_path / "ViT-L-14.pt")
    torch.testing.assert_close(loaded, expected, atol=2e-2, rtol=2e-2)  # the archive holds float16
    with torch.no_grad():
        for p in vit.parameters():
            p.data = p.half().float()
    torch.testing.assert_close(loaded, timm_features(vit).detach(), atol=1e-4, rtol=1e-4)


# --- timm ---

def test_timm_file_of_clip(base, tmp_path):
    vit = clip_vit()
    save_file({**vit.state_dict(), "head.weight": torch.zeros(3, WIDTH), "head.bias": torch.zeros(3)},
              tmp_path / "clip.safetensors")
    torch.testing.assert_close(features(base, tmp_path / "clip.safetensors"), timm_features(vit).detach())


def test_timm_file_with_config_in_the_same_folder(base):
    assert torch.equal(features(base, base.vision / "model.safetensors"), features(base, base.vision))


def test_timm_vit_of_another_architecture(base, tmp_path):
    """Width 40, registers, a class token, a classifier, no norm before the blocks; in pytorch_model.bin."""
    torch.manual_seed(0)
    size = {"img_size": IMAGE_SIZE, "patch_size": 4, "embed_dim": 40, "depth": 12, "num_heads": 4, "reg_tokens": 2}
    vit = timm.create_model("vit_small_patch16_224", num_classes=7, **size)
    perturb_parameters(vit)
    (tmp_path / "config.json").write_text(json.dumps({
        "architecture": "vit_small_patch16_224", "num_classes": 7, "model_args": size,
        "pretrained_cfg": {"input_size": [3, IMAGE_SIZE, IMAGE_SIZE], "num_classes": 7}}))
    torch.save(vit.state_dict(), tmp_path / "pytorch_model.bin")
    expected = timm_features(vit)[:, 1::2].detach()  # six features from twelve blocks
    torch.testing.assert_close(features(base, tmp_path), expected, atol=1e-5, rtol=1e-5)


def test_timm_model_name(base, monkeypatch):
    """The download is mocked: timm.create_model returns a local ViT."""
    vit = tiny_vit()
    expected = timm_features(vit).detach()
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, num_classes: vit)
    torch.testing.assert_close(features(base, "vit_tiny_patch16_224.some_tag"), expected, atol=1e-5, rtol=1e-5)


def test_hugging_face_names_and_shapes_of_clip_vit_l():
    """CLIP ViT-L/14 with the published shapes, on the meta device."""
    import transformers

    from lavin.weights.load import frozen_parameters
    from lavin.weights.vision import HuggingFaceClip, depth_of, describe_clip
    with torch.device("meta"):
        tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=224,
            patch_size=14))
        published = timm.create_model("vit_large_patch14_clip_quickgelu_224", num_classes=0)
    tensors = HuggingFaceClip(dict(tower.named_parameters()))
    vit = describe_clip(tensors["patch_embed.proj.weight"], 257, depth_of(tensors, "blocks"),
                        tensors["blocks.0.mlp.fc1.weight"], 16)
    shapes = {name: shape for name, (_, shape) in frozen_parameters(vit).items()}
    assert shapes == {name: p.shape for name, p in published.named_parameters()}
    assert shapes == {name: tensor.shape for name, tensor in tensors.items()}
    assert vit.blocks[0].attn.num_heads == 16 and vit.patch_embed.img_size == (224, 224)


# --- User errors ---

@pytest.mark.parametrize("name", ["no/ViT-L-14.pt", "ViT-L-14.pt", "some/folder", "no_such_model", "clip.safetensors"])
def test_missing_models_name_the_download(name):
    message = error_message(open_vit, name)
    assert f"--vision_model {name}" in message and "https://huggingface.co/openai/clip-vit-large-patch14" in message


@pytest.mark.parametrize("name, content", [
    ("config.json", "{"), ("config.json", "[]"), ("config.json", None),
    ("config.json", '{"architecture": "no_such_model"}'), ("config.json", '{"model_type": "clip"}'),
    ("model.safetensors", "nothing"), ("model.safetensors", None)])
def test_error_names_the_broken_folder(base, tmp_path, name, content):
    shutil.copytree(base.vision, tmp_path / "vit")
    (tmp_path / "vit" / name).unlink() if content is None else (tmp_path / "vit" / name).write_text(content)
    assert f"--vision_model {tmp_path / 'vit'}" in error_message(features, base, tmp_path / "vit")


def test_error_names_the_broken_file(base, tmp_path):
    (tmp_path / "ViT-L-14.pt").write_bytes(b"nothing")
    assert "ViT-L-14.pt" in error_message(open_vit, str(tmp_path / "ViT-L-14.pt"))
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(2)).save(str(tmp_path / "other.pt"))
    assert "no CLIP" in error_message(open_vit, str(tmp_path / "other.pt"))
    save_file(tiny_vit().state_dict(), tmp_path / "plain.safetensors")
    assert "config.json" in error_message(open_vit, str(tmp_path / "plain.safetensors"))


def test_vit_without_class_token_is_refused(base, tmp_path):
    args = {"img_size": IMAGE_SIZE, "patch_size": 8, "embed_dim": 24, "depth": 6, "num_heads": 2, "class_token": False,
            "global_pool": "avg"}
    (tmp_path / "config.json").write_text(json.dumps({
        "architecture": "vit_tiny_patch16_224", "num_classes": 0, "model_args": args,
        "pretrained_cfg": {"input_size": [3, IMAGE_SIZE, IMAGE_SIZE], "num_classes": 0}}))
    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=0, **args).state_dict(),
              tmp_path / "model.safetensors")
    assert "class token" in error_message(open_vit, str(tmp_path))


def test_unsupported_clip_activation_is_refused(tmp_path):
    write_clip(tmp_path / "clip", hidden_act="relu")
    assert "'relu'" in error_message(open_vit, str(tmp_path / "clip"))
