"""Pictures and tables of results: anomaly overlays, panels of tiles, line charts, bar charts, text and markdown tables.

NumPy and Pillow alone, with Pillow's built-in font, so a picture looks the same on every system. Arrays in; a PIL image
out, or a PNG that appears whole or not at all. No picture scales itself to its content behind the reader's back: the
colours of an anomaly map span the `low` and `high` given by the caller. Copy this file into your project and it works.
"""

import os
import unicodedata
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

# The inferno map without its last, nearly white step, which would vanish over a white background.
ANCHORS = np.array([(0, 0, 4), (27, 12, 65), (74, 12, 107), (120, 28, 109), (165, 44, 96), (207, 68, 70),
                    (237, 105, 37), (251, 155, 6), (247, 209, 61)], float)
OPACITY = 0.85  # of the highest anomaly in an overlay: the image stays recognisable below it
INK, FAINT, PALE, ALARM = "#202020", "#707070", "#e2e2e2", "#b03a00"
# Okabe and Ito's colours, without the yellow that is too pale for a line. Their number and that of the dashes have no
# common divisor: colour and dash together repeat only after 35 series.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ((), (9, 4), (2, 3), (10, 3, 2, 3), (4, 2))  # lengths on, off, on, off … in pixels; () is a solid line
# The built-in font has ASCII and little more.
SPELLED = str.maketrans({"–": "-", "—": "-", "−": "-", "→": "->", "≤": "<=", "≥": ">=", "×": "x"})
WIDTH = 830  # pixels; what a README shows without shrinking it
TILE = 128  # side of a picture in a panel


def colour(values):
    """Colour-blind-safe colours, ever lighter. values: any shape, clipped to [0,1] -> (…,3) uint8; NaN is grey."""
    values = np.asarray(values, float)
    place = np.clip(np.nan_to_num(values), 0, 1) * (len(ANCHORS) - 1)
    rgb = np.stack([np.interp(place, np.arange(len(ANCHORS)), channel) for channel in ANCHORS.T], axis=-1)
    rgb[np.isnan(values)] = 128
    return rgb.round().astype(np.uint8)


def scaled(values, low, high):
    """values: any shape -> floats with low at 0 and high at 1, not clipped. Raises ValueError unless high > low."""
    if not high > low:
        raise ValueError(f"a scale needs high > low, not {low} to {high}")
    return (np.asarray(values, float) - low) / (high - low)


def overlay(image, anomaly, low, high):
    """The image under its anomaly map. image (H,W,3) uint8, anomaly (H,W) -> (H,W,3) uint8.

    Opacity grows with the anomaly: at `low`, below it and where it is NaN, the image is unchanged. Raises ValueError
    unless high > low and the shapes agree.
    """
    image, strength = np.asarray(image), np.clip(np.nan_to_num(scaled(anomaly, low, high)), 0, 1)
    if image.shape != (*strength.shape, 3):
        raise ValueError(f"an image {image.shape} and an anomaly map {strength.shape} do not fit")
    alpha = OPACITY * strength[..., None]
    return (image * (1 - alpha) + colour(strength) * alpha).round().astype(np.uint8)


