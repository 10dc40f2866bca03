"""The page to press in a real browser: both flows and their failures, by its own buttons."""

from __future__ import annotations

import base64
import hashlib
import hmac
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import browser
import lab
import pytest
from support import GatewayProcess

import gateway

browser.require()

pytestmark = pytest.mark.slow  # gateways, and a browser

AXE = lab.ROOT / ".parts" / "axe" / "node_modules" / "axe-core" / "axe.min.js"
MISSING_AXE = "npm's axe-core is not installed: npm install --prefix .parts/axe axe-core@4.14.1"
needs_axe = pytest.mark.skipif(not AXE.exists(), reason=MISSING_AXE)
WCAG = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]
RUN_AXE = """tags => axe.run({runOnly: tags, resultTypes: ["violations"]}).then(
  said => ({passes: said.passes.length, violations: said.violations}))"""
"""Without the elements that pass, whose description takes longer than the search."""
MO_NUMBER = "+447700900999"
NUMBERS = (f"+4477009{n:05}" for n in itertools.count(10_000))
"""One for each visit: the outbox keeps what came to a number."""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser.chromium() as started:
        yield started


def run(folder: Path, *options: str) -> Iterator[GatewayProcess]:
    process = GatewayProcess(folder, *options)
    yield process
    process.close()


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """A gateway whose sessions need not wait between messages, and that a phone can text to."""
    yield from run(tmp_path_factory.mktemp("quick"), "--mo-verifier", MO_NUMBER)


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """A gateway with the gaps of a real one, and with a host line."""
    options = ("--resend-gaps-s", "[30, 60]", "--sms-host-line", "shop.example")
    yield from run(tmp_path_factory.mktemp("patient"), *options)


def url_of(process: GatewayProcess) -> str:
    token = (process.folder / "keys" / "operator.token").read_text().strip()
    return f"{process.url}/press/{token}/index.html"


class Visit:
    """The page, opened by somebody with a phone of their own; what they press and read."""

    def __init__(self, page: Any, process: GatewayProcess, requests: list[str]) -> None:
        self.page, self.process, self.requests = page, process, requests
        self.number = next(NUMBERS)
        self.said: list[str] = []
        self.refused: Counter[int] = Counter()
        page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.said.append(f"error: {error}"))
        page.on("response", self._count)
        page.goto(url_of(process))
        page.wait_for_selector("#step-end .outcome", state="attached")
        self.phone_is(self.number)
        page.fill("#step-ask [name=msisdn]", self.number)

    def _count(self, response: Any) -> None:
        if response.status >= 400:
            self.refused[response.status] += 1

    def phone_is(self, number: str) -> None:
        self.page.fill("#phone-number", number)
        self.page.click("#look")

    def outcome(self, step: str) -> str:
        """What a step says, once it has done what was asked."""
        self.page.wait_for_selector(f"{step}:not([aria-busy])")
        return str(self.page.inner_text(f"{step} .outcome"))

    def press(self, step: str, **fields: str) -> str:
        """Fill a step's fields in, press its button, and read the outcome."""
        for name, value in fields.items():
            field = self.page.locator(f"{step} [name={name}]")
            if field.evaluate("one => one.localName") == "select":
                field.select_option(value)
            else:
                field.fill(value)
        self.page.evaluate("step => document.querySelector(`${step} .outcome`).append('…')", step)
        self.page.click(f"{step} form button")
        self.page.wait_for_function(
            "step => !document.querySelector(`${step} .outcome`).textContent.endsWith('…')"
            " && !document.querySelector(step).hasAttribute('aria-busy')",
            arg=step,
        )
        return self.outcome(step)

    def messages(self, count: int) -> list[str]:
        """The texts on the phone, of which there are ``count``."""
        self.page.wait_for_function(
            "count => document.querySelectorAll('#messages li').length === count", arg=count
        )
        return list(self.page.locator("#messages .text").all_inner_texts())

    def take_code(self) -> None:
        self.page.locator("#messages li button").last.click()

    def text(self) -> str:
        """Press the phone's Send; what it says then."""
        self.page.evaluate("document.querySelector('#compose-outcome').textContent = ''")
        self.page.click("#compose button")
        self.page.wait_for_selector("#compose-outcome:not(:empty)")
        return str(self.page.inner_text("#compose-outcome"))

    def check(self, refused: dict[int, int]) -> None:
        """Nothing but these refusals went wrong, and nothing left this gateway."""
        assert dict(self.refused) == refused
        told = Counter(int(found[1]) for line in self.said if (found := STATUS.match(line)))
        assert told == self.refused  # the browser notes each 4xx that a script gets
        assert [line for line in self.said if not STATUS.match(line)] == []
        assert [url for url in self.requests if not url.startswith(self.process.url + "/")] == []
        token = url_of(self.process).split("/")[-2]
        holds = {url.split("?")[0].split("/")[3] for url in self.requests if token in url}
        assert holds == {"press", "outbox"}
        assert token not in self.page.url + self.page.text_content("body")


