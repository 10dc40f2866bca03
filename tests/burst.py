"""Many requests at given times, each on a connection of its own; run as a process by itself.

It reads a JSON list of ``[seconds, request]`` from stdin, and prints a list of ``[status, seconds,
headers and body]`` in the same order. So the test, its provider and the gateway share no GIL with
the clients.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from typing import Any, NamedTuple

HOST = "127.0.0.1"


class Answer(NamedTuple):
    """An answer, and how long it took from the moment when it was asked for."""

    status: int
    took_s: float
    text: str

    @property
    def json(self) -> Any:
        """The body."""
        return json.loads(self.text.partition("\r\n\r\n")[2])

    @property
    def retry_after_s(self) -> int:
        """The header ``Retry-After``; 0 if there is none."""
        head = self.text.partition("\r\n\r\n")[0].lower()
        return int((head + "\r\n").partition("retry-after: ")[2].partition("\r\n")[0] or 0)


def run(port: int, requests: list[tuple[float, str]]) -> list[Answer]:
    """Send the requests from a process of its own; ``requests`` are times and whole texts."""
    told = subprocess.run(
        [sys.executable, __file__, str(port)],
        input=json.dumps(requests), capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    return [Answer(*answer) for answer in json.loads(told)]


async def _ask(port: int, start_s: float, at_s: float, request: str) -> tuple[int, float, str]:
    await asyncio.sleep(start_s + at_s - time.monotonic())
    begun_s = time.monotonic()
    reader, writer = await asyncio.open_connection(HOST, port)
    writer.write(request.encode())
    text = (await reader.read()).decode()
    writer.close()
    return int(text.split()[1]), time.monotonic() - begun_s, text


async def _main(port: int, requests: list[tuple[float, str]]) -> None:
    start_s = time.monotonic() + 0.2
    answers = await asyncio.gather(*(_ask(port, start_s, *request) for request in requests))
    print(json.dumps(answers))


if __name__ == "__main__":
    asyncio.run(_main(int(sys.argv[1]), json.load(sys.stdin)))
