"""Keys that change: rotation, a leak, several machines, and what the store knows of them."""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import os
import re
import secrets
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lab
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from servers import wait_for
from support import NUMBER, Clock, GatewayProcess, WsgiClient
from test_proofs import part, public

import gateway

ROOT = Path(__file__).resolve().parent.parent
Make = Callable[..., WsgiClient]
Start = Callable[..., GatewayProcess]
OVERLAP_S = 600


@pytest.fixture
def folder(tmp_path: Path, keys_dir: str) -> Path:
    """A keys folder of this test alone, without proof keys."""
    path = tmp_path / "own-keys"
    path.mkdir(mode=0o700)
    for name in ("browserid.pem", "master.secret"):
        shutil.copy(Path(keys_dir, name), path)
    return path


def settings_for(folder: Path, **more: Any) -> gateway.Settings:
    return gateway.Settings(keys_dir=str(folder), data_dir=str(folder / "data"), **more)


def names(folder: Path) -> list[str]:
    """The proof keys in a folder, and any draft that was left."""
    return sorted(p.name for p in folder.iterdir() if "proof" in p.name)


def kids(client: WsgiClient) -> list[str]:
    return [key["kid"] for key in client.get("/.well-known/jwks.json").json["keys"]]


def signed(client: WsgiClient) -> str:
    return str(client.call("/certificate/sign", {"publicKey": public("EC")}).json["cert"])


def kid_of(client: WsgiClient) -> str:
    return str(part(signed(client), 0)["kid"])


def rotate(folder: Path, *options: str) -> None:
    assert gateway.main(["rotate-keys", "--keys-dir", str(folder), *options]) == 0


# -- The files ------------------------------------------------------------------


def test_a_first_start_makes_one_key_and_keeps_it(folder: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: gateway.load_keys(settings_for(folder))[0], range(8)))
    assert len({keys.fingerprint for keys in found}) == 1
    assert names(folder) == ["proof-0.pem"]
    assert stat.S_IMODE((folder / "proof-0.pem").stat().st_mode) == 0o600


def test_every_version_finds_the_same_fingerprint(folder: Path) -> None:
    """It lies in the store, where the next version compares it with its own."""
    keys = gateway.load_keys(settings_for(folder))[0]
    (kid,) = [key.jwk["kid"] for key in keys.published(time.time())]
    named = json.dumps({"browserid": keys.browserid_json, "kids": [kid]}, separators=(",", ":"))
    assert keys.fingerprint.decode() == f"0 {hashlib.sha256(named.encode()).hexdigest()}"


