"""Slow clients beside honest ones, through nginx as the page Install has it: ``make slow``.

The slow ones come from a few addresses, each within the page's limit of connections, and come
again whenever they are cut off. The honest ones come at a fixed rate, each over a connection of
its own: register, verify, verify_code, unregister.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import socket
import ssl
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from load import Link, Place, Provider, Reply
from nginx import Nginx
from support import GatewayProcess, free_port
from test_serving import workers_of

ADDRESSES: Final = [f"127.0.1.{n}" for n in range(1, 5)]
"""Where the slow ones come from."""
DRIP_S: Final = 1.0
"""How long each waits between its bytes."""
KINDS: Final = ("says nothing", "slow head", "slow body", "slow reader", "idle")
"""What a slow client does; "says nothing" does not even begin with TLS."""

_ESTABLISHED: Final = 1
"""The state of a connection, in Linux' ``TCP_INFO``, that nobody has ended."""


@dataclass
class Outcome:
    """What came of a run.

    Attributes:
        flows_s: How long each honest flow took that succeeded, from its first connection on.
        answers_s: How long each of their answers took, the TLS handshake included.
        faults: What honest flows met instead of success.
        cut: How often slow clients were cut off, by kind; ``held`` how many were connected at the
            end.
        files, threads, memory: Of the worker that has most, at most.
    """

    flows_s: list[float] = field(default_factory=list)
    answers_s: list[float] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    cut: Counter[str] = field(default_factory=Counter)
    held: Counter[str] = field(default_factory=Counter)
    files: int = 0
    threads: int = 0
    memory: int = 0

    def line(self) -> str:
        """It all, in a line."""

        def share(times: list[float], of: float) -> str:
            return f"{sorted(times)[int(of * (len(times) - 1))]:.3f} s" if times else "-"

        flows = ", ".join(f"p{int(100 * p)} {share(self.flows_s, p)}" for p in (0.5, 0.95, 0.99, 1))
        answers = ", ".join(f"p{int(100 * p)} {share(self.answers_s, p)}" for p in (0.5, 0.99, 1))
        return (
            f"{len(self.flows_s)} flows ({flows}); answers {answers}; faults {dict(self.faults)}; "
            f"slow: held {dict(self.held)}, cut {dict(self.cut)}; a worker had at most "
            f"{self.files} files, {self.threads} threads, {self.memory >> 20} MB; load average "
            f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
        )


