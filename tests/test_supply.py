"""What a gateway runs on: nothing that is not pinned, with hashes, under licences that suit."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import distribution, files, requires, version
from pathlib import Path

import lock
import pytest
import urllib3
from packaging.markers import Marker
from packaging.requirements import Requirement
from support import GatewayProcess, free_port

import gateway

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = lock.CHOSEN.read_text("utf-8")
LOCK = lock.LOCK.read_text("utf-8")
TO_RUN, AMAZON, TO_LEARN = lock.chosen()
SUIT_MPL = {
    *("Apache License 2.0", "Apache Software License", "Apache-2.0", "BSD License"),
    *("BSD-2-Clause", "BSD-3-Clause", "MIT", "MIT-0"),
}
"""Licences under which a program under MPL-2.0 may use a package, and be given away with it."""


def locked(part: str) -> dict[str, tuple[str, str]]:
    """Name to version and marker, of all entries that this system and Python install."""
    found = {}
    for entry in lock.entries(part):
        head = entry.partition(" \\\n")[0]
        pin, _, marker = head.partition(" ; ")
        name, _, pinned = pin.partition("==")
        if not marker or Marker(marker).evaluate():
            assert lock.normal(name) not in found, "pinned twice"
            found[lock.normal(name)] = (pinned, marker)
    return found


def needs(name: str) -> set[str]:
    """What an installed distribution needs here."""
    wanted = [Requirement(text) for text in requires(name) or []]
    here = [w for w in wanted if not w.marker or w.marker.evaluate({"extra": ""})]
    return {lock.normal(w.name) for w in here}


# -- requirements.txt ---------------------------------------------------------


def test_inline_metadata_is_the_first_part_of_the_requirements() -> None:
    source = (ROOT / "gateway.py").read_text("utf-8")
    block = re.search(r"^# /// script\n(.*?)^# ///$", source, re.M | re.S)
    assert block
    metadata = tomllib.loads(re.sub("^# ?", "", block[1], flags=re.M))
    to_run = REQUIREMENTS.split("\n\n")[0]
    pinned = [line.split(" ")[0] for line in to_run.splitlines() if not line.startswith("#")]
    assert metadata["dependencies"] == pinned
    assert metadata["requires-python"] == ">=3.11"


def test_each_requirement_is_pinned_and_explained() -> None:
    lines = [line for line in REQUIREMENTS.splitlines() if line and not line.startswith("#")]
    assert [n for n in lines if not re.fullmatch(r"[\w.-]+==\S+  # \S.*", n)] == []
    assert len(lines) == len(TO_RUN) + len(AMAZON) + len(TO_LEARN)


@pytest.mark.parametrize("parts", [(TO_RUN,), (TO_RUN, AMAZON)], ids=["to run", "with Amazon"])
def test_those_who_run_pin_also_what_the_pinned_need(parts: tuple[dict[str, str], ...]) -> None:
    here = {n for part in parts for n, pin in part.items() if applies(pin)}
    assert {need for name in here for need in needs(name)} <= here


def applies(pin: str) -> bool:
    """Whether this system and Python install it."""
    _, _, marker = pin.partition(";")
    return not marker or Marker(marker).evaluate()


# -- requirements-lock.txt ----------------------------------------------------


def test_the_lock_has_all_that_is_chosen_in_the_same_parts() -> None:
    to_run, amazon, everything_else = LOCK.split("\n\n")
    for part, chosen in ((to_run, TO_RUN), (amazon, AMAZON)):
        assert len(lock.entries(part)) == len(chosen)
    for part, chosen in ((to_run, TO_RUN), (amazon, AMAZON), (everything_else, TO_LEARN)):
        pinned = locked(part)
        here = {name: pin.partition(";")[0] for name, pin in chosen.items() if applies(pin)}
        assert {name: pinned[name][0] for name in here} == here, "make lock"


def test_each_entry_of_the_lock_is_one_version_with_hashes() -> None:
    one = r"[\w.-]+==\S+(?: ; [^\\\n]+)?(?: \\\n    --hash=sha256:[0-9a-f]{64})+\n"
    assert all(re.fullmatch(one, entry) for entry in lock.entries(LOCK))
    assert "".join(lock.entries(LOCK)) == re.sub(r"^(#.*)?\n", "", LOCK, flags=re.M)


def test_what_is_installed_is_what_the_lock_says_and_it_is_complete() -> None:
    pinned = locked(LOCK)
    assert {name: version(name) for name in pinned} == {n: v for n, (v, _) in pinned.items()}
    assert {need for name in pinned for need in needs(name)} <= pinned.keys()


def made(target: str) -> list[str]:
    """What ``make`` would do on a fresh clone."""
    told = ["make", "-nB", target]
    return subprocess.run(
        told, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()


def test_who_only_runs_the_server_installs_only_the_first_part() -> None:
    """``make runserver`` on a fresh clone; the commands of the server need no more either."""
    told = made("runserver")
    (line,) = (line for line in told if "pip install" in line)
    shown, _, install = line.partition(" | ")
    assert install.endswith("--require-hashes -r /dev/stdin")
    first = subprocess.run(shown, shell=True, cwd=ROOT, capture_output=True, text=True, check=True)
    assert first.stdout.strip() == LOCK.split("\n\n")[0]


@pytest.mark.parametrize("target", ["runserver", "amazon", "install", "test"])
def test_nothing_is_installed_without_hashes(target: str) -> None:
    installs = [line for line in made(target) if "pip install" in line]
    assert installs
    assert all("--require-hashes -r " in line for line in installs)


def test_amazon_is_the_first_two_parts() -> None:
    (line,) = (line for line in made("amazon") if "NR <= 2" in line)
    shown, _, _ = line.partition(" | ")
    told = subprocess.run(shown, shell=True, cwd=ROOT, capture_output=True, text=True, check=True)
    assert locked(told.stdout) == locked("\n\n".join(LOCK.split("\n\n")[:2]))


# -- What runs ----------------------------------------------------------------


@pytest.fixture(scope="module")
def first_part(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Python with its standard library and the distributions of the first part, as a command."""
    site = tmp_path_factory.mktemp("site")
    for name in (name for name, pin in TO_RUN.items() if applies(pin)):
        for top in {file.parts[0] for file in files(name) or []} - {".."}:
            if not (site / top).exists():
                (site / top).symlink_to(str(distribution(name).locate_file(top)))
    return ["env", f"PYTHONPATH={site}", sys.executable, "-S"]  # -S: without site-packages


