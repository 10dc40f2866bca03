"""The other side of the gateway: a client, a phone, and a place to run them.

Everything here is what somebody outside the gateway would write, with the documentation in
hand. The notebooks, the tests and ``python gateway.py demo`` all use it.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import inspect
import io
import json
import logging
import os
import random
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from html import escape
from http import HTTPStatus
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import jwt
import redis
import urllib3
from babel.support import NullTranslations
from cryptography.hazmat.primitives import serialization
from redis.crc import key_slot

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import gateway

TEST_KEYS = ROOT / "notebooks" / "test_keys"
"""Keys that everybody knows, so that the lessons repeat."""
NOW_S = 1_400_000_000.0
"""The time of every lesson (13 May 2014): a clock that stands still repeats its outputs."""


# -- A client -----------------------------------------------------------------


class Reply(NamedTuple):
    """An answer of the gateway: ``body`` is its JSON, or ``None`` if there is none."""

    status: int
    headers: urllib3.HTTPHeaderDict
    body: Any


class Client:
    """What runs on the user's device: opens a session, signs, calls, checks answers.

    Args:
        address: Where the gateway listens.
        public_url: What it is called, and so what is signed; by default ``address``.
        clock: Seconds since the epoch.
        nonce: Gives a fresh nonce for each request.
        observe: Called with each request and its reply, after the reply was checked.
        operator_token: Of that gateway: with it a ``Handset`` reads the outbox.
        seen_from: The client's own address, as a proxy in front of the gateway would name it.
    """

    def __init__(
        self,
        address: str,
        public_url: str = "",
        clock: gateway.Clock = time.time,
        nonce: Callable[[], str] = lambda: secrets.token_urlsafe(6),
        observe: Callable[[str, str, Any, Reply], None] = lambda *_: None,
        operator_token: str = "",
        seen_from: str = "",
    ) -> None:
        self.address, self.public_url = address, public_url or address
        self.seen_from = seen_from
        self.clock, self.nonce, self.observe = clock, nonce, observe
        self.operator_token = operator_token
        self.credentials: gateway.Credentials | None = None
        self.http: Any = urllib3.PoolManager(retries=False, timeout=30)

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        """Send one request, signed once there is a session; check what comes back.

        Raises:
            ValueError: The answer to a signed request was not signed by the gateway.
        """
        data = b"" if body is None else json.dumps(body).encode()
        kind = "application/json" if data else ""
        if data:
            headers["Content-Type"] = kind
        if self.seen_from:
            headers["X-Forwarded-For"] = self.seen_from
        target = gateway.hawk_target(method, self.public_url + path)
        default = 443 if self.public_url.startswith("https:") else 80
        host = f"[{target.host}]" if ":" in target.host else target.host
        headers["Host"] = host + (f":{target.port}" if target.port != default else "")
        sent = ""
        public = method == "GET" and not path.endswith("/session")
        public |= path.endswith(("/register", "/discover"))
        if self.credentials and not public and "Authorization" not in headers:
            ts, nonce = int(self.clock()), self.nonce()
            sent = gateway.build_authorization(self.credentials, target, ts, nonce, kind, data)
            headers["Authorization"] = sent
        answer = self.http.request(method, self.address + path, body=data, headers=headers)
        reply = Reply(answer.status, answer.headers, answer.json() if answer.data else None)
        if self.credentials and sent and reply.status < 500 and reply.status != 401:
            kind = answer.headers.get("Content-Type", "")
            seal = answer.headers.get("Server-Authorization", "")
            if not check_answer(self.credentials.hawk_key, sent, seal, target, kind, answer.data):
                raise ValueError("the answer does not come from the gateway")
        self.observe(method, path, body, reply)
        return reply

    def register(self, **body: Any) -> Reply:
        """Open a session; from now on every call is signed."""
        self.credentials = None
        reply = self.call("POST", "/register", body or None)
        if reply.status == 200:
            token = gateway.SessionToken(bytes.fromhex(reply.body["msisdnSessionToken"]))
            self.credentials = gateway.derive_credentials(token)
        return reply

    def verify(self, msisdn: str, **body: Any) -> Reply:
        """Ask for a PIN by SMS."""
        return self.call("POST", "/sms/verify", {"msisdn": msisdn, **body})

    def verify_code(self, code: str, **body: Any) -> Reply:
        """Return the code that the SMS brought."""
        return self.call("POST", "/sms/verify_code", {"code": code, **body})

    def sign(self, key: gateway.PrivateKey, **body: Any) -> Reply:
        """Ask for a certificate for the public half of ``key``."""
        public = gateway.public_key_json(key.public_key())
        return self.call("POST", "/certificate/sign", {"publicKey": public, **body})

    def unregister(self) -> Reply:
        """Have everything dropped."""
        return self.call("POST", "/unregister")


def check_answer(
    key: gateway.HawkKey,
    sent: str,
    seal: str,
    target: gateway.HawkRequest,
    content_type: str,
    body: bytes,
) -> bool:
    """Tell whether a Server-Authorization header, ``seal``, signs this answer to ``sent``."""
    if not seal:
        return False
    request = gateway.parse_hawk_header(sent)
    expected = gateway.server_authorization(key, request, target, content_type, body)
    return secrets.compare_digest(seal.encode("utf-8", "replace"), expected.encode())


# -- A phone ------------------------------------------------------------------


class Handset:
    """A phone with a number: reads what the gateway's outbox brought, and can text."""

    def __init__(self, client: Client, msisdn: str) -> None:
        self.client, self.msisdn = client, msisdn

    def messages(self) -> list[gateway.Json]:
        """Its messages, oldest first: ``from``, ``to``, ``text``, ``at``."""
        query = {"to": self.msisdn.lstrip("+"), "token": self.client.operator_token}
        answer = self.client.http.request("GET", self.client.address + "/outbox", fields=query)
        if answer.status != 200:
            raise LookupError("this gateway has no outbox that we may see")
        found: list[gateway.Json] = answer.json()
        return found

    def code(self) -> str:
        """The code in the newest message: the last word of its first line."""
        return str(self.messages()[-1]["text"].splitlines()[0].split()[-1])

    def text(self, message: str, **fields: str) -> Reply:
        """Send an SMS to the gateway; its provider delivers it in Vonage's shape."""
        params = {"msisdn": self.msisdn.lstrip("+"), "text": message, **fields}
        url = self.client.address + "/sms/momt/?provider=nexmo"
        answer = self.client.http.request_encode_body("POST", url, params, encode_multipart=False)
        return Reply(answer.status, answer.headers, answer.json())


