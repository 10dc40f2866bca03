"""Mixed flows by many clients while one thing after another breaks: ``make soak``.

Each client keeps a model of its sessions, written from CONTRACT.md: what it did, and so what may
be answered. An answer that the model does not allow is a fault, and so is a proof that does not
verify, a verified user who is lost, a number that is guessed at more than ``code_tries`` times a
message, and memory or descriptors that grow.

The embedded store's folder is a small tmpfs that can be filled; that needs root. The gateway's
clock is stepped by a ``sitecustomize.py`` that replaces ``time.time`` in its processes: libfaketime
0.9.10 breaks ``time.sleep`` of Python 3.11.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import itertools
import json
import os
import random
import re
import secrets
import select
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode

import lab
import load
import psutil
import redis
from cryptography.hazmat.primitives.asymmetric import ec
from load import Link, Place, Provider, Reply, code_in, spoken
from support import ROOT, GatewayProcess
from test_serving import workers_of

import gateway

CLIENTS: Final = 50
PAUSE_S: Final = 0.4
"""How long a client rests between two requests, on average."""
SITE: Final = "https://shop.example"
PATH_SECRET: Final = "soak-webhook-secret"
DISK_BYTES: Final = 96 << 20
"""The size of the disk that can be full."""
STEP_S: Final = 90
"""How far the clock jumps: further than ``hawk_skew_s``."""
CLOCK: Final = """
import os, time
_time, _path, _read_s, _ahead_s = time.time, os.environ["SOAK_CLOCK"], 0.0, 0.0
def stepped():
    global _read_s, _ahead_s
    if abs(_time() - _read_s) > 0.1:
        _read_s = _time()
        try:
            _ahead_s = float(open(_path).read())
        except (OSError, ValueError):
            pass
    return _time() + _ahead_s
