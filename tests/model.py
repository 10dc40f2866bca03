"""What CONTRACT.md says about the life of a session, as a small model that tests can run.

It was written from the contract's text, before its author had looked at the gateway's rules: where
both disagree, one of them is wrong. ``test_life.py`` drives both with the same calls. Sections of
the contract are named in brackets. Where both disagreed and the contract is silent or can be read
in two ways, a comment says "Chosen", and what.

Time is in whole seconds; limits count in fractions, so that nothing is rounded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, Final, NamedTuple

HOUR_S: Final = 3600
DAY_S: Final = 86_400


class Rules(NamedTuple):
    """The settings that matter here, with the contract's defaults [§6, §7]."""

    limits: str = "enforce"
    paid: bool = True
    resend_gaps_s: tuple[int, ...] = (30, 60, 120, 300)
    sends_per_session: int = 5
    sends_per_number: int = 5
    sends_per_number_from_address: int = 3
    unverified_per_prefix: int = 10
    unverified_per_destination: int = 50
    unverified_per_address: int = 10
    registers_per_address: int = 60
    sends_per_hour: int = 100
    code_tries: int = 3
    code_ttl_s: int = 600
    session_ttl_s: int = 86_400
    verified_ttl_s: int = 31_536_000


@dataclass
class Code:
    """A code that was sent and waits to be returned."""

    text: str
    sent_s: int
    tries: int
    method: str

    @property
    def kind(self) -> str:
        """Short codes are digits of the contract's length, long ones 32 hex digits."""
        return "short" if len(self.text) < 32 else "long"


class Cost(NamedTuple):
    """What a message took, and who asked for it."""

    number: str
    address: str  # empty: a text, which counts in no row of an address


@dataclass
class Session:
    """Where one session stands."""

    born_s: int
    number: str = ""
    kind: str = ""
    code: Code | None = None
    before: str = ""  # the code that lived when the newest one was sent
    sends: int = 0
    asked_s: int = 0
    verified_s: int | None = None
    end_s: int = 0  # once it is verified
    method: str = ""
    asked: str = ""  # how the last message was asked for: "ask", "resend" or "text"
    round: list[Cost] = field(default_factory=list)
    gone: bool = False


@dataclass
class Sending:
    """A message that is with the provider, and what the session was before it was asked for."""

    before: Session
    kind: str
    cost: Cost
    round: list[Cost]


class Expected(NamedTuple):
    """What the answer must be.

    Attributes:
        errnos: One of these; none for a success.
        retry_after_s: The least and the most that ``retryAfter`` may be.
        sends: The kind of the message that the provider is given now; empty if none.
        costs_try: Whether the code was judged, and found wrong.
    """

    status: int
    errnos: frozenset[int] = frozenset()
    retry_after_s: tuple[int, int] | None = None
    sends: str = ""
    right: bool = False
    costs_try: bool = False


def refusal(status: int, errno: int, *retry_after_s: int) -> Expected:
    """An answer with one errno."""
    times = (retry_after_s[0], retry_after_s[-1]) if retry_after_s else None
    return Expected(status, frozenset((errno,)), times)


UNKNOWN: Final = refusal(401, 110)
NOT_VERIFIED: Final = refusal(400, 104)
WRONG: Final = refusal(400, 105)
INVALID: Final = refusal(400, 107)
MISSING: Final = refusal(400, 108)
BAD_SIGNATURE: Final = refusal(401, 109)
EXPIRED: Final = refusal(410, 111)


class Bucket:
    """A budget of N at once, refilled evenly at N a period [§7]."""

    def __init__(self, n: Fraction, period_s: int) -> None:
        self.cost_s, self.period_s = period_s / n, period_s
        self.full_s = Fraction(0)  # when it will be full again

    def used_s(self, now_s: int) -> Fraction:
        """How much of it is in use, as the time until it is full."""
        return max(Fraction(0), self.full_s - now_s)

    def wait_s(self, now_s: int, share: Fraction = Fraction(1)) -> Fraction:
        """How long until one more fits into this share of it."""
        return self.used_s(now_s) + self.cost_s - share * self.period_s

    def take(self, now_s: int) -> None:
        """Take one."""
        self.full_s = max(self.full_s, Fraction(now_s)) + self.cost_s

    def give_back(self, n: Fraction = Fraction(1)) -> None:
        """Give ``n`` of it back."""
        self.full_s -= n * self.cost_s


