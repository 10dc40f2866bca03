"""Fixtures shared by all tests: a real store, an application, real server processes."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks"), str(ROOT / "tests")]

import lab  # noqa: E402
import servers  # noqa: E402
from support import AT_ONCE, WIDE, GatewayProcess, WsgiClient  # noqa: E402

import gateway  # noqa: E402 - it lies one folder up

# Most applications of one worker load the same keys, whose primes OpenSSL checks each time, and the
# catalogues of all languages: 50 ms each, for what never changes. So a worker does it once.
for _name in ("load_pem_private_key", "load_catalogues"):
    setattr(gateway, _name, functools.cache(getattr(gateway, _name)))

collect_ignore = [] if servers.WANTED["dynalite"][0] else ["test_split.py"]


# -- Several workers ----------------------------------------------------------
#
# A worker of xdist has its own session fixtures (its own store, its own pages) and its own
# folder below pytest's. It is given one unit after the other, in the order of collection.

CORES = os.cpu_count() or 1
WORKERS = min(3 * CORES, 8)
"""Three for each core: half of the time of these tests is waiting."""
SPREAD = {
    f"tests/test_{name}.py"
    for name in (
        *("attack", "bench", "bursts", "certificates", "demo", "failover", "faults", "flows"),
        *("gateway", "http", "keys", "limit_table", "limits", "notebooks", "openapi", "ops"),
        *("press", "prices", "providers", "safety", "schemathesis", "serving", "settings"),
        *("sms", "storage", "store_pool", "tls"),
    )
}
"""Long files whose tests share nothing that is dear to start: each test is a unit of its own."""
SLOW = {
    *("abuse", "attack", "bench", "bursts", "demo", "failover", "faults", "flows"),
    *("install", "interop", "kannel", "life", "limit_table", "pace", "planted_faults", "prices"),
    *("providers", "serving", "signatures", "smpp", "split", "store_pool", "stores", "tls"),
}
"""Files that start what takes long: ``make check`` leaves them out, like tests marked slow."""
LOOKS = {"docs", "jupyterlab", "pages_in_browser", "press_in_browser"}
"""Files that only ``make look`` runs: pages and browser want two minutes of both cores."""
UNITS = dict.fromkeys(("tests/test_docs.py", "tests/test_pages_in_browser.py"), "the pages")
"""Files that share what a worker should not make twice."""

LONGEST = (
    *("tests/test_machine.py", "tests/test_planted_faults.py"),
    "tests/test_bench.py::test_every_endpoint_answers_as_it_should",
    "tests/test_serving.py::test_kills_at_any_moment",
    "tests/test_schemathesis.py::test_no_5xx_and_nothing_undocumented",
    *("tests/test_abuse.py", "tests/test_interop.py", "tests/test_install.py"),
    *("tests/test_kannel.py", "tests/test_life.py"),
    "tests/test_flows.py::test_random_lives_are_as_the_contract_says",
    "tests/test_prices.py::test_kill_leaves_a_message_without_a_code_at_worst",
)
"""Units that take longest: they begin first, in this order, so that nobody waits for them."""


def unit_of(nodeid: str) -> str:
    """What a worker is given at once: a file; of those in ``SPREAD``, a test, all parameters."""
    file = nodeid.partition("::")[0]
    return nodeid.partition("[")[0] if file in SPREAD else UNITS.get(file, file)


class Units(LoadScopeScheduling):  # type: ignore[misc] # xdist has no types
    """Gives out units, one after the other, in the order of collection."""

    def _split_scope(self, nodeid: str) -> str:
        return unit_of(nodeid)


class Room:
    """Keeps the other workers from running tests while one that is ``alone`` runs.

    The file ``room`` is locked by all who run a test: shared, or by one alone. The file ``door``
    is locked by who waits for the room: whoever comes later waits behind it.
    """

    def __init__(self, folder: Path) -> None:
        self.room, self.door = (folder / "room").open("w"), (folder / "door").open("w")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Run one test."""
        alone = item.get_closest_marker("alone")
        fcntl.flock(self.door, fcntl.LOCK_EX)
        fcntl.flock(self.room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(self.door, fcntl.LOCK_UN)
        try:
            return (yield)
        finally:
            fcntl.flock(self.room, fcntl.LOCK_UN)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """How many workers: none for single files, which one may want to debug."""
    files = [Path(argument.partition("::")[0]).is_file() for argument in config.args]
    return 0 if all(files) else min(CORES, WORKERS) if is_quick(config) else WORKERS


def is_quick(config: pytest.Config) -> bool:
    """Whether this is ``make check``: its tests hardly wait, so one worker for a core does."""
    return str(config.option.markexpr) == "not slow"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out what needs a browser, if it is not named; and for ``make check`` slow files.

    To read all files takes each worker 6 s, a third of it those of which no test would run.
    """
    name = collection_path.stem.removeprefix("test_")
    if name in LOOKS:
        named = {Path(argument.partition("::")[0]).name for argument in config.args}
        return None if collection_path.name in named else True
    return True if name in SLOW and is_quick(config) else None


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Units:
    """How the tests are shared out."""
    config.option.loadscopereorder = False
    return Units(config, log)


def pytest_configure(config: pytest.Config) -> None:
    """Prepare a process that runs tests: a worker, or the only one."""
    if hasattr(config, "workerinput"):
        # The socket of a store may lie 103 bytes deep: "0", not "popen-gw0".
        above, worker = os.path.split(config.option.basetemp)
        config.option.basetemp = os.path.join(above, worker.removeprefix("popen-gw"))
        config.pluginmanager.register(Room(Path(above)))
    elif config.option.dist != "no":
        return
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        # In the background and under nohup some are ignored. Then we go on to ignore them, but
        # by a handler: children do not inherit that, and some tests are of these very signals.
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    """Read the files of tests, each worker from another one on.

    pytest rewrites each file's assertions and keeps the result: in a new working copy all workers
    would otherwise do so at the same time, for ten seconds each, and none could use another's.
    """
    config = session.config
    if worker := getattr(config, "workerinput", None):
        files = sorted(file for folder in config.args for file in Path(folder).rglob("test_*.py"))
        files = [file for file in files if not pytest_ignore_collect(file, config)]
        first = len(files) * int(worker["workerid"][2:]) // worker["workercount"]
        for file in files[first:] + files[:first]:
            # What fails, or skips, does so again where pytest reads it, and is told there.
            with contextlib.suppress(Exception, pytest.skip.Exception):
                importlib.import_module(file.stem)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put them in order.

    First come the longest, then all that starts processes and waits for them, then what only
    computes: that fills the time in which the last of the others end. At the end come those that
    run alone: each waits for the tests of all workers, which are short by then.
    """

    def place(item: pytest.Item) -> tuple[int, int]:
        if item.get_closest_marker("alone"):
            return 3, 0
        if (unit := unit_of(item.nodeid)) in LONGEST:
            return 0, LONGEST.index(unit)
        return (1 if item.path.suffix == ".ipynb" or item.get_closest_marker("slow") else 2), 0

    for item in items:
        starts = "start_gateway" in getattr(item, "fixturenames", ())
        if starts or item.path.stem.removeprefix("test_") in SLOW:
            item.add_marker("slow")
    items.sort(key=place)


# -- Fixtures -----------------------------------------------------------------


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[gateway.EmbeddedStore]:
    """One embedded Valkey server for the whole run of this worker."""
    embedded = gateway.EmbeddedStore(str(tmp_path_factory.mktemp("store")))
    yield embedded
    embedded.stop()


@pytest.fixture
def storage(store: gateway.EmbeddedStore) -> gateway.Storage:
    """The embedded store, empty."""
    storage = gateway.Storage(store.url)
    storage._run("FLUSHALL")
    return storage


@pytest.fixture(scope="session")
def keys_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a key pair and a master secret, made once for all tests."""
    folder = str(tmp_path_factory.mktemp("keys"))
    settings = gateway.Settings(keys_dir=folder, data_dir=folder)
    gateway.load_signing_key(settings)
    gateway.load_master_secret(settings)
    return folder


@pytest.fixture
def make_app(
    storage: gateway.Storage, keys_dir: str, tmp_path: Path
) -> Callable[..., gateway.GatewayApp]:
    """Build an application over the (empty) store: ``make_app(code_tries=5, clock=…)``."""

    def make(**options: Any) -> gateway.GatewayApp:
        injected = {k: options.pop(k) for k in ("clock", "random_bytes") if k in options}
        values: dict[str, Any] = {"keys_dir": keys_dir, "data_dir": str(tmp_path)}
        values |= {"resend_gaps_s": AT_ONCE, **WIDE, **options}
        app = gateway.create_app(gateway.Settings(**values), storage.url, **injected)
        if app.gateway.sms.outbox:
            app.gateway.sms.outbox.console = None
        return app

    return make


@pytest.fixture
def make_client(make_app: Callable[..., gateway.GatewayApp]) -> Callable[..., WsgiClient]:
    """A client of a fresh application, called in this process under ``wsgiref.validate``."""

    def make(**options: Any) -> WsgiClient:
        return WsgiClient(make_app(**options))

    return make


@pytest.fixture(scope="session")
def app(
    store: gateway.EmbeddedStore, keys_dir: str, tmp_path_factory: pytest.TempPathFactory
) -> gateway.GatewayApp:
    """One application with default settings: loading its keys takes 40 ms, so it is shared."""
    data_dir = str(tmp_path_factory.mktemp("shared"))
    settings = gateway.Settings(keys_dir=keys_dir, data_dir=data_dir, resend_gaps_s=AT_ONCE)
    app = gateway.create_app(settings, store.url)
    assert app.gateway.sms.outbox
    app.gateway.sms.outbox.console = None
    return app


@pytest.fixture
def client(app: gateway.GatewayApp, storage: gateway.Storage) -> WsgiClient:
    """A client of the shared application, over an empty store and outbox."""
    assert app.gateway.sms.outbox
    for path in app.gateway.sms.outbox.folder.glob("*"):
        path.write_bytes(b"")  # it stays open
    app.gateway._checked_s = -gateway.HEARTBEAT_S  # what the test before was told is not kept
    return WsgiClient(app)


@pytest.fixture
def session(client: WsgiClient) -> WsgiClient:
    """A client with a session that has asked for nothing yet."""
    client.register()
    return client


@pytest.fixture
def start_gateway(tmp_path: Path) -> Iterator[Callable[..., GatewayProcess]]:
    """Start real ``python gateway.py`` processes: ``start_gateway("--workers", "2")``."""
    started: list[GatewayProcess] = []

    def start(*options: str, **kwargs: Any) -> GatewayProcess:
        started.append(GatewayProcess(tmp_path, *options, **kwargs))
        return started[-1]

    yield start
    for process in started:
        process.close()


@pytest.fixture(scope="session")
def site_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages, built once by the commands of ``make docs`` over what was there before."""
    above = tmp_path_factory.mktemp("site")
    folder = above / "docs"
    folder.mkdir()
    (folder / "left-over.html").write_text("from an earlier time")
    (above / "venv").symlink_to(Path(sys.executable).parent.parent)  # its path may hold a space
    variables = (f"DOCS={folder}", f"BUILD={above}/build", f"BIN={above}/venv/bin")
    make = ["make", "-n", "docs", *variables]
    told = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for line in told.splitlines():
        if str(above) in line:  # and not what would install packages
            done = subprocess.run(line, shell=True, cwd=ROOT, capture_output=True, text=True)
            assert (done.returncode, done.stderr) == (0, ""), line
    return folder


@pytest.fixture
def queued_log() -> Iterator[Callable[[int], gateway.QueuedLog]]:
    """A log of its own: ``queued_log(file)``.

    Its thread may still write after the test. So it gets a descriptor that is closed only once the
    thread has ended: another file could have the number by then, and would get the lines.
    """
    made: list[gateway.QueuedLog] = []

    def make(file: int) -> gateway.QueuedLog:
        made.append(gateway.QueuedLog(os.dup(file)))
        return made[-1]

    yield make
    for log in made:
        log.flush()
        if not log._writer.is_alive():
            os.close(log._file)


@pytest.fixture
def make_lab() -> Iterator[Callable[..., lab.Lab]]:
    """A gateway in this process behind a real socket, as the notebooks use it."""
    made: list[lab.Lab] = []

    def make(**settings: Any) -> lab.Lab:
        made.append(lab.Lab(**settings))
        return made[-1]

    yield make
    for one in made:
        one.close()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Name the stores that this machine has not got, in one line; keep what failed for again.py."""
    failed = [r.nodeid for kind in ("failed", "error") for r in terminalreporter.getreports(kind)]
    if hasattr(config, "cache"):
        config.cache.set("failed", failed)
    if missing := servers.left_out():
        terminalreporter.write_line(missing)
