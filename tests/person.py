"""Who is on a ``Machine`` beside the gateway, as programs: a provider, and a person with a phone.

person.py provider FILE                 a stand-in for Vonage on port 9000; texts go to FILE
person.py verify URL CA FILE NUMBER     verify a number; prints the session token
person.py sign URL CA TOKEN             ask for a certificate; prints the status
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks"), str(ROOT / "tests")]

import lab  # noqa: E402
import provider  # noqa: E402
import urllib3  # noqa: E402

import gateway  # noqa: E402


def provide(file: str) -> None:
    """Take every message, and write it down."""

    def answer(handler: Any) -> None:
        with Path(file).open("a") as texts:
            texts.write(json.dumps(handler.got.form) + "\n")
        provider.taken(handler)

    with provider.Provider(answer, 9000) as vonage:
        vonage.thread.join()


def client_of(url: str, certificate: str) -> lab.Client:
    """A client that trusts one certificate."""
    client = lab.Client(url)
    client.http = urllib3.PoolManager(ca_certs=certificate, retries=False, timeout=30)
    return client


def verify(url: str, certificate: str, file: str, number: str) -> str:
    """Verify a number; gives the session token."""
    client = client_of(url, certificate)
    token = str(client.register().body["msisdnSessionToken"])
    asked = client.verify(number)
    assert asked.status == 200, asked
    time.sleep(0.1)
    messages = map(json.loads, Path(file).read_text().splitlines())
    text = [message["text"] for message in messages if message.get("to") == number[1:]][-1]
    verified = client.verify_code(text.splitlines()[0].split()[-1])
    assert verified.status == 200, verified
    return token


def sign(url: str, certificate: str, token: str) -> int:
    """Ask for a certificate with a session of before; gives the status."""
    client = client_of(url, certificate)
    client.credentials = gateway.derive_credentials(gateway.SessionToken(bytes.fromhex(token)))
    return client.sign(gateway.generate_key("RS256")).status


if __name__ == "__main__":
    roles: dict[str, Callable[..., Any]] = {"provider": provide, "verify": verify, "sign": sign}
    print(roles[sys.argv[1]](*sys.argv[2:]))
