"""Short runs of full/run.py on tiny checkpoints, in this process or others, and what they leave."""

import json
import os
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file
from trust import same

from common.checkpoints import read
from full import run

ROOT = Path(__file__).resolve().parent.parent.parent
# Five iterations of two micro-batches.
FIVE = dict(steps=5, batch=2, accumulate=2, save_every=2, random_crop="true", flip="true")


def flags(root, out, backbone="sd15", **settings):
    """The command line of a short run; values None leave a flag out."""
    defaults = dict(
        backbone=root / backbone,
        features=root / "dino",
        c_img=root / "dino-large",
        c_text=root / "clip",
        data=root / "images",
        resolution=64,
        batch=4,
        steps=2,
        precision="fp32",
        workers=0,
        validate_every=0,
        log_every=1,
        save_dtype="fp32",
        tracker="none",
        student_lr=1e-3,
    )
    pairs = [
        (f"--{k.replace('_', '-')}", str(v))
        for k, v in (defaults | settings).items()
        if v is not None
    ]
    return ["--out", str(out), *(text for pair in pairs for text in pair)]


def train(root, out, *more, **settings):
    assert run.main([*flags(root, out, **settings), "--debug", *more]) == 0
    return out / "pipeline"


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses_of(out):
    """The log without what depends on the machine."""
    machine = {"images_per_second", "memory_gib"}
    return [{k: v for k, v in row.items() if k not in machine} for row in log_of(out)]


def weights(pipeline):
    return load_file(pipeline / "unet" / "diffusion_pytorch_model.safetensors")


def last(out):
    return sorted((out / "checkpoints").glob("step_*[0-9]"))[-1]


def assert_same_run(a, b):
    """The last checkpoint, file by file, the pipeline's weights and the log, to the bit."""
    assert last(a).name == last(b).name
    files = sorted(f.name for f in last(a).iterdir())
    assert files == sorted(f.name for f in last(b).iterdir()) and "training.pt" in files
    for name in files:
        assert same(read(last(a) / name), read(last(b) / name)), name
    assert same(weights(a / "pipeline"), weights(b / "pipeline"))
    assert losses_of(a) == losses_of(b)


def launch(processes, *arguments, own_group=False, script=ROOT / "full" / "run.py"):
    """full/run.py, or another script, in processes of its own: the first of them."""
    command = [sys.executable]
    if processes > 1:
        command += [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(processes),
        ]
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return subprocess.Popen(
        [*command, script, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=own_group,
    )


def finish(process):
    """(exit code, stderr) of one that was launched."""
    err = process.communicate(timeout=300)[1]
    return process.returncode, err
