"""Hawk: what is parsed, what is signed; the specification's vectors; mohawk as an oracle."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import mohawk
import mohawk.exc
import mohawk.util
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import shared

import gateway
from gateway import BadSignature, GatewayError, HawkHeader, HawkKey, HawkRequest, UnknownSession

QUICK = settings(max_examples=150, database=None, deadline=None, derandomize=True)
OURS = gateway.derive_credentials(gateway.SessionToken(bytes(range(0xA0, 0xC0))))
THEIRS = {"id": OURS.hawk_id, "key": OURS.hawk_key.hex(), "algorithm": "sha256"}
FIELDS = ("id", "ts", "nonce", "mac", "hash", "ext", "app", "dlg")


@pytest.fixture(autouse=True)
def quiet_oracle() -> Iterator[None]:
    """mohawk warns about each request that no nonce table is given for."""
    logger = logging.getLogger("mohawk")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)


# -- Parsing ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ('Hawk id="a"', {"id": "a"}),
        ('Hawk ts="1", nonce="n", mac="m"', {"ts": "1", "nonce": "n", "mac": "m"}),
        ('Hawk mac="m", id="a"', {"mac": "m", "id": "a"}),  # in any order
        ('hawk id="a"', {"id": "a"}),  # schemes have no case
        ('HAWK id="a"', {"id": "a"}),
        ('  Hawk   id="a"  ', {"id": "a"}),
        ('Hawk id="a",ts="1"', {"id": "a", "ts": "1"}),
        ('Hawk id="a" , ts="1"', {"id": "a", "ts": "1"}),
        ('Hawk id="a", ext=""', {"id": "a"}),
        ('Hawk ext="a, b=c; d"', {"ext": "a, b=c; d"}),  # a comma inside is no end
        ('Hawk ext="ts=1", id="a"', {"ext": "ts=1", "id": "a"}),
        ('Hawk ext=" !#$%&\'()*+-./:;<=>?@[]^_`{|}~"', {"ext": " !#$%&'()*+-./:;<=>?@[]^_`{|}~"}),
        ('Hawk app="p", dlg="d"', {"app": "p", "dlg": "d"}),
    ],
)  # fmt: skip
def test_good_header(header: str, expected: dict[str, str]) -> None:
    assert gateway.parse_hawk_header(header) == HawkHeader(**expected)


@pytest.mark.parametrize(
    "header",
    [None, "", " ", "Bearer abc", "Basic aGk6aGk=", 'Hawkid="a"', 'Hawks id="a"', 'id="a"', "Haw"],
)
def test_no_hawk_header(header: str | None) -> None:
    """401/110: this client does not speak Hawk at all."""
    with pytest.raises(UnknownSession):
        gateway.parse_hawk_header(header)


@pytest.mark.parametrize(
    "header",
    [
        "Hawk",
        "Hawk ",
        "Hawk ,",
        "Hawk id",
        "Hawk id=",
        "Hawk id=a",  # no quotes
        "Hawk id='a'",
        'Hawk id="a',
        'Hawk id=a"',
        'Hawk id="a""',
        'Hawk "a"',
        'Hawk ="a"',
        'Hawk id="a",',
        'Hawk ,id="a"',
        'Hawk id="a",,ts="1"',
        'Hawk id="a" ts="1"',  # no comma
        'Hawk id="a"ts="1"',
        'Hawk id="a"; ts="1"',
        'Hawk id="a", x',
        'Hawk x, id="a"',
        'Hawk id="a", garbage, ts="1"',  # between two good ones
        'Hawk xid="a"',
        'Hawk ID="a"',  # names have a case
        'Hawk id ="a"',
        'Hawk id= "a"',
        'Hawk tsm="x"',  # of an answer only
        'Hawk error="x"',
        'Hawk key="x"',
        'Hawk _fields="x"',
        'Hawk id="a\\"b"',
        'Hawk id="a\\b"',
        'Hawk id="a\tb"',
        'Hawk id="a\nb"',  # would be a line of its own in what is signed
        'Hawk ext="a\r\nb"',
        'Hawk id="a\0b"',
        'Hawk id="a\x7f"',
        'Hawk id="é"',
        'Hawk id="\u0660"',
        "Hawk Hawk",
        'Hawk Hawk id="a"',
        'Hawk id="a", Hawk ts="1"',
    ],
)
def test_malformed_header(header: str) -> None:
    """401/109."""
    with pytest.raises(BadSignature):
        gateway.parse_hawk_header(header)


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("second", ["a", "b", ""])
def test_field_that_is_there_twice(name: str, second: str) -> None:
    """Who takes the first and who takes the last would disagree about what was signed."""
    other = "ts" if name != "ts" else "id"
    for header in (
        f'Hawk {name}="a", {name}="{second}"',
        f'Hawk {name}="{second}", {name}="a"',
        f'Hawk {name}="a", {other}="1", {name}="{second}"',
    ):
        with pytest.raises(BadSignature):
            gateway.parse_hawk_header(header)


def test_too_long_header() -> None:
    assert gateway.parse_hawk_header(f'Hawk ext="{"x" * 4000}"').ext == "x" * 4000
    for length in (4097, 10_000, 1_000_000):
        with pytest.raises(BadSignature):
            gateway.parse_hawk_header(f'Hawk ext="{"x" * length}"')


@pytest.mark.parametrize(
    "inside",
    ["x" + " " * 4000 + "x", "id=" * 1300, 'id="' + " " * 4000, 'id="a",' * 500, 'id=""' * 900],
    ids=["spaces", "names", "open", "twice", "no comma"],
)
def test_hostile_header_is_cheap(inside: str) -> None:
    """Nobody needs a session to send one: it must not cost more than a good one."""
    before = time.thread_time()
    with pytest.raises(BadSignature):
        gateway.parse_hawk_header("Hawk " + inside)
    assert time.thread_time() - before < 0.02 * shared()


pieces = st.sampled_from(
    [*FIELDS, "tsm", "=", '"', ",", ", ", " ", "\t", "\\", 'id="a"', 'ts="1"', "Hawk ", "é", "\n"]
)


@pytest.mark.slow
@QUICK
@given(st.text() | st.lists(pieces).map(lambda found: "Hawk " + "".join(found)))
def test_any_text_is_a_header_or_refused(text: str) -> None:
    """A GatewayError, and nothing else; what is taken is safe to put into lines."""
    try:
        header = gateway.parse_hawk_header(text)
    except GatewayError as error:
        assert error.errno in (109, 110)
        return
    for value in header:
        assert value.isascii()
        assert value.isprintable()
        assert not set(value) & set('"\\')


values = st.text(alphabet=[chr(c) for c in range(32, 127) if chr(c) not in '"\\'], max_size=40)
spaces = st.sampled_from(["", " ", "  "])


@QUICK
@given(st.dictionaries(st.sampled_from(FIELDS), values, min_size=1), spaces, st.randoms())
def test_every_well_formed_header_is_read(fields: dict[str, str], gap: str, order: Any) -> None:
    parts = [f'{name}="{value}"' for name, value in fields.items()]
    order.shuffle(parts)
    header = gateway.parse_hawk_header("Hawk " + f"{gap},{gap}".join(parts))
    assert header == HawkHeader(**fields)


# -- Vectors of the specification ---------------------------------------------


class SpecKey(bytes):
    """The key of the specification's examples is a text and no hex digits; ours always are."""

    def hex(self, *args: Any) -> str:
        """The text that is the HMAC key."""
        return "werxhqb98rpaxn39848xrunpaw3489ruxnpa98w4rxn"


