"""Each entry of the page ``operate/providers``, against a stand-in in the shape that it links."""

from __future__ import annotations

import base64
import hmac
import json
import re
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, quote_from_bytes, urlencode, urlsplit

import pytest
from provider import Provider, reply
from support import NUMBER, WsgiClient, receipts

import gateway

PAGE = (Path(__file__).parent.parent / "notebooks/operate/providers.md").read_text()
FORM = {"CONTENT_TYPE": "application/x-www-form-urlencoded"}
TO = gateway.Msisdn(NUMBER)
SENTENCE = "Your verification code is: 135790"
TEXT = gateway.MessageText(SENTENCE, "135790", "en")
WIDE = gateway.MessageText("Ваш код: 135790", "135790", "ru")


def sections() -> dict[str, tuple[str, gateway.Json]]:
    """The text of each provider's section, and its TOML."""
    found = {}
    for title, text in re.findall(r"(?ms)^### (.+?)\n(.*?)(?=^###? |\Z)", PAGE):
        blocks = re.findall(r"(?ms)^```toml\n(.*?)^```", text)
        found[title] = text, tomllib.loads("\n".join(blocks))
    return found


SECTIONS = sections()
SENDING = [title for title, (_, values) in SECTIONS.items() if "sms_providers" in values]
RECEIVING = [title for title, (_, values) in SECTIONS.items() if "sms_inbound" in values]


class Out(NamedTuple):
    """What a provider must be sent, and how it answers.

    Attributes:
        sent: Its form, JSON or query; ``...`` is any value.
        taken: Status and body of the answer to a message that it takes; ``ids``: of that message.
        headers: What these must be.
        refused, failed, throttled: Answers to a number that is refused for good, to another
            failure, and to messages that come too fast.
        wide: What else it is sent for a text that needs UCS-2, if that shows.
    """

    sent: dict[str, Any]
    taken: tuple[int, Any]
    ids: list[str] | None = None
    headers: dict[str, str] = {}
    refused: tuple[int, Any] | None = None
    failed: tuple[int, Any] | None = None
    wide: dict[str, Any] = {}
    throttled: tuple[int, Any] | None = None


def basic(login: str) -> dict[str, str]:
    """The header of HTTP basic authentication (RFC 7617)."""
    return {"authorization": "Basic " + base64.b64encode(login.encode()).decode()}


def vonage(status: str) -> gateway.Json:
    """Vonage's answer, as its page "Troubleshooting SMS" has it."""
    part = {"to": "447700900000", "message-id": "0C000000217B7F02", "status": status}
    return {"message-count": "1", "messages": [part]}


VONAGE = {"from": "Shop", "to": NUMBER[1:], "text": SENTENCE, "api_key": "KEY"}
VONAGE |= {"api_secret": "SECRET"}
TWILIO = basic("ACCOUNT-SID:AUTH-TOKEN")
DLT = ("1101456324675322134", "1107457532145798767")
SNS = "<PublishResponse><PublishResult><MessageId>1</MessageId></PublishResult></PublishResponse>"
SNS_BAD = "<ErrorResponse><Error><Code>{}</Code></Error></ErrorResponse>"

