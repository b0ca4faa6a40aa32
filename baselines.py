"""Seven methods that reconstruction is compared with, each on the contract of `models.Method`, one class a method.

    frozen features, statistics -> PaDiM           a student fails where its teacher does not -> US, MKD
    self-made tasks and defects -> Patch SVDD, CutPaste, DRAEM, FCDD

Needs torch, torchvision, and models.py for the base class and the backbones; Pillow only to read a folder of textures.
Where a paper trains a network too large for a CPU, its width is an option, and `paper_recipe` restores the paper's.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from models import Backbone, Method, MethodError, Recipe, dissimilarity, gaussian_blur

# ---------------------------------------------------------------------------------------------------------------------
# What several of them share: Gaussians, and random drawing for whole batches on the device


def upsample(maps, size):
    """(B,h,w) -> (B,S,S), bilinear."""
    return F.interpolate(maps[:, None], (size, size), mode="bilinear", align_corners=False).squeeze(1)


def scale_to(maps, score):
    """Scales each map so that its maximum is the image's score (B,): for scores that are not a pooling of the map."""
    return maps * (score / maps.amax((1, 2)).clamp_min(1e-12))[:, None, None]


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


def uniform(low, high, *shape, device):
    return torch.empty(shape, device=device).uniform_(low, high)


def turned_grid(centre, angle, size):
    """Pixel coordinates (n,S,S,2), x then y, relative to `centre` (n,2) and along axes turned by `angle` (n,)."""
    line = torch.arange(size, device=centre.device) + 0.5
    x, y = line - centre[:, 0, None, None], line[:, None] - centre[:, 1, None, None]  # (n,1,S), (n,S,1)
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    return torch.stack([cos * x + sin * y, cos * y - sin * x], -1)


def perlin(frequency, size):
    """Perlin noise (n,S,S), about -1 to 1, with `frequency` (n,2) <= 32 lattice cells along axes turned at random."""
    n, device = len(frequency), frequency.device
    angle = uniform(-math.pi / 2, math.pi / 2, n, device=device)
    grid = turned_grid(torch.full((n, 2), size / 2, device=device), angle, size) / size + 0.75  # within 0 to 1.5
    at = grid * frequency[:, None, None]
    cell, t = at.long(), at.frac()
    slope, image = uniform(0, 2 * math.pi, n, 50, 50, device=device), torch.arange(n, device=device)[:, None, None]

    def corner(dx, dy):
        direction = slope[image, cell[..., 1] + dy, cell[..., 0] + dx]
        return direction.cos() * (t[..., 0] - dx) + direction.sin() * (t[..., 1] - dy)

    fade = t**3 * (t * (6 * t - 15) + 10)
    top, bottom = (torch.lerp(corner(0, dy), corner(1, dy), fade[..., 0]) for dy in (0, 1))
    return 2**0.5 * torch.lerp(top, bottom, fade[..., 1])


def procedural_textures(n, size, device):
    """Random textures (n,3,S,S) in [0,1]: two colours mixed by the sine of Perlin noise (marble), and some grain."""
    noise = perlin(2.0 ** torch.randint(0, 6, (n, 2), device=device), size)[:, None]
    rings, phase = uniform(1, 20, n, 1, 1, 1, device=device), uniform(0, 2 * math.pi, n, 1, 1, 1, device=device)
    dark, light = torch.rand(2, n, 3, 1, 1, device=device)
    mixed = torch.lerp(dark, light, 0.5 + 0.5 * torch.sin(rings * noise + phase))
    grain = uniform(0, 0.2, n, 1, 1, 1, device=device) * torch.randn(n, 1, size, size, device=device)
    return (mixed + grain).clamp(0, 1)


def paste_textures(images, textures):
    """Blends textures into Perlin-shaped regions of half of the images -> (images, mask (B,1,S,S) bool) (DRAEM, 3.3).

    I' = (1 - M) I + M ((1 - beta) A + beta I), beta ~ U(0, 0.8); M = Perlin noise > 0.5, of 1 to 32 cells.
    """
    n, device = len(images), images.device
    mask = perlin(2.0 ** torch.randint(0, 6, (n, 2), device=device), images.shape[-1])[:, None] > 0.5
    mask &= torch.rand(n, 1, 1, 1, device=device) < 0.5
    beta = uniform(0, 0.8, n, 1, 1, 1, device=device)
    return torch.where(mask, torch.lerp(textures, images, beta), images), mask


# ---------------------------------------------------------------------------------------------------------------------
# Statistics of frozen features