STATUS = re.compile(r"error: Failed to load resource: the server responded with a status of (\d+)")


@pytest.fixture
def visit(chromium: Any, quick: GatewayProcess) -> Iterator[Visit]:
    with browser.tab(chromium, 1280) as (page, requests):
        yield Visit(page, quick, requests)


def verified(visit: Visit) -> None:
    visit.press("#step-open")
    visit.press("#step-ask")
    visit.take_code()
    assert visit.press("#step-code") == f"Verified: {visit.number}. The code is used up."


# -- The flows ----------------------------------------------------------------


def test_the_registration_flow_to_a_proof_that_a_site_believes(visit: Visit) -> None:
    assert visit.press("#step-open").startswith("A session is open.")
    assert visit.press("#step-ask") == "An SMS from Gateway is on its way to this phone."
    (text,) = visit.messages(1)
    assert re.fullmatch(r"Your verification code is: \d{6}", text)
    bubble = visit.page.inner_text("#messages li")
    assert "GSM-7: 33 of 160 units, 1 segment" in bubble
    assert "No origin-bound code: its last line does not begin with @ and a host" in bubble
    visit.take_code()
    assert visit.page.input_value("#step-code [name=code]") == text[-6:]
    assert visit.press("#step-code") == f"Verified: {visit.number}. The code is used up."
    assert visit.press(".state") == f"Verified: {visit.number}."
    for kind in ("ES256", "RS256"):
        assert visit.press("#step-proof", kind=kind).startswith("The gateway signed it.")
        claims = visit.page.text_content("#step-proof .exchange[open]")
        assert visit.number in claims
        issued = re.search(r"issued at: (\S{19})Z", claims)
        assert issued
        age = datetime.now(UTC) - datetime.fromisoformat(issued[1] + "+00:00")
        assert timedelta(0) <= age < timedelta(minutes=2)
        assert visit.press("#step-show", trick="") == f"The site believes it: {visit.number}."
    assert visit.press("#step-end").startswith("The session is gone.")
    assert visit.messages(0) == []  # /unregister of a verified number empties its outbox
    assert visit.press("#step-attack", trick="replay").startswith("Refused: 401, errno 110:")
    visit.check({401: 1})


def test_the_phone_texts_first(visit: Visit) -> None:
    visit.page.check("[name=flow][value=momt]")
    assert visit.page.is_hidden("#step-ask")
    assert visit.page.is_visible("#step-text")
    assert visit.press("#step-open", mcc="234", mnc="15").endswith(f"can text to {MO_NUMBER}.")
    assert visit.page.input_value("#compose-to") == MO_NUMBER
    assert visit.press("#step-text").startswith("The id stands in the message on the phone.")
    hawk_id = visit.page.input_value("#compose-text")
    assert re.fullmatch("[0-9a-f]{64}", hawk_id)
    assert visit.page.inner_text("#compose-size") == "GSM-7: 64 of 160 units, 1 segment"
    assert visit.text() == "The gateway answered with a code."
    (code,) = visit.messages(1)
    assert re.fullmatch("[0-9a-f]{32}", code)
    called = visit.page.text_content("#step-text .exchange")
    assert f"msisdn={visit.number[1:]}&text={hawk_id}" in called
    # Failure: another phone texts the same id.
    thief = next(NUMBERS)
    visit.phone_is(thief)
    assert visit.messages(0) == []
    assert visit.text().startswith("Nothing came back. The webhook answers 200 all the same")
    assert visit.messages(0) == []
    visit.phone_is(visit.number)
    visit.messages(1)
    visit.take_code()
    assert visit.press("#step-code") == f"Verified: {visit.number}. The code is used up."
    visit.check({})


