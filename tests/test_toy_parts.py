"""The toy's parts against known values: metrics, the training loop, the settings, the samplers."""

import csv
import dataclasses
import math
import signal

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies
from torch import nn

from add import ADD, Denoiser, Discriminator, DiscriminatorHeads, NoiseSchedule, Student, ddim
from common.checkpoints import read
from common.flags import from_dict
from common.images import resize
from toy import features as toy_features
from toy.data import Batches, Dataset
from toy.distil import distil, make_student
from toy.loop import CLOCKED, GeneratorState, TrainingError, make_ema, read_log, run_loop, warm_up_then_decay
from toy.metrics import coverage_of, frechet_distance, within_class_variance
from toy.networks import MetricNet, ResidualBlock, UNet, ViT, has_bf16
from toy.report import goals
from toy.samplers import dpm_solver, sample_student, sample_teacher, trailing_timesteps
from toy.settings import PRESETS, STAGES, Settings, stage_key
from toy.teacher import Standardize, cosine_schedule, make_denoiser, training_target

# Metrics -------------------------------------------------------------------------------------------------------------


def test_frechet_distance_of_two_gaussians_by_hand():
    """μ apart by (3, 4): 25. Deviations 1 and 2 on one axis: (2 - 1)² = 1."""
    x = torch.randn(200_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T  # exactly white
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(x, x + torch.tensor([3.0, 4.0])) == pytest.approx(25)
    assert frechet_distance(x, x * torch.tensor([1.0, 2.0])) == pytest.approx(1)


def test_frechet_distance_is_symmetric_for_covariances_that_do_not_commute():
    g = torch.Generator().manual_seed(1)
    x, y = (torch.randn(500, 4, generator=g) @ torch.randn(4, 4, generator=g) for _ in range(2))
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-9) and frechet_distance(x, y) > 0.1


@settings(max_examples=30, deadline=None)
@given(strategies.integers(0, 10**6), strategies.floats(0.1, 10), strategies.floats(-5, 5))
def test_frechet_distance_is_0_of_a_set_to_itself_symmetric_and_the_shift_squared(seed, scale, shift):
    x = scale * torch.randn(60, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    y = x @ torch.diag(torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)) + 1
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6 * scale**2)
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-6) and frechet_distance(x, y) > 0
    assert frechet_distance(x, x + shift) == pytest.approx(3 * shift**2, rel=1e-6, abs=1e-6 * scale**2)


def test_coverage_is_the_share_inside_the_nearest_neighbour_balls():
    manifold = torch.arange(10.0)[:, None]  # with k = 5 the ball of 0 reaches 5, that of 5 reaches 3
    assert coverage_of(torch.tensor([[-4.0], [-6.0], [4.5], [14.5]]), manifold, k=5) == 0.5
    collapsed = torch.zeros(10, 1)
    assert coverage_of(manifold, collapsed, k=5) == pytest.approx(0.1)  # recall of a collapsed sampler
    assert coverage_of(collapsed, manifold, k=5) == 1  # while its precision is perfect


def test_within_class_variance_does_not_see_what_is_between_classes():
    x = torch.tensor([[0.0, 0], [2, 0], [100, 7], [100, 11]])
    assert within_class_variance(x, torch.tensor([0, 0, 1, 1])) == pytest.approx((2 + 8) / 2)
    assert within_class_variance(x[:2].repeat(2, 1) * 0, torch.tensor([0, 0, 1, 1])) == 0


def test_the_metric_network_is_another_architecture_than_f():
    kinds = lambda network: {type(m) for m in network.modules() if not list(m.children())}  # noqa: E731
    assert nn.LayerNorm in kinds(ViT()) and nn.LayerNorm not in kinds(MetricNet())
    assert nn.BatchNorm2d in kinds(MetricNet()) and nn.BatchNorm2d not in kinds(ViT())


# Loop ----------------------------------------------------------------------------------------------------------------


