"""Real ``python gateway.py`` processes: start, stop, kill, ports and folders, other servers."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib
import json
import logging
import os
import random
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import lab
import psutil
import pytest
import redis
import urllib3
from cryptography.hazmat.primitives import serialization
from support import NUMBER, ROOT, GatewayProcess, free_port, halt, poll, shared
from test_sms import SmsApi, after

import gateway

T = TypeVar("T")
Start = Callable[..., GatewayProcess]
MakeLog = Callable[[int], gateway.QueuedLog]


# -- Helpers ------------------------------------------------------------------


def eventually(condition: Callable[[], bool], timeout_s: float = 20) -> bool:
    """Tell whether a condition comes true in time."""
    return poll(condition, timeout_s)


def living(folder: Path) -> dict[int, str]:
    """All living processes that work in or on a folder, by pid: of gateways and stores."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            text = " ".join([*process.cmdline(), process.cwd()])
            if str(folder) in text and process.status() != psutil.STATUS_ZOMBIE:
                found[process.pid] = process.name()
    return found


def nothing_lives(folder: Path, timeout_s: float = 5) -> bool:
    """Tell whether all that worked in a folder is gone in time."""
    return eventually(lambda: not living(folder), timeout_s)


def store_of(process: GatewayProcess) -> psutil.Process:
    """The embedded store of a gateway."""
    [store] = [p for p in process.family() if "valkey" in p.name()]
    return store


def workers_of(process: GatewayProcess) -> list[psutil.Process]:
    """The worker processes of a gateway."""
    found = []
    for one in process.family()[1:]:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            found += [one] * ("python" in one.name())
    return found


def verified(process: GatewayProcess, msisdn: str = NUMBER) -> lab.Client:
    """A client whose number is verified."""
    client = process.client()
    client.register()
    assert client.verify(msisdn).status == 200
    assert client.verify_code(lab.Handset(client, msisdn).code()).status == 200
    return client


def again(client: lab.Client, process: GatewayProcess) -> lab.Client:
    """The same session, over a fresh connection."""
    other = lab.Client(process.url, operator_token=client.operator_token)
    other.credentials = client.credentials
    return other


KEY = gateway.generate_key("RS256")


def can_sign(client: lab.Client) -> bool:
    """Tell whether a session still gets a certificate."""
    with contextlib.suppress(urllib3.exceptions.HTTPError):
        return client.sign(KEY).status == 200
    return False


def at_once(calls: Sequence[Callable[[], T]]) -> list[T]:
    """Call all at the same moment, each in its own thread."""
    barrier = threading.Barrier(len(calls))

    def run(call: Callable[[], T]) -> T:
        barrier.wait(10)
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


def outcome(reply: lab.Reply) -> tuple[int, int | None]:
    """Status and errno."""
    return reply.status, (reply.body or {}).get("errno")


def public_key(process: GatewayProcess) -> Any:
    """The gateway's public key."""
    return lab.Client(process.url).call("GET", "/.well-known/browserid").body["public-key"]


def refusal(process: GatewayProcess, timeout_s: float = 30) -> str:
    """What a gateway said that refused to start."""
    assert process.process.wait(timeout_s) == 1, process.output
    assert "Traceback" not in process.output
    return process.output


@pytest.fixture
def external(tmp_path: Path) -> Iterator[gateway.EmbeddedStore]:
    """A store that is not the gateway's own."""
    store = gateway.EmbeddedStore(str(tmp_path / "external"))
    yield store
    store.stop()


# -- Start --------------------------------------------------------------------


def test_the_start_says_what_is_in_force(start_gateway: Start) -> None:
    process = start_gateway()
    assert eventually(lambda: "/outbox" in process.output)  # visible codes are announced
    first = process.output
    assert f"http://127.0.0.1:{process.port}" in first
    assert str(process.folder / "data") in first
    assert str(process.folder / "keys") in first
    assert "outbox" in first
    made = [line for line in first.splitlines() if "keys" in line and "made" in line]
    assert made
    token = (process.folder / "keys" / "operator.token").read_text().strip()
    assert f"{process.url}/outbox?token={token}&" in first
    process.stop()
    second = start_gateway()
    assert "made" not in second.output  # only the first start makes keys
    assert eventually(lambda: f"/outbox?token={token}&" in second.output)
    for path in (process.folder / "keys").iterdir():
        assert path.stat().st_mode & 0o777 == 0o600


def test_a_paying_provider_is_named_and_its_secrets_are_not(start_gateway: Start) -> None:
    with SmsApi() as api:
        process = start_gateway(*api.option())
        assert eventually(lambda: "nexmo" in process.output)
        assert "outbox" not in process.output
        token = (process.folder / "keys" / "operator.token").read_text().strip()
        assert token not in process.output  # it is shown where there is something to open
        assert api.entry()["api_secret"] not in process.output
        assert api.entry()["api_key"] not in process.output


def test_the_store_listens_on_no_port_and_is_private(start_gateway: Start) -> None:
    process = start_gateway()
    assert store_of(process).net_connections("inet") == []
    data = process.folder / "data"
    assert data.stat().st_mode & 0o077 == 0
    for path in data.rglob("*"):
        if not path.is_symlink():
            assert path.stat().st_mode & 0o077 == 0, path


def test_ipv6(start_gateway: Start, tmp_path: Path) -> None:
    with contextlib.closing(socket.socket(socket.AF_INET6)) as probe:
        probe.bind(("::1", 0))
        port = probe.getsockname()[1]
    process = start_gateway("--host", "::1", port=port, wait=False)
    url = f"http://[::1]:{port}"
    http = urllib3.PoolManager(retries=False)

    def answers() -> bool:
        with contextlib.suppress(urllib3.exceptions.HTTPError):
            return bool(http.request("GET", url + "/__heartbeat__").status == 200)
        return False

    assert eventually(answers, 20), process.output
    client = lab.Client(url)
    assert client.register().body["verificationUrl"] == url + "/sms/verify"
    assert client.verify(NUMBER).status == 200
    second = start_gateway(
        "--host", "::1", "--data-dir", str(tmp_path / "b"), port=port, wait=False
    )
    assert f"::1 port {port} is in use" in refusal(second)


# -- Stop ---------------------------------------------------------------------


def press_ctrl_c(process: GatewayProcess, *more: signal.Signals) -> None:
    """Do what a terminal does: SIGINT to every process of the group."""
    group = os.getpgid(process.process.pid)
    for member in process.family():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getpgid(member.pid) == group:
                for number in (signal.SIGINT, *more):
                    member.send_signal(number)


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "Ctrl-C"])
def test_stopping_finishes_what_is_in_flight(how: str, start_gateway: Start) -> None:
    with SmsApi(after(0.7)) as api:
        process = start_gateway(*api.option(), "--workers", "2")
        family = process.family()
        assert len(family) == 5  # with the store's watcher
        client = process.client()
        client.register()
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(client.verify, NUMBER)
            assert eventually(lambda: bool(api.received))
            started = time.monotonic()
            if how == "Ctrl-C":
                press_ctrl_c(process)
            else:
                process.process.send_signal(getattr(signal, how))
            assert asked.result().body["mtSender"] == "Gateway"
        assert process.process.wait(10) == 0
        assert 0.3 < time.monotonic() - started < 8 * shared()
        assert nothing_lives(process.folder, 0.5)
        assert psutil.wait_procs(family[1:], 2)[1] == []
        assert "Traceback" not in process.output

        # what was answered was also kept
        api.answer = after(0)
        restarted = start_gateway(*api.option(), port=process.port)
        assert again(client, restarted).verify_code(api.code()).body == {"msisdn": NUMBER}


def has_members(process: GatewayProcess, count: int) -> bool:
    """Tell whether a gateway has so many processes, its store included."""
    return len(process.family()) == count


def test_two_signals_stop_every_worker_at_once(start_gateway: Start) -> None:
    """On Ctrl-C a worker gets SIGINT, and SIGTERM from its parent a moment later.

    In Granian 2.8.7 the second of two signals may hang it, with the interpreter's lock.
    """
    port = free_port()
    for _ in range(2):
        process = start_gateway("--workers", "4", port=port)
        assert eventually(partial(has_members, process, 7))
        started = time.monotonic()
        press_ctrl_c(process, signal.SIGTERM)
        assert process.process.wait(20) == 0
        assert time.monotonic() - started < 5 * shared()
        assert nothing_lives(process.folder, 0.5)


def test_a_stop_of_the_whole_group_is_no_error(start_gateway: Start) -> None:
    """As systemd stops a unit: the workers must not seem to have crashed."""
    for _ in range(5):
        process = start_gateway("--workers", "2")
        group = [process.process.pid, *(worker.pid for worker in workers_of(process))]
        for pid in reversed(group):  # our parent last
            os.kill(pid, signal.SIGTERM)
        assert process.process.wait(20) == 0
        assert "ERROR" not in process.output


