"""How workers share a store that allows few connections, or sits behind what forgets them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
import urllib3
from servers import Relay, Server, free_port, wait_for
from support import ROOT, GatewayProcess, halt, shared

import gateway

Start = Callable[..., GatewayProcess]
GEVENT = ROOT / ".parts/gevent"


def register(url: str, times: int, at_once: int) -> Counter[int]:
    """So many sessions are opened, so many at a time; how often each status came."""
    http = urllib3.PoolManager(retries=False, timeout=5, maxsize=at_once)
    with ThreadPoolExecutor(at_once) as threads:
        asked = threads.map(lambda _: http.request("POST", url + "/register").status, range(times))
        return Counter(asked)


# -- A store that allows few connections ---------------------------------------


@pytest.fixture
def narrow(tmp_path: Path) -> Iterator[Server]:
    """A server that allows 20 connections, as small hosted plans do."""
    with contextlib.closing(Server(tmp_path / "s", "--maxclients", "20", tcp=True)) as server:
        yield server


def test_a_gateway_that_takes_fewer_connections_than_the_store_allows(
    narrow: Server, start_gateway: Start
) -> None:
    url = narrow.url + "?max_connections=8"
    running = start_gateway("--storage-url", url, "--workers", "2")
    assert "connections" not in running.output
    assert register(running.url, 600, 48) == {200: 600}
    clients = narrow.call("CLIENT", "LIST").decode().splitlines()
    assert 2 <= len(clients) <= 2 * 8 + 2, clients


def test_a_gateway_that_takes_more_connections_than_the_store_allows(
    narrow: Server, start_gateway: Start
) -> None:
    """It says so at the start; and after a burst all is well: threads own no connection."""
    running = start_gateway("--storage-url", narrow.url, "--workers", "2")
    assert "allows 20 connections, and this gateway takes up to 33" in running.output
    burst = register(running.url, 600, 48)
    assert burst.keys() <= {200, 503}
    time.sleep(1)
    assert register(running.url, 200, 1) == {200: 200}, burst


def test_what_could_not_be_opened_is_lent_last(narrow: Server) -> None:
    """As two workers that share the server, whichever of them a request comes to."""
    workers, key = [gateway.Storage(narrow.url) for _ in range(2)], gateway.StorageId(b"1" * 16)
    refused, together = list[str](), threading.Barrier(48)

    def ask(n: int) -> None:
        together.wait(20)
        for _ in range(20):
            try:
                workers[n % 2].get(key)
            except gateway.Unavailable as error:
                refused.append(str(error))

    for worker in workers:
        worker.get(key)
    with ThreadPoolExecutor(48) as threads:
        list(threads.map(ask, range(48)))
    for worker in workers:
        for _ in range(50):
            assert worker.get(key) is None, len(refused)


def test_who_finds_all_connections_in_use_is_answered_in_time(tmp_path: Path) -> None:
    """Nor does anybody wait longer for a connection than for the store."""
    with contextlib.closing(Server(tmp_path / "s")) as server:
        storage = gateway.Storage(server.url + "?max_connections=2")
        assert storage.get(gateway.StorageId(b"1" * 16)) is None
        halt(server.process.pid)

        def seconds(_: int) -> float:
            started = time.monotonic()
            with pytest.raises(gateway.Unavailable):
                storage.get(gateway.StorageId(b"1" * 16))
            return time.monotonic() - started

        with ThreadPoolExecutor(12) as threads:
            assert max(threads.map(seconds, range(12))) < 1 * shared()
        server.process.send_signal(signal.SIGCONT)
        assert storage.get(gateway.StorageId(b"1" * 16)) is None


@pytest.mark.parametrize(
    ("told", "workers", "warned"),
    [({}, 99, False), ({"maxclients": "33"}, 2, False), ({"maxclients": "32"}, 2, True)],
)
def test_the_start_compares_connections(told: dict[str, str], workers: int, warned: bool) -> None:
    storage = gateway.Storage("unix:///nowhere", workers)
    assert len(storage._problems({"redis_version": "7.0.0"} | told)) == warned


# -- What forgets connections ---------------------------------------------------


class Forgetful(Relay):
    """Swallows what comes on a connection that was silent, and gives no answer, as NAT does.

    Attributes:
        swallowed: How many connections that has happened to.
    """

    def __init__(self, port: int, silence_s: float) -> None:
        self.silence_s, self.swallowed = silence_s, 0
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{listener.getsockname()[1]}"
        super().__init__(listener, ("127.0.0.1", port))

    def passes(self, data: bytes, to_store: bool, silent_s: float) -> bool:
        """Not if it was silent for too long."""
        forgotten = to_store and silent_s > self.silence_s
        self.swallowed += forgotten
        return not forgotten


def test_a_relay_leaves_nothing_open(tmp_path: Path) -> None:
    """Not even what connects while it closes, when the store behind it has gone already."""
    server = Server(tmp_path / "s", tcp=True)
    threads, files = threading.active_count(), psutil.Process().num_fds()
    proxy = Forgetful(server.port, 60)
    port = int(proxy.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), 10) as client:
        client.sendall(b"PING\r\n")
        assert client.recv(100) == b"+PONG\r\n"
        server.close()
        with socket.create_connection(("127.0.0.1", port), 10) as late:
            assert late.recv(100) == b""
        assert client.recv(100) == b""
        proxy.close()
    assert (threading.active_count(), psutil.Process().num_fds()) == (threads, files)


def test_what_a_proxy_forgot_is_replaced_before_it_is_used(
    tmp_path: Path, start_gateway: Start
) -> None:
    with (
        contextlib.closing(Server(tmp_path / "s", tcp=True)) as server,
        contextlib.closing(Forgetful(server.port, 2)) as proxy,
    ):
        running = start_gateway("--storage-url", proxy.url)
        assert register(running.url, 64, 16) == {200: 64}
        for _ in range(3):
            time.sleep(2.3)
            assert register(running.url, 1, 1) == {200: 1}
        time.sleep(2.3)
        assert register(running.url, 64, 16) == {200: 64}
        assert proxy.swallowed >= 4  # it did what it is here for


@pytest.mark.parametrize(("interval", "pings"), [("", 1), ("?health_check_interval=30", 0)])
def test_an_idle_connection_is_sent_a_ping(tmp_path: Path, interval: str, pings: int) -> None:
    """Once; as redis-py's own option says, if there is one."""
    with contextlib.closing(Server(tmp_path / "s")) as server:
        storage, key = gateway.Storage(server.url + interval), gateway.StorageId(b"1" * 16)

        def count() -> int:
            told = server.call("INFO", "commandstats").decode()
            return int(told.partition("cmdstat_ping:calls=")[2].partition(",")[0] or 0)

        storage.get(key)
        before = count()
        time.sleep(gateway.STORAGE_IDLE_S + 0.1)
        for _ in range(9):
            storage.get(key)
        assert count() - before == pings