def rows_of(path):
    """A log without what a clock has a part in."""
    with open(path, newline="") as file:
        return [{k: v for k, v in row.items() if k not in CLOCKED} for row in csv.DictReader(file)]


class Counter:
    """A stage in miniature: a random walk whose position, generator and data order the checkpoint must carry."""

    def __init__(self, stop_at=None):
        self.generator = torch.Generator().manual_seed(0)
        self.network = nn.Linear(1, 1)
        nn.init.zeros_(self.network.weight)
        self.batches = Batches(torch.arange(10, dtype=torch.uint8).reshape(10, 1, 1, 1), torch.arange(10), 3, seed=0)
        self.stop_at = stop_at

    def step(self, i):
        if i == self.stop_at:
            signal.raise_signal(signal.SIGINT)  # Ctrl-C in the midst of a step: the step is still completed
        _, labels = next(self.batches)
        with torch.no_grad():
            self.network.weight += torch.rand(1, generator=self.generator) * labels.sum()
        return {"w": self.network.weight.detach().clone().squeeze()}

    def run(self, folder, steps=25, key="k"):
        parts = {"n": self.network, "g": GeneratorState(self.generator), "b": self.batches}
        run_loop(folder, "test", parts, self.step, steps, key, Settings(), log_every=4)
        return self.network.weight.item(), rows_of(folder / "log.csv")


@pytest.mark.parametrize("stop_at", [0, 3, 10, 24])
def test_a_loop_interrupted_at_any_step_ends_as_if_never_interrupted(tmp_path, stop_at):
    whole = Counter().run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        Counter(stop_at).run(tmp_path / "cut")
    assert read(tmp_path / "cut" / "checkpoint.pt")["step"] == stop_at + 1
    assert Counter().run(tmp_path / "cut") == whole


def test_a_checkpoint_of_other_settings_is_not_used(tmp_path):
    first = Counter().run(tmp_path, key="a")
    assert Counter().run(tmp_path, key="b") == first  # begun anew, not gone on from
    assert read(tmp_path / "checkpoint.pt")["key"] == "b"


def test_the_log_averages_over_its_window(tmp_path):
    values = iter([1.0, 3.0, 5.0])
    run_loop(tmp_path, "test", {}, lambda i: {"x": torch.tensor(next(values))}, 3, "k", Settings(), log_every=2)
    rows = rows_of(tmp_path / "log.csv")
    assert [(r["step"], r["x"], r["nonfinite"]) for r in rows] == [("2", "2.0", "0"), ("3", "5.0", "0")]


def test_a_log_is_cut_back_to_the_checkpoint_it_is_resumed_from(tmp_path):
    whole = Counter().run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        Counter(10).run(tmp_path / "cut")
    with open(tmp_path / "cut" / "log.csv", "a") as file:
        file.write("12,9.9,0,1,1\n16,9")  # rows that a crash left behind, the last one torn
    assert Counter().run(tmp_path / "cut") == whole
    (tmp_path / "cut" / "log.csv").unlink()  # gone: begun anew, and a report says so
    assert Counter().run(tmp_path / "cut")[1] == []
    with pytest.raises(TrainingError, match="log.csv is empty; remove"):
        read_log(tmp_path / "cut" / "log.csv")


def failing(*steps):
    """A step that is not finite at those numbers."""

    def step(i):
        if i in steps:
            raise FloatingPointError("teacher loss is nan")
        return {"loss": torch.tensor(float(i))}

    return step


