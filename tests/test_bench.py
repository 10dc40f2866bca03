"""The benchmark runs: tiny, with both clients, and without a look at any time."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "bench"))

import bench
import calls
import clients
from support import GatewayProcess

TINY = ["--rounds", "1", "--requests", "8", "--users", "1200"]


@pytest.mark.parametrize("client", ["wrk", "python"])
def test_every_endpoint_answers_as_it_should(client: str, tmp_path: Path) -> None:
    if client == "wrk" and not clients.WRK:
        pytest.skip("wrk is not installed")
    assert bench.main(["endpoints", *TINY, "--client", client, "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "bench.json").read_text())
    for key in ("endpoints", "saturated"):
        assert [row["name"] for row in report[key]] == [w.name for w in bench.WORKLOADS]
        assert {row["name"]: row["errors"] for row in report[key] if row["errors"]} == {}
        assert set(report[key + " units"]) == {"T", "B", "R", "P", "S", "R alone", "P alone"}
    assert report["client"] == client
    assert "/certificate/sign" in (tmp_path / "bench.svg").read_text()


@pytest.mark.parametrize("part", ["users", "latency", "start"])
def test_other_parts_run(part: str, tmp_path: Path) -> None:
    assert bench.main([part, *TINY, "--client", "python", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "bench.json").read_text())
    rows = report[part] if isinstance(report[part], list) else []
    assert rows or part == "start"
    assert {row["name"]: row["errors"] for row in rows if row["errors"]} == {}
    assert report.get("mixed", {}).get("wrong", 0) == 0


def test_a_wrong_answer_counts_as_an_error(tmp_path: Path) -> None:
    """Requests of one session too many, a replay, and a wrong signature among good ones."""
    world = bench.World(tmp_path / "world")
    try:
        good = bench.workload("/sms/verify_code").requests(world, 3)
        wrong = bench.workload("refused signature").requests(world, 2)
        for client in ("python", "wrk") if clients.WRK else ("python",):
            requests = [*bench.workload("/sms/verify_code").requests(world, 3), good[0], *wrong]
            run = clients.replay(world.port, requests, 1, lambda: None, client)
            assert run.statuses == ({200: 4, 401: 2} if client == "python" else {200: 3, 401: 3})
            row = bench.Row("row")
            row.add(1.0, 1.0, run, 200)
            assert row.errors == sum(run.statuses.values()) - run.statuses[200]
    finally:
        world.close()


def test_a_row_is_judged_in_multiples_of_the_same_rounds_t() -> None:
    row = bench.Row("row", "5 + R", server_us=[600.0, 800.0, 700.0])
    units = {"T": [50.0, 100.0, 50.0], "R": [250.0, 300.0, 250.0]}
    judged = bench.judged(row, units)
    assert judged == {"in_T": 7.0, "holds": False}
    assert bench.judged(bench.Row("row", "", [50.0] * 3), units)["holds"] is None


def test_the_python_client_goes_on_when_a_connection_breaks(
    start_gateway: Callable[..., GatewayProcess],
) -> None:
    home = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"
    requests = [b"nonsense\r\n\r\n", home, home, home]
    run = clients.run_python(start_gateway().port, requests, 1, lambda: None)
    assert sum(run.statuses.values()) == 4
    assert run.statuses[200] >= 2


@pytest.mark.parametrize(
    ("path", "most"), [("/sms/verify", (112, 13, 40)), ("/sms/verify_code", (91, 11, 34))]
)
def test_a_reader_can_follow_a_request(
    path: str, most: tuple[int, int, int], tmp_path: Path
) -> None:
    """How many calls of ours it takes, how deep, and how often the section changes."""
    followed = calls.follow(str(tmp_path))[path]
    found = (len(followed.calls), followed.deepest, followed.changes)
    assert len(followed.calls) > 50
    assert all(one <= limit for one, limit in zip(found, most, strict=True)), found
