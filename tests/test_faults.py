"""What the store can do to us: each answer within a second, the truth, and nothing by halves."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import servers
from redis.crc import key_slot
from servers import Server, wait_for
from support import HOUR, OPEN, ROOT, WsgiClient, give_back, halt, names_taken, shared, take

import gateway

SIGN = {"publicKey": gateway.public_key_json(gateway.generate_key("RS128").public_key())}


class Store(Server):
    """A Valkey server with a password, a file of its data, and a line for its administrator."""

    def __init__(self, folder: Path) -> None:
        self.group: servers.SentinelGroup | None = None
        super().__init__(folder, "--appendonly", "yes", "--appendfsync", "no", "--requirepass", "x")
        self.url += "?password=x"
        self._admin = self.connect()

    def admin(self, *command: Any) -> Any:
        return gateway.exchange(self._admin, command)[0]

    def drop_clients(self) -> Any:
        """Close every connection but the administrator's."""
        return self.admin("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")

    def restart_slowly(self) -> None:
        """Die, and come back with so much data that loading it takes a while."""
        fillers = [("SET", f"filler {n}", "") for n in range(4000)]
        gateway.exchange(self._admin, *fillers)
        self.admin("SAVE")
        self.kill()
        slow = "--appendonly no --key-load-delay 500 --loading-process-events-interval-bytes 1024"
        self.options = (*self.options, *slow.split())
        self.start()
        assert b"loading:1" in self.call("INFO", "persistence")

    def limit_files(self, size: int) -> Any:
        return resource.prlimit(
            self.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY)
        )

    def fail_over(self) -> None:
        assert self.group
        self.group.sentinels[0].call("SENTINEL", "FAILOVER", "phones")


