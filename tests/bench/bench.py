"""What a request costs: ``make bench``, or ``python tests/bench/bench.py --help``.

Starts real gateways, writes users into their store, replays requests that were signed
beforehand, and reports for each endpoint the CPU of the server's processes per request. All
that is compared is measured in the same rounds, one after another, because the CPU time of
the same work differs by a half between a quiet and a busy machine:

    T   GET / of the gateway, one worker, the shipped number of threads
    B   a bare Bottle route on the same server
    R   one RS256 signature            \\
    P   one POST by a pooled urllib3    > CPU of this process, which does nothing else
    S   one GET of the store           /

Prints tables, and writes ``bench.json`` and ``bench.svg`` into the folder that ``--out`` names.
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
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent / "notebooks")]

import clients  # noqa: E402
import lab  # noqa: E402
import psutil  # noqa: E402
import urllib3  # noqa: E402
from cryptography.hazmat.primitives import hashes  # noqa: E402
from cryptography.hazmat.primitives.asymmetric import padding, rsa  # noqa: E402
from support import GatewayProcess  # noqa: E402

import gateway  # noqa: E402

NUMBER = gateway.Msisdn("+447700900123")
CODE = "146193"
CONNECTIONS = 16
CLIENT_KEY = json.dumps(gateway.public_key_json(gateway.generate_key("RS256").public_key()))
SIGNING_KEY = rsa.generate_private_key(65537, 2048)


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

    def rss_mb(self) -> dict[str, float]:
        """Resident memory: the main process, the mean of its workers, the store."""
        main, *others = self.process.family()
        store = [p for p in others if p.name().startswith("valkey")]
        # A worker's only child is nobody; multiprocessing's helpers are small and not counted.
        workers = sorted((p.memory_info().rss for p in others if p not in store), reverse=True)
        serving = [rss for rss in workers if rss > 30e6] or workers
        mb = {"main": main.memory_info().rss, "worker": statistics.mean(serving)}
        return {name: round(value / 1e6, 1) for name, value in mb.items()}

    # -- The store

    def command(self, *words: bytes) -> bytes:
        """One command to the store, and its short answer."""
        self.store.sendall(_resp(*words))
        return self.store.recv(4096)

    def reset(self, users: int) -> None:
        """Empty store and outbox, and write ``users`` others who stand around."""
        self.command(b"FLUSHALL", b"SYNC")
        outbox = self.folder / "data" / "outbox"
        if outbox.exists():  # not deleted: ext4 is slow to give out inodes just after it took many
            outbox.rename(self.folder / f"outbox-{time.time_ns()}")
        for start in range(0, users, 50_000):
            ids = [secrets.token_bytes(16) for _ in range(min(50_000, users - start))]
            record = self._user(verified=True)
            self.write({one: record(secrets.token_bytes(32), "") for one in ids})

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
            if not (pending or verified):
                return gateway.User(gateway.HawkKey(key)).pack()
            fields: dict[str, Any] = {"sealed": secrets.token_bytes(24)}
            if hawk_id:
                sealed = gateway.seal_msisdn(self.secrets.seal, gateway.HawkId(hawk_id), NUMBER)
                fields["sealed"] = sealed
            if pending:
                id_ = gateway.StorageId(storage_id)
                fields["code_digest"] = gateway.code_digest(self.secrets.code, id_, CODE)
                fields["code_expires_s"] = now_s + 3600
            fields |= {"sends": 1, "verified_s": now_s if verified else 0}
            network = gateway.Network("234", "15")
            return gateway.User(gateway.HawkKey(key), network=network, **fields).pack()

        return record

    # -- Requests

    def request(self, path: str, body: str = "", authorization: str = "") -> bytes:
        """One HTTP request."""
        method = "GET" if path == "/" else "POST"
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
        header = f'Hawk id="{one.hawk_id}", ts="{ts}", nonce="{nonce}", hash="{hashed}", mac="{mac}"'
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
    Workload("GET /", "/", 200, times=3),
    Workload("bare route", "/", 200, server="bare", times=3),
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
        self.server_us.append(server_us)
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
    stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    steps: int = 0
    step: int = 0

    def start(self, name: str, *options: str) -> World:
        """Start a gateway."""
        world = World(self.folder / name, *options)
        self.stack.callback(world.close)
        return world

    def say(self, what: str) -> None:
        """Show how far we are."""
        self.step += 1
        left = f"{self.step}/{self.steps} " if self.step <= self.steps else ""
        line = f"  {left}{what}"
        print(f"\r{line:78.78}" if sys.stderr.isatty() else line, end="\r" if sys.stderr.isatty()
              else "\n", file=sys.stderr, flush=True)  # fmt: skip

    def measure(
        self, workload: Workload, world: World, row: Row, port: int = 0, cpu: Any = None,
        connections: int = CONNECTIONS,
    ) -> None:  # fmt: skip
        """One round of one row."""
        requests = workload.requests(world, self.count * workload.times)
        edges: list[tuple[float, float]] = []
        read = cpu or world.cpu_s
        run = clients.replay(
            port or world.port, requests, connections, lambda: edges.append(read()), self.client
        )
        server, store = ((b - a) / len(requests) * 1e6 for a, b in zip(*edges, strict=True))
        row.add(server, store, run, workload.status)

    def warm_up(self, world: World) -> None:
        """Let every thread connect, before anything is counted."""
        workload = next(w for w in WORKLOADS if w.name == "/sms/verify_code")
        requests = workload.requests(world, 1000)
        clients.run_python(world.port, requests, 64, lambda: None)


# -- The parts of the benchmark -----------------------------------------------


def probe(times: int, call: Callable[[], object]) -> float:
    """CPU µs of this thread for one call."""
    for _ in range(max(times // 10, 1)):
        call()
    started = time.thread_time()
    for _ in range(times):
        call()
    return (time.thread_time() - started) / times * 1e6


class Bare:
    """The bare route, and the SMS provider, in a process of their own."""

    def __init__(self, folder: Path, threads: int) -> None:
        with contextlib.closing(lab.free_port()) as holder:
            self.port = holder.getsockname()[1]
        command = [sys.executable, str(HERE / "bare.py"), str(self.port), str(threads)]
        with (folder / "bare.log").open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port)).close()
                break
            assert self.process.poll() is None, (folder / "bare.log").read_text()
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


def endpoints(bench: Bench, report: dict[str, Any]) -> None:
    """Every endpoint, beside T, B, R, P and S."""
    bare = Bare(bench.folder, gateway.Settings().threads)
    bench.stack.callback(bare.close)
    url = f"http://127.0.0.1:{bare.port}/sms/json"
    entry = {"kind": "nexmo", "endpoint": url, "api_key": "key", "api_secret": "secret"}
    worlds = {
        "gateway": bench.start("one"),
        "paying": bench.start("paying", "--sms-providers", json.dumps([entry])),
    }
    for world in worlds.values():
        bench.warm_up(world)
    http = urllib3.PoolManager()
    form = urlencode({"from": "Gateway", "to": NUMBER[1:], "text": "0" * 32, **entry})
    storage = gateway.Storage(worlds["gateway"].process.folder.as_uri().replace("file://", "unix://")
                              + "/data/store.sock")  # fmt: skip
    sample, sign = b"x" * 500, (padding.PKCS1v15(), hashes.SHA256())
    probes: dict[str, Callable[[], object]] = {
        "R": lambda: SIGNING_KEY.sign(sample, *sign),
        "P": lambda: http.request("POST", url, body=form, headers=gateway.FORM).json(),
        "S": lambda: storage.get(gateway.StorageId(bytes(16))),
    }
    rows = [Row(w.name, w.limit) for w in WORKLOADS]
    units: dict[str, list[float]] = {name: [] for name in probes}
    bench.steps, bench.step = bench.rounds * len(rows), 0
    for number in range(bench.rounds):
        for name, call in probes.items():
            units[name].append(probe(min(bench.count, 1000), call))
        for workload, row in zip(WORKLOADS, rows, strict=True):
            bench.say(f"round {number + 1}: {workload.name}")
            world = worlds.get(workload.server, worlds["gateway"])
            world.reset(1000)
            if workload.server == "bare":
                bench.measure(workload, world, row, bare.port, bare.cpu_s)
            else:
                bench.measure(workload, world, row)
    units |= {"T": rows[0].server_us, "B": rows[1].server_us}
    report["units"] = {name: statistics.median(each) for name, each in units.items()}
    report["endpoints"] = [row.json() | judged(row, units) for row in rows]


def judged(row: Row, units: dict[str, list[float]]) -> dict[str, Any]:
    """A row in multiples of T, and of its limit; medians over rounds, each with its own T."""
    times, _, plus = row.limit.partition(" + ")
    more = units.get(plus, [0.0] * len(units["T"]))
    ratios = [
        (cpu - extra) / t for cpu, extra, t in zip(row.server_us, more, units["T"], strict=True)
    ]
    ratio = statistics.median(ratios)
    return {"in_T": ratio, "holds": ratio <= float(times) if times else None}


def main(argv: list[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser("bench.py", description="What does a request cost?")
    parser.add_argument("parts", nargs="*", default=["endpoints"], help="; ".join(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=3000, help="of each row in each round")
    parser.add_argument("--client", choices=("wrk", "python"), default="wrk" if clients.WRK else
                        "python")  # fmt: skip
    parser.add_argument("--out", default="", help="folder for bench.json and bench.svg")
    given = parser.parse_args(argv)
    report: dict[str, Any] = {"machine": platform.platform(), "cores": os.cpu_count(),
                              "python": platform.python_version(), "client": given.client}  # fmt: skip
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench")))
        for part in given.parts:
            bench = Bench(folder / part, given.client, given.requests, given.rounds)
            bench.folder.mkdir()
            with bench.stack:
                PARTS[part](bench, report)
            print_part(part, report)
    if given.out:
        Path(given.out, "bench.json").write_text(json.dumps(report, indent=1) + "\n")
    return 0


PARTS: dict[str, Callable[[Bench, dict[str, Any]], None]] = {"endpoints": endpoints}


def print_part(part: str, report: dict[str, Any]) -> None:
    """A table for people."""
    units = report["units"]
    print("CPU µs: " + ", ".join(f"{name} {value:.0f}" for name, value in units.items()))
    print(f"{'':28}{'server':>8}{'in T':>7}  {'limit':8}{'store':>6}{'client':>7}"
          f"{'req/s':>7}{'p50 ms':>8}{'p99 ms':>8}{'errors':>7}")  # fmt: skip
    for row in report[part]:
        mark = {None: "", True: "", False: " !"}[row["holds"]]
        print(f"{row['name']:28}{row['server_us']:8.0f}{row['in_T']:7.2f}  "
              f"{row['limit'] + mark:8}{row['store_us']:6.0f}{row['client_us']:7.0f}"
              f"{row['requests_per_s']:7.0f}{row['p50_ms']:8.2f}{row['p99_ms']:8.2f}"
              f"{row['errors']:7}")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
