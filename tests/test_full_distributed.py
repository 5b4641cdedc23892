"""How a batch is divided does not matter: gradient accumulation, two processes (DDP), a sharded student (FSDP2)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_full_train import checkpoints, flags  # noqa: F401  (a fixture)

HERE = Path(__file__).resolve().parent


def launch(mode, root, out):
    """What MODE trained, in new processes."""
    command = [sys.executable]
    if mode in ("ddp", "fsdp"):
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    more = flags(root, out / "run", batch=8, ema=0.5, lora_rank=None)
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, HERE / "full_step.py", mode, out / "state.pt", *more], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-6000:]
    return torch.load(out / "state.pt", weights_only=True)


@pytest.fixture(scope="module")
def whole(checkpoints, tmp_path_factory):  # noqa: F811
    return launch("whole", checkpoints, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("mode", ["accumulate", "ddp", "fsdp"])
def test_a_divided_batch_trains_as_the_whole_one(checkpoints, tmp_path, whole, mode):  # noqa: F811
    state = launch(mode, checkpoints, tmp_path)
    assert state["sharded"] == (len(whole["network"]) if mode == "fsdp" else 0)
    for part in ("network", "average", "heads"):
        assert state[part].keys() == whole[part].keys()
        for name, x in whole[part].items():
            assert torch.allclose(state[part][name], x, rtol=1e-4, atol=1e-6), (part, name)
    for name in ("adversarial", "distillation", "hinge", "gradient_norm"):
        assert torch.allclose(state["log"][name], whole["log"][name], rtol=1e-3), name


def test_the_launch_configurations_are_ones_that_accelerate_reads():
    """Every key is known to accelerate, and the sharded one names the blocks of the real U-Nets."""
    from accelerate.commands.config.config_args import load_config_from_file

    files = sorted((HERE.parent / "full" / "configs").glob("*.yaml"))
    assert len(files) == 4
    found = {file.stem: load_config_from_file(str(file)) for file in files}
    assert {k: (c.distributed_type.value, c.num_machines, c.num_processes) for k, c in found.items()} == {
        "one-gpu": ("NO", 1, 1), "eight-gpus": ("MULTI_GPU", 1, 8), "eight-gpus-fsdp2": ("FSDP", 1, 8), "two-nodes": ("MULTI_GPU", 2, 16),
    }  # fmt: skip
    assert all(c.mixed_precision == "bf16" for c in found.values())
    fsdp = found["eight-gpus-fsdp2"].fsdp_config
    assert fsdp["fsdp_version"] == 2 and fsdp["fsdp_transformer_layer_cls_to_wrap"] == "BasicTransformerBlock,ResnetBlock2D"
