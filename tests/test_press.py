"""The files of the page to press: who gets them, and what it says of a text by itself."""

from __future__ import annotations

import contextlib
import json
import random
import re
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import urllib3
from servers import wait_for
from support import GatewayProcess, WsgiClient, free_port

import gateway

PRESS = gateway.ROOT / "notebooks" / "press"
needs_node = pytest.mark.skipif(not shutil.which("node"), reason="not installed: Node 18 or newer")


def both(path: str) -> tuple[str, str]:
    """Both spellings of a path."""
    return path, "/v1/msisdn" + path


def test_every_file_of_the_page_is_served_as_it_is(client: WsgiClient) -> None:
    names = {path.name for path in PRESS.iterdir()} | {"client.mjs"}
    assert gateway.PRESS_FILES.keys() == names
    kinds = {".html": "text/html", ".css": "text/css", ".svg": "image/svg+xml"}
    for name, path in gateway.PRESS_FILES.items():
        for spelled in both(f"/press/{client.app.token}/{name}"):
            answer = client.get(spelled)
            assert (answer.status, answer.data) == (200, path.read_bytes())
            kind = answer.headers["content-type"]
            # Browsers run a module under either name.
            assert kind in (kinds.get(path.suffix), "text/javascript", "application/javascript")


def test_the_page_may_run_and_ask_nothing_but_its_own_files(client: WsgiClient) -> None:
    for name in gateway.PRESS_FILES:
        headers = client.get(f"/press/{client.app.token}/{name}").headers
        policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        assert policy.pop("default-src") == "'none'"
        for part in ("script-src", "style-src", "img-src", "connect-src"):
            assert policy.pop(part) == "'self'"
        for part in ("base-uri", "form-action", "frame-ancestors", "trusted-types"):
            assert policy.pop(part) == "'none'"
        assert policy == {"require-trusted-types-for": "'script'"}
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        assert headers["cross-origin-resource-policy"] == "same-origin"


