"""A machine of its own, where a page's commands run as they stand there: systemd as process 1.

Namespaces of Linux hide it from the machine that runs the tests: it has its own processes, network
(loopback alone, so port 443 and 5000 are free), and host name, and what it writes to /etc, /opt and
/var lies in memory over the real folders. Programs are those of the real machine.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import wait_for
from support import die_with_parent

SYSTEMD = Path("/lib/systemd/systemd")
BOOT = """
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs {folder}
for name in etc opt var; do
    mkdir {folder}/$name {folder}/$name.work
    layers=lowerdir=/$name,upperdir={folder}/$name,workdir={folder}/$name.work
    mount -t overlay overlay -o "$layers" /$name
done
mount -t tmpfs tmpfs /run
mkdir -p /run/lock /run/systemd/system /opt/packages /opt/python
mount --bind {packages} /opt/packages
mount --bind {python} /opt/python
echo /opt/python/lib > /etc/ld.so.conf.d/0.conf
ldconfig
# What a whole system starts first is of no use here, and some of it waits for devices.
for unit in /lib/systemd/system/sysinit.target.wants/*.service; do
    ln -s /dev/null /run/systemd/system/$(basename $unit)
done
rm /run/systemd/system/systemd-journald.service
printf '[Unit]\\nDescription=empty\\nDefaultDependencies=no\\n' > /run/systemd/system/empty.target
ip link set lo up
exec env -i PATH="$PATH" container=unshare {systemd} --system --unit=empty.target
"""


def missing() -> str:
    """What is not here that such a machine needs; empty if it is all here."""
    if os.geteuid() or not SYSTEMD.exists():
        return "needs root, and apt-get install systemd"
    tried = ["unshare", "--pid", "--fork", "--mount", "--net", "mount", "--make-rprivate", "/"]
    if not shutil.which("curl"):
        return "needs apt-get install curl"
    if not shutil.which("ip") or subprocess.run(tried, capture_output=True).returncode:
        return "needs namespaces, which this container may not make, and iproute2"
    return ""


class Machine:
    """The machine; ``folder`` must be empty."""

    def __init__(self, folder: Path) -> None:
        places = {
            "folder": folder,
            "systemd": SYSTEMD,
            "packages": Path(pytest.__file__).parent.parent,
            "python": sys.base_prefix,
        }
        script = BOOT.format(**{name: shlex.quote(str(path)) for name, path in places.items()})
        parent = os.getpid()
        flags = "--pid --fork --kill-child --mount --uts --ipc --cgroup --net --mount-proc"
        self.process = subprocess.Popen(
            ["unshare", *flags.split(), "sh", "-c", script],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=lambda: die_with_parent(parent, signal.SIGKILL),
        )
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        self.first = int(wait_for(children.read_text, "its process 1"))
        wait_for(lambda: "running" in self.run("systemctl is-system-running", None), "the boot")
        self.run("systemctl start systemd-journald")

    def command(self, shell: str) -> list[str]:
        """What runs a text of the shell in there."""
        return ["nsenter", "-t", str(self.first), "-a", "sh", "-euc", shell]

    def run(self, shell: str, status: int | None = 0, timeout_s: float = 60) -> str:
        """Run a text of the shell to its end; gives what it printed. ``None``: any status."""
        ended = subprocess.run(
            self.command(shell),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            env={"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin", "SYSTEMD_PAGER": "cat"},
        )
        assert status is None or ended.returncode == status, f"{shell}\n{ended.stdout}"
        return ended.stdout

    def install(self, files: bytes, folder: str = "/opt/gateway") -> None:
        """Put code into a folder there, from a tar archive, and ``.venv`` beside it.

        In place of what pip would bring, it sees the Python and the packages that run us.
        """
        subprocess.run(self.command(f"tar -xC {folder}"), input=files, check=True)
        self.run(f"/opt/python/bin/python3 -m venv --without-pip {folder}/.venv")
        own = f"{folder}/.venv/lib/python3.{sys.version_info[1]}/site-packages"
        self.run(f"echo /opt/packages > {own}/all.pth")

    def write(self, path: str, text: str) -> None:
        """Write a file there."""
        subprocess.run(self.command(f"cat > {path}"), input=text.encode(), check=True)

    @contextlib.contextmanager
    def running(self, shell: str) -> Iterator[None]:
        """A program that runs there for a while."""
        process = subprocess.Popen(self.command(f"exec {shell}"))
        try:
            yield
        finally:
            process.kill()
            process.wait()

    def close(self) -> None:
        """Switch it off: with its process 1 all others end."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.first, signal.SIGKILL)
        self.process.wait()
