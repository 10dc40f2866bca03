"""Settings: the contract's table, who wins, what is refused, and that no secret is shown."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lab
import msgspec
import psutil
import pytest
from support import ROOT, GatewayProcess, free_port, shared

import gateway
from gateway import Settings, SettingsError

CONTRACT: dict[str, Any] = {
    "host": "127.0.0.1",
    "port": 5000,
    "workers": len(os.sched_getaffinity(0)),
    "threads": 1024,
    "public_url": "",
    "trusted_proxies": None,
    "storage_url": "",
    "certificate_store": "",
    "data_dir": "data",
    "keys_dir": "keys",
    "allowed_origins": ["*"],
    "request_max_bytes": 10240,
    "short_code_digits": 6,
    "long_code_bytes": 16,
    "code_tries": 3,
    "code_ttl_s": 600,
    "session_ttl_s": 86400,
    "verified_ttl_s": 31536000,
    "certificate_max_s": 86400,
    "hawk_skew_s": 60,
    "sends_per_session": 5,
    "resend_gaps_s": [30, 60, 120, 300],
    "limits": "enforce",
    "sends_per_number": "5/day",
    "sends_per_number_from_address": "3/day",
    "unverified_per_prefix": "10/day",
    "unverified_per_destination": {"*": "50/day"},
    "unverified_per_address": "10/day",
    "registers_per_address": "60/minute",
    "sends_per_hour": 100,
    "spend_per_day": 20.0,
    "sms_price": {"*": 0.05},
    "sms_providers": [{"kind": "outbox"}],
    "mt_sender": "Gateway",
    "mt_sender_map": {},
    "test_numbers": {},
    "mo_verifier": "",
    "mo_verifier_map": {},
    "display_version": True,
}
"""CONTRACT sections 6 and 7. ``sms_inbound`` depends on the place and on the providers,
``store_max_bytes`` on the machine."""

PAGE = (lab.ROOT / "notebooks/operate/providers.md").read_text("utf-8")
ABROAD: dict[str, Any] = {
    "sms_providers": [{"kind": "nexmo", "api_key": "k", "api_secret": "s"}],
    "sms_inbound": [],
    "trusted_proxies": [],
}
"""What a gateway needs that is not on loopback."""


class Ended(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's own settings reach these tests."""
    for name in [name for name in os.environ if name.startswith("GATEWAY_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Run ``python gateway.py`` in this process."""

    def call(*argv: str) -> Ended:
        capsys.readouterr()
        try:
            status = gateway.main(list(argv))
        except SystemExit as end:  # argparse
            status = end.code if isinstance(end.code, int) else 1
        return Ended(status, *capsys.readouterr())

    return call


@pytest.fixture
def toml(tmp_path: Path) -> Callable[[str], str]:
    """Write a settings file."""

    def write(text: str) -> str:
        path = tmp_path / "gateway.toml"
        path.write_text(text, "utf-8")
        return str(path)

    return write


# -- The table ----------------------------------------------------------------


@pytest.mark.parametrize("name", CONTRACT)
def test_default(name: str) -> None:
    value = getattr(Settings(), name)
    assert value == CONTRACT[name]
    assert type(value) is type(CONTRACT[name])


def test_every_setting_has_a_sentence() -> None:
    for name, field in gateway.declared(Settings).items():
        assert len(field["description"].split()) >= 3, name


@pytest.mark.parametrize("name", gateway.SMS_LISTS)
def test_every_field_of_an_entry_has_a_sentence(name: str) -> None:
    for kind, declaration in gateway.SMS_LISTS[name].items():
        fields = dict(gateway.declared(declaration))
        assert fields.pop("kind") == {"enum": [kind]}
        for field, schema in fields.items():
            assert len(schema["description"].split()) >= 3, field
            assert gateway.allowed(schema), field


def test_settings_are_frozen() -> None:
    with pytest.raises(AttributeError, match="immutable"):
        Settings().port = 1  # type: ignore[misc]


def test_defaults_are_not_shared() -> None:
    """One table written to would change every later Settings()."""
    Settings().mt_sender_map["310"] = "x"
    Settings().allowed_origins.append("x")
    Settings().resend_gaps_s.clear()
    assert (Settings().mt_sender_map, Settings().allowed_origins) == ({}, ["*"])
    assert Settings().resend_gaps_s == [30, 60, 120, 300]
    assert Settings().sms_providers[0] is not Settings().sms_providers[0]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, ["nexmo", "beepsend"]),
        ({"host": "::1"}, ["nexmo", "beepsend"]),
        ({"host": "localhost", "public_url": "http://127.0.0.1:80"}, ["nexmo", "beepsend"]),
        ({"sms_inbound": []}, []),
        ({"sms_inbound": [{"kind": "beepsend"}]}, ["beepsend"]),
        ({"public_url": "https://id.example", **ABROAD, "sms_inbound": None}, []),
        ({"host": "192.0.2.1", **ABROAD, "sms_inbound": None}, []),
        # Any page in a browser here can call loopback: none is open where messages cost money.
        ({**ABROAD, "sms_inbound": None}, []),
        ({"sms_providers": [*ABROAD["sms_providers"], {"kind": "outbox"}]}, []),
        ({"sms_providers": [{"kind": "outbox"}, {"kind": "outbox"}]}, ["nexmo", "beepsend"]),
    ],
)
def test_open_webhooks_depend_on_the_place(values: dict[str, Any], expected: list[str]) -> None:
    """And on what messages cost: they are open without a secret at a desk only."""
    assert [entry["kind"] for entry in Settings(**values).inbound] == expected
    assert Settings(**{**values, "sms_inbound": None}).at_a_desk == bool(
        Settings(**{**values, "sms_inbound": None}).inbound
    )


