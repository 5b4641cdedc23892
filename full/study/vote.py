"""A local page for a preference study: python full/vote.py --images A=DIR B=DIR … --out votes.csv

Every folder holds the images of one model, as full/sample.py writes them: equal file names are of
equal prompts, which metadata.jsonl tells. A voter sees a prompt and two images in random order and
answers which follows it better and which is better; the names of the models are never sent. Now and
then one of the two is noise: an attention check. Every answer is a row of the CSV that full/elo.py
reads, written whole and at once.
"""

import argparse
import csv
import io
import json
import os
import random
import sys
import threading
import time
from itertools import combinations
from pathlib import Path

from common.flags import add_page_flags

STUDIES = {
    "prompt_following": "Which image follows the prompt better?",
    "quality": "Which image is of higher quality?",
}
COLUMNS = ("time", "study", "voter", "prompt", "left", "right", "choice", "check")
NOISE = "(noise)"

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Which is better?</title>
<style>
 body { font: 18px/1.5 system-ui, sans-serif; max-width: 1120px; margin: 2rem auto;
        padding: 0 1rem; text-align: center; color: #222; }
 .pair { display: flex; gap: 1rem; justify-content: center; margin: 1rem 0; }
 .pair img { width: 48%; max-width: 512px; border-radius: 6px; }
 fieldset { border: 0; margin: .5rem 0; } label { padding: .3rem .8rem; cursor: pointer; }
 .prompt { font-style: italic; } .done { color: #666; font-size: .9rem; }
 button { font-size: 1.1rem; padding: .5rem 2rem; }
</style>
{% if finished %}<h1>That was all. Thank you!</h1>{% else %}
<p class="prompt">{{ prompt }}</p>
<div class="pair"><img alt="left" src="/image/{{ ticket }}/left">
<img alt="right" src="/image/{{ ticket }}/right"></div>
<form method="post" action="/vote"><input type="hidden" name="ticket" value="{{ ticket }}">
{% for study, question in studies.items() %}<fieldset><legend>{{ question }}</legend>
<label><input type="radio" name="{{ study }}" value="left" required> left</label>
<label><input type="radio" name="{{ study }}" value="right"> right</label>
</fieldset>{% endfor %}<button>Next</button></form>{% endif %}
<p class="done">{{ done }} of {{ total }}</p></html>"""


class StudyError(ValueError):
    """A study that cannot be set up; the message is one line."""


def read_images(specifications):
    """({model: folder}, {file name: prompt}) from NAME=DIR texts: the file names that every folder
    has. StudyError."""
    folders, captions = {}, {}
    for text in specifications:
        name, _, folder = text.partition("=")
        folders[name] = folder = Path(folder)
        if not name or not (folder / "metadata.jsonl").is_file():
            raise StudyError(
                f"--images {text}: expected NAME=DIR with a metadata.jsonl in DIR, as "
                "full/sample.py writes it"
            )
        lines = (folder / "metadata.jsonl").read_text("utf-8").splitlines()
        try:
            known = {r["file_name"]: r["text"] for r in map(json.loads, lines)}
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise StudyError(
                f"--images {text}: a line of its metadata.jsonl is not JSON with file_name and text"
            ) from error
        captions[name] = {f: prompt for f, prompt in known.items() if (folder / f).is_file()}
    if len(folders) < 2:
        raise StudyError("--images: at least two models, each as NAME=DIR")
    shared = set.intersection(*(set(c.items()) for c in captions.values()))
    if not shared:
        raise StudyError("--images: no image has the same file name and prompt in all folders")
    return folders, dict(sorted(shared))


class Votes:
    """The CSV: rows appended under a lock and flushed to the disk; a line that a crash has torn is
    cut off."""

    def __init__(self, path):
        self.path, self.lock = Path(path), threading.Lock()
        text = self.path.read_bytes() if self.path.exists() else b""
        first, ended, _ = text.partition(b"\n")
        header = ",".join(COLUMNS).encode()
        if first.rstrip(b"\r") != header if ended else not header.startswith(first):
            raise StudyError(f"--out {path}: is there and has other columns; name another file")
        whole = text[: text.rfind(b"\n") + 1]
        if whole != text:
            os.truncate(self.path, len(whole))
        if not whole:
            self._write([COLUMNS])
        with open(self.path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        self.answered = {
            (r["voter"], r["prompt"], frozenset((r["left"], r["right"]))) for r in rows
        }

    def _write(self, rows):
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows(rows)
        with open(self.path, "ab") as file:
            file.write(text.getvalue().encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())

    def add(self, voter, name, left, right, choices, check):
        """Write a row for every study at once; False if this voter has answered this pair
        already."""
        key = (voter, name, frozenset((left, right)))
        with self.lock:
            if key in self.answered:
                return False
            now = time.strftime("%Y-%m-%dT%H:%M:%S")
            pair = voter, name, left, right
            self._write([(now, study, *pair, choice, check) for study, choice in choices.items()])
            self.answered.add(key)
        return True


class Study:
    """Which pairs each voter sees, in an order of their own."""

    def __init__(self, folders, prompts, votes, every=10, seed=0):
        self.folders, self.prompts, self.votes = folders, prompts, votes
        self.every, self.seed = every, seed

    def plan(self, voter):
        """[(file name, left, right)] of a voter: every pair of models for every prompt, and
        attention checks."""
        draw = random.Random(f"{self.seed} {voter}")
        plan = [
            (name, *draw.sample(pair, 2))
            for name in self.prompts
            for pair in combinations(sorted(self.folders), 2)
        ]
        draw.shuffle(plan)
        for i in range(self.every // 2, len(plan) + 1, self.every) if self.every else ():
            pair = [draw.choice(sorted(self.folders)), NOISE]
            plan.insert(i, (draw.choice(sorted(self.prompts)), *draw.sample(pair, 2)))
        return plan

    def pending(self, voter):
        """The places in the plan that the voter has not answered."""
        answered = self.votes.answered
        return [
            i
            for i, (name, a, b) in enumerate(self.plan(voter))
            if (voter, name, frozenset((a, b))) not in answered
        ]


def make_app(study):
    """The Flask application. A ticket is a place in the voter's plan; nothing else of a pair is
    sent."""
    from flask import (
        Flask,
        abort,
        make_response,
        redirect,
        render_template_string,
        request,
        send_file,
    )
    from PIL import Image

    app = Flask("vote")
    noise = io.BytesIO()
    Image.frombytes("RGB", (256, 256), random.Random(0).randbytes(3 * 256 * 256)).save(noise, "PNG")

    def pair_of(ticket):
        plan = study.plan(request.cookies.get("voter", ""))
        if not ticket.isdigit() or int(ticket) >= len(plan):
            abort(404)
        return plan[int(ticket)]

    @app.get("/")
    def page():
        voter = request.cookies.get("voter") or f"{random.SystemRandom().getrandbits(64):016x}"
        pending, total = study.pending(voter), len(study.plan(voter))
        values = {
            "finished": not pending,
            "done": total - len(pending),
            "total": total,
            "studies": STUDIES,
        }
        if pending:
            values |= {
                "ticket": pending[0],
                "prompt": study.prompts[study.plan(voter)[pending[0]][0]],
            }
        response = make_response(render_template_string(PAGE, **values))
        response.set_cookie("voter", voter, max_age=10**8, httponly=True, samesite="Strict")
        response.headers["Cache-Control"] = "no-store"
        return response

    @app.get("/image/<ticket>/<side>")
    def image(ticket, side):
        name, left, right = pair_of(ticket)
        if side not in ("left", "right"):
            abort(404)
        model = left if side == "left" else right
        if model == NOISE:
            return send_file(io.BytesIO(noise.getvalue()), "image/png", max_age=0)
        # Read here: sent as a file, its name and date would go along.
        return send_file(
            io.BytesIO((study.folders[model] / name).read_bytes()), "image/png", max_age=0
        )

    @app.post("/vote")
    def vote():
        name, left, right = pair_of(request.form.get("ticket", ""))
        choices = {s: request.form.get(s) for s in STUDIES}
        if not set(choices.values()) <= {"left", "right"}:
            abort(400)
        check = ""
        if NOISE in (left, right):
            good = "right" if left == NOISE else "left"
            check = "passed" if set(choices.values()) == {good} else "failed"
        study.votes.add(request.cookies["voter"], name, left, right, choices, check)
        return redirect("/", 303)

    return app


def main(argv=None):
    """Exit codes: 0 done, 2 a user's mistake (one line says which)."""
    parser = argparse.ArgumentParser(
        prog="full/vote.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--images", nargs="+", required=True, metavar="NAME=DIR", help="the models, at least two"
    )
    parser.add_argument(
        "--out", default="votes.csv", help="CSV that votes are added to (default: votes.csv)"
    )
    parser.add_argument(
        "--check-every",
        type=int,
        default=10,
        help="pairs between attention checks (default: 10; 0: none)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the order of pairs and sides (default: 0)"
    )
    add_page_flags(parser, port=8000)
    arguments = parser.parse_args(argv)
    try:
        folders, prompts = read_images(arguments.images)
        study = Study(
            folders, prompts, Votes(arguments.out), max(0, arguments.check_every), arguments.seed
        )
    except (StudyError, OSError) as error:
        print(f"full/vote.py: {error}", file=sys.stderr)
        return 2
    print(
        f"{len(prompts)} prompts, {len(folders)} models; votes go to {arguments.out}; "
        f"http://{arguments.host}:{arguments.port}"
    )
    make_app(study).run(arguments.host, arguments.port, threaded=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