# -- A place to run them ------------------------------------------------------


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    request_queue_size = 128


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """A log line would land in the output of whichever cell is running."""

    def get_environ(self) -> dict[str, Any]:
        environ = super().get_environ()
        if "Content-Type" not in self.headers:
            environ["CONTENT_TYPE"] = ""  # and not the text/plain that wsgiref makes up
        return environ


@contextlib.contextmanager
def serving(app: Callable[..., Any]) -> Iterator[str]:
    """Serve a WSGI application on a free loopback port; gives its address."""
    server = make_server("127.0.0.1", 0, app, _Server, _Quiet)
    # A daemon, so that a notebook's kernel can end while its gateway is open.
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def temporary_folder(prefix: str) -> Iterator[str]:
    """A folder that a store can lie in; it is removed at the end, also if we are killed.

    The path of a unix socket is short. So where ``TMPDIR`` lies too deep for the store's, the
    folder is made in ``/tmp``.
    """
    room = gateway.UNIX_PATH_MAX_BYTES - len("/12345678/data/store.sock") - len(prefix)
    usual = tempfile.gettempdir()
    above = usual if len(os.fsencode(usual)) <= room else "/tmp"
    folder = tempfile.mkdtemp(prefix=prefix, dir=above)
    # It reads until we close the pipe or die. A store that dies with us may write a last time.
    script = 'cat; until rm -rf "$1"; do sleep 0.1; done'
    guard = subprocess.Popen(
        ["/bin/sh", "-c", script, "sh", folder],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield folder
    finally:
        guard.communicate()
        shutil.rmtree(folder, ignore_errors=True)  # who signals all our children ends the guard too


class Closed:
    """Stands in for the connections of a client whose lesson is over."""

    def __getattr__(self, name: str) -> Any:
        """Say what to do, where "connection refused" would not."""
        raise RuntimeError(
            "This lesson's gateway is closed. In JupyterLab choose Kernel, Restart Kernel and "
            "Run up to Selected Cell: that opens a new one."
        )


class PaidProvider:
    """A provider whose messages cost money, in Vonage's shape: a server of this process.

    Attributes:
        messages: What it took: the number and the text of each, oldest first.
        status: What it answers next; "0" is taken.
        settings: Of a gateway that sends by it, behind a proxy that it trusts: this process.
    """

    def __init__(self) -> None:
        self.messages: list[tuple[str, str]] = []
        self.status, self._open = "0", contextlib.ExitStack()
        entry = {"kind": "nexmo", "api_key": "key", "api_secret": "secret"}
        entry["endpoint"] = self._open.enter_context(serving(self._answer))
        self.settings: gateway.Json = {
            "sms_providers": [entry], "trusted_proxies": ["127.0.0.1"], "mt_sender": "Gateway",
            "countries": ["*"],
        }  # fmt: skip

    def _answer(self, environ: Any, start_response: Any) -> list[bytes]:
        form = parse_qs(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])).decode())
        if self.status == "0":
            self.messages.append(("+" + form["to"][0], form["text"][0]))
        start_response("200 OK", [("Content-Type", "application/json")])
        return [json.dumps({"messages": [{"status": self.status, "message-id": "1"}]}).encode()]

    def code(self, msisdn: str) -> str:
        """The code in the newest message to a number: the last word of its first line."""
        texts = [text for number, text in self.messages if number == msisdn]
        return texts[-1].splitlines()[0].split()[-1]

    def close(self) -> None:
        """Stop its server."""
        self._open.close()