OUT: dict[str, Out] = {
    "Vonage (once Nexmo), SMS API": Out(
        {**VONAGE, "callback": "https://id.example/sms/receipt/?provider=nexmo"},
        (200, vonage("0")), ["0C000000217B7F02"], refused=(200, vonage("7")),
        failed=(200, vonage("4")), wide={"type": "unicode"},
    ),
    "Vonage, to India": Out(
        {**VONAGE, "entity-id": DLT[0], "content-id": DLT[1]}, (200, vonage("0"))
    ),
    "Twilio": Out(
        {"From": "Shop", "To": NUMBER, "Body": SENTENCE,
         "StatusCallback": "https://id.example/sms/receipt/?provider=twilio"},
        (201, {"sid": "SM1", "status": "queued"}), ["SM1"], TWILIO,
        (400, {"code": 21614, "status": 400}), (400, {"code": 21606, "status": 400}),
    ),
    "Twilio, messaging service": Out(
        {"MessagingServiceSid": "MG0123456789abcdef0123456789abcdef", "To": NUMBER,
         "Body": SENTENCE}, (201, {"sid": "SM1", "status": "accepted"}), None, TWILIO,
        (400, {"code": 21610, "status": 400}), throttled=(429, {"code": 20429, "status": 429}),
    ),
    "Amazon": Out(
        {"PhoneNumber": NUMBER, "Message": SENTENCE, **{
            f"MessageAttributes.entry.{n}.{key}": value
            for n, name, text in (
                (1, "AWS.SNS.SMS.SenderID", "Shop"), (2, "AWS.SNS.SMS.SMSType", "Transactional"),
                (3, "AWS.MM.SMS.EntityId", DLT[0]), (4, "AWS.MM.SMS.TemplateId", DLT[1]))
            for key, value in (("Name", name), ("Value.DataType", "String"),
                               ("Value.StringValue", text))},
         "Action": "Publish", "Version": ...},
        (200, SNS), None, {}, (400, SNS_BAD.format("InvalidParameter")),
        (400, SNS_BAD.format("Throttling")),
    ),
    "Kannel": Out(
        {"": SENTENCE}, (202, "0: Accepted for delivery"), None,
        {"x-kannel-to": NUMBER, "x-kannel-from": "Shop", "x-kannel-username": "USER",
         "x-kannel-meta-data": f"?smpp?PE_ID={DLT[0]}&TEMPLATE_ID={DLT[1]}"},
        (400, "Missing receiver number, rejected"), (403, "Authorization failed for sendsms"),
    ),
    "A phone of your own: SMSGate": Out(
        {"id": ..., "textMessage": {"text": SENTENCE}, "phoneNumbers": [NUMBER], "ttl": 600,
         "priority": 127},
        (202, {"id": "PyDmBQZZXYmyxMwED8Fzy", "state": "Pending", "recipients": []}),
        ["PyDmBQZZXYmyxMwED8Fzy"], basic("USER:PASSWORD"),
        (400, {"message": "invalid phone number"}), (202, {"id": "1", "state": "Failed"}),
    ),
    "A phone of your own: httpSMS": Out(
        {"from": "Shop", "to": NUMBER, "content": SENTENCE},
        (200, {"data": {"id": "1"}, "status": "success"}), None, {"x-api-key": "KEY"},
        (422, {"status": "error"}), (401, {"status": "error"}),
    ),
    "A phone of your own: textbee": Out(
        {"recipients": [NUMBER], "message": SENTENCE}, (200, {"data": {"success": True}}), None,
        {"x-api-key": "KEY"}, (400, {}), (401, {}),
    ),
    "Sinch": Out(
        {"from": "Shop", "to": [NUMBER], "body": SENTENCE}, (201, {"id": "01FC66", "to": []}),
        None, {"authorization": "Bearer TOKEN"}, (400, {"code": "syntax_invalid_parameter_format"}),
        (403, {"code": "forbidden"}),
    ),
    "Infobip": Out(
        {"messages": [{"destinations": [{"to": NUMBER[1:]}], "from": "Shop", "text": SENTENCE}]},
        (200, {"messages": [{"messageId": "2", "status": {"groupName": "PENDING"}}]}), None,
        {"authorization": "App KEY"}, None,
        (200, {"messages": [{"status": {"groupName": "REJECTED"}}]}),
    ),
    "Telnyx": Out(
        {"from": "Shop", "to": NUMBER, "text": SENTENCE}, (200, {"data": {"id": "40"}}), None,
        {"authorization": "Bearer KEY"}, (422, {"errors": []}), (401, {"errors": []}),
    ),
    "Plivo": Out(
        {"src": "Shop", "dst": NUMBER[1:], "text": SENTENCE, "url": ""},
        (202, {"message": "message(s) queued", "message_uuid": ["db3ce55a"]}), None,
        basic("AUTH-ID:AUTH-TOKEN"), (400, {"error": "x"}), (401, "Could not verify"),
    ),
    "46elks": Out(
        {"from": "Shop", "to": NUMBER, "message": SENTENCE, "dontlog": "message",
         "whendelivered": "https://id.example/sms/receipt/PATH-SECRET?provider=http"},
        (200, {"status": "created", "id": "s70df59406a1b4643b96f3f91e0bfb7b0"}),
        ["s70df59406a1b4643b96f3f91e0bfb7b0"], basic("USER:PASSWORD"), None,
        (403, "Not enough credits"),
    ),
    "Africa's Talking": Out(
        {"username": "USER", "from": "Shop", "to": NUMBER, "message": SENTENCE},
        (201, {"SMSMessageData": {"Recipients": [{"statusCode": 101, "messageId": "ATXid_1"}]}}),
        None, {"apikey": "KEY"},
        (201, {"SMSMessageData": {"Recipients": [{"statusCode": 403, "messageId": "None"}]}}),
        (201, {"SMSMessageData": {"Recipients": [{"statusCode": 405, "messageId": "None"}]}}),
    ),
    "MessageBird, REST": Out(
        {"originator": "Shop", "recipients": [int(NUMBER)], "body": SENTENCE, "datacoding": "auto"},
        (201, {"id": "49e40bae", "recipients": {"totalSentCount": 1}}), None,
        {"authorization": "AccessKey KEY"}, (422, {"errors": [{"code": 9}]}),
        (401, {"errors": [{"code": 2}]}),
    ),
    "Jasmin": Out(
        {"username": "USER", "password": "PASSWORD", "from": "Shop", "to": NUMBER,
         "coding": "0", "content": SENTENCE},
        (200, 'Success "07033084-5cfd-4812-90a4-e4d24ffb6e3d"'), None, {},
        (400, 'Error "Argument to has an invalid value: 1."'), (412, 'Error "No route found"'),
        {"coding": "8", "content": None, "hex-content": WIDE.encode("utf-16-be").hex()},
    ),
    "MSG91": Out(
        {"template_id": "TEMPLATE", "recipients": [{"mobiles": NUMBER[1:], "VAR1": "135790"}]},
        (200, {"message": "5e1e93cad6fc054d8e759a5b", "type": "success"}), None,
        {"authkey": "KEY"}, None, (200, {"message": "x", "type": "error"}),
    ),
    "Exotel": Out(
        {"From": "Shop", "To": NUMBER, "Body": SENTENCE, "DltEntityId": DLT[0],
         "DltTemplateId": DLT[1]},
        (200, "<TwilioResponse><SMSMessage><Sid>1</Sid></SMSMessage></TwilioResponse>"), None,
        basic("KEY:TOKEN"), (400, ""), (401, ""), {"EncodingType": "unicode"},
    ),
    "Kavenegar, verify lookup": Out(
        {"receptor": "07700900123", "token": "135790", "template": "TEMPLATE"},
        (200, {"return": {"status": 200}, "entries": [{"messageid": 8792343}]}), None, {}, None,
        (403, {"return": {"status": 403}}),
    ),
    "Telegram Gateway": Out(
        {"phone_number": NUMBER, "code": "135790", "ttl": 600},
        (200, {"ok": True, "result": {"request_id": "1"}}), None,
        {"authorization": "Bearer TOKEN"}, None, (200, {"ok": False, "error": "X"}),
    ),
    "WhatsApp Cloud API": Out(
        {"messaging_product": "whatsapp", "to": NUMBER[1:], "type": "template", "template": {
            "name": "TEMPLATE", "language": {"code": "en"}, "components": [
                {"type": "body", "parameters": [{"type": "text", "text": "135790"}]},
                {"type": "button", "sub_type": "url", "index": "0",
                 "parameters": [{"type": "text", "text": "135790"}]}]}},
        (200, {"messaging_product": "whatsapp", "messages": [{"id": "wamid.1"}]}), None,
        {"authorization": "Bearer TOKEN"}, (400, {"error": {"code": 131026}}),
        (401, {"error": {"code": 190}}),
    ),
}  # fmt: skip


