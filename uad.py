"""Train on images of good parts only; say per image and per pixel what is wrong with a new one.

    python uad.py                                        the demo: an MLP copies defects, UniAD does not
    python uad.py --method uniad --data ./mvtec          one model for all categories found, judged at the final epoch
    python uad.py --load runs/uniad-mvtec/checkpoint.pt --predict photo.png           score, verdict, overlay
    python uad.py --load runs/uniad-mvtec/checkpoint.pt [--data ./mvtec]              evaluate again
    python uad.py --compare runs/*                       one table of several runs

The way of an image: folder -> data.py -> prepare (frozen, once, cached) -> loss ... -> anomaly map -> metrics.py ->
table, results.json, panels. This file knows nothing of a method but the contract in models.py.
"""

import argparse
import contextlib
import copy
import csv
import dataclasses
import hashlib
import inspect
import itertools
import json
import math
import os
import resource
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn

import baselines
import data
import figures
import metrics
import models
from published import published

METHODS = models.METHODS | baselines.METHODS


class UserError(Exception):
    """What the user can mend: one sentence that names the file or option and the way out. Exit code 2."""


# ---------------------------------------------------------------------------------------------------------------------
# Options. Their defaults come from the method's recipe, so -h shows the numbers that will be used.


METHOD_OPTIONS = {  # constructor arguments of the methods, by name
    "backbone": dict(choices=sorted(models.STAGES), help="frozen features"),
    "weights": dict(metavar="FILE", help="'default', 'none' (random, for tests) or a local state dict"),
    "standardise": dict(action=argparse.BooleanOptionalAction, help="bring feature channels to mean 0 and std 1"),
    "resize": dict(choices=["average", "bilinear"], help="how feature levels come to one grid"),
    "alpha": dict(type=float, help="strength of the feature jitter"),
    "query": dict(action=argparse.BooleanOptionalAction, help="learned query in every decoder layer"),
    "mask": dict(action=argparse.BooleanOptionalAction, help="neighbour mask in attention"),
    "jitter": dict(action=argparse.BooleanOptionalAction, help="feature jitter"),
    "dropout": dict(type=float, help="dropout rate"),
    "strides": dict(type=int, nargs="+", choices=[4, 8, 16], help="feature levels of rlr"),
    "width": dict(type=int, help="channels of the transformer, or of the narrowest level of a trained network"),
    "layers": dict(type=int, help="transformer layers; uniad has as many again in its decoder"),
    "heads": dict(type=int, help="attention heads"),
    "hidden": dict(type=int, help="width of the feed-forward networks"),
    "window": dict(type=int, help="side of the neighbour mask in tokens"),
    "saliency": dict(choices=["dino", "spectral"], help="what finds the region to mask"),
    "masking": dict(choices=["saliency", "mosaic", "none"], help="which part of the image is behind the mosaic"),
    "mosaic": dict(metavar="M", help="block side in pixels at 256x256, or auto: chosen from normal images"),
    "dims": dict(type=int, help="feature channels of padim; 0: by the backbone"),
    "fields": dict(type=int, nargs="+", choices=[17, 33, 65], help="patch sizes of us"),
    "students": dict(type=int, help="students of each patch size of us"),
    "embedding": dict(type=int, help="channels of a patch of psvdd"),
    "pairs": dict(type=int, help="pairs of patches of each size that psvdd draws from an image"),
    "weight": dict(type=float, help="of the second term of the loss of psvdd and mkd"),
    "memory": dict(type=int, help="normal patches that psvdd compares with"),
    "textures": dict(metavar="FOLDER", help="images that draem pastes in; without it: generated textures"),
    "lamp": dict(action=argparse.BooleanOptionalAction, help="loss amplification: -ln(1 - e) in place of an error e"),
    "attenuate": dict(type=int, nargs="*", choices=[0, 1, 2], help="skips with an attenuator, 0 = shallow"),
    "ear": dict(metavar="CHECKPOINT", help="of an ear run of one model: fader trains its attenuators alone"),
    "target": dict(choices=["error", "restore"], help="what the attenuators learn from"),
    "per_channel": dict(action=argparse.BooleanOptionalAction, help="one attenuation a channel, not one a place"),
    "shallow_off": dict(action=argparse.BooleanOptionalAction, help="the control: no attenuator, shallow skip off"),
}
REFUSALS = {"lamp": "it has no reconstruction error bounded to [0,1), which loss amplification needs"}


class Parser(argparse.ArgumentParser):
    """One sentence instead of argparse's usage, which is a screenful here."""

    def error(self, message):
        self.exit(2, f"uad.py: error: {message} (see -h)\n")


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
    first = Parser(add_help=False)
    first.add_argument("--method", choices=METHODS)
    first.add_argument("--recipe", choices=["default", "paper"], default="default")
    first.add_argument("--data")
    first.add_argument("--load")
    known, _ = first.parse_known_args(argv)
    loaded = read_checkpoint(known.load, known.method) if known.load else None
    name = loaded["method"] if loaded else known.method or "uniad"
    cls = METHODS[name]
    recipe = cls.recipe if known.recipe == "default" else cls.paper_recipe
    if recipe is None:
        first.error(f"argument --recipe: {name} has no 'paper' recipe; leave the option out.")
    demo = {"backbone": "efficientnet_lite2", **recipe.demo} if known.data is None else {}
    setting = {**vars(recipe), **demo, **(loaded["config"] if loaded else {})}
    accepted = method_defaults(cls)
    options = {**accepted, **recipe.options, **demo, **(loaded["options"] if loaded else {})}
    options = {k: v for k, v in options.items() if k in accepted}

    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_program_options(p)
    whose = "its demo; with --data FOLDER they are those of real data" if demo else f"the {known.recipe} recipe"
    group = p.add_argument_group("training", f"defaults of {name}: {whose}")
    group.add_argument("--recipe", choices=["default", "paper"], default="default", help="default: %(default)s")
    for field in dataclasses.fields(models.Recipe):
        if field.name not in ("options", "demo"):
            group.add_argument("--" + field.name.replace("_", "-"), type=type(setting[field.name]),
                               help="default: %(default)s", default=setting[field.name],
                               choices=CHOICES.get(field.name))  # fmt: skip
    group = p.add_argument_group("the method")
    for option, how in METHOD_OPTIONS.items():
        note = f"; default: {options[option]}" if option in options else f"; not used by {name}"
        group.add_argument("--" + option.replace("_", "-"), **{**how, "default": None, "help": how["help"] + note})
    args = p.parse_args(argv)

    for option in METHOD_OPTIONS:
        value = vars(args).pop(option)
        if value is not None and option not in accepted:
            p.error(
                f"argument --{option.replace('_', '-')}: does not apply to {name}: "
                f"{REFUSALS.get(option, 'it has no such part')}."
            )
        options |= {option: value} if value is not None else {}
    for field, fits, words in (
        *((name, getattr(args, name) >= 1, "at least 1") for name in ("epochs", "batch_size", "workers", "seeds")),
        ("seed", 0 <= args.seed < 2**63, "at least 0 and below 2^63"),
        ("size", args.size >= 32, "at least 32"), ("lr", 0 < args.lr < math.inf, "above 0"),
        ("beta2", 0 <= args.beta2 < 1, "at least 0 and below 1"),
        ("weight_decay", 0 <= args.weight_decay < math.inf, "at least 0"), ("clip", args.clip >= 0, "at least 0"),
        ("eval_every", args.eval_every >= 0, "at least 0"),
        *((name, options[name] >= 1, "at least 1") for name, how in METHOD_OPTIONS.items()
          if how.get("type") is int and "nargs" not in how and name in options and name != "dims"),
        ("width", options.get("width", 4) >= 4, "at least 4"), ("dims", options.get("dims", 0) >= 0, "at least 0"),
        ("dropout", 0 <= options.get("dropout", 0) < 1, "at least 0 and below 1"),
        ("alpha", options.get("alpha", 0) >= 0, "at least 0"),
    ):  # fmt: skip
        if not fits:
            p.error(f"argument --{field.replace('_', '-')}: must be {words}.")
    if not 0 <= args.holdout < 1 or not 0 < args.quantile <= 1:
        p.error("argument --holdout/--quantile: both are shares between 0 and 1.")
    if args.seeds > 1 and (args.ablate or known.method is None and args.data is None):
        p.error("argument --seeds: several runs of one method: name it with --method.")
    if args.ablate and name != "uniad":
        p.error(f"argument --ablate: takes the remedies out of uniad, not of {name}: leave --method out.")
    args.options = options | ({"size": args.size} if "size" in options else {})
    args.loaded, args.method = loaded, args.method or (loaded and name)
    if loaded:
        if args.size != loaded["config"]["size"]:
            p.error(f"argument --size: {args.load} was trained at {loaded['config']['size']}: leave the option out.")
        args.separate, args.data = loaded["config"]["separate"], args.data or loaded["config"]["data"]
        args.categories = args.categories or loaded["config"]["categories"]
    return args


