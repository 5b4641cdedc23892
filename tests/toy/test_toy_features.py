"""toy/features.py: the teacher's encoder, networks trained on the data; toy/pretrained.py."""

import math

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional
from toy_runs import make_teacher, rows_of, stage_at

from add import Discriminator, DiscriminatorHeads
from common.augment import AUGMENTATIONS
from toy import features as toy_features
from toy import pretrained
from toy.data import Dataset, to_float
from toy.networks import ViT


def test_patches_are_what_the_tokens_embed():
    torch.manual_seed(0)
    vit, images = ViT(2, 8, patch=4, width=32, depth=1), torch.randn(3, 2, 8, 8)
    # Each channel is a pixel of the patch.
    vit.embed.weight.data.copy_(torch.eye(32).view(32, 2, 4, 4))
    vit.embed.bias.data.zero_()
    vit.position.data.zero_()
    torch.testing.assert_close(vit.states(images)[0][:, 1:], toy_features.patches_of(images, 4))


@pytest.mark.parametrize(
    "kind, losses, noisy",
    [
        ("classifier", {"loss"}, 0),
        ("convolutional", {"loss"}, 0),
        ("denoiser", {"loss", "class", "rebuild", "patch"}, 30),
    ],
)
def test_f_learns_what_it_is_called_after(tmp_path, monkeypatch, kind, losses, noisy):
    """Every loss falls, on images that are noisy for a "denoiser" alone."""
    seen, noise = [], toy_features.add_noise
    monkeypatch.setattr(toy_features, "add_noise", lambda *a: seen.append(a) or noise(*a))
    labels = torch.arange(64) % 2
    greys = torch.tensor([20, 230])[labels].view(-1, 1, 1, 1)
    images = (greys + torch.randint(20, (64, 1, 8, 8))).to(torch.uint8)
    data = Dataset("two greys", images, labels, images, labels, ("dark", "bright"))
    own = dict(features=kind, features_steps=30, features_width=16, features_depth=1)
    network, _ = toy_features.make_features(stage_at(tmp_path, data=data, **own))
    rows = rows_of(tmp_path / "log.csv")
    assert rows[0].keys() - {"step", "nonfinite"} == losses and len(seen) == noisy
    assert all(float(rows[-1][name]) < 0.95 * float(rows[0][name]) for name in losses)
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    maps = network(torch.rand(3, 1, 8, 8))
    assert [m.shape[2] for m in maps] == network.channels
    assert network.summary(torch.rand(3, 1, 8, 8)).shape == (3, network.width)


def test_dino_tells_images_apart_that_augmentations_do_not_turn_into_each_other(tmp_path):
    """Distance of two kinds' mean summaries over the deviation within a kind, of new views."""
    labels = torch.arange(64) % 2
    g = torch.Generator().manual_seed(0)
    images = torch.randint(30, (64, 1, 8, 8), generator=g).to(torch.uint8)
    images[labels == 0, :, :, :4] += 200
    images[labels == 1, :, :4] += 200
    data = Dataset("bright left or top", images, labels, images, labels, ("left", "top"))

    def separation(kind):
        own = dict(features=kind, features_steps=100, features_width=16, features_depth=1)
        network, _ = toy_features.make_features(stage_at(tmp_path / kind, data=data, **own))
        views = to_float(images)
        for augment in AUGMENTATIONS.values():
            views = augment(views, g)
        of_kinds = [functional.normalize(network.summary(views[labels == k])) for k in (0, 1)]
        means = [x.mean(0) for x in of_kinds]
        within = torch.cat([x - x.mean(0) for x in of_kinds]).square().sum(1).mean().sqrt()
        return ((means[0] - means[1]).norm() / within).item()

    assert separation("dino") > 1.5 * separation("untrained")


def test_dino_sees_no_label_and_an_untrained_f_no_image(tmp_path):
    """Other labels change no weight of the one, other images none of the other."""

    def weights(kind, labels, images, folder):
        data = Dataset("noise", images, labels, images, labels, ("a", "b"))
        own = dict(features=kind, features_steps=3, features_width=16, features_depth=1)
        network, _ = toy_features.make_features(stage_at(tmp_path / folder, data=data, **own))
        return torch.cat([p.flatten() for p in network.parameters()])

    labels, images = torch.arange(64) % 2, torch.randint(256, (64, 1, 8, 8), dtype=torch.uint8)
    dino, untrained = (weights(kind, labels, images, kind) for kind in ("dino", "untrained"))
    assert torch.equal(dino, weights("dino", 1 - labels, images, "b"))
    assert torch.equal(untrained, weights("untrained", labels, 255 - images, "c"))
    assert not torch.equal(dino, weights("dino", labels, 255 - images, "d"))
    assert not torch.equal(dino, untrained)


def test_dinos_loss_by_hand():
    """Two codes: the average's logits (0.04 ln 3, 0) are (3/4, 1/4) once 0 is taken off, and the
    network's (0, 0) are (1/2, 1/2); its center moves the former to (1/2, 1/2), too."""
    given = torch.tensor([[0.04 * math.log(3), 0.0]])
    predicted = torch.tensor([[0.1 * math.log(4), 0.0]])  # (4/5, 1/5)
    nothing = torch.zeros(2)
    expected = -(0.75 * math.log(0.8) + 0.25 * math.log(0.2))
    assert toy_features.dino_loss(predicted, given, nothing).item() == pytest.approx(expected)
    expected = -0.5 * (math.log(0.8) + math.log(0.2))
    assert toy_features.dino_loss(predicted, given, given[0]).item() == pytest.approx(expected)


