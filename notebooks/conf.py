"""How ``make docs`` builds the pages: Sphinx's settings, and what is made from the code.

The sources are the notebooks, as they were executed and kept, and the Markdown files beside
them. A line ``<!-- made: endpoints -->`` in one of these stands for what ``endpoints()`` below
gives, so no page can say anything else than the code does. The pages open from disk and ask no
server for anything: the browser is told so by their Content-Security-Policy.
"""

from __future__ import annotations

import ast
import html
import inspect
import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any

from docutils import nodes
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer
from sphinx.application import Sphinx

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]

import diagrams
import lab

import gateway

# -- Sphinx's settings, by its names --------------------------------------------

project = "MSISDN Gateway"
extensions = ["myst_nb", "sphinx_copybutton", "sphinx_inline_tabs"]
exclude_patterns = ["TEMPLATE.ipynb", "test_keys", "**.ipynb_checkpoints"]
highlight_language = "none"
nb_execution_mode = "off"  # the outputs that are kept in the notebooks are shown
myst_enable_extensions = ["attrs_block", "deflist"]
myst_heading_anchors = 3  # links to headings, as GitHub names them
copybutton_prompt_text = "$ "
copybutton_only_copy_prompt_lines = True

html_theme = "furo"
html_title = "MSISDN Gateway"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_js_files = ["pages.js"]
html_favicon = "_static/icon.svg"
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_show_search_summary = False  # it would fetch the pages found, which no browser does on disk
html_show_copyright = False
html_use_index = False
pygments_style, pygments_dark_style = "a11y-high-contrast-light", "a11y-high-contrast-dark"
html_theme_options = {
    # Grey text of furo's that is paler than WCAG 2 (AA) asks for.
    "light_css_variables": {
        "color-foreground-muted": "#5f636a",
        "color-code-background": "#f5f6f8",
        "code-font-size": "85%",
    },
    "dark_css_variables": {"color-foreground-muted": "#9ca3ab", "color-code-background": "#1f2124"},
}

POLICY = (
    "default-src 'none'; script-src 'self' file: 'unsafe-inline'; "
    "style-src 'self' file: 'unsafe-inline'; img-src 'self' file: data:"
)
SERVED_POLICY = POLICY.replace(" file:", "") + "; base-uri 'none'; form-action 'self'"
"""For a server that sends the pages: the only form is the search, and furo's scripts are inline."""

# -- What there is in gateway.py ------------------------------------------------


@cache
def source(name: str = "gateway.py") -> str:
    """The text of a file, by its path from the root."""
    return (ROOT / name).read_text("utf-8")


@cache
def definitions() -> dict[str, int]:
    """Public names of gateway.py, and public methods as ``Class.name``, with their lines."""
    found: dict[str, int] = {}
    for node in ast.parse(source()).body:
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
def sections() -> dict[str, tuple[int, str]]:
    """Titles of gateway.py's sections (``5. Session credentials``): first line, question."""
    contents = re.findall(r"^    (\d+\. .+?)  +(\S.*\?)$", gateway.__doc__ or "", re.M)
    lines = source().splitlines()
    return {title: (lines.index(f"# {title}"), question) for title, question in contents}


