"""Draws the text diagrams of the lessons as SVG, for the pages.

The text stays the source: JupyterLab and git show it as it is. A diagram is lines (``----``,
``- - -`` dashed, ``|``, ``/``, ``\\``), corners (``+``), arrow heads (``<  >  v  ^``) that end a
line, and words.
"""

from __future__ import annotations

import re
from html import escape

CELL_PX, WIDEST_CELL_PX, ROW_PX, FONT_PX = 5.5, 6.8, 17, 13
"""A character's column, its width where words stand close, a line's height, the letters."""
WIDTHS = {**dict.fromkeys("ijlft.,:;'|!()[] ", 0.34), **dict.fromkeys("mwMW%@—", 0.88)}
"""Widths of letters, in parts of the font's size, as in common fonts without serifs."""

LINES = re.compile(r"<?-{2,}>?|<-|->|(?:- ){2,}-*>?")
WORDS = re.compile(r"\S+(?: \S+)*")


def is_diagram(text: str) -> bool:
    """Tell a drawing from a listing: it has lines or arrows, or a line that slopes."""
    return bool(re.search(r"---|-->|->|^ *[|+/\\] *$|\| +\|", text, re.M))


class Drawing:
    """One diagram as it is taken apart."""

    def __init__(self, text: str) -> None:
        self.rows = text.rstrip().split("\n")
        self.shapes: list[str] = []
        words = [one for y in range(len(self.rows)) for one in self._words(y)]
        needed = max((_width_px(text) / room for _, _, text, room in words if room), default=0)
        self.cell_px = min(max(needed, CELL_PX), WIDEST_CELL_PX)
        self.width_px = max(map(len, self.rows)) * self.cell_px
        self.words = [self._text(*word) for word in words]
        for y, row in enumerate(self.rows):
            for found in LINES.finditer(row):
                self._arrow(y, *found.span(), found[0])
            for x, character in enumerate(row):
                self._stroke(x, y, character)

    def at(self, x: int, y: int) -> str:
        """The character at a place; a space outside."""
        return self.rows[y][x] if 0 <= y < len(self.rows) and 0 <= x < len(self.rows[y]) else " "

    def _words(self, y: int) -> list[tuple[int, int, str, float]]:
        """Of all words of a row: row, column, text, and how many columns they may take (0: all)."""
        row = self.rows[y]
        left = list(LINES.sub(lambda line: " " * len(line[0]), row))
        left = [" " if self._is_stroke(x, y) else character for x, character in enumerate(left)]
        found = []
        for words in WORDS.finditer("".join(left)):
            after = next((n for n in range(words.end(), len(row)) if row[n] != " "), 0)
            room = after and after - words.start() - 0.7
            found.append((y, words.start(), words[0], room))
        return found

    def _arrow(self, y: int, start: int, end: int, drawn: str) -> None:
        """Draw a level line, up to the middle of the line or corner that it meets."""
        x1 = (start - 0.5 * (self.at(start - 1, y) in "|+")) * self.cell_px
        x2 = (end + 0.5 * (self.at(end, y) in "|+")) * self.cell_px
        middle = (y + 0.5) * ROW_PX
        self._line(x1, middle, x2, middle, ' stroke-dasharray="4 4"' if "- -" in drawn else "")
        if drawn[0] == "<":
            self._head(x1, middle, 8, 0)
        if drawn[-1] == ">":
            self._head(x2, middle, -8, 0)

    def _head(self, x: float, y: float, dx: float, dy: float) -> None:
        """Draw the head of an arrow: its tip, and where its base lies from there."""
        side_x, side_y = (0, 4) if dx else (4, 0)
        points = [(x, y), (x + dx - side_x, y + dy - side_y), (x + dx + side_x, y + dy + side_y)]
        self.shapes.append(f'<polygon points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in points)}"/>')

    def _is_stroke(self, x: int, y: int) -> bool:
        """Tell whether one character is part of a line."""
        character, left, right = self.at(x, y), self.at(x - 1, y), self.at(x + 1, y)
        above, below = self.at(x, y - 1), self.at(x, y + 1)
        return (
            character == "|"
            or (character in "/\\" and left == right == " ")
            or (character == "+" and "-" in left + right)
            or (character == "v" and above == "|")
            or (character == "^" and below == "|")
        )

    def _stroke(self, x: int, y: int, character: str) -> None:
        """Draw one character, if it is part of a line."""
        if not self._is_stroke(x, y):
            return
        left, right, top, bottom = (
            x * self.cell_px,
            (x + 1) * self.cell_px,
            y * ROW_PX,
            (y + 1) * ROW_PX,
        )
        centre, middle = (left + right) / 2, top + ROW_PX / 2
        if character in "/\\":
            a, b = (right, left) if character == "/" else (left, right)
            self._line(a, top, b, bottom)
        elif character == "+":
            if self.at(x, y - 1) in "|+":
                self._line(centre, top, centre, middle)
            if self.at(x, y + 1) in "|+":
                self._line(centre, middle, centre, bottom)
        else:
            self._line(centre, top, centre, bottom)
        if character in "^v":
            up = character == "^"
            self._head(centre, top + 2 if up else bottom - 2, 0, 8 if up else -8)

    def _line(self, x1: float, y1: float, x2: float, y2: float, more: str = "") -> None:
        self.shapes.append(f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}"{more}/>')

    def _text(self, y: int, x: int, words: str, room: float) -> str:
        width_px, most_px = _width_px(words), room * self.cell_px
        squeeze = ""
        if room and width_px > most_px:
            squeeze, width_px = (
                f' textLength="{most_px:.0f}" lengthAdjust="spacingAndGlyphs"',
                most_px,
            )
        self.width_px = max(self.width_px, x * self.cell_px + width_px)
        place = f'x="{x * self.cell_px:.1f}" y="{(y + 0.5) * ROW_PX + FONT_PX / 3:.1f}"'
        return f"<text {place}{squeeze}>{escape(words)}</text>"


