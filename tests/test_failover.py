"""kill -9 under load: embedded store, a primary of a cluster, that of a Sentinel group.

And a store that stays away, or full: what goes on meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lab
import provider
import pytest
import redis
from servers import Cluster, SentinelGroup, wait_for
from support import GatewayProcess, halt, shared

import gateway

KEY = gateway.generate_key("RS128")


class Loop(threading.Thread):
    """A client that verifies numbers, one after the other, and keeps a book of it.

    Attributes:
        verified: The sessions of which the gateway said that they are verified.
        answers: Time and status of every answer; how long each took.
        slow: How long those took that took too long. What became of a message is written for
            SETTLE_S; all else is answered within a second.
    """

    def __init__(self, running: GatewayProcess, number: int) -> None:
        super().__init__(daemon=True)
        self.client, self.number, self.stopping = running.client(), number, threading.Event()
        self.verified: list[gateway.Credentials] = []
        self.answers: list[tuple[float, int, float]] = []
        self.slow: list[float] = []
        self.wrong: list[Any] = []

    def run(self) -> None:
        client, turn = self.client, 0
        while not self.stopping.is_set():
            turn += 1
            msisdn = f"+4477009{self.number:02}{turn % 1000:03}"
            steps = (
                (1, lambda: client.register()),
                (gateway.SETTLE_S + 1.5, lambda m=msisdn: client.verify(m)),
                (1, lambda m=msisdn: client.verify_code(lab.Handset(client, m).code())),
            )
            if all(self._done(*step) for step in steps) and client.credentials:
                self.verified.append(client.credentials)

    def _done(self, most_s: float, step: Callable[[], lab.Reply]) -> bool:
        started = time.monotonic()
        reply = step()
        now = time.monotonic()
        self.answers.append((now, reply.status, now - started))
        if now - started >= most_s * shared():
            self.slow.append(now - started)
        if reply.status == 503 and reply.body["errno"] == 201 and reply.headers["Retry-After"]:
            self.stopping.wait(0.02)
        elif reply.status != 200:
            self.wrong.append(reply)
        return reply.status == 200


@contextlib.contextmanager
def load(running: GatewayProcess, clients: int = 4) -> Iterator[list[Loop]]:
    loops = [Loop(running, number) for number in range(clients)]
    for loop in loops:
        loop.start()
    try:
        yield loops
    finally:
        for loop in loops:
            loop.stopping.set()
        for loop in loops:
            loop.join(10)


def done(loops: list[Loop]) -> int:
    return sum(len(loop.verified) for loop in loops)


def survives(running: GatewayProcess, kill: Callable[[], Any]) -> None:
    """Kill under load; then all is well within 5 s, and nobody who was verified is lost."""
    with load(running) as loops:
        wait_for(lambda: done(loops) >= 40, "40 verified users")
        kill()
        killed = time.monotonic()

        def quiet() -> bool:
            """A second without an error, in which everybody went on."""
            since = time.monotonic() - 1
            recent = [[s for at, s, _ in loop.answers[-500:] if at > since] for loop in loops]
            return since > killed and all(len(r) > 5 / shared() and 503 not in r for r in recent)

        wait_for(quiet, "its recovery", 20 * shared())
    answers = sorted(answer for loop in loops for answer in loop.answers)
    assert [reply for loop in loops for reply in loop.wrong] == []
    assert {status for _, status, _ in answers} <= {200, 503}
    failed = [at for at, status, _ in answers if status == 503]
    assert max(failed, default=killed) - killed < 5 * shared()
    assert [took_s for loop in loops for took_s in loop.slow] == []
    client, lost = running.client(), []
    for loop in loops:
        for client.credentials in loop.verified:
            reply = client.sign(KEY)
            if reply.status != 200:
                lost.append(reply.body)
    back_s = max(failed, default=killed) - killed
    print(f"{done(loops)} verified, {len(failed)} × 503, the last {back_s:.2f} s after the kill")
    assert lost == []


def store_process(running: GatewayProcess) -> Any:
    return next(p for p in running.family() if "valkey-server" in p.name())


def test_the_embedded_store_is_killed(start_gateway: Callable[..., GatewayProcess]) -> None:
    running = start_gateway()
    survives(running, lambda: store_process(running).kill())


def test_the_primary_of_a_cluster_is_killed(
    tmp_path: Path, start_gateway: Callable[..., GatewayProcess]
) -> None:
    with contextlib.closing(Cluster(tmp_path / "c")) as cluster:
        running = start_gateway("--storage-url", cluster.url, "--workers", "2")
        survives(running, lambda: cluster.primary().kill())


def test_the_primary_of_a_sentinel_group_is_killed(
    tmp_path: Path, start_gateway: Callable[..., GatewayProcess]
) -> None:
    with contextlib.closing(SentinelGroup(tmp_path / "g")) as group:
        running = start_gateway("--storage-url", group.url)
        survives(running, lambda: group.primary().kill())


# -- It stays away, or full -------------------------------------------------------


def timed(step: Callable[[], lab.Reply]) -> lab.Reply:
    """Its answer, which comes within a second; a 503 is errno 201 and says when to come again."""
    started_s = time.monotonic()
    reply = step()
    assert time.monotonic() - started_s < 1 * shared()
    if reply.status == 503:
        assert reply.body["errno"] == 201
        assert reply.body["retryAfter"] == int(reply.headers["Retry-After"]) > 0
    return reply


class People:
    """Sessions that wait for the code that they were sent, and as many that asked for nothing."""

    def __init__(
        self,
        running: GatewayProcess,
        sms: provider.Provider,
        count: int,
        numbers: Sequence[str] = (),
    ) -> None:
        numbers = numbers or [f"+4477009{n:05}" for n in range(count)]
        self.sms, self.waiting = sms, {number: running.client() for number in numbers}
        self.fresh = {f"+4477008{n:05}": running.client() for n in range(count)}
        for client in (*self.waiting.values(), *self.fresh.values()):
            assert client.register().status == 200
        for number, client in self.waiting.items():
            assert client.verify(number).status == 200

    def send(self) -> list[int]:
        """Have all send that have not; gives the statuses."""
        return [timed(lambda: c.verify(n)).status for n, c in self.fresh.items()]  # noqa: B023

    def finish(self) -> list[tuple[int, int]]:
        """Have those that wait return the code and sign; gives the statuses of both."""
        done = []
        for number, client in self.waiting.items():
            code = self.sms.texts()[number][-1].split()[-1]
            verified = timed(lambda: client.verify_code(code))  # noqa: B023
            done.append((verified.status, timed(lambda: client.sign(KEY)).status))  # noqa: B023
        return done


@pytest.fixture
def sms() -> Iterator[provider.Provider]:
    """A provider that takes every message, and counts as paid."""
    with provider.Provider(provider.taken) as stand_in:
        yield stand_in


def fill(store: Any) -> list[str]:
    """Fill a store with keys, smaller and smaller, until not even the smallest fits."""
    names, size = list[str](), 2**20
    while size > 8:
        name = f"filler {time.monotonic_ns()}"
        try:
            store.set(name, bytes(size))
            names.append(name)
        except redis.exceptions.OutOfMemoryError:
            size //= 2
    # A store frees buffers of its own, and what is paid back: it has more than it may by more.
    store.config_set("maxmemory", store.info("memory")["used_memory"] - 2**19)
    return names


def test_the_embedded_store_is_full(
    start_gateway: Callable[..., GatewayProcess], sms: provider.Provider
) -> None:
    """Nothing is sent and nobody registers; who was sent a code verifies it, and signs."""
    running = start_gateway(
        *("--sms-providers", json.dumps([sms.nexmo()]), "--workers", "2"),
        *("--store-max-bytes", str(16 * 2**20)),
    )
    people = People(running, sms, 3)
    url = f"unix://{running.folder}/data/store.sock"
    with contextlib.closing(redis.Redis.from_url(url)) as store:
        fillers = fill(store)
        assert people.send() == [503] * 3
        assert timed(running.client().register).status == 503
        assert len(sms.received) == 3
        assert people.finish() == [(200, 200)] * 3
        assert people.send() == [503] * 3
        store.delete(*fillers)
        assert people.send() == [200] * 3
        assert len(sms.received) == 6


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
def test_the_node_of_the_counters_is_away(
    tmp_path: Path, start_gateway: Callable[..., GatewayProcess], sms: provider.Provider,
    how: signal.Signals,
) -> None:  # fmt: skip
    """A third of a cluster without replicas is gone, and with it the counters and some sessions.

    The sessions of the others verify and sign, if it can be known that nobody ended their number;
    nothing is sent, whoever asks.
    """
    with contextlib.closing(Cluster(tmp_path / "c", replicas=False)) as cluster:
        for node in cluster.nodes:
            node.call("CONFIG", "SET", "cluster-require-full-coverage", "no")
        running = start_gateway(
            *("--sms-providers", json.dumps([sms.nexmo()]), "--workers", "2"),
            *("--storage-url", cluster.url),
        )
        node = cluster.primary(b"{limits}")
        master = (running.folder / "keys/master.secret").read_text()
        secrets = gateway.Secrets.derive(bytes.fromhex(master))
        known = {  # whether the node that would know is alive
            number: cluster.primary(secrets.key_for("ended", gateway.Msisdn(number))) is not node
            for number in (f"+4477009{n:05}" for n in range(64))
        }
        by_known = sorted(known, key=known.__getitem__)
        numbers = [*by_known[:2], *by_known[-10:]]
        people = People(running, sms, 12, numbers)
        halt(node.process.pid) if how is signal.SIGSTOP else node.kill()
        assert set(people.send()) == {503}
        seen = [timed(lambda: c.call("GET", "/session")).status for c in people.waiting.values()]  # noqa: B023
        assert {200} <= set(seen) <= {200, 503}  # with luck nobody is on that node
        for number, status, done in zip(numbers, seen, people.finish(), strict=True):
            # A session that could be read, but did not get to verify its number, signs nothing.
            assert done in ([(status, status)] if known[number] else [(503, 503), (503, 400)])
        assert set(people.send()) == {503}
        assert len(sms.received) == 12
        cluster.heal()
        wait_for(lambda: 200 in people.send(), "a message", 20)
