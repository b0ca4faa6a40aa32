"""Draw a small data set for unsupervised anomaly detection: two textures and two objects, six kinds of defect.

`draw` makes one image with its exact mask and its twin, the same image without the defect; `write_synthetic` writes a
set of them in the MVTec AD layout. Needs numpy and Pillow only.

    python synthetic.py --out ./synthetic

Everything is drawn in unit coordinates, x right and y down. A point is the complex number x + iy: turning it is then
a product, and an outline is a complex array.
"""

import argparse
import inspect
import json
import math
import zlib
from math import tau
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFilter

DEFECTS = ("hole", "misplaced_part", "missing_part", "scratch", "stain", "wrong_colour")


class SyntheticError(Exception):
    """The arguments or the folder do not suit; the message is one sentence."""


def draw(category, seed, defect=None, size=256):
    """Draw one image: (image, twin, mask) as (size, size, 3) uint8, the same without the defect, and (size, size) bool.

    The mask is True exactly where image and twin differ. `seed` is a list of integers; equal arguments, equal pixels.
    """
    twin = _render(category, seed, None, 0, size)
    if defect is None:
        return twin, twin, np.zeros((size, size), bool)
    for attempt in range(30):  # until the defect is neither too small to matter nor absurdly large
        image = _render(category, seed, defect, attempt, size)
        # A soft edge fades over pixels that nobody could tell apart: below 4 grey levels they are the twin's.
        mask = np.abs(image.astype(int) - twin).max(axis=2) >= 4
        if 0.003 <= mask.mean() <= 0.06:
            break
    return np.where(mask[..., None], image, twin), twin, mask


def _render(category, seed, defect, attempt, size):
    # Two generators: whatever the defect draws, the part, its light and the sensor noise stay those of the twin.
    nature = np.random.default_rng([*seed, 0])
    damage = np.random.default_rng([*seed, 1, attempt])
    image, part = PARTS[category](nature, damage, defect, size)
    if defect not in (None, "missing_part", "misplaced_part"):
        image = _spoil(image, part, damage, defect)
    direction = nature.uniform(0, tau)
    tilt = nature.uniform(0, 0.2)
    gain = nature.uniform(0.92, 1.08)
    y, x = _grid(size)
    slope = (x - 0.5) * np.cos(direction) + (y - 0.5) * np.sin(direction)
    light = gain * (1 + tilt * slope)
    noise = 2 * nature.standard_normal(image.shape, np.float32)
    image = np.rint(image * light[..., None] + noise)
    return np.clip(image, 0, 255).astype(np.uint8)


def _spoil(image, part, rng, defect):
    """Paint a surface defect onto a float image, centred somewhere on its part (bool)."""
    size = len(image)
    y, x = rng.choice(np.argwhere(part)) / size
    centre = x + 1j * y
    here = image[part].mean()
    if defect == "scratch":
        t = np.linspace(-0.5, 0.5, 12)
        length = rng.uniform(0.2, 0.5)
        bend = rng.uniform(-0.12, 0.12)
        line = t * length + 1j * bend * (4 * t**2 - 0.5)
        line = _turn(line, rng.uniform(0, tau), centre)
        cover = _stencil(size, line, width=rng.uniform(0.008, 0.014))
        return _blend(image, cover * part * 0.85, 245 if here < 150 else 60)
    if defect == "hole":
        outline = _blob(rng, centre, 0.032, 0.075, 0.2)
        rim = _stencil(size, outline + 0.006 + 0.006j)
        image = _blend(image, rim, min(1.5 * here + 50, 250))  # the rim is lit
        return _blend(image, _stencil(size, outline), 14)
    if defect == "stain":
        outline = _blob(rng, centre, 0.05, 0.11, 0.25)
        cover = _stencil(size, outline, blur=0.008)
        colour = "#46301a" if here > 90 else "#aca48c"  # grease, or dust where it is dark
        return _blend(image, cover * rng.uniform(0.5, 0.75), _rgb(colour))
    cover = _stencil(size, _blob(rng, centre, 0.06, 0.13, 0.15))
    dye = rng.choice([[1.2, 0.75, 0.65], [0.65, 0.85, 1.25], [1.15, 1.0, 0.5]])
    grey = image.mean(axis=2, keepdims=True)
    return _blend(image, cover * part, (0.85 * grey + 25) * dye)


