"""full/plan/: published parameter counts and operations."""

import shutil

import pytest
import torch
from full_plans import by_part, forbid_network, settings
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from full.plan import dry_run, plan
from full.plan.architectures import META, MetaBackbone, MetaTextFeatures, vit
from full.plan.dry_run import DryRun, MetaMeter
from full.plan.labels import HEADS, STUDENT

# Parameters and operations ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, unet, text",
    [
        ("sd15", 859.52, [123.06]),
        ("sd21", 865.91, [340.39]),
        ("sdxl", 2567.46, [123.06, 694.66]),
    ],
)
def test_parameters_of_the_backbones_are_the_published_ones(name, unet, text):
    backbone = MetaBackbone(name, torch.bfloat16)
    millions = lambda network: round(plan.count(network) / 1e6, 2)  # noqa: E731
    assert (millions(backbone.pipe.unet), [millions(x) for x in backbone.texts]) == (unet, text)
    assert millions(backbone.pipe.vae) == 83.65


@pytest.mark.parametrize(
    "name, count, size",
    [
        ("dinov2-s", 22.06, 518),
        ("dinov2-l", 304.37, 518),
        ("dino-s", 21.67, 224),
        ("clip-l", 303.18, 224),
    ],
)
def test_parameters_of_the_image_networks_are_the_published_ones(name, count, size):
    network = vit(name, torch.bfloat16, 0, "features")
    counted = [
        p.numel() for n, p in network.named_parameters() if "pooler.dense" not in n
    ]  # transformers' own
    assert round(sum(counted) / 1e6, 2) == count and network.size == size


def test_parameters_of_the_text_tower_are_the_published_ones():
    tower = MetaTextFeatures("ViT-g-14/laion2b_s12b_b42k", torch.bfloat16)
    assert round(plan.count(tower.network) / 1e6, 2) == 354.03 and tower.width == 1024
    assert tower(["a", "b"]).shape == (2, 1024)


def test_a_repositorys_name_is_the_short_one():
    assert MetaBackbone("stabilityai/stable-diffusion-xl-base-1.0", torch.bfloat16).is_xl
    assert vit("facebook/dino-vits16", torch.bfloat16, 0, "features").width == 384


