"""A client of the gateway for Python programs: the standard library, and ``cryptography`` for keys.

Copy it. It opens a session, has a code sent, returns it, gets a proof and shows that to a site:

    client = Client("https://id.example")
    client.register()
    client.call("POST", "/sms/verify", {"msisdn": "+447700900123"})
    key = ec.generate_private_key(ec.SECP256R1())
    body = {"code": input("The code in the SMS: "), "publicKey": public_jwk(key)}
    proof = client.call("POST", "/sms/verify_code", body)["cert"]
    shown = present(proof, key, "https://shop.example", nonce_of_the_shop, client.now())

As a command it prints the header that curl needs for one request:

    curl -H "$(python client.py TOKEN POST URL "$BODY")" --json "$BODY" URL
"""

import base64
import hashlib
import hmac
import json
import re
import secrets
import sys
import time
import urllib.error
import urllib.request
from urllib.parse import urljoin, urlsplit


def b64(data):
    """base64, as Hawk uses it."""
    return base64.b64encode(data).decode()


def b64url(data):
    """base64url without padding, as JWTs use it."""
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def derive_credentials(token):
    """The public id and the secret key of a session, both 64 hex digits, from its token."""
    secret = hmac.digest(bytes(32), bytes.fromhex(token), "sha256")  # HKDF (RFC 5869): extract
    info = b"identity.mozilla.com/picl/v1/sessionToken"
    first = hmac.digest(secret, info + b"\1", "sha256")  # and expand, to 64 bytes
    return first.hex(), hmac.digest(secret, first + info + b"\2", "sha256").hex()


def payload_hash(content_type, body):
    """The hash of a body (bytes) and its media type. No body is b"" of type ""."""
    kind = content_type.split(";")[0].strip().lower()
    return b64(hashlib.sha256(b"hawk.1.payload\n%b\n%b\n" % (kind.encode(), body)).digest())


def normalized(title, method, url, ts, nonce, hash):
    """What a MAC covers: ``title`` is hawk.1.header for a request, hawk.1.response for its answer.

    Both have the request's method, URL, ts and nonce; ``hash`` is that of the body in question.
    """
    parts = urlsplit(url)
    path = (parts.path or "/") + ("?" + parts.query if parts.query else "")
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    return "\n".join(map(str, (title, ts, nonce, method, path, parts.hostname, port, hash, "", "")))


def mac(key, text):
    """The MAC of a text. The 64 hex digits of the key sign as text, not as 32 bytes."""
    return b64(hmac.digest(key.encode(), text.encode(), "sha256"))


def authorization(credentials, method, url, ts, nonce, content_type="", body=b""):
    """The Authorization header of a request."""
    hash = payload_hash(content_type, body)
    signed = mac(credentials[1], normalized("hawk.1.header", method, url, ts, nonce, hash))
    return f'Hawk id="{credentials[0]}", ts="{ts}", nonce="{nonce}", hash="{hash}", mac="{signed}"'


def check_answer(credentials, method, url, ts, nonce, header, content_type, body):
    """Whether a Server-Authorization header signs this body as the answer to this request."""
    hash = payload_hash(content_type, body)
    signed = mac(credentials[1], normalized("hawk.1.response", method, url, ts, nonce, hash))
    told = fields_of(header)
    same = hmac.compare_digest(told.get("mac", "").encode(), signed.encode())
    return same and told.get("hash") == hash


def fields_of(header):
    """The fields of a Hawk header; {} if it is none."""
    return dict(re.findall(r'(\w+)="([^"]*)"', header)) if header.startswith("Hawk ") else {}


class GatewayError(Exception):
    """What the gateway refused: ``status``, and ``body`` with errno, retryAfter, next, info.

    ``signed`` tells that the gateway did so itself; else a proxy, or anybody, may have said it.
    """

    def __init__(self, status, body, signed):
        super().__init__(body.get("message", f"HTTP status {status}"))
        self.status, self.body, self.errno, self.signed = status, body, body.get("errno"), signed


