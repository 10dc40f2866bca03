"""Sending: each kind of provider, what counts as sent, fail-over, and what a hang may cost."""

from __future__ import annotations

import base64
import contextlib
import datetime
import ipaddress
import json
import logging
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
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
from support import NUMBER, GatewayProcess, WsgiClient

import gateway

MakeClient = Callable[..., WsgiClient]
TO = gateway.Msisdn(NUMBER)
DAY = datetime.timedelta(days=1)


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
    assert sender.send("+15550001111", TO, "Ünï: 1").ids == ["SM123"]
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
    entry = {"kind": "http", "endpoint": provider.url + "/{to_digits}?t={text}", "body": body}
    sender_of({**entry, "method": "PUT", "headers": headers}).send("Gateway", TO, TEXT)
    [request] = provider.received
    assert (request.method, request.headers["authorization"]) == ("PUT", "Bearer hunter2")
    assert request.target.startswith("/sms/447700900123?t=")
    assert request.query == {"t": TEXT}
    if read:
        assert read(request.body) == TEXT
    else:
        form = request.form if "form" in kind else ElementTree.fromstring(request.body).attrib
        assert form == {"to": NUMBER, "t": TEXT}


@pytest.mark.parametrize("place", ["%7Bid%7D", "{id}", "m-%7Bid}"])
def test_an_id_is_made_however_its_place_is_spelled(provider: Provider, place: str) -> None:
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    entry = {"kind": "http", "endpoint": provider.url, "headers": form, "body": f"ref={place}"}
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
        (reply(SNS_BAD.format("AuthorizationError"), 403), gateway.SmsFailed),
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
            sender._attempt(sender.providers[0], "Gateway", TO, "x", 0.5)
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
        sender._attempt(sender.providers[0], "Gateway", TO, "x", 5.0)


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
    with pytest.raises(gateway.SmsFailed, match="cannot be reached: self-signed certificate"):
        one.send("Gateway", TO, "text")
    assert provider.received == []  # nothing secret goes to whoever is there
    monkeypatch.setenv("SSL_CERT_FILE", str(tls))
    [one] = sender_of(provider.nexmo()).providers
    assert one.send("Gateway", TO, "text") == []
    assert len(provider.received) == 1
    provider.answer = drip(b"HTTP/1.1 200 OK\r\nContent-Length: 90\r\n\r\n" + b" " * 90)
    with pytest.raises(gateway.SmsUnknown):
        one.send("Gateway", TO, "text", 0.4)


# -- What an answer means -------------------------------------------------------

KANNEL = {"kind": "kannel", "username": "u", "password": "p"}
TWILIO = {"kind": "twilio", "account_sid": "AC1", "auth_token": "t"}
NEXMO = {"kind": "nexmo", "api_key": "k", "api_secret": "s"}
HTTP = {"kind": "http", "success": '"ok": ?true'}
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
        (NEXMO, nexmo("0", "1"), "Failed"),  # only the first part was looked at in 2014
        (NEXMO, nexmo("4"), "Failed"),  # bad credentials: 200 all the same
        (NEXMO, nexmo("3"), "Refused"),  # this number
        (NEXMO, nexmo("3", "4"), "Failed"),
        (NEXMO, nexmo(), "Failed"),
        (NEXMO, reply("<h1>Welcome to the hotel"), "Failed"),
        (NEXMO, reply({"messages": [{"status": 0}]}), "Failed"),
        (NEXMO, reply("x" * 100_000), "Failed"),  # read up to a limit
        (NEXMO, reply({"messages": [{"status": "0"}]}, 500), "Failed"),
        (NEXMO, reply("", 504), "Unknown"),  # a proxy that lost the answer
        (NEXMO, reply("", 302), "Failed"),  # not followed
        (NEXMO, cut(b""), "Unknown"),
        (NEXMO, cut(HALF), "Unknown"),
        (NEXMO, hang, "Unknown"),
        (TWILIO, reply({"sid": "SM1", "status": "queued"}, 201), None),
        (TWILIO, reply({"sid": "SM1", "status": "failed"}, 201), "Failed"),
        (TWILIO, reply({"code": 21211, "message": "bad +447700900123"}, 400), "Refused"),
        (TWILIO, reply({"code": 20003}, 401), "Failed"),
        (TWILIO, reply({"code": 20429}, 429), "Failed"),
        (TWILIO, reply({}, 201), "Failed"),
        (KANNEL, reply("0: Accepted for delivery", 202), None),
        (KANNEL, reply("3: Queued for later delivery", 202), "Unknown"),
        (KANNEL, reply("", 202), "Failed"),
        (KANNEL, reply("Missing receiver number, rejected", 400), "Refused"),
        (KANNEL, reply("Authorization failed for sendsms", 403), "Failed"),
        (KANNEL, reply("Temporary failure, try again later.", 503), "Failed"),
        (HTTP, reply({"ok": True}), None),
        (HTTP, reply({"ok": False}), "Failed"),
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


