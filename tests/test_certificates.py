"""BrowserID: what is issued, what is believed, which client keys and key files are taken."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import math
import os
import re
import stat
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jwt
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, padding, rsa, utils
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from servers import wait_for
from support import NUMBER, WsgiClient, shared

import gateway

MSISDN = gateway.Msisdn(NUMBER)
ISSUER = "id.example:8443"
AUDIENCE = "https://shop.example"
EMAIL = f"4b1bd2a6-3f3e-4a55-9d5a-6d1e4f2f9d10@{ISSUER}"
NOW_MS = 1_700_000_000_123
KINDS = ("RS128", "RS256", "DS128", "DS256")
SIZES = {"RS128": 128, "RS256": 256, "DS128": 40, "DS256": 64}
"""Bytes of a signature by each kind of key."""


# -- Keys, and an independent eye on tokens -----------------------------------


@cache
def key_of(name: str) -> Any:
    """A private key, made once: ``RS256``; further ones are told apart: ``RS256 server``.

    DSA keys of one size share parameters, because those take long to find.
    """
    algorithm, _, which = name.partition(" ")
    if algorithm.startswith("DS") and which:
        return key_of(algorithm).parameters().generate_private_key()
    return gateway.generate_key(algorithm)


def public(name: str) -> dict[str, Any]:
    """The public half of ``key_of(name)`` in BrowserID's form, written by this test."""
    numbers = key_of(name).public_key().public_numbers()
    if name.startswith("RS"):
        return {"algorithm": "RS", "n": str(numbers.n), "e": str(numbers.e)}
    g = numbers.parameter_numbers
    texts = {"y": f"{numbers.y:x}", "p": f"{g.p:x}", "q": f"{g.q:x}", "g": f"{g.g:x}"}
    return {"algorithm": "DS", **texts}


def b64(data: bytes | bytearray) -> str:
    """base64url without padding."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def unb64(text: str) -> bytes:
    """The inverse of ``b64``; nothing but its alphabet is taken."""
    assert re.fullmatch("[A-Za-z0-9_-]+", text)
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


class Opened(NamedTuple):
    """A token taken apart."""

    header: dict[str, Any]
    claims: dict[str, Any]
    signed: bytes
    signature: bytes


def opened(token: str) -> Opened:
    """Take a token apart without checking it."""
    header, payload, signature = token.split(".")
    signed = f"{header}.{payload}".encode()
    return Opened(json.loads(unb64(header)), json.loads(unb64(payload)), signed, unb64(signature))


def hash_of(algorithm: str) -> hashes.HashAlgorithm:
    """The hash that goes with an algorithm: SHA-1 for DS128 only."""
    return hashes.SHA1() if algorithm == "DS128" else hashes.SHA256()


def check_signature(token: str, name: str) -> None:
    """Check a token with ``cryptography`` alone; raises ``InvalidSignature``."""
    algorithm, key = name.split()[0], key_of(name).public_key()
    header, _, signed, signature = opened(token)
    assert header == {"alg": algorithm}
    assert len(signature) == SIZES[algorithm]
    if algorithm.startswith("RS"):
        key.verify(signature, signed, padding.PKCS1v15(), hash_of(algorithm))
        return
    half = len(signature) // 2
    r, s = int.from_bytes(signature[:half], "big"), int.from_bytes(signature[half:], "big")
    key.verify(utils.encode_dss_signature(r, s), signed, hash_of(algorithm))


def raw_signature(signed: bytes, name: str) -> bytes:
    """Sign with ``cryptography`` alone, in the format of the contract."""
    algorithm, key = name.split()[0], key_of(name)
    if algorithm.startswith("RS"):
        return bytes(key.sign(signed, padding.PKCS1v15(), hash_of(algorithm)))
    size = SIZES[algorithm] // 2
    r, s = utils.decode_dss_signature(key.sign(signed, hash_of(algorithm)))
    return r.to_bytes(size, "big") + s.to_bytes(size, "big")


def handmade(claims: Any, name: str, header: Any = None) -> str:
    """A token made without the gateway; ``claims`` and ``header`` may be raw bytes."""
    header = {"alg": name.split()[0]} if header is None else header
    parts = [p if isinstance(p, bytes) else json.dumps(p).encode() for p in (header, claims)]
    signed = ".".join(b64(part) for part in parts)
    return f"{signed}.{b64(raw_signature(signed.encode(), name))}"


def certificate(client: str = "RS128", server: str = "RS256 server", **options: Any) -> str:
    """A certificate from the gateway's function, good at ``NOW_MS``."""
    values = {
        "key": key_of(server),
        "issuer": ISSUER,
        "email": EMAIL,
        "client_key": public(client),
        "msisdn": MSISDN,
        "verified_s": 1_699_999_000,
        "now_ms": NOW_MS,
        "duration_s": 3600,
    }
    return gateway.issue_certificate(**{**values, **options})


def claims_of_certificate(client: str = "RS128") -> dict[str, Any]:
    """The claims of ``certificate()``, spelled out as the contract has them."""
    return {
        "public-key": public(client),
        "principal": {"email": EMAIL},
        "iat": NOW_MS - 10_000,
        "exp": NOW_MS + 3_600_000,
        "iss": ISSUER,
        "verifiedMSISDN": NUMBER,
        "lastVerifiedAt": 1_699_999_000_000,
        "lastAuthAt": NOW_MS,
    }


def believe(backed: str, server: str = "RS256 server", now_ms: int = NOW_MS) -> dict[str, Any]:
    """What a relying party does."""
    key = key_of(server).public_key()
    return gateway.verify_backed_assertion(backed, AUDIENCE, ISSUER, key, now_ms)


# -- Issuing ------------------------------------------------------------------


@pytest.mark.parametrize("client", KINDS)
@pytest.mark.parametrize("server", ["RS256 server", "DS256 server"])
def test_every_pair_of_keys(server: str, client: str) -> None:
    """Both server keys issue for all four kinds; cryptography alone checks both signatures."""
    token = certificate(client, server)
    assertion = gateway.make_assertion(key_of(client), AUDIENCE, NOW_MS + 60_000)
    check_signature(token, server)
    check_signature(assertion, client)
    assert opened(token).claims == claims_of_certificate(client)
    assert opened(assertion).claims == {"aud": AUDIENCE, "exp": NOW_MS + 60_000}
    assert believe(f"{token}~{assertion}", server) == claims_of_certificate(client)


@pytest.mark.parametrize("name", KINDS)
def test_tokens_of_others_are_read(name: str) -> None:
    """Spaces in the JSON and another order of the fields are not ours to forbid."""
    claims = {"zz": [1, {"ü": None}], "exp": NOW_MS + 1, "aud": AUDIENCE}
    token = handmade(json.dumps(claims, indent=1).encode(), name)
    assert gateway.verify_token(token, key_of(name).public_key(), NOW_MS) == claims


@pytest.mark.parametrize("name", ["DS128", "DS256"])
def test_short_halves_of_a_ds_signature_are_padded(name: str) -> None:
    """Catches r‖s written without leading zeros: wrong for one signature in 128."""
    size, seen = SIZES[name] // 2, set()
    for number in range(20_000):
        token = gateway.sign_token({"exp": NOW_MS + 1, "n": number}, key_of(name))
        signature = opened(token).signature
        assert len(signature) == 2 * size
        seen |= {half for half in (0, 1) if signature[half * size] == 0}
        if 0 in (signature[0], signature[size]):
            check_signature(token, name)
            assert gateway.verify_token(token, key_of(name).public_key(), NOW_MS)
        if seen == {0, 1} or (seen and name == "DS256"):
            return
    raise AssertionError("no signature with a short half came up")


def test_no_certificate_by_a_key_of_another_size() -> None:
    """A name for it does not exist, and a wrong one must not be taken."""
    odd = rsa.generate_private_key(65537, 1536)
    with pytest.raises(gateway.InvalidToken):
        gateway.sign_token({"exp": 1}, odd)
    with pytest.raises(gateway.InvalidToken):
        gateway.verify_token(handmade({"exp": NOW_MS + 1}, "RS128"), odd.public_key(), NOW_MS)


def test_claims_over_http(make_client: Callable[..., WsgiClient]) -> None:
    """Every claim, to the millisecond, and which of them move between two signatures."""
    now = [1_700_000_000.123]
    client = make_client(clock=lambda: now[0], public_url="http://localhost:8080")
    client.host = "localhost:8080"
    client.verified()
    now[0] += 30.5
    first = client.call("/certificate/sign", {"publicKey": public("DS128"), "duration": 60})
    second = client.call("/v1/certificate/sign", {"publicKey": public("RS256")})
    claims = opened(first.json["cert"]).claims
    email = claims["principal"].pop("email")
    assert first.json.keys() == {"cert"}
    assert claims == {
        "public-key": public("DS128"),
        "principal": {},
        "iat": 1_700_000_020_623,
        "exp": 1_700_000_090_623,
        "iss": "localhost:8080",
        "verifiedMSISDN": NUMBER,
        "lastVerifiedAt": 1_700_000_000_000,
        "lastAuthAt": 1_700_000_030_623,
    }
    assert all(type(claims[name]) is int for name in ("iat", "exp", "lastAuthAt"))
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}@localhost:8080", email)
    other = opened(second.json["cert"]).claims
    assert other["principal"] == {"email": email}
    assert other["exp"] == 1_700_000_030_623 + 86_400_000
    assert other["public-key"] == public("RS256")


