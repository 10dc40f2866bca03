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
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import lab
import psutil
import pytest
import redis
from hypothesis import example, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from provider import Provider, taken
from support import (
    HOUR,
    LIST,
    NUMBER,
    OPEN,
    Clock,
    GatewayProcess,
    WsgiClient,
    counted,
    give_back,
    halt,
    names_taken,
    shared,
    take,
)

import gateway
from gateway import Commit, StorageId

ID = StorageId(bytes(range(16)))
KEY = gateway.HawkKey(b"k" * 32)


def until(check: Callable[[], Any], timeout_s: float = 10) -> Any:
    """Poll until ``check`` gives something true; what it gave."""
    deadline = time.monotonic() + timeout_s * shared()
    while not (found := check()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)
    return found


def contents(storage: gateway.Storage) -> dict[bytes, Any]:
    """Every key and its value."""
    found: dict[bytes, Any] = {}
    for key in storage._run("KEYS", "*"):
        hashed = storage._run("TYPE", key) == b"hash"
        found[key] = storage._run("HGETALL" if hashed else "GET", key)
    return found


def another(code: str) -> str:
    """A code of the same kind that is not this one."""
    return "".join("1" if digit == "0" else "0" for digit in code)


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
DIGESTS = st.just(b"") | st.binary(min_size=8, max_size=8).filter(any)
FLAGS = ("masked", "long", "by_phone", "sending", "asked_long", "again", "by_outbox",
         "verified_by_outbox")  # fmt: skip
MORE_FLAGS = ("code_by_phone", "verified_by_phone")
"""Those of the second byte, at the end of the record: only a phone that asks by SMS sets them."""
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "hawk_key": BYTES_32,
    "sealed": st.just(b"") | st.binary(min_size=24, max_size=24).filter(any),
    "network": NETWORKS,
    "sends": st.integers(0, 255),
    "asked_s": MOMENTS,
    "code_expires_s": MOMENTS,
    "verified_s": MOMENTS,
    "code_digest": DIGESTS,
    "older_digest": DIGESTS,
    "tries": st.integers(0, 255),
    "tried": st.integers(0, 2**16 - 1),
    "ticket": st.integers(0, 2**16 - 1),
    **dict.fromkeys((*FLAGS, *MORE_FLAGS), st.booleans()),
}
USERS = st.builds(gateway.User, **FIELDS)
ALL_FLAGS: dict[str, Any] = dict.fromkeys(FLAGS, True)


@pytest.mark.slow
@given(USERS)
@example(gateway.User(bytes(32)))
@example(gateway.User(KEY, network=gateway.Network("000")))
@example(gateway.User(KEY, sealed=b"s" + bytes(23), code_digest=b"d" + bytes(7)))
@example(gateway.User(KEY, code_digest=b"d" * 8, older_digest=b"o" + bytes(7)))
@example(gateway.User(KEY, older_digest=b"o" * 8))
@examples(max_examples=200, deadline=None)
def test_record_round_trip(user: gateway.User) -> None:
    """Also when key, number or digest end in zero bytes; never more than 96 bytes."""
    packed = user.pack()
    assert gateway.User.unpack(packed) == user
    assert len(packed) <= 96
    assert packed[0] == gateway.RECORD_VERSION == 2


def test_every_field_of_a_user_is_tried() -> None:
    """A field that is added and not packed would be lost without a sound."""
    assert set(FIELDS) == set(gateway.User._fields)


@pytest.mark.slow
@given(USERS, st.sampled_from(sorted(FIELDS)), st.data())
@examples(max_examples=200, deadline=None)
def test_no_field_of_a_record_hides_another(
    user: gateway.User, name: str, data: st.DataObject
) -> None:
    """One field changes, and so do the bytes, and nothing else when they are read."""
    changed = user._replace(**{name: data.draw(FIELDS[name])})
    assert (changed.pack() == user.pack()) == (changed == user)
    assert gateway.User.unpack(changed.pack()) == changed


@pytest.mark.parametrize("name", FLAGS)
def test_each_flag_is_one_bit(name: str) -> None:
    """Catches two flags in one bit, or a ninth in the byte of eight."""
    flag: dict[str, Any] = {name: True}
    changed = gateway.User(KEY)._replace(**flag).pack()
    assert changed[:1] + changed[2:] == b"\2" + KEY
    assert changed[1].bit_count() == 1
    assert gateway.User.unpack(changed) == gateway.User(KEY)._replace(**flag)
    assert gateway.User(KEY, **ALL_FLAGS).pack()[1] == 255


@pytest.mark.parametrize("name", MORE_FLAGS)
def test_each_flag_of_the_second_byte_is_one_bit(name: str) -> None:
    flag: dict[str, Any] = {name: True}
    packed = gateway.User(KEY, **flag).pack()
    assert (len(packed), packed[1], packed[-1].bit_count()) == (96, 0, 1)
    assert gateway.User.unpack(packed) == gateway.User(KEY, **flag)


def test_a_record_from_before_the_second_byte_tells_how_it_was_verified() -> None:
    """Of 95 bytes at most. A phone cannot ask once a client did, so ``by_phone`` is enough."""
    for by_phone, method in ((False, "sms/mt"), (True, "sms/momt")):
        user = gateway.User(KEY, by_phone=by_phone, verified_s=5, tries=3, tried=7, ticket=9)
        assert len(user.pack()) == 95
        assert gateway.User.unpack(user.pack()).method == method


def test_networks_that_look_alike_differ() -> None:
    """``7`` is no MNC; ``07`` and ``007`` are two."""
    mncs = [""] + [f"{n:02}" for n in range(100)] + [f"{n:03}" for n in range(1000)]
    packed = {gateway.Network(mcc, mnc).pack() for mcc in ("001", "234", "999") for mnc in mncs}
    assert len(packed) == 3 * 1101


