"""The two flows as stories from beginning to end, and random lives against a small model."""

from __future__ import annotations

import base64
import itertools
import json
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import lab
import mohawk
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support import AT_ONCE, NUMBER, Answer, Clock, WsgiClient

import gateway

MakeClient = Callable[..., WsgiClient]
CLIENT_KEY = gateway.generate_key("RS256")
KEY = gateway.public_key_json(CLIENT_KEY.public_key())
SHOP = "https://shop.example"
NOW = 1_800_000_000


# -- A relying party of our own -----------------------------------------------


def unpacked(token: str, public: dict[str, str]) -> tuple[Any, Any]:
    """Header and claims of a token that this RSA key signed, checked with cryptography alone."""
    assert public["algorithm"] == "RS"
    header, claims, signature = (
        base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)) for part in token.split(".")
    )
    key = rsa.RSAPublicNumbers(int(public["e"]), int(public["n"])).public_key()
    signed = token.rpartition(".")[0].encode()
    key.verify(signature, signed, padding.PKCS1v15(), hashes.SHA256())
    return json.loads(header), json.loads(claims)


def believe(client: WsgiClient, cert: str, issuer: str, now_s: float) -> Any:
    """What a shop does with a certificate and an assertion; gives the certificate's claims."""
    issuer_key = client.get("/.well-known/browserid").json["public-key"]
    header, claims = unpacked(cert, issuer_key)
    assert header == {"alg": "RS256"}
    assert claims.keys() == {
        "public-key", "principal", "iat", "exp", "iss", "verifiedMSISDN", "lastVerifiedAt",
        "lastAuthAt",
    }  # fmt: skip
    assert claims["iss"] == issuer
    assert claims["iat"] <= now_s * 1000 - 10_000 < now_s * 1000 < claims["exp"]
    assert claims["public-key"] == KEY
    assert claims["principal"].keys() == {"email"}
    assert re.fullmatch(
        r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}@.+", claims["principal"]["email"]
    )
    assert claims["principal"]["email"].rpartition("@")[2] == issuer
    assertion = gateway.make_assertion(CLIENT_KEY, SHOP, int(now_s * 1000) + 60_000)
    assert unpacked(assertion, claims["public-key"])[1]["aud"] == SHOP
    ours = gateway.parse_public_key(issuer_key)
    backed = f"{cert}~{assertion}"
    assert gateway.verify_backed_assertion(backed, SHOP, issuer, ours, int(now_s * 1000)) == claims
    for audience, issued_by in (("https://evil.example", issuer), (SHOP, "evil.example")):
        with pytest.raises(gateway.InvalidToken):
            gateway.verify_backed_assertion(backed, audience, issued_by, ours, int(now_s * 1000))
    with pytest.raises(InvalidSignature):
        unpacked(cert, KEY)
    return claims


# -- Stories ------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "/v1/msisdn"])
def test_the_registration_flow(make_client: MakeClient, prefix: str) -> None:
    clock = Clock()
    client = make_client(clock=clock, mt_sender="Gateway", mt_sender_map={"23415": "+447700900001"})
    network = {"mcc": "234", "mnc": "15", "roaming": False}
    opened = client.call(prefix + "/register", {"msisdn": NUMBER, **network})
    assert opened.json["verificationMethods"] == ["sms/mt"]
    url = urlsplit(opened.json["verificationUrl"])
    assert (url.netloc, url.path) == ("127.0.0.1:5000", prefix + "/sms/verify")
    token = gateway.SessionToken(bytes.fromhex(opened.json["msisdnSessionToken"]))
    client.credentials = gateway.derive_credentials(token)

    asked = client.call(url.path, {"msisdn": "+44 7700 900-123", **network})
    assert asked.json["mtSender"] == "+447700900001"
    (message,) = client.outbox()  # the device catches the message by its sender
    assert message["from"] == asked.json["mtSender"]
    found = re.fullmatch("Your verification code is: ([0-9]{6})", message["text"])
    assert found

    clock.now_s += 20
    body = {"code": found[1], "publicKey": KEY, "duration": 3600}
    verified = client.call(prefix + "/sms/verify_code", body)
    assert verified.json["msisdn"] == NUMBER
    claims = believe(client, verified.json["cert"], "127.0.0.1:5000", clock.now_s)
    assert claims["verifiedMSISDN"] == NUMBER
    assert claims["lastVerifiedAt"] == (NOW + 20) * 1000
    assert claims["exp"] == (NOW + 20 + 3600) * 1000

    assert client.call(prefix + "/unregister").status == 204
    assert client.outbox() == []
    gone = client.call("/certificate/sign", {"publicKey": KEY})
    assert (gone.status, gone.errno) == (401, 110)


