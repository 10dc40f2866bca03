"""The page Monitoring: its rules by Prometheus' own tools, its metrics against a real scrape."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from nginx import blocks
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from provider import Provider, nexmo, taken
from support import NUMBER, ROOT, GatewayProcess, WsgiClient

PAGE = ROOT / "notebooks/operate/monitoring.md"
SCRAPING, RULES = blocks("yaml", PAGE)
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(not PROMTOOL, reason="apt-get install prometheus")
NAME = r"\bgateway_\w+"
PLACES = {"job", "instance"}
"""Labels that Prometheus adds."""


def promtool(*command: str) -> str:
    """Run it; it must find no fault."""
    ended = subprocess.run([str(PROMTOOL), *command], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture
def families(make_client: Callable[..., WsgiClient]) -> Iterator[dict[str, Metric]]:
    """A scrape after sends and receipts of several outcomes, a verification, and refusals."""
    with Provider(taken) as provider:
        hook = {"kind": "nexmo", "path_secret": "hook"}
        client = make_client(
            sms_providers=[provider.nexmo(receipts=True)], sms_inbound=[hook],
            sends_per_number="9/day",
        )  # fmt: skip
        client.register()
        for _ in range(5):
            client.ask(NUMBER)
        code = provider.texts()[NUMBER][-1].splitlines()[0].split()[-1]
        assert client.call("/sms/verify_code", {"code": code}).status == 200
        assert client.call("/certificate/sign", {}).status == 400
        for status in ("4", "6", "1"):
            provider.answer = nexmo(status)
            client.register()
            client.ask("+447700900456")
        client.gateway.counts.add("worker_starts_total")  # as a worker does
        for outcome in ("delivered", "failed"):
            client.get(f"/sms/receipt/hook?provider=nexmo&messageId=M1&status={outcome}")
        token = f"Bearer {client.app.token}"
        text = client.get("/metrics", HTTP_AUTHORIZATION=token).data.decode()
        yield {family.name: family for family in text_string_to_metric_families(text)}


def values(families: dict[str, Metric]) -> dict[str, dict[str, set[str]]]:
    """The values of each label of each name of samples."""
    found: dict[str, dict[str, set[str]]] = {}
    for family in families.values():
        for sample in family.samples:
            for label, value in sample.labels.items():
                found.setdefault(sample.name, {}).setdefault(label, set()).add(value)
            found.setdefault(sample.name, {})
    return found


@pytest.mark.slow
def test_what_rules_name_is_in_a_scrape(families: dict[str, Metric]) -> None:
    scraped = values(families)
    named = re.findall(rf"({NAME})(?:\{{([^}}]*)\}})?", RULES)
    assert len(named) > 20
    for name, selector in named:
        assert name in scraped
        for label, operator, value in re.findall(r'(\w+)(=~?)"([^"]*)"', selector):
            found = scraped[name][label]
            for one in value.split("|") if operator == "=~" else [value]:
                # Outcomes and errnos that did not happen here are from the page's own table.
                known = value in PAGE.read_text() if label in ("outcome", "errno") else False
                assert one in found or known, (name, label, one)
    labels = {label for of_one in scraped.values() for label in of_one} | PLACES
    for by in re.findall(r"by \(([^)]*)\)|labels\.(\w+)", RULES):
        assert set(filter(None, by)) <= labels


@pytest.mark.slow
def test_the_table_names_every_metric_with_its_labels(families: dict[str, Metric]) -> None:
    rows = re.findall(r"(?m)^\| `(gateway_\w+)` \| ([^|]*)\|", PAGE.read_text("utf-8"))
    stated = {name: set(re.findall(r"`(\w+)`", labels)) for name, labels in rows}
    found = {
        name + "_total" * (family.type == "counter"): {
            label for sample in family.samples for label in sample.labels
        }
        for name, family in families.items()
    }
    assert stated == found


@needs_promtool
def test_prometheus_takes_the_rules_and_the_configuration(tmp_path: Path) -> None:
    rules, config = tmp_path / "rules.yml", tmp_path / "prometheus.yml"
    rules.write_text(RULES)
    told = promtool("check", "rules", str(rules))
    assert f"{RULES.count('- alert:')} rules found" in told
    (tmp_path / "token").write_text("x")
    place = "/etc/prometheus/gateway.token"
    assert place in SCRAPING
    config.write_text(SCRAPING.replace(place, str(tmp_path / "token")) + f"rule_files: [{rules}]\n")
    promtool("check", "config", str(config))


QUIET = {
    'gateway_requests_total{route="/register",errno="0"}': "0+100x60",
    'gateway_sends_total{kind="nexmo",region="GB",outcome="taken"}': "0+10x60",
    'gateway_receipts_total{kind="nexmo",outcome="delivered"}': "0+10x60",
    'gateway_messages_of_day{region="GB",outcome="sent"}': "0+10x60",
    'gateway_messages_of_day{region="GB",outcome="verified"}': "0+8x60",
    'gateway_messages_of_day_by_prefix{prefix="+44770090",outcome="sent"}': "9x60",
    'gateway_messages_of_day_by_prefix{prefix="+44770090",outcome="verified"}': "5x60",
    'gateway_budget_used{limit="sends_per_hour"}': "0.3x60",
    "gateway_store_read_seconds": "0.001x60",
    "gateway_worker_starts_total": "4x60",
    'up{job="gateway"}': "1x60",
}
"""A gateway that does well: series and values, one a minute for an hour."""
TROUBLE: dict[str, dict[str, str]] = {
    "GatewayDown": {'up{job="gateway"}': "0x60"},
    "GatewayUnforeseenError": {'gateway_requests_total{errno="999"}': "_x54 1x6"},
    "GatewayUnavailable": {'gateway_requests_total{errno="201"}': "0+5x60"},
    "GatewaySlow": {
        'gateway_request_seconds_bucket{route="/register",le="0.5"}': "0+90x60",
        'gateway_request_seconds_bucket{route="/register",le="1"}': "0+100x60",
        'gateway_request_seconds_bucket{route="/register",le="+Inf"}': "0+100x60",
    },
    "GatewayProviderDenies": {'gateway_sends_total{kind="nexmo",outcome="denied"}': "3x54 4x6"},
    "GatewayProviderFails": {'gateway_sends_total{kind="nexmo",outcome="failed"}': "0+3x60"},
    "GatewayNotDelivered": {'gateway_receipts_total{kind="nexmo",outcome="failed"}': "0+5x60"},
    "GatewayFewVerified": {'gateway_messages_of_day{region="FR",outcome="sent"}': "0+1x60"},
    "GatewayPrefixPumped": {
        'gateway_messages_of_day_by_prefix{prefix="+44740878",outcome="sent"}': "10x60",
        'gateway_messages_of_day_by_prefix{prefix="+44740878",outcome="verified"}': "0x60",
    },
    "GatewayBudgetAlmostUsed": {'gateway_budget_used{limit="spend_per_day"}': "0.85x60"},
    "GatewayStoreSlow": {"gateway_store_read_seconds": "0.2x60"},
    "GatewayWorkersDie": {"gateway_worker_starts_total": "4+1x60"},
}
"""For each alert what sets it off, beside the rest of a gateway that does well."""


@needs_promtool
@pytest.mark.slow
@pytest.mark.parametrize("trouble", [*TROUBLE, ""])
def test_each_alert_fires_for_its_trouble_alone(tmp_path: Path, trouble: str) -> None:
    rules, tests = tmp_path / "rules.yml", tmp_path / "tests.yml"
    # Only the names of what fires are compared, not its labels and texts.
    rules.write_text(re.sub(r" *annotations: .*\n", "", RULES))
    series = QUIET | TROUBLE.get(trouble, {})
    names = re.findall(r"alert: (\w+)", RULES)
    assert names == list(TROUBLE)
    firing = 'count by (alertname) (ALERTS{alertstate="firing"})'
    expected = [{"labels": f'{{alertname="{trouble}"}}', "value": 1}] if trouble else []
    test: Any = {
        "interval": "1m",
        "input_series": [{"series": name, "values": v} for name, v in series.items()],
        "promql_expr_test": [{"expr": firing, "eval_time": "55m", "exp_samples": expected}],
    }
    told = {"rule_files": [str(rules)], "evaluation_interval": "1m", "tests": [test]}
    tests.write_text(json.dumps(told))  # JSON is YAML
    promtool("test", "rules", str(tests))


@pytest.mark.slow
def test_the_log_has_the_lines_of_the_page(start_gateway: Callable[..., GatewayProcess]) -> None:
    with Provider(taken) as provider:
        process = start_gateway("--sms-providers", json.dumps([provider.nexmo()]))
        client = process.client()
        client.register()
        client.verify(NUMBER)
        provider.answer = nexmo("4")
        client.register()
        client.verify("+447700900456")
        process.stop()
    lines = [shape(line) for line in process.output.splitlines()]
    for line in blocks("text", PAGE)[0].splitlines():
        assert shape(line) in lines


def shape(line: str) -> str:
    """A line without its time, its id, and how long it took."""
    return re.sub(r"^\S+Z|\d+\.\d ms|\[[0-9a-f]{16}\]", "…", line)