SPEC_KEY = HawkKey(SpecKey())
SPEC_HEADER = HawkHeader("dh37fgj492je", "1353832234", "j4h3g2", ext="some-app-ext-data")
SPEC_PATH = "/resource/1?b=1&a=2"


def test_request_of_the_specification() -> None:
    """Hawk 1.0, "Protocol Example"."""
    request = HawkRequest("GET", SPEC_PATH, "example.com", 8000)
    mac = gateway.hawk_mac("header", SPEC_KEY, SPEC_HEADER, request)
    assert mac == "6R4rV5iE+NPoym+WwjeHzjAGXUtLNIxmo1vpMofpLAE="


def test_payload_of_the_specification() -> None:
    """Hawk 1.0, "Payload Validation"."""
    hash = gateway.payload_hash("text/plain", b"Thank you for flying Hawk")
    assert hash == "Yi9LfIIFRtBEPt74PVmbTF/xVAwPn7ub15ePICfgnuY="
    request = HawkRequest("POST", SPEC_PATH, "example.com", 8000)
    mac = gateway.hawk_mac("header", SPEC_KEY, SPEC_HEADER._replace(hash=hash), request)
    assert mac == "aSe1DERmZuRl3pI36/9BdZmnErTw3sNzOOAUlfeKjVw="


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("text/plain", b"Thank you for flying Hawk\n"),
        ("text/plain", b"thank you for flying Hawk"),
        ("text/html", b"Thank you for flying Hawk"),
        ("", b"Thank you for flying Hawk"),
        ("text/plain\nThank", b"you for flying Hawk"),
        ("text/plain", b""),
    ],
)
def test_another_payload_has_another_hash(content_type: str, body: bytes) -> None:
    hash = gateway.payload_hash(content_type, body)
    assert hash != "Yi9LfIIFRtBEPt74PVmbTF/xVAwPn7ub15ePICfgnuY="


