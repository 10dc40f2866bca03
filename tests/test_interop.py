"""Other people's Hawk (mohawk) and BrowserID (PyBrowserID) against ours, over real HTTP."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import browserid.errors
import browserid.jwt
import lab
import mohawk
import mohawk.exc
import mohawk.util
import pytest
import urllib3
from browserid.supportdoc import SupportDocumentManager
from browserid.tests.support import get_keypair
from browserid.verifiers.local import LocalVerifier
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import dsa, padding, rsa
from support import AT_ONCE, NUMBER, GatewayProcess, WsgiClient, host_of

import gateway

AUDIENCE = "https://shop.example"


# -- A client that has nothing from us ----------------------------------------


def credentials_from(token: str) -> dict[str, str]:
    """Hawk id and key from a session token: RFC 5869 written out, for mohawk."""
    extracted = hmac.digest(bytes(32), bytes.fromhex(token), "sha256")
    material, block = b"", b""
    for count in (b"\1", b"\2"):
        info = b"identity.mozilla.com/picl/v1/sessionToken"
        block = hmac.digest(extracted, block + info + count, "sha256")
        material += block
    return {"id": material[:32].hex(), "key": material[32:].hex(), "algorithm": "sha256"}


class Reply(NamedTuple):
    """An answer, and the mohawk that asked for it."""

    status: int
    headers: Any
    data: bytes
    sender: mohawk.Sender

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.data)

    def accept(self, now_s: float, **changes: Any) -> None:
        """Have mohawk check the ``Server-Authorization``, or one with ``changes``."""
        values = {
            "response_header": self.headers["Server-Authorization"],
            "content": self.data,
            "content_type": self.headers.get("Content-Type", ""),
        } | changes
        offset_s = now_s - time.time()
        self.sender.accept_response(
            **values, localtime_offset_in_seconds=offset_s, timestamp_skew_in_seconds=7200
        )


class Device:
    """Signs with mohawk, sends with urllib3, and checks each answer with mohawk.

    Args:
        address: Where the gateway listens.
        public_url: What is signed.
        now_s: The gateway's clock, if it stands still.
    """

    def __init__(self, address: str, public_url: str = "", now_s: float = 0) -> None:
        self.address, self.public_url, self.stopped_s = address, public_url or address, now_s
        self.http = urllib3.PoolManager(retries=False, timeout=10)
        self.credentials: dict[str, str] = {}

    @property
    def now_s(self) -> float:
        """Now, as the gateway has it."""
        return self.stopped_s or time.time()

    def register(self, path: str = "/register") -> None:
        """Open a session."""
        answer = self.http.request("POST", self.address + path)
        assert answer.status == 200
        self.credentials = credentials_from(answer.json()["msisdnSessionToken"])

    def send(
        self,
        path: str,
        body: Any = None,
        kind: str = "application/json",
        late_s: int = 0,
        header: str = "",
        **options: Any,
    ) -> Reply:
        """One signed POST; the answer is not checked. ``options`` go to mohawk's Sender."""
        data = (
            body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        )
        headers = {"Content-Type": kind} if data else {}
        content = {"content": data, "content_type": kind if data else ""}
        sender = mohawk.Sender(
            **{
                "credentials": dict(self.credentials),
                "url": self.public_url + path,
                "method": "POST",
                "_timestamp": int(self.now_s) - late_s,
                **content,
                **options,
            }
        )
        headers["Authorization"] = header or sender.request_header
        answer = self.http.request("POST", self.address + path, body=data, headers=headers)
        return Reply(answer.status, answer.headers, answer.data, sender)

    def call(self, path: str, body: Any = None, **options: Any) -> Reply:
        """One signed POST, and the answer's signature checked."""
        reply = self.send(path, body, **options)
        reply.accept(self.now_s)
        return reply

    def verified(self, read_code: Callable[[], str], number: str = NUMBER) -> Device:
        """Register, ask, verify."""
        self.register()
        assert self.call("/sms/verify", {"msisdn": number}).status == 200
        assert self.call("/sms/verify_code", {"code": read_code()}).status == 200
        return self


