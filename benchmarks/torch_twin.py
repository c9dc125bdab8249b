"""The network once more, in plain torch.nn: what Flax is held against, and what writes checkpoints for the tests.

It computes in PyTorch's layout, [batch, channels, height, width], with PyTorch's own layers, resamples with one dense
two-dimensional filter, and stores its weights under the names of the public checkpoints. One head; no segments.
"""

import math
from collections import OrderedDict

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

LEARNING_RATE = 1e-4  # of `checkpoint`
ACTIVATIONS = {
    "swish": F.silu,
    "elu": F.elu,
    "relu": F.relu,
    "lrelu": lambda x: F.leaky_relu(x, 0.2),
}


def filter_2d(kernel, gain=1.0):
    """The two-dimensional filter [taps, taps], with sum `gain`."""
    kernel = np.outer(kernel, kernel).astype(np.float64)
    return torch.tensor(kernel / kernel.sum() * gain, dtype=torch.float32)


def upfirdn(x, filter_, up=1, down=1, pad=(0, 0)):
    """Insert zeros, pad, convolve every channel with `filter_`, keep every `down`-th pixel."""
    batch, channels, height, width = x.shape
    dilated = x.new_zeros(batch, channels, height * up, width * up)
    dilated[:, :, ::up, ::up] = x
    padded = F.pad(dilated, (*pad, *pad))
    weight = filter_.flip(0, 1)[None, None].expand(channels, 1, -1, -1)
    return F.conv2d(padded, weight, groups=channels)[:, :, ::down, ::down]


