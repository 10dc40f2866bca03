"""Numbers and networks: what is a phone number, which country is it, which sender serves it."""

from __future__ import annotations

import contextlib
import re
import unicodedata
from collections.abc import Mapping

import phonenumbers
import pytest
from babel import Locale
from hypothesis import given, settings
from hypothesis import strategies as st

import gateway
from gateway import InvalidParameter, Msisdn, Network

QUICK = settings(max_examples=120, database=None, deadline=None, derandomize=True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("+447700900123", "+447700900123"),
        ("+44 7700 900123", "+447700900123"),
        ("+44-7700-900-123", "+447700900123"),
        ("+44 (7700) 900-123", "+447700900123"),
        ("+44 (0)7700 900123", "+447700900123"),  # as it stands on business cards
        (" +447700900123 ", "+447700900123"),
        ("+12025550123", "+12025550123"),
        ("+34600123456", "+34600123456"),
        ("+390612345678", "+390612345678"),  # Italy keeps the zero
        ("+5511912345678", "+5511912345678"),
        ("+8613812345678", "+8613812345678"),
        ("+2904567", "+2904567"),  # Saint Helena: one of the shortest there are
        ("+4915123456789", "+4915123456789"),
        ("\u202a+447700900123\u202c", "+447700900123"),  # FAULTS_A, A01: an address book's isolates
        ("\u202d+447700900123\u202c", "+447700900123"),
        ("\u2068+447700900123\u2069", "+447700900123"),
        ("+44\u00a07700\u00a0900123", "+447700900123"),  # A03: blanks that are no U+0020
        ("+44\u202f7700\u3000900123\u00a0", "+447700900123"),
        ("+44\u20117700\u2011900123", "+447700900123"),  # A04: dashes that are no U+002D
        ("+44\u20137700\u2212900123", "+447700900123"),
        ("+447700900123\n", "+447700900123"),  # A07
        ("+447700900123\t", "+447700900123"),
        ("+44\t7700900123", "+447700900123"),
        ("+44\n7700900123\r\n", "+447700900123"),
        ("+49 1522 / 3456789", "+4915223456789"),  # A08
        ("+٤٤٧٧٠٠٩٠٠١٢٣", "+447700900123"),  # A09: digits of other scripts
        ("+۴۴۷۷۰۰۹۰۰۱۲۳", "+447700900123"),
        ("+४४७७००९००१२३", "+447700900123"),
        ("＋４４７７００９００１２３", "+447700900123"),
        ("＋447700900123", "+447700900123"),
        ("tel:+447700900123", "+447700900123"),  # A10
        ("TEL:+44-7700-900123", "+447700900123"),
        ("(+44) 7700 900123", "+447700900123"),
        ("+4407700900123", "+447700900123"),  # A11: trunk prefixes
        ("+49 0 1522 3456789", "+4915223456789"),
        ("+36 06 20 123 4567", "+36201234567"),
        ("+7 8 912 345 67 89", "+79123456789"),
        ("+2250701234567", "+2250701234567"),  # A17
        ("+3197010123456", "+3197010123456"),  # A21
        ("+6834002", "+6834002"),  # A23
        ("+29051234", "+29051234"),
        ("+44" + " " * 10_000 + "7700900123", "+447700900123"),
    ],
)
def test_good_number(text: str, expected: str) -> None:
    assert gateway.parse_msisdn(text) == expected


@pytest.mark.parametrize(
    "value",
    [
        "",
        "+",
        "+44",
        "447700900123",  # no plus: could be of any country
        "07700900123",  # national
        "00447700900123",  # 00 is a prefix in some countries only
        "011447700900123",
        "+0447700900123",  # no country code begins with 0
        "++447700900123",
        "+44+7700900123",
        "+44 7700 FLOWERS",  # letters of a keypad
        "+1800FLOWERS",
        "+447700900123;ext=5",  # A12: no SMS reaches an extension
        "tel:+447700900123;ext=5",
        "tel:07700900123;phone-context=+44",
        "+22507012345",  # A17: which operator's prefix it got is not known
        "sms:+447700900123",
        "+447700900123 x5",
        "+447700900123 ext. 5",
        "+447700900123#",
        "+447700900123#5",
        "+447700900123,+447700900124",  # two
        "+447700900123\0",
        "+44_7700_900123",
        "+44:7700900123",
        "+4477009001²³",
        "+1202555012",  # a digit short
        "+120255501234",  # a digit long
        "+4477009001234",
        "+12530000",  # dialled within one area only: the whole number has 11 digits
        "+4477009001",
        "+999123456789",  # no such country
        "+210123456789",
        "+4477009001234567890",
        "+" + "4" * 16,
        "+" + "9" * 40,
        pytest.param("+4" + "4" * 10_000, id="huge"),
        "+(-).( )-. ",
        "Infinity",
        "+4.47700900123e11",
    ],
)
def test_bad_number(value: str) -> None:
    with pytest.raises(InvalidParameter, match="msisdn"):
        gateway.parse_msisdn(value)