def test_each_signature_that_it_shows_is_right(visit: Visit) -> None:
    """Each hash and MAC on the page follows from the lines that the page shows for it."""
    verified(visit)
    visit.press(".state")
    visit.page.check("#all-steps")
    cards = visit.page.locator(".exchange")
    signed = 0
    for card in cards.all():
        parts = {}
        for part in card.locator(".parts > li").all():
            parts[part.locator("h4").text_content()] = part
        if "The MAC" not in parts:
            continue
        key, mac = parts["The MAC"].locator("td code").all_text_contents()
        sent = parts["What the signature covers"].locator("tbody td:first-child")
        got = parts["The answer's signature"].locator("tbody td:first-child")
        assert mac == mac_of(key, sent.all_text_contents())
        seal = parts["The answer's signature"].locator("> p code").last.text_content()
        assert seal == mac_of(key, got.all_text_contents())
        body, answer = next(iter(parts.values())), parts["The answer's signature"]
        for part, lines in ((body, sent), (answer, got)):
            shown = hashlib.sha256(part.locator("pre").text_content().encode()).digest()
            (digest,) = part.locator("code.hash").all_text_contents()
            assert base64.b64encode(shown).decode() == digest == lines.all_text_contents()[7]
        wire = parts["The request on the wire"].text_content()
        assert f'mac="{mac}"' in wire
        assert f'mac="{seal}"' in parts["The answer"].text_content()
        assert key not in wire
        signed += 1
    assert signed == 3
    rows = visit.page.locator("#step-open table td code").all_text_contents()
    token = gateway.SessionToken(bytes.fromhex(rows[0]))
    derived = gateway.derive_credentials(token)
    assert (rows[3], rows[4]) == (derived.hawk_id, derived.hawk_key.hex())


def mac_of(key: str, lines: list[str]) -> str:
    text = "".join(line + "\n" for line in lines)
    return base64.b64encode(hmac.digest(key.encode(), text.encode(), "sha256")).decode()


def test_the_steps_of_a_message_are_shown_one_at_a_time(visit: Visit) -> None:
    visit.press("#step-open")
    visit.press("#step-ask")
    parts, button = visit.page.locator("#step-ask .parts > li"), visit.page.locator(".next:visible")
    total = parts.count()
    for shown in range(1, total + 1):
        assert parts.locator("visible=true").count() == shown
        if shown < total:
            title = parts.nth(shown).locator("h4").text_content()
            assert button.inner_text() == f"Next: {title}"
            button.click()
    assert total == 6
    assert button.count() == 0
    # A new message closes the older ones, and with the box ticked it is shown whole.
    visit.page.check("#all-steps")
    visit.press("#step-resend")
    assert visit.page.locator(".exchange[open]").count() == 1
    assert visit.page.locator("#step-resend .parts > li:visible").count() == 6


# -- The failures -------------------------------------------------------------


