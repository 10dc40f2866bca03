"""The form of the notebooks. What they print is compared by nbval, in the same run."""

from __future__ import annotations

import ast
import base64
import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import lab
import pytest
from servers import wait_for
from test_shape import LINES, banners, definitions
from urllib3 import HTTPHeaderDict

import gateway

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks"
ALL = sorted(path.name for path in FOLDER.glob("*.ipynb"))
LESSONS = [name for name in ALL if name != "TEMPLATE.ipynb"]
HEADINGS = ["Check", "What can go wrong", "Try it yourself", "Where in the code"]
each = pytest.mark.parametrize("name", ALL)
each_lesson = pytest.mark.parametrize("name", LESSONS)


@cache
def notebook(name: str) -> Any:
    return json.loads((FOLDER / name).read_text("utf-8"))


def cells(name: str, kind: str) -> list[str]:
    found = notebook(name)["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


def code_cells(name: str) -> list[Any]:
    return [cell for cell in notebook(name)["cells"] if cell["cell_type"] == "code"]


def outputs(name: str) -> list[Any]:
    return [output for cell in code_cells(name) for output in cell["outputs"]]


def printed(name: str) -> str:
    """All text that the outputs show."""
    texts = []
    for output in outputs(name):
        texts += output.get("text", output.get("data", {}).get("text/plain", []))
    return "".join(texts)


COLOURS = {lab.BLUE, lab.ORANGE, lab.GREEN, lab.GREY}


def pictures(name: str) -> str:
    """The SVG of all outputs."""
    found = (o.get("data", {}).get("image/svg+xml", []) for o in outputs(name))
    return "".join("".join(svg) for svg in found)


def everything(name: str) -> str:
    return "\n".join(cells(name, "markdown") + cells(name, "code")) + printed(name)


# -- Each notebook ------------------------------------------------------------


@each
def test_it_has_the_form_of_the_template(name: str) -> None:
    texts = cells(name, "markdown")
    number = name[:2] if name in LESSONS else "NN"
    first = texts[0]
    assert re.match(rf"# {number} · \S.*\n\n\*\*Question\.\*\* [^?]+\?", first)
    assert first.index("**You will**") < first.index("**You need**") < first.index("```\n")
    assert len(re.findall(r"^- [a-z].*", first, re.M)) == 3
    diagram = first.split("```")[1].split("\n")
    assert max(map(len, diagram)) <= 75, "wider than a phone can show"
    headings = [line[3:] for text in texts for line in text.split("\n") if line[:3] == "## "]
    assert [h for h in headings if h in HEADINGS] == HEADINGS == headings[-4:]
    numbered = [heading.partition(".")[0] for heading in headings[:-4]]
    assert numbered == [str(n + 1) for n in range(len(numbered))]


@each
def test_it_was_executed_in_order_and_without_trouble(name: str) -> None:
    assert [cell["execution_count"] for cell in code_cells(name)] == [
        *range(1, len(code_cells(name)) + 1)
    ]
    assert {o["output_type"] for o in outputs(name)} <= {"stream", "display_data"}
    assert {o.get("name", "stdout") for o in outputs(name)} <= {"stdout"}  # no red boxes
    kernel = notebook(name)["metadata"]["kernelspec"]
    assert kernel == {"display_name": "Python 3", "language": "python", "name": "python3"}


@each
def test_nothing_in_it_varies(name: str) -> None:
    """No place, port or time of one machine; no cell that is not compared."""
    shown = printed(name)
    assert not re.search(r"/(tmp|home|root|Users|work)/|0x[0-9a-f]{9,}", shown)
    assert set(re.findall(r"(?:127\.0\.0\.1|localhost)(?: port |:)(\d+)", shown)) <= {"5000"}
    source = "\n".join(cells(name, "code"))
    assert "NBVAL" not in source
    assert "%" not in {line[:1] for line in source.split("\n")}
    for cell in notebook(name)["cells"]:
        assert cell["metadata"] == {}, "no tags, no times"
    assert not re.search(r";\s*$", source, re.M)  # shown by nbconvert, not by nbval
    images = [key for o in outputs(name) for key in o.get("data", {}) if key.startswith("image/")]
    assert set(images) <= {"image/svg+xml"}  # which is compared, as PNG is not
    assert not re.search("<metadata|dc:date|DejaVu", pictures(name))
    assert set(re.findall(r"#[0-9a-f]{6}", pictures(name))) <= COLOURS | {"#757575"}


@each_lesson
def test_it_keeps_to_the_budget(name: str) -> None:
    texts, codes = cells(name, "markdown"), cells(name, "code")
    words = sum(len(text.split()) for text in texts)
    lines = [line for code in codes for line in code.split("\n")]
    assert 11 <= len(texts) <= 30
    assert 11 <= len(codes) <= 30
    assert 650 <= words <= 2000
    assert 50 <= len(lines) <= 200
    assert 5 <= words / len(lines) <= 18, "words per line of code"
    assert max(map(len, lines)) <= 100
    assert max(code.count("\n") + 1 for code in codes) <= 22
    assert sum("image/svg+xml" in o.get("data", {}) for o in outputs(name)) <= 6
    assert (FOLDER / name).stat().st_size <= 300_000
    kinds = "".join(cell["cell_type"][0] for cell in notebook(name)["cells"])
    assert "cccc" not in kinds


@each
def test_its_exercises_can_be_checked(name: str) -> None:
    text = next(t for t in cells(name, "markdown") if "## Try it yourself" in t)
    exercises = re.split(r"^\d\. ", text.partition("## Where")[0], flags=re.M)[1:]
    exercises = [" ".join(exercise.split()) for exercise in exercises]
    assert 3 <= len(exercises) <= 5
    assert all("*You are right if" in exercise for exercise in exercises)
    last = exercises[-1]
    assert re.search(r"In `gateway\.py`, section \d+,", last)
    named = re.findall(r"`tests/(test_\w+\.py)(?:::(\w+))?`", last)
    assert named
    for file, test in named:
        assert f"def {test}" in (ROOT / "tests" / file).read_text("utf-8"), last


@each
def test_its_links_lead_somewhere(name: str) -> None:
    for text in cells(name, "markdown"):
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (FOLDER / target).exists(), target


@each
def test_what_it_says_of_the_code_is_there(name: str) -> None:
    """Rows like ``| … | §6 `hawk_mac`, §13 `Gateway.step` |`` name things of that section."""
    defined = definitions()
    starts = sorted((start, number) for number, (start, _) in banners().items())
    by_section = {
        number: "\n".join(LINES[start:end])
        for (start, number), (end, _) in pairwise([*starts, (len(LINES), 0)])
    }
    text = next(t for t in cells(name, "markdown") if "## Where in the code" in t)
    for section, names in re.findall(r"§(\d+) ([^§|]+)", text):
        for thing in re.findall(r"`([^`]+)`", names):
            assert thing.rpartition(".")[2] in by_section[int(section)], f"§{section} {thing}"
            assert defined.get(thing, int(section)) == int(section), f"§{section} {thing}"


# -- All of them --------------------------------------------------------------

SOURCE = (ROOT / "gateway.py").read_text("utf-8")


def public_names() -> list[str]:
    names: list[str] = []
    for node in ast.parse(SOURCE).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [target.id for target in targets if isinstance(target, ast.Name)]
    return [name for name in names if not name.startswith("_")]


def missing_from_the_notebooks(wanted: list[str]) -> list[str]:
    text = "\n".join(map(everything, LESSONS))
    return [w for w in wanted if not re.search(rf"(?<![\w/]){re.escape(w)}(?![\w])", text)]


def test_numbers_have_no_gaps() -> None:
    assert [int(name[:2]) for name in LESSONS] == [*range(len(LESSONS))]


@pytest.mark.slow
def test_every_public_name_appears() -> None:
    assert missing_from_the_notebooks(public_names()) == []


def test_every_errno_appears() -> None:
    assert missing_from_the_notebooks([str(int(errno)) for errno in gateway.Errno]) == []
    assert missing_from_the_notebooks([e.__name__ for e in gateway.error_classes()]) == []


def test_every_setting_appears() -> None:
    assert missing_from_the_notebooks(list(gateway.declared(gateway.Settings))) == []


def test_every_route_appears() -> None:
    assert missing_from_the_notebooks([route.path for route in gateway.ROUTES]) == []


def test_the_readme_lists_them() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    rows = re.findall(r"^\| \[(\d\d · .+?)\]\(notebooks/(\S+)\) \| (.+) \|$", readme, re.M)
    told = []
    for name in LESSONS:
        head = cells(name, "markdown")[0]
        question = re.search(r"\*\*Question\.\*\* (.+)", head)
        assert question
        told.append((head.split("\n")[0][2:], name, question[1]))
    assert rows == told


def test_nothing_is_sanitised() -> None:
    """nbval may rewrite outputs before it compares them; here it need not."""
    assert "sanitize" not in (ROOT / "pyproject.toml").read_text("utf-8")


# -- lab.py -------------------------------------------------------------------


def test_a_table_is_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    lab.table("name two_words", ("a", 1), ("longer", 22))
    assert capsys.readouterr().out.split("\n") == [
        "name    two words", "------  ---------", "a       1", "longer  22", ""
    ]  # fmt: skip
    with pytest.raises(ValueError, match="zip"):
        lab.table("name", ("a", "too many"))


def test_a_table_of_html_puts_numbers_to_the_right() -> None:
    shown = lab.Table(["name", "costs", "part"], [["<a>", "1,000 µs", "12.5 %"], ["b", "7", "-"]])
    rows = re.findall(r'<t[dh] style="text-align: (\w+)">(.*?)</t[dh]>', shown._repr_html_())
    assert rows == [
        *(("left", "name"), ("right", "costs"), ("right", "part")),
        *(("left", "&lt;a&gt;"), ("right", "1,000 µs"), ("right", "12.5 %")),
        *(("left", "b"), ("right", "7"), ("right", "-")),
    ]


@pytest.mark.slow
def test_a_picture_has_the_ink_of_the_text_and_says_what_it_shows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: list[dict[str, str]] = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: shown.append(data))
    axes = lab.figure("It is <so>", "seconds", "µs")
    axes.bar([1], [2], color=lab.BLUE)
    lab.draw(axes)
    lab.draw(axes)
    svg = shown[0]["image/svg+xml"]
    assert svg == shown[1]["image/svg+xml"]
    assert 'aria-label="It is &lt;so&gt;. µs, seconds"' in svg
    assert shown[0]["text/plain"] == "[It is <so>. µs, seconds]"
    assert "currentColor" in svg
    assert set(re.findall("#[0-9a-f]{6}", svg)) == {lab.BLUE, "#757575"}


