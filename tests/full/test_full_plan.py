"""full/plan/: arithmetic by hand, and what --plan prints."""

import pytest
import torch
from full_plans import flags, forbid_network

from full import run
from full.plan import plan
from full.plan.architectures import MetaBackbone
from full.plan.labels import STUDENT
from full.settings import Settings

# Time ---------------------------------------------------------------------------------------------


@pytest.fixture
def by_hand(monkeypatch):
    """A Plan of round numbers: 4e12 operations an image forward, 8e12 backward, 10e12 for the
    rest, on a GPU that reaches 40 % of its peak."""
    monkeypatch.setattr(plan, "UTILISATION", 0.4)
    it = plan.Plan.__new__(plan.Plan)
    it.settings, it.gpus, it.width, it.batches = Settings(batch=2), 4, 2, (2, 4)
    it.gpu = plan.Gpu(memory=10e9, bf16=100e12, link=100e9)
    it.parameters = it.trained = 1_000_000_000
    it.heads = 3_000_000
    rest = {("x", "bf16"): 8e12, ("x", "tf32"): 2e12}
    image = {(STUDENT, "bf16"): 4e12, (f"{STUDENT}, backward", "bf16"): 8e12} | rest
    it.measured = [({k: batch * n for k, n in image.items()}, {}, {}) for batch in it.batches]
    return it


def test_arithmetic_takes_operations_over_rate(by_hand):
    # bf16 at 100, TF32 at 50 TFLOP/s.
    assert by_hand.seconds(1) == pytest.approx((20 / 100 + 2 / 50) / 0.4)
    assert by_hand.seconds(3, STUDENT) == pytest.approx(3 * 4 / 100 / 0.4)


def test_communication_by_hand(by_hand):
    # DDP: a ring's sum sends 2 × 3/4 of 4 GB at 75 GB/s. FSDP2: two gathers, each 3/4 of 2 GB,
    # and a scatter in float32.
    assert by_hand.communication("DDP") == pytest.approx((2 * 0.75 * 4 / 75, 2 * 0.75 * 0.012 / 75))
    assert by_hand.communication("FSDP2")[0] == pytest.approx((2 * 2 + 4) * 0.75 / 75)
    by_hand.settings = Settings(batch=2, accumulate=3)
    assert by_hand.communication("DDP")[0] == pytest.approx(2 * 0.75 * 4 / 75)  # once
    assert by_hand.communication("FSDP2")[0] == pytest.approx(
        (3 * 2 * 2 + 4) * 0.75 / 75
    )  # gathers each time
    by_hand.trained = 10_000_000  # LoRA sends its own gradients, and FSDP2 all weights
    assert by_hand.communication("DDP")[0] == pytest.approx(2 * 0.75 * 0.04 / 75)
    assert by_hand.communication("FSDP2")[0] == pytest.approx(0.75 * (3 * 2 * 2 + 0.04) / 75)
    by_hand.gpus = 16  # two nodes: 25 GB/s of network, not 100 GB/s; 15/16, not 3/4
    assert by_hand.communication("DDP")[0] == pytest.approx(2 * 15 / 16 * 0.04 / (0.75 * 25))
    by_hand.gpus = 1
    assert by_hand.communication("DDP") == (0, 0)


def test_communication_hides_behind_the_student_and_the_rest_is_waited_for(by_hand):
    arithmetic, heads = by_hand.seconds(2), by_hand.communication("DDP")[1]
    assert by_hand.hidden("DDP", 2) == pytest.approx(2 * 8 / 40)
    assert by_hand.hidden("FSDP2", 2) == pytest.approx(2 * (4 + 8) / 40)
    assert by_hand.step("DDP", 2) == pytest.approx(arithmetic + heads)
    by_hand.trained = 20_000_000_000  # 1.6 s to send, 0.4 s of them hidden
    assert by_hand.step("DDP", 2) == pytest.approx(arithmetic + heads + 1.2)
    assert by_hand.limit("DDP") == 8  # 1.6 s over 0.2 s an image
    by_hand.settings = Settings(batch=2, accumulate=2)
    assert by_hand.step("DDP", 2) == pytest.approx(
        2 * arithmetic + heads + 1.2
    )  # behind the last one alone
    assert by_hand.hidden("FSDP2", 2) == pytest.approx(2 * 2 * (4 + 8) / 40)


def test_days_and_gpu_hours(by_hand):
    times, step = by_hand._times("DDP"), by_hand.step("DDP", 2)
    assert float(times["**GPU-hours**"]) == pytest.approx(4000 * step * 4 / 3600, abs=0.05)
    assert float(times["days for 4000 iterations"]) == pytest.approx(4000 * step / 86400, abs=0.005)
    assert float(times["images/s, all GPUs"]) == pytest.approx(2 * 4 / step, abs=0.05)


