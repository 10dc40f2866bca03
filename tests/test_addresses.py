"""Whom limits count: the client's address, from the socket or from X-Forwarded-For."""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bottle
import lab
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import WsgiClient

import gateway
from gateway import Settings, SettingsError, client_address

PROXY, NEAR = "198.51.100.7", "10.0.0.7"
BEHIND = Settings(trusted_proxies=[PROXY, NEAR, "203.0.113.0/28", "2001:db8:7::/48", "127.0.0.1"])
CLIENT, OTHER = "192.0.2.9", "192.0.2.66"
PAID: dict[str, Any] = {"sms_providers": [{"kind": "nexmo", "api_key": "k", "api_secret": "s"}]}


@pytest.mark.parametrize(
    ("peer", "forwarded", "expected"),
    [
        # Nobody is between us: what the header says is only what the client says.
        (CLIENT, "", CLIENT),
        (CLIENT, OTHER, CLIENT),
        (CLIENT, f"{OTHER}, {PROXY}", CLIENT),
        ("198.51.100.8", CLIENT, "198.51.100.8"),  # a neighbour of the proxy
        # One proxy.
        (PROXY, CLIENT, CLIENT),
        (PROXY, f"{OTHER}, {CLIENT}", CLIENT),
        (PROXY, f"{OTHER},{CLIENT}", CLIENT),
        (PROXY, f"\t {OTHER} ,\t{CLIENT} ", CLIENT),
        (PROXY, f"{NEAR}, {PROXY}, {CLIENT}", CLIENT),
        ("203.0.113.15", CLIENT, CLIENT),
        ("203.0.113.16", CLIENT, "203.0.113.16"),
        # Several.
        (NEAR, f"{OTHER}, {CLIENT}, {PROXY}", CLIENT),
        ("2001:db8:7::1", f"{CLIENT}, 203.0.113.3, {PROXY}", CLIENT),
        (NEAR, f"{CLIENT}, {PROXY}, 198.51.100.8", "198.51.100.8"),
        (NEAR, f"203.0.113.3, {PROXY}", "203.0.113.3"),  # a proxy is the client
        # How addresses are written.
        (PROXY, f"{CLIENT}:4711", CLIENT),
        (PROXY, "2001:db8::9", "2001:db8::9"),
        (PROXY, "2001:DB8:0:0::9", "2001:db8::9"),
        (PROXY, "[2001:db8::9]", "2001:db8::9"),
        (PROXY, "[2001:db8::9]:4711", "2001:db8::9"),
        (PROXY, f"::ffff:{CLIENT}", CLIENT),
        (PROXY, f"[::ffff:{CLIENT}]:80", CLIENT),
        (PROXY, "2001:db8::9%eth0", "2001:db8::9"),
        (f"::ffff:{PROXY}", CLIENT, CLIENT),
        (f"::ffff:{CLIENT}", OTHER, CLIENT),
        ("2001:db8::9", "", "2001:db8::9"),
        # What is no address ends the search: nothing before it was written by a proxy.
        (PROXY, "", PROXY),
        (PROXY, f"{CLIENT}, unknown", PROXY),
        (PROXY, f"{CLIENT}, ", PROXY),
        (PROXY, f"{CLIENT},,", PROXY),
        (PROXY, f"{CLIENT}, unknown, 203.0.113.3", "203.0.113.3"),
        (PROXY, f"unknown, {CLIENT}", CLIENT),
        (PROXY, "_hidden", PROXY),
        (PROXY, "1.2.3", PROXY),
        (PROXY, "01.2.3.4", PROXY),
        (PROXY, "16909060", PROXY),
        (PROXY, "1.2.3.4/8", PROXY),
        (PROXY, "[1.2.3.4", PROXY),
        (PROXY, "\xb2.3.4.5", PROXY),
        # A unix socket is this machine.
        ("", CLIENT, CLIENT),
        ("", f"{CLIENT}, {PROXY}", CLIENT),
        ("unix:", CLIENT, CLIENT),
        ("", "", ""),
        # Not limited: a proxy that nobody named.
        ("127.0.0.1", "", ""),
        ("127.9.9.9", CLIENT, ""),
        ("::1", CLIENT, ""),
        ("::ffff:127.0.0.1", CLIENT, CLIENT),  # 127.0.0.1 is named here
        ("10.9.9.9", CLIENT, ""),
        ("172.16.0.1", CLIENT, ""),
        ("172.31.255.255", CLIENT, ""),
        ("172.32.0.1", "", "172.32.0.1"),
        ("192.168.1.1", CLIENT, ""),
        ("169.254.1.1", CLIENT, ""),
        ("fe80::1", CLIENT, ""),
        ("fe80::1%eth0", CLIENT, ""),
        ("fd00::1", CLIENT, ""),
        (PROXY, "192.168.1.1", ""),
        ("100.64.0.1", "", "100.64.0.1"),  # of a carrier, whose clients share it
        ("0.0.0.0", "", "0.0.0.0"),
    ],
)
def test_whom_limits_count(peer: str, forwarded: str, expected: str) -> None:
    assert client_address(peer, forwarded, BEHIND) == expected