time.time = stepped
"""
"""A clock that is as much ahead as a file says."""
ALLOWED: Final = {
    *("200", "204", "400/104", "400/105", "401/109", "401/110", "410/111", "429/114", "503/201"),
    "0",
}
"""The outcomes that there may be at all. 0: the worker was killed before it answered."""
SENDS: Final = ("/sms/verify", "/sms/mt/verify", "/sms/resend_code")


@dataclass
class Period:
    """A time in which one thing was broken for a third of it.

    Attributes:
        name: What was broken.
        outcomes: The answers in it.
        longest_s: Of all answers; ``longest_other_s`` of those that send no message.
        bad_s: When the last answer came that was no answer, or 503.
        healed_s: When it was mended.
    """

    name: str
    begun_s: float = 0.0
    healed_s: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    longest_s: float = 0.0
    longest_other_s: float = 0.0
    bad_s: float = 0.0

    @property
    def well_s(self) -> float:
        """How long after it was mended the last request failed; of what is killed, after that."""
        since_s = self.begun_s if "killed" in self.name else self.healed_s
        return max(0.0, self.bad_s - since_s) if since_s else 0.0


@dataclass(eq=False)
class Session:
    """What its client knows of a session; ``None`` stands for "it may be so, or not".

    Attributes:
        codes: All that came to its phone. The newest surely waits if ``sure`` is the present
            epoch; then ``wrong`` is how many wrong ones were returned since.
        sends: How many messages were asked for; ``doubtful``: an answer to one of these is unknown.
        verified, ended, gone: By a right code; by ``everywhere``; by /unregister.
        verified_in: The epoch in which it was verified.
    """

    link: Link
    number: str
    codes: list[str] = field(default_factory=list)
    sure: int = -1
    wrong: int = 0
    sends: int = 0
    doubtful: bool = False
    verified: bool | None = False
    verified_in: int = -1
    ended: bool | None = False
    gone: bool | None = False


@dataclass(frozen=True)
class Proof:
    """A proof as it was issued: when, by which clock, for which number, to whose key."""

    form: str
    token: str
    number: str
    key: Any
    at_s: float
    ahead_s: float


class Soak:
    """A run: the gateway, its provider, its clients, and what breaks.

    Attributes:
        faults: What contradicts the model, by how often.
        epoch: Grows when the clock is stepped: what a client knew of a code is doubtful then.
    """

    def __init__(
        self, folder: Path, seconds: float, every_s: float, clients: int, options: Sequence[str]
    ) -> None:
        self.options, self.only = options, ""
        self.folder, self.seconds, self.every_s, self.clients = folder, seconds, every_s, clients
        self.faults, self.epoch, self.ahead_s = Counter[str](), 0, 0.0
        self.provider, self.guesses = Provider(), Counter[str]()
        self.periods = [Period("nothing")]
        self.kept, self.gone = list[Session](), list[Session]()
        self.proofs, self.documents = deque[Proof](), deque[tuple[float, Any]]()
        self.verified, self.links = 0, set[Link]()
        self.done, self.log, self.lives = Counter[str](), bytearray(), itertools.count()
        self.samples: dict[str, list[tuple[float, int, int, int]]] = defaultdict(list)
        self.keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(4)]
        self.old_keys = [gateway.generate_key("RS256") for _ in range(2)]
        self.ending = False
        self.overlap_s = max(2, round(every_s * 2 / 3))

    # -- The gateway ----------------------------------------------------------

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The gateway, with all that it needs."""
        data, self.clock = self.folder / "data", self.folder / "clock"
        data.mkdir(mode=0o700)
        self.has_disk = (
            os.geteuid() == 0
            and not subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=700", "tmpfs", str(data)],
                check=False,
            ).returncode
        )
        site = self.folder / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text(CLOCK)
        self.clock.write_text("0")
        self.fifo = self.folder / "log"
        os.mkfifo(self.fifo)
        self.reader = os.open(self.fifo, os.O_RDONLY | os.O_NONBLOCK)
        await self.provider.start()
        inbound = [{"kind": "nexmo", "path_secret": PATH_SECRET}]
        gate = await asyncio.to_thread(
            GatewayProcess, self.folder, "--workers", "2", "--sends-per-hour", "1000000",
            "--sms-providers", json.dumps([self.provider.entry]), "--mo-verifier", "447700900999",
            "--sms-inbound", json.dumps(inbound), "--jwks-overlap-s", str(self.overlap_s),
            "--store-max-bytes", str(512 << 20), *self.options,
            env={"PYTHONPATH": str(site), "SOAK_CLOCK": str(self.clock)}, log=self.fifo,
        )  # fmt: skip
        self.gate, self.place = gate, Place(gate.port, gate.url)
        asyncio.get_running_loop().add_reader(self.reader, self.read_log)
        try:
            yield
        finally:
            try:
                stopped = await asyncio.to_thread(gate.stop)
                if stopped:
                    self.faults[f"it stopped with {stopped}"] += 1
            finally:
                gate.close()
                self.provider.stop()
                if self.has_disk:
                    subprocess.run(["umount", str(data)], check=True)

    def read_log(self) -> None:
        """Take what the gateway has logged."""
        with contextlib.suppress(BlockingIOError):
            self.log += os.read(self.reader, 1 << 20)

    # -- What its clients see -------------------------------------------------

    def fault(self, text: str) -> None:
        """Note what contradicts the model."""
        self.faults[f"{text} (while {self.periods[-1].name})"] += 1

    def observe(self, method: str, path: str, reply: Reply) -> None:
        """Count an answer."""
        period = self.periods[-1]
        period.outcomes[reply.outcome] += 1
        period.longest_s = max(period.longest_s, reply.took_s)
        if path not in SENDS and "momt" not in path:
            period.longest_other_s = max(period.longest_other_s, reply.took_s)
        if reply.unknown:
            period.bad_s = time.monotonic()
        if reply.outcome not in ALLOWED:
            self.fault(f"{method} {path}: {reply.outcome} {str(reply.body)[:200]}")
        if not reply.status and not any(p.name == "worker killed" for p in self.periods[-2:]):
            self.fault(f"{method} {path}: no answer, after {reply.took_s:.0f} s")

    async def rest(self) -> None:
        """What somebody does between two requests."""
        await asyncio.sleep(random.uniform(0, 2 * PAUSE_S))

    async def register(self, number: str, **body: Any) -> Session | None:
        """A new session, if there is one to be had."""
        link = self.link()
        reply = await link.register(**body)
        if reply.status != 200:
            if not reply.unknown:
                self.fault(f"/register: {reply.outcome}")
            link.close()
            return None
        return Session(link, number)

    def link(self, observed: bool = True) -> Link:
        """A connection, which is closed at the end at the latest."""
        link = Link(self.place, self.observe) if observed else Link(self.place)
        self.links.add(link)
        return link

    def expect(self, session: Session, what: str, reply: Reply, *allowed: str) -> None:
        """Check an answer by the model."""
        if session.gone is None:
            allowed = (*allowed, "401/110")
        if reply.outcome == "401/109" and time.monotonic() < self.clock_settles_s:
            return
        if not reply.unknown and reply.outcome not in allowed:
            now = f"verified {session.verified}, ended {session.ended}, gone {session.gone}"
            told = str(reply.body)[:150]
            self.fault(f"{what}: {reply.outcome} {told}, allowed {allowed}; {now}")

    clock_settles_s = 0.0

    async def send(self, session: Session, path: str, body: Any = None) -> Reply:
        """Ask for a message."""
        phone, epoch = self.provider.phones[session.number], self.epoch
        before, again = len(phone), path == "/sms/resend_code"
        session.sends += 1
        reply = await session.link.ask("POST", path, body)
        allowed = ["204" if path == "/sms/mt/verify" else "200"]
        if session.sends > 5 or session.doubtful:
            allowed.append("429/114")
        if again and session.doubtful:
            allowed.append("410/111")
        self.expect(session, path, reply, *allowed)
        new = [code_in(text) for text in phone[before:]]
        session.codes += new
        if reply.status in (200, 204):
            # Without a message it was a double click of a doubtful one, or the provider lied.
            session.sure = epoch if len(new) == 1 and self.settled(epoch) else -1
            if not new and self.cutting:  # cut off in the middle, it may have left
                self.provider.asked[session.number] += 1
            elif not new and not session.doubtful and not self.silent:
                self.fault(f"{path} said that a message left, and none arrived")
            session.wrong = 0
        elif reply.unknown or new:
            session.sure, session.doubtful = -1, True
        return reply

    def settled(self, epoch: int) -> bool:
        """Whether all workers have had one clock since an epoch began."""
        return epoch == self.epoch and time.monotonic() > self.clock_settles_s

    silent = cutting = False

    async def guess(self, session: Session, code: str = "") -> Reply:
        """Return a code: a wrong one, or ``code``, which may be the right one."""
        wrong = code
        while not wrong or (not code and wrong in session.codes):
            wrong = f"{secrets.randbelow(10**6):06}"
        body: gateway.Json = {"code": wrong}
        key = random.choice(self.keys)
        if code and random.random() < 0.3:
            body["publicKey"] = lab.public_jwk(key)
        was_sure = session.sure == self.epoch
        reply = await session.link.ask("POST", "/sms/verify_code", body)
        newer = "newer" in str(reply.body)
        if reply.errno == 105 and not newer:
            self.guesses[session.number] += 1
            session.wrong += 1
            if self.guesses[session.number] > 3 * self.provider.asked[session.number]:
                self.fault("a number was guessed at more than three times a message")
        was_sure = was_sure and session.sure == self.epoch  # nor was the clock stepped meanwhile
        newest = bool(code) and session.codes[-1] == code
        self.expect(session, *self.judged(session, reply, code, was_sure, newest and not newer))
        if reply.status == 200:
            if not code or reply.body["msisdn"] != session.number:
                self.fault("a code that was never sent verified a number")
            session.verified, session.ended, session.sure = True, False, -1
            session.verified_in = self.epoch if self.settled(self.epoch) else -1
            if "publicKey" in body:
                self.keep("SD-JWT", reply.body["cert"], session, key)
        elif reply.unknown:
            session.sure = -1
            if code and not session.verified:
                session.verified = None
        return reply

    @staticmethod
    def judged(
        session: Session, reply: Reply, code: str, sure: bool, newest: bool
    ) -> tuple[Any, ...]:
        """What was returned, the answer, and the answers that are allowed."""
        if not sure:
            return "a code, perhaps", reply, *["200"] * bool(code), "400/105", "410/111"
        if newest and session.wrong < 3:
            return "the right code", reply, "200"
        if code:
            return "an old code", reply, "200", "400/105", "410/111"
        counted = reply.errno == 105 and session.wrong <= 3
        return "a wrong code", reply, "400/105" if counted else "410/111"

    async def sign(self, session: Session) -> Reply:
        """Ask for a proof in one of the three forms."""
        form = random.choice(["BrowserID", "SD-JWT", "JWT"])
        key: Any = random.choice(self.keys)
        if form == "BrowserID":
            key = random.choice(self.old_keys)
            body: gateway.Json = {"publicKey": gateway.public_key_json(key.public_key())}
        elif form == "SD-JWT":
            body = {"publicKey": lab.public_jwk(key)}
        else:
            body = {"format": "jwt", "audience": SITE, "nonce": "n"}
        asked_in = self.epoch
        reply = await session.link.ask("POST", "/certificate/sign", body)
        allowed = []
        if session.verified is not False and session.ended is not True:
            allowed.append("200")
        if session.verified is not True or session.ended is not False:
            allowed.append("400/104")
        if session.gone is not False:
            allowed = [*allowed, "401/110"] if session.gone is None else ["401/110"]
        self.expect(session, "/certificate/sign", reply, *allowed)
        if reply.status == 200:
            if session.verified is None:
                session.verified, session.verified_in = True, -1
            self.keep(form, reply.body["cert"], session, key, asked_in)
        elif reply.outcome == "400/104":
            session.verified = None if session.verified is None and session.codes else False
        return reply

    def keep(
        self, form: str, token: str, session: Session, key: Any, asked_in: int | None = None
    ) -> None:
        """Keep a proof, to be verified at the end; not one that the clock was stepped for."""
        if self.settled(self.epoch if asked_in is None else asked_in):
            facts = form, token, session.number, key, time.time(), self.ahead_s
            self.proofs.append(Proof(*facts))

    async def unregister(self, session: Session, **body: Any) -> None:
        """Unregister, and ask again until it is clear whether that was done."""
        for _ in range(60):
            reply = await session.link.ask("POST", "/unregister", body or None)
            allowed = ["204"] + ["401/110"] * (session.gone is None)
            if body and session.verified_in != self.epoch:
                allowed.append("400/104")
            self.expect(session, f"/unregister {body}", reply, *allowed)
            if reply.outcome in ("204", "401/110"):
                session.gone = True
                self.gone.append(session)
                return
            if reply.unknown:
                session.gone = None
            elif reply.outcome == "400/104":
                return
            await self.rest()
        self.fault("/unregister failed for long")

    # -- What they do ---------------------------------------------------------

    async def verify(self, session: Session, tries: int = 8) -> bool:
        """Go on until the number is verified; gives up after some tries."""
        for _ in range(tries):
            await self.rest()
            if not session.codes or session.sure != self.epoch:
                asked_before = session.codes and random.random() < 0.5
                path = "/sms/resend_code" if asked_before else "/sms/verify"
                body = None if asked_before else {"msisdn": session.number}
                if (await self.send(session, path, body)).status == 429:
                    return False
                await self.rest()
            if session.codes:
                reply = await self.guess(session, session.codes[-1])
                if session.verified is None:
                    await self.sign(session)
                if session.verified:
                    return True
                if reply.errno in (105, 111):
                    session.sure = -1
        return False

    async def live(self, n: int) -> None:
        """A client: one flow after the other."""
        flows = [self.straight, self.wrong, self.resend, self.by_phone, self.at_once]
        flows += [self.everywhere, self.abandon, self.straight]
        await asyncio.sleep(random.uniform(0, 2))
        while not self.ending:
            flow = random.choice(flows)
            try:
                await flow(f"+4477009{next(self.lives) % 100_000:05}")
                self.done[flow.__name__] += 1
            except AssertionError as error:
                self.fault(f"{flow.__name__}: {error}")
            await self.rest()

    async def leave(self, session: Session) -> None:
        """Sign some proofs; then most unregister, and the others stay verified to the end."""
        for _ in range(random.randrange(1, 4)):
            await self.rest()
            await self.sign(session)
        if random.random() < 0.8:
            await self.unregister(session)
            if random.random() < 0.3:
                await self.sign(session)
        else:
            self.kept.append(session)
        session.link.close()

    async def straight(self, number: str) -> None:
        """The flow as it is meant."""
        if session := await self.register(number, mcc="234", msisdn=number):
            if await self.verify(session):
                await self.leave(session)
            session.link.close()

    async def wrong(self, number: str) -> None:
        """Up to five wrong codes, and then the right one, which may be dead by then."""
        if session := await self.register(number):
            await self.send(session, "/sms/verify", {"msisdn": number})
            for _ in range(random.randrange(1, 6)):
                await self.rest()
                await self.guess(session)
            if session.codes:
                if session.wrong >= 3:
                    session.sure = -1
                await self.guess(session, session.codes[-1])
            if session.verified or await self.verify(session):
                await self.leave(session)
            session.link.close()

    async def resend(self, number: str) -> None:
        """A code that is superseded, and tried all the same."""
        if session := await self.register(number):
            await self.send(session, "/sms/verify", {"msisdn": number})
            await self.rest()
            await self.send(session, "/sms/resend_code")
            await self.rest()
            if len(session.codes) > 1 and session.codes[-1] != session.codes[-2]:
                await self.guess(session, session.codes[-2])
            if session.verified or await self.verify(session):
                await self.leave(session)
            session.link.close()

    async def by_phone(self, number: str) -> None:
        """The phone texts the Hawk id; its provider delivers that again until it is taken."""
        if not (session := await self.register(number, mcc="234")):
            return
        assert session.link.credentials
        query = urlencode({
            "msisdn": number.lstrip("+"), "to": "447700900999", "messageId": secrets.token_hex(8),
            "text": f"/sms/momt/verify {session.link.credentials.hawk_id}",
        })  # fmt: skip
        phone, link = self.provider.phones[number], self.link()
        for _ in range(20):
            reply = await link.ask("GET", f"/sms/momt/{PATH_SECRET}?provider=nexmo&{query}")
            if reply.status == 200:
                break
            await self.rest()
        link.close()
        session.doubtful = True  # it tells the provider nothing
        session.codes += [code_in(text) for text in phone]
        if session.codes:
            await self.rest()
            await self.guess(session, session.codes[-1])
            if session.verified is None:
                await self.sign(session)
        if session.verified:
            await self.leave(session)
        session.link.close()

    async def at_once(self, number: str) -> None:
        """Six wrong codes at once: three are judged."""
        if session := await self.register(number):
            await self.send(session, "/sms/verify", {"msisdn": number})
            sure, links = session.sure == self.epoch, []
            for _ in range(6):
                links.append(self.link())
                links[-1].credentials, links[-1].ahead_s = session.link.credentials, self.ahead_s
            wrong = [f"{secrets.randbelow(10**6):06}" for _ in links]
            asked = (
                link.ask("POST", "/sms/verify_code", {"code": code})
                for link, code in zip(links, wrong, strict=True)
                if code not in session.codes
            )
            replies = await asyncio.gather(*asked)
            judged = sum(reply.errno == 105 for reply in replies)
            self.guesses[number] += judged
            if judged > 3 * self.provider.asked[number]:
                self.fault(f"{judged} guesses at once")
            known = not any(reply.unknown for reply in replies) and sure
            if known and self.epoch == session.sure and judged != 3 and len(replies) == 6:
                self.fault(f"{judged} of 6 guesses were judged: {[r.outcome for r in replies]}")
            session.sure = -1
            for link in links:
                link.close()
            if await self.verify(session):
                await self.leave(session)
            session.link.close()

    async def everywhere(self, number: str) -> None:
        """Two devices of one number; the second ends the proofs of the first."""
        sessions = []
        for _ in range(2):
            if (session := await self.register(number)) and await self.verify(session):
                sessions.append(session)
                await self.sign(session)
        if len(sessions) < 2:
            return
        first, second = sessions
        same = first.verified_in == second.verified_in == self.epoch  # and so by one clock
        first.ended = None
        await self.unregister(second, everywhere=True)
        if second.gone:
            # What was verified while the clock was ahead may outlive this.
            first.ended = True if same and self.epoch == second.verified_in else None
            await asyncio.sleep(1.1)  # whatever is verified in the same second ends, too
            await self.sign(first)
        elif same and self.epoch == second.verified_in:
            self.fault("everywhere failed")
        for session in sessions:
            session.link.close()

    async def abandon(self, number: str) -> None:
        """Somebody who asks for a code and leaves."""
        if session := await self.register(number):
            await self.send(session, "/sms/mt/verify", {"msisdn": number})
            await self.rest()
            if session.codes and random.random() < 0.5 and session.sure == self.epoch:
                await self.guess(session, session.codes[-1])
                if session.verified:
                    await self.leave(session)
            session.link.close()

    # -- What breaks ----------------------------------------------------------

    def breakages(self) -> list[Callable[[], contextlib.AbstractAsyncContextManager[None]]]:
        """All of them, in turn."""
        found = [
            self.store_killed, self.provider_down, self.store_stopped, self.worker_killed,
            self.provider_slow, self.store_full, self.keys_rotated, self.says_failed,
            self.disk_full, self.says_taken, self.clock_stepped, self.log_blocked, self.log_gone,
        ]  # fmt: skip
        found = [breakage for breakage in found if self.only in breakage.__name__]
        if not self.has_disk and self.disk_full in found:
            print("left out: a full disk; a small tmpfs cannot be mounted here: sudo make soak")
            found.remove(self.disk_full)
        return found

    def store(self) -> psutil.Process:
        """The embedded store's process, and not one that rewrites its file."""
        family = (p for p in self.gate.family() if "valkey" in p.name())
        return min(family, key=lambda process: process.create_time())

    @contextlib.asynccontextmanager
    async def store_killed(self) -> AsyncIterator[None]:
        """Its data are on disk; the gateway starts it again."""
        self.store().kill()
        yield

    @contextlib.asynccontextmanager
    async def store_stopped(self) -> AsyncIterator[None]:
        """It hangs: connections stay open, and nothing is answered."""
        store = self.store()
        store.suspend()
        try:
            yield
        finally:
            store.resume()

    @contextlib.asynccontextmanager
    async def store_full(self) -> AsyncIterator[None]:
        """It has no memory left for more."""
        store = redis.Redis(unix_socket_path=str(self.folder / "data/store.sock"))
        before = str(store.config_get("maxmemory")["maxmemory"])
        store.config_set("maxmemory", 1)
        try:
            yield
        finally:
            store.config_set("maxmemory", before)
            store.close()

    @contextlib.asynccontextmanager
    async def disk_full(self) -> AsyncIterator[None]:
        """Somebody else's file fills the disk, all but 1 MB."""
        path = self.folder / "data/of-somebody-else"
        disk = os.statvfs(path.parent)
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, disk.f_bavail * disk.f_frsize - (1 << 20))
        try:
            yield
        finally:
            path.unlink()

    @contextlib.asynccontextmanager
    async def worker_killed(self) -> AsyncIterator[None]:
        """The server starts another."""
        random.choice(workers_of(self.gate)).kill()
        yield

    @contextlib.asynccontextmanager
    async def provider_down(self) -> AsyncIterator[None]:
        """Nobody listens, and connections are cut."""
        self.provider.stop()
        self.cutting = True
        try:
            yield
        finally:
            await self.provider.start()
        await asyncio.sleep(1)  # until those that were asked for are answered
        self.cutting = False

    @contextlib.asynccontextmanager
    async def _provider(self, answer: load.Answer) -> AsyncIterator[None]:
        self.provider.answer = answer
        try:
            yield
        finally:
            self.provider.answer = load.taken

    def provider_slow(self) -> contextlib.AbstractAsyncContextManager[None]:
        """Each message takes 2 s."""

        async def slow(provider: Provider, to: str, text: str) -> bytes:
            await asyncio.sleep(2)
            return await load.taken(provider, to, text)

        return self._provider(slow)

    def says_failed(self) -> contextlib.AbstractAsyncContextManager[None]:
        """The provider delivers, and says that it failed."""

        async def lie(provider: Provider, to: str, text: str) -> bytes:
            provider.deliver(to, text)
            return spoken("5")

        return self._provider(lie)

    @contextlib.asynccontextmanager
    async def says_taken(self) -> AsyncIterator[None]:
        """The provider takes messages, and delivers none."""

        async def lie(provider: Provider, to: str, text: str) -> bytes:
            return spoken("0")

        self.silent = True
        async with self._provider(lie):
            yield
        await asyncio.sleep(1)  # until those that were asked for are answered
        self.silent = False

    @contextlib.asynccontextmanager
    async def clock_stepped(self) -> AsyncIterator[None]:
        """The gateway's clock jumps ahead, and back again."""
        self.step(STEP_S)
        try:
            yield
        finally:
            self.step(0)

    def step(self, ahead_s: float) -> None:
        """Set the gateway's clock; for a moment its workers disagree."""
        new = self.clock.with_suffix(".new")
        new.write_text(str(ahead_s))
        new.rename(self.clock)
        self.ahead_s, self.epoch = ahead_s, self.epoch + 1
        self.clock_settles_s = time.monotonic() + 3

    @contextlib.asynccontextmanager
    async def keys_rotated(self) -> AsyncIterator[None]:
        """The command makes a key, which signs after the overlap."""
        command = [sys.executable, str(ROOT / "gateway.py"), "rotate-keys"]
        command += [
            "--keys-dir",
            str(self.folder / "keys"),
            "--data-dir",
            str(self.folder / "data"),
        ]
        command += ["--jwks-overlap-s", str(self.overlap_s)]
        made = await asyncio.create_subprocess_exec(*command, stderr=subprocess.PIPE)
        _, told = await made.communicate()
        if made.returncode:
            self.fault(f"rotate-keys: {told.decode()}")
        yield

    @contextlib.asynccontextmanager
    async def log_blocked(self) -> AsyncIterator[None]:
        """Nobody reads the log, and its pipe is full."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(self.reader)
        with contextlib.suppress(OSError):  # it holds more than that just now
            fcntl.fcntl(self.reader, fcntl.F_SETPIPE_SZ, 4096)
        try:
            yield
            writer = os.open(self.fifo, os.O_WRONLY | os.O_NONBLOCK)
            if select.select([], [writer], [], 0)[1]:
                self.fault("the log's pipe was not full")
            os.close(writer)
        finally:
            loop.add_reader(self.reader, self.read_log)

    @contextlib.asynccontextmanager
    async def log_gone(self) -> AsyncIterator[None]:
        """Who read the log has ended; later there is somebody again."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(self.reader)
        os.close(self.reader)
        try:
            yield
        finally:
            self.reader = os.open(self.fifo, os.O_RDONLY | os.O_NONBLOCK)
            loop.add_reader(self.reader, self.read_log)

    async def break_things(self, end_s: float) -> None:
        """One thing after the other, each for a third of its period; each once at least."""
        await asyncio.sleep(self.every_s)
        breakages = self.breakages()
        for n, breakage in enumerate(itertools.cycle(breakages)):
            if n >= len(breakages) and time.monotonic() + self.every_s > end_s:
                return
            period = Period(breakage.__name__.replace("_", " "), time.monotonic())
            self.periods.append(period)
            async with breakage():
                await asyncio.sleep(self.every_s / 3)
            period.healed_s = time.monotonic()
            left_s = period.begun_s + self.every_s - time.monotonic()
            await asyncio.sleep(max(left_s, self.every_s / 2))

    # -- What is looked at ----------------------------------------------------

    async def look(self) -> None:
        """Take samples of processes, and the keys that are public now."""
        link = self.link(observed=False)
        for n in itertools.count():
            if n % 2 == 0:
                self.sample()
            begun_s = time.time()
            reply = await link.ask("GET", "/.well-known/jwks.json")
            if reply.status == 200:
                self.documents.append((begun_s, reply.body))
            self.check_proofs()
            await asyncio.sleep(0.5)

    def sample(self) -> None:
        """What the main process, its workers and its store hold."""
        with contextlib.suppress(psutil.Error, ValueError):
            workers = workers_of(self.gate)
            parts = {"main": [psutil.Process(self.gate.process.pid)], "workers": workers}
            parts["store"] = [self.store()]
            for name, those in parts.items():
                sizes = [
                    (p.memory_info().rss, p.num_fds(), p.num_threads())
                    for p in those
                    if name != "workers" or time.time() - p.create_time() > 5
                ]
                if sizes:
                    most = (max(size[n] for size in sizes) for n in range(3))
                    self.samples[name].append((time.monotonic(), *most))

    def check_growth(self) -> None:
        """Memory and descriptors in the last quarter are those of the second one."""
        for name, samples in self.samples.items():
            quarter = len(samples) // 4
            early, late = samples[quarter : 2 * quarter], samples[3 * quarter :]
            memory, files = (
                [sorted(s[n] for s in those)[len(those) // 2] for those in (early, late)]
                for n in (1, 2)
            )
            if memory[1] > 1.25 * memory[0] + (16 << 20):
                self.fault(f"memory of {name} grows: {memory} bytes")
            # A worker keeps 64 connections to a provider, of four descriptors each, and when the
            # other one is killed all clients come to it.
            if files[1] > files[0] + 100 or files[1] > 400:
                self.fault(f"files of {name} grow: {files}")

    def check_proofs(self) -> None:
        """Every proof verifies, for a site that keeps the public keys as long as it is told to.

        Those that are left wait for a document of public keys that such a site may have had then.
        """
        keep_s = self.overlap_s // 2  # what Cache-Control says
        while self.proofs and self.documents:
            proof = self.proofs[0]
            if self.documents[0][0] < proof.at_s - keep_s:
                self.documents.popleft()
                continue
            self.proofs.popleft()
            self.verified += 1
            try:
                if self.number_of(proof, self.documents[0][1]) != proof.number:
                    self.fault(f"a {proof.form} is about another number")
            except gateway.InvalidToken as error:
                at_s = proof.at_s - self.started_s
                self.fault(f"a {proof.form} does not verify: {error} (issued at {at_s:.0f} s)")

    def number_of(self, proof: Proof, jwks: gateway.Json) -> str:
        """The number that a site takes from a proof."""
        now_s, url = proof.at_s + proof.ahead_s, self.gate.url
        if proof.form == "BrowserID":
            now_ms, host = int(now_s * 1000), url.partition("//")[2]
            backed = f"{proof.token}~{gateway.make_assertion(proof.key, SITE, now_ms + 60_000)}"
            told = gateway.verify_backed_assertion(backed, SITE, host, self.browserid, now_ms)
            return str(told["verifiedMSISDN"])
        if proof.form == "SD-JWT":
            shown = lab.present(proof.token, proof.key, SITE, "n", now_s)
            told = gateway.verify_presentation(shown, jwks, url, SITE, "n", now_s)
        else:
            told = gateway.verify_proof(proof.token, jwks, url, now_s, SITE)
        return str(told["phone_number"])

    async def check_users(self) -> None:
        """Whoever was verified still is; whoever is gone stays so."""
        room = asyncio.Semaphore(8)

        async def one(session: Session) -> None:
            async with room:
                for _ in range(5):
                    if not (await self.sign(session)).unknown:
                        break
                else:
                    self.fault("a session got no answer at the end")
                session.link.close()

        await asyncio.gather(
            *map(one, [*self.kept, *random.sample(self.gone, len(self.gone) // 4)])
        )

    def check_log(self) -> None:
        """It tells no secret, and of nothing unforeseen."""
        text = self.log.decode("utf-8", "replace")
        for word in ("Traceback", "unforeseen", "+4477009", PATH_SECRET):
            if word in text:
                at = text.index(word)
                self.fault(f"the log has {word}: {text[max(0, at - 300) : at + 1500]}")
        codes = {c for texts in self.provider.phones.values() for c in map(code_in, texts)}
        long_ones = {code for code in codes if len(code) == 32}
        if long_ones & set(re.findall(r"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])", text)):
            self.fault("the log has a code")

    async def main(self) -> None:
        """The whole run."""
        async with self.running():
            self.started_s, begun_s = time.time(), time.monotonic()
            browserid = await self.link(observed=False).ask("GET", "/.well-known/browserid")
            self.browserid = gateway.parse_public_key(browserid.body["public-key"])
            looking = asyncio.create_task(self.look())
            crowd = [asyncio.create_task(self.live(n)) for n in range(self.clients)]
            await self.break_things(begun_s + self.seconds)
            self.ending = True
            await asyncio.wait_for(asyncio.gather(*crowd), 120)
            self.periods.append(Period("nothing, at the end"))
            await self.check_users()
            await asyncio.sleep(2)  # until public keys were asked for once more
            looking.cancel()
            self.check_growth()
            self.read_log()
            for link in self.links:
                link.close()
        self.check_log()
        if self.proofs:
            self.fault(f"{len(self.proofs)} proofs were never verified")

    def table(self) -> str:
        """Breakage → requests, answers by status, longest answer, time until well."""
        rows = [
            "| what was broken | times | requests | answers | longest, s | without sends, s | "
            "well again after, s |",
            "|---|--:|--:|---|--:|--:|--:|",
        ]
        for name in dict.fromkeys(period.name for period in self.periods):
            those = [period for period in self.periods if period.name == name]
            outcomes = sum((p.outcomes for p in those), Counter[str]())
            told = ", ".join(f"{n}× {outcome}" for outcome, n in outcomes.most_common())
            times_s = [
                max(getattr(period, field) for period in those)
                for field in ("longest_s", "longest_other_s", "well_s")
            ]
            cells = [name, len(those), outcomes.total(), told, *(f"{s:.2f}" for s in times_s)]
            rows.append(f"| {' | '.join(map(str, cells))} |")
        sizes = [
            f"{name} {samples[len(samples) // 4][1] >> 20} → {samples[-1][1] >> 20} MB, "
            f"{samples[len(samples) // 4][2]} → {samples[-1][2]} files"
            for name, samples in self.samples.items()
        ]
        numbers = sum(self.provider.asked.values())
        return "\n".join([
            *rows,
            f"{self.done.total()} flows {dict(self.done)}; {numbers} messages, "
            f"{sum(self.guesses.values())} wrong guesses; {self.verified} proofs verified; "
            f"{len(self.kept)} users kept; {'; '.join(sizes)}; "
            f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores",
        ])  # fmt: skip


def run(
    folder: Path, seconds: float, every_s: float, clients: int = CLIENTS,
    options: Sequence[str] = (), only: str = "",
) -> Soak:  # fmt: skip
    """Run it; what was wrong is in its ``faults``.

    Args:
        every_s: How often something breaks.
        options: More of the gateway's.
        only: What breaks has this in its name.
    """
    soak = Soak(folder, seconds, every_s, clients, options)
    soak.only = only
    asyncio.run(soak.main())
    return soak


def main() -> int:
    """Run it, print a table in Markdown, and what was wrong; 1 if anything was."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--every", type=float, default=15, help="seconds between breakages")
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--only", default="", help="what breaks: disk_full, store_killed, …")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak") as folder:
        size = given.seconds, given.every, given.clients
        soak = run(Path(folder), *size, only=given.only)
    print(soak.table())
    for fault, times in soak.faults.most_common():
        print(f"FAULT, {times} times: {fault}")
    return int(bool(soak.faults))


if __name__ == "__main__":
    sys.exit(main())
