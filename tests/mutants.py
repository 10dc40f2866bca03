"""``make mutants``: break a line of the protocol in a small way, and see that a test notices.

A sample of all small changes to sections 5 to 9 and 11 of gateway.py, and to the rules of section
13, is made one by one in a copy of this tree. For each, those quick tests run that touch the line;
coverage.py says which (``--map`` asks it anew, after tests or lines have moved). What no test
notices stands in ``SURVIVORS`` with the reason why nothing can be wrong about it, or needs a test.

We have no need of mutmut or cosmic-ray: they change whole packages, and know nothing of sections.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Generator, Iterator
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple

import coverage
import pytest
from test_shape import LINES, ROOT, SOURCE, TREE, banners

MAP: Final = ROOT / ".venv/mutants.json"
SECTIONS: Final = (5, 6, 7, 8, 9, 11)
FIRST_TESTS: Final = 30
SECOND_TESTS: Final = 120
"""So many of the tests that touch a line run first, those that touch fewest lines; then some of the
others, drawn by lot, because what is defined at import may be touched by thousands; then all."""
QUICK: Final = ("-q", "-o", "addopts=", "-m", "not alone", "-p", "no:cacheprovider")
IN_PROCESS: Final = {"test_flows", "test_life", "test_limit_table", "test_pace"}
"""Files that take long, but run the protocol in this process, where coverage.py sees it."""
PLUGINS: Final = ("-p", "no:nbval", "-p", "no:valkey", "-p", "no:schemathesis")

UNREAD: Final = "tries are read, and set to 0 by the next message, only where a code waits"
SURVIVORS: Final[dict[str, str]] = {
    """return user._replace(code_digest=b"", older_digest=b"", tries=0), dead | 0 -> 1""": UNREAD,
    """return user._replace(code_digest=b"", older_digest=b"", tries=0), None | 0 -> 1""": UNREAD,
    """_OF_ATTEMPT: Final = "hm" | "hm" -> 'hmX'""": "no row of LIMITS has the letter X",
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
    """A plugin of pytest: notes for each line of gateway.py the tests that run it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.coverage = coverage.Coverage(
            data_file=None, include=[str(ROOT / "gateway.py")], config_file=False
        )
        self.coverage.start()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Leave out what is slow because it starts processes: nothing is seen of those."""

        def seen(item: pytest.Item) -> bool:
            slow = item.get_closest_marker("slow") and item.path.stem not in IN_PROCESS
            return not slow and "start_gateway" not in getattr(item, "fixturenames", ())

        items[:] = filter(seen, items)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Run one test."""
        self.coverage.switch_context(item.nodeid)
        return (yield)

    def pytest_sessionfinish(self) -> None:
        """Write what was found."""
        self.coverage.stop()
        data = self.coverage.get_data()
        lines = data.contexts_by_lineno(str(ROOT / "gateway.py"))
        text = json.dumps({line: [n for n in names if n] for line, names in lines.items()})
        (self.folder / f"{os.getpid()}.json").write_text(text)


def pytest_configure(config: pytest.Config) -> None:
    """As a plugin (``-p mutants``), in each process that runs tests."""
    folder = os.environ.get("MUTANTS_MAP")
    if folder and (hasattr(config, "workerinput") or config.option.dist == "no"):
        config.pluginmanager.register(Contexts(Path(folder)))


