"""Writes ``notebooks/vectors.json``: ``python tests/make_vectors.py``.

What it writes is the same each time: known keys, a known time, and signatures of P-256 by RFC 6979.
Nothing of the gateway or of the clients is used, so that all of them can be judged by it:
``tests/test_vectors.py`` has them judged, and other people's libraries too. More than half of the
vectors must be refused, each for the one reason that stands beside it.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa, utils

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
FILE = NOTEBOOKS / "vectors.json"
NOW_S = 1_767_225_600
"""The time of all vectors: 2026-01-01."""
ISSUER, AUDIENCE, NONCE = "https://id.example", "https://shop.example", "n-0S6_WzA2Mj"
NUMBER = "+447700900123"
Json = dict[str, Any]


def b64(data: bytes) -> str:
    """base64."""
    return base64.b64encode(data).decode()


def b64url(data: bytes) -> str:
    """base64url without padding."""
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def test_key(name: str) -> Any:
    """One of the keys that everybody knows."""
    return serialization.load_pem_private_key((NOTEBOOKS / "test_keys" / name).read_bytes(), None)


BROWSERID, PROOF = test_key("browserid.pem"), test_key("proof-0.pem")
CLIENT_RS, CLIENT_EC = test_key("client.pem"), ec.derive_private_key(2026, ec.SECP256R1())
OTHER_EC = ec.derive_private_key(2027, ec.SECP256R1())
CLIENT_OKP = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


# -- HKDF --------------------------------------------------------------------------


def hkdf_vectors() -> Iterator[Json]:
    """A session token, and the Hawk id and key that both sides derive from it."""

    def derived(token: bytes, info: bytes = b"identity.mozilla.com/picl/v1/sessionToken") -> str:
        secret, block, text = hmac.digest(bytes(32), token, "sha256"), b"", ""
        for count in (1, 2):
            block = hmac.digest(secret, block + info + bytes([count]), "sha256")
            text += block.hex()
        return text

    for first in (0xA0, 0x00):
        token = bytes(range(first, first + 32))
        text = derived(token)
        yield {"name": f"bytes {first:02x} to {first + 31:02x}", "token": token.hex(),
               "id": text[:64], "key": text[64:]}  # fmt: skip
    token = bytes(range(0xA0, 0xC0))
    wrong = {
        "the key is id, and the id is key": (text := derived(token))[64:] + text[:64],
        "the token went in as 64 characters, not as 32 bytes": derived(token.hex().encode()),
        "info has no sessionToken at its end": derived(token, b"identity.mozilla.com/picl/v1/"),
        "the key is the token": text[:64] + token.hex(),
    }
    for why, text in wrong.items():
        yield {"name": why, "why": why, "token": token.hex(), "id": text[:64], "key": text[64:]}


# -- Hawk --------------------------------------------------------------------------

KEY = {
    "id": "c0a29dcf46174973da1378696e4c82ae10f723cf4f4d9f75e39f4ae3851595ab",
    "key": "9d8f22998ee7f5798b887042466b72d53e56ab0c094388bf65831f702d2febc0",
}
SENT: Json = {
    "method": "POST", "url": "https://id.example/sms/verify", "ts": NOW_S, "nonce": "j4h3g2",
    "contentType": "application/json", "body": '{"msisdn": "+447700900123"}',
}  # fmt: skip
EMPTY = {"contentType": "", "body": ""}


def payload_hash(contentType: str, body: str, end: str = "\n") -> str:  # noqa: N803
    """The hash of a payload."""
    return b64(hashlib.sha256(f"hawk.1.payload\n{contentType}\n{body}{end}".encode()).digest())


def normalized(one: Json, hash: str, title: str = "header", ext: str = "", end: str = "\n") -> str:
    """What a MAC covers; ``title`` is ``response`` for an answer."""
    parts = urlsplit(one["url"])
    path = parts.path + ("?" + parts.query if parts.query else "")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    lines = (f"hawk.1.{title}", one["ts"], one["nonce"], one["method"], path, parts.hostname, port,
             hash, ext)  # fmt: skip
    return "\n".join(map(str, lines)) + end


def mac(text: str, key: bytes = KEY["key"].encode()) -> str:
    """Its MAC."""
    return b64(hmac.digest(key, text.encode(), "sha256"))


def hash_of(one: Json) -> str:
    """The payload hash of a request or answer."""
    return payload_hash(one["contentType"].split(";")[0].strip().lower(), one["body"])


def payload_vectors() -> Iterator[Json]:
    """A body and its media type, and their hash."""
    bodies = {
        "JSON": SENT,
        "no body: no media type, and its hash is sent all the same": EMPTY,
        "parameters of the media type do not count, nor does its case": {
            **SENT, "contentType": "Application/JSON; charset=utf-8",
        },
        "not ASCII": {**SENT, "body": '{"message": "Prüfcode – ✓"}'},
    }  # fmt: skip
    for name, one in bodies.items():
        part = {"contentType": one["contentType"], "body": one["body"]}
        yield {"name": name, **part, "hash": hash_of(one)}
    kind, body = SENT["contentType"], SENT["body"]
    wrong = {
        "no line end behind the body": payload_hash(kind, body, ""),
        "no media type": payload_hash("", body),
        "without the white space, as some libraries write JSON": payload_hash(
            kind, body.replace(" ", "")
        ),
        "of the body alone": b64(hashlib.sha256(body.encode()).digest()),
        "base64url": hash_of(SENT).replace("+", "-").replace("/", "_"),
        "hex": base64.b64decode(hash_of(SENT)).hex(),
    }
    for why, hash in wrong.items():
        yield {"name": why, "why": why, "contentType": kind, "body": body, "hash": hash}


def signed(one: Json, text: str = "", hash: str | None = None, **changed: str) -> str:
    """The Authorization header of a request."""
    hash = hash_of(one) if hash is None else hash
    fields = {"id": KEY["id"], "ts": one["ts"], "nonce": one["nonce"], "hash": hash}
    fields |= {"mac": mac(text or normalized(one, hash)), **changed}
    return "Hawk " + ", ".join(f'{name}="{value}"' for name, value in fields.items() if value)


def request_vectors() -> Iterator[Json]:
    """A request, and its Authorization header."""
    good = {
        "POST with JSON": SENT,
        "POST without a body": {**SENT, **EMPTY, "url": "https://id.example/sms/resend_code"},
        "GET, with a port and a query": {
            **SENT, **EMPTY, "method": "GET", "url": "http://localhost:5000/session?a=1&b=%2F",
        },
        "an IPv6 address has no brackets": {**SENT, "url": "http://[::1]:5000/sms/verify"},
        "the versioned path": {**SENT, "url": "https://id.example/v1/msisdn/sms/verify"},
    }  # fmt: skip
    for name, one in good.items():
        text = normalized(one, hash_of(one))
        yield {"name": name, **one, "hash": hash_of(one), "normalized": text, "header": signed(one)}
    bare = "without a hash, which a gateway may be set to refuse (hawk_require_hash)"
    yield {
        "name": bare,
        **SENT,
        "normalized": normalized(SENT, ""),
        "header": signed(SENT, hash=""),
    }
    hash = hash_of(SENT)
    code = mac(normalized(SENT, hash))
    order = f'Hawk mac="{code}", nonce="{SENT["nonce"]}", hash="{hash}", ts="{NOW_S}"'
    yield {"name": "its fields in another order", **SENT, "header": f'{order}, id="{KEY["id"]}"'}
    lines = normalized(SENT, hash).split("\n")
    wrong = {
        "keyed with the 32 bytes, not with the 64 hex digits as text": signed(
            SENT, mac=mac(normalized(SENT, hash), bytes.fromhex(KEY["key"]))
        ),
        "no empty line for ext": signed(SENT, normalized(SENT, hash, end="")),
        "the method in small letters": signed(SENT, "\n".join([*lines[:3], "post", *lines[4:]])),
        "signed for another path": signed({**SENT, "url": "https://id.example/sms/mt/verify"}),
        "signed for another host": signed({**SENT, "url": "https://evil.example/sms/verify"}),
        "signed for port 80": signed({**SENT, "url": "https://id.example:80/sms/verify"}),
        "the port is left empty": signed(SENT, "\n".join([*lines[:6], "", *lines[7:]])),
        "signed for another time": signed(SENT, normalized({**SENT, "ts": NOW_S + 1}, hash)),
        "signed with another nonce": signed(SENT, normalized({**SENT, "nonce": "other"}, hash)),
        "signed as an answer": signed(SENT, normalized(SENT, hash, "response")),
        "the hash is of another body": signed(SENT, hash=hash_of({**SENT, "body": "{}"})),
        "the hash was taken out": signed(SENT).replace(f'hash="{hash}", ', ""),
        "ext was added": signed(SENT) + ', ext="x"',
        "the id is another session's": signed(SENT, id="0" * 64),
        "a field twice": signed(SENT) + f', ts="{NOW_S}"',
        "another scheme": signed(SENT).replace("Hawk", "Bearer"),
    }
    for why, header in wrong.items():
        yield {"name": why, "why": why, **SENT, "header": header}


def answer_vectors() -> Iterator[Json]:
    """An answer to the first of these requests, and its Server-Authorization header."""
    answer = {**SENT, "body": '{"mtSender": "Gateway"}'}
    error = {**SENT, "body": '{"code": 400, "errno": 105}'}
    nothing = {**SENT, **EMPTY}

    def seal(one: Json, text: str = "", hash: str = "", key: bytes = KEY["key"].encode()) -> str:
        hash = hash or hash_of(one)
        return f'Hawk mac="{mac(text or normalized(one, hash, "response"), key)}", hash="{hash}"'

    for name, one in {"JSON": answer, "an error": error, "204, without a body": nothing}.items():
        text = normalized(one, hash_of(one), "response")
        yield {"name": name, **one, "hash": hash_of(one), "normalized": text, "header": seal(one)}
    hash, bare = hash_of(answer), mac(normalized(answer, "", "response"))
    code = re.findall('mac="(.+?)"', seal(answer))[0]
    order = f'Hawk hash="{hash}", mac="{code}"'
    yield {"name": "its fields in another order", **answer, "header": order}
    wrong = {
        "to a request with another nonce: an old answer again": seal({**answer, "nonce": "other"}),
        "to a request at another time": seal({**answer, "ts": NOW_S - 1}),
        "to a request for another path": seal({**answer, "url": "https://id.example/session"}),
        "of another body": seal(error),
        "the hash is right, the MAC is of another body": seal(error).replace(hash_of(error), hash),
        "the MAC covers the hash of the request": seal(
            answer, normalized(SENT, hash_of(SENT), "response")
        ),
        "signed as a request": seal(answer, normalized(answer, hash)),
        "keyed with the 32 bytes": seal(answer, key=bytes.fromhex(KEY["key"])),
        "signed by somebody else": seal(answer, key=b"0" * 64),
        "no hash, so that nothing holds the body": f'Hawk mac="{bare}"',
        "nothing at all": "",
    }
    for why, header in wrong.items():
        yield {"name": why, "why": why, **answer, "header": header}


def time_vectors() -> Iterator[Json]:
    """The WWW-Authenticate header of a refusal of a stale request: the gateway's time, signed."""

    def told(ts: int, tsm: str) -> str:
        return f'Hawk ts="{ts}", tsm="{tsm}", error="Stale timestamp"'

    text = f"hawk.1.ts\n{NOW_S}\n"
    yield {"name": "the gateway's time", "ts": NOW_S, "header": told(NOW_S, mac(text))}
    wrong = {
        "another time": told(NOW_S + 3600, mac(text)),
        "no line end behind the time": told(NOW_S, mac(text[:-1])),
        "signed by somebody else": told(NOW_S, mac(text, b"0" * 64)),
        "not signed": "Hawk",
    }
    for why, header in wrong.items():
        yield {"name": why, "why": why, "ts": NOW_S, "header": header}


