"""Sending: each kind of provider, what counts as sent, fail-over, and what a hang may cost."""

from __future__ import annotations

import base64
import contextlib
import datetime
import ipaddress
import json
import logging
import os
import re
import select
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import kannel
import lab
import pytest
import urllib3
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from provider import Provider, after, drip, flood, hang, nexmo, reply, taken
from support import NUMBER, GatewayProcess, WsgiClient, counted, shared

import gateway

MakeClient = Callable[..., WsgiClient]
TO = gateway.Msisdn(NUMBER)
OTHER = gateway.Msisdn("+447700900456")
DAY = datetime.timedelta(days=1)
ASKS = "?to={to}&t={text}"
"""The least that an entry of kind http must have in its templates."""


@pytest.fixture
def provider() -> Iterator[Provider]:
    """A provider that takes every message."""
    with Provider(taken) as one:
        yield one


@pytest.fixture
def three() -> Iterator[list[Provider]]:
    """Three of them."""
    with Provider(taken) as a, Provider(taken) as b, Provider(taken) as c:
        yield [a, b, c]


def sender_of(*entries: gateway.Json, **settings: Any) -> gateway.SmsSender:
    return gateway.SmsSender(gateway.Settings(sms_providers=list(entries), **settings))


def closed_url() -> str:
    """An address where nobody listens."""
    return f"http://127.0.0.1:{kannel.free_ports(1)[0]}/sms"


# -- Each kind ------------------------------------------------------------------


def test_twilio_is_asked_as_its_documentation_says(provider: Provider) -> None:
    provider.answer = reply({"sid": "SM123", "status": "queued"}, 201)
    entry = {"kind": "twilio", "account_sid": "AC1", "auth_token": "hunter2"}
    endpoint = provider.url + "/Accounts/{account_sid}/Messages.json"
    inbound = [{"kind": "twilio", "path_secret": "p?a b"}]
    sender = sender_of({**entry, "endpoint": endpoint, "receipts": True}, sms_inbound=inbound)
    assert sender.providers[0].send("+15550001111", TO, "Ünï: 1") == ["SM123"]
    [request] = provider.received
    assert (request.method, request.target) == ("POST", "/sms/Accounts/AC1/Messages.json")
    login = base64.b64encode(b"AC1:hunter2").decode()
    assert request.headers["authorization"] == f"Basic {login}"
    assert request.form == {
        "From": "+15550001111", "To": NUMBER, "Body": "Ünï: 1",
        "StatusCallback": "http://127.0.0.1:5000/sms/receipt/p%3Fa%20b?provider=twilio",
    }  # fmt: skip
    assert "hunter2" not in request.target + request.body


def test_kannels_login_and_text_are_in_no_url(provider: Provider) -> None:
    provider.answer = reply("0: Accepted for delivery", 202)
    entry = {"kind": "kannel", "endpoint": provider.url, "username": "u", "password": "hunter2"}
    sender_of(entry).send("Gateway", TO, "Ваш код: 1")
    [request] = provider.received
    assert (request.method, request.target, request.body) == ("POST", "/sms", "Ваш код: 1")
    assert request.headers["x-kannel-coding"] == "2"
    assert "x-kannel-dlr-url" not in request.headers


TEXT = 'a&b=<c> "d" é\\+%41 {to}'
"""Everything that is special in one of the places that it is written to."""


@pytest.mark.parametrize(
    ("kind", "body", "read"),
    [
        ("application/json", '{"to": ["{to}"], "t": "{text}"}', lambda b: json.loads(b)["t"]),
        ("application/x-www-form-urlencoded", "to={to}&t={text}", None),
        ("text/xml", '<sms to="{to}" t="{text}"/>', None),
        ("text/plain; charset=utf-8", "{text}", lambda b: b),
    ],
)
def test_any_gateway_by_templates(
    provider: Provider, kind: str, body: str, read: Callable[[str], str] | None
) -> None:
    headers = {"Content-Type": kind, "Authorization": "Bearer hunter2"}
    entry = {
        "kind": "http",
        "endpoint": provider.url + "/{to_digits}/../é ?t={text}#x",
        "body": body,
    }
    sender_of({**entry, "method": "PUT", "headers": headers}).send("Gateway", TO, TEXT)
    [request] = provider.received
    assert (request.method, request.headers["authorization"]) == ("PUT", "Bearer hunter2")
    assert request.target.startswith("/sms/447700900123/../%C3%A9%20?t=")
    assert request.query == {"t": TEXT}
    if read:
        assert read(request.body) == TEXT
    else:
        form = request.form if "form" in kind else ElementTree.fromstring(request.body).attrib
        assert form == {"to": NUMBER, "t": TEXT}


@pytest.mark.parametrize("place", ["%7Bid%7D", "{id}", "m-%7Bid}"])
def test_an_id_is_made_however_its_place_is_spelled(provider: Provider, place: str) -> None:
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    entry = {
        "kind": "http",
        "endpoint": provider.url,
        "headers": form,
        "body": f"ref={place}&to={{to}}&t={{text}}",
    }
    sender = sender_of(entry)
    sender.send("Gateway", TO, TEXT)
    sender.send("Gateway", TO, TEXT)
    first, second = (request.form["ref"] for request in provider.received)
    assert re.fullmatch("(m-)?[0-9a-f]{16}", first)
    assert first != second


def test_a_get_without_a_body(provider: Provider) -> None:
    provider.answer = reply("OK 1")
    entry = {"kind": "http", "method": "GET", "endpoint": provider.url + "?to={to}&m={text}"}
    sender_of({**entry, "success": "^OK"}).send("Gateway", TO, "x y")
    [request] = provider.received
    assert (request.method, request.query, request.body) == ("GET", {"to": NUMBER, "m": "x y"}, "")
    assert not {"content-type", "content-length"} & request.headers.keys()


def test_a_body_of_no_declared_type_is_not_called_a_form(provider: Provider) -> None:
    """As libcurl would by itself."""
    entry = {"kind": "http", "endpoint": provider.url + "?to={to}", "headers": {"X-A": "é"}}
    entry |= {"body": "m={text}"}
    sender_of(entry).send("Gateway", TO, "x&y")
    sender_of({**entry, "endpoint": provider.url + ASKS, "body": ""}).send("Gateway", TO, "x&y")
    [request, bare] = provider.received
    assert (request.body, request.headers["x-a"]) == ("m=x&y", "é")
    assert (bare.body, bare.headers["content-length"]) == ("", "0")
    assert "content-type" not in request.headers | bare.headers
    assert request.headers["user-agent"] == "msisdn-gateway"


def test_text_beyond_gsm7_says_so_and_only_that(provider: Provider) -> None:
    sender = sender_of(provider.nexmo())
    for text in ("code è: 1", "{[€]}", "código: 1", "`"):
        sender.send("Gateway", TO, text)
    kinds = [request.form.get("type") for request in provider.received]
    assert kinds == [None, None, "unicode", "unicode"]


