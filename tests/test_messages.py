"""What a message says: languages, segments, the line for browsers, and who it comes from."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lab
import pytest
from babel import Locale
from babel.messages.catalog import Catalog
from babel.messages.mofile import read_mo, write_mo
from babel.messages.pofile import read_po
from babel.support import NullTranslations
from support import NUMBER, WsgiClient

import gateway

MakeClient = Callable[..., WsgiClient]
LOCALE = lab.ROOT / "locale"
ENGLISH = "Your verification code is: %(code)s"
TAGS = sorted(path.parts[-3] for path in LOCALE.glob("*/LC_MESSAGES/messages.po"))


def sentence(tag: str) -> str:
    """The one message in a catalogue's source; reviewed (not fuzzy), without plural."""
    with (LOCALE / tag / "LC_MESSAGES" / "messages.po").open("rb") as file:
        [message] = [message for message in read_po(file, tag) if message.id]
    assert (message.id, message.fuzzy) == (ENGLISH, False)
    assert isinstance(message.string, str)
    return message.string


# -- The catalogues -------------------------------------------------------------


def test_there_are_at_least_forty_languages() -> None:
    assert len(TAGS) >= 40
    assert len(gateway.load_catalogues()) == len(TAGS)


@pytest.mark.parametrize("tag", TAGS)
def test_catalogue(tag: str) -> None:
    """Compiled as it is written, in a plain form, under a name that CLDR knows."""
    assert str(Locale.parse(tag)) == tag
    text = sentence(tag)
    assert text.endswith(" %(code)s")
    assert unicodedata.is_normalized("NFC", text)
    assert not re.search(r"[\u200b-\u200f\u202a-\u202e\u2060-\u2069\xa0]", text)
    with (LOCALE / tag / "LC_MESSAGES" / "messages.mo").open("rb") as file:
        compiled = read_mo(file)
    assert [(m.id, m.string) for m in compiled if m.id] == [(ENGLISH, text)]


def test_no_two_languages_share_a_sentence_but_for_close_ones() -> None:
    """A catalogue that was copied from its neighbour and forgotten."""
    seen: dict[str, list[str]] = {}
    for tag in TAGS:
        seen.setdefault(sentence(tag), []).append(tag)
    assert [tags for tags in seen.values() if len(tags) > 1] == [["bs", "sr_Latn"]]


SCRIPTS = {
    "ar": "ARABIC", "be": "CYRILLIC", "bg": "CYRILLIC", "bn": "BENGALI", "el": "GREEK",
    "fa": "ARABIC", "gu": "GUJARATI", "he": "HEBREW", "hi": "DEVANAGARI", "hy": "ARMENIAN",
    "ka": "GEORGIAN", "kk": "CYRILLIC", "kn": "KANNADA", "ko": "HANGUL", "mk": "CYRILLIC",
    "ml": "MALAYALAM", "mn": "CYRILLIC", "mr": "DEVANAGARI", "ne": "DEVANAGARI", "pa": "GURMUKHI",
    "ru": "CYRILLIC", "sr": "CYRILLIC", "ta": "TAMIL", "te": "TELUGU", "th": "THAI",
    "uk": "CYRILLIC", "ur": "ARABIC", "zh_Hans": "CJK", "zh_Hant": "CJK",
}  # fmt: skip


@pytest.mark.parametrize("tag", TAGS)
def test_a_sentence_is_in_its_own_script(tag: str) -> None:
    letters = [c for c in sentence(tag).replace("%(code)s", "") if c.isalpha()]
    scripts = {unicodedata.name(letter).split()[0] for letter in letters}
    expected = (
        {"CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"}
        if tag == "ja"
        else {SCRIPTS.get(tag, "LATIN")}
    )
    assert scripts <= expected


@pytest.mark.parametrize("digits", [6, 10])
def test_all_fit_one_segment(digits: int) -> None:
    assert lab.catalogue_faults(digits=digits) == []
    for tag, catalogue in gateway.load_catalogues().items():
        text = gateway.message_text("8" * digits, catalogue)
        assert gateway.measure(text).segments == 1, tag
        assert text.splitlines()[0].split()[-1] == "8" * digits


