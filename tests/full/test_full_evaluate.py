"""full/evaluate.py on tiny checkpoints and a COCO of six images: what is drawn and measured."""

import json
import random
import shutil

import numpy as np
import open_clip
import pytest
import torch
from diffusers import AutoPipelineForText2Image, DPMSolverMultistepScheduler
from full_coco import (
    REAL_LOAD_FID,
    N,
    pictures,
    pixels,
    run,
    write_captions,
)
from PIL import Image
from torch import nn

from full.study import evaluate, metrics

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation"),
    pytest.mark.usefixtures("tiny_features"),
]


# Captions -----------------------------------------------------------------------------------------


def test_captions_are_those_of_the_lowest_id_in_the_order_of_the_images_ids(world, tmp_path):
    samples, digest = metrics.read_coco(world / "coco", N, 30)
    assert [s.caption for s in samples] == [f"colours of {i}" for i in (3, 7, 9, 15, 21)]
    assert [s.file.name for s in samples] == [f"{i:012d}.jpg" for i in (3, 7, 9, 15, 21)]
    assert [s.name for s in samples][0] == "000000000003.png" and [s.seed for s in samples] == [
        30,
        31,
        32,
        33,
        34,
    ]

    folder = shutil.copytree(world / "coco", tmp_path / "coco")
    content = json.loads((folder / metrics.CAPTIONS).read_text())
    for part in content.values():
        random.Random(0).shuffle(part)
    (folder / metrics.CAPTIONS).write_text(json.dumps(content))
    again = metrics.read_coco(folder, 3, 30)
    assert [s.caption for s in again[0]] == [s.caption for s in samples[:3]] and again[1] == digest


def test_images_without_a_caption_or_a_file_are_not_counted(world, tmp_path):
    folder = shutil.copytree(world / "coco", tmp_path / "coco")
    content = json.loads((folder / metrics.CAPTIONS).read_text())
    write_captions(
        folder, content["images"], [a for a in content["annotations"] if a["image_id"] != 7]
    )
    (folder / "val2017" / f"{15:012d}.jpg").unlink()
    samples, _ = metrics.read_coco(folder, 4, 0)
    assert [s.caption for s in samples] == [f"colours of {i}" for i in (3, 9, 21, 400)]
    with pytest.raises(ValueError, match="--images 5: .* has 4 with captions"):
        metrics.read_coco(folder, 5, 0)


# Metrics ------------------------------------------------------------------------------------------


def cropped(path, size=64):
    """80×72 → size/72 of it, the middle cut out."""
    image = Image.open(path).resize((round(80 * size / 72), size), Image.Resampling.LANCZOS)
    left = (image.width - size) // 2
    return image.crop((left, 0, left + size, size))


def frechet(x, y):
    """‖μ_x − μ_y‖² + tr A + tr B − 2 tr (AB)^½ in two dimensions, where tr M^½ = √(tr M + 2 √det
    M)."""
    a, b = np.cov(x.T), np.cov(y.T)
    root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(max(0, np.linalg.det(a @ b))))
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * root


def features(arrays):
    return np.array([a.astype(float).mean((0, 1))[:2] for a in arrays])


def test_fid_is_the_closed_form_against_centre_cropped_coco(world, done):
    out, result = done
    real = features(
        [
            np.asarray(cropped(world / "coco" / "val2017" / f"{i:012d}.jpg"))
            for i in (3, 7, 9, 15, 21)
        ]
    )
    for row in result["rows"]:
        drawn = features([pixels(p) for p in sorted((out / row["folder"]).glob("*.png"))])
        assert row["fid"] == pytest.approx(frechet(real, drawn), rel=1e-5) and row["fid"] > 1


def test_fid_of_a_set_against_itself_is_0_and_made_lighter_the_shift_squared(world, tmp_path):
    samples, _ = metrics.read_coco(world / "coco", N, 0)
    images = {s.name: np.minimum(np.asarray(cropped(s.file)), 245) for s in samples}

    def measure(shift):
        for name, image in images.items():
            Image.fromarray(image + np.uint8(shift)).save(tmp_path / name)
        return metrics.measure(
            fid, lambda images, captions: torch.zeros(len(images)), tmp_path, samples, 2
        )["fid"]

    fid = evaluate.load_fid("")
    fid.update(torch.tensor(np.stack(list(images.values()))).permute(0, 3, 1, 2), real=True)
    assert measure(0) == pytest.approx(0, abs=1e-6)
    assert measure(10) == pytest.approx(
        10**2 + 10**2, rel=1e-5
    )  # red and green; the covariances are equal