def test_nobody_listens() -> None:
    [one] = sender_of({**NEXMO, "endpoint": closed_url()}).providers
    with pytest.raises(gateway.SmsFailed, match="cannot be reached") as caught:
        one.send("Gateway", TO, "text")
    assert type(caught.value) is gateway.SmsFailed


def test_connections_are_kept(provider: Provider) -> None:
    sender = sender_of(provider.nexmo())
    for _ in range(5):
        sender.send("Gateway", TO, "text")
    [one] = sender.providers
    assert isinstance(one, gateway.HttpSms)
    assert one.pool.num_connections == 1


@pytest.mark.parametrize(
    "answer",
    [b"HTTP/1.1 200 OK\r\nX {}\r\nContent-Length: 0\r\n\r\n", b"{} HTTP/1.1\r\n\r\n", b"{}"],
)
def test_nothing_of_a_message_is_logged(
    provider: Provider, caplog: pytest.LogCaptureFixture, answer: bytes
) -> None:
    """Not by us, and not by what we use: urllib3 quotes a header line without a colon."""
    caplog.set_level(logging.DEBUG)
    provider.answer = cut(answer.replace(b"{}", b"447700900123 hunter2 135790"))
    entry = {"kind": "http", "endpoint": provider.url + "?t={text}&to={to}", "success": "OK"}
    with contextlib.suppress(gateway.SmsFailed):
        sender_of({**entry, "method": "GET"}).send("Gateway", TO, "code: 135790")
    assert "sms: http" in caplog.text
    for secret in ("135790", "447700900123", "hunter2"):
        assert secret not in caplog.text


# -- Half-configured ------------------------------------------------------------

URL = {"endpoint": "http://127.0.0.1:9/"}


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ({"kind": "twilio"}, "account_sid"),
        ({**TWILIO, "auth_token": ""}, "auth_token"),
        ({**KANNEL}, "endpoint"),
        ({**KANNEL, **URL, "password": 5}, "password"),
        ({"kind": "sns"}, "region"),
        ({"kind": "http"}, "endpoint"),
        ({"kind": "http", "endpoint": "gw.example/send"}, "endpoint"),
        ({"kind": "http", "endpoint": "ftp://gw.example/"}, "endpoint"),
        ({"kind": "http", "endpoint": "http://user:hunter2@gw.example/"}, "endpoint"),
        ({"kind": "http", "endpoint": "http://{to}.example/"}, "endpoint"),
        ({"kind": "http", "endpoint": "http://gw.example:port/"}, "templates"),
        ({"kind": "http", **URL, "body": "{number}"}, "templates"),
        ({"kind": "http", **URL, "headers": {"A": 5}}, "headers"),
        ({"kind": "http", **URL, "headers": {"Content-Type": "image/png"}}, "types"),
        ({"kind": "http", **URL, "success": "("}, "regular expression"),
        ({"kind": "nexmo", "api_key": "k\ud800", "api_secret": "s"}, "templates"),
        ({"kind": "http", **URL, "api_key": "hunter2"}, "api_key"),
        ({**NEXMO, "timeout_s": 0}, "timeout_s"),
        ({**NEXMO, "timeout_s": 13}, "timeout_s"),
        ({**NEXMO, "connect_timeout_s": float("inf")}, "timeout_s"),
        ({**NEXMO, "timeout_s": True}, "timeout_s"),
        ({**NEXMO, "body": "{text}"}, "body"),
        ({**TWILIO, "receipts": True}, "receipts"),  # no webhook of its kind is open
    ],
)
def test_half_configured_is_refused(entry: gateway.Json, named: str) -> None:
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
    assert time.monotonic() - started < 3  # all of it would take 5 s and more


