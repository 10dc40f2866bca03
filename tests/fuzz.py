"""Hostile inputs for every parser, made from right ones, and many lives of sessions.

    python tests/fuzz.py --minutes 60 --seed 7 --shrink   (make fuzz ARGS="--minutes 60 --seed 7")

A parser may raise the errors that it documents and no other, whatever it is given; asked over the
WSGI application, the same input may be answered by no 5xx but 503/201. What ever failed stands in
``corpus/parsers.json`` and is tried first. ``test_life.py`` has the state machine.

Hypothesis makes the lives. It does not make these inputs: it takes a millisecond for each, and a
parser 20 µs. They come from a seeded random source, so that a run can be repeated.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import functools
import hashlib
import hmac
import io
import json
import logging
import os
import random
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import quote_from_bytes, urlencode

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks"), str(ROOT / "tests")]

import jwt  # noqa: E402
import lab  # noqa: E402
import test_life  # noqa: E402
from cryptography.hazmat.primitives.asymmetric import ec  # noqa: E402
from cryptography.hazmat.primitives.serialization import load_pem_private_key  # noqa: E402
from hypothesis import seed as hypothesis_seed  # noqa: E402
from support import Answer, WsgiClient, undocumented  # noqa: E402

import gateway  # noqa: E402

CORPUS: Final = ROOT / "tests" / "corpus" / "parsers.json"
NUMBER: Final = "+447700900123"
NOW_S: Final = 1_800_000_000
ORIGIN: Final = "https://shop.example"
KINDS: Final = list(gateway.SMS_LISTS["sms_inbound"])
ERRNOS: Final = {104, 105, 107, 108, 109, 110, 111, 114, 115, 116, 117, 201}
"""What the lives meet: all that a session can."""
HTTP_EACH: Final = 8
"""One input of so many is also sent over the application, which takes forty times as long."""

# -- Mutations ----------------------------------------------------------------------------------

ODD_TEXTS: Final = [
    "", " ", "0", "-1", "1e999", "NaN", "Infinity", "null", "true", "[]", "{}", '"', "\\", "'", ",",
    ";", "=", "&", "%", "%00", "%ff", "%ed%a0%80", "+", "~", ".", "..", "/", "//", "?", "#", ":",
    "@", "\0", "\x07", "\t", "\r\n", "\n", "\x7f", "\x80", "\xa0", "\xad", "\xff", "é", "İ", "ß",
    "ﬁ", "²", "٣", "１", "𝟘", "＋", "−", "\u202e", "\u200b", "\ufe0f", "\ufeff", "\ud800",
    "\udc80", "\udfff", "\U0010ffff", "e\u0301" * 30, "9" * 20, "9" * 400, "9" * 5000, "0" * 400,
    "0" * 5000, "a" * 300, "a" * 9000, "[" * 3000, '{"a":' * 3000, "~" * 500, "." * 500,
    ",".join("a" * 900),
    "::1%eth0", "[::1]:99999", "1.2.3.4:5", "::ffff:1.2.3.4", "fe80::1%25", "01.02.03.04",
    ";q=0.5", ";q=1.", ";q=nan", "de_DE.UTF-8", "zh-Hant-TW-x-private", "*", "Hawk ", 'id="',
    "tel:", "+44 7700 900123", "+5215555550123", "+8881234567890", "00", "http://[", "https://a:b",
    "http://[::1", "https://x.example:99999999", "https://\u2100.example", "2026-02-30T25:00:00Z",
    "RS", "DS", "kty", "EC", "OKP", "P-256", "Ed25519", "alg", "none", "ES256", "AQAB", "AAAA",
]  # fmt: skip
ODD_VALUES: Final[list[Any]] = [
    None, True, False, 0, -1, 1, 2, 255, 65537, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400, 0.5,
    -0.0, 1e308, float("inf"), float("nan"), "", [], {}, [[]], [None], {"": ""}, {"a": {"a": []}},
    *ODD_TEXTS[:40],
]  # fmt: skip


def mutated_text(rng: random.Random, text: str) -> str:
    """A text with a few changes: pieces cut, doubled, moved, replaced by odd ones."""
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        at, end = sorted((rng.randint(0, len(text)), rng.randint(0, len(text))))
        if rng.random() < 0.6:
            end = min(end, at + rng.randint(0, 3))
        what, piece = rng.randrange(8), text[at:end]
        if what == 0:
            text = text[:at] + text[end:]
        elif what == 1:
            text = text[:at] + piece * rng.choice((2, 2, 2, 3, 200)) + text[end:]
        elif what in (2, 3):
            text = text[:at] + rng.choice(ODD_TEXTS) + text[end:]
        elif what == 4:
            text = (
                text[:at]
                + chr(rng.choice((rng.randrange(128), rng.randrange(0x3000))))
                + text[end:]
            )
        elif what == 5:
            text = text[:at] + piece.swapcase() + text[end:]
        elif what == 6:
            to = rng.randint(0, len(text))
            text = text[:to] + piece + text[to:]
        else:
            text = (
                text[:at] + "".join(chr(ord(c) ^ 1 << rng.randrange(8)) for c in piece) + text[end:]
            )
        text = text[:20_000]
    return text


def mutated(rng: random.Random, value: Any) -> Any:
    """A value of JSON's types with a change somewhere: type, name, number of fields, text."""
    if rng.random() < 0.06:
        return rng.choice(ODD_VALUES)
    if isinstance(value, dict) and value:
        name, changed = rng.choice(list(value)), dict(value)
        what = rng.randrange(10)
        if what == 0:
            del changed[name]
        elif what == 1:
            changed[mutated_text(rng, name)] = changed.pop(name)
        elif what == 2:
            changed[rng.choice((name.upper(), name + " ", rng.choice(ODD_TEXTS)))] = value[name]
        elif what == 3:
            changed[name] = rng.choice(ODD_VALUES)
        elif what == 4:
            changed[name] = value[rng.choice(list(value))]
        else:
            changed[name] = mutated(rng, value[name])
        return changed
    if isinstance(value, list) and value:
        at = rng.randrange(len(value))
        new = rng.choice(([], value[at : at + 1] * 2, [mutated(rng, value[at])] * 1))
        return [*value[:at], *new, *value[at + 1 :]]
    if isinstance(value, str):
        return mutated_text(rng, value)
    if type(value) is int and rng.random() < 0.7:
        return rng.choice((value + 1, -value, value * 10**20, str(value), float(value % 2**60)))
    return rng.choice(ODD_VALUES)


