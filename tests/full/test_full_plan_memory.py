"""full/plan/: the memory of real iterations."""

import gc
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from full_plans import settings
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from full.backbones import UNet
from full.parts import make_accelerator
from full.plan import dry_run, plan
from full.plan.architectures import META
from full.plan.dry_run import DryRun, MetaMeter
from full.plan.labels import HEADS, STEP, STUDENT
from full.settings import Settings
from full.train import Trainer

# Memory -------------------------------------------------------------------------------------------


def test_the_meter_counts_bytes_while_they_live():
    meter, kept = MetaMeter(), torch.empty(100, device=META)
    meter.add(kept, "weights")
    with meter:
        with meter.inside("a"):
            x = torch.empty(1000, device=META)
            y = x[10:].view(-1)  # no bytes of its own
            x.add_(1)
            z = x.double()
            meter.add(z, "copies")
            del x
            assert meter.live == {"weights": 400, "activations": 4000, "copies": 8000}
            del y
        with meter.inside("b", "optimiser"):
            w = torch.empty(10, device=META)
    assert meter.peaks["a"].total() == 12400 and meter.live["copies"] == z.nbytes
    assert meter.peaks["b"] == {
        "weights": 400,
        "activations": 0,
        "copies": 8000,
        "optimiser": w.nbytes,
    }


def test_short_cuts_give_the_shapes_that_torch_gives():
    aten, new = torch.ops.aten, lambda *shape: torch.empty(shape, device=META)
    w, mask, tokens, maps = new(8), [True, True, False], (new(2, 3, 8),) * 2, (new(2, 8, 3, 3),) * 2
    calls = {
        aten.addmm.default: (new(5), new(3, 4), new(4, 5)),
        aten.native_layer_norm.default: (tokens[0], [8], w, w, 1e-5),
        aten.native_layer_norm_backward.default: (
            *tokens,
            [8],
            new(2, 3, 1),
            new(2, 3, 1),
            w,
            w,
            mask,
        ),
        aten.native_group_norm.default: (maps[0], w, w, 2, 8, 9, 4, 1e-5),
        aten.native_group_norm_backward.default: (*maps, new(2, 4), new(2, 4), w, 2, 8, 9, 4, mask),
    }
    assert calls.keys() == dry_run.SHAPES.keys()
    size = lambda x: x if x is None else (x.shape, x.untyped_storage().nbytes())  # noqa: E731
    for function, arguments in calls.items():
        outputs = dry_run.SHAPES[function](*arguments), function(*arguments)
        ours, theirs = (
            [size(x) for x in (out if isinstance(out, tuple) else (out,))] for out in outputs
        )
        assert ours == theirs, function


@pytest.mark.parametrize("variant", ["whole", "checkpointed", "frozen in part"])
def test_autocast_holds_what_torch_holds_on_cuda(bare, variant):
    """torch's own autocast, on tensors that claim to be on a GPU: forward's peak, what it leaves,
    its operations."""
    config = UNet2DConditionModel.load_config(bare / "sd15", subfolder="unet")

    def forward(device, wrap):
        with torch.device(device):
            network = UNet(UNet2DConditionModel.from_config(config))
            inputs = (
                torch.empty(2, 4, 32, 32),
                torch.zeros(2, dtype=torch.long),
                torch.empty(2, 77, 32),
            )
        if variant == "checkpointed":
            network.unet.enable_gradient_checkpointing()
        network.unet.down_blocks.requires_grad_(
            variant != "frozen in part"
        )  # whose casts are not kept
        meter = MetaMeter()
        wrap(network, meter)
        with meter, dry_run.fused_attention():
            out = network(*inputs[:2], {"encoder_hidden_states": inputs[2]}).float()
        return out.dtype, meter.peaks[HEADS].total(), meter.live.total(), meter.flops

    def ours(network, meter):
        last = network.unet.conv_out
        last.forward = lambda x: last._conv_forward(x.float(), last.weight, last.bias)
        dry_run.Autocast(network, lambda: meter)

    def torchs(network, meter):
        inner = network.forward

        def call(*args):
            torch.set_autocast_enabled("cuda", True)
            torch.set_autocast_dtype("cuda", torch.bfloat16)
            torch.autocast_increment_nesting()
            try:
                return inner(*args)
            finally:
                torch.clear_autocast_cache()
                torch.autocast_decrement_nesting()
                torch.set_autocast_enabled("cuda", False)

        network.forward = call

    expected = forward("meta", ours)
    with FakeTensorMode():
        assert forward("cuda", torchs) == expected
    assert expected[2] > 0


