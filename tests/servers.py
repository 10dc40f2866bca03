"""Real stores for tests: single servers, a cluster, a Sentinel group, DynamoDB's stand-ins.

Everything listens on a unix socket or on loopback, and dies with the test run. What this
machine has not got is left out, and named once at the end of the run (``left_out``).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import redis
import support
import urllib3
from redis.backoff import NoBackoff
from redis.retry import Retry
from support import free_port as free_port  # for those who need nothing else of it

import gateway

ROOT = Path(__file__).resolve().parent.parent
DYNALITE = ROOT / ".venv/node/node_modules/.bin/dynalite"
DEBIAN_REDIS = shutil.which("redis-server")
WANTED = {
    "Debian's redis-server": (DEBIAN_REDIS, "apt-get install redis-server"),
    "dynalite": (
        DYNALITE.exists() and shutil.which("node"),
        "npm install --prefix .venv/node dynalite@4.0.0 (Node 20)",
    ),
    "jose and @sd-jwt/core": (
        all((ROOT / ".parts" / name / "node_modules").exists() for name in ("jose", "sd-jwt"))
        and shutil.which("node"),
        "npm install --prefix .parts/jose jose@6.2.18; "
        "npm install --prefix .parts/sd-jwt @sd-jwt/core@0.19.0 (Node 20)",
    ),
    "moto": (
        importlib.util.find_spec("moto") and importlib.util.find_spec("boto3"),
        "pip install -r requirements.txt",
    ),
}


def left_out() -> str:
    """What tests are left out on this machine and how to get it; empty if nothing is."""
    missing = [f"{name} ({how})" for name, (there, how) in WANTED.items() if not there]
    return "left out, not installed: " + "; ".join(missing) if missing else ""


def wait_for(true: Callable[[], Any], what: str, timeout_s: float = 60) -> Any:
    """Poll until ``true()`` gives something; it may raise while it is not there yet."""
    error: Exception | None = None

    def ask() -> Any:
        nonlocal error
        try:
            return true()
        except (redis.RedisError, OSError) as one:
            error = one

    if found := support.poll(ask, timeout_s):
        return found
    raise AssertionError(f"{what} did not happen within {timeout_s} s ({error})")


def assert_refused(call: Callable[[], Any]) -> None:
    """503/201 with Retry-After, within a second."""
    started = time.monotonic()
    answer = call()
    took_s = time.monotonic() - started
    assert (answer.status, answer.errno) == (503, 201)
    assert took_s < 1 * support.shared()


class Server:
    """One Valkey (or Redis) process.

    Args:
        folder: Its own; made if it is not there.
        tcp: Listen on a free loopback port, in place of a unix socket.
        binary: Which server; default: the one that we embed.
    """

    def __init__(
        self, folder: Path, *options: str, tcp: bool = False, binary: str = "", config: str = ""
    ) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder, self.options, self.config = folder, options, config
        self.binary = binary or str(gateway.valkey_binary())
        self.port = free_port() if tcp else 0
        self.url = f"redis://127.0.0.1:{self.port}" if tcp else f"unix://{folder}/s"
        self.start()

    def start(self) -> None:
        """Start it (again), on the same place."""
        place = ["--port", str(self.port), "--bind", "127.0.0.1"]
        if not self.port:
            place = ["--port", "0", "--unixsocket", str(self.folder / "s")]
        command = [self.binary, *([self.config] if self.config else []), *place]
        command += ["--dir", str(self.folder), "--logfile", str(self.folder / "log")]
        if not self.config:
            command += ["--save", ""]
        parent = os.getpid()
        self.process = subprocess.Popen(
            [*command, *self.options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=lambda: self._in_child(parent),
        )
        wait_for(self._answers, f"the start of {self.folder.name}")

    def _in_child(self, parent: int) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a limit of files stands in for a full disk
        support.die_with_parent(parent, signal.SIGKILL)

    def _answers(self) -> bool:
        assert self.process.poll() is None, (self.folder / "log").read_text()[-500:]
        try:
            return bool(self.call("PING"))
        except (redis.exceptions.BusyLoadingError, redis.AuthenticationError):
            return True

    def call(self, *command: Any, timeout_s: float = 10) -> Any:
        """One command on a connection of its own; its raw answer."""
        connection = self.connect(timeout_s)
        try:
            return gateway.exchange(connection, command)[0]
        finally:
            connection.disconnect()

    def connect(self, timeout_s: float = 10) -> Any:
        """A connection of redis-py, which repeats nothing."""
        pool = redis.ConnectionPool.from_url(
            self.url, retry=Retry(NoBackoff(), 0), socket_timeout=timeout_s,
            protocol=2, driver_info=None,
        )  # fmt: skip
        return pool.make_connection()

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        """End it; by default without any warning."""
        self.process.send_signal(signal.SIGCONT)
        self.process.send_signal(how)
        self.process.wait()

    def close(self) -> None:
        """Make sure that it is gone."""
        if self.process.poll() is None:
            self.kill()


class Relay:
    """Stands between a gateway and its store; a subclass says what it passes on.

    ``close`` closes every socket of it, also those of clients that connect right then, and waits
    for its threads.
    """

    def __init__(self, listener: socket.socket, target: Any) -> None:
        self.listener, self.target = listener, target
        self.clients: list[tuple[socket.socket, threading.Thread]] = []
        self.accepting = threading.Thread(target=self._accept)
        self.accepting.start()

    def passes(self, data: bytes, to_store: bool, silent_s: float) -> bool:
        """Whether this is passed on; it may wait. What follows something lost is lost as well."""
        raise NotImplementedError

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # it was closed
            while True:
                client, _ = self.listener.accept()
                thread = threading.Thread(target=self._serve, args=(client,))
                self.clients.append((client, thread))
                thread.start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.socket(client.family) as store, contextlib.suppress(OSError):
            store.connect(self.target)
            back = threading.Thread(target=self._copy, args=(store, client, False))
            back.start()
            self._copy(client, store, True)
            back.join()

    def _copy(self, source: socket.socket, target: socket.socket, to_store: bool) -> None:
        passing, since = True, time.monotonic()
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                passing = passing and self.passes(data, to_store, time.monotonic() - since)
                if passing:
                    target.sendall(data)
                since = time.monotonic()
        self._hang_up(source)
        self._hang_up(target)

    @staticmethod
    def _hang_up(one: socket.socket) -> None:
        with contextlib.suppress(OSError):  # it is closed already
            one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Take no more connections, and end those that there are."""
        self._hang_up(self.listener)  # to close it would not wake who waits in accept
        self.accepting.join()
        self.listener.close()
        for client, thread in self.clients:
            self._hang_up(client)
            thread.join()