@pytest.mark.slow
def test_a_gateway_runs_on_the_first_part_alone(first_part: list[str], tmp_path: Path) -> None:
    """Whatever it imports there is of the standard library, or pinned with hashes."""
    alone = [*first_part, "-c", "import pytest"]
    assert subprocess.run(alone, capture_output=True).returncode == 1
    process = GatewayProcess(tmp_path, "--workers", "2", python=first_part)
    try:
        client = process.client()
        client.register()
        assert client.verify("+447700900123").status == 200
        settings = gateway.Settings(keys_dir=str(tmp_path / "keys"))
        owner = {"Authorization": f"Bearer {gateway.load_operator_token(settings)}"}
        for path in ("/", "/openapi.json", "/.well-known/jwks.json", "/errors", "/metrics"):
            assert urllib3.request("GET", process.url + path, headers=owner).status == 200
        assert process.stop() == 0
    finally:
        process.close()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["demo", "settings", "messages", "--version"])
def test_so_do_its_commands(first_part: list[str], tmp_path: Path, command: str) -> None:
    environ = {**os.environ, "GATEWAY_PORT": str(free_port())}  # one may run on the default port
    told = subprocess.run(
        [*first_part, str(ROOT / "gateway.py"), command],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
    )
    assert (told.returncode, told.stderr) == (0, "")


# -- Licences -----------------------------------------------------------------


def test_licences_are_listed_as_the_packages_tell_them() -> None:
    assert lock.licences() in lock.TABLE.read_text("utf-8"), "make lock"


def test_each_licence_suits() -> None:
    """Of alternatives one is enough."""
    for line in lock.licences().splitlines()[2:]:
        _, name, told, _ = (cell.strip() for cell in line.split("|"))
        choices = re.split(" or ", told, flags=re.I)
        assert any(set(one.split(" AND ")) <= SUIT_MPL for one in choices), f"{name}: {told}"
    assert "Mozilla Public License Version 2.0" in (ROOT / "LICENSE").read_text("utf-8")


# -- make lock ----------------------------------------------------------------


def test_a_lock_is_put_in_parts() -> None:
    entry = "{} \\\n    --hash=sha256:" + "0" * 64 + "\n"
    flat = "".join(entry.format(n) for n in ("boto3==1", "Bottle==2", "zipp==3 ; os_name == 'x'"))
    to_run, amazon, rest = lock.in_parts(flat).split("\n\n")
    assert ("Bottle==2" in to_run, "boto3==1" in amazon, "zipp==3" in rest) == (True, True, True)
    assert len(lock.entries(lock.in_parts(flat))) == 3