def save(image, path):
    """Write a PIL image as PNG; a reader of `path` sees the old file or the new one, never a part. Makes the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # the same folder: a rename across disks is a copy
    try:
        image.save(temporary, format="PNG", optimize=True)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@lru_cache
def _font(size):
    return ImageFont.load_default(size)


def plain(text):
    """`text` without the accents and signs that the built-in font lacks."""
    letters = unicodedata.normalize("NFD", str(text).translate(SPELLED))
    return "".join(letter for letter in letters if not unicodedata.combining(letter))


def text_width(text, size):
    """Width in pixels of `text` at a font size."""
    return _font(2 * size).getlength(plain(text)) / 2


def shorten(text, size, width):
    """`text`, with an ellipsis in place of its middle where it is wider than `width` pixels."""
    text = short = plain(text)
    keep = len(text)
    while keep > 1 and text_width(short, size) > width:
        keep -= 1
        short = text[: (keep + 1) // 2] + "…" + text[len(text) - keep // 2 :]
    return short


def wrap(text, size, width):
    """Break `text` at spaces -> lines of at most `width` pixels. A longer word is shortened."""
    lines = []
    for word in plain(text).split():
        if lines and text_width(f"{lines[-1]} {word}", size) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(shorten(word, size, width))
    return lines


def number(value):
    """A value as the pictures and tables print it: three decimals, or four digits where those would say nothing."""
    return f"{value:.3f}" if value == 0 or 0.01 <= abs(value) < 100 else f"{value:.4g}"


class _Canvas:
    """A white sheet, drawn twice as large and halved at the end: every edge comes out smooth. Units: final pixels."""

    def __init__(self, width, height):
        self.sheet = Image.new("RGB", (2 * round(width), 2 * round(height)), "white")
        self.draw = ImageDraw.Draw(self.sheet)

    def text(self, x, y, text, size=12, fill=INK, anchor="la", width=float("inf")):
        self.draw.text((2 * x, 2 * y), shorten(text, size, width), fill, _font(2 * size), anchor)

    def bar(self, left, top, right, bottom, fill):
        left, top = round(left), round(top)  # whole pixels: a thin line that straddles two of them is a blur
        right, bottom = max(round(right), left + 1), max(round(bottom), top + 1)
        self.draw.rectangle((2 * left, 2 * top, 2 * right - 1, 2 * bottom - 1), fill)

    def line(self, points, fill, dash=()):
        for piece in dashes(2.0 * np.asarray(points), 2 * np.array(dash)):
            self.draw.line(piece.ravel().tolist(), fill, 3 if len(dash) else 4, joint="curve")

    def circle(self, x, y, radius, outline, fill):
        self.draw.circle((2 * x, 2 * y), 2 * radius, fill, outline, 3)

    def image(self):
        return self.sheet.reduce(2)


def dashes(points, pattern):
    """Cut a polyline (N,2) into dashes. pattern: lengths on, off, on, off …; () leaves it whole -> list of (M,2)."""
    if not len(pattern):
        return [points]
    along = np.concatenate([[0], np.hypot(*np.diff(points, axis=0).T).cumsum()])
    steps = np.arange(0, along[-1] + 1)  # a point per unit of length: finer than the eye can tell
    path = np.stack([np.interp(steps, along, axis) for axis in points.T], axis=1)
    part = np.searchsorted(np.cumsum(pattern), steps % np.sum(pattern), "right")
    return np.split(path, np.flatnonzero(np.diff(part)) + 1)[::2]  # on and off alternate, and on comes first


def panel(rows, low, high, title, note=""):
    """Grid of tiles, a row per image and a column per kind of tile -> PIL image.

    rows: dicts with name (str), score (float), verdict (str, may be empty) and images, {column: tile}, where a tile is
    a picture (H,W,3) or (H,W) uint8, a mask (H,W) bool, a map (H,W) float, or None: "no mask". The first row names the
    columns. Maps in a column "anomaly …" are coloured from low to high, those of any other column from 0 to the
    greatest value in that column; the colour bar below it says so. Raises ValueError when rows is empty or unless
    high > low, KeyError where a row lacks a column.
    """
    if not rows:
        raise ValueError("a panel needs at least one row")
    columns, side, gap, scales = list(rows[0]["images"]), 132, 8, {}
    for column in columns:
        tiles = [np.asarray(row["images"][column]) for row in rows]
        if column.startswith("anomaly"):  # overlays too: they are on the same scale
            scales[column] = low, high
        elif maps := [t for t in tiles if t.dtype.kind == "f"]:
            scales[column] = 0, max(float(np.nanmax(m)) for m in maps) or 1
    width = side + len(columns) * (TILE + gap)
    titles, notes = wrap(title, 16, width - 2 * gap), wrap(note, 11, width - 2 * gap)
    top = 10 + 21 * len(titles) + 22
    bottom = top + len(rows) * (TILE + gap) + 34 * bool(scales)
    canvas, pasted = _Canvas(width, bottom + 15 * len(notes) + gap), []
    for i, line in enumerate(titles):
        canvas.text(gap, 8 + 21 * i, line, 16)
    for j, column in enumerate(columns):
        left = side + j * (TILE + gap)
        canvas.text(left + TILE / 2, top - 6, column, 12, INK, "ms", TILE)
        for i, row in enumerate(rows):
            y, picture = top + i * (TILE + gap), row["images"][column]
            if picture is None:
                canvas.bar(left, y, left + TILE, y + TILE, PALE)
                canvas.text(left + TILE / 2, y + TILE / 2, "no mask", 12, FAINT, "mm", TILE)
            else:
                pasted.append((_tile(picture, *scales.get(column, (0, 1)), TILE), (left, y)))
        if column in scales:
            y = top + len(rows) * (TILE + gap)
            pasted.append((Image.fromarray(colour(np.tile(np.linspace(0, 1, TILE), (9, 1)))), (left, y)))
            for x, value, anchor in zip((left, left + TILE), scales[column], ("la", "ra")):
                canvas.text(x, y + 12, f"{value:.3g}", 11, INK, anchor, TILE / 2 - 4)
    for i, row in enumerate(rows):
        y = top + i * (TILE + gap) + 2
        canvas.text(gap, y, row["name"], 12, width=side - 2 * gap)
        canvas.text(gap, y + 18, f"score {number(row['score'])}", 12, FAINT, width=side - 2 * gap)
        canvas.text(gap, y + 36, row["verdict"], 13, ALARM, width=side - 2 * gap)
    for i, line in enumerate(notes):
        canvas.text(gap, bottom + 15 * i, line, 11, FAINT)
    image = canvas.image()
    for picture, corner in pasted:  # pasted after the halving, so that a tile keeps its exact colours
        image.paste(picture, corner)
    return image


def _tile(picture, low, high, size):
    """A picture, a mask or a map (see panel) -> PIL image of at most size x size, centred on a pale ground."""
    picture = np.asarray(picture)
    if picture.dtype == bool:
        picture = picture.astype(np.uint8) * 255
    if picture.dtype.kind == "f":  # resize the values, then colour them: a mean of two colours is no value of the map
        values = ImageOps.contain(Image.fromarray(picture.astype(np.float32)), (size, size), Image.Resampling.BILINEAR)
        image = Image.fromarray(colour(scaled(values, low, high)))
    else:
        image = Image.fromarray(picture).convert("RGB")
    return ImageOps.pad(image, (size, size), color=PALE)


def ticks(low, high, log=False, count=5):
    """Round numbers (1, 2 or 5 times a power of ten) in even steps that enclose low..high -> (N,), N >= 2.

    log: only powers of ten, or 1, 2 and 5 times them where low..high is short; needs low > 0.
    """
    if log:
        powers = np.arange(np.floor(np.log10(low)) - 1, np.ceil(np.log10(high)) + 2)
        marks = np.outer(10.0**powers, (1, 2, 5) if high / low < 200 else (1,)).ravel()
        first, last = np.searchsorted(marks, low, "right") - 1, np.searchsorted(marks, high)
        pad = first == last  # one value, itself a mark: it goes to the middle
        return marks[first - pad : last + 1 + pad]
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # one value: it goes to the middle
        pad = abs(low) / 10 or 1
        low, high = low - pad, high + pad
    rough = (high - low) / count
    power = 10.0 ** np.floor(np.log10(rough))
    step = power * min(m for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    return np.arange(np.floor(low / step + 1e-9), np.ceil(high / step - 1e-9) + 1) * step


def _along(span, first, last, log=False):
    """-> function: value -> pixel, with span[0] at pixel `first` and span[-1] at `last`."""
    scale = np.log10 if log else np.asarray
    low, high = scale(span[0]), scale(span[-1])
    return lambda value: first + (scale(value) - low) / (high - low) * (last - first)


def peak_and_final(x, y):
    """-> ((x, y) of the greatest y, (x, y) of the last), both among the finite ones; None where there are none."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    finite = np.flatnonzero(np.isfinite(y))
    if not len(finite):
        return None
    return tuple((float(x[i]), float(y[i])) for i in (finite[y[finite].argmax()], finite[-1]))


