"""Section 13: the protocol's rules, one by one, over HTTP and against a real store."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

import lab
import pytest
from support import AT_ONCE, NUMBER, WIDE, Answer, Clock, WsgiClient

import gateway

MakeClient = Callable[..., WsgiClient]
OTHER = "+447700900124"
KEY = gateway.public_key_json(gateway.generate_key("RS128").public_key())
NOW = 1_800_000_000


@pytest.fixture
def clock(client: WsgiClient, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the shared application."""
    clock = Clock()
    monkeypatch.setattr(client.gateway, "clock", clock)
    return clock


def record(client: WsgiClient) -> bytes | None:
    """What the store holds about the client's session."""
    assert client.credentials
    return client.gateway.storage.get(client.gateway.secrets.id_for(client.credentials.hawk_id))


def give(client: WsgiClient, code: str, **body: Any) -> Answer:
    """Return a code."""
    return client.call("/sms/verify_code", {"code": code, **body})


def wrong(code: str) -> str:
    """A code of the same length that is not this one."""
    return ("1" if code[0] != "1" else "2") + code[1:]


def same_each_time(value: Any) -> str:
    """The id of a parameter that holds a key or a time: xdist's workers must agree on it."""
    return re.sub(r"\d{9,}", "…", repr(value))[:40]


def claims(answer: Answer) -> Any:
    """What the certificate in an answer says (its signature is checked elsewhere)."""
    payload = answer.json["cert"].split(".")[1]
    return json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))


def life_s(answer: Answer) -> float:
    """Seconds from the signing of a certificate to its end."""
    found: float = (claims(answer)["exp"] - claims(answer)["lastAuthAt"]) / 1000
    return found


# -- /discover and /register --------------------------------------------------

MAPS: dict[str, Any] = {
    "mt_sender": "Gateway",
    "mt_sender_map": {"214": "+34600000001", "21407": "+34600000002", "235": "+447700900999"},
    "mo_verifier_map": {"214": "+34600000003", "21407": "+34600000004"},
}
SPAIN, SPAIN_07 = ("+34600000001", "+34600000003"), ("+34600000002", "+34600000004")


@pytest.fixture(scope="module")
def mapped(
    store: gateway.EmbeddedStore, keys_dir: str, tmp_path_factory: pytest.TempPathFactory
) -> WsgiClient:
    """A client of a gateway that has senders and MO numbers by network."""
    data_dir = str(tmp_path_factory.mktemp("mapped"))
    options = {**MAPS, "resend_gaps_s": AT_ONCE, **WIDE}
    settings = gateway.Settings(keys_dir=keys_dir, data_dir=data_dir, **options)
    client = WsgiClient(gateway.create_app(settings, store.url))
    assert client.gateway.sms.outbox
    client.gateway.sms.outbox.console = None
    return client


@pytest.mark.parametrize(
    ("body", "methods", "sender", "verifier"),
    [
        ({"mcc": "234"}, ["sms/mt"], "Gateway", None),
        ({"mcc": "234", "msisdn": NUMBER}, ["sms/mt"], "Gateway", None),
        ({"mcc": "214"}, ["sms/momt"], *SPAIN),  # sms/mt needs a number
        ({"mcc": "214", "msisdn": "+34612345678"}, ["sms/mt", "sms/momt"], *SPAIN),
        ({"mcc": "214", "msisdn": NUMBER}, ["sms/mt", "sms/momt"], *SPAIN),  # mcc counts
        ({"mcc": "214", "mnc": "07"}, ["sms/momt"], *SPAIN_07),
        ({"mcc": "214", "mnc": "007"}, ["sms/momt"], *SPAIN),  # another network than 07
        ({"mcc": "214", "mnc": "08"}, ["sms/momt"], *SPAIN),  # falls back to the country
        ({"mcc": "214", "mnc": "7"}, ["sms/momt"], *SPAIN),  # malformed: absent
        ({"mcc": "214", "mnc": "0777"}, ["sms/momt"], *SPAIN),
        ({"mcc": "214", "mnc": "07\n"}, ["sms/momt"], *SPAIN),
        ({"mcc": "214", "mnc": "０７"}, ["sms/momt"], *SPAIN),
        ({"mcc": "214", "mnc": 7}, ["sms/momt"], *SPAIN),
        ({"mcc": "214", "mnc": ["07"]}, ["sms/momt"], *SPAIN),
        ({"mcc": "214", "mnc": True}, ["sms/momt"], *SPAIN),
        ({"mcc": "214", "mnc": None}, ["sms/momt"], *SPAIN),
        ({"mcc": "214", "mnc": "07", "roaming": True}, ["sms/momt"], *SPAIN_07),
        ({"mcc": "214", "roaming": "yes", "more": {}}, ["sms/momt"], *SPAIN),
        ({"mcc": "235", "msisdn": NUMBER}, ["sms/mt"], "+447700900999", None),
        ({"mcc": "999", "mnc": "99"}, ["sms/mt"], "Gateway", None),
    ],
)
def test_how_a_number_can_be_verified(
    mapped: WsgiClient, body: dict[str, Any], methods: list[str], sender: str, verifier: str | None
) -> None:
    for prefix, path in (("", "/discover"), ("", "/register"), ("/v1/msisdn", "/register")):
        answer = mapped.call(prefix + path, body, signed=False)
        assert answer.status == 200
        assert answer.json["verificationMethods"] == methods
        wanted: dict[str, Any] = {}
        if "sms/mt" in methods:
            url = f"http://127.0.0.1:5000{prefix}/sms/mt/verify"
            wanted["sms/mt"] = {"mtSender": sender, "url": url}
        if verifier:
            wanted["sms/momt"] = {"mtSender": sender, "moVerifier": verifier}
        assert answer.json["verificationDetails"] == wanted


def test_a_default_mo_number_serves_every_network(make_client: MakeClient) -> None:
    found = make_client(mo_verifier="+447700900555").call("/discover", {"mcc": "722"}).json
    details = {"sms/momt": {"mtSender": "Gateway", "moVerifier": "+447700900555"}}
    assert found == {"verificationMethods": ["sms/momt"], "verificationDetails": details}


BAD_MCC = ["21", "2144", "21a", " 214", "214\n", "２１４", "-14", 99, 1000, 2.14, True, ["214"]]
BAD_MNC = ["7", "0777", "ab", " 07", "07\n", "０７", "-7", 7, True, ["07"], {"mnc": "07"}]
BAD_MSISDN = [
    "447700900123",  # no plus
    "07700900123",  # national
    "00447700900123",
    "+",
    "+44",
    "+4477009001234567890",  # longer than E.164
    "+3461234",  # too short for that country
    "+999123456789",  # no such country
    "+44770090012a",
    "+44 0x7700900123",
    "+447700900123;ext=5",
    "+447700900123 x5",
    "+447700900123\n+447700900124",
    447700900123,
    True,
    ["+447700900123"],
    {"msisdn": NUMBER},
]


@pytest.mark.parametrize("mcc", BAD_MCC, ids=repr)
def test_a_malformed_mcc_is_107_only_where_nothing_else_names_a_country(
    mapped: WsgiClient, mcc: Any
) -> None:
    answer = mapped.call("/discover", {"mcc": mcc}, signed=False)
    assert (answer.status, answer.errno) == (400, 107)
    assert "mcc" in answer.json["message"]
    assert mapped.call("/register", {"mcc": mcc}, signed=False).status == 200
    for path in ("/discover", "/register"):  # the number names Spain
        answer = mapped.call(path, {"mcc": mcc, "msisdn": "+34612345678"}, signed=False)
        assert answer.json["verificationDetails"]["sms/mt"]["mtSender"] == SPAIN[0]


@pytest.mark.parametrize("msisdn", BAD_MSISDN, ids=repr)
def test_what_is_no_possible_number_is_107_everywhere(session: WsgiClient, msisdn: Any) -> None:
    before = record(session)
    for path, body in (
        ("/discover", {"mcc": "234"}),
        ("/register", {"mcc": "234"}),
        ("/register", {}),
        ("/sms/verify", {}),
        ("/sms/mt/verify", {"mcc": "234"}),
    ):
        answer = session.call(path, {**body, "msisdn": msisdn})
        assert (answer.status, answer.errno) == (400, 107), path
        assert "msisdn" in answer.json["message"]
    assert record(session) == before


@pytest.mark.parametrize("body", [{}, {"mnc": "07"}, {"mcc": None}])
def test_discover_needs_an_mcc_or_a_number(client: WsgiClient, body: dict[str, Any]) -> None:
    answer = client.call("/discover", body)
    assert (answer.status, answer.errno) == (400, 108)
    assert "mcc" in answer.json["message"]
    assert client.call("/discover", {**body, "msisdn": NUMBER}).status == 200


