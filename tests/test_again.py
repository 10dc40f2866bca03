"""What ``make test`` does with a few failures: once more, alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import again
import pytest

TESTS = Path(__file__).parent
FILE = """
import os, pathlib

def test_late():
    (here := pathlib.Path('seen')).open("a").write("x")
    assert here.read_text() == "xx"

def test_wrong():
    assert False

def test_right():
    pass
"""
INI = "[pytest]\naddopts = -p no:nbval -p no:schemathesis -p no:valkey -p no:cov"


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Start Python in a folder."""
    environ = {"PYTHONPATH": str(TESTS), "PATH": ""}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True)


@pytest.mark.slow
def test_what_passes_alone_is_named_and_what_fails_again_is_a_failure(tmp_path: Path) -> None:
    """With the project's own conftest.py, which writes down what failed."""
    (tmp_path / "test_file.py").write_text(FILE)
    (tmp_path / "pytest.ini").write_text(INI)
    first = ["-m", "pytest", "-p", "conftest", "-p", "xdist", "test_file.py"]
    assert "2 failed, 1 passed" in run(tmp_path, *first).stdout
    failed = json.loads((tmp_path / again.FAILED).read_text())
    assert failed == ["test_file.py::test_late", "test_file.py::test_wrong"]
    both = run(tmp_path, str(TESTS / "again.py"))
    assert both.returncode == 1
    assert "1 failed, 1 passed" in both.stdout
    (tmp_path / "seen").write_text("x")
    (tmp_path / again.FAILED).write_text(json.dumps(failed[:1]))
    late = run(tmp_path, str(TESTS / "again.py"))
    assert late.returncode == 0
    assert "PASSED ALONE, to be looked for: test_file.py::test_late" in late.stdout


@pytest.mark.parametrize("count", [0, again.MOST + 1])
def test_many_failures_are_no_accident(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.chdir(tmp_path)
    again.FAILED.parent.mkdir(parents=True)
    again.FAILED.write_text(json.dumps([f"test_file.py::test_{n}" for n in range(count)]))
    assert again.main() == 1


def test_a_notebook_is_run_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    again.FAILED.parent.mkdir(parents=True)
    again.FAILED.write_text(json.dumps([f"notebooks/a.ipynb::Cell {n}" for n in range(9)]))
    calls: list[list[str]] = []

    def started(command: list[str]) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", started)
    assert again.main() == 0
    assert calls == [[sys.executable, "-m", "pytest", "-n", "0", "notebooks/a.ipynb"]]
