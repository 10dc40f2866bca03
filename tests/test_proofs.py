"""A proof for today: SD-JWT with key binding, and JWT; by us, and by those who never saw us."""

from __future__ import annotations

import ast
import base64
import hashlib
import hmac
import importlib.util
import inspect
import json
import math
import os
import re
import shutil
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, cast

import jwt
import lab
import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa, utils
from support import AT_ONCE, NUMBER, WsgiClient, shared

import gateway

ROOT = Path(__file__).resolve().parent.parent
AUDIENCE, NONCE = "https://shop.example", "n-0S6_WzA2Mj"
ISSUER = "http://127.0.0.1:5000"
FORMS = ("EC", "OKP", "RSA", "jwt", "jwt with cnf")
NODE = {name: ROOT / ".parts" / name / "node_modules" for name in ("jose", "sd-jwt")}
needs_node = pytest.mark.skipif(
    not (shutil.which("node") and all(folder.exists() for folder in NODE.values())),
    reason="not installed: npm install --prefix .parts/jose jose@6.2.18; "
    "npm install --prefix .parts/sd-jwt @sd-jwt/core@0.19.0 (Node 20)",
)
needs_python = pytest.mark.skipif(
    not (importlib.util.find_spec("joserfc") and importlib.util.find_spec("jwcrypto")),
    reason="not installed: pip install -r requirements.txt",
)


