"""Train on images of good parts only; say per image and per pixel what is wrong with a new one.

    python uad.py                                    the demo: an MLP copies defects, UniAD does not (synthetic data)
    python uad.py --method uniad --data ./mvtec      one model for all categories found, evaluated at the final epoch
    python uad.py --load runs/uniad-mvtec/checkpoint.pt [--data ./mvtec]         evaluate again

The way of an image: folder -> data.py -> prepare (frozen, once, cached) -> loss ... -> anomaly map -> metrics.py ->
table, results.json. This file knows nothing of a method but the contract in models.py.
"""

import argparse
import contextlib
import copy
import errno
import hashlib
import inspect
import itertools
import json
import math
import os
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import data
import metrics
import models

METHODS = models.METHODS


class UserError(Exception):
    """What the user can mend: one sentence that names the file or option and the way out. Exit code 2."""


# ---------------------------------------------------------------------------------------------------------------------
# Options. Their defaults come from the method's recipe, so -h shows the numbers that will be used.


METHOD_OPTIONS = {  # constructor arguments of the methods, by name
    "backbone": dict(choices=sorted(models.STAGES), help="frozen features"),
    "weights": dict(metavar="FILE", help="'default', 'none' (random, for tests) or a local state dict"),
    "standardise": dict(action=argparse.BooleanOptionalAction, help="bring feature channels to mean 0 and std 1"),
    "alpha": dict(type=float, help="strength of the feature jitter"),
    "query": dict(action=argparse.BooleanOptionalAction, help="learned query in every decoder layer"),
    "mask": dict(action=argparse.BooleanOptionalAction, help="neighbour mask in attention"),
    "jitter": dict(action=argparse.BooleanOptionalAction, help="feature jitter"),
    "dropout": dict(type=float, help="dropout rate"),
    "strides": dict(type=int, nargs="+", choices=[4, 8, 16], help="feature levels of rlr"),
    "width": dict(type=int, help="filters of the first level of the U-Net"),
    "saliency": dict(choices=["dino", "spectral"], help="what finds the region to mask"),
    "masking": dict(choices=["saliency", "mosaic", "none"], help="which part of the image is behind the mosaic"),
    "mosaic": dict(metavar="M", help="block side in pixels at 256x256, or auto: chosen from normal images"),
    "lamp": dict(action=argparse.BooleanOptionalAction, help="loss amplification: -ln(1 - e) in place of an error e"),
    "attenuate": dict(type=int, nargs="+", choices=[0, 1, 2], help="skips with an attenuator, 0 = shallow"),
    "target": dict(choices=["error", "restore"], help="what the attenuators learn from"),
    "per_channel": dict(action=argparse.BooleanOptionalAction, help="one attenuation a channel, not one a place"),
    "shallow_off": dict(action=argparse.BooleanOptionalAction, help="the control: no attenuator, shallow skip off"),
}
REFUSALS = {"lamp": "its error is not bounded to [0,1), which loss amplification needs"}


def method_defaults(cls):
    """Keyword arguments of a method's constructor and of those it passes on to, with their defaults."""
    found = {}
    for base in cls.__mro__:
        for name, p in inspect.signature(base.__init__).parameters.items() if issubclass(base, models.Method) else ():
            if p.kind is p.KEYWORD_ONLY:
                found.setdefault(name, p.default)
    return found