class Lab:
    """A real gateway in this process, with a real store, whose every output repeats.

    The clock stands still, and random bytes come from a seeded generator. That is right
    for a lesson and for nothing else: whoever knows the seed knows every code. A lesson leaves
    it open, for the exercises: it ends with the kernel.
    """

    def __init__(self, seed: int = 0, **settings: Any) -> None:
        self._open = contextlib.ExitStack()
        self._clients: list[Client] = []
        folder = self._open.enter_context(temporary_folder("lab"))
        given: gateway.Json = {"data_dir": f"{folder}/data", "keys_dir": f"{folder}/keys"}
        given |= {"public_url": "http://localhost:5000"} | settings
        self.settings = gateway.Settings(**given)
        for name in ("browserid.pem", "master.secret", "proof-0.pem"):
            known = (TEST_KEYS / name).read_bytes
            gateway.keep_private_file(Path(self.settings.keys_dir, name), known)
        client_pem = (TEST_KEYS / "client.pem").read_bytes()
        self.client_key: Any = serialization.load_pem_private_key(client_pem, None)
        self.random = random.Random(seed)
        self.now_s = NOW_S
        self.log = io.StringIO()
        handler = logging.StreamHandler(self.log)  # so that a log line shows where we print it
        handler.addFilter(lambda line: not str(line.msg).startswith("request "))  # has a duration
        gateway.LOG.addHandler(handler)
        self._open.callback(gateway.LOG.removeHandler, handler)
        self.store = gateway.EmbeddedStore(self.settings.data_dir, self.settings.store_max_bytes)
        self._open.callback(self.store.stop)
        self.app = gateway.create_app(
            self.settings, self.store.url, lambda: self.now_s, self.random.randbytes
        )
        self.gateway = self.app.gateway
        if self.gateway.sms.outbox:
            self.gateway.sms.outbox.console = None
        self.address = self._open.enter_context(serving(self.app))

    def client(self, **options: Any) -> Client:
        """A client of this gateway, with nonces that repeat like everything else."""
        options.setdefault("nonce", lambda: self.random.randbytes(6).hex())
        options.setdefault("operator_token", self.app.token)
        made = Client(self.address, self.settings.public_url, lambda: self.now_s, **options)
        self._clients.append(made)
        return made

    def redis(self) -> Any:
        """A connection of our own to the store, to look at what the gateway keeps there."""
        return self._open.enter_context(redis.Redis.from_url(self.store.url))

    def close(self) -> None:
        """Stop everything and leave nothing behind; its clients say so from then on."""
        for client in self._clients:
            client.http = Closed()
        self._open.close()


