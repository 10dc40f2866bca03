"""What people type, over HTTP: codes, numbers in old forms, kinds and countries, senders.

The names A01, B03 and so on are those of public bug reports that were tried on this gateway.
"""

from __future__ import annotations

import inspect
import json
import unicodedata
from collections.abc import Callable
from typing import Any

import jwt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from provider import Provider, nexmo
from support import NUMBER, GatewayProcess, WsgiClient

import gateway

MakeClient = Callable[..., WsgiClient]
QUICK = settings(
    max_examples=60, database=None, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
PREMIUM, JERSEY = "+449098790123", "+447797712345"


def in_script(code: str, zero: str) -> str:
    """A code with its decimal digits in another script."""
    return "".join(chr(ord(zero) + int(d)) if d.isdecimal() else d for d in code)


def give(client: WsgiClient, code: Any) -> int | None:
    """Return a code; the errno of the answer, if it was not right."""
    answer = client.call("/sms/verify_code", {"code": code})
    return None if answer.status == 200 else answer.errno


# -- Codes ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "typed",
    [
        lambda code: in_script(code, "٠"),  # B01
        lambda code: in_script(code, "۰"),
        lambda code: in_script(code, "０"),
        lambda code: f"{code[:3]} {code[3:]}",  # B03
        " ".join,
        lambda code: f"{code} ",  # B04
        lambda code: f" {code}",
        lambda code: f"{code}\n",
        lambda code: f"\t{code}\r\n",
        lambda code: f"{code[:3]}-{code[3:]}",
        lambda code: f"{code[:3]}\u2013{code[3:]}",
        lambda code: f"\u2068{code}\u2069",
        lambda code: f"{code}\ufe0f",
    ],
)
@pytest.mark.parametrize("short", [True, False])
def test_a_code_as_people_type_it(
    client: WsgiClient, short: bool, typed: Callable[[str], str]
) -> None:
    client.register()
    assert client.ask(shortVerificationCode=short).status == 200
    assert give(client, typed(client.code())) is None


def test_hex_has_no_case(client: WsgiClient) -> None:
    """B09."""
    client.register()
    assert client.ask(shortVerificationCode=False).status == 200
    assert give(client, client.code().upper()) is None


@QUICK
@given(code=st.text() | st.text("0123456789abcdef ", min_size=6, max_size=34) | st.integers())
@pytest.mark.parametrize("short", [True, False])
def test_whatever_is_no_code_of_this_kind_costs_no_try(
    app: gateway.GatewayApp, short: bool, code: Any
) -> None:
    """And whatever is one costs one, however it is written."""
    client = WsgiClient(app)
    client.register()
    assert client.ask(shortVerificationCode=short).status == 200
    right = client.code()
    folded = gateway.fold(code)
    is_code = len(folded) == len(right) and set(folded) <= set("0123456789abcdef")
    is_code &= not short or folded.isdigit()
    errors = [give(client, code) for _ in range(3)]
    if folded in ("", None) or code == "":
        assert set(errors) <= {107, 108}
    elif folded != right:
        assert errors == ([105] * 3 if is_code else [107] * 3)
    assert give(client, right) == (111 if is_code else None)


# -- One person is one principal ---------------------------------------------------


@pytest.mark.parametrize(
    ("old", "living"),
    [
        ("+5215555550123", "+525555550123"),  # A13
        ("+541155550123", "+5491155550123"),  # A15
        ("+22997001234", "+2290197001234"),  # A16
    ],
)
def test_both_forms_of_a_number_are_one_person(
    make_client: MakeClient, old: str, living: str
) -> None:
    """Typed, and as the sender of an SMS."""
    client = make_client(mo_verifier="+447700900555")
    client.register()
    assert client.ask(old).status == 200
    assert client.ask(living).status == 200  # no other number than this session's
    key = gateway.public_key_json(gateway.generate_key("RS128").public_key())
    answer = client.call("/sms/verify_code", {"code": client.code(living), "publicKey": key})
    assert answer.json["msisdn"] == living

    by_phone = client.another()
    by_phone.register()
    assert by_phone.credentials
    sms = f"msisdn={old[1:]}&text={by_phone.credentials.hawk_id}&messageId=1"
    assert by_phone.get(f"/sms/momt/?provider=nexmo&{sms}").status == 200
    body = {"code": by_phone.code(living), "publicKey": key}
    again = by_phone.call("/sms/verify_code", body)
    assert again.json["msisdn"] == living
    certs = answer.json["cert"], again.json["cert"]
    first, second = (jwt.decode(c, options={"verify_signature": False}) for c in certs)
    assert first["principal"] == second["principal"]


# -- Kinds and countries: refused before anything is spent --------------------------


