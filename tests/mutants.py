"""``make mutants``: break a line of the protocol in a small way, and see that a test notices.

A sample of all small changes to sections 5 to 9 and 11 of gateway.py, and to the rules of section
13, is made one by one in memory. For each, those tests run that touch the line, in a process that
was forked for it; coverage.py says which (``--map`` asks it anew, after tests or lines have moved).
What no test notices stands in ``SURVIVORS`` with the reason why nothing can be wrong about it, or
needs a test. With ``--out`` a run that was stopped goes on where it was.

We have no need of mutmut or cosmic-ray: they change whole packages, and know nothing of sections.
"""

from __future__ import annotations

import argparse
import ast
import copy
import gc
import importlib.util
import json
import multiprocessing
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Generator, Iterator
from contextlib import suppress
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple

import coverage
import pytest
from test_shape import LINES, ROOT, SOURCE, TREE, banners

MAP: Final = ROOT / ".venv/mutants_map.json"
SECTIONS: Final = (5, 6, 7, 8, 9, 11)
PARTS: Final = (6, 40, 200)
"""So many of the tests that touch a line run first: those that are likely to notice, for little.
From the second number on they are drawn by lot, because what is defined at import may be touched by
thousands, but slow ones are the last. In the end all run, if ``--most`` allows it."""
SLOW_S: Final = 5
QUICK: Final = ("-q", "-o", "addopts=", "-m", "not alone", "-p", "no:cacheprovider")
IN_PROCESS: Final = {
    f"test_{name}"
    for name in (
        *("certificates", "credentials", "flows", "interactions", "life", "limit_table", "numbers"),
        *("pace", "prices", "proofs", "providers", "signatures", "typed", "webhook_shapes"),
        "webhooks",
    )
}
"""Files that take long, but run the protocol in this process, where coverage.py sees it."""
OF_TEXT: Final = {"test_docs", "test_mutants", "test_notebooks", "test_shape"}
"""Files that read gateway.py as text: the change is not in the file, so they would not see it."""
PLUGINS: Final = ("-p", "no:nbval", "-p", "no:valkey", "-p", "no:schemathesis")

UNREAD: Final = "tries are read, and set to 0 by the next message, only where a code waits"
BODY: Final = "msgspec makes a body from JSON, by name, and nothing changes it"
SURVIVORS: Final[dict[str, str]] = {
    """return user._replace(code_digest=b"", older_digest=b"", tries=0), dead | 0 -> 1""": UNREAD,
    """return user._replace(code_digest=b"", older_digest=b"", tries=0), None | 0 -> 1""": UNREAD,
    r"""sizes = [1 + (char > "\uffff") for char in text] | "\uffff" -> '\uffffX'""": (
        "no single character lies between"
    ),
    """if type(claims.get("iat", 0)) is not int or not claims.get("iat", 0) <= now_ms < """
    """claims["exp"]: | 0 -> 1""": "a time that is missing is past: 1 ms after 1970, too",
    """if parts and float(parts[2] or 1) > 0: | 1 -> 2""": "both are above 0",
    """if not 1024 <= n.bit_length() <= 3072: | 1024 -> 1025""": "pow finds the same, more slowly",
    """return False | return False -> return None""": "who asks wants only its truth",
    """at_rest_us = int(self._storage.get(StorageId(counter.key)) or 0) | 0 -> 1""": (
        "a counter at rest since the first microsecond of 1970 is at rest, too"
    ),
    """if time.monotonic() > deadline_s: | time.monotonic() > deadline_s -> """
    """(time.monotonic() >= deadline_s)""": "to give up at it or just after is the same",
    """_OF_ATTEMPT: Final = "hm" | "hm" -> 'hmX'""": "no row of LIMITS has the letter X",
    """jwk = canonical_jwk(claims["cnf"]["jwk"], thorough=False) # the issuer has looked at it """
    """| False -> True""": "it only takes longer",
    """shared = limit.kind in ("fair", "shared") # a few hundred keys, of no person """
    """| "fair" -> 'fairX'""": "a key that is not remembered is made anew, and is the same",
    "class SignBody(ProofBody, frozen=True, kw_only=True): | True -> False": BODY,
    "class NetworkBody(RegisterBody, frozen=True, kw_only=True): | True -> False": BODY,
    """self._unused, message, counters = self._random_bytes(8), self._message, self._counters """
    """| 8 -> 9""": "a longer name is one, too",
    """return {"algorithm": kind} | {n: t.lstrip("0").lower() for n, t in texts.items()} """
    """| "0" -> '0X'""": "no number has an X",
    """for n, percent in zip(full[::2], full[1::2], strict=True): | True -> False""": (
        "TAKE_SCRIPT adds two at a time"
    ),
    """sound = jwk["crv"] == "P-256" or y not in _SMALL_ORDER | "P-256" -> 'P-256X'""": (
        "x of a key of P-256 is none of these seven numbers"
    ),
}
"""Why a change cannot be noticed, by the line before and after it."""

