"""Checks any server of this protocol, with nothing but the wire.

    python notebooks/conformance.py http://127.0.0.1:5000 --token "$(cat keys/operator.token)"

It needs ``client.py`` beside it, and ``cryptography``. It prints a line for each check: ok, FAIL
and why, or "not tried" and why. Its exit status is 0 if none failed, 1 if one did, and 2 if it was
called wrongly or nobody answers.

With ``--token``, the operator's, it reads each code from ``/outbox``, and everything can be tried.
Without it, it sends one message to ``--number``, asks for the code on the terminal, and leaves out
what would need more messages. ``--mcc`` names a network where a phone may text first.
"""

import argparse
import base64
import hashlib
import http.client
import json
import re
import secrets
import sys
import time
from functools import cached_property
from http import HTTPStatus
from typing import NamedTuple
from urllib.parse import urlencode, urlsplit

from client import (
    authorization,
    b64url,
    check_answer,
    derive_credentials,
    fields_of,
    mac,
    public_jwk,
)
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils

NEXT = {"resendIn", "sendsLeft", "triesLeft", "expiresIn", "verified"}
OTHER_DIGITS = str.maketrans("0123456789", "٠١٢٣٤٥٦٧٨٩")
SITE = "https://shop.example"


class Failed(Exception):
    """The server does not keep a promise."""


class NotTried(Exception):
    """This cannot be tried here."""


def expect(true, why):
    """Fail unless something is as promised."""
    if not true:
        raise Failed(why)


class Answer(NamedTuple):
    """An answer; ``genuine`` tells whether the server signed it."""

    asked: str
    status: int
    headers: http.client.HTTPMessage
    body: bytes
    genuine: bool

    @property
    def json(self):
        """The JSON object in the body; {} if there is none."""
        try:
            found = json.loads(self.body or b"{}")
        except ValueError:
            raise Failed(f"{self.asked}: the body is no JSON") from None
        expect(isinstance(found, dict), f"{self.asked}: the body is no JSON object")
        return found

    def must(self, status, errno=None, **fields):
        """Fail unless the answer has this status, errno, and these fields; gives its JSON."""
        told = self.json
        got = f"{self.asked}: {self.status}/{told.get('errno', '-')}"
        expect(self.status == status, f"{got} {told.get('message', '')}, and not {status}")
        expect(told.get("errno") == errno, f"{got}, and not {status}/{errno or '-'}")
        for name, value in fields.items():
            expect(told.get(name) == value, f"{self.asked}: {name} is {told.get(name)!r}")
        return told