@pytest.mark.parametrize(
    "value", [None, True, False, 447700900123, 4.4e11, b"+447700900123", ["+447700900123"], {}]
)
def test_what_is_no_text_is_no_number(value: object) -> None:
    with pytest.raises(InvalidParameter, match="msisdn"):
        gateway.parse_msisdn(value)


@pytest.mark.parametrize("value", ["+1202555012", "07700900123", "+447700 FLOWERS"])
def test_refusal_does_not_quote_the_number(value: str) -> None:
    with pytest.raises(InvalidParameter) as refused:
        gateway.parse_msisdn(value)
    assert value not in refused.value.message


@QUICK
@given(st.text() | st.from_regex(r"\+[0-9 ().\-]{0,45}") | st.from_regex(r"\+[0-9]{1,25}"))
def test_any_text_is_a_number_or_refused(text: str) -> None:
    """Nothing else happens; and what was read is read again as the same."""
    try:
        msisdn = gateway.parse_msisdn(text)
    except InvalidParameter:
        return
    assert re.fullmatch(r"\+[1-9][0-9]{4,14}", msisdn)
    assert gateway.parse_msisdn(msisdn) == msisdn


def test_no_number_is_longer_than_e164_allows() -> None:
    """15 digits with the country code; libphonenumber takes up to 19 in some countries."""
    too_long = []
    for code in phonenumbers.COUNTRY_CODE_TO_REGION_CODE:
        for first in "1379":
            for length in range(16, 20):
                text = f"+{code}{first}".ljust(1 + length, "5")
                with contextlib.suppress(InvalidParameter):
                    msisdn = gateway.parse_msisdn(text)
                    too_long += [msisdn] if len(msisdn) > 16 else []
    assert too_long == []


# -- Folding ------------------------------------------------------------------

EVERY = [chr(point) for point in range(0x110000)]
DIGITS = [c for c in EVERY if unicodedata.category(c) == "Nd"]
SELECTORS = [*EVERY[0xFE00:0xFE10], *EVERY[0xE0100:0xE01F0], *EVERY[0x180B:0x180E], "\u180f"]
UNSEEN = [c for c in EVERY if c.isspace() or unicodedata.category(c) in ("Pd", "Cf")]
UNSEEN += ["\u2212", "\u00ad", *SELECTORS]


@pytest.mark.slow
def test_every_character_of_unicode_is_folded_as_the_contract_says() -> None:
    assert len(DIGITS) > 600
    unseen = set(UNSEEN)
    for char in EVERY:
        if char in unseen:
            assert gateway.fold(char) == ""
        elif unicodedata.category(char) == "Nd":
            assert gateway.fold(char) == str(unicodedata.digit(char))
        elif char == "＋":
            assert gateway.fold(char) == "+"
        else:
            assert gateway.fold(char) == char.lower()


@pytest.mark.slow
def test_no_other_letter_becomes_a_digit_of_a_code() -> None:
    codes = {c for c in EVERY if re.fullmatch("[0-9a-f]+", gateway.fold(c))}
    assert codes == {*DIGITS, *"abcdefABCDEF"}


@st.composite
def dressed(draw: st.DrawFn, text: str, more: str = "") -> str:
    """A text with digits of any script, and any characters between that are not seen."""
    noise = st.text(st.sampled_from([*UNSEEN, *more]), max_size=3)
    shown = {d: [c for c in DIGITS if unicodedata.digit(c) == int(d)] for d in "0123456789"}
    shown |= {"+": ["+", "＋"]}
    chars = [draw(noise) + draw(st.sampled_from(shown.get(c, [c, c.upper()]))) for c in text]
    return "".join(chars) + draw(noise)


NUMBERS = ["+447700900123", "+12025550123", "+390612345678", "+2290197001234", "+6834002"]