Act = Callable[[Store], Any]
FAULTS: dict[str, tuple[Act, Act]] = {
    "hung": (
        lambda store: halt(store.process.pid),
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
def test_fault(fault: str, store_of: Callable[[str], Store], keys_dir: str, tmp_path: Path) -> None:
    store = store_of(fault)
    break_it, heal = FAULTS[fault]
    settings = gateway.Settings(
        keys_dir=keys_dir, data_dir=str(tmp_path), storage_url=store.url, **OPEN
    )
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
        assert time.monotonic() - started < 1 * shared(), what
        worked[what] = answer.status < 300
        if not worked[what]:
            assert (answer.status, answer.errno) == (503, 201), what
    started = time.monotonic()
    beat = client.get("/__heartbeat__")
    assert time.monotonic() - started < 1 * shared()
    if fault == "out of memory":  # whoever is there already is served on
        assert [what for what in worked if not worked[what]] == ["open a session"]
        assert beat.status == 503
    elif fault not in HARMLESS:
        assert not any(worked.values())
        assert (beat.status, beat.json) == (503, {"storage": False, "sms": True})
        assert beat.headers["retry-after"] == "5"

    heal(store)
    started = time.monotonic()
    wait_for(lambda: client.get("/__heartbeat__").status == 200, "its recovery", 10)
    if fault != "restarting":  # which takes as long as its data
        assert time.monotonic() - started < 5 * shared()
    # The code and its nonce were used up together, or neither was.
    used = storage._run("EXISTS", gateway.nonce_key(key, "n"), key=key) == 1
    assert used == (storage.get(key) != before)
    if fault not in (
        "hung",
        "out of memory",
        *HARMLESS,
    ):  # a server that hung may do later what it was asked
        assert not used
    if not used:
        assert waiting.call("/sms/verify_code", {"code": code}).status == 200
    assert waiting.call("/certificate/sign", SIGN).status == 200
    assert waiting.call("/unregister").status == 204
    assert client.another().verified().call("/certificate/sign", SIGN).status == 200


# -- One node of several -------------------------------------------------------


def test_a_heartbeat_sees_the_one_node_that_takes_no_writes(tmp_path: Path) -> None:
    with contextlib.closing(servers.Cluster(tmp_path / "c", replicas=False)) as cluster:
        storage = gateway.Storage(cluster.url)
        storage.ping(1)
        for node in cluster.nodes:
            node.call("CONFIG", "SET", "maxmemory", "1")
            with pytest.raises(gateway.Unavailable):
                storage.ping(1)
            node.call("CONFIG", "SET", "maxmemory", "0")
            storage.ping(1)


def test_a_slot_that_moves_is_followed(tmp_path: Path) -> None:
    """503 while it is on its way, for both halves of a commit must be in one place."""
    with contextlib.closing(servers.Cluster(tmp_path / "c", replicas=False)) as cluster:
        storage, key = gateway.Storage(cluster.url), gateway.StorageId(b"0123456789abcdef")
        storage.create(key, b"\x01a", 1000)
        slot, source = key_slot(key), cluster.primary(key)
        target = next(node for node in cluster.nodes if node is not source)
        names = {node: node.call("CLUSTER", "MYID") for node in (source, target)}
        target.call("CLUSTER", "SETSLOT", slot, "IMPORTING", names[source])
        source.call("CLUSTER", "SETSLOT", slot, "MIGRATING", names[target])
        with pytest.raises(gateway.Unavailable):
            storage.commit(key, b"\x01a", b"\x01b", -1, "n", 60)
        source.call("MIGRATE", "127.0.0.1", target.port, key, 0, 5000)
        with pytest.raises(gateway.Unavailable):
            storage.commit(key, b"\x01a", b"\x01b", -1, "n", 60)
        for node in (target, source):
            node.call("CLUSTER", "SETSLOT", slot, "NODE", names[target])
        storage.get(b"another")  # type: ignore[arg-type]
        assert storage.commit(key, b"\x01a", b"\x01b", -1, "n", 60) is gateway.Commit.DONE
        assert storage.commit(key, b"\x01b", b"\x01c", -1, "n", 60) is gateway.Commit.REPLAYED
        assert storage.get(key) == b"\x01b"


def test_where_the_replica_does_not_confirm_nobody_is_told_yes(tmp_path: Path) -> None:
    primary = Server(tmp_path / "a", "--repl-diskless-sync-delay", "0", tcp=True)
    replica = Server(tmp_path / "b", "--replicaof", f"127.0.0.1 {primary.port}", tcp=True)
    with contextlib.closing(primary), contextlib.closing(replica):
        storage, key = gateway.Storage(primary.url), gateway.StorageId(b"0123456789abcdef")
        storage.create(key, b"\x01a", 1000)

        def replicates() -> bool:
            """One that has just come, and has had nothing yet, counts for WAIT, too."""
            storage._run_all(b"", ("SET", "x", 1), ("WAIT", 1, 100))
            return any(int(offset) > 0 for _, _, offset in primary.call("ROLE")[2])

        wait_for(replicates, "a replica")
        assert storage.commit(key, b"\x01a", b"\x01b", 1000) is gateway.Commit.DONE
        halt(replica.process.pid)
        started = time.monotonic()
        with pytest.raises(gateway.Unavailable, match="second copy"):
            storage.commit(key, b"\x01b", b"\x01c", 1000)
        assert 0.1 <= time.monotonic() - started < 1 * shared()
        with pytest.raises(
            gateway.Unavailable, match="second copy"
        ):  # the end of a number's proofs
            storage.create(gateway.StorageId(b"ended"), b"1", 1000, copied=True)
        storage.create(gateway.StorageId(b"a new session"), b"1", 1000)
        assert storage.commit(key, b"\x01c", b"\x01d") is gateway.Commit.DONE  # nothing to wait for
        replica.process.send_signal(signal.SIGCONT)
        replica.kill()
        wait_for(lambda: not primary.call("ROLE")[2], "the replica's end")
        assert storage.commit(key, b"\x01d", b"\x01e", 1000) is gateway.Commit.DONE


def test_no_write_is_repeated_after_it_timed_out(tmp_path: Path) -> None:
    with contextlib.closing(Server(tmp_path / "s")) as server:
        storage = gateway.Storage(server.url)
        assert take(storage, 1.7e9, 9, b"a") == 0
        halt(server.process.pid)
        with pytest.raises(gateway.Unavailable):
            take(storage, 1.7e9, 9, b"b")
        server.process.send_signal(signal.SIGCONT)
        assert take(storage, 1.7e9, 9, b"c") == 0
        assert int(server.call("GET", HOUR)) == (1_700_000_000 + 3 * 400) * 10**6
        assert b"cmdstat_hset:calls=3," in server.call("INFO", "commandstats")
        # Nobody knew whether it was counted: it is given back, and nothing else is.
        give_back(storage, 1.7e9, 9, b"b")
        give_back(storage, 1.7e9, 9, b"b")
        assert names_taken(storage) == {b"a", b"c"}
        assert int(server.call("GET", HOUR)) == (1_700_000_000 + 2 * 400) * 10**6


def test_a_restart_is_not_noticed_by_who_asks_later(tmp_path: Path) -> None:
    """Every connection is stale then; not even a write that cannot be repeated fails."""
    with contextlib.closing(Server(tmp_path / "s", "--appendonly", "yes")) as server:
        storage = gateway.Storage(server.url)
        assert take(storage, 1.7e9, 9, b"a") == 0
        server.kill()
        server.start()
        wait_for(lambda: server.call("PING"), "its data")
        assert take(storage, 1.7e9, 9, b"b") == 0
        assert names_taken(storage) == {b"a", b"b"}


# -- The start -----------------------------------------------------------------


def check(server: Server, *options: str) -> list[str]:
    return gateway.Storage(server.url).check()


def test_refused_a_server_that_is_too_old() -> None:
    """Redis 6.2 does not know scripts that begin with #!lua; Debian has none so old any more."""
    storage = gateway.Storage("unix:///nowhere")
    with pytest.raises(gateway.StartError, match=r"Redis 6\.2\.14; Redis 7\.0 or newer.*upgrade"):
        storage._problems({"redis_version": "6.2.14"})
    assert storage._problems({"redis_version": "7.0.0"}) == []
    assert storage._problems({"redis_version": "7.2.4", "valkey_version": "9.1.2"}) == []
    assert storage._problems({"redis_version": "10.0.0"}) == []


@pytest.mark.parametrize("policy", ["allkeys-lru", "allkeys-random", "volatile-random"])
def test_eviction_of_verified_users_is_warned_of(tmp_path: Path, policy: str) -> None:
    options = ("--maxmemory-policy", policy, "--appendonly", "yes")
    with contextlib.closing(Server(tmp_path / "s", *options)) as server:
        (warning,) = check(server)
        assert policy in warning
        assert "noeviction" in warning


def test_what_expires_soonest_is_used_nonces(tmp_path: Path) -> None:
    """volatile-ttl once was our own advice: whoever fills the store could replay a request."""
    options = ("--maxmemory-policy", "volatile-ttl", "--appendonly", "yes")
    with contextlib.closing(Server(tmp_path / "s", *options)) as server:
        (warning,) = check(server)
        assert "used nonces" in warning
        server.call("CONFIG", "SET", "maxmemory", "4mb")
        storage, key = gateway.Storage(server.url), gateway.StorageId(b"k" * 16)
        server.call("SET", key, b"record")  # for ever, and so it stays
        assert storage.commit(key, b"record", b"record", -1, "n", 60) is gateway.Commit.DONE
        assert storage.commit(key, b"record", b"record", -1, "n", 60) is gateway.Commit.REPLAYED
        for n in range(100_000):
            if not server.call("EXISTS", gateway.nonce_key(key, "n")):
                break
            storage.create(gateway.StorageId(n.to_bytes(16, "big")), bytes(9000), 10_000)
        assert storage.commit(key, b"record", b"record", -1, "n", 60) is gateway.Commit.DONE


def test_no_warning_of_what_is_right(tmp_path: Path) -> None:
    options = ("--maxmemory-policy", "noeviction", "--appendonly", "yes")
    with contextlib.closing(Server(tmp_path / "s", *options)) as server:
        assert check(server) == []


def test_no_persistence_is_warned_of(tmp_path: Path) -> None:
    with contextlib.closing(Server(tmp_path / "s")) as server:
        (warning,) = check(server)
        assert "appendonly yes" in warning


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--replicaof", "127.0.0.1 1"), "read-only replica"),
        (("--requirepass", "secret-of-ours"), "refuses our login"),
        (("--cluster-enabled", "yes"), "redis\\+cluster"),
    ],
)
def test_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], said: str
) -> None:
    monkeypatch.setattr(gateway, "STORE_START_S", 0.2)
    with contextlib.closing(Server(tmp_path / "s", *options)) as server:
        with pytest.raises(gateway.StartError, match=said) as caught:
            check(server)
        assert "secret-of-ours" not in str(caught.value)


