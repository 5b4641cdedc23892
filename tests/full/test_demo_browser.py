"""full/demo.py and toy/demo.py in headless Chromium: what is chosen is drawn, at once and the same
every time."""

import re

import pytest
import tiny_checkpoints as tiny

from full import demo as full_demo
from toy import demo as toy_demo
from toy import run as toy_run

pytestmark = pytest.mark.browser


@pytest.fixture
def open_page(browser):  # noqa: F811
    """A function that serves a gradio page and opens it."""
    served = []

    def open_one(blocks):
        address = blocks.launch(prevent_thread_lock=True, quiet=True)[1]
        served.append(blocks)
        page = browser.new_page()
        page.goto(address)
        return page

    yield open_one
    for blocks in served:
        blocks.close()


def drawn(page, number=0, but=None):
    """The address of an image that was drawn, as soon as it is another than `but`: gradio names
    files by what is in them."""
    images = page.locator('img[src^="http"]')
    for _ in range(600):
        sources = [image.get_attribute("src") for image in images.all()]
        if len(sources) > number and sources[number] != but:
            return sources[number]
        page.wait_for_timeout(100)
    raise AssertionError(f"nothing new was drawn in a minute: {sources}")


def test_the_page_of_a_pipeline_draws_what_is_typed(open_page, tmp_path):
    from diffusers import AutoPipelineForText2Image

    folder = tiny.write_sd(tmp_path / "sd")
    arguments = full_demo.parse_arguments(["--pipeline", str(folder), "--device", "cpu"])
    pipe = full_demo.place(AutoPipelineForText2Image, arguments)
    page = open_page(full_demo.make_page(full_demo.make_draw(pipe, folder), 4))
    first = drawn(page)
    page.get_by_label("prompt").fill("another thing")
    second = drawn(page, but=first)
    page.get_by_label("2", exact=True).check()
    third = drawn(page, but=second)
    page.get_by_label("1", exact=True).check()
    assert drawn(page, but=third) == second and len({first, second, third}) == 3
    assert re.fullmatch(r"\d+ ms", page.get_by_label("time").input_value())


def test_the_page_of_a_run_shows_student_and_teacher(open_page, tmp_path):
    assert (
        toy_run.main(
            ["--preset", "tiny", "--dataset", "glyphs", "--device", "cpu", "--out", str(tmp_path)]
        )
        == 0
    )
    page = open_page(toy_demo.make_page(*toy_demo.make_draw(tmp_path)))
    student, teacher = drawn(page, 0), drawn(page, 1)
    page.get_by_label("seed").fill("5")
    assert drawn(page, 0, but=student) != drawn(page, 1, but=teacher)
    times = [box.input_value() for box in page.get_by_label("time").all()]
    assert len(times) == 2 and all(re.fullmatch(r"\d+ ms for 16 images", text) for text in times)


def test_a_folder_that_is_no_run_ends_in_one_line(tmp_path, capsys):
    assert toy_demo.main(["--run", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(
        f"toy/demo.py: --run {tmp_path}: no finished run there"
    )
    assert full_demo.main(["--pipeline", str(tmp_path), "--device", "cpu"]) == 2
    assert (
        capsys.readouterr()
        .err.strip()
        .splitlines()[-1]
        .startswith(f"full/demo.py: --pipeline {tmp_path}: cannot be loaded")
    )