def octets(text: Any) -> bytes:
    """The bytes that a text stands for: those below 256 are themselves."""
    return b"".join(
        bytes((ord(c),)) if ord(c) < 256 else c.encode("utf-8", "surrogatepass") for c in str(text)
    )


def header(text: Any) -> str:
    """A text as WSGI gives the value of a header; a server lets neither CR, LF nor NUL through."""
    return octets(text).translate(None, b"\r\n\0").decode("latin-1").strip()


def body_of(value: Any) -> str:
    """JSON of a value, at times with a fault that no value has; the same one for the same value."""
    rng = random.Random(repr(value))
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    if rng.random() < 0.2 and isinstance(value, dict) and value:
        name = rng.choice(list(value))
        text = text[:-1] + f", {json.dumps(name)}: {json.dumps(rng.choice(ODD_VALUES))}}}"
    return mutated_text(rng, text) if rng.random() < 0.2 else text


# -- The application ----------------------------------------------------------------------------


class Site:
    """An application that takes what it is given, and a session that is verified."""

    def __init__(self, store_url: str, folder: str) -> None:
        for path in lab.TEST_KEYS.glob("*.*"):
            gateway.write_private_file(Path(folder, path.name), path.read_bytes())
        self.settings = gateway.Settings(
            keys_dir=folder, data_dir=folder, limits="off", trusted_proxies=["127.0.0.0/8"],
            sms_inbound=[inbound_entry(kind) for kind in KINDS],
        )  # fmt: skip
        signed = [{"kind": kind} | SECRETS for kind in ("nexmo", "twilio", "smsgate")]
        self.clock = lambda: float(NOW_S)
        self.app = gateway.create_app(self.settings, store_url, self.clock)
        closed = replaced(self.settings, sms_inbound=signed)
        self.closed = gateway.create_app(closed, store_url, self.clock)
        self.desk = test_life.Desk(
            {"kind": "nexmo", "api_key": "k", "api_secret": "s"}, self.settings, paid=False
        )
        for app in (self.app, self.closed):
            app.gateway.sms.providers[:] = [self.desk]
        self.client, self.phone = WsgiClient(self.app), WsgiClient(self.app)
        self.renew()

    def renew(self) -> None:
        """A new session, verified, and one that a phone may ask for."""
        storage = self.app.gateway.storage
        ended = self.app.gateway.secrets.key_for("ended", gateway.Msisdn(NUMBER))
        storage.commit(ended, storage.get(ended) or b"", b"")  # in this second, which never ends
        self.phone.register()
        self.client.register()
        assert self.client.ask(NUMBER).status == 200
        code = self.desk.sent.pop()[1].split()[-1]
        assert self.client.call("/sms/verify_code", {"code": code}).status == 200
        self.desk.sent.clear()

    def ask(
        self, method: str, target: str, body: bytes = b"", environ: dict[str, str] | None = None,
        signed: bool = False, closed: bool = False,
    ) -> None:  # fmt: skip
        """One request, and what must be true of every answer."""
        path, _, query = target.partition("?")
        env: dict[str, Any] = {
            "REQUEST_METHOD": method, "SCRIPT_NAME": "", "PATH_INFO": path, "QUERY_STRING": query,
            "SERVER_NAME": "127.0.0.1", "SERVER_PORT": "5000", "SERVER_PROTOCOL": "HTTP/1.1",
            "REMOTE_ADDR": "127.0.0.1", "HTTP_HOST": "127.0.0.1:5000", "wsgi.url_scheme": "http",
            "wsgi.input": io.BytesIO(body), "wsgi.errors": sys.stderr, "wsgi.version": (1, 0),
            "wsgi.multithread": True, "wsgi.multiprocess": False, "wsgi.run_once": False,
        }  # fmt: skip
        if body:
            env |= {"CONTENT_LENGTH": str(len(body)), "CONTENT_TYPE": "application/json"}
        env |= environ or {}
        if signed:
            assert self.client.credentials
            request = gateway.hawk_target(method, "http://127.0.0.1:5000" + target)
            kind = env.get("CONTENT_TYPE", "")
            nonce = base64.b64encode(os.urandom(9)).decode()
            env["HTTP_AUTHORIZATION"] = gateway.build_authorization(
                self.client.credentials, request, NOW_S, nonce, kind, body
            )
        seen: list[Any] = []

        def start(status: str, headers: list[Any], exc_info: Any = None) -> None:
            seen[:] = [int(status.split()[0]), headers]

        data = b"".join((self.closed if closed else self.app)(env, start))
        check_answer(method, path, seen[0], seen[1], data)
        if (signed and seen[0] == 401) or path.endswith("unregister"):
            self.renew()


def check_answer(method: str, path: str, status: int, headers: list[Any], data: bytes) -> None:
    """What is true of every answer, whatever was asked."""
    for name, value in headers:
        assert not {"\r", "\n", "\0"} & set(name + value), f"header {name} is split"
        (name + value).encode("latin-1")
    found = {name.lower(): value for name, value in headers}
    assert found["timestamp"] == str(NOW_S)
    assert method == "HEAD" or int(found.get("content-length", len(data))) == len(data)
    if found.get("content-type") == "application/json" and data:
        errno = json.loads(data).get("errno") if status >= 400 else None
        assert errno != 999, data
        assert status < 500 or (status, errno) == (503, 201), data
    assert status < 500 or status == 503
    assert undocumented(method, path, Answer(status, found, data)) == ""


