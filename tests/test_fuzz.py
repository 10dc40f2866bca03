"""What ever failed passes, a few thousand new hostile inputs pass, and what fuzzing has found.

``fuzz.py`` says what an input is and what must be true; ``make fuzz`` runs it for longer.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import fuzz
import lab
import pytest
from support import WsgiClient

import gateway

SEED = 22
MakeClient = Callable[..., WsgiClient]


@pytest.fixture(scope="module")
def site() -> Iterator[fuzz.Site]:
    with fuzz.quiet_site() as site:
        yield site


@pytest.mark.slow
def test_right_inputs_old_failures_and_new_inputs(site: fuzz.Site) -> None:
    run = fuzz.Run(site, SEED)
    run.right()
    run.replay()
    run.go(0, 6000)
    assert not run.failed, "\n".join(run.failed)
    assert min(run.inputs.values()) >= 8, run.inputs
    assert run.http >= 200  # how many depends on how long each takes here


def test_a_parser_that_fails_is_noticed(site: fuzz.Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its input is made small, and kept."""
    kept: list[str] = []
    monkeypatch.setattr(pathlib.Path, "read_text", lambda *_: "[]")
    monkeypatch.setattr(pathlib.Path, "write_text", lambda _, text, *__: kept.append(text))

    def direct(text: Any) -> None:
        if "é" in text:
            raise KeyError(text)

    run = fuzz.Run(site, SEED)
    run.parsers = {"planted": fuzz.Parser("planted", ["abcdefgh" * 9], direct)}
    run.inputs, run.waits = {"planted": 0}, {"planted": 0.0}
    run.go(0, 5000)
    assert len(run.failed) == 1
    assert "KeyError" in run.failed[0]
    assert len(kept[0]) < 60, kept


def test_an_answer_that_must_not_be_is_noticed() -> None:
    """A 500, another 503 than 201, a header that is split."""
    json = ("Content-Type", "application/json")
    for status, headers, data in (
        (500, [json], b'{"errno": 999}'),
        (503, [json], b'{"errno": 114}'),
        (204, [("A", "b\r\nc")], b""),
    ):
        with pytest.raises(AssertionError):
            stamped = [*headers, ("Timestamp", str(fuzz.NOW_S))]
            fuzz.check_answer("POST", "/unregister", status, stamped, data)


# -- What fuzzing has found -------------------------------------------------------------------


def test_a_name_that_is_there_twice(client: WsgiClient) -> None:
    """CONTRACT §1: 400/106. Nobody can tell which of the two was meant."""
    for body in (b'{"mcc": "234", "mcc": "310"}', b'{"mcc": "234", "x": {"a": 1, "a": 1}}'):
        assert client.raw("POST", "/discover", body).errno == 106


def test_half_a_character_is_no_json(session: WsgiClient) -> None:
    r"""JSON can write one half of a pair, "\ud800", which no UTF-8 can: it was answered by 500."""
    for body in ({"everywhere": "\udfff"}, {"\udfff": 1}, {"x": ["\udfff"]}):
        assert session.call("/unregister", body).errno == 106


@pytest.mark.parametrize(
    ("name", "value"),
    [("port", "5\udcff"), ("sms_price", "{\udcff}"), ("sms_providers", '[{"kind": "\udcff"}]')],
)
def test_a_setting_that_is_no_text(name: str, value: str) -> None:
    """The environment may hold bytes that are not UTF-8."""
    with pytest.raises(gateway.SettingsError, match=f"^{name}"):
        gateway.load_settings({}, {f"GATEWAY_{name.upper()}": value})


def test_an_entry_that_is_no_text() -> None:
    entry = '[{"kind": "nexmo", "api_key": "k", "api_secret": "s", "timeout_s": "\udcff"}]'
    with pytest.raises(gateway.SettingsError, match=r"^sms_providers\[0\]") as caught:
        gateway.load_settings({}, {"GATEWAY_SMS_PROVIDERS": entry})
    assert "api_secret is" not in str(caught.value)


def test_the_client_refuses_an_answer_whose_seal_is_no_ascii() -> None:
    seal = 'Hawk mac="é", hash="x"'
    key, target = fuzz.CREDENTIALS.hawk_key, fuzz.TARGET
    assert not lab.check_answer(key, fuzz.SENT, seal, target, "", b"")


@pytest.mark.parametrize("jwks", [None, [], 1.5, "keys", {"keys": [None]}, {"keys": None}])
def test_keys_of_an_issuer_that_are_none(jwks: Any) -> None:
    with pytest.raises(gateway.InvalidToken):
        gateway.verify_proof(fuzz.tokens()["jwt"], jwks, fuzz.ISSUER, fuzz.NOW_S, fuzz.ORIGIN)


def test_a_settings_file_that_is_nested_deeply(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "deep.toml"
    path.write_text("port = " + "[" * 3000)
    with pytest.raises(gateway.SettingsError, match="cannot read the settings file"):
        gateway.load_settings({}, {}, str(path))


def test_an_endpoint_that_is_no_text() -> None:
    entry = {
        "kind": "kannel",
        "endpoint": "http://\udc80.example/",
        "username": "u",
        "password": "pw",
    }
    with pytest.raises(gateway.SettingsError, match=r"^sms_providers\[0\]") as caught:
        gateway.Settings(sms_providers=[entry])
    assert "pw" not in str(caught.value)
