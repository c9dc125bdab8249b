"""Twice as large, half as large: plain (nearest neighbour, averaging) or through a FIR filter.

The filtered kind is `upfirdn` of the public StyleGAN2 and NCSN++ networks: insert zeros, pad, filter, keep every n-th
sample. It is written with slices and sums, which XLA fuses into one pass over the image, and which stay in float32 on
hardware that rounds the inputs of its convolutions.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

Images = Float[Array, "batch height width channels"]
Doubled = Float[Array, "batch 2*height 2*width channels"]
Halved = Float[Array, "batch height//2 width//2 channels"]
Kernel = Sequence[float]
Taps = Sequence[float] | np.ndarray


def normalized_taps(kernel: Kernel) -> Float[np.ndarray, "taps"]:
    """The taps of one axis, scaled so that they (and so their outer product, the two-dimensional filter) sum to 1."""
    taps = np.asarray(kernel, np.float64)
    return (taps / taps.sum()).astype(np.float32)


def filter_axis(x: Array, taps: Taps, axis: int, up: int, down: int, pad: tuple[int, int]) -> Array:
    """`upfirdn` along one axis.

    Each sample is followed by `up` - 1 zeros, `pad` = (before, after) zeros go around them (negative ones crop), then
    the true convolution with `taps` where it overlaps fully, of which every `down`-th result is kept.
    """
    padding = [(0, 0, 0)] * x.ndim
    padding[axis] = (pad[0], pad[1] + up - 1, up - 1)
    x = lax.pad(x, jnp.zeros((), x.dtype), padding)
    span = (x.shape[axis] - len(taps)) // down * down + 1
    reversed_taps = [float(tap) for tap in taps[::-1]]
    return sum(tap * lax.slice_in_dim(x, a, a + span, down, axis) for a, tap in enumerate(reversed_taps))  # type: ignore[return-value]


def filter_images(
    x: Images, taps: Taps, *, up: int = 1, down: int = 1, pad: tuple[int, int] = (0, 0)
) -> Float[Array, "batch new_height new_width channels"]:
    """`filter_axis` along height and width: the filter is the outer product of `taps` with itself."""
    for axis in (1, 2):
        x = filter_axis(x, taps, axis, up, down, pad)
    return x


def upsample(x: Images, fir_kernel: Kernel | None) -> Doubled:
    """Height and width doubled: nearest neighbour, or filtered by `fir_kernel` with the mean kept."""
    if fir_kernel is None:
        return x.repeat(2, axis=1).repeat(2, axis=2)
    # Half of the dilated samples are zeros on each axis: the taps make up for it.
    taps = 2 * normalized_taps(fir_kernel)
    p = len(taps) - 2
    return filter_images(x, taps, up=2, pad=((p + 1) // 2 + 1, p // 2))


def downsample(x: Images, fir_kernel: Kernel | None) -> Halved:
    """Height and width (both even) halved: the mean of 2 x 2 pixels, or filtered by `fir_kernel`."""
    if fir_kernel is None:
        batch, height, width, channels = x.shape
        return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))
    taps = normalized_taps(fir_kernel)
    p = len(taps) - 2
    return filter_images(x, taps, down=2, pad=((p + 1) // 2, p // 2))