def replaced(settings: gateway.Settings, **values: Any) -> gateway.Settings:
    """Settings with other values."""
    names = gateway.Settings.__struct_fields__
    return gateway.Settings(**{name: getattr(settings, name) for name in names} | values)


# -- Parsers ------------------------------------------------------------------------------------


class Parser(NamedTuple):
    """A parser, right inputs of it, and how it is asked: directly, and over the application.

    Attributes:
        right: Inputs of JSON's types; each must pass.
        raises: What it documents.
        typed: Whether it is given nothing but texts, or nothing but objects, as the right ones are.
    """

    name: str
    right: list[Any]
    direct: Callable[[Any], object]
    http: Callable[[Site, Any], None] | None = None
    raises: type[Exception] = gateway.GatewayError
    typed: bool = True

    def hostile(self, rng: random.Random) -> Any:
        """An input made from a right one."""
        value = right = rng.choice(self.right)
        while True:
            value = mutated(rng, value)
            if self.typed and type(value) is not type(right):
                value = right
            elif rng.random() < 0.7:
                return value


SECRETS: Final = {"signature_secret": "signature"}
CREDENTIALS: Final = gateway.derive_credentials(gateway.SessionToken(bytes(range(32))))
TARGET: Final = gateway.hawk_target("POST", "http://127.0.0.1:5000/session")
SENT: Final = gateway.build_authorization(CREDENTIALS, TARGET, NOW_S, "n0nce", "", b"", "ext")
SEAL: Final = gateway.server_authorization(
    CREDENTIALS.hawk_key, gateway.parse_hawk_header(SENT), TARGET, "application/json", b"{}"
)
CLIENT_KEY: Final[Any] = test_life.CLIENT_KEY
RS_KEY: Final = gateway.public_key_json(CLIENT_KEY.public_key())
ISSUER: Final = "http://127.0.0.1:5000"


def inbound_entry(kind: str) -> dict[str, Any]:
    """The entry of a webhook."""
    fields: dict[str, Any] = {
        "fields": {"from": "payload.from", "text": "messages.0.body", "id": "a.b"}
    }
    more: dict[str, dict[str, Any]] = {"http": fields, "smsgate": {"country": "GB"}}
    return {"kind": kind} | more.get(kind, {})


@functools.cache
def tokens() -> dict[str, Any]:
    """Real proofs, and the keys that verify them."""
    with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
        for path in lab.TEST_KEYS.glob("*.*"):
            gateway.write_private_file(Path(folder, path.name), path.read_bytes())
        keys, _ = gateway.load_keys(gateway.Settings(keys_dir=folder, data_dir=folder))
    signer = keys.signer(NOW_S)
    whole = jwt.algorithms.RSAAlgorithm.to_jwk(CLIENT_KEY.public_key(), as_dict=True)
    jwk = {name: whole[name] for name in ("kty", "n", "e")}
    number = gateway.Msisdn(NUMBER)
    claims = gateway.phone_claims(ISSUER, number, "sms/mt", NOW_S, NOW_S, 3600)
    sd_jwt = gateway.issue_proof(signer, claims | {"cnf": {"jwk": jwk}})
    now_ms = NOW_S * 1000
    certificate = gateway.sign_token(
        {"public-key": RS_KEY, "iss": "127.0.0.1:5000", "iat": now_ms, "exp": now_ms + 1000},
        keys.browserid,
    )
    binding = {"aud": ORIGIN, "nonce": "n", "iat": NOW_S}
    binding["sd_hash"] = encoded(hashlib.sha256(sd_jwt.encode()).digest())
    note = jwt.encode(binding, CLIENT_KEY, "PS256", {"typ": "kb+jwt"})
    return {
        "key": keys.browserid.public_key(), "jwks": {"keys": [signer.jwk]}, "jwk": jwk,
        "certificate": certificate, "sd-jwt": sd_jwt, "presentation": sd_jwt + note,
        "jwt": gateway.issue_proof(signer, claims | {"aud": ORIGIN}),
        "backed": f"{certificate}~{gateway.make_assertion(CLIENT_KEY, ORIGIN, now_ms + 1000)}",
    }  # fmt: skip