class Limits:
    """The budgets beside the session's own [§7]. All numbers here are of one destination."""

    def __init__(self, rules: Rules) -> None:
        self.rules, self.buckets = rules, dict[tuple[str, ...], Bucket]()
        self.given_back: dict[str, tuple[int, int]] = {}

    def bucket(self, row: str, *who: str) -> Bucket:
        """The budget of a row for somebody."""
        periods_s = {"sends_per_hour": HOUR_S, "registers_per_address": 60}
        n = Fraction(getattr(self.rules, row))
        if row == "unverified_per_prefix" and len(who) == 2:
            n /= 2  # Chosen: so one address closes no prefix to others (rule 2 below the table)
        return self.buckets.setdefault((row, *who), Bucket(n, periods_s.get(row, DAY_S)))

    def of(self, cost: Cost) -> Iterator[tuple[str, tuple[str, ...]]]:
        """The rows that a message takes from, and who each is of; all but the hour's and money."""
        prefix = cost.number[:-4]
        yield "sends_per_number", (cost.number,)
        yield "unverified_per_prefix", (prefix,)
        yield "unverified_per_destination", ()
        if cost.address:
            yield "sends_per_number_from_address", (cost.number, cost.address)
            yield "unverified_per_prefix", (prefix, cost.address)
            yield "unverified_per_address", (cost.address,)

    def unverified(self, cost: Cost) -> Iterator[Bucket]:
        """The unverified budgets that pay for a message."""
        for row, who in self.of(cost):
            if row.startswith("unverified"):
                yield self.bucket(row, *who)

    def rows(self, cost: Cost) -> Iterator[tuple[int, Bucket]]:
        """The budgets that a message takes from, each with its errno."""
        errnos = {"unverified_per_address": 117}
        for row, who in self.of(cost):
            number = row.startswith("sends_per_number")
            yield 115 if number else errnos.get(row, 116), self.bucket(row, *who)
        yield 116, self.bucket("sends_per_hour")

    def refuse(self, cost: Cost, now_s: int) -> Expected | None:
        """The answer if some budget has too little left for a message."""
        waits = [(errno, bucket.wait_s(now_s)) for errno, bucket in self.rows(cost)]
        if cost.address:  # fairness: until nothing unverified of it is outstanding
            own_s = self.bucket("unverified_per_address", cost.address).used_s(now_s)
            for row in ("unverified_per_destination", "sends_per_hour"):
                half_s = self.bucket(row).wait_s(now_s, Fraction(1, 2))
                waits.append((116, min(half_s, own_s)))
        binding = [(errno, math.ceil(wait_s)) for errno, wait_s in waits if wait_s > 0]
        if not binding:
            return None
        times = [wait_s for _, wait_s in binding]
        # Chosen: where several bind, any of them may be named.
        return Expected(429, frozenset(errno for errno, _ in binding), (min(times), max(times) + 1))

    def take(self, cost: Cost, now_s: int) -> None:
        """Count a message."""
        for _, bucket in self.rows(cost):
            bucket.take(now_s)

    def undo(self, cost: Cost, refused: bool) -> None:
        """Give a message back that no provider took; after a final refusal, not the address's."""
        for row, who in self.of(cost):
            if not (refused and cost.address in who):
                self.bucket(row, *who).give_back()
        self.bucket("sends_per_hour").give_back()

    def pay_back(self, costs: list[Cost], now_s: int) -> None:
        """A right code gives all messages of its round back."""
        for cost in costs:
            # Chosen: a number's day begins when the first message is given back.
            since_s, n = self.given_back.get(cost.number, (now_s, 0))
            since_s, n = (now_s, 0) if now_s >= since_s + DAY_S else (since_s, n)
            for bucket in self.unverified(cost):
                bucket.give_back(Fraction(10 if n else 13, 10))
            if n < 5:
                self.bucket("sends_per_number", cost.number).give_back()
            self.given_back[cost.number] = since_s, n + 1