def present(proof: str, key: Any, audience: str, nonce: str, now_s: float) -> str:
    """What a client shows to a site: its SD-JWT, and a KB-JWT that it signs for this occasion.

    Args:
        key: The client's: an EC P-256, Ed25519 or RSA private key of ``cryptography``.
        audience: The site's origin.
        nonce: What the site gave.
    """
    digest = base64.urlsafe_b64encode(hashlib.sha256(proof.encode()).digest()).decode()
    note = {"aud": audience, "nonce": nonce, "iat": int(now_s), "sd_hash": digest.rstrip("=")}
    return proof + jwt.encode(note, key, _algorithm_of(key), {"typ": "kb+jwt"})


def public_jwk(key: Any) -> gateway.Json:
    """The public JWK of such a private key, as PyJWT writes it."""
    found = jwt.get_algorithm_by_name(_algorithm_of(key)).to_jwk(key.public_key(), as_dict=True)
    return dict(found)


def _algorithm_of(key: Any) -> str:
    kind = type(key).__name__
    return "EdDSA" if "Ed25519" in kind else "RS256" if "RSA" in kind else "ES256"


def claims(token: str) -> gateway.Json:
    """What a token says, unchecked: anybody can read the middle one of its three pieces."""
    piece = token.split(".")[1]
    found: gateway.Json = json.loads(base64.urlsafe_b64decode(piece + "=" * (-len(piece) % 4)))
    return found


# -- Showing things -----------------------------------------------------------


def short(value: Any, limit: int = 60) -> Any:
    """A value with its long tokens (not its sentences) cut in the middle, to look at."""
    if isinstance(value, dict):
        return {name: short(item, limit) for name, item in value.items()}
    if isinstance(value, list):
        return [short(item, limit) for item in value]
    if isinstance(value, str) and len(value) > limit and " " not in value:
        return f"{value[:12]}…{value[-8:]} ({len(value)} characters)"
    return value


def show(thing: Any, *headers: str) -> None:
    """Print a value as JSON; of a reply its status, the headers named, and its body."""
    if isinstance(thing, Reply):
        print(thing.status, HTTPStatus(thing.status).phrase)
        for name in headers:
            print(f"{name}: {thing.headers.get(name, '(absent)')}")
        thing = thing.body
    if thing is not None:
        print(json.dumps(short(thing), indent=2, ensure_ascii=False))


class Table:
    """Rows below a head: columns of text, and an HTML table where that can be shown."""

    def __init__(self, head: list[str], rows: list[list[str]]) -> None:
        self.head, self.rows = head, rows
        columns = list(zip(head, *rows, strict=True))
        self.widths = [max(map(len, column)) for column in columns]
        self.numeric = [all(map(_is_number, column[1:])) for column in columns]

    def __repr__(self) -> str:
        lines = [self.head, ["-" * width for width in self.widths], *self.rows]
        padded = (map(str.ljust, line, self.widths) for line in lines)
        return "\n".join("  ".join(line).rstrip() for line in padded)

    def _repr_html_(self) -> str:
        sides = ["right" if number else "left" for number in self.numeric]

        def line(tag: str, cells: list[str]) -> str:
            pairs = zip(sides, cells, strict=True)
            whole = (f'<{tag} style="text-align: {s}">{escape(c)}</{tag}>' for s, c in pairs)
            return f"<tr>{''.join(whole)}</tr>"

        body = "\n".join(line("td", row) for row in self.rows)
        return (
            f"<table>\n<thead>{line('th', self.head)}</thead>\n<tbody>\n{body}\n</tbody>\n</table>"
        )


def _is_number(cell: str) -> bool:
    return bool(re.fullmatch(r"[-+]?[\d.,]*\d( (%|s|ms|µs|bytes))?|-|", cell))


def table(head: str, *rows: Any) -> None:
    """Show rows below the words of ``head`` (``_`` in them is a space), in columns."""
    words = [word.replace("_", " ") for word in head.split()]
    shown = Table(words, [[str(cell) for cell in row] for row in rows])
    if "IPython" in sys.modules:
        from IPython.display import display

        display(shown)  # type: ignore[no-untyped-call]
    else:
        print(shown)


BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#777777"
"""Colours that stay apart for colour-blind eyes and in grey print (Okabe and Ito)."""
INK = "#010203"
"""Stands for the colour of text while a picture is drawn; no picture uses it otherwise."""
STYLE: dict[Any, Any] = {  # matplotlib names its keys one by one
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), INK),
    "font.size": 9.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "lab",
}


def figure(finding: str, x: str, y: str) -> Any:
    """Axes of a picture; its title is what it shows. End with ``draw``.

    Whatever style or backend the reader has set for matplotlib plays no part.
    """
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcdefaults()
    matplotlib.rcParams.update(STYLE)
    axes = Figure(figsize=(5.8, 2.8), layout="constrained").subplots()
    axes.set_title(finding, loc="left", fontsize=10)
    axes.set(xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def draw(axes: Any) -> None:
    """Show a picture as SVG: transparent, and its ink is the colour of the text around it."""
    from IPython.display import display

    svg, metadata = io.StringIO(), dict.fromkeys(("Creator", "Date", "Format", "Type"))
    axes.figure.savefig(svg, format="svg", transparent=True, metadata=metadata)
    text = svg.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text[text.index("<svg") :], flags=re.S)
    for family, css in (
        ("DejaVu Sans Mono", "ui-monospace, monospace"),
        ("DejaVu Sans", "system-ui, sans-serif"),
    ):
        text = re.sub(f"'{family}'[^;\"]*", css, text)
    text = text.replace("<text ", '<text xml:space="preserve" ')
    text = re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", text)
    units = ", ".join(filter(None, (axes.get_ylabel(), axes.get_xlabel())))
    says = f"{axes.get_title(loc='left')}. {units}".rstrip(". ")
    # Grey is legible on white and on black, where nobody says which colour the text has.
    start = f'<svg role="img" aria-label="{escape(says)}" color="#757575" '
    text = text.replace("<svg ", start, 1).replace(INK, "currentColor")
    picture = {"image/svg+xml": text, "text/plain": f"[{says}]"}
    display(picture, raw=True)  # type: ignore[no-untyped-call]


def source(thing: Any) -> None:
    """Print the source of a function or class of the gateway."""
    print(inspect.getsource(thing).rstrip())


# -- What a user costs --------------------------------------------------------


class MemoryUse(NamedTuple):
    """What users cost, in bytes of the store's ``used_memory``.

    Attributes:
        server: Kind and version.
        users: How many were there.
        registered, pending, verified: The mean of a user in each state.
        nonce: The mean of a Hawk nonce while it is remembered.
        resident: What the operating system gave the server for all of them.
        curve: Numbers of registered users, from 0, and what was used with them.
    """

    server: str
    users: int
    registered: float
    pending: float
    verified: float
    nonce: float
    resident: int
    curve: list[tuple[int, int]]

    @property
    def line(self) -> tuple[float, float]:
        """``a`` and ``b`` of ``usage = users × a + b`` for verified users.

        By least squares over the curve, and what being verified adds.
        """
        mean_x, mean_y = (sum(axis) / len(axis) for axis in zip(*self.curve, strict=True))
        spread = sum((x - mean_x) ** 2 for x, _ in self.curve)
        a = sum((x - mean_x) * (y - mean_y) for x, y in self.curve) / spread
        return a + self.verified - self.registered, mean_y - a * mean_x


