"""toy/report.py: the student against its goals."""

import pytest

from toy.report import goals


def test_goals_by_hand():
    """Held against the teacher's row at its most steps and its best guidance."""
    names = "steps guidance fd accuracy precision recall variance_pixels variance_features".split()
    teacher = [[4, 2, *[9] * 6], [50, 1, *[9] * 6], [50, 2, 4, 0.9, 0.9, 0.8, 2, 5]]
    student = [[k, 1, fd, 0.98, 0.88, 0.6, 1.6, 4.5] for k, fd in ((1, 2), (2, 3), (4, 3.6))]
    teacher = [dict(zip(names, row, strict=True)) for row in teacher]
    student = [dict(zip(names, row, strict=True)) for row in student]
    rows = goals({"teacher": teacher, "best_guidance": 2, "student": student}, "long")
    expected = [0.5, 0.75, 0.9, 1.2, 0.98, 0.98, -0.02, 0.75, 0.8, 0.9]
    assert [value for _, value, *_ in rows] == pytest.approx(expected)
    assert [met for *_, met in rows] == [True] + [False] * 8 + [True]


def test_goals_of_colour_images_are_held_against_the_teachers_accuracy():
    names = "steps guidance fd accuracy precision recall".split()
    teacher = [dict(zip(names, [50, 1, 4, 0.5, 0.9, 0.4], strict=True))]
    student = [[k, 1, fd, accuracy, 0.1, 0.29] for k, fd, accuracy in ((1, 4, 0.48), (4, 3, 0.46))]
    student = [dict(zip(names, row, strict=True)) for row in student]
    results = {"teacher": teacher, "best_guidance": 1, "student": student, "colour": True}
    rows = goals(results, "cifar-cpu")
    assert rows == goals(results, "gpu")
    assert [value for _, value, *_ in rows] == pytest.approx([1, 0.75, -0.02, -0.04, 0.725])
    assert [met for *_, met in rows] == [True, True, True, False, False]
