"""Numbers at rest: only who bears the Hawk id, on this server, opens a stored number."""

from __future__ import annotations

import pytest
from cryptography.exceptions import InvalidTag
from hypothesis import given, settings
from hypothesis import strategies as st

import gateway

SECRET = bytes(range(32))
HAWK_ID = gateway.HawkId("c0a29dcf46174973da1378696e4c82ae10f723cf4f4d9f75e39f4ae3851595ab")
NUMBER = gateway.Msisdn("+447700900123")
QUICK = settings(max_examples=100, database=None, deadline=None, derandomize=True)

numbers = st.integers(10**6, 10**15 - 1).map(lambda n: gateway.Msisdn(f"+{n}"))
secrets = st.binary(min_size=32, max_size=32)


@QUICK
@given(numbers, secrets, secrets)
def test_every_number_comes_back_from_24_bytes(
    msisdn: gateway.Msisdn, id_bytes: bytes, secret: bytes
) -> None:
    hawk_id = gateway.HawkId(id_bytes.hex())
    sealed = gateway.seal_msisdn(secret, hawk_id, msisdn)
    assert len(sealed) == 24
    assert gateway.open_msisdn(secret, hawk_id, sealed) == msisdn


@pytest.mark.parametrize("digits", range(7, 16))
def test_count_of_digits_is_hidden(digits: int) -> None:
    """The least and the greatest number of each length (AES-SIV alone hides no length)."""
    for text in ("+1" + "0" * (digits - 1), "+" + "9" * digits):
        sealed = gateway.seal_msisdn(SECRET, HAWK_ID, gateway.Msisdn(text))
        assert len(sealed) == 24
        assert gateway.open_msisdn(SECRET, HAWK_ID, sealed) == text


def test_same_number_gives_the_same_bytes() -> None:
    """A record that is written again unchanged must compare equal."""
    sealed = gateway.seal_msisdn(SECRET, HAWK_ID, NUMBER)
    assert sealed == gateway.seal_msisdn(SECRET, HAWK_ID, NUMBER)


def test_sessions_with_one_number_look_unrelated() -> None:
    """Else the store would tell which sessions belong to one phone."""
    ids = [gateway.HawkId(f"{n:064x}") for n in range(100)]
    sealed = [gateway.seal_msisdn(SECRET, hawk_id, NUMBER) for hawk_id in ids]
    assert len({s[:16] for s in sealed}) == len({s[16:] for s in sealed}) == 100


def test_bytes_show_nothing_of_the_number() -> None:
    sealed = gateway.seal_msisdn(SECRET, HAWK_ID, NUMBER)
    digits = NUMBER[1:]
    assert digits.encode() not in sealed
    assert int(digits).to_bytes(8, "big").lstrip(b"\0") not in sealed


def test_every_flipped_bit_is_refused() -> None:
    sealed = int.from_bytes(gateway.seal_msisdn(SECRET, HAWK_ID, NUMBER), "big")
    for bit in range(24 * 8):
        with pytest.raises(InvalidTag):
            gateway.open_msisdn(SECRET, HAWK_ID, (sealed ^ 1 << bit).to_bytes(24, "big"))


@pytest.mark.parametrize("length", [0, 1, 15, 16, 23, 25])
def test_another_length_is_refused(length: int) -> None:
    sealed = gateway.seal_msisdn(SECRET, HAWK_ID, NUMBER)
    with pytest.raises(InvalidTag):
        gateway.open_msisdn(SECRET, HAWK_ID, (sealed + b"\0")[:length])


@pytest.mark.parametrize("bit", [0, 7, 128, 255])
def test_another_id_is_refused(bit: int) -> None:
    """Whoever has the database and the master secret, but not the id, opens nothing."""
    other = gateway.HawkId(f"{int(HAWK_ID, 16) ^ 1 << bit:064x}")
    sealed = gateway.seal_msisdn(SECRET, HAWK_ID, NUMBER)
    with pytest.raises(InvalidTag):
        gateway.open_msisdn(SECRET, other, sealed)


@pytest.mark.parametrize("bit", [0, 7, 128, 255])
def test_another_secret_is_refused(bit: int) -> None:
    """Whoever has the database and a client's log, but not the secret, opens nothing."""
    other = (int.from_bytes(SECRET, "big") ^ 1 << bit).to_bytes(32, "big")
    sealed = gateway.seal_msisdn(SECRET, HAWK_ID, NUMBER)
    with pytest.raises(InvalidTag):
        gateway.open_msisdn(other, HAWK_ID, sealed)


def test_id_and_secret_do_not_change_places() -> None:
    """Both are 32 bytes: joining or swapping them by mistake must not open anything."""
    sealed = gateway.seal_msisdn(SECRET, HAWK_ID, NUMBER)
    with pytest.raises(InvalidTag):
        gateway.open_msisdn(bytes.fromhex(HAWK_ID), gateway.HawkId(SECRET.hex()), sealed)
