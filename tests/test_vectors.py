"""``notebooks/vectors.json`` before every judge: the gateway, its clients, other libraries."""

from __future__ import annotations

import datetime
import hashlib
import importlib.util
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import browserid.errors
import jwt
import make_vectors
import mohawk
import mohawk.exc
import mohawk.util
import pytest
from make_vectors import NOW_S, Json
from test_clients import client_py, load, needs_node
from test_interop import verifier

import gateway

ROOT = Path(__file__).resolve().parent.parent
GROUPS: Json = json.loads((ROOT / "notebooks" / "vectors.json").read_text("utf-8"))
needs_python = pytest.mark.skipif(
    not (importlib.util.find_spec("joserfc") and importlib.util.find_spec("jwcrypto")),
    reason="not installed: pip install -r requirements.txt",
)


def vectors(group: str) -> list[Json]:
    """The vectors of a group, with what is given to all of them."""
    return [{**GROUPS[group]["given"], **one} for one in GROUPS[group]["vectors"]]


def mistaken(group: str, judge: Callable[[Json], bool]) -> set[str]:
    """The vectors of a group about which a judge says something else than the file."""
    return {one["name"] for one in vectors(group) if judge(one) != one["valid"]}


def test_the_file_is_what_its_script_writes() -> None:
    """Run ``python tests/make_vectors.py`` and look at the difference."""
    assert (ROOT / "notebooks" / "vectors.json").read_text("utf-8") == make_vectors.text()


def test_each_has_one_name_and_half_must_be_refused_for_a_reason() -> None:
    every = [(group, one) for group in GROUPS for one in vectors(group)]
    assert len({(group, one["name"]) for group, one in every}) == len(every) > 120
    refused = [one for _, one in every if not one["valid"]]
    assert all(one["why"] for one in refused)
    assert len(refused) > len(every) / 2
    for group in GROUPS:
        assert {one["valid"] for one in vectors(group)} == {True, False}, group
        assert GROUPS[group]["about"]


# -- The gateway ---------------------------------------------------------------------


def raises_nothing(call: Callable[[], Any]) -> bool:
    """Whether the gateway believes something."""
    try:
        return bool(call())
    except (gateway.GatewayError, gateway.InvalidToken):
        return False


def key_of(one: Json) -> gateway.HawkKey:
    return gateway.HawkKey(bytes.fromhex(one["key"]))


def gateway_hkdf(one: Json) -> bool:
    found = gateway.derive_credentials(gateway.SessionToken(bytes.fromhex(one["token"])))
    return (found.hawk_id, found.hawk_key.hex()) == (one["id"], one["key"])


def gateway_payload(one: Json) -> bool:
    found = gateway.payload_hash(one["contentType"], one["body"].encode())
    return bool(found == one["hash"])


def gateway_request(one: Json) -> bool:
    def believed() -> bool:
        header = gateway.parse_hawk_header(one["header"])
        request = gateway.hawk_target(one["method"], one["url"])
        same = header.hash in ("", gateway.payload_hash(one["contentType"], one["body"].encode()))
        mac = gateway.hawk_mac("header", key_of(one), header, request)
        return same and (header.id, header.mac) == (one["id"], mac)

    return raises_nothing(believed)


def gateway_answer(one: Json) -> bool:
    request = gateway.hawk_target(one["method"], one["url"])
    asked = gateway.HawkHeader(ts=str(one["ts"]), nonce=one["nonce"])
    content = one["contentType"], one["body"].encode()
    made = gateway.server_authorization(key_of(one), asked, request, *content)
    return raises_nothing(
        lambda: gateway.parse_hawk_header(made) == gateway.parse_hawk_header(one["header"])
    )


def gateway_time(one: Json) -> bool:
    return f'tsm="{gateway.time_mac(key_of(one), NOW_S)}"' in one["header"] and (
        f'ts="{NOW_S}"' in one["header"]
    )


def gateway_browserid(one: Json) -> bool:
    key = gateway.parse_public_key(one["publicKey"])
    args = one["shown"], one["audience"], one["issuer"], key, one["nowMs"]
    return raises_nothing(lambda: gateway.verify_backed_assertion(*args))


