"""A real Kannel for tests: bearerbox and smsbox on free loopback ports, and what is behind them."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import lab

MISSING = (
    "Kannel is not installed: apt-get install -y --no-install-recommends kannel kannel-extras"
)
SMPP = lab.ROOT / ".parts" / "node_modules" / "smpp"
MISSING_SMPP = "npm's smpp is not installed: npm install --prefix .parts smpp@0.5.1"
LOGIN = {"username": "gw", "password": "k4nnel-secret"}


def installed() -> bool:
    """Whether both boxes are here."""
    return all(shutil.which(box, path="/usr/sbin:/usr/bin") for box in ("bearerbox", "smsbox"))


def free_ports(n: int) -> list[int]:
    """Ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(contextlib.closing(lab.free_port())) for _ in range(n)]
        return [int(holder.getsockname()[1]) for holder in held]


def wait_for(what: Callable[[], object], timeout_s: float = 20) -> object:
    """Poll until ``what`` gives something."""
    deadline = time.monotonic() + timeout_s
    while not (found := what()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
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
        groups = [
            ["group = core", f"admin-port = {admin}", "admin-interface = 127.0.0.1",
             "admin-password = x", f"smsbox-port = {self.smsbox}", "smsbox-interface = 127.0.0.1",
             'box-allow-ip = "127.0.0.1"', "store-type = file",
             f'store-location = "{folder}/kannel.store"', "sms-resend-freq = 1"],
            ["group = smsbox", "bearerbox-host = 127.0.0.1", f"sendsms-port = {self.sendsms}",
             "sendsms-interface = 127.0.0.1"],
            ["group = sendsms-user", *(f"{k} = {v}" for k, v in LOGIN.items()),
             'user-allow-ip = "127.0.0.1"', "max-messages = 3", "concatenation = true"],
            ["group = sms-service", "keyword = default", "catch-all = true", "max-messages = 0",
             f'get-url = "{gateway_url}/sms/momt/p4th?provider=kannel&from=%p&to=%P&text=%b&id=%I"'],
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
            self.boxes.append(
                subprocess.Popen([*command, str(self.conf)], stdout=log, stderr=log)
            )

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

    def close(self) -> None:
        """Hang up."""
        self.lines.close()
        self.socket.close()
