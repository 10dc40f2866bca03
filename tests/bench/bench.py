"""What a request costs: ``make bench``, or ``python tests/bench/bench.py --help``.

Starts real gateways, writes users into their store, replays requests that were signed
beforehand, and reports for each endpoint the CPU of the server's processes per request. All
that is compared is measured in the same rounds, one after another, because the CPU time of
the same work differs by a half between a quiet and a busy machine:

    T   GET / of the gateway, one worker, the shipped number of threads: the mean of a round, in
        which it is measured before every other row
    B   a bare Bottle route on the same server
    R   one RS256 signature          \\  in that route, under the same load: the CPU of a route that
    P   one POST by a pooled urllib3 /  does it, less B; and as "R alone", "P alone" the CPU of this
    S   one GET of the store            process, which does nothing else, as is S

Endpoints are measured twice: one request at a time, which is how most gateways are asked, and 16 at
a time, when a thread finds the next request before it falls asleep. Then all cost less, and T,
which is little else than waking up, the most: multiples of T are of use only within one table.

Prints tables; ``--out FOLDER`` also writes all of it as ``bench.json``, and ``bench.svg``.
Where the gateways keep their data, ``TMPDIR`` decides.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import hmac
import json
import os
import platform
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent / "notebooks")]

import bare  # noqa: E402
import clients  # noqa: E402
import psutil  # noqa: E402
from support import GatewayProcess, free_port  # noqa: E402

import gateway  # noqa: E402

NUMBER = gateway.Msisdn("+447700900123")
CODE = "146193"
CONNECTIONS = 16
CLIENT_KEY = json.dumps(gateway.public_key_json(gateway.generate_key("RS256").public_key()))


# -- Users and their requests -------------------------------------------------


class Credential(NamedTuple):
    """A session's credentials, and where it is stored."""

    hawk_id: gateway.HawkId
    hawk_key: gateway.HawkKey
    storage_id: gateway.StorageId


