"""What the store can do to us: each answer within a second, the truth, and nothing by halves."""

from __future__ import annotations

import contextlib
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import servers
from servers import Server, wait_for
from support import ROOT, WsgiClient

import gateway

SIGN = {"publicKey": gateway.public_key_json(gateway.generate_key("RS128").public_key())}


class Store(Server):
    """A Valkey server with a password, a file of its data, and a line for its administrator."""

    def __init__(self, folder: Path) -> None:
        self.group: servers.SentinelGroup | None = None
        super().__init__(folder, "--appendonly", "yes", "--appendfsync", "no", "--requirepass", "x")
        self.url += "?password=x"
        self.connect()

    def connect(self) -> None:
        self._admin = gateway.Storage(self.url)._connect(("", 0), "", 10)

    def admin(self, *command: Any) -> Any:
        return gateway.Storage("unix://")._talk(self._admin, command)[0]

    def drop_clients(self) -> None:
        """Close every connection but the administrator's."""
        self.admin("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")

    def restart_slowly(self) -> None:
        """Die, and come back with so much data that loading it takes a while."""
        fillers = [("SET", f"filler {n}", "") for n in range(4000)]
        gateway.Storage("unix://")._talk(self._admin, *fillers)
        self.kill()
        slow = "--appendonly no --key-load-delay 500 --loading-process-events-interval-bytes 1024"
        self.options = (*self.options, *slow.split())
        self.start()
        assert b"loading:1" in self.call("INFO", "persistence")

    def limit_files(self, size: int) -> None:
        resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def fail_over(self) -> None:
        assert self.group
        self.group.sentinels[0].call("SENTINEL", "FAILOVER", "phones")


Act = Callable[[Store], Any]
FAULTS: dict[str, tuple[Act, Act]] = {
    "hung": (
        lambda store: store.process.send_signal(signal.SIGSTOP),
        lambda store: store.process.send_signal(signal.SIGCONT),
    ),
    "gone": (lambda store: store.kill(), lambda store: store.start()),
    "restarting": (lambda store: store.restart_slowly(), lambda store: None),
    "read-only": (
        lambda store: store.admin("REPLICAOF", "127.0.0.1", "1"),
        lambda store: store.admin("REPLICAOF", "NO", "ONE"),
    ),
    "out of memory": (
        lambda store: store.admin("CONFIG", "SET", "maxmemory", "1"),
        lambda store: store.admin("CONFIG", "SET", "maxmemory", "0"),
    ),
    "disk full": (
        lambda store: (store.limit_files(1), store.admin("SET", "filler", "x")),
        lambda store: store.limit_files(resource.RLIM_INFINITY),
    ),
    "wrong password": (
        lambda store: (store.admin("CONFIG", "SET", "requirepass", "y"), store.drop_clients()),
        lambda store: store.admin("CONFIG", "SET", "requirepass", "x"),
    ),
    "connection table full": (
        lambda store: (store.admin("CONFIG", "SET", "maxclients", "1"), store.drop_clients()),
        lambda store: store.admin("CONFIG", "SET", "maxclients", "1000"),
    ),
    "scripts flushed": (lambda store: store.admin("SCRIPT", "FLUSH"), lambda store: None),
    "failover": (lambda store: store.fail_over(), lambda store: None),
}
HARMLESS = ("scripts flushed", "failover")
"""What the client may not even notice."""


@pytest.fixture
def store_of(tmp_path: Path) -> Iterator[Callable[[str], Store]]:
    with contextlib.ExitStack() as stack:

        def build(fault: str) -> Store:
            store = Store(tmp_path / "s")
            stack.callback(store.close)
            if fault == "failover":
                store.group = servers.SentinelGroup(tmp_path / "g")
                stack.callback(store.group.close)
                store.url = store.group.url
            return store

        yield build


@pytest.mark.parametrize("fault", FAULTS)
def test_fault(
    fault: str, store_of: Callable[[str], Store], keys_dir: str, tmp_path: Path
) -> None:
    store = store_of(fault)
    break_it, heal = FAULTS[fault]
    settings = gateway.Settings(keys_dir=keys_dir, data_dir=str(tmp_path), storage_url=store.url)
    client = WsgiClient(gateway.create_app(settings))
    assert client.gateway.sms.outbox
    client.gateway.sms.outbox.console = None
    verified = client.another().verified()
    waiting = client.another()
    waiting.register()
    assert waiting.ask("+447700900456").status == 200
    code, storage = waiting.code("+447700900456"), client.gateway.storage
    assert waiting.credentials
    key = client.gateway.secrets.id_for(waiting.credentials.hawk_id)
    before = storage.get(key)

    break_it(store)
    calls: dict[str, Callable[[], Any]] = {
        "open a session": lambda: client.call("/register", signed=False),
        "return a code": lambda: waiting.call("/sms/verify_code", {"code": code}, nonce="n"),
        "sign": lambda: verified.call("/certificate/sign", SIGN),
        "ask again": lambda: verified.call("/sms/resend_code"),
        "leave": lambda: verified.call("/unregister"),
    }
    worked = {}
    for what, call in calls.items():
        started = time.monotonic()
        answer = call()
        assert time.monotonic() - started < 1, what
        worked[what] = answer.status < 300
        if not worked[what]:
            assert (answer.status, answer.errno) == (503, 201), what
    started = time.monotonic()
    beat = client.get("/__heartbeat__")
    assert time.monotonic() - started < 1
    if fault not in HARMLESS:
        assert not any(worked.values())
        assert (beat.status, beat.json) == (503, {"storage": False})
        assert beat.headers["retry-after"] == "5"

    heal(store)
    started = time.monotonic()
    wait_for(lambda: client.get("/__heartbeat__").status == 200, "its recovery", 10)
    if fault != "restarting":  # which takes as long as its data
        assert time.monotonic() - started < 5
    # The code and its nonce were used up together, or neither was.
    used = storage._run("EXISTS", gateway._nonce_key(key, "n"), key=key) == 1
    assert used == (storage.get(key) != before)
    if fault not in ("hung", *HARMLESS):  # a server that hung may do later what it was asked
        assert not used
    if not used:
        assert waiting.call("/sms/verify_code", {"code": code}).status == 200
    assert waiting.call("/certificate/sign", SIGN).status == 200
    assert waiting.call("/unregister").status == 204
    assert client.another().verified().call("/certificate/sign", SIGN).status == 200
