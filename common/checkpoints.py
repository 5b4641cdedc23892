"""Checkpoints that are written whole or not at all, and read without running any code."""

import os
import pickle
import sys
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from common.errors import explain

# Follows torch.save's output, and is followed by its CRC-32 in hex; torch.load ignores both.
TRAILER = b"\nADD checkpoint 1 "


class CheckpointError(Exception):
    """A checkpoint that cannot be written or read; the message is one line."""


class _Summing:
    """A file to write to, with the CRC-32 of all that went through."""

    def __init__(self, file):
        self.file, self.sum = file, 0

    def write(self, data):
        self.sum = zlib.crc32(data, self.sum)
        return self.file.write(data)

    def flush(self):
        self.file.flush()


def sync_folder(folder):
    """What was renamed in a folder reaches the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _replacing(path, keep=False):
    """A file to write in binary, which takes path's place when it is wholly on the disk; keep: as
    PATH.previous."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, f"{path}.previous")
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write(path, state):
    """torch.save, complete on the disk under a temporary name before it takes the place of the one
    that was there. What was there before stays as PATH.previous. CheckpointError where nothing
    could be written: then both are untouched."""
    path = Path(path)
    try:
        with _replacing(path, keep=True) as file:
            summing = _Summing(file)
            torch.save(state, summing)
            file.write(TRAILER + b"%08x" % summing.sum)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: cannot be written: {explain(error)}; the checkpoint before it is intact"
        ) from error


def write_text(path, text):
    """A text file, complete or as it was. OSError."""
    with _replacing(Path(path)) as file:
        file.write(text.encode())


def verify(path):
    """CheckpointError if the file is not what write() left there: torn, damaged, or another's.
    OSError."""
    with open(path, "rb") as file:
        left, total = max(0, os.path.getsize(path) - len(TRAILER) - 8), 0
        while block := file.read(min(left, 1 << 20)):
            total, left = zlib.crc32(block, total), left - len(block)
        trailer, stated = file.read(len(TRAILER)), file.read(8)
    if trailer != TRAILER:
        raise CheckpointError(f"{path} is not a checkpoint of this program, or is cut short")
    if stated != b"%08x" % total:
        raise CheckpointError(f"{path} is damaged: its checksum does not agree")


def read(path, device="cpu", mmap=False, check=True):
    """What write() saved: tensors and plain values, nothing that runs. CheckpointError for any
    other, or a torn, file. With mmap, tensors stay on the disk until they are used; check=False
    trusts a file that was verified before."""
    try:
        if check:
            verify(path)
        return torch.load(path, map_location=device, weights_only=True, mmap=mmap)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} is not a readable checkpoint ({explain(error)})") from error


def read_last(path, device="cpu"):
    """The checkpoint of that name or, if it cannot be read, the one before it, after a line that
    says so. None where neither is there. CheckpointError where there are some and none can be
    read."""
    failed = None
    for candidate in (Path(path), Path(f"{path}.previous")):
        if candidate.exists():
            try:
                state = read(candidate, device)
            except CheckpointError as error:
                print(f"{error}; looking for the one before it", file=sys.stderr, flush=True)
                failed = failed or error
                continue
            return state
    if failed:
        raise CheckpointError(f"{failed}; no copy of it can be read; remove {path}* to start over")
    return None