SNS_OK = (
    "<PublishResponse><PublishResult><MessageId>m-1</MessageId></PublishResult></PublishResponse>"
)
SNS_BAD = (
    "<ErrorResponse><Error><Code>{}</Code><Message>+447700900123</Message></Error></ErrorResponse>"
)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (reply(SNS_OK), None),
        (reply(SNS_BAD.format("InvalidParameter"), 400), gateway.SmsRefused),
        (reply(SNS_BAD.format("Throttling"), 400), gateway.SmsFailed),
        (reply(SNS_BAD.format("AuthorizationError"), 403), gateway.SmsDenied),
        (reply(SNS_BAD.format("ServiceUnavailable"), 503), gateway.SmsFailed),
        (reply(SNS_BAD.format("InternalError"), 500), gateway.SmsUnknown),
        (reply("<html><h1>Bad gateway", 502), gateway.SmsUnknown),
        (reply("", 500), gateway.SmsUnknown),
        (reply("", 503), gateway.SmsFailed),
        (reply("", 408), gateway.SmsUnknown),
        (reply(SNS_OK[:-30]), gateway.SmsUnknown),
        (reply(SNS_OK.replace("MessageId", "Id")), gateway.SmsUnknown),
        (reply("<h1>Welcome to the hotel</h1>"), gateway.SmsUnknown),
        (reply(""), gateway.SmsUnknown),
        (hang, gateway.SmsUnknown),
    ],
)
def test_sns_by_amazons_own_package(
    provider: Provider, monkeypatch: pytest.MonkeyPatch, answer: Any, expected: Any
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    provider.answer = answer
    entry = {"kind": "sns", "region": "eu-west-1", "endpoint": provider.url, "timeout_s": 0.5}
    sender = sender_of(entry)
    if expected:
        with pytest.raises(gateway.SmsFailed) as caught:
            gateway._send_by(sender.providers[0], "Gateway", TO, "x", 0.5)
        assert type(caught.value) is expected
        assert NUMBER not in str(caught.value)
    else:
        assert sender.send("Gateway", TO, "x").kind == "sns"
        form = provider.received[0].form
        assert (form["PhoneNumber"], form["Message"]) == (NUMBER, "x")
        assert "AWS.SNS.SMS.SenderID" in form.values()
        sender.send("+15005550006", TO, "x")
        assert "AWS.MM.SMS.OriginationNumber" in provider.received[1].form.values()


def test_sns_that_says_nothing_may_have_taken_it(
    provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """botocore's own time-out is an OSError, which from others means that nothing was sent."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    provider.answer = hang
    entry = {"kind": "sns", "region": "eu-west-1", "endpoint": provider.url, "timeout_s": 0.2}
    sender = sender_of(entry)
    with pytest.raises(gateway.SmsUnknown):
        gateway._send_by(sender.providers[0], "Gateway", TO, "x", 5.0)


@pytest.mark.parametrize(
    ("entry", "environment", "file", "region"),
    [
        ("", {"AWS_REGION": "eu-west-1"}, "", "eu-west-1"),  # all that Lambda and ECS set
        ("", {"AWS_REGION": "eu-west-1", "AWS_DEFAULT_REGION": "eu-west-2"}, "", "eu-west-2"),
        ("", {"AWS_REGION": "eu-west-1"}, "[default]\nregion = eu-west-3", "eu-west-3"),
        ("us-east-1", {"AWS_REGION": "eu-west-1"}, "", "us-east-1"),
    ],
)
def test_aws_region_counts_where_nothing_else_names_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, entry: str, environment: dict[str, str],
    file: str, region: str,
) -> None:  # fmt: skip
    (tmp_path / "config").write_text(file)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.delenv("AWS_DEFAULT_REGION", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    [one] = sender_of({"kind": "sns", **({"region": entry} if entry else {})}).providers
    assert isinstance(one, gateway.SnsSms)
    assert one.client.meta.region_name == region
    table = gateway.DynamoTable("dynamodb://phones" + f"?region={entry}" * bool(entry), time.time)
    assert table._client.meta.region_name == region


def test_sns_without_boto3_refuses_to_start() -> None:
    code = "import sys; sys.modules['boto3'] = None; sys.argv = []; import gateway\n"
    code += "gateway.SmsSender(gateway.Settings(sms_providers=[{'kind': 'sns', 'region': 'r'}]))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=lab.ROOT)
    assert b"SettingsError: sms_providers: sns needs boto3: pip install boto3" in ended.stderr


@pytest.fixture
def tls(provider: Provider, tmp_path: Path) -> Path:
    """Have the provider speak TLS; gives the certificate that it has issued to itself."""
    key = gateway.generate_key("RS256")
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + DAY)
        .add_extension(here, critical=False)
        .sign(key, hashes.SHA256())
    )
    path, both = tmp_path / "ca.pem", tmp_path / "both.pem"
    pem = serialization.Encoding.PEM
    path.write_bytes(certificate.public_bytes(pem))
    both.write_bytes(gateway._pem(key) + path.read_bytes())
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(both)
    provider.server.socket = context.wrap_socket(provider.server.socket, server_side=True)
    provider.url = provider.url.replace("http:", "https:")
    return path


def test_tls_is_checked_and_bounded_as_well(
    provider: Provider, tls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [one] = sender_of(provider.nexmo()).providers
    with pytest.raises(gateway.SmsFailed, match=r"cannot be reached: .*self-signed"):
        one.send("Gateway", TO, "text")
    assert provider.received == []  # nothing secret goes to whoever is there
    monkeypatch.setenv("SSL_CERT_FILE", str(tls))
    [one] = sender_of(provider.nexmo()).providers
    assert one.send("Gateway", TO, "text") == ["0A0"]
    assert len(provider.received) == 1
    provider.answer = drip(b"HTTP/1.1 200 OK\r\nContent-Length: 90\r\n\r\n" + b" " * 90)
    with pytest.raises(gateway.SmsUnknown):
        one.send("Gateway", TO, "text", 0.4)


def test_tls_that_breaks_under_sns_after_the_request_leaves_it_open(
    provider: Provider, tls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """botocore has one error for this and for a certificate that it does not trust."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tls))

    def no_tls(handler: Any) -> None:
        os.write(handler.connection.fileno(), b"HTTP/1.1 200 OK\r\n\r\n")
        handler.close_connection = True

    provider.answer = no_tls
    sender = sender_of({"kind": "sns", "region": "eu-west-1", "endpoint": provider.url})
    with pytest.raises(gateway.SmsUnknown, match="SSLError"):
        gateway._send_by(sender.providers[0], "Gateway", TO, "x", 5.0)
    assert len(provider.received) == 1


def test_sns_that_cannot_be_reached_surely_did_not_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    entry = {"kind": "sns", "region": "eu-west-1", "endpoint": closed_url()}
    for proxy in ("", closed_url()):
        monkeypatch.setenv("http_proxy", proxy)
        monkeypatch.setenv("no_proxy", "" if proxy else "127.0.0.1")
        with pytest.raises(gateway.SmsFailed, match="cannot be reached") as caught:
            gateway._send_by(sender_of(entry).providers[0], "Gateway", TO, "x", 5.0)
        assert type(caught.value) is gateway.SmsFailed


# -- What an answer means -------------------------------------------------------

KANNEL = {"kind": "kannel", "username": "u", "password": "p"}
TWILIO = {"kind": "twilio", "account_sid": "AC1", "auth_token": "t"}
NEXMO = {"kind": "nexmo", "api_key": "k", "api_secret": "s"}
HTTP = {"kind": "http", "body": "{to} {text}", "success": '"ok": ?true'}
HALF = b'HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"messages": [{"status": "0"}]}'


def cut(data: bytes) -> Callable[[Any], None]:
    """Send this, and close the connection."""

    def answer(handler: Any) -> None:
        handler.wfile.write(data)
        handler.close_connection = True

    return answer


@pytest.mark.parametrize(
    ("entry", "answer", "meaning"),
    [
        (NEXMO, nexmo("0", "0"), None),
        (NEXMO, nexmo("0", "1"), "Unknown"),  # a part has left; in 2014 the first was all
        (NEXMO, nexmo("6", "0"), "Unknown"),
        (NEXMO, nexmo("6", "x"), "Unknown"),
        (NEXMO, nexmo("4"), "Denied"),  # bad credentials: 200 all the same
        (NEXMO, nexmo("1"), "Throttled"),
        (NEXMO, nexmo("1", "1"), "Throttled"),
        (NEXMO, nexmo("1", "5"), "Failed"),
        (NEXMO, nexmo("3"), "Refused"),  # this number
        (NEXMO, nexmo("3", "4"), "Failed"),
        (NEXMO, nexmo("3", "7"), "Refused"),
        (NEXMO, nexmo(), "Unknown"),
        (NEXMO, reply("<h1>Welcome to the hotel"), "Unknown"),
        (NEXMO, reply({"messages": [{"status": 0}]}), None),
        (NEXMO, nexmo("99"), "Unknown"),  # no status that is documented
        (NEXMO, reply("x" * 100_000), "Unknown"),  # read up to a limit
        (NEXMO, reply({"messages": [{"status": "0"}]}, 500), "Unknown"),
        (NEXMO, cut(b""), "Unknown"),
        (NEXMO, cut(HALF), "Unknown"),
        (NEXMO, hang, "Unknown"),
        (TWILIO, reply({"sid": "SM1", "status": "queued"}, 201), None),
        (TWILIO, reply({"sid": "SM1", "status": "failed"}, 201), "Failed"),
        (TWILIO, reply({"code": 21211, "message": "bad +447700900123"}, 400), "Refused"),
        (TWILIO, reply({"code": 20003}, 401), "Denied"),
        (TWILIO, reply({"code": 20429}, 429), "Throttled"),
        (TWILIO, reply({}, 201), "Unknown"),
        (KANNEL, reply("0: Accepted for delivery", 202), None),
        (KANNEL, reply("3: Queued for later delivery", 202), "Unknown"),
        (KANNEL, reply("", 202), "Unknown"),
        (KANNEL, reply("<h1>Welcome to the hotel"), "Unknown"),
        (KANNEL, reply("Missing receiver number, rejected", 400), "Refused"),
        (KANNEL, reply("Authorization failed for sendsms", 403), "Denied"),
        (KANNEL, reply("Temporary failure, try again later.", 503), "Failed"),
        (HTTP, reply({"ok": True}), None),
        (HTTP, reply({"ok": False}), "Failed"),
        (HTTP, reply("", 202), "Failed"),  # it is whole, and has no success
        (HTTP, reply("x" * 100_000), "Unknown"),  # it is not, as far as it is read
        (HTTP, reply({"ok": True}, 404), "Failed"),
        (HTTP, reply({"ok": True}, 422), "Refused"),
    ],
)
def test_what_an_answer_means(
    provider: Provider, entry: gateway.Json, answer: Any, meaning: str | None
) -> None:
    provider.answer = answer
    [one] = sender_of({"endpoint": provider.url, **entry}).providers
    if meaning is None:
        one.send("Gateway", TO, "text", 2.0)
        return
    with pytest.raises(gateway.SmsFailed) as caught:
        one.send("Gateway", TO, "text", 0.4 if answer is hang else 5.0)
    assert type(caught.value) is getattr(gateway, f"Sms{meaning}")
    assert NUMBER[1:] not in str(caught.value)
    assert len(provider.received) == 1


REFUSALS = {400: "Refused", 422: "Refused", 501: "Failed", 503: "Failed"}
REFUSALS |= dict.fromkeys([404, 405, 407, 409, 413, 420, 451, 499], "Failed")
REFUSALS |= dict.fromkeys([401, 402, 403], "Denied")
OPEN = [300, 301, 302, 303, 307, 308, 408, 500, 502, 504, 505, 507, 511, 520, 524, 599, 600]


@pytest.mark.parametrize("entry", [NEXMO, TWILIO, KANNEL, HTTP], ids=lambda entry: entry["kind"])
def test_what_a_status_means(provider: Provider, entry: gateway.Json) -> None:
    """Whatever the body says; and nothing but what the table has is a failure."""
    [one] = sender_of({"endpoint": provider.url, **entry}).providers
    for n, (status, meaning) in enumerate((REFUSALS | dict.fromkeys(OPEN, "Unknown")).items()):
        provider.answer = reply({"ok": True, "sid": "1", "messages": [{"status": "0"}]}, status)
        with pytest.raises(gateway.SmsFailed) as caught:
            one.send("Gateway", TO, "text")
        assert type(caught.value) is getattr(gateway, f"Sms{meaning}"), status
        assert len(provider.received) == n + 1


MAY_HAVE_LEFT: dict[str, tuple[gateway.Json, Any]] = {
    "JSON cut off": (NEXMO, reply('{"messages": [{"status": "0"')),
    "less than its length": (NEXMO, cut(HALF)),
    "empty 200": (NEXMO, reply("")),
    "empty 202": (KANNEL, reply("", 202)),
    "empty 201": (TWILIO, reply("", 201)),
    "HTML 200": (NEXMO, reply("<h1>Welcome to the hotel")),
    "one part taken, one throttled": (NEXMO, nexmo("0", "1")),
    "one part taken, one refused": (NEXMO, nexmo("0", "6")),
    **{f"HTTP {status}": (NEXMO, reply("", status)) for status in OPEN},
    "HTTP 500 of one's own": (HTTP, reply({"ok": False}, 500)),
}


@pytest.mark.parametrize("name", MAY_HAVE_LEFT)
def test_what_may_have_left_is_counted_each_time(
    provider: Provider, make_client: MakeClient, name: str
) -> None:
    """Or a session has messages sent without end, to whoever it likes."""
    entry, provider.answer = MAY_HAVE_LEFT[name]
    entry = {"endpoint": provider.url, **entry}
    client = make_client(sms_providers=[entry], sends_per_session=5, sends_per_hour=9)
    client.register()
    answers = [client.ask() for _ in range(12)]
    sent = len(provider.received)
    assert [answer.status for answer in answers] == [200] * sent + [429] * (12 - sent)
    assert sent == 5  # which is what one session may
    assert counted(client.gateway) == sent


def test_nobody_listens() -> None:
    [one] = sender_of({**NEXMO, "endpoint": closed_url()}).providers
    with pytest.raises(gateway.SmsFailed, match="cannot be reached") as caught:
        one.send("Gateway", TO, "text")
    assert type(caught.value) is gateway.SmsFailed


def test_connections_are_kept(provider: Provider) -> None:
    sender = sender_of(provider.nexmo())
    for _ in range(5):
        sender.send("Gateway", TO, "text")
    assert (len(provider.received), provider.connections) == (5, 1)
    provider.answer = after(0.3)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: sender.send("Gateway", TO, "text"), range(8)))
    assert (len(provider.received), provider.connections) == (13, 8)