class Server:
    """The server under test.

    Args:
        token: The operator's, for /outbox; "" asks on the terminal.
        number: Of a phone that gets messages.
        mcc: Of a network where a phone may text first.
    """

    def __init__(self, url, token="", number="+447700900123", mcc=""):
        self.url, self.token, self.number, self.mcc = url.rstrip("/"), token, number, mcc
        self.asked = False

    def send(
        self, method, path, body=None, session="", *, headers={}, authorized=None, late_s=0,
        signed_path="", signed_body=None, text=None,
    ):  # fmt: skip
        """One request, signed if ``session`` names a token.

        Args:
            body: Sent as JSON; ``text`` is sent as it is.
            authorized: An Authorization header in place of our own.
            signed_path, signed_body: What is signed in place of what is sent.
        """
        data = text if text is not None else b"" if body is None else json.dumps(body).encode()
        kind = {"Content-Type": "application/json"} if data else {}
        sent, ts = {**kind, **headers}, int(time.time()) - late_s
        proof, seal_of = derive_credentials(session) if session else ("", ""), None
        if session:
            nonce, url = secrets.token_urlsafe(9), self.url + (signed_path or path)
            content = data if signed_body is None else signed_body
            own = authorization(
                proof, method, url, ts, nonce, sent.get("Content-Type", ""), content
            )
            sent["Authorization"] = authorized or own
            told = dict(re.findall('(ts|nonce)="(.+?)"', sent["Authorization"]))
            seal_of = proof, method, url, told["ts"], told["nonce"]
        parts = urlsplit(self.url)
        kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
        connection = kinds[parts.scheme](parts.netloc, timeout=60)
        try:
            connection.request(method, path, data or None, sent)
            found = connection.getresponse()
            content = found.read()
        finally:
            connection.close()
        seal = found.headers.get("Server-Authorization", ""), found.headers.get("Content-Type", "")
        genuine = bool(seal_of) and check_answer(*seal_of, *seal, content)
        return Answer(f"{method} {path}", found.status, found.headers, content, genuine)

    def register(self, body=None):
        """A new session's token."""
        return self.send("POST", "/register", body).must(200)["msisdnSessionToken"]

    def messages(self, number):
        """What was sent to a number, oldest first."""
        if not self.token:
            raise NotTried("it needs the outbox: --token")
        path = "/outbox?" + urlencode({"to": number.lstrip("+"), "token": self.token})
        answer = self.send("GET", path)
        if answer.status != 200:
            raise NotTried(
                f"/outbox answers {answer.status}: is the token right, and this loopback?"
            )
        return json.loads(answer.body)

    def code(self, number):
        """The newest code that was sent to a number."""
        if not self.token:
            print(f"The code that {number} got: ", end="", file=sys.stderr, flush=True)
            if typed := sys.stdin.readline().strip():
                return typed
            raise NotTried("no code was typed")
        texts = self.messages(number)
        expect(texts, f"no message to {number} in the outbox")
        return texts[-1]["text"].split("\n")[0].split(" ")[-1]

    def waiting(self, number, path="/sms/verify"):
        """A session to whose number a code was sent, and that code. It needs the outbox."""
        before, session = len(self.messages(number)), self.register()
        answer = self.send("POST", path, {"msisdn": number}, session)
        answer.must(204 if "mt" in path else 200)
        expect(len(self.messages(number)) > before, f"no message to {number} in the outbox")
        return session, self.code(number)

    @cached_property
    def verified(self):
        """The token of a session whose number is verified: the same for all checks."""
        if self.asked and not self.token:
            raise NotTried("the number was not verified")  # and a second message may cost money
        self.asked, session = True, self.register()
        self.send("POST", "/sms/verify", {"msisdn": self.number}, session).must(200)
        body = {"code": self.code(self.number)}
        self.send("POST", "/sms/verify_code", body, session).must(200, msisdn=self.number)
        return session

    def sign(self, **body):
        """A proof about the verified number."""
        return self.send("POST", "/certificate/sign", body, self.verified).must(200)["cert"]


CHECKS = {}


def check(function):
    """One check; its docstring is what the server promises."""
    CHECKS[function.__name__] = function
    return function


# -- Ground rules --------------------------------------------------------------------


@check
def answers_are_json(server):
    """Answers are JSON, errors too."""
    for method, path in (("GET", "/"), ("POST", "/register"), ("GET", "/nowhere")):
        answer = server.send(method, path)
        kind = answer.headers.get("Content-Type", "")
        expect(kind == "application/json", f"{answer.asked}: Content-Type {kind!r}")


@check
def answers_tell_the_time(server):
    """Every answer has a Timestamp, by which a client can set its clock."""
    for method, path in (("GET", "/"), ("POST", "/session"), ("GET", "/nowhere")):
        answer = server.send(method, path)
        told = answer.headers.get("Timestamp", "")
        expect(told.isdecimal(), f"{answer.asked}: Timestamp {told!r}")
        expect(abs(int(told) - time.time()) < 60, f"{answer.asked}: Timestamp is {told}")


@check
def answers_have_an_id(server):
    """A client's X-Request-Id comes back; without a usable one there is a fresh one."""
    expect(
        server.send("GET", "/", headers={"X-Request-Id": "Me-1"}).headers["X-Request-Id"] == "Me-1",
        "GET /: X-Request-Id did not come back",
    )
    odd = [server.send("GET", "/", headers={"X-Request-Id": "a b"}) for _ in range(2)]
    told = {answer.headers.get("X-Request-Id", "a b") for answer in odd}
    expect(len(told) == 2 and "a b" not in told, f"GET /: X-Request-Id {told}")


@check
def both_spellings(server):
    """Each path works bare and versioned, and URLs in answers are spelled like the request."""
    for prefix in ("", "/v1/msisdn"):
        told = server.send("POST", prefix + "/register").must(200)["verificationUrl"]
        expect(told.endswith(f"{prefix}/sms/verify"), f"verificationUrl {told}")
    session = server.register()
    for path in ("/certificate/sign", "/v1/certificate/sign"):
        server.send("POST", path, {"publicKey": {}}, session).must(400, 104)


