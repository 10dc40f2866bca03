"""SMS providers: the Vonage (Nexmo) adapter against a local stand-in of its API, the outbox."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

import lab
import pytest
from support import NUMBER, GatewayProcess, WsgiClient, shared

import gateway

OTHER = "+447700900456"
SECRET = "s3cr3t-of-the-account"


# -- A stand-in of the provider ------------------------------------------------


class Received(NamedTuple):
    """A request that the stand-in got."""

    method: str
    path: str
    headers: dict[str, str]
    body: str

    @property
    def form(self) -> dict[str, str]:
        """Its body as a form; a field that comes twice is an error."""
        pairs = parse_qsl(self.body, keep_blank_values=True, strict_parsing=True)
        assert len(dict(pairs)) == len(pairs)
        return dict(pairs)


Answerer = Callable[["_Handler"], None]


class SmsApi:
    """A stand-in of the Vonage SMS API on a loopback port; remembers what it was sent."""

    def __init__(self, answer: Answerer | None = None) -> None:
        self.answer = answer or taken
        self.received: list[Received] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self.server.daemon_threads = True
        self.server.stand_in = self  # type: ignore[attr-defined]
        self.closing = threading.Event()
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.url = f"http://127.0.0.1:{self.server.server_port}/sms/json"

    def __enter__(self) -> SmsApi:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def entry(self, **more: Any) -> gateway.Json:
        """The settings entry of this provider."""
        login = {"api_key": "a1b2c3d4", "api_secret": SECRET}
        return {"kind": "nexmo", "endpoint": self.url, **login, **more}

    def option(self, **more: Any) -> tuple[str, str]:
        """The same as a command-line option."""
        return "--sms-providers", json.dumps([self.entry(**more)])

    def code(self) -> str:
        """The code in the newest message."""
        return self.received[-1].form["text"].split()[-1]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """Remember the request, then answer as the test wants."""
        stand_in: SmsApi = self.server.stand_in  # type: ignore[attr-defined]
        body = self.rfile.read(int(self.headers.get("Content-Length", "0"))).decode()
        headers = {name.lower(): value for name, value in self.headers.items()}
        stand_in.received.append(Received(self.command, self.path, headers, body))
        stand_in.answer(self)

    def do_GET(self) -> None:
        """The same: a redirect that is followed may become a GET."""
        self.do_POST()

    def log_message(self, format: str, *args: Any) -> None:
        """Stay quiet: a log line would hold the path."""


def reply(body: Any, status: int = 200, kind: str = "application/json", **headers: str) -> Answerer:
    """An answer that is complete: JSON of ``body``, or ``body`` itself if it is a text."""
    data = (body if isinstance(body, str) else json.dumps(body)).encode()

    def answer(handler: _Handler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Type", kind)
        handler.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data)

    return answer


def parts(*statuses: Any) -> gateway.Json:
    """A body of the Vonage SMS API ("Send an SMS", 200) with one part per status."""
    messages = [
        {"to": NUMBER[1:], "message-id": f"0A00{n}", "status": status, "network": "23415"}
        for n, status in enumerate(statuses)
    ]
    return {"message-count": str(len(messages)), "messages": messages}


taken = reply(parts("0"))
refused = reply(parts("4"))  # bad credentials


def after(seconds: float, answer: Answerer = taken) -> Answerer:
    """The same, but late."""

    def late(handler: _Handler) -> None:
        handler.server.stand_in.closing.wait(seconds)  # type: ignore[attr-defined]
        with contextlib.suppress(OSError):  # the gateway has given up
            answer(handler)

    return late


def raw(data: bytes, reset: bool = False) -> Answerer:
    """An answer of these bytes and nothing more; with ``reset`` ended by a TCP reset."""

    def answer(handler: _Handler) -> None:
        handler.wfile.write(data)
        handler.close_connection = True
        if reset:
            linger = struct.pack("ii", 1, 0)
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            handler.connection.close()

    return answer


@pytest.fixture
def api() -> Iterator[SmsApi]:
    """A stand-in that takes every message, unless the test changes ``api.answer``."""
    with SmsApi() as stand_in:
        yield stand_in


def unused_url() -> str:
    """An address where nobody listens."""
    with contextlib.closing(lab.free_port()) as holder:
        return f"http://127.0.0.1:{holder.getsockname()[1]}/sms/json"


def sender_of(*entries: gateway.Json) -> gateway.SmsSender:
    """The providers of these settings entries."""
    return gateway.SmsSender(gateway.Settings(sms_providers=list(entries)))


def verify(client: WsgiClient, code: str) -> tuple[int, int | None]:
    """Return a code; gives status and errno."""
    answer = client.call("/sms/verify_code", {"code": code})
    return answer.status, None if answer.status == 200 else answer.errno


# -- What the provider is sent -------------------------------------------------


def test_a_real_process_sends_the_pin_exactly_once(
    api: SmsApi, start_gateway: Callable[..., GatewayProcess]
) -> None:
    process = start_gateway(*api.option())
    client = process.client()
    client.register()
    assert client.verify(NUMBER).body["mtSender"] == "Gateway"

    [request] = api.received
    assert (request.method, request.path) == ("POST", "/sms/json")
    assert request.headers["content-type"].startswith("application/x-www-form-urlencoded")
    assert request.form == {
        "from": "Gateway",
        "to": NUMBER[1:],
        "text": request.form["text"],
        "api_key": "a1b2c3d4",
        "api_secret": SECRET,
    }
    found = re.fullmatch(r"Your verification code is: ([0-9]{6})", request.form["text"])
    assert found
    assert request.body.count(found[1]) == 1
    assert found[1] not in str(request.headers)
    assert SECRET not in request.path + str(request.headers)

    wrong = f"{(int(found[1]) + 1) % 10**6:06}"
    assert client.verify_code(wrong).body["errno"] == 105
    assert client.verify_code(found[1]).body == {"msisdn": NUMBER}
    assert len(api.received) == 1
    outbox = f"{process.url}/outbox?to={NUMBER[1:]}&token={client.operator_token}"
    assert client.http.request("GET", outbox).status == 404
    assert process.stop() == 0
    for secret in (found[1], NUMBER[1:], SECRET, client.operator_token):
        assert secret not in process.output


def test_a_long_code_is_the_whole_text(api: SmsApi, make_client: Callable[..., WsgiClient]) -> None:
    client = make_client(sms_providers=[api.entry()], mt_sender="+15550001111")
    client.register()
    assert client.call("/sms/mt/verify", {"msisdn": NUMBER}).status == 204
    form = api.received[-1].form
    assert re.fullmatch("[0-9a-f]{32}", form["text"])
    assert form["from"] == "15550001111"  # Vonage wants numbers without "+"
    assert verify(client, form["text"]) == (200, None)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Your verification code is: 123456", None),  # always unicode: half the length
        ("Ваш код: 123456", "unicode"),  # never unicode: arrives as question marks
        ("您的验证码是: 123456", "unicode"),
    ],
)
def test_only_unicode_text_says_so(api: SmsApi, text: str, kind: str | None) -> None:
    sender_of(api.entry()).send("Gateway", gateway.Msisdn(NUMBER), text)
    [request] = api.received
    assert request.form["text"] == text
    assert request.form.get("type") == kind


def test_what_is_special_in_a_form_arrives_as_it_is(api: SmsApi) -> None:
    """Catches a body that is put together without quoting."""
    entry = api.entry(api_secret="a&b=c +%41é")
    sender_of(entry).send("A&B", gateway.Msisdn(NUMBER), "100% & + = #")
    form = api.received[-1].form
    assert form["api_secret"] == "a&b=c +%41é"
    assert (form["from"], form["text"]) == ("A&B", "100% & + = #")


# -- What the provider may answer ----------------------------------------------


@pytest.mark.parametrize("statuses", [["0"], ["0", "0", "0"]])
def test_every_part_taken_is_success(
    api: SmsApi, make_client: Callable[..., WsgiClient], statuses: list[str]
) -> None:
    api.answer = reply(parts(*statuses))
    client = make_client(sms_providers=[api.entry()])
    client.register()
    assert client.ask().json["mtSender"] == "Gateway"
    assert verify(client, api.code()) == (200, None)


BAD_ANSWERS: dict[str, Answerer] = {
    # only the HTTP status is looked at
    "refused": refused,
    "failed": reply(parts("5")),
    "each part in its own way": reply(parts("1", "4")),
    "HTML 503": reply("<h1>Busy</h1>", 503, "text/html", **{"Retry-After": "1"}),
}
"""Answers that say that the message was not taken, no part of it."""


def drip(handler: _Handler) -> None:
    """A good answer, one byte at a time."""
    data = json.dumps(parts("0")).encode()
    closing: threading.Event = handler.server.stand_in.closing  # type: ignore[attr-defined]
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(data))
    with contextlib.suppress(OSError):  # the gateway has given up
        for n in range(40):
            if not closing.wait(0.1):
                handler.wfile.write(data[n : n + 1])


NO_ANSWERS: dict[str, Answerer] = {
    # only the first, or only the last part is looked at
    "last part failed": reply(parts("0", "1")),
    "first part failed": reply(parts("1", "0")),
    # all() of nothing is true
    "no parts": reply(parts()),
    "no list": reply({"message-count": "1"}),
    "list is null": reply({"messages": None}),
    "list is an object": reply({"messages": {"status": "0"}}),
    "list is a text": reply({"messages": "0"}),
    "list of texts": reply({"messages": ["0"]}),
    "part without status": reply({"messages": [{"to": "447700900123"}]}),
    # compared loosely: 0 is what a missing or foreign field becomes
    "status is the integer 0": reply(parts(0)),
    "status is false": reply(parts(False)),
    "status is null": reply(parts(None)),
    "status is empty": reply(parts("")),
    "status is 00": reply(parts("00")),
    "status is 0 and a space": reply(parts("0 ")),
    "status is a list": reply(parts(["0"])),
    # a proxy in between answers in place of the provider
    "HTML 200": reply("<h1>Log in to the hotel's network</h1>", kind="text/html"),
    "HTML 500": reply("<h1>Internal error</h1>", 500, "text/html"),
    "empty 200": reply("", 200),
    "empty 204": raw(b"HTTP/1.1 204 No Content\r\n\r\n"),
    # JSON that is no object: a crash (999) instead
    "JSON number": reply("0"),
    "JSON text": reply('"0"'),
    "JSON null": reply("null"),
    "JSON list": reply([{"status": "0"}]),
    "JSON cut short": reply('{"messages": [{"status": "0"'),
    "nested too deep": reply('{"messages": ' + "[" * 100_000),
    "not UTF-8": raw(b'HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n{"\xff":1}'),
    # none at all, or not to its end
    # a body that ends early is taken for the whole
    "truncated": raw(
        b'HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n{"messages": [{"status": "0"}]}'
    ),
    "closed without a word": raw(b""),
    "reset": raw(b"", reset=True),
    "reset in the headers": raw(b"HTTP/1.1 200 OK\r\nContent-Le", reset=True),
    "no HTTP": raw(b"SSH-2.0-OpenSSH_9.2\r\n"),
    "hangs": after(10),
    # a time-out that only counts the silence between two bytes
    "drips": drip,
}
"""Ends after which nobody knows whether the message was taken, or a part of it."""


@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_what_says_so_is_a_failure(
    name: str, api: SmsApi, make_client: Callable[..., WsgiClient]
) -> None:
    api.answer = BAD_ANSWERS[name]
    client = make_client(sms_providers=[api.entry()])
    client.register()
    answer = client.ask()
    assert (answer.status, answer.errno) == (503, 201)
    assert int(answer.headers["retry-after"]) > 0
    assert len(api.received) == 1  # not sent again by itself: the phone would get two


def test_nobody_listens(make_client: Callable[..., WsgiClient], api: SmsApi) -> None:
    client = make_client(sms_providers=[api.entry(endpoint=unused_url())])
    client.register()
    started = time.monotonic()
    answer = client.ask()
    assert (answer.status, answer.errno) == (503, 201)
    assert time.monotonic() - started < 2 * shared()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(
    status: int, api: SmsApi, make_client: Callable[..., WsgiClient]
) -> None:
    """Whoever can answer once would get the account's secret and the code sent on.

    It may be the answer to a message that was taken (303), so it counts as one.
    """
    with SmsApi() as elsewhere:
        api.answer = reply("", status, Location=elsewhere.url)
        client = make_client(sms_providers=[api.entry()])
        client.register()
        assert client.ask().status == 200
        assert elsewhere.received == []
        assert len(api.received) == 1


# -- What a failure leaves behind ----------------------------------------------


def test_a_sure_failure_changes_nothing(
    api: SmsApi, make_client: Callable[..., WsgiClient]
) -> None:
    client = make_client(sms_providers=[api.entry()], sends_per_session=2, code_tries=2)
    client.register()
    assert client.ask().status == 200
    code = api.code()
    assert verify(client, code[::-1] + "0")[0] == 400  # of no possible length: costs no try
    wrong = f"{(int(code) + 1) % 10**6:06}"
    assert verify(client, wrong) == (400, 105)

    api.answer = refused
    for _ in range(4):  # more often than the session may send
        answer = client.call("/sms/resend_code")
        assert (answer.status, answer.errno) == (503, 201)
    undelivered = api.code()
    api.answer = taken
    if undelivered != code:
        # the second wrong try, so the first still counts, and the old code is dead now
        assert verify(client, undelivered) == (400, 105)
    assert verify(client, code) == (410, 111)
    assert client.call("/sms/resend_code").status == 200
    assert verify(client, api.code()) == (200, None)
    assert client.call("/sms/resend_code").errno == 114  # two were sent


def test_a_number_that_is_refused_for_good_is_told_so(
    api: SmsApi, make_client: Callable[..., WsgiClient]
) -> None:
    """400/107: to try again helps nobody. It counts for the session, and the number is free."""
    client = make_client(sms_providers=[api.entry()], sends_per_session=3, sends_per_hour=1)
    client.register()
    api.answer = reply(parts("3"))
    for _ in range(2):
        answer = client.ask()
        assert (answer.status, answer.errno) == (400, 107)
        assert "retry-after" not in answer.headers
        assert "no SMS can reach this number" in answer.json["message"]
        assert NUMBER[1:] not in answer.data.decode()
    assert verify(client, api.code()) == (410, 111)
    api.answer = taken
    assert client.ask(OTHER).status == 200  # another number, and the hour has still its one
    assert verify(client, api.code()) == (200, None)
    assert client.call("/sms/resend_code").errno == 114


def test_a_resend_that_is_refused_for_good_changes_nothing_but_the_count(
    api: SmsApi, make_client: Callable[..., WsgiClient]
) -> None:
    client = make_client(sms_providers=[api.entry()], sends_per_session=3)
    client.register()
    assert client.ask().status == 200
    code, api.answer = api.code(), reply(parts("3"))
    for _ in range(2):
        assert client.call("/sms/resend_code").errno == 107
    assert client.call("/sms/resend_code").errno == 114
    assert len(api.received) == 3
    assert client.ask(OTHER).errno == 107  # the session has its number
    assert verify(client, code) == (200, None)


def test_the_earlier_code_survives_a_failed_resend(
    api: SmsApi, make_client: Callable[..., WsgiClient]
) -> None:
    client = make_client(sms_providers=[api.entry()])
    client.register()
    assert client.ask().status == 200
    code = api.code()
    api.answer = refused
    assert client.call("/sms/resend_code").errno == 201
    assert client.call("/sms/mt/verify", {"msisdn": NUMBER}).errno == 201
    assert verify(client, code) == (200, None)


def test_a_failed_first_message_leaves_the_number_open(
    api: SmsApi, make_client: Callable[..., WsgiClient]
) -> None:
    client = make_client(sms_providers=[api.entry()])
    client.register()
    api.answer = refused
    assert client.ask(NUMBER).errno == 201
    assert client.call("/sms/resend_code").errno == 111  # nothing was asked for
    assert verify(client, api.code()) == (410, 111)  # nor is that code alive
    api.answer = taken
    assert client.ask(OTHER).status == 200
    assert client.ask(NUMBER).errno == 107


def test_a_failure_does_not_count_for_the_whole_gateway(
    api: SmsApi, make_client: Callable[..., WsgiClient]
) -> None:
    client = make_client(sms_providers=[api.entry()], sends_per_hour=2)
    client.register()
    api.answer = refused
    for _ in range(3):
        assert client.ask().errno == 201
    api.answer = taken
    assert [client.ask().status, client.ask().status] == [200, 200]
    called = len(api.received)
    answer = client.another()
    answer.register()
    refusal = answer.ask(OTHER)
    assert (refusal.status, refusal.errno) == (429, 116)
    assert 1700 < int(refusal.headers["retry-after"]) <= 1800
    assert len(api.received) == called
    assert verify(client, api.code()) == (200, None)


def test_the_message_that_is_one_too_many_changes_nothing(
    api: SmsApi, make_client: Callable[..., WsgiClient]
) -> None:
    client = make_client(sms_providers=[api.entry()], sends_per_hour=1)
    client.register()
    assert client.ask().status == 200
    for _ in range(6):  # more often than the session may send
        assert client.call("/sms/resend_code").errno == 116
    assert len(api.received) == 1
    assert verify(client, api.code()) == (200, None)


@pytest.mark.parametrize("how", NO_ANSWERS)
def test_a_message_that_may_have_left_counts_and_its_code_works(
    how: str, api: SmsApi, make_client: Callable[..., WsgiClient]
) -> None:
    """The provider had the message: its code may reach the phone in a moment."""
    api.answer = NO_ANSWERS[how]
    client = make_client(sms_providers=[api.entry(timeout_s=0.4)], sends_per_hour=1)
    client.register()
    started = time.monotonic()
    assert client.ask().status == 200
    assert time.monotonic() - started < 2 * shared()  # its time-out, and no more
    assert len(api.received) == 1  # not sent again by itself: the phone would get two
    assert client.call("/sms/resend_code").errno == 116
    assert verify(client, api.code()) == (200, None)


# -- More than one provider ----------------------------------------------------


def test_providers_are_tried_by_falling_priority(api: SmsApi) -> None:
    with SmsApi(refused) as second, SmsApi() as third:
        api.answer = refused
        sender = sender_of(third.entry(), second.entry(priority=5), api.entry(priority=10))
        sender.send("Gateway", gateway.Msisdn(NUMBER), "text")
        assert [len(one.received) for one in (api, second, third)] == [1, 1, 1]


def test_when_all_refuse_the_message_has_failed(api: SmsApi) -> None:
    with SmsApi(refused) as second:
        api.answer = refused
        sender = sender_of(api.entry(), second.entry())
        with pytest.raises(gateway.SmsFailed) as caught:
            sender.send("Gateway", gateway.Msisdn(NUMBER), "text")
        assert not isinstance(caught.value, gateway.SmsUnknown)
        assert [len(one.received) for one in (api, second)] == [1, 1]


# -- Settings ------------------------------------------------------------------

LOGIN = {"kind": "nexmo", "api_key": "k", "api_secret": SECRET}


@pytest.mark.parametrize(
    ("providers", "named"),
    [
        ([], "sms_providers"),  # starts, and fails at the first message
        ([{"kind": "nexmo"}], "api_key"),
        ([{"kind": "nexmo", "api_key": "k"}], "api_secret"),
        ([{"kind": "nexmo", "api_secret": SECRET}], "api_key"),
        ([{**LOGIN, "api_key": None}], "api_key"),
        ([{**LOGIN, "api_key": 12}], "api_key"),
        ([{**LOGIN, "api_secret": ""}], "api_secret"),  # an unset variable of a shell script
        ([{**LOGIN, "api_secret": [SECRET]}], "api_secret"),
        ([{**LOGIN, "apisecret": "x"}], "apisecret"),  # a typing error passes in silence
        ([{**LOGIN, "endpoint": 5}], "endpoint"),
        ([{**LOGIN, "endpoint": ""}], "endpoint"),
        ([{**LOGIN, "endpoint": "rest.nexmo.com/sms/json"}], "endpoint"),  # no scheme
        ([{**LOGIN, "endpoint": "ftp://rest.nexmo.com/"}], "endpoint"),
        ([{**LOGIN, "timeout_s": "5"}], "timeout_s"),
        ([{**LOGIN, "timeout_s": None}], "timeout_s"),  # would wait for ever
        ([{**LOGIN, "timeout_s": 0}], "timeout_s"),
        ([{**LOGIN, "timeout_s": -1}], "timeout_s"),
        ([{**LOGIN, "timeout_s": True}], "timeout_s"),
        ([{**LOGIN, "timeout_s": float("inf")}], "timeout_s"),  # JSON's 1e999
        ([{**LOGIN, "connect_timeout_s": "x"}], "connect_timeout_s"),
        ([{**LOGIN, "priority": "high"}], "priority"),
        ([{**LOGIN, "priority": None}], "priority"),
        ([{"kind": "outbox", "folder": "/tmp"}], "folder"),
        ([{"kind": "carrier-pigeon"}], "carrier-pigeon"),
        ([{"kind": "outbox"}, {"kind": "nexmo"}], "api_key"),  # only the first is looked at
    ],
)
def test_unusable_provider_settings_are_refused(providers: Any, named: str) -> None:
    with pytest.raises(gateway.SettingsError) as caught:
        sender_of(*providers)
    assert named in str(caught.value)
    assert "sms_providers" in str(caught.value)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (json.dumps([{**LOGIN, "password": SECRET}]), "password"),
        (json.dumps([LOGIN])[:-1], "sms_providers"),  # no JSON
    ],
)
def test_the_start_refuses_them_with_exit_status_2(
    value: str, named: str, start_gateway: Callable[..., GatewayProcess]
) -> None:
    process = start_gateway("--sms-providers", value, wait=False)
    assert process.process.wait(60) == 2
    assert named in process.output
    assert "Traceback" not in process.output
    assert SECRET not in process.output
    assert not list(process.folder.glob("data/*"))


def test_the_default_endpoint_is_the_providers_own_over_tls() -> None:
    [provider] = sender_of(LOGIN).providers
    assert "'https://rest.nexmo.com/sms/json'" in repr(vars(provider))


# -- The outbox ----------------------------------------------------------------


@pytest.fixture
def outbox(tmp_path: Path) -> gateway.OutboxSms:
    """An outbox that does not print."""
    made = gateway.OutboxSms({"kind": "outbox"}, gateway.Settings(data_dir=str(tmp_path)))
    made.console = None
    return made


def put(outbox: gateway.OutboxSms, text: str, to: str = NUMBER) -> None:
    """Send a message."""
    outbox.send("Gateway", gateway.Msisdn(to), text)


def texts(outbox: gateway.OutboxSms, to: str = NUMBER) -> list[str]:
    """The texts of the messages to a number."""
    return [message["text"] for message in outbox.messages(to.lstrip("+"))]


def open_files(folder: Path) -> int:
    """How many files below ``folder`` this process holds open."""
    found = 0
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found += link.readlink().is_relative_to(folder)
    return found


def test_outbox_files_are_private_whatever_the_umask(outbox: gateway.OutboxSms) -> None:
    before = os.umask(0)
    try:
        put(outbox, "one")
    finally:
        os.umask(before)
    [path] = outbox.folder.iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    assert outbox.folder.stat().st_mode & 0o777 == 0o700


def test_outbox_messages_say_all_and_come_oldest_first(outbox: gateway.OutboxSms) -> None:
    before = int(time.time())
    wanted = [f"message {n}" for n in range(25)]  # sorted as texts, 10 comes before 9
    for text in wanted:
        put(outbox, text)
    put(outbox, "for somebody else", OTHER)
    assert texts(outbox) == wanted
    message = outbox.messages(NUMBER[1:])[0]
    assert message.keys() == {"from", "to", "text", "at"}
    assert (message["from"], message["to"]) == ("Gateway", NUMBER)
    assert before <= message["at"] <= time.time()


@pytest.mark.parametrize(
    ("threads", "at_once"),
    [(1024, 960), (200, 136), (129, 65), (128, 64), (127, 63), (8, 4), (9, 4), (2, 1), (1, 1)],
)
def test_all_threads_but_64_or_half_may_send(tmp_path: Path, threads: int, at_once: int) -> None:
    sender = gateway.SmsSender(gateway.Settings(threads=threads, data_dir=str(tmp_path)))
    with contextlib.ExitStack() as sending:
        for _ in range(at_once):
            sending.enter_context(sender.slot())
        with pytest.raises(gateway.Unavailable):
            sending.enter_context(sender.slot())
    with sender.slot():  # all are given back
        pass


def test_outbox_outlives_its_console(outbox: gateway.OutboxSms) -> None:
    """``python gateway.py | head``: whoever read along has gone, and the message is kept."""
    reader, writer = os.pipe()
    os.close(reader)
    with contextlib.suppress(BrokenPipeError), os.fdopen(writer, "w") as outbox.console:
        for text in ("one", "two"):
            put(outbox, text)
    assert texts(outbox) == ["one", "two"]


def test_outbox_outlives_a_console_in_another_alphabet(
    outbox: gateway.OutboxSms, tmp_path: Path
) -> None:
    """A failure here would look like a provider's, and the next one send the message again."""
    with (tmp_path / "console").open("w", encoding="latin-1") as outbox.console:
        put(outbox, "קוד האימות")
    assert texts(outbox) == ["קוד האימות"]