def gateway_sd_jwt(one: Json) -> bool:
    args = one["shown"], one["jwks"], one["issuer"], one["audience"], one["nonce"], one["nowS"]
    return raises_nothing(lambda: gateway.verify_presentation(*args))


def gateway_jwt(one: Json) -> bool:
    args = one["shown"], one["jwks"], one["issuer"], one["nowS"], one["audience"]
    return raises_nothing(lambda: gateway.verify_proof(*args)["nonce"] == one["nonce"])


GATEWAY: dict[str, Callable[[Json], bool]] = {
    "hkdf": gateway_hkdf,
    "payload": gateway_payload,
    "request": gateway_request,
    "answer": gateway_answer,
    "time": gateway_time,
    "browserid key": lambda one: raises_nothing(lambda: gateway.client_key(one["key"])),
    "jwk": lambda one: raises_nothing(lambda: gateway.client_key(one["key"])),
    "browserid": gateway_browserid,
    "sd-jwt": gateway_sd_jwt,
    "jwt": gateway_jwt,
}


@pytest.mark.parametrize("group", GROUPS)
def test_the_gateway(group: str) -> None:
    assert mistaken(group, GATEWAY[group]) == set()


def test_the_gateway_writes_keys_as_the_vectors_do() -> None:
    for one in vectors("browserid key"):
        if one["valid"]:
            assert gateway.canonical_key(one["key"]) == one.get("canonical", one["key"])
    for one in vectors("jwk"):
        if one["valid"]:
            canonical = json.dumps(gateway.canonical_jwk(one["key"]), separators=(",", ":"))
            digest = hashlib.sha256(canonical.encode()).digest()
            assert make_vectors.b64url(digest) == one["thumbprint"]


def test_what_a_certificate_says() -> None:
    for one in vectors("browserid"):
        if one["valid"]:
            key = gateway.parse_public_key(one["publicKey"])
            args = one["audience"], one["issuer"], key, one["nowMs"]
            claims = gateway.verify_backed_assertion(one["shown"], *args)
            assert claims == one["certificate"]
            assert claims["verifiedMSISDN"] == one["msisdn"]


# -- The clients to copy ---------------------------------------------------------------


def asked(one: Json) -> tuple[Any, ...]:
    return (one["id"], one["key"]), one["method"], one["url"], one["ts"], one["nonce"]


def python_request(one: Json) -> bool:
    made = client_py.authorization(*asked(one), one["contentType"], one["body"].encode())
    return bool(made == one["header"])


CLIENT_PY: dict[str, Callable[[Json], bool]] = {
    "hkdf": lambda one: client_py.derive_credentials(one["token"]) == (one["id"], one["key"]),
    "payload": lambda one: (
        client_py.payload_hash(one["contentType"], one["body"].encode()) == one["hash"]
    ),
    "request": python_request,
    "answer": lambda one: client_py.check_answer(
        *asked(one), one["header"], one["contentType"], one["body"].encode()
    ),
    "time": lambda one: client_py.Client("").set_clock(("", one["key"]), one["header"]),
}
NOT_MADE = {one["name"] for one in vectors("request") if one["valid"] and "hash" not in one}
"""Our clients always send a hash."""


@pytest.mark.parametrize("group", CLIENT_PY)
def test_client_py(group: str) -> None:
    expected = NOT_MADE if group == "request" else set()
    assert mistaken(group, CLIENT_PY[group]) == expected
    for one in vectors(group):
        if one["valid"] and "normalized" in one and "hash" in one:
            title = {"request": "hawk.1.header", "answer": "hawk.1.response"}[group]
            text = client_py.normalized(title, *asked(one)[1:], one["hash"])
            assert text == one["normalized"]


def in_javascript(calls: list[list[Any]], module: str = "client.mjs") -> list[Any]:
    """What functions of a module give: name and arguments of each."""
    what = {"client": str(ROOT / "notebooks" / module), "url": "", "walk": "parts"}
    done = subprocess.run(
        ["node", str(ROOT / "tests" / "client_walk.mjs")],
        input=json.dumps({**what, "calls": calls}), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout)["found"])