def encoded(data: bytes) -> str:
    """base64url without padding."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def resigned(rng: random.Random, token: str) -> str:
    """A token whose header or claims are odd, but whose signature is right."""
    head, _, rest = token.partition(".")
    pieces = (head, rest.partition(".")[0])
    parts = [json.loads(jwt.utils.base64url_decode(piece)) for piece in pieces]
    at = rng.randrange(2)
    parts[at] = mutated(rng, parts[at])
    signed = ".".join(encoded(body_of(part).encode("utf-8", "replace")) for part in parts)
    key = load_pem_private_key((lab.TEST_KEYS / "proof-0.pem").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    signature = jwt.algorithms.ECAlgorithm(jwt.algorithms.ECAlgorithm.SHA256).sign(
        signed.encode(), key
    )
    return f"{signed}.{encoded(signature)}"


def parsers() -> Iterator[Parser]:
    """All parsers."""
    yield from hawk_parsers()
    yield from proof_parsers()
    yield from key_parsers()
    yield from webhook_parsers()
    yield from header_parsers()
    yield from typed_parsers()
    yield from settings_parsers()


# -- Hawk


def hawk_parsers() -> Iterator[Parser]:
    """Headers, of requests and of answers, and those whose MAC is right."""

    def over_http(site: Site, text: Any) -> None:
        site.ask("GET", "/session", environ={"HTTP_AUTHORIZATION": header(text)})

    def answer(text: Any) -> None:
        key, target = CREDENTIALS.hawk_key, TARGET
        assert not lab.check_answer(key, SENT, str(text), target, "application/json", b"[]")
        with contextlib.suppress(gateway.GatewayError):  # what came back for a request
            lab.check_answer(key, str(text), SEAL, target, "application/json", b"{}")

    def signed(fields: Any) -> gateway.HawkHeader:
        """A header with odd fields, as a client with a right key would send it."""
        texts = {name: str(fields.get(name, "")) for name in ("ts", "nonce", "ext", "app", "dlg")}
        return gateway.HawkHeader("", **texts, hash=str(fields.get("hash", "")))

    def direct(fields: Any) -> None:
        with contextlib.suppress(UnicodeEncodeError):  # our own side would have to write it
            mac = gateway.hawk_mac("header", CREDENTIALS.hawk_key, signed(fields), TARGET)
            named = signed(fields)._replace(id=CREDENTIALS.hawk_id, mac=mac)._asdict()
            gateway.parse_hawk_header("Hawk " + ", ".join(f'{n}="{v}"' for n, v in named.items()))

    def signed_over_http(site: Site, fields: Any) -> None:
        credentials = site.client.credentials
        assert credentials
        named = signed({n: header(v) for n, v in fields.items()})._replace(id=credentials.hawk_id)
        target = gateway.hawk_target("GET", "http://127.0.0.1:5000/session")
        mac = gateway.hawk_mac("header", credentials.hawk_key, named, target)
        every = named._replace(mac=mac)._asdict().items()
        text = "Hawk " + ", ".join(f'{name}="{value}"' for name, value in every if value)
        site.ask("GET", "/session", environ={"HTTP_AUTHORIZATION": header(text)})

    right = [SENT, SENT + ', app="a", dlg="d"', SEAL]
    yield Parser("hawk header", right, gateway.parse_hawk_header, over_http)
    yield Parser("hawk answer", [SEAL, SENT], answer)
    fields = {"ts": str(NOW_S), "nonce": "n", "ext": "e", "app": "a", "dlg": "d", "hash": ""}
    yield Parser("hawk fields", [fields], direct, signed_over_http)


# -- Proofs and keys


def proof_parsers() -> Iterator[Parser]:
    """Tokens: damaged, and rightly signed with odd content. The server itself reads none."""
    made = tokens()
    jwks, key, now_ms = made["jwks"], made["key"], NOW_S * 1000

    def verify(token: Any) -> object:
        return gateway.verify_token(str(token), key, now_ms)

    def backed(token: Any) -> object:
        return gateway.verify_backed_assertion(str(token), ORIGIN, "127.0.0.1:5000", key, now_ms)

    def proof(given: Any) -> object:
        token, jwks = str(given.get("token")), given.get("jwks")
        return gateway.verify_proof(token, jwks, ISSUER, NOW_S, ORIGIN)

    def presented(token: Any) -> object:
        return gateway.verify_presentation(str(token), jwks, ISSUER, ORIGIN, "n", NOW_S)

    def odd(seed: Any) -> object:
        token = made["jwt"] if seed == "seed" else resigned(random.Random(repr(seed)), made["jwt"])
        return gateway.verify_proof(token, jwks, ISSUER, NOW_S, ORIGIN)

    invalid = gateway.InvalidToken
    yield Parser("certificate", [made["certificate"]], verify, raises=invalid)
    yield Parser("backed assertion", [made["backed"]], backed, raises=invalid)
    yield Parser("proof", [{"token": made["jwt"], "jwks": jwks}], proof, raises=invalid)
    yield Parser("presentation", [made["presentation"]], presented, raises=invalid)
    yield Parser("signed proof", ["seed"], odd, raises=invalid)


def key_parsers() -> Iterator[Parser]:
    """Keys in both forms, and as text."""
    limbs = {"arr": [int(RS_KEY["n"]) >> 28 * n & 0xFFFFFFF for n in range(74)], "t": 74, "s": 0}
    right = [
        RS_KEY, test_life.JWK, tokens()["jwk"], json.dumps(RS_KEY), json.dumps(test_life.JWK),
        {"algorithm": "RS", "keysize": 256, "n": limbs, "e": "65537"},
        {"kty": "OKP", "crv": "Ed25519", "x": encoded(bytes(range(32)))},
    ]  # fmt: skip

    def over_http(site: Site, value: Any) -> None:
        body = json.dumps({"publicKey": value, "duration": 60}).encode()
        site.ask("POST", "/certificate/sign", body, signed=True)

    yield Parser(
        "key", right, lambda value: gateway.client_key(value, False), over_http, typed=False
    )
    yield Parser("key, checked", right, gateway.client_key, typed=False)


# -- Webhooks


HAWK_ID: Final = "ab" * 32
SHAPES: Final[dict[str, dict[str, Any]]] = {
    "nexmo": {"msisdn": NUMBER[1:], "text": HAWK_ID, "messageId": "0A", "network-code": "23410",
              "concat": "true", "concat-ref": "8", "concat-part": "1", "concat-total": "2",
              "timestamp": str(NOW_S), "sig": "ab", "status": "delivered"},
    "twilio": {"From": NUMBER, "Body": HAWK_ID, "MessageSid": "SM1", "MessageStatus": "sent"},
    "kannel": {"from": NUMBER, "text": HAWK_ID, "id": "1", "coding": "2", "udh": "\0\3\1\2\1",
               "smsc": "x", "status": "8"},
    "beepsend": {"from": NUMBER, "message": HAWK_ID, "id": 7,
                 "mccmnc": {"mcc": "234", "mnc": "10"}},
    "smsgate": {"event": "sms:received", "id": "x",
                "payload": {"messageId": "m", "message": HAWK_ID, "phoneNumber": "07700900123"}},
    "http": {"payload": {"from": NUMBER}, "messages": [{"body": HAWK_ID}], "a": {"b": "1"}},
}  # fmt: skip
"""What each kind of provider sends."""
FORM: Final = "application/x-www-form-urlencoded"


def read_webhook(kind: str, params: Any) -> None:
    """Read a message and a receipt."""
    if isinstance(params, dict):
        gateway.parse_inbound(params, "", inbound_entry(kind))
        gateway.parse_receipt(params, inbound_entry(kind))


def send_webhook(kind: str, site: Site, params: Any) -> None:
    """As JSON, as a form and as a query."""
    path = ("/sms/momt/", "/sms/receipt/")[len(repr(params)) % 2] + f"?provider={kind}"
    assert site.phone.credentials
    hawk_id = site.phone.credentials.hawk_id  # of a session that is there
    site.ask("POST", path, json.dumps(params).replace(HAWK_ID, hawk_id).encode())
    if isinstance(params, dict):
        texts = {octets(name): octets(value) for name, value in params.items()}
        form = urlencode(texts).replace(HAWK_ID, hawk_id)
        site.ask("GET", f"{path}&{form}")
        site.ask("POST", path, form.encode(), {"CONTENT_TYPE": FORM})


def signed_call(kind: str, params: dict[str, Any]) -> gateway.WebhookCall:
    """A call that a provider has signed, however odd its parameters are."""
    key, url, stamp = b"signature", "https://a.example/x", str(params.get("timestamp", NOW_S))
    body = json.dumps(params).encode()
    call = gateway.WebhookCall(params, params, url, body, stamp, "")
    if kind == "nexmo":
        rest = sorted((name, value) for name, value in params.items() if name != "sig")
        text = "".join(f"&{n}={re.sub('[&=]', '_', str(v))}" for n, v in rest)
        digest = hmac.digest(key, text.encode("utf-8", "replace"), "sha256")
        return call._replace(params=params | {"sig": digest.hex()})
    if kind == "twilio":
        text = url + "".join(f"{name}{value}" for name, value in sorted(params.items()))
        digest = hmac.digest(key, text.encode("utf-8", "replace"), "sha1")
        return call._replace(signature=base64.b64encode(digest).decode())
    digest = hmac.digest(key, body + stamp.encode("utf-8", "replace"), "sha256")
    return call._replace(signature=digest.hex())


def judge_webhook(kind: str, params: Any) -> None:
    """Judge a call by its signature: a right one, and what stands in the parameters."""
    call = signed_call(kind, params)
    for one in (call, call._replace(params=params, signature=str(params.get("sig", "")))):
        gateway.check_inbound({"kind": kind} | SECRETS, "", one, NOW_S)


def send_signed(kind: str, site: Site, params: Any) -> None:
    """The same over the application, where the signature stands in a header."""
    names = {"HTTP_X_SIGNATURE": "sig", "HTTP_X_TIMESTAMP": "timestamp"}
    headers = {name: header(params.get(field, "")) for name, field in names.items()}
    headers["HTTP_X_TWILIO_SIGNATURE"] = headers["HTTP_X_SIGNATURE"]
    path, body = f"/sms/momt/?provider={kind}", json.dumps(params).encode()
    site.ask("POST", path, body, headers, closed=True)


def webhook_parsers() -> Iterator[Parser]:
    """What each kind of provider sends, in a query, a form or JSON."""
    for kind in KINDS:
        flat = {n: v for n, v in SHAPES[kind].items() if isinstance(v, str)}
        read, send = functools.partial(read_webhook, kind), functools.partial(send_webhook, kind)
        yield Parser(f"webhook {kind}", [SHAPES[kind], flat], read, send, typed=False)
        if kind in gateway.SIGNATURES:
            judge = functools.partial(judge_webhook, kind)
            send = functools.partial(send_signed, kind)
            yield Parser(f"webhook {kind}, signed", [flat], judge, send, gateway.Forbidden)

    def fields(given: Any) -> object:
        return gateway.webhook_fields(octets(given.get("body", "")), header(given.get("type", "")))

    def send_body(site: Site, given: Any) -> None:
        body, kind = octets(given.get("body", "")), header(given.get("type", ""))
        site.ask("POST", "/sms/momt/?provider=http", body, {"CONTENT_TYPE": kind})

    bodies = [json.dumps(SHAPES["smsgate"]), urlencode(SHAPES["twilio"]), "[1, {}]", "a=1&b=%ff"]
    types = ["application/json", f"{FORM}; charset=utf-8", "text/plain"]
    right = [{"body": body, "type": type_} for body in bodies for type_ in types]
    yield Parser("webhook body", right, fields, send_body)


# -- Headers


def header_parsers() -> Iterator[Parser]:
    """Accept-Language, X-Forwarded-For, Host, Origin, Content-Length, and paths."""
    catalogues = gateway.load_catalogues()
    settings = gateway.Settings(trusted_proxies=["10.0.0.0/8", "2001:db8::/32"])

    def sends(name: str, path: str = "/register") -> Callable[[Site, Any], None]:
        def send(site: Site, text: Any) -> None:
            site.ask("POST", path, environ={name: header(text)})

        return send

    def ask(site: Site, text: Any) -> None:
        body = json.dumps({"msisdn": NUMBER, "shortVerificationCode": True}).encode()
        language = {"HTTP_ACCEPT_LANGUAGE": header(text)}
        site.ask("POST", "/sms/verify", body, language, signed=True)
        site.desk.sent.clear()

    languages = ["de-DE,de;q=0.9,en;q=0.8", "zh-Hant-TW, zh;q=0,7, *;q=0.1", "sr_RS.UTF-8@latin"]
    yield Parser("accept-language", languages, lambda text: gateway.negotiate_language(
        header(text)[: gateway.ACCEPT_LANGUAGE_MAX_CHARS], catalogues), ask)  # fmt: skip
    hops = ["1.2.3.4, 10.0.0.1", "[2001:db8::1]:443, 10.1.1.1:80", "fe80::1%eth0,::ffff:10.0.0.1"]
    yield Parser(
        "x-forwarded-for", hops,
        lambda text: gateway.client_address("10.0.0.7", header(text), settings),
        sends("HTTP_X_FORWARDED_FOR"),
    )  # fmt: skip
    yield Parser(
        "peer", ["1.2.3.4", "::1", ""],
        lambda text: gateway.client_address(str(text), "", settings),
        sends("REMOTE_ADDR"),
    )  # fmt: skip
    hosts = ["127.0.0.1:5000", "[::1]:80", "x.example"]
    yield Parser(
        "host", hosts, lambda text: gateway.split_host(header(text)[:260], "http"),
        sends("HTTP_HOST", "/session"),
    )  # fmt: skip
    origins = ["https://shop.example", "http://[::1]:80/", "https://xn--bcher-kva.example:443"]
    yield Parser(
        "origin", origins,
        lambda text: (gateway.origin_of(str(text)), settings.line_host(header(text))),
        sends("HTTP_ORIGIN"),
    )  # fmt: skip

    def length(text: Any) -> object:
        stream = io.BytesIO(b"{}")
        environ = {"CONTENT_LENGTH": header(text), "wsgi.input": stream}
        return gateway.read_body(environ, 10_240)

    yield Parser("content-length", ["2", "0", ""], length, sends("CONTENT_LENGTH"))
    yield Parser("request id", ["abc-1"], lambda text: None, sends("HTTP_X_REQUEST_ID"))
    yield Parser("bearer", ["Bearer abc"], lambda text: None, lambda site, text: site.ask(
        "GET", "/metrics", environ={"HTTP_AUTHORIZATION": header(text)}))  # fmt: skip

    def path(site: Site, text: Any) -> None:
        path, _, query = octets(text).decode("latin-1").partition("?")
        target = "/" + path.lstrip("/") + "?" + quote_from_bytes(query.encode(), "=&%+;")
        for method in ("GET", "POST", "OPTIONS", "HEAD"):
            site.ask(method, target)

    paths = [
        "/v1/msisdn/sms/verify",
        "/outbox?to=447700900123&token=x",
        "/sms/momt/p4th?provider=nexmo",
    ]
    yield Parser("path", paths, lambda text: gateway.versioned(str(text)), path)


# -- What people type


def typed_parsers() -> Iterator[Parser]:
    """Numbers, codes, networks, and the bodies of requests."""

    def number(text: Any) -> None:
        msisdn = gateway.parse_msisdn(text)
        gateway.check_reachable(msisdn)
        assert gateway.parse_msisdn(msisdn) == msisdn

    def discover(site: Site, text: Any) -> None:
        site.ask("POST", "/discover", json.dumps({"msisdn": text, "mcc": text}).encode())

    def code(site: Site, text: Any) -> None:
        site.ask("POST", "/sms/verify_code", json.dumps({"code": text}).encode(), signed=True)

    numbers = [NUMBER, "tel:+44 (7700) 900-123", "＋５２ 1 55 5555 0123", "+54 9 11 1234 5678"]
    yield Parser("number", numbers, number, discover, typed=False)
    yield Parser("code", ["１４６–١٩٣ ", "ab" * 16, "146193"], gateway.fold, code, typed=False)
    networks = [{"mcc": "234", "mnc": "10"}, {"mcc": 234, "mnc": None}]
    yield Parser("network", networks, lambda g: gateway.parse_network(g.get("mcc"), g.get("mnc")))

    bodies: dict[str, tuple[type[Any], dict[str, Any]]] = {
        "/discover": (gateway.NetworkBody, {"mcc": "214", "mnc": "07", "roaming": False}),
        "/register": (gateway.RegisterBody, {"msisdn": NUMBER, "mcc": "234", "mnc": "10"}),
        "/sms/verify": (gateway.SendBody, {"msisdn": NUMBER, "shortVerificationCode": True}),
        "/sms/mt/verify": (gateway.SendBody, {"msisdn": NUMBER, "mcc": "234"}),
        "/sms/resend_code": (gateway.ResendBody, {"shortVerificationCode": False}),
        "/sms/verify_code": (
            gateway.CodeBody, {"code": "123456", "publicKey": RS_KEY, "duration": 5}
        ),
        "/certificate/sign": (
            gateway.JwtBody,
            {"format": "jwt", "audience": ORIGIN, "nonce": "n", "publicKey": test_life.JWK,
             "duration": "60"},
        ),
        "/unregister": (gateway.UnregisterBody, {"everywhere": True}),
    }  # fmt: skip
    right_ones = [body for _, body in bodies.values()]

    def written(body: Any) -> bytes:
        text = json.dumps(body) if body in right_ones else body_of(body)
        return text.encode("utf-8", "surrogatepass")

    for where, (declaration, right) in bodies.items():

        def check(body: Any, declaration: type[Any] = declaration) -> None:
            text = written(body)
            params = gateway.json_params(text, "application/json")
            gateway.require(params, declaration)
            gateway.check_body(params, declaration)

        def send(site: Site, body: Any, where: str = where) -> None:
            text = written(body)
            signed = where not in ("/discover", "/register")
            site.ask("POST", where, text, signed=signed)
            site.desk.sent.clear()

        yield Parser(f"body of {where}", [right], check, send, typed=False)
    texts = ['{"msisdn": "+44", "mcc": 234}', '{"a": {"b": [1, 2.5, null]}}', "{}"]
    yield Parser(
        "json", texts, lambda text: gateway.json_params(octets(text), "application/json"),
        lambda site, text: site.ask("POST", "/discover", octets(text)),
    )  # fmt: skip


# -- Settings, and what is stored or comes from a provider


def settings_parsers() -> Iterator[Parser]:
    """Settings from options, environment and TOML; records; answers of providers."""
    right: dict[str, Any] = {
        "port": "5000", "allowed_origins": '["https://a.example"]', "sms_price": '{"*": 0.05}',
        "public_url": "https://msisdn.example", "mt_sender_map": '{"310": "+15555550100"}',
        "sms_providers": '[{"kind": "nexmo", "api_key": "k", "api_secret": "s"}]', "limits": "off",
        "sms_inbound": '[{"kind": "twilio", "signature_secret": "s"}]', "countries": '["GB"]',
        "unverified_per_destination": '{"GB": "500/day", "*": "20/day"}', "mt_sender": "Gateway",
        "trusted_proxies": '["10.0.0.0/8"]', "resend_gaps_s": "[30, 60]", "host": "::1",
        "storage_url": "redis://localhost:6379/0",
        "certificate_store": "dynamodb://table?region=eu-west-1",
    }  # fmt: skip

    def load(given: Any, where: str) -> None:
        texts = {str(name): str(value) for name, value in given.items()}
        environ = {f"GATEWAY_{name.upper()}": text for name, text in texts.items()}
        options = texts if where == "options" else {}
        settings = gateway.load_settings(options, {} if options else environ)
        for name in gateway.Settings.__struct_fields__:
            settings.shown(name)
        settings.warn()

    def toml(given: Any) -> None:
        with tempfile.NamedTemporaryFile(prefix="fuzz", suffix=".toml") as file:
            file.write(octets(given))
            file.flush()
            gateway.load_settings({}, {}, file.name)

    whole = """
