"""4 and 8 bits: what bitsandbytes makes of a weight, against the papers; the model, against one of rounded weights."""

import sys
import weakref

import pytest
import torch

import eval as evaluation
from lavin.fast.speed_up import speed_up
from lavin.generation.generate import decode
from lavin.generation.sampling import sampler
from lavin.llama import LlamaConfig
from lavin.mm_adapter import AdapterConfig
from lavin.model import LaVIN, pack
from lavin.runtime.errors import UserError
from lavin.weights.load import frozen_parameters, load_base, load_frozen_tensor, quantize_model
from tiny import mixed_examples, tiny_model, tiny_vit
from tiny_runs import load, log, run

CPU = torch.device("cpu")
BITS = ["4bit", "8bit"]
NF4 = torch.tensor([  # QLoRA, appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0])


@pytest.fixture(scope="module")
def lite():
    pytest.importorskip("bitsandbytes")
    import lavin.weights.quantization
    return lavin.weights.quantization


def linear_of(lite, weight: torch.Tensor, bits: str):
    linear = lite.QUANTIZED_LINEARS[bits]()
    linear.load(weight, CPU, torch.float32)
    return linear


def rounded(linear, width: int) -> torch.Tensor:
    """The weight [O, K] by which the linear multiplies."""
    with torch.no_grad():
        return linear(torch.eye(width)).t().contiguous()


@pytest.fixture
def weight():
    return torch.randn(96, 256, generator=torch.Generator().manual_seed(0)) / 16


def test_4_bits_are_the_nearest_nf4_levels(lite, weight):
    """Of each 64 weights over their largest, itself kept in 8 bits: right to 2% where these vary by a tenth."""
    blocks = weight.view(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    nearest = NF4[(blocks / largest)[..., None].sub(NF4).abs().argmin(-1)] * largest
    ours = rounded(linear_of(lite, weight, "4bit"), 256).view(-1, 64)
    assert ((ours - nearest).abs() <= 0.02 * nearest.abs() + 1e-6).all()
    assert not torch.equal(ours, nearest)  # or the scales would not be quantized themselves


def test_8_bits_are_right_to_half_a_step(lite, weight):
    """Steps of a 127th of the row's largest; before that, the weight is rounded to float16's 11 bits."""
    error = (rounded(linear_of(lite, weight, "8bit"), 256) - weight).abs()
    largest = weight.abs().amax(1, keepdim=True)
    assert (error <= 1.001 * (largest / 254 + weight.abs() * 2**-11)).all()


@pytest.mark.parametrize("bits, least, most", [("4bit", 0.08, 0.11), ("8bit", 0.004, 0.01)])
def test_products_are_near_those_in_16_bits(lite, weight, bits, least, most):
    """Normal weights lose 9% of their size to NF4's levels, and 3.0 / 127 / sqrt(12) = 0.7% to steps of 8 bits."""
    x = torch.randn(33, 256, generator=torch.Generator().manual_seed(1))
    exact = x @ weight.t()
    assert least < (linear_of(lite, weight, bits)(x) - exact).norm() / exact.norm() < most


@pytest.mark.parametrize("bits", BITS)
def test_gradient_of_the_input(lite, weight, bits):
    linear = linear_of(lite, weight, bits)
    x, slope = torch.randn(33, 256, requires_grad=True), torch.randn(33, 96)
    of_x, = torch.autograd.grad(linear(x), x, slope)
    torch.testing.assert_close(of_x, slope @ rounded(linear, 256))


@pytest.mark.parametrize("bits, held", [("4bit", 96 * 256 // 2 + 384 + 4 * 2 + 4 + 4 * (16 + 256)), ("8bit", 96 * 260)])
def test_the_weight_given_is_not_kept(lite, weight, bits, held):
    """4 bits: 384 blocks of 64, whose scales have 2 blocks of their own, an offset, and tables of 16 and 256 levels."""
    weight = weight.clone()
    linear, gone = linear_of(lite, weight, bits), weakref.ref(weight)
    del weight
    assert gone() is None and lite.weight_bytes(linear) == held


def twins(lite, bits: str) -> tuple[LaVIN, LaVIN]:
    """A quantized model, and a plain one of the weights by which it multiplies."""
    quantized, plain = tiny_model(), tiny_model()
    exact = dict(quantized.llama.named_parameters())
    quantize_model(quantized, bits)
    for name, module in quantized.llama.layers.named_modules():
        if type(module) is lite.QUANTIZED_LINEARS[bits]:
            weight = exact[f"layers.{name}.weight"]
            module.load(weight.detach(), CPU, torch.float32)
            plain.llama.layers.get_submodule(name).weight.data = rounded(module, weight.shape[1])
    return quantized, plain


@pytest.mark.parametrize("bits", BITS)
def test_model_is_that_of_the_rounded_weights(lite, bits):
    """Loss, all gradients, also recomputed; the greedy answers."""
    quantized, plain = twins(lite, bits)
    exact = tiny_model()(pack(mixed_examples())).item()
    for model, recompute in ((plain, False), (quantized, False), (quantized, True)):
        model.train()
        for module in model.modules():
            if hasattr(module, "dropout"):
                module.dropout.zero_()
        model.set_gradient_checkpointing(recompute)
        model.zero_grad()
        loss = model(pack(mixed_examples()))
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        if model is plain:
            expected, of_plain = loss, gradients
            assert abs(loss.item() - exact) > 1e-3  # rounding shows
        torch.testing.assert_close(loss, expected)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, of_plain[name], atol=1e-5, rtol=1e-4, msg=name)
    answers = [torch.stack(list(decode(model.eval(), mixed_examples(0), 8, sampler(0, 1, []))))
               for model in (plain, quantized)]
    assert torch.equal(*answers)


def test_only_the_matrices_of_llamas_layers_are_quantized(lite, base):
    model, _ = load_base(str(base.weights), "tiny", str(base.vision), AdapterConfig(), CPU, torch.bfloat16, bits="4bit")
    quantized = {name for name, module in model.named_modules() if isinstance(module, lite.Linear4bit)}
    assert quantized == {f"llama.layers.{i}.{name}" for i in (0, 1) for name in (
        "attention.wq", "attention.wk", "attention.wv", "attention.wo", "feed_forward.w1", "feed_forward.w2",
        "feed_forward.w3")}
    assert {p.dtype for name, p in model.named_parameters() if "adapter" not in name} == {torch.bfloat16}
    assert speed_up(model, "fp8") is model and isinstance(model.llama.layers[1].attention.wo, lite.Linear4bit)


@pytest.mark.parametrize("bits", BITS)
def test_runs_and_their_scores(lite, base, scienceqa, tmp_path, bits):
    """train.py and eval.py, which takes --bits from the run."""
    run(base, scienceqa, tmp_path, "--bits", bits, "--gradient_checkpointing")
    losses = [line["train_closs"] for line in log(tmp_path)]
    run(base, scienceqa, tmp_path / "exact", "--gradient_checkpointing")
    exact = [line["train_closs"] for line in log(tmp_path / "exact")]
    assert losses[2] < losses[0] - 0.05 and losses != exact and losses == pytest.approx(exact, rel=0.05)
    assert load(tmp_path / "checkpoint-2.pth")["flags"]["bits"] == bits
    flags = evaluation.get_args_parser().parse_args(["--adapter_path", str(tmp_path), "--device", "cpu"])
    model, _, _ = evaluation.load_model(flags)
    assert isinstance(model.llama.layers[0].attention.wq, lite.QUANTIZED_LINEARS[bits])


SIZES = {"7B": LlamaConfig(4096, 32, 32, 32000), "13B": LlamaConfig(5120, 40, 40, 32000)}


@pytest.mark.parametrize("size, bits, linears", [  # layers x (4 D D + 3 D H) weights, by hand
    ("7B", "4bit", 32 * (4 * 4096**2 + 3 * 4096 * 11008)), ("7B", "8bit", 32 * (4 * 4096**2 + 3 * 4096 * 11008)),
    ("13B", "4bit", 40 * (4 * 5120**2 + 3 * 5120 * 13824))])
def test_memory_of_real_sizes(lite, size, bits, linears):
    """Counted on meta. 16 bits for both embeddings and the norms, float32 for the adapters, and the matrices."""
    config = SIZES[size]
    with torch.device("meta"):
        model = LaVIN(config, tiny_vit(), AdapterConfig())
    places = frozen_parameters(model.llama)
    quantize_model(model, bits)
    for place, shape in places.values():
        owner, _, name = place.rpartition(".")
        load_frozen_tensor(model.llama.get_submodule(owner), name, torch.empty(shape, device="meta"), "meta", torch.bfloat16)
    adapters = sum(p.nbytes for name, p in model.llama.named_parameters() if "adapter" in name)
    others = 2 * config.dim * (2 * config.vocab_size + 2 * config.n_layers + 1)
    counted = lite.weight_bytes(model.llama) - adapters - others
    per_weight = {"4bit": 1 / 2 + 1 / 64 + 4 / 64 / 256, "8bit": 1 + 4 / 4096}[bits]
    assert counted == pytest.approx(linears * per_weight, rel=1e-3)


def test_without_bitsandbytes_the_error_says_what_to_install(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "lavin.weights.quantization", raising=False)
    with pytest.raises(UserError, match="--bits 8bit needs bitsandbytes .*requirements-lite.txt"):
        load_base(str(base.weights), "tiny", str(base.vision), AdapterConfig(), CPU, torch.float32, bits="8bit")