class Cluster:
    """Six nodes, three of them replicas, from the binary that we embed."""

    kind = "cluster"

    def __init__(self, folder: Path, replicas: bool = True) -> None:
        options = "--cluster-enabled yes --cluster-node-timeout 1500 --repl-diskless-sync-delay 0"
        self.nodes = [
            Server(folder / str(n), *options.split(), "--cluster-port", str(free_port()), tcp=True)
            for n in range(6 if replicas else 3)
        ]
        masters = self.nodes[:3]
        for n, node in enumerate(masters):
            last = 16384 if n == 2 else (n + 1) * 5461
            node.call("CLUSTER", "ADDSLOTSRANGE", n * 5461, last - 1)
        for n, node in enumerate(self.nodes):
            node.call("CLUSTER", "SET-CONFIG-EPOCH", n + 1)
        for node in self.nodes:
            bus = node.options[node.options.index("--cluster-port") + 1]
            for other in self.nodes:
                other.call("CLUSTER", "MEET", "127.0.0.1", node.port, bus)
        for node in self.nodes:
            told = partial(self.info, node)
            wait_for(lambda: told()["cluster_known_nodes"] == str(len(self.nodes)), "a cluster")  # noqa: B023
        for n, node in enumerate(self.nodes[3:]):
            name = masters[n].call("CLUSTER", "MYID")
            wait_for(partial(node.call, "CLUSTER", "REPLICATE", name), "a replica")
        self.url = "redis+cluster://" + ",".join(f"127.0.0.1:{n.port}" for n in self.nodes[:2])
        self.wait()

    @staticmethod
    def info(node: Server) -> dict[str, str]:
        """What ``CLUSTER INFO`` says."""
        told = node.call("CLUSTER", "INFO").decode()
        return dict(line.split(":") for line in told.split())

    def wait(self) -> None:
        """Wait until all nodes live, agree, and each primary has its replica."""

        def whole() -> bool:
            fine = all(self.info(node)["cluster_state"] == "ok" for node in self.nodes)
            roles = [node.call("ROLE") for node in self.nodes]
            primaries = [role for role in roles if role[0] == b"master"]
            full = all(len(role[2]) == len(self.nodes) // 3 - 1 for role in primaries)
            return fine and full and len(primaries) == 3

        wait_for(whole, "a whole cluster")

    def primary(self, key: bytes = b"{limits}") -> Server:
        """The node that holds a key now."""
        slot = redis.crc.key_slot(key)
        alive = next(node for node in self.nodes if node.process.poll() is None)
        for first, last, (_, port, *_), *_ in alive.call("CLUSTER", "SLOTS"):
            if first <= slot <= last:
                return next(node for node in self.nodes if node.port == port)
        raise AssertionError("nobody holds it")

    def flush(self) -> None:
        """Empty every primary, and forget its scripts."""
        for node in self.nodes:
            with contextlib.suppress(redis.exceptions.ReadOnlyError):
                node.call("FLUSHALL")
                node.call("SCRIPT", "FLUSH")

    def heal(self) -> None:
        """Start again what was killed."""
        for node in self.nodes:
            node.process.send_signal(signal.SIGCONT)
            if node.process.poll() is not None:
                node.start()
        self.wait()

    def close(self) -> None:
        """Stop all nodes."""
        for node in self.nodes:
            node.close()


class SentinelGroup:
    """A primary, a replica, and three sentinels that watch them."""

    kind = "sentinel"

    def __init__(self, folder: Path) -> None:
        options = ("--repl-diskless-sync-delay", "0")
        first = Server(folder / "a", *options, tcp=True)
        second = Server(folder / "b", *options, "--replicaof", f"127.0.0.1 {first.port}", tcp=True)
        self.nodes = [first, second]
        self.sentinels = []
        for n in range(3):
            home = folder / f"s{n}"
            home.mkdir(parents=True)
            config = home / "sentinel.conf"
            config.write_text(
                f"sentinel monitor phones 127.0.0.1 {first.port} 2\n"
                "sentinel down-after-milliseconds phones 1000\n"
                "sentinel failover-timeout phones 3000\n"
            )
            self.sentinels.append(Server(home, "--sentinel", tcp=True, config=str(config)))
        places = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        self.url = f"redis+sentinel://{places}/phones"
        self.wait()

    def _told(self) -> dict[bytes, bytes]:
        flat = self.sentinels[0].call("SENTINEL", "MASTER", "phones")
        return dict(zip(flat[::2], flat[1::2], strict=True))

    def wait(self) -> None:
        """Wait until all of it is there and agrees."""

        def whole() -> bool:
            told = self._told()
            fine = told[b"num-other-sentinels"] == b"2" and told[b"flags"] == b"master"
            return bool(fine and self.primary().call("ROLE")[2])

        wait_for(whole, "a whole Sentinel group", 30)

    def primary(self, key: bytes = b"") -> Server:
        """The node that takes writes now."""
        port = int(self._told()[b"port"])
        return next(node for node in self.nodes if node.port == port)

    flush = Cluster.flush
    heal = Cluster.heal

    def close(self) -> None:
        """Stop all of it."""
        for node in [*self.sentinels, *self.nodes]:
            node.close()


class Single:
    """One server, as a backend."""

    kind = "single"

    def __init__(self, folder: Path, binary: str = "") -> None:
        self.server = Server(folder, binary=binary)
        self.url = self.server.url

    def flush(self) -> None:
        """Empty it, and forget its scripts."""
        self.server.call("FLUSHALL")
        self.server.call("SCRIPT", "FLUSH")

    def close(self) -> None:
        """Stop it."""
        self.server.close()


def make_table(table: gateway.DynamoTable) -> None:
    """Make a table as the page "The store" says; wait until it can be used. TTL where it is."""
    page = (ROOT / "notebooks/operate/store.md").read_text("utf-8").replace("\\\n", "")
    create, ttl = re.findall(r"(?m)^aws dynamodb \S+ --table-name TABLE (.*)$", page)
    client: Any = table._client
    client.create_table(TableName=table.name, **_parameters(create))
    client.get_waiter("table_exists").wait(TableName=table.name, WaiterConfig={"Delay": 1})
    with contextlib.suppress(*table.errors):  # dynalite has none
        client.update_time_to_live(TableName=table.name, **_parameters(ttl))


def _parameters(options: str) -> dict[str, Any]:
    """What boto3 calls the options of the command "aws dynamodb"."""
    parameters: dict[str, Any] = {}
    for name, value in re.findall(r"--(\S+)\s+(\S+)", options):
        fields: Any = dict(pair.split("=") for pair in value.split(",") if "=" in pair)
        for switch in fields.keys() & {"Enabled"}:
            fields[switch] = fields[switch] == "true"
        many = name in ("attribute-definitions", "key-schema")
        parameters[name.title().replace("-", "")] = [fields] if many else fields or value
    return parameters


class Dynalite:
    """A process that speaks DynamoDB's protocol, strictly."""

    def __init__(self, folder: Path) -> None:
        self.port, self.folder = free_port(), folder
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        """Start it (again), on the same port and data."""
        parent = os.getpid()
        self.process = subprocess.Popen(
            [
                str(DYNALITE),
                "--host",
                "127.0.0.1",
                "--port",
                str(self.port),
                "--path",
                str(self.folder),
                "--createTableMs",
                "200",
                "--deleteTableMs",
                "200",
            ],
            stdout=subprocess.DEVNULL,
            preexec_fn=lambda: support.die_with_parent(parent, signal.SIGKILL),
        )
        http = urllib3.PoolManager(retries=False, timeout=1)

        def up() -> bool:
            with contextlib.suppress(urllib3.exceptions.HTTPError):
                http.request("GET", self.endpoint)
                return True
            return False

        wait_for(up, "the start of dynalite")
        http.clear()

    def store(self, table: str) -> str:
        """The setting ``certificate_store`` for a table here."""
        return f"dynamodb://{table}?region=eu-west-1&endpoint_url={self.endpoint}"

    def close(self) -> None:
        """Stop it."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()


@contextlib.contextmanager
def aws_credentials() -> Iterator[None]:
    """Credentials that no real service would take."""
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    before = {name: os.environ.get(name) for name in names}
    os.environ |= dict.fromkeys(names, "nobody")
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
