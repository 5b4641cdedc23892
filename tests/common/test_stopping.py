"""common/stopping.py: the first signal waits until a step is saved, the second does not."""

import os
import signal
import subprocess
import sys

import pytest
from trust import ROOT

from common.stopping import Stopped, postponed_signals


@pytest.mark.parametrize(
    "number, name, code", [(signal.SIGINT, "SIGINT", 130), (signal.SIGTERM, "SIGTERM", 143)]
)
def test_the_first_signal_waits_and_the_second_stops(number, name, code, capfd):
    before = signal.getsignal(number)
    with postponed_signals() as received:
        signal.raise_signal(number)
        assert received == [number]
        assert f"{name}: saving after this step" in capfd.readouterr().err
        with pytest.raises(Stopped) as stopped:
            signal.raise_signal(number)
    assert stopped.value.code == code
    assert str(stopped.value) == f"a second {name}, unsaved"
    assert str(Stopped(number)) == name
    assert signal.getsignal(number) is before


def test_the_timer_waits_and_is_never_the_second_signal(capfd):
    with postponed_signals() as received:
        signal.raise_signal(signal.SIGALRM)
        assert "--max-minutes: saving after this step" in capfd.readouterr().err
        signal.raise_signal(signal.SIGALRM)
        assert received == [signal.SIGALRM]
        with pytest.raises(Stopped, match="a second SIGINT, unsaved"):
            signal.raise_signal(signal.SIGINT)
    assert (str(Stopped(signal.SIGALRM)), Stopped(signal.SIGALRM).code) == ("--max-minutes", 142)


def test_a_signal_is_kept_though_nobody_reads_what_it_says():
    """Ctrl-C on `python toy/run.py 2>&1 | tee log` ends tee first."""
    code = (
        "import os, signal\nfrom common.stopping import postponed_signals\n"
        "with postponed_signals() as received:\n    signal.raise_signal(signal.SIGINT)\n"
        "print(received == [signal.SIGINT])"
    )
    reading, writing = os.pipe()
    os.close(reading)
    pipes = dict(stdout=subprocess.PIPE, stderr=writing, text=True)
    try:
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, **pipes)
    finally:
        os.close(writing)
    assert (done.returncode, done.stdout) == (0, "True\n")
