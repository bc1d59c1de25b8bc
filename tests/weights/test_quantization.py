"""4 and 8 bits: bitsandbytes' quantization against the papers; a quantized model against its dequantized weights."""

import sys
import weakref
from argparse import Namespace

import pytest
import torch

import eval as evaluation
from lavin.fast.cuda_graphs import CapturedModule
from lavin.fast.fused_adapter import FusedAdaptedBlock
from lavin.fast.speed_up import FastPaths, fuse, speed_up
from lavin.generation.generate import decode
from lavin.generation.sampling import sampler
from lavin.llama import Attention, LlamaConfig
from lavin.mm_adapter import AdapterConfig
from lavin.model import LaVIN, pack
from lavin.runtime.errors import UserError
from lavin.weights.load import frozen_parameters, load_base, load_frozen_tensor, quantize_model
from tiny import greedy, loss_and_gradients, mixed_examples, tiny_model, tiny_vit
from tiny_quantized import NF4, dequantized_weight, quantized_and_dequantized_model, weight_bytes
from tiny_runs import load_checkpoint, read_log, train_run
from util.flags import stays_plain
from util.trained_model import load_model

CPU = torch.device("cpu")
BITS = ["4bit", "8bit"]


@pytest.fixture(scope="module")
def quantization():
    pytest.importorskip("bitsandbytes")
    import lavin.weights.quantization
    return lavin.weights.quantization


def make_linear(quantization, weight: torch.Tensor, bits: str):
    linear = quantization.QUANTIZED_LINEARS[bits]()
    linear.load(weight, CPU, torch.float32)
    return linear


@pytest.fixture
def weight():
    return torch.randn(96, 256, generator=torch.Generator().manual_seed(0)) / 16


def test_4_bit_weights_are_the_nearest_nf4_levels(quantization, weight):
    """Blocks of 64 are scaled by their absolute maximum, which double quantization keeps in 8 bits (within 2% here)."""
    blocks = weight.view(-1, 64)
    absmax = blocks.abs().amax(1, keepdim=True)
    nearest = NF4[(blocks / absmax)[..., None].sub(NF4).abs().argmin(-1)] * absmax
    dequantized = dequantized_weight(make_linear(quantization, weight, "4bit"), 256).view(-1, 64)
    assert ((dequantized - nearest).abs() <= 0.02 * nearest.abs() + 1e-6).all()
    assert not torch.equal(dequantized, nearest)  # equal only if the scales were not quantized


def test_8_bit_weights_are_within_half_a_step(quantization, weight):
    """A step is the row's absolute maximum / 127; the weight is first rounded to float16, with 11 significant bits."""
    error = (dequantized_weight(make_linear(quantization, weight, "8bit"), 256) - weight).abs()
    absmax = weight.abs().amax(1, keepdim=True)
    assert (error <= 1.001 * (absmax / 254 + weight.abs() * 2**-11)).all()


@pytest.mark.parametrize("bits, min_error, max_error", [("4bit", 0.08, 0.11), ("8bit", 0.004, 0.01)])
def test_outputs_are_close_to_those_of_exact_weights(quantization, weight, bits, min_error, max_error):
    """The relative error of normal weights is 9% with NF4, and 3.0 / 127 / sqrt(12) = 0.7% with 8 bits."""
    x = torch.randn(33, 256, generator=torch.Generator().manual_seed(1))
    exact = x @ weight.t()
    assert min_error < (make_linear(quantization, weight, bits)(x) - exact).norm() / exact.norm() < max_error


@pytest.mark.parametrize("bits", BITS)
def test_gradient_of_the_input(quantization, weight, bits):
    linear = make_linear(quantization, weight, bits)
    x, grad_output = torch.randn(33, 256, requires_grad=True), torch.randn(33, 96)
    grad_x, = torch.autograd.grad(linear(x), x, grad_output)
    torch.testing.assert_close(grad_x, grad_output @ dequantized_weight(linear, 256))


@pytest.fixture
def one_row_is_decoded(monkeypatch):
    """Products of one row take our kernels' reference implementations, as they take the kernels on a GPU."""
    monkeypatch.setattr("lavin.kernels.single_row.uses_gemv", lambda x: len(x) == 1)


def test_one_row_in_4_bits(quantization, weight, one_row_is_decoded):
    """Our kernel's reference implementation equals bitsandbytes, but for values of NF4 as precise as in bf16."""
    linear, x = make_linear(quantization, weight, "4bit"), torch.randn(1, 256)
    expected = linear(x)
    linear.prepare_gemv()
    assert 0 < (linear(x) - expected).norm() / expected.norm() < 2**-8
    torch.testing.assert_close(linear(x.repeat(2, 1))[:1], expected)  # two rows still go to bitsandbytes
    output = linear(x.requires_grad_())  # and so does a row that needs a gradient
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(torch.autograd.grad(output.sum(), x)[0], dequantized_weight(linear, 256).sum(0)[None])