@check
def errors_say_what_and_where(server):
    """An error has code, errno, error, message and info."""
    for answer in (server.send("POST", "/discover", {}), server.send("GET", "/session")):
        told = answer.json
        expect(told.get("code") == answer.status, f"{answer.asked}: code {told.get('code')}")
        phrase = HTTPStatus(answer.status).phrase
        expect(told.get("error") == phrase, f"{answer.asked}: error {told.get('error')!r}")
        expect(told.get("message"), f"{answer.asked}: no message")
        info = str(told.get("info", ""))
        expect(str(told.get("errno")) in info and "://" in info, f"{answer.asked}: info {info!r}")


@check
def no_such_thing(server):
    """404 and 405 have code, error and message only."""
    for method, path, status in (("GET", "/nowhere", 404), ("GET", "/register", 405)):
        told = server.send(method, path).must(status, code=status)
        expect(told.keys() == {"code", "error", "message"}, f"{method} {path}: {sorted(told)}")


@check
def pages_elsewhere_may_ask(server):
    """CORS: preflights are answered, what a client needs is exposed, null is never echoed."""
    asks = {"Origin": "https://shop.example", "Access-Control-Request-Method": "POST"}
    answer = server.send("OPTIONS", "/sms/verify", headers=asks)
    if not answer.headers.get("Access-Control-Allow-Origin"):
        raise NotTried("this server's allowed_origins do not name https://shop.example")
    expect(answer.status in (200, 204), f"OPTIONS: {answer.status}")
    allowed = answer.headers.get("Access-Control-Allow-Headers", "").lower()
    expect("authorization" in allowed and "content-type" in allowed, f"allowed headers: {allowed}")
    methods = answer.headers.get("Access-Control-Allow-Methods", "")
    expect("GET" in methods and "POST" in methods, f"allowed methods: {methods}")
    told = server.send("GET", "/session", headers=asks).headers
    exposed = told.get("Access-Control-Expose-Headers", "").lower()
    for name in ("timestamp", "retry-after", "server-authorization", "www-authenticate"):
        expect(name in exposed, f"{name} is not exposed")
    told = server.send("GET", "/", headers={"Origin": "null"}).headers
    expect(told.get("Access-Control-Allow-Origin") != "null", "the origin null is echoed")


# -- Bodies --------------------------------------------------------------------------


@check
def bodies_are_json_objects(server):
    """A body that is no JSON object, or has a name twice, is 400/106."""
    for text in (b"{", b"[1]", b'"x"', b'{"mcc": "234", "mcc": "234"}', b"\xff"):
        server.send("POST", "/discover", text=text).must(400, 106)


@check
def bodies_have_their_type(server):
    """A body of another media type is 415/106."""
    text = {"Content-Type": "text/plain"}
    server.send("POST", "/discover", {"mcc": "234"}, headers=text).must(415, 106)


@check
def bodies_have_a_length(server):
    """A body without a Content-Length is 411/112."""
    chunked = {"Transfer-Encoding": "chunked"}
    server.send("POST", "/discover", headers=chunked, text=b"2\r\n{}\r\n0\r\n\r\n").must(411, 112)


@check
def bodies_are_small(server):
    """A body beyond the limit is 413/113."""
    server.send("POST", "/discover", {"mcc": "2" * 65_536}).must(413, 113)


@check
def what_is_missing_is_named(server):
    """Missing parameters are 400/108, and all of them are named; null and "" are missing."""
    session = server.register()
    for body in ({}, {"code": None}, {"code": ""}):
        told = server.send("POST", "/sms/verify_code", body, session).must(400, 108)
        expect("code" in told["message"], f"the message does not name code: {told['message']}")


# -- Discovery and sessions ----------------------------------------------------------


@check
def discovery(server):
    """/discover offers sms/mt first when a number is given; without one it needs an mcc."""
    told = server.send("POST", "/discover", {"msisdn": server.number}).must(200)
    expect(told["verificationMethods"][:1] == ["sms/mt"], f"{told['verificationMethods']}")
    details = told["verificationDetails"]["sms/mt"]
    expect(details["url"].endswith("/sms/mt/verify") and details["mtSender"], f"{details}")
    server.send("POST", "/discover", {"mnc": "10"}).must(400, 108)
    server.send("POST", "/discover", {"mcc": "23"}).must(400, 107)
    server.send("POST", "/discover", {"msisdn": "+44"}).must(400, 107)


@check
def network_fields_never_stand_in_the_way(server):
    """Where a number is given, an mcc or mnc that is odd counts as absent."""
    for odd in ("2", 7, [], {}, "234x"):
        body = {"msisdn": server.number, "mcc": odd, "mnc": odd}
        server.send("POST", "/discover", body).must(200)