JAVASCRIPT: dict[str, tuple[Callable[[Json], list[Any]], Callable[[Any, Json], bool]]] = {
    "hkdf": (
        lambda one: ["deriveCredentials", one["token"]],
        lambda found, one: found == {"id": one["id"], "key": one["key"]},
    ),
    "payload": (
        lambda one: ["payloadHash", one["contentType"], one["body"]],
        lambda found, one: found == one["hash"],
    ),
    "request": (
        lambda one: ["authorization", one, {"hash": make_vectors.hash_of(one), **one}],
        lambda found, one: found == one["header"],
    ),
    "answer": (
        lambda one: ["checkAnswer", one, one, one["header"], one["contentType"], one["body"]],
        lambda found, one: found,
    ),
}


@needs_node
@pytest.mark.parametrize("group", JAVASCRIPT)
def test_client_mjs(group: str) -> None:
    call, judge = JAVASCRIPT[group]
    found = in_javascript([call(one) for one in vectors(group)])
    verdicts = {one["name"]: judge(f, one) for f, one in zip(found, vectors(group), strict=True)}
    expected = NOT_MADE if group == "request" else set()
    assert {n for n in verdicts if verdicts[n] != valid(group)[n]} == expected


def valid(group: str) -> dict[str, bool]:
    """What the file says of each vector of a group."""
    return {one["name"]: one["valid"] for one in vectors(group)}


@needs_node
def test_client_mjs_writes_normalized_strings_and_keys() -> None:
    calls, wanted = [], []
    for group, name in {"request": "normalizedRequest", "answer": "normalizedAnswer"}.items():
        for one in vectors(group):
            if one["valid"] and "hash" in one:
                calls.append([name, one])
                wanted.append(one["normalized"])
    for one in vectors("browserid key"):
        if one["valid"]:
            calls += [["jwkOfBrowserId", one["key"]], ["browserIdKey", one["jwk"]]]
            wanted += [one["jwk"], one.get("canonical", one["key"])]
    assert in_javascript(calls) == wanted


@needs_node
def test_relying_party_webcrypto_mjs() -> None:
    """It has no library, so each of its checks is its own."""
    every = vectors("sd-jwt")
    names = ("shown", "jwks", "issuer", "audience", "nonce", "nowS")
    calls = [["numberOfSdJwt", *(one[name] for name in names)] for one in every]
    found = in_javascript(calls, "relying_party_webcrypto.mjs")
    verdicts = {one["name"]: f == one["msisdn"] for f, one in zip(found, every, strict=True)}
    assert verdicts == valid("sd-jwt")


# -- Other people's libraries ------------------------------------------------------------


def mohawk_request(one: Json) -> bool:
    try:
        mohawk.Receiver(
            lambda who: {"id": one["id"], "key": one["key"], "algorithm": "sha256"}
            if who == one["id"] else {}, one["header"], one["url"], one["method"],
            content=one["body"], content_type=one["contentType"], seen_nonce=lambda *_: False,
            accept_untrusted_content='hash="' not in one["header"],
            timestamp_skew_in_seconds=10**9,
        )  # fmt: skip
        return True
    except (mohawk.exc.HawkFail, mohawk.exc.InvalidCredentials):
        return False


def mohawk_answer(one: Json) -> bool:
    sender = mohawk.Sender(
        {"id": one["id"], "key": one["key"], "algorithm": "sha256"}, one["url"], one["method"],
        content="", content_type="", nonce=one["nonce"], _timestamp=one["ts"],
    )  # fmt: skip
    try:
        sender.accept_response(
            one["header"], content=one["body"], content_type=one["contentType"],
            timestamp_skew_in_seconds=10**9,
        )  # fmt: skip
        return True
    except (mohawk.exc.HawkFail, ValueError, AttributeError):
        return False


def mohawk_payload(one: Json) -> bool:
    found = mohawk.util.calculate_payload_hash(one["body"], "sha256", one["contentType"])
    return bool(found.decode() == one["hash"])


OF_MOHAWK: dict[str, Callable[[Json], bool]] = {
    "request": mohawk_request,
    "answer": mohawk_answer,
    "payload": mohawk_payload,
}


@pytest.mark.parametrize("group", OF_MOHAWK)
def test_mohawk(group: str) -> None:
    assert mistaken(group, OF_MOHAWK[group]) == set()


