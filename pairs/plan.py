"""The plan of a pair set: everything that its bytes depend on (docs/method.md, section 8).

File i depends on the plan and on i alone. Its pairs take the images at positions (i - 1) file_size, ... of the data
set's fixed order; a permutation from (seed, i) gives every segment an equal share of them, and pair j of the set draws
its noise with the key (seed, j). Random numbers and starting points are made by NumPy, on the host, one pair at a
time: they are the same bits on every machine and in every batch, so that a start that was not stored can be rebuilt.

A set of trajectories is planned in the same way: its "pairs" are trajectories, each from its own noise at t = 1 through
all segments.
"""

import dataclasses
import json
import logging
import math
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Bool, Float, Int, UInt8, UInt32

import datasets
import segments
from pairs import npz

FORMAT = 1  # of the manifest and of how pairs follow from it
SMALL_ARRAYS_BYTES = {True: 8, False: 25}  # of a pair beside its images, by whether noise is stored
FILE_OVERHEAD_BYTES = 4096  # headers of a file, at most

logger = logging.getLogger("seqrf")


@dataclasses.dataclass(frozen=True)
class PairPlan:
    """Everything that a pair set depends on; `plan_pairs` makes one.

    Attributes:
      folder: where the set is.
      boundaries: [k + 1] of the segments, in t, from 1 to 0.
      pairs: in the whole set, of all segments together; a multiple of k.
      file_size: pairs in every file but the last, which may be shorter; a multiple of k.
      image_shape: (H, W, C).
      dataset, dataset_size: the identity of the data set and how many images it has.
      centered: the model's range is [-1, 1], else [0, 1].
      flip: mirror images left to right with probability 1/2.
      dequantize: add U[0, 1) to the 0..255 values, then divide by 256.
      seed: what all noise, flips and shuffles follow from.
      teacher: the fingerprint of the weights that solve the pairs.
      tol, solver, error_norm: how they are solved.
      dtype: "float32" or "float16", of stored images.
      store_noise: False: x1 is not stored but rebuilt from (image, flip, key), and compared with its checksum.
      inverted_pairs: share (0 to 1) of the pairs of each segment and file that are inverted: x0 is the noisy image at
        the segment's end, and the ODE is solved backwards to x1.
      reflow_pairs: "segments", pairs, or "trajectory": the teacher's states at all boundaries.
    """

    folder: epath.Path
    boundaries: tuple[float, ...]
    pairs: int
    file_size: int
    image_shape: tuple[int, int, int]
    dataset: str
    dataset_size: int
    centered: bool
    flip: bool
    dequantize: bool
    seed: int
    teacher: str
    tol: float
    solver: str
    error_norm: str
    dtype: str
    store_noise: bool
    # Later entries of the manifest, which states them only where they are not the default.
    inverted_pairs: float = 0.0
    reflow_pairs: str = "segments"

    @property
    def is_trajectory(self) -> bool:
        """Whether it is a set of trajectories rather than of pairs."""
        return self.reflow_pairs == "trajectory"

    @property
    def k(self) -> int:
        """The number of segments."""
        return len(self.boundaries) - 1

    @property
    def files(self) -> int:
        """The number of files; they are numbered from 1."""
        return math.ceil(self.pairs / self.file_size)

    def count(self, number: int) -> int:
        """The pairs in file `number`."""
        return min(self.file_size, self.pairs - (number - 1) * self.file_size)

    def path(self, number: int) -> epath.Path:
        """The path of file `number`."""
        return self.folder / npz.file_name(number)

    def file_bytes(self, number: int) -> int:
        """The size of file `number`, at most."""
        images = self.k + 1 if self.is_trajectory else 1 + self.store_noise
        image_bytes = math.prod(self.image_shape) * np.dtype(self.dtype).itemsize
        return self.count(number) * (images * image_bytes + SMALL_ARRAYS_BYTES[self.store_noise]) + FILE_OVERHEAD_BYTES

    def definition(self) -> dict[str, Any]:
        """What decides the bytes of the set, as its manifest has it: without the folder, in JSON's types."""
        values = dataclasses.asdict(self) | {"k": self.k, "files": self.files, "format": FORMAT}
        values = {name: value for name, value in values.items() if name not in DEFAULTS or value != DEFAULTS[name]}
        del values["folder"]
        return json.loads(json.dumps(values))


# Of entries that a manifest may lack.
DEFAULTS = {
    field.name: field.default for field in dataclasses.fields(PairPlan) if field.default is not dataclasses.MISSING
}


