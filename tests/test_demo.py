"""``python gateway.py demo``: the whole flow in one command, with and without a gateway."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import lab
import psutil
import pytest
from support import NUMBER, ROOT, GatewayProcess, free_port, poll, shared
from test_sms import SmsApi, refused

import gateway

Start = Callable[..., GatewayProcess]


class Demo:
    """A running demo whose folders, port and environment are its own."""

    def __init__(self, folder: Path, *options: str, port: int = 0, typed: bool = False) -> None:
        port = port or free_port()
        self.port, self.temporary, self.cwd = port, folder / "tmp", folder / "cwd"
        self.temporary.mkdir()
        self.cwd.mkdir()
        environ = {k: v for k, v in os.environ.items() if not k.startswith("GATEWAY_")}
        environ |= {"GATEWAY_PORT": str(port), "TMPDIR": str(self.temporary)}
        # files, not pipes: whatever it leaves behind would keep a pipe open
        self.out, self.err = folder / "out", folder / "err"
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "gateway.py"), "demo", *options],
                stdin=subprocess.PIPE if typed else subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                text=True,
                env=environ,
                cwd=self.cwd,
            )

    def end(self, typed: str = "") -> tuple[int, str, str]:
        """Wait for its end; gives exit status, stdout, stderr."""
        self.process.communicate(typed or None, timeout=40 * shared())
        return self.process.returncode, self.out.read_text(), self.err.read_text()

    def left(self) -> list[str]:
        """What it left behind: files, and processes that work with them."""
        files = [str(path) for path in (*self.temporary.iterdir(), *self.cwd.iterdir())]
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                told = " ".join([*process.cmdline(), process.cwd()])
                if str(self.temporary) in told and process.status() != psutil.STATUS_ZOMBIE:
                    files.append(f"process {process.pid} {process.name()}")
        return files


@pytest.fixture
def start_demo(tmp_path: Path) -> Iterator[Callable[..., Demo]]:
    """Start a demo; make sure that it is gone in the end."""
    started: list[Demo] = []

    def start(*options: str, **kwargs: Any) -> Demo:
        (folder := tmp_path / str(len(started))).mkdir()  # a socket may not lie deep
        started.append(Demo(folder, *options, **kwargs))
        return started[-1]

    yield start
    for demo in started:
        demo.process.kill()
        demo.process.communicate()
        for told in demo.left():
            if told.startswith("process "):
                with contextlib.suppress(psutil.NoSuchProcess):
                    psutil.Process(int(told.split()[1])).kill()


def claims_in(out: str) -> gateway.Json:
    """The verified claims: the JSON object that is printed over several lines."""
    found = re.search(r"^ *\{\n.*?^ *\}$", out, re.MULTILINE | re.DOTALL)
    assert found, out
    claims: gateway.Json = json.loads(found[0])
    return claims


def gone(demo: Demo, timeout_s: float = 5) -> bool:
    """Tell whether nothing is left of a demo, in time."""
    return poll(lambda: not demo.left(), timeout_s)


def test_against_nothing_it_starts_a_gateway_and_leaves_nothing(
    start_demo: Callable[..., Demo],
) -> None:
    demo = start_demo()
    before = time.time()
    status, out, err = demo.end()
    assert status == 0, out + err
    claims = claims_in(out)
    assert claims["verifiedMSISDN"] == NUMBER
    assert re.fullmatch(r"127\.0\.0\.1:[0-9]+", claims["iss"])
    assert claims["iss"] != f"127.0.0.1:{demo.port}"  # its own, on a free port
    assert claims["principal"]["email"].endswith("@" + claims["iss"])
    assert before - 11 < claims["iat"] / 1000 < time.time()
    assert claims["exp"] / 1000 > time.time()
    steps = [
        "POST /register",
        "POST /sms/verify ",
        "SMS  Your verification code is: ",
        "POST /sms/verify_code",
    ]
    steps += ["GET /.well-known/browserid", "POST /unregister"]
    places = [out.find(step) for step in steps]
    assert -1 not in places
    assert places == sorted(places)  # each message as it goes over the wire
    assert "Traceback" not in err
    assert demo.left() == []


def test_the_first_page_shows_what_it_prints(start_demo: Callable[..., Demo]) -> None:
    """But for what differs each time, and the ends of long lines: there it has an ellipsis."""
    page = (ROOT / "notebooks" / "index.md").read_text("utf-8")
    shown = page.partition(":class: demo\n")[2].partition("\n```")[0]
    pattern = re.escape(shown).replace("…", "[^\n]*")
    assert pattern.count("[^\n]*") < 30
    status, out, err = start_demo().end()
    assert status == 0, err
    first, _, rest = out.partition("\n")
    assert first.startswith("No gateway answers at")
    assert re.fullmatch(pattern, rest.strip())


def test_against_a_running_gateway_it_uses_that_one(
    start_demo: Callable[..., Demo], start_gateway: Start
) -> None:
    process = start_gateway("--short-code-digits", "8", "--mt-sender", "+15550009999")
    family = process.family()
    keys = ("--keys-dir", str(process.folder / "keys"))  # whose token opens the outbox
    demo = start_demo("--msisdn", "+447700900555", *keys, port=process.port)
    status, out, err = demo.end()
    assert status == 0, out + err
    claims = claims_in(out)
    assert claims["verifiedMSISDN"] == "+447700900555"
    assert claims["iss"] == f"127.0.0.1:{process.port}"
    assert "SMS to +447700900555" in process.output
    assert '"mtSender": "+15550009999"' in out  # it prints what the gateway said
    assert re.search("Your verification code is: [0-9]{8}\n", out)
    assert lab.Handset(process.client(), "+447700900555").messages() == []  # it unregistered
    assert process.family() == family
    assert demo.left() == []
    assert process.stop() == 0


def test_who_does_not_know_the_token_types_the_code(
    start_demo: Callable[..., Demo], start_gateway: Start
) -> None:
    """Beside a gateway of other keys the demo sees no outbox, and asks, as of a real message."""
    process = start_gateway()
    demo = start_demo(port=process.port, typed=True)
    shown = re.compile("SMS to .*: ([0-9]{6})\n")
    deadline = time.monotonic() + 20 * shared()
    while not (found := shown.search(process.output)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert found
    status, out, err = demo.end(found[1] + "\n")
    assert status == 0, out + err
    assert claims_in(out)["verifiedMSISDN"] == NUMBER
    assert not list(demo.cwd.iterdir())  # no keys were made to look


def test_another_program_on_the_port_is_left_alone(start_demo: Callable[..., Demo]) -> None:
    asked: list[str] = []

    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            """Answer as some web server would."""
            asked.append(self.command)
            self.send_response(200)
            self.send_header("Content-Length", "5")
            self.end_headers()
            self.wfile.write(b"<h1>!")

        def do_POST(self) -> None:
            """The demo has nothing to send here."""
            self.do_GET()

        def log_message(self, format: str, *args: Any) -> None:
            """Stay quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Other)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        status, out, err = start_demo(port=server.server_port).end()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert status == 0, out + err
    assert claims_in(out)["verifiedMSISDN"] == NUMBER
    assert set(asked) <= {"GET"}