class Client:
    """Opens a session at ``base_url``, signs, and checks every answer.

    Keep ``token``, which is secret, and give it again to go on with the same session later.
    """

    def __init__(self, base_url, token=""):
        self.base_url, self.token, self.skew_s = base_url, token, 0.0

    def now(self):
        """Seconds since the epoch, by the gateway's clock as far as it is known."""
        return int(time.time() + self.skew_s)

    def register(self, body=None):
        """Open a session: from now on every call is signed."""
        answer = self.call("POST", "/register", body, signed=False)
        self.token = answer["msisdnSessionToken"]
        return answer

    def call(self, method, path, body=None, signed=True, again=True):
        """Send a request; gives the JSON of the answer, or raises GatewayError.

        ``signed`` is False for /register and /discover alone; so it is for documents.
        """
        url, data = urljoin(self.base_url, path), b"" if body is None else json.dumps(body).encode()
        kind, ts, nonce = "application/json" if data else "", self.now(), secrets.token_urlsafe(9)
        request = urllib.request.Request(url, data or None, method=method)
        if method == "POST":
            request.data = data  # urllib makes up a media type for it, unless there is one
            request.add_header("Content-Type", kind)
        credentials = derive_credentials(self.token) if signed else None
        if credentials:
            header = authorization(credentials, method, url, ts, nonce, kind, data)
            request.add_header("Authorization", header)
        try:
            answer = urllib.request.urlopen(request, timeout=30)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            content, kind = answer.read(), answer.headers.get("Content-Type", "")
        seal = answer.headers.get("Server-Authorization", "")
        sent = (credentials, method, url, ts, nonce)
        genuine = bool(credentials) and check_answer(*sent, seal, kind, content)
        if credentials and not genuine and (seal or answer.status < 400):
            raise ValueError("the answer is not signed by the gateway")
        challenge = answer.headers.get("WWW-Authenticate", "")
        if genuine and again and self.set_clock(credentials, challenge):
            return self.call(method, path, body, again=False)  # once, with the right time
        found = json.loads(content) if kind.startswith("application/json") else {}
        # The seal covers the body and no status; the body of an error says its own, as "code".
        if answer.status >= 400 or "errno" in found:
            raise GatewayError(found.get("code", answer.status), found, genuine)
        return found

    def set_clock(self, credentials, challenge):
        """Set our clock by the time in a refusal, if the gateway signed that."""
        told = fields_of(challenge)
        ts = told.get("ts", "")
        if told.get("tsm") != mac(credentials[1], f"hawk.1.ts\n{ts}\n"):
            return False
        self.skew_s = int(ts) - time.time()
        return True


def public_jwk(key):
    """The public half of an EC P-256 key of ``cryptography``, as a JWK."""
    numbers = key.public_key().public_numbers()
    x, y = (b64url(number.to_bytes(32, "big")) for number in (numbers.x, numbers.y))
    return {"kty": "EC", "crv": "P-256", "x": x, "y": y}


def present(proof, key, audience, nonce, now_s):
    """An SD-JWT as one site is shown it: with a KB-JWT for its origin and nonce."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, utils

    digest = b64url(hashlib.sha256(proof.encode()).digest())
    note = {"aud": audience, "nonce": nonce, "iat": now_s, "sd_hash": digest}
    parts = {"alg": "ES256", "typ": "kb+jwt"}, note
    text = ".".join(b64url(json.dumps(part).encode()) for part in parts)
    pair = utils.decode_dss_signature(key.sign(text.encode(), ec.ECDSA(hashes.SHA256())))
    return f"{proof}{text}.{b64url(b''.join(n.to_bytes(32, 'big') for n in pair))}"


if __name__ == "__main__":
    token, method, url, *rest = sys.argv[1:]
    body = rest[0].encode() if rest else b""
    kind, nonce = "application/json" if body else "", secrets.token_urlsafe(9)
    told = derive_credentials(token), method, url, int(time.time()), nonce, kind, body
    print("Authorization:", authorization(*told))