class PaDiM(Method):
    """At each position the frozen features of normal images follow a Gaussian; a defect is far from it. No training.

        score(i,j) = sqrt((x - mu_ij)' (Sigma_ij + 0.01 I)^-1 (x - mu_ij))

    Defard et al., ICPR workshops 2021, sections III and IV. Theirs: ResNet-18 or WRN50-2 (layers 1 to 3) at the grid
    of layer 1, S/4 a side; a fixed random choice of 100 of 448 or 550 of 1792 channels; bilinear upsampling, a
    Gaussian of sigma 4, the maximum. Ours: any backbone (its strides 4, 8, 16); dims = 0 means 100 channels, 550
    above 1000, and all up to 256, since an EfficientNet's few are not redundant: choosing 100 of 192 cost 0.02 of
    image AUROC on transistor.
    standardise: divide a channel by its std over normal images, which makes 0.01 mean 1 % of its variance. Mahalanobis'
    distance does not know scale but that constant does: it fits ResNet's ReLU features and no other backbone's.
    """

    recipe = Recipe(size=224, demo={"dims": 100})
    paper_recipe = Recipe(size=224, options={"standardise": False}, demo={"dims": 100})

    def __init__(self, *, backbone="resnet18", weights="default", size=224, dims=0, standardise=True):
        super().__init__()
        self.backbone = Backbone(backbone, weights)
        self.backbone.levels = self.backbone.levels[-3:]  # strides 4, 8, 16 whatever the backbone
        total = sum(self.backbone.channels[-3:])
        dims = min(dims or (total if total <= 256 else 100 if total <= 1000 else 550), total)
        self.size, self.grid, self.standardise = size, size // 4, standardise
        chosen = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:dims].sort().values
        self.register_buffer("chosen", chosen)
        self.register_buffer("scale", torch.ones(dims))
        self.register_buffer("mean", torch.zeros(self.grid**2, dims))
        self.register_buffer("whiten", torch.zeros(0))

    def prepare(self, images):
        return tuple(self.backbone(images))  # before they are resized: a fraction of the memory

    def embed(self, levels):
        """Levels -> (B,L,C): the chosen channels on the finest grid, row by row."""
        levels = [F.interpolate(level, (self.grid, self.grid), mode="nearest") for level in levels]
        return torch.cat(levels, 1)[:, self.chosen].flatten(2).transpose(1, 2) / self.scale

    def calibrate(self, images):
        if self.standardise:
            self.scale = torch.ones_like(self.scale)
            sample = torch.cat([self.embed(self.prepare(x))[:, ::7].flatten(0, 1) for x in images.split(16)])
            self.scale = sample.std(0) + 1e-6

    def stages(self):
        return []

    def fit(self, batches):
        self.mean, covariance = gaussians(self.embed(levels) for levels in batches())
        covariance.diagonal(dim1=1, dim2=2).add_(0.01)
        self.whiten = whitening(covariance)

    def anomaly_map(self, batch):
        x = (self.embed(batch) - self.mean).permute(1, 2, 0)  # (L,C,B)
        distance = (self.whiten @ x).norm(dim=1)  # (L,B)
        return gaussian_blur(upsample(distance.T.unflatten(1, (self.grid, self.grid)), self.size), 4.0, 16)


