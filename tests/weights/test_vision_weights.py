"""ViTs from Hugging Face, OpenAI and timm files: the features equal those of the library that wrote the file."""

import json
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from safetensors.torch import save_file

from lavin.mm_adapter import AdapterConfig
from lavin.timm_compat import timm
from lavin.weights import hub
from lavin.weights.adapters import adapter_parameters
from lavin.weights.load import exchange_adapters, load_base
from lavin.weights.vision import open_vit
from tiny import IMAGE_SIZE, ROOT, normalize_imagenet, tiny_vit
from user_errors import error_message

IMAGES = torch.randint(0, 256, (2, 3, IMAGE_SIZE, IMAGE_SIZE), generator=torch.Generator().manual_seed(0),
                       dtype=torch.uint8)
WIDTH, PATCH, DEPTH = 128, 8, 6


@torch.no_grad()
def features(base, vision_model):
    """The vision features of a model with fresh adapters, which are the identity."""
    adapter = AdapterConfig(visual_adapter_type="router_block")
    model, _ = load_base(str(base.weights), "tiny", str(vision_model), adapter, torch.device("cpu"), torch.float32)
    assert not any(p.requires_grad for name, p in model.vision.named_parameters() if "adapter" not in name)
    return model.eval().vision(IMAGES)


def timm_features(vit, images=None):
    images = normalize_imagenet(IMAGES) if images is None else images
    layers = vit.eval().forward_intermediates(images, return_prefix_tokens=True,
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
        model = getattr(transformers, class_name)(transformers.CLIPVisionConfig(**vision))
    perturb_parameters(model)
    model.eval().save_pretrained(folder, max_shard_size=max_shard_size)
    return getattr(model, "vision_model", model)


@torch.no_grad()
def clip_features(tower):
    return torch.stack(tower(normalize_imagenet(IMAGES), output_hidden_states=True).hidden_states[1:], 1)[:, :, 0]


@pytest.mark.parametrize("class_name", ["CLIPModel", "CLIPVisionModel", "CLIPVisionModelWithProjection"])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_clip_of_hugging_face(base, tmp_path, class_name, activation):
    tower = write_clip(tmp_path / "clip", class_name, hidden_act=activation)
    expected = clip_features(tower)
    assert expected.std() > 0.1 and expected.shape == (2, 6, WIDTH)
    torch.testing.assert_close(features(base, tmp_path / "clip"), expected, atol=1e-4, rtol=1e-4)


def test_epsilon_of_hugging_faces_clip(base, tmp_path):
    tower = write_clip(tmp_path / "clip", layer_norm_eps=0.3)
    torch.testing.assert_close(features(base, tmp_path / "clip"), clip_features(tower), atol=1e-4, rtol=1e-4)
    config = json.loads((tmp_path / "clip" / "config.json").read_text())
    for wrong in (0, -1e-5, "1e-5"):
        config["vision_config"]["layer_norm_eps"] = wrong
        (tmp_path / "clip" / "config.json").write_text(json.dumps(config))
        assert "layer_norm_eps: " in error_message(open_vit, str(tmp_path / "clip"))


@pytest.mark.parametrize("shape, saved", [({"num_attention_heads": 8}, {"num_attention_heads": 8}),
                                          ({"hidden_size": 96, "num_attention_heads": 12}, {})])
def test_clip_as_saved_before_transformers_5(base, tmp_path, shape, saved):
    """Its names begin with `vision_model.`; it has position ids, pytorch_model.bin, and no default values in its
    configuration."""
    tower = write_clip(tmp_path / "clip", "CLIPVisionModel", **shape)
    tensors = {f"vision_model.{name.removeprefix('vision_model.')}": t for name, t in tower.state_dict().items()}
    tensors["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    torch.save(tensors, tmp_path / "clip" / "pytorch_model.bin")
    (tmp_path / "clip" / "model.safetensors").unlink()
    (tmp_path / "clip" / "config.json").write_text(json.dumps({
        "model_type": "clip", "vision_config": saved}))
    torch.testing.assert_close(features(base, tmp_path / "clip"), clip_features(tower), atol=1e-4, rtol=1e-4)


# --- OpenAI ---

class OpenAITower(torch.nn.Module):
    """A tower with the parameter names of OpenAI's VisionTransformer, and the tensors of a timm ViT."""

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


def mock_hub(monkeypatch, vit, answers: bool = True) -> list[str]:
    """timm.create_model returns `vit`. Returns the names that it is called with."""
    names = []
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, num_classes: names.append(name) or vit)
    monkeypatch.setattr(hub, "hub_answers", lambda: answers)
    return names


def test_timm_model_name(base, monkeypatch):
    """Trained with mean and std 0.5."""
    vit = tiny_vit()
    expected = timm_features(vit, IMAGES / 127.5 - 1).detach()
    names = mock_hub(monkeypatch, vit)
    torch.testing.assert_close(features(base, "vit_tiny_patch16_224.augreg_in21k"), expected, atol=1e-5, rtol=1e-5)
    assert names == ["vit_tiny_patch16_224.augreg_in21k"]


def test_adapters_do_not_depend_on_what_timm_draws(base, monkeypatch):
    """timm initialises a model before it puts the weights in, and a model that is loaded already is not read again."""
    adapter, tiny = AdapterConfig(), tiny_vit()
    mock_hub(monkeypatch, tiny)
    monkeypatch.setattr(timm, "create_model", lambda *args, **options: (torch.rand(1), tiny)[1])
    torch.manual_seed(0)
    model, _ = load_base(str(base.weights), "tiny", "vit_tiny_patch16_224.augreg_in21k", adapter, torch.device("cpu"),
                         torch.float32)
    loaded = {name: p.clone() for name, p in adapter_parameters(model).items()}
    torch.manual_seed(0)
    exchange_adapters(model, adapter, 0.0, None)
    torch.testing.assert_close(loaded, adapter_parameters(model), rtol=0, atol=0)


# --- Activation, normalization ---

@pytest.mark.parametrize("name, loaded", [
    ("vit_large_patch14_clip_224.openai", "vit_large_patch14_clip_quickgelu_224.openai"),
    ("vit_huge_patch14_clip_224.dfn5b", "vit_huge_patch14_clip_quickgelu_224.dfn5b"),
    ("vit_huge_patch14_clip_378", "vit_huge_patch14_clip_quickgelu_378.dfn5b"),
    ("vit_large_patch14_clip_224.openai_ft_in1k", "vit_large_patch14_clip_224.openai_ft_in1k"),
    ("vit_large_patch14_clip_224.laion2b", None), ("vit_small_patch14_dinov2.lvd142m", None)])
def test_names_of_weights_with_quick_gelu(monkeypatch, name, loaded):
    names = mock_hub(monkeypatch, tiny_vit())
    open_vit(name)
    assert names == [loaded or name]


def write_timm(folder, vit, architecture, size, **pretrained_cfg):
    (folder / "config.json").write_text(json.dumps({
        "architecture": architecture, "num_classes": 0, "model_args": size,
        "pretrained_cfg": {"input_size": [3, IMAGE_SIZE, IMAGE_SIZE], "num_classes": 0, **pretrained_cfg}}))
    save_file(vit.state_dict(), folder / "model.safetensors")


CLIP_SIZE = {"img_size": IMAGE_SIZE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": 2}


@pytest.mark.parametrize("pretrained_cfg, model_args, quick", [
    ({"tag": "openai"}, {}, True), ({"hf_hub_id": "timm/vit_large_patch14_clip_224.openai"}, {}, True),
    ({"tag": None}, {}, False), ({"tag": "laion2b"}, {}, False), ({"tag": "openai_ft_in1k"}, {}, False),
    ({"tag": "openai"}, {"act_layer": "gelu"}, False)])
def test_folder_of_weights_with_quick_gelu(base, tmp_path, pretrained_cfg, model_args, quick):
    """timm lists OpenAI's weights under vit_large_patch14_clip_224 too, whose activation is GELU."""
    vit = clip_vit()
    write_timm(tmp_path, vit, "vit_large_patch14_clip_224", {**CLIP_SIZE, **model_args}, **pretrained_cfg)
    loaded = features(base, tmp_path)
    assert torch.allclose(loaded, timm_features(vit), atol=1e-4) is quick
    for block in vit.blocks:
        block.mlp.act = torch.nn.GELU()
    assert torch.allclose(loaded, timm_features(vit), atol=1e-4) is not quick


OPENAI = {"mean": list(timm.data.OPENAI_CLIP_MEAN), "std": list(timm.data.OPENAI_CLIP_STD)}


@pytest.mark.parametrize("pretrained_cfg, mean, std", [
    ({"mean": [0.5, 0.4, 0.3], "std": [0.5, 0.25, 0.125]}, (0.5, 0.4, 0.3), (0.5, 0.25, 0.125)),
    ({}, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), (OPENAI, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
def test_normalization_is_the_models_own_and_imagenets_for_clip(base, tmp_path, pretrained_cfg, mean, std):
    vit = tiny_vit()
    write_timm(tmp_path, vit, "vit_tiny_patch16_224", {**CLIP_SIZE, "embed_dim": 24}, **pretrained_cfg)
    model, _ = load_base(str(base.weights), "tiny", str(tmp_path), AdapterConfig(), torch.device("cpu"), torch.float32)
    assert (model.vision.mean, model.vision.std) == (mean, std)
    images = (IMAGES / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(features(base, tmp_path), timm_features(vit, images).detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("entry", [{"mean": [0.5]}, {"std": [0.5, 0.5, 0]}, {"mean": None}, {"std": 0.5}])
def test_error_names_the_wrong_normalization(tmp_path, entry):
    write_timm(tmp_path, tiny_vit(), "vit_tiny_patch16_224", {**CLIP_SIZE, "embed_dim": 24}, **entry)
    assert f"pretrained_cfg.{next(iter(entry))}" in error_message(open_vit, str(tmp_path))


# --- DINOv2, SigLIP ---

@pytest.mark.parametrize("architecture", ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2",
                                          "vit_giant_patch14_reg4_dinov2"])
def test_dinov2_of_timm(base, tmp_path, architecture):
    """Register tokens, layer scale, no position of the class token, SwiGLU."""
    torch.manual_seed(0)
    vit = timm.create_model(architecture, num_classes=0, **CLIP_SIZE)
    perturb_parameters(vit)
    write_timm(tmp_path, vit, architecture, CLIP_SIZE)
    torch.testing.assert_close(features(base, tmp_path), timm_features(vit).detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("class_name", ["SiglipVisionModel", "Dinov2Model", "Dinov2WithRegistersModel", "ViTModel"])
def test_other_vits_of_hugging_face_are_refused_by_name(tmp_path, class_name):
    import transformers
    model_class = getattr(transformers, class_name)
    model_class(model_class.config_class(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, image_size=16,
                                         patch_size=8, intermediate_size=16)).save_pretrained(tmp_path)
    message = error_message(open_vit, str(tmp_path))
    assert f"is of a {model_class.config_class.model_type} of Hugging Face's, of which only clip loads" in message


def test_siglip_of_timm_is_refused(tmp_path):
    vit = timm.create_model("vit_base_patch16_siglip_224", num_classes=0, **CLIP_SIZE)
    write_timm(tmp_path, vit, "vit_base_patch16_siglip_224", CLIP_SIZE)
    assert "no ViT with a class token" in error_message(open_vit, str(tmp_path))


# --- No network ---

def test_without_network_a_name_is_refused_at_once(monkeypatch):
    """The hub's client would try five times for each of two files, which takes 50 s."""
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    start = time.monotonic()
    message = error_message(open_vit, "vit_large_patch14_clip_224.openai")
    assert time.monotonic() - start < 3
    assert "no network to http://127.0.0.1:9, and nothing of it in the cache" in message
    assert hub.constants.HF_HUB_OFFLINE is False


@pytest.mark.parametrize("name, words", [
    ("no_such_model", "Unknown model"), ("vit_tiny_patch16_224.typo", "tag (typo)")])
def test_a_wrong_name_is_not_called_a_lack_of_network(monkeypatch, name, words):
    monkeypatch.setattr(hub, "hub_answers", lambda: False)
    assert words in error_message(open_vit, name)


@pytest.mark.parametrize("status", [200, 404, 405])
def test_any_answer_of_the_hub_means_a_network(monkeypatch, status):
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request).start()
        monkeypatch.setattr(hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert hub.hub_answers()


def test_without_network_a_cached_model_loads(monkeypatch):
    names = mock_hub(monkeypatch, tiny_vit(), answers=False)
    monkeypatch.setattr(hub, "snapshot_download", lambda repository, local_files_only: repository)
    open_vit("vit_tiny_patch16_224.augreg_in21k")
    assert names == ["vit_tiny_patch16_224.augreg_in21k"]


@pytest.mark.parametrize("cached", [True, False])
def test_a_model_in_the_cache_loads_where_fetching_it_breaks_off(monkeypatch, tmp_path, capsys, cached):
    """The hub's client looks into its cache after a status of 500, and not after a connection that ends."""
    name, vit = "vit_tiny_patch16_224.augreg_in21k", tiny_vit()

    def create(*args, **options):
        if not hub.constants.HF_HUB_OFFLINE:
            raise ConnectionError("Server disconnected")
        return vit
    mock_hub(monkeypatch, vit)
    monkeypatch.setattr(timm, "create_model", create)
    monkeypatch.setattr(hub, "snapshot_download", lambda repository, local_files_only: tmp_path)
    if cached:
        (tmp_path / "model.safetensors").touch()
        open_vit(name)
        assert capsys.readouterr().out == (
            f"{name} cannot be fetched (Server disconnected): the file in the hub's cache is used\n")
    else:
        assert "timm cannot fetch it (Server disconnected)" in error_message(open_vit, name)
    assert hub.constants.HF_HUB_OFFLINE is False


def test_timm_is_imported_at_its_first_use():
    """lavin.timm_compat imports it: with a torchvision for another torch, a plain `import timm` fails."""
    script = ("import sys, demo, eval, search, train; assert not {'timm', 'torch._inductor'} & sys.modules.keys(); "
              "from lavin.weights.vision import timm; timm.models")
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


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

@pytest.mark.parametrize("name", ["no/ViT-L-14.pt", "ViT-L-14.pt", "./some/folder", "no_such_model",
                                  "clip.safetensors"])
def test_missing_models_name_the_download(name):
    message = error_message(open_vit, name)
    assert f"--vision_model {name}" in message and "python -m tools.download clip" in message


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


@pytest.mark.parametrize("save, words", [
    (lambda vit, path: torch.save(vit, path), "holds more than tensors (timm.models"),
    (lambda vit, path: torch.save({"teacher": vit.state_dict()}, path), "teacher: is no tensor but a"),
    (lambda vit, path: save_renamed(vit, path, "module."), "lacks 78 tensors"),
    (lambda vit, path: save_renamed(vit, path, "_orig_mod."), "lacks 78 tensors"),
    (lambda vit, path: torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(2)).save(path), "cannot be read as weights"),
    (lambda vit, path: path.write_bytes(b"PK\3\4"), "cannot be read as weights")])
def test_other_files_of_training_programs(base, tmp_path, save, words):
    vit = tiny_vit()
    write_timm(tmp_path, vit, "vit_tiny_patch16_224", {**CLIP_SIZE, "embed_dim": 24})
    save(vit, tmp_path / "vit.pth")
    message = error_message(features, base, tmp_path / "vit.pth")
    assert f"--vision_model {tmp_path / 'vit.pth'}" in message and words in message


def save_renamed(vit, path, prefix: str) -> None:
    torch.save({prefix + name: tensor for name, tensor in vit.state_dict().items()}, path)


def test_clips_text_model_is_no_vit(tmp_path):
    import transformers
    transformers.CLIPTextModel(transformers.CLIPTextConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, vocab_size=9, bos_token_id=0,
        eos_token_id=1, pad_token_id=1)).save_pretrained(tmp_path)
    assert "lack embeddings.patch_embedding.weight" in error_message(open_vit, str(tmp_path))


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
