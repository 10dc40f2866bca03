"""Section 14: how a step looks on the wire (routes, headers, CORS, bodies, Hawk over HTTP).

Hawk is written a second time here, with ``hmac`` alone, so that a shared mistake shows.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import io
import json
import logging
import re
import secrets
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import lab
import pytest
from support import NUMBER, Answer, WsgiClient, shared

import gateway

MakeClient = Callable[..., WsgiClient]
RSA_JSON = gateway.public_key_json(gateway.generate_key("RS128").public_key())
LIMIT = 10_240

SIGNED: dict[str, Any] = {
    "/sms/verify": {"msisdn": NUMBER},
    "/sms/mt/verify": {"msisdn": NUMBER},
    "/sms/resend_code": None,
    "/sms/verify_code": {"code": "123456"},
    "/certificate/sign": {"publicKey": RSA_JSON},
    "/unregister": None,
}
"""Every endpoint that Hawk protects, with a body that would do."""
OPEN_GET = (
    "/",
    "/__heartbeat__",
    "/__lbheartbeat__",
    "/__version__",
    "/.well-known/browserid",
    "/api-specs",
)
"""Every open GET that answers in JSON."""
METHODS = {
    **{path: {"POST"} for path in ("/discover", "/register", *SIGNED)},
    **{path: {"GET"} for path in OPEN_GET},
    "/.well-known/browserid/warning.html": {"GET"},
    "/sms/momt": {"GET", "POST"},
    "/sms/momt/": {"GET", "POST"},
}
"""The routes of the contract, section 4."""


def both(path: str) -> tuple[str, str]:
    """Both spellings of a path, as the contract has them."""
    return path, ("/v1" if path.startswith("/certificate/") else "/v1/msisdn") + path


def hawk(
    client: WsgiClient,
    path: str,
    body: bytes = b"",
    *,
    method: str = "POST",
    host: str = "127.0.0.1",
    port: int = 5000,
    ts: int | None = None,
    nonce: str = "",
    kind: str = "application/json",
    hash: str | None = None,
    replaced: dict[str, str] | None = None,
) -> str:
    """An Authorization header, made without the gateway's own code."""
    assert client.credentials
    if hash is None:
        text = b"hawk.1.payload\n" + kind.encode() + b"\n" + body + b"\n"
        hash = base64.b64encode(hashlib.sha256(text).digest()).decode()
    when = str(int(client.gateway.clock()) if ts is None else ts)
    nonce = nonce or secrets.token_hex(6)
    lines = ["hawk.1.header", when, nonce, method, path, host, str(port), hash, "", ""]
    key = client.credentials.hawk_key.hex().encode()
    mac = base64.b64encode(hmac.digest(key, "\n".join(lines).encode(), "sha256")).decode()
    fields = {"id": client.credentials.hawk_id, "ts": when, "nonce": nonce, "mac": mac}
    fields |= {"hash": hash} | (replaced or {})
    return "Hawk " + ", ".join(f'{name}="{value}"' for name, value in fields.items() if value)


def seal_of(client: WsgiClient, path: str, sent: str, answer: Answer, method: str = "POST") -> str:
    """The MAC that Server-Authorization must carry, made without the gateway's own code."""
    assert client.credentials
    asked = dict(re.findall(r'(\w+)="([^"]*)"', sent))
    kind = answer.headers.get("content-type", "").split(";")[0].lower().encode()
    text = b"hawk.1.payload\n" + kind + b"\n" + answer.data + b"\n"
    hash = base64.b64encode(hashlib.sha256(text).digest()).decode()
    lines = ["hawk.1.response", asked["ts"], asked["nonce"], method, path, "127.0.0.1", "5000"]
    key = client.credentials.hawk_key.hex().encode()
    mac = hmac.digest(key, "\n".join([*lines, hash, "", ""]).encode(), "sha256")
    return base64.b64encode(mac).decode()


def record(client: WsgiClient) -> bytes | None:
    """What the store holds about the client's session."""
    assert client.credentials
    return client.gateway.storage.get(client.gateway.secrets.id_for(client.credentials.hawk_id))


def nonces(client: WsgiClient) -> list[bytes]:
    """The keys of the nonces that are used up."""
    found: list[bytes] = client.gateway.storage._run("KEYS", "{*")
    return found


def dumped(body: Any) -> bytes:
    """A body as JSON; ``None`` is no body."""
    return b"" if body is None else json.dumps(body).encode()


# -- Routes, content types, 404 and 405 ---------------------------------------


@pytest.mark.parametrize("path", [p for path in OPEN_GET for p in both(path)])
def test_open_gets_answer_json_in_both_spellings(client: WsgiClient, path: str) -> None:
    answer = client.get(path)
    assert (answer.status, type(answer.json)) == (200, dict)
    assert int(answer.headers["content-length"]) == len(answer.data)


@pytest.mark.parametrize("spelling", [0, 1])
def test_the_whole_flow_in_either_spelling(client: WsgiClient, spelling: int) -> None:
    def path(bare: str) -> str:
        return both(bare)[spelling]

    assert client.call(path("/discover"), {"mcc": "234"}).status == 200
    client.register()
    assert client.call(path("/sms/mt/verify"), {"msisdn": NUMBER}).status == 204
    assert client.call(path("/sms/verify"), {"msisdn": NUMBER}).json["mtSender"] == "Gateway"
    assert client.call(path("/sms/resend_code")).json["mtSender"] == "Gateway"
    verified = client.call(path("/sms/verify_code"), {"code": client.code()})
    assert verified.json == {"msisdn": NUMBER}
    signed = client.call(path("/certificate/sign"), {"publicKey": RSA_JSON})
    assert list(signed.json) == ["cert"]
    assert client.get(path("/sms/momt/") + "?provider=nexmo").json == {}
    assert client.get(path("/sms/momt") + "?provider=nexmo").json == {}
    gone = client.call(path("/unregister"))
    assert (gone.status, gone.data) == (204, b"")
    assert "content-type" not in gone.headers


@pytest.mark.parametrize(
    "path",
    [
        "/nothing",
        "/registers",
        "/register/",  # a server that strips slashes where the contract has none
        "/sms",
        "/v1/register",  # only signing has this short prefix
        "/v1/msisdn/certificate/sign",
        "/v2/msisdn/register",
        "/sms/momt/a/b",
        "/%3Cscript%3E",
        "/<script>",
    ],
)
def test_404_is_json_with_three_fields(client: WsgiClient, path: str) -> None:
    answer = client.raw("POST", path)
    assert answer.status == 404
    assert answer.json.keys() == {"code", "error", "message"}
    assert (answer.json["code"], answer.json["error"]) == (404, "Not Found")


def test_404_survives_a_path_that_is_not_utf8(client: WsgiClient) -> None:
    assert client.raw("GET", "/caf\xe9/\xff").status == 404


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/register", {"POST"}),
        ("HEAD", "/register", {"POST"}),
        ("PUT", "/register", {"POST"}),
        ("DELETE", "/v1/msisdn/unregister", {"POST"}),
        ("GET", "/v1/certificate/sign", {"POST"}),  # 405 before any Hawk
        ("POST", "/", {"GET"}),
        ("PATCH", "/sms/momt/", {"GET", "POST"}),
        ("TRACE", "/sms/verify", {"POST"}),
        ("POST", "/.well-known/browserid", {"GET"}),
    ],
)
def test_405_is_json_and_says_what_is_allowed(
    client: WsgiClient, method: str, path: str, allow: set[str]
) -> None:
    answer = client.raw(method, path)
    assert answer.status == 405
    assert allow <= set(re.split(r",\s*", answer.headers["allow"])) <= allow | {"HEAD", "OPTIONS"}
    assert answer.headers["content-type"] == "application/json"
    if method != "HEAD":
        assert answer.json.keys() == {"code", "error", "message"}


@pytest.mark.parametrize("path", ["/", "/__heartbeat__", "/api-specs", "/nothing", "/outbox"])
def test_head_is_a_get_without_its_body(client: WsgiClient, path: str) -> None:
    get, head = client.get(path), client.raw("HEAD", path)
    assert (head.status, head.data) == (get.status, b"")
    assert head.headers["content-length"] == str(len(get.data))
    assert head.headers["content-type"] == get.headers["content-type"]


def test_api_specs_lists_every_route_with_its_methods(client: WsgiClient) -> None:
    service = client.get("/api-specs").json["service"]
    resources = service["resources"]
    assert service["videur_version"] == "0.1"
    assert service["location"] == client.gateway.settings.base_url
    for path, methods in METHODS.items():
        for spelled in both(path):
            assert resources[spelled].keys() == methods, spelled
    for path, methods in resources.items():  # and nothing that is not there
        example = path.removeprefix("regexp:").replace("[^/]+", "x")
        assert re.fullmatch(path.removeprefix("regexp:"), example)
        answer = client.raw("TRACE", example)
        allowed = set(answer.headers["allow"].split(","))
        assert (answer.status, allowed - {"HEAD", "OPTIONS"}) == (405, set(methods)), path
        assert methods.get("POST", {"max_body_size": "10k"}) == {"max_body_size": "10k"}
        assert methods.get("GET", {}) == {}


def test_every_route_of_the_application_is_in_api_specs(client: WsgiClient) -> None:
    """A route that somebody adds without telling the proxy in front would be unprotected."""
    resources = client.get("/api-specs").json["service"]["resources"]
    served = {
        (route.rule if "<" not in route.rule else "regexp:" + re.sub("<.*?>", "[^/]+", route.rule))
        + " " + route.method
        for route in client.app.routes
    }  # fmt: skip
    assert served == {f"{path} {method}" for path in resources for method in resources[path]}


