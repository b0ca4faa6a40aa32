"""Image and pixel metrics of anomaly detection: AUROC, AP, F1-max, AUPRO. Arrays in, numbers out.

Exact, in NumPy alone, and fast: a category of a hundred 224x224 maps takes a fraction of a second, because the values
of each class are sorted (not their indices) and everything else is read off the two sorted arrays.
An undefined metric is NaN; an AUROC below 0.5 is returned as it is. Copy this file into your project and it works.
"""

import numpy as np

NAMES = ("image_auroc", "image_ap", "image_f1max", "pixel_auroc", "pixel_ap", "pixel_f1max", "aupro")


def split(scores, labels):
    """-> the scores of the normal and of the defective, each sorted. scores: any shape; labels: the same, 0 or 1.

    Raises ValueError when the shapes differ or a score is not finite.
    """
    scores, labels = np.asarray(scores).ravel(), np.asarray(labels).ravel().astype(bool, copy=False)
    if scores.shape != labels.shape:
        raise ValueError(f"{scores.size} scores for {labels.size} labels")
    classes = scores[~labels], scores[labels]
    for values in classes:
        values.sort()  # in place: the pixels of a test set are many
    if not all(np.isfinite(c[[0, -1]]).all() for c in classes if len(c)):  # NaN and infinity are sorted to the ends
        raise ValueError("a score is not finite")
    return classes


def auroc(normal, defective):
    """P(a defective score > a normal one) + P(equal) / 2; NaN where one is empty. normal: sorted; defective: in any
    order, faster if sorted too."""
    if not len(normal) or not len(defective):
        return np.nan
    below = np.searchsorted(normal, defective, "left").sum(dtype=np.int64)  # pairs that are ranked right
    not_above = np.searchsorted(normal, defective, "right").sum(dtype=np.int64)  # those and the ties
    return float((below + not_above) / 2 / len(normal) / len(defective))


def ap_f1max(normal, defective):
    """-> (average precision, best F1) over all distinct thresholds, from the two sorted arrays; NaN where one is empty.

    AP = sum_k (R_k - R_(k-1)) P_k, no interpolation. Only thresholds that equal a defective score matter: at any other
    one recall stays and precision falls.
    """
    if not len(normal) or not len(defective):  # without a normal score every ranking would be perfect
        return np.nan, np.nan
    total, ap, f1max = len(defective), 0.0, 0.0
    begin = np.flatnonzero(np.diff(defective, prepend=-np.inf, append=np.inf))  # where each distinct score begins
    for i in range(0, len(begin) - 1, 2**16):  # some thresholds at a time, for the sake of memory
        some = begin[i : i + 2**16 + 1]
        first = some[:-1]
        gained = np.diff(some)  # defective scores == threshold: the step in recall
        true = total - first  # defective scores >= threshold
        false = len(normal) - np.searchsorted(normal, defective[first], "left")
        ap += (gained * true / (true + false)).sum() / total
        f1max = max(f1max, (2 * true / (true + false + total)).max())
    return float(ap), float(f1max)


