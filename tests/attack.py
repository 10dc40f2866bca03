"""Attacks on a real gateway: what each costs the attacker, the operator and honest users.

``make attack`` runs them for a minute each, which stands for a day: every budget of a day is
written as one of a minute. Two worker processes answer over HTTP; a stand-in takes the messages
as Vonage would. Client addresses are written by a proxy that the gateway trusts: this process.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import io
import itertools
import json
import random
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import phonenumbers
import provider
import redis
from support import GatewayProcess

import gateway

DAY_S: Final = 60
"""How long a day of an attack lasts here."""
HOME: Final = "GB"
"""The country that is attacked, if it is one."""
ABROAD: Final = ("FR", "DE", "ES", "PL", "US")
"""Where the other honest users live."""
SHORT: Final = {
    name: default.replace("/day", "/minute")
    for name in (
        "sends_per_number",
        "sends_per_number_from_address",
        "unverified_per_prefix",
        "unverified_per_address",
    )
    if (default := str(getattr(gateway.Settings(), name)))
}
SETTINGS: Final[dict[str, Any]] = {
    **SHORT,
    "unverified_per_destination": {"*": "50/minute"},
    "sends_per_hour": 10**6,
    "spend_per_day": 1e6,
    "trusted_proxies": ["127.0.0.1"],
    "countries": ["*"],
    "mt_sender": "Gateway",
    "workers": 2,
}
LIMITED: Final = (114, 115, 116, 117)
"""The errnos of limits."""


def numbers(region: str, seed: int = 0, first: int = 0) -> Iterator[str]:
    """Mobile numbers of a country, each of another prefix, without end.

    Args:
        first: The last four digits of the first thousand.
    """
    example = phonenumbers.example_number_for_type(region, phonenumbers.PhoneNumberType.MOBILE)
    assert example
    text = phonenumbers.format_number(example, phonenumbers.PhoneNumberFormat.E164)
    kept = len(text) - 7  # the digits before are a mobile network's
    order = list(range(10**3))
    random.Random(seed).shuffle(order)
    for n in itertools.count():
        yield f"{text[:kept]}{order[n % 1000]:03}{first + n // 1000:04}"


def one_prefix(region: str = HOME) -> Iterator[str]:
    """The 10,000 numbers of one prefix, again and again."""
    base = next(numbers(region, seed=7))[:-4]
    return (f"{base}{n % 10_000:04}" for n in itertools.count())


class Reply(NamedTuple):
    """An answer: its status, its errno (0 if there is none), its JSON."""

    status: int
    errno: int
    body: Any


class World:
    """A gateway under attack, its provider, and everybody's way to it."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self._here, self._lock, self._read = threading.local(), threading.Lock(), 0
        self._codes: dict[str, str] = {}
        self._links: list[http.client.HTTPConnection] = []
        self.sms = provider.Provider(provider.taken)
        self.sms.__enter__()
        chosen = SETTINGS | {"sms_providers": [self.sms.nexmo()]} | settings
        self.settings = gateway.Settings(**chosen)
        options = [
            part
            for name, value in chosen.items()
            for part in (
                "--" + name.replace("_", "-"),
                value if isinstance(value, str) else json.dumps(value),
            )
        ]
        self.gateway = GatewayProcess(folder, *options)
        self.store = folder / "data" / "store.sock"

    def close(self) -> None:
        """Stop it all."""
        for link in self._links:
            link.close()
        self.gateway.close()
        self.sms.__exit__()

    def ask(
        self, method: str, path: str, address: str, body: Any, credentials: Any = None
    ) -> Reply:
        """One request of a client at some address."""
        if not hasattr(self._here, "link"):
            link = http.client.HTTPConnection("127.0.0.1", self.gateway.port, timeout=30)
            self._here.link = link
            self._links.append(link)
        data = b"" if body is None else json.dumps(body).encode()
        headers = {"X-Forwarded-For": address}
        kind = "application/json" if data else ""
        if data:
            headers["Content-Type"] = kind
        if credentials:
            target = gateway.hawk_target(method, self.gateway.url + path)
            nonce = f"{random.getrandbits(64):x}"
            now_s = int(time.time())
            signed = gateway.build_authorization(credentials, target, now_s, nonce, kind, data)
            headers["Authorization"] = signed
        link = self._here.link
        try:
            link.request(method, path, data, headers)
            answer = link.getresponse()
        except (http.client.HTTPException, OSError):  # it closed after a body that it did not read
            link.close()
            link.request(method, path, data, headers)
            answer = link.getresponse()
        text = answer.read()
        value = json.loads(text) if text else {}
        return Reply(answer.status, value.get("errno", 0), value)

    def code(self, number: str) -> str:
        """The newest code that the provider got for a number."""
        with self._lock, self.sms.lock:
            for request in self.sms.received[self._read :]:
                form = request.form
                self._codes["+" + form["to"]] = re.findall(r"\d{6}", form["text"])[-1]
            self._read = len(self.sms.received)
            return self._codes[number]

    def messages(self) -> list[str]:
        """The numbers that messages went to."""
        with self.sms.lock:
            return ["+" + request.form["to"] for request in self.sms.received]

    def bill(self) -> dict[str, float]:
        """What ``gateway.py bill`` says that a first day costs at most, by region.

        It is asked with the budgets as they are in life, of a day.
        """
        text = {
            name: json.loads(json.dumps(getattr(self.settings, name)).replace("/minute", "/day"))
            for name in (*SHORT, "unverified_per_destination", "sends_per_hour", "spend_per_day")
        }
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            gateway.bill(gateway.Settings(countries=["*"], **text))
        lines = [line.split() for line in printed.getvalue().splitlines()[1:]]
        return {place: float(first_day) for place, _, _, first_day, *_ in lines}

    def spent(self, numbers: list[str]) -> Counter[str]:
        """What messages to these numbers cost by ``sms_price``, by region."""
        found: Counter[str] = Counter()
        for number in numbers:
            region = gateway.country_of(gateway.Msisdn(number))
            found[region] += gateway.price_of(self.settings, number, region)  # type: ignore
        return found

    def report(self) -> dict[str, Counter[str]]:
        """What the gateway counted: by outcome, by region (and limit), or by prefix."""
        names = {limit.row: limit.setting for limit in gateway.LIMITS}
        found: dict[str, Counter[str]] = {}
        with redis.Redis(unix_socket_path=str(self.store)) as store:
            for outcome in ("sent", "verified", "refused", "would be refused"):
                key = f"{{limits}}{outcome}"
                counts: Any = store.hgetall(key)
                pairs: Any = store.zrevrange(f"{key} by prefix", 0, 9, withscores=True)
                found[outcome] = Counter({name.decode(): int(n) for name, n in pairs if name})
                for name, n in counts.items():
                    region, _, row = name.decode().partition(" ")
                    found[outcome][f"{region} {names.get(row, '')}".strip()] += int(n)
        return found


