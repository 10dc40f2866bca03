"""The pages in a real browser: whole, readable, and silent, on a desk, a phone and paper."""

from __future__ import annotations

import html
import mimetypes
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import browser
import conf
import lab
import pytest

browser.require()

PAPER_PX = 718
"""A4 without Chromium's own margins of 1 cm, at 96 pixels per inch."""
VIEWS = {"desk and paper": [(1280, "screen"), (PAPER_PX, "print")], "phone": [(390, "screen")]}
"""Width and medium. What a page looks like on paper needs no loading again; a phone does."""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser.chromium() as started:
        yield started


def is_in(folder: Path, url: str) -> bool:
    """Whether a URL is that of a file which is there; all else would come from somewhere."""
    path = unquote(urlsplit(url).path)
    return url.startswith(folder.as_uri() + "/") and Path(path).is_file()


@pytest.mark.parametrize("where", VIEWS)
def test_every_page_is_whole_and_silent(chromium: Any, site_folder: Path, where: str) -> None:
    amiss, files = [], sorted(site_folder.rglob("*.html"))
    with browser.tab(chromium, VIEWS[where][0][0]) as (page, requests):
        for file in files:
            page.goto(file.as_uri())
            for width, media in VIEWS[where]:
                if page.viewport_size["width"] != width:
                    page.set_viewport_size({"width": width, "height": 900})
                for scheme in ("light", "dark"):  # it follows the system at any time
                    page.emulate_media(media=media, color_scheme=scheme)
                    seen = browser.look(page, width, media, colors=scheme == "dark")
                    amiss += [f"{file.name}, {media}, {scheme}: {what}" for what in seen]
    assert amiss == []
    assert {url for url in requests if not is_in(site_folder, url)} == set()
    assert {file.as_uri() for file in files} <= set(requests)


def test_dark_is_dark_and_paper_is_white(chromium: Any, site_folder: Path) -> None:
    """So that the views above are what they say."""
    paper = {}
    for scheme in ("light", "dark"):
        with browser.tab(chromium, 1280, color_scheme=scheme) as (page, _):
            page.goto((site_folder / "index.html").as_uri())
            for media in ("screen", "print"):
                page.emulate_media(media=media)
                color = page.evaluate("getComputedStyle(document.body).backgroundColor")
                paper[scheme, media] = color
    assert paper["light", "screen"] == paper["light", "print"] == "rgb(255, 255, 255)"
    assert paper["dark", "print"] == "rgb(255, 255, 255)"
    assert max(map(int, paper["dark", "screen"][4:-1].split(","))) < 40


