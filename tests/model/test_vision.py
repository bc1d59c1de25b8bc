"""CLS features against timm's intermediate outputs."""

import pytest
import torch

from lavin.mm_adapter import AdapterConfig, adapt_vit
from lavin.vision import VisionEncoder
from reference import image_features
from tiny import IMAGE_SIZE, VARIANTS, normalize_imagenet, tiny_model, tiny_vit

IMAGES = torch.randint(0, 256, (3, 3, IMAGE_SIZE, IMAGE_SIZE), generator=torch.Generator().manual_seed(0),
                       dtype=torch.uint8)


@pytest.mark.parametrize("vit_name", ["plain", "clip"])
@pytest.mark.parametrize("n_features", [6, 3, 1])
@torch.no_grad()
def test_features_equal_timms_intermediates(vit_name, n_features):
    """They are equal without adapters, and with fresh adapters, which are the identity."""
    torch.manual_seed(0)
    vit = tiny_vit(vit_name).eval()
    layers = vit.forward_intermediates(normalize_imagenet(IMAGES), return_prefix_tokens=True, intermediates_only=True,
                                       norm=False)
    expected = torch.stack([prefix[:, 0] for _, prefix in layers], 1)[:, 6 // n_features - 1::6 // n_features]
    encoder = VisionEncoder(vit, n_features)
    torch.testing.assert_close(encoder(IMAGES), expected, atol=1e-5, rtol=1e-5)
    adapt_vit(vit, AdapterConfig(visual_adapter_type="router_block"))
    torch.testing.assert_close(encoder.eval()(IMAGES), expected, atol=1e-5, rtol=1e-5)
    assert encoder(IMAGES).shape == (3, n_features, 24)


@pytest.mark.parametrize("vit_name", ["plain", "clip"])
@pytest.mark.parametrize("visual_type", sorted({visual_type for _, visual_type in VARIANTS}))
@torch.no_grad()
def test_adapted_features_are_independent_of_the_batch(vit_name, visual_type):
    model = tiny_model(vit=vit_name, visual_adapter_type=visual_type)
    alone = torch.stack([image_features(model, image) for image in IMAGES])
    torch.testing.assert_close(model.vision(IMAGES), alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.vision(IMAGES.flip(0)), alone.flip(0), atol=1e-5, rtol=1e-5)


def test_visual_routing_is_per_position():
    """The router reads each position's own state, so an adapter's output does not depend on other positions."""
    norm = tiny_model().vision.vit.blocks[0].norm1
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))
    before = norm(x)
    x[:, 0] *= -1
    after = norm(x)
    torch.testing.assert_close(after[:, 1:], before[:, 1:])
    assert not torch.isclose(after[:, 0], before[:, 0]).all()


def test_n_prompt_must_divide_the_depth():
    for n in (4, 0, 12):
        with pytest.raises(ValueError, match=f"--n_prompt {n}"):
            VisionEncoder(tiny_vit(), n)