@pytest.mark.slow
@QUICK
@given(st.data(), st.sampled_from(NUMBERS), st.sampled_from(["", "tel:"]))
def test_what_is_not_seen_changes_no_number(data: st.DataObject, number: str, scheme: str) -> None:
    typed = data.draw(dressed(scheme + number, "()./"))
    assert gateway.parse_msisdn(typed) == number


@pytest.mark.slow
@QUICK
@given(st.data(), st.text("0123456789abcdef", min_size=6, max_size=32))
def test_what_is_not_seen_changes_no_code(data: st.DataObject, code: str) -> None:
    assert gateway.fold(data.draw(dressed(code))) == code


@pytest.mark.parametrize("value", [None, True, 146193, 1.5, b"146193", ["146193"], {}])
def test_what_is_no_text_folds_to_nothing(value: object) -> None:
    assert gateway.fold(value) == ""


# -- What is wrong, and what lives ---------------------------------------------


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("+44", "too short"),
        ("+1202555012", "too short"),
        ("+22507012345", "too short"),
        ("+120255501234", "too long"),
        ("+4477009001234567890", "too long"),
        ("+44" + "7" * 300, "too long"),
        ("+32770012345678", "too long"),  # FAULTS_A, A20
        ("+999123456789", "unknown country code"),
        ("+0447700900123", "unknown country code"),
        ("+12530000", "local only"),
        ("07700900123", "country code"),
        ("+44 7700 FLOWERS", "country code"),
    ],
)
def test_the_refusal_says_what_is_wrong(value: str, words: str) -> None:
    with pytest.raises(InvalidParameter, match=words):
        gateway.parse_msisdn(value)


def test_every_way_to_be_impossible_has_its_words() -> None:
    ways = phonenumbers.ValidationResult
    names = {ways.to_string(value) for name, value in vars(ways).items() if name.isupper()}
    assert gateway._FAULTS.keys() == names


@pytest.mark.parametrize(
    ("old", "living"),
    [
        ("+5215555550123", "+525555550123"),  # FAULTS_A, A13
        ("+52 044 55 5555 0123", "+525555550123"),
        ("+52 045 55 5555 0123", "+525555550123"),
        ("+52 01 55 5555 0123", "+525555550123"),
        ("+541155550123", "+5491155550123"),  # A15
        ("+54 11 15 5555-0123", "+5491155550123"),
        ("+54 223 412 3456", "+5492234123456"),
        ("+22997001234", "+2290197001234"),  # A16
        ("+551187654321", "+5511987654321"),
        ("+55 0 11 8765 4321", "+5511987654321"),
        ("+841201234567", "+84701234567"),
        ("+84 0 1669 876 543", "+84369876543"),
        ("+841991234567", "+84591234567"),
    ],
)
def test_a_form_that_a_plan_left_behind_is_the_living_one(old: str, living: str) -> None:
    assert gateway.parse_msisdn(old) == gateway.parse_msisdn(living) == living


@pytest.mark.parametrize(
    "number",
    [
        "+525555550123",
        "+5491155550123",
        "+548001234567",  # toll-free: refused later, not made a mobile one
        "+546001234567",
        "+2290197001234",
        "+5511912345678",
        "+551123456789",  # a fixed line
        "+551178901234",  # trunked radio
        "+558001234567",
        "+84701234567",
        "+842412345678",
        "+8418001234",
    ],
)
def test_a_living_number_stays(number: str) -> None:
    assert gateway.parse_msisdn(number) == number


left_behind = st.sampled_from(
    [(code, old) for code, forms in gateway.LIVING_FORMS.items() for old, _ in forms]
).flatmap(
    lambda form: st.tuples(
        st.just(form[0]), st.from_regex(re.compile(form[1], re.A), fullmatch=True)
    )
)


@pytest.mark.slow
@settings(QUICK, max_examples=400)
@given(left_behind)
def test_whatever_a_form_matches_is_rewritten_once(number: tuple[str, str]) -> None:
    """Or refused, if it begins as no number of that country does."""
    old = f"+{number[0]}{number[1]}"
    with contextlib.suppress(InvalidParameter):
        living = gateway.parse_msisdn(old)
        assert gateway.parse_msisdn(living) == living != old


# -- Kinds and countries ---------------------------------------------------------

