"""The pages for operators, command by command, on a machine of its own with systemd and nginx."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import machine
import pytest
import servers
from machine import Machine
from nginx import NGINX, blocks, replaced
from support import NUMBER, ROOT
from test_tls import write_certificate

MISSING = machine.missing() or ("" if NGINX else "needs nginx: apt-get install nginx")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=MISSING)]
URL = "https://id.example"
OPERATE = ROOT / "notebooks/operate"
PYTHON = shlex.quote(f"{ROOT}/.venv/bin/python")
PERSON = f"{PYTHON} {shlex.quote(f'{ROOT}/tests/person.py')}"
TEXTS, CERTIFICATE = "/var/texts", "/etc/letsencrypt/live/id.example/fullchain.pem"
PRIVATE = CERTIFICATE.replace("fullchain", "privkey")


def tracked(*paths: str) -> bytes:
    """Files of this working copy, as a tar archive."""
    names = subprocess.run(
        ["git", "ls-files", "-z", *paths], cwd=ROOT, capture_output=True, check=True
    )
    return subprocess.run(
        ["tar", "-c", "--null", "-T", "-"],
        cwd=ROOT,
        input=names.stdout,
        capture_output=True,
        check=True,
    ).stdout


def verify(one: Machine, number: str = NUMBER) -> str:
    """Verify a number from there; gives the session token."""
    return one.run(f"{PERSON} verify {URL} {CERTIFICATE} {TEXTS} {number}").strip()


def sign(one: Machine, token: str) -> str:
    """The status that a session gets which asks for a certificate."""
    return one.run(f"{PERSON} sign {URL} {CERTIFICATE} {token}").strip()


def until_it_answers(one: Machine) -> None:
    """Wait for a start."""
    one.run("for n in $(seq 100); do curl -sf http://127.0.0.1:5000/__heartbeat__ && exit; "
            "sleep 0.1; done; journalctl -u gateway; exit 1")  # fmt: skip


def install(one: Machine, folder: Path, code: bytes, settings: str = "") -> None:
    """Go through the page Install, up to a gateway that answers over TLS.

    Args:
        settings: Another file than the page's.
    """
    user, fetch, modes, check, start, reload, _ = blocks("sh")
    one.run("echo 127.0.0.1 id.example >> /etc/hosts")
    one.run(user)
    # In place of apt, GitHub and PyPI: this working copy, and the packages that run us.
    assert "make -C /opt/gateway .venv/server" in fetch
    one.install(code)
    endpoint = 'endpoint = "http://127.0.0.1:9000/sms/json"\n'
    # So keys are looked for every six seconds, and not once a minute.
    own = settings or "jwks_overlap_s = 60\n" + blocks("toml")[0]
    one.write("/etc/gateway/gateway.toml", own + endpoint)
    one.run(modes)
    one.write("/etc/systemd/system/gateway.service", blocks("ini")[0])
    if not settings:  # an old version has no such command
        assert one.run(check) == blocks("text")[0]
    one.run(start)
    write_certificate(folder, "id.example")
    one.run(f"mkdir -p /etc/letsencrypt/live/id.example; cd {folder}; "
            f"cp cert.pem {CERTIFICATE}; cp key.pem {PRIVATE}")  # fmt: skip
    one.write("/etc/nginx/sites-available/gateway", blocks("nginx")[0])
    one.run("ln -s ../sites-available/gateway /etc/nginx/sites-enabled/; systemctl start nginx")
    one.run(reload)
    until_it_answers(one)


@contextlib.contextmanager
def machine_in(folder: Path, code: bytes, settings: str = "") -> Iterator[Machine]:
    """A machine on which the page Install was followed, and a provider."""
    (folder / "m").mkdir()
    one = Machine(folder / "m")
    try:
        with one.running(f"{PERSON} provider {TEXTS}"):
            install(one, folder / "tls", code, settings)
            yield one
    finally:
        one.close()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine on which the page Install was followed."""
    folder = tmp_path_factory.mktemp("machine")
    with machine_in(folder, tracked("gateway.py", "locale", "Makefile")) as one:
        yield one