@pytest.fixture(scope="module")
def ds_keys_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A keys_dir whose key pair is DS256."""
    folder = str(tmp_path_factory.mktemp("ds-keys"))
    gateway.load_signing_key(gateway.Settings(keys_dir=folder, data_dir=folder), "DS")
    return folder


@pytest.fixture(scope="module")
def rs_gate(keys_dir: str) -> Iterator[lab.Lab]:
    """One lab for all tests here (each opens its own session); its server key is RS256."""
    with contextlib.closing(lab.Lab(keys_dir=keys_dir, resend_gaps_s=AT_ONCE)) as made:
        yield made


@pytest.fixture(scope="module")
def ds_gate(ds_keys_dir: str) -> Iterator[lab.Lab]:
    """The same with a DS256 key."""
    with contextlib.closing(lab.Lab(keys_dir=ds_keys_dir, resend_gaps_s=AT_ONCE)) as made:
        yield made


@pytest.fixture(params=["RS256", "DS256"])
def gate(request: pytest.FixtureRequest, rs_gate: lab.Lab, ds_gate: lab.Lab) -> lab.Lab:
    """A lab whose certificates are signed by either kind of server key."""
    return rs_gate if request.param == "RS256" else ds_gate


def device_of(gate: lab.Lab) -> Device:
    """A device at a lab."""
    return Device(gate.address, gate.settings.public_url, gate.now_s)


def phone_of(gate: lab.Lab) -> lab.Handset:
    """A phone at a lab."""
    return lab.Handset(gate.client(), NUMBER)


def walk(device: Device, read_code: Callable[[], str], first: str, second: str) -> None:
    """Every signed endpoint with what it may answer; each answer is checked by mohawk.

    Args:
        first: What stands before ``/sms/…``: "" or ``/v1/msisdn``.
        second: What stands before ``/certificate/sign``: "" or ``/v1``.
    """
    key = {"publicKey": gateway.public_key_json(key_of("DS128").public_key())}
    ask = {"msisdn": NUMBER, "mcc": "234", "mnc": "15"}

    def says(expected: tuple[int, int | None], path: str, body: Any = None, **options: Any) -> Any:
        """One call, its status and its errno."""
        path = (second if path.startswith("/certificate/") else first) + path
        reply = device.call(path, body, **options)
        found = reply.json if reply.data else {}
        assert (reply.status, found.get("errno")) == expected, (path, found)
        return found

    device.register(first + "/register")
    says((410, 111), "/sms/resend_code")
    says((410, 111), "/sms/verify_code", {"code": "000000"})
    says((400, 104), "/certificate/sign", key)
    says((400, 108), "/certificate/sign")
    says((400, 108), "/sms/verify", {"mcc": "234"})
    says((400, 107), "/sms/verify", {"msisdn": "07700900123"})
    says((400, 106), "/sms/verify", b'{"msisdn": ')
    says((400, 106), "/sms/verify", b"[]")
    says((415, 106), "/sms/verify", b"<msisdn/>", kind="text/xml")
    says((204, None), "/sms/mt/verify", ask)
    assert says((200, None), "/sms/verify", ask)["mtSender"] == "Gateway"
    assert says((200, None), "/sms/resend_code")["mtSender"] == "Gateway"
    assert says((200, None), "/sms/resend_code", {"shortVerificationCode": True})
    says((400, 107), "/sms/verify_code", {"code": "x" * 6})
    says((400, 105), "/sms/verify_code", {"code": f"{(int(read_code()) + 1) % 10**6:06}"})
    says((400, 107), "/sms/verify_code", {"code": "12"})
    says((400, 107), "/sms/verify_code", {"code": "f" * 32})
    says((400, 107), "/sms/verify_code", {"code": read_code(), "publicKey": {}})
    json_kind = "application/json; charset=UTF-8"
    assert says((200, None), "/sms/verify_code", {"code": read_code()}, kind=json_kind) == {
        "msisdn": NUMBER
    }
    says((410, 111), "/sms/verify_code", {"code": read_code()})
    assert says((200, None), "/certificate/sign", key).keys() == {"cert"}
    says((200, None), "/certificate/sign", {**key, "duration": 5}, always_hash_content=False)
    says((400, 107), "/certificate/sign", {**key, "duration": 0})
    says((400, 107), "/sms/mt/verify", {"msisdn": "+447700900124"})
    says((204, None), "/sms/mt/verify", ask)
    says((429, 114), "/sms/verify", ask)
    says((204, None), "/unregister")
    gone = device.send(first + "/unregister")
    assert (gone.status, gone.json["errno"]) == (401, 110)
    assert "Server-Authorization" not in gone.headers


# -- Hawk ---------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), [("", ""), ("/v1/msisdn", "/v1")])
def test_mohawk_walks_the_whole_api(rs_gate: lab.Lab, first: str, second: str) -> None:
    walk(device_of(rs_gate), phone_of(rs_gate).code, first, second)


def test_a_real_process(start_gateway: Callable[..., GatewayProcess]) -> None:
    """The same against ``python gateway.py``: its own clock, and Hawk by the Host header."""
    server = start_gateway()
    device = Device(server.url)
    phone = lab.Handset(server.client(), NUMBER)
    for prefixes in (("", ""), ("/v1/msisdn", "/v1")):
        walk(device, phone.code, *prefixes)
    device.verified(phone.code)
    public, assertion = theirs("DS128").assertion(AUDIENCE, int(time.time() * 1000) + 60_000)
    cert = device.call("/certificate/sign", {"publicKey": public}).json["cert"]
    document = device.http.request("GET", server.url + "/.well-known/browserid").json()
    found = verifier({host_of(server.url): document}).verify(f"{cert}~{assertion}", AUDIENCE)
    assert found["idpClaims"]["verifiedMSISDN"] == NUMBER


@pytest.mark.parametrize(
    "options",
    [
        {"ext": "some-app-data"},
        {"ext": "a!#$%&'()*+,-./:;<=>?@[]^_`{|}~ b"},  # all that Hawk allows in a header
        {"app": "app1"},  # app without dlg adds two lines, one of them empty
        {"app": "app1", "dlg": "app2", "ext": "x"},
        {"nonce": "a" * 200},
        {"nonce": "}{"},  # the nonce's key names its record in braces
        {"content_type": "Application/JSON ; charset=utf-8"},  # hashed in small letters, bare
        {"always_hash_content": False, "content": mohawk.base.EmptyValue},  # no hash at all
        {"late_s": 59},
        {"late_s": -59},
    ],
    ids=str,
)
def test_fields_that_mohawk_signs(rs_gate: lab.Lab, options: dict[str, Any]) -> None:
    device = device_of(rs_gate)
    device.register()
    assert device.call("/sms/verify_code", {"code": "000000"}, **options).status == 410


@pytest.mark.parametrize(
    "public_url", ["https://id.example", "http://id.example:8443", "http://[2001:db8::1]"]
)
def test_what_is_signed_is_the_public_url(
    make_lab: Callable[..., lab.Lab], keys_dir: str, public_url: str
) -> None:
    """Behind a proxy the Host header names somebody else; the query is signed as it was sent."""
    nexmo = {"kind": "nexmo", "api_key": "k", "api_secret": "s", "endpoint": "http://127.0.0.1:9"}
    there = {"public_url": public_url, "trusted_proxies": []}
    gate = make_lab(keys_dir=keys_dir, sms_providers=[nexmo], **there)
    device = device_of(gate)
    device.register()
    for query in ("", "?a=1", "?b=%2F+%20&b=~'&c"):
        assert device.call(f"/sms/verify_code{query}", {"code": "000000"}).status == 410
    wrong = Device(gate.address, now_s=gate.now_s)
    wrong.credentials = device.credentials
    assert wrong.send("/sms/verify_code", {"code": "000000"}).json["errno"] == 109


def test_replay_and_stale_answers_are_signed(rs_gate: lab.Lab) -> None:
    """Their MAC is right, so that the client may trust what they say; ``tsm`` signs the time."""
    device = device_of(rs_gate)
    device.register()
    first = device.call("/sms/verify_code", {"code": "000000"})
    again = device.send(
        "/sms/verify_code",
        {"code": "000000"},
        nonce=first.sender.req_resource.nonce,
        header=first.sender.request_header,
    )
    again.accept(rs_gate.now_s)
    assert (again.status, again.json["errno"]) == (401, 109)
    for late_s in (61, -61, 10**6):
        stale = device.send("/sms/verify_code", {"code": "000000"}, late_s=late_s)
        stale.sender.accept_response(
            stale.headers["Server-Authorization"],
            content=stale.data,
            content_type=stale.headers["Content-Type"],
            timestamp_skew_in_seconds=10**10,
        )
        assert (stale.status, stale.json["errno"]) == (401, 109)
        told = mohawk.util.parse_authorization_header(stale.headers["WWW-Authenticate"])
        assert int(told["ts"]) == int(rs_gate.now_s)
        tsm = mohawk.util.calculate_ts_mac(told["ts"], device.credentials)
        assert told["tsm"] == tsm.decode()


@pytest.mark.parametrize(
    "options",
    [
        {"content": b'{"code": "000001"}'},  # another body than the one that was hashed
        {"content_type": "text/plain"},
        {"content": b"", "content_type": ""},
    ],
    ids=["body", "type", "nothing"],
)
def test_wrong_payload_hash_is_refused_and_the_answer_signed(
    rs_gate: lab.Lab, options: dict[str, Any]
) -> None:
    device = device_of(rs_gate)
    device.register()
    reply = device.call("/sms/verify_code", {"code": "000000"}, **options)
    assert (reply.status, reply.json["errno"]) == (401, 109)


@pytest.mark.parametrize(
    "options",
    [
        {"url": "http://localhost:5000/sms/verify"},
        {"url": "http://localhost:5000/v1/msisdn/sms/verify_code"},  # the other spelling
        {"url": "http://localhost:5000/sms/verify_code?x"},
        {"url": "http://localhost:5001/sms/verify_code"},
        {"url": "http://127.0.0.1:5000/sms/verify_code"},
        {"url": "https://localhost/sms/verify_code"},
        {"method": "GET"},
        {"key": "0" * 64},
        {"algorithm": "sha1"},
        {"key bytes": True},
    ],
    ids=str,
)
def test_wrong_macs_are_refused_and_the_answer_is_not_signed(
    rs_gate: lab.Lab, options: dict[str, Any]
) -> None:
    """Catches a MAC over too little, and a server that signs for whoever asks."""
    device = device_of(rs_gate)
    device.register()
    given: dict[str, Any] = dict(device.credentials)
    given |= {k: options[k] for k in ("key", "algorithm") if k in options}
    if "key bytes" in options:
        given["key"] = bytes.fromhex(given["key"])
    rest = {k: v for k, v in options.items() if k in ("url", "method")}
    reply = device.send("/sms/verify_code", {"code": "000000"}, credentials=given, **rest)
    assert (reply.status, reply.json["errno"]) == (401, 109)
    assert reply.headers["WWW-Authenticate"] == "Hawk"
    assert "Server-Authorization" not in reply.headers


def test_mohawk_refuses_changed_answers(rs_gate: lab.Lab) -> None:
    """The oracle can say no: another body, another type, the answer to another request."""
    device = device_of(rs_gate)
    device.register()
    one = device.call("/sms/verify_code", {"code": "000000"})
    two = device.call("/sms/verify_code", {"code": "000000"})
    for change in ({"content": one.data + b" "}, {"content_type": "text/html"}, {"content": b""}):
        with pytest.raises(mohawk.exc.MisComputedContentHash):
            one.accept(rs_gate.now_s, **change)
    with pytest.raises(mohawk.exc.MacMismatch):
        one.accept(rs_gate.now_s, response_header=two.headers["Server-Authorization"])


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"CONTENT_LENGTH": "10241"}, (413, 113)),
        ({"CONTENT_LENGTH": None, "HTTP_TRANSFER_ENCODING": "chunked"}, (411, 112)),
    ],
    ids=["too large", "chunked"],
)
def test_refused_bodies_of_signed_requests(
    client: WsgiClient, environ: dict[str, Any], expected: tuple[int, int]
) -> None:
    """Every answer to a request whose MAC was right is signed, and its nonce is used up."""
    credentials = credentials_from(client.register().json["msisdnSessionToken"])
    url = f"http://{client.host}/sms/verify_code"
    body = b'{"code": "000000"}'
    sender = mohawk.Sender(credentials, url, "POST", body, "application/json")
    environ = {**environ, "HTTP_AUTHORIZATION": sender.request_header}
    answer = client.raw("POST", "/sms/verify_code", body, environ)
    assert (answer.status, answer.errno) == expected
    sender.accept_response(
        answer.headers["server-authorization"],
        content=answer.data,
        content_type=answer.headers["content-type"],
    )
    whole = {"HTTP_AUTHORIZATION": sender.request_header}
    replayed = client.raw("POST", "/sms/verify_code", body, whole)
    assert (replayed.status, replayed.errno) == (401, 109)


@pytest.mark.parametrize("url", ["http://localhost:5000/a?b=%20", "https://id.example/sms/verify"])
@pytest.mark.parametrize("ext", ["", "some ext"])
@pytest.mark.parametrize("body", [b"", b'{"a": 1}'])
def test_mohawk_takes_requests_of_our_client(url: str, ext: str, body: bytes) -> None:
    """And refuses them when the body differs."""
    token = gateway.SessionToken(bytes(range(0xA0, 0xC0)))
    ours, now = gateway.derive_credentials(token), int(time.time())
    kind = "application/json" if body else ""
    target = gateway.hawk_target("POST", url)
    header = gateway.build_authorization(ours, target, now, "n0nce", kind, body, ext)

    def receive(content: bytes) -> mohawk.Receiver:
        return mohawk.Receiver(
            lambda _: credentials_from(token.hex()),
            header,
            url,
            "POST",
            content=content,
            content_type=kind,
            seen_nonce=lambda *_: False,
        )

    assert receive(body).parsed_header["nonce"] == "n0nce"
    with pytest.raises(mohawk.exc.MisComputedContentHash):
        receive(body + b" ")


# -- BrowserID ----------------------------------------------------------------


@cache
def key_of(name: str) -> Any:
    """A private key of a client or server, made once, by our side."""
    return gateway.generate_key(name.split()[0])


def their_data(key: Any) -> dict[str, str]:
    """A private key as PyBrowserID takes it."""
    numbers = key.private_numbers()
    public = gateway.public_key_json(key.public_key())
    return {**public, **({"d": str(numbers.d)} if "n" in public else {"x": f"{numbers.x:x}"})}


class Theirs(NamedTuple):
    """A key in PyBrowserID's hands."""

    public: dict[str, str]
    key: Any

    def assertion(self, audience: str, exp_ms: int) -> tuple[dict[str, str], str]:
        """Its public half, and an assertion that PyBrowserID signed with it.

        An RSA signature that begins with a zero byte is one byte short there, against
        PKCS#1: then we take another.
        """
        for extra in range(99):
            token: str = browserid.jwt.generate({"aud": audience, "exp": exp_ms + extra}, self.key)
            size = len(base64.urlsafe_b64decode(token.split(".")[2] + "=="))
            if size in (40, 64, 256):
                return self.public, token
        raise AssertionError("no signature of full length")


