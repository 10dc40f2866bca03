"""The changes that ``make mutants`` tries are changes, and its reasons are about some of them."""

from __future__ import annotations

import ast
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import mutants
import pytest
from test_shape import LINES, ROOT, SOURCE, section_of


@pytest.fixture(scope="module")
def every() -> list[mutants.Mutant]:
    """All of them: a second of work, which whoever only collects the tests is spared."""
    return mutants.mutants()


@pytest.mark.slow
@pytest.mark.parametrize("n", range(10))
def test_a_mutant_is_a_module_that_differs_in_one_place(
    n: int, every: list[mutants.Mutant]
) -> None:
    one = random.Random(0).sample(every, 10)[n]
    text = one.text
    assert text != SOURCE
    assert ast.parse(text)
    before, after = SOURCE.splitlines(), text.splitlines()
    same = len(after) - (len(before) - one.last)
    assert before[: one.first - 1] == after[: one.first - 1]
    assert before[one.last :] == after[same:]


def test_they_are_of_the_protocol(every: list[mutants.Mutant]) -> None:
    found = {section_of(one.first) for one in every}
    assert found == {*mutants.SECTIONS, 13}
    assert len(every) > 900


def test_a_reason_is_about_a_mutant_that_is_there(every: list[mutants.Mutant]) -> None:
    """When its line has changed, it must be thought about again."""
    assert mutants.SURVIVORS.keys() <= {one.name for one in every}


def test_what_runs_at_import_is_touched_by_who_names_it(every: list[mutants.Mutant]) -> None:
    one = next(one for one in every if one.name.startswith("LIMITED_BY") or "Final" in one.name)
    users = {LINES[n - 1].strip() for n in mutants._users({one.first})}
    drawn = {"seconds": {"tests/test_x.py::test_y": 1}, "lines": {key: [0] for key in users}}
    assert mutants.Map(drawn).tests_of(one) == ["tests/test_x.py::test_y"]
    assert mutants.Map({"seconds": {}, "lines": {}}).tests_of(one) == []


@pytest.mark.slow
def test_a_change_is_noticed_or_survives(tmp_path: Path) -> None:
    """By a test that seals one number twice: it does not see how long the result is."""
    test = "tests/test_sealing.py::test_same_number_gives_the_same_bytes"
    line = 'return _sealer(secret, hawk_id).encrypt(int(msisdn[1:]).to_bytes(8, "big"), None)'
    drawn, out = tmp_path / "map.json", tmp_path / "out.json"
    drawn.write_text(json.dumps({"seconds": {test: 0.1}, "lines": {line: [0]}}))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}/tests:{ROOT}/notebooks:{ROOT}"}
    command = [sys.executable, "tests/mutants.py", "--drawn", str(drawn), "--out", str(out)]
    found = {}
    for only in (f"{line} | 8 ->", f"{line} | "):  # a second run goes on where the first ended
        ended = subprocess.run(
            [*command, "--only", only], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert "without a reason" in ended.stdout, ended.stderr
        assert ended.returncode == 1
        results = [json.loads(text) for text in out.read_text().splitlines()]
        found = {result["name"].removeprefix(f"{line} | "): result["noticed"] for result in results}
        assert len(found) == len(results)
    assert found["8 -> 9"] == ""
    assert found["\"big\" -> 'bigX'"] == test
    assert len(found) == 4