# -- Keys --------------------------------------------------------------------------


def whole(number: int) -> bytes:
    """A number as bytes, highest first."""
    return number.to_bytes(-(-number.bit_length() // 8), "big")


def decimal_key(key: Any) -> Json:
    """The public half of an RSA key in BrowserID's form."""
    numbers = key.public_key().public_numbers()
    return {"algorithm": "RS", "n": str(numbers.n), "e": str(numbers.e)}


def jwk(key: Any) -> Json:
    """The public half of a key as a JWK."""
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return {"kty": "OKP", "crv": "Ed25519", "x": b64url(key.public_key().public_bytes_raw())}
    numbers = key.public_key().public_numbers()
    if isinstance(key, rsa.RSAPrivateKey):
        return {"kty": "RSA", "n": b64url(whole(numbers.n)), "e": b64url(whole(numbers.e))}
    x, y = (b64url(n.to_bytes(32, "big")) for n in (numbers.x, numbers.y))
    return {"kty": "EC", "crv": "P-256", "x": x, "y": y}


def thumbprint(key: Json) -> str:
    """The name of a JWK by RFC 7638."""
    public = {name: key[name] for name in sorted(key)}
    text = json.dumps(public, separators=(",", ":"))
    return b64url(hashlib.sha256(text.encode()).digest())


def browserid_key_vectors() -> Iterator[Json]:
    """A client's key in BrowserID's form, and the same as a JWK."""
    key, number = decimal_key(CLIENT_RS), CLIENT_RS.public_key().public_numbers()
    yield {"name": "RSA of 2048 bits", "key": key, "jwk": jwk(CLIENT_RS)}
    yield {"name": "leading zeros are dropped", "key": {**key, "e": "0065537"},
           "canonical": key, "jwk": jwk(CLIENT_RS)}  # fmt: skip
    wrong = {
        "hex, where RSA has decimal numbers": {**key, "n": f"{number.n:x}"},
        "a number, not a string": {**key, "e": 65537},
        "base64url, as a JWK has it": {**key, "n": jwk(CLIENT_RS)["n"]},
        "no exponent": {"algorithm": "RS", "n": key["n"]},
        "exponent 3": {**key, "e": "3"},
        "an even exponent": {**key, "e": "65538"},
        "a modulus with the factor 3": {**key, "n": str(number.n // 3 * 3)},
        "512 bits": {**key, "n": str(number.n >> 1536 | 1)},
        "an algorithm that is none": {**key, "algorithm": "RSA"},
    }
    for why, value in wrong.items():
        yield {"name": why, "why": why, "key": value}


def jwk_vectors() -> Iterator[Json]:
    """A client's key as a JWK, and its thumbprint."""
    keys = {"P-256": CLIENT_EC, "Ed25519": CLIENT_OKP, "RSA of 2048 bits": CLIENT_RS}
    for name, key in keys.items():
        yield {"name": name, "key": jwk(key), "thumbprint": thumbprint(jwk(key))}
    good = jwk(CLIENT_EC)
    yield {"name": "further members are dropped", "key": {**good, "kid": "mine", "use": "sig"},
           "thumbprint": thumbprint(good)}  # fmt: skip
    wrong: dict[str, Json] = {
        "with its private half": {**good, "d": b64url((2026).to_bytes(32, "big"))},
        "another curve": {**good, "crv": "P-384"},
        "no point of the curve": {**good, "y": good["x"]},
        "no y": {name: good[name] for name in ("kty", "crv", "x")},
        "a secret key": {"kty": "oct", "k": b64url(bytes(32))},
        "an Ed25519 key for which everybody can sign": {**jwk(CLIENT_OKP), "x": b64url(bytes(32))},
        "RSA with exponent 3": {**jwk(CLIENT_RS), "e": "Aw"},
    }
    for why, value in wrong.items():
        yield {"name": why, "why": why, "key": value}


# -- Tokens ------------------------------------------------------------------------


def token(header: Json | str, claims: Json | str, key: Any) -> str:
    """A signed token; its parts may be given as text."""
    parts = (p if isinstance(p, str) else json.dumps(p, separators=(",", ":"))
             for p in (header, claims))  # fmt: skip
    text = ".".join(b64url(part.encode()) for part in parts)
    return f"{text}.{b64url(signature(text.encode(), key))}"


def signature(text: bytes, key: Any) -> bytes:
    """By the kind of the key; bytes sign by HS256, ``None`` not at all."""
    if key is None:
        return b""
    if isinstance(key, bytes):
        return hmac.digest(key, text, "sha256")
    if isinstance(key, rsa.RSAPrivateKey):
        return key.sign(text, padding.PKCS1v15(), hashes.SHA256())
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return key.sign(text)
    r, s = utils.decode_dss_signature(
        key.sign(text, ec.ECDSA(hashes.SHA256(), deterministic_signing=True))
    )
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def without(claims: Json, name: str) -> Json:
    """All but one."""
    return {other: claims[other] for other in claims if other != name}


CERTIFICATE: Json = {
    "public-key": decimal_key(CLIENT_RS),
    "principal": {"email": "5f1c2d3e-0000-4000-8000-1234567890ab@id.example"},
    "iat": (NOW_S - 10) * 1000, "exp": (NOW_S + 86400) * 1000, "iss": "id.example",
    "verifiedMSISDN": NUMBER, "lastVerifiedAt": (NOW_S - 60) * 1000, "lastAuthAt": NOW_S * 1000,
}  # fmt: skip
ASSERTION: Json = {"aud": AUDIENCE, "exp": (NOW_S + 300) * 1000}


def browserid_vectors() -> Iterator[Json]:
    """What a client shows to a site: certificate ~ assertion."""
    rs: Json = {"alg": "RS256"}

    def shown(
        certificate: Json | str = CERTIFICATE, assertion: Json | str = ASSERTION, head: Json = rs,
        by: Any = BROWSERID, head2: Json = rs, by2: Any = CLIENT_RS,
    ) -> str:  # fmt: skip
        return f"{token(head, certificate, by)}~{token(head2, assertion, by2)}"

    yield {"name": "RS256, both", "shown": shown(), "certificate": CERTIFICATE}
    origin = {**ASSERTION, "aud": "https://shop.example:443"}
    yield {"name": "the audience is an origin, however it is spelled",
           "shown": shown(assertion=origin), "certificate": CERTIFICATE}  # fmt: skip
    thief = {**CERTIFICATE, "public-key": decimal_key(BROWSERID)}
    chain = f"{token(rs, CERTIFICATE, BROWSERID)}~{token(rs, thief, CLIENT_RS)}"
    claims = json.dumps(ASSERTION)
    wrong = {
        "a certificate that its own holder signed": shown(by=CLIENT_RS),
        "an assertion by another key": shown(by2=BROWSERID),
        "an assertion for another site": shown(
            assertion={**ASSERTION, "aud": "https://evil.example"}
        ),
        "an assertion that is over": shown(assertion={**ASSERTION, "exp": NOW_S * 1000 - 1}),
        "an assertion without an end": shown(assertion=without(ASSERTION, "exp")),
        "an assertion without an audience": shown(assertion=without(ASSERTION, "aud")),
        "a certificate that is over": shown({**CERTIFICATE, "exp": NOW_S * 1000 - 1}),
        "times in seconds": shown({**CERTIFICATE, "iat": NOW_S - 10, "exp": NOW_S + 86400}),
        "a certificate of tomorrow": shown({**CERTIFICATE, "iat": (NOW_S + 86400) * 1000}),
        "a certificate of another issuer": shown({**CERTIFICATE, "iss": "evil.example"}),
        "no signature": shown(head={"alg": "none"}, by=None),
        "signed with the public key as a secret": shown(
            head={"alg": "HS256"}, by=decimal_key(BROWSERID)["n"].encode()
        ),
        "a certificate that a certificate signed": chain + "~" + token(rs, ASSERTION, BROWSERID),
        "a certificate alone": token(rs, CERTIFICATE, BROWSERID),
        "a name twice in the assertion": shown(
            assertion=claims.replace("{", '{"aud": "https://evil.example", ')
        ),
    }
    for why, text in wrong.items():
        yield {"name": why, "why": why, "shown": text}


KID = thumbprint(jwk(PROOF))
HEADER: Json = {"alg": "ES256", "kid": KID, "typ": "dc+sd-jwt"}
CLAIMS: Json = {
    "iss": ISSUER, "vct": f"{ISSUER}/vct/phone/1", "iat": NOW_S - 60, "exp": NOW_S + 3540,
    "phone_number": NUMBER, "phone_number_verified": True, "auth_time": NOW_S - 60,
    "amr": ["sms"], "method": "sms/mt",
}  # fmt: skip
NOTE: Json = {"aud": AUDIENCE, "nonce": NONCE, "iat": NOW_S}


def sd_jwt_vectors() -> Iterator[Json]:
    """What a client shows to a site: issuer-signed JWT ~ KB-JWT."""

    def shown(
        claims: Json = {}, note: Json = {}, head: Json = {}, by: Any = PROOF,
        key: Any = CLIENT_EC, by2: Any = None, head2: Json = {}, hash: str = "",
    ) -> str:  # fmt: skip
        held = {**CLAIMS, "cnf": {"jwk": jwk(key)}, **claims}
        proof = token({**HEADER, **head}, {n: v for n, v in held.items() if v is not None}, by)
        proof += "~"
        digest = hash or b64url(hashlib.sha256(proof.encode()).digest())
        told = {**NOTE, "sd_hash": digest, **note}
        alg = {ec.EllipticCurvePrivateKey: "ES256", ed25519.Ed25519PrivateKey: "EdDSA"}
        name = next((n for kind, n in alg.items() if isinstance(key, kind)), "RS256")
        kb = {"alg": name, "typ": "kb+jwt", **head2}
        return proof + token(kb, {n: v for n, v in told.items() if v is not None}, by2 or key)

    for name, key in {"P-256": CLIENT_EC, "Ed25519": CLIENT_OKP, "RSA": CLIENT_RS}.items():
        yield {"name": f"a client's key of {name}", "shown": shown(key=key)}
    yield {"name": "a KB-JWT of five minutes ago", "shown": shown(note={"iat": NOW_S - 300})}
    another = token(HEADER, {**CLAIMS, "cnf": {"jwk": jwk(CLIENT_EC)}, "method": "x"}, PROOF) + "~"
    good = shown()
    proof, note = good.split("~")
    bearer = {"typ": "JWT"}
    wrong = {
        "no KB-JWT": proof + "~",
        "a ~ too many": f"{proof}~~{note}",
        "a KB-JWT by another key": shown(by2=OTHER_EC),
        "a KB-JWT for another site": shown(note={"aud": "https://evil.example"}),
        "a KB-JWT with another nonce": shown(note={"nonce": "other"}),
        "a KB-JWT without a nonce": shown(note={"nonce": None}),
        "a KB-JWT for another proof": shown(hash=b64url(hashlib.sha256(another.encode()).digest())),
        "sd_hash without the ~": shown(hash=b64url(hashlib.sha256(proof.encode()).digest())),
        "sd_hash in hex": shown(hash=hashlib.sha256(f"{proof}~".encode()).hexdigest()),
        "a KB-JWT that is too old": shown(note={"iat": NOW_S - 3600}),
        "a KB-JWT from the future": shown(note={"iat": NOW_S + 3600}),
        "a KB-JWT without a time": shown(note={"iat": None}),
        "a KB-JWT of another type": shown(head2={"typ": "JWT"}),
        "a proof by another key": shown(by=OTHER_EC),
        "a proof that names another key": shown(head={"kid": thumbprint(jwk(OTHER_EC))}),
        "a JWT for one site as a proof with a key": shown(head=bearer),
        "a proof that is over": shown({"exp": NOW_S - 61}),
        "a proof without an end": shown({"exp": None}),
        "a proof from the future": shown({"iat": NOW_S + 3600}),
        "a proof of another issuer": shown({"iss": "https://evil.example"}),
        "a proof of something else": shown({"vct": f"{ISSUER}/vct/email/1"}),
        "a proof without a key": shown({"cnf": None}),
        "no signature": shown(head={"alg": "none"}, by=None),
        "signed with the public key as a secret": shown(
            head={"alg": "HS256"}, by=json.dumps(jwk(PROOF)).encode()
        ),
    }
    for why, text in wrong.items():
        yield {"name": why, "why": why, "shown": text}


def jwt_vectors() -> Iterator[Json]:
    """A JWT for one site."""
    claims = {**CLAIMS, "exp": NOW_S + 540, "aud": AUDIENCE, "nonce": NONCE,
              "sub": "6d1f0c5e-0000-4000-8000-1234567890ab", "jti": "k2j4"}  # fmt: skip
    header = {**HEADER, "typ": "JWT"}
    yield {"name": "a JWT", "shown": token(header, claims, PROOF)}
    wrong = {
        "for another site": token(header, {**claims, "aud": "https://evil.example"}, PROOF),
        "for nobody": token(header, without(claims, "aud"), PROOF),
        "with another nonce": token(header, {**claims, "nonce": "other"}, PROOF),
        "an SD-JWT in its place": token(HEADER, claims, PROOF),
        "over": token(header, {**claims, "exp": NOW_S - 61}, PROOF),
        "by another key": token(header, claims, OTHER_EC),
        "no signature": token({**header, "alg": "none"}, claims, None),
    }
    for why, text in wrong.items():
        yield {"name": why, "why": why, "shown": text}


SITE: Json = {"audience": AUDIENCE, "nonce": NONCE, "nowS": NOW_S, "msisdn": NUMBER}
PROOFS: Json = {**SITE, "issuer": ISSUER, "jwks": {"keys": [
    {**jwk(PROOF), "kid": KID, "alg": "ES256", "use": "sig"}]}}  # fmt: skip
GROUPS = {
    "hkdf": ({}, hkdf_vectors),
    "payload": ({}, payload_vectors),
    "request": (KEY, request_vectors),
    "answer": (KEY, answer_vectors),
    "time": (KEY, time_vectors),
    "browserid key": ({}, browserid_key_vectors),
    "jwk": ({}, jwk_vectors),
    "browserid": (
        {"audience": AUDIENCE, "issuer": "id.example", "publicKey": decimal_key(BROWSERID),
         "nowMs": NOW_S * 1000, "msisdn": NUMBER},
        browserid_vectors,
    ),
    "sd-jwt": (PROOFS, sd_jwt_vectors),
    "jwt": (PROOFS, jwt_vectors),
}  # fmt: skip


def vectors() -> Json:
    """All of them: of each group what is given to all its vectors, and these."""
    groups = {}
    for name, (given, make) in GROUPS.items():
        made = [{"name": one["name"], "valid": "why" not in one, **one} for one in make()]
        about = " ".join((make.__doc__ or "").split())
        groups[name] = {"about": about, "given": given, "vectors": made}
    return groups


def text() -> str:
    """The file."""
    return json.dumps(vectors(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), "utf-8")
    print(FILE)
