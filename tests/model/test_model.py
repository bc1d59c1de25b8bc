"""The complete model: modality token, routing, packing, and which parameters are trained."""

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
from tiny import VARIANTS, greedy_logits, loss_and_gradients, mixed_examples, tiny_example, tiny_model

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def packed_logits(model, examples):
    """The logits of each example, from one packed batch."""
    batch = pack(examples)
    with torch.no_grad():
        return model.llama.output(model.hidden_states(batch)).split(batch.lengths)


def loss(model, examples):
    with torch.no_grad():
        return model(pack(examples))


@pytest.mark.parametrize("adapter_type, visual_type", VARIANTS)
@pytest.mark.parametrize("heads", [None, 2])
def test_equals_the_padded_reference(adapter_type, visual_type, heads):
    """Packing gives the logits and the loss of the reference, which pads and uses an explicit mask."""
    model = tiny_model(adapter_type=adapter_type, visual_adapter_type=visual_type, llama={"n_kv_heads": heads})
    examples = mixed_examples()
    padded = reference.logits(model, examples, padding=3)
    for logits, padded_row, example in zip(packed_logits(model, examples), padded, examples, strict=True):
        torch.testing.assert_close(logits, padded_row[1:1 + len(example.ids)], **CLOSE)
    torch.testing.assert_close(loss(model, examples), reference.loss(model, examples, padding=3), **CLOSE)


def test_clip_vit_equals_the_padded_reference():
    model = tiny_model(vit="clip")
    torch.testing.assert_close(loss(model, mixed_examples()), reference.loss(model, mixed_examples()), **CLOSE)


@pytest.mark.parametrize("adapter_type, visual_type", VARIANTS)
def test_logits_are_independent_of_the_batch(adapter_type, visual_type):
    """The same logits for an example alone, in a batch, and in a reversed batch; each image is routed separately."""
    model = tiny_model(adapter_type=adapter_type, visual_adapter_type=visual_type)
    examples = mixed_examples()
    together = packed_logits(model, examples)
    reverse_order = packed_logits(model, examples[::-1])[::-1]
    for i, example in enumerate(examples):
        alone, = packed_logits(model, [example])
        torch.testing.assert_close(together[i], alone, **CLOSE)
        torch.testing.assert_close(reverse_order[i], alone, **CLOSE)


ALL_ADAPTERS_MODEL = tiny_model(adapter_type="block", visual_adapter_type="router_block")  # built once, for Hypothesis


@settings(max_examples=25, deadline=None)
@given(samples=st.lists(st.tuples(st.integers(1, 12), st.integers(0, 4), st.booleans()), min_size=1, max_size=5),
       data=st.data())
def test_any_packing_gives_the_same_losses(samples, data):
    model = ALL_ADAPTERS_MODEL
    examples = [tiny_example(i, *sample) for i, sample in enumerate(samples)]
    alone = [loss(model, [example]) for example in examples]
    order = data.draw(st.permutations(range(len(examples))))
    cut = data.draw(st.integers(0, len(examples) - 1))
    splits = [split for split in (order[:cut], order[cut:]) if split]
    packed = sum(loss(model, [examples[i] for i in split]) for split in splits)
    torch.testing.assert_close(packed, sum(alone), atol=1e-4, rtol=1e-5)


def llama_adapters(model):
    return [adapter for layer in model.llama.layers for adapter in (layer.adapter_attn, layer.adapter_mlp)]


def mixtures(model, examples):
    """The mixtures [2, 2] (modality, expert) that each LLaMA adapter computes in a forward pass."""
    computed, original = {}, RepAdapterRouter.mixture

    def spy(adapter, h, *args):
        computed[adapter] = original(adapter, h, *args)
        return computed[adapter]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RepAdapterRouter, "mixture", spy)
        loss(model, examples)
    return torch.stack([computed[adapter] for adapter in llama_adapters(model)])


def test_mixtures_depend_only_on_modality_and_parameters():
    model = tiny_model(adapter_type="block")
    first = mixtures(model, mixed_examples())
    other = mixtures(model, [tiny_example(77, 11, image=True), tiny_example(78, 3)])
    assert torch.equal(first, other)
    assert first.shape == (6, 2, 2)
    assert (first[:, 0] - first[:, 1]).abs().min() > 1e-3  # text and image differ
    cache = model.routing_cache.refresh(model)
    torch.testing.assert_close(
        torch.stack([layer_cache[name][0] for layer_cache in cache for name in ("adapter_attn", "adapter_mlp")]), first)
    model.adapter_modality_embedding.weight.data[1] += 1
    changed = mixtures(model, mixed_examples())
    assert torch.equal(changed[:, 0], first[:, 0]) and not torch.isclose(changed[:, 1], first[:, 1]).any()


def test_train_and_eval_set_every_part():
    """PyTorch promises so, also where a part's mode was set by itself."""
    model = tiny_model()
    for mode in (False, True):
        model.train(mode)
        model.vision.train(not mode)
        assert model.train(mode) is model and {module.training for module in model.modules()} == {mode}


def test_no_position_attends_to_the_modality_token():
    """The routers' weights are zero, so that only attention could carry the modality token into the text."""
    model = tiny_model()
    for layer in model.llama.layers:
        layer.adapter_attn.expert_weights.weight.data.zero_()
    before = packed_logits(model, mixed_examples())
    model.adapter_modality_embedding.weight.data.normal_(std=5)
    after = packed_logits(model, mixed_examples())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_each_example_has_its_own_modality():
    """Changing the image row of the modality embedding changes the logits of examples with an image only."""
    model = tiny_model()
    examples = mixed_examples()
    before = packed_logits(model, examples)
    model.adapter_modality_embedding.weight.data[1] += 1
    for a, b, example in zip(before, packed_logits(model, examples), examples, strict=True):
        assert torch.equal(a, b) == (example.image is None)