@pytest.mark.parametrize(("limit_bytes", "told"), [(10240, "10k"), (1500, "2k"), (1024, "1k")])
def test_api_specs_allows_what_we_take(
    make_client: MakeClient, limit_bytes: int, told: str
) -> None:
    service = make_client(request_max_bytes=limit_bytes).get("/api-specs").json["service"]
    assert service["resources"]["/register"]["POST"] == {"max_body_size": told}


def test_browserid_names_our_key_and_a_page(client: WsgiClient) -> None:
    body = client.get("/.well-known/browserid").json
    key = client.gateway.keys.browserid.public_key()
    assert body["public-key"] == gateway.public_key_json(key)
    assert body["authentication"] == body["provisioning"]
    page = client.get(body["authentication"])
    assert (page.status, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    private = client.gateway.keys.browserid.private_numbers()
    assert str(getattr(private, "d", "x")) not in json.dumps(body)


def test_home_says_who_we_are(client: WsgiClient) -> None:
    body = client.get("/").json
    assert body.keys() == {"name", "description", "version", "homepage", "endpoint"}
    assert (body["version"], body["endpoint"]) == (gateway.__version__, "http://127.0.0.1:5000")
    assert client.get("/__version__").json["version"] == gateway.__version__


@pytest.mark.parametrize("path", [*OPEN_GET, "/errors", "/nothing"])
def test_a_hidden_version_is_hidden_everywhere(make_client: MakeClient, path: str) -> None:
    answer = make_client(display_version=False).get(path)
    assert gateway.__version__ not in answer.data.decode()


def test_info_leads_to_the_errno_it_is_about(client: WsgiClient) -> None:
    info = urlsplit(client.call("/discover", {}).json["info"])
    assert f"{info.scheme}://{info.netloc}" == "http://127.0.0.1:5000"
    page = client.get(info.path)
    assert (page.status, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert re.search(f'id="?{info.fragment}["> ]', page.data.decode())


def test_errors_explains_every_errno_once(client: WsgiClient) -> None:
    """An id that is there twice is no HTML."""
    page = client.get("/errors").data.decode()
    wanted = [str(n) for n in (*range(104, 118), 201, 999)]
    assert re.findall(r'id="?(\d+)', page) == wanted


# -- URLs that we return ------------------------------------------------------


@pytest.mark.parametrize("public_url", ["", "http://localhost:8080"])
@pytest.mark.parametrize("prefix", ["", "/v1/msisdn"])
def test_urls_have_the_spelling_asked_and_never_the_host_header(
    make_client: MakeClient, public_url: str, prefix: str
) -> None:
    client, base = make_client(public_url=public_url), public_url or "http://127.0.0.1:5000"
    evil = {"HTTP_HOST": "evil.example", "HTTP_X_FORWARDED_HOST": "evil.example"}
    body = {"mcc": "234", "msisdn": NUMBER}
    found = client.call(prefix + "/discover", body, environ=evil).json
    opened = client.call(prefix + "/register", body, environ=evil).json
    refused = client.call(prefix + "/discover", {}, environ=evil)
    for answer in (found, opened):
        url = answer["verificationDetails"]["sms/mt"]["url"]
        assert url == f"{base}{prefix}/sms/mt/verify"
    assert opened["verificationUrl"] == f"{base}{prefix}/sms/verify"
    assert refused.json["info"].startswith(base + "/")
    for path in ("/", "/api-specs"):
        assert b"evil" not in client.raw("GET", path, environ=evil).data


# -- Timestamp and Retry-After ------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("POST", "/register"),
        ("POST", "/discover"),
        ("GET", "/nothing"),
        ("PUT", "/register"),
        ("POST", "/sms/verify"),
        ("OPTIONS", "/sms/verify"),
        ("OPTIONS", "/nothing"),
        ("GET", "/outbox"),
        ("OPTIONS", "/outbox"),
        ("GET", "/errors"),
        ("HEAD", "/"),
    ],
)
def test_timestamp_is_the_clock_in_whole_seconds(
    client: WsgiClient, monkeypatch: pytest.MonkeyPatch, method: str, path: str
) -> None:
    monkeypatch.setattr(client.gateway, "clock", lambda: 1_799_999_999.9)
    assert client.raw(method, path).headers["timestamp"] == "1799999999"


def test_retry_after_is_on_a_429_and_equals_the_body(make_client: MakeClient) -> None:
    client = make_client(sends_per_session=1)
    client.register()
    assert client.ask().status == 200
    assert "retry-after" not in client.call("/sms/verify_code", {}).headers
    answer = client.ask()
    assert (answer.status, answer.errno) == (429, 114)
    assert 3_500 < int(answer.headers["retry-after"]) <= 3_600


@pytest.fixture
def without_store(make_client: MakeClient, tmp_path: Path) -> WsgiClient:
    """A client of a gateway whose store has gone."""
    client = make_client()
    client.register()
    client.gateway.storage = gateway.Storage(f"unix://{tmp_path}/none.sock")
    return client


@pytest.mark.parametrize("path", ["/register", *SIGNED])
def test_a_store_that_is_gone_is_503_with_retry_after(without_store: WsgiClient, path: str) -> None:
    answer = without_store.call(path, SIGNED.get(path))
    assert (answer.status, answer.errno) == (503, 201)
    assert int(answer.headers["retry-after"]) > 0


def test_the_heartbeat_keeps_its_body_when_the_store_is_gone(without_store: WsgiClient) -> None:
    answer = without_store.get("/__heartbeat__")
    assert (answer.status, answer.json) == (503, {"storage": False, "sms": True})
    assert int(answer.headers["retry-after"]) > 0
    assert answer.headers["access-control-allow-origin"] == "*"
    for path in ("/__lbheartbeat__", "/", "/.well-known/browserid"):
        assert without_store.get(path).status == 200


def test_the_heartbeat_proves_a_write(client: WsgiClient, storage: gateway.Storage) -> None:
    """A read-only replica answers PING and GET; only a write finds it out."""
    look_again(client)
    storage._run("CONFIG", "SET", "min-replicas-to-write", "1")
    try:
        answer = client.get("/__heartbeat__")
    finally:
        storage._run("CONFIG", "SET", "min-replicas-to-write", "0")
    assert (answer.status, answer.json["storage"]) == (503, False)
    look_again(client)
    assert client.get("/__heartbeat__").json["storage"] is True


def look_again(client: WsgiClient) -> None:
    """Have the next heartbeat look for itself, as it would a second later."""
    client.gateway._checked_s = -gateway.HEARTBEAT_S


def writes(storage: gateway.Storage) -> int:
    """How many SET commands the store has run, by its own count."""
    stats = storage._run("INFO", "commandstats").decode()
    found = re.search(r"cmdstat_set:calls=(\d+)", stats)
    return int(found[1]) if found else 0


def test_the_heartbeat_writes_once_a_second(client: WsgiClient, storage: gateway.Storage) -> None:
    """Whoever asks: where DynamoDB is behind it, each write is paid for."""
    look_again(client)
    before = writes(storage)
    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(lambda _: client.get("/__heartbeat__").status, range(200)))
    assert set(statuses) == {200}
    assert writes(storage) - before == 1
    look_again(client)
    for _ in range(2):
        assert client.get("/v1/msisdn/__heartbeat__").status == 200
    assert writes(storage) - before == 2


