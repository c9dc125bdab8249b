"""The floor of the distances to the data: those that samples as good as the data would have."""

import contextlib
import dataclasses
import functools

import numpy as np
from etils import epath

import datasets
import runtime
from metrics import feature_networks, reference
from metrics.reference import RealData
from utils import InputError

TEST_SPLITS = ("test", "validation")  # what data sets call the images that are not trained on


@dataclasses.dataclass(frozen=True)
class Floor:
    """The distances that samples as good as the data would have.

    Attributes:
      images: 'test' or 'validation', the split that is compared with the reference; 'halves': one half of the reference
        is compared with the other.
      samples: how many images are compared ...
      reference_samples: ... with how many; None where the reference is a file that does not say.
    """

    images: str
    samples: int
    reference_samples: int | None
    distances: dict[str, float]

    def metrics(self) -> dict[str, float]:
        """As metrics.json has them."""
        found: dict[str, float | None] = {**self.distances, "samples": self.samples}
        found["reference_samples"] = self.reference_samples
        return {f"floor_{name}": value for name, value in found.items() if value is not None}


def floor(
    real: RealData,
    data: datasets.DataOptions,
    batch_size: int,
    count: int | None = None,
    cache_dir: epath.PathLike | None = None,
) -> Floor | None:
    """The distances of the data set's test images to the reference; without test images those of two halves of it.

    Computed once, then read from the cache. None where a reference file has moments alone and there are no test images.

    Args:
      count: test images to compare; None: all. The FID of few samples is larger, so floors compare at equal counts.
      cache_dir: as `metrics.reference.real_data`.
    """
    folder = str(runtime.cache_folder() if cache_dir is None else cache_dir)
    return _floor(real, data, batch_size, count, folder)


@functools.lru_cache(maxsize=8)
def _floor(
    real: RealData, data: datasets.DataOptions, batch_size: int, count: int | None, cache_dir: str
) -> Floor | None:
    source = _test_images(data)
    if source is not None:
        split, images = source
        other = reference.of_images(real.network, images, batch_size, split=split, cache_dir=cache_dir)
        against, fake, made_of = real, other.features, other.record["sha256"]
    elif real.features is not None:
        order = np.random.default_rng(0).permutation(len(real.features))
        half, rest = np.array_split(real.features[order], 2)
        against = reference.of_features(real.network, half)
        split, fake, made_of = "halves", rest, "halves"
    else:
        return None
    assert fake is not None
    fake = fake[:count]

    def compute() -> dict[str, np.ndarray]:
        return {name: np.array(value) for name, value in reference.feature_distances(against, fake).items()}

    key = feature_networks.key(reference.FORMAT, real.record["sha256"], made_of, len(fake))
    found = feature_networks.cached(f"floor_{real.network.name}_{key}.npz", compute, cache_dir, shared=True)
    return Floor(split, len(fake), against.count, {name: float(value) for name, value in found.items()})


def _test_images(data: datasets.DataOptions) -> tuple[str, datasets.ImageSource] | None:
    for split in TEST_SPLITS:
        with contextlib.suppress(InputError):
            source = datasets.image_source(data, split)
            if source.size > reference.NEIGHBOURS:
                return split, source
    return None