def no_file(path: Path) -> bytes:
    raise AssertionError(f"{path} was read")


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../index.html",
        "..%2Fclient.py",
        "..%2F..%2Fgateway.py",
        "%2Fetc%2Fpasswd",
        "..%5C..%5Cgateway.py",
        "%2e%2e%2f%2e%2e%2fkeys%2fmaster.secret",
        "index.html%00",
        "index.html%00.css",
        "INDEX.HTML",
        "index.htm",
        "index.html/",
        "index.html/..",
        "client.py",
        "*.mjs",
        "press",
        "%FF",
        "i" * 60_000,
    ],
    ids=lambda name: repr(name)[:40],
)
def test_a_name_that_a_stranger_chooses_never_reaches_the_file_system(
    client: WsgiClient, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """It is only looked up among the names that were there at the start."""
    monkeypatch.setattr(Path, "read_bytes", no_file)
    for path in both(f"/press/{client.app.token}/{name}"):
        assert client.get(path).status == 404


@pytest.mark.slow
def test_the_page_is_there_for_whoever_knows_the_token(
    client: WsgiClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "read_bytes", no_file)
    token = client.app.token
    others = ("", "x", token[:-1], token + "x", token.swapcase(), secrets.token_urlsafe(32))
    for given in (*others, "%00", "%FF", "None", "<token>", token + "%2F..", "A" * 60_000):
        for name in ("index.html", "press.mjs"):
            answer = client.get(f"/press/{given}/{name}")
            assert (answer.status, answer.json.keys()) == (404, {"code", "error", "message"})
            assert token not in str(answer.headers)
    for query in (f"?token={token}", ""):  # it stands in the path, and nowhere else
        environ = {"HTTP_AUTHORIZATION": f"Bearer {token}"}
        assert client.get(f"/press/x/index.html{query}", **environ).status == 404


def test_without_the_outbox_there_is_no_page(make_client: Callable[..., WsgiClient]) -> None:
    providers = [{"kind": "nexmo", "api_key": "k", "api_secret": "s"}]
    client = make_client(sms_providers=providers)
    for name in gateway.PRESS_FILES:
        assert client.get(f"/press/{client.app.token}/{name}").status == 404


@pytest.mark.slow
def test_the_start_prints_where_the_page_is_and_the_log_never_does(
    start_gateway: Callable[..., GatewayProcess],
) -> None:
    process = start_gateway()
    token = (process.folder / "keys" / "operator.token").read_text().strip()
    url = f"{process.url}/press/{token}/index.html"
    wait_for(lambda: url in process.output, "the page's URL")
    http = urllib3.PoolManager(retries=False, timeout=10)
    page = http.request("GET", url).data
    assert page == (PRESS / "index.html").read_bytes()
    assert http.request("GET", url + "x").status == 404
    metrics = {"Authorization": f"Bearer {token}"}
    counted = http.request("GET", process.url + "/metrics", headers=metrics).data.decode()
    assert 'route="/press/<token>/<name>"' in counted
    assert token not in counted
    process.stop()
    assert "/press/<token>/<name> 200" in process.output
    assert process.output.count(token) == 2  # the two URLs of the start


@pytest.mark.slow
def test_a_gateway_without_its_notebooks_has_no_page_and_names_none(tmp_path: Path) -> None:
    """A small deployment copies gateway.py and locale/."""
    alone, port = shutil.copy(gateway.ROOT / "gateway.py", tmp_path), free_port()
    shutil.copytree(gateway.ROOT / "locale", tmp_path / "locale")
    log = tmp_path / "log"
    with log.open("wb") as file:
        command = [sys.executable, str(alone), "--port", str(port), "--workers", "1"]
        process = subprocess.Popen(command, cwd=tmp_path, stdout=file, stderr=file)
    try:
        wait_for(lambda: "/outbox?token=" in log.read_text(), "a start")
        token = (tmp_path / "keys" / "operator.token").read_text().strip()
        http, base = urllib3.PoolManager(retries=False, timeout=10), f"http://127.0.0.1:{port}"

        def outbox() -> int:
            with contextlib.suppress(urllib3.exceptions.HTTPError):
                return http.request("GET", f"{base}/outbox?token={token}&to=1").status
            return 0

        wait_for(lambda: outbox() == 200, "an answer")
        assert http.request("GET", f"{base}/press/{token}/index.html").status == 404
        assert "/press/" not in log.read_text().partition("request ")[0]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


# -- What the phone says of a text --------------------------------------------


def node(script: str, given: Any) -> Any:
    """What a script of ``sms.mjs``' functions makes of ``given``."""
    program = f"""
        import {{ measure, parseOriginBound, offeredTo }} from {json.dumps(str(PRESS / "sms.mjs"))}
        import {{ readFileSync }} from 'node:fs'
        const given = JSON.parse(readFileSync(0, 'utf8'))
        console.log(JSON.stringify({script}))
    """
    command = ["node", "--input-type=module", "-e", program]
    run = subprocess.run(command, input=json.dumps(given).encode(), capture_output=True, timeout=60)
    assert run.returncode == 0, run.stderr.decode()
    return json.loads(run.stdout)


@needs_node
def test_the_phone_measures_a_text_as_the_gateway_does() -> None:
    draw = random.Random(7)
    alphabets = (
        sorted(gateway.GSM7),
        [*gateway.GSM7_TWICE, "a"],
        sorted(gateway.GSM7 | gateway.GSM7_TWICE),
        "aя😀",
        [chr(n) for n in range(0x250)],
    )
    texts = [
        "".join(draw.choices(alphabet, k=length))
        for alphabet in alphabets
        for length in (
            0,
            1,
            66,
            67,
            68,
            69,
            70,
            71,
            133,
            134,
            135,
            153,
            154,
            159,
            160,
            161,
            306,
            500,
        )
    ]
    codes = ("123456", "000000")
    texts += [
        gateway.message_text(code, catalogue, host)
        for catalogue in gateway.load_catalogues().values()
        for code, host in zip(codes, ("", "shop.example"), strict=True)
    ]
    found = node("given.map((text) => measure(text))", texts)
    told = [(one["encoding"], one["units"], one["segments"]) for one in found]
    assert told == [tuple(gateway.measure(text)) for text in texts]
    assert {segments for _, _, segments in told} >= {1, 2, 3, 4}


EXAMPLES = {
    "747723 is your ExampleCo authentication code.\n\n@example.com #747723": (
        *("example.com", "747723", None),
    ),
    "x\n@example.com #747723 %ecommerce.example": ("example.com", "747723", "ecommerce.example"),
    "@example.com #747723 %ecommerce.example $future": (
        *("example.com", "747723", "ecommerce.example"),
    ),
    "something @example.com #747723": None,
    "#747723 %ecommerce.example @example.com": None,
    "@example.com code #747723": None,
    "@example.com  #747723": None,
    "@example.com\t#747723": None,
    "@example.com #747723\n": None,  # the last line is empty
    "@example.com #747723\r": None,
    "code\r\n@example.com #747723": ("example.com", "747723", None),
    "code\r@example.com #747723": ("example.com", "747723", None),
    "code @example.com #747723": None,  # a carrier made a space of the line's end
    "@ #747723": None,
    "@example.com #": None,
    "@example.com": None,
    "@example.com ": None,
    "": None,
    "@example.com #74\f7723": ("example.com", "74", None),
    "@example.com #747723 % x": ("example.com", "747723", None),
    "@example.com #747723 ": ("example.com", "747723", None),
    "@példa.example #12 %x": ("példa.example", "12", "x"),
}
"""Messages, and host, code and embedded host; most are the specification's own examples."""


@pytest.mark.slow
@needs_node
def test_the_phone_parses_an_origin_bound_code_as_wicg_does() -> None:
    found = node("given.map((text) => parseOriginBound(text))", list(EXAMPLES))
    for (message, expected), told in zip(EXAMPLES.items(), found, strict=True):
        names = ("topLevelHost", "code", "embeddedHost")
        assert (None if "failure" in told else tuple(told[n] for n in names)) == expected, message
    # And as one regular expression says it, over what fuzzing makes.
    draw = random.Random(11)
    texts = ["".join(draw.choices("@#% \n\r\tab1.", k=draw.randrange(14))) for _ in range(20_000)]
    texts += ["@a #1" + text for text in texts[:2000]]
    line = re.compile(r"@([^ \t\n\f\r]+) #([^ \t\n\f\r]+)(?: %([^ \t\n\f\r]+))?")
    found = node("given.map((text) => parseOriginBound(text))", texts)
    parsed = 0
    for message, told in zip(texts, found, strict=True):
        match = line.match(message.replace("\r\n", "\n").replace("\r", "\n").split("\n")[-1])
        assert ("failure" in told) == (match is None), message
        if match:
            assert [told[n] for n in ("topLevelHost", "code", "embeddedHost")] == [*match.groups()]
            parsed += 1
    assert parsed > 500


@needs_node
def test_a_code_is_offered_to_its_own_site_only() -> None:
    message = "Your verification code is: 123456\n@shop.example #123456"
    asks = {
        "https://shop.example": True,
        "https://shop.example:8443": True,
        "https://login.shop.example": True,
        "http://shop.example": False,
        "https://evil.example": False,
        "https://notshop.example": False,
        "https://shop.example.evil.example": False,
        "https://example": False,
        "http://127.0.0.1:5000": False,
        "null": False,
        "": False,
    }
    script = "given[1].map((origin) => offeredTo(parseOriginBound(given[0]), origin))"
    found = node(script, [message, list(asks)])
    assert [one["offered"] for one in found] == list(asks.values())
    framed = [message + " %pay.example", ["https://shop.example", "https://pay.example"]]
    assert [one["offered"] for one in node(script, framed)] == [False, False]
    assert all(one["why"] for one in found)


@needs_node
def test_the_gateways_own_line_parses() -> None:
    catalogue = gateway.load_catalogues()["en"]
    text = gateway.message_text("123456", catalogue, "shop.example")
    (told,) = node("given.map((text) => parseOriginBound(text))", [text])
    assert (told["topLevelHost"], told["code"]) == ("shop.example", "123456")