def curve(series, path, title="", right=(0, 1)):
    """Line chart -> PNG at path.

    series: dicts with name, x (N,), y (N,) and, if wanted, axis ("left", the default, or "right"), log (True: the left
    axis is logarithmic) and label_ends (True: mark and print the peak, hollow, and the final value, filled). None, NaN,
    infinity and, on a logarithmic axis, what is not positive are gaps. The left axis fits its values; the right one
    is `right`, wider only where a value lies outside. Raises ValueError when x and y differ in length.
    """
    small_multiples([{"series": series, "title": title, "right": right}], path)


def small_multiples(charts, path):
    """Several line charts, one below the other -> PNG at path. charts: dicts with series and, if wanted, title, right.

    See curve for these. Raises ValueError when charts is empty.
    """
    if not charts:
        raise ValueError("small multiples need at least one chart")
    legend = max(len(chart["series"]) for chart in charts)  # the same for all: their plots then line up
    images = [_chart(chart, legend) for chart in charts]
    height = images[0].height
    sheet = Image.new("RGB", (WIDTH, height * len(images)), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (0, i * height))
    save(sheet, path)


def _chart(chart, legend):
    """One line chart, see curve -> PIL image. legend: lines of room above the plot."""
    log = any(s.get("log") for s in chart["series"] if s.get("axis") != "right")
    series, values, steps = [], {}, []
    for s in chart["series"]:
        x, y, axis = np.array(s["x"], float), np.array(s["y"], float), s.get("axis", "left")
        if x.shape != y.shape:
            raise ValueError(f"{s['name']}: {x.size} x for {y.size} y")
        y[~np.isfinite(y) | (log and axis == "left") & (y <= 0)] = np.nan
        series.append((s, axis, x, y))
        steps += x.tolist()
        values.setdefault(axis, []).extend(y[~np.isnan(y)])
    if "right" in values:
        values["right"] += chart.get("right", (0, 1))
    marks = {a: ticks(min(v, default=0.1), max(v, default=1), log and a == "left") for a, v in values.items()}

    left, right = (16 + max([text_width(f"{m:g}", 11) for m in marks.get(a, [])] + [6]) for a in ("left", "right"))
    right, head = WIDTH - right, 28 if chart.get("title") else 8
    top = head + 17 * legend + 8
    bottom = top + 260
    canvas = _Canvas(WIDTH, bottom + 44)
    canvas.text(left, 6, chart.get("title", ""), 14, width=right - left)
    canvas.text((left + right) / 2, bottom + 36, "steps", 11, INK, "ms", right - left)
    place = {a: _along(m, bottom, top, log and a == "left") for a, m in marks.items()}
    for axis, at, anchor in (("left", left - 6, "rm"), ("right", right + 6, "lm")):
        for mark in marks.get(axis, []):
            y = place[axis](mark)
            canvas.text(at, y, f"{mark:g}", 11, FAINT, anchor)
            if axis == min(marks):  # the grid of one axis only: two would not meet
                canvas.bar(left, y, right, y + 1, PALE)

    canvas.bar(left, bottom, right, bottom + 1, FAINT)
    span = np.array([min(steps, default=0), max(steps, default=1)])
    across = ticks(*span, count=WIDTH // 80)
    span = span if span[1] > span[0] else across
    across_at = _along(span, left + 8, right - 8)  # inset: a marker at an end stays clear of the axis labels
    for mark in across[(across >= span[0]) & (across <= span[-1])]:
        canvas.bar(across_at(mark), bottom, across_at(mark) + 1, bottom + 5, FAINT)
        canvas.text(across_at(mark), bottom + 18, f"{mark:g}", 11, FAINT, "ms")

    where = {"left": " (left, log)" if log else " (left)", "right": " (right)"} if len(marks) == 2 else {}
    labels = [s["name"] + where.get(axis, "") for s, axis, *_ in series]
    ends_at = min(left + 50 + max([text_width(label, 11) for label in labels] + [0]), WIDTH - 215)
    for i, (s, axis, x, y) in enumerate(series):
        fill, dash, row = COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)], head + 17 * i + 4
        canvas.line([(left, row), (left + 28, row)], fill, dash)
        canvas.text(left + 34, row, labels[i], 11, INK, "lm", ends_at - left - 44)
        present = np.flatnonzero(~np.isnan(y))
        if not len(present):
            canvas.text(ends_at, row, "no data", 11, FAINT, "lm")
            continue
        for run in np.split(present, np.flatnonzero(np.diff(present) > 1) + 1):  # a gap stays a gap
            points = np.stack([across_at(x[run]), place[axis](y[run])], axis=1)
            canvas.line(points if len(run) > 1 else points + [[-2, 0], [2, 0]], fill, dash)  # a lone point: a stroke
        if s.get("label_ends"):
            (peak, final), at = peak_and_final(x, y), ends_at
            for point, text, radius, inside in ((peak, f"peak {number(peak[1])} at {peak[0]:g}", 4.5, "white"),
                                                (final, f"final {number(final[1])}", 2.5, fill)):
                canvas.circle(across_at(point[0]), place[axis](point[1]), radius, fill, inside)  # small fits in large
                canvas.circle(at, row, radius, fill, inside)
                canvas.text(at + 8, row, text, 11, INK, "lm")
                at += 26 + text_width(text, 11)
    return canvas.image()


