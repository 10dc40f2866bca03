"""What a client may do next: told in answers and errors, and by GET /session."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from support import NUMBER, Clock, WsgiClient

import gateway
from gateway import Settings, User, next_action

NOW_S = 1_800_000_000
GAPS: dict[str, Any] = {"resend_gaps_s": [30, 60, 120, 300]}
SENT = User(b"k" * 32, b"s" * 24, sends=1, asked_s=NOW_S, code_expires_s=NOW_S + 600,
            code_digest=b"d" * 8)  # fmt: skip
MakeClient = Callable[..., WsgiClient]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, (30, 4, 3, 600, False)),
        ({"tries": 2}, (30, 4, 1, 600, False)),
        ({"asked_s": NOW_S - 12, "code_expires_s": NOW_S + 588}, (18, 4, 3, 588, False)),
        ({"asked_s": NOW_S - 30, "code_expires_s": NOW_S + 1}, (0, 4, 3, 1, False)),
        ({"code_expires_s": NOW_S}, (30, 4, 0, 0, False)),
        ({"code_digest": b"", "verified_s": NOW_S}, (30, 4, 0, 0, True)),
        ({"sends": 2}, (60, 3, 3, 600, False)),
        ({"sends": 3}, (120, 2, 3, 600, False)),
        ({"sends": 4}, (300, 1, 3, 600, False)),
        ({"sends": 0, "asked_s": 0, "sealed": b"", "code_digest": b""}, (0, 5, 0, 0, False)),
        # Being sent: its gap as if it had left, since that is likely.
        ({"sending": True, "code_digest": b""}, (30, 4, 0, 0, False)),
        ({"sending": True, "sends": 2, "tries": 1}, (60, 3, 2, 600, False)),
        ({"sending": True, "asked_s": NOW_S - 15, "code_digest": b""}, (0, 4, 0, 0, False)),
    ],
)
def test_next_action(change: dict[str, Any], expected: tuple[Any, ...]) -> None:
    told = next_action(SENT._replace(**change), Settings(**GAPS), NOW_S)
    assert tuple(told.values()) == expected
    assert list(told) == ["resendIn", "sendsLeft", "triesLeft", "expiresIn", "verified"]


def test_a_message_that_is_being_sent_is_never_asked_for_again_at_once() -> None:
    told = next_action(SENT._replace(sending=True), Settings(resend_gaps_s=[0]), NOW_S)
    assert told["resendIn"] == 1


def test_sends_left_ends_at_none() -> None:
    told = next_action(SENT._replace(sends=5), Settings(**GAPS), NOW_S)
    assert told["sendsLeft"] == 0
    assert told["resendIn"] > 300


def test_sends_left_ends_at_none_where_most_are_allowed() -> None:
    told = next_action(SENT._replace(sends=255), Settings(**GAPS, sends_per_session=255), NOW_S)
    assert told["sendsLeft"] == 0


@pytest.mark.parametrize(("limits", "counted", "left"), [("record", 3, 2), ("off", 0, 5)])
def test_nothing_counts_where_limits_are_off(limits: Any, counted: int, left: int) -> None:
    user, settings = SENT._replace(sends=3), Settings(limits=limits, **GAPS)
    assert gateway.session_sends(user, settings, NOW_S)[0] == counted
    assert next_action(user, settings, NOW_S)["sendsLeft"] == left


def test_an_ended_verification_leaves_nothing() -> None:
    """Not even that the outbox had the message, or the ticket of a worker that died."""
    left = SENT._replace(asked_s=NOW_S - 60, code_digest=b"", sealed=b"")
    user = left._replace(sealed=b"s" * 24, older_digest=b"o" * 8, sending=True, ticket=7)
    user = user._replace(verified_s=NOW_S - 50, verified_by_outbox=True)
    assert gateway.end_proofs(user, NOW_S, Settings(), NOW_S) == left


def test_the_whole_flow_tells_it(make_client: MakeClient) -> None:
    clock = Clock(NOW_S)
    client = make_client(clock=clock, **GAPS)
    client.register()
    state = client.call("/session", method="GET")
    fresh = {"resendIn": 0, "sendsLeft": 5, "triesLeft": 0, "expiresIn": 0, "verified": False}
    assert (state.status, state.json) == (200, {"next": fresh})
    waits = {"resendIn": 30, "sendsLeft": 4, "triesLeft": 3, "expiresIn": 600, "verified": False}
    asked = client.ask()
    assert asked.json == {"mtSender": "Gateway", "next": waits}
    assert client.ask().json == asked.json  # a double click
    clock.now_s += 10
    later = waits | {"resendIn": 20, "expiresIn": 590}
    early = client.call("/sms/resend_code")
    assert (early.errno, early.json["next"]) == (114, later)
    wrong = "000000" if client.code() != "000000" else "111111"
    guess = client.call("/sms/verify_code", {"code": wrong})
    assert (guess.errno, guess.json["next"]) == (105, later | {"triesLeft": 2})
    clock.now_s += 20
    older, again = client.code(), client.call("/sms/resend_code")
    second = {"resendIn": 60, "sendsLeft": 3, "triesLeft": 2, "expiresIn": 600, "verified": False}
    assert again.json["next"] == second  # wrong tries count on
    superseded = client.call("/sms/verify_code", {"code": older})
    if client.code() != older:
        assert (superseded.errno, superseded.json["next"]) == (105, second)
    assert client.call("/session", method="GET").json == {"next": second}
    done = client.call("/sms/verify_code", {"code": client.code()})
    assert (done.status, done.json) == (200, {"msisdn": NUMBER})
    verified = second | {"triesLeft": 0, "expiresIn": 0, "verified": True}
    state = client.call("/session", method="GET")
    assert state.json == {"msisdn": NUMBER, "next": verified}
    assert client.call("/sms/verify_code", {"code": older}).json["next"] == verified
    key = gateway.public_key_json(gateway.generate_key("RS256").public_key())
    assert client.call("/certificate/sign", {"publicKey": key}).json.keys() == {"cert"}


def test_gaps_grow(make_client: MakeClient) -> None:
    clock = Clock(NOW_S)
    client = make_client(clock=clock, **GAPS)
    client.register()
    assert client.ask().status == 200
    for gap_s in (30, 60, 120, 300):
        clock.now_s += gap_s - 1
        early = client.call("/sms/resend_code")
        assert (early.errno, early.json["retryAfter"]) == (114, 1)
        clock.now_s += 1
        assert client.call("/sms/resend_code").status == 200
    clock.now_s += 3599  # an hour after the last they are counted anew
    used_up = client.call("/sms/resend_code")
    assert (used_up.errno, used_up.json["next"]["sendsLeft"]) == (114, 0)


def test_get_session_changes_nothing_but_the_nonce(
    make_client: MakeClient, storage: gateway.Storage
) -> None:
    client = make_client()
    client.register()
    client.ask()
    assert client.credentials
    key = client.gateway.secrets.id_for(client.credentials.hawk_id)
    before, keys = storage.get(key), len(storage._run("KEYS", "*"))
    for path in ("/session", "/v1/msisdn/session"):
        assert client.call(path, method="GET", nonce="once" + path[1]).status == 200
    assert storage.get(key) == before
    assert len(storage._run("KEYS", "*")) == keys + 2
    assert client.call("/session", method="GET", nonce="onces").errno == 109  # replayed
    assert client.call("/session", method="GET", signed=False).errno == 110


def test_errors_about_no_session_tell_nothing(make_client: MakeClient) -> None:
    """A wrong MAC, no session any more: there is nobody to tell it."""
    client = make_client()
    client.register()
    forged = client.another()
    assert client.credentials
    forged.credentials = client.credentials._replace(hawk_key=gateway.HawkKey(b"x" * 32))
    answer = forged.call("/session", method="GET")
    assert (answer.errno, "next" in answer.json) == (109, False)
    assert client.call("/unregister").status == 204
    answer = client.call("/session", method="GET")
    assert (answer.errno, "next" in answer.json) == (110, False)


def test_a_503_tells_it_only_where_it_is_known(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = make_client()
    client.register()
    client.ask()

    def lost(*_: Any, **__: Any) -> gateway.Commit:
        raise gateway.Unavailable("it may have been done")

    with monkeypatch.context() as patched:
        patched.setattr(client.gateway.storage, "commit", lost)
        answer = client.call("/sms/verify_code", {"code": client.code()})
        assert (answer.errno, "next" in answer.json) == (201, False)


def test_all_failed_tells_that_nothing_was_counted(make_client: MakeClient) -> None:
    entry = {"kind": "nexmo", "endpoint": "http://127.0.0.1:9", "api_key": "k", "api_secret": "s"}
    client = make_client(sms_providers=[entry], **GAPS)
    client.register()
    answer = client.ask()
    assert answer.errno == 201
    fresh = {"resendIn": 0, "sendsLeft": 5, "triesLeft": 0, "expiresIn": 0, "verified": False}
    assert answer.json["next"] == fresh


def test_what_an_outbox_that_is_gone_has_shown_is_nothing(make_client: MakeClient) -> None:
    client = make_client()
    client.verified()
    entry = {"kind": "nexmo", "api_key": "k", "api_secret": "s"}
    other = WsgiClient(make_client(sms_providers=[entry]).app)
    other.credentials = client.credentials
    state = other.call("/session", method="GET").json
    assert (state["next"]["verified"], "msisdn" in state) == (False, False)