@cache
def settings() -> dict[str, tuple[str, str]]:
    """Every setting with its default and its sentence, as ``settings --toml`` prints them."""
    command = [sys.executable, str(ROOT / "gateway.py"), "settings", "--toml"]
    toml = subprocess.run(command, env={}, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^# (.+)\n# (\w+) = (.+)$", toml, re.M)
    return {name: (default, about) for about, name, default in found}


@cache
def targets() -> dict[str, tuple[str, str]]:
    """Where a word in code type leads to: page and anchor."""
    lines = {name: line for name, line in definitions().items() if name not in ("T", "Json")}
    # Texts often name the steps of the protocol, and the handlers, without their class.
    for prefix in ("GatewayApp.", "Gateway."):
        lines |= {n.removeprefix(prefix): x for n, x in lines.items() if n.startswith(prefix)}
    found = {name: ("read/gateway", f"L{line}") for name, line in lines.items()}
    found |= {name: ("operate/settings", name) for name in settings()}
    found |= {route.path: ("integrate/endpoints", route.handler) for route in gateway.ROUTES}
    found |= {"gateway.py": ("read/gateway", ""), "lab.py": ("read/lab", "")}
    del found["/"]
    return found


# -- Parts of pages that are made, as Markdown ------------------------------------


def plain(text: str) -> str:
    """A text as Markdown; what looked like mark-up in it is none, but for ``code``."""
    parts = re.split(r"``(.+?)``", text)
    parts[::2] = [re.sub(r"([\\`*_<>|\[\]{}])", r"\\\1", part) for part in parts[::2]]
    parts[1::2] = [code(part) for part in parts[1::2]]
    return "".join(parts)


def code(text: str) -> str:
    """A text in code type; also in a table, where a bar would end the cell."""
    return "`" + text.replace("|", "\\|") + "`"


def table(*head: str, rows: Iterator[tuple[str, ...]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows))


def anchored(name: str, text: str) -> str:
    """A text that ``#name`` leads to."""
    return f'<span id="{name}"></span>{text}'


def summary(docstring: str | None) -> str:
    """The first paragraph of a docstring."""
    return whole(inspect.cleandoc(docstring or "").split("\n\n")[0])


def whole(docstring: str | None) -> str:
    """All of a docstring, as one paragraph."""
    return plain(" ".join((docstring or "").split()))


def endpoints() -> str:
    """Every route with the sentence of its handler, and its second prefix."""

    def rows() -> Iterator[tuple[str, ...]]:
        for handler, routes in groupby(gateway.ROUTES, lambda route: route.handler):
            says = getattr(gateway.GatewayApp, handler).__doc__.partition(" : ")[2]
            about, first = says[:1].upper() + says[1:], True
            for route in routes:
                path = re.sub("(?<=.)/", "<wbr>/", plain(route.path))  # breaks on phones
                path = f"{route.methods.replace(' ', ', ')} **{path}**"
                yield (
                    anchored(handler, path) if first else path,
                    summary(about) if first else "The same.",
                    "yes" if route.hawk else "",
                    code(gateway.versioned(route.path).removesuffix(route.path)),
                )
                first = False

    return table("endpoint", "what it does", "signed", "prefix", rows=rows())


def fields() -> str:
    """Of each endpoint: the fields of its body and of its answer, and every errno."""
    document = gateway.openapi_document("https://id.example")
    schemas, parts = document["components"]["schemas"], []
    for handler, routes in groupby(gateway.ROUTES, lambda route: route.handler):
        route, paths = (spelled := [*routes])[0], {other.path for other in spelled}
        method = route.methods.split()[-1]
        says = document["paths"][re.sub("<(.+?)>", r"{\1}", route.path)][method.lower()]
        title = f"## {route.methods.replace(' ', ', ')} {plain(route.path)}"
        about = says["summary"][:1].upper() + says["summary"][1:]
        signed = " Signed with Hawk." * route.hawk
        parts += [title, anchored(handler, summary(about) + signed)]
        if route.query:
            names = ", ".join(code(name) for name in route.query.split())
            parts.append(f"**In the URL**: {names}.")
        for body in route.body:
            schema = schemas[body.__name__]
            other = "**Body**" if body is route.body[0] else "**Or**"
            parts += [f"{other} {code(body.__name__)}: {plain(schema['description'])}"]
            parts.append(table(*FIELD_COLUMNS, rows=body_rows(schema)))
        if (name := str(route.answer)) in gateway.ANSWERS:
            parts += [f"**Answer** {code(name)}: {plain(schemas[name]['description'])}"]
            parts.append(answer(name))
        else:
            parts.append(f"**Answer**: {ANSWERS.get(route.answer, 'a JSON object')}.")
        rows = error_rows(gateway.route_errors(route, method))
        parts.append(table("status/errno", "what a client does", rows=rows))
        parts += [shown(example) for example in examples() if example["route"] in paths]
    return "\n\n".join(parts)


FIELD_COLUMNS = ("field", "type", "required", "default", "allowed", "what")
ANSWERS: dict[Any, str] = {
    None: "204, without a body", str: "a page for people", Any: "200; what suits the provider",
}  # fmt: skip


def kind_of(field: Any) -> str:
    """The JSON types of a field, in words."""
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(map(kind_of, field["anyOf"])))
    kinds = field.get("type", "object" if "$ref" in field else "any")
    return " or ".join([kinds] if isinstance(kinds, str) else kinds)