def _known(value):
    return value is not None and np.isfinite(value)


def bars(table, path, title):
    """Grouped horizontal bars with their values printed -> PNG at path.

    table: {row label: {column label: value}}; a value that is None or NaN is printed as "n/a". A column keeps its
    colour in every row. Where all values are close together, the axis starts above 0 and says so.
    """
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    known = [value for row in table.values() for value in row.values() if _known(value)]
    low, high = min(known, default=0), max(known, default=1)
    low = low - (high - low) / 4 if low > high / 2 else min(low, 0)  # a quarter: the shortest bar has some length too
    marks = ticks(low, max(high, 0))
    names, inner = (min(max([text_width(t, 12) for t in texts] + [0]) + 12, 160) for texts in (table, columns))
    left, right, top = names + inner + 10, WIDTH - 120, 40
    bottom = top + sum(18 * len(row) + 12 for row in table.values())
    canvas, place = _Canvas(WIDTH, bottom + 48), _along(marks, left, right)
    canvas.text(10, 8, title, 16, width=WIDTH - 20)
    for mark in marks:
        canvas.bar(place(mark), top, place(mark) + 1, bottom, PALE)
        canvas.text(place(mark), bottom + 16, f"{mark:g}", 11, FAINT, "ms")
    if marks[0] > 0:
        canvas.text((left + right) / 2, bottom + 36, f"the axis starts at {marks[0]:g}, not at 0", 11, ALARM, "ms")
    y, zero = top, place(max(marks[0], 0))
    for label, row in table.items():
        canvas.text(10, y + 6 + 9 * len(row), label, 12, INK, "lm", names - 8)
        for i, (column, value) in enumerate(row.items()):
            middle, end = y + 15 + 18 * i, place(value) if _known(value) else zero
            canvas.text(left - 8, middle, column, 12, FAINT, "rm", inner - 8)
            fill = COLOURS[columns.index(column) % len(COLOURS)]
            canvas.bar(min(zero, end), middle - 6, max(zero, end), middle + 6, fill)
            canvas.text(max(zero, end) + 6, middle, number(value) if _known(value) else "n/a", 11, INK, "lm", 110)
        y += 18 * len(row) + 12
    canvas.bar(zero, top, zero + 1, bottom, FAINT)
    save(canvas.image(), path)


def _cells(header, rows):
    """-> header and rows as lists of str. Raises ValueError where a row is longer or shorter than the header."""
    lines = [["-" if c is None else number(c) if isinstance(c, float) else str(c) for c in r] for r in (header, *rows)]
    if any(len(line) != len(header) for line in lines):
        raise ValueError(f"every row must have {len(header)} cells")
    return lines


def text_table(header, rows):
    """Monospace table -> str, its first column to the left. Floats are shortened, None is "-".

    Raises ValueError where a row has not as many cells as the header.
    """
    lines = _cells(header, rows)
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * w for w in widths])
    return "\n".join(
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths))).rstrip()
        for line in lines
    )


def markdown_table(header, rows):
    """The same as a markdown table; a "|" in a cell is escaped and a line break becomes a space."""
    lines = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in _cells(header, rows)]
    lines.insert(1, ["---", *["---:"] * (len(header) - 1)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