class Client:
    """Somebody at an address, with a session."""

    def __init__(self, world: World, address: str) -> None:
        self.world, self.address = world, address
        self.credentials: gateway.Credentials | None = None

    def register(self) -> Reply:
        """Open a session, if that is allowed."""
        reply = self.world.ask("POST", "/register", self.address, None)
        if reply.status == 200:
            token = gateway.SessionToken(bytes.fromhex(reply.body["msisdnSessionToken"]))
            self.credentials = gateway.derive_credentials(token)
        return reply

    def call(self, path: str, **body: Any) -> Reply:
        """A signed request."""
        return self.world.ask("POST", path, self.address, body or None, self.credentials)


@dataclass
class Outcome:
    """What came of an attack.

    Attributes:
        asked: Requests of the attacker, by errno (0 = served).
        honest: How many were verified, did not want to be, or were refused, by place.
        refusals: The errnos that honest users got.
        attack_messages: That left for the attacker; ``honest_messages`` for honest users.
        verified: What the messages cost that somebody verified, by region.
        spent: What all others cost, by region.
        bill: What ``gateway.py bill`` says of a first day, by region.
        began_s: When the attacker was first refused; 0 = never.
    """

    name: str
    asked: Counter[int] = field(default_factory=Counter)
    honest: dict[str, Counter[str]] = field(default_factory=dict)
    refusals: Counter[int] = field(default_factory=Counter)
    attack_messages: int = 0
    honest_messages: int = 0
    verified: Counter[str] = field(default_factory=Counter)
    spent: Counter[str] = field(default_factory=Counter)
    bill: dict[str, float] = field(default_factory=dict)
    began_s: float = 0.0
    report: dict[str, Counter[str]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def saw(self, reply: Reply) -> Reply:
        """Count an answer that the attacker got."""
        with self.lock:
            self.asked[reply.errno] += 1
            if reply.errno in LIMITED and not self.began_s:
                self.began_s = time.monotonic()
        return reply

    def refused(self, place: str) -> int:
        """How many honest users of a place were refused."""
        return self.honest.get(place, Counter())["refused"]

    def most(self, region: str) -> float:
        """The bill of a region: what it says, and 0.3 for each message that was paid back."""
        return self.bill[region] + 0.3 * self.verified[region] + 1e-6

    def over_the_bill(self) -> dict[str, float]:
        """The regions where unverified messages cost more than the bill says, and how much."""
        return {r: spent for r, spent in self.spent.items() if spent > self.most(r)}


def live(world: World, outcome: Outcome, place: str, address: str, number: str, ends: bool) -> None:
    """An honest user's way: registers, asks, and (four of five) returns the code."""
    client = Client(world, address)
    seen = outcome.honest.setdefault(place, Counter())
    reply = client.register()
    if reply.status == 200:
        reply = client.call("/sms/verify", msisdn=number)
    if reply.status == 200 and ends:
        reply = client.call("/sms/verify_code", code=world.code(number))
        outcome.verified += world.spent([number] * (reply.status == 200))
    if reply.status != 200:
        outcome.refusals[reply.errno] += 1
    seen["refused" if reply.status != 200 else "verified" if ends else "left"] += 1


def strike(world: World, outcome: Outcome, address: str, number: str) -> None:
    """An attacker's try to have one message sent."""
    client = Client(world, address)
    if outcome.saw(client.register()).status == 200:
        outcome.saw(client.call("/sms/verify", msisdn=number))


def noise(world: World, outcome: Outcome, address: str, targets: Iterator[str]) -> Iterator[None]:
    """One address that asks for anything, a request at a time, without end."""
    client = Client(world, address)
    for n in itertools.count():
        if n % 8 == 0 or client.credentials is None:
            reply = client.register()
        elif n % 8 in (1, 2):
            reply = client.call("/sms/verify", msisdn=next(targets))
        elif n % 8 == 3:
            reply = client.call("/sms/resend_code")
        elif n % 8 == 4:
            reply = client.call("/sms/verify_code", code="000000")
        elif n % 8 == 5:
            reply = client.call("/certificate/sign", publicKey={"algorithm": "RS"})
        elif n % 8 == 6:
            reply = world.ask("POST", "/discover", address, {"mcc": "234"})
        else:
            reply = world.ask("POST", "/sms/verify", address, {"msisdn": 1})
        outcome.saw(reply)
        yield


Attack = Callable[[World, Outcome, float, int], None]
"""Attacks a world until a time, with a size: how many addresses, or requests, are used."""


def one_address(world: World, outcome: Outcome, end_s: float, size: int) -> None:
    """One address sends 4 × ``size`` requests of any kind, and another goes on slowly."""
    loud = noise(world, outcome, "198.51.100.1", numbers(HOME, 1))
    for _ in range(4 * size):
        next(loud)
    targets = numbers(HOME, 2)
    pause_s = DAY_S / 12
    while time.monotonic() < end_s:
        strike(world, outcome, "198.51.100.2", next(targets))
        time.sleep(min(pause_s, max(end_s - time.monotonic(), 0)))


def many(targets: Callable[[], Iterator[str]]) -> Attack:
    """An attack from ``size`` addresses, in turn, twenty numbers for each."""

    def attack(world: World, outcome: Outcome, end_s: float, size: int) -> None:
        def one(n: int, number: str) -> None:
            if time.monotonic() < end_s:
                strike(world, outcome, f"198.18.{n % size // 250}.{n % size % 250}", number)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(one, range(20 * size), itertools.islice(targets(), 20 * size)))

    return attack