def _fabric(nature, damage, defect, size):
    """Plain weave: blue threads run down, sand-coloured ones across; u and v count them."""
    y, x = _grid(2 * size)
    angle = nature.uniform(-0.04, 0.04)
    phase = nature.uniform(0, 40, 2).astype(np.float32)
    slack = [_noise(nature, 2 * size, 4, 4) / 4 for _ in range(2)]
    if defect == "misplaced_part":
        y, x = _cut_block(y, x, damage)
    cos, sin = 22 * math.cos(angle), 22 * math.sin(angle)
    u = x * cos + y * sin + phase[0] + slack[0]
    v = y * cos - x * sin + phase[1] + slack[1]
    row = np.floor(v)
    s = 2 * (u % 1) - 1  # -1..1 across a thread
    t = 2 * (v % 1) - 1
    down = _thread(0.72, t, s, 7 * s + 9 * t)
    across = _thread(0.86, s, t, 9 * s - 7 * t)
    on_top = (np.floor(u) + row) % 2 == 0
    if defect == "missing_part":  # a thread is gone for a while: where it was on top, a deeper, darker one shows
        lost = row[damage.integers(size // 2, size + size // 2), size]
        gone = _stretch(x, damage, (0.05, 0.5), (0.2, 0.6))
        gone = gone & (row == lost) & ~on_top
        down[gone] *= 0.55
        on_top |= gone
    blue = down[..., None] * _rgb("#607aa8") * 1.25
    sand = across[..., None] * _rgb("#e2d6be")
    return _texture(np.where(on_top[..., None], blue, sand))


def _thread(brightness, along, across, twist):
    """Threads are round, bent and twisted."""
    bend = 0.1 * along**2
    roundness = 0.5 * (across**2) ** 2
    return brightness - bend - roundness + 0.04 * np.sin(twist)


def _wood(nature, damage, defect, size):
    """Floor boards with grain along x; v counts the rows of boards, w the boards within a row."""
    y, x = _grid(2 * size)
    phase = nature.uniform(0, 1)
    shift = nature.random(8, np.float32)
    tones = 2 * nature.random((8, 4), np.float32) - 1
    fine = _noise(nature, 2 * size, 120, 6)
    wave = _noise(nature, 2 * size, 9, 2)
    if defect == "misplaced_part":
        y, x = _cut_block(y, x, damage)
    v = 5 * y + phase + 1  # + 1: a turned block may reach a little outside of the image
    row = v.astype(int) % 8
    w = 1.2 * x + 1 + shift[row]
    board = tones[row, w.astype(int) % 4]
    at = tuple(np.clip(c * 2 * size, 0, 2 * size - 1).astype(int) for c in (y, x))
    rings = np.sin(tau * (2.2 * v + 1.1 * wave[at] + 3 * board))
    tone = 1 + 0.07 * board + 0.09 * fine[at] + 0.05 * rings
    to_seam = np.minimum(_to_whole(v), 4 * _to_whole(w))  # in widths of a board
    tone *= 0.45 + 0.55 * np.clip(to_seam / 0.03, 0, 1)
    image = tone[..., None] * _rgb("#bc8c5c")
    if defect == "missing_part":  # a piece broke off along the seam, and the dark ground below shows
        gone = _stretch(x, damage, (0.05, 0.7), (0.08, 0.25))
        edge = damage.uniform(0.25, 0.9) + 0.15 * _noise(damage, 2 * size, 2, 24)
        gone = gone & (v % 1 < edge) & (np.floor(v) == damage.integers(2, 5))
        depth = 0.7 + 0.5 * (v % 1)
        image = _blend(image, gone, _rgb("#2e241e") * depth[..., None])
    return _texture(image)


def _to_whole(value):
    """The distance to the nearest whole number."""
    return 0.5 - np.abs(value % 1 - 0.5)


def _gear(nature, damage, defect, size):
    """A brushed steel gear on a dark mat, at any angle."""
    centre = _point(nature, 0.46, 0.54)
    angle, light = nature.uniform(0, tau, 2)
    grain = nature.standard_normal(400)
    mat = _noise(nature, size, 60, 60)
    odd = damage.choice(13, damage.integers(1, 3), replace=False)
    sheet = _Sheet(size)
    sheet.circle(centre, 0.335, "white")
    for k in range(13):
        tooth = np.array([0.31 - 0.062j, 0.40 - 0.034j, 0.40 + 0.034j, 0.31 + 0.062j])
        if k in odd and defect == "missing_part":
            continue
        if k in odd and defect == "misplaced_part":
            bend = _either_way(damage, 0.45, 0.8)
            tooth = _turn(tooth - 0.34, bend, 0.355 + 0.04j * np.sign(bend))
        sheet.polygon(_turn(tooth, angle + tau * k / 13, centre), "white")
    for k in range(5):
        sheet.circle(_turn(0.205, angle + tau * k / 5, centre), 0.05, "black")
    sheet.circle(centre, 0.085, "black")
    cover = sheet.pixels()

    slope_y, slope_x = np.gradient(sheet.pixels(blur=0.008), 1 / size)
    shine = slope_x * np.cos(light) + slope_y * np.sin(light)  # of the edges that face the light
    y, x = _grid(size)
    y, x = y - np.float32(centre.imag), x - np.float32(centre.real)
    rings = grain[(np.hypot(x, y) * 400).astype(int)]
    steel = 168 + 26 * np.cos(2 * (np.arctan2(y, x) - light)) + 5 * rings - 1.6 * shine
    offset = -0.02 * size * np.exp(1j * light)
    shadow = np.roll(sheet.pixels(blur=0.02), (round(offset.imag), round(offset.real)), (0, 1))
    ground = (52 + 5 * mat) * (1 - 0.55 * shadow)
    ground = ground[..., None] * np.float32([0.92, 1, 1.1])
    steel = steel[..., None] * np.float32([0.99, 1, 1.02])
    return _blend(ground, cover, steel), cover > 0.9


def _chip(nature, damage, defect, size):
    """A black chip with six legs a side, soldered to a green board."""
    centre = _point(nature, 0.46, 0.54)
    angle = nature.uniform(-0.15, 0.15)
    seat = _point(nature, -0.008, 0.008)
    mottle = _noise(nature, size, 40, 40)
    odd = damage.choice(12, damage.integers(1, 3), replace=False)
    sheet = _Sheet(size, "RGB", "#246242")

    def box(at, width, height, fill, turn=0.0):
        """Draw a rectangle, turned around its own middle, and return its corners."""
        right, down = width / 2, 1j * height / 2
        corners = np.array([-right - down, right - down, right + down, down - right])
        corners = _turn(_turn(corners, turn, at), angle, centre)
        sheet.polygon(corners, fill)
        return corners

    legs = [(side, 0.245 * side + 0.1j * (k - 2.5)) for side in (-1, 1) for k in range(6)]
    for side, leg in legs:  # the board: a track and a pad for each leg
        box(leg + 0.3 * side, 0.6, 0.02, "#307a52")
        box(leg + 0.015 * side, 0.115, 0.058, "#ba9a52")
    box(seat + 0.012 + 0.018j, 0.37, 0.63, "#123222")  # the chip's shadow
    for k, (side, leg) in enumerate(legs):
        turn = 0.0
        if k in odd and defect == "missing_part":
            continue
        if k in odd and defect == "misplaced_part":
            turn = _either_way(damage, 0.35, 0.7)
        rise = 1j * np.sin(turn)
        leg += seat + 0.06 * side * rise
        box(leg, 0.12, 0.036, "#ced0d4", turn)
        box(leg + 0.02 * side * (1 + rise), 0.06, 0.012, "#f4f5f8", turn)
    body = box(seat, 0.36, 0.62, "#343439")
    box(seat, 0.33, 0.59, "#2b2b2f")
    sheet.circle(_turn(seat - 0.12 - 0.25j, angle, centre), 0.018, "#161618")  # marks pin 1
    for row, width in enumerate((0.2, 0.14, 0.17)):  # the print
        box(seat + 0.055j * row - 0.06j, width, 0.022, "#80807e")
    sheet.image = sheet.image.filter(ImageFilter.GaussianBlur(0.003 * size))
    image = 255 * sheet.pixels() * (1 + 0.04 * mottle[..., None])
    return image, _stencil(size, body) > 0.9


PARTS = {"chip": _chip, "fabric": _fabric, "gear": _gear, "wood": _wood}


class _Sheet:
    """A drawing in unit coordinates, twice as large as its pixels: halving it smooths the edges."""

    def __init__(self, size, mode="L", ground="black"):
        self.size = size
        self.image = Image.new(mode, (2 * size, 2 * size), ground)
        self.pen = ImageDraw.Draw(self.image)

    def place(self, points):
        """x, y, x, y ... in pixels."""
        return (np.atleast_1d(points) * 2 * self.size).view(float).tolist()

    def polygon(self, points, fill):
        self.pen.polygon(self.place(points), fill)

    def circle(self, centre, radius, fill):
        self.pen.circle(self.place(centre), radius * 2 * self.size, fill)

    def pixels(self, blur=0.0):
        """(size, size) or (size, size, 3) float32, 0..1."""
        image = self.image.reduce(2).filter(ImageFilter.GaussianBlur(blur * self.size))
        return np.asarray(image, np.float32) / 255


def _grid(size):
    """y as (size, 1) and x as (1, size): pixel centres, 0..1."""
    line = (np.arange(size, dtype=np.float32) + 0.5) / size
    return line[:, None], line[None]


def _rgb(name):
    return np.float32(ImageColor.getrgb(name))


def _noise(rng, size, rows, columns):
    """Smooth (size, size) noise, about -1..1, with so many bumps down and across."""
    coarse = rng.uniform(-1, 1, (rows + 3, columns + 3)).astype(np.float32)
    inner = (1, 1, columns + 1, rows + 1)
    return np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC, inner))


