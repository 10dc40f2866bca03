"""One suite for every store that can stand behind the gateway, all of them real."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import lab
import provider
import pytest
import servers
from redis.crc import key_slot
from support import HOUR, NUMBER, OPEN, WsgiClient, give_back, names_taken, take

import gateway
from gateway import Commit, SplitStorage, Storage, StorageId

BACKENDS = {
    "embedded": True,
    "redis": servers.WANTED["Debian's redis-server"][0],
    "cluster": True,
    "sentinel": True,
    "dynalite": servers.WANTED["dynalite"][0],
    "moto": servers.WANTED["moto"][0],
}
CLOCK = 1_700_000_000.0
HERE, OTHER = "198.51.100.7", "+447700900456"
OLD, NEW = b"\x01old", b"\x01new"


class Backend:
    """A store to test: makes storages and applications over it, each time an empty one."""

    def __init__(self, name: str, home: Any, certificates: str) -> None:
        self.name, self.home, self.certificates = name, home, certificates
        self.now_s = CLOCK

    def storage(self) -> Storage:
        settings = gateway.Settings(certificate_store=self.certificates)
        return gateway.open_storage(settings, self.home.url, lambda: self.now_s, os.urandom)

    def items(self, storage: Storage) -> list[bytes]:
        """The keys of all verified users in DynamoDB."""
        if not isinstance(storage, SplitStorage):
            return []
        found = storage.table._call("scan", ConsistentRead=True)["Items"]
        return [item["id"]["B"] for item in found if item["id"]["B"] != b"heartbeat"]


class Embedded:
    """The embedded store, as a backend."""

    def __init__(self, folder: Path) -> None:
        self.store = gateway.EmbeddedStore(str(folder))
        self.url, self.close = self.store.url, self.store.stop

    def flush(self) -> None:
        storage = Storage(self.url)
        storage._run("FLUSHALL")
        storage._run("SCRIPT", "FLUSH")


@pytest.fixture(scope="module", params=[name for name, there in BACKENDS.items() if there])
def home(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The name of a backend, its session store, and the certificate store if it has one."""
    name, folder = request.param, tmp_path_factory.mktemp("s")
    with contextlib.ExitStack() as stack:
        certificates = ""
        if name == "dynalite":
            stack.enter_context(servers.aws_credentials())
            dynalite = stack.enter_context(contextlib.closing(servers.Dynalite(folder / "d")))
            certificates = dynalite.store("phones")
            # On a busy machine it may stand still for longer than the gateway waits for a store.
            stack.enter_context(pytest.MonkeyPatch.context()).setattr(
                gateway, "STORAGE_TIMEOUT_S", 5.0
            )
        elif name == "moto":
            moto = pytest.importorskip("moto")
            stack.enter_context(servers.aws_credentials())
            stack.enter_context(moto.mock_aws())
            certificates = "dynamodb://phones?region=eu-west-1"
        made: Any
        if name == "cluster":
            made = servers.Cluster(folder)
        elif name == "sentinel":
            made = servers.SentinelGroup(folder)
        elif name == "redis":
            made = servers.Single(folder, servers.DEBIAN_REDIS or "")
        else:
            made = Embedded(folder)
        stack.callback(made.close)
        if certificates:
            servers.make_table(gateway.DynamoTable(certificates, time.time))
            Backend(name, made, certificates).storage().check()
        yield name, made, certificates


@pytest.fixture
def backend(home: Any) -> Backend:
    """A backend whose stores are empty and whose scripts are forgotten."""
    name, made, certificates = home
    backend = Backend(name, made, certificates)
    made.flush()
    if certificates:
        storage = backend.storage()
        assert isinstance(storage, SplitStorage)
        for key in backend.items(storage):
            storage.table.delete(key)
    return backend


@pytest.fixture
def storage(backend: Backend) -> Storage:
    return backend.storage()


@pytest.fixture
def make(backend: Backend, keys_dir: str, tmp_path: Path) -> Callable[..., WsgiClient]:
    """A client of an application over the backend: ``make(code_tries=5)``."""

    def build(**options: Any) -> WsgiClient:
        given: dict[str, Any] = {
            "certificate_store": backend.certificates,
            "clock": lambda: backend.now_s,
        }
        given |= {"keys_dir": keys_dir, "data_dir": str(tmp_path), **OPEN}
        given |= options
        injected = {name: given.pop(name) for name in ("clock", "random_bytes") if name in given}
        app = gateway.create_app(gateway.Settings(**given), backend.home.url, **injected)
        if app.gateway.sms.outbox:
            app.gateway.sms.outbox.console = None
        return WsgiClient(app)

    return build