FAULTS = {
    "<p style='width: 900px'>wide": {"scrolls sideways", "beyond the window", "cut off"},
    "<div style='overflow: hidden'><p style='width: 900px'>wide": {"beyond the window", "cut off"},
    "<div style='overflow: hidden; width: 9em'><pre>aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa": {"cut off"},
    "<img src=none.png width=20 height=20>": {"a bad picture", "none.png"},
    "<div style='background: #fdd'>Traceback": {"a red box"},
    "<div class='output stderr'>warning": {"an error"},
    "<p style='color: #999'>faint": {"hard to read"},
    "<img src=https://shop.example/a.png width=20 height=20>": {"a bad picture", "shop.example"},
    "<script src=https://shop.example/a.js></script>": {"shop.example"},
    "<style>@import 'https://shop.example/a.css'</style>": {"shop.example"},
    "<style>p { background: url(//shop.example/a.png) }</style><p>x": {"shop.example"},
    "<script>new Image().src = 'http://127.0.0.1:9/x'</script>": {"127.0.0.1:9"},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_browser_sees_what_is_wrong(chromium: Any, tmp_path: Path, fault: str) -> None:
    """A checker that cannot see is none: each fault is found, and nothing else."""
    file = tmp_path / "page.html"
    head = "<!doctype html><meta name=viewport content='width=device-width'>"
    file.write_text(f"{head}<main style='max-width: 50rem; overflow-wrap: anywhere'>{fault}")
    with browser.tab(chromium, 390) as (page, requests):
        page.goto(file.as_uri())
        found = [what.partition(":")[0] for what in browser.look(page, 390)]
    loads = [url.removeprefix(file.parent.as_uri()).split("/") for url in requests[1:]]
    found += [parts[1] if parts[0] == "" else parts[2] for parts in loads]
    assert set(found) == FAULTS[fault]


def test_a_refused_request_is_seen_too(chromium: Any, site_folder: Path, tmp_path: Path) -> None:
    """The Content-Security-Policy would hide a mistake from users; it hides none from us."""
    whole = (site_folder / "index.html").read_text("utf-8")
    shutil.copytree(site_folder / "_static", tmp_path / "_static")
    (tmp_path / "page.html").write_text(whole + "<img src='https://shop.example/a.png'>")
    with browser.tab(chromium, 1280) as (page, requests):
        failed = []
        page.on("requestfailed", lambda request: failed.append((request.url, request.failure)))
        page.goto((tmp_path / "page.html").as_uri())
    assert failed == [("https://shop.example/a.png", "csp")]
    assert [url for url in requests if not url.startswith("file:")] == [failed[0][0]]


FOUND_FIRST = {
    "nonce": "learn/glossary.html#term-Nonce",
    "429": "integrate/errors.html#TooManyCodes",
    "sends_per_number": "operate/settings.html#sends_per_number",
    "verify_code": "integrate/fields.html#sms_verify_code",
    "relying party": "learn/glossary.html#term-Relying-party",
    "115": "integrate/errors.html#TooManyToNumber",
}


@pytest.mark.parametrize("words", FOUND_FIRST)
def test_search_finds_the_right_page_first(chromium: Any, site_folder: Path, words: str) -> None:
    with browser.tab(chromium, 1280) as (page, requests):
        page.goto((site_folder / "operate/run.html").as_uri())
        page.fill("input[name=q]", words)
        page.keyboard.press("Enter")
        page.wait_for_selector("#search-results li")
        first = page.eval_on_selector("#search-results li a", "a => a.getAttribute('href')")
        assert first == FOUND_FIRST[words]
        page.click("#search-results li a")
        page.wait_for_selector(":target", state="attached")
        assert page.url == f"{site_folder.as_uri()}/{first}"
        assert {url for url in requests if not is_in(site_folder, url)} == set()


AXE = lab.ROOT / ".parts/axe/node_modules/axe-core/axe.min.js"
WCAG = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]
RUN_AXE = """tags => axe.run({runOnly: tags, resultTypes: ["violations"]}).then(
  said => ({passes: said.passes.length, violations: said.violations}))"""
"""Without the thousands of elements that pass, whose description takes longer than the search."""
JUDGED = [
    "index.html", "08_storage.html", "integrate/fields.html", "operate/settings.html",
    "read/names.html", "search.html",
]  # fmt: skip


@pytest.mark.skipif(not AXE.exists(), reason="npm install --prefix .parts/axe axe-core@4.14.1")
@pytest.mark.parametrize("name", JUDGED)
def test_axe_finds_nothing_against_wcag(chromium: Any, site_folder: Path, name: str) -> None:
    """WCAG 2.1, A and AA, as axe-core judges it: on a desk in light, on a phone in dark."""
    for width, scheme in ((1280, "light"), (390, "dark")):
        with browser.tab(chromium, width, color_scheme=scheme) as (page, _):
            page.goto((site_folder / name).as_uri())
            page.add_script_tag(path=str(AXE))
            said = page.evaluate(RUN_AXE, WCAG)
            assert said["passes"], "it has looked"
            amiss = [(v["id"], n["html"][:120]) for v in said["violations"] for n in v["nodes"]]
            assert amiss == [], (width, scheme)