@pytest.mark.parametrize("end", [b"", bytes(3), bytes(32)], ids=["full", "3 zeros", "all zeros"])
def test_record_sizes(end: bytes) -> None:
    """What a user costs: 34 bytes registered, 82 to 93 while a code waits, then 70, 74 or 93.

    And 95 while a message is being sent; 96 at most, which is so if a phone asked by SMS.
    """
    registered = gateway.User((b"k" * 32 + end)[-32:], masked=True)
    assert len(registered.pack()) <= 34
    asked = registered._replace(
        sealed=b"\xff" * 24,
        network=gateway.Network("999", "999"),
        sends=255,
        asked_s=2**32 - 1,
        **ALL_FLAGS,
    )
    assert len(asked.pack()) == 66
    pending = asked._replace(code_expires_s=2**32 - 1, code_digest=b"\xff" * 8)
    assert len(pending.pack()) == 82
    assert len(pending._replace(code_digest=b"").pack()) == 70
    assert len(pending._replace(code_digest=b"", verified_s=2**32 - 1).pack()) == 74
    most = pending._replace(older_digest=b"\xff" * 8, verified_s=2**32 - 1)
    assert len(most.pack()) == 90
    assert len(most._replace(tries=9).pack()) == 91
    assert len(most._replace(tries=9, tried=2**16 - 1).pack()) == 93
    assert len(asked._replace(ticket=1).pack()) == 95
    most = most._replace(tries=9, tried=2**16 - 1, ticket=2**16 - 1)
    assert len(most.pack()) == 95
    assert len(most._replace(code_by_phone=True, verified_by_phone=True).pack()) == 96


def test_record_sizes_in_the_store(client: WsgiClient, storage: gateway.Storage) -> None:
    """The same, measured on what a real flow writes."""

    def size() -> int:
        return max(len(v) for k, v in contents(storage).items() if len(k) == 16)

    client.register()
    assert size() <= 34
    client.call("/sms/mt/verify", {"msisdn": NUMBER, "mcc": "234", "mnc": "15"})
    assert size() <= 82
    assert client.call("/sms/verify_code", {"code": another(client.code())}).errno == 105
    assert size() <= 91
    client.call("/sms/resend_code")
    assert size() <= 91
    client.call("/sms/verify_code", {"code": client.code()})
    assert size() <= 74


@given(
    st.binary(max_size=120)
    | st.builds(bytes.__add__, st.sampled_from([b"\1", b"\2"]), st.binary(max_size=120))
)
@example(b"")
@example(b"\1" * 89)
@example(b"\1" * 90)
@example(b"\2" * 96)
@example(b"\2" * 97)
@example(b"\1" + b"\xff" * 88)
@example(b"\2" + b"\xff" * 94)
@examples(max_examples=200, deadline=None)
def test_any_bytes_as_a_record(packed: bytes) -> None:
    """A user, or Unavailable; another error would be a 500 for ever after a downgrade."""
    ours = len(packed) <= {b"\1": 89, b"\2": 96}.get(packed[:1], 0)
    if not ours or not packed:
        with pytest.raises(gateway.Unavailable):
            gateway.User.unpack(packed)
        return
    user = gateway.User.unpack(packed)
    assert user.pack()[0] == 2
    assert gateway.User.unpack(user.pack()) == user


@pytest.mark.parametrize("length", [1, 34, 93, 97, 200])
def test_records_of_other_versions(
    client: WsgiClient, storage: gateway.Storage, length: int
) -> None:
    """503/201 and the record untouched: nobody is lost by an update that is taken back."""
    client.register()
    (key,) = contents(storage)
    # What is too long to be of a version that we read was not written by it either.
    for version in (0, 3, 255, *(n for n, most in ((1, 89), (2, 96)) if length > most)):
        record = bytes([version]) + b"\7" * (length - 1)
        storage._run("SET", key, record)
        for path in ("/sms/verify", "/certificate/sign", "/unregister"):
            answer = client.call(path, {"msisdn": NUMBER})
            assert (answer.status, answer.errno) == (503, 201)
        assert contents(storage) == {key: record}


# -- Records of version 1 -----------------------------------------------------

VERSION_1 = struct.Struct(">BB32s24s3sBII16sBH")
"""How a record was laid out until November 2026; zeros at its end were left out, as they are."""
NO_NETWORK, NETWORK = gateway.Network(), gateway.Network("234", "15")


def version_1(
    key: bytes,
    long: bool = False,
    by_phone: bool = False,
    sealed: bytes = b"",
    network: gateway.Network = NO_NETWORK,
    sends: int = 0,
    expires_s: int = 0,
    verified_s: int = 0,
    digest: bytes = b"",
    tries: int = 0,
    tried: int = 0,
) -> bytes:
    """A record as commit 7d4f310 wrote it, its Hawk key unmasked."""
    start = (1, long + 2 * by_phone, key, sealed, network.pack(), sends, expires_s)
    return VERSION_1.pack(*start, verified_s, digest, tries, tried).rstrip(b"\0")


class OldSession(WsgiClient):
    """A client whose session an older gateway opened."""

    def write(
        self, storage: gateway.Storage, verified_s: int = 0, code: str = "", **more: Any
    ) -> None:
        """Put its record there, of version 1; with a code that waits, if one is named."""
        token = gateway.SessionToken(os.urandom(32))
        self.credentials = gateway.derive_credentials(token)
        hawk_id, self.plain_key = self.credentials
        self.key = self.gateway.secrets.id_for(hawk_id)
        fields: dict[str, Any] = {"verified_s": verified_s}
        if code or verified_s:
            sealed = gateway.seal_msisdn(self.gateway.secrets.seal, hawk_id, gateway.Msisdn(NUMBER))
            fields |= {"sealed": sealed, "network": NETWORK, "sends": 1}
            fields |= {"expires_s": int(self.gateway.clock()) + 500}
        if code:  # which had 16 bytes then
            secret = self.gateway.secrets.code
            fields["digest"] = hmac.digest(secret, self.key + code.encode(), "sha256")[:16]
            fields["long"] = len(code) == 32
        self.written = version_1(self.plain_key, **{**fields, **more})
        storage.create(self.key, self.written, 1000)

    def is_renewed(self, storage: gateway.Storage) -> bool:
        """Whether the record is of version 2 by now, and nothing there has the plain key."""
        record = storage.get(self.key)
        assert record
        if record == self.written:
            return False
        assert self.credentials
        user, hawk_id = gateway.User.unpack(record), self.credentials.hawk_id
        assert record[0] == 2
        assert user.masked
        assert (
            gateway.mask_hawk_key(self.gateway.secrets.mask, hawk_id, user.hawk_key)
            == self.plain_key
        )
        assert bytes(self.plain_key) not in record
        return True