CHOICES = {"optimiser": ["adamw", "adam", "sgd", "muon"], "schedule": ["one-cycle", "cosine", "step", "constant"]}


def add_program_options(p):
    """What is not the method's: input, output, machine."""
    p.add_argument("--method", choices=METHODS, help="what to train; without it the demo compares mlp and uniad")
    p.add_argument(
        "--data", metavar="FOLDER", help="MVTec AD or VisA layout, or one category; without it: synthetic data"
    )
    p.add_argument("--categories", nargs="+", metavar="NAME", help="only these")
    p.add_argument("--separate", action="store_true", help="one model per category; default: one for all")
    p.add_argument("--out", metavar="FOLDER", help="default: runs/METHOD-DATA")
    p.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    p.add_argument("--seeds", type=int, default=1, metavar="N", help="N runs from --seed on: mean and deviation")
    p.add_argument("--ablate", action="store_true", help="UniAD without its query, mask, jitter and all: one table")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 …; default: %(default)s")
    p.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto",
                   help="auto: bf16 where the processor multiplies it natively")  # fmt: skip
    p.add_argument(
        "--compile", action="store_true", help="torch.compile the training step (a CPU needs a C++ compiler)"
    )
    p.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="decoding threads; default: %(default)s"
    )
    p.add_argument("--cache", metavar="FOLDER", help="keep the frozen part on disk, for later runs; default: in RAM")
    p.add_argument("--save-every", type=float, default=60, metavar="SECONDS", help="for --resume; default: %(default)s")
    p.add_argument("--resume", action="store_true", help="continue an interrupted run in --out to the same numbers")
    p.add_argument("--eval-every", type=int, default=0, metavar="STEPS", help="evaluate during training too: curve.png")
    p.add_argument("--copy-ratio", action="store_true", help="measure the copy ratio on data with clean twins")
    p.add_argument(
        "--panels", action=argparse.BooleanOptionalAction, default=True, help="pictures of test images in --out"
    )
    p.add_argument("--decode", action="store_true",
                   help="show features in the panels as pictures, by a decoder trained on normal images")  # fmt: skip
    p.add_argument("--holdout", type=float, default=0.0, metavar="SHARE",
                   help="of the training images, kept out to set the threshold; default: none")  # fmt: skip
    p.add_argument("--quantile", type=float, default=0.99, metavar="Q",
                   help="the threshold: this quantile of normal image scores; default: %(default)s")  # fmt: skip
    p.add_argument("--load", metavar="CHECKPOINT", help="use this checkpoint instead of training")
    p.add_argument(
        "--predict", metavar="IMAGE_OR_FOLDER", help="with --load: score, verdict, overlay and a CSV line each"
    )
    p.add_argument("--export", metavar="FILE.pt2", help="with --load: torch.export, images in, maps and scores out")
    p.add_argument(
        "--compare", nargs="+", metavar="RUN", help="one table and one picture of the results in these folders"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Processes, devices, progress


RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun


def say(*words, sep=" "):
    """Prints, in the first process alone."""
    if RANK == 0:
        print(*words, sep=sep, flush=True)


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
    """autocast for training and frozen networks: matrix products and convolutions in bfloat16, the rest in float32."""
    native = torch.cuda.is_bf16_supported() if device.type == "cuda" else (
        torch.cpu.get_capabilities().get("avx512_bf16") or torch.cpu.get_capabilities().get("amx_bf16"))  # fmt: skip
    return torch.autocast(
        device.type, torch.bfloat16, enabled=bool(args.precision == "bf16" or args.precision == "auto" and native)
    )


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
        print(
            f"\r{line:<100}" if terminal else line, end="\n" if done == self.total or not terminal else "", flush=True
        )


# ---------------------------------------------------------------------------------------------------------------------
# The frozen part, once per image


CHUNK = 16  # images prepared or tested at a time


def as_batch(images, device):
    """List of (S,S,3) uint8 -> (B,3,S,S) in [0,1] on the device."""
    return torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2).float() / 255


def frozen(method, paths, args, device):
    """Decodes, resizes and prepares image files; yields tuples of tensors (b,...) on the device.

    Rounded to half precision, so that cached and streamed images give the same numbers.
    """
    images = data.load_images(paths, args.size, args.workers)
    while chunk := list(itertools.islice(images, CHUNK)):
        batch = as_batch(chunk, device)
        with torch.no_grad(), precision(args, device):
            parts = tuple(part.half().float() for part in method.prepare(batch))
        yield parts  # outside: a generator that waits inside a context would switch it off and on for its reader