port = 5000
allowed_origins = ["https://a.example"]
sms_price = {"*" = 0.05, GB = 0.04}
mt_sender = "Gateway"
countries = ["GB"]
trusted_proxies = []
resend_gaps_s = [30, 60]
[[sms_providers]]
kind = "nexmo"
api_key = "k"
api_secret = "s"
"""
    for where in ("options", "environment"):
        yield Parser(
            f"settings, {where}", [right], functools.partial(load, where=where),
            raises=gateway.SettingsError,
        )  # fmt: skip
    yield Parser("settings, toml", [whole], toml, raises=gateway.SettingsError)

    user = gateway.User(
        bytes(range(32)), bytes(24), sends=2, asked_s=NOW_S, code_digest=b"12345678"
    )
    packed = user.pack().decode("latin-1")
    yield Parser("record", [packed], lambda text: gateway.User.unpack(octets(text)))
    yield from provider_parsers()


ENTRIES: Final[dict[str, dict[str, Any]]] = {
    "nexmo": {"api_key": "k", "api_secret": "s", "entity_id": "1", "priority": 3},
    "twilio": {"account_sid": "AC" + "0" * 32, "auth_token": "s", "timeout_s": 2.5},
    "kannel": {"endpoint": "http://127.0.0.1:13013/cgi-bin/sendsms", "username": "u",
               "password": "p", "meta_data": "?smpp?PEID=1"},
    "smsgate": {"endpoint": "http://127.0.0.1/{to}", "username": "u", "password": "p"},
    "http": {"endpoint": "https://a.example/{to}?t={text}", "method": "POST", "basic": "u:p",
             "headers": {"Content-Type": "application/json"}, "body": '{"to": "{to}"}',
             "success": "ok|queued", "refused": "barred", "id": '"id": "(.*?)"'},
}  # fmt: skip
"""Entries of providers that are asked by HTTP."""
ANSWERS: Final[dict[str, dict[str, Any]]] = {
    "nexmo": {"messages": [{"status": "0", "message-id": "0A", "error-text": "x"}]},
    "twilio": {"sid": "SM1", "code": 21211, "message": "x", "status": 400},
    "kannel": {"0": "Accepted for delivery"},
    "smsgate": {"id": "x", "state": "Pending", "recipients": [{"phoneNumber": NUMBER}]},
    "http": {"queued": True, "id": "7", "error": {"code": 1}},
}
"""What they answer."""


def provider_parsers() -> Iterator[Parser]:
    """Entries of providers and webhooks, and what providers answer."""

    def entry(kind: str, given: Any) -> None:
        settings = gateway.Settings(sms_providers=[{"kind": kind} | given])
        settings.shown("sms_providers")
        gateway.SmsSender(settings)

    def webhook(kind: str, given: Any) -> None:
        gateway.Settings(sms_inbound=[{"kind": kind} | given]).shown("sms_inbound")

    def judge(provider: gateway.HttpSms, given: Any) -> None:
        text = octets(body_of(given))
        for status in (200, 400, 429, 500):
            with contextlib.suppress(gateway.SmsFailed):
                provider._judge(status, text, 0)

    error = gateway.SettingsError
    for kind, right in ENTRIES.items():
        check = functools.partial(entry, kind)
        yield Parser(f"provider {kind}", [right], check, raises=error)
        provider = gateway.HttpSms({"kind": kind} | right, gateway.Settings())
        yield Parser(f"answer of {kind}", [ANSWERS[kind]], functools.partial(judge, provider))
    for kind in KINDS:
        right = inbound_entry(kind) | {"path_secret": "p4th"}
        if kind in gateway.SIGNATURES:
            right |= SECRETS
        yield Parser(f"inbound {kind}", [right], functools.partial(webhook, kind), raises=error)


# -- A run --------------------------------------------------------------------------------------


class Run:
    """Tries inputs, counts them, and keeps those that fail.

    Attributes:
        inputs: How many were tried by each parser.
        http: How many of them were sent over the application, too.
    """

    def __init__(self, site: Site, seed: int) -> None:
        self.site, self.rng = site, random.Random(seed)
        self.parsers = {parser.name: parser for parser in parsers()}
        self.inputs = dict.fromkeys(self.parsers, 0)
        self.http = 0
        self.failed: list[str] = []
        self.waits = dict.fromkeys(self.parsers, 0.0)

    def try_one(self, parser: Parser, value: Any, over_http: bool) -> str:
        """Give a parser one input; returns what was wrong, or ""."""
        try:
            try:
                parser.direct(value)
            except parser.raises:
                pass
            if over_http and parser.http:
                self.http += 1
                parser.http(self.site, value)
        except Exception as error:
            place = error.__traceback__
            while place and place.tb_next:
                place = place.tb_next
            line = place.tb_lineno if place else 0
            return f"{type(error).__name__} in line {line}: {str(error)[:300]}"
        return ""

    def right(self) -> None:
        """Each right input passes: otherwise its mutations would test little."""
        for parser in self.parsers.values():
            for value in parser.right:
                if parser.raises is not gateway.Forbidden:
                    parser.direct(value)
                if parser.http:
                    parser.http(self.site, value)

    def replay(self) -> None:
        """Try what ever failed."""
        for name, value in json.loads(CORPUS.read_text("utf-8")):
            self.note(self.parsers[name], value, self.try_one(self.parsers[name], value, True))

    def go(self, seconds: float, inputs: int = 0) -> None:
        """Try new inputs for so long, and at least so many."""
        end_s, total = time.monotonic() + seconds, 0
        names = list(self.parsers)
        while time.monotonic() < end_s or total < inputs:
            # Mostly those that had least time, as some take a hundred times as long as others.
            name = min(self.rng.choices(names, k=4), key=lambda name: self.waits[name])
            parser, begun_s = self.parsers[name], time.monotonic()
            for n in range(HTTP_EACH):
                value = parser.hostile(self.rng)
                self.note(parser, value, self.try_one(parser, value, not n))
                self.inputs[name] += 1
                total += 1
            self.waits[name] += time.monotonic() - begun_s

    def note(self, parser: Parser, value: Any, fault: str) -> None:
        """Keep an input that failed, made smaller."""
        if not fault or len(self.failed) > 20:
            return
        kind = fault.partition(":")[0]
        if any(kind in known and parser.name in known for known in self.failed):
            return

        def fails(one: Any) -> bool:
            return self.try_one(parser, one, True).partition(":")[0] == kind

        while (smaller := next(filter(fails, smaller_ones(value)), None)) is not None:
            value = smaller
        self.failed.append(f"{parser.name}: {json.dumps(value)[:600]}: {fault}")
        known = json.loads(CORPUS.read_text("utf-8"))
        if [parser.name, value] not in known:
            lines = ",\n".join(json.dumps(one) for one in [*known, [parser.name, value]])
            CORPUS.write_text(f"[\n{lines}\n]\n", "utf-8")


def smaller_ones(value: Any) -> Iterator[Any]:
    """Simpler inputs, each without one piece, large pieces first; a few hundred at most."""
    if isinstance(value, dict):
        yield from ({n: v for n, v in value.items() if n != name} for name in list(value)[:50])
    elif isinstance(value, str):
        size = len(value) // 2
        while size:
            yield from (value[:at] + value[at + size :] for at in range(0, len(value), size))
            size = size // 2 if size > len(value) // 64 else 0


@contextlib.contextmanager
def quiet_site() -> Iterator[Site]:
    """A site over a store of its own; its log goes nowhere."""
    with tempfile.TemporaryDirectory(prefix="fz") as folder, warnings.catch_warnings():
        store = gateway.EmbeddedStore(folder)
        os.mkdir(os.path.join(folder, "k"), 0o700)
        logging.disable(logging.CRITICAL)
        try:
            # Python warns of some regular expressions that an operator may write.
            warnings.simplefilter("ignore", FutureWarning)
            yield Site(store.url, os.path.join(folder, "k"))
        finally:
            logging.disable(logging.NOTSET)
            store.stop()


def fuzz_parsers(seconds: float, seed: int, inputs: int) -> None:
    """One process's part: all parsers."""
    with quiet_site() as site:
        run = Run(site, seed)
        run.right()
        run.replay()
        begun_s = time.monotonic()
        run.go(seconds, inputs)
        total, took_s = sum(run.inputs.values()), time.monotonic() - begun_s
    least = min(run.inputs, key=lambda name: run.inputs[name])
    print(
        f"{total:,} inputs for {len(run.inputs)} parsers in {took_s:.0f} s, {run.http:,} of them "
        f"over the application too; fewest: {run.inputs[least]:,} ({least})",
        flush=True,
    )
    assert not run.failed, "\n".join(run.failed)
    assert total >= inputs