def test_each_section_names_its_document_and_is_tested() -> None:
    assert len(SENDING) >= 20
    assert len(RECEIVING) >= 15
    assert list(OUT) == SENDING
    assert list(IN) == RECEIVING
    for title, (text, values) in SECTIONS.items():
        assert re.search(r"\]\(https://[^)]+\)", text), title
        for lines in re.findall(r"(?ms)^```toml\n(.*?)^```", text):
            assert len(lines.splitlines()) <= 20, title
        assert values.keys() <= {"sms_providers", "sms_inbound", "mt_sender"}, title


def test_the_page_names_every_place_in_templates() -> None:
    [one] = gateway.SmsSender(settings("Sinch", "http://127.0.0.1:9")).providers
    assert isinstance(one, gateway.HttpSms)
    named = set(re.findall(r"`\{([a-z_]+)\}`", PAGE))
    assert one._values("Shop", TO, TEXT).keys() - named == {"service", "receipt_mask"}


def settings(title: str, url: str, **more: Any) -> gateway.Settings:
    """The page's settings for a provider, whose host is replaced by our stand-in."""
    values = SECTIONS[title][1]
    entries: list[gateway.Json] = []
    for entry in values.get("sms_providers", []):
        default = gateway.declared(gateway.SMS_LISTS["sms_providers"][entry["kind"]])["endpoint"]
        path = urlsplit(str(entry.get("endpoint") or default["default"])).path
        entries.append({**entry, "endpoint": url + path})
    public = {"public_url": "https://id.example", "trusted_proxies": []}
    inbound = values.get("sms_inbound", [])
    own = {"sms_inbound": inbound, "sms_providers": entries}
    return gateway.Settings(**{**public, **own, **more})


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Provider]:
    """A provider on loopback; boto3 finds keys."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    with Provider(reply()) as one:
        yield one


def sent_to(one: Provider) -> dict[str, Any]:
    """The fields of the last request, in whatever form they came."""
    request = one.received[-1]
    kind = request.headers["content-type"].partition(";")[0]
    if kind == "application/json":
        return dict(json.loads(request.body))
    if kind == "text/plain":
        return {"": request.body}
    return dict(parse_qsl(request.body, strict_parsing=True))


@pytest.mark.parametrize("title", OUT)
def test_a_message_leaves_in_the_shape_of_its_document(title: str, stand_in: Provider) -> None:
    shape, host = OUT[title], stand_in.url.removesuffix("/sms")
    values = settings(title, host)
    [one] = gateway.SmsSender(values).providers
    sender = SECTIONS[title][1].get("mt_sender", "Shop")
    stand_in.answer = reply(shape.taken[1], shape.taken[0])
    ids = one.send(sender, TO, TEXT)
    if shape.ids or one.entry.get("receipts"):
        assert ids == shape.ids
    sent, request = sent_to(stand_in), stand_in.received[-1]
    expected = {k: sent.get(k) if v is ... else v for k, v in shape.sent.items()}
    assert sent == expected
    assert shape.headers.items() <= request.headers.items()
    path = urlsplit(SECTIONS[title][1]["sms_providers"][0].get("endpoint", "")).path
    assert request.target.startswith(path)
    assert "135790" not in request.target
    one.send(sender, TO, WIDE)
    wide = sent_to(stand_in)
    assert {name: wide.get(name) for name in shape.wide} == shape.wide
    for meaning in ("Refused", "Failed", "Throttled"):
        if answer := getattr(shape, meaning.lower()):
            stand_in.answer = reply(answer[1], answer[0])
            with pytest.raises(gateway.SmsFailed) as caught:
                one.send(sender, TO, TEXT)
            kinds = getattr(gateway, f"Sms{meaning}"), gateway.SmsDenied
            assert type(caught.value) in kinds[: 1 + (meaning == "Failed")], answer
            assert NUMBER[1:] not in str(caught.value)


# -- In --------------------------------------------------------------------------


class Call(NamedTuple):
    """How a webhook is called: method, more query, body, environment."""

    method: str = "POST"
    query: str = ""
    body: bytes = b""
    environ: dict[str, str] = {}


def form(**fields: str) -> Call:
    """A form."""
    return Call(body=urlencode(fields).encode(), environ=dict(FORM))


def as_json(value: object, kind: str = "application/json") -> Call:
    """A JSON body."""
    return Call(body=json.dumps(value).encode(), environ={"CONTENT_TYPE": kind})


def vonage_in(text: str) -> Call:
    """Signed as "Signing messages" says."""
    fields = {"msisdn": NUMBER[1:], "to": "447700900000", "messageId": "0A1", "text": text}
    fields |= {"type": "text", "timestamp": str(int(time.time())), "nonce": "n"}
    signed = "".join(f"&{name}={fields[name]}" for name in sorted(fields))
    return form(**fields, sig=hmac.digest(b"SIGNATURE-SECRET", signed.encode(), "sha256").hex())


def twilio_in(text: str) -> Call:
    """Signed as "Webhook security" says."""
    fields = {"MessageSid": "SM1", "From": NUMBER, "To": "+15550001111", "Body": text}
    signed = "https://id.example/sms/momt/?provider=twilio"
    signed += "".join(name + fields[name] for name in sorted(fields))
    digest = base64.b64encode(hmac.digest(b"AUTH-TOKEN", signed.encode(), "sha1")).decode()
    call = form(**fields)
    return call._replace(environ={**call.environ, "HTTP_X_TWILIO_SIGNATURE": digest})


def smsgate_event(event: str, payload: gateway.Json, stamp: int = 0) -> Call:
    """Signed as "Payload signing" says."""
    document = {"deviceId": "ffffffffceb0b1db0000018e937c815b", "event": event,
                "id": "Ey6ECgOkVVFjz3CL48B8C", "payload": payload, "webhookId": "1"}  # fmt: skip
    call, stamp = as_json(document), stamp or int(time.time())
    digest = hmac.digest(b"SIGNING-KEY", call.body + str(stamp).encode(), "sha256").hex()
    signed = {"HTTP_X_SIGNATURE": digest, "HTTP_X_TIMESTAMP": str(stamp)}
    return call._replace(environ=call.environ | signed)


def smsgate_in(text: str, sender: str = "07700 900123") -> Call:
    """A message that the phone received."""
    fields = {"messageId": "abc123", "message": text, "sender": sender, "recipient": None}
    more = {"phoneNumber": sender, "simNumber": 1, "receivedAt": "2026-06-22T15:46:11.000+07:00"}
    return smsgate_event("sms:received", {**fields, **more})


def aws_in(text: str) -> Call:
    """JSON in a text in JSON, which calls itself text/plain."""
    message = {"originationNumber": NUMBER, "destinationNumber": "+12125550101",
               "messageBody": text, "inboundMessageId": "cae1"}  # fmt: skip
    outer = {"Type": "Notification", "MessageId": "1", "Message": json.dumps(message)}
    return as_json(outer, "text/plain; charset=UTF-8")


def kannel_in(text: str) -> Call:
    """A GET; the text as the bytes of UCS-2."""
    octets = quote_from_bytes(text.encode("utf-16-be"))
    return Call("GET", f"&from=%2B{NUMBER[1:]}&to=12345&text={octets}&id=5&coding=2&udh=")


IN: dict[str, Callable[[str], Call]] = {
    "Vonage (once Nexmo), SMS API": vonage_in,
    "Twilio": twilio_in,
    "Amazon": aws_in,
    "Kannel": kannel_in,
    "A phone of your own: SMSGate": smsgate_in,
    "A phone of your own: httpSMS": lambda text: as_json(
        {"data": {"contact": NUMBER, "content": text, "message_id": "0b01", "owner": "+1800555019"},
         "datacontenttype": "application/json", "id": "f4ae", "type": "message.phone.received"}
    ),
    "A phone of your own: textbee": lambda text: as_json(
        {"event": "MESSAGE_RECEIVED", "timestamp": "2026-01-20T10:30:00Z", "data": {
            "_id": "abc123", "sender": NUMBER, "message": text, "device": {"_id": "device123"}}}
    ),
    "TextLink": lambda text: as_json(
        {"secret": "PATH-SECRET", "phone_number": NUMBER, "text": text, "sent": False}
    ),
    "Sinch": lambda text: as_json(
        {"body": text, "from": NUMBER[1:], "id": "01XXX", "to": "12345", "type": "mo_text",
         "received_at": "2026-01-20T10:30:00.000Z"}
    ),
    "Infobip": lambda text: as_json(
        {"results": [{"messageId": "817790313235066447", "from": NUMBER[1:], "to": "385921004026",
                      "text": text, "cleanText": text, "smsCount": 1}], "messageCount": 1}
    ),
    "Telnyx": lambda text: as_json(
        {"data": {"event_type": "message.received", "id": "bf63", "payload": {
            "from": {"phone_number": NUMBER, "carrier": "X"}, "id": "7ee4", "parts": 1,
            "to": [{"phone_number": "+18445550001"}], "text": text}, "record_type": "event"}}
    ),
    "46elks": lambda text: form(
        **{"direction": "incoming", "id": "sf84", "from": NUMBER, "to": "+46706860000",
           "created": "2018-07-13T13:57:23.741000", "message": text}
    ),
    "Africa's Talking": lambda text: form(
        **{"from": NUMBER, "to": "22384", "text": text, "date": "2026-01-20", "id": "a1",
           "linkId": "l"}
    ),
    "Jasmin": lambda text: form(
        **{"id": "16fd2706", "from": NUMBER[1:], "to": "20203060", "content": text,
           "origin-connector": "mtn", "coding": "0"}
    ),
    "8x8": lambda text: as_json(
        {"namespace": "SMS", "eventType": "inbound_message_received", "payload": {
            "umid": "u1", "source": NUMBER, "destination": "+6590000000", "body": text}}
    ),
    "LOX24": lambda text: as_json(
        {"id": "1", "name": "sms.incoming", "data": {
            "id": "2", "from": NUMBER, "to": "+491701234567", "text": text}}
    ),
    "BeepSend": lambda text: as_json(
        {"from": NUMBER[1:], "to": "12345", "message": text, "id": 77,
         "mccmnc": {"mcc": "234", "mnc": "15"}}
    ),
}  # fmt: skip


def deliver(client: WsgiClient, title: str, call: Call, where: str = "momt") -> Any:
    """Call the webhook of a section, as its page says."""
    [entry] = SECTIONS[title][1]["sms_inbound"]
    secret = "" if title == "TextLink" else entry.get("path_secret", "")
    path = f"/sms/{where}/{secret}?provider={entry['kind']}{call.query}"
    return client.raw(call.method, path, call.body, call.environ)


MakeClient = Callable[..., WsgiClient]


@pytest.mark.parametrize("title", IN)
def test_a_message_from_a_phone_is_answered(
    title: str, make_client: MakeClient, stand_in: Provider, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    stand_in.answer = reply(vonage("0"))
    inbound = SECTIONS[title][1]["sms_inbound"]
    place: dict[str, Any] = {"public_url": "https://id.example", "trusted_proxies": []}
    client = make_client(**place, sms_inbound=inbound, sms_providers=[stand_in.nexmo()])
    client.host = "id.example"
    client.register()
    assert client.credentials
    text = "Please verify " + client.credentials.hawk_id
    assert deliver(client, title, IN[title](text)).status == 200
    [code] = stand_in.texts()[NUMBER]
    assert re.fullmatch("[0-9a-f]{32}", code)
    assert deliver(client, title, IN[title](text)).status == 200  # it is delivered again
    again = 2 if title == "TextLink" else 1  # which has no id
    assert len(stand_in.received) == again
    assert deliver(client, title, IN[title]("hello, it is me")).status == 200
    assert len(stand_in.received) == again
    assert "was not used: there is no Hawk id in its text" in caplog.text
    assert "it is me" not in caplog.text
    assert NUMBER[1:] not in caplog.text


# -- A phone of one's own ----------------------------------------------------------


@pytest.fixture
def phone(make_client: MakeClient, stand_in: Provider) -> WsgiClient:
    """A client of a gateway that sends and receives by a phone with SMSGate."""
    title = "A phone of your own: SMSGate"
    values = settings(title, stand_in.url.removesuffix("/sms"))
    stand_in.answer = reply({"id": "PyDmBQZZXYmyxMwED8Fzy", "state": "Pending"}, 202)
    names = ("public_url", "trusted_proxies", "sms_inbound", "sms_providers")
    client = make_client(**{name: getattr(values, name) for name in names})
    client.host = "id.example:443"
    client.register()
    return client


def test_a_phone_of_ones_own_sends_the_pin(phone: WsgiClient, stand_in: Provider) -> None:
    title = "A phone of your own: SMSGate"
    assert phone.ask().status == 200
    sent = sent_to(stand_in)
    code = sent["textMessage"]["text"].split(": ")[1][:6]
    assert sent["phoneNumbers"] == [NUMBER]
    message_id = "PyDmBQZZXYmyxMwED8Fzy"
    for event, outcomes in (
        ("sms:sent", {}), ("sms:delivered", {"delivered": 1}),
        ("sms:failed", {"delivered": 1, "failed": 1}),
    ):  # fmt: skip
        payload = {"messageId": message_id, "recipient": NUMBER, "simNumber": 1}
        assert deliver(phone, title, smsgate_event(event, payload), "receipt").status == 200
        assert receipts(phone.gateway, "smsgate") == outcomes
    assert phone.call("/sms/verify_code", {"code": code}).json == {"msisdn": NUMBER}


def test_a_phone_of_ones_own_receives_and_answers(phone: WsgiClient, stand_in: Provider) -> None:
    title = "A phone of your own: SMSGate"
    assert phone.credentials
    call = smsgate_in(phone.credentials.hawk_id)
    for wrong in (
        {"HTTP_X_SIGNATURE": "0" * 64}, {"HTTP_X_SIGNATURE": ""}, {"HTTP_X_TIMESTAMP": "1"},
        {"HTTP_X_TIMESTAMP": ""}, {"HTTP_X_SIGNATURE": "é"},
    ):  # fmt: skip
        answer = deliver(phone, title, call._replace(environ=call.environ | wrong))
        assert answer.status == 403, wrong
    old = smsgate_event("sms:received", json.loads(call.body)["payload"], int(time.time()) - 90_000)
    assert deliver(phone, title, old).status == 403
    assert deliver(phone, title, call._replace(body=call.body + b" ")).status == 403
    assert stand_in.received == []
    assert deliver(phone, title, call).status == 200
    sent = sent_to(stand_in)
    assert sent["phoneNumbers"] == [NUMBER]
    body = {"code": sent["textMessage"]["text"]}
    assert phone.call("/sms/verify_code", body).json == {"msisdn": NUMBER}