@pytest.fixture
def old(client: WsgiClient) -> OldSession:
    """A client whose session is still to be written, over an empty store."""
    return OldSession(client.app)


SIGN = {"publicKey": gateway.public_key_json(gateway.generate_key("RS128").public_key())}
CODES = ["146193", "0123456789abcdef" * 2]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"sealed": b"s" * 24, "sends": 1, "expires_s": 9},
        {"sealed": b"s" * 24, "network": NETWORK, "sends": 5, "expires_s": 1_800_000_600,
         "digest": b"d" * 8 + b"e" * 8, "tries": 2, "tried": 65535, "long": True, "by_phone": True},
        {"sealed": b"s" * 24, "sends": 1, "expires_s": 1_800_000_600, "verified_s": 1_800_000_000},
    ],
    ids=["registered", "in the first seconds", "pending", "verified"],
)  # fmt: skip
def test_version_1_is_read_field_by_field(fields: dict[str, Any]) -> None:
    """Key unmasked, the digest's first 8 bytes; it was asked for when its code's life began."""
    user = gateway.User.unpack(version_1(KEY, **fields))
    expires_s, long = fields.get("expires_s", 0), fields.get("long", False)
    assert user == gateway.User(
        KEY,
        sealed=fields.get("sealed", b""),
        network=fields.get("network", gateway.Network()),
        sends=fields.get("sends", 0),
        asked_s=max(expires_s - 600, 0),
        code_expires_s=expires_s,
        verified_s=fields.get("verified_s", 0),
        code_digest=fields.get("digest", b"")[:8],
        tries=fields.get("tries", 0),
        tried=fields.get("tried", 0),
        long=long,
        asked_long=long,
        by_phone=fields.get("by_phone", False),
    )
    assert gateway.User.unpack(user.pack()) == user


def test_version_1_registered(old: OldSession, storage: gateway.Storage) -> None:
    """It signs, asks and verifies; what writes nothing leaves the record as it was."""
    old.write(storage)
    assert len(old.written) <= 34
    assert old.call("/certificate/sign", SIGN).errno == 104
    assert not old.is_renewed(storage)
    assert old.ask(mcc="234").status == 200
    assert old.is_renewed(storage)
    assert old.call("/sms/verify_code", {"code": old.code()}).json == {"msisdn": NUMBER}
    assert old.call("/certificate/sign", SIGN).status == 200
    assert old.is_renewed(storage)
    assert old.call("/unregister").status == 204


@pytest.mark.parametrize("code", CODES)
def test_version_1_pending(old: OldSession, storage: gateway.Storage, code: str) -> None:
    """The code that was on its way during the update is right, and works once."""
    old.write(storage, code=code)
    assert old.call("/certificate/sign", SIGN).errno == 104
    assert not old.is_renewed(storage)
    assert old.call("/sms/verify_code", {"code": another(code)}).errno == 105
    assert old.is_renewed(storage)
    answer = old.call("/sms/verify_code", {"code": code})
    assert (answer.status, answer.json) == (200, {"msisdn": NUMBER})
    assert old.call("/sms/verify_code", {"code": code}).errno == 111
    assert old.call("/certificate/sign", SIGN).status == 200
    assert old.is_renewed(storage)
    assert 0 < storage._run("TTL", old.key) <= old.gateway.settings.verified_ttl_s


@pytest.mark.parametrize("code", CODES)
def test_version_1_tries_count_on(old: OldSession, storage: gateway.Storage, code: str) -> None:
    """An update gives nobody three more guesses."""
    old.write(storage, code=code, tries=2)
    assert old.call("/sms/verify_code", {"code": another(code)}).errno == 105
    assert old.call("/sms/verify_code", {"code": code}).errno == 111


@pytest.mark.parametrize("code", CODES)
def test_version_1_resent(old: OldSession, storage: gateway.Storage, code: str) -> None:
    """Kind and network are those last used; the old code is dead, and said to be older."""
    old.write(storage, code=code, tries=1)
    assert old.call("/sms/resend_code").status == 200
    assert old.is_renewed(storage)
    record = storage.get(old.key)
    assert record
    user = gateway.User.unpack(record)
    assert (user.network, user.sends, user.tries) == (NETWORK, 2, 1)
    assert len(old.code()) == len(code)
    answer = old.call("/sms/verify_code", {"code": code})
    assert answer.errno == 105
    assert "newer" in answer.json["message"]
    assert gateway.User.unpack(storage.get(old.key) or b"").tries == 1
    assert old.call("/sms/verify_code", {"code": old.code()}).status == 200


@pytest.mark.parametrize("code_ttl_s", [60, 600, 3600, 86400])
def test_version_1_asks_again_whatever_a_code_lives(
    make_client: Callable[..., WsgiClient], storage: gateway.Storage, code_ttl_s: int
) -> None:
    """It did not say when it was asked for: no gap and no double click is made of a guess.

    Catches a moment of asking that lies in the future: no message until it has come.
    """
    clock = Clock(int(time.time()))
    made = make_client(code_ttl_s=code_ttl_s, resend_gaps_s=[30, 60], clock=clock)
    old = OldSession(made.app)
    old.write(storage, code=CODES[0], expires_s=int(clock()) + code_ttl_s)
    clock.now_s += 31
    assert old.call("/sms/resend_code").status == 200
    assert len(old.outbox()) == 1
    clock.now_s += 61
    assert old.ask(mcc="234").status == 200
    assert len(old.outbox()) == 2