def fuzz_lives(seconds: float, seed: int, steps: int, shrinks: bool) -> None:
    """The other process's part: the state machine."""
    life = test_life.Life
    with tempfile.TemporaryDirectory(prefix="fz") as folder:
        store = gateway.EmbeddedStore(folder)
        logging.disable(logging.CRITICAL)
        begun_s, rounds = time.monotonic(), 0
        try:
            while time.monotonic() < begun_s + seconds or life.steps < steps:
                rounds += 1
                hypothesis_seed(seed * 100_003 + rounds)(life)
                test_life.run(store, 20, 50, shrinks)
        finally:
            took_s = time.monotonic() - begun_s
            met = ", ".join(f"{errno}: {n}" for errno, n in sorted(life.met.items()))
            print(
                f"{life.steps:,} steps in {took_s:.0f} s; errnos met: {met}; lost: {life.lost}; "
                f"runs that parted: {life.parted} of {rounds}",
                flush=True,
            )
            store.stop()
    assert life.steps >= steps
    assert life.lost <= 3 + life.steps // 500, f"the store was too slow in {life.lost} lives"
    assert life.parted <= 2 + rounds // 20, f"{life.parted} of {rounds} runs ended early"
    assert not steps or life.met.keys() >= ERRNOS


def main() -> None:
    """Run both at once."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60, help="how long, at least")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3)))
    parser.add_argument("--inputs", type=int, default=0, help="how many, at least")
    parser.add_argument("--steps", type=int, default=0, help="of the state machine, at least")
    parser.add_argument("--shrink", action="store_true", help="make a life that fails short")
    told = parser.parse_args()
    print(f"seed {told.seed}", flush=True)
    with ProcessPoolExecutor(2) as pool:
        parts = [
            pool.submit(fuzz_parsers, told.minutes * 60, told.seed, told.inputs),
            pool.submit(fuzz_lives, told.minutes * 60, told.seed, told.steps, told.shrink),
        ]
    for error in filter(None, [part.exception() for part in parts]):
        print(*traceback.format_exception(error), flush=True)
    sys.exit(any(part.exception() for part in parts))


if __name__ == "__main__":
    main()
