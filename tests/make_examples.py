"""Writes ``notebooks/integrate/examples.json``: ``python tests/make_examples.py``.

Every step of the protocol, as calls of both clients, and what went over the wire when the call in
Python was made: by ``notebooks/client.py``, to a gateway that listens. Its clock is ours, and it
signs by RFC 6979. So what is written is the same each time. ``tests/test_examples.py`` compares it,
and makes the same calls in JavaScript and by curl.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import random
import sys
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]

import lab  # noqa: E402
from cryptography.hazmat.primitives.asymmetric import ec  # noqa: E402
from make_vectors import CLIENT_EC, CLIENT_RS, decimal_key, jwk  # noqa: E402

FILE = ROOT / "notebooks" / "integrate" / "examples.json"
NUMBER, SPANIARD = "+447700900123", "+34612345678"
MORE: Any = {"mo_verifier_map": {"214": "+34600000001"}}
"""What is set otherwise than by default."""
LATER = ("/sms/resend_code", "/sms/mt/verify")
"""Before these steps some time passes, as no message may follow another at once."""
SHOWN = ("Content-Type", "Timestamp", "Retry-After", "Cache-Control", "WWW-Authenticate",
         "Server-Authorization")  # fmt: skip
"""The headers of answers that are shown, in this order."""


class Step(NamedTuple):
    """A call: what it is about, and how the two clients make it.

    Attributes:
        route: The path in ``gateway.ROUTES``.
        form: A provider makes it, with this form; it is no call of a client.
    """

    route: str
    about: str
    python: str = ""
    javascript: str = ""
    form: str = ""


def document(path: str, about: str) -> Step:
    """A document that anybody may read."""
    python = f'client.call("GET", "{path}", signed=False)'
    return Step(
        path, about, python, f"client.call('GET', '{path}', undefined, {{ signed: false }})"
    )


STEPS = (
    Step("/discover", "How can this number be verified?",
         'client.call("POST", "/discover", {"msisdn": "+447700900123"}, signed=False)',
         "client.discover({ msisdn: '+447700900123' })"),
    Step("/discover", "And a phone in this network, whose number nobody knows?",
         'client.call("POST", "/discover", {"mcc": "214", "mnc": "07"}, signed=False)',
         "client.discover({ mcc: '214', mnc: '07' })"),
    Step("/register", "Open a session.", "client.register()", "client.register()"),
    Step("/sms/verify", "Have a PIN sent.",
         'client.call("POST", "/sms/verify", {"msisdn": "+447700900123"})',
         "client.verify('+447700900123')"),
    Step("/sms/resend_code", "Too soon.",
         'client.call("POST", "/sms/resend_code")', "client.resend()"),
    Step("/sms/verify_code", "The user mistyped it.",
         'client.call("POST", "/sms/verify_code", {"code": "000000"})',
         "client.verifyCode('000000')"),
    Step("/sms/resend_code", "Have another one sent.",
         'client.call("POST", "/sms/resend_code")', "client.resend()"),
    Step("/session", "Where does the session stand?",
         'client.call("GET", "/session")', "client.session()"),
    Step("/sms/verify_code", "Return it, and get an SD-JWT for a key in the same step.",
         'client.call("POST", "/sms/verify_code", {"code": code, "publicKey": public_jwk(key)})',
         "client.verifyCode(code, { publicKey: await publicJwk(pair) })"),
    Step("/certificate/sign", "Another SD-JWT, for an hour.",
         'client.call("POST", "/certificate/sign", {"publicKey": public_jwk(key)})',
         "client.sign(await publicJwk(pair))"),
    Step("/certificate/sign", "A JWT for one site.",
         'client.call("POST", "/certificate/sign", {"format": "jwt",\n'
         '    "audience": "https://shop.example", "nonce": "n-0S6_WzA2Mj"})',
         "client.sign(undefined,\n"
         "  { format: 'jwt', audience: 'https://shop.example', nonce: 'n-0S6_WzA2Mj' })"),
    Step("/certificate/sign", "A BrowserID certificate, for five minutes.",
         'client.call("POST", "/certificate/sign", {"publicKey": browserid, "duration": 300})',
         "client.sign(browserIdKey(await publicJwk(rsa)), { duration: 300 })"),
    Step("/sms/mt/verify", "Have a long code sent, for a program that reads the SMS itself.",
         'client.call("POST", "/sms/mt/verify", {"msisdn": "+447700900123"})',
         "client.call('POST', '/sms/mt/verify', { msisdn: '+447700900123' })"),
    Step("/unregister", "Have everything dropped.",
         'client.call("POST", "/unregister")', "client.unregister()"),
    Step("/register", "Open a session for a phone in a network where it may text first.",
         'client.register({"mcc": "214", "mnc": "07"})',
         "client.register({ mcc: '214', mnc: '07' })"),
    Step("/sms/momt/", "The phone texted the session's Hawk id; this is what its provider sends.",
         form="msisdn=34612345678&text={id}&messageId=0A0000001"),
    Step("/sms/verify_code", "Return the long code that the phone got.",
         'client.call("POST", "/sms/verify_code", {"code": code})', "client.verifyCode(code)"),
    document("/", "Who answers here?"),
    document("/__heartbeat__", "Does it work?"),
    document("/__lbheartbeat__", "Does this process answer?"),
    document("/__version__", "What runs here?"),
    document("/.well-known/browserid", "The key that checks BrowserID certificates."),
    document("/.well-known/jwks.json", "The keys that check an SD-JWT or a JWT."),
    document("/.well-known/jwt-vc-issuer", "Where these keys are."),
    document("/vct/phone/1", "What an SD-JWT of this type is about."),
)  # fmt: skip
"""In this order: each goes on where the one before it ended."""
OUTBOX = "/outbox?to=447700900123&token=TOKEN"


class Recorder:
    """An application between client and gateway, that remembers the last exchange."""

    def __init__(self, app: Any) -> None:
        self.app, self.request, self.answer = app, "", ""

    def __call__(self, environ: Any, start_response: Any) -> Any:
        length = int(environ.get("CONTENT_LENGTH") or 0)
        body = environ["wsgi.input"].read(length) if length else b""
        environ["wsgi.input"] = io.BytesIO(body)
        path, query = environ["PATH_INFO"], environ.get("QUERY_STRING", "")
        lines = [f"{environ['REQUEST_METHOD']} {path}{'?' * bool(query)}{query} HTTP/1.1"]
        lines += ["Host: localhost:5000"]
        for name, key in (
            ("Content-Type", "CONTENT_TYPE"),
            ("Authorization", "HTTP_AUTHORIZATION"),
        ):
            lines += [f"{name}: {environ[key]}"] if environ.get(key) else []
        self.request = "\n".join(lines) + ("\n\n" + body.decode() if body else "")

        def note(status: str, headers: Any, exc_info: Any = None) -> Any:
            told = {name.title(): value for name, value in headers}
            lines = [f"HTTP/1.1 {int(status[:3])} {HTTPStatus(int(status[:3])).phrase}"]
            self.answer = "\n".join(
                [
                    *lines,
                    *(f"{name}: {told[name.title()]}" for name in SHOWN if name.title() in told),
                ]
            )
            return start_response(status, headers, *([exc_info] if exc_info else []))

        content = b"".join(self.app(environ, note))
        if content:
            self.answer += "\n\n" + pretty(content)
        return [content]


def pretty(content: bytes) -> str:
    """A body in JSON as people read it, long texts cut."""
    return json.dumps(cut(json.loads(content)), indent=2, ensure_ascii=False)


def cut(value: Any) -> Any:
    """A value with long texts cut."""
    if isinstance(value, dict):
        return {name: cut(part) for name, part in value.items()}
    if isinstance(value, list):
        return [cut(part) for part in value]
    return value[:42] + "…" if isinstance(value, str) and len(value) > 200 else value


def wire(client: Any, address: str, one: lab.Lab) -> tuple[Any, ...]:
    """Have ``client.py`` reach the gateway at another address than it signs, at the lab's time."""
    real = client.urllib.request.urlopen
    nonces = random.Random(21)

    def urlopen(request: Any, timeout: float) -> Any:
        request.full_url = request.full_url.replace("http://localhost:5000", address)
        request.add_header("Host", "localhost:5000")
        return real(request, timeout=timeout)

    return (
        mock.patch.object(client.urllib.request, "urlopen", urlopen),
        mock.patch("gateway.__version__", "1.0.0"),  # a release changes no example
        mock.patch("jwt.algorithms.ECDSA", partial(ec.ECDSA, deterministic_signing=True)),
        mock.patch.object(client.time, "time", lambda: one.now_s),
        mock.patch.object(client.secrets, "token_urlsafe", lambda n: nonces.randbytes(n).hex()),
    )


