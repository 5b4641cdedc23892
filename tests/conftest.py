"""One thread for each of pytest-xdist's processes: two that each use both cores crawl."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may go to a hub, nor wait for it

import torch  # noqa: E402

torch.set_num_threads(1)