def measure_for_real(given, folder):
    """(bytes that live between iterations, the peak above them) of Trainer's second iteration: what
    Python holds, and what the profiler saw allocated, kernels' own buffers included."""

    def living():
        gc.collect()
        tensors = [
            x
            for x in gc.get_objects()
            if issubclass(type(x), torch.Tensor) and x.device.type == "cpu"
        ]
        return sum(
            {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}.values()
        )

    before = living()
    trainer = Trainer(given, make_accelerator(given, folder), folder)
    raw = {"image": torch.rand(given.batch, 3, 64, 64), "caption": ["a"] * given.batch}
    half = trainer.iteration([trainer.make_batch(raw) for _ in range(given.accumulate)])[1]
    between = living() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        half = trainer.iteration([trainer.make_batch(raw) for _ in range(given.accumulate)])[1]  # noqa: F841
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return between, between + peak


def predict(given, dry):
    """The plan's (bytes between iterations, peak) of the same, measured at this batch."""
    it = plan.Plan.__new__(plan.Plan)
    it.settings, it.gpus, it.batches, it.measured = given, 1, (1, 2), [dry.measure(given.batch)] * 2
    kinds = it.memory("one GPU", given.batch)[1]
    between = sum(kinds[k] for k in ("weights", "optimiser", "average", "frozen", "heads"))
    images = given.batch * 3 * 64 * 64 * 4
    return between + it.measured[0][2]["half"] + images, sum(kinds.values())


CASES = {
    "checkpointed, 4": {},
    "checkpointed, 8": {"batch": 8},
    "whole, 4": {"checkpointing": False},
    "whole, 8": {"checkpointing": False, "batch": 8},
    "latent, TAESD": {"space": "latent", "vae": "taesd"},
    "SDXL, LoRA, twice": {"backbone": "sdxl", "lora_rank": 2, "accumulate": 2},
}


@pytest.fixture(scope="module")
def compared(checkpoints, tmp_path_factory):
    """{case: (measured, predicted)}, each (bytes between iterations, peak)."""
    found, dry_runs = {}, {}
    gc.collect()
    gc.freeze()  # what is there already need not be searched
    for name, more in CASES.items():
        taesd = {"vae": str(checkpoints / "taesd")} if "vae" in more else {}
        given = settings(checkpoints, **({"batch": 4} | more | taesd))
        key = replace(given, batch=1)
        dry_runs[key] = dry_runs.get(key) or DryRun(
            given, whole_gradients=given.accumulate > 1, cuda=False
        )
        found[name] = (
            measure_for_real(given, tmp_path_factory.mktemp("run")),
            predict(given, dry_runs[key]),
        )
    gc.unfreeze()
    return found


@pytest.mark.parametrize("case", CASES)
def test_memory_is_that_of_a_real_iteration(compared, case):
    (between, peak), (predicted_between, predicted_peak) = compared[case]
    assert predicted_between == pytest.approx(between, rel=0.01)
    assert predicted_peak == pytest.approx(peak, rel=0.05)
    # Live tensors agree to 1 %; the rest are buffers within CPU kernels, half a megabyte here.
    assert predicted_peak - predicted_between == pytest.approx(peak - between, rel=0.15, abs=5e5)


@pytest.mark.parametrize("kind", ["checkpointed", "whole"])
def test_memory_of_a_further_image_is_that_of_a_real_iteration(compared, kind):
    few, many = compared[f"{kind}, 4"], compared[f"{kind}, 8"]
    (measured, predicted) = (many[i][1] - few[i][1] for i in (0, 1))
    assert predicted == pytest.approx(measured, rel=0.1)


def test_checkpointing_is_worth_as_much_as_in_a_real_iteration(compared):
    measured, predicted = (
        compared["whole, 8"][i][1] - compared["checkpointed, 8"][i][1] for i in (0, 1)
    )
    assert predicted == pytest.approx(measured, rel=0.1) and predicted > 1e7


@pytest.mark.parametrize("batch, precision", [(1, "fp32"), (7, "bf16")])
def test_other_batches_are_on_the_line(planned, batch, precision):
    """Measured at this batch: operations, and memory. The line was drawn through 2 and 4."""
    it = planned(precision=precision)
    flops, peaks, held = it.dry.measure(batch)
    assert it.operations(batch) == pytest.approx(dict(flops))
    assert it.total("DDP", batch) == pytest.approx(
        max(p.total() for p in peaks.values()) + held["half"], rel=0.02
    )


def test_the_batch_that_is_asked_for_is_measured(planned):
    _, peaks, held = planned().measured[0]
    for part, kinds in planned().peaks("DDP", 2).items():
        assert sum(kinds.values()) == pytest.approx(peaks[part].total() + held["half"])


@pytest.mark.parametrize("batch, measured", [(1, [1, 2]), (5, [5, 10]), (500, [8, 16])])
def test_batches_that_are_measured(monkeypatch, batch, measured):
    seen, network = [], nn.Linear(1, 1)
    add = SimpleNamespace(discriminator=SimpleNamespace(heads=network))
    stub = SimpleNamespace(measure=seen.append, network=network, trained=[], add=add)
    monkeypatch.setattr(plan, "DryRun", lambda *args, **kwargs: stub)
    plan.Plan(Settings(batch=batch))
    assert seen == measured


