"""Draws the README's pictures, from the repository's root:

    python pictures/draw.py first                                 first.png: what an MLP and UniAD restore
    python pictures/draw.py curve runs/mlp-long runs/uniad-data   curve.png: of two runs with --eval-every
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import figures
import models
import train
import uad


def first(folder=Path("synthetic")):
    """One defect of three categories: the part, both restorations decoded to pictures, both maps, the truth."""
    _, categories = uad.find_data(None, None)
    items = [item for category in categories for item in category.train]
    chosen = [next(i for i in c.test if i.defect == kind) for c, kind in zip(categories, ("scratch", "stain", "hole"))]
    images = data.Images(chosen, 224)
    rows = [{"name": f"{i.category}: {i.defect.replace('_', ' ')}", "images": {"defective part": images[k]}}
            for k, i in enumerate(chosen)]  # fmt: skip
    for name in ("mlp", "uniad"):
        _, plan, _ = uad.parse(["--method", name])
        method = train.fit(plan.build(0), data.Images(items, 224), **vars(plan.recipe))
        decoder = train.fit(models.Decoder(method), data.Images(items, 224))
        (batch,) = train.Machine().prepare(method, images)
        with torch.no_grad():
            pictures = decoder([restored for _, restored in method.reconstruction(batch)])
        normal, _ = train.predict(method, data.Images(items[::4], 224))
        low, high = np.quantile(normal, 0.99), 2 * normal.max() - np.quantile(normal, 0.99)
        for row, picture, anomaly, k in zip(rows, pictures, train.predict(method, images)[0], range(9)):
            row["images"][f"{name.upper()} restores"] = (picture.movedim(0, -1) * 255).byte().numpy()
            row["images"][f"{name.upper()} map"] = figures.overlay(images[k], anomaly, low, high)
    for row, item in zip(rows, chosen):
        row["images"]["truth"] = data.read_mask(item, 224)
    figures.save(figures.panel(rows, 0, 1, ""), "pictures/first.png")


def curve(copier, remedy):
    """Loss and image AUROC of two runs over their steps, as shares of each run's length."""
    series = []
    for run in (copier, remedy):
        results = json.loads((Path(run) / "results.json").read_text())
        (records,) = results["curve"].values()
        for key, how in (("loss", {"axis": "left", "log": True}), ("image_auroc", {"axis": "right", "label_ends": True}),
                         ("pixel_auroc", {"axis": "right", "label_ends": True})):  # fmt: skip
            x, y = ([record[k] for record in records] for k in ("step", key))
            series.append({"name": f"{results['method']}: {key.replace('_', ' ')}", "x": x, "y": y} | how)
    figures.curve(series, "pictures/curve.png", "One model for five real sets", right=(0.7, 1))


if __name__ == "__main__":
    {"first": first, "curve": curve}[sys.argv[1]](*sys.argv[2:])