def test_register_gives_a_fresh_token_of_32_bytes(client: WsgiClient) -> None:
    answers = [client.call("/register", body) for body in (None, {}, {"msisdn": NUMBER})]
    for answer in answers:
        assert answer.json.keys() == {"msisdnSessionToken", "verificationUrl"}
        assert re.fullmatch("[0-9a-f]{64}", answer.json["msisdnSessionToken"])
    assert len({answer.json["msisdnSessionToken"] for answer in answers}) == 3


def test_a_refused_register_opens_nothing(client: WsgiClient, storage: gateway.Storage) -> None:
    for body in ({"msisdn": "x"}, {"mcc": "234", "msisdn": "x"}, {"msisdn": "+979123456789"}):
        assert client.call("/register", body).errno == 107
    assert storage._run("DBSIZE") == 0


# -- Asking for a code --------------------------------------------------------


@pytest.mark.parametrize("path", ["/sms/verify", "/sms/mt/verify"])
@pytest.mark.parametrize(
    ("choice", "digits"),
    [
        ({}, {"/sms/verify": 6, "/sms/mt/verify": 32}),
        ({"shortVerificationCode": True}, {"/sms/verify": 6, "/sms/mt/verify": 6}),
        ({"shortVerificationCode": False}, {"/sms/verify": 32, "/sms/mt/verify": 32}),
        # anything but true and false is the default of the endpoint
        ({"shortVerificationCode": None}, {"/sms/verify": 6, "/sms/mt/verify": 32}),
        ({"shortVerificationCode": "true"}, {"/sms/verify": 6, "/sms/mt/verify": 32}),
        ({"shortVerificationCode": "false"}, {"/sms/verify": 6, "/sms/mt/verify": 32}),
        ({"shortVerificationCode": 1}, {"/sms/verify": 6, "/sms/mt/verify": 32}),
        ({"shortVerificationCode": 0}, {"/sms/verify": 6, "/sms/mt/verify": 32}),
        ({"shortVerificationCode": []}, {"/sms/verify": 6, "/sms/mt/verify": 32}),
        ({"shortVerificationCode": {}}, {"/sms/verify": 6, "/sms/mt/verify": 32}),
        ({"shortVerification": False}, {"/sms/verify": 6, "/sms/mt/verify": 32}),
    ],
)
def test_only_json_true_and_false_choose_the_kind_of_code(
    session: WsgiClient, path: str, choice: dict[str, Any], digits: dict[str, int]
) -> None:
    answer = session.call(path, {"msisdn": NUMBER, **choice})
    if path == "/sms/verify":
        assert (answer.status, answer.json["mtSender"]) == (200, "Gateway")
    else:
        assert (answer.status, answer.data) == (204, b"")
    (message,) = session.outbox()
    if digits[path] == 32:
        assert re.fullmatch("[0-9a-f]{32}", message["text"])
    else:
        assert re.fullmatch("Your verification code is: [0-9]{6}", message["text"])


@pytest.mark.parametrize(
    "language", ["", "en-GB,en;q=0.9", "tlh", "*", ";;q=,", "a" * 5000, "\x7f"]
)
def test_without_a_usable_language_the_sentence_is_english(
    session: WsgiClient, language: str
) -> None:
    environ = {"HTTP_ACCEPT_LANGUAGE": language}
    assert session.call("/sms/verify", {"msisdn": NUMBER}, environ=environ).status == 200
    text = session.outbox()[-1]["text"]
    assert re.fullmatch("Your verification code is: [0-9]{6}", text)


@pytest.mark.parametrize(
    "spelling",
    [
        "+447700900123",
        "+44 7700 900123",
        "+44-7700-900-123",
        "+44 (7700) 900123",
        "+44(7700)900-123",
        " +447700900123",
        "+44 77 00 90 01 23 ",
    ],
)
def test_spellings_of_one_number_are_one_number(session: WsgiClient, spelling: str) -> None:
    assert session.ask().status == 200
    assert session.ask(spelling).status == 200
    assert session.call("/discover", {"mcc": "234", "msisdn": spelling}).status == 200
    assert len(session.outbox()) == 2
    assert give(session, session.code()).json == {"msisdn": NUMBER}


@pytest.mark.parametrize(
    ("name", "value"), [("mcc", v) for v in BAD_MCC] + [("mnc", v) for v in BAD_MNC], ids=repr
)
def test_a_malformed_network_counts_as_absent(mapped: WsgiClient, name: str, value: Any) -> None:
    """FAULTS_A, G01 to G03: an app that passes on what iOS says could verify nobody."""
    session = mapped.another()
    session.register()
    body = {"msisdn": "+34612345678", "mcc": "214", name: value}
    assert session.call("/sms/verify", body).json["mtSender"] == SPAIN[0]
    assert session.call("/sms/mt/verify", body).status == 204


@pytest.mark.parametrize(
    ("number", "network", "sender"),
    [
        ("+34612345678", {}, "+34600000001"),  # the country from the number
        ("+34612345678", {"mcc": None, "mnc": ""}, "+34600000001"),
        ("+34612345678", {"mcc": "214"}, "+34600000001"),
        ("+34612345678", {"mcc": "214", "mnc": "07"}, "+34600000002"),
        ("+34612345678", {"mcc": "214", "mnc": "007"}, "+34600000001"),
        ("+34612345678", {"mcc": "222"}, "Gateway"),  # the network named wins
        ("+447400123456", {}, "+447700900999"),  # 235 is British too
        (NUMBER, {}, "+447700900999"),  # and so is +44 where libphonenumber knows no region
        (NUMBER, {"mcc": "214"}, "+34600000001"),  # roaming
        ("+15005550006", {}, "Gateway"),
    ],
)
def test_the_sender_is_that_of_the_network(
    mapped: WsgiClient, number: str, network: dict[str, Any], sender: str
) -> None:
    client = mapped.another()
    client.register()
    assert client.ask(number, **network).json["mtSender"] == sender
    assert client.outbox(number)[-1]["from"] == sender
    assert client.call("/sms/resend_code").json["mtSender"] == sender
    assert client.outbox(number)[-1]["from"] == sender


def test_a_session_verifies_one_number_before_and_after_success(session: WsgiClient) -> None:
    assert session.ask().status == 200
    code = session.code()
    for _ in range(2):
        before = record(session)
        for path in ("/sms/verify", "/sms/mt/verify"):
            answer = session.call(path, {"msisdn": OTHER})
            assert (answer.status, answer.errno) == (400, 107)
            assert "msisdn" in answer.json["message"]
        assert (record(session), session.outbox(OTHER)) == (before, [])
        if code:  # the code is still alive
            assert give(session, code).status == 200
            code = ""
    assert session.ask().status == 200  # but the same number may be verified again


def test_the_sixth_message_of_a_session_is_114(session: WsgiClient) -> None:
    for _ in range(2):
        assert session.ask().status == 200
        assert session.call("/sms/mt/verify", {"msisdn": NUMBER}).status == 204
    assert session.call("/sms/resend_code").status == 200
    code, before = session.code(), record(session)
    for path, body in (
        ("/sms/verify", {"msisdn": NUMBER}),
        ("/sms/mt/verify", {"msisdn": NUMBER}),
        ("/sms/resend_code", None),
    ):
        answer = session.call(path, body)
        assert (answer.status, answer.errno) == (429, 114)
    assert (record(session), len(session.outbox())) == (before, 5)
    assert give(session, code).status == 200  # and the fifth code is not dead


def test_codes_are_bound_to_their_session(session: WsgiClient) -> None:
    """Else a thief who reads one SMS uses it on a session of their own."""
    thief = session.another()
    thief.register()
    assert session.ask().status == 200
    code = session.code()
    assert thief.ask().status == 200
    assert give(thief, code).errno == 105
    assert give(session, code).status == 200


# -- Returning a code ---------------------------------------------------------


@pytest.mark.parametrize("short", [True, False])
def test_three_wrong_codes_and_the_code_is_dead(session: WsgiClient, short: bool) -> None:
    assert session.ask(shortVerificationCode=short).status == 200
    code = session.code()
    for _ in range(3):  # the third wrong one is still a wrong one
        answer = give(session, wrong(code))
        assert (answer.status, answer.errno) == (400, 105)
    for tried in (code, wrong(code), code):
        answer = give(session, tried)
        assert (answer.status, answer.errno) == (410, 111)
    assert session.call("/certificate/sign", {"publicKey": KEY}).errno == 104


@pytest.mark.parametrize("tries", [1, 2, 5])
def test_how_many_wrong_ones_is_a_setting(make_client: MakeClient, tries: int) -> None:
    client = make_client(code_tries=tries)
    client.register()
    client.ask()
    code = client.code()
    assert [give(client, wrong(code)).errno for _ in range(tries)] == [105] * tries
    assert give(client, code).errno == 111