def measure_memory(
    storage: gateway.Storage, settings: gateway.Settings, users: int, now_s: float,
    progress: Callable[[float], None] = lambda done: None,
) -> MemoryUse:  # fmt: skip
    """Load users as the gateway writes them, see what they cost, and remove them again.

    All register, then all wait for a code, then all are verified, then each uses a nonce.

    Args:
        progress: Called with the part that is done, from 0 to 1.

    Raises:
        gateway.StartError: The store is not empty.
    """
    if any(told["dbsize"] != "0" for told in storage.info()):
        raise gateway.StartError("memory measures in an empty store only, and this one has keys")
    load_store(storage, [_life_of(0, settings, 0)[4]])  # so that the script is compiled
    size = -(-users // 20)
    parts = [range(start, min(start + size, users)) for start in range(0, users, size)]
    used = [_settled_bytes(storage)]

    def each(*steps: int) -> None:
        for step in steps:
            for part in parts:
                load_store(storage, [_life_of(n, settings, int(now_s))[step] for n in part])
                used.append((_settled_bytes if part is parts[-1] else _used_bytes)(storage))
                progress((len(used) - 1) / (5 * len(parts)))

    try:
        each(0, 1, 2, 3)
        told = storage.info()
    finally:
        each(4)
    empty, registered, pending, verified, nonces, *_ = used[:: len(parts)]
    curve = [(0, empty), *zip((part.stop for part in parts), used[1:], strict=False)]
    return MemoryUse(
        gateway.server_name(told[0]), users, (registered - empty) / users,
        (pending - empty) / users, (verified - empty) / users, (nonces - verified) / users,
        sum(int(node["used_memory_rss"]) for node in told), curve,
    )  # fmt: skip


def load_store(storage: gateway.Storage, calls: list[tuple[bytes, gateway.Command]]) -> None:
    """Send many commands, each to the node that holds its key, and those of a node in one go."""
    nodes = storage._nodes or storage._discover()
    for node in set(nodes):
        mine = [command for key, command in calls if nodes[key_slot(key) % len(nodes)] == node]
        storage._run_all(b"", *mine, node=node)


def _settled_bytes(storage: gateway.Storage) -> int:
    # Tables grow, and shrink in a store that was emptied just now, in the background: while both
    # the old and the new one are there, a user seems to cost more.
    before, used, tries = -1, _used_bytes(storage), 20
    while abs(used - before) > 1000 and (tries := tries - 1):
        time.sleep(0.3)
        before, used = used, _used_bytes(storage)
    return used


def _used_bytes(storage: gateway.Storage) -> int:
    # What is kept for replicas grows up to a limit of its own, with writes and not with users.
    shared = "mem_total_replication_buffers"
    return sum(int(told["used_memory"]) - int(told.get(shared, 0)) for told in storage.info())


def _life_of(n: int, settings: gateway.Settings, now_s: int) -> list[tuple[bytes, gateway.Command]]:
    """What the store is told of the n-th user: registers, asks, verifies, calls again, goes."""
    one = hashlib.sha256(b"%d" % n).digest()
    key = gateway.StorageId(one[:16].replace(b"{", b"[").replace(b"}", b"]"))
    user = gateway.User(one, masked=True)
    asked = user._replace(
        sealed=one[8:], network=gateway.Network("234", "15"), sends=1, asked_s=now_s,
        code_digest=one[24:], code_expires_s=now_s + settings.code_ttl_s,
    )  # fmt: skip
    records = [user.pack(), asked.pack(), asked._replace(code_digest=b"", verified_s=now_s).pack()]
    keys = key, gateway.nonce_key(key, "nonce")

    def commit(old: int, new: int, ttl_s: int, nonce_ttl_s: int) -> tuple[bytes, gateway.Command]:
        record = (records[old], records[new], ttl_s, nonce_ttl_s)
        return key, ("EVAL", gateway.COMMIT_SCRIPT, 2, *keys, *record)

    return [
        (key, ("SET", key, records[0], "EX", settings.session_ttl_s)),
        commit(0, 1, -1, 0),
        commit(1, 2, settings.verified_ttl_s, 0),
        commit(2, 2, -1, 2 * settings.hawk_skew_s + 1),
        (key, ("DEL", *keys)),
    ]


def memory(settings: gateway.Settings, users: int) -> int:
    """``python gateway.py memory``: measure in an empty store, or in a new one, and print it."""
    if users < 1:
        raise gateway.SettingsError(f"--users is {users}; allowed: at least 1")

    def progress(done: float) -> None:
        bar = "#" * round(done * 40)
        print(f"\r[{bar:40}] {done:4.0%} of {users} users", end="", file=sys.stderr, flush=True)

    with contextlib.ExitStack() as stack:
        if not (url := settings.storage_url):
            folder = stack.enter_context(temporary_folder("memory"))
            store = gateway.EmbeddedStore(folder)
            stack.callback(store.stop)
            url = store.url
        storage = gateway.Storage(url)
        storage.check()
        used = measure_memory(storage, settings, users, time.time(), progress)
    print(file=sys.stderr)
    a, b = used.line
    print(f"{used.server}, {used.users} users in each state, bytes per user:")
    for state in ("registered", "pending", "verified"):
        print(f"  {state:11}{getattr(used, state):6.0f}")
    life_s = 2 * settings.hawk_skew_s + 1
    print(f"a Hawk nonce: {used.nonce:.0f} bytes, for {life_s} s")
    print(f"with 100 signed requests a second: {100 * life_s * used.nonce:,.0f} bytes of nonces")
    print(f"resident with all of them: {used.resident:,} bytes; plan 1.5 times what is used")
    print(f"\n  usage = users × {a:.0f} {b:+.0f}    (2015: users × 1216 +600000)\n")
    print("  verified users   2015, GB   used, GB   resident, GB")
    for n in (3.5e6, 10e6, 60e6):
        now = (n * a + b) / 1e9
        print(f"  {n:14,.0f} {(n * 1216 + 6e5) / 1e9:10.2f} {now:10.2f} {now * 1.5:14.2f}")
    return 0


# -- The message in every language --------------------------------------------


def catalogue_faults(folder: Path = ROOT / "locale", digits: int = 10) -> list[str]:
    """What is wrong with each catalogue that does not make one good SMS with such a code.

    The server trusts the catalogues that come with it: the tests and ``make update-l10n`` ask here.
    """
    code, faults = "8" * digits, []
    english = gateway.message_text(code, NullTranslations())
    for tag, catalogue in gateway.load_catalogues(folder).items():
        try:
            text = gateway.message_text(code, catalogue)
        except (KeyError, TypeError, ValueError):
            text = ""  # another placeholder, or a broken one
        size = gateway.measure(text)
        if text.count(code) != 1 or text.split()[-1:] != [code] or "\n" in text or "%" in text:
            faults.append(f"locale {tag}: %(code)s must be there once, as the last word")
        elif text == english and not tag.startswith("en"):
            faults.append(f"locale {tag}: the message is not translated")
        elif size.segments > 1:
            faults.append(f"locale {tag}: {size.units} units of {size.encoding}, over one SMS")
    return faults


# -- The demo -----------------------------------------------------------------


def demo(settings: gateway.Settings, msisdn: str) -> int:
    """Walk the registration flow, printing each message and what it means."""
    try:
        number = gateway.parse_msisdn(msisdn)
    except gateway.InvalidParameter as error:
        raise gateway.SettingsError(f"--msisdn {msisdn}: {error.message}") from None
    with contextlib.ExitStack() as stack:
        if not _is_gateway(Client(settings.base_url)):
            if settings.public_url or any(o.startswith("file ") for o in settings.origins.values()):
                raise gateway.StartError(
                    f"no gateway answers at {settings.base_url}, which the settings name: start it "
                    "(and trust its certificate), or leave --config and public_url out, and the "
                    "demo starts a gateway of its own"
                )
            print(f"No gateway answers at {settings.base_url}: starting one for this demo.")
            settings = stack.enter_context(_own_gateway())
        return _walk(settings, number)


def _walk(settings: gateway.Settings, msisdn: str) -> int:
    address, path = settings.base_url, Path(settings.keys_dir, "operator.token")
    token = path.read_text().strip() if path.exists() else ""  # else it is not ours to know
    home = Client(address).call("GET", "/").body
    client = Client(address, home["endpoint"], observe=_print_exchange, operator_token=token)
    phone = Handset(client, msisdn)
    print(f"A client, the phone {msisdn}, and the gateway at {address}.\n")

    _say("1. The client opens a session. Nothing is proved yet; this is the only request")
    _say("   that is not signed, and the only time that the token is sent.")
    registered = client.register(msisdn=msisdn, mcc="234", mnc="15")
    if registered.status != 200 or client.credentials is None:
        return 1
    _say("   From the token both sides derive a Hawk id (who) and a key (signs):")
    print(f"     id {client.credentials.hawk_id[:16]}…   key: never leaves either side\n")

    _say("2. Signed with that key, it asks for a PIN. The gateway sends an SMS.")
    if client.verify(msisdn, mcc="234", mnc="15").status != 200:
        return 1
    try:
        print(f"   SMS  {phone.messages()[-1]['text']}\n")
        code = phone.code()
    except LookupError:
        try:
            code = input("   This gateway sends real messages. The code in yours: ").strip()
        except EOFError:
            print("There is nobody to type the code.", file=sys.stderr)
            return 1

    _say("3. The person types the code; the client returns it with its public key, and")
    _say("   gets a certificate: this gateway's word that the key's holder has the number.")
    key = gateway.generate_key("RS256")
    public = gateway.public_key_json(key.public_key())
    verified = client.verify_code(code, publicKey=public)
    if verified.status != 200:
        return 1

    _say("4. For some relying party the client signs an assertion, and shows both. The")
    _say("   party needs one thing: the gateway's public key, from /.well-known/browserid.")
    support = Client(address, home["endpoint"], observe=_print_exchange)
    issuer_key = gateway.parse_public_key(
        support.call("GET", "/.well-known/browserid").body["public-key"]
    )
    now_ms, audience = int(time.time() * 1000), "https://shop.example"
    assertion = gateway.make_assertion(key, audience, now_ms + 60_000)
    claims = gateway.verify_backed_assertion(
        f"{verified.body['cert']}~{assertion}",
        audience,
        urlsplit(home["endpoint"]).netloc,
        issuer_key,
        now_ms,
    )
    print("   certificate and assertion verified; the certificate says:")
    del claims["public-key"]
    print(_indented(json.dumps(claims, indent=2)) + "\n")

    _say("5. The client has everything about it dropped.")
    client.unregister()
    print(f"Done: {claims['verifiedMSISDN']} is verified, by {claims['iss']}.")
    return 0 if claims["verifiedMSISDN"] == msisdn else 1


def _say(line: str) -> None:
    print(line)


def _indented(text: str) -> str:
    return "\n".join("     " + line for line in text.splitlines())


def _print_exchange(method: str, path: str, body: Any, reply: Reply) -> None:
    print(f"   →  {method} {path} {_one_line(body)}")
    print(f"   ←  {reply.status} {_one_line(reply.body)}\n")


def _one_line(body: Any) -> str:
    return json.dumps(short(body), ensure_ascii=False) if body else ""


def _is_gateway(client: Client) -> bool:
    try:
        return "endpoint" in (client.call("GET", "/").body or {})
    except (urllib3.exceptions.HTTPError, ValueError):
        return False


@contextlib.contextmanager
def _own_gateway() -> Iterator[gateway.Settings]:
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(temporary_folder("demo"))
        port = stack.enter_context(contextlib.closing(free_port()))
        url = f"http://127.0.0.1:{port.getsockname()[1]}"
        port.close()
        keys_dir = f"{folder}/keys"
        command = [sys.executable, str(ROOT / "gateway.py"), "--port", url.rpartition(":")[2]]
        command += ["--workers", "1", "--data-dir", f"{folder}/data", "--keys-dir", keys_dir]
        environ = {k: v for k, v in os.environ.items() if not k.startswith("GATEWAY_")}
        log = stack.enter_context(open(f"{folder}/log", "wb+"))  # not between the demo's lines
        server = gateway.start_bound(command, env=environ, stderr=log)
        stack.callback(server.wait)
        stack.callback(server.terminate)
        deadline = time.monotonic() + 20
        client = Client(url)  # one: what SIGTERM raises is lost within the finalizer of each
        while not _is_gateway(client):
            if server.poll() is not None or time.monotonic() > deadline:
                log.seek(0)
                print(log.read().decode("utf-8", "replace"), file=sys.stderr)
                raise RuntimeError("the demo's gateway does not start")
            time.sleep(0.05)
        yield gateway.Settings(public_url=url, keys_dir=keys_dir)


def free_port() -> socket.socket:
    """A socket bound to a free loopback port."""
    holder = socket.socket()
    holder.bind(("127.0.0.1", 0))
    return holder
