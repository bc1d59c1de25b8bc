"""Relatives of LLaMA and rope scalings against transformers: logits, decoding, fast and sharded layers, the export."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F

from forked import in_processes, joined
from lavin.fast.captured_models import capture_passes
from lavin.fast.speed_up import compile_model, fuse
from lavin.generation.generate import decode
from lavin.llama import Llama, LlamaConfig, rotary_frequencies
from lavin.mm_adapter import AdapterConfig
from lavin.model import pack
from lavin.runtime.errors import UserError
from lavin.runtime.schema import read_validated
from lavin.tokenizer import Example
from lavin.weights.hugging_face import Config, HuggingFaceLlama, llama_config
from lavin.weights.load import frozen_parameters, load_base
from tiny import loss_and_gradients, mixed_examples, randomise_adapters, save_adapters, tiny_model
from tools import export_hf
from user_errors import error_message

CPU = torch.device("cpu")
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 100.0}
SMOLLM3 = {"model_type": "smollm3", "num_hidden_layers": 5, "num_key_value_heads": 2, "pad_token_id": None}
FAMILIES = {
    "llama with biases": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 2},
    "qwen2 tied": {"model_type": "qwen2", "num_key_value_heads": 4, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 12},
    "qwen3 with biases": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 8, "attention_bias": True},
    "mistral": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": None, "head_dim": 16},
    "mistral with a window": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 70},
    "smollm3": SMOLLM3,
    "smollm3 with a list": {**SMOLLM3, "no_rope_layers": [0, 1, 1, 0, 1], "attention_bias": True, "mlp_bias": True,
                            "tie_word_embeddings": False},
}
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 2.5, "rope_theta": 100.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0},
    "yarn": YARN,
    "yarn, attention_factor": {**YARN, "attention_factor": 1.2},
    "yarn, betas": {**YARN, "beta_fast": 3.0, "beta_slow": 0.5, "truncate": False},
    "yarn, mscale": {**YARN, "mscale": 1.5, "mscale_all_dim": 0.5},
}
VARIANTS = FAMILIES | {name: {"rope_parameters": rope, "head_dim": 16, "max_position_embeddings": 80}
                       for name, rope in SCALINGS.items()}


def write(folder, tokenizer_file, **changes):
    """Saves a random model with transformers, and returns it."""
    from transformers import AutoConfig, AutoModelForCausalLM
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{
        "model_type": "llama", "vocab_size": 480, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3,
        "num_attention_heads": 4, "rms_norm_eps": 1e-5, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2,
        **changes})).eval()
    perturb(model)
    model.save_pretrained(folder)
    shutil.copy(tokenizer_file, folder / "tokenizer.model")
    return model


def perturb(model) -> None:
    """Biases are 0 at first, and norms 1: errors in them would not show."""
    for name, p in model.named_parameters():
        if p.ndim == 1:
            p.data += 0.3 * torch.randn_like(p)
        elif "q_proj" in name or "k_proj" in name:
            p.data *= 2


@pytest.fixture(scope="module")
def folders(tokenizer_file, tmp_path_factory):
    """The folders and transformers' models by name."""
    root = tmp_path_factory.mktemp("families")
    return {name: (root / name, write(root / name, tokenizer_file, **changes)) for name, changes in VARIANTS.items()}


def load(folder, vision, **changes):
    return load_base("nowhere", str(folder), str(vision), changes.pop("adapter", AdapterConfig()), CPU, torch.float32,
                     **changes)[0].eval()


def random_ids(n: int) -> list[int]:
    return torch.randint(3, 480, (n,), generator=torch.Generator().manual_seed(n)).tolist()


def logits(model, rows: list[list[int]]) -> list[torch.Tensor]:
    packed = model.llama.output(model.hidden_states(pack([Example(row, len(row)) for row in rows])))
    return list(packed.split([len(row) for row in rows]))


ROWS = [random_ids(n) for n in (69, 3, 20)]


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_logits_equal_transformers(base, folders, name):
    folder, theirs = folders[name]
    ours = load(folder, base.vision, max_seq_len=70)
    for fused in (False, True):
        if fused:
            fuse(ours)
        for row, actual in zip(ROWS, logits(ours, ROWS), strict=True):
            expected = theirs(torch.tensor([row])).logits[0]
            assert expected.std() > 0.1
            torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_decoding_equals_transformers(base, folders, name):
    folder, theirs = folders[name]
    ours, steps = load(folder, base.vision), []

    def choose(step_logits):
        steps.append(step_logits)
        return step_logits.argmax(-1)

    list(decode(ours, [Example(row, len(row)) for row in ROWS[1:]], 6, choose))
    for i, row in enumerate(ROWS[1:]):
        ids = row + [step[i].argmax().item() for step in steps]
        expected = theirs(torch.tensor([ids])).logits[0, len(row) - 1:-1]
        torch.testing.assert_close(torch.stack([step[i] for step in steps]), expected, atol=1e-4, rtol=0)


