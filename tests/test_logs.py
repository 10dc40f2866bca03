"""Nothing secret in any log line, in any output or in any error body: captured and grepped."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import lab
import psutil
import pytest
import urllib3
from support import NAMED, Answer, GatewayProcess, WsgiClient
from test_sms import SECRET, Answerer, SmsApi, after, parts, raw, refused, reply, taken

import gateway

NUMBER, OTHER = "+447700900871", "+447700900456"  # neither is the example in a message
WEBHOOK_SECRET = "hook-5ecret-0f-the-path"
KEY = gateway.public_key_json(gateway.generate_key("RS256").public_key())


# -- What may not be seen ------------------------------------------------------


class Secrets:
    """Values that no output may hold; grows while a test runs."""

    def __init__(self, *values: str) -> None:
        self.values = {SECRET, WEBHOOK_SECRET, "a1b2c3d4", *values}
        for number in (NUMBER, OTHER):
            self.values |= {number, number[1:], number[3:], "0" + number[3:]}

    def add(self, credentials: gateway.Credentials, token: str) -> None:
        """Take in what belongs to a session."""
        self.values |= {token, credentials.hawk_id, credentials.hawk_key.hex()}

    def found_in(self, text: str) -> list[str]:
        """Those that a text holds, as a word of their own if they are short."""
        lowered = text.lower()
        return [
            value
            for value in self.values
            if (value in lowered if len(value) > 8 else re.search(rf"\b{value}\b", lowered))
        ]


class Watched(WsgiClient):
    """A client that keeps all that is secret, and every answer that is an error."""

    def __init__(self, app: gateway.GatewayApp, known: Secrets) -> None:
        super().__init__(app)
        self.known, self.errors = known, [Answer(0, {}, b"")]

    def raw(
        self, method: str, path: str, body: bytes = b"", environ: dict[str, Any] | None = None
    ) -> Answer:
        """One request."""
        answer = super().raw(method, path, body, environ)
        if answer.status >= 400:
            self.errors.append(answer)
        return answer

    def register(self, **body: Any) -> Answer:
        """Open a session; its secrets are known from now on."""
        answer = super().register(**body)
        assert self.credentials
        self.known.add(self.credentials, answer.json["msisdnSessionToken"])
        return answer

    def error(self, path: str, body: Any = None, **options: Any) -> tuple[int, int | None]:
        """One request that must fail; gives status and errno."""
        answer = self.call(path, body, **options)
        return answer.status, answer.errno


@pytest.fixture
def heard(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """All loggers there are, at DEBUG, with the text of what they say."""
    known = [logging.getLogger(name) for name in logging.root.manager.loggerDict]
    before = [(logger, logger.level, logger.propagate, logger.disabled) for logger in known]
    for logger in known:
        logger.setLevel(logging.NOTSET)
        logger.propagate, logger.disabled = True, False
    with caplog.at_level(logging.DEBUG):
        yield caplog
    for logger, level, propagate, disabled in before:
        logger.setLevel(level)
        logger.propagate, logger.disabled = propagate, disabled


@pytest.fixture
def check(
    heard: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> Callable[[Secrets, Watched], str]:
    """Grep all that was logged, printed or answered as an error; gives the log's text."""

    def grep(known: Secrets, client: Watched) -> str:
        printed = capfd.readouterr()
        assert known.found_in(heard.text) == []
        assert known.found_in(printed.out + printed.err) == []
        for answer in client.errors:
            # the digest in it is made from a nonce; it could hold six digits by chance
            headers = {n: v for n, v in answer.headers.items() if n != "server-authorization"}
            assert (known.found_in(answer.data.decode() + str(headers)), answer) == ([], answer)
        return heard.text

    return grep


@pytest.fixture
def watch(make_app: Callable[..., gateway.GatewayApp]) -> Callable[..., Watched]:
    """A watched client of a fresh application."""

    def make(**options: Any) -> Watched:
        app = make_app(**options)
        master = Path(app.settings.keys_dir, "master.secret").read_text().strip()
        return Watched(app, Secrets(master))

    return make