def new_id() -> StorageId:
    return StorageId(os.urandom(16).replace(b"{", b"[").replace(b"}", b"]"))


def public_key() -> Any:
    return gateway.public_key_json(KEY.public_key())


KEY = gateway.generate_key("RS128")


def life_s(storage: Storage, key: bytes) -> int:
    return int(storage._run("TTL", key, key=key))


# -- Get, compare-and-set, delete ----------------------------------------------


def test_a_record_is_written_read_changed_and_deleted(storage: Storage) -> None:
    key = new_id()
    assert storage.get(key) is None
    storage.create(key, OLD, 1000)
    assert storage.get(key) == OLD
    assert storage.commit(key, OLD, NEW, -1, "a", 60) is Commit.DONE
    assert storage.get(key) == NEW
    assert 900 < life_s(storage, key) <= 1000
    assert storage.commit(key, NEW, b"", -1, "b", 60) is Commit.DONE
    assert storage.get(key) is None


def test_a_verified_record_has_a_new_life(storage: Storage, backend: Backend) -> None:
    key = new_id()
    storage.create(key, OLD, 1000)
    assert storage.commit(key, OLD, NEW, 5000, "a", 60) is Commit.DONE
    assert 4900 < life_s(storage, key) <= 5000
    kept = storage.get(key)
    assert kept == NEW
    assert storage.commit(key, kept, kept, -1, "b", 60) is Commit.DONE
    assert 4900 < life_s(storage, key) <= 5000
    assert len(backend.items(storage)) == bool(backend.certificates)


def test_a_life_of_0_is_for_ever(storage: Storage) -> None:
    key = new_id()
    storage.create(key, OLD, 1000)
    assert storage.commit(key, OLD, NEW, 0, "a", 60) is Commit.DONE
    assert life_s(storage, key) == -1
    assert storage.get(key) == NEW


@pytest.mark.parametrize("ttl_s", [-1, 5000, 0])
@pytest.mark.parametrize("new", [OLD, NEW, b""])
def test_refused_another_record(storage: Storage, backend: Backend, ttl_s: int, new: bytes) -> None:
    key = new_id()
    storage.create(key, OLD, 1000)
    assert storage.commit(key, b"\x01stale", new, ttl_s, "a", 60) is Commit.CHANGED
    assert storage.get(key) == OLD
    assert storage.commit(key, OLD, OLD, -1, "a", 60) is Commit.DONE, "the nonce was kept"
    assert backend.items(storage) == []


@pytest.mark.parametrize("ttl_s", [-1, 5000, 0])
@pytest.mark.parametrize("new", [OLD, NEW, b""])
def test_refused_nobody_there(storage: Storage, backend: Backend, ttl_s: int, new: bytes) -> None:
    key = new_id()
    assert storage.commit(key, OLD, new, ttl_s, "a", 60) is Commit.GONE
    assert storage.get(key) is None
    assert backend.items(storage) == []


@pytest.mark.parametrize("ttl_s", [-1, 5000, 0])
@pytest.mark.parametrize("new", [OLD, NEW, b""])
def test_refused_a_nonce_again(storage: Storage, backend: Backend, ttl_s: int, new: bytes) -> None:
    key = new_id()
    storage.create(key, OLD, 1000)
    assert storage.commit(key, OLD, OLD, -1, "a", 60) is Commit.DONE
    assert storage.commit(key, OLD, new, ttl_s, "a", 60) is Commit.REPLAYED
    assert storage.get(key) == OLD
    assert 900 < life_s(storage, key) <= 1000
    assert backend.items(storage) == []


def test_of_many_at_once_one_wins(storage: Storage, backend: Backend) -> None:
    key, results = new_id(), list[Commit]()
    storage.create(key, OLD, 1000)

    def change(n: int) -> None:
        results.append(storage.commit(key, OLD, b"\x01%d" % n, 5000, str(n), 60))

    together(*(lambda n=n: change(n) for n in range(8)))
    assert sorted(r.name for r in results) == ["CHANGED"] * 7 + ["DONE"]
    assert len(backend.items(storage)) == bool(backend.certificates)
    assert storage.get(key) is not None