def test_clip_score_is_100_times_the_mean_cosine(world, done):
    out, result = done
    network = open_clip.create_model(f"local-dir:{world / 'clip'}").eval().requires_grad_(False)
    mean, std = np.array(open_clip.OPENAI_DATASET_MEAN), np.array(open_clip.OPENAI_DATASET_STD)
    for row in result["rows"][:1] + result["rows"][-1:]:
        cosines = []
        for path, i in zip(
            sorted((out / row["folder"]).glob("*.png")), (3, 7, 9, 15, 21), strict=True
        ):
            image = (
                np.asarray(
                    Image.open(path).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)
                )
                / 255
            )
            x = network.encode_image(
                torch.tensor((image - mean) / std).permute(2, 0, 1)[None].float()
            )
            y = network.encode_text(open_clip.get_tokenizer("ViT-g-14")([f"colours of {i}"]))
            cosines.append(float((x @ y.T) / (x.norm() * y.norm())))
        assert (
            row["clip"] == pytest.approx(100 * np.mean(cosines), abs=1e-3)
            and abs(row["clip"]) > 0.1
        )


def test_the_real_inception_reads_weights_from_a_file(world, tmp_path, monkeypatch):
    """Random weights, two images against two: the distance of the network's own features by another
    formula."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    with monkeypatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: None)
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = module.FeatureExtractorInceptionV3("random", ["2048"])
    torch.manual_seed(0)
    for p in network.parameters():
        if p.ndim == 4:
            nn.init.kaiming_normal_(p, nonlinearity="relu")
    torch.save(network.state_dict(), tmp_path / "inception.pth")

    samples, _ = metrics.read_coco(world / "coco", 2, 0)
    for s in samples:
        Image.fromarray(pixels(s.file).clip(0, 100).astype(np.uint8)).resize((64, 64)).save(
            tmp_path / s.name
        )
    fid = REAL_LOAD_FID(str(tmp_path / "inception.pth"))
    metrics.add_real(fid, samples, 64, 2)
    no_clip = lambda images, captions: torch.zeros(2)  # noqa: E731
    found = metrics.measure(fid, no_clip, tmp_path, samples, 2)["fid"]

    def stack(images):
        return torch.stack([torch.tensor(np.asarray(i)).permute(2, 0, 1) for i in images])

    x = network(stack([cropped(s.file) for s in samples]))[0].double()
    y = network(stack([Image.open(tmp_path / s.name) for s in samples]))[0].double()
    a, b = (z - z.mean(0) for z in (x, y))
    root = torch.linalg.matrix_norm(
        a @ b.T, "nuc"
    )  # tr (AB)^½, for the covariances are A = aᵀa and B = bᵀb
    expected = (
        (x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum() - 2 * root
    )
    assert found == pytest.approx(float(expected), rel=1e-3) and expected > 0.01


# Drawing ------------------------------------------------------------------------------------------


def test_the_teacher_draws_with_dpm_solver_and_guidance_the_student_without(world, done):
    out, _ = done
    captions = [f"colours of {i}" for i in (3, 7, 9, 15, 21)]
    teacher = AutoPipelineForText2Image.from_pretrained(world / "sd15", dtype=torch.float32)
    teacher.scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        algorithm_type="dpmsolver++",
        solver_order=2,
        timestep_spacing="linspace",
    )
    student = AutoPipelineForText2Image.from_pretrained(world / "student", dtype=torch.float32)
    calls = {
        "teacher-3": (teacher, {"num_inference_steps": 3, "guidance_scale": 7.5}),
        "teacher-2": (teacher, {"num_inference_steps": 2, "guidance_scale": 7.5}),
        "student-1": (student, {"num_inference_steps": 1, "guidance_scale": 0.0}),
        "student-4": (student, {"num_inference_steps": 4, "guidance_scale": 0.0}),
    }
    for row, (pipe, call) in calls.items():
        pipe.set_progress_bar_config(disable=True)
        for seed, (caption, path) in enumerate(
            zip(captions, sorted((out / row).glob("*.png")), strict=True)
        ):
            image = np.asarray(
                pipe(caption, generator=torch.Generator().manual_seed(seed), **call).images[0]
            )
            assert image.std() > 5 and abs(image - pixels(path)).max() <= 1


def test_each_row_evaluates_the_unet_at_its_steps_and_only_the_teacher_twice(
    world, tmp_path, unet_calls
):
    result = run(world, tmp_path, images=4, teacher_guidance=3)
    teacher = {3: [999, 666, 333], 2: [999, 500]}
    student = {1: [999], 2: [999, 499], 4: [999, 749, 499, 249]}
    expected = []
    for doubled, rows in ((2, teacher), (1, student)):
        for timesteps in rows.values():  # four images in batches of three, a warm-up, one timed
            expected += [(t, n * doubled) for n in (3, 1, 1, 1) for t in timesteps]
    assert unet_calls == expected
    found = [(r["model"], r["steps"], r["guidance"], r["evaluations"]) for r in result["rows"]]
    assert found == [
        ("teacher", 3, 3, 6),
        ("teacher", 2, 3, 4),
        *(("student", k, 0, k) for k in (1, 2, 4)),
    ]


def test_guidance_1_is_none_and_counts_once(world, tmp_path, unet_calls):
    result = run(
        world, tmp_path, images=2, teacher_guidance=1, teacher_steps="2", student_steps="1"
    )
    assert result["rows"][0]["evaluations"] == 2 and {n for _, n in unet_calls} == {1, 2}
    assert "| teacher, DPM-Solver++ | 2 | none | 2 |" in (tmp_path / "evaluation.md").read_text()


def test_the_batch_changes_no_image(world, done, tmp_path):
    run(world, tmp_path, batch=1, teacher_steps="2", student_steps="2")
    one, three = pictures(tmp_path), pictures(done[0])
    assert len(one) == 2 * N
    for name, image in one.items():
        assert abs(image - three[name]).max() <= 1, name
    assert len({image.tobytes() for image in one.values()}) == 2 * N


def test_a_student_of_uneven_timesteps_is_drawn_at_them(world, tmp_path, unet_calls):
    run(
        world,
        tmp_path,
        pipeline=world / "uneven",
        teacher=None,
        student_steps="2",
        images=2,
        batch=2,
    )
    assert unet_calls == [(t, n) for n in (2, 1, 1) for t in (999, 799)]


def test_sdxl_teaches_and_the_resolution_is_asked_for(world, tmp_path):
    result = run(
        world,
        tmp_path,
        teacher=world / "sdxl",
        resolution=32,
        images=2,
        teacher_steps="2",
        student_steps="1",
    )
    assert result["resolution"] == 32
    assert all(
        image.shape == (32, 32, 3) and image.std() > 5 for image in pictures(tmp_path).values()
    )


def test_a_safety_checker_blackens_nothing(world, tmp_path):
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    small = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = CLIPConfig(
        vision_config=small | {"image_size": 32, "patch_size": 16},
        text_config=small,
        projection_dim=8,
    )
    checker = StableDiffusionSafetyChecker(config)
    nn.init.constant_(checker.concept_embeds_weights, -1.0)  # everything is above this similarity
    pipe = AutoPipelineForText2Image.from_pretrained(world / "sd15", dtype=torch.float32)
    size = {"shortest_edge": 32}
    pipe.register_modules(
        safety_checker=checker, feature_extractor=CLIPImageProcessor(size=size, crop_size=32)
    )
    assert np.asarray(pipe("a", num_inference_steps=1).images[0]).max() == 0
    pipe.save_pretrained(tmp_path / "careful")
    run(
        world,
        tmp_path / "out",
        teacher=tmp_path / "careful",
        images=2,
        teacher_steps="2",
        student_steps="1",
    )
    assert all(image.std() > 5 for image in pictures(tmp_path / "out").values())