def test_the_heartbeat_finds_out_within_a_second(
    make_client: MakeClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it says is the answer of a second ago at most, be that good or bad."""
    client, now_s = make_client(), 1000.0
    well, gone = client.gateway.storage, gateway.Storage(f"unix://{tmp_path}/none.sock")
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    for later_s, store, status in (
        (0, well, 200), (0.9, gone, 200), (0.2, gone, 503), (0.9, well, 503), (0.2, well, 200),
    ):  # fmt: skip
        now_s += later_s
        client.gateway.storage = store
        assert client.get("/__heartbeat__").status == status, now_s


def test_a_store_that_hangs_is_given_up_within_a_second(
    make_client: MakeClient, tmp_path: Path
) -> None:
    client = make_client()
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(f"{tmp_path}/silent.sock")
        silent.listen()
        client.gateway.storage = gateway.Storage(f"unix://{tmp_path}/silent.sock")
        began = time.monotonic()
        answer = client.call("/register")
    assert (answer.status, answer.errno) == (503, 201)
    assert time.monotonic() - began < 1 * shared()


# -- CORS ---------------------------------------------------------------------

HOME = "https://app.example"


@pytest.mark.parametrize(
    ("allowed", "origin", "answered", "credentials"),
    [
        (["*"], HOME, "*", False),  # echoing under * lets any page act with credentials
        (["*"], "null", "*", False),  # sandboxed frames: null is never echoed
        (["*"], "*", "*", False),  # "*" found in the list, and so taken for a listed origin
        ([HOME], HOME, HOME, True),
        ([HOME], None, None, False),
        ([HOME], "", None, False),
        ([HOME], "null", None, False),
        ([HOME], "*", None, False),
        ([HOME], "http://app.example", None, False),  # scheme not compared
        ([HOME], "https://app.example:8443", None, False),  # port not compared
        ([HOME], "https://app.example.evil.example", None, False),  # startswith
        ([HOME], "https://evil-app.example", None, False),  # endswith
        ([HOME], "https://appXexample", None, False),  # a regex with a bare dot
        ([HOME], f"{HOME}, https://evil.example", None, False),  # split or "in"
        ([HOME], "https://app", None, False),  # substring of a listed one
        ([HOME, "https://b.example"], "https://b.example", "https://b.example", True),
        (["*", HOME], HOME, HOME, True),
        (["*", HOME], "https://evil.example", "*", False),
        ([], HOME, None, False),
        ([], "null", None, False),
    ],
)
def test_cors_by_allowed_origins(
    make_client: MakeClient,
    allowed: list[str],
    origin: str | None,
    answered: str | None,
    credentials: bool,
) -> None:
    client = make_client(allowed_origins=allowed)
    environ = {"HTTP_ORIGIN": origin}
    for answer in (
        client.raw("GET", "/", environ=environ),
        client.raw("GET", "/nothing", environ=environ),
        client.raw("PUT", "/register", environ=environ),
        client.raw("POST", "/discover", environ=environ),  # 400
        client.raw("POST", "/sms/verify", environ=environ),  # 401
        client.raw("POST", "/discover", environ={**environ, "CONTENT_LENGTH": "99999"}),
        client.raw("OPTIONS", "/sms/verify", environ=environ),
        client.raw("OPTIONS", "/nothing", environ=environ),
    ):
        found = answer.headers
        assert found.get("access-control-allow-origin") == answered
        assert found.get("access-control-allow-credentials") == ("true" if credentials else None)
        if allowed != ["*"]:  # it depends on the Origin, so caches must know
            assert found["vary"] == "Origin"
        if answered is None:
            assert not [name for name in found if name.startswith("access-control-")]


def test_four_headers_are_exposed(session: WsgiClient) -> None:
    wanted = {"timestamp", "retry-after", "server-authorization", "www-authenticate"}
    for answer in (session.ask(), session.get("/nothing"), session.call("/sms/verify_code")):
        exposed = answer.headers["access-control-expose-headers"]
        assert wanted <= {name.strip().lower() for name in exposed.split(",")}


@pytest.mark.parametrize(
    "path", [*METHODS, "/v1/msisdn/sms/verify", "/v1/certificate/sign", "/nothing", "/a/b/c"]
)
def test_every_preflight_is_answered_without_authentication(client: WsgiClient, path: str) -> None:
    environ = {
        "HTTP_ORIGIN": HOME,
        "HTTP_ACCESS_CONTROL_REQUEST_METHOD": "POST",
        "HTTP_ACCESS_CONTROL_REQUEST_HEADERS": "authorization,content-type",
    }
    answer = client.raw("OPTIONS", path, environ=environ)
    assert (answer.status, answer.data) == (204, b"")

    def listed(name: str) -> set[str]:
        return set(re.split(r",\s*", answer.headers[name].lower()))

    assert {"get", "post"} <= listed("access-control-allow-methods")
    assert {"authorization", "content-type"} <= listed("access-control-allow-headers")
    assert answer.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize("allowed", [["*"], [HOME]])
def test_the_outbox_never_gets_cors_headers(make_client: MakeClient, allowed: list[str]) -> None:
    """Any page in the browser of somebody at this desk could read the codes."""
    client = make_client(allowed_origins=allowed)
    for path in (*both("/outbox"), *both(f"/press/{client.app.token}/press.mjs")):
        for method in ("GET", "OPTIONS", "POST", "HEAD"):
            for peer in ("127.0.0.1", "192.0.2.1"):
                environ = {"HTTP_ORIGIN": HOME, "REMOTE_ADDR": peer}
                answer = client.raw(method, path, environ=environ)
                assert not [name for name in answer.headers if name.startswith("access-control-")]


# -- Bodies -------------------------------------------------------------------


class Untouchable(io.BytesIO):
    """A body that must not be read."""

    def read(self, size: int | None = -1, /) -> bytes:
        raise AssertionError("the body was read")


@pytest.mark.parametrize(
    ("length", "status", "errno"),
    [
        (str(LIMIT + 1), 413, 113),
        ("1000000000", 413, 113),
        ("9999999999999", 413, 113),  # 13 digits are too large too, not unusable
        ("9" * 5000, 413, 113),  # int() refuses more than 4300 digits
        ("-1", 411, 112),
        ("+5", 411, 112),
        ("abc", 411, 112),  # Bottle's own reading makes this a 500
        ("1e3", 411, 112),
        ("0x10", 411, 112),
        ("1_0", 411, 112),  # int() takes underscores
        ("5, 5", 411, 112),
        ("٥", 411, 112),  # int() and \d take other scripts' digits
    ],
)
def test_a_body_too_large_or_of_no_usable_length_is_not_read(
    client: WsgiClient, length: str, status: int, errno: int
) -> None:
    # Without the validator, which refuses such a length itself.
    client.wsgi = lambda *args: io.BytesIO(b"".join(client.app(*args)))
    environ = {"CONTENT_LENGTH": length, "wsgi.input": Untouchable()}
    for path in ("/discover", "/register", "/sms/momt/?provider=nexmo"):
        answer = client.raw("POST", path, b"{}", environ)
        assert (answer.status, answer.errno) == (status, errno), path


@pytest.mark.parametrize("path", ["/discover", "/register", "/sms/momt/?provider=nexmo"])
@pytest.mark.parametrize("length", [None, "13"])
def test_a_chunked_body_is_411(client: WsgiClient, path: str, length: str | None) -> None:
    """Bottle decodes chunks a second time behind servers that have done so."""
    environ = {"HTTP_TRANSFER_ENCODING": "chunked", "CONTENT_LENGTH": length}
    answer = client.raw("POST", path, b'{"mcc":"234"}', environ)
    assert (answer.status, answer.errno) == (411, 112)


@pytest.mark.parametrize("path", ["/discover", "/register"])
def test_a_body_that_a_server_decoded_from_chunks_is_411(client: WsgiClient, path: str) -> None:
    """Granian passes it on without a length: it must not count as no body."""
    environ = {"wsgi.input_terminated": True, "CONTENT_LENGTH": None}
    answer = client.raw("POST", path, b'{"mcc":"234"}', environ)
    assert (answer.status, answer.errno) == (411, 112)
    empty = client.raw("POST", "/register", b"", {"wsgi.input_terminated": True})
    assert empty.status == 200


@pytest.mark.parametrize(("size", "status"), [(LIMIT, 200), (LIMIT + 1, 413)])
def test_the_largest_body_is_10_kib(client: WsgiClient, size: int, status: int) -> None:
    body = b'{"mcc":"234"'.ljust(size - 1) + b"}"
    assert client.raw("POST", "/discover", body).status == status


def test_the_largest_body_is_a_setting(make_client: MakeClient) -> None:
    client = make_client(request_max_bytes=1024)
    body = b'{"mcc":"234"'.ljust(1024) + b"}"
    assert client.raw("POST", "/discover", body).errno == 113
    assert client.raw("POST", "/discover", body.replace(b"  ", b"", 1)).status == 200


def test_a_body_that_ends_early_is_106(client: WsgiClient) -> None:
    """Valid JSON so far, but not all that was announced."""
    answer = client.raw("POST", "/discover", b'{"mcc":"234"}', {"CONTENT_LENGTH": "20"})
    assert (answer.status, answer.errno) == (400, 106)


def test_no_more_than_the_declared_length_is_read(client: WsgiClient) -> None:
    answer = client.raw("POST", "/discover", b'{"mcc":"234"}garbage', {"CONTENT_LENGTH": "13"})
    assert answer.status == 200


@pytest.mark.parametrize(
    "kind",
    [
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "text/json",
        "application/jsonp",  # startswith
        "application/xml; note=application/json",  # "in"
        "json",
    ],
)
def test_another_media_type_is_415(client: WsgiClient, kind: str) -> None:
    for path in ("/discover", "/register"):
        answer = client.raw("POST", path, b'{"mcc":"234"}', {"CONTENT_TYPE": kind})
        assert (answer.status, answer.errno) == (415, 106), path


@pytest.mark.parametrize(
    "kind", ["application/json", "application/json; charset=utf-8", "Application/JSON ;x=y"]
)
def test_json_may_be_spelled_like_this(client: WsgiClient, kind: str) -> None:
    answer = client.raw("POST", "/discover", b'{"mcc":"234"}', {"CONTENT_TYPE": kind})
    assert answer.status == 200


@pytest.mark.parametrize("kind", ["application/json", "text/plain", ""])
def test_no_body_is_fine_whatever_its_type(client: WsgiClient, kind: str) -> None:
    environ = {"CONTENT_TYPE": kind, "CONTENT_LENGTH": "0"}
    assert client.raw("POST", "/register", b"", environ).status == 200


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"garbage",
        b"[]",
        b'["mcc"]',
        b'"mcc"',
        b"null",
        b"true",
        b"234",
        b'{"mcc": "234",}',
        b"{'mcc': '234'}",
        b'{"mcc": "234"} {}',
        b'{"mcc": NaN}',  # json.loads takes these four
        b'{"mcc": Infinity}',
        b'{"mcc": -Infinity}',
        b'{"mcc": "234", "roaming": [{"x": NaN}]}',
        b'{"mcc": "2\n34"}',  # a raw control character
        b'{"mcc": "234", "roaming": ' + b"9" * 5000 + b"}",  # int() gives up: ValueError
        b"[" * 5000,  # RecursionError, a 500 in Bottle
        b'{"roaming":' * 800,
        b'\xef\xbb\xbf{"mcc": "234"}',  # a BOM is no JSON
        '{"mcc": "234"}'.encode("utf-16"),  # json.loads guesses the encoding of bytes
        '{"mcc": "234"}'.encode("utf-32-le"),
        b'{"mcc": "234", "roaming": "\xff"}',
        b'{"mcc": "234", "roaming": "\xed\xa0\x80"}',  # a surrogate in UTF-8
        b'{"mcc": "234", "roaming": "\xc0\xaf"}',  # an overlong slash
    ],
    ids=lambda body: repr(body[:24]),
)
def test_what_is_not_a_json_object_is_106(client: WsgiClient, body: bytes) -> None:
    for path in ("/discover", "/register"):
        answer = client.raw("POST", path, body)
        assert (answer.status, answer.errno) == (400, 106), path


def test_deep_nesting_that_ends_is_no_crash(client: WsgiClient) -> None:
    body = b'{"mcc": "234", "roaming": ' + b"[" * 4000 + b"]" * 4000 + b"}"
    assert client.raw("POST", "/discover", body).status in (200, 400)


@pytest.mark.parametrize("where", ["%s", '{"a": [%s], "msisdn": "+447700900123"}'])
def test_a_name_twice_is_106(session: WsgiClient, where: str) -> None:
    """A proxy that looks at bodies and we must not see two different numbers."""
    body = (where % f'{{"msisdn": "+447700900001", "msisdn": "{NUMBER}"}}').encode()
    environ = {"HTTP_AUTHORIZATION": hawk(session, "/sms/verify", body)}
    answer = session.raw("POST", "/sms/verify", body, environ)
    assert (answer.status, answer.errno) == (400, 106)
    assert (session.outbox(NUMBER), session.outbox("+447700900001")) == ([], [])


SURROGATE = "\ud800"


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/discover", {"mcc": SURROGATE * 3}, 400),
        ("/discover", {"mcc": "234", "mnc": SURROGATE * 2}, 0),  # 0: a bad MNC is absent, or 106
        ("/discover", {"mcc": "234", SURROGATE: SURROGATE}, 0),
        ("/register", {"msisdn": SURROGATE}, 400),
        ("/sms/verify", {"msisdn": "+44" + SURROGATE * 10}, 400),
        ("/sms/verify_code", {"code": SURROGATE * 6}, 400),
        ("/sms/verify_code", {"code": "é" * 32}, 400),
        ("/certificate/sign", {"publicKey": SURROGATE}, 400),
        ("/certificate/sign", {"publicKey": {"algorithm": SURROGATE}}, 400),
        ("/certificate/sign", {"publicKey": RSA_JSON, "duration": SURROGATE}, 400),
        ("/certificate/sign", {"format": "jwt", "audience": SURROGATE}, 400),
        ("/certificate/sign", {"format": "jwt", "audience": "https://a.b", "nonce": "\udfff"}, 400),
        ("/unregister", {"everywhere": SURROGATE}, 400),
        ("/unregister", {"everywhere": [{SURROGATE: 1}]}, 400),
        ("/sms/momt/", {"provider": SURROGATE}, 400),
        ("/sms/momt/?provider=nexmo", {"msisdn": SURROGATE, "text": SURROGATE}, 200),
    ],
)
def test_a_lone_surrogate_is_an_ordinary_bad_value(
    session: WsgiClient, path: str, body: Any, status: int
) -> None:
    """JSON can say it, UTF-8 cannot: whoever encodes it crashes."""
    signed = path in SIGNED
    if path == "/certificate/sign":
        session.verified()  # before that no key is looked at
    assert session.ask().status == 200
    answer = session.call(path, body, signed=signed)
    assert answer.status in ((status,) if status else (200, 400))
    assert answer.status == 200 or answer.errno in (106, 107)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/discover", "mcc"),
        ("/register", "msisdn"),
        ("/sms/verify", "msisdn"),
        ("/sms/verify_code", "code"),
        ("/certificate/sign", "publicKey"),
    ],
)
def test_huge_numbers_are_ordinary_bad_values(session: WsgiClient, path: str, name: str) -> None:
    """Python makes 1e999 infinity, which ``int()`` and ``json.dumps`` choke on."""
    if path == "/certificate/sign":
        session.verified()  # before that no key is looked at
    for value in (b"9" * 4000, b"1e999", b"-1e400", b"-" + b"9" * 300):
        body = b'{"%b": %b}' % (name.encode(), value)
        environ = {"HTTP_AUTHORIZATION": hawk(session, path, body)}
        answer = session.raw("POST", path, body, environ)
        assert (answer.status, answer.errno) == (400, 107)
        assert name in answer.json["message"]


@pytest.mark.parametrize("missing", [None, ""])
def test_null_and_empty_are_missing_everywhere(session: WsgiClient, missing: str | None) -> None:
    for path, name in (
        ("/discover", "mcc"),
        ("/sms/verify", "msisdn"),
        ("/sms/mt/verify", "msisdn"),
        ("/sms/verify_code", "code"),
        ("/certificate/sign", "publicKey"),
    ):
        answer = session.call(path, {name: missing, "roaming": missing})
        assert (answer.status, answer.errno) == (400, 108), path
        assert name in answer.json["message"]
    rest: dict[str, Any] = {"mcc": missing, "mnc": missing, "roaming": missing}
    opened = session.call("/register", {"msisdn": missing, **rest}, signed=False).json
    assert opened.keys() == {"msisdnSessionToken", "verificationUrl"}
    found = session.call("/discover", {**rest, "mcc": "234", "msisdn": missing}).json
    assert found["verificationMethods"] == ["sms/mt"]
    asked = {"msisdn": NUMBER, **rest, "shortVerificationCode": missing}
    assert session.call("/sms/mt/verify", asked).status == 204
    assert len(session.code()) == 32  # the default of that endpoint
    assert session.call("/sms/resend_code", {"shortVerificationCode": missing}).status == 200
    body: dict[str, Any] = {"code": session.code(), "publicKey": missing, "duration": missing}
    assert session.call("/sms/verify_code", body).json == {"msisdn": NUMBER}
    body = {"publicKey": RSA_JSON, "duration": missing}
    assert session.call("/certificate/sign", body).status == 200


@pytest.mark.parametrize(
    ("path", "name", "rest"),
    [
        ("/discover", "mcc", {}),
        ("/discover", "msisdn", {"mcc": "234"}),
        ("/register", "msisdn", {}),
        ("/register", "msisdn", {"mcc": "234"}),
        ("/sms/verify", "msisdn", {}),
        ("/sms/verify_code", "code", {}),
        ("/sms/verify_code", "publicKey", {"code": "123456"}),
        ("/sms/verify_code", "duration", {"code": "123456"}),
        ("/certificate/sign", "publicKey", {}),
        ("/certificate/sign", "duration", {"publicKey": RSA_JSON}),
    ],
)
def test_only_null_and_empty_are_missing(
    session: WsgiClient, path: str, name: str, rest: dict[str, Any]
) -> None:
    """``if params.get(name)`` takes 0, false and [] for missing: they are bad values."""
    values: list[Any] = [0, False, [], {}, 0.0, " "]
    if path == "/certificate/sign":
        session.verified()  # before that, and before a code waits, no key is looked at
    if path == "/sms/verify_code":
        assert session.ask().status == 200
    for value in values:
        answer = session.call(path, {**rest, name: value})
        assert (answer.status, answer.errno) == (400, 107), value
        assert name in answer.json["message"]


# -- Headers that are no text -------------------------------------------------


@pytest.mark.parametrize("header", ["HTTP_ORIGIN", "HTTP_ACCEPT_LANGUAGE", "HTTP_AUTHORIZATION"])
@pytest.mark.parametrize("value", ["\xff", "caf\xe9", "\xed\xa0\x80"])
def test_a_header_that_is_not_utf8_is_no_crash(
    session: WsgiClient, header: str, value: str
) -> None:
    """Bottle decodes headers as UTF-8 when they are read, and raises."""
    answer = session.call("/sms/verify", {"msisdn": NUMBER}, environ={header: value})
    assert answer.status == (401 if header == "HTTP_AUTHORIZATION" else 200)
    assert answer.headers["content-type"] == "application/json"
    preflight = session.raw("OPTIONS", "/register", environ={header: value})
    assert preflight.status == 204
    assert session.raw("GET", "/nothing", environ={header: value}).status == 404


@pytest.mark.parametrize("host", ["", None, "127.0.0.1:99999", "[::1", "a:b:c", "\xff", "a b"])
def test_an_unusable_host_header_is_a_wrong_mac_and_no_crash(
    session: WsgiClient, host: str | None
) -> None:
    answer = session.call("/sms/verify", {"msisdn": NUMBER}, environ={"HTTP_HOST": host})
    assert (answer.status, answer.errno) == (401, 109)
    assert session.raw("GET", "/outbox", environ={"HTTP_HOST": host}).status == 404


# -- Something unforeseen -----------------------------------------------------

SECRET = "146193"


class Awkward(Exception):
    """An exception that cannot even be printed."""

    def __str__(self) -> str:
        raise RuntimeError(SECRET)


CRASHES = [
    ValueError(f"code {SECRET} of {NUMBER}"),
    KeyError(SECRET),
    RecursionError(SECRET),
    UnicodeDecodeError("utf-8", SECRET.encode(), 0, 1, "no"),
    Awkward(),
]
STEPS = {
    "/discover": "discover",
    "/register": "register",
    "/sms/momt/?provider=nexmo": "receive_sms",
    "/sms/mt/verify": "send_code",
    "/sms/verify": "send_code",
    "/sms/resend_code": "resend_code",
    "/sms/verify_code": "verify_code",
    "/certificate/sign": "sign_certificate",
    "/unregister": "unregister",
}


@pytest.mark.parametrize(
    ("path", "crash"),
    [(path, CRASHES[0]) for path in STEPS]
    + [(path, crash) for path in ("/register", "/sms/verify") for crash in CRASHES[1:]],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_crash_is_a_500_that_tells_nothing(
    session: WsgiClient,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    path: str,
    crash: Exception,
) -> None:
    def fail(*_: Any, **__: Any) -> NoReturn:
        raise crash

    monkeypatch.setattr(session.gateway, STEPS[path], fail)
    caplog.set_level(logging.DEBUG)
    before = record(session)
    signed = path in SIGNED
    environ = {"HTTP_ORIGIN": HOME}
    answer = session.call(path, SIGNED.get(path), nonce="n", environ=environ, signed=signed)
    assert (answer.status, answer.errno) == (500, 999)
    assert answer.headers["access-control-allow-origin"] == "*"
    told = [answer.data.decode(), str(answer.headers), caplog.text, *capsys.readouterr()]
    for text in told:
        assert SECRET not in text
        assert NUMBER not in text
    assert type(crash).__name__ in caplog.text  # it is logged, with where it happened
    assert "test_http.py" in caplog.text
    assert record(session) == before
    if signed:
        assert "server-authorization" in answer.headers
        monkeypatch.undo()
        assert session.call(path, SIGNED.get(path), nonce="n").errno == 109


def test_an_unforeseen_error_in_bottle_itself_is_json_with_our_headers(
    client: WsgiClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bottle's own answer is HTML without the headers that were set before."""

    def fail(*_: Any) -> NoReturn:
        raise ValueError

    monkeypatch.setattr(client.app.router, "match", fail)
    answer = client.raw("GET", "/", environ={"wsgi.errors": io.StringIO()})
    assert (answer.status, answer.errno) == (500, 999)
    assert answer.headers["access-control-allow-origin"] == "*"


def test_headers_of_one_answer_are_not_on_the_next(session: WsgiClient) -> None:
    refused = session.call("/sms/verify", signed=False)
    assert "www-authenticate" in refused.headers
    answer = session.get("/")
    extra = {"www-authenticate", "retry-after", "server-authorization", "allow"}
    assert not extra & answer.headers.keys()


def test_parallel_requests_are_not_mixed_up(make_client: MakeClient) -> None:
    client = make_client(mt_sender_map={str(mcc): f"+{mcc}" for mcc in range(200, 400)})
    errors = []
    barrier = threading.Barrier(4)

    def ask(part: int) -> None:
        barrier.wait()
        for mcc in range(200 + part, 400, 4):
            found = client.call("/discover", {"mcc": str(mcc)}).json
            if found["verificationDetails"]["sms/mt"]["mtSender"] != f"+{mcc}":
                errors.append(mcc)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(4)))
    assert errors == []