KINDS = phonenumbers.PhoneNumberType
NO_SMS = [KINDS.PREMIUM_RATE, KINDS.SHARED_COST, KINDS.TOLL_FREE, KINDS.PAGER, KINDS.VOICEMAIL,
          KINDS.UAN]  # fmt: skip


def examples(kind: int) -> list[Msisdn]:
    """libphonenumber's example of a kind, of every region that has one."""
    form = phonenumbers.PhoneNumberFormat.E164
    found = [
        *(phonenumbers.example_number_for_type(r, kind) for r in phonenumbers.SUPPORTED_REGIONS),
        *map(phonenumbers.example_number_for_non_geo_entity,
             phonenumbers.COUNTRY_CODES_FOR_NON_GEO_REGIONS),
    ]  # fmt: skip
    ours = [number for number in found if number and phonenumbers.number_type(number) == kind]
    return [Msisdn(phonenumbers.format_number(number, form)) for number in ours]


@pytest.mark.parametrize("kind", NO_SMS, ids=KINDS.to_string)
def test_a_kind_that_gets_no_sms_is_refused(kind: int) -> None:
    """FAULTS_A, A18; 15 regions have voicemail numbers, fewer than any other kind."""
    numbers = examples(kind)
    assert len(numbers) >= 15
    for number in numbers:
        with pytest.raises(InvalidParameter, match="cannot get SMS") as refused:
            gateway.check_reachable(number)
        assert number not in refused.value.message


@pytest.mark.parametrize("kind", [KINDS.MOBILE, KINDS.FIXED_LINE, KINDS.VOIP], ids=KINDS.to_string)
def test_a_kind_that_may_get_sms_is_not_refused(kind: int) -> None:
    for number in examples(kind):
        gateway.check_reachable(number)


@pytest.mark.parametrize("number", ["+979123456789", "+80012345678"])
def test_premium_and_free_numbers_of_no_country(number: str) -> None:
    with pytest.raises(InvalidParameter, match="cannot get SMS"):
        gateway.check_reachable(gateway.parse_msisdn(number))


@pytest.mark.parametrize("number", ["+447700900123", "+15555555555", "+881612345678"])
def test_a_number_of_no_known_kind_may_be_tried(number: str) -> None:
    """libphonenumber knows it not to be in use, or knows nothing (A19)."""
    gateway.check_reachable(gateway.parse_msisdn(number))


@pytest.mark.parametrize(
    ("countries", "number", "served"),
    [
        ([], "+447700900123", True),
        (["*"], "+447700900123", True),
        (["*"], "+881612345678", True),
        (["GB"], "+447700900123", True),
        (["GB", "IE"], "+353861234567", True),
        (["GB"], "+353861234567", False),
        (["US"], "+16135550123", False),  # Canada shares +1
        (["CA"], "+16135550123", True),
        (["GB"], "+447797712345", False),  # Jersey shares +44
        (["GB"], "+881612345678", False),  # a satellite's is of no country
    ],
)
def test_only_countries_that_are_served(countries: list[str], number: str, served: bool) -> None:
    with contextlib.nullcontext() if served else pytest.raises(InvalidParameter, match="country"):
        gateway.check_reachable(gateway.parse_msisdn(number), countries)


# -- Networks -----------------------------------------------------------------

mccs = st.integers(0, 999).map(lambda n: f"{n:03}")
mncs = st.integers(0, 99).map(lambda n: f"{n:02}") | st.integers(0, 999).map(lambda n: f"{n:03}")
networks = st.just(Network()) | st.builds(Network, mccs, st.just("") | mncs)


@QUICK
@given(networks)
def test_packed_network_comes_back(network: Network) -> None:
    packed = network.pack()
    assert len(packed) == 3
    assert Network.unpack(packed) == network


@pytest.mark.parametrize("mcc", ["001", "234", "901", "999"])
def test_every_mnc_packs_differently(mcc: str) -> None:
    """Among them 07 and 007, which are two networks."""
    mncs = ["", *(f"{n:02}" for n in range(100)), *(f"{n:03}" for n in range(1000))]
    packed = {Network(mcc, mnc).pack() for mnc in mncs}
    assert len(packed) == len(mncs) == 1101
    assert [Network.unpack(Network(mcc, mnc).pack()).mnc for mnc in mncs] == mncs


@pytest.mark.parametrize("mnc", ["", "00", "000", "99", "999"])
def test_every_mcc_packs_differently(mnc: str) -> None:
    """000 too, although nobody has it: what a client named is what comes back."""
    mccs = [f"{n:03}" for n in range(1000)]
    assert [Network.unpack(Network(mcc, mnc).pack()) for mcc in mccs] == [
        Network(mcc, mnc) for mcc in mccs
    ]


