"""full/vote.py through its pages: what a voter sees, what is written, and that neither is lost or
given away."""

import csv
import re
import threading
import time

import pytest
from PIL import Image

from full.study import elo, vote


def study(folders, path, **more):
    images, prompts = vote.read_images(folders)
    return vote.Study(images, prompts, vote.Votes(path), **more)


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def answer(client, choose):
    """Vote until the end; choose(left image's bytes, right's) gives the answer to both questions.
    Returns the pages."""
    pages = []
    while True:
        page = client.get("/").text
        pages.append(page)
        found = re.search(r'name="ticket" value="(\d+)"', page)
        if not found:
            return pages
        sides = [client.get(f"/image/{found[1]}/{side}").data for side in ("left", "right")]
        choice = choose(*sides)
        assert (
            client.post(
                "/vote", data={"ticket": found[1], "prompt_following": choice, "quality": choice}
            ).status_code
            == 303
        )


def colour(data):
    import io

    return Image.open(io.BytesIO(data)).convert("RGB").getpixel((0, 0))


def red_side(left, right):
    """The red image's side; against noise the plain image's."""
    flat = [len(data) < 2000 for data in (left, right)]
    if not all(flat):
        return "left" if flat[0] else "right"
    return "left" if colour(left)[0] > 100 else "right"


def test_a_voter_answers_every_pair_and_elo_reads_it(folders, tmp_path):
    out = tmp_path / "votes.csv"
    voting = study(folders, out, every=4)
    client = vote.make_app(voting).test_client()
    client.set_cookie(
        "voter", "one"
    )  # whose plan, unlike one in a hundred, has two checks that differ
    pages = answer(client, red_side)
    written = rows(out)
    checks = [r for r in written if r["check"]]
    assert (
        len(written) - len(checks) == 2 * 5
        and len(checks) >= 2
        and {r["check"] for r in checks} == {"passed"}
    )
    assert {r["left"] for r in written if not r["check"]} == {"ours", "theirs"}  # both sides occur
    games, excluded = elo.read_votes([out])
    assert (
        not excluded
        and {(g.first if g.score else g.second) for g in games} == {"ours"}
        and len(games) == 10
    )
    assert (
        "That was all" in pages[-1]
        and "&lt;b&gt;prompt" in pages[0]
        and "<b>prompt" not in pages[0]
    )
    for page in pages:
        assert "ours" not in page and "theirs" not in page and "0000.png" not in page


def test_who_does_not_look_fails_the_checks_and_is_left_out(folders, tmp_path):
    out = tmp_path / "votes.csv"
    app = vote.make_app(study(folders, out, every=2))
    answer(app.test_client(), lambda *sides: {"left": "right", "right": "left"}[red_side(*sides)])
    answer(app.test_client(), red_side)
    careless = {r["voter"] for r in rows(out) if r["check"] == "failed"}
    assert len(careless) == 1 and elo.read_votes([out])[1] == list(careless)


def test_voters_have_orders_of_their_own_and_come_back_to_theirs(folders, tmp_path):
    voting = study(folders, tmp_path / "votes.csv")
    assert voting.plan("u") == voting.plan("u") != voting.plan("w")
    client = vote.make_app(voting).test_client()
    client.get("/")
    before = client.get("/").text
    assert before == client.get("/").text


def test_a_pair_answered_twice_counts_once_and_a_restart_remembers(folders, tmp_path):
    out = tmp_path / "votes.csv"
    client = vote.make_app(study(folders, out)).test_client()
    client.get("/")
    for choice in ("left", "right"):
        client.post("/vote", data={"ticket": "0", "prompt_following": choice, "quality": choice})
    assert [r["choice"] for r in rows(out)] == ["left", "left"]
    again = study(folders, out)
    assert 0 not in again.pending(rows(out)[0]["voter"]) and len(again.votes.answered) == 1


def test_a_torn_last_line_is_cut_off(folders, tmp_path):
    out = tmp_path / "votes.csv"
    votes = vote.Votes(out)
    votes.add("u", "0000.png", "ours", "theirs", {"quality": "left"}, "")
    whole = out.read_bytes()
    out.write_bytes(whole + b"2026-01-01T00:00:00,qual")
    votes = vote.Votes(out)
    assert out.read_bytes() == whole and len(votes.answered) == 1


def test_many_at_once_write_whole_lines(tmp_path):
    votes = vote.Votes(tmp_path / "votes.csv")

    def cast(voter):
        for i in range(20):
            votes.add(
                f"voter, {voter}",
                f"{i}\n",
                "a",
                "b",
                {"quality": "left", "prompt_following": "right"},
                "",
            )

    threads = [threading.Thread(target=cast, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(rows(votes.path)) == 8 * 20 * 2
    assert len(vote.Votes(votes.path).answered) == 8 * 20


def test_a_double_click_writes_one_answer(tmp_path, monkeypatch):
    votes, write = vote.Votes(tmp_path / "votes.csv"), vote.Votes._write
    monkeypatch.setattr(
        vote.Votes, "_write", lambda self, lines: (time.sleep(0.2), write(self, lines))
    )  # both are inside
    cast = ("u", "0000.png", "ours", "theirs", {"quality": "left"}, "")
    threads = [threading.Thread(target=votes.add, args=cast) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(rows(votes.path)) == 1


@pytest.mark.parametrize(
    "path",
    [
        "/image/0/middle",
        "/image/999/left",
        "/image/../../etc/passwd",
        "/image/-1/left",
        "/image/x/left",
    ],
)
def test_only_pairs_of_the_plan_are_served(folders, tmp_path, path):
    client = vote.make_app(study(folders, tmp_path / "votes.csv")).test_client()
    client.get("/")
    assert client.get(path).status_code == 404


def test_an_answer_that_is_none_is_not_written(folders, tmp_path):
    client = vote.make_app(study(folders, tmp_path / "votes.csv")).test_client()
    client.get("/")
    assert client.post("/vote", data={"ticket": "0", "quality": "left"}).status_code == 400
    assert (
        client.post(
            "/vote", data={"ticket": "0", "quality": "left", "prompt_following": "=1+1"}
        ).status_code
        == 400
    )
    assert rows(tmp_path / "votes.csv") == []


def test_mistakes_end_in_one_line(folders, tmp_path, capsys):
    foreign = {"other.csv": b"a,b\n1,2\n", "notes.txt": b"no line ends", "torn.csv": b"a,b\n1"}
    for name, text in foreign.items():
        (tmp_path / name).write_bytes(text)
    (tmp_path / "untitled").mkdir()
    (tmp_path / "untitled" / "metadata.jsonl").write_text('{"text": "a"}\n')
    for arguments, words in (
        (["--images", folders[0]], "at least two"),
        (["--images", folders[0], "x=/nowhere"], "metadata.jsonl"),
        (["--images", folders[0], f"x={tmp_path}/untitled"], "file_name and text"),
        *(
            (["--images", *folders, "--out", str(tmp_path / name)], "other columns")
            for name in foreign
        ),
    ):
        assert vote.main(arguments) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and words in message
    assert all((tmp_path / name).read_bytes() == text for name, text in foreign.items())
