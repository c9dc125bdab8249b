"""Sets of pairs or trajectories, read as an endless shuffled stream in constant memory."""

import abc
import collections
import contextlib
import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import numpy as np
from etils import epath
from jaxtyping import Float, Int

import datasets
import distributed
import segments
from pairs import manifest as pairmanifest
from pairs import npz
from pairs import plan as pairplan
from utils import InputError

GROUP_FILES = 4  # files whose pairs are shuffled together
BATCHES_AHEAD = 2
OPENING_THREADS = 16  # files opened at once for the first check, where a remote disk has latency
FILES, PAIRS = 0, 1  # ids of random streams: file order, pair order

logger = logging.getLogger("seqrf")


@dataclasses.dataclass(frozen=True)
class OpenFile:
    """A file of a set, open for reading.

    Attributes:
      file: to be closed.
      small: name -> [n, ...], arrays in memory.
      read: name -> (rows [m], out, out_rows [m]) -> None, sets out[out_rows] to rows of an array on the disk.
    """

    file: npz.PairFile
    small: dict[str, np.ndarray]
    read: dict[str, Callable]


class FileSet(abc.ABC):
    """The files in a folder and their manifest, opened and checked, and read as an endless shuffled stream.

    Opening checks the manifest and the size and structure of every file. Each file's checksums are verified when it is
    first read.

    Attributes:
      folder: of the files.
      manifest: what the set is.
      boundaries: [k + 1] of its segments, in t.
      k: the number of segments.
      image_shape: (H, W, C).
      counts: [files] the pairs, or trajectories, of every file.
    """

    reflow_pairs: ClassVar[str]  # the setting `training.reflow_pairs` that makes such a set
    arrays: dict[str, tuple[tuple[int, ...], type]]  # of a batch: name -> (shape of a row, dtype)

    def __init__(self, folder: epath.PathLike, partial: bool = False, expect: dict[str, Any] | None = None):
        self.folder = epath.Path(folder)
        self._numbers = npz.pair_file_numbers(self.folder)
        manifest = pairmanifest.read_manifest(self.folder)
        if not self._numbers:
            raise InputError(
                f"there are no pairs in {self.folder}; make them with training.reflow_mode=gen_reflow and "
                f"training.reflow_pairs={self.reflow_pairs}"
            )
        _check_complete(self.folder, manifest, self._numbers, partial)
        if manifest is None:
            manifest = _manifest_of_files(self.folder, self._numbers)
            logger.info("%s has no %s: its files are used as they are", self.folder, pairmanifest.MANIFEST)
        self.manifest = manifest
        self.boundaries = segments.validate_boundaries(manifest["boundaries"])
        self.k = len(self.boundaries) - 1
        self.image_shape = tuple(manifest["image_shape"])
        self.check_expected({"reflow_pairs": self.reflow_pairs} | (expect or {}), "this run has")
        with ThreadPoolExecutor(OPENING_THREADS) as pool:
            count = functools.partial(pairmanifest.check_file, self.folder, manifest)
            self.counts = np.array(list(pool.map(count, self._numbers)))
        self._verified = set()  # files whose checksums have been verified

    def __len__(self) -> int:
        """The number of pairs, or trajectories."""
        return int(self.counts.sum())

    def check_expected(self, expect: dict[str, Any], source: str) -> None:
        """Compares entries of the manifest with `expect`; of a set without a manifest those that its files tell.

        Args:
          expect: entry -> value, such as {"k": 4, "teacher": "..."}.
          source: of these values, for the message: "this run has".

        Raises:
          InputError: an entry differs.
        """
        for name, wanted in expect.items():
            found = pairmanifest.value_of(self.manifest, name)
            if name == "boundaries":
                same = len(found) == len(wanted) and np.allclose(found, wanted, rtol=0, atol=1e-6)
            else:
                same = found == (list(wanted) if isinstance(wanted, tuple) else wanted)
            if not same and (found is not None or "format" in self.manifest):
                raise InputError(
                    f"the pairs in {self.folder} were made with {name} = {found}, but {source} {wanted}; use the "
                    "settings that they were made with, or make new pairs in another workdir"
                )

    def batches(
        self, batch_size: int, seed: int, start: int = 0, shard: tuple[int, int] | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        """The endless stream of this host's batches, from batch `start` on.

        Every epoch has everything in the set once, over all hosts together; it begins where the last one ended, even
        within a batch. A batch does not depend on those read before it. The hosts' batches side by side are the same
        for any number of hosts. A thread makes batches ahead; it ends with the iterator.

        Args:
          batch_size: of this host.
          seed: of the shuffle.
          start: the first batch.
          shard: (index of this host, number of hosts); None: as in `distributed.this_host`.

        Returns:
          An iterator of batches {name: [B, ...]}, see the class.

        Raises:
          ValueError: invalid batch_size, start or shard.
          InputError: while iterating, a damaged file.
        """
        host = distributed.this_host()
        host_index, hosts = shard or (host.index, host.count)
        if batch_size < 1 or start < 0 or not 0 <= host_index < hosts:
            raise ValueError(f"invalid batch_size = {batch_size}, start = {start} or shard = {(host_index, hosts)}")
        firsts = ((n * hosts + host_index) * batch_size for n in itertools.count(start))
        return _made_ahead(_Stream(self, seed), firsts, batch_size)

    def open_file(self, file_index: int) -> OpenFile:
        """File number `file_index` = 0, 1, ... of those in the set, its checksums verified once per `FileSet`.

        Raises:
          InputError: the file is damaged.
        """
        number = self._numbers[file_index]
        with contextlib.ExitStack() as kept_open:
            file = kept_open.enter_context(npz.PairFile(self.folder / npz.file_name(number)))
            if file_index not in self._verified:
                file.check_crc()
            opened = self._opened(file, number)
            self._verified.add(file_index)
            kept_open.pop_all()
            return opened

    @abc.abstractmethod
    def _opened(self, file: npz.PairFile, number: int) -> OpenFile:
        """The file `number`, whose checksums are verified, ready to be read."""


class PairSet(FileSet):
    """The pair set in a folder (docs/method.md, sections 8 and 9); see `FileSet`.

    Its batches are {"x0", "x1": float32 [B, H, W, C], "t0", "t1": float32 [B], "index": int32 [B]}. A set without a
    manifest is accepted if its files have the right names and arrays.

    Args:
      folder: of the files, perhaps behind a symbolic link or on a read-only disk.
      partial: use the existing files of a set that is not complete.
      expect: entries that the manifest must have, such as {"k": 4, "teacher": "..."}; of a set without a manifest only
        k, boundaries and image_shape can be compared.
      images: the data set that the pairs were made from; needed to read sets that do not store their noise.

    Raises:
      InputError: no pairs, an incomplete or damaged set, or another one than expected; the message has the remedy.
    """

    reflow_pairs = "segments"

    def __init__(
        self,
        folder: epath.PathLike,
        partial: bool = False,
        expect: dict[str, Any] | None = None,
        images: datasets.ImageSource | None = None,
    ):
        super().__init__(folder, partial, expect)
        self._images = images
        if images is not None and not self.manifest["store_noise"]:
            _check_images(self.manifest, images)
        times: dict[str, Any] = {"t0": ((), np.float32), "t1": ((), np.float32), "index": ((), np.int32)}
        self.arrays = {"x0": (self.image_shape, np.float32), "x1": (self.image_shape, np.float32)} | times

    def batches(
        self, batch_size: int, seed: int, start: int = 0, shard: tuple[int, int] | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        """As `FileSet.batches`; ValueError also where there are no images to rebuild the noise from."""
        if self._images is None and not self.manifest["store_noise"]:
            raise ValueError(f"the pairs in {self.folder} do not store their noise: give the images they start from")
        return super().batches(batch_size, seed, start, shard)

    def _opened(self, file, number):
        segment = segment_of_pairs(file, self.boundaries)
        small = {"index": segment, "t0": self.boundaries[segment + 1], "t1": self.boundaries[segment]}
        read = {name: functools.partial(file.read_rows, name) for name in ("x0", "x1")}
        if not file.stores_noise:
            read["x1"] = _RebuiltStarts(file, number, self.manifest, self._images).read
        return OpenFile(file, small, read)


def segment_of_pairs(file: npz.PairFile, boundaries: Float[np.ndarray, "boundaries"]) -> Int[np.ndarray, "n"]:
    """The segment of every pair of an open file, int32.

    Raises:
      BrokenFile: a pair's times are not those of a segment.
    """
    t0, t1 = (file.array(name).astype(np.float32) for name in ("t0", "t1"))
    segment = np.clip(np.searchsorted(-boundaries, -t1), 0, len(boundaries) - 2)
    if np.any(boundaries[segment] != t1) or np.any(boundaries[segment + 1] != t0):
        raise file.broken(f"it has pairs of other segments than {boundaries.tolist()}")
    return segment.astype(np.int32)


def _manifest_of_files(folder, numbers):
    """The manifest of a set without one, as far as its files tell: the segments are those that occur in them."""
    spans, shapes = set(), {}
    for number in numbers:
        with npz.PairFile(folder / npz.file_name(number)) as file:
            if file.states is not None:
                raise file.broken("it has trajectories")
            if not file.stores_noise:
                raise InputError(f"{file.path} does not store its noise, which cannot be rebuilt without a manifest")
            times = [file.array(name).astype(np.float32) for name in ("t1", "t0")]
            spans |= set(map(tuple, np.unique(np.stack(times, axis=1), axis=0).tolist()))
            shapes.setdefault(file.image_shape, file.path)
    if len(shapes) > 1:
        raise InputError(f"{' and '.join(map(str, list(shapes.values())[:2]))} have images of different sizes")
    starts, ends = zip(*sorted(spans, reverse=True), strict=True)
    boundaries = [*starts, ends[-1]]
    if boundaries[0] != 1 or boundaries[-1] != 0 or starts[1:] != ends[:-1]:
        raise InputError(f"the pairs in {folder} do not lie in segments that join from t = 1 to t = 0: {sorted(spans)}")
    return {
        "k": len(starts),
        "boundaries": boundaries,
        "image_shape": list(next(iter(shapes))),
        "store_noise": True,
        "files": len(numbers),
    }


def _check_complete(folder, manifest, numbers, partial):
    first, last = (1, manifest["files"]) if manifest else (numbers[0], numbers[-1])
    missing = pairmanifest.first_missing(numbers, first, last)
    state = f"{folder} has {len(numbers)} of its {last - first + 1} files"
    remedy = "run gen_reflow again, which makes missing files" if manifest else "restore it"
    remedy += ", or set training.reflow_partial=True"
    if partial:
        logger.info("%s", state)
    elif missing:
        raise InputError(f"{state}, {npz.file_name(missing)} is missing; {remedy}")
    elif manifest and not manifest["complete"]:
        raise InputError(f"{state}, but was not completed; {remedy}")


def _check_images(manifest, images):
    if not datasets.same_data(images.identity, manifest["dataset"]):
        raise InputError(
            f"the pairs were made from {manifest['dataset']} and do not store their noise, which cannot be rebuilt "
            f"from {images.identity}"
        )


class _RebuiltStarts:
    """The starting points of a file that does not store them."""

    def __init__(self, file, number, manifest, images):
        first = (number - 1) * manifest["file_size"]
        self._path = file.path
        self._flip, self._key, self._t1, self._crc = (file.array(name) for name in ("flip", "key", "t1", "x1_crc"))
        image = file.array("image")
        if np.any((image >= 0) & (image != (first + np.arange(file.count)) % manifest["dataset_size"])):
            raise file.broken("its pairs start from other images than those of this file")
        self._images = pairplan.file_images(images, first, image)
        self._settings = {name: manifest[name] for name in ("centered", "dequantize", "dtype")}

    def read(self, rows, out, out_rows):
        """out[out_rows] = x1 of the rows, bit for bit what the solver started from.

        Raises:
          InputError: the bits differ from those that were solved from.
        """
        chosen = (array[rows] for array in (self._images, self._flip, self._key, self._t1))
        x1 = pairplan.start_points(*chosen, **self._settings)
        other = rows[npz.crc_of_rows(x1) != self._crc[rows]]
        if len(other):
            raise InputError(
                f"{self._path}: x1 of pair {other[0]} is not stored and cannot be rebuilt to the same bits: the "
                "images, the decoder of their files (TensorFlow Datasets, libjpeg) or NumPy's random numbers differ "
                f"(this is NumPy {np.__version__}); use the versions it was made with, or make the pairs again"
            )
        out[out_rows] = x1


class _Group:
    """Some open files of a set, their rows shuffled together."""

    def __init__(self, file_set, file_indices, seed):
        with contextlib.ExitStack() as opened:
            self._files = []
            self._readers = opened.enter_context(ThreadPoolExecutor(2, thread_name_prefix="pairs-rows"))
            for file_index in file_indices:
                self._files.append(file_set.open_file(file_index))
                opened.callback(self._files[-1].file.close)
            self.close = opened.pop_all().close
        names = self._files[0].small
        self._small = {name: np.concatenate([opened.small[name] for opened in self._files]) for name in names}
        self._firsts = np.cumsum([0] + [opened.file.count for opened in self._files])
        self._order = np.random.default_rng(seed).permutation(self._firsts[-1])

    def fill(self, batch, offset, first, count):
        """Copies the group's shuffled rows first..first+count-1 to the rows from `offset` on of the batch."""
        rows = self._order[first : first + count]
        for name, array in self._small.items():
            batch[name][offset : offset + count] = array[rows]
        owner = np.searchsorted(self._firsts, rows, side="right") - 1
        reads = []
        for n in np.unique(owner):
            mine = np.flatnonzero(owner == n)
            for name, read in self._files[n].read.items():  # at the same time
                reads.append(self._readers.submit(read, rows[mine] - self._firsts[n], batch[name], offset + mine))
        for read in reads:
            read.result()


class _Stream:
    """The rows of all epochs, one after another, as one endless sequence; any part of it opens few files."""

    def __init__(self, file_set, seed):
        self._set, self._seed = file_set, seed % 2**32
        self._groups = {}  # (epoch, group) -> its future; the current one and the next
        self._opener = ThreadPoolExecutor(1, thread_name_prefix="pairs-open")
        self._order = functools.lru_cache(2)(self._order_of_epoch)  # only this epoch and the next are used

    def read(self, first, count):
        """The rows at positions first..first+count-1 of the sequence."""
        batch = {name: np.empty((count, *shape), dtype) for name, (shape, dtype) in self._set.arrays.items()}
        done = 0
        while done < count:
            epoch, position = divmod(first + done, len(self._set))
            ends = self._order(epoch)[1]
            group = int(np.searchsorted(ends, position, side="right"))
            begin = ends[group - 1] if group else 0
            part = int(min(count - done, ends[group] - position))
            self._group(epoch, group).fill(batch, done, position - begin, part)
            done += part
        return batch

    def close(self):
        """Ends the thread and closes the files."""
        for key in list(self._groups):
            self._discard(key)
        self._opener.shutdown()

    def _order_of_epoch(self, epoch):
        """The groups of an epoch, as indices of files, and the positions at which they end."""
        counts = self._set.counts
        order = np.random.default_rng([self._seed, epoch, 0, FILES]).permutation(len(counts))
        groups = [order[first : first + GROUP_FILES] for first in range(0, len(order), GROUP_FILES)]
        return groups, np.cumsum([counts[file_indices].sum() for file_indices in groups])

    def _group(self, epoch, group):
        """The group, opened, while the one after it is being opened."""
        after = (epoch, group + 1) if group + 1 < len(self._order(epoch)[0]) else (epoch + 1, 0)
        for key in set(self._groups) - {(epoch, group), after}:
            self._discard(key)
        for key in ((epoch, group), after):
            if key not in self._groups:
                file_indices = self._order(key[0])[0][key[1]].tolist()
                self._groups[key] = self._opener.submit(_Group, self._set, file_indices, [self._seed, *key, PAIRS])
        return self._groups[epoch, group].result()

    def _discard(self, key):
        future = self._groups.pop(key)
        if not future.cancel() and not future.exception():  # its error is raised where the group is read
            future.result().close()


def _made_ahead(stream, firsts, count):
    """Batches of `count` rows of the stream, from the positions `firsts` on; a thread is always a few ahead."""
    with contextlib.closing(stream), ThreadPoolExecutor(1, thread_name_prefix="pairs-read") as reader:
        waiting = collections.deque()
        try:
            for first in firsts:
                waiting.append(reader.submit(stream.read, first, count))
                if len(waiting) > BATCHES_AHEAD:
                    yield waiting.popleft().result()
        finally:
            reader.shutdown(cancel_futures=True)


class TrajectorySet(FileSet):
    """The trajectory set in a folder; see `FileSet`.

    Its batches are {"states": float32 [B, k + 1, H, W, C]}: states[:, 0] is the noise, states[:, i] the state of the
    teacher's ODE from there at boundary i.

    Args:
      folder: of the files, perhaps behind a symbolic link or on a read-only disk.
      partial: use the existing files of a set that is not complete.
      expect: entries that the manifest must have, such as {"k": 4, "teacher": "..."}.

    Raises:
      InputError: no trajectories, an incomplete or damaged set, or another one than expected.
    """

    reflow_pairs = "trajectory"

    def __init__(self, folder: epath.PathLike, partial: bool = False, expect: dict[str, Any] | None = None):
        super().__init__(folder, partial, expect)
        self.arrays = {"states": ((self.k + 1, *self.image_shape), np.float32)}

    def _opened(self, file: npz.PairFile, number: int) -> OpenFile:
        return OpenFile(file, {}, {"states": functools.partial(file.read_rows, "xs")})


def check_same_teacher(trajectories: TrajectorySet, pairs: PairSet) -> None:
    """Checks that pairs and trajectories can be used together: made by the same teacher, on the same segments.

    Raises:
      InputError: the first entry of the manifests that differs.
    """
    names = ("teacher", "boundaries", "image_shape", "centered")
    expect = {name: pairs.manifest[name] for name in names if name in pairs.manifest}
    trajectories.check_expected(expect, f"the pairs in {pairs.folder} with")
