"""Find, read and draw images for unsupervised anomaly detection: MVTec AD and VisA folders, and a synthetic set.

`find_categories` lists what is on disk, `read_image` and `read_mask` turn files into arrays, `load_images` reads many
files in threads, and `write_synthetic` draws a small data set with exact masks. Needs numpy and Pillow only.

    python data.py --out ./synthetic
"""

import argparse
import csv
import itertools
import json
import math
import re
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps, UnidentifiedImageError

EXTENSIONS = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"}  # in any letter case


class DataError(Exception):
    """Something is wrong with the data; the message is one sentence that names the file and the way out."""


@dataclass(frozen=True)
class Item:
    """One image on disk. `defect` is "good" or the name of its defect folder (VisA has no kinds: "bad")."""

    path: Path
    category: str
    defect: str
    masks: tuple[Path, ...] = ()  # ground-truth files, paired by name; () where none was found
    twin: Path | None = None  # the same image without its defect (synthetic data only)

    @property
    def label(self) -> int:
        """0 normal, 1 defective: from the folder's name, because a defective image may have no mask."""
        return int(self.defect != "good")


@dataclass
class Category:
    """The images of one product. `has_masks`: at least one defective image has a mask. `notes`: oddities to print."""

    name: str
    train: list[Item]
    test: list[Item]
    has_masks: bool
    notes: list[str]


# ---------------------------------------------------------------------------------------------------------------------
# Finding images


def find_categories(root, names=None) -> list[Category]:
    """List the categories under `root`, sorted by name; `names` selects some of them. No image is opened.

    Layouts: MVTec AD (ROOT/CATEGORY/{train/good, test/good, test/DEFECT, ground_truth/DEFECT}), one such category as
    ROOT itself, or VisA as distributed (ROOT/split_csv/1cls.csv). Raises DataError if the layout is not one of these,
    a name is unknown, or a selected category has no training or no test images.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root} {'is a file' if root.exists() else 'does not exist'}; give the folder of a data set")
    if (root / "split_csv" / "1cls.csv").is_file():
        known, read = _visa_rows(root), lambda name, rows: _read_visa(root, name, rows)
    else:
        own = (root / "train" / "good").is_dir()
        folders = {root.resolve().name: root} if own else {folder.name: folder for folder in _folders(root)}
        # Other folders may lie beside the categories (docs, archives); they matter only when somebody asks for them.
        known = {name: f for name, f in folders.items() if (f / "train" / "good").is_dir() or name in (names or ())}
        read = _read_mvtec
    if not known and not names:
        raise DataError(f"{root} holds no category; expected CATEGORY/train/good/*.png (MVTec AD) or "
                        "split_csv/1cls.csv (VisA) in it")
    for name in names or ():
        if name not in known:
            raise DataError(f"{root} has no category {name}; it has {', '.join(sorted(known)) or 'none'}")
    return [_category(name, *read(name, known[name])) for name in sorted(set(names or known))]


def _category(name, train, test):
    defective = [item for item in test if item.label]
    missing = [item for item in defective if not item.masks]
    notes = []
    if not defective:
        notes.append(f"{name}: the test set has no defective image, so its metrics are undefined")
    elif len(defective) == len(test):
        notes.append(f"{name}: the test set has no good image, so its image metrics are undefined")
    if defective and len(missing) == len(defective):
        notes.append(f"{name}: none of the {len(missing)} defective images has a mask, so pixel metrics are undefined")
    elif missing:
        first = ", ".join(f"{item.defect}/{item.path.name}" for item in missing[:3]) + ", ..." * (len(missing) > 3)
        notes.append(f"{name}: {len(missing)} of {len(defective)} defective images have no mask ({first}); "
                     "pixel metrics leave them out")
    return Category(name, train, test, len(missing) < len(defective), notes)


def _folders(folder):
    """The visible folders in a folder, sorted."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _images(folder):
    """The visible image files in a folder, sorted; [] if there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir()
                  if path.suffix.lower() in EXTENSIONS and not path.name.startswith(".") and path.is_file())


def _read_mvtec(name, folder):
    """(train items, test items) of one MVTec AD category folder."""
    train = [Item(path, name, "good") for path in _images(folder / "train" / "good")]
    if not train:
        raise DataError(f"{folder / 'train' / 'good'} is missing or holds no image; put normal training images there")
    test = []
    for kind in _folders(folder / "test") if (folder / "test").is_dir() else ():
        images = _images(kind)
        masks = {} if kind.name == "good" else _pair_masks(images, _images(folder / "ground_truth" / kind.name))
        for path in images:
            twin = folder / "twin" / kind.name / path.name
            test.append(Item(path, name, kind.name, masks.get(path.stem, ()), twin if twin.is_file() else None))
    if not test:
        raise DataError(f"{folder / 'test'} holds no image; put the test images into test/good and test/DEFECT")
    return train, test


def _pair_masks(images, masks):
    """{image stem: its masks}. Mask names: NAME, NAME_mask, NAME_mask1, NAME_mask_1, with any image extension.

    Pairing by name and not by position: one missing file would otherwise shift every mask after it.
    """
    stems, paired = {path.stem for path in images}, {}
    for mask in masks:
        # An image may itself be called a_mask1: the longest image name that fits owns the mask.
        for owner in (mask.stem, re.sub(r"_mask(_?\d+)?$", "", mask.stem)):
            if owner in stems:
                paired[owner] = paired.get(owner, ()) + (mask,)
                break
    return paired


def _visa_rows(root):
    """{category: its rows as (line, split, label, image, mask)} from VisA's one-class split file."""
    table, categories = root / "split_csv" / "1cls.csv", {}
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            for row in reader:
                cells = reader.line_num, row["split"], row["label"], row["image"], row["mask"]
                categories.setdefault(row["object"], []).append(cells)
    except KeyError as error:
        raise DataError(f"{table} lacks the column {error}; download it again") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{table} cannot be read as CSV ({error}); download it again") from error
    return categories