def body_rows(schema: Any) -> Iterator[tuple[str, ...]]:
    """The fields of a body, those that are required first."""
    required = schema["required"]
    for name, field in sorted(
        schema["properties"].items(), key=lambda item: item[0] not in required
    ):
        bounded = field.keys() & {"title", "minimum", "pattern"}
        default = field.get("default")
        yield (
            code(name),
            kind_of(field),
            "yes" if name in required else "",
            code(json.dumps(default)) if default not in (None, "") else "",
            plain(gateway.allowed(field)) if bounded else "",
            plain(field["description"]) + " (secret)" * field.get("writeOnly", False),
        )


def answer_rows(schema: Any) -> Iterator[tuple[str, ...]]:
    """The fields of an answer."""
    for name, field in schema["properties"].items():
        always = "yes" if name in schema["required"] else ""
        yield code(name), kind_of(field), always, plain(field.get("description", ""))


def answer(name: str) -> str:
    """The fields of one kind of answer."""
    return table("field", "type", "always", "what", rows=answer_rows(gateway.ANSWERS[name]))


def error_rows(errors: list[type[gateway.GatewayError]]) -> Iterator[tuple[str, ...]]:
    """What a client does about each of some errors; it leads to the page of errors."""
    for error in errors:
        number = f"{error.status}/{error.errno}" if error.errno else str(error.status)
        link = f'<a href="errors.html#{error.__name__}">{number}</a>' if error.errno else number
        yield link, todo(error)


def todo(error: type[gateway.GatewayError]) -> str:
    """What a client does about an error: the last paragraph of its docstring."""
    return whole((error.__doc__ or "").rpartition("Client: ")[2])


@cache
def examples() -> list[dict[str, str]]:
    """Calls that were made, and what came back: tests/make_examples.py wrote them."""
    found: list[dict[str, str]] = json.loads(source("notebooks/integrate/examples.json"))
    return found


def shown(example: dict[str, str]) -> str:
    """An example: the call by each client, and what came back."""
    tabs = {"JavaScript": example["javascript"], "Python": example["python"]}
    listings = {
        "HTTP": f"```http\n{example['request']}\n```",
        "curl": f"```bash\n{in_curl(example)}\n```",
        **{name: f"```{name.lower()}\n{text}\n```" for name, text in tabs.items() if text},
    }
    parts = [f"**Example.** {example['about']}"]
    parts += [f"````{{tab}} {name}\n{listing}\n````" for name, listing in listings.items()]
    return "\n\n".join([*parts, f"```http\n{example['answer']}\n```"])


def in_curl(example: dict[str, str]) -> str:
    """An example as commands of a shell; client.py prints the header of what is signed."""
    head, _, body = example["request"].partition("\n\n")
    method, path, _ = head.partition("\n")[0].split()
    url, post = f"http://localhost:5000{path}", "-X POST " * (method == "POST")
    if example["form"]:
        return f"curl '{url}' -d '{body}'"
    if "\nAuthorization: " not in head:
        return f"curl '{url}' --json '{body}'" if body else f"curl {post}'{url}'"
    lines, sign = [f"URL='{url}'"], f'python client.py "$TOKEN" {method} "$URL"'
    if not body:
        return "\n".join([*lines, f'curl {post}"$URL" -H "$({sign})"'])
    lines.append(f"BODY='{body}'")
    return "\n".join([*lines, f'curl "$URL" --json "$BODY" -H "$({sign} "$BODY")"'])


def errors() -> str:
    """Every status and errno with its sentence."""
    rows = (
        (
            anchored(e.__name__, f"{e.status}/{e.errno}"),
            code(e.__name__),
            whole((e.__doc__ or "").partition("Client: ")[0]),
            todo(e),
        )
        for e in gateway.error_classes()
    )
    return table("status/errno", "in gateway.py", "what it says", "what a client does", rows=rows)


