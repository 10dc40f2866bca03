"""The newcomer's path: ``make lab``, the first notebook, Run All Cells, then an exercise."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import browser
import pytest
import support
from servers import wait_for

browser.require()

ROOT = Path(__file__).resolve().parent.parent
FIRST = "00_the_whole_flow.ipynb"
OPTIONS = "--no-browser --allow-root --ip=127.0.0.1 --port=0"
WANTED = ("gateway.py", "Makefile", "pyproject.toml", "requirements.txt", "requirements-lock.txt")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A checkout whose first notebook has no outputs yet: a run of it must make them."""
    folder = tmp_path / "clone"
    folder.mkdir()
    for name in WANTED:
        shutil.copy2(ROOT / name, folder)
    (folder / ".parts").mkdir()
    (folder / ".venv").symlink_to(Path(sys.executable).parent.parent)
    for name in ("locale", "notebooks", "tests"):
        left = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        shutil.copytree(ROOT / name, folder / name, ignore=left)
    path = folder / "notebooks" / FIRST
    notebook = json.loads(path.read_text("utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
    path.write_text(json.dumps(notebook), "utf-8")
    return folder


@pytest.fixture
def jupyterlab(clone: Path, tmp_path: Path) -> Iterator[str]:
    """The address of what ``make lab`` starts, for a user who never started it before."""
    homes = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    parent = os.getpid()
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            ["make", "-o", ".venv/done", "lab", f"ARGS={OPTIONS}"],
            cwd=clone,
            env={**os.environ, **{name: str(tmp_path / name) for name in homes}},
            stderr=log,
            preexec_fn=lambda: support.die_with_parent(parent, signal.SIGTERM),
        )
    address = re.compile(r"http://127\.0\.0\.1:\d+/lab\S*token=\w+")
    try:
        yield wait_for(lambda: address.search((tmp_path / "log").read_text()), "its start", 60)[0]
    finally:
        process.terminate()
        process.wait(30)


def outputs(path: Path) -> list[Any]:
    """Of each code cell: its execution count, and what it put out."""

    def texts(cell: Any) -> list[Any]:
        found = cell["outputs"]
        return [
            (out["output_type"], out.get("name"), "".join(out.get("text", ""))) for out in found
        ]

    cells = json.loads(path.read_text("utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    return [(cell["execution_count"], texts(cell)) for cell in code]


EXERCISE = "print(client.call('GET', '/session').status, gateway.__file__)"


def test_the_first_notebook_runs_in_jupyterlab(jupyterlab: str, clone: Path) -> None:
    """Every cell gives what is kept in the repository, and the browser asks nobody else.

    After that the lesson's gateway is open for an exercise, and only the copy has changed.
    """
    before = (clone / "notebooks" / FIRST).read_bytes()
    kept = outputs(ROOT / "notebooks" / FIRST)
    assert {out[:2] for _, outs in kept for out in outs} == {("stream", "stdout")}, "no errors"
    with browser.chromium() as chromium, browser.tab(chromium, 1280) as (page, requests):
        page.set_default_timeout(60_000)
        page.goto(jupyterlab)
        page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        page.get_by_text(f"[{kept[-1][0]}]:", exact=True).wait_for()
        saving = f"{urlsplit(jupyterlab).netloc}/api/contents/notebooks/{FIRST}"
        with page.expect_response(
            lambda answer: saving in answer.url and answer.request.method == "PUT"
        ) as saved:
            page.keyboard.press("Control+s")
        assert saved.value.ok
        assert outputs(clone / "my" / "notebooks" / FIRST) == kept
        page.keyboard.press("Control+End")
        page.locator(".jp-Notebook .jp-Cell").last.click()
        page.keyboard.press("Escape")
        page.keyboard.press("b")
        page.keyboard.press("Enter")
        page.keyboard.insert_text(EXERCISE)
        page.keyboard.press("Shift+Enter")
        page.get_by_text(f"401 {clone / 'my' / 'gateway.py'}").wait_for()
        listed = page.evaluate("fetch('/api/contents').then(answer => answer.json())")
        names = {file["name"] for file in listed["content"]}
        assert names >= {"gateway.py", "notebooks", "tests"}, "what exercises change can be opened"
    assert (clone / "notebooks" / FIRST).read_bytes() == before
    hosts = {urlsplit(url).netloc for url in requests} - {""}  # what it draws itself is data:
    assert hosts == {urlsplit(jupyterlab).netloc}