@pytest.mark.parametrize(
    ("sentence", "named"),
    [
        ("Ihr Code", "last word"),
        ("Ihr Code: %s", "last word"),  # as in 2014
        ("Ihr Code: %(code)", "last word"),
        ("Ihr Code: %(pin)s", "last word"),
        ("Ihr Code: %(code)d", "last word"),
        ("Ihr Code: %(code)s.", "last word"),
        ("Ihr Code:%(code)s", "last word"),
        ("%(code)s ist Ihr Code", "last word"),
        ("%(code)s %(code)s", "last word"),
        ("100%% Ihr Code: %(code)s", "last word"),
        ("Ihr\nCode: %(code)s", "last word"),
        (ENGLISH, "not translated"),
        ("", "not translated"),
        ("x" * 154 + " %(code)s", "161 units of GSM-7"),
        ("€" * 77 + " %(code)s", "161 units of GSM-7"),
        ("ш" * 64 + " %(code)s", "71 units of UCS-2"),
    ],
)
def test_a_bad_catalogue_is_found(tmp_path: Path, sentence: str, named: str) -> None:
    catalogue = Catalog(locale="de")
    catalogue.add(ENGLISH, sentence)
    path = tmp_path / "de" / "LC_MESSAGES" / "messages.mo"
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        write_mo(file, catalogue)
    (fault,) = lab.catalogue_faults(tmp_path, 6)
    assert re.match(f"locale de: .*{named}", fault)


def test_the_command_prints_a_row_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--allowed-origins", '["https://a.example", "https://id.example.com"]']
    assert gateway.main(["messages", *options]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == len(TAGS) >= 40
    pattern = r"([a-z-]+) +(GSM-7|UCS-2) +(\d+) 1 (host line|-  +) \S.* 111111( ⏎ @id.+ #111111)?"
    for row in rows:
        found = re.fullmatch(pattern, row)
        assert found, row
        assert ("host" in found[4]) == bool(found[5])
        assert int(found[3]) <= (160 if found[2] == "GSM-7" else 70)
    assert rows == sorted(rows)


# -- Segments -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("", ("GSM-7", 0, 1)),
        ("a" * 160, ("GSM-7", 160, 1)),
        ("a" * 161, ("GSM-7", 161, 2)),
        ("a" * 306, ("GSM-7", 306, 2)),
        ("a" * 307, ("GSM-7", 307, 3)),
        ("€" * 80, ("GSM-7", 160, 1)),
        ("[]{}^~|\\\f€", ("GSM-7", 20, 1)),
        ("èéùìòÇØøÅåΔΩÆæßÉÄÖÑÜ§¿äöñüà@£$¥¡", ("GSM-7", 32, 1)),
        ("`", ("UCS-2", 1, 1)),  # in ASCII, though not in GSM-7
        ("ç", ("UCS-2", 1, 1)),  # only its capital is
        ("á" * 70, ("UCS-2", 70, 1)),
        ("á" * 71, ("UCS-2", 71, 2)),
        ("á" * 134, ("UCS-2", 134, 2)),
        ("á" * 135, ("UCS-2", 135, 3)),
        ("😀" * 35, ("UCS-2", 70, 1)),
        ("😀" * 36, ("UCS-2", 72, 2)),
        ("a" * 69 + "”", ("UCS-2", 70, 1)),
        ("\uffff" * 70, ("UCS-2", 70, 1)),  # the last one that is no surrogate pair
    ],
)
def test_segments(text: str, size: tuple[str, int, int]) -> None:
    assert gateway.measure(text) == size


def test_gsm7_has_its_127_characters() -> None:
    """128 places, of which one escapes to the extension table with its ten."""
    assert len(gateway.GSM7) == 127
    assert len(gateway.GSM7_TWICE) == 10
    assert not gateway.GSM7 & gateway.GSM7_TWICE


# -- The line for browsers ------------------------------------------------------


def test_host_line_is_the_last_and_the_code_still_ends_its_own() -> None:
    text = gateway.message_text("123456", NullTranslations(), "id.example")
    assert text == "Your verification code is: 123456\n@id.example #123456"


def test_host_line_is_dropped_before_a_second_segment() -> None:
    french = gateway.load_catalogues()["fr"]
    romanian = gateway.load_catalogues()["ro"]
    host = "verification.id.example.com"
    assert "@" in gateway.message_text("123456", french, host)
    assert "@" not in gateway.message_text("123456", romanian, host)
    for tag, catalogue in gateway.load_catalogues().items():
        text = gateway.message_text("1234567890", catalogue, "a" * 100)
        assert gateway.measure(text).segments == 1, tag


NEXMO = [{"kind": "nexmo", "api_key": "k", "api_secret": "s"}]
PAID: dict[str, Any] = {"sms_providers": NEXMO, "trusted_proxies": []}