def test_version_1_sends_count_on(old: OldSession, storage: gateway.Storage) -> None:
    """Nor five more messages."""
    old.write(storage, code=CODES[0], sends=5)
    assert old.call("/sms/resend_code").errno == 114
    assert not old.is_renewed(storage)
    assert old.outbox() == []


def test_version_1_verified(old: OldSession, storage: gateway.Storage) -> None:
    """Proofs at once, with the day on which the number was verified; then a new round."""
    verified_s = int(time.time()) - 1000
    old.write(storage, verified_s=verified_s)
    assert old.call("/certificate/sign", SIGN, nonce="n").status == 200
    assert old.call("/certificate/sign", SIGN, nonce="n").errno == 109
    assert old.call("/sms/verify_code", {"code": CODES[0]}).errno == 111
    assert not old.is_renewed(storage)
    assert old.ask("+447700900124").errno == 107  # another number than its own
    assert old.call("/sms/resend_code").status == 200
    assert old.is_renewed(storage)
    assert gateway.User.unpack(storage.get(old.key) or b"").verified_s == verified_s
    assert old.call("/certificate/sign", SIGN).status == 200
    assert old.call("/sms/verify_code", {"code": old.code()}).status == 200
    assert old.call("/unregister").status == 204
    assert old.call("/certificate/sign", SIGN).errno == 110


def test_version_1_asked_by_phone(old: OldSession, storage: gateway.Storage) -> None:
    """An SMS of the same phone is answered still; one of another phone is not."""
    old.write(storage, code=CODES[1], by_phone=True)
    assert old.credentials
    message = {"text": old.credentials.hawk_id, "messageId": "m1"}
    for n, number in enumerate(("+447700900124", NUMBER)):
        sent = {**message, "msisdn": number[1:], "messageId": f"m{n}"}
        assert old.call("/sms/momt/?provider=nexmo", sent, signed=False).status == 200
    assert (len(old.outbox("+447700900124")), len(old.outbox())) == (0, 1)
    assert old.is_renewed(storage)
    assert old.call("/sms/verify_code", {"code": old.code()}).status == 200


def test_version_1_with_another_key_is_refused(old: OldSession, storage: gateway.Storage) -> None:
    """The plain key of an old record signs; its masked form signs nothing."""
    old.write(storage, verified_s=int(time.time()))
    assert old.credentials
    masked = gateway.mask_hawk_key(old.gateway.secrets.mask, old.credentials.hawk_id, old.plain_key)
    old.credentials = old.credentials._replace(hawk_key=gateway.HawkKey(masked))
    assert old.call("/certificate/sign", SIGN).errno == 109


# -- An exchange --------------------------------------------------------------

Ask = Callable[..., list[Any]]


@pytest.fixture
def ask(storage: gateway.Storage) -> Ask:
    """Exchange commands for answers, on a connection that gives up after a fifth of a second."""
    pool = gateway.Storage(storage.url)._connect_to(("", 6379), 0.2)

    def ask(*commands: Any) -> list[Any]:
        with pool.borrow() as connection:
            return gateway.exchange(connection, *commands)

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
    assert 0.19 < time.monotonic() - started < 2 * shared()
    assert ask(("ECHO", "another")) == [b"another"]


def test_a_connection_that_was_closed_is_replaced_before_it_is_used(ask: Ask) -> None:
    (own,) = ask(("CLIENT", "ID"))
    ask(("CLIENT", "KILL", "ID", own, "SKIPME", "no"))
    assert ask(("CLIENT", "ID"))[0] > own


def test_a_connection_that_closes_in_the_middle_is_an_error(storage: gateway.Storage) -> None:
    """Nobody can say what ran."""
    pool = gateway.Storage(storage.url)._connect_to(("", 6379), 5)
    with pytest.raises(redis.ConnectionError), pool.borrow() as connection:
        (own,) = gateway.exchange(connection, ("CLIENT", "ID"))
        kill = threading.Timer(0.1, partial(storage._run, "CLIENT", "KILL", "ID", own))
        kill.start()
        gateway.exchange(connection, ("BLPOP", "nothing", "9"))
    with pool.borrow() as connection:
        assert gateway.exchange(connection, ("ECHO", "1")) == [b"1"]


# -- Compare-and-set ----------------------------------------------------------


def life_s(storage: gateway.Storage, key: bytes = ID) -> float:
    """What is left of a key's life, in seconds; -1 for ever, -2 gone."""
    left_ms: int = storage._run("PTTL", key)
    return left_ms / 1000 if left_ms > 0 else left_ms


def nonces(storage: gateway.Storage) -> list[bytes]:
    """The keys of used nonces."""
    return [key for key in storage._run("KEYS", "{*") if not key.startswith(b"{limits}")]


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