def test_no_more_connections_are_kept_than_may_be(
    provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway, "_IDLE_CONNECTIONS_MAX", 2)
    sender = sender_of(provider.nexmo())
    provider.answer = after(0.3)
    for connections in (6, 10):  # two are there already
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(lambda _: sender.send("Gateway", TO, "text"), range(6)))
        assert provider.connections == connections


@pytest.mark.parametrize("method", ["POST", "GET"])
def test_a_kept_connection_that_closes_does_not_make_the_phone_get_two(
    provider: Provider, method: str
) -> None:
    """By itself libcurl sends a request again that a kept connection took without an answer."""
    provider.answer = reply("OK")
    entry = {"kind": "http", "method": method, "endpoint": provider.url + ASKS}
    [one] = sender_of(entry).providers
    one.send("Gateway", TO, "text")
    provider.answer = cut(b"")
    with pytest.raises(gateway.SmsUnknown):
        one.send("Gateway", TO, "text")
    assert len(provider.received) == 2
    provider.answer = reply("OK")
    one.send("Gateway", TO, "text")
    assert len(provider.received) == 3


def test_a_connection_that_closed_while_it_was_kept_is_made_anew(provider: Provider) -> None:
    def last(handler: Any) -> None:
        taken(handler)
        handler.close_connection = True

    provider.answer = last
    [one] = sender_of(provider.nexmo()).providers
    for connections in (1, 2, 3):
        one.send("Gateway", TO, "text")
        kannel.wait_for(lambda: provider.open == 0)
        time.sleep(0.05)  # for its farewell
        assert (len(provider.received), provider.connections) == (connections, connections)