def test_one_row_of_blocks_that_two_rows_share(quantization, one_row_is_decoded):
    """Our kernel cannot multiply such a matrix: bitsandbytes does."""
    linear, x = make_linear(quantization, torch.randn(64, 96), "4bit"), torch.randn(1, 96)
    expected = linear(x)
    linear.prepare_gemv()
    assert torch.equal(linear(x), expected)


@pytest.mark.parametrize("bits, num_bytes", [("4bit", 96 * 256 // 2 + 384 + 4 * 2 + 4 + 4 * (16 + 256)),
                                             ("8bit", 96 * 260)])
def test_only_the_quantized_weight_is_kept(quantization, weight, bits, num_bytes):
    """4 bits: 384 blocks of 64; their scales fill 2 blocks, plus an offset; lookup tables of 16 and 256 levels."""
    weight = weight.clone()
    linear, original = make_linear(quantization, weight, bits), weakref.ref(weight)
    del weight
    assert original() is None and weight_bytes(linear) == num_bytes


QWEN = {"biases": ("wq", "wk", "wv", "wo", "w1", "w2", "w3"), "qk_norm": True}


@pytest.mark.parametrize("llama", [{}, QWEN])
def test_joined_matrices_in_4_bits(quantization, monkeypatch, llama):
    """They multiply one row at once, as each of them would, and several rows as before. Nothing is kept twice."""
    model, _ = quantized_and_dequantized_model("4bit", llama={"dim": 256, "d_ff": 128, **llama})
    block, x = model.llama.layers[0], torch.randn(2, 256, generator=torch.Generator().manual_seed(0))
    expected = [*block.attention.project(x), block.feed_forward(x)]
    fuse(model)
    assert all(map(torch.equal, [*block.attention.project(x), block.feed_forward(x)], expected))
    for linears, joined in ((block.attention.wq, block.attention.wk, block.attention.wv), block.attention.wqkv), (
            (block.feed_forward.w1, block.feed_forward.w3), block.feed_forward.w13):
        for linear in linears:
            parts = linear.weight, linear.offset, linear.state.absmax, linear.state.state2.absmax
            wholes = joined.weight, joined.offset, joined.absmax, joined.absmax2
            assert [part.untyped_storage().data_ptr() for part in parts] == [
                whole.untyped_storage().data_ptr() for whole in wholes]
    monkeypatch.setattr("lavin.kernels.single_row.uses_gemv", lambda x: len(x) == 1)
    for actual, exact in zip([*block.attention.project(x[:1]), block.feed_forward(x[:1])], expected, strict=True):
        assert 0 < (actual - exact[:1]).norm() / exact[:1].norm() < 2**-7  # values of NF4 are as precise as in bf16


@pytest.mark.parametrize("llama", [{}, QWEN])
@pytest.mark.parametrize("bits", BITS)
def test_model_equals_one_with_dequantized_weights(quantization, bits, llama):
    """The loss and all gradients, with and without gradient checkpointing; the greedy answers."""
    quantized, dequantized = quantized_and_dequantized_model(bits, llama=llama)
    exact_loss = tiny_model(llama=llama)(pack(mixed_examples())).item()
    for model, checkpointing in ((dequantized, False), (quantized, False), (quantized, True)):
        model.train()
        for module in model.modules():
            if hasattr(module, "dropout"):
                module.dropout.zero_()
        model.set_gradient_checkpointing(checkpointing)
        model.zero_grad()
        loss = model(pack(mixed_examples()))
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        if model is dequantized:
            expected_loss, expected_gradients = loss, gradients
            assert abs(loss.item() - exact_loss) > 1e-3  # quantization changes the loss
        torch.testing.assert_close(loss, expected_loss)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected_gradients[name], atol=1e-5, rtol=1e-4, msg=name)
    answers = [torch.stack(list(decode(model.eval(), mixed_examples(0), 8, sampler(0, 1, []))))
               for model in (dequantized, quantized)]
    assert torch.equal(*answers)


def test_only_the_linear_layers_of_llama_are_quantized(quantization, base):
    model, _ = load_base(str(base.weights), "tiny", str(base.vision), AdapterConfig(), CPU, torch.bfloat16, bits="4bit")
    quantized = {name for name, module in model.named_modules() if isinstance(module, quantization.Linear4bit)}
    assert quantized == {f"llama.layers.{i}.{name}" for i in (0, 1) for name in (
        "attention.wq", "attention.wk", "attention.wv", "attention.wo", "feed_forward.w1", "feed_forward.w2",
        "feed_forward.w3")}
    assert {p.dtype for name, p in model.named_parameters() if "adapter" not in name} == {torch.bfloat16}


