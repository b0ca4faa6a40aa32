"""Seven methods that reconstruction is compared with, each on the contract of `models.Method`, one class a method.

    frozen features, statistics -> PaDiM           a student fails where its teacher does not -> US, MKD
    self-made tasks and defects -> Patch SVDD, CutPaste, DRAEM, FCDD

Needs torch, torchvision and models.py.
Where a paper trains a network too large for a CPU, its width is an option, and `paper` has the paper's.
"""

import math
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.datasets.folder import is_image_file, pil_loader
from torchvision.ops import MLP, Conv2dNormActivation
from torchvision.transforms import v2
from torchvision.transforms.functional import pil_to_tensor

from models import (
    Backbone,
    Method,
    MethodError,
    Recipe,
    Standardize,
    UNet,
    at_least,
    bilinear,
    both_axes,
    gaussian_blur,
    gaussian_matrix,
    gaussians,
    in_float32,
    require,
    ssim_error,
    to_tokens,
    whitening,
)

# ---------------------------------------------------------------------------------------------------------------------
# What several of them share. Random numbers are drawn for a whole batch, on its device.


def upsample(maps, size):
    """(B,h,w) -> (B,S,S), bilinear."""
    return bilinear(maps[:, None], size).squeeze(1)


def uniform(batch, low, high, channels=1):
    """(B,channels,1,1): random numbers for each of a batch's B items."""
    return torch.empty(len(batch), channels, 1, 1, device=batch.device).uniform_(low, high)


def half_of(batch):
    """(B,1,1,1) bool: True for about half of the batch's items."""
    return uniform(batch, 0, 1) < 0.5


def turned_grid(centre, angle, size):
    """Pixel coordinates (B,2,S,S), x and y, relative to `centre` (B,2,1,1), along axes turned by `angle` (B,1,1,1)."""
    line = torch.arange(size, device=centre.device) + 0.5
    x = line - centre[:, :1]  # (B,1,1,S)
    y = line[:, None] - centre[:, 1:]  # (B,1,S,1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos * x + sin * y, cos * y - sin * x], 1)


def perlin(images):
    """Perlin noise (B,1,S,S) for images, about -1 to 1: 1 to 32 lattice cells a side, along axes turned at random."""
    size, device = images.shape[-1], images.device
    cells = 2.0 ** torch.randint(0, 6, (len(images), 2, 1, 1), device=device)
    angle = uniform(images, -math.pi / 2, math.pi / 2)
    place = turned_grid(torch.full_like(cells, size / 2), angle, size) / size + 0.75  # within 0 to 1.5
    place *= cells
    column, row = place.long().chunk(2, 1)
    t = place.frac()
    x, y = t.chunk(2, 1)
    fade_x, fade_y = (t**3 * (t * (6 * t - 15) + 10)).chunk(2, 1)
    slopes = uniform(images, 0, 2 * math.pi, 50 * 50).view(-1, 50, 50)  # their directions at the lattice's corners
    image = torch.arange(len(images), device=device).view(-1, 1, 1, 1)

    def corner(dx, dy):
        direction = slopes[image, row + dy, column + dx]
        return direction.cos() * (x - dx) + direction.sin() * (y - dy)

    top = torch.lerp(corner(0, 0), corner(1, 0), fade_x)
    bottom = torch.lerp(corner(0, 1), corner(1, 1), fade_x)
    return 2**0.5 * torch.lerp(top, bottom, fade_y)


def procedural_textures(images):
    """Random textures (B,3,S,S) in [0,1]: two colours mixed by the sine of Perlin noise (marble), and some grain."""
    noise = perlin(images)
    rings = uniform(images, 1, 20)
    phase = uniform(images, 0, 2 * math.pi)
    dark, light = torch.rand(2, len(images), 3, 1, 1, device=images.device)
    mixed = torch.lerp(dark, light, 0.5 + 0.5 * torch.sin(rings * noise + phase))
    grain = uniform(images, 0, 0.2) * torch.randn_like(noise)
    return (mixed + grain).clamp(0, 1)


def paste_textures(images, textures):
    """Blends textures into Perlin-shaped regions of half of the images -> (images, mask (B,1,S,S) bool) (DRAEM, 3.3).

    I' = (1 - M) I + M ((1 - beta) A + beta I), beta ~ U(0, 0.8); M = Perlin noise > 0.5.
    """
    mask = (perlin(images) > 0.5) & half_of(images)
    beta = uniform(images, 0, 0.8)
    return torch.where(mask, torch.lerp(textures, images, beta), images), mask


# ---------------------------------------------------------------------------------------------------------------------
# Statistics of frozen features