def test_the_page_leads_to_a_verified_number(installed: Machine) -> None:
    assert sign(installed, verify(installed)) == "200"
    warned = [
        line for line in installed.run("journalctl -u gateway").splitlines() if "WARN" in line
    ]
    assert warned == []
    sent = replaced(blocks("sh")[-1], {"+YOURS": "+447700900456"})
    installed.run(sent)
    assert '"447700900456"' in installed.run(f"cat {TEXTS}")


def test_the_unit_runs_as_closed_as_it_says(installed: Machine) -> None:
    pid = installed.run("systemctl show -P MainPID gateway").strip()
    status = installed.run(f"cat /proc/{pid}/status")
    for line in (
        "NoNewPrivs:\t1",
        "Seccomp:\t2",
        "CapEff:\t0000000000000000",
        "CapBnd:\t0000000000000000",
    ):
        assert line in status
    modes = installed.run(
        "stat -c '%n %U %a' /opt/gateway /etc/gateway/* /var/lib/gateway /var/lib/gateway/*"
    )
    assert modes.splitlines() == [
        "/opt/gateway root 755",
        "/etc/gateway/gateway.toml root 640",
        "/var/lib/gateway gateway 700",
        "/var/lib/gateway/data gateway 700",
        "/var/lib/gateway/keys gateway 700",
    ]


def test_who_is_verified_survives_a_kill_and_a_stop_is_quiet(installed: Machine) -> None:
    token = verify(installed, "+447700900124")
    installed.run("systemctl kill -s KILL gateway; sleep 0.5; systemctl restart gateway")
    until_it_answers(installed)
    assert sign(installed, token) == "200"
    since = time.strftime("%H:%M:%S")
    time.sleep(1)
    installed.run("systemctl stop gateway")
    told = installed.run(f"journalctl -u gateway --since {since}; systemctl start gateway")
    assert "Deactivated successfully" in told
    assert "ERROR" not in told
    until_it_answers(installed)


def command(text: str) -> str:
    """A command of the gateway, as the page Install says how to run them."""
    program = "/opt/gateway/.venv/bin/python /opt/gateway/gateway.py"
    where = "cd /var/lib/gateway; runuser -u gateway --"
    return f"{where} {program} {text} --config /etc/gateway/gateway.toml"


def test_an_operators_day(installed: Machine) -> None:
    """Keys are rotated, a number is blocked and forgotten, counts are scraped; nobody restarts."""
    token = verify(installed, "+447700900130")
    keys = "curl -s http://127.0.0.1:5000/.well-known/jwks.json"
    before = json.loads(installed.run(keys))["keys"]
    installed.run(command("rotate-keys"))
    installed.run(f"for n in $(seq 700); do {keys} | grep -o kid | wc -l | grep -q 2 && exit; "
                  "sleep 0.1; done; exit 1", timeout_s=100)  # fmt: skip
    assert before[0] in json.loads(installed.run(keys))["keys"]
    assert sign(installed, token) == "200"
    installed.run(command("block +447700900131"))
    assert "AssertionError" in installed.run(
        f"{PERSON} verify {URL} {CERTIFICATE} {TEXTS} +447700900131", 1
    )
    installed.run(command("unblock +447700900131"))
    verify(installed, "+447700900131")
    installed.run(command("forget +447700900130"))
    assert sign(installed, token) == "400"
    assert "spend_per_day" in installed.run(command("bill"))
    assert "+4477" not in installed.run("journalctl -u gateway; cat /var/log/nginx/gateway.*")


@pytest.mark.skipif(not shutil.which("promtool"), reason="apt-get install prometheus")
def test_prometheus_is_set_up_as_the_page_says(installed: Machine) -> None:
    page = OPERATE / "monitoring.md"
    (scraping, rules), (set_up, check) = blocks("yaml", page), blocks("sh", page)
    installed.run("getent group prometheus || groupadd prometheus; mkdir -p /etc/prometheus")
    named = "rule_files: [gateway.rules.yml]\n"
    installed.write("/etc/prometheus/prometheus.yml", scraping + named)
    installed.write("/etc/prometheus/gateway.rules.yml", rules)
    installed.run(set_up)
    assert "12 rules found" in installed.run(check)
    verify(installed, "+447700900132")
    scrape = 'curl -sH "Authorization: Bearer $(cat /etc/prometheus/gateway.token)"'
    again = f"{scrape} http://127.0.0.1:5000/metrics > /var/tmp/scrape"
    counted = "grep -q gateway_sends_total{ /var/tmp/scrape"  # a worker counts once a second
    installed.run(f"for n in $(seq 100); do {again}; {counted} && exit; sleep 0.1; done; exit 1")
    assert installed.run("promtool check metrics < /var/tmp/scrape") == ""
    status = installed.run(f"{scrape} -ko /dev/null -w '%{{http_code}}' {URL}/metrics")
    assert status == "404"


