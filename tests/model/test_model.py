"""The whole model: modality token, routing, packing, and which parameters train."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from lavin.fast.speed_up import fuse
from lavin.llama import LlamaConfig
from lavin.mm_adapter import AdapterConfig, RepAdapterRouter
from lavin.model import LaVIN, pack
from lavin.timm_compat import timm
from lavin.weights.adapters import adapter_parameters
from tiny import VARIANTS, mixed_examples, tiny_example, tiny_model

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def packed_logits(model, examples):
    """Logits of each sample."""
    batch = pack(examples)
    with torch.no_grad():
        return model.llama.output(model.hidden_states(batch)).split(batch.lengths)


def loss(model, examples):
    with torch.no_grad():
        return model(pack(examples))


@pytest.mark.parametrize("kind, visual", VARIANTS)
@pytest.mark.parametrize("heads", [None, 2])
def test_equals_the_padded_reference(kind, visual, heads):
    """Packing against padding and a written-out mask: logits of every position, and the loss."""
    model = tiny_model(adapter_type=kind, visual_adapter_type=visual, llama={"n_kv_heads": heads})
    examples = mixed_examples()
    padded = reference.logits(model, examples, padding=3)
    for ours, theirs, example in zip(packed_logits(model, examples), padded, examples):
        torch.testing.assert_close(ours, theirs[1:1 + len(example.ids)], **CLOSE)
    torch.testing.assert_close(loss(model, examples), reference.loss(model, examples, padding=3), **CLOSE)


def test_clip_like_encoder_equals_the_padded_reference():
    model = tiny_model(vit="clip")
    torch.testing.assert_close(loss(model, mixed_examples()), reference.loss(model, mixed_examples()), **CLOSE)


@pytest.mark.parametrize("kind, visual", VARIANTS)
def test_batch_mates_change_nothing(kind, visual):
    """Each sample's logits alone, among others, and in another order: routing is each picture's own."""
    model = tiny_model(adapter_type=kind, visual_adapter_type=visual)
    examples = mixed_examples()
    together = packed_logits(model, examples)
    backwards = packed_logits(model, examples[::-1])[::-1]
    for i, example in enumerate(examples):
        alone, = packed_logits(model, [example])
        torch.testing.assert_close(together[i], alone, **CLOSE)
        torch.testing.assert_close(backwards[i], alone, **CLOSE)


LARGEST = tiny_model(adapter_type="block", visual_adapter_type="router_block")  # once for all examples drawn


@settings(max_examples=25, deadline=None)
@given(samples=st.lists(st.tuples(st.integers(1, 12), st.integers(0, 4), st.booleans()), min_size=1, max_size=5),
       data=st.data())
def test_any_packing_gives_the_same_losses(samples, data):
    model = LARGEST
    examples = [tiny_example(i, *sample) for i, sample in enumerate(samples)]
    alone = [loss(model, [example]) for example in examples]
    order = data.draw(st.permutations(range(len(examples))))
    cut = data.draw(st.integers(0, len(examples) - 1))
    packs = [part for part in (order[:cut], order[cut:]) if part]
    together = sum(loss(model, [examples[i] for i in part]) for part in packs)
    torch.testing.assert_close(together, sum(alone), atol=1e-4, rtol=1e-5)


def llama_adapters(model):
    return [adapter for layer in model.llama.layers for adapter in (layer.adapter_attn, layer.adapter_mlp)]


def mixtures(model, examples):
    """Every LLaMA adapter's mixtures [2, 2] in a pass over the examples."""
    seen, original = {}, RepAdapterRouter.mixture

    def watch(adapter, h):
        seen[adapter] = original(adapter, h)
        return seen[adapter]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RepAdapterRouter, "mixture", watch)
        loss(model, examples)
    return torch.stack([seen[adapter] for adapter in llama_adapters(model)])


def test_mixtures_depend_on_modality_and_parameters_alone():
    model = tiny_model(adapter_type="block")
    first = mixtures(model, mixed_examples())
    other = mixtures(model, [tiny_example(77, 11, image=True), tiny_example(78, 3)])
    assert torch.equal(first, other)
    assert first.shape == (6, 2, 2)
    assert (first[:, 0] - first[:, 1]).abs().min() > 1e-3  # text and image differ
    table = model.routing_cache()
    torch.testing.assert_close(
        torch.stack([known[name][0] for known in table for name in ("adapter_attn", "adapter_mlp")]), first)
    model.adapter_modality_embedding.weight.data[1] += 1
    moved = mixtures(model, mixed_examples())
    assert torch.equal(moved[:, 0], first[:, 0]) and not torch.isclose(moved[:, 1], first[:, 1]).any()