@pytest.mark.parametrize("early_s", [-59, 0, 59])
def test_nonce_outlives_its_request(
    client: WsgiClient, storage: gateway.Storage, early_s: int
) -> None:
    """Twice the skew and a second, whatever its time: another gateway's clock may be late."""
    client.register()
    for key in nonces(storage):
        storage._run("DEL", key)
    now_s = int(client.gateway.clock())
    assert client.call("/certificate/sign", SIGN, ts=now_s + early_s).errno == 104
    (nonce,) = nonces(storage)
    assert 115 < life_s(storage, nonce) <= 121
    for stale_s in (-62, 62):
        assert client.call("/certificate/sign", SIGN, ts=now_s + stale_s).errno == 109
    assert nonces(storage) == [nonce]  # of what is stale nothing is kept


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
        assert take(storage, 1.7e9, 9, b"%d" % number) == 0
    assert names_taken(storage) == {b"0", b"1", b"2"}
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
        st.tuples(st.sampled_from([0, 1, 4, 3600, 7200, 14_399, 14_400, 28_800]), st.booleans()),
        max_size=14,
    ),
)
@examples(max_examples=40, deadline=None)
def test_a_budget_that_refills_evenly(
    store: gateway.EmbeddedStore, limit: int, steps: list[tuple[int, bool]]
) -> None:
    """Against a tank kept here, of which a message takes one part of ``limit``.

    Gaps are quarters of a second; where a step says so, the message is given back, twice.
    """
    storage = gateway.Storage(store.url)
    storage._run("DEL", HOUR, LIST)
    now_s, used = 1_700_000_000.0, Fraction(0)
    for number, (quarters, given_back) in enumerate(steps):
        now_s, name = now_s + quarters / 4, b"%d" % number
        used = max(Fraction(0), used - Fraction(quarters * limit, 4 * 3600))
        wait_s = take(storage, now_s, limit, name)
        if used + 1 <= limit:
            assert wait_s == 0
            if given_back:
                give_back(storage, now_s, limit, name)
                give_back(storage, now_s, limit, name)
            else:
                used += 1
        else:
            assert wait_s == math.ceil((used + 1 - limit) * 3600 / limit) >= 1


@pytest.mark.parametrize("limit", [1, 10])
def test_threads_race_for_messages(storage: gateway.Storage, patient: None, limit: int) -> None:
    """Never more than the limit; all others are told how long to wait."""
    now_s = time.time()
    names = [[os.urandom(8) for _ in range(3)] for _ in range(40)]
    found = together(40, lambda n: [take(storage, now_s, limit, name) for name in names[n]])
    waits = list(itertools.chain(*found))
    assert waits.count(0) == limit
    assert set(waits) == {0, 3600 // limit}
    assert len(names_taken(storage)) == limit
    assert names_taken(storage) <= set(itertools.chain(*names))
    assert 3590 < life_s(storage, HOUR) <= 3600


def test_giving_back_is_idempotent(storage: gateway.Storage) -> None:
    """It may be repeated after a time-out, and may name what was never taken: nothing else goes."""
    give_back(storage, 1.7e9, 2, b"never")
    assert contents(storage) == {}
    assert take(storage, 1.7e9, 2, b"mine") == take(storage, 1.7e9, 2, b"other") == 0
    assert take(storage, 1.7e9, 2, b"refused") == 1800
    for name in (b"mine", b"mine", b"refused", b"never", b""):
        give_back(storage, 1.7e9, 2, name)
        assert names_taken(storage) == {b"other"}
    assert take(storage, 1.7e9, 2, b"another") == 0
    assert take(storage, 1.7e9, 2, b"refused") == 1800


def test_threads_race_to_give_back(storage: gateway.Storage, patient: None) -> None:
    """Each one twice, while others take: what is left is exactly what nobody gave back."""
    names = [b"%d" % n for n in range(40)]

    def one(n: int) -> None:
        assert take(storage, 1.7e9, 1000, names[n]) == 0
        if n % 2:
            give_back(storage, 1.7e9, 1000, names[n])
            give_back(storage, 1.7e9, 1000, names[n])

    together(40, one)
    assert names_taken(storage) == set(names[::2])
    assert int(storage._run("GET", HOUR)) == (1_700_000_000 + 20 * 3.6) * 1e6


def test_a_counter_is_deleted_with_its_last_message(storage: gateway.Storage) -> None:
    assert take(storage, 1.7e9, 3, b"mine") == 0
    give_back(storage, 1.7e9 + 5, 3, b"mine")
    assert storage._run("EXISTS", HOUR, LIST) == 0


def test_limit_that_was_changed(storage: gateway.Storage) -> None:
    """After a restart with other settings: lower holds at once, higher gives room."""
    assert [take(storage, 1.7e9, 3, b"%d" % n) for n in range(3)] == [0, 0, 0]
    assert take(storage, 1.7e9, 1, b"3") == 3600
    assert take(storage, 1.7e9, 4, b"4") == 900
    assert take(storage, 1.7e9 + 900, 4, b"5") == 0


def test_clock_that_was_set_back(storage: gateway.Storage) -> None:
    """Nobody is told to wait longer than the period, and what was counted counts."""
    assert take(storage, 1.7e9, 1, b"1") == 0
    assert take(storage, 1.7e9 - 100_000, 1, b"2") == 3600
    assert take(storage, 1.7e9 + 3599.5, 1, b"3") == 1
    assert take(storage, 1.7e9 + 3600, 1, b"4") == 0


# -- A message that nobody took -----------------------------------------------


def user_of(client: WsgiClient) -> gateway.User:
    """The record of a client's session."""
    assert client.credentials
    record = client.gateway.storage.get(client.gateway.secrets.id_for(client.credentials.hawk_id))
    assert record
    return gateway.User.unpack(record)


@contextlib.contextmanager
def broken_outbox(client: WsgiClient) -> Iterator[None]:
    """Meanwhile the outbox takes no message."""
    outbox = client.gateway.sms.outbox
    assert outbox
    with pytest.MonkeyPatch.context() as broken:
        broken.setattr(outbox, "folder", Path("/dev/null/outbox"))
        yield


def test_message_that_nobody_took_gives_everything_back(
    client: WsgiClient, storage: gateway.Storage
) -> None:
    """What the session counted, when it asked, and the number, which it may choose anew."""
    client.register()
    before = user_of(client)
    with broken_outbox(client):
        for path in ("/sms/verify", "/sms/mt/verify", "/sms/verify"):
            answer = client.call(path, {"msisdn": NUMBER, "mcc": "234"})
            assert (answer.status, answer.errno) == (503, 201)
            assert user_of(client) == before
        assert client.call("/sms/resend_code").errno == 111
        assert client.call("/sms/verify_code", {"code": "123456"}).errno == 111
    assert counted(client.gateway) == 0
    assert client.ask("+447700900124").status == 200
    assert user_of(client).sends == 1
    code = client.code("+447700900124")
    assert client.call("/sms/verify_code", {"code": code}).json == {"msisdn": "+447700900124"}


def test_paid_message_that_nobody_took_gives_everything_back(
    make_client: Callable[..., WsgiClient], storage: gateway.Storage
) -> None:
    """The count of the hour too; of two providers that fail, both counts."""
    with contextlib.closing(socket.socket()) as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}/"
    login = {"api_key": "k", "api_secret": "s"}
    entries = [{"kind": "nexmo", "endpoint": f"{url}{n}", **login} for n in range(2)]
    client = make_client(sms_providers=entries, sends_per_hour=2)
    client.register()
    before = user_of(client)
    assert take(storage, client.gateway.clock(), 2, b"another's") == 0
    for _ in range(3):
        answer = client.ask()
        assert (answer.status, answer.errno) == (503, 201)
        assert user_of(client) == before
        assert counted(client.gateway) == 0
    assert client.call("/sms/resend_code").errno == 111