def _read_visa(root, category, rows):
    """(train items, test items) of one VisA category."""
    table, train, test = root / "split_csv" / "1cls.csv", [], []
    for line, split, label, image, mask in rows:
        if (split, label) not in {("train", "normal"), ("test", "normal"), ("test", "anomaly")}:
            raise DataError(f"{table} line {line} has split {split} with label {label}; use VisA's one-class split")
        for name in (image, mask or image):
            if not name or not (root / name).is_file():
                raise DataError(f"{table} line {line} names {name or 'no image'}, but {root} has no such file; "
                                "download the data set again")
        bad = label == "anomaly"
        item = Item(root / image, category, "bad" if bad else "good", (root / mask,) if mask and bad else ())
        (train if split == "train" else test).append(item)
    if not train or not test:
        raise DataError(f"{table} lists no {'test' if train else 'train'} image of {category}; download it again")
    return train, test


# ---------------------------------------------------------------------------------------------------------------------
# Reading images


def read_image(path, size) -> np.ndarray:
    """Read any PNG, JPEG, BMP or TIFF as a (size, size, 3) uint8 RGB array.

    Bilinear to the square, so the aspect ratio is not kept (the papers do the same). The EXIF orientation is applied
    and transparency dropped. 16-bit and other integers: 65535 becomes 255. Floats: an image that never exceeds 1 is
    taken as 0..1, any other as 0..255. Raises DataError for a file that cannot be read, has values outside its range,
    or has more pixels than Pillow's limit.
    """
    with _opened(path) as image:
        image = _to_rgb(ImageOps.exif_transpose(image))
        return np.array(image.resize((size, size), Image.Resampling.BILINEAR))


def read_mask(item, size) -> np.ndarray:
    """Ground truth of an Item as a (size, size) bool array, True where defective; nearest resize, masks are OR-ed.

    All False where `item.masks` is empty: right for a normal image, "unknown" for a defective one, which pixel metrics
    must leave out. Raises DataError if a mask cannot be read or its size differs from its image's.
    """
    merged = np.zeros((size, size), bool)
    for path in item.masks:
        with _opened(item.path) as image, _opened(path) as mask:
            if _upright_size(image) != _upright_size(mask):
                raise DataError("{} is {}x{} but its image {} is {}x{}; export the mask at the image's size".format(
                    path, *_upright_size(mask), item.path, *_upright_size(image)))
            mask = ImageOps.exif_transpose(mask)
            # Deep greys are compared as they are: scaled to 8 bits, a label of 1 in 65535 would vanish.
            deep = mask.mode[0] in "IF"
            defective = np.asarray(mask) > 0 if deep else (np.asarray(_to_rgb(mask)) > 0).any(axis=2)
        resized = Image.fromarray(defective).resize((size, size), Image.Resampling.NEAREST)
        merged |= np.asarray(resized)
    return merged