@pytest.mark.parametrize("by_phone", [False, True])
def test_the_discover_flow(make_client: MakeClient, by_phone: bool) -> None:
    clock = Clock()
    client = make_client(clock=clock, mo_verifier_map={"214": "+34600000003"})
    number = "+34612345678"
    known = {} if by_phone else {"msisdn": number}  # a device that does not know its number
    found = client.call("/discover", {"mcc": "214", "mnc": "07", **known}).json
    assert found["verificationMethods"][0] == ("sms/momt" if by_phone else "sms/mt")
    client.register()
    assert client.credentials
    if by_phone:
        assert found["verificationDetails"]["sms/momt"]["moVerifier"] == "+34600000003"
        text = f"/sms/momt/verify {client.credentials.hawk_id}"
        query = f"?provider=nexmo&msisdn={number[1:]}&text={text.replace(' ', '+')}"
        assert client.get("/sms/momt/" + query).json == {}
    else:
        path = urlsplit(found["verificationDetails"]["sms/mt"]["url"]).path
        assert client.call(path, {"msisdn": number, "mcc": "214"}).status == 204
    (message,) = client.outbox(number)
    assert re.fullmatch("[0-9a-f]{32}", message["text"])
    assert message["from"] == found["verificationDetails"]["sms/momt"]["mtSender"]
    assert client.call("/sms/verify_code", {"code": message["text"]}).json == {"msisdn": number}

    first = client.call("/certificate/sign", {"publicKey": KEY, "duration": 60}).json
    claims = believe(client, first["cert"], "127.0.0.1:5000", clock.now_s)
    clock.now_s += 86_400  # a day later, for the next shop, with no SMS
    second = client.call("/certificate/sign", {"publicKey": json.dumps(KEY)}).json
    later = believe(client, second["cert"], "127.0.0.1:5000", clock.now_s)
    assert later["principal"] == claims["principal"]
    assert later["verifiedMSISDN"] == number
    assert later["lastVerifiedAt"] == NOW * 1000
    assert later["lastAuthAt"] == (NOW + 86_400) * 1000
    assert len(client.outbox(number)) == 1


