"""What an attacker of the machine or the network finds: SECURITY.md's findings that stand alone."""

from __future__ import annotations

import contextlib
import errno
import hmac
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lab
import pytest
from cryptography.exceptions import InvalidTag
from support import NUMBER, ROOT, Clock, GatewayProcess, WsgiClient, shared
from test_serving import eventually, head, parsed, talk, verified, workers_of

import gateway

Start = Callable[..., GatewayProcess]
Make = Callable[..., WsgiClient]


# -- 7: signatures without a hash ---------------------------------------------


def without_hash(client: WsgiClient, path: str, body: bytes = b"") -> dict[str, str]:
    """An Authorization that does not cover the body, as hawk's own clients may write it."""
    assert client.credentials
    target = gateway.hawk_target("POST", f"http://{client.host}{path}")
    header = gateway.HawkHeader(
        client.credentials.hawk_id, str(int(client.gateway.clock())), "a" + path[-5:]
    )
    mac = gateway.hawk_mac("header", client.credentials.hawk_key, header, target)
    fields = {"id": header.id, "ts": header.ts, "nonce": header.nonce, "mac": mac}
    return {"HTTP_AUTHORIZATION": "Hawk " + ", ".join(f'{n}="{v}"' for n, v in fields.items())}


def test_a_hash_can_be_required(make_client: Make) -> None:
    strict = make_client(hawk_require_hash=True)
    strict.register()
    body = b'{"msisdn": "%s"}' % NUMBER.encode()
    answer = strict.raw("POST", "/sms/verify", body, without_hash(strict, "/sms/verify", body))
    assert (answer.status, answer.errno) == (401, 109)
    assert "hash" in answer.json["message"]
    answer = strict.raw("POST", "/unregister", b"", without_hash(strict, "/unregister"))
    assert (answer.status, answer.errno) == (401, 109)  # or somebody could add a body to it
    assert strict.outbox() == []
    assert strict.ask().status == 200  # our client sends one, and the session is still there
    assert strict.call("/unregister").status == 204


def test_clients_of_2014_need_no_hash(make_client: Make) -> None:
    lenient = make_client()
    lenient.register()
    body = b'{"msisdn": "%s"}' % NUMBER.encode()
    answer = lenient.raw("POST", "/sms/verify", body, without_hash(lenient, "/sms/verify", body))
    assert answer.status == 200


def test_the_start_warns_of_a_public_url_without_tls(caplog: pytest.LogCaptureFixture) -> None:
    providers = [{"kind": "nexmo", "api_key": "k", "api_secret": "s"}]

    def warned(**values: Any) -> str:
        caplog.clear()
        api: Any = {"sms_providers": providers, "trusted_proxies": [], **values}
        gateway.Settings(**api).warn()
        assert len(caplog.messages) < 2
        return "".join(caplog.messages)

    open_to_all = warned(public_url="http://id.example")
    assert "public_url is http" in open_to_all
    assert "hawk_require_hash" in open_to_all
    strict = warned(public_url="http://id.example", hawk_require_hash=True)
    assert "public_url is http" in strict
    assert "hawk_require_hash" not in strict
    assert warned(host="192.0.2.1")  # it is called http://192.0.2.1:5000
    assert warned(public_url="https://id.example") == ""
    gateway.Settings().warn()
    assert caplog.messages == []


def test_the_warning_is_in_the_log(start_gateway: Start) -> None:
    process = start_gateway(
        "--public-url", "http://id.example", "--trusted-proxies", "[]",
        "--sms-providers", '[{"kind": "nexmo", "api_key": "k", "api_secret": "s"}]',
    )  # fmt: skip
    assert "WARNING gateway: public_url is http" in process.output


# -- 5: the owner before ------------------------------------------------------

KEY = gateway.generate_key("RS256")
OTHER = "+447700900124"


def sign(client: WsgiClient) -> tuple[int, int | None]:
    """Status and errno of a request for a certificate."""
    answer = client.call(
        "/certificate/sign", {"publicKey": gateway.public_key_json(KEY.public_key())}
    )
    return answer.status, None if answer.status == 200 else answer.errno


@pytest.fixture
def clock() -> Clock:
    """A clock that moves when it is told to."""
    return Clock()


@pytest.fixture
def owners(make_client: Make, clock: Clock) -> tuple[WsgiClient, WsgiClient, WsgiClient]:
    """Who had a number before, who has it since a minute ago, and who has another number."""
    before = make_client(clock=clock).verified()
    stranger = before.another().verified(OTHER)
    clock.now_s += 3600
    now = before.another().verified()
    clock.now_s += 60
    return before, now, stranger


