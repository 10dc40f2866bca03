"""Codes and messages: uniform codes, digests bound to a session, languages, the sentence."""

from __future__ import annotations

import hmac
import io
import random
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from babel.messages.catalog import Catalog
from babel.messages.mofile import write_mo
from babel.support import NullTranslations
from hypothesis import given, settings
from hypothesis import strategies as st
from support import shared

import gateway
from gateway import StorageId

QUICK = settings(max_examples=120, database=None, deadline=None, derandomize=True)

# -- Every code is as likely as any other --------------------------------------

DRAWS = 100_000
Draw = Callable[[gateway.RandomBytes], str]


def biased_2014(random_bytes: gateway.RandomBytes) -> str:
    """The generator of both first servers (PEERS 1D no. 1): 47% of its PINs begin with 1."""
    return str(int.from_bytes(random_bytes(3), "big"))[:6].zfill(6)


def biased_modulo(random_bytes: gateway.RandomBytes) -> str:
    """3 bytes modulo 10^6: codes below 777216 are likelier by a sixteenth."""
    return f"{int.from_bytes(random_bytes(3), 'big') % 10**6:06}"


def biased_bytes(random_bytes: gateway.RandomBytes) -> str:
    """A byte modulo 10 for each digit: 0 to 5 are likelier by a twenty-fifth."""
    return "".join(str(byte % 10) for byte in random_bytes(6))


def biased_never_zero(random_bytes: gateway.RandomBytes) -> str:
    """From 100000 on, so that a code "has six digits"."""
    return str(100_000 + int.from_bytes(random_bytes(8), "big") % 900_000)


def biased_unpadded(random_bytes: gateway.RandomBytes) -> str:
    """Filled up at its end in place of its beginning."""
    return str(int.from_bytes(random_bytes(8), "big") % 10**6).ljust(6, "0")


def ours(random_bytes: gateway.RandomBytes) -> str:
    """What the gateway sends."""
    return gateway.short_code(6, random_bytes)


def chi_square(values: Iterable[str], kinds: int, total: int) -> float:
    """How far counts lie from equal ones, in standard deviations of the statistic."""
    expected, counts = total / kinds, Counter(values)
    statistic = sum((n - expected) ** 2 / expected for n in counts.values())
    statistic += (kinds - len(counts)) * expected
    return float((statistic - (kinds - 1)) / (2 * (kinds - 1)) ** 0.5)


def distance_from_uniform(draw: Draw) -> float:
    """The worst of: each digit by its place, each pair of neighbours, the first three."""
    source = random.Random(2014).randbytes
    codes = [draw(source) for _ in range(DRAWS)]
    parts = [(place, place + 1) for place in range(6)]
    parts += [(place, place + 2) for place in range(5)] + [(0, 3)]
    return max(chi_square((code[a:b] for code in codes), 10 ** (b - a), DRAWS) for a, b in parts)


def test_codes_are_uniform() -> None:
    """5 standard deviations: chance exceeds it once in thousands; the seed is fixed."""
    assert distance_from_uniform(ours) < 5


@pytest.mark.slow
@pytest.mark.parametrize(
    "draw", [biased_2014, biased_modulo, biased_bytes, biased_never_zero, biased_unpadded]
)
def test_same_check_rejects_a_biased_generator(draw: Draw) -> None:
    assert distance_from_uniform(draw) > 5


def test_bias_of_2014_is_what_is_told_of_it() -> None:
    """The generator above is the right one: 47% begin with 1, 0.6% with 0."""
    source = random.Random(2014).randbytes
    first = Counter(biased_2014(source)[0] for _ in range(DRAWS))
    assert 0.46 < first["1"] / DRAWS < 0.48
    assert 0.005 < first["0"] / DRAWS < 0.007


def feed(*numbers: int) -> tuple[gateway.RandomBytes, list[int]]:
    """A source that gives these numbers, whatever length is asked for; and what is left."""
    left = list(numbers)

    def source(n: int) -> bytes:
        return left.pop(0).to_bytes(n, "big")

    return source, left


@pytest.mark.parametrize("digits", [6, 7, 8, 9, 10])
def test_numbers_beyond_the_fair_limit_are_drawn_anew(digits: int) -> None:
    """The last fair number gives the last code, 999999; the next one is thrown away."""
    sizes: list[int] = []

    def zeros(n: int) -> bytes:
        sizes.append(n)
        return bytes(n)

    assert gateway.short_code(digits, zeros) == "0" * digits
    space, codes = 2 ** (8 * sizes[0]), 10**digits
    fair = space - space % codes
    source, left = feed(fair - 1)
    assert gateway.short_code(digits, source) == "9" * digits
    for unfair in (fair, fair + 1, space - 1):
        source, left = feed(unfair, unfair, space - 1, 7)
        assert gateway.short_code(digits, source) == "7".zfill(digits)
        assert left == []