def free_memory():
    """Bytes of RAM that can be had; infinity where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return math.inf


def hash_state(key, method, prefixes):
    """Adds to a hash the tensors of the state dict whose names begin with a prefix, or one of a tuple."""
    for name, tensor in sorted(method.state_dict().items()):
        if name.startswith(prefixes):
            key.update(tensor.cpu().contiguous().numpy().tobytes())


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
        hash_state(key, method, ("backbone.", "frozen_"))
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
        if folder and total > (free := shutil.disk_usage(folder).free):  # a memory map on a full disk kills the process
            raise UserError(f"The cache needs {total / 2**30:.1f} GiB and --cache {folder.parent} has "
                            f"{free / 2**30:.1f} free: name another folder.")  # fmt: skip
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


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose step is turned into the nearest orthogonal matrix (Jordan et al., 2024): every direction
    of a weight matrix moves equally far, so that a fraction of the steps suffices. For parameters of shape (out,in).

    As torch.optim.Muon with adjust_lr_fn="match_rms_adamw": the same rate serves AdamW. That one multiplies in bfloat16
    wherever it runs, which on a processor without it takes 16 times the rest of a step; here `autocast` decides, and
    matrices of one shape go through one batched product.
    """

    def __init__(self, parameters, lr, weight_decay, momentum=0.95):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            for shape in {p.shape for p in group["params"]}:
                same = [p for p in group["params"] if p.shape == shape and p.grad is not None]
                ahead = []
                for p in same:
                    mean = self.state[p].setdefault("mean", torch.zeros_like(p)).lerp_(p.grad, 1 - momentum)
                    ahead.append(p.grad.lerp(mean, momentum))
                for p, direction in zip(same, orthogonal(torch.stack(ahead))):
                    p.mul_(1 - rate * group["weight_decay"])
                    p.add_(direction, alpha=-rate * 0.2 * max(shape) ** 0.5)  # entries as large as AdamW's


def orthogonal(x):
    """(N,a,b) -> (N,a,b): all singular values brought near 1 by five steps of a quintic Newton-Schulz iteration."""
    if x.shape[1] > x.shape[2]:
        return orthogonal(x.mT).mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(5):  # p(s) = 3.4445 s - 4.775 s^3 + 2.0315 s^5, the published coefficients
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return x


def optimisers_of(args, method, parameters):
    """-> list of one optimiser, or with "muon" of two under one rate: Muon for the matrices of linear layers and AdamW
    for the rest. Raises UserError where there is no such matrix.
    """
    linear = {id(m.weight) for m in method.modules() if isinstance(m, nn.Linear)} if args.optimiser == "muon" else set()
    matrices = [p for p in parameters if id(p) in linear]
    rest = [p for p in parameters if id(p) not in linear]
    if args.optimiser == "muon" and not matrices:
        raise UserError(f"--optimiser muon is for linear layers, and {args.method} has none: use adamw.")
    fused = dict(lr=args.lr, weight_decay=args.weight_decay, fused=True)  # one kernel for all parameters, also on a CPU
    if args.optimiser == "sgd":
        return [torch.optim.SGD(rest, momentum=0.9, **fused)]
    adam = torch.optim.Adam if args.optimiser == "adam" else torch.optim.AdamW
    muon = [Muon(matrices, args.lr, args.weight_decay)] if matrices else []
    return muon + [adam(rest, betas=(0.9, args.beta2), **fused)]


def rate(schedule, progress):
    """Factor of the learning rate at `progress` in [0,1)."""
    if schedule == "one-cycle":  # 30 % linear warm-up, then half a cosine to 0; post-norm layers need the long warm-up
        return progress / 0.3 + 0.01 if progress < 0.3 else (1 + math.cos(math.pi * (progress - 0.3) / 0.7)) / 2
    if schedule == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    return 0.1 if schedule == "step" and progress >= 0.8 else 1.0


def random_state(device, state=None):
    """Gets or sets the generators' state, which a resumed run needs to give the same numbers."""
    if state is not None:
        torch.set_rng_state(state[0])
        if device.type == "cuda" and len(state) > 1:  # the run may have begun on a CPU
            torch.cuda.set_rng_state(state[1], device)
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def estimate(method, images, args, device, count):
    """Says within the first minute how long the run will take: two trial steps of a copy, on a few images."""
    trial, few = copy.deepcopy(method), images[: min(args.batch_size, 4)]

    def now():
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    with torch.random.fork_rng(), torch.no_grad():
        start = now()
        parts = trial.prepare(few)
        seconds = (now() - start) / len(few) * count
        for stage, parameters in trial.stages():
            optimisers = optimisers_of(args, trial, parameters)
            for _ in range(2):  # the first one warms up
                start = now()
                with precision(args, device), torch.enable_grad():
                    trial.train().loss(tuple(part.float() for part in parts), stage).backward()
                there = now()
                with precision(args, device):
                    for optimiser in optimisers:
                        optimiser.step()
                an_image, a_step = (there - start) / len(few), now() - there
            seconds += count * args.epochs * (an_image + a_step / args.batch_size)
    hint = ""
    if seconds > 3600 and device.type == "cpu":
        shrink = [f"--{n} (now {getattr(args, n, args.options.get(n))})" for n in ("epochs", "size", "width")
                  if n in args.options or n in vars(args)]  # fmt: skip
        hint = f": a long time for a CPU; what shrinks it: {', '.join(shrink)}, or a GPU"
    say(
        f"this will take about {seconds / 60:.0f} min{hint}"
        if seconds > 90
        else f"this will take about {seconds:.0f} s"
    )


