"""The NCSN++/DDPM++ family of score networks, here as the velocity of a rectified flow, with k time-embedding heads.

Architecture: "Score-Based Generative Modeling through SDEs" (Song et al., arXiv 2011.13456), appendix H, as in the
public PyTorch checkpoints. Modules are numbered `all_modules_<n>` in the order of PyTorch's `all_modules.<n>`.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from models import layers, resampling
from models.resampling import Images

# The network's labels run from 0.999 to 999: one noise level each.
SIGMA_COUNT = 1000


def sigma_table(sigma_min: float, sigma_max: float) -> Float[np.ndarray, "levels"]:
    """The geometric noise levels from `sigma_max` to `sigma_min` that `scale_by_sigma` and the checkpoints know."""
    return np.exp(np.linspace(np.log(sigma_max), np.log(sigma_min), SIGMA_COUNT))


class NCSNpp(nn.Module):
    """v(x, label) of segment `index`. The fields describe the network; `create_model` checks them.

    Attributes:
      image_size: height and width, divisible by 2^(len(ch_mult) - 1).
      channels: of the images, in and out.
      heads: k, the sets of time-embedding weights.
      fir_kernel: None for plain resampling.
      dtype: that of the computation, "float32" or "bfloat16"; weights, time embedding and velocity are float32 always.
      remat: compute the blocks' activations again in the backward pass instead of keeping them.
      Everything else has the name and meaning it has in configs/default.py.
    """

    image_size: int
    channels: int
    heads: int
    nf: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    attn_resolutions: tuple[int, ...]
    dropout: float
    embedding_type: str
    fourier_scale: float
    conditional: bool
    resblock_type: str
    resamp_with_conv: bool
    fir_kernel: tuple[float, ...] | None
    skip_rescale: bool
    progressive: str
    progressive_input: str
    progressive_combine: str
    nonlinearity: str
    init_scale: float
    scale_by_sigma: bool
    sigma_min: float
    sigma_max: float
    centered: bool
    dtype: str = "float32"
    remat: bool = False

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return self.image_size, self.image_size, self.channels

    @property
    def uses_sigma_table(self) -> bool:
        """Whether `sigma_min` and `sigma_max` change the output: only these networks look noise levels up."""
        return self.scale_by_sigma and self.embedding_type == "positional"

    @nn.compact
    def __call__(
        self,
        x: Images,
        labels: Float[Array | np.ndarray, "batch"],
        index: Int[Array | np.ndarray, "batch"],
        train: bool = False,
    ) -> Images:
        """The velocity dx/dtau.

        Args:
          x: images in the data's scaled range.
          labels: 999 tau, in [0.999, 999].
          index: the segment of each example, in [0, heads).
          train: apply dropout, which needs the "dropout" random stream.

        Raises:
          ValueError: `x` has not the image size or channels that the network was made for.
        """
        if x.shape[1:] != self.image_shape:
            raise ValueError(f"the network takes images of shape {self.image_shape}, got {x.shape[1:]}")
        labels, index = jnp.asarray(labels), jnp.asarray(index)
        names = (f"all_modules_{n}" for n in itertools.count())
        embedding = self._time_embedding(names, labels, index)
        block = _Blocks(self, names, embedding, train)
        x = jnp.asarray(x if self.centered else 2 * x - 1, self.dtype)
        h = self._up(names, block, self._middle(block, self._down(names, block, x))).astype(jnp.float32)
        return h / self._sigmas(labels)[:, None, None, None] if self.scale_by_sigma else h

    def _time_embedding(self, names: Iterator[str], labels, index) -> Array | None:
        if self.embedding_type == "fourier":
            embedding = layers.FourierEmbedding(self.nf, self.fourier_scale, name=next(names))(labels)
        else:
            embedding = layers.positional_embedding(labels, self.nf)
        if not self.conditional:
            return None
        embedding = layers.HeadedDense(4 * self.nf, self.heads, name=next(names))(embedding, index)
        embedding = layers.NONLINEARITIES[self.nonlinearity](embedding)
        return layers.HeadedDense(4 * self.nf, self.heads, name=next(names))(embedding, index)

    def _sigmas(self, labels):
        """The noise level that each label stands for: the label itself in the Fourier family, else from the table."""
        if not self.uses_sigma_table:
            return labels
        return jnp.asarray(sigma_table(self.sigma_min, self.sigma_max), jnp.float32)[labels.astype(jnp.int32)]

    def _down(self, names, block, x: Array) -> list[Array]:
        """Every skip connection, from the input's resolution to the lowest; the last is the trunk."""
        skips = [layers.conv3x3(self.nf, next(names))(x)]
        pyramid = x
        for level, mult in enumerate(self.ch_mult):
            for _ in range(self.num_res_blocks):
                skips.append(block.attended(block.resnet(skips[-1], mult * self.nf)))
            if level == len(self.ch_mult) - 1:
                break
            h = block.resampled(skips[-1], "down")
            if self.progressive_input == "input_skip":
                pyramid = resampling.downsample(pyramid, self.fir_kernel)
                h = layers.Combine(self.progressive_combine, name=next(names))(pyramid, h)
            elif self.progressive_input == "residual":
                pyramid = layers.Downsample(h.shape[-1], True, self.fir_kernel, name=next(names))(pyramid)
                pyramid = h = layers.joined(pyramid, h, self.skip_rescale)
            skips.append(h)
        return skips

    def _middle(self, block, skips: list[Array]) -> tuple[Array, list[Array]]:
        h = skips[-1]
        h = block.attention(block.resnet(h, h.shape[-1]))
        return block.resnet(h, h.shape[-1]), skips

    def _up(self, names, block, trunk: tuple[Array, list[Array]]) -> Array:
        h, skips = trunk
        pyramid: Any = None
        for level, mult in reversed(list(enumerate(self.ch_mult))):
            for _ in range(self.num_res_blocks + 1):
                h = block.resnet(jnp.concatenate([h, skips.pop()], axis=-1), mult * self.nf)
            h = block.attended(h)
            if self.progressive == "output_skip":
                pyramid = self._skip_output(names, block, h, pyramid)
            elif self.progressive == "residual":
                pyramid, h = self._residual_output(names, block, h, pyramid)
            if level > 0:
                h = block.resampled(h, "up")
        return pyramid if self.progressive == "output_skip" else block.output(h, self.channels, self.init_scale)

    def _skip_output(self, names, block, h: Array, pyramid: Array | None) -> Array:
        """The image so far: what the levels below made of it, enlarged, plus this level's own."""
        own = block.output(h, self.channels, self.init_scale)
        return own if pyramid is None else resampling.upsample(pyramid, self.fir_kernel) + own

    def _residual_output(self, names, block, h: Array, pyramid: Array | None) -> tuple[Array, Array]:
        """The features so far and the trunk: at the lowest level a branch of the trunk, above it both are one."""
        if pyramid is None:
            return block.output(h, h.shape[-1], 1.0), h
        pyramid = layers.Upsample(h.shape[-1], True, self.fir_kernel, name=next(names))(pyramid)
        pyramid = layers.joined(pyramid, h, self.skip_rescale)
        return pyramid, pyramid