def test_a_worker_of_granian_still_hangs_when_it_is_told_to_stop_twice() -> None:
    """If this fails, ``_stop_once`` may go."""
    script = "from granian._granian import WorkerSignal as S; s = S(); s.set(); s.set()"
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run([sys.executable, "-c", script], timeout=3, check=True)


def test_granian_still_shares_its_port_with_anybody() -> None:
    """If this fails, ``claim_port`` may go."""
    net: Any = importlib.import_module("granian.net")
    port = free_port()
    both = [net.SocketSpec("127.0.0.1", port, 128).build() for _ in range(2)]
    assert len(both) == 2


def test_idle_connections_do_not_delay_the_stop(start_gateway: Start) -> None:
    process = start_gateway()
    with contextlib.ExitStack() as stack:
        client = process.client()
        client.register()  # and keeps its connection
        for _ in range(5):  # these never say anything
            idle = socket.create_connection(("127.0.0.1", process.port))
            stack.enter_context(contextlib.closing(idle))
        started = time.monotonic()
        assert process.stop() == 0
        assert time.monotonic() - started < 5 * shared()
    assert nothing_lives(process.folder, 0.5)


def test_impatience_does_no_harm(start_gateway: Start) -> None:
    """Ctrl-C again and again until it ends: still an orderly stop."""
    process = start_gateway()
    client = verified(process)
    while process.process.poll() is None:
        process.process.send_signal(signal.SIGINT)
        time.sleep(0.01)
    assert process.process.returncode == 0
    assert nothing_lives(process.folder)
    assert "Traceback" not in process.output
    restarted = start_gateway(port=process.port)
    assert can_sign(again(client, restarted))


def test_a_stop_during_the_start_leaves_nothing(start_gateway: Start) -> None:
    started = start_gateway()
    started.stop()
    for n in range(5):
        process = start_gateway(port=started.port, wait=False)
        time.sleep(0.05 + 0.09 * n)  # from the first imports to the first answers
        begun = time.monotonic()
        status = process.stop()
        assert time.monotonic() - begun < 5 * shared()
        # before our first line runs, Python has the system's own handler
        assert status in ((0,) if process.output else (0, -signal.SIGTERM)), process.output
        assert "Traceback" not in process.output
        assert nothing_lives(process.folder)
    last = start_gateway(port=started.port)
    assert last.stop() == 0


@pytest.mark.parametrize("late_s", [0, 0.003, 0.006, 0.01, 0.02])
def test_a_stop_while_a_worker_starts_is_heard_by_it(late_s: float, start_gateway: Start) -> None:
    """A fork inherits its parent's handlers: a signal that comes too early is lost."""
    process = start_gateway("--workers", "2", wait=False)
    while not workers_of(process):
        assert process.process.poll() is None, process.output
    time.sleep(late_s)
    begun = time.monotonic()
    assert process.stop() == 0
    assert time.monotonic() - begun < 5 * shared()
    assert nothing_lives(process.folder, 1)
    assert "Traceback" not in process.output


def test_stopped_and_started_again_nothing_is_lost(start_gateway: Start) -> None:
    process = start_gateway()
    done, waiting, fresh = verified(process), process.client(), process.client()
    waiting.register()
    waiting.verify("+447700900456")
    code = lab.Handset(waiting, "+447700900456").code()
    fresh.register()
    key = public_key(process)
    assert process.stop() == 0

    restarted = start_gateway(port=process.port)
    assert public_key(restarted) == key
    assert can_sign(again(done, restarted))
    assert again(waiting, restarted).verify_code(code).status == 200
    assert again(fresh, restarted).verify("+447700900789").status == 200
    unknown = restarted.client()
    unknown.credentials = gateway.derive_credentials(gateway.SessionToken(bytes(32)))
    assert outcome(unknown.sign(KEY)) == (401, 110)


def test_a_nonce_stays_used_after_a_restart(start_gateway: Start) -> None:
    process = start_gateway()
    client = verified(process)
    client.nonce = lambda: "the same"
    assert can_sign(client)
    process.kill()
    restarted = start_gateway(port=process.port)
    replayed = again(client, restarted)
    replayed.nonce = client.nonce
    assert outcome(replayed.sign(KEY)) == (401, 109)


# -- Kill ---------------------------------------------------------------------


class _Users:
    """Clients that go through the whole flow in a loop, and remember whom it verified."""

    def __init__(self) -> None:
        self.verified: list[gateway.Credentials] = []
        self.count = 0

    def loop(self, process: GatewayProcess, stop: threading.Event) -> None:
        """Verify one number after the other until the gateway is gone."""
        with contextlib.suppress(urllib3.exceptions.HTTPError):
            while not stop.is_set():
                self.count += 1
                msisdn = f"+4477{self.count:08}"
                client = process.client()
                if client.register().status != 200 or client.verify(msisdn).status != 200:
                    continue
                reply = client.verify_code(lab.Handset(client, msisdn).code())
                if reply.status == 200 and client.credentials:
                    self.verified.append(client.credentials)


def test_kills_at_any_moment(start_gateway: Start) -> None:
    """Even rounds: killed while it starts; odd ones: while clients verify numbers.

    Of forty moments, every third: in three runs on average all of them.
    """
    first = start_gateway("--workers", "2")
    first.stop()
    folder, users = first.folder, _Users()
    for n in range(random.randrange(3), 40, 3):
        process = start_gateway("--workers", "2", port=first.port, wait=False)
        if n % 2 == 0:
            time.sleep(0.012 * n)  # 0 to 0.46 s
            assert process.process.poll() is None, process.output
            process.kill()
        else:
            process.wait_until_ready()
            # all that lives is this gateway's: nothing of those before is left
            family = {member.pid for member in process.family()}
            strangers = {p: name for p, name in living(folder).items() if p not in family}
            assert not strangers
            for credentials in users.verified[-5:]:
                client = process.client()
                client.credentials = credentials
                assert can_sign(client)
            stop = threading.Event()
            with ThreadPoolExecutor(2) as pool:
                loops = [pool.submit(users.loop, process, stop) for _ in range(2)]
                time.sleep(0.006 * n)  # 0 to 0.23 s
                process.kill()
                stop.set()
            for loop in loops:
                loop.result()
        time.sleep(0.0025 * n)  # 0 to 0.1 s until the restart

    last = start_gateway("--workers", "2", port=first.port)
    assert len(users.verified) > 5 / shared()
    for credentials in users.verified:
        client = last.client()
        client.credentials = credentials
        assert can_sign(client)
    assert last.stop() == 0
    assert nothing_lives(folder)


def test_nothing_outlives_a_killed_gateway(start_gateway: Start) -> None:
    process = start_gateway("--workers", "2")
    family = ["python"] * 3 + ["sh", "valkey-server"]
    assert eventually(lambda: sorted(living(process.folder).values()) == family)
    process.kill()
    assert nothing_lives(process.folder, 1)


def test_a_worker_that_hangs_keeps_nobody_else_from_ending(start_gateway: Start) -> None:
    """It holds copies of pipes that its parent had: those alone would not end for the others."""
    process = start_gateway("--workers", "3")
    assert eventually(lambda: len(workers_of(process)) == 3)
    workers = workers_of(process)
    # Forked last, it has most of them; the kernel's numbers begin anew at some time.
    hung = max(workers, key=lambda worker: (worker.create_time(), worker.pid))
    halt(hung.pid)
    try:
        process.kill()
        assert eventually(lambda: set(living(process.folder)) == {hung.pid}, 2)
    finally:
        hung.resume()
    assert nothing_lives(process.folder, 1)


def test_the_watcher_of_a_store_ends_with_it(start_gateway: Start) -> None:
    """Else each crash would leave one: workers are forked with our end of its pipe."""
    process = start_gateway("--workers", "2")
    for _ in range(2):
        watchers = [p for p in process.family() if p.name() == "sh"]
        assert len(watchers) == 1
        workers_of(process)[0].kill()  # the next is forked while the pipe is open
        assert eventually(lambda: len(workers_of(process)) == 2, 10)
        store_of(process).kill()
        assert psutil.wait_procs(watchers, 2)[1] == []
        process.wait_until_ready()
        time.sleep(5.6)  # a second worker that dies sooner would be a crash loop to Granian
    assert process.stop(timeout_s=5) == 0  # and no worker has kept a lock of another thread


def test_the_environment_of_the_store_is_empty(start_gateway: Start) -> None:
    """There may be secrets in ours."""
    process = start_gateway(env={"GATEWAY_MASTER_SECRET": "0" * 64})
    for member in process.family():
        if "python" not in member.name():
            assert member.environ().keys() <= {"PWD", "OLDPWD", "_", "SHLVL"}, member.name()


