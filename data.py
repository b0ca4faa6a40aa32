"""Find and read images for unsupervised anomaly detection: MVTec AD and VisA folders.

`find_categories` lists what is on disk, `read_image` and `read_mask` turn files into arrays, and `Images` is a sequence
of images that are read when they are asked for. Needs numpy and Pillow only.
"""

import csv
import errno
import hashlib
import math
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from mimetypes import guess_type
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

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
    """The images of one product; `notes`: oddities to print."""

    name: str
    train: list[Item]
    test: list[Item]
    notes: list[str]


# ---------------------------------------------------------------------------------------------------------------------
# Finding images


def find_categories(root, names=None) -> list[Category]:
    """List the categories under `root`, sorted by name; `names` selects some of them. No image is opened.

    Layouts: MVTec AD (ROOT/CATEGORY/{train/good, test/good, test/DEFECT, ground_truth/DEFECT}), one such category as
    ROOT itself, or VisA as distributed (ROOT/split_csv/1cls.csv). Raises DataError if the layout is not one of these,
    a name is unknown, or a selected category has no training or no test images.
    """
    root, names = Path(root), names or []
    if not root.is_dir():
        raise DataError(f"{root} {'is a file' if root.exists() else 'does not exist'}; give the folder of a data set")
    if (root / "split_csv" / "1cls.csv").is_file():
        known, read = _visa_rows(root), partial(_read_visa, root)
    else:
        own = (root / "train" / "good").is_dir()
        folders = {root.resolve().name: root} if own else {folder.name: folder for folder in _folders(root)}
        # Other folders may lie beside the categories (docs, archives); they matter only when somebody asks for them.
        # os.path.isdir: False, and no error, for a folder that must not be looked into, such as lost+found.
        known = {n: f for n, f in folders.items() if os.path.isdir(f / "train" / "good") or n in names}
        read = _read_mvtec
    if not known and not names:
        raise DataError(f"{root} holds no category; expected CATEGORY/train/good/*.png (MVTec AD) or "
                        "split_csv/1cls.csv (VisA) in it")
    for name in names:
        if name not in known:
            raise DataError(f"{root} has no category {name}; it has {', '.join(sorted(known)) or 'none'}")
    return [_category(name, *read(name, known[name])) for name in sorted(set(names or known))]


def _category(name, train, test, notes):
    defective = [item for item in test if item.label]
    missing = [item for item in defective if not item.masks]
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
    return Category(name, train, test, notes)


