"""Pictures of results: anomaly overlays, panels of tiles, a line chart, a table.

NumPy and Pillow alone, with Pillow's built-in font, so a picture looks the same on every system. Arrays in; a PIL image
out, or a PNG that appears whole or not at all. The colours of an anomaly map span the `low` and `high` that the caller
gives, so that two pictures can be compared.
"""

import os
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

# The inferno map without its last, nearly white step, which would vanish over a white background.
INFERNO = bytes.fromhex("000004 1b0c41 4a0c6b 781c6d a52c60 cf4446 ed6925 fb9b06 f7d13d")
OPACITY = 0.85  # of the highest anomaly in an overlay: the image stays recognisable below it
INK, FAINT, PALE, ALARM = "#202020", "#707070", "#e2e2e2", "#b03a00"
# Okabe and Ito's colours for the colour-blind, without the yellow that is too pale for a line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
TILE = 160  # side of a picture in a panel, in pixels
GAP = 8  # between two of them
SIDE = 140  # room for the names to their left
WIDTH = 830  # of a chart: what a README shows without shrinking it
LEFT, RIGHT = 120, 2 * WIDTH - 100  # of its plot, while it is drawn twice as large
ROUND = np.outer(10.0 ** np.arange(-15, 16), (1, 2, 5)).ravel()  # numbers that suit a tick


def colour(values):
    """Colour-blind-safe colours, ever lighter. values: any shape, clipped to [0,1] -> (…,3) uint8; NaN is grey."""
    values = np.asarray(values, float)
    steps = np.frombuffer(INFERNO, np.uint8).reshape(-1, 3)
    places = np.linspace(0, 1, len(steps))
    rgb = np.stack([np.interp(values, places, channel) for channel in steps.T], axis=-1)
    rgb[np.isnan(values)] = 128
    return rgb.round().astype(np.uint8)


def overlay(image, anomaly, low, high):
    """The image under its anomaly map. image (H,W,3) uint8, anomaly (H,W) -> (H,W,3) uint8.

    Opacity grows with the anomaly: at `low`, below it and where it is NaN, the image is unchanged. Raises ValueError
    unless high > low and the shapes agree.
    """
    if not high > low:
        raise ValueError(f"a scale needs high > low, not {low} to {high}")
    strength = np.clip(np.nan_to_num((np.asarray(anomaly, float) - low) / (high - low)), 0, 1)
    if image.shape != (*strength.shape, 3):
        raise ValueError(f"an image {image.shape} and an anomaly map {strength.shape} do not fit")
    alpha = OPACITY * strength[..., None]
    return (image * (1 - alpha) + colour(strength) * alpha).round().astype(np.uint8)


