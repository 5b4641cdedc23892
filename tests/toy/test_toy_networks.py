"""toy/networks.py: the U-Net, its precision, the ViT."""

import pytest
import torch
from torch import nn
from toy_runs import make_teacher

from toy.networks import ResidualBlock, UNet, ViT, has_bf16
from toy.settings import PRESETS, Settings
from toy.teacher import Standardize, make_denoiser


def test_unet_depends_on_time_and_label_once_trained_and_starts_at_zero():
    torch.manual_seed(0)
    network = UNet(3, classes=4, widths=(8, 16, 16), blocks=2)
    x, t, label = torch.randn(2, 3, 16, 16), torch.tensor([5, 500]), torch.tensor([0, 4])
    assert network(x, t, label).abs().max() == 0  # zero-initialised output
    for p in network.parameters():
        nn.init.normal_(p, std=0.2)
    out = network(x, t, label)
    assert out.shape == x.shape
    assert (network(x, t.flip(0), label) - out).abs().max() > 1e-3
    assert (network(x, t, label.flip(0)) - out).abs().max() > 1e-3


def test_what_a_unet_encodes_is_what_its_residual_blocks_give_on_the_way_down():
    network, seen = make_teacher(blocks=2).network, []
    for block in network.modules():
        if isinstance(block, ResidualBlock):
            block.register_forward_hook(lambda block, inputs, output: seen.append(output))
    inputs = torch.randn(2, 1, 16, 16), torch.tensor([5, 500]), torch.tensor([0, 3])
    network(*inputs)  # five blocks down, four up
    assert [x.shape[1:] for x in seen[:5]] == [(8, 8, 8)] * 2 + [(16, 4, 4)] * 3
    assert all(map(torch.equal, network.encode(*inputs), seen[:5])) and len(seen) == 9 + 5


@pytest.mark.parametrize("bf16, inside", [(False, torch.float32), (True, torch.bfloat16)])
def test_unet_multiplies_in_bfloat16_if_asked_and_keeps_weights_and_results_in_float32(
    bf16, inside
):
    torch.manual_seed(0)
    network = UNet(1, classes=4, widths=(8, 16), blocks=1, bf16=bf16)
    for p in network.parameters():
        nn.init.normal_(p, std=0.1)
    seen = set()
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    x, t, label = torch.randn(2, 1, 16, 16), torch.tensor([5, 500]), torch.tensor([0, 4])
    out = network(x, t, label)
    out.square().sum().backward()
    assert seen == {inside} and out.dtype == torch.float32
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in network.parameters())
    network.bf16 = False
    exact = network(x, t, label)
    assert (out - exact).abs().max() <= (0.05 if bf16 else 0) * exact.abs().max()


@pytest.mark.parametrize(
    "can, has",
    [
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({"avx512_f": True, "amx_bf16": False}, False),
    ],
)
def test_a_cpu_has_bfloat16_if_it_says_so(can, has, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can, raising=False)
    assert has_bf16(torch.device("cpu")) is has and has_bf16(torch.device("mps")) is False
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # torch before 2.11
    assert has_bf16(torch.device("cpu")) is False


@pytest.mark.parametrize("precision, bf16", [("fp32", False), ("bf16", True)])
def test_teacher_and_student_compute_in_the_precision_of_the_settings(precision, bf16):
    settings = Settings(**PRESETS["tiny"] | {"precision": precision})
    assert make_denoiser(1, 3, settings, Standardize(0.0, 1.0)).network.bf16 is bf16


def test_vit_gives_a_map_for_the_embedding_and_each_block_with_the_class_token_read_out():
    torch.manual_seed(0)
    vit, images = ViT(1, 8, patch=4, width=16, depth=2, heads=2), torch.randn(3, 1, 8, 8)
    maps, states = vit(images), vit.states(images)
    assert [m.shape for m in maps] == [(3, 4, 16)] * 3 and vit.channels == [16] * 3
    torch.testing.assert_close(maps[-1], states[-1][:, 1:] + states[-1][:, :1])
    torch.testing.assert_close(vit.summary(images), states[-1][:, 0])
