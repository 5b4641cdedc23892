"""A run that many tests start from."""

import pytest
from toy_runs import TINY, call


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A tiny run that was never interrupted: (folder, stdout)."""
    folder = tmp_path_factory.mktemp("run") / "whole"
    code, out, err = call("run.py", *TINY, "--out", folder)
    assert code == 0, err
    return folder, out
