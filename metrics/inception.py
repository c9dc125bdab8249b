"""Inception, whose features FID, KID and IS are defined on: a SavedModel, run by TensorFlow or by JAX."""

import contextlib
import dataclasses
import functools
import hashlib
import os
import tempfile
import threading
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import absl.logging
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float, UInt8

from metrics.feature_networks import FeatureNetwork, device_network, in_batches, key
from runtime import tensorflow_on_cpu
from utils import InputError

SIZE = 299  # pixels, TF-GAN's
BATCH = 64  # images that go through the network at a time: their activations take some 2 GB
HUB_SECONDS = 8  # to wait for TF-Hub's answer before saying that it cannot be reached
BACKENDS = ("auto", "tensorflow", "jax")


@dataclasses.dataclass(frozen=True)
class Inception:
    """One of the networks that published figures are of.

    Attributes:
      name: of the feature network.
      handle: on TF-Hub.
      page: where a browser finds its files.
      size: pixels of a side, to which images are resized (bilinear); None: they are not.
      divisor, shift: the network is given levels / divisor - shift.
      outputs: the entries that it returns, features and logits; None: the features alone, by themselves.
    """

    name: str
    handle: str
    page: str
    size: int | None
    divisor: float
    shift: float
    outputs: tuple[str, str] | None

    @property
    def preprocessing(self) -> str:
        """What is done with the levels, for records."""
        resized = f"resized to {self.size} x {self.size} (bilinear), " if self.size else ""
        return f"{resized}scaled to [{-self.shift:g}, 1]"

    def split(self, found: Any, count: int) -> list[Any]:
        """[features [count, d], logits [count, classes]] of what the SavedModel returns; without logits one class."""
        tf = tensorflow_on_cpu()
        if self.outputs is None:
            return [tf.reshape(found, (count, -1)), tf.zeros((count, 1))]
        return [tf.reshape(found[name], (count, -1)) for name in self.outputs]


_PAGE = "https://www.kaggle.com/models"
# TF-GAN's own, resized and scaled as its examples do; of images below 256 pixels in the public code of both papers.
TFGAN = Inception(
    "inception",
    "https://tfhub.dev/tensorflow/tfgan/eval/inception/1",
    f"{_PAGE}/tensorflow/inception, variation tfgan-eval-inception",
    SIZE,
    127.5,
    1,
    ("pool_3", "logits"),
)
# That of their images of 256 pixels and more, which it is given as they are (score_sde's evaluation.py).
V3 = Inception(
    "inception_v3",
    "https://tfhub.dev/google/imagenet/inception_v3/feature_vector/4",
    f"{_PAGE}/google/inception-v3, variation feature-vector",
    None,
    255,
    0,
    None,
)


def inception(path: str, backend: str = "auto", kind: Inception = TFGAN) -> FeatureNetwork:
    """Inception: features [n, 2048] of its last pooling layer, and its logits.

    Args:
      path: folder of its SavedModel; 'none' for its handle on TF-Hub.
      backend: 'tensorflow' runs it on the host's CPU, 'jax' on all local devices; 'auto' is TensorFlow where the
        devices are CPUs, for which XLA's convolutions are slower, else JAX.

    Raises:
      InputError: the folder holds no such model, or TF-Hub cannot be reached.
    """
    folder = _folder_of(path, kind)
    model, identity = _load(folder, kind), key(kind.name, _digest(folder))
    if backend == "tensorflow" or (backend == "auto" and jax.default_backend() == "cpu"):
        return FeatureNetwork(kind.name, identity, _on_host(model, kind), preprocessing=kind.preprocessing)
    return device_network(kind.name, f"{identity} jax", jax_function(model, kind), kind.preprocessing)


def _on_host(model: Callable, kind: Inception) -> Callable:
    tf = tensorflow_on_cpu()

    def apply(images: np.ndarray) -> Any:
        pixels = tf.cast(images, tf.float32)
        if kind.size:
            pixels = tf.image.resize(pixels, (kind.size, kind.size))
        return kind.split(model(pixels / kind.divisor - kind.shift), len(images))

    def features_and_logits(images: UInt8[np.ndarray, "n height width 3"]):
        return in_batches(apply, images, BATCH)

    return features_and_logits


def jax_function(model: Callable, kind: Inception = TFGAN) -> Callable:
    """A SavedModel's function as a JAX function of uint8 images [n, h, w, 3]: features [n, d] and logits [n, classes].

    It runs on any platform, BATCH images at a time, with its weights in the program and in whole float32 precision.
    """

    def apply(images: UInt8[Array, "n h w 3"]) -> tuple[Float[Array, "n d"], Float[Array, "n classes"]]:
        n, batch = len(images), min(BATCH, len(images))
        padded = jnp.pad(images, [(0, -n % batch), (0, 0), (0, 0), (0, 0)])
        shape = (batch, kind.size or images.shape[1], kind.size or images.shape[2], 3)
        network = portable_program(model, shape, kind)

        def outputs(levels: Array) -> Any:
            pixels = levels.astype(jnp.float32)
            if kind.size:
                pixels = jax.image.resize(pixels, shape, "linear", antialias=False)
            return network.call(pixels / kind.divisor - kind.shift)

        found = jax.lax.map(outputs, padded.reshape(-1, batch, *images.shape[1:]))
        features, logits = (x.reshape(-1, x.shape[-1])[:n] for x in found)
        return features, logits

    return apply