def load_images(paths, size, workers):
    """Yield `read_image(path, size)` for each path, in order, decoded by `workers` >= 1 threads.

    Threads suffice because Pillow releases the GIL while it decodes and resizes. Only a few images are read ahead, so
    memory stays flat however long the list or slow the consumer. A DataError is raised at its image's turn.
    """
    paths, ahead = iter(paths), deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for path in itertools.islice(paths, 4 * workers):
            ahead.append(pool.submit(read_image, path, size))
        while ahead:
            image = ahead.popleft().result()
            for path in itertools.islice(paths, 1):
                ahead.append(pool.submit(read_image, path, size))
            yield image
    finally:
        pool.shutdown(cancel_futures=True)  # also when the consumer stops early


@contextmanager
def _opened(path):
    """Open an image (header only); whatever goes wrong with it inside the block becomes a DataError."""
    try:
        # An open file: Pillow maps a path into memory, and then scrambles TIFFs that have an orientation. Only these
        # formats: some of its other readers start external programs, whatever the file is called.
        with open(path, "rb") as file, Image.open(file, formats=("PNG", "JPEG", "BMP", "TIFF")) as image:
            # Pillow only warns at this limit, and turning warnings into errors is not safe across threads.
            if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
                raise ValueError(f"{image.width}x{image.height} pixels are above the limit of {Image.MAX_IMAGE_PIXELS}")
            yield image
    except DataError:
        raise
    except Exception as error:  # a broken file makes Pillow raise nearly anything: OSError, SyntaxError, struct.error
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(f"{path} cannot be read ({reason}); replace or remove it") from error


def _to_rgb(image):
    if image.mode[0] in "IF":  # Pillow's own conversion clips at 255 instead of scaling
        values = np.asarray(image, np.float64)
        top = 65535 if image.mode[0] == "I" else 255 if values.max() > 1 else 1
        if not (values.min() >= 0 and values.max() <= top):  # also false for NaN
            raise ValueError(f"its values run from {values.min():g} to {values.max():g}, expected 0 to {top}")
        image = Image.fromarray(np.rint(values * (255 / top)).astype(np.uint8))
    if image.mode == "P":  # by way of RGBA, which understands every form of palette transparency
        image = image.convert("RGBA")
    return image.convert("RGB")


def _upright_size(image):
    """(width, height) once the EXIF orientation is applied, without decoding the pixels."""
    if image.format == "TIFF":  # Pillow has already turned it
        return image.size
    # The base class's getexif, because that of PNG decodes the image to look for EXIF data behind the pixels.
    orientation = Image.Image.getexif(image).get(0x0112, 1)
    return image.size[::-1] if orientation >= 5 else image.size


# ---------------------------------------------------------------------------------------------------------------------
# Synthetic data: two textures and two objects, six kinds of defect, all drawn in unit coordinates (x right, y down)

DEFECTS = ("hole", "misplaced_part", "missing_part", "scratch", "stain", "wrong_colour")


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
    nature, damage = np.random.default_rng([*seed, 0]), np.random.default_rng([*seed, 1, attempt])
    image, part = PARTS[category](nature, damage, defect, size)
    if defect not in (None, "missing_part", "misplaced_part"):
        image = _spoil(image, part, damage, defect)
    y, x = _grid(size)
    direction, tilt, gain = nature.uniform(0, 2 * np.pi), nature.uniform(0, 0.2), nature.uniform(0.92, 1.08)
    light = gain * (1 + tilt * ((x - 0.5) * np.cos(direction) + (y - 0.5) * np.sin(direction)))
    noise = nature.standard_normal(image.shape, np.float32) * 2.0
    return np.clip(np.rint(image * light[..., None] + noise), 0, 255).astype(np.uint8)


