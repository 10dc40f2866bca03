"""The least that Bottle can do on the same server, and an SMS provider that takes everything.

``python tests/bench/bare.py PORT THREADS PROVIDER_URL``: what the benchmark compares the gateway
with. ``/sign`` and ``/post`` do one thing more than ``/``, and so tell what that costs in a server.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any
from urllib.parse import urlencode

import bottle
import urllib3
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from granian import Granian
from granian.constants import HTTPModes, Interfaces

SIGNING_KEY = rsa.generate_private_key(65537, 2048)
HTTP = urllib3.PoolManager(maxsize=64)
HEADERS = {"Content-Type": "application/x-www-form-urlencoded"}
FORM = urlencode({"api_key": "key", "api_secret": "secret", "from": "Gateway",
                  "to": "447700900123", "text": "0" * 32})  # fmt: skip


def sign() -> bytes:
    """One RS256 signature."""
    return SIGNING_KEY.sign(b"x" * 500, padding.PKCS1v15(), hashes.SHA256())


def post(url: str) -> Any:
    """One POST on a pooled connection; what is answered."""
    return HTTP.request("POST", url, body=FORM, headers=HEADERS, retries=False).json()


def the_app(provider_url: str) -> bottle.Bottle:
    """For Granian's workers, which are processes of their own, and run like the gateway's."""
    app, answer = bottle.Bottle(), {"name": "bare", "description": "A Bottle route, nothing else."}

    def sms() -> dict[str, Any]:
        """What Vonage answers when it has taken a message."""
        bottle.request.body.read()
        return {"message-count": "1", "messages": [{"status": "0", "message-id": "0"}]}

    app.get("/", callback=lambda: answer)
    app.get("/sign", callback=lambda: sign() and answer)
    app.get("/post", callback=lambda: post(provider_url) and answer)
    app.post("/sms/json", callback=sms)
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
    ).serve(target_loader=partial(the_app, sys.argv[3]), wrap_loader=False)
