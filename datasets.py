"""Data sets, and the stream of training batches.

A data set is an `ImageSource`: uint8 images in a fixed order, and a shuffled pass over its records. Training reads the
endless stream of its passes: the update s uses the images s B to (s + 1) B - 1 of the stream, on any number of hosts
and devices, so a run that resumes, or moves to another machine, continues with the same batches.
"""

import abc
import dataclasses
import functools
import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Array, Float, Int, UInt8

import distributed
import utils
from runtime import tensorflow_on_cpu
from utils import InputError

SHUFFLE_BYTES = 2**28  # encoded records held to be shuffled; all of CIFAR-10, a tenth of LSUN church
READ_BYTES = 2**23  # of a file at a time, as TFDS reads it
READ_BATCH = 256  # images read in order that TensorFlow hands over at a time
_ORDER, _CHANGES = 0, 1  # ids of NumPy's random streams: of a pass, of an update's flips and dequantization
PREFETCH = 2  # batches made ahead, each of n_jitted_steps updates

# data.dataset -> the name in TFDS, the side of the central square kept (None: the shorter side)
TFDS_SETS = {
    "CIFAR10": ("cifar10", None),
    "FASHION_MNIST": ("fashion_mnist", None),
    "CELEBA": ("celeb_a", 140),
    "IMAGENET": ("downsampled_imagenet/64x64", None),
    "LSUN": ("lsun/{category}", None),
    "CELEBAHQ": ("celeb_a_hq/256", None),
    "IMAGES": ("images", None),
}
# What scripts/prepare_dataset.py makes, where TFDS itself needs the network or does not know the data set.
PREPARED_HERE = {
    "fashion_mnist": "python -m scripts.prepare_dataset fashion_mnist --from FOLDER --to {folder}",
    "images": "python -m scripts.prepare_dataset images --from FOLDER --to {folder} --size SIZE",
}


# Beside a set of the user's own pictures, whose name and size others may have too: {split: a digest of its files}.
CONTENTS = "contents.json"
_OF_CONTENTS = ", contents "


def same_data(one: str, other: str) -> bool:
    """Whether two identities of image sources are of one data set, as far as both have a digest of its contents."""
    (one, _, first), (other, _, second) = one.partition(_OF_CONTENTS), other.partition(_OF_CONTENTS)
    return one == other and (first == second or not first or not second)


def digest_contents(files: Iterable[epath.PathLike]) -> str:
    """A digest of files in their order, for `CONTENTS`."""
    digest = hashlib.sha256()
    for path in files:
        with epath.Path(path).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Which images, and how the network is given them: the section `data` of the configuration.

    Attributes:
      dataset: "digits" or a key of TFDS_SETS.
      image_size, num_channels: of the images, squares.
      category: of LSUN.
      data_dir: where TFDS keeps its data sets; "none": its own folder.
      centered: whether the network's images are in [-1, 1] rather than [0, 1].
      random_flip: mirror training images left to right, with probability 1/2.
      uniform_dequantization: add U[0, 1) to the levels 0 to 255 of training images, then divide by 256.
    """

    dataset: str
    image_size: int
    num_channels: int
    category: str = ""
    data_dir: str = "none"
    centered: bool = True
    random_flip: bool = False
    uniform_dequantization: bool = False

    @property
    def name(self) -> str:
        """The data set and its category, as records have them."""
        return f"{self.dataset} {self.category}".strip()


def scale(levels: Any, *, centered: bool, dequantized: bool) -> Any:
    """float32 pixel levels in the model's range: [-1, 1] if `centered`, else [0, 1]; for NumPy and TensorFlow alike.

    Args:
      levels: any shape, from 0 to 255, or to 256 if `dequantized`: U[0, 1) has been added.
    """
    unit = levels / (256 if dequantized else 255)
    return unit * 2 - 1 if centered else unit


def unscale(
    x: Float[np.ndarray, "*batch height width channels"], centered: bool
) -> Float[np.ndarray, "*batch height width channels"]:
    """The model's images ([-1, 1] if `centered`, else [0, 1]) as float32 in [0, 1], clipped to that range."""
    x = np.asarray(x, np.float32)
    return np.clip((x + 1) / 2 if centered else x, 0, 1)