# --- Fast layers ---

DIFFERENCES = {"biases": {"biases": ("wq", "wk", "wv", "wo", "w1", "w2", "w3")}, "qkv": {"biases": ("wq", "wk", "wv")},
               "norms": {"qk_norm": True, "biases": ("wq", "wk", "wv", "wo")}, "nope": {"nope_layers": (1,)}}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_fused_layers_have_the_same_loss_and_gradients(name):
    plain, fused, fp8 = (tiny_model(llama=DIFFERENCES[name]) for _ in range(3))
    fuse(fused)
    fuse(fp8, fp8=True)
    expected = loss_and_gradients(plain, mixed_examples())
    torch.testing.assert_close(loss_and_gradients(fused, mixed_examples()), expected, rtol=1e-4, atol=1e-5)
    assert F.cosine_similarity(loss_and_gradients(fp8, mixed_examples()), expected, 0) > 0.95
    other = loss_and_gradients(tiny_model(), mixed_examples())
    assert (other - expected).abs().max() > 1e-2  # the difference does something


@pytest.mark.parametrize("differences", [{**DIFFERENCES["biases"], **DIFFERENCES["nope"]}, DIFFERENCES["norms"]])
def test_compiled_and_captured_layers(differences, monkeypatch):
    from torch._dynamo.testing import CompileCounterWithBackend
    torch.compiler.reset()
    compile_function = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_function(
        function, backend=CompileCounterWithBackend("aot_eager"), **options))
    shape = {"n_layers": 4, **differences}
    plain, fast = (tiny_model(llama=shape, dropout_prob=0.0).train() for _ in range(2))
    fuse(fast)
    compile_model(fast)
    capture_passes(fast)
    for _ in range(2):  # the first pass is not captured
        torch.testing.assert_close(loss_and_gradients(fast, mixed_examples()),
                                   loss_and_gradients(plain, mixed_examples()), rtol=1e-3, atol=1e-4)
    torch.compiler.reset()


# --- Tensor parallelism ---

SHARDED = ["llama with biases", "qwen2", "qwen3 with biases", "mistral", "smollm3 with a list", "yarn"]


def sharded_results(folder, vision):
    model = load(folder, vision, adapter=AdapterConfig(adapter_dim=4))
    torch.manual_seed(5)
    randomise_adapters(model)
    examples = [Example(row, len(row) - 3) for row in ROWS]
    return loss_and_gradients(model, examples).detach(), torch.cat(logits(model, ROWS)).detach()


def test_two_processes_equal_one(base, folders):
    pytest.importorskip("lavin.weights.tensor_parallel")
    paths = [folders[name][0] for name in SHARDED]

    def work():
        with joined(2):
            return [sharded_results(path, str(base.vision)) for path in paths]
    two = in_processes(work, 2)
    for i, path in enumerate(paths):
        one = sharded_results(path, str(base.vision))
        for results in two:
            for actual, expected in zip(results[i], one, strict=True):
                assert (actual - expected).norm() < 1e-3 * expected.norm(), path  # attention is sharp


# --- Export ---

ADAPTER = {"adapter_dim": 4, "adapter_scale": 0.7, "temperature": 2.0, "hidden_proj": 8}


def export(base, folder, out, tmp_path, adapter_type: str):
    """Our model with random adapters, and its export as transformers loads it."""
    from transformers import AutoModelForCausalLM
    ours = load(folder, base.vision, adapter=AdapterConfig(adapter_type=adapter_type, **ADAPTER))
    torch.manual_seed(3)
    randomise_adapters(ours)
    save_adapters(ours, tmp_path / "checkpoint-0.pth", epoch=0, flags={})
    export_hf.main(export_hf.get_args_parser().parse_args([
        "--llm_model", str(folder), "--vision_model", str(base.vision), "--llama_model_path", "nowhere",
        "--adapter_path", str(tmp_path / "checkpoint-0.pth"), "--out", str(out), "--precision", "fp32",
        "--max_seq_len", "70"]))
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    return ours, model.eval()


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("adapter_type", ["attn", "block"])
@torch.no_grad()
def test_the_export_has_the_same_logits(base, folders, tmp_path, name, adapter_type):
    if "qwen3" in name and adapter_type == "block":
        with pytest.raises(UserError, match="Qwen3"):
            export(base, folders[name][0], tmp_path / "hf", tmp_path, adapter_type)
        assert not list((tmp_path / "hf").iterdir())
        return
    ours, theirs = export(base, folders[name][0], tmp_path / "hf", tmp_path, adapter_type)
    context = folders[name][1].config.max_position_embeddings  # an export has no window, so it ends where one begins
    assert theirs.config.max_position_embeddings == (70 if "window" in name else context)
    expected, = logits(ours, ROWS[:1])
    torch.testing.assert_close(theirs(torch.tensor(ROWS[:1])).logits[0], expected, atol=3e-4, rtol=0)


