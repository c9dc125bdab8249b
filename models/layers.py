"""The layers of NCSN++ and DDPM++ ("Score-Based Generative Modeling through SDEs", Song et al., arXiv 2011.13456).

Parameter names are those of the public PyTorch networks, so that a checkpoint maps onto them name by name
(torch_checkpoint.py). Images are [batch, height, width, channels] throughout.

Layers compute in the type of the images that they are given, float32 or bfloat16. Weights are float32 and cast where
they are used; the statistics of normalisation, the softmax of attention and the time embedding are float32 always.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from models import resampling
from models.resampling import Images, Kernel
from utils import InputError

Embedding = Float[Array, "batch features"]
JoinedImages = Float[Array, "batch height width joined"]

NONLINEARITIES: dict[str, Callable] = {
    "swish": nn.swish,
    "elu": nn.elu,
    "relu": nn.relu,
    "lrelu": lambda x: nn.leaky_relu(x, 0.2),
}


def weight_init(scale: float = 1.0) -> Callable:
    """Uniform with variance scale / mean(fan in, fan out). A scale of 0 means nearly zero, so that no layer is dead.

    For kernels [height, width, in, out] and [in, out], and [heads, in, out], where each head is a kernel of its own.
    """

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        pixels = math.prod(shape[:-2]) if len(shape) == 4 else 1
        bound = math.sqrt(3 * (scale or 1e-10) / (pixels * (shape[-2] + shape[-1]) / 2))
        # Drawn flat: the CPU compiler (jaxlib 0.10) takes minutes over a dozen draws of several dimensions.
        return jax.random.uniform(key, (math.prod(shape),), dtype, -bound, bound).reshape(shape)

    return init


def _in_type_of_images(*args: Any, **_: Any) -> list[Any]:
    """Images and weights, the weights cast to the images' type: flax alone would take the wider of both."""
    images, *weights = args
    return [images, *(jnp.asarray(weight, images.dtype) for weight in weights)]


def conv3x3(features: int, name: str, scale: float = 1.0, strides: int = 1, padding: Any = 1) -> nn.Conv:
    """A 3 x 3 convolution with bias."""
    init = weight_init(scale)
    return nn.Conv(features, (3, 3), strides, padding, kernel_init=init, promote_dtype=_in_type_of_images, name=name)


def conv1x1(features: int, name: str) -> nn.Conv:
    """A 1 x 1 convolution with bias."""
    return nn.Conv(features, (1, 1), kernel_init=weight_init(), promote_dtype=_in_type_of_images, name=name)


def group_norm(x: Images, name: str) -> Images:
    """`x` through group normalisation of groups of 4 channels, at most 32 groups.

    Raises:
      InputError: the groups do not divide the channels.
    """
    channels = x.shape[-1]
    groups = min(channels // 4, 32)
    if groups == 0 or channels % groups:
        raise InputError(
            f"config.model.nf and ch_mult make a layer of {channels} channels, which {groups} normalisation groups do "
            "not divide; use an nf that is a multiple of 32, or of 4 while no layer has more than 128 channels"
        )
    return nn.GroupNorm(groups, epsilon=1e-6, dtype=x.dtype, name=name)(x)


def joined(x: Images, y: Images, rescale: bool) -> Images:
    """The sum of two branches, divided by sqrt(2) with `rescale`, which keeps the variance."""
    return (x + y) / math.sqrt(2) if rescale else x + y


def positional_embedding(labels: Float[Array, "batch"], features: int) -> Embedding:
    """Sines, then cosines, of `labels` at features // 2 frequencies, geometric from 1 to 1e-4."""
    half = features // 2
    frequencies = jnp.exp(-math.log(10_000) / (half - 1) * jnp.arange(half, dtype=jnp.float32))
    angles = labels[:, None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)


class FourierEmbedding(nn.Module):
    """Sines, then cosines, of log(label) at `features` random frequencies, which are drawn once and never trained.

    They are kept in the parameter "W" because checkpoints store them; no gradient reaches them.
    """

    features: int
    scale: float

    @nn.compact
    def __call__(self, labels: Float[Array, "batch"]) -> Embedding:
        frequencies = lax.stop_gradient(self.param("W", nn.initializers.normal(self.scale), (self.features,)))
        angles = jnp.log(labels)[:, None] * frequencies * (2 * math.pi)
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)


