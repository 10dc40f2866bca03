"""``notebooks/conformance.py``: it passes our gateway, and no server that breaks a promise.

Each check meets a gateway of which somebody breaks the one promise, in the answers or the requests
that pass by. A check that cannot fail proves nothing.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lab
import pytest
from support import AT_ONCE, GatewayProcess
from test_clients import load

import gateway

ROOT = Path(__file__).resolve().parent.parent
conformance = load("conformance")
Answer = list[Any]
"""Status, headers and body of an answer that may be changed."""


@pytest.fixture(scope="module")
def app(
    store: gateway.EmbeddedStore, keys_dir: str, tmp_path_factory: pytest.TempPathFactory
) -> gateway.GatewayApp:
    settings = gateway.Settings(
        keys_dir=keys_dir, data_dir=str(tmp_path_factory.mktemp("conformance")),
        mo_verifier_map={"214": "+34600000001"},
    )  # fmt: skip
    app = gateway.create_app(settings, store.url)
    assert app.gateway.sms.outbox
    app.gateway.sms.outbox.console = None
    return app


@pytest.fixture(scope="module")
def eager(app: gateway.GatewayApp, store: gateway.EmbeddedStore) -> gateway.GatewayApp:
    """The same without gaps between messages."""
    settings = gateway.Settings(
        keys_dir=app.settings.keys_dir, data_dir=app.settings.data_dir, resend_gaps_s=AT_ONCE
    )
    app = gateway.create_app(settings, store.url)
    assert app.gateway.sms.outbox
    app.gateway.sms.outbox.console = None
    return app


def run(app: Any, name: str, token: str) -> str:
    """What one check says of an application: "ok", or why it failed or was not tried."""
    with lab.serving(app) as url:
        server = conformance.Server(url, token, mcc="214")
        try:
            conformance.CHECKS[name](server)
            return "ok"
        except (conformance.Failed, KeyError, TypeError) as error:
            return f"FAIL {error!r}"
        except conformance.NotTried as error:
            return f"not tried {error}"


NEEDS_NO_GAP = {"a_newer_code_replaces_the_old"}


@pytest.mark.parametrize("name", conformance.CHECKS)
def test_our_gateway_conforms(
    app: gateway.GatewayApp, eager: gateway.GatewayApp, name: str
) -> None:
    one = eager if name in NEEDS_NO_GAP else app
    assert run(one, name, one.token) == "ok"


# -- Servers that break a promise ------------------------------------------------------


class Broken:
    """An application whose requests and answers somebody changes on their way."""

    def __init__(
        self, app: gateway.GatewayApp, spoil: Callable[[Any, Answer], None],
        before: Callable[[Any], None] = lambda environ: None,
    ) -> None:  # fmt: skip
        self.app, self.spoil, self.before = app, spoil, before

    def __call__(self, environ: Any, start_response: Any) -> Any:
        self.before(environ)
        seen: Answer = []

        def note(status: str, headers: Any, exc_info: Any = None) -> Any:
            seen[:] = [status, dict(headers)]

        seen.append(b"".join(self.app(environ, note)))
        self.spoil(environ, seen)
        seen[1]["Content-Length"] = str(len(seen[2]))
        start_response(seen[0], list(seen[1].items()))
        return [seen[2]]


def header(name: str, value: str | None, only: str = "") -> Callable[[Any, Answer], None]:
    """Set a header of answers (``None``: leave it out) where it was; ``only`` on one path."""

    def spoil(environ: Any, answer: Answer) -> None:
        for there in [other for other in answer[1] if other.lower() == name.lower()]:
            if environ["PATH_INFO"].endswith(only):
                del answer[1][there]
                answer[1] |= {name: value} if value is not None else {}

    return spoil


def body(change: Callable[[Any], Any], only: str = "") -> Callable[[Any, Answer], None]:
    """Change the JSON of answers, and sign them no more."""

    def spoil(environ: Any, answer: Answer) -> None:
        if environ["PATH_INFO"].endswith(only) and answer[2][:1] == b"{":
            answer[2] = json.dumps(change(json.loads(answer[2]))).encode()

    return spoil


def instead(number: int, other: int = 0) -> Callable[[Any, Answer], None]:
    """Give another errno in place of one; none is success."""

    def spoil(environ: Any, answer: Answer) -> None:
        told = json.loads(answer[2]) if answer[2][:1] == b"{" else {}
        if told.get("errno") == number:
            if other:
                answer[2] = json.dumps(told | {"errno": other}).encode()
            else:
                answer[0], answer[2] = "200 OK", b"{}"

    return spoil


def status(number: str, other: str) -> Callable[[Any, Answer], None]:
    """Give another status in place of one."""

    def spoil(environ: Any, answer: Answer) -> None:
        if answer[0].startswith(number):
            answer[0] = other

    return spoil


def fields(**changed: Any) -> Callable[[Any], Any]:
    """Exchange fields that are there; ``None`` leaves one out."""

    def change(told: Any) -> Any:
        new = {name: changed.get(name, value) for name, value in told.items()}
        return {name: value for name, value in new.items() if value is not None}

    return change


def inside(name: str, **changed: Any) -> Callable[[Any], Any]:
    """Exchange fields within a field."""

    def change(told: Any) -> Any:
        return told | {name: fields(**changed)(told[name])} if name in told else told

    return change


def nothing(environ: Any, answer: Answer) -> None:
    """Leave an answer as it is."""


def asked_as(pattern: bytes, new: bytes) -> Callable[[Any], None]:
    """Have the gateway read another body than the one that came; it is not the one signed."""

    def before(environ: Any) -> None:
        length = int(environ.get("CONTENT_LENGTH") or 0)
        data = re.sub(pattern, new, environ["wsgi.input"].read(length)) if length else b""
        environ |= {"wsgi.input": io.BytesIO(data), "CONTENT_LENGTH": str(len(data))}

    return before


def moved(path: str, new: str) -> Callable[[Any], None]:
    """Send requests for one path to another."""

    def before(environ: Any) -> None:
        if environ["PATH_INFO"] == path:
            environ["PATH_INFO"] = new

    return before


def by_token(app: gateway.GatewayApp, change: Callable[[Any], Any], key: Any = None) -> Any:
    """Sign other claims than the gateway's in its proofs; an SD-JWT stays one."""

    def spoil(environ: Any, answer: Answer) -> None:
        told = json.loads(answer[2]) if answer[2][:1] == b"{" else {}
        if "cert" in told:
            proof, tilde, _ = told["cert"].partition("~")
            claims = change(conformance.parts_of(proof)[1])
            signer = app.gateway.keys.signer(time.time())
            if "public-key" in claims:
                token = gateway.sign_token(claims, key or app.gateway.keys.browserid)
            else:
                token = gateway.issue_proof(signer, claims).rstrip("~") + tilde
            answer[2] = json.dumps(told | {"cert": token}).encode()

    return spoil