# --- Configurations ---

def change(folder, changes: dict) -> None:
    path = folder / "config.json"
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in content.items() if value != "left out"}))


@pytest.mark.parametrize("name, changes, words", [
    ("mistral with a window", {}, "beyond 70 tokens this base model needs a sliding window"),
    ("dynamic", {}, "beyond 80 tokens"), ("qwen2", {"use_sliding_window": True, "sliding_window": 64}, "beyond 64"),
    ("mistral", {"sliding_window": "left out"}, None), ("qwen2", {"sliding_window": 64}, None)])
def test_longer_contexts_than_a_window(base, folders, tmp_path, name, changes, words):
    shutil.copytree(folders[name][0], tmp_path / "hf")
    change(tmp_path / "hf", changes)
    load(tmp_path / "hf", base.vision, max_seq_len=64)
    if words:
        assert words in error_message(load, tmp_path / "hf", base.vision, max_seq_len=200)
    else:
        load(tmp_path / "hf", base.vision, max_seq_len=200)


@pytest.mark.parametrize("changes, words", [
    ({"model_type": "gemma2"}, "'gemma2'"), ({"model_type": "phi3"}, "'phi3'"),
    ({"model_type": "mixtral"}, "'mixtral'"),
    ({"model_type": "qwen2_moe"}, "'qwen2_moe'"), ({"model_type": "llama4"}, "'llama4'"),
    ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "'longrope'"),
    ({"rope_parameters": None, "rope_scaling": {"type": "su", "factor": 2.0}}, "'su'"),
    ({"rope_parameters": None, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}, "'mrope'"),
    ({"rope_parameters": {"rope_type": "linear", "factor": "2.0"}}, "factor: should be a valid number"),
    ({"rope_parameters": {"rope_type": "linear"}}, "no entry 'factor'"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "no entry 'factor'"),
    ({"rope_parameters": {**YARN, "rope_theta": 1.0}}, "a rope_theta above 1"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}, "max_position_embeddings": "left out"},
     "no entry 'original_max_position_embeddings'"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor: "),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: "),
    ({"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 5e5}}}, "full_attention: "),
    ({"hidden_act": "gelu_pytorch_tanh"}, "'gelu_pytorch_tanh'"),
    ({"attention_bias": True}, "lacks 12 tensors (layers.0.attention.wk.bias"),
    ({"model_type": "qwen2", "num_key_value_heads": 4}, "lacks 9 tensors (layers.0.attention.wk.bias"),
    ({"model_type": "qwen3", "num_key_value_heads": 4, "head_dim": 16}, "k_norm.weight"),
    ({"model_type": "smollm3", "num_key_value_heads": 4, "no_rope_layers": [1, 0]}, "lists 2 of its 3 layers")])
def test_what_the_decoder_does_not_have_is_refused_by_name(base, folders, tmp_path, changes, words):
    shutil.copytree(folders["linear"][0], tmp_path / "hf")
    change(tmp_path / "hf", changes)
    message = error_message(load, tmp_path / "hf", base.vision)
    assert words in message and str(tmp_path / "hf") in message


@pytest.mark.parametrize("changes", [
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}},
    {"rope_parameters": "left out", "rope_scaling": {"type": "default", "mrope_section": [2, 3, 3]}},
    {"rope_parameters": "left out", "rope_scaling": None, "rope_theta": 10000, "partial_rotary_factor": 1},
    {"rope_parameters": "left out"}])