def test_the_last_allowed_try_succeeds(session: WsgiClient) -> None:
    """An off-by-one that other servers have had: the right code refused on the last try."""
    assert session.ask().status == 200
    code = session.code()
    assert [give(session, wrong(code)).errno for _ in range(2)] == [105, 105]
    assert give(session, code).json == {"msisdn": NUMBER}


def test_a_code_works_once(session: WsgiClient) -> None:
    assert session.ask().status == 200
    code = session.code()
    assert give(session, code).status == 200
    for tried in (code, wrong(code)):
        answer = give(session, tried)
        assert (answer.status, answer.errno) == (410, 111)


def test_nothing_to_verify_is_111(session: WsgiClient) -> None:
    answer = give(session, "123456")
    assert (answer.status, answer.errno) == (410, 111)


@pytest.mark.parametrize(("age_s", "status"), [(0, 200), (599, 200), (600, 410), (10**6, 410)])
def test_a_code_lives_ten_minutes(
    client: WsgiClient, clock: Clock, age_s: int, status: int
) -> None:
    client.register()
    assert client.ask().status == 200
    clock.now_s += age_s
    answer = give(client, client.code())
    assert answer.status == status
    assert status == 200 or answer.errno == 111


def test_an_expired_code_counts_no_tries(client: WsgiClient, clock: Clock) -> None:
    client.register()
    client.ask()
    clock.now_s += 600
    before = record(client)
    assert give(client, wrong(client.code())).errno == 111
    assert record(client) == before


@pytest.mark.parametrize(
    "code",
    [
        "12345",
        "1234567",
        "1" * 31,
        "1" * 33,
        "abcdef",  # FAULTS_A, B07: as long as a PIN, and none that we could have sent
        "14619 ",
        "1 4619",
        "x" * 32,
        "²³¹⁴⁵⁶",
        "#146193",  # B08: one code, and no more
        "146193.",
        "146193+",
        "Your verification code is: 146193",
        "1" * 10_000,
        146193,
        146193.0,
        True,
        ["146193"],
        {"code": "146193"},
        ["1", "4", "6", "1", "9", "3"],  # a list of six: len() alone is no check
    ],
    ids=lambda code: repr(code)[:20],
)
def test_what_cannot_be_a_code_is_107_and_costs_no_try(session: WsgiClient, code: Any) -> None:
    assert session.ask().status == 200
    before = record(session)
    for _ in range(4):
        answer = session.call("/sms/verify_code", {"code": code})
        assert (answer.status, answer.errno) == (400, 107)
        assert "code" in answer.json["message"]
    assert record(session) == before
    assert give(session, session.code()).status == 200


BAD_DURATION = [
    0,
    -1,
    0.5,
    86400.0,
    True,
    False,
    "0",
    "00",
    "-1",
    "+1",
    "1.0",
    "1e3",
    " 60",
    "٦٠",
    [],
    {},
]
BAD_KEY = [
    "key",
    "{}",
    {},
    [],
    1,
    True,
    {"algorithm": "RS"},
    {**KEY, "n": int(KEY["n"])},
    {**KEY, "n": KEY["n"] + "0"},
    {**KEY, "e": "2"},
    {**KEY, "algorithm": "DS"},
    {**KEY, "algorithm": "ES"},
]


@pytest.mark.parametrize(
    ("name", "value"),
    [("publicKey", v) for v in BAD_KEY] + [("duration", v) for v in BAD_DURATION],
    ids=same_each_time,
)
def test_a_bad_key_or_duration_never_burns_a_code(
    session: WsgiClient, name: str, value: Any
) -> None:
    assert session.ask().status == 200
    code, before = session.code(), record(session)
    for tried in (code, wrong(code), code, wrong(code)):
        answer = give(session, tried, **{"publicKey": KEY, name: value})
        assert (answer.status, answer.errno) == (400, 107)
        assert name in answer.json["message"]
    assert record(session) == before
    assert give(session, code, publicKey=KEY).status == 200