async def _slow(kind: str, place: Place, address: str) -> None:
    """One connection of a slow client, until it is cut off."""
    tls = None if kind == "says nothing" else place.tls
    own = socket.socket()
    own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    own.setblocking(False)
    own.bind((address, 0))
    loop = asyncio.get_running_loop()
    await loop.sock_connect(own, ("127.0.0.1", place.port))
    name = "127.0.0.1" if tls else None
    reader, writer = await asyncio.open_connection(sock=own, ssl=tls, server_hostname=name)
    own = writer.get_extra_info("socket")
    try:
        host = place.url.partition("//")[2]
        head = f"POST /register HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        if kind == "slow body":
            writer.write((head + "Content-Length: 10000\r\n\r\n{").encode())
        elif kind == "slow reader":
            writer.write(f"GET /openapi.json HTTP/1.1\r\nHost: {host}\r\n\r\n".encode() * 40)
            writer.transport.pause_reading()  # type: ignore[attr-defined]
        elif kind == "idle":
            writer.write(f"GET /__lbheartbeat__ HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        drip = (head + "X-Slow: " + "y" * 9999).encode() if kind == "slow head" else b" " * 9999
        for n in range(len(drip)):
            await asyncio.sleep(DRIP_S * random.uniform(0.5, 1.5))
            if kind.startswith("slow ") and kind != "slow reader":
                writer.write(drip[n : n + 1])
                await writer.drain()
            state = own.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
            if reader.at_eof() or state != _ESTABLISHED:
                return
    finally:
        writer.transport.abort()


async def _keep_slow(
    n: int, place: Place, outcome: Outcome, end_s: float, held: dict[int, str]
) -> None:
    kind = KINDS[n % len(KINDS)]
    while time.monotonic() < end_s:
        held[n] = kind
        with contextlib.suppress(OSError, ssl.SSLError, TimeoutError):
            async with asyncio.timeout(max(0.1, end_s - time.monotonic())):
                await _slow(kind, place, ADDRESSES[n % len(ADDRESSES)])
        if time.monotonic() < end_s:
            held.pop(n, None)
            outcome.cut[kind] += 1
            await asyncio.sleep(0.2)


async def _flow(place: Place, provider: Provider, number: str, outcome: Outcome) -> None:
    begun_s, replies = time.monotonic(), list[Reply]()
    link = Link(place, lambda method, path, reply: replies.append(reply))
    try:
        await link.register()
        assert replies[-1].status == 200
        await link.ask("POST", "/sms/verify", {"msisdn": number})
        assert replies[-1].status == 200
        await link.ask("POST", "/sms/verify_code", {"code": provider.code(number)})
        assert replies[-1].status == 200
        await link.ask("POST", "/unregister")
        assert replies[-1].status == 204
        outcome.flows_s.append(time.monotonic() - begun_s)
    except AssertionError:
        outcome.faults[f"request {len(replies)}: {replies[-1].outcome}"] += 1
    finally:
        outcome.answers_s += [reply.took_s for reply in replies]
        link.close()


async def _beside(
    place: Place, provider: Provider, outcome: Outcome, size: tuple[int, float, float],
    watch: Callable[[], None],
) -> None:  # fmt: skip
    slow, seconds, rate = size
    end_s, held = time.monotonic() + seconds, dict[int, str]()
    crowd = [asyncio.create_task(_keep_slow(n, place, outcome, end_s, held)) for n in range(slow)]
    flows = []
    begun_s = time.monotonic() + min(3.0, seconds / 4)  # first they come
    for n in itertools.count():
        if (at_s := begun_s + n / rate) > end_s - 0.5:
            break
        await asyncio.sleep(at_s - time.monotonic())
        number = f"+4477009{10_000 + n:05}"
        flows.append(asyncio.create_task(_flow(place, provider, number, outcome)))
        if n % round(2 * rate) == 0:
            watch()
    outcome.held = Counter(held.values())
    await asyncio.gather(*flows, *crowd)


def run(
    folder: Path, slow: int = 200, seconds: float = 60, rate: float = 20, by_nginx: bool = True
) -> Outcome:
    """Start a gateway and nginx, and have them come.

    Args:
        slow: How many slow clients there are.
        rate: Honest flows in a second.
        by_nginx: Else they come to the gateway itself.
    """
    outcome = Outcome()

    async def main() -> None:
        provider, port = Provider(), free_port()
        await provider.start()
        public_url = f"https://127.0.0.1:{port}"
        options = ["--workers", "2", "--sms-providers", json.dumps([provider.entry])]
        options += ["--sends-per-hour", "1000000"]
        if by_nginx:
            options += ["--public-url", public_url, "--trusted-proxies", '["127.0.0.1"]']
        gate = await asyncio.to_thread(GatewayProcess, folder, *options)
        workers = workers_of(gate)

        def watch() -> None:
            outcome.files = max(outcome.files, *(worker.num_fds() for worker in workers))
            outcome.threads = max(outcome.threads, *(worker.num_threads() for worker in workers))
            memory = (worker.memory_info().rss for worker in workers)
            outcome.memory = max(outcome.memory, *memory)

        try:
            with contextlib.ExitStack() as stack:
                place = Place(gate.port, gate.url)
                if by_nginx:
                    nginx = stack.enter_context(Nginx(folder / "nginx", gate.port, port))
                    tls = ssl.create_default_context(cafile=nginx.certificate)
                    place = Place(port, public_url, tls)
                await _beside(place, provider, outcome, (slow, seconds, rate), watch)
            assert workers_of(gate) == workers
            assert "Traceback" not in gate.output
        finally:
            gate.close()
            provider.stop()

    asyncio.run(main())
    return outcome


def main() -> int:
    """Run it once, and print what came of it; 1 if an honest flow failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slow", type=int, default=200, help="slow clients")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--rate", type=float, default=20, help="honest flows in a second")
    parser.add_argument("--direct", action="store_true", help="without nginx")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="slow") as folder:
        size = given.slow, given.seconds, given.rate
        outcome = run(Path(folder), *size, by_nginx=not given.direct)
    print(outcome.line())
    return int(bool(outcome.faults))


if __name__ == "__main__":
    sys.exit(main())