def levels(x: Float[Array | np.ndarray, "*batch height width channels"], centered: bool = False) -> Any:
    """The model's images as a saved picture has them: uint8 levels from 0 to 255, rounded. NumPy in, NumPy out."""
    unit = ((x + 1) / 2 if centered else x).clip(0, 1)
    return (255 * unit + 0.5).astype(np.uint8)


def digits() -> tuple[UInt8[np.ndarray, "1797 8 8 1"], Int[np.ndarray, "1797"]]:
    """scikit-learn's handwritten digits, values 0..16 stretched to 0..255, and their labels 0..9."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = np.rint(images.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    return images, labels.astype(np.int64)


class ImageSource(abc.ABC):
    """The images of one split of a data set, in a fixed order.

    Attributes:
      name: the data set's name and version.
      identity: everything that decides the values and the order of the images, for the keys of caches.
      size: number of images.
      image_shape: (height, width, channels).
    """

    name: str
    identity: str
    size: int
    image_shape: tuple[int, int, int]

    def read(self, start: int, count: int) -> UInt8[np.ndarray, "count height width channels"]:
        """The images at indices start..start+count-1, modulo `size`, in the data set's fixed order; not flipped.

        Raises:
          ValueError: `start` or `count` is negative.
          InputError: the files are damaged, or an image is smaller than the crop.
        """
        if start < 0 or count < 0:
            raise ValueError(f"start = {start} and count = {count} must not be negative")
        parts = [np.empty((0, *self.image_shape), np.uint8)]
        while count > 0:
            first = start % self.size
            part = self._read(first, min(first + count, self.size))
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts)

    @abc.abstractmethod
    def labels(self) -> Int[np.ndarray, "size"]:
        """The class of every image, in the order of `read`.

        Raises:
          InputError: the data set has no labels.
        """

    @abc.abstractmethod
    def _read(self, start: int, stop: int) -> UInt8[np.ndarray, "count height width channels"]:
        """The images start..stop-1, 0 <= start < stop <= size."""


class ArraySource(ImageSource):
    """Images in memory, [size, height, width, channels] uint8, and their labels [size] where there are any."""

    def __init__(
        self,
        name: str,
        images: UInt8[np.ndarray, "size height width channels"],
        labels: Int[np.ndarray, "size"] | None = None,
    ):
        self.name, self._images, self._labels = name, images, labels
        self.size, *shape = images.shape
        self.image_shape = tuple(shape)
        self.identity = f"{name} {images.shape}"

    def labels(self) -> Int[np.ndarray, "size"]:
        """As given."""
        if self._labels is None:
            raise InputError(f"the data set {self.name} has no labels")
        return self._labels

    def _read(self, start, stop):
        return self._images[start:stop]

    def shuffled(self, seed: int, positions: Int[np.ndarray, "n"]) -> UInt8[np.ndarray, "n height width channels"]:
        """The images at these positions of the endless stream of passes, each in an order of its own."""
        passes, places = np.divmod(positions, self.size)
        images = np.empty((len(positions), *self.image_shape), np.uint8)
        for number in np.unique(passes):
            rows = passes == number
            images[rows] = self._images[
                np.random.default_rng([seed, number, _ORDER]).permutation(self.size)[places[rows]]
            ]
        return images


class TfdsSource(ImageSource):
    """One split of a data set that TFDS has prepared.

    Args:
      builder: a `tfds.core.DatasetBuilder` whose files are on disk.
      split: 'train', 'test', ...
      crop: side of the central square that is kept; None for the image's shorter side.
      image_size: the side that the square is resized to, without aliasing.
    """

    def __init__(self, builder: Any, split: str, crop: int | None, image_size: int):
        import tensorflow_datasets as tfds

        self._builder, self._crop = builder, crop
        self._split = builder.info.splits[split]
        self._decoder = tfds.features.FeaturesDict({"image": builder.info.features["image"]})
        self.name = builder.info.full_name
        self.size = self._split.num_examples
        self.image_shape = (image_size, image_size, builder.info.features["image"].shape[-1])
        self.identity = f"{self.name} {self._split.num_bytes} bytes, {self.size} x {self.image_shape}, crop {crop}"
        if digest := utils.read_json(epath.Path(builder.data_dir) / CONTENTS, dict[str, str], {}).get(split):
            self.identity += f"{_OF_CONTENTS}{digest}"

    def labels(self) -> Int[np.ndarray, "size"]:
        """TFDS's, in the order of the images."""
        import tensorflow_datasets as tfds

        if "label" not in self._builder.info.features:
            raise InputError(f"the data set {self.name} has no labels")
        decoder = tfds.features.FeaturesDict({"label": self._builder.info.features["label"]})
        labels = self._records(0, self.size).map(lambda record: decoder.deserialize_example(record)["label"])
        return np.concatenate(list(_numpy(labels.batch(READ_BATCH), self.name)))

    def _read(self, start, stop):
        tf = tensorflow_on_cpu()
        images = self._records(start, stop).map(self.image, tf.data.AUTOTUNE)
        return np.concatenate(list(_numpy(images.batch(READ_BATCH), self.name)))

    def _records(self, start, stop):
        """A tf.data.Dataset of the encoded records start..stop-1."""
        slices = self._builder.info.splits[f"{self._split.name}[{start}:{stop}]"].file_instructions
        records = [_open_file(part.filename).skip(part.skip).take(part.take) for part in slices]
        return functools.reduce(lambda first, second: first.concatenate(second), records)

    def shuffled(self, seed: Any) -> Any:
        """A tf.data.Dataset: the `size` records once, still encoded, in the order of `seed` (int64 tensor [2]).

        The files are in a random order, interleaved, then shuffled in a buffer of SHUFFLE_BYTES.
        """
        tf = tensorflow_on_cpu()
        files = [str(path) for path in self._split.filepaths]
        records = tf.data.Dataset.from_tensor_slices(files)
        records = records.shuffle(len(files), seed=seed[0], reshuffle_each_iteration=False)
        records = records.interleave(
            _open_file, cycle_length=16, block_length=16, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
        )
        buffer_size = min(self.size, max(1, SHUFFLE_BYTES * self.size // max(1, self._split.num_bytes)))
        return records.shuffle(buffer_size, seed=seed[1], reshuffle_each_iteration=False)

    def image(self, record: Any) -> Any:
        """The image of one record, a uint8 tensor `image_shape`, as `read` gives it."""
        return self._square(self._decoder.deserialize_example(record)["image"])

    def _square(self, image):
        """The central square of a uint8 image, resized without aliasing."""
        if tuple(image.shape) == self.image_shape and self._crop is None:
            return image
        tf = tensorflow_on_cpu()
        size = tf.shape(image)[:2]
        side = tf.reduce_min(size) if self._crop is None else self._crop
        assertion = tf.debugging.Assert(
            tf.reduce_all(size >= side), [f"an image is smaller than the {self._crop} x {self._crop} crop:", size]
        )
        with tf.control_dependencies([assertion]):
            top, left = tf.unstack((size - side) // 2)
        square = image[top : top + side, left : left + side]
        square = tf.image.resize(square, self.image_shape[:2], antialias=True)
        return tf.ensure_shape(tf.saturate_cast(tf.round(square), tf.uint8), self.image_shape)


def _open_file(path):
    """The encoded records of a file of a TFDS data set."""
    return tensorflow_on_cpu().data.TFRecordDataset(path, buffer_size=READ_BYTES)


def image_source(data: DataOptions, split: str = "train") -> ImageSource:
    """The images of a data set.

    Never touches the network: a data set that TFDS has not prepared is an error at once.

    Args:
      split: 'train', or another split that the data set has: 'test' (CIFAR10, CELEBA, FASHION_MNIST), 'validation'
        (IMAGENET, LSUN).

    Raises:
      InputError: an unknown data set, one that is not on disk or not complete there, or images of another kind than
        the configuration says.
    """
    if data.dataset == "digits":
        source: ImageSource = _digits_source(data, split)
    elif data.dataset in TFDS_SETS:
        source = _tfds_source(data, split)
    else:
        known = ", ".join(["digits", *TFDS_SETS])
        raise InputError(f"data.dataset = {data.dataset!r} is not known; it can be {known}")
    if source.image_shape[-1] != data.num_channels:
        raise InputError(
            f"data.num_channels = {data.num_channels}, but the images of {source.name} have {source.image_shape[-1]}"
        )
    return source


def _digits_source(data, split: str) -> ArraySource:
    if data.image_size != 8:
        raise InputError(f"data.image_size = {data.image_size}, but the digits are 8 x 8")
    if split != "train":
        raise InputError(f"the digits have no split {split!r}, only 'train'")
    return ArraySource("digits", *digits())


def _tfds_source(data, split: str) -> TfdsSource:
    name, crop = TFDS_SETS[data.dataset]
    if data.dataset == "LSUN" and not data.category:
        raise InputError("data.dataset = LSUN needs data.category, for example church_outdoor or bedroom")
    builder = _tfds_builder(name.format(category=data.category), data.data_dir, split)
    side = crop or builder.info.features["image"].shape[0]  # None: images of several sizes
    if side is not None and data.image_size > side:
        raise InputError(
            f"data.image_size = {data.image_size}, but the images of {builder.info.full_name} are {side} x {side}"
        )
    return TfdsSource(builder, split, crop, data.image_size)


def _tfds_builder(name: str, data_dir: str, split: str):
    """The builder of a data set that is on disk, found without the network.

    Raises:
      InputError: not there, or not complete.
    """
    tfds = utils.needed("tensorflow_datasets", f"the data set {name}")
    from tensorflow_datasets.core import read_only_builder

    given = data_dir != "none"
    folder = epath.Path(data_dir).expanduser() if given else epath.Path(tfds.core.constants.DATA_DIR)
    remedy = f"prepare it with: {_preparation(name, folder, given)}"
    try:
        # tfds.builder and tfds.load would ask a cloud bucket about what they do not find, for minutes without network.
        builder = read_only_builder.builder_from_files(name, data_dir=str(folder))
    except tfds.core.DatasetNotFoundError:
        raise InputError(f"the data set {name} is not in data.data_dir = {folder}; {remedy}") from None
    info = builder.info
    if split not in info.splits or not info.splits[split].num_examples or "image" not in info.features:
        raise InputError(f"the data set in {builder.data_dir} has no images in a split {split!r}; {remedy}")
    if info.file_format != tfds.core.FileFormat.TFRECORD:
        raise InputError(f"the data set in {builder.data_dir} is stored as {info.file_format.value}, not tfrecord")
    missing = [path for path in info.splits[split].filepaths if not epath.Path(path).exists()]
    if missing:
        raise InputError(f"the data set lacks the file {missing[0]}; remove {builder.data_dir} and {remedy}")
    return builder


def _preparation(name: str, folder: epath.Path, given: bool) -> str:
    """The command that prepares the data set `name` in `folder`, which is `data.data_dir` if `given`."""
    if name in PREPARED_HERE:
        return PREPARED_HERE[name].format(folder=folder)
    argument = f", data_dir='{folder}'" if given else ""
    return f"""python -c "import tensorflow_datasets as tfds; tfds.load('{name}'{argument})\""""


def train_batches(
    data: DataOptions,
    *,
    seed: int,
    batch_size: int,
    n_jitted_steps: int,
    start_step: int = 0,
    host: distributed.Host | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """The endless batches of this host, from the update `start_step` on.

    Every pass over the data is shuffled from (seed, pass); flips and dequantization noise follow from (seed, update,
    index in the update's batch). To reach `start_step`, less than one pass of records is skipped, undecoded.

    Args:
      batch_size: images of one update, over all hosts.
      n_jitted_steps: updates in one returned batch.
      start_step: updates already made; the batches are those that would have followed them.
      host: the host whose share is read; None for this process.

    Returns:
      An iterator of {"image": float32 [local devices, n_jitted_steps, images of a device, height, width, channels]}, in
      [-1, 1] if `data.centered`, else in [0, 1].

    Raises:
      InputError: as `image_source` and `distributed.Host.share`; while iterating, damaged files or images smaller than
        the crop.
    """
    host = host or distributed.this_host()
    share = host.share(batch_size)
    source = image_source(data)
    if not isinstance(source, ArraySource):
        return _tfds_batches(source, data, seed, batch_size, n_jitted_steps, start_step, host)
    mine = slice(host.index * share, (host.index + 1) * share)
    updates = (_array_update(source, data, seed, batch_size, update)[mine] for update in itertools.count(start_step))
    devices = host.local_devices, share // host.local_devices, *source.image_shape
    parts = (images.reshape(devices) for images in updates)
    return ({"image": np.stack(batch, axis=1)} for batch in zip(*[parts] * n_jitted_steps, strict=True))


def _array_update(
    source: ArraySource, data: DataOptions, seed: int, batch_size: int, update: int
) -> Float[np.ndarray, "batch height width channels"]:
    """The images of one update of all hosts, flipped, dequantized and scaled as `data` says."""
    random = np.random.default_rng([seed, update, _CHANGES])
    images = source.shuffled(seed, update * batch_size + np.arange(batch_size))
    if data.random_flip:
        mirrored = random.random(batch_size) < 0.5
        images[mirrored] = images[mirrored, :, ::-1]
    levels = images.astype(np.float32)
    if data.uniform_dequantization:
        levels += random.random(images.shape, np.float32)
    return scale(levels, centered=data.centered, dequantized=data.uniform_dequantization)


def _tfds_batches(source, data, seed, batch_size, n_jitted_steps, start_step, host):
    """`train_batches` of a data set on the disk, by tf.data."""
    tf, share = tensorflow_on_cpu(), host.share(batch_size)
    stream = _stream(source, seed, start_step * batch_size)
    if host.count > 1:
        stream = stream.filter(lambda index, record: index % batch_size // share == host.index)
    images = stream.map(lambda index, record: source.image(record), tf.data.AUTOTUNE, deterministic=True)
    updates = images.batch(share, drop_remainder=True).enumerate(start_step)
    prepared = functools.partial(_prepared, data, seed, batch_size, host.index * share)
    updates = updates.map(prepared, tf.data.AUTOTUNE, deterministic=True)
    batches = updates.batch(n_jitted_steps, drop_remainder=True)
    batches = batches.map(functools.partial(_by_device, host.local_devices)).prefetch(PREFETCH)
    return ({"image": batch} for batch in _numpy(batches, source.name))


def _stream(source: TfdsSource, seed: int, start: int):
    """The endless tf.data.Dataset of (stream index, record), shuffled passes one after another, from `start`."""
    tf = tensorflow_on_cpu()
    first, skipped = divmod(start, source.size)

    def one_pass(number: Any) -> Any:
        seeds = tf.random.stateless_uniform([2], [seed, number], maxval=2**31 - 1, dtype=tf.int64)
        return source.shuffled(seeds).skip(tf.where(number == first, tf.constant(skipped, tf.int64), 0))

    return tf.data.Dataset.range(first, np.iinfo(np.int64).max).flat_map(one_pass).enumerate(start)


def _prepared(data, seed: int, batch_size: int, first: int, update, images):
    """A host's uint8 images of one update, flipped, dequantized and scaled as `data` says.

    Random numbers are drawn for the whole batch from (seed, update), so that they do not depend on how hosts share it;
    the host's images are those from `first` on.
    """
    tf = tensorflow_on_cpu()
    count, *shape = images.shape
    if data.random_flip:
        mirrored = tf.random.stateless_uniform([batch_size], [seed, 2 * update])[first : first + count] < 0.5
        images = tf.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
    levels = tf.cast(images, tf.float32)
    if data.uniform_dequantization:
        levels += tf.random.stateless_uniform([batch_size, *shape], [seed, 2 * update + 1])[first : first + count]
    return scale(levels, centered=data.centered, dequantized=data.uniform_dequantization)


def _by_device(devices: int, batch):
    """[steps, images, h, w, c] to [devices, steps, images / devices, h, w, c], the images of a step dealt in order."""
    tf = tensorflow_on_cpu()
    steps, images, *shape = batch.shape
    return tf.transpose(tf.reshape(batch, [steps, devices, images // devices, *shape]), [1, 0, 2, 3, 4, 5])


def _numpy(dataset, name: str) -> Iterator[np.ndarray]:
    """The elements of a tf.data.Dataset as NumPy arrays, always in the same order.

    Raises:
      InputError: TensorFlow cannot read or decode an element.
    """
    tf = tensorflow_on_cpu()
    options = tf.data.Options()
    options.deterministic = True
    unreadable = tf.errors.OpError  # looked up now: tf may be gone when a generator is closed at exit
    try:
        yield from dataset.with_options(options).as_numpy_iterator()
    except unreadable as error:
        without_graph_names = re.sub(r"\{\{.*?\}\}|\[\[.*?\]\]|\[Op:.*", "", error.message, flags=re.DOTALL)
        reason = " ".join(without_graph_names.split())
        raise InputError(f"the data set {name} cannot be read: {reason}") from error