@pytest.mark.parametrize(
    ("values", "base", "issuer"),
    [
        ({}, "http://127.0.0.1:5000", "127.0.0.1:5000"),
        ({"port": 80}, "http://127.0.0.1", "127.0.0.1"),
        ({"host": "::1"}, "http://[::1]:5000", "[::1]:5000"),
        ({"public_url": "http://localhost:8123"}, "http://localhost:8123", "localhost:8123"),
        ({"public_url": "http://localhost/"}, "http://localhost", "localhost"),
        ({"public_url": "http://[::1]:81"}, "http://[::1]:81", "[::1]:81"),
        ({"public_url": "https://id.example", **ABROAD}, "https://id.example", "id.example"),
    ],
)
def test_what_clients_call_us(values: dict[str, Any], base: str, issuer: str) -> None:
    assert (Settings(**values).base_url, Settings(**values).issuer) == (base, issuer)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://ID.Example", "https://id.example"),
        ("HTTPS://id.example", "https://id.example"),
        ("https://id.example:443", "https://id.example"),
        ("https://id.example:0443/", "https://id.example"),
        ("http://id.example:80", "http://id.example"),
        ("http://id.example:443", "http://id.example:443"),
        ("https://id.example:80", "https://id.example:80"),
        ("http://LocalHost:5000/", "http://localhost:5000"),
        ("http://[0:0::0001]:81", "http://[::1]:81"),
        ("http://[2001:DB8::A]", "http://[2001:db8::a]"),
        ("https://xn--bcher-kva.example", "https://xn--bcher-kva.example"),
        ("https://a_b.example", "https://a_b.example"),
        ("https://id.example.", "https://id.example."),
        ("https://7.example", "https://7.example"),
        ("https://0xg.0xg", "https://0xg.0xg"),
        ("https://127.0.0.1:65535", "https://127.0.0.1:65535"),
    ],
)
def test_our_name_is_spelled_as_browsers_spell_it(url: str, expected: str) -> None:
    """A client compares a certificate's issuer with its ``new URL(url).host``.

    What is expected here is what Node 20 says ``new URL(url).origin`` is.
    """
    assert gateway.origin_of(url) == expected
    settings = Settings(public_url=url, **ABROAD)
    assert (settings.public_url, settings.base_url) == (expected, expected)
    assert settings.issuer == expected.partition("//")[2]


@pytest.mark.skipif(
    not shutil.which("node"), reason="Node is not installed: apt-get install nodejs"
)
def test_node_agrees_about_our_name() -> None:
    """Of hosts that are put together at random, it reads each that we take, and likewise."""
    rng = random.Random(54)
    hosts = ["Id.Example", "a-b", "x.", "_", "1.2.3.4", "1.2.3", "08.1.1.1", "0x7f.1", "a.0x1",
             "a.1b", "[::0001]", "[1:0::0:2]", "[2001:DB8:0:0:1:0:0:1]", "[::12345]", "999.1.1.1",
             "a.1.", "XN--bcher-kva.example", "\u212a.example", "b\u00fccher.example"]  # fmt: skip
    ports = ["", ":80", ":443", ":00", ":0080", ":65535", ":65536", ":8o"]
    schemes = ["http", "https", "HTTP", "Https", "ftp"]
    urls = [
        f"{rng.choice(schemes)}://{host}{rng.choice(ports)}{rng.choice(['', '/'])}"
        for host in hosts
        for _ in range(20)
    ]
    script = "u => { try { return new URL(u).origin } catch { return '' } }"
    script = f"JSON.stringify(JSON.parse(process.argv[1]).map({script}))"
    argv = ["node", "-p", script, json.dumps(urls)]
    told = json.loads(subprocess.run(argv, capture_output=True, check=True).stdout)
    taken = [
        (url, ours, node)
        for url, node in zip(urls, told, strict=True)
        if (ours := gateway.origin_of(url))
    ]
    assert len(taken) > 50
    assert [row for row in taken if row[1] != row[2]] == []


def test_a_name_in_other_letters_is_refused_with_a_way_out() -> None:
    """Browsers and Python's IDNA (of 2003) disagree about the punycode of some."""
    for url in ("https://bücher.example", "https://ID.ЕXAMPLE", "http://ß.example"):
        with pytest.raises(SettingsError, match="punycode: xn--") as refused:
            Settings(public_url=url, **ABROAD)
        assert url in str(refused.value)


@pytest.mark.parametrize(
    "url", ["http://127.1", "http://0x7f.1", "http://1.2.3.4.5", "http://a.1.", "http://[::1%251]",
            "http://[1:2:3]", "http://h:0", "http://h:65536", "http://h:"],
)  # fmt: skip
def test_what_is_no_host_to_a_browser_or_not_as_it_would_write_it(url: str) -> None:
    assert gateway.origin_of(url) == ""
    with pytest.raises(SettingsError, match=r"public_url.*allowed"):
        Settings(public_url=url, **ABROAD)


def test_the_name_by_host_and_port_is_spelled_likewise() -> None:
    assert Settings(host="LocalHost", port=80).issuer == "localhost"
    assert Settings(host="0:0::1").issuer == "[::1]:5000"
    with pytest.raises(SettingsError, match="host"):
        Settings(host="127.1")  # to a browser 127.0.0.1


# -- Who wins -----------------------------------------------------------------


@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize("in_environment", [False, True])
@pytest.mark.parametrize("in_options", [False, True])
def test_later_source_wins(
    toml: Callable[[str], str],
    run: Callable[..., Ended],
    monkeypatch: pytest.MonkeyPatch,
    in_file: bool,
    in_environment: bool,
    in_options: bool,
) -> None:
    """Default, file, environment, option: through the real command line."""
    expected, argv = 5000, ["settings"]
    if in_file:
        expected = 5001
        argv += ["--config", toml("port = 5001")]
    if in_environment:
        expected = 5002
        monkeypatch.setenv("GATEWAY_PORT", "5002")
    if in_options:
        expected = 5003
        argv += ["--port", "5003"]
    ended = run(*argv)
    assert ended.status == 0
    [line] = [line for line in ended.out.splitlines() if line.split()[0] == "port"]
    assert line.split()[2] == str(expected)


def test_sources_add_up(toml: Callable[[str], str]) -> None:
    """What a later source does not name stays as the earlier one had it."""
    path = toml('port = 5001\nthreads = 7\nmt_sender = "file"')
    environ = {"GATEWAY_CONFIG": path, "GATEWAY_THREADS": "8", "GATEWAY_MT_SENDER": "env"}
    loaded = gateway.load_settings({"mt_sender": "option"}, environ)
    assert (loaded.port, loaded.threads, loaded.mt_sender) == (5001, 8, "option")
    assert loaded == Settings(port=5001, threads=8, mt_sender="option")


def test_option_config_wins_over_the_environment(toml: Callable[[str], str]) -> None:
    environ = {"GATEWAY_CONFIG": "/nowhere/at/all"}
    assert gateway.load_settings({}, environ, toml("port = 5001")).port == 5001