def test_a_deployment_behind_a_proxy(make_client: MakeClient) -> None:
    """Its public name is signed and returned; a real provider carries the messages."""
    forms: list[dict[str, str]] = []

    def provider(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
        forms.append(dict(parse_qsl(body.decode())))
        start_response("200 OK", [("Content-Type", "application/json")])
        return [b'{"messages": [{"status": "0"}]}']

    class Proxied(WsgiClient):
        host = "id.example:443"

    page = "https://www.example"
    near = {"HTTP_HOST": "10.0.0.5:5000", "HTTP_X_FORWARDED_FOR": "192.0.2.9", "HTTP_ORIGIN": page}
    with lab.serving(provider) as url:
        entry = {"kind": "nexmo", "endpoint": url, "api_key": "k", "api_secret": "s"}
        names = {"public_url": "https://id.example", "allowed_origins": [page]}
        made = make_client(**names, trusted_proxies=[], sms_providers=[entry])
        client = Proxied(made.app)
        opened = client.register(mcc="234", msisdn=NUMBER).json
        assert opened["verificationUrl"] == "https://id.example/sms/verify"
        asked = client.call("/sms/verify", {"msisdn": NUMBER}, environ=near)
        assert asked.json["mtSender"] == "Gateway"
    sentence, bound = forms[0]["text"].splitlines()
    code = sentence.split()[-1]
    assert bound == f"@www.example #{code}"
    body = {"code": code, "publicKey": KEY}
    cert = client.call("/sms/verify_code", body, environ=near).json["cert"]
    assert believe(client, cert, "id.example", client.gateway.clock())["verifiedMSISDN"] == NUMBER
    outbox = f"/outbox?to={NUMBER[1:]}&token={client.app.token}"
    assert client.raw("GET", outbox).status == 404
    closed = client.raw("POST", "/sms/momt/?provider=nexmo")  # no webhook is open unasked
    assert (closed.status, closed.errno) == (400, 107)
    assert len(forms) == 1


def test_an_independent_hawk_client_walks_the_whole_flow(make_client: MakeClient) -> None:
    client = make_client()
    client.register()
    assert client.credentials
    login = {"id": client.credentials.hawk_id, "key": client.credentials.hawk_key.hex()}

    def call(path: str, body: Any = None) -> Answer:
        data, kind = (b"", "") if body is None else (json.dumps(body).encode(), "application/json")
        url = f"http://{client.host}{path}"
        hawk = mohawk.Sender(
            {**login, "algorithm": "sha256"}, url, "POST", content=data, content_type=kind
        )
        environ = {"HTTP_AUTHORIZATION": hawk.request_header}
        answer = client.raw("POST", path, data, environ)
        hawk.accept_response(
            answer.headers["server-authorization"],
            content=answer.data,
            content_type=answer.headers.get("content-type", ""),
        )
        with pytest.raises(mohawk.exc.HawkFail):  # and it does look at the body
            hawk.accept_response(
                answer.headers["server-authorization"],
                content=answer.data + b" ",
                content_type=answer.headers.get("content-type", ""),
            )
        return answer

    assert call("/certificate/sign", {"publicKey": KEY}).errno == 104
    assert call("/sms/verify", {"msisdn": NUMBER}).status == 200
    assert call("/sms/resend_code").status == 200
    assert call("/v1/msisdn/sms/verify_code", {"code": "000000x"}).errno == 107
    assert call("/sms/verify_code", {"code": client.code()}).json == {"msisdn": NUMBER}
    assert call("/v1/certificate/sign?a=b", {"publicKey": KEY}).status == 200
    assert call("/unregister").status == 204


def test_a_client_with_a_wrong_clock_finds_its_way(make_client: MakeClient) -> None:
    clock = Clock()
    client = make_client(clock=clock)
    client.register()
    assert client.credentials
    behind = NOW - 5000
    refused = client.call("/sms/verify", {"msisdn": NUMBER}, ts=behind)
    assert (refused.status, refused.errno) == (401, 109)
    told = dict(re.findall(r'(\w+)="([^"]*)"', refused.headers["www-authenticate"]))
    assert told["tsm"] == gateway.time_mac(client.credentials.hawk_key, int(told["ts"]))
    off_s = int(told["ts"]) - behind
    assert client.call("/sms/verify", {"msisdn": NUMBER}, ts=behind + off_s).status == 200


def test_a_clumsy_person_gets_there(make_client: MakeClient) -> None:
    clock = Clock()
    client = make_client(clock=clock)
    client.register()
    assert client.call("/sms/resend_code").errno == 111  # nothing was asked for
    assert client.ask("07700 900123").errno == 107
    assert client.ask().status == 200
    assert client.call("/sms/verify_code", {"code": client.code()[:5]}).errno == 107
    clock.now_s += 601  # went for a tea
    assert client.call("/sms/verify_code", {"code": client.code()}).errno == 111
    assert client.call("/sms/resend_code").status == 200
    old = client.code()
    assert client.ask().status == 200
    for _ in range(3):  # the old message: it costs no try, and they are told what is wrong
        answer = client.call("/sms/verify_code", {"code": old})
        assert answer.errno == 105
        assert "a newer code was sent" in answer.json["message"]
    assert client.call("/sms/verify_code", {"code": client.code(), "duration": 0}).errno == 107
    done = client.call("/sms/verify_code", {"code": client.code(), "publicKey": KEY})
    claims = believe(client, done.json["cert"], "127.0.0.1:5000", clock.now_s)
    assert claims["verifiedMSISDN"] == NUMBER


def test_workers_and_restarts_share_one_store(
    make_client: MakeClient, tmp_path_factory: pytest.TempPathFactory
) -> None:
    one, two = make_client(), make_client()
    one.register()
    assert one.call("/sms/verify", {"msisdn": NUMBER}, nonce="n").status == 200
    two.credentials = one.credentials
    assert two.call("/sms/verify", {"msisdn": NUMBER}, nonce="n").errno == 109
    assert two.call("/sms/verify_code", {"code": one.code()}).json == {"msisdn": NUMBER}
    signed = one.call("/certificate/sign", {"publicKey": KEY}).json
    believe(two, signed["cert"], "127.0.0.1:5000", two.gateway.clock())
    stranger = make_client(keys_dir=str(tmp_path_factory.mktemp("others")))
    stranger.credentials = one.credentials  # another master secret opens nothing
    assert stranger.call("/certificate/sign", {"publicKey": KEY}).errno == 110
    assert two.call("/unregister").status == 204
    assert one.call("/certificate/sign", {"publicKey": KEY}).errno == 110


# -- Random lives -------------------------------------------------------------


class Life(RuleBasedStateMachine):
    """One person's session, step by step, beside a model of what the contract says."""

    client: WsgiClient
    clock: Clock
    gaps_s: list[int]
    numbers = itertools.count()

    def __init__(self) -> None:
        super().__init__()
        self.me = self.client.another()
        self.number = f"+4477009{next(self.numbers):05}"
        self.me.register()
        self.left = 0
        self.start()

    def start(self) -> None:
        """The model of a fresh session."""
        self.code, self.dies_s, self.tries, self.sends = "", 0.0, 0, 0
        self.long, self.again, self.asked_s, self.verified_s = False, False, 0.0, 0
        self.old = self.older = ""

    # The model: 30 lines of contract.

    def alive(self) -> bool:
        """Whether a code is waiting."""
        return bool(self.code) and self.clock.now_s < self.dies_s

    def asked(self, answer: Answer, long: bool, again: bool = False) -> None:
        """A message was asked for; ``again``: by /sms/resend_code."""
        passed_s = self.clock.now_s - self.asked_s
        same = (self.long, self.again or not again) == (long, True)
        if self.sends and passed_s < self.gaps_s[0] and same and self.alive():
            assert answer.status in (200, 204)  # a double click; the invariant counts messages
            return
        gap_s = self.gaps_s[min(self.sends, len(self.gaps_s)) - 1] if self.sends else 0
        if self.sends == 5 or passed_s < gap_s:
            assert (answer.status, answer.errno) == (429, 114)
            assert self.sends == 5 or answer.json["retryAfter"] == gap_s - passed_s
            return
        assert answer.status in (200, 204)
        self.older, self.tries = (self.code, self.tries) if self.alive() else ("", 0)
        self.old = self.code or self.old
        self.code, self.dies_s = self.me.code(self.number), self.clock.now_s + 600
        self.sends, self.asked_s = self.sends + 1, self.clock.now_s
        self.long, self.again = long, again
        assert re.fullmatch("[0-9a-f]{32}" if long else "[0-9]{6}", self.code)

    def failed(self, answer: Answer, code: str) -> None:
        """A code that is not the right one was returned."""
        if not self.alive():
            assert (answer.status, answer.errno) == (410, 111)
        elif code == self.older:
            assert (answer.status, answer.errno) == (400, 105)
            assert "newer" in answer.json["message"]
        elif (len(code) == 32) != self.long:
            assert (answer.status, answer.errno) == (400, 107)
        else:
            assert (answer.status, answer.errno) == (400, 105)
            assert "newer" not in answer.json["message"]
            self.tries += 1
            if self.tries == 3:
                self.code = self.older = ""

    def certified(self, answer: Answer) -> None:
        """There is a certificate, and it says when the number was verified."""
        _, claims = unpacked(answer.json["cert"], self.me.gateway.keys.browserid_json)
        assert claims["verifiedMSISDN"] == self.number
        assert claims["lastVerifiedAt"] == self.verified_s * 1000

    # What may happen, in any order.

    @rule(choice=st.sampled_from([None, True, False]), mt=st.booleans())
    def ask(self, choice: bool | None, mt: bool) -> None:
        """Ask for a code of either kind, at either endpoint."""
        body = {"msisdn": self.number, "shortVerificationCode": choice}
        answer = self.me.call("/sms/mt/verify" if mt else "/sms/verify", body)
        self.asked(answer, mt if choice is None else not choice)

    @precondition(lambda self: self.sends)
    @rule()
    def ask_for_another_number(self) -> None:
        """A session has one number."""
        answer = self.me.ask("+447700800000")
        assert (answer.status, answer.errno) == (400, 107)

    @rule(choice=st.sampled_from([None, True, False, "yes"]))
    def resend(self, choice: Any) -> None:
        """Ask again, by resend_code."""
        answer = self.me.call("/sms/resend_code", {"shortVerificationCode": choice})
        if not self.sends:
            assert (answer.status, answer.errno) == (410, 111)
        else:
            self.asked(answer, self.long if not isinstance(choice, bool) else not choice, True)

    @rule(times=st.integers(1, 3), which=st.sampled_from(["dead", "older", "000000", "f" * 32]))
    def return_a_wrong_code(self, times: int, which: str) -> None:
        """One that is dead, the one before the newest, or one that was never sent."""
        wrong = {"dead": self.old, "older": self.older}.get(which, which) or "000000"
        for _ in range(times):
            self.failed(self.me.call("/sms/verify_code", {"code": wrong}), wrong)

    @rule(code=st.sampled_from(["", "12345x", 123456, None, "1" * 33]), key=st.booleans())
    def return_nonsense(self, code: Any, key: bool) -> None:
        """It costs no try; nor does a bad key beside the right code, which is looked at last."""
        if key and self.code:
            answer = self.me.call("/sms/verify_code", {"code": self.code, "publicKey": "bad"})
            assert answer.errno == (107 if self.alive() else 111)
        else:
            answer = self.me.call("/sms/verify_code", {"code": code})
            assert (answer.status, answer.errno) == (400, 107 if code else 108)

    @precondition(lambda self: self.code)
    @rule(key=st.booleans())
    def return_the_code(self, key: bool) -> None:
        """The right one, if it still lives."""
        body = {"code": self.code, **({"publicKey": KEY} if key else {})}
        answer = self.me.call("/sms/verify_code", body)
        if not self.alive():
            self.failed(answer, self.code)
            return
        assert answer.json["msisdn"] == self.number
        self.old, self.code, self.older, self.tries = self.code, "", "", 0
        self.verified_s = int(self.clock.now_s)
        assert ("cert" in answer.json) == key
        if key:
            self.certified(answer)

    @rule(bad=st.booleans())
    def sign(self, bad: bool) -> None:
        """Only who is verified gets a certificate, a failed new round notwithstanding."""
        answer = self.me.call("/certificate/sign", {"publicKey": "bad" if bad else KEY})
        if self.verified_s and bad:
            assert (answer.status, answer.errno) == (400, 107)
        elif self.verified_s:
            self.certified(answer)
        else:
            assert (answer.status, answer.errno) == (400, 104)

    @rule(seconds=st.sampled_from([1, 29, 30, 299]))
    def wait(self, seconds: int) -> None:
        """Time passes."""
        self.clock.now_s += seconds

    @precondition(lambda self: self.alive())
    @rule(left_s=st.sampled_from([0, 1]))
    def wait_for_the_end(self, left_s: int) -> None:
        """Until the code has died, or is about to."""
        self.clock.now_s = self.dies_s - left_s

    @rule()
    def text(self) -> None:
        """An SMS of one's own changes nothing once the code was asked for over Hawk."""
        if self.sends and self.me.credentials:
            sms = f"msisdn={self.number[1:]}&text={self.me.credentials.hawk_id}"
            assert self.me.get(f"/sms/momt/?provider=nexmo&{sms}").json == {}

    @precondition(lambda self: self.sends > 2)
    @rule()
    def unregister(self) -> None:
        """Nothing is left; the same person comes back with a fresh session."""
        assert self.me.call("/unregister").status == 204
        for path in ("/sms/resend_code", "/unregister"):
            assert self.me.call(path).errno == 110
        # The outbox forgets a number for whoever has shown that it is theirs, and for nobody else.
        self.left = 0 if self.verified_s else self.left + self.sends
        self.me.register()
        self.start()

    @invariant()
    def messages_and_record_are_as_they_must_be(self) -> None:
        """As many messages as were asked for; at most 96 bytes in the store."""
        assert len(self.me.outbox(self.number)) == self.left + self.sends
        assert self.me.credentials
        storage_id = self.me.gateway.secrets.id_for(self.me.credentials.hawk_id)
        assert len(self.me.gateway.storage.get(storage_id) or bytes(97)) <= 96

    def teardown(self) -> None:
        """Leave no record."""
        assert self.me.call("/unregister").status == 204


@pytest.mark.slow
@pytest.mark.parametrize("gaps_s", [AT_ONCE, [30, 60]], ids=str)
def test_random_lives_are_as_the_contract_says(make_client: MakeClient, gaps_s: list[int]) -> None:
    clock = Clock()

    class ThisLife(Life):
        pass

    ThisLife.client, ThisLife.clock = make_client(clock=clock, resend_gaps_s=gaps_s), clock
    ThisLife.gaps_s = gaps_s
    run_state_machine_as_test(
        ThisLife,
        settings=settings(
            max_examples=30, stateful_step_count=30, deadline=None, database=None, derandomize=True
        ),
    )