def test_everywhere_ends_the_sessions_that_verified_a_number_before(
    owners: tuple[WsgiClient, WsgiClient, WsgiClient], clock: Clock
) -> None:
    before, now, stranger = owners
    assert sign(before) == sign(now) == sign(stranger) == (200, None)
    assert now.call("/unregister", {"everywhere": True}).status == 204
    assert sign(now) == (401, 110)
    assert sign(before) == (400, 104)
    assert sign(before) == (400, 104)
    assert sign(stranger) == (200, None)
    # Both may verify the number again, in the old session or in a new one.
    clock.now_s += 1
    assert sign(now.another().verified()) == (200, None)
    assert before.ask().status == 200
    assert before.call("/sms/verify_code", {"code": before.code()}).status == 200
    assert sign(before) == (200, None)


def test_the_record_of_an_ended_session_loses_the_number_at_its_next_use(
    owners: tuple[WsgiClient, WsgiClient, WsgiClient], storage: gateway.Storage
) -> None:
    before, now, _ = owners
    assert before.credentials
    key = before.gateway.secrets.id_for(before.credentials.hawk_id)
    storage._run("EXPIRE", key, 1000, key=key)
    sealed = gateway.User.unpack(storage.get(key) or b"").sealed
    assert now.call("/unregister", {"everywhere": True}).status == 204
    assert sealed in (storage.get(key) or b"")
    assert sign(before) == (400, 104)
    assert sealed not in (storage.get(key) or b"")
    assert 900 < storage._run("TTL", key, key=key) <= 1000  # no longer than before


def test_where_an_ended_session_stands(
    owners: tuple[WsgiClient, WsgiClient, WsgiClient], clock: Clock
) -> None:
    """A page that was reloaded is told before it asks for a proof."""
    before, now, stranger = owners
    assert before.call("/session", method="GET").json["msisdn"] == NUMBER
    assert now.call("/unregister", {"everywhere": True}).status == 204
    answers = [before.call("/session", method="GET", nonce="seen") for _ in range(2)]
    assert answers[0].json["next"]["verified"] is False
    assert "msisdn" not in answers[0].json
    assert [answer.status for answer in answers] == [200, 401]  # its nonce is used up, as always
    assert stranger.call("/session", method="GET").json["next"]["verified"]


def test_a_shorter_life_of_verified_sessions_holds_for_older_ones(
    make_client: Make, clock: Clock
) -> None:
    """Else they would outlive what ``everywhere`` and ``forget`` leave behind."""
    month_s = 30 * 86400
    before = make_client(clock=clock, verified_ttl_s=12 * month_s).verified()
    shorter = make_client(clock=clock, verified_ttl_s=month_s)
    shorter.credentials = before.credentials
    clock.now_s += month_s
    assert sign(shorter) == (200, None)
    clock.now_s += 1
    assert sign(shorter) == (401, 110)
    assert shorter.call("/session", method="GET").errno == 110
    assert sign(before) == (200, None)


def test_a_code_of_before_verifies_nothing_once_the_proofs_are_ended(
    owners: tuple[WsgiClient, WsgiClient, WsgiClient], clock: Clock
) -> None:
    """Who had the phone until now may have read it, and would have proofs for a year."""
    before, now, _ = owners
    thief = before.another()
    thief.register()
    codes = []
    for client in (before, thief):
        assert client.ask().status == 200
        codes.append(client.code())
    assert now.call("/unregister", {"everywhere": True}).status == 204
    clock.now_s += 1
    assert thief.call("/session", method="GET").json["next"]["expiresIn"] == 0
    for client, code in zip((before, thief), codes, strict=True):
        for _ in range(2):
            assert client.call("/sms/verify_code", {"code": code}).errno == 111
        assert sign(client) == (400, 104)
    clock.now_s += gateway.HOUR_S
    assert before.ask().status == 200  # its number is gone, as it was verified
    assert before.call("/sms/verify_code", {"code": before.code()}).status == 200
    assert thief.call("/sms/resend_code").status == 200
    assert thief.call("/sms/verify_code", {"code": thief.code()}).status == 200
    assert sign(before) == sign(thief) == (200, None)


def test_a_code_is_as_old_as_its_message() -> None:
    """A phone may have it before its provider has answered. A second is before its own end."""
    settings, network = gateway.Settings(), gateway.Network()
    ask = gateway.Ask(gateway.Msisdn(NUMBER), "GB", b"s" * 24, network, long=False)
    asked = gateway.reserve(gateway.User(bytes(32)), ask, 7, settings, 100)
    assert asked
    waits = gateway.arm(asked, ask, b"d" * 8, gateway.Sent("nexmo", 1), settings, 110)
    assert gateway.code_sent_s(waits, settings) == 100
    assert gateway.end_proofs(waits, 99, settings, 111) == waits
    dead = waits._replace(code_digest=b"")
    assert gateway.end_proofs(waits, 100, settings, 111) == dead
    # Who was not verified keeps the number, so that another code may be asked for.
    assert dead.sealed