@pytest.mark.parametrize("source", ["option", "environment", "file"])
def test_the_home_directory_is_expanded(
    source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A folder named "~" was made, with the keys in it; whoever removes it may lose their home."""
    monkeypatch.setenv("HOME", str(tmp_path))
    values = {"data_dir": "~/data", "keys_dir": "~/keys"}
    (tmp_path / "file.toml").write_text("".join(f'{k} = "{v}"\n' for k, v in values.items()))
    loaded = gateway.load_settings(
        values if source == "option" else {},
        {f"GATEWAY_{k.upper()}": v for k, v in values.items()} if source == "environment" else {},
        "~/file.toml" if source == "file" else "",
    )
    assert (loaded.data_dir, loaded.keys_dir) == (f"{tmp_path}/data", f"{tmp_path}/keys")
    loaded = gateway.load_settings({"data_dir": "a~b", "mo_verifier": "~"}, {})
    assert (loaded.data_dir, loaded.mo_verifier) == ("a~b", "~")


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    """Windows' editors write one."""
    path = tmp_path / "file.toml"
    path.write_bytes(b"\xef\xbb\xbfport = 5001\r\n")
    assert gateway.load_settings({}, {"GATEWAY_CONFIG": str(path)}).port == 5001


def test_other_variables_are_none_of_ours() -> None:
    environ = {"PORT": "1", "XGATEWAY_PORT": "2", "GATEWAYPORT": "3", "PATH": "/bin"}
    assert gateway.load_settings({}, environ) == Settings()


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("host", "localhost", "localhost"),
        ("mt_sender", "12345", "12345"),  # a text stays one
        ("mt_sender", "null", "null"),
        ("port", "8080", 8080),
        ("display_version", "false", False),
        ("allowed_origins", '["https://a.example"]', ["https://a.example"]),
        ("mt_sender_map", '{"310": "+1555", "20810": "x"}', {"310": "+1555", "20810": "x"}),
        ("sms_inbound", "null", None),
        ("sms_inbound", "[]", []),
        ("resend_gaps_s", "[0]", [0]),
        ("store_max_bytes", "10000000", 10_000_000),
    ],
)
def test_text_of_environment_and_option(name: str, text: str, expected: object) -> None:
    for loaded in (
        gateway.load_settings({}, {f"GATEWAY_{name.upper()}": text}),
        gateway.load_settings({name: text}, {}),
    ):
        assert getattr(loaded, name) == expected


def test_tables_in_toml(toml: Callable[[str], str]) -> None:
    path = toml('[mt_sender_map]\n310 = "+1555"\n[[sms_providers]]\nkind = "outbox"\n')
    loaded = gateway.load_settings({}, {}, path)
    assert loaded == Settings(mt_sender_map={"310": "+1555"})


# -- What is refused ----------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", 0),
        ("port", -1),
        ("port", 65536),
        ("port", "5000"),
        ("port", 5000.0),
        ("port", True),  # an int, as Python sees it
        ("port", None),
        ("workers", 0),
        ("threads", 0),
        ("request_max_bytes", 0),
        ("request_max_bytes", -1),
        ("short_code_digits", 0),
        ("short_code_digits", 1000),
        ("long_code_bytes", 0),
        ("code_tries", 0),
        ("code_tries", 256),  # one byte in the record
        ("code_ttl_s", 0),
        ("session_ttl_s", 0),  # would be "for ever" in the store
        ("verified_ttl_s", -1),  # would be "keep the old one" in the store
        ("certificate_max_s", 0),
        ("hawk_skew_s", -1),
        ("sends_per_session", -1),
        ("sends_per_session", 256),  # one byte in the record
        ("sends_per_hour", -1),
        ("limits", "on"),
        ("limits", True),
        ("sends_per_number", 5),
        ("sends_per_number", "5"),
        ("sends_per_number", "0/day"),
        ("sends_per_number", "5/week"),
        ("sends_per_number", "5/day\n"),
        ("unverified_per_address", "1.5/day"),
        ("registers_per_address", "off"),
        ("unverified_per_destination", "50/day"),
        ("unverified_per_destination", {"GB": "50/day"}),  # the others would have no limit
        ("unverified_per_destination", {"*": "50/day", "44": "9/day"}),
        ("unverified_per_destination", {"*": "50/day", "gb": "9/day"}),
        ("spend_per_day", 0),
        ("spend_per_day", 0.1),  # less than one message to where it is dearest: 4 × 0.05
        ("sms_price", {"GB": 0.05}),
        ("sms_price", {"*": -1.0}),
        ("sms_price", {"*": "cheap"}),
        ("sms_price", {"*": 0.05, "+44": 0.05}),
        ("resend_gaps_s", []),  # there is always a gap, if only of 0
        ("resend_gaps_s", 30),
        ("resend_gaps_s", ["30"]),
        ("resend_gaps_s", [30, -1]),
        ("resend_gaps_s", [30, 3601]),
        ("resend_gaps_s", [30.0]),
        ("resend_gaps_s", [True]),
        ("resend_gaps_s", [None]),
        ("resend_gaps_s", [[30]]),
        ("resend_gaps_s", None),
        ("store_max_bytes", 0),  # no limit, to the store
        ("store_max_bytes", 9_999_999),
        ("store_max_bytes", -1),
        ("store_max_bytes", "50%"),
        ("display_version", 1),
        ("display_version", "true"),
        ("host", 127),
        ("host", None),
        ("mt_sender", None),
        ("data_dir", 5),
        ("allowed_origins", "*"),  # would match letter by letter
        ("allowed_origins", ["null"]),
        ("allowed_origins", [1]),
        ("allowed_origins", [None]),
        ("mt_sender_map", {"31": "x"}),
        ("mt_sender_map", {"3101": "x"}),
        ("mt_sender_map", {"3101234": "x"}),
        ("mt_sender_map", {"": "x"}),
        ("mt_sender_map", {"US": "x"}),
        ("mt_sender_map", {"٣١٠": "x"}),
        ("mt_sender_map", {"310": 5}),
        ("mo_verifier_map", {"310": None}),
        ("mo_verifier_map", ["310"]),
    ],
)
def test_impossible_value_is_named(name: str, value: object) -> None:
    """The text has the setting, its value, and what is allowed."""
    with pytest.raises(SettingsError) as refused:
        Settings(**{name: value})  # type: ignore[arg-type]
    text = str(refused.value)
    assert text.startswith(name)
    before, _, allowed = text.partition("allowed: ")
    assert json.dumps(value, ensure_ascii=False) in before
    assert allowed


