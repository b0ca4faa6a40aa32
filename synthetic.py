"""Draw a small data set like visual inspection: the same part photographed again and again, and six kinds of defect.

A category is one instance: one weave, one gear, one circuit board, on every photo the same. What varies is what
varies below a camera: the part lies up to 1.7 % of the photo and 1.4 degrees off, the lamp is brighter, dimmer or
tilted, the sensor has noise. Defects are faint, `contrast` = 0.4 of their full strength: a vivid one has features far
from all training features, no reconstructor can copy it, and a set of such defects could not tell what copying costs.
`contrast=1` draws the vivid ones.

`draw` makes one image with its exact mask and its twin, the same photo without the defect; `write_synthetic` writes a
set of them in the MVTec AD layout. Needs NumPy and Pillow only.

    python synthetic.py --out ./synthetic

Parts are drawn in unit coordinates, x right and y down, on a canvas a little larger than the photo. A point is the
complex number x + iy: turning it is then a product, and an outline is a complex array.
"""

import argparse
import functools
import inspect
import json
import zlib
from math import tau
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFilter

DEFECTS = ("hole", "misplaced_part", "missing_part", "scratch", "stain", "wrong_colour")
PHOTO = 0.88  # side of the photo on the canvas
CIRCLE = np.exp(1j * np.linspace(0, tau, 48, endpoint=False))


class SyntheticError(Exception):
    """The arguments or the folder do not suit; the message is one sentence."""