def test_verification_time_moves_with_a_new_verification(
    make_client: Callable[..., WsgiClient],
) -> None:
    """Catches a lastVerifiedAt that stays, or that follows the signature."""
    now = [1_700_000_000.0]
    client = make_client(clock=lambda: now[0]).verified()
    now[0] += 5000
    assert client.call("/sms/resend_code").status == 200
    answer = client.call(
        "/sms/verify_code", {"code": client.code(), "publicKey": public("RS128"), "duration": "7"}
    )
    claims = opened(answer.json["cert"]).claims
    assert answer.json.keys() == {"msisdn", "cert"}
    assert (claims["lastVerifiedAt"], claims["exp"]) == (1_700_005_000_000, 1_700_005_007_000)


@pytest.mark.parametrize(
    ("duration", "life_s"),
    [
        (1, 1),
        ("90", 90),  # a string of digits is taken too
        (3600, 3600),
        (3601, 3600),  # cut to the longest, not refused
        (10**17, 3600),
        ("9" * 5000, 3600),
        ("0" * 5000 + "5", 5),  # Python reads no more than 4300 digits
        (None, 3600),  # null and "" count as missing
        ("", 3600),
    ],
)
def test_duration(make_client: Callable[..., WsgiClient], duration: Any, life_s: int) -> None:
    client = make_client(certificate_max_s=3600, clock=lambda: 1.7e9).verified()
    body = {"publicKey": public("RS128"), "duration": duration}
    claims = opened(client.call("/certificate/sign", body).json["cert"]).claims
    assert claims["exp"] == 1_700_000_000_000 + life_s * 1000


@pytest.mark.parametrize(
    "duration",
    [
        0,
        -1,
        "0",
        "0" * 5000,
        "-5",
        "1.0",
        " 5",
        "5 ",
        "5\n",
        "٣",  # a digit to str.isdigit and int, but no ASCII digit
        "1_0",  # int() takes it
        "0x10",
        "86400s",
        1.0,
        1.5,
        1e308,
        True,  # an int to isinstance
        False,
        [60],
        {"s": 60},
    ],
)
def test_impossible_durations(client: WsgiClient, duration: Any) -> None:
    client.verified()
    answer = client.call("/certificate/sign", {"publicKey": public("RS128"), "duration": duration})
    assert (answer.status, answer.errno) == (400, 107)
    assert "duration" in answer.json["message"]


# -- Principal ----------------------------------------------------------------


def test_principal_is_stable_and_a_uuid() -> None:
    """The same number, server and secret: the same pseudonym, of version 4 by its form."""
    one = gateway.principal_for(b"s" * 32, MSISDN, ISSUER)
    assert one == gateway.principal_for(b"s" * 32, MSISDN, ISSUER)
    local, _, host = one.partition("@")
    assert host == ISSUER
    assert str(uuid.UUID(local)) == local
    assert uuid.UUID(local).version == 4


def test_principal_depends_on_secret_and_number() -> None:
    """Catches a digest of the number alone, and one constant for all."""
    seen = {
        gateway.principal_for(secret, gateway.Msisdn(number), ISSUER)
        for secret in (b"s" * 32, b"t" * 32)
        for number in (NUMBER, "+447700900124", "+44770090012")
    }
    assert len(seen) == 6


@pytest.mark.parametrize("name", sorted(hashlib.algorithms_guaranteed))
def test_principal_is_no_plain_digest(name: str) -> None:
    """The first server used a bare MD5: anybody could list all numbers' pseudonyms."""
    principal = gateway.principal_for(b"s" * 32, MSISDN, ISSUER)
    found = principal.partition("@")[0].replace("-", "")
    for text in (NUMBER, NUMBER[1:], "00" + NUMBER[1:], f"{NUMBER}@{ISSUER}", ISSUER + NUMBER):
        digest = hashlib.new(name, text.encode())
        length = (16,) if digest.digest_size == 0 else ()
        plain = digest.hexdigest(*length)
        # Version and variant bits are overwritten; the rest must differ.
        assert plain[:12] != found[:12]


def test_principal_over_http(make_client: Callable[..., WsgiClient], tmp_path: Path) -> None:
    """Stable over sessions; another for another number, and on a server with another secret."""

    def email(client: WsgiClient, number: str) -> str:
        client.another().verified(number)
        cert = client.call("/certificate/sign", {"publicKey": public("RS128")}).json["cert"]
        return str(opened(cert).claims["principal"]["email"])

    ours = make_client()
    theirs = make_client(master_secret="ab" * 32)
    first = email(ours.verified(), NUMBER)
    assert email(ours.verified(), NUMBER) == first
    assert email(ours.verified("+447700900124"), NUMBER) != first
    assert email(theirs.verified(), NUMBER) != first


# -- The client's key ---------------------------------------------------------


def rs(n: Any = None, e: Any = None, **more: Any) -> dict[str, Any]:
    """An RS key with parts of it exchanged."""
    good = public("RS256")
    return {**good, "n": good["n"] if n is None else n, "e": good["e"] if e is None else e, **more}


def ds(**parts: Any) -> dict[str, Any]:
    """A DS128 key with parts of it exchanged; numbers become hex."""
    texts = {name: f"{part:x}" if type(part) is int else part for name, part in parts.items()}
    return {**public("DS128"), **texts}


def number(name: str, part: str) -> int:
    """A number in the public key ``key_of(name)``."""
    return int(public(name)[part], 10 if name.startswith("RS") else 16)


def multiple(prime: int) -> int:
    """2048 bits whose least prime factor is ``prime``."""
    other = 3 * 2**2046 // prime | 1
    while math.gcd(other, math.prod(range(3, prime, 2))) != 1:
        other += 2
    return other * prime


@pytest.mark.parametrize("name", KINDS)
def test_keys_are_read_and_written_alike(name: str) -> None:
    key = gateway.parse_public_key(public(name))
    assert key.public_numbers() == key_of(name).public_key().public_numbers()
    assert gateway.public_key_json(key) == public(name)
    assert gateway.algorithm_of(key) == name


@pytest.mark.parametrize("name", KINDS)
def test_the_key_of_the_2014_page_is_the_number_that_it_stands_for(
    client: WsgiClient, name: str
) -> None:
    """Its big-number library as JSON, "keysize" beside it; and what follows verifies."""
    numbers = {part: limbs(number(name, part)) for part in public(name) if part != "algorithm"}
    for value in numbers.values():
        value["arr"] += [None, 77]  # what jsbn once used for a larger number; t says where it ends
    key = {"algorithm": name[:2], "keysize": int(name[2:]), **numbers}
    answer = client.verified().call("/certificate/sign", {"publicKey": json.dumps(key)})
    assert opened(answer.json["cert"]).claims["public-key"] == public(name)
    now_ms = int(time.time() * 1000)
    assertion = gateway.make_assertion(key_of(name), AUDIENCE, now_ms + 60_000)
    backed = f"{answer.json['cert']}~{assertion}"
    issuer_key = client.gateway.keys.browserid.public_key()
    claims = gateway.verify_backed_assertion(
        backed, AUDIENCE, client.app.settings.issuer, issuer_key, now_ms
    )
    assert claims["verifiedMSISDN"] == NUMBER


@pytest.mark.parametrize("path", ["/certificate/sign", "/sms/verify_code"])
@pytest.mark.parametrize("form", ["BrowserID", "limbs", "JWK", "proof key"])
def test_our_own_key_is_nobody_elses(client: WsgiClient, path: str, form: str) -> None:
    """Whoever is certified with our key could show what we sign as their own."""
    keys = client.verified().gateway.keys
    numbers: Any = keys.browserid.public_key().public_numbers()
    n, e = numbers.n, numbers.e
    key = {
        "BrowserID": {"algorithm": "RS", "n": f"00{n}", "e": str(e)},
        "limbs": {"algorithm": "RS", "n": limbs(n), "e": limbs(e)},
        "JWK": {"kty": "RSA", "n": b64(n.to_bytes(256, "big")), "e": "AQAB", "use": "enc"},
        "proof key": keys.published(client.gateway.clock())[0].jwk,
    }[form]
    assert client.ask().status == 200
    answer = client.call(path, {"code": client.code(), "publicKey": key})
    assert (answer.status, answer.errno) == (400, 107)
    assert "gateway's" in answer.json["message"]
    assert client.call("/sms/verify_code", {"code": client.code()}).status == 200  # not used up


