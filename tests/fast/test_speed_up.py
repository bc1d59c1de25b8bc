"""The fast parts that a model uses on each hardware, with and without a working compiler."""

from types import SimpleNamespace

import pytest
import torch

from lavin import attention
from lavin.attention import padded_attention
from lavin.fast import speed_up
from lavin.fast.captured_models import capture_passes
from lavin.fast.speed_up import FastPaths, choose_fast_paths
from lavin.generation import kv_cache
from lavin.kernels import fp8
from tiny import greedy_logits, loss_and_gradients, mixed_examples, tiny_model
from user_errors import error_message

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32


@pytest.fixture
def hardware(monkeypatch):
    """A function that pretends what a GPU and its compiler are like."""
    def pretend(capability, error=None):
        for module in (attention, fp8, speed_up):
            monkeypatch.setattr(module, "compute_capability", lambda _: capability)
        monkeypatch.setattr(speed_up, "compiler_error", lambda _: error)
    return pretend


def summary(paths) -> tuple:
    return paths.fused, paths.compiled, paths.captured


@pytest.mark.parametrize("capability, dtype, head_dim, use_triton, expected", [
    ((9, 0), BF16, 128, True, attention.flash_varlen_attention),
    ((8, 0), FP16, 16, True, attention.flash_varlen_attention),
    ((8, 0), FP32, 128, True, attention.efficient_varlen_attention),
    ((7, 5), FP16, 128, True, attention.efficient_varlen_attention),
    ((9, 0), BF16, 24, True, attention.efficient_varlen_attention),
    ((9, 0), BF16, 128, False, attention.efficient_varlen_attention)])
def test_attention_by_hardware(hardware, capability, dtype, head_dim, use_triton, expected):
    hardware(capability)
    assert attention.select_attention(GPU, dtype, head_dim, use_triton) is expected
    assert attention.select_attention(CPU, dtype, head_dim, use_triton) is padded_attention


@pytest.mark.parametrize("capability, dtype, error, expected", [
    ((9, 0), BF16, None, (True, True, True)), ((8, 0), FP32, None, (True, True, True)),
    ((7, 0), FP16, None, (True, True, True)),
    ((7, 0), FP16, "ptxas fatal", (False, False, True)),
    ((8, 0), BF16, "no C compiler", (False, False, True))])
def test_by_gpu_and_compiler(hardware, capability, dtype, error, expected):
    hardware(capability, error)
    paths = choose_fast_paths(GPU, dtype)
    assert summary(paths) == expected
    assert bool(paths.note) == bool(error) and (error or "") in paths.note


def test_by_flags(hardware):
    hardware((8, 0))
    assert summary(choose_fast_paths(GPU, BF16, compile="off")) == (True, False, True)
    assert summary(choose_fast_paths(GPU, BF16, cuda_graphs="off")) == (True, True, False)
    assert summary(choose_fast_paths(CPU, FP32)) == (False, False, False)
    assert summary(choose_fast_paths(CPU, FP32, "fp8")) == (True, False, False)
    assert summary(choose_fast_paths(CPU, FP32, compile="on")) == (False, True, False)


def test_our_kernel_in_4_bits_is_for_nvidia_from_ampere_on(hardware, monkeypatch):
    assert speed_up.has_nf4_kernel(CPU)  # its reference implementation
    for capability, expected in (((7, 5), False), ((8, 0), True), ((12, 0), True)):
        hardware(capability)
        assert speed_up.has_nf4_kernel(GPU) == expected
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not speed_up.has_nf4_kernel(GPU)


def test_what_was_asked_for_and_does_not_work_is_refused(hardware):
    assert "--cuda_graphs on needs a GPU" in error_message(choose_fast_paths, CPU, FP32, cuda_graphs="on")
    hardware((8, 9), "no C compiler")
    assert "--compile on does not work on this GPU: no C" in error_message(choose_fast_paths, GPU, BF16,
                                                                           compile="on")
    assert "--bits fp8 does not work" in error_message(choose_fast_paths, GPU, BF16, "fp8")