def test_a_long_answer_costs_no_memory(provider: Provider) -> None:
    provider.answer = flood(b"HTTP/1.1 200 OK\r\nContent-Length: 9000000000\r\n\r\n", b"OK")
    [one] = sender_of({"kind": "http", "endpoint": provider.url + ASKS, "success": "^OK"}).providers
    assert isinstance(one, gateway.HttpSms)
    started = time.monotonic()
    status, body, _ = one._exchange(one._request(one._values("Gateway", TO, "text")), 9.0)
    assert (status, len(body)) == (200, gateway.ANSWER_MAX_BYTES)
    assert one.send("Gateway", TO, "text", 9.0) == []
    assert time.monotonic() - started < 5 * shared()  # no more is read


# -- Proxies --------------------------------------------------------------------


class _Proxy(BaseHTTPRequestHandler):
    """A forward proxy on loopback; notes first lines and headers."""

    def do_POST(self) -> None:
        self.server.seen.append(self.requestline + str(self.headers))  # type: ignore[attr-defined]
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer = urllib3.request("POST", self.path, body=body, headers=dict(self.headers))
        self.send_response(answer.status)
        self.send_header("Content-Length", str(len(answer.data)))
        self.end_headers()
        self.wfile.write(answer.data)

    def do_CONNECT(self) -> None:
        self.server.seen.append(self.requestline + str(self.headers))  # type: ignore[attr-defined]
        host, _, port = self.path.rpartition(":")
        if host == "closed.example":
            return self.send_error(403)
        with socket.create_connection((host, int(port))) as far, contextlib.suppress(OSError):
            ends = {self.connection: far, far: self.connection}
            self.send_response(200)
            self.end_headers()
            while data := (one := select.select(list(ends), [], [])[0][0]).recv(65536):
                ends[one].sendall(data)
        return None

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    """A proxy that no environment names yet; its list ``seen`` is what it was asked."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), _Proxy) as server:
        server.daemon_threads, server.seen = True, []  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("variable", "way"),
    [
        ("http_proxy", "POST http://127.0.0.1:"), ("ALL_PROXY", "POST http://127.0.0.1:"),
        # As with curl: it may come from a header "Proxy" where something like CGI is involved.
        ("HTTP_PROXY", None), ("HTTPS_PROXY", None),
    ],
)  # fmt: skip
def test_a_message_goes_through_the_proxy_of_the_environment(
    provider: Provider, proxy: Any, monkeypatch: pytest.MonkeyPatch, variable: str, way: str | None
) -> None:
    monkeypatch.setenv(variable, f"http://127.0.0.1:{proxy.server_port}")
    sender = sender_of(provider.nexmo())
    sender.send("Gateway", TO, "text")
    assert len(provider.received) == 1
    assert [seen[: len(way or "")] for seen in proxy.seen] == ([way] if way else [])
    monkeypatch.setenv("NO_PROXY", "example.com,127.0.0.0/8")
    sender.send("Gateway", TO, "text")
    assert len(provider.received) == 2
    assert len(proxy.seen) == (1 if way else 0)


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY"])
def test_a_proxy_sees_nothing_of_a_message_over_tls(
    provider: Provider, tls: Path, proxy: Any, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tls))
    monkeypatch.setenv(variable, f"http://user:word@127.0.0.1:{proxy.server_port}")
    headers = {"Authorization": "Bearer hunter2"}
    entry = {"kind": "http", "endpoint": provider.url + ASKS, "headers": headers}
    sender = sender_of(entry)
    for _ in range(3):
        sender.send("Gateway", TO, "text")
    assert len(provider.received) == 3
    [seen] = proxy.seen  # one tunnel for three messages
    assert seen.startswith("CONNECT 127.0.0.1:")
    assert "Proxy-Authorization: Basic " + base64.b64encode(b"user:word").decode() in seen
    assert "hunter2" not in seen + NUMBER
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    sender_of(entry).send("Gateway", TO, "text")
    assert (len(provider.received), len(proxy.seen)) == (4, 1)


def test_what_a_proxy_does_not_let_through_was_surely_not_sent(
    proxy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.server_port}")
    [one] = sender_of({**NEXMO, "endpoint": "https://closed.example/sms"}).providers
    with pytest.raises(gateway.SmsFailed, match=r"cannot be reached: .* 403") as caught:
        one.send("Gateway", TO, "text")
    assert type(caught.value) is gateway.SmsFailed
    monkeypatch.setenv("HTTPS_PROXY", closed_url())
    with pytest.raises(gateway.SmsFailed, match="cannot be reached") as caught:
        one.send("Gateway", TO, "text")
    assert type(caught.value) is gateway.SmsFailed


# -- What is logged -------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [b"HTTP/1.1 200 OK\r\nX {}\r\nContent-Length: 0\r\n\r\n", b"{} HTTP/1.1\r\n\r\n", b"{}"],
)
def test_nothing_of_a_message_is_logged(
    provider: Provider, caplog: pytest.LogCaptureFixture, answer: bytes
) -> None:
    """Not by us, and not by what we use."""
    caplog.set_level(logging.DEBUG)
    provider.answer = cut(answer.replace(b"{}", b"447700900123 hunter2 135790"))
    entry = {"kind": "http", "endpoint": provider.url + "?t={text}&to={to}", "success": "OK"}
    with contextlib.suppress(gateway.SmsFailed):
        sender_of({**entry, "method": "GET"}).send("Gateway", TO, "code: 135790")
    assert "sms: http" in caplog.text
    for secret in ("135790", "447700900123", "hunter2"):
        assert secret not in caplog.text


# -- Half-configured ------------------------------------------------------------

URL = {"endpoint": "http://127.0.0.1:9/" + ASKS}


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ({"kind": "twilio"}, "account_sid"),
        ({**TWILIO, "auth_token": ""}, "auth_token"),
        ({**KANNEL}, "endpoint"),
        ({**KANNEL, **URL, "password": 5}, "password"),
        ({"kind": "sns"}, "region"),  # nor does the environment name one
        ({"kind": "http"}, "endpoint"),
        ({"kind": "http", "endpoint": "gw.example/send"}, "endpoint"),
        ({"kind": "http", "endpoint": "ftp://gw.example/"}, "endpoint"),
        ({"kind": "http", "endpoint": "http://user:hunter2@gw.example/"}, "no user:password@"),
        ({"kind": "http", "endpoint": "http://{to}.example/"}, "endpoint"),
        ({"kind": "http", "endpoint": "http://gw.example\\@hunter2/"}, "endpoint"),
        ({"kind": "http", "endpoint": "http://gw.example:port/"}, "endpoint"),
        ({"kind": "http", **URL, "method": "GET / HTTP/1.1\r\nA: b\r\n"}, "method"),
        ({"kind": "http", **URL, "headers": {"A: b\r\nC": "d"}}, "templates"),
        (
            {"kind": "http", **URL, "body": "{number}"},
            r"has \{number\} in its templates; there are",
        ),
        ({"kind": "http", "endpoint": "http://h/?to={to}"}, r"\{text\} or \{code\}"),
        ({"kind": "http", "endpoint": "http://h/?t={text}"}, r"needs \{to\}"),
        ({"kind": "http", **URL, "headers": {"A": 5}}, "headers"),
        ({"kind": "http", **URL, "headers": {"Content-Type": "image/png"}}, "types"),
        ({"kind": "http", **URL, "success": "("}, "regular expression as success"),
        ({"kind": "http", **URL, "refused": "["}, "regular expression as refused"),
        ({"kind": "http", **URL, "id": "*"}, "regular expression as id"),
        ({"kind": "nexmo", "api_key": "k\ud800", "api_secret": "s"}, "api_key, api_secret"),
        ({"kind": "http", **URL, "api_key": "hunter2"}, "api_key"),
        ({**NEXMO, "timeout_s": 0}, "timeout_s"),
        ({**NEXMO, "timeout_s": 13}, "timeout_s"),
        ({**NEXMO, "connect_timeout_s": float("inf")}, "timeout_s"),
        ({**NEXMO, "timeout_s": True}, "timeout_s"),
        ({**NEXMO, "body": "{text}"}, "body"),
        ({**TWILIO, "receipts": True}, "receipts"),  # no webhook of its kind is open
    ],
)
def test_half_configured_is_refused(
    entry: gateway.Json, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(gateway.SettingsError, match=named) as caught:
        sender_of(entry)
    assert "hunter2" not in str(caught.value)


def test_each_declared_kind_has_its_provider() -> None:
    assert list(gateway.PROVIDERS) == list(gateway.SMS_LISTS["sms_providers"])


def test_more_providers_than_bits() -> None:
    with pytest.raises(gateway.SettingsError, match="1 to 16"):
        sender_of(*[{"kind": "outbox"}] * 17)


def test_the_rest_of_an_endpoint_is_not_shown() -> None:
    entry = {"kind": "http", "endpoint": "https://gw.example:8443/hunter2/send?key=hunter2"}
    shown = gateway.Settings(sms_providers=[entry]).shown("sms_providers")
    assert shown == '[{"kind": "http", "endpoint": "https://gw.example:8443/…"}]'


# -- Time -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 90\r\n\r\n" + b" " * 90,
        b"HTTP/1.1 200 OK\r\n" + b"X-Pad: 0123456789\r\n" * 20,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 40,
    ],
    ids=["body", "headers", "chunks"],
)
def test_a_drip_does_not_hold_longer_than_the_time_out(provider: Provider, data: bytes) -> None:
    """Each byte comes in time; the answer as a whole does not. The thread behind ends as well."""
    provider.answer = drip(data)
    [one] = sender_of(provider.nexmo()).providers
    started = time.monotonic()
    with pytest.raises(gateway.SmsUnknown):
        one.send("Gateway", TO, "text", 0.4)
    assert time.monotonic() - started < 3 * shared()  # all of it would take 5 s and more


HANG = """
#include <unistd.h>
int getaddrinfo(const char *n, const char *s, const void *h, void *r) { sleep(60); return -2; }
"""


@pytest.mark.skipif(not shutil.which("cc"), reason="a C compiler makes the name server that hangs")
def test_a_name_server_that_hangs_does_not_hold_longer(tmp_path: Path) -> None:
    """Neither does giving up a connection that waits for it (libcurl's resolver is a thread)."""
    (tmp_path / "hang.c").write_text(HANG)
    library, script = (
        str(tmp_path / "hang.so"),
        f"""
import time, gateway
gateway._IDLE_CONNECTIONS_MAX = 0
[one] = gateway.SmsSender(gateway.Settings(sms_providers=[{NEXMO}])).providers
for _ in range(3):
    started = time.monotonic()
    try:
        one.send("Gateway", "{TO}", "text", 0.3)
    except gateway.SmsFailed as error:
        print(type(error).__name__, time.monotonic() - started < 1)
""",
    )
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "hang.c"], check=True)
    environ = {**os.environ, "LD_PRELOAD": library}
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, capture_output=True, cwd=lab.ROOT, env=environ, timeout=40 * shared()
    )
    assert (done.stdout, done.stderr) == (b"SmsFailed True\n" * 3, b"")


