"""Errors: each status and errno of CONTRACT section 2, one shape, a page about each, no secrets."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest
from support import WsgiClient

import gateway

TOO_LARGE = {"Request Entity Too Large", "Content Too Large"}
"""The phrase of 413 in Python 3.11 and 3.12 (RFC 7231), and since 3.13 (RFC 9110)."""

CONTRACT = [
    (400, 104, {"Bad Request"}),  # not verified
    (400, 105, {"Bad Request"}),  # wrong code
    (400, 106, {"Bad Request"}),  # no JSON; the first server said 406
    (400, 107, {"Bad Request"}),  # invalid value
    (400, 108, {"Bad Request"}),  # missing
    (401, 109, {"Unauthorized"}),  # Hawk signature
    (401, 110, {"Unauthorized"}),  # unknown session
    (410, 111, {"Gone"}),  # expired; the first server said 411 when decryption failed
    (411, 112, {"Length Required"}),
    (413, 113, TOO_LARGE),
    (415, 106, {"Unsupported Media Type"}),  # shares its errno with 400
    (429, 114, {"Too Many Requests"}),  # codes of a session
    (429, 115, {"Too Many Requests"}),  # messages to a number
    (429, 116, {"Too Many Requests"}),  # messages to a destination, or of the gateway
    (429, 117, {"Too Many Requests"}),  # requests of a client address
    (500, 999, {"Internal Server Error"}),
    (503, 201, {"Service Unavailable"}),
]
"""CONTRACT section 2."""


def make(error: type[gateway.GatewayError]) -> gateway.GatewayError:
    """One error of a class, with a time to wait where the contract wants one."""
    return error("what was wrong", 7) if error.status == 429 else error("what was wrong")


def test_every_row_has_one_class() -> None:
    found = [(e.status, int(e.errno or 0)) for e in gateway.error_classes()]
    assert sorted(found) == sorted((status, errno) for status, errno, _ in CONTRACT)


@pytest.mark.parametrize(("status", "errno", "phrases"), CONTRACT)
def test_body_of_an_error(status: int, errno: int, phrases: set[str]) -> None:
    """All of the body, so that a further or a missing field fails."""
    named = {(e.status, e.errno): e for e in gateway.error_classes()}
    answer = gateway.error_answer(make(named[status, gateway.Errno(errno)]), "https://id.example")
    body = json.loads(answer.body)
    assert answer.status == status
    assert answer.content_type == "application/json"
    assert body.pop("error") in phrases
    info = body.pop("info")
    assert info.startswith("https://id.example/")
    assert info.endswith(str(errno))
    retry_after = body.pop("retryAfter", None)
    assert body == {"code": status, "errno": errno, "message": "what was wrong"}
    assert (retry_after is not None) == (errno in (114, 115, 116, 117, 201))
    assert answer.headers.get("Retry-After") == (str(retry_after) if retry_after else None)
    assert answer.headers.get("WWW-Authenticate") == ("Hawk" if status == 401 else None)


def test_errno_in_a_body_is_a_number() -> None:
    """Not the name that an enum prints as."""
    assert b'"errno": 105' in gateway.error_answer(make(gateway.WrongCode), "http://h").body


def test_challenge_of_an_error_is_kept() -> None:
    """A stale timestamp tells ts and tsm; the plain challenge must not replace it."""
    told = 'Hawk ts="1", tsm="x", error="Stale timestamp"'
    error = gateway.BadSignature("stale", headers={"WWW-Authenticate": told})
    assert gateway.error_answer(error, "http://h").headers["WWW-Authenticate"] == told


def test_headers_of_one_error_are_not_those_of_the_next() -> None:
    """A shared default mapping that is written to would show here."""
    gateway.error_answer(gateway.Unavailable("down"), "http://h")
    gateway.error_answer(gateway.UnknownSession("who?"), "http://h")
    assert gateway.error_answer(gateway.WrongCode("wrong"), "http://h").headers == {}
    assert gateway.WrongCode("wrong").headers == {}


def test_wait_of_zero_seconds_is_told() -> None:
    answer = gateway.error_answer(gateway.TooManyCodes("wait", 0), "http://h")
    assert json.loads(answer.body)["retryAfter"] == 0
    assert answer.headers["Retry-After"] == "0"


@pytest.mark.parametrize(
    ("method", "path", "status", "phrase"),
    [
        ("GET", "/nothing", 404, "Not Found"),
        ("POST", "/v1/msisdn/nothing", 404, "Not Found"),
        ("GET", "/register", 405, "Method Not Allowed"),
        ("PUT", "/v1/msisdn/register", 405, "Method Not Allowed"),
    ],
)
def test_404_and_405_have_three_fields(
    client: WsgiClient, method: str, path: str, status: int, phrase: str
) -> None:
    answer = client.raw(method, path)
    assert answer.status == status
    assert answer.json.keys() == {"code", "error", "message"}
    assert (answer.json["code"], answer.json["error"]) == (status, phrase)
    assert answer.json["message"]


def test_403_has_three_fields(make_client: Callable[..., WsgiClient]) -> None:
    client = make_client(sms_inbound=[{"kind": "nexmo", "path_secret": "right"}])
    answer = client.get("/sms/momt/wrong?provider=nexmo&msisdn=447700900123&text=hi")
    assert answer.status == 403
    assert answer.json.keys() == {"code", "error", "message"}
    assert (answer.json["code"], answer.json["error"]) == (403, "Forbidden")


# -- The page about errors ----------------------------------------------------


class Page(HTMLParser):
    """Collects the anchors of a page and the text that follows each."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.texts: dict[str, str] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an anchor."""
        if found := dict(attrs).get("id"):
            self.ids.append(found)

    def handle_data(self, data: str) -> None:
        """Add text to the newest anchor's."""
        if self.ids:
            self.texts[self.ids[-1]] = self.texts.get(self.ids[-1], "") + data