def test_4_bit_models_are_captured(quantization, monkeypatch):
    """Their matrices stay as they are. 8-bit models stay as they are altogether: their matmul waits for the GPU."""
    paths = FastPaths(fused=True, compiled=False, captured=True)
    monkeypatch.setattr("lavin.fast.speed_up.choose_fast_paths", lambda *_: paths)
    for bits in BITS:
        plain, fast = (quantized_and_dequantized_model(bits, dropout_prob=0.0)[0].train() for _ in "pf")
        speed_up(fast, bits)
        for _ in range(3):  # the second pass is captured
            torch.testing.assert_close(*(loss_and_gradients(model, mixed_examples()) for model in (plain, fast)),
                                       atol=1e-5, rtol=1e-4)
        assert torch.equal(*(torch.stack(list(decode(model.eval(), mixed_examples(0), 4, greedy)))
                             for model in (plain, fast)))
        assert isinstance(fast.llama.layers[1].attention.wo, quantization.QUANTIZED_LINEARS[bits])
        # not joined: such small matrices do not fill the codes that share a scale of scales
        assert type(fast.llama.layers[1].attention) is Attention
        assert hasattr(fast.llama.layers[1].attention.wo, "table") == (bits == "4bit")  # for our kernel
        assert isinstance(fast.llama.forward, CapturedModule) == (bits == "4bit")
        assert stays_plain(Namespace(bits=bits), Namespace(model_parallel_size=1)) == (bits == "8bit")
        assert isinstance(fast.llama.layers[1], FusedAdaptedBlock) == (bits == "4bit")


@pytest.mark.parametrize("bits", BITS)
def test_training_and_evaluation(quantization, base, scienceqa, tmp_path, bits):
    """train.py trains, and eval.py scores, which reads --bits from the run."""
    train_run(base, scienceqa, tmp_path, "--bits", bits, "--gradient_checkpointing")
    losses = [line["train_closs"] for line in read_log(tmp_path)]
    train_run(base, scienceqa, tmp_path / "exact", "--gradient_checkpointing")
    exact = [line["train_closs"] for line in read_log(tmp_path / "exact")]
    assert losses[2] < losses[0] - 0.05 and losses != exact and losses == pytest.approx(exact, rel=0.05)
    assert load_checkpoint(tmp_path / "checkpoint-2.pth")["flags"]["bits"] == bits
    flags = evaluation.get_args_parser().parse_args(["--adapter_path", str(tmp_path), "--device", "cpu"])
    model, _, _ = load_model(flags)
    assert isinstance(model.llama.layers[0].attention.wq, quantization.QUANTIZED_LINEARS[bits])


CONFIGS = {"7B": LlamaConfig(4096, 32, 32, 32000), "13B": LlamaConfig(5120, 40, 40, 32000)}


@pytest.mark.parametrize("size, bits, num_quantized", [  # layers x (4 D D + 3 D H) weights
    ("7B", "4bit", 32 * (4 * 4096**2 + 3 * 4096 * 11008)), ("7B", "8bit", 32 * (4 * 4096**2 + 3 * 4096 * 11008)),
    ("13B", "4bit", 40 * (4 * 5120**2 + 3 * 5120 * 13824))])
def test_memory_of_real_sizes(quantization, size, bits, num_quantized):
    """The model is on the meta device: adapters in float32, embeddings, output layer and norms in 16 bits, the rest
    quantized."""
    config = CONFIGS[size]
    with torch.device("meta"):
        model = LaVIN(config, tiny_vit(), AdapterConfig())
    parameters = frozen_parameters(model.llama)
    quantize_model(model, bits)
    for full_name, shape in parameters.values():
        module_name, _, name = full_name.rpartition(".")
        tensor = torch.empty(shape, device="meta")
        load_frozen_tensor(model.llama.get_submodule(module_name), name, tensor, "meta", torch.bfloat16)
    adapter_bytes = sum(p.nbytes for name, p in model.llama.named_parameters() if "adapter" in name)
    bytes_in_16_bits = 2 * config.dim * (2 * config.vocab_size + 2 * config.n_layers + 1)
    quantized_bytes = weight_bytes(model.llama) - adapter_bytes - bytes_in_16_bits
    bytes_per_weight = {"4bit": 1 / 2 + 1 / 64 + 4 / 64 / 256, "8bit": 1 + 4 / 4096}[bits]
    assert quantized_bytes == pytest.approx(num_quantized * bytes_per_weight, rel=1e-3)


def test_error_without_bitsandbytes_says_what_to_install(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "lavin.weights.quantization", raising=False)
    with pytest.raises(UserError, match="--bits 8bit needs bitsandbytes .*requirements/lite.txt"):
        load_base(str(base.weights), "tiny", str(base.vision), AdapterConfig(), CPU, torch.float32, bits="8bit")
