"""Distil Stable Diffusion with ADD: python full/run.py --backbone sdxl --data SHARDS --out DIR

On several GPUs: accelerate launch --config_file full/configs/NAME.yaml full/run.py … The result is DIR/pipeline, a
diffusers folder. Ctrl-C and SIGTERM save; --resume auto goes on.
"""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from flags import add_flags, from_dict
from full.settings import Settings


def parse_arguments(argv):
    """(arguments, {setting: value} of those given)."""
    parser = argparse.ArgumentParser(prog="full/run.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs/full"), help="run folder (default: runs/full)")
    parser.add_argument("--resume", metavar="X", help="auto (the last checkpoint of --out, if there is one), or a checkpoint's folder")
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload the pipeline to this repository when done")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    add_flags(parser.add_argument_group("settings"), Settings)
    arguments = parser.parse_args(argv)
    own = {"out", "resume", "push_to_hub", "debug"}
    return arguments, {name: value for name, value in vars(arguments).items() if name not in own}


def configure(arguments, given):
    """Settings from the flags; on --resume what is not given comes from the run's config.json."""
    config = arguments.out / "config.json"
    if arguments.resume and config.exists():
        given = json.loads(config.read_text())["settings"] | given
    return from_dict(Settings, given)


def run(arguments, given):
    """The whole job; returns the pipeline's folder."""
    settings = configure(arguments, given)
    from full import export, train  # here: --help and mistakes in flags need not wait for diffusers

    accelerator = train.make_accelerator(settings, arguments.out)
    main = accelerator.is_main_process
    if main:
        arguments.out.mkdir(parents=True, exist_ok=True)
        config = {"settings": dataclasses.asdict(settings), "commit": export.commit()}
    trainer = train.Trainer(settings, accelerator, arguments.out)
    if arguments.resume:
        trainer.resume(arguments.resume)
    if main:
        (arguments.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        count = sum(p.numel() for p in trainer.trained)
        print(
            f"student: {settings.backbone} · teacher: {settings.teacher or settings.backbone} · {count:,} trained parameters · "
            f"{accelerator.num_processes} × {trainer.device.type} · batch {settings.batch * settings.accumulate * accelerator.num_processes} "
            f"· from step {trainer.step} to {settings.steps} · folder: {arguments.out}",
            flush=True,
        )
    values = {k: ",".join(map(str, v)) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(settings).items()}
    accelerator.init_trackers("add", config=values)
    folder = trainer.run()
    if main and arguments.push_to_hub:
        export.push(folder, arguments.push_to_hub)
    return folder if main else None


def main(argv=None):
    """Exit codes: 0 done, 2 a user's mistake (one line says which), 130 interrupted after saving."""
    arguments, given = parse_arguments(argv)
    try:
        folder = run(arguments, given)
    except KeyboardInterrupt:
        print("\ninterrupted and saved; the same command with --resume auto goes on from here", file=sys.stderr)
        return 130
    except Exception as error:
        if arguments.debug or not (isinstance(error, ValueError) or type(error).__name__ == "TrainingError"):
            raise
        print(f"full/run.py: {error}", file=sys.stderr)
        return 2
    if folder:
        print(f"\npipeline: {folder}\nsample it: python full/sample.py --pipeline {folder} --prompt TEXT --steps 1 --out samples")
    return 0


if __name__ == "__main__":
    sys.exit(main())