def test_only_tokens_are_shortened() -> None:
    token, sentence = "x" * 61, "many words " * 10
    assert lab.short({"a": [token, sentence, 5]}) == {
        "a": ["xxxxxxxxxxxx…xxxxxxxx (61 characters)", sentence, 5]
    }
    assert lab.short("x" * 60) == "x" * 60


def test_a_reply_is_shown_with_its_status(capsys: pytest.CaptureFixture[str]) -> None:
    headers = HTTPHeaderDict({"Timestamp": "1"})
    lab.show(lab.Reply(404, headers, {"a": "é"}), "Timestamp", "Other")
    text = '404 Not Found\nTimestamp: 1\nOther: (absent)\n{\n  "a": "é"\n}\n'
    assert capsys.readouterr().out == text
    lab.show(lab.Reply(204, headers, None))
    assert capsys.readouterr().out == "204 No Content\n"


def test_two_labs_of_one_seed_say_the_same(make_lab: Any) -> None:
    def codes(seed: int) -> tuple[str, str]:
        one = make_lab(seed=seed)
        client = one.client()
        token = client.register().body["msisdnSessionToken"]
        client.verify("+447700900123")
        return token, lab.Handset(client, "+447700900123").code()

    assert codes(1) == codes(1)
    assert codes(1) != codes(2)


