"""Kannel over SMPP to npm's smpp: rejects, throttling, a link that dies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import kannel
import lab
import pytest

kannel.require(smpp=True)


class Site(kannel.Site):
    """With an SMSC over SMPP."""

    def start_smsc(self, folder: Path) -> None:
        self.smsc = kannel.SmppSmsc(folder, self.smsc_port)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One for all tests here; each has a number of its own."""
    lines = [
        "smsc = smpp", "host = 127.0.0.1", "smsc-username = u", "smsc-password = p",
        "system-type = t", "transceiver-mode = true", "reconnect-delay = 1", "msg-id-type = 0x00",
    ]  # fmt: skip
    made = Site(tmp_path_factory.mktemp("smpp"), lines)
    yield made
    made.close()
    made.smsc.kill()


def ask(site: Site, number: str) -> lab.Client:
    """Have a PIN sent; the answer is what a user gets whose message was taken."""
    client = site.gateway.client()
    client.register()
    reply = client.verify(number)
    assert (reply.status, reply.body["mtSender"]) == (200, "+447700900999")
    return client


def code(site: Site, number: str) -> str:
    """The code in the one message that the SMSC took."""
    kannel.wait_for(lambda: site.smsc.received(number))
    [text] = site.smsc.received(number)
    return text.split()[-1]


def test_a_message_is_delivered(site: Site) -> None:
    client = ask(site, "+447700900100")
    assert client.verify_code(code(site, "+447700900100")).status == 200
    kannel.wait_for(lambda: site.receipts() == ["delivered"])


def test_a_rejected_and_an_undelivered_message_are_known_as_failed(site: Site) -> None:
    before = site.receipts().count("failed")
    ask(site, "+447700900111")
    kannel.wait_for(lambda: site.receipts().count("failed") == before + 1)
    assert site.smsc.received("+447700900111") == []
    client = ask(site, "+447700900113")
    kannel.wait_for(lambda: site.receipts().count("failed") == before + 2)
    sent = code(site, "+447700900113")
    assert client.verify_code(sent).status == 200  # the code is good if it came after all
    # The SMSC's receipt quotes the beginning of the message, and Kannel logs that, not we.
    assert sent not in site.gateway.output
    assert "Your verification" not in site.gateway.output


def test_a_throttled_message_comes_once(site: Site) -> None:
    client = ask(site, "+447700900158")
    assert client.verify_code(code(site, "+447700900158")).status == 200


def test_a_link_that_dies_delays_the_message_and_keeps_its_code(site: Site) -> None:
    """Kannel says 202 and "queued": unknown, so answered as sent, and the code stays valid."""
    number, sign = "+447700900101", "Couldn't connect to SMS center"
    before = site.kannel.log("bearerbox").count(sign)
    site.smsc.kill()
    kannel.wait_for(lambda: site.kannel.log("bearerbox").count(sign) > before)
    client = ask(site, number)
    kannel.wait_for(lambda: "kannel answered 202 Accepted" in site.gateway.output)
    assert site.smsc.received(number) == []
    assert client.verify_code("000000").body["errno"] == 105
    site.smsc.start()
    assert client.verify_code(code(site, number)).body == {"msisdn": number}