class World:
    """A running gateway: its users are written into its store, and sign their requests here."""

    def __init__(self, folder: Path, *options: str) -> None:
        folder.mkdir()
        # Requests are signed long before they are sent, and many are sent in a session's name.
        options = ("--hawk-skew-s", "3600", "--sends-per-hour", "1000000", *options)
        self.process = GatewayProcess(folder, *options)
        self.port, self.folder = self.process.port, folder
        master = (folder / "keys" / "master.secret").read_text()
        self.secrets = gateway.Secrets.derive(bytes.fromhex(master))
        self.store = socket.socket(socket.AF_UNIX)
        self.store.connect(str(folder / "data" / "store.sock"))

    def close(self) -> None:
        """Stop it."""
        self.store.close()
        self.process.close()

    def cpu_s(self) -> tuple[float, float]:
        """CPU that the gateway's own processes, and its store, have used so far."""
        used = {True: 0.0, False: 0.0}
        for process in self.process.family():
            times = process.cpu_times()
            used[process.name().startswith("valkey")] += times.user + times.system
        return used[False], used[True]

    def memory_mb(self) -> dict[str, float]:
        """Resident memory, and what of it is shared with nobody: main, a worker, store."""
        main, *others = self.process.family()
        store = [p for p in others if p.name().startswith("valkey")]
        worker = max((p for p in others if p not in store), key=lambda p: p.memory_info().rss)
        found = {}
        for name, process in (("main", main), ("worker", worker), ("store", store[0])):
            found[name + " resident"] = process.memory_info().rss / 1e6
            found[name + " own"] = process.memory_full_info().uss / 1e6
        return found

    # -- The store

    def command(self, *words: bytes) -> bytes:
        """One command to the store, and its short answer."""
        self.store.sendall(_resp(*words))
        return self.store.recv(4096)

    def info(self, section: str) -> dict[str, str]:
        """What the store tells about itself."""
        lines = self.command(b"INFO", section.encode()).decode().splitlines()
        return dict(line.split(":", 1) for line in lines if ":" in line)

    def clear_outbox(self) -> None:
        """Put the outbox aside. (Deleted, ext4 would be slow to hand out inodes for a while.)"""
        outbox = self.folder / "data" / "outbox"
        if outbox.exists():
            outbox.rename(self.folder / f"outbox-{time.time_ns()}")

    def reset(self, users: int = 1000) -> None:
        """Empty store and outbox, and write ``users`` others who stand around."""
        self.command(b"FLUSHALL", b"SYNC")
        self.clear_outbox()
        for start in range(0, users, 50_000):
            ids = [secrets.token_bytes(16) for _ in range(min(50_000, users - start))]
            record = self._user(verified=True)
            self.write({one: record(secrets.token_bytes(32), "") for one in ids})
        while self.info("persistence")["aof_rewrite_in_progress"] == "1":
            time.sleep(0.1)

    def write(self, records: dict[bytes, bytes]) -> None:
        """Write records as /register does."""
        for part in _slices(list(records.items()), 1000):
            self.store.sendall(b"".join(_resp(b"SET", *pair, b"EX", b"86400") for pair in part))
            missing = len(b"+OK\r\n") * len(part)
            while missing > 0:
                missing -= len(self.store.recv(65536))

    # -- Sessions

    def sessions(self, count: int, state: str = "new") -> list[Credential]:
        """Open ``count`` sessions that are ``new``, ``pending`` or ``verified``."""
        found, records = [], {}
        record = self._user(state == "pending", state == "verified")
        for _ in range(count):
            hawk_id, key = gateway.HawkId(secrets.token_hex(32)), secrets.token_bytes(32)
            one = Credential(hawk_id, gateway.HawkKey(key), self.secrets.id_for(hawk_id))
            records[bytes(one.storage_id)] = record(key, hawk_id, one.storage_id)
            found.append(one)
        self.write(records)
        return found

    def _user(self, pending: bool = False, verified: bool = False) -> Callable[..., bytes]:
        now_s = int(time.time())

        def record(key: bytes, hawk_id: str, storage_id: bytes = b"") -> bytes:
            if hawk_id:
                key = gateway.mask_hawk_key(self.secrets.mask, gateway.HawkId(hawk_id), key)
            if not (pending or verified):
                return gateway.User(key, masked=True).pack()
            fields: dict[str, Any] = {"sealed": secrets.token_bytes(24)}
            if hawk_id:
                sealed = gateway.seal_msisdn(self.secrets.seal, gateway.HawkId(hawk_id), NUMBER)
                fields["sealed"] = sealed
            if pending:
                id_ = gateway.StorageId(storage_id)
                fields["code_digest"] = gateway.code_digest(self.secrets.code, id_, CODE)
                fields["code_expires_s"] = now_s + 3600
            fields |= {"sends": 1, "asked_s": now_s, "verified_s": now_s if verified else 0}
            network = gateway.Network("234", "15")
            return gateway.User(key, network=network, masked=True, **fields).pack()

        return record

    # -- Requests

    def request(self, path: str, body: str = "", authorization: str = "") -> bytes:
        """One HTTP request."""
        method = "GET" if path in ("/", "/sign", "/post") else "POST"
        lines = [f"{method} {path} HTTP/1.1", f"Host: 127.0.0.1:{self.port}"]
        if authorization:
            lines.append(f"Authorization: {authorization}")
        if body:
            lines += ["Content-Type: application/json"]
        if method == "POST":
            lines.append(f"Content-Length: {len(body)}")
        return ("\r\n".join(lines) + "\r\n\r\n" + body).encode()

    def signed(self, one: Credential, path: str, body: str = "", wrong: bool = False) -> bytes:
        """One signed request; ``wrong``, with another MAC. By hand, to be quick."""
        kind = "application/json" if body else ""
        hashed = _b64(hashlib.sha256(f"hawk.1.payload\n{kind}\n{body}\n".encode()).digest())
        ts, nonce = int(time.time()), secrets.token_urlsafe(6)
        text = f"hawk.1.header\n{ts}\n{nonce}\nPOST\n{path}\n127.0.0.1\n{self.port}\n{hashed}\n\n"
        mac = _b64(hmac.digest(one.hawk_key.hex().encode(), text.encode(), "sha256"))
        if wrong:
            mac = mac[::-1][1:] + "="
        header = (
            f'Hawk id="{one.hawk_id}", ts="{ts}", nonce="{nonce}", hash="{hashed}", mac="{mac}"'
        )
        return self.request(path, body, header)


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _resp(*words: bytes) -> bytes:
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(w), w) for w in words)


def _slices(things: list[Any], size: int) -> Iterator[list[Any]]:
    return (things[i : i + size] for i in range(0, len(things), size))