class PaDiM(Method):
    """At each position the frozen features of normal images follow a Gaussian; a defect is far from it. No training.

        score(i,j) = sqrt((x - mu_ij)' (Sigma_ij + 0.01 I)^-1 (x - mu_ij))

    Defard et al., ICPR workshops 2021, sections III and IV. Theirs: ResNet-18 or WRN50-2 (layers 1 to 3) at the grid
    of layer 1, S/4 a side; a fixed random choice of 100 of 448 or 550 of 1792 channels; bilinear upsampling, a
    Gaussian of sigma 4 at 224 pixels, the maximum. Ours: sigma in proportion to size; any backbone (its strides 4, 8,
    16); dims = 0 means 100 channels, 550 above 1000, and all up to 256, since an EfficientNet's few are not redundant:
    choosing 100 of 192 cost 0.02 of image AUROC on transistor.
    standardize: 0.01 means 1 % of each channel's variance over normal images. Mahalanobis' distance does not know
    scale but that constant does: as it stands it fits ResNet's ReLU features and no other backbone's.
    """

    paper = {"backbone": "resnet18", "standardize": False}

    def __init__(self, *, backbone="efficientnet_lite2", weights="default", size=224, dims=0, standardize=True):
        super().__init__(size)
        at_least(0, dims=dims)
        self.grid = size // 4
        self.backbone = Backbone(backbone, weights, levels=3)  # strides 4, 8, 16; of vgg16 8, 16, 32
        total = sum(self.backbone.channels)
        if dims == 0:
            dims = total if total <= 256 else 100 if total <= 1000 else 550
        shuffled = torch.randperm(total, generator=torch.Generator().manual_seed(0))
        chosen = shuffled[:dims].sort().values
        self.standardize = standardize
        self.register_buffer("chosen", chosen if dims < total else None, persistent=False)
        self.register_buffer("mean", torch.zeros(self.grid**2, len(chosen)))
        self.register_buffer("whiten", torch.zeros(0))

    def prepare(self, images):
        return tuple(self.backbone(images))  # before they are resized: a fraction of the memory

    def features(self, levels):
        """Levels -> (B,L,C): the chosen channels on the finest grid, position by position and row by row."""
        x = torch.cat([F.interpolate(level, self.grid) for level in levels], 1)  # nearest
        return to_tokens(x if self.chosen is None else x[:, self.chosen])

    def stages(self):
        return []

    def fit_statistics(self, batches):
        self.mean, covariance = gaussians(self.features(levels) for levels in batches())
        diagonal, unit = covariance.diagonal(dim1=1, dim2=2), 1.0
        if self.standardize:  # each channel's variance over all images and positions
            unit = diagonal.mean(0) + self.mean.var(0, unbiased=False)
            unit = unit.clamp_min(unit.mean() / 1e4).clamp_min(1e-12)  # a ReLU's channel may be 0 on every normal image
        diagonal.add_(0.01 * unit)
        self.whiten = whitening(covariance)

    @in_float32
    def score(self, batch):
        x = (self.features(batch) - self.mean).permute(1, 2, 0)  # (L,C,B)
        distance = (self.whiten @ x).norm(dim=1).T  # (B,L)
        maps = distance.unflatten(1, (self.grid, self.grid))
        maps = gaussian_blur(upsample(maps, self.size), self.size / 56, self.size // 14)
        return maps, maps.amax((1, 2))


# ---------------------------------------------------------------------------------------------------------------------
# Students and teachers


@in_float32
def correlations(y):
    """(B,C,h,w) -> (C,C), of channels; about 0 for one that is constant, as on plain images (torch.corrcoef: NaN)."""
    x = y.float().transpose(0, 1).flatten(1)
    rest = x - x.mean(1, keepdim=True)
    rounding = 1e-5 * x.norm(dim=1, keepdim=True) + 1e-12  # the mean of a constant channel is not exact
    rest = rest / torch.maximum(rest.norm(dim=1, keepdim=True), rounding)
    return rest @ rest.T


class UninformedStudents(Method):
    """A teacher describes every patch; students learn its descriptors on normal images only, so on a defect they miss
    the teacher and disagree among themselves. With teacher y, students s_1 to s_M and their mean s, per position:

        e = |s - (y - mu) / sigma|^2,   v = mean_i |s_i|^2 - |s|^2,   map = mean over patch sizes of z(e) + z(v)

    Bergmann et al., CVPR 2020, section 3. Theirs: teachers of patch size 17, 33 and 65, 128-d, distilled from
    ResNet-18 on ImageNet crops with a compactness loss; three students of the same form; Adam 1e-4, 100 epochs;
    256x256; z-scores on held-out normal images. Ours: the teacher is distilled to a backbone's levels, at each
    position, on the training images with random textures pasted in, so that it also describes what students never
    see; no triplet loss; maps at stride 4 (65: stride 8) instead of every pixel, to which the 17 net's kernels are
    adapted; width 32 instead of 128; BatchNorm, without which so short a training taught the teacher nothing; one
    patch size by default; z-scores on training images and without their mean, a constant that moves no ranking; mu and
    sigma averaged over batches.
    """

    # Patch size: pixels seen, stride, hidden layers (width / `width`, kernel, stride, pooling 2x2), kernel of the last.
    NETS = {
        17: (17, 4, [(1, 5, 2, 0), (2, 3, 1, 0), (2, 3, 2, 0)], 2),
        33: (32, 4, [(1, 5, 1, 1), (2, 5, 1, 1), (2, 2, 1, 0)], 4),
        65: (60, 8, [(1, 5, 1, 1), (1, 5, 1, 1), (1, 5, 1, 1), (2, 4, 1, 0)], 1),
    }
    recipe = Recipe(batch_size=4, lr=1e-3)
    paper = {
        "backbone": "resnet18",
        "fields": (17, 33, 65),
        "width": 128,
        "epochs": 100,
        "batch_size": 1,
        "lr": 1e-4,
        "weight_decay": 1e-5,
        "optimizer": "adam",
        "schedule": "constant",
    }

    def __init__(self, *, backbone="efficientnet_lite2", weights="default", size=256, fields=(33,), width=32):
        super().__init__(size)
        at_least(4, width=width)
        require(fields and set(fields) <= set(self.NETS), f"fields={fields} must be a choice of 17, 33 and 65.")
        self.backbone = Backbone(backbone, weights)
        channels = sum(self.backbone.channels)
        self.teachers = nn.ModuleList(self.patch_net(field, width) for field in fields)
        self.decoders = nn.ModuleList(nn.Conv2d(128, channels, 1) for _ in fields)
        self.norms = nn.ModuleList(nn.BatchNorm2d(128, affine=False, momentum=None) for _ in fields)  # mu, sigma
        self.students = nn.ModuleList(nn.ModuleList(self.patch_net(field, width) for _ in range(3)) for field in fields)
        self.standardize = Standardize(channels)
        self.register_buffer("spread", torch.ones(len(fields), 2))  # std of e and of v on normal images
        self.to(memory_format=torch.channels_last)  # by a third faster on a CPU

    def patch_net(self, field, width):
        """A CNN of S / stride descriptors a side, each centred on its cell of stride x stride pixels.

        The poolings of 33 and 65 drop a border of a lone patch, so that they in fact see 32 and 60 pixels.
        """
        seen, stride, hidden, last_kernel = self.NETS[field]
        before, after = (seen - stride) // 2, (seen - stride + 1) // 2
        layers = [nn.ReflectionPad2d((before, after) * 2)]
        inp = 3
        for multiple, kernel, step, pooling in hidden:
            out = multiple * width
            layers += [nn.Conv2d(inp, out, kernel, step), nn.BatchNorm2d(out), nn.LeakyReLU(5e-3)]
            if pooling:
                layers.append(nn.MaxPool2d(2))
            inp = out
        return nn.Sequential(*layers, nn.Conv2d(inp, 128, last_kernel))  # the descriptor itself is linear

    def stages(self):
        teaching = [*self.teachers.parameters(), *self.decoders.parameters()]
        return [("teacher", teaching), ("students", list(self.students.parameters()))]

    def frozen_features(self, images, size):
        return torch.cat([bilinear(level, size) for level in self.backbone(images)], 1)

    def calibrate(self, batches):
        self.standardize.fit(torch.cat([self.frozen_features(images, 16) for images in batches]))
        for norm in self.norms:  # mu and sigma are those of the teacher to come, not of an earlier training's as well
            norm.reset_running_stats()

    def loss(self, batch, stage):
        (images,) = batch
        return self.teacher_loss(images) if stage == "teacher" else self.student_loss(images)

    def teacher_loss(self, images):
        images, _ = paste_textures(images, procedural_textures(images))
        total = 0.0
        for teacher, decoder in zip(self.teachers, self.decoders):
            y = teacher(images)
            target = self.standardize(self.frozen_features(images, y.shape[-2:]))
            correlation = correlations(y)
            compactness = correlation.abs().mean() - 1 / len(correlation)  # without the diagonal
            total = total + F.mse_loss(decoder(y).float(), target) + compactness
        return total

    def student_loss(self, images):
        self.teachers.eval()  # trained: its BatchNorm must not go on moving
        losses = [(s - y).square().sum(2).mean() for y, s in self.descriptors(images)]
        return sum(losses) / len(losses)

    def descriptors(self, images):
        """-> for each patch size the teacher's, standardized (B,128,h,w), and the students' (3,B,128,h,w)"""
        for teacher, norm, students in zip(self.teachers, self.norms, self.students):
            with torch.no_grad():
                y = teacher(images).float()
                if norm.training:
                    norm(y)  # its running mean and variance go on; the target is by those, as in scoring
                y = F.batch_norm(y, norm.running_mean, norm.running_var)
            yield y, torch.stack([student(images).float() for student in students])

    def errors(self, images):
        """-> for each patch size e and v (2,B,h,w)"""
        for y, s in self.descriptors(images):
            e = (s.mean(0) - y).square().sum(1)
            v = s.var(0, unbiased=False).sum(1)
            yield torch.stack([e, v])

    def fit_statistics(self, batches):
        found = [[x.flatten(1) for x in self.errors(images)] for (images,) in batches()]
        self.spread = torch.stack([torch.cat(one, 1).std(1) for one in zip(*found)]) + 1e-12

    def score(self, batch):
        total = 0.0
        for errors, spread in zip(self.errors(batch[0]), self.spread):
            z = errors / spread.view(2, 1, 1, 1)
            total = total + upsample(z.sum(0), self.size)
        maps = total / len(self.teachers)
        return maps, maps.amax((1, 2))


class MKD(Method):
    """A small network clones what a frozen one computes on normal images, at several depths; on a defect they part.
    With the source's and the clone's activations a_l and b_l of level l, flattened over the whole image:

        L = sum_l (1 - cos(a_l, b_l)) + lambda |a_l - b_l|^2 / N_l,   map = open(blur(|dL/dx|)),   score = L

    Salehi et al., CVPR 2021 (multiresolution knowledge distillation), section 3. Theirs: VGG-16 and a clone with few
    channels and BatchNorm, in their code of 343,984 parameters, at the strides 8, 16 and 32; lambda makes the two terms
    alike; images in [0,1] as they are, where ours are standardized as the backbone expects; Adam 1e-3, batch 64; the
    gradient of the loss with respect to the image (through both networks) localises, summed over channels, smoothed and
    then opened morphologically. Ours: the last three levels of any backbone; lambda = 1; opened as a grey map, and not
    scaled image by image, which would make images incomparable.
    standardize: each channel over normal images, so that no large channel owns both terms; the clone's levels have no
    ReLU then.
    """

    capturable = True
    recipe = Recipe(epochs=30, batch_size=16, lr=3e-3, optimizer="adam", weight_decay=0.0)
    paper = {
        "backbone": "vgg16",
        "standardize": False,
        "weight": 0.5,  # this and the epochs as in its code, for MVTec AD
        "epochs": 601,
        "batch_size": 64,
        "lr": 1e-3,
        "schedule": "constant",
    }

    def __init__(
        self, *, backbone="efficientnet_lite2", weights="default", size=128, width=16, weight=1.0, standardize=True
    ):  # fmt: skip
        super().__init__(size)
        require(size % 32 == 0, f"size={size} must be a multiple of 32, the largest stride.")
        at_least(4, width=width)
        at_least(0, weight=weight)
        self.weight = weight
        self.backbone = Backbone(backbone, weights, levels=3)
        self.clone = nn.ModuleList()
        inp, side = 3, 64
        level = torch.zeros(1, inp, side, side)
        for i, stage in enumerate(self.backbone.stages):  # one block a level
            level = stage(level)
            layers = []
            for out in [width] * (1 if i < 2 else 2):
                layers += Conv2dNormActivation(inp, out)  # 3x3, BatchNorm, ReLU
                inp = out
            out = level.shape[1] if i or len(self.backbone.stages) < 4 else width  # of four the first is not compared
            layers += [nn.Conv2d(inp, out, 3, padding=1, bias=False), nn.Identity() if standardize else nn.ReLU()]
            self.clone.append(nn.Sequential(*layers, nn.MaxPool2d(side // level.shape[-1])))
            inp, side = out, level.shape[-1]
        self.standardize = nn.ModuleList(Standardize(channels, on=standardize) for channels in self.backbone.channels)

    def clone_levels(self, images):
        """-> what the clone has for the levels of the backbone"""
        x, levels = self.backbone.normalize(images), []
        for block in self.clone:
            x = block(x)
            levels.append(x)
        return levels[-3:]

    def standardized(self, levels):
        return [standardize(level) for standardize, level in zip(self.standardize, levels)]

    def calibrate(self, batches):
        images = torch.cat(list(batches))
        levels = self.backbone(images[:: math.ceil(len(images) / 64)])  # of all categories, which lie one after another
        for standardize, level in zip(self.standardize, levels):
            standardize.fit(level)

    def prepare(self, images):
        return (images, *self.standardized(self.backbone(images)))

    def errors(self, source, clone):
        """L of each image (B,)"""
        total = 0.0
        for a, b in zip(source, clone):
            a, b = a.flatten(1), b.float().flatten(1)
            total = total + 1 - F.cosine_similarity(a, b)
            total = total + self.weight * (a - b).square().mean(1)
        return total

    def loss(self, batch, stage):
        images, *source = batch
        return self.errors(source, self.clone_levels(images)).mean()

    @in_float32
    def score(self, batch):
        with torch.inference_mode(False), torch.enable_grad():
            images = batch[0].clone().requires_grad_()  # a copy: what inference_mode gave takes no gradient
            source = self.standardized(self.backbone(images))
            scores = self.errors(source, self.clone_levels(images))
            (gradient,) = torch.autograd.grad(scores.sum(), images)
        maps = gaussian_blur(gradient.abs().sum(1), 4.0, 16)
        eroded = -F.max_pool2d(-maps, 3, 1, 1)
        return F.max_pool2d(eroded, 3, 1, 1), scores.detach()


# ---------------------------------------------------------------------------------------------------------------------
# Tasks and defects made from normal images


class PatchSVDD(Method):
    """Patches are embedded so that neighbours lie close and still tell where they come from; a defective patch is far
    from every normal one. With h the embedding of a patch, h' of one a few pixels off, h" of one in direction c of 8:

        loss = CE(g(h" - h), c) + lambda |h - h'|,   score of a patch = min over normal patches n of |h - h_n|

    Yi and Yoon, ACCV 2020, section 3. Theirs: two patch sizes, the embedding of 64x64 made of four of 32x32; 64-d; a
    pixel's score is the mean over patches that cover it, the two sizes' maps are multiplied, and the maximum is the
    image's; lambda per category; Adam 1e-4; 256x256; strides 4 and 16; all training patches are searched by an
    approximate index. Ours: one lambda; one-cycle; He's initial weights; an exact search among `memory` random
    training patches a size; the convolutions have no padding, so the patches of an image are embedded in one pass,
    equal to patch by patch.
    pairs: of each size, drawn from an image in a step. The two sizes need images of 128 pixels or more.
    """

    STRIDES = {32: 4, 64: 16}
    capturable = True
    recipe = Recipe(epochs=30, lr=1e-3, optimizer="adam", weight_decay=0.0)
    paper = {
        "epochs": 7500,  # theirs: 300, each with 100 pairs of an image, 64 a step; ours has 4, so 25 times as many
        "batch_size": 16,
        "lr": 1e-4,
        "schedule": "constant",
    }

    def __init__(self, *, size=256, width=64, pairs=4, weight=0.01, memory=20000):
        super().__init__(size)
        require(size >= 128, f"size={size} must be at least 128: it compares patches of 64 with their neighbours.")
        at_least(4, width=width)
        at_least(1, pairs=pairs, memory=memory)
        at_least(0, weight=weight)
        self.pairs, self.weight, self.memory = pairs, weight, memory
        half, twice = width // 2, 2 * width
        layers, inp, stride = [], 3, 2
        for out in (half, width, twice, twice, width, half, half, 64):
            layers += [nn.Conv2d(inp, out, 3, stride), nn.LeakyReLU(0.1)]  # 32 pixels -> 1
            inp, stride = out, 1
        self.small = nn.Sequential(*layers[:-1], nn.Tanh())
        for layer in self.small[::2]:  # PyTorch's own, smaller weights fade over eight layers: all patches look alike
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.join_in = nn.Conv2d(64, 128, 2)
        self.join_out = nn.Conv2d(128, 64, 1)
        leaky = partial(nn.LeakyReLU, 0.1)
        self.classifiers = nn.ModuleList(
            MLP(64, [128, 128, 8], activation_layer=leaky, inplace=None) for _ in self.STRIDES
        )
        self.register_buffer("bank_32", torch.zeros(0, 64))
        self.register_buffer("bank_64", torch.zeros(0, 64))

    def join(self, h, dilation):
        """Four embeddings of 32x32, `dilation` cells apart, to one of 64x64."""
        h = F.conv2d(h, self.join_in.weight, self.join_in.bias, dilation=dilation)
        return torch.tanh(self.join_out(F.leaky_relu(h, 0.1)))

    def encode(self, patches):
        """(n,3,32,32) or (n,3,64,64) -> (n,D)"""
        if patches.shape[-1] == 32:
            return self.small(patches).flatten(1)
        quarters = patches.unfold(2, 32, 32).unfold(3, 32, 32)  # (n,3,2,2,32,32)
        quarters = quarters.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
        h = self.small(quarters).view(len(patches), 2, 2, -1)
        return self.join(h.permute(0, 3, 1, 2), 1).flatten(1)

    def encode_all(self, images):
        """(B,3,S,S) -> the embedding of the patch at every stride, (B,D,g,g), of 32x32 and of 64x64."""
        h = self.small(images - 0.5)  # stride 2
        return h[..., ::2, ::2], self.join(h, 16)[..., ::8, ::8]

    def draw_patches(self, images, side):
        """n patches, then n a few pixels beside them, then n neighbours of the first: (3n,3,side,side), directions
        of the neighbours (n,)."""
        room = self.size - side
        which = torch.arange(len(images), device=images.device).repeat_interleave(self.pairs)
        label = torch.randint_like(which, 8)
        cell = label + (label > 3)  # of 3x3 without the one in the middle
        direction = torch.stack([cell // 3, cell % 3], 1) - 1
        distance = side * uniform(which, 0.75, 1, 2).flatten(1)
        step = (direction * distance).round().long()
        low, high = (-step).clamp_min(0), room - step.clamp_min(0)  # where both fit
        anchor = low + (uniform(which, 0, 1, 2).flatten(1) * (high - low + 1)).long()  # a sum in float may round up
        shift = torch.randint_like(step, -(side // 32), side // 32 + 1)
        near = (anchor + shift).clamp(0, room)
        rows, columns = torch.cat([anchor, near, anchor + step]).T
        windows = images.unfold(2, side, 1).unfold(3, side, 1)  # a view: (B,3,room+1,room+1,side,side)
        patches = windows[which.repeat(3), :, rows, columns]
        # A colour cast per patch: else the position could be told from the illumination.
        cast = 0.02 * torch.randn(len(patches), 3, 1, 1, device=images.device)
        return patches - 0.5 + cast, label

    def loss(self, batch, stage):
        (images,), total = batch, 0.0
        for side, classifier in zip(self.STRIDES, self.classifiers):
            patches, label = self.draw_patches(images, side)
            h, close, neighbour = self.encode(patches).float().chunk(3)
            total = total + F.cross_entropy(classifier(neighbour - h).float(), label)
            total = total + self.weight * (h - close).norm(dim=1).mean()
        return total

    @in_float32
    def fit_statistics(self, batches):
        count = sum(len(images) for (images,) in batches())
        share = max(1, self.memory // count)
        generator = torch.Generator().manual_seed(0)

        def sample(h):
            h = to_tokens(h)  # (B,P,D)
            chosen = torch.randperm(h.shape[1], generator=generator)[:share]
            return h[:, chosen.to(h.device)].flatten(0, 1)

        found = [[sample(h) for h in self.encode_all(images)] for (images,) in batches()]
        self.bank_32, self.bank_64 = map(torch.cat, zip(*found))

    @staticmethod
    def nearest(h, bank):
        """Distance of each patch to the nearest one in memory: (B,D,g,g), (M,D) -> (B,g,g).

        |h - n|^2 = |h|^2 + |n|^2 - 2 h'n, by pieces of the memory that stay in the processor's cache.
        """
        x = to_tokens(h).flatten(0, 1)  # (B g g, D)
        best = torch.inf
        for part in bank.split(256):
            found = torch.addmm(part.square().sum(1), x, part.T, alpha=-2).amin(1)
            best = found.clamp(max=best)
        squared = best + x.square().sum(1)
        return squared.clamp_min(0).sqrt().view(len(h), *h.shape[2:])

    def paint(self, scores, side):
        """Scores of the patches (B,g,g) -> (B,S,S): each pixel's mean over the patches that cover it."""
        both = torch.stack([scores, torch.ones_like(scores)], 1)
        patch = scores.new_ones(2, 1, side, side)
        total, count = F.conv_transpose2d(both, patch, stride=self.STRIDES[side], groups=2).unbind(1)
        return upsample(total / count, self.size)  # changes nothing where the strides end at the border, as at 256

    @in_float32
    def score(self, batch):
        small, large = self.encode_all(batch[0])
        small = self.paint(self.nearest(small, self.bank_32), 32)
        large = self.paint(self.nearest(large, self.bank_64), 64)
        maps = small * large
        return maps, maps.amax((1, 2))


class CutPaste(Method):
    """A network tells normal images from those with a piece of themselves pasted elsewhere; in its embedding real
    defects are as far from normal as these. With m the mean of the features a_p over positions p of the last map:

        loss = CE(normal | patch | scar),   score d = sqrt((m - mu)' P (m - mu)),   P = covariance^-1

    Li et al., CVPR 2021, sections 2 and 3. Theirs: ResNet-18 from random weights with an MLP head; patch of 2-15 % of
    the area and aspect 0.3-3.3; scar of 2-16 x 10-25 pixels at +-45 degrees; colour jitter 0.1; SGD 0.03, momentum
    0.9, cosine, batch 64, 256 epochs of 256 steps whatever the number of images; 256x256; Gaussian density; Grad-CAM,
    or a patch model, localises. Ours: any backbone, trained on from ImageNet weights (weights = none:
    from random ones, the paper's way); by default an epoch passes each image once; the covariance is shrunk, as there
    are fewer images than channels; colour jitter = a random gain of each channel and of the contrast.
    Grad-CAM has a closed form here: the weights are the gradient of d^2 / 2, P (m - mu), equal at all positions, and
    (a_p - mu)' P (m - mu) has the mean d^2 over p. Its positive part is the map.
    """

    recipe = Recipe(epochs=30, batch_size=16, lr=0.01, weight_decay=3e-5, optimizer="sgd", clip=1.0)
    paper = {
        "backbone": "resnet18",
        "weights": "none",
        "epochs": 256,
        "steps": 256,
        "batch_size": 64,
        "lr": 0.03,
        "schedule": "cosine",
        "clip": 0.0,
    }

    def __init__(self, *, backbone="efficientnet_lite2", weights="default", size=256):
        super().__init__(size)
        net = Backbone(backbone, weights, fuse=False)
        channels = net.channels[-1]
        self.encoder = nn.Sequential(net.normalize, *net.stages).requires_grad_(True)  # (B,3,S,S) -> (B,C,h,w)
        self.head = nn.Sequential(nn.Linear(channels, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 3))
        self.register_buffer("mean", torch.zeros(1, channels))
        self.register_buffer("whiten", torch.eye(channels)[None])

    @staticmethod
    def paste(images, sides, angle):
        """Copies a random rectangle of `sides` (B,2,1,1), width and height in pixels, to another place, turned by
        `angle` (B,1,1,1)."""
        size = images.shape[-1]
        # Both the upright source and the box around the turned target lie inside the image.
        box = angle.cos() * sides + angle.sin().abs() * sides.flip(1)
        origin = sides / 2 + uniform(images, 0, 1, 2) * (size - sides)
        target = box / 2 + uniform(images, 0, 1, 2) * (size - box)
        grid = turned_grid(target, angle, size)
        inside = (grid.abs() < sides / 2).all(1, keepdim=True)
        source = (grid + origin).permute(0, 2, 3, 1) / size * 2 - 1
        piece = F.grid_sample(images, source, mode="nearest", padding_mode="border", align_corners=False)
        gain = 1 + uniform(images, -0.1, 0.1, 3)
        contrast = 1 + uniform(images, -0.1, 0.1)
        grey = images.mean((1, 2, 3), keepdim=True)
        piece = (piece * gain - grey) * contrast + grey
        return torch.where(inside, piece.clamp(0, 1), images)

    @staticmethod
    def patch_sides(images):
        """(B,2,1,1): area U(0.02, 0.15) of the image, aspect from (0.3, 1) or (1, 3.3)."""
        aspect = torch.where(half_of(images), uniform(images, 1, 3.3), uniform(images, 0.3, 1))
        area = uniform(images, 0.02, 0.15) * images.shape[-1] ** 2
        return torch.cat([area * aspect, area / aspect], 1).sqrt()

    @staticmethod
    def scar_sides(images):
        """(B,2,1,1): 2 to 16 pixels wide, 10 to 25 long, in an image of 256."""
        sides = torch.cat([uniform(images, 2, 16), uniform(images, 10, 25)], 1)
        return sides * images.shape[-1] / 256

    def loss(self, batch, stage):
        (images,) = batch
        patch = self.paste(images, self.patch_sides(images), images.new_zeros(1, 1, 1, 1))
        angle = uniform(images, -math.pi / 4, math.pi / 4)
        scar = self.paste(images, self.scar_sides(images), angle)
        embedding = self.encoder(torch.cat([images, patch, scar])).mean((2, 3))
        kind = torch.arange(3, device=images.device).repeat_interleave(len(images))
        return F.cross_entropy(self.head(embedding).float(), kind)

    @in_float32
    def fit_statistics(self, batches):
        self.mean, covariance = gaussians(self.encoder(images).mean((2, 3))[:, None] for (images,) in batches())
        diagonal = covariance.diagonal(dim1=1, dim2=2)
        diagonal.add_(0.1 * diagonal.mean() + 1e-12)
        self.whiten = whitening(covariance)

    @in_float32
    def score(self, batch):
        features = self.encoder(batch[0])
        z = (features.mean((2, 3)) - self.mean) @ self.whiten[0].T
        weights = z @ self.whiten[0]  # P (m - mu)
        deviation = features - self.mean[0, :, None, None]
        cam = torch.einsum("bchw,bc->bhw", deviation, weights)
        return upsample(cam.clamp_min(0), self.size), z.norm(dim=1)


class DRAEM(Method):
    """One network removes pasted textures, a second one marks them by comparing image and reconstruction. What it
    learns is how far a region is from normal, so it marks other defects as well. R, D the networks, I' = I with
    textures in mask M:

        loss = |R(I') - I|^2 + (1 - SSIM(R(I'), I)) + focal(D(I', R(I')), M),   map = softmax(D)_defect

    Zavrtanik et al., ICCV 2021, section 3. Theirs: an encoder-decoder of base width 128 and a U-Net of 64, 97,422,725
    parameters; Perlin masks, beta ~ U(0, 0.8), half of the images clean, textures from DTD under random colour
    changes; normal images rotated at random; Adam 1e-4, times 0.2 after 80 and 90 % of 700 epochs, batch 8; 256x256;
    score = max of the 21x21 average-pooled map. Ours: width 16 and half of it; textures from `textures`, a folder of
    images, mirrored at random, or without one generated; no rotation; one-cycle.
    """

    recipe = Recipe(epochs=60, lr=2e-3)
    paper = {
        "width": 128,
        "epochs": 700,
        "lr": 1e-4,
        "weight_decay": 0.0,
        "optimizer": "adam",
        "schedule": "two-step",
    }

    def __init__(self, *, size=256, width=16, textures=None):
        super().__init__(size)
        require(size % 32 == 0 and size > 32, f"size={size} must be a multiple of 32 above it: five halvings.")
        at_least(4, width=width)
        self.textures, self.files = textures, []
        widths = [width * m for m in (1, 2, 4, 8, 8)]
        ups = list(zip(widths[:4], [width, *widths]))
        self.restorer = UNet(3, 3, widths, ups, skips=False, pool=True)
        widths = [width // 2 * m for m in (1, 2, 4, 8, 8, 8)]
        ups = [(w, w) for w in (widths[0], *widths[:4])]
        self.marker = UNet(6, 2, widths, ups, pool=True)
        self.to(memory_format=torch.channels_last)  # by a third faster on a CPU

    def stages(self):
        """Finds the images in the folder of textures, which only training needs. Raises MethodError."""
        if self.textures:
            self.files = sorted(p for p in Path(self.textures).rglob("*") if is_image_file(p.name) and p.is_file())
            require(self.files, f"textures={self.textures} holds no image: name a folder of PNG or JPEG.")
        return super().stages()

    def draw_textures(self, images):
        """-> (B,3,S,S) in [0,1], one for each image"""
        if not self.files:
            return procedural_textures(images)
        chosen = [self.read_texture(self.files[i]) for i in torch.randint(len(self.files), (len(images),))]
        textures = torch.stack(chosen).to(images.device) / 255
        return torch.where(half_of(images), textures, textures.flip(-1))

    def read_texture(self, path):
        try:
            return pil_to_tensor(pil_loader(path).resize((self.size, self.size)))
        except Exception as error:  # Pillow has many for a damaged file
            raise MethodError(f"textures: {path} cannot be read ({error}): take it out.") from None

    def restore_and_mark(self, images):
        """-> reconstruction (B,3,S,S), logits (B,2,S,S)"""
        restored = self.restorer(images)
        return restored, self.marker(torch.cat([images, restored], 1))

    def loss(self, batch, stage):
        (images,) = batch
        pasted, mask = paste_textures(images, self.draw_textures(images))
        restored, logits = self.restore_and_mark(pasted)
        log_p = logits.log_softmax(1).gather(1, mask.long())  # of the true class
        focal = (-((1 - log_p.exp()) ** 2) * log_p).mean()
        return F.mse_loss(restored, images) + 2 * ssim_error(restored, images).mean() + focal

    def reconstruction(self, batch):
        restored, _ = self.restore_and_mark(batch[0])
        return [(batch[0], restored.clamp(0, 1))]

    def score(self, batch):
        _, logits = self.restore_and_mark(batch[0])
        maps = logits.softmax(1)[:, 1]
        return maps, F.avg_pool2d(maps[:, None], 21, 1, 10).amax((1, 2, 3))


class FCDD(Method):
    """A fully convolutional network whose output map is itself the explanation: near 0 on normal images, large on ones
    with confetti pasted in. With x the network's output at a position and a the mean of A over an image:

        A = sqrt(x^2 + 1) - 1,   loss = a (normal) or -log(1 - exp(-a)) (confetti),   map = A spread by a Gaussian

    Liznerski et al., ICLR 2021, sections 3 and 4. Theirs: VGG-11-BN cut before its fourth pooling, ImageNet weights,
    frozen up to the third, then a 1x1 convolution; half of the images get confetti, squares turned at random and added;
    SGD 1e-3 with Nesterov's momentum, 200 epochs that pass each image ten times, decay 0.985 an epoch; 224x224; A is
    upsampled by a fixed Gaussian over the receptive field; score = sum. Ours: any backbone, all but its last level
    frozen; 1 to 3 squares of 8 to 54 pixels (at 224), one colour each, turned up to 45 degrees, with sharp edges where
    theirs are smoothed; sigma = 1.5 strides with reflected borders, so that the map's mean is a, which is the score:
    their sum up to a factor.
    contrast: local contrast normalization instead of the backbone's own, then the range of normal images to [0,1].
    augment: half of the training images cropped to 14/15, all slightly changed in colour, half with noise.
    """

    recipe = Recipe(batch_size=16, lr=1e-3)
    paper = {
        "backbone": "vgg11_bn",
        "contrast": True,
        "augment": True,
        "epochs": 2000,
        "batch_size": 128,
        "weight_decay": 1e-5,
        "optimizer": "nesterov",
        "schedule": "exponential",
    }

    def __init__(
        self, *, backbone="efficientnet_lite2", weights="default", size=224, contrast=False, augment=False
    ):  # fmt: skip
        super().__init__(size)
        self.contrast, self.augment = contrast, augment
        self.capturable = not augment  # which draws its numbers on the CPU
        self.range = Standardize(3)
        self.augmentation = v2.Compose([
            v2.RandomApply([v2.RandomResizedCrop(size, ((14 / 15) ** 2,) * 2, (1, 1))]),
            v2.RandomChoice([v2.ColorJitter(0.04, 0.04, 0.04, 0.04), v2.ColorJitter(0.005, 5e-4, 5e-4, 5e-4)]),
        ])  # fmt: skip
        self.backbone = Backbone(backbone, weights, levels=1, fuse=False)
        *frozen, last = self.backbone.stages
        self.backbone.stages = nn.ModuleList(frozen)
        if contrast:
            self.backbone.normalize = nn.Identity()
        kept = [layer for layer in last if not isinstance(layer, nn.MaxPool2d)]  # VGG's stage ends in its pooling
        self.tail = nn.Sequential(*kept, nn.Conv2d(self.backbone.channels[-1], 1, 1)).requires_grad_(True)

    @staticmethod
    def confetti(images):
        """Adds 1 to 3 turned squares of random colour to each image, or takes them away where that changes nothing."""
        size, added = images.shape[-1], torch.zeros_like(images)
        count = torch.randint(1, 4, (len(images), 1, 1, 1), device=images.device)
        for i in range(3):
            side = uniform(images, 8, 54) * (size / 224)
            angle = uniform(images, -math.pi / 4, math.pi / 4)
            grid = turned_grid(uniform(images, 0, size, 2), angle, size)
            inside = (grid.abs() < side / 2).all(1, keepdim=True) & (i < count)
            added = added + inside * uniform(images, 0, 1, 3)
        bright = (images + added).clamp(0, 1)
        change = (bright - images).mean((1, 2, 3), keepdim=True)  # none on white, yet labelled defective
        return torch.where(change < 0.025 / 255, (images - added).clamp(0, 1), bright)  # as in the authors' code

    @staticmethod
    def local_contrast(images):
        """(B,3,S,S) less each image's mean, over its mean deviation."""
        x = images - images.mean((1, 2, 3), keepdim=True)
        return x / x.abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-6)

    def calibrate(self, batches):
        if self.contrast:
            x = torch.cat([self.local_contrast(images) for images in batches]).transpose(0, 1).flatten(1)
            low, high = (edge[:, None, None] for edge in x.aminmax(dim=1))
            self.range.mean, self.range.std = low, high - low + 1e-6

    def heat(self, images):
        """(B,3,S,S) -> A (B,1,h,w)"""
        if self.contrast:
            images = self.range(self.local_contrast(images))
        x = self.tail(self.backbone(images)[0]).float()
        return x.square() / ((x.square() + 1).sqrt() + 1)  # sqrt(x^2 + 1) - 1 without its cancellation near 0

    @staticmethod
    def hsc_loss(a, anomalous):
        """Hypersphere classification of images by their mean heat a; anomalous: bool of the same shape."""
        return torch.where(anomalous, -torch.log((-torch.expm1(-a)).clamp_min(1e-9)), a)

    def loss(self, batch, stage):
        (images,) = batch
        anomalous = half_of(images)
        images = torch.where(anomalous, self.confetti(images), images)
        if self.augment:
            images = torch.stack([self.augmentation(image) for image in images])
            noise = torch.randn_like(images) * half_of(images) * images.std((1, 2, 3), keepdim=True) / 10
            images = (images + noise).clamp(0, 1)
        return self.hsc_loss(self.heat(images).mean((2, 3), keepdim=True), anomalous).mean()

    @in_float32
    def score(self, batch):
        heat = self.heat(batch[0])
        cells = heat.shape[-1]
        stride = self.size / cells
        # Turned round, the matrix spreads each cell over the pixels instead of averaging pixels to a cell.
        spread = gaussian_matrix(cells, self.size, 1.5 * stride, round(4.5 * stride), heat.device).T
        maps = both_axes(spread * stride, heat).squeeze(1)
        return maps, heat.mean((1, 2, 3))


METHODS = {
    "us": UninformedStudents,
    "psvdd": PatchSVDD,
    "padim": PaDiM,
    "cutpaste": CutPaste,
    "mkd": MKD,
    "draem": DRAEM,
    "fcdd": FCDD,
}
