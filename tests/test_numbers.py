"""Numbers and networks: what is a phone number, which country is it, which sender serves it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping

import phonenumbers
import pytest
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
        "tel:+447700900123",
        "+447700900123;ext=5",
        "+447700900123 x5",
        "+447700900123 ext. 5",
        "+447700900123#",
        "+447700900123,+447700900124",  # two
        "+447700900123\n",
        "+44\n7700900123",
        "+44\t7700900123",
        "+447700900123\0",
        "+44_7700_900123",
        "+44/7700/900123",
        "+44:7700900123",
        "+٤٤٧٧٠٠٩٠٠١٢٣",  # int() and \d take other scripts' digits
        "+४४७७००९००१२३",
        "+44７７００９００１２３",
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
        pytest.param("+44" + " " * 10_000 + "7700900123", id="wide"),
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
    assert gateway.parse_network(mcc, mnc, lenient=True) == expected


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
    0,  # false in Python, but neither null nor ""
    15,
    234,
    15.0,
    False,
    True,
    [],
    ["234"],
    {},
]


@pytest.mark.parametrize("mcc", [*MALFORMED, "23", "2345", "1"])
def test_bad_mcc(mcc: object) -> None:
    for lenient in (False, True):  # only an MNC is treated with lenience
        with pytest.raises(InvalidParameter, match="mcc"):
            gateway.parse_network(mcc, "15", lenient)


@pytest.mark.parametrize("mnc", [*MALFORMED, "1", "1234"])
def test_bad_mnc(mnc: object) -> None:
    """400/107, except for /discover, where it counts as absent."""
    with pytest.raises(InvalidParameter, match="mnc"):
        gateway.parse_network("234", mnc)
    assert gateway.parse_network("234", mnc, lenient=True) == Network("234")


# -- Countries ----------------------------------------------------------------

TABLE = {entry[:2]: entry[2:].split(",") for entry in gateway.MCCS_BY_REGION.split()}


def test_table_is_well_formed() -> None:
    entries = gateway.MCCS_BY_REGION.split()
    assert len(TABLE) == len(entries)  # no region twice
    assert entries == sorted(entries)
    for entry in entries:
        assert re.fullmatch("[A-Z]{2}[2-79][0-9]{2}(,[2-79][0-9]{2})*", entry), entry
    assert all(len(mccs) == len(set(mccs)) for mccs in TABLE.values())


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