def test_a_name_server_that_hangs_does_not_hold_sns_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """boto3 asks it within Python, where nothing ends the wait: the message may yet leave."""
    over = threading.Event()

    def getaddrinfo(*_: Any, **__: Any) -> Any:
        over.wait(30)
        raise socket.gaierror

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    entry = {"kind": "sns", "region": "eu-west-1", "endpoint": "http://slow.example/"}
    started = time.monotonic()
    assert sender_of({**entry, "timeout_s": 0.3}).send("Gateway", TO, "text").kind == ""
    assert time.monotonic() - started < 5 * shared()
    over.set()


def test_a_handshake_that_hangs_is_surely_not_sent(provider: Provider) -> None:
    """The connection is there; the time-out is that of connecting, and nothing was said yet."""
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the kernel accepts, nobody speaks
        endpoint = f"https://127.0.0.1:{silent.getsockname()[1]}/"
        [one] = sender_of({**NEXMO, "endpoint": endpoint, "connect_timeout_s": 0.3}).providers
        started = time.monotonic()
        with pytest.raises(gateway.SmsFailed, match="cannot be reached") as caught:
            one.send("Gateway", TO, "text")
        assert type(caught.value) is gateway.SmsFailed
        assert 0.25 < time.monotonic() - started < 2 * shared()


def test_surplus_sends_are_refused_at_once_and_the_rest_is_served(
    start_gateway: Callable[..., GatewayProcess],
) -> None:
    """200 at once, to a provider that takes 5 s: 32 of 64 threads wait, 168 are told."""
    done, gate = threading.Event(), threading.Event()

    def slow(handler: Any) -> None:
        gate.wait(4.5)
        taken(handler)

    with Provider(slow) as provider:
        process = start_gateway("--sms-providers", json.dumps([provider.nexmo()]),
                                "--sends-per-hour", "1000", "--threads", "64")  # fmt: skip
        clients = [process.client() for _ in range(200)]
        for client in clients:
            client.register()
        beats: list[float] = []

        def beat() -> None:
            while not done.is_set():
                started = time.monotonic()
                http = urllib3.PoolManager(retries=False, timeout=30)  # a connection of its own
                assert http.request("GET", process.url + "/__heartbeat__").status == 200
                beats.append(time.monotonic() - started)
                http.clear()
                done.wait(0.01)

        with ThreadPoolExecutor(201) as pool:
            watch = pool.submit(beat)
            numbers = [f"+4477009{n:05}" for n in range(200)]
            replies = list(pool.map(lambda c, n: c.verify(n), clients, numbers))
            done.set()
            watch.result()
    statuses = [reply.status for reply in replies]
    print(f"slowest heartbeat {max(beats):.3f} s of {len(beats)}; sent {statuses.count(200)}")
    assert set(statuses) == {200, 503}
    assert {r.body["errno"] for r in replies if r.status == 503} == {201}
    assert statuses.count(200) >= 32
    assert len(provider.received) == statuses.count(200)
    assert len(beats) > 5  # while 32 sends were waiting


# -- More than one --------------------------------------------------------------


