"""The calls in the reference, ``notebooks/integrate/examples.json``: by both clients, and by curl.

Those in Python are made when the file is made. Those in JavaScript and by curl are made here, and
must have the same outcomes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import conf
import make_examples
import pytest
from make_examples import NUMBER, SPANIARD
from test_clients import World, client_py, needs_node
from test_clients import world as world

import gateway

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES: list[Any] = json.loads(make_examples.FILE.read_text("utf-8"))


def answered(example: Any) -> Any:
    """The JSON of the answer in an example."""
    return json.loads(example["answer"].partition("\n\n")[2] or "{}")


def shape(value: Any) -> Any:
    """The names in an answer, and its errno; no value that differs from one call to another."""
    if isinstance(value, dict):
        if "errno" in value:
            return value["errno"]
        return {name: shape(part) for name, part in value.items() if name != "keys"}
    return type(value).__name__


def test_the_file_is_what_its_script_writes() -> None:
    """Run ``python tests/make_examples.py`` and look at the difference."""
    assert make_examples.FILE.read_text("utf-8") == make_examples.text()


pytestmark = pytest.mark.slow
OTHERS = {"sms_receipt", "warning", "api_specs", "openapi", "errors", "metrics", "press"}
"""Of no client, or too long to show."""


def test_every_route_has_an_example() -> None:
    """In one of its spellings."""
    shown = {gateway.ROUTES[n].handler for n, r in enumerate(gateway.ROUTES)
             for e in EXAMPLES if e["route"] == r.path}  # fmt: skip
    every = {route.handler for route in gateway.ROUTES}
    assert every - shown == OTHERS


CALLS = [example for example in EXAMPLES if example["python"] or example["form"]]


@needs_node
def test_the_calls_in_javascript(world: World) -> None:
    what = {"path": str(ROOT / "notebooks" / "client.mjs"), "url": world.url, "steps": CALLS}
    what |= {"token": world.app.token, "numbers": [NUMBER, SPANIARD]}
    done = subprocess.run(
        ["node", str(ROOT / "tests" / "run_examples.mjs")], input=json.dumps(what),
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    compare(json.loads(done.stdout))


def compare(outcomes: list[Any]) -> None:
    """What came, with what came when the file was made."""
    for example, outcome in zip(CALLS, outcomes, strict=True):
        wanted = shape(answered(example))
        if wanted != 114:  # this world has no gaps between messages
            assert shape(outcome) == wanted, example["about"]


@pytest.mark.skipif(not shutil.which("curl"), reason="not installed: apt-get install curl")
def test_the_calls_by_curl(world: World) -> None:
    """Each as the page shows it, by a shell that finds ``python`` and ``client.py``."""
    outcomes, token, folder = [], "", Path(sys.executable).parent
    for example in CALLS:
        command = conf.in_curl(example).replace("http://localhost:5000", world.url)
        if example["form"]:
            hawk_id = client_py.derive_credentials(token)[0]
            command = re.sub("[0-9a-f]{64}", hawk_id, command)
        if code := re.search('"code": "([0-9a-f]{6,})"', command.replace("000000", "")):
            number = NUMBER if len(code[1]) == 6 else SPANIARD
            command = command.replace(code[1], world.code(number))
        done = subprocess.run(
            ["bash", "-ec", command], capture_output=True, text=True, cwd=ROOT / "notebooks",
            env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "TOKEN": token},
        )  # fmt: skip
        assert done.returncode == 0, (command, done.stderr)
        outcomes.append(json.loads(done.stdout or "{}"))
        token = outcomes[-1].get("msisdnSessionToken", token)
    compare(outcomes)
