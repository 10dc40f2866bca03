"""Each planted fault must make a notebook fail: the lessons are tests, and these test them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FAULTS = {
    "another HKDF label": (
        "01_sessions_and_credentials",
        b"identity.mozilla.com/picl/v1/sessionToken",
        b"identity.mozilla.com/picl/v2/sessionToken",
    ),
    "a replayed nonce is accepted": ("02_hawk", b"return 'replayed'", b"life = life"),
    "one try too many": ("04_codes", b"- user.tries - 1\n", b"- user.tries\n"),
    "a code without its message": (
        "04_codes",
        b"self._give_back(session, before, reserved, refused)",
        b'self._arm(session, ask, reserved, code, Sent("", 0))',
    ),
    "the wishes for a language swapped": ("05_messages", b"pair: pair[0]", b"pair: -pair[0]"),
    "certificates in seconds": (
        "07_certificates",
        b'"exp": now_ms + duration_s * 1000',
        b'"exp": now_ms // 1000 + duration_s',
    ),
    "a record 40 bytes larger": (
        "08_storage",
        b'">BB32s24s3sBIII8s8sBHHB"',
        b'">BB32s24s3sBIII48s8sBHHB"',
    ),
    "another errno": ("09_errors", b"WRONG_CODE = 105", b"WRONG_CODE = 205"),
}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What pytest says of the notebooks, each beside a gateway with one fault of its own."""
    folder, paths = tmp_path_factory.mktemp("faults"), []
    shutil.copy(ROOT / "pyproject.toml", folder)
    source = (ROOT / "gateway.py").read_bytes()
    for n, (notebook, right, wrong) in enumerate(FAULTS.values()):
        assert source.count(right) == 1, f"{right!r} has no place any more: plant it anew"
        copy = folder / f"fault{n}"
        for name in ("notebooks", "locale"):
            shutil.copytree(ROOT / name, copy / name)
        (copy / "gateway.py").write_bytes(source.replace(right, wrong))
        paths.append(f"fault{n}/notebooks/{notebook}.ipynb")
    command = [sys.executable, "-m", "pytest", "-n0", "-q", "-rA", "--tb=no"]
    command += ["-p", "no:cacheprovider"]
    run = subprocess.run([*command, *paths], cwd=folder, capture_output=True, text=True)
    assert run.returncode == 1, run.stdout + run.stderr
    return run.stdout


@pytest.mark.parametrize("fault", FAULTS)
def test_a_notebook_fails(fault: str, result: str) -> None:
    """That it passes without the fault is what the rest of the run shows."""
    notebook = f"fault{[*FAULTS].index(fault)}/notebooks/{FAULTS[fault][0]}.ipynb"
    assert f"FAILED {notebook}" in result
    assert f"PASSED {notebook}::Cell 0" in result, "it fails at once, so not for this fault"