# -- What is measured ---------------------------------------------------------


class Workload(NamedTuple):
    """One row: requests to make, the status that they must have, and what they may cost.

    Attributes:
        limit: Multiples of T, and what is added: "7", "7 + P".
        state: Of the sessions that sign; empty where nobody does.
        server: Which of the servers it is replayed to.
        times: How many requests as a multiple of the others'; short ones need more.
    """

    name: str
    path: str
    status: int
    limit: str = ""
    body: str = ""
    state: str = ""
    server: str = "gateway"
    times: int = 1
    wrong: bool = False

    def requests(self, world: World, count: int) -> list[bytes]:
        """``count`` requests, and the sessions that they need."""
        if not self.state:
            return [world.request(self.path, self.body)] * count
        users = world.sessions(count, self.state)
        return [world.signed(user, self.path, self.body, self.wrong) for user in users]


WHO = f'{{"msisdn": "{NUMBER}", "mcc": "234", "mnc": "15"}}'
KEY = f'{{"publicKey": {CLIENT_KEY}, "duration": 3600}}'
WORKLOADS = (
    Workload("GET /", "/", 200, times=2),
    Workload("bare route", "/", 200, server="bare", times=3),
    Workload("bare route + R", "/sign", 200, server="bare"),
    Workload("bare route + P", "/post", 200, server="bare"),
    Workload("/discover", "/discover", 200, "2.5", '{"mcc": "234", "mnc": "15"}', times=2),
    Workload("/discover, with a number", "/discover", 200, "2.5", WHO, times=2),
    Workload("/register", "/register", 200, "4"),
    Workload("/register, with a number", "/register", 200, "", WHO),
    Workload("/sms/mt/verify, outbox", "/sms/mt/verify", 204, "7", WHO, "new"),
    Workload("/sms/mt/verify, HTTP", "/sms/mt/verify", 204, "7 + P", WHO, "new", "paying"),
    Workload("/sms/verify_code", "/sms/verify_code", 200, "5", f'{{"code": "{CODE}"}}', "pending"),
    Workload("/certificate/sign", "/certificate/sign", 200, "5 + R", KEY, "verified"),
    Workload("/unregister", "/unregister", 204, "5", "", "verified"),
    Workload("refused signature", "/sms/verify_code", 401, "3.5", f'{{"code": "{CODE}"}}',
             "pending", times=2, wrong=True),
)  # fmt: skip


def workload(name: str) -> Workload:
    """One of ``WORKLOADS``."""
    return next(one for one in WORKLOADS if one.name == name)


@dataclass
class Row:
    """One workload, measured in several rounds."""

    name: str
    limit: str = ""
    server_us: list[float] = field(default_factory=list)
    store_us: list[float] = field(default_factory=list)
    runs: list[clients.Run] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    errors: int = 0

    def add(self, server_us: float, store_us: float, run: clients.Run, good: int) -> None:
        """One more round, with ``good`` the status that was expected."""
        total = sum(run.statuses.values())
        self.server_us.append(max(server_us, 0.1))  # the kernel counts in 10 ms
        self.store_us.append(store_us)
        self.runs.append(run)
        self.rates.append(total / run.seconds)
        self.errors += total - run.statuses[good]

    def median(self, value: Callable[[clients.Run], float]) -> float:
        """The median of something over the rounds."""
        return statistics.median(map(value, self.runs))

    def json(self) -> dict[str, Any]:
        """For people who draw."""
        return {
            "name": self.name,
            "limit": self.limit,
            "server_us": statistics.median(self.server_us),
            "server_us_each": self.server_us,
            "store_us": statistics.median(self.store_us),
            "client_us": self.median(lambda run: run.client_us),
            "requests_per_s": statistics.median(self.rates),
            "p50_ms": self.median(lambda run: run.p50_ms),
            "p99_ms": self.median(lambda run: run.p99_ms),
            "errors": self.errors,
        }


