"""The pages that ``make docs`` builds: complete, linked, and without a need for any network."""

from __future__ import annotations

import html
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import conf
import pytest

import gateway

ROOT = Path(__file__).resolve().parent.parent
PARTS = {"Learn", "Integrate", "Operate", "Read"}


class Page(HTMLParser):
    """What a page contains, as far as links and loading are concerned."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.alts: list[str] = []
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
            elif name == "alt":
                self.alts.append(value or "")
            elif name == "role" and value == "img":
                self.alts.append(dict(attrs).get("aria-label") or "")
            assert not name.startswith("on"), "a script"


@pytest.fixture(scope="module")
def site(site_folder: Path) -> dict[str, Page]:
    files = site_folder.rglob("*.html")
    return {path.relative_to(site_folder).as_posix(): Page(path) for path in files}


def test_every_source_has_its_page_and_every_page_leads_to_all(site: dict[str, Page]) -> None:
    folder = ROOT / "notebooks"
    sources = [*folder.glob("[0-9]*.ipynb"), *folder.glob("*.md")]
    sources += [path for part in PARTS for path in (folder / part.lower()).glob("*.md")]
    wanted = {path.relative_to(folder).with_suffix(".html").as_posix() for path in sources}
    assert set(site) == wanted | {"search.html"}
    for name, page in site.items():
        here = set(
            re.findall(r'<p class="caption"[^>]*><span class="caption-text">(\w+)', page.text)
        )
        assert here == PARTS
        led = {resolved(name, link)[0] for link in page.links}
        assert wanted <= led | {name}, name


def resolved(name: str, link: str) -> tuple[str, str]:
    """The page and the anchor that a link on the page ``name`` leads to."""
    path, _, anchor = unquote(link).partition("#")
    there = os.path.normpath(os.path.join(os.path.dirname(name), path)) if path else name
    return there, anchor


def test_every_link_leads_somewhere(site: dict[str, Page], site_folder: Path) -> None:
    broken = []
    for name, page in site.items():
        for link in page.links:
            if link.startswith("https://"):
                continue  # for people who are online; nothing is loaded from there
            path, anchor = resolved(name, link)
            if path.startswith("_downloads/") and (site_folder / path).is_file():
                continue
            target = site.get(path)
            if target is None or (anchor and anchor not in target.ids):
                broken.append(f"{name}: {link}")
    assert broken == []


def test_nothing_is_loaded_from_anywhere(site: dict[str, Page], site_folder: Path) -> None:
    """And where this test is blind, the Content-Security-Policy makes the browser refuse."""
    for name, page in site.items():
        for load in page.loads:
            path, _ = resolved(name, load.partition("?")[0])
            assert (site_folder / path).is_file() or load.startswith("#"), (name, load)
        assert not {"iframe", "object", "video", "audio"} & set(page.tags)
        assert f'content="{conf.POLICY}"' in page.text
    for style in site_folder.rglob("*.css"):
        text = style.read_text("utf-8")
        assert "@import" not in text
        urls = re.findall(r"url\([\"']?([^)\"']+)", text)
        assert {url.partition(":")[0] for url in urls} <= {"data", "check-solid.svg"} | {
            url for url in urls if (style.parent / url).is_file()
        }


def test_the_policy_lets_nothing_in_from_a_network() -> None:
    allowed = {word for part in conf.POLICY.split("; ") for word in part.split()[1:]}
    assert conf.POLICY.startswith("default-src 'none'")
    assert allowed == {"'none'", "'self'", "file:", "data:", "'unsafe-inline'"}


def test_the_reference_is_complete(site: dict[str, Page]) -> None:
    assert {route.handler for route in gateway.ROUTES} <= site["integrate/endpoints.html"].ids
    shown = re.findall(r"<tr.*?</tr>", site["integrate/endpoints.html"].text, re.S)[1:]
    rows = [
        html.unescape(re.sub("<[^>]+>", " ", row.replace("<wbr>", ""))).split() for row in shown
    ]
    assert len(rows) == len(gateway.ROUTES)
    for route, row in zip(gateway.ROUTES, rows, strict=True):
        methods = route.methods.split()
        assert [word.rstrip(",") for word in row[: len(methods)]] == methods
        assert row[len(methods)] == route.path
        assert row[-1] + route.path == gateway.versioned(route.path)
        assert ("yes" in row) == route.hawk
    errors = {error.__name__ for error in gateway.error_classes()}
    assert errors <= site["integrate/errors.html"].ids
    assert "safe to repeat" in site["integrate/errors.html"].text
    assert gateway.declared(gateway.Settings).keys() <= site["operate/settings.html"].ids
    for name, page in site.items():
        if name[:2].isdigit():
            assert any(link.startswith("read/gateway.html#L") for link in page.links), name


def test_every_field_and_error_of_every_endpoint_is_on_its_page(site: dict[str, Page]) -> None:
    page = site["integrate/fields.html"]
    parts = re.split('<span id="(\\w+)">', page.text)
    there = dict(zip(parts[1::2], parts[2::2], strict=True))
    for route in gateway.ROUTES:
        part = html.unescape(there[route.handler]).replace("’", "'")
        fields = [*gateway.ANSWERS.get(route.answer, {"properties": {}})["properties"]]
        for field in fields + [name for body in route.body for name in gateway.declared(body)]:
            assert f">{field}</span>" in part, (route.path, field)
        for error in gateway.route_errors(route, route.methods.split()[-1]):
            assert f"{error.status}/{error.errno}" in part or not error.errno, (route.path, error)
            assert re.sub(r"\\(.)", r"\1", conf.todo(error)) in part
    for error in gateway.error_classes():
        assert conf.todo(error), error


@pytest.mark.parametrize("name", ["gateway", "lab"])
def test_the_source_is_whole_and_each_line_has_its_anchor(site: dict[str, Page], name: str) -> None:
    path = ROOT / {"gateway": "gateway.py", "lab": "notebooks/lab.py"}[name]
    page, lines = site[f"read/{name}.html"], path.read_text("utf-8").splitlines()
    rows = re.split(r'<a id="L(\d+)"></a>', page.text)[1:]
    shown = {int(n): row.partition("\n")[0] for n, row in zip(rows[::2], rows[1::2], strict=True)}
    for n, line in enumerate(lines, 1):
        text = re.sub(
            r'^<a href="#L\d+"><span class="linenos">.*?</span></a>', "", shown.pop(n, "")
        )
        assert html.unescape(re.sub("<[^>]+>", "", text)).rstrip() == line.rstrip(), n
    assert shown == {}


def test_sections_lead_to_their_code(site: dict[str, Page]) -> None:
    page, lines = site["read/gateway.html"], (ROOT / "gateway.py").read_text("utf-8").splitlines()
    assert {f"#section-{n}" for n in range(16)} <= set(page.links)
    assert len(conf.sections()) == 15
    for title, (start, question) in conf.sections().items():
        assert lines[start - 1 : start + 1] == ["# " + "=" * 77, f"# {title}"]
        assert html.escape(question, quote=False) in page.text


def test_names_lead_to_their_lines(site: dict[str, Page]) -> None:
    lines = (ROOT / "gateway.py").read_text("utf-8").splitlines()
    found = conf.definitions()
    for name, line in found.items():
        assert name.rpartition(".")[2] in lines[line - 1] or lines[line - 1][:1] == "@"
    assert f"read/gateway.html#L{found['short_code']}" in site["04_codes.html"].links
    assert f"gateway.html#L{found['short_code']}" in site["read/names.html"].links


def test_lessons_show_what_they_printed_and_their_pictures(site: dict[str, Page]) -> None:
    page = site["04_codes.html"]
    assert "16777216 inputs give 1000000 PINs, of a million" in page.text
    assert "Half of all PINs of 2014 began with 1. % of PINs, first digit" in page.alts
    assert all(text for other in site.values() for text in other.alts)


def test_names_are_explained_by_letter(site: dict[str, Page]) -> None:
    page = site["read/names.html"]
    rows = re.findall(r"<tr.*?</tr>", page.text, re.S)
    told = [re.findall(r"<t[dh].*?>(.*?)</t[dh]>", row, re.S) for row in rows if "<td" in row]
    cells = [[html.unescape(re.sub("<[^>]+>", "", cell)).strip() for cell in row] for row in told]
    described = {name for name, text in conf.descriptions().items() if text and name[:1] != "_"}
    assert {row[0] for row in cells} == described & conf.definitions().keys()
    assert all(row[2] for row in cells)
    kinds = {row[0]: row[1] for row in cells}
    assert kinds["Gateway"] == "class, §13"
    assert kinds["WrongCode"] == "error, §2"
    assert kinds["short_code"] == "function, §7"
    assert kinds["RECORD"] == "constant, §10"
    assert [row[0].lower() for row in cells] == sorted(row[0].lower() for row in cells)
    assert {f"#names-{name[0]}".lower() for name in kinds} <= {link.lower() for link in page.links}


def test_a_word_of_the_glossary_is_linked_at_its_first_use(site: dict[str, Page]) -> None:
    there = r'href="learn/glossary\.html#(term-[\w.-]+)" title="([^"]+)">([^<]+)'
    first = f'<a class="term-link[^>]*{there}'
    linked = {}
    for name, page in site.items():
        found = re.findall(first, page.text)
        assert not found or name[:2].isdigit()
        assert len({anchor for anchor, _, _ in found}) == len(found), "once"
        linked[name[:2]] = {word: says for _, says, word in found}
        for _, _, word in found:
            texts = re.sub(r"(?s)<(h\d|code|pre|svg|summary|head|nav)\b.*?</\1>|<a (?!class=\"term)"
                           r".*?</a>", "", page.text)  # fmt: skip
            paragraphs = " ".join(
                re.findall(r"(?s)<(?:p|td)(?![^>]* style)\b.*?</(?:p|td)>", texts)
            )
            place = re.search(rf"(?<![\w/-]){re.escape(word)}(?![\w-])", paragraphs)
            assert place, (name, word)
            assert paragraphs[: place.start()].rpartition("<")[2].startswith('a class="term-link')
    assert "HMAC" in linked["01"]
    assert "nonce" in linked["02"]
    assert "relying party" in linked["00"]
    assert "E.164" in linked["03"]
    assert "AES-SIV" in linked["08"]
    assert "GCRA" in linked["13"]
    assert linked["02"]["nonce"] == "A value that is used only once."
    everywhere = {anchor for page in site.values() for anchor, _, _ in re.findall(first, page.text)}
    assert len(everywhere) >= 25


def test_a_lesson_can_be_taken_home_and_its_headings_need_no_numbers(
    site: dict[str, Page], site_folder: Path
) -> None:
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        page = site[path.with_suffix(".html").name]
        (file,) = (link for link in page.links if link.endswith(".ipynb"))
        assert (site_folder / unquote(file)).read_bytes() == path.read_bytes()
        assert re.search(r"\d+ minutes to read\.", page.text)
        assert page.text.count("<details") == 1, "only the first cell is folded up"
        titles = re.findall(r'<section id="([^"]+)">\n(?:<span.*?</span>)?<h2>', page.text)
        assert len(titles) > 4
        assert not [title for title in titles if re.match(r"\d|id\d", title)]


def test_the_head_says_what_a_page_is_about(site: dict[str, Page]) -> None:
    for name, page in site.items():
        metas = dict(re.findall(r'<meta (?:name|property)="([^"]+)" content="([^"]*)"', page.text))
        assert metas["description"] == metas["og:description"] != ""
        assert metas["og:title"], name
        assert re.search(r'<link rel="(?:shortcut )?icon" href="[^"]*_static/icon.svg"', page.text)
    assert "phone number" in site["index.html"].text.partition('name="description"')[2][:120]
    asks = "What does Redis hold, what does a user cost"
    assert asks in site["08_storage.html"].text.partition('name="description"')[2][:120]


def test_what_lessons_print_as_tables_are_tables(site: dict[str, Page]) -> None:
    page = site["11_running_your_own.html"]
    assert '<div class="table-wrapper"><table class="docutils">' in page.text
    assert page.text.count('<td style="text-align: left">code_ttl_s</td>') == 1
    assert '<td style="text-align: right">' in site["08_storage.html"].text


def test_diagrams_are_drawn_and_told(site: dict[str, Page]) -> None:
    for name, page in site.items():
        if name[:2].isdigit():
            assert 'class="diagram"' in page.text, name
    told = [text for text in site["00_the_whole_flow.html"].alts if "POST /register" in text]
    assert "client to gateway: POST /register. a session token, once." in told[0]
    assert "phone to client: a person types the code from the phone." in told[0]
    assert told[0] in site["index.html"].alts


def test_nothing_of_this_machine_shows(site: dict[str, Page], site_folder: Path) -> None:
    for page in site.values():
        assert 'class="output stderr' not in page.text
        assert 'class="output traceback' not in page.text
    for path in site_folder.rglob("*"):
        if path.is_file():
            assert str(ROOT).encode() not in path.read_bytes(), path


def test_what_is_made_is_escaped() -> None:
    assert conf.plain("a ``<b>`` & *c* | <d>") == r"a `<b>` & \*c\* \| \<d\>"
    assert conf.plain("``a|b``") == r"`a\|b`"
    assert conf.summary(None) == ""
    assert conf.summary("One,\n    two.\n\n    More.") == "One, two."


def test_every_link_of_the_readme_leads_somewhere() -> None:
    for link in re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text("utf-8")):
        path, _, anchor = link.partition("#")
        if "://" not in path:
            text = (ROOT / path).read_text("utf-8")
            titles = re.findall(r"(?m)^#+ (.+)$", text)
            slugs = [re.sub("[^a-z0-9 -]", "", t.lower()).replace(" ", "-") for t in titles]
            assert not anchor or anchor in slugs, link
