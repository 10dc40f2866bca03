"""Verified users in DynamoDB, their sessions in Redis: races, crashes and faults in between."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import servers
from botocore.exceptions import ClientError
from servers import assert_refused, wait_for
from support import AT_ONCE, NUMBER, ROOT, WIDE, WsgiClient, halt, shared
from test_storage import OldSession, version_1
from test_stores import KEY, NEW, OLD, new_id, together

import gateway
from gateway import Commit, DynamoTable, SplitStorage, StorageId, Unavailable

CODE = "123456"
SIGN = {"publicKey": gateway.public_key_json(KEY.public_key())}


@pytest.fixture(scope="module")
def dynalite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Dynalite]:
    if not servers.WANTED["dynalite"][0]:  # conftest.py leaves this file out, unless it is named
        pytest.skip("dynalite")
    folder = tmp_path_factory.mktemp("d")
    with servers.aws_credentials(), contextlib.closing(servers.Dynalite(folder)) as server:
        servers.make_table(DynamoTable(server.store("phones"), time.time))
        yield server


@pytest.fixture
def make(
    store: gateway.EmbeddedStore, storage: gateway.Storage, dynalite: servers.Dynalite,
    keys_dir: str, tmp_path: Path,
) -> Callable[..., WsgiClient]:  # fmt: skip
    """A client of an application over the embedded store and dynalite."""

    def build(**options: Any) -> WsgiClient:
        given = {"certificate_store": dynalite.store("phones"), "keys_dir": keys_dir}
        folder = {"data_dir": str(tmp_path), "resend_gaps_s": AT_ONCE, **WIDE}
        settings = gateway.Settings(**{**given, **folder, **options})
        client = WsgiClient(gateway.create_app(settings, store.url))
        assert client.gateway.sms.outbox
        client.gateway.sms.outbox.console = None
        return client

    return build


@pytest.fixture
def split(make: Callable[..., WsgiClient]) -> SplitStorage:
    storage = make().gateway.storage
    assert isinstance(storage, SplitStorage)
    for key in items(storage):
        storage.table.delete(key)
    return storage


def items(storage: gateway.Storage) -> list[bytes]:
    assert isinstance(storage, SplitStorage)
    found = storage.table._call("scan", ConsistentRead=True)["Items"]
    return [item["id"]["B"] for item in found if item["id"]["B"] != b"heartbeat"]


def waiting_user(client: WsgiClient, verified: bool = False) -> StorageId:
    """Make a session that waits for CODE, as /sms/verify does, but without an SMS."""
    gate = client.gateway
    credentials = gateway.derive_credentials(gateway.SessionToken(os.urandom(32)))
    key = gate.secrets.id_for(credentials.hawk_id)
    seal = gateway.seal_msisdn(gate.secrets.seal, credentials.hawk_id, gateway.Msisdn(NUMBER))
    masked = gateway.mask_hawk_key(gate.secrets.mask, *credentials)
    user = gateway.User(masked, sealed=seal, sends=1, masked=True)
    gate.storage.create(key, user.pack(), 1000)
    if verified:
        done = user._replace(verified_s=int(time.time()) - 9)
        assert gate.storage.commit(key, user.pack(), done.pack(), 1000) is Commit.DONE
        user = done
    digest = gateway.code_digest(gate.secrets.code, key, CODE)
    asked = user._replace(code_digest=digest, code_expires_s=int(time.time()) + 600)
    kept = gate.storage.get(key)
    assert kept
    assert gate.storage.commit(key, kept, asked.pack()) is Commit.DONE
    client.credentials = credentials
    return key


class Crash(BaseException):
    """The process ends here, as far as what comes after can tell."""


def test_who_is_verified_for_ever_moves_as_well(
    split: SplitStorage, make: Callable[..., WsgiClient]
) -> None:
    """With verified_ttl_s = 0 neither the stub nor the item expires."""
    client = make(verified_ttl_s=0)
    key = waiting_user(client)
    assert client.call("/sms/verify_code", {"code": CODE}).status == 200
    (item,) = items(split)
    assert split._run("GET", key, key=key) == gateway.IN_TABLE + item[16:]
    found = split.table._call("get_item", Key={"id": {"B": item}}, ConsistentRead=True)
    assert found["Item"]["expires"] == {"N": "0"}
    assert split.get(key) == found["Item"]["record"]["B"]


def test_records_of_version_1_are_read_in_dynamodb(
    split: SplitStorage, make: Callable[..., WsgiClient]
) -> None:
    """Who was verified before the update has proofs, asks again, is verified again, and leaves."""
    old = OldSession(make().app)
    old.write(split, verified_s=int(time.time()) - 1000)
    kept = split.get(old.key)
    assert kept
    asked = version_1(old.plain_key, sealed=b"s" * 24)
    assert split.commit(old.key, kept, asked) is Commit.DONE
    assert split.commit(old.key, asked, old.written, 1000) is Commit.DONE
    assert len(items(split)) == 1
    assert old.call("/certificate/sign", SIGN).status == 200
    assert split.get(old.key) == old.written
    assert old.call("/sms/resend_code").status == 200
    assert old.is_renewed(split)
    assert old.call("/certificate/sign", SIGN).status == 200
    assert old.call("/sms/verify_code", {"code": old.code()}).status == 200
    assert old.is_renewed(split)
    assert len(items(split)) == 1
    assert old.call("/unregister").status == 204
    assert items(split) == []


# -- Races ---------------------------------------------------------------------


def test_no_unregistered_user_comes_back_in_500_races(
    split: SplitStorage, make: Callable[..., WsgiClient]
) -> None:
    client, seen = make(), set[tuple[Any, ...]]()
    for n in range(500):
        key = waiting_user(client, verified=n % 2 == 1)
        answers: dict[str, Any] = {}

        def call(path: str, body: Any = None, answers: dict[str, Any] = answers) -> None:
            time.sleep(random.random() * 0.006)
            answer = client.call(path, body)
            answers[path] = answer.status if answer.status < 300 else answer.errno

        calls: list[tuple[str, Any]] = [("/unregister", None), ("/certificate/sign", SIGN)]
        calls += [("/sms/verify_code", {"code": CODE})]
        together(*(lambda c=c: call(*c) for c in calls))
        assert answers["/unregister"] == 204, answers
        assert answers["/certificate/sign"] in (200, 104, 110), answers
        assert answers["/sms/verify_code"] in (200, 110), answers
        assert split.get(key) is None, (n, answers)
        assert split._run("EXISTS", key) == 0, (n, answers)
        assert client.call("/certificate/sign", SIGN).errno == 110, (n, answers)
        seen.add(tuple(sorted(answers.items())))
    assert items(split) == []
    assert len(seen) >= 4, seen  # they did race


def test_verifications_at_once_leave_one_item(
    split: SplitStorage, make: Callable[..., WsgiClient]
) -> None:
    client = make()
    for n in range(20):
        waiting_user(client, verified=n % 2 == 1)
        answers: list[Any] = []

        def verify(answers: list[Any] = answers) -> None:
            answers.append(client.call("/sms/verify_code", {"code": CODE}).status)

        together(*[verify] * 4)
        assert sorted(answers) == [200, 410, 410, 410]
        assert client.call("/certificate/sign", SIGN).status == 200
        assert len(items(split)) == n + 1


# -- Crashes -------------------------------------------------------------------


@pytest.mark.parametrize("verified", [False, True])
@pytest.mark.parametrize("where", ["put", "commit", "delete"])
def test_a_crash_while_a_user_moves(
    split: SplitStorage, make: Callable[..., WsgiClient], monkeypatch: pytest.MonkeyPatch,
    verified: bool, where: str,
) -> None:  # fmt: skip
    """After each step of the hand-over: the user is there, and can go on."""
    client = make()
    storage = client.gateway.storage
    assert isinstance(storage, SplitStorage)
    waiting_user(client, verified)
    if where == "commit":
        crash_after(monkeypatch, gateway.Storage, "commit")
    else:
        crash_after(monkeypatch, storage.table, where)
    with contextlib.suppress(Crash):
        client.call("/sms/verify_code", {"code": CODE})
    monkeypatch.undo()
    answer = client.call("/sms/verify_code", {"code": CODE})
    assert answer.status == 200 or answer.errno == 111
    assert (answer.status == 200) == (where == "put")
    assert client.call("/certificate/sign", SIGN).status == 200
    assert client.call("/unregister").status == 204
    assert client.call("/certificate/sign", SIGN).errno == 110
    # What no stub names is left at most, and expires.
    left = {("put", False): 1, ("put", True): 1, ("commit", True): 1}.get((where, verified), 0)
    assert len(items(split)) == left


@pytest.mark.parametrize("where", ["mark", "delete"])
def test_a_crash_while_a_user_leaves(
    split: SplitStorage, make: Callable[..., WsgiClient], monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:  # fmt: skip
    client = make()
    storage = client.gateway.storage
    assert isinstance(storage, SplitStorage)
    key = waiting_user(client)
    assert client.call("/sms/verify_code", {"code": CODE}).status == 200
    if where == "mark":
        crash_after(monkeypatch, gateway.Storage, "commit")
    else:
        crash_after(monkeypatch, storage.table, "delete")
    with contextlib.suppress(Crash):
        client.call("/unregister")
    monkeypatch.undo()
    assert client.call("/certificate/sign", SIGN).errno == 110
    assert client.call("/unregister").errno == 110
    assert items(split) == []
    assert split._run("EXISTS", key) == 0


def crash_after(patch: pytest.MonkeyPatch, thing: Any, name: str) -> None:
    """Let ``thing.name`` do its work, and then nothing more."""
    real = getattr(thing, name)

    def run(*args: Any, **more: Any) -> Any:
        real(*args, **more)
        raise Crash

    patch.setattr(thing, name, run)


# -- Faults of DynamoDB --------------------------------------------------------


@pytest.mark.parametrize("fault", ["hung", "gone", "no table"])
def test_dynamodb_fails(
    split: SplitStorage, make: Callable[..., WsgiClient], dynalite: servers.Dynalite, fault: str
) -> None:
    client = make()
    waiting, moved = client.another(), client.another()
    waiting_user(waiting)
    key = waiting_user(moved)
    assert moved.call("/sms/verify_code", {"code": CODE}).status == 200
    break_it: dict[str, Callable[[], Any]] = {
        "hung": lambda: halt(dynalite.process.pid),
        "gone": dynalite.close,
        "no table": lambda: drop_table(split.table),
    }
    break_it[fault]()
    try:
        assert_refused(lambda: moved.call("/certificate/sign", SIGN))
        assert_refused(lambda: moved.call("/unregister"))
        assert_refused(lambda: waiting.call("/sms/verify_code", {"code": CODE}, nonce="n"))
        started = time.monotonic()
        beat = client.get("/__heartbeat__")
        assert (beat.status, beat.json) == (503, {"storage": False, "sms": True})
        assert "retry-after" in beat.headers
        # Who is not verified needs DynamoDB for nothing; nor does who never was here.
        client.register()
        assert client.call("/certificate/sign", SIGN).errno == 104
        client.credentials = gateway.derive_credentials(gateway.SessionToken(os.urandom(32)))
        assert client.call("/certificate/sign", SIGN).errno == 110
        assert time.monotonic() - started < 1 * shared()
    finally:
        dynalite.process.send_signal(signal.SIGCONT)
        if dynalite.process.poll() is not None:
            dynalite.start()
        if fault == "no table":
            servers.make_table(split.table)
    wait_for(lambda: client.get("/__heartbeat__").status == 200, "the next health check", 2)
    assert waiting.call("/sms/verify_code", {"code": CODE}, nonce="n").errno == 109  # used up
    assert waiting.call("/sms/verify_code", {"code": CODE}).status == 200
    assert waiting.call("/certificate/sign", SIGN).status == 200
    if fault != "no table":  # which took its items with it
        assert moved.call("/certificate/sign", SIGN).status == 200
        assert moved.call("/unregister").status == 204
        assert split._run("EXISTS", key) == 0
    assert moved.call("/certificate/sign", SIGN).errno == 110
    assert not [item for item in items(split) if item.startswith(key)]


def drop_table(table: DynamoTable) -> None:
    table._client.delete_table(TableName=table.name)
    with contextlib.suppress(*table.errors):
        while table._client.describe_table(TableName=table.name):
            time.sleep(0.02)


def test_what_has_expired_is_gone_even_if_it_is_still_there(
    dynalite: servers.Dynalite, split: SplitStorage
) -> None:
    """DynamoDB itself deletes days later, and dynalite never."""
    now_s = [1000.0]
    table = DynamoTable(dynalite.store("phones"), lambda: now_s[0])
    table.put(b"k" * 24, NEW, 60)
    assert table.get(b"k" * 24) == NEW
    now_s[0] = 1059.9
    assert table.get(b"k" * 24) == NEW
    now_s[0] = 1060.0
    assert table.get(b"k" * 24) is None
    table.put(b"l" * 24, NEW, 0)
    now_s[0] = 1e10
    assert table.get(b"l" * 24) == NEW


def test_what_is_kept_of_a_number_is_found(make: Callable[..., WsgiClient]) -> None:
    """The record of a blocked number is empty; it lies in the session store, as all others do."""
    client = make()
    storage, key = client.gateway.storage, client.gateway.secrets.key_for("blocked", _NUMBER)
    storage.create(key, b"", 0)
    assert storage.get(key) == b""
    client.register()
    assert client.ask().errno == 107
    assert storage.commit(key, b"", b"") is Commit.DONE  # as the command unblock does
    assert client.ask().status == 200


_NUMBER = gateway.Msisdn(NUMBER)


def test_an_item_is_never_overwritten(split: SplitStorage) -> None:
    split.table.put(b"k" * 24, OLD, 60)
    with pytest.raises(Unavailable):
        split.table.put(b"k" * 24, NEW, 60)
    assert split.table.get(b"k" * 24) == OLD


def test_a_stub_whose_item_is_gone_is_nobody(split: SplitStorage) -> None:
    key = new_id()
    split.create(key, OLD, 1000)
    assert split.commit(key, OLD, NEW, 1000) is Commit.DONE
    split.table.delete(items(split)[0])
    assert split.get(key) is None


def test_an_id_that_no_session_had_costs_no_read(
    split: SplitStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def called(*args: Any, **more: Any) -> Any:
        raise AssertionError("a paid call")

    monkeypatch.setattr(split.table, "_call", called)
    assert split.get(new_id()) is None
    assert split.commit(new_id(), OLD, OLD, -1, "a", 60) is Commit.GONE
    key = new_id()
    split.create(key, OLD, 1000)
    assert split.commit(key, OLD, NEW, -1, "a", 60) is Commit.DONE
    assert split.commit(key, NEW, b"", -1, "b", 60) is Commit.DONE


def test_without_its_setting_a_moved_user_is_not_lost(
    split: SplitStorage, storage: gateway.Storage, make: Callable[..., WsgiClient]
) -> None:
    """An operator who forgets certificate_store sees 503, and nobody is dropped."""
    client, forgetful = make(), make(certificate_store="")
    waiting_user(client)
    assert client.call("/sms/verify_code", {"code": CODE}).status == 200
    forgetful.credentials = client.credentials
    assert_refused(lambda: forgetful.call("/certificate/sign", SIGN))
    assert client.call("/certificate/sign", SIGN).status == 200


# -- The start -----------------------------------------------------------------


def test_refused_no_table(dynalite: servers.Dynalite) -> None:
    with pytest.raises(gateway.StartError, match=r"not found; \S+/store.md has the commands"):
        DynamoTable(dynalite.store("nowhere"), time.time).check()


def test_refused_a_table_of_another_kind(dynalite: servers.Dynalite) -> None:
    table = DynamoTable(dynalite.store("other"), time.time)
    table._client.create_table(
        TableName="other",
        KeySchema=[{"AttributeName": "name", "KeyType": "HASH"}],
        AttributeDefinitions=[{"AttributeName": "name", "AttributeType": "S"}],
        BillingMode="PAY_PER_REQUEST",
    )
    once_a_second = {"Delay": 1}
    table._client.get_waiter("table_exists").wait(TableName="other", WaiterConfig=once_a_second)
    with pytest.raises(gateway.StartError, match=r"ValidationException.* notebooks/operate/store"):
        table.check()


def test_refused_nobody_there() -> None:
    store = f"dynamodb://phones?region=x&endpoint_url=http://127.0.0.1:{servers.free_port()}"
    with servers.aws_credentials(), pytest.raises(gateway.StartError, match="cannot be used"):
        DynamoTable(store, time.time).check()


def test_refused_no_region(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    with pytest.raises(gateway.StartError, match="region"):
        DynamoTable("dynamodb://phones", time.time)


def test_a_table_that_keeps_what_has_expired_is_warned_of(
    dynalite: servers.Dynalite, caplog: pytest.LogCaptureFixture
) -> None:
    assert "keeps what has expired" in DynamoTable(dynalite.store("phones"), time.time).check()[0]
    moto = pytest.importorskip("moto")
    with moto.mock_aws():
        table = DynamoTable("dynamodb://phones?region=eu-west-1", time.time)
        servers.make_table(table)
        assert table.check() == []

        def refuse(**_: Any) -> None:
            raise ClientError({"Error": {"Code": "AccessDeniedException"}}, "DescribeTimeToLive")

        table._client.meta.events.register("before-call.dynamodb.DescribeTimeToLive", refuse)
        assert table.check() == []
    assert "AccessDeniedException on describe_time_to_live" in caplog.text


@pytest.mark.parametrize(
    "store",
    ["dynamodb:", "dynamodb://", "dynamodb://ab", "dynamodb://a/b", "dynamodb://tab?regoin=x",
     "mysql://table", "dynamodb://tab?region", "dynamodb://tab?region="],
)  # fmt: skip
def test_refused_settings(store: str) -> None:
    with pytest.raises(gateway.SettingsError, match="certificate_store"):
        gateway.Settings(certificate_store=store)


def test_boto3_is_loaded_only_for_dynamodb_and_missed_with_its_remedy() -> None:
    script = """
import sys, gateway
gateway.open_storage(gateway.Settings(), "unix:///nowhere", None, None)
assert not [name for name in sys.modules if name.startswith("boto")]
sys.modules["boto3"] = None
try:
    gateway.DynamoTable("dynamodb://phones", None)
except gateway.StartError as error:
    print(error)
"""
    told = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    assert "pip install boto3" in told