def _width_px(words: str) -> float:
    """About how wide words are."""
    return FONT_PX * sum(WIDTHS.get(one, 0.68 if one.isupper() else 0.6) for one in words)


def spoken(text: str) -> str:
    """A diagram for who cannot see it: its words, line by line.

    Where the first line names lifelines, an arrow is told by whom it joins.
    """
    rows = text.strip("\n").split("\n")
    names = [(found.start() + 2, found[0]) for found in WORDS.finditer(rows[0])]
    lifelines = len(names) > 1 and rows[1].count("|") >= len(names) - 1

    def who(column: int) -> str:
        return min(names, key=lambda name: abs(name[0] - column))[1]

    said, waiting = [], list[tuple[int, str]]()
    for row in rows[lifelines:]:
        plain = re.sub(r"[|+]|(?<!\S)[\\/v^](?!\S)", " ", LINES.sub(lambda a: " " * len(a[0]), row))
        texts = [(found.start(), found[0]) for found in WORDS.finditer(plain)]
        lines = list(LINES.finditer(row))
        if lifelines and not lines:
            waiting += texts
            continue
        if not lifelines:
            said.append(", ".join(words for _, words in texts))
            continue
        start, end = lines[0].start(), lines[-1].end()
        both = who(start), who(end)
        ends = both[::-1] if lines[0][0][0] == "<" else both
        label = [words for x, words in waiting + texts if start <= x < end]
        said += [words for x, words in waiting if not start <= x < end]
        said.append(": ".join([f"{ends[0]} to {ends[1]}", *[" ".join(label)] * bool(label)]))
        said += [words for x, words in texts if not start <= x < end]
        waiting = []
    return ". ".join(filter(None, [*said, *(words for _, words in waiting)])) + "."


def svg(text: str) -> str:
    """A diagram as one line of HTML; on a phone it is no smaller than can be read."""
    drawing = Drawing(text)
    width, height = drawing.width_px + 4, len(drawing.rows) * ROW_PX
    size = f"max-width: {1.25 * width:.0f}px; min-width: {0.72 * width:.0f}px"
    return (
        f'<figure class="diagram"><svg role="img" aria-label="{escape(spoken(text))}" '
        f'viewBox="-2 0 {width:.0f} {height}" style="{size}">'
        f'<g class="lines">{"".join(drawing.shapes)}</g>'
        f'<g class="words">{"".join(drawing.words)}</g></svg></figure>'
    )