def _point(rng, low, high):
    return rng.uniform(low, high, 2) @ (1, 1j)


def _either_way(rng, low, high):
    return rng.choice([-1, 1]) * rng.uniform(low, high)


def _stretch(x, rng, starts, lengths):
    """True along a random stretch of x."""
    start = rng.uniform(*starts)
    return (x > start) & (x < start + rng.uniform(*lengths))


def _cut_block(y, x, rng):
    """Texture coordinates in which a square block has been cut out, turned and put back."""
    centre = _point(rng, 0.2, 0.8)
    half = rng.uniform(0.05, 0.11)
    turn = np.exp(1j * _either_way(rng, 0.5, 1.2))
    place = x + 1j * y - centre
    inside = np.maximum(np.abs(place.real), np.abs(place.imag)) < half
    place = centre + np.where(inside, place * turn, place)
    return place.imag.astype(np.float32), place.real.astype(np.float32)


def _turn(points, angle, centre):
    """Turn points by an angle around the origin, then move the origin to `centre`."""
    return points * np.exp(1j * angle) + centre


def _blob(rng, centre, smallest, largest, roughness):
    """A closed, irregular outline: (48,) points."""
    radius = rng.uniform(smallest, largest)
    theta = np.linspace(0, tau, 48, endpoint=False)
    ripple = 0
    for k in (2, 3, 4, 5):
        height = rng.uniform(-1, 1) / k
        ripple += height * np.cos(k * theta + rng.uniform(0, tau))
    return centre + radius * (1 + roughness * ripple) * np.exp(1j * theta)


