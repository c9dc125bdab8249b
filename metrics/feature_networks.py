"""Feature networks, the classifiers of labelled sets among them, and the files in which results are cached."""

import contextlib
import dataclasses
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from etils import epath
from jaxtyping import Array, Float, Int, UInt8

import datasets
import distributed
from runtime import cache_folder
from utils import InputError, read_arrays, write_arrays

logger = logging.getLogger("seqrf")

# Classifiers trained once for all machines: another processor's rounding would train another network.
KEPT_CLASSIFIERS = Path(__file__).resolve().parents[1] / "model_zoo" / "classifiers"
TEST_BATCH = 500  # images in a batch when a classifier is tested
PIXELS = 8  # fields on a side of `pixel_network`
DIGITS_TRAINED_ON = 1500  # the classifier is tested on the other 297


@dataclasses.dataclass(frozen=True)
class FeatureNetwork:
    """A network whose features stand for what an image shows.

    Attributes:
      name: 'inception', 'digits_classifier', '<set>_<size>_classifier' or 'pixels_8'.
      identity: everything that its features depend on, for the keys of caches and the record in metrics.json.
      features_and_logits: uint8 images [n, h, w, c], any number of them, to float32 ([n, d], [n, classes]), as NumPy
        arrays.
      on_devices: the same for images [local devices, n, h, w, c] that are on the devices, the results there too:
        ([devices, n, d], [devices, n, classes]). None: the network runs on the host.
      preprocessing: what it does with the levels 0 to 255, for records.
    """

    name: str
    identity: str
    features_and_logits: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    on_devices: Callable[[Any], tuple[Any, Any]] | None = None
    preprocessing: str = "unknown"

    @property
    def suffix(self) -> str:
        """Of the names of figures in its features: 'fid' alone means Inception's."""
        return "" if self.name == "inception" else f"_{self.name}"

    def measure(self, images: UInt8[Array | np.ndarray, "devices n h w c"]) -> tuple[np.ndarray, np.ndarray]:
        """Features [devices * n, d] and logits [devices * n, classes]; only they leave the devices, where they can."""
        if self.on_devices is None:
            return self.features_and_logits(np.asarray(images).reshape(-1, *images.shape[2:]))
        features, logits = (np.asarray(x) for x in self.on_devices(images))
        return features.reshape(-1, features.shape[-1]), logits.reshape(-1, logits.shape[-1])