@pytest.mark.parametrize("how", ["public_url", "file"])
def test_a_gateway_that_is_named_and_does_not_answer_is_no_reason_to_walk_another(
    how: str, start_demo: Callable[..., Demo], tmp_path: Path
) -> None:
    port, file = free_port(), tmp_path / "gateway.toml"
    file.write_text("workers = 1\n")
    url = f"http://127.0.0.1:{port}"
    named = {"public_url": ("--public-url", url), "file": ("--config", str(file))}[how]
    demo = start_demo(*named, port=port)
    status, out, err = demo.end()
    assert (status, out) == (1, "")
    assert f"no gateway answers at {url}" in err
    assert err.count("\n") == 1
    assert demo.left() == []


def test_with_a_real_provider_it_asks_for_the_code(
    start_demo: Callable[..., Demo], start_gateway: Start
) -> None:
    with SmsApi() as api:
        process = start_gateway(*api.option())
        demo = start_demo(port=process.port, typed=True)
        deadline = time.monotonic() + 20 * shared()
        while not api.received and time.monotonic() < deadline:
            time.sleep(0.01)
        status, out, err = demo.end(api.code() + "\n")
        assert status == 0, out + err
        assert claims_in(out)["verifiedMSISDN"] == NUMBER
        assert len(api.received) == 1


@pytest.mark.parametrize("typed", ["000000\n", ""])
def test_without_the_right_code_it_fails(
    typed: str, start_demo: Callable[..., Demo], start_gateway: Start
) -> None:
    """A wrong one, and nobody there to type (end of file)."""
    with SmsApi() as api:
        process = start_gateway(*api.option())
        demo = start_demo(port=process.port, typed=bool(typed))
        status, out, err = demo.end(typed)
        if api.code() == typed.strip():  # once in a million runs
            return
        assert status == 1, out + err
        assert "verifiedMSISDN" not in out
        assert "Traceback" not in err
        assert demo.left() == []


def test_when_the_gateway_cannot_send_it_fails(
    start_demo: Callable[..., Demo], start_gateway: Start
) -> None:
    with SmsApi(refused) as api:
        process = start_gateway(*api.option())
        status, out, err = start_demo(port=process.port).end()
        assert status == 1
        assert "503" in out
        assert "verifiedMSISDN" not in out
        assert "Traceback" not in err


@pytest.mark.parametrize(
    "options",
    [
        ("--msisdn", "12345"),  # no country code
        ("--msisdn", "+447700900123x"),
        ("--port", "0"),
        ("--no-such-option",),
    ],
)
def test_wrong_usage_is_exit_status_2(
    options: tuple[str, ...], start_demo: Callable[..., Demo]
) -> None:
    demo = start_demo(*options)
    status, out, err = demo.end()
    assert status == 2, out + err
    assert "Traceback" not in err
    assert err
    assert demo.left() == []


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_in_the_middle_it_leaves_no_gateway(
    how: signal.Signals, start_demo: Callable[..., Demo]
) -> None:
    """As in ``timeout 5 python gateway.py demo``, or Ctrl-C."""
    demo = start_demo()
    main = psutil.Process(demo.process.pid)
    deadline = time.monotonic() + 20 * shared()
    while not main.children() and time.monotonic() < deadline:
        time.sleep(0.01)
    children = main.children()
    assert children
    time.sleep(0.2)
    for process in (main, *children) if how is signal.SIGINT else (main,):
        process.send_signal(how)
    demo.end()
    assert demo.process.returncode != 0
    deadline = time.monotonic() + 5 * shared()
    while any("process" in told for told in demo.left()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not [told for told in demo.left() if "process" in told]
    if how is not signal.SIGKILL:
        assert demo.left() == []
