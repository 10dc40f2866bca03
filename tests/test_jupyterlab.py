"""The newcomer's path: JupyterLab as the README starts it, the first notebook, Run All Cells."""

from __future__ import annotations

import json
import os
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
OPTIONS = ("--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with what the notebooks need, and with what a run of the first one must make."""
    folder = tmp_path / "clone"
    folder.mkdir()
    shutil.copy(ROOT / "gateway.py", folder)
    for name in ("locale", "notebooks"):
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
    """The address of ``jupyter lab notebooks``, for a user who never started it before."""
    homes = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    parent = os.getpid()
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [Path(sys.executable).parent / "jupyter", "lab", "notebooks", *OPTIONS],
            cwd=clone,
            env={**os.environ, **{name: str(tmp_path / name) for name in homes}},
            stderr=log,
            preexec_fn=lambda: support.die_with_parent(parent, signal.SIGTERM),
        )
    try:
        written = wait_for(lambda: [*tmp_path.glob("*/jpserver-*.json")], "its start", 60)
        server = wait_for(lambda: written[0].read_text(), "its description")
        yield "{url}lab?token={token}".format_map(json.loads(server))
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


def test_the_first_notebook_runs_in_jupyterlab(jupyterlab: str, clone: Path) -> None:
    """Every cell gives what is kept in the repository, and the browser asks nobody else."""
    kept = outputs(ROOT / "notebooks" / FIRST)
    assert {out[:2] for _, outs in kept for out in outs} == {("stream", "stdout")}, "no errors"
    with browser.chromium() as chromium, browser.tab(chromium, 1280) as (page, requests):
        page.set_default_timeout(60_000)
        page.goto(jupyterlab)
        page.get_by_text(FIRST).dblclick()
        page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        page.get_by_text(f"[{kept[-1][0]}]:", exact=True).wait_for()
        saving = f"{urlsplit(jupyterlab).netloc}/api/contents/{FIRST}"
        with page.expect_response(
            lambda answer: saving in answer.url and answer.request.method == "PUT"
        ) as saved:
            page.keyboard.press("Control+s")
        assert saved.value.ok
    assert outputs(clone / "notebooks" / FIRST) == kept
    hosts = {urlsplit(url).netloc for url in requests} - {""}  # what it draws itself is data:
    assert hosts == {urlsplit(jupyterlab).netloc}