def test_a_name_server_that_hangs_does_not_hold_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()

    def getaddrinfo(*_: Any, **__: Any) -> Any:
        over.wait(30)
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    sender = sender_of({**NEXMO, "endpoint": "http://slow.example/", "timeout_s": 0.3})
    started = time.monotonic()
    with pytest.raises(gateway.SmsFailed, match="no provider took"):  # surely not sent
        sender.send("Gateway", TO, "text")
    assert time.monotonic() - started < 5
    over.set()


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
                                "--sends-per-hour", "1000")  # fmt: skip
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
    sender = sender_of(*entries(three))
    three[0].answer = nexmo("1")
    for _ in range(3):
        sender.send("Gateway", TO, "text")
    assert counts(three) == [1, 3, 0]
    three[1].answer = nexmo("1")
    sender.send("Gateway", TO, "text")
    assert counts(three) == [1, 4, 1]
    three[0].answer = taken
    sender.resting[0] = 0  # its rest is over
    sender.send("Gateway", TO, "text")
    sender.send("Gateway", TO, "text")
    assert counts(three) == [3, 4, 1]
    assert list(sender.resting) == [1]


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
    assert sender.send("Gateway", TO, "text").kind == "nexmo"  # it is sent nevertheless
    sender.send("Gateway", TO, "text")
    assert counts(three) == [1, 1, 0]


@pytest.mark.parametrize("tries", [1, 2, 3])
def test_at_most_sms_send_tries(three: list[Provider], tries: int) -> None:
    for one in three:
        one.answer = nexmo("1")
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
    three[0].answer, three[1].answer, three[2].answer = nexmo("1"), cut(b""), nexmo("1")
    client = make_client(sms_providers=entries(three), sends_per_hour=1)
    client.register()
    assert client.ask().status == 200
    codes = {one.received[0].form["text"].split()[-1] for one in three}
    assert len(codes) == 1  # whoever is next sends the same code
    assert client.call("/sms/resend_code").errno == 116  # it counts
    assert client.call("/sms/verify_code", {"code": codes.pop()}).status == 200


def test_all_failed_is_undone(three: list[Provider], make_client: MakeClient) -> None:
    for one in three:
        one.answer = nexmo("1")
    client = make_client(sms_providers=entries(three), sends_per_hour=1, sends_per_session=1)
    client.register()
    for _ in range(3):
        assert client.ask().errno == 201
    for one in three:
        one.answer = taken
    assert client.ask().status == 200  # nothing was counted


def test_after_a_send_the_tried_mark_never_overwrites_what_happened_meanwhile(
    three: list[Provider], make_client: MakeClient
) -> None:
    """The code may come back before the provider's answer does."""
    client = make_client(sms_providers=entries(three))
    client.register()

    def quick(handler: Any) -> None:
        code = three[0].received[0].form["text"].split()[-1]
        assert client.call("/sms/verify_code", {"code": code}).status == 200
        taken(handler)

    three[0].answer = quick
    assert client.ask().status == 200
    code = three[0].received[0].form["text"].split()[-1]
    assert client.call("/sms/verify_code", {"code": code}).errno == 111  # used, and it stays so


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
    assert max(seconds for _, seconds, _ in results) < 12.5
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
    assert time.monotonic() - started < 3


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
        {"kind": "http", "endpoint": "https://user:hunter2\u2100@h/x"},
        {"kind": "sns", "region": "eu west 1"},
        {"kind": "sns", "region": "eu-west-1", "endpoint": "nonsense"},
    ],
)
def test_an_entry_that_cannot_be_is_refused_and_not_quoted(entry: Any) -> None:
    with pytest.raises(gateway.SettingsError, match="sms_providers") as refused:
        sender_of(entry)
    assert "hunter2" not in "".join(traceback.format_exception(refused.value))