@pytest.mark.parametrize(
    ("line", "origins", "origin", "host"),
    [
        ("auto", ["https://www.example.com"], "https://www.example.com", "www.example.com"),
        (
            "auto",
            ["https://www.example.com:8443"],
            "https://www.example.com:8443",
            "www.example.com",
        ),
        ("auto", ["https://www.example.com"], "https://evil.example", ""),  # not named
        ("auto", ["https://www.example.com"], "https://www.example.com.evil.example", ""),
        ("auto", ["*"], "https://www.example.com", ""),  # "*" names nobody
        ("auto", ["*", "https://www.example.com"], "https://www.example.com", "www.example.com"),
        ("auto", ["http://www.example.com"], "http://www.example.com", ""),  # not https
        ("auto", ["https://192.0.2.7"], "https://192.0.2.7", ""),  # FAULTS_A, D07: an address
        ("auto", ["https://[2001:db8::1]"], "https://[2001:db8::1]", ""),
        ("auto", ["https://[x"], "https://[x", ""),
        ("auto", ["moz-extension://a-b"], "moz-extension://a-b", ""),
        ("auto", ["https://www.example.com"], "", ""),  # an app, which has no origin
        ("auto", ["https://www.example.com"], "null", ""),
        ("WWW.Example.com", ["*"], "https://evil.example", "www.example.com"),
        ("www.example.com", [], "", "www.example.com"),
        ("off", ["https://www.example.com"], "https://www.example.com", ""),
    ],
)
def test_host_line_names_the_page_that_asks(
    line: str, origins: list[str], origin: str, host: str
) -> None:
    """D05: the gateway's own host would stop auto-fill on every page of others."""
    settings = gateway.Settings(sms_host_line=line, allowed_origins=origins)
    assert settings.line_host(origin) == host


@pytest.mark.parametrize(
    "value", ["", "on", "yes", "https://a.example", "a.example:443", "192.0.2.7", "a b.example"]
)
def test_host_line_is_auto_off_or_a_host_name(value: str) -> None:
    with pytest.raises(gateway.SettingsError, match="sms_host_line"):
        gateway.Settings(sms_host_line=value)


def test_host_line_over_http(make_client: MakeClient) -> None:
    """Named by the Origin of the very request that asks, also when it asks again."""
    client = make_client(allowed_origins=["https://a.example", "https://b.example"])
    client.register()
    for path, body, origin, line in [
        ("/sms/verify", {"msisdn": NUMBER}, "https://a.example", "a.example"),
        ("/sms/resend_code", None, "https://b.example", "b.example"),
        ("/sms/resend_code", None, "https://c.example", ""),
    ]:
        assert client.call(path, body, environ={"HTTP_ORIGIN": origin}).status == 200
        text = client.outbox()[-1]["text"]
        assert text.partition("\n@")[2].split(" #")[0] == line


def test_long_codes_have_no_host_line(make_client: MakeClient) -> None:
    client = make_client(sms_host_line="id.example")
    client.register()
    assert client.ask().status == 200
    assert client.outbox()[-1]["text"].endswith(f"\n@id.example #{client.code()[1:]}")
    assert client.call("/sms/mt/verify", {"msisdn": NUMBER}).status == 204
    assert re.fullmatch("[0-9a-f]{32}", client.outbox()[-1]["text"])


