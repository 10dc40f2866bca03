"""The whole flow through a real Kannel and its fake SMSC: MT, MO, delivery receipts."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import kannel
import lab
import pytest
from support import NUMBER

import gateway

kannel.require()


class Site(kannel.Site):
    """With Kannel's own fake SMSC, and the phone behind it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, ["smsc = fake", "connect-allow-ip = 127.0.0.1"])
        self.phone = kannel.FakeHandset(self.smsc_port)

    def close(self) -> None:
        self.phone.close()
        super().close()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One for all tests here; each uses a session of its own."""
    made = Site(tmp_path_factory.mktemp("kannel"))
    yield made
    made.close()


def returned(client: lab.Client, code: str) -> lab.Reply:
    """Return a code; again after a second, if the phone was faster than Kannel's answer to us."""
    reply = client.verify_code(code)
    if reply.status == 503 and reply.headers["Retry-After"] == "1":
        time.sleep(1)
        reply = client.verify_code(code)
    return reply


def test_registration_flow(site: Site) -> None:
    client = site.gateway.client()
    client.register(msisdn=NUMBER, mcc="234")
    assert client.verify(NUMBER, mcc="234").body["mtSender"] == "+447700900999"
    sender, to, kind, text = site.phone.receive()
    assert (sender, to, kind) == ("+447700900999", NUMBER, "text")
    found = re.fullmatch("Your verification code is: ([0-9]{6})", text)
    assert found
    wrong = f"{(int(found[1]) + 1) % 10**6:06}"
    assert returned(client, wrong).body["errno"] == 105
    assert returned(client, found[1]).body == {"msisdn": NUMBER}
    key = gateway.generate_key("RS256")
    assert lab.claims(client.sign(key).body["cert"])["verifiedMSISDN"] == NUMBER


@pytest.mark.parametrize(
    "words", ["{}", "/sms/momt/verify {}", "VERIFY {} thank you, ünïcode", "x" * 400 + " {}"]
)
def test_the_phone_speaks_first(site: Site, words: str) -> None:
    client = site.gateway.client()
    client.register()
    assert client.credentials
    site.phone.text(NUMBER, "12345", words.format(client.credentials.hawk_id))
    sender, to, _, text = site.phone.receive()
    assert (sender, to) == ("+447700900999", NUMBER)
    assert re.fullmatch("[0-9a-f]{32}", text)
    assert returned(client, text).body == {"msisdn": NUMBER}


@pytest.mark.parametrize(
    ("sender", "words"),
    [
        ("Bank", "{}"),  # an alphanumeric sender has no phone to answer
        ("12345", "{}"),  # nor has a short code
        ("+49110", "{}"),  # not even if it begins like a number
        (NUMBER, "{}f"),  # 65 digits are another thing
        (NUMBER, "hello"),
    ],
)
def test_odd_messages_do_no_harm(site: Site, sender: str, words: str) -> None:
    odd, good = site.gateway.client(), site.gateway.client()
    for client in (odd, good):
        client.register()
    assert odd.credentials
    assert good.credentials
    site.phone.text(sender, "12345", words.format(odd.credentials.hawk_id))
    # The next message is answered, and that is the next answer.
    site.phone.text(NUMBER, "12345", good.credentials.hawk_id)
    *_, text = site.phone.receive()
    assert returned(odd, text).body["errno"] == 111
    assert returned(good, text).body == {"msisdn": NUMBER}


def test_other_alphabets_arrive(site: Site) -> None:
    client = site.gateway.client()
    client.register()
    signed = {"Accept-Language": "ja"}
    assert client.call("POST", "/sms/verify", {"msisdn": NUMBER}, **signed).status == 200
    _, _, kind, coded = site.phone.receive()
    text = unquote_to_bytes(coded.replace("+", " ")).decode("utf-16-be")
    assert kind == "ucs-2"
    assert re.fullmatch("確認コードは次のとおりです: [0-9]{6}", text)
    signed = {"Accept-Language": "it"}  # in the GSM alphabet, though not in ASCII
    assert client.call("POST", "/sms/verify", {"msisdn": NUMBER}, **signed).status == 200
    assert site.phone.receive()[2] == "text"


@pytest.mark.parametrize("words", ["{}", "Мой код подтверждения: {}", "我的 {} 😀"])
@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_phone_that_writes_ucs2(site: Site, words: str, parts: int, reverse: bool) -> None:
    """Kannel delivers its bytes where mo-recode is off, which is its default."""
    client = site.gateway.client()
    client.register()
    assert client.credentials
    text = words.format(client.credentials.hawk_id)
    size = -(-len(text) // parts)
    ref = secrets.randbelow(256)
    sent = [(bytes([5, 0, 3, ref, parts, n + 1]), text[n * size :][:size]) for n in range(parts)]
    for udh, part in reversed(sent) if reverse else sent:
        site.phone.wide(NUMBER, "12345", part, udh if parts > 1 else b"")
    *_, text = site.phone.receive()
    assert returned(client, text).body == {"msisdn": NUMBER}


def test_receipts_become_the_outcome(site: Site) -> None:
    kannel.wait_for(lambda: set(site.receipts()) <= {"delivered"})
    before = len(site.receipts())
    client = site.gateway.client()
    client.register()
    assert client.verify(NUMBER).status == 200
    code = site.phone.receive()[3].split()[-1]
    kannel.wait_for(lambda: len(site.receipts()) > before)  # those of others may still come
    kannel.wait_for(lambda: set(site.receipts()) == {"delivered"})
    log = site.gateway.output
    assert "receipt: delivered" in log
    for secret in (code, NUMBER[1:], "k4nnel-secret", "p4th"):
        assert secret not in log


def test_nothing_secret_is_in_kannels_access_log(site: Site) -> None:
    """The login is in headers: smsbox writes the URLs that it is called by into its logs."""
    assert "k4nnel-secret" not in (site.kannel.folder / "smsbox.log").read_text("latin-1")


@pytest.mark.parametrize(
    ("change", "errno"),
    [({"password": "wrong"}, 201), ({"endpoint": "http://127.0.0.1:{port}/nowhere"}, 201)],
)
def test_a_refusal_is_told(
    site: Site, make_client: Callable[..., Any], change: dict[str, str], errno: int
) -> None:
    change = {k: v.format(port=site.kannel.sendsms) for k, v in change.items()}
    client = make_client(sms_providers=[{**site.entry, "receipts": False, **change}])
    client.register()
    answer = client.ask()
    assert (answer.status, answer.errno) == (503, errno)