def test_each_image_affects_its_own_example_only():
    model = tiny_model()
    examples = mixed_examples()
    before = packed_logits(model, examples)
    examples[1].image.copy_(255 - examples[1].image)
    for i, (a, b) in enumerate(zip(before, packed_logits(model, examples), strict=True)):
        assert torch.equal(a, b) == (i != 1)


def test_loss_is_on_the_answer_only():
    """The last answer token is a target but has no logits; prompt tokens are not targets."""
    batch = pack([tiny_example(1, 5, 3), tiny_example(2, 4, 0), tiny_example(3, 2, 2, image=True)])
    first, third = tiny_example(1, 5, 3).ids, tiny_example(3, 2, 2, image=True).ids
    assert batch.targets.tolist() == first[-3:] + third[-2:]
    start = len(first) + len(tiny_example(2, 4, 0).ids)
    n = start + len(third)
    assert batch.logit_indices.tolist() == [len(first) - 4, len(first) - 3, len(first) - 2, n - 3, n - 2]
    assert batch.image_slots.tolist() == list(range(start + 3, start + 9))


def test_text_only_batches_skip_the_vit(monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(model.vision, "forward", None)
    assert loss(model, [tiny_example(1, 5), tiny_example(2, 3)]) > 0


@pytest.mark.parametrize("adapter_type, visual_type", VARIANTS)
def test_only_adapters_are_trained(adapter_type, visual_type):
    model = tiny_model(adapter_type=adapter_type, visual_adapter_type=visual_type).train()
    model(pack(mixed_examples())).backward()
    for name, p in model.named_parameters():
        assert p.requires_grad == ("adapter" in name), name
        if "adapter" in name:
            assert p.grad is not None and p.grad.any(), name
        else:
            assert p.grad is None, name


def test_number_of_trained_parameters_at_7b():
    """The model is on the meta device, and has the shapes of LLaMA-7B and CLIP's ViT-L/14."""
    with torch.device("meta"):
        vit = timm.create_model("vit_large_patch14_clip_quickgelu_224", num_classes=0)
        model = LaVIN(LlamaConfig(4096, 32, 32, 32000, norm_eps=1e-6), vit, AdapterConfig())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == 3_781_296
    assert set(map(id, adapter_parameters(model).values())) == set(map(id, trained.values()))
    frozen = sum(p.numel() for name, p in model.llama.named_parameters() if "adapter" not in name)
    assert frozen == 6_738_415_616  # LLaMA-7B


def test_gradient_checkpointing_keeps_gradients():
    model = tiny_model(adapter_type="block", visual_adapter_type="router_block", dropout_prob=0.2).train()
    gradients = []
    for enabled in (False, True):
        model.set_gradient_checkpointing(enabled)
        model.zero_grad()
        torch.manual_seed(0)  # the same dropout masks
        model(pack(mixed_examples())).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("heads", [None, 2])
def test_fused_projections_keep_loss_and_gradients(heads):
    """The names of the trained parameters stay, too."""
    model = tiny_model(adapter_type="block", llama={"n_kv_heads": heads}).train()
    results = []
    for fused in (False, True):
        if fused:
            fuse(model)
        model.zero_grad()
        torch.manual_seed(0)
        summed_loss = model(pack(mixed_examples()))
        summed_loss.backward()
        gradients = {name: p.grad.clone() for name, p in adapter_parameters(model).items()}
        results.append({"loss": summed_loss.detach(), **gradients})
        assert all(p.requires_grad == ("adapter" in name) for name, p in model.named_parameters())
    torch.testing.assert_close(results[1], results[0], atol=1e-4, rtol=1e-4)


# --- Another run's adapters in the place of those that are there ---

def state(model) -> dict:
    """All that a model is beside its frozen parameters, in the order in which an optimizer sees it."""
    tensors = [*((name, p) for name, p in model.named_parameters() if p.requires_grad), *model.named_buffers()]
    return {"tensors": [(name, tensor.tolist()) for name, tensor in tensors],
            "adapter": model.adapter, "session": model.session,
            "training": [(name, part.training) for name, part in model.named_modules()],
            "blocks": [(block.drop_path, type(block)) for block in model.llama.layers],
            "features": model.vision.blocks_per_feature,
            "checkpointing": (model.llama.gradient_checkpointing, model.vision.gradient_checkpointing)}


@pytest.mark.parametrize("before", VARIANTS)
@pytest.mark.parametrize("after", VARIANTS)
def test_adapters_attached_anew_are_those_of_a_new_model(before, after):
    """After a model was trained, and has answered; whether the new ones have the shapes of the old ones or not."""
    def config(types, **changes):
        return AdapterConfig(adapter_type=types[0], visual_adapter_type=types[1], **changes)

    later = config(after, adapter_dim=4, n_prompt=3, dropout_prob=0.2, adapter_scale=0.5, hidden_proj=8)
    new = tiny_model(**vars(later), trained=False)
    used = tiny_model(**vars(config(before)))
    used.set_gradient_checkpointing(True)
    loss_and_gradients(used.train(), mixed_examples())
    greedy_logits(used.eval(), mixed_examples(0), 3)
    for model in (used, new):
        torch.manual_seed(7)
        model.attach(later, drop_path=0.25)
    assert state(used) == state(new)
    assert all(p.grad is None for p in used.parameters())
    frozen = {name: p.data for name, p in new.named_parameters() if not p.requires_grad}
    for name, p in used.named_parameters():
        p.data = frozen.get(name, p.data)
    # the routing cache is that of the new adapters
    first, second = (greedy_logits(model.eval(), [tiny_example(1, 5, 0)], 3) for model in (used, new))
    assert torch.equal(first, second)
