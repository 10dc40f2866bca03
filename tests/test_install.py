"""The page Install: its unit, judged by systemd, and its nginx file, run before a gateway."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jwt
import lab
import psutil
import pytest
import servers
import support
import urllib3
from nginx import NGINX, PAGE, Nginx, blocks, replaced
from provider import Provider, taken
from support import NUMBER, ROOT, GatewayProcess

import gateway

ANALYZE = shutil.which("systemd-analyze")
pytestmark = pytest.mark.slow
needs_nginx = pytest.mark.skipif(not NGINX, reason="no nginx here: apt-get install nginx")


# -- The unit -------------------------------------------------------------------


@pytest.mark.skipif(not ANALYZE, reason="no systemd here: apt-get install systemd")
def test_systemd_finds_no_fault_in_the_unit_and_gives_the_score_that_the_page_states(
    tmp_path: Path,
) -> None:
    unit = tmp_path / "gateway.service"
    # The program must be there: ours, for /opt/gateway is not.
    python = "/opt/gateway/.venv/bin/python"
    unit.write_text(replaced(blocks("ini")[0], {python: shutil.which("python3") or ""}))
    verified = subprocess.run(
        [str(ANALYZE), "verify", "--man=no", str(unit)], capture_output=True, text=True
    )
    assert (verified.returncode, verified.stderr) == (0, "")
    judged = subprocess.run(
        [str(ANALYZE), "security", "--offline=yes", "--no-pager", str(unit)],
        capture_output=True,
        text=True,
    )
    score = re.search(r"Overall exposure level for gateway.service: ([\d.]+) (\w+)", judged.stdout)
    assert score
    stated = re.search(
        r"`systemd-analyze security` is \*\*([\d.]+) \(\"(\w+)\"\)", PAGE.read_text()
    )
    assert stated
    assert stated.groups() == score.groups()


# -- nginx ----------------------------------------------------------------------


class Site(NamedTuple):
    """A gateway behind the page's nginx, and the provider by which it sends."""

    proxy: Nginx
    process: GatewayProcess
    provider: Provider

    def client(self) -> lab.Client:
        """A client that comes by TLS."""
        return self.proxy.client(self.process.folder)

    def code(self, msisdn: str = NUMBER) -> str:
        """The code that the provider was given last."""
        return self.provider.texts()[msisdn][-1].splitlines()[0].split()[-1]

    def connections(self) -> int:
        """How many connections to the gateway there are or were a moment ago."""
        port = self.process.port
        return sum(c.laddr.port == port and bool(c.raddr) for c in psutil.net_connections("tcp4"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The page's nginx, before a gateway that sends by a provider."""
    folder, port = tmp_path_factory.mktemp("site"), support.free_port()
    with Provider(taken) as provider:
        process = GatewayProcess(
            folder,
            *("--public-url", f"https://127.0.0.1:{port}", "--trusted-proxies", '["127.0.0.1"]'),
            *("--sms-providers", json.dumps([provider.nexmo()])),
            *("--sms-inbound", '[{"kind": "nexmo", "path_secret": "hook-of-ours"}]'),
            *("--mo-verifier", "+447700900999", "--registers-per-address", "2/minute"),
        )
        try:
            with Nginx(folder / "nginx", process.port, port) as proxy:
                yield Site(proxy, process, provider)
        finally:
            process.close()


@needs_nginx
def test_a_number_is_verified_over_tls(site: Site) -> None:
    client, key = site.client(), gateway.generate_key("RS256")
    assert client.register(msisdn=NUMBER).body["verificationUrl"].startswith(site.proxy.url)
    assert client.verify(NUMBER).status == 200
    assert client.call("POST", "/v1/msisdn/sms/resend_code", {}).status == 200
    verified = client.verify_code(site.code())
    assert verified.status == 200
    certificate = client.sign(key).body["cert"]
    claims = jwt.decode(certificate, options={"verify_signature": False})
    assert (claims["verifiedMSISDN"], claims["iss"]) == (NUMBER, site.proxy.url[8:])
    assert client.unregister().status == 204
    request_id = verified.headers["X-Request-Id"]
    line = rf"(?m)POST /sms/verify_code 200 \S+ {request_id}$"
    servers.wait_for(lambda: re.search(line, site.proxy.logs()), "a line in nginx's log")
    servers.wait_for(lambda: request_id in site.process.output, "a line in our log")


@needs_nginx
def test_connections_to_the_gateway_are_used_again(site: Site) -> None:
    before = site.connections()
    for _ in range(30):
        assert site.proxy.http().request("GET", site.proxy.url + "/__version__").status == 200
    assert site.connections() - before <= 4  # two ends each; without keep-alive 30 and more


@needs_nginx
def test_a_body_too_large_is_refused_by_the_gateway_in_json(site: Site) -> None:
    headers = {"Content-Type": "application/json"}
    ask = site.proxy.http().request
    answer = ask("POST", site.proxy.url + "/register", body=b" " * 20_000, headers=headers)
    assert (answer.status, answer.json()["errno"]) == (413, 113)
    assert ask("POST", site.proxy.url + "/register", body=b" " * 70_000).status == 413


@needs_nginx
def test_who_asks_is_told_by_nginx_and_not_by_who_asks(site: Site) -> None:
    """Our address is loopback, which no limit counts; the address in the header would be."""
    said = {"X-Forwarded-For": "198.51.100.7", "X_Forwarded_For": "198.51.100.7"}
    through = [site.client().call("POST", "/register", **said).status for _ in range(4)]
    assert through == [200] * 4
    past = [site.process.client(seen_from="198.51.100.7").register().status for _ in range(4)]
    assert past == [200, 200, 429, 429]


@needs_nginx
def test_operators_pages_are_closed_from_outside(site: Site) -> None:
    token = site.client().operator_token
    ask = site.proxy.http().request
    for path in ("/metrics", "/v1/msisdn/metrics", "/outbox", "/v1/outbox", "/%6Fut%62ox"):
        headers = {"Authorization": f"Bearer {token}"}
        assert (
            ask("GET", f"{site.proxy.url}{path}?token={token}&to=1", headers=headers).status == 404
        )
    assert site.process.output.count("/metrics") == 0


@needs_nginx
def test_no_log_of_nginx_has_what_webhooks_carry(site: Site, tmp_path: Path) -> None:
    """Neither when they are taken, nor when the gateway is away, which nginx would report."""
    spelled = ("/sms/momt", "/v1/msisdn/sms/receipt", "//sms/momt", "/sms/rec%65ipt")
    query = "hook-of-ours?provider=nexmo&msisdn=447700900123&text=hi&status=failed&messageId=M1"
    for path in spelled:
        answer = site.proxy.http().request("GET", f"{site.proxy.url}{path}/{query}")
        assert answer.status in (200, 404)
    with Nginx(tmp_path / "alone", support.free_port()) as alone:
        ask = alone.http().request
        assert all(ask("GET", f"{alone.url}{path}/{query}").status == 502 for path in spelled)
        assert ask("GET", alone.url + "/__version__").status == 502
        # Other requests are there; nginx writes after it has answered.
        servers.wait_for(lambda: "GET /__version__ 502" in alone.logs(), "a line")
        logs = alone.logs() + site.proxy.logs()
    assert "Connection refused" in logs
    assert not re.search("hook-of-ours|momt|receipt|447700900123", logs)


@needs_nginx
def test_a_slow_client_holds_nothing_of_the_gateway(tmp_path: Path) -> None:
    """nginx asks nobody until it has the whole body, and hangs up on who takes too long."""
    shorter = {"client_body_timeout 10s;": "client_body_timeout 1s;"}
    with (
        contextlib.closing(socket.create_server(("127.0.0.1", support.free_port()))) as upstream,
        Nginx(tmp_path / "nginx", upstream.getsockname()[1], changes=shorter) as proxy,
    ):
        context = ssl.create_default_context(cafile=proxy.certificate)
        head = b"POST /v1//x%5Fy/../z? HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{"

        def connect() -> ssl.SSLSocket:
            plain = socket.create_connection(("127.0.0.1", proxy.port), 10)
            return context.wrap_socket(plain, server_hostname="127.0.0.1")

        with contextlib.closing(connect()) as slow:
            slow.sendall(head)
            with contextlib.suppress(ConnectionResetError, ssl.SSLError):
                assert slow.recv(1000).partition(b"\r\n")[0] in (
                    b"",
                    b"HTTP/1.1 408 Request Time-out",
                )
            upstream.settimeout(0.2)
            with pytest.raises(TimeoutError):
                upstream.accept()
        with contextlib.closing(connect()) as quick:
            quick.sendall(head)
            quick.sendall(b"}")
            upstream.settimeout(10)
            asked = upstream.accept()[0]
            # Hawk signs the path as the client spelled it; nginx must not spell it anew.
            assert asked.recv(4096).startswith(b"POST /v1//x%5Fy/../z? HTTP/1.1\r\n")
            asked.close()


@needs_nginx
def test_plain_http_leads_to_tls(site: Site) -> None:
    url = f"http://127.0.0.1:{site.proxy.plain_port}/sms/verify?x=1"
    answer = site.proxy.http().request("POST", url, redirect=False)
    assert (answer.status, answer.headers["Location"]) == (308, "https://127.0.0.1/sms/verify?x=1")
    challenge = site.proxy.folder / ".well-known/acme-challenge/name"  # by which certbot renews
    challenge.parent.mkdir(parents=True)
    challenge.write_text("proof")
    url = f"http://127.0.0.1:{site.proxy.plain_port}/.well-known/acme-challenge/name"
    assert site.proxy.http().request("GET", url).data == b"proof"


# -- Two gateways -----------------------------------------------------------------


@needs_nginx
def test_two_gateways_are_restarted_one_after_the_other_without_a_gap(tmp_path: Path) -> None:
    """As the page Several machines says, while numbers are verified all the time."""
    upstream, retry = blocks("nginx", ROOT / "notebooks/operate/machines.md")
    ports = [support.free_port() for _ in range(3)]
    with contextlib.ExitStack() as stack:
        store = servers.Server(tmp_path / "store", "--appendonly", "yes")
        stack.callback(store.close)
        provider = stack.enter_context(Provider(taken))
        places = {f"10.0.0.1{n}:5000": f"127.0.0.1:{port}" for n, port in enumerate(ports[1:], 1)}
        lines = {
            blocks("nginx")[0].partition("}\n")[0] + "}\n": replaced(upstream, places),
            "    proxy_next_upstream off;\n": retry,
        }

        def start(n: int) -> GatewayProcess:
            folder = tmp_path / str(n)
            folder.mkdir(exist_ok=True)
            process = GatewayProcess(
                folder,
                *("--storage-url", store.url, "--keys-dir", str(tmp_path / "1" / "keys")),
                *("--public-url", f"https://127.0.0.1:{ports[0]}"),
                *("--trusted-proxies", '["127.0.0.1"]'),
                *("--sms-providers", json.dumps([provider.nexmo()])),
                *("--sends-per-hour", "1000000"),
                port=ports[n],
            )
            stack.callback(process.close)
            return process

        processes = {n: start(n) for n in (1, 2)}
        proxy = stack.enter_context(Nginx(tmp_path / "nginx", 5000, ports[0], lines))
        ending, lost = threading.Event(), list[str]()
        with ThreadPoolExecutor() as pool:

            def verify_on(who: int) -> list[int]:
                statuses = []
                for n in range(100_000):
                    number = f"+44770090{who}{n:03}"
                    client = proxy.client(tmp_path / "1")
                    try:
                        statuses += [client.register().status, client.verify(number).status]
                        code = provider.texts()[number][-1].splitlines()[0].split()[-1]
                        statuses.append(client.verify_code(code).status)
                    except urllib3.exceptions.HTTPError:
                        # nginx, read anew, closes connections on which nothing was asked yet.
                        lost.append(number)
                    if ending.wait(0.02):
                        break
                return statuses

            running = [pool.submit(verify_on, who) for who in range(3)]
            for n in (1, 2):
                line = f"127.0.0.1:{ports[n]} max_fails=1 fail_timeout=2s"
                proxy.change(line, f"{line} down")
                assert processes[n].stop() == 0
                processes[n] = start(n)
                proxy.change(f"{line} down", line)
                served = "request /sms/verify_code 200"
                servers.wait_for(lambda: served in processes[n].output, "work for it")  # noqa: B023
            ending.set()
            statuses = [status for one in running for status in one.result()]
        assert set(statuses) == {200}
        assert len(lost) <= 4 * 3  # reloads, and who asks at that moment


# -- A container ------------------------------------------------------------------


def test_the_lines_for_an_image_name_what_is_there_and_all_that_is_needed() -> None:
    [lines] = blocks("dockerfile", ROOT / "notebooks/operate/run.md")
    copied = re.findall(r"(?m)^COPY (\S+) /opt/gateway", lines)
    assert all((ROOT / path).exists() for path in copied)
    [shell] = re.findall(r"(?m)^RUN (sed .*?) \\$", lines)
    shell = shell.replace("/opt/gateway/", f"{shlex.quote(str(ROOT))}/")
    first = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, check=True).stdout
    header = (ROOT / "gateway.py").read_text("utf-8").partition("# ///\n")[0]
    needed = re.findall(r'(?m)^#     "([^"]+)",$', header)
    assert len(needed) > 5
    assert all(f"\n{pinned.partition(';')[0]}" in first for pinned in needed)
    assert "pytest==" not in first
