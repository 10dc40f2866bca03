"""Clients that replay requests signed beforehand, and say what the answers were like.

``wrk`` costs some 10 µs a request and so hardly disturbs a server on the same machine. The
Python client costs several times as much; it stands in where there is no ``wrk``, and it is
the one that can keep a pace.
"""

from __future__ import annotations

import contextlib
import selectors
import shutil
import signal
import socket
import statistics
import subprocess
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

HERE = Path(__file__).resolve().parent
WRK = shutil.which("wrk")
PATIENCE_S = 120
"""After so long without an end, a run has failed."""


@dataclass
class Run:
    """What a client saw.

    Attributes:
        statuses: How often each HTTP status came; -1 counts broken connections.
        seconds: From the first request to the last answer.
        p50_ms, p99_ms: Latency; from when a request was due, if the client kept a pace.
        client_us: CPU of the client, per request.
    """

    seconds: float = 0.0
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    client_us: float = 0.0
    statuses: Counter[int] = field(default_factory=Counter)


Edge = Callable[[], None]
"""Called when the requests begin, and again when all are answered."""


def run_wrk(port: int, requests: list[bytes], connections: int, edge: Edge) -> Run:
    """Replay with wrk: one thread, the next request as soon as an answer is there."""
    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        path = Path(folder, "requests")
        path.write_bytes(b"".join(b"%d\n%b" % (len(r), r) for r in requests))
        command = [
            WRK or "wrk",
            "-t1",
            f"-c{connections}",
            f"-d{PATIENCE_S}s",
            "--timeout",
            f"{PATIENCE_S}s",
        ]
        command += ["-s", str(HERE / "replay.lua"), f"http://127.0.0.1:{port}", "--", str(path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout
        try:
            _expect(process, "ready")
            edge()
            started, cpu_s = time.perf_counter(), _cpu_s(process.pid)
            _expect(process, "done")
            seconds, cpu_s = time.perf_counter() - started, _cpu_s(process.pid) - cpu_s
            edge()
            process.send_signal(signal.SIGINT)
            words = process.stdout.read().splitlines()[-1].split()
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
    told = dict(word.split("=") for word in words)
    p50, p99, broken = (int(told.pop(name)) for name in ("p50", "p99", "broken"))
    statuses = Counter({int(status): int(n) for status, n in told.items()})
    statuses += Counter({-1: broken})
    return Run(seconds, p50 / 1e3, p99 / 1e3, cpu_s / len(requests) * 1e6, statuses)


def _expect(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout
    for line in process.stdout:
        if line.strip() == word:
            return
    raise AssertionError(f"wrk ended (status {process.wait()}) before it was {word}")


def _cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def run_python(
    port: int, requests: list[bytes], connections: int, edge: Edge, rate: float = 0.0
) -> Run:
    """Replay in this process; with a ``rate`` (requests a second), at an even pace."""
    run, latencies = Run(), []
    todo = deque(enumerate(requests))
    busy: dict[socket.socket, tuple[float, bytes]] = {}  # when it was due, what came so far
    with contextlib.ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        idle = [stack.enter_context(_connect(port, selector)) for _ in range(connections)]
        edge()
        cpu_s, started = time.process_time(), time.perf_counter()
        while todo or busy:
            now = time.perf_counter()
            if now - started > PATIENCE_S:
                raise AssertionError("the server does not answer")
            while todo and idle and (not rate or started + todo[0][0] / rate <= now):
                number, request = todo.popleft()
                one = idle.pop()
                busy[one] = (started + number / rate if rate else now, b"")
                with contextlib.suppress(OSError):  # it is broken: receiving will tell
                    one.sendall(request)
            wait_s = started + todo[0][0] / rate - now if rate and todo and idle else 1.0
            for key, _ in selector.select(max(wait_s, 0)):
                one = key.fileobj  # type: ignore[assignment] # we gave it only sockets
                data = b""
                with contextlib.suppress(OSError):
                    data = one.recv(65536)
                due, so_far = busy[one]
                status = _status(so_far + data) if data else -1
                if not status:
                    busy[one] = (due, so_far + data)
                    continue
                del busy[one]
                run.statuses[status] += 1
                latencies.append(time.perf_counter() - due)
                if status == -1:
                    selector.unregister(one)
                    one = stack.enter_context(_connect(port, selector))
                idle.append(one)
        run.seconds = time.perf_counter() - started
        run.client_us = (time.process_time() - cpu_s) / len(requests) * 1e6
        edge()
    cuts = statistics.quantiles([1e3 * s for s in latencies] * 2, n=100)
    run.p50_ms, run.p99_ms = cuts[49], cuts[98]
    return run


def _connect(port: int, selector: selectors.BaseSelector) -> socket.socket:
    one = socket.create_connection(("127.0.0.1", port))
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    selector.register(one, selectors.EVENT_READ)
    return one


def _status(answer: bytes) -> int:
    """The status of a whole answer; 0 while some of it is missing."""
    head, found, body = answer.partition(b"\r\n\r\n")
    length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
    return int(head[9:12]) if found and len(body) >= int(length or 0) else 0


def replay(port: int, requests: list[bytes], connections: int, edge: Edge, client: str) -> Run:
    """Replay as fast as the server answers, with ``wrk`` or in ``python``."""
    chosen = run_wrk if client == "wrk" else run_python
    return chosen(port, requests, connections, edge)