def test_a_full_store_is_warned_of(tmp_path: Path) -> None:
    """Whoever is in it is served on."""
    options = ("--appendonly", "yes", "--maxmemory", "1")
    with contextlib.closing(Server(tmp_path / "s", *options)) as server:
        (warning,) = check(server)
        assert "is full" in warning


@pytest.mark.parametrize("command", ["ROLE", "EVAL", "DBSIZE"])
def test_a_start_names_the_command_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """Proxies and hosted stores leave some out: not a word of it was said, but "try again"."""
    monkeypatch.setattr(gateway, "STORE_START_S", 0.2)
    with (
        contextlib.closing(Server(tmp_path / "s", "--rename-command", command, "")) as server,
        pytest.raises(gateway.StartError, match=f"cannot be used: unknown command.*{command}"),
    ):
        check(server)


def test_a_name_that_means_another_server_by_now(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A name or a proxy in front of the primary: an old link to what is a replica now is left."""
    place = tmp_path / "place"
    with (
        contextlib.closing(Server(tmp_path / "a", "--appendonly", "yes")) as first,
        contextlib.closing(Server(tmp_path / "b", "--appendonly", "yes")) as second,
    ):
        place.symlink_to(tmp_path / "a" / "s")
        storage = gateway.Storage(f"unix://{place}")
        storage.create(gateway.StorageId(b"1" * 16), b"record", 1000)
        first.call("REPLICAOF", "127.0.0.1", "1")
        place.unlink()
        place.symlink_to(tmp_path / "b" / "s")
        with pytest.raises(gateway.Unavailable):
            storage.create(gateway.StorageId(b"2" * 16), b"record", 1000)
        storage.create(gateway.StorageId(b"3" * 16), b"record", 1000)
        assert second.call("KEYS", "*") == [b"3" * 16]
    assert "ReadOnlyError on SET" in caplog.text


def test_the_log_says_what_a_server_calls_its_trouble(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = ("--min-replicas-to-write", "1")
    with contextlib.closing(Server(tmp_path / "s", *options)) as server:
        with pytest.raises(gateway.Unavailable):
            gateway.Storage(server.url).create(gateway.StorageId(b"1" * 16), b"record", 1000)
        assert "storage: NOREPLICAS on SET" in caplog.text


def test_refused_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "STORE_START_S", 0.2)
    for url in ("unix:///nowhere", f"redis://u:pw@127.0.0.1:{servers.free_port()}",
                f"redis+cluster://u:pw@127.0.0.1:{servers.free_port()}",
                f"redis+sentinel://u:pw@127.0.0.1:{servers.free_port()}/s"):  # fmt: skip
        with pytest.raises(gateway.StartError, match="cannot be used") as caught:
            gateway.Storage(url).check()
        assert "pw" not in str(caught.value)


def test_the_start_waits_for_a_store_that_is_on_its_way(tmp_path: Path) -> None:
    storage, warnings = gateway.Storage(f"unix://{tmp_path}/s/s"), list[list[str]]()
    early = Thread(target=lambda: warnings.append(storage.check()))
    early.start()
    assert early.is_alive()
    with contextlib.closing(Server(tmp_path / "s", "--appendonly", "yes")):
        early.join()
    assert warnings == [[]]


ACL = (
    "user gateway on >pass-word ~* -@all +get +mget +set +del +exists +incr +expire +hget +hset "
    "+hdel +hgetall +hincrby +zadd +zcard +zscore +zincrby +zpopmin +zrange +time +eval +info "
    "+dbsize +role +wait"
)
"""notebooks/operate/store.md names the same commands."""


def test_a_user_with_few_rights_is_enough(tmp_path: Path) -> None:
    with contextlib.closing(Server(tmp_path / "s", "--appendonly", "yes")) as server:
        server.call("ACL", "SETUSER", *ACL.split()[1:])
        server.call("ACL", "SETUSER", "default", "off")
        storage = gateway.Storage(server.url.replace("://", "://gateway:pass-word@"))
        assert storage.check() == []
        key = gateway.StorageId(b"0123456789abcdef")
        storage.create(key, b"\x01a", 1000)
        assert storage.commit(key, b"\x01a", b"\x01b", 1000, "n", 60) is gateway.Commit.DONE
        assert storage.commit(key, b"\x01b", b"", -1, "m", 60) is gateway.Commit.DONE
        settings = gateway.Settings(keys_dir=str(tmp_path), sends_per_hour=2)
        limits = gateway.Limits(storage, settings, bytes(32), time.time)
        to = gateway.Msisdn("+447700900123"), "GB", "198.51.100.7"
        payments = gateway.Payments(limits, "session", *to, os.urandom)
        payments.use()
        payments.give_back(payments.use())
        with pytest.raises(gateway.TooManyMessages):
            [payments.use() for _ in range(2)]
        limits.pay_back("session", gateway.Msisdn("+447700900123"))
        payments.undo()
        assert storage.keep_part(key, 2, b"b") == {2: b"b"}
        assert storage.keep_part(key, 1, b"a") == {1: b"a", 2: b"b"}
        storage.ping(1)
        assert storage.tally_by_prefix("verified") == {"+44770090": 1}
        with pytest.raises(gateway.StartError, match="refuses our login") as caught:
            gateway.Storage(server.url.replace("://", "://gateway:wrong-word@")).check()
        assert "wrong-word" not in str(caught.value)
    named = {word for word in ACL.split() if word.startswith("+")}
    assert named <= set(
        (ROOT / "notebooks/operate/store.md").read_text("utf-8").replace("`", " ").split()
    )


@pytest.mark.parametrize(
    "url",
    ["http://h", "redis:/h", "redis://", "redis+cluster://", "redis+sentinel://h:1",
     "redis+sentinel://h:1/", "redis+other://h", "localhost:6379", "valkey://h"],
)  # fmt: skip
def test_refused_settings(url: str) -> None:
    with pytest.raises(gateway.SettingsError, match="storage_url"):
        gateway.Settings(storage_url=url)


@pytest.mark.parametrize(
    "url",
    ["redis://h:port", "redis://h?socket_timeout=soon", "redis://h?colour=red",
     "redis+cluster://h:1,g:port", "redis+sentinel://h:x/s"],
)  # fmt: skip
def test_refused_urls(url: str) -> None:
    with pytest.raises(gateway.SettingsError, match="storage_url"):
        gateway.Storage(url)


@pytest.mark.parametrize(
    "url",
    ["redis://user:pass-word@h:1/2", "rediss://:pass-word@h", "unix:///s?password=pass-word",
     "redis+sentinel://u:pass-word@a:1,b/s?sentinel_password=pass-word"],
)  # fmt: skip
def test_no_password_is_shown(url: str) -> None:
    shown = gateway.Settings(storage_url=url).shown("storage_url")
    assert "pass-word" not in shown
    assert "…" in shown


def test_a_gateway_says_what_is_wrong_with_its_store(
    tmp_path: Path, start_gateway: Callable[..., Any]
) -> None:
    with contextlib.closing(Server(tmp_path / "s", "--maxmemory-policy", "allkeys-lru")) as server:
        running = start_gateway("--storage-url", server.url)
        assert "WARNING" in running.output
        assert "allkeys-lru" in running.output


# -- The command that measures -------------------------------------------------


def measure(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "gateway.py"), "memory", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("binary", "most"),
    [
        ("", {"registered": 120, "pending": 195, "verified": 150}),
        *([(servers.DEBIAN_REDIS, {"registered": 190, "pending": 260, "verified": 235})]
          if servers.DEBIAN_REDIS else []),
    ],
)  # fmt: skip
def test_what_a_user_costs(tmp_path: Path, binary: str, most: dict[str, int]) -> None:
    """With 12,500 users, which fill tables as 16 times as many do: means depend on that."""
    with contextlib.closing(Server(tmp_path / "s", binary=binary)) as server:
        done = measure("--users", "12500", "--storage-url", server.url)
        assert server.call("DBSIZE") == 0
    assert done.returncode == 0, done.stderr
    told = {words[0]: int(words[1]) for line in done.stdout.splitlines()
            if len(words := line.split()) == 2 and words[0] in most}  # fmt: skip
    assert told.keys() == most.keys()
    # What the server needs for itself lies on fewer users here than the 200,000 of the issue.
    assert all(told[state] <= most[state] + 6 for state in most), told
    assert "100%" in done.stderr
    assert "1216" in done.stdout
    assert "60,000,000" in done.stdout


def test_memory_measures_in_a_store_of_its_own(tmp_path: Path) -> None:
    done = measure("--users", "100", "--data-dir", str(tmp_path / "data"))
    assert done.returncode == 0
    assert "Valkey" in done.stdout
    assert not (tmp_path / "data").exists()


def test_memory_refuses_what_is_not_empty(tmp_path: Path) -> None:
    with contextlib.closing(Server(tmp_path / "s")) as server:
        server.call("SET", "somebody", "else")
        done = measure("--users", "100", "--storage-url", server.url)
        assert server.call("KEYS", "*") == [b"somebody"]
    assert done.returncode == 1
    assert "empty" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("users", ["0", "-1", "many"])
def test_memory_refuses_an_impossible_number(users: str) -> None:
    assert measure("--users", users).returncode == 2