# -- In process, every logger at DEBUG -----------------------------------------

Check = Callable[[Secrets, Watched], str]
Watch = Callable[..., Watched]


def whole_flow(client: Watched, code_of: Callable[[], str]) -> None:
    """From registration to /unregister, with a certificate in between."""
    client.register(msisdn=NUMBER, mcc="235")
    for path in ("/sms/verify", "/sms/mt/verify"):
        assert client.call(path, {"msisdn": NUMBER}).status in (200, 204)
        client.known.values.add(code_of())
    assert client.call("/sms/resend_code").status == 200
    client.known.values.add(code := code_of())
    assert client.call("/sms/verify_code", {"code": code, "publicKey": KEY}).status == 200
    assert client.call("/certificate/sign", {"publicKey": KEY}).status == 200
    assert client.call("/unregister").status == 204
    assert client.error("/unregister") == (401, 110)


def test_a_flow_that_goes_well(watch: Watch, check: Check) -> None:
    client = watch()
    whole_flow(client, lambda: client.code(NUMBER))
    check(client.known, client)


def test_a_flow_through_a_provider(watch: Watch, check: Check) -> None:
    with SmsApi() as api:
        client = watch(sms_providers=[api.entry()])
        whole_flow(client, api.code)
        check(client.known, client)


def test_every_refusal_of_a_request(watch: Watch, check: Check) -> None:
    client = watch(code_tries=2, sends_per_session=3, mo_verifier="+15550001111")
    call, error = client.call, client.error
    number = {"msisdn": NUMBER}
    bad = {"code": "1" * 6, "msisdn": NUMBER}

    assert error("/discover", {"mcc": NUMBER}) == (400, 107)
    assert error("/discover", {"mcc": "235", "msisdn": NUMBER + "x"}) == (400, 107)
    assert error("/discover", {"mnc": NUMBER}) == (400, 108)
    client.register()
    assert error("/sms/verify", {"msisdn": NUMBER[1:]}) == (400, 107)
    assert error("/sms/verify", {"msisdn": [NUMBER]}) == (400, 107)
    assert error("/sms/verify_code", {**bad, "code": NUMBER}) == (400, 107)
    assert error("/sms/verify_code", number) == (400, 108)
    assert error("/sms/verify_code", bad) == (410, 111)
    assert error("/certificate/sign", {"publicKey": {"algorithm": NUMBER}}) == (400, 104)
    assert error("/certificate/sign", {"publicKey": KEY, "duration": NUMBER}) == (400, 104)
    assert error("/certificate/sign", {"publicKey": KEY}) == (400, 104)
    assert error("/sms/resend_code") == (410, 111)

    assert client.ask(NUMBER).status == 200
    client.known.values.add(code := client.code(NUMBER))
    wrong = f"{(int(code) + 1) % 10**6:06}"
    client.known.values.add(wrong)
    assert error("/sms/verify", {"msisdn": OTHER}) == (400, 107)
    assert error("/sms/verify_code", {"code": code, "publicKey": NUMBER}) == (400, 107)
    assert error("/sms/verify_code", {"code": code, "duration": NUMBER}) == (400, 107)
    assert error("/sms/verify_code", {"code": (code * 6)[:32]}) == (400, 107)
    assert error("/sms/verify_code", {"code": wrong}) == (400, 105)
    assert error("/sms/verify_code", {"code": wrong}) == (400, 105)
    assert error("/sms/verify_code", {"code": code}) == (410, 111)
    for _ in range(2):
        assert call("/sms/resend_code").status == 200
        client.known.values.add(client.code(NUMBER))
    assert error("/sms/verify_code", {"code": client.outbox(NUMBER)[-2]["text"].split()[-1]}) == (
        400, 105,
    )  # fmt: skip
    assert error("/sms/resend_code") == (429, 114)
    assert call("/sms/verify_code", {"code": client.code(NUMBER)}).status == 200
    assert error("/certificate/sign", {"publicKey": {"algorithm": NUMBER}}) == (400, 107)
    assert error("/certificate/sign", {"publicKey": KEY, "duration": NUMBER}) == (400, 107)

    assert client.credentials
    good = client.credentials
    nonce = secrets.token_hex(6)
    assert error("/sms/resend_code", nonce=nonce) == (429, 114)
    assert error("/sms/resend_code", nonce=nonce) == (401, 109)
    assert error("/sms/resend_code", ts=12345) == (401, 109)
    for header in ("Hawk", f'Hawk id="{good.hawk_id}"', f"Bearer {code}", good.hawk_key.hex()):
        with contextlib.suppress(AssertionError):  # which 401 it is, is not this test's matter
            error("/sms/resend_code", signed=False, environ={"HTTP_AUTHORIZATION": header})
    client.credentials = gateway.Credentials(good.hawk_id, gateway.HawkKey(bytes(32)))
    assert error("/unregister") == (401, 109)
    client.credentials = good

    for text in (f'{{"msisdn": "{NUMBER}"', f'["{NUMBER}"]', f'"{code}"', "[" * 10_000):
        answer = client.raw("POST", "/register", text.encode())
        assert (answer.status, answer.errno) == (400, 106)
    form = {"CONTENT_TYPE": "application/x-www-form-urlencoded"}
    assert client.raw("POST", "/register", f"msisdn={NUMBER}".encode(), form).errno == 106
    assert client.raw("POST", "/register", b"x" * 20_000).errno == 113
    assert client.raw("POST", "/register", b"{}", {"CONTENT_LENGTH": NUMBER}).errno == 112
    early = {"CONTENT_LENGTH": "90", "wsgi.input": io.BytesIO(f'{{"msisdn": "{NUMBER}"'.encode())}
    assert client.raw("POST", "/register", b"{}", early).status == 400
    assert client.raw("DELETE", "/register").status == 405
    assert client.get("/sms/nothing").status == 404
    client.known.values.add(client.app.token)
    outbox = f"/outbox?to={NUMBER[1:]}&token={client.app.token}"
    assert client.get(outbox, HTTP_HOST="example.com").status == 404
    assert client.get(outbox, HTTP_SEC_FETCH_SITE="cross-site").status == 404
    assert client.get(outbox + "x").status == 404
    assert len(client.errors) > 35
    check(client.known, client)