def test_no_network_is_zero_bytes() -> None:
    """A record that ends in zeros is stored without them."""
    assert Network().pack() == bytes(3)
    assert Network.unpack(bytes(3)) == Network()


@pytest.mark.parametrize(
    ("mcc", "mnc", "expected"),
    [
        ("234", "15", Network("234", "15")),
        ("310", "410", Network("310", "410")),
        ("214", "07", Network("214", "07")),  # the zero stays
        ("214", None, Network("214")),
        ("214", "", Network("214")),
        (None, None, Network()),
        ("", "", Network()),
        (None, "15", Network()),  # an MNC alone says nothing
    ],
)
def test_good_network(mcc: object, mnc: object, expected: Network) -> None:
    assert gateway.parse_network(mcc, mnc) == expected


MALFORMED: list[object] = [
    "x",
    "1 5",
    " 15",
    "15\n",
    "1.5",
    "-15",
    "0x15",
    "²³",  # str.isdigit says yes
    "١٥٣",  # \d and int() say yes
    "--",  # iOS (FAULTS_A, G01)
    "65535",
    "410,260",
    0,
    65535,
    -15,
    15.0,
    False,
    True,
    [],
    ["234"],
    {},
]


@pytest.mark.parametrize("mcc", [*MALFORMED, "23", "2345", "1", 15])
def test_bad_mcc_counts_as_absent(mcc: object) -> None:
    assert gateway.parse_network(mcc, "15") == Network()


@pytest.mark.parametrize("mnc", [*MALFORMED, "1", "1234", 7])
def test_bad_mnc_counts_as_absent(mnc: object) -> None:
    assert gateway.parse_network("234", mnc) == Network("234")


def test_integers_are_their_digits() -> None:
    """Android's (FAULTS_A, G02)."""
    assert gateway.parse_network(234, 15) == Network("234", "15")
    assert gateway.parse_network(310, 410) == Network("310", "410")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@pytest.mark.slow
@QUICK
@given(json_values, json_values)
def test_any_json_is_a_network(mcc: object, mnc: object) -> None:
    network = gateway.parse_network(mcc, mnc)
    assert Network.unpack(network.pack()) == network


# -- Countries ----------------------------------------------------------------

TABLE = gateway.MCCS_BY_REGION


def test_table_is_well_formed() -> None:
    assert list(TABLE) == sorted(TABLE)
    territories = Locale("en").territories
    for region, mccs in TABLE.items():
        assert region in territories
        assert all(re.fullmatch("[2-79][0-9]{2}", mcc) for mcc in mccs), region
        assert len(mccs) == len(set(mccs)) > 0


def test_table_covers_the_regions_of_libphonenumber() -> None:
    """No exceptions: a region that a later release adds shows here."""
    assert phonenumbers.SUPPORTED_REGIONS - TABLE.keys() == set()


@pytest.mark.parametrize(
    ("region", "mcc"),
    [
        ("GB", "234"), ("GB", "235"), ("US", "310"), ("US", "316"), ("CA", "302"),
        ("DE", "262"), ("FR", "208"), ("ES", "214"), ("IT", "222"), ("PT", "268"),
        ("IN", "404"), ("IN", "405"), ("JP", "440"), ("JP", "441"), ("CN", "460"),
        ("BR", "724"), ("MX", "334"), ("JM", "338"), ("PR", "330"), ("RU", "250"),
        ("KZ", "401"), ("ZA", "655"), ("AU", "505"), ("NZ", "530"), ("NG", "621"),
        ("KR", "450"), ("VA", "225"), ("IL", "425"), ("TR", "286"), ("AE", "424"),
    ],
)  # fmt: skip
def test_known_code(region: str, mcc: str) -> None:
    """From ITU-T E.212, so that a shifted line in the table shows."""
    assert mcc in TABLE[region]


@pytest.mark.parametrize(
    ("msisdn", "mcc"),
    [
        ("+442079460958", "234"),
        ("+447700900123", "234"),  # kept free for fiction: in no operator's range
        ("+12025550123", "310"),  # +1 is shared by 25 countries
        ("+16135550123", "302"),
        ("+18765551234", "338"),
        ("+17874234567", "330"),
        ("+77011234567", "401"),  # +7 by two
        ("+79161234567", "250"),
        ("+33612345678", "208"),
        ("+34600123456", "214"),
        ("+447624123456", "234"),  # Isle of Man
    ],
)
def test_country_of_a_number(msisdn: str, mcc: str) -> None:
    assert mcc in gateway.country_mccs(Msisdn(msisdn))


