"""A real Kannel for tests: bearerbox and smsbox on free loopback ports, and what is behind them."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote_from_bytes

import lab
import pytest
import redis
from support import GatewayProcess, free_port, poll

MISSING = "Kannel is not installed: apt-get install -y --no-install-recommends kannel kannel-extras"
SMPP = lab.ROOT / ".parts" / "smpp" / "node_modules" / "smpp"
MISSING_SMPP = "npm's smpp is not installed: npm install --prefix .parts/smpp smpp@0.5.1"
LOGIN = {"username": "gw", "password": "k4nnel-secret"}


def require(smpp: bool = False) -> None:
    """Skip the module that asks, if its parts are not here; from one place, so in one line."""
    boxes = [shutil.which(box, path="/usr/sbin:/usr/bin") for box in ("bearerbox", "smsbox")]
    missing = MISSING if not all(boxes) else MISSING_SMPP if smpp and not SMPP.exists() else ""
    if missing:
        pytest.skip(missing, allow_module_level=True)


def free_ports(n: int) -> list[int]:
    """Ports that nobody listens on."""
    return [free_port() for _ in range(n)]


def wait_for(what: Callable[[], object], timeout_s: float = 60) -> object:
    """Poll until ``what`` gives something."""
    found = poll(what, timeout_s)
    assert found, "waited in vain"
    return found


def listens(port: int) -> bool:
    """Whether somebody accepts connections on a port."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


class Kannel:
    """Kannel between the gateway and an SMSC.

    Args:
        folder: For its configuration, logs and store.
        gateway_url: Where it delivers what phones send.
        ports: sendsms, admin, smsbox; taken by the caller, who also configures the gateway.
        smsc: The lines of its SMSC.
    """

    def __init__(self, folder: Path, gateway_url: str, ports: list[int], smsc: list[str]) -> None:
        self.folder, (self.sendsms, admin, self.smsbox) = folder, ports
        momt = f"{gateway_url}/sms/momt/p4th?provider=kannel&from=%p&to=%P&text=%b&id=%I"
        momt += "&coding=%c&udh=%u"
        groups = [
            ["group = core", f"admin-port = {admin}", "admin-interface = 127.0.0.1",
             "admin-password = x", f"smsbox-port = {self.smsbox}", "smsbox-interface = 127.0.0.1",
             'box-allow-ip = "127.0.0.1"', "store-type = file",
             f'store-location = "{folder}/kannel.store"', "sms-resend-freq = 1",
             "sms-combine-concatenated-mo = false"],  # so that we put parts together
            ["group = smsbox", "bearerbox-host = 127.0.0.1", f"sendsms-port = {self.sendsms}",
             "sendsms-interface = 127.0.0.1"],
            ["group = sendsms-user", *(f"{k} = {v}" for k, v in LOGIN.items()),
             'user-allow-ip = "127.0.0.1"', "max-messages = 3", "concatenation = true"],
            ["group = sms-service", "keyword = default", "catch-all = true", "max-messages = 0",
             f'get-url = "{momt}"'],
            ["group = smsc", *smsc],
        ]  # fmt: skip
        self.conf = folder / "kannel.conf"
        self.conf.write_text("\n\n".join("\n".join(group) for group in groups) + "\n")
        self.boxes: list[subprocess.Popen[bytes]] = []
        for box, port in (("bearerbox", self.smsbox), ("smsbox", self.sendsms)):
            self._start(box)
            wait_for(lambda port=port: listens(port))  # type: ignore[misc]

    def _start(self, box: str) -> None:
        with (self.folder / f"{box}.log").open("ab") as log:
            command = [shutil.which(box, path="/usr/sbin:/usr/bin") or box, "-v", "1"]
            self.boxes.append(subprocess.Popen([*command, str(self.conf)], stdout=log, stderr=log))

    def log(self, box: str) -> str:
        """What a box has logged so far."""
        return (self.folder / f"{box}.log").read_text("latin-1")

    def close(self) -> None:
        """Stop both."""
        for box in reversed(self.boxes):
            box.terminate()
        for box in self.boxes:
            try:
                box.wait(10)
            except subprocess.TimeoutExpired:
                box.kill()
                box.wait()


