"""full/elo.py against games computed by hand, and against the ratings that Bradley and Terry would
give."""

import math
import random

import pytest

from full.study import elo
from full.study.elo import Game

HEADER = "study,voter,prompt,left,right,choice,check\n"


def test_three_games_by_hand():
    """a beats b: 1000 ± 0.5. b draws with c: b expects 1/(1 + 10^(0.5/400)) = 0.499280. c loses to
    a."""
    games = [Game("q", "a", "b", 1.0), Game("q", "b", "c", 0.5), Game("q", "c", "a", 0.0)]
    b = 999.5 + 0.5 - 1 / (1 + 10 ** (0.5 / 400))
    c = 1000 - (0.5 - 1 / (1 + 10 ** (0.5 / 400)))
    lost = 1 / (1 + 10 ** ((1000.5 - c) / 400))
    assert elo.elo(games[:1]) == {"a": 1000.5, "b": 999.5}
    assert elo.elo(games) == pytest.approx({"a": 1000.5 + lost, "b": b, "c": c - lost}, abs=1e-12)
    assert b == pytest.approx(999.500720, abs=1e-6) and lost == pytest.approx(0.499279, abs=1e-6)


def test_k_scales_a_game_and_the_order_matters():
    assert elo.elo([Game("q", "a", "b", 1.0)], k=32) == {"a": 1016.0, "b": 984.0}
    games = [Game("q", "a", "b", 1.0)] * 50 + [Game("q", "a", "b", 0.0)] * 50
    assert elo.elo(games)["a"] < 1000 < elo.elo(games[::-1])["a"]


def test_many_games_come_to_the_bradley_terry_ratings():
    """Strengths 3 : 1 : 1/2, so that a wins 3/4 of its games against b: apart by 400 log10 of the
    ratio."""
    strength, draw = {"a": 3.0, "b": 1.0, "c": 0.5}, random.Random(0)
    games = []
    for _ in range(12_000):
        x, y = draw.sample(sorted(strength), 2)
        games.append(
            Game("q", x, y, float(draw.random() < strength[x] / (strength[x] + strength[y])))
        )
    found = elo.bootstrapped_elo(games, bootstraps=20)
    for x, y in (("a", "b"), ("b", "c")):
        assert found[x][0] - found[y][0] == pytest.approx(
            400 * math.log10(strength[x] / strength[y]), abs=12
        )
    assert sum(r[0] for r in found.values()) == pytest.approx(3000)  # what one wins another loses
    assert all(low < mean < high for mean, low, high in found.values())


def test_bootstraps_are_fixed_by_the_seed():
    games = [Game("q", "a", "b", float(i % 3 > 0)) for i in range(60)]
    assert (
        elo.bootstrapped_elo(games, 30, 1)
        == elo.bootstrapped_elo(games, 30, 1)
        != elo.bootstrapped_elo(games, 30, 2)
    )


def test_win_rates_count_both_sides_and_half_a_tie():
    games = [
        Game("q", "a", "b", 1.0),
        Game("q", "b", "a", 0.0),
        Game("q", "b", "a", 0.0),
        Game("q", "a", "b", 0.5),
    ]
    ((pair, (rate, low, high, n)),) = elo.win_rates(games).items()
    assert pair == ("a", "b") and rate == 0.875 and n == 4 and low < rate < high


def test_wilsons_interval_has_its_known_values():
    assert elo.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    low, high = elo.wilson(0, 20)
    assert low == pytest.approx(0, abs=1e-12) and high == pytest.approx(0.1611, abs=1e-4)


def write(path, *rows):
    path.write_text(HEADER + "\n".join(rows) + "\n", "utf-8")
    return str(path)


def test_voters_who_fail_checks_are_left_out_and_named(tmp_path, capsys):
    good = write(
        tmp_path / "a.csv",
        "quality,u,p1,x,y,left,",
        "quality,u,p1,x,y,left,passed",
        "prompt_following,u,p1,y,x,right,",
    )
    failed = (f"{study},w,p2,x,y,right,failed" for study in ("quality", "prompt_following"))
    bad = write(tmp_path / "b.csv", "quality,w,p1,x,y,right,", *failed)  # one check, as vote.py has
    games, excluded = elo.read_votes([good, bad])
    assert excluded == ["w"] and len(games) == 2
    assert len(elo.read_votes([good, bad], allowed_failures=1)[0]) == 3
    worse = write(tmp_path / "c.csv", "quality,w,p3,x,y,right,failed")
    assert elo.read_votes([good, bad, worse], allowed_failures=1)[1] == ["w"]
    assert elo.main([good, bad, "--bootstraps", "5"]) == 0
    out = capsys.readouterr().out
    assert "| x | y | 100.0% |" in out and "left out for failed attention checks: 1: w." in out
    assert "| x | 1000 | 1000 (1000 to 1000) | 1000 (1000 to 1000) |" in out  # half a point, twice


MISTAKES = {
    "no file": (None, ["cannot be read"]),
    "column": ("study,voter\nq,u\n", ["no column prompt, left, right, choice"]),
    "choice": (HEADER + "q,u,p,x,y,both,\n", ["line 2", "'both'", "left, right, tie"]),
    "against itself": (HEADER + "q,u,p,x,x,left,\n", ["line 2", "x against itself"]),
    "no votes": (HEADER, ["no votes left (0 read, 0 voters excluded)"]),
}


@pytest.mark.parametrize("text, words", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_ends_in_one_line(tmp_path, capsys, text, words):
    path = tmp_path / "votes.csv"
    if text is not None:
        path.write_text(text)
    assert elo.main([str(path)]) == 2
    message = capsys.readouterr().err
    assert (
        message.startswith(f"full/elo.py: {path}")
        and message.count("\n") == 1
        and all(word in message for word in words)
    )