@pytest.mark.parametrize("peer", [CLIENT, "127.0.0.1", "", "::1"])
@pytest.mark.parametrize("proxies", [None, []])
def test_without_trusted_proxies_the_header_is_not_read(
    peer: str, proxies: list[str] | None
) -> None:
    settings = Settings(trusted_proxies=proxies)
    assert client_address(peer, OTHER, settings) == (peer if peer == CLIENT else "")


trusted = st.one_of(
    st.sampled_from([PROXY, NEAR, "127.0.0.1"]),
    st.ip_addresses(network="203.0.113.0/28").map(str),
    st.ip_addresses(network="2001:db8:7::/48").map(str),
)
strangers = st.ip_addresses().filter(
    lambda address: (
        not any(address in network for network in BEHIND.proxies)
        and not (address.version == 6 and (address.ipv4_mapped or address.scope_id))
    )
)
texts = st.text(st.characters(codec="latin-1", exclude_characters="\r\n"), max_size=40)
written = st.lists(
    st.one_of(texts, trusted, st.ip_addresses().map(str), st.just(","), st.just("[")), max_size=5
)


def spell(draw: Any, address: str) -> str:
    """An address in one of the ways in which proxies write it."""
    port = draw(st.sampled_from(["", ":1", ":65535"]))
    if ":" in address:
        return f"[{address}]{port}" if port else address
    mapped = f"::ffff:{address}"
    return str(draw(st.sampled_from([address + port, f"[{mapped}]{port}", mapped])))


@pytest.mark.slow
@given(st.data(), strangers, written, st.lists(trusted, min_size=1, max_size=3))
def test_no_client_chooses_its_address(
    data: Any, client: Any, lines: list[str], chain: list[str]
) -> None:
    """Each trusted proxy writes whom it saw, into the last header or one of its own."""
    headers = list(lines)
    for seen in (str(client), *chain[:-1]):
        entry = spell(data.draw, seen)
        if headers and data.draw(st.booleans()):
            headers[-1] += data.draw(st.sampled_from([",", ", ", " ,\t"])) + entry
        else:
            headers.append(entry)
    forwarded = data.draw(st.sampled_from([",", ", "])).join(headers)
    unlimited = any(client in network for network in gateway._UNLIMITED)
    assert client_address(chain[-1], forwarded, BEHIND) == ("" if unlimited else str(client))


@given(strangers, written)
def test_no_client_chooses_its_address_without_a_proxy(client: Any, lines: list[str]) -> None:
    assert client_address(str(client), ",".join(lines), BEHIND) in ("", str(client))


@pytest.mark.parametrize(
    ("address", "bits", "expected"),
    [
        ("", 64, ""),
        (CLIENT, 64, CLIENT),
        ("2001:db8:1:2:3:4:5:6", 64, "2001:db8:1:2::/64"),
        ("2001:db8:1:2fe:3:4:5:6", 56, "2001:db8:1:200::/56"),
        ("::", 56, "::/56"),
    ],
)
def test_what_an_address_counts_as(address: str, bits: int, expected: str) -> None:
    assert gateway.address_block(address, bits) == expected


@given(st.ip_addresses(v=6), st.integers(0, 2**64 - 1))
def test_a_network_counts_as_one(address: ipaddress.IPv6Address, host: int) -> None:
    neighbour = ipaddress.IPv6Address(int(address) >> 64 << 64 | host)
    one, other = (gateway.address_block(str(a), 64) for a in (address, neighbour))
    assert one == other
    beyond = ipaddress.IPv6Address(int(neighbour) ^ 1 << 64)
    assert gateway.address_block(str(beyond), 64) != one