@pytest.mark.parametrize("path", ["/sms/verify", "/sms/mt/verify", "/sms/resend_code"])
def test_message_that_nobody_took_leaves_the_code_that_waits(client: WsgiClient, path: str) -> None:
    """With its kind, network, life and tries, and without a trace of the other."""
    client.register()
    assert client.ask(mcc="234").status == 200
    assert client.call("/sms/verify_code", {"code": another(client.code())}).errno == 105
    before, code = user_of(client), client.code()
    with broken_outbox(client):
        answer = client.call(path, {"msisdn": NUMBER, "mcc": "310"})
        assert (answer.status, answer.errno) == (503, 201)
    assert user_of(client) == before
    assert client.call("/sms/verify_code", {"code": code}).status == 200


# -- A store that refuses -----------------------------------------------------


def calls_of(storage: gateway.Storage) -> list[Callable[[], Any]]:
    """Every method, once."""
    return [
        lambda: storage.get(ID),
        lambda: storage.create(ID, b"new", 9),
        lambda: storage.commit(ID, b"old", b"new", -1, "n", 9),
        lambda: take(storage, 1.7e9, 9, b"name"),
        lambda: give_back(storage, 1.7e9, 9, b"name"),
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
        return time.monotonic() - started < 1 * shared()
    return False


def test_full_server_writes_nothing(storage: gateway.Storage) -> None:
    """But for who is there already: a commit is done, all of it. Catches one that dies half-way."""
    storage.create(ID, b"old", 100)
    before = contents(storage)
    limit = storage._run("CONFIG", "GET", "maxmemory")[1]
    storage._run("CONFIG", "SET", "maxmemory", 1)
    try:
        for call in (calls_of(storage)[1], calls_of(storage)[3]):  # a session, a message
            assert is_unavailable_soon(call)
            storage._run("SCRIPT", "FLUSH")
            assert is_unavailable_soon(call)
        assert contents(storage) == before
        assert storage.commit(ID, b"old", b"new", -1, "n", 9) is Commit.DONE
        assert storage.commit(ID, b"new", b"", -1, "n", 9) is Commit.REPLAYED
        assert storage.commit(ID, b"new", b"", -1, "m", 9) is Commit.DONE
        assert storage.get(ID) is None
    finally:
        storage._run("CONFIG", "SET", "maxmemory", limit)


def fill(storage: gateway.Storage) -> list[bytes]:
    """Fill a store with records like those of /register until it takes no more; their keys."""
    keys, refusals = list[bytes](), 0
    while refusals < 5:
        some = [os.urandom(16) for _ in range(100)]
        try:
            lab.load_store(
                storage, [(key, ("SET", key, os.urandom(34), "EX", 10_000)) for key in some]
            )
            keys, refusals = keys + some, 0
        except gateway.Unavailable:  # it has room again when a table that grew has moved
            refusals += 1
            time.sleep(0.1)
    return keys


@pytest.mark.slow
def test_store_max_bytes(keys_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full of sessions that strangers opened, the embedded store opens no more.

    Whoever has a session can verify, sign and leave all the same. Nothing is lost, nothing is
    evicted; a start over it works; once sessions have expired, or were deleted, all is as before.
    """
    monkeypatch.setattr(gateway, "STORE_START_S", 0.2)
    folder, limit = str(tmp_path / "store"), 10_000_000
    store = gateway.EmbeddedStore(folder, limit)
    try:
        settings = gateway.Settings(keys_dir=keys_dir, data_dir=str(tmp_path))
        client = WsgiClient(gateway.create_app(settings, store.url)).verified()
        storage = client.gateway.storage
        assert storage.check(bytes(32)) == []  # leaves its mark
        waits = client.another()
        waits.register()
        assert waits.ask().status == 200
        leaves = client.another().verified("+447700900124")
        keys, opened = fill(storage), 0
        assert len(keys) > 50_000  # 120 bytes each
        while (answer := client.call("/register", signed=False)).status == 200:
            opened += 1
        assert (answer.status, answer.errno) == (503, 201)
        assert opened < 2000
        used = int(storage.info()[0]["used_memory"])
        assert 0.98 * limit < used < 1.02 * limit
        before = storage._run("DBSIZE")
        assert client.call("/certificate/sign", SIGN).status == 200
        assert waits.call("/sms/verify_code", {"code": waits.code()}).status == 200
        assert leaves.call("/unregister").status == 204
        assert client.get("/__heartbeat__").status == 503
        assert client.get("/__lbheartbeat__").status == 200
        assert storage._run("DBSIZE") == before + 2  # three nonces, and one record less
        assert int(storage.info()[0]["evicted_keys"]) == 0
        # With more room all is there; a start over a store that is full works, too.
        store.stop()
        for size in (3_000_000, limit):
            store = gateway.EmbeddedStore(folder, size)
            assert all("is full" in said for said in gateway.Storage(store.url).check(bytes(32)))
            assert client.call("/certificate/sign", SIGN).status == 200
            store.stop()
        store = gateway.EmbeddedStore(folder, limit)
        lab.load_store(storage, [(key, ("PEXPIRE", key, 1)) for key in keys])
        until(lambda: storage._run("DBSIZE") < 2 * opened + 10_000, 30)
        assert client.register().status == 200
    finally:
        store.stop()


@pytest.mark.parametrize("limit", [0, 10_000_000])
def test_store_max_bytes_of_a_running_gateway(
    start_gateway: Callable[..., GatewayProcess], limit: int
) -> None:
    """It reaches the server, also by default."""
    options = ("--store-max-bytes", str(limit)) if limit else ()
    running = start_gateway(*options)
    storage = gateway.Storage(f"unix://{running.folder}/data/store.sock")
    told = storage._run("CONFIG", "GET", "maxmemory*")
    named = dict(zip(told[::2], told[1::2], strict=True))
    assert int(named[b"maxmemory"]) == (limit or gateway.Settings().store_max_bytes)
    assert named[b"maxmemory-policy"] == b"noeviction"


def test_message_of_a_phone_to_a_full_server(
    make_client: Callable[..., WsgiClient], storage: gateway.Storage
) -> None:
    """503, so that the provider delivers it again; then it is answered, and once.

    Catches a step that takes its message for used up because the write was tried.
    """
    with Provider(taken) as vonage:
        webhook = [{"kind": "nexmo", "path_secret": "s"}]
        client = make_client(sms_providers=[vonage.nexmo()], sms_inbound=webhook)
        client.register()
        assert client.credentials
        message = {"msisdn": NUMBER[1:], "text": client.credentials.hawk_id, "messageId": "m1"}
        before = contents(storage)
        storage._run("CONFIG", "SET", "maxmemory", 1)
        try:
            answer = client.call("/sms/momt/s?provider=nexmo", message, signed=False)
            assert (answer.status, answer.errno) == (503, 201)
        finally:
            storage._run("CONFIG", "SET", "maxmemory", 0)
        assert contents(storage) == before
        assert vonage.received == []
        for _ in range(2):
            answer = client.call("/sms/momt/s?provider=nexmo", message, signed=False)
            assert answer.status == 200
        assert len(vonage.received) == 1


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
    storage._run("LPUSH", HOUR, "x")  # reads as a counter at rest, and is replaced by one
    assert (take(storage, 1.7e9, 1, b"name"), take(storage, 1.7e9, 1, b"other")) == (0, 3600)
    storage._run("SET", LIST, "x")
    assert is_unavailable_soon(lambda: take(storage, 1.8e9, 9, b"name"))
    assert is_unavailable_soon(lambda: give_back(storage, 1.7e9, 9, b"name"))


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
    halt(pid_of(own_store))
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
    """redis-py's default sends it again: then a commit finds its own nonce, and is a replay."""
    monkeypatch.setattr(gateway, "STORAGE_TIMEOUT_S", 0.1)
    storage, watcher = gateway.Storage(own_store.url), gateway.Storage(own_store.url)
    watcher.create(ID, b"old", 100)
    take(watcher, 1.7e9, 9, b"first")
    watcher.commit(ID, b"old", b"old")
    watcher._run("CONFIG", "RESETSTAT")
    if known:
        storage.get(ID)
    halt(pid_of(own_store))
    with ThreadPoolExecutor(2) as pool:
        count = pool.submit(is_unavailable_soon, lambda: take(storage, 1.7e9, 9, b"second"))
        assert is_unavailable_soon(lambda: storage.commit(ID, b"old", b"new", -1, "n", 9))
        assert count.result()
    os.kill(pid_of(own_store), signal.SIGCONT)
    until(lambda: not is_unavailable_soon(lambda: watcher.ping(1.7e9)))
    assert executions(watcher, "exists") <= 1  # which a commit asks once: is the nonce used?
    assert executions(watcher, "hset") == len(names_taken(watcher)) - 1 <= 1
    # Whether it was made or not, who counted can give it back.
    give_back(watcher, 1.7e9, 9, b"second")
    assert names_taken(watcher) == {b"first"}


@pytest.mark.parametrize(
    ("path", "stall_s", "paid"),
    [
        ("/sms/verify_code", 0.7, False),
        ("/sms/resend_code", 0, False),
        ("/sms/resend_code", 0, True),
    ],
    ids=["short", "long", "counting"],
)
def test_stall_between_reading_and_writing(
    own_store: gateway.EmbeddedStore, keys_dir: str, tmp_path: Path, path: str, stall_s: float,
    paid: bool, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """503/201 within a second, whether the write ran or not, and it is not sent again.

    Catches a nonce that is spent once more after the write that timed out had spent it: the
    client is told that it replayed its own request. ``stall_s`` 0: until it is answered.
    """
    pid, timers, stalls = pid_of(own_store), list[threading.Timer](), threading.Event()

    def clock() -> float:
        if stalls.is_set():  # the request has read its record, and not written yet
            stalls.clear()
            halt(pid)
            timers.append(threading.Timer(stall_s or 60, os.kill, (pid, signal.SIGCONT)))
            timers[0].start()
        return time.time()

    settings = gateway.Settings(keys_dir=keys_dir, data_dir=str(tmp_path), **OPEN)
    client = WsgiClient(gateway.create_app(settings, own_store.url, clock))
    storage = gateway.Storage(own_store.url)
    client.register()
    client.ask()
    if paid:  # the first that it writes are the counters of the limits
        monkeypatch.setattr(gateway.OutboxSms, "paid", True)
        client.gateway.sms.paid = True
    storage._run("CONFIG", "RESETSTAT")
    now_s, before = int(time.time()), user_of(client)
    stalls.set()
    started = time.monotonic()
    answer = client.call(path, {"code": "000000"}, ts=now_s)
    took_s = time.monotonic() - started
    timers[0].cancel()
    timers[0].join()
    os.kill(pid, signal.SIGCONT)
    until(lambda: not is_unavailable_soon(lambda: storage.ping(1.7e9)))
    assert (answer.status, answer.errno) == (503, 201)
    assert executions(storage, "exists") <= 1  # which a commit with a nonce asks once
    if not stall_s:  # what the first may have reserved or counted is given back
        until(lambda: user_of(client) == before and counted(client.gateway) == 0)
    assert took_s < 1 * shared()
    again = client.call(path, {"code": "000000"})
    assert again.status == 200 or again.errno == 105


@pytest.mark.slow
def test_hung_server_over_http(
    own_store: gateway.EmbeddedStore, keys_dir: str, tmp_path: Path
) -> None:
    """503/201 for every step, and 503 with its body for the health check; then all is as before."""
    settings = gateway.Settings(keys_dir=keys_dir, data_dir=str(tmp_path), **OPEN)
    client = WsgiClient(gateway.create_app(settings, own_store.url))
    client.verified()
    halt(pid_of(own_store))
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
    assert time.monotonic() - started < 1 * shared()
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


@pytest.mark.slow
def test_server_that_outlives_its_gateway_keeps_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hung when its gateway is killed, it cannot die yet: nobody else may write to its files."""
    monkeypatch.setattr(gateway, "TAKEOVER_S", 0.05)
    script = "import gateway, sys; s = gateway.EmbeddedStore(sys.argv[1]); "
    script += "print(s._client.info()['process_id'], flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", script, str(tmp_path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=gateway.ROOT, stdin=pipe, stdout=pipe) as other:
        assert other.stdout
        server = psutil.Process(int(other.stdout.readline()))
        try:
            gateway.Storage(f"unix://{tmp_path}/store.sock").create(ID, b"old", 100)
            halt(server.pid)
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
                found.append(hmac.digest(salt, code.encode(), "sha256")[:8])
                found.append(hashlib.sha256(salt + code.encode()).digest()[:8])
                found.append(hmac.digest(salt, key + code.encode(), "sha256")[:8])
    return found


def token_spellings(token: str) -> list[bytes]:
    """A session token, its Hawk id and its Hawk key, raw and in letters, and pieces of each."""
    found = []
    hawk_id, key = gateway.derive_credentials(gateway.SessionToken(bytes.fromhex(token)))
    for text in (token, hawk_id, key.hex()):
        raw = bytes.fromhex(text)
        found += [raw[start : start + 8] for start in range(0, 32, 4)] + [raw[::-1][:8]]
        found += [base64.b64encode(raw)[:40], hashlib.sha256(raw).digest()[:12]]
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


def masked_key(client: WsgiClient) -> bytes:
    """A session's Hawk key as the store has it."""
    assert client.credentials
    hawk_id, key = client.credentials
    return gateway.mask_hawk_key(client.gateway.secrets.mask, hawk_id, key)


def test_registered_record_holds_nothing_of_the_hawk_key(
    client: WsgiClient, storage: gateway.Storage
) -> None:
    """Not two of its bytes in a row where they belong, and nothing that signs."""
    client.register()
    assert client.credentials
    (record,) = contents(storage).values()
    key = client.credentials.hawk_key
    assert record[:2] == b"\2\1"
    assert record[2:] == masked_key(client).rstrip(b"\0")
    same = [a == b for a, b in zip(record[2:], key, strict=False)]
    assert sum(same) < 5  # chance: one byte in 256
    assert [n for n in range(29) if key[n : n + 4] in record] == []
    thief = client.another()
    thief.credentials = client.credentials._replace(hawk_key=gateway.HawkKey(record[2:].ljust(32)))
    assert thief.call("/sms/verify", {"msisdn": NUMBER}).errno == 109


def test_store_and_its_file_reveal_nothing(
    own_store: gateway.EmbeddedStore, keys_dir: str, tmp_path: Path
) -> None:
    """Number, codes, token and Hawk id in no form, at any time of a session's life."""
    settings = gateway.Settings(
        keys_dir=keys_dir, data_dir=str(tmp_path), sends_per_session=9, **OPEN
    )
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
        assert held.count(masked_key(client)) >= 1  # we do see what is there
        assert [secret for secret in hidden if secret in held] == []

    look()
    assert client.ask(mcc="234", mnc="15").status == 200
    look(1)
    assert client.call("/sms/verify_code", {"code": another(client.code())}).errno == 105
    assert client.call("/sms/mt/verify", {"msisdn": NUMBER}).status == 204
    look(2)  # the older one's digest is there, too
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
    settings = gateway.Settings(keys_dir=keys_dir, data_dir=str(tmp_path), **OPEN)
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
    assert held.count(masked_key(client)) >= 1
    assert [secret for secret in hidden if secret in held] == []
    assert client.call("/sms/verify_code", {"code": client.code()}).status == 200


def test_what_is_left_of_who_has_unregistered(client: WsgiClient, storage: gateway.Storage) -> None:
    """No record; the nonces of the last minutes, which name nobody and soon die."""
    client.verified()
    other = client.another().verified("+447700900124")
    assert client.call("/unregister").status == 204
    records = [key for key in contents(storage) if not key.startswith(b"{")]
    assert len(records) == 1
    assert contents(storage)[records[0]][2:34] == masked_key(other)
    assert other.call("/unregister").status == 204
    left = contents(storage)
    assert all(key.startswith(b"{") and value == b"" for key, value in left.items())
    assert all(0 < life_s(storage, key) <= 121 for key in left)


def test_sessions_of_one_number_look_unrelated(
    client: WsgiClient, storage: gateway.Storage
) -> None:
    """Whoever holds the store cannot even tell that two sessions have the same number."""
    client.verified()
    client.another().verified()
    values = [value[34:58] for key, value in contents(storage).items() if len(key) == 16]
    assert len(values) == len(set(values)) == 2