@pytest.mark.parametrize(
    ("msisdn", "foreign"),
    [
        ("+16135550123", "310"),  # Canada is not the USA
        ("+12025550123", "302"),
        ("+18765551234", "310"),
        ("+77011234567", "250"),  # Kazakhstan is not Russia
        ("+79161234567", "401"),
        ("+447624123456", "235"),
    ],
)
def test_neighbour_under_one_country_code(msisdn: str, foreign: str) -> None:
    assert foreign not in gateway.country_mccs(Msisdn(msisdn))


@pytest.mark.parametrize("msisdn", ["+979123456789", "+882161234567"])
def test_number_of_no_country(msisdn: str) -> None:
    """Premium rate and satellites: no country, and no error."""
    assert gateway.country_mccs(Msisdn(msisdn)) == ()


# -- Senders ------------------------------------------------------------------

SENDERS = {"310": "+1310", "31026": "+131026", "302": "+1302", "235": "+44235", "20810": "+3310"}


@pytest.mark.parametrize(
    ("network", "msisdn", "expected"),
    [
        (Network("310", "26"), "", "+131026"),  # MCC+MNC before MCC
        (Network("310", "260"), "", "+1310"),  # 260 is not 26
        (Network("310", "026"), "", "+1310"),
        (Network("310"), "", "+1310"),
        (Network("208", "10"), "", "+3310"),
        (Network("208"), "", "us"),  # a key for one network is none for its country
        (Network("208", "01"), "", "us"),
        (Network("262", "01"), "", "us"),
        (Network(), "", "us"),
        (Network(), "+12025550123", "+1310"),  # the country by the number
        (Network(), "+16135550123", "+1302"),
        (Network(), "+442079460958", "+44235"),  # any of the country's codes
        (Network(), "+33612345678", "us"),
        (Network("310"), "+16135550123", "+1310"),  # what the request names counts
        (Network("262"), "+16135550123", "us"),
        (Network("999"), "+12025550123", "+1310"),  # an MCC that nobody has says nothing
        (Network("000", "00"), "+12025550123", "+1310"),
        (Network("901"), "+442079460958", "+44235"),  # nor does one of no country
    ],
)
def test_sender(network: Network, msisdn: str, expected: str) -> None:
    assert gateway.number_for(SENDERS, "us", network, msisdn) == expected


@pytest.mark.parametrize("network", [Network(), Network("310"), Network("310", "26")])
@pytest.mark.parametrize("msisdn", ["", "+12025550123", "+447700900123"])
def test_empty_map_gives_the_default(network: Network, msisdn: str) -> None:
    assert gateway.number_for({}, "us", network, msisdn) == "us"


tables = st.dictionaries(st.sampled_from(["234", "310", "23415", "310410", "302"]), st.text())


@QUICK
@given(tables, st.builds(Network, st.sampled_from(["234", "310", "302"]), mncs | st.just("")))
def test_sender_is_the_most_exact_one(table: Mapping[str, str], network: Network) -> None:
    found = gateway.number_for(table, "default", network)
    if network.mnc and network.mcc + network.mnc in table:
        assert found == table[network.mcc + network.mnc]
    else:
        assert found == table.get(network.mcc, "default")


@pytest.mark.slow
@QUICK
@given(
    st.from_regex(
        r"\+(375 ?8|86 ?0|55 ?0|57|82 ?0|61 ?0|44 ?\(0\)|7|1) ?[0-9]{6,12}", fullmatch=True
    )
)
def test_a_number_that_was_read_is_read_again_as_itself(value: str) -> None:
    """Else a session could not be asked about the number that it was told to have."""
    with contextlib.suppress(InvalidParameter):
        msisdn = gateway.parse_msisdn(value)
        assert gateway.parse_msisdn(msisdn) == msisdn


def test_a_trunk_prefix_is_left_out_or_refused() -> None:
    assert gateway.parse_msisdn("+44 (0)7700 900123") == "+447700900123"
    with pytest.raises(InvalidParameter):
        gateway.parse_msisdn("+375 8 8457131869")  # once it is left out, it could be again
