"""What a relying party does with a proof of a phone number: PyJWT, and nothing of the gateway's.

``keys`` is ``jwt.PyJWKClient(f"{issuer}/.well-known/jwks.json")``, made once: it keeps what it has
fetched for five minutes, and asks again when a proof names a key that it does not know.

A proof of this minute may be about a number that was verified a year ago (the gateway's
``verified_ttl_s``), and numbers change hands. So ``auth_time`` is bounded by ``VERIFIED_S``: choose
what you can bear.
"""

import base64
import hashlib
import time

import jwt

VERIFIED_S = 30 * 86400
"""How long ago the holder may have read an SMS at the number."""
ALGORITHMS = {"EC": "ES256", "OKP": "EdDSA", "RSA": "RS256"}


def checked(token, typ, key, algorithm, names, **expected):
    """The claims of a token of this type and algorithm, if it has all these names."""
    if jwt.get_unverified_header(token).get("typ") != typ:
        raise ValueError(f"this is no {typ}")
    options = {"require": names, "enforce_minimum_key_length": True}
    claims = jwt.decode(token, key, [algorithm], options=options, leeway=60, **expected)
    if "auth_time" in names and claims["auth_time"] < time.time() - VERIFIED_S:
        raise ValueError("the number was verified too long ago")
    return claims


def number_of_sd_jwt(shown, keys, issuer, audience, nonce):
    """The number of whoever shows ``proof~binding`` to us, now; ValueError if nothing is proved."""
    try:
        proof, binding = shown.split("~")  # exactly one ~
        key = keys.get_signing_key_from_jwt(proof)
        names = ["iss", "exp", "iat", "cnf", "auth_time", "phone_number"]
        claims = checked(proof, "dc+sd-jwt", key, "ES256", names, issuer=issuer)
        key, kty = jwt.PyJWK(claims["cnf"]["jwk"]), claims["cnf"]["jwk"]["kty"]
        names = ["iat", "aud", "nonce", "sd_hash"]
        note = checked(binding, "kb+jwt", key, ALGORITHMS[kty], names, audience=audience)
        digest = base64.urlsafe_b64encode(hashlib.sha256(f"{proof}~".encode()).digest())
        if (note["nonce"], note["sd_hash"]) != (nonce, digest.decode().rstrip("=")):
            raise ValueError("made for another nonce, or for another proof")
        if note["iat"] < time.time() - 300 or claims["vct"] != f"{issuer}/vct/phone/1":
            raise ValueError("too old, or a proof of something else")
        return claims["phone_number"]
    except (jwt.PyJWTError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"not proved: {error}") from error


def number_of_jwt(token, keys, issuer, audience, nonce, used):
    """The number that a JWT proves to us, once: ``used`` keeps each ``jti`` till its ``exp``."""
    try:
        key = keys.get_signing_key_from_jwt(token)
        names = ["iss", "aud", "exp", "iat", "jti", "auth_time", "phone_number"]
        claims = checked(token, "JWT", key, "ES256", names, issuer=issuer, audience=audience)
    except (jwt.PyJWTError, AttributeError, TypeError) as error:
        raise ValueError(f"not proved: {error}") from error
    if claims.get("nonce") != nonce or claims["jti"] in used:
        raise ValueError("made for another nonce, or shown before")
    used.add(claims["jti"])
    return claims["phone_number"]