def relying_party() -> Any:
    """The module that the lesson gives to relying parties."""
    path = ROOT / "notebooks" / "relying_party.py"
    spec = importlib.util.spec_from_file_location("relying_party", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- Tools that write and read tokens without the gateway ----------------------


@cache
def key_of(name: str) -> Any:
    """A private key of a client or stranger, made once: ``EC``; ``EC other`` is another."""
    kty = name.split()[0]
    if kty == "RSA":
        return rsa.generate_private_key(65537, 2048)
    return (
        ec.generate_private_key(ec.SECP256R1())
        if kty == "EC"
        else ed25519.Ed25519PrivateKey.generate()
    )


def public(name: str) -> dict[str, Any]:
    """The public JWK of ``key_of(name)``."""
    return lab.public_jwk(key_of(name))


def b64(data: bytes) -> str:
    """base64url without padding."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def part(token: str, n: int) -> Any:
    """A piece of a token, read."""
    piece = token.split(".")[n]
    return json.loads(base64.urlsafe_b64decode(piece + "=" * (-len(piece) % 4)))


def forged(header: Any, claims: Any, key: Any) -> str:
    """A token by ``key``, whatever its header says; ``bytes`` sign by HS256, None not at all."""
    texts = [p if isinstance(p, bytes) else json.dumps(p).encode() for p in (header, claims)]
    signed = ".".join(map(b64, texts)).encode()
    if key is None:
        signature = b""
    elif isinstance(key, bytes):
        signature = hmac.new(key, signed, "sha256").digest()
    elif isinstance(key, rsa.RSAPrivateKey):
        signature = key.sign(signed, padding.PKCS1v15(), hashes.SHA256())
    elif isinstance(key, ed25519.Ed25519PrivateKey):
        signature = key.sign(signed)
    else:
        r, s = utils.decode_dss_signature(key.sign(signed, ec.ECDSA(hashes.SHA256())))
        signature = r.to_bytes(32, "big") + s.to_bytes(32, "big")
    return f"{signed.decode()}.{b64(signature)}"


def binding(proof: str, name: str = "EC", header: Any = None, **claims: Any) -> str:
    """A KB-JWT for a proof by ``key_of(name)``, with claims exchanged (None removes one)."""
    alg = {"EC": "ES256", "OKP": "EdDSA", "RSA": "RS256"}[name.split()[0]]
    digest = b64(hashlib.sha256(proof.encode()).digest())
    told = {"aud": AUDIENCE, "nonce": NONCE, "iat": int(time.time()), "sd_hash": digest} | claims
    told = {n: v for n, v in told.items() if v is not None}
    return forged({"alg": alg, "typ": "kb+jwt"} | (header or {}), told, key_of(name))


class World(NamedTuple):
    """A gateway that listens, proofs that it gave a minute ago at most, and what forgers know."""

    app: gateway.GatewayApp
    address: str
    proofs: dict[str, str]
    jwks: dict[str, Any]
    certificate: str

    @property
    def shown(self) -> dict[str, str]:
        """What a client shows of each form."""
        return {
            form: proof + binding(proof, form) if form in ("EC", "OKP", "RSA") else proof
            for form, proof in self.proofs.items()
        }


@pytest.fixture(scope="module")
def world(
    store: gateway.EmbeddedStore, keys_dir: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    data_dir = str(tmp_path_factory.mktemp("world"))
    settings = gateway.Settings(keys_dir=keys_dir, data_dir=data_dir, resend_gaps_s=AT_ONCE)
    app = gateway.create_app(settings, store.url)
    assert app.gateway.sms.outbox
    app.gateway.sms.outbox.console = None
    client = WsgiClient(app).verified()

    def sign(**body: Any) -> str:
        return str(client.call("/certificate/sign", body).json["cert"])

    proofs = {kty: sign(publicKey=public(kty)) for kty in ("EC", "OKP", "RSA")}
    site = {"format": "jwt", "audience": AUDIENCE, "nonce": NONCE}
    proofs |= {"jwt": sign(**site), "jwt with cnf": sign(**site, publicKey=public("EC"))}
    rs = gateway.public_key_json(key_of("RSA").public_key())
    with lab.serving(app) as address:
        jwks = client.get("/.well-known/jwks.json").json
        yield World(app, address, proofs, jwks, sign(publicKey=rs))


def ours(form: str, shown: str, jwks: Any, now_s: float = 0, audience: str = AUDIENCE) -> str:
    """What the gateway's own functions make of it: the number; else InvalidToken."""
    now_s = now_s or time.time()
    if form.startswith("jwt"):
        claims = gateway.verify_proof(shown, jwks, ISSUER, now_s, audience)
        if claims.get("nonce") != NONCE:
            raise gateway.InvalidToken("another nonce")
    else:
        claims = gateway.verify_presentation(shown, jwks, ISSUER, audience, NONCE, now_s)
    return str(claims["phone_number"])


# -- What is issued -------------------------------------------------------------


def test_an_sd_jwt_over_http(make_client: Callable[..., WsgiClient]) -> None:
    """Header and every claim; the key without what was beside it; an hour unless told otherwise."""
    now = [1_700_000_000.7]
    client = make_client(clock=lambda: now[0]).verified()
    now[0] += 30
    key = public("EC") | {"kid": "mine", "use": "sig", "x5c": ["…"], "alg": "ES384"}
    answer = client.call("/certificate/sign", {"publicKey": json.dumps(key)})
    proof, _, rest = answer.json["cert"].partition("~")
    kid = client.get("/.well-known/jwks.json").json["keys"][0]["kid"]
    assert answer.json.keys() == {"cert"}
    assert rest == ""
    assert part(proof, 0) == {"alg": "ES256", "kid": kid, "typ": "dc+sd-jwt"}
    assert part(proof, 1) == {
        "iss": ISSUER,
        "vct": f"{ISSUER}/vct/phone/1",
        "iat": 1_700_000_030,
        "exp": 1_700_003_630,
        "cnf": {"jwk": public("EC")},
        "phone_number": NUMBER,
        "phone_number_verified": True,
        "auth_time": 1_700_000_000,
        "amr": ["sms"],
        "method": "sms/mt",
    }


def test_a_jwt_over_http(make_client: Callable[..., WsgiClient]) -> None:
    """Ten minutes; its audience as an origin; another jti each time, the same sub."""
    client = make_client(clock=lambda: 1.7e9).verified()
    body = {"format": "jwt", "audience": "https://SHOP.example:443/", "nonce": NONCE}
    first, second = (client.call("/certificate/sign", body).json["cert"] for _ in range(2))
    claims, again = part(first, 1), part(second, 1)
    assert part(first, 0)["typ"] == "JWT"
    assert (claims["aud"], claims["nonce"]) == (AUDIENCE, NONCE)
    assert (claims["iat"], claims["exp"]) == (1_700_000_000, 1_700_000_600)
    assert "cnf" not in claims
    assert claims["sub"] == again["sub"]
    assert claims.pop("jti") != again.pop("jti")
    assert claims == again
    bound = client.call("/certificate/sign", body | {"nonce": "", "publicKey": public("OKP")})
    told = part(bound.json["cert"], 1)
    assert told["cnf"] == {"jwk": public("OKP")}
    assert "nonce" not in told


@pytest.mark.parametrize(
    ("body", "life_s"),
    [
        ({}, 3600),
        ({"duration": 60}, 60),
        ({"duration": "7200"}, 7200),
        ({"duration": 10**9}, 8000),
        ({"format": "jwt", "audience": AUDIENCE}, 600),
        ({"format": "jwt", "audience": AUDIENCE, "duration": 5}, 5),
        ({"format": "jwt", "audience": AUDIENCE, "duration": 3600}, 600),
    ],
)
def test_durations(make_client: Callable[..., WsgiClient], body: Any, life_s: int) -> None:
    client = make_client(clock=lambda: 1.7e9, certificate_max_s=8000).verified()
    body = {"publicKey": public("EC"), **body}
    claims = part(client.call("/certificate/sign", body).json["cert"], 1)
    assert claims["exp"] - claims["iat"] == life_s


def test_no_proof_outlives_certificate_max_s(make_client: Callable[..., WsgiClient]) -> None:
    """Keys are shown for so long after they signed last."""
    client = make_client(certificate_max_s=60).verified()
    for more in ({}, {"format": "jwt", "audience": AUDIENCE}, {"duration": 3000}):
        body = {"publicKey": public("EC"), **more}
        claims = part(client.call("/certificate/sign", body).json["cert"], 1)
        assert claims["exp"] - claims["iat"] == 60


@pytest.mark.parametrize("form", ["sd-jwt", "jwt", "jwt without a key"])
def test_code_and_proof_in_one_step(client: WsgiClient, form: str) -> None:
    client.register()
    client.ask()
    body: dict[str, Any] = {"publicKey": public("EC")} if form != "jwt without a key" else {}
    if form != "sd-jwt":
        body |= {"format": "jwt", "audience": AUDIENCE}
    answer = client.call("/sms/verify_code", {"code": client.code(), **body}).json
    assert answer.keys() == {"msisdn", "cert"}
    assert part(answer["cert"], 1)["phone_number"] == NUMBER
    assert answer["cert"].endswith("~") == (form == "sd-jwt")


@pytest.mark.parametrize(
    ("body", "errno", "word"),
    [
        ({"format": "jwt"}, 108, "audience"),
        ({"format": "jwt", "audience": ""}, 108, "audience"),
        ({"format": "jwt", "audience": None}, 108, "audience"),
        ({"format": "jwt", "audience": "shop.example"}, 107, "audience"),
        ({"format": "jwt", "audience": "https://shop.example/login"}, 107, "audience"),
        ({"format": "jwt", "audience": "https://a@shop.example"}, 107, "audience"),
        ({"format": "jwt", "audience": ["https://shop.example"]}, 107, "audience"),
        ({"format": "jwt", "audience": AUDIENCE, "nonce": 5}, 107, "nonce"),
        ({"format": "jwt", "audience": AUDIENCE, "duration": 0}, 107, "duration"),
        (
            {"format": "jwt", "audience": AUDIENCE, "publicKey": {"algorithm": "RS"}},
            107,
            "publicKey",
        ),
        ({"format": "JWT", "publicKey": {}}, 107, "format"),
        ({"format": ["jwt"], "publicKey": {}}, 107, "format"),
        ({"format": True, "publicKey": {}}, 107, "format"),
    ],
)
@pytest.mark.parametrize("path", ["/certificate/sign", "/sms/verify_code"])
def test_what_cannot_be_asked_for(
    client: WsgiClient, path: str, body: dict[str, Any], errno: int, word: str
) -> None:
    """And no code is used up by it."""
    client.verified()
    assert client.ask().status == 200
    answer = client.call(path, {"code": client.code(), **body})
    assert (answer.status, answer.errno) == (400, errno)
    assert word in answer.json["message"]
    assert client.call("/sms/verify_code", {"code": client.code()}).status == 200


def test_a_browserid_key_gives_no_jwt(client: WsgiClient) -> None:
    """Its cnf could be read by nobody."""
    rs = gateway.public_key_json(key_of("RSA").public_key())
    body = {"format": "jwt", "audience": AUDIENCE, "publicKey": rs}
    answer = client.verified().call("/certificate/sign", body)
    assert (answer.errno, "JWK" in answer.json["message"]) == (107, True)


@pytest.mark.parametrize(
    "body", [{"publicKey": {"kty": "EC"}}, {"format": "jwt", "audience": "https://a"}]
)
def test_who_is_not_verified_gets_none(session: WsgiClient, body: dict[str, Any]) -> None:
    assert session.call("/certificate/sign", body).errno == 104


def jwk(name: str, **parts: Any) -> dict[str, Any]:
    """The JWK of a client with members exchanged (None removes one)."""
    return {n: v for n, v in (public(name) | parts).items() if v is not None}


def rsa_jwk(bits: int, e: int = 65537) -> dict[str, Any]:
    """A JWK of a fresh RSA key."""
    numbers = rsa.generate_private_key(65537, bits).public_key().public_numbers()
    return {"kty": "RSA", "n": b64(numbers.n.to_bytes(-(-bits // 8), "big")),
            "e": b64(e.to_bytes(4, "big").lstrip(b"\0"))}  # fmt: skip


def p384() -> dict[str, Any]:
    found = jwt.get_algorithm_by_name("ES384").to_jwk(
        ec.generate_private_key(ec.SECP384R1()).public_key(), as_dict=True
    )
    return dict(found)


P = 2**255 - 19
ORDER_8 = int.from_bytes(bytes.fromhex(
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"), "little")  # fmt: skip
SMALL = [y + sign for y in (0, 1, P - 1, P, P + 1, ORDER_8, P - ORDER_8) for sign in (0, 2**255)]
"""Every encoding of a y of small order that libsodium knows, with both signs of x."""


def plausible_n(bits: int) -> bytes:
    """A modulus of so many bits without a small factor, and no number of Fermat's."""
    odd = range(2 ** (bits - 1) + 3, 2**bits, 2)
    return next(n for n in odd if math.gcd(n, gateway.SMALL_FACTORS) == 1).to_bytes(513, "big")


REFUSED_JWKS: dict[str, Callable[[], Any]] = {
    "kty missing, so no JWK": lambda: jwk("EC", kty=None),
    "kty unknown": lambda: jwk("EC", kty="AKP"),
    "kty a list": lambda: jwk("EC", kty=["EC"]),
    "symmetric": lambda: {"kty": "oct", "k": b64(b"k" * 32)},
    "RSA called EC": lambda: jwk("RSA", kty="EC"),
    "EC called OKP": lambda: jwk("EC", kty="OKP"),
    "P-384": p384,
    "P-384 called P-256": lambda: p384() | {"crv": "P-256"},
    "P-256 called P-384": lambda: jwk("EC", crv="P-384"),
    "secp256k1": lambda: jwk("EC", crv="secp256k1"),
    "crv missing": lambda: jwk("EC", crv=None),
    "crv of OKP missing": lambda: jwk("OKP", crv=None),
    "Ed448": lambda: jwk("OKP", crv="Ed448"),
    "X25519": lambda: jwk("OKP", crv="X25519"),
    "x missing": lambda: jwk("EC", x=None),
    "y missing": lambda: jwk("EC", y=None),
    "y another": lambda: jwk("EC", y=public("EC other")["y"]),
    "x and y 0": lambda: jwk("EC", x=b64(bytes(32)), y=b64(bytes(32))),
    "x short": lambda: jwk("EC", x=public("EC")["x"][:-4]),
    "x long": lambda: jwk("EC", x=public("EC")["x"] + "AAAA"),
    "x a number": lambda: jwk("EC", x=5),
    "x a list": lambda: jwk("EC", x=[1]),
    "x no base64url": lambda: jwk("EC", x="é" * 43),
    "x a surrogate": lambda: jwk("EC", x="\ud800" * 43),
    "x of Ed25519 short": lambda: jwk("OKP", x="AAAA"),
    **{f"small order {n}": partial(jwk, "OKP", x=b64(y.to_bytes(32, "little")))
       for n, y in enumerate(SMALL)},
    "private EC": lambda: jwk("EC", d=b64(b"d" * 32)),
    "private OKP": lambda: jwk("OKP", d=b64(b"d" * 32)),
    "private RSA": lambda: jwk("RSA", d="AQAB", p="AQAB", q="AQAB"),
    **{f"private RSA, {name}": partial(jwk, "RSA", **{name: "AQAB"})
       for name in ("d", "p", "q", "dp", "dq", "qi", "oth")},
    "RSA of 1024 bits": lambda: rsa_jwk(1024),
    **{f"RSA of {bits} bits": partial(lambda bits: jwk("RSA", n=b64(plausible_n(bits))), bits)
       for bits in (2047, 4097)},
    "RSA, e 3": lambda: jwk("RSA", e="Aw"),
    "RSA, e 1": lambda: jwk("RSA", e="AQ"),
    "RSA, e even": lambda: jwk("RSA", e="AQAC"),
    "RSA, n prime": lambda: jwk("RSA", n=b64(
        rsa.generate_private_key(65537, 4096).private_numbers().p.to_bytes(256, "big"))),
    "RSA, n a multiple of 3": lambda: jwk("RSA", n=b64(
        (2**2047 // 3 * 3 + 3 | 1).to_bytes(256, "big"))),
    "RSA, n a number": lambda: jwk("RSA", n=5),
    "RSA, n empty": lambda: jwk("RSA", n=""),
    "RSA, e missing": lambda: jwk("RSA", e=None),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_JWKS)
def test_refused_jwks(name: str) -> None:
    key = REFUSED_JWKS[name]()
    readers: list[Callable[[Any], Any]] = [gateway.client_key]
    if "prime" in name:  # both look at that if nothing else is said
        readers.append(gateway.canonical_jwk)
    for read in readers:
        with pytest.raises(gateway.InvalidParameter) as caught:
            read(key)
        assert "publicKey must be" in caught.value.message


@pytest.mark.slow
@pytest.mark.parametrize("name", ["x a surrogate", "private EC", "RSA, n prime", "small order 1"])
def test_refused_jwks_over_http(client: WsgiClient, name: str) -> None:
    answer = client.verified().call("/certificate/sign", {"publicKey": REFUSED_JWKS[name]()})
    assert (answer.status, answer.errno) == (400, 106 if "surrogate" in name else 107)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2048, 3072, 4096])
def test_rsa_keys_of_these_sizes_are_taken(bits: int) -> None:
    key = rsa_jwk(bits)
    zeros = base64.urlsafe_b64decode(key["n"] + "==")
    padded = key | {"n": b64(bytes(2) + zeros), "e": "AAEAAQ", "kid": "x"}
    assert gateway.client_key(padded) == key  # the same key has one form


def test_anybody_can_sign_for_a_key_of_small_order() -> None:
    """Why these are refused: R and S of nothing verify, for one message in eight at least."""
    key = ed25519.Ed25519PublicKey.from_public_bytes((1).to_bytes(32, "little"))
    key.verify((1).to_bytes(32, "little") + bytes(32), b"whatever somebody wants")


def test_a_dear_key_of_who_only_guesses_is_not_looked_at(client: WsgiClient) -> None:
    """An RSA key of 4096 bits takes 150 ms."""
    client.register()
    client.ask()
    wrong = client.code().translate(str.maketrans("0123456789", "1234567890"))
    n = (2**4095 + 2**2000 + 1) | 1
    while math.gcd(n, gateway.SMALL_FACTORS) != 1:
        n += 2
    key = jwk("RSA", n=b64(n.to_bytes(512, "big")))
    began_s = time.thread_time()
    assert client.call("/sms/verify_code", {"code": wrong, "publicKey": key}).errno == 105
    assert time.thread_time() - began_s < 0.03 * shared()


# -- How the number was verified ---------------------------------------------------


def method(client: WsgiClient) -> str:
    """What the next proof says about it."""
    answer = client.call("/certificate/sign", {"publicKey": public("EC")})
    return str(part(answer.json["cert"], 1)["method"])


def text(client: WsgiClient) -> None:
    """The phone sends the Hawk id."""
    assert client.credentials
    path = f"/sms/momt/?provider=nexmo&msisdn={NUMBER[1:]}&text={client.credentials.hawk_id}"
    assert client.get(path).status == 200


def verify(client: WsgiClient) -> None:
    """Return the newest code."""
    assert client.call("/sms/verify_code", {"code": client.code()}).status == 200


def test_method_by_a_message_that_the_client_asked_for(session: WsgiClient) -> None:
    session.ask()
    verify(session)
    assert method(session) == "sms/mt"
    session.call("/sms/resend_code")
    assert method(session) == "sms/mt"


def test_method_by_a_message_that_the_phone_asked_for(session: WsgiClient) -> None:
    """It stays that, whatever is asked for later, until another code comes back."""
    text(session)
    verify(session)
    assert method(session) == "sms/momt"
    session.ask()
    assert method(session) == "sms/momt"
    session.call("/sms/resend_code")
    assert method(session) == "sms/momt"
    verify(session)
    assert method(session) == "sms/mt"


def test_method_of_a_code_that_was_asked_for_by_both(session: WsgiClient) -> None:
    """The client asks again while the code that the phone asked for waits: the newest counts."""
    text(session)
    session.call("/sms/resend_code")
    verify(session)
    assert method(session) == "sms/mt"


def test_a_client_that_asked_is_not_overtaken_by_an_sms(session: WsgiClient) -> None:
    """What ``User.method`` builds upon."""
    session.ask()
    text(session)
    assert len(session.outbox()) == 1


# -- The key documents ---------------------------------------------------------------


def test_the_key_documents(make_client: Callable[..., WsgiClient]) -> None:
    client = make_client(public_url="https://id.example", sms_providers=[
        {"kind": "nexmo", "api_key": "a", "api_secret": "b"}], mt_sender="Shop",
        countries=["GB"], trusted_proxies=[])  # fmt: skip
    answer = client.get("/.well-known/jwks.json")
    (key,) = answer.json["keys"]
    assert key.keys() == {"kty", "crv", "x", "y", "kid", "alg", "use"}
    members = {name: key[name] for name in ("crv", "kty", "x", "y")}  # in RFC 7638's order
    thumbprint = hashlib.sha256(json.dumps(members, separators=(",", ":")).encode()).digest()
    assert (key["kid"], key["alg"], key["use"]) == (b64(thumbprint), "ES256", "sig")
    metadata = client.get("/.well-known/jwt-vc-issuer")
    assert metadata.json == {
        "issuer": "https://id.example", "jwks_uri": "https://id.example/.well-known/jwks.json"
    }  # fmt: skip
    kind = client.get("/vct/phone/1")
    assert kind.json["vct"] == "https://id.example/vct/phone/1"
    for found in (answer, metadata, kind):
        assert found.headers["cache-control"] == "max-age=300"


# -- Pseudonyms ------------------------------------------------------------------------


def test_pseudonyms_differ_by_audience_number_and_secret(client: WsgiClient) -> None:
    def sub(audience: str, number: str = NUMBER) -> str:
        other = client.another().verified(number)
        body = {"format": "jwt", "audience": audience}
        return str(part(other.call("/certificate/sign", body).json["cert"], 1)["sub"])

    first = sub(AUDIENCE)
    others = [
        sub("https://forum.example"),
        sub(AUDIENCE, "+447700900124"),
        sub("http://shop.example"),
    ]
    assert sub(AUDIENCE + "/") == first
    assert len({first, *others}) == 4
    assert first == gateway.pseudonym_for(
        client.gateway.secrets.pairwise, gateway.Msisdn(NUMBER), AUDIENCE
    )
    assert first != gateway.pseudonym_for(bytes(32), gateway.Msisdn(NUMBER), AUDIENCE)


@pytest.mark.parametrize("name", sorted(hashlib.algorithms_guaranteed))
def test_no_pseudonym_can_be_computed_by_others(client: WsgiClient, name: str) -> None:
    """Not as a digest of what everybody knows, and not from another pseudonym of the number."""
    secrets = client.gateway.secrets
    known = gateway.pseudonym_for(secrets.pairwise, gateway.Msisdn(NUMBER), "https://forum.example")
    principal = gateway.principal_for(secrets.principal, gateway.Msisdn(NUMBER), "a")
    found = gateway.pseudonym_for(secrets.pairwise, gateway.Msisdn(NUMBER), AUDIENCE)
    for first in (NUMBER, NUMBER[1:], known, principal, "pairwise"):
        for text in (first, AUDIENCE + first, f"{AUDIENCE} {first}", f"{first} {AUDIENCE}"):
            digest = hashlib.new(name, text.encode())
            plain = digest.hexdigest(*((16,) if digest.digest_size == 0 else ()))
            assert plain[:12] != found.replace("-", "")[:12]


# -- What is believed --------------------------------------------------------------------


def holds(token: str, **claims: Any) -> dict[str, Any]:
    """The claims of a token, some exchanged (None removes one)."""
    return {n: v for n, v in (part(token, 1) | claims).items() if v is not None}


def again(world: World, token: str, header: Any = None, key: Any = None, **claims: Any) -> str:
    """The gateway's own token with changes, signed anew by its own key, or by another one."""
    head = {n: v for n, v in (part(token, 0) | (header or {})).items() if v is not None}
    signer = world.app.gateway.keys.signer(time.time()).private
    return forged(head, holds(token, **claims), key or signer)


def spki(key: Any) -> bytes:
    """Our public key as everybody can write it: HS256's classic."""
    form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    return bytes(key.public_key().public_bytes(*form))


def bad_headers(world: World, token: str) -> dict[str, str]:
    """Forgeries of one of our tokens that its header is to get believed. ``token`` has no ``~``."""
    own, stranger = world.app.gateway.keys, key_of("EC stranger")
    head, claims = part(token, 0), holds(token, phone_number="+447700900666")
    theirs = public("EC stranger")
    kid = head["kid"]
    swapped = "JWT" if head["typ"] == "dc+sd-jwt" else "dc+sd-jwt"
    signer = own.signer(time.time()).private
    return {
        "changed claims": ".".join(
            (token.split(".")[0], b64(json.dumps(claims).encode()), token.split(".")[2])
        ),
        "alg none": forged(head | {"alg": "none"}, claims, None),
        "alg NONE": forged(head | {"alg": "NONE"}, claims, None),
        "alg none, old signature": forged(head | {"alg": "none"}, claims, None)
        + token.split(".")[2],
        "alg missing": forged({"kid": kid, "typ": head["typ"]}, claims, None),
        "HS256 by our PEM": forged(head | {"alg": "HS256"}, claims, spki(signer)),
        "HS256 by our JWK": forged(
            head | {"alg": "HS256"}, claims, json.dumps(world.jwks["keys"][0]).encode()
        ),
        "HS256 by our x": forged(
            head | {"alg": "HS256"},
            claims,
            base64.urlsafe_b64decode(world.jwks["keys"][0]["x"] + "="),
        ),
        "HS256 by nothing": forged(head | {"alg": "HS256"}, claims, b""),
        "RS256 by the BrowserID pair": forged(head | {"alg": "RS256"}, claims, own.browserid),
        "RS256 called ES256": forged(head, claims, own.browserid),
        "ES256 called RS256": again(world, token, {"alg": "RS256"}),
        "ES256 called ES384": again(world, token, {"alg": "ES384"}),
        "ES256 called EdDSA": again(world, token, {"alg": "EdDSA"}),
        "jwk in the header": forged(head | {"jwk": theirs}, claims, stranger),
        "jwk in the header, no kid": forged(
            {"alg": "ES256", "typ": head["typ"], "jwk": theirs}, claims, stranger
        ),
        "jwk in the header, kid its own": forged(
            head | {"jwk": theirs | {"kid": "a"}, "kid": "a"}, claims, stranger
        ),
        "x5u in the header": forged(head | {"x5u": "https://evil.example"}, claims, stranger),
        "jku in the header": forged(head | {"jku": "https://evil.example/j"}, claims, stranger),
        "another kid": again(world, token, {"kid": "another"}),
        "another kid, another key": forged(head | {"kid": "another"}, claims, stranger),
        "kid of ours, another key": forged(head, claims, stranger),
        "kid a list": again(world, token, {"kid": [kid]}),
        "typ swapped": again(world, token, {"typ": swapped}),
        "typ of a KB-JWT": again(world, token, {"typ": "kb+jwt"}),
        "crit unknown": again(world, token, {"crit": ["exp2"], "exp2": 1}),
        "b64 false": again(world, token, {"crit": ["b64"], "b64": False}),
    }


def bad_claims(world: World, token: str) -> dict[str, str]:
    """Tokens that our own key signed, and that say what must not be believed."""
    now_s = int(time.time())
    return {
        "expired": again(world, token, iat=now_s - 4000, exp=now_s - 120),
        "exp missing": again(world, token, exp=None),
        "exp a text": again(world, token, exp="tomorrow"),
        "from the future": again(world, token, iat=now_s + 3600, exp=now_s + 7200),
        "another issuer": again(world, token, iss="https://other.example"),
        "issuer a prefix": again(world, token, iss=ISSUER + ".evil.example"),
        "issuer missing": again(world, token, iss=None),
    }


def bad_shown(world: World) -> dict[str, tuple[str, str]]:
    """What nobody may believe: form and text, by name."""
    proof, bearer = world.proofs["EC"], world.proofs["jwt"]
    inner = proof.rstrip("~")
    found: dict[str, tuple[str, str]] = {}
    for name, token in (bad_headers(world, inner) | bad_claims(world, inner)).items():
        found[f"proof: {name}"] = ("sd-jwt", f"{token}~" + binding(f"{token}~"))
    for name, token in (bad_headers(world, bearer) | bad_claims(world, bearer)).items():
        found[f"JWT: {name}"] = ("jwt", token)
    now_s, digest = int(time.time()), b64(hashlib.sha256(proof.encode()).digest())
    other = world.proofs["OKP"]
    note = {"aud": AUDIENCE, "nonce": NONCE, "iat": now_s, "sd_hash": digest}
    kb = {"alg": "ES256", "typ": "kb+jwt"}
    bindings = {
        "none": "",
        "of another client": binding(proof, "EC other"),
        "another audience": binding(proof, aud="https://evil.example"),
        "audience a prefix": binding(proof, aud=AUDIENCE + ".evil.example"),
        "audience missing": binding(proof, aud=None),
        "another nonce": binding(proof, nonce="another"),
        "nonce missing": binding(proof, nonce=None),
        "another proof": binding(proof, sd_hash=b64(hashlib.sha256(other.encode()).digest())),
        "without the ~": binding(proof, sd_hash=b64(hashlib.sha256(inner.encode()).digest())),
        "padded hash": binding(proof, sd_hash=digest + "="),
        "hash missing": binding(proof, sd_hash=None),
        "old": binding(proof, iat=now_s - 900),
        "from the future": binding(proof, iat=now_s + 900),
        "iat missing": binding(proof, iat=None),
        "iat a text": binding(proof, iat=str(now_s)),
        "typ JWT": binding(proof, header={"typ": "JWT"}),
        "typ of a proof": binding(proof, header={"typ": "dc+sd-jwt"}),
        "alg none": forged({"alg": "none", "typ": "kb+jwt"}, note, None),
        "HS256 by the client's x": forged(
            kb | {"alg": "HS256"}, note, base64.urlsafe_b64decode(public("EC")["x"] + "=")
        ),
        "jwk in the header": forged(kb | {"jwk": public("EC other")}, note, key_of("EC other")),
        "Ed25519 for an EC key": binding(proof, "OKP"),
        "by the gateway": forged(kb, note, world.app.gateway.keys.signer(now_s).private),
        "crit unknown": forged(kb | {"crit": ["x"], "x": 1}, note, key_of("EC")),
    }
    found |= {f"binding: {name}": ("sd-jwt", proof + kb) for name, kb in bindings.items()}
    with_cnf = world.proofs["jwt with cnf"]
    backed = (
        world.certificate
        + "~"
        + gateway.make_assertion(key_of("RSA"), AUDIENCE, 1000 * now_s + 60_000)
    )
    found |= {
        "two ~": ("sd-jwt", proof + "~" + binding(proof)),
        "a disclosure": ("sd-jwt", proof + "WyJhIiwiYiIsImMiXQ~" + binding(proof)),
        "two bindings": ("sd-jwt", proof + binding(proof) + "~" + binding(proof)),
        "no proof": ("sd-jwt", "~" + binding(proof)),
        "nothing": ("sd-jwt", "~"),
        "swapped": ("sd-jwt", binding(proof) + "~" + inner),
        "a chain": ("sd-jwt", proof + forged(
            part(inner, 0) | {"typ": "dc+sd-jwt"}, holds(inner), key_of("EC")) + "~"
            + binding(proof)),
        "a JWT as SD-JWT": ("sd-jwt", f"{bearer}~" + binding(f"{bearer}~")),
        "a JWT with cnf as SD-JWT": (
            "sd-jwt", f"{with_cnf}~" + binding(f"{with_cnf}~")),
        "an SD-JWT as JWT": ("jwt", inner),
        "an SD-JWT with its ~ as JWT": ("jwt", proof),
        "a KB-JWT as JWT": ("jwt", binding(proof)),
        "JWT: another audience": ("jwt", again(world, bearer, aud="https://evil.example")),
        "JWT: audience missing": ("jwt", again(world, bearer, aud=None)),
        "JWT: another nonce": ("jwt", again(world, bearer, nonce="another")),
        "a certificate as JWT": ("jwt", world.certificate),
        "a certificate as SD-JWT": (
            "sd-jwt", f"{world.certificate}~" + binding(f"{world.certificate}~")),
        "certificate and assertion": ("sd-jwt", backed),
        "certificate and assertion, as JWT": ("jwt", backed),
    }  # fmt: skip
    return found


def test_ours_believe_what_is_right(world: World) -> None:
    for form, shown in world.shown.items():
        assert ours(form, shown, world.jwks) == NUMBER
        for audience in (AUDIENCE + "/", "https://SHOP.example:443"):
            assert ours(form, shown, world.jwks, audience=audience) == NUMBER


def test_ours_refuse_what_is_wrong(world: World) -> None:
    believed = []
    for name, (form, shown) in bad_shown(world).items():
        try:
            ours(form, shown, world.jwks)
            believed.append(name)
        except gateway.InvalidToken:
            pass
    assert believed == []


def test_ours_refuse_a_binding_with_anything_critical(world: World) -> None:
    """PyJWT knows this one, and would take it."""
    proof = world.proofs["EC"]
    shown = proof + binding(proof, header={"crit": ["b64"], "b64": True})
    with pytest.raises(gateway.InvalidToken, match="no KB-JWT"):
        ours("EC", shown, world.jwks)


def test_ours_refuse_names_that_are_there_twice(world: World) -> None:
    """Also where our own key signed it, or the client's."""
    proof = world.proofs["EC"].rstrip("~")
    head, claims = part(proof, 0), json.dumps(holds(proof)).encode()
    signer = world.app.gateway.keys.signer(time.time()).private
    twice = forged(head, claims.replace(b"{", b'{"phone_number":"+1",', 1), signer) + "~"
    header = json.dumps(head).encode().replace(b"{", b'{"typ":"JWT",', 1)
    note = json.dumps(part(binding(proof + "~"), 1)).encode().replace(b"{", b'{"nonce":"x",', 1)
    for shown in (
        twice + binding(twice),
        forged(header, claims, signer) + "~" + binding(forged(header, claims, signer) + "~"),
        proof + "~" + forged({"alg": "ES256", "typ": "kb+jwt"}, note, key_of("EC")),
    ):
        with pytest.raises(gateway.InvalidToken):
            ours("EC", shown, world.jwks)


@pytest.mark.parametrize("jwks", [{}, {"keys": []}, {"keys": [5]}, {"keys": [{"kty": "EC"}]}])
def test_ours_refuse_by_another_key_document(world: World, jwks: Any) -> None:
    with pytest.raises(gateway.InvalidToken):
        ours("jwt", world.proofs["jwt"], jwks)


@pytest.mark.parametrize("kind", ["RSA", "OKP", "P-384", "oct"])
def test_ours_refuse_by_a_key_of_another_kind(world: World, kind: str) -> None:
    """Some issuers list several kinds: the token chooses among them, by its kid."""
    other = {"oct": {"kty": "oct", "k": b64(b"k" * 32)}, "P-384": p384()}.get(kind)
    jwks = {"keys": [*world.jwks["keys"], (other or public(kind)) | {"kid": "other"}]}
    token = again(world, world.proofs["jwt"], {"kid": "other"})
    with pytest.raises(gateway.InvalidToken):
        ours("jwt", token, jwks)
    assert ours("jwt", world.proofs["jwt"], jwks) == NUMBER


def test_no_proof_is_a_certificate(world: World) -> None:
    """BrowserID's verifier takes none of the new forms."""
    key, now_ms = world.app.gateway.keys.browserid.public_key(), int(time.time() * 1000)
    assertion = gateway.make_assertion(key_of("RSA"), AUDIENCE, now_ms + 60_000)
    issuer = world.app.settings.issuer
    good = f"{world.certificate}~{assertion}"
    assert gateway.verify_backed_assertion(good, AUDIENCE, issuer, key, now_ms)
    for proof in (*world.proofs.values(), *world.shown.values()):
        for backed in (proof, f"{proof}~{assertion}", f"{proof}{assertion}"):
            with pytest.raises(gateway.InvalidToken):
                gateway.verify_backed_assertion(backed, AUDIENCE, issuer, key, now_ms)


def changes(text: str, seed: int, count: int) -> Iterator[str]:
    """The text with one character changed, at ``count`` places and at each end of each piece."""
    random, alphabet = (
        Random(seed),
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_",
    )
    ends = [m.start() + step for m in re.finditer(r"[.~]|$", text) for step in (-1, 0, 1)]
    places = {n for n in ends if 0 <= n < len(text)} | {*random.sample(range(len(text)), count)}
    for n in sorted(places):
        other = random.choice([c for c in alphabet + ".~=" if c != text[n]])
        yield text[:n] + other + text[n + 1 :]
    spare = [m.start() - 1 for m in re.finditer(r"[.~]|$", text)]  # bits that base64url leaves
    for n in spare if seed % 25 == 0 else ():
        for other in alphabet:
            if other != text[n]:
                yield text[:n] + other + text[n + 1 :]


@pytest.mark.slow
@pytest.mark.parametrize("form", [*FORMS, "certificate"])
def test_every_changed_character_is_noticed(world: World, form: str) -> None:
    """50 proofs of each form, some of their characters each; PROOF_CHANGES=2000 tries all."""
    count, proofs = int(os.environ.get("PROOF_CHANGES", "12")), 50
    now_s = int(time.time())
    key, issuer = world.app.gateway.keys, world.app.settings.issuer
    short = gateway.generate_key("RS128")
    for seed in range(proofs):
        about = ISSUER, gateway.Msisdn(f"+4477009{seed:05}"), "sms/mt", now_s, now_s, 600
        claims = gateway.phone_claims(*about)
        if form == "certificate":
            public_key = gateway.public_key_json(short.public_key())
            who = key.browserid, issuer, f"{seed}@{issuer}", public_key, about[1]
            shown = gateway.issue_certificate(*who, now_s, now_s * 1000, 600) + "~"
            shown += gateway.make_assertion(short, AUDIENCE, now_s * 1000 + 60_000)
        elif form.startswith("jwt"):
            claims |= {"aud": AUDIENCE, "nonce": NONCE, "jti": f"{seed:032x}", "sub": "a"}
            if form == "jwt with cnf":
                claims["cnf"] = {"jwk": gateway.client_key(public("EC"))}
            shown = gateway.issue_proof(key.signer(now_s), claims)
        else:
            claims["cnf"] = {"jwk": gateway.client_key(public(form))}
            proof = gateway.issue_proof(key.signer(now_s), claims)
            shown = proof + binding(proof, form)

        def check(text: str) -> object:
            if form != "certificate":
                return ours(form, text, world.jwks)
            args = AUDIENCE, issuer, key.browserid.public_key(), now_s * 1000
            return gateway.verify_backed_assertion(text, *args)

        assert check(shown)
        for changed in changes(shown, seed, min(count, len(shown))):
            with pytest.raises(gateway.InvalidToken):
                check(changed)


# -- Foreign verifiers -----------------------------------------------------------------------


def by_pyjwt(world: World) -> Callable[[str, str], str]:
    """The thirty lines that the lesson gives to relying parties, over HTTP."""
    party, keys = relying_party(), jwt.PyJWKClient(f"{world.address}/.well-known/jwks.json")

    def judge(form: str, shown: str) -> str:
        args = shown, keys, ISSUER, AUDIENCE, NONCE
        return str(party.number_of_jwt(*args, set()) if form == "jwt" else
                   party.number_of_sd_jwt(*args))  # fmt: skip

    return judge


def by_joserfc(world: World) -> Callable[[str, str], str]:
    """As the page for relying parties tells to call joserfc."""
    from joserfc import jwt as jose
    from joserfc.errors import JoseError, SecurityWarning
    from joserfc.jwk import KeySet, import_key

    keys = KeySet.import_key_set(cast(Any, world.jwks))

    def opened(token: str, key: Any, algorithm: str, typ: str, **wanted: Any) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SecurityWarning)  # EdDSA has a newer name
                found = jose.decode(token, key, algorithms=[algorithm])
            jose.JWTClaimsRegistry(leeway=60, **wanted).validate(found.claims)
        except (JoseError, KeyError, TypeError, AttributeError) as error:
            raise ValueError("refused") from error
        if found.header.get("typ") != typ:
            raise ValueError("another form")
        return found.claims

    must = {"essential": True}
    iss, aud = must | {"value": ISSUER}, must | {"value": AUDIENCE}

    def judge(form: str, shown: str) -> str:
        wanted: dict[str, Any] = {"iss": iss, "exp": must, "iat": must}
        if form == "jwt":
            claims = opened(shown, keys, "ES256", "JWT", aud=aud, jti=must, **wanted)
            if claims.get("nonce") != NONCE:
                raise ValueError("another nonce")
            return str(claims["phone_number"])
        proof, kb = shown.split("~")
        claims = opened(proof, keys, "ES256", "dc+sd-jwt", cnf=must, **wanted)
        algorithm = {"EC": "ES256", "OKP": "EdDSA", "RSA": "RS256"}[claims["cnf"]["jwk"]["kty"]]
        note = opened(kb, import_key(claims["cnf"]["jwk"]), algorithm, "kb+jwt", aud=aud, iat=must)
        return bound(claims, note, proof)

    return judge


def bound(claims: Any, note: Any, proof: str) -> str:
    """What every relying party has to do itself for a KB-JWT whose signature is right."""
    digest = b64(hashlib.sha256(f"{proof}~".encode()).digest())
    if (note.get("nonce"), note.get("sd_hash")) != (NONCE, digest):
        raise ValueError("another nonce, or proof")
    if type(note["iat"]) is not int or abs(time.time() - note["iat"]) > 300:
        raise ValueError("too old, or from the future")
    return str(claims["phone_number"])


def by_jwcrypto(world: World) -> Callable[[str, str], str]:
    """As the page for relying parties tells to call jwcrypto."""
    from jwcrypto.common import JWException
    from jwcrypto.jwk import JWK, JWKSet
    from jwcrypto.jwt import JWT

    keys = JWKSet.from_json(json.dumps(world.jwks))

    def opened(token: str, key: Any, algorithm: str, typ: str, **wanted: Any) -> Any:
        try:
            found = JWT(
                jwt=token, key=key, algs=[algorithm], check_claims=wanted, expected_type="JWS"
            )
        except (JWException, KeyError, ValueError, TypeError) as error:
            raise ValueError("refused") from error
        if json.loads(found.header).get("typ") != typ:
            raise ValueError("another form")
        claims = json.loads(found.claims)
        if "exp" in wanted and claims["iat"] > time.time() + 60:
            raise ValueError("from the future")
        return claims

    def judge(form: str, shown: str) -> str:
        wanted: dict[str, Any] = {"iss": ISSUER, "exp": None, "iat": None}
        if form == "jwt":
            wanted |= {"aud": AUDIENCE, "jti": None, "nonce": NONCE}
            return str(opened(shown, keys, "ES256", "JWT", **wanted)["phone_number"])
        proof, kb = shown.split("~")
        claims = opened(proof, keys, "ES256", "dc+sd-jwt", cnf=None, **wanted)
        algorithm = {"EC": "ES256", "OKP": "EdDSA", "RSA": "RS256"}[claims["cnf"]["jwk"]["kty"]]
        key = JWK(**claims["cnf"]["jwk"])
        note = opened(
            kb, key, algorithm, "kb+jwt", aud=AUDIENCE, nonce=NONCE, iat=None, sd_hash=None
        )
        return bound(claims, note, proof)

    return judge


JUDGES = {"PyJWT": by_pyjwt, "joserfc": by_joserfc, "jwcrypto": by_jwcrypto}


@pytest.mark.parametrize("name", [
    "PyJWT", pytest.param("joserfc", marks=needs_python),
    pytest.param("jwcrypto", marks=needs_python),
])  # fmt: skip
def test_python_libraries_agree(world: World, name: str) -> None:
    judge = JUDGES[name](world)
    for form, shown in world.shown.items():
        assert judge(form.split()[0], shown) == NUMBER, form
    bad, believed = bad_shown(world), []
    assert len(bad) > 2 * len(FORMS)
    for case, (form, shown) in bad.items():
        try:
            judge(form, shown)
            believed.append(case)
        except ValueError:
            pass
    assert believed == []


@pytest.fixture(scope="module")
def run_node(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], Any]:
    """Run ``foreign_proofs.mjs`` with this input, both libraries beside it."""
    folder = tmp_path_factory.mktemp("node")
    (folder / "node_modules").mkdir()
    for modules in NODE.values():
        for path in modules.glob("[!.]*"):
            (folder / "node_modules" / path.name).symlink_to(path)
    shutil.copy(ROOT / "tests" / "foreign_proofs.mjs", folder)
    shutil.copy(ROOT / "notebooks" / "relying_party.mjs", folder)

    def run(what: Any) -> Any:
        done = subprocess.run(
            ["node", "foreign_proofs.mjs"], input=json.dumps(what), cwd=folder,
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.mark.slow
@needs_node
def test_javascript_libraries_agree(world: World, run_node: Callable[[Any], Any]) -> None:
    """jose by the thirty lines of the lesson, and @sd-jwt/core."""
    party = {"issuer": ISSUER, "audience": AUDIENCE, "nonce": NONCE}
    good = [{"form": form.split()[0], "shown": shown, **party}
            for form, shown in world.shown.items()]  # fmt: skip
    bad = [{"form": form, "shown": shown, **party} for form, shown in bad_shown(world).values()]
    jwks = f"{world.address}/.well-known/jwks.json"
    found = run_node({"judge": {"jwks": jwks, "cases": good + bad}})
    for case, verdicts in zip(good, found, strict=False):
        assert set(verdicts.values()) == {NUMBER}, case["form"]
        assert len(verdicts) == (1 if case["form"] == "jwt" else 2)
    believed = {
        name: verdicts
        for name, verdicts in zip(bad_shown(world), found[len(good) :], strict=True)
        if any(verdicts.values())
    }
    assert believed == {}


@pytest.mark.slow
@needs_node
def test_what_javascript_libraries_present_is_believed(
    client: WsgiClient, run_node: Callable[[Any], Any]
) -> None:
    """Keys and KB-JWTs by jose and @sd-jwt/core, for all kinds of keys."""
    client.verified()
    site = {"audience": AUDIENCE, "nonce": NONCE}
    pairs = run_node({"present": {"privateKeys": None, **site}})
    for pair in pairs.values():
        answer = client.call("/certificate/sign", {"publicKey": pair["public"]})
        pair["proof"] = answer.json["cert"]
    jwks = client.get("/.well-known/jwks.json").json
    found = run_node({"present": {"privateKeys": pairs, **site}})
    assert found.keys() == {"EC", "OKP", "RSA"}
    for shown in found.values():
        assert shown.keys() == {"jose", "sd-jwt"}
        for text in shown.values():
            assert ours("EC", text, jwks) == NUMBER
            with pytest.raises(gateway.InvalidToken):
                ours("EC", text, jwks, audience="https://evil.example")


@pytest.mark.parametrize("alg", ["Ed25519", "PS256"])
def test_the_other_algorithms_of_a_key_are_known(world: World, alg: str) -> None:
    """Ed25519 is RFC 9864's name for EdDSA."""
    kty = "OKP" if alg == "Ed25519" else "RSA"
    proof = world.proofs[kty]
    note = part(binding(proof), 1)
    head = {"alg": alg, "typ": "kb+jwt"}
    if kty == "OKP":
        kb = forged(head, note, key_of("OKP"))
    else:
        kb = jwt.encode(note, key_of("RSA"), "PS256", {"typ": "kb+jwt"})
    assert ours(kty, proof + kb, world.jwks) == NUMBER


def test_a_jwt_works_once_where_the_site_does_its_duty(world: World) -> None:
    party, keys = relying_party(), jwt.PyJWKClient(f"{world.address}/.well-known/jwks.json")
    used: set[str] = set()
    args = world.proofs["jwt"], keys, ISSUER, AUDIENCE, NONCE, used
    assert party.number_of_jwt(*args) == NUMBER
    with pytest.raises(ValueError, match="shown before"):
        party.number_of_jwt(*args)


def test_a_fresh_proof_of_a_number_verified_long_ago_is_refused(world: World) -> None:
    """The gateway signs for a year after the code was right; in a year numbers change hands."""
    party, keys = relying_party(), jwt.PyJWKClient(f"{world.address}/.well-known/jwks.json")
    now_s, number = int(time.time()), gateway.Msisdn(NUMBER)
    more = {"aud": AUDIENCE, "nonce": NONCE, "sub": "somebody"}
    for days, jti in ((29, "young"), (31, "old")):
        times = now_s - days * 86400, now_s, 600
        claims = gateway.phone_claims(ISSUER, number, "sms/mt", *times) | more | {"jti": jti}
        token = gateway.issue_proof(world.app.gateway.keys.signer(now_s), claims)
        args = token, keys, ISSUER, AUDIENCE, NONCE, set[str]()
        if jti == "young":
            assert party.number_of_jwt(*args) == NUMBER
        else:
            with pytest.raises(ValueError, match="too long ago"):
                party.number_of_jwt(*args)


def test_the_lines_for_relying_parties_are_thirty() -> None:
    """As the lesson promises: no docstring, no comment, nothing blank; each of the two forms."""
    party, javascript = relying_party(), (ROOT / "notebooks" / "relying_party.mjs").read_text()
    for functions in (("checked", "number_of_sd_jwt"), ("checked", "number_of_jwt")):
        lines = 0
        for name in functions:
            node: Any = ast.parse(inspect.getsource(getattr(party, name))).body[0]
            node.body = node.body[1:] if ast.get_docstring(node) else node.body
            lines += len(ast.unparse(node).splitlines())
        assert lines <= 35
    code = [line for line in javascript.splitlines() if line.strip() and line[:2] != "//"]
    assert len(code) <= 39  # for both


# -- What it costs ------------------------------------------------------------------------------


def test_an_sd_jwt_costs_at_most_half_of_a_certificate(world: World) -> None:
    keys, now_s = world.app.gateway.keys, int(time.time())
    browserid = gateway.public_key_json(key_of("RSA").public_key())
    today = gateway.client_key(public("EC"))
    number = gateway.Msisdn(NUMBER)

    def certificate() -> str:
        who = keys.browserid, "id.example", "a@id.example", browserid, number
        return gateway.issue_certificate(*who, now_s, now_s * 1000, 3600)

    def sd_jwt() -> str:
        claims = gateway.phone_claims("https://id.example", number, "sms/mt", now_s, now_s, 3600)
        return gateway.issue_proof(keys.signer(now_s), claims | {"cnf": {"jwk": today}})

    def cost_s(make: Callable[[], str]) -> float:
        began_s = time.thread_time()
        for _ in range(100):
            make()
        return time.thread_time() - began_s

    costs = [(cost_s(sd_jwt), cost_s(certificate)) for _ in range(5)]
    assert min(c[0] for c in costs) <= min(c[1] for c in costs) / 2, costs
