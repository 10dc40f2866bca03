"""What tests need beside ``lab``: a WSGI client under the validator, real server processes."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import io
import itertools
import json
import math
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Sequence
from functools import cache
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar
from urllib.parse import urlsplit
from wsgiref.validate import validator

import lab
import psutil
import urllib3

import gateway

ROOT = Path(__file__).resolve().parent.parent
AT_ONCE: Final = [0]
"""``resend_gaps_s`` of most tests: a session may ask again without waiting."""
WIDE: Final[dict[str, Any]] = {
    "sends_per_number": "9999999/second",
    "sends_per_number_from_address": "9999999/second",
    "unverified_per_prefix": "9999999/second",
    "unverified_per_destination": {"*": "9999999/second"},
    "unverified_per_address": "9999999/second",
    "spend_per_day": 1e9,
}
"""Limits of most tests, whose messages go to few numbers: all that are not about limits pass."""
OPEN: Final[dict[str, Any]] = {"resend_gaps_s": AT_ONCE, **WIDE}
"""Both."""
NAMED: Final = ["--countries", '["*"]', "--mt-sender", "Gateway", "--trusted-proxies", "[]"]
"""What a start with a provider that costs money must name."""
T = TypeVar("T")
NUMBER = "+447700900123"
"""A number that Ofcom keeps free for fiction."""


def die_with_parent(parent: int, how: signal.Signals) -> None:
    """Have the kernel send us ``how`` when the thread that started us ends (``preexec_fn``)."""
    ctypes.CDLL(None).prctl(1, how)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it died before we were heard
        os._exit(1)


PORTS_EACH: Final = 1_500
_FIRST_PORT = 20_000 + PORTS_EACH * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
_OURS = range(_FIRST_PORT, _FIRST_PORT + PORTS_EACH)
# Shuffled: of two runs on this machine that go through them in the same order, one may take
# a port between the other's probe and its use, and then the next, and so on.
_PORTS = itertools.cycle(secrets.SystemRandom().sample(_OURS, PORTS_EACH))


def free_port() -> int:
    """A loopback port that nobody listens on, and that no other worker of xdist is given.

    It lies below those that the kernel gives to clients, which would race for it.
    """
    for port in itertools.islice(_PORTS, PORTS_EACH):
        with contextlib.suppress(OSError), contextlib.closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")


def shared() -> float:
    """How much longer than on a machine of its own something may take now; at least 1.

    Promises in seconds are measured beside other tests, on machines that have other things to do:
    it is how many tasks wanted each core in the last minute.
    """
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def poll(true: Callable[[], T], timeout_s: float) -> T:
    """Ask until the answer is true, or the time is over; gives the last answer.

    First each 10 ms, then less often, up to 10 times a second: to look at all processes takes 10
    ms of CPU, which those who are waited for need as well.
    """
    deadline, pause_s = time.monotonic() + timeout_s * shared(), 0.01
    while not (answer := true()) and time.monotonic() < deadline:
        time.sleep(pause_s)
        pause_s = min(1.25 * pause_s, 0.1)
    return answer


def halt(pid: int) -> None:
    """SIGSTOP; back once the process has stopped: one of its threads has to run for that.

    On a busy machine others go on meanwhile, for tenths of a second, and may answer, or end it.
    """
    os.kill(pid, signal.SIGSTOP)
    assert poll(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED, 10)


class Clock:
    """A clock that moves only when it is told to."""

    def __init__(self, now_s: float = 1_800_000_000) -> None:
        self.now_s = float(now_s)

    def __call__(self) -> float:
        return self.now_s


class Answer(NamedTuple):
    """An answer: status, headers (lower-case names), raw body, and its JSON if it is JSON."""

    status: int
    headers: dict[str, str]
    data: bytes

    @property
    def json(self) -> Any:
        """The body as JSON."""
        assert self.headers["content-type"] == "application/json"
        return json.loads(self.data)

    @property
    def errno(self) -> int | None:
        """The errno, after a check that the rest of the error body is as it must be."""
        body = self.json
        assert body["code"] == self.status
        assert body["error"] == HTTPStatus(self.status).phrase
        assert body["message"]
        assert str(body["errno"]) in body["info"]
        assert ("retryAfter" in body) == (body["errno"] in (114, 115, 116, 117, 201))
        if "retryAfter" in body:
            assert self.headers["retry-after"] == str(body["retryAfter"])
        return int(body["errno"])


@cache
def documented() -> Any:
    """``/openapi.json`` as every default gateway shows it."""
    return json.loads(
        json.dumps(gateway.openapi_document("http://127.0.0.1:5000", gateway.__version__))
    )


@cache
def _operation(method: str, path: str) -> Any:
    bare = re.sub("^/v1(/msisdn)?(?=/)", "", path)
    for pattern, item in documented()["paths"].items():
        if re.fullmatch(re.sub("{.+?}", "[^/]+", pattern.replace(".", r"\.")), bare):
            return item.get(method.lower())
    return None


def undocumented(method: str, path: str, answer: Answer) -> str:
    """What of an answer ``/openapi.json`` does not name: its status, or its errno; else ""."""
    if not (operation := _operation(method, path)) or answer.status in (404, 405):
        return ""  # no such route
    if not (response := operation["responses"].get(str(answer.status))):
        return f"{method} {path} answers {answer.status}, which /openapi.json does not name"
    if answer.status >= 400 and answer.headers.get("content-type") == "application/json":
        schema = response["content"]["application/json"]["schema"]
        errnos = schema.get("properties", {}).get("errno", {"enum": [None]})["enum"]
        errno = json.loads(answer.data).get("errno")
        if errno not in errnos:
            return f"{method} {path}: errno {errno} is none of {errnos}"
    return ""


class WsgiClient:
    """Calls an application in this process, every time under ``wsgiref.validate``.

    After ``register`` it signs each request with our own client side of Hawk, and checks
    each ``Server-Authorization``; ``call(…, signed=False)`` does not.
    """

    host = "127.0.0.1:5000"
    store_fails = False  #: A write with an unknown outcome may have come before any answer.

    def __init__(self, app: gateway.GatewayApp) -> None:
        self.app, self.wsgi = app, validator(app)
        self.gateway: gateway.Gateway = app.gateway
        self.credentials: gateway.Credentials | None = None

    def another(self) -> WsgiClient:
        """A second client of the same application."""
        return type(self)(self.app)

    def raw(
        self, method: str, path: str, body: bytes = b"", environ: dict[str, Any] | None = None
    ) -> Answer:
        """One request; ``environ`` overrides, and ``None`` in it removes."""
        base, _, query = path.partition("?")
        env: dict[str, Any] = {
            "REQUEST_METHOD": method,
            "SCRIPT_NAME": "",
            "PATH_INFO": base,
            "QUERY_STRING": query,
            "SERVER_NAME": "127.0.0.1",
            "SERVER_PORT": "5000",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "REMOTE_ADDR": "127.0.0.1",
            "HTTP_HOST": self.host,
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http",
            "wsgi.input": io.BytesIO(body),
            "wsgi.errors": sys.stderr,
            "wsgi.multithread": True,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
        }
        if body:
            env |= {"CONTENT_LENGTH": str(len(body)), "CONTENT_TYPE": "application/json"}
        env |= environ or {}
        env = {name: value for name, value in env.items() if value is not None}
        seen: list[Any] = []

        def start_response(status: str, headers: list[Any], exc_info: Any = None) -> Any:
            seen[:] = [int(status.split()[0]), {n.lower(): v for n, v in headers}]
            return lambda data: None

        result: Any = self.wsgi(env, start_response)
        try:
            data = b"".join(result)
        finally:
            result.close()
        assert seen[1]["timestamp"].isdecimal()
        answer = Answer(seen[0], seen[1], data)
        assert undocumented(method, base, answer) == ""
        return answer

    def call(
        self,
        path: str,
        body: Any = None,
        *,
        method: str = "POST",
        signed: bool = True,
        environ: dict[str, Any] | None = None,
        ts: int | None = None,
        nonce: str = "",
    ) -> Answer:
        """One JSON request, signed if there is a session."""
        data = b"" if body is None else json.dumps(body).encode()
        env = dict(environ or {})
        target = gateway.hawk_target(method, f"http://{self.host}{path}")
        sent = ""
        if self.credentials and signed:
            kind = env.get("CONTENT_TYPE", "application/json" if data else "")
            sent = gateway.build_authorization(
                self.credentials,
                target,
                int(self.gateway.clock()) if ts is None else ts,
                nonce or secrets.token_hex(6),
                kind,
                data,
            )
            env.setdefault("HTTP_AUTHORIZATION", sent)
        answer = self.raw(method, path, data, env)
        if seal := answer.headers.get("server-authorization", ""):
            assert self.credentials
            key, kind = self.credentials.hawk_key, answer.headers.get("content-type", "")
            assert lab.check_answer(key, sent, seal, target, kind, answer.data)
            told = answer.status >= 400 and answer.json.get("errno") not in (110, 201)
            if told and not (self.store_fails and "next" not in answer.json):
                assert_next_action(answer)
        return answer

    def get(self, path: str, **environ: Any) -> Answer:
        """One GET request."""
        return self.raw("GET", path, environ=environ)

    def register(self, **body: Any) -> Answer:
        """Open a session."""
        answer = self.call("/register", body or None, signed=False)
        token = bytes.fromhex(answer.json["msisdnSessionToken"])
        self.credentials = gateway.derive_credentials(gateway.SessionToken(token))
        return answer

    def ask(self, msisdn: str = NUMBER, **body: Any) -> Answer:
        """Ask for a PIN."""
        return self.call("/sms/verify", {"msisdn": msisdn, **body})

    def outbox(self, msisdn: str = NUMBER) -> list[Any]:
        """What the outbox holds for a number."""
        path = f"/outbox?to={msisdn.lstrip('+')}&token={self.app.token}"
        found: list[Any] = self.get(path).json
        return found

    def code(self, msisdn: str = NUMBER) -> str:
        """The newest code for a number."""
        return str(self.outbox(msisdn)[-1]["text"].split()[-1])

    def verified(self, msisdn: str = NUMBER) -> WsgiClient:
        """Go the whole way: register, ask, verify."""
        self.register()
        assert self.ask(msisdn).status == 200
        assert self.call("/sms/verify_code", {"code": self.code(msisdn)}).status == 200
        return self


def assert_next_action(answer: Answer) -> None:
    """Every error about a session says what its client may do next."""
    told = answer.json["next"]
    assert told.keys() == {"resendIn", "sendsLeft", "triesLeft", "expiresIn", "verified"}
    assert all(type(told[n]) is int and told[n] >= 0 for n in told if n != "verified")
    assert type(told["verified"]) is bool
    assert (told["triesLeft"] > 0) == (told["expiresIn"] > 0)
    if answer.status == 429:
        assert told["resendIn"] >= answer.json["retryAfter"]


class Patient(subprocess.Popen[bytes]):
    """A process whose end is waited for so much longer as this machine is busy."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for it; gives its exit status."""
        return super().wait(None if timeout is None else timeout * shared())