@pytest.mark.parametrize("passed", [3, 4])
def test_a_program_keeps_the_descriptors_that_it_is_passed(passed: int, tmp_path: Path) -> None:
    """The pipe that a watcher reads must not take their places."""
    script = f"""
import fcntl, os, gateway
os.dup2(os.open("{tmp_path}/f", os.O_CREAT | os.O_RDWR), {passed}, inheritable=True)
command = ["/bin/sh", "-c", "echo here >&{passed}"]
gateway.start_bound(command, pass_fds=({passed},)).wait()
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
    assert (tmp_path / "f").read_text() == "here\n"


def test_a_killed_worker_is_replaced(start_gateway: Start) -> None:
    process = start_gateway("--workers", "2")
    client = verified(process)
    store = store_of(process).pid
    for _ in range(2):
        old = {worker.pid for worker in workers_of(process)}
        victim = min(old)
        os.kill(victim, signal.SIGKILL)

        def replaced(victim: int = victim) -> bool:
            workers = {worker.pid for worker in workers_of(process)}
            return len(workers) == 2 and victim not in workers

        assert eventually(replaced, 10), process.output
        # connections that waited for the dead worker are lost, and no others
        assert eventually(lambda: can_sign(again(client, process)), 2)
        assert all(can_sign(again(client, process)) for _ in range(20))
    assert store_of(process).pid == store
    assert process.stop() == 0
    assert nothing_lives(process.folder)


def test_a_replaced_worker_has_the_keys_of_the_others(start_gateway: Start) -> None:
    """Files may have been moved: a worker that made new ones would certify on its own."""
    process = start_gateway("--workers", "2")
    client, key = verified(process), public_key(process)
    (process.folder / "keys").rename(process.folder / "away")
    victim = workers_of(process)[0]
    victim.kill()
    assert eventually(lambda: len(workers_of(process)) == 2 and victim not in process.family(), 10)
    assert eventually(lambda: can_sign(again(client, process)), 2)
    for _ in range(20):
        assert public_key(process) == key
        assert can_sign(again(client, process))
    assert not (process.folder / "keys").exists()
    assert process.stop() == 0


def test_a_terminal_that_closes_ends_the_gateway(start_gateway: Start) -> None:
    master, slave = os.openpty()
    process = start_gateway("--workers", "2", terminal=slave)
    os.close(slave)
    os.close(master)  # the kernel sends SIGHUP
    assert process.process.wait(20) == 0
    assert "Traceback" not in process.output
    assert nothing_lives(process.folder)


@pytest.mark.parametrize("service", [True, False])
def test_a_gateway_outlives_its_terminal_if_it_is_told_to(
    start_gateway: Start, service: bool
) -> None:
    """As ``nohup`` tells. A service has no terminal: logrotate's SIGHUP does not stop it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL if service else signal.SIG_IGN)
    try:
        process = start_gateway("--workers", "2", terminal=-1 if service else None)
    finally:
        signal.signal(signal.SIGHUP, before)
    workers = {worker.pid for worker in workers_of(process)}
    for member in process.family():
        member.send_signal(signal.SIGHUP)
    time.sleep(1)
    assert {worker.pid for worker in workers_of(process)} == workers
    assert can_sign(verified(process))
    assert process.stop() == 0


def test_a_console_that_nobody_reads_holds_up_nobody(tmp_path: Path) -> None:
    """A pager, or Ctrl-S: once the pipe was full, every send waited for ever."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    outbox = gateway.OutboxSms({"kind": "outbox"}, gateway.Settings(data_dir=str(tmp_path)))
    with os.fdopen(reader), os.fdopen(writer, "w") as outbox.console:
        for n in range(200):
            outbox.send("Gateway", gateway.Msisdn(NUMBER), f"message {n}")
    assert len(outbox.messages(NUMBER[1:])) == 200


@pytest.fixture
def narrow_pipe() -> Iterator[tuple[int, int]]:
    """A pipe that takes 4096 bytes: for reading, for writing."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    yield reader, writer
    for file in (reader, writer):
        with contextlib.suppress(OSError):  # the test has closed it
            os.close(file)


def log_line(text: str, *args: Any) -> logging.LogRecord:
    """What a logger hands to its handlers."""
    return logging.LogRecord("gateway", logging.WARNING, "", 0, text, args, None)


def read_until(file: int, end: bytes) -> bytes:
    """Read from a pipe until its text ends so; 5 seconds at most, where nobody else works."""
    text, deadline = b"", time.monotonic() + 5 * shared()
    while not text.endswith(end) and time.monotonic() < deadline:
        if select.select([file], [], [], 0.1)[0]:
            text += os.read(file, 65536)
    return text