# -- The outbox ---------------------------------------------------------------


@pytest.mark.parametrize("path", both("/outbox"))
def test_the_outbox_lists_messages_oldest_first(session: WsgiClient, path: str) -> None:
    began = int(time.time())
    for _ in range(3):
        assert session.ask().status == 200
    answer = session.get(f"{path}?to={NUMBER[1:]}&token={session.app.token}")
    assert answer.status == 200
    assert answer.headers["x-content-type-options"] == "nosniff"  # no script, whatever asks
    assert len({message["text"] for message in answer.json}) == 3
    for message in answer.json:
        assert message.keys() == {"from", "to", "text", "at"}
        assert (message["from"], message["to"].lstrip("+")) == ("Gateway", NUMBER[1:])
        assert began <= message["at"] <= time.time()
    newest = answer.json[-1]["text"].split()[-1]
    assert session.call("/sms/verify_code", {"code": newest}).status == 200


@pytest.mark.parametrize(
    "to",
    [
        "447700900124",
        "44770090012",  # a prefix
        "4477009001234",
        "*",  # a glob
        "44770090012?",
        "%5B4%5D47700900123",
        "../outbox/447700900123",
        "..%2Foutbox%2F447700900123",
        "%00",
        "%FF",
        "٤٤٧٧٠٠٩٠٠١٢٣".encode().hex("%").join(("%", "")),
        "",
    ],
)
def test_the_outbox_gives_one_number_exactly(session: WsgiClient, to: str) -> None:
    assert session.ask().status == 200
    token = session.app.token
    assert session.get(f"/outbox?to={to}&token={token}").json == []
    assert session.get(f"/outbox?token={token}").json == []


