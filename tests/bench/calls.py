"""What one request calls: ``make trace`` follows a /sms/verify and a /sms/verify_code.

It counts the calls of functions of gateway.py, how deep they lie, and how often the section
changes from one call to the next. Comprehensions do not count as functions, and a generator (the
body of a ``with``) that goes on after its ``yield`` does not count as another call.
"""

from __future__ import annotations

import bisect
import inspect
import itertools
import re
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple
from wsgiref.validate import validator

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks"), str(ROOT / "tests")]

from support import NUMBER, WsgiClient  # noqa: E402

import gateway  # noqa: E402

FILE = gateway.__file__
LINES = Path(FILE).read_text("utf-8").splitlines()
STARTS = [n for n, line in enumerate(LINES, 1) if re.match(r"# \d+\. ", line) and n > 100]
"""The line that each section begins with."""


class Trace(NamedTuple):
    """What was called, in order: how deep, in which section, which function."""

    calls: list[tuple[int, int, str]]

    @property
    def deepest(self) -> int:
        """How many of our functions lay on each other at most."""
        return max(depth for depth, _, _ in self.calls)

    @property
    def changes(self) -> int:
        """How often one call was of another section than the one before it."""
        sections = [section for _, section, _ in self.calls]
        return sum(one != other for one, other in itertools.pairwise(sections))

    def __str__(self) -> str:
        functions = len({call[1:] for call in self.calls})
        return (
            f"{len(self.calls)} calls of {functions} functions, {self.deepest} deep, "
            f"{self.changes} changes of section"
        )


def trace(call: Any) -> Trace:
    """Follow one call."""
    calls: list[tuple[int, int, str]] = []
    generators: list[FrameType] = []
    depth = 0

    def profile(frame: FrameType, event: str, _: object) -> None:
        nonlocal depth
        code = frame.f_code
        if code.co_filename != FILE or re.fullmatch("<(listcomp|genexpr|.*comp)>", code.co_name):
            return
        if event == "call":
            depth += 1
            if frame in generators:
                return
            if code.co_flags & inspect.CO_GENERATOR:
                generators.append(frame)
            section = bisect.bisect(STARTS, code.co_firstlineno)
            calls.append((depth, section, code.co_qualname))
        elif event == "return":
            depth -= 1

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return Trace(calls)


def follow(folder: str) -> dict[str, Trace]:
    """A first /sms/verify and a /sms/verify_code with a key, over a store of their own."""
    settings = gateway.Settings(data_dir=f"{folder}/data", keys_dir=f"{folder}/keys")
    gateway.load_master_secret(settings)
    store = gateway.EmbeddedStore(settings.data_dir)
    try:
        client = WsgiClient(gateway.create_app(settings, store.url))
        assert client.gateway.sms.outbox
        client.gateway.sms.outbox.console = None
        key = gateway.public_key_json(gateway.generate_key("RS256").public_key())
        client.verified("+447700900999")  # connections are open, caches are filled
        client.call("/certificate/sign", {"publicKey": key})
        client.register()
        found = {"/sms/verify": trace(wsgi_only(client, "/sms/verify", {"msisdn": NUMBER}))}
        body = {"code": client.code(), "publicKey": key}
        found["/sms/verify_code"] = trace(wsgi_only(client, "/sms/verify_code", body))
        return found
    finally:
        store.stop()


def main() -> int:
    """Print both requests; with ``-v`` every call."""
    with tempfile.TemporaryDirectory(prefix="trace") as folder:
        for name, found in follow(folder).items():
            print(f"{name}: {found}")
            for depth, section, function in found.calls if "-v" in sys.argv else ():
                print(f"  {section:3} {'. ' * depth}{function}")
    return 0


def wsgi_only(client: WsgiClient, path: str, body: Any) -> Any:
    """A signed request, made by the client and ready for the application to take."""
    made: list[Any] = []

    def keep(environ: Any, start_response: Any) -> Any:
        made.append(environ)
        return client.app(dict(environ, PATH_INFO="/__lbheartbeat__"), start_response)

    app, client.wsgi = client.wsgi, validator(keep)
    client.call(path, body)
    client.wsgi = app
    return lambda: list(client.app(made[0], lambda *_: None))


if __name__ == "__main__":
    sys.exit(main())