class HeadedDense(nn.Module):
    """A dense layer with `heads` sets of weights; `index` in [0, heads) picks each example's. One head: a plain layer.

    Every head is computed for every example in one product and one is kept: a [batch, in, out] gather of weights would
    cost far more memory than the k - 1 spare rows.
    """

    features: int
    heads: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch inputs"], index: Int[Array, "batch"]) -> Embedding:
        kernel = self.param("head_kernel", weight_init(), (self.heads, x.shape[1], self.features))
        bias = self.param("head_bias", nn.initializers.zeros, (self.heads, self.features))
        if self.heads == 1:
            return x @ kernel[0] + bias[0]
        every = jnp.einsum("bi,kio->bko", x, kernel) + bias
        return jnp.take_along_axis(every, index[:, None, None], axis=1)[:, 0]


class NIN(nn.Module):
    """A dense layer over the channels ("network in network")."""

    features: int
    scale: float = 0.1

    @nn.compact
    def __call__(self, x: Float[Array, "... channels"]) -> Float[Array, "... features"]:
        weight = self.param("W", weight_init(self.scale), (x.shape[-1], self.features))
        bias = self.param("b", nn.initializers.zeros, (self.features,))
        x, weight, bias = _in_type_of_images(x, weight, bias)
        return x @ weight + bias


class Attention(nn.Module):
    """Self-attention over the pixels, one head, as a residual branch."""

    init_scale: float
    rescale: bool

    @nn.compact
    def __call__(self, x: Images) -> Images:
        batch, height, width, channels = x.shape
        h = group_norm(x, "GroupNorm_0").reshape(batch, height * width, 1, channels)
        query, key, value = (NIN(channels, name=f"NIN_{i}")(h) for i in range(3))
        h = jax.nn.dot_product_attention(query, key, value).reshape(x.shape)
        return joined(x, NIN(channels, self.init_scale, name="NIN_3")(h), self.rescale)


class Combine(nn.Module):
    """Joins the input pyramid, brought to h's channels, to h: added ("sum") or in front of it ("cat")."""

    method: str

    @nn.compact
    def __call__(self, pyramid: Float[Array, "batch height width colours"], h: Images) -> JoinedImages:
        pyramid = conv1x1(h.shape[-1], "Conv_0")(pyramid)
        return pyramid + h if self.method == "sum" else jnp.concatenate([pyramid, h], axis=-1)


class Dropout(nn.Module):
    """Sets a share `rate` of the numbers to zero and scales up the rest, by the "dropout" random stream."""

    rate: float

    @nn.compact
    def __call__(self, x: Images) -> Images:
        if self.rate == 0:
            return x
        # Drawn flat for the reason given in `weight_init`.
        keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.rate, (x.size,)).reshape(x.shape)
        return jnp.where(keep, x / (1 - self.rate), 0)


