"""full/vote.py in a real browser, headless Chromium: what a voter sees and clicks. Needs Chromium
or Chrome on the PATH, so it is asked for by name: python -m pytest -m browser."""

import threading

import pytest
from test_full_vote import red_side, rows, study

pytestmark = pytest.mark.browser


@pytest.fixture
def site(folders, tmp_path):
    """(address, file of the votes) of a study that is being served."""
    from werkzeug.serving import make_server

    from full.study import vote

    path = tmp_path / "votes.csv"
    server = make_server(
        "127.0.0.1", 0, vote.make_app(study(folders, path, every=4)), threaded=True
    )
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", path
    server.shutdown()
    thread.join()


def vote_to_the_end(page, address, picture=None):
    """Click through every pair, the red image's side each time; returns how many pages that
    took."""
    page.goto(address)
    for count in range(100):
        page.wait_for_load_state("load")
        if not page.locator("form").count():
            return count
        assert page.locator("img").evaluate_all(
            "all => all.map(i => i.complete && i.naturalWidth > 0)"
        ) == [True, True]
        if picture and count == 0:
            page.screenshot(path=picture)
        sources = page.locator("img").evaluate_all("all => all.map(i => i.src)")
        side = red_side(*(page.request.get(source).body() for source in sources))
        for name in ("prompt_following", "quality"):
            page.check(f'input[name="{name}"][value="{side}"]')
        with page.expect_navigation():
            page.click("form button")
    raise AssertionError("the study does not end")


def test_two_people_click_through_a_study(site, browser, tmp_path):
    address, path = site
    errors, voters = [], []
    for i in range(2):
        page = browser.new_context(viewport={"width": 1000, "height": 800}).new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on(
            "console",
            lambda message: errors.append(message.text) if message.type == "error" else None,
        )
        assert (
            vote_to_the_end(page, address, tmp_path / "first.png" if i == 0 else None) == 6
        )  # five pairs and a check
        assert "prompt 0" not in page.content()  # none is left
        voters.append(page)
    assert [e for e in errors if "favicon" not in e.lower() and "404" not in e] == []
    written = rows(path)
    assert len(written) == 2 * 6 * 2 and len({r["voter"] for r in written}) == 2
    for row in written:  # both clicked the red one: ours, on whichever side it stood
        winner = row["left"] if row["choice"] == "left" else row["right"]
        assert winner == "ours" or row["check"] == "passed"
    assert {r["check"] for r in written} == {"", "passed"}


def test_a_prompt_is_text_and_both_questions_must_be_answered(site, browser):
    address, path = site
    page = browser.new_page()
    page.goto(address)
    assert (
        page.locator("text=<b>prompt").count() == 1
        and page.locator("b", has_text="prompt").count() == 0
    )
    before = page.url, path.read_text()
    page.check('input[name="quality"][value="left"]')
    page.click("form button")
    assert (page.url, path.read_text()) == before  # the browser asks for the other answer