# -- A cluster that does not say where it is ------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """Every host and port that this process looks up to connect to."""
    found, real = list[tuple[Any, Any]](), socket.getaddrinfo

    def look_up(host: Any, port: Any, *rest: Any, **named: Any) -> Any:
        found.append((host, port))
        return real(host, port, *rest, **named)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return found


@pytest.fixture
def stranger() -> Iterator[list[bytes]]:
    """What is sent to whoever listens where redis-py would connect to by default."""
    heard: list[bytes] = []
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a Redis of this machine is there already
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 6379)))

            def listen() -> None:
                with contextlib.suppress(OSError):
                    while True:
                        peer, _ = listener.accept()
                        with peer:
                            heard.append(peer.recv(1000))

            threading.Thread(target=listen, daemon=True).start()
        yield heard


@pytest.mark.parametrize("kind", ["hostname", "unknown-endpoint", "ip"])
def test_a_cluster_without_names_means_the_node_that_was_asked(
    kind: str, tmp_path: Path, asked: list[tuple[Any, Any]], stranger: list[bytes]
) -> None:
    """``?`` ended the host in a URL, and the rest of it was localhost: with the password."""
    options = ["--cluster-enabled", "yes", "--cluster-preferred-endpoint-type", kind]
    options += ["--cluster-port", str(free_port()), "--requirepass", "TopSecret"]
    with contextlib.closing(Server(tmp_path / "s", *options, tcp=True)) as server:
        server.url += "?password=TopSecret"
        server.call("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        wait_for(lambda: b"cluster_state:ok" in server.call("CLUSTER", "INFO"), "a cluster")
        (((_, _, (host, *_)),)) = server.call("CLUSTER", "SLOTS")
        assert host == {"hostname": b"?", "unknown-endpoint": None, "ip": b""}[kind]
        del asked[:]
        storage = gateway.Storage(f"redis+cluster://:TopSecret@127.0.0.1:{server.port}")
        for n in range(4):
            storage.create(gateway.StorageId(b"%016d" % n), b"record", 99)
        storage.ping(1)
        assert server.call("DBSIZE") == 5
    assert set(asked) == {("127.0.0.1", server.port)}
    assert stranger == []


def test_a_cluster_is_asked_anew_however_often_it_is_needed(tmp_path: Path) -> None:
    """Each request that found it gone once put off the next question, so that none was asked."""
    options = ["--cluster-enabled", "yes", "--cluster-port", str(free_port())]
    with contextlib.closing(Server(tmp_path / "s", *options, tcp=True)) as server:
        server.call("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        wait_for(lambda: b"cluster_state:ok" in server.call("CLUSTER", "INFO"), "a cluster")
        storage = gateway.Storage(f"redis+cluster://127.0.0.1:{server.port}")
        key = gateway.StorageId(b"1" * 16)

        def answers() -> bool:
            with contextlib.suppress(gateway.Unavailable):
                return storage.get(key) is None
            return False

        assert answers()
        server.kill()
        for _ in range(30):
            assert not answers()
            time.sleep(0.02)
        server.start()
        stop_s = time.monotonic() + 3
        while not answers():
            assert time.monotonic() < stop_s
            time.sleep(0.02)


@pytest.mark.parametrize("host", ["?", "", None, "10.0.0.1", "a-b.example.", "::1", "fe80::1%eth0"])
def test_where_a_node_is(host: str | None) -> None:
    told = None if host is None else host.encode()
    assert gateway._node(told, b"7000", ("asked", 1)) == (
        "asked" if host in ("?", "", None) else host, 7000,
    )  # fmt: skip


@pytest.mark.parametrize(
    "host", ["a b", "a/b", "u:p@h", "h?", "a..b", "x" * 64, "h\0", "\xff", "#"]
)
def test_what_is_no_host_is_connected_to_by_nobody(host: str) -> None:
    with pytest.raises(redis.ConnectionError):
        gateway._node(host.encode("latin-1"), 7000, ("asked", 1))


# -- gevent --------------------------------------------------------------------


@pytest.mark.skipif(
    not (GEVENT / "gevent").is_dir(),
    reason="gevent is not installed: "
    ".venv/bin/pip install --target .parts/gevent gunicorn==27.0.1 gevent==26.9.0",
)
def test_time_limits_hold_under_gevent(tmp_path: Path) -> None:
    """Its sockets never block in the kernel, so that no limit that lies there can hold."""
    with contextlib.closing(Server(tmp_path / "s", "--appendonly", "yes")) as server:
        port = free_port()
        command = [sys.executable, "-m", "gunicorn", "-k", "gevent", "-b", f"127.0.0.1:{port}"]
        environ = {k: v for k, v in os.environ.items() if not k.startswith("GATEWAY_")}
        environ |= {
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(GEVENT)]),
            "GATEWAY_STORAGE_URL": server.url, "GATEWAY_PORT": str(port),
            "GATEWAY_DATA_DIR": str(tmp_path / "data"), "GATEWAY_KEYS_DIR": str(tmp_path / "keys"),
        }  # fmt: skip
        with (tmp_path / "log").open("wb") as log:
            running = subprocess.Popen(
                [*command, "gateway:application()"],
                env=environ, stdout=log, stderr=log, cwd=tmp_path,
            )  # fmt: skip
        url, http = f"http://127.0.0.1:{port}", urllib3.PoolManager(retries=False, timeout=5)

        def answers() -> bool:
            with contextlib.suppress(urllib3.exceptions.HTTPError):
                return http.request("GET", url + "/__heartbeat__").status == 200
            return False

        try:
            wait_for(answers, "the start of gunicorn: " + (tmp_path / "log").read_text())
            assert register(url, 60, 20) == {200: 60}
            halt(server.process.pid)
            started = time.monotonic()
            assert register(url, 40, 40) == {503: 40}
            assert time.monotonic() - started < 1.5 * shared()
            server.process.send_signal(signal.SIGCONT)
            assert register(url, 60, 20) == {200: 60}
        finally:
            running.terminate()
            running.wait(20)
