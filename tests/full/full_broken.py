"""full/run.py whose process RANK gets images that are no numbers (WHAT = images) in its AT-th
iteration, or cannot write its part of the AT-th checkpoint (WHAT = disk): run by
test_full_processes.py under torchrun. Arguments: WHAT RANK AT, then full/run.py's flags. Each
process leaves its exit code in OUT/exit_RANK."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from common.checkpoints import CheckpointError
from full import checkpoint, run, train


def main(what, rank, at, *flags):
    make_batch, write, calls = train.Trainer.make_batch, checkpoint.write, []

    def bad(kind):
        if kind == what:
            calls.append(kind)
        return kind == what and os.environ["RANK"] == rank and len(calls) == int(at)

    def broken_batch(self, raw):
        return make_batch(
            self, raw | {"image": raw["image"] * (float("nan") if bad("images") else 1)}
        )

    def broken_write(path, state):
        if bad("disk"):
            raise CheckpointError(f"{path}: cannot be written: the disk is full")
        write(path, state)

    train.Trainer.make_batch, checkpoint.write = broken_batch, broken_write
    code = run.main(list(flags))
    Path(flags[flags.index("--out") + 1], f"exit_{os.environ['RANK']}").write_text(str(code))
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