@functools.lru_cache(maxsize=4)
def portable_program(model: Callable, shape: tuple[int, int, int, int], kind: Inception = TFGAN) -> jax.export.Exported:
    """The function of scaled pixels of this shape to features and logits as portable StableHLO.

    TensorFlow compiles it for the CPU, but nothing in it belongs to one. It asks for the highest precision of every
    convolution and product: else GPUs and TPUs would round their factors to 10 or 7 bits.
    """
    from jax.experimental import jax2tf

    tf = tensorflow_on_cpu()

    def apply(pixels: Any) -> Any:
        return kind.split(model(pixels), shape[0])

    export = jax.export.export(
        jax.jit(jax2tf.call_tf(tf.function(apply, autograph=False))),
        platforms=["cpu"],
        disabled_checks=[jax.export.DisabledSafetyCheck.platform()],
    )
    with _whole_precision(tf), _without_warnings():
        return export(jax.ShapeDtypeStruct(shape, jnp.float32))


@contextlib.contextmanager
def _whole_precision(tf) -> Iterator[None]:
    """Inside the block TensorFlow asks XLA for the highest precision, as where TensorFloat-32 is not allowed."""
    precision = tf.config.experimental
    is_allowed = precision.tensor_float_32_execution_enabled()
    precision.enable_tensor_float_32_execution(False)
    try:
        yield
    finally:
        precision.enable_tensor_float_32_execution(is_allowed)


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """jax2tf warns of weights in the program, at length."""
    verbosity = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.ERROR)
    try:
        yield
    finally:
        absl.logging.set_verbosity(verbosity)


def _folder_of(path: str, kind: Inception) -> epath.Path:
    """The folder of the SavedModel: `path`, or TF-Hub's copy, downloaded if it is missing.

    Raises:
      InputError: neither exists.
    """
    pixels = "or compare colours alone with --config.eval.feature_network=pixels"
    if path != "none":
        folder = epath.Path(path).expanduser()
        if not (folder / "saved_model.pb").exists():
            raise InputError(
                f"eval.inception_path = {path} holds no SavedModel (no file saved_model.pb); correct it, {pixels}"
            )
        return folder
    hub = epath.Path(os.environ.get("TFHUB_CACHE_DIR") or epath.Path(tempfile.gettempdir()) / "tfhub_modules")
    cached = hub / hashlib.sha1(kind.handle.encode()).hexdigest()
    if (cached / "saved_model.pb").exists():
        return cached
    files = f"with the files of {kind.page}, unpacked in it"
    remedy = f"give its folder as --config.eval.inception_path=FOLDER, {files}, {pixels}"
    if not _answers(f"{kind.handle}?tf-hub-format=compressed", HUB_SECONDS):
        raise InputError(f"the Inception network is not in {hub} and {kind.handle} cannot be reached; {remedy}")
    try:
        return epath.Path(_tensorflow_hub().resolve(kind.handle))
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{kind.handle} cannot be downloaded ({error}); {remedy}") from error


def _tensorflow_hub() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports what setuptools deprecates; setuptools is pinned
        import tensorflow_hub
    return tensorflow_hub


def _answers(url: str, seconds: float) -> bool:
    """Whether `url` can be opened within `seconds`, name look-up included, which no socket timeout bounds."""
    answered = threading.Event()

    def ask():
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=seconds):
            answered.set()

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds)
    return answered.is_set()


def _load(folder: epath.Path, kind: Inception = TFGAN) -> Callable:
    """The model in `folder`, checked on an image.

    Raises:
      InputError: it cannot be loaded, or does not return features and logits.
    """
    tf = tensorflow_on_cpu()
    try:
        model = _tensorflow_hub().load(str(folder))
        found = model(tf.zeros([1, SIZE, SIZE, 3]))
        missing = [name for name in kind.outputs or () if name not in found]
        if kind.outputs is None and isinstance(found, dict):
            raise ValueError(f"it gives {', '.join(found)}, {kind.name} its features alone")
    except (OSError, TypeError, ValueError, tf.errors.OpError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"the SavedModel in {folder} is not an Inception network: {reason}") from error
    if missing:
        raise InputError(f"the SavedModel in {folder} does not give {', '.join(missing)}")
    return model


def _digest(folder: epath.Path) -> str:
    """A digest of a SavedModel's files."""
    digest = hashlib.sha256()
    for path in [folder / "saved_model.pb", *sorted((folder / "variables").glob("*"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()
