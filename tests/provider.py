"""Stand-ins of SMS providers on loopback ports, in the shapes of the real ones."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit


class Request(NamedTuple):
    """What a provider was sent: method, target, headers (lower-case names), body."""

    method: str
    target: str
    headers: dict[str, str]
    body: str

    @property
    def form(self) -> dict[str, str]:
        """The body as a form."""
        return dict(parse_qsl(self.body, keep_blank_values=True, strict_parsing=True))

    @property
    def query(self) -> dict[str, str]:
        """The query of the target."""
        return dict(parse_qsl(urlsplit(self.target).query, keep_blank_values=True))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        with self.server.provider.lock:  # type: ignore[attr-defined]
            self.server.provider.connections += 1  # type: ignore[attr-defined]

    def do_POST(self) -> None:
        provider: Provider = self.server.provider  # type: ignore[attr-defined]
        body = self.rfile.read(int(self.headers.get("Content-Length", "0"))).decode()
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.got = Request(self.command, self.path, headers, body)
        with provider.lock:
            provider.received.append(self.got)
            provider.open += 1
        with contextlib.suppress(OSError):  # the gateway has given up
            provider.answer(self)
        with provider.lock:
            provider.open -= 1

    do_GET = do_PUT = do_POST

    def log_message(self, format: str, *args: Any) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The gateway has hung up."""


class Provider:
    """A provider; ``answer`` may be changed while it runs, ``received`` is what it got.

    ``open`` is how many requests are being answered, ``connections`` how many were made in all.
    ``port`` is where it listens; 0: a free one.
    """

    def __init__(self, answer: Callable[[Any], None], port: int = 0) -> None:
        self.answer, self.lock = answer, threading.Lock()
        self.received: list[Request] = []
        self.open = self.connections = 0
        self.closing = threading.Event()
        self.server = _Server(("127.0.0.1", port), _Handler)
        self.server.provider = self  # type: ignore[attr-defined]
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.url = f"http://127.0.0.1:{self.server.server_port}/sms"

    def __enter__(self) -> Provider:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def texts(self) -> dict[str, list[str]]:
        """The texts that it was sent as nexmo, by number."""
        found: dict[str, list[str]] = {}
        with self.lock:
            for request in self.received:
                found.setdefault("+" + request.form["to"], []).append(request.form["text"])
        return found

    def nexmo(self, **more: Any) -> dict[str, Any]:
        """Its entry in ``sms_providers``, as Vonage."""
        login = {"api_key": "k", "api_secret": "hunter2"}
        return {"kind": "nexmo", "endpoint": self.url, **login, **more}


def reply(body: Any = "", status: int = 200) -> Callable[[Any], None]:
    """A whole answer: JSON of ``body``, or ``body`` itself if it is a text."""
    data = (body if isinstance(body, str) else json.dumps(body)).encode()

    def answer(handler: Any) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    return answer


def nexmo(*statuses: str) -> Callable[[Any], None]:
    """Vonage's answer: HTTP 200 whatever happened, a status for each part."""
    parts = [{"status": status, "message-id": f"0A{n}"} for n, status in enumerate(statuses)]
    return reply({"message-count": str(len(parts)), "messages": parts})


taken = nexmo("0")


def slower(retry_after_s: int) -> Callable[[Any], None]:
    """HTTP 429, with ``Retry-After``."""

    def answer(handler: Any) -> None:
        handler.send_response(429)
        handler.send_header("Retry-After", str(retry_after_s))
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def hang(handler: Any) -> None:
    """Say nothing until the test ends."""
    handler.server.provider.closing.wait(60)


def after(seconds: float) -> Callable[[Any], None]:
    """Take the message, but late."""

    def answer(handler: Any) -> None:
        handler.server.provider.closing.wait(seconds)
        taken(handler)

    return answer


def flood(head: bytes, more: bytes) -> Callable[[Any], None]:
    """Send ``head``, and then ``more`` without end."""

    def answer(handler: Any) -> None:
        handler.wfile.write(head)
        while not handler.server.provider.closing.is_set():
            handler.wfile.write(more * 10_000)

    return answer


def drip(data: bytes) -> Callable[[Any], None]:
    """Send these bytes one by one, then hang."""

    def answer(handler: Any) -> None:
        for n in range(len(data)):
            handler.wfile.write(data[n : n + 1])
            if handler.server.provider.closing.wait(0.05):
                return
        hang(handler)

    return answer