class ConvWeights(nn.Module):
    """The kernel [3, 3, in, out] and the bias of a 3 x 3 convolution of `x` that the caller applies in its own way."""

    features: int

    @nn.compact
    def __call__(self, x: Images):
        kernel = self.param("kernel", weight_init(), (3, 3, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        _, kernel, bias = _in_type_of_images(x, kernel, bias)
        return kernel, bias


def _convolved(x, kernel, *, strides=1, dilation=1, padding=0):
    return lax.conv_general_dilated(
        x, kernel, (strides, strides), [(padding, padding)] * 2, (dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip


class Upsample(nn.Module):
    """Twice as large, with a 3 x 3 convolution to `features` channels where `with_conv`.

    With a FIR kernel the convolution runs on the zero-inserted image, before the filter (StyleGAN2's order).
    """

    features: int
    with_conv: bool
    fir_kernel: Kernel | None

    @nn.compact
    def __call__(self, x: Images) -> Float[Array, "batch 2*height 2*width features"]:
        if not self.with_conv:
            return resampling.upsample(x, self.fir_kernel)
        if self.fir_kernel is None:
            return conv3x3(self.features, "Conv_0")(resampling.upsample(x, None))
        kernel, bias = ConvWeights(self.features, name="Conv2d_0")(x)
        x = _convolved(x, kernel, dilation=2, padding=2)
        taps = 2 * resampling.normalized_taps(self.fir_kernel)
        p = len(taps) - 4
        return resampling.filter_images(x, taps, pad=((p + 1) // 2 + 1, p // 2 + 1)) + bias


class Downsample(nn.Module):
    """Half as large, with a 3 x 3 convolution to `features` channels where `with_conv`.

    With a FIR kernel the image is filtered first, then convolved.
    """

    features: int
    with_conv: bool
    fir_kernel: Kernel | None

    @nn.compact
    def __call__(self, x: Images) -> Float[Array, "batch height//2 width//2 features"]:
        if not self.with_conv:
            return resampling.downsample(x, self.fir_kernel)
        if self.fir_kernel is None:
            return conv3x3(self.features, "Conv_0", strides=2, padding=((0, 1), (0, 1)))(x)
        kernel, bias = ConvWeights(self.features, name="Conv2d_0")(x)
        p = len(self.fir_kernel)
        x = resampling.filter_images(x, resampling.normalized_taps(self.fir_kernel), pad=((p + 1) // 2, p // 2))
        return _convolved(x, kernel, strides=2) + bias


class ResnetBlock(nn.Module):
    """Two convolutions with the time embedding added between them, and a shortcut.

    Attributes:
      kind: "biggan" (resamples inside the block, 1 x 1 convolution as shortcut) or "ddpm" (NIN as shortcut).
      resample: "up", "down" or None; "biggan" only.
      fir_kernel: what `resample` filters with; None for nearest neighbour and averaging.
      embedding_size: channels of the time embedding. A network without time still owns this layer's weights, as its
        public checkpoints do, but does not use them.
    """

    features: int
    kind: str
    activation: str
    dropout: float
    init_scale: float
    rescale: bool
    embedding_size: int
    resample: str | None = None
    fir_kernel: Kernel | None = None

    @nn.compact
    def __call__(
        self, x: Images, embedding: Float[Array, "batch time"] | None, train: bool
    ) -> Float[Array, "batch new_height new_width features"]:
        act, channels = NONLINEARITIES[self.activation], x.shape[-1]
        h = act(group_norm(x, "GroupNorm_0"))
        if self.resample is not None:
            resample = resampling.upsample if self.resample == "up" else resampling.downsample
            h, x = resample(h, self.fir_kernel), resample(x, self.fir_kernel)
        h = conv3x3(self.features, "Conv_0")(h)
        dense = nn.Dense(self.features, kernel_init=weight_init(), name="Dense_0")
        if embedding is not None:
            h += dense(act(embedding)).astype(h.dtype)[:, None, None, :]
        elif self.is_initializing():
            dense(jnp.zeros((1, self.embedding_size)))
        h = act(group_norm(h, "GroupNorm_1"))
        h = Dropout(self.dropout, name="Dropout_0")(h) if train else h
        h = conv3x3(self.features, "Conv_1", self.init_scale)(h)
        if self.kind == "ddpm" and channels != self.features:
            x = NIN(self.features, name="NIN_0")(x)
        elif self.kind == "biggan" and (channels != self.features or self.resample is not None):
            x = conv1x1(self.features, "Conv_2")(x)
        return joined(x, h, self.rescale)