@pytest.mark.parametrize(
    "environ",
    [
        {"REMOTE_ADDR": "192.0.2.7"},
        {"REMOTE_ADDR": "10.0.0.1"},  # private is not loopback
        {"REMOTE_ADDR": "0.0.0.0"},
        {"REMOTE_ADDR": ""},
        {"REMOTE_ADDR": None},
        {"HTTP_HOST": "evil.example:5000"},  # DNS rebinding: the peer is the browser here
        {"HTTP_HOST": "evil.example"},
        {"HTTP_HOST": "127.0.0.1.evil.example:5000"},
        {"HTTP_HOST": "localhost.evil.example"},
        {"HTTP_HOST": "192.0.2.7:5000"},
        {"HTTP_HOST": "0.0.0.0:5000"},
        {"HTTP_HOST": None},
        {"HTTP_HOST": ""},
        {"HTTP_FORWARDED": "for=127.0.0.1"},
        {"HTTP_X_FORWARDED_FOR": "127.0.0.1"},
        {"HTTP_X_FORWARDED_FOR": ""},  # there, if empty
        {"HTTP_X_FORWARDED_HOST": "127.0.0.1"},
        {"HTTP_X_FORWARDED_PROTO": "https"},
        {"HTTP_X_REAL_IP": "127.0.0.1"},
        {"HTTP_VIA": "1.1 proxy"},
        {"HTTP_CF_CONNECTING_IP": "127.0.0.1"},
        {"HTTP_TRUE_CLIENT_IP": "127.0.0.1"},
        {"HTTP_SEC_FETCH_SITE": "cross-site"},  # a page of another site asks, in a browser here
    ],
    ids=str,
)
def test_the_outbox_is_not_there_for_anybody_else(
    session: WsgiClient, environ: dict[str, Any]
) -> None:
    assert session.ask().status == 200
    query = f"?to={NUMBER[1:]}&token={session.app.token}"
    page = both(f"/press/{session.app.token}/index.html")
    for path in (*(path + query for path in both("/outbox")), *page):
        answer = session.raw("GET", path, environ=environ)
        assert answer.status == 404
        assert answer.json.keys() == {"code", "error", "message"}
        assert answer.json["error"] == "Not Found"


@pytest.mark.parametrize(
    "query",
    [
        "",
        "&token=",
        "&token",
        "&token={cut}",
        "&token={token}x",
        "&token={token}%0A",
        "&token=%20{token}",
        "&token={swapped}",
        "&token={other}",  # of the same shape, and wrong
        "&token=None",
        "&token=%00",
        "&token=%FF",
        "&token=\xe9",
        "&TOKEN={token}",
        "&secret={token}",
        "&token={token}&token=x",
        "&token=" + "A" * 60_000,
    ],
    ids=lambda query: repr(query)[:24],
)
def test_the_outbox_is_there_for_whoever_knows_the_token(session: WsgiClient, query: str) -> None:
    """A proxy on this machine, or another account of it, comes from loopback as well."""
    assert session.ask().status == 200
    token = session.app.token
    assert re.fullmatch(r"[\w-]{43}", token)
    put = {"token": token, "cut": token[:-1], "swapped": token.swapcase()}
    path = f"/outbox?to={NUMBER[1:]}" + query.format(**put, other=secrets.token_urlsafe(32))
    answer = session.get(path)
    assert (answer.status, answer.json.keys()) == (404, {"code", "error", "message"})
    for method in ("POST", "HEAD"):
        assert session.raw(method, path).status in (404, 405)
    assert token not in answer.data.decode() + str(answer.headers)


def test_many_parameters_of_the_outbox_are_cheap(make_client: MakeClient) -> None:
    """Whoever has no token is refused before 60,000 bytes of query are taken apart."""
    for options in ({}, {"sms_providers": [{"kind": "nexmo", "api_key": "k", "api_secret": "s"}]}):
        client, spent_s = make_client(**options), []
        for _ in range(5):
            before_s = time.thread_time()
            assert client.get("/outbox?" + "&".join(["a=1"] * 15_000)).status == 404
            spent_s.append(time.thread_time() - before_s)
        assert min(spent_s) < 0.006 * shared()


@pytest.mark.parametrize(
    ("environ", "status"),
    [
        ({"HTTP_SEC_FETCH_SITE": "same-origin"}, 200),
        ({"HTTP_SEC_FETCH_SITE": "same-site"}, 200),
        ({"HTTP_SEC_FETCH_SITE": "none"}, 200),  # typed in, or a bookmark
        ({"HTTP_SEC_FETCH_SITE": ""}, 200),
        ({"HTTP_SEC_FETCH_SITE": "cross-site"}, 404),
        ({"HTTP_AUTHORIZATION": "Bearer {token}"}, 200),  # of no account here
        ({"HTTP_X_FORWARDED_FOR": "192.0.2.1"}, 404),
        ({"HTTP_X_ANYTHING": "1"}, 404),
    ],
    ids=str,
)
def test_what_else_the_outbox_asks(
    session: WsgiClient, environ: dict[str, str], status: int
) -> None:
    path = f"/outbox?token={session.app.token}&to={NUMBER[1:]}"
    assert session.raw("GET", path, environ=environ).status == status
    page = f"/press/{session.app.token}/index.html"
    assert session.raw("GET", page, environ=environ).status == status
    without = f"/outbox?to={NUMBER[1:]}"
    told = {name: value.format(token=session.app.token) for name, value in environ.items()}
    assert session.raw("GET", without, environ=told).status == 404