SPOILED: dict[str, list[Any]] = {
    "answers_are_json": [header("Content-Type", "text/plain")],
    "answers_tell_the_time": [header("Timestamp", None), header("Timestamp", "1000000000")],
    "answers_have_an_id": [header("X-Request-Id", "a b"), header("X-Request-Id", "Me-1")],
    "both_spellings": [
        (nothing, moved("/v1/msisdn/register", "/nowhere")),
        (nothing, moved("/v1/certificate/sign", "/nowhere")),
        body(fields(verificationUrl="https://id.example/verify")),
    ],
    "errors_say_what_and_where": [
        body(fields(**{name: None})) for name in ("code", "error", "message", "info", "errno")
    ],
    "no_such_thing": [body(lambda told: told | {"errno": 999}), body(fields(message=None))],
    "pages_elsewhere_may_ask": [
        header("Access-Control-Allow-Headers", "Content-Type"),
        header("Access-Control-Allow-Methods", "GET"),
        header("Access-Control-Expose-Headers", "Timestamp"),
        header("Access-Control-Allow-Origin", "null"),
    ],
    "bodies_are_json_objects": [
        instead(106), instead(106, 107), (nothing, asked_as(rb', "mcc": "234"', b"")),
    ],
    "bodies_have_their_type": [instead(106)],
    "bodies_have_a_length": [instead(112)],
    "bodies_are_small": [instead(113)],
    "what_is_missing_is_named": [instead(108), instead(108, 107), body(fields(message="missing"))],
    "discovery": [
        body(lambda told: told | {"verificationMethods": ["sms/momt", "sms/mt"]}),
        instead(107), instead(108), body(inside("verificationDetails", **{"sms/mt": {}})),
    ],
    "network_fields_never_stand_in_the_way": [
        status("200", "400 Bad Request"),
    ],
    "registration": [
        body(fields(msisdnSessionToken="a" * 64)), body(fields(verificationMethods=None)),
        body(lambda told: told | {"msisdnSessionToken": told["msisdnSessionToken"][:-2]}),
    ],
    "where_a_session_stands": [
        body(inside("next", triesLeft=None), "/session"),
        body(inside("next", verified=True), "/session"),
        body(lambda told: told | {"at": time.time_ns()}, "/session"),
    ],
    "strangers_are_refused": [
        instead(110), instead(110, 109), header("WWW-Authenticate", "Basic"),
    ],
    "a_wrong_mac_is_refused": [instead(109), instead(109, 110)],
    "a_wrong_body_is_refused": [instead(109)],
    "a_stale_request_is_refused": [
        instead(109), header("WWW-Authenticate", "Hawk"),
        header("WWW-Authenticate", 'Hawk ts="1", tsm="AAAA", error="Stale timestamp"'),
    ],
    "a_repeated_request_is_refused": [instead(109)],
    "answers_are_signed": [
        header("Server-Authorization", None, path)
        for path in ("/session", "/sms/verify_code", "/unregister")
    ] + [header("Server-Authorization", 'Hawk mac="AAAA", hash="AAAA"')],
    "the_path_is_signed_as_it_was_sent": [instead(111)],
    "nothing_was_asked_for": [instead(111), instead(111, 105), instead(104)],
    "what_is_no_number": [instead(107), body(fields(message="no"))],
    "errors_say_what_is_next": [body(fields(next=None)), body(inside("next", expiresIn=None))],
    "a_pin": [
        body(fields(mtSender=None)), body(inside("next", triesLeft=0)),
        (nothing, moved("/sms/verify", "/sms/mt/verify")),
    ],
    "a_long_code": [(nothing, moved("/sms/mt/verify", "/sms/verify"))],
    "too_soon": [
        instead(114, 115), header("Retry-After", None), header("Retry-After", "1"),
        body(inside("next", resendIn=0)),
    ],
    "wrong_codes": [
        instead(105), instead(105, 107), instead(111), body(inside("next", triesLeft=2)),
    ],
    "what_is_no_code_costs_nothing": [
        instead(107), instead(107, 105), body(inside("next", triesLeft=1), "/sms/verify_code"),
    ],
    "codes_are_typed_by_people": [body(fields(msisdn="+1"), "/sms/verify_code")],
    "a_code_works_once": [
        instead(111), body(lambda told: told | {"more": 1}, "/sms/verify_code"),
        body(inside("next", verified=False), "/session"),
    ],
    "a_session_has_one_number": [instead(107)],
    "the_phone_may_text_first": [
        body(inside("verificationDetails", **{"sms/momt": {"moVerifier": "us"}})),
        body(fields(msisdn="+1"), "/sms/verify_code"),
        (nothing, asked_as(rb"text=Hi\+", b"text=no&x=")),
    ],
    "what_is_no_key_is_refused": [instead(107), instead(108)],
    "unregistering": [instead(110), status("204", "200 OK")],
    "unregistering_everywhere": [instead(104)],
    "documents": [
        body(lambda told: {"keys": []}, "/jwks.json"), header("Cache-Control", None),
        body(lambda told: {"keys": [{**told["keys"][0], "d": "x"}]}, "/jwks.json"),
        body(fields(jwks_uri="x"), "/jwt-vc-issuer"), body(fields(vct="x"), "/1"),
        body(fields(provisioning=None), "/browserid"), body(fields(info={}), "/openapi.json"),
        body(inside("service", videur_version="1"), "/api-specs"),
        lambda environ, answer: answer.__setitem__(2, answer[2].replace(b"105", b"")),
    ],
    "health": [body(fields(storage="yes"), "/__heartbeat__"), body(fields(sms=None))],
}  # fmt: skip