@pytest.mark.parametrize("then", ["verified anew", "unregistered"])
def test_a_certificate_tells_how_it_is_when_it_is_given(
    client: WsgiClient, monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    """The session changes after it was read, and before the store is asked."""
    storage, verified_s = client.verified().gateway.storage, int(time.time()) - 77

    def commit(key: gateway.StorageId, old: bytes, *rest: Any) -> gateway.Commit:
        monkeypatch.undo()
        new = gateway.User.unpack(old)._replace(verified_s=verified_s).pack()
        assert storage.commit(key, old, new if then == "verified anew" else b"").name == "DONE"
        return storage.commit(key, old, *rest)

    monkeypatch.setattr(storage, "commit", commit)
    answer = client.call("/certificate/sign", {"publicKey": public("RS256")})
    if then == "verified anew":
        assert opened(answer.json["cert"]).claims["lastVerifiedAt"] == verified_s * 1000
    else:
        assert (answer.errno, "cert" in answer.json) == (110, False)


@pytest.mark.parametrize("name", KINDS)
def test_canonical_form(client: WsgiClient, name: str) -> None:
    """Leading zeros, upper case, a JSON string, and all that is no part of the key, are gone."""
    given = {
        field: text if field == "algorithm" else "00" + text.upper()
        for field, text in public(name).items()
    }
    numbers = key_of(name).private_numbers()
    secret = {"d": str(numbers.d)} if name.startswith("RS") else {"x": f"{numbers.x:x}"}
    extra = {"kid": "7", "version": "2012.08.15", "p": "3", "q": "5", "nested": {"d": "1"}}
    given = {**extra, **secret, **given}
    client.verified()
    for value in (given, json.dumps(given)):
        answer = client.call("/certificate/sign", {"publicKey": value})
        assert opened(answer.json["cert"]).claims["public-key"] == public(name)
        assert next(iter(secret.values())).encode() not in base64.urlsafe_b64decode(
            answer.json["cert"].split(".")[1] + "=="
        )


COMPOSITE_Q = 0xAEDF105227C163B087665D6C50CB1E8D67D86459
"""160 bits, the product of two primes of 80."""
ITS_P = int(
    "a33dfd9cd7298411c374d5e345d9e650a217417b7e6116d720a1efc95c48a449911a1cc0e618e693c296ae64"
    "beda94a20d332231b9d4f6478087691fdf8f3ed42a4e64f579d1fa40ac297b30fc44c2b67de08ccfcc6c0822"
    "319482cb9cd36de99b2c5e072c4fdd25b2fe39704e8db9c90bc9a1448dcb9a03648ff8a83f6a5187", 16
)  # fmt: skip
"""A prime of 1024 bits; ``COMPOSITE_Q`` divides it less one."""
ITS_G = pow(2, (ITS_P - 1) // COMPOSITE_Q, ITS_P)
COMPOSITE_P = int(
    "954b96fd3bccdcb9286f9347bf505446b98483de8ccdc251b167901a7c8a8c68ad3e299e4815ea54ceac0aff"
    "1680714534945c8b354d8255a306aa1d18c0deebece889263f360c196b243f58ebbe274ce57acac71bdd1e9c"
    "6694bb5773f9ff775ddfc71cf5f72b9836ada41b20dea25ca636df9dc87480f7a85f060574f58f15", 16
)  # fmt: skip
"""1024 bits, the product of two primes of 512 that are both 1 modulo the prime below."""
PRIME_Q = 0xF5C339BB5EEEA0934B939F8D103AC20C003F52ED
ORDER_Q = int(
    "4cdff4442a299a9a90b4a51dcfb1b4d20a9fed6bef0b82ef56a383ac08dc5bbdaa40aa150c56115ee50d5081"
    "8dd0e73fdde435a9eb4c3e84b0252a55ef5f9b8655254b89a42ef74de9ab7113f56b18a57317671e40cc4f51"
    "977ea973f1065811b168698d52cdb653a32f441fc45cc3fcfd4476c0e9a2ecfd397170d5e332bb31", 16
)  # fmt: skip
"""Of order ``PRIME_Q`` modulo ``COMPOSITE_P``."""


def limbs(number: int) -> dict[str, Any]:
    """A number as ``JSON.stringify`` shows a jsbn BigInteger: limbs of 28 bits, lowest first."""
    found = [number >> shift & 2**28 - 1 for shift in range(0, number.bit_length(), 28)]
    return {"arr": found, "t": len(found), "s": 0}


MODP_4096 = """
FFFFFFFF FFFFFFFF C90FDAA2 2168C234 C4C6628B 80DC1CD1 29024E08 8A67CC74 020BBEA6 3B139B22 514A0879
8E3404DD EF9519B3 CD3A431B 302B0A6D F25F1437 4FE1356D 6D51C245 E485B576 625E7EC6 F44C42E9 A637ED6B
0BFF5CB6 F406B7ED EE386BFB 5A899FA5 AE9F2411 7C4B1FE6 49286651 ECE45B3D C2007CB8 A163BF05 98DA4836
1C55D39A 69163FA8 FD24CF5F 83655D23 DCA3AD96 1C62F356 208552BB 9ED52907 7096966D 670C354E 4ABC9804
F1746C08 CA18217C 32905E46 2E36CE3B E39E772C 180E8603 9B2783A2 EC07A28F B5C55DF0 6F4C52C9 DE2BCBF6
95581718 3995497C EA956AE5 15D22618 98FA0510 15728E5A 8AAAC42D AD33170D 04507A33 A85521AB DF1CBA64
ECFB8504 58DBEF0A 8AEA7157 5D060C7D B3970F85 A6E1E4C7 ABF5AE8C DB0933D7 1E8C94E0 4A25619D CEE3D226
1AD2EE6B F12FFA06 D98A0864 D8760273 3EC86A64 521F2B18 177B200C BBE11757 7A615D6C 770988C0 BAD946E2
08E24FA0 74E5AB31 43DB5BFC E0FD108E 4B82D120 A9210801 1A723C12 A787E6D7 88719A10 BDBA5B26 99C32718
6AF4E23C 1A946834 B6150BDA 2583E9CA 2AD44CE8 DBBBC2DB 04DE8EF9 2E8EFC14 1FBECAA6 287C5947 4E6BC05D
99B2964F A090C3A2 233BA186 515BE7ED 1F612970 CEE2D7AF B81BDD76 2170481C D0069127 D5B05AA9 93B4EA98
8D8FDDC1 86FFB7DC 90A6C08F 4DF435C9 34063199 FFFFFFFF FFFFFFFF
"""


@cache
def prime_of(bits: int) -> int:
    """A prime of so many bits: half of an RSA key of twice as many."""
    return rsa.generate_private_key(65537, 2 * bits).private_numbers().p


def test_who_sees_a_prime_modulus_can_sign() -> None:
    """Why such a key is refused, though it can sign and verify like any other."""
    n = prime_of(1024)
    d = pow(65537, -1, n - 1)
    message = 0xC0FFEE
    assert pow(pow(message, d, n), 65537, n) == message


@pytest.mark.slow
@pytest.mark.parametrize("bits", [1024, 2048, 3072, 4096])
def test_a_prime_modulus_is_found_and_no_other(bits: int) -> None:
    """By OpenSSL up to 3072 bits; ``pow`` as the judge."""
    composite = rsa.generate_private_key(65537, bits).public_key().public_numbers().n
    assert not gateway._is_prime(composite)
    assert pow(2, composite - 1, composite) != 1
    if bits < 4096:  # a prime of 4096 bits takes a minute to find
        assert gateway._is_prime(prime_of(bits))
        square = prime_of(bits // 2) ** 2
        assert not gateway._is_prime(square)


def test_a_prime_of_4096_bits_is_found() -> None:
    """That of RFC 3526, group 16, which is one for certain."""
    assert gateway._is_prime(int("".join(MODP_4096.split()), 16))


REFUSED_KEYS: dict[str, Callable[[], Any]] = {
    # name: a key that some wrong implementation takes
    "no object": lambda: 7,
    "list": lambda: [public("RS256")],
    "empty object": lambda: {},
    "text": lambda: "RS",
    "JSON string of no object": lambda: "[]",
    "JSON string of a JSON string": lambda: json.dumps(json.dumps(public("RS256"))),
    "broken JSON string": lambda: json.dumps(public("RS256"))[:-1],
    "JSON string with a name twice": lambda: json.dumps(public("RS256"))[:-1] + ', "e": "65537"}',
    "JSON string with something behind": lambda: json.dumps(public("RS256")) + "x",
    "deep JSON string": lambda: "[" * 9000,
    "surrogate": lambda: "\ud800",
    "surrogate in n": lambda: rs(n="12\udfff3"),
    "algorithm missing": lambda: {"n": public("RS256")["n"], "e": "65537"},
    "algorithm in small letters": lambda: rs(algorithm="rs"),
    "algorithm with a size": lambda: rs(algorithm="RS256"),
    "algorithm null": lambda: rs(algorithm=None),
    "algorithm a list": lambda: rs(algorithm=["RS"]),
    "algorithm of a JWK": lambda: {"kty": "RSA", "n": b64(b"\xff" * 256), "e": "AQAB"},
    "RS with DS numbers": lambda: {**public("DS256"), "algorithm": "RS"},
    "DS with RS numbers": lambda: {**public("RS256"), "algorithm": "DS"},
    "n missing": lambda: {"algorithm": "RS", "e": "65537"},
    "e null": lambda: {**rs(), "e": None},
    "n a number": lambda: rs(n=number("RS256", "n")),
    "e a number": lambda: rs(e=65537),
    "y a number": lambda: {**ds(), "y": 12345},
    "n hex": lambda: rs(n=f"{number('RS256', 'n'):x}"),
    "n with 0x": lambda: rs(n=hex(number("RS256", "n"))),
    "n with a sign": lambda: rs(n="+" + rs()["n"]),
    "n negative": lambda: rs(n="-" + rs()["n"]),
    "n with a space": lambda: rs(n=" " + rs()["n"]),
    "n with a line end": lambda: rs(n=rs()["n"] + "\n"),  # re.match with $ takes it
    "n with _": lambda: rs(n=rs()["n"][:9] + "_" + rs()["n"][9:]),  # int() takes it
    "n in Arabic digits": lambda: rs(n=rs()["n"].replace("1", "١")),  # int() takes it
    "n empty": lambda: rs(n=""),
    "n 0": lambda: rs(n="0"),
    "n 10 KB of digits": lambda: rs(n="1" * 10_240),
    "n 5000 zeros before": lambda: rs(n="0" * 5000 + rs()["n"]),
    "y 10 KB of digits": lambda: ds(y="f" * 10_240),
    "JSON string, 5000 digits": lambda: json.dumps(rs()).replace("65537", '"' + "7" * 5000 + '"'),
    "p with 0x": lambda: ds(p=hex(number("DS128", "p"))),
    "q no hex": lambda: ds(q="xyz"),
    "insides of JSBN": lambda: rs(n={"0": 231, "1": 99, "t": 37, "s": 0}),
    "insides of node-bignum": lambda: rs(n={"_d": [3, 4], "sign": 1}),
    "insides of BN.js": lambda: rs(n={"negative": 0, "words": [1, 2], "length": 2, "red": None}),
    "list of digits": lambda: rs(n=["1", "2"]),
    "n even": lambda: rs(n=str(number("RS256", "n") - 1)),
    "n of 2047 bits": lambda: rs(n=str(2**2046 + 2**1000 + 297)),
    "n of 2049 bits": lambda: rs(n=str(number("RS256", "n") * 2 + 1)),
    "n of 512 bits": lambda: rs(n=str(number("RS256", "n") >> 1536 | 1)),
    "n of 1025 bits": lambda: rs(n=str(number("RS128", "n") * 2 + 1)),
    "n of 1280 bits": lambda: rs(n=str(number("RS256", "n") >> 768 | 1)),
    "n a multiple of 3": lambda: rs(n=str((2**2047 // 3 * 3 + 3) | 1)),
    "n a multiple of 751": lambda: rs(n=str(multiple(751))),
    "n a power of 3": lambda: rs(n=str(3**1292)),
    "e 0": lambda: rs(e="0"),
    "e 1": lambda: rs(e="1"),  # every message is its own signature
    "e 2": lambda: rs(e="2"),
    "e 3": lambda: rs(e="3"),
    "e 65535": lambda: rs(e="65535"),
    "e even": lambda: rs(e="65538"),
    "e of 33 bits": lambda: rs(e=str(2**32 + 1)),
    "n prime, of 1024 bits": lambda: rs(n=str(prime_of(1024))),
    "n prime, of 2048 bits": lambda: rs(n=str(prime_of(2048))),
    "limbs of 29 bits": lambda: rs(n=limbs(number("RS256", "n")) | {"arr": [2**28] * 74, "t": 74}),
    "limbs below 0": lambda: ds(y=limbs(number("DS128", "y")) | {"s": -1}),
    "negative limb": lambda: ds(y={"arr": [-5, 7], "t": 2, "s": 0}),
    "fewer limbs than t": lambda: ds(y=limbs(number("DS128", "y")) | {"t": 99}),
    "no limbs": lambda: ds(y={"arr": [], "t": 0, "s": 0}),
    "limbs of texts": lambda: ds(y={"arr": ["1", "2"], "t": 2, "s": 0}),
    "limbs without t": lambda: ds(y={"arr": [1, 2], "s": 0}),
    "thousands of limbs": lambda: rs(n={"arr": [1] * 4000, "t": 4000, "s": 0}),
    "limbs of a fraction": lambda: ds(y={"arr": [1.0, 2], "t": 2, "s": 0}),
    "e as large as n": lambda: rs(e=rs()["n"]),
    "y 0": lambda: ds(y=0),
    "y 1": lambda: ds(y=1),  # x = 0: anybody can sign
    "y is p - 1": lambda: ds(y=number("DS128", "p") - 1),  # of order 2
    "y is p": lambda: ds(y=number("DS128", "p")),
    "y not reduced": lambda: ds(y=number("DS128", "y") + number("DS128", "p")),
    "y out of the subgroup": lambda: ds(y=2),
    "g 0": lambda: ds(g=0),
    "g 1": lambda: ds(g=1),
    "g is p - 1": lambda: ds(g=number("DS128", "p") - 1),
    "g out of the subgroup": lambda: ds(g=2),
    "g not reduced": lambda: ds(g=number("DS128", "g") + number("DS128", "p")),
    "q 0": lambda: ds(q=0),
    "q 1": lambda: ds(q=1),
    "q of 159 bits": lambda: ds(q=number("DS128", "q") >> 1),
    "q another prime": lambda: ds(q=PRIME_Q),
    "q of the other size": lambda: {**public("DS256"), "q": public("DS128")["q"]},
    "p of the other size": lambda: {**public("DS128"), "p": public("DS256")["p"]},
    "p even": lambda: ds(p=number("DS128", "p") - 1),
    "p plus q": lambda: ds(p=number("DS128", "p") + 2 * number("DS128", "q")),
    "g missing": lambda: {k: v for k, v in ds().items() if k != "g"},
    "q composite": lambda: ds(p=ITS_P, q=COMPOSITE_Q, g=ITS_G, y=pow(ITS_G, 12345, ITS_P)),
    "p composite": lambda: ds(
        p=COMPOSITE_P, q=PRIME_Q, g=ORDER_Q, y=pow(ORDER_Q, 12345, COMPOSITE_P)
    ),
}


@pytest.mark.parametrize("name", REFUSED_KEYS)
def test_refused_keys(name: str) -> None:
    with pytest.raises(gateway.InvalidParameter) as caught:
        gateway.parse_public_key(REFUSED_KEYS[name]())
    for shape in ('{"algorithm": "RS", "n": "<decimal>", "e": "<decimal>"}', '"y": "<hex>"'):
        assert shape in caught.value.message


def test_composite_parameters_are_as_described() -> None:
    """The two last rows fail on nothing but a prime that is none."""
    assert (ITS_P - 1) % COMPOSITE_Q == 0 == (COMPOSITE_P - 1) % PRIME_Q
    assert pow(ITS_G, COMPOSITE_Q, ITS_P) == 1 == pow(ORDER_Q, PRIME_Q, COMPOSITE_P)
    assert pow(2, ITS_P - 1, ITS_P) == 1 == pow(2, PRIME_Q - 1, PRIME_Q)
    sizes = [n.bit_length() for n in (ITS_P, COMPOSITE_P, COMPOSITE_Q, PRIME_Q)]
    assert sizes == [1024, 1024, 160, 160]


@pytest.mark.parametrize(
    "name", ["n a number", "insides of JSBN", "e 1", "y 1", "list", "deep JSON string"]
)
@pytest.mark.parametrize("path", ["/certificate/sign", "/sms/verify_code"])
def test_refused_keys_over_http(client: WsgiClient, path: str, name: str) -> None:
    """400/107 and the right shape; but nobody's key is looked at who may not have a proof."""
    client.register()
    body = {"code": "000000", "publicKey": REFUSED_KEYS[name]()}
    answer = client.call(path, body)
    assert answer.errno == (104 if path == "/certificate/sign" else 111)
    client.verified()
    assert client.ask().status == 200  # so that a code waits
    answer = client.call(path, body)
    assert (answer.status, answer.errno) == (400, 107)
    assert '"n": "<decimal>"' in answer.json["message"]


@pytest.mark.slow
def test_a_prime_is_looked_for_once(client: WsgiClient) -> None:
    """It takes 4 ms; the clients of 2014 share p and q, and everybody comes again with a key."""
    check = gateway._is_prime
    check.cache_clear()
    client.gateway.key_checks._found.clear()
    client.verified()
    for which in ("DS256", "DS256 another", "DS256", "DS256 third"):
        assert client.call("/certificate/sign", {"publicKey": public(which)}).status == 200
    found = check.cache_info()
    assert (found.misses, found.currsize, found.hits) == (2, 2, 4)  # and one key was known
    p, g = number("DS256", "p"), number("DS256", "g")
    for n in range(2, 5):  # everybody can make another generator of the same group
        key = {**public("DS256"), "g": f"{pow(g, n, p):x}"}
        assert client.call("/certificate/sign", {"publicKey": key}).status == 200
    assert client.call("/certificate/sign", {"publicKey": {**key, "g": "2"}}).errno == 107
    assert check.cache_info().misses == 2
    for _ in range(3):
        assert client.call("/certificate/sign", {"publicKey": public("RS256")}).status == 200
    assert check.cache_info().misses == 3


def test_what_is_known_of_primes_is_bounded() -> None:
    """Whoever has a session chooses them: what is kept must not grow."""
    check = gateway._is_prime
    check.cache_clear()
    for n in range(5000):
        assert not check((1 << 160) + 2 * n)
    found = check.cache_info()
    assert found.currsize <= (found.maxsize or 0) <= 4096
    assert found.misses == 5000


def test_keys_are_checked_one_at_a_time(
    client: WsgiClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has verified one number could have all others wait for keys, over many connections."""
    client.verified()
    client.gateway.key_checks._found.clear()
    assert client.call("/certificate/sign", {"publicKey": public("RS128")}).status == 200
    assert client.ask().status == 200
    monkeypatch.setattr(gateway, "_KEY_WAIT_S", 0.01)
    on_p256 = ec.generate_private_key(ec.SECP256R1())
    edwards = ed25519.Ed25519PrivateKey.generate()
    with client.gateway.key_checks._turn:
        known = client.call("/certificate/sign", {"publicKey": public("RS128")})
        another = client.call("/certificate/sign", {"publicKey": public("DS256")})
        code = {"code": client.code(), "publicKey": public("DS256")}
        last = client.call("/sms/verify_code", code)
        for jwk in (
            jwt.algorithms.ECAlgorithm.to_jwk(on_p256.public_key(), as_dict=True),
            jwt.algorithms.OKPAlgorithm.to_jwk(edwards.public_key(), as_dict=True),
        ):
            assert client.call("/certificate/sign", {"publicKey": jwk}).status == 200  # no wait
    assert known.status == 200
    for answer in (another, last):
        assert (answer.status, answer.errno, answer.headers["retry-after"]) == (503, 201, "1")
    assert client.call("/sms/verify_code", code).errno == 111  # it was right: nothing is lost
    assert client.call("/certificate/sign", {"publicKey": public("DS256")}).status == 200


def test_a_number_has_one_key_in_the_line(client: WsgiClient) -> None:
    """Over however many connections it sends keys, others wait for one of them."""
    client.verified()
    another = client.another().verified("+447700900124")
    busy = client.another().verified()
    checks, key = client.gateway.key_checks, {"publicKey": public("DS256")}
    checks._found.clear()
    with checks._turn, ThreadPoolExecutor(2) as pool:
        first = pool.submit(busy.call, "/certificate/sign", key)
        wait_for(lambda: checks._waiting, "the first key to wait")
        answer = client.call("/certificate/sign", {"publicKey": public("RS128")})
        assert (answer.status, answer.errno, answer.headers["retry-after"]) == (503, 201, "1")
        assert "another key of this number" in answer.json["message"]
        other = pool.submit(another.call, "/certificate/sign", {"publicKey": public("DS128")})
        wait_for(lambda: len(checks._waiting) == 2, "another key to wait")
        checks._turn.release()
        assert [one.result().status for one in (first, other)] == [200, 200]
        checks._turn.acquire()
    assert checks._waiting == {}
    assert client.call("/certificate/sign", {"publicKey": public("RS128")}).status == 200


def test_the_same_key_many_times_at_once_is_checked_once(
    client: WsgiClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of them is refused for the others: a page may ask twice."""
    client.verified()
    same = client.another().verified()
    checks, look, looked = client.gateway.key_checks, gateway._why_refused, list[Any]()

    def slowly(key: Any) -> str:
        looked.append(key)
        time.sleep(0.2)
        return look(key)

    checks._found.clear()
    monkeypatch.setattr(gateway, "_why_refused", slowly)
    with ThreadPoolExecutor(8) as pool:
        asked = [
            pool.submit(who.call, "/certificate/sign", {"publicKey": public("DS256")})
            for who in (client, same) * 4
        ]
        assert {one.result().status for one in asked} == {200}
    assert len(looked) == 1
    assert checks._waiting == {}


def test_keys_that_are_known_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is no key is refused again, and not looked at again."""
    monkeypatch.setattr(gateway, "_KEYS_KNOWN", 2)
    checks = gateway.KeyChecks()
    for n, name in enumerate(("RS128", "RS256", "DS128", "RS128")):
        checks.check(gateway.client_key(public(name)), MSISDN)
        assert len(checks._found) == 1 + n % 2
    bad = gateway.client_key({**public("DS128"), "y": "3"}, thorough=False)
    refused = []
    for _ in range(2):
        with pytest.raises(gateway.InvalidParameter) as caught:
            checks.check(bad, MSISDN)
        refused.append(caught.value.message)
        monkeypatch.setattr(gateway, "client_key", None)
    assert refused[0] == refused[1]
    assert "a real key" in refused[0]
    assert checks._waiting == {}


def test_others_go_on_while_a_large_key_is_checked() -> None:
    """It takes 150 ms and more; a single ``pow`` would hold the GIL for all of it."""
    gateway._is_prime.cache_clear()
    turns = 0
    with ThreadPoolExecutor(1) as pool:
        checked = pool.submit(gateway._is_prime, int("".join(MODP_4096.split()), 16))
        while not checked.done():
            time.sleep(0.001)
            turns += 1
    assert checked.result()
    assert turns > 5


@pytest.mark.parametrize(("path", "errno"), [("/certificate/sign", 104), ("/sms/verify_code", 111)])
def test_no_key_of_a_stranger_is_looked_at(client: WsgiClient, path: str, errno: int) -> None:
    """30 requests a second of somebody who verified nothing stopped a worker."""
    client.register()
    spent_s = []
    for n in range(10):
        key = {**public("DS256"), "q": f"{number('DS256', 'q') + 2 * n:x}"}
        began_s = time.thread_time()
        assert client.call(path, {"code": "000000", "publicKey": key}).errno == errno
        spent_s.append(time.thread_time() - began_s)
    assert min(spent_s) < 0.003 * shared()  # the orders of g and y alone take 7 ms


def test_no_dear_key_of_who_only_guesses_is_looked_at(client: WsgiClient) -> None:
    """A code waits, for whatever number: a key that takes 30 ms is looked at for the right one."""
    client.register()
    assert client.ask().status == 200
    p, g = number("DS256", "p"), number("DS256", "g")
    gateway._is_prime.cache_clear()
    key = {**public("DS256"), "g": f"{pow(g, 7, p):x}"}
    wrong = {"code": "000000", "publicKey": key, "duration": 0}
    assert client.call("/sms/verify_code", wrong).errno == 107  # what is cheap comes first
    answer = client.call("/sms/verify_code", {"code": "000000", "publicKey": key})
    assert gateway._is_prime.cache_info().misses == 0
    assert (answer.errno, answer.json["message"]) == (105, "the code is wrong; tries left: 2")
    assert gateway._is_prime.cache_info().misses == 0
    bad = {**key, "y": "3"}  # not of this group: that is found once the code has been judged
    answer = client.call("/sms/verify_code", {"code": client.code(), "publicKey": bad})
    assert (answer.status, answer.errno) == (400, 107)
    assert client.call("/certificate/sign", {"publicKey": key}).json["cert"]  # it is verified


@pytest.mark.parametrize("which", ["DS256", "RS128"])
def test_a_replay_does_not_tell_by_its_time_whether_a_code_is_right(
    client: WsgiClient, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    """Its try is not counted, so nothing that a right code alone leads to may happen before."""
    client.register()
    assert client.ask().status == 200
    assert client.call("/sms/verify_code", {"code": "000000"}, nonce="seen").errno == 105
    code, done = client.code(), list[str]()
    for name in ("_is_prime", "issue_certificate"):
        monkeypatch.setattr(gateway, name, lambda *_, n=name: done.append(n))
    answers = [
        client.call("/sms/verify_code", {"code": one, "publicKey": public(which)}, nonce="seen")
        for one in (code, "000000")
    ]
    assert [(a.status, a.errno) for a in answers] == [(401, 109)] * 2
    assert answers[0].json == answers[1].json
    assert done == []
    monkeypatch.undo()
    assert client.call("/sms/verify_code", {"code": code}).status == 200


# -- What is not believed -----------------------------------------------------


def swapped(token: str, header: Any) -> str:
    """The token under another header, its signature as it was."""
    return b64(json.dumps(header).encode()) + token[token.index(".") :]


def changed(token: str, **claims: Any) -> str:
    """The token with other claims, its signature as it was."""
    header, _, signature = token.split(".")
    payload = b64(json.dumps(opened(token).claims | claims).encode())
    return f"{header}.{payload}.{signature}"


def by_hmac(secret: bytes) -> str:
    """A token of HS256: who takes it signs with what everybody knows."""
    header = b64(b'{"alg":"HS256"}')
    signed = f"{header}.{b64(json.dumps(claims_of_certificate()).encode())}"
    return f"{signed}.{b64(hmac.digest(secret, signed.encode(), 'sha256'))}"


def public_pem(name: str) -> bytes:
    """The public key as a PEM file."""
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return bytes(key_of(name).public_key().public_bytes(serialization.Encoding.PEM, form))


def der_signature(name: str) -> str:
    """A DS token whose signature is DER, as JOSE libraries' insides have it."""
    signed = handmade(claims_of_certificate(), name).rpartition(".")[0]
    return f"{signed}.{b64(key_of(name).sign(signed.encode(), hash_of(name.split()[0])))}"


def with_claims(server: str, /, **claims: Any) -> str:
    """A certificate that is rightly signed and says something else; ``...`` drops a claim."""
    every = claims_of_certificate() | claims
    return handmade({name: v for name, v in every.items() if v is not ...}, server)


BAD_TOKENS: dict[str, Callable[[str], str]] = {
    # what is wrong: from the name of the server's key, a token
    "empty": lambda server: "",
    "two dots": lambda server: "..",
    "alg none": lambda server: swapped(certificate(server=server), {"alg": "none"}),
    "alg none, no signature": lambda server: (
        swapped(certificate(server=server), {"alg": "none"}).rpartition(".")[0] + "."
    ),
    "alg None": lambda server: swapped(certificate(server=server), {"alg": None}),
    "alg missing": lambda server: swapped(certificate(server=server), {}),
    "alg in small letters": lambda s: handmade(claims_of_certificate(), s, {"alg": s[:5].lower()}),
    "alg a list": lambda server: handmade(claims_of_certificate(), server, {"alg": [server[:5]]}),
    "alg of the other kind": lambda server: handmade(
        claims_of_certificate(), server, {"alg": "DS256" if server[0] == "R" else "RS256"}
    ),
    "alg of the other size": lambda server: handmade(
        claims_of_certificate(), server, {"alg": server[:2] + "128"}
    ),
    "alg HS256, own signature": lambda s: handmade(claims_of_certificate(), s, {"alg": "HS256"}),
    "HS256 by the public PEM": lambda server: by_hmac(public_pem(server)),
    "HS256 by the public JSON": lambda server: by_hmac(json.dumps(public(server)).encode()),
    "HS256 by a public number": lambda s: by_hmac(list(public(s).values())[1].encode()),
    "unknown critical header": lambda server: handmade(
        claims_of_certificate(), server, {"alg": server[:5], "crit": ["x"], "x": 1}
    ),
    "payload detached": lambda server: handmade(
        b"", server, {"alg": server[:5], "b64": False, "crit": ["b64"]}
    ),
    "header a list": lambda server: handmade(claims_of_certificate(), server, ["alg"]),
    "header no JSON": lambda server: handmade(claims_of_certificate(), server, b"alg"),
    "by another key": lambda server: certificate(server=server + " other"),
    "by the client": lambda server: handmade(claims_of_certificate(), "RS128"),
    "claims changed": lambda s: changed(certificate(server=s), verifiedMSISDN="+447700900124"),
    "signature of another": lambda server: (
        certificate(server=server).rpartition(".")[0]
        + "."
        + certificate(server=server, duration_s=9).rpartition(".")[2]
    ),
    "signature missing": lambda server: certificate(server=server).rpartition(".")[0] + ".",
    "signature and dot missing": lambda server: certificate(server=server).rpartition(".")[0],
    "signature cut": lambda server: certificate(server=server)[:-4],
    "signature longer": lambda server: certificate(server=server) + "AAAA",
    "signature twice": lambda s: certificate(server=s) + certificate(server=s).rpartition(".")[2],
    "signature zero": lambda server: (
        certificate(server=server).rpartition(".")[0] + "." + b64(bytes(SIZES[server[:5]]))
    ),
    "dot before": lambda server: "." + certificate(server=server),
    "dot behind": lambda server: certificate(server=server) + ".",
    "double dot": lambda server: certificate(server=server).replace(".", "..", 1),
    "a fourth part": lambda server: certificate(server=server) + ".AAAA",
    "space before": lambda server: " " + certificate(server=server),
    "line end behind": lambda server: certificate(server=server) + "\n",
    "line end in the payload": lambda server: certificate(server=server).replace(".", ".\n", 1),
    "surrogate": lambda server: certificate(server=server) + "\udc00",
    "other letters": lambda server: certificate(server=server).replace(".", ".ä", 1),
    "exp passed": lambda server: certificate(server=server, now_ms=NOW_MS - 3_600_001),
    "exp in seconds": lambda server: with_claims(server, exp=NOW_MS // 1000 + 3600),
    "iat to come": lambda server: with_claims(server, iat=NOW_MS + 60_000),
    "iat no number": lambda server: with_claims(server, iat="yesterday"),
    "iat a list": lambda server: with_claims(server, iat=[0]),
    "exp missing": lambda server: with_claims(server, exp=...),
    "exp null": lambda server: with_claims(server, exp=None),
    "exp a text": lambda server: with_claims(server, exp=str(NOW_MS + 1000)),
    "exp true": lambda server: with_claims(server, exp=True),
    "exp for ever": lambda server: handmade(b'{"exp": Infinity}', server),
    "exp not a number": lambda server: handmade(b'{"exp": NaN}', server),
    "exp of 5000 digits": lambda server: handmade(b'{"exp": %b}' % (b"9" * 5000), server),
    "claims a list": lambda server: handmade([claims_of_certificate()], server),
    "claims a number": lambda server: handmade(7, server),
    "claims no JSON": lambda server: handmade(b"exp=1", server),
    "claims no UTF-8": lambda server: handmade(b'{"exp": 9999999999999, "a": "\xff"}', server),
    "claims too deep": lambda server: handmade(b"[" * 100_000, server),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_TOKENS)
@pytest.mark.parametrize("server", ["RS256 server", "DS256 server"])
def test_refused_certificates(server: str, name: str) -> None:
    """Alone, and before a good assertion."""
    token = BAD_TOKENS[name](server)
    with pytest.raises(gateway.InvalidToken):
        gateway.verify_token(token, key_of(server).public_key(), NOW_MS)
    assertion = gateway.make_assertion(key_of("RS128"), AUDIENCE, NOW_MS + 60_000)
    with pytest.raises(gateway.InvalidToken):
        believe(f"{token}~{assertion}", server)


@pytest.mark.parametrize("name", ["RS128", "DS128"])
def test_padding_is_no_part_of_a_token(name: str) -> None:
    """Catches a decoder that drops ``=``: then one certificate has many spellings."""
    token = gateway.make_assertion(key_of(name), AUDIENCE, NOW_MS + 60_000)
    header, payload, signature = token.split(".")
    padded = [part + "=" * (-len(part) % 4) for part in (header, payload, signature)]
    signed = f"{padded[0]}.{padded[1]}"
    tokens = [f"{header}.{payload}.{padded[2]}", token + "="]
    tokens.append(f"{signed}.{b64(raw_signature(signed.encode(), name))}")
    for text in tokens:
        assert "=" in text
        with pytest.raises(gateway.InvalidToken):
            gateway.verify_token(text, key_of(name).public_key(), NOW_MS)


@pytest.mark.parametrize("server", ["DS256 server", "DS128"])
def test_der_signatures_are_refused(server: str) -> None:
    """The format is r‖s; a verifier that takes both takes two spellings of each token."""
    key = key_of(server).public_key()
    with pytest.raises(gateway.InvalidToken):
        gateway.verify_token(der_signature(server), key, NOW_MS)
    assert gateway.verify_token(handmade(claims_of_certificate(), server), key, NOW_MS)


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("number", [0, "q", "max"])
def test_ds_signatures_out_of_range(half: int, number: Any) -> None:
    """r and s lie between 0 and q: an r or s of zero once was a signature of everything."""
    signed, _, last = handmade(claims_of_certificate(), "DS128").rpartition(".")
    value = {"q": int(public("DS128")["q"], 16), "max": 2**160 - 1}.get(number, 0)
    signature = bytearray(unb64(last))
    signature[half * 20 : half * 20 + 20] = value.to_bytes(20, "big")
    with pytest.raises(gateway.InvalidToken):
        gateway.verify_token(f"{signed}.{b64(signature)}", key_of("DS128").public_key(), NOW_MS)


@pytest.mark.parametrize("place", [0, 20, 40])
def test_ds_signatures_of_another_length(place: int) -> None:
    """A zero byte before r or s changes no number, and so would be another spelling."""
    signed, _, last = handmade(claims_of_certificate(), "DS128").rpartition(".")
    signature = unb64(last)[:place] + b"\0" + unb64(last)[place:]
    with pytest.raises(gateway.InvalidToken):
        gateway.verify_token(f"{signed}.{b64(signature)}", key_of("DS128").public_key(), NOW_MS)


def assertion_by(name: str = "RS128", **claims: Any) -> str:
    """An assertion of a client, with claims exchanged."""
    return handmade({"aud": AUDIENCE, "exp": NOW_MS + 60_000} | claims, name)


def forged_by_chain() -> str:
    """The holder of a certificate writes another one, about somebody else's number."""
    claims = claims_of_certificate("RS128 other") | {"verifiedMSISDN": "+447700900666"}
    own = f"{certificate()}~{handmade(claims, 'RS128')}"
    return f"{own}~{handmade({'aud': AUDIENCE, 'exp': NOW_MS + 60_000}, 'RS128 other')}"


@pytest.mark.parametrize(
    "audience", [AUDIENCE, AUDIENCE + "/", "https://SHOP.example", AUDIENCE + ":443"]
)
def test_an_audience_is_an_origin_however_it_is_spelled(audience: str) -> None:
    backed = f"{certificate()}~{assertion_by(aud=audience)}"
    assert believe(backed)["verifiedMSISDN"] == NUMBER
    key = key_of("RS256 server").public_key()
    backed = f"{certificate()}~{assertion_by()}"
    assert gateway.verify_backed_assertion(backed, audience, ISSUER, key, NOW_MS)


def test_no_audience_is_no_origin() -> None:
    """Two texts that are no origins are not the same one."""
    backed, key = f"{certificate()}~{assertion_by(aud='')}", key_of("RS256 server").public_key()
    for audience in ("", "shop.example", "null"):
        with pytest.raises(gateway.InvalidToken):
            gateway.verify_backed_assertion(backed, audience, ISSUER, key, NOW_MS)


BAD_BACKED: dict[str, Callable[[], str]] = {
    "no assertion": lambda: certificate(),
    "empty assertion": lambda: certificate() + "~",
    "no certificate": lambda: "~" + assertion_by(),
    "nothing": lambda: "~",
    "assertion alone": lambda: assertion_by(),
    "the wrong way round": lambda: f"{assertion_by()}~{certificate()}",
    "a chain": lambda: f"{certificate()}~{certificate()}~{assertion_by()}",
    "two assertions": lambda: f"{certificate()}~{assertion_by()}~{assertion_by()}",
    "the certificate twice": lambda: f"{certificate()}~{certificate()}",
    "joined by a dot": lambda: f"{certificate()}.{assertion_by()}",
    "another audience": lambda: f"{certificate()}~{assertion_by(aud='https://evil.example')}",
    "audience with a path": lambda: f"{certificate()}~{assertion_by(aud=AUDIENCE + '/x')}",
    "audience without a scheme": lambda: f"{certificate()}~{assertion_by(aud='shop.example')}",
    "audience of another scheme": lambda: f"{certificate()}~"
    f"{assertion_by(aud='http://shop.example')}",
    "audience at another port": lambda: f"{certificate()}~{assertion_by(aud=AUDIENCE + ':8443')}",
    "audience with a login": lambda: f"{certificate()}~{assertion_by(aud='https://a@shop.example')}",
    "audience empty": lambda: f"{certificate()}~{assertion_by(aud='')}",
    "audience twice": lambda: f"{certificate()}~" + handmade(
        json.dumps({"exp": NOW_MS + 9}).replace("{", f'{{"aud":"x","aud":"{AUDIENCE}",').encode(),
        "RS128",
    ),
    "a name twice, deep inside": lambda: f"{certificate()}~" + handmade(
        f'{{"aud":"{AUDIENCE}","exp":{NOW_MS + 9},"z":[{{"a":1,"a":1}}]}}'.encode(), "RS128"
    ),
    "alg twice": lambda: f"{certificate()}~" + handmade(
        {"aud": AUDIENCE, "exp": NOW_MS + 9}, "RS128", b'{"alg":"none","alg":"RS128"}'
    ),
    "a chain that forges": lambda: forged_by_chain(),
    "audience a list": lambda: f"{certificate()}~{assertion_by(aud=[AUDIENCE])}",
    "audience null": lambda: f"{certificate()}~{assertion_by(aud=None)}",
    "assertion by another client": lambda: f"{certificate()}~{assertion_by('RS128 other')}",
    "assertion by the server": lambda: f"{certificate()}~{assertion_by('RS256 server')}",
    "assertion expired": lambda: f"{certificate()}~{assertion_by(exp=NOW_MS - 1)}",
    "assertion in seconds": lambda: f"{certificate()}~{assertion_by(exp=NOW_MS // 1000 + 60)}",
    "assertion to come": lambda: f"{certificate()}~{assertion_by(iat=NOW_MS + 1)}",
    "assertion's iat a text": lambda: f"{certificate()}~{assertion_by(iat='now')}",
    "another issuer": lambda: f"{certificate(issuer='other.example')}~{assertion_by()}",
    "issuer without its port": lambda: f"{certificate(issuer='id.example')}~{assertion_by()}",
    "issuer missing": lambda: f"{with_claims('RS256 server', iss=...)}~{assertion_by()}",
    "issuer a list": lambda: f"{with_claims('RS256 server', iss=[ISSUER])}~{assertion_by()}",
    "no key": lambda: f"{with_claims('RS256 server', **{'public-key': ...})}~{assertion_by()}",
    "e of 1": lambda: (
        with_claims("RS256 server", **{"public-key": rs(e="1")}) + "~" + assertion_by()
    ),
    "another kind of key": lambda: f"{certificate('DS128')}~{assertion_by('RS128')}",
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_BACKED)
def test_refused_backed_assertions(name: str) -> None:
    with pytest.raises(gateway.InvalidToken):
        believe(BAD_BACKED[name]())


def test_times_of_a_certificate() -> None:
    """Good from ten seconds before its making until its end, to the millisecond."""
    backed = f"{certificate()}~{assertion_by(exp=NOW_MS + 10**9)}"
    for good in (NOW_MS - 10_000, NOW_MS, NOW_MS + 3_599_999):
        assert believe(backed, now_ms=good)
    for bad in (NOW_MS - 10_001, NOW_MS + 3_600_001, NOW_MS // 1000, 0):
        with pytest.raises(gateway.InvalidToken):
            believe(backed, now_ms=bad)


def test_messages_hold_nothing_secret() -> None:
    """What is wrong is told without the number or the token."""
    for token in (changed(certificate(), exp=1), certificate(server="RS128 other")):
        with pytest.raises(gateway.InvalidToken) as caught:
            gateway.verify_token(token, key_of("RS256 server").public_key(), NOW_MS)
        assert NUMBER[1:] not in str(caught.value)
        assert token.split(".")[1] not in str(caught.value)


# -- Properties ---------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
"""Any JSON, and what Python's reader takes for it: NaN, infinity."""


@given(st.sampled_from(["RS256 server", "DS128"]), st.integers(0, 2), st.data())
@examples(max_examples=60, deadline=None)
def test_one_flipped_bit(server: str, part: int, data: st.DataObject) -> None:
    """In header, payload or signature: nothing is believed any more."""
    parts = handmade(claims_of_certificate(), server).split(".")
    content = bytearray(unb64(parts[part]))
    bit = data.draw(st.integers(0, len(content) * 8 - 1))
    content[bit // 8] ^= 1 << bit % 8
    parts[part] = b64(content)
    with pytest.raises(gateway.InvalidToken):
        gateway.verify_token(".".join(parts), key_of(server).public_key(), NOW_MS)


@given(st.sampled_from(["RS128", "DS128"]), st.data())
@examples(max_examples=60, deadline=None)
def test_one_changed_character(name: str, data: st.DataObject) -> None:
    """Catches decoders that overlook bits behind the end, or letters of other alphabets."""
    token = handmade(claims_of_certificate(), name)
    place = data.draw(st.integers(0, len(token) - 1) | st.just(len(token) - 1))
    letter = data.draw(st.sampled_from("ABCDEFGHabcxyz0189-_.+/~ \n\0é"))
    other = token[:place] + letter + token[place + 1 :]
    if other != token:
        with pytest.raises(gateway.InvalidToken):
            gateway.verify_token(other, key_of(name).public_key(), NOW_MS)


def is_value_or_refusal(call: Callable[[], Any]) -> None:
    """Any other exception than these two fails the test."""
    try:
        assert call() is not None
    except (gateway.InvalidToken, gateway.InvalidParameter):
        pass


@pytest.mark.slow
@given(
    claims=JSON | st.fixed_dictionaries({"exp": JSON | st.just(2**50), "iat": JSON, "aud": JSON}),
    header=JSON
    | st.fixed_dictionaries(
        {"alg": st.just("RS128") | JSON},
        optional={"typ": JSON, "crit": JSON, "b64": JSON, "kid": JSON},
    ),
)
@examples(max_examples=80, deadline=None)
def test_any_signed_json(claims: Any, header: Any) -> None:
    """A client signs whatever it likes: a relying party gets claims or InvalidToken."""
    token = handmade(claims, "RS128", header)
    is_value_or_refusal(lambda: gateway.verify_token(token, key_of("RS128").public_key(), NOW_MS))
    is_value_or_refusal(lambda: believe(f"{certificate()}~{token}"))


@given(st.text() | st.from_regex(r"[A-Za-z0-9_.~=-]*"))
@examples(max_examples=50, deadline=None)
def test_any_text_as_a_token(text: str) -> None:
    """Alone, around a good certificate, and behind it as an assertion."""
    key = key_of("RS256 server").public_key()
    for token in (text, certificate() + text, text + certificate(), f"{certificate()}~{text}"):
        with pytest.raises(gateway.InvalidToken):
            believe(token)
        if text:
            with pytest.raises(gateway.InvalidToken):
                gateway.verify_token(token, key, NOW_MS)


@given(
    JSON.map(json.dumps)
    | st.text()
    | JSON
    | st.fixed_dictionaries(
        {"algorithm": st.sampled_from(["RS", "DS", "rs", None])},
        optional={
            name: JSON | st.integers(-2, 2**20).map(str) | st.from_regex("[0-9a-fA-F]*")
            for name in "neypqg"
        },
    )
)
@examples(max_examples=80, deadline=None)
def test_any_value_as_a_key(value: Any) -> None:
    is_value_or_refusal(lambda: gateway.parse_public_key(value))


@given(st.sampled_from(KINDS), st.data())
@examples(max_examples=40, deadline=None)
def test_keys_with_one_number_changed(name: str, data: st.DataObject) -> None:
    """What is taken has the size that its name tells, and comes back as it was."""
    key = public(name)
    field = data.draw(st.sampled_from(sorted(key.keys() - {"algorithm"})))
    base = 10 if name.startswith("RS") else 16
    value = int(key[field], base) + data.draw(st.integers(-3, 3) | st.integers(0, 2**64))
    key[field] = str(value) if base == 10 else f"{value:x}"
    try:
        read = gateway.parse_public_key(key)
    except gateway.InvalidParameter:
        return
    assert gateway.public_key_json(read) == key == gateway.canonical_key(key)
    assert gateway.algorithm_of(read) == name


# -- Key files ----------------------------------------------------------------

PEM, NO_PASSWORD = serialization.Encoding.PEM, serialization.NoEncryption()
PKCS8 = serialization.PrivateFormat.PKCS8
EC_CURVE_THAT_NOBODY_KNOWS = b"""-----BEGIN PRIVATE KEY-----
MGECAQAwEAYHKoZIzj0CAQYFK4EEAAgESjBIAgEBBBUAT/64UaTWBAslrJvoMgP7
uDF47TKhLAMqAARuJmjT4saWYz+LV5Tem/MhMTc4ACxNm3HN3W7vckvCMGwB69yX
ThN5
-----END PRIVATE KEY-----
"""
DSA_2048_224 = b"""-----BEGIN PRIVATE KEY-----
MIICXAIBADCCAjUGByqGSM44BAEwggIoAoIBAQD+VH3Eo2NNII2s9d12+rpY5D2Q
6lhurx5eAB0qSGo7F10tzprQ/JwpLenhwOEycFOd6uHhbSBMH/9zLSGuUhD4gGtk
6nvJJvr4KqhnfKeimCO64LBLpo5bCDbgogS0+nR6LEkuObzUXc0+9+uvVDto0MdV
f1k1t7NXv3TLH9Ow7QedzBUnAHRO+4jfDXE1KNnGMh1HPkxOaKM5LLakKdoqX3zo
u6OMenUaydxgOsBvJJPQoz86dbrIMPRJi9ZnbcCMZfYZXgLkcgpdH/D5klyzI6gr
u4ELq5ZmfhoRsVXBjrXNzyBI3WzSHWzIAyquiTjaOjryfJxYYwBNr7ecXyg5Ah0A
2b15jDA7folmLv/HEtyjVtcp1TB7qpI40goYuwKCAQA7u5UErTOIwCm45LKSFrwU
a/wnAee5FUnfk86jfSKKPkEqKB8AndzTRs+NjR/Ii74dGOnDF9JRb5Fx/mck72RD
ElJ9m72+I4dl59rd+tJOnuFvK2cAEd4JXr2/lCSvtvngecd9ZvJ+w8wLgdmFoLaq
YKN2FHZD/Ez+l5lieKdsgugGYFZLLgkl+GZUjYKxY5HbfFZaPz/77RdqrL9aVR6r
9asMqrX3v7lbwyfjwvCmS9Ixfmn1xJF/oVdAgVpLOYJQJnBFl3C9+5T6G1qRelUV
orAVDzNIdVTZqRJDHrqXwC25OFsbl6As6sB8Pp0FP9eV7tI+6q4WSk9UwOm7jTBh
BB4CHEf8Puu+Wwg+KClyXkpoJunMNIvwefI/qvspb7s=
-----END PRIVATE KEY-----
"""


def private_pem(key: Any, encryption: Any = NO_PASSWORD, form: Any = PKCS8) -> bytes:
    """A private key as a PEM file."""
    return bytes(key.private_bytes(PEM, form, encryption))


def settings_for(folder: Path) -> gateway.Settings:
    """Settings with keys and data below ``folder``."""
    return gateway.Settings(keys_dir=str(folder / "keys"), data_dir=str(folder / "data"))


def put_key(folder: Path, pem: bytes, mode: int = 0o600) -> Path:
    """Lay a key file where the gateway looks for it."""
    path = folder / "keys" / "browserid.pem"
    path.parent.mkdir(mode=0o700)
    path.write_bytes(pem)
    path.chmod(mode)
    return path


BAD_KEY_FILES: dict[str, Callable[[], bytes]] = {
    # what is in the file: a start that goes on takes it, or makes a new key in silence
    "empty": lambda: b"",
    "half written": lambda: private_pem(key_of("RS256"))[:900],
    "one letter changed": lambda: private_pem(key_of("RS256")).replace(b"\nMI", b"\nNI", 1),
    "noise": lambda: bytes(range(256)),
    "encrypted": lambda: private_pem(
        key_of("RS256"), serialization.BestAvailableEncryption(b"secret")
    ),
    "RSA, 1024 bits": lambda: private_pem(key_of("RS128")),
    "RSA, 1536 bits": lambda: private_pem(rsa.generate_private_key(65537, 1536)),
    "DSA, 1024 bits": lambda: private_pem(key_of("DS128")),
    "DSA, 2048/224 bits": lambda: DSA_2048_224,  # its signatures fit no name
    "elliptic curve": lambda: private_pem(ec.generate_private_key(ec.SECP256R1())),
    "unknown elliptic curve": lambda: EC_CURVE_THAT_NOBODY_KNOWS,
    "Ed25519": lambda: private_pem(ed25519.Ed25519PrivateKey.generate()),
    "a public key": lambda: public_pem("RS256"),
    "DER": lambda: key_of("RS256").private_bytes(serialization.Encoding.DER, PKCS8, NO_PASSWORD),
    "BrowserID's JSON": lambda: json.dumps(public("RS256")).encode(),
    "another secret": lambda: b"ab" * 32 + b"\n",
}


@pytest.mark.parametrize("name", BAD_KEY_FILES)
def test_unfit_key_files_stop_the_start(tmp_path: Path, name: str) -> None:
    """A clear refusal that names the file; the file stays, nothing is laid beside it."""
    content = BAD_KEY_FILES[name]()
    path = put_key(tmp_path, content)
    with pytest.raises(gateway.StartError, match=re.escape(str(path))):
        gateway.load_signing_key(settings_for(tmp_path))
    assert path.read_bytes() == content
    assert os.listdir(path.parent) == ["browserid.pem"]


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660])
def test_key_file_that_others_can_read(tmp_path: Path, mode: int) -> None:
    path = put_key(tmp_path, private_pem(key_of("RS256")), mode)
    with pytest.raises(gateway.StartError, match="ours, with mode 600"):
        gateway.load_signing_key(settings_for(tmp_path))
    assert stat.S_IMODE(path.stat().st_mode) == mode


@pytest.mark.parametrize("what", ["folder", "dangling link"])
def test_something_else_in_the_key_files_place(tmp_path: Path, what: str) -> None:
    path = tmp_path / "keys" / "browserid.pem"
    path.parent.mkdir(mode=0o700)
    if what == "folder":
        path.mkdir(mode=0o700)
    else:
        path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(gateway.StartError, match=r"browserid\.pem"):
        gateway.load_signing_key(settings_for(tmp_path))
    assert os.listdir(path.parent) == ["browserid.pem"]
    assert not (tmp_path / "nowhere").exists()


def test_keys_dir_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("mine")
    with pytest.raises(gateway.StartError):
        gateway.load_signing_key(settings_for(tmp_path))
    assert (tmp_path / "keys").read_text() == "mine"


def test_first_start_makes_a_key_and_keeps_it(tmp_path: Path) -> None:
    """RSA-2048, readable by its owner alone whatever the umask; the second start says "old"."""
    before = os.umask(0)
    try:
        key, made = gateway.load_signing_key(settings_for(tmp_path))
    finally:
        os.umask(before)
    path = tmp_path / "keys" / "browserid.pem"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert os.listdir(path.parent) == ["browserid.pem"]
    assert made
    assert isinstance(key, rsa.RSAPrivateKey)
    assert key.key_size == 2048
    again, made = gateway.load_signing_key(settings_for(tmp_path), "DS")
    assert not made
    assert again.private_numbers() == key.private_numbers()


def test_many_first_starts_at_once_share_one_key(tmp_path: Path) -> None:
    """Workers that start together: one makes the key, the others take it, no draft is left."""
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: gateway.load_signing_key(settings_for(tmp_path)), range(4)))
    assert [made for _, made in found].count(True) == 1
    assert len({private_pem(key) for key, _ in found}) == 1
    assert os.listdir(tmp_path / "keys") == ["browserid.pem"]


@pytest.mark.parametrize(
    "pem",
    [
        lambda: private_pem(key_of("RS256"), form=serialization.PrivateFormat.TraditionalOpenSSL),
        lambda: private_pem(key_of("DS256")),
    ],
    ids=["RSA as openssl once wrote it", "DSA"],
)
def test_keys_of_others_are_taken(tmp_path: Path, pem: Callable[[], bytes]) -> None:
    put_key(tmp_path, pem())
    key, made = gateway.load_signing_key(settings_for(tmp_path))
    assert not made
    assert isinstance(key, rsa.RSAPrivateKey | dsa.DSAPrivateKey)
    token = gateway.sign_token({"exp": NOW_MS + 1}, key)
    assert opened(token).header["alg"] in ("RS256", "DS256")


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["RS", "DS"])
def test_generate_keypair(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], algorithm: str
) -> None:
    """The pair is made once; asked again, the command fails and leaves it as it is."""
    command = ["generate-keypair", "--algorithm", algorithm, "--keys-dir", str(tmp_path / "keys")]
    assert gateway.main(command) == 0
    path = tmp_path / "keys" / "browserid.pem"
    pem, shown = path.read_bytes(), capsys.readouterr()
    key = serialization.load_pem_private_key(pem, None)
    assert isinstance(key, rsa.RSAPrivateKey if algorithm == "RS" else dsa.DSAPrivateKey)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert json.loads(shown.out) == gateway.public_key_json(key.public_key())
    assert str(path) in shown.err
    for again in ("RS", "DS"):
        assert gateway.main([*command, "--algorithm", again]) == 1
        shown = capsys.readouterr()
        assert shown.out == ""
        assert str(path) in shown.err
    assert path.read_bytes() == pem
    assert os.listdir(path.parent) == ["browserid.pem"]


@pytest.mark.parametrize("name", ["empty", "half written", "encrypted", "elliptic curve"])
def test_generate_keypair_leaves_any_file_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """A damaged key may be all that a back-up can be compared with."""
    content = BAD_KEY_FILES[name]()
    path = put_key(tmp_path, content)
    assert gateway.main(["generate-keypair", "--keys-dir", str(path.parent)]) == 1
    assert path.read_bytes() == content
    assert capsys.readouterr().out == ""


def test_generate_keypair_refuses_other_algorithms(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        gateway.main(["generate-keypair", "--algorithm", "EC", "--keys-dir", str(tmp_path / "k")])
    assert caught.value.code == 2
    assert not (tmp_path / "k").exists()


def test_issuing_with_a_wrong_signature_is_noticed() -> None:
    """This file's own eye: it can say no."""
    with pytest.raises(InvalidSignature):
        check_signature(changed(certificate(), exp=NOW_MS), "RS256 server")