@cache
def theirs(name: str) -> Theirs:
    """A key that was not made by our code, on PyBrowserID's side."""
    if name == "DS128":  # in the group that jwcrypto, the JavaScript side, took for all
        return Theirs(*get_keypair("device.example"))
    if name == "RS256":
        key = rsa.generate_private_key(65537, 2048)  # the smallest exponent that is taken
        return Theirs(
            gateway.public_key_json(key.public_key()), browserid.jwt.RS256Key(their_data(key))
        )
    group = key_of("DS256").parameters().parameter_numbers()
    x = secrets.randbelow(group.q - 1) + 1
    numbers = {"p": group.p, "q": group.q, "g": group.g, "y": pow(group.g, x, group.p), "x": x}
    data = {"algorithm": "DS", **{field: f"{number:x}" for field, number in numbers.items()}}
    signer = browserid.jwt.DS256Key(data)
    return Theirs({field: text for field, text in data.items() if field != "x"}, signer)


class OnlyWhatIsGiven(SupportDocumentManager):  # type: ignore[misc]
    """PyBrowserID's own manager of issuers' keys, cut off from the network."""

    def fetch_support_document(self, hostname: str) -> Any:
        raise browserid.errors.InvalidIssuerError(f"nobody told us of {hostname}")


def verifier(documents: dict[str, Any]) -> LocalVerifier:
    """PyBrowserID's verifier, which knows these issuers' /.well-known/browserid."""
    manager = OnlyWhatIsGiven()
    for host, document in documents.items():
        manager.cache[host] = (None, document)
    return LocalVerifier(supportdocs=manager)