@dataclass
class Bench:
    """The servers of one benchmark, and how they are measured."""

    folder: Path
    client: str
    count: int
    rounds: int
    users: int = 1_000_000
    only: str = ""
    stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    steps: int = 0
    step: int = 0

    def start(self, name: str, *options: str, connections: int = CONNECTIONS) -> World:
        """Start a gateway, and let it start the threads that ``connections`` will need."""
        world = World(self.folder / name, *options)
        self.stack.callback(world.close)
        self.warm_up(world, connections)
        return world

    def say(self, what: str) -> None:
        """Show how far we are."""
        self.step += 1
        left = f"{self.step}/{self.steps} " if self.step <= self.steps else ""
        line = f"  {left}{what}"
        if sys.stderr.isatty():
            print(f"\r{line:78.78}", end="\r", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def measure(
        self, what: Workload, world: World, row: Row, other: Bare | None = None,
        connections: int = CONNECTIONS,
    ) -> None:  # fmt: skip
        """One round of one row, on a gateway or on the ``other`` server."""
        requests = what.requests(world, self.count * what.times)
        edges: list[tuple[float, float]] = []
        server = other or world
        edge = lambda: edges.append(server.cpu_s())  # noqa: E731
        run = clients.replay(server.port, requests, connections, edge, self.client)
        server_us, store_us = ((b - a) / len(requests) * 1e6 for a, b in zip(*edges, strict=True))
        row.add(server_us, store_us, run, what.status)

    def warm_up(self, world: World, connections: int = CONNECTIONS) -> None:
        """Let every thread connect, before anything is counted: Granian starts them as needed."""
        requests = workload("/sms/verify_code").requests(world, min(1000, 10 * self.count))
        clients.run_python(world.port, requests, connections, lambda: None)


# -- The parts of the benchmark -----------------------------------------------

Report = dict[str, Any]


class Bare:
    """The bare routes, or an SMS provider, in a process of their own."""

    def __init__(self, folder: Path, threads: int, provider_url: str = "") -> None:
        self.port = free_port()
        command = [sys.executable, str(HERE / "bare.py"), str(self.port), str(threads)]
        command += [provider_url]
        log_path = folder / f"bare-{self.port}.log"
        with log_path.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port)).close()
                break
            assert self.process.poll() is None, log_path.read_text()
            time.sleep(0.02)

    def cpu_s(self) -> tuple[float, float]:
        """As ``World.cpu_s``; it has no store."""
        main = psutil.Process(self.process.pid)
        times = [p.cpu_times() for p in (main, *main.children(recursive=True))]
        return sum(t.user + t.system for t in times), 0.0

    def close(self) -> None:
        """Stop it."""
        self.process.terminate()
        self.process.wait()