# -- Which language -------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "tag"),
    [
        ("zh", "zh-hans"),
        ("zh-CN", "zh-hans"),
        ("zh-SG", "zh-hans"),
        ("zh-TW", "zh-hant"),
        ("zh-HK", "zh-hant"),
        ("zh-MO", "zh-hant"),
        ("zh-Hant-TW", "zh-hant"),
        ("zh-Hans-HK", "zh-hans"),
        ("pt-BR", "pt-br"),
        ("pt-PT", "pt"),
        ("pt-AO", "pt"),
        ("no", "nb"),
        ("no-NO", "nb"),
        ("nb-NO", "nb"),
        ("nn-NO", "nn"),
        ("iw-IL", "he"),
        ("in", "id"),
        ("tl-PH", "fil"),
        ("sr-Latn-RS", "sr-latn"),
        ("sr-RS", "sr"),
        ("sr-ME", "sr-latn"),
        ("sh", "sr-latn"),
        ("es-419", "es"),
        ("fr-CA;q=0.2, ar-EG;q=0.9", "ar"),
        ("xx, zh-TW;q=0.1", "zh-hant"),
        ("xx", "en"),
        ("zho", "zh-hans"),
        ("de_DE", "de"),  # FAULTS_A, C01: as programs write them
        ("pt_BR", "pt-br"),
        ("de_DE.UTF-8", "de"),
        ("zh_TW.Big5, en", "zh-hant"),
        ("gsw-CH, de;q=0,8, fr;q=0,6", "de"),  # C04: as people write weights
        ("fr;q=0,6,de;q=0,8", "de"),
        ("de;q=0,8", "de"),
        ("fr;q=0,8;de", "en"),  # unreadable, as before
        ("de;q=0.33333333333333331, fr;q=0.6666666666666666", "fr"),
        ("de;q=.5, fr;q=.25", "de"),
        ("de;q=0,0", "en"),
        ("en; q=0.7, pl; q=0.9", "pl"),  # C06
        ("de ;q=0.8", "de"),
        ("de;Q=0.5", "de"),
        ("zh-Hant-HK", "zh-hant"),  # C08
        ("en-US,en;q=0.9,fr;q=0.8", "en"),  # C09
        ("en,uk;q=0.7,da;q=0.3", "en"),
        ("prs-AF", "fa"),  # C12
        ("pes-IR", "fa"),
        ("arz", "ar"),
        ("ary-MA", "ar"),
        ("swh", "sw"),
        ("ekk", "et"),
        ("deu", "de"),
        ("fra-CA", "fr"),
        ("spa", "es"),
        ("ro-MD", "ro"),  # C13
        ("de-CH-1901", "de"),
        ("fr-FR-u-ca-gregory", "fr"),
        ("zh-TW-u-ca-roc", "zh-hant"),
        ("sh-RS", "sr-latn"),
        ("hi-Latn", "en"),  # C14: another script than our catalogue's
        ("hi-Latn, fr;q=0.5", "en"),
        ("pa-PK", "en"),
        ("pa-PK, ur;q=0.9", "ur"),
        ("pa-IN", "pa"),
        ("uz-AF", "en"),
        ("uz-Cyrl", "en"),
        ("az-IR", "en"),
        ("sr-Cyrl-ME", "sr"),
        ("es-MX", "es"),
        ("-", "en"),
        ("*", "en"),
        ("", "en"),
        ("zh-TW;q=0", "en"),
    ],
)
def test_language(header: str, tag: str) -> None:
    assert gateway.negotiate_language(header, gateway.load_catalogues()) == tag


def test_tags_of_cldr_are_written_as_headers_have_them() -> None:
    gateway._cldr.cache_clear()
    assert gateway._cldr("likely_subtags")["zh-tw"] == "zh-hant-tw"


def test_an_alias_of_a_language_that_is_not_there_is_no_loop() -> None:
    assert gateway.negotiate_language("zh-TW, no, sh", {"en": NullTranslations()}) == "en"


@pytest.mark.parametrize("tag", ["ar", "he", "fa", "ja", "hi", "tr", "pt-BR", "zh-TW"])
def test_a_message_in_the_language_of_the_request(client: WsgiClient, tag: str) -> None:
    client.register()
    answer = client.call(
        "/sms/verify", {"msisdn": NUMBER}, environ={"HTTP_ACCEPT_LANGUAGE": f"{tag},en;q=0.5"}
    )
    assert answer.status == 200
    assert not client.outbox()[-1]["text"].startswith("Your")
    assert client.call("/sms/verify_code", {"code": client.code()}).status == 200


@pytest.mark.parametrize(
    ("number", "header", "begins"),
    [
        ("+33612345678", "", "Votre"),
        ("+33612345678", "xx, yy;q=0.5", "Votre"),
        ("+33612345678", "en", "Your"),  # who asks for a language gets it
        ("+33612345678", "de", "Ihr"),
        ("+886912345678", "", "您的驗"),
        ("+8613912345678", "", "您的验"),
        ("+5511961234567", "", "Seu"),
        ("+351912345678", "", "O seu"),
        ("+447700900123", "", "Your"),
        ("+18765551234", "", "Your"),  # Jamaica, though +1
        ("+883510012345", "", "Your"),  # no country at all
        ("+94712345678", "", "Your"),  # FAULTS_A, C10: 15 % of Sri Lanka read Tamil
        ("+919812345678", "", "Your"),
        ("+41781234567", "", "Ihr"),  # three quarters of Switzerland
        ("+212650123456", "", "رمز"),
    ],
)
def test_the_country_may_choose(
    make_client: MakeClient, number: str, header: str, begins: str
) -> None:
    for on in (False, True):
        client = make_client(language_by_country=on)
        client.register()
        environ = {"HTTP_ACCEPT_LANGUAGE": header}
        assert client.call("/sms/verify", {"msisdn": number}, environ=environ).status == 200
        text = client.outbox(number)[-1]["text"]
        assert text.startswith(begins if on or header in ("en", "de") else "Your")