def claims_spoiled(app: gateway.GatewayApp) -> dict[str, list[Any]]:
    """Proofs that say something else, signed by the right key."""
    spoiled: dict[str, list[dict[str, Any]]] = {
            "an_sd_jwt": [
                {"phone_number": "+1"}, {"phone_number_verified": False}, {"vct": "x"},
                {"cnf": {"jwk": {}}}, {"exp": 1}, {"iat": 1, "exp": 61}, {"method": "letter"},
            ],
            "a_jwt": [{"nonce": "x"}, {"jti": "x"}, {"exp": 2**40}, {"sub": "x"}, {"aud": "x"}],
            "a_browserid_certificate": [
                {"verifiedMSISDN": "+1"}, {"exp": 1}, {"public-key": {}},
                {"principal": {"email": "x"}},
            ],
    }  # fmt: skip
    return {
        name: [by_token(app, fields(**changed)) for changed in changes]
        for name, changes in spoiled.items()
    }


def broken(app: gateway.GatewayApp, name: str) -> Iterator[Any]:
    """Every application that breaks a promise which this check is about."""
    for spoil in [*SPOILED.get(name, ()), *claims_spoiled(app).get(name, ())]:
        yield Broken(app, *(spoil if isinstance(spoil, tuple) else (spoil,)))
    if name in claims_spoiled(app):  # and a signature that is damaged
        damaged = re.compile(r"(.)(?=.{9}(~?)$)")

        def flip(told: Any) -> Any:
            text = damaged.sub(lambda found: "B" if found[1] == "A" else "A", told.get("cert", ""))
            return told | {"cert": text} if text else told

        yield Broken(app, body(flip))