def test_zero_means_for_ever_where_the_contract_says_so() -> None:
    assert Settings(verified_ttl_s=0).verified_ttl_s == 0


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("port", "http"),
        ("port", ""),
        ("port", "5.5"),
        ("port", "0x1388"),
        ("port", "1_000"),
        ("port", "NaN"),
        ("port", "true"),
        ("port", "null"),
        ("port", "70000"),
        ("port", "٥٠٠٠"),
        ("display_version", "yes"),
        ("display_version", "False"),
        ("display_version", "0"),
        ("allowed_origins", "https://app.example"),
        ("allowed_origins", "*"),
        ("mt_sender_map", "310=+1555"),
        ("mt_sender_map", "[]"),
        ("mt_sender_map", "null"),
        ("resend_gaps_s", "30"),
        ("resend_gaps_s", "30,60"),
        ("resend_gaps_s", "[]"),
        ("store_max_bytes", "10MB"),
    ],
)
def test_impossible_text_is_named(run: Callable[..., Ended], name: str, text: str) -> None:
    """The same from the environment (by its variable) and from an option (by its name)."""
    option = "--" + name.replace("_", "-")
    ended = run("settings", f"{option}={text}")
    assert (ended.status, ended.out) == (2, "")
    assert option in ended.err or name in ended.err
    assert text in ended.err
    assert "allowed" in ended.err
    variable = "GATEWAY_" + name.upper()
    with pytest.raises(SettingsError) as refused:
        gateway.load_settings({}, {variable: text})
    assert variable in str(refused.value) or name in str(refused.value)
    assert text in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        'port = "5000"',
        "port = 70000",
        "port = 2026-11-22",  # a date has no JSON form to be shown in
        "display_version = 1",
        "allowed_origins = [2026-11-22]",
        "mt_sender_map = { 310 = 12:00:00 }",
        "mt_sender = { 310 = 'x' }",
        "workers = inf",
        "sms_providers = [2026-11-22]",
        "sms_providers = [{ kind = 2026-11-22 }]",
        "sms_inbound = 'nexmo'",
    ],
)
def test_impossible_value_in_a_file(
    run: Callable[..., Ended], toml: Callable[[str], str], text: str
) -> None:
    ended = run("settings", "--config", toml(text))
    assert (ended.status, ended.out) == (2, "")
    assert text.split()[0] in ended.err
    assert "allowed" in ended.err


@pytest.mark.parametrize(
    "text",
    [
        "limit_s = 5",  # no such setting
        "Port = 5000",
        "PORT = 5000",
        '"port " = 5000',
        "[server]\nport = 5000",  # a table that we don't have
        "config = 'other.toml'",
        'command = "demo"',
        "_check = 1",
        "inbound = []",  # a property, not a setting
        "base_url = 'http://localhost'",
    ],
)
def test_unknown_name_in_a_file(
    run: Callable[..., Ended], toml: Callable[[str], str], text: str
) -> None:
    ended = run("settings", "--config", toml(text))
    assert (ended.status, ended.out) == (2, "")
    name = text.split("=")[0].split("]")[0].strip('[" ')
    assert name in ended.err


@pytest.mark.parametrize("variable", ["GATEWAY_PROT", "GATEWAY_", "GATEWAY_PORT_", "GATEWAY__PORT"])
def test_unknown_name_in_the_environment(
    run: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "5000")
    ended = run("settings")
    assert (ended.status, ended.out) == (2, "")
    assert variable in ended.err


@pytest.mark.parametrize(
    "option",
    [
        "--prot=5001",
        "--por=5001",  # argparse guesses; a later setting would change what is meant
        "--sms-prov=[]",
        "--request_max_bytes=9000",  # dashes, says the contract
        "-p",
        "--",
    ],
)
def test_unknown_option(run: Callable[..., Ended], option: str) -> None:
    ended = run("settings", option, "x") if option == "--" else run("settings", option)
    assert (ended.status, ended.out) == (2, "")
    assert ended.err


@pytest.mark.parametrize(
    "url",
    [
        "mysql://h/db",
        "localhost:6379",
        "redis",
        "://",
        "redis:/h",
        "redis://h:port",
        "redis://[::1",
    ],
)
def test_storage_url_that_nothing_reads(keys_dir: str, url: str) -> None:
    """Refused at the start, not with a 500 to every client."""
    with pytest.raises(SettingsError, match="storage_url"):
        gateway.create_app(Settings(storage_url=url, keys_dir=keys_dir, data_dir=keys_dir))


@pytest.mark.parametrize(
    "url", ["redis://h", "redis://u:p@h:6379/2", "rediss://h:6380", "unix:///run/valkey.sock?db=1"]
)
def test_storage_url_that_is_read(keys_dir: str, url: str) -> None:
    """Nothing is connected to before the first request."""
    settings = Settings(storage_url=url, keys_dir=keys_dir, data_dir=keys_dir)
    app = gateway.create_app(settings)
    assert app.gateway.storage.url == url


# -- Where we are and what we are called ----------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "https://id.example/gateway",
        "https://id.example/?a=b",
        "https://id.example?",
        "https://id.example#x",
        "https://user@id.example",
        "https://user:pw@id.example",
        "https://@id.example",
        "//id.example",
        "id.example",
        "ftp://id.example",
        "javascript:alert(1)",
        "https://",
        "https://:443",
        "https:///",
        "https:id.example",
        "https://id.example:port",
        "https://id.example:99999",
        "https://id.example:-1",
        "https://[::1",
        "https://::1",
        "https://id example",
        "https://id.example\\x",
        "https://id.example\n",
        "\thttps://id.example",
        " https://id.example",
        "https://id.example\r\nX-Evil: 1",
        'https://id.example"onclick=',
    ],
)
def test_bad_public_url(url: str) -> None:
    with pytest.raises(SettingsError, match=r"public_url.*allowed"):
        Settings(public_url=url, **ABROAD)


@pytest.mark.parametrize("host", ["", "0.0.0.0", "::", "0", "::0", "0:0:0:0:0:0:0:0", "[::]"])
def test_wildcard_host_needs_a_public_url(host: str) -> None:
    """Else clients would be sent to http://0.0.0.0:5000; it has more than one spelling."""
    with pytest.raises(SettingsError, match=r"host.*allowed"):
        Settings(host=host, **ABROAD)


@pytest.mark.parametrize(
    "host", ["127.0.0.1:5000", "http://localhost", "localhost/", "[::1", "a b", "user@h", "h\n"]
)
def test_host_that_is_none(host: str) -> None:
    """The likeliest is a port or a scheme too many."""
    with pytest.raises(SettingsError, match=r"host.*allowed"):
        Settings(host=host, **ABROAD)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])
def test_wildcard_host_with_a_public_url(host: str) -> None:
    settings = Settings(host=host, public_url="https://id.example", **ABROAD)
    assert settings.issuer == "id.example"


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.255.255.254", "::1", "[::1]", "localhost", "LOCALHOST"]
)
def test_loopback(host: str) -> None:
    assert gateway.is_loopback(host)