class Party(NamedTuple):
    """A relying party: PyBrowserID and our own verifier, with what the server publishes."""

    gate: lab.Lab
    document: dict[str, Any]

    @property
    def now_ms(self) -> int:
        """The gateway's time."""
        return int(self.gate.now_s * 1000)

    def theirs(self, backed: str, late_ms: int = 0) -> Any:
        """What PyBrowserID makes of a backed assertion."""
        documents = {self.gate.settings.issuer: self.document}
        return verifier(documents).verify(backed, AUDIENCE, now=self.now_ms + late_ms)

    def ours(self, backed: str, late_ms: int = 0) -> Any:
        """What our verifier makes of it."""
        key = gateway.parse_public_key(self.document["public-key"])
        issuer = self.gate.settings.issuer
        return gateway.verify_backed_assertion(backed, AUDIENCE, issuer, key, self.now_ms + late_ms)


def party_at(gate: lab.Lab) -> Party:
    """A relying party that has asked for the server's key over HTTP."""
    answer = urllib3.request("GET", gate.address + "/.well-known/browserid")
    return Party(gate, answer.json())


@pytest.fixture
def party(gate: lab.Lab) -> Party:
    """The same, at either kind of server key."""
    return party_at(gate)


@pytest.mark.parametrize("name", ["DS128", "DS256", "RS256"])
@pytest.mark.parametrize("maker", ["ours", "theirs"])
def test_pybrowserid_believes_certificate_and_assertion(
    gate: lab.Lab, party: Party, maker: str, name: str
) -> None:
    """Keys made by either side, assertions signed by either side, checked by both."""
    if maker == "ours":
        key = key_of(name)
        signer = getattr(browserid.jwt, f"{name}Key")(their_data(key))
        their_key = Theirs(gateway.public_key_json(key.public_key()), signer)
    else:
        their_key = theirs(name)
    device = device_of(gate).verified(phone_of(gate).code)
    exp_ms = party.now_ms + 60_000
    public, assertion = their_key.assertion(AUDIENCE, exp_ms)
    assertions = [assertion]
    if maker == "ours":
        assertions.append(gateway.make_assertion(key, AUDIENCE, exp_ms))
    cert = device.call("/certificate/sign", {"publicKey": public, "duration": 60}).json["cert"]
    for assertion in assertions:
        backed = f"{cert}~{assertion}"
        found, claims = party.theirs(backed), party.ours(backed)
        assert found["status"] == "okay"
        assert found["audience"] == AUDIENCE
        assert found["issuer"] == gate.settings.issuer == claims["iss"]
        assert found["email"] == claims["principal"]["email"]
        assert found["idpClaims"] == {
            "verifiedMSISDN": NUMBER,
            "lastVerifiedAt": party.now_ms,
            "lastAuthAt": party.now_ms,
        }
        assert claims["public-key"] == public