def test_no_position_attends_to_the_modality_token():
    """With the router silenced, the modality token has no other way into the text."""
    model = tiny_model()
    for layer in model.llama.layers:
        layer.adapter_attn.expert_weights.weight.data.zero_()
    before = packed_logits(model, mixed_examples())
    model.adapter_modality_embedding.weight.data.normal_(std=5)
    after = packed_logits(model, mixed_examples())
    assert all(torch.equal(a, b) for a, b in zip(before, after))


def test_modality_is_the_samples_own():
    """Moving the image row of the modality embedding moves samples with a picture, and no others."""
    model = tiny_model()
    examples = mixed_examples()
    before = packed_logits(model, examples)
    model.adapter_modality_embedding.weight.data[1] += 1
    for a, b, example in zip(before, packed_logits(model, examples), examples):
        assert torch.equal(a, b) == (example.image is None)


def test_pictures_go_to_their_own_samples():
    model = tiny_model()
    examples = mixed_examples()
    before = packed_logits(model, examples)
    examples[1].image.copy_(255 - examples[1].image)
    for i, (a, b) in enumerate(zip(before, packed_logits(model, examples))):
        assert torch.equal(a, b) == (i != 1)


def test_loss_is_on_the_answer_alone():
    """The last token of the answer is foretold but foretells nothing; prompt tokens are not targets."""
    batch = pack([tiny_example(1, 5, 3), tiny_example(2, 4, 0), tiny_example(3, 2, 2, image=True)])
    first, third = tiny_example(1, 5, 3).ids, tiny_example(3, 2, 2, image=True).ids
    assert batch.targets.tolist() == first[-3:] + third[-2:]
    start = len(first) + len(tiny_example(2, 4, 0).ids)
    n = start + len(third)
    assert batch.logit_indices.tolist() == [len(first) - 4, len(first) - 3, len(first) - 2, n - 3, n - 2]
    assert batch.image_slots.tolist() == list(range(start + 3, start + 9))


def test_text_alone_never_runs_the_vit(monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(model.vision, "forward", None)
    assert loss(model, [tiny_example(1, 5), tiny_example(2, 3)]) > 0


@pytest.mark.parametrize("kind, visual", VARIANTS)
def test_only_adapters_train(kind, visual):
    model = tiny_model(adapter_type=kind, visual_adapter_type=visual).train()
    model(pack(mixed_examples())).backward()
    for name, p in model.named_parameters():
        assert p.requires_grad == ("adapter" in name), name
        if "adapter" in name:
            assert p.grad is not None and p.grad.any(), name
        else:
            assert p.grad is None, name


def test_trained_parameters_at_7b():
    """Nothing is allocated, but every shape is that of the 7B model and of CLIP's ViT-L/14."""
    with torch.device("meta"):
        vit = timm.create_model("vit_large_patch14_clip_quickgelu_224", num_classes=0)
        model = LaVIN(LlamaConfig(4096, 32, 32, 32000, norm_eps=1e-6), vit, AdapterConfig())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == 3_781_296
    assert set(map(id, adapter_parameters(model).values())) == set(map(id, trained.values()))
    frozen = sum(p.numel() for name, p in model.llama.named_parameters() if "adapter" not in name)
    assert frozen == 6_738_415_616  # LLaMA-7B


def test_gradient_checkpointing_changes_nothing():
    model = tiny_model(adapter_type="block", visual_adapter_type="router_block", dropout_prob=0.2).train()
    gradients = []
    for on in (False, True):
        model.set_gradient_checkpointing(on)
        model.zero_grad()
        torch.manual_seed(0)  # dropout is drawn again alike
        model(pack(mixed_examples())).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@pytest.mark.parametrize("heads", [None, 2])
def test_fused_projections_change_nothing(heads):
    """Loss, gradients, and the names of what is trained."""
    model = tiny_model(adapter_type="block", llama={"n_kv_heads": heads}).train()
    results = []
    for fused in (False, True):
        if fused:
            fuse(model)
        model.zero_grad()
        torch.manual_seed(0)
        total = model(pack(mixed_examples()))
        total.backward()
        results.append({"loss": total.detach(), **{name: p.grad.clone() for name, p in adapter_parameters(model).items()}})
        assert all(p.requires_grad == ("adapter" in name) for name, p in model.named_parameters())
    torch.testing.assert_close(results[1], results[0], atol=1e-4, rtol=1e-4)
