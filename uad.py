"""Train on images of good parts only; say per image and per pixel what is wrong with a new one.

    python uad.py                                        the demo: an MLP copies defects, UniAD does not
    python uad.py --method uniad --data ./mvtec          one model for all categories found, judged at the final epoch
    python uad.py --load runs/uniad-mvtec/checkpoint.pt --predict photo.png           score, verdict, overlay
    python uad.py --load runs/uniad-mvtec/checkpoint.pt [--data ./mvtec]              evaluate again
    python uad.py --compare runs/*                       one table of several runs
    python uad.py --method uniad --data ./mvtec query=False alpha=20        name=value sets any option of the method

The way of an image: folder -> data.py -> train.py (prepare, loss ... of a method in models.py or baselines.py) ->
maps and scores -> metrics.py -> table, results.json, panels.
"""

import argparse
import csv
import dataclasses
import errno
import inspect
import io
import json
import math
import os
import re
import signal
import sys
import textwrap
import time
import warnings
from operator import itemgetter
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while PyTorch is imported: no traceback

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

import baselines
import data
import figures
import metrics
import models
import synthetic
import train
from train import RANK, WORLD, UserError, print0

METHODS = models.METHODS | baselines.METHODS
SETTINGS = {"precision": "auto", "workers": os.cpu_count() or 1, "save_every": 60.0, "decode": False}  # the program's
DEMO = {  # what runs on the synthetic set change
    "mlp": {"epochs": 90},
    "uniad": {"epochs": 65, "lr": 4e-3, "width": 128, "hidden": 256, "layers": 1},
    "rlr": {"size": 128},
}


# ---------------------------------------------------------------------------------------------------------------------
# Options: flags for what a person does, name=value for the rest


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see -h)")


def flags():
    style = lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=118)
    p = Parser(add_help=False, formatter_class=style, usage="uad.py [options] [name=value ...]", allow_abbrev=False)
    add = p.add_argument
    add("-h", "--help", action="store_true", help="this, with the options of --method and their defaults")
    add("--method", choices=METHODS, metavar="NAME", help=", ".join(METHODS))
    add("--data", metavar="FOLDER", help="MVTec AD or VisA layout, or one category; without it: synthetic data")
    add("--categories", nargs="+", metavar="NAME", help="only these")
    add("--separate", action="store_true", help="one model per category; default: one for all")
    add("--out", metavar="FOLDER", help="default: runs/METHOD-DATA; with --load, beside it")
    add("--seed", type=int, default=0)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    add("--recipe", choices=["default", "paper"], default="default", help="paper: as the paper trains it")
    for name in ("--epochs", "--batch-size", "--lr", "--size", "--backbone", "--weights"):  # --lr 1 means lr=1
        short = name[2:].replace("-", "_")
        add(name, metavar="VALUE", dest="given", action="append", type=f"{short}={{}}".format, help=f"{short}=VALUE")
    add("--eval-every", type=int, default=0, metavar="STEPS", help="evaluate during training too: curve.png")
    add("--holdout", type=float, default=0.0, metavar="SHARE", help="of the training images, for the threshold alone")
    add("--quantile", type=float, default=0.99, metavar="Q", help="the threshold: this quantile of normal scores")
    add("--resume", action="store_true", help="go on with an interrupted run, to the same numbers")
    add("--no-panels", action="store_true", help="no pictures of test images in --out")
    add("--load", metavar="CHECKPOINT", help="use this checkpoint instead of training")
    add("--predict", metavar="PATH", help="with --load: score, verdict and overlay of an image, or of all in a folder")
    add("--export", metavar="FILE.pt2", help="with --load: torch.export, images in, maps and scores out")
    add("--compare", nargs="+", metavar="RUN", help="one table of the results in these folders")
    return p


def method_options(cls):
    """Keyword arguments of a method's constructor and of those it passes them on to, with their defaults."""
    found = {}
    for base in cls.__mro__:
        for name, p in inspect.signature(base.__init__).parameters.items():
            if p.kind is p.KEYWORD_ONLY:
                found.setdefault(name, p.default)
    return found


def typed(name, text, default):
    """The text of a setting as the type of its default."""
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(default, tuple):
            return tuple(int(part) for part in text.split(",") if part)
        if not isinstance(default, (int, float)):
            return None if text == str(default) == "None" else text
        if not abs(value := type(default)(text)) < 2**31:  # also NaN
            raise ValueError
        return value
    except (KeyError, ValueError):
        raise UserError(f"{name}={text} cannot be read: give a value such as {name}={as_text(default)}.") from None