def train(method, prepared, args, device, label, resumed, save, observe):
    """Runs every stage to its last step. -> images per second of all processes, evaluation and saving left out.

    resumed: what `save` was given before an interruption, or none. save(state) is called every args.save_every seconds,
    observe(step, stage, loss, last of the stage?) after each step. Raises UserError when the loss stops being finite.
    """
    spent = trained = 0
    for number, (stage, parameters) in enumerate(method.stages()):
        if resumed and number < resumed["stage"]:
            continue
        for p in method.parameters():
            p.requires_grad_(False)
        for p in parameters:
            p.requires_grad_(True)
        step, optimisers = Step(method), optimisers_of(args, method, parameters)
        step = nn.parallel.DistributedDataParallel(step) if WORLD > 1 else step
        step = torch.compile(step) if args.compile else step
        method.train()
        first, mean = 0, None
        if resumed:
            restore(method, resumed["state"])
            for optimiser, state in zip(optimisers, resumed["optimisers"]):
                optimiser.load_state_dict(state)
            random_state(device, resumed["random"])
            first, mean, resumed = resumed["step"], torch.tensor(resumed["loss"], device=device), None
        if RANK:  # noise of its own in every process; the first one's is what a single process draws
            torch.manual_seed(args.seed + RANK + first)

        count = fewest(len(prepared), device)
        size, per_epoch = min(args.batch_size, count), max(1, count // args.batch_size)
        total = args.epochs * per_epoch
        progress, saved = Progress(f"{label} {stage}", total), time.perf_counter()
        for k in range(first, total):
            start = time.perf_counter()
            epoch, at = divmod(k, per_epoch)
            if at == 0 or k == first:  # from a generator of its own, so that a resumed run sees the same order
                order = shuffled(len(prepared), args.seed, number, epoch, RANK)
            for group in itertools.chain(*(optimiser.param_groups for optimiser in optimisers)):
                group["lr"] = args.lr * rate(args.schedule, k / total)
            with precision(args, device):
                loss = step(prepared.batch(order[at * size : (at + 1) * size]), stage)
            for optimiser in optimisers:
                optimiser.zero_grad()
            loss.backward()
            if args.clip:
                nn.utils.clip_grad_norm_(parameters, args.clip)
            with precision(args, device):  # Muon multiplies matrices
                for optimiser in optimisers:
                    optimiser.step()
            mean = loss.detach() if mean is None else torch.lerp(mean, loss.detach(), max(0.02, 1 / (k + 1)))
            if k % 20 == 19 or k + 1 == total:  # reading the loss waits for a GPU: not at every step
                if not torch.isfinite(mean):
                    raise UserError(
                        f"The loss became {mean.item()} at step {k} of {stage}: lower --lr (now {args.lr})."
                    )
                progress.update(k + 1, f"  loss {mean.item():.4f}")
            spent, trained = spent + time.perf_counter() - start, trained + size
            observe(number * total + k + 1, stage, mean, k + 1 == total)
            if time.perf_counter() - saved > args.save_every and k + 1 < total and RANK == 0:
                save({"stage": number, "step": k + 1, "state": trained_state(method), "loss": mean.item(),
                      "random": random_state(device), "optimisers": [o.state_dict() for o in optimisers]})  # fmt: skip
                saved = time.perf_counter()
    return WORLD * trained / spent if spent else None


def fewest(count, device):
    """The smallest count of all processes: they must take the same number of steps, or some wait for ever."""
    if WORLD > 1:
        counts = torch.tensor(count, device=device)
        dist.all_reduce(counts, dist.ReduceOp.MIN)
        count = counts.item()
    return count


def shuffled(count, *seeds):
    """A permutation that depends on nothing but these numbers."""
    return torch.from_numpy(np.random.default_rng(seeds).permutation(count))


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
    """-> ({category: row of results.json}, images per second, {category: image scores}).

    cached: {category: Prepared}; without it the images are streamed, and only the maps of one category are held.
    """
    method.eval()
    rows, scored, start, count = {}, {}, time.perf_counter(), 0
    for category in categories:
        mine = list(range(RANK, len(category.test), WORLD))
        paths = [category.test[i].path for i in mine]
        source = cached[category.name].batches() if cached else frozen(method, paths, args, device)
        scores, maps = [], []
        for parts in source:
            batch_maps = method.anomaly_map(parts).float()
            scores.extend(method.image_score(batch_maps).tolist())
            maps.extend(batch_maps.cpu().numpy())
        scores, maps = np.array(gather(list(zip(mine, scores)))), gather(list(zip(mine, maps)))
        if not np.isfinite(scores).all():
            raise UserError(
                f"The scores of {category.name} are not finite: training diverged; lower --lr (now {args.lr})."
            )
        rows[category.name] = category_row(category, scores, maps, args.size)
        scored[category.name] = scores.tolist()
        count += len(category.test)
    return rows, count / (time.perf_counter() - start), scored


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


def twins(method, categories, args, device):
    """Prepared (without, with defect, where it is) of all defective test images that have a clean twin."""
    items = [item for c in categories for item in c.test if item.twin and item.masks]
    clean = frozen(method, [item.twin for item in items], args, device)
    defective = frozen(method, [item.path for item in items], args, device)
    for at, (a, b) in enumerate(zip(clean, defective)):
        masks = np.stack([data.read_mask(item, args.size) for item in items[at * CHUNK : (at + 1) * CHUNK]])
        yield a, b, torch.from_numpy(masks).to(device)


@torch.no_grad()
def copy_ratio(method, pairs):
    """The copy ratio over all of `twins`, mean of a method's levels; None where there are none."""
    method.eval()
    sums = []
    for *prepared, masks in pairs:
        clean, defective = (method.reconstruction(parts) for parts in prepared)
        sums.append(models.copy_ratio(clean, defective, masks))
    if not sums or not sums[0]:
        return None
    copied, changed = np.array(sums).sum(0).T  # one of each a level
    return float((copied / changed).mean())


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


def writable(out):
    """Makes the folder and tries it, before any work is done for it. Raises UserError."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / f".try{RANK}").touch()
        (out / f".try{RANK}").unlink()
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror}): name another folder.") from None


def without_nan(value):
    """NaN -> None all the way down, since JSON has no NaN."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value


HEADS = ["I-AUROC", "I-AP", "I-F1max", "P-AUROC", "P-AP", "P-F1max", "AUPRO"]


def table(rows, mean):
    """The seven metrics in percent, one category a line."""
    percent = lambda row: [
        None if row[m] is None or math.isnan(row[m]) else f"{100 * row[m]:.1f}" for m in metrics.NAMES
    ]
    return figures.text_table(
        ["category", *HEADS], [[name, *percent(row)] for name, row in [*rows.items(), ("mean", mean)]]
    )


def peak_memory(device):
    """Bytes: of the GPU where one is used, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# ---------------------------------------------------------------------------------------------------------------------
# The program


def restore(method, state):
    """Loads what `trained_state` gave. Buffers may differ in shape from a new method's: `fit` grows them."""
    own = {k for k in method.state_dict() if not k.startswith("backbone.")}
    if own != set(state):
        raise UserError(
            f"The checkpoint does not fit this method: it lacks or has too much of {sorted(own ^ set(state))[:3]}."
        )
    for name, value in state.items():
        owner, leaf = method.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        if leaf in owner._buffers:
            owner._buffers[leaf] = value.to(owner._buffers[leaf].device)
        elif getattr(owner, leaf).shape != value.shape:
            raise UserError(f"The checkpoint's {name} has another shape: give the options it was trained with.")
        else:
            getattr(owner, leaf).data.copy_(value)


VERSION = 3  # of the checkpoint's content


def read_checkpoint(path, method=None):
    """A checkpoint's content. Raises UserError when it cannot be read or belongs to another method."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        content["version"], content["models"], content["options"], content["config"]  # a state dict of something else?
    except FileNotFoundError:
        raise UserError(f"--load {path} does not exist: name a checkpoint.pt that a run has written.") from None
    except Exception as error:
        raise UserError(f"{path} is not a checkpoint of this program ({type(error).__name__}): train again.") from None
    if content["version"] != VERSION:
        raise UserError(f"{path} is of version {content['version']}, this program reads {VERSION}: train again.")
    if method and content["method"] != method:
        raise UserError(f"{path} is a checkpoint of {content['method']}, not of {method}: leave --method out.")
    return content


# ---------------------------------------------------------------------------------------------------------------------
# One run: train or load, evaluate, report


def build(args, device):
    torch.manual_seed(args.seed)  # weights first: the same initial network whatever has run before in this process
    return METHODS[args.method](**args.options).to(device)


def checksum(method):
    """Of the frozen backbone: a checkpoint does not hold it, so it must be the same one again."""
    key = hashlib.sha256()
    hash_state(key, method, "backbone.")
    return key.hexdigest()[:16]


def reload(args, device, entry):
    """The method of one entry of a checkpoint, ready to evaluate."""
    method = build(args, device)
    if checksum(method) != entry["backbone"]:
        raise UserError("The frozen backbone is not the one of the checkpoint: give the same --backbone and --weights.")
    restore(method, entry["state"])
    return method.eval()


def sample_images(paths, args, device, count=256):
    """A fixed random sample of normal training images for `calibrate`, the same for every --seed."""
    order = np.random.default_rng(0).permutation(len(paths))[:count]
    images = data.load_images([paths[i] for i in sorted(order)], args.size, args.workers)
    return as_batch(list(images), device)


def fit_one(method, group, args, device, label, resumed, save):
    """calibrate, prepare, train, fit, threshold. -> (entry of the checkpoint, throughput)"""
    items = [item for category in group for item in category.train]
    paths = [item.path for item in items]
    order = np.random.default_rng(args.seed).permutation(len(paths))
    held = {int(i) for i in order[: min(round(args.holdout * len(paths)), len(paths) - 1)]}
    normal = [items[i] for i in (sorted(held) or sorted(order[:256].tolist()))]
    paths = [path for i, path in enumerate(paths) if i not in held]
    sample = sample_images(paths, args, device)
    with torch.no_grad(), precision(args, device):
        method.calibrate(sample)
    estimate(method, sample, args, device, -(-len(paths) // WORLD))

    def fit():
        """Every process sees all images here; a method without training never holds more than a few of them."""
        method.eval()
        with torch.no_grad():
            method.fit(prepared.batches if prepared and WORLD == 1 else lambda: frozen(method, paths, args, device))

    curve = resumed["curve"] if resumed else []
    start, speed, prepared = time.perf_counter(), {}, None
    if method.stages():
        prepared = Prepared(method, paths[RANK::WORLD], args, device, f"{label} prepare")
        speed["prepare_s"] = time.perf_counter() - start
        speed["prepare_images_per_s"] = len(paths) / speed["prepare_s"]
        observe, start = Observer(method, group, args, device, fit, curve), time.perf_counter()
        save_all = lambda current: save(current | {"curve": curve})
        speed["train_images_per_s"] = train(method, prepared, args, device, label, resumed, save_all, observe)
        speed["train_s"] = time.perf_counter() - start
    fit()
    entry = {"name": label, "state": trained_state(method), "backbone": checksum(method), "held_out": bool(held)}
    return entry | normal_range(method, normal, args, device) | {"curve": curve}, speed


class Observer:
    """Evaluates every args.eval_every steps and at the end of a stage: loss, AUROC and copy ratio, the curve.

    A diagnostic only: results are those of the final epoch, whatever the curve's peak.
    """

    def __init__(self, method, group, args, device, fit, curve):
        self.method, self.group, self.args, self.device = method, group, args, device
        self.fit, self.curve = fit, curve
        self.twins = list(twins(method, group, args, device)) if args.eval_every and args.copy_ratio else []
        self.cached = args.eval_every and {
            c.name: Prepared(method, [i.path for i in c.test[RANK::WORLD]], args, device, f"{c.name} prepare")
            for c in group if len(c.test) > RANK
        }  # fmt: skip

    def __call__(self, step, stage, loss, last):
        if not self.args.eval_every or step % self.args.eval_every and not last:
            return
        self.fit()
        rows, _, _ = evaluate(self.method, self.group, self.args, self.device, self.cached)
        record = {"step": step, "stage": stage, "loss": loss.item()}
        record |= {name: mean_row(rows)[name] for name in ("image_auroc", "pixel_auroc")}
        if self.args.copy_ratio:
            record["copy_ratio"] = copy_ratio(self.method, self.twins)
        say("  " + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in record.items()))
        self.curve.append(record)
        self.method.train()  # here, not at every step of training: that would walk through 400 frozen modules each time


@torch.no_grad()
def normal_range(method, items, args, device):
    """Threshold of the image score, and the colour scale low to high of overlays, both from normal images alone.

    One model may score one part ten times as high as another: under "of", each category has its own.
    """
    scores, maps = [], []
    for parts in frozen(method, [item.path for item in items], args, device):
        batch = method.anomaly_map(parts).float()
        scores.append(method.image_score(batch).cpu().numpy())
        maps.append(batch.flatten(1)[:, ::7].cpu().numpy())  # every seventh pixel tells the distribution as well
    scores, maps, names = np.concatenate(scores), np.concatenate(maps), np.array([item.category for item in items])

    def limits(chosen):
        low, top = float(np.quantile(maps[chosen], 0.99)), float(maps[chosen].max())
        threshold = float(np.quantile(scores[chosen], args.quantile, method="higher"))
        return {"threshold": threshold, "low": low, "high": max(2 * top - low, low + 1e-6)}

    return limits(slice(None)) | {"of": {name: limits(names == name) for name in np.unique(names).tolist()}}


def default_out(args):
    """Where a run goes without --out: runs/METHOD-DATA."""
    name = Path(args.data or "synthetic").resolve().name
    return f"runs/{args.method}-{name}{'-separate' if args.separate else ''}"


def find_data(args):
    """-> (root, categories): of --data, or of synthetic data written to ./synthetic. Says what is odd about them."""
    root = args.data or "synthetic"
    if args.data is None:
        say("no --data: synthetic data in ./synthetic")
        if RANK == 0:
            data.write_synthetic(root)
        if WORLD > 1:
            dist.barrier()
    categories = data.find_categories(root, args.categories)
    for category in categories:
        for note in category.notes:
            say(f"note: {note}")
    return root, categories


def run(args):
    """Trains or loads, evaluates, reports. -> the content of results.json."""
    start, device = time.perf_counter(), pick_device(args.device)
    root, categories = find_data(args)
    out = Path(args.out or (Path(args.load).parent / "evaluation" if args.load else default_out(args)))
    writable(out)
    config = {k: v for k, v in vars(args).items() if k not in ("options", "loaded")} | args.options
    say("\n".join(f"  {k} = {v}" for k, v in sorted(config.items()) if v is not None))

    groups = {c.name: [c] for c in categories} if args.separate else {"all": categories}
    unfinished = resume_from(out / "unfinished.pt", args) if args.resume else {"models": [], "current": None}
    entries = list(args.loaded["models"] if args.load else unfinished["models"])
    rows, speeds, ratios = {}, [], []
    for label, group in groups.items():
        entry, speed = next((e for e in entries if e["name"] == label), None), {}
        if entry:
            method = reload(args, device, entry)
        elif args.load:
            raise UserError(f"{args.load} has no model for {label!r}: it has {', '.join(e['name'] for e in entries)}.")
        else:
            method = build(args, device)
            save = lambda current: write(
                out / "unfinished.pt", {**identity(args), "models": entries, "current": current}
            )
            entry, speed = fit_one(method, group, args, device, label, unfinished["current"], save)
            unfinished["current"] = None
            entries.append(entry)
            if RANK == 0:
                save(None)  # a test image that cannot be read must not cost the training
        found, speed["test_images_per_s"], scored = evaluate(method, group, args, device)
        rows.update(found)
        speeds.append(speed | {"test_s": sum(len(c.test) for c in group) / speed["test_images_per_s"]})
        ratios += [copy_ratio(method, twins(method, group, args, device))] if args.copy_ratio else []
        if args.panels and RANK == 0:
            decoder = fit_decoder(method, group, args, device) if args.decode else None
            for category in group:
                ranges = entry | entry["of"].get(category.name, {})
                panels(method, category, scored[category.name], ranges, args, device, out, decoder)

    results = summary(rows, speeds, config, time.perf_counter() - start, device)
    curves = {} if args.load else {entry["name"]: without_nan(entry["curve"]) for entry in entries}
    results |= {"data": str(root), "copy_ratio": without_nan(ratios), "curve": curves}
    if RANK == 0:
        report(results, entries, args, out)
    return results


def summary(rows, speeds, config, seconds, device):
    """The content of results.json, less what only `run` knows. Metrics are fractions; an undefined one is None."""
    keys = ("prepare_images_per_s", "train_images_per_s", "test_images_per_s")
    return without_nan({
        "method": config["method"], "data": None, "backbone": config.get("backbone"),
        "unified": not config["separate"], "seed": config["seed"], "config": config,
        "categories": rows, "mean": mean_row(rows),
        "throughput": {k: float(np.mean([s[k] for s in speeds if s.get(k)] or [math.nan])) for k in keys},
        "phases": {k: sum(s.get(f"{k}_s", 0) for s in speeds) for k in ("prepare", "train", "test")},
        "peak_memory_bytes": peak_memory(device), "seconds": seconds, "device": machine(device),
    })  # fmt: skip


def report(results, entries, args, out):
    """The table with its footer, results.json, checkpoint.pt, curve.png."""
    say(table(results["categories"], results["mean"]))
    for ratio in results["copy_ratio"]:
        say(f"copy ratio (1 = defects copied, 0 = restored): {'-' if ratio is None else f'{ratio:.3f}'}")
    write(out / "results.json", json.dumps(results, indent=1))
    if not args.load:
        write(out / "checkpoint.pt", {**identity(args), "models": entries})
        (out / "unfinished.pt").unlink(missing_ok=True)
    for label, curve in results["curve"].items():
        if curve:
            draw_curve(
                curve, f"{args.method}, {label}", out / ("curve.png" if label == "all" else f"curve-{label}.png")
            )
    speed = ", ".join(f"{k.split('_')[0]} {v:.0f}" for k, v in results["throughput"].items() if v)
    phases = ", ".join(f"{k} {v:.0f} s" for k, v in results["phases"].items() if v)
    say(f"{results['seconds']:.0f} s in all ({phases}); images per second: {speed}; peak memory "
        f"{results['peak_memory_bytes'] / 2**30:.1f} GiB; {results['device']}; wrote {out}/")  # fmt: skip


def draw_curve(curve, title, path):
    """curve.png, and the drop from the peak in words."""
    x, series = [record["step"] for record in curve], []
    for key, axis in (("loss", "left"), ("image_auroc", "right"), ("pixel_auroc", "right"), ("copy_ratio", "right")):
        if key in curve[0]:
            y = [record[key] for record in curve]
            series.append({"name": key.replace("_", " "), "x": x, "y": y, "axis": axis, "label_ends": "auroc" in key})
            ends = figures.peak_and_final(x, [math.nan if value is None else value for value in y])
            if "auroc" in key and ends:
                say(f"{key}: peak {ends[0][1]:.4f} at step {ends[0][0]:.0f}, final {ends[1][1]:.4f}, "
                    f"drop {ends[0][1] - ends[1][1]:.4f}")  # fmt: skip
    figures.curve(series, path, title=title)


def machine(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"


def identity(args):
    """What a checkpoint must tell to be loaded: plain values only, so that weights_only can stay on."""
    plain = {k: v for k, v in vars(args).items() if isinstance(v, (str, int, float, bool, list, type(None)))}
    return {"version": VERSION, "method": args.method, "options": args.options, "config": plain}


def resume_from(path, args):
    """What an interrupted run left in --out. Raises UserError when it was another run, or left nothing."""
    if not path.exists():
        raise UserError(f"--resume: there is no {path}: nothing was interrupted there; leave --resume out.")
    content = read_checkpoint(path, args.method)
    changed = [k for k in ("method", "options") if content[k] != identity(args)[k]]
    free = {"out", "device", "workers", "cache", "save_every", "resume", "panels", "decode", "copy_ratio", "eval_every",
            "seeds"}  # fmt: skip
    now = identity(args)["config"]
    changed += sorted(k for k in now.keys() - free - {"method"} if content["config"].get(k) != now[k])
    if changed:
        raise UserError(f"--resume: {path} is of a run with another {', '.join(changed)}: give the same options again.")
    return content


# ---------------------------------------------------------------------------------------------------------------------
# Pictures, prediction, export, comparison


def fit_decoder(method, group, args, device, steps=600):
    """--decode: a network from the features of normal images to their pixels; None where a method has no features.

    What it makes of a *reconstruction* shows with one's own eyes whether a defect was restored or copied.
    """
    images = sample_images([item.path for category in group for item in category.train], args, device)
    with torch.no_grad(), precision(args, device):
        chunks = [method.reconstruction(method.prepare(chunk)) for chunk in images.split(CHUNK)]
    if not chunks[0] or chunks[0][0][0].shape[1] == 3:  # nothing reconstructed, or an image, which needs no decoder
        return None
    levels = [torch.cat([target.float() for target, _ in level]) for level in zip(*chunks)]
    decoder = models.Decoder([f.shape[1] for f in levels], [f.shape[-1] for f in levels], args.size).to(device)
    # Not by `train`: the pictures are the first process's alone, and there it would wait for the others.
    optimiser, progress = torch.optim.AdamW(decoder.parameters(), 2e-3, fused=True), Progress("decoder", steps)
    for step in range(steps):
        for parameters in optimiser.param_groups:
            parameters["lr"] = 2e-3 * rate("one-cycle", step / steps)
        chosen = torch.randint(len(images), (8,), device=device)
        with precision(args, device):
            loss = (decoder([f[chosen] for f in levels]) - images[chosen]).abs().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        progress.update(step + 1, f"  loss {loss.item():.4f}")
    return decoder.eval()


@torch.no_grad()
def panels(method, category, scores, entry, args, device, out, decoder=None):
    """panels/CATEGORY.png: the worst false alarms, the worst misses and the clearest find of each kind of defect."""
    items = category.test
    by_score = sorted(range(len(items)), key=lambda i: scores[i])
    good, bad = [i for i in by_score if not items[i].label], [i for i in by_score if items[i].label]
    chosen = {**dict.fromkeys(good[-2:][::-1], "false alarm"), **dict.fromkeys(bad[:2], "miss")}
    for kind in sorted({items[i].defect for i in bad}):
        chosen.setdefault(next(i for i in reversed(bad) if items[i].defect == kind), "")
    chosen = dict(itertools.islice(chosen.items(), 8))
    reference = data.read_image(category.train[0].path, args.size)
    (parts,) = frozen(method, [items[i].path for i in chosen], args, device)  # eight at most: one batch
    maps, pairs = method.anomaly_map(parts).float().cpu().numpy(), method.reconstruction(parts)
    decoded = [picture(x) for x in map(decoder, zip(*pairs))] if decoder else []
    rows = []
    for row, (i, verdict) in enumerate(chosen.items()):
        item, image = items[i], data.read_image(items[i].path, args.size)
        wrong = (scores[i] > entry["threshold"]) != bool(item.label)
        images = {"normal reference": reference, "input": image}
        if pairs:
            images |= {name: x[row] for name, x in zip(("features decoded", "restored, decoded"), decoded)}
            images |= restored_tile(*(x[row].float().cpu() for x in pairs[0]))
        known = category.has_masks and (item.masks or not item.label)
        images["ground truth"] = data.read_mask(item, args.size) if known else None
        images["anomaly map"] = figures.overlay(image, maps[row], entry["low"], entry["high"])
        rows.append({"name": f"{item.defect}/{item.path.stem}", "verdict": verdict if wrong else "", "score": scores[i],
                     "images": images})  # fmt: skip
    note = (f"Scores above {entry['threshold']:.3g} count as defective ({100 * args.quantile:g} % of "
            f"{'held-out' if entry['held_out'] else 'training'} normal images lie below). First the highest-scoring "
            f"normal images and the lowest-scoring defective ones, then the clearest of each kind.")  # fmt: skip
    figures.save(
        figures.panel(rows, entry["low"], entry["high"], f"{args.method}: {category.name}", note),
        out / f"panels/{category.name}.png",
    )


def picture(images):
    """(...,3,S,S) in [0,1] -> (...,S,S,3) uint8."""
    return (images.movedim(-3, -1).clamp(0, 1) * 255).byte().cpu().numpy()


def restored_tile(target, restored):
    """The reconstruction where it is an image, else its distance to the target, place by place."""
    if target.shape[0] == 3:
        return {"reconstruction": picture(restored)}
    return {"feature distance": (restored - target).norm(dim=0).numpy()}


def load_for_use(args, device):
    """-> (method, entry) of a checkpoint that holds one model, or of its model for --categories NAME."""
    entries = args.loaded["models"]
    if args.loaded["config"]["separate"]:
        wanted = [e for e in entries if e["name"] in (args.categories or [])]
        if len(wanted) != 1:
            raise UserError(
                f"{args.load} holds one model per category: name one with --categories, of "
                f"{', '.join(e['name'] for e in entries)}."
            )
        entries = wanted
    entry, named = entries[0], args.categories or []
    return reload(args, device, entry), entry | (entry["of"].get(named[0], {}) if len(named) == 1 else {})


@torch.no_grad()
def predict(args):
    """A line and an overlay per image as they come, predictions.csv. -> exit code: 2 if none was readable, else 0."""
    device = pick_device(args.device)
    method, entry = load_for_use(args, device)
    source = Path(args.predict)
    if not source.exists():
        raise UserError(f"--predict {source} does not exist: name an image or a folder of images.")
    paths = sorted(p for p in source.rglob("*") if p.suffix.lower() in data.EXTENSIONS) if source.is_dir() else [source]
    if not paths:
        raise UserError(f"--predict {source} holds no image ({', '.join(sorted(data.EXTENSIONS))}).")
    out = Path(args.out or Path(args.load).parent / "predictions")
    out.mkdir(parents=True, exist_ok=True)
    if len(entry["of"]) > 1 and len(args.categories or []) != 1:
        say(f"note: one threshold for {', '.join(entry['of'])} together; name one with --categories for its own")
    if not entry["held_out"]:
        say("note: the threshold was set on training images, which score lower than new ones; train with --holdout 0.1")
    skipped = 0
    with open(out / "predictions.csv", "w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["image", "score", "threshold", "verdict", "overlay"])
        for path in paths:
            try:
                image = data.read_image(path, args.size)
                (parts,) = frozen(method, [path], args, device)
            except data.DataError as error:
                print(f"skipped: {error}", file=sys.stderr)
                skipped += 1
                continue
            maps = method.anomaly_map(parts).float()
            score = method.image_score(maps).item()
            verdict = "defective" if score > entry["threshold"] else "normal"
            relative = path.relative_to(source) if source.is_dir() else Path(path.name)
            overlay = out / relative.with_name(f"{relative.name}.overlay.png")
            figures.save(Image.fromarray(
                figures.overlay(image, maps[0].cpu().numpy(), entry["low"], entry["high"])), overlay)  # fmt: skip
            lines.writerow([path, f"{score:.6g}", f"{entry['threshold']:.6g}", verdict, overlay])
            file.flush()
            say(f"{path}  score {score:.4g} (threshold {entry['threshold']:.4g})  {verdict}  {overlay}")
    say(f"{len(paths) - skipped} images, {skipped} skipped; wrote {out / 'predictions.csv'}")
    return 2 if skipped == len(paths) else 0


class Exported(nn.Module):
    """Images (1,3,S,S) in [0,1] -> (anomaly maps (1,S,S), image scores (1,)), for use without this program."""

    def __init__(self, method):
        super().__init__()
        self.method = method

    def forward(self, images):
        maps = self.method.anomaly_map(self.method.prepare(images))
        return maps, self.method.image_score(maps)


def export(args):
    """Writes --export FILE.pt2 and checks it against the program itself."""
    device = pick_device(args.device)
    method, _ = load_for_use(args, device)
    images = torch.rand(1, 3, args.size, args.size, device=device)
    module = Exported(method).eval()
    with torch.no_grad():
        expected, _ = module(images)  # before the tracing, which must not be the first to fill a cache of constants
        try:
            program = torch.export.export(module, (images,))
        except Exception as error:  # whatever the tracer cannot follow
            raise UserError(
                f"--export: PyTorch cannot trace {args.method} ({type(error).__name__}): use --predict."
            ) from None
        maps, _ = program.module()(images)
        difference = (maps - expected).abs().max().item()
    Path(args.export).parent.mkdir(parents=True, exist_ok=True)
    torch.export.save(program, args.export)
    say(
        f"wrote {args.export}: input (1,3,{args.size},{args.size}) in [0,1]; "
        f"largest difference of the maps {difference:.1e}"
    )
    return 0


def compare(folders):
    """The results of several runs side by side: text, Markdown, compare.png, and compare-curves.png if there are any.

    A folder of runs, such as those of --seeds and --ablate, stands for all of them.
    """
    runs = {}
    for folder in map(Path, folders):
        own = folder / "results.json"
        within = [own] if own.exists() else sorted(folder.glob("*/results.json"))
        for path in within:
            try:
                name = str(path.parent.relative_to(folder.parent))
                runs[str(path.parent) if name in runs else name] = json.loads(path.read_text())
            except (OSError, ValueError):
                raise UserError(f"--compare: {path} cannot be read: run it again, or leave it out.") from None
        if not within:
            say(f"note: {folder} holds no results.json and is left out")
    if not runs:
        raise UserError("--compare: none of these folders holds a results.json: name folders that a run has written.")
    names = sorted({name for r in runs.values() for name in r["categories"]})
    show = lambda row: "-" if row is None else "/".join(
        "-" if row[m] is None else f"{100 * row[m]:.1f}" for m in ("image_auroc", "pixel_auroc"))  # fmt: skip
    header, lines, notes = ["image/pixel AUROC", *names, "mean", "seconds"], [], []
    for run, r in runs.items():
        lines.append([run, *(show(r["categories"].get(n)) for n in names), show(r["mean"]), f"{r['seconds']:.0f}"])
        paper = [published(r["method"], n, r["unified"]) if n in r["categories"] else None for n in names]
        if any(paper):
            lines.append([f"{run}, published", *(cell or "-" for cell in paper), "-", "-"])
            notes.append(protocol(run, r))
    say(figures.text_table(header, lines), "", figures.markdown_table(header, lines), *notes, sep="\n")
    bars = {
        run: {m.replace("_auroc", ""): r["mean"][m] for m in ("image_auroc", "pixel_auroc")}
        for run, r in runs.items()
    }
    figures.bars(bars, "compare.png", "Mean AUROC")
    say("wrote compare.png")
    curves = {run: r["curve"]["all"] for run, r in runs.items() if r["curve"].get("all")}
    if curves:
        charts = [{"title": key.replace("_", " "), "right": (0.5, 1), "series": [
            {"name": run, "x": [record["step"] for record in curve], "y": [record[key] for record in curve],
             "axis": "left" if key == "loss" else "right", "log": key == "loss", "label_ends": key != "loss"}
            for run, curve in curves.items()]} for key in ("loss", "image_auroc", "pixel_auroc")]  # fmt: skip
        figures.small_multiples(charts, "compare-curves.png")
        say("wrote compare-curves.png: the runs with --eval-every")
    return 0


def protocol(run, results):
    """What to bear in mind when a run is set beside its paper's numbers, in one line."""
    cls, config, trained = METHODS[results["method"]], results["config"], results["throughput"]["train_images_per_s"]
    paper, backbone = cls.paper_recipe or cls.recipe, method_defaults(cls).get("backbone")
    sides = []
    for count, net, size, epochs in ((15, backbone, paper.size, paper.epochs),
                                     (len(results["categories"]), results["backbone"], config["size"],
                                      config["epochs"])):  # fmt: skip
        what = [f"one model for {count} categories" if results["unified"] else "one model per category", net]
        sides.append(", ".join([*filter(None, what), f"{size}x{size}"] + ([f"{epochs} epochs"] if trained else [])))
    return f"{run}: the paper has {sides[0]}; this run {sides[1]}."


DEMO = {"mlp": "--method mlp", "uniad": "--method uniad"}
ABLATION = {"all three": "", "no query": "--no-query", "no mask": "--no-mask", "no jitter": "--no-jitter",
            "none": "--no-query --no-mask --no-jitter"}  # fmt: skip


def one_of_several(args):
    """`run`, but --resume means the series: what is finished is read, what never began starts now."""
    out = Path(args.out or default_out(args))
    if args.resume and not (out / "unfinished.pt").exists():
        if (out / "results.json").exists():
            resume_from(out / "checkpoint.pt", args)  # refuses a run with other options
            return json.loads((out / "results.json").read_text())
        args.resume = False
    return run(args)


def side_by_side(argv, runs, head, folder=None):
    """One run for each {name: options} on the same data; copy ratio and AUROC in one table."""
    rows = []
    for name, options in runs.items():
        args = parse([*argv, *options.split(), "--copy-ratio"])
        if args.out or folder:
            args.out = f"{args.out or folder}/{name.replace(' ', '-')}"
        results = one_of_several(args)
        ratio = [r for r in results["copy_ratio"] if r is not None]
        mean = [results["mean"][m] for m in ("image_auroc", "pixel_auroc")]
        rows.append([name, float(np.mean(ratio)) if ratio else None, *mean])
    say("", figures.text_table([head, "copy ratio", "image AUROC", "pixel AUROC"], rows), sep="\n")
    say("copy ratio: 1 = the defect is copied whole, 0 = it is restored to normal; see the panels of each run")
    return 0


def several(args):
    """--seeds N: N runs, then mean and standard deviation (of a sample, N - 1) over them."""
    results, out = [], args.out or default_out(args)
    for seed in range(args.seed, args.seed + args.seeds):
        one = argparse.Namespace(**{**vars(args), "seed": seed, "out": f"{out}/seed{seed}"})
        results.append(one_of_several(one)["categories"])
    rows = []
    for name in [*results[0], "mean"]:
        values = [
            [mean_row(without_none(r))[m] if name == "mean" else r[name][m] for m in metrics.NAMES] for r in results
        ]
        values = np.array(values, float) * 100
        spread = zip(values.mean(0), values.std(0, ddof=1))
        rows.append([name, *(f"{m:.1f} ± {s:.2f}" if m == m else None for m, s in spread)])
    say(f"\n{args.seeds} seeds, mean ± standard deviation", figures.text_table(["category", *HEADS], rows), sep="\n")


def without_none(rows):
    """The rows of results.json with null read as NaN again."""
    return {k: {m: math.nan if row[m] is None else row[m] for m in metrics.NAMES} for k, row in rows.items()}


def main(argv=None):
    """Runs the program; every error a user can cause ends in one sentence and exit code 2."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = parse(argv)
        if (args.predict or args.export) and not args.load:
            raise UserError("--predict and --export need --load CHECKPOINT.")
        if WORLD > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if pick_device(args.device).type == "cuda" else "gloo")
        if args.compare:
            return compare(args.compare)
        if args.predict:
            return predict(args)
        if args.export:
            return export(args)
        if args.ablate:
            return side_by_side([*argv, "--method", "uniad"], ABLATION, "remedies", "runs/ablation")
        if args.method is None and args.data is None:
            return side_by_side(argv, DEMO, "method")
        args.method = args.method or "uniad"
        several(args) if args.seeds > 1 else run(args)
        return 0
    except (UserError, data.DataError, models.MethodError) as error:
        message = str(error)
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        sys.stdout = open(os.devnull, "w")
        return 0
    except torch.OutOfMemoryError:
        message = "The GPU's memory is full: lower --batch-size or --size."
    except RuntimeError as error:  # PyTorch's allocator on a CPU has no exception of its own
        if "can't allocate memory" not in str(error):
            raise
        message = "The memory is full: lower --batch-size, --size or --width."
    except (MemoryError, OSError) as error:
        message = f"{error or 'memory is full'}: free some space, lower --batch-size, or name another --out or --cache."
    except KeyboardInterrupt:
        print("\ninterrupted: the same command with --resume goes on from the last save, if any", file=sys.stderr)
        return 130
    print(f"uad.py: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