class _Blocks:
    """Makes and applies the network's repeated parts, each under the next name."""

    def __init__(self, net: NCSNpp, names: Iterator[str], embedding: Array | None, train: bool):
        self.net, self.names, self.embedding, self.train = net, names, embedding, train

    def _kept_or_not(self, block: Any, **static: Any) -> Any:
        """The class `block`, of whose activations the backward pass is given all or, with `remat`, only the inputs."""
        return nn.remat(block, **static) if self.net.remat else block

    def resnet(self, x: Array, features: int, resample: str | None = None) -> Array:
        net = self.net
        return self._kept_or_not(layers.ResnetBlock, static_argnums=(3,))(
            features=features,
            kind=net.resblock_type,
            activation=net.nonlinearity,
            dropout=net.dropout,
            init_scale=net.init_scale,
            rescale=net.skip_rescale,
            embedding_size=4 * net.nf,
            resample=resample,
            fir_kernel=net.fir_kernel,
            name=next(self.names),
        )(x, self.embedding, self.train)

    def attention(self, x: Array) -> Array:
        return self._kept_or_not(layers.Attention)(self.net.init_scale, self.net.skip_rescale, name=next(self.names))(x)

    def attended(self, x: Array) -> Array:
        """`x` through attention where its resolution is one of `attn_resolutions`."""
        return self.attention(x) if x.shape[1] in self.net.attn_resolutions else x

    def resampled(self, x: Array, direction: str) -> Array:
        """`x` twice as large ("up") or half as large ("down")."""
        if self.net.resblock_type == "biggan":
            return self.resnet(x, x.shape[-1], direction)
        layer = layers.Upsample if direction == "up" else layers.Downsample
        name = next(self.names)
        return layer(x.shape[-1], self.net.resamp_with_conv, self.net.fir_kernel, name=name)(x)

    def output(self, x: Array, features: int, scale: float) -> Array:
        """Normalise, activate, convolve: how the trunk becomes an image or a pyramid's lowest level."""
        x = layers.group_norm(x, next(self.names))
        return layers.conv3x3(features, next(self.names), scale)(layers.NONLINEARITIES[self.net.nonlinearity](x))
