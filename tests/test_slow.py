"""Slow clients keep nobody honest waiting: ``make slow``, smaller, and with no bound of time."""

from __future__ import annotations

from pathlib import Path

import pytest
import slow
from nginx import NGINX

pytestmark = pytest.mark.slow
BY_NGINX = pytest.param(
    True, id="nginx", marks=pytest.mark.skipif(not NGINX, reason="apt-get install nginx")
)


@pytest.mark.parametrize("by_nginx", [BY_NGINX, pytest.param(False, id="direct")])
def test_all_honest_flows_succeed_beside_slow_clients(tmp_path: Path, by_nginx: bool) -> None:
    outcome = slow.run(tmp_path, slow=200, seconds=10, rate=5, by_nginx=by_nginx)
    print(outcome.line())
    assert not outcome.faults
    assert len(outcome.flows_s) >= 30
    assert set(outcome.held) == set(slow.KINDS)  # else nothing was attacked
    assert sum(outcome.held.values()) > 150
    # A request that is not whole takes no thread of the gateway behind nginx.
    assert outcome.threads < (100 if by_nginx else 400)