@pytest.mark.parametrize(
    "host",
    [
        "", "0.0.0.0", "::", "192.0.2.1", "10.0.0.1", "128.0.0.1", "id.example",
        "localhost.example", "notlocalhost", "127.0.0.1.example", "127.0.0.1:5000", "1.0.0.127",
        "169.254.0.1", "fe80::1", "::2", "127", "2130706433", "0x7f.1", "١٢٧.0.0.1",
        "localhost\n", "localhost, 192.0.2.1", "::ffff:192.0.2.1",
    ],
)  # fmt: skip
def test_not_loopback(host: str) -> None:
    """Whatever is in doubt is not this machine alone."""
    assert not gateway.is_loopback(host)


ELSEWHERE: list[dict[str, Any]] = [
    {"host": "192.0.2.1"},
    {"host": "192.0.2.1", "public_url": "http://localhost:5000"},
    {"public_url": "https://id.example"},
    {"public_url": "https://localhost.example"},
    {"public_url": "http://192.0.2.1:5000"},
    {"host": "0.0.0.0", "public_url": "http://127.0.0.1:5000"},
    {"host": "::", "public_url": "https://id.example"},
]


@pytest.mark.parametrize("place", ELSEWHERE)
@pytest.mark.parametrize(
    "providers",
    [
        [{"kind": "outbox"}],
        [*ABROAD["sms_providers"], {"kind": "outbox", "priority": -1}],  # as the last resort
    ],
)
def test_outbox_stays_on_loopback(place: dict[str, Any], providers: list[gateway.Json]) -> None:
    with pytest.raises(SettingsError, match="outbox"):
        Settings(**place, sms_providers=providers, sms_inbound=[])


@pytest.mark.parametrize("place", ELSEWHERE)
def test_webhook_off_loopback_needs_a_secret(place: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="sms_inbound"):
        Settings(**{**place, **ABROAD, "sms_inbound": [{"kind": "nexmo"}]})


@pytest.mark.parametrize("outbox", [[], [{"kind": "outbox", "priority": -1}]])
def test_webhook_where_messages_cost_money_needs_a_secret(outbox: list[gateway.Json]) -> None:
    """Also on loopback, which every web page that is open there can call."""
    providers = [*ABROAD["sms_providers"], *outbox]
    for open_to_all in ({"kind": "nexmo"}, {"kind": "http"}):
        with pytest.raises(SettingsError, match="sms_inbound"):
            Settings(sms_providers=providers, sms_inbound=[open_to_all])
    closed = [{"kind": "nexmo", "path_secret": "right"}]
    assert Settings(sms_providers=providers, sms_inbound=closed).inbound == closed
    assert not Settings(sms_providers=providers).at_a_desk


@pytest.mark.parametrize(
    "entry",
    [
        {"kind": "nexmo", "path_secret": ""},  # named but empty: open to everybody
        {"kind": "nexmo", "signature_secret": ""},
        {"kind": "nexmo", "path_secret": None},
        {"kind": "nexmo", "path_secret": False},
        {"kind": "nexmo", "secret": "x"},
        {"kind": "nexmo", "Path_Secret": "x"},
        {"kind": "beepsend"},  # the second of two
    ],
)
def test_open_webhook_off_loopback(entry: gateway.Json) -> None:
    values = {**ABROAD, "sms_inbound": [{"kind": "twilio", "path_secret": "right"}, entry]}
    with pytest.raises(SettingsError, match="sms_inbound"):
        Settings(public_url="https://id.example", **values)


@pytest.mark.parametrize("place", ELSEWHERE)
@pytest.mark.parametrize("field", ["path_secret", "signature_secret"])
def test_webhook_off_loopback_with_a_secret(place: dict[str, Any], field: str) -> None:
    inbound = [{"kind": "nexmo", field: "right"}]
    settings = Settings(**{**place, **ABROAD, "sms_inbound": inbound})
    assert settings.inbound == inbound


@pytest.mark.parametrize(
    "values",
    [
        {"sms_providers": []},
        {"sms_providers": "outbox"},
        {"sms_providers": ["outbox"]},
        {"sms_providers": [{}]},
        {"sms_providers": [{"kind": 5}]},
        {"sms_providers": [{"kind": "carrier pigeon"}]},
        {"sms_providers": [{"kind": "outbox", "folder": "/tmp"}]},  # no field of it
        {"sms_providers": [{"kind": "outbox", "priority": "high"}]},
        {"sms_providers": [{"kind": "nexmo"}]},
        {"sms_providers": [{"kind": "nexmo", "api_key": "k"}]},
        {"sms_providers": [{"kind": "nexmo", "api_key": "k", "api_secret": 5}]},
        {"sms_inbound": [{}]},
        {"sms_inbound": ["nexmo"]},
        {"sms_inbound": {"kind": "nexmo"}},
        {"sms_inbound": [{"kind": "nexom", "path_secret": "x"}]},  # would open no webhook
        {"sms_inbound": [{"kind": "nexmo", "signature-secret": "x"}]},  # would check nothing
        {"sms_inbound": [{"kind": "http", "path_secret": "a/b"}]},  # never one segment of a path
        {"sms_inbound": [{"kind": "http", "path_secret": s} for s in "ab"]},  # b would not count
        {"allowed_origins": ["https://a.example/"]},  # no browser says that
        {"allowed_origins": ["x y"]},
        {"allowed_origins": [""]},
        {"mt_sender": "a\r\nb"},
        {"host": "0.0"},  # old spellings of 0.0.0.0
        {"host": "00"},
        {"host": "0x0.0"},
    ],
)
def test_values_that_could_never_work(make_app: Callable[..., Any], values: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=next(iter(values))):
        make_app(**values)


NEXMO_ENTRY = {"kind": "nexmo", "api_key": "hunter2", "api_secret": "hunter2"}


@pytest.mark.parametrize(
    ("name", "entry", "told"),
    [
        ("sms_providers", {"kind": "vonage"}, '[1].kind is "vonage"; allowed: outbox, nexmo'),
        ("sms_providers", {}, "sms_providers[1].kind is null; allowed: outbox, nexmo, twilio,"),
        ("sms_providers", {**NEXMO_ENTRY, "timeout_s": 13}, "sms_providers[1].timeout_s is 13;"),
        ("sms_providers", {**NEXMO_ENTRY, "api_secret": 5}, 'sms_providers[1].api_secret is "…";'),
        ("sms_providers", {**NEXMO_ENTRY, "receipts": "x"}, 'receipts is "x"; allowed: true,'),
        ("sms_providers", {"kind": "kannel", "username": "hunter2"}, "required field `endpoint`"),
        ("sms_providers", {**NEXMO_ENTRY, "secret": "hunter2"}, "unknown field `secret`"),
        ("sms_providers", {"kind": "http", "endpoint": "https://h/hunter2", "headers": {"a": 5}},
         'sms_providers[1].headers is "…"; allowed: texts by name'),
        ("sms_inbound", {"kind": "http", "path_secret": "hunter2/"}, 'secret is "…"; allowed: a'),
        ("sms_inbound", {"kind": "sns"}, 'sms_inbound[1].kind is "sns"; allowed: nexmo, twilio,'),
    ],
)  # fmt: skip
def test_a_refused_entry_is_named_by_its_place(
    run: Callable[..., Ended], toml: Callable[[str], str], name: str, entry: gateway.Json, told: str
) -> None:
    """With the field, its value unless that may be secret, and what is allowed; by each command."""
    first = {"kind": "outbox"} if name == "sms_providers" else {"kind": "kannel"}
    ended = run("settings", "--" + name.replace("_", "-"), json.dumps([first, entry]))
    assert (ended.status, ended.out) == (2, "")
    assert told in ended.err
    assert "hunter2" not in ended.err