def save(image, path):
    """Write a PIL image as PNG; a reader of `path` sees the old file or the new one, never a part. Makes the folder."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    image.save(f"{path}.part", format="PNG", optimize=True)
    os.replace(f"{path}.part", path)


def number(value):
    """A value as the pictures print it: three decimals, or four digits where those would say nothing."""
    return f"{value:.3f}" if value == 0 or 0.01 <= abs(value) < 100 else f"{value:.4g}"


def _write(draw, x, y, text, size=12, fill=INK, anchor="la"):
    # The built-in font has ASCII and little more.
    draw.text((x, y), text.encode("ascii", "replace").decode(), fill, ImageFont.load_default(size), anchor)


def panel(rows, low, high, title, note=""):
    """Grid of tiles, a row per image and a column per kind of tile -> PIL image.

    rows: dicts with name (str), score (float), verdict (str, may be empty) and images, {column: tile}, where a tile is
    a picture (H,W,3) uint8, a mask (H,W) bool, or None: "no mask". The first row names the columns. Below a column
    "anomaly …" a colour bar goes from low to high, the range of its overlays. Raises KeyError where a row lacks a
    column, IndexError when there is no row.
    """
    columns = rows[0]["images"]
    width = SIDE + len(columns) * (TILE + GAP)
    note = textwrap.fill(note, width // 6)  # a letter is about half as wide as high
    top = 56
    bottom = top + len(rows) * (TILE + GAP)
    sheet = Image.new("RGB", (width, bottom + 60 + 15 * note.count("\n")), "white")
    draw = ImageDraw.Draw(sheet)
    _write(draw, GAP, GAP, title, 16)
    _write(draw, GAP, bottom + 34, note, 11, FAINT)
    for i, row in enumerate(rows):
        y = top + i * (TILE + GAP)
        _write(draw, GAP, y, f"{textwrap.fill(row['name'], 20)}\nscore {number(row['score'])}")
        _write(draw, GAP, y + TILE / 2, row["verdict"], 13, ALARM, "lm")
    for j, column in enumerate(columns):
        left = SIDE + j * (TILE + GAP)
        _write(draw, left + TILE / 2, top - 6, column, anchor="ms")
        for i, row in enumerate(rows):
            sheet.paste(_tile(row["images"][column]), (left, top + i * (TILE + GAP)))
        if column.startswith("anomaly"):
            bar = np.tile(np.linspace(0, 1, TILE), (9, 1))
            sheet.paste(Image.fromarray(colour(bar)), (left, bottom))
            _write(draw, left, bottom + 12, f"{low:.3g} to {high:.3g}", 11)
    return sheet


def _tile(picture):
    """A picture, a mask or None (see panel) -> PIL image of TILE x TILE, centred on a pale ground."""
    if picture is None:
        tile = Image.new("RGB", (TILE, TILE), PALE)
        _write(ImageDraw.Draw(tile), TILE / 2, TILE / 2, "no mask", 12, FAINT, "mm")
        return tile
    return ImageOps.pad(Image.fromarray(picture).convert("RGB"), (TILE, TILE), color=PALE)


def table(header, rows):
    """Rows of cells -> aligned text that is a Markdown table too; None is "-"."""
    lines = [["-" if cell is None else str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def _axis(values, first, last, log=False):
    """Lay the range of some values out over pixels first..last -> (function: value -> pixel, round numbers within)."""
    values = [value for value in values if np.isfinite(value)] or [0.1, 1]
    low, high = min(values), max(values)
    if low == high:  # one value: it goes to the middle
        margin = abs(low) / 10 or 1
        low, high = low - margin, high + margin
    scale = np.log10 if log else np.asarray

    def place(value):
        return np.interp(scale(value), scale([low, high]), [first, last])

    marks = ROUND
    if not log or high < 5 * low:  # at most nine, in even steps
        step = ROUND[ROUND >= (high - low) / 8][0]
        marks = step * np.arange(np.ceil(low / step), high / step + 1)
    return place, marks[(marks >= low) & (marks <= high)]


def curve(series, path, title="", right=(0, 1), across="steps"):
    """Line chart -> PNG at path.

    series: dicts with name, x (N,), y (N,), axis ("left", which is logarithmic, or "right") and, if wanted, label_ends
    (True: mark and print the peak, hollow, and the final value, filled). None, NaN, infinity and, on the left axis,
    what is not positive are gaps. The left axis fits its values; the right one is `right`, wider only where a value
    lies outside. across: what x counts. Raises ValueError when x and y differ in length.
    """
    lines = [_cleaned(s) for s in series]
    steps, values = [], {}
    for side, x, y in lines:
        steps.extend(x)
        values.setdefault(side, [] if side == "left" else [*right]).extend(y)

    # Drawn twice as large and halved at the end, which smooths every edge; the lengths below are the doubled ones.
    top = 64 + 36 * len(series)
    bottom = top + 520
    sheet = Image.new("RGB", (2 * WIDTH, bottom + 90), "white")
    draw = ImageDraw.Draw(sheet)
    _write(draw, LEFT, 10, title, 28)
    axes = {side: _axis(found, bottom, top, side == "left") for side, found in values.items()}
    along, marks = _axis(steps, LEFT + 16, RIGHT - 16)  # inset: a marker at an end stays clear of the axis labels
    draw.line((LEFT, bottom, RIGHT, bottom), FAINT, 2)
    for mark in marks:
        _write(draw, along(mark), bottom + 36, f"{mark:g}", 22, FAINT, "ms")
    _write(draw, WIDTH, bottom + 72, across, 22, INK, "ms")
    _vertical(draw, axes)
    for i, (s, (side, x, y)) in enumerate(zip(series, lines)):
        shade, height = COLOURS[i % len(COLOURS)], 66 + 36 * i
        up, known = axes[side][0], np.flatnonzero(np.isfinite(y))
        label = f"{s['name']} ({side})" if len(axes) > 1 else s["name"]
        if len(known):
            _polyline(draw, along(x), up(y), shade)
            if s.get("label_ends"):
                peak, final = known[y[known].argmax()], known[-1]
                label += f": peak {number(y[peak])} at {x[peak]:g} (ring), final {number(y[final])} (dot)"
                draw.circle((along(x[peak]), up(y[peak])), 9, "white", shade, 3)
                draw.circle((along(x[final]), up(y[final])), 5, shade)
        draw.line((LEFT, height, LEFT + 56, height), shade, 5)
        _write(draw, LEFT + 70, height, label, 22, anchor="lm")
    save(sheet.reduce(2), path)


def run_series(records, keys, prefix=""):
    """What `curve` draws of a run's records, dicts of step, loss and metrics: of each key a series over the steps.

    The loss is on the left axis, all else on the right; None, an unknown copy ratio, is a gap.
    """
    x, series = [record["step"] for record in records], []
    for key in keys:
        y = [record[key] for record in records]
        how = {"axis": "left"} if key == "loss" else {"axis": "right", "label_ends": True}
        series.append({"name": prefix + key.replace("_", " "), "x": x, "y": y} | how)
    return series


def _cleaned(s):
    """-> (axis, x, y) of a series, y with NaN for what cannot be drawn."""
    x, y = np.array(s["x"], float), np.array(s["y"], float)
    if x.shape != y.shape:
        raise ValueError(f"{s['name']}: {x.size} x for {y.size} y")
    y[~np.isfinite(y)] = np.nan
    if s["axis"] == "left":
        y[y <= 0] = np.nan
    return s["axis"], x, y


def _vertical(draw, axes):
    """The ticks of the axes at the sides; the grid belongs to the first one only, as two would not meet."""
    for side, (up, marks) in axes.items():
        x, anchor = (LEFT - 12, "rm") if side == "left" else (RIGHT + 12, "lm")
        for mark in marks:
            y = up(mark)
            _write(draw, x, y, f"{mark:g}", 22, FAINT, anchor)
            if side == min(axes):
                draw.line((LEFT, y, RIGHT, y), PALE, 2)


def _polyline(draw, x, y, shade):
    """A line through points, broken where y is NaN; a lone point becomes a dot."""
    for run in np.ma.clump_unmasked(np.ma.masked_invalid(y)):
        points = np.stack([x[run], y[run]], axis=1)
        if len(points) == 1:
            draw.circle(points[0].tolist(), 4, shade)
        draw.line(points.ravel().tolist(), shade, 4, joint="curve")