def all_settings() -> str:
    """Every setting with its default and its sentence."""
    return "\n\n".join(
        f"{anchored(name, f'**{plain(name)}**')} = {code(default)}\n: {plain(about)}"
        for name, (default, about) in settings().items()
    )


def lessons() -> list[tuple[str, str, str]]:
    """Of each notebook its file, title and question."""
    found = []
    for path in sorted(HERE.glob("[0-9]*.ipynb")):
        head = "".join(json.loads(path.read_text("utf-8"))["cells"][0]["source"])
        question = re.search(r"\*\*Question\.\*\* (.+)", head)
        found.append((path.name, head.split("\n")[0].lstrip("# "), question[1] if question else ""))
    return found


def lesson_list() -> str:
    """The notebooks with their questions."""
    rows = ((f"[{title}](../{file})", question) for file, title, question in lessons())
    return table("lesson", "question", rows=rows)


def flow() -> str:
    """The picture at the top of gateway.py."""
    found = re.search(r"^    client   .*?(?=\n\n)", gateway.__doc__ or "", re.M | re.S)
    return diagrams.svg(textwrap.dedent(found[0])) if found else ""


def policy() -> str:
    """What a server of these pages may send as Content-Security-Policy."""
    return f"```text\nContent-Security-Policy: {SERVED_POLICY}\n```"


def listing(code: str, first_line: int) -> str:
    """Python source with an anchor at every line, ``#L12``."""
    formatter = HtmlFormatter(
        linenos="inline", linenostart=first_line, anchorlinenos=True, lineanchors="L"
    )
    body = highlight(code, PythonLexer(stripnl=False, ensurenl=False), formatter)
    body = re.sub(r' name="L-\d+"', "", body).replace('"L-', '"L').replace('"#L-', '"#L')
    fence = "`" * 12
    return f'{fence}{{raw}} html\n<div class="highlight-python">{body}</div>\n{fence}'


def gateway_source() -> str:
    """gateway.py, section by section."""
    starts = {"Head": (1, "What is this, and what does it need?"), **sections()}
    rows = (
        (f"[{title}](#section-{n})", asks) for n, (title, (_, asks)) in enumerate(starts.items())
    )
    parts = [table("section", "question", rows=rows)]
    lines = source().splitlines()
    ends = [*(line - 1 for line, _ in sections().values()), len(lines)]
    for n, (title, (start, asks)) in enumerate(starts.items()):
        code = listing("\n".join(lines[start - 1 : ends[n]]).rstrip(), start)
        parts.append(f"(section-{n})=\n## {title}\n\n{asks}\n\n{code}")
    return "\n\n".join(parts)


def lab_source() -> str:
    """lab.py."""
    return listing(source("notebooks/lab.py"), 1)


def names() -> str:
    """Every public name by its letter: kind, what it is, and which lessons speak of it."""
    described, kinds, lines = descriptions(), kinds_of_names(), definitions()
    spoken_of = {file: words(file) for file, _, _ in lessons()}
    starts = {line: title.partition(".")[0] for title, (line, _) in sections().items()}

    def row(name: str) -> tuple[str, ...]:
        found = (f"[{file[:2]}](../{file})" for file, words in spoken_of.items() if name in words)
        section = starts[max(line for line in starts if line <= lines[name])]
        kind = f"{kinds[name]}, [§{section}](gateway.md#section-{section})"
        return code(name), kind, summary(described[name]), " ".join(found)

    listed = sorted((n for n in lines if described.get(n)), key=str.lower)
    letters = {letter: [*found] for letter, found in groupby(listed, lambda name: name[0].upper())}
    heads = "name", "kind, section", "what it is", "lessons"
    parts = [" ".join(f"[{letter}](#names-{letter})" for letter in letters)]
    for letter, found in letters.items():
        rows = table(*heads, rows=map(row, found))
        parts.append(f"(names-{letter})=\n## {letter}\n\n{rows}")
    return "\n\n".join(parts)


