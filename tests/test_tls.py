"""The store over TLS, with an ACL user: Debian's redis-server, for the embedded one has no TLS."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
from collections.abc import Iterator
from pathlib import Path

import pytest
import servers
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from support import take
from test_stores import NEW, OLD, new_id

import gateway

collect = bool(servers.DEBIAN_REDIS)


def write_certificate(folder: Path, *names: str) -> str:
    """A key and a certificate that signs itself, for 127.0.0.1; gives the certificate's path.

    ``names`` are names of the host beside that address.
    """
    folder.mkdir()
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "store")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    host = x509.SubjectAlternativeName([address, *map(x509.DNSName, names)])
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1)
    builder = builder.not_valid_before(now - datetime.timedelta(days=1))
    builder = builder.not_valid_after(now + datetime.timedelta(days=1))
    builder = builder.add_extension(host, critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    signed = builder.sign(key, hashes.SHA256())
    (folder / "cert.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    pem = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (folder / "key.pem").write_bytes(key.private_bytes(*pem, serialization.NoEncryption()))
    return str(folder / "cert.pem")


@pytest.fixture
def tls(tmp_path: Path) -> Iterator[tuple[servers.Server, str, str]]:
    """A server, its address with user and password, and the path of its certificate."""
    certificate, port = write_certificate(tmp_path / "tls"), servers.free_port()
    options = ["--tls-port", str(port), "--tls-cert-file", certificate, "--tls-auth-clients", "no"]
    options += ["--tls-key-file", str(tmp_path / "tls" / "key.pem"), "--appendonly", "yes"]
    options += ["--appendfsync", "no"]  # so it writes before it answers, and kill -9 loses nothing
    options += ["--user", "gateway", "on", ">pass-word", "~*", "+@all"]
    server = servers.Server(tmp_path / "s", *options, binary=servers.DEBIAN_REDIS or "")
    with contextlib.closing(server):
        yield server, f"gateway:pass-word@127.0.0.1:{port}", certificate


if collect:

    def test_a_user_is_kept_over_tls(tls: tuple[servers.Server, str, str]) -> None:
        server, place, certificate = tls
        storage, key = gateway.Storage(f"rediss://{place}?ssl_ca_certs={certificate}"), new_id()
        assert storage.check() == []
        storage.create(key, OLD, 1000)
        assert storage.commit(key, OLD, NEW, 1000, "n", 60) is gateway.Commit.DONE
        assert storage.commit(key, NEW, NEW, -1, "n", 60) is gateway.Commit.REPLAYED
        server.kill()
        server.start()
        servers.wait_for(lambda: server.call("PING"), "its data")
        assert take(storage, 1.7e9, 1, b"name") == 0  # the stale connection was noticed here too
        assert storage.get(key) == NEW

    @pytest.mark.parametrize("options", ["", "?ssl_ca_certs={other}"])
    def test_refused_who_cannot_be_trusted(
        tls: tuple[servers.Server, str, str], tmp_path: Path, options: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.setattr(gateway, "STORE_START_S", 0.2)
        options = options.format(other=write_certificate(tmp_path / "other"))
        with pytest.raises(gateway.StartError, match="cannot be used") as caught:
            gateway.Storage(f"rediss://{tls[1]}{options}").check()
        assert "pass-word" not in str(caught.value)

    def test_refused_plain_text(
        tls: tuple[servers.Server, str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gateway, "STORE_START_S", 0.2)
        with pytest.raises(gateway.StartError, match="cannot be used"):
            gateway.Storage(f"redis://{tls[1]}").check()