def _spoil(image, part, rng, defect):
    """Paint a surface defect onto a float image, centred somewhere on its part (bool)."""
    size = len(image)
    centre = rng.choice(np.argwhere(part))[::-1] / size
    here = image[part].mean()
    if defect == "scratch":
        t, length, bend = np.linspace(-0.5, 0.5, 12), rng.uniform(0.2, 0.5), rng.uniform(-0.12, 0.12)
        line = _turn(np.stack([t * length, bend * (4 * t * t - 0.5)], 1), rng.uniform(0, 2 * np.pi), centre)
        cover = _stencil(size, line, width=rng.uniform(0.008, 0.014)) * part
        return _blend(image, cover * 0.85, 245 if here < 150 else 60)
    if defect == "hole":
        outline = _blob(rng, centre, rng.uniform(0.032, 0.075), 0.2)
        image = _blend(image, _stencil(size, outline + 0.006), min(1.5 * here + 50, 250))  # the lit rim
        return _blend(image, _stencil(size, outline), 14)
    if defect == "stain":
        cover = _stencil(size, _blob(rng, centre, rng.uniform(0.05, 0.11), 0.25), blur=0.008)
        colour = np.float32([70, 48, 26] if here > 90 else [172, 164, 140])  # grease, or dust where it is dark
        return _blend(image, cover * rng.uniform(0.5, 0.75), colour)
    cover = _stencil(size, _blob(rng, centre, rng.uniform(0.06, 0.13), 0.15)) * part
    colour = np.array([[1.2, 0.75, 0.65], [0.65, 0.85, 1.25], [1.15, 1.0, 0.5]])[rng.integers(3)]
    return _blend(image, cover, (0.85 * image.mean(axis=2, keepdims=True) + 25) * colour)