def test_the_pages_work_under_the_policy_that_they_name(chromium: Any, site_folder: Path) -> None:
    """Served by a web server that sends it; a picture from elsewhere shows that it is in force."""
    policy = conf.SERVED_POLICY
    index = (site_folder / "index.html").read_text("utf-8")
    assert f"Content-Security-Policy: {policy}" in html.unescape(index)

    def app(environ: Any, start: Any) -> list[bytes]:
        file = site_folder / environ["PATH_INFO"].lstrip("/")
        kind = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
        start("200 OK", [("Content-Type", kind), ("Content-Security-Policy", policy)])
        return [file.read_bytes()]

    said: list[str] = []
    with lab.serving(app) as address, browser.tab(chromium, 1280) as (page, requests):
        page.on("console", lambda line: said.append(line.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        for name in ("index.html", "02_hawk.html", "read/gateway.html"):
            page.goto(f"{address}/{name}")
        page.fill("input[name=q]", "nonce")
        page.keyboard.press("Enter")
        page.wait_for_selector("#search-results li")
        assert said == []
        assert {urlsplit(url).netloc for url in requests} == {urlsplit(address).netloc}
        page.evaluate("new Image().src = 'https://shop.example/a.png'")
        page.wait_for_timeout(100)
        assert "violates the following" in said[0]


def test_names_can_be_filtered(chromium: Any, site_folder: Path) -> None:
    with browser.tab(chromium, 1280) as (page, _):
        page.goto((site_folder / "read/names.html").as_uri())
        every = page.locator("tbody tr:visible").count()
        page.fill("#name-filter", "hawk_mac")
        shown = page.locator("tbody tr:visible td:first-child").all_inner_texts()
        assert "hawk_mac" in shown
        assert 1 <= len(shown) < every
        page.fill("#name-filter", "")
        assert page.locator("tbody tr:visible").count() == every


def test_what_scrolls_shows_it_and_is_reached_by_the_keyboard(
    chromium: Any, site_folder: Path
) -> None:
    with browser.tab(chromium, 390) as (page, _):
        page.goto((site_folder / "11_running_your_own.html").as_uri())
        box = page.locator(".cell_output .table-wrapper").first
        assert "goes-on" in box.get_attribute("class")
        assert box.get_attribute("tabindex") == "0"
        box.evaluate("box => { box.scrollLeft = 9999 }")
        page.wait_for_timeout(200)  # the policy refuses what playwright would poll with
        assert "goes-on" not in box.get_attribute("class")


def test_search_finds_from_disk(chromium: Any, site_folder: Path) -> None:
    with browser.tab(chromium, 1280) as (page, requests):
        page.goto((site_folder / "index.html").as_uri())
        page.fill("input[name=q]", "parse_hawk_header")
        page.keyboard.press("Enter")
        page.wait_for_selector("#search-results li")
        found = page.eval_on_selector_all("#search-results li a", "all => all.map(a => a.href)")
        assert "read/gateway.html" in " ".join(found)
        assert "02_hawk.html" in " ".join(found)
        assert {url for url in requests if not is_in(site_folder, url)} == set()


def test_a_listing_is_copied_without_its_prompts(chromium: Any, site_folder: Path) -> None:
    with browser.tab(chromium, 1280) as (page, _):
        page.add_init_script(
            "window.copied = []; addEventListener('copy', event => "
            "copied.push(document.activeElement.value ?? String(getSelection())), true)"
        )
        page.goto((site_folder / "index.html").as_uri())
        page.locator("button.copybtn").first.click(force=True)
        text = page.wait_for_function("copied[0]").json_value()
    assert text.startswith("make runserver")
    assert "$" not in text


def test_the_reader_chooses_light_or_dark(chromium: Any, site_folder: Path) -> None:
    """The button goes from what the system says to one and to the other."""
    with browser.tab(chromium, 1280, color_scheme="light") as (page, _):
        page.goto((site_folder / "index.html").as_uri())
        seen = set()
        for _ in range(3):
            page.locator(".theme-toggle:visible").click()
            seen.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(seen) == 2