def examples() -> list[dict[str, Any]]:
    """All of them, made now."""
    client: Any = importlib.import_module("client")
    one = lab.Lab(seed=21, **MORE)
    recorder, made = Recorder(one.app), []
    phones = {n: lab.Handset(one.client(), n) for n in (NUMBER, SPANIARD)}
    with lab.serving(recorder) as address:
        caller = client.Client("http://localhost:5000")
        names: dict[str, Any] = {
            "client": caller, "public_jwk": client.public_jwk, "key": CLIENT_EC,
            "browserid": decimal_key(CLIENT_RS), "code": "",
        }  # fmt: skip
        assert client.public_jwk(CLIENT_EC) == jwk(CLIENT_EC)
        with contextlib.ExitStack() as stack:
            for patch in wire(client, address, one):
                stack.enter_context(patch)
            for step in STEPS:
                one.now_s += 61 * (step.route in LATER and step.about != "Too soon.")
                for phone in phones.values():
                    names["code"] = phone.code() if phone.messages() else names["code"]
                if step.form:
                    hawk_id = client.derive_credentials(caller.token)[0]
                    path, form = "/sms/momt/?provider=nexmo", step.form.format(id=hawk_id)
                    provider = client.urllib.request.Request(address + path, form.encode())
                    client.urllib.request.urlopen(provider, timeout=9).close()
                else:
                    try:
                        eval(step.python, names)
                    except client.GatewayError as error:
                        assert error.errno in (105, 114), step
                made.append(
                    {**step._asdict(), "request": recorder.request, "answer": recorder.answer}
                )
                if step.route == "/sms/mt/verify":
                    texts = json.dumps(phones[NUMBER].messages()).encode()
                    request = f"GET {OUTBOX} HTTP/1.1\nHost: localhost:5000"
                    answer = f"HTTP/1.1 200 OK\nContent-Type: application/json\n\n{pretty(texts)}"
                    about = "What was sent to a number, oldest first; at is in seconds."
                    told = {
                        **Step("/outbox", about)._asdict(),
                        "request": request,
                        "answer": answer,
                    }
                    made.append(told)
    one.close()
    return made


def text() -> str:
    """The file."""
    return json.dumps(examples(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), "utf-8")
    print(FILE)
