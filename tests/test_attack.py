"""The attacks of ``make attack``, smaller: nobody honest pays for a stranger."""

from __future__ import annotations

from typing import Any, Final

import pytest
from attack import ATTACKS, HOME, LIMITED, Outcome, folder, run

SMALL: Final[dict[str, Any]] = {"size": 100, "honest": 100, "seconds": 10}


def attacked(name: str, **settings: Any) -> Outcome:
    with folder() as path:
        outcome = run(name, path, **SMALL, **settings)
    assert sum(sum(seen.values()) for seen in outcome.honest.values()) == SMALL["honest"]
    assert outcome.asked[999] == outcome.asked[201] == 0
    return outcome


@pytest.mark.parametrize("name", list(ATTACKS))
def test_who_else_is_refused(name: str) -> None:
    """Nobody, but in a country that a hundred addresses attack at once; and the bill holds."""
    outcome = attacked(name)
    assert outcome.refused("elsewhere") == 0, outcome.refusals
    assert outcome.over_the_bill() == {}
    if "country" not in name:
        assert outcome.refused("here") == 0, outcome.refusals
    if "prefix" in name:
        assert 10 <= outcome.attack_messages <= 20
        assert outcome.asked[116] > 500
    if "one country" in name:
        assert outcome.refused("here") > 0  # else nothing was attacked: this is the price
        assert outcome.spent[HOME] >= outcome.bill[HOME] / 2  # what is allowed at once


def test_what_is_recorded_is_not_refused_and_names_the_attack() -> None:
    """Nor does it spare any money: what enforced limits save is seen against it."""
    outcome = attacked("500 addresses, one prefix", limits="record")
    assert outcome.refused("here") == outcome.refused("elsewhere") == 0
    assert not set(LIMITED) & set(outcome.asked)
    assert HOME in outcome.over_the_bill()
    would = outcome.report["would be refused"]
    (prefix, at_prefix), *_ = (pair for pair in would.most_common() if pair[0].startswith("+"))
    limit, by_limit = next(pair for pair in would.most_common() if not pair[0].startswith("+"))
    assert limit == f"{HOME} unverified_per_prefix"
    assert prefix.startswith("+44")
    assert min(at_prefix, by_limit) > 100
