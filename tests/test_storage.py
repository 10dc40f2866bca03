"""What is kept, for how long, by whom it can be read, and what happens when the store fails."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import itertools
import math
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
from hypothesis import example, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from support import NUMBER, WsgiClient

import gateway
from gateway import Commit, StorageId

ID = StorageId(bytes(range(16)))
KEY = gateway.HawkKey(b"k" * 32)


def until(check: Callable[[], Any], timeout_s: float = 10) -> Any:
    """Poll until ``check`` gives something true; what it gave."""
    deadline = time.monotonic() + timeout_s
    while not (found := check()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)
    return found


def contents(storage: gateway.Storage) -> dict[bytes, Any]:
    """Every key and its value."""
    found: dict[bytes, Any] = {}
    for key in storage._run("KEYS", "*"):
        listed = storage._run("TYPE", key) == b"list"
        found[key] = storage._run("LRANGE", key, 0, -1) if listed else storage._run("GET", key)
    return found


def together(count: int, call: Callable[[int], Any]) -> list[Any]:
    """``call(0)`` to ``call(count - 1)`` in threads that start at one moment."""
    barrier = threading.Barrier(count)

    def one(number: int) -> Any:
        barrier.wait(20)
        return call(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """For races of many threads on a busy machine: slow is not gone."""
    monkeypatch.setattr(gateway, "STORAGE_TIMEOUT_S", 20.0)


@pytest.fixture
def own_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[gateway.EmbeddedStore]:
    """An embedded server that a test may stop, kill and look into."""
    store = gateway.EmbeddedStore(str(tmp_path_factory.mktemp("own")))
    yield store
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid_of(store), signal.SIGCONT)
    store.stop()


def pid_of(store: gateway.EmbeddedStore) -> int:
    """The server's process."""
    assert store._process
    return store._process.pid


# -- The record ---------------------------------------------------------------

BYTES_32 = st.binary(min_size=32, max_size=32) | st.just(bytes(32)) | st.just(b"k" + bytes(31))
MOMENTS = st.integers(0, 2**32 - 1)
NETWORKS = st.builds(
    gateway.parse_network,
    st.none() | st.from_regex("[0-9]{3}", fullmatch=True),
    st.none() | st.from_regex("[0-9]{2,3}", fullmatch=True),
)
USERS = st.builds(
    gateway.User,
    hawk_key=BYTES_32.map(gateway.HawkKey),
    long=st.booleans(),
    by_phone=st.booleans(),
    sealed=st.just(b"") | st.binary(min_size=24, max_size=24).filter(any),
    network=NETWORKS,
    sends=st.integers(0, 255),
    code_expires_s=MOMENTS,
    verified_s=MOMENTS,
    code_digest=st.just(b"") | st.binary(min_size=16, max_size=16).filter(any),
    tries=st.integers(0, 10),
    tried=st.integers(0, 2**16 - 1),
)


@given(USERS)
@example(gateway.User(gateway.HawkKey(bytes(32))))
@example(gateway.User(KEY, network=gateway.Network("000")))
@example(gateway.User(KEY, sealed=b"s" + bytes(23), code_digest=b"d" + bytes(15)))
@examples(max_examples=100, deadline=None)
def test_record_round_trip(user: gateway.User) -> None:
    """Also when key, number or digest end in zero bytes; never more than 96 bytes."""
    packed = user.pack()
    assert gateway.User.unpack(packed) == user
    assert len(packed) <= 96
    assert packed[0] == gateway.RECORD_VERSION


def test_networks_that_look_alike_differ() -> None:
    """``7`` is no MNC; ``07`` and ``007`` are two."""
    mncs = [""] + [f"{n:02}" for n in range(100)] + [f"{n:03}" for n in range(1000)]
    packed = {gateway.Network(mcc, mnc).pack() for mcc in ("001", "234", "999") for mnc in mncs}
    assert len(packed) == 3 * 1101


@pytest.mark.parametrize("end", [b"", bytes(3), bytes(32)], ids=["full", "3 zeros", "all zeros"])
def test_record_sizes(end: bytes) -> None:
    """What a user costs: 34 bytes registered, 89 waiting for a code, never more than 96."""
    registered = gateway.User(gateway.HawkKey((b"k" * 32 + end)[-32:]))
    pending = registered._replace(
        long=True,
        by_phone=True,
        sealed=b"\xff" * 24,
        network=gateway.Network("999", "999"),
        sends=255,
        code_expires_s=2**32 - 1,
        code_digest=b"\xff" * 16,
        tries=9,
    )
    assert len(registered.pack()) <= 34
    assert len(pending.pack()) <= 89
    assert len(pending._replace(verified_s=2**32 - 1).pack()) <= 96


def test_record_sizes_in_the_store(client: WsgiClient, storage: gateway.Storage) -> None:
    """The same, measured on what a real flow writes."""

    def size() -> int:
        return max(len(v) for k, v in contents(storage).items() if len(k) == 16)

    client.register()
    assert size() <= 34
    client.call("/sms/mt/verify", {"msisdn": NUMBER, "mcc": "234", "mnc": "15"})
    client.call("/sms/verify_code", {"code": "x" * 6})
    assert size() <= 89
    client.call("/sms/verify_code", {"code": client.code()})
    assert size() <= 96


@given(st.binary(max_size=120) | st.binary(max_size=120).map(lambda rest: b"\1" + rest))
@example(b"")
@example(b"\1" * 96)
@example(b"\2" * 96)
@examples(max_examples=100, deadline=None)
def test_any_bytes_as_a_record(packed: bytes) -> None:
    """A user, or Unavailable; another error would be a 500 for ever after a downgrade."""
    try:
        assert gateway.User.unpack(packed).pack().rstrip(b"\0")
    except gateway.Unavailable:
        assert packed[:1] != b"\1" or len(packed) > 87


