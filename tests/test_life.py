"""The life of a session, in any order of calls, against a model written from CONTRACT.md.

A state machine of hypothesis calls the WSGI application, over a real store, in the place of two
clients and a phone; ``model.py`` says what each answer must be. Time passes for the gateway's clock
and for the store alike. A provider in this process takes messages, refuses them, or holds one back
while others go on. ``tests/fuzz.py`` runs it for longer.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import re
import secrets
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Final, cast
from urllib.parse import urlencode

import jwt
import lab
import model
import provider as sms
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from hypothesis import HealthCheck, Phase, reject
from hypothesis import settings as examples
from hypothesis import strategies as st
from hypothesis.errors import FlakyStrategyDefinition, HypothesisException
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from provider import Provider
from support import Answer, Clock, WsgiClient

import gateway

NUMBERS: Final = ("+447700900123", "+447700900999")
"""Both have the same prefix."""
ADDRESSES: Final = ("203.0.113.7", "198.51.100.9")
SESSIONS_MAX: Final = 4
ORIGIN = "https://shop.example"
CLIENT_KEY: Final = load_pem_private_key((lab.TEST_KEYS / "client.pem").read_bytes(), None)
_PUBLIC: Final = jwt.algorithms.ECAlgorithm.to_jwk(
    ec.generate_private_key(ec.SECP256R1()).public_key(), as_dict=True
)
JWK: Final = {name: _PUBLIC[name] for name in ("kty", "crv", "x", "y")}
BROWSERID: Final = gateway.public_key_json(cast(gateway.PublicKey, CLIENT_KEY.public_key()))
PROOFS: Final[dict[str, dict[str, Any]]] = {
    "browserid": {"publicKey": BROWSERID},
    "browserid text": {"publicKey": json.dumps(BROWSERID)},
    "sd-jwt": {"publicKey": JWK},
    "jwt": {"format": "jwt", "audience": ORIGIN + ":443/"},
    "jwt with key": {"format": "jwt", "audience": ORIGIN, "publicKey": JWK, "nonce": "n"},
    "bad": {"publicKey": {"algorithm": "RS", "n": "15", "e": "65537"}},
    "missing": {"publicKey": "", "duration": 60},
}
"""What a request for a proof holds; "bad" is 400/107, "missing" 400/108 at /certificate/sign."""
DURATIONS: Final[dict[Any, int]] = {1: 1, "60": 60, 7200: 7200, 99_999_999: 86_400}
"""What is asked, and what it means."""
RULES: Final = {
    "paid": model.Rules(verified_ttl_s=200_000),
    "tight": model.Rules(
        sends_per_session=4, resend_gaps_s=(20, 50), sends_per_hour=9, registers_per_address=3,
        unverified_per_address=6, unverified_per_prefix=7, unverified_per_destination=8,
    ),
    "outbox": model.Rules(paid=False),
    "off": model.Rules(limits="off"),
}  # fmt: skip
AGE_SCRIPT: Final = """
for _, key in ipairs(redis.call('KEYS', '*')) do
  local left = redis.call('PTTL', key)
  if left >= 0 then redis.call('PEXPIRE', key, left - ARGV[1]) end