@pytest.mark.parametrize("to", ["", "*", "44770090012", "4477009001230", "?", "../x", "[0-9]"])
def test_outbox_lists_one_whole_number_only(outbox: gateway.OutboxSms, to: str) -> None:
    put(outbox, "one")
    assert outbox.messages(to) == []


def test_outbox_keeps_an_hour(outbox: gateway.OutboxSms, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s, real = time.time(), time.time
    for text, to, age_s in (("gone", OTHER, 9999), ("old", NUMBER, 3601), ("new", NUMBER, 3590)):
        monkeypatch.setattr(time, "time", lambda age_s=age_s: now_s - age_s)
        put(outbox, text, to)
    monkeypatch.setattr(time, "time", real)
    assert texts(outbox) == ["new"]
    assert b"gone" not in b"".join(path.read_bytes() for path in outbox.folder.iterdir())


def test_outbox_keeps_an_hour_when_nobody_looks(
    outbox: gateway.OutboxSms, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as earlier:
        now_s = time.time()
        earlier.setattr(time, "time", lambda: now_s - 3700)
        put(outbox, "old")
    [path] = outbox.folder.iterdir()
    put(outbox, "new", OTHER)
    assert not path.exists()


def test_outbox_survives_a_line_that_was_cut_off(outbox: gateway.OutboxSms) -> None:
    """By a full disk or a power cut."""
    put(outbox, "one")
    [path] = outbox.folder.iterdir()
    with path.open("ab") as file:
        file.write(f'\n{{"from": "Gateway", "to": "{NUMBER}", "te'.encode())
    put(outbox, "two")
    assert texts(outbox) == ["one", "two"]


@pytest.mark.parametrize("what", ["folder", "file"])
def test_outbox_that_was_taken_away_is_made_anew(outbox: gateway.OutboxSms, what: str) -> None:
    put(outbox, "one")
    [path] = outbox.folder.iterdir()
    shutil.rmtree(outbox.folder) if what == "folder" else path.unlink()
    put(outbox, "two")
    assert texts(outbox) == ["two"]


def test_outbox_takes_every_message_of_many_threads_in_many_minutes(
    outbox: gateway.OutboxSms, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each minute another file is made, while the others are writing; none stays open."""
    now_s = time.time() - 1000
    monkeypatch.setattr(time, "time", lambda: now_s)

    def work(n: int) -> None:
        nonlocal now_s
        for i in range(200):
            now_s += 0.5
            put(outbox, f"{n} {i}")

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    assert open_files(outbox.folder) == 0
    assert sorted(texts(outbox)) == sorted(f"{n} {i}" for n in range(8) for i in range(200))
    assert len(list(outbox.folder.iterdir())) > 10


def test_outbox_on_a_full_disk_fails(tmp_path: Path, outbox: gateway.OutboxSms) -> None:
    put(outbox, "one")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (150, limit[1]))  # half of a line
        with pytest.raises(OSError, match=r"disk is full|File too large"):
            put(outbox, "two")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    put(outbox, "three")
    assert texts(outbox) == ["one", "three"]


def test_outbox_forgets_one_number(outbox: gateway.OutboxSms) -> None:
    for to in (NUMBER, OTHER, NUMBER):
        put(outbox, "text", to)
    outbox.forget(gateway.Msisdn(NUMBER))
    assert (texts(outbox), texts(outbox, OTHER)) == ([], ["text"])
    kept = b"".join(path.read_bytes() for path in outbox.folder.iterdir())
    assert NUMBER.encode() not in kept  # not merely hidden
    outbox.forget(gateway.Msisdn(NUMBER))  # and again, with nothing there


def test_outbox_forgets_while_others_write(outbox: gateway.OutboxSms) -> None:
    """Another worker may add a line meanwhile: it is neither lost nor touched."""
    for _ in range(50):
        put(outbox, "old")

    def write() -> None:
        for n in range(300):
            put(outbox, f"{n}", OTHER)

    writer = threading.Thread(target=write)
    writer.start()
    outbox.forget(gateway.Msisdn(NUMBER))
    writer.join()
    assert texts(outbox) == []
    assert texts(outbox, OTHER) == [f"{n}" for n in range(300)]


@pytest.mark.slow
def test_outbox_may_be_read_while_it_changes(outbox: gateway.OutboxSms) -> None:
    """A message may go (/unregister, the hour) between listing and reading it."""
    done, failed = threading.Event(), []

    def read() -> None:
        while not done.is_set():
            try:
                outbox.messages(NUMBER[1:])
            except Exception as error:
                failed.append(error)
                return

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline and not failed:
        for _ in range(10):
            put(outbox, "text")
        outbox.forget(gateway.Msisdn(NUMBER))
    done.set()
    for reader in readers:
        reader.join()
    assert failed == []


def test_outbox_prints_each_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = gateway.OutboxSms({"kind": "outbox"}, gateway.Settings(data_dir=str(tmp_path)))
    put(made, "Your verification code is: 123456")
    printed = capsys.readouterr().out
    assert NUMBER in printed
    assert "Your verification code is: 123456\n" in printed


def test_unregister_clears_the_outbox_of_that_number_only(client: WsgiClient) -> None:
    other = client.another().verified(OTHER)
    client.verified(NUMBER)
    assert client.call("/unregister").status == 204
    assert client.outbox(NUMBER) == []
    assert len(other.outbox(OTHER)) == 1


def test_unregister_of_who_verified_nothing_clears_nothing(client: WsgiClient) -> None:
    """Everybody can open a session and name a number."""
    other = client.another()
    other.register()
    assert other.ask(NUMBER).status == 200
    code = other.code(NUMBER)
    client.register()
    assert client.ask(NUMBER).status == 200
    assert verify(client, f"{(int(client.code(NUMBER)) + 1) % 10**6:06}") == (400, 105)
    assert client.call("/unregister").status == 204
    assert client.outbox(NUMBER)[0]["text"].split()[-1] == code
    assert verify(other, code) == (200, None)
    assert other.call("/unregister").status == 204
    assert client.outbox(NUMBER) == []


def test_an_outbox_that_cannot_write_is_a_failure(
    make_client: Callable[..., WsgiClient], tmp_path: Path
) -> None:
    client = make_client()
    (tmp_path / "outbox").write_text("a file where the folder belongs")
    client.register()
    answer = client.ask()
    assert (answer.status, answer.errno) == (503, 201)
    (tmp_path / "outbox").unlink()
    assert client.ask(OTHER).status == 200  # nothing was changed: any number is free
