"""What the limits cost a send: ``python tests/bench/limits.py`` (three minutes).

Issue 16: all limits of a send together cost one round trip more, and at most 80 µs of CPU.

Three pairs of gateways, each with ``limits`` on ``enforce`` and on ``off``, are all alive at once
and asked in turn, in an order that rotates, so that both of a pair meet the same machine. Clients
come from addresses that are limited (behind a named proxy), so that every row of the table counts.

    outbox     /sms/mt/verify, shown by the outbox: it may cost no money, so no counter is asked
    provider   /sms/mt/verify, by a stand-in provider over HTTP: eight counters and the list of the
               session's round, taken in one script
    register   /register: one counter

For each: CPU µs per request of the gateway's own processes and of its store, with limits, without,
and the median over the rounds of the difference.

``--floor`` asks instead what any script costs that does the least: it writes eight counters that
die by themselves and the round's list, and looks at nothing. Ours is measured beside it, and a GET.
"""

from __future__ import annotations

import argparse
import json
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import psutil
from bench import WORKLOADS, Bare, Bench, Row, Workload, World

import gateway

PROXY = "X-Forwarded-For: 192.0.2.9\r\n"


class Proxied(World):
    """A gateway behind a proxy, so that its clients have an address that is limited."""

    def request(self, path: str, body: str = "", authorization: str = "") -> bytes:
        """One HTTP request, as the proxy passes it on."""
        start, end, rest = super().request(path, body, authorization).partition(b"\r\n")
        return start + end + PROXY.encode() + rest


def start(bench: Bench, name: str, *options: str) -> Proxied:
    """Start one gateway and warm it up."""
    many = ("--registers-per-address", "9999999/second", "--trusted-proxies", '["127.0.0.1"]')
    world = Proxied(bench.folder / name, "--workers", "1", *many, *options)
    bench.stack.callback(world.close)
    bench.warm_up(world)
    return world


def pairs(bench: Bench) -> dict[str, tuple[Workload, dict[str, Proxied]]]:
    """Each workload with its two gateways."""
    provider = Bare(bench.folder, 64)
    bench.stack.callback(provider.close)
    url = f"http://127.0.0.1:{provider.port}/sms/json"
    entry = {"kind": "nexmo", "endpoint": url, "api_key": "key", "api_secret": "secret"}
    paying = ("--sms-providers", json.dumps([entry]))
    named = {one.name: one for one in WORKLOADS}
    send = named["/sms/mt/verify, outbox"]
    found = {}
    for name, what, options in (
        ("outbox", send, ()), ("provider", send, paying), ("register", named["/register"], ()),
    ):  # fmt: skip
        found[name] = (what, {
            mode: start(bench, f"{name}-{mode}", "--limits", mode, *options)
            for mode in ("enforce", "off")
        })  # fmt: skip
    return found


LEAST = """#!lua
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local before = redis.call('MGET', unpack(KEYS, 2))
for i = 1, #before do redis.call('SET', KEYS[i + 1], now, 'PX', 10000) end
redis.call('HSET', KEYS[1], unpack(ARGV, 2))
redis.call('EXPIRE', KEYS[1], 86400)
return {0, 0}
"""