def together(*calls: Callable[[], Any]) -> None:
    """Run calls in threads that begin at the same moment; raise what one of them raised."""
    gate, raised = threading.Barrier(len(calls)), list[BaseException]()

    def run(call: Callable[[], Any]) -> None:
        try:
            gate.wait()
            call()
        except BaseException as error:  # for the test's own thread
            raised.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if raised:
        raise raised[0]


def test_messages_are_counted(storage: Storage) -> None:
    assert [take(storage, CLOCK + n, 3, b"%d" % n) for n in range(3)] == [0, 0, 0]
    assert take(storage, CLOCK + 3, 3, b"3") == 1197
    for _ in range(2):  # the one that is named goes, and no other
        give_back(storage, CLOCK + 3, 3, b"1")
    assert take(storage, CLOCK + 4, 3, b"4") == 0
    assert take(storage, CLOCK + 5, 3, b"5") == 1195
    assert take(storage, CLOCK + 1200, 3, b"6") == 0
    assert names_taken(storage) == {b"0", b"2", b"4", b"6"}
    assert 3590 < life_s(storage, HOUR) <= 3600


def test_scripts_that_a_server_forgot_are_sent_again(storage: Storage, backend: Backend) -> None:
    keys = [new_id() for _ in range(10)]
    for key in keys:
        storage.create(key, OLD, 1000)
        assert storage.commit(key, OLD, NEW) is Commit.DONE
    backend.home.flush()
    for key in keys:
        storage.create(key, OLD, 1000)
        assert storage.commit(key, OLD, NEW, 5000, "a", 60) is Commit.DONE


def test_a_ping_asks_every_node_whether_it_takes_writes(storage: Storage, backend: Backend) -> None:
    """By a script that may write, so that no key needs to be found for each of them."""

    def asked() -> list[int]:
        counts = [re.search(rb"cmdstat_eval:calls=(\d+)", text) for (text,) in
                  storage._run_everywhere(("INFO", "commandstats"))]  # fmt: skip
        return [int(count[1]) if count else 0 for count in counts]

    before = asked()
    storage.ping(CLOCK)
    assert asked() == [count + 1 for count in before]
    assert len(before) == (3 if backend.name == "cluster" else 1)


def test_what_is_kept_of_numbers_is_asked_where_it_is_kept(storage: Storage) -> None:
    """A question that is asked in another place of a cluster costs a second one (MOVED)."""

    def moved() -> int:
        found = [node.get("errorstat_MOVED", "count=0") for node in storage.info()]
        return sum(int(count.removeprefix("count=")) for count in found)

    before, keys = moved(), [gateway.StorageId(b"ended %d" % n) for n in range(50)]
    for key in keys:
        storage.create(key, b"1", 60)
    assert {storage.get(key) for key in keys} == {b"1"}
    assert moved() == before


def test_it_is_fit_to_start_with(storage: Storage) -> None:
    storage.check()


def test_another_master_secret_is_refused(storage: Storage) -> None:
    """Otherwise all users there would be unknown, and nobody would know why."""
    for master in (b"a" * 32, b"", b"a" * 32):
        storage.check(master)
    with pytest.raises(gateway.StartError, match=r"another master secret.*keys_dir"):
        storage.check(b"b" * 32)
    assert b"a" * 8 not in storage._run("GET", b"mark", key=b"mark")
    storage.check(b"a" * 32)


def test_no_test_is_skipped_in_silence() -> None:
    missing = [name for name, there in BACKENDS.items() if not there]
    assert bool(servers.left_out()) == bool(missing)


def test_the_nonce_lies_in_the_slot_of_its_record() -> None:
    """For every storage id, whatever its bytes; 100,000 of them."""
    secrets = gateway.Secrets.derive(bytes(32))
    for n in range(100_000):
        key = secrets.id_for(gateway.HawkId(f"{n:064x}"))
        assert key_slot(key) == key_slot(gateway.nonce_key(key, str(n))), key.hex()


# -- The whole protocol --------------------------------------------------------