def test_three_wrong_codes_kill_the_one_that_waits(visit: Visit) -> None:
    visit.press("#step-open")
    visit.press("#step-ask")
    (text,) = visit.messages(1)
    wrong = f"{(int(text[-6:]) + 1) % 1_000_000:06}"
    for left in (2, 1):
        said = visit.press("#step-code", code=wrong)
        assert said.startswith(f"Refused: 400, errno 105: the code is wrong; tries left: {left}.")
        bears = "one wrong try" if left == 1 else "2 wrong tries"
        assert f"A code waits: it bears {bears} and lives" in said
    said = visit.press("#step-code", code=wrong)
    assert "the code is wrong, and dead now" in said
    assert "No code waits." in said
    said = visit.press("#step-code", code=text[-6:])
    assert said.startswith("Refused: 410, errno 111:")
    link = visit.page.locator("#step-code .outcome a")
    assert link.get_attribute("href") == "/errors#111"
    assert visit.press("#step-code", code="12").startswith("Refused: 400, errno 107:")
    visit.check({400: 4, 410: 1})


def test_the_older_code_is_told_from_a_wrong_one(visit: Visit) -> None:
    visit.press("#step-open")
    visit.press("#step-ask")
    assert visit.press("#step-resend").startswith("A fresh code is on its way.")
    old, new = visit.messages(2)
    said = visit.press("#step-code", code=old[-6:])
    assert said.startswith("Refused: 400, errno 105: a newer code was sent: use that one.")
    assert "it bears 3 wrong tries" in said
    assert visit.press("#step-code", code=new[-6:]).startswith("Verified: ")
    visit.check({400: 1})


def test_too_soon_and_too_often_are_told_with_the_time_to_wait(
    chromium: Any, patient: GatewayProcess, visit: Visit
) -> None:
    with browser.tab(chromium, 1280) as (page, requests):
        slow = Visit(page, patient, requests)
        slow.press("#step-open")
        assert slow.press("#step-ask").endswith("on its way to this phone.")
        assert slow.press("#step-ask").endswith("that was a double click.")
        for step, fields in (("#step-ask", {"kind": "long"}), ("#step-resend", {})):
            said = slow.press(step, **fields)
            assert said.startswith("Refused: 429, errno 114: resend_gaps_s")
            found = re.search(r"Retry-After is (\d+): a client asks again in (\d+) s, at \d", said)
            assert found
            assert 1 < int(found[1]) == int(found[2]) <= 30
            assert f"Another message may be asked for in {found[1]} s" in said
            assert "4 messages are left" in said
        (text,) = slow.messages(1)
        assert text.splitlines()[1] == f"@shop.example #{text.splitlines()[0][-6:]}"
        bound = page.locator("#messages .bound")
        told = "Not offered to http://127.0.0.1:"
        assert f"Origin-bound code {text[-6:]} for shop.example. {told}" in bound.inner_text()
        page.fill("#phone-origin", "https://shop.example")
        assert "Offered to https://shop.example" in bound.inner_text()
        page.fill("#phone-origin", "https://evil.example")
        assert "Not offered to https://evil.example" in bound.inner_text()
        slow.take_code()
        assert slow.press("#step-code").startswith("Verified: ")
        slow.check({429: 2})
    visit.press("#step-open")
    for _ in range(5):
        assert visit.press("#step-ask").startswith("An SMS from Gateway")
    said = visit.press("#step-ask")
    assert said.startswith("Refused: 429, errno 114: sends_per_session")
    assert re.search(r"Retry-After is 3\d{3}: a client asks again in (1 h|59 min \d+ s), at", said)
    assert "no message is left" in said
    visit.check({429: 1})


def test_a_number_that_is_none_and_a_client_without_a_session(visit: Visit) -> None:
    for step in ("#step-ask", "#step-resend", "#step-code", "#step-proof", "#step-end", ".state"):
        assert visit.press(step).startswith("Register first:")
    assert visit.press("#step-show") == "Get a proof first."
    visit.press("#step-open")
    said = visit.press("#step-ask", msisdn="07700 900123")
    assert said.startswith("Refused: 400, errno 107: msisdn must be + with country code")
    assert visit.press("#step-proof").startswith("Refused: 400, errno 104:")
    assert visit.press("#step-resend").startswith("Refused: 410, errno 111:")
    visit.check({400: 2, 410: 1})


