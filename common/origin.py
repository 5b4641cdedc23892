"""What a result came from: the machine, PyTorch, and the repository's commit."""

import platform
import subprocess
from pathlib import Path

import torch


def device_name(device):
    """The GPU's name, or the processor and the threads that PyTorch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    threads = torch.get_num_threads()
    return f"{platform.machine()} CPU, {threads} thread{'s' * (threads > 1)}"


def machine(device):
    """One line: the device, its threads, PyTorch's version."""
    return f"{device_name(device)}, torch {torch.__version__}"


def commit():
    """The repository's short commit, with + for uncommitted changes to its files; "unknown" outside
    a repository."""
    try:
        git = ["git", "-C", str(Path(__file__).parent)]
        head = [*git, "rev-parse", "--short", "HEAD"]
        out = subprocess.run(head, capture_output=True, text=True, check=True).stdout
        status = [*git, "status", "--porcelain", "-uno"]
        dirty = subprocess.run(status, capture_output=True, text=True).stdout.strip()
        return out.strip() + ("+" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