@pytest.mark.parametrize(
    "content_type",
    [
        "text/plain",
        "TEXT/Plain",
        " text/plain ",
        "text/plain; charset=utf-8",
        "text/plain;charset=utf-8; x=y",
        "text/plain ; charset=x",
    ],
)
def test_parameters_of_a_media_type_are_not_hashed(content_type: str) -> None:
    hash = gateway.payload_hash(content_type, b"Thank you for flying Hawk")
    assert hash == "Yi9LfIIFRtBEPt74PVmbTF/xVAwPn7ub15ePICfgnuY="


CHANGES: list[dict[str, Any]] = [
    {"method": "POST"},
    {"method": "get"},
    {"path": "/resource/1?b=1&a=3"},
    {"path": "/resource/1?a=2&b=1"},  # as it was sent, not sorted
    {"path": "/resource/1"},
    {"path": "/resource/1?b=1&a=2#"},
    {"path": "/Resource/1?b=1&a=2"},
    {"host": "example.net"},
    {"port": 80},
    {"ts": "1353832235"},
    {"nonce": "j4h3g3"},
    {"ext": ""},
    {"ext": "some-app-ext-dat"},
    {"hash": "x"},
    {"app": "a"},
]


@pytest.mark.parametrize("change", CHANGES)
def test_mac_covers_everything(change: dict[str, Any]) -> None:
    request = HawkRequest("GET", SPEC_PATH, "example.com", 8000)
    header = SPEC_HEADER
    if change.keys() <= set(HawkRequest._fields):
        request = request._replace(**change)
    else:
        header = header._replace(**change)
    mac = gateway.hawk_mac("header", SPEC_KEY, header, request)
    assert mac != "6R4rV5iE+NPoym+WwjeHzjAGXUtLNIxmo1vpMofpLAE="


def test_mac_is_for_one_purpose() -> None:
    """A client's own MAC sent back to it must not pass for the server's."""
    request = HawkRequest("GET", SPEC_PATH, "example.com", 8000)
    macs = {gateway.hawk_mac(k, SPEC_KEY, SPEC_HEADER, request) for k in ("header", "response")}
    assert len(macs) == 2
    assert gateway.time_mac(SPEC_KEY, 1353832234) not in macs


# -- Both directions against mohawk --------------------------------------------


class Sample(NamedTuple):
    """A request to sign."""

    method: str
    url: str
    content_type: str = ""
    body: bytes = b""
    ext: str = ""


JSON = "application/json"
SAMPLES = [
    Sample("GET", "http://127.0.0.1:5000/"),
    Sample("POST", "http://127.0.0.1:5000/register", JSON, b'{"mcc": "234"}'),
    Sample("POST", "http://id.example/v1/msisdn/sms/verify", JSON, b"{}"),  # port 80
    Sample("POST", "https://id.example/sms/verify", JSON, b"{}"),  # port 443
    Sample("POST", "https://id.example:443/sms/verify", JSON, b"{}"),
    Sample("POST", "http://id.example:443/sms/verify", JSON, b"{}"),
    Sample("POST", "https://ID.Example/sms/verify", JSON, b"{}"),  # hosts have no case
    Sample("post", "https://id.example/sms/verify", JSON, b"{}"),
    Sample("GET", "https://id.example/a?b=1&a=2&a=%20x%2F"),
    Sample("GET", "https://id.example/a%20b/%C3%A9?q=%C3%A9&empty="),
    Sample("GET", "https://id.example/a//b/../c?x=?y"),
    Sample("GET", "https://id.example/a?b=1#fragment"),  # never sent
    Sample("POST", "https://id.example/x", "application/json; charset=utf-8", b"{}"),
    Sample("POST", "https://id.example/x", "Application/JSON;charset=UTF-8", b"{}"),
    Sample("POST", "https://id.example/x", "text/plain", "é☎".encode()),
    Sample("POST", "https://id.example/x", "application/octet-stream", bytes(range(256))),
    Sample("POST", "https://id.example/x", JSON, b"x" * 10_240),
    Sample("POST", "https://id.example/x", JSON, b""),
    Sample("POST", "https://id.example/x", "", b"{}"),
    Sample("POST", "https://id.example/x", JSON, b"{}\n", "some-ext; a=b, c"),
    Sample("POST", "http://[::1]:5000/register", JSON, b"{}"),
]