@pytest.mark.parametrize("path", ["/errors", "/v1/msisdn/errors"])
def test_page_explains_every_errno(client: WsgiClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/html")
    page = Page(answer.data.decode())
    for status, errno, _ in CONTRACT:
        assert str(status) in page.texts[str(errno)]
        assert len(page.texts[str(errno)].split()) > 5  # a sentence, not a name only


def test_page_has_one_anchor_per_errno(client: WsgiClient) -> None:
    """106 belongs to two statuses; two anchors of one name are no valid HTML."""
    ids = Page(client.get("/errors").data.decode()).ids
    assert sorted(ids) == sorted({str(errno) for _, errno, _ in CONTRACT})


def test_page_says_what_a_client_does(client: WsgiClient) -> None:
    """For each class of errors, in its own words."""
    texts = Page(client.get("/errors").data.decode()).texts
    for error in gateway.error_classes():
        says, _, todo = (error.__doc__ or "").partition("Client: ")
        text = " ".join(texts[str(error.errno)].split())
        assert " ".join(says.split()) in text
        assert "What a client does: " + " ".join(todo.split()) in text
        assert todo, error


@pytest.mark.parametrize("path", ["/errors", "/.well-known/browserid/warning.html"])
def test_pages_run_nothing_and_load_nothing(client: WsgiClient, path: str) -> None:
    """Their one style is named by its hash; what a browser would add is refused."""
    answer = client.get(path)
    policy, page = answer.headers["content-security-policy"], answer.data.decode()
    (style,) = re.findall("<style>(.*?)</style>", page, re.S)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; ")
    assert f"style-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy
    assert not re.search("<script|<img|<link| style=| on[a-z]+=|url[(]|@import", page)
    assert "<meta name=viewport" in page
    assert ":target" in style
    assert re.search("<title>[^<]+</title>", page)
    assert re.search("<h1>[^<]+</h1>", page)


def test_info_leads_to_the_page(client: WsgiClient) -> None:
    """Follow the link of a real error, with its path and its anchor."""
    answer = client.call("/sms/verify_code", {"code": "123456"}, signed=False)
    assert answer.errno == 110
    base = "http://127.0.0.1:5000"
    assert answer.json["info"].startswith(base + "/")
    path, _, anchor = answer.json["info"].removeprefix(base).partition("#")
    assert anchor in Page(client.get(path).data.decode()).ids


def test_info_names_the_public_url(make_client: Callable[..., WsgiClient]) -> None:
    """Never the Host header, which the client chooses."""
    client = make_client(public_url="http://localhost:8123")
    answer = client.call("/discover", {}, environ={"HTTP_HOST": "evil.example"})
    assert answer.json["info"].startswith("http://localhost:8123/")
    assert b"evil" not in answer.data


# -- No secrets ---------------------------------------------------------------

OURS = "+447700900456"
DIGITS = OURS[1:]
"""Not the number that messages give as an example."""


@pytest.mark.parametrize(
    ("path", "body", "errno"),
    [
        ("/sms/verify_code", {"code": "{wrong}"}, 105),  # tells the right code
        ("/sms/verify_code", {"code": "{code}", "publicKey": "no"}, 107),  # echoes the code
        ("/sms/verify_code", {"code": "{code}0"}, 107),  # echoes what was typed
        ("/sms/verify_code", {"code": "{code}", "publicKey": {}, "duration": 0}, 107),
        ("/sms/verify", {"msisdn": "+447700900999"}, 107),  # tells the session's number
        ("/sms/verify", {"msisdn": DIGITS}, 107),  # echoes the number
        ("/discover", {"mcc": "{token}"}, 107),  # echoes a parameter
        ("/sms/verify", {"msisdn": "+979123456789"}, 107),
        ("/sms/mt/verify", {"mcc": "{code}"}, 108),
        ("/certificate/sign", {"publicKey": "{code}"}, 104),
        ("/sms/verify_code", {"code": "{long}"}, 107),
        ("/certificate/sign", {"duration": DIGITS}, 108),
    ],
)
def test_no_error_holds_a_secret(
    client: WsgiClient, path: str, body: dict[str, Any], errno: int
) -> None:
    token = client.register().json["msisdnSessionToken"]
    assert client.ask(OURS).status == 200
    assert client.credentials
    code = client.code(OURS)
    wrong = f"{(int(code) + 1) % 10**6:06}"
    text = json.dumps(body).replace("{code}", code).replace("{wrong}", wrong)
    text = text.replace("{long}", (code * 6)[:32])  # of the kind that does not wait
    answer = client.call(path, json.loads(text.replace("{token}", token)))
    assert answer.errno == errno
    varying = ("timestamp", "server-authorization")  # may hold any digits
    said = f"{[v for n, v in answer.headers.items() if n not in varying]} {answer.data!r}"
    key, hawk_id = client.credentials.hawk_key.hex(), client.credentials.hawk_id
    for secret in (code, token, key, hawk_id, DIGITS, "7700900999"):
        assert secret not in said


@pytest.mark.parametrize("path", ["/sms/verify_code", "/v1/msisdn/register", "/discover"])
def test_broken_json_is_not_quoted(client: WsgiClient, path: str) -> None:
    client.register()
    answer = client.raw("POST", path, b'{"code": "hunter2')
    if answer.status != 401:  # where Hawk is wanted, that comes first
        assert (answer.status, answer.errno) == (400, 106)
    assert b"hunter2" not in answer.data


def test_crash_tells_nothing(client: WsgiClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """500/999 in the usual shape, with the session's signature, and not a word of the cause."""

    def crash(*args: object) -> None:
        raise RuntimeError("hunter2")

    client.register()
    monkeypatch.setattr(client.gateway, "verify_code", crash)
    answer = client.call("/sms/verify_code", {"code": "123456"})
    assert (answer.status, answer.errno) == (500, 999)
    assert "server-authorization" in answer.headers  # checked by the client
    said = str(answer.headers) + answer.data.decode()
    for word in ("hunter2", "RuntimeError", "Traceback", "gateway.py", "File "):
        assert word not in said