def test_a_public_key_gives_a_certificate_in_the_same_step(
    client: WsgiClient, clock: Clock
) -> None:
    client.register()
    client.ask()
    clock.now_s += 30.5
    answer = give(client, client.code(), publicKey=json.dumps(KEY), duration="60")
    assert answer.json.keys() == {"msisdn", "cert"}
    found = claims(answer)
    now_ms = NOW * 1000 + 30_500
    assert found["public-key"] == KEY
    assert (found["iat"], found["exp"]) == (now_ms - 10_000, now_ms + 60_000)
    assert (found["lastVerifiedAt"] // 1000, found["lastAuthAt"]) == (NOW + 30, now_ms)
    assert (found["verifiedMSISDN"], found["iss"]) == (NUMBER, "127.0.0.1:5000")
    assert re.fullmatch(r"[0-9a-f-]{36}@127\.0\.0\.1:5000", found["principal"]["email"])


def test_a_wrong_code_gives_no_certificate(session: WsgiClient) -> None:
    session.ask()
    answer = give(session, wrong(session.code()), publicKey=KEY)
    assert answer.errno == 105
    assert "cert" not in answer.json


def test_a_session_lives_longer_once_it_is_verified(make_client: MakeClient) -> None:
    for ttl_s, wanted in ((1000, range(990, 1001)), (0, range(-1, 0))):
        clock = Clock()
        client = make_client(session_ttl_s=500, verified_ttl_s=ttl_s, clock=clock)
        client.register()
        assert client.credentials
        key = client.gateway.secrets.id_for(client.credentials.hawk_id)
        run = client.gateway.storage._run
        client.ask()
        give(client, wrong(client.code()))
        assert run("TTL", key) in range(490, 501)  # asking and guessing prolong nothing
        assert give(client, client.code()).status == 200
        assert run("TTL", key) in wanted
        run("EXPIRE", key, 100)
        clock.now_s += 10
        client.ask()
        give(client, wrong(client.code()))
        client.call("/certificate/sign", {"publicKey": KEY})
        assert 0 < run("TTL", key) <= 100  # its life counts from its last verification
        assert give(client, client.code()).status == 200
        assert run("TTL", key) in wanted


# -- Asking again -------------------------------------------------------------


def test_resend_kills_the_old_code_and_counts_its_tries_on(session: WsgiClient) -> None:
    """Else every new code gives three more guesses."""
    session.ask()
    old = session.code()
    assert [give(session, wrong(old)).errno for _ in range(2)] == [105, 105]
    assert session.call("/sms/resend_code").json["mtSender"] == "Gateway"
    new = session.code()
    assert new != old
    assert give(session, old).errno == 105  # dead
    assert give(session, wrong(new)).errno == 105  # the third wrong one
    for code in (new, old):
        assert give(session, code).errno == 111


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("now_long", [False, True])
def test_the_code_before_the_newest_is_told_so_and_costs_no_try(
    session: WsgiClient, long: bool, now_long: bool
) -> None:
    """Two messages cross: whoever typed the first one's has made no mistake. Of any kind."""
    session.ask(shortVerificationCode=not long)
    old = session.code()
    session.call("/sms/resend_code", {"shortVerificationCode": not now_long})
    new, before = session.code(), record(session)
    for _ in range(5):
        answer = give(session, old)
        assert (answer.status, answer.errno) == (400, 105)
        assert "a newer code was sent" in answer.json["message"]
    assert record(session) == before
    answer = give(session, wrong(new))
    assert answer.errno == 105
    assert "newer" not in answer.json["message"]
    assert give(session, new).status == 200
    assert give(session, old).errno == 111  # and after success it is nothing any more


@pytest.mark.parametrize("how", ["two sent since", "the old one was dead", "the new one died"])
def test_only_the_code_just_before_a_living_one_is_told_apart(
    client: WsgiClient, clock: Clock, how: str
) -> None:
    client.register()
    client.ask()
    old = client.code()
    if how == "the old one was dead":
        clock.now_s += 600
    client.call("/sms/resend_code")
    if how == "two sent since":
        client.call("/sms/resend_code")
    if how == "the new one died":
        clock.now_s += 600
    answer = give(client, old)
    assert answer.errno == (111 if how == "the new one died" else 105)
    assert "newer" not in answer.json["message"]
    if how != "the new one died":  # it was a try like any other
        assert [give(client, wrong(client.code())).errno for _ in range(3)] == [105, 105, 111]


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("other", ["1" * 6, "1" * 32, "0" * 6, "f" * 32])
def test_a_code_of_the_kind_that_does_not_wait_is_107_and_costs_no_try(
    session: WsgiClient, long: bool, other: str
) -> None:
    """It cannot be this one: whoever returns it has taken something else for the code."""
    session.ask(shortVerificationCode=not long)
    code, before = session.code(), record(session)
    waits = (len(other) == 32) == long
    answers = [give(session, other) for _ in range(3)]
    if waits:
        assert [answer.errno for answer in answers] == [105] * 3
        assert give(session, code).errno == 111
        return
    for answer in answers:
        assert (answer.status, answer.errno) == (400, 107)
        assert ("hex" in answer.json["message"]) == long  # what does wait
    assert record(session) == before
    assert give(session, code).status == 200


# -- What is refused first ----------------------------------------------------

LONG, SHORT = "f" * 32, "000000"
STATES = ("registered", "asked", "dead", "verified", "limited")
"""Nothing asked; a PIN waits; it was used up; verified, nothing waits; may not ask any more."""


def in_state(client: WsgiClient, state: str) -> WsgiClient:
    """Bring a new session into one of the ``STATES``."""
    client.register()
    if state != "registered":
        assert client.ask().status == 200
    if state == "dead":
        assert [give(client, wrong(client.code())).errno for _ in range(3)] == [105] * 3
    if state in ("verified", "limited"):
        assert give(client, client.code()).status == 200
    if state == "limited":
        assert client.ask().status == 200
    return client


@pytest.mark.parametrize(
    ("path", "body", "errnos"),
    [
        # a row: what a session in each of the states is told; 0 = nothing is wrong
        ("/sms/verify", {}, [108] * 5),
        ("/sms/verify", {"mcc": "x"}, [108] * 5),
        ("/sms/verify", {"msisdn": "x"}, [107] * 5),
        ("/sms/verify", {"msisdn": OTHER}, [0, 107, 107, 107, 107]),
        ("/sms/verify", {"msisdn": NUMBER}, [0, 0, 0, 0, 114]),
        ("/sms/mt/verify", {"msisdn": OTHER}, [0, 107, 107, 107, 107]),
        ("/sms/resend_code", None, [111, 0, 0, 0, 114]),
        ("/sms/verify_code", {}, [108] * 5),
        ("/sms/verify_code", {"publicKey": "bad"}, [108] * 5),
        ("/sms/verify_code", {"code": 5}, [107] * 5),
        ("/sms/verify_code", {"code": "12345", "publicKey": "bad"}, [107] * 5),
        ("/sms/verify_code", {"code": SHORT}, [111, 105, 111, 111, 105]),
        ("/sms/verify_code", {"code": LONG}, [111, 107, 111, 111, 107]),
        ("/sms/verify_code", {"code": SHORT, "publicKey": "bad"}, [111, 107, 111, 111, 107]),
        ("/sms/verify_code", {"code": SHORT, "duration": 0}, [111, 107, 111, 111, 107]),
        ("/sms/verify_code", {"code": LONG, "publicKey": "bad"}, [111, 107, 111, 111, 107]),
        ("/certificate/sign", {}, [108] * 5),
        ("/certificate/sign", {"duration": 0}, [108] * 5),
        ("/certificate/sign", {"publicKey": "bad"}, [104, 104, 104, 107, 107]),
        ("/certificate/sign", {"publicKey": KEY, "duration": 0}, [104, 104, 104, 107, 107]),
        ("/certificate/sign", {"publicKey": KEY}, [104, 104, 104, 0, 0]),
    ],
)
def test_the_order_of_refusals(
    make_client: MakeClient, path: str, body: Any, errnos: list[int]
) -> None:
    """What is missing; what can be nothing; the session's state; keys and kinds; limits."""
    client = make_client(sends_per_session=2)
    for state, errno in zip(STATES, errnos, strict=True):
        one = in_state(client.another(), state)
        before = record(one)
        answer = one.call(path, body)
        if errno:
            assert answer.errno == errno, state
        else:
            assert answer.status in (200, 204), state
        assert errno in (0, 105) or record(one) == before, state


def test_what_is_no_number_is_refused_before_limits_and_keys_after_the_state(
    make_client: MakeClient,
) -> None:
    """All wrong at once: each time what is wrong is put right, the next is told."""
    client = make_client(sends_per_session=1)
    client.register()
    told = []
    bodies: list[Any] = [
        {"publicKey": "bad", "duration": 0},
        {"code": 1, "publicKey": "bad", "duration": 0},
        {"code": LONG, "publicKey": "bad", "duration": 0},
    ]
    told += [client.call("/sms/verify_code", body).errno for body in bodies]
    assert told == [108, 107, 111]
    assert client.ask().status == 200
    for body in (bodies[2], {**bodies[2], "publicKey": KEY}, {"code": LONG}):
        assert client.call("/sms/verify_code", body).errno == 107
    assert give(client, client.code(), publicKey=KEY).status == 200
    assert [client.ask(text).errno for text in ("", "x", OTHER, NUMBER)] == [108, 107, 107, 114]


@pytest.mark.parametrize("long", [False, True])
def test_a_code_while_the_first_message_is_being_sent(
    client: WsgiClient, monkeypatch: pytest.MonkeyPatch, long: bool
) -> None:
    """It is not judged: 503 with a wait of one second, and it costs no try."""
    client.register()
    sms, seen = client.gateway.sms, list[Any]()
    real = sms.send

    def send(*args: Any) -> gateway.Sent:
        sent = real(*args)
        for code in (client.code(), wrong(client.code()), SHORT, LONG):
            for more in ({}, {"publicKey": "bad"}):
                answer = give(client, code, **more)
                seen.append((answer.status, answer.errno, answer.json["retryAfter"]))
        seen.append(client.call("/sms/verify_code", {"code": "1"}).errno)
        seen.append(client.call("/certificate/sign", {"publicKey": KEY}).errno)
        return sent

    monkeypatch.setattr(sms, "send", send)
    assert client.ask(shortVerificationCode=not long).status == 200
    assert seen == [(503, 201, 1)] * 8 + [107, 104]
    assert give(client, client.code()).status == 200


def test_a_reservation_begins_when_it_is_written(
    client: WsgiClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not when the store was first asked: it may be slow, and a reservation is valid for 15 s."""
    client.register()
    app, begun_s, late_s, asked = client.gateway, int(time.time()), [0], list[int]()
    real_get, real_send = app.storage.get, app.sms.send

    def get(key: gateway.StorageId) -> bytes | None:
        found = real_get(key)
        late_s[0] += 5 * key.startswith(b"blocked ")
        return found

    def send(*args: Any) -> gateway.Sent:
        assert client.credentials
        record = real_get(app.secrets.id_for(client.credentials.hawk_id))
        assert record
        asked.append(gateway.User.unpack(record).asked_s)
        return real_send(*args)

    monkeypatch.setattr(app, "clock", lambda: begun_s + late_s[0])
    monkeypatch.setattr(app.storage, "get", get)
    monkeypatch.setattr(app.sms, "send", send)
    assert client.ask().status == 200
    assert asked == [begun_s + 5]


# -- Proofs of what the outbox showed -----------------------------------------

PAID: dict[str, Any] = {"sms_providers": [{"kind": "nexmo", "api_key": "k", "api_secret": "s"}]}
BOTH: dict[str, Any] = {"sms_providers": [{"kind": "outbox"}, *PAID["sms_providers"]]}


@pytest.mark.parametrize(
    ("in_force", "errno"), [({}, 0), (BOTH, 0), (PAID, 104)], ids=["outbox", "both", "nexmo"]
)
def test_what_the_outbox_verified_has_proofs_only_while_it_is_there(
    make_client: MakeClient, in_force: dict[str, Any], errno: int
) -> None:
    """A store that began at a desk goes on in earnest: whoever read /outbox has proved nothing."""
    client = make_client().verified()
    later = make_client(**in_force)
    later.credentials = client.credentials
    for body in ({"publicKey": KEY}, {"publicKey": "bad"}):
        answer = later.call("/certificate/sign", body)
        if errno:
            assert (answer.status, answer.errno) == (400, errno)
        elif body["publicKey"] == KEY:
            assert answer.status == 200
    assert client.call("/certificate/sign", {"publicKey": KEY}).status == 200  # it is unchanged


@pytest.mark.parametrize(
    ("in_force", "errno"), [({}, 0), (BOTH, 0), (PAID, 111)], ids=["outbox", "both", "nexmo"]
)
def test_a_code_that_the_outbox_showed_is_gone_with_it(
    make_client: MakeClient, in_force: dict[str, Any], errno: int
) -> None:
    client = make_client()
    client.register()
    assert client.ask().status == 200
    later = make_client(**in_force)
    later.credentials = client.credentials
    before = record(client)
    assert give(later, client.code(), publicKey="bad").errno == (errno or 107)
    answer = give(later, client.code(), publicKey=KEY)
    if errno:
        assert (answer.status, answer.errno) == (410, errno)
        assert record(client) == before
        assert later.call("/certificate/sign", {"publicKey": KEY}).errno == 104
    else:
        assert answer.status == 200


def test_who_was_verified_in_earnest_stays_so(
    make_client: MakeClient, vonage: tuple[Vonage, dict[str, Any]]
) -> None:
    """By whatever provider is in force; a round at the desk makes it the outbox's."""
    stand_in, settings = vonage
    client = make_client(**settings)
    client.register()
    client.ask()
    assert give(client, stand_in.forms[-1]["text"].split()[-1]).status == 200
    desk = make_client()
    desk.credentials = client.credentials
    for one in (client, desk):
        assert one.call("/certificate/sign", {"publicKey": KEY}).status == 200
    assert desk.call("/sms/resend_code").status == 200
    assert client.call("/certificate/sign", {"publicKey": KEY}).status == 200  # not used yet
    assert give(desk, desk.code()).status == 200
    assert desk.call("/certificate/sign", {"publicKey": KEY}).status == 200
    assert client.call("/certificate/sign", {"publicKey": KEY}).errno == 104


@pytest.mark.parametrize("path", ["/sms/verify", "/sms/mt/verify"])
def test_asking_anew_counts_tries_on_like_resend(session: WsgiClient, path: str) -> None:
    session.ask()
    assert [give(session, wrong(session.code())).errno for _ in range(2)] == [105, 105]
    session.call(path, {"msisdn": NUMBER})
    code = session.code()
    assert [give(session, wrong(code)).errno for _ in range(2)] == [105, 111]


def test_after_death_by_tries_a_new_code_has_its_own(session: WsgiClient) -> None:
    session.ask()
    assert [give(session, wrong(session.code())).errno for _ in range(4)] == [105, 105, 105, 111]
    assert session.call("/sms/resend_code").status == 200
    code = session.code()
    assert [give(session, wrong(code)).errno for _ in range(2)] == [105, 105]
    assert give(session, code).status == 200


def test_after_death_by_time_a_new_code_has_its_own(client: WsgiClient, clock: Clock) -> None:
    client.register()
    client.ask()
    assert [give(client, wrong(client.code())).errno for _ in range(2)] == [105, 105]
    clock.now_s += 600
    assert client.call("/sms/resend_code").status == 200
    code = client.code()
    assert [give(client, wrong(code)).errno for _ in range(2)] == [105, 105]
    clock.now_s += 599  # and its own time
    assert give(client, code).status == 200


@pytest.mark.parametrize("body", [None, {}, {"shortVerificationCode": True}])
def test_resend_without_anything_asked_is_111(session: WsgiClient, body: Any) -> None:
    answer = session.call("/sms/resend_code", body)
    assert (answer.status, answer.errno) == (410, 111)


@pytest.mark.parametrize(
    ("first", "then", "digits"),
    [
        (True, [None], [6]),
        (False, [None], [32]),
        (False, [True, None], [6, 6]),  # the kind last used, not the first
        (True, [False, None], [32, 32]),
        (True, ["false", 0], [6, 6]),
        (False, ["true", 1], [32, 32]),
    ],
)
def test_resend_keeps_the_kind_last_used(
    session: WsgiClient, first: bool, then: list[Any], digits: list[int]
) -> None:
    session.ask(shortVerificationCode=first)
    found = []
    for choice in then:
        body = None if choice is None else {"shortVerificationCode": choice}
        assert session.call("/sms/resend_code", body).status == 200
        found.append(len(session.code()))
    assert found == digits


@pytest.mark.parametrize(("short", "kind"), [(True, "digits"), (False, "hex digits")])
def test_a_code_of_the_other_kind_hears_which_one_waits(
    session: WsgiClient, short: bool, kind: str
) -> None:
    session.ask(shortVerificationCode=short)
    answer = session.call("/sms/verify_code", {"code": "ab" * 16 if short else "123456"})
    assert answer.errno == 107
    assert answer.json["message"] == f"the code that is waiting is one of {kind}"


def test_resend_keeps_the_network_last_used(mapped: WsgiClient) -> None:
    client = mapped.another()
    client.register()
    number = "+34612345679"
    client.ask(number, mcc="214")
    client.ask(number, mcc="214", mnc="07")
    assert client.call("/sms/resend_code", {"mcc": "222"}).json["mtSender"] == "+34600000002"


def test_after_success_resend_starts_a_new_round(client: WsgiClient, clock: Clock) -> None:
    client.register()
    client.ask()
    assert give(client, client.code()).status == 200
    clock.now_s += 100
    assert client.call("/sms/resend_code").json["mtSender"] == "Gateway"
    code = client.code()
    assert [give(client, wrong(code)).errno for _ in range(2)] == [105, 105]
    signed = client.call("/certificate/sign", {"publicKey": KEY})
    assert claims(signed)["lastVerifiedAt"] == NOW * 1000  # the first round still counts
    assert give(client, code).json == {"msisdn": NUMBER}
    signed = client.call("/certificate/sign", {"publicKey": KEY})
    assert claims(signed)["lastVerifiedAt"] == (NOW + 100) * 1000


def test_a_failed_new_round_takes_nothing_away(session: WsgiClient) -> None:
    session.ask()
    give(session, session.code())
    session.call("/sms/resend_code")
    assert [give(session, wrong(session.code())).errno for _ in range(4)] == [105, 105, 105, 111]
    assert session.call("/certificate/sign", {"publicKey": KEY}).status == 200


# -- Certificates -------------------------------------------------------------

DURATIONS = [
    ({}, 86_400),
    ({"duration": None}, 86_400),
    ({"duration": ""}, 86_400),
    ({"duration": 1}, 1),
    ({"duration": 86_399}, 86_399),
    ({"duration": 86_401}, 86_400),
    ({"duration": 10**30}, 86_400),  # longer: cut, however long
    ({"duration": "3600"}, 3600),
    ({"duration": "007"}, 7),
    ({"duration": "9" * 18}, 86_400),
    ({"duration": "9" * 30}, 86_400),  # a string of digits like any other
    ({"duration": "9" * 5000}, 86_400),  # int() refuses this one
]


@pytest.mark.parametrize(("body", "seconds"), DURATIONS, ids=lambda value: repr(value)[:40])
def test_the_duration_of_a_certificate(
    session: WsgiClient, body: dict[str, Any], seconds: int
) -> None:
    session.ask()
    one = give(session, session.code(), publicKey=KEY, **body)
    two = session.call("/certificate/sign", {"publicKey": KEY, **body})
    assert [life_s(answer) for answer in (one, two)] == [seconds, seconds]


@pytest.mark.parametrize(
    ("name", "value"),
    [("publicKey", v) for v in BAD_KEY] + [("duration", v) for v in BAD_DURATION],
    ids=same_each_time,
)
def test_sign_refuses_a_bad_key_or_duration(client: WsgiClient, name: str, value: Any) -> None:
    client.verified()
    answer = client.call("/certificate/sign", {"publicKey": KEY, name: value})
    assert (answer.status, answer.errno) == (400, 107)
    assert name in answer.json["message"]


def test_the_longest_duration_is_a_setting(make_client: MakeClient) -> None:
    client = make_client(certificate_max_s=60).verified()
    for body in ({}, {"duration": 61}, {"duration": "86400"}):
        assert life_s(client.call("/certificate/sign", {"publicKey": KEY, **body})) == 60


def test_sign_before_success_is_104(session: WsgiClient) -> None:
    for step in (lambda: None, session.ask, lambda: give(session, wrong(session.code()))):
        step()
        answer = session.call("/certificate/sign", {"publicKey": KEY})
        assert (answer.status, answer.errno) == (400, 104)


def test_a_principal_is_stable_for_a_number_and_tells_nothing_of_it(client: WsgiClient) -> None:
    """The server of 2014 used the bare MD5 of the number: list all numbers, find them all."""

    def principal(number: str) -> str:
        one = client.another().verified(number)
        email: str = claims(one.call("/certificate/sign", {"publicKey": KEY}))["principal"]["email"]
        return email.split("@")[0].replace("-", "")

    first = principal(NUMBER)
    assert principal(NUMBER) == first != principal(OTHER)
    for text in (NUMBER, NUMBER[1:]):
        for name in ("md5", "sha1", "sha256"):
            assert hashlib.new(name, text.encode()).hexdigest()[:8] != first[:8]


# -- Unregister ---------------------------------------------------------------


@pytest.mark.parametrize("stage", ["registered", "asked", "verified"])
def test_unregister_drops_everything(
    client: WsgiClient, storage: gateway.Storage, stage: str
) -> None:
    client.register()
    if stage != "registered":
        client.ask()
    if stage == "verified":
        give(client, client.code())
    answer = client.call("/unregister")
    assert (answer.status, answer.data) == (204, b"")
    assert len(client.outbox()) == (stage == "asked")  # of a number that nobody has shown is theirs
    left = [key for key in storage._run("KEYS", "*") if not key.startswith(b"{")]
    assert left == []  # used nonces aside, which outlive their minute only
    for path, body in (("/sms/verify", {"msisdn": NUMBER}), ("/unregister", None)):
        assert client.call(path, body).errno == 110


def test_unregister_leaves_others_alone(session: WsgiClient) -> None:
    other = session.another()
    other.register()
    other.ask(OTHER)
    session.ask()
    session.call("/unregister")
    assert len(other.outbox(OTHER)) == 1
    assert give(other, other.code(OTHER)).status == 200


@pytest.mark.parametrize("stage", ["registered", "asked", "verified"])
def test_unregister_forgets_messages_to_a_number_that_was_verified(
    session: WsgiClient, stage: str
) -> None:
    """Or anybody could erase what is waiting for anybody, by naming a number."""
    other = session.another()
    other.register()
    other.ask()
    in_state(session, stage)
    assert session.call("/unregister").status == 204
    if stage == "verified":
        assert other.outbox() == []
    else:
        assert give(other, other.outbox()[0]["text"].split()[-1]).status == 200


@pytest.mark.parametrize("verified", [True, False])
def test_unregister_while_a_code_is_asked_for(
    session: WsgiClient, monkeypatch: pytest.MonkeyPatch, verified: bool
) -> None:
    """The record is read, then a code is sent, then the record is deleted."""
    if verified:
        session.verified()
    storage, twin = session.gateway.storage, session.another()
    twin.credentials, real = session.credentials, storage.commit

    def late(*args: Any, **options: Any) -> gateway.Commit:
        monkeypatch.undo()
        assert twin.ask().status == 200
        return real(*args, **options)

    monkeypatch.setattr(storage, "commit", late)
    assert session.call("/unregister").status == 204
    assert record(session) is None
    assert len(session.outbox()) == (not verified)


@pytest.mark.parametrize("verified", [True, False])
def test_an_unregister_that_is_replayed_is_109(session: WsgiClient, verified: bool) -> None:
    """Once with the nonce of another request; nothing is dropped."""
    if verified:
        session.verified()
    session.call("/certificate/sign", {"publicKey": KEY}, nonce="n")
    answer = session.call("/unregister", nonce="n")
    assert (answer.status, answer.errno) == (401, 109)
    assert len(session.outbox()) == verified
    assert session.call("/unregister").status == 204


def test_sign_racing_unregister_revives_nothing(
    client: WsgiClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.verified()
    storage, twin = client.gateway.storage, client.another()
    twin.credentials, real = client.credentials, storage.commit

    def late(*args: Any, **options: Any) -> gateway.Commit:
        monkeypatch.undo()
        assert twin.call("/unregister").status == 204
        return real(*args, **options)

    for path, body in (
        ("/certificate/sign", {"publicKey": KEY}),
        ("/sms/verify", {"msisdn": NUMBER}),
    ):
        monkeypatch.setattr(storage, "commit", late)
        answer = client.call(path, body)
        assert (answer.status, answer.errno) == (401, 110)
        assert (record(client), client.outbox()) == (None, [])
        twin.credentials = client.verified().credentials


def test_a_session_that_never_rests_is_503(
    session: WsgiClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else changes the record before each of our commits."""
    assert session.credentials
    storage, turns = session.gateway.storage, iter(range(1, 100))
    key, real = session.gateway.secrets.id_for(session.credentials.hawk_id), storage.commit

    def busy(*args: Any, **options: Any) -> gateway.Commit:
        user = gateway.User.unpack(record(session) or b"")
        storage._run("SET", key, user._replace(sends=0, tries=next(turns)).pack())
        return real(*args, **options)

    monkeypatch.setattr(storage, "commit", busy)
    answer = session.ask()
    assert (answer.status, answer.errno) == (503, 201)
    assert "server-authorization" in answer.headers
    assert session.outbox() == []
    monkeypatch.undo()
    assert session.ask().status == 200


# -- Messages that cost money -------------------------------------------------


class Vonage:
    """A stand-in of the SMS API on a real socket: keeps each form, answers as told."""

    def __init__(self) -> None:
        self.status = "0"
        self.forms: list[dict[str, str]] = []

    def __call__(self, environ: dict[str, Any], start_response: Any) -> list[bytes]:
        """Take one message."""
        body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
        self.forms.append(dict(parse_qsl(body.decode())))
        start_response("200 OK", [("Content-Type", "application/json")])
        return [json.dumps({"messages": [{"status": self.status}]}).encode()]


@pytest.fixture
def vonage() -> Iterator[tuple[Vonage, dict[str, Any]]]:
    """The stand-in, and the settings that send through it."""
    stand_in = Vonage()
    with lab.serving(stand_in) as url:
        login = {"api_key": "k", "api_secret": "s"}
        yield stand_in, {"sms_providers": [{"kind": "nexmo", "endpoint": url, **login}]}


def test_the_gateway_sends_so_many_an_hour(
    make_client: MakeClient, vonage: tuple[Vonage, dict[str, Any]]
) -> None:
    stand_in, settings = vonage
    clock = Clock()
    client = make_client(sends_per_hour=2, clock=clock, **settings)
    sessions = [client.another() for _ in range(3)]
    for one in sessions:
        one.register()
    assert sessions[0].ask().status == 200
    clock.now_s += 100
    assert sessions[1].ask().status == 200
    before = record(sessions[2])
    answer = sessions[2].ask()
    assert (answer.status, answer.errno) == (429, 116)
    assert answer.json["retryAfter"] == 1700
    assert (record(sessions[2]), len(stand_in.forms)) == (before, 2)
    clock.now_s += answer.json["retryAfter"]
    assert sessions[2].ask().status == 200
    assert sessions[2].ask().errno == 116


def test_the_outbox_is_not_counted_by_the_hour(make_client: MakeClient) -> None:
    client = make_client(sends_per_hour=1)
    client.register()
    assert [client.ask().status for _ in range(3)] == [200, 200, 200]


def test_a_message_that_was_refused_is_undone(
    make_client: MakeClient, vonage: tuple[Vonage, dict[str, Any]]
) -> None:
    stand_in, settings = vonage
    client = make_client(sends_per_hour=1, sends_per_session=1, **settings)
    client.register()
    before, stand_in.status = record(client), "5"
    for _ in range(3):  # neither the session's count nor the gateway's goes up
        answer = client.ask()
        assert (answer.status, answer.errno) == (503, 201)
    assert record(client) == before
    assert client.call("/sms/resend_code").errno == 111
    stand_in.status = "0"
    assert client.ask(OTHER).status == 200  # the session has no number yet
    code = stand_in.forms[-1]["text"].split()[-1]
    assert give(client, code).json == {"msisdn": OTHER}


def test_a_resend_that_was_refused_leaves_the_old_code_alive(
    make_client: MakeClient, vonage: tuple[Vonage, dict[str, Any]]
) -> None:
    stand_in, settings = vonage
    client = make_client(**settings)
    client.register()
    client.ask()
    code, stand_in.status = stand_in.forms[-1]["text"].split()[-1], "9"
    assert client.call("/sms/resend_code").errno == 201
    assert give(client, code).status == 200


def test_a_message_of_unknown_fate_may_still_be_used(make_client: MakeClient) -> None:
    """The provider takes the message but never answers: the SMS may well arrive."""
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        entry = {"kind": "nexmo", "api_key": "k", "api_secret": "s", "timeout_s": 0.2}
        entry["endpoint"] = f"http://127.0.0.1:{mute.getsockname()[1]}/"
        codes: list[bytes] = []

        def remember(n: int) -> bytes:
            codes.append(bytes(range(n)))
            return codes[-1]

        client = make_client(sms_providers=[entry], random_bytes=remember)
        client.register()
        answer = client.ask(shortVerificationCode=False)
    assert (answer.status, answer.json["mtSender"]) == (200, "Gateway")
    assert give(client, codes[-1].hex()).json == {"msisdn": NUMBER}


# -- The phone speaks first ---------------------------------------------------


def deliver(
    client: WsgiClient,
    params: dict[str, Any],
    how: str = "form",
    provider: str = "nexmo",
    path: str = "/sms/momt/",
) -> Answer:
    """An inbound SMS in one of the three ways that providers use."""
    query = f"?provider={provider}"
    if how == "get":
        return client.raw("GET", f"{path}{query}&{urlencode(params)}")
    if how == "json":
        return client.raw("POST", path + query, json.dumps(params).encode())
    kind = {"CONTENT_TYPE": "application/x-www-form-urlencoded"}
    return client.raw("POST", path + query, urlencode(params).encode(), kind)


def nexmo(client: WsgiClient, sender: str = NUMBER[1:], **more: Any) -> dict[str, Any]:
    """What Vonage delivers when a phone has sent the client's Hawk id."""
    assert client.credentials
    return {"msisdn": sender, "to": "447700900999", "text": client.credentials.hawk_id, **more}


def beepsend(client: WsgiClient, sender: str = NUMBER[1:], **more: Any) -> dict[str, Any]:
    """The same from BeepSend."""
    assert client.credentials
    return {"from": sender, "to": "447700900999", "message": client.credentials.hawk_id, **more}


@pytest.mark.parametrize("how", ["get", "form", "json"])
@pytest.mark.parametrize("path", ["/sms/momt/", "/sms/momt", "/v1/msisdn/sms/momt/"])
@pytest.mark.parametrize("provider", ["nexmo", "beepsend"])
def test_a_phone_that_sends_the_hawk_id_gets_a_long_code(
    session: WsgiClient, how: str, path: str, provider: str
) -> None:
    params = (nexmo if provider == "nexmo" else beepsend)(session)
    answer = deliver(session, params, how, provider, path)
    assert (answer.status, answer.json) == (200, {})
    (message,) = session.outbox()
    assert re.fullmatch("[0-9a-f]{32}", message["text"])
    assert give(session, message["text"]).json == {"msisdn": NUMBER}


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "/sms/momt/verify {}",  # what clients of 2014 send
        "Please verify me: {}",
        " {} ",
        "{}\n",
        "{upper}",
    ],
)
def test_the_id_stands_alone_or_after_other_words(session: WsgiClient, text: str) -> None:
    assert session.credentials
    hawk_id = session.credentials.hawk_id
    sent = text.format(hawk_id, upper=hawk_id.upper())
    assert deliver(session, nexmo(session, text=sent)).status == 200
    assert len(session.outbox()) == 1


@pytest.mark.parametrize(
    "sender", ["447700900123", "+447700900123", "00447700900123", " 447700900123", "+44 7700900123"]
)
def test_how_providers_write_the_sender(session: WsgiClient, sender: str) -> None:
    assert deliver(session, nexmo(session, sender)).status == 200
    assert give(session, session.code()).json == {"msisdn": NUMBER}


@pytest.mark.parametrize(
    ("provider", "fields", "how", "sender"),
    [
        ("nexmo", {"network-code": "21407"}, "form", "+34600000002"),
        ("nexmo", {"network-code": "21407"}, "get", "+34600000002"),
        ("nexmo", {"network-code": 21407}, "json", "+34600000002"),
        ("nexmo", {"network-code": "235999"}, "form", "+447700900999"),
        ("nexmo", {"network-code": "722010"}, "form", "Gateway"),
        ("beepsend", {"mcc": "214", "mnc": "07"}, "form", "+34600000002"),
        ("beepsend", {"mccmnc": {"mcc": "214", "mnc": "07"}}, "json", "+34600000002"),
        ("beepsend", {"mccmnc": {"mcc": "235", "mnc": None}}, "json", "+447700900999"),
        # else the country from the number
        ("nexmo", {}, "form", "+34600000001"),
        ("nexmo", {"network-code": ""}, "form", "+34600000001"),
        ("nexmo", {"network-code": "null"}, "form", "+34600000001"),
        ("beepsend", {"mccmnc": None}, "json", "+34600000001"),
        ("beepsend", {"mccmnc": ["235", "07"]}, "json", "+34600000001"),
        ("beepsend", {"mccmnc": "23507"}, "json", "+34600000001"),
        ("beepsend", {"mcc": "", "mnc": ""}, "get", "+34600000001"),
        ("beepsend", {"mccmnc": {"mcc": {}, "mnc": []}}, "json", "+34600000001"),
    ],
)
def test_the_network_of_an_inbound_sms(
    mapped: WsgiClient, provider: str, fields: dict[str, Any], how: str, sender: str
) -> None:
    client, number = mapped.another(), "+34612345678"
    client.register()
    params = (nexmo if provider == "nexmo" else beepsend)(client, number[1:], **fields)
    assert deliver(client, params, how, provider).json == {}
    assert client.outbox(number)[-1]["from"] == sender
    assert client.call("/unregister").status == 204  # empties this number's outbox


@pytest.mark.parametrize(
    "fields",
    [
        {"text": ""},
        {"text": "hello"},
        {"text": "0" * 64},  # nobody's id
        {"text": "{id}0"},  # 65 digits
        {"text": "0{id}"},
        {"text": "{cut}"},  # 63
        {"text": "{half} {half}"},
        {"msisdn": ""},
        {"msisdn": "Vonage"},  # an alphanumeric sender
        {"msisdn": "12345"},  # a short code: nobody's number
        {"msisdn": "+"},
        {"msisdn": "4477009001230000000000"},
        {"msisdn": "447700900123,447700900124"},
        {"text": "\x00\x7f"},
    ],
    ids=repr,
)
def test_garbage_is_200_and_does_nothing(session: WsgiClient, fields: dict[str, str]) -> None:
    """A provider delivers again, for hours, whatever is not answered with 200."""
    assert session.credentials
    hawk_id, before = session.credentials.hawk_id, record(session)
    put = {"id": hawk_id, "cut": hawk_id[1:], "half": hawk_id[:32]}
    filled = {name: text.format(**put) for name, text in fields.items()}
    for how in ("get", "form", "json"):
        answer = deliver(session, {**nexmo(session), **filled}, how)
        assert (answer.status, answer.json) == (200, {}), how
    assert (record(session), session.outbox()) == (before, [])


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"{", "application/json"),
        (b"[]", "application/json"),
        (b"null", "application/json"),
        (b'{"text": NaN}', "application/json"),
        (b"[" * 5000, "application/json"),
        (b"\xff\xfe", "application/json"),
        (b"hello", "text/plain"),
        (b"hello", "multipart/form-data"),
        (b"%ff=%fe&&&==", "application/x-www-form-urlencoded"),
        (b"\xff\x00", "application/x-www-form-urlencoded"),
        (b'{"msisdn": {}, "text": []}', "application/json"),
        (b'{"msisdn": 447700900123, "text": 5}', "application/json"),
        (b'{"msisdn": true, "text": false, "messageId": []}', "application/json"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_a_body_that_makes_no_sense_is_200_too(client: WsgiClient, body: bytes, kind: str) -> None:
    answer = client.raw("POST", "/sms/momt/?provider=nexmo", body, {"CONTENT_TYPE": kind})
    assert (answer.status, answer.json) == (200, {})


@pytest.mark.parametrize("message_id", ["\ud800", "\x00", "a" * 5000, 5, 0, True, [], {"a": 1}])
def test_a_strange_message_id_is_200(session: WsgiClient, message_id: Any) -> None:
    """JSON can say a lone surrogate, which no hash function takes."""
    answer = deliver(session, nexmo(session, messageId=message_id), "json")
    assert (answer.status, answer.json) == (200, {})


@pytest.mark.parametrize(
    "query",
    [
        "",
        "?provider=",
        "?provider=twilio",
        "?provider=Nexmo",
        "?provider=nexmo%00",
        "?Provider=nexmo",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_unknown_or_missing_provider_is_107(
    session: WsgiClient, method: str, query: str
) -> None:
    answer = session.raw(method, "/sms/momt/" + query)
    assert (answer.status, answer.errno) == (400, 107)
    assert "provider" in answer.json["message"]


def test_the_provider_may_stand_in_the_body(session: WsgiClient) -> None:
    body = json.dumps(nexmo(session, provider="nexmo")).encode()
    assert session.raw("POST", "/sms/momt/", body).json == {}
    assert len(session.outbox()) == 1


def test_only_the_webhooks_that_are_named_are_open(make_client: MakeClient) -> None:
    client = make_client(sms_inbound=[{"kind": "beepsend"}])
    client.register()
    assert deliver(client, nexmo(client)).errno == 107
    assert client.outbox() == []
    assert deliver(client, beepsend(client), provider="beepsend").json == {}
    assert make_client(sms_inbound=[]).get("/sms/momt/?provider=nexmo").errno == 107


def test_another_number_than_the_sessions_changes_nothing(session: WsgiClient) -> None:
    assert deliver(session, nexmo(session)).status == 200
    before = record(session)
    assert deliver(session, nexmo(session, OTHER[1:])).json == {}
    assert (record(session), session.outbox(OTHER)) == (before, [])
    assert give(session, session.code()).json == {"msisdn": NUMBER}
    assert deliver(session, nexmo(session, OTHER[1:])).json == {}  # nor after success
    assert session.outbox(OTHER) == []


@pytest.mark.parametrize("path", ["/sms/verify", "/sms/mt/verify"])
def test_a_session_that_asked_over_hawk_is_not_answered_by_sms(
    session: WsgiClient, path: str
) -> None:
    """Who has seen the Hawk id (it is in every header) could replace the code."""
    session.call(path, {"msisdn": NUMBER})
    code, before = session.code(), record(session)
    for sender in (NUMBER, OTHER):
        assert deliver(session, nexmo(session, sender[1:])).json == {}
    assert (record(session), len(session.outbox()), session.outbox(OTHER)) == (before, 1, [])
    assert give(session, code).status == 200
    before = record(session)
    assert deliver(session, nexmo(session)).json == {}
    assert (record(session), len(session.outbox())) == (before, 1)


def test_asking_over_hawk_closes_the_way_by_sms(session: WsgiClient) -> None:
    assert deliver(session, nexmo(session)).json == {}
    assert session.ask().status == 200
    before = record(session)
    assert deliver(session, nexmo(session)).json == {}
    assert (record(session), len(session.outbox())) == (before, 2)


def test_one_message_is_handled_once(session: WsgiClient) -> None:
    """Providers deliver at least once; each further code would kill the one before."""
    for how in ("form", "form", "get", "json"):
        assert deliver(session, nexmo(session, messageId="0A0000000123ABCD1"), how).json == {}
    assert len(session.outbox()) == 1
    assert deliver(session, nexmo(session, messageId="another")).json == {}
    assert (
        deliver(session, beepsend(session, id="0A0000000123ABCD2"), provider="beepsend").json == {}
    )
    assert len(session.outbox()) == 3
    assert give(session, session.code()).status == 200


def test_a_message_without_an_id_is_handled_each_time(session: WsgiClient) -> None:
    for _ in range(2):
        assert deliver(session, nexmo(session)).status == 200
    assert len(session.outbox()) == 2


@pytest.mark.parametrize("ahead_s", [3600, 3 * 86400, 300 * 86400])
def test_a_request_ahead_of_its_time_leaves_nothing(
    client: WsgiClient, clock: Clock, ahead_s: int
) -> None:
    """What was refused as stale did nothing, so all that can come later is its first run."""
    client.verified()
    run = client.gateway.storage._run
    ts, before = int(clock()) + ahead_s, run("DBSIZE")
    for later_s in (0, ahead_s - 61):
        clock.now_s += later_s
        answer = client.call("/certificate/sign", {"publicKey": KEY}, ts=ts, nonce="n")
        assert (answer.status, answer.errno) == (401, 109)
        assert "tsm" in answer.headers["www-authenticate"]
        assert run("DBSIZE") == before
    clock.now_s += 1
    statuses = [
        client.call("/certificate/sign", {"publicKey": KEY}, ts=ts, nonce="n").status
        for _ in range(3)
    ]
    assert statuses == [200, 401, 401]
    assert 0 < run("TTL", client_nonce(client, "n")) <= 121


def client_nonce(client: WsgiClient, nonce: str) -> bytes:
    """Where a client's nonce is kept."""
    assert client.credentials
    storage_id = client.gateway.secrets.id_for(client.credentials.hawk_id)
    return gateway.nonce_key(storage_id, nonce)


def test_the_id_of_a_message_is_no_nonce_of_a_request(session: WsgiClient) -> None:
    """Whoever may text must not be able to use up nonces, nor the other way round."""
    assert session.call("/certificate/sign", {"publicKey": KEY}, nonce="same").errno == 104
    assert deliver(session, nexmo(session, messageId="same")).status == 200
    assert len(session.outbox()) == 1
    assert deliver(session, nexmo(session, messageId="next")).status == 200
    assert session.call("/certificate/sign", {"publicKey": KEY}, nonce="next").errno == 104


def test_inbound_messages_count_for_the_session(make_client: MakeClient) -> None:
    client = make_client(sends_per_session=2)
    client.register()
    for _ in range(4):
        assert deliver(client, nexmo(client)).json == {}
    assert len(client.outbox()) == 2
    assert client.call("/sms/resend_code").errno == 114


def test_resend_after_an_inbound_message_goes_to_the_same_number(session: WsgiClient) -> None:
    deliver(session, nexmo(session))
    assert session.call("/sms/resend_code").status == 200
    assert [len(message["text"]) for message in session.outbox()] == [32, 32]
    assert session.ask(OTHER).errno == 107
    assert give(session, session.code()).json == {"msisdn": NUMBER}


def test_without_a_store_a_provider_shall_come_again(
    make_client: MakeClient, tmp_path: Path
) -> None:
    client = make_client()
    client.register()
    client.gateway.storage = gateway.Storage(f"unix://{tmp_path}/none.sock")
    answer = deliver(client, nexmo(client))
    assert (answer.status, answer.errno) == (503, 201)


# -- Webhooks with a secret ---------------------------------------------------

MOMT = ("/sms/momt", "/v1/msisdn/sms/momt")


def test_a_path_secret_lets_in_who_knows_it(make_client: MakeClient) -> None:
    client = make_client(sms_inbound=[{"kind": "nexmo", "path_secret": "s3cret"}])
    client.register()
    wrong_ones = ("", "/", "/wrong", "/s3cre", "/s3cret0", "/S3CRET", "/\xc3\xa9")
    for path in (f"{spelling}{end}" for spelling in MOMT for end in wrong_ones):
        for how in ("get", "form", "json"):
            answer = deliver(client, nexmo(client), how, path=path)
            assert (answer.status, answer.json["error"]) == (403, "Forbidden"), path
            assert answer.json.keys() == {"code", "error", "message"}
            assert b"s3cret" not in answer.data
    assert client.outbox() == []
    assert deliver(client, nexmo(client), path="/v1/msisdn/sms/momt/s3cret").json == {}
    assert len(client.outbox()) == 1


@pytest.mark.parametrize("secret", ["\ud800", "", "é", "None", "True", "s3cret\x00"])
def test_a_secret_in_the_body_is_compared_not_crashed_on(
    make_client: MakeClient, secret: str
) -> None:
    client = make_client(sms_inbound=[{"kind": "nexmo", "path_secret": "s3cret"}])
    client.register()
    answer = deliver(client, nexmo(client, secret=secret), "json")
    assert answer.status == 403
    assert client.outbox() == []


def vonage_signature(params: dict[str, Any], secret: str) -> str:
    """Vonage's HMAC-SHA256, from its documentation: &name=value, sorted, & and = made _."""
    text = ""
    for name in sorted(params):
        text += f"&{name}=" + str(params[name]).replace("&", "_").replace("=", "_")
    return hmac.new(secret.encode(), text.encode(), hashlib.sha256).hexdigest()


@pytest.fixture
def sealed(make_client: MakeClient) -> WsgiClient:
    """A session at a gateway that takes signed webhooks only."""
    client = make_client(sms_inbound=[{"kind": "nexmo", "signature_secret": "t0psecret"}])
    client.register()
    return client


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"keyword": "A&B=C", "message-timestamp": "2026-11-22 09:00:00"},
        {"concat-ref": "é ü"},
        {"type": "text", "timestamp": str(int(time.time())), "nonce": "abc"},
        {"empty": ""},  # signed like any other, although empty counts as missing
    ],
    ids=same_each_time,
)
def test_a_signed_webhook_is_let_in(sealed: WsgiClient, more: dict[str, str]) -> None:
    for how in ("get", "form", "json"):
        params = nexmo(sealed, messageId=how, **more)
        params["sig"] = vonage_signature(params, "t0psecret")
        assert deliver(sealed, params, how).json == {}, how
    assert len(sealed.outbox()) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"sig": ""},
        {"sig": None},
        {"sig": "0" * 64},
        {"sig": "{cut}"},
        {"sig": "{other}"},
        {"sig": "None"},
        {"sig": "é"},
        {"msisdn": OTHER[1:]},
        {"text": "other"},
        {"added": "1"},
        {"messageId": None},
    ],
    ids=repr,
)
def test_a_webhook_with_a_wrong_signature_is_403(
    sealed: WsgiClient, change: dict[str, str | None]
) -> None:
    params = nexmo(sealed, messageId="m1")
    right = vonage_signature(params, "t0psecret")
    put = {"cut": right[:-1], "other": vonage_signature(params, "t0psecre")}
    params["sig"] = right
    for name, value in change.items():
        if value is None:
            del params[name]
        else:
            params[name] = value.format(**put)
    before = record(sealed)
    for how in ("get", "form", "json"):
        answer = deliver(sealed, params, how)
        assert (answer.status, answer.json["error"]) == (403, "Forbidden"), how
        assert answer.json.keys() == {"code", "error", "message"}
        assert right.encode() not in answer.data
    assert (record(sealed), sealed.outbox(), sealed.outbox(OTHER)) == (before, [], [])


def test_a_gateway_that_wants_signatures_stays_closed_to_surrogates(sealed: WsgiClient) -> None:
    for params in (nexmo(sealed, sig="\ud800"), nexmo(sealed, text="\ud800", sig="0" * 64)):
        assert deliver(sealed, params, "json").status == 403


def test_a_path_secret_and_a_signature_are_both_needed(make_client: MakeClient) -> None:
    entry = {"kind": "nexmo", "path_secret": "p", "signature_secret": "s"}
    client = make_client(sms_inbound=[entry])
    client.register()
    params = nexmo(client)
    signed = {**params, "sig": vonage_signature(params, "s")}
    assert deliver(client, params, path="/sms/momt/p").status == 403
    assert deliver(client, signed).status == 403
    assert client.outbox() == []
    assert deliver(client, signed, path="/sms/momt/p").status == 200
    assert len(client.outbox()) == 1