# ---------------------------------------------------------------------------------------------------------------------
# Students and teachers


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
    patch size by default; z-scores on training images and without their mean, a constant that moves no ranking.
    """

    NETS = {  # patch size: (stride, layers as (width, kernel, stride, pool)), width in units of `width`, 0 = 128
        17: (4, ((1, 5, 2, 0), (2, 3, 1, 0), (2, 3, 2, 0), (0, 2, 1, 0))),
        33: (4, ((1, 3, 1, 1), (2, 5, 1, 1), (2, 2, 1, 0), (0, 4, 1, 0))),
        65: (8, ((1, 5, 1, 1), (1, 5, 1, 1), (1, 5, 1, 1), (2, 4, 1, 0), (0, 1, 1, 0))),
    }
    recipe = Recipe(size=256, epochs=20, batch_size=4, lr=1e-3, demo={"size": 128, "epochs": 12, "width": 16})
    paper_recipe = Recipe(
        size=256, epochs=100, batch_size=1, lr=1e-4, weight_decay=1e-5, optimiser="adam", schedule="constant",
        options={"width": 128, "fields": (17, 33, 65)},
    )  # fmt: skip

    def __init__(self, *, backbone="resnet18", weights="default", fields=(33,), students=3, width=32):
        super().__init__()
        self.backbone, self.fields = Backbone(backbone, weights), tuple(fields)
        channels = sum(self.backbone.channels)
        self.teachers = nn.ModuleList(self.patch_net(field, width) for field in fields)
        self.decoders = nn.ModuleList(nn.Conv2d(128, channels, 1) for _ in fields)
        self.norms = nn.ModuleList(nn.BatchNorm2d(128, affine=False, momentum=None) for _ in fields)  # mu, sigma
        self.students = nn.ModuleList(
            nn.ModuleList(self.patch_net(field, width) for _ in range(students)) for field in fields
        )
        self.register_buffer("frozen_mean", torch.zeros(channels, 1, 1))
        self.register_buffer("frozen_std", torch.ones(channels, 1, 1))
        self.register_buffer("spread", torch.ones(len(fields), 2))  # std of e and of v on normal images
        self.to(memory_format=torch.channels_last)  # by a third faster on a CPU

    def patch_net(self, field, width):
        """A CNN that sees field x field pixels; padded to S / stride descriptors, centre on centre."""
        stride, table = self.NETS[field]
        layers, inp = [nn.ReflectionPad2d(((field - stride) // 2, (field - stride + 1) // 2) * 2)], 3
        for multiple, kernel, step, pool in table:
            out = multiple * width or 128
            layers += [nn.Conv2d(inp, out, kernel, step)]
            if multiple:  # the descriptor itself is linear
                layers += [nn.BatchNorm2d(out), nn.LeakyReLU(5e-3)] + [nn.MaxPool2d(2)] * pool
            inp = out
        return nn.Sequential(*layers)

    def stages(self):
        teaching = [*self.teachers.parameters(), *self.decoders.parameters()]
        return [("teacher", teaching), ("students", list(self.students.parameters()))]

    def target(self, images, size):
        levels = [F.interpolate(f, size, mode="bilinear", align_corners=False) for f in self.backbone(images)]
        return torch.cat(levels, 1)

    def calibrate(self, images):
        sample = torch.cat([self.target(x, (16, 16)) for x in images.split(16)])
        self.frozen_mean = sample.mean((0, 2, 3), keepdim=True)[0]
        self.frozen_std = sample.std((0, 2, 3), keepdim=True)[0] + 1e-6

    def loss(self, batch, stage):
        (images,), total = batch, 0.0
        if stage == "teacher":
            images, _ = paste_textures(images, procedural_textures(len(images), images.shape[-1], images.device))
            for teacher, decoder in zip(self.teachers, self.decoders):
                y = teacher(images)
                target = (self.target(images, y.shape[-2:]) - self.frozen_mean) / self.frozen_std
                correlation = torch.corrcoef(y.float().transpose(0, 1).flatten(1))
                compactness = correlation.abs().mean() - 1 / len(correlation)  # without the diagonal
                total = total + F.mse_loss(decoder(y).float(), target) + compactness
            return total
        self.teachers.eval()  # trained: its BatchNorm must not go on moving
        for teacher, norm, students in zip(self.teachers, self.norms, self.students):
            with torch.no_grad():
                y = norm(teacher(images).float())
            total = total + sum((student(images).float() - y).square().sum(1).mean() for student in students)
        return total / (len(self.fields) * len(students))

    def errors(self, images):
        """-> for each patch size e and v (2,B,h,w)"""
        for teacher, norm, students in zip(self.teachers, self.norms, self.students):
            s, y = torch.stack([student(images) for student in students]), norm(teacher(images))
            yield torch.stack([(s.mean(0) - y).square().sum(1), s.var(0, unbiased=False).sum(1)])

    def fit(self, batches):
        found = zip(*([x.flatten(1) for x in self.errors(images)] for (images,) in batches()))
        self.spread = torch.stack([torch.cat(one, 1).std(1) for one in found]) + 1e-12

    def anomaly_map(self, batch):
        (images,), total = batch, 0.0
        for (e, v), (std_e, std_v) in zip(self.errors(images), self.spread):
            total = total + upsample(e / std_e + v / std_v, images.shape[-1])
        return total / len(self.fields)


class MKD(Method):
    """A small network clones what a frozen one computes on normal images, at several depths; on a defect they part.
    With the source's and the clone's activations a_l and b_l of level l, flattened over the whole image:

        L = sum_l (1 - cos(a_l, b_l)) + lambda |a_l - b_l|^2 / N_l,   map = open(blur(|dL/dx|)),   score = L

    Salehi et al., CVPR 2021 (multiresolution knowledge distillation), section 3. Theirs: VGG-16 and a clone with few
    channels and BatchNorm, four pooled levels; lambda makes the two terms alike; Adam 1e-3, batch 64; the gradient of
    the loss with respect to the image (through both networks) localises, smoothed and then opened morphologically.
    Ours: the levels of any backbone, strides 2 to 16 for VGG; each channel standardised over normal images, so that
    no large channel owns both terms, and lambda = 1; no ReLU at the clone's levels, since other backbones' are
    linear; the gradient is pooled by its largest channel; the map is scaled so that its maximum is L.
    """

    recipe = Recipe(size=128, epochs=30, batch_size=16, lr=3e-3, optimiser="adam", weight_decay=0.0)
    paper_recipe = Recipe(
        size=128, epochs=50, batch_size=64, lr=1e-3, optimiser="adam", weight_decay=0.0, schedule="constant"
    )

    def __init__(self, *, backbone="vgg16", weights="default", width=16, weight=1.0):
        super().__init__()
        self.backbone, self.weight, self.clone = Backbone(backbone, weights), weight, nn.ModuleList()
        sides = [f.shape[-1] for f in self.backbone(torch.zeros(1, 3, 64, 64))]
        inp = 3
        for i, channels in enumerate(self.backbone.channels):
            layers = [] if i == 0 else [nn.ReLU()]
            for out in (width, width, channels):
                layers += [nn.Conv2d(inp, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
                inp = out
            self.clone.append(nn.Sequential(*layers[:-1], nn.MaxPool2d([64, *sides][i] // sides[i])))
        self.register_buffer("frozen_mean", torch.zeros(sum(self.backbone.channels), 1, 1))
        self.register_buffer("frozen_std", torch.ones(sum(self.backbone.channels), 1, 1))

    def forward_through(self, stages, images):
        x = (images - self.backbone.mean) / self.backbone.std
        return [x := stage(x) for stage in stages]

    def standardise(self, levels):
        mean, std = (s.split(self.backbone.channels) for s in (self.frozen_mean, self.frozen_std))
        return [(level - m) / s for level, m, s in zip(levels, mean, std)]

    def calibrate(self, images):
        if images.shape[-1] % 16:
            raise MethodError(f"--size {images.shape[-1]}: the levels of mkd need a multiple of 16.")
        sample = [torch.cat(level) for level in zip(*(self.backbone(x) for x in images[:64].split(16)))]
        self.frozen_mean = torch.cat([level.mean((0, 2, 3)) for level in sample])[:, None, None]
        self.frozen_std = torch.cat([level.std((0, 2, 3)) for level in sample])[:, None, None] + 1e-6

    def prepare(self, images):
        return (images, *self.standardise(self.backbone(images)))

    def errors(self, source, clone):
        """L of each image (B,)"""
        total = 0.0
        for a, b in zip(source, clone):
            a, b = a.flatten(1), b.float().flatten(1)
            total = total + 1 - F.cosine_similarity(a, b) + self.weight * (a - b).square().mean(1)
        return total

    def loss(self, batch, stage):
        images, *source = batch
        return self.errors(source, self.forward_through(self.clone, images)).mean()

    def anomaly_map(self, batch):
        with torch.enable_grad():
            images = batch[0].detach().requires_grad_()
            source = self.standardise(self.forward_through(self.backbone.stages, images))
            score = self.errors(source, self.forward_through(self.clone, images))
            (gradient,) = torch.autograd.grad(score.sum(), images)
        maps = gaussian_blur(gradient.abs().amax(1), 4.0, 16)
        maps = F.max_pool2d(-F.max_pool2d(-maps, 3, 1, 1), 3, 1, 1)  # erosion, then dilation
        return scale_to(maps, score.detach())


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
    The two sizes need images of 128 pixels or more.
    """

    DIRECTIONS = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))
    STRIDES = {32: 4, 64: 16}
    recipe = Recipe(size=256, epochs=30, batch_size=8, lr=1e-3, optimiser="adam", weight_decay=0.0,
                    demo={"size": 128, "epochs": 20, "width": 32, "memory": 10000})  # fmt: skip
    paper_recipe = Recipe(
        size=256, epochs=300, batch_size=64, lr=1e-4, optimiser="adam", weight_decay=0.0, schedule="constant"
    )

    def __init__(self, *, width=64, embedding=64, pairs=4, weight=0.01, memory=20000):
        super().__init__()
        self.pairs, self.weight, self.memory = pairs, weight, memory  # pairs: of each size, an image and step
        layers, inp = [], 3
        for i, out in enumerate((width // 2, width, 2 * width, 2 * width, width, width // 2, width // 2, embedding)):
            layers += [nn.Conv2d(inp, out, 3, stride=1 if i else 2), nn.LeakyReLU(0.1)]  # 32 pixels -> 1
            inp = out
        self.small = nn.Sequential(*layers[:-1], nn.Tanh())
        for layer in self.small[::2]:  # PyTorch's own, smaller weights fade over eight layers: all patches look alike
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.join_in, self.join_out = nn.Conv2d(embedding, 128, 2), nn.Conv2d(128, embedding, 1)
        mlp = lambda: nn.Sequential(
            nn.Linear(embedding, 128), nn.LeakyReLU(0.1), nn.Linear(128, 128), nn.LeakyReLU(0.1), nn.Linear(128, 8)
        )
        self.classifiers = nn.ModuleList(mlp() for _ in self.STRIDES)
        self.register_buffer("directions", torch.tensor(self.DIRECTIONS), persistent=False)
        for side in self.STRIDES:
            self.register_buffer(f"bank_{side}", torch.zeros(0, embedding))

    def join(self, h, dilation):
        """Four embeddings of 32x32, `dilation` cells apart, to one of 64x64."""
        h = F.conv2d(h, self.join_in.weight, self.join_in.bias, dilation=dilation)
        return torch.tanh(self.join_out(F.leaky_relu(h, 0.1)))

    def encode(self, patches):
        """(n,3,32,32) or (n,3,64,64) -> (n,D)"""
        if patches.shape[-1] == 32:
            return self.small(patches).flatten(1)
        quarters = patches.unfold(2, 32, 32).unfold(3, 32, 32).permute(0, 2, 3, 1, 4, 5)  # (n,2,2,3,32,32)
        h = self.small(quarters.flatten(0, 2)).view(-1, 2, 2, self.join_in.in_channels)
        return self.join(h.permute(0, 3, 1, 2), 1).flatten(1)

    def encode_all(self, images):
        """(B,3,S,S) -> {side: (B,D,g,g)}, the embedding of the patch at every stride."""
        h = self.small(images - 0.5)  # stride 2
        return {32: h[..., ::2, ::2], 64: self.join(h, 16)[..., ::8, ::8]}

    def loss(self, batch, stage):
        (images,), total = batch, 0.0
        which = torch.arange(len(images), device=images.device).repeat_interleave(self.pairs)
        n, device = len(which), images.device
        for side, classifier in zip(self.STRIDES, self.classifiers):
            label = torch.randint(8, (n,), device=device)
            step = (self.directions[label] * side * uniform(0.75, 1, n, 2, device=device)).round().long()
            low, high = (-step).clamp_min(0), images.shape[-1] - side - step.clamp_min(0)  # where both fit
            anchor = low + (torch.rand(n, 2, device=device) * (high - low + 1)).long()  # a sum in float may round up
            shift = torch.randint(-(side // 32), side // 32 + 1, (n, 2), device=device)
            near = (anchor + shift).clamp(0, images.shape[-1] - side)
            corner, line = torch.cat([anchor, near, anchor + step]), torch.arange(side, device=device)
            rows, columns = corner[:, 0, None, None] + line[:, None], corner[:, 1, None, None] + line
            patches = images[which.repeat(3)[:, None, None], :, rows, columns].permute(0, 3, 1, 2)
            # A colour cast per patch: else the position could be told from the illumination.
            patches = patches - 0.5 + 0.02 * torch.randn(3 * n, 3, 1, 1, device=device)
            h, close, neighbour = self.encode(patches).float().chunk(3)
            total = total + F.cross_entropy(classifier(neighbour - h).float(), label)
            total = total + self.weight * (h - close).norm(dim=1).mean()
        return total

    def calibrate(self, images):
        if images.shape[-1] < 128:
            raise MethodError(f"--size {images.shape[-1]} is too small: psvdd compares patches of 64, use 128 or more.")

    def fit(self, batches):
        count = sum(len(images) for (images,) in batches())
        generator, found = torch.Generator().manual_seed(0), {side: [] for side in self.STRIDES}
        for (images,) in batches():
            for side, h in self.encode_all(images).items():
                h = h.flatten(2).transpose(1, 2)  # (B,P,D)
                order = torch.randperm(h.shape[1], generator=generator)[: max(1, self.memory // count)]
                found[side].append(h[:, order.to(h.device)].flatten(0, 1))
        self.bank_32, self.bank_64 = (torch.cat(found[side]) for side in self.STRIDES)

    @staticmethod
    def nearest(h, bank):
        """Distance of each patch to the nearest one in memory: (B,D,g,g), (M,D) -> (B,g,g).

        |h - n|^2 = |h|^2 + |n|^2 - 2 h'n, by pieces of the memory that stay in the processor's cache.
        """
        x, best = h.float().flatten(2).transpose(1, 2).flatten(0, 1), torch.inf  # (B g g, D)
        for part in bank.split(256):
            found = torch.addmm(part.square().sum(1), x, part.T, alpha=-2).amin(1)
            best = found.clamp(max=best)
        return (best + x.square().sum(1)).clamp_min(0).sqrt().view(len(h), *h.shape[2:])

    def anomaly_map(self, batch):
        (images,), product = batch, 1.0
        for side, h in self.encode_all(images).items():
            score, ones = self.nearest(h, getattr(self, f"bank_{side}"))[:, None], images.new_ones(1, 1, side, side)
            paint = lambda x: F.conv_transpose2d(x, ones, stride=self.STRIDES[side])  # sum over covering patches
            mean = (paint(score) / paint(torch.ones_like(score))).squeeze(1)
            product = product * upsample(mean, images.shape[-1])  # an exact copy where the strides end at the border
        return product


class CutPaste(Method):
    """A network tells normal images from those with a piece of themselves pasted elsewhere; in its embedding real
    defects are as far from normal as these. With m the mean of the features a_p over positions p of the last map:

        loss = CE(normal | patch | scar),   score d = sqrt((m - mu)' P (m - mu)),   P = covariance^-1

    Li et al., CVPR 2021, sections 2 and 3. Theirs: ResNet-18 from random weights with an MLP head; patch of 2-15 % of
    the area and aspect 0.3-3.3; scar of 2-16 x 10-25 pixels at +-45 degrees; colour jitter 0.1; SGD 0.03, momentum
    0.9, cosine, batch 64; 256x256; Gaussian density; Grad-CAM, or a patch model, localises. Ours: any backbone to
    stride 16, trained on from ImageNet weights (weights = none: from random ones, the paper's way); the covariance is
    shrunk, as there are fewer images than channels; colour jitter = a random gain of each channel and of the
    contrast.
    Grad-CAM has a closed form here: the weights are the gradient of d^2 / 2, P (m - mu), equal at all positions, and
    (a_p - mu)' P (m - mu) has the mean d^2 over p. Its positive part, scaled to the maximum d, is the map.
    """

    recipe = Recipe(size=256, epochs=30, batch_size=16, lr=0.01, optimiser="sgd", weight_decay=3e-5, clip=1.0,
                    demo={"size": 128, "epochs": 8})  # fmt: skip
    paper_recipe = Recipe(
        size=256, epochs=256, batch_size=64, lr=0.03, optimiser="sgd", weight_decay=3e-5, schedule="cosine",
        options={"weights": "none"},
    )  # fmt: skip

    def __init__(self, *, backbone="resnet18", weights="default"):
        super().__init__()
        net = Backbone(backbone, weights)
        self.encoder, c = nn.Sequential(*net.stages).requires_grad_(True), net.channels[-1]
        self.head = nn.Sequential(nn.Linear(c, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 3))
        for name in ("mean", "std"):
            self.register_buffer(f"pixel_{name}", getattr(net, name))
        self.register_buffer("mean", torch.zeros(1, c))
        self.register_buffer("whiten", torch.eye(c)[None])

    @staticmethod
    def paste(images, sides, angle):
        """Copies a random rectangle of `sides` (B,2) pixels, width and height, to another place, turned by `angle`."""
        n, size, device = len(images), images.shape[-1], images.device
        # Both the upright source and the box around the turned target lie inside the image.
        box = angle.cos()[:, None] * sides + angle.sin().abs()[:, None] * sides.flip(1)
        origin, target = (s / 2 + torch.rand(n, 2, device=device) * (size - s) for s in (sides, box))
        grid = turned_grid(target, angle, size)  # (B,S,S,2)
        inside = (grid.abs() < sides[:, None, None] / 2).all(-1)[:, None]
        source = (grid + origin[:, None, None]) / size * 2 - 1
        piece = F.grid_sample(images, source, mode="nearest", padding_mode="border", align_corners=False)
        gain, contrast = (1 + uniform(-0.1, 0.1, n, c, 1, 1, device=device) for c in (3, 1))
        grey = images.mean((1, 2, 3), keepdim=True)
        piece = ((piece * gain - grey) * contrast + grey).clamp(0, 1)
        return torch.where(inside, piece, images)

    @staticmethod
    def patch_sides(n, size, device):
        """(n,2): area U(0.02, 0.15) of the image, aspect from (0.3, 1) or (1, 3.3)."""
        wide = torch.rand(n, device=device) < 0.5
        aspect = torch.where(wide, uniform(1, 3.3, n, device=device), uniform(0.3, 1, n, device=device))
        area = uniform(0.02, 0.15, n, device=device) * size**2
        return torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], 1)

    @staticmethod
    def scar_sides(n, size, device):
        """(n,2): 2 to 16 pixels wide, 10 to 25 long, in an image of 256."""
        sides = [uniform(2, 16, n, device=device), uniform(10, 25, n, device=device)]
        return torch.stack(sides, 1) * (size / 256)

    def features(self, images):
        return self.encoder((images - self.pixel_mean) / self.pixel_std)

    def loss(self, batch, stage):
        (images,) = batch
        n, size, device = len(images), images.shape[-1], images.device
        patch = self.paste(images, self.patch_sides(n, size, device), torch.zeros(n, device=device))
        angle = uniform(-math.pi / 4, math.pi / 4, n, device=device)
        scar = self.paste(images, self.scar_sides(n, size, device), angle)
        logits = self.head(self.features(torch.cat([images, patch, scar])).mean((2, 3)))
        return F.cross_entropy(logits.float(), torch.arange(3, device=device).repeat_interleave(n))

    def fit(self, batches):
        self.mean, covariance = gaussians(self.features(images).mean((2, 3))[:, None] for (images,) in batches())
        diagonal = covariance.diagonal(dim1=1, dim2=2)
        diagonal.add_(0.1 * diagonal.mean() + 1e-12)
        self.whiten = whitening(covariance)

    def anomaly_map(self, batch):
        features = self.features(batch[0])  # (B,C,h,w)
        z = (features.mean((2, 3)) - self.mean) @ self.whiten[0].T
        cam = torch.einsum("bchw,bc->bhw", features - self.mean[0, :, None, None], z @ self.whiten[0])
        return scale_to(upsample(cam.clamp_min(0), batch[0].shape[-1]), z.norm(dim=1))


class EncoderDecoder(nn.Module):
    """Five levels of two 3x3 convolutions with BatchNorm and ReLU, w to 8w wide; with skips it is a U-Net."""

    def __init__(self, inp, out, width, skips):
        super().__init__()
        widths, self.skips = [width, 2 * width, 4 * width, 8 * width, 8 * width], skips
        conv = lambda i, o: (nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
        block = lambda i, o: nn.Sequential(*conv(i, o), *conv(o, o))
        self.down = nn.ModuleList(block(i, o) for i, o in zip([inp, *widths], widths))
        self.up = nn.ModuleList(block(i + o * skips, o) for i, o in zip(widths[:0:-1], widths[-2::-1]))
        self.out = nn.Conv2d(width, out, 3, padding=1)

    def forward(self, x):
        levels = []
        for block in self.down:
            x = block(F.max_pool2d(x, 2) if levels else x)
            levels.append(x)
        for block, level in zip(self.up, levels[-2::-1]):
            x = F.interpolate(x, level.shape[-2:], mode="bilinear", align_corners=False)
            x = block(torch.cat([x, level], 1) if self.skips else x)
        return self.out(x)


class DRAEM(Method):
    """One network removes pasted textures, a second one marks them by comparing image and reconstruction. What it
    learns is how far a region is from normal, so it marks other defects as well. R, D the networks, I' = I with
    textures in mask M:

        loss = |R(I') - I|^2 + (1 - SSIM(R(I'), I)) + focal(D(I', R(I')), M),   map = softmax(D)_defect

    Zavrtanik et al., ICCV 2021, section 3. Theirs: an encoder-decoder of base width 128 and a U-Net of 64, 97 M
    parameters; Perlin masks, beta ~ U(0, 0.8), half of the images clean, textures from DTD under random colour
    changes; normal images rotated at random; Adam 1e-4, batch 8, 700 epochs; 256x256; score = max of the 21x21
    average-pooled map. Ours: five levels in both networks, width 16 and half of it; textures from `textures`, a
    folder of images, mirrored at random, or without one generated; no rotation; one-cycle.
    """

    recipe = Recipe(size=256, epochs=60, batch_size=8, lr=2e-3, demo={"size": 128, "epochs": 30, "width": 8})
    paper_recipe = Recipe(
        size=256, epochs=700, batch_size=8, lr=1e-4, optimiser="adam", weight_decay=0.0, schedule="step",
        options={"width": 128},
    )  # fmt: skip

    def __init__(self, *, width=16, textures=None):
        super().__init__()
        self.textures, self.files = textures, None
        self.restorer = EncoderDecoder(3, 3, width, skips=False)
        self.marker = EncoderDecoder(6, 2, width // 2, skips=True)
        self.to(memory_format=torch.channels_last)  # by a third faster on a CPU

    def calibrate(self, images):
        """Looks for the textures before any work is done. Raises MethodError."""
        if self.textures:
            kinds = (".png", ".jpg", ".jpeg", ".bmp")
            self.files = sorted(f for f in Path(self.textures).rglob("*") if f.suffix.lower() in kinds)
            if not self.files:
                raise MethodError(f"--textures {self.textures} holds no image: name a folder of PNG or JPEG.")

    def draw_textures(self, n, size, device):
        if not self.textures:
            return procedural_textures(n, size, device)
        from PIL import Image  # only here, so that nothing else in this file needs it

        if self.files is None:  # a resumed run
            self.calibrate(None)
        chosen = []
        for i in torch.randint(len(self.files), (n,)):
            with Image.open(self.files[i]) as image:
                pixels = image.convert("RGB").resize((size, size)).tobytes()
            chosen.append(torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(size, size, 3))
        textures = torch.stack(chosen).to(device).permute(0, 3, 1, 2) / 255
        return torch.where(torch.rand(n, 1, 1, 1, device=device) < 0.5, textures, textures.flip(-1))

    def forward(self, images):
        """-> reconstruction (B,3,S,S), logits (B,2,S,S)"""
        restored = self.restorer(images).float()
        return restored, self.marker(torch.cat([images, restored], 1)).float()

    def loss(self, batch, stage):
        (images,) = batch
        pasted, mask = paste_textures(images, self.draw_textures(len(images), images.shape[-1], images.device))
        restored, logits = self(pasted)
        log_p = logits.log_softmax(1).gather(1, mask.long())  # of the true class
        focal = (-((1 - log_p.exp()) ** 2) * log_p).mean()
        return F.mse_loss(restored, images) + 2 * dissimilarity(restored, images).mean() + focal

    def reconstruction(self, batch):
        return [(batch[0], self(batch[0])[0].clamp(0, 1))]

    def anomaly_map(self, batch):
        return self(batch[0])[1].softmax(1)[:, 1]

    def image_score(self, maps):
        return F.avg_pool2d(maps[:, None], 21, 1, 10).amax((1, 2, 3))


class FCDD(Method):
    """A fully convolutional network whose output map is itself the explanation: near 0 on normal images, large on ones
    with confetti pasted in. With x the network's output at a position and a the mean of A over an image:

        A = sqrt(x^2 + 1) - 1,   loss = a (normal) or -log(1 - exp(-a)) (confetti),   map = A spread by a Gaussian

    Liznerski et al., ICLR 2021, sections 3 and 4. Theirs: VGG-11-BN cut before its fourth pooling, ImageNet weights,
    frozen up to the third, then a 1x1 convolution; half of the images get confetti, squares turned at random; SGD 1e-3,
    200 epochs, decay 0.985 an epoch (constant in `paper_recipe`); 224x224; A is upsampled by a fixed Gaussian over the
    receptive field; score = sum. Ours: any backbone, all but its last level frozen; 1 to 3 squares of 8 to 54 pixels
    (at 224), one colour each, turned up to 45 degrees; sigma = 1.5 strides; the score is the map's mean, the sum up to
    a factor and what falls outside.
    """

    recipe = Recipe(size=224, epochs=20, batch_size=16, lr=1e-3, demo={"size": 128})
    paper_recipe = Recipe(size=224, epochs=200, batch_size=128, lr=1e-3, optimiser="sgd", schedule="constant")

    def __init__(self, *, backbone="vgg11_bn", weights="default"):
        super().__init__()
        self.backbone = Backbone(backbone, weights)
        *frozen, last = self.backbone.stages
        self.backbone.stages, self.backbone.levels = nn.ModuleList(frozen), (len(frozen) - 1,)
        kept = [layer for layer in last if not isinstance(layer, nn.MaxPool2d)]  # VGG's stage ends in its pooling
        self.tail = nn.Sequential(*kept, nn.Conv2d(self.backbone.channels[-1], 1, 1)).requires_grad_(True)

    @staticmethod
    def confetti(images):
        """Pastes 1 to 3 turned squares of random colour into each image."""
        n, size, device = len(images), images.shape[-1], images.device
        count = torch.randint(1, 4, (n,), device=device)
        for i in range(3):
            side = uniform(8, 54, n, device=device) * (size / 224)
            angle = uniform(-math.pi / 4, math.pi / 4, n, device=device)
            grid = turned_grid(torch.rand(n, 2, device=device) * size, angle, size)
            inside = (grid.abs() < side[:, None, None, None] / 2).all(-1) & (i < count)[:, None, None]
            images = torch.where(inside[:, None], torch.rand(n, 3, 1, 1, device=device), images)
        return images

    def heat(self, images):
        """(B,3,S,S) -> A (B,1,h,w)"""
        x = self.tail(self.backbone(images)[0]).float()
        return x.square() / ((x.square() + 1).sqrt() + 1)  # sqrt(x^2 + 1) - 1 without its cancellation near 0

    @staticmethod
    def hsc_loss(a, anomalous):
        """Hypersphere classification of the mean heat a (B,): anomalous (B,) bool -> (B,)."""
        return torch.where(anomalous, -torch.log((-torch.expm1(-a)).clamp_min(1e-9)), a)

    def loss(self, batch, stage):
        (images,) = batch
        anomalous = torch.rand(len(images), device=images.device) < 0.5
        images = torch.where(anomalous[:, None, None, None], self.confetti(images), images)
        return self.hsc_loss(self.heat(images).mean((1, 2, 3)), anomalous).mean()

    def anomaly_map(self, batch):
        heat = self.heat(batch[0])
        stride = batch[0].shape[-1] // heat.shape[-1]
        line = torch.arange(9 * stride, device=heat.device) - (9 * stride - 1) / 2
        line = torch.exp(-line.square() / (2 * (1.5 * stride) ** 2))
        kernel = (line[:, None] * line)[None, None]
        maps = F.conv_transpose2d(heat, kernel, stride=stride, padding=4 * stride)  # centre on centre, S pixels
        return upsample(maps.squeeze(1), batch[0].shape[-1])

    def image_score(self, maps):
        return maps.mean((1, 2))


METHODS = {
    "us": UninformedStudents, "psvdd": PatchSVDD, "padim": PaDiM, "cutpaste": CutPaste, "mkd": MKD, "draem": DRAEM,
    "fcdd": FCDD,
}  # fmt: skip
