"""Feature networks, Inception and classifiers of labelled sets, and cached features of the data."""

import contextlib
import dataclasses
import hashlib
import logging
import os
import tempfile
import threading
import urllib.request
from collections.abc import Callable
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import tqdm
from etils import epath
from jaxtyping import Array, Float, Int, UInt8

import datasets
from runtime import tensorflow_on_cpu
from utils import InputError, write_arrays

logger = logging.getLogger("seqrf")

MAX_REAL = 200_000  # real images that are compared with; 2048 features of each are 1.6 GB
DIGITS_TRAINED_ON = 1500  # the classifier is tested on the other 297
INCEPTION_HANDLE = "https://tfhub.dev/tensorflow/tfgan/eval/inception/1"
INCEPTION_SIZE = 299  # pixels; this and the handle are TF-GAN's, whose import would take seconds
HUB_SECONDS = 8  # to wait for TF-Hub's answer before saying that it cannot be reached


@dataclasses.dataclass(frozen=True)
class FeatureNetwork:
    """A network whose features stand for what an image shows.

    Attributes:
      name: 'inception', 'digits_classifier' or '<set>_<size>_classifier'.
      identity: everything that its features depend on, for the keys of caches and the record in metrics.json.
      features_and_logits: uint8 images [n, h, w, c] to float32 ([n, d], [n, classes]), as NumPy arrays.
    """

    name: str
    identity: str
    features_and_logits: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def feature_network(
    data: ml_collections.ConfigDict, inception_path: str, cache_dir: epath.PathLike | None = None
) -> FeatureNetwork:
    """The network whose features samples of `config.data` are compared in.

    Inception for photographs; for grey images a classifier of the set's own labels.

    Args:
      data: `config.data`.
      inception_path: folder of a SavedModel of Inception; 'none' for TF-GAN's handle on TF-Hub.
      cache_dir: where a trained classifier is kept; None for `cache_folder()`.

    Raises:
      InputError: Inception is not available, or not valid, within seconds; or as `label_classifier`.
    """
    return label_classifier(data, cache_dir) if data.num_channels == 1 else inception(inception_path)


def real_features(
    network: FeatureNetwork, source: datasets.ImageSource, batch_size: int, cache_dir: epath.PathLike | None = None
) -> Float[np.ndarray, "n d"]:
    """The features of the data set's images, the first `MAX_REAL` if it has more; computed once, then read from disk.

    Raises:
      InputError: the data set cannot be read.
    """

    def compute():
        count = min(source.size, MAX_REAL)
        starts = tqdm.tqdm(range(0, count, batch_size), f"{network.name} features of {source.name}", disable=None)
        batches = (source.read(start, min(batch_size, count - start)) for start in starts)
        return {"features": np.concatenate([network.features_and_logits(images)[0] for images in batches])}

    key = _key(network.identity, source.identity, MAX_REAL)
    return _cached(_folder(cache_dir) / f"features_{network.name}_{key}.npz", compute)["features"]


@dataclasses.dataclass(frozen=True)
class DataFeatures:
    """A feature network and its features [n, d] of a data set's images, which samples are compared with."""

    network: FeatureNetwork
    features: Float[np.ndarray, "n d"]


def data_features(
    data: ml_collections.ConfigDict, inception_path: str, batch_size: int, cache_dir: epath.PathLike | None = None
) -> DataFeatures:
    """The feature network of `config.data` and its features of the training images.

    Raises:
      InputError: as `feature_network` and `datasets.image_source`, before any feature is computed.
    """
    network = feature_network(data, inception_path, cache_dir)
    source = datasets.image_source(data)
    return DataFeatures(network, real_features(network, source, batch_size, cache_dir))


def cache_folder() -> epath.Path:
    """Where trained classifiers and features are kept: $SEQRF_CACHE, else ~/.cache/seqrf."""
    return epath.Path(os.environ.get("SEQRF_CACHE") or "~/.cache/seqrf").expanduser()


def _folder(cache_dir) -> epath.Path:
    return cache_folder() if cache_dir is None else epath.Path(cache_dir)


def _key(*parts) -> str:
    """A short name for everything that decides what a cached file holds."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _cached(path: epath.Path, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays in the npz file `path`; computed, and written there, if it is missing or damaged."""
    if path.exists():
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays["names"]}  # reading checks the file's checksums
        except Exception as error:  # a damaged header can make np.load raise nearly anything
            logger.warning("%s is damaged (%s); computing it again", path, error)
    computed: dict[str, Any] = compute()
    try:
        write_arrays(path, names=np.array(list(computed)), **computed)
    except OSError as error:
        logger.warning("%s cannot be written (%s); it will be computed again next time", path, error)
    return computed


