"""Session credentials: HKDF, what is derived from token and master secret, files that hold keys."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import hmac
import os
import re
import resource
import secrets
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.crc import key_slot

import gateway
from gateway import HawkId, Secrets, SessionToken, Settings, StartError

QUICK = settings(max_examples=100, database=None, deadline=None, derandomize=True)
TOKEN = bytes(range(0xA0, 0xC0))


def rfc5869(ikm: bytes, salt: bytes, info: bytes, length: int) -> bytes:
    """HKDF-SHA256 written down from the RFC, with nothing but HMAC."""
    prk = hmac.digest(salt or bytes(32), ikm, "sha256")
    output, block = b"", b""
    for counter in range(1, 9):
        block = hmac.digest(prk, block + info + bytes([counter]), "sha256")
        output += block
    return output[:length]


# -- Token, id and key --------------------------------------------------------


def test_vector_of_the_contract() -> None:
    hawk_id, hawk_key = gateway.derive_credentials(SessionToken(TOKEN))
    assert hawk_id == "c0a29dcf46174973da1378696e4c82ae10f723cf4f4d9f75e39f4ae3851595ab"
    key = "9d8f22998ee7f5798b887042466b72d53e56ab0c094388bf65831f702d2febc0"
    assert hawk_key.hex() == key


@QUICK
@given(st.binary(min_size=32, max_size=32))
def test_credentials_by_the_rfc(token: bytes) -> None:
    material = rfc5869(token, b"", b"identity.mozilla.com/picl/v1/sessionToken", 64)
    hawk_id, hawk_key = gateway.derive_credentials(SessionToken(token))
    assert (hawk_id, hawk_key) == (material[:32].hex(), material[32:])
    assert re.fullmatch("[0-9a-f]{64}", hawk_id)


@pytest.mark.parametrize("bit", [0, 1, 100, 255])
def test_another_token_shares_nothing(bit: int) -> None:
    other = (int.from_bytes(TOKEN, "big") ^ 1 << bit).to_bytes(32, "big")
    ours = gateway.derive_credentials(SessionToken(TOKEN))
    theirs = gateway.derive_credentials(SessionToken(other))
    assert ours.hawk_id != theirs.hawk_id
    assert ours.hawk_key != theirs.hawk_key


def test_key_cannot_be_told_from_the_id() -> None:
    """The id is public: the key must not begin with it, or be it hashed."""
    hawk_id, hawk_key = gateway.derive_credentials(SessionToken(TOKEN))
    raw = bytes.fromhex(hawk_id)
    assert hawk_key not in (raw, hashlib.sha256(raw).digest(), rfc5869(raw, b"", b"", 32))
    assert TOKEN not in (raw, hawk_key)


def test_token_is_32_bytes_from_the_source() -> None:
    asked: list[int] = []

    def source(n: int) -> bytes:
        asked.append(n)
        return bytes(range(n))

    assert gateway.new_session_token(source) == bytes(range(32))
    assert asked == [32]
    assert len({gateway.new_session_token(secrets.token_bytes) for _ in range(100)}) == 100


# -- HKDF ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ikm", "salt", "info", "okm"),
    [
        (  # A.1
            "0b" * 22,
            bytes(range(13)),
            bytes(range(0xF0, 0xFA)),
            "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
        ),
        (  # A.2: longer than one block of everything
            bytes(range(0x50)).hex(),
            bytes(range(0x60, 0xB0)),
            bytes(range(0xB0, 0x100)),
            "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c"
            "59045a99cac7827271cb41c65e590e09da3275600c2f09b8367793a9aca3db71"
            "cc30c58179ec3e87c14c01d5c1f3434f1d87",
        ),
        (  # A.3: neither salt nor info
            "0b" * 22,
            b"",
            b"",
            "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8",
        ),
    ],
)
def test_vector_of_rfc_5869(ikm: str, salt: bytes, info: bytes, okm: str) -> None:
    expected = bytes.fromhex(okm)
    assert gateway.hkdf(bytes.fromhex(ikm), info, len(expected), salt) == expected
    assert rfc5869(bytes.fromhex(ikm), salt, info, len(expected)) == expected  # our own oracle


def test_no_salt_is_the_empty_salt() -> None:
    ikm = bytes.fromhex("0b" * 22)
    assert (
        gateway.hkdf(ikm, b"x") == gateway.hkdf(ikm, b"x", salt=b"") == rfc5869(ikm, b"", b"x", 32)
    )


# -- Secrets of the server ----------------------------------------------------


def test_eight_secrets_are_unrelated() -> None:
    """A label that is used twice, or a secret that is the master itself, shows here."""
    master = bytes(range(32))
    found = Secrets.derive(master)
    assert len(found) == len(set(found)) == 8
    assert all(len(secret) == 32 for secret in found)
    assert master not in found
    assert not set(found) & set(Secrets.derive(bytes(31) + b"\1"))
    assert found == Secrets.derive(master)


def test_secrets_are_told_apart_by_their_label_alone() -> None:
    """HKDF of the master secret by label, as DESIGN 4.5 says: recomputed from the RFC."""
    master = b"m" * 32
    for name, secret in Secrets.derive(master)._asdict().items():
        assert secret == rfc5869(master, b"", f"msisdn-gateway/v1/{name}".encode(), 32)


def test_storage_id_is_keyed() -> None:
    """16 bytes that nobody computes from a Hawk id without the master secret."""
    hawk_id = HawkId("c0" * 32)
    ours, theirs = Secrets.derive(b"a" * 32), Secrets.derive(b"b" * 32)
    assert len(ours.id_for(hawk_id)) == 16
    assert ours.id_for(hawk_id) == ours.id_for(hawk_id)
    assert ours.id_for(hawk_id) != theirs.id_for(hawk_id)
    assert ours.id_for(hawk_id) != ours.id_for(HawkId("c0" * 31 + "c1"))
    raw = bytes.fromhex(hawk_id)
    assert ours.id_for(hawk_id) not in (raw[:16], hashlib.sha256(raw).digest()[:16])


@pytest.mark.slow
def test_record_and_nonce_share_a_slot_for_100_000_ids() -> None:
    """Redis Cluster hashes what stands in the first braces; raw bytes may hold braces too."""
    keys, tested = Secrets.derive(b"m" * 32), 0
    for number in range(100_000):
        storage_id = keys.id_for(HawkId(f"{number:064x}"))
        assert not set(storage_id) & set(b"{}")
        nonce_key = b"{" + storage_id + b"}" + b"}{" + storage_id[:10]  # any 12 bytes
        assert key_slot(nonce_key) == key_slot(storage_id)
        tested += 1
    assert tested == 100_000


def test_ids_stay_distinct_without_braces() -> None:
    keys = Secrets.derive(b"m" * 32)
    assert len({keys.id_for(HawkId(f"{number:064x}")) for number in range(20_000)}) == 20_000


def test_slot_check_can_fail() -> None:
    """With a brace in an id the two keys do part: the test above is not idle."""
    apart = [b"ab}" + b"c" * 13, b"x{y}" + b"z" * 12, b"}" + b"d" * 15]
    assert [i for i in apart if key_slot(b"{" + i + b"}" + bytes(12)) != key_slot(i)] == apart


def test_keys_that_storage_writes_share_a_slot(storage: gateway.Storage) -> None:
    """What really stands in the store after a commit, for 200 sessions."""
    keys = Secrets.derive(b"m" * 32)
    for number in range(200):
        storage._run("FLUSHALL")
        storage_id = keys.id_for(HawkId(f"{number:064x}"))
        storage.create(storage_id, b"old", 60)
        done = storage.commit(storage_id, b"old", b"new", nonce=str(number), nonce_ttl_s=60)
        assert done is gateway.Commit.DONE
        found = storage._run("KEYS", "*")
        assert len(found) == 2
        assert len({key_slot(key) for key in found}) == 1


# -- The Hawk key at rest -----------------------------------------------------

bytes_32 = st.binary(min_size=32, max_size=32)


@QUICK
@given(bytes_32, bytes_32, bytes_32)
def test_masked_key_comes_back(secret: bytes, id_bytes: bytes, key: bytes) -> None:
    """32 bytes, also when they begin with zeros; and every other key looks otherwise."""
    hawk_id = HawkId(id_bytes.hex())
    masked = gateway.mask_hawk_key(secret, hawk_id, key)
    assert len(masked) == 32
    assert gateway.mask_hawk_key(secret, hawk_id, masked) == key
    assert gateway.mask_hawk_key(secret, hawk_id, bytes(32)) == hmac.digest(
        secret, id_bytes, "sha256"
    )
    other = bytes([key[0] ^ 1]) + key[1:]
    assert gateway.mask_hawk_key(secret, hawk_id, other) != masked


def test_mask_is_bound_to_secret_and_id() -> None:
    """Who has the store and our secrets still lacks the id; who has the id lacks the secret."""
    hawk_id, key = gateway.derive_credentials(SessionToken(TOKEN))
    masks = []
    for master in (b"a" * 32, b"b" * 32):
        for one in (hawk_id, HawkId("0" + hawk_id[1:]), HawkId(hawk_id[:-1] + "0")):
            masks.append(gateway.mask_hawk_key(Secrets.derive(master).mask, one, key))
    assert len({*masks, bytes(key), bytes.fromhex(hawk_id)}) == 8
    for masked in masks[1:]:
        assert gateway.mask_hawk_key(Secrets.derive(b"a" * 32).mask, hawk_id, masked) != key


def test_masks_of_sessions_share_nothing() -> None:
    """One key for all of them: no two masked ones tell that, in no byte but by chance."""
    secret = Secrets.derive(b"m" * 32).mask
    masked = {gateway.mask_hawk_key(secret, HawkId(f"{n:064x}"), TOKEN) for n in range(1000)}
    assert len({m[:8] for m in masked}) == len({m[-8:] for m in masked}) == 1000


# -- Files that hold secrets --------------------------------------------------


def test_file_is_made_private_and_then_kept(tmp_path: Path) -> None:
    path = tmp_path / "new" / "keys" / "secret"
    umask = os.umask(0)  # the mode must not depend on it
    try:
        assert gateway.keep_private_file(path, lambda: b"one") == (b"one", True)
    finally:
        os.umask(umask)
    assert gateway.keep_private_file(path, lambda: b"two") == (b"one", False)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o077 == 0
    assert path.stat().st_nlink == 1
    assert [p.name for p in path.parent.iterdir()] == ["secret"]


def test_file_is_not_remade_while_it_is_kept(tmp_path: Path) -> None:
    def never() -> bytes:
        raise AssertionError("a key pair takes a second to make")

    path = tmp_path / "secret"
    path.touch(0o600)
    assert gateway.keep_private_file(path, never) == (b"", False)


def test_file_appears_whole(tmp_path: Path) -> None:
    """While it is being made it is not there under its name."""
    path = tmp_path / "secret"
    seen: list[bool] = []

    def make() -> bytes:
        seen.append(path.exists())
        return b"x" * 10_000

    gateway.keep_private_file(path, make)
    assert seen == [False]
    assert path.read_bytes() == b"x" * 10_000


def test_interrupt_while_making_leaves_nothing(tmp_path: Path) -> None:
    """Neither the file nor a draft of it: Ctrl-C while a DSA key is being made."""

    def fail() -> bytes:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gateway.keep_private_file(tmp_path / "secret", fail)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """A real failure to write: the process may write no file beyond one byte."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
    try:
        with pytest.raises(StartError, match="secret"):
            gateway.keep_private_file(tmp_path / "secret", lambda: b"hunter2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def refusing(number: int) -> Callable[..., None]:
    """A system call that a file system does not have."""

    def call(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_hard_links(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """ExFAT, SMB, gcsfuse, Android: no start was possible, and the message named no links."""
    path = tmp_path / "secret"
    monkeypatch.setattr(os, "link", refusing(number))
    assert gateway.keep_private_file(path, lambda: b"one") == (b"one", True)
    assert gateway.keep_private_file(path, lambda: b"two") == (b"one", False)
    assert path.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["secret"]
    assert "hard links" in caplog.text


def test_without_hard_links_another_start_may_be_faster_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "secret"

    def link(*_: Any) -> None:
        gateway.write_private_file(path, b"theirs")
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", link)
    assert gateway.keep_private_file(path, lambda: b"ours") == (b"theirs", False)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_that_cannot_sync(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "fsync", refusing(number))
    assert gateway.keep_private_file(tmp_path / "secret", lambda: b"one") == (b"one", True)
    assert "fsync" in caplog.text


def test_a_file_that_cannot_reach_the_disk_is_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", refusing(errno.EIO))
    with pytest.raises(StartError, match="secret"):
        gateway.keep_private_file(tmp_path / "secret", lambda: b"one")
    assert list(tmp_path.iterdir()) == []


def test_a_strict_umask_takes_no_right_of_ours(tmp_path: Path) -> None:
    before = os.umask(0o277)
    try:
        gateway.write_private_file(tmp_path / "secret", b"one")
    finally:
        os.umask(before)
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("mode", "group", "refused"),
    [(0o775, "ours", False), (0o777, "ours", True), (0o755, "another", False),
     (0o775, "another", True), (0o757, "another", True)],
)  # fmt: skip
def test_who_may_write_in_a_folder_of_keys(
    mode: int, group: str, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To list it or to look through it is not to write."""
    tmp_path.chmod(mode)
    its = tmp_path.stat().st_gid
    monkeypatch.setattr(os, "getegid", lambda: its if group == "ours" else its + 1)
    wanted = pytest.raises(StartError, match="chmod go-w it")
    with wanted if refused else contextlib.nullcontext():
        gateway.check_folder(tmp_path)


@pytest.mark.parametrize(("owner", "refused"), [(0, False), (1000, False), (1, True)])
def test_whose_a_folder_of_keys_may_be(
    owner: int, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root's or ours. Here we are user 1000."""
    found = tmp_path.stat()
    shown = os.stat_result((*found[:4], owner, *found[5:10]))
    monkeypatch.setattr(Path, "stat", lambda _: shown)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    wanted = pytest.raises(StartError, match="run this as its owner")
    with wanted if refused else contextlib.nullcontext():
        gateway.check_folder(tmp_path)


def test_the_disk_is_asked_for_all_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[bytes] = []
    path = tmp_path / "secret"
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(path.read_bytes()))
    gateway.write_private_file(path, b"all of it")
    assert synced == [b"all of it"]


@pytest.mark.parametrize("chmod", ["ignored", "refused"])
@pytest.mark.parametrize("shown", [0o777, 0o644, 0o604, 0o640])
def test_a_file_system_without_modes(
    chmod: str,
    shown: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Drvfs of WSL, vfat: the first start made the keys, and every later one was refused."""
    path, real = tmp_path / "secret", Path.stat

    def all_open(self: Path, **options: Any) -> os.stat_result:
        found = real(self, **options)
        return os.stat_result((found.st_mode & ~0o777 | shown, *found[1:]))

    monkeypatch.setattr(Path, "stat", all_open)
    if chmod == "refused":
        monkeypatch.setattr(os, "fchmod", refusing(errno.EPERM))
    for content in ((b"one", True), (b"one", False), (b"one", False)):
        caplog.clear()
        assert gateway.keep_private_file(path, lambda: b"one") == content
        assert "keeps no modes" in caplog.text
    assert [p.name for p in tmp_path.iterdir()] == ["secret"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610, 0o601, 0o644, 0o666])
def test_file_that_others_can_use_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"hunter2")
    path.chmod(mode)
    with pytest.raises(StartError, match=re.escape(str(path))) as refused:
        gateway.keep_private_file(path, lambda: b"new")
    assert "hunter2" not in str(refused.value)
    assert path.read_bytes() == b"hunter2"


@pytest.mark.parametrize("kind", ["folder", "dangling link", "below a file"])
def test_path_that_is_no_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "secret"
    if kind == "folder":
        path.mkdir(0o700)
    elif kind == "dangling link":
        path.symlink_to(tmp_path / "nowhere")
    else:
        path.write_bytes(b"x")
        path = path / "secret"
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StartError, match=re.escape(str(path))):
        gateway.keep_private_file(path, lambda: b"new")
    assert sorted(tmp_path.rglob("*")) == before


def test_racing_starts_make_one_file(tmp_path: Path) -> None:
    """All get the same content, one of them made it, and no draft is left; 20 times over."""
    threads = 8
    for round in range(20):
        path = tmp_path / str(round) / "secret"
        barrier, results = threading.Barrier(threads), list[tuple[bytes, bool]]()

        def start(
            path: Path, barrier: threading.Barrier, results: list[tuple[bytes, bool]]
        ) -> None:
            barrier.wait()
            results.append(gateway.keep_private_file(path, lambda: secrets.token_bytes(64)))

        racers = [
            threading.Thread(target=start, args=(path, barrier, results)) for _ in range(threads)
        ]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join()
        assert len(results) == threads
        assert sum(made for _, made in results) == 1
        assert {content for content, _ in results} == {path.read_bytes()}
        assert [p.name for p in path.parent.iterdir()] == ["secret"]


# -- The master secret --------------------------------------------------------


def settings_in(folder: Path, **values: str) -> Settings:
    """Settings whose folders lie below ``folder``."""
    return Settings(keys_dir=str(folder / "keys"), data_dir=str(folder / "data"), **values)  # type: ignore[arg-type]


@pytest.mark.parametrize("made", [True, False])
def test_keys_in_a_folder_of_somebody_else_are_a_plain_error(made: bool) -> None:
    """Made by root, and read by the service's own user: the likeliest mistake of all."""
    me = os.geteuid()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))  # tmp_path is root's
        folder.chmod(0o755)
        (folder / "data" / "appendonlydir").mkdir(parents=True)
        (folder / "keys").mkdir()
        stack.callback((folder / "keys").chmod, 0o700)
        if made:
            (folder / "keys" / "master.secret").write_text("ab" * 32)
        (folder / "keys").chmod(0 if made else 0o555)
        if me == 0:  # whom no mode keeps out
            stack.callback(os.seteuid, me)
            os.seteuid(65534)
        denied = rf"cannot read or make .*: Permission denied \(user {os.geteuid()} must own it"
        said = denied if made else "is missing, and nobody"
        with pytest.raises(gateway.StartError, match=said):
            gateway.load_master_secret(settings_in(folder))
        with pytest.raises(gateway.StartError, match=denied if made else "has no master.secret"):
            gateway._master_secret_of(settings_in(folder))  # of commands for a number
        assert gateway._expect_keys_of_store(settings_in(folder)) is made  # of a start
        with pytest.raises(gateway.StartError, match=denied):
            gateway.load_signing_key(settings_in(folder), "RS")


def test_master_secret_is_made_once(tmp_path: Path) -> None:
    secret, made = gateway.load_master_secret(settings_in(tmp_path))
    assert made
    assert len(secret) == 32
    path = tmp_path / "keys" / "master.secret"
    assert re.fullmatch(rb"[0-9a-f]{64}\n?", path.read_bytes())
    assert path.stat().st_mode & 0o777 == 0o600
    assert gateway.load_master_secret(settings_in(tmp_path)) == (secret, False)


def test_two_gateways_have_two_secrets(tmp_path: Path) -> None:
    first, _ = gateway.load_master_secret(settings_in(tmp_path / "a"))
    second, _ = gateway.load_master_secret(settings_in(tmp_path / "b"))
    assert first != second


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"c0ffee" * 5,  # half written
        b"c0ffee" * 10 + b"bee",
        b"c0ffee" * 10 + b"beef5",
        b"C0FFEE" * 10 + b"BEEF",  # not ours: we write lower case
        b"c0ffee" * 10 + b"beef\n\n",
        b" " + b"c0ffee" * 10 + b"beef",
        b"c0ffee" * 10 + b"beeg",
        b"c0ffee" * 10 + b"be\0f",
        bytes(range(32)),  # the bytes in place of their digits
        b"\xff" * 64,
        "٣".encode() * 32,
        b"-----BEGIN PRIVATE KEY-----\nc0ffee\n-----END PRIVATE KEY-----\n",
        b"[master]\nsecret = 1\n",
    ],
)
def test_foreign_master_secret_is_refused(tmp_path: Path, content: bytes) -> None:
    """The file is named, not quoted, and stays as it is."""
    path = tmp_path / "keys" / "master.secret"
    path.parent.mkdir(0o700)
    path.touch(0o600)
    path.write_bytes(content)
    with pytest.raises(StartError, match=re.escape(str(path))) as refused:
        gateway.load_master_secret(settings_in(tmp_path))
    assert "c0ffee" not in str(refused.value).lower()
    assert path.read_bytes() == content