@check
def registration(server):
    """/register gives 32 random bytes in hex, and the ways to verify if the body has an mcc."""
    tokens = {server.register(), server.register({}), server.register({"mcc": "234"})}
    expect(len(tokens) == 3, "the same token twice")
    expect(all(re.fullmatch("[0-9a-f]{64}", token) for token in tokens), f"tokens {tokens}")
    told = server.send("POST", "/register", {"mcc": "234"}).must(200)
    expect("verificationMethods" in told, "no verificationMethods, though the body has an mcc")


@check
def where_a_session_stands(server):
    """GET /session says what may be done next, and changes nothing."""
    session = server.register()
    told = [server.send("GET", "/session", None, session).must(200) for _ in range(2)]
    expect(told[0] == told[1], "it changes")
    expect(told[0].keys() == {"next"} and told[0]["next"].keys() == NEXT, f"{told[0]}")
    expect(told[0]["next"]["verified"] is False, "a new session is verified")


# -- Hawk ----------------------------------------------------------------------------


@check
def strangers_are_refused(server):
    """Without a Hawk header, or with the id of no session: 401/110, WWW-Authenticate: Hawk."""
    for session in ("", "0" * 64):
        answer = server.send("GET", "/session", None, session)
        answer.must(401, 110)
        expect(answer.headers.get("WWW-Authenticate") == "Hawk", "no WWW-Authenticate: Hawk")
        expect(not answer.genuine, "it is signed, for nobody")


@check
def a_wrong_mac_is_refused(server):
    """A MAC for another path is 401/109."""
    session = server.register()
    server.send("GET", "/session", None, session, signed_path="/unregister").must(401, 109)


@check
def a_wrong_body_is_refused(server):
    """A body that is not the one whose hash was signed is 401/109."""
    session, body = server.register(), {"msisdn": server.number}
    server.send("POST", "/sms/verify", body, session, signed_body=b"{}").must(401, 109)


@check
def a_stale_request_is_refused(server):
    """A time an hour off is 401/109, with the server's time, signed."""
    session = server.register()
    key = derive_credentials(session)[1]
    for late_s in (-3600, 3600):
        answer = server.send("GET", "/session", None, session, late_s=late_s)
        answer.must(401, 109)
        told = fields_of(answer.headers.get("WWW-Authenticate", ""))
        expect(told.get("ts", "").isdecimal(), f"WWW-Authenticate has no ts: {told}")
        expect(abs(int(told["ts"]) - time.time()) < 60, f"its ts is {told['ts']}")
        expect(told.get("tsm") == mac(key, f"hawk.1.ts\n{told['ts']}\n"), "tsm is not right")


@check
def a_repeated_request_is_refused(server):
    """A nonce is good once, also if the request was refused: 401/109."""
    session = server.register()
    for path, status, errno in (("/session", 200, None), ("/sms/resend_code", 410, 111)):
        method = "GET" if path == "/session" else "POST"
        told = (
            derive_credentials(session),
            method,
            server.url + path,
            int(time.time()),
            "once" + path,
        )
        header = authorization(*told)
        server.send(method, path, None, session, authorized=header).must(status, errno)
        server.send(method, path, None, session, authorized=header).must(401, 109)


@check
def answers_are_signed(server):
    """Answers and errors carry Server-Authorization, if the request's MAC was right."""
    session = server.register()
    for answer in (
        server.send("GET", "/session", None, session),
        server.send("POST", "/sms/verify_code", {}, session),
        server.send("GET", "/session", None, session, late_s=3600),
        server.send("POST", "/unregister", None, session),
    ):
        expect(answer.genuine, f"{answer.asked} {answer.status}: Server-Authorization is not right")


@check
def the_path_is_signed_as_it_was_sent(server):
    """A path in another spelling that leads to the same request is signed in that spelling."""
    session = server.register()
    server.send("POST", "/sms/resend%5Fcode", None, session).must(410, 111)


# -- Steps in the wrong order --------------------------------------------------------


@check
def nothing_was_asked_for(server):
    """A code, or another code, before one was asked for is 410/111; a proof is 400/104."""
    session = server.register()
    server.send("POST", "/sms/verify_code", {"code": "123456"}, session).must(410, 111)
    server.send("POST", "/sms/resend_code", None, session).must(410, 111)
    server.send("POST", "/certificate/sign", {"publicKey": {}}, session).must(400, 104)