def probe(times: int, call: Callable[[], object]) -> float:
    """CPU µs of this thread for one call."""
    for _ in range(max(times // 10, 1)):
        call()
    started = time.thread_time()
    for _ in range(times):
        call()
    return (time.thread_time() - started) / times * 1e6


def endpoints(bench: Bench, report: Report) -> None:
    """Every endpoint, beside T, B, R, P and S: one request at a time, and 16 at a time."""
    chosen = [w for w in WORKLOADS if w.server == "bare" or w.path == "/" or bench.only in w.name]
    bench.steps = 2 * bench.rounds * 2 * (len(chosen) - 1)
    for key, connections in (("endpoints", 1), ("saturated", CONNECTIONS)):
        rows = [Row(w.name, w.limit) for w in chosen]
        units: dict[str, list[float]] = {}
        for _ in range(bench.rounds):
            # On servers of its own: how threads fall into step is a process's luck.
            with contextlib.ExitStack() as bench.stack:
                for name, value in one_round(bench, chosen, rows, connections).items():
                    units.setdefault(name, []).append(value)
        rows[0].server_us = units["T"]
        report[key] = [row.json() | judged(row, units) for row in rows]
        medians = {name: statistics.median(each) for name, each in units.items()}
        report[key + " units"] = medians
        shown = ", ".join(f"{name} {value:.0f}" for name, value in medians.items())
        show(f"One worker, {connections} at a time. CPU µs: {shown}", report[key])


def one_round(
    bench: Bench, chosen: Sequence[Workload], rows: Sequence[Row], connections: int
) -> dict[str, float]:
    """Measure each row once, and T before each of them; gives the units of this round."""
    threads = gateway.Settings().threads
    provider = Bare(bench.folder, threads)
    bench.stack.callback(provider.close)
    url = f"http://127.0.0.1:{provider.port}/sms/json"
    plain = Bare(bench.folder, threads, url)
    bench.stack.callback(plain.close)
    entry = {"kind": "nexmo", "endpoint": url, "api_key": "key", "api_secret": "secret"}
    paying, start = json.dumps([entry]), partial(bench.start, connections=connections)
    worlds = {
        "gateway": start(f"one{bench.step}"),
        "paying": start(f"paying{bench.step}", "--sms-providers", paying),
    }
    storage = gateway.Storage(f"unix://{worlds['gateway'].folder}/data/store.sock")
    probes: dict[str, Callable[[], object]] = {
        "R alone": bare.sign,
        "P alone": lambda: bare.post(url),
        "S": lambda: storage.get(gateway.StorageId(bytes(16))),
    }
    units = {name: probe(min(bench.count, 1000), call) for name, call in probes.items()}
    (home, home_row), *others = zip(chosen, rows, strict=True)
    for what, row in others:
        bench.say(f"{connections} at a time: {home.name}")
        bench.measure(home, worlds["gateway"], home_row, connections=connections)
        bench.say(f"{connections} at a time: {what.name}")
        world = worlds.get(what.server, worlds["gateway"])
        world.reset()
        other = plain if what.server == "bare" else None
        bench.measure(what, world, row, other, connections)
    bare_us, sign_us, post_us = (row.server_us[-1] for row in rows[1:4])
    units |= {"B": bare_us, "R": sign_us - bare_us, "P": post_us - bare_us}
    return units | {"T": statistics.mean(home_row.server_us[-len(others) :])}


def judged(row: Row, units: dict[str, list[float]]) -> Report:
    """A row in multiples of T, and of its limit; medians over rounds, each with its own T."""
    times, _, plus = row.limit.partition(" + ")
    more = statistics.median(units[plus]) if plus else 0.0
    pairs = zip(row.server_us, units["T"], strict=True)
    ratio = statistics.median((cpu - more) / t for cpu, t in pairs)
    return {"in_T": ratio, "holds": ratio <= float(times) if times else None}


def compare(
    bench: Bench, worlds: dict[str, World], whats: Sequence[Workload], connections: Sequence[int]
) -> list[Report]:
    """The same workloads on several gateways or over several connections, interleaved."""
    found = {(w.name, name, c): Row(w.name) for w in whats for name in worlds for c in connections}
    bench.steps = bench.rounds * len(found)
    for number in range(bench.rounds):
        for what in whats:
            for name, world in worlds.items():
                for c in connections:
                    bench.say(f"round {number + 1}: {what.name}, {name}, {c} connections")
                    world.clear_outbox()
                    bench.measure(what, world, found[what.name, name, c], connections=c)
    rows = []
    for (what_name, name, c), row in found.items():
        first = found[what_name, next(iter(worlds)), connections[0]]
        pairs = zip(row.server_us, first.server_us, strict=True)
        rates = zip(row.rates, first.rates, strict=True)
        label = f"{what_name}, {name}" if len(worlds) > 1 else f"{what_name}, {c}"
        more = {"times_first": statistics.median(a / b for a, b in pairs),
                "rate_times_first": statistics.median(a / b for a, b in rates)}  # fmt: skip
        rows.append(row.json() | more | {"name": label})
    return rows


GATEWAY_ROWS = [w for w in WORKLOADS if w.server == "gateway"]


def users(bench: Bench, report: Report) -> None:
    """Every endpoint with 1,000 and with 1,000,000 users in the store."""
    worlds = {f"{n:,}": bench.start(f"users{n}") for n in (1000, bench.users)}
    memory = []
    for world, n in zip(worlds.values(), (1000, bench.users), strict=True):
        bench.say(f"writing {n:,} users")
        before = int(world.info("memory")["used_memory"])
        world.reset(n)
        memory.append((int(world.info("memory")["used_memory"]) - before) / n)
    report["store_bytes_per_verified_user"] = memory[-1]
    report["users"] = compare(bench, worlds, GATEWAY_ROWS, [CONNECTIONS])
    show(f"Users in the store ({memory[-1]:.0f} bytes each)", report["users"])


def connections(bench: Bench, report: Report) -> None:
    """From 1 to 256 connections."""
    whats, world = [workload("GET /"), workload("/sms/verify_code")], bench.start("connections")
    report["connections"] = compare(bench, {"": world}, whats, [1, 4, 16, 64, 256])
    show("Connections", report["connections"])


def workers(bench: Bench, report: Report) -> None:
    """One worker and two."""
    worlds = {f"{n} workers": bench.start(f"workers{n}", "--workers", str(n)) for n in (1, 2)}
    for world in worlds.values():
        world.reset()
    report["workers"] = compare(bench, worlds, GATEWAY_ROWS, [CONNECTIONS])
    for row in report["workers"]:
        used = row["server_us"] + row["store_us"] + row["client_us"]
        row["client_share"] = row["client_us"] / used
        row["cores_used"] = used * row["requests_per_s"] / 1e6
    show("Workers", report["workers"])


def latency(bench: Bench, report: Report) -> None:
    """Latency at half of what saturates it; then 100,000 requests of all kinds."""
    world, rows = bench.start("latency"), []
    names = ["/register", "/sms/mt/verify, outbox", "/sms/verify_code", "/certificate/sign"]
    bench.steps = 2 * len(names) * bench.rounds + 1
    for name in names:
        full, half = Row(name), Row(name + ", half")
        for number in range(bench.rounds):
            for row in (full, half):
                bench.say(f"round {number + 1}: {row.name}")
                world.reset()
                if row is full:
                    bench.measure(workload(name), world, row)
                    continue
                requests = workload(name).requests(world, bench.count)
                rate = full.rates[-1] / 2
                run = clients.run_python(world.port, requests, 64, lambda: None, rate)
                row.add(0.0, 0.0, run, workload(name).status)
        rows += [full.json(), half.json()]
    report["latency"] = rows
    show("At half of the saturation rate (latency from when a request was due)", rows)
    bench.say("100,000 requests")
    world.reset()
    each = min(100_000, 100 * bench.count) // len(GATEWAY_ROWS)
    parts = [what.requests(world, each) for what in GATEWAY_ROWS]
    mixed = [request for several in zip(*parts, strict=True) for request in several]
    run = clients.replay(world.port, mixed, CONNECTIONS, lambda: None, bench.client)
    due = Counter({what.status: 0 for what in GATEWAY_ROWS})
    for what in GATEWAY_ROWS:
        due[what.status] += each
    wrong = sum(((run.statuses - due) + (due - run.statuses)).values())
    rate = len(mixed) / run.seconds
    report["mixed"] = {"requests": len(mixed), "wrong": wrong, "requests_per_s": rate,
                       "p50_ms": run.p50_ms, "p99_ms": run.p99_ms}  # fmt: skip
    print(f"{len(mixed):,} requests of all kinds: {wrong} not as expected, {rate:.0f}/s, "
          f"p50 {run.p50_ms:.1f} ms, p99 {run.p99_ms:.1f} ms\n")  # fmt: skip


def start(bench: Bench, report: Report) -> None:
    """How long a start takes, and what memory a gateway has."""
    timed = "import time; a = time.perf_counter(); import gateway; print(time.perf_counter() - a)"
    imports, ready, memory = [], [], {}
    compiled = {**os.environ, "PYTHONPYCACHEPREFIX": str(bench.folder / "compiled")}
    compiled.pop("PYTHONDONTWRITEBYTECODE", None)
    bench.steps = bench.rounds
    for number in range(bench.rounds):
        bench.say(f"round {number + 1}: start")
        for _ in range(1 if number else 2):  # the first time all ever, it is compiled, too
            run = subprocess.run([sys.executable, "-c", timed], cwd=HERE.parent.parent,
                                 env=compiled, capture_output=True, check=True)  # fmt: skip
        imports.append(float(run.stdout) * 1e3)
        began = time.perf_counter()
        world = World(bench.folder / f"start{number}" if number else bench.folder / "start")
        ready.append((time.perf_counter() - began) * 1e3)
        if number == 0:
            bench.warm_up(world)
            memory = world.memory_mb()
        world.close()
    report["start"] = {"import_ms": statistics.median(imports), "memory_mb": memory,
                       "ready_ms": statistics.median(ready), "ready_ms_each": ready}  # fmt: skip
    shown = ", ".join(f"{name} {mb:.0f}" for name, mb in memory.items())
    print(f"import gateway: {statistics.median(imports):.0f} ms; first answer after "
          f"{statistics.median(ready):.0f} ms, with new keys\nMB: {shown}\n")  # fmt: skip


PARTS: dict[str, Callable[[Bench, Report], None]] = {
    part.__name__: part for part in (endpoints, users, connections, workers, latency, start)
}


# -- What is shown ------------------------------------------------------------


def show(title: str, rows: list[Report]) -> None:
    """A table for people."""
    print(title)
    print(f"{'':32}{'server':>8}{'in T':>7} {'limit':9}{'x first':>8}{'store':>7}"
          f"{'client':>7}{'req/s':>7}{'x first':>8}{'p50 ms':>8}{'p99 ms':>8}{'errors':>7}"
          )  # fmt: skip
    for row in rows:
        in_t = f"{row['in_T']:.2f}" if "in_T" in row else ""
        limit = row["limit"] + " !" * (row.get("holds") is False)
        times, rate = (
            f"{row[key]:.2f}" if key in row else "" for key in ("times_first", "rate_times_first")
        )
        print(f"{row['name']:32}{row['server_us']:8.0f}{in_t:>7} {limit:9}{times:>8}"
              f"{row['store_us']:7.0f}{row['client_us']:7.0f}{row['requests_per_s']:7.0f}{rate:>8}"
              f"{row['p50_ms']:8.2f}{row['p99_ms']:8.2f}{row['errors']:7}")  # fmt: skip
    print(flush=True)


def rounded(value: Any) -> Any:
    """The same with numbers of three digits: no more is true of them."""
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return float(f"{value:.3g}") if isinstance(value, float) else value


def chart(report: Report) -> str:
    """What each endpoint costs in multiples of T, as SVG; a tick marks its limit."""
    rows = [row for row in report["endpoints"] if row["limit"]]
    units, t = report["endpoints units"], report["endpoints units"]["T"]
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 {30 * len(rows) + 30}" '
             'font-family="sans-serif" font-size="13">']  # fmt: skip
    for i, row in enumerate(rows):
        times, _, plus = row["limit"].partition(" + ")
        y, more = 30 * i + 10, units.get(plus, 0.0) / t
        width, limit = 30 * row["server_us"] / t, 30 * (float(times) + more)
        parts.append(f'<text x="190" y="{y + 14}" text-anchor="end">{row["name"]}</text>'
                     f'<rect x="200" y="{y}" width="{width:.0f}" height="18" fill="#69c"/>'
                     f'<path d="M{200 + limit:.0f} {y - 3}v24" stroke="#c33" stroke-width="3"/>'
                     f'<text x="{210 + max(width, limit):.0f}" y="{y + 14}">'
                     f'{row["server_us"]:.0f} µs</text>')  # fmt: skip
    note = f"one request at a time; T = {t:.0f} µs is the cost of GET /; the red mark is the limit"
    parts.append(f'<text x="200" y="{30 * len(rows) + 25}">{note}</text></svg>')
    return "\n".join(parts) + "\n"


def main(argv: list[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser("bench.py", description="What does a request cost?")
    told = "; ".join(f"{name}: {part.__doc__}" for name, part in PARTS.items())
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=f"default all. {told}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=3000, help="of each row in each round")
    parser.add_argument("--users", type=int, default=1_000_000, help="in the larger store")
    parser.add_argument("--only", default="", help="endpoints: those whose name holds this")
    parser.add_argument("--client", choices=("wrk", "python"), help="default: wrk, if it is there")
    parser.add_argument("--out", default="", help="folder for bench.json and bench.svg")
    given = parser.parse_args(argv)
    client = given.client or ("wrk" if clients.WRK else "python")
    if client == "python":
        print("No wrk (apt-get install wrk): the client is Python. It is slower, and takes CPU\n"
              "from the server; compare costs, not rates.\n")  # fmt: skip
    report: Report = {"machine": platform.platform(), "cores": os.cpu_count(), "client": client,
                      "python": platform.python_version(), "rounds": given.rounds}  # fmt: skip
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench")))
        for part in given.parts:
            bench = Bench(folder / part, client, given.requests, given.rounds, given.users,
                          given.only)  # fmt: skip
            bench.folder.mkdir()
            with bench.stack:
                PARTS[part](bench, report)
    if given.out:
        Path(given.out).mkdir(parents=True, exist_ok=True)
        Path(given.out, "bench.json").write_text(json.dumps(rounded(report), indent=1) + "\n")
        if "endpoints" in report:
            Path(given.out, "bench.svg").write_text(chart(report), "utf-8")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # by way of every close()
    sys.exit(main(sys.argv[1:]))