@pytest.fixture
def paid(make_client: MakeClient) -> Any:
    """A client of a gateway that pays for messages, to Britain only; and its provider."""
    with Provider(nexmo("0")) as provider:
        client = make_client(
            sms_providers=[provider.nexmo()], countries=["GB"], mt_sender="Shop",
            sms_inbound=[{"kind": "nexmo", "path_secret": "s"}], mo_verifier="+447700900555",
        )  # fmt: skip
        yield client, provider


@pytest.mark.parametrize(
    ("number", "words"),
    [(PREMIUM, "premium"), ("+448001234567", "toll-free"), (JERSEY, "country"),
     ("+353861234567", "country"), ("+881612345678", "country")],
)  # fmt: skip
def test_a_number_that_cannot_get_sms_costs_nothing(paid: Any, number: str, words: str) -> None:
    client, provider = paid
    client.register()
    counted = client.gateway.storage._run("DBSIZE")
    mcc = {"mcc": "234"}
    for path, body in (
        ("/sms/verify", {}), ("/sms/mt/verify", mcc), ("/register", {}), ("/register", mcc),
        ("/discover", {}), ("/discover", mcc),
    ):  # fmt: skip
        answer = client.call(path, {**body, "msisdn": number})
        assert (answer.status, answer.errno) == (400, 107), path
        assert words in answer.json["message"]
        assert number not in answer.json["message"]
    sms = f"msisdn={number[1:]}&text={client.credentials.hawk_id}&messageId=1"
    assert client.get(f"/sms/momt/s?provider=nexmo&{sms}").status == 200
    assert provider.received == []
    nonces = 2
    assert client.gateway.storage._run("DBSIZE") == counted + nonces
    assert client.ask(NUMBER).status == 200  # the session is not bound to that number
    assert provider.received[0].form["from"] == "Shop"


def test_a_country_that_is_no_longer_served_gets_no_further_message(
    make_client: MakeClient,
) -> None:
    """The session was bound to its number before a restart with other settings."""
    client = make_client(countries=["GB", "JE"])
    client.register()
    assert client.ask(JERSEY).status == 200
    later = make_client(countries=["GB"])
    later.credentials = client.credentials
    answer = later.call("/sms/resend_code")
    assert (answer.errno, len(client.outbox(JERSEY))) == (107, 1)
    assert "country" in answer.json["message"]
    assert give(later, client.code(JERSEY)) is None  # what was sent is good


def test_the_session_is_told_first_that_nothing_was_asked_for(make_client: MakeClient) -> None:
    client = make_client(countries=["GB"])
    client.register()
    assert client.call("/sms/resend_code").errno == 111


# -- Settings -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "sender",
    ["Gateway", "A", "My Shop&Co.", "a-b_c", "B2", "123", "+15550001111", "1" * 15, "+447700900001",
     "MG" + "0a" * 16],
)  # fmt: skip
def test_a_sender_that_operators_take(sender: str) -> None:
    assert gateway.Settings(mt_sender=sender).mt_sender == sender
    assert gateway.Settings(mt_sender_map={"23415": sender}).mt_sender_map == {"23415": sender}


@pytest.mark.parametrize(
    "sender",
    ["My Company Name", "12", "", "  ", "Ünïcode", "Shop’s", "1" * 18, "Gateway\u200b",  # D04
     "+1 555 0100", "+", "+12", "- _", "A\n", "1" * 16, "MG" + "0" * 31, "MG" + "0A" * 16, "Ａ"],
)  # fmt: skip
def test_a_sender_that_no_operator_takes_is_refused_at_the_start(sender: str) -> None:
    with pytest.raises(gateway.SettingsError, match=r"mt_sender .*1 to 11 of"):
        gateway.Settings(mt_sender=sender)
    with pytest.raises(gateway.SettingsError, match=r"mt_sender_map .*1 to 11 of"):
        gateway.Settings(mt_sender_map={"234": sender})


@pytest.mark.parametrize("countries", [["*"], ["GB", "IE"], [], ["XK"], ["GB", "*"]])
def test_countries_are_regions(countries: list[str]) -> None:
    assert gateway.Settings(countries=countries).countries == countries


@pytest.mark.parametrize("countries", ["GB", ["UK"], ["gb"], ["GBR"], [44], ["ZZ"], ["001"], [""]])
def test_what_is_no_region_is_refused(countries: Any) -> None:
    with pytest.raises(gateway.SettingsError, match=r"countries .*ISO 3166"):
        gateway.Settings(countries=countries)


PAID = {"sms_providers": '[{"kind": "nexmo", "api_key": "k", "api_secret": "s"}]'}
NAMED = {"countries": '["GB"]', "mt_sender": "Shop"}