@check
def what_is_no_number(server):
    """What is no number with a country code is 400/107, and the message names msisdn."""
    session = server.register()
    for number in ("07700900123", "+44", "nobody", "+4477009001234567", 447700900123.5):
        told = server.send("POST", "/sms/verify", {"msisdn": number}, session).must(400, 107)
        expect("msisdn" in told["message"], f"the message does not name msisdn: {told['message']}")


@check
def errors_say_what_is_next(server):
    """An error about a session holds next: what it may do."""
    told = server.send("POST", "/sms/verify_code", {}, server.register()).must(400, 108)
    expect(told.get("next", {}).keys() == NEXT, f"next is {told.get('next')}")


# -- Codes ---------------------------------------------------------------------------


@check
def a_pin(server):
    """/sms/verify sends six digits, the last word of the first line, and tells who sends them."""
    before, session = len(server.messages(server.number)), server.register()
    told = server.send("POST", "/sms/verify", {"msisdn": server.number}, session).must(200)
    expect(told["mtSender"] and told["next"]["triesLeft"] > 0, f"{told}")
    texts = server.messages(server.number)[before:]
    expect(len(texts) == 1, f"{len(texts)} messages")
    first = texts[0]["text"].split("\n")[0]
    expect(re.fullmatch("Your verification code is: [0-9]{6}", first), f"the text is {first!r}")


@check
def a_long_code(server):
    """/sms/mt/verify sends 32 hex digits and nothing else."""
    _, code = server.waiting(server.number, "/sms/mt/verify")
    expect(re.fullmatch("[0-9a-f]{32}", code), f"the code has {len(code)} characters")
    expect(server.messages(server.number)[-1]["text"] == code, "the message has more than the code")


@check
def a_double_click_is_one_message(server):
    """The same asked for again at once is answered alike, and sends nothing."""
    session, _ = server.waiting(server.number)
    count, body = len(server.messages(server.number)), {"msisdn": server.number}
    answer = server.send("POST", "/sms/verify", body, session)
    if answer.json.get("next", {}).get("resendIn") == 0:
        raise NotTried("this server asks for no gap between messages")
    answer.must(200)
    expect(len(server.messages(server.number)) == count, "a second message was sent")


@check
def too_soon(server):
    """Another code before its time is 429/114, with Retry-After."""
    session, _ = server.waiting(server.number)
    answer = server.send("POST", "/sms/resend_code", None, session)
    if answer.status == 200:
        raise NotTried("this server asks for no gap between messages")
    told = answer.must(429, 114)
    wait = answer.headers.get("Retry-After", "")
    expect(
        wait == str(told["retryAfter"]), f"Retry-After {wait!r}, retryAfter {told['retryAfter']}"
    )
    expect(told["next"]["resendIn"] >= told["retryAfter"], f"resendIn {told['next']['resendIn']}")


@check
def a_newer_code_replaces_the_old(server):
    """After /sms/resend_code the old code is 400/105, costs no try, and the new one works."""
    session, old = server.waiting(server.number)
    answer = server.send("POST", "/sms/resend_code", None, session)
    if answer.status == 429:
        raise NotTried(f"the next message is {answer.json['retryAfter']} s away")
    tries = answer.must(200)["next"]["triesLeft"]
    new = server.code(server.number)
    told = server.send("POST", "/sms/verify_code", {"code": old}, session).must(400, 105)
    expect(told["next"]["triesLeft"] == tries, "the old code cost a try")
    server.send("POST", "/sms/verify_code", {"code": new}, session).must(200)


def wrong(code):
    """Another code of the same kind."""
    return code[:-1] + ("1" if code[-1] == "0" else "0")


@check
def wrong_codes(server):
    """A wrong code is 400/105; when the tries are used up the right one is 410/111, too."""
    session, code = server.waiting(server.number)
    tries = server.send("GET", "/session", None, session).must(200)["next"]["triesLeft"]
    expect(1 <= tries <= 10, f"triesLeft is {tries}")
    for left in range(tries - 1, -1, -1):
        told = server.send("POST", "/sms/verify_code", {"code": wrong(code)}, session)
        told = told.must(400, 105)
        expect(
            told["next"]["triesLeft"] == left, f"triesLeft {told['next']['triesLeft']}, {left} left"
        )
    server.send("POST", "/sms/verify_code", {"code": code}, session).must(410, 111)