def draw_map(arguments: list[str]) -> None:
    """Run the quick tests once, and write which lines each touches."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "MUTANTS_MAP": folder, "PYTHONPATH": str(ROOT / "tests")}
        command = [sys.executable, "-m", "pytest", *QUICK, *PLUGINS, "-p", "mutants", *arguments]
        subprocess.run(command, cwd=ROOT, env=environment, check=False)  # a map needs no passes
        merged = defaultdict[str, list[str]](list)
        for path in Path(folder).glob("*.json"):
            for line, names in json.loads(path.read_text()).items():
                merged[LINES[int(line) - 1].strip()] += names
    MAP.write_text(json.dumps({text: sorted(set(names)) for text, names in merged.items()}))


def tests_of(mutant: Mutant, touched: dict[str, list[str]]) -> list[str]:
    """The tests that touch a mutant's statement; the most specific ones first.

    What runs at import, such as a constant, is touched by those that run a line which names it.
    """
    lines = {LINES[n - 1].strip() for n in range(mutant.first, mutant.last + 1)}
    names = {name for line in lines for name in touched.get(line, [])}
    if not names:
        users = {LINES[n - 1].strip() for n in _users(mutant.first)}
        names = {name for line in users for name in touched.get(line, [])}
    weight = defaultdict[str, int](int)
    for tests in touched.values():
        for name in tests:
            weight[name] += 1
    return sorted(names, key=lambda name: (weight[name], name))


def _users(line: int) -> set[int]:
    """The lines that name what is defined around a line at the top of the module."""
    outer = next(n for n in TREE.body if n.lineno <= line <= (n.end_lineno or n.lineno))
    names = {outer.name} if isinstance(outer, ast.ClassDef | ast.FunctionDef) else set()
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


class Copy:
    """A copy of this tree whose gateway.py is changed again and again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.number = folder, 0
        files = subprocess.run(
            ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.splitlines()
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
        for name in (".venv", ".parts"):
            (folder / name).symlink_to(ROOT / name)

    def put(self, text: str) -> None:
        """Change it; its time moves too, so that Python compiles it again."""
        self.number += 1
        path = self.folder / "gateway.py"
        path.write_text(text, "utf-8")
        os.utime(path, (self.number, self.number))

    def notices(self, tests: list[str], timeout_s: float) -> str:
        """The first test that fails, or why they did not end; "" if all pass.

        Tests of an older map that are not there any more are left out.
        """
        if not tests:
            return ""
        listed = self.folder / "tests.txt"
        listed.write_text("\n".join(tests))
        command = [sys.executable, "-m", "pytest", *QUICK, *PLUGINS, "-x", "--tb=no", "-rfE"]
        command += ["--no-header", "-W", "ignore", f"--basetemp={self.folder}/t", f"@{listed}"]
        started = time.monotonic()
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}  # compile each test file once
        try:
            done = subprocess.run(
                command,
                cwd=self.folder,
                capture_output=True,
                text=True,
                timeout=timeout_s,
                env=environment,
            )
        except subprocess.TimeoutExpired:
            return f"not done after {time.monotonic() - started:.0f} s"
        if gone := re.findall(r"^ERROR: not found: .*/(tests/.*)$", done.stderr, re.M):
            return self.notices([name for name in tests if name not in gone], timeout_s)
        told = [n for n in done.stdout.splitlines() if n.startswith(("FAILED", "ERROR"))]
        if done.returncode and not told:
            return (done.stdout + done.stderr).strip().splitlines()[-1]
        return told[0] if told else ""


def judge(copy: Copy, mutant: Mutant, touched: dict[str, list[str]]) -> dict[str, Any]:
    """Try one mutant, with more and more tests until one of them notices."""
    tests = tests_of(mutant, touched)
    copy.put(mutant.text)
    noticed = "" if tests else "no test touches it"
    result: dict[str, Any] = {"line": mutant.first, "name": mutant.name, "tests": len(tests)}
    rest = random.Random(0).sample(tests[FIRST_TESTS:], len(tests[FIRST_TESTS:]))
    for some in (tests[:FIRST_TESTS], rest[:SECOND_TESTS], rest[SECOND_TESTS:]):
        if some and not noticed:
            noticed = copy.notices(some, 120 + len(some))
    alive = not tests or not noticed
    reason = SURVIVORS.get(mutant.name, "")
    return {**result, "survives": alive, "noticed": "" if alive else noticed, "reason": reason}


def main() -> int:
    """Try a sample; 1 if more than one in twenty survives, or one without a reason."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--count", type=int, default=300, help="how many are drawn (300)")
    parser.add_argument("--seed", type=int, default=1, help="another sample (1)")
    parser.add_argument("--skip", type=int, default=0, help="leave out the first of the sample")
    parser.add_argument("--only", default="", help="those whose text holds this, instead")
    parser.add_argument("--map", action="store_true", help="find anew which tests touch a line")
    parser.add_argument("--out", default="", help="a file that each result is added to, as JSON")
    options, more = parser.parse_known_args()
    if options.map or not MAP.exists():
        draw_map(more)
    touched: dict[str, list[str]] = json.loads(MAP.read_text())
    every = mutants()
    sample = random.Random(options.seed).sample(every, min(options.count, len(every)))
    sample = (
        [m for m in every if options.only in m.name] if options.only else sample[options.skip :]
    )
    results = []
    with tempfile.TemporaryDirectory(prefix="m") as folder:
        tree = Copy(Path(folder))
        assert not tree.notices(tests_of(sample[0], touched)[:FIRST_TESTS], 600), "broken before"
        for mutant in sample:
            results.append(result := judge(tree, mutant, touched))
            fate = result["noticed"] or f"SURVIVES {result['reason']}"
            print(f"{mutant.first:5} {mutant.name}\n      {fate}", flush=True)
            if options.out:
                with Path(options.out).open("a") as file:
                    file.write(json.dumps(result) + "\n")
    alive = [result for result in results if result["survives"]]
    unexplained = [result["name"] for result in alive if not result["reason"]]
    print(f"{len(every)} possible, {len(results)} tried, {len(alive)} survive")
    print("without a reason:", *unexplained or ["none"], sep="\n  ")
    return len(alive) > len(results) * 0.05 or bool(unexplained)


if __name__ == "__main__":
    sys.exit(main())