def test_a_back_up_brings_back_who_was_verified(installed: Machine) -> None:
    save, restore = blocks("sh", OPERATE / "backup.md")
    token = verify(installed, "+447700900125")
    installed.run(save)
    later = verify(installed, "+447700900126")
    installed.run("rm -rf /var/lib/gateway/data/appendonlydir/*")  # what a broken disk may do
    installed.run(restore)
    until_it_answers(installed)
    assert sign(installed, token) == "200"
    assert sign(installed, later) == "401"
    installed.run("rm -rf /var/lib/gateway/*.before")


@pytest.mark.skipif(not servers.DEBIAN_REDIS, reason="apt-get install redis-server")
def test_the_store_moves_to_an_external_server_with_all_who_are_verified(
    installed: Machine,
) -> None:
    token = verify(installed, "+447700900127")
    page = OPERATE / "machines.md"
    installed.write("/opt/copy_store.py", blocks("python", page)[0])
    redis = f"{servers.DEBIAN_REDIS} --port 6379 --bind 127.0.0.1 --dir /var/tmp --appendonly yes"
    with installed.running(redis):
        move = replaced(blocks("sh", page)[0], {"/root/copy_store.py": "/opt/copy_store.py"})
        assert "keys in the target" in installed.run(move)
        until_it_answers(installed)
        assert sign(installed, token) == "200"
        life = "print(min(r.ttl(k) for k in r.scan_iter() if len(k) == 16))"
        command = f"{PYTHON} -c 'import redis; r = redis.Redis(); {life}'"
        assert 0 < int(installed.run(command)) <= 31_536_000
        installed.run(
            "sed -i '/^storage_url/d' /etc/gateway/gateway.toml; systemctl restart gateway"
        )
    until_it_answers(installed)


OLD = "7d4f310"
HAS_OLD = not subprocess.run(
    ["git", "cat-file", "-e", OLD], cwd=ROOT, capture_output=True
).returncode


@pytest.mark.skipif(not HAS_OLD, reason=f"a clone without history: no commit {OLD}")
def test_the_page_upgrade_keeps_who_is_verified_and_leads_back(tmp_path: Path) -> None:
    def fetch(one: Machine, code: bytes) -> None:
        one.run("rm -rf /opt/gateway/* /opt/gateway/.venv")
        one.install(code)

    archive = ["git", "archive", OLD, "gateway.py", "locale"]
    then = subprocess.run(archive, cwd=ROOT, capture_output=True, check=True).stdout
    now = tracked("gateway.py", "locale")
    get, check, restart, back = blocks("sh", OPERATE / "upgrade.md")
    assert "checkout v1.1.0" in get
    wanted = blocks("toml")[0]
    unknown = ("trusted_proxies", "countries", "unverified_per_destination")
    settings = "".join(line + "\n" for line in wanted.splitlines() if not line.startswith(unknown))
    with machine_in(tmp_path, then, settings) as one:
        tokens = [verify(one), verify(one, "+447700900124")]
        fetch(one, now)
        assert "trusted_proxies is null" in one.run(check, None)
        endpoint = 'endpoint = "http://127.0.0.1:9000/sms/json"\n'
        one.write("/etc/gateway/gateway.toml", wanted + endpoint)
        one.run(check)
        one.run(restart)
        until_it_answers(one)
        assert [sign(one, token) for token in tokens] == ["200", "200"]
        later = verify(one, "+447700900125")
        stop, rest = back.split("git -C", 1)
        one.run(stop)
        fetch(one, then)
        one.write("/etc/gateway/gateway.toml", settings + endpoint)
        one.run("systemctl" + rest.rpartition("systemctl")[2])
        until_it_answers(one)
        assert [sign(one, token) for token in (*tokens, later)] == ["200", "200", "401"]