class GatewayProcess:
    """A real ``python gateway.py`` on a free port, with its data and keys below ``folder``.

    Args:
        folder: Holds ``data`` and ``keys`` (give the same one to start again on them).
        options: More command-line options; they win.
        port: 0 takes a free one.
        wait: Wait until it answers.
        files: How many each of its processes may open; 0: as many as we.
        terminal: The descriptor of a terminal that becomes its own; -1: it has none. ``None``:
            it has ours, if we have one.
        log: Where it writes to, on stdout and stderr; by default a file of its own in ``folder``.
        python: The command that runs Python.
    """

    def __init__(
        self,
        folder: Path,
        *options: str,
        port: int = 0,
        wait: bool = True,
        env: dict[str, str] | None = None,
        files: int = 0,
        terminal: int | None = None,
        log: Path | None = None,
        python: Sequence[str] = (sys.executable,),
    ) -> None:
        port = port or free_port()
        self.folder, self.port, self.url = folder, port, f"http://127.0.0.1:{port}"
        self.log = log or folder / f"gateway-{port}-{time.time_ns()}.log"
        command = [*python, str(ROOT / "gateway.py"), "--port", str(port)]
        command += ["--data-dir", str(folder / "data"), "--keys-dir", str(folder / "keys")]
        command += ["--resend-gaps-s", json.dumps(AT_ONCE), *NAMED]
        for name, value in WIDE.items():
            text = value if isinstance(value, str) else json.dumps(value)
            command += ["--" + name.replace("_", "-"), text]
        if files:
            command = ["/bin/sh", "-c", f'ulimit -n {files}; exec "$@"', "sh", *command]
        clean = {k: v for k, v in os.environ.items() if not k.startswith("GATEWAY_")}

        def attach() -> None:
            os.setsid()
            if terminal != -1:
                fcntl.ioctl(terminal or 0, termios.TIOCSCTTY, 0)

        with self.log.open("wb") as file:
            self.process = Patient(
                [*command, "--workers", "1", *options],
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**clean, **(env or {})},
                cwd=folder,
                preexec_fn=None if terminal is None else attach,
            )
        if wait:
            self.wait_until_ready()

    @property
    def output(self) -> str:
        """What it has printed so far, on stdout and stderr."""
        return self.log.read_text("utf-8", "replace")

    def wait_until_ready(self, timeout_s: float = 60) -> None:
        """Wait until it answers; fail with its output if it ends instead."""
        http = urllib3.PoolManager(retries=False, timeout=5)

        def is_ready() -> bool:
            if self.process.poll() is not None:
                raise AssertionError(f"ended with {self.process.returncode}:\n{self.output}")
            with contextlib.suppress(urllib3.exceptions.HTTPError):
                return http.request("GET", self.url + "/__heartbeat__").status == 200
            return False

        if not poll(is_ready, timeout_s):
            raise AssertionError(f"not ready after {timeout_s} s:\n{self.output}")

    def family(self) -> list[psutil.Process]:
        """The main process, its workers and its store."""
        main = psutil.Process(self.process.pid)
        return [main, *main.children(recursive=True)]

    def client(self, **options: Any) -> lab.Client:
        """A client of this gateway."""
        settings = gateway.Settings(keys_dir=str(self.folder / "keys"))
        options.setdefault("operator_token", gateway.load_operator_token(settings))
        return lab.Client(self.url, **options)

    def kill(self) -> None:
        """``kill -9`` of the main process, and of nothing else."""
        self.process.kill()
        self.process.wait()

    def stop(self, how: signal.Signals = signal.SIGTERM, timeout_s: float = 30) -> int:
        """Stop it in an orderly way; gives its exit status."""
        self.process.send_signal(how)
        return self.process.wait(timeout_s)

    def close(self) -> None:
        """Make sure that nothing of it lives on."""
        left = []
        with contextlib.suppress(psutil.NoSuchProcess):
            left = self.family()
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        _, alive = psutil.wait_procs(left, 5 * shared())
        for process in alive:
            process.kill()


