"""The attacks of ``make attack``, smaller: nobody honest pays for a stranger."""

from __future__ import annotations

import pytest
from attack import ATTACKS, HOME, SETTINGS, Outcome, folder, run

SMALL = {"size": 100, "honest": 100, "seconds": 10}


def attacked(name: str, **settings: object) -> Outcome:
    with folder() as path:
        outcome = run(name, path, **SMALL, **settings)  # type: ignore[arg-type]
    assert sum(sum(seen.values()) for seen in outcome.honest.values()) == SMALL["honest"]
    assert outcome.asked[999] == outcome.asked[201] == 0
    return outcome


@pytest.mark.parametrize("name", list(ATTACKS))
def test_who_else_is_refused(name: str) -> None:
    """Nobody, but in a country that a hundred addresses attack at once."""
    outcome = attacked(name)
    assert outcome.refused("elsewhere") == 0, outcome.refusals
    if "country" not in name:
        assert outcome.refused("here") == 0, outcome.refusals
    if "prefix" in name:
        assert 10 <= outcome.attack_messages <= 20
        assert outcome.asked[116] > 500
    if "one country" in name:
        assert outcome.refused("here") > 0  # else nothing was attacked: this is the price
        most = int(SETTINGS["unverified_per_destination"]["*"].split("/")[0])
        assert outcome.attack_messages <= 2 * most


def test_what_is_recorded_is_not_refused_and_names_the_attack() -> None:
    outcome = attacked("500 addresses, one prefix", limits="record")
    assert outcome.refused("here") == outcome.refused("elsewhere") == 0
    assert not {114, 115, 116, 117} & set(outcome.asked)
    would = outcome.report["would be refused"]
    assert would[f"{HOME} p"] > 100  # by the letter of the row: unverified_per_prefix
    prefix, count = max(
        ((name, n) for name, n in would.items() if name.startswith("+")), key=lambda pair: pair[1]
    )
    assert prefix.startswith("+44")
    assert count > 100