def test_the_teachers_encoder_gives_maps_of_the_diffused_image_and_passes_gradient_but_has_none():
    encoder = toy_features.TeacherEncoder(make_teacher(dropout=0.5).train(), seed=7)
    discriminator = Discriminator(encoder, DiscriminatorHeads(encoder.channels, hidden=8)).train()
    assert not any(m.training for m in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())
    images, g = torch.rand(3, 1, 16, 16, requires_grad=True), torch.Generator().manual_seed(7)
    network, schedule = encoder.teacher.network, encoder.teacher.schedule
    nobody = torch.full((3,), 3)
    tokens = discriminator.features(images)
    assert [x.shape for x in tokens] == [(3, 16, 32), (3, 16, 16), (3, 16, 16)]
    assert encoder.channels == [32, 16, 16]
    t, z = torch.randint(600, (3,), generator=g), (images + 0.5) / 0.7
    maps = network.encode(schedule.diffuse(z, torch.randn(z.shape, generator=g), t), t, nobody)
    # 2x2 positions are one token.
    folded = maps[0].reshape(3, 8, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(3, 16, 32)
    for x, expected in zip(tokens, [folded, *(m.flatten(2).mT for m in maps[1:])], strict=True):
        torch.testing.assert_close(x, expected)
        (gradient,) = torch.autograd.grad(x.square().sum(), images, retain_graph=True)
        assert gradient.abs().amax((1, 2, 3)).min() > 0
    clean = network.encode(schedule.alpha[0] * z, torch.zeros(3), nobody)[-1]
    torch.testing.assert_close(encoder.summary(images), clean.mean((2, 3)))


def test_the_encoders_draws_are_its_own_generators_and_spread_over_t_below_600():
    encoder, images = toy_features.TeacherEncoder(make_teacher(), seed=0), torch.rand(8, 1, 4, 4)
    state, seen = encoder.generator.get_state(), []
    for seed in (1, 2, 3):
        if seed < 3:
            encoder.generator.set_state(state)
        before = torch.manual_seed(seed).get_state()
        seen.append(Discriminator(encoder, nn.ModuleList()).features(images))
        assert torch.equal(torch.get_rng_state(), before)  # nothing was drawn from the default one
    assert all(map(torch.equal, seen[0], seen[1])) and not any(map(torch.equal, seen[1], seen[2]))
    drawn, diffuse = [], encoder.teacher.schedule.diffuse
    encoder.teacher.schedule.diffuse = lambda x, noise, t: drawn.append(t) or diffuse(x, noise, t)
    encoder(torch.zeros(8000, 1, 4, 4))
    # 600 e^(-8000 / 600) = 0.001 would be missed.
    assert drawn[0].unique().tolist() == list(range(600))


class HubModel(nn.Module):
    """What torch.hub's dinov2_vits14 offers, with blocks that add 1, on 112 x 112 images normalised
    to mean 0."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Identity() for _ in range(12))
        self.norm, self.seen = nn.Identity(), None
        for block in self.blocks:
            block.forward = lambda x: x + 1

    def prepare_tokens_with_masks(self, x):
        self.seen = x
        return x.mean((1, 2, 3))[:, None, None] + torch.zeros(len(x), 65, 384)


def test_dinov2_reads_the_embedding_and_blocks_2_5_8_11(monkeypatch):
    monkeypatch.setattr(torch.hub, "load", lambda *_, **__: HubModel())
    network = pretrained.DinoV2()
    images = torch.zeros(2, 1, 32, 32)
    maps = network(images)
    assert network.network.seen.shape == (2, 3, 112, 112)
    expected = torch.tensor([0.0655, 0.1964, 0.4178])
    torch.testing.assert_close(network.network.seen[0, :, 0, 0], expected, atol=1e-3, rtol=0)
    assert [m.shape for m in maps] == [(2, 64, 384)] * 5 and network.channels == [384] * 5
    # The class token is added: each block counts twice.
    steps = [(m - maps[0]).mean().item() for m in maps]
    assert steps == pytest.approx([0, 6, 12, 18, 24])
    assert network.summary(images).shape == (2, 384)


def test_efficientnet_reads_four_resolutions(monkeypatch):
    """On random weights: its tokens are torchvision's features at strides 4 to 32, and an image's
    gradient reaches every pixel."""
    build = torchvision.models.efficientnet_b0
    monkeypatch.setattr(torchvision.models, "efficientnet_b0", lambda weights: build())
    network = pretrained.EfficientNet().eval()
    images = (torch.rand(2, 3, 32, 32) * 2 - 1).requires_grad_()
    maps = network(images)
    shapes = [(2, 256, 96), (2, 256, 40), (2, 64, 112), (2, 16, 320)]
    assert [m.shape for m in maps] == shapes and network.channels == [96, 40, 112, 320]
    deep = network.network.features[:8](network.prepare(images, 128))
    torch.testing.assert_close(maps[3], deep.flatten(2).mT)
    torch.testing.assert_close(network.summary(images), deep.mean((2, 3)))
    (gradient,) = torch.autograd.grad(maps[3].square().sum(), images)
    assert (gradient != 0).all()
    assert network(torch.zeros(1, 1, 32, 32))[0].shape == (1, 256, 96)  # grey ones, too


@pytest.mark.parametrize(
    "name, network, load",
    [
        ("dinov2", pretrained.DinoV2, (torch.hub, "load")),
        ("efficientnet", pretrained.EfficientNet, (torchvision.models, "efficientnet_b0")),
    ],
)
def test_without_the_internet_a_pretrained_f_says_what_to_do(monkeypatch, name, network, load):
    def fail(*_, **__):
        raise OSError("no route to host\nmore")

    monkeypatch.setattr(*load, fail)
    says = rf"--features {name}.*no route to host.*--features convolutional"
    with pytest.raises(ValueError, match=says) as error:
        network()
    assert "\n" not in str(error.value)