def parse(argv):
    """-> the effective configuration (argparse.Namespace); exits with code 2 and one sentence on a bad option."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--method", choices=METHODS)
    first.add_argument("--recipe", choices=["default", "paper"], default="default")
    first.add_argument("--data", metavar="FOLDER")
    first.add_argument("--load", metavar="CHECKPOINT")
    known, _ = first.parse_known_args(argv)
    cls = METHODS[known.method or "uniad"]
    recipe = cls.recipe if known.recipe == "default" else cls.paper_recipe
    if recipe is None:
        first.error(f"{known.method} has no --recipe paper: its paper gives none, or the default is the paper's.")
    demo = {"backbone": "efficientnet_lite2", **recipe.demo} if known.data is None and not known.load else {}
    accepted = {**method_defaults(cls), **recipe.options, **demo}
    setting = {**vars(recipe), **demo}

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--method", choices=METHODS, help="what to train; without it the demo compares mlp and uniad")
    p.add_argument("--data", metavar="FOLDER", help="MVTec AD or VisA layout, or one category; without it: synthetic data")
    p.add_argument("--categories", nargs="+", metavar="NAME", help="only these")
    p.add_argument("--separate", action="store_true", help="one model per category; default: one for all")
    p.add_argument("--out", metavar="FOLDER", help="default: runs/METHOD-DATA")
    p.add_argument("--load", metavar="CHECKPOINT", help="evaluate this checkpoint instead of training")
    p.add_argument("--resume", action="store_true", help="continue an interrupted run in --out to the same numbers")
    p.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 …; default: %(default)s")
    p.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto",
                   help="of training; auto: bf16 where the processor multiplies it natively")  # fmt: skip
    p.add_argument("--compile", action="store_true", help="torch.compile the training step (a CPU needs a C++ compiler)")
    p.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="decoding threads; default: %(default)s")
    p.add_argument("--cache", metavar="FOLDER", help="keep the frozen part on disk, for later runs; default: in RAM")
    p.add_argument("--eval-every", type=int, default=0, metavar="STEPS", help="also evaluate during training: the curve")
    p.add_argument("--copy-ratio", action="store_true", help="measure the copy ratio on data with clean twins")
    p.add_argument("--save-every", type=float, default=60, metavar="SECONDS", help="for --resume; default: %(default)s")
    g = p.add_argument_group("training", f"defaults: the {known.recipe} recipe of {known.method or 'uniad'}")
    g.add_argument("--recipe", choices=["default", "paper"], default="default", help="default: %(default)s")
    for name, kind in dict(size=int, epochs=int, batch_size=int, lr=float, weight_decay=float, clip=float).items():
        g.add_argument("--" + name.replace("_", "-"), type=kind, default=setting[name], help="default: %(default)s")
    g.add_argument("--optimiser", choices=["adamw", "adam", "sgd"], default=setting["optimiser"], help="default: %(default)s")
    g.add_argument("--schedule", choices=["one-cycle", "step", "constant"], default=setting["schedule"], help="default: %(default)s")
    g = p.add_argument_group("the method")
    for name, option in METHOD_OPTIONS.items():
        note = f"; default: {accepted[name]}" if name in accepted else f"; not used by {known.method or 'uniad'}"
        g.add_argument("--" + name.replace("_", "-"), **{**option, "default": None, "help": option["help"] + note})
    args = p.parse_args(argv)

    for name in METHOD_OPTIONS:
        if getattr(args, name) is not None and name not in accepted:
            reason = REFUSALS.get(name, "it has no such part")
            p.error(f"--{name.replace('_', '-')} does not apply to {known.method or 'uniad'}: {reason}.")
    for name in ("size", "epochs", "batch_size", "workers"):
        if getattr(args, name) < 1:
            p.error(f"--{name.replace('_', '-')} must be at least 1.")
    given = {n: getattr(args, n) for n in METHOD_OPTIONS if getattr(args, n) is not None}
    args.options = {**{n: v for n, v in accepted.items() if n in method_defaults(cls)}, **given}
    if "size" in args.options:
        args.options["size"] = args.size
    for name in METHOD_OPTIONS:
        delattr(args, name)
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Processes, devices, progress


RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun


def say(*words):
    if RANK == 0:
        print(*words, flush=True)


def pick_device(name):
    """'auto', 'cpu', 'cuda', 'cuda:1' -> torch.device. Raises UserError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"Unknown --device {name!r}: choose auto, cpu, cuda or cuda:N.") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name} is not supported: choose auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name} is not there: this machine shows {torch.cuda.device_count()} CUDA devices.")
    if device.type == "cuda" and WORLD > 1:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


def precision(args, device):
    """autocast for training. Weights, residuals, norms and losses stay float32; the matrix products run in bfloat16."""
    native = torch.cuda.is_bf16_supported() if device.type == "cuda" else (
        torch.cpu.get_capabilities().get("avx512_bf16") or torch.cpu.get_capabilities().get("amx_bf16"))  # fmt: skip
    return torch.autocast(device.type, torch.bfloat16, enabled=bool(args.precision == "bf16" or args.precision == "auto" and native))


