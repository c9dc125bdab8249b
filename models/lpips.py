"""LPIPS, the distance between images of arXiv 1801.03924, by features of VGG16.

The weights come from two files that the user names; nothing is downloaded. The arithmetic is tested against PyTorch's
with random weights, because the published weights could not be had where it was written.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float

from models.pytorch import file as torch_file
from utils import InputError

SIZE = 224  # the images' height and width, as VGG16 was trained
# Of images in [-1, 1]: with it each channel has mean 0 and deviation 1 over ImageNet.
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
EPS = 1e-10
# Per block: the number in torchvision's `features.<n>` of each 3 x 3 convolution, and its channels. Blocks are parted
# by max pooling; the features that are compared are those at the end of each: relu1_2, 2_2, 3_3, 4_3, 5_3.
BLOCKS = (((0, 2), 64), ((5, 7), 128), ((10, 12, 14), 256), ((17, 19, 21), 512), ((24, 26, 28), 512))

Params = dict[str, Array]


def _vgg_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    before = 3
    for numbers, channels in BLOCKS:
        for number in numbers:
            shapes[f"features.{number}.weight"] = (channels, before, 3, 3)
            shapes[f"features.{number}.bias"] = (channels,)
            before = channels
    return shapes


VGG_SHAPES = _vgg_shapes()
HEAD_SHAPES = {f"lin{n}.model.1.weight": (1, channels, 1, 1) for n, (_, channels) in enumerate(BLOCKS)}


def load_lpips(vgg_path: epath.PathLike, heads_path: epath.PathLike, *, centered: bool) -> Callable[..., Array]:
    """The distance (x [B, H, W, C], y [B, H, W, C]) -> [B] of grey or colour images of any size.

    Args:
      vgg_path: torchvision's VGG16 state dict (vgg16-*.pth), `training.lpips_path`.
      heads_path: the linear heads of the LPIPS package for VGG (lpips/weights/v0.1/vgg.pth), `training.lpips_heads`.
      centered: the images are in [-1, 1], else in [0, 1].

    Raises:
      InputError: a file is missing, damaged, with code in it, or not these weights: a key, shape, type or number.
    """
    params = {name: jnp.asarray(value) for name, value in load_weights(vgg_path, heads_path).items()}

    def distance(x, y):
        # Behind a barrier XLA does not spend its time folding what it takes for constants.
        weights = jax.lax.optimization_barrier(params)
        return lpips(weights, _prepared(x, centered), _prepared(y, centered))

    return distance


def load_weights(vgg_path: epath.PathLike, heads_path: epath.PathLike) -> dict[str, np.ndarray]:
    """The weights of both files by their names there, float32. Arguments and errors as `load_lpips`."""
    vgg = _read(vgg_path, VGG_SHAPES, "training.lpips_path, VGG16's weights", unused="classifier.")
    heads = _read(heads_path, HEAD_SHAPES, "training.lpips_heads, LPIPS's linear heads")
    for name, weight in heads.items():
        if np.any(weight < 0):
            raise InputError(f"training.lpips_heads, LPIPS's linear heads {heads_path}: {name} has a negative weight")
    return vgg | heads


def _read(path, shapes, what: str, unused: str | None = None) -> dict[str, np.ndarray]:
    path = epath.Path(path).expanduser()
    with torch_file.errors_named(f"{what} {path}"):
        file = torch_file.load(path)
        if not isinstance(file, dict):
            raise InputError(f"holds a {type(file).__name__}, not a state dict")
        for name in file:
            if name not in shapes and not (unused and str(name).startswith(unused)):
                raise InputError(f"has {name!r}, which this network has not")
        for name in shapes:
            if name not in file:
                raise InputError(f"misses {name!r}")
        tensors = {name: torch_file.dense(name, file[name], shape) for name, shape in shapes.items()}
        torch_file.check_numbers({"state dict": tensors}, path.stat().length)
        return {name: tensor.float().numpy() for name, tensor in tensors.items()}


def _prepared(images, centered: bool) -> Float[Array, "b _ _ 3"]:
    """Images in [0, 1], three channels, SIZE x SIZE."""
    images = 0.5 * (images + 1.0) if centered else images
    images = jnp.broadcast_to(images, (*images.shape[:3], 3))
    # As in PyTorch, nothing is smoothed where the image becomes smaller.
    return jax.image.resize(images, (len(images), SIZE, SIZE, 3), "bilinear", antialias=False)


def lpips(params: Params, x: Float[Array, "b h w 3"], y: Float[Array, "b h w 3"]) -> Float[Array, "b"]:
    """The distance of each x from its y: over five layers, the weighted squared differences of unit-length features.

    Args:
      params: as `load_weights` returns them.
      x, y: colour images in [0, 1], of any size from 16.
    """
    total = jnp.zeros(len(x))
    for n, (fx, fy) in enumerate(zip(vgg_features(params, x), vgg_features(params, y), strict=True)):
        head = params[f"lin{n}.model.1.weight"].reshape(-1)
        difference = (_unit_length(fx) - _unit_length(fy)) ** 2
        total = total + jnp.mean(jnp.sum(difference * head, axis=-1), axis=(1, 2))
    return total


def vgg_features(params: Params, images: Float[Array, "b h w 3"]) -> list[Float[Array, "b _ _ _"]]:
    """VGG16's (arXiv 1409.1556) relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3 of colour images in [0, 1]."""
    x = (2.0 * images - 1.0 - jnp.asarray(SHIFT)) / jnp.asarray(SCALE)
    features = []
    for numbers, _ in BLOCKS:
        if features:
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        for number in numbers:
            x = jax.nn.relu(_convolution(x, params[f"features.{number}.weight"], params[f"features.{number}.bias"]))
        features.append(x)
    return features


def _convolution(x, weight, bias):
    return jax.lax.conv_general_dilated(x, weight, (1, 1), "SAME", dimension_numbers=("NHWC", "OIHW", "NHWC")) + bias


def _unit_length(features):
    """`features` / (|features| + EPS) over channels; where all are 0, 0 with gradient 0 instead of NaN."""
    square = jnp.sum(features**2, axis=-1, keepdims=True)
    length = jnp.sqrt(jnp.where(square > 0, square, 1.0))
    return jnp.where(square > 0, features / (length + EPS), 0.0)
