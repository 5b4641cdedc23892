"""Settings and command lines of plans of tiny checkpoints."""

import socket
from collections import Counter

import pytest

from full.settings import Settings


def settings(root, backbone="sd15", **more):
    values = dict(
        backbone=str(root / backbone),
        features=str(root / "dino"),
        c_img=str(root / "dino-large"),
        resolution=64,
        c_text=str(root / "clip"),
        batch=2,
        precision="fp32",
        data=str(root / "images"),
        workers=0,
        tracker="none",
        features_crop=0.0,
    )
    return Settings(**(values | more))


def flags(root, *more, **changed):
    given = settings(root, **changed)
    names = ("backbone", "features", "c_img", "c_text", "resolution", "batch", "precision")
    return [
        x for name in names for x in (f"--{name.replace('_', '-')}", str(getattr(given, name)))
    ] + list(more)


def forbid_network(patch):
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    # The hub's loaders ask once a process, and once a day, for something more than the file.
    patch.setattr("huggingface_hub.constants.AGENT_HARNESSES_PATH", "/nowhere", raising=False)
    patch.setattr("huggingface_hub.utils._detect_agent._registry", None, raising=False)
    patch.setattr(
        socket, "getaddrinfo", lambda *args, **kwargs: pytest.fail("the plan went to the network")
    )


def by_part(flops):
    """{part: operations}, from those of every precision."""
    parts = Counter()
    for (part, _), n in flops.items():
        parts[part] += n
    return parts