def test_what_the_phone_sends(watch: Watch, check: Check) -> None:
    hooks = [{"kind": "nexmo", "path_secret": WEBHOOK_SECRET}, {"kind": "beepsend"}]
    client = watch(sms_inbound=hooks, mo_verifier="+15550001111")
    client.register()
    assert client.credentials
    hawk_id, path = client.credentials.hawk_id, f"/sms/momt/{WEBHOOK_SECRET}?provider=nexmo"
    for query, status in (
        (f"&msisdn={NUMBER[1:]}&text=hello+{hawk_id}", 200),
        (f"&msisdn={OTHER[1:]}&text={hawk_id}", 200),  # another number: ignored
        (f"&msisdn=123&text={hawk_id}", 200),
        (f"&msisdn={NUMBER[1:]}&text={'ab' * 32}", 200),
        ("&text=" + NUMBER, 200),
    ):
        assert client.get(path + query).status == status
    client.known.values.add(client.code(NUMBER))
    wrong = f"/sms/momt/{WEBHOOK_SECRET}x?provider=nexmo&msisdn={NUMBER[1:]}&text={hawk_id}"
    assert client.get(wrong).status == 403
    body = json.dumps({"from": NUMBER, "message": hawk_id, "mccmnc": {"mcc": NUMBER}}).encode()
    assert client.raw("POST", "/sms/momt/?provider=beepsend", body).status == 200
    assert client.raw("POST", "/sms/momt/?provider=beepsend", body[:-5]).status == 200  # garbage
    assert client.raw("POST", f"/sms/momt/?provider={NUMBER[1:]}", body).status == 400
    assert client.call("/sms/resend_code", {"shortVerificationCode": True}).status == 200
    client.known.values.add(client.code(NUMBER))
    check(client.known, client)


