"""TF-GAN's Inception, whose features FID, KID and IS are defined on: a SavedModel, run by TensorFlow or by JAX."""

import contextlib
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

HANDLE = "https://tfhub.dev/tensorflow/tfgan/eval/inception/1"
SIZE = 299  # pixels; this and the handle are TF-GAN's
BATCH = 64  # images that go through the network at a time: their activations take some 2 GB
HUB_SECONDS = 8  # to wait for TF-Hub's answer before saying that it cannot be reached
OUTPUTS = ("pool_3", "logits")
BACKENDS = ("auto", "tensorflow", "jax")
PREPROCESSING = f"resized to {SIZE} x {SIZE} (bilinear), scaled to [-1, 1]"


def inception(path: str, backend: str = "auto") -> FeatureNetwork:
    """TF-GAN's Inception: features [n, 2048] of its last pooling layer ('pool_3') and its logits.

    Images are resized to 299 x 299 (bilinear) and scaled to [-1, 1], as TF-GAN's own examples do.

    Args:
      path: folder of a SavedModel that maps images to {'logits', 'pool_3'}; 'none' for TF-GAN's handle on TF-Hub.
      backend: 'tensorflow' runs it on the host's CPU, 'jax' on all local devices; 'auto' is TensorFlow where the
        devices are CPUs, for which XLA's convolutions are slower, else JAX.

    Raises:
      InputError: the folder holds no such model, or TF-Hub cannot be reached.
    """
    folder = _folder_of(path)
    model, identity = _load(folder), key("inception", _digest(folder))
    if backend == "tensorflow" or (backend == "auto" and jax.default_backend() == "cpu"):
        return FeatureNetwork("inception", identity, _on_host(model), preprocessing=PREPROCESSING)
    return device_network("inception", f"{identity} jax", jax_function(model), PREPROCESSING)


def _on_host(model: Callable) -> Callable:
    tf = tensorflow_on_cpu()

    def apply(images: np.ndarray) -> Any:
        pixels = tf.image.resize(tf.cast(images, tf.float32), (SIZE, SIZE))
        outputs = model(pixels / 127.5 - 1)
        return [tf.reshape(outputs[name], (len(images), -1)) for name in OUTPUTS]

    def features_and_logits(images: UInt8[np.ndarray, "n height width 3"]):
        return in_batches(apply, images, BATCH)

    return features_and_logits


def jax_function(model: Callable) -> Callable:
    """A SavedModel's function as a JAX function of uint8 images [n, h, w, 3]: features [n, d] and logits [n, classes].

    It runs on any platform, BATCH images at a time, with its weights in the program and in whole float32 precision.
    """

    def apply(images: UInt8[Array, "n h w 3"]) -> tuple[Float[Array, "n d"], Float[Array, "n classes"]]:
        n, batch = len(images), min(BATCH, len(images))
        padded = jnp.pad(images, [(0, -n % batch), (0, 0), (0, 0), (0, 0)])
        network = portable_program(model, batch)

        def outputs(levels: Array) -> Any:
            shape = (batch, SIZE, SIZE, 3)
            pixels = jax.image.resize(levels.astype(jnp.float32), shape, "linear", antialias=False)
            return network.call(pixels / 127.5 - 1)

        found = jax.lax.map(outputs, padded.reshape(-1, batch, *images.shape[1:]))
        features, logits = (x.reshape(-1, x.shape[-1])[:n] for x in found)
        return features, logits

    return apply


@functools.lru_cache(maxsize=4)
def portable_program(model: Callable, batch: int) -> jax.export.Exported:
    """The function of pixels [batch, 299, 299, 3] in [-1, 1] to features and logits as portable StableHLO.

    TensorFlow compiles it for the CPU, but nothing in it belongs to one. It asks for the highest precision of every
    convolution and product: else GPUs and TPUs would round their factors to 10 or 7 bits.
    """
    from jax.experimental import jax2tf

    tf = tensorflow_on_cpu()

    def apply(pixels: Any) -> Any:
        outputs = model(pixels)
        return [tf.reshape(outputs[name], (batch, -1)) for name in OUTPUTS]

    export = jax.export.export(
        jax.jit(jax2tf.call_tf(tf.function(apply, autograph=False))),
        platforms=["cpu"],
        disabled_checks=[jax.export.DisabledSafetyCheck.platform()],
    )
    with _whole_precision(tf), _without_warnings():
        return export(jax.ShapeDtypeStruct((batch, SIZE, SIZE, 3), jnp.float32))


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


def _folder_of(path: str) -> epath.Path:
    """The folder of the SavedModel: `path`, or TF-Hub's copy, downloaded if it is missing.

    Raises:
      InputError: neither exists.
    """
    if path != "none":
        folder = epath.Path(path).expanduser()
        if not (folder / "saved_model.pb").exists():
            raise InputError(f"eval.inception_path = {path} holds no SavedModel (no file saved_model.pb)")
        return folder
    hub = epath.Path(os.environ.get("TFHUB_CACHE_DIR") or epath.Path(tempfile.gettempdir()) / "tfhub_modules")
    cached = hub / hashlib.sha1(HANDLE.encode()).hexdigest()
    if (cached / "saved_model.pb").exists():
        return cached
    remedy = (
        "give its folder as --config.eval.inception_path=FOLDER, with the files of "
        "https://www.kaggle.com/models/tensorflow/inception, variation tfgan-eval-inception, unpacked in it"
    )
    if not _answers(f"{HANDLE}?tf-hub-format=compressed", HUB_SECONDS):
        raise InputError(f"the Inception network is not in {hub} and {HANDLE} cannot be reached; {remedy}")
    try:
        return epath.Path(_tensorflow_hub().resolve(HANDLE))
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{HANDLE} cannot be downloaded ({error}); {remedy}") from error


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


def _load(folder: epath.Path) -> Callable:
    """The model in `folder`, checked on an image.

    Raises:
      InputError: it cannot be loaded, or does not return features and logits.
    """
    tf = tensorflow_on_cpu()
    try:
        model = _tensorflow_hub().load(str(folder))
        outputs = model(tf.zeros([1, SIZE, SIZE, 3]))
        missing = [name for name in ("pool_3", "logits") if name not in outputs]
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
