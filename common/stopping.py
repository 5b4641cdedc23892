"""Signals that stop a run at the end of a step, when it has saved."""

import os
import signal
from contextlib import contextmanager, suppress

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


@contextmanager
def postponed_signals():
    """Let the current step finish: inside, the first signal of STOPPING is only appended to the
    list that this yields, and announced. A second one stops at once."""
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