class FakeHandset:
    """The phone at Kannel's fake SMSC: one line for each message, ``FROM TO KIND TEXT``."""

    def __init__(self, port: int) -> None:
        def connect() -> socket.socket | None:
            with contextlib.suppress(OSError):
                return socket.create_connection(("127.0.0.1", port), 5)
            return None

        found = wait_for(connect)
        assert isinstance(found, socket.socket)
        self.socket = found
        self.socket.settimeout(20)
        self.lines = self.socket.makefile("r", encoding="latin-1", newline="\n")

    def receive(self) -> list[str]:
        """The next message: from, to, kind, text."""
        return self.lines.readline().rstrip("\n").split(" ", 3)

    def text(self, sender: str, to: str, text: str) -> None:
        """Send a message from the phone."""
        self.socket.sendall(f"{sender} {to} text {text}\n".encode())

    def wide(self, sender: str, to: str, text: str, udh: bytes = b"") -> None:
        """Send a message in UCS-2 as its bytes, or with a header a part of one."""
        kind = f"udh {quote_from_bytes(udh)}" if udh else "data"
        octets = quote_from_bytes(text.encode("utf-16-be"), safe="")
        self.socket.sendall(f"{sender} {to} {kind} {octets}\n".encode())

    def close(self) -> None:
        """Hang up."""
        self.lines.close()
        self.socket.close()


class SmppSmsc:
    """The SMSC of ``smpp_sim.js``, as a process that can be killed and started again."""

    def __init__(self, folder: Path, port: int) -> None:
        self.log, self.port = folder / "smpp.log", port
        self.log.touch()
        self.start()

    def start(self) -> None:
        """Start it; gives up if it does not listen."""
        script = Path(__file__).with_name("smpp_sim.js")
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                ["node", str(script), str(self.port), str(lab.ROOT)], stdout=log
            )
        wait_for(lambda: listens(self.port))

    def received(self, to: str) -> list[str]:
        """The texts of the messages to a number."""
        lines = [line for line in self.log.read_text("utf-8").splitlines(True) if "\n" in line]
        messages = [json.loads(line) for line in lines]
        return [message["text"] for message in messages if message["to"].endswith(to[1:])]

    def kill(self) -> None:
        """``kill -9``: the link dies without a word."""
        self.process.kill()
        self.process.wait()


class Site:
    """A gateway process, and a Kannel in front of an SMSC.

    Args:
        smsc: The lines of Kannel's SMSC, beside its port.
        options: More for the gateway.
    """

    def __init__(self, folder: Path, smsc: list[str], *options: str) -> None:
        *ports, self.smsc_port = free_ports(4)
        self.entry: dict[str, Any] = {"kind": "kannel"}
        self.entry |= {"endpoint": f"http://127.0.0.1:{ports[0]}/cgi-bin/sendsms"}
        self.entry |= {**LOGIN, "receipts": True}
        inbound = [{"kind": "kannel", "path_secret": "p4th"}]
        self.gateway = GatewayProcess(
            folder, "--sms-providers", json.dumps([self.entry]), "--sms-inbound",
            json.dumps(inbound), "--mt-sender", "+447700900999", "--sends-per-hour", "1000",
            *options,
        )  # fmt: skip
        self.start_smsc(folder)
        lines = [*smsc, "smsc-id = TEST", f"port = {self.smsc_port}"]
        self.kannel = Kannel(folder, self.gateway.url, ports, lines)

    def start_smsc(self, folder: Path) -> None:
        """Start what Kannel will look for at once, if it is not Kannel's own."""

    def receipts(self) -> list[str]:
        """The outcomes of all messages, as the gateway counts them; within a second or so."""
        with redis.Redis(unix_socket_path=f"{self.gateway.folder}/data/store.sock") as store:
            counts: dict[bytes, bytes] = store.hgetall("{limits}metrics")
        found = [
            (name.decode().rpartition("outcome=")[2], int(n))
            for name, n in counts.items()
            if name.startswith(b"receipts_total ")
        ]
        return sorted(outcome for outcome, n in found for _ in range(n) if outcome)

    def close(self) -> None:
        """Stop both."""
        self.kannel.close()
        self.gateway.close()
