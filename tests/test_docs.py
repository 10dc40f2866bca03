"""The pages that ``make docs`` builds: complete, linked, and without a need for any network."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pages
import pytest

import gateway

ROOT = Path(__file__).resolve().parent.parent


class Page(HTMLParser):
    """What a page contains, as far as links and loading are concerned."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.text = path.read_text("utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                assert value not in self.ids, value
                self.ids.add(unquote(value or ""))
            elif name == "href" and tag == "a":
                self.links.append(value or "")
            elif name in ("src", "srcset", "href", "data", "action", "poster", "background"):
                self.loads.append(value or "")
            assert not name.startswith("on"), "a script"


@pytest.fixture(scope="module")
def site(site_folder: Path) -> dict[str, Page]:
    return {path.name: Page(path) for path in site_folder.iterdir()}


def test_every_notebook_has_its_page(site: dict[str, Page]) -> None:
    stems = {path.stem + ".html" for path in (ROOT / "notebooks").glob("*.ipynb")}
    own = {"index.html", "api.html", "names.html", "gateway.html", "lab.html"}
    assert set(site) == stems | own
    assert stems <= set(site["index.html"].links)


def test_every_link_leads_somewhere(site: dict[str, Page]) -> None:
    broken = []
    for name, page in site.items():
        for link in page.links:
            path, _, anchor = unquote(link).partition("#")
            if link.startswith("https://"):
                continue  # for people who are online; nothing is loaded from there
            target = site.get(path or name)
            if target is None or (anchor and anchor not in target.ids):
                broken.append(f"{name}: {link}")
    assert broken == []


def test_nothing_is_loaded_from_anywhere(site: dict[str, Page]) -> None:
    """And where this test is blind, the Content-Security-Policy makes the browser refuse."""
    for page in site.values():
        assert [load[:22] for load in page.loads if load[:22] != "data:image/png;base64,"] == []
        assert not {"script", "iframe", "link", "object", "video", "audio"} & set(page.tags)
        styles = "".join(re.findall(r"<style>.*?</style>", page.text, re.S))
        assert "@import" not in styles
        assert "url(" not in styles
        assert f'content="{pages.POLICY}"' in page.text
        assert pages.POLICY.startswith("default-src 'none'")


def test_the_reference_is_complete(site: dict[str, Page]) -> None:
    api = site["api.html"]
    assert {route.handler for route in gateway.ROUTES} <= api.ids
    assert {error.__name__ for error in gateway.error_classes()} <= api.ids
    assert gateway.declared(gateway.Settings).keys() <= api.ids
    assert {f"section-{n}" for n in range(1, 16)} <= api.ids
    for name in pages.definitions():
        assert f"<code>{name}</code>" in api.text, name
    for name, page in site.items():
        if name[:2].isdigit():
            assert any(link.startswith("gateway.html#L") for link in page.links), name


def test_names_lead_to_their_lines(site: dict[str, Page]) -> None:
    lines = (ROOT / "gateway.py").read_text("utf-8").splitlines()
    found = pages.definitions()
    for name, line in found.items():
        assert name.rpartition(".")[2] in lines[line - 1] or lines[line - 1][:1] == "@"
    assert f"gateway.html#L{found['short_code']}" in site["04_codes.html"].links
    assert f"gateway.html#L{found['short_code']}" in site["names.html"].links


def test_nothing_of_this_machine_shows(site: dict[str, Page]) -> None:
    for page in site.values():
        assert str(ROOT) not in page.text
        assert 'class="output_stderr' not in page.text
        assert "output_error" not in page.text


def test_prose_is_escaped() -> None:
    assert pages.prose("a ``<b>`` & c") == "<p>a <code>&lt;b&gt;</code> &amp; c</p>"
    assert pages.prose(None) == "<p></p>"
    text = "One.\n\nArgs:\n    a: First\n        and more.\n    b: Second.\n\n>>> 1\n1"
    assert pages.prose(text) == (
        "<p>One.</p><p>Args</p><ul><li><b>a</b>: First\n        and more."
        "<li><b>b</b>: Second.</ul><pre>&gt;&gt;&gt; 1\n1</pre>"
    )
