"""What a pair set is: the plan that decides every byte of it, and the manifest that says so beside the files.

File i depends on the plan and on i alone. Its pairs take the images at positions (i - 1) file_size, ... of the data
set's fixed order; a permutation from (seed, i) gives every segment an equal share of them, and pair j of the set draws
its noise with the key (seed, j). Random numbers and starting points are made by NumPy, on the host, one pair at a
time: they are the same bits on every machine and in every batch, so that a start that was not stored can be rebuilt.
"""

import dataclasses
import json
import logging
import math
import typing

import numpy as np
from etils import epath
from jaxtyping import Bool, Float, Int, UInt8, UInt32

import segments
import utils
from pairs import npz
from utils import InputError, os_errors

MANIFEST = "manifest.json"
FORMAT = 1  # of the manifest and of how pairs follow from it
DTYPES = ("float32", "float16")
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
      store_noise: False: x1 is not stored but rebuilt from (image, flip, key), and held against its checksum.
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
        """Where file `number` is."""
        return self.folder / npz.file_name(number)

    def file_bytes(self, number: int) -> int:
        """The room that file `number` takes, at most."""
        images = (2 if self.store_noise else 1) * math.prod(self.image_shape) * np.dtype(self.dtype).itemsize
        return self.count(number) * (images + SMALL_ARRAYS_BYTES[self.store_noise]) + FILE_OVERHEAD_BYTES

    def definition(self) -> dict:
        """What decides the bytes of the set, as the manifest has it: without the folder, in JSON's types."""
        values = dataclasses.asdict(self) | {"k": self.k, "files": self.files, "format": FORMAT}
        del values["folder"]
        return json.loads(json.dumps(values))


def plan_pairs(*, folder, boundaries, pairs: int, file_size: int, dtype: str, **rest) -> PairPlan:
    """The plan for at least `pairs` pairs: `pairs` and `file_size` are rounded up to multiples of k.

    Raises:
      InputError: a number of pairs that is not positive, an unknown dtype.
      ValueError: boundaries that are none.
    """
    boundaries = tuple(segments.validate_boundaries(boundaries).tolist())
    k = len(boundaries) - 1
    for name, value in (("training.n_reflow_data", pairs), ("training.reflow_file_size", file_size)):
        if value < 1:
            raise InputError(f"{name} = {value}, but there must be at least one pair")
    if dtype not in DTYPES:
        raise InputError(f"training.reflow_dtype = {dtype!r} is not known; it can be {' or '.join(DTYPES)}")
    wanted, pairs = pairs, math.ceil(pairs / k) * k
    if pairs != wanted:
        logger.info("training.n_reflow_data is rounded up from %d to %d, a multiple of k = %d", wanted, pairs, k)
    file_size = min(pairs, math.ceil(file_size / k) * k)
    return PairPlan(
        folder=epath.Path(folder), boundaries=boundaries, pairs=pairs, file_size=file_size, dtype=dtype, **rest
    )


# What a manifest must have, and of which kind.
MANIFEST_ENTRIES = {"format": int, "complete": bool, "k": int, "files": int} | {
    field.name: field.type for field in dataclasses.fields(PairPlan) if field.name != "folder"
}