BYTES: Final = SOURCE.encode()
STARTS: Final = [0, *accumulate(len(line) + 1 for line in BYTES.split(b"\n"))]
"""Where each line starts; the places of ``ast`` count bytes."""

COMPARED: Final[dict[type[ast.cmpop], type[ast.cmpop]]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
REPLACED: Final[dict[type[ast.operator], type[ast.operator]]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitXor: ast.BitOr, ast.Pow: ast.Mult,
}  # fmt: skip


# -- Changes ------------------------------------------------------------------


class Mutant(NamedTuple):
    """A change of one expression or statement.

    Attributes:
        node: What is replaced; it names the place in the text.
        after: The text in its place.
        first, last: The lines of the innermost statement around it.
    """

    node: Any
    after: str
    first: int
    last: int

    @property
    def place(self) -> slice:
        """Where it stands in the bytes of the module."""
        begin = STARTS[self.node.lineno - 1] + self.node.col_offset
        return slice(begin, STARTS[self.node.end_lineno - 1] + self.node.end_col_offset)

    @property
    def text(self) -> str:
        """The module with this change."""
        place = self.place
        return (BYTES[: place.start] + self.after.encode() + BYTES[place.stop :]).decode()

    @property
    def name(self) -> str:
        """The line before and after, without its number, so that it bears moves."""
        line, before = LINES[self.first - 1], BYTES[self.place].decode()
        return f"{' '.join(line.split())} | {' '.join(before.split())} -> {self.after}"


def changed(node: ast.AST) -> Iterator[ast.AST | str]:
    """What may stand in the place of a node."""
    new: Any = copy.deepcopy(node)
    match node:
        case ast.Compare(ops=[op]) if type(op) in COMPARED:
            new.ops = [COMPARED[type(op)]()]
            yield new
        case ast.BoolOp():
            new.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
            yield new
        case ast.BinOp() if type(node.op) in REPLACED:
            new.op = REPLACED[type(node.op)]()
            yield new
        case ast.UnaryOp(op=ast.Not()):
            yield node.operand
        case ast.Constant(value=bool(truth)):
            yield repr(not truth)
        case ast.Constant(value=int(number)):
            yield repr(number + 1)
        case ast.Constant(value=str(word)) if word and " " not in word:
            yield repr(word + "X")  # sentences are for people
        case ast.IfExp():
            new.body, new.orelse = new.orelse, new.body
            yield new
        case ast.Return(value=ast.expr() as value) if ast.unparse(value) != "None":
            yield "return None"
        case ast.Raise() | ast.Expr(value=ast.Call()) | ast.AugAssign():
            yield "pass"


def mutants() -> list[Mutant]:
    """All changes that a sample is drawn from, in the order of the text."""
    found: list[Mutant] = []

    def visit(node: ast.AST, statement: Any) -> None:
        if isinstance(node, ast.JoinedStr) or _is_docstring(node):
            return
        if isinstance(node, ast.stmt):
            statement = node
        if hasattr(node, "lineno") and node.lineno in _chosen_lines():
            for after in changed(node):
                text = after if isinstance(after, str) else f"({ast.unparse(after)})"
                last = statement.end_lineno or statement.lineno
                if isinstance(statement, ast.If | ast.For | ast.While | ast.With | ast.FunctionDef):
                    last = max(statement.lineno, statement.body[0].lineno - 1)
                found.append(Mutant(node, text, statement.lineno, last))
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "type_comment"):
                continue  # what is only for mypy
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    visit(child, statement)

    visit(TREE, None)
    return found


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