def test_who_tampers_with_a_request_is_refused(visit: Visit) -> None:
    visit.press("#step-open")
    visit.press("#step-ask")
    for trick, why in {
        "replay": "the nonce was used before",
        "body": "the payload hash is not that of the body",
        "key": "the MAC is wrong",
    }.items():
        said = visit.press("#step-attack", trick=trick)
        assert said.startswith(f"Refused: 401, errno 109: {why}"), trick
        sealed = visit.page.inner_text("#step-attack .exchange[open] summary")
        # The gateway signs an answer only if the MAC of its request was right.
        assert sealed.endswith("not signed") == (trick == "key"), (trick, sealed)
    assert visit.press("#step-attack", trick="clock").startswith("The gateway refused the time")
    cards = visit.page.locator("#step-attack summary").all_inner_texts()
    assert [card.split("→ ")[1][:3] for card in cards[:2]] == ["200", "401"]
    assert len(visit.messages(1)) == 1
    visit.check({401: 4})


@pytest.mark.parametrize("kind", ["ES256", "RS256"])
def test_a_site_sees_each_trick_by_the_check_that_is_for_it(visit: Visit, kind: str) -> None:
    verified(visit)
    visit.press("#step-proof", kind=kind)
    name = "binding" if kind == "ES256" else "assertion"
    for trick, wrong in {
        "audience": [f"aud of the {name} is my origin"],
        "nonce": ["nonce is the one I gave", "the binding is fresh: at most five minutes old"]
        if kind == "ES256"
        else ["the assertion has not expired"],
        "number": [
            "the gateway signed it, with that key"
            if kind == "ES256"
            else "the gateway signed the certificate"
        ],
        "key": [f"the key in {'cnf' if kind == 'ES256' else 'the certificate'} signed the {name}"],
    }.items():
        said = visit.press("#step-show", trick=trick)
        assert said == f"The site refuses it. Not right: {'; '.join(wrong)}."
        rows = visit.page.locator("#step-show .exchange[open] tbody td:first-child")
        told = rows.all_text_contents()
        assert [row for row in told if "✗" in row] == [f"✗ wrong: {one}" for one in wrong]
        assert len(told) == (11 if kind == "ES256" else 7)
    assert visit.press("#step-show", trick="").startswith("The site believes it: ")
    visit.check({})


def test_a_gateway_that_has_stopped_is_told_in_words(chromium: Any, tmp_path: Path) -> None:
    process = GatewayProcess(tmp_path)
    try:
        with browser.tab(chromium, 1280) as (page, requests):
            visit = Visit(page, process, requests)
            visit.press("#step-open")
            process.stop()
            said = visit.press("#step-ask")
            assert said == "Nothing came back (Failed to fetch). Is the gateway running?"
            assert "The outbox does not answer" in page.inner_text("#no-messages")
    finally:
        process.close()


# -- By keyboard, on each screen ----------------------------------------------


FOCUSED = """(() => {
  const one = document.activeElement
  return one === document.body ? '' : one.textContent.trim() || one.name || one.id
})()"""


def test_all_of_it_can_be_done_by_keyboard(visit: Visit) -> None:
    page, seen = visit.page, []

    def go_to(words: str) -> None:
        for _ in range(80):
            page.keyboard.press("Tab")
            name = page.evaluate(FOCUSED)
            outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert outline == "solid" or not name, name  # one sees where one is
            seen.append(name)
            if name.startswith(words):
                return
        raise AssertionError(f"Tab never came to {words!r}: {seen}")

    page.evaluate("document.activeElement.blur()")
    go_to("flow")
    page.keyboard.press("ArrowDown")
    assert page.is_visible("#step-text")
    page.keyboard.press("ArrowUp")
    go_to("Register")
    page.keyboard.press("Enter")
    page.wait_for_selector("#step-open .outcome:not(:empty)")
    go_to("Next: ")
    page.keyboard.press("Space")
    go_to("Send a code")
    page.keyboard.press("Space")
    visit.messages(1)
    go_to("Write ")
    page.keyboard.press("Enter")
    assert page.input_value("#step-code [name=code]")
    go_to("code")
    page.keyboard.press("Enter")  # in the field: it sends the form
    page.wait_for_selector("#step-code .outcome.good")
    assert visit.outcome("#step-code").startswith("Verified: ")
    visit.check({})