def test_a_user_goes_the_whole_way(make: Callable[..., WsgiClient], backend: Backend) -> None:
    client = make()
    client.register()
    assert client.ask().status == 200
    code = client.code()
    wrong = code[:-1] + ("1" if code[-1] == "0" else "0")
    assert client.call("/sms/verify_code", {"code": wrong}).errno == 105
    assert client.call("/sms/verify_code", {"code": "1" * 32}).errno == 107  # not of its kind
    assert client.call("/certificate/sign", {"publicKey": public_key()}).errno == 104
    answer = client.call("/sms/verify_code", {"code": code, "publicKey": public_key()})
    assert (answer.status, "cert" in answer.json) == (200, True)
    assert client.call("/sms/verify_code", {"code": code}).errno == 111
    for _ in range(3):
        assert client.call("/certificate/sign", {"publicKey": public_key()}).status == 200
    storage = client.gateway.storage
    assert len(backend.items(storage)) == bool(backend.certificates)
    # Once more, for the same number; while its code waits, the user stays verified.
    assert client.call("/sms/resend_code").status == 200
    assert client.call("/certificate/sign", {"publicKey": public_key()}).status == 200
    backend.now_s += 1
    assert client.call("/sms/verify_code", {"code": client.code()}).status == 200
    assert len(backend.items(storage)) == bool(backend.certificates)
    assert client.call("/certificate/sign", {"publicKey": public_key()}, nonce="n").status == 200
    assert client.call("/certificate/sign", {"publicKey": public_key()}, nonce="n").errno == 109
    assert client.call("/unregister").status == 204
    assert client.call("/certificate/sign", {"publicKey": public_key()}).errno == 110
    assert client.call("/unregister").errno == 110
    assert backend.items(storage) == []


def test_a_message_that_costs_money(make: Callable[..., WsgiClient], backend: Backend) -> None:
    """Every kind of key that limits, webhooks and the lists of numbers keep, on every store."""
    with provider.Provider(provider.taken) as vonage:
        client = make(
            sms_providers=[vonage.nexmo(receipts=True)], sends_per_hour=5,
            sms_inbound=[{"kind": "nexmo", "path_secret": "s"}], registers_per_address="4/minute",
            sends_per_number="5/day",
        )  # fmt: skip
        storage, limits, away = client.gateway.storage, client.gateway.limits, {"REMOTE_ADDR": HERE}

        def register() -> WsgiClient:
            one = client.another()
            one.register()
            return one

        def level(row: str, who: str) -> float:
            (counter,) = limits.counters({row: who}, "GB")
            at_rest_us = int(storage._run("GET", counter.key, key=counter.key) or 0)
            return max(0, at_rest_us - backend.now_s * 1e6) / counter.cost_us

        def tally(outcome: str) -> dict[bytes, bytes]:
            key = b"{limits}" + outcome.encode()
            pairs = storage._run("HGETALL", key, key=key)
            return dict(zip(pairs[::2], pairs[1::2], strict=True))

        for n in range(5):
            status = client.call("/register", signed=False, environ=away).status
            assert status == (429 if n == 4 else 200)
        one = register()
        # Taken, given back, taken by a phone's SMS in two parts, and paid back.
        vonage.answer = provider.nexmo("5")
        assert one.call("/sms/mt/verify", {"msisdn": NUMBER}, environ=away).errno == 201
        assert (level("h", ""), level("n", NUMBER)) == (0, 0)
        vonage.answer = provider.taken
        assert one.credentials
        text = one.credentials.hawk_id
        for n, half in enumerate((text[:32], text[32:])):
            fields = {"msisdn": NUMBER[1:], "messageId": f"0B{n}", "text": half}
            part = {"concat-ref": "1", "concat-part": str(n + 1), "concat-total": "2"}
            query = urlencode({"provider": "nexmo", **fields, **part})
            assert one.get(f"/sms/momt/s?{query}").status == 200
        assert len(vonage.received) == 2
        assert level("n", NUMBER) == pytest.approx(1, abs=0.001)
        receipt = urlencode({"provider": "nexmo", "messageId": "0A0", "status": "delivered"})
        assert one.get(f"/sms/receipt/s?{receipt}").status == 200
        assert one.call("/sms/verify_code", {"code": vonage.texts()[NUMBER][-1]}).status == 200
        assert level("n", NUMBER) == 0
        assert level("h", "") == pytest.approx(1, abs=0.001)
        # The hour is warned of at 50, 80 and 100 %, and full.
        for n in range(5):
            asked = register().ask(f"+4477009001{n:02}")
            assert (asked.status, n) == ((200, n) if n < 4 else (429, 4))
        for percent in (b"50", b"80", b"100"):
            key = limits.key("h", "") + percent
            assert storage._run("EXISTS", key, key=key) == 1
        assert tally("sent")[b"GB"] == b"5"
        assert tally("refused")[b"GB h"] == tally("verified")[b"GB"] == b"1"
        # A blocked number is refused, whatever the hour says; then all proofs of one end.
        blocked = client.gateway.secrets.key_for("blocked", gateway.Msisdn(OTHER))
        storage.create(blocked, b"", 0)
        assert register().ask(OTHER).errno == 107
        assert one.call("/certificate/sign", {"publicKey": public_key()}).status == 200
        ended = client.gateway.secrets.key_for("ended", gateway.Msisdn(NUMBER))
        storage.create(ended, b"%d" % backend.now_s, 1000)
        assert one.call("/certificate/sign", {"publicKey": public_key()}).errno == 104