def test_a_log_that_nobody_reads_holds_up_nobody(
    narrow_pipe: tuple[int, int], queued_log: MakeLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line for each request that failed, while the store was away: seconds, and all hung."""
    reader, writer = narrow_pipe
    monkeypatch.setattr(gateway, "LOG_LINES_MAX", 100)
    handler = queued_log(writer)
    monkeypatch.setattr(gateway.LOG, "handlers", [handler])
    started = time.monotonic()
    for n in range(1000):
        handler.handle(log_line("line %s of a thousand, none of which is read", n))
    assert time.monotonic() - started < 1 * shared()
    lines = read_until(reader, b"nobody read stderr\n").decode().splitlines()
    assert lines[:100] == [f"line {n} of a thousand, none of which is read" for n in range(100)]
    assert lines[-1] == f"{1001 - len(lines)} lines of the log were dropped: nobody read stderr"
    handler.handle(log_line("again"))
    assert read_until(reader, b"again\n") == b"again\n"


def test_a_pipe_that_was_set_not_to_block_loses_nothing(
    narrow_pipe: tuple[int, int], queued_log: MakeLog
) -> None:
    reader, writer = narrow_pipe
    os.set_blocking(writer, False)
    handler = queued_log(writer)
    for n in range(1000):
        handler.handle(log_line("line %s", n))
    time.sleep(0.1)  # it is full
    assert len(read_until(reader, b"line 999\n").splitlines()) == 1000


def test_a_log_whose_reader_is_gone_goes_on(
    narrow_pipe: tuple[int, int], queued_log: MakeLog
) -> None:
    reader, writer = narrow_pipe
    handler = queued_log(writer)
    os.close(reader)
    for text in ("nobody", "is there"):
        handler.handle(log_line(text))
        assert eventually(handler._lines.empty)
    time.sleep(0.1)
    assert handler._writer.is_alive()
    handler.flush()


def test_a_line_that_waits_holds_on_to_nothing(
    narrow_pipe: tuple[int, int], queued_log: MakeLog
) -> None:
    """A record holds its arguments, and the locals of all that stood on the stack."""

    class Request:
        pass

    request = Request()
    gone, handler = weakref.ref(request), queued_log(narrow_pipe[1])
    for _ in range(5):
        handler.handle(log_line("%s" + "x" * 2000, request))
    del request
    assert gone() is None


def test_the_end_does_not_wait_for_a_log_that_nobody_reads(
    narrow_pipe: tuple[int, int], queued_log: MakeLog
) -> None:
    handler = queued_log(narrow_pipe[1])
    handler.handle(log_line("x" * 9000))
    started = time.monotonic()
    handler.flush()
    assert gateway.LOG_FLUSH_S <= time.monotonic() - started < (gateway.LOG_FLUSH_S + 1) * shared()


FORKED_LOG = """
import logging.config, multiprocessing, gateway

def work():
    logging.config.dictConfig(gateway.LOGGING)  # as Granian does in each worker
    for n in range(2000):
        gateway.LOG.warning("worker %s", n)

logging.config.dictConfig(gateway.LOGGING)
gateway.LOG.warning("before")  # so that there is a thread, which no fork inherits
for method in ("fork", "spawn") if __name__ == "__main__" else ():
    child = multiprocessing.get_context(method).Process(target=work)
    child.start()
    child.join(20)
    gateway.LOG.warning("%s %s", method, child.exitcode)
"""


def test_what_workers_log_last_is_written(tmp_path: Path) -> None:
    """They have threads of their own, and end without ``atexit``."""
    script = tmp_path / "script.py"
    script.write_text(FORKED_LOG)
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script)]
    ended = subprocess.run(
        command, env=environ, capture_output=True, text=True, timeout=60 * shared()
    )
    told = [line.partition("gateway: ")[2] for line in ended.stderr.splitlines()]
    workers = [f"worker {n}" for n in range(2000)]
    assert told == ["before", *workers, "fork 0", "before", *workers, "spawn 0"]


@pytest.mark.parametrize("stderr", ["full", "on a full disk", "closed"])
def test_requests_and_the_stop_wait_for_no_stderr(
    stderr: str, narrow_pipe: tuple[int, int], tmp_path: Path
) -> None:
    """As a whole: a terminal in Ctrl-S from the start on, with a line logged for each request."""
    os.set_blocking(narrow_pipe[1], False)  # a write that fills it may wait for ever
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(narrow_pipe[1], bytes(512))
    os.set_blocking(narrow_pipe[1], True)
    port, store = free_port(), gateway.EmbeddedStore(str(tmp_path / "store"))
    options = ["--port", str(port), "--storage-url", store.url, "--workers", "2"]
    options += ["--data-dir", str(tmp_path / "data"), "--keys-dir", str(tmp_path / "keys")]
    redirect = {"full": f"2>&{narrow_pipe[1]}", "on a full disk": "2>/dev/full", "closed": "2>&-"}
    shell = ["/bin/bash", "-c", f'exec "$@" {redirect[stderr]}', "sh", sys.executable]
    # What cannot be written must not stay in a buffer either: each later flush would fail.
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    command = [*shell, str(ROOT / "gateway.py"), *options]
    process = subprocess.Popen(command, cwd=tmp_path, pass_fds=narrow_pipe[1:], env=buffered)
    try:
        client = lab.Client(f"http://127.0.0.1:{port}")
        try:
            assert eventually(lambda: is_up(client), 20)
        finally:
            store.stop()
        started = time.monotonic()
        assert {client.register().status for _ in range(200)} == {503}
        assert time.monotonic() - started < 10 * shared()
        process.terminate()
        assert process.wait(8) == 0
    finally:
        process.kill()
        process.wait()
    client.http.clear()
    assert nothing_lives(tmp_path / "data")


def is_up(client: lab.Client) -> bool:
    """Tell whether a gateway answers."""
    with contextlib.suppress(urllib3.exceptions.HTTPError):
        return bool(client.call("GET", "/__heartbeat__").status == 200)
    return False


@pytest.fixture
def many_files() -> Iterator[None]:
    """This process may open as many files as the system lets it."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("many_files")
def test_more_connections_than_a_worker_needs_for_its_threads(start_gateway: Start) -> None:
    """Idle ones held up all others for half a minute, from 1,024 on."""
    process = start_gateway("--workers", "1")
    with contextlib.ExitStack() as stack:
        for _ in range(1100):
            stack.enter_context(socket.create_connection(("127.0.0.1", process.port)))
        with urllib3.PoolManager(retries=False, timeout=10) as http:
            assert http.request("GET", process.url + "/__lbheartbeat__").status == 200


@pytest.mark.usefixtures("many_files")
def test_connections_leave_files_for_the_store(start_gateway: Start) -> None:
    """Where few may be open: who is connected is served, whatever others do."""
    process = start_gateway("--workers", "1", files=1024)
    with contextlib.ExitStack() as stack:
        early = [
            stack.enter_context(
                urllib3.HTTPConnectionPool("127.0.0.1", process.port, retries=False, timeout=10)
            )
            for _ in range(8)
        ]
        threads = stack.enter_context(ThreadPoolExecutor(8))

        def register(connection: urllib3.HTTPConnectionPool) -> int:
            return connection.request("POST", "/register").status

        assert set(threads.map(register, early)) == {200}
        for _ in range(1300):
            idle = stack.enter_context(contextlib.closing(socket.socket()))
            idle.setblocking(False)  # the kernel takes no more than a few of them
            idle.connect_ex(("127.0.0.1", process.port))
        for _ in range(20):
            assert set(threads.map(register, early)) == {200}
    assert "storage" not in process.output


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Set how many processes and threads the machine allows, and how many there are."""

    def allow(cgroup: str = "max", current: int = 0, user: int = -1, used: int = 0) -> None:
        place = Path("/proc/self/cgroup").read_text().rpartition("0::/")[2].strip()
        folder = tmp_path / place
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "pids.max").write_text(cgroup + "\n")
        (folder / "pids.current").write_text(f"{current}\n")
        monkeypatch.setattr(gateway, "_CGROUPS", tmp_path)
        monkeypatch.setattr(gateway, "_tasks_of", lambda _: used)
        monkeypatch.setattr(os, "getuid", lambda: 1000)
        monkeypatch.setattr(resource, "getrlimit", lambda _: (user, user))

    return allow


@pytest.mark.parametrize(
    ("limits", "threads"),
    [
        ({}, 64),
        ({"cgroup": "1000", "current": 100}, 64),
        ({"cgroup": "226", "current": 5}, 60),  # 2 x (60 + 50), and one that is of no use
        ({"user": 226, "used": 5}, 60),
        ({"user": 1000, "used": 5, "cgroup": "220"}, 60),
        ({"cgroup": "102"}, 1),
    ],
)
def test_a_start_takes_as_many_threads_as_it_may(
    limits: dict[str, Any], threads: int, tasks: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """They start when they are needed: the limit was met under load."""
    tasks(**limits)
    assert gateway.fit_threads(gateway.Settings(workers=2, threads=64)).threads == threads
    assert ("pids.max" in caplog.text) == (threads < 64)


@pytest.mark.parametrize("limits", [{"cgroup": "101"}, {"user": 100, "used": 99}, {"cgroup": "0"}])
def test_a_start_that_may_have_too_few_threads_is_refused(
    limits: dict[str, Any], tasks: Callable[..., None]
) -> None:
    tasks(**limits)
    with pytest.raises(gateway.StartError, match=r"only -?\d+ more .* too few for 2 workers"):
        gateway.fit_threads(gateway.Settings(workers=2))


def test_limits_that_may_not_be_asked_for_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(_: int) -> Any:
        raise PermissionError(errno.EPERM, "prlimit")

    monkeypatch.setattr(resource, "getrlimit", forbidden)
    monkeypatch.setattr(gateway, "_CGROUPS", Path("/nowhere"))
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    assert gateway.fit_threads(gateway.Settings()).threads == gateway.Settings().threads


def test_tasks_are_counted_by_user() -> None:
    assert gateway._tasks_of(os.getuid()) >= psutil.Process().num_threads()
    assert gateway._tasks_of(987654) == 0


def test_python_without_docstrings(start_gateway: Start) -> None:
    """PYTHONOPTIMIZE=2: the texts of /errors and --help are docstrings."""
    process = start_gateway(env={"PYTHONOPTIMIZE": "2"})
    assert can_sign(verified(process))
    with urllib3.PoolManager(retries=False, timeout=10) as http:
        page = http.request("GET", process.url + "/errors").data.decode()
    assert "The verification code is not the one that was sent" in page
    assert "None" not in page
    assert process.stop() == 0
    command = [sys.executable, "-OO", str(ROOT / "gateway.py"), "--help"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "Run the server until SIGTERM" in told


def test_a_store_of_another_master_secret_is_refused(
    start_gateway: Start, external: gateway.EmbeddedStore, tmp_path: Path
) -> None:
    """A container without its volume of keys, or a second machine with its own."""
    store = ("--storage-url", external.url)
    assert start_gateway(*store).stop() == 0
    assert start_gateway(*store).stop() == 0
    other = str(tmp_path / "other")
    process = start_gateway(*store, "--keys-dir", other, wait=False)
    assert eventually(lambda: process.process.poll() is not None), process.output
    assert process.process.returncode == 1
    assert "another master secret" in process.output
    assert "copy the whole keys_dir of its gateway here first" in process.output
    assert not list(Path(other).glob("*.pem")) + list(Path(other).glob("master.secret"))
    environ = {k: v for k, v in os.environ.items() if not k.startswith("GATEWAY_")}
    environ |= {"GATEWAY_STORAGE_URL": external.url, "GATEWAY_KEYS_DIR": other}
    environ |= {"GATEWAY_DATA_DIR": str(tmp_path / "data")}
    ended = subprocess.run(
        [sys.executable, "-c", "import gateway; gateway.application()"], env=environ, cwd=ROOT,
        text=True, check=False, capture_output=True, timeout=60 * shared(),
    )  # fmt: skip
    assert "another master secret" in ended.stderr
    shutil.rmtree(other)
    check = [sys.executable, str(ROOT / "gateway.py"), "check", "--port", str(free_port())]
    told = subprocess.run(check, env=environ, text=True, check=False, capture_output=True)
    assert told.returncode == 1
    assert "copy the whole keys_dir of its gateway here first" in told.stderr


def test_a_store_that_cannot_be_started_at_once_is_started_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = gateway.EmbeddedStore(str(tmp_path / "data"))
    failed, real = threading.Event(), subprocess.Popen

    def fail(*_: Any, **__: Any) -> Any:
        failed.set()
        raise OSError(errno.EMFILE, "Too many open files")

    with contextlib.ExitStack() as stack:
        stack.callback(store.stop)
        monkeypatch.setattr(subprocess, "Popen", fail)
        assert store._process
        store._process.kill()
        assert failed.wait(5)
        monkeypatch.setattr(subprocess, "Popen", real)
        with contextlib.closing(redis.Redis.from_url(store.url)) as client:

            def answers() -> bool:
                with contextlib.suppress(redis.RedisError):
                    return bool(client.ping())
                return False

            assert eventually(answers, 5)
    assert "Too many open files" in caplog.text


def test_a_store_takes_nothing_that_may_not_reach_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a full disk Valkey answers what it could not write, before it refuses the rest."""
    store, full, real = gateway.EmbeddedStore(str(tmp_path / "data")), threading.Event(), os.statvfs

    def little(path: Any) -> Any:
        disk = real(path)
        left = 3_900_000 // disk.f_frsize if full.is_set() else disk.f_bavail
        return types.SimpleNamespace(f_bavail=left, f_frsize=disk.f_frsize, f_blocks=disk.f_blocks)

    monkeypatch.setattr(os, "statvfs", little)
    with contextlib.ExitStack() as stack:
        stack.callback(store.stop)
        storage, key = gateway.Storage(store.url), gateway.StorageId(b"k" * 16)

        def writes() -> bool:
            with contextlib.suppress(gateway.Unavailable):
                storage.create(key, b"record", 60)
                return True
            return False

        assert writes()
        full.set()
        assert eventually(lambda: not writes(), 5)
        assert storage.get(key) == b"record"
        with pytest.raises(gateway.Unavailable):
            storage.commit(key, b"record", b"another")
        assert store._process
        store._process.kill()  # a new one knows it, too
        assert eventually(lambda: not writes(), 5)
        full.clear()
        assert eventually(writes, 5)
    assert "disk of data_dir is full" in caplog.text


def test_service_goes_on_when_all_workers_are_killed(start_gateway: Start) -> None:
    process = start_gateway()
    client = verified(process)
    for worker in workers_of(process):
        worker.kill()
    process.wait_until_ready()
    assert can_sign(again(client, process))
    assert process.stop() == 0


def test_a_killed_store_comes_back_with_its_data(start_gateway: Start) -> None:
    process = start_gateway("--workers", "2")
    client = verified(process)
    for _ in range(2):
        killed = store_of(process)
        killed.kill()
        psutil.wait_procs([killed], 5)

        def back() -> bool:
            reply = client.sign(KEY)
            assert outcome(reply) in ((200, None), (503, 201))  # and nothing else meanwhile
            return reply.status == 200

        assert eventually(back, 5), process.output
        assert store_of(process).pid != killed.pid
    assert process.stop() == 0
    assert nothing_lives(process.folder)


def test_workers_that_keep_dying_end_the_gateway(start_gateway: Start) -> None:
    """Whoever watches it must see that it failed; and nothing may be left."""
    process = start_gateway()
    while process.process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for worker in workers_of(process):
                worker.kill()
        time.sleep(0.05)
    assert process.process.returncode == 1
    assert "Traceback" not in process.output
    assert nothing_lives(process.folder)


@pytest.mark.parametrize("after_s", [0.15, 0.25, 0.35])
def test_a_first_start_that_is_killed_leaves_no_half_key(
    after_s: float, start_gateway: Start
) -> None:
    process = start_gateway(wait=False)
    time.sleep(after_s)
    process.kill()
    folder = str(process.folder / "keys")
    settings = gateway.Settings(keys_dir=folder, data_dir=str(process.folder / "none"))
    key, _ = gateway.load_signing_key(settings)
    secret, _ = gateway.load_master_secret(settings)
    assert (key.key_size, len(secret)) == (2048, 32)


def test_a_store_that_hangs_does_not_keep_the_gateway_from_stopping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = gateway.EmbeddedStore(str(tmp_path / "data"))
    assert store._process
    server = store._process.pid
    monkeypatch.setattr(gateway, "STORE_START_S", 0.5)  # its patience
    halt(server)  # as on a disk that hangs
    stopping = threading.Thread(target=store.stop)
    stopping.start()
    stopping.join(5)
    hung = stopping.is_alive()
    with contextlib.suppress(ProcessLookupError):
        os.kill(server, signal.SIGCONT)
    stopping.join()
    assert not hung
    assert nothing_lives(tmp_path, 0.5)


def test_a_store_that_hangs_costs_a_503_within_a_second(start_gateway: Start) -> None:
    process = start_gateway()
    client = verified(process)
    store = store_of(process)
    halt(store.pid)
    try:
        for call in (client.unregister, process.client().register, lambda: client.sign(KEY)):
            started = time.monotonic()
            reply = call()
            assert outcome(reply) == (503, 201)
            assert reply.headers["Retry-After"] == str(reply.body["retryAfter"])
            assert time.monotonic() - started < 1.5 * shared()  # a second, and a busy machine
        assert process.client().call("GET", "/__lbheartbeat__").status == 200
        heartbeat = process.client().call("GET", "/__heartbeat__")
        assert (heartbeat.status, heartbeat.body["storage"]) == (503, False)
        assert "Retry-After" in heartbeat.headers
    finally:
        store.resume()
    process.wait_until_ready()
    assert can_sign(client)


# -- Ports, folders, keys: refusals -------------------------------------------


class Occupied(NamedTuple):
    """A gateway, a session that it verified, and what those said that it kept out."""

    first: GatewayProcess
    client: lab.Client
    secrets: list[str]
    said: dict[str, str]


@pytest.fixture(scope="module")
def occupied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Occupied]:
    """Start a gateway, then all at once others that want what it has."""
    folder = tmp_path_factory.mktemp("occupied")
    (folder / "link").symlink_to(folder / "data")
    others: dict[str, GatewayProcess] = {}
    with SmsApi() as api:
        secrets = [os.urandom(32).hex(), api.entry()["api_key"], api.entry()["api_secret"]]
        options = (*api.option(), "--master-secret", secrets[0])
        first = GatewayProcess(folder, "--workers", "2", *options)
        try:
            client = first.client()
            client.register()
            client.verify(NUMBER)
            assert client.verify_code(api.code()).status == 200
            elsewhere = ("--data-dir", str(folder / "b"), "--keys-dir", str(folder / "kb"))
            same_port: dict[str, Any] = {"port": first.port, "wait": False}
            others["port"] = GatewayProcess(folder, *elsewhere, **same_port)
            others["port of localhost"] = GatewayProcess(
                folder, *elsewhere, "--host", "localhost", **same_port
            )
            same_secret = ("--master-secret", secrets[0])
            others["data"] = GatewayProcess(folder, *same_secret, wait=False)
            link = ("--data-dir", str(folder / "link"), *same_secret)
            others["link to the data"] = GatewayProcess(folder, *link, wait=False)
            yield Occupied(first, client, secrets, {n: refusal(o) for n, o in others.items()})
            assert first.stop() == 0
        finally:
            for process in (first, *others.values()):
                process.close()