@check
def what_is_no_code_costs_nothing(server):
    """What can be no code is 400/107 and costs no try; so does a bad key beside a right code."""
    session, code = server.waiting(server.number)
    tries = server.send("GET", "/session", None, session).must(200)["next"]["triesLeft"]
    for body in (
        {"code": code[:-1]}, {"code": "pine12"}, {"code": code, "publicKey": {"kty": "EC"}},
        {"code": code, "duration": 0},
    ):  # fmt: skip
        told = server.send("POST", "/sms/verify_code", body, session).must(400, 107)
        expect(told["next"]["triesLeft"] == tries, f"{sorted(body)} cost a try")
    server.send("POST", "/sms/verify_code", {"code": code}, session).must(200)


@check
def codes_are_typed_by_people(server):
    """White space, dashes and digits of other scripts are folded; so they are in numbers."""
    session = server.register()
    spaced = f"{server.number[:3]} ({server.number[3:6]}) {server.number[6:]}"
    server.messages(server.number)
    server.send("POST", "/sms/verify", {"msisdn": spaced}, session).must(200)
    code = server.code(server.number)
    typed = f" {code[:3]}–{code[3:]}".translate(OTHER_DIGITS)
    told = {"code": typed}
    server.send("POST", "/sms/verify_code", told, session).must(200, msisdn=server.number)


@check
def a_code_works_once(server):
    """A right code gives the number; the same again is 410/111."""
    session, code = server.waiting(server.number)
    told = server.send("POST", "/sms/verify_code", {"code": code}, session).must(200)
    expect(told == {"msisdn": server.number}, f"{told}")
    server.send("POST", "/sms/verify_code", {"code": code}, session).must(410, 111)
    told = server.send("GET", "/session", None, session).must(200, msisdn=server.number)
    expect(told["next"]["verified"] is True, "the session is not verified")


@check
def a_session_has_one_number(server):
    """A session that verified a number verifies no other one: 400/107."""
    other = server.number[:-1] + ("1" if server.number[-1] == "0" else "0")
    server.send("POST", "/sms/verify", {"msisdn": other}, server.verified).must(400, 107)


@check
def the_phone_may_text_first(server):
    """A phone that texts the Hawk id gets a long code, which verifies its number."""
    session_way = server.send("POST", "/register", {"mcc": server.mcc or "000"}).must(200)
    way = session_way.get("verificationDetails", {}).get("sms/momt")
    if not way:
        raise NotTried("no number to text to in this network: --mcc")
    session = session_way["msisdnSessionToken"]
    expect(re.fullmatch("[+]?[0-9]+", way["moVerifier"]), f"moVerifier {way['moVerifier']!r}")
    count, hawk_id = len(server.messages(server.number)), derive_credentials(session)[0]
    form = {"msisdn": server.number[1:], "text": f"Hi {hawk_id}", "messageId": secrets.token_hex(8)}
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    path, text = "/sms/momt/?provider=nexmo", urlencode(form).encode()
    answer = server.send("POST", path, headers=headers, text=text)
    if answer.status in (400, 403):
        raise NotTried(f"its webhook of nexmo is closed: {answer.status}")
    answer.must(200)
    expect(len(server.messages(server.number)) == count + 1, "no message came")
    code = server.code(server.number)
    expect(re.fullmatch("[0-9a-f]{32}", code), f"the code has {len(code)} characters")
    answer = server.send("POST", "/sms/verify_code", {"code": code}, session)
    answer.must(200, msisdn=server.number)


# -- Proofs --------------------------------------------------------------------------


def parts_of(token):
    """Header, claims, signed bytes and signature of a token."""
    pieces = token.split(".")
    expect(len(pieces) == 3, f"a token of {len(pieces)} parts")
    header, claims, signature = (base64.urlsafe_b64decode(p + "=" * (-len(p) % 4)) for p in pieces)
    return json.loads(header), json.loads(claims), ".".join(pieces[:2]).encode(), signature


def number_of(text):
    """A number in base64url."""
    return int.from_bytes(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)), "big")