@cache
def _chosen_lines() -> set[int]:
    rules_end = next(n for n, text in enumerate(LINES, 1) if text.startswith("class Gateway:"))
    starts = sorted((start, number) for number, (start, _) in banners().items())
    found: set[int] = set()
    for (start, number), (after, _) in pairwise([*starts, (len(LINES), 0)]):
        if number in SECTIONS:
            found |= set(range(start, after))
        if number == 13:
            found |= set(range(start, rules_end))
    return found


# -- Which tests touch a line -------------------------------------------------


class Contexts:
    """A plugin of pytest: notes which lines of gateway.py each test runs, and how long it takes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.coverage = coverage.Coverage(
            data_file=None, include=[str(ROOT / "gateway.py")], config_file=False
        )
        self.coverage.start()
        self.seconds: dict[str, float] = {}
        self.failed: set[str] = set()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Leave out what starts processes or reads text: nothing of a change is seen there."""

        def seen(item: pytest.Item) -> bool:
            if item.path.stem in OF_TEXT:
                return False
            slow = item.get_closest_marker("slow") and item.path.stem not in IN_PROCESS
            return not slow and "start_gateway" not in getattr(item, "fixturenames", ())

        items[:] = filter(seen, items)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Run one test."""
        self.coverage.switch_context(item.nodeid)
        started = time.monotonic()
        try:
            return (yield)
        finally:
            self.seconds[item.nodeid] = round(time.monotonic() - started, 3)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test that fails without any change judges nothing."""
        if report.failed:
            self.failed.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        """Write what was found."""
        self.coverage.stop()
        data = self.coverage.get_data()
        lines = data.contexts_by_lineno(str(ROOT / "gateway.py"))
        passed = {name: s for name, s in self.seconds.items() if name not in self.failed}
        found = {line: [n for n in names if n in passed] for line, names in lines.items()}
        text = json.dumps({"seconds": passed, "lines": found})
        (self.folder / f"{os.getpid()}.json").write_text(text)


def pytest_configure(config: pytest.Config) -> None:
    """As a plugin (``-p mutants``), in each process that runs tests."""
    folder = os.environ.get("MUTANTS_MAP")
    if folder and (hasattr(config, "workerinput") or config.option.dist == "no"):
        config.pluginmanager.register(Contexts(Path(folder)))


def draw_map(out: Path, arguments: list[str]) -> None:
    """Run the tests of this process once, and write which lines each touches."""
    seconds: dict[str, float] = {}
    lines = defaultdict[str, set[str]](set)
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "MUTANTS_MAP": folder, "PYTHONPATH": str(ROOT / "tests")}
        command = [sys.executable, "-m", "pytest", *QUICK, *PLUGINS, "-p", "mutants", *arguments]
        subprocess.run(command, cwd=ROOT, env=environment, check=False)  # a map needs no passes
        for path in Path(folder).glob("*.json"):
            drawn = json.loads(path.read_text())
            seconds |= drawn["seconds"]
            for line, names in drawn["lines"].items():
                lines[LINES[int(line) - 1].strip()].update(names)
    place = {name: n for n, name in enumerate(seconds)}
    numbers = {line: sorted(place[name] for name in names) for line, names in lines.items()}
    out.write_text(json.dumps({"seconds": seconds, "lines": numbers}))


class Map:
    """Which tests touch a line, and how long each takes."""

    def __init__(self, drawn: dict[str, Any]) -> None:
        self.seconds: dict[str, float] = drawn["seconds"]
        names = list(self.seconds)
        self.lines = {text: [names[n] for n in numbers] for text, numbers in drawn["lines"].items()}
        self.weight = Counter(name for tests in self.lines.values() for name in tests)
        self.kills = Counter[str]()

    def tests_of(self, mutant: Mutant) -> list[str]:
        """The tests that touch a mutant's statement.

        First those that touch few other lines, take little time and have noticed much. What runs
        at import, such as a constant, is touched by those that run a line which names it.
        """
        lines, names = set(range(mutant.first, mutant.last + 1)), set[str]()
        for _ in range(4):  # a type is named by the fields of another one, and that by a function
            if names := {name for n in lines for name in self.lines.get(LINES[n - 1].strip(), [])}:
                break
            lines = _users(lines)
        return sorted(names, key=lambda name: (self._price(name), name))

    def _price(self, name: str) -> float:
        return self.weight[name] * (0.1 + self.seconds[name]) / (1 + self.kills[name])