def entries(three: list[Provider], **more: Any) -> list[gateway.Json]:
    return [one.nexmo(priority=10 - n, **more) for n, one in enumerate(three)]


def counts(three: list[Provider]) -> list[int]:
    return [len(one.received) for one in three]


def test_a_failed_provider_is_tried_last_for_a_while(three: list[Provider]) -> None:
    """Once it has failed for two numbers: one alone may be what is wrong."""
    sender = sender_of(*entries(three))
    three[0].answer = nexmo("5")
    for to in (TO, OTHER, TO):
        sender.send("Gateway", to, "text")
    assert counts(three) == [2, 3, 0]
    three[1].answer = nexmo("5")
    for to in (OTHER, TO):
        sender.send("Gateway", to, "text")
    assert counts(three) == [2, 5, 2]
    three[0].answer = taken
    sender.resting[0] = 0  # its rest is over
    sender.send("Gateway", TO, "text")
    sender.send("Gateway", TO, "text")
    assert counts(three) == [4, 5, 2]
    assert list(sender.resting) == [1]


@pytest.mark.parametrize("fault", ["failed", "unknown", "refused", "slow", "says nothing"])
@pytest.mark.parametrize("bad", [1, 2, 3])
def test_a_provider_rests_after_failures_for_two_numbers(
    three: list[Provider], fault: str, bad: int
) -> None:
    """Or anybody with one bad number moves everybody to the dear provider, as often as they like.

    A final refusal of a number is no failure, for however many.
    """
    sender = sender_of(*entries(three, timeout_s=0.5))
    three[0].answer = {
        "failed": nexmo("5"), "unknown": cut(b""), "refused": nexmo("3"), "slow": after(0.3),
        "says nothing": hang,
    }[fault]  # fmt: skip
    tried = 0 if fault == "refused" else bad
    for n in range(3):  # again and again, to the same few
        number = gateway.Msisdn(f"+44770090012{n % bad}")
        sender.send("Gateway", number, "text")
    three[0].answer = taken
    before = counts(three)
    for n in range(4):
        sender.send("Gateway", gateway.Msisdn(f"+44770090045{n}"), "text")
    rests = tried >= 2
    assert counts(three)[0] == before[0] + (0 if rests else 4)
    assert counts(three)[1] == before[1] + (4 if rests else 0)


def test_a_success_in_between_ends_the_count_of_failures(three: list[Provider]) -> None:
    """Two bad numbers a week apart are no sign of anything."""
    sender = sender_of(*entries(three))
    for to in (TO, OTHER):
        three[0].answer = nexmo("5")
        sender.send("Gateway", to, "text")
        three[0].answer = taken
        assert sender.send("Gateway", TO, "text").kind == "nexmo"
    assert counts(three) == [4, 2, 0]


def test_one_message_only_tries_whether_it_is_well_again(three: list[Provider]) -> None:
    sender = sender_of(*entries(three))
    sender.resting[0] = 0
    gate = threading.Event()

    def slow(handler: Any) -> None:
        gate.wait(10)
        taken(handler)

    three[0].answer = slow
    with ThreadPoolExecutor(1) as pool:
        probe = pool.submit(sender.send, "Gateway", TO, "text")
        kannel.wait_for(lambda: three[0].received)
        for _ in range(3):
            sender.send("Gateway", TO, "text")
        gate.set()
        probe.result()
    assert counts(three) == [1, 3, 0]


def test_a_refused_number_does_not_make_a_provider_suspect(three: list[Provider]) -> None:
    """Else anybody with a bad number could send everybody to the second-best provider."""
    sender = sender_of(*entries(three))
    three[0].answer = nexmo("3")
    sender.send("Gateway", TO, "text")
    three[0].answer = taken
    sender.send("Gateway", TO, "text")
    assert counts(three) == [2, 1, 0]


def test_a_slow_provider_is_tried_after_the_others(three: list[Provider]) -> None:
    sender = sender_of(*entries(three, timeout_s=1.0))
    three[0].answer = after(0.7)
    for to in (TO, OTHER):
        assert sender.send("Gateway", to, "text").kind == "nexmo"  # it is sent nevertheless
    assert counts(three) == [2, 0, 0]
    sender.send("Gateway", TO, "text")
    assert counts(three) == [2, 1, 0]


@pytest.mark.parametrize("tries", [1, 2, 3])
def test_at_most_sms_send_tries(three: list[Provider], tries: int) -> None:
    for one in three:
        one.answer = nexmo("5")
    with pytest.raises(gateway.SmsFailed):
        sender_of(*entries(three), sms_send_tries=tries).send("Gateway", TO, "text")
    assert sum(counts(three)) == tries


def test_a_resend_goes_to_another_provider(three: list[Provider], make_client: MakeClient) -> None:
    client = make_client(sms_providers=entries(three), sends_per_session=9)
    client.register()
    for expected in ([1, 0, 0], [1, 1, 0], [1, 1, 1], [2, 1, 1]):
        assert (
            client.ask() if sum(expected) == 1 else client.call("/sms/resend_code")
        ).status == 200
        assert counts(three) == expected
    other = client.another()
    other.register()
    other.ask("+447700900456")
    assert counts(three) == [3, 1, 1]


def test_an_unknown_among_them_is_answered_as_sent(
    three: list[Provider], make_client: MakeClient
) -> None:
    three[0].answer, three[1].answer, three[2].answer = nexmo("5"), cut(b""), nexmo("1")
    client = make_client(sms_providers=entries(three), sends_per_hour=2)
    client.register()
    assert client.ask().status == 200
    other = client.another()
    other.register()
    assert other.ask("+447700900456").status == 200
    codes = {one.received[0].form["text"].split()[-1] for one in three}
    assert len(codes) == 1  # whoever is next sends the same code
    assert client.call("/sms/resend_code").errno == 116  # each counts
    assert client.call("/sms/verify_code", {"code": codes.pop()}).status == 200


def test_an_unknown_is_answered_as_sent_though_no_further_try_can_be_paid_for(
    three: list[Provider], make_client: MakeClient
) -> None:
    three[0].answer = cut(b"")
    client = make_client(sms_providers=entries(three), sends_per_hour=1)
    client.register()
    assert client.ask().status == 200
    assert counts(three) == [1, 0, 0]
    code = three[0].received[0].form["text"].split()[-1]
    assert client.call("/sms/resend_code").errno == 116
    assert client.call("/sms/verify_code", {"code": code}).status == 200


FAILED, REFUSED, UNKNOWN = nexmo("5"), nexmo("3"), cut(b"")


@pytest.mark.parametrize(
    ("answers", "tried", "held", "errno"),
    [
        ([taken, taken, taken], [1, 0, 0], 1, None),
        ([FAILED, FAILED, taken], [1, 1, 1], 1, None),
        ([REFUSED, FAILED, taken], [1, 1, 1], 1, None),
        ([UNKNOWN, UNKNOWN, taken], [1, 1, 1], 3, None),  # each may have been sent
        ([UNKNOWN, UNKNOWN, FAILED], [1, 1, 1], 2, None),
        ([UNKNOWN, UNKNOWN, REFUSED], [1, 1, 1], 2, None),
        ([FAILED, UNKNOWN, FAILED], [1, 1, 1], 1, None),
        ([UNKNOWN, taken, taken], [1, 1, 0], 2, None),
        ([FAILED, FAILED, FAILED], [1, 1, 1], 0, 201),
        ([REFUSED, REFUSED, REFUSED], [1, 1, 1], 0, 107),
        ([REFUSED, REFUSED, FAILED], [1, 1, 1], 0, 201),  # the third may take it tomorrow
        ([FAILED, REFUSED, REFUSED], [1, 1, 1], 0, 201),
    ],
)
def test_each_paid_attempt_is_counted(
    three: list[Provider], make_client: MakeClient, answers: list[Any], tried: list[int],
    held: int, errno: int | None,
) -> None:  # fmt: skip
    """And given back if it surely was not taken: else one count paid for three messages."""
    for one, answer in zip(three, answers, strict=True):
        one.answer = answer
    client = make_client(sms_providers=entries(three), sends_per_hour=9, sends_per_session=9)
    client.register()
    answer = client.ask()
    if errno:
        assert answer.errno == errno
    else:
        assert answer.status == 200
    assert counts(three) == tried
    assert counted(client.gateway) == held