def cut(token: str) -> tuple[str, dict[str, Any], str]:
    """Header, claims and signature of a token."""
    header, payload, signature = token.split(".")
    return header, json.loads(base64.urlsafe_b64decode(payload + "==")), signature


def with_claims(token: str, **claims: Any) -> str:
    """The token with other claims and the old signature."""
    header, old, signature = cut(token)
    payload = base64.urlsafe_b64encode(json.dumps(old | claims).encode()).rstrip(b"=").decode()
    return f"{header}.{payload}.{signature}"


@cache
def certificate_of(gate: lab.Lab) -> str:
    """A certificate for ``theirs("DS128")``, good for two minutes; one for all tests of a lab."""
    body = {"publicKey": theirs("DS128").public, "duration": 120}
    device = device_of(gate).verified(phone_of(gate).code)
    return str(device.call("/certificate/sign", body).json["cert"])


Error = browserid.errors


@pytest.mark.parametrize(
    ("spoil", "late_ms", "expected"),
    [
        (lambda c, a, o: with_claims(c, iat=0) + "~" + a, 0, Error.InvalidSignatureError),
        (lambda c, a, o: c + "~" + with_claims(a, exp=2**50), 0, Error.InvalidSignatureError),
        (lambda c, a, o: c + "~" + o(AUDIENCE), 0, Error.InvalidSignatureError),
        (lambda c, a, o: f"{c}~{a[:-54]}{'A' * 54}", 0, Error.InvalidSignatureError),
        (lambda c, a, o: c + "~" + o("https://evil.example"), 0, Error.AudienceMismatchError),
        (lambda c, a, o: f"{c}~{c}~{a}", 0, Error.UnsupportedCertChainError),
        (lambda c, a, o: f"{c}~{a}", 60_100, Error.ExpiredSignatureError),
        (lambda c, a, o: f"{c}~{a}", 120_001, Error.ExpiredSignatureError),
        (lambda c, a, o: f"{c}.x~{a}", 0, ValueError),
        (lambda c, a, o: a, 0, ValueError),
    ],
    ids=["claims", "assertion's claims", "another client", "signature", "audience", "chain",
         "assertion expired", "certificate expired", "fourth part", "no certificate"],
)  # fmt: skip
def test_both_verifiers_refuse_the_same(
    gate: lab.Lab, party: Party, spoil: Any, late_ms: int, expected: type[Exception]
) -> None:
    exp_ms = party.now_ms + 60_000
    assertion = theirs("DS128").assertion(AUDIENCE, exp_ms)[1]
    cert = certificate_of(gate)
    assert party.theirs(f"{cert}~{assertion}")["status"] == "okay"

    def by_another(audience: str) -> str:
        return gateway.make_assertion(key_of("DS128"), audience, exp_ms)

    backed = spoil(cert, assertion, by_another)
    with pytest.raises(expected):
        party.theirs(backed, late_ms)
    with pytest.raises(gateway.InvalidToken):
        party.ours(backed, late_ms)


