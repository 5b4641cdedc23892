"""How a batch is divided does not matter: gradient accumulation, two processes (DDP), a sharded
student (FSDP2)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from full_runs import ROOT, flags
from safetensors.torch import load_file

from full import parts

HERE = Path(__file__).resolve().parent


def launch(mode, root, out, precision, lora_rank=0):
    """What MODE trained, in new processes."""
    command = [sys.executable]
    out.mkdir(exist_ok=True)
    if mode in ("ddp", "fsdp"):
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    more = flags(
        root,
        out / "run",
        batch=8,
        ema=0.5,
        precision=precision,
        augment="",
        features_crop=0,
        lora_rank=lora_rank,
    )
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [*command, HERE / "full_step.py", mode, out / "state.pt", *more],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-6000:]
    return torch.load(out / "state.pt", weights_only=True)


def distance(a, b):
    """The norm of a - b, over tensors of the same names."""
    return torch.cat([(a[name] - b[name]).flatten() for name in a]).norm()


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def whole(checkpoints, tmp_path_factory, request):
    """(precision, what one process with the whole batch trained)."""
    return request.param, launch(
        "whole", checkpoints, tmp_path_factory.mktemp("whole"), request.param
    )


@pytest.mark.parametrize("mode", ["accumulate", "ddp", "fsdp"])
def test_a_divided_batch_trains_as_the_whole_one(checkpoints, tmp_path, whole, mode):
    precision, expected = whole
    state = launch(mode, checkpoints, tmp_path, precision)
    assert state["sharded"] == (len(expected["network"]) if mode == "fsdp" else 0)
    inside = {"fp32": ["torch.float32"], "bf16": ["torch.bfloat16"]}[precision]
    averaged = ["torch.float32"] if mode == "fsdp" else []
    assert state["types"] == {
        "activations": inside,
        "epsilon": ["torch.float32"],
        "averaged": averaged,
        "parameters": ["torch.float32"],
    }
    before = load_file(checkpoints / "sd15" / "unet" / "diffusion_pytorch_model.safetensors")
    for part in ("network", "average"):
        assert state[part].keys() == expected[part].keys()
        start = {name: before[name.removeprefix("unet.")] for name in expected[part]}
        moved, apart = distance(expected[part], start), distance(expected[part], state[part])
        # Autocast leaves norms in float32, FSDP2's policy does not: the gradients of this tiny
        # network tell.
        bound = 1e-3 if precision == "fp32" else 0.3 if mode == "fsdp" else 0.05
        assert 0 < apart < bound * moved, (part, apart / moved)
    for name, x in expected["heads"].items():
        assert torch.allclose(
            state["heads"][name], x, rtol=1e-4, atol=1e-6 if precision == "fp32" else 1e-4
        ), name
    for name in ("adversarial", "distillation", "hinge", "gradient_norm"):
        assert torch.allclose(
            state["log"][name], expected["log"][name], rtol=1e-3 if precision == "fp32" else 0.02
        ), name


def test_a_sharded_lora_trains_as_a_whole_one_and_saves_its_adapters_alone(checkpoints, tmp_path):
    expected = launch("whole", checkpoints, tmp_path / "whole", "bf16", lora_rank=2)
    state = launch("fsdp", checkpoints, tmp_path / "fsdp", "bf16", lora_rank=2)
    assert state["network"].keys() == expected["network"].keys()
    assert all("lora" in name for name in state["network"])
    moved = {k: v for k, v in expected["network"].items() if "lora_B" in k}  # from 0
    length = distance(moved, {k: torch.zeros_like(v) for k, v in moved.items()})
    assert 0 < distance(moved, state["network"]) < 0.05 * length


class TwoMachines:
    """accelerate's Accelerator as the second process of two has it, on a machine of its own."""

    num_processes, is_main_process, device = 2, False, torch.device("cpu")

    def __init__(self, unseen):
        self.unseen = unseen

    def wait_for_everyone(self):
        pass

    def reduce(self, x, how):
        assert how == "sum" and x.item() == self.unseen
        return x


def test_a_folder_that_the_machines_do_not_share_is_named(tmp_path, monkeypatch):
    name = {"seen": False}

    def broadcast(names):
        if name["seen"]:
            (tmp_path / f".shared-{names[0]}").touch()
        return names

    monkeypatch.setattr(parts, "broadcast_object_list", broadcast)
    with pytest.raises(parts.TrainingError, match=f"--out {tmp_path}: 1 of 2 processes do not see"):
        parts.check_shared(TwoMachines(unseen=1), tmp_path)
    name["seen"] = True
    parts.check_shared(TwoMachines(unseen=0), tmp_path)


def test_the_launch_configurations_are_ones_that_accelerate_reads():
    """Every key is known to accelerate, and the sharded one names the blocks of the real U-Nets."""
    from accelerate.commands.config.config_args import load_config_from_file

    files = sorted((ROOT / "full" / "configs").glob("*.yaml"))
    assert len(files) == 3
    found = {file.stem: load_config_from_file(str(file)) for file in files}
    assert {
        k: (c.distributed_type.value, c.num_machines, c.num_processes) for k, c in found.items()
    } == {
        "eight-gpus": ("MULTI_GPU", 1, 8),
        "eight-gpus-fsdp2": ("FSDP", 1, 8),
        "two-nodes": ("MULTI_GPU", 2, 16),
    }
    assert all(c.mixed_precision == "bf16" for c in found.values())
    fsdp = found["eight-gpus-fsdp2"].fsdp_config
    assert (
        fsdp["fsdp_version"] == 2
        and fsdp["fsdp_transformer_layer_cls_to_wrap"] == "BasicTransformerBlock,ResnetBlock2D"
    )