def device_network(name: str, identity: str, apply: Callable, preprocessing: str) -> FeatureNetwork:
    """A feature network that runs on all local devices.

    Args:
      apply: uint8 images [n, h, w, c] to float32 ([n, d], [n, classes]); a JAX function.
    """
    program = distributed.map_devices(apply)

    def features_and_logits(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        devices = jax.local_device_count()
        padding = [(0, -len(images) % devices)] + [(0, 0)] * (images.ndim - 1)
        stacked = np.pad(images, padding).reshape(devices, -1, *images.shape[1:])
        features, logits = network.measure(stacked)
        return features[: len(images)], logits[: len(images)]

    network = FeatureNetwork(name, identity, features_and_logits, program, preprocessing)
    return network


def pixel_network() -> FeatureNetwork:
    """A feature network for pictures without labels where there is no Inception: the mean colours of PIXELS x PIXELS
    fields of an image, in [0, 1]. It sees colours and coarse shapes; it tells no classes apart, so IS is 1.
    """

    def apply(images: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows, columns = _field_weights(images.shape[1]), _field_weights(images.shape[2])
        means = jnp.einsum("ih,jw,nhwc->nijc", rows, columns, images.astype(jnp.float32) / 255)
        return means.reshape(len(images), -1), jnp.zeros((len(images), 1), jnp.float32)

    return device_network(f"pixels_{PIXELS}", f"means of {PIXELS} x {PIXELS} fields", apply, "/ 255")


def _field_weights(size: int) -> Float[np.ndarray, "fields size"]:
    """The share of each of `size` pixels in each of PIXELS fields of one length."""
    edges, pixel = np.arange(PIXELS + 1) * size / PIXELS, np.arange(size)
    overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    return (np.clip(overlap, 0, None) * PIXELS / size).astype(np.float32)


def key(*parts: Any) -> str:
    """A short name for everything that decides what a cached file holds."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def cached(
    name: str,
    compute: Callable[[], dict[str, np.ndarray]],
    cache_dir: epath.PathLike | None = None,
    *,
    shared: bool = False,
) -> dict[str, np.ndarray]:
    """The arrays in the npz file `name`; computed, and written there, if it is missing or damaged.

    Args:
      cache_dir: the file's folder; None for `cache_folder()`.
      shared: all hosts call this and `compute` together: they compute unless every one of them has the file.
    """
    path = (cache_folder() if cache_dir is None else epath.Path(cache_dir)) / name
    found = _read_arrays(path)
    is_missing = found is None
    if shared:
        is_missing = bool(distributed.gather(np.array([is_missing])).any())
    if found is not None and not is_missing:
        return found
    computed: dict[str, Any] = compute()
    try:
        write_arrays(path, names=np.array(list(computed)), **computed)
    except OSError as error:
        logger.warning("%s cannot be written (%s); it will be computed again next time", path, error)
    return computed


def _read_arrays(path: epath.Path) -> dict[str, np.ndarray] | None:
    """The arrays of a file that `cached` wrote; None where it is missing or damaged."""
    try:
        if not path.exists():
            return None
        arrays = read_arrays(path)
        return {name: arrays[name] for name in arrays["names"]}  # a damaged directory of the file may hide some
    except (OSError, InputError, KeyError) as error:
        logger.warning("%s; computing it again", error)
        return None


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


def label_classifier(data: datasets.DataOptions, cache_dir: epath.PathLike | None = None) -> FeatureNetwork:
    """The classifier of a labelled data set at its image size.

    Those of the small benches are in model_zoo/classifiers, so that figures of several machines compare; others are
    trained on first use with a fixed seed, on the CPU whatever JAX's default device, and then cached. They run in
    whole float32 precision.

    Args:
      cache_dir: where its weights are kept; None for `cache_folder()`.

    Raises:
      InputError: the data set cannot be read, or has no labels or no test images.
    """
    is_digits = data.dataset == "digits"
    name = "digits_classifier" if is_digits else f"{data.dataset.lower()}_{data.image_size}_classifier"
    recipe, source = DIGITS_RECIPE if is_digits else RECIPE, datasets.image_source(data)
    file = f"{name}_{key(name, recipe, source.identity)}.npz"

    def train_and_test():
        train, test = _shuffled_digits() if is_digits else _labelled_splits(data)
        logger.info("training %s on %d images", name, len(train.images))
        model = LabelClassifier(recipe.widths, recipe.features, int(train.labels.max()) + 1)
        params = train_classifier(model, train, recipe)
        with on_cpu():
            _, logits = in_batches(jax.jit(classifier_function(model, params)), test.images, TEST_BATCH)
        return flax.traverse_util.flatten_dict(params, sep="/") | {
            "test_accuracy": np.asarray(np.mean(logits.argmax(axis=1) == test.labels))
        }

    arrays = _read_arrays(epath.Path(KEPT_CLASSIFIERS) / file) or cached(file, train_and_test, cache_dir)
    accuracy = float(arrays.pop("test_accuracy"))
    logger.info("feature network: %s, test accuracy %.4f", name, accuracy)
    weights = key(*((path, arrays[path].tobytes()) for path in sorted(arrays)))
    params = flax.traverse_util.unflatten_dict(arrays, sep="/")
    model = LabelClassifier(recipe.widths, recipe.features, params["Dense_1"]["bias"].size)
    identity = f"weights {weights}, test accuracy {accuracy:.4f}"
    return device_network(name, identity, classifier_function(model, params), "divided by 255")


def classifier_function(model: LabelClassifier, params: Any) -> Callable:
    """(uint8 images [n, h, w, c]) -> features and logits, for JAX programs, without an accelerator's short cuts."""

    def apply(images: jax.Array) -> Any:
        with jax.default_matmul_precision("highest"):
            return model.apply({"params": params}, images / jnp.float32(255))

    return apply


def _labelled_splits(data: datasets.DataOptions) -> tuple[LabelledImages, LabelledImages]:
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
    size = min(recipe.batch_size, count)
    batches = count // size
    optimizer = optax.adam(optax.cosine_decay_schedule(recipe.learning_rate, recipe.epochs * batches))

    def loss(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        _, logits = model.apply({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(params: Any, state: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, Any]:
        updates, state = optimizer.update(jax.grad(loss)(params, images, labels), state)
        return optax.apply_updates(params, updates), state

    order = np.random.default_rng(0)
    with on_cpu():
        params = model.init(distributed.random_key(0), jnp.asarray(data.images[:1] / np.float32(255)))["params"]
        state = optimizer.init(params)
        for _ in tqdm.trange(recipe.epochs, desc="training a classifier", unit="epoch", leave=False, disable=None):
            for batch in order.permutation(count)[: batches * size].reshape(batches, -1):
                params, state = step(params, state, data.images[batch] / np.float32(255), data.labels[batch])
    return jax.device_get(params)


def on_cpu() -> contextlib.AbstractContextManager:
    """Makes JAX compute on the CPU inside the block, unless it was started without one (JAX_PLATFORMS)."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:
        return contextlib.nullcontext()


def in_batches(apply: Callable, images: np.ndarray, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """A (features, logits) function of one batch size, applied to any number of images."""
    outputs = []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        padding = [(0, batch_size - len(batch))] + [(0, 0)] * (batch.ndim - 1)
        outputs.append([np.asarray(x)[: len(batch)] for x in apply(np.pad(batch, padding))])
    features, logits = zip(*outputs, strict=True)
    return np.concatenate(features), np.concatenate(logits)