# -- Who it comes from ----------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "request_network", "number", "sender"),
    [
        ({"310": "A"}, {}, "+12025550123", "A"),  # the United States have seven codes
        ({"316": "A"}, {}, "+12025550123", "A"),
        ({"310": "A", "338": "B"}, {}, "+18765551234", "B"),  # Jamaica shares their +1
        ({"310": "A"}, {}, "+18765551234", "Gateway"),
        ({"302": "C"}, {}, "+14165550123", "C"),  # and so does Canada
        ({"405": "D"}, {}, "+919812345678", "D"),
        ({"208": "E", "20801": "F"}, {"mcc": "208", "mnc": "01"}, "+33612345678", "F"),
        ({"208": "E", "20801": "F"}, {"mcc": "208", "mnc": "10"}, "+33612345678", "E"),
        ({"208": "E"}, {"mcc": "310"}, "+33612345678", "Gateway"),  # what it names counts
        ({"234": "G"}, {}, "+447700900123", "G"),
    ],
)
def test_sender_by_network_or_country(
    make_client: MakeClient, table: dict[str, str], request_network: dict[str, str],
    number: str, sender: str,
) -> None:  # fmt: skip
    client = make_client(mt_sender_map=table)
    client.register()
    assert client.ask(number, **request_network).json["mtSender"] == sender


# -- make update-l10n -----------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what the target works on, with this interpreter as its .venv."""
    (tmp_path / "notebooks").mkdir()
    for name in ("Makefile", "gateway.py", "requirements-lock.txt"):
        shutil.copy(lab.ROOT / name, tmp_path / name)
    for name in ("lab.py", "lessons.pth"):
        shutil.copy(lab.ROOT / "notebooks" / name, tmp_path / "notebooks")
    shutil.copytree(LOCALE, tmp_path / "locale")
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "bin").mkdir()
    for tool in ("pybabel", "python"):
        found = Path(sys.executable).with_name(tool)
        script = tmp_path / ".venv" / "bin" / tool
        script.write_text(f'#!/bin/sh\nexec "{found}" "$@"\n')
        script.chmod(0o755)
    for stamp in ("server", "done"):
        (tmp_path / ".venv" / stamp).touch()
    return tmp_path


def files(tree: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(tree)): p.read_bytes()
        for p in (tree / "locale").rglob("*")
        if p.is_file()
    }


def update(tree: Path, answer: str = "", **environ: str) -> Any:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        ["make", "update-l10n"], cwd=tree, input=answer, text=True, capture_output=True,
        env={**clean, **environ},
    )  # fmt: skip


@pytest.mark.slow
def test_update_l10n_leaves_what_is_up_to_date(tree: Path) -> None:
    """So what is committed is what the tool makes: template, languages, compiled files."""
    before = files(tree)
    ended = update(tree, NOVERIFY="yes")
    assert ended.returncode == 0, ended.stderr
    assert [name for name, data in files(tree).items() if data != before.get(name)] == []
    assert "zh-hant" in ended.stdout


@pytest.mark.parametrize("answer", ["", "\n", "n\n", "no\n", "Yes\n"])
def test_update_l10n_asks_first(tree: Path, answer: str) -> None:
    path = tree / "locale" / "messages.pot"
    path.write_text("mine")
    ended = update(tree, answer)
    assert "Go on? [y/N]" in ended.stdout
    assert ended.returncode != 0
    assert path.read_text() == "mine"


@pytest.mark.slow
def test_update_l10n_of_a_changed_sentence_stops_until_it_is_translated(tree: Path) -> None:
    source = (tree / "gateway.py").read_text("utf-8")
    (tree / "gateway.py").write_text(source.replace("Your verification code", "Your code"), "utf-8")
    ended = update(tree, "y\n")
    assert ended.returncode != 0
    assert "locale zh-hant: the message is not translated" in ended.stderr


def test_a_header_of_languages_costs_no_more_the_longer_it_is(client: WsgiClient) -> None:
    """400 kB of ``a-a-a…`` took eight seconds: each part was tried after the one before it."""
    tag, steps = "a-" * 100 + "a", 0

    class Counting(dict[str, NullTranslations]):
        def __contains__(self, key: object) -> bool:
            nonlocal steps
            steps += 1
            return super().__contains__(key)

    catalogues = Counting(en=NullTranslations(), de=NullTranslations())
    assert gateway.negotiate_language(f"{tag}, de;q=0.5", catalogues) == "de"
    assert steps < 10
    client.register()
    late = "xx," * 400 + "de"  # beyond what is read
    for header, sentence in (("de," + late, "Ihr"), (late, "Your")):
        client.call("/sms/verify", {"msisdn": NUMBER}, environ={"HTTP_ACCEPT_LANGUAGE": header})
        assert client.outbox()[-1]["text"].startswith(sentence)