def test_a_client_notices_a_forged_answer(make_lab: Any) -> None:
    client = make_lab().client()
    client.register()
    client.credentials = client.credentials._replace(hawk_key=gateway.HawkKey(bytes(32)))
    assert client.unregister().status == 401  # refused by the gateway itself
    sent = 'Hawk id="a", ts="1", nonce="n", mac="m"'
    target = gateway.hawk_target("GET", "http://localhost/")
    key = client.credentials.hawk_key
    header = gateway.parse_hawk_header(sent)
    seal = gateway.server_authorization(key, header, target, "text/plain", b"yes")
    assert lab.check_answer(key, sent, seal, target, "text/plain", b"yes")
    assert not lab.check_answer(key, sent, seal, target, "text/plain", b"no")
    assert not lab.check_answer(key, sent, "", target, "text/plain", b"yes")


def test_a_lab_leaves_nothing_behind() -> None:
    one = lab.Lab()
    folder, handlers = one.store.folder, len(gateway.LOG.handlers)
    assert one.redis().ping()
    one.close()
    assert not folder.exists()
    assert len(gateway.LOG.handlers) == handlers - 1


def test_a_closed_lab_says_what_to_do() -> None:
    one = lab.Lab()
    client = one.client()
    phone = lab.Handset(client, "+447700900123")
    client.register()
    one.close()
    for call in (client.register, phone.messages, lambda: phone.text("hello")):
        with pytest.raises(RuntimeError, match=r"gateway is closed.*Run up to Selected Cell"):
            call()