def test_a_message_that_nobody_took_changes_nothing(
    make: Callable[..., WsgiClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = make().verified()
    outbox = client.gateway.sms.outbox
    assert outbox
    with monkeypatch.context() as broken:
        broken.setattr(outbox, "folder", Path("/dev/null/outbox"))
        assert client.call("/sms/resend_code").errno == 201
    assert client.call("/certificate/sign", {"publicKey": public_key()}).status == 200
    assert client.call("/sms/verify_code", {"code": "123456"}).errno == 111
    assert client.call("/sms/resend_code").status == 200
    assert client.call("/sms/verify_code", {"code": client.code()}).status == 200


def test_a_first_message_that_nobody_took_leaves_the_number_free(
    make: Callable[..., WsgiClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Record, count and number are as before it was asked for."""
    client = make()
    client.register()
    assert client.credentials
    storage, outbox = client.gateway.storage, client.gateway.sms.outbox
    key = client.gateway.secrets.id_for(client.credentials.hawk_id)
    before = storage.get(key)
    with monkeypatch.context() as broken:
        broken.setattr(outbox, "folder", Path("/dev/null/outbox"))
        assert client.ask().errno == 201
    assert storage.get(key) == before
    assert client.ask("+447700900124").status == 200
    assert client.ask(NUMBER).errno == 107


def test_unregister_forgets_who_waits_for_another_code(
    make: Callable[..., WsgiClient], backend: Backend
) -> None:
    client = make().verified()
    assert client.call("/sms/resend_code").status == 200
    code = client.code()
    assert client.call("/unregister").status == 204
    assert client.call("/sms/verify_code", {"code": code}).errno == 110
    assert backend.items(client.gateway.storage) == []


def test_a_heartbeat(make: Callable[..., WsgiClient]) -> None:
    assert make().get("/__heartbeat__").json == {"storage": True, "sms": True}


def test_memory_is_measured_and_left_empty(backend: Backend) -> None:
    """Also in a store that was emptied just now, whose tables shrink only a little later."""
    storage, steps = Storage(backend.home.url), list[float]()
    exact = backend.name in ("embedded", "redis")  # a busy cluster's own needs blur so few users
    keys = [b"%d" % n for n in range(60_000 if exact else 600)]
    lab.load_store(storage, [(key, ("SET", key, "x", "EX", 99)) for key in keys])
    lab.load_store(storage, [(key, ("DEL", key)) for key in keys])
    used = lab.measure_memory(storage, gateway.Settings(), 2000, CLOCK, steps.append)
    if exact:
        assert 90 < used.registered < used.verified < used.pending < 400
    assert used.curve[0][0] == 0
    assert used.curve[-1][0] == used.users == 2000
    assert steps == sorted(steps)
    assert steps[-1] == 1
    assert all(node["dbsize"] == "0" for node in storage.info())


def test_memory_refuses_a_store_that_is_not_empty(backend: Backend) -> None:
    storage, key = Storage(backend.home.url), new_id()
    storage.create(key, OLD, 1000)
    with pytest.raises(gateway.StartError, match="empty"):
        lab.measure_memory(storage, gateway.Settings(), 2000, CLOCK)
    assert storage.get(key) == OLD
