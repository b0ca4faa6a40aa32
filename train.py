"""Train any method of the contract (`Method` in models.py), and use it: `fit` and `predict`.

    method = fit(models.UniAD(), images)
    maps, scores = predict(method, more_images)         # (N,S,S) and (N,), float32 arrays

This is the one training loop of the project: calibrate -> prepare once an image, cached -> loss, step, loss, step …
through every stage -> fit_statistics. Images are anything with a length and items (S,S,3) uint8, or a float tensor
(N,3,S,S) in [0,1]. Needs torch and NumPy alone. Copy this file and models.py into your project, and both work there.
"""

import copy
import gc
import hashlib
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import nn

CHUNK = 16  # images prepared or scored at a time
LAUNCH = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")]
BY_TORCHRUN = all(map(str.isdecimal, LAUNCH)) and int(LAUNCH[0]) < int(LAUNCH[1]) and "MASTER_ADDR" in os.environ
RANK, WORLD = map(int, LAUNCH[:2]) if BY_TORCHRUN else (0, 1)
RAM = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 2**34  # Windows: a guess


class UserError(Exception):
    """Something that the user can change; the message is one sentence with the way out."""


# ---------------------------------------------------------------------------------------------------------------------
# Where it runs, and what it says


def print0(*words, end="\n"):
    """print, in the process of rank 0 alone; silent once the reader of a pipe, such as head, has gone."""
    try:
        if RANK == 0:
            print(*words, end=end, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")


class Progress:
    """A line with what is done and the time left: renewed on a terminal, elsewhere printed at every tenth."""

    def __init__(self, label, total, begun=0):
        self.label, self.total, self.begun = label, total, begun  # begun: done before a resumed run went on
        self.start, self.tenth = time.perf_counter(), 0

    def update(self, done, text=""):
        tenth, terminal = 10 * done // self.total, sys.stdout.isatty()
        if terminal or tenth > self.tenth:
            spent = time.perf_counter() - self.start
            left = spent / (done - self.begun) * (self.total - done)
            line = f"{self.label} {done}/{self.total}{text}  {spent:.0f} s, {left:.0f} s left"
            print0(f"\r{line:<100}" if terminal else line, end="" if terminal and done < self.total else "\n")
        self.tenth = tenth


def pick_device(name):
    """'auto', 'cpu', 'cuda', 'cuda:1' -> torch.device. Raises UserError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if WORLD > 1 and name != "cpu":
            name = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(name)
        if torch.device(name).type in ("cpu", "cuda"):
            return torch.empty(0, device=name).device
        raise RuntimeError
    except (AssertionError, RuntimeError):
        raise UserError(f"There is no device {name} here: choose auto, cpu, cuda or cuda:N.") from None


class Machine:
    """Where and how to compute. device: auto, cpu, cuda or cuda:N. precision: bf16, fp32, or auto = bf16 where native.

    On a GPU PyTorch lets convolutions in fp32 use TF32; torch.backends.cudnn.allow_tf32 = False forbids it.
    workers: threads that decode images ahead; Pillow releases Python's lock while it decodes. Raises UserError.
    """

    def __init__(self, device="auto", precision="auto", workers=os.cpu_count() or 1):
        if precision not in ("auto", "fp32", "bf16") or workers < 1:
            raise UserError(f"precision={precision} must be auto, fp32 or bf16, and workers={workers} at least 1.")
        self.device, self.workers = pick_device(device), workers
        able = torch.cpu.get_capabilities()
        on_cpu = able.get("avx512_bf16", False) or able.get("amx_bf16", False)
        native = torch.cuda.is_bf16_supported(including_emulation=False) if self.device.type == "cuda" else on_cpu
        self.bf16 = precision == "bf16" or precision == "auto" and native

    def autocast(self):
        """Matrix products and convolutions in bfloat16, the rest in float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def read(self, images, indices, size):
        """Yields batches (b,3,S,S) in [0,1] on the device, and reads the next one ahead. Raises UserError."""
        pool, indices = ThreadPoolExecutor(self.workers), list(indices)
        submit = lambda start: [pool.submit(images.__getitem__, i) for i in indices[start : start + CHUNK]]
        try:
            ahead = submit(0)
            for start in range(0, len(indices), CHUNK):
                chunk, ahead = ahead, submit(start + CHUNK)
                yield torch.stack([as_image(image.result(), size, self.device) for image in chunk])
        finally:
            pool.shutdown(cancel_futures=True)  # also when the reader stops early

    def prepare(self, method, images, indices=None):
        """Yields prepared batches, rounded to half precision, so that cached and streamed ones are the same."""
        for batch in self.read(images, range(len(images)) if indices is None else indices, method.size):
            with torch.no_grad(), self.autocast():
                parts = tuple(part.half().float() for part in method.prepare(batch))
            yield parts  # not inside: the caller's code would run without gradients and in bfloat16 too


def as_image(image, size, device):
    """An array (S,S,3) uint8, or a float tensor (3,S,S) in [0,1] -> the latter, on the device. Raises UserError."""
    if isinstance(image, torch.Tensor) and image.is_floating_point() and image.shape == (3, size, size):
        if image.min() >= 0 and image.max() <= 1:
            return image.to(device).float()
    elif isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape == (size, size, 3):
        return torch.from_numpy(np.ascontiguousarray(image)).to(device).permute(2, 0, 1).float() / 255
    found = f"{getattr(image, 'dtype', type(image).__name__)} {tuple(getattr(image, 'shape', ()))}"
    raise UserError(f"Images must be uint8 ({size},{size},3) or float (3,{size},{size}) in [0,1]; one is {found}.")


class Prepared:
    """The prepared parts of some images, in half precision: on the GPU, else in RAM, else prepared anew each time."""

    def __init__(self, machine, method, images, indices, label):
        self.source, self.indices, self.tensors = (machine, method, images), list(indices), []
        progress, done = Progress(f"{label} prepare", len(self.indices)), 0
        for parts in machine.prepare(method, images, self.indices):
            if not done and not self.allocate(parts):
                return
            for tensor, part in zip(self.tensors, parts):
                tensor[done : done + len(part)] = part
            done += len(parts[0])
            progress.update(done)

    def allocate(self, parts):
        """-> whether the parts of all images fit."""
        device, count = self.source[0].device, len(self.indices)
        total = sum(part[0].numel() * 2 * count for part in parts)
        on_gpu = device.type == "cuda" and total < 0.5 * torch.cuda.mem_get_info(device)[0]
        if not on_gpu and total > 0.5 * RAM / WORLD:
            print0(f"note: {total / 2**30:.1f} GiB of prepared images do not fit: each epoch prepares them anew")
            return False
        where = device if on_gpu else "cpu"
        self.tensors = [torch.empty((count, *part.shape[1:]), dtype=torch.half, device=where) for part in parts]
        return True

    def batch(self, rows):
        """rows: a tensor of indices."""
        machine, method, images = self.source
        if self.tensors:
            return tuple(t[rows].to(machine.device, non_blocking=True).float() for t in self.tensors)
        chunks = machine.prepare(method, images, [self.indices[i] for i in rows.tolist()])
        return tuple(torch.cat(part) for part in zip(*chunks))


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers and the schedule


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose step is turned into the nearest orthogonal matrix (Jordan et al., 2024): every direction
    of a weight matrix moves equally far, so that a fraction of the steps suffices. For (out,in), and for (out,in,k,k)
    flattened to it.

    As torch.optim.Muon with adjust_lr_fn="match_rms_adamw": the same rate serves AdamW. That one multiplies in bfloat16
    wherever it runs, which on a processor without it takes 16 times the rest of a step; here `autocast` decides, and
    matrices of one shape go through one batched product.
    """

    def __init__(self, parameters, lr, weight_decay, momentum=0.95):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for shape in {p.shape for p in group["params"]}:
                same = [p for p in group["params"] if p.shape == shape and p.grad is not None]
                for p in same:
                    if not self.state[p]:
                        self.state[p]["mean"] = torch.zeros_like(p)
                grads, means = [p.grad for p in same], [self.state[p]["mean"] for p in same]
                torch._foreach_lerp_(means, grads, 1 - momentum)  # on a GPU one kernel for all of them
                ahead = torch.stack(torch._foreach_lerp(grads, means, momentum)).flatten(2)
                length = -lr * 0.2 * max(ahead.shape[1:]) ** 0.5  # AdamW's
                directions = orthogonal(ahead).float().reshape(-1, *shape)
                torch._foreach_mul_(same, 1 - lr * group["weight_decay"])
                torch._foreach_add_(same, directions.unbind(), alpha=length)


def orthogonal(x):
    """(N,a,b) -> (N,a,b): all singular values brought near 1 by five steps of a quintic Newton-Schulz iteration."""
    if x.shape[1] > x.shape[2]:
        return orthogonal(x.mT).mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(5):  # p(s) = 3.4445 s - 4.775 s^3 + 2.0315 s^5, the published coefficients
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return x


def optimizers_for(method, parameters, recipe):
    """-> list of optimizers under one rate; for "muon" Muon of linear and convolution weights, AdamW of the rest."""
    how = {"lr": recipe.lr, "weight_decay": recipe.weight_decay}
    adam = how | {"betas": (0.9, recipe.beta2), "fused": True}  # one kernel for all parameters
    if recipe.optimizer in ("sgd", "nesterov"):
        return [torch.optim.SGD(parameters, momentum=0.9, nesterov=recipe.optimizer == "nesterov", fused=True, **how)]
    if recipe.optimizer == "adam":
        return [torch.optim.Adam(parameters, **adam)]
    if recipe.optimizer == "adamw":
        return [torch.optim.AdamW(parameters, **adam)]
    weights = {id(m.weight) for m in method.modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    matrices = [p for p in parameters if id(p) in weights]
    if not matrices:
        raise UserError("optimizer=muon is for linear layers and convolutions, and there is none to train: use adamw.")
    others = [p for p in parameters if id(p) not in weights]
    return [Muon(matrices, **how), torch.optim.AdamW(others, **adam)]


def lr_factor(schedule, progress):
    """What the learning rate is multiplied with at `progress` in [0,1)."""
    if schedule == "one-cycle":  # 30 % linear warm-up, then half a cosine to 0; post-norm layers need the long warm-up
        if progress < 0.3:
            return progress / 0.3 + 0.01
        return (1 + math.cos(math.pi * (progress - 0.3) / 0.7)) / 2
    if schedule == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    if schedule == "exponential":
        return 0.05**progress
    if schedule == "two-step":
        return 0.2 ** ((progress >= 0.8) + (progress >= 0.9))
    return 0.1 if schedule == "step" and progress >= 0.8 else 1.0


# ---------------------------------------------------------------------------------------------------------------------
# Fit and predict


def fit(
    method, images, *, machine=None, seed=0, label="train",
    eval_every=0, observe=None, save_every=60, save=None, resume=None, **changes,
):  # fmt: skip
    """Trains a method on images of good parts and returns it, in evaluation mode on its device.

    images: see above. machine: Machine() if None. seed: of the order of images; for the weights and the noise call
    torch.manual_seed before the constructor. changes: fields of the method's recipe, such as epochs=5.
    observe(step, stage, loss): called every eval_every steps and at the end of a stage, with statistics fitted.
    save(state): called every save_every seconds in the first process, to write or copy the state, whose tensors
    training goes on changing; resume: such a state, to go on to equal numbers.
    Under torchrun every process calls it with all images, and they share the work. Raises UserError.
    """
    recipe, machine = replace(method.recipe, **changes), machine or Machine()
    if len(images) < WORLD or not save_every >= 0:  # NaN neither
        raise UserError(f"There must be images ({len(images)}) for each process, save_every={save_every} at least 0.")
    method.to(machine.device)
    sample = sorted(np.random.default_rng(0).permutation(len(images))[:256].tolist())  # the same for every seed
    with torch.no_grad(), machine.autocast():
        method.calibrate(machine.read(images, sample, method.size))
    everything = lambda: machine.prepare(method, images)  # in every process all images, not its share alone

    def fit_statistics():
        method.eval()
        agree(method)
        with torch.no_grad(), machine.autocast():
            method.fit_statistics(everything)
        method.fitted = True

    if stages := method.stages():
        prepared = Prepared(machine, method, images, range(RANK, len(images), WORLD), label)
        if WORLD == 1 and prepared.tensors:
            chunks = torch.arange(len(images)).split(CHUNK)
            everything = lambda: map(prepared.batch, chunks)
    if resume and resume.get("stage") not in range(len(stages)):
        raise UserError(f"The saved state is of stage {resume.get('stage')} of {len(stages)}: start again.")
    for number, (stage, parameters) in enumerate(stages):
        if resume and number < resume["stage"]:
            continue
        run = Stage(machine, method, recipe, stage, parameters, len(images), (seed, number))
        print0(f"{label} {stage}: {run.total} steps of {run.batch_size * WORLD} images")
        if resume:
            run.load_state_dict(resume)
            resume = None
        progress, saved = Progress(f"{label} {stage}", run.total, run.step), time.perf_counter()
        while run.step < run.total:
            loss = run.advance(prepared)
            last = run.step == run.total
            if run.step % 20 == 0 or last:  # reading the loss waits for a GPU: not at every step
                if not math.isfinite(loss.item()):
                    raise UserError(f"The loss is {loss.item()} at step {run.step} of {stage}: lower lr={recipe.lr}.")
                progress.update(run.step, f"  loss {loss.item():.4f}")
            if observe and eval_every and (last or (number * run.total + run.step) % eval_every == 0):
                fit_statistics()
                observe(number * run.total + run.step, stage, loss.item())
                method.train()
            if save and RANK == 0 and time.perf_counter() - saved > save_every and not last:
                save(run.state_dict() | {"stage": number})
                saved = time.perf_counter()
    fit_statistics()
    return method


def agree(method):
    """Gives all processes the first one's buffers: after a step those of BatchNorm are each process's own."""
    for buffer in method.buffers() if WORLD > 1 else ():
        torch.distributed.broadcast(buffer, 0)


@lru_cache(maxsize=2)  # a batch may reach into the next epoch
def epoch_order(count, *seeds):
    """Of the images in one epoch: from a generator of its own, so that a resumed run sees the same."""
    return np.random.default_rng(seeds).permutation(count)


class Stage:
    """One stage of training, step by step; its state is all that a resumed run needs to give the same numbers."""

    def __init__(self, machine, method, recipe, stage, parameters, count, seeds):
        method.requires_grad_(False)
        for p in parameters:
            p.requires_grad_(True)
        self.machine, self.method, self.recipe, self.parameters = machine, method, recipe, parameters
        self.optimizers, self.seeds = optimizers_for(method, parameters, recipe), seeds
        self.module = LossModule(machine, method, stage)
        self.to_record = machine.device.type == "cuda" and WORLD == 1 and method.capturable
        if WORLD > 1:
            self.module = nn.parallel.DistributedDataParallel(self.module)
        count //= WORLD  # every process takes the same number of steps, or some would wait for ever
        self.batch_size = min(max(1, recipe.batch_size // WORLD), count)  # the recipe's is that of all together
        steps = recipe.epochs * recipe.steps  # 0: as many as show each image once an epoch
        self.total = steps or recipe.epochs * count // self.batch_size
        self.step, self.mean = 0, None
        method.train()

    def record(self, batch):
        """The loss and its gradients as a CUDA graph, two launches in place of a thousand: else a small network waits
        for the processor that launches its kernels, not for the GPU."""
        device, kept = self.machine.device, [buffer.clone() for buffer in self.method.buffers()]
        random = torch.cuda.get_rng_state(device)  # the rehearsals draw numbers, and move BatchNorm's statistics
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)  # the capture's: autograd waits for it
        gc.collect()  # a former graph lies in a cycle of references, with its memory
        with torch.cuda.device(device):  # on another one it would record nothing, without a word
            torch.cuda.make_graphed_callables(self.module, batch, allow_unused_input=True)  # in place
        for buffer, old in zip(self.method.buffers(), kept):
            buffer.copy_(old)
        torch.cuda.set_rng_state(random, device)
        self.to_record = False

    def advance(self, prepared):
        """One step of the optimizers. -> running mean of the loss, on the device"""
        # The epochs' orders follow one another and each step takes the next images, so a batch may reach over an end.
        count, first = len(prepared.indices), self.step * self.batch_size
        epochs = range(first // count, (first + self.batch_size - 1) // count + 1)
        order = np.concatenate([epoch_order(count, *self.seeds, epoch, RANK) for epoch in epochs])
        rows = torch.from_numpy(order[first % count :][: self.batch_size])
        if RANK:  # each process has noise of its own, and again the same when it is resumed
            torch.manual_seed(int(np.random.SeedSequence((*self.seeds, self.step, RANK)).generate_state(1)[0]))
        for optimizer in self.optimizers:
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = self.recipe.lr * lr_factor(self.recipe.schedule, self.step / self.total)
        batch = prepared.batch(rows)
        if self.to_record:
            self.record(batch)
        loss = self.module(*batch)
        loss.backward()
        if self.recipe.clip:
            nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip)
        with self.machine.autocast():  # Muon multiplies matrices
            for optimizer in self.optimizers:
                optimizer.step()
        self.step += 1
        loss = loss.detach().clone()  # a graph's next step overwrites it
        self.mean = loss if self.mean is None else torch.lerp(self.mean, loss, max(0.02, 1 / self.step))
        return self.mean

    def state_dict(self):
        optimizers, random = [optimizer.state_dict() for optimizer in self.optimizers], [torch.get_rng_state()]
        if self.machine.device.type == "cuda":
            random.append(torch.cuda.get_rng_state(self.machine.device))
        return {"step": self.step, "loss": self.mean.item(), "random": random, "optimizers": optimizers,
                "state": trained_state(self.method)}  # fmt: skip

    def load_state_dict(self, state):
        if state.get("step") not in range(self.total):
            raise UserError(f"The saved state is of step {state.get('step')} of {self.total}: start again.")
        try:
            restore(self.method, state["state"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(copy.deepcopy(saved))  # PyTorch would train on in the caller's tensors
                for p, own in optimizer.state.items():
                    if any(value.shape not in (p.shape, ()) for value in own.values()):
                        raise ValueError  # the fused kernels would read beyond their memory
            self.step, self.mean = state["step"], torch.tensor(state["loss"], device=self.machine.device)
            cpu, *cuda = state["random"]  # none of a GPU where the run began on a CPU
            torch.set_rng_state(cpu)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"The saved state is damaged ({type(error).__name__}): start again.") from None
        if cuda and self.machine.device.type == "cuda":
            torch.cuda.set_rng_state(cuda[0], self.machine.device)


class LossModule(nn.Module):
    """The loss as a module's forward, which is what data-parallel training and CUDA graphs wrap."""

    def __init__(self, machine, method, stage):
        super().__init__()
        self.machine, self.method, self.stage = machine, method, stage

    def forward(self, *batch):
        with self.machine.autocast():  # here: a graph's gradients are then recorded without it, as they run elsewhere
            return self.method.loss(batch, self.stage)


def check_room(count, side):
    """Raises UserError when the maps of so many images do not fit into half of the memory."""
    if count * side**2 * 4 > 0.5 * RAM:
        gigabytes = count * side**2 / 2**28
        raise UserError(f"The maps of {count} images need {gigabytes:.0f} GiB: give fewer or smaller ones.")


def predict(method, images, *, machine=None, indices=None):
    """-> anomaly maps (N,S,S) and image scores (N,), float32 arrays. images: see above; indices: of some of them.

    Raises UserError for images of another shape, models.MethodError for a method that was never fitted.
    """
    machine, side, done = machine or Machine(), method.size, 0
    count = len(images if indices is None else indices)
    check_room(count, side)
    maps, scores = np.empty((count, side, side), np.float32), np.empty(count, np.float32)
    method.to(machine.device)
    for batch in machine.prepare(method, images, indices):
        here = slice(done, done + len(batch[0]))
        with machine.autocast():  # its distances stay in float32
            result = method.score(batch)
        maps[here], scores[here] = (part.float().cpu() for part in result)
        done = here.stop
    return maps, scores


# ---------------------------------------------------------------------------------------------------------------------
# What is kept


def trained_state(method):
    """The state dict without the frozen backbone, which is known by its name and checksum."""
    return {k: v.cpu() for k, v in method.state_dict().items() if not k.startswith("backbone.")}


def restore(method, state):
    """Loads what `trained_state` gave. Raises UserError where it does not fit or a value is not finite."""
    try:
        missing, unexpected = method.load_state_dict(state, strict=False)
    except (AttributeError, RuntimeError, TypeError) as error:
        raise UserError(f"The saved state does not fit: {str(error).splitlines()[-1].strip()}") from None
    wrong = [name for name in missing if not name.startswith("backbone.")] + unexpected
    if wrong:
        raise UserError(f"The saved state lacks or has too much of {', '.join(wrong[:3])}: it is another method's.")
    if bad := [name for name, value in state.items() if not value.isfinite().all()]:
        raise UserError(f"The saved state holds values of {bad[0]} that are not finite: train again.")


def checksum(method):
    """Of the frozen backbone, str: a saved state does not hold it, so it must be the same one again."""
    key = hashlib.sha256()
    for name, tensor in sorted(method.state_dict().items()):
        if name.startswith("backbone.") and "pos_embed" not in name:  # DINO's are resized: other last bits elsewhere
            key.update(tensor.cpu().contiguous().numpy().tobytes())
    return key.hexdigest()[:16]


def write(path, content):
    """Writes bytes, or anything else by torch.save, under a temporary name and renames it: never half a file."""
    path, temporary = Path(path), Path(f"{path}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            temporary.write_bytes(content)
        else:
            torch.save(content, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        temporary.unlink(missing_ok=True)
        raise UserError(f"Cannot write {path} ({error}): free some space or name another folder.") from None


def clear(out):
    """Removes an earlier run's pictures, which would be taken for this one's, and what a killed one was writing."""
    if (out / "results.json").exists() or (out / "unfinished.pt").exists():
        for pattern in ("curve.png", "curve-*.png", "panels/*.png", "*.pt.part", "*.json.part", "p*/*.part"):
            for old in out.glob(pattern):
                old.unlink(missing_ok=True)  # another process may have been faster


def writable(out, source):
    """Makes the folder and tries it, before any work is done for it. Raises UserError, also if it lies in source."""
    if out.resolve().is_relative_to(Path(source).resolve()):
        raise UserError(f"The folder {out} lies in {source}, where images are read: name another one.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".try{RANK}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"The folder {out} cannot be written ({error}): name another one.") from None
