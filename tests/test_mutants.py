"""The changes that ``make mutants`` tries are changes, and its reasons are about some of them."""

from __future__ import annotations

import ast
import random

import mutants
import pytest
from test_shape import LINES, SOURCE, section_of

EVERY = mutants.mutants()
SAMPLE = random.Random(0).sample(EVERY, 10)


@pytest.mark.parametrize("n", range(len(SAMPLE)))
def test_a_mutant_is_a_module_that_differs_in_one_place(n: int) -> None:
    one, text = SAMPLE[n], SAMPLE[n].text
    assert text != SOURCE
    assert ast.parse(text)
    before, after = SOURCE.splitlines(), text.splitlines()
    same = len(after) - (len(before) - one.last)
    assert before[: one.first - 1] == after[: one.first - 1]
    assert before[one.last :] == after[same:]


def test_they_are_of_the_protocol() -> None:
    found = {section_of(one.first) for one in EVERY}
    assert found == {*mutants.SECTIONS, 13}
    assert len(EVERY) > 900


def test_a_reason_is_about_a_mutant_that_is_there() -> None:
    """When its line has changed, it must be thought about again."""
    assert mutants.SURVIVORS.keys() <= {one.name for one in EVERY}


def test_what_runs_at_import_is_touched_by_who_names_it() -> None:
    one = next(one for one in EVERY if one.name.startswith("LIMITED_BY") or "Final" in one.name)
    users = {LINES[n - 1].strip() for n in mutants._users(one.first)}
    touched = {line: ["tests/test_x.py::test_y"] for line in users}
    assert mutants.tests_of(one, touched) == ["tests/test_x.py::test_y"]
    assert mutants.tests_of(one, {}) == []
