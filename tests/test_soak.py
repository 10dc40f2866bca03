"""The soak finds what contradicts its model, and nothing where nothing is wrong.

``.ci/run`` has two minutes of it, ``make soak`` ten.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import soak

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ([], ""),
        (["--code-tries", "4"], "a wrong code: 400/105"),
        (["--verified-ttl-s", "2"], "/certificate/sign: 401/110"),
        (["--sends-per-session", "1"], "429/114"),
    ],
)
def test_the_soak_finds_what_contradicts_its_model(
    options: list[str], fault: str, tmp_path: Path
) -> None:
    done = soak.run(tmp_path, 5, 5, clients=20, options=options, only="nothing")
    assert done.done.total() > 5
    assert done.verified or fault
    if fault:
        assert [text for text in done.faults if fault in text], done.faults
    else:
        assert not done.faults