def kinds_of_names() -> dict[str, str]:
    """Of each public name of gateway.py what it is: function, class, error, setting or constant."""
    found = {}
    for name in definitions():
        thing = getattr(gateway, name, None)
        if isinstance(thing, type):
            found[name] = "error" if issubclass(thing, Exception) else "class"
        else:
            found[name] = "function" if inspect.isfunction(thing) else "constant"
        if name[:1].isupper() and not name.isupper() and found[name] == "constant":
            found[name] = "type"
    return found


def words(notebook: str) -> set[str]:
    """The words in the cells of a notebook, and in what they printed."""
    cells = json.loads((HERE / notebook).read_text("utf-8"))["cells"]
    lines = [line for cell in cells for line in cell["source"]]
    lines += [line for c in cells for o in c.get("outputs", []) for line in o.get("text", [])]
    return set(re.findall(r"(?<![\w/])[A-Za-z]\w*", "".join(lines)))


def descriptions() -> dict[str, str]:
    """The docstrings of functions and classes, and the texts that stand below constants."""
    body, found = ast.parse(source()).body, {}
    for node, after in zip(body, [*body[1:], ast.Pass()], strict=True):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = ast.get_docstring(node) or ""
        target = getattr(node, "target", None) or getattr(node, "targets", [None])[0]
        if isinstance(target, ast.Name) and isinstance(after, ast.Expr):
            found[target.id] = str(getattr(after.value, "value", ""))
    return found


def vector(group: str, n: int, *names: str) -> str:
    """Parts of a vector, each below its name, in a listing."""
    told = json.loads(source("notebooks/vectors.json"))[group]
    one = told["given"] | told["vectors"][n]
    return "\n\n".join(f"`{name}`:\n\n```\n{str(one[name]).rstrip()}\n```" for name in names)


def to_copy(name: str) -> str:
    """A file of notebooks/ that others may copy."""
    language = {"py": "python", "mjs": "javascript"}[name.rpartition(".")[2]]
    return f"```{language}\n{source(f'notebooks/{name}')}```"


TO_COPY = ("client.mjs", "client.py", "relying_party.py", "relying_party.mjs",
           "relying_party_webcrypto.mjs", "walk.mjs", "walk.py")  # fmt: skip


def keys_readme() -> str:
    """keys/README.md without its title."""
    return source("keys/README.md").partition("\n")[2]


MADE: dict[str, Callable[[], str]] = {
    "endpoints": endpoints, "fields": fields, "errors": errors, "settings": all_settings,
    "lessons": lesson_list, "flow": flow, "policy": policy, "gateway.py": gateway_source,
    "lab.py": lab_source, "names": names, "keys/README.md": keys_readme,
    **{name: partial(to_copy, name) for name in TO_COPY},
    **{name: partial(answer, name) for name in ("NextStep", "Problem")},
    "hkdf vector": partial(vector, "hkdf", 0, "token", "id", "key"),
    "empty hash": partial(vector, "payload", 1, "hash"),
    "request vector": partial(vector, "request", 0, "normalized", "header"),
    "answer vector": partial(vector, "answer", 0, "body", "normalized", "header"),
    "time vector": partial(vector, "time", 0, "header"),
}  # fmt: skip

# -- What Sphinx calls -------------------------------------------------------------


def fill_in(app: Sphinx, page: str, text: list[str]) -> None:
    """Put in what is made; let notebooks lead to the page of lab.py instead of the file."""
    if (path := HERE / f"{page}.ipynb").exists():
        text[0] = json.dumps(as_page(path.name, json.loads(text[0])), ensure_ascii=False)
    text[0] = re.sub(r"^<!-- made: (.+) -->$", lambda m: MADE[m[1]](), text[0], flags=re.M)
    text[0] = text[0].replace("](lab.py)", "](read/lab.md)")
    text[0] = re.sub(r"\]\(relying_party\.m?[pj]\w+\)", "](integrate/proofs.md)", text[0])