@pytest.mark.parametrize("digits", [6, 7, 8, 9, 10])
def test_short_code_keeps_its_zeros(digits: int) -> None:
    assert gateway.short_code(digits, bytes) == "0" * digits
    source = random.Random(1).randbytes
    codes = [gateway.short_code(digits, source) for _ in range(2000)]
    assert all(re.fullmatch(f"[0-9]{{{digits}}}", code) for code in codes)
    assert {code[0] for code in codes} == set("0123456789")


@pytest.mark.parametrize("n_bytes", [8, 16, 32])
def test_long_code_is_hex_of_what_was_drawn(n_bytes: int) -> None:
    assert gateway.long_code(n_bytes, lambda n: bytes(range(n))) == bytes(range(n_bytes)).hex()
    code = gateway.long_code(n_bytes, secrets.token_bytes)
    assert re.fullmatch(f"[0-9a-f]{{{2 * n_bytes}}}", code)


# -- Digests ------------------------------------------------------------------

SECRET, ID = b"s" * 32, StorageId(b"i" * 16)


def test_digest_is_bound_to_everything() -> None:
    """A digest that forgot its session would let one user return another's code."""
    digest = gateway.code_digest(SECRET, ID, "123456")
    assert len(digest) == 8
    assert digest == gateway.code_digest(SECRET, ID, "123456")
    others = [
        gateway.code_digest(b"S" + SECRET[1:], ID, "123456"),
        gateway.code_digest(SECRET, StorageId(b"I" + ID[1:]), "123456"),
        gateway.code_digest(SECRET, StorageId(ID[:-1] + b"I"), "123456"),
        gateway.code_digest(SECRET, ID, "123457"),
        gateway.code_digest(SECRET, ID, "023456"),
        gateway.code_digest(SECRET, ID, "0123456"),
        gateway.code_digest(SECRET, ID, "12345"),
        gateway.code_digest(SECRET, ID, ""),
    ]
    assert len({digest, *others}) == 1 + len(others)


def test_digests_of_all_codes_of_a_thousand_differ() -> None:
    """8 bytes are plenty for a code that bears three tries."""
    digests = {gateway.code_digest(SECRET, ID, f"{code:06}") for code in range(1000)}
    assert len(digests) == 1000
    assert not any(b"123" in digest for digest in digests if digest[:1] == b"1")


def test_digest_is_the_beginning_of_that_of_version_1() -> None:
    """Else nobody who waits for a code during an update could return it."""
    whole = hmac.digest(SECRET, ID + b"123456", "sha256")
    assert gateway.code_digest(SECRET, ID, "123456") == whole[:8]


@QUICK
@given(st.text(max_size=80, alphabet=st.characters(exclude_categories=["Cs"])))
def test_any_text_has_a_digest(code: str) -> None:
    """What a client returns as a code is compared by its digest, whatever it is."""
    assert len(gateway.code_digest(SECRET, ID, code)) == 8


# -- Languages ----------------------------------------------------------------

CATALOGUES = dict.fromkeys(
    ["en", "de", "fr", "pt-br", "zh-hans", "zh-hant", "zh-hant-hk", "sr-latn", "he", "fil"],
    NullTranslations(),
)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("de", "de"),
        ("DE", "de"),  # tags have no case
        ("de-DE", "de"),
        ("de-CH-1996", "de"),
        ("de-Latn-DE-x-private", "de"),
        ("pt-BR", "pt-br"),
        ("pt-br", "pt-br"),
        ("zh-Hant-TW", "zh-hant"),
        ("zh-Hant-HK", "zh-hant-hk"),
        ("zh-Hans-CN, zh;q=0.9", "zh-hans"),
        ("sr-Latn-RS", "sr-latn"),
        ("fil-PH", "fil"),
        ("fr-CA, de;q=0.8, *;q=0.1", "fr"),
        ("de;q=0.8, fr", "fr"),  # the weight counts, not the place
        ("de;q=0.8,fr;q=0.9", "fr"),
        ("de;q=0.123, fr;q=0.124", "fr"),  # all three digits of it
        ("de;q=0.5, fr;q=0.5", "de"),  # then the place
        ("de, fr", "de"),
        ("en-GB, de;q=0.9", "en"),
        ("en;q=0.1, de;q=0.9", "de"),
        ("nl, it, de;q=0.1", "de"),  # what we don't have is passed over
        ("pt-PT, de;q=0.5", "de"),  # Brazilian is not what was asked for
        ("zh-TW, de;q=0.1", "zh-hant"),  # Taiwan's script
        ("zh", "zh-hans"),
        ("  de  ", "de"),
        ("de ;q=0.5", "de"),
        ("de; q=0.5", "de"),
        ("de;Q=0.5", "de"),
        (",,de,,", "de"),
        ("de;q=1.000", "de"),
        ("*, de;q=0.5", "de"),  # a wildcard names none
    ],
)
def test_language_that_is_served(header: str, expected: str) -> None:
    assert gateway.negotiate_language(header, CATALOGUES) == expected