# ---- classifiers of labelled sets


@dataclasses.dataclass(frozen=True)
class ClassifierRecipe:
    """The architecture and the training of a label classifier.

    Attributes:
      widths: channels of the 3 x 3 convolutions; every one but the first halves the resolution.
      features: width of the layer whose values are compared.
      epochs, batch_size, learning_rate: of Adam with a cosine schedule on the cross entropy.
    """

    widths: tuple[int, ...]
    features: int
    epochs: int
    batch_size: int = 100
    learning_rate: float = 2e-3


DIGITS_RECIPE = ClassifierRecipe(widths=(16, 32), features=64, epochs=20)
RECIPE = ClassifierRecipe(widths=(32, 64), features=128, epochs=6)


class LabelClassifier(nn.Module):
    """A small convolutional network: images [n, h, w, c] in [0, 1] to features in (-1, 1) and logits."""

    widths: tuple[int, ...]
    features: int
    classes: int

    @nn.compact
    def __call__(self, images: Float[Array, "n h w c"]) -> tuple[Float[Array, "n features"], Float[Array, "n classes"]]:
        x = nn.relu(nn.Conv(self.widths[0], (3, 3))(images))
        for width in self.widths[1:]:
            x = nn.relu(nn.Conv(width, (3, 3), strides=(2, 2))(x))
        features = nn.tanh(nn.Dense(self.features)(x.reshape(len(x), -1)))
        return features, nn.Dense(self.classes)(features)


@dataclasses.dataclass(frozen=True)
class LabelledImages:
    """uint8 images [n, h, w, c] and their classes [n], which a classifier is trained or tested on."""

    images: UInt8[np.ndarray, "n h w c"]
    labels: Int[np.ndarray, "n"]


def label_classifier(data: ml_collections.ConfigDict, cache_dir: epath.PathLike | None = None) -> FeatureNetwork:
    """The classifier of a labelled data set at its image size, trained on first use with a fixed seed and then cached.

    It is trained and run on the CPU, whatever JAX's default device, so that figures of several machines compare.

    Args:
      data: `config.data`, which names the set.
      cache_dir: where its weights are kept; None for `cache_folder()`.

    Raises:
      InputError: the data set cannot be read, or has no labels or no test images.
    """
    is_digits = data.dataset == "digits"
    name = "digits_classifier" if is_digits else f"{data.dataset.lower()}_{data.image_size}_classifier"
    recipe, source = DIGITS_RECIPE if is_digits else RECIPE, datasets.image_source(data)
    key = _key(name, recipe, source.identity, jax.__version__, flax.__version__, optax.__version__)

    def train_and_test():
        train, test = _shuffled_digits() if is_digits else _labelled_splits(data)
        logger.info("training %s on %d images", name, len(train.images))
        model = LabelClassifier(recipe.widths, recipe.features, int(train.labels.max()) + 1)
        params = train_classifier(model, train, recipe)
        _, logits = _classifier_function(model, params)(test.images)
        return flax.traverse_util.flatten_dict(params, sep="/") | {
            "test_accuracy": np.asarray(np.mean(logits.argmax(axis=1) == test.labels))
        }

    arrays = _cached(_folder(cache_dir) / f"{name}_{key}.npz", train_and_test)
    accuracy = float(arrays.pop("test_accuracy"))
    params = flax.traverse_util.unflatten_dict(arrays, sep="/")
    logger.info("feature network: %s, test accuracy %.4f", name, accuracy)
    model = LabelClassifier(recipe.widths, recipe.features, params["Dense_1"]["bias"].size)
    return FeatureNetwork(name, f"{key}, test accuracy {accuracy:.4f}", _classifier_function(model, params))


def _classifier_function(model: LabelClassifier, params) -> Callable:
    @jax.jit
    def apply(images: jax.Array) -> Any:
        return model.apply({"params": params}, images / jnp.float32(255))

    def features_and_logits(images: UInt8[np.ndarray, "n h w c"]):
        with _on_cpu():
            return _in_batches(apply, images, 500)

    return features_and_logits


def _labelled_splits(data) -> tuple[LabelledImages, LabelledImages]:
    sources = [datasets.image_source(data, split) for split in ("train", "test")]
    train, test = (LabelledImages(source.read(0, source.size), source.labels()) for source in sources)
    return train, test


