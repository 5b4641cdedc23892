"""What the toy's settings and networks are handed to: every part may be right, and the wrong one be
trained or scored."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from rival_runs import weights
from torch.nn import functional
from toy_runs import make_teacher, noise_data, stage_at

from add import ADDConfig
from toy import compare, evaluate, features, loop, metrics, samplers, teacher, testbed
from toy import distil as distillation
from toy.data import Batches
from toy.features import TeacherEncoder
from toy.methods import METHODS, settings_of
from toy.networks import UNet
from toy.settings import PRESETS, Settings

CPU = torch.device("cpu")
SMALL = dict(
    distil_batch=4, distil_steps=3, distil_head_width=8, distil_student_lr=1e-3, precision="fp32"
)


# Training =========================================================================================


def test_what_is_set_for_add_is_what_add_trains_with():
    settings = Settings(
        distil_lambda=3.0,
        distil_gamma=0.5,
        distil_weight="sds",
        distil_guidance=2.5,
        distil_teacher_steps=2,
        distil_timesteps=(99, 999),
        distil_head_width=8,
        distil_head_kernel=5,
        distil_c_map=7,
        distil_augment=(),
    )
    original = make_teacher()
    student = distillation.make_student(original, settings)
    features = TeacherEncoder(original, 0)
    add = distillation.build_add(student, original, features, 3, settings, CPU)
    assert add.config == ADDConfig(3.0, 0.5, "sds", guidance=2.5, teacher_steps=2)
    assert add.student.timesteps == (99, 999)
    assert add.discriminator.features is features
    head = add.discriminator.heads[0]
    assert head.residual[0].kernel_size == (5,) and head.first[0].out_channels == 8
    assert {k: tuple(v.shape) for k, v in head.maps.items()} == {
        "c_text": (7, 3),
        "c_img": (7, features.width),
    }


def test_the_conditions_of_the_heads_have_their_loudness():
    features = SimpleNamespace(summary=lambda images: images.flatten(1) * 9, width=64)
    images, labels = torch.randn(6, 1, 8, 8), torch.arange(6) % 3
    batch = distillation.make_batch(images, labels, features, 3, Settings())
    assert batch.c_text.square().mean().item() == pytest.approx(1)
    assert batch.c_text.argmax(1).equal(labels)
    assert batch.c_img.square().mean().item() == pytest.approx(1 / 8)
    assert functional.cosine_similarity(batch.c_img, images.flatten(1)).min() > 0.999
    assert batch.cond is labels and batch.null_cond.tolist() == [3] * 6


def test_add_has_adam_with_beta_1_of_zero_and_its_own_rates_which_decay(tmp_path):
    stage = stage_at(tmp_path, data=noise_data(), distil_heads_lr=2e-3, **SMALL)
    training = distillation.Distillation(stage, make_teacher(), None)
    optimizers = training.student_optimizer, training.heads_optimizer
    assert [o.param_groups[0]["initial_lr"] for o in optimizers] == [1e-3, 2e-3]
    assert all(o.param_groups[0]["betas"] == (0.0, 0.99) for o in optimizers)
    training.step(0)
    assert training.student_lr.last_epoch == training.heads_lr.last_epoch == 1


def test_the_distilled_student_and_the_teacher_have_their_averages_weights(tmp_path, monkeypatch):
    kept, make_ema = [], distillation.make_ema

    def watched(network, batch, half_life):
        kept.append(make_ema(network, batch, half_life))
        return kept[-1]

    monkeypatch.setattr(distillation, "make_ema", watched)
    monkeypatch.setattr(teacher, "make_ema", watched)
    data, widths = noise_data(), (8, 16)
    stage = stage_at(tmp_path / "d", data=data, **SMALL)
    student, _ = distillation.distil(stage, make_teacher(), None)
    stage = stage_at(
        tmp_path / "t", data=data, teacher_steps=3, teacher_widths=widths, precision="fp32"
    )
    trained, _ = teacher.make_teacher(stage)
    for network, average in zip((student.denoiser.network, trained.network), kept, strict=True):
        assert weights(network).equal(weights(average.module))
    assert not trained.training and not student.training
    # The average is not what was trained: it is what a checkpoint keeps beside it.
    for folder in ("d", "t"):
        state = torch.load(tmp_path / folder / "checkpoint.pt", weights_only=True)
        raw = state["student" if folder == "d" else "network"]
        average = {k.removeprefix("module."): v for k, v in state["ema"].items()}
        assert any(not raw[k].equal(average[k]) for k in raw)


def test_the_teacher_is_trained_on_standardized_images_of_which_it_drops_some_labels(
    tmp_path, monkeypatch
):
    forward, seen = UNet.forward, []

    def watched(network, x_t, t, labels, *rest):
        seen.append((x_t, labels))
        return forward(network, x_t, t, labels, *rest)

    monkeypatch.setattr(UNet, "forward", watched)
    optimizers, make_adam, batches, flips = [], teacher.make_adam, teacher.Batches, []

    def adam(*arguments):
        optimizers.append((arguments, make_adam(*arguments)))
        return optimizers[-1][1]

    def mirrored(*arguments):
        flips.append(arguments[-1])
        return batches(*arguments)

    monkeypatch.setattr(teacher, "make_adam", adam)
    monkeypatch.setattr(teacher, "Batches", mirrored)
    data = noise_data(96)
    data.train_images[:] = data.train_images // 8  # dark: a mean of -0.88
    own = dict(teacher_steps=8, teacher_batch=48, teacher_widths=(8, 16), precision="fp32")
    own |= dict(teacher_label_dropout=0.25, teacher_lr=0.002)
    for flip in ("true", "false"):
        stage = stage_at(tmp_path / flip, data=data, flip=flip, **own)
        trained, _ = teacher.make_teacher(stage)
    assert flips == [True, False]
    x_t, labels = (torch.cat(x) for x in zip(*seen, strict=True))
    assert x_t.mean().abs() < 0.05 and 0.85 < x_t.std() < 1.15
    assert 0.18 < (labels == 3).float().mean() < 0.32 and labels.max() == 3
    (_, lr, beta1, steps), (optimizer, schedule) = optimizers[0]
    assert (lr, beta1, steps) == (0.002, 0.9, 8) and schedule.last_epoch == 8
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.99)
    white = trained.encode(torch.ones(1, 1, 8, 8))
    assert trained.clip(2 * white.abs()).equal(white)


# Scores ===========================================================================================


def test_precision_is_of_the_generated_images_and_recall_of_the_real_ones(monkeypatch):
    draws = torch.Generator().manual_seed(0)
    real = torch.randn(400, 2, generator=draws)
    middle = torch.randn(400, 2, generator=draws) * 0.1  # all among the real ones, in one place
    monkeypatch.setattr(metrics, "embed", lambda *_: (middle, torch.arange(400) % 2))
    images, labels = torch.zeros(400, 1, 1, 1), torch.zeros(400, dtype=torch.long)
    figures = metrics.measure(None, images, labels, real, CPU)
    assert figures["precision"] > 0.9 and figures["recall"] < 0.1
    assert figures["accuracy"] == 0.5


def test_the_metric_network_is_trained_and_then_fixed(tmp_path):
    data = noise_data(64)
    data.train_images[:] = (data.train_labels * 100)[:, None, None, None].byte()
    own = dict(metric_steps=60, metric_width=4, metric_augment=(), precision="fp32")
    network, _ = metrics.train_metric_net(stage_at(tmp_path, data=data, **own))
    assert not any(m.training for m in network.modules())
    assert not any(p.requires_grad for p in network.parameters())
    images = evaluate.to_float(data.train_images)
    features, predicted = metrics.embed(network, images, CPU)
    assert (predicted == data.train_labels).float().mean() > 0.9
    # What an image scores does not hang on the others of its batch.
    assert torch.allclose(metrics.embed(network, images[:3], CPU)[0], features[:3], atol=1e-5)


def test_a_teachers_row_has_its_guidance_its_sampler_and_the_empty_class(monkeypatch):
    calls = []

    def sampler(denoiser, x_t, timesteps, cond, guidance, null):
        calls.append((len(timesteps), guidance, cond.tolist(), null.tolist()))
        return x_t

    original = make_teacher()
    noise, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 2])
    images = samplers.sample_teacher(original, noise, labels, 5, 2.5, sampler)
    assert calls == [(5, 2.5, [0, 2], [3, 3])]
    assert images.equal(original.decode(noise))

    scorer = object.__new__(evaluate.Scorer)
    scorer.noise, scorer.labels, scorer.device = noise, labels, CPU
    scorer._measure = lambda images, labels: {"fd": 1.0}
    drawn = []
    monkeypatch.setattr(evaluate, "sample_teacher", lambda *a: drawn.append(a) or noise)
    row = scorer.teacher(original, 8, 3, "fast", sampler)
    assert drawn[0][3:] == (8, 3, sampler) and drawn[0][0] is original
    assert (row["evaluations"], row["guidance"], row["name"]) == (16, 3, "fast")


class Named:
    """A Scorer that says what it was asked to score."""

    def __init__(self, *_):
        self.accuracy = 1.0

    def guided(self, teacher):
        return [self.teacher(teacher, 50, g) for g in (1, 2, 3)], 50, 2

    def teacher(self, teacher, steps, guidance, name="teacher", sampler=None):
        return {"of": teacher, "steps": steps, "guidance": guidance, "sampler": sampler}

    def student(self, student, steps, name="ADD student"):
        return {"of": student, "steps": steps, "name": name}

    def floor(self):
        return 0.0

    real = floor


def test_the_report_scores_each_network_under_its_own_name(monkeypatch):
    monkeypatch.setattr(evaluate, "Scorer", Named)
    started, student = (SimpleNamespace(timesteps=(249, 499, 749, 999)) for _ in range(2))
    settings = Settings(eval_steps=(1, 4, 50))
    found = evaluate.evaluate(noise_data(), settings, None, "teacher", started, student, CPU)
    assert [r["of"] is started for r in found["started"]] == [True] * 3
    assert [r["of"] is student for r in found["student"]] == [True] * 3
    assert [(r["steps"], r["guidance"]) for r in found["teacher"]] == [
        (1, 2),
        (4, 2),
        (50, 1),
        (50, 2),
        (50, 3),
    ]
    assert (found["solver"]["guidance"], found["solver"]["sampler"]) == (2, samplers.dpm_solver)


# Tables 1 and 2 ===================================================================================


def bed_of(folder, settings):
    """A Testbed without its data set."""
    bed = object.__new__(testbed.Testbed)
    bed.settings, bed.device, bed.folder = settings, CPU, folder
    bed.data = SimpleNamespace(fingerprint="f", classes=("a", "b", "c"))
    return bed


def test_a_rows_training_has_the_rows_settings_networks_and_features(tmp_path, monkeypatch):
    base = Settings(precision="fp32")
    row = Settings(precision="fp32", distil_lambda=0.0, features="classifier", distil_widths=(8, 8))
    bed, asked = bed_of(tmp_path, base), []
    monkeypatch.setattr(bed, "teacher", lambda settings: asked.append(settings) or len(asked))
    monkeypatch.setattr(testbed, "make_features", lambda stage: (stage, None))
    stage, first, features, second = bed.ingredients(row)
    assert stage.settings == row and features.settings == row
    assert asked == [row, row.for_second_teacher] and (first, second) == (1, 2)
    assert bed.ingredients(base)[3] is None


def test_the_distance_of_a_table_is_over_the_teachers_at_its_best_guidance(tmp_path, monkeypatch):
    bed = bed_of(tmp_path, Settings(eval_steps=(1, 50)))
    monkeypatch.setattr(bed, "teacher", lambda settings: "teacher")
    bed.__dict__["scorer"] = Named()  # in the place of the cached property
    assert bed.teacher_row()["guidance"] == 2


def test_a_cells_average_is_as_much_shorter_as_its_training():
    parser = testbed.make_parser("x", "", "0")
    whole = testbed.base_settings(parser.parse_args(["--budget", "2400"]), 0, CPU)
    third = testbed.base_settings(parser.parse_args([]), 0, CPU)
    assert whole.distil_steps == 3 * third.distil_steps == 2400
    assert whole.distil_ema == 3 * third.distil_ema == 12_000


def test_a_cell_has_its_programs_changes_unless_the_preset_names_the_setting():
    parser = testbed.make_parser("x", "", "0")
    assert parser.parse_args([]).changes == testbed.CELL
    cell = testbed.base_settings(parser.parse_args([]), 0, CPU)
    assert (cell.features, cell.distil_steps, cell.distil_ema) == ("teacher", 800, 4000)
    colour = testbed.base_settings(parser.parse_args(["--preset", "cifar-cpu"]), 0, CPU)
    usual = PRESETS["cifar-cpu"]
    assert (colour.features, colour.distil_steps) == ("classifier", usual["distil_steps"])
    parser = testbed.make_parser("x", "", "0", changes={})
    plain = testbed.base_settings(parser.parse_args([]), 0, CPU)
    assert (plain.features, plain.distil_steps) == (Settings.features, Settings.distil_steps)


def test_the_method_for_stylegan_t_is_adversarial_alone_from_a_random_start_in_one_step():
    base = Settings()
    settings = settings_of(METHODS["adversarial"], 0.01, base)
    assert (settings.distil_lambda, settings.distil_init) == (0, "random")
    assert (settings.distil_timesteps, settings.distil_c_img) == ((999,), False)
    for name in ("adversarial", "add", "add-encoder"):
        settings = settings_of(METHODS[name], 0.01, base)
        assert settings.distil_student_lr == 0.01
        assert settings.distil_heads_lr == base.distil_heads_lr
    assert settings_of(METHODS["dmd2"], 0.01, base) == base


def test_add_in_table_2_has_the_default_f_and_its_other_row_the_teachers_encoder():
    base = Settings(**testbed.CELL)
    add = settings_of(METHODS["add"], 0.01, base)
    assert add == dataclasses.replace(base, features=Settings.features, distil_student_lr=0.01)
    encoder = settings_of(METHODS["add-encoder"], 0.01, base)
    assert encoder == dataclasses.replace(base, distil_student_lr=0.01)
    assert encoder.features == "teacher"


def test_a_rival_is_trained_under_the_teachers_guidance(tmp_path, monkeypatch):
    asked = []

    def train(rival, stage, teacher, lr, guidance, step_of_add):
        asked.append((rival, teacher, lr, guidance))
        return SimpleNamespace(sample=None), 1.0, 5

    bed = bed_of(tmp_path, Settings(precision="fp32"))
    monkeypatch.setattr(compare, "train_rival", train)
    monkeypatch.setattr(bed, "teacher", lambda settings: "teacher")
    bed.__dict__["scorer"] = SimpleNamespace(sampled=lambda sample, k, title: k)
    method = METHODS["consistency"]
    rows, seconds, more = compare.train_and_score_rival(bed, method, 0.01, 2.5)
    assert asked == [(method.rival, "teacher", 0.01, 2.5)]
    assert (rows, seconds, more) == ([*method.steps], 1.0, {"steps": 5})


def test_metric_network_and_f_see_mirrored_images_where_the_teacher_does(tmp_path, monkeypatch):
    flips = []

    def batches(*arguments):
        flips.append(arguments[-1])
        return Batches(*arguments)

    monkeypatch.setattr(loop, "Batches", batches)
    for flip in ("true", "false"):
        own = dict(flip=flip, features="classifier", features_steps=1, metric_steps=1)
        stage = stage_at(tmp_path / flip, data=noise_data(96), **own)
        metrics.train_metric_net(dataclasses.replace(stage, folder=stage.folder / "metric"))
        features.make_features(dataclasses.replace(stage, folder=stage.folder / "features"))
    assert flips == [True, True, False, False]
