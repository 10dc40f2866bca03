"""The least that Bottle can do on the same server, and an SMS provider that takes everything.

``python tests/bench/bare.py PORT THREADS``: what the benchmark compares the gateway with.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import bottle
from granian import Granian
from granian.constants import HTTPModes, Interfaces

app = bottle.Bottle()


@app.get("/")  # type: ignore[untyped-decorator]
def home() -> dict[str, str]:
    """A small JSON object."""
    return {"name": "bare", "description": "A Bottle route and nothing else."}


@app.post("/sms/json")  # type: ignore[untyped-decorator]
def sms() -> dict[str, Any]:
    """What Vonage answers when it has taken a message."""
    bottle.request.body.read()
    return {"message-count": "1", "messages": [{"status": "0", "message-id": "0"}]}


def the_app() -> bottle.Bottle:
    """For Granian's workers, which are processes of their own."""
    return app


if __name__ == "__main__":
    Granian(
        "bare",
        address="127.0.0.1",
        port=int(sys.argv[1]),
        interface=Interfaces.WSGI,
        http=HTTPModes.http1,
        websockets=False,
        workers=1,
        blocking_threads=int(sys.argv[2]),
    ).serve(target_loader=partial(the_app), wrap_loader=False)