def test_what_is_not_finite_stops_the_run_and_names_step_loss_and_checkpoint(tmp_path):
    with pytest.raises(TrainingError, match=r"test, step 6: teacher loss is nan; .*none was written yet; --skip-nonfinite N"):
        run_loop(tmp_path, "test", {}, failing(5), 9, "k", Settings())
    with pytest.raises(TrainingError, match=r"step 6: .*checkpoint.pt is of step 5"):
        run_loop(tmp_path, "test", {}, failing(5), 9, "k", Settings(checkpoint_seconds=0))
    assert read(tmp_path / "checkpoint.pt")["step"] == 5
    with pytest.raises(TrainingError, match="none was written yet"):  # that one is another run's
        run_loop(tmp_path, "test", {}, failing(5), 9, "another key", Settings())
    with pytest.raises(TrainingError, match=r"step 1: other is inf"):  # not a loss: seen when the step is done
        run_loop(tmp_path / "b", "test", {}, lambda i: {"x": torch.ones(()), "other": torch.tensor(float("inf"))}, 9, "k", Settings())


def test_skipped_steps_are_counted_and_their_values_nowhere(tmp_path):
    run_loop(tmp_path, "test", {}, failing(1, 2), 4, "k", Settings(skip_nonfinite=2), log_every=2)
    assert [(r["loss"], r["nonfinite"]) for r in rows_of(tmp_path / "log.csv")] == [("0.0", "1"), ("3.0", "2")]
    run_loop(tmp_path / "c", "test", {}, failing(0, 1), 4, "k", Settings(skip_nonfinite=2), log_every=2)  # a window of nothing
    assert [(r["step"], r["loss"], r["nonfinite"]) for r in rows_of(tmp_path / "c" / "log.csv")] == [("4", "2.5", "2")]
    with pytest.raises(TrainingError, match="step 4: "):
        run_loop(tmp_path / "b", "test", {}, failing(1, 2, 3), 4, "k", Settings(skip_nonfinite=2), log_every=2)


def test_a_checkpoint_of_another_architecture_is_named(tmp_path):
    run_loop(tmp_path, "test", {"n": nn.Linear(1, 1)}, lambda i: {"x": torch.zeros(())}, 1, "k", Settings())
    with pytest.raises(TrainingError, match="checkpoint.pt does not fit.*remove"):
        run_loop(tmp_path, "test", {"n": nn.Linear(2, 1)}, lambda i: {"x": torch.zeros(())}, 1, "k", Settings())


def test_learning_rate_rises_stays_and_falls():
    factors = [warm_up_then_decay(i, 1000) for i in (0, 24, 49, 500, 750, 999)]
    assert factors == pytest.approx([0.02, 0.5, 1, 1, 0.5, 0.02])


def test_an_average_forgets_half_in_its_half_life():
    network = nn.Linear(1, 1)
    nn.init.ones_(network.weight)
    ema = make_ema(network, batch=12, half_life=300)
    ema.update_parameters(network)  # the first is a copy
    nn.init.zeros_(network.weight)
    for _ in range(300 // 12):
        ema.update_parameters(network)
    assert ema.module.weight.item() == pytest.approx(0.5)


# Settings ------------------------------------------------------------------------------------------------------------


def key(stage, **changes):
    return stage_key(Settings(**changes), stage, "data")


@pytest.mark.parametrize(
    "change, stages_done_again",
    [
        (dict(teacher_lr=1.0), {"teacher", "distil", "eval"}),
        (dict(precision="bf16"), {"teacher", "distil", "eval"}),
        (dict(flip="true"), {"teacher", "distil", "eval"}),
        (dict(distil_timesteps=(9, 99)), {"distil", "eval"}),
        (dict(features_depth=2), {"features", "distil", "eval"}),
        (dict(metric_steps=2), {"metric", "eval"}),
        (dict(distil_gamma=1.0), {"distil", "eval"}),
        (dict(eval_images=99), {"eval"}),
        (dict(seed=9), {"data", "metric", "features", "teacher", "distil", "eval"}),
        (dict(data_dir="elsewhere"), set()),
    ],
)
def test_a_changed_setting_does_its_stage_and_the_later_ones_again(change, stages_done_again):
    assert {stage for stage in STAGES if key(stage) != key(stage, **change)} == stages_done_again


def test_other_data_does_everything_again():
    assert all(stage_key(Settings(), stage, "a") != stage_key(Settings(), stage, "b") for stage in STAGES)


def test_settings_survive_json_and_unknown_ones_are_refused():
    settings = Settings(**PRESETS["tiny"])
    as_json = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(settings).items()}
    assert from_dict(Settings, as_json) == settings
    with pytest.raises(ValueError, match="unknown setting teacher_stepz"):
        from_dict(Settings, {"teacher_stepz": 1})