VIEWS = [(width, scheme) for width in (1280, 390) for scheme in ("light", "dark")]


def full_of_messages(visit: Visit) -> None:
    """All that the page can show, all of it open."""
    visit.page.check("#all-steps")
    verified(visit)
    visit.press("#step-code", code="000000")
    visit.press("#step-proof")
    visit.press("#step-show", trick="number")
    visit.press("#step-attack", trick="key")
    visit.page.check("[name=flow][value=momt]")
    visit.press("#step-text")
    visit.text()
    visit.page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")


@pytest.mark.parametrize(("width", "scheme"), VIEWS)
def test_it_is_whole_and_readable_and_has_no_violation_of_wcag(
    chromium: Any, quick: GatewayProcess, width: int, scheme: str
) -> None:
    with browser.tab(chromium, width, color_scheme=scheme) as (page, requests):
        visit = Visit(page, quick, requests)
        assert (seen(page, width), violations(page)) == ([], [])
        full_of_messages(visit)
        assert (seen(page, width), violations(page)) == ([], [])
        dark = sum(page.evaluate(BACKGROUND)) < 120
        assert dark == (scheme == "dark")


BACKGROUND = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"


def seen(page: Any, width: int) -> list[str]:
    return browser.look(page, width)


def violations(page: Any) -> list[str]:
    """What axe-core finds against WCAG 2.1 AA; nothing if it is not installed."""
    if not AXE.exists():
        return []
    page.evaluate(AXE.read_text("utf-8") + "; 0")
    found = page.evaluate(RUN_AXE, WCAG)
    assert found["passes"] >= 10
    return [f"{one['id']}: {node['html'][:200]}" for one in found["violations"]
            for node in one["nodes"]]  # fmt: skip


NO_LABEL = "const one = document.querySelector('#phone-number'); one.parentElement.replaceWith(one)"
FAINT = "document.body.style.color = '#777'; document.body.style.background = '#999'"


@needs_axe
@pytest.mark.parametrize(
    ("fault", "id"),
    [
        (NO_LABEL, "label"),
        (FAINT, "color-contrast"),
        ("document.documentElement.removeAttribute('lang')", "html-has-lang"),
        ("document.querySelector('#look').textContent = ''", "button-name"),
    ],
    ids=["label", "contrast", "language", "name"],
)
def test_axe_sees_what_is_wrong(visit: Visit, fault: str, id: str) -> None:
    visit.page.evaluate(fault)
    assert id in {found.partition(":")[0] for found in violations(visit.page)}


def test_a_phone_of_a_person_who_reads_no_latin_is_measured_in_ucs2(visit: Visit) -> None:
    visit.page.fill("#compose-text", "Привет, это мой телефон")
    assert visit.page.inner_text("#compose-size").startswith("UCS-2: 23 of 70 units, 1 segment")
    visit.page.fill("#compose-text", "a" * 161)
    assert visit.page.inner_text("#compose-size") == "GSM-7: 161 of 306 units, 2 segments"


# -- Who is kept out ----------------------------------------------------------

INJECTED = """<script>window.ran = 'inline'</script>
<p onclick="window.ran = 'handler'" id=victim>press me</p>
<script src="{other}/evil.js"></script>
<style>#victim {{ color: rgb(1, 2, 3) }}</style>
<img src="{other}/evil.png"><iframe src="{other}/evil.html"></iframe>
<form action="{other}/evil" id=evil></form><base href="{other}/"></body>"""


@pytest.fixture(scope="module")
def elsewhere(chromium: Any) -> Iterator[tuple[str, list[str]]]:
    """Another origin, and the paths that it was asked for."""
    asked: list[str] = []

    def app(environ: Any, start_response: Any) -> list[bytes]:
        asked.append(environ["PATH_INFO"])
        start_response("200 OK", [("Content-Type", "text/html")])
        return [b"<!doctype html><title>elsewhere</title>"]

    with lab.serving(app) as address:
        yield address, asked