def _fabric(nature, damage, defect, size):
    """Plain weave: blue threads run down, sand-coloured ones across; u and v count them."""
    y, x = _grid(2 * size)
    angle, phase = nature.uniform(-0.04, 0.04), nature.uniform(0, 40, 2).astype(np.float32)
    slack = [0.25 * _noise(nature, 2 * size, 4, 4) for _ in range(2)]
    x, y = _cut_block(x, y, damage) if defect == "misplaced_part" else (x, y)
    u = x * (22 * math.cos(angle)) + y * (22 * math.sin(angle)) + phase[0] + slack[0]
    v = y * (22 * math.cos(angle)) - x * (22 * math.sin(angle)) + phase[1] + slack[1]
    i, j = np.floor(u), np.floor(v)
    s, t = 2 * (u - i) - 1, 2 * (v - j) - 1  # -1..1 across a thread
    ss, tt = s * s, t * t
    down = 0.72 - 0.1 * tt - 0.5 * ss * ss + 0.04 * np.sin(7 * s + 9 * t)  # threads are round, bent and twisted
    across = 0.86 - 0.1 * ss - 0.5 * tt * tt + 0.04 * np.sin(9 * s - 7 * t)
    on_top = (i + j) % 2 == 0
    if defect == "missing_part":  # a thread is gone for a while: where it was on top, a deeper, darker one shows
        lost = j[damage.integers(size // 2, size + size // 2), size]
        start, length = damage.uniform(0.05, 0.5), damage.uniform(0.2, 0.6)
        gone = (j == lost) & (x > start) & (x < start + length) & ~on_top
        down, on_top = np.where(gone, 0.55 * down, down), on_top | gone
    blue, sand = np.array([96, 122, 168.0], np.float32), np.array([226, 214, 190.0], np.float32)
    image = np.where(on_top[..., None], down[..., None] * blue * 1.25, across[..., None] * sand)
    return _halve(image), np.ones((size, size), bool)


def _wood(nature, damage, defect, size):
    """Floor boards with grain along x; v counts the rows of boards, w the boards within a row."""
    y, x = _grid(2 * size)
    phase, shift, tones = nature.uniform(0, 1), nature.random(8, np.float32), 2 * nature.random((8, 4), np.float32) - 1
    fine, wave = _noise(nature, 2 * size, 120, 6), _noise(nature, 2 * size, 9, 2)
    x, y = _cut_block(x, y, damage) if defect == "misplaced_part" else (x, y)
    v = 5 * y + phase + 1  # + 1: a turned block may reach a little outside of the image
    row = np.floor(v).astype(int) % 8
    w = 1.2 * x + 1 + shift[row]
    board = np.floor(w).astype(int) % 4
    down, along = np.clip(y * 2 * size, 0, 2 * size - 1).astype(int), np.clip(x * 2 * size, 0, 2 * size - 1).astype(int)
    rings = np.sin(2 * np.pi * (2.2 * v + 1.1 * wave[down, along] + 3 * tones[row, board]))
    tone = 1 + 0.07 * tones[row, board] + 0.09 * fine[down, along] + 0.05 * rings
    to_seam = np.minimum(0.5 - np.abs(v % 1 - 0.5), (0.5 - np.abs(w % 1 - 0.5)) * 4)  # in widths of a board
    tone *= 0.45 + 0.55 * np.clip(to_seam / 0.03, 0, 1)
    image = tone[..., None] * np.array([188, 140, 92.0], np.float32)
    if defect == "missing_part":  # a piece broke off along the seam, and the dark ground below shows
        start, length, depth = damage.uniform(0.05, 0.7), damage.uniform(0.08, 0.25), damage.uniform(0.25, 0.9)
        ragged = depth + 0.15 * _noise(damage, 2 * size, 2, 24)
        gone = (np.floor(v) == damage.integers(2, 5)) & (x > start) & (x < start + length) & (v % 1 < ragged)
        image = _blend(image, gone, np.float32([46, 36, 30]) * (0.7 + 0.5 * (v % 1)[..., None]))
    return _halve(image), np.ones((size, size), bool)


def _gear(nature, damage, defect, size):
    """A brushed steel gear on a dark mat, at any angle."""
    centre, angle, light = 0.5 + nature.uniform(-0.04, 0.04, 2), *nature.uniform(0, 2 * np.pi, 2)
    grain, mat = nature.standard_normal(400), _noise(nature, size, 60, 60)
    odd = damage.choice(13, damage.integers(1, 3), replace=False)
    canvas = Image.new("L", (2 * size, 2 * size))
    pen = ImageDraw.Draw(canvas)
    _circle(pen, centre, 0.335, 255)
    for k in range(13):
        tooth = np.array([[0.31, -0.062], [0.40, -0.034], [0.40, 0.034], [0.31, 0.062]])
        if k in odd and defect == "missing_part":
            continue
        if k in odd and defect == "misplaced_part":
            bent = damage.choice([-1, 1]) * damage.uniform(0.45, 0.8)
            tooth = _turn(tooth - (0.34, 0), bent, (0.355, 0.04 * np.sign(bent)))
        _polygon(pen, _turn(tooth, angle + 2 * np.pi * k / 13, centre), 255)
    for k in range(5):
        _circle(pen, _turn([[0.205, 0]], angle + 2 * np.pi * k / 5, centre)[0], 0.05, 0)
    _circle(pen, centre, 0.085, 0)
    canvas = canvas.reduce(2)
    cover, height = _float(canvas), _float(canvas.filter(ImageFilter.GaussianBlur(0.008 * size)))
    y, x = _grid(size)
    x, y = x - np.float32(centre[0]), y - np.float32(centre[1])
    radius, theta = np.hypot(x, y), np.arctan2(y, x)
    slope_y, slope_x = np.gradient(height, 1 / size)
    bevel = -1.6 * (slope_x * np.cos(light) + slope_y * np.sin(light))  # edges that face the light shine
    steel = 168 + 26 * np.cos(2 * (theta - light)) + 5 * grain[(radius * 400).astype(int)] + bevel
    shift = [round(-0.02 * size * math.sin(light)), round(-0.02 * size * math.cos(light))]
    shadow = np.roll(_float(canvas.filter(ImageFilter.GaussianBlur(0.02 * size))), shift, (0, 1))
    ground = (52 + 5 * mat) * (1 - 0.55 * shadow)
    ground, steel = ground[..., None] * np.float32([0.92, 1, 1.1]), steel[..., None] * np.float32([0.99, 1, 1.02])
    return _blend(ground, cover, steel), cover > 0.9


def _chip(nature, damage, defect, size):
    """A black chip with six legs a side, soldered to a green board."""
    centre, angle = 0.5 + nature.uniform(-0.04, 0.04, 2), nature.uniform(-0.15, 0.15)
    seat, mottle = nature.uniform(-0.008, 0.008, 2), _noise(nature, size, 40, 40)
    odd = damage.choice(12, damage.integers(1, 3), replace=False)
    canvas = Image.new("RGB", (2 * size, 2 * size), (36, 98, 66))
    pen, body = ImageDraw.Draw(canvas), Image.new("L", canvas.size)
    legs = [(side * 0.245, -0.25 + 0.1 * k) for side in (-1, 1) for k in range(6)]

    def box(pen, x, y, width, height, fill, turn=0.0):
        corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * (width / 2, height / 2)
        _polygon(pen, _turn(_turn(corners, turn, (x, y)), angle, centre), fill)

    for x, y in legs:  # the board: a track and a pad for each leg
        box(pen, x + np.sign(x) * 0.3, y, 0.6, 0.02, (48, 122, 82))
        box(pen, x + np.sign(x) * 0.015, y, 0.115, 0.058, (186, 154, 82))
    box(pen, *seat + (0.012, 0.018), 0.37, 0.63, (18, 50, 34))  # the chip's shadow
    for k, (x, y) in enumerate(legs + seat):
        if k in odd and defect == "missing_part":
            continue
        turn = 0.0
        if k in odd and defect == "misplaced_part":
            turn = damage.choice([-1, 1]) * damage.uniform(0.35, 0.7)
            y += np.sign(x) * np.sin(turn) * 0.06
        box(pen, x, y, 0.12, 0.036, (206, 208, 212), turn)
        box(pen, x + np.sign(x) * 0.02, y + np.sign(x) * 0.02 * np.sin(turn), 0.06, 0.012, (244, 245, 248), turn)
    box(ImageDraw.Draw(body), *seat, 0.36, 0.62, 255)
    box(pen, *seat, 0.36, 0.62, (52, 52, 57))
    box(pen, *seat, 0.33, 0.59, (43, 43, 47))
    _circle(pen, _turn([seat + (-0.12, -0.25)], angle, centre)[0], 0.018, (22, 22, 24))  # marks pin 1
    for row, width in enumerate((0.2, 0.14, 0.17)):  # the print
        box(pen, seat[0], seat[1] - 0.06 + 0.055 * row, width, 0.022, (128, 128, 126))
    canvas = canvas.filter(ImageFilter.GaussianBlur(0.003 * size)).reduce(2)
    return np.asarray(canvas, np.float32) * (1 + 0.04 * mottle[..., None]), _float(body.reduce(2)) > 0.9


PARTS = {"chip": _chip, "fabric": _fabric, "gear": _gear, "wood": _wood}


def _grid(size):
    """y as (size, 1) and x as (1, size): pixel centres, 0..1."""
    line = (np.arange(size, dtype=np.float32) + 0.5) / size
    return line[:, None], line[None, :]


def _noise(rng, size, rows, columns):
    """Smooth (size, size) noise, about -1..1, with so many bumps down and across."""
    coarse = Image.fromarray(rng.uniform(-1, 1, (rows + 3, columns + 3)).astype(np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC, box=(1, 1, columns + 1, rows + 1)))


def _cut_block(x, y, rng):
    """Texture coordinates in which a square block has been cut out, turned and put back."""
    x, y = np.broadcast_arrays(x, y)
    (cx, cy), half = rng.uniform(0.2, 0.8, 2), rng.uniform(0.05, 0.11)
    inside = np.maximum(np.abs(x - cx), np.abs(y - cy)) < half
    a = rng.choice([-1, 1]) * rng.uniform(0.5, 1.2)
    dx, dy = x - cx, y - cy
    turned_x, turned_y = cx + dx * np.cos(a) - dy * np.sin(a), cy + dx * np.sin(a) + dy * np.cos(a)
    return np.where(inside, turned_x, x).astype(np.float32), np.where(inside, turned_y, y).astype(np.float32)


def _turn(points, angle, centre=(0.0, 0.0)):
    """Turn (n, 2) points by an angle around the origin, then move the origin to `centre`."""
    c, s = np.cos(angle), np.sin(angle)
    return np.asarray(points) @ np.array([[c, s], [-s, c]]) + centre


def _blob(rng, centre, radius, roughness):
    """A closed, irregular outline: (48, 2) points."""
    theta = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    ripple = sum(rng.uniform(-1, 1) / k * np.cos(k * theta + rng.uniform(0, 2 * np.pi)) for k in (2, 3, 4, 5))
    return centre + radius * (1 + roughness * ripple)[:, None] * np.stack([np.cos(theta), np.sin(theta)], 1)


def _polygon(pen, points, fill):
    pen.polygon((points * pen.im.size[0]).ravel().tolist(), fill)


def _circle(pen, centre, radius, fill):
    x, y, r = (float(value) * pen.im.size[0] for value in (*centre, radius))
    pen.ellipse((x - r, y - r, x + r, y + r), fill)


def _stencil(size, points, width=None, blur=0.0):
    """(size, size) cover 0..1 of a filled outline, or of an open line of this width; anti-aliased."""
    canvas = Image.new("L", (2 * size, 2 * size))
    pen = ImageDraw.Draw(canvas)
    if width is None:
        _polygon(pen, points, 255)
    else:
        pen.line((points * 2 * size).ravel().tolist(), 255, max(2, round(width * 2 * size)), joint="curve")
    return _float(canvas.reduce(2).filter(ImageFilter.GaussianBlur(blur * size)))


def _blend(image, cover, colour):
    cover = np.asarray(cover, np.float32)[..., None]
    return image * (1 - cover) + colour * cover


def _float(canvas):
    return np.asarray(canvas, np.float32) / 255


def _halve(image):
    """Anti-aliasing: the mean of 2x2 pixels."""
    return (image[::2, ::2] + image[1::2, ::2] + image[::2, 1::2] + image[1::2, 1::2]) / 4


def write_synthetic(out, size=256, train=60, good=12, each=3, seed=0) -> Path:
    """Write four categories of synthetic images in the MVTec AD layout and return the folder.

    Per category `train` images for training, and for testing `good` normal ones and `each` of every defect kind, with
    exact masks in ground_truth and the same images without their defect in twin. An image depends only on the seed, its
    place and its size, so larger counts keep the smaller set. A complete set with the same arguments is kept as it is,
    a broken-off one is finished. Raises DataError for a folder that holds anything else, or arguments out of range.
    """
    if size < 64 or min(train, good, each) < 1 or seed < 0:
        raise DataError("the synthetic set needs size >= 64, train, good and each >= 1 and seed >= 0")
    out, wanted = Path(out), {"size": size, "train": train, "good": good, "each": each, "seed": seed}
    marker = out / "synthetic.json"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        try:
            found = json.loads(marker.read_text())
            complete = found.pop("complete")
        except (OSError, ValueError, LookupError, AttributeError, TypeError):
            raise DataError(f"{out} is not empty and not a synthetic set; choose another --out") from None
        if found != wanted:
            raise DataError(f"{out} holds another synthetic set ({found}); delete it or choose another --out")
        if complete:
            return out
    out.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps({**wanted, "complete": False}))
    jobs = [("train", "good", train), ("test", "good", good), *(("test", defect, each) for defect in DEFECTS)]
    for category in PARTS:
        for split, defect, count in jobs:
            for index in range(count):
                key = zlib.crc32(f"{category}/{split}/{defect}/{index}".encode())  # own randomness for every image
                image, twin, mask = draw(category, [seed, key], None if defect == "good" else defect, size)
                files = {f"{split}/{defect}/{index:03}.png": image}
                if defect != "good":
                    files[f"ground_truth/{defect}/{index:03}_mask.png"] = mask
                    files[f"twin/{defect}/{index:03}.png"] = twin
                for name, pixels in files.items():
                    path = out / category / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(pixels).save(path, compress_level=1)  # noise hardly compresses anyway
    marker.write_text(json.dumps({**wanted, "complete": True}))
    return out


def main(argv=None):
    parser = argparse.ArgumentParser(description="Write a synthetic anomaly detection data set in the MVTec AD layout.")
    parser.add_argument("--out", default="./synthetic", help="folder to write (default: %(default)s)")
    numbers = (("size", 256, "width and height in pixels"), ("train", 60, "training images per category"),
               ("good", 12, "normal test images per category"),
               ("each", 3, "test images per category and defect kind"), ("seed", 0, "random seed"))
    for name, value, text in numbers:
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{text} (default: %(default)s)")
    try:
        print(write_synthetic(**vars(parser.parse_args(argv))))
    except DataError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