@pytest.mark.parametrize("kinds", [("outbox", "nexmo"), ("nexmo", "outbox")])
@pytest.mark.parametrize("taken_by", ["first", "second"])
def test_only_attempts_that_cost_money_are_counted(
    provider: Provider, make_client: MakeClient, tmp_path: Path, kinds: tuple[str, ...],
    taken_by: str,
) -> None:  # fmt: skip
    both = [{"kind": "outbox"} if kind == "outbox" else provider.nexmo() for kind in kinds]
    client = make_client(sms_providers=both, sends_per_hour=1)
    if taken_by == "second" and kinds[0] == "nexmo":
        provider.answer = FAILED
    elif taken_by == "second":
        (tmp_path / "outbox").write_text("a file where the folder belongs")
    client.register()
    assert client.ask().status == 200
    by_nexmo = kinds[taken_by == "second"] == "nexmo"
    assert counted(client.gateway) == by_nexmo
    assert len(provider.received) == (by_nexmo or kinds[0] == "nexmo")


def test_a_further_attempt_that_cannot_be_paid_for_is_not_made(
    three: list[Provider], make_client: MakeClient
) -> None:
    """The hour has one message left, which an unknown one takes; the next user gets none."""
    three[0].answer, three[1].answer = FAILED, UNKNOWN
    client = make_client(sms_providers=entries(three), sends_per_hour=1)
    client.register()
    assert client.ask().status == 200
    assert counts(three) == [1, 1, 0]
    other = client.another()
    other.register()
    assert other.ask("+447700900456").errno == 116
    assert counts(three) == [1, 1, 0]  # nobody was called
    assert counted(client.gateway) == 1


@pytest.mark.parametrize("sends", [True, False])
def test_a_count_ahead_that_is_not_used_is_given_back(
    provider: Provider, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch, sends: bool
) -> None:
    """The hour is counted before the session's record: a request that loses there pays nothing."""
    client = make_client(sms_providers=[provider.nexmo()], sends_per_hour=1)
    client.register()
    if not sends:
        monkeypatch.setattr(
            client.gateway.storage, "commit", lambda *_, **__: gateway.Commit.REPLAYED
        )
    answer = client.ask()
    assert answer.status == (200 if sends else 401)
    monkeypatch.undo()
    assert counted(client.gateway) == sends
    assert len(provider.received) == sends


def test_a_final_refusal_is_told_and_counts_for_the_session(
    three: list[Provider], make_client: MakeClient
) -> None:
    """Or calls of the providers for a number that gets no SMS were bounded by nothing."""
    for one in three:
        one.answer = REFUSED
    client = make_client(sms_providers=entries(three), sends_per_session=2, sends_per_hour=1)
    client.register()
    for number in (NUMBER, "+447700900456"):  # it is not the session's number
        answer = client.ask(number)
        assert (answer.status, answer.errno) == (400, 107)
        assert "no SMS can reach this number" in answer.json["message"]
    assert client.call("/sms/resend_code").errno == 111
    for one in three:
        one.answer = taken
    assert client.ask().errno == 114
    assert counts(three) == [2, 2, 2]
    assert counted(client.gateway) == 0


def test_all_failed_is_given_back(three: list[Provider], make_client: MakeClient) -> None:
    for one in three:
        one.answer = nexmo("5")
    client = make_client(sms_providers=entries(three), sends_per_hour=1, sends_per_session=1)
    client.register()
    for _ in range(3):
        assert client.ask().errno == 201
    for one in three:
        one.answer = taken
    assert client.ask().status == 200  # nothing was counted


def test_a_code_that_is_faster_than_its_provider_is_not_judged(
    three: list[Provider], make_client: MakeClient
) -> None:
    """The code may come back before the provider's answer does: then it is not judged yet."""
    client = make_client(sms_providers=entries(three))
    client.register()
    early = []

    def quick(handler: Any) -> None:
        code = three[0].received[0].form["text"].split()[-1]
        early.append(client.call("/sms/verify_code", {"code": code}))
        taken(handler)

    three[0].answer = quick
    assert client.ask().status == 200
    assert (early[0].status, early[0].errno, early[0].headers["retry-after"]) == (503, 201, "1")
    code = three[0].received[0].form["text"].split()[-1]
    assert client.call("/sms/verify_code", {"code": code}).status == 200  # it costs no try
    assert client.call("/sms/verify_code", {"code": code}).errno == 111  # used, and it stays so


def test_a_code_that_comes_while_another_is_sent_is_judged_by_the_older_one(
    three: list[Provider], make_client: MakeClient
) -> None:
    """Its tries too: the one that is on its way verifies nothing before it has left."""
    client = make_client(sms_providers=entries(three), sends_per_session=9)
    client.register()
    assert client.ask().status == 200
    older = three[0].received[0].form["text"].split()[-1]
    seen = []

    def quick(handler: Any) -> None:
        newer = three[1].received[0].form["text"].split()[-1]
        seen.append(client.call("/sms/verify_code", {"code": newer}).errno)
        seen.append(client.call("/sms/verify_code", {"code": older}).status)
        taken(handler)

    three[1].answer = quick
    assert client.call("/sms/resend_code").status == 200
    assert seen == [105, 200]
    newer = three[1].received[0].form["text"].split()[-1]
    assert client.call("/sms/verify_code", {"code": newer}).status == 200


@pytest.mark.parametrize("fault", ["refused", "error inside", "hang"])
def test_two_of_three_are_broken(
    fault: str, three: list[Provider], start_gateway: Callable[..., GatewayProcess]
) -> None:
    """Every user gets one distinct code in 12 s; then all are well, and the order heals."""
    broken = entries(three)
    for n, one in enumerate(three[:2]):
        one.answer = nexmo("4") if fault == "error inside" else hang
        if fault == "refused":
            broken[n]["endpoint"] = closed_url()
    options = ("--sms-providers", json.dumps(broken), "--sms-cool-down-s", "1")
    process = start_gateway(*options, "--sends-per-hour", "1000")

    def user(n: int) -> tuple[int, float, lab.Client]:
        client = process.client()
        client.register()
        started = time.monotonic()
        status = client.verify(f"+4477009001{n:02}").status
        return status, time.monotonic() - started, client

    with ThreadPoolExecutor(12) as pool:
        results = list(pool.map(user, range(12)))
    print(fault, "slowest", max(seconds for _, seconds, _ in results))
    assert {status for status, *_ in results} == {200}
    assert max(seconds for _, seconds, _ in results) < gateway.SEND_BUDGET_S + shared() / 2
    codes = set()
    for n, (_, _, client) in enumerate(results):
        number = f"+4477009001{n:02}"
        texts = {t for one in three for t in one.texts().get(number, [])}
        assert len(texts) == 1  # one code, however many providers had it
        assert len(three[2].texts()[number]) == 1
        code = texts.pop().split()[-1]
        codes.add(code)
        assert client.verify_code(code).body == {"msisdn": number}
    assert len(codes) == 12
    if fault == "refused":
        return
    for one in three:
        one.answer = taken

    def healed() -> bool:
        before = counts(three)
        user(50)
        return counts(three) == [before[0] + 1, *before[1:]]

    kannel.wait_for(healed, 30)


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("head", "more"), [(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), (CHUNKED + b"0\r\n", b"a: b\r\n")]
)
def test_an_answer_that_never_ends_is_given_up(
    provider: Provider, head: bytes, more: bytes
) -> None:
    """What is always there never has to be waited for, and so no time-out of a socket ends it."""
    provider.answer = flood(head, more)
    nexmo_ = {"kind": "nexmo", "api_key": "k", "api_secret": "s", "timeout_s": 1}
    started = time.monotonic()
    assert sender_of({**nexmo_, "endpoint": provider.url}).send("Gateway", TO, "1").kind == ""
    assert time.monotonic() - started < 3 * shared()