DEEP = "a folder with a long name and spaces/" * 3


def run(code: str, **options: Any) -> subprocess.Popen[str]:
    """A Python of our own that has lab.py."""
    environ = {**os.environ, "PYTHONPATH": str(FOLDER), **options.pop("environ", {})}
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ, **options)


@pytest.mark.slow
def test_a_killed_lab_leaves_nothing_behind(tmp_path: Path) -> None:
    """As nbval and JupyterLab kill kernels whose lab nobody closed; in a folder of any depth."""
    (deep := tmp_path / DEEP).mkdir(parents=True)
    code = "import lab; one = lab.Lab(); print(one.store.folder, flush=True); input()"
    for folder in (tmp_path, deep):
        process = run(code, environ={"TMPDIR": str(folder)}, stdin=subprocess.PIPE)
        with process:
            assert process.stdout
            store = Path(process.stdout.readline().strip())
            assert store.is_dir()
            assert (folder in store.parents) == (folder == tmp_path)
            process.kill()
        wait_for(lambda: not store.parent.exists() or None, "its end", 20)  # noqa: B023


@pytest.mark.slow
def test_a_lesson_that_ends_leaves_nothing_and_does_not_hang(tmp_path: Path) -> None:
    process = run("import lab; lab.Lab().client().register()", environ={"TMPDIR": str(tmp_path)})
    with process:
        assert process.wait(30) == 0
    wait_for(lambda: not list(tmp_path.iterdir()) or None, "its end", 20)


@pytest.mark.slow
def test_a_lesson_repeats_whatever_the_reader_has_set(tmp_path: Path) -> None:
    """Backend and style of matplotlib, a deep TMPDIR: its pictures and tables stay as they are."""
    (deep := tmp_path / DEEP).mkdir(parents=True)
    style = tmp_path / "matplotlibrc"
    style.write_text("axes.facecolor: black\nlines.linewidth: 9\nfont.size: 30\nbackend: svg\n")
    environ = {"MPLBACKEND": "agg", "MATPLOTLIBRC": str(style), "TMPDIR": str(deep)}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
    command += ["--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
    done = subprocess.run(
        [*command, str(FOLDER / "07_certificates.ipynb")],
        env={**os.environ, **environ}, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.slow
def test_lab_is_found_from_any_folder(tmp_path: Path) -> None:
    """By the line that ``make install`` puts into .venv: where we work, else where it lies."""
    line = (FOLDER / "lessons.pth").read_text().replace("@ROOT@", str(ROOT))
    (tmp_path / "lessons.pth").write_text(line)
    (copy := tmp_path / "copy" / "notebooks").mkdir(parents=True)
    shutil.copy(FOLDER / "lab.py", copy)
    shutil.copy(ROOT / "gateway.py", copy.parent)
    (copy.parent / "locale").symlink_to(ROOT / "locale")
    # Without the line in .venv, which another working copy may share and have written.
    code = "import site, sys; sys.path = [p for p in sys.path if not p.endswith('/notebooks')]; "
    code += f"site.addsitedir({str(tmp_path)!r}); import lab; print(lab.__file__)"
    for folder, found in ((ROOT, FOLDER), (copy.parent, copy), (Path("/"), FOLDER)):
        with run(code, cwd=folder, environ={"PYTHONPATH": ""}) as process:
            told = process.communicate()[0]
        assert Path(told.strip()) == found / "lab.py", folder


def test_claims_can_be_read_by_anybody() -> None:
    middle = base64.urlsafe_b64encode(b'{"a": 1}').decode().rstrip("=")
    assert lab.claims(f"x.{middle}.y") == {"a": 1}
    with pytest.raises(ValueError, match="char 0"):
        lab.claims("x.bm8.y")