def test_a_code_of_another_number_is_not_judged_for_the_one_that_was_looked_at(
    client: WsgiClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session may get another number between the look at what was ended, and the commit."""
    client.register()
    assert client.ask().status == 200
    assert client.credentials
    code, storage = client.code(), client.gateway.storage
    key, commit = client.gateway.secrets.id_for(client.credentials.hawk_id), storage.commit

    def late(*args: Any, **more: Any) -> Any:
        monkeypatch.undo()
        record = storage.get(key) or b""
        other = gateway.User.unpack(record)._replace(sealed=b"o" * 24)
        assert commit(key, record, other.pack()) is gateway.Commit.DONE
        return commit(*args, **more)

    monkeypatch.setattr(storage, "commit", late)
    answer = client.call("/sms/verify_code", {"code": code})
    assert (answer.status, answer.errno, answer.headers["retry-after"]) == (503, 201, "1")


def test_what_is_ended_while_a_code_is_judged_is_ended(
    owners: tuple[WsgiClient, WsgiClient, WsgiClient], monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    """Between the look whether it was, and the commit of the verification."""
    before, now, _ = owners
    assert before.ask().status == 200
    code, commit = before.code(), before.gateway.storage.commit

    def late(*args: Any, **more: Any) -> Any:
        monkeypatch.undo()
        clock.now_s += 1
        assert now.call("/unregister", {"everywhere": True}).status == 204
        clock.now_s += 1
        return commit(*args, **more)

    monkeypatch.setattr(before.gateway.storage, "commit", late)
    assert before.call("/sms/verify_code", {"code": code}).status == 200
    assert sign(before) == (400, 104)


def test_a_message_that_a_dead_worker_left_can_not_verify_an_ended_session(
    owners: tuple[WsgiClient, WsgiClient, WsgiClient], clock: Clock
) -> None:
    """Its number is gone by then: a code that came back would certify no number at all."""
    user = gateway.User(bytes(32), bytes(24), verified_s=5, asked_s=100, sending=True, ticket=7)
    ended = gateway.end_proofs(user, 5, gateway.Settings(), 200)
    assert not gateway.is_reserved(ended, user)
    assert ended == gateway.User(bytes(32), asked_s=100)
    sent_just_now = gateway.end_proofs(user, 5, gateway.Settings(), 101)
    assert gateway.is_reserved(sent_just_now, user)
    assert (sent_just_now.sealed, sent_just_now.verified_s) == (bytes(24), 0)
    assert gateway.end_proofs(user, 4, gateway.Settings(), 200) == user


@pytest.mark.parametrize("age_s", [601, 364 * 86400])
def test_everywhere_needs_a_session_verified_just_now(
    owners: tuple[WsgiClient, WsgiClient, WsgiClient], clock: Clock, age_s: int
) -> None:
    before, now, _ = owners
    clock.now_s += age_s
    answer = now.call("/unregister", {"everywhere": True})
    assert (answer.status, answer.errno) == (400, 104)
    assert sign(now) == sign(before) == (200, None)  # nothing ended, itself neither
    assert now.call("/unregister").status == 204
    assert sign(before) == (200, None)


def test_a_session_that_was_ended_ends_no_others(
    owners: tuple[WsgiClient, WsgiClient, WsgiClient], clock: Clock
) -> None:
    before, now, _ = owners
    thief = before.another().verified()
    clock.now_s += 1
    assert now.call("/unregister", {"everywhere": True}).status == 204
    clock.now_s += 1
    owner = before.another().verified()
    answer = thief.call("/unregister", {"everywhere": True})
    assert (answer.status, answer.errno) == (400, 104)
    assert sign(owner) == (200, None)


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("step", ["ending the others", "dropping the session"])
def test_everywhere_can_be_asked_again_after_a_503(
    owners: tuple[WsgiClient, WsgiClient, WsgiClient],
    monkeypatch: pytest.MonkeyPatch,
    clock: Clock,
    step: str,
    done: bool,
) -> None:
    """What it did until the store went away must not keep it from being done."""
    before, now, _ = owners
    storage = now.gateway.storage
    create, commit = storage.create, storage.commit
    fails = [True]

    def failing(call: Callable[..., Any], is_meant: Callable[..., bool]) -> Callable[..., Any]:
        def one(*args: Any, **more: Any) -> Any:
            if not (fails and is_meant(*args)):
                return call(*args, **more)
            fails.clear()
            if done:
                call(*args, **more)
            raise gateway.Unavailable("timed out")

        return one

    if step == "ending the others":
        monkeypatch.setattr(storage, "create", failing(create, lambda *_: True))
    else:
        monkeypatch.setattr(storage, "commit", failing(commit, lambda key, old, new, *_: not new))
    assert now.call("/unregister", {"everywhere": True}).errno == 201
    clock.now_s += 1
    again = now.call("/unregister", {"everywhere": True})
    gone = done and step == "dropping the session"
    assert again.status == (401 if gone else 204)
    assert (sign(before), sign(now)) == ((400, 104), (401, 110))


def test_everywhere_of_nobody_ends_nothing(
    owners: tuple[WsgiClient, WsgiClient, WsgiClient],
) -> None:
    before, now, _ = owners
    nobody = now.another()
    nobody.register()
    assert nobody.call("/unregister", {"everywhere": True}).errno == 104
    assert nobody.ask().status == 200
    assert nobody.call("/unregister", {"everywhere": True}).errno == 104
    value: Any
    for value in ("true", 1, []):
        assert now.call("/unregister", {"everywhere": value}).errno == 107
    assert sign(before) == sign(now) == (200, None)
    for value in (False, None, ""):
        again = now.another().verified()
        assert again.call("/unregister", {"everywhere": value}).status == 204
    assert sign(before) == (200, None)


def test_everywhere_costs_a_small_key_only_where_it_was_asked(
    owners: tuple[WsgiClient, WsgiClient, WsgiClient], storage: gateway.Storage
) -> None:
    _, now, stranger = owners
    assert stranger.call("/unregister").status == 204
    assert storage._run("KEYS", "ended *") == []
    assert now.call("/unregister", {"everywhere": True}).status == 204
    [key] = storage._run("KEYS", "ended *")
    assert 365 * 86400 - 60 < storage._run("TTL", key, key=key) <= 365 * 86400
    assert storage._run("MEMORY", "USAGE", key, key=key) < 150


def test_everywhere_without_an_expiry_ends_for_ever(
    make_client: Make, clock: Clock, storage: gateway.Storage
) -> None:
    before = make_client(clock=clock, verified_ttl_s=0).verified()
    clock.now_s += 1
    assert before.another().verified().call("/unregister", {"everywhere": True}).status == 204
    [key] = storage._run("KEYS", "ended *")
    assert storage._run("TTL", key, key=key) == -1
    assert sign(before) == (400, 104)


# -- What the operator can do about a number ----------------------------------


def command(process: GatewayProcess, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command beside a gateway, on its folders."""
    folders = ["--data-dir", str(process.folder / "data"), "--keys-dir"]
    return subprocess.run(
        [sys.executable, str(ROOT / "gateway.py"), *words, *folders, str(process.folder / "keys")],
        capture_output=True, text=True, cwd=process.folder, timeout=60,
        env={k: v for k, v in os.environ.items() if not k.startswith("GATEWAY_")},
    )  # fmt: skip


def test_the_commands_for_a_number(start_gateway: Start) -> None:
    process = start_gateway()
    before, stranger = verified(process), verified(process, OTHER)
    certificate = before.sign(KEY).body["cert"]
    public = lab.Client(process.url).call("GET", "/.well-known/browserid").body["public-key"]
    claims = gateway.verify_token(
        certificate, gateway.parse_public_key(public), int(time.time() * 1000)
    )
    url = ("--public-url", process.url)
    done = command(process, "principal", "+44 7700 900123", *url)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == claims["principal"]["email"] + "\n"

    done = command(process, "forget", NUMBER)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{NUMBER}: all its proofs have ended; who holds it can verify it again\n"
    assert before.sign(KEY).body["errno"] == 104
    assert stranger.sign(KEY).status == 200
    time.sleep(1.1)  # proofs end up to this second
    assert verified(process).sign(KEY).status == 200

    done = command(process, "block", NUMBER)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{NUMBER}: no message is sent to it any more, until unblock\n"
    client = process.client()
    client.register()
    shown = len(lab.Handset(client, NUMBER).messages())
    refused = client.verify(NUMBER)
    assert (refused.status, refused.body["errno"]) == (400, 107)
    assert "SMS" in refused.body["message"]
    assert len(lab.Handset(client, NUMBER).messages()) == shown
    assert client.verify(OTHER).status == 200  # the session is not bound to the other number
    for _ in range(2):  # harmless again
        done = command(process, "unblock", NUMBER)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == f"{NUMBER}: messages are sent to it\n"
    client = process.client()
    client.register()
    assert client.verify(NUMBER).status == 200
    assert NUMBER not in process.output.replace(f"SMS to {NUMBER}", "")


@pytest.mark.slow
@pytest.mark.parametrize("words", ["forget", "block", "unblock"])
def test_these_commands_need_a_store_and_say_so_at_once(
    tmp_path: Path, keys_dir: str, words: str
) -> None:
    """The embedded store of a gateway that was stopped, and an external one that is away."""
    for where, said in (
        (["--data-dir", str(tmp_path)], f"no gateway runs on data_dir {tmp_path}"),
        (["--storage-url", "redis://127.0.0.1:9"], "the store redis://127.0.0.1:9 cannot be used"),
    ):
        started_s = time.monotonic()
        done = subprocess.run(
            [sys.executable, str(ROOT / "gateway.py"), words, NUMBER, "--keys-dir", keys_dir,
             *where], capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert time.monotonic() - started_s < 8
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.splitlines()[-1].startswith(f"gateway.py: {said}")
        assert done.stderr.count("\n") <= 2
    assert "cannot" in done.stderr


def test_a_blocked_number_costs_nothing(make_app: Callable[..., gateway.GatewayApp]) -> None:
    # Nobody listens there.
    entry = {"kind": "http", "endpoint": "http://127.0.0.1:9/", "body": "{to} {text}"}
    client = WsgiClient(make_app(sms_providers=[entry], sms_inbound=[]))
    storage, key = client.gateway.storage, client.gateway.secrets.key_for("blocked", Number)
    storage.create(key, b"", 0)
    client.register()
    for path in ("/sms/verify", "/sms/mt/verify"):
        answer = client.call(path, {"msisdn": NUMBER}, nonce="n" + path[-9:])
        assert (answer.status, answer.errno) == (400, 107)
        answer = client.call(path, {"msisdn": NUMBER}, nonce="n" + path[-9:])
        assert answer.errno == 109  # its nonce is used up
    assert storage._run("KEYS", "{limits}*") == []
    credentials = client.credentials
    assert credentials
    message = gateway.InboundSms(NUMBER, credentials.hawk_id, gateway.Network(), "1")
    client.gateway.receive_sms(message)  # a phone that texts us is not answered either
    assert storage._run("KEYS", "{limits}*") == []
    record = storage.get(client.gateway.secrets.id_for(credentials.hawk_id))
    assert gateway.User.unpack(record or b"").sends == 0


Number = gateway.Msisdn(NUMBER)


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["forget"], 2, "forget needs a NUMBER"),
        (["forget", "07700900123"], 2, "“07700900123” must be + with country code and number"),
        (["principal", "+44123"], 2, "“+44123” is too short"),
        (["block", NUMBER], 1, "master.secret"),
        (["principal", NUMBER], 1, "master.secret"),
        (["rotate-keys"], 1, "master.secret"),  # it made keys in a wrong folder, and changed none
        (["messages", NUMBER], 2, "messages takes no number"),
        (["serve", NUMBER], 2, "serve takes no number"),
    ],
)
def test_wrong_use_of_these_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], status: int, said: str
) -> None:
    folders = ["--data-dir", str(tmp_path / "data"), "--keys-dir", str(tmp_path / "keys")]
    try:
        assert gateway.main([*words, *folders]) == status
    except SystemExit as error:  # argparse's way
        assert error.code == status
    assert said in capsys.readouterr().err
    assert not (tmp_path / "keys").exists()