def floor(folder: Path, rounds: int, count: int) -> None:
    """Print CPU µs per call, of the store and of this process: ours, the least script, a GET."""
    embedded = gateway.EmbeddedStore(str(folder / "store"))
    storage = gateway.Storage(embedded.url)
    (store,) = (p for p in psutil.Process().children(recursive=True) if "valkey" in p.name())
    open_to_all = {"*": "9999999/second"}
    settings = gateway.Settings(
        unverified_per_destination=open_to_all, unverified_per_prefix="9999999/second",
        unverified_per_address="9999999/second", sends_per_hour=10**6, spend_per_day=1e6,
    )  # fmt: skip
    limits = gateway.Limits(storage, settings, secrets.token_bytes(32), time.time)

    def message(script: str) -> Callable[[], object]:
        number = gateway.Msisdn(f"+4477{secrets.randbelow(10**8):08}")
        counters = limits.message(number, "GB", "192.0.2.9")
        rows = [(one.period_us, one.cost_us, one.limit.kind) for one in counters]
        ask = {"outcome": "refused", "rows": rows, "now": 0, "region": "GB", "prefix": number[:-4]}
        keys = [limits.key("s", secrets.token_hex(8)), *(one.key for one in counters)]
        more = [secrets.token_bytes(8), b"-", secrets.token_bytes(8), secrets.token_bytes(60)]
        packed = msgspec.msgpack.encode(ask)
        return lambda: storage._run("EVAL", script, len(keys), *keys, packed, *more, key=keys[0])

    def get() -> Callable[[], object]:
        return lambda: storage.get(gateway.StorageId(bytes(16)))

    what: dict[str, Callable[[], Callable[[], object]]] = {
        "TAKE_SCRIPT": lambda: message(gateway.TAKE_SCRIPT),
        "the least": lambda: message(LEAST),
        "GET": get,
    }
    used: dict[str, list[tuple[float, float]]] = {name: [] for name in what}
    for _ in range(rounds):
        for name, make in what.items():
            calls = [make() for _ in range(count)]
            times = store.cpu_times()
            before = times.user + times.system, time.process_time()
            for call in calls:
                call()
            times = store.cpu_times()
            after = times.user + times.system, time.process_time()
            used[name].append((after[0] - before[0], after[1] - before[1]))
    for name, each in used.items():
        ours, theirs = (statistics.median(v) / count * 1e6 for v in zip(*each, strict=True))
        print(f"{name:11} store {ours:.0f}, this process {theirs:.0f}")


def main() -> int:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    # The kernel tells CPU in ticks of 10 ms: with so many requests a tick is 12 µs of each.
    parser.add_argument("--requests", type=int, default=800)
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--floor", action="store_true")
    given = parser.parse_args()
    if given.floor:
        with tempfile.TemporaryDirectory(prefix="limits") as folder:
            floor(Path(folder), given.rounds, 10 * given.requests)
        return 0
    with tempfile.TemporaryDirectory(prefix="limits") as folder:
        bench = Bench(Path(folder), "python", given.requests, given.rounds)
        rows: dict[tuple[str, str], Row] = {}
        with bench.stack:
            asked = pairs(bench)
            bench.steps = given.rounds * 2 * len(asked)
            turns = [(name, mode) for name in asked for mode in ("enforce", "off")]
            for number in range(given.rounds):
                for name, mode in turns[number % 2 :] + turns[: number % 2]:
                    what, worlds = asked[name]
                    bench.say(f"round {number + 1}: {name}, {mode}")
                    worlds[mode].reset()
                    row = rows.setdefault((name, mode), Row(name))
                    bench.measure(what, worlds[mode], row, connections=given.connections)
    print(f"{given.connections} at a time; CPU µs per request: gateway, store, both")
    for name in asked:
        on, off = rows[name, "enforce"], rows[name, "off"]
        each = [
            [a - b for a, b in zip(on.server_us, off.server_us, strict=True)],
            [a - b for a, b in zip(on.store_us, off.store_us, strict=True)],
        ]
        each.append([a + b for a, b in zip(*each, strict=True)])
        shown = ", ".join(f"{statistics.median(values):+.0f}" for values in each)
        spread = f"{min(each[2]):+.0f} to {max(each[2]):+.0f}"
        with_us, without_us = (
            f"{statistics.median(row.server_us):.0f} and {statistics.median(row.store_us):.0f}"
            for row in (on, off)
        )
        levels = f"with {with_us}, without {without_us}, errors {on.errors + off.errors}"
        print(f"{name:10} limits cost {shown} ({spread}); {levels}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