def test_what_is_no_secret_in_an_entry_is_shown() -> None:
    entry = {**NEXMO_ENTRY, "receipts": False, "timeout_s": 2, "priority": 5}
    shown = json.loads(Settings(sms_providers=[entry]).shown("sms_providers"))
    assert shown == [{**entry, "api_key": "…", "api_secret": "…"}]


def test_settings_go_to_other_processes_and_stay_checked() -> None:
    settings = Settings(port=5001, sms_providers=[NEXMO_ENTRY], public_url="http://LOCALHOST:80")
    assert pickle.loads(pickle.dumps(settings)) == settings
    changed = msgspec.structs.replace(settings, port=5002)
    assert (changed.port, changed.issuer) == (5002, "localhost")
    with pytest.raises(SettingsError, match="port is 0"):
        msgspec.structs.replace(settings, port=0)
    with pytest.raises(TypeError, match="prot"):
        Settings(prot=1)  # type: ignore[call-arg]


def test_the_page_has_the_entries_as_they_are_declared() -> None:
    """A line for each kind: what it needs, what it may have. It fails with the right lines."""
    common = gateway.declared(gateway.Provider).keys()
    page = re.sub(r" \([^|]*?\)|;? ?keys where[^|]*(?= )", "", PAGE)
    for kind, declaration in gateway.SMS_LISTS["sms_providers"].items():
        fields = [f for f in msgspec.structs.fields(declaration) if f.name not in common]
        needs = ", ".join(f"`{f.name}`" for f in fields if f.required)
        may = ", ".join(f"`{f.name}`" for f in fields if not f.required)
        row = re.sub(" +", " ", f"| `{kind}` | {needs} | {may} |")
        assert row in page, row
    assert all(f"`{name}` ({default:g}, " in PAGE for name, default in
               (("connect_timeout_s", 2), ("timeout_s", 5)))  # fmt: skip
    for kind, declaration in gateway.SMS_LISTS["sms_inbound"].items():
        [row] = re.findall(rf"^\| .*`{kind}`.* \| (.*) \|$", page.partition("told from")[2], re.M)
        names = gateway.declared(declaration).keys() - {"kind"}
        assert names == set(re.findall(r"`(\w+_secret|fields|country)`", row)), kind


# -- Secrets ------------------------------------------------------------------

NEXMO = 'kind = "nexmo", api_key = "k"'