# The command --------------------------------------------------------------------------------------


def test_the_command_prints_the_plan_of_sd15(sd15):
    code, report, it = sd15
    assert code == 0 and {p.device.type for p in it.dry.add.parameters()} == {"meta"}
    assert max(map(len, report.splitlines())) <= 100
    for words in (
        "sd15 on 8 × a100-80",
        " 859.52 |",
        "GB = 1e9 bytes",
        "12% of the peak",
        "DDP |",
        "P2 |",
    ):
        assert words in report, words
    largest = next(line for line in report.splitlines() if "largest batch" in line)
    assert [int(n) for n in largest.split("|")[2:4]] == [
        it.largest_batch("DDP"),
        it.largest_batch("FSDP2"),
    ]


def test_the_command_reads_a_folder_without_weights(bare, capsys):
    assert (
        run.main(flags(bare, "--plan", "--gpus", "2", "--debug", backbone="sdxl", c_text="none"))
        == 0
    )
    out, _ = capsys.readouterr()
    assert "GPU-hours" in out and max(map(len, out.splitlines())) <= 100
    assert (
        f" {plan.count(MetaBackbone(str(bare / 'sdxl'), torch.float32).pipe.unet) / 1e6:.2f} |"
        in out
    )


def test_too_little_memory_ends_in_one_line_below_the_plan(bare, capsys, monkeypatch):
    monkeypatch.setitem(plan.GPUS, "small", plan.Gpu(1.654e9, 1e12, 1e9))
    assert (
        run.main(
            flags(
                bare,
                "--plan",
                "--gpu",
                "small",
                "--checkpointing",
                "false",
                "--steps",
                "7",
                batch=5,
            )
        )
        == 2
    )
    out, errors = capsys.readouterr()
    message = errors.strip().splitlines()[-1]
    assert "largest batch that fits" in out and "days for 7 iterations" in out
    assert message.startswith("full/run.py: --batch 5: too little memory: one GPU needs ")
    for words in (
        "--checkpointing true",
        "--vae taesd",
        "--optimizer adamw8bit",
        "--lora-rank",
        "FSDP2",
        "--ema 0",
    ):
        assert words in message
    assert "--vae-slicing" not in message  # it slices already
    assert 1 < int(message.split("largest --batch that fits: ")[1].split(" ")[0]) < 5


MISTAKES = {
    "unknown GPU": (["--plan", "--gpu", "b200"], ["--gpu b200", "unknown", "a100-80", "l40s-48"]),
    "no GPU": (["--plan", "--gpus", "0"], ["--gpus 0", "at least 1"]),
    "GPUs of a run": (["--gpus", "8"], ["--gpus", "--plan", "accelerate launch"]),
    "GPU of a run": (["--gpu", "a100-80"], ["--gpu", "--plan", "accelerate launch"]),
    "repository": (
        ["--plan", "--backbone", "nobody/nothing"],
        ["nobody/nothing", "hf download", "sdxl"],
    ),
    "no pipeline": (["--plan", "--backbone", "DINO"], ["dino", "hf download", "sdxl"]),
    "features": (
        ["--plan", "--features", "nobody/nothing"],
        ["--features nobody/nothing", "hf download", "dinov2-s"],
    ),
    "no vision": (["--plan", "--features", "TEXT"], ["--features", "DINOv2, ViT and CLIP"]),
    "features size": (["--plan", "--features-size", "30"], ["--features-size 30", "14"]),
    "c_text": (["--plan", "--c-text", "/nowhere"], ["--c-text /nowhere", "hf download"]),
    # As in the run: a model without weights is the name of a folder.
    "no weights": (["--plan", "--c-text", "ViT-B-32"], ["--c-text ViT-B-32", "hf download"]),
    "no hub": (["--plan", "--c-text", "hf-hub:no/no"], ["--c-text hf-hub:no/no", "hf download"]),
    "VAE": (["--plan", "--vae", "nobody/nothing"], ["--vae nobody/nothing", "taesd"]),
}


@pytest.mark.parametrize("more, words", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_of_a_plan_ends_in_one_line(bare, capsys, monkeypatch, more, words):
    forbid_network(monkeypatch)
    paths = {"DINO": str(bare / "dino"), "TEXT": str(bare / "sd15" / "text_encoder")}
    assert run.main([*flags(bare), *(paths.get(x, x) for x in more)]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("full/run.py: ") and all(word in message for word in words), message


def test_a_path_that_is_too_long_is_cut():
    assert plan.tail("a" * 40) == "a" * 40 and plan.tail("b" + "a" * 40) == "…" + "a" * 39
