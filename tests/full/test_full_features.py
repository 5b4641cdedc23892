"""full/features.py: the vision transformers of F and c_img, of each kind that is known."""

import pytest
import torch
from torch.nn import functional
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTModel,
)

from full.backbones import BackboneError
from full.features import CLIP, IMAGENET, VisionTransformer, load_vit

NORMS = ("layernorm", "post_layernorm")  # the last of each network
KINDS = {  # model, configuration, the normalisation of its pixels
    "dinov2": (Dinov2Model, Dinov2Config, IMAGENET),
    "vit": (ViTModel, ViTConfig, IMAGENET),
    "clip": (CLIPVisionModel, CLIPVisionConfig, CLIP),
}


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_summary_are_the_networks_own(kind, tmp_path):
    model, config, (mean, std) = KINDS[kind]
    torch.manual_seed(0)
    sizes = dict(hidden_size=24, num_hidden_layers=4, num_attention_heads=2, patch_size=14)
    network = model(config(image_size=28, intermediate_size=48, **sizes))
    norm = next(m for n, m in network.named_modules() if n.split(".")[-1] in NORMS)
    torch.nn.init.normal_(norm.weight)  # else hardly any norm shows
    network.save_pretrained(tmp_path)
    vit = VisionTransformer(load_vit(str(tmp_path), torch.float32, "features"))
    images = torch.rand(3, 3, 28, 28) * 2 - 1

    pixels = torch.stack([((images[:, c] + 1) / 2 - mean[c]) / std[c] for c in range(3)], dim=1)
    states = network.eval()(pixels, output_hidden_states=True).hidden_states
    # Four tokens of 14 x 14 pixels; the class token is read out of each map.
    assert [tuple(x.shape) for x in vit(images)] == [(3, 4, 24)] * 5
    token = norm(states[-1][:, 0])
    expected = 24**0.5 * functional.normalize(token, dim=1)
    torch.testing.assert_close(vit.summary(images), expected)
    # As it is before its norm, the token is another one.
    raw = 24**0.5 * functional.normalize(states[-1][:, 0], dim=1)
    assert (expected - raw).abs().max() > 0.1


def test_a_size_that_patches_do_not_fill_is_refused_by_the_name_of_its_flag():
    sizes = dict(hidden_size=24, num_hidden_layers=4, num_attention_heads=2, patch_size=14)
    network = ViTModel(ViTConfig(image_size=30, intermediate_size=48, **sizes))
    with pytest.raises(BackboneError, match="--c-img: its image size, 30: must be a multiple of"):
        VisionTransformer(network, what="c-img")
    with pytest.raises(BackboneError, match="--features-size 27: must be a multiple of 14"):
        VisionTransformer(network, 27)