def test_certificate_of_another_server_is_refused_by_both(
    rs_gate: lab.Lab, make_lab: Callable[..., lab.Lab]
) -> None:
    """The same name, another key pair."""
    party, other = party_at(rs_gate), make_lab()
    device = device_of(other).verified(phone_of(other).code)
    public, assertion = theirs("DS128").assertion(AUDIENCE, party.now_ms + 60_000)
    cert = device.call("/certificate/sign", {"publicKey": public}).json["cert"]
    with pytest.raises(browserid.errors.InvalidSignatureError):
        party.theirs(f"{cert}~{assertion}")
    with pytest.raises(gateway.InvalidToken):
        party.ours(f"{cert}~{assertion}")


@pytest.mark.parametrize("name", ["DS128", "DS256", "RS256"])
@pytest.mark.parametrize("server", ["DS256", "RS256"])
def test_our_verifier_believes_certificates_of_pybrowserid(server: str, name: str) -> None:
    """All of it theirs: issuer, client, both signatures."""
    issuer, client, now_ms = theirs(server), theirs(name), 1_700_000_000_000
    public, assertion = client.assertion(AUDIENCE, now_ms + 1000)
    exp_ms, cert = now_ms + 1000, ""
    while len(cut(cert)[2] if cert else "") not in (86, 342):  # see Theirs.assertion
        exp_ms += 1
        claims = {"iss": "id.example", "exp": exp_ms, "public-key": public}
        cert = browserid.jwt.generate(claims | {"principal": {"email": "a@id.example"}}, issuer.key)
    key = gateway.parse_public_key(issuer.public)
    backed = f"{cert}~{assertion}"
    found = gateway.verify_backed_assertion(backed, AUDIENCE, "id.example", key, now_ms)
    assert found["public-key"] == public
    for late_ms, audience in ((2000, AUDIENCE), (0, AUDIENCE + ".evil.example")):
        with pytest.raises(gateway.InvalidToken):
            gateway.verify_backed_assertion(backed, audience, "id.example", key, now_ms + late_ms)