def as_text(value):
    return ",".join(map(str, value)) if isinstance(value, tuple) else value


@dataclasses.dataclass
class Plan:
    """What is built and how it is trained: the method's name, its options, its recipe, the program's settings."""

    name: str
    options: dict
    recipe: models.Recipe
    settings: dict

    def build(self, seed):
        torch.manual_seed(seed)  # weights first: the same initial network whatever has run before in this process
        method = METHODS[self.name](**self.options)
        self.options |= method.settled  # what "auto" became
        return method

    def changed(self):
        """-> "name=value, ..." of all that differs from the method's defaults."""
        defaults = defaults_of(METHODS[self.name])
        now = self.options | vars(self.recipe) | self.settings
        return ", ".join(f"{k}={as_text(v)}" for k, v in now.items() if v != defaults[k])

    def machine(self, device):
        return train.Machine(device, self.settings["precision"], self.settings["workers"])


def defaults_of(cls):
    return method_options(cls) | vars(cls.recipe) | SETTINGS


def parse(argv):
    """-> flags (Namespace), Plan, content of the checkpoint to load or None. Raises UserError."""
    if "\0" in "".join(argv):
        raise UserError("An option holds a NUL, which no path can: leave it out.")
    is_setting = re.compile(r"[A-Za-z_]\w*=").match
    parser = flags()
    args = parser.parse_args([word for word in argv if not is_setting(word)])
    given = (args.given or []) + list(filter(is_setting, argv))
    loaded = read_checkpoint(args.load) if args.load is not None else None
    name = loaded["method"] if loaded else args.method or "uniad"
    if args.method not in (None, name):
        raise UserError(f"--method {args.method}: {args.load} is a checkpoint of {name}: leave the option out.")
    cls = METHODS[name]
    defaults = defaults_of(cls)
    if loaded:
        training = ("separate", "seed", "recipe", "eval_every", "holdout", "quantile", "resume")
        vain = [f"--{flag.replace('_', '-')}" for flag in training if getattr(args, flag) != parser.get_default(flag)]
        vain += [word for word in given if word.split("=")[0] in loaded["recipe"]]
        if vain:
            raise UserError(f"{args.load} is trained: leave out {' '.join(vain)}.")
        if not loaded["models"]:
            raise UserError(f"{args.load} holds no finished model: use --resume.")
        values, saved = defaults, loaded["options"] | loaded["recipe"]
        changed = {k: v for k, v in saved.items() if k not in defaults or v != defaults[k]}
        given = [f"{k}={as_text(v)}" for k, v in changed.items()] + given  # as words: `typed` checks what was edited
        asked = {name: getattr(args, name) for name in ("data", "categories") if getattr(args, name)}
        forget = {"categories": None} if args.data or args.export or args.predict else {}
        vars(args).update({name: loaded["run"][name] for name in OF_RUN} | forget | asked)
    else:
        values = defaults | (DEMO.get(name, {}) if args.data is None and not args.help else {})
        values |= cls.paper if args.recipe == "paper" else {}
    for word in given:
        key, text = word.split("=", 1)
        if key not in defaults:
            raise UserError(f"{name} has no option {key}: it has {', '.join(defaults)}.")
        values[key] = typed(key, text, defaults[key])
    if args.help:
        words = " ".join(f"{key}={as_text(value)}" for key, value in values.items())
        print0(f"{parser.format_help()}\nname=value, with the defaults of {name}:\n{textwrap.fill(words, 118)}")
        sys.exit(0)
    part = lambda keys: {key: values[key] for key in keys}
    recipe = models.Recipe(**part(vars(cls.recipe)))
    return args, Plan(name, part(method_options(cls)), recipe, part(SETTINGS)), loaded