@pytest.mark.parametrize("host", ["localhost:5000", "LOCALHOST", "[::1]:5000", "127.0.0.1"])
@pytest.mark.parametrize("peer", ["127.0.0.1", "::1"])
def test_the_outbox_is_there_on_this_machine(session: WsgiClient, host: str, peer: str) -> None:
    assert session.ask().status == 200
    environ = {"REMOTE_ADDR": peer, "HTTP_HOST": host}
    path = f"/outbox?to={NUMBER[1:]}&token={session.app.token}"
    assert len(session.raw("GET", path, environ=environ).json) == 1
    page = f"/press/{session.app.token}/index.html"
    assert session.raw("GET", page, environ=environ).status == 200


def test_without_the_outbox_there_is_no_outbox(make_client: MakeClient) -> None:
    providers = [{"kind": "nexmo", "api_key": "k", "api_secret": "s"}]
    client = make_client(sms_providers=providers)
    answer = client.get(f"/outbox?to={NUMBER[1:]}&token={client.app.token}")
    assert answer.status == 404
    assert answer.json.keys() == {"code", "error", "message"}


# -- Hawk: who is let in ------------------------------------------------------


@pytest.mark.parametrize("path", [p for path in SIGNED for p in both(path)])
def test_hawk_made_by_hand_is_let_in_and_the_answer_is_signed(
    session: WsgiClient, path: str
) -> None:
    assert session.ask().status == 200
    session.code()
    bare = path.removeprefix("/v1/msisdn").removeprefix("/v1/c")
    body = dumped(SIGNED.get(bare if bare.startswith("/") else "/certificate/sign"))
    sent = hawk(session, path, body, kind="application/json" if body else "")
    answer = session.raw("POST", path, body, {"HTTP_AUTHORIZATION": sent})
    assert answer.status != 401
    assert f'mac="{seal_of(session, path, sent, answer)}"' in answer.headers["server-authorization"]


HEADERS: list[tuple[str | None, int]] = [
    (None, 110),
    ("", 110),
    ("Bearer 0123456789abcdef", 110),
    ("Basic aWQ6a2V5", 110),
    ('Hawkish id="x", ts="1", nonce="n", mac="m"', 110),  # startswith("Hawk")
    ("Hawk", 109),  # mohawk: ValueError
    ("Hawk ", 109),
    ("Hawk garbage", 109),
    ("Hawk id=x, ts=1, nonce=n, mac=m", 109),  # no quotes
    ("{}, ", 109),
    ("{} {}", 109),
    ('{}, id="0"', 109),  # a field twice: which counts?
    ('{}, nonce="other"', 109),
    ('{}, x="y"', 109),  # a field that is unknown
    ('{}, ext="a\\"b"', 109),
    ('{}, ext="caf\xc3\xa9"', 109),
    ('{}, ext="' + "x" * 10_000 + '"', 109),
]


@pytest.mark.parametrize(("header", "errno"), HEADERS, ids=lambda value: str(value)[:20])
def test_no_header_or_a_malformed_one(session: WsgiClient, header: str | None, errno: int) -> None:
    assert session.ask().status == 200
    before = record(session)
    for path, body in ((path, dumped(body)) for path, body in SIGNED.items()):
        good = hawk(session, path, body, kind="application/json" if body else "")
        sent = header and header.replace("{}", good)
        answer = session.raw("POST", path, body, {"HTTP_AUTHORIZATION": sent})
        assert (answer.status, answer.errno) == (401, errno), path
        assert answer.headers["www-authenticate"] == "Hawk"
        assert "server-authorization" not in answer.headers
    assert record(session) == before


@pytest.mark.parametrize(
    ("replaced", "errno"),
    [
        ({"mac": "AAAA"}, 109),
        ({"mac": ""}, 109),
        ({"mac": base64.b64encode(bytes(32)).decode()}, 109),
        ({"nonce": ""}, 109),
        ({"nonce": "another"}, 109),
        ({"ts": ""}, 109),
        ({"ts": "abc"}, 109),
        ({"ts": "-1"}, 109),
        ({"ts": "1.5"}, 109),
        ({"ts": "9" * 400}, 109),
        ({"ts": "1"}, 109),  # stale, but the MAC is of another time: no tsm for strangers
        ({"hash": "AAAA"}, 109),
        ({"ext": "added"}, 109),
        ({"app": "added", "dlg": "added"}, 109),
        ({"id": ""}, 109),  # a field that is needed: malformed
        ({"id": "0" * 64}, 110),
        ({"id": "no hex"}, 110),
        ({"id": "0" * 63 + "{"}, 110),
        ({"id": "../" * 8}, 110),
    ],
    ids=str,
)
def test_a_header_of_which_one_field_is_changed(
    session: WsgiClient, replaced: dict[str, str], errno: int
) -> None:
    before = record(session)
    for path, body in ((path, dumped(body)) for path, body in SIGNED.items()):
        kind = "application/json" if body else ""
        sent = hawk(session, path, body, kind=kind, replaced=replaced)
        answer = session.raw("POST", path, body, {"HTTP_AUTHORIZATION": sent})
        assert (answer.status, answer.errno) == (401, errno), path
        assert answer.headers["www-authenticate"] == "Hawk"
        assert "server-authorization" not in answer.headers
    assert record(session) == before
    assert nonces(session) == []  # or strangers could fill the store


@pytest.mark.slow
def test_hosts_and_paths_of_any_length_leave_no_memory_behind(
    session: WsgiClient, caplog: pytest.LogCaptureFixture
) -> None:
    """What is kept of the last ones must not be what a stranger has to send to fill it."""
    caplog.set_level("ERROR", "gateway")  # pytest keeps each line

    def ask(n: int) -> None:
        environ = {"HTTP_HOST": f"{n:03}" + "x" * 100_000, "HTTP_AUTHORIZATION": "Hawk"}
        environ["QUERY_STRING"] = "x" * (10_000 + n)
        assert session.raw("POST", "/unregister", b"", environ).errno == 109

    ask(0)  # loads what the tests judge answers by
    tracemalloc.start()
    try:
        for n in range(1, 201):
            ask(n)
        assert tracemalloc.get_traced_memory()[0] < 8_000_000  # of the 22 MB that came
    finally:
        tracemalloc.stop()
    assert session.call("/sms/verify", {"msisdn": NUMBER}).status == 200


def test_an_id_in_capitals_is_unknown(session: WsgiClient) -> None:
    """Two spellings of one id must not be two ids in the store, or sealed numbers are lost."""
    assert session.credentials
    sent = hawk(
        session, "/unregister", kind="", replaced={"id": session.credentials.hawk_id.upper()}
    )
    answer = session.raw("POST", "/unregister", b"", {"HTTP_AUTHORIZATION": sent})
    assert (answer.status, answer.errno) in ((401, 109), (401, 110))


@pytest.mark.parametrize(
    ("signed", "environ", "body"),
    [
        ({"path": "/sms/mt/verify"}, {}, None),
        ({"path": "/v1/msisdn/sms/verify"}, {}, None),  # the other spelling
        ({"path": "/sms/verify?a=1"}, {}, None),
        ({}, {"QUERY_STRING": "a=1"}, None),
        ({"method": "GET"}, {}, None),
        ({"host": "evil.example"}, {}, None),
        ({}, {"HTTP_HOST": "evil.example:5000"}, None),
        ({"port": 80}, {}, None),
        ({}, {"HTTP_HOST": "127.0.0.1:5001"}, None),
        ({}, {"HTTP_HOST": "127.0.0.1"}, None),  # so port 80
        ({}, {"HTTP_X_FORWARDED_HOST": "x"}, b'{"msisdn": "+447700900124"}'),  # hash
        ({}, {}, b'{"msisdn": "+447700900124"}'),
        ({}, {}, b""),
        ({}, {"CONTENT_TYPE": "text/plain"}, None),  # the type is hashed too
        ({"kind": ""}, {}, None),
    ],
    ids=str,
)
def test_a_request_that_is_not_the_one_signed(
    session: WsgiClient, signed: dict[str, Any], environ: dict[str, str], body: bytes | None
) -> None:
    good = dumped({"msisdn": NUMBER})
    sent = hawk(session, **{"path": "/sms/verify", "body": good, **signed})
    answer = session.raw(
        "POST",
        "/sms/verify",
        good if body is None else body,
        {"HTTP_AUTHORIZATION": sent, **environ},
    )
    assert (answer.status, answer.errno) == (401, 109)
    assert session.outbox() == session.outbox("+447700900124") == []


def test_a_signed_query_is_part_of_the_path(session: WsgiClient) -> None:
    path = "/sms/verify?a=%20b&c=d"
    assert session.call(path, {"msisdn": NUMBER}).status == 200


def test_a_payload_hash_may_be_left_out(session: WsgiClient) -> None:
    body = dumped({"msisdn": NUMBER})
    sent = hawk(session, "/sms/verify", body, hash="")
    assert "hash" not in sent
    answer = session.raw("POST", "/sms/verify", body, {"HTTP_AUTHORIZATION": sent})
    assert answer.status == 200


