"""Requests that no honest client sends, as bytes, and what comes back over one connection.

Every request names itself in ``X-Request-Id``, which each answer repeats. So an answer tells which
request it belongs to, and an answer to ``SMUGGLED`` shows that a body was taken for a request.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

MARK: Final = "of-a-body"
"""The id of the request that lies in bodies."""
SMUGGLED: Final = f"GET /__version__ HTTP/1.1\r\nHost: x\r\nX-Request-Id: {MARK}\r\n\r\n".encode()
"""A whole request, to be sent as the body of another."""
LAST: Final = (
    b"GET /__lbheartbeat__ HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Request-Id: last\r\n\r\n"
)
"""A good request, which comes behind a hostile one on the same connection."""
DEEP: Final = 5000
"""How deeply a body is nested: 10 KB of brackets."""


class Answer(NamedTuple):
    """An answer: status, headers (lower-case names), body, and whether all of the body came."""

    status: int
    headers: dict[str, str]
    body: bytes
    whole: bool

    @property
    def id(self) -> str:
        """The id of the request that it answers; "" if the server in front answered."""
        return self.headers.get("x-request-id", "")


def answers(data: bytes, *methods: str) -> list[Answer]:
    """The answers in a stream, one behind the other; what is no answer fails.

    Args:
        methods: Of the first requests. An answer to HEAD has no body.
    """
    found: list[Answer] = []
    while data:
        head, there, data = data.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1."), head[:200]
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {n.lower(): v.strip() for n, _, v in (line.partition(":") for line in lines)}
        status = int(first.split()[1])
        empty = status in (204, 304) or status < 200 or methods[len(found) :][:1] == ("HEAD",)
        length = 0 if empty else int(headers.get("content-length", len(data)))
        found.append(Answer(status, headers, data[:length], bool(there) and len(data) >= length))
        data = data[length:]
    return found


def request(
    method: str, target: str, *headers: str, body: bytes = b"", name: str = "hostile"
) -> bytes:
    """A request; its Content-Length is written only if ``headers`` do so."""
    top = [f"{method} {target} HTTP/1.1", "Host: 127.0.0.1", f"X-Request-Id: {name}", *headers]
    return "\r\n".join([*top, "", ""]).encode("latin-1") + body


def post(*headers: str, body: bytes = SMUGGLED, path: str = "/register") -> bytes:
    """A POST of something that is to be JSON."""
    return request("POST", path, "Content-Type: application/json", *headers, body=body)


def framings() -> Iterator[tuple[str, bytes, set[int]]]:
    """Bodies whose end is in doubt, by name, with the statuses that their answer may have.

    Status 0 stands for a connection that is closed without an answer.
    """
    n = len(SMUGGLED)
    chunks = b"%x\r\n" % n + SMUGGLED + b"\r\n0\r\n\r\n"
    lengths = {
        "twice the same": (f"Content-Length: {n}",) * 2,
        "0 and more": ("Content-Length: 0", f"Content-Length: {n}"),
        "more and 0": (f"Content-Length: {n}", "Content-Length: 0"),
        "a list of the same": (f"Content-Length: {n}, {n}",),
        "a list": (f"Content-Length: {n}, 0",),
        "a sign": (f"Content-Length: +{n}",),
        "negative": (f"Content-Length: -{n}",),
        "hexadecimal": (f"Content-Length: 0x{n:x}",),
        "a fraction": (f"Content-Length: {n}.0",),
        "an exponent": ("Content-Length: 7e1",),
        "an underscore": ("Content-Length: 7_0",),
        "digits of another script": ("Content-Length: \u00b9\u00b2",),
        "a space in it": (f"Content-Length: {n} {n}",),
        "more than 64 bits": (f"Content-Length: {2**64 + n}",),
        "thousands of digits": ("Content-Length: " + "9" * 5000,),
        "no value": ("Content-Length:",),
        "a space before the colon": (f"Content-Length : {n}",),
        "a zero byte in the name": (f"Content-Length\0: {n}",),
        "a zero byte in the value": (f"Content-Length: {n}\0",),
        "a bare CR": (f"X: y\rContent-Length: {n}",),
        "folded": (f"X: y\r\n Content-Length: {n}", "Content-Length: x"),
    }
    for name, lines in lengths.items():
        yield f"length, {name}", post(*lines), {0, 400, 411, 413}
    for name, line in {
        "and a length": "chunked",
        "capitals": "CHUNKED",
        "a space": " chunked ",
        "a tab": "\tchunked",
        "twice": "chunked, chunked",
        "not last": "chunked, identity",
        "identity": "identity",
        "gzip": "gzip",
        "gzip first": "gzip, chunked",
        "unknown": "xchunked",
        "quoted": '"chunked"',
        "a parameter": "chunked;q=1",
        "no value": "",
    }.items():
        both = f"Transfer-Encoding: {line}", f"Content-Length: {n}"
        yield f"encoding {name}", post(*both), {0, 400, 411, 501}
        yield f"encoding {name}, later", post(*both[::-1]), {0, 400, 411, 501}
        yield f"encoding {name}, alone", post(both[0], body=chunks), {0, 400, 411, 501}
    for name, body in {
        "no number": b"zz\r\n" + SMUGGLED,
        "a sign": b"+%x\r\n" % n + SMUGGLED,
        "0x": b"0x%x\r\n" % n + SMUGGLED,
        "more than 64 bits": b"1%016x\r\n" % n + SMUGGLED,
        "no end": b"%x\r\n" % n + SMUGGLED,
        "too short": b"1\r\n" + SMUGGLED,
        "a bare LF": b"%x\n" % n + SMUGGLED + b"\n0\n\n",
        "an extension": b"%x;a=\r\n" % n + SMUGGLED + b"\r\n0\r\n\r\n",
        "a long extension": b"%x;" % n + b"a" * 50_000 + b"\r\n" + SMUGGLED + b"\r\n0\r\n\r\n",
        "trailers": b"0\r\nContent-Length: 5\r\nAuthorization: Hawk\r\n\r\n",
        "many trailers": b"0\r\n" + b"A: b\r\n" * 5000 + b"\r\n",
        "a thousand of one byte": b"1\r\n{\r\n" * 1000 + b"0\r\n\r\n",
    }.items():
        yield f"chunk, {name}", post("Transfer-Encoding: chunked", body=body), {0, 400, 411, 431}


def unread() -> Iterator[tuple[str, bytes, set[int]]]:
    """Whole requests with a body that nobody reads: what comes behind it must not be its rest."""
    for method, path, status in (
        ("GET", "/__version__", 200),
        ("OPTIONS", "/register", 204),
        ("DELETE", "/register", 405),
        ("POST", "/nowhere", 404),
        ("POST", "/sms/verify", 401),
        ("GET", "/session", 401),
        ("GET", "/sms/momt/?provider=nexmo", 200),
        ("PUT", "/", 405),
        ("TRACE", "/", 405),
    ):
        for times in 1, 200, 2000:
            body = SMUGGLED * times
            sent = request(method, path, f"Content-Length: {len(body)}", body=body)
            yield f"{method} {path}, {len(body)} bytes", sent, {status, 413}
        chunk = b"%x\r\n" % len(SMUGGLED) + SMUGGLED + b"\r\n0\r\n\r\n"
        sent = request(method, path, "Transfer-Encoding: chunked", body=chunk)
        yield f"{method} {path}, in chunks", sent, {status, 411}


def heads() -> Iterator[tuple[str, bytes, set[int]]]:
    """Request lines and headers that are odd, doubled, or not UTF-8."""
    lines: dict[str, tuple[str | bytes, set[int]]] = {
        "two hosts": ("Host: evil.example", {200, 400}),
        "an odd host": ("Host: a b/c@d:e:f", {200, 400}),
        "two authorizations": (b'Authorization: Basic YQ==\r\nAuthorization: Hawk', {200, 400}),
        "two content types": ("Content-Type: text/plain\r\nContent-Type: a/b", {200}),
        "two origins": ("Origin: https://a.example\r\nOrigin: null", {200}),
        "two ids": ("X-Request-Id: other", {200}),
        "two addresses": ("X-Forwarded-For: 1.2.3.4\r\nX-Forwarded-For: ::1", {200}),
        "an id that is not UTF-8": (b"X-Request-Id: \xff\xfe", {200, 400}),
        "a value that is not UTF-8": (b"Accept-Language: \xff\xfe\xed\xa0\x80", {200, 400}),
        "an origin that is not UTF-8": (b"Origin: https://\xe9.example", {200, 400}),
        "an authorization that is not UTF-8": (b"Authorization: Hawk id=\"\xff\"", {200, 400}),
        "a name that is not UTF-8": (b"X-\xff\xfe: 1", {400}),
        "an empty name": (": 1", {400}),
        "no colon": ("nothing", {400}),
        "a space in a name": ("X Y: 1", {400}),
        "a zero byte": ("X: a\0b", {400}),
        "an escape": ("X: a\x1bb", {400}),
        "a bare CR": ("X: a\rb", {400}),
        "a folded line": ("X: a\r\n b", {400}),
        "a name of 10,000 characters": ("X" * 10_000 + ": 1", {200, 400, 431}),
        "a value of 14,000 characters": ("X: " + "y" * 14_000, {200, 400}),
        "a value of 100,000 characters": ("X: " + "y" * 100_000, {0, 400, 414, 431}),
        "a hundred thousand languages": ("Accept-Language: " + "a-b;q=0.1," * 1000, {200, 400}),
        "80 headers": ("X: 1\r\n" * 79 + "X: 2", {200}),
        "2,000 headers": ("X: 1\r\n" * 1999 + "X: 2", {400, 431}),
        "an expectation of nothing": ("Expect: nothing", {200, 417}),
        "an upgrade": ("Connection: Upgrade\r\nUpgrade: h2c\r\nHTTP2-Settings: AA", {200}),
        "a web socket": ("Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13"
                         "\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", {200, 400, 426}),
        "an address of a proxy": ("Forwarded: for=\"[::1\"; host=evil; proto=\\", {200}),
        "another method": ("X-HTTP-Method-Override: DELETE", {200}),
        "a range": ("Range: bytes=0-0,-1,5-2", {200}),
        "an encoding": ("Accept-Encoding: gzip;q=9, *;q=0", {200}),
    }  # fmt: skip
    for name, (line, statuses) in lines.items():
        raw = line.encode("latin-1") if isinstance(line, str) else line
        top = b"GET /__version__ HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Request-Id: hostile\r\n"
        yield f"header, {name}", top + raw + b"\r\n\r\n", statuses
    whole = b"\r\nHost: 127.0.0.1\r\nX-Request-Id: hostile\r\n\r\n"
    for first, statuses in {
        b"GET http://127.0.0.1/__version__ HTTP/1.1": {200},
        b"GET http://evil.example/__version__ HTTP/1.1": {200, 400},
        b"GET ftp://evil.example/__version__ HTTP/1.1": {200, 400},
        b"GET //evil.example/__version__ HTTP/1.1": {404},
        b"GET evil.example:80 HTTP/1.1": {200, 400, 404},
        b"CONNECT evil.example:80 HTTP/1.1": {400, 404, 405},
        b"OPTIONS * HTTP/1.1": {200, 204, 400, 405},
        b"GET * HTTP/1.1": {400, 404},
        b"GET  /__version__ HTTP/1.1": {400},
        b"GET /__version__  HTTP/1.1": {400},
        b"GET /__version__ x HTTP/1.1": {400},
        b"GET /__version__\tHTTP/1.1": {400},
        b"GET /__version__#x HTTP/1.1": {200, 400},
        b"GET /__version__?%ff=\xff&a[=] HTTP/1.1": {200, 400},
        b"GET /__version__\0 HTTP/1.1": {400, 404},
        b"GET /__version__%00 HTTP/1.1": {400, 404},
        b"GET /__version__\xff HTTP/1.1": {400, 404},
        b"GET /%ed%a0%80 HTTP/1.1": {404},
        b"GET /%c0%ae%c0%ae/x HTTP/1.1": {400, 404},
        b"GET /a/../__version__ HTTP/1.1": {200, 404},
        b"GET /a%2f..%2f__version__ HTTP/1.1": {404, 200},
        b"GET /\\..\\x HTTP/1.1": {400, 404},
        b"GET /%zz%1 HTTP/1.1": {400, 404},
        b"GET /" + b"a" * 7_000 + b" HTTP/1.1": {404, 414},
        b"GET /" + b"/" * 7_000 + b" HTTP/1.1": {404, 414},
        b"GET /" + b"%41" * 5_000 + b" HTTP/1.1": {404, 414},
        b"GET /?" + b"&" * 7_000 + b" HTTP/1.1": {200, 414},
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1": {0, 400, 414, 431},
        b"GET /sms/momt/?provider=nexmo&text=caf\xe9 HTTP/1.1": {200, 400},
        b"GET /sms/momt/?provider=nexmo&text=%ff%fe&msisdn=%ed%a0%80 HTTP/1.1": {200, 400},
        b"GET /sms/momt/" + b"x" * 5_000 + b"?provider=nexmo HTTP/1.1": {200, 404, 405},
        b"get /__version__ HTTP/1.1": {200, 400, 404, 405},
        b"G\xc9T /__version__ HTTP/1.1": {400, 405},
        b"PRI * HTTP/2.0": {0, 400, 505},
        b"X" * 5_000 + b" / HTTP/1.1": {400, 404, 405, 414},
        b"GET /__version__ HTTP/1.2": {200, 400, 505},
        b"GET /__version__ HTTP/2.0": {400, 505},
        b"GET /__version__ http/1.1": {400},
        b"GET /__version__ HTTP/1.1 ": {400},
        b"GET /__version__ HTTP/01.1": {400},
        b"GET /__version__ HTTPS/1.1": {400},
        b"\r\n\r\nGET /__version__ HTTP/1.1": {200, 400},
        b"\xef\xbb\xbfGET /__version__ HTTP/1.1": {400},
    }.items():
        yield f"line, {first[:60]!r}", first + whole, statuses
    yield "no host", b"GET /__version__ HTTP/1.1\r\nX-Request-Id: hostile\r\n\r\n", {200, 400}
    yield "bare LF", b"GET /__version__ HTTP/1.1\nHost: x\nX-Request-Id: hostile\n\n", {200, 400}
    yield "HTTP/0.9", b"GET /__version__\r\n\r\n", {0, 400}
    for more in b"", b"Connection: keep-alive\r\n", b"Transfer-Encoding: chunked\r\n":
        old = b"GET /__version__ HTTP/1.0\r\nX-Request-Id: hostile\r\n" + more + b"\r\n"
        yield f"HTTP/1.0 {more!r}", old, {200, 400}


def bodies() -> Iterator[tuple[str, bytes]]:
    """Bodies that are no JSON, or JSON that nobody writes."""
    nested = b"[" * DEEP + b"]" * DEEP
    for name, value in {
        "nested lists": nested,
        "nested objects": b'{"a":' * (DEEP // 4) + b"1" + b"}" * (DEEP // 4),
        "NaN": b"NaN",
        "Infinity": b"-Infinity",
        "1e999": b"1e999",
        "-0.0": b"-0.0",
        "4,000 digits": b"9" * 4000,
        "5,000 digits": b"9" * 5000,
        "a long fraction": b"0." + b"1" * 5000,
        "a list": b"[]",
        "an object": b"{}",
        "true": b"true",
        "a lone surrogate": b'"\\ud800"',
        "a zero": b'"\\u0000"',
        "not UTF-8": b'"\xff\xfe"',
        "a surrogate in UTF-8": b'"\xed\xa0\x80"',
        "9,000 characters": b'"' + b"+" * 9000 + b'"',
        "digits of another script": '"+٤٤٧٧٠٠٩"'.encode(),
        "control characters": b'"a\tb"',
    }.items():
        yield f"each field {name}", value
    for name, body in {
        "a list": b"[1]",
        "a number": b"7",
        "NaN": b"NaN",
        "nothing but brackets": b"[" * 10_000,
        "nested, as it is": nested,
        "UTF-16": '{"a": 1}'.encode("utf-16"),
        "a BOM": b"\xef\xbb\xbf{}",
        "not UTF-8": b"\xff\xfe\xfd",
        "a name twice": b'{"msisdn": "+447700900123", "msisdn": "+447700900124"}',
        "two documents": b"{}{}",
        "a comment": b"{/**/}",
        "cut": b'{"msisdn": "+4477',
        "spaces": b" " * 10_000,
        "zeros": b"\0" * 5_000,
        "a thousand fields": b"{" + b",".join(b'"%d": 1' % n for n in range(900)) + b"}",
    }.items():
        yield f"all of it {name}", b"=" + body


def body_of(names: list[str], given: bytes, good: dict[str, Any]) -> bytes:
    """A body in which some fields have the value ``given``, and others a good one.

    What is behind ``=`` is the body itself.
    """
    if given[:1] == b"=":
        return given[1:]
    room = max(1, 9_500 // (len(given) + 20))
    fields = {name: json.dumps(value).encode() for name, value in good.items()}
    fields |= dict.fromkeys(names[:room], given)
    return b"{" + b", ".join(b'"%b": %b' % (n.encode(), v) for n, v in fields.items()) + b"}"