def receive(header: str, sample: Sample, **changed: Any) -> mohawk.Receiver:
    """Let mohawk check a request; it raises if it does not believe it."""
    arguments: dict[str, Any] = {
        "url": sample.url,
        "method": sample.method,
        "content": sample.body,
        "content_type": sample.content_type,
    }
    return mohawk.Receiver(lambda _: dict(THEIRS), header, **{**arguments, **changed})


def send(sample: Sample, **more: Any) -> mohawk.Sender:
    """Let mohawk sign a request."""
    return mohawk.Sender(
        dict(THEIRS),
        sample.url,
        sample.method,
        content=sample.body,
        content_type=sample.content_type,
        ext=sample.ext or None,
        **more,
    )


def sign(sample: Sample) -> str:
    """Sign a request with our own client side."""
    target = gateway.hawk_target(sample.method, sample.url)
    now = int(time.time())
    return gateway.build_authorization(
        OURS, target, now, "n0nce", sample.content_type, sample.body, sample.ext
    )


@pytest.mark.parametrize("sample", SAMPLES)
def test_mohawk_believes_us(sample: Sample) -> None:
    found = receive(sign(sample), sample).parsed_header
    assert found["id"] == OURS.hawk_id
    assert found.get("ext", "") == sample.ext


@pytest.mark.parametrize(
    "changed",
    [
        {"method": "PUT"},
        {"url": "https://id.example/y"},
        {"url": "https://id.example/x?a=b"},
        {"url": "https://id.example:444/x"},
        {"url": "http://id.example/x"},
        {"url": "https://id2.example/x"},
        {"content": b"{} "},
        {"content": b""},
        {"content_type": "text/plain"},
    ],
)
def test_mohawk_does_not_believe_a_changed_request(changed: dict[str, Any]) -> None:
    sample = Sample("POST", "https://id.example/x", JSON, b"{}")
    with pytest.raises((mohawk.exc.MacMismatch, mohawk.exc.MisComputedContentHash)):
        receive(sign(sample), sample, **changed)


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("more", [{}, {"app": "an-app"}, {"app": "an-app", "dlg": "a-delegate"}])
def test_we_believe_mohawk(sample: Sample, more: dict[str, str]) -> None:
    header = gateway.parse_hawk_header(send(sample, **more).request_header)
    target = gateway.hawk_target(sample.method, sample.url)
    assert header.mac == gateway.hawk_mac("header", OURS.hawk_key, header, target)
    assert header.hash == gateway.payload_hash(sample.content_type, sample.body)
    assert (header.app, header.dlg) == (more.get("app", ""), more.get("dlg", ""))


@pytest.mark.parametrize("field", ["app", "dlg", "ext"])
def test_added_or_removed_field_is_not_believed(field: str) -> None:
    sample = Sample("POST", "https://id.example/x", JSON, b"{}", "an-ext")
    header = gateway.parse_hawk_header(send(sample, app="an-app", dlg="d").request_header)
    target = gateway.hawk_target(sample.method, sample.url)
    for value in ("", "x"):
        changed = header._replace(**{field: value})
        assert header.mac != gateway.hawk_mac("header", OURS.hawk_key, changed, target)


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("more", [{}, {"app": "an-app", "dlg": "a-delegate"}])
@pytest.mark.parametrize(
    ("content_type", "body"), [(JSON, b'{"mtSender": "Gateway"}'), ("", b""), (JSON, b"")]
)
def test_mohawk_believes_our_answer(
    sample: Sample, more: dict[str, str], content_type: str, body: bytes
) -> None:
    """Also to requests with ext, app and dlg; the answer's own ext is none."""
    sender = send(sample, **more)
    header = gateway.parse_hawk_header(sender.request_header)
    target = gateway.hawk_target(sample.method, sample.url)
    seal = gateway.server_authorization(OURS.hawk_key, header, target, content_type, body)
    sender.accept_response(seal, content=body, content_type=content_type)
    for wrong in ({"content": body + b" "}, {"content_type": "text/html"}):
        told = {"content": body, "content_type": content_type, **wrong}
        with pytest.raises(mohawk.exc.MisComputedContentHash):
            sender.accept_response(seal, **told)
    other = send(sample, **more)  # the same request again, with a nonce of its own
    with pytest.raises(mohawk.exc.MacMismatch):
        other.accept_response(seal, content=body, content_type=content_type)