def echo(status: int = 200, field: str = "error-text") -> Answerer:
    """An answer that repeats all that the provider was sent, as some do."""

    def answer(handler: Any) -> None:
        told = handler.server.stand_in.received[-1].body
        part = {"status": "4", field: told}
        reply({"messages": [part]}, status)(handler)

    return answer


def echo_in(head: str) -> Answerer:
    """The same, in the head of the answer."""

    def answer(handler: Any) -> None:
        told = " ".join(handler.server.stand_in.received[-1].form.values())
        raw(head.format(told=told).encode())(handler)

    return answer


BAD_PROVIDERS: dict[str, Answerer] = {
    "refused": refused,
    "hangs": after(5),
    "HTML": reply("<h1>no</h1>", 500, "text/html"),
    "echo": echo(),
    "echo 401": echo(401),
    "echo as status": echo(field="status"),
    "echo as text": reply(f"unknown api_secret {SECRET} for {NUMBER}", 400, "text/plain"),
    "echo in the reason": echo_in("HTTP/1.1 400 {told}\r\nContent-Length: 0\r\n\r\n"),
    "echo in the first line": echo_in("{told}\r\n\r\n"),
    "echo in Location": echo_in(
        "HTTP/1.1 302 Found\r\nLocation: /{told}\r\nContent-Length: 0\r\n\r\n"
    ),
    "part without status": reply({"messages": [{"to": NUMBER}]}),
    "status is the number": reply(parts(NUMBER)),
    "status is an integer": reply(parts(int(NUMBER))),
    "closes": raw(b""),
}


@pytest.mark.parametrize("name", BAD_PROVIDERS)
def test_a_provider_that_fails(name: str, watch: Watch, check: Check) -> None:
    with SmsApi(BAD_PROVIDERS[name]) as api:
        client = watch(sms_providers=[api.entry(timeout_s=0.3)])
        client.register()
        refused = client.ask(NUMBER)  # without its word for it the message may have been taken
        assert (refused.status == 503) == (name in ("refused", "echo", "echo 401"))
        assert (refused.status == 400) == (name in ("echo as text", "echo in the reason"))
        client.known.values.add(api.code())
        api.answer = taken
        assert client.ask(NUMBER).status == 200
        client.known.values.add(api.code())
        assert "sms" in check(client.known, client)  # the operator learns of it


def test_a_store_that_is_gone(watch: Watch, check: Check, tmp_path: Path) -> None:
    own = gateway.EmbeddedStore(str(tmp_path / "own"))
    client = watch()
    client.gateway.storage = gateway.Storage(own.url)
    client.verified(NUMBER)
    client.known.values |= {client.outbox(NUMBER)[-1]["text"].split()[-1]}
    assert client.credentials
    own.stop()
    for path, body in (
        ("/sms/verify", {"msisdn": NUMBER}),
        ("/sms/verify_code", {"code": "123456"}),
        ("/certificate/sign", {"publicKey": KEY}),
        ("/unregister", None),
        ("/register", {"msisdn": NUMBER}),
    ):
        assert client.error(path, body) == (503, 201)
    assert client.get("/__heartbeat__").status == 503
    text = check(client.known, client)
    assert "storage" in text  # the operator learns of it


def test_a_store_that_refuses(watch: Watch, check: Check, storage: gateway.Storage) -> None:
    """The texts of its errors quote keys and arguments."""
    client = watch()
    client.register()
    assert client.credentials
    key = client.gateway.secrets.id_for(client.credentials.hawk_id)
    record = storage.get(key)
    assert record
    storage._run("DEL", key)
    storage._run("LPUSH", key, record)  # a list where a value belongs
    assert client.error("/sms/verify", {"msisdn": NUMBER}) == (503, 201)
    storage._run("DEL", key)
    storage._run("SET", key, b"\xff" + record[1:])  # another version's record
    assert client.error("/sms/verify", {"msisdn": NUMBER}) == (503, 201)
    check(client.known, client)