def check(args, plan, loaded):
    """Flags that do not go together. Raises UserError."""
    for wrong, message in (
        ({args.predict, args.export} != {None} and not loaded, "--predict and --export need --load."),
        (None not in (args.predict, args.export), "--predict and --export: one at a time."),
        (not (args.export or ".pt2").endswith(".pt2"), "--export needs the name of a file that ends in .pt2."),
        ("" in (args.predict, args.export, args.data, args.out), "--predict, --export, --data and --out need a name."),
        (args.compare and (args.load or args.method or args.data), "--compare stands alone."),
        (not train.BY_TORCHRUN and {"RANK", "WORLD_SIZE"} & set(os.environ),
         "RANK or WORLD_SIZE is set, but not by torchrun: unset them, or start with torchrun."),
        (not 0 <= args.seed < 2**63, "--seed must be at least 0 and below 2^63."),
        (args.eval_every < 0, "--eval-every must be at least 0."),
        (not 0 <= args.holdout < 1, "--holdout is a share: at least 0 and below 1."),
        (not 0 < args.quantile <= 1, "--quantile is a share: above 0 and at most 1."),
        (plan.settings["decode"] and not issubclass(METHODS[plan.name], (models.FeatureMethod, models.RLR)),
         f"decode=True is for methods that reconstruct features, and {plan.name} does not: leave it out."),
        (loaded and plan.options["size"] != loaded["options"]["size"], "--size: leave it out with --load."),
    ):
        if wrong:
            raise UserError(message)


# ---------------------------------------------------------------------------------------------------------------------
# One run: train or load, evaluate, report


def run(args, plan, loaded):
    """-> what results.json holds, with NaN for null."""
    start, machine = time.perf_counter(), plan.machine(args.device)
    root, categories = find_data(args.data, args.categories)
    out = Path(args.out or (Path(args.load).parent / "evaluation" if loaded else default_out(args, plan.name)))
    train.writable(out, root)
    about = {name: getattr(args, name) for name in OF_RUN} | {"precision": "bf16" if machine.bf16 else "fp32"}
    content = {"version": VERSION, "method": plan.name, "options": plan.options, "run": about,
               "recipe": vars(plan.recipe), "models": loaded["models"] if loaded else [],
               "files": {"set of training images": data.fingerprint(categories)}}  # fmt: skip
    unfinished = out / "unfinished.pt"
    begun = interrupted(unfinished, content, args.resume)
    content["models"], current = begun["models"], begun.get("current")
    plan.options |= {key: begun["options"][key] for key in plan.options}  # what "auto" had become
    rows, ratios = {}, []
    groups = {c.name: [c] for c in categories} if args.separate else {"all": categories}
    for label, group in groups.items():
        method = plan.build(args.seed).to(machine.device)
        if not ratios:  # the first group; not sooner, as what cannot be built must not cost an earlier run's pictures
            train.clear(out)
        print0(f"{plan.name}, {label}: {', '.join(c.name for c in group)}; seed {args.seed}, {machine.device}; "
            f"changed from the defaults: {plan.changed() or 'nothing'}")  # fmt: skip
        entry = next((e for e in content["models"] if e["name"] == label), None)
        if entry:
            reload(method, entry)
        elif loaded:
            raise UserError(f"{args.load} has no model of {label}: name other categories with --categories.")
        else:
            save = lambda state: RANK or train.write(unfinished, content | {"current": state})
            entry, current = fit_one(method, group, args, plan, machine, label, save, current), None
            content["models"].append(entry)
            save(None)  # a test image that cannot be read must not cost the training
        rows |= evaluate(method, group, machine)
        ratios.append(copy_ratio(method, group, machine))
        same = not loaded or plan.options == loaded["options"]
        if same:  # else threshold and colours are of another score
            judge(rows, group, entry)
        if same and not args.no_panels:
            panels(method, group, rows, entry, plan, machine, out)

    if not same:
        print0(f"{OTHER_OPTIONS}, so there are no verdicts and no panels")
    results = {
        "method": plan.name, "unified": not args.separate,
        "config": plan.options | content["recipe"] | about, "categories": rows, "mean": metrics.mean(rows),
        "copy_ratio": ratios, "curve": {e["name"]: e["curve"] for e in content["models"]},
        "seconds": time.perf_counter() - start, "device": str(machine.device)}  # fmt: skip
    if RANK == 0:
        report(results, out)
        if not loaded:
            unfinished.replace(out / "checkpoint.pt")  # what was saved last is all of it
    return results


def images_for(method, items):
    return data.Images(items, method.size, method.resample)


def find_data(root, names):
    """-> (root, categories), of the synthetic set in ./synthetic without a root. Says what is odd about them."""
    if root is None:
        root = "synthetic"
        if RANK == 0:
            synthetic.write_synthetic(root)
        if WORLD > 1:
            dist.barrier()
    categories = data.find_categories(root, names)
    for category in categories:
        for note in category.notes:
            print0(f"note: {note}")
    return root, categories