def test_master_secret_of_a_back_up_is_taken(tmp_path: Path) -> None:
    """With or without the line's end, which editors add and remove."""
    path = tmp_path / "keys" / "master.secret"
    path.parent.mkdir(0o700)
    path.touch(0o600)
    for end in ("", "\n"):
        path.write_text("c0ffee" * 10 + "beef" + end)
        expected = bytes.fromhex("c0ffee" * 10 + "beef")
        assert gateway.load_master_secret(settings_in(tmp_path)) == (expected, False)


def test_lost_master_secret_is_not_replaced(tmp_path: Path) -> None:
    """The data of a real store is there, the secret is gone: a new one would open nothing."""
    folder = settings_in(tmp_path)
    secret, _ = gateway.load_master_secret(folder)
    gateway.EmbeddedStore(folder.data_dir).stop()
    path = tmp_path / "keys" / "master.secret"
    path.unlink()
    with pytest.raises(StartError, match=re.escape(str(path))):
        gateway.load_master_secret(folder)
    assert not path.exists()
    back = settings_in(tmp_path, master_secret=secret.hex())  # brought back by the environment
    assert gateway.load_master_secret(back) == (secret, False)


def test_master_secret_from_the_environment_makes_no_file(tmp_path: Path) -> None:
    values = settings_in(tmp_path, master_secret="ab" * 32)
    assert gateway.load_master_secret(values) == (b"\xab" * 32, False)
    assert not (tmp_path / "keys").exists()