def upsampled(x, kernel):
    """Twice as large: nearest neighbour for `kernel` None, else filtered."""
    if kernel is None:
        return F.interpolate(x, scale_factor=2, mode="nearest")
    p = len(kernel) - 2
    return upfirdn(x, filter_2d(kernel, 4.0), up=2, pad=((p + 1) // 2 + 1, p // 2))


def downsampled(x, kernel):
    """Half as large: averaged for `kernel` None, else filtered."""
    if kernel is None:
        return F.avg_pool2d(x, 2)
    p = len(kernel) - 2
    return upfirdn(x, filter_2d(kernel), down=2, pad=((p + 1) // 2, p // 2))


def norm(channels):
    return nn.GroupNorm(min(channels // 4, 32), channels, eps=1e-6)


def conv3x3(inputs, outputs):
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class Frequencies(nn.Module):
    """Random Fourier features of log(label)."""

    def __init__(self, size, scale):
        super().__init__()
        self.W = nn.Parameter(torch.randn(size) * scale, requires_grad=False)

    def forward(self, labels):
        angles = 2 * math.pi * torch.outer(labels.log(), self.W)
        return torch.cat([angles.sin(), angles.cos()], 1)


def positional(labels, size):
    """Sines and cosines at geometric frequencies from 1 to 1e-4."""
    powers = torch.linspace(0, 1, size // 2, dtype=torch.float64)
    angles = torch.outer(labels, (1e-4**powers).float())
    return torch.cat([angles.sin(), angles.cos()], 1)


class NIN(nn.Module):
    """A dense layer over the channels, stored [in, out]."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.W = nn.Parameter(torch.empty(inputs, outputs))
        self.b = nn.Parameter(torch.zeros(outputs))
        nn.init.xavier_uniform_(self.W)

    def forward(self, x):
        return F.conv2d(x, self.W.T[:, :, None, None], self.b)


def joined(x, y, rescale):
    return (x + y) / math.sqrt(2) if rescale else x + y


class Attention(nn.Module):
    def __init__(self, channels, rescale):
        super().__init__()
        self.GroupNorm_0 = norm(channels)
        self.NIN_0, self.NIN_1, self.NIN_2, self.NIN_3 = (NIN(channels, channels) for _ in range(4))
        self.rescale = rescale

    def forward(self, x):
        h = self.GroupNorm_0(x)
        query, key, value = (layer(h).flatten(2) for layer in (self.NIN_0, self.NIN_1, self.NIN_2))
        weights = torch.softmax(query.transpose(1, 2) @ key / math.sqrt(x.shape[1]), dim=2)
        h = (value @ weights.transpose(1, 2)).reshape(x.shape)
        return joined(x, self.NIN_3(h), self.rescale)


class Combine(nn.Module):
    def __init__(self, inputs, outputs, method):
        super().__init__()
        self.Conv_0 = nn.Conv2d(inputs, outputs, 1)
        self.method = method

    def forward(self, pyramid, h):
        pyramid = self.Conv_0(pyramid)
        return pyramid + h if self.method == "sum" else torch.cat([pyramid, h], 1)


class Resample(nn.Module):
    """Doubles or halves the image, with a convolution where `with_conv`; its name tells whether it is filtered."""

    def __init__(self, direction, inputs, outputs, with_conv, kernel):
        super().__init__()
        self.direction, self.kernel, self.with_conv = direction, kernel, with_conv
        self.name = "Conv_0" if kernel is None else "Conv2d_0"
        if with_conv:
            self.add_module(self.name, nn.Conv2d(inputs, outputs, 3))

    def forward(self, x):
        plain = upsampled if self.direction == "up" else downsampled
        if not self.with_conv:
            return plain(x, self.kernel)
        conv = getattr(self, self.name)
        if self.direction == "up":
            return self._up(x, conv.weight, conv.bias)
        if self.kernel is None:
            return F.conv2d(F.pad(x, (0, 1, 0, 1)), conv.weight, conv.bias, stride=2)
        p = len(self.kernel)
        x = upfirdn(x, filter_2d(self.kernel), pad=((p + 1) // 2, p // 2))
        return F.conv2d(x, conv.weight, conv.bias, stride=2)

    def _up(self, x, weight, bias):
        if self.kernel is None:
            return F.conv2d(upsampled(x, None), weight, bias, padding=1)
        x = F.conv_transpose2d(x, weight.flip(2, 3).transpose(0, 1), stride=2)
        p = len(self.kernel) - 4
        return upfirdn(x, filter_2d(self.kernel, 4.0), pad=((p + 1) // 2 + 1, p // 2 + 1)) + bias[:, None, None]


class ResnetBlock(nn.Module):
    def __init__(self, inputs, outputs, model, kernel, direction=None):
        super().__init__()
        self.act = ACTIVATIONS[model.nonlinearity]
        self.rescale, self.kernel, self.direction = model.skip_rescale, kernel, direction
        self.GroupNorm_0 = norm(inputs)
        self.Conv_0 = conv3x3(inputs, outputs)
        self.Dense_0 = nn.Linear(4 * model.nf, outputs)
        self.GroupNorm_1 = norm(outputs)
        self.Dropout_0 = nn.Dropout(model.dropout)
        self.Conv_1 = conv3x3(outputs, outputs)
        self.shortcut = None
        if model.resblock_type == "ddpm" and inputs != outputs:
            self.shortcut = "NIN_0"
            self.NIN_0 = NIN(inputs, outputs)
        elif model.resblock_type == "biggan" and (inputs != outputs or direction):
            self.shortcut = "Conv_2"
            self.Conv_2 = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x, embedding):
        h = self.act(self.GroupNorm_0(x))
        if self.direction:
            resample = upsampled if self.direction == "up" else downsampled
            h, x = resample(h, self.kernel), resample(x, self.kernel)
        h = self.Conv_0(h)
        if embedding is not None:
            h = h + self.Dense_0(self.act(embedding))[:, :, None, None]
        h = self.Conv_1(self.Dropout_0(self.act(self.GroupNorm_1(h))))
        x = getattr(self, self.shortcut)(x) if self.shortcut else x
        return joined(x, h, self.rescale)


class Twin(nn.Module):
    """The network of a configuration with the sections data and model. forward(x [B,C,H,W], labels [B] = 999 tau).

    The layers are made level by level into `all_modules`; `plan` remembers what each is for, and forward() follows it.
    """

    def __init__(self, config):
        super().__init__()
        self.model, self.data = config.model, config.data
        self.kernel = tuple(self.model.fir_kernel) if self.model.fir else None
        self.act = ACTIVATIONS[self.model.nonlinearity]
        levels = np.linspace(np.log(self.model.sigma_max), np.log(self.model.sigma_min), 1000)
        self.register_buffer("sigmas", torch.tensor(np.exp(levels)))
        self.all_modules = nn.ModuleList()
        self.plan = []
        self._make_embedding()
        self._make_up(*self._make_down())

    def _add(self, role, module):
        self.plan.append(role)
        self.all_modules.append(module)

    def _make_embedding(self):
        nf, fourier = self.model.nf, self.model.embedding_type == "fourier"
        if fourier:
            self._add("frequencies", Frequencies(nf, self.model.fourier_scale))
        if self.model.conditional:
            self._add("dense", nn.Linear(2 * nf if fourier else nf, 4 * nf))
            self._add("dense", nn.Linear(4 * nf, 4 * nf))

    def _block(self, role, inputs, outputs, direction=None):
        self._add(role, ResnetBlock(inputs, outputs, self.model, self.kernel, direction))

    def _attention(self, channels):
        self._add("attention", Attention(channels, self.model.skip_rescale))

    def _resample(self, direction, channels):
        if self.model.resblock_type == "biggan":
            self._block(direction, channels, channels, direction)
        else:
            self._add(direction, Resample(direction, channels, channels, self.model.resamp_with_conv, self.kernel))

    def _make_down(self):
        model, size, pyramid = self.model, self.data.image_size, self.data.num_channels
        self._add("input", conv3x3(pyramid, model.nf))
        channels, skips = model.nf, [model.nf]
        for level, mult in enumerate(model.ch_mult):
            for _ in range(model.num_res_blocks):
                self._block("block", channels, mult * model.nf)
                channels = mult * model.nf
                if size >> level in model.attn_resolutions:
                    self._attention(channels)
                self.plan.append("keep")
                skips.append(channels)
            if level + 1 < len(model.ch_mult):
                self._resample("down", channels)
                if model.progressive_input == "input_skip":
                    self._add("combine", Combine(pyramid, channels, model.progressive_combine))
                    channels *= 2 if model.progressive_combine == "cat" else 1
                elif model.progressive_input == "residual":
                    self._add("combine residual", Resample("down", pyramid, channels, True, self.kernel))
                    pyramid = channels
                self.plan.append("keep")
                skips.append(channels)
        return channels, skips

    def _make_up(self, channels, skips):
        model, colours = self.model, self.data.num_channels
        self._block("block", channels, channels)
        self._attention(channels)
        self._block("block", channels, channels)
        pyramid = None
        for level in reversed(range(len(model.ch_mult))):
            for _ in range(model.num_res_blocks + 1):
                self.plan.append("recall")
                self._block("block", channels + skips.pop(), model.ch_mult[level] * model.nf)
                channels = model.ch_mult[level] * model.nf
            if self.data.image_size >> level in model.attn_resolutions:
                self._attention(channels)
            if model.progressive == "output_skip":
                self._add("skip norm", norm(channels))
                self._add("skip output", conv3x3(channels, colours))
            elif model.progressive == "residual" and pyramid is None:
                self._add("skip norm", norm(channels))
                self._add("skip output", conv3x3(channels, channels))
            elif model.progressive == "residual":
                self._add("output residual", Resample("up", pyramid, channels, True, self.kernel))
            pyramid = channels
            if level > 0:
                self._resample("up", channels)
        if model.progressive != "output_skip":
            self._add("norm", norm(channels))
            self._add("output", conv3x3(channels, colours))

    def _embedding(self, labels, layers):
        if self.model.embedding_type == "fourier":
            embedding = next(layers)(labels)
        else:
            embedding = positional(labels, self.model.nf)
        if not self.model.conditional:
            return None
        first, second = next(layers), next(layers)
        return second(self.act(first(embedding)))

    def forward(self, x, labels):
        layers = iter(self.all_modules)
        embedding = self._embedding(labels, layers)
        x = x if self.data.centered else 2 * x - 1
        state = {"h": x, "in": x, "out": None, "skips": [], "embedding": embedding, "layers": layers}
        for role in self.plan:
            if role not in ("frequencies", "dense"):
                self._step(role, state)
        h = state["out"] if self.model.progressive == "output_skip" else state["h"]
        if self.model.scale_by_sigma:
            fourier = self.model.embedding_type == "fourier"
            sigmas = labels if fourier else self.sigmas[labels.long()].float()
            h = h / sigmas[:, None, None, None]
        return h

    def _step(self, role, s):
        rescale = self.model.skip_rescale
        if role == "recall":
            s["h"] = torch.cat([s["h"], s["skips"].pop()], 1)
            return
        if role == "keep":
            s["skips"].append(s["h"])
            return
        layer = next(s["layers"])
        if role == "input":
            s["h"] = layer(s["h"])
            s["skips"].append(s["h"])
        elif role == "combine":
            s["in"] = downsampled(s["in"], self.kernel)
            s["h"] = layer(s["in"], s["h"])
        elif role == "combine residual":
            s["in"] = s["h"] = joined(layer(s["in"]), s["h"], rescale)
        elif role == "output residual":
            s["out"] = s["h"] = joined(layer(s["out"]), s["h"], rescale)
        elif role == "skip norm":
            s["own"] = self.act(layer(s["h"]))
        elif role == "skip output":
            below = s["out"]
            s["out"] = layer(s["own"]) if below is None else upsampled(below, self.kernel) + layer(s["own"])
        elif role == "norm":
            s["h"] = self.act(layer(s["h"]))
        elif isinstance(layer, ResnetBlock):
            s["h"] = layer(s["h"], s["embedding"])
        else:
            s["h"] = layer(s["h"])


def randomized(twin, seed=0, spread=0.3):
    """`twin` with every trainable weight moved by noise, so that no layer is silent and no two weights are alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in twin.parameters():
            if weight.requires_grad:
                size = spread / math.sqrt(max(1, weight[0].numel())) if weight.ndim > 1 else 0.1 * spread
                weight += size * torch.randn(weight.shape, generator=generator)
    return twin


def checkpoint(twin, *, step=10, updates=3, decay=0.999, prefix="module."):
    """What the public trainer saves: weights, EMA and Adam after `updates` updates on a loss of every output."""
    optimizer = torch.optim.Adam(twin.parameters(), lr=LEARNING_RATE)
    trainable = [weight for weight in twin.parameters() if weight.requires_grad]
    shadow = [weight.detach().clone() for weight in trainable]
    size, colours = twin.data.image_size, twin.data.num_channels
    generator = torch.Generator().manual_seed(1)
    for _ in range(updates):
        x = torch.randn(2, colours, size, size, generator=generator)
        labels = 1 + 998 * torch.rand(2, generator=generator)
        optimizer.zero_grad()
        twin(x, labels).square().mean().backward()
        optimizer.step()
        for kept, weight in zip(shadow, trainable, strict=True):
            kept.lerp_(weight.detach(), 1 - decay)
    return {
        "optimizer": optimizer.state_dict(),
        "model": OrderedDict((prefix + name, value) for name, value in twin.state_dict().items()),
        "ema": {"decay": decay, "num_updates": updates, "shadow_params": shadow},
        "step": step,
    }