@pytest.mark.parametrize(
    "step", ["send_code", "verify_code", "sign_certificate", "unregister", "register"]
)
def test_a_crash_in_a_handler(
    step: str, watch: Watch, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a foreign exception says may quote anything; so may the one before it."""
    client = watch()
    client.register()
    told = [NUMBER, SECRET, "424242", *client.known.values]
    client.known.values.add("424242")

    def crash(*args: Any, **options: Any) -> Any:
        try:
            raise KeyError(*told)
        except KeyError as error:
            raise RuntimeError(" ".join(told), args) from error

    monkeypatch.setattr(client.gateway, step, crash)
    path = {
        "send_code": "/sms/verify",
        "verify_code": "/sms/verify_code",
        "sign_certificate": "/certificate/sign",
    }.get(step, "/" + step)
    body = {"msisdn": NUMBER, "code": "424242", "publicKey": KEY}
    assert client.error(path, body) == (500, 999)
    text = check(client.known, client)
    assert "RuntimeError" in text
    assert "test_logs.py" in text  # its traceback, without what it said


# -- What the start says about bad settings ------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        ["--master-secret", "5ecret5" + "0" * 56],
        ["--master-secret", "5ecret5" + "G" * 57],
        ["--sms-providers", '[{"kind": "nexmo", "api_key": "5ecret5"'],
        ["--sms-providers", '{"kind": "nexmo", "api_secret": "5ecret5"}'],
        ["--sms-providers", '["5ecret5"]'],
        ["--sms-providers", '[{"api_secret": "5ecret5"}]'],
        ["--sms-inbound", '[{"path_secret": "5ecret5"}]'],
        ["--sms-inbound", '"5ecret5"'],
        ["--host", "0.0.0.0", "--sms-inbound", '[{"kind": "nexmo", "path_secret": "5ecret5"}]'],
        ["--host", "192.0.2.1", "--sms-providers", '[{"kind": "outbox", "key": "5ecret5"}]'],
        ["--public-url", "https://user:5ecret5@id.example/path"],
        ["--port", "0", "--storage-url", "redis://user:5ecret5@127.0.0.1"],
    ],
)
def test_refused_settings_show_no_secret(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert gateway.main(options) == 2
    printed = capsys.readouterr()
    assert "5ecret5" not in printed.out + printed.err
    named = [name[2:] for name in options[::2]]
    assert any(name in printed.err.replace("_", "-") for name in named)


@pytest.mark.parametrize("as_toml", [[], ["--toml"]])
def test_the_settings_command_hides_secrets(
    as_toml: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    entry = {"kind": "nexmo", "api_key": "5ecret5-key", "api_secret": "5ecret5"}
    hook = {"kind": "nexmo", "path_secret": "5ecret5", "signature_secret": "5ecret5"}
    options = ["--sms-providers", json.dumps([entry]), "--sms-inbound", json.dumps([hook]), *NAMED]
    options += ["--master-secret", "5ec" + "0" * 61]
    for url in (
        "redis://user:5ecret5@127.0.0.1:6379",
        "rediss://:5ecret5@store.example",
        "redis://store.example?password=5ecret5",
        "unix:///run/store.sock?db=0&password=5ecret5&username=me",
    ):
        assert gateway.main(["settings", *as_toml, *options, "--storage-url", url]) == 0
        printed = capsys.readouterr()
        assert "nexmo" in printed.out
        assert "5ecret5" not in printed.out + printed.err
        assert "5ec0000" not in printed.out + printed.err


# -- A real process ------------------------------------------------------------


def lines_without_outbox(process: GatewayProcess) -> str:
    """What it printed, without the messages that the outbox shows."""
    return "\n".join(line for line in process.output.splitlines() if not line.startswith("SMS to "))


def abuse(process: GatewayProcess, known: Secrets, code_of: Callable[[lab.Client], str]) -> None:
    """Use a gateway in every way that may make it, Granian or the store say something."""
    client = process.client()
    token = client.register(msisdn=NUMBER, mcc="235", mnc="10").body["msisdnSessionToken"]
    assert client.credentials
    known.add(client.credentials, token)
    assert client.verify(NUMBER).status == 200
    known.values.add(code := code_of(client))
    wrong = f"{(int(code) + 1) % 10**6:06}"
    known.values.add(wrong)
    assert client.verify_code(wrong).status == 400
    assert client.verify_code(code, publicKey=KEY).status == 200
    store = [p for p in process.family() if "valkey" in p.name()]
    for member in store:
        member.kill()
    psutil.wait_procs(store, 5)
    client.verify(NUMBER)  # 200 or 503: it may be back already
    process.wait_until_ready()
    http, number = client.http, NUMBER[1:]
    with contextlib.suppress(urllib3.exceptions.HTTPError):
        http.request("GET", f"{process.url}/x?{number}", headers={"X" * 70_000: token})
    for path in (f"/outbox?to={number}", "/sms/momt/?provider=x", f"/register?msisdn={number}"):
        http.request("GET", process.url + path, headers={"Authorization": f"Hawk {token}"})
    http.request("POST", process.url + "/register", body=iter([NUMBER.encode()]))
    for worker in process.family()[1:]:
        if "python" in worker.name():
            worker.kill()
    process.wait_until_ready()
    http.clear()
    assert client.unregister().status == 204
    assert client.unregister().status == 401
    client.http.clear()


def files_of(folder: Path, *but: str) -> Iterable[Path]:
    """All log files below a folder."""
    return [path for path in folder.rglob("*.log") if path.name not in but]


def test_a_real_process_with_a_provider(start_gateway: Callable[..., GatewayProcess]) -> None:
    master = os.urandom(32).hex()
    with SmsApi() as api:
        process = start_gateway(*api.option(), env={"GATEWAY_MASTER_SECRET": master})
        known = Secrets(master)
        abuse(process, known, lambda client: api.code())
        api.answer = echo_in("HTTP/1.1 200 OK\r\nX {told}\r\nContent-Length: 0\r\n\r\n")
        client = process.client()
        client.register()
        assert client.verify(OTHER).status in (200, 503)
        known.values.add(api.code())
        assert process.stop() == 0
    assert known.found_in(process.output) == []
    assert "store" in process.output  # its restart was told
    logs = list(files_of(process.folder))
    assert len(logs) > 1  # our own file of its output, and the store's
    for path in logs:
        assert known.found_in(path.read_text("utf-8", "replace")) == [], path


def test_the_outbox_alone_shows_codes_and_says_so(
    start_gateway: Callable[..., GatewayProcess],
) -> None:
    process = start_gateway()
    known = Secrets((process.folder / "keys" / "master.secret").read_text().strip())
    abuse(process, known, lambda client: lab.Handset(client, NUMBER).code())
    assert process.stop() == 0
    announced, _, rest = process.output.partition("SMS to ")
    assert "outbox" in announced
    assert "code" in announced
    assert known.found_in("SMS to " + rest) != []
    assert known.found_in(lines_without_outbox(process)) == []
    for path in files_of(process.folder / "data"):
        assert known.found_in(path.read_text("utf-8", "replace")) == [], path


@pytest.mark.parametrize("form", ["text", "json"])
def test_half_of_a_surrogate_pair_is_written_escaped(
    form: str, queued_log: Callable[[int], gateway.QueuedLog]
) -> None:
    """Kannel's bytes may come as such; a line that cannot be encoded would end the log's thread."""
    read, write = os.pipe()
    handler = queued_log(write)
    handler.setFormatter(gateway.LogLines(form))
    record = logging.LogRecord(
        "gateway", logging.INFO, "", 0, "sms: %(reason)s", ({"reason": "\udce9"},), None
    )
    handler.handle(record)
    handler.handle(logging.LogRecord("gateway", logging.INFO, "", 0, "sms: %s", ("\udce9",), None))
    handler.flush()
    os.close(write)
    with os.fdopen(read, "rb", 0) as lines:
        text = lines.read(10**6).decode()
    assert text.count("\\udce9") == 2 + (form == "json")