def signed_claims(server, token, typ):
    """The claims of a JWT that a key of jwks.json signed, after the checks of both forms."""
    header, claims, text, signature = parts_of(token)
    keys = server.send("GET", "/.well-known/jwks.json").must(200)["keys"]
    found = [key for key in keys if key.get("kid") == header.get("kid")]
    expect(len(found) == 1, f"kid {header.get('kid')} is not in jwks.json")
    expect(header == {"alg": "ES256", "kid": found[0]["kid"], "typ": typ}, f"header {header}")
    public = {name: found[0][name] for name in ("crv", "kty", "x", "y")}
    digest = hashlib.sha256(json.dumps(public, separators=(",", ":")).encode()).digest()
    expect(b64url(digest) == header["kid"], "kid is not the key's thumbprint (RFC 7638)")
    point = number_of(public["x"]), number_of(public["y"])
    expect(len(signature) == 64, f"a signature of {len(signature)} bytes")
    pair = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
    key = ec.EllipticCurvePublicNumbers(*point, ec.SECP256R1()).public_key()
    try:
        key.verify(utils.encode_dss_signature(*pair), text, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise Failed("the signature is not right") from None
    told = {"phone_number": server.number, "phone_number_verified": True, "amr": ["sms"]}
    told |= {"vct": f"{claims.get('iss')}/vct/phone/1", "method": "sms/mt"}
    for name, value in told.items():
        expect(claims.get(name) == value, f"{name} is {claims.get(name)!r}")
    expect(abs(claims["iat"] - time.time()) < 300 and claims["auth_time"] <= claims["iat"], "times")
    return claims


@check
def an_sd_jwt(server):
    """A JWK gives an SD-JWT: header, claims, signature, kid, cnf, duration."""
    key = public_jwk(ec.generate_private_key(ec.SECP256R1()))
    proof = server.sign(publicKey={**key, "kid": "mine"}, duration="60")
    expect(proof.endswith("~") and proof.count("~") == 1, "it does not end with its only ~")
    claims = signed_claims(server, proof[:-1], "dc+sd-jwt")
    expect(claims["cnf"] == {"jwk": key}, f"cnf is {claims['cnf']}")
    expect(claims["exp"] - claims["iat"] == 60, "it does not live as long as was asked for")
    expect("aud" not in claims, "it has an audience")
    longest = parts_of(server.sign(publicKey=key, duration=10**9)[:-1])[1]
    expect(longest["exp"] - longest["iat"] < 10**9, "a duration is not bounded")


@check
def a_jwt(server):
    """A JWT for one site: aud, nonce, jti, ten minutes at most, one pseudonym a site."""
    asked = {"format": "jwt", "audience": SITE + ":443", "nonce": "n-1"}
    first, second = (signed_claims(server, server.sign(**asked), "JWT") for _ in range(2))
    expect((first["aud"], first["nonce"]) == (SITE, "n-1"), f"aud, nonce: {first['aud']}")
    expect(first["jti"] != second["jti"], "jti twice")
    expect(first["exp"] - first["iat"] <= 600, "it lives longer than ten minutes")
    expect("cnf" not in first, "cnf, though no key was given")
    other = signed_claims(server, server.sign(format="jwt", audience="https://a.example"), "JWT")
    expect(first["sub"] == second["sub"] != other["sub"], "sub is no pseudonym for one site")


@check
def a_browserid_certificate(server):
    """A BrowserID key gives a certificate: alg alone in its header, times in milliseconds."""
    numbers = rsa.generate_private_key(65537, 2048).public_key().public_numbers()
    key = {"algorithm": "RS", "n": str(numbers.n), "e": str(numbers.e)}
    certificate = server.sign(publicKey=json.dumps(key), duration=60)
    header, claims, text, signature = parts_of(certificate)
    expect(header.keys() == {"alg"}, f"header {header}")
    expect(claims["public-key"] == key, "public-key is another one")
    expect(claims["verifiedMSISDN"] == server.number, "verifiedMSISDN is another one")
    expect(claims["principal"]["email"].endswith("@" + claims["iss"]), f"{claims['principal']}")
    expect(abs(claims["exp"] / 1000 - 60 - time.time()) < 60, "exp is not in milliseconds")
    document = server.send("GET", "/.well-known/browserid").must(200)["public-key"]
    if document["algorithm"] != "RS":
        raise NotTried("its key is a DS key, which only its header and claims were checked for")
    public = rsa.RSAPublicNumbers(int(document["e"]), int(document["n"])).public_key()
    try:
        public.verify(signature, text, padding.PKCS1v15(), hashes.SHA256())
    except InvalidSignature:
        raise Failed("the signature is not right") from None


@check
def what_is_no_key_is_refused(server):
    """A private key, a weak key, an audience that is no origin, no duration: 400/107 or 108."""
    key = public_jwk(ec.generate_private_key(ec.SECP256R1()))
    bad = (
        {"publicKey": {**key, "d": key["x"]}}, {"publicKey": {**key, "y": key["x"]}},
        {"publicKey": {"algorithm": "RS", "n": "15", "e": "65537"}},
        {"publicKey": key, "duration": 0}, {"publicKey": key, "duration": "1.5"},
        {"format": "jwt", "audience": "shop.example"}, {"publicKey": key, "format": "xml"},
    )  # fmt: skip
    for body in bad:
        server.send("POST", "/certificate/sign", body, server.verified).must(400, 107)
    for body in ({}, {"format": "jwt"}):
        server.send("POST", "/certificate/sign", body, server.verified).must(400, 108)


# -- Ends, and documents -------------------------------------------------------------


@check
def unregistering(server):
    """/unregister is 204; from then on the token is unknown: 401/110."""
    session = server.register()
    server.send("POST", "/unregister", None, session).must(204)
    server.send("GET", "/session", None, session).must(401, 110)


@check
def unregistering_everywhere(server):
    """With everywhere, the other sessions of the number have no proofs either: 400/104."""
    asked = {"format": "jwt", "audience": SITE}
    sessions = []
    for _ in range(2):
        session, code = server.waiting(server.number)
        server.send("POST", "/sms/verify_code", {"code": code}, session).must(200)
        server.send("POST", "/certificate/sign", asked, session).must(200)
        sessions.append(session)
    server.__dict__.pop("verified", None)  # it ends, too
    server.send("POST", "/unregister", {"everywhere": True}, sessions[1]).must(204)
    server.send("POST", "/certificate/sign", asked, sessions[0]).must(400, 104)


@check
def documents(server):
    """Every document of the protocol is there, and says what it must."""
    jwks = server.send("GET", "/.well-known/jwks.json")
    keys = jwks.must(200)["keys"]
    expect(keys and all("d" not in key for key in keys), "jwks.json has no key, or a private one")
    expect("max-age=" in jwks.headers.get("Cache-Control", ""), "jwks.json has no max-age")
    issuer = server.send("GET", "/.well-known/jwt-vc-issuer").must(200)
    expect(issuer["jwks_uri"] == issuer["issuer"] + "/.well-known/jwks.json", f"{issuer}")
    server.send("GET", "/vct/phone/1").must(200, vct=issuer["issuer"] + "/vct/phone/1")
    told = server.send("GET", "/.well-known/browserid").must(200)
    expect(told.keys() == {"public-key", "authentication", "provisioning"}, f"{sorted(told)}")
    expect("version" in server.send("GET", "/openapi.json").must(200)["info"], "openapi.json")
    told = server.send("GET", "/api-specs").must(200)["service"]
    expect(told["videur_version"] == "0.1", "api-specs is no Videur document")
    page = server.send("GET", "/errors")
    expect(page.status == 200 and b"105" in page.body, "GET /errors does not explain 105")


@check
def health(server):
    """Whoever watches it can see that it works."""
    told = server.send("GET", "/__heartbeat__").must(200)
    expect(told["storage"] is True and type(told["sms"]) is bool, f"{told}")
    server.send("GET", "/__lbheartbeat__").must(200)
    server.send("GET", "/__version__").must(200)


def main(arguments):
    """Try everything; gives the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("url", help="where the server is, http://127.0.0.1:5000")
    parser.add_argument("--token", default="", help="the operator's, which opens /outbox")
    parser.add_argument("--number", default="+447700900123", help="of a phone that gets messages")
    parser.add_argument("--mcc", default="", help="of a network where a phone may text first")
    parser.add_argument("--only", choices=CHECKS, metavar="NAME", help="one check alone")
    options = parser.parse_args(arguments)
    server = Server(options.url, options.token, options.number, options.mcc)
    counts = {"ok": 0, "FAIL": 0, "not tried": 0}
    for name in [options.only] if options.only else CHECKS:
        try:
            CHECKS[name](server)
            verdict, why = "ok", ""
        except (Failed, KeyError, TypeError, AttributeError) as error:
            verdict, why = "FAIL", f": {error or type(error).__name__}"
        except NotTried as error:
            verdict, why = "not tried", f": {error}"
        except OSError as error:
            print(f"{options.url} does not answer: {error}", file=sys.stderr)
            return 2
        counts[verdict] += 1
        print(f"{verdict:10}{name}: {CHECKS[name].__doc__.strip()}{why}", flush=True)
    print(", ".join(f"{number} {verdict}" for verdict, number in counts.items()))
    return 1 if counts["FAIL"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