def test_the_key_is_its_hex_text_and_not_the_bytes(session: WsgiClient) -> None:
    assert session.credentials
    hawk_id, key = session.credentials
    session.credentials = gateway.Credentials(hawk_id, gateway.HawkKey(b""))
    lines = ["hawk.1.header", str(int(time.time())), "n", "POST", "/unregister", "127.0.0.1"]
    text = "\n".join([*lines, "5000", "", "", ""])
    mac = base64.b64encode(hmac.digest(key, text.encode(), "sha256")).decode()
    sent = f'Hawk id="{hawk_id}", ts="{lines[1]}", nonce="n", mac="{mac}"'
    answer = session.raw("POST", "/unregister", b"", {"HTTP_AUTHORIZATION": sent})
    assert (answer.status, answer.errno) == (401, 109)


def test_another_sessions_key_does_not_sign(session: WsgiClient) -> None:
    other = session.another()
    other.register()
    assert session.credentials and other.credentials
    mixed = session.another()
    mixed.credentials = gateway.Credentials(session.credentials.hawk_id, other.credentials.hawk_key)
    sent = hawk(mixed, "/unregister", kind="")
    answer = session.raw("POST", "/unregister", b"", {"HTTP_AUTHORIZATION": sent})
    assert (answer.status, answer.errno) == (401, 109)
    assert session.call("/unregister").status == 204


@pytest.mark.parametrize("path", SIGNED)
def test_an_unregistered_session_is_unknown(session: WsgiClient, path: str) -> None:
    assert session.call("/unregister").status == 204
    answer = session.call(path, SIGNED[path])
    assert (answer.status, answer.errno) == (401, 110)
    assert "server-authorization" not in answer.headers


@pytest.mark.parametrize("path", SIGNED)
def test_an_expired_session_is_unknown(session: WsgiClient, path: str) -> None:
    assert session.credentials
    key = session.gateway.secrets.id_for(session.credentials.hawk_id)
    ttl = session.gateway.storage._run("TTL", key)
    assert 86_390 <= ttl <= 86_400
    session.gateway.storage._run("PEXPIRE", key, 1)
    while session.gateway.storage._run("EXISTS", key):
        pass
    answer = session.call(path, SIGNED[path])
    assert (answer.status, answer.errno) == (401, 110)
    assert answer.headers["www-authenticate"] == "Hawk"


def test_the_token_itself_is_no_hawk_id(client: WsgiClient) -> None:
    token = client.register().json["msisdnSessionToken"]
    assert re.fullmatch("[0-9a-f]{64}", token)
    sent = hawk(client, "/unregister", kind="", replaced={"id": token})
    answer = client.raw("POST", "/unregister", b"", {"HTTP_AUTHORIZATION": sent})
    assert (answer.status, answer.errno) == (401, 110)


# -- Hawk: time and nonces ----------------------------------------------------

NOW = 1_800_000_000


@pytest.fixture
def fixed(session: WsgiClient, monkeypatch: pytest.MonkeyPatch) -> WsgiClient:
    """A session on a gateway whose clock stands still."""
    monkeypatch.setattr(session.gateway, "clock", lambda: NOW + 0.9)
    return session


@pytest.mark.parametrize(
    ("path", "off_s"),
    [(path, off_s) for path in SIGNED for off_s in (-61, 61)]
    + [("/unregister", off_s) for off_s in (-86_400, 86_400, -NOW, 10**10)],
)
def test_a_stale_clock_is_told_the_time_with_a_mac(
    fixed: WsgiClient, path: str, off_s: int
) -> None:
    assert fixed.credentials
    before = record(fixed)
    answer = fixed.call(path, SIGNED[path], ts=NOW + off_s)
    assert (answer.status, answer.errno) == (401, 109)
    assert answer.headers["timestamp"] == str(NOW)
    told = re.fullmatch(
        r'Hawk ts="(\d+)", tsm="([^"]+)", error="[^"]*"', answer.headers["www-authenticate"]
    )
    assert told
    key, text = fixed.credentials.hawk_key.hex().encode(), f"hawk.1.ts\n{NOW}\n"
    tsm = base64.b64encode(hmac.digest(key, text.encode(), "sha256")).decode()
    assert told.groups() == (str(NOW), tsm)
    assert "server-authorization" in answer.headers
    assert record(fixed) == before
    answer = fixed.call(path, SIGNED[path], ts=int(told[1]))  # what a client then does
    assert answer.status != 401


@pytest.mark.parametrize("off_s", [-60, 0, 60])
def test_a_minute_of_skew_is_allowed(fixed: WsgiClient, off_s: int) -> None:
    assert fixed.call("/sms/verify", {"msisdn": NUMBER}, ts=NOW + off_s).status == 200


def test_the_skew_is_a_setting(make_client: MakeClient) -> None:
    client = make_client(hawk_skew_s=5, clock=lambda: NOW)
    client.register()
    assert client.call("/sms/verify", {"msisdn": NUMBER}, ts=NOW - 6).errno == 109
    assert client.call("/sms/verify", {"msisdn": NUMBER}, ts=NOW - 5).status == 200


@pytest.mark.parametrize("off_s", [-60, 0, 60])
def test_a_nonce_is_remembered_as_long_as_it_could_come_again(
    fixed: WsgiClient, off_s: int
) -> None:
    """Anywhere: by the clock of another gateway it may have most of two minutes left."""
    assert fixed.call("/sms/verify", {"msisdn": NUMBER}, ts=NOW + off_s).status == 200
    (key,) = nonces(fixed)
    assert 119_000 < fixed.gateway.storage._run("PTTL", key) <= 121_000


@pytest.mark.slow
@pytest.mark.parametrize("ahead_s", [1, 4, 60, 119])
def test_gateways_whose_clocks_differ_agree_on_a_nonce(
    make_client: MakeClient, ahead_s: int
) -> None:
    """One of them takes the request in its last second; the other's clock is ``ahead_s`` behind.

    There it is fresh for as long, and so what was used must be known until then.
    """
    one = make_client(clock=lambda: NOW + ahead_s)
    one.register()
    two = make_client(clock=lambda: NOW + ahead_s - 1)  # that much later, but for a second
    two.credentials = one.credentials
    ts = NOW + ahead_s - 60
    assert one.call("/sms/verify", {"msisdn": NUMBER}, ts=ts, nonce="n").status == 200
    [key] = nonces(one)
    run = one.gateway.storage._run
    run("EXPIRE", key, run("TTL", key) - ahead_s + 1)  # as if that much time had passed
    replay = two.call("/sms/verify", {"msisdn": NUMBER}, ts=ts, nonce="n")
    assert (replay.status, replay.errno) == (401, 109)
    assert len(one.outbox()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("verified", [False, True])
def test_refused_requests_with_far_timestamps_leave_nothing(
    fixed: WsgiClient, verified: bool
) -> None:
    """Else whoever signs chooses how long we keep what they send: once it was 3,114 years."""
    if verified:
        fixed.verified()
    run = fixed.gateway.storage._run
    before, kept = run("DBSIZE"), record(fixed)
    sent = []
    for n in range(400):
        ts = (99_999_999_999, NOW + 61 + n, NOW - 61 - n, 1 + n)[n % 4]
        sent.append(hawk(fixed, "/unregister", kind="", ts=ts, nonce=f"n{n}"))
    errnos = set()
    for header in sent:
        answer = fixed.raw("POST", "/unregister", b"", {"HTTP_AUTHORIZATION": header})
        errnos.add((answer.status, answer.json["errno"]))
    assert errnos == {(401, 109)}
    assert (run("DBSIZE"), record(fixed)) == (before, kept)


@pytest.mark.parametrize("path", [path for path in SIGNED if path != "/unregister"])
def test_a_request_is_served_once(session: WsgiClient, path: str) -> None:
    assert session.ask().status == 200
    body = dumped({"code": session.code()} if path == "/sms/verify_code" else SIGNED[path])
    kind = "application/json" if body else ""
    sent = hawk(session, path, body, kind=kind)
    environ = {"HTTP_AUTHORIZATION": sent}
    assert session.raw("POST", path, body, environ).status in (200, 204, 400)
    before, sms = record(session), len(session.outbox())
    for _ in range(3):
        answer = session.raw("POST", path, body, environ)
        assert (answer.status, answer.errno) == (401, 109)
        seal = seal_of(session, path, sent, answer)
        assert f'mac="{seal}"' in answer.headers["server-authorization"]
    assert (record(session), len(session.outbox())) == (before, sms)


def test_the_nonce_of_one_session_is_free_for_another(session: WsgiClient) -> None:
    other = session.another()
    other.register()
    for one in (session, other):
        assert one.call("/sms/verify", {"msisdn": NUMBER}, nonce="same").status == 200


KEY = {"publicKey": RSA_JSON}
REFUSED: list[tuple[str, bytes, dict[str, str], int, int]] = [
    ("/certificate/sign", dumped(KEY), {}, 400, 104),
    ("/sms/verify_code", b'{"code": "wrong1"}', {}, 400, 107),
    ("/sms/verify_code", b'{"code": "000000"}', {}, 400, 105),
    ("/sms/verify", b"{", {}, 400, 106),
    ("/sms/verify", b"[" * 5000, {}, 400, 106),
    ("/sms/verify", b'{"a": 1}', {"CONTENT_LENGTH": "9"}, 400, 106),  # ends early
    ("/unregister", b"[]", {}, 400, 106),
    ("/sms/verify", b'{"msisdn": "1"}', {}, 400, 107),
    ("/sms/verify", b'{"msisdn": "+447700900124"}', {}, 400, 107),  # inside the commit
    ("/sms/verify_code", b'{"code": 1}', {}, 400, 107),
    ("/sms/resend_code", b"null", {}, 400, 106),
    ("/sms/verify_code", b"{}", {}, 400, 108),
    ("/sms/verify", b"{}", {"HTTP_TRANSFER_ENCODING": "chunked"}, 411, 112),
    ("/sms/verify", b"{}", {"CONTENT_LENGTH": "10241"}, 413, 113),
    ("/unregister", b"{}", {"CONTENT_LENGTH": "1000000"}, 413, 113),
    ("/sms/verify", b"a=b", {"CONTENT_TYPE": "text/plain"}, 415, 106),
    ("/unregister", b"a=b", {"CONTENT_TYPE": "text/plain"}, 415, 106),
]


@pytest.mark.parametrize(("path", "body", "environ", "status", "errno"), REFUSED)
def test_a_refused_request_uses_up_its_nonce_and_is_signed(
    session: WsgiClient, path: str, body: bytes, environ: dict[str, str], status: int, errno: int
) -> None:
    """Else what is refused today is replayed tomorrow, when it would be served."""
    assert session.ask().status == 200
    before, spent = record(session), len(nonces(session))
    kind = environ.get("CONTENT_TYPE", "application/json")
    sent = hawk(session, path, body, kind=kind)
    answer = session.raw("POST", path, body, {**environ, "HTTP_AUTHORIZATION": sent})
    assert (answer.status, answer.errno) == (status, errno)
    seal = answer.headers.get("server-authorization", "absent")
    assert f'mac="{seal_of(session, path, sent, answer)}"' in seal
    assert len(nonces(session)) == spent + 1
    assert errno == 105 or record(session) == before
    sane = {"CONTENT_LENGTH": str(len(body)), "CONTENT_TYPE": kind, "HTTP_AUTHORIZATION": sent}
    again = session.raw("POST", path, body, sane)
    assert (again.status, again.errno) == (401, 109)
    assert "server-authorization" in again.headers


def test_a_429_and_a_410_use_up_the_nonce(make_client: MakeClient) -> None:
    client = make_client(sends_per_session=1)
    client.register()
    assert client.call("/sms/resend_code", nonce="a").errno == 111
    assert client.call("/sms/verify_code", {"code": "123456"}, nonce="b").errno == 111
    assert client.ask().status == 200
    assert client.call("/sms/verify", {"msisdn": NUMBER}, nonce="c").errno == 114
    for nonce in "abc":
        answer = client.call("/unregister", nonce=nonce)
        assert (answer.status, answer.errno) == (401, 109)
        assert "server-authorization" in answer.headers


def test_a_503_of_the_sms_provider_uses_up_the_nonce(make_client: MakeClient) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}/"
        login = {"api_key": "k", "api_secret": "s"}
        client = make_client(sms_providers=[{"kind": "nexmo", "endpoint": endpoint, **login}])
        client.register()
        answer = client.call("/sms/verify", {"msisdn": NUMBER}, nonce="a")
    assert (answer.status, answer.errno) == (503, 201)
    assert "server-authorization" in answer.headers
    assert client.call("/unregister", nonce="a").errno == 109