@pytest.mark.parametrize("what", ["port", "port of localhost", "data", "link to the data"])
def test_a_second_gateway_is_refused_and_told_by_whom(what: str, occupied: Occupied) -> None:
    """The port's message names the command that tells; the data's the process itself."""
    said, first = occupied.said[what], occupied.first
    wanted = (
        (first.port, "ss -ltnp") if "port" in what else (first.folder / "data", first.process.pid)
    )
    assert [str(word) in said for word in wanted] == [True, True]


@pytest.mark.parametrize("what", ["port", "data"])
def test_the_refusal_shows_no_secret_of_the_other(what: str, occupied: Occupied) -> None:
    """The other's command line may hold secrets; what we print ends in a log."""
    assert not [secret for secret in occupied.secrets if secret in occupied.said[what]]


def test_the_first_gateway_is_unharmed(occupied: Occupied) -> None:
    assert len(occupied.first.family()) == 5
    assert can_sign(again(occupied.client, occupied.first))
    assert not (occupied.first.folder / "b").exists()  # the refused began nothing


@pytest.mark.parametrize("same", ["port", "data"])
def test_of_two_that_start_at_once_one_wins(
    same: str, start_gateway: Start, tmp_path: Path
) -> None:
    port = free_port()
    other = ("--data-dir", str(tmp_path / "b")) if same == "port" else ()
    both = [
        start_gateway(port=port, wait=False),
        start_gateway(*other, port=port if same == "port" else 0, wait=False),
    ]

    def one_refused() -> bool:
        return any(process.process.poll() is not None for process in both)

    assert eventually(one_refused)
    [loser] = [process for process in both if process.process.poll() is not None]
    [winner] = [process for process in both if process is not loser]
    said = refusal(loser)
    assert (str(port) if same == "port" else str(winner.process.pid)) in said
    winner.wait_until_ready()
    assert verified(winner)
    assert winner.stop() == 0