def test_a_broken_answer_leaves_it_open_whether_the_message_was_taken(provider: Provider) -> None:
    """The request was sent whole: undone, the phone would get a code that is dead."""
    provider.answer = drip(CHUNKED + b"-5\r\n")
    entry = {"kind": "nexmo", "api_key": "k", "api_secret": "s", "endpoint": provider.url}
    assert sender_of(entry).send("Gateway", TO, "1").kind == ""


def test_what_no_header_can_say_is_surely_not_sent(provider: Provider) -> None:
    entry = {"kind": "kannel", "endpoint": provider.url, "username": "u", "password": "p"}
    for sender in ("Шлюз", "a\r\nX-Other: b"):
        with pytest.raises(gateway.SmsFailed):
            sender_of(entry).send(sender, TO, "1")
    assert provider.received == []


@pytest.mark.parametrize(
    "entry",
    [
        {"kind": "nexmo", "api_key": "k", "api_secret": "s", "endpoint": "https://[bad/x"},
        {"kind": "http", "endpoint": "https://user:hunter2\u2100@h/x" + ASKS},
        {"kind": "sns", "region": "eu west 1"},
        {"kind": "sns", "region": "eu-west-1", "endpoint": "nonsense"},
    ],
)
def test_an_entry_that_cannot_be_is_refused_and_not_quoted(entry: Any) -> None:
    with pytest.raises(gateway.SettingsError, match="sms_providers") as refused:
        sender_of(entry)
    assert "hunter2" not in "".join(traceback.format_exception(refused.value))


# -- In words -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "answer", "words"),
    [
        (NEXMO, nexmo("4"), "nexmo: status 4: bad credentials"),
        (NEXMO, nexmo("9"), "nexmo: status 9: no credit"),
        (NEXMO, nexmo("6", "7"), "nexmo: status 6: no route to this number, status 7: number"),
        (TWILIO, reply({"code": 21211, "status": 400}, 400), "twilio: code 21211: no valid number"),
        (TWILIO, reply({"code": 20003}, 401), "twilio: code 20003: bad credentials"),
        (TWILIO, reply({"code": 21999}, 400), "twilio answered 400 Bad Request code 21999"),
        (TWILIO, reply({"code": 447700900123}, 400), "twilio answered 400 Bad Request"),
        (TWILIO, reply({"code": "hunter2"}, 401), "twilio answered 401 Unauthorized"),
        (TWILIO, reply({"sid": "SM1", "status": "failed"}, 201), "status failed: failed at once"),
        (KANNEL, reply("Authorization failed", 403), "kannel answered 403 Forbidden"),
        (HTTP, reply("", 402), "http answered 402 Payment Required"),
        (HTTP, reply("no"), "http answered 200 OK, without success"),
        ({**HTTP, "refused": "bad number"}, reply("bad number", 404), "the number is refused"),
    ],
)
def test_the_log_says_why(
    provider: Provider, entry: gateway.Json, answer: Any, words: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    provider.answer = answer
    with contextlib.suppress(gateway.SmsFailed):
        sender_of({"endpoint": provider.url, **entry}).send("Gateway", TO, "text")
    assert f"sms: {words}" in caplog.text or words in caplog.text
    assert "447700900123" not in caplog.text
    assert "hunter2" not in caplog.text


@pytest.mark.parametrize(
    ("answer", "meaning"),
    [
        (reply("ERR 13 bad number"), "Refused"),
        (reply("ERR 13 bad number", 404), "Refused"),
        (reply("ERR 13 bad number", 500), "Unknown"),  # a proxy may have broken
        (reply("ERR 13 bad number " + "x" * 100_000), "Unknown"),  # nobody reads it to its end
        (reply("ERR 14 no credit"), "Failed"),
        (reply("OK 7"), None),
    ],
)
def test_an_entry_tells_what_refuses_a_number_for_good(
    provider: Provider, answer: Any, meaning: str | None
) -> None:
    provider.answer = answer
    entry = {
        "kind": "http",
        "endpoint": provider.url + ASKS,
        "success": "^OK",
        "refused": "^ERR 13",
    }
    [one] = sender_of(entry).providers
    if meaning is None:
        one.send("Gateway", TO, "text")
        return
    with pytest.raises(gateway.SmsFailed) as caught:
        one.send("Gateway", TO, "text")
    assert type(caught.value) is getattr(gateway, f"Sms{meaning}")


@pytest.mark.parametrize(
    ("pattern", "ids"),
    [('"id": ?"(\\w+)"', ["a1"]), ("a[0-9]", ["a1"]), ("b(x)?", ["b"]), ("", None)],
)
def test_the_id_in_an_answer(provider: Provider, pattern: str, ids: list[str] | None) -> None:
    """Its group, or all of the match; without one our own id is what receipts name."""
    provider.answer = reply('{"id": "a1", "b": 2}')
    url = provider.url + "?to={to}&t={text}&own={id}&back={receipt_url}"
    entry = {"kind": "http", "endpoint": url, "id": pattern, "receipts": True}
    inbound = [{"kind": "http", "path_secret": "p"}]
    sender = sender_of(entry, sms_inbound=inbound)
    found = sender.providers[0].send("Gateway", TO, "text")
    query = provider.received[0].query
    assert query["back"] == "http://127.0.0.1:5000/sms/receipt/p?provider=http"
    assert found == (ids or [query["own"]])


def test_a_client_sees_the_registered_text_of_its_language(
    provider: Provider, make_client: MakeClient
) -> None:
    """The code and the language go where a provider of templates wants them."""
    provider.answer = reply("{}")
    entry = {"kind": "http", "endpoint": provider.url, "body": '{"to": "{to}", "c": "{code}", '
             '"l": "{language}"}', "headers": {"Content-Type": "application/json"}}  # fmt: skip
    client = make_client(sms_providers=[entry])
    client.register()
    assert client.call("/sms/verify", {"msisdn": NUMBER}, environ={
        "HTTP_ACCEPT_LANGUAGE": "pt-BR"}).status == 200  # fmt: skip
    sent = json.loads(provider.received[0].body)
    assert sent == {"to": NUMBER, "c": sent["c"], "l": "pt-br"}
    assert client.call("/sms/verify_code", {"code": sent["c"]}).json == {"msisdn": NUMBER}
    assert client.call("/sms/mt/verify", {"msisdn": NUMBER}).status == 204
    assert re.fullmatch("[0-9a-f]{32}", json.loads(provider.received[1].body)["c"])
