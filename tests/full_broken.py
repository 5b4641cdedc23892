"""full/run.py whose process RANK gets images that are no numbers in its AT-th iteration: run by test_full_trust.py under
torchrun. Arguments: RANK AT, then full/run.py's flags."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from full import run, train


def main(rank, at, *flags):
    make_batch, calls = train.Trainer.make_batch, []

    def broken(self, raw):
        calls.append(0)
        bad = os.environ["RANK"] == rank and len(calls) == int(at)
        return make_batch(self, raw | {"image": raw["image"] * (float("nan") if bad else 1)})

    train.Trainer.make_batch = broken
    return run.main(list(flags))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
