"""Checkpoints that are whole or not there, read without running anything; signals that wait for a
step's end; the memory that a log tells. toy/ and full/ share them."""

import errno
import os
import pickle
import resource
import signal
import sys
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

# Behind what torch.save wrote, with eight hex digits of its CRC-32 after it; torch.load ignores it.
TRAILER = b"\nADD checkpoint 1 "


class CheckpointError(Exception):
    """A checkpoint that cannot be written or read; the message is one line."""


# What stops a run: Ctrl-C, a scheduler, and the timer of --max-minutes.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)


def _name(number):
    return "--max-minutes" if number == signal.SIGALRM else signal.Signals(number).name


class Stopped(KeyboardInterrupt):
    """One of STOPPING came: raised once what was under way has been saved or, on a second one, at
    once. .code is the exit code that says which signal."""

    def __init__(self, number, unsaved=False):
        name = _name(number)
        super().__init__(f"a second {name}, unsaved" if unsaved else name)
        self.code = 128 + number


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


def explain(error):
    """What an OSError means, in words that go behind a path; torch wraps some in a RuntimeError."""
    cause = error if isinstance(error, OSError) else error.__context__
    if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; make room, or name another folder"
    if isinstance(cause, OSError) and cause.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "no permission; name another file or folder"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def one_line(error):
    """An error's message on one line; for an OSError the file, and what to do."""
    if isinstance(error, OSError):
        return f"{error.filename}: {explain(error)}" if error.filename else explain(error)
    return " ".join(str(error).split()) or type(error).__name__


def brief(error):
    """An error's kind and the beginning of its message, on one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:150] if lines else ''}"


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
        raise CheckpointError(f"{failed}, nor is one before it; remove it to start over")
    return None


def be_deterministic():
    """Only algorithms that give the same bits every time; before CUDA's first use."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def peak_memory(device):
    """GiB that the CUDA device or, for any other, the process has held at most."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10  # of ru_maxrss, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


@contextmanager
def postponed_signals():
    """No step is cut in half: inside, the first of STOPPING only fills the list that this yields,
    and says so. A second one stops at once."""
    received = []

    def handler(number, frame):
        if received:
            if number == signal.SIGALRM:  # nobody asked twice
                return
            raise Stopped(number, unsaved=True)
        received.append(number)
        # Not print(): the signal may have come in the midst of another one. Ctrl-C may have closed
        # the pipe's other end, too.
        name = _name(number)
        words = f"\n{name}: saving after this step; once more stops at once, unsaved\n"
        with suppress(OSError):
            os.write(2, words.encode())

    previous = {number: signal.signal(number, handler) for number in STOPPING}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def stop_on_signals():
    """Each of STOPPING raises Stopped wherever the program is: for the time between loops."""

    def handler(number, frame):
        raise Stopped(number)

    for number in STOPPING:
        signal.signal(number, handler)
