"""Build the pages: the notebooks, an API reference and the source, as a site for reading.

``make docs`` calls it. The pages open from disk and ask no server for anything: styles and
pictures are in them, there are no scripts, and their Content-Security-Policy forbids the rest.
The reference is made from ``gateway.py`` itself, so it cannot say anything else.
"""

from __future__ import annotations

import ast
import html
import inspect
import json
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator
from functools import cache
from http import HTTPStatus
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import nbformat
from nbconvert import HTMLExporter
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import gateway

NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
SOURCES = {"gateway.html": ROOT / "gateway.py", "lab.html": ROOT / "notebooks" / "lab.py"}
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


# -- What there is in gateway.py ----------------------------------------------


@cache
def definitions() -> dict[str, int]:
    """Public names of gateway.py, and public methods as ``Class.name``, with their lines."""
    found: dict[str, int] = {}
    for node in ast.parse((ROOT / "gateway.py").read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node.lineno
        if isinstance(node, ast.ClassDef):
            methods = (child for child in node.body if isinstance(child, ast.FunctionDef))
            found |= {f"{node.name}.{method.name}": method.lineno for method in methods}
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {t.id: node.lineno for t in targets if isinstance(t, ast.Name)}
    return {n: line for n, line in found.items() if not re.search(r"(^|\.)_", n)}


@cache
def sections() -> dict[str, int]:
    """The titles of gateway.py's sections (``5. Session credentials``) and their lines."""
    lines = (ROOT / "gateway.py").read_text("utf-8").splitlines()
    titles = ((line, n) for n, line in enumerate(lines, 1) if re.match(r"# \d+\. ", line))
    return {line[2:]: n for line, n in titles}


@cache
def targets() -> dict[str, str]:
    """Where a word in code type leads to: names to the source, settings and routes to the API."""
    found = {name: f"gateway.html#L{line}" for name, line in definitions().items()}
    found |= {name: f"gateway.html#L{line}" for name, line in _methods()}
    found |= {name: f"api.html#{name}" for name in gateway.declared(gateway.Settings)}
    found |= {route.path: f"api.html#{route.handler}" for route in gateway.ROUTES}
    found |= {"gateway.py": "gateway.html", "lab.py": "lab.html"}
    del found["T"], found["Json"], found["/"]
    return found


def _methods() -> Iterator[tuple[str, int]]:
    """The steps of the protocol without their class, as texts often name them."""
    for name, line in definitions().items():
        if name.startswith("Gateway."):
            yield name.removeprefix("Gateway."), line


# -- Pages --------------------------------------------------------------------


def page(title: str, body: str, narrow: bool = True) -> str:
    """A whole page around ``body``."""
    kind = "narrow" if narrow else "wide"
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{html.escape(title)}</title>
<style>{STYLE}</style>
<nav><a href="index.html"><b>MSISDN Gateway</b></a> <a href="api.html">API</a>
<a href="gateway.html">gateway.py</a> <a href="names.html">Names</a></nav>
<main class="{kind}">
{body}
</main>
</html>
"""


@cache
def head_of(path: Path) -> tuple[str, str]:
    """Title and question of a notebook."""
    first = "".join(nbformat.read(path, 4).cells[0].source)
    question = re.search(r"\*\*Question\.\*\* (.+)", first)
    return first.split("\n")[0].lstrip("# "), question[1] if question else ""


def notebook_page(path: Path) -> str:
    """A notebook as a page, with the ways to its neighbours."""
    exporter = HTMLExporter(template_name="basic", embed_images=True)
    body, _ = exporter.from_notebook_node(nbformat.read(path, 4))
    body = re.sub(r'<div class="(?:prompt|jp-\w*Prompt)[^>]*>.*?</div>', "", body, flags=re.S)
    body = re.sub(r'(href="[\w./-]+)\.(?:ipynb|py)(["#])', r"\1.html\2", body)
    body = re.sub(r"<pre>(?=[^<]*\n-+(  +-+)+\n)", "<pre class=table>", body)
    body = body.replace('alt="No description has been provided for this image"', _ALT)
    around = NOTEBOOKS.index(path) if path in NOTEBOOKS else 0
    ways = []
    for step, mark in ((-1, "←"), (1, "→")):
        if 0 <= around + step < len(NOTEBOOKS):
            other = NOTEBOOKS[around + step]
            text = f"{mark} {head_of(other)[0]}" if step < 0 else f"{head_of(other)[0]} {mark}"
            ways.append(f'<a href="{other.stem}.html">{html.escape(text)}</a>')
    return page(head_of(path)[0], linked(body) + f'<footer class="ways">{"".join(ways)}</footer>')


_ALT = 'alt="A picture; its numbers are printed beside it."'


def linked(body: str) -> str:
    """Make the words in code type links, where they name something (not in listings)."""
    known = targets()

    def link(found: re.Match[str]) -> str:
        if found[1] is None:  # a listing, or a link already
            return found[0]
        target = known.get(html.unescape(found[1]).removeprefix("GatewayApp."))
        return f'<a href="{target}">{found[0]}</a>' if target else found[0]

    return re.sub(r"<pre.*?</pre>|<a .*?</a>|<code>([^<]+)</code>", link, body, flags=re.S)


def source_page(path: Path) -> str:
    """A source file with an anchor at every line."""
    formatter = HtmlFormatter(linenos="inline", anchorlinenos=True, lineanchors="L")
    body = highlight(path.read_text("utf-8"), PythonLexer(stripnl=False), formatter)
    body = body.replace('id="L-', 'id="L').replace('name="L-', 'name="L').replace('"#L-', '"#L')
    contents = ""
    if path.name == "gateway.py":
        rows = (f'<li><a href="#L{n}">{html.escape(t)}</a>' for t, n in sections().items())
        contents = f"<ul class=contents>{''.join(rows)}</ul>"
    return page(path.name, f"<h1>{path.name}</h1>{contents}{body}", narrow=False)


def prose(docstring: str | None) -> str:
    """A docstring as HTML: paragraphs, ``code``, and lists of arguments and errors."""
    text = html.escape(inspect.cleandoc(docstring or ""), quote=False)
    text = re.sub(r"``(.+?)``", r"<code>\1</code>", text)
    parts = []
    for paragraph in text.split("\n\n"):
        head, _, rest = paragraph.partition("\n")
        if paragraph.startswith("&gt;&gt;&gt;"):
            parts.append(f"<pre>{paragraph}</pre>")
        elif re.fullmatch(r"(Args|Raises|Returns|Attributes):", head):
            items = re.split(r"\n(?=    \S)", "\n" + rest)[1:]
            rows = (re.sub(r"^\s+([^:]+):", r"<b>\1</b>:", item) for item in items)
            parts.append(f"<p>{head[:-1]}</p><ul>{''.join(f'<li>{row}' for row in rows)}</ul>")
        else:
            parts.append(f"<p>{paragraph}</p>")
    return "".join(parts)


def endpoints() -> Iterator[str]:
    """Every route: methods, both spellings, what its handler and its step say of themselves."""
    yield '<h2 id="all-endpoints">Endpoints</h2>'
    yield "<p><span class=tag>Hawk</span> = signed. Each is there in both spellings.</p><dl>"
    for handler, routes in groupby(gateway.ROUTES, lambda route: route.handler):
        anchor = f' id="{handler}"'
        for route in routes:
            yield f"<dt{anchor}><code>{route.methods}</code> <b>{html.escape(route.path)}</b> "
            yield f"<small>{html.escape(gateway.versioned(route.path))}</small>"
            yield " <span class=tag>Hawk</span>" * route.hawk
            anchor = ""
        about = (getattr(gateway.GatewayApp, handler).__doc__ or "").partition(" : ")[2]
        step = getattr(gateway.Gateway, STEPS.get(handler, ""), None)
        says = inspect.cleandoc(getattr(step, "__doc__", None) or "").partition("\n\nArgs:")[0]
        yield f"<dd>{prose(about[:1].upper() + about[1:])}{prose(says) if says else ''}"
    yield "</dl>"


def errors() -> Iterator[str]:
    """Every errno with its status and the first line of its docstring."""
    yield '<h2 id="all-errors">Errors</h2><p>Status and errno of each.'
    yield ' <a href="09_errors.html">Notebook 09</a> makes them happen.</p><dl>'
    for error in gateway.error_classes():
        first = (error.__doc__ or "").partition("\n")[0]
        phrase, number = HTTPStatus(error.status).phrase, int(error.errno or 0)
        yield f'<dt id="{error.__name__}"><b>{error.status}/{number}</b> '
        yield f"<code>{error.__name__}</code> <small>{phrase}</small><dd>{html.escape(first)}"
    yield "</dl>"


def settings() -> Iterator[str]:
    """Every setting with its default, its sentence and its bounds."""
    yield '<h2 id="all-settings">Settings</h2><dl>'
    defaults = gateway.Settings()
    for name, field in gateway.declared(gateway.Settings).items():
        default = "cores" if name == "workers" else json.dumps(getattr(defaults, name))
        yield f'<dt id="{name}"><b>{name}</b> = <code>{html.escape(default)}</code>'
        yield f"<dd>{html.escape(field['description'])} ({html.escape(gateway.allowed(field))})"
    yield "</dl>"


def documented_names() -> Iterator[str]:
    """Every public name, section by section, with its docstring."""
    starts = list(sections().items())
    ends = [line for _, line in starts[1:]] + [sys.maxsize]
    for (title, start), end in zip(starts, ends, strict=True):
        yield f'<h2 id="section-{title.partition(".")[0]}">{title}</h2><dl>'
        for name in (n for n, line in definitions().items() if start <= line < end):
            thing: Any = gateway
            for part in name.split("."):
                thing = getattr(thing, part)
            own = "." in name or inspect.isclass(thing) or inspect.isfunction(thing)
            yield f"<dt><code>{name}</code>{signatures().get(name, '')}"
            yield f"<dd>{prose(thing.__doc__ if own else constant_docs().get(name))}"
        yield "</dl>"


@cache
def signatures() -> dict[str, str]:
    """What functions and methods take, as it is written; classes take what __init__ does."""
    found = {}
    for node in ast.parse((ROOT / "gateway.py").read_text("utf-8")).body:
        inside = node.body if isinstance(node, ast.ClassDef) else []
        for function in (node, *inside):
            if isinstance(function, ast.FunctionDef):
                takes = re.sub(r"^(self|cls)(, )?", "", ast.unparse(function.args))
                gives = f" -> {ast.unparse(function.returns)}" if function.returns else ""
                name = function.name if function is node else f"{node.name}.{function.name}"  # type: ignore[attr-defined]
                wraps = [ast.unparse(decorator) for decorator in function.decorator_list]
                plain = not {"property", "cached_property"} & set(wraps)
                found[name] = html.escape(f"({takes}){gives}" if plain else gives)
    inits = {name.removesuffix(".__init__"): text for name, text in found.items()}
    return {**inits, **found}


def api_page() -> str:
    """Endpoints, errors, settings and names, as the code has them."""
    head = (
        "<h1>API reference</h1><p>Made from <code>gateway.py</code>: endpoints from "
        "<code>ROUTES</code>, errors from <code>error_classes</code>, settings from "
        "<code>Settings</code>, the rest from docstrings.</p>"
    )
    parts = [head, *endpoints(), *errors(), *settings(), *documented_names()]
    return page("API reference", linked("".join(parts)))


STEPS = {
    "register": "register", "discover": "discover", "sms_mt_verify": "send_code",
    "sms_verify": "send_code", "sms_resend_code": "resend_code", "sms_momt": "receive_sms",
    "sms_verify_code": "verify_code", "certificate_sign": "sign_certificate",
    "unregister": "unregister",
}  # fmt: skip
"""Which step of the protocol a handler calls."""


@cache
def constant_docs() -> dict[str, str]:
    """The texts that stand below constants in gateway.py."""
    body, found = ast.parse((ROOT / "gateway.py").read_text("utf-8")).body, {}
    for node, after in pairwise(body):
        target = getattr(node, "target", None) or getattr(node, "targets", [None])[0]
        if isinstance(target, ast.Name) and isinstance(after, ast.Expr):
            found[target.id] = str(getattr(after.value, "value", ""))
    return found


def names_page() -> str:
    """Every public name, where it is defined, and the notebooks that speak of it."""
    texts = {path: path.read_text("utf-8") for path in NOTEBOOKS}
    rows = []
    for name, line in sorted(definitions().items(), key=lambda item: item[0].lower()):
        if "." not in name:
            word = re.compile(rf"(?<![\w/]){name}(?!\w)")
            found = (
                f'<a href="{path.stem}.html" title="{html.escape(head_of(path)[0])}">'
                f"{path.stem[:2]}</a>"
                for path, text in texts.items()
                if word.search(text)
            )
            rows.append(f'<tr><td><a href="gateway.html#L{line}"><code>{name}</code></a>'
                        f"<td>{' '.join(found)}</tr>")  # fmt: skip
    table = f"<table><tr><th>name<th>notebooks</tr>{''.join(rows)}</table>"
    about = "Every public name of gateway.py, and the notebooks that speak of it."
    return page("Names", f"<h1>Names</h1><p>{about}</p>{table}")


def index_page() -> str:
    """The front page: what this is, and the question of each notebook."""
    what = (ROOT / "README.md").read_text("utf-8").split("\n\n")[1]
    found = re.search(r"^    client   .*?(?=\n\n)", gateway.__doc__ or "", re.M | re.S)
    diagram = textwrap.dedent(found[0]) if found else ""
    rows = []
    for path in NOTEBOOKS:
        title, question = head_of(path)
        rows.append(f'<li><a href="{path.stem}.html"><b>{html.escape(title)}</b><br>'
                    f"{html.escape(question)}</a>")  # fmt: skip
    body = f"""<h1>MSISDN Gateway</h1>
<p>{html.escape(what)}</p>
<pre>{html.escape(diagram)}</pre>
<p>Each notebook answers one question by running the real gateway. What you see in them was
printed by the code beside it, and a test compares every line of it. Begin with the first.</p>
<ul class=cards>{"".join(rows)}</ul>
<p>Then read <a href="gateway.html">gateway.py</a> itself, from the top. To look something up:
the <a href="api.html">API reference</a> has every endpoint, error and setting;
<a href="names.html">Names</a> tells which notebook speaks of what. To write a notebook of your own,
copy <a href="TEMPLATE.html">the template</a>.</p>"""
    return page("MSISDN Gateway", body)


_CODE = HtmlFormatter(style="default").get_token_style_defs(".highlight")
_DARK = HtmlFormatter(style="github-dark").get_token_style_defs(".highlight")
STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --soft: #f9f9f7; --edge: #d8d8d2;
  --faint: #6b6b66; --link: #005a9c; --mark: #fff3c4 }
* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100% }
body { margin: 0; color: var(--ink); background: var(--paper);
  font: 17px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
nav { display: flex; flex-wrap: wrap; gap: .2em 1.2em; padding: .6em 1rem; background: var(--soft);
  border-bottom: 1px solid var(--edge) }
main { margin: 0 auto; padding: 1rem }
main.narrow { max-width: 54rem } main.wide { max-width: 66rem }
a { color: var(--link); text-decoration-thickness: 1px; text-underline-offset: .2em }
a:has(> code:only-child) { text-decoration-style: dotted }
h1, h2, h3 { line-height: 1.25; overflow-wrap: anywhere } h2 { margin-top: 2em }
.anchor-link { visibility: hidden; text-decoration: none; margin-left: .3em }
:is(h1, h2, h3):hover .anchor-link { visibility: visible }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono",
  monospace }
code { font-size: .88em; background: var(--soft); border-radius: 3px; padding: .08em .25em;
  overflow-wrap: anywhere }
pre { font-size: .8rem; line-height: 1.45; margin: 0; padding: .7em .9em; white-space: pre-wrap;
  overflow-wrap: anywhere }
pre code { font-size: inherit; background: none; padding: 0 }
main > pre, .text_cell_render pre { background: var(--soft); border: 1px solid var(--edge);
  border-radius: 5px; margin: 1em 0; white-space: pre; overflow-x: auto;
  font-size: min(.8rem, 1.9vw) }
.highlight { background: var(--soft) }
.input_area { border-left: 4px solid #0072b2; border-radius: 0 5px 5px 0 }
.input_area .highlight { border-radius: 0 5px 5px 0 }
.code_cell { margin: 1.2em 0 }
.output_area pre { border: 1px solid var(--edge); border-top: 0; border-left: 4px solid #e69f00;
  border-radius: 0 5px 5px 0 }
.output_area img { display: block; max-width: 100%; height: auto; margin: .8em 0;
  background: #fff; border-radius: 5px }
table { border-collapse: collapse; margin: 1em 0; font-size: .94em; overflow-wrap: break-word }
table code { overflow-wrap: inherit }
th, td { text-align: left; vertical-align: top; padding: .35em .7em .35em 0;
  border-bottom: 1px solid var(--edge) }
li, dd { overflow-wrap: anywhere }
dt { margin-top: 1.1em; overflow-wrap: anywhere; scroll-margin-top: 1em }
dd { margin: .2em 0 0 1.2em }
dd p { margin: .3em 0 } small { color: var(--faint) }
:target { background: var(--mark) }
a:has(> .linenos) { text-decoration: none; user-select: none }
span.linenos { color: var(--faint); padding-right: 1em } .highlight span:target { background: none }
.tag { font-size: .8em; border: 1px solid var(--edge); border-radius: 3px; padding: 0 .3em }
.contents { columns: 18rem; padding-left: 1.2em }
.cards { list-style: none; padding: 0; display: grid; gap: .7rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)) }
.cards a { display: block; height: 100%; padding: .7em .9em; color: inherit; text-decoration: none;
  border: 1px solid var(--edge); border-radius: 6px; background: var(--soft) }
.cards a:hover, .cards a:focus { border-color: var(--link) } .cards b { color: var(--link) }
.ways { display: flex; flex-wrap: wrap; gap: 1rem; justify-content: space-between;
  margin: 3em 0 1em; padding-top: 1em; border-top: 1px solid var(--edge) }
@media screen and (max-width: 600px) { body { font-size: 16px }
  pre { font-size: .72rem; padding: .6em }
  main > pre, .text_cell_render pre { font-size: 1.9vw }
  nav { font-size: .9em; gap: .2em 1em }
  pre.table, main.wide pre { white-space: pre; overflow-x: auto }
  th, td { padding-right: .5em; font-size: .85em }
  span.linenos { padding-right: .4em } }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e4e4e0; --paper: #16181b; --soft: #1f2226; --edge: #3a3e44; --link: #7cc0ff;
    --faint: #8f949b; --mark: #4a3f10 }
  %DARK%
  .highlight { background: var(--soft) } }
@media print { nav, .ways, .anchor-link { display: none } body { font-size: 11pt }
  main.narrow, main.wide { max-width: none; padding: 0 } pre { font-size: 8.5pt }
  .code_cell, .output_area img, tr, .cards li { break-inside: avoid }
  h1, h2, h3 { break-after: avoid } a { color: inherit } }
"""
STYLE = "\n".join(_CODE) + STYLE.replace("%DARK%", "\n  ".join(_DARK))


def build(folder: Path) -> None:
    """Write the whole site into ``folder``, which is emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pages = {"index.html": index_page(), "api.html": api_page(), "names.html": names_page()}
    pages |= {name: source_page(path) for name, path in SOURCES.items()}
    for path in [*NOTEBOOKS, ROOT / "notebooks" / "TEMPLATE.ipynb"]:
        pages[path.stem + ".html"] = notebook_page(path)
    for name, text in pages.items():
        (folder / name).write_text(text, "utf-8")


def main(argv: list[str]) -> Any:
    """``pages.py [FOLDER]``."""
    folder = Path(argv[0]) if argv else ROOT / "docs"
    build(folder)
    print(f"open {folder.resolve()}/index.html")


if __name__ == "__main__":
    main(sys.argv[1:])