def draw(category, seed, defect=None, size=256, contrast=0.4):
    """Draw one image: (image, twin, mask) as (size, size, 3) uint8, the same without the defect, and (size, size) bool.

    The mask is True exactly where image and twin differ, which they do only where it is visible. `seed` is a list of
    integers; equal arguments, equal pixels.
    contrast: strength of the defect, above 0 to 1; of a misplaced part how far it is off, of all others their colour.
    """
    part = _part(category, size)
    twin = _photograph(part[0], seed, size)
    if defect is None:
        return twin, twin, np.zeros((size, size), bool)
    for attempt in range(30):  # until the defect is neither too small to matter nor absurdly large
        spoiled = _spoil(*part, np.random.default_rng([*seed, 1, attempt]), defect, contrast)
        image = _photograph(spoiled, seed, size)
        # What nobody could see stays the twin's: differences below 4 grey levels, and specks (the median).
        change = np.abs(image.astype(int) - twin).max(axis=2).astype(np.uint8)
        smooth = Image.fromarray(change).filter(ImageFilter.MedianFilter(max(3, size // 50 | 1)))
        mask = np.minimum(change, smooth) >= 4
        if 0.003 <= mask.mean() <= 0.06:
            break
    return np.where(mask[..., None], image, twin), twin, mask


@functools.lru_cache(8)
def _part(category, size):
    """The one instance: (whole (2 size, 2 size, 3) float32, bare, surface, pieces).

    Bare is what shows where a piece is missing, surface (bool) where scratches and the like can be, and pieces are the
    outlines of what can be missing or misplaced.
    """
    return PARTS[category](np.random.default_rng(zlib.crc32(category.encode())), 2 * size)


def _photograph(canvas, seed, size):
    rng = np.random.default_rng([*seed, 0])  # whatever the defect draws: pose, light and noise stay those of the twin
    angle = rng.uniform(-0.025, 0.025)
    turn = PHOTO * np.exp(1j * angle)
    corner = complex(*rng.uniform(0.485, 0.515, 2)) - turn * (0.5 + 0.5j)
    affine = (turn.real, -turn.imag, 2 * size * corner.real, turn.imag, turn.real, 2 * size * corner.imag)
    picture = Image.fromarray(np.clip(np.rint(canvas), 0, 255).astype(np.uint8))
    picture = picture.transform(picture.size, Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC).reduce(2)
    y, x = _grid(size)
    slope = (x + 1j * y - 0.5 - 0.5j) * _direction(rng)
    light = rng.uniform(0.92, 1.08) * (1 + rng.uniform(0, 0.15) * slope.real)
    noise = 2 * rng.standard_normal((size, size, 3), np.float32)
    photo = np.rint(picture * light[..., None] + noise)
    return np.clip(photo, 0, 255).astype(np.uint8)


def _spoil(whole, bare, surface, pieces, rng, defect, contrast):
    """-> the canvas with a defect."""
    size = len(whole)
    piece = pieces[rng.integers(len(pieces))]
    y, x = rng.choice(np.argwhere(surface)) / size
    centre = x + 1j * y
    here = whole[surface].mean()
    if defect == "misplaced_part":
        way = rng.uniform(0.035, 0.05) * _direction(rng)
        return _push(whole, piece.mean(), contrast * way)
    if defect == "missing_part":
        return _blend(whole, contrast * _stencil(size, piece), bare)
    if defect == "scratch":
        t = np.linspace(-0.5, 0.5, 12)
        length, bend = rng.uniform([0.2, -0.5], 0.5)
        line = t * length + 1j * bend * t**2
        line = centre + line * _direction(rng)
        cover = _stencil(size, line, width=rng.uniform(0.008, 0.014))
        return _blend(whole, contrast * 0.85 * cover * surface, 245 if here < 150 else 60)
    if defect == "hole":
        outline = _blob(rng, centre, 0.032, 0.075, 0.2)
        image = _blend(whole, contrast * _stencil(size, outline + 0.006 + 0.006j), 250)  # the rim is lit
        return _blend(image, contrast * _stencil(size, outline), 14)
    if defect == "stain":
        cover = rng.uniform(0.5, 0.75) * _stencil(size, _blob(rng, centre, 0.05, 0.1, 0.2), blur=0.008)
        colour = "#46301a" if here > 90 else "#aca48c"  # grease, or dust where it is dark
        return _blend(whole, contrast * cover, _rgb(colour))
    cover = _stencil(size, _blob(rng, centre, 0.06, 0.13, 0.15))  # wrong_colour
    dye = rng.choice([[1.2, 0.75, 0.65], [0.65, 0.85, 1.25], [1.15, 1.0, 0.5]])
    grey = whole.mean(axis=2, keepdims=True)
    return _blend(whole, contrast * cover * surface, (0.85 * grey + 25) * dye)


def _push(image, centre, way):
    """Move what is around `centre`, less and less farther out: a snag, a bent tooth, a bent leg."""
    size = len(image)
    y, x = _grid(size)
    weight = np.exp(-((x - centre.real) ** 2 + (y - centre.imag) ** 2) / 0.06**2)
    rows = np.clip((y - way.imag * weight) * size, 0, size - 1).astype(int)
    columns = np.clip((x - way.real * weight) * size, 0, size - 1).astype(int)
    return image[rows, columns]


def _fabric(rng, size):
    """Plain weave: blue threads run down, sand-coloured ones across; u and v count them."""
    y, x = _grid(size)
    u = 22 * x + _noise(rng, size, 4) / 8
    v = 22 * y + _noise(rng, size, 4) / 8
    s = 2 * (u % 1) - 1  # -1..1 across a thread
    t = 2 * (v % 1) - 1
    down = _thread(0.9, t, s) * _rgb("#607aa8")
    across = _thread(0.86, s, t) * _rgb("#e2d6be")
    on_top = ((np.floor(u) + np.floor(v)) % 2 == 0)[..., None]
    whole = np.where(on_top, down, across)
    bare = np.where(on_top, down, 0.55 * down)  # a thread is gone: a deeper, darker one shows
    pieces = [_box(rng.uniform(0.3, 0.7) + 1j * (row + 0.5) / 22, 0.3, 1 / 22) for row in range(4, 18)]
    return whole, bare, np.ones((size, size), bool), pieces


def _thread(brightness, along, across):
    """Threads are round and bent; -> (size, size, 1)."""
    shade = brightness - 0.1 * along**2 - 0.5 * across**4
    return shade[..., None]


def _gear(rng, size):
    """A brushed steel gear on a dark mat."""
    tooth = np.array([0.31 - 0.062j, 0.40 - 0.034j, 0.40 + 0.034j, 0.31 + 0.062j])
    teeth = [0.5 + 0.5j + tooth * np.exp(1j * tau * k / 13) for k in range(13)]
    holes = [0.5 + 0.5j + 0.205 * np.exp(1j * tau * k / 5) + 0.05 * CIRCLE for k in range(5)]
    cover = 0
    for outline in [0.5 + 0.5j + 0.335 * CIRCLE, *teeth]:
        cover = np.maximum(cover, _stencil(size, outline, blur=0.004))
    for outline in [0.5 + 0.5j + 0.085 * CIRCLE, *holes]:
        cover = np.minimum(cover, 1 - _stencil(size, outline, blur=0.004))
    down, right = np.gradient(cover, 1 / size)
    y, x = (c - 0.5 for c in _grid(size))
    rings = rng.standard_normal(300)[(np.hypot(x, y) * 400).astype(int)]
    steel = 168 + 26 * np.cos(2 * np.arctan2(y, x)) + 5 * rings - 0.5 * (down + right)  # an edge shines
    mat = (52 + 5 * _noise(rng, size, 60))[..., None] * np.float32([0.92, 1, 1.1])
    return _blend(mat, cover, steel[..., None]), mat, cover > 0.9, teeth


def _chip(rng, size):
    """A black chip with six legs a side, soldered to a green board."""
    pieces = []
    image = (1 + 0.04 * _noise(rng, size, 40))[..., None] * _rgb("#246242")
    for k in range(12):  # a track and a pad for each leg
        side = 1 if k % 2 else -1
        leg = 0.5 + 0.245 * side + 1j * (0.25 + 0.1 * (k // 2))
        image = _paint(image, _box(leg + 0.3 * side, 0.6, 0.02), "#307a52")
        image = _paint(image, _box(leg + 0.015 * side, 0.115, 0.058), "#ba9a52")
        pieces.append(_box(leg, 0.12, 0.036))
    image = _paint(image, _box(0.512 + 0.518j, 0.37, 0.63), "#123222")  # the chip's shadow
    body = _box(0.5 + 0.5j, 0.36, 0.62)
    image = bare = _paint(image, body, "#2e2e32")
    for leg in pieces:
        image = _paint(image, leg, "#ced0d4")
        image = _paint(image, _box(leg.mean(), 0.12, 0.012), "#f4f5f8")  # it shines
    for row, width in enumerate((0.2, 0.14, 0.17)):  # the print
        line = _box(0.5 + 0.44j + 0.055j * row, width, 0.022)
        image = _paint(image, line, "#80807e")
        pieces.append(line)
    return image, bare, _stencil(size, body) > 0.9, pieces


PARTS = {"chip": _chip, "fabric": _fabric, "gear": _gear}


def _grid(size):
    """y as (size, 1) and x as (1, size): pixel centres, 0..1."""
    line = (np.arange(size, dtype=np.float32) + 0.5) / size
    return line[:, None], line[None]


def _rgb(name):
    return np.float32(ImageColor.getrgb(name))


def _direction(rng):
    """A random one, as a complex number of length 1."""
    return np.exp(1j * rng.uniform(0, tau))


def _noise(rng, size, bumps):
    """Smooth (size, size) noise, about -1..1, with so many bumps a side."""
    coarse = rng.uniform(-1, 1, (bumps, bumps)).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))


def _box(centre, width, height):
    """The outline of a rectangle: (4,) points."""
    right, down = width / 2, 1j * height / 2
    return centre + np.array([-right - down, right - down, right + down, down - right])


def _blob(rng, centre, smallest, largest, roughness):
    """A closed, irregular outline: (48,) points."""
    radius = rng.uniform(smallest, largest)
    for k in (2, 3, 4, 5):
        wave = CIRCLE**k * _direction(rng)
        radius = radius * (1 + roughness / k * rng.uniform(-1, 1) * wave.real)
    return centre + radius * CIRCLE


def _stencil(size, points, width=0.0, blur=0.0):
    """(size, size) cover 0..1 of a filled outline, or of an open line of this width."""
    sheet = Image.new("L", (size, size))
    points = (points * size).view(float).tolist()  # x, y, x, y ...
    if width:
        ImageDraw.Draw(sheet).line(points, 255, round(width * size), joint="curve")
    else:
        ImageDraw.Draw(sheet).polygon(points, 255)
    return np.asarray(sheet.filter(ImageFilter.GaussianBlur(blur * size)), np.float32) / 255


def _paint(image, outline, colour):
    return _blend(image, _stencil(len(image), outline), _rgb(colour))


def _blend(image, cover, colour):
    cover = np.asarray(cover, np.float32)[..., None]
    return image * (1 - cover) + colour * cover


def write_synthetic(out="./synthetic", size=256, train=60, good=20, each=4, contrast=0.4, seed=0):
    """Write three categories of synthetic images in the MVTec AD layout and return the folder.

    Per category `train` images for training, and for testing `good` normal ones and `each` of every defect kind, with
    exact masks in ground_truth and the same images without their defect in twin. An image depends only on the seed, its
    place and its size, so larger counts keep the smaller set. A complete set with the same arguments is kept as it is,
    a broken-off one is finished. Raises SyntheticError for a folder that holds anything else, or arguments out of
    range.
    """
    if size < 64 or min(train, good, each) < 1 or seed < 0 or not 0 < contrast <= 1:
        raise SyntheticError("the set needs size >= 64, train, good and each >= 1, 0 < contrast <= 1, seed >= 0")
    out = Path(out)
    wanted = {"size": size, "train": train, "good": good, "each": each, "contrast": contrast, "seed": seed}
    begun, complete = (json.dumps({**wanted, "complete": done}) for done in (False, True))
    marker = out / "synthetic.json"
    found = marker.read_text(errors="replace") if marker.is_file() else ""
    if found == complete:
        return out
    if found != begun and out.exists() and (out.is_file() or any(out.iterdir())):
        raise SyntheticError(f"{out} holds something other than this synthetic set; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    marker.write_text(begun)
    jobs = [("train", "good", train), ("test", "good", good)]
    jobs += [("test", defect, each) for defect in DEFECTS]
    for category in PARTS:
        for split, defect, count in jobs:
            for index in range(count):
                _write(out / category, split, defect, index, size, seed, contrast)
    marker.write_text(complete)
    return out


def _write(folder, split, defect, index, size, seed, contrast):
    """Draw and write one image of a category, if it is defective with its mask and its twin."""
    key = zlib.crc32(f"{folder.name}/{split}/{defect}/{index}".encode())  # own randomness for every image
    kind = None if defect == "good" else defect
    image, twin, mask = draw(folder.name, [seed, key], kind, size, contrast)
    files = {f"{split}/{defect}/{index:03}.png": image}
    if kind:
        files[f"ground_truth/{defect}/{index:03}_mask.png"] = mask
        files[f"twin/{defect}/{index:03}.png"] = twin
    for name, pixels in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, compress_level=1)  # noise hardly compresses anyway


def main(argv=None):
    parser = argparse.ArgumentParser(description="Write synthetic images of parts, good and defective.")
    for option in inspect.signature(write_synthetic).parameters.values():
        value = option.default
        parser.add_argument(f"--{option.name}", type=type(value), default=value, help=f"default: {value}")
    try:
        print(write_synthetic(**vars(parser.parse_args(argv))))
    except SyntheticError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
