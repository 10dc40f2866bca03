"""Numbers that are never texted: each has a code of its own, and counts towards nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from support import NUMBER, Clock, WsgiClient
from test_sms import SmsApi, taken

import gateway

TEST, CODE = "+447700900001", "012345"
NAMED: dict[str, Any] = {"countries": ["GB"], "mt_sender": "Gateway"}
MakeClient = Callable[..., WsgiClient]


def counters(client: WsgiClient) -> int:
    """How many keys of limits the store holds."""
    return len(client.gateway.storage._run("KEYS", b"{limits}*"))


def test_it_is_verified_without_a_message_and_without_a_limit(make_client: MakeClient) -> None:
    """Twenty sessions, ten sends in each, beside a paid provider: nothing is sent or counted."""
    with SmsApi(taken) as api:
        options = {"sms_providers": [api.entry()], "test_numbers": {TEST: CODE}, **NAMED}
        client = make_client(registers_per_address="9999/minute", clock=Clock(), **options)
        for _ in range(20):
            client.register()
            assert client.ask(TEST).status == 200
            for _ in range(9):
                client.gateway.clock.now_s += 31  # type: ignore[attr-defined]
                answer = client.call("/sms/resend_code")
                assert (answer.status, answer.json["next"]["sendsLeft"]) == (200, 5)
            assert client.call("/sms/verify_code", {"code": "999999"}).errno == 105
            answer = client.call("/sms/verify_code", {"code": CODE})
            assert (answer.status, answer.json["msisdn"]) == (200, TEST)
        assert (api.received, counters(client)) == ([], 0)
        client.register()
        assert client.ask(NUMBER).status == 200
        assert len(api.received) == 1
        assert counters(client) > 0


def test_three_guesses_and_the_code_is_dead(make_client: MakeClient) -> None:
    client = make_client(test_numbers={TEST: CODE})
    client.register()
    assert client.ask(TEST).status == 200
    for _ in range(3):
        assert client.call("/sms/verify_code", {"code": "999999"}).errno == 105
    assert client.call("/sms/verify_code", {"code": CODE}).errno == 111


def test_a_long_code_is_the_same(make_client: MakeClient) -> None:
    client = make_client(test_numbers={TEST: CODE})
    client.register()
    assert client.call("/sms/mt/verify", {"msisdn": TEST}).status == 204
    assert client.outbox(TEST) == []
    assert client.call("/sms/verify_code", {"code": CODE}).status == 200


def test_it_proves_nothing_where_there_are_none(make_client: MakeClient) -> None:
    """The same store, later with a real provider: the number was never shown to be anybody's."""
    client = make_client(test_numbers={TEST: CODE})
    client.verified(NUMBER)  # the outbox is another matter
    client.register()
    assert client.ask(TEST).status == 200
    waiting, credentials = client.another(), client.credentials
    assert client.call("/sms/verify_code", {"code": CODE}).status == 200
    waiting.register()
    assert waiting.ask(TEST).status == 200
    with SmsApi(taken) as api:
        later = make_client(sms_providers=[api.entry()], **NAMED)
        later.credentials = credentials
        assert (
            later.call("/certificate/sign", {"format": "jwt", "audience": "https://a"}).errno == 104
        )
        later.credentials = waiting.credentials
        assert later.call("/sms/verify_code", {"code": CODE}).errno == 111


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"public_url": "https://id.example", "trusted_proxies": []}, "loopback"),
        ({"test_numbers": {TEST: "12345"}}, "6 digits"),
        ({"test_numbers": {TEST: "1234567"}}, "6 digits"),
        ({"test_numbers": {TEST: "12345x"}}, "+447700900001"),
        ({"test_numbers": {TEST: "١٢٣٤٥٦"}}, "+447700900001"),
        ({"test_numbers": {"07700900001": CODE}}, "+447700900001"),
        ({"test_numbers": {TEST: 123456}}, "+447700900001"),
    ],
)
def test_where_they_may_be(options: dict[str, Any], allowed: str) -> None:
    paid = {"sms_providers": [{"kind": "nexmo", "api_key": "k", "api_secret": "s"}], **NAMED}
    with pytest.raises(gateway.SettingsError, match="test_numbers") as refused:
        gateway.Settings(**({"test_numbers": {TEST: CODE}, **paid} | options))
    assert allowed in str(refused.value).partition("allowed: ")[2]