CLAIMS = """
import os, sys, time
import gateway
gateway.TAKEOVER_S = 0.2
settings = gateway.Settings(port=int(sys.argv[1]))
print("ready", flush=True)
begin_s = float(input())
while time.time() < begin_s:
    pass
try:
    holder = gateway.claim_port(settings)
except gateway.StartError:
    print("refused", flush=True)
else:
    print("has it", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("round", range(3))
def test_of_many_that_claim_a_port_in_the_same_instant_one_wins(round: int) -> None:
    """All of them could bind: each allowed it until it had it."""
    command = [sys.executable, "-c", CLAIMS, str(free_port())]
    pipe = subprocess.PIPE
    with contextlib.ExitStack() as stack:
        claims = [
            stack.enter_context(
                subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True, bufsize=1)
            )
            for _ in range(4)
        ]
        ends: Any = [(claim.stdin, claim.stdout) for claim in claims]
        assert [told.readline() for _, told in ends] == ["ready\n"] * 4
        begin_s = time.time() + 0.1
        for asked, _ in ends:
            asked.write(f"{begin_s}\n")
        outcomes = sorted(told.readline() for _, told in ends)
        assert outcomes == ["has it\n"] + ["refused\n"] * 3


def test_a_port_of_another_program_is_refused_and_says_how_to_find_it(start_gateway: Start) -> None:
    with contextlib.closing(lab.free_port()) as taken:
        taken.listen()
        process = start_gateway(port=taken.getsockname()[1], wait=False)
        assert "ss -ltnp" in refusal(process)
    assert not (process.folder / "data").exists()  # nothing was begun


def test_two_gateways_beside_each_other(start_gateway: Start, tmp_path: Path) -> None:
    """The refusals refuse no more than they should."""
    first = start_gateway()
    second = start_gateway("--data-dir", str(tmp_path / "b"))
    assert can_sign(verified(first))
    assert can_sign(verified(second))


def test_an_address_that_is_not_ours(start_gateway: Start) -> None:
    with SmsApi() as api:
        process = start_gateway("--host", "192.0.2.1", *api.option(), wait=False)
        said = refusal(process)
        assert "192.0.2.1" in said
        assert not (process.folder / "data").exists()


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _foreign(path: Path) -> None:
    path.write_text("dear diary\n")


def _readable(path: Path) -> None:
    path.chmod(0o644)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir(0o700)


def _public(path: Path) -> None:
    kinds = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    path.write_bytes(KEY.public_key().public_bytes(*kinds))


def _shouted(path: Path) -> None:
    path.write_text("A" * 63 + "\n")


@pytest.fixture(scope="module")
def good_keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a keys folder."""
    folder = tmp_path_factory.mktemp("good")
    settings = gateway.Settings(keys_dir=str(folder), data_dir=str(folder / "data"))
    gateway.load_keys(settings)
    gateway.load_master_secret(settings)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def put_keys(folder: Path, files: dict[str, bytes]) -> None:
    """Write the files of a keys folder."""
    folder.mkdir(mode=0o700)
    for name, data in files.items():
        (folder / name).touch(mode=0o600)
        (folder / name).write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        # each would be replaced by a new secret, or crash with a traceback
        ("browserid.pem", _truncate),
        ("browserid.pem", _empty),
        ("browserid.pem", _foreign),
        ("browserid.pem", _public),
        ("browserid.pem", _folder),
        ("browserid.pem", _readable),
        ("master.secret", _truncate),
        ("master.secret", _empty),
        ("master.secret", _foreign),
        ("master.secret", _shouted),
        ("master.secret", _folder),
        ("master.secret", _readable),
        ("operator.token", _truncate),
        ("operator.token", _empty),
        ("operator.token", _folder),
        ("operator.token", _readable),
    ],
)
def test_a_damaged_key_file_is_refused_and_kept(
    name: str, damage: Callable[[Path], None], good_keys: dict[str, bytes], tmp_path: Path
) -> None:
    put_keys(tmp_path / "keys", good_keys)
    path = tmp_path / "keys" / name
    damage(path)
    before = path.read_bytes() if path.is_file() else None
    settings = gateway.Settings(keys_dir=str(path.parent), data_dir=str(tmp_path))
    loads: dict[str, Callable[[gateway.Settings], object]] = {
        "browserid.pem": gateway.load_signing_key,
        "master.secret": gateway.load_master_secret,
        "operator.token": gateway.load_operator_token,
    }
    with pytest.raises(gateway.StartError) as caught:
        loads[name](settings)
    said = str(caught.value)
    assert str(path) in said
    assert (path.read_bytes() if path.is_file() else None) == before
    assert sorted(p.name for p in path.parent.iterdir()) == sorted(good_keys)
    if before:
        assert before.decode().strip() not in said


@pytest.mark.parametrize(
    "name", ["browserid.pem", "master.secret", "operator.token", "proof-0.pem"]
)
def test_with_a_damaged_key_file_nothing_starts(
    name: str, good_keys: dict[str, bytes], start_gateway: Start, tmp_path: Path
) -> None:
    put_keys(tmp_path / "keys", good_keys)
    path = tmp_path / "keys" / name
    _truncate(path)
    said = refusal(start_gateway(wait=False))
    assert str(path) in said
    assert len(said.splitlines()) < 4
    assert not (tmp_path / "data").exists()


def test_a_lost_master_secret_is_not_replaced(start_gateway: Start) -> None:
    """A new one would lock out every user, in silence."""
    process = start_gateway()
    verified(process)
    process.stop()
    secret = process.folder / "keys" / "master.secret"
    secret.rename(process.folder / "away")
    assert str(secret) in refusal(start_gateway(wait=False))
    assert not secret.exists()


def test_a_data_dir_that_cannot_be(start_gateway: Start, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    for folder in (tmp_path / "file", tmp_path / "file" / "below", deep):
        said = refusal(start_gateway("--data-dir", str(folder), wait=False))
        assert "data_dir" in said


def test_a_data_dir_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(gateway.StartError, match=r"data_dir .* No space left"):
        gateway.EmbeddedStore(str(tmp_path / "data"))


# -- The first start, raced ---------------------------------------------------


def test_two_first_starts_make_one_key(
    start_gateway: Start, external: gateway.EmbeddedStore, tmp_path: Path
) -> None:
    """With one store: a session of one is known to the other only by the same secret."""
    options = ("--storage-url", external.url)
    both = [start_gateway(*options, wait=False) for _ in range(2)]
    for process in both:
        process.wait_until_ready()
    assert public_key(both[0]) == public_key(both[1])
    client = verified(both[0])
    assert can_sign(again(client, both[1]))
    names = sorted(path.name for path in (tmp_path / "keys").iterdir())
    kept = ["browserid.pem", "master.secret", "operator.token", "proof-0.pem"]
    assert names == kept  # no drafts are left
    token = (tmp_path / "keys" / "operator.token").read_text().strip()
    assert all(f"token={token}&" in process.output for process in both)


# -- External storage ---------------------------------------------------------


def test_an_external_store_works_the_same(
    start_gateway: Start, external: gateway.EmbeddedStore
) -> None:
    process = start_gateway("--storage-url", external.url, "--workers", "2")
    assert external.url in process.output
    assert not [p for p in process.family() if "valkey" in p.name()]
    client = verified(process)
    assert can_sign(client)
    assert process.stop() == 0
    restarted = start_gateway("--storage-url", external.url, port=process.port)
    client = again(client, restarted)
    assert can_sign(client)
    assert client.unregister().status == 204
    assert outcome(client.sign(KEY)) == (401, 110)
    restarted.kill()
    with redis.Redis.from_url(external.url) as connection:
        assert connection.ping()  # not ours, so not stopped


def test_an_external_store_may_come_later_and_go_and_come_back(
    start_gateway: Start, tmp_path: Path
) -> None:
    folder = tmp_path / "late"
    process = start_gateway("--storage-url", f"unix://{folder}/store.sock", wait=False)
    assert eventually(lambda: "waiting for the store" in process.output), process.output
    store = gateway.EmbeddedStore(str(folder))
    try:
        process.wait_until_ready()
        client = verified(process)
    finally:
        store.stop()
    assert outcome(client.sign(KEY)) == (503, 201)
    store = gateway.EmbeddedStore(str(folder))
    try:
        assert can_sign(client)
    finally:
        store.stop()


def test_a_start_that_waits_for_its_store_can_be_stopped(
    start_gateway: Start, tmp_path: Path
) -> None:
    process = start_gateway("--storage-url", f"unix://{tmp_path}/none.sock", wait=False)
    assert eventually(lambda: "waiting for the store" in process.output), process.output
    started = time.monotonic()
    assert process.stop() == 0
    assert time.monotonic() - started < 2 * shared()
    assert "Traceback" not in process.output


def test_the_password_of_the_store_is_not_shown(
    start_gateway: Start, external: gateway.EmbeddedStore
) -> None:
    """redis-py takes it before the host, or in the query (the only way for a socket)."""
    with redis.Redis.from_url(external.url) as connection:
        connection.config_set("requirepass", "open-sesame")
    process = start_gateway("--storage-url", external.url + "?password=open-sesame")
    assert can_sign(verified(process))
    assert process.stop() == 0
    assert "open-sesame" not in process.output


def test_a_store_that_evicts_is_refused_or_warned_of(
    start_gateway: Start, external: gateway.EmbeddedStore
) -> None:
    """A full store with this policy would drop verified users in silence."""
    with redis.Redis.from_url(external.url) as connection:
        connection.config_set("maxmemory-policy", "allkeys-lru")
    process = start_gateway("--storage-url", external.url, wait=False)
    assert eventually(lambda: "maxmemory-policy" in process.output), process.output
    assert "Traceback" not in process.output


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost:6379",
        "redis://localhost:port",
        "redis://a..b:6379",
        "redis+cluster://a..b:6379",
        "redis://localhost:6379?retry=3",
    ],
)
def test_an_impossible_storage_url_is_refused(url: str, start_gateway: Start) -> None:
    """Catches a start that succeeds, and fails at every request."""
    process = start_gateway("--storage-url", url, wait=False)
    assert eventually(lambda: process.process.poll() is not None), process.output
    assert process.process.returncode == 2
    assert "storage_url" in process.output
    assert "Traceback" not in process.output


