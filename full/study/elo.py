"""Win rates and ELO from pairwise votes, as in the paper's Appendix B: python full/elo.py VOTES.csv

A CSV has a header and a row for each vote: study (the question: prompt_following, quality, …),
voter, prompt, left and right (the models), choice (left, right or tie), and, optionally, check:
empty for a vote, passed or failed for an attention check. Several files are read as one; studies
are rated apart and averaged.
"""

import argparse
import csv
import math
import random
import sys
from collections import defaultdict
from dataclasses import dataclass

from common import markdown

COLUMNS = ("study", "voter", "prompt", "left", "right", "choice")
SCORES = {"left": 1.0, "right": 0.0, "tie": 0.5}
START, K = 1000.0, 1.0  # Appendix B


class VoteError(ValueError):
    """Votes that cannot be used; the message is one line."""


@dataclass(frozen=True)
class Game:
    """One vote: score is 1 where first won, 0 where second did, 0.5 for a tie."""

    study: str
    first: str
    second: str
    score: float


def read_votes(paths, allowed_failures=0):
    """(games, voters left out): votes of all files, without those of voters who failed more
    attention checks than allowed. VoteError for a file, column or choice that is not as it should
    be."""
    rows, failures = [], defaultdict(set)
    for path in paths:
        try:
            with open(path, newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                if missing := [c for c in COLUMNS if c not in (reader.fieldnames or ())]:
                    raise VoteError(
                        f"{path}: has no column {', '.join(missing)}; expected {', '.join(COLUMNS)}"
                    )
                for row in reader:
                    if row["choice"] not in SCORES:
                        raise VoteError(
                            f"{path}, line {reader.line_num}: choice {row['choice']!r} is none of "
                            f"{', '.join(SCORES)}"
                        )
                    check = row.get("check") or ""
                    if check == "failed":  # once, though each study has a row of it
                        pair = frozenset((row["left"], row["right"]))
                        failures[row["voter"]].add((row["prompt"], pair))
                    if not check:
                        if row["left"] == row["right"]:
                            raise VoteError(
                                f"{path}, line {reader.line_num}: {row['left']} against itself"
                            )
                        rows.append(row)
        except (OSError, UnicodeDecodeError) as error:
            raise VoteError(f"{path}: cannot be read ({error})") from error
    excluded = {voter for voter, checks in failures.items() if len(checks) > allowed_failures}
    games = [
        Game(r["study"], r["left"], r["right"], SCORES[r["choice"]])
        for r in rows
        if r["voter"] not in excluded
    ]
    if not games:
        raise VoteError(
            f"{', '.join(map(str, paths))}: no votes left ({len(rows)} read, {len(excluded)} "
            "voters excluded)"
        )
    return games, sorted(excluded)


def wilson(wins, n, z=1.96):
    """(low, high) of a win rate: Wilson's 95 % score interval of wins out of n; ties count as half
    a win."""
    p, centre = wins / n, wins / n + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)


def win_rates(games):
    """{(a, b): (rate of a over b, low, high, games)} for each pair that met, a before b in the
    alphabet."""
    scores = defaultdict(list)
    for g in games:
        flip = g.first > g.second
        scores[(g.second, g.first) if flip else (g.first, g.second)].append(
            1 - g.score if flip else g.score
        )
    return {
        pair: (sum(s) / len(s), *wilson(sum(s), len(s)), len(s))
        for pair, s in sorted(scores.items())
    }


def elo(games, k=K, start=START):
    """{model: rating} after games in their order: E_1 = 1 / (1 + 10^((R_2 - R_1)/400)), R_i ← R_i +
    K (S_i - E_i)."""
    ratings = defaultdict(lambda: start)
    for g in games:
        expected = 1 / (1 + 10 ** ((ratings[g.second] - ratings[g.first]) / 400))
        ratings[g.first] += k * (g.score - expected)
        ratings[g.second] -= k * (g.score - expected)
    return dict(ratings)


def bootstrapped_elo(games, bootstraps=1000, seed=0):
    """{model: (mean rating, 2.5th, 97.5th percentile)} over resamples of the games, each drawn in
    random order."""
    draw, found = random.Random(seed), defaultdict(list)
    names = sorted({name for g in games for name in (g.first, g.second)})
    for _ in range(bootstraps):
        ratings = elo(draw.choices(games, k=len(games)))
        for name in names:
            found[name].append(ratings.get(name, START))
    ends = [int(q * (bootstraps - 1)) for q in (0.025, 0.975)]
    return {n: (sum(r) / bootstraps, *(sorted(r)[i] for i in ends)) for n, r in found.items()}


def by_study(games):
    """{study: its games}."""
    studies = defaultdict(list)
    for g in games:
        studies[g.study].append(g)
    return dict(sorted(studies.items()))


def report(games, excluded, bootstraps, seed):
    """Lines of Markdown: win rates of every study, ELO of every study and their mean."""
    studies, lines = by_study(games), []
    for study, played in studies.items():
        lines += [f"## {study}: {len(played)} votes", ""]
        rows = [
            [a, b, f"{p:.1%}", f"{low:.1%} to {high:.1%}", n]
            for (a, b), (p, low, high, n) in win_rates(played).items()
        ]
        head = ["", "against", "win rate", "95 % (Wilson)", "votes"]
        lines += [*markdown.table(head, rows), ""]
    ratings = {
        study: bootstrapped_elo(played, bootstraps, seed) for study, played in studies.items()
    }
    names = sorted({name for r in ratings.values() for name in r})
    means = {n: [r[n][0] for r in ratings.values() if n in r] for n in names}
    lines += [f"## ELO: start {START:.0f}, K = {K:g}, {bootstraps} bootstraps, seed {seed}", ""]
    rows = []
    for n in sorted(names, key=lambda n: -sum(means[n]) / len(means[n])):
        cells = [
            f"{r[n][0]:.0f} ({r[n][1]:.0f} to {r[n][2]:.0f})" if n in r else ""
            for r in ratings.values()
        ]
        rows.append([n, f"{sum(means[n]) / len(means[n]):.0f}", *cells])
    lines += markdown.table(["", "mean", *(f"{s} (95 %)" for s in ratings)], rows)
    names = [", ".join(excluded)] if excluded else []
    lines += [
        "",
        f"Voters left out for failed attention checks: {': '.join([str(len(excluded)), *names])}.",
    ]
    return lines


def main(argv=None):
    """Exit codes: 0 done, 2 a user's mistake (one line says which)."""
    parser = argparse.ArgumentParser(
        prog="full/elo.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("votes", nargs="+", help="CSV files of votes")
    parser.add_argument(
        "--bootstraps", type=int, default=1000, help="resamples of the games (default: 1000)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the resampling (default: 0)")
    parser.add_argument(
        "--allowed-failures",
        type=int,
        default=0,
        help="attention checks that a voter may fail (default: 0)",
    )
    arguments = parser.parse_args(argv)
    try:
        if arguments.bootstraps < 1:
            raise VoteError(f"--bootstraps {arguments.bootstraps}: must be at least 1")
        games, excluded = read_votes(arguments.votes, arguments.allowed_failures)
    except VoteError as error:
        print(f"full/elo.py: {error}", file=sys.stderr)
        return 2
    print("\n".join(report(games, excluded, arguments.bootstraps, arguments.seed)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