def all_countries() -> Iterator[str]:
    """Numbers of every country in turn."""
    regions = sorted(phonenumbers.SUPPORTED_REGIONS)
    mobile = phonenumbers.PhoneNumberType.MOBILE
    each = [
        numbers(region, 3)
        for region in regions
        if (example := phonenumbers.example_number_for_type(region, mobile))
        and len(str(example.national_number)) >= 7
    ]
    while True:
        for one in each:
            yield next(one)


ATTACKS: Final[dict[str, Attack]] = {
    "one address": one_address,
    "500 addresses, one prefix": many(one_prefix),
    "500 addresses, one country": many(lambda: numbers(HOME, 3)),
    "500 addresses, all countries": many(all_countries),
}


def run(
    name: str, folder: Path, size: int = 500, honest: int = 200, seconds: float = DAY_S, **more: Any
) -> Outcome:
    """Attack a new gateway while honest users come; half of them after refusals began.

    Args:
        size: Addresses of the attacker.
        honest: Honest users: half of them in the country that is attacked, four fifths return
            their code.
    """
    world, outcome = World(folder, **more), Outcome(name)
    try:
        with ThreadPoolExecutor(1) as bad:
            started_s = time.monotonic()
            attack = bad.submit(ATTACKS[name], world, outcome, started_s + seconds, size)
            people = list(_people(honest))
            first, second = people[: honest // 2], people[honest // 2 :]
            _come(world, outcome, first, seconds / 4)
            half_s = started_s + seconds / 2
            while not (attack.done() or outcome.began_s or time.monotonic() > half_s):
                time.sleep(0.05)
            _come(world, outcome, second, started_s + 0.9 * seconds - time.monotonic())
            attack.result()
        honest_numbers = {number for _, _, number in people}
        messages = world.messages()
        outcome.honest_messages = sum(number in honest_numbers for number in messages)
        outcome.attack_messages = len(messages) - outcome.honest_messages
        outcome.spent = world.spent(messages)
        outcome.spent.subtract(outcome.verified)
        outcome.bill, outcome.report = world.bill(), world.report()
        outcome.began_s -= started_s * bool(outcome.began_s)
    finally:
        world.close()
    return outcome


def _come(world: World, outcome: Outcome, people: list[Person], seconds: float) -> None:
    """Honest users come one by one, evenly over some seconds; the fifth of five leaves."""
    started_s = time.monotonic()
    for n, (place, address, number) in enumerate(people):
        time.sleep(max(0.0, started_s + n * seconds / len(people) - time.monotonic()))
        live(world, outcome, place, address, number, ends=n % 5 != 4)


Person = tuple[str, str, str]
"""Where somebody lives, and their address and number."""


def _people(count: int) -> Iterator[Person]:
    home = numbers(HOME, 9, first=9000)
    abroad = [numbers(region, 9, first=9000) for region in ABROAD]
    for n in range(count):
        address = f"203.0.113.{n}" if n < 250 else f"192.0.2.{n - 250}"
        away = n // 2 % len(ABROAD)
        yield ("here", address, next(home)) if n % 2 else ("elsewhere", address, next(abroad[away]))


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A folder with a short path, for a gateway's data."""
    with tempfile.TemporaryDirectory(prefix="attack") as path:
        yield Path(path)


HEAD: Final = (
    "| attack | limits | requests | refused | messages | spent | bill | honest messages | "
    "honest refused: there | elsewhere |"
)


def row(outcome: Outcome, limits: str) -> str:
    """A line of the table. Spent is on messages that nobody verified. The bill is that of their
    countries; 0.3 of a message is added for each that was paid back."""
    places = [HOME] if "one" in outcome.name else list(outcome.spent)
    cells = [
        outcome.name,
        limits,
        sum(outcome.asked.values()),
        sum(outcome.asked[errno] for errno in LIMITED),
        outcome.attack_messages,
        f"{sum(outcome.spent[place] for place in places):.2f}",
        f"{min(sum(outcome.bill[place] for place in places), outcome.bill['everywhere']):.2f}"
        f" + {0.3 * sum(outcome.verified[place] for place in places):.2f}",
        outcome.honest_messages,
        outcome.refused("here"),
        outcome.refused("elsewhere"),
    ]
    return f"| {' | '.join(map(str, cells))} |"


def main() -> int:
    """Run the attacks and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=DAY_S, help="how long each attack lasts")
    parser.add_argument("--size", type=int, default=500, help="addresses of the attacker")
    parser.add_argument("--only", default="", help="attacks whose line has this in it")
    given = parser.parse_args()
    print(HEAD)
    print("|---|---|" + "--:|" * 8)
    defaults = gateway.Settings()
    whole = {name: getattr(defaults, name) for name in ("sends_per_hour", "spend_per_day")}
    runs: list[tuple[str, str, str, dict[str, Any]]] = [
        (limits, limits, name, {}) for limits in ("enforce", "record", "off") for name in ATTACKS
    ]
    for limits in ("enforce", "record"):
        runs.append((f"{limits}, hour and money too", limits, list(ATTACKS)[-1], whole))
    for label, limits, name, more in runs:
        if given.only in f"{name} {label}":
            with folder() as path:
                outcome = run(name, path, given.size, 200, given.seconds, limits=limits, **more)
            print(row(outcome, label), flush=True)
            print(f"  refused from {outcome.began_s:.1f} s on", dict(outcome.refusals))
            if over := outcome.over_the_bill():
                print("  more than the bill:", over)
            if limits == "record":
                print("  would be refused:", outcome.report["would be refused"].most_common(6))
    return 0


if __name__ == "__main__":
    sys.exit(main())