@pytest.mark.parametrize("length", [1, 34, 93, 96, 200])
def test_records_of_other_versions(
    client: WsgiClient, storage: gateway.Storage, length: int
) -> None:
    """503/201 and the record untouched: nobody is lost by an update that is taken back."""
    client.register()
    (key,) = contents(storage)
    for version in (0, 2, 255):
        record = bytes([version]) + b"\7" * (length - 1)
        storage._run("SET", key, record)
        for path in ("/sms/verify", "/certificate/sign", "/unregister"):
            answer = client.call(path, {"msisdn": NUMBER})
            assert (answer.status, answer.errno) == (503, 201)
        assert contents(storage) == {key: record}


# -- An exchange --------------------------------------------------------------

Ask = Callable[..., list[Any]]


@pytest.fixture
def ask(storage: gateway.Storage, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Exchange commands for answers, on a connection that gives up after a fifth of a second."""
    monkeypatch.setattr(gateway, "STORAGE_TIMEOUT_S", 0.2)
    storage = gateway.Storage(storage.url)

    def ask(*commands: Any, meanwhile: Any = None) -> list[Any]:
        with storage._connection(("", 6379)) as connection:
            return gateway.exchange(connection, *commands, meanwhile=meanwhile)

    return ask


def test_what_no_buffer_holds_is_sent_and_read(ask: Ask) -> None:
    large = os.urandom(3_000_000)
    assert ask(("SET", "large", large), ("GET", "large"), ("DEL", "large"))[1] == large


def test_an_error_among_answers_is_raised_and_leaves_none_to_others(ask: Ask) -> None:
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        ask(("SET", "text", "1"), ("LPUSH", "text", "2"), ("ECHO", "3"))
    assert ask(("ECHO", "4")) == [b"4"]


def test_a_refusal_keeps_the_connection(ask: Ask) -> None:
    """Else a full store would be asked for a TLS handshake by each request that it refuses."""
    own = ask(("CLIENT", "ID"))
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        ask(("SET", "text", "1"), ("LPUSH", "text", "2"))
    assert ask(("CLIENT", "ID")) == own


def test_a_late_answer_is_nobodys(ask: Ask) -> None:
    """It is to another question."""
    started = time.monotonic()
    with pytest.raises(redis.TimeoutError):
        ask(("BLPOP", "nothing", "3"))
    assert 0.19 < time.monotonic() - started < 2
    assert ask(("ECHO", "another")) == [b"another"]


def test_a_connection_that_was_closed_is_replaced_before_it_is_used(ask: Ask) -> None:
    (own,) = ask(("CLIENT", "ID"))
    ask(("CLIENT", "KILL", "ID", own, "SKIPME", "no"))
    assert ask(("CLIENT", "ID"))[0] > own


def test_a_connection_that_closes_in_the_middle_is_an_error(
    ask: Ask, storage: gateway.Storage
) -> None:
    """Also while other work is done; nobody can say what ran."""
    (own,) = ask(("CLIENT", "ID"))
    kill = partial(storage._run, "CLIENT", "KILL", "ID", own)
    with pytest.raises(redis.ConnectionError):
        ask(("BLPOP", "nothing", "3"), meanwhile=kill)
    assert ask(("ECHO", "1")) == [b"1"]


@pytest.mark.parametrize("size_bytes", [0, 1, 4000, 4096, 100_000])
def test_other_work_is_done_between_question_and_answer(
    ask: Ask, storage: gateway.Storage, size_bytes: int
) -> None:
    """By when the answer is there, whole or in part."""
    value, seen = os.urandom(size_bytes), list[bool]()
    commands = ("SET", "asked", value), ("GET", "asked")
    look = lambda: seen.append(until(lambda: storage._run("EXISTS", "asked")))  # noqa: E731
    assert ask(*commands, meanwhile=look) == [b"OK", value]
    assert seen == [True]


def test_what_is_not_there_after_other_work_is_waited_for(ask: Ask) -> None:
    assert ask(("BLPOP", "nothing", "0.1"), ("ECHO", "1"), meanwhile=int) == [None, b"1"]


def test_other_work_that_fails_leaves_no_answer_to_others(ask: Ask) -> None:
    with pytest.raises(ZeroDivisionError):
        ask(("ECHO", "1"), meanwhile=lambda: 1 // 0)
    assert ask(("ECHO", "2")) == [b"2"]


# -- Compare-and-set ----------------------------------------------------------


def life_s(storage: gateway.Storage, key: bytes = ID) -> float:
    """What is left of a key's life, in seconds; -1 for ever, -2 gone."""
    left_ms: int = storage._run("PTTL", key)
    return left_ms / 1000 if left_ms > 0 else left_ms


def nonces(storage: gateway.Storage) -> list[bytes]:
    """The keys of used nonces."""
    return [key for key in storage._run("KEYS", "*") if key.startswith(b"{")]


def test_done(storage: gateway.Storage) -> None:
    storage.create(ID, b"old", 100)
    assert storage.commit(ID, b"old", b"new", nonce="n", nonce_ttl_s=50) is Commit.DONE
    assert storage.get(ID) == b"new"
    (nonce,) = nonces(storage)
    assert 49 < life_s(storage, nonce) <= 50


@pytest.mark.parametrize(
    ("new", "nonce_ttl_s"), [(b"new", 0), (b"new", 50), (b"", 50), (b"old", 50)]
)
def test_gone_writes_nothing(storage: gateway.Storage, new: bytes, nonce_ttl_s: int) -> None:
    """Catches a compare with nothing that revives who has unregistered."""
    for old in (b"old", b""):
        result = storage.commit(ID, old, new, 7, nonce="n", nonce_ttl_s=nonce_ttl_s)
        assert result is Commit.GONE
        assert storage.get(ID) is None
    assert [key for key in contents(storage) if key == ID] == []


@pytest.mark.parametrize("old", [b"old", b"", b"presen", b"present\0"])
@pytest.mark.parametrize("ttl_s", [-1, 0, 7])
def test_changed_writes_nothing(storage: gateway.Storage, ttl_s: int, old: bytes) -> None:
    """Neither record nor nonce nor a life: the request may be computed anew, and then counts."""
    storage.create(ID, b"present", 100)
    for new in (b"new", b"", b"old", b"present"):
        assert storage.commit(ID, old, new, ttl_s, nonce="n", nonce_ttl_s=50) is Commit.CHANGED
        assert contents(storage) == {ID: b"present"}
        assert 99 < life_s(storage) <= 100
    assert storage.commit(ID, b"present", b"new", nonce="n", nonce_ttl_s=50) is Commit.DONE


@pytest.mark.parametrize("old", [b"old", b"other"])
@pytest.mark.parametrize("ttl_s", [-1, 0, 7])
def test_replayed_writes_nothing(storage: gateway.Storage, ttl_s: int, old: bytes) -> None:
    """Whatever else is right or wrong; the nonce lives no longer for it."""
    storage.create(ID, b"old", 100)
    storage.commit(ID, b"old", b"old", nonce="n", nonce_ttl_s=20)
    before = contents(storage)
    for new in (b"new", b"", b"old"):
        assert storage.commit(ID, old, new, ttl_s, nonce="n", nonce_ttl_s=50) is Commit.REPLAYED
        assert contents(storage) == before
        assert 99 < life_s(storage) <= 100
        assert life_s(storage, nonces(storage)[0]) <= 20


@pytest.mark.parametrize(
    ("born_s", "ttl_s", "low_s", "high_s"),
    [
        (100, -1, 99, 100),  # catches a SET without KEEPTTL: a session that lives for ever
        (100, 0, -1, -1),  # for ever
        (100, 500, 499, 500),
        (100, 1, 0, 1),
        (0, -1, -1, -1),
        (0, 500, 499, 500),
    ],
)
@pytest.mark.parametrize("new", [b"new", b"old"], ids=["changed", "the same"])
def test_life_of_a_record(
    storage: gateway.Storage, new: bytes, born_s: int, ttl_s: int, low_s: int, high_s: int
) -> None:
    """Kept, set or made endless, also when nothing else changes."""
    storage._run("SET", ID, b"old", *(("EX", born_s) if born_s else ()))
    assert storage.commit(ID, b"old", new, ttl_s) is Commit.DONE
    assert low_s <= life_s(storage) <= high_s


@pytest.mark.parametrize("ttl_s", [-1, 0, 50])
def test_delete(storage: gateway.Storage, ttl_s: int) -> None:
    """The record goes; the nonce stays, so that the request cannot come again."""
    storage.create(ID, b"old", 100)
    assert storage.commit(ID, b"old", b"", ttl_s, nonce="n", nonce_ttl_s=9) is Commit.DONE
    assert storage.get(ID) is None
    assert len(nonces(storage)) == 1


def test_life_passes(storage: gateway.Storage) -> None:
    """After it nonce and session are unknown; shortened in the store, not by another clock."""
    storage.create(ID, b"old", 100)
    storage.commit(ID, b"old", b"new", nonce="n", nonce_ttl_s=50)
    storage._run("PEXPIRE", nonces(storage)[0], 1)
    until(lambda: not nonces(storage))
    assert storage.commit(ID, b"new", b"newer", nonce="n", nonce_ttl_s=50) is Commit.DONE
    storage._run("PEXPIRE", ID, 1)
    until(lambda: storage.get(ID) is None)
    assert storage.commit(ID, b"newer", b"x", nonce="m", nonce_ttl_s=50) is Commit.GONE


def test_nonces_belong_to_a_session(storage: gateway.Storage) -> None:
    """Two clients may take the same nonce; without a life none is kept."""
    other = StorageId(b"o" * 16)
    for key in (ID, other):
        storage.create(key, b"old", 100)
        assert storage.commit(key, b"old", b"new", nonce="n", nonce_ttl_s=50) is Commit.DONE
        assert storage.commit(key, b"new", b"new", nonce="n", nonce_ttl_s=50) is Commit.REPLAYED
    for _ in range(2):
        assert storage.commit(ID, b"new", b"new", nonce="m", nonce_ttl_s=0) is Commit.DONE
    assert len(nonces(storage)) == 2


@pytest.mark.parametrize("nonce", ["", "n" * 4000, "\n", "}{", "ü", "{a}", " "])
def test_keys_of_nonces_are_small_and_differ(storage: gateway.Storage, nonce: str) -> None:
    """Clients choose nonces: what is kept of one is 30 bytes, whatever it is."""
    storage.create(ID, b"old", 100)
    for text in (nonce, nonce + "x"):
        assert storage.commit(ID, b"old", b"old", nonce=text, nonce_ttl_s=50) is Commit.DONE
        assert storage.commit(ID, b"old", b"old", nonce=text, nonce_ttl_s=50) is Commit.REPLAYED
    assert [len(key) for key in nonces(storage)] == [30, 30]


def test_script_cache_is_lost(storage: gateway.Storage) -> None:
    """A restarted or failed-over server knows no script: each works at once all the same."""
    storage.create(ID, b"0", 100)
    for number in range(3):
        storage._run("SCRIPT", "FLUSH")
        result = storage.commit(ID, b"%d" % number, b"%d" % (number + 1), -1, f"{number}", 50)
        assert result is Commit.DONE
        storage._run("SCRIPT", "FLUSH")
        assert storage.count_send(1.7e9, 9) == 0
    assert storage._run("LLEN", "sends") == 3
    assert len(nonces(storage)) == 3


def test_64_threads_race_for_one_record(storage: gateway.Storage, patient: None) -> None:
    """In each round exactly one wins, its record stands, and only its nonce is used up."""
    storage.create(ID, b"0", 100)
    now = b"0"
    for number in range(4):

        def attempt(thread: int, old: bytes = now, number: int = number) -> Commit:
            new = b"%d by %d" % (number, thread)
            return storage.commit(ID, old, new, -1, f"{number} {thread}", 50)

        results = together(64, attempt)
        assert results.count(Commit.DONE) == 1
        assert results.count(Commit.CHANGED) == 63
        now = b"%d by %d" % (number, results.index(Commit.DONE))
        assert storage.get(ID) == now
        assert len(nonces(storage)) == number + 1


def test_64_threads_race_with_one_nonce(storage: gateway.Storage, patient: None) -> None:
    """One request sent many times at once, and it changes nothing: one is served."""
    storage.create(ID, b"old", 100)
    results = together(64, lambda _: storage.commit(ID, b"old", b"old", -1, "n", 50))
    assert sorted(r.name for r in results) == ["DONE"] + ["REPLAYED"] * 63


def test_threads_race_delete_against_change(storage: gateway.Storage, patient: None) -> None:
    """Once deleted nothing brings the record back."""
    for number in range(4):
        storage.create(ID, b"old", 100)

        def attempt(thread: int, number: int = number) -> Commit:
            new = b"" if thread % 2 else b"new"
            return storage.commit(ID, b"old", new, -1, f"{number} {thread}", 50)

        results = together(16, attempt)
        assert results.count(Commit.DONE) == 1
        deleted = results.index(Commit.DONE) % 2
        assert storage.get(ID) == (None if deleted else b"new")
        assert results.count(Commit.GONE if deleted else Commit.CHANGED) == 15


# -- Counting messages --------------------------------------------------------


@given(
    limit=st.integers(1, 4),
    steps=st.lists(
        st.tuples(st.sampled_from([0, 1, 4, 7200, 14_399, 14_400, 14_401, 28_800]), st.booleans()),
        max_size=14,
    ),
)
@examples(max_examples=40, deadline=None)
def test_sliding_window(
    store: gateway.EmbeddedStore, limit: int, steps: list[tuple[int, bool]]
) -> None:
    """Against a list kept here: never more than ``limit`` in an hour, and no less.

    Gaps are quarters of a second; where a step says so, the message is taken back.
    """
    storage = gateway.Storage(store.url)
    storage._run("DEL", "sends")
    now, sent = 1_700_000_000.0, list[float]()
    for quarters, taken_back in steps:
        now += quarters / 4
        recent = [moment for moment in sent if moment > now - 3600]
        wait_s = storage.count_send(now, limit)
        if len(recent) < limit:
            assert wait_s == 0
            sent.append(now)
            if taken_back:
                storage.uncount_send()
                sent.pop()
        else:
            assert wait_s == math.ceil(recent[-limit] + 3600 - now)
            assert wait_s >= 1
    assert storage._run("LLEN", "sends") <= limit


@pytest.mark.parametrize("limit", [1, 10])
def test_threads_race_for_messages(storage: gateway.Storage, patient: None, limit: int) -> None:
    """Never more than the limit; all others are told how long to wait."""
    now = time.time()
    found = together(40, lambda _: [storage.count_send(now, limit) for _ in range(3)])
    waits = list(itertools.chain(*found))
    assert waits.count(0) == limit
    assert set(waits) == {0, 3600}
    assert storage._run("LLEN", "sends") == limit
    assert 3590 < life_s(storage, b"sends") <= 3600


def test_taking_back_makes_room_once(storage: gateway.Storage) -> None:
    """The newest goes, the older keep their time; of nothing nothing is taken back."""
    storage.uncount_send()
    assert [storage.count_send(1.7e9 + t, 2) for t in (0, 10, 20)] == [0, 0, 3580]
    storage.uncount_send()
    assert [storage.count_send(1.7e9 + t, 2) for t in (20, 30)] == [0, 3570]


def test_limit_that_was_changed(storage: gateway.Storage) -> None:
    """After a restart with other settings: lower holds at once, higher gives room."""
    assert [storage.count_send(1.7e9 + t, 3) for t in range(3)] == [0, 0, 0]
    assert storage.count_send(1.7e9 + 3, 1) == 3599
    assert storage.count_send(1.7e9 + 3, 4) == 0
    assert storage.count_send(1.7e9 + 3, 1_000_000) == 0


# -- A store that refuses -----------------------------------------------------


def calls_of(storage: gateway.Storage) -> list[Callable[[], Any]]:
    """Every method, once."""
    return [
        lambda: storage.get(ID),
        lambda: storage.create(ID, b"new", 9),
        lambda: storage.commit(ID, b"old", b"new", -1, "n", 9),
        lambda: storage.count_send(1.7e9, 9),
        lambda: storage.uncount_send(),
        lambda: storage.ping(1.7e9),
    ]


def is_unavailable_soon(call: Callable[[], Any]) -> bool:
    """Whether a call ends in ``Unavailable`` (and in nothing else) within a second."""
    started = time.monotonic()
    try:
        call()
    except gateway.Unavailable as error:
        assert (error.status, error.errno) == (503, 201)
        assert error.retry_after_s
        return time.monotonic() - started < 1
    return False


def test_full_server_writes_nothing(storage: gateway.Storage) -> None:
    """Catches a script that dies in its middle: nonce used up, record unchanged."""
    storage.create(ID, b"old", 100)
    before = contents(storage)
    limit = storage._run("CONFIG", "GET", "maxmemory")[1]
    storage._run("CONFIG", "SET", "maxmemory", 1)
    try:
        for call in calls_of(storage)[1:4]:
            assert is_unavailable_soon(call)
            storage._run("SCRIPT", "FLUSH")
            assert is_unavailable_soon(call)
        assert storage.get(ID) == b"old"
    finally:
        storage._run("CONFIG", "SET", "maxmemory", limit)
    assert contents(storage) == before
    assert storage.commit(ID, b"old", b"new", -1, "n", 9) is Commit.DONE


def test_message_of_a_phone_to_a_full_server(client: WsgiClient, storage: gateway.Storage) -> None:
    """503, so that the provider delivers it again; then it is answered, and once.

    Catches a step that takes its message for used up because the write was tried.
    """
    client.register()
    assert client.credentials
    message = {"msisdn": NUMBER[1:], "text": client.credentials.hawk_id, "messageId": "m1"}
    before = contents(storage)
    storage._run("CONFIG", "SET", "maxmemory", 1)
    try:
        answer = client.call("/sms/momt/?provider=nexmo", message, signed=False)
        assert (answer.status, answer.errno) == (503, 201)
    finally:
        storage._run("CONFIG", "SET", "maxmemory", 0)
    assert contents(storage) == before
    assert client.outbox() == []
    for _ in range(2):
        answer = client.call("/sms/momt/?provider=nexmo", message, signed=False)
        assert answer.status == 200
    assert len(client.outbox()) == 1


def test_replica_that_takes_no_writes(storage: gateway.Storage) -> None:
    """It answers a PING, so health must be proved by a write."""
    storage.create(ID, b"old", 100)
    storage._run("REPLICAOF", "127.0.0.1", 1)
    try:
        assert storage._run("PING")
        assert [is_unavailable_soon(call) for call in calls_of(storage)[1:]] == [True] * 5
    finally:
        storage._run("REPLICAOF", "NO", "ONE")
    assert storage.get(ID) == b"old"


def test_key_of_another_type(storage: gateway.Storage) -> None:
    """Somebody else's data in our place is no crash."""
    storage._run("LPUSH", ID, "x")
    assert is_unavailable_soon(lambda: storage.get(ID))
    assert is_unavailable_soon(lambda: storage.commit(ID, b"old", b"new"))
    storage._run("SET", "sends", "x")
    assert is_unavailable_soon(lambda: storage.count_send(1.7e9, 9))


# -- A store that is gone -----------------------------------------------------


@contextlib.contextmanager
def listening(answer: bytes | None) -> Iterator[str]:
    """The address of a server that answers every client so; ``None``: it never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    peer, _ = server.accept()
                    with peer:
                        peer.recv(100)
                        peer.sendall(answer or b"")

        if answer is not None:
            threading.Thread(target=serve, daemon=True).start()
        yield f"redis://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)


def test_nobody_listens(tmp_path: Path) -> None:
    """A socket of nothing, a socket that is a file, a closed port."""
    (tmp_path / "file").write_text("")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    urls = (f"unix://{tmp_path}/s", f"unix://{tmp_path}/file", f"redis://127.0.0.1:{port}")
    for url in urls:
        for call in calls_of(gateway.Storage(url)):
            assert is_unavailable_soon(call)


@pytest.mark.parametrize(
    "answer",
    [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"$5\r\nab", b"\x15\x03\x01", b"-NOAUTH x\r\n"],
    ids=["closes", "a web server", "stops in the middle", "TLS", "wants a password"],
)  # fmt: skip
def test_somebody_else_listens(answer: bytes) -> None:
    with listening(answer) as url:
        storage = gateway.Storage(url)
        for call in calls_of(storage)[:3]:
            assert is_unavailable_soon(call)


def test_nobody_answers() -> None:
    """The connection stands, and then nothing: no call takes a second, whatever it is."""
    with listening(None) as url:
        storage = gateway.Storage(url)
        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(is_unavailable_soon, calls_of(storage))) == [True] * 6


def test_hung_server(own_store: gateway.EmbeddedStore) -> None:
    """Unavailable within a second on old and on new connections; then it goes on by itself."""
    storage = gateway.Storage(own_store.url)
    storage.create(ID, b"old", 100)
    storage._run("SET", "other", b"another")
    os.kill(pid_of(own_store), signal.SIGSTOP)
    with ThreadPoolExecutor(6) as pool:
        in_threads = pool.map(is_unavailable_soon, [calls_of(storage)[0], *calls_of(storage)[3:]])
        assert is_unavailable_soon(lambda: storage.get(ID))
        assert all(in_threads)
    os.kill(pid_of(own_store), signal.SIGCONT)
    assert until(lambda: not is_unavailable_soon(lambda: storage.ping(1.7e9)))
    # Catches a connection that was kept: it gives each caller the answer to another's question.
    assert storage._run("GET", "other") == b"another"
    assert storage.get(ID) == b"old"
    assert storage.commit(ID, b"old", b"new") is Commit.DONE


def executions(storage: gateway.Storage, command: str) -> int:
    """How often the server has run a command (also inside scripts) since the last reset."""
    told = storage._run("INFO", "commandstats").decode()
    found = re.search(rf"cmdstat_{command}:calls=(\d+)", told)
    return int(found[1]) if found else 0


@pytest.mark.parametrize("known", [True, False], ids=["old connection", "new connection"])
def test_write_that_timed_out_is_not_repeated(
    own_store: gateway.EmbeddedStore, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """redis-py's default sends it again: then one message counts twice, or a code has two tries."""
    monkeypatch.setattr(gateway, "STORAGE_TIMEOUT_S", 0.1)
    storage, watcher = gateway.Storage(own_store.url), gateway.Storage(own_store.url)
    watcher.create(ID, b"old", 100)
    watcher.count_send(1.7e9, 9)  # from now on the server knows the scripts
    watcher.commit(ID, b"old", b"old")
    watcher._run("CONFIG", "RESETSTAT")
    if known:
        storage.get(ID)
    os.kill(pid_of(own_store), signal.SIGSTOP)
    with ThreadPoolExecutor(2) as pool:
        counted = pool.submit(is_unavailable_soon, lambda: storage.count_send(1.7e9, 9))
        assert is_unavailable_soon(lambda: storage.commit(ID, b"old", b"new", -1, "n", 9))
        assert counted.result()
    os.kill(pid_of(own_store), signal.SIGCONT)
    until(lambda: not is_unavailable_soon(lambda: watcher.ping(1.7e9)))
    assert executions(watcher, "evalsha") <= 2
    assert executions(watcher, "lpush") == watcher._run("LLEN", "sends") - 1 <= 1


@pytest.mark.parametrize(
    ("path", "stall_s"), [("/sms/verify_code", 0.7), ("/sms/resend_code", 0)], ids=["short", "long"]
)
def test_stall_between_reading_and_writing(
    own_store: gateway.EmbeddedStore, keys_dir: str, tmp_path: Path, path: str, stall_s: float
) -> None:
    """503/201 within a second, whether the write ran or not, and it is not sent again.

    Catches a nonce that is spent once more after the write that timed out had spent it: the
    client is told that it replayed its own request. ``stall_s`` 0: until it is answered.
    """
    pid, timers, stalls = pid_of(own_store), list[threading.Timer](), threading.Event()

    def clock() -> float:
        if stalls.is_set():  # the request has read its record, and not written yet
            stalls.clear()
            os.kill(pid, signal.SIGSTOP)
            timers.append(threading.Timer(stall_s or 60, os.kill, (pid, signal.SIGCONT)))
            timers[0].start()
        return time.time()

    settings = gateway.Settings(keys_dir=keys_dir, data_dir=str(tmp_path))
    client = WsgiClient(gateway.create_app(settings, own_store.url, clock))
    storage = gateway.Storage(own_store.url)
    client.register()
    client.ask()
    storage._run("CONFIG", "RESETSTAT")
    now_s = int(time.time())
    stalls.set()
    started = time.monotonic()
    answer = client.call(path, {"code": "x" * 6}, ts=now_s)
    took_s = time.monotonic() - started
    timers[0].cancel()
    timers[0].join()
    os.kill(pid, signal.SIGCONT)
    until(lambda: not is_unavailable_soon(lambda: storage.ping(1.7e9)))
    assert (answer.status, answer.errno) == (503, 201)
    assert executions(storage, "evalsha") <= 1
    assert took_s < 1
    again = client.call(path, {"code": "x" * 6})
    assert again.status == 200 or again.errno == 105


def test_hung_server_over_http(
    own_store: gateway.EmbeddedStore, keys_dir: str, tmp_path: Path
) -> None:
    """503/201 for every step, and 503 with its body for the health check; then all is as before."""
    settings = gateway.Settings(keys_dir=keys_dir, data_dir=str(tmp_path))
    client = WsgiClient(gateway.create_app(settings, own_store.url))
    client.verified()
    os.kill(pid_of(own_store), signal.SIGSTOP)
    key = {"publicKey": {"algorithm": "RS", "n": "1", "e": "1"}}
    started = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        answers = [
            pool.submit(client.call, "/certificate/sign", key),
            pool.submit(client.call, "/unregister"),
            pool.submit(client.call, "/register", signed=False),
        ]
        health = pool.submit(client.get, "/__heartbeat__").result()
        assert [(a.result().status, a.result().errno) for a in answers] == [(503, 201)] * 3
    assert (health.status, health.json["storage"]) == (503, False)
    assert int(health.headers["retry-after"]) >= 1
    assert time.monotonic() - started < 1
    assert client.get("/__lbheartbeat__").status == 200
    os.kill(pid_of(own_store), signal.SIGCONT)
    until(lambda: client.get("/__heartbeat__").status == 200)
    assert client.call("/sms/resend_code").status == 200


# -- The embedded server ------------------------------------------------------


def test_killed_server_comes_back_with_its_data(
    own_store: gateway.EmbeddedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice in a row; meanwhile nothing but Unavailable; the same objects go on.

    The lock is not lost with the server that held it too.
    """
    monkeypatch.setattr(gateway, "TAKEOVER_S", 0.05)
    storage = gateway.Storage(own_store.url)

    def read(key: StorageId) -> bytes | None:
        try:
            return storage.get(key)
        except gateway.Unavailable:
            return None

    for key in (ID, StorageId(b"o" * 16)):
        storage.create(key, b"record of " + key, 1000)
        killed = pid_of(own_store)
        os.kill(killed, signal.SIGKILL)
        with pytest.raises(gateway.StartError, match=rf"\b{os.getpid()}\b"):
            gateway.EmbeddedStore(str(own_store.folder))
        assert until(partial(read, key)) == b"record of " + key
        assert pid_of(own_store) != killed
    assert read(ID) == b"record of " + ID
    assert 990 < life_s(storage) <= 1000
    assert stat.S_IMODE(own_store.socket.stat().st_mode) == 0o700


def test_stopped_server_leaves_nothing_but_its_data(tmp_path: Path) -> None:
    """No process, no thread, no lock; started again, the data is there."""
    store = gateway.EmbeddedStore(str(tmp_path))
    gateway.Storage(store.url).create(ID, b"old", 100)
    pid, thread = pid_of(store), store._thread
    store.stop()
    assert not thread.is_alive()
    assert not psutil.pid_exists(pid)
    assert is_unavailable_soon(lambda: gateway.Storage(store.url).get(ID))
    again = gateway.EmbeddedStore(str(tmp_path))
    try:
        assert gateway.Storage(again.url).get(ID) == b"old"
    finally:
        again.stop()


def test_two_on_one_folder(
    own_store: gateway.EmbeddedStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The second is refused, also by another name of the folder; it is told who is there."""
    monkeypatch.setattr(gateway, "TAKEOVER_S", 0.05)
    storage = gateway.Storage(own_store.url)
    storage.create(ID, b"old", 100)
    (tmp_path / "link").symlink_to(own_store.folder)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for name in (own_store.folder, tmp_path / "link", own_store.folder / ".." / own_store.folder):
        with pytest.raises(gateway.StartError, match=rf"\b{os.getpid()}\b"):
            gateway.EmbeddedStore(str(name))
    if before:
        assert len(os.listdir("/proc/self/fd")) == before
    assert storage.get(ID) == b"old"
    assert (own_store.folder / "lock").read_text() == str(os.getpid())


def test_server_that_outlives_its_gateway_keeps_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hung when its gateway is killed, it cannot die yet: nobody else may write to its files."""
    monkeypatch.setattr(gateway, "TAKEOVER_S", 0.05)
    script = "import gateway, sys; s = gateway.EmbeddedStore(sys.argv[1]); "
    script += "print(s._process.pid, flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", script, str(tmp_path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=gateway.ROOT, stdin=pipe, stdout=pipe) as other:
        assert other.stdout
        server = psutil.Process(int(other.stdout.readline()))
        try:
            gateway.Storage(f"unix://{tmp_path}/store.sock").create(ID, b"old", 100)
            server.suspend()
            other.kill()
            other.wait()
            with pytest.raises(gateway.StartError, match=rf"\b{other.pid}\b"):
                gateway.EmbeddedStore(str(tmp_path))
        finally:
            other.kill()
            server.resume()
    monkeypatch.setattr(gateway, "TAKEOVER_S", 10.0)
    store = gateway.EmbeddedStore(str(tmp_path))
    try:
        assert pid_of(store) != server.pid
        assert gateway.Storage(store.url).get(ID) == b"old"
    finally:
        store.stop()


def test_path_of_the_socket(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Unix takes some hundred bytes: up to 103 it works, beyond is refused before anything is."""
    base = tmp_path_factory.mktemp("p").resolve()
    room = 103 - len(os.fsencode(base / "store.sock")) - 1
    fits = gateway.EmbeddedStore(str(base / ("x" * room)))
    try:
        assert len(os.fsencode(fits.socket)) == 103
        assert gateway.Storage(fits.url).get(ID) is None
    finally:
        fits.stop()
    for name in ("y" * (room + 1), "ü" * (room // 2 + 1), "z" * 200):
        with pytest.raises(gateway.StartError, match="data_dir"):
            gateway.EmbeddedStore(str(base / name))
    assert os.listdir(base) == ["x" * room]


@pytest.mark.parametrize("name", ["a b", "100%41?x=1#y", "it's", 'ü"q\\b'])
def test_odd_names_of_folders(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    """The name goes through a URL and through the server's own settings."""
    folder = tmp_path_factory.mktemp("n") / name
    store = gateway.EmbeddedStore(str(folder))
    try:
        gateway.Storage(store.url).create(ID, b"old", 100)
        assert (folder / "appendonlydir").is_dir()
        assert (folder / "store.sock").is_socket()
        assert os.listdir(folder.parent) == [name]
    finally:
        store.stop()


def test_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("mine")
    with pytest.raises(gateway.StartError, match="data_dir"):
        gateway.EmbeddedStore(str(tmp_path / "data"))
    assert (tmp_path / "data").read_text() == "mine"


def test_damaged_data_is_no_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusal names the log; the data is not thrown away, and the folder is free again."""
    monkeypatch.setattr(gateway, "STORE_START_S", 0.3)
    store = gateway.EmbeddedStore(str(tmp_path))
    gateway.Storage(store.url).create(ID, b"old", 100)
    store.stop()
    (manifest,) = (tmp_path / "appendonlydir").glob("*.manifest")
    good = manifest.read_bytes()
    manifest.write_bytes(b"file nonsense\n")
    with pytest.raises(gateway.StartError, match=r"store\.log"):
        gateway.EmbeddedStore(str(tmp_path))
    assert manifest.read_bytes() == b"file nonsense\n"
    manifest.write_bytes(good)
    again = gateway.EmbeddedStore(str(tmp_path))
    try:
        assert gateway.Storage(again.url).get(ID) == b"old"
    finally:
        again.stop()


def test_nobody_else_can_look(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Files 0600, folders 0700, whatever the umask; no port is open."""
    folder = tmp_path_factory.mktemp("m") / "deep" / "data"
    before = os.umask(0)
    try:
        store = gateway.EmbeddedStore(str(folder))
    finally:
        os.umask(before)
    try:
        storage = gateway.Storage(store.url)
        storage.create(ID, b"old", 100)
        rewritten = storage._run("BGREWRITEAOF")
        assert rewritten
        until(lambda: b"aof_rewrite_in_progress:0" in storage._run("INFO", "persistence"))
        for path in (folder, *folder.rglob("*")):
            wanted = 0o700 if path.is_dir() or path.is_socket() else 0o600
            assert stat.S_IMODE(path.stat().st_mode) == wanted, path
        kinds = psutil.Process(pid_of(store)).net_connections("all")
        assert {c.family for c in kinds} == {socket.AF_UNIX}
        assert {c.laddr for c in kinds if c.laddr} == {str(store.socket)}
    finally:
        store.stop()


# -- What whoever holds the store can read ------------------------------------


def bcd(digits: str) -> bytes:
    """Two digits a byte."""
    return bytes.fromhex(digits + "f" * (len(digits) % 2))


def spellings(text: str) -> list[bytes]:
    """A secret text, and what is made of it without a key."""
    raw = text.encode()
    found = [raw, text.encode("utf-16-le"), base64.b64encode(raw).rstrip(b"=")]
    for name in ("md5", "sha1", "sha256", "sha512", "blake2b"):
        digest = hashlib.new(name, raw)
        found += [digest.digest()[:12], digest.hexdigest()[:24].encode()]
    return found


def number_spellings(msisdn: str) -> list[bytes]:
    """A number in every form that comes to mind."""
    digits = msisdn.removeprefix("+")
    value = int(digits)
    turned = re.sub("(.)(.)", r"\2\1", digits)  # as SMS writes numbers
    found = [bcd(digits), bcd(turned), f"{value:x}".encode(), digits[::-1].encode()]
    found += [value.to_bytes(size, order) for size in (5, 8) for order in ("big", "little")]
    return found + [s for text in (digits, msisdn, digits[2:]) for s in spellings(text)]


def code_spellings(code: str, storage: gateway.Storage) -> list[bytes]:
    """A code, and what is made of it with nothing but what the store holds too."""
    found = spellings(code)
    for key, record in contents(storage).items():
        if len(key) == 16:
            for salt in (key, record[2:34], record[2:34].hex().encode()):
                found.append(hmac.digest(salt, code.encode(), "sha256")[:12])
                found.append(hashlib.sha256(salt + code.encode()).digest()[:12])
                found.append(hmac.digest(salt, key + code.encode(), "sha256")[:12])
    return found


def token_spellings(token: str) -> list[bytes]:
    """A session token and its Hawk id, raw and in letters; the Hawk key is kept."""
    found = []
    for text in (token, gateway.derive_credentials(gateway.SessionToken(bytes.fromhex(token)))[0]):
        raw = bytes.fromhex(text)
        found += [raw, raw[:16], base64.b64encode(raw)[:40], hashlib.sha256(raw).digest()[:12]]
        found += spellings(text)
    return found


def dump(store: gateway.EmbeddedStore) -> bytes:
    """Every byte that the server holds, and every byte that it has written to disk.

    The times at which keys die are left out of its file: they hold any six digits.
    """
    parts: list[bytes] = []
    for key, value in contents(gateway.Storage(store.url)).items():
        parts += [key, *(value if isinstance(value, list) else [value])]
    for path in sorted(store.folder.rglob("*")):
        if path.is_file():
            parts.append(re.sub(rb"PXAT\r\n\$13\r\n[0-9]{13}\r\n", b"", path.read_bytes()))
    return b"\n".join(parts)


def test_store_and_its_file_reveal_nothing(
    own_store: gateway.EmbeddedStore, keys_dir: str, tmp_path: Path
) -> None:
    """Number, codes, token and Hawk id in no form, at any time of a session's life."""
    settings = gateway.Settings(keys_dir=keys_dir, data_dir=str(tmp_path), sends_per_session=9)
    app = gateway.create_app(settings, own_store.url)
    client, storage = WsgiClient(app), gateway.Storage(own_store.url)
    storage._run("CONFIG", "SET", "loglevel", "debug")
    token = client.register().json["msisdnSessionToken"]
    assert client.credentials
    hidden = number_spellings(NUMBER) + token_spellings(token)

    def look(codes: int = 0) -> None:
        """Look for all that was secret so far, and for the newest codes."""
        for message in client.outbox()[-codes:] if codes else ():
            hidden.extend(code_spellings(message["text"].split()[-1], storage))
        held = dump(own_store)
        assert client.credentials
        assert held.count(client.credentials.hawk_key) >= 1  # we do see what is there
        assert [secret for secret in hidden if secret in held] == []

    look()
    assert client.ask(mcc="234", mnc="15").status == 200
    look(1)
    assert client.call("/sms/verify_code", {"code": "x" * 6}).errno == 105
    assert client.call("/sms/mt/verify", {"msisdn": NUMBER}).status == 204
    look(1)
    assert client.call("/sms/resend_code", {"shortVerificationCode": True}).status == 200
    look(1)
    code = client.code()
    assert client.call("/sms/verify_code", {"code": code}).status == 200
    hidden.extend(code_spellings(code, storage))
    look()
    key = gateway.public_key_json(gateway.generate_key("RS128").public_key())
    assert client.call("/certificate/sign", {"publicKey": key}).status == 200
    look()
    storage._run("BGREWRITEAOF")
    until(lambda: b"aof_rewrite_in_progress:0" in storage._run("INFO", "persistence"))
    look()
    assert client.call("/unregister").status == 204
    held = dump(own_store)
    assert [secret for secret in hidden if secret in held] == []


def test_phone_first_flow_reveals_nothing(
    own_store: gateway.EmbeddedStore, keys_dir: str, tmp_path: Path
) -> None:
    """There the Hawk id comes by SMS, and the number from the provider."""
    settings = gateway.Settings(keys_dir=keys_dir, data_dir=str(tmp_path))
    client = WsgiClient(gateway.create_app(settings, own_store.url))
    token = client.register().json["msisdnSessionToken"]
    assert client.credentials
    message = {"msisdn": NUMBER[1:], "text": f"verify {client.credentials.hawk_id}"}
    message |= {"messageId": NUMBER, "network-code": "23415"}
    assert client.call("/sms/momt/?provider=nexmo", message, signed=False).status == 200
    storage = gateway.Storage(own_store.url)
    hidden = number_spellings(NUMBER) + token_spellings(token)
    hidden += code_spellings(client.code(), storage)
    held = dump(own_store)
    assert held.count(client.credentials.hawk_key) >= 1
    assert [secret for secret in hidden if secret in held] == []
    assert client.call("/sms/verify_code", {"code": client.code()}).status == 200


def test_what_is_left_of_who_has_unregistered(client: WsgiClient, storage: gateway.Storage) -> None:
    """No record; the nonces of the last minutes, which name nobody and soon die."""
    client.verified()
    other = client.another().verified("+447700900124")
    assert other.credentials
    assert client.call("/unregister").status == 204
    records = [key for key in contents(storage) if not key.startswith(b"{")]
    assert len(records) == 1
    assert contents(storage)[records[0]][2:34] == other.credentials.hawk_key
    assert other.call("/unregister").status == 204
    left = contents(storage)
    assert all(key.startswith(b"{") and value == b"" for key, value in left.items())
    assert all(0 < life_s(storage, key) <= 122 for key in left)


def test_sessions_of_one_number_look_unrelated(
    client: WsgiClient, storage: gateway.Storage
) -> None:
    """Whoever holds the store cannot even tell that two sessions have the same number."""
    client.verified()
    client.another().verified()
    values = [value[34:58] for key, value in contents(storage).items() if len(key) == 16]
    assert len(values) == len(set(values)) == 2