@pytest.mark.parametrize(
    "text",
    [
        'storage_url = "redis://user:hunter2@h:6379/0"',
        'storage_url = "rediss://:p@hunter2@h"',
        'storage_url = "redis://:p/hunter2@h:6379/0"',  # a slash in a password
        'storage_url = "redis://h:6379/0?password=hunter2"',  # redis-py reads it there too
        'storage_url = "unix://:hunter2@/run/valkey.sock"',
        'storage_url = "unix:///run/valkey.sock?db=1&password=hunter2"',
        'storage_url = ["redis://:hunter2@h"]',
        'storage_url = "redis:user:hunter2@h"',
        'storage_url = "redis:/:hunter2@h:6379"',
        'storage_url = "postgres:u:hunter2@h"',
        'storage_url = "redis://u:hun\\nhunter2@h"',
        'master_secret = "hunter2"',
        'master_secret = ["hunter2"]',
        "master_secret = hunter2",  # no TOML at all
        'public_url = "https://user:hunter2@id.example"',
        f'sms_providers = [{{{NEXMO}, api_secret = "hunter2"}}]',
        'sms_providers = [{kind = "nexmo", api_key = "hunter2"}]',
        f'sms_providers = [{{{NEXMO}, api_secret = "s", endpoint = "https://u:hunter2@h/"}}]',
        f'sms_providers = [{{{NEXMO}, api_secret = "s", endpoint = "https://h/?k=hunter2"}}]',
        f'[sms_providers]\n{NEXMO.replace(", ", chr(10))}\napi_secret = "hunter2"',  # one [ too few
        'sms_providers = "nexmo hunter2"',
        'sms_providers = [["nexmo", "hunter2"]]',
        'sms_providers = [{api_secret = "hunter2"}]',
        'sms_inbound = [{kind = "nexmo", path_secret = "hunter2"}]',
        'sms_inbound = [{kind = "nexmo", signature_secret = "hunter2"}]',
        '[sms_inbound]\nkind = "nexmo"\npath_secret = "hunter2"',
    ],
)
def test_secret_is_never_shown(
    run: Callable[..., Ended], toml: Callable[[str], str], text: str
) -> None:
    """Not in a table, a file to start from, a repr or a refusal; right or wrong as it is."""
    path = toml(text)
    for argv in (["settings"], ["settings", "--toml"]):
        ended = run(*argv, "--config", path)
        assert ended.out or ended.err
        assert "hunter2" not in ended.out + ended.err
    try:
        shown = repr(gateway.load_settings({}, {}, path))
    except SettingsError as refused:
        shown = repr(refused)
    assert "hunter2" not in shown


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("sms_providers", '[{"kind": "nexmo", "api_secret": "hunter2"'),  # a bracket is missing
        ("sms_providers", '{"kind": "nexmo", "api_secret": "hunter2"}'),
        ("sms_inbound", '"hunter2"'),
        ("master_secret", "hunter2"),
        ("storage_url", "redis://:hunter2@h:6379:6379"),
    ],
)
def test_secret_in_a_refused_text_is_not_shown(
    run: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    ended = run("settings", "--" + name.replace("_", "-"), text)
    assert "hunter2" not in ended.out + ended.err
    monkeypatch.setenv("GATEWAY_" + name.upper(), text)
    ended = run("settings")
    assert "hunter2" not in ended.out + ended.err


def test_master_secret_is_hidden_and_used() -> None:
    settings = Settings(master_secret="c0ffee" * 10 + "beef")
    assert "c0ffee" not in repr(settings) + settings.shown("master_secret")
    assert gateway.load_master_secret(settings)[0].hex() == "c0ffee" * 10 + "beef"
    large = Settings(master_secret="C0FFEE" * 10 + "BEEF")
    assert gateway.load_master_secret(large) == gateway.load_master_secret(settings)


@pytest.mark.parametrize("length", [1, 32, 63, 65, 128])
def test_master_secret_has_64_digits(length: int) -> None:
    with pytest.raises(SettingsError, match="master_secret"):
        Settings(master_secret="a" * length)


# -- The command line ---------------------------------------------------------


@pytest.mark.parametrize("word", ["--prot", "--storge-url", "--prot=80", "--"])
def test_an_unknown_option_is_named_and_not_its_value(run: Callable[..., Ended], word: str) -> None:
    ended = run(word, "80")
    assert (ended.status, ended.out) == (2, "")
    assert word.partition("=")[0] in ended.err.splitlines()[-1]
    assert "80" not in ended.err


@pytest.mark.parametrize(
    "words", ["--leaked", "settings --send +447700900123", "demo --users 5", "check +447700900123"]
)
def test_what_a_command_does_not_take_is_refused(run: Callable[..., Ended], words: str) -> None:
    """A forgotten command would start a server; nobody would be told that nothing was done."""
    ended = run(*words.split())
    assert (ended.status, ended.out) == (2, "")
    assert " takes no " in ended.err.splitlines()[-1]


@pytest.mark.parametrize(("command", "number"), [("check", ""), ("block", " NUMBER")])
def test_help_of_a_command_is_about_it(
    run: Callable[..., Ended], command: str, number: str
) -> None:
    told = run(command, "--help").out
    assert told.startswith(f"usage: gateway.py {command}{number} [--SETTING ...]\n")
    assert "rotate-keys" not in told
    assert ("--send NUMBER" in told) == (command == "check")


def test_help_says_what_each_command_does(run: Callable[..., Ended]) -> None:
    told = run("--help").out
    for command in gateway._COMMANDS:
        assert len(told.split(f"\n  {command} ")) == 2


@pytest.mark.slow
@pytest.mark.parametrize("command", ["demo", "memory --users=2000000"])
def test_ctrl_c_ends_a_command_without_a_traceback(command: str, tmp_path: Path) -> None:
    port = str(free_port())
    argv = [sys.executable, "-u", "gateway.py", *command.split(), "--port", port]
    with subprocess.Popen(
        argv, cwd=lab.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while not psutil.Process(process.pid).children():  # a gateway or a store of its own
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=20 * shared())
    assert process.returncode == 130
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("50000 100000", 1), ("150000 100000", 1), ("100000 100000", 1), ("max 100000", 5),
     ("300000 100000", 3), ("900000 100000", 5), ("", 5), (None, 5)],
)  # fmt: skip
def test_a_container_may_have_a_share_of_the_cpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str | None, expected: int
) -> None:
    """64 workers on the one CPU that a pod was given would be 4 GB for nothing."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(5)))
    monkeypatch.setattr(os, "cpu_count", lambda: 5)  # elsewhere than on Linux
    monkeypatch.setattr(gateway, "_CPU_MAX", tmp_path / "cpu.max")
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota + "\n")
    assert gateway._cpus() == expected


@pytest.mark.parametrize(
    ("limit", "shared"),
    [("1073741824", True), ("max", False), ("9223372036854771712", False), ("", False),
     ("1e9", False), (None, False)],
)  # fmt: skip
def test_a_container_may_have_a_share_of_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str | None, shared: bool
) -> None:
    """Half of the machine's would be more than the pod has: it is killed, not full."""
    monkeypatch.setattr(gateway, "_MEMORY_MAX", tmp_path / "memory.max")
    if limit is not None:
        (tmp_path / "memory.max").write_text(limit + "\n")
    there = psutil.virtual_memory().total
    expected = int(limit) if shared and limit else there
    assert abs(gateway._memory_bytes() - expected) <= 0.001 * expected


def test_store_may_use_half_of_the_memory() -> None:
    assert Settings().store_max_bytes == gateway._memory_bytes() // 2


@pytest.mark.slow
def test_nothing_is_printed_where_nobody_is() -> None:
    argv = f"exec '{sys.executable}' gateway.py settings >&-"
    ended = subprocess.run(["/bin/sh", "-c", argv], cwd=lab.ROOT, capture_output=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, b"")


# -- The command "settings" ---------------------------------------------------


def test_table_lists_every_setting_with_its_value(run: Callable[..., Ended]) -> None:
    ended = run("settings", "--mt-sender", "Test 1", "--mt-sender-map", '{"310": "+1555"}')
    assert (ended.status, ended.err) == (0, "")
    lines = {line.split()[0]: line for line in ended.out.splitlines()}
    assert lines.keys() >= CONTRACT.keys() | {"sms_inbound", "master_secret", "store_max_bytes"}
    assert '"Test 1"' in lines["mt_sender"]
    assert '{"310": "+1555"}' in lines["mt_sender_map"]
    assert "86400" in lines["session_ttl_s"]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["settings", "messages", "generate-keypair", "demo"])
def test_commands_end_quietly_when_nobody_reads_on(command: str, tmp_path: Path) -> None:
    """``| head``: no traceback, and nothing is left half-done."""
    reader, writer = os.pipe()
    os.close(reader)
    port = str(free_port())
    argv = [sys.executable, "gateway.py", command, "--port", port, "--keys-dir", str(tmp_path)]
    ended = subprocess.run(
        argv, stdout=writer, stderr=subprocess.PIPE, cwd=lab.ROOT, text=True, check=False
    )
    os.close(writer)
    made = [path.name for path in tmp_path.iterdir()]
    assert (ended.returncode, made) == (1, ["browserid.pem"] * (command == "generate-keypair"))
    assert "Traceback" not in ended.stderr
    assert "Exception" not in ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize("command", ["settings", "messages", "--help"])