@pytest.mark.parametrize("path", SIGNED)
def test_a_store_that_goes_in_the_middle_is_a_signed_503(
    session: WsgiClient, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """The record was read, so the MAC was right; then the commit failed."""

    def fail(*_: Any, **__: Any) -> NoReturn:
        raise gateway.Unavailable("gone")

    session.verified()
    assert session.ask().status == 200
    monkeypatch.setattr(gateway, "SETTLE_S", 0.0)  # what is owed is not our matter here
    monkeypatch.setattr(session.gateway.storage, "commit", fail)
    body = {"code": session.code()} if path == "/sms/verify_code" else SIGNED[path]
    answer = session.call(path, body)
    assert (answer.status, answer.errno) == (503, 201)
    assert "server-authorization" in answer.headers
    # Of who may be gone already, and then does not ask again, nothing is left.
    assert len(session.outbox()) == (0 if path == "/unregister" else 2)


def test_a_stale_request_keeps_no_nonce_and_one_with_a_wrong_hash_does(fixed: WsgiClient) -> None:
    """Its time alone keeps the stale one from coming again."""
    for off_s in (-100, 100):
        sent = hawk(fixed, "/unregister", kind="", ts=NOW + off_s)
        environ = {"HTTP_AUTHORIZATION": sent}
        for _ in range(2):
            answer = fixed.raw("POST", "/unregister", b"", environ)
            assert answer.errno == 109
            assert "tsm" in answer.headers["www-authenticate"]
    assert nonces(fixed) == []
    sent = hawk(fixed, "/unregister", b"other", kind="")
    environ = {"HTTP_AUTHORIZATION": sent}
    for _ in range(2):
        assert fixed.raw("POST", "/unregister", b"", environ).errno == 109
    assert len(nonces(fixed)) == 1
    assert fixed.call("/unregister").status == 204


@pytest.mark.parametrize("path", ["/discover", "/register", "/"])
def test_open_endpoints_ignore_an_authorization_header(client: WsgiClient, path: str) -> None:
    method = "GET" if path == "/" else "POST"
    environ = {"HTTP_AUTHORIZATION": "Hawk garbage"}
    answer = client.raw(method, path, b'{"mcc":"234"}' if method == "POST" else b"", environ)
    assert answer.status == 200
    assert "server-authorization" not in answer.headers


# -- Hawk: the host and port that are signed ----------------------------------


@pytest.mark.parametrize(
    ("public_url", "header", "host", "port", "status"),
    [
        ("", "127.0.0.1:5000", "127.0.0.1", 5000, 200),
        ("", "other.example:8080", "other.example", 8080, 200),
        ("", "Other.Example:8080", "other.example", 8080, 200),
        ("", "other.example", "other.example", 80, 200),
        ("", "other.example", "other.example", 443, 401),
        ("", "other.example", "127.0.0.1", 5000, 401),  # base_url used although not set
        ("http://localhost:8080", "evil.example", "localhost", 8080, 200),
        ("http://localhost:8080", "localhost:8080", "localhost", 8080, 200),
        ("http://localhost:8080", "127.0.0.1:5000", "127.0.0.1", 5000, 401),  # Host believed
        ("http://localhost:8080", "evil.example", "evil.example", 80, 401),
        ("https://localhost", "x", "localhost", 443, 200),
        ("https://localhost", "x", "localhost", 80, 401),
        ("http://localhost", "x", "localhost", 80, 200),
        ("http://localhost", "x", "localhost", 5000, 401),
    ],
)
def test_hawk_signs_public_url_or_else_the_host_header(
    make_client: MakeClient, public_url: str, header: str, host: str, port: int, status: int
) -> None:
    client = make_client(public_url=public_url)
    client.register()
    body = dumped({"msisdn": NUMBER})
    sent = hawk(client, "/sms/verify", body, host=host, port=port)
    environ = {"HTTP_AUTHORIZATION": sent, "HTTP_HOST": header}
    answer = client.raw("POST", "/sms/verify", body, environ)
    assert answer.status == status


def test_https_of_the_server_itself_means_port_443(session: WsgiClient) -> None:
    sent = hawk(session, "/unregister", kind="", host="id.example", port=443)
    environ = {"HTTP_AUTHORIZATION": sent, "HTTP_HOST": "id.example", "wsgi.url_scheme": "https"}
    assert session.raw("POST", "/unregister", b"", environ).status == 204


# -- What conformance.py found ---------------------------------------------------


@pytest.mark.parametrize("text", ['{"mcc": "234", "mcc": "234"}', '{"msisdn": {"a": 1, "a": 2}}'])
def test_a_name_twice_is_no_json(client: WsgiClient, text: str) -> None:
    """Of two readers one takes the first value and one the last."""
    answer = client.raw("POST", "/discover", text.encode())
    assert (answer.status, answer.errno) == (400, 106)


@pytest.mark.parametrize(
    ("spelled", "method", "path", "status"),
    [
        ("/sms/resend%5Fcode", "POST", "/sms/resend_code", 410),
        ("/v1/msisdn/sms/resend%5fcode", "POST", "/v1/msisdn/sms/resend_code", 410),
        ("/session?", "GET", "/session", 200),
        ("/sms/resend%5fcode?", "POST", "/sms/resend_code", 410),
        ("/sms/resend%5Fcode?a=%2F", "POST", "/sms/resend_code?a=%2F", 410),
        ("/session", "GET", "/session?a", 401),
        ("/session?a", "GET", "/session", 401),
        ("/sms/verify", "POST", "/sms/resend_code", 401),
    ],
)
def test_a_path_is_signed_in_any_spelling_that_leads_here(
    session: WsgiClient, spelled: str, method: str, path: str, status: int
) -> None:
    """WSGI shows neither which characters were escaped nor a ? without a query."""
    assert session.credentials
    target = gateway.hawk_target(method, f"http://{session.host}/")._replace(path=spelled)
    sent = gateway.build_authorization(session.credentials, target, int(time.time()), "n")
    answer = session.raw(method, path, environ={"HTTP_AUTHORIZATION": sent})
    assert answer.status == status
    if status != 401:
        seal, key = answer.headers["server-authorization"], session.credentials.hawk_key
        assert lab.check_answer(key, sent, seal, target, "application/json", answer.data)