@pytest.mark.parametrize("bits, dtype", [("16bit", FP32), ("fp8", torch.float8_e4m3fn)])
def test_matrices_are_fused_in_the_precision_asked_for(monkeypatch, bits, dtype):
    monkeypatch.setattr(speed_up, "choose_fast_paths",
                        lambda *_: FastPaths(fused=True, compiled=False, captured=False))
    block = speed_up.speed_up(tiny_model(), bits).llama.layers[0]
    for matrix in (block.attention.wqkv, block.attention.wo, block.feed_forward.w13, block.feed_forward.w2):
        assert matrix.weight.dtype == dtype


def test_programs_in_the_compilers_cache_are_of_the_same_code(monkeypatch, tmp_path):
    """The code is another one after a change of any file in lavin/ and its folders."""
    config = pytest.importorskip("torch._inductor.config")
    if not hasattr(config, "unsafe_marked_cacheable_functions"):
        pytest.skip("this version of torch cannot cache such programs")
    sources = [tmp_path / "lavin" / name for name in ("model.py", "fast/speed_up.py", "kernels/fused_ops.py")]
    for source in sources:
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_text("x = 1")
    monkeypatch.setattr(speed_up, "__file__", str(sources[1]))

    def code() -> str:
        monkeypatch.setattr(config, "unsafe_marked_cacheable_functions", {})
        speed_up.allow_in_cache([speed_up.fuse])
        return config.unsafe_marked_cacheable_functions["lavin.fast.speed_up.fuse"]

    codes = [code()]
    assert code() == codes[0]
    for source in sources:
        source.write_text("x = 2")
        codes.append(code())
    assert len(set(codes)) == 4


def test_the_compiler_is_tried_once_and_in_silence(monkeypatch, capfd):
    calls = []

    def fail(function, **_):
        calls.append(function)
        print("a thousand lines of PTX")
        raise RuntimeError("NoTritonConfigsError: ptxas fatal\nand so on")

    monkeypatch.setattr(attention, "HAS_TRITON", True)
    monkeypatch.setattr(torch, "compile", fail)
    speed_up.compiler_error.cache_clear()
    assert [speed_up.compiler_error(CPU) for _ in range(2)] == ["NoTritonConfigsError: ptxas fatal"] * 2
    assert len(calls) == 1 and capfd.readouterr() == ("", "")
    speed_up.compiler_error.cache_clear()
    monkeypatch.setattr(attention, "HAS_TRITON", False)
    assert speed_up.compiler_error(CPU) == "Triton is not installed"
    speed_up.compiler_error.cache_clear()


def test_attention_does_without_triton_where_the_compiler_does_not_work(monkeypatch):
    for device, error, expected in ((GPU, "no C compiler", False), (GPU, None, True), (CPU, "no C compiler", True)):
        monkeypatch.setattr(speed_up, "compiler_error", lambda _, error=error: error)
        model = SimpleNamespace(device=device, use_triton=True)
        speed_up.choose_attention(model)
        assert model.use_triton == expected


def test_a_models_choice_of_attention_reaches_every_pass(monkeypatch):
    """Training, the routing cache, prefill and decoding, captured or not."""
    asked = []
    monkeypatch.setattr(attention, "select_attention", lambda *args: asked.append(args[3]) or padded_attention)
    monkeypatch.setattr(kv_cache, "uses_triton", lambda *args: bool(asked.append(args[3])))
    for captured in (False, True):
        model = tiny_model()
        if captured:
            capture_passes(model)
        model.use_triton = "as this model says"
        loss_and_gradients(model, mixed_examples())
        for _ in range(3):
            greedy_logits(model, mixed_examples(0), 4)
        layers, refreshes, answers, steps = 3, 1, 3, 3
        # a prefill asks when it fills the cache, and again when it attends
        assert len(asked) == layers * (1 + refreshes + answers * (2 + steps)) and set(asked) == {"as this model says"}
        asked.clear()
