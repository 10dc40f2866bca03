"""The clients to copy, ``notebooks/client.mjs`` and ``client.py``, against a gateway that listens.

What they send is judged by the gateway and by mohawk; what they show, by the functions of a site.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode
from urllib.request import urlopen

import lab
import mohawk
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from support import AT_ONCE, NUMBER, GatewayProcess

import gateway

ROOT = Path(__file__).resolve().parent.parent
ISSUER = "http://127.0.0.1:5000"
SITE = {"audience": "https://shop.example", "nonce": "n-0S6_WzA2Mj"}
SPANIARD = "+34612345678"
TAMPERED = ("body", "kind", "seal", "no seal", "no hawk", "replay", "mac of another", "200")
NO_NODE = pytest.mark.skipif(not shutil.which("node"), reason="not installed: Node 18 or newer")


def needs_node(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that starts Node: it is skipped without one, and slow."""
    marked: Callable[..., None] = pytest.mark.slow(NO_NODE(test))
    return marked


def load(name: str) -> Any:
    """A module that lies in ``notebooks/`` to be copied."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "notebooks" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


client_py = load("client")


class Tampering:
    """Somebody between client and gateway, who changes answers as the query of the URL says."""

    def __init__(self, app: gateway.GatewayApp) -> None:
        self.app, self.last = app, ("", b"")

    def __call__(self, environ: Any, start_response: Any) -> Any:
        how = environ.get("QUERY_STRING", "").replace("%20", " ")
        seen: list[Any] = []

        def note(status: str, headers: Any, exc_info: Any = None) -> Any:
            seen[:] = [status, dict(headers)]

        body = b"".join(self.app(environ, note))
        status, headers = seen
        seal = headers.get("Server-Authorization", "")
        if how == "body":
            body = body.replace(b"false", b"true ")
        elif how == "kind":
            headers["Content-Type"] = "text/html"
        elif how == "seal":
            headers["Server-Authorization"] = seal.replace('mac="', 'mac="AAAA')
        elif how == "no seal":
            del headers["Server-Authorization"]
        elif how == "no hawk":
            headers["Server-Authorization"] = "Bearer x"
        elif how == "replay":
            headers["Server-Authorization"], body = self.last
        elif how == "mac of another":
            mac = re.findall('mac="(.+?)"', self.last[0])[0]
            headers["Server-Authorization"] = re.sub('mac=".+?"', f'mac="{mac}"', seal)
        elif how == "200":
            status = "200 OK"
        if seal:
            self.last = seal, body
        headers["Content-Length"] = str(len(body))
        start_response(status, list(headers.items()))
        return [body]


class World(NamedTuple):
    """A gateway that listens, behind somebody who may tamper."""

    app: gateway.GatewayApp
    url: str

    def outbox(self, number: str) -> list[Any]:
        """What the phone of this number got."""
        query = urlencode({"to": number[1:], "token": self.app.token})
        with urlopen(f"{self.url}/outbox?{query}") as answer:
            return list(json.load(answer))

    def code(self, number: str) -> str:
        """The newest code for it."""
        return str(self.outbox(number)[-1]["text"].splitlines()[0].split()[-1])

    def jwks(self) -> Any:
        """The keys that check its proofs."""
        with urlopen(f"{self.url}/.well-known/jwks.json") as answer:
            return json.load(answer)

    def node(self, walk: str, number: str = NUMBER, calls: Any = ()) -> Any:
        """What ``client_walk.mjs`` found, and each exchange that client.mjs told of."""
        path = str(ROOT / "notebooks" / "client.mjs")
        what: Any = {"client": path, "url": self.url, "walk": walk, "token": self.app.token}
        what |= {"number": number, "site": SITE, "calls": list(calls)}
        done = subprocess.run(
            ["node", str(ROOT / "tests" / "client_walk.mjs")], input=json.dumps(what),
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def world(
    store: gateway.EmbeddedStore, keys_dir: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    settings = gateway.Settings(
        keys_dir=keys_dir, data_dir=str(tmp_path_factory.mktemp("clients")),
        resend_gaps_s=AT_ONCE, mo_verifier_map={"214": "+34600000001"},
    )  # fmt: skip
    app = gateway.create_app(settings, store.url)
    assert app.gateway.sms.outbox
    app.gateway.sms.outbox.console = None
    with lab.serving(Tampering(app)) as url:
        yield World(app, url)


def judged_by_mohawk(exchange: Any, credentials: dict[str, str]) -> None:
    """Another Hawk finds the request right, and makes the same seal for the answer."""
    request, answer = exchange["request"], exchange["answer"]
    headers = request["headers"]
    judge = mohawk.Receiver(
        lambda _: {**credentials, "algorithm": "sha256"},
        headers["Authorization"], request["url"], request["method"],
        content=request["body"], content_type=headers.get("Content-Type", ""),
        timestamp_skew_in_seconds=10**9, seen_nonce=lambda *_: False,
    )  # fmt: skip
    seal = judge.respond(content=answer["body"], content_type=answer["headers"]["content-type"])
    theirs = gateway.parse_hawk_header(seal)
    ours = gateway.parse_hawk_header(answer["headers"]["server-authorization"])
    assert (ours.mac, ours.hash) == (theirs.mac, theirs.hash)
    assert answer["genuine"] is True


def number_shown(world: World, shown: str) -> Any:
    """What a site makes of an SD-JWT that it is shown."""
    args = ISSUER, SITE["audience"], SITE["nonce"], time.time()
    return gateway.verify_presentation(shown, world.jwks(), *args)["phone_number"]


@needs_node
def test_the_registration_flow_in_javascript(world: World) -> None:
    told = world.node("mt")
    found, credentials = told["found"], told["found"]["credentials"]
    assert found["ways"]["verificationMethods"] == ["sms/mt"]
    assert found["opened"]["verificationUrl"].endswith("/sms/verify")
    assert found["mo"] is None
    assert (found["early"]["status"], found["early"]["errno"]) == (400, 104)
    assert found["asked"]["mtSender"] == "Gateway"
    assert (found["wrong"]["errno"], found["wrong"]["next"]["triesLeft"]) == (105, 2)
    assert found["wrong"]["signed"] is True
    assert found["wrong"]["info"] == f"{ISSUER}/errors#105"
    assert found["verified"]["msisdn"] == NUMBER
    assert found["state"]["msisdn"] == found["resumed"]["msisdn"] == NUMBER
    assert (found["gone"]["errno"], found["gone"]["signed"]) == (110, False)
    for exchange in told["messages"]:
        if exchange["request"]["normalized"] and exchange["answer"]["status"] != 204:
            judged_by_mohawk(exchange, credentials)
    assert [x["answer"]["genuine"] for x in told["messages"][2:]] == [True] * 10
    token = gateway.SessionToken(bytes.fromhex(found["secret"]))
    derived = gateway.derive_credentials(token)
    assert (derived.hawk_id, derived.hawk_key.hex()) == (credentials["id"], credentials["key"])


@needs_node
def test_what_javascript_shows_is_believed(world: World) -> None:
    found = world.node("mt")["found"]
    assert [number_shown(world, shown) for shown in found["shown"]] == [NUMBER, NUMBER]
    claims = gateway.verify_proof(found["jwt"], world.jwks(), ISSUER, time.time(), SITE["audience"])
    assert (claims["phone_number"], claims["nonce"]) == (NUMBER, SITE["nonce"])
    key = world.app.gateway.keys.browserid.public_key()
    issuer = ISSUER.removeprefix("http://")
    now_ms = round(time.time() * 1000)
    backed = gateway.verify_backed_assertion(found["backed"], SITE["audience"], issuer, key, now_ms)
    assert backed["verifiedMSISDN"] == NUMBER
    decimal, back, jwk = found["keys"]
    assert gateway.canonical_key(decimal) == decimal
    assert back == jwk


@needs_node
def test_the_phone_speaks_first_in_javascript(world: World) -> None:
    found = world.node("mo", SPANIARD)["found"]
    assert found["info"] == {
        "mtSender": "Gateway", "moVerifier": "+34600000001", "text": found["credentials"]["id"],
    }  # fmt: skip
    assert found["webhook"] == 200
    assert re.fullmatch("[0-9a-f]{32}", found["text"])
    assert found["verified"] == {"msisdn": SPANIARD}


@needs_node
def test_a_clock_that_is_an_hour_slow_is_set_once_in_javascript(world: World) -> None:
    told = world.node("clock")
    assert [x["answer"]["status"] for x in told["messages"]] == [200, 401, 200, 200]
    assert told["messages"][1]["answer"]["genuine"] is True
    assert abs(told["found"]["skew"] - 3600) < 5


@needs_node
def test_a_tampered_answer_is_refused_in_javascript(world: World) -> None:
    found = world.node("tampered", calls=["", *TAMPERED])["found"]
    assert found.pop("") is None
    assert found.pop("200") is None  # it was one
    assert found.keys() == {*TAMPERED} - {"200"}
    for how, error in found.items():
        assert error == {"name": "Error", "message": "the answer is not signed by the gateway"}, how


# -- Python ------------------------------------------------------------------------


def refusal(client: Any, *args: Any, **options: Any) -> Any:
    """The error that a call ends with."""
    with pytest.raises(client_py.GatewayError) as caught:
        client.call(*args, **options)
    return caught.value


def test_the_registration_flow_in_python(world: World) -> None:
    client, key = client_py.Client(world.url), ec.generate_private_key(ec.SECP256R1())
    ways = client.call("POST", "/discover", {"msisdn": NUMBER}, signed=False)
    assert ways["verificationMethods"] == ["sms/mt"]
    client.register()
    assert refusal(client, "POST", "/certificate/sign", {"publicKey": {}}).errno == 104
    assert client.call("POST", "/sms/verify", {"msisdn": NUMBER})["mtSender"] == "Gateway"
    wrong = refusal(client, "POST", "/sms/verify_code", {"code": "000000"})
    assert (wrong.status, wrong.errno, wrong.signed) == (400, 105, True)
    assert wrong.body["next"]["triesLeft"] == 2
    client.call("POST", "/sms/resend_code")
    body = {"code": world.code(NUMBER), "publicKey": client_py.public_jwk(key)}
    verified = client.call("POST", "/sms/verify_code", body)
    assert verified["msisdn"] == NUMBER
    site = SITE["audience"], SITE["nonce"], client.now()
    shown = client_py.present(verified["cert"], key, *site)
    assert number_shown(world, shown) == NUMBER
    again = client_py.Client(world.url, client.token)
    assert again.call("GET", "/session")["msisdn"] == NUMBER
    assert client.call("POST", "/unregister") == {}
    gone = refusal(again, "GET", "/session")
    assert (gone.errno, gone.signed) == (110, False)


def test_the_phone_speaks_first_in_python(world: World) -> None:
    client = client_py.Client(world.url)
    way = client.register({"mcc": "214"})["verificationDetails"]["sms/momt"]
    assert way["moVerifier"] == "+34600000001"
    hawk_id, _ = client_py.derive_credentials(client.token)
    form = urlencode({"msisdn": SPANIARD[1:], "text": hawk_id, "messageId": "0A2"}).encode()
    with urlopen(f"{world.url}/sms/momt/?provider=nexmo", form) as answer:
        assert answer.status == 200
    code = {"code": world.code(SPANIARD)}
    assert client.call("POST", "/sms/verify_code", code) == {"msisdn": SPANIARD}


@pytest.mark.parametrize("off_s", [-3600, 3600])
def test_a_clock_that_is_an_hour_off_is_set_once_in_python(
    world: World, monkeypatch: pytest.MonkeyPatch, off_s: int
) -> None:
    right = time.time
    client = client_py.Client(world.url)
    client.register()
    monkeypatch.setattr(client_py.time, "time", lambda: right() + off_s)
    assert refusal(client, "GET", "/session", again=False).errno == 109
    assert client.skew_s == 0
    assert "next" in client.call("GET", "/session")
    assert abs(client.skew_s + off_s) < 5
    assert "next" in client.call("GET", "/session", again=False)


def test_a_foreign_time_is_not_believed(world: World) -> None:
    client = client_py.Client(world.url)
    client.register()
    credentials = client_py.derive_credentials(client.token)
    tsm = gateway.time_mac(gateway.HawkKey(bytes(32)), 1)
    assert not client.set_clock(credentials, f'Hawk ts="1", tsm="{tsm}"')
    assert client.skew_s == 0


@pytest.mark.parametrize("how", TAMPERED)
def test_a_tampered_answer_is_refused_in_python(world: World, how: str) -> None:
    client = client_py.Client(world.url)
    client.register()
    assert "next" in client.call("GET", "/session")
    path = "/session?" + how.replace(" ", "%20")
    if how == "200":  # the status is not signed; the body of an error is
        path = "/certificate/sign?200"
        assert refusal(client, "POST", path, {"publicKey": {}}).errno == 104
    else:
        with pytest.raises(ValueError, match="not signed by the gateway"):
            client.call("GET", path)


def test_the_header_for_curl(world: World) -> None:
    """As the page says, by curl itself."""
    client = client_py.Client(world.url)
    client.register()
    url, body = f"{world.url}/sms/verify", json.dumps({"msisdn": NUMBER})
    made = subprocess.run(
        [sys.executable, str(ROOT / "notebooks" / "client.py"), client.token, "POST", url, body],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    kind = ["-H", "Content-Type: application/json"]
    command = ["curl", "-s", "-H", made.stdout.strip(), *kind, "-d", body, url]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["mtSender"] == "Gateway"


# -- The pages -----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["walk.mjs", "walk.py"])
def test_the_whole_flow_of_the_page(
    start_gateway: Callable[..., GatewayProcess], name: str
) -> None:
    """As the page says: in a folder with ``keys/``, and with nothing else set."""
    runner = shutil.which("node") if name.endswith("mjs") else sys.executable
    if not runner:
        pytest.skip("not installed: Node 18 or newer")
    process = start_gateway()
    done = subprocess.run(
        [runner, str(ROOT / "notebooks" / name)], cwd=process.folder, timeout=60,
        env={**os.environ, "GATEWAY": process.url}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"verified: {NUMBER}\nproved:   {NUMBER}\n"


def snippets(page: str, language: str) -> list[str]:
    """The listings in a language that stand on a page itself."""
    text = (ROOT / "notebooks" / "integrate" / page).read_text("utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def test_the_lines_that_rewrite_keys() -> None:
    """Six in JavaScript, six in Python."""
    numbers = ec.generate_private_key(ec.SECP256R1()).private_numbers().private_value, 65537, 255
    words = [
        (str(n), client_py.b64url(n.to_bytes(-(-n.bit_length() // 8), "big"))) for n in numbers
    ]
    (python,) = snippets("proofs.md", "python")
    names: dict[str, Any] = {}
    exec(python, names)
    assert [(names["to_decimal"](b), names["to_jwk"](a)) for a, b in words] == words
    assert len([line for line in python.splitlines() if line]) == 6
    if shutil.which("node"):
        (javascript,) = snippets("proofs.md", "javascript")
        assert len(javascript.splitlines()) == 6
        calls = ", ".join(f"[toDecimal('{b}'), toJwk('{a}')]" for a, b in words)
        script = f"{javascript}console.log(JSON.stringify([{calls}]))"
        done = subprocess.run(["node", "-e", script], capture_output=True, text=True, check=True)
        assert json.loads(done.stdout) == [[*pair] for pair in words]


def test_curl_as_the_page_says(world: World) -> None:
    client = client_py.Client(world.url)
    client.register()
    (script,) = snippets("hawk.md", "bash")
    folder = Path(sys.executable).parent
    done = subprocess.run(
        ["bash", "-ec", script.replace("http://127.0.0.1:5000", world.url)],
        capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "TOKEN": client.token},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    sent, stands = done.stdout.replace("}{", "}\n{").splitlines()
    assert json.loads(sent)["mtSender"] == "Gateway"
    assert json.loads(stands)["next"]["sendsLeft"] == 4


def test_the_hawk_page_tells_the_steps_that_the_vectors_follow() -> None:
    """Its nine lines, and its hash of nothing."""
    text = (ROOT / "notebooks" / "integrate" / "hawk.md").read_text("utf-8")
    lines = ["hawk.1.payload", "application/json", '{"msisdn": "+447700900123"}']
    assert "```\n" + "\n".join(lines) + "\n```" in text
    hash = client_py.payload_hash("application/json", lines[2].encode())
    vectors = json.loads((ROOT / "notebooks" / "vectors.json").read_text("utf-8"))
    first, answer = vectors["request"]["vectors"][0], vectors["answer"]["vectors"][0]
    assert first["normalized"].split("\n")[7] == hash
    assert len(first["normalized"].split("\n")) == len(answer["normalized"].split("\n")) == 10
    assert vectors["payload"]["vectors"][1]["hash"] == client_py.payload_hash("", b"")


def test_the_table_by_hand_has_each_errno() -> None:
    errors = (ROOT / "notebooks" / "integrate" / "errors.md").read_text("utf-8")
    rows = re.findall(r"^\| (\d{3}) \|", errors, re.M)
    assert rows == [str(int(number)) for number in gateway.Errno]