@pytest.mark.parametrize(
    "header",
    [
        "",
        " ",
        ",",
        ";",
        "*",
        "*;q=0.5",
        "*-de",
        "-",
        "--",
        "-de",
        "nl",
        "pt",  # only Brazilian is there: no guess
        "d",
        "dede",
        "de;q=0",
        "de;q=0.0",
        "de;q=0.000",
        "de-DE;q=0",
        "de;q=-1",
        "de;q=x",
        "de;q=",
        "de;q",
        "de;q=٠.٥",
        "de;q=0.5;q=1",
        "de;x=1",
        "de q=1",
        "d e",
        "../../etc/passwd",
        "de\0",
        "dé",
        "İ",  # longer in lower case
        "ſr-latn",  # s in upper case only
        "en-US",
        "i-klingon",
        "x-private",
        "de/fr",
        "<script>",
    ],
)
def test_language_that_is_not_served_is_english(header: str) -> None:
    assert gateway.negotiate_language(header, CATALOGUES) == "en"


@QUICK
@given(st.text() | st.text(alphabet="den-frpt zhs,;q=0.19*"))
def test_any_header_gives_a_catalogue(header: str) -> None:
    assert gateway.negotiate_language(header, CATALOGUES) in CATALOGUES


weights = st.integers(0, 1000)


@QUICK
@given(st.lists(st.tuples(st.sampled_from(["en", "de", "fr", "nl", "he"]), weights), max_size=6))
def test_greatest_weight_wins(wanted: list[tuple[str, int]]) -> None:
    """Against a second way to compute it: the best of those that we have, by the list."""
    header = ", ".join(f"{tag};q={weight / 1000:.3f}" for tag, weight in wanted)
    known = [(tag, weight) for tag, weight in wanted if tag in CATALOGUES and weight]
    best = max((weight for _, weight in known), default=0)
    expected = next((tag for tag, weight in known if weight == best), "en")
    assert gateway.negotiate_language(header, CATALOGUES) == expected


@pytest.mark.parametrize(
    "header",
    [
        "de" + " " * 20_000 + "!",  # two patterns that can share the spaces take minutes
        "de;" + " " * 20_000 + "!",
        "a-" * 10_000,
        "," * 20_000,
        "a" * 20_000,
        "de;q=0." + "0" * 20_000,
    ],
    ids=["spaces", "more spaces", "subtags", "commas", "letters", "zeros"],
)
def test_hostile_header_is_cheap(header: str) -> None:
    """The server lets headers of 400 kB in."""
    before = time.thread_time()
    assert gateway.negotiate_language(header, CATALOGUES) == "en"
    assert time.thread_time() - before < 0.2 * shared()


# -- The sentence -------------------------------------------------------------


def test_english_sentence() -> None:
    assert gateway.message_text("123456", NullTranslations()) == "Your verification code is: 123456"


@pytest.mark.parametrize("header", ["", "*", "xx", "en", "en-US", "en-GB, en;q=0.5"])
def test_english_is_what_an_unusable_header_gets(header: str) -> None:
    catalogues = gateway.load_catalogues()
    tag = gateway.negotiate_language(header, catalogues)
    text = gateway.message_text("012345", catalogues[tag])
    assert text == "Your verification code is: 012345"


@pytest.mark.parametrize("tag", gateway.load_catalogues())
def test_every_catalogue_ends_its_line_with_the_code(tag: str) -> None:
    """A broken placeholder (PEERS 1D no. 7) would lose the code, or show a Python dict."""
    text = gateway.message_text("987654", gateway.load_catalogues()[tag])
    assert text.splitlines()[0].split()[-1] == "987654"
    assert text.count("987654") == 1
    assert "{" not in text
    assert "%" not in text


def write_catalogue(folder: Path, name: str, sentence: str) -> None:
    """A compiled catalogue as ``make update-l10n`` would leave it."""
    catalogue = Catalog(locale=name)
    catalogue.add("Your verification code is: %(code)s", sentence)
    data = io.BytesIO()
    write_mo(data, catalogue)
    path = folder / name / "LC_MESSAGES" / "messages.mo"
    path.parent.mkdir(parents=True)
    path.write_bytes(data.getvalue())


def test_translations_match(tmp_path: Path) -> None:
    """In 2014 they never did: the code asked for another sentence than was translated."""
    write_catalogue(tmp_path, "de", "Ihr Code lautet: %(code)s")
    write_catalogue(tmp_path, "pt_BR", "Seu código é: %(code)s")
    (tmp_path / "xx" / "LC_MESSAGES").mkdir(parents=True)  # nothing compiled
    (tmp_path / "messages.pot").touch()
    catalogues = gateway.load_catalogues(tmp_path)
    assert sorted(catalogues) == ["de", "en", "pt-br"]
    tag = gateway.negotiate_language("pt-BR, de;q=0.5", catalogues)
    assert gateway.message_text("123456", catalogues[tag]) == "Seu código é: 123456"
    assert gateway.message_text("123456", catalogues["de"]) == "Ihr Code lautet: 123456"
    assert gateway.message_text("123456", catalogues["en"]) == "Your verification code is: 123456"


def test_no_catalogues_leave_english(tmp_path: Path) -> None:
    assert list(gateway.load_catalogues(tmp_path / "nowhere")) == ["en"]