def test_spellings_of_no_scaling(base, folders, tmp_path, changes):
    shutil.copy(folders["mistral"][0] / "config.json", tmp_path)
    expected = llama_config(json.loads((tmp_path / "config.json").read_text()))
    change(tmp_path, changes)
    assert llama_config(read_validated(tmp_path / "config.json", Config)) == expected


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_biases_and_norms_beside_quantized_weights(base, folders, bits):
    """They are loaded exactly; tests/weights/test_quantization.py tests what is done with them."""
    pytest.importorskip("bitsandbytes")
    exact, quantized = (dict(load(folders["qwen3 with biases"][0], base.vision, bits=b).llama.named_parameters())
                        for b in ("16bit", bits))
    assert [name for name in exact if name not in quantized] == [
        f"layers.{layer}.{name}.weight" for layer in range(3)
        for name in ("attention.wq", "attention.wk", "attention.wv", "attention.wo", "feed_forward.w1",
                     "feed_forward.w2", "feed_forward.w3")]
    same = [name for name in quantized if "adapter" not in name]
    assert "layers.2.attention.wo.bias" in same and "layers.2.attention.k_norm.weight" in same
    assert all(torch.equal(exact[name], quantized[name]) for name in same)


def test_entries_of_the_first_configurations(base, folders, tmp_path):
    """`type` in place of rope_type, rope_theta outside, null where a default is meant."""
    folder, theirs = folders["yarn"]
    shutil.copytree(folder, tmp_path / "hf")
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": None,
               "beta_fast": None}
    change(tmp_path / "hf", {"rope_parameters": "left out", "rope_scaling": scaling, "rope_theta": 100.0})
    with torch.no_grad():
        torch.testing.assert_close(logits(load(tmp_path / "hf", base.vision), ROWS[:1])[0],
                                   theirs(torch.tensor(ROWS[:1])).logits[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("model_type, left_out", [
    ("llama", ["rope_parameters"]),
    ("mistral", ["num_key_value_heads", "sliding_window"]), ("qwen2", ["num_key_value_heads"]),
    ("qwen3", ["num_key_value_heads", "head_dim"]),
    ("smollm3", ["num_key_value_heads", "rope_parameters", "no_rope_layers"])])
def test_entries_that_are_left_out_have_the_defaults_of_transformers(model_type, left_out):
    from transformers import AutoConfig
    theirs = AutoConfig.for_model(model_type, hidden_size=256, num_attention_heads=32, num_hidden_layers=8)
    content = theirs.to_dict()
    left_out = [*left_out, "rms_norm_eps", "max_position_embeddings"]
    ours = llama_config({name: value for name, value in content.items() if name not in left_out})
    assert ours == llama_config(content)
    assert ours.kv_heads == theirs.num_key_value_heads and ours.rope_theta == theirs.rope_parameters["rope_theta"]


# sizes and number of parameters of the published models; tied weights count once
SIZES = {
    "Qwen2.5 0.5B": ("qwen2", {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
                               "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True},
                     494_032_768),
    "Qwen3 0.6B": ("qwen3", {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "head_dim": 128,
                             "num_attention_heads": 16, "num_key_value_heads": 8, "tie_word_embeddings": True},
                   596_049_920),
    "Mistral 7B": ("mistral", {}, 7_241_732_096),
    "SmolLM3 3B": ("smollm3", {}, 3_075_098_624)}


@pytest.mark.parametrize("name", SIZES)
def test_names_and_shapes_of_real_models(name):
    """All tensors are on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM
    model_type, content, count = SIZES[name]
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **content))
        config = llama_config(theirs.config.to_dict())
        parameters = frozen_parameters(Llama(config))
    tensors = HuggingFaceLlama(dict(theirs.named_parameters()), config, theirs.config.tie_word_embeddings)
    assert {name: shape for name, (_, shape) in parameters.items()} == {name: t.shape for name, t in tensors.items()}
    assert sum(p.numel() for p in theirs.parameters()) == count


# rope_parameters of published models
PUBLISHED = {
    "Qwen2.5 7B": ("qwen2", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768,
                             "rope_theta": 1e6}, 128),
    "Llama 2 with linear scaling": ("llama", {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4}, 128),
    "YaRN Llama 2 64k": ("llama", {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096,
                                   "rope_theta": 1e4}, 128),
    "made up: a ramp that ends beyond the last pair": (
        "llama", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 131072,
                  "rope_theta": 1e4}, 64)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_frequencies_of_published_scalings(name):
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    model_type, rope, head_dim = PUBLISHED[name]
    theirs = AutoConfig.for_model(model_type, hidden_size=32 * head_dim, num_attention_heads=32, rope_parameters=rope,
                                  max_position_embeddings=131072)
    expected, attention_factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](theirs, "cpu")
    ours: LlamaConfig = llama_config(theirs.to_dict())
    torch.testing.assert_close(rotary_frequencies(ours), expected, rtol=1e-5, atol=0)
    assert ours.rope_scaling.attention_factor == pytest.approx(attention_factor)