@pytest.mark.parametrize("left_out", NAMED)
def test_what_a_paid_provider_needs_is_named(left_out: str) -> None:
    loaded = gateway.load_settings(PAID | NAMED, {})
    assert (loaded.countries, loaded.mt_sender) == (["GB"], "Shop")
    without = {name: value for name, value in NAMED.items() if name != left_out}
    with pytest.raises(gateway.SettingsError, match=f"^{left_out} .*named"):
        gateway.load_settings(PAID | without, {})
    environ = {f"GATEWAY_{left_out.upper()}": NAMED[left_out]}
    assert gateway.load_settings(PAID | without, environ) == loaded


def test_what_is_named_may_be_the_default_but_not_empty() -> None:
    named = NAMED | {"mt_sender": "Gateway"}
    assert gateway.load_settings(PAID | named, {}).mt_sender == "Gateway"
    with pytest.raises(gateway.SettingsError, match=r"^countries .*named"):
        gateway.load_settings(PAID | named | {"countries": "[]"}, {})


def test_the_outbox_needs_no_names() -> None:
    assert gateway.load_settings({}, {}).countries == []


def test_the_start_refuses_a_paid_provider_without_countries(
    start_gateway: Callable[..., GatewayProcess],
) -> None:
    options = ["--sms-providers", PAID["sms_providers"], "--mt-sender", "Shop", "--countries", "[]"]
    process = start_gateway(*options, wait=False)
    assert process.process.wait(10) == 2
    assert "countries must be named" in process.output


# -- Segments -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("a" * 152 + "[" + "a" * 152, ("GSM-7", 306, 3)),  # D01: the pair is not split
        ("]" * 153, ("GSM-7", 306, 3)),
        ("a" * 153 + "[" + "a" * 151, ("GSM-7", 306, 2)),
        ("a" * 159 + "[", ("GSM-7", 161, 2)),  # D03
        ("[" * 80, ("GSM-7", 160, 1)),
        ("[" * 41 + "👍" + "[" * 43, ("UCS-2", 86, 2)),
        ("ш" * 66 + "👍" + "ш" * 66, ("UCS-2", 134, 3)),
        ("👍" * 67, ("UCS-2", 134, 3)),
        ("👍" * 35, ("UCS-2", 70, 1)),
        ("ш" * 67 + "👍" + "ш" * 65, ("UCS-2", 134, 2)),
        ("", ("GSM-7", 0, 1)),
        ("\ud83d", ("UCS-2", 1, 1)),
    ],
)
def test_segments_are_counted_as_phones_do(text: str, size: tuple[str, int, int]) -> None:
    assert gateway.measure(text) == size


@QUICK
@given(st.text("aé[€ш👍", max_size=700))
def test_segments_hold_whole_characters(text: str) -> None:
    """Cut as an encoder cuts: one more segment whenever the next character does not fit."""
    encoding, units, segments = gateway.measure(text)
    gsm = encoding == "GSM-7"
    sizes = [2 if char in ("[€" if gsm else "👍") else 1 for char in text]
    alone, part = (160, 153) if gsm else (70, 67)
    cut, room = 1, part
    for size in sizes:
        cut, room = (cut + 1, part - size) if size > room else (cut, room - size)
    assert units == sum(sizes)
    assert segments == (1 if units <= alone else cut)


# -- No input of these kinds ends in 5xx or in silence --------------------------------


junk = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False)
    | st.text() | st.from_regex(r"\+?[0-9 ()./\-]{0,30}") | st.sampled_from([NUMBER, PREMIUM]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=4,
)  # fmt: skip


@pytest.mark.slow
@QUICK
@given(msisdn=junk, mcc=junk, mnc=junk, language=st.text(max_size=50), origin=st.text(max_size=50))
def test_any_request_is_answered(
    app: gateway.GatewayApp, msisdn: Any, mcc: Any, mnc: Any, language: str, origin: str
) -> None:
    client = WsgiClient(app)
    client.register()
    printable = "".join(c for c in language + origin if unicodedata.category(c)[0] not in "CZ")
    header = printable.encode().decode("latin-1")
    environ = {"HTTP_ACCEPT_LANGUAGE": header, "HTTP_ORIGIN": header}
    body = {"msisdn": msisdn, "mcc": mcc, "mnc": mnc}
    for path in ("/sms/verify", "/discover", "/register"):
        answer = client.call(path, json.loads(json.dumps(body)), environ=environ)
        assert answer.status in (200, 400), path
        if answer.status == 400:
            assert answer.errno in (107, 108)
            assert answer.json["message"]


@pytest.mark.parametrize("name", sorted(name for name in vars(gateway) if name.endswith("Body")))
def test_a_body_is_made_by_names_and_stays_as_it_came(name: str) -> None:
    body = getattr(gateway, name)
    kinds = {field.kind for field in inspect.signature(body).parameters.values()}
    assert kinds == {inspect.Parameter.KEYWORD_ONLY}
    assert body.__struct_config__.frozen