def regions(mask):
    """8-connected regions of a boolean stack (N,H,W) -> (region 0, 1, … of each True pixel in reading order, number).

    Works on the horizontal runs of each row. The rows of all images lie end to end on one line, w + 1 places a row: two
    runs of neighbouring rows touch when their spans, the upper one moved on by w + 1, overlap or meet. Union-find over
    runs costs as much as the outline of the regions, not their area.
    """
    n, h, w = mask.shape
    line = np.zeros((n * h, w + 1), bool)  # a gap after each row ends its last run
    line[:, :w] = mask.reshape(n * h, w)
    edges = np.flatnonzero(np.diff(line.ravel(), prepend=False))
    start, stop = edges[::2], edges[1::2]  # stop is exclusive
    below = (start // (w + 1) + 1) % h != 0  # the last row of an image has none below
    low = np.searchsorted(stop, start + w + 1, "left")  # first run of the next row that does not end before
    high = np.searchsorted(start, stop + w + 1, "right")  # past the last that does not begin after
    parent = list(range(len(start)))

    def find(i):
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for i in np.flatnonzero(below & (low < high)).tolist():
        for j in range(low[i], high[i]):
            a, b = find(i), find(j)
            parent[max(a, b)] = min(a, b)
    roots, number = np.unique([find(i) for i in range(len(start))], return_inverse=True)
    return np.repeat(number, stop - start), len(roots)


def aupro(maps, masks, normal=None, limit=0.3):
    """Area under the per-region overlap against the false positive rate up to `limit`, divided by it; in [0,1].

    maps, masks: (N,H,W), scores and booleans. normal: the sorted scores of all normal pixels, if at hand.
    Overlap is the mean over 8-connected regions of the share covered, so it is a weighted mean over region pixels,
    and the area can be integrated pixel by pixel in closed form, without a single threshold. With f0 the share of
    normal pixels that score above a region pixel and f1 the share that score at least as much, the pixel is covered
    from f1 on and, between f0 and f1, in proportion: its area up to the limit is L - (f0 + f1)/2 if f1 <= L,
    (L - f0)^2 / (2 (f1 - f0)) if f0 < L < f1, else 0. NaN without regions or normal pixels.
    """
    masks = np.asarray(masks, bool)
    normal = split(maps, masks)[0] if normal is None else normal
    if not len(normal) or not masks.any():
        return np.nan
    total = count = 0
    for i in range(0, len(masks), 64):  # some images at a time, for the sake of memory
        region, found = regions(masks[i : i + 64])
        scores = np.asarray(maps[i : i + 64])[masks[i : i + 64]]
        order = np.argsort(scores)  # ascending queries make the two searches several times faster
        region, scores = region[order], scores[order]
        f0 = 1 - np.searchsorted(normal, scores, "right") / len(normal)
        f1 = 1 - np.searchsorted(normal, scores, "left") / len(normal)
        tied = np.maximum(f1 - f0, 1e-30)
        area = np.where(f1 <= limit, limit - (f0 + f1) / 2, np.maximum(limit - f0, 0) ** 2 / (2 * tied))
        total += (area / np.bincount(region)[region]).sum()
        count += found
    return float(total / count / limit)


def evaluate(scores, labels, maps=None, masks=None):
    """The seven metrics of one category as a dict by NAMES; those that are undefined are NaN.

    scores: (N,) image scores; labels: (N,) 1 = defective; maps: (M,H,W) anomaly maps and masks: (M,H,W) of the images
    that have a ground truth (normal images: an empty mask), or none of either. Raises ValueError (see split).
    """
    images = split(scores, labels)
    values = [auroc(*images), *ap_f1max(*images)]
    if maps is None or not np.any(masks):
        values += [np.nan] * 4
    else:
        pixels = split(maps, masks)
        values += [auroc(*pixels), *ap_f1max(*pixels), aupro(maps, masks, pixels[0])]
    return dict(zip(NAMES, values))


def per_kind(scores, defects, maps, masks, known):
    """{kind: its image and pixel AUROC against all normal images, as a dict}.

    defects: (N,) names of kinds, "good" being the normal one; known: (N,) bool, images whose pixels count; the rest as
    in `evaluate`, with maps and masks of all images.
    """
    good, rows = defects == "good", {}
    pixels = maps[good].ravel()
    pixels.sort()
    for kind in np.unique(defects[~good]).tolist():
        here = (known & (defects == kind))[:, None, None]
        normal, defective = maps[~masks & here], maps[masks & here]  # an image with a defect has normal pixels too
        normal.sort()
        # An AUROC is a mean over normal pixels: those of good images are sorted once, for all kinds.
        parts = [(len(part), auroc(part, defective)) for part in (pixels, normal) if len(part)]
        total = sum(count for count, _ in parts) or np.nan
        rows[kind] = {
            "image_auroc": auroc(np.sort(scores[good]), scores[defects == kind]),
            "pixel_auroc": float(sum(count * value for count, value in parts) / total),
        }
    return rows


def mean(rows):
    """Plain mean over categories, {name: dict by NAMES}, of those where a metric is defined."""
    columns = {name: [row[name] for row in rows.values() if np.isfinite(row[name])] for name in NAMES}
    return {name: float(np.mean(values)) if values else np.nan for name, values in columns.items()}