def default_out(args, name):
    folder = Path(args.data or "synthetic").resolve().name
    return f"runs/{name}-{folder}{'-separate' * args.separate}"


def fit_one(method, group, args, plan, machine, label, save, current):
    """Trains a method on the normal images of a group of categories. -> entry of the checkpoint, with thresholds"""
    generator, held, some = np.random.default_rng(args.seed), set(), []
    for category in group:  # of each, or it would have no threshold of its own
        own = [category.train[i] for i in generator.permutation(len(category.train))]
        held |= set(own[: min(math.ceil(args.holdout * len(own)), len(own) - 1)])
        some += own[: max(256 // len(group), 1)]
    images = images_for(method, [item for category in group for item in category.train if item not in held])
    aside = sorted(held, key=str)
    train.check_room(len(aside or some), method.size)  # for the threshold: to learn it now costs no training
    for _ in machine.read(images_for(method, aside), range(len(aside)), method.size):
        pass  # one that cannot be read must not cost the training
    curve = current.get("curve", []) if current else []

    def observe(step, stage, loss):
        """A diagnostic only: results are those of the final epoch, whatever the curve's peak."""
        rows = evaluate(method, group, machine)
        record = {"step": step, "stage": stage, "loss": loss, "copy_ratio": copy_ratio(method, group, machine)}
        record |= {name: metrics.mean(rows)[name] for name in ("image_auroc", "pixel_auroc")}
        print0(f"  {record}")
        curve.append(record)

    train.fit(method, images, machine=machine, seed=args.seed, label=label, eval_every=args.eval_every, observe=observe,
              save_every=plan.settings["save_every"], save=lambda state: save(state | {"curve": curve}), resume=current,
              **vars(plan.recipe))  # fmt: skip
    entry = {"name": label, "state": train.trained_state(method), "backbone": train.checksum(method), "curve": curve}
    return entry | {"held_out": bool(held)} | normal_range(method, aside or some, args.quantile, machine)


def normal_range(method, items, quantile, machine):
    """Threshold of the image score, and the colour scale low to high of overlays, both from normal images alone.

    One model may score one part ten times as high as another: under "of", each category has its own.
    """
    maps, scores = train.predict(method, images_for(method, items), machine=machine)
    names = np.array([item.category for item in items])
    require_finite(maps, "normal images")

    def limits(chosen):
        pixels = maps[chosen, ::3, ::3]  # every ninth pixel tells the distribution as well
        peaks = pixels.max((1, 2))
        top = float(np.quantile(peaks, 0.95, method="lower"))  # not the peak of one that is odd
        low = float(np.quantile(pixels[peaks <= top], 0.99))
        threshold = float(np.quantile(scores[chosen], quantile, method="higher"))
        return {"threshold": threshold, "low": low, "high": max(2 * top - low, low + 1e-6 * max(1, abs(low)))}

    return limits(slice(None)) | {"of": {name: limits(names == name) for name in np.unique(names).tolist()}}


def require_finite(values, of):
    if not np.isfinite(values).all():
        raise UserError(f"The scores of {of} are not finite: training diverged; lower lr.")


def evaluate(method, categories, machine):
    """-> {category: row of results.json}; the maps of one category at a time are held."""
    rows = {}
    for category in categories:
        mine = range(RANK, len(category.test), WORLD)  # the test set is dealt out to the processes like cards
        maps, scores = train.predict(method, images_for(method, category.test), machine=machine, indices=mine)
        maps, scores = gather(mine, maps), gather(mine, scores)
        require_finite(scores, category.name)
        rows[category.name] = category_row(category, scores, maps)
    return rows


def judge(rows, categories, entry):
    """Adds to the rows of categories how many test images their threshold judges wrongly, as [count, of how many]."""
    for category in categories:
        row, threshold = rows[category.name], entry["of"].get(category.name, entry)["threshold"]
        good, bad = ([s for s, item in zip(row["scores"], category.test) if item.label == i] for i in (0, 1))
        row["false_alarms"] = [sum(s > threshold for s in good), len(good)]
        row["misses"] = [sum(s <= threshold for s in bad), len(bad)]


def gather(indices, values):
    """Every process's values in the order of their indices, in all processes."""
    if WORLD == 1:
        return values
    parts = [None] * WORLD
    dist.all_gather_object(parts, (list(indices), values))
    places, values = map(np.concatenate, zip(*parts))
    return values[np.argsort(places)]


def category_row(category, scores, maps):
    """The seven metrics of a category, and the two AUROCs of each kind of defect against all normal images."""
    items = category.test
    labels = np.array([item.label for item in items])
    masks = np.stack([data.read_mask(item, maps.shape[-1]) for item in items])
    # A defective image without a mask, or with an empty one, would count as normal pixel by pixel: leave it out.
    masked = masks.any((1, 2)) | (labels == 0)
    if empty := [str(item.path) for item, counts in zip(items, masked) if item.masks and not counts]:
        print0(f"note: the masks of {', '.join(empty[:3])} are empty at this size; {len(empty)} left out of the pixels")
    known = slice(None) if masked.all() else masked  # the maps are many: no copy where none is left out
    row = metrics.evaluate(scores, labels, maps[known], masks[known])
    kinds = metrics.per_kind(scores, np.array([item.defect for item in items]), maps, masks, masked)
    return row | {"scores": scores.tolist(), "defects": kinds}


@torch.no_grad()
def copy_ratio(method, categories, machine):
    """Over all defective test images that have a clean twin, mean of a method's levels; None where there are none."""
    sums = []
    for item in (item for category in categories for item in category.test if item.twin and item.masks):
        (pair,) = machine.prepare(method, images_for(method, [item.twin, item.path]))
        mask = torch.from_numpy(data.read_mask(item, method.size)).to(machine.device)
        sums.append(models.copy_sums(method.reconstruction(pair), mask))
    if not sums or not sums[0]:
        return None
    copied, changed = np.array(sums).sum(0).T  # one of each a level
    return float((copied / changed).mean())


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints and the report


VERSION = 5  # of the checkpoint's content
OF_RUN = "data", "categories", "separate", "seed", "holdout", "quantile"  # flags that it holds
OTHER_OPTIONS = "note: the threshold and the colours are of the score with the options of the training"
NOT_HELD_OUT = "note: the threshold is of training images, which score lower than new ones; train with --holdout 0.1"


def read_checkpoint(path):
    """A checkpoint's content. Raises UserError when it cannot be read or lacks what this program needs."""
    try:
        content = models.load_file(path)
        if content["version"] != VERSION:
            raise UserError(f"{path} is of version {content['version']}, this program reads {VERSION}: train again.")
        verify(content)
    except (MemoryError, UserError):
        raise
    except OSError as error:
        why = error.strerror or "no such file"
        raise UserError(f"{path} cannot be read ({why}): name the checkpoint.pt of a run.") from None
    except Exception as error:
        kind = type(error).__name__
        raise UserError(f"{path} is no checkpoint.pt as a run writes it ({kind}): train again.") from None
    return content


def verify(content):
    """Raises KeyError, TypeError, AttributeError or ValueError for what this program cannot have written."""
    METHODS[content["method"]], content["options"] | content["recipe"]
    itemgetter(*OF_RUN)(content["run"])
    for entry in content["models"]:
        itemgetter("name", "backbone", "curve", "held_out")(entry)
        for part in (entry, *entry["of"].values()):
            low, high, threshold = itemgetter("low", "high", "threshold")(part)
            if not (-math.inf < low < high < math.inf and math.isfinite(threshold)):
                raise ValueError


def interrupted(path, content, resume):
    """-> content of the run that was interrupted here, or of a new one: finished models, state of the next one if any,
    options. Raises UserError when --resume finds another run, or none."""
    if not resume:
        for file, way in ((path, "--resume would go on with it"), (path.with_name("checkpoint.pt"), "see --out")):
            if file.exists() and not content["models"]:  # with --load nothing is written there
                print0(f"note: {file} is of an earlier run and soon written over: {way}")
        return content
    if not path.exists():
        raise UserError(f"--resume: there is no {path}, so nothing was interrupted there: leave --resume out.")
    found = read_checkpoint(path)
    for part in ("options", "recipe", "run", "files"):
        for key, value in content[part].items():
            if value not in ("auto", found.get(part, {}).get(key)):
                raise UserError(f"--resume: {path} is of a run with another {key}: give the same options again.")
    return found


def reload(method, entry):
    """The fitted method of one entry of a checkpoint."""
    if train.checksum(method) != entry["backbone"]:
        raise UserError("The frozen backbone is not the one of the checkpoint: give the same backbone and weights.")
    train.restore(method, entry["state"])
    return method.eval()


def report(results, out):
    """Prints the table with its footer; writes results.json and curve.png."""
    results = json.loads(json.dumps(results), parse_constant=lambda nan: None)  # JSON has no NaN
    header = ["category", "I-AUROC", "I-AP", "I-F1max", "P-AUROC", "P-AP", "P-F1max", "AUPRO", "false alarms", "misses"]
    rows = []
    for name, row in [*results["categories"].items(), ("mean", results["mean"])]:
        cells = [None if row[m] is None else f"{100 * row[m]:.1f}" for m in metrics.NAMES]
        cells += ["{} of {}".format(*row[m]) if m in row else None for m in ("false_alarms", "misses")]
        rows.append([name, *cells])
    print0(figures.table(header, rows))
    if not results["config"]["holdout"]:
        print0(NOT_HELD_OUT)
    for ratio in filter(None, results["copy_ratio"]):
        print0(f"copy ratio (1 = defects copied, 0 = restored): {ratio:.3f}")
    train.write(out / "results.json", json.dumps(results, indent=1).encode())
    for label, curve in results["curve"].items():
        if curve:
            name = "curve.png" if label == "all" else f"curve-{label}.png"
            series = figures.run_series(curve, ("loss", "copy_ratio", "image_auroc", "pixel_auroc"))
            figures.curve(series, out / name, f"{results['method']}, {label}")
    print0(f"{results['seconds']:.0f} s in all; wrote {out}/")


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def panels(method, group, rows, entry, plan, machine, out):
    """panels/CATEGORY.png: the worst false alarms, the worst misses and the clearest find of each kind of defect."""
    decoder = None
    if plan.settings["decode"]:  # in every process, since they share the work
        images = images_for(method, [item for category in group for item in category.train])
        decoder = train.fit(models.Decoder(method), images, machine=machine)
    if RANK:
        return
    for category in group:
        ranges, items = entry["of"].get(category.name, entry), category.test
        scores = rows[category.name]["scores"]
        order = np.argsort(scores).tolist()
        good, bad = ([i for i in order if items[i].label == label] for label in (0, 1))
        clearest = {items[i].defect: i for i in bad}  # the last of a kind has its highest score
        worst = [*good[-2:][::-1], *bad[:2]]
        chosen = list(dict.fromkeys([*worst, *clearest.values()]))[: train.CHUNK]  # each once
        images, shown = images_for(method, [items[i] for i in chosen]), []
        (batch,) = machine.prepare(method, images)  # in one batch
        maps = method.score(batch)[0].cpu().numpy()
        restored = restored_tiles(method.reconstruction(batch), decoder)
        for row, i in enumerate(chosen):
            item, score = items[i], scores[i]
            tiles = {"input": images[row]} | {name: stack[row] for name, stack in restored.items()}
            tiles["ground truth"] = data.read_mask(item, method.size) if item.masks or not item.label else None
            tiles["anomaly map"] = figures.overlay(images[row], maps[row], ranges["low"], ranges["high"])
            wrong = (score > ranges["threshold"]) != item.label
            verdict = ["false alarm", "miss"][item.label] if wrong else ""
            name = f"{item.defect}/{item.path.stem}"
            shown.append({"name": name, "score": score, "images": tiles, "verdict": verdict})
        note = (f"Scores above {ranges['threshold']:.3g} count as defective. First the highest-scoring normal images, "
                f"the lowest-scoring defective ones, then the clearest of each kind.")  # fmt: skip
        picture = figures.panel(shown, ranges["low"], ranges["high"], f"{plan.name}: {category.name}", note)
        figures.save(picture, out / f"panels/{category.name}.png")


@torch.no_grad()
def restored_tiles(pairs, decoder):
    """-> {name: (B,S,S,3)}: the reconstruction as a picture, where it is one or can be decoded."""
    if decoder:
        targets, restored = zip(*pairs)
        return {"features decoded": pictures(decoder(targets)), "restored, decoded": pictures(decoder(restored))}
    return {"restored": pictures(restored) for _, restored in pairs if restored.shape[1] == 3}


def pictures(x):
    """(B,3,S,S) in [0,1], clipped to it -> array (B,S,S,3) uint8"""
    return (x.movedim(1, -1).clamp(0, 1) * 255).byte().cpu().numpy()


# ---------------------------------------------------------------------------------------------------------------------
# Prediction, export, comparison


def load_for_use(args, plan, loaded):
    """-> (method, machine, entry) of a checkpoint that holds one model, or of its model for --categories NAME."""
    entries, named = loaded["models"], args.categories or []
    known = {name: entry for entry in entries for name in entry["of"]}
    if not set(named) <= set(known) or args.separate and len(entries) > 1 and len(named) != 1:
        raise UserError(f"--categories: {args.load} knows {', '.join(known)}: name one of them.")
    if plan.options != loaded["options"]:
        print0(OTHER_OPTIONS)
    machine = plan.machine(args.device)
    method = plan.build(args.seed).to(machine.device)
    entry = known[named[0]] if named else entries[0]
    own = entry["of"][named[0]] if len(named) == 1 else {}
    return reload(method, entry), machine, entry | own


def predict(args, plan, loaded):
    """A line and an overlay per image as they come, predictions.csv. -> exit code: 2 if none was readable, else 0."""
    method, machine, entry = load_for_use(args, plan, loaded)
    source = Path(args.predict)
    root, paths = source.parent, [source]
    if source.is_dir():
        root, paths = source, sorted(source.rglob("*"))
        paths = [p for p in paths if p.suffix.lower() in data.EXTENSIONS and p.is_file()]
        paths = [p for p in paths if not p.name.endswith(".overlay.png")]  # of an earlier prediction
    if not paths:
        raise UserError(f"--predict {source} holds no image ({', '.join(sorted(data.EXTENSIONS))}).")
    out = Path(args.out or Path(args.load).parent / "predictions")
    train.writable(out, source)
    if len(entry["of"]) > 1 and len(args.categories or []) != 1:
        print0(f"note: one threshold for {', '.join(entry['of'])} together; name one with --categories for its own")
    if not entry["held_out"]:
        print0(NOT_HELD_OUT)
    skipped = 0
    with open(out / "predictions.csv", "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        lines = csv.writer(file)
        lines.writerow(["image", "score", "threshold", "verdict", "overlay"])
        for path in paths:
            try:
                image = images_for(method, [path])[0]
            except data.DataError as error:
                print(f"skipped: {error}", file=sys.stderr)
                skipped += 1
                continue
            (anomaly,), (score,) = train.predict(method, [image], machine=machine)
            if not np.isfinite(score):
                raise UserError(f"The score of {path} is not finite, so there is no verdict: train again.")
            verdict = "defective" if score > entry["threshold"] else "normal"
            overlay = out / f"{path.relative_to(root)}.overlay.png"
            figures.save(Image.fromarray(figures.overlay(image, anomaly, entry["low"], entry["high"])), overlay)
            lines.writerow([path, f"{score:.6g}", f"{entry['threshold']:.6g}", verdict, overlay])
            file.flush()
            print0(f"{path}  score {score:.4g} (threshold {entry['threshold']:.4g})  {verdict}  {overlay}")
    print0(f"{len(paths) - skipped} images, {skipped} skipped; wrote {out / 'predictions.csv'}")
    return 2 if skipped == len(paths) else 0


@torch.no_grad()
def export(args, plan, loaded):
    """Writes --export FILE.pt2 and checks it against the program itself."""
    args.device = args.device.replace("auto", "cpu")  # a file traced on a GPU runs on no other machine
    method, machine, entry = load_for_use(args, plan, loaded)
    images = torch.rand(1, 3, method.size, method.size, device=machine.device)
    method.eval().requires_grad_(False)
    expected, _ = train.predict(method, images, machine=machine)  # first: tracing must fill no cache
    try:
        program = torch.export.export(method, (images,))
    except Exception as error:  # whatever the tracer cannot follow
        raise UserError(f"PyTorch cannot trace {plan.name} ({type(error).__name__}): use --predict.") from None
    maps, _ = program.module()(images)
    buffer = io.BytesIO()  # onto a full disk PyTorch's own writer aborts the process
    torch.export.save(program, buffer)
    train.write(args.export, buffer.getvalue())
    difference = np.abs(maps.cpu().numpy() - expected).max() / expected.max()
    print0(f"wrote {args.export}: input (1,3,{method.size},{method.size}) in [0,1]; "
        f"largest difference from the program's map {difference:.1e} of its maximum; "
        f"scores above {entry['threshold']:.6g} are defective")  # fmt: skip


# UniAD's own image/pixel AUROC (NeurIPS 2022, tables 1 and 2), one model for all: to set beside one's own
PUBLISHED = """bottle 99.7/98.1 cable 95.2/97.3 capsule 86.9/98.5 hazelnut 99.8/98.1 metal_nut 99.2/94.8 pill 93.7/95.0
screw 87.5/98.3 toothbrush 94.2/98.4 transistor 99.8/97.9 zipper 95.8/96.8 carpet 99.8/98.5 grid 98.2/96.5
leather 100/98.8 tile 99.3/91.8 wood 98.6/93.2"""


def compare(folders):
    """The results of several runs side by side; runs that differ in their seed alone as mean ± standard deviation."""
    groups, names = {}, set()
    for folder in dict.fromkeys(map(Path, folders)):
        try:
            file = folder / "results.json"
            found = json.loads(file.read_text() if file.is_file() else "")
            key = json.dumps([found["method"], found["config"] | {"seed": None}])
            for row in (found["mean"], *found["categories"].values()):
                cell([row])
            found |= {"run": folder.name, "seconds": float(found["seconds"])}
            groups.setdefault(key, []).append(found)
            names |= set(found["categories"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            print0(f"note: {folder} holds no results.json of this program and is left out")
    if not groups:
        raise UserError("--compare: none of these folders holds a results.json: name folders that a run has written.")
    names, rows = sorted(names), []
    for group in groups.values():
        cells = [cell([found["categories"].get(name) for found in group]) for name in names]
        seconds = np.mean([found["seconds"] for found in group])
        label = " ".join(found["run"] for found in group)
        rows.append([label, *cells, cell([found["mean"] for found in group]), f"{seconds:.0f}"])
    words = PUBLISHED.split()
    paper = dict(zip(words[::2], words[1::2]))
    if len(set(names) & set(paper)) > 1:
        rows.append(["UniAD's paper, one model for 15", *map(paper.get, names), "96.5/96.8", None])
    print0(figures.table(["image/pixel AUROC", *names, "mean", "seconds"], rows))


def cell(rows):
    """Image/pixel AUROC of one category in several runs, in percent."""
    parts = []
    for name in ("image_auroc", "pixel_auroc"):
        values = [100 * row[name] for row in rows if row and row[name] is not None]
        spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
        parts.append(f"{np.mean(values):.1f}{spread}" if values else "-")
    return "/".join(parts)


def demo(argv):
    """An MLP and UniAD on the same synthetic parts, side by side."""
    rows = []
    for name in ("mlp", "uniad"):
        args, plan, _ = parse([*argv, "--method", name])
        args.out = f"{args.out}/{name}" if args.out else default_out(args, name)
        args.resume &= Path(args.out, "unfinished.pt").exists()  # of the two runs, the one that was interrupted
        results = run(args, plan, None)
        values = [np.mean(results["copy_ratio"]), *map(results["mean"].get, ("image_auroc", "pixel_auroc", "aupro"))]
        rows.append([name, *(f"{value:.3f}" for value in values)])
    print0()
    print0(figures.table(["method", "copy ratio", "image AUROC", "pixel AUROC", "AUPRO"], rows))
    print0("copy ratio: 1 = the defect is copied whole, 0 = it is restored to normal; see runs/*/panels")


def main(argv=None):
    """Runs the program; every error a user can cause ends in one sentence and exit code 2."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args, plan, loaded = parse(argv)
        check(args, plan, loaded)
        if WORLD > 1 and not dist.is_initialized():
            dist.init_process_group()
        if RANK and (args.compare or args.predict or args.export):
            return 0  # one process is enough
        if args.compare:
            compare(args.compare)
        elif args.predict:
            return predict(args, plan, loaded)
        elif args.export:
            export(args, plan, loaded)
        elif args.method is None and args.data is None and not loaded:
            demo(argv)
        else:
            run(args, plan, loaded)
        return 0
    except (UserError, data.DataError, models.MethodError, synthetic.SyntheticError) as error:
        message = str(error)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        message = f"{error}: {'free some space, or name another --out' if full else 'see to that file or folder'}."
    except torch.linalg.LinAlgError:
        message = "The statistics have no inverse, so training has diverged: lower lr."
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in str(error):
            raise
        message = "The memory is full: lower --batch-size or --size."
    except KeyboardInterrupt:
        print("\ninterrupted: the same command with --resume goes on from the last save, if any", file=sys.stderr)
        return 130
    print(f"uad.py: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # closed by who started this
    sys.stdout.reconfigure(errors="backslashreplace")  # not every terminal can show every file name
    warnings.filterwarnings("ignore", module="torch")  # PyTorch's advice to programmers
    sys.exit(main())