def as_page(name: str, notebook: Any) -> Any:
    """A notebook as its page shows it: diagrams and pictures as SVG, its first cell folded up."""
    pictures = 0
    cells = notebook["cells"]
    for n, cell in enumerate(cells):
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            cell["source"] = FENCED.sub(partial(drawn, first=n == 0), text)
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if svg := "".join(data.pop("image/svg+xml", "")):
                data["text/html"] = picture(svg, pictures := pictures + 1)
            elif table := "".join(data.get("text/html", "")):
                table = re.sub(r"<td (?=[^>]*>[^<]{30})", '<td class="long" ', table)
                data["text/html"] = table.replace("<table>", OPEN_TABLE) + "</div>"
    title, _, rest = cells[0]["source"].partition("\n")
    minutes = round(sum(len("".join(c["source"]).split()) for c in cells) / 150)
    file = f"[Download this notebook](path:{name})"
    cells[0]["source"] = f"{title}\n\n{{.lesson-facts}}\n{minutes} minutes to read. {file}\n{rest}"
    setup = next(cell for cell in cells if cell["cell_type"] == "code")
    setup["metadata"] |= {"tags": ["hide-input"], "mystnb": {"code_prompt_show": SETUP_PROMPT}}
    return notebook


FENCED = re.compile(r"^```\n(.*?)\n```$", re.M | re.S)
OPEN_TABLE = '<div class="table-wrapper"><table class="docutils">'
SETUP_PROMPT = "What this lesson needs: imports, and a gateway of its own"


def drawn(found: re.Match[str], first: bool) -> str:
    """A diagram as SVG; a listing stays as it is."""
    return diagrams.svg(found[1]) if first or diagrams.is_diagram(found[1]) else found[0]


def picture(svg: str, n: int) -> str:
    """The n-th picture of a page: ids that no other one has, colours that fit light and dark."""
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg))

    def tag(found: re.Match[str]) -> str:
        own = re.sub(
            r' id="([^"]+)"', lambda m: f' id="p{n}-{m[1]}"' if m[1] in used else "", found[0]
        )
        own = re.sub(r'(url\(#|href="#)', rf"\1p{n}-", own)
        for name in ("BLUE", "ORANGE", "GREEN", "GREY"):
            own = own.replace(getattr(lab, name), f"var(--picture-{name.lower()})")
        return own

    svg = re.sub(r"<[^<>]+>", tag, svg)
    return f'<figure class="picture">{svg}</figure>'