def _users(lines: set[int]) -> set[int]:
    """The lines that name what is defined around some lines at the top of the module."""
    names: set[str] = set()
    for outer in TREE.body:
        if lines.isdisjoint(range(outer.lineno, (outer.end_lineno or outer.lineno) + 1)):
            continue
        if isinstance(outer, ast.ClassDef | ast.FunctionDef):
            names.add(outer.name)
        for node in ast.walk(outer):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
    found = set()
    for node in ast.walk(TREE):
        name = node.id if isinstance(node, ast.Name) else getattr(node, "attr", "")
        if name in names and isinstance(node, ast.expr):
            found.add(node.lineno)
    return found


# -- Running ------------------------------------------------------------------
#
# To start Python and to read all tests takes 16 s, most of it for libraries. So one process reads
# them once and forgets what is ours. It forks a child for each mutant, whose gateway.py is the
# changed one; that reads only the files of the tests that it runs.


class Told:
    """A plugin of pytest in such a child: runs these tests in this order, and tells the parent."""

    def __init__(self, tests: list[str], pipe: int) -> None:
        self.place, self.pipe = {name: n for n, name in enumerate(tests)}, pipe

    def tell(self, what: str, name: str) -> None:
        """Write a line: what happened, and where."""
        os.write(self.pipe, f"{what} {name}\n".encode())

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Choose; tests of an older map that are not there any more are left out."""
        items[:] = [item for item in items if item.nodeid in self.place]
        items.sort(key=lambda item: self.place[item.nodeid])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """From now on it is this test's time."""
        self.tell("start", nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """The first one that fails is the last one."""
        if report.failed:
            self.tell("failed", report.nodeid)


def warm_up(files: list[str]) -> None:
    """Have all libraries in memory, and nothing of ours."""
    pytest.main([*QUICK, *PLUGINS, "-qqq", "--collect-only", *files])
    _forget()
    assert threading.active_count() == 1, threading.enumerate()
    gc.freeze()


def _forget() -> None:
    ours = (str(ROOT / "gateway.py"), str(ROOT / "tests"), str(ROOT / "notebooks"))
    for name, module in list(sys.modules.items()):
        if name != "__main__" and (getattr(module, "__file__", None) or "").startswith(ours):
            del sys.modules[name]


def _run(text: str, tests: list[str], folder: str, pipe: int) -> None:
    """In the child: see whether these tests notice that gateway.py has this text."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nowhere, number)
    told = Told(tests, pipe)
    path = ROOT / "gateway.py"
    spec = importlib.util.spec_from_file_location("gateway", path)
    assert spec
    sys.modules["gateway"] = module = importlib.util.module_from_spec(spec)
    try:
        exec(compile(text, path, "exec"), module.__dict__)
    except Exception as error:
        told.tell("failed", f"import: {error!r}")
        return
    if not tests:
        told.tell("done", "0")
        return
    files = list(dict.fromkeys(name.partition("::")[0] for name in tests))
    options = ["-x", "--tb=no", "--no-header", "-W", "ignore", f"--basetemp={folder}"]
    status = pytest.main([*QUICK, *PLUGINS, *options, *files], plugins=[told])
    told.tell("done", str(int(status)))


def notices(text: str, tests: list[str], drawn: Map) -> str:
    """The first test that fails, or why they did not end; "" if all pass."""
    read, write = os.pipe()
    with tempfile.TemporaryDirectory(prefix="m", ignore_cleanup_errors=True) as folder:
        if not (child := os.fork()):
            os.setsid()
            try:
                _run(text, tests, folder, write)
            finally:
                os._exit(0)
        os.close(write)
        try:
            return _listen(read, drawn)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(read)


def _listen(pipe: int, drawn: Map) -> str:
    """Hear what a child tells, until it has an end or is silent for too long."""
    last, limit_s, heard = "to read the tests", 180.0, b""
    while True:
        if not select.select([pipe], [], [], limit_s)[0]:
            return f"{last}: not done after {limit_s:.0f} s"
        if not (data := os.read(pipe, 65_536)):
            return f"{last}: the process died"
        *lines, heard = (heard + data).split(b"\n")
        for line in lines:
            what, _, name = line.decode().partition(" ")
            if what == "failed":
                return name
            if what == "done":
                return "" if name in "05" else f"{last}: pytest ended with {name}"
            last, limit_s = name, 30 + 10 * drawn.seconds[name]


def first_notice(text: str, tests: list[str], drawn: Map, sound: dict[str, bool]) -> str:
    """Like ``notices``, but what fails without the change too, here and now, notices nothing."""
    while (name := notices(text, tests, drawn)) in drawn.seconds:
        if name not in sound:
            sound[name] = not notices(SOURCE, [name], drawn)
        if sound[name]:
            drawn.kills[name] += 1
            break
        tests = [other for other in tests if other != name]
    return name


def judge(mutant: Mutant, drawn: Map, most: int, sound: dict[str, bool]) -> dict[str, Any]:
    """Try one mutant, with more and more tests until one of them notices."""
    started = time.monotonic()
    tests = drawn.tests_of(mutant)
    by_lot = tests[PARTS[1] :]
    random.Random(0).shuffle(by_lot)
    tests[PARTS[1] :] = sorted(by_lot, key=lambda name: drawn.seconds[name] > SLOW_S)
    tests = tests[: most or None]
    noticed = first_notice(mutant.text, tests[: PARTS[0]], drawn, sound)
    for begin, end in pairwise((*PARTS, len(tests))):
        if tests[begin:end] and not noticed:
            noticed = first_notice(mutant.text, tests[begin:end], drawn, sound)
    return {
        "line": mutant.first,
        "byte": mutant.place.start,
        "name": mutant.name,
        "tests": len(tests),
        "survives": not noticed,
        "noticed": noticed,
        "reason": "" if noticed else SURVIVORS.get(mutant.name, ""),
        "seconds": round(time.monotonic() - started, 1),
    }


def judge_all(sample: list[Mutant], drawn: Map, most: int, jobs: int) -> Iterator[dict[str, Any]]:
    """Try a sample, some at a time, in processes that this one forks."""
    files = sorted({name.partition("::")[0] for name in drawn.seconds})
    warm_up(files)
    sound: dict[str, bool] = {}
    with multiprocessing.get_context("fork").Pool(jobs, _share, (drawn, most, sound)) as pool:
        yield from pool.imap_unordered(_judge_shared, sample)


_shared: list[Any] = []


def _share(*given: Any) -> None:
    _shared[:] = given


def _judge_shared(mutant: Mutant) -> dict[str, Any]:
    return judge(mutant, *_shared)


def main() -> int:
    """Try a sample; 1 if more than one in twenty survives, or one without a reason."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--count", type=int, default=300, help="how many are drawn (300)")
    parser.add_argument("--seed", type=int, default=1, help="another sample (1)")
    parser.add_argument("--only", default="", help="those whose name holds this, instead")
    parser.add_argument("--jobs", type=int, default=2, help="so many at a time (2)")
    parser.add_argument("--most", type=int, default=0, help="so many tests for each (all)")
    parser.add_argument("--map", action="store_true", help="find anew which tests touch a line")
    parser.add_argument("--drawn", type=Path, default=MAP, help="the file for that")
    parser.add_argument("--out", help="a file that results are added to; what it holds is done")
    options, more = parser.parse_known_args()
    if options.map or not options.drawn.exists():
        draw_map(options.drawn, more)
    drawn = Map(json.loads(options.drawn.read_text()))
    every = mutants()
    sample = random.Random(options.seed).sample(every, min(options.count, len(every)))
    if options.only:
        sample = [one for one in every if options.only in one.name]
    out = Path(options.out or os.devnull)
    results = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    done = {(result["byte"], result["name"]) for result in results}
    drawn.kills.update(result["noticed"] for result in results)
    left = [one for one in sample if (one.place.start, one.name) not in done]
    for result in judge_all(left, drawn, options.most, options.jobs):
        results.append(result)
        fate = result["noticed"] or f"SURVIVES {result['reason']}"
        print(f"{result['line']:5} {result['name']}\n      {fate}", flush=True)
        with out.open("a") as file:
            file.write(json.dumps(result) + "\n")
    alive = [result for result in results if result["survives"]]
    unexplained = [result["name"] for result in alive if not result["reason"]]
    print(f"{len(every)} possible, {len(results)} tried, {len(alive)} survive")
    print("without a reason:", *unexplained or ["none"], sep="\n  ")
    return len(alive) > len(results) * 0.05 or bool(unexplained)


if __name__ == "__main__":
    sys.exit(main())