def test_pybrowserid() -> None:
    def judge(one: Json) -> bool:
        documents = {one["issuer"]: {"public-key": one["publicKey"]}}
        try:
            found = verifier(documents).verify(one["shown"], one["audience"], now=one["nowMs"])
            return bool(found["idpClaims"]["verifiedMSISDN"] == one["msisdn"])
        except (browserid.errors.Error, ValueError, KeyError, TypeError):
            return False

    # It compares audiences as text, does not look at iat, and reads the last of two equal names.
    differs = {"the audience is an origin, however it is spelled", "a certificate of tomorrow"}
    assert mistaken("browserid", judge) == differs | {"a name twice in the assertion"}


@needs_python
@pytest.mark.filterwarnings("ignore:EdDSA is deprecated")  # in favour of its newer name, Ed25519
def test_joserfc() -> None:
    from joserfc import errors, jwk
    from joserfc import jwt as jose

    def opened(token: str, keys: Any, algorithm: str, typ: str, now: int, **wanted: Any) -> Any:
        found = jose.decode(token, keys, algorithms=[algorithm])
        jose.JWTClaimsRegistry(now=now, leeway=60, **wanted).validate(found.claims)
        if found.header["typ"] != typ:
            raise ValueError("another form")
        return found.claims

    def judge(one: Json) -> bool:
        keys, must = jwk.KeySet.import_key_set(one["jwks"]), {"essential": True}
        wanted: Json = {"iss": must | {"value": one["issuer"]}, "exp": must, "iat": must}
        wanted["vct"] = must | {"value": one["issuer"] + "/vct/phone/1"}
        site = {"aud": must | {"value": one["audience"]}, "nonce": must | {"value": one["nonce"]}}
        try:
            if "~" not in one["shown"]:
                typ = "JWT"
                claims = opened(one["shown"], keys, "ES256", typ, one["nowS"], **wanted, **site)
                return bool(claims["phone_number"] == one["msisdn"])
            proof, kb = one["shown"].split("~")
            claims = opened(proof, keys, "ES256", "dc+sd-jwt", one["nowS"], cnf=must, **wanted)
            key = claims["cnf"]["jwk"]
            algorithm = {"EC": "ES256", "OKP": "EdDSA", "RSA": "RS256"}[key["kty"]]
            digest = hashlib.sha256(f"{proof}~".encode()).digest()
            hash = must | {"value": make_vectors.b64url(digest)}
            note = opened(
                kb, jwk.import_key(key), algorithm, "kb+jwt", one["nowS"], iat=must,
                sd_hash=hash, **site,
            )  # fmt: skip
            return bool(note["iat"] >= one["nowS"] - 300)
        except (errors.JoseError, ValueError, KeyError, TypeError):
            return False

    assert mistaken("sd-jwt", judge) == set()
    assert mistaken("jwt", judge) == set()


class ThatDay(datetime.datetime):
    """The time of the vectors, for PyJWT."""

    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return cls.fromtimestamp(NOW_S, tz)


def test_what_relying_parties_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """``notebooks/relying_party.py``, by PyJWT."""
    party = load("relying_party")
    monkeypatch.setattr("jwt.api_jwt.datetime", ThatDay)
    monkeypatch.setattr(party.time, "time", lambda: float(NOW_S))

    class Keys:
        def __init__(self, jwks: Json) -> None:
            self.keys = jwt.PyJWKSet.from_dict(jwks)

        def get_signing_key_from_jwt(self, token: str) -> Any:
            kid = jwt.get_unverified_header(token).get("kid")
            found = [key for key in self.keys.keys if key.key_id == kid]
            if not found:
                raise jwt.PyJWKClientError("no such key")
            return found[0]

    def judge(one: Json) -> bool:
        site = Keys(one["jwks"]), one["issuer"], one["audience"], one["nonce"]
        try:
            if "~" in one["shown"]:
                return bool(party.number_of_sd_jwt(one["shown"], *site) == one["msisdn"])
            return bool(party.number_of_jwt(one["shown"], *site, set()) == one["msisdn"])
        except ValueError:
            return False

    assert mistaken("sd-jwt", judge) == set()
    assert mistaken("jwt", judge) == set()