def test_real_networks_take_what_their_numbers_take(sd15):
    peaks, unet = sd15[2].peaks("DDP", 8), 859.52e6
    student = peaks[STUDENT]
    for kind, width in {"weights": 4, "gradients": 4, "average": 4, "optimiser": 8}.items():
        assert student[kind] == pytest.approx(width * unet, rel=1e-3)
    assert student["copies"] == pytest.approx(
        2 * unet, rel=0.01
    )  # autocast's casts, at the end of forward
    assert peaks[STEP]["optimiser"] == pytest.approx(12 * unet, rel=0.01)  # with AdamW's temporary
    frozen = 859.52 + 83.65 + 123.06 + 22.06 + 354.03 + 304.37
    assert student["frozen"] == pytest.approx(2e6 * frozen, rel=0.01)
    assert student["heads"] == pytest.approx(3 * 4 * sd15[2].heads, rel=0.02)


def test_one_gpu_has_no_gradients_before_the_students_backward(planned):
    one, two = planned(1).peaks("one GPU", 4), planned(8).peaks("DDP", 4)
    assert one["VAE decodes x_hat"].get("gradients", 0) == 0 < one[STEP]["gradients"]
    assert two["VAE decodes x_hat"]["gradients"] == one[STEP]["gradients"]  # DDP's buckets stay


def test_fsdp_divides_the_student_and_nothing_else(planned):
    it = planned(8)
    for part, kinds in it.peaks("FSDP2", 4).items():
        whole = it.peaks("DDP", 4)[part]
        for kind in ("weights", "gradients", "optimiser", "average"):
            assert kinds[kind] == pytest.approx(whole[kind] / 8)
        assert all(kinds[kind] == whole[kind] for kind in ("frozen", "heads", "activations"))
    units = [
        m
        for m in it.dry.network.modules()
        if type(m).__name__ in ("BasicTransformerBlock", "ResnetBlock2D")
    ]
    rest = plan.count(it.dry.network) - sum(map(plan.count, units))
    assert kinds["copies"] == 4 * 2 * (rest + 2 * max(map(plan.count, units))) and units


def test_fsdp_keeps_whole_gradients_between_micro_batches(planned):
    for precision in ("fp32", "bf16"):  # in float32: that is how they are averaged
        it = planned(8, precision, accumulate=4)
        assert it.peaks("FSDP2", 4)[STEP]["gradients"] == pytest.approx(it.parameters * (4 + 4 / 8))


def test_micro_batches_keep_what_they_hand_on(planned):
    one, four = planned(8), planned(8, accumulate=4)
    held = four.dry.measure(4)[2]
    assert held["half"] > held["inputs"] > 4 * 3 * 64 * 64 * 4
    assert four.total("DDP", 4) - one.total("DDP", 4) == pytest.approx(
        3 * (held["half"] + held["inputs"])
    )


def test_what_shrinks_gradients_and_optimiser(bare, planned):
    plain = planned(8, "bf16").peaks("DDP", 2)[STEP]
    lora, small = (
        DryRun(settings(bare, precision="bf16", **more), whole_gradients=True).measure(2)[1][STEP]
        for more in ({"lora_rank": 2}, {"optimizer": "adamw8bit", "ema": 0.0})
    )
    for kind in ("gradients", "optimiser", "average"):
        assert 0 < lora[kind] < 0.1 * plain[kind]
    # The frozen base in bf16, and adapters in float32.
    assert plain["weights"] / 2 < lora["weights"] < 0.6 * plain["weights"]
    parameters = plain["weights"] / 4
    assert plain["optimiser"] == pytest.approx(12 * parameters, rel=0.05)
    assert small["optimiser"] == pytest.approx(2 * parameters * (1 + 4 / 256), rel=0.02)
    assert small["average"] == 0 < plain["average"]


def test_the_largest_batch_fits_and_one_more_does_not(planned):
    it = planned(8)
    assert it.capacity == pytest.approx(0.92 * 79.1 * 2**30 - 1.5e9)
    it.capacity = 2e7
    for mode in it.modes:
        batch = it.largest_batch(mode)
        assert 4 < batch < 30
        assert it.total(mode, batch) <= it.capacity < it.total(mode, batch + 1)
    batch = it.largest_batch("DDP")
    for n, fits in ((batch, True), (batch + 1, False)):  # measured at that batch, not on the line
        _, peaks, held = it.dry.measure(n)
        assert (max(p.total() for p in peaks.values()) + held["half"] <= it.capacity) == fits
    it.capacity = 1e6
    assert it.largest_batch("DDP") == 0


def test_a_batch_that_fits_in_one_mode_is_no_mistake(planned):
    it = planned(8)
    it.capacity = 2.2e7
    few, many = it.largest_batch("DDP"), it.largest_batch("FSDP2")
    assert few < many
    for batch, fits in ((many, True), (many + 1, False)):
        it.settings = replace(it.settings, batch=batch)
        assert (it.problem() is None) == fits
    assert f"largest --batch that fits: {few} (DDP), {many} (FSDP2);" in it.problem()
    it.capacity = 1e6
    assert "fits: none;" in it.problem()