def test_commands_print_in_any_alphabet(command: str, encoding: str) -> None:
    argv = [sys.executable, "gateway.py", command]
    ended = subprocess.run(
        argv, capture_output=True, cwd=lab.ROOT, check=False,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert rb"\u2026" in ended.stdout or rb"\u05d4" in ended.stdout


def test_toml_of_the_defaults_loads_back(
    run: Callable[..., Ended], toml: Callable[[str], str]
) -> None:
    ended = run("settings", "--toml")
    assert (ended.status, ended.err) == (0, "")
    assert all(line[:1] in ("#", "") for line in ended.out.splitlines())  # all is as it is anyway
    assert gateway.load_settings({}, {}, toml(ended.out)) == Settings()
    active = [line.removeprefix("# ") for line in ended.out.splitlines() if " = " in line]
    names = {line.split(" = ")[0] for line in active}
    assert names >= CONTRACT.keys()


def test_toml_with_its_marks_removed_loads_back(
    run: Callable[..., Ended], toml: Callable[[str], str]
) -> None:
    """Somebody who makes every line active gets the gateway that was described."""
    names = gateway.declared(Settings).keys() - {"sms_inbound", "trusted_proxies"}
    lines = [line.removeprefix("# ") for line in run("settings", "--toml").out.splitlines()]
    text = "\n".join(line for line in lines if line.split(" = ")[0] in names)
    assert gateway.load_settings({}, {}, toml(text)) == Settings()


CHANGED: dict[str, Any] = {
    "host": "::1",
    "port": 5001,
    "public_url": "http://localhost:8080",
    "allowed_origins": ["https://a.example", "https://b.example"],
    "sms_inbound": [],
    "keys_dir": 'a "quoted" \\ back\\slash = # [x] Ünï ☎ 🎉',
    "mt_sender": "A & B.c-d_e",
    "mt_sender_map": {"310": "+1555", "20810": "q"},
    "test_numbers": {"+447700900001": "123456"},
    "mo_verifier_map": {"234": "+44770"},
    "verified_ttl_s": 0,
    "resend_gaps_s": [0, 3600],
    "limits": "record",
    "unverified_per_destination": {"*": "1/day", "GB": "9/hour"},
    "sms_price": {"*": 0.1, "1242": 0.2, "GB": 0.0},
    "spend_per_day": 0.5,
    "store_max_bytes": 10_000_000,
    "display_version": False,
}


@pytest.mark.parametrize("name", CHANGED)
def test_toml_of_a_change_loads_back(
    run: Callable[..., Ended], toml: Callable[[str], str], name: str
) -> None:
    value = CHANGED[name]
    text = value if isinstance(value, str) else json.dumps(value)
    ended = run("settings", "--toml", "--" + name.replace("_", "-"), text)
    assert ended.status == 0
    loaded = gateway.load_settings({}, {}, toml(ended.out))
    assert loaded == Settings(**{name: value})


def test_toml_without_its_secrets_loads_back(
    run: Callable[..., Ended], toml: Callable[[str], str]
) -> None:
    """A hidden value must not come back as the value “…”: it is a comment."""
    text = f"""
        port = 5001
        countries = ["GB"]
        mt_sender = "Shop"
        master_secret = "{"ab" * 32}"
        storage_url = "redis://:hunter2@h:6379/0"
        sms_providers = [{{kind = "nexmo", api_key = "k", api_secret = "hunter2"}}]
        sms_inbound = [{{kind = "nexmo", path_secret = "hunter2"}}]
        """
    ended = run("settings", "--toml", "--config", toml(text))
    assert ended.status == 0
    loaded = gateway.load_settings({}, {}, toml(ended.out))
    assert loaded.port == 5001
    assert "…" not in str(msgspec.structs.asdict(loaded))


# -- Exit status --------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [
        ["serv"],  # no such command
        ["settings", "serve"],  # two
        ["settings", "--port"],  # no value
        ["settings", "--port", "0"],
        ["settings", "--config", "/nowhere/gateway.toml"],
        ["settings", "--config", "/"],  # a folder
        ["settings", "--host", "0.0.0.0"],
        ["--host", "192.0.2.1"],  # serve, with the outbox
        ["demo", "--port", "x"],
        ["generate-keypair", "--algorithm", "ES"],
        ["generate-keypair", "--algorithm", "rs"],
    ],
)
def test_wrong_usage_ends_with_2(run: Callable[..., Ended], argv: list[str]) -> None:
    ended = run(*argv)
    assert (ended.status, ended.out) == (2, "")
    assert ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize("data", [b"port = ", b"\xff\xfe", b"port = 1\nport = 2", b"[[[", b"\0"])
def test_damaged_file_ends_with_2(
    run: Callable[..., Ended], tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(data)
    monkeypatch.setenv("GATEWAY_CONFIG", str(path))
    ended = run("settings")
    assert (ended.status, ended.out) == (2, "")
    assert str(path) in ended.err


def test_help_ends_with_0(run: Callable[..., Ended]) -> None:
    ended = run("--help")
    assert (ended.status, ended.err) == (0, "")
    for name in CONTRACT:
        assert "--" + name.replace("_", "-") in ended.out


def test_key_pair_is_made_once(run: Callable[..., Ended], tmp_path: Path) -> None:
    """0 and the public half on stdout; then 1, and the pair is as it was."""
    folder = tmp_path / "keys"
    argv = ("generate-keypair", "--keys-dir", str(folder))
    made = run(*argv)
    assert made.status == 0
    assert json.loads(made.out)["algorithm"] == "RS"
    assert made.err
    [path] = folder.iterdir()
    pem = path.read_bytes()
    again = run(*argv, "--algorithm", "DS")
    assert (again.status, again.out) == (1, "")
    assert str(path) in again.err
    assert path.read_bytes() == pem


def test_start_that_fails_ends_with_1(
    start_gateway: Callable[..., GatewayProcess], tmp_path: Path
) -> None:
    """A half-written master secret, met by a real process."""
    path = tmp_path / "keys" / "master.secret"
    path.parent.mkdir(mode=0o700)
    path.touch(0o600)
    path.write_text("c0ffee" * 5)
    process = start_gateway(wait=False)
    assert process.process.wait(20) == 1
    assert str(path) in process.output
    assert "Traceback" not in process.output
    assert "c0ffee" not in process.output
    assert path.read_text() == "c0ffee" * 5
    assert not (tmp_path / "data" / "appendonlydir").exists()


def test_wrong_usage_of_a_real_process_ends_with_2(
    start_gateway: Callable[..., GatewayProcess], tmp_path: Path
) -> None:
    process = start_gateway(wait=False, env={"GATEWAY_CODE_TRYS": "3"})
    assert process.process.wait(20) == 2
    assert "GATEWAY_CODE_TRYS" in process.output
    assert "Traceback" not in process.output
    assert not (tmp_path / "keys").exists()  # nothing was made


def test_a_module_without_its_data_says_so(tmp_path: Path) -> None:
    shutil.copy(ROOT / "gateway.py", tmp_path)
    command = [sys.executable, str(tmp_path / "gateway.py"), "--version"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("gateway.py needs its folder locale beside it: ")
    assert "Traceback" not in done.stderr
