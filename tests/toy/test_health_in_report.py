"""toy/report.py: what the report says of a run's health."""

import pytest

from toy.report import HEALTH, health


@pytest.mark.parametrize(
    ("won", "says"),
    [([0.0] * 15 + [0.4, 0.6] * 2 + [1.0], True), ([1.0] * 18 + [0.4, 0.4], False)],
)
def test_a_report_says_that_the_discriminator_has_won_at_the_end(won, says):
    log = {name: [float(i) for i in range(20)] for name in HEALTH}
    log |= {"discriminator_won": won, "nonfinite": [0.0] * 19 + [3.0]}
    lines = health(log)
    assert any("has won" in line for line in lines) == says
    assert lines[2] == "| " + "18.5 | " * len(HEALTH) + "3 |"  # the last tenth: 18 and 19
