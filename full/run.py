"""Distil Stable Diffusion with ADD: python full/run.py --backbone sdxl --data SHARDS --out DIR

On several GPUs: accelerate launch --config_file full/configs/NAME.yaml full/run.py … The result is
DIR/pipeline, a diffusers folder. Ctrl-C and SIGTERM save; --resume auto continues.
"""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from common.checkpoints import CheckpointError, write_text
from common.device import be_deterministic
from common.errors import one_line
from common.flags import add_flags, from_dict, show
from common.origin import commit
from common.stopping import stop_on_signals
from full.settings import Settings


def parse_arguments(argv):
    """(arguments, {setting: value} of those given)."""
    parser = argparse.ArgumentParser(
        prog="full/run.py",
        usage="%(prog)s [--backbone X] [--data X] [--out DIR] [--resume X] [other flags]",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/full"), help="run folder (default: runs/full)"
    )
    parser.add_argument(
        "--resume",
        metavar="X",
        help="auto (the last checkpoint of --out, if there is one), or a checkpoint's folder",
    )
    parser.add_argument(
        "--push-to-hub", metavar="REPO", help="upload the pipeline to this repository when done"
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="print memory, time and GPU-hours of the run instead; needs no data or GPU",
    )
    parser.add_argument(
        "--gpus", type=int, metavar="N", help="with --plan: number of GPUs (default: 1)"
    )
    parser.add_argument(
        "--gpu",
        metavar="X",
        help="with --plan: a100-40, a100-80 (default), h100-80, h200-141, rtx4090-24 or l40s-48",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    add_flags(parser.add_argument_group("settings"), Settings)
    arguments = parser.parse_args(argv)
    own = {"out", "resume", "push_to_hub", "plan", "gpus", "gpu", "debug"}
    return arguments, {name: value for name, value in vars(arguments).items() if name not in own}


def configure(arguments, given):
    """Settings from the flags; on --resume what is not given comes from the run's config.json."""
    config = arguments.out / "config.json"
    if arguments.resume and config.exists():
        try:
            stored = json.loads(config.read_text())["settings"]
            from_dict(Settings, stored)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{config}: not the settings of a run ({error}); start over without --resume"
            ) from error
        given = stored | given
    return from_dict(Settings, given)


def print_plan(settings, arguments):
    """Prints full/plan/plan.py's report. ValueError if the batch does not fit."""
    from full.plan.plan import plan

    report, problem = plan(
        settings, 1 if arguments.gpus is None else arguments.gpus, arguments.gpu or "a100-80"
    )
    print(report, flush=True)
    if problem:
        raise ValueError(problem)


def run(arguments, given):
    """The whole job; returns the pipeline's folder, None for a plan."""
    settings = configure(arguments, given)
    if arguments.plan:
        return print_plan(settings, arguments)
    if arguments.gpus is not None or arguments.gpu is not None:
        raise ValueError(
            "--gpus, --gpu: are for --plan; a run has the GPUs that `accelerate launch` gives it"
        )
    if settings.deterministic:
        be_deterministic()
    # Imported here: --help and mistakes in flags need not wait for diffusers.
    from full import checkpoint, export, parts, train

    accelerator = parts.make_accelerator(settings, arguments.out)
    main = accelerator.is_main_process
    if main:
        arguments.out.mkdir(parents=True, exist_ok=True)
        if not arguments.resume and checkpoint.saved(arguments.out):
            raise ValueError(
                f"--out {arguments.out}: holds a run; --resume auto continues it, another "
                "folder starts over"
            )
        config = {"settings": dataclasses.asdict(settings), "commit": commit()}
    parts.check_shared(accelerator, arguments.out)
    trainer = train.Trainer(settings, accelerator, arguments.out)
    if arguments.resume:
        checkpoint.resume(trainer, arguments.resume)
    if main:
        write_text(arguments.out / "config.json", json.dumps(config, indent=2) + "\n")
        count = sum(p.numel() for p in trainer.trained)
        processes = accelerator.num_processes
        batch = settings.batch * settings.accumulate * processes
        print(
            f"student: {settings.backbone} · teacher: {settings.teacher or settings.backbone} · "
            f"{count:,} trained parameters · {processes} × {trainer.device.type} · batch {batch} · "
            f"from step {trainer.step} to {settings.steps} · folder: {arguments.out}",
            flush=True,
        )
    values = {
        k: show(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(settings).items()
    }
    accelerator.init_trackers("add", config=values)
    folder = trainer.run()
    if main and arguments.push_to_hub:
        export.push(folder, arguments.push_to_hub)
    return folder if main else None


def main(argv=None):
    """Exit codes: 0 done, 2 a user's mistake (one line says which), 130 or 143 stopped by SIGINT or
    SIGTERM after saving (a second one: at once)."""
    arguments, given = parse_arguments(argv)
    stop_on_signals()
    try:
        folder = run(arguments, given)
    except KeyboardInterrupt as stop:
        print(
            f"\nstopped by {str(stop) or 'Ctrl-C'}; the same command with --resume auto continues "
            "from the last checkpoint",
            file=sys.stderr,
        )
        return getattr(stop, "code", 130)
    except (ValueError, OSError, CheckpointError) as error:
        if arguments.debug:
            raise
        print(f"full/run.py: {one_line(error)}", file=sys.stderr)
        return 2
    if folder:
        print(
            f"\npipeline: {folder}\nsample it: python full/sample.py --pipeline {folder} --prompt "
            "TEXT --steps 1 --out samples"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