@pytest.mark.parametrize("damage", ["empty", "half", "another curve", "RSA", "public", "readable"])
def test_a_damaged_key_stops_the_start_and_is_kept(
    folder: Path, keys_dir: str, damage: str
) -> None:
    gateway.load_keys(settings_for(folder))
    path, pkcs8 = folder / "proof-0.pem", serialization.PrivateFormat.PKCS8
    pem, none = serialization.Encoding.PEM, serialization.NoEncryption()
    other, content = ec.generate_private_key(ec.SECP384R1()), path.read_bytes()
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    content = {
        "empty": b"",
        "half": content[: len(content) // 2],
        "another curve": other.private_bytes(pem, pkcs8, none),
        "RSA": Path(keys_dir, "browserid.pem").read_bytes(),
        "public": other.public_key().public_bytes(pem, spki),
        "readable": content,
    }[damage]
    path.write_bytes(content)
    path.chmod(0o644 if damage == "readable" else 0o600)
    with pytest.raises(gateway.StartError) as caught:
        gateway.load_keys(settings_for(folder))
    assert str(path) in str(caught.value)
    assert path.read_bytes() == content
    if damage != "readable":
        assert "rotate-keys" in str(caught.value)


def test_foreign_files_are_no_keys(folder: Path) -> None:
    gateway.load_keys(settings_for(folder))
    for name in ("proof-x.pem", "proof-1.pem.old", "proof-.pem", ".proof-5.pem.ab", "proof-1.txt"):
        (folder / name).write_text("x")
    assert list(gateway.load_keys(settings_for(folder))[0].files.proofs) == [0]


# -- Rotation ---------------------------------------------------------------------


def test_a_rotation_from_before_it_to_its_end(folder: Path, make_client: Make) -> None:
    """Shown at once; signs after the overlap; the old one is shown while its proofs may live."""
    clock = Clock(int(time.time()))
    client = make_client(keys_dir=str(folder), clock=clock, certificate_max_s=7200).verified()
    (old,) = kids(client)
    rotate(folder)
    assert kids(client) == [old]  # it was looked at just now
    clock.now_s += OVERLAP_S / 10 + 1
    new, second = kids(client)
    assert second == old
    assert kid_of(client) == old
    began_s = int(time.time())
    (from_s,) = (int(name[6:-4]) for name in names(folder) if name != "proof-0.pem")
    assert abs(from_s - began_s - OVERLAP_S) < 60
    clock.now_s = from_s - 1
    last = signed(client)
    assert part(last, 0)["kid"] == old
    clock.now_s = from_s
    assert kid_of(client) == new
    clock.now_s = from_s + 7200 + gateway.PROOF_SKEW_S - 1
    assert kids(client) == [new, old]
    clock.now_s += 1
    assert kids(client) == [new]
    assert kid_of(client) == new


def test_a_rotation_removes_what_nobody_needs(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Keys whose proofs are dead, and no others."""
    now_s = int(time.time())
    gateway.load_keys(settings_for(folder))
    for from_s in (now_s - 200_000, now_s - 100_000, now_s - 1000):
        gateway.add_proof_key(settings_for(folder), from_s)
    before = set(names(folder))
    rotate(folder)
    gone, made = before - set(names(folder)), set(names(folder)) - before
    # What followed proof-0 and the next one began to sign more than a day ago.
    assert gone == {"proof-0.pem", f"proof-{now_s - 200_000}.pem"}
    assert len(made) == 1
    assert next(iter(made)) in capsys.readouterr().err


def test_a_rotation_tells_when_the_key_signs(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also after one by a machine whose clock was wrong by years; --leaked is the way out."""
    now_s = int(time.time())
    rotate(folder)
    assert "it signs in 600 s" in capsys.readouterr().err
    gateway.add_proof_key(settings_for(folder), now_s + 10**8)
    rotate(folder)
    (told,) = re.findall(r"it signs in (\d+) s", capsys.readouterr().err)
    assert abs(int(told) - 10**8) < 60
    rotate(folder, "--leaked")
    keys = gateway.load_keys(settings_for(folder))[0]
    assert [keys.signer(now_s)] == keys.published(now_s)


@pytest.mark.slow
def test_rotations_at_the_same_moment(folder: Path, make_client: Make) -> None:
    """Several people have the same thought: each key has its time, and nothing is lost."""
    clock = Clock(int(time.time()))
    client = make_client(keys_dir=str(folder), clock=clock).verified()
    command = [sys.executable, str(ROOT / "gateway.py"), "rotate-keys", "--keys-dir", str(folder)]
    running = [subprocess.Popen(command, stderr=subprocess.DEVNULL) for _ in range(4)]
    assert [one.wait(60) for one in running] == [0] * 4
    clock.now_s += 61
    shown = kids(client)
    assert 2 <= len(shown) == len(names(folder)) <= 5
    clock.now_s += OVERLAP_S + 60
    assert kid_of(client) == shown[0]


@pytest.mark.parametrize("trouble", ["gone", "empty", "damaged", "readable by others"])
def test_a_running_gateway_keeps_its_keys(
    folder: Path, make_client: Make, trouble: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever happens to the folder, and it recovers when the folder does."""
    clock = Clock(int(time.time()))
    client = make_client(keys_dir=str(folder), clock=clock).verified()
    old = kid_of(client)
    path, content = folder / "proof-0.pem", (folder / "proof-0.pem").read_bytes()
    if trouble == "gone":
        folder.rename(folder.with_name("away"))
    elif trouble == "empty":
        path.unlink()
    elif trouble == "damaged":
        path.write_bytes(content[:50])
    else:
        path.chmod(0o644)
    clock.now_s += 61
    with caplog.at_level(logging.WARNING, "gateway"):
        assert kid_of(client) == old
    (told,) = caplog.records
    assert told.levelname == "ERROR"
    assert "the proof keys of before stay in use" in told.getMessage()
    assert str(folder if trouble in ("gone", "empty") else path) in told.getMessage()
    assert content.decode()[:60] not in caplog.text
    assert kids(client) == [old]
    if trouble == "gone":
        assert not folder.exists()  # a running gateway makes none
        folder.with_name("away").rename(folder)
    path.touch(0o600)
    path.write_bytes(content)
    path.chmod(0o600)
    rotate(folder)
    clock.now_s += 61
    assert len(kids(client)) == 2


def test_a_clock_that_was_set_back_is_no_trouble(folder: Path, make_client: Make) -> None:
    """All keys lie in the future then: the first one signs, and changes are seen."""
    clock = Clock(int(time.time()))
    client = make_client(keys_dir=str(folder), clock=clock).verified()
    rotate(folder, "--leaked")
    clock.now_s -= 50_000
    (shown,) = kids(client)
    key = gateway.load_keys(settings_for(folder))[0].signer(time.time())
    assert shown == key.jwk["kid"]


@pytest.mark.slow
def test_an_interrupted_rotation_leaves_usable_keys(folder: Path) -> None:
    """kill -9 at many moments: the keys load, no half file counts, and the next one works."""
    settings = settings_for(folder)
    first = gateway.load_keys(settings)[0].published(time.time())[-1].jwk
    code = "import gateway, sys; sys.exit(gateway.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "rotate-keys", "--keys-dir", str(folder)]
    for n in range(8):
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        time.sleep(0.25 + n * 0.05)
        process.kill()
        process.wait()
        keys = gateway.load_keys(settings)[0]
        assert keys.published(time.time())[-1].jwk == first
        assert keys.signer(time.time()).jwk == first
    rotate(folder)
    assert len(gateway.load_keys(settings)[0].published(time.time())) >= 2


@pytest.mark.parametrize("step", ["link", "unlink"])
def test_a_crash_between_two_steps_of_a_rotation(
    folder: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """After a leak: before the new key is there, and before the leaked one is gone."""
    gateway.load_keys(settings_for(folder))

    class Killed(BaseException):
        pass

    def die(*_: Any, **__: Any) -> None:
        raise Killed

    monkeypatch.setattr(os, "link", die) if step == "link" else monkeypatch.setattr(
        Path, "unlink", die
    )
    with pytest.raises(Killed):
        rotate(folder, "--leaked")
    monkeypatch.undo()
    now_s = time.time()
    keys = gateway.load_keys(settings_for(folder))[0]
    assert keys.signer(now_s).from_s == (0 if step == "link" else max(keys.files.proofs))
    rotate(folder, "--leaked")
    assert len(gateway.load_keys(settings_for(folder))[0].published(now_s)) == 1


# -- A leak ---------------------------------------------------------------------------


def test_a_leak_step_by_step(start_gateway: Start, store: gateway.EmbeddedStore) -> None:
    """The steps of the Operate page "Keys", on two machines with copied folders."""
    gateway.Storage(store.url)._run("FLUSHALL")
    options = ("--storage-url", store.url, "--jwks-overlap-s", "10")
    one = start_gateway(*options)
    client = one.client()
    client.register()
    client.verify(NUMBER)
    reply = client.verify_code(lab.Handset(client, NUMBER).code(), publicKey=public("EC"))
    leaked = reply.body["cert"].rstrip("~")
    keys = one.folder / "keys"
    stolen = (keys / "proof-0.pem").read_bytes()

    def jwks() -> Any:
        return client.call("GET", "/.well-known/jwks.json").body

    assert gateway.verify_proof(leaked, jwks(), one.url, time.time())
    other = keys.with_name("other-keys")
    shutil.copytree(keys, other)
    # 1. rotate-keys --leaked, on one machine
    command = [sys.executable, str(ROOT / "gateway.py"), "rotate-keys", "--leaked"]
    command += ["--keys-dir", str(keys), "--storage-url", store.url]
    assert subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0
    assert stolen not in [path.read_bytes() for path in keys.iterdir()]
    # 2. within a minute (here a second) running gateways show and use the new key alone
    time.sleep(1.2)
    with pytest.raises(gateway.InvalidToken, match="names no key"):
        gateway.verify_proof(leaked, jwks(), one.url, time.time())
    reply = client.call("POST", "/certificate/sign", {"publicKey": public("EC")})
    fresh = reply.body["cert"].rstrip("~")
    assert gateway.verify_proof(fresh, jwks(), one.url, time.time())
    # 3. another machine: with the keys of before it does not start, nor with a mixture
    for copy in (False, True):
        if copy:
            shutil.copytree(keys, other, dirs_exist_ok=True)  # without --delete
        process = start_gateway(*options, "--keys-dir", str(other), wait=False)
        assert process.process.wait(20) == 1
        assert "rsync -a --delete" in process.output
    # 4. with a true copy it does
    shutil.rmtree(other)
    shutil.copytree(keys, other)
    two = start_gateway(*options, "--keys-dir", str(other))
    assert two.stop() == 0


def test_a_machine_that_goes_on_with_a_leaked_key_says_so(
    start_gateway: Start, store: gateway.EmbeddedStore
) -> None:
    """Once a minute (here a second), until the folder is copied; the machine that rotated not."""
    gateway.Storage(store.url)._run("FLUSHALL")
    options = ("--storage-url", store.url, "--jwks-overlap-s", "10")
    one = start_gateway(*options)
    keys = one.folder / "keys"
    other = keys.with_name("other-keys")
    shutil.copytree(keys, other)
    two = start_gateway(*options, "--keys-dir", str(other))
    time.sleep(1.5)  # each has looked: both are right
    assert "ERROR" not in one.output + two.output
    rotate(keys, "--leaked", "--storage-url", store.url)
    error = f"ERROR gateway: keys_dir {other}: the store belongs to a gateway with"
    wait_for(lambda: error in two.output, "the ERROR")
    assert "rsync -a --delete" in two.output
    shutil.rmtree(other)
    shutil.copytree(keys, other)
    time.sleep(1.5)  # it may have been looking while it was copied
    before = two.output.count("ERROR")
    time.sleep(2.5)
    assert two.output.count("ERROR") == before
    assert "ERROR" not in one.output
    for name in names(other):
        (other / name).unlink()
    wait_for(lambda: f"finds none in {other}" in two.output, "another ERROR")


def test_a_rotation_in_the_same_folder_is_no_error(
    folder: Path, store: gateway.EmbeddedStore, storage: gateway.Storage,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Under another WSGI server the application looks at the same object of keys, and has just."""
    settings = settings_for(folder, storage_url=store.url)
    keys = gateway.load_keys(settings)[0]
    check(storage, folder)
    keys.published(time.time())
    rotate(folder, "--storage-url", store.url)
    assert gateway.load_keys(settings)[0].fingerprint != keys.fingerprint
    minutes = iter([None])
    monkeypatch.setattr(time, "sleep", lambda _: next(minutes))
    with pytest.raises(StopIteration):
        gateway.watch_keys(settings, store.url, keys)
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


# -- What the store knows --------------------------------------------------------------


def check(storage: gateway.Storage, folder: Path) -> None:
    """What the start of a gateway with this folder does."""
    master = gateway.load_master_secret(settings_for(folder))[0]
    storage.check(master, gateway.load_keys(settings_for(folder))[0].fingerprint)


def test_the_store_knows_whose_it_is(storage: gateway.Storage, folder: Path) -> None:
    """The same keys and newer ones; not older ones, nor others, each with the remedy."""
    check(storage, folder)
    check(storage, folder)
    before = folder.with_name("before")
    shutil.copytree(folder, before)
    rotate(folder)
    check(storage, before)  # nobody has started with the new one yet
    check(storage, folder)
    with pytest.raises(gateway.StartError, match="copy its whole keys_dir"):
        check(storage, before)
    other = folder.with_name("other")
    for name in ("browserid.pem", "proof-0.pem"):
        shutil.copytree(folder, other)
        (other / name).unlink()
        if name == "browserid.pem":
            gateway.load_signing_key(settings_for(other))
        else:
            gateway.add_proof_key(settings_for(other), 0)
        with pytest.raises(gateway.StartError, match="other or newer signing keys"):
            check(storage, other)
        shutil.rmtree(other)
    storage._run("DEL", "keys", key=b"keys")  # as the message says
    check(storage, before)


def test_a_rotation_says_who_needs_the_new_folder(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rotate(folder)
    assert (
        "it signs in 600 s; by then other machines need a copy of the whole folder"
        in capsys.readouterr().err
    )
    rotate(folder, "--leaked")
    told = capsys.readouterr().err
    assert "it signs at once, and all others are removed; now other machines need a copy" in told


def test_who_rotates_an_older_copy_is_refused(
    storage: gateway.Storage, store: gateway.EmbeddedStore, folder: Path
) -> None:
    """Two machines that went different ways would not believe each other's proofs."""
    check(storage, folder)
    before = folder.with_name("before")
    shutil.copytree(folder, before)
    rotate(folder, "--storage-url", store.url)
    with pytest.raises(gateway.StartError, match="newer"):
        check(storage, before)  # the rotation told the store
    was = names(before)
    assert gateway.main(
        ["rotate-keys", "--keys-dir", str(before), "--storage-url", store.url]
    ) == 1  # fmt: skip
    assert names(before) == was
    check(storage, folder)


def test_a_fork_ends_with_the_newest(storage: gateway.Storage, folder: Path) -> None:
    """Both rotated where no store was to be asked: one of them is refused, and always the same."""
    check(storage, folder)
    other = folder.with_name("other")
    shutil.copytree(folder, other)
    rotate(folder)
    newest = max(gateway.load_keys(settings_for(folder))[0].files.proofs)
    gateway.add_proof_key(settings_for(other), newest + 5)
    check(storage, folder)
    check(storage, other)
    for _ in range(2):
        with pytest.raises(gateway.StartError):
            check(storage, folder)
        check(storage, other)


def test_starts_at_once_agree(storage: gateway.Storage, folder: Path) -> None:
    """Of two foreign gateways that start on a new store, one wins and the other is refused."""
    other = folder.with_name("other")
    shutil.copytree(folder, other)

    def start(place: Path) -> bool:
        try:
            check(storage, place)
            return True
        except gateway.StartError:
            return False

    for place in (folder, other):
        gateway.load_keys(settings_for(place))
    for _ in range(5):
        storage._run("FLUSHALL")
        with ThreadPoolExecutor(2) as pool:
            assert sorted(pool.map(start, (folder, other))) == [False, True]


def test_a_full_store_still_knows_a_rotation(storage: gateway.Storage, folder: Path) -> None:
    check(storage, folder)
    rotate(folder)
    storage._run("CONFIG", "SET", "maxmemory", "1mb")
    try:
        with pytest.raises(gateway.Unavailable):
            storage.create(gateway.StorageId(b"k" * 16), b"x", 5)
        check(storage, folder)
        assert storage._run("GET", "keys", key=b"keys") == (
            gateway.load_keys(settings_for(folder))[0].fingerprint
        )
    finally:
        storage._run("CONFIG", "SET", "maxmemory", "0")


@pytest.mark.parametrize("name", ["browserid.pem", "proof-0.pem"])
def test_a_second_machine_with_keys_of_its_own_does_not_start(
    start_gateway: Start, store: gateway.EmbeddedStore, name: str, tmp_path: Path
) -> None:
    """The likely mistake: the master secret comes from the environment, the rest is made anew."""
    gateway.Storage(store.url)._run("FLUSHALL")
    env = {"GATEWAY_MASTER_SECRET": "5a" * 32, "GATEWAY_STORAGE_URL": store.url}
    one = start_gateway(env=env)
    other = tmp_path / "other"
    shutil.copytree(one.folder / "keys", other)
    same = start_gateway("--keys-dir", str(other), env=env)
    assert same.stop() == 0
    (other / name).unlink()
    process = start_gateway("--keys-dir", str(other), env=env, wait=False)
    assert process.process.wait(20) == 1
    assert "other or newer signing keys" in process.output
    assert "copy its whole keys_dir" in process.output
    assert "Traceback" not in process.output


# -- Under load ----------------------------------------------------------------------------


def test_rotation_under_load(start_gateway: Start, store: gateway.EmbeddedStore) -> None:
    """Two gateways of two workers on one keys folder: proofs without end while the key changes.

    Each verifies with what ``jwks.json`` said as long before as its max-age allows (here 3 s of an
    overlap of 6, as 300 of 600).
    """
    gateway.Storage(store.url)._run("FLUSHALL")
    count, overlap_s = int(os.environ.get("PROOFS", "1000")), 6  # by hand: 10,000
    env = {"GATEWAY_STORAGE_URL": store.url, "GATEWAY_JWKS_OVERLAP_S": str(overlap_s)}
    shared = ("--workers", "2", "--public-url", "http://localhost:5999")
    one = start_gateway(*shared, env=env)
    two = start_gateway(*shared, "--keys-dir", str(one.folder / "keys"), env=env)
    proofs: list[tuple[float, str]] = []
    documents: list[tuple[float, Any]] = []
    ports, done = (one.port, two.port), threading.Event()

    def ask(n: int, credentials: gateway.Credentials, path: str, body: bytes) -> Any:
        target = gateway.hawk_target("POST", "http://localhost:5999" + path)
        kind, ts, nonce = "application/json", int(time.time()), secrets.token_hex(6)
        sent = gateway.build_authorization(credentials, target, ts, nonce, kind, body)
        link = links[n % len(links)]
        link.request("POST", path, body, {"Authorization": sent, "Content-Type": kind})
        return json.loads(link.getresponse().read())

    # The kernel spreads connections over workers: of six to a gateway, hardly all reach one.
    links = [http.client.HTTPConnection("127.0.0.1", port, timeout=20) for port in 6 * ports]
    client = lab.Client(
        one.url, "http://localhost:5999", operator_token=one.client().operator_token
    )
    client.register()
    client.verify(NUMBER)
    assert client.verify_code(lab.Handset(client, NUMBER).code()).status == 200
    credentials = client.credentials
    assert credentials

    def read_documents() -> None:
        while not done.is_set():
            for port in ports:
                link = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
                link.request("GET", "/.well-known/jwks.json")
                documents.append((time.time(), json.loads(link.getresponse().read())))
                link.close()
            time.sleep(0.1)

    reader = threading.Thread(target=read_documents)
    reader.start()
    try:
        body = json.dumps({"publicKey": public("EC")}).encode()
        began_s, rotated_s = time.time(), 0.0
        while len(proofs) < count or not 0 < rotated_s < time.time() - 1.5 * overlap_s:
            if not rotated_s and time.time() > began_s + 1.2 * overlap_s / 2:
                rotate(one.folder / "keys", "--jwks-overlap-s", str(overlap_s))
                rotated_s = time.time()
            cert = ask(len(proofs), credentials, "/certificate/sign", body)["cert"]
            proofs.append((time.time(), cert.rstrip("~")))
            time.sleep(0.005)  # other tests run beside this one
    finally:
        done.set()
        reader.join()
        for link in links:
            link.close()
    by_kid: dict[str, int] = {}
    for at_s, proof in proofs:
        known = [jwks for read_s, jwks in documents if read_s <= at_s - overlap_s / 2]
        claims = gateway.verify_proof(
            proof, known[-1] if known else documents[0][1], "http://localhost:5999", at_s
        )
        assert claims["phone_number"] == NUMBER
        kid = part(proof, 0)["kid"]
        by_kid[kid] = by_kid.get(kid, 0) + 1
    assert len(by_kid) == 2
    assert min(by_kid.values()) > count / 50, by_kid
    assert len(proofs) >= count