# Networks and samplers -----------------------------------------------------------------------------------------------


def test_training_targets_are_what_the_denoiser_reads_back():
    schedule, x_0, noise = cosine_schedule(), torch.randn(4, 1, 2, 2), torch.randn(4, 1, 2, 2)
    t = torch.tensor([1, 200, 500, 900])
    for prediction in ("epsilon", "v", "x_0"):
        target = training_target(x_0, noise, *schedule.coefficients(t), prediction)
        denoiser = Denoiser(lambda *_, target=target: target, schedule, prediction)
        x_hat, eps_hat = denoiser.predict(schedule.diffuse(x_0, noise, t), t, None)
        torch.testing.assert_close(x_hat, x_0, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(eps_hat, noise, atol=1e-4, rtol=1e-4)


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
def test_unet_multiplies_in_bfloat16_if_asked_and_keeps_weights_and_results_in_float32(bf16, inside):
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


@pytest.mark.parametrize("can, has", [({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx512_f": True, "amx_bf16": False}, False)])
def test_a_cpu_has_bfloat16_if_it_says_so(can, has, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can, raising=False)
    assert has_bf16(torch.device("cpu")) is has and has_bf16(torch.device("mps")) is False
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # torch before 2.11
    assert has_bf16(torch.device("cpu")) is False


@pytest.mark.parametrize("precision, bf16", [("fp32", False), ("bf16", True)])
def test_teacher_and_student_compute_in_the_precision_of_the_settings(precision, bf16):
    settings = Settings(**PRESETS["tiny"] | {"precision": precision})
    assert make_denoiser(1, 3, settings, Standardize(0.0, 1.0)).network.bf16 is bf16


def test_patches_are_what_the_tokens_embed():
    torch.manual_seed(0)
    vit, images = ViT(2, 8, patch=4, width=32, depth=1), torch.randn(3, 2, 8, 8)
    vit.embed.weight.data.copy_(torch.eye(32).view(32, 2, 4, 4))  # each channel is a pixel of the patch
    vit.embed.bias.data.zero_()
    vit.position.data.zero_()
    torch.testing.assert_close(vit.states(images)[0][:, 1:], toy_features.patches_of(images, 4))


@pytest.mark.parametrize(
    "kind, losses, noisy", [("classifier", {"class"}, 0), ("denoiser", {"class", "rebuild", "patch"}, 30)]
)
def test_a_vit_learns_what_it_is_called_after(tmp_path, monkeypatch, kind, losses, noisy):
    """Every loss falls, on images that are noisy for a "denoiser" alone."""
    seen, noise = [], toy_features.add_noise
    monkeypatch.setattr(toy_features, "add_noise", lambda *a: seen.append(a) or noise(*a))
    labels = torch.arange(64) % 2
    images = (torch.tensor([20, 230])[labels].view(-1, 1, 1, 1) + torch.randint(20, (64, 1, 8, 8))).to(torch.uint8)
    data = Dataset("two greys", images, labels, images, labels, ("dark", "bright"))
    own = dict(features=kind, features_steps=30, features_width=16, features_depth=1)
    vit, _ = toy_features.train_vit(tmp_path, data, Settings(**own), torch.device("cpu"), "key")
    rows = rows_of(tmp_path / "log.csv")
    assert rows[0].keys() - {"step", "nonfinite"} == losses and len(seen) == noisy
    assert all(float(rows[-1][name]) < 0.95 * float(rows[0][name]) for name in losses)
    assert not vit.training and not any(p.requires_grad for p in vit.parameters())


def test_vit_gives_a_map_for_the_embedding_and_each_block_with_the_class_token_read_out():
    torch.manual_seed(0)
    vit, images = ViT(1, 8, patch=4, width=16, depth=2, heads=2), torch.randn(3, 1, 8, 8)
    maps, states = vit(images), vit.states(images)
    assert [m.shape for m in maps] == [(3, 4, 16)] * 3 and vit.channels == [16] * 3
    torch.testing.assert_close(maps[-1], states[-1][:, 1:] + states[-1][:, :1])
    torch.testing.assert_close(vit.summary(images), states[-1][:, 0])


def make_teacher(**more):
    """A teacher of three classes whose every part has a say."""
    own = {"teacher_widths": (8, 16), "precision": "fp32"} | {f"teacher_{k}": v for k, v in more.items()}
    torch.manual_seed(0)
    teacher = make_denoiser(1, 3, Settings(**own), Standardize(-0.5, 0.7))
    for p in teacher.parameters():
        nn.init.normal_(p, std=0.2)
    return teacher


def test_the_teachers_encoder_gives_its_maps_of_the_diffused_image_and_passes_gradient_but_has_none():
    encoder = toy_features.TeacherEncoder(make_teacher(dropout=0.5).train(), seed=7)
    discriminator = Discriminator(encoder, DiscriminatorHeads(encoder.channels, hidden=8)).train()
    assert not any(m.training for m in encoder.modules()) and not any(p.requires_grad for p in encoder.parameters())
    images, network, schedule = torch.rand(3, 1, 16, 16), encoder.teacher.network, encoder.teacher.schedule
    tokens, g, nobody = discriminator.features(images.requires_grad_()), torch.Generator().manual_seed(9), torch.full((3,), 3)
    assert [x.shape for x in tokens] == [(3, 16, 32), (3, 16, 16), (3, 16, 16)] and encoder.channels == [32, 16, 16]
    t, z = torch.randint(600, (3,), generator=g), (images + 0.5) / 0.7
    maps = network.encode(schedule.diffuse(z, torch.randn(z.shape, generator=g), t), t, nobody)
    folded = maps[0].reshape(3, 8, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(3, 16, 32)  # 2x2 positions are one token
    for x, expected in zip(tokens, [folded, *(m.flatten(2).mT for m in maps[1:])], strict=True):
        torch.testing.assert_close(x, expected)
        assert torch.autograd.grad(x.square().sum(), images, retain_graph=True)[0].abs().amax((1, 2, 3)).min() > 0
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
    assert drawn[0].unique().tolist() == list(range(600))  # 600 e^(-8000 / 600) = 0.001 would be missed


def test_the_student_starts_as_the_teacher_without_its_dropout():
    teacher = make_teacher(dropout=0.5).requires_grad_(False)
    student = make_student(teacher, Settings()).train()
    inputs = torch.randn(2, 1, 16, 16), torch.tensor([249, 999]), torch.tensor([0, 3])
    assert torch.equal(student(*inputs), teacher.eval()(*inputs))
    assert all(p.requires_grad for p in student.parameters())
    assert (teacher.train()(*inputs) - student(*inputs)).abs().max() > 1e-3  # the teacher has kept its own


def test_add_is_given_the_batches_as_they_come_mirrored_if_asked(tmp_path, monkeypatch):
    images, labels, seen, half = torch.rand(16, 1, 8, 8), torch.arange(16) % 3, [], ADD.student_half
    monkeypatch.setattr(ADD, "student_half", lambda self, batch, *rest: seen.append(batch) or half(self, batch, *rest))
    own = Settings(flip="true", distil_steps=3, distil_batch=6, distil_head_width=8, precision="fp32")
    data, teacher = Dataset("noise", images, labels, images, labels, ("a", "b", "c")), make_teacher()
    distil(tmp_path, data, own, teacher, toy_features.TeacherEncoder(teacher, 0), torch.device("cpu"), "key")
    for batch, (x_0, label) in zip(seen, Batches(images, labels, 6, own.seed + 4, flip=True), strict=False):
        assert torch.equal(batch.x_0, x_0) and torch.equal(batch.cond, label)
    assert len(seen) == 3


def test_goals_by_hand():
    """Held against the teacher's row at its most steps and its best guidance."""
    names = "steps guidance fd accuracy precision recall variance_pixels variance_features".split()
    teacher = [[4, 2, *[9] * 6], [50, 1, *[9] * 6], [50, 2, 4, 0.9, 0.9, 0.8, 2, 5]]
    student = [[k, 1, fd, 0.98, 0.88, 0.6, 1.6, 4.5] for k, fd in ((1, 2), (2, 3), (4, 3.6))]
    teacher, student = ([dict(zip(names, row, strict=True)) for row in rows] for rows in (teacher, student))
    rows = goals({"teacher": teacher, "best_guidance": 2, "student": student}, "long")
    assert [value for _, value, *_ in rows] == pytest.approx([0.5, 0.75, 0.9, 1.2, 0.98, 0.98, -0.02, 0.75, 0.8, 0.9])
    assert [met for *_, met in rows] == [True] + [False] * 8 + [True]


def test_standardize_gives_mean_0_and_deviation_1_and_inverts():
    images = torch.randn(50, 1, 4, 4) * 0.3 - 0.8
    standardize = Standardize.of(images)
    z = standardize(images)
    assert z.mean().item() == pytest.approx(0, abs=1e-5) and z.std().item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(standardize.inverse(z), images)
    outside = torch.tensor([-1.3, -1.0, 0.5, 1.2, math.inf, -math.inf])
    inside = torch.tensor([-1.0, -1.0, 0.5, 1.0, math.inf, -math.inf])
    torch.testing.assert_close(standardize.inverse(standardize.clip(standardize(outside))), inside)


def test_teacher_timesteps_trail():
    assert trailing_timesteps(1000, 4) == [999, 749, 499, 249] and trailing_timesteps(1000, 50)[-1] == 19


def test_dpm_solvers_third_step_as_the_paper_writes_it():
    """Lu et al. 2022, Alg. 2: D = (1 + 1/2r) x̂_0 - 1/2r x̂_0', x = σ'/σ x - α' (exp(-h) - 1) D, r = h'/h."""
    schedule = NoiseSchedule.scaled_linear().double()

    class Odd(nn.Module):
        def forward(self, x_t, t, cond):
            return (x_t * t[:, None, None, None] / 500).sin()

    denoiser, z = Denoiser(Odd(), schedule, "x_0"), torch.randn(1, 1, 2, 2, dtype=torch.float64)
    steps = [torch.tensor([t]) for t in (950, 600, 40)]
    alpha, sigma = schedule.alpha[[950, 600, 40]], schedule.sigma[[950, 600, 40]]
    h = (alpha / sigma).log().diff()
    x_0 = denoiser(z, steps[0], None)
    x = sigma[1] / sigma[0] * z - alpha[1] * (torch.exp(-h[0]) - 1) * x_0
    r, later = h[0] / h[1], denoiser(x, steps[1], None)
    d = (1 + 1 / (2 * r)) * later - 1 / (2 * r) * x_0
    x = sigma[2] / sigma[1] * x - alpha[2] * (torch.exp(-h[1]) - 1) * d
    torch.testing.assert_close(dpm_solver(denoiser, z, steps, None), denoiser(x, steps[2], None))


def test_dpm_solver_is_ddim_where_there_is_nothing_to_extrapolate_from():
    """One step, two, and the second of three after pure noise, where λ = -∞."""

    class Half(nn.Module):
        def forward(self, x_t, t, cond):
            return x_t * (1 - t / 1000)[:, None, None, None]

    z = torch.randn(2, 1, 2, 2)
    plain, zero = (Denoiser(Half(), s, "x_0") for s in (cosine_schedule(), cosine_schedule().zero_terminal_snr()))
    for denoiser, steps, same in ((plain, [700], True), (plain, [700, 90], True), (zero, [999, 500, 20], True), (zero, [998, 500, 20], False)):
        steps = [torch.full((2,), t) for t in steps]
        assert torch.allclose(dpm_solver(denoiser, z, steps, None), ddim(denoiser, z, steps, None), atol=1e-6) is same


def test_samplers_ask_for_each_class_and_repeat_under_a_seed():
    """An x_0-network that paints its label: the samplers must hand every image its own, in order."""

    class Painter(nn.Module):
        classes = 9

        def forward(self, x, t, label):
            return (label.float() / 10)[:, None, None, None].expand_as(x)

    denoiser = Denoiser(Painter(), NoiseSchedule.scaled_linear(), "x_0")
    labels, noise = torch.arange(600) % 9, torch.randn(600, 1, 2, 2)
    expected = (labels / 10)[:, None, None, None].expand_as(noise)
    torch.testing.assert_close(sample_teacher(denoiser, noise, labels, 3), expected)
    torch.testing.assert_close(sample_teacher(denoiser, noise, labels, 1, 2.0), 2 * expected - 0.9)
    torch.testing.assert_close(sample_student(Student(denoiser), noise, labels, 4, seed=0), expected)


# DINOv2 through torch.hub --------------------------------------------------------------------------------------------


class HubModel(nn.Module):
    """What torch.hub's dinov2_vits14 offers, with blocks that add 1, on 112 x 112 images normalised to mean 0."""

    def __init__(self):
        super().__init__()
        self.blocks, self.norm, self.seen = nn.ModuleList(nn.Identity() for _ in range(12)), nn.Identity(), None
        for block in self.blocks:
            block.forward = lambda x: x + 1

    def prepare_tokens_with_masks(self, x):
        self.seen = x
        return x.mean((1, 2, 3))[:, None, None] + torch.zeros(len(x), 65, 384)


def test_dinov2_reads_the_embedding_and_blocks_2_5_8_11(monkeypatch):
    monkeypatch.setattr(torch.hub, "load", lambda *_, **__: HubModel())
    network = toy_features.DinoV2()
    images = torch.zeros(2, 1, 32, 32)
    maps = network(images)
    assert network.network.seen.shape == (2, 3, 112, 112)
    torch.testing.assert_close(network.network.seen[0, :, 0, 0], torch.tensor([0.0655, 0.1964, 0.4178]), atol=1e-3, rtol=0)
    assert [m.shape for m in maps] == [(2, 64, 384)] * 5 and network.channels == [384] * 5
    steps = [(m - maps[0]).mean().item() for m in maps]  # the class token is added: each block counts twice
    assert steps == pytest.approx([0, 6, 12, 18, 24])
    assert network.summary(images).shape == (2, 384)


def test_dinov2_without_a_network_says_what_to_do(monkeypatch):
    def fail(*_, **__):
        raise OSError("no route to host\nmore")

    monkeypatch.setattr(torch.hub, "load", fail)
    with pytest.raises(ValueError, match=r"--features dinov2.*no route to host.*--features teacher") as error:
        toy_features.DinoV2()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size, antialias", [(7, True), (7, False), (40, True), (40, False)])
def test_resize_is_bicubic_interpolation_and_so_is_its_gradient(size, antialias):
    images = torch.rand(2, 3, 16, 20, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(2, 3, size, size, dtype=torch.float64)
    found, expected = resize(images, size, antialias), F.interpolate(images, (size, size), mode="bicubic", antialias=antialias)
    assert torch.allclose(found, expected, atol=1e-6)
    gradients = [torch.autograd.grad((x * weights).sum(), images)[0] for x in (found, expected)]
    assert torch.allclose(*gradients, atol=1e-6) and gradients[0].abs().max() > 0