def _shuffled_digits() -> tuple[LabelledImages, LabelledImages]:
    """The digits in a fixed random order: the first DIGITS_TRAINED_ON, and the rest, which are not trained on."""
    images, labels = datasets.digits()
    order = np.random.default_rng(0).permutation(len(images))
    train, test = np.split(order, [DIGITS_TRAINED_ON])
    return LabelledImages(images[train], labels[train]), LabelledImages(images[test], labels[test])


def train_classifier(model: LabelClassifier, data: LabelledImages, recipe: ClassifierRecipe) -> Any:
    """Parameters of `model` trained on `data`; the same for the same arguments and machine."""
    count = len(data.images)
    batches = count // recipe.batch_size
    optimizer = optax.adam(optax.cosine_decay_schedule(recipe.learning_rate, recipe.epochs * batches))

    def loss(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        _, logits = model.apply({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(params: Any, state: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, Any]:
        updates, state = optimizer.update(jax.grad(loss)(params, images, labels), state)
        return optax.apply_updates(params, updates), state

    order = np.random.default_rng(0)
    with _on_cpu():
        params = model.init(jax.random.key(0), jnp.asarray(data.images[:1] / np.float32(255)))["params"]
        state = optimizer.init(params)
        for _ in tqdm.trange(recipe.epochs, desc="training a classifier", unit="epoch", leave=False, disable=None):
            for batch in order.permutation(count)[: batches * recipe.batch_size].reshape(batches, -1):
                params, state = step(params, state, data.images[batch] / np.float32(255), data.labels[batch])
    return jax.device_get(params)


def _on_cpu():
    """Makes JAX compute on the CPU inside the block, unless it was started without one (JAX_PLATFORMS)."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:
        return contextlib.nullcontext()


def _in_batches(apply, images: np.ndarray, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """A (features, logits) function of one batch size, applied to any number of images."""
    outputs = []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        padding = [(0, batch_size - len(batch))] + [(0, 0)] * (batch.ndim - 1)
        outputs.append([np.asarray(x)[: len(batch)] for x in apply(np.pad(batch, padding))])
    features, logits = zip(*outputs, strict=True)
    return np.concatenate(features), np.concatenate(logits)


# ---- Inception


def inception(path: str) -> FeatureNetwork:
    """TF-GAN's Inception: features [n, 2048] of its last pooling layer ('pool_3') and its logits.

    Images are resized to 299 x 299 (bilinear) and scaled to [-1, 1], as TF-GAN's own examples do. It runs on the CPU.

    Args:
      path: folder of a SavedModel that maps images to {'logits', 'pool_3'}; 'none' for TF-GAN's handle on TF-Hub.

    Raises:
      InputError: the folder holds no such model, or TF-Hub cannot be reached.
    """
    folder = _inception_folder(path)
    tf = tensorflow_on_cpu()
    size = INCEPTION_SIZE
    model = _loaded_inception(folder, size)

    def apply(images: np.ndarray) -> Any:
        pixels = tf.image.resize(tf.cast(images, tf.float32), (size, size))
        outputs = model(pixels / 127.5 - 1)
        return [tf.reshape(outputs[name], (len(images), -1)) for name in ("pool_3", "logits")]

    def features_and_logits(images: UInt8[np.ndarray, "n height width 3"]):
        return _in_batches(apply, images, 64)

    return FeatureNetwork("inception", _key("inception", _digest(folder)), features_and_logits)


def _inception_folder(path: str) -> epath.Path:
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
    cached = hub / hashlib.sha1(INCEPTION_HANDLE.encode()).hexdigest()
    if (cached / "saved_model.pb").exists():
        return cached
    remedy = (
        "give its folder as --config.eval.inception_path=FOLDER, with the files of "
        "https://www.kaggle.com/models/tensorflow/inception, variation tfgan-eval-inception, unpacked in it"
    )
    if not _answers(f"{INCEPTION_HANDLE}?tf-hub-format=compressed", HUB_SECONDS):
        raise InputError(f"the Inception network is not in {hub} and {INCEPTION_HANDLE} cannot be reached; {remedy}")
    import tensorflow_hub

    try:
        return epath.Path(tensorflow_hub.resolve(INCEPTION_HANDLE))
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{INCEPTION_HANDLE} cannot be downloaded ({error}); {remedy}") from error


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


def _loaded_inception(folder: epath.Path, size: int):
    """The model in `folder`, checked on an image of `size` x `size`.

    Raises:
      InputError: it cannot be loaded, or does not return features and logits.
    """
    tf = tensorflow_on_cpu()
    import tensorflow_hub

    try:
        model = tensorflow_hub.load(str(folder))
        outputs = model(tf.zeros([1, size, size, 3]))
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
