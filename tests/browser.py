"""A real browser for tests: Debian's Chromium, driven by playwright, and what it sees.

Without a window's frame and its own pages, as ``chromium-headless-shell``, it takes half the CPU.
"""

from __future__ import annotations

import contextlib
import importlib
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import lab
import pytest

CHROMIUM = shutil.which("chromium-headless-shell") or shutil.which("chromium")
PLAYWRIGHT = lab.ROOT / ".parts" / "playwright"
MISSING = (
    "Chromium is not installed: apt-get install -y --no-install-recommends chromium-headless-shell"
)
MISSING_PLAYWRIGHT = (
    "playwright is not installed: "
    ".venv/bin/pip install --no-compile --target .parts/playwright playwright==1.65.2"
)
OPTIONS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    # With all of these it still asks Google for updates and accounts: let it find nobody.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]


def require() -> None:
    """Skip the module that asks, if there is no browser; from one place, so in one line."""
    missing = MISSING if not CHROMIUM else MISSING_PLAYWRIGHT if not PLAYWRIGHT.exists() else ""
    if missing:
        pytest.skip(missing, allow_module_level=True)


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A playwright ``Browser``, with a fresh profile; it and its processes end with the block.

    It runs an event loop in this thread meanwhile, so no notebook can be tested in that time:
    fixtures of it live no longer than their module.
    """
    sys.path.append(str(PLAYWRIGHT))
    try:
        api = importlib.import_module("playwright.sync_api")
        with api.sync_playwright() as driver:
            started = driver.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
            yield started
            started.close()
    finally:
        sys.path.remove(str(PLAYWRIGHT))


@contextlib.contextmanager
def tab(browser: Any, width: int, **options: Any) -> Iterator[tuple[Any, list[str]]]:
    """A playwright ``Page``, and the URLs of all requests that were made or tried in it.

    Args:
        width: Of the window, in CSS pixels; below 600 it is a phone, which heeds the page's own
            ``viewport``.
        options: Of playwright's ``new_context``, as ``color_scheme="dark"``.
    """
    size = {"width": width, "height": 900}
    context = browser.new_context(viewport=size, is_mobile=width < 600, **options)
    requests: list[str] = []
    context.on("request", lambda request: requests.append(request.url))
    yield context.new_page(), requests
    context.close()


LOOK = """
([width, print, colors]) => {
  const found = new Set()
  const says = (what, element, more = '') =>
    found.add(`${what}: ${element.localName}.${element.className} ${more}`.trim())
  const kept = compute => { const known = new Map(); return key => {
    if (!known.has(key)) known.set(key, compute(key))
    return known.get(key) } }
  const rgba = kept(text => [...text.match(/[\\d.]+/g).map(Number), 1].slice(0, 4))
  const over = (top, below) => below.map((c, i) => top[i] * top[3] + c * (1 - top[3]))
  const light = c => { const [r, g, b] = c.map(v => v / 255)
    .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    return .2126 * r + .7152 * g + .0722 * b }
  const white = [255, 255, 255]
  const paper = kept(element => {
    const own = rgba(getComputedStyle(element).backgroundColor)
    const below = own[3] < 1 && element.parentElement ? paper(element.parentElement) : white
    return own[3] ? over(own, below) : below
  })
  const scrolls = element => !print && /auto|scroll/.test(getComputedStyle(element).overflowX)
  const held = element => element && element !== document.body
    && (scrolls(element) || held(element.parentElement))
  // Drawers at the side that a button draws in: furo's navigation and contents on phones.
  const drawers = [...document.querySelectorAll('*')].filter(element => {
    const box = element.getBoundingClientRect()
    return (box.right <= 0 || box.left >= width) && getComputedStyle(element).position === 'fixed'
  })
  const away = kept(element =>
    drawers.includes(element) || element !== document.body && away(element.parentElement))

  const root = document.scrollingElement, main = document.querySelector('main, [role=main]')
  if (root.scrollWidth > width) says('scrolls sideways', root, `${root.scrollWidth} > ${width}`)
  const column = main.getBoundingClientRect()
  for (const element of colors ? [] : document.body.querySelectorAll('*')) {
    const box = element.getBoundingClientRect(), style = getComputedStyle(element)
    if (!box.width || style.visibility === 'hidden') continue
    if (away(element) || element.ownerSVGElement) continue
    if ((box.right > width + 1 || box.left < -1) && !held(element.parentElement))
      says('beyond the window', element)
    if (element.clientWidth && element.scrollWidth > element.clientWidth + 1 && !scrolls(element)
        && style.display !== 'inline') says('cut off', element)
    if (element.localName === 'img' && (!element.naturalWidth
        || box.right > column.right || box.left < column.left)) says('a bad picture', element)
    const [r, g, b] = rgba(style.backgroundColor), shown = rgba(style.backgroundColor)[3]
    if (shown && r > g + 24 && r > b + 24 && Math.abs(g - b) < 24) says('a red box', element)
    if (element.matches('.output.stderr, .output.traceback')) says('an error', element)
  }
  const readable = kept(colors => {
    const [below, color] = colors.split('; '), paper = below.split(',').map(Number)
    const [dark, bright] = [light(over(rgba(color), paper)), light(paper)].sort((a, b) => a - b)
    return (bright + .05) / (dark + .05) >= 4.5
  })
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
  for (let text; (text = texts.nextNode());) {
    if (!/\\S/.test(text.data)) continue
    const element = text.parentElement, style = getComputedStyle(element)
    if (readable(`${paper(element)}; ${style.color}`)) continue
    if (style.visibility === 'hidden' || away(element)) continue
    if (element.getClientRects().length) says('hard to read', element, style.color)
  }
  return [...found]
}
"""
"""What is wrong with a page as it is laid out; 4.5 is the contrast that WCAG 2 (AA) asks for."""


def look(page: Any, width: int, media: str = "screen", *, colors: bool = False) -> list[str]:
    """What a person would see amiss on the page that is open; nothing scrolls on paper.

    With ``colors`` only what another colour scheme can change: whether texts can be read.
    """
    return list(page.evaluate(LOOK, [width, media == "print", colors]))