class World:
    """All sessions of a gateway, its budgets and its time."""

    def __init__(self, rules: Rules, now_s: int) -> None:
        self.rules, self.now_s, self.limits = rules, now_s, Limits(rules)
        self.sessions: list[Session] = []
        self.sending: dict[int, Sending] = {}  # messages that are with the provider, by session
        self.ended_s: dict[str, int] = {}  # of a number's proofs, by /unregister everywhere

    # -- What is so, without a call ---------------------------------------------------------

    def is_gone(self, s: Session) -> bool:
        """Whether its token is unknown: unregistered, or expired [§6, session_ttl_s]."""
        return s.gone or self.now_s >= self.end_s(s)

    def end_s(self, s: Session) -> int:
        """When it expires."""
        return s.end_s or s.born_s + self.rules.session_ttl_s

    def waiting(self, s: Session) -> Code | None:
        """The code that waits, while it lives and bears tries."""
        lives = s.code and s.code.tries and self.now_s < s.code.sent_s + self.rules.code_ttl_s
        return s.code if lives else None

    def is_verified(self, s: Session) -> bool:
        """Verified, as ``next`` tells it."""
        return s.verified_s is not None

    def may_sign(self, s: Session) -> bool:
        """Verified, and not ended by another session of the number since [§4, /unregister].

        Chosen: a session learns that it was ended when it asks for a proof, or where it stands.
        Then it is no longer verified, and bound to no number, unless it is just being verified
        again.
        """
        if s.verified_s is not None:
            self.end(s)
        return s.verified_s is not None

    def end(self, s: Session) -> bool:
        """Forget what came before the proofs of its number were ended; whether there was any.

        Chosen: a code, too, because who had the phone until then may have read it.
        """
        ended_s = self.ended_s.get(s.number, -1)
        verified = s.verified_s is not None and s.verified_s <= ended_s
        code = s.code is not None and s.code.sent_s <= ended_s
        if verified:
            # Chosen: a round ends there, too, as the next right code may be of another number.
            s.verified_s, s.round = None, []
        if code:
            s.code, s.before = None, ""
        if verified and not self.waiting(s) and not self.is_sending(s):
            s.number, s.code = "", None
        return verified or code

    def is_sending(self, s: Session) -> bool:
        """Whether a message of it is with the provider [§4]."""
        return id(s) in self.sending

    def sends(self, s: Session) -> int:
        """Its messages, counted anew an hour after the last [§7]."""
        return s.sends if self.now_s < s.asked_s + HOUR_S else 0

    def resend_in_s(self, s: Session) -> int:
        """How long until its own rows allow another message."""
        if self.rules.limits == "off" or not (sends := self.sends(s)):
            return 0
        gaps_s = self.rules.resend_gaps_s
        # Chosen: no gap after a message that was refused for good, so that a number can be mended.
        wait_s = gaps_s[min(sends, len(gaps_s)) - 1] if s.number else 0
        if sends >= self.rules.sends_per_session:
            wait_s = HOUR_S
        return max(0, s.asked_s + wait_s - self.now_s)

    def next(self, s: Session) -> dict[str, Any]:
        """The ``next`` of its answers [§1]."""
        code = self.waiting(s)
        sends = 0 if self.rules.limits == "off" else self.sends(s)
        return {
            # Chosen: at least a second while a message is being sent, as its 429 says.
            "resendIn": max(self.resend_in_s(s), int(self.is_sending(s))),
            "sendsLeft": max(0, self.rules.sends_per_session - sends),
            "triesLeft": code.tries if code else 0,
            "expiresIn": code.sent_s + self.rules.code_ttl_s - self.now_s if code else 0,
            "verified": self.is_verified(s),
        }

    # -- Calls ------------------------------------------------------------------------------

    def register(self, address: str) -> Expected:
        """POST /register."""
        bucket = self.limits.bucket("registers_per_address", address)
        if self.rules.limits != "off":
            if (wait_s := math.ceil(bucket.wait_s(self.now_s))) > 0:
                return refusal(429, 117, wait_s, wait_s + 1)
            bucket.take(self.now_s)
        self.sessions.append(Session(self.now_s))
        return Expected(200)

    def ask(self, s: Session, number: str, kind: str, address: str, ok: int = 200) -> Expected:
        """POST /sms/verify, /sms/mt/verify: ask for a code of a kind for a number.

        ``number`` is empty if it is no number at all, and starts with ``!`` if it gets no SMS.
        """
        if self.is_gone(s):
            return UNKNOWN
        if not number or number.startswith("!") or (s.number and s.number != number):
            return INVALID
        return self._message(s, number, kind, "ask", address, ok)

    def resend(self, s: Session, kind: str, address: str) -> Expected:
        """POST /sms/resend_code; without a kind, the one last used."""
        if self.is_gone(s):
            return UNKNOWN
        if not s.number:
            return EXPIRED
        return self._message(s, s.number, kind or s.kind, "resend", address, 200)

    def text(self, s: Session | None, number: str) -> Expected:
        """A text from a phone with a Hawk id: always answered 200."""
        if s is None or self.is_gone(s) or (s.number and (s.number, s.asked) != (number, "text")):
            return Expected(200)
        expected = self._message(s, number, "long", "text", "", 200)
        return Expected(200, sends=expected.sends)

    def _message(
        self, s: Session, number: str, kind: str, how: str, address: str, ok: int
    ) -> Expected:
        code, wait_s = self.waiting(s), self.resend_in_s(s)
        # Chosen: who asks for a fresh code asks for the same only if that was asked for already,
        # and a text from the phone and a call over Hawk never ask for the same.
        same = s.kind == kind and (s.asked == how or (s.asked, how) == ("resend", "ask"))
        if self.is_sending(s):
            return Expected(ok) if same else refusal(429, 114, 1)
        first_gap_s = 0 if self.rules.limits == "off" else self.rules.resend_gaps_s[0]
        # Chosen: not when exactly the gap has passed, as "resendIn" is 0 then.
        if s.number and same and code and self.now_s < code.sent_s + first_gap_s:
            return Expected(ok)
        if wait_s:
            return refusal(429, 114, wait_s)
        cost = Cost(number, address)
        if self.rules.paid and self.rules.limits != "off":
            if refused := self.limits.refuse(cost, self.now_s):
                return refused
            self.limits.take(cost, self.now_s)
        self.sending[id(s)] = Sending(replace(s), kind, cost, s.round)
        # RESERVE (DESIGN §4.3): the number is bound, and the message counted.
        s.number, s.kind, s.asked, s.sends = number, kind, how, self.sends(s) + 1
        s.asked_s = self.now_s
        s.round.append(cost)
        return Expected(ok, sends=kind)

    def sent(self, s: Session, outcome: str, text: str) -> Expected:
        """The provider settled a message: "taken", "unknown", "refused" or "failed"."""
        sending = self.sending.pop(id(s))
        if outcome not in ("taken", "unknown"):
            counts = self.rules.paid and self.rules.limits != "off"
            if sending.cost in sending.round:
                sending.round.remove(sending.cost)
                if counts:
                    self.limits.undo(sending.cost, outcome == "refused")
            elif counts:  # a right code has given the rest back meanwhile; this cost no money
                self.limits.bucket("sends_per_hour").give_back()
            before = sending.before
            s.number, s.kind, s.asked = before.number, before.kind, before.asked
            if outcome == "failed":
                s.sends, s.asked_s = before.sends, before.asked_s
                return refusal(503, 201, 0, 99)
            return INVALID
        old = self.waiting(s)
        tries = old.tries if old else self.rules.code_tries
        s.before = old.text if old else ""
        # Chosen: "sms/momt" only if the phone asked for this very message.
        # Chosen: it lives from when it was asked for; a phone may have it before we are answered.
        s.code = Code(text, s.asked_s, tries, "sms/momt" if s.asked == "text" else "sms/mt")
        return Expected(200)

    def verify(self, s: Session, code: str, proof: str = "") -> Expected:
        """POST /sms/verify_code; ``proof`` is "bad" for a key or duration that is refused.

        ``code`` is empty if it is missing, and ``!`` if it can be no code of either kind.
        """
        if self.is_gone(s):
            return UNKNOWN
        if not code or proof == "missing":
            return MISSING
        if code == "!":
            return INVALID
        if not (waiting := self.waiting(s)):
            return refusal(503, 201, 1) if self.is_sending(s) else EXPIRED
        if waiting.sent_s <= self.ended_s.get(s.number, -1):
            self.end(s)
            return EXPIRED
        if proof == "bad":
            return INVALID
        if code == waiting.text:
            s.method = waiting.method
            s.verified_s, s.code, s.before = self.now_s, None, ""
            s.end_s = self.now_s + self.rules.verified_ttl_s
            if self.rules.paid and self.rules.limits != "off":
                self.limits.pay_back(s.round, self.now_s)
            s.round.clear()  # of a message that is with the provider, too
            return Expected(200, right=True)
        if code == s.before:  # Chosen: also if it is of the other kind
            return WRONG
        if waiting.kind != ("short" if len(code) < 32 else "long"):
            return INVALID
        waiting.tries -= 1
        return WRONG._replace(costs_try=True)

    def sign(self, s: Session, proof: str) -> Expected:
        """POST /certificate/sign."""
        if self.is_gone(s):
            return UNKNOWN
        if proof == "missing":
            return MISSING
        if not self.may_sign(s):
            return NOT_VERIFIED
        return INVALID if proof == "bad" else Expected(200)

    def unregister(self, s: Session, everywhere: bool) -> Expected:
        """POST /unregister."""
        if self.is_gone(s):
            return UNKNOWN
        if everywhere:
            lately = s.verified_s is not None and self.now_s <= s.verified_s + self.rules.code_ttl_s
            if not (lately and self.may_sign(s)):
                return NOT_VERIFIED
            self.ended_s[s.number] = self.now_s
        s.gone = True
        return Expected(204)

    def state(self, s: Session) -> Expected:
        """GET /session."""
        if self.is_gone(s):
            return UNKNOWN
        if self.waiting(s) or s.verified_s is not None:
            self.end(s)
        return Expected(200)