class Progress:
    """One line that renews itself on a terminal; elsewhere a plain line every tenth of the way."""

    def __init__(self, label, total):
        self.label, self.total, self.start, self.shown, self.tenth = label, total, time.perf_counter(), 0.0, 0

    def update(self, done, text=""):
        now, terminal = time.perf_counter(), sys.stdout.isatty()
        tenth = 10 * done // self.total
        if RANK or not (done == self.total or (now - self.shown > 0.2 if terminal else tenth > self.tenth)):
            return
        self.shown, self.tenth = now, tenth
        spent = now - self.start
        left = spent / max(done, 1) * (self.total - done)
        line = f"{self.label} {done}/{self.total}{text}  {spent:.0f} s, {left:.0f} s left"
        print(f"\r{line:<100}" if terminal else line, end="\n" if done == self.total or not terminal else "", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# The frozen part, once per image


CHUNK = 16  # images prepared or tested at a time


def frozen(method, paths, args, device):
    """Decodes, resizes and prepares image files; yields tuples of tensors (b,...) on the device, in half precision."""
    images = data.load_images(paths, args.size, args.workers)
    while chunk := list(itertools.islice(images, CHUNK)):
        batch = torch.from_numpy(np.stack(chunk)).to(device).permute(0, 3, 1, 2).float() / 255
        with torch.no_grad():
            yield tuple(part.half() for part in method.prepare(batch))


def free_memory():
    """Bytes of RAM that can be had; infinity where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return math.inf


class Prepared:
    """The prepared parts of a list of images: half precision, in RAM, on the GPU, or a memory map in args.cache."""

    def __init__(self, method, paths, args, device, label):
        self.device, self.tensors = device, []
        folder, size = self.folder(method, paths, args), len(paths)
        if folder and (folder / "complete").exists():
            self.tensors = [torch.from_numpy(np.load(f, mmap_mode="r+")) for f in sorted(folder.glob("*.npy"))]
            say(f"{label}: {size} images from the cache {folder}")
            return
        progress, done = Progress(label, size), 0
        for parts in frozen(method, paths, args, device):
            if not self.tensors:
                self.allocate(parts, size, folder)
            for tensor, part in zip(self.tensors, parts):
                tensor[done : done + len(part)] = part
            done += len(parts[0])
            progress.update(done)
        if folder:
            (folder / "complete").touch()

    @staticmethod
    def folder(method, paths, args):
        """Where these parts lie on disk: named by the files, the frozen weights and the way of preparing."""
        if not args.cache:
            return None
        key = hashlib.sha256(f"{type(method).prepare.__qualname__} {args.size} {method.prepared_by()}".encode())
        for path in paths:
            stat = os.stat(path)
            key.update(f"{Path(path).resolve()} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        for name, tensor in sorted(method.state_dict().items()):
            if name.startswith(("backbone.", "frozen_")):
                key.update(tensor.cpu().contiguous().numpy().tobytes())
        folder = Path(args.cache) / f"{key.hexdigest()[:16]}-{RANK}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def allocate(self, parts, size, folder):
        total = sum(part[0].numel() * 2 * size for part in parts)
        on_gpu = self.device.type == "cuda" and not folder and total < 0.5 * torch.cuda.mem_get_info(self.device)[0]
        where = folder or ("GPU memory" if on_gpu else "RAM")
        say(f"caching {size} prepared images: {total / 2**20:,.0f} MiB in {where}")
        if where == "RAM" and total > 0.8 * free_memory():
            raise UserError(f"The cache needs {total / 2**30:.1f} GiB and RAM has {free_memory() / 2**30:.1f} free: "
                            f"name a folder on disk with --cache FOLDER, or lower --size.")  # fmt: skip
        for i, part in enumerate(parts):
            shape = (size, *part.shape[1:])
            if folder:
                array = np.lib.format.open_memmap(folder / f"{i}.npy", "w+", np.float16, shape)
                self.tensors.append(torch.from_numpy(array))
            else:
                self.tensors.append(torch.empty(shape, dtype=torch.half, device=self.device if on_gpu else "cpu"))

    def __len__(self):
        return len(self.tensors[0])

    def batch(self, index):
        return tuple(t[index].to(self.device, non_blocking=True).float() for t in self.tensors)

    def batches(self, size=CHUNK):
        return (self.batch(slice(i, i + size)) for i in range(0, len(self), size))


# ---------------------------------------------------------------------------------------------------------------------
# Training


class Step(nn.Module):
    """The loss as a module's forward, which is what data-parallel training and torch.compile wrap."""

    def __init__(self, method):
        super().__init__()
        self.method = method

    def forward(self, batch, stage):
        return self.method.loss(batch, stage)


def optimiser_of(args, parameters):
    fused = dict(lr=args.lr, weight_decay=args.weight_decay, fused=True)  # one kernel for all parameters, also on a CPU
    if args.optimiser == "sgd":
        return torch.optim.SGD(parameters, momentum=0.9, **fused)
    return {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[args.optimiser](parameters, **fused)


def rate(schedule, progress):
    """Factor of the learning rate at `progress` in [0,1)."""
    if schedule == "one-cycle":  # 10 % linear warm-up, then half a cosine to 0
        return progress / 0.1 + 0.01 if progress < 0.1 else (1 + math.cos(math.pi * (progress - 0.1) / 0.9)) / 2
    return 0.1 if schedule == "step" and progress >= 0.8 else 1.0


def random_state(device, state=None):
    """Gets or sets the generators' state, which a resumed run needs to give the same numbers."""
    if state is not None:
        torch.set_rng_state(state[0])
        if device.type == "cuda":
            torch.cuda.set_rng_state(state[1], device)
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def train(method, prepared, args, device, label, resumed, save, observe):
    """Runs every stage to its last step. resumed: what `save` was given before an interruption, or none.

    save(dict) keeps the state every args.save_every seconds. observe(record) sees step, loss and, every
    args.eval_every steps, is asked to evaluate. Raises UserError when the loss stops being finite.
    """
    size, per_epoch = min(args.batch_size, len(prepared)), max(1, len(prepared) // args.batch_size)
    total, spent, trained = args.epochs * per_epoch, 0.0, 0
    for number, (stage, parameters) in enumerate(method.stages()):
        if resumed and number < resumed["stage"]:
            continue
        for p in method.parameters():
            p.requires_grad_(False)
        for p in parameters:
            p.requires_grad_(True)
        step_module = Step(method)
        if WORLD > 1:
            step_module = nn.parallel.DistributedDataParallel(step_module)
        run_step = torch.compile(step_module) if args.compile else step_module
        optimiser, first, order = optimiser_of(args, parameters), 0, None
        if resumed:
            restore(method, resumed["state"])
            optimiser.load_state_dict(resumed["optimiser"])
            random_state(device, resumed["random"])
            first, resumed = resumed["step"], None
        progress, mean, saved = Progress(f"{label} {stage}", total), None, time.perf_counter()
        for step in range(first, total):
            start = time.perf_counter()
            epoch, at = divmod(step, per_epoch)
            if at == 0 or order is None:  # drawn from its own generator, so that a resumed run sees the same order
                generator = torch.Generator().manual_seed(hash((args.seed, number, epoch, RANK)) % 2**63)
                order = torch.randperm(len(prepared), generator=generator)
            method.train()
            for group in optimiser.param_groups:
                group["lr"] = args.lr * rate(args.schedule, step / total)
            with precision(args, device):
                loss = run_step(prepared.batch(order[at * size : (at + 1) * size]), stage)
            optimiser.zero_grad()
            loss.backward()
            if args.clip:
                nn.utils.clip_grad_norm_(parameters, args.clip)
            optimiser.step()
            loss = loss.detach()
            mean = loss if mean is None else torch.lerp(mean, loss, max(0.02, 1 / (step + 1)))
            if step % 20 == 19 or step + 1 == total:  # reading the loss waits for a GPU: not at every step
                if not torch.isfinite(mean):
                    raise UserError(f"The loss became {mean.item()} at step {step} of {stage}: lower --lr (now {args.lr}).")
                progress.update(step + 1, f"  loss {mean.item():.4f}")
            spent, trained = spent + time.perf_counter() - start, trained + size
            observe(number * total + step + 1, stage, mean)
            if time.perf_counter() - saved > args.save_every and step + 1 < total:
                save({"stage": number, "step": step + 1, "state": trained_state(method), "random": random_state(device),
                      "optimiser": optimiser.state_dict()})  # fmt: skip
                saved = time.perf_counter()
    method.eval()
    return WORLD * trained / spent if spent else None


def trained_state(method):
    """The state dict without the frozen backbone, which is known by its name and checksum."""
    return {k: v.cpu() for k, v in method.state_dict().items() if not k.startswith("backbone.")}


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def gather(part):
    """Every process's (index, value) pairs in the order of their indices: the test set is dealt out like cards."""
    if WORLD == 1:
        return [value for _, value in part]
    parts = [None] * WORLD
    dist.all_gather_object(parts, part)
    return [value for _, value in sorted(itertools.chain(*parts), key=lambda pair: pair[0])]


@torch.no_grad()
def evaluate(method, categories, args, device, cached=None):
    """-> ({category: row of results.json}, images per second). cached: {category: Prepared}, else images are streamed."""
    method.eval()
    rows, start, count = {}, time.perf_counter(), 0
    for category in categories:
        mine = list(range(RANK, len(category.test), WORLD))
        paths = [category.test[i].path for i in mine]
        source = cached[category.name].batches() if cached else frozen(method, paths, args, device)
        scores, maps = [], []
        for parts in source:
            batch_maps = method.anomaly_map(tuple(part.float() for part in parts)).float()
            scores.extend(method.image_score(batch_maps).tolist())
            maps.extend(batch_maps.cpu().numpy())
        scores, maps = np.array(gather(list(zip(mine, scores)))), gather(list(zip(mine, maps)))
        rows[category.name] = category_row(category, scores, maps, args.size)
        count += len(category.test)
    return rows, count / (time.perf_counter() - start)


def category_row(category, scores, maps, size):
    """The seven metrics of a category, and the two AUROCs of each kind of defect against all normal images."""
    labels = np.array([item.label for item in category.test])
    # An image whose ground truth is missing would count as normal pixel by pixel: leave it out of the pixel metrics.
    masked = np.array([category.has_masks and bool(item.masks or not item.label) for item in category.test])
    masks = {i: data.read_mask(category.test[i], size) for i in np.flatnonzero(masked)}

    def measure(chosen):
        pixels = [i for i in chosen if masked[i]]
        pair = (np.stack([maps[i] for i in pixels]), np.stack([masks[i] for i in pixels])) if pixels else (None, None)
        return metrics.evaluate(scores[chosen], labels[chosen], *pair)

    row = measure(np.arange(len(labels)))
    row["defects"] = {}
    for defect in sorted({item.defect for item in category.test if item.label}):
        chosen = np.array([i for i, item in enumerate(category.test) if item.defect in ("good", defect)])
        one = measure(chosen)
        row["defects"][defect] = {name: one[name] for name in ("image_auroc", "pixel_auroc")}
    return row


@torch.no_grad()
def copy_ratio(method, categories, args, device):
    """The copy ratio over all defective test images that have a clean twin; None where there are none."""
    items = [item for c in categories for item in c.test if item.twin and item.masks]
    sums = None
    method.eval()
    for at in range(0, len(items), CHUNK):
        chunk = items[at : at + CHUNK]
        (clean,) = frozen(method, [item.twin for item in chunk], args, device)
        (defective,) = frozen(method, [item.path for item in chunk], args, device)
        pairs = [method.reconstruction(tuple(part.float() for part in parts)) for parts in (clean, defective)]
        masks = torch.from_numpy(np.stack([data.read_mask(item, args.size) for item in chunk])).to(device)
        sums = np.array(models.copy_ratio(*pairs, masks)) + (0 if sums is None else sums)
    return None if sums is None or not sums.size else float((sums[:, 0] / sums[:, 1]).mean())


def mean_row(rows):
    """Plain mean over categories, of those where the metric is defined."""
    columns = {name: [row[name] for row in rows.values() if not math.isnan(row[name])] for name in metrics.NAMES}
    return {name: float(np.mean(values)) if values else math.nan for name, values in columns.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Files and the report


def write(path, content):
    """Writes text, or a checkpoint by torch.save, under a temporary name and renames it: never half a file."""
    path, temporary = Path(path), Path(f"{path}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            temporary.write_text(content)
        else:
            torch.save(content, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(f"Cannot write {path} ({error}): free some space or name another folder with --out.") from None


def without_nan(value):
    """NaN -> None all the way down, since JSON has no NaN."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def table(rows, mean):
    """The seven metrics in percent, one category a line."""
    show = lambda value: "    -" if value is None or math.isnan(value) else f"{100 * value:5.1f}"
    heads = ["I-AUROC", "I-AP", "I-F1max", "P-AUROC", "P-AP", "P-F1max", "AUPRO"]
    width = max(map(len, [*rows, "category"]))
    lines = [f"{'category':<{width}}  " + "  ".join(f"{head:>7}" for head in heads)]
    for name, row in [*rows.items(), ("mean", mean)]:
        lines.append(f"{name:<{width}}  " + "  ".join(f"{show(row[metric]):>7}" for metric in metrics.NAMES))
    return "\n".join(lines)


def peak_memory(device):
    """Bytes: of the GPU where one is used, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# ---------------------------------------------------------------------------------------------------------------------
# The program


def restore(method, state):
    """Loads what `trained_state` gave. Buffers may have another shape than a new method's: a memory bank grows in `fit`."""
    own = {k for k in method.state_dict() if not k.startswith("backbone.")}
    if own != set(state):
        raise UserError(f"The checkpoint does not fit this method: it lacks or has too much of {sorted(own ^ set(state))[:3]}.")
    for name, value in state.items():
        owner, leaf = method.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        if leaf in owner._buffers:
            owner._buffers[leaf] = value.to(owner._buffers[leaf].device)
        else:
            getattr(owner, leaf).data.copy_(value)


def build(name, options, device, seed=0):
    torch.manual_seed(seed)  # weights first: the same initial network whatever has run before in this process
    return METHODS[name](**options).to(device)


def sample_images(paths, args, device, count=256):
    """A fixed random sample of normal training images for `calibrate`, the same for every --seed."""
    order = np.random.default_rng(0).permutation(len(paths))[:count]
    images = data.load_images([paths[i] for i in sorted(order)], args.size, args.workers)
    return torch.from_numpy(np.stack(list(images))).to(device).permute(0, 3, 1, 2).float() / 255


def run(args):
    """Trains or loads, evaluates, reports. -> the content of results.json."""
    device = pick_device(args.device)
    root = args.data
    if root is None:
        root = data.write_synthetic("synthetic")
        say(f"no --data: synthetic data in {root}")
    categories = data.find_categories(root, args.categories)
    for category in categories:
        for note in category.notes:
            say(f"note: {note}")
    out = Path(args.out or f"runs/{args.method}-{Path(root).resolve().name}{'-separate' if args.separate else ''}")
    say(", ".join(f"{k}={v}" for k, v in vars(args).items() if v is not None and k != "options"))
    say("method: " + ", ".join(f"{k}={v}" for k, v in args.options.items()))

    groups = {c.name: [c] for c in categories} if args.separate else {"all": categories}
    loaded = {entry["name"]: entry["state"] for entry in args.loaded["models"]} if args.load else {}
    unfinished = resume_from(out / "unfinished.pt", args) if args.resume else {"models": [], "current": None}
    entries, rows, curves, speeds, ratios = unfinished["models"], {}, {}, [], []
    done = {entry["name"]: entry["state"] for entry in entries}
    for name, group in groups.items():
        method = build(args.method, args.options, device, args.seed)
        if missing := loaded and name not in loaded:
            raise UserError(f"{args.load} holds no model for {name!r}: it has {', '.join(loaded)}.")
        if state := loaded.get(name) or done.get(name):
            restore(method, state)
            speed = {}
        else:
            save = lambda current: write(out / "unfinished.pt", {**identity(args), "models": entries, "current": current})
            speed, curves[name] = fit_one(method, group, args, device, name, unfinished["current"], save)
            unfinished["current"] = None
            entries.append({"name": name, "state": trained_state(method)})
        found, speed["test_images_per_s"] = evaluate(method, group, args, device)
        rows.update(found)
        speeds.append(speed)
        if args.copy_ratio:
            ratios.append(copy_ratio(method, group, args, device))

    speeds = {key: float(np.mean([s[key] for s in speeds if s.get(key)] or [math.nan]))
              for key in ("prepare_images_per_s", "train_images_per_s", "test_images_per_s")}  # fmt: skip
    mean = mean_row(rows)
    config = {k: v for k, v in vars(args).items() if k not in ("options", "loaded")} | args.options
    results = without_nan({
        "method": args.method, "data": str(root), "backbone": args.options.get("backbone"), "unified": not args.separate,
        "seed": args.seed, "config": config, "categories": rows, "mean": mean, "throughput": speeds,
        "peak_memory_bytes": peak_memory(device), "copy_ratio": ratios, "curve": curves,
    })  # fmt: skip
    say(table(rows, mean))
    if ratios:
        say(f"copy ratio: {', '.join('-' if r is None else f'{r:.3f}' for r in ratios)}")
    if RANK == 0:
        write(out / "results.json", json.dumps(results, indent=1))
        if not args.load:
            write(out / "checkpoint.pt", {**identity(args), "models": entries})
        (out / "unfinished.pt").unlink(missing_ok=True)
    speed = ", ".join(f"{k.split('_')[0]} {v:.0f}" for k, v in speeds.items() if not math.isnan(v))
    say(f"images per second: {speed}; peak memory {results['peak_memory_bytes'] / 2**30:.1f} GiB; wrote {out}/")
    return results


def identity(args):
    """What a checkpoint must tell to be loaded: plain values only, so that weights_only can stay on."""
    plain = {k: v for k, v in vars(args).items() if isinstance(v, (str, int, float, bool, list, type(None)))}
    return {"version": 1, "method": args.method, "options": args.options, "config": plain}


def fit_one(method, group, args, device, label, resumed, save):
    """calibrate, prepare, train, fit. -> (throughput, curve)"""
    paths = [item.path for category in group for item in category.train]
    method.calibrate(sample_images(paths, args, device))
    start = time.perf_counter()
    prepared = Prepared(method, paths[RANK::WORLD], args, device, f"{label} prepare")
    prepare_rate = len(paths) / (time.perf_counter() - start)
    curve, cached = [], None
    if args.eval_every:
        cached = {c.name: Prepared(method, [i.path for i in c.test[RANK::WORLD]], args, device, f"{c.name} prepare")
                  for c in group}  # fmt: skip

    def observe(step, stage, loss):
        if args.eval_every and step % args.eval_every == 0:
            record = {"step": step, "stage": stage, "loss": loss.item()}
            mean = mean_row(evaluate(method, group, args, device, cached)[0])
            record |= {name: mean[name] for name in ("image_auroc", "pixel_auroc")}
            if args.copy_ratio:
                record["copy_ratio"] = copy_ratio(method, group, args, device)
            say("  " + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in record.items()))
            curve.append(record)

    speed = train(method, prepared, args, device, label, resumed, save, observe)
    method.fit(prepared.batches)
    return {"prepare_images_per_s": prepare_rate, "train_images_per_s": speed}, curve


def main(argv=None):
    """Runs the program; every error a user can cause ends in one sentence and exit code 2."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    if WORLD > 1:
        dist.init_process_group("nccl" if pick_device(args.device).type == "cuda" else "gloo")
    try:
        if args.method is None and args.data is None and not args.load:
            demo(argv)
        else:
            args.method = args.method or "uniad"
            run(args)
    except (UserError, data.DataError, models.WeightsError) as error:
        print(f"uad.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: the same command with --resume goes on from the last save", file=sys.stderr)
        return 130
    return 0


def demo(argv):
    """The whole point in one table: on the same synthetic parts an MLP copies the defects and UniAD does not."""
    rows = []
    for method in ("mlp", "uniad"):
        results = run(parse([*argv, "--method", method, "--copy-ratio"]))
        rows.append(f"{method:<8}{results['copy_ratio'][0]:>11.3f}" + "".join(
            f"{100 * results['mean'][metric]:>15.1f}" for metric in ("image_auroc", "pixel_auroc")))  # fmt: skip
    say("\nmethod   copy ratio    image AUROC    pixel AUROC", *rows, sep="\n")


if __name__ == "__main__":
    sys.exit(main())