@pytest.mark.parametrize("sample", SAMPLES)
def test_our_answer_is_mohawks(sample: Sample) -> None:
    """Field by field what another server would have answered."""
    sent = sign(sample)
    theirs = receive(sent, sample).respond(content=b"{}", content_type=JSON)
    target = gateway.hawk_target(sample.method, sample.url)
    request = gateway.parse_hawk_header(sent)
    ours = gateway.server_authorization(OURS.hawk_key, request, target, JSON, b"{}")
    assert gateway.parse_hawk_header(ours) == gateway.parse_hawk_header(theirs)


def test_answer_tells_hash_and_mac_only() -> None:
    """Not the id, the nonce or the time of the request."""
    request = gateway.parse_hawk_header(sign(SAMPLES[1]))
    target = gateway.hawk_target("POST", SAMPLES[1].url)
    seal = gateway.server_authorization(OURS.hawk_key, request, target, JSON, b"{}")
    found = gateway.parse_hawk_header(seal)
    assert {name for name, value in found._asdict().items() if value} == {"mac", "hash"}


@pytest.mark.parametrize("ts", [0, 1353832234, 1_900_000_000, 99_999_999_999])
def test_time_mac_is_mohawks(ts: int) -> None:
    """So that a client may trust our clock when its own is wrong."""
    expected = mohawk.util.calculate_ts_mac(ts, THEIRS).decode()
    assert gateway.time_mac(OURS.hawk_key, ts) == expected
    assert gateway.time_mac(OURS.hawk_key, ts + 1) != expected


@QUICK
@given(st.binary(max_size=200), st.text(alphabet=st.characters(max_codepoint=255), max_size=40))
def test_payload_hash_is_mohawks(body: bytes, content_type: str) -> None:
    expected = mohawk.util.calculate_payload_hash(body, "sha256", content_type).decode()
    assert gateway.payload_hash(content_type, body) == expected


@QUICK
@given(values, values, values, values)
def test_mac_is_mohawks(ext: str, app: str, dlg: str, nonce: str) -> None:
    sample = Sample("POST", "https://id.example/x?y=z", JSON, b"{}", ext)
    header = send(sample, app=app, dlg=dlg, nonce=nonce, _timestamp=1).request_header
    found = gateway.parse_hawk_header(header)
    target = gateway.hawk_target(sample.method, sample.url)
    assert found.mac == gateway.hawk_mac("header", OURS.hawk_key, found, target)


@pytest.mark.parametrize(
    ("method", "url", "expected"),
    [
        ("GET", "http://h", HawkRequest("GET", "/", "h", 80)),
        ("GET", "http://h?a", HawkRequest("GET", "/?a", "h", 80)),
        ("get", "https://H.Example/a?b#c", HawkRequest("GET", "/a?b", "h.example", 443)),
        ("GET", "https://h:80/", HawkRequest("GET", "/", "h", 80)),
        ("GET", "http://h:8080/%2f;p", HawkRequest("GET", "/%2f;p", "h", 8080)),
        ("GET", "http://u:p@h/", HawkRequest("GET", "/", "h", 80)),
    ],
)
def test_target(method: str, url: str, expected: HawkRequest) -> None:
    assert gateway.hawk_target(method, url) == expected


def test_header_has_no_empty_fields() -> None:
    """hash is always there, so that an empty body cannot be filled in on the way."""
    header = gateway.build_authorization(OURS, HawkRequest("GET", "/", "h", 80), 1, "n")
    assert '=""' not in header
    found = gateway.parse_hawk_header(header)
    assert found.hash == gateway.payload_hash("", b"")
    assert (found.id, found.ts, found.nonce) == (OURS.hawk_id, "1", "n")
    assert OURS.hawk_key.hex() not in header