def plan_pairs(*, folder: epath.PathLike, boundaries: Any, pairs: int, file_size: int, **settings: Any) -> PairPlan:
    """The plan for at least `pairs` pairs: `pairs` and `file_size` are rounded up to multiples of k.

    Args:
      pairs: or trajectories, whose number is not rounded.
      settings: the other attributes of `PairPlan`.

    Raises:
      ValueError: invalid boundaries.
    """
    boundaries = tuple(segments.validate_boundaries(boundaries).tolist())
    plan = PairPlan(folder=epath.Path(folder), boundaries=boundaries, pairs=pairs, file_size=file_size, **settings)
    k = 1 if plan.is_trajectory else plan.k
    rounded = math.ceil(pairs / k) * k
    if rounded != pairs:
        logger.info("training.n_reflow_data is rounded up from %d to %d, a multiple of k = %d", pairs, rounded, k)
    return dataclasses.replace(plan, pairs=rounded, file_size=min(rounded, math.ceil(file_size / k) * k))


@dataclasses.dataclass(frozen=True)
class FileLayout:
    """What the n pairs, or trajectories, of one file start from.

    Attributes:
      segment: the segment that each pair belongs to, each equally often; 0 for trajectories.
      inverted: whether the pair is solved from t0 to t1.
      image: the position of its image in the data set; -1 where it starts from noise alone.
      flip: whether the image is mirrored.
      key: of the random numbers of its noise.
      t0, t1: the times of the segment's end and start.
      first_image: the file's images are those at positions first_image, first_image + 1, ..., modulo dataset_size.
    """

    segment: Int[np.ndarray, "n"]
    inverted: Bool[np.ndarray, "n"]
    image: Int[np.ndarray, "n"]
    flip: Bool[np.ndarray, "n"]
    key: UInt32[np.ndarray, "n 2"]
    t0: Float[np.ndarray, "n"]
    t1: Float[np.ndarray, "n"]
    first_image: int


def file_layout(plan: PairPlan, number: int) -> FileLayout:
    """The layout of file `number`, from (plan, number) alone."""
    first, n = (number - 1) * plan.file_size, plan.count(number)
    random = np.random.default_rng([plan.seed % 2**32, number])
    k = 1 if plan.is_trajectory else plan.k
    segment = random.permutation(np.repeat(np.arange(k, dtype=np.int32), n // k))
    mirrored = random.random(n) < 0.5
    inverted = np.zeros(n, bool)
    for i in range(k):
        rows = random.permutation(np.flatnonzero(segment == i))
        inverted[rows[: round(plan.inverted_pairs * len(rows))]] = True
    position = first + np.arange(n)
    image = np.where((segment > 0) | inverted, position % plan.dataset_size, -1).astype(np.int32)
    flip = plan.flip & mirrored & (image >= 0)
    key = np.stack([np.full(n, plan.seed % 2**32), position], axis=1).astype(np.uint32)
    boundaries = np.asarray(plan.boundaries, np.float32)
    return FileLayout(segment, inverted, image, flip, key, boundaries[segment + 1], boundaries[segment], first)


def file_images(images: datasets.ImageSource, first: int, image: Int[np.ndarray, "n"]) -> UInt8[np.ndarray, "n h w c"]:
    """The images of a file's pairs; none is read where all start from noise (`image` is -1), as with k = 1.

    Args:
      images: the data set.
      first, image: `first_image` and `image` of the file's layout.
    """
    if np.all(image < 0):
        return np.broadcast_to(np.uint8(0), (len(image), *images.image_shape))
    return images.read(first, len(image))


def start_points(
    images: UInt8[np.ndarray, "n h w c"],
    flip: Bool[np.ndarray, "n"],
    key: UInt32[np.ndarray, "n 2"],
    t: Float[np.ndarray, "n"],
    *,
    centered: bool,
    dequantize: bool,
    dtype: str,
) -> Float[np.ndarray, "n h w c"]:
    """Noisy images at t (`segments.noisy_image`), rounded to `dtype`: what each pair is solved from.

    At t = 1 they are noise alone, whatever the image. The bits of a row depend on that row of the arguments only.
    """
    tau = np.where(t == 1, 0, segments.tau_of_t(t)).astype(np.float32)
    out = np.empty(images.shape, dtype)
    for row, image in enumerate(images):
        random = np.random.Generator(np.random.Philox(key=key[row].astype(np.uint64)))
        noise = random.standard_normal(image.shape, np.float32)
        data = (image[:, ::-1] if flip[row] else image).astype(np.float32)
        if dequantize:
            data += random.random(image.shape, np.float32)
        data = datasets.scale(data, centered=centered, dequantized=dequantize)
        out[row] = segments.noisy_image(data, noise, tau[row])
    return out