def test_the_policy_holds(
    chromium: Any, quick: GatewayProcess, elsewhere: tuple[str, list[str]]
) -> None:
    """Whatever somebody could write into the page does not run, load, send or ask."""
    address, asked = elsewhere
    before = len(asked)
    with browser.tab(chromium, 1280) as (page, _):

        def inject(route: Any) -> None:
            answer = route.fetch()
            body = answer.text().replace("</body>", INJECTED.format(other=address))
            assert "evil.js" in body
            route.fulfill(response=answer, body=body)

        page.route("**/index.html", inject)
        page.add_init_script(
            "window.broken = []; addEventListener('securitypolicyviolation', "
            "event => broken.push(event.effectiveDirective))"
        )
        page.goto(url_of(quick))
        page.wait_for_selector("#step-end .outcome", state="attached")
        page.click("#victim")
        color = "getComputedStyle(document.querySelector('#victim')).color"
        assert page.evaluate(color) != "rgb(1, 2, 3)"
        page.evaluate("document.querySelector('#evil').submit()")
        for script in (
            "document.body.innerHTML = '<p>'",
            "document.createElement('script').textContent = 'window.ran = 1'",
            f"fetch('{address}/evil')",
            f"import('{address}/evil.mjs')",
            "import('data:text/javascript,window.ran=1')",
            "new Worker('data:text/javascript,')",
        ):
            failed = (
                f"(async () => {{ try {{ await ({script}); return 0 }} catch {{ return 1 }} }})()"
            )
            assert page.evaluate(failed) == 1, script
        assert page.evaluate("window.ran") is None
        assert page.evaluate("document.baseURI").startswith(quick.url)
        assert set(page.evaluate("broken")) >= {
            "script-src-elem", "script-src-attr", "style-src-elem", "img-src", "frame-src",
            "base-uri", "form-action", "require-trusted-types-for", "connect-src",
        }  # fmt: skip
    assert asked[before:] == []


def test_another_origin_reads_nothing_of_it_even_with_the_token(
    chromium: Any, quick: GatewayProcess, elsewhere: tuple[str, list[str]]
) -> None:
    """A page on another port of this machine is the nearest that a stranger can come."""
    url = url_of(quick)
    with browser.tab(chromium, 1280) as (page, _):
        page.goto(elsewhere[0])
        module = url.replace("index.html", "press.mjs")
        for script in (
            f"fetch('{url}').then(answer => answer.text())",
            f"fetch('{url}', {{ mode: 'no-cors' }}).then(a => a.text().then(t => t || fail()))",
            f"import('{module}')",
        ):
            failed = (
                f"(async () => {{ try {{ await ({script}); return 0 }} catch {{ return 1 }} }})()"
            )
            assert page.evaluate(failed) == 1, script
        page.evaluate(
            "url => { const frame = document.createElement('iframe'); frame.src = url;"
            " document.body.append(frame) }",
            url,
        )
        page.wait_for_timeout(500)
        assert all(frame.locator("#client").count() == 0 for frame in page.frames)


def test_without_the_token_or_through_a_proxy_there_is_nothing(
    chromium: Any, quick: GatewayProcess
) -> None:
    url = url_of(quick)
    token = url.split("/")[-2]
    for where, headers, status in (
        (url, {}, 200),
        (url.replace(token, token[:-1]), {}, 404),
        (f"{quick.url}/press/index.html", {}, 404),
        (f"{quick.url}/press", {}, 404),  # what the address says after it was opened
        (url, {"X-Forwarded-For": "192.0.2.1"}, 404),
        (url, {"Via": "1.1 proxy"}, 404),
    ):
        with browser.tab(chromium, 1280, extra_http_headers=headers) as (page, _):
            answer = page.goto(where)
            assert answer.status == status, (where, headers)
            if status == 404:
                assert answer.json().keys() == {"code", "error", "message"}