@pytest.mark.slow
def test_the_commands_refuse_a_store_of_another_secret(
    tmp_path: Path, store: gateway.EmbeddedStore, storage: gateway.Storage,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    storage.check(bytes(32))
    where = ["--storage-url", store.url, "--master-secret", "11" * 32]
    assert gateway.main(["forget", NUMBER, *where]) == 1
    assert "another master secret" in capsys.readouterr().err
    assert storage._run("KEYS", "ended *") == []


# -- 10: slow and large -------------------------------------------------------


def endless(process: GatewayProcess, stack: contextlib.ExitStack) -> socket.socket:
    """A request whose body never ends."""
    connection = socket.create_connection(("127.0.0.1", process.port), timeout=20)
    stack.enter_context(contextlib.closing(connection))
    connection.sendall(head("Content-Length: 100", close=False) + b"{")
    return connection


def until_closed(connection: socket.socket) -> bytes:
    """All that comes until the other side ends the connection."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while data := connection.recv(1000):
            received += data
    return received


def test_bodies_that_never_end_keep_nobody_waiting(start_gateway: Start) -> None:
    process = start_gateway("--threads", "128")
    with contextlib.ExitStack() as stack:
        started_s = time.monotonic()
        late = [endless(process, stack) for _ in range(60)]  # 64 may wait
        waits_s = []
        while time.monotonic() < started_s + 8:
            late[0].sendall(b" ")  # dripping does not help
            asked_s = time.monotonic()
            assert verified(process).unregister().status == 204
            waits_s.append(time.monotonic() - asked_s)
            time.sleep(0.2)
        assert max(waits_s) < 2 * shared()
        ended = b"".join(until_closed(connection) for connection in late)
        assert 9 < time.monotonic() - started_s < 10 + 5 * shared()
        assert b" 200 " not in ended  # nobody was registered
    # All threads are back: as many bodies as before may be waited for. A further one ends the
    # oldest, so that whoever opens many keeps nobody out.
    with contextlib.ExitStack() as stack:
        late = [endless(process, stack) for _ in range(64)]
        time.sleep(1)
        for _ in range(20):
            assert verified(process).unregister().status == 204
        late += [endless(process, stack) for _ in range(64)]
        assert verified(process).unregister().status == 204
        started_s = time.monotonic()
        assert b" 200 " not in b"".join(until_closed(connection) for connection in late[:60])
        assert time.monotonic() - started_s < 5 * shared()
        assert process.client().call("GET", "/__heartbeat__").status == 200
    # Whoever hangs up leaves no thread behind.
    assert eventually(lambda: process.client().call("POST", "/register", {}).status == 200)
    assert "Traceback" not in process.output


def test_more_endless_bodies_than_threads_stop_nobody_without_a_body(start_gateway: Start) -> None:
    process = start_gateway("--threads", "64")
    with contextlib.ExitStack() as stack:
        started_s = time.monotonic()
        for _ in range(64):
            endless(process, stack)
        while time.monotonic() < started_s + 3:
            assert process.client().call("GET", "/__heartbeat__").status == 200
        time.sleep(max(0, started_s + 13 - time.monotonic()))
        assert verified(process).unregister().status == 204  # and all who have one again


def test_a_body_in_time_is_taken_whole(start_gateway: Start) -> None:
    process = start_gateway()
    slow = talk(process.port, head("Content-Length: 4"), b"{", b" ", b" }", pause_s=2)
    assert parsed(slow)[0] == 200
    long_head = head("Content-Length: 10240", "X-Long: " + "a" * 12_000)
    assert parsed(talk(process.port, long_head + b"{" + b" " * 10238 + b"}"))[0] == 200


def test_large_heads_take_little_memory(start_gateway: Start) -> None:
    process = start_gateway()
    [worker] = workers_of(process)
    assert process.client().register().status == 200
    before = worker.memory_info().rss
    refused = 0
    with contextlib.ExitStack() as stack:
        connections = []
        for _ in range(400):
            connection = socket.create_connection(("127.0.0.1", process.port), timeout=20)
            stack.enter_context(contextlib.closing(connection))
            connection.sendall(b"POST /register HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 15_000)
            connections.append(connection)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.sendall(b"a" * 345_000)
            with contextlib.suppress(OSError):
                refused += b" 431 " in connection.recv(100)
        assert process.client().register().status == 200
        grown = worker.memory_info().rss - before
    assert grown < 20_000_000
    assert refused > 300  # the rest were cut off while they sent


def test_heads_that_stay_just_below_the_limit_take_little_memory(start_gateway: Start) -> None:
    process = start_gateway()
    [worker] = workers_of(process)
    assert process.client().register().status == 200
    before = worker.memory_info().rss
    with contextlib.ExitStack() as stack:
        for _ in range(400):
            connection = socket.create_connection(("127.0.0.1", process.port), timeout=20)
            stack.enter_context(contextlib.closing(connection))
            connection.sendall(b"POST /register HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 16_000)
        assert process.client().register().status == 200
        assert worker.memory_info().rss - before < 20_000_000


# -- 15: a path that is not UTF-8 ---------------------------------------------


@pytest.mark.parametrize(
    "path", ["/regist\xffer", "/\xc0\xafregister", "/register\xed\xa0\x80", "/register\xe2\x82"]
)
def test_a_path_that_is_not_utf8_is_404(client: WsgiClient, path: str) -> None:
    answer = client.raw("POST", path)
    assert answer.status == 404
    assert answer.json.keys() == {"code", "error", "message"}
    assert client.raw("OPTIONS", path).status == 204


# -- 11: what is kept, and how long -------------------------------------------


def on_disk(embedded: gateway.EmbeddedStore) -> bytes:
    """Every byte that the embedded store keeps in its folder."""
    content: dict[str, bytes] = {}
    for path in embedded.folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # a rewrite has replaced it meanwhile
            content[path.suffix] = content.get(path.suffix, b"") + (
                path.read_bytes() if path.is_file() else b""
            )
    assert ".aof" in content
    return b"\n".join(content.values())


def let_a_day_pass(embedded: gateway.EmbeddedStore) -> None:
    """Make the append-only file a day old."""
    for base in embedded.folder.glob("appendonlydir/*.base.*"):
        os.utime(base, (time.time() - 90_000, time.time() - 90_000))


def dumped(storage: gateway.Storage) -> bytes:
    """Every key and value in the store, as DUMP writes them for another server, and plainly."""
    parts = []
    for key in storage._run("KEYS", "*"):
        plain = storage.get(key) if storage._run("TYPE", key) == b"string" else b""
        parts += [key, storage._run("DUMP", key, key=key), plain or b""]
    return b"\n".join(parts)


@pytest.fixture
def kept(
    tmp_path: Path, keys_dir: str
) -> Iterator[tuple[gateway.EmbeddedStore, gateway.Storage, WsgiClient]]:
    """A gateway over a store of its own."""
    embedded = gateway.EmbeddedStore(str(tmp_path / "data"))
    try:
        options: Any = {"keys_dir": keys_dir, "data_dir": str(tmp_path), "resend_gaps_s": [0]}
        app = gateway.create_app(gateway.Settings(**options), embedded.url)
        assert app.gateway.sms.outbox
        app.gateway.sms.outbox.console = None
        yield embedded, gateway.Storage(embedded.url), WsgiClient(app)
    finally:
        embedded.stop()


@pytest.mark.slow
def test_a_day_after_unregister_no_byte_of_the_record_is_left(
    kept: tuple[gateway.EmbeddedStore, gateway.Storage, WsgiClient],
) -> None:
    embedded, storage, client = kept
    stays = client.another().verified(OTHER)
    client.verified()
    assert client.credentials
    assert stays.credentials
    ids = client.gateway.secrets.id_for
    key, other = ids(client.credentials.hawk_id), ids(stays.credentials.hawk_id)
    record = gateway.User.unpack(storage.get(key) or b"")
    of_the_user = [bytes(key), record.hawk_key, record.sealed, record.verified_s.to_bytes(4, "big")]
    assert all(part in on_disk(embedded) for part in of_the_user)
    nonces = [n for n in storage._run("KEYS", "*") if key in n and n != key]
    assert client.call("/unregister").status == 204
    for nonce in nonces + [n for n in storage._run("KEYS", "*") if key in n]:
        storage._run("DEL", nonce, key=nonce)  # they live for two minutes, and name the session
    time.sleep(2)
    assert record.sealed in on_disk(embedded)  # it is kept until the day is over
    let_a_day_pass(embedded)
    assert eventually(lambda: not any(part in on_disk(embedded) for part in of_the_user[:3]), 20)
    assert not any(part in dumped(storage) for part in of_the_user[:3])
    assert bytes(other) in on_disk(embedded)
    assert stays.call("/sms/resend_code").status == 200


@pytest.mark.slow
def test_a_rewrite_is_due_by_the_age_of_the_file(tmp_path: Path) -> None:
    """A gateway that is started anew each night never runs for a day."""
    embedded = gateway.EmbeddedStore(str(tmp_path))
    client = embedded._client
    try:
        rewrites = "aof_rewrites"
        before = client.info()[rewrites]
        embedded._rewrite_once_a_day()
        assert client.info()[rewrites] == before
        let_a_day_pass(embedded)
        assert eventually(lambda: client.info()[rewrites] == before + 1, 20)
        time.sleep(2)
        assert client.info()[rewrites] == before + 1
        assert client.config_get("auto-aof-rewrite-min-size") == {
            "auto-aof-rewrite-min-size": str(2**20)
        }
        assert client.config_get("auto-aof-rewrite-percentage") == {
            "auto-aof-rewrite-percentage": "100"
        }
    finally:
        embedded.stop()


def test_a_thief_of_store_and_master_secret_finds_no_number_and_no_hawk_key(
    kept: tuple[gateway.EmbeddedStore, gateway.Storage, WsgiClient], keys_dir: str
) -> None:
    embedded, storage, client = kept
    client.verified()
    assert client.credentials
    hawk_id, hawk_key = client.credentials[0], bytes(client.credentials[1])
    assert client.ask().status == 200  # a code waits, too
    stolen = dumped(storage) + on_disk(embedded)
    digits = int(NUMBER[1:])
    assert hawk_key not in stolen
    assert hawk_key.hex().encode() not in stolen
    for size in (5, 6, 7, 8):
        assert digits.to_bytes(size, "big") not in stolen
        assert digits.to_bytes(size, "little") not in stolen
    packed = bytes.fromhex(NUMBER[1:])
    for form in (NUMBER[1:].encode(), NUMBER[3:].encode(), packed, NUMBER[1:][::-1].encode()):
        assert form not in stolen
    assert bytes.fromhex(hawk_id) not in stolen
    assert hawk_id.encode() not in stolen
    # Nor does the secret make one of it: neither by an id that is in the loot …
    master = bytes.fromhex(Path(keys_dir, "master.secret").read_text())
    keys = gateway.Secrets.derive(master)
    user = gateway.User.unpack(storage.get(keys.id_for(hawk_id)) or b"")
    assert gateway.open_msisdn(keys.seal, hawk_id, user.sealed) == NUMBER  # the id does
    assert gateway.mask_hawk_key(keys.mask, hawk_id, user.hawk_key) == hawk_key
    for at in range(len(stolen) - 32):
        guess = gateway.HawkId(stolen[at : at + 32].hex())
        assert gateway.mask_hawk_key(keys.mask, guess, user.hawk_key) != hawk_key
        with pytest.raises(InvalidTag):
            gateway.open_msisdn(keys.seal, guess, user.sealed)
    # … nor by trying the number: nothing in the loot is a function of secret and number alone.
    number = gateway.Msisdn(NUMBER)
    for kind in ("ended", "blocked"):
        assert bytes(keys.key_for(kind, number)) not in stolen
    for secret in (master, *keys):
        for text in (NUMBER, NUMBER[1:]):
            assert hmac.new(secret, text.encode(), "sha256").digest()[:8] not in stolen


# -- 15: folders, files, processes --------------------------------------------

STRANGER = 54321
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


def check(tmp_path: Path) -> None:
    """Load what a start loads, from ``keys`` and ``data`` below a folder."""
    settings = gateway.Settings(keys_dir=str(tmp_path / "keys"), data_dir=str(tmp_path / "data"))
    gateway.SmsSender(settings)
    gateway.load_master_secret(settings)
    gateway.load_operator_token(settings)
    embedded = gateway.EmbeddedStore(settings.data_dir)
    embedded.stop()


@pytest.mark.parametrize("folder", ["keys", "data"])
@pytest.mark.parametrize("mode", [0o777, 0o702, 0o1777])
def test_a_folder_where_others_can_write_is_refused(tmp_path: Path, folder: str, mode: int) -> None:
    check(tmp_path)
    (tmp_path / folder).chmod(mode)
    with pytest.raises(
        gateway.StartError, match=rf"{folder} is user .* others can write there: chmod go-w it"
    ):
        check(tmp_path)
    (tmp_path / folder).chmod(0o755)
    check(tmp_path)


def test_a_folder_of_our_own_group_is_taken(tmp_path: Path) -> None:
    """With a umask of 002, as many systems have it, git makes keys/ so."""
    check(tmp_path)
    (tmp_path / "keys").chmod(0o775)
    check(tmp_path)


@as_root
@pytest.mark.parametrize("folder", ["keys", "data"])
def test_a_folder_of_somebody_else_is_refused(tmp_path: Path, folder: str) -> None:
    check(tmp_path)
    os.chown(tmp_path / folder, STRANGER, 0)
    said = f"{folder} is user {STRANGER}'s, with mode 700, and we are user 0: run this as its owner"
    with pytest.raises(gateway.StartError, match=said):
        check(tmp_path)
    os.chown(tmp_path / folder, 0, STRANGER)
    check(tmp_path)
    (tmp_path / folder).chmod(0o770)  # by the group of somebody else
    with pytest.raises(gateway.StartError, match=r"with mode 770, .* others can write there"):
        check(tmp_path)


@as_root
@pytest.mark.parametrize("name", ["master.secret", "operator.token"])
def test_no_link_leads_to_a_secret_of_somebody_else(tmp_path: Path, name: str) -> None:
    check(tmp_path)
    secret = tmp_path / "keys" / name
    foreign = tmp_path / "foreign"
    foreign.write_bytes(secret.read_bytes())
    foreign.chmod(0o600)
    secret.unlink()
    secret.symlink_to(foreign)
    check(tmp_path)  # a link to a secret of ours, as Kubernetes mounts them
    os.chown(foreign, STRANGER, 0)
    with pytest.raises(
        gateway.StartError, match=f"{name} is user {STRANGER}'s, with mode 600, and we are"
    ):
        check(tmp_path)
    secret.unlink()
    os.link(foreign, secret)
    with pytest.raises(
        gateway.StartError, match=f"{name} is user {STRANGER}'s, with mode 600, and we are"
    ):
        check(tmp_path)


def test_a_file_system_without_owners_and_modes_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vfat or drvfs mount shows every file as open to all; nobody can change that there."""
    check(tmp_path)
    (tmp_path / "keys").chmod(0o777)
    monkeypatch.setattr(gateway, "_keeps_modes", lambda folder: False)
    check(tmp_path)


def test_a_secret_that_others_can_read_is_refused_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a read-only disk nobody can try whether it keeps modes."""
    check(tmp_path)
    (tmp_path / "keys" / "master.secret").chmod(0o644)

    def write(path: Path, content: bytes) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(gateway, "write_private_file", write)
    with pytest.raises(gateway.StartError, match=r"master.secret is .* mode 600"):
        check(tmp_path)


@pytest.mark.parametrize(
    ("content", "mode", "warned"),
    [
        (f'master_secret = "{"11" * 32}"', 0o644, "master_secret"),
        ('storage_url = "redis://user:password@localhost"', 0o644, "storage_url"),
        ('[[sms_providers]]\nkind = "nexmo"\napi_key = "k"\napi_secret = "s"', 0o604, "sms_prov"),
        (f'master_secret = "{"11" * 32}"', 0o640, ""),
        ("port = 5001", 0o644, ""),
        ('[[sms_providers]]\nkind = "outbox"', 0o644, ""),
    ],
)
def test_a_settings_file_with_secrets_that_others_can_read_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str, mode: int, warned: str
) -> None:
    file = tmp_path / "gateway.toml"
    file.write_text(f'countries = ["*"]\nmt_sender = "Gateway"\n{content}')
    file.chmod(mode)
    gateway.load_settings({}, {}, str(file))
    assert bool(caplog.messages) == bool(warned)
    if warned:
        assert str(file) in caplog.messages[0]
        assert f"holds {warned}" in caplog.messages[0]
        assert "password" not in caplog.messages[0]
        assert "1111" not in caplog.messages[0]


def test_no_process_dumps_core_and_the_store_has_no_environment(start_gateway: Start) -> None:
    process = start_gateway(env={"AWS_SECRET_ACCESS_KEY": "environment-secret"})
    for member in process.family():
        limits = Path(f"/proc/{member.pid}/limits").read_text()
        core = next(line for line in limits.splitlines() if "core file size" in line)
        assert core.split()[4:6] == ["0", "0"], member
        if "valkey" in member.name():
            environ = Path(f"/proc/{member.pid}/environ").read_bytes()
            assert b"environment-secret" not in environ
            assert b"PATH" not in environ