@pytest.mark.parametrize(
    "entry",
    ["proxy.example", "10.0.0.0/33", "10.1.2.3/8", "", "*", "10.0.0.1:80", "0.0.0.0/0", "::/0"],
)
def test_a_proxy_is_an_address_or_a_network(entry: str) -> None:
    """All addresses are not among them: then every client could choose its own."""
    with pytest.raises(SettingsError, match=r"^trusted_proxies is .*10\.0\.0\.7"):
        Settings(trusted_proxies=[NEAR, entry])


@pytest.mark.parametrize("value", ["10.0.0.7", [7], {"10.0.0.7": 1}])
def test_trusted_proxies_is_a_list(value: Any) -> None:
    with pytest.raises(SettingsError, match=r'^trusted_proxies is .*a list like \["10\.0\.0\.7'):
        Settings(trusted_proxies=value)


@pytest.mark.parametrize(
    ("place", "free"),
    [
        ({}, True),
        (PAID, True),
        ({**PAID, "public_url": "http://localhost:80"}, True),
        ({**PAID, "public_url": "https://id.example"}, False),
        ({**PAID, "host": "192.0.2.1"}, False),
        ({**PAID, "host": "0.0.0.0", "public_url": "https://[2001:db8::1]"}, False),
    ],
)
def test_where_messages_cost_money_it_must_be_named(place: dict[str, Any], free: bool) -> None:
    for proxies in ([], [NEAR]):
        assert Settings(**place, trusted_proxies=proxies)
    if free:
        assert Settings(**place)
    else:
        with pytest.raises(SettingsError, match=r"^trusted_proxies is null; .*; \[\] if there"):
            Settings(**place)


def test_the_application_reads_peer_and_header(make_client: Callable[..., WsgiClient]) -> None:
    app = make_client(trusted_proxies=[NEAR]).app
    environ = {"REMOTE_ADDR": NEAR, "HTTP_X_FORWARDED_FOR": f"{OTHER}, {CLIENT}"}
    bottle.request.bind(environ)
    assert app.client_address() == CLIENT
    bottle.request.bind({"REMOTE_ADDR": CLIENT})
    assert app.client_address() == CLIENT


WHO = """
import gateway
settings = gateway.Settings(trusted_proxies=["127.0.0.1"])
def application(environ, start_response):
    facts = environ.get("REMOTE_ADDR", ""), environ.get("HTTP_X_FORWARDED_FOR", "")
    body = gateway.client_address(*facts, settings).encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]
"""


@pytest.fixture
def granian(tmp_path: Path) -> Iterator[int]:
    """The port of an application under Granian that answers with the client's address."""
    (tmp_path / "who.py").write_text(WHO)
    with lab.free_port() as holder:
        port = int(holder.getsockname()[1])
    command = [sys.executable, "-m", "granian", "--interface", "wsgi", "--port", str(port)]
    paths = {"PYTHONPATH": f"{gateway.ROOT}:{tmp_path}", "PATH": "/usr/bin:/bin"}
    with subprocess.Popen([*command, "who:application"], env=paths, cwd=tmp_path) as process:
        yield port
        process.terminate()


def ask(port: int, *headers: tuple[str, str]) -> str:
    """Ask with these headers, once the server is there."""
    for _ in range(200):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        with contextlib.closing(connection), contextlib.suppress(ConnectionError):
            connection.putrequest("GET", "/")
            for header in headers:
                connection.putheader(*header)
            connection.endheaders()
            return connection.getresponse().read().decode()
        time.sleep(0.05)
    raise AssertionError("it does not answer")


@pytest.mark.slow
def test_granian_hands_over_all_headers_of_the_name(granian: int) -> None:
    """HAProxy adds a header of its own after the client's; it must be the last of the value."""
    name = "X-Forwarded-For"
    assert ask(granian, (name, CLIENT)) == CLIENT
    assert ask(granian, (name, OTHER), (name, CLIENT)) == CLIENT
    assert ask(granian, (name, OTHER), ("A", "b"), (name.lower(), f"{OTHER}, {CLIENT}")) == CLIENT
    # WSGI's environment knows X_Forwarded_For by the same name, and Granian 2.8.7 lets the later
    # one win. So run.md tells that the proxy must drop it. This fails when that may go.
    assert ask(granian, (name, CLIENT), ("X_Forwarded_For", OTHER)) == OTHER
