"""A real nginx before a gateway: the file of the page Install, on ports of its own, over TLS."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from types import TracebackType

import lab
import support
import urllib3
from servers import wait_for
from test_tls import write_certificate

import gateway

NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
"""Where it is; None: not on this machine (``apt-get install nginx``)."""
PAGE = support.ROOT / "notebooks/operate/install.md"


def blocks(language: str, page: Path = PAGE) -> list[str]:
    """The listings of a page in one language, in order."""
    found = re.findall(rf"(?ms)^( *)```{language}\n(.*?)^ *```", page.read_text("utf-8"))
    return [re.sub(rf"(?m)^{indent}", "", text) for indent, text in found]


def replaced(text: str, changes: dict[str, str]) -> str:
    """``text`` with each key replaced by its value; each must be there."""
    for old, new in changes.items():
        assert old in text, f"the page does not have {old!r} any more"
        text = text.replace(old, new)
    return text


class Nginx:
    """nginx with the page's file, between clients and the gateway on a loopback port.

    Only places differ from the page: ports, name, certificate and logs. Listening on IPv6 is
    left out, as a machine for tests may have none.

    Args:
        folder: Its own; must not be there yet.
        gateway_port: Where the gateway listens.
        port: Where it does; 0: a free one (give it to the gateway's ``public_url`` before).
        changes: Further replacements in the page's file, for who needs tighter limits.
    """

    def __init__(
        self, folder: Path, gateway_port: int, port: int = 0, changes: dict[str, str] | None = None
    ) -> None:
        assert NGINX
        self.folder, self.port = folder, port or support.free_port()
        self.plain_port = support.free_port()
        self.url = f"https://127.0.0.1:{self.port}"
        folder.mkdir(mode=0o755)
        self.certificate = write_certificate(folder / "tls")
        places = {
            "server 127.0.0.1:5000;": f"server 127.0.0.1:{gateway_port};",
            "    listen [::]:443 ssl http2;\n": "",
            "    listen [::]:80;\n": "",
            "listen 443 ssl": f"listen 127.0.0.1:{self.port} ssl",
            "listen 80;": f"listen 127.0.0.1:{self.plain_port};",
            "/etc/letsencrypt/live/id.example/fullchain.pem": self.certificate,
            "/etc/letsencrypt/live/id.example/privkey.pem": str(folder / "tls" / "key.pem"),
            "/var/log/nginx/": f"{folder}/",
            "/var/www/html": str(folder),
            "server_name id.example;": "server_name 127.0.0.1;",
        }
        site = replaced(blocks("nginx")[0], changes or {})
        if "server 127.0.0.1:5000;" not in site:  # the changes name servers of their own
            del places["server 127.0.0.1:5000;"]
        site = replaced(site, places)
        paths = "".join(
            f"{name}_temp_path {folder}/{name};\n"
            for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        # As Debian's nginx.conf, which includes the site's file within "http".
        config = f"daemon off;\npid {folder}/pid;\nerror_log {folder}/main.log notice;\n"
        if not os.geteuid():
            config += "user root;\n"  # else nobody, who cannot read the folders of pytest
        config += "worker_processes 1;\nevents {worker_connections 2048;}\n"
        config += f"http {{\naccess_log {folder}/other.log;\n{paths}{site}}}\n"
        self.config = folder / "nginx.conf"
        self.config.write_text(config)
        self.start()

    def start(self) -> None:
        """Start it (again)."""
        parent = os.getpid()
        self.process = subprocess.Popen(
            [str(NGINX), "-p", str(self.folder), "-c", str(self.config),
             "-e", f"{self.folder}/main.log"],
            preexec_fn=lambda: support.die_with_parent(parent, signal.SIGTERM),
        )  # fmt: skip
        wait_for(self._listens, "the start of nginx")

    def change(self, old: str, new: str) -> None:
        """Change the file, and have it read again: ``systemctl reload nginx``."""
        before = (self.folder / "main.log").read_text().count("exited with code 0")
        self.config.write_text(replaced(self.config.read_text(), {old: new}))
        self.process.send_signal(signal.SIGHUP)
        log = self.folder / "main.log"
        wait_for(lambda: log.read_text().count("exited with code 0") > before, "a reload")

    def _listens(self) -> bool:
        assert self.process.poll() is None, (self.folder / "main.log").read_text()
        socket.create_connection(("127.0.0.1", self.port), 1).close()
        return True

    def http(self) -> urllib3.PoolManager:
        """A client of its own, which trusts its certificate."""
        return urllib3.PoolManager(ca_certs=self.certificate, retries=False, timeout=30)

    def client(self, folder: Path) -> lab.Client:
        """A client of the gateway whose ``keys`` lie in ``folder``, through it."""
        settings = gateway.Settings(keys_dir=str(folder / "keys"))
        client = lab.Client(self.url, operator_token=gateway.load_operator_token(settings))
        client.http = self.http()
        return client

    def logs(self) -> str:
        """All that it has written, in every log."""
        return "".join(path.read_text() for path in sorted(self.folder.glob("*.log")))

    def __enter__(self) -> Nginx:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(10)
