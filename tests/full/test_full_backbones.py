"""full/backbones.py against diffusers: our forward process, estimates, sampler and rescaled
schedule against its own schedulers, our conditions and latents against its pipelines'."""

import dataclasses

import pytest
import tiny_checkpoints as tiny
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from transformers import Dinov2Config

from add import Student, ddim
from full import random_weights
from full.backbones import Backbone, UNet, make_student_denoiser, make_teacher, same_latents
from full.features import TeacherEncoder, TextFeatures, encode, load_vit
from full.settings import Settings

CPU, T = torch.device("cpu"), torch.tensor([0, 1, 249, 499, 749, 998, 999])
SETTINGS = Settings(resolution=64, checkpointing=False, vae_slicing=False)


@pytest.fixture(scope="module", params=["sd15", "v", "sdxl"])
def backbone(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / request.param
    write = {
        "sd15": tiny.write_sd,
        "v": lambda f: tiny.write_sd(f, "v_prediction", seed=5),
        "sdxl": tiny.write_sdxl,
    }
    write[request.param](folder)
    return Backbone(str(folder), torch.float32, CPU)


@pytest.fixture
def teacher(backbone):
    return make_teacher(backbone, backbone.load_latents(SETTINGS))


def cond_of(backbone, n):
    return backbone.with_sizes(backbone.text([f"number {i}" for i in range(n)]), 64)


def draw(seed, n=7):  # as many as T has
    return torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_the_forward_process_is_add_noise(backbone, teacher):
    theirs = DDPMScheduler.from_config(backbone.pipe.scheduler.config).add_noise(
        draw(0), draw(1), T
    )
    torch.testing.assert_close(
        teacher.schedule.diffuse(draw(0), draw(1), T), theirs, rtol=1e-6, atol=1e-6
    )


def test_the_estimate_of_x_0_is_the_schedulers(backbone, teacher):
    """DDPMScheduler.step's pred_original_sample, from the same U-Net's output, at every one of
    T."""
    cond, x_t, scheduler = (
        cond_of(backbone, len(T)),
        draw(2),
        DDPMScheduler.from_config(backbone.pipe.scheduler.config),
    )
    with torch.no_grad():
        x_0, epsilon = teacher.predict(x_t, T, cond)
        output = teacher.network(x_t, T, cond)
    assert backbone.prediction == (
        "v" if scheduler.config.prediction_type == "v_prediction" else "epsilon"
    )
    for i, t in enumerate(T):
        theirs = scheduler.step(output[i : i + 1], t, x_t[i : i + 1]).pred_original_sample
        torch.testing.assert_close(x_0[i : i + 1], theirs, rtol=1e-4, atol=1e-4)
    alpha, sigma = teacher.schedule.coefficients(T)
    torch.testing.assert_close(alpha * x_0 + sigma * epsilon, x_t, rtol=1e-4, atol=1e-4)


def test_two_teacher_steps_are_ddims(backbone, teacher):
    """ddim() at 800 and 600 against DDIMScheduler.step, then its estimate."""
    scheduler = DDIMScheduler.from_config(
        backbone.pipe.scheduler.config | {"timestep_spacing": "leading", "steps_offset": 0}
    )
    scheduler.set_timesteps(5)  # 800, 600, …: a step goes down by 200
    cond, x_t, both = cond_of(backbone, 2), draw(3, 2), lambda t: torch.full((2,), t)  # noqa: E731
    with torch.no_grad():
        ours = ddim(teacher, x_t, [both(800), both(600)], cond)
        x_600 = scheduler.step(teacher.network(x_t, both(800), cond), 800, x_t).prev_sample
        theirs = scheduler.step(
            teacher.network(x_600, both(600), cond), 600, x_600
        ).pred_original_sample
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_zero_terminal_snr_is_diffusers_rescaling_for_v_alone(backbone):
    student = make_student_denoiser(backbone, backbone.load_latents(SETTINGS), SETTINGS)
    rescaled = DDPMScheduler.from_config(
        backbone.pipe.scheduler.config | {"rescale_betas_zero_snr": True}
    )
    if backbone.prediction == "v":
        assert student.schedule.alpha[-1] == 0 and student.schedule.sigma[-1] == 1
        torch.testing.assert_close(
            student.schedule.alpha**2, rescaled.alphas_cumprod, rtol=1e-4, atol=1e-6
        )
    else:
        torch.testing.assert_close(student.schedule.alpha, backbone.schedule.alpha, rtol=0, atol=0)
        assert student.schedule.alpha[-1].item() == pytest.approx(0.06826491, rel=1e-5)
        with pytest.raises(ValueError, match="--zero-snr true: .* predicts epsilon"):
            make_student_denoiser(
                backbone,
                backbone.load_latents(SETTINGS),
                dataclasses.replace(SETTINGS, zero_snr="true"),
            )


def test_the_student_is_fed_pure_noise_at_999_and_read_with_the_schedules_alpha(backbone):
    denoiser = make_student_denoiser(backbone, backbone.load_latents(SETTINGS), SETTINGS)
    student, noise, cond = Student(denoiser), draw(4, 2), cond_of(backbone, 2)
    s = torch.tensor([999, 999])
    x_s = student.diffuse(draw(5, 2), noise, s)
    assert torch.equal(x_s, noise)
    with torch.no_grad():
        output, x_hat = denoiser.network(x_s, s, cond), student(x_s, s, cond)
    by_hand = -output if backbone.prediction == "v" else (noise - 0.99766723 * output) / 0.06826491
    torch.testing.assert_close(x_hat, by_hand, rtol=1e-4, atol=1e-3)


def test_conditions_are_the_pipelines_own(backbone):
    cond = backbone.text(["a fox", "ein Fuß"])
    embeds, _, *pooled = backbone.pipe.encode_prompt(
        ["a fox", "ein Fuß"], device=CPU, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    assert torch.equal(cond["encoder_hidden_states"], embeds) and not torch.equal(
        embeds[0], embeds[1]
    )
    null = backbone.null(2)["encoder_hidden_states"]
    if backbone.is_xl:  # its config says that an empty prompt is zeros
        assert torch.equal(cond["added_cond_kwargs"]["text_embeds"], pooled[0]) and not null.any()
        time_ids = cond_of(backbone, 2)["added_cond_kwargs"]["time_ids"]
        assert time_ids.tolist() == [[64, 64, 0, 0, 64, 64]] * 2
    else:
        assert torch.equal(null[:1], backbone.text([""])["encoder_hidden_states"])


def test_a_prompt_that_stays_the_same_is_encoded_once(backbone, monkeypatch):
    calls, text = [], backbone.text
    monkeypatch.setattr(backbone, "text", lambda prompts: calls.append(prompts) or text(prompts))
    for n in (1, 3):
        given = backbone.repeated("a red fox", n)["encoder_hidden_states"]
        expected = text(["a red fox"] * n)["encoder_hidden_states"]
        torch.testing.assert_close(given, expected)
    assert calls == [["a red fox"]]


def test_latents_are_the_vaes_scaled_mean(backbone):
    latents, vae = backbone.load_latents(SETTINGS), backbone.pipe.vae
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(6)) * 2 - 1
    z = latents.encode(pixels)
    torch.testing.assert_close(z, vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor)
    torch.testing.assert_close(latents.decode(z), vae.decode(z / vae.config.scaling_factor).sample)


def test_latents_are_shared_with_a_copy_and_with_no_other(backbone, tmp_path):
    copy, other = (
        Backbone(str(tiny.write_sd(tmp_path / name, seed=seed)), torch.float32, CPU)
        for name, seed in (("a", 0), ("b", 7))
    )
    assert same_latents(backbone, backbone)
    assert not same_latents(copy, other)
    assert same_latents(
        copy, Backbone(str(tiny.write_sd(tmp_path / "again", seed=0)), torch.float32, CPU)
    )


def test_random_weights_are_a_checkpoint_of_the_sizes_named(tmp_path, monkeypatch):
    """The real sizes take gigabytes: small ones stand in for them, and the loading code is the real
    one."""
    tiny_unet = dict(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        cross_attention_dim=32,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    vit = Dinov2Config(
        hidden_size=24, num_hidden_layers=4, num_attention_heads=2, image_size=28, patch_size=14
    )
    monkeypatch.setattr(random_weights, "UNETS", {"sd21": tiny_unet})
    monkeypatch.setattr(random_weights, "TEXT_ENCODERS", {"sd21": [(32, 2, 2, "gelu")]})
    monkeypatch.setattr(random_weights, "VITS", {"dinov2-s": vit, "dinov2-l": vit})
    monkeypatch.setattr(
        random_weights,
        "VAE",
        random_weights.VAE | {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4},
    )
    monkeypatch.setattr(
        random_weights,
        "TEXT_TOWER",
        {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    )
    random_weights.main(["sd21", str(tmp_path)])
    backbone = Backbone(str(tmp_path / "sd21"), torch.float32, CPU)
    assert (
        backbone.pipe.unet.config.block_out_channels == [16, 32]
        and backbone.prediction == "epsilon"
    )
    assert backbone.text(["a", "b"])["encoder_hidden_states"].shape == (2, 77, 32)
    assert len(load_vit(str(tmp_path / "dinov2-l"), torch.float32, "c-img").encoder.layer) == 4
    assert TextFeatures(str(tmp_path / "ViT-g-14"), torch.float32, CPU).width == 1024


def test_the_encoder_gives_what_the_whole_unet_computes_on_its_way(backbone):
    unet, seen = backbone.pipe.unet, []
    for block in (*unet.down_blocks, unet.mid_block):
        block.register_forward_hook(
            lambda block, _, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
    cond = cond_of(backbone, len(T))
    UNet(unet)(draw(1), T, cond)
    expected, seen[:] = list(seen), []
    found = encode(unet, draw(1), T, cond)
    assert len(found) == len(expected) == len(unet.down_blocks) + 1
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_teacher_as_f_reads_latents_draws_by_its_own_generator_and_lets_gradients_through(
    backbone, teacher
):
    def null(n):
        return cond_of(backbone, n)

    torch.manual_seed(0)
    z, encoders = (
        draw(2, 5).requires_grad_(),
        [TeacherEncoder(teacher, null, seed, CPU) for seed in (0, 0, 1)],
    )
    before = torch.get_rng_state()
    maps = [encoder(z) for encoder in encoders]
    assert torch.equal(torch.get_rng_state(), before)
    assert [x.shape[2] for x in maps[0]] == encoders[0].channels and {len(x) for x in maps[0]} == {
        5
    }
    assert all(torch.equal(a, b) for a, b in zip(maps[0], maps[1], strict=True))
    assert not torch.equal(maps[0][0], maps[2][0]) and not torch.equal(
        maps[0][0], encoders[0](z)[0]
    )
    sum(x.square().sum() for x in maps[0]).backward()
    assert (z.grad.flatten(1).norm(dim=1) > 0).all()
    assert not list(encoders[0].parameters()) and all(p.grad is None for p in teacher.parameters())