end"""
"""Time passes for everything that the store keeps for a time; what has none left is gone."""


class Desk(gateway.SmsProvider):
    """A provider in this process: does with each message what it was told to, and keeps it."""

    def __init__(self, entry: Any, settings: gateway.Settings, paid: bool) -> None:
        super().__init__(entry, settings)
        self.paid = paid  # type: ignore[misc]
        self.sent: list[tuple[str, str]] = []
        self.outcome, self.hold = "taken", False
        self.held, self.go_on = threading.Event(), threading.Event()

    def send(self, sender: str, to: Any, text: str, timeout_s: float = 5.0) -> list[str]:
        """Take a message, or not."""
        self.sent.append((to, str(text)))
        if self.hold:
            self.hold = False
            self.held.set()
            assert self.go_on.wait(300)
        if self.outcome != "taken":
            errors = {"failed": gateway.SmsFailed, "refused": gateway.SmsRefused}
            raise errors.get(self.outcome, gateway.SmsUnknown)("as it was told")
        return []


class Place:
    """A gateway, which many lives use one after another: its keys take long to load."""

    def __init__(self, rules: model.Rules, store_url: str) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="life")
        folder = Path(self.folder.name)
        for path in lab.TEST_KEYS.glob("*.*"):
            gateway.write_private_file(folder / path.name, path.read_bytes())
        values: dict[str, Any] = rules._asdict()
        paid = values.pop("paid")
        for name in values:
            if name.startswith("unverified_per_") or name.startswith("sends_per_number"):
                values[name] = f"{values[name]}/day"
        values["registers_per_address"] = f"{rules.registers_per_address}/minute"
        values["unverified_per_destination"] = {"*": values["unverified_per_destination"]}
        values["resend_gaps_s"] = list(rules.resend_gaps_s)
        entry = {"kind": "nexmo", "api_key": "key", "api_secret": "secret"}
        self.settings = gateway.Settings(
            keys_dir=str(folder), data_dir=str(folder), spend_per_day=1e9, sms_providers=[entry],
            sms_inbound=[{"kind": "nexmo", "path_secret": "p4th"}], **values,
        )  # fmt: skip
        self.clock = Clock()
        self.app = gateway.create_app(self.settings, store_url, clock=self.clock)
        self.desk = Desk(entry, self.settings, paid)
        self.app.gateway.sms.providers[:] = [self.desk]
        self.app.gateway.sms.paid = paid
        self.kids = {0: self.kid(0)}  # by when the key signs from

    def kid(self, from_s: int) -> str:
        """The name of a proof key (RFC 7638)."""
        path = Path(self.folder.name, f"proof-{from_s}.pem")
        return str(gateway.load_proof_key(path, from_s, path.read_bytes()).jwk["kid"])

    def rotate(self, now_s: int) -> None:
        """``rotate-keys``: the new key is published at once, and signs ten minutes later."""
        from_s = max(now_s + 600, max(self.kids) + 1)
        gateway.add_proof_key(self.settings, from_s)
        self.kids[from_s] = self.kid(from_s)

    def forget_keys(self) -> None:
        """Remove the keys whose proofs have ended, as ``rotate-keys`` does."""
        for from_s in sorted(self.kids)[:-1]:
            Path(self.folder.name, f"proof-{from_s}.pem").unlink()
            del self.kids[from_s]


class Life(RuleBasedStateMachine):
    """Two clients, a phone, a gateway, and the model."""

    store: gateway.EmbeddedStore
    places: ClassVar[dict[str, Place]] = {}
    steps = 0
    """How many steps were taken in this process."""
    met: ClassVar[Counter[int]] = Counter()
    """How often each errno was met there."""
    lost = 0
    """How many lives ended early, because the store took longer than the gateway waits for it."""
    parted = 0
    """How many runs ended early, because a life that was repeated went another way: see ``run``."""
    fault: ClassVar[BaseException | None] = None
    """What the last life that failed raised."""

    # -- A gateway --------------------------------------------------------------------------

    @initialize(rules=st.sampled_from(list(RULES)))
    def start(self, rules: str) -> None:
        self.flight: tuple[threading.Thread, list[Answer], int, int] | None = None
        if rules not in self.places:
            self.places[rules] = Place(RULES[rules], self.store.url)
        self.place = self.places[rules]
        self.app, self.desk, self.clock = self.place.app, self.place.desk, self.place.clock
        self.clock.now_s += 2 * model.DAY_S  # since the life before
        self.place.forget_keys()
        self.world = model.World(RULES[rules], int(self.clock.now_s))
        self.app.gateway.storage._run("FLUSHALL")
        self.aged_s = time.monotonic()
        self.clients: list[WsgiClient] = []
        self.codes: list[list[str]] = []  # all that were sent to a session, oldest first
        self.guesses: list[int] = []
        self.proofs: list[tuple[str, int]] = []  # each with its end
        self.parts = 0
        self.own_steps = 0

    def teardown(self) -> None:
        error = sys.exc_info()[1]  # of the life that ends here
        if isinstance(error, Exception) and not isinstance(error, HypothesisException):
            type(self).fault = error
        if flight := getattr(self, "flight", None):
            self.desk.go_on.set()
            flight[0].join()
        if hasattr(self, "desk"):
            self.desk.outcome, self.desk.hold = "taken", False

    # -- How to ask -------------------------------------------------------------------------

    def call(
        self, n: int, path: str, body: Any = None, method: str = "POST", **more: Any
    ) -> Answer:
        """A request of session ``n``, from its client's address."""
        environ = {"REMOTE_ADDR": self.address(n)} | more.pop("environ", {})
        return self.clients[n].call(path, body, method=method, environ=environ, **more)

    def address(self, n: int) -> str:
        """Sessions belong to the two clients in turn."""
        return ADDRESSES[n % 2]

    def check(self, answer: Answer, expected: model.Expected, n: int = -1) -> None:
        """Status, errno, ``retryAfter`` and ``next`` are as the model says."""
        told = f"{answer.status} {answer.data[:300]!r}, not {expected}"
        self.expect_store(answer)
        assert answer.status == expected.status, told
        if expected.errnos:
            assert answer.errno in expected.errnos, told
            self.met[answer.errno or 0] += 1
        if expected.retry_after_s:
            low, high = expected.retry_after_s
            assert low <= answer.json["retryAfter"] <= high, told
        if n >= 0 and answer.status != 401 and answer.data and "next" in answer.json:
            wanted = self.world.next(self.world.sessions[n])
            if answer.status == 429:
                wanted["resendIn"] = max(wanted["resendIn"], answer.json["retryAfter"])
            assert answer.json["next"] == wanted, f"{told}; next must be {wanted}"

    def expect_store(self, *answers: Answer) -> None:
        """End this life if the store was too slow: nobody knows then whether a step was taken."""
        if any(answer.status == 503 and b"the storage" in answer.data for answer in answers):
            type(self).lost += 1
            reject()

    def settle(self, n: int, outcome: str) -> model.Expected:
        """The model learns what the provider did with the newest message to a session."""
        to, text = self.desk.sent[-1]
        s = self.world.sessions[n]
        kind = self.world.sending[id(s)].kind
        code = text if kind == "long" else text.removeprefix("Your verification code is: ")
        assert re.fullmatch({"long": "[0-9a-f]{32}", "short": "[0-9]{6}"}[kind], code), text
        assert to == s.number
        expected = self.world.sent(s, outcome, code)
        if expected.status == 200:
            self.codes[n].append(code)
        return expected

    def message(self, n: int, outcome: str, ask: Callable[[], Answer], *facts: Any) -> None:
        """A request that may send one, and its answer; ``facts`` go to the model."""
        call, *more = facts
        before, self.desk.outcome = len(self.desk.sent), outcome
        expected = call(*more)
        try:
            answer = ask()
        finally:
            self.desk.outcome = "taken"
        self.expect_store(answer)
        assert len(self.desk.sent) - before == bool(expected.sends), (answer, expected)
        if answer.status == 200 and call != self.world.text:
            assert answer.json.keys() == {"mtSender", "next"}
        if expected.sends:
            settled = self.settle(n, outcome)
            expected = expected if settled.status == 200 or call == self.world.text else settled
        self.check(answer, expected, n)
        self.check_state(n)

    def check_state(self, n: int) -> None:
        """GET /session says the same, and changes nothing."""
        s = self.world.sessions[n]
        answer = self.call(n, "/session", method="GET")
        self.check(answer, self.world.state(s), n)
        if answer.status == 200:
            assert answer.json.get("msisdn") == (s.number if self.world.is_verified(s) else None)

    # -- Rules ------------------------------------------------------------------------------

    @precondition(lambda self: len(self.living()) < SESSIONS_MAX)
    @rule(network=st.booleans())
    def register(self, network: bool) -> None:
        n = len(self.clients)
        client = WsgiClient(self.app)
        body = {"mcc": "234", "msisdn": NUMBERS[0]} if network else None
        environ = {"REMOTE_ADDR": self.address(n)}
        answer = client.call("/register", body, signed=False, environ=environ)
        self.check(answer, self.world.register(self.address(n)))
        if answer.status == 200:
            assert answer.json.keys() == {"msisdnSessionToken", "verificationUrl"} | (
                {"verificationMethods", "verificationDetails"} if network else set()
            )
            token = gateway.SessionToken(bytes.fromhex(answer.json["msisdnSessionToken"]))
            client.credentials = gateway.derive_credentials(token)
            self.clients.append(client)
            self.codes.append([])
            self.guesses.append(0)

    sessions = st.integers(0, 3 * SESSIONS_MAX)
    outcomes = st.sampled_from(["taken"] * 7 + ["unknown", "refused", "failed"])
    kinds = st.sampled_from([None, None, True, False, "false"])
    some = precondition(lambda self: self.clients)

    def living(self) -> list[int]:
        """The sessions that are known."""
        return [n for n, s in enumerate(self.world.sessions) if not self.world.is_gone(s)]

    def pick(self, n: int, liked: Callable[[model.Session], object] = bool) -> int:
        """A session: mostly one that the rule is about, else one that is known, else any."""
        known = self.living() if n < 3 * SESSIONS_MAX else []
        about = [m for m in known if n >= SESSIONS_MAX and liked(self.world.sessions[m])]
        choice = about or known or range(len(self.clients))
        return choice[n % len(choice)]

    @some
    @rule(
        n=sessions, number=st.sampled_from([*NUMBERS * 3, " 44 7700 900123", "!+449098790999"]),
        long=st.booleans(), short=kinds, outcome=outcomes,
    )  # fmt: skip
    def ask(self, n: int, number: str, long: bool, short: Any, outcome: str) -> None:
        self.message(n := self.pick(n), outcome, *self.asking(n, number, long, short))

    def asking(self, n: int, number: str, long: bool, short: Any) -> Any:
        kind = "short" if short is True or (short is not False and not long) else "long"
        path, ok = ("/sms/mt/verify", 204) if long else ("/sms/verify", 200)
        body = {"msisdn": number.lstrip("!"), "shortVerificationCode": short}
        told = "" if number.startswith(" ") else number
        facts = (self.world.ask, self.world.sessions[n], told, kind, self.address(n), ok)
        return (functools.partial(self.call, n, path, body), *facts)

    @some
    @rule(n=sessions, short=kinds, outcome=outcomes)
    def resend(self, n: int, short: Any, outcome: str) -> None:
        n = self.pick(n, lambda s: s.number)
        self.message(n, outcome, *self.resending(n, short))

    def resending(self, n: int, short: Any) -> Any:
        kind = {True: "short", False: "long"}.get(short, "")
        body = None if short is None else {"shortVerificationCode": short}
        ask = functools.partial(self.call, n, "/sms/resend_code", body)
        return ask, self.world.resend, self.world.sessions[n], kind, self.address(n)

    @precondition(lambda self: len(self.living()) < 3 * SESSIONS_MAX)
    @rule(n=st.integers(1, 4), number=st.sampled_from(NUMBERS), same=st.booleans())
    def crowd(self, n: int, number: str, same: bool) -> None:
        """So many newcomers ask for a message each, at one address or two."""
        for _ in range(n):
            for _ in range(2 if same else 1):
                known = len(self.clients)
                self.register(network=False)
            if len(self.clients) > known:
                self.message(known, "taken", *self.asking(known, number, False, None))

    @some
    @rule(n=sessions, number=st.sampled_from(NUMBERS), parts=st.integers(1, 3), outcome=outcomes)
    def text(self, n: int, number: str, parts: int, outcome: str) -> None:
        """The phone sends the Hawk id, in parts that come in reverse order."""
        n = self.pick(n)
        ask = functools.partial(self.deliver, n, number, parts)
        self.message(n, outcome, ask, self.world.text, self.world.sessions[n], number)

    def deliver(self, n: int, number: str, parts: int) -> Answer:
        credentials = self.clients[n].credentials
        assert credentials
        words, self.parts = f"verify {credentials.hawk_id} !", self.parts + 1
        size = -(-len(words) // parts)
        for part in range(parts, 0, -1):
            fields = {
                "msisdn": number[1:],
                "to": "447700900555",
                "messageId": f"{self.parts}{part}",
            }
            fields["text"] = words[(part - 1) * size : part * size]
            if parts > 1:
                fields |= {"concat": "true", "concat-ref": str(self.parts % 256)}
                fields |= {"concat-total": str(parts), "concat-part": str(part)}
            query = urlencode({"provider": "nexmo", **fields})
            answer = self.clients[n].get(f"/sms/momt/p4th?{query}")
            assert answer.status == 200
        return answer

    @some
    @rule(
        n=sessions, which=st.sampled_from(["right"] * 5 + ["wrong"] * 4 + [
            "before", "before", "older", "other kind", "alien", "spelled", "short", "none", [],
        ]), proof=st.sampled_from(["", "", "", *PROOFS]), duration=st.sampled_from(list(DURATIONS)),
    )  # fmt: skip
    def verify(self, n: int, which: Any, proof: str, duration: Any) -> None:
        n = self.pick(n, self.world.waiting)
        given, code = self.code(n, which)
        self.verified(n, given, code, proof, duration)

    def code(self, n: int, which: Any) -> tuple[Any, str]:
        """What to give as the code, and what it means."""
        sent = self.codes[n] or ["123456"]
        aliens = [code for codes in self.codes for code in codes if codes is not self.codes[n]]
        right = sent[-1]
        wrong = right[:-1] + ("0" if right[-1] != "0" else "1")
        other = "0" * 32 if len(right) < 32 else "000000"
        spelled = "".join(chr(0x660 + int(c)) if c.isdigit() else c.upper() for c in right)
        return {
            "right": (right, right), "wrong": (wrong, wrong), "other kind": (other, other),
            "before": (sent[-2:][0], sent[-2:][0]), "older": (sent[0], sent[0]),
            "alien": ([wrong, *aliens][-1], [wrong, *aliens][-1]),
            "spelled": (f" {spelled[:3]}-{spelled[3:]}\n", right),
            "none": ("", ""), "short": (right[1:], "!"),
        }.get(which if isinstance(which, str) else "", (which, "!"))  # fmt: skip

    def verified(self, n: int, given: Any, code: str, proof: str, duration: Any) -> None:
        s = self.world.sessions[n]
        wanted = PROOFS.get(proof, {}) | ({"duration": duration} if proof else {})
        kind = {"missing": ""}.get(proof, proof)  # a proof is not asked for without a key
        was_right = bool(self.codes[n]) and code == self.codes[n][-1]
        expected = self.world.verify(s, code, kind)
        answer = self.call(n, "/sms/verify_code", {"code": given, **wanted})
        self.check(answer, expected, n)
        if answer.status == 200:
            assert was_right, "a wrong code verified"
            self.guesses[n] += 1
            assert answer.json["msisdn"] == s.number
            assert answer.json.keys() == {"msisdn", "cert"} if kind else {"msisdn"}
            if kind:
                self.check_proof(n, answer.json["cert"], proof, DURATIONS[duration])
        if answer.status == 400 and answer.errno == 105:
            newer = "newer" in answer.json["message"]
            assert newer != expected.costs_try, answer
            self.guesses[n] += expected.costs_try
        self.check_state(n)

    # Several steps of a life at once, which in any order would seldom come one after another.

    @some
    @rule(n=sessions, times=st.integers(1, 4), short=kinds, outcome=outcomes)
    def guess_and_resend(self, n: int, times: int, short: Any, outcome: str) -> None:
        """Wrong codes; then another message, as soon as one may be asked for."""
        n = self.pick(n, self.world.waiting)
        for _ in range(times):
            self.verified(n, *self.code(n, "wrong"), "", 1)
        self.wait(n)
        self.message(n, outcome, *self.resending(n, short))
        self.verified(n, *self.code(n, "before"), "", 1)

    @some
    @rule(n=sessions, long=st.booleans(), proof=st.sampled_from(list(PROOFS)))
    def go_the_whole_way(self, n: int, long: bool, proof: str) -> None:
        """A message, its code, a proof; then the code again."""
        n = self.pick(n)
        self.wait(n)
        number = self.world.sessions[n].number or NUMBERS[n % 2]
        self.message(n, "taken", *self.asking(n, number, long, None))
        self.verified(n, *self.code(n, "right"), "", 1)
        self.sign_one(n, proof, 7200)
        self.verified(n, *self.code(n, "right"), "", 1)

    def wait(self, n: int) -> None:
        """Until the session may ask for another message."""
        if not self.flight and (wait_s := self.world.resend_in_s(self.world.sessions[n])):
            self.tick(wait_s)

    @some
    @rule(n=sessions, proof=st.sampled_from(list(PROOFS)), duration=st.sampled_from([
        *DURATIONS, None, 0, "x", 1.5, True])
    )  # fmt: skip
    def sign(self, n: int, proof: str, duration: Any) -> None:
        self.sign_one(self.pick(n, self.world.is_verified), proof, duration)

    def sign_one(self, n: int, proof: str, duration: Any) -> None:
        bad = duration is not None and (duration not in DURATIONS or duration is True)
        kind = "bad" if bad and proof != "missing" else proof
        expected = self.world.sign(self.world.sessions[n], kind)
        body = PROOFS[proof] | {"duration": duration}
        answer = self.call(n, "/certificate/sign", body)
        self.check(answer, expected, n)
        if answer.status == 200:
            assert answer.json.keys() == {"cert"}
            own_s = {"browserid": 86_400, "browserid text": 86_400, "jwt": 600, "jwt with key": 600}
            duration_s = own_s.get(proof, 3600) if duration is None else DURATIONS[duration]
            self.check_proof(n, answer.json["cert"], proof, duration_s)

    def check_proof(self, n: int, cert: str, proof: str, duration_s: int) -> None:
        """What a proof says, by a library that is not ours (CONTRACT §5)."""
        s, now_s = self.world.sessions[n], self.world.now_s
        if "browserid" in proof:
            path = "/.well-known/browserid"
            key = self.clients[n].get(path, REMOTE_ADDR=ADDRESSES[0]).json["public-key"]
            numbers = {"kty": "RSA", **{name: encoded(int(key[name])) for name in "ne"}}
            claims = signed(cert, jwt.PyJWK(numbers, "RS256"), "RS256")
            assert jwt.get_unverified_header(cert) == {"alg": "RS256"}
            assert claims["iat"] == (now_s - 10) * 1000
            assert claims["exp"] in ((now_s + duration_s) * 1000, (now_s + duration_s - 10) * 1000)
            assert claims["public-key"] == BROWSERID
            assert claims["verifiedMSISDN"] == s.number
            assert claims["lastVerifiedAt"] == (s.verified_s or 0) * 1000
            return
        end = "" if "jwt" in proof and proof != "sd-jwt" else "~"
        token = cert.removesuffix("~")
        assert cert == token + end
        claims = self.opened(token)
        header = jwt.get_unverified_header(token)
        assert header["typ"] == ("JWT" if not end else "dc+sd-jwt")
        # With no other key, the next one signs at once.
        signs_from = max(
            (at_s for at_s in self.place.kids if at_s <= now_s), default=min(self.place.kids)
        )
        assert header["kid"] == self.place.kids[signs_from]
        issuer = self.place.settings.base_url
        wanted: dict[str, Any] = {
            "iss": issuer, "vct": f"{issuer}/vct/phone/1",
            "iat": now_s, "exp": now_s + min(duration_s, 86_400 if end else 600),
            "phone_number": s.number, "phone_number_verified": True, "amr": ["sms"],
            "auth_time": s.verified_s, "method": s.method,
        }  # fmt: skip
        if not end:
            assert claims.pop("jti")
            assert claims.pop("sub")
            wanted |= {"aud": ORIGIN, **({"nonce": "n"} if "key" in proof else {})}
        if proof != "jwt":
            wanted["cnf"] = {"jwk": JWK}
        assert claims == wanted
        self.proofs.append((token, wanted["exp"]))

    def opened(self, token: str) -> Any:
        """The claims of a JWT, by what the gateway publishes now."""
        found = WsgiClient(self.app).get("/.well-known/jwks.json")
        kid = jwt.get_unverified_header(token)["kid"]
        return signed(token, jwt.PyJWKSet.from_dict(found.json)[kid], "ES256")

    @some
    @rule(n=sessions, everywhere=st.sampled_from([None, False, True, True, *["no"] * 8]))
    def unregister(self, n: int, everywhere: Any) -> None:
        if everywhere == "no":
            return
        n = self.pick(n)
        expected = self.world.unregister(self.world.sessions[n], everywhere is True)
        body = None if everywhere is None else {"everywhere": everywhere}
        self.check(self.call(n, "/unregister", body), expected, n)
        for other in range(len(self.clients)):
            self.check_state(other)

    @rule(passed_s=st.sampled_from([
        *[1, 2, 9, 10, 19, 20, 21, 29, 30, 31, 50, 59, 60, 61, 119, 120] * 4,
        *[299, 300, 301, 590, 599, 600, 601, 1800] * 2,
        3599, 3600, 3601, 14_400, 43_200, 86_390, 90_000, 170_000,
    ]), rotates=st.booleans())  # fmt: skip
    def tick(self, passed_s: int, rotates: bool = False) -> None:
        if rotates:
            self.place.rotate(self.world.now_s)
        if self.flight:
            passed_s = min(passed_s, self.flight[3] + 14 - self.world.now_s)
        end_s = self.world.now_s + passed_s
        near = [s for s in self.world.sessions if abs(self.world.end_s(s) - end_s) < 30]
        # The store counts real time too, so no session's end is met to the second.
        passed_s += 60 if near and not self.flight else 0
        self.world.now_s += passed_s
        self.clock.now_s += passed_s
        real_s, self.aged_s = time.monotonic() - self.aged_s, time.monotonic()
        lost_ms = round((passed_s - real_s) * 1000)
        self.app.gateway.storage._run("EVAL", AGE_SCRIPT, 0, lost_ms)

    # -- Two at once ------------------------------------------------------------------------

    @precondition(lambda self: self.clients and not self.flight)
    @rule(n=sessions, long=st.booleans(), number=st.sampled_from(NUMBERS), resend=st.booleans())
    def begin(self, n: int, long: bool, number: str, resend: bool) -> None:
        """A message that stays with the provider until ``finish``."""
        n = self.pick(n)
        ask, call, *facts = (
            self.resending(n, None) if resend else self.asking(n, number, long, None)
        )
        expected = call(*facts)
        if not expected.sends:
            self.check(ask(), expected, n)
            return
        answers: list[Answer] = []
        self.desk.held.clear()
        self.desk.go_on.clear()
        self.desk.hold = True
        before = len(self.desk.sent)

        def run() -> None:
            with contextlib.suppress(KeyError):  # no "next", as the session is gone: see finish
                answers.append(ask())

        thread = threading.Thread(target=run)
        thread.start()
        assert self.desk.held.wait(60), answers
        self.flight = (thread, answers, n, self.world.now_s)
        self.held_text, self.held_ok = self.desk.sent[before], expected
        self.check_state(n)

    @precondition(lambda self: self.flight)
    @rule(outcome=outcomes)
    def finish(self, outcome: str) -> None:
        assert self.flight
        thread, answers, n, _ = self.flight
        self.flight, self.desk.outcome = None, outcome
        self.desk.go_on.set()
        thread.join()
        self.desk.outcome = "taken"
        self.expect_store(*answers)
        self.desk.sent.append(self.held_text)  # so that it is the newest
        s = self.world.sessions[n]
        gone = self.world.is_gone(s)
        expected = self.settle(n, outcome)
        self.desk.sent.pop()
        if gone:
            assert all(answer.status in (401, 400, 503) for answer in answers)
            return
        if expected.status == 200:
            expected = expected._replace(status=self.held_ok.status)
        self.check(answers[0], expected, n)
        self.check_state(n)

    @precondition(lambda self: self.clients and not self.flight)
    @rule(
        n=sessions, same=st.booleans(), number=st.sampled_from(NUMBERS),
        what=st.sampled_from([*["ask", "resend", "right", "wrong", "sign"] * 3, "unregister"]),
    )  # fmt: skip
    def twice(self, n: int, same: bool, number: str, what: str) -> None:
        """The same request by two threads at once; ``same``: with the same nonce, too."""
        n = self.pick(n, self.world.waiting if what in ("right", "wrong") else bool)
        answers: list[Answer] = []
        s = self.world.sessions[n]
        if what in ("ask", "resend"):
            ask, call, *facts = (
                self.resending(n, None) if what == "resend" else self.asking(n, number, False, None)
            )
        elif what in ("right", "wrong"):
            given, code = self.code(n, what)
            ask = functools.partial(self.call, n, "/sms/verify_code", {"code": given})
            call, facts = self.world.verify, [s, code]
        elif what == "sign":
            ask = functools.partial(self.call, n, "/certificate/sign", PROOFS["jwt"])
            call, facts = self.world.sign, [s, "jwt"]
        else:
            ask = functools.partial(self.call, n, "/unregister")
            call, facts = self.world.unregister, [s, False]
        nonces = [secrets.token_hex(6)] * 2 if same else ["", ""]
        before, go = len(self.desk.sent), threading.Barrier(2)

        def run(nonce: str) -> None:
            go.wait()
            answers.append(ask(nonce=nonce))

        threads = [threading.Thread(target=run, args=(nonce,)) for nonce in nonces]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.expect_store(*answers)
        first = call(*facts)
        sent = len(self.desk.sent) - before
        if sent == 2 and self.world.rules.limits == "off":  # the second came after the first
            newest = self.desk.sent.pop()
            self.settle(n, "taken")
            self.desk.sent.append(newest)
            sent = 1
        if same and first.sends and not sent and self.limited(n):
            # Chosen: of a request that comes twice at once, the copy that uses up the nonce may
            # meet the limits when the other has just taken the last message, which is given back.
            self.world.sent(s, "failed", "")
            assert sorted(answer.status for answer in answers) == [401, 429], answers
            self.check_state(n)
            return
        second = call(*facts) if not same else model.BAD_SIGNATURE
        if same and self.world.is_gone(s):
            second = model.UNKNOWN
        assert sent == bool(first.sends), (what, same, sent, first, answers)
        if first.sends:
            self.settle(n, "taken")
        self.guesses[n] += sum(expected.right or expected.costs_try for expected in (first, second))
        fits = [same_answers(answers, first, second)]
        if first.sends and (limited := self.limited(n)):
            # Chosen: the second may meet the limits when the first has taken the last message, and
            # is not being sent yet.
            fits.append(same_answers(answers, first, limited))
        assert any(fits), (what, same, answers, first, second)
        self.check_state(n)

    def limited(self, n: int) -> model.Expected | None:
        """What the limits would answer to another message of a session."""
        cost = model.Cost(self.world.sessions[n].number, self.address(n))
        rules = self.world.rules
        counts = rules.paid and rules.limits != "off"
        return self.world.limits.refuse(cost, self.world.now_s) if counts else None

    # -- What an attacker tries -------------------------------------------------------------

    @some
    @rule(
        n=sessions,
        fault=st.sampled_from(["mac", "hash", "late", "early", "none", "id", "alien", 0, 59, 125]),
    )
    def forge(self, n: int, fault: Any) -> None:
        """A request that is signed wrongly does nothing, nor does one that was answered before."""
        n = self.pick(n)
        if isinstance(fault, int):
            self.replay(n, fault)
            return
        client, gone = self.clients[n], self.world.is_gone(self.world.sessions[n])
        good = client.credentials
        assert good
        target = gateway.hawk_target("POST", f"http://{client.host}/unregister")
        now_s, nonce = self.world.now_s, secrets.token_hex(6)
        ts = now_s + {"late": -62, "early": 62}.get(fault, 0)
        sent = gateway.build_authorization(good, target, ts, nonce, "", b"")
        if fault == "mac":
            sent = re.sub('mac="(.)', lambda m: f'mac="{"A" if m[1] != "A" else "B"}', sent)
        elif fault == "hash":
            sent = gateway.build_authorization(good, target, ts, nonce, "", b"x")
        elif fault == "id":
            sent = sent.replace(good.hawk_id, "0" * 64)
        elif fault == "alien":
            others = [c.credentials for c in self.clients if c.credentials != good]
            other = others[0] if others and others[0] else None
            sent = sent.replace(good.hawk_id, other.hawk_id if other else "0" * 64)
            gone = self.world.is_gone(self.world.sessions[0 if n else 1]) if other else True
        environ = {"HTTP_AUTHORIZATION": None if fault == "none" else sent}
        answer = client.raw("POST", "/unregister", b"", environ)
        unknown = fault in ("none", "id") or gone
        self.check(answer, model.UNKNOWN if unknown else model.BAD_SIGNATURE)
        self.check_state(n)

    def replay(self, n: int, wait_s: int) -> None:
        """A request that was answered is not answered again, however late it comes."""
        target = gateway.hawk_target("GET", f"http://{self.clients[n].host}/session")
        credentials = self.clients[n].credentials
        assert credentials
        sent = gateway.build_authorization(
            credentials, target, self.world.now_s, secrets.token_hex(6), "", b""
        )
        environ = {"HTTP_AUTHORIZATION": sent, "REMOTE_ADDR": self.address(n)}
        first = self.clients[n].raw("GET", "/session", environ=environ)
        self.check(first, self.world.state(self.world.sessions[n]), n)
        if wait_s and not self.flight:
            self.tick(wait_s)
        gone = self.world.is_gone(self.world.sessions[n])
        again = self.clients[n].raw("GET", "/session", environ=environ)
        self.check(again, model.UNKNOWN if gone else model.BAD_SIGNATURE)

    # -- What always holds ------------------------------------------------------------------

    @invariant()
    def counts(self) -> None:
        type(self).steps += 1
        if not hasattr(self, "guesses"):
            return
        self.own_steps += 1
        if self.clients and not self.own_steps % 4:  # nothing was done to another session
            self.check_state(self.own_steps // 4 % len(self.clients))
        for guesses, codes in zip(self.guesses, self.codes, strict=True):
            assert guesses <= 3 * len(codes), "more than three guesses a message"
        self.proofs = [proof for proof in self.proofs if proof[1] > self.world.now_s]
        for token, _ in self.proofs[-2:]:
            self.opened(token)  # it verifies by what is published now


def same_answers(answers: list[Answer], *expected: model.Expected) -> bool:
    """Whether these are the answers, in whatever order they came."""
    pairs = zip(
        sorted(answers, key=lambda answer: answer.status),
        sorted(expected, key=lambda one: one.status),
        strict=True,
    )
    return all(
        answer.status == one.status and (not one.errnos or answer.errno in one.errnos)
        for answer, one in pairs
    )


def encoded(number: int) -> str:
    """A number as a JWK has it."""
    data = number.to_bytes(-(-number.bit_length() // 8), "big")
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def signed(token: str, key: jwt.PyJWK, algorithm: str) -> Any:
    """The claims of a token whose signature is right."""
    return json.loads(jwt.PyJWS().decode(token, key, [algorithm]))


def run(store: gateway.EmbeddedStore, n: int, steps: int, shrinks: bool = True) -> None:
    """Live ``n`` lives of up to ``steps`` steps.

    Args:
        shrinks: A life that fails is made as short as possible, which may take minutes.
    """
    phases = [Phase.generate, *[Phase.shrink] * shrinks]
    Life.store, Life.places, Life.fault = store, {}, None
    try:
        run_state_machine_as_test(
            Life,
            settings=examples(
                max_examples=n, stateful_step_count=steps, deadline=None, database=None,
                suppress_health_check=list(HealthCheck), print_blob=False, phases=phases,
            ),
        )  # fmt: skip
    except FlakyStrategyDefinition:
        # Hypothesis repeats the first steps of a life to vary the rest. Two requests at once may
        # be answered either way, and a slow store ends a life: then the repeated steps allow
        # other ones than before, and hypothesis gives the run up. No answer was wrong by that.
        if Life.fault:
            raise Life.fault from None
        Life.parted += 1
    finally:
        for place in Life.places.values():
            place.folder.cleanup()


@pytest.mark.slow
def test_every_life_is_as_the_model_says(store: gateway.EmbeddedStore) -> None:
    Life.steps = Life.parted = 0
    while Life.steps < 700:
        run(store, 25, 50)
        assert Life.parted <= 3


@pytest.mark.parametrize("fault", [False, True])
def test_a_life_that_goes_another_way_is_counted_and_hides_no_fault(
    store: gateway.EmbeddedStore, monkeypatch: pytest.MonkeyPatch, fault: bool
) -> None:
    """Of some faults, hypothesis tells only that a life was not repeated."""

    def go_another_way(machine: type[Life], settings: object) -> None:
        with contextlib.suppress(AssertionError):
            try:
                assert not fault, "a fault"
            finally:
                machine().teardown()
        raise FlakyStrategyDefinition

    monkeypatch.setitem(globals(), "run_state_machine_as_test", go_another_way)
    monkeypatch.setattr(Life, "parted", 0)
    with pytest.raises(AssertionError, match="a fault") if fault else contextlib.nullcontext():
        run(store, 20, 50)
    assert bool(Life.parted) != fault


# -- What the machine found -------------------------------------------------------------------


def test_without_limits_no_message_is_counted(make_client: Callable[..., WsgiClient]) -> None:
    """CONTRACT §7: "nothing is counted", so as many messages are left as before."""
    client = make_client(limits="off")
    client.register()
    for _ in range(7):
        assert client.ask().json["next"]["sendsLeft"] == 5


def test_double_click_on_the_last_message_of_a_budget(
    make_client: Callable[..., WsgiClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    """CONTRACT §4: a double click is answered like the first, which has just used the budget up."""
    with Provider(sms.taken) as stand_in:
        client = make_client(
            sms_providers=[stand_in.nexmo()], resend_gaps_s=[30], sends_per_number="1/day"
        )
        client.register()
        limit, first = client.gateway.storage.limit, list[Answer]()

        def other_click_first(script: str, *args: Any) -> Any:
            if script is gateway.TAKE_SCRIPT:
                monkeypatch.setattr(client.gateway.storage, "limit", limit)
                thread = threading.Thread(target=lambda: first.append(client.ask()))
                thread.start()
                thread.join()
            return limit(script, *args)

        monkeypatch.setattr(client.gateway.storage, "limit", other_click_first)
        assert client.ask().status == 200
        assert [answer.status for answer in first] == [200]
        assert len(stand_in.received) == 1
        assert client.another().register().status == 200
        assert client.call("/sms/mt/verify", {"msisdn": NUMBERS[0]}).errno == 114


@pytest.fixture
def life(store: gateway.EmbeddedStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[Life]:
    """A life that ``start`` begins, and whose steps a test takes itself."""
    monkeypatch.setattr(Life, "store", store, raising=False)
    monkeypatch.setattr(Life, "places", {}, raising=False)
    one = Life()
    yield one
    one.teardown()
    one.place.folder.cleanup()


def test_what_fails_after_a_right_code_gives_its_hour_back(life: Life) -> None:
    """The code of the message before pays the round back; the hour counts what may have left."""
    life.start(rules="tight")
    life.crowd(n=1, number=NUMBERS[1], same=False)
    life.tick(passed_s=61, rotates=False)
    life.begin(long=True, n=0, number=NUMBERS[1], resend=True)
    life.go_the_whole_way(long=False, n=0, proof="missing")
    life.finish(outcome="failed")
    before = len(life.desk.sent)
    life.crowd(n=4, number=NUMBERS[0], same=True)
    assert len(life.desk.sent) - before == 3  # the hour has room for the last of them, too


def test_what_was_asked_for_before_proofs_were_ended_is_not_paid_back(life: Life) -> None:
    """Else a right code of one number would pay for messages to another one."""
    life.start(rules="paid")
    life.crowd(n=2, number=NUMBERS[0], same=False)
    for n in (1, 0):  # both sessions verify the same number
        life.go_the_whole_way(long=False, n=n, proof="jwt")
    life.tick(passed_s=61)
    life.resend(n=SESSIONS_MAX + 1, short=None, outcome="taken")
    life.unregister(everywhere=True, n=0)
    life.go_the_whole_way(long=False, n=0, proof="jwt")  # the other number
    assert life.world.sessions[1].number == NUMBERS[1]
    before = len(life.desk.sent)
    for n in range(1, 6):  # by the phone, so that no address has a part in it
        life.register(network=False)
        life.text(n=n, number=NUMBERS[0], parts=1, outcome="taken")
    assert len(life.desk.sent) - before == 4  # one of the day's five is still counted