def _stencil(size, points, width=0.0, blur=0.0):
    """(size, size) cover 0..1 of a filled outline, or of an open line of this width; anti-aliased."""
    sheet = _Sheet(size)
    if width:
        pixels = max(2, round(width * 2 * size))
        sheet.pen.line(sheet.place(points), "white", pixels, joint="curve")
    else:
        sheet.polygon(points, "white")
    return sheet.pixels(blur)


def _blend(image, cover, colour):
    cover = np.asarray(cover, np.float32)[..., None]
    return image * (1 - cover) + colour * cover


def _texture(image):
    """Halve an image, every pixel the mean of 2x2, which smooths the edges; all of it is part of the texture."""
    image = sum(image[i::2, j::2] for j in (0, 1) for i in (0, 1)) / 4
    return image, np.ones(image.shape[:2], bool)


def write_synthetic(out="./synthetic", size=256, train=60, good=12, each=3, seed=0) -> Path:
    """Write four categories of synthetic images in the MVTec AD layout and return the folder.

    Per category `train` images for training, and for testing `good` normal ones and `each` of every defect kind, with
    exact masks in ground_truth and the same images without their defect in twin. An image depends only on the seed, its
    place and its size, so larger counts keep the smaller set. A complete set with the same arguments is kept as it is,
    a broken-off one is finished. Raises SyntheticError for a folder that holds anything else, or arguments out of
    range.
    """
    if size < 64 or min(train, good, each) < 1 or seed < 0:
        raise SyntheticError("the synthetic set needs size >= 64, train, good and each >= 1 and seed >= 0")
    out = Path(out)
    wanted = {"size": size, "train": train, "good": good, "each": each, "seed": seed}
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
                _write(out / category, split, defect, index, size, seed)
    marker.write_text(complete)
    return out


def _write(folder, split, defect, index, size, seed):
    """Draw and write one image of a category, if it is defective with its mask and its twin."""
    key = zlib.crc32(f"{folder.name}/{split}/{defect}/{index}".encode())  # own randomness for every image
    normal = defect == "good"
    image, twin, mask = draw(folder.name, [seed, key], None if normal else defect, size)
    files = {f"{split}/{defect}/{index:03}.png": image}
    if not normal:
        files[f"ground_truth/{defect}/{index:03}_mask.png"] = mask
        files[f"twin/{defect}/{index:03}.png"] = twin
    for name, pixels in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, compress_level=1)  # noise hardly compresses anyway


def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=inspect.getdoc(write_synthetic), formatter_class=raw)
    for option in inspect.signature(write_synthetic).parameters.values():
        kind, value = type(option.default), option.default
        parser.add_argument(f"--{option.name}", type=kind, default=value, help=f"default: {value}")
    try:
        print(write_synthetic(**vars(parser.parse_args(argv))))
    except SyntheticError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