def test_rs128_is_1024_bits(gate: lab.Lab, party: Party) -> None:
    """PyBrowserID's RS128 has 1280, so ``cryptography`` alone checks ours; theirs is refused."""
    key = key_of("RS128")
    device = device_of(gate).verified(phone_of(gate).code)
    public = gateway.public_key_json(key.public_key())
    cert = device.call("/certificate/sign", {"publicKey": public}).json["cert"]
    assertion = gateway.make_assertion(key, AUDIENCE, party.now_ms + 60_000)
    header, claims, signature = cut(assertion)
    assert json.loads(base64.urlsafe_b64decode(header + "==")) == {"alg": "RS128"}
    assert claims == {"aud": AUDIENCE, "exp": party.now_ms + 60_000}
    raw = base64.urlsafe_b64decode(signature + "==")
    assert len(raw) == 128
    signed = assertion.rpartition(".")[0].encode()
    embedded = cut(cert)[1]["public-key"]
    reader = rsa.RSAPublicNumbers(int(embedded["e"]), int(embedded["n"])).public_key()
    reader.verify(raw, signed, padding.PKCS1v15(), hashes.SHA256())
    with pytest.raises(InvalidSignature):
        reader.verify(raw, signed + b"x", padding.PKCS1v15(), hashes.SHA256())
    assert party.ours(f"{cert}~{assertion}")["public-key"] == public
    longer = gateway.public_key_json(rsa.generate_private_key(65537, 1280).public_key())
    refused = device.call("/certificate/sign", {"publicKey": longer})
    assert (refused.status, refused.json["errno"]) == (400, 107)


def test_ds128_takes_sha1(gate: lab.Lab) -> None:
    """The name tells the hash too: catches DS128 with SHA-256 on both of our sides."""
    key = key_of("DS128")
    signed, _, last = gateway.make_assertion(key, AUDIENCE, 2**50).rpartition(".")
    raw = base64.urlsafe_b64decode(last + "==")
    r, s = int.from_bytes(raw[:20], "big"), int.from_bytes(raw[20:], "big")
    numbers: dsa.DSAPublicNumbers = key.public_key().public_numbers()
    group = numbers.parameter_numbers
    digest = int(hashlib.sha1(signed.encode()).hexdigest(), 16)
    w = pow(s, -1, group.q)  # FIPS 186-4 section 4.7, by hand
    v = pow(group.g, digest * w, group.p) * pow(numbers.y, r * w, group.p) % group.p % group.q
    assert v == r