# -- Other WSGI servers -------------------------------------------------------

WSGIREF = """
import sys
from wsgiref.simple_server import make_server
import gateway
make_server("127.0.0.1", int(sys.argv[1]), gateway.application()).serve_forever()
"""


FORKS = """
import os
import gateway

app = gateway.application()  # and then four processes, as with uWSGI or gunicorn --preload

def work():
    storage = app.gateway.storage
    for n in range(300):
        key = gateway.StorageId(os.urandom(16))
        storage.create(key, key, 100)
        if storage.get(key) != key or storage.commit(key, key, b"x") != gateway.Commit.DONE:
            os._exit(1)

children = []
for _ in range(4):
    if not (child := os.fork()):
        work()
        os._exit(0)
    children.append(child)
print(*(os.waitpid(child, 0)[1] for child in children))
"""


def test_application_in_processes_that_were_forked_from_it(
    external: gateway.EmbeddedStore, tmp_path: Path
) -> None:
    """They once shared one connection, and each read what was answered to another."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith("GATEWAY_")}
    environ |= {"GATEWAY_STORAGE_URL": external.url, "GATEWAY_KEYS_DIR": str(tmp_path / "keys")}
    environ |= {"GATEWAY_DATA_DIR": str(tmp_path / "data")}  # not that of whoever runs one here
    ended = subprocess.run(
        [sys.executable, "-c", FORKS], env=environ, cwd=ROOT, text=True, check=False,
        capture_output=True, timeout=60 * shared(),
    )  # fmt: skip
    assert (ended.stdout, ended.returncode) == ("0 0 0 0\n", 0), ended.stderr


@pytest.mark.parametrize("server", ["wsgiref", "granian"])
@pytest.mark.parametrize("storage", ["embedded", "external"])
def test_application_under_another_server(
    server: str, storage: str, external: gateway.EmbeddedStore, tmp_path: Path
) -> None:
    port = free_port()
    if server == "wsgiref":
        command = [sys.executable, "-c", WSGIREF, str(port)]
    else:
        granian = str(Path(sys.executable).with_name("granian"))
        command = [granian, "--interface", "wsgi", "--factory", "--host", "127.0.0.1"]
        command += ["--port", str(port), "--blocking-threads", "8", "gateway:application"]
    environ = {k: v for k, v in os.environ.items() if not k.startswith("GATEWAY_")}
    environ |= {
        "PYTHONPATH": str(ROOT),
        "GATEWAY_PORT": str(port),
        "GATEWAY_DATA_DIR": str(tmp_path / "data"),
        "GATEWAY_KEYS_DIR": str(tmp_path / "keys"),
        "GATEWAY_SHORT_CODE_DIGITS": "7",
    }
    if storage == "external":
        environ["GATEWAY_STORAGE_URL"] = external.url
    log = tmp_path / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, env=environ, stdout=file, stderr=subprocess.STDOUT, cwd=tmp_path
        )
    try:
        client = lab.Client(f"http://127.0.0.1:{port}")

        def answers() -> bool:
            with contextlib.suppress(urllib3.exceptions.HTTPError):
                return client.call("GET", "/__heartbeat__").status == 200
            return False

        assert eventually(answers, 30), log.read_text()
        assert client.register().body["verificationUrl"] == f"{client.address}/sms/verify"
        assert client.verify(NUMBER).status == 200
        client.operator_token = (tmp_path / "keys" / "operator.token").read_text().strip()
        code = lab.Handset(client, NUMBER).code()
        assert len(code) == 7
        assert client.verify_code(code).body == {"msisdn": NUMBER}
        assert can_sign(client)
        started = time.monotonic()
        chunked = client.http.request("POST", client.address + "/register", body=iter([b"{}"]))
        assert (chunked.status, chunked.json()["errno"]) == (411, 112)
        assert time.monotonic() - started < 2 * shared()
        assert client.unregister().status == 204
        client.http.clear()
    finally:
        process.terminate()
        process.wait(20)
    left = {pid for pid in living(tmp_path) if str(external.folder) not in _cwd(pid)}
    assert eventually(lambda: not left & living(tmp_path).keys())


def _cwd(pid: int) -> str:
    with contextlib.suppress(psutil.Error):
        return str(psutil.Process(pid).cwd())
    return ""


# -- Hostile clients of the real server ---------------------------------------


def talk(port: int, *pieces: bytes, pause_s: float = 0, end: bool = False) -> bytes:
    """Send bytes over a connection of their own; gives all that comes back until its end."""
    with contextlib.closing(socket.create_connection(("127.0.0.1", port), 10)) as connection:
        received = b""
        with contextlib.suppress(OSError):  # it may hang up while we still talk
            for n, piece in enumerate(pieces):
                time.sleep(pause_s if n else 0)
                connection.sendall(piece)
            if end:
                connection.shutdown(socket.SHUT_WR)
            while data := connection.recv(65536):
                received += data
                connection.settimeout(1)  # one that it keeps open says no more after that
        return received


def head(*lines: str, close: bool = True) -> bytes:
    """The head of a POST to /register."""
    fixed = ["POST /register HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json"]
    fixed += ["Connection: close"] * close
    return "\r\n".join([*fixed, *lines, "", ""]).encode()


def parsed(answer: bytes) -> tuple[int, Any]:
    """Status and JSON body of the one answer that came."""
    assert answer.count(b"HTTP/1.1 ") == 1, answer
    top, _, body = answer.partition(b"\r\n\r\n")
    return int(top.split()[1]), json.loads(body)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """A gateway that many tests share."""
    folder = tmp_path_factory.mktemp("running")
    process = GatewayProcess(folder, "--workers", "2")
    yield process
    output = process.output
    assert process.stop() == 0
    process.close()
    assert "Traceback" not in output


SMUGGLED = b"GET /__version__ HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize(
    ("request_bytes", "status", "errno"),
    [
        # decoded twice (STACK.md §5): 400, or a body without a limit
        (head("Transfer-Encoding: chunked") + b"2\r\n{}\r\n0\r\n\r\n", 411, 112),
        (head("Transfer-Encoding: chunked") + b"0\r\n\r\n", 411, 112),
        # two lengths: whoever believes the other one sees another request
        (head("Transfer-Encoding: chunked", "Content-Length: 2") + b"0\r\n\r\n", 411, 112),
        # waits for a body that does not come
        (head("Content-Length: 1000000000"), 413, 113),
        (head("Content-Length: 10241"), 413, 113),
        (head("Content-Length: 99999999999999999999"), 0, 0),
        # the body of a refused request is answered as the next request
        (head("Content-Length: 12000", close=False) + SMUGGLED * 300, 413, 113),
        (
            head("Transfer-Encoding: chunked", close=False)
            + b"%x\r\n" % len(SMUGGLED)
            + SMUGGLED
            + b"\r\n0\r\n\r\n",
            411,
            112,
        ),
    ],
)
def test_bodies_that_are_refused_at_once(
    running: GatewayProcess, request_bytes: bytes, status: int, errno: int
) -> None:
    started = time.monotonic()
    answer = talk(running.port, request_bytes)
    assert time.monotonic() - started < 5 * shared()  # and not the 10 s that this client would wait
    if status:
        got, body = parsed(answer)
        assert (got, body["errno"]) == (status, errno)
        assert b"timestamp:" in answer.lower()
    else:
        assert answer[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 413", b"HTTP/1.1 411")
    assert b"version" not in answer


def test_a_body_of_exactly_the_limit_is_taken(running: GatewayProcess) -> None:
    body = b"{" + b" " * 10238 + b"}"
    status, answer = parsed(talk(running.port, head("Content-Length: 10240"), body))
    assert status == 200
    assert len(answer["msisdnSessionToken"]) == 64


def test_a_slow_body_is_waited_for(running: GatewayProcess) -> None:
    answer = talk(running.port, head("Content-Length: 2"), b"{", b"}", pause_s=0.3)
    assert parsed(answer)[0] == 200


def test_a_body_that_ends_early_registers_nobody(running: GatewayProcess) -> None:
    answer = talk(running.port, head("Content-Length: 20"), b"{}", end=True)
    assert b" 200 " not in answer
    assert b"msisdnSessionToken" not in answer


def test_clients_that_stall_keep_nobody_waiting(running: GatewayProcess) -> None:
    with contextlib.ExitStack() as stack:
        for n in range(40):
            stalled = socket.create_connection(("127.0.0.1", running.port))
            stack.enter_context(contextlib.closing(stalled))
            stalled.sendall(head("Content-Length: 20")[: 30 if n % 2 else None] + b"{" * (n % 2))
        for _ in range(5):
            started = time.monotonic()
            client = running.client()
            assert client.register().status == 200
            assert time.monotonic() - started < 5 * shared()
            client.http.clear()


def test_clients_that_stall_close_nothing_to_who_does_not(start_gateway: Start) -> None:
    """Any one address can open more of these than there are threads, again and again."""
    process = start_gateway("--threads", "64")
    done, answers = threading.Event(), []

    def stall() -> None:
        while not done.is_set():
            with contextlib.suppress(OSError):
                answers.append(talk(process.port, head("Content-Length: 20"), b"{"))
            done.wait(0.1)

    stalling = [threading.Thread(target=stall) for _ in range(80)]
    for thread in stalling:
        thread.start()
    try:
        time.sleep(0.5)
        started = time.monotonic()
        for _ in range(20):
            client = process.client()
            assert client.register(mcc="234").status == 200
            client.http.clear()
        assert time.monotonic() - started < 10 * shared()
    finally:
        done.set()
        for thread in stalling:
            thread.join()
    assert not any(b" 200 " in answer for answer in answers)
    assert "Traceback" not in process.output


@pytest.mark.parametrize(
    "garbage",
    [
        b"\r\n\r\n\r\n\r\n",
        b"\0" * 200 + b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + bytes(range(200)),  # TLS to a plain port
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        # Granian takes 16 KiB, and what came with the last of them: so much more than that.
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 2_000_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 500_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\n no-colon\r\n\r\n",
        head("Content-Length: -1"),
        head("Content-Length: +2") + b"{}",
        head("Content-Length: 2", "Content-Length: 3") + b"{} ",
        head("Content-Length: 0x2") + b"{}",
        head("Transfer-Encoding: chunked") + b"zz\r\n{}\r\n0\r\n\r\n",
        head("Transfer-Encoding: gzip, identity") + b"{}",
    ],
)
def test_garbage_does_no_harm(running: GatewayProcess, garbage: bytes) -> None:
    family = running.family()
    answer = talk(running.port, garbage, end=True)
    assert b" 200 " not in answer
    assert b" 500 " not in answer
    assert running.client().register().status == 200
    assert running.family() == family


@pytest.mark.parametrize(
    "target", ["/x%ff%fe", "/%00", "/%E2%82%AC", "/€", "/../etc/passwd", "//", "/%2e%2e/x", "/v1"]
)
def test_odd_paths_are_404_in_json(running: GatewayProcess, target: str) -> None:
    request = f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
    status, body = parsed(talk(running.port, request))
    assert (status, body["code"], body["error"]) == (404, 404, "Not Found")


# -- Two workers, one session -------------------------------------------------


def pending(process: GatewayProcess) -> tuple[lab.Client, str]:
    """A session that waits for this code."""
    client = process.client()
    client.register()
    assert client.verify(NUMBER).status == 200
    return client, lab.Handset(client, NUMBER).code()


def test_both_workers_serve(running: GatewayProcess) -> None:
    """Else the tests below show nothing about two processes."""
    with contextlib.ExitStack() as stack:
        for _ in range(40):
            connection = socket.create_connection(("127.0.0.1", running.port))
            stack.enter_context(contextlib.closing(connection))
            connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        for worker in workers_of(running):
            states = [c.status for c in worker.net_connections("tcp")]
            assert states.count(psutil.CONN_ESTABLISHED) > 1


def test_of_50_wrong_codes_at_once_3_are_counted(running: GatewayProcess) -> None:
    client, code = pending(running)
    wrong = [f"{(int(code) + n) % 10**6:06}" for n in range(1, 51)]
    clients = [again(client, running) for _ in wrong]
    calls = [partial(c.verify_code, w) for c, w in zip(clients, wrong, strict=True)]
    outcomes = [outcome(reply) for reply in at_once(calls)]
    assert outcomes.count((400, 105)) == 3
    assert outcomes.count((410, 111)) == 47
    assert outcome(client.verify_code(code)) == (410, 111)


def test_of_20_right_codes_at_once_one_is_taken(running: GatewayProcess) -> None:
    client, code = pending(running)
    clients = [again(client, running) for _ in range(20)]
    outcomes = [outcome(r) for r in at_once([partial(c.verify_code, code) for c in clients])]
    assert outcomes.count((200, None)) == 1
    assert outcomes.count((410, 111)) == 19
    assert can_sign(client)


def test_tries_of_two_codes_do_not_add_up(running: GatewayProcess) -> None:
    """Asking for fresh codes while guessing gives no more than three guesses in all."""
    client, code = pending(running)
    wrong = [f"{(int(code) + n) % 10**6:06}" for n in range(1, 21)]
    phone = lab.Handset(client, NUMBER)
    before = len(phone.messages())
    clients = [again(client, running) for _ in range(24)]
    calls = [partial(c.verify_code, w) for c, w in zip(clients, wrong, strict=False)]
    calls += [partial(c.call, "POST", "/sms/resend_code") for c in clients[20:]]
    replies = at_once(calls)
    # 503: it lost the race for the record too often, and nothing was sent
    assert {outcome(reply) for reply in replies[20:]} <= {(200, None), (503, 201)}
    # Of those that were asked for while one was being sent none was: a double click.
    sent = len(phone.messages()) - before
    assert sent <= sum(reply.status == 200 for reply in replies[20:])
    counted = [outcome(reply) for reply in replies[:20]].count((400, 105))
    # a code that has died by its three tries may be followed by a new one with its own
    assert 3 <= counted <= 3 * (1 + sent)


def test_sends_at_once_are_counted_one_by_one(running: GatewayProcess) -> None:
    client = running.client()
    client.register()
    clients = [again(client, running) for _ in range(12)]
    number = "+447700900222"
    outcomes = [outcome(r) for r in at_once([partial(c.verify, number) for c in clients])]
    assert set(outcomes) <= {(200, None), (429, 114), (503, 201)}
    phone = lab.Handset(client, number)
    sent = len(phone.messages())
    # What was asked for while the same was being sent is a double click: answered, and not sent.
    assert 1 <= sent <= min(5, outcomes.count((200, None)))
    one_by_one = [outcome(client.verify(number)) for _ in range(7)]
    assert one_by_one == [(200, None)] * (5 - sent) + [(429, 114)] * (2 + sent)
    assert len(phone.messages()) == 5
    assert client.verify_code(phone.code()).status == 200


def test_sign_racing_unregister_revives_nobody(running: GatewayProcess) -> None:
    url = f"unix://{running.folder}/data/store.sock"
    with redis.Redis.from_url(url) as store:
        for n in range(25):
            number = f"+4477009{n:05}"
            client = verified(running, number)
            before = store.dbsize()
            racers = [again(client, running) for _ in range(5)]
            calls = [partial(c.sign, KEY) for c in racers[:3]]
            calls += [partial(racers[3].unregister)]
            calls += [partial(racers[4].call, "POST", "/sms/resend_code")]
            replies = at_once(calls)
            for reply in replies[:3]:
                assert outcome(reply) in ((200, None), (401, 110))
            assert outcome(replies[3]) == (204, None)
            # 503: its message was removed with the user
            assert outcome(replies[4]) in ((200, None), (401, 110), (503, 201))
            assert outcome(client.sign(KEY)) == (401, 110)
            assert outcome(client.unregister()) == (401, 110)
            # the record is gone, and what is new are nonces: empty values
            assert store.dbsize() <= before + 5
            kept = (key for key in store.keys(b"{*}*") if key[:8] != b"{limits}")
            lengths = {store.strlen(key) for key in kept}
            assert lengths <= {0}


@pytest.mark.parametrize("call", ["sign", "wrong code", "send", "unregister"])
def test_of_one_request_sent_20_times_at_once_one_is_served(
    call: str, running: GatewayProcess
) -> None:
    client, code = pending(running)
    served: tuple[int, int | None] = (200, None)
    path = "/certificate/sign"
    body: gateway.Json = {"publicKey": gateway.public_key_json(KEY.public_key())}
    if call == "sign":
        assert client.verify_code(code).status == 200
    elif call == "wrong code":
        path, body = "/sms/verify_code", {"code": f"{(int(code) + 1) % 10**6:06}"}
        served = (400, 105)
    elif call == "send":
        path, body = "/sms/verify", {"msisdn": NUMBER}
    else:
        path, body, served = "/unregister", {}, (204, None)
    phone = lab.Handset(client, NUMBER)
    before = len(phone.messages())
    clients = [again(client, running) for _ in range(20)]
    now = time.time()
    for replaying in clients:
        replaying.nonce, replaying.clock = lambda: "once", lambda: now
    replies = at_once([partial(c.call, "POST", path, body) for c in clients])
    outcomes = [outcome(reply) for reply in replies]
    assert outcomes.count(served) == 1
    replayed = {(401, 109), (401, 110)} if call == "unregister" else {(401, 109)}
    assert set(outcomes) - {served} <= replayed
    if call == "send":
        assert len(phone.messages()) == before + 1
    if call == "wrong code":
        assert client.verify_code(code).status == 200
