"""``make lock``: write requirements-lock.txt and, without arguments, the table of licences.

requirements.txt is what people read: what we chose, and why. The lock holds, in the same parts,
those versions and those of all that they need, each with the SHA-256 of every file of the release,
so that ``pip install --require-hashes`` takes nothing else on any system and Python that we name.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from importlib.metadata import distribution
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
CHOSEN: Final = ROOT / "requirements.txt"
LOCK: Final = ROOT / "requirements-lock.txt"
TABLE: Final = ROOT / "CONTRIBUTING.md"
HEADS: Final = (
    '# Made by "make lock" from requirements.txt; its parts are explained there. To run:',
    "# To run with DynamoDB or Amazon SNS:",
    "# To learn, test and build the pages:",
)
PYTHONS: Final = ("3.11", "3.12", "3.13")
WHEELS_FOR: Final = ("x86_64-manylinux_2_28", "aarch64-manylinux_2_28", "aarch64-apple-darwin")
"""Where the first part needs no compiler; elsewhere pip builds from sources, hashed too."""


def normal(name: str) -> str:
    """A name as PyPI compares them."""
    return re.sub(r"[-_.]+", "-", name).lower()


def chosen() -> list[dict[str, str]]:
    """The parts of requirements.txt: version, and marker if there is one, by name."""
    found = r"^([\w.-]+)==(\S+?)(?: |$)"
    parts = CHOSEN.read_text("utf-8").split("\n\n")
    return [{normal(n): v for n, v in re.findall(found, part, re.M)} for part in parts]


def entries(lock: str) -> list[str]:
    """The entries of a lock: a line for the version, and one for each hash."""
    return re.findall(r"^[\w.-]+==.*\n(?:    .*\n)*", lock, re.M)


def name_of(entry: str) -> str:
    """The name that an entry is of."""
    return normal(entry.partition("==")[0])


def in_parts(lock: str) -> str:
    """A lock in the parts of requirements.txt: those who run a gateway install the first."""
    to_run, amazon, _ = chosen()
    parts: list[str] = ["", "", ""]
    for entry in entries(lock):
        name = name_of(entry)
        parts[0 if name in to_run else 1 if name in amazon else 2] += entry
    return "\n".join(f"{head}\n{part}" for head, part in zip(HEADS, parts, strict=True))


def licence(name: str) -> str:
    """What an installed distribution says of its licence, shortly."""
    told = distribution(name).metadata.json
    short = str(told.get("license_expression") or told.get("license", "")).partition("\n")[0]
    if short and not short.startswith("Dual"):
        return short.removesuffix(" License")
    classes = [text.rpartition(" :: ")[2] for text in told.get("classifier", [])]
    return " or ".join(text for text in classes if text.endswith("License"))


def licences() -> str:
    """The table of what a gateway runs on, in Markdown."""
    here = [name for part in chosen()[:2] for name, pin in part.items() if ";" not in pin]
    lines = [f"| {name} | {licence(name)} |" for name in here]
    return "\n".join(["| package | licence |", "|---|---|", *lines])


def compiled(uv: str, *more: str) -> None:
    """Have uv resolve; it keeps the versions of the output file where it can."""
    command = [uv, "pip", "compile", "-q", "--no-header", "--no-annotate", *more]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def main(uv: str, *more: str) -> None:
    """Write the lock, and see that the first part has its wheels."""
    with tempfile.TemporaryDirectory() as folder:
        out, first = Path(folder) / "out.txt", Path(folder) / "first.txt"
        out.write_text(LOCK.read_text("utf-8") if LOCK.exists() else "", "utf-8")
        everywhere = ("--universal", "--python-version", PYTHONS[0], "--generate-hashes")
        compiled(uv, *everywhere, *more, str(CHOSEN), "-o", str(out))
        LOCK.write_text(in_parts(out.read_text("utf-8")), "utf-8")
        first.write_text(CHOSEN.read_text("utf-8").partition("\n\n")[0], "utf-8")
        for python in PYTHONS:
            for system in WHEELS_FOR:
                wheels = ("--only-binary", ":all:", "--python-platform", system)
                compiled(uv, *wheels, "--python-version", python, str(first))


def write_table() -> None:
    """Write the table of licences into CONTRIBUTING.md, once the lock is installed."""
    text = TABLE.read_text("utf-8")
    table = re.compile(r"\| package \| licence \|\n(?:\|.*\n)*")
    TABLE.write_text(table.sub(lambda _: licences() + "\n", text), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:]) if sys.argv[1:] else write_table()