def test_a_repository_in_the_hubs_cache_is_read(bare, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--someone--vit" / "snapshots" / "0123"
    shutil.copytree(bare / "dino", snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    forbid_network(monkeypatch)
    assert vit("someone/vit", torch.float32, 0, "features").width == 24


@pytest.mark.parametrize("name, teraflop", [("sd15", 0.803), ("sd21", 0.804), ("sdxl", 1.589)])
def test_operations_of_a_unet(name, teraflop):
    """By torch's own counter, which knows nothing of this code."""
    backbone, latents = (
        MetaBackbone(name, torch.bfloat16),
        torch.empty(1, 4, 64, 64, device=META, dtype=torch.bfloat16),
    )
    cond = backbone.with_sizes(backbone.text(["a"]), 512)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), dry_run.fused_attention():
        backbone.pipe.unet(latents, torch.zeros(1, device=META), **cond)
    assert counter.get_total_flops() / 1e12 == pytest.approx(teraflop, rel=2e-3)


def test_operations_of_every_part(sd15):
    """Measured elsewhere, network by network, at 512×512 with F at 518, whose resize is 0.002."""
    known = {
        "text encoders": 0.013,
        "c_text": 0.047,
        "c_img": 1.014,
        "VAE encodes x_0": 1.117,
        STUDENT: 0.803,
        "teacher": 0.803,
        "VAE decodes x_hat": 2.515,
        "VAE decodes the target": 2.515,
        "F of x_hat": 0.093 + 0.002,
        "F of x_0": 0.093 + 0.002,
        "F of x_hat, backward": 0.145,
        "VAE decodes x_hat, backward": 4.286,
        f"{STUDENT}, backward": 2.262,
    }
    counted = {part: n / 1e12 for part, n in by_part(sd15[2].operations(1)).items()}
    assert counted.keys() - known.keys() == {HEADS}
    assert {part: counted[part] for part in known} == pytest.approx(known, rel=0.02, abs=6e-4)


def heads_by_hand(tokens, width, out, r1):
    """Five heads: convolutions of 1, 9 and 1 taps. Forward thrice, on generated tokens in both
    halves and on real ones; back to the tokens once; back to weights and tokens of both, save the
    first layer's to tokens that want no gradient. R1 goes back to the real tokens (once), and
    through that again (twice)."""
    first, whole = width * width, width * width * (1 + 9) + width * out
    passes = 3 + 1 + 2 + 2 + (3 if r1 else 0) - (1 if r1 else 2) * first / whole
    return 5 * tokens * 2 * whole * passes


def resize_by_hand(n, m):
    """A product with an (m, n) matrix from either side, for three colours."""
    return 3 * 2 * (m * n * n + m * n * m)


def test_operations_of_the_heads(sd15):
    counted = by_part(sd15[2].operations(1))[HEADS]
    assert counted == pytest.approx(heads_by_hand(37 * 37, 384, 64, r1=True), rel=1e-3)


def test_the_meter_counts_operations_by_precision():
    meter, conv = MetaMeter(), nn.Conv2d(3, 5, 3, padding=1, device=META)
    with meter:
        for dtype in (torch.float32, torch.bfloat16):
            with meter.inside(str(dtype)):
                torch.empty(7, 11, device=META, dtype=dtype) @ torch.empty(
                    11, 13, device=META, dtype=dtype
                )
                conv.to(dtype)(torch.empty(2, 3, 8, 8, device=META, dtype=dtype))
    product, convolution = 2 * 7 * 11 * 13, 2 * (2 * 8 * 8) * 5 * (3 * 9)
    assert meter.flops == {
        ("torch.float32", "tf32"): product + convolution,
        ("torch.bfloat16", "bf16"): product + convolution,
    }


def test_settings_change_the_operations(bare, planned):
    measure = lambda **more: by_part(DryRun(settings(bare, **more)).measure(2)[0])  # noqa: E731
    plain = by_part(planned(1).operations(2))

    augment = ("color", "translation", "cutout")
    large = measure(
        guidance=(3.0, 8.0),
        space="latent",
        c_img="none",
        teacher_steps=4,
        resolution=128,
        augment=augment,
    )
    assert large["teacher"] == pytest.approx(2 * 4 * 4 * plain["teacher"], rel=0.25)
    assert large["VAE encodes x_0"] == pytest.approx(4 * plain["VAE encodes x_0"], rel=0.1)
    assert "VAE decodes the target" not in large and "c_img" not in large

    nfsd = measure(weight="nfsd", guidance=(7.5,), c_text="none", features_size=56)
    assert nfsd["teacher"] == 3 * plain["teacher"] and "c_text" not in nfsd
    assert (
        nfsd["text encoders"] == 2 * plain["text encoders"]
    )  # two captions; the empty and the negative prompt
    networks = [
        of["F of x_0"] - 2 * resize_by_hand(64, size) for of, size in ((nfsd, 56), (plain, 28))
    ]
    assert networks[0] == pytest.approx(4 * networks[1], rel=0.25)

    whole = measure(checkpointing=False, gamma=0.0, c_text="none", c_img="none")
    assert 0.6 < whole[f"{STUDENT}, backward"] / plain[f"{STUDENT}, backward"] < 0.8
    assert whole[HEADS] == pytest.approx(2 * heads_by_hand(2 * 2, 24, 1, r1=False), rel=1e-3)


def test_another_teacher_and_a_tiny_decoder(bare, planned):
    flops, peaks, _ = DryRun(
        settings(bare, teacher=str(bare / "sdxl"), vae=str(bare / "taesd"))
    ).measure(1)
    parts, plain = by_part(flops), planned(1)
    assert (
        parts["VAE encodes for the teacher"] == parts["VAE encodes x_0"] > 0
    )  # another latent space
    assert parts["VAE decodes x_hat"] < by_part(plain.operations(1))["VAE decodes x_hat"]
    other = MetaBackbone(str(bare / "sdxl"), torch.float32)
    networks = [other.load_tiny_decoder(str(bare / "taesd"))] * 2  # one for each backbone
    networks += [other.pipe.unet, other.pipe.vae, *other.texts]
    more = peaks[STUDENT]["frozen"] - plain.memory("one GPU", 1)[1]["frozen"]
    gone = MetaBackbone(str(bare / "sd15"), torch.float32).pipe.unet  # the student's own frozen one
    assert more == pytest.approx(4 * (sum(map(plan.count, networks)) - plan.count(gone)), rel=0.01)