# -- The operator's token -----------------------------------------------------


def test_operator_token_is_made_once(tmp_path: Path) -> None:
    """32 random bytes in letters that stand in a URL; nobody else can read it."""
    token = gateway.load_operator_token(settings_in(tmp_path))
    path = tmp_path / "keys" / "operator.token"
    assert re.fullmatch(r"[A-Za-z0-9_-]{43}", token)
    assert path.read_text() == token + "\n"
    assert path.stat().st_mode & 0o777 == 0o600
    assert gateway.load_operator_token(settings_in(tmp_path)) == token
    assert gateway.load_operator_token(settings_in(tmp_path / "other")) != token


def test_operator_token_is_nothing_of_the_master_secret(tmp_path: Path) -> None:
    """It is shown on the console: who sees it learns nothing else."""
    settings = settings_in(tmp_path, master_secret="ab" * 32)
    assert gateway.load_operator_token(settings) != gateway.load_operator_token(
        settings_in(tmp_path / "other", master_secret="ab" * 32)
    )


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"c0ffee", b"c0ffee" * 7, b"c0 ffee" * 7, b"\xff" * 43, b"c" * 43 + b"/"],
)
def test_damaged_operator_token_is_refused(tmp_path: Path, content: bytes) -> None:
    """Also one that is too short to be secret; the file is named, not quoted, and stays."""
    path = tmp_path / "keys" / "operator.token"
    path.parent.mkdir(0o700)
    path.touch(0o600)
    path.write_bytes(content)
    with pytest.raises(StartError, match=re.escape(str(path))) as refused:
        gateway.load_operator_token(settings_in(tmp_path))
    assert "c0" not in str(refused.value)
    assert path.read_bytes() == content


def test_operator_token_of_others_is_refused(tmp_path: Path) -> None:
    gateway.load_operator_token(settings_in(tmp_path))
    (tmp_path / "keys" / "operator.token").chmod(0o644)
    with pytest.raises(StartError, match=r"operator\.token"):
        gateway.load_operator_token(settings_in(tmp_path))