@dataclasses.dataclass(frozen=True)
class FileLayout:
    """What the n pairs of one file start from.

    Attributes:
      segment: the segment that each pair belongs to, as often one as the other.
      image: the position of its image in the data set; -1 in segment 0, which starts from noise alone.
      flip: whether the image is mirrored.
      key: what its noise is drawn with.
      t0, t1: the times of the segment's end and start.
      first_image: its images are those at positions first_image, first_image + 1, ..., modulo the data set's size.
    """

    segment: Int[np.ndarray, "n"]
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
    segment = random.permutation(np.repeat(np.arange(plan.k, dtype=np.int32), n // plan.k))
    place = first + np.arange(n)
    image = np.where(segment > 0, place % plan.dataset_size, -1).astype(np.int32)
    flip = plan.flip & (random.random(n) < 0.5) & (image >= 0)
    key = np.stack([np.full(n, plan.seed % 2**32), place], axis=1).astype(np.uint32)
    boundaries = np.asarray(plan.boundaries, np.float32)
    return FileLayout(segment, image, flip, key, boundaries[segment + 1], boundaries[segment], first)


def start_points(
    images: UInt8[np.ndarray, "n h w c"],
    flip: Bool[np.ndarray, "n"],
    key: UInt32[np.ndarray, "n 2"],
    t1: Float[np.ndarray, "n"],
    *,
    centered: bool,
    dequantize: bool,
    dtype: str,
) -> Float[np.ndarray, "n h w c"]:
    """x1 = tau(t1) data + (1 - tau(t1)) noise, rounded to `dtype`: where each pair starts (design.md section 2).

    At t1 = 1 it is noise alone, whatever the image. The bits of a row depend on that row of the arguments only.
    """
    tau = np.where(t1 == 1, 0, segments.tau_of_t(t1)).astype(np.float32)
    out = np.empty(images.shape, dtype)
    for row, image in enumerate(images):
        random = np.random.Generator(np.random.Philox(key=key[row].astype(np.uint64)))
        noise = random.standard_normal(image.shape, np.float32)
        data = (image[:, ::-1] if flip[row] else image).astype(np.float32)
        if dequantize:
            data += random.random(image.shape, np.float32)
        data /= np.float32(256 if dequantize else 255)
        if centered:
            data = data * np.float32(2) - np.float32(1)
        out[row] = segments.noisy_image(data, noise, tau[row])
    return out


def read_manifest(folder) -> dict | None:
    """What the manifest of the set in `folder` says; None where there is no manifest.

    Raises:
      InputError: the manifest is damaged, or cannot be read.
    """
    path = epath.Path(folder) / MANIFEST
    try:
        with os_errors():
            if not path.exists():
                return None
            manifest = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    except ValueError as error:
        raise InputError(
            f"{path} is damaged ({error}); bring back a copy, or remove the whole set and make it anew"
        ) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{path} is not the manifest of a pair set of format {FORMAT}; use another workdir")
    if wrong := _wrong_entry(manifest):
        raise InputError(f"{path} is damaged: {wrong}; bring back a copy, or remove the whole set and make it anew")
    return manifest


def _wrong_entry(manifest):
    """What is wrong with the first entry that no set can have, in words; None if all are sound."""
    for name, kind in MANIFEST_ENTRIES.items():
        if name not in manifest:
            return f"it has no {name}"
        if not _is_of_kind(manifest[name], kind):
            return f"its {name} is {manifest[name]!r}"
    contents, pairs, file_size = manifest.get("contents", {}), manifest["pairs"], manifest["file_size"]
    sound = {
        "boundaries": _are_boundaries(manifest["boundaries"]),
        "k": manifest["k"] == len(manifest["boundaries"]) - 1,
        "image_shape": len(manifest["image_shape"]) == 3 and min(manifest["image_shape"]) > 0,
        "pairs": pairs > 0,
        "file_size": file_size > 0,
        "files": manifest["files"] == math.ceil(pairs / max(file_size, 1)),
        "dataset_size": manifest["dataset_size"] > 0,
        "dtype": manifest["dtype"] in DTYPES,
        "contents": isinstance(contents, dict)
        and all(isinstance(what, dict) and what.keys() == {"bytes", "crc32"} for what in contents.values()),
    }
    return next((f"its {name} cannot be {manifest[name]!r}" for name, good in sound.items() if not good), None)


def _is_of_kind(value, kind):
    """Whether a value in JSON can be one of `kind`: a tuple is a list there, and a float may look like an integer."""
    if of := typing.get_args(kind):
        return isinstance(value, list) and all(_is_of_kind(part, of[0]) for part in value)
    return type(value) is kind or (kind is float and type(value) is int)


def _are_boundaries(times):
    try:
        segments.validate_boundaries(times)
    except (ValueError, OverflowError):
        return False
    return True


def write_manifest(folder, manifest: dict) -> None:
    """Writes the manifest of the set in `folder`, whole or not at all."""
    utils.write_json(epath.Path(folder) / MANIFEST, manifest)


def begin_manifest(plan: PairPlan, extra: dict) -> dict:
    """The manifest of the planned set, which is written, with `extra` entries, unless it is there and agrees.

    Raises:
      InputError: the folder holds another set; the message names the first entry that differs.
    """
    manifest = _begun_manifest(plan, extra)
    for name, wanted in plan.definition().items():
        if manifest.get(name) != wanted:
            raise InputError(
                f"{plan.folder} holds pairs with {name} = {manifest.get(name)}, but this run makes them with "
                f"{wanted}; use the same settings, or another workdir"
            )
    return manifest


def claim_plan(plan: PairPlan, extra: dict) -> PairPlan:
    """The plan whose manifest is in the folder now: `plan`, or that of the worker that was first.

    SeqRF-Ada's boundaries depend on the hardware in their last bits, and files of two divisions must never mix: of
    workers that begin at once one decides, and the others take over its boundaries.

    Args:
      plan: what this worker would make.
      extra: as of `begin_manifest`; {"adaptive": True, ...} says that the boundaries are SeqRF-Ada's.

    Raises:
      InputError: the folder holds another set.
    """
    manifest = _begun_manifest(plan, extra)
    if extra.get("adaptive") and manifest.get("adaptive") and manifest["k"] == plan.k:
        plan = dataclasses.replace(plan, boundaries=tuple(manifest["boundaries"]))
    begin_manifest(plan, extra)
    return plan


def _begun_manifest(plan, extra):
    """The manifest in the folder; if there is none this plan's is written, unless another worker is faster."""
    there = npz.pair_file_numbers(plan.folder)  # before the manifest, which another worker may be writing now
    manifest = read_manifest(plan.folder)
    if manifest is not None:
        return manifest
    if there:
        raise InputError(f"{plan.folder} holds pair files without a {MANIFEST}, another set; use another folder")
    first = {"complete": False} | plan.definition() | extra
    utils.write_json(plan.folder / MANIFEST, first, overwrite=False)
    return read_manifest(plan.folder)


def missing_files(plan: PairPlan) -> list[int]:
    """The numbers of the planned files that are not there."""
    there = set(npz.pair_file_numbers(plan.folder))
    return [number for number in range(1, plan.files + 1) if number not in there]


def reopen_set(folder, broken: list[int]) -> None:
    """Removes broken files and says in the manifest that the set is not complete.

    In this order: after a kill between the two the files are missing, and are made again; the other way round they
    would be taken for what was written. What the manifest has of the files that stay is kept, and they must agree with
    it when the set is completed again.
    """
    folder = epath.Path(folder)
    for number in broken:
        (folder / npz.file_name(number)).unlink(missing_ok=True)
    manifest = read_manifest(folder)
    reopened = manifest | {"complete": False}
    if "contents" in manifest:
        there = set(map(npz.file_name, npz.pair_file_numbers(folder)))
        reopened["contents"] = {name: what for name, what in manifest["contents"].items() if name in there}
    if reopened != manifest:
        write_manifest(folder, reopened)


def complete_manifest(plan: PairPlan) -> dict | None:
    """Completes the manifest once every file is there, and returns it; None while some are missing.

    It records the bytes and checksums of every file, once. Any number of hosts may do this at once: they write the
    same.

    Raises:
      BrokenFile: a file is there but not whole, or not the one that the manifest has recorded.
    """
    if missing_files(plan):
        return None
    begun, contents = begin_manifest(plan, {}), {}
    for number in range(1, plan.files + 1):
        with npz.PairFile(plan.path(number)) as file:
            contents[file.path.name] = found = {"bytes": file.size, "crc32": file.crc32}
            if begun.get("contents", {}).get(file.path.name, found) != found:
                raise file.broken(f"its bytes and checksums are not those that {MANIFEST} has of it")
    manifest = begun | {"complete": True, "contents": contents}
    if manifest != begun:
        write_manifest(plan.folder, manifest)
    return manifest