def link_words(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Make the words in code type links, where they name something; not in titles."""
    for word in list(doctree.findall(nodes.literal)):
        target = targets().get(word.astext().removeprefix("GatewayApp."))
        above, inside = word.parent, set[type[Any]]()
        while above is not None:
            inside.add(type(above))
            above = above.parent
        if target and not inside & {nodes.title, nodes.reference}:
            uri = app.builder.get_relative_uri(page, target[0]) if target[0] != page else ""
            uri += f"#{target[1]}" * bool(target[1])
            word.replace_self(nodes.reference("", "", word.deepcopy(), refuri=uri, internal=True))


def link_terms(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """In a lesson, let the first use of each word of the glossary lead there."""
    if not (HERE / f"{page}.ipynb").exists():
        return
    waiting = dict(terms(app))
    for text in list(doctree.findall(nodes.Text)):
        above, inside = text.parent, set[type[Any]]()
        while above is not None:
            inside.add(type(above))
            above = above.parent
        if inside & {nodes.title, nodes.reference, nodes.literal, nodes.literal_block, nodes.raw}:
            continue
        if nodes.paragraph not in inside and nodes.entry not in inside:
            continue
        made, rest = list[nodes.Node](), text.astext()
        while found := min(
            (m for word in waiting if (m := word.search(rest))),
            key=lambda m: (m.start(), -m.end()),
            default=None,
        ):
            anchor, says = waiting.pop(found.re)
            waiting = {word: there for word, there in waiting.items() if there[0] != anchor}
            uri = app.builder.get_relative_uri(page, "learn/glossary") + f"#{anchor}"
            link = nodes.reference("", found[0], refuri=uri, internal=True, classes=["term-link"])
            link["reftitle"] = says
            made += [nodes.Text(rest[: found.start()]), link]
            rest = rest[found.end() :]
        if made:
            text.parent.replace(text, [*made, nodes.Text(rest)])


def terms(app: Sphinx) -> dict[re.Pattern[str], tuple[str, str]]:
    """How each word of the glossary is written, with its anchor and its first sentence."""
    says = {}
    listed = r"^(\S.*)\n((?:  .+\n?)+)"
    for names, text in re.findall(listed, source("notebooks/learn/glossary.md"), re.M):
        first = re.split(r"(?<=[a-z)0-9])[.] ", " ".join(text.split()), maxsplit=1)[0]
        says[names] = re.sub(r"\[(.+?)\]\(.+?\)|`", r"\1", first).rstrip(".") + "."
    found = {}
    for (kind, name), (_, anchor) in app.env.domains["std"].objects.items():
        if kind == "term" and name in says:
            for word in name.split(", "):
                either = word if word[1:] != word[1:].lower() else f"(?i:{word})"
                found[re.compile(rf"(?<![\w/-]){either}s?(?![\w-])")] = anchor, says[name]
    return found


def note_names(app: Sphinx, env: Any) -> None:
    """Tell the search what each setting, endpoint, error and name of gateway.py is."""
    found = {("setting", name): ("operate/settings", name) for name in settings()}
    for route in gateway.ROUTES:
        found["endpoint", route.path] = "integrate/fields", route.handler
    for error in gateway.error_classes():
        name = f"{error.status}/{error.errno} {error.__name__}"
        found["error", name] = "integrate/errors", error.__name__
    for name, line in definitions().items():
        found["name", name] = "read/gateway", f"L{line}"
    env.domains["std"].objects.update(found)
    for kind, priority in SEARCH_PRIORITY.items():
        env.domains["std"].object_types[kind].attrs["searchprio"] = priority


SEARCH_PRIORITY = {"term": 0, "setting": 0, "endpoint": 0, "error": 0, "name": 1}
"""Of what the search finds by name: 0 comes before titles and text, 1 before text."""


def describe(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Say in the head what the page is about, for search engines and for who shares it."""
    about = {file.removesuffix(".ipynb"): question for file, _, question in lessons()}.get(page)
    first = next(doctree.findall(nodes.paragraph), None) if doctree else None
    text = about or (" ".join(first.astext().split()) if first else ABOUT)
    title = re.sub("<[^>]+>", "", context.get("title") or project)
    tags = {"description": text, "og:title": title, "og:description": text, "og:type": "article"}
    tags |= {"og:site_name": project, "twitter:card": "summary"}
    context.setdefault("metatags", "")  # the page of the search has none yet
    for name, content in tags.items():
        which = "property" if name[:3] == "og:" else "name"
        context["metatags"] += f'<meta {which}="{name}" content="{html.escape(content)}">\n'


ABOUT = "A server that proves that somebody controls a phone number."


def forbid_network(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Have the browser refuse what does not come from these files."""
    meta = (
        f'<meta http-equiv="Content-Security-Policy" content="{html.escape(POLICY, quote=False)}">'
    )
    context["metatags"] = meta + context.get("metatags", "")


def name_rightly(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Mend what WCAG finds wrong in the HTML of furo (a heading without level) and MyST-NB."""
    tree = context.get("furo_navigation_tree", "")
    context["furo_navigation_tree"] = tree.replace(
        'role="heading">', 'role="heading" aria-level="2">'
    )
    summary = '<summary aria-label="Toggle hidden content">'  # another name than it shows
    context["body"] = context.get("body", "").replace(summary, "<summary>")


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    for kind in ("setting", "endpoint", "error", "name"):
        app.add_object_type(kind, f"our-{kind}", objname=kind)
    app.connect("source-read", fill_in)
    app.connect("env-updated", note_names)
    app.connect("doctree-resolved", link_words)
    app.connect("doctree-resolved", link_terms)
    app.connect("html-page-context", describe)
    app.connect("html-page-context", forbid_network)
    app.connect("html-page-context", name_rightly, priority=900)  # after furo has made its parts
