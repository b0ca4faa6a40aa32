"""Draws the pictures of README and RESULTS, from the repository's root:

    python pictures/draw.py first                                 first.png: what the demo's MLP copies and UniAD finds
    python pictures/draw.py fader runs/fader-synthetic            fader.png: what the attenuators take away
    python pictures/draw.py curve runs/mlp-long runs/uniad-DATA   curve.png: of two runs with --eval-every
    python pictures/draw.py images runs/few-*                     images.png: how many training images are enough
"""

import json
import math
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import figures
import models
import train
import uad


def results_of(run):
    return json.loads(Path(run, "results.json").read_text())


def load(run, *words):
    """-> the method of a run's one model, with these options changed, and the model's entry in the checkpoint."""
    _, plan, loaded = uad.parse(["--load", f"{run}/checkpoint.pt", *words])
    (entry,) = loaded["models"]
    return uad.reload(plan.build(0), entry), entry


def first():
    """Of each category the defect that UniAD finds and whose score the MLP has lowest: both restorations and maps."""
    _, categories = uad.find_data(None, None)
    parts = data.Images(normal(categories), 224)
    above = {}  # how far each score is above its threshold
    for name in ("mlp", "uniad"):
        (entry,) = uad.read_checkpoint(f"runs/{name}-synthetic/checkpoint.pt")["models"]
        rows = results_of(f"runs/{name}-synthetic")["categories"]
        for category in categories:
            threshold = entry["of"][category.name]["threshold"]
            for item, score in zip(category.test, rows[category.name]["scores"]):
                above[name, item] = score / threshold
    gain = lambda item: (above["uniad", item] > 1, -above["mlp", item])
    chosen = [max((item for item in category.test if item.label), key=gain) for category in categories]
    images = data.Images(chosen, 224)
    rows = [{"name": f"{item.category}: {item.defect}", "verdict": "", "images": {"defective part": images[i]}}
            for i, item in enumerate(chosen)]  # fmt: skip
    for name, label in (("mlp", "MLP"), ("uniad", "UniAD")):
        method, entry = load(f"runs/{name}-synthetic")
        decoder = train.fit(models.Decoder(method), parts, label=name)
        (batch,) = train.Machine().prepare(method, images)
        with torch.no_grad():
            pictures = uad.pictures(decoder([restored for _, restored in method.reconstruction(batch)]))
        maps, scores = train.predict(method, images)
        for i, row in enumerate(rows):
            ranges = entry["of"][chosen[i].category]
            row["score"] = float(scores[i]) / ranges["threshold"]
            row["images"][f"{label} restores"] = pictures[i]
            row["images"][f"{label}'s map"] = figures.overlay(images[i], maps[i], ranges["low"], ranges["high"])
    for row, item in zip(rows, chosen):
        row["images"]["truth"] = data.read_mask(item, 224)
    note = "Score: UniAD's, over its threshold."
    picture = figures.panel(rows, 0, 1, "Defects that the MLP copies and UniAD finds", note)
    figures.save(picture, "pictures/first.png")


@torch.no_grad()
def fader(run):
    """Of each category the defect inside which FADeR's map rises most above that of EAR, FADeR without attenuators."""
    _, categories = uad.find_data(None, None)
    machine, found = train.Machine(), {}
    for name, words in (("EAR", ["attenuate="]), ("FADeR", [])):
        method, entry = load(run, *words)
        method.fit_statistics(lambda method=method: machine.prepare(method, uad.images_for(method, normal(categories))))
        found[name] = method
    rows = []
    for category in categories:
        items = [item for item in category.test if item.label]
        truth = [data.read_mask(item, method.size) for item in items]
        maps = {name: train.predict(method, uad.images_for(method, items))[0] for name, method in found.items()}
        inside = {name: (maps[name] * truth).max((1, 2)) for name in found}
        best = int((inside["FADeR"] - inside["EAR"]).argmax())
        chosen, image = items[best], uad.images_for(method, [items[best]])
        (batch,) = machine.prepare(method, image)
        images = {"defective part": image[0], "what the mask leaves": uad.pictures(batch[0])[0]}
        for name, method in found.items():
            images[f"{name} restores"] = uad.pictures(method.restore(batch))[0]
        ranges = entry["of"][category.name]
        for name, value in maps.items():
            images[f"{name}'s map"] = figures.overlay(image[0], value[best], ranges["low"], ranges["high"])
        images["truth"], score = truth[best], float(inside["FADeR"][best])
        rows.append({"name": f"{category.name}: {chosen.defect}", "score": score, "verdict": "", "images": images})
    note = "Score: the highest value of FADeR's map inside the defect."
    picture = figures.panel(rows, 0, 1, "The defects inside which FADeR's map rises most above EAR's", note)
    figures.save(picture, "pictures/fader.png")


def normal(categories):
    return [item for category in categories for item in category.train]


def curve(copier, remedy):
    """Loss, image and pixel AUROC of two runs over their steps."""
    series = []
    for run in (copier, remedy):
        results = results_of(run)
        (records,) = results["curve"].values()
        series += figures.run_series(records, ("loss", "image_auroc", "pixel_auroc"), f"{results['method']}: ")
    figures.curve(series, "pictures/curve.png", "One model for five real sets", right=(0.7, 1))


def images(*runs):
    """Image AUROC over the number of training images that --holdout left, the mean of runs of equal number."""
    found = {}
    for run in runs:
        results = results_of(run)
        config, auroc = results["config"], results["mean"]["image_auroc"]
        (category,) = data.find_categories(config["data"], config["categories"])
        count = len(category.train) - math.ceil(config["holdout"] * len(category.train))
        found.setdefault(f"{results['method']}, {category.name}", {}).setdefault(count, []).append(auroc)
    series = [{"name": name, "x": sorted(points), "y": [statistics.mean(points[x]) for x in sorted(points)],
               "axis": "right"} for name, points in found.items()]  # fmt: skip
    how = {"right": (0.6, 1), "across": "normal images to train on"}
    figures.curve(series, "pictures/images.png", "Image AUROC", **how)


if __name__ == "__main__":
    {"first": first, "fader": fader, "curve": curve, "images": images}[sys.argv[1]](*sys.argv[2:])