def _visible(folder):
    """What lies in a folder and is not hidden, sorted; [] if there is no such folder."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".")) if folder.is_dir() else []


def _folders(folder):
    return [path for path in _visible(folder) if path.is_dir()]


def _images(folder):
    return [path for path in _visible(folder) if path.suffix.lower() in EXTENSIONS and path.is_file()]


def _read_mvtec(name, folder):
    """(train items, test items, notes) of one MVTec AD category folder."""
    train = [Item(path, name, "good") for path in _images(folder / "train" / "good")]
    if not train:
        raise DataError(f"{folder / 'train' / 'good'} is missing or holds no image; put normal training images there")
    test, notes = [], []
    for kind in _folders(folder / "test"):
        images = _images(kind)
        masks = {} if kind.name == "good" else _pair_masks(images, _images(folder / "ground_truth" / kind.name))
        for path in images:
            twin = folder / "twin" / kind.name / path.name
            test.append(Item(path, name, kind.name, masks.get(path.stem, ()), twin if twin.is_file() else None))
    if not test:
        raise DataError(f"{folder / 'test'} holds no image; put the test images into test/good and test/DEFECT")
    for place in (folder / "train" / "good", *_folders(folder / "test")):
        kinds = {path.suffix for path in place.iterdir() if (guess_type(path.name)[0] or "").startswith("image/")}
        if others := sorted(kind for kind in kinds if kind.lower() not in EXTENSIONS):
            notes.append(f"{place} holds images that are not read ({', '.join(others)}): convert them to PNG")
    return train, test, notes


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
    for name in categories:
        if not re.fullmatch(r"[\w-][\w .-]*", name or ""):  # it becomes the name of files
            raise DataError(f"{table} has a category {name!r}, which is no name of a folder; download it again")
    return categories


def _read_visa(root, category, rows):
    """(train items, test items, no notes) of one VisA category."""
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
    return train, test, []


def fingerprint(categories) -> str:
    """Of the training images' names, sizes and times: whether a run that goes on still has the same ones."""
    paths = [item.path for category in categories for item in category.train]
    files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return hashlib.sha256(repr(files).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Reading images


def read_image(path, size, resample="bilinear") -> np.ndarray:
    """Read any PNG, JPEG, BMP or TIFF as a (size, size, 3) uint8 RGB array.

    resample: "bilinear" or "lanczos" (RLR's). The image is stretched to the square, as the papers do.
    The EXIF orientation is applied and transparency dropped. 16-bit and other integers: 65535 becomes 255. Floats: an
    image that never exceeds 1 is taken as 0..1, any other as 0..255. Raises DataError for a file that cannot be read,
    has values outside its range, or has more pixels than Pillow's limit.
    """
    with _opened(path) as image:
        image = _to_rgb(ImageOps.exif_transpose(image))
        return np.array(image.resize((size, size), Image.Resampling[resample.upper()]))


def read_mask(item, size) -> np.ndarray:
    """Ground truth of an Item as a (size, size) bool array, True where defective; nearest resize, masks are OR-ed.

    All False where `item.masks` is empty: right for a normal image, "unknown" for a defective one, which pixel metrics
    must leave out. Raises DataError if a mask cannot be read or its size differs from its image's.
    """
    merged = np.zeros((size, size), bool)
    for path in item.masks:
        with _opened(item.path) as image, _opened(path) as mask:
            least = 127 if mask.format == "JPEG" else 0  # whose black is not quite black beside white
            if _upright_size(image) != _upright_size(mask):
                raise DataError("{} is {}x{} but its image {} is {}x{}; export the mask at the image's size".format(
                    path, *_upright_size(mask), item.path, *_upright_size(image)))
            mask = ImageOps.exif_transpose(mask)
            # Deep greys are compared as they are: scaled to 8 bits, a label of 1 in 65535 would vanish.
            deep = mask.mode[0] in "IF"
            defective = np.asarray(mask) > 0 if deep else (np.asarray(_to_rgb(mask)) > least).any(axis=2)
        resized = Image.fromarray(defective).resize((size, size), Image.Resampling.NEAREST)
        merged |= np.asarray(resized)
    return merged


class Images:
    """Items (or paths) as a sequence of images: len(), and [i] -> `read_image(path, size, resample)`, when asked for.

    Use it like a list of arrays; they need not fit into memory. [i] raises DataError as read_image does.
    """

    def __init__(self, items, size, resample="bilinear"):
        self.items, self.size, self.resample = list(items), size, resample

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        item = self.items[index]
        return read_image(item.path if isinstance(item, Item) else item, self.size, self.resample)


@contextmanager
def _opened(path):
    """Open an image (header only); whatever goes wrong with it inside the block becomes a DataError."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # to read from a FIFO would wait for ever
            raise ValueError("not a regular file")
        # An open file: Pillow maps a path into memory, and then scrambles TIFFs that have an orientation. Only these
        # formats: some of its other readers start external programs, whatever the file is called.
        with open(path, "rb") as file, Image.open(file, formats=("PNG", "JPEG", "BMP", "TIFF")) as image:
            # Pillow only warns at this limit, and turning warnings into errors is not safe across threads.
            if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
                raise ValueError(f"{image.width}x{image.height} pixels are above the limit of {Image.MAX_IMAGE_PIXELS}")
            yield image
    except (DataError, MemoryError):
        raise
    except Exception as error:  # a broken file makes Pillow raise nearly anything: OSError, SyntaxError, struct.error
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else error
        system = isinstance(error, OSError) and error.errno not in (None, errno.ENOENT)
        way = "allow it or raise the system's limit" if system else "replace or remove it"
        raise DataError(f"{path} cannot be read ({reason}); {way}") from error


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
