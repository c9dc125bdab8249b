"""What samples are compared with: features of a data set's images and their statistics, computed once and kept."""

import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Iterator
from typing import Any, TypedDict

import numpy as np
import tqdm
from etils import epath
from jaxtyping import Float, Int, UInt8

import datasets
import distributed
import runtime
import utils
from metrics import distances, feature_networks, inception
from metrics.distances import Moments
from metrics.feature_networks import FeatureNetwork
from utils import InputError

logger = logging.getLogger("seqrf")

FORMAT = 1  # of the files; another format is another key of the cache
KEPT = 100_000  # images whose features are kept, for the distances over pairs of them; moments are of all images
PIXEL_BYTES = 2**30  # the largest data set whose pixels are compared
NEIGHBOURS = 3  # k of precision and recall
LEVELS = "uint8, 0 to 255"
# The arrays of a file: name -> dtype and dimensions.
_ARRAYS = {
    "mu": ("f[48]", 1), "sigma": ("f[48]", 2), "pool_3": ("f[48]", 2), "kernel_sums": ("f[48]", 1),
    "record": (r"U\d+", 0),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
    """Where features and statistics of real images come from.

    Attributes:
      inception_path: folder of a SavedModel of Inception; 'none' for its handle on TF-Hub.
      feature_backend: what runs Inception, see `metrics.inception.inception`.
      file: an npz file of them; 'none': the data set's own training images.
      max_real: how many of those; 0: all.
      network: 'auto'; 'classifier' for `feature_networks.label_classifier`, of labelled colour pictures too;
        'inception_v3' for `metrics.inception.V3`; 'pixels' for `feature_networks.pixel_network`.
    """

    inception_path: str = "none"
    feature_backend: str = "auto"
    file: str = "none"
    max_real: int = 0
    network: str = "auto"


class _Record(TypedDict, total=False):
    """What a file says of itself, as far as it is used without a comparison."""

    images: int
    data: str
    split: str


@dataclasses.dataclass(frozen=True, eq=False)
class RealData:
    """A feature network and what is known of its features of the data.

    Attributes:
      moments: of the features of all images.
      features: [n, d] of the images, or of KEPT of them; None where a file has the moments alone.
      kernel_sums: `metrics.distances.kernel_sums` of them.
      record: what was done: data set, count, network, ...
      source: the images, where they are at hand.
    """

    network: FeatureNetwork
    moments: Moments
    features: Float[np.ndarray, "n d"] | None
    kernel_sums: Float[np.ndarray, "n"] | None
    record: dict[str, Any]
    source: datasets.ImageSource | None = None
    _radii: dict[int, tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def count(self) -> int | None:
        """The images behind the moments; None where a file does not say."""
        return self.record.get("images")

    @property
    def numbers(self) -> Int[np.ndarray, "n"]:
        """The numbers of the images whose features are kept."""
        assert self.features is not None
        return spread(self.count or len(self.features), len(self.features))

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the numbers: the record without the bits of features, which differ between machines."""
        return {name: value for name, value in self.record.items() if name != "sha256" or "file" in self.record}

    def neighbourhood(self, count: int) -> tuple[Float[np.ndarray, "m d"], Float[np.ndarray, "m"]]:
        """At most `count` of the features, and their squared distances to the k-th nearest of these; computed once."""
        assert self.features is not None
        if count not in self._radii:
            chosen = self.features[spread(len(self.features), count)]
            self._radii[count] = chosen, distances.squared_radii(chosen, NEIGHBOURS)
        return self._radii[count]

    @functools.cached_property
    def images(self) -> UInt8[np.ndarray, "n h w c"] | None:
        """All images of the data set; None where they are not at hand or take more than PIXEL_BYTES."""
        source = self.source
        if source is None or source.size * int(np.prod(source.image_shape)) > PIXEL_BYTES:
            return None
        return source.read(0, source.size)


def spread(total: int, count: int) -> Int[np.ndarray, "m"]:
    """`count` numbers below `total`, or all of them, evenly spread."""
    count = min(count, total)
    return np.arange(count) * total // max(count, 1)


def feature_distances(real: RealData, fake: Float[np.ndarray, "n d"]) -> dict[str, float]:
    """FID, KID and its error under their names in metrics.json; FID alone where only the moments are known.

    Raises:
      ValueError: as `metrics.distances.frechet_distance`.
    """
    suffix = real.network.suffix
    found = {f"fid{suffix}": distances.frechet_distance_to(real.moments, fake)}
    if real.features is None:
        return found
    kernel, error = distances.kernel_distance_and_error(real.features, fake, sums_a=real.kernel_sums)
    return found | {f"kid{suffix}": kernel, f"kid_error{suffix}": error}


# --- made from images -------------------------------------------------------------------------------------------------


def feature_network(
    data: datasets.DataOptions, options: Options, cache_dir: epath.PathLike | None = None
) -> FeatureNetwork:
    """The network whose features samples and images of a data set are compared in.

    Inception for photographs, a classifier of the labels for grey images, or `feature_networks.pixel_network`.

    Args:
      cache_dir: where a trained classifier is kept; None for `runtime.cache_folder()`.

    Raises:
      InputError: Inception is not available, or not valid, within seconds; or as `feature_networks.label_classifier`.
    """
    if options.network == "pixels":
        return feature_networks.pixel_network()
    if options.network == "classifier" or (data.num_channels == 1 and options.network == "auto"):
        return feature_networks.label_classifier(data, cache_dir)
    kind = inception.V3 if options.network == "inception_v3" else inception.TFGAN
    return inception.inception(options.inception_path, options.feature_backend, kind)


def image_features(
    network: FeatureNetwork, source: datasets.ImageSource, batch_size: int, count: int
) -> Iterator[Float[np.ndarray, "b d"]]:
    """Yields the features of the first `count` images in batches; all hosts share the work and get all of it."""
    host = distributed.this_host()
    share = -(-batch_size // host.count)
    batches = range(0, count, share * host.count)
    for first in tqdm.tqdm(batches, f"{network.name} features of {source.name}", leave=False, disable=None):
        images = source.read(first + host.index * share, share)  # read past the end begins again, and is cut off here:
        yield distributed.gather(network.features_and_logits(images)[0])[: count - first]


def of_images(
    network: FeatureNetwork,
    source: datasets.ImageSource,
    batch_size: int,
    *,
    split: str = "train",
    max_real: int = 0,
    cache_dir: epath.PathLike | None = None,
) -> RealData:
    """Of the first `max_real` images of a data set, all if 0; computed once, then read from the cache.

    Raises:
      InputError: the data set cannot be read, or has too few images.
    """
    count = min(source.size, max_real or source.size)
    if count <= NEIGHBOURS:
        raise InputError(f"the data set {source.name} has {source.size} images; distances to it need {NEIGHBOURS + 1}")

    def compute() -> dict[str, np.ndarray]:
        kept, chosen = [], spread(count, KEPT)

        def passing() -> Iterator[np.ndarray]:
            first = 0
            for block in image_features(network, source, batch_size, count):
                kept.append(block[chosen[(chosen >= first) & (chosen < first + len(block))] - first])
                first += len(block)
                yield block

        found = distances.moments(passing())
        pool = np.concatenate(kept)
        record = _record(network, source, split, count)
        return _arrays(found, pool, distances.kernel_sums(pool), record)

    key = feature_networks.key(FORMAT, network.identity, source.identity, split, count, KEPT)
    arrays = feature_networks.cached(f"real_{network.name}_{key}.npz", compute, cache_dir, shared=True)
    return _from_arrays(network, arrays, json.loads(str(arrays["record"])), source)


def of_features(
    network: FeatureNetwork, pool: Float[np.ndarray, "n d"], record: dict[str, Any] | None = None
) -> RealData:
    """Of features [n, d] that are at hand."""
    record = {"images": len(pool), "sha256": hashlib.sha256(pool.tobytes()).hexdigest()} | (record or {})
    return RealData(network, distances.moments(distances.blocks(pool)), pool, distances.kernel_sums(pool), record)


def _record(network: FeatureNetwork, source: datasets.ImageSource, split: str, count: int) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "data": source.name,
        "data_identity": source.identity,
        "split": split,
        "images": count,
        "images_in_split": source.size,
        "image_shape": list(source.image_shape),
        "levels": LEVELS,
        "preprocessing": network.preprocessing,
        "network": network.name,
        "network_identity": network.identity,
    }


def _arrays(found: Moments, pool: np.ndarray, sums: np.ndarray, record: dict[str, Any]) -> dict[str, np.ndarray]:
    """What a file holds; `mu`, `sigma` and `pool_3` are the names that others' files and programs use."""
    digest = hashlib.sha256()
    for array in (found.mean, found.covariance, pool):
        digest.update(array.tobytes())
    record = record | {"features_kept": len(pool), "sha256": digest.hexdigest()}
    return {
        "mu": found.mean,
        "sigma": found.covariance,
        "pool_3": pool,
        "kernel_sums": sums,
        "record": np.array(json.dumps(record)),
    }


def _from_arrays(network, arrays: dict[str, np.ndarray], record: dict[str, Any], source) -> RealData:
    found = Moments(arrays["mu"], arrays["sigma"])
    return RealData(network, found, arrays.get("pool_3"), arrays.get("kernel_sums"), record, source)


def real_data(
    data: datasets.DataOptions, options: Options, batch_size: int, cache_dir: epath.PathLike | None = None
) -> RealData:
    """What samples are compared with; in a process the same object, its network compiled, for the same arguments.

    Args:
      batch_size: images over all devices of all hosts.
      cache_dir: where classifiers and features are kept; None for `runtime.cache_folder()`.

    Raises:
      InputError: as `feature_network`, `datasets.image_source` and `read_file`, before any feature is computed.
    """
    folder = str(runtime.cache_folder() if cache_dir is None else cache_dir)
    return _real_data(data, options, batch_size, folder)


@functools.lru_cache(maxsize=2)
def _real_data(data: datasets.DataOptions, options: Options, batch_size: int, cache_dir: str) -> RealData:
    network = feature_network(data, options, cache_dir)
    if options.file.lower() not in ("", "none"):
        return read_file(options.file, network, data)
    source = datasets.image_source(data)
    return of_images(network, source, batch_size, max_real=options.max_real, cache_dir=cache_dir)


# --- read from files --------------------------------------------------------------------------------------------------


def read_file(path: epath.PathLike, network: FeatureNetwork, data: datasets.DataOptions) -> RealData:
    """Features and statistics in an npz file: one that scripts/reference_stats.py wrote, or another program's.

    Others' files have the features as `pool_3`, or `mu` and `sigma` alone, which give the FID and nothing else; that
    they are this network's cannot be known, and a warning says so.

    Args:
      data: whose images the samples are like.

    Raises:
      InputError: no such file, not such a file, or one for another network, resolution or range.
    """
    arrays = _read_npz(path)
    if (record := _record_of(path, arrays)) is None:
        logger.warning("%s does not say which network and images it is of; its figures are only as good as that", path)
    else:
        _check_record(path, record, network, data)
    pool = arrays.get("pool_3")
    found = Moments(arrays["mu"], arrays["sigma"]) if "mu" in arrays else distances.moments([arrays["pool_3"]])
    _check_width(path, found, pool, network, data)
    if pool is not None and "kernel_sums" not in arrays:
        pool = pool[spread(len(pool), KEPT)]
        arrays["kernel_sums"] = distances.kernel_sums(pool)
    known = {} if pool is None else {"images": len(pool)}
    record = {"file": epath.Path(path).name, **known, **(record or {}), "sha256": _digest(path)}
    return RealData(network, found, pool, arrays.get("kernel_sums"), record)


def _read_npz(path: epath.PathLike) -> dict[str, np.ndarray]:
    """The arrays of a reference file, with their types checked."""
    with utils.damage_named("eval.reference"):
        arrays = utils.read_arrays(path, _ARRAYS)
    if "pool_3" not in arrays and not {"mu", "sigma"} <= set(arrays):
        raise InputError(
            f"eval.reference = {path} has neither mu and sigma nor pool_3; scripts/reference_stats.py makes one"
        )
    shapes = {name: array.shape for name, array in arrays.items()}
    images, width = shapes.get("pool_3", (2, *shapes.get("mu", ())))
    has_both = ("mu" in shapes and "sigma" in shapes) or not {"mu", "sigma"} & shapes.keys()
    wanted = {"pool_3": (images, width), "mu": (width,), "sigma": (width, width), "kernel_sums": (images,)}
    is_sound = has_both and images > 1 and all(shape == wanted.get(name, ()) for name, shape in shapes.items())
    numbers = [array for name, array in arrays.items() if name != "record"]
    if not is_sound or not all(np.isfinite(array).all() for array in numbers):
        raise InputError(
            f"eval.reference = {path} has mu, sigma or pool_3 of a wrong shape, or values that are not finite"
        )
    return arrays


def _record_of(path: epath.PathLike, arrays: dict[str, np.ndarray]) -> dict[str, Any] | None:
    """Takes the record from the arrays of a file; None: it has none."""
    if "record" not in arrays:
        return None
    with utils.damage_named(f"eval.reference = {path} has a damaged record"):
        return utils.parse_json(str(arrays.pop("record")), _Record)


def _check_record(
    path: epath.PathLike, record: dict[str, Any], network: FeatureNetwork, data: datasets.DataOptions
) -> None:
    """Raises InputError where statistics were made for other features or other images than the evaluation's."""
    shape = [data.image_size, data.image_size, data.num_channels]
    wanted = {
        "network": network.name,
        "network_identity": network.identity,
        "image_shape": shape,
        "levels": LEVELS,
        "format": FORMAT,
    }
    for name, value in wanted.items():
        if record.get(name) != value:
            raise InputError(
                f"eval.reference = {path} has {name} {record.get(name)}, but this evaluation {value}; make it again "
                "with scripts/reference_stats.py and this configuration"
            )


def _check_width(
    path, found: Moments, pool: np.ndarray | None, network: FeatureNetwork, data: datasets.DataOptions
) -> None:
    image = np.zeros((1, data.image_size, data.image_size, data.num_channels), np.uint8)
    width = network.features_and_logits(image)[0].shape[1]
    if {found.mean.size, width if pool is None else pool.shape[1]} != {width}:
        raise InputError(
            f"eval.reference = {path} is of {found.mean.size} features, but {network.name} has {width}: it was made "
            "with another network"
        )


def _digest(path: epath.PathLike) -> str:
    with epath.Path(path).expanduser().open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_file(path: epath.PathLike, real: RealData) -> None:
    """Writes features and statistics to a file that `read_file` reads; its `mu` and `sigma` serve other programs too.

    Raises:
      OSError: no space or no permission.
    """
    assert real.features is not None
    assert real.kernel_sums is not None
    arrays: dict[str, Any] = _arrays(real.moments, real.features, real.kernel_sums, real.record)
    utils.write_arrays(path, **arrays)