def counted(app: gateway.Gateway, row: str = "h", who: str = "", region: str = "") -> int:
    """How many messages a counter holds that is not refilled while we look; of money, units of it.

    Args:
        row: Its letter in ``gateway.LIMITS``; by default that of the gateway's hour.
    """
    (counter,) = app.limits.counters({row: who}, region)
    at_rest_us = int(app.storage._run("GET", counter.key) or 0)
    return math.ceil(max(0, at_rest_us - app.clock() * 1e6 - 1000) / counter.cost_us)


def receipts(app: gateway.Gateway, kind: str) -> dict[str, int]:
    """How many final receipts of a kind of provider were counted, by outcome."""
    names = re.compile(rf"receipts_total kind={kind} outcome=(\w*)")
    found = ((names.fullmatch(name), n) for name, n in app.counts._new.items())
    return {match[1]: n for match, n in found if match}


LIST: Final = b"{limits}s" + b"l" * 12
"""The list of a session, for ``take``."""
HOUR: Final = b"{limits}h" + b"h" * 12
"""The counter, likewise."""


def take(storage: gateway.Storage, now_s: float, limit: int, name: bytes) -> int:
    """Take an attempt from an hour's counter; gives 0, or the seconds until it can be taken."""
    row = (3_600_000_000, round(3_600_000_000 / limit), "")
    ask = {"now": round(now_s * 1e6), "region": "", "prefix": "", "outcome": "refused"}
    ask["rows"] = [row]
    return int(storage.limit(gateway.TAKE_SCRIPT, [LIST, HOUR], ask, name, b"-")[1])


def give_back(storage: gateway.Storage, now_s: float, limit: int, name: bytes) -> None:
    """Give an attempt back."""
    ask = {"now": round(now_s * 1e6), "region": "", "prefix": ""}
    ask["costs"] = [round(3_600_000_000 / limit)]
    storage.limit(gateway.GIVE_BACK_SCRIPT, [LIST, HOUR], ask, name)


def names_taken(storage: gateway.Storage) -> set[bytes]:
    """The names in that list."""
    return set(storage._run("HKEYS", LIST, key=LIST))


def host_of(url: str) -> str:
    """Host and port of a URL: the issuer of certificates there."""
    return urlsplit(url).netloc