SPECIAL = {"a_double_click_is_one_message", "a_newer_code_replaces_the_old"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in conformance.CHECKS if name not in SPECIAL])
def test_each_check_can_fail(app: gateway.GatewayApp, name: str) -> None:
    applications = [*broken(app, name)]
    assert applications
    for n, one in enumerate(applications):
        assert run(one, name, app.token).startswith("FAIL"), n


def test_a_server_that_sends_twice_is_seen(eager: gateway.GatewayApp) -> None:
    """It says that there are gaps, and has none."""
    one = Broken(eager, body(inside("next", resendIn=30)))
    assert "a second message" in run(one, "a_double_click_is_one_message", eager.token)


def test_a_server_that_keeps_the_old_code_is_seen(eager: gateway.GatewayApp) -> None:
    name = "a_newer_code_replaces_the_old"
    for spoil in (instead(105), body(inside("next", triesLeft=1), "/sms/verify_code")):
        assert run(Broken(eager, spoil), name, eager.token).startswith("FAIL")


# -- The command -----------------------------------------------------------------------


def command(url: str, *options: str, input: str = "") -> subprocess.CompletedProcess[str]:
    """``python notebooks/conformance.py``, as the pages tell."""
    return subprocess.run(
        [sys.executable, str(ROOT / "notebooks" / "conformance.py"), url, *options],
        input=input, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_the_command(start_gateway: Callable[..., GatewayProcess]) -> None:
    process = start_gateway("--mo-verifier-map", '{"214": "+34600000001"}')
    token = (process.folder / "keys" / "operator.token").read_text().strip()
    done = command(process.url, "--token", token, "--mcc", "214")
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert len(lines) == len(conformance.CHECKS) + 1
    assert lines[-1] == f"{len(conformance.CHECKS) - 2} ok, 0 FAIL, 2 not tried"
    assert re.fullmatch("ok +answers_are_json: .+", lines[0])
    assert command(process.url, "--only", "health").returncode == 0


def test_the_code_is_asked_for_on_the_terminal(
    start_gateway: Callable[..., GatewayProcess],
) -> None:
    process = start_gateway()
    phone = lab.Handset(process.client(), "+447700900123")
    running = subprocess.Popen(
        [sys.executable, str(ROOT / "notebooks" / "conformance.py"), process.url],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert running.stdin
    assert running.stderr
    asked = running.stderr.read(len("The code that +447700900123 got: "))
    assert asked == "The code that +447700900123 got: "
    told, _ = running.communicate(phone.code() + "\n", timeout=60)
    assert running.returncode == 0, told
    assert len(phone.messages()) == 1
    for name in ("an_sd_jwt", "a_jwt", "a_browserid_certificate", "a_session_has_one_number"):
        assert re.search(f"^ok +{name}:", told, re.M), told
    assert re.search("^not tried wrong_codes:.+it needs the outbox: --token", told, re.M)


def test_a_wrong_code_on_the_terminal_costs_one_message(
    start_gateway: Callable[..., GatewayProcess],
) -> None:
    process = start_gateway()
    done = command(process.url, input="000000\n")
    assert done.returncode == 1
    assert "FAIL      a_session_has_one_number" in done.stdout
    assert "not tried an_sd_jwt" in done.stdout
    assert len(lab.Handset(process.client(), "+447700900123").messages()) == 1


@pytest.mark.slow
def test_nobody_answers() -> None:
    done = command("http://127.0.0.1:1")
    assert (done.returncode, done.stdout) == (2, "")
    assert "http://127.0.0.1:1 does not answer" in done.stderr
