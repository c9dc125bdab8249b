"""Pair sets for training: opened, checked, and read as an endless shuffled stream in constant memory."""

import collections
import contextlib
import functools
import itertools
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from etils import epath
from jaxtyping import Float, Int, UInt8

import segments
from pairs import npz
from pairs import plan as pairplan
from utils import InputError

GROUP_FILES = 4  # files whose pairs are shuffled together
BATCHES_AHEAD = 2
OPENING_THREADS = 16  # files opened at once for the first check; on a remote disk each waits for the network
FILES, PAIRS = 0, 1  # what is shuffled, as part of the seed

logger = logging.getLogger("seqrf")


class PairSet:
    """The pair set in a folder (design.md sections 7 and 9).

    Opening looks at the manifest and at the size and structure of every file. Each file's checksums are verified when
    it is first read. A set without a manifest is taken if its files have the right names and arrays.

    Args:
      folder: where the files are, perhaps behind a symbolic link or on a read-only disk.
      partial: take what is there of a set that is not complete.
      expect: what the run wants, entries of the manifest such as {"k": 4, "teacher": "..."}; of a set without a
        manifest only k, boundaries and image_shape can be compared.
      images: the `ImageSource` that the pairs were made from; only sets that do not store their noise need it, to be
        read.

    Attributes:
      manifest: what the set is; of a set without one, what its files say.
      boundaries: [k + 1] of its segments, in t.
      k: the number of segments.
      image_shape: (H, W, C).
      counts: [files] the pairs of every file.

    Raises:
      InputError: no pairs, an incomplete or damaged set, or another one than expected; the message has the remedy.
    """

    def __init__(self, folder, partial: bool = False, expect: dict | None = None, images=None):
        self.folder = epath.Path(folder)
        self._numbers = npz.pair_file_numbers(self.folder)
        manifest = pairplan.read_manifest(self.folder)
        if not self._numbers:
            raise InputError(f"there are no pairs in {self.folder}; make them with training.reflow_mode=gen_reflow")
        if manifest is None:
            _refuse_gaps(self.folder, self._numbers, partial)
            manifest = _manifest_of_files(self.folder, self._numbers)
            logger.info("%s has no %s: its files are taken as they are", self.folder, pairplan.MANIFEST)
        else:
            _refuse_incomplete(self.folder, manifest, self._numbers, partial)
        self.manifest = manifest
        self.boundaries = segments.validate_boundaries(manifest["boundaries"])
        self.k = len(self.boundaries) - 1
        self.image_shape = tuple(manifest["image_shape"])
        _refuse_unexpected(self.folder, manifest, expect or {})
        self._images = images
        if images is not None and not manifest["store_noise"]:
            _refuse_other_images(manifest, images)
        with ThreadPoolExecutor(OPENING_THREADS) as pool:
            count = functools.partial(count_of_file, self.folder, manifest)
            self.counts = np.array(list(pool.map(count, self._numbers)))
        self._verified = set()  # files whose checksums have been seen to be right

    def __len__(self):
        """The number of pairs."""
        return int(self.counts.sum())

    def batches(
        self, batch_size: int, seed: int, start: int = 0, shard: tuple[int, int] | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        """The endless stream of this host's batches, from batch `start` on.

        Every epoch has every pair of the set once, over all hosts together; it begins where the last one ended, be it
        within a batch. A batch is the same whatever was read before it. The hosts' batches laid side by side are the
        same for any number of hosts. A thread makes batches ahead; it ends with the iterator.

        Args:
          batch_size: of this host.
          seed: of the shuffle.
          start: the first batch.
          shard: (this host, number of hosts); None: as JAX counts them.

        Returns:
          An iterator of {"x0", "x1": float32 [B, H, W, C], "t0", "t1": float32 [B], "index": int32 [B]}.

        Raises:
          ValueError: a batch_size, start or shard that cannot be; no images to rebuild the noise from.
          InputError: while iterating, a damaged file.
        """
        place, hosts = (jax.process_index(), jax.process_count()) if shard is None else shard
        if batch_size < 1 or start < 0 or not 0 <= place < hosts:
            raise ValueError(f"no such batches: batch_size = {batch_size}, start = {start}, shard = {(place, hosts)}")
        if self._images is None and not self.manifest["store_noise"]:
            raise ValueError(f"the pairs in {self.folder} do not store their noise: give the images they start from")
        firsts = ((n * hosts + place) * batch_size for n in itertools.count(start))
        return _made_ahead(_Stream(self, seed), firsts, batch_size)

    def open_pairs(self, place: int) -> "_OpenPairs":
        """File number `place` = 0, 1, ... of those in the set, its checksums verified once in this object's life.

        Raises:
          InputError: the file is damaged.
        """
        number = self._numbers[place]
        file = npz.PairFile(self.folder / npz.file_name(number))
        try:
            if place not in self._verified:
                file.check_crc()
            index = segment_of_pairs(file, self.boundaries)
            starts = None if file.stores_noise else _RebuiltStarts(file, number, self.manifest, self._images)
        except BaseException:
            file.close()
            raise
        self._verified.add(place)
        return _OpenPairs(file, index, starts)


def segment_of_pairs(file: npz.PairFile, boundaries: Float[np.ndarray, "boundaries"]) -> Int[np.ndarray, "n"]:
    """The segment of every pair of an open file, int32.

    Raises:
      BrokenFile: a pair's times are not those of a segment.
    """
    t0, t1 = (file.array(name).astype(np.float32) for name in ("t0", "t1"))
    index = np.clip(np.searchsorted(-boundaries, -t1), 0, len(boundaries) - 2)
    if np.any(boundaries[index] != t1) or np.any(boundaries[index + 1] != t0):
        raise file.broken(f"it has pairs of other segments than {boundaries.tolist()}")
    return index.astype(np.int32)


def count_of_file(folder: epath.Path, manifest: dict, number: int) -> int:
    """The pairs in file `number`, once its size and structure are seen to be what the manifest says.

    Raises:
      InputError: it is missing, cannot be read, or has no place in the set.
      BrokenFile: it is not the file that the manifest means.
    """
    with npz.PairFile(folder / npz.file_name(number)) as file:
        found = {"image_shape": list(file.image_shape), "store_noise": file.stores_noise}
        wanted = {name: manifest[name] for name in found}
        if "file_size" in manifest:
            if not 1 <= number <= manifest["files"]:
                raise InputError(f"{file.path} does not belong to this set; remove it")
            found["pairs"] = file.count
            wanted["pairs"] = min(manifest["file_size"], manifest["pairs"] - (number - 1) * manifest["file_size"])
        found |= {"bytes": file.size, "crc32": file.crc32}
        wanted |= manifest.get("contents", {}).get(file.path.name, {})
        for name, value in wanted.items():
            if found[name] != value:
                raise file.broken(f"its {name} is {found[name]} where the manifest has {value}")
        return file.count


def _manifest_of_files(folder, numbers):
    """What can be said of a set without a manifest: the segments are those that occur in its files."""
    spans, shapes = set(), {}
    for number in numbers:
        with npz.PairFile(folder / npz.file_name(number)) as file:
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


def _refuse_gaps(folder, numbers, partial):
    gaps = sorted(set(range(numbers[0], numbers[-1])) - set(numbers))
    if gaps and not partial:
        raise InputError(f"{folder / npz.file_name(gaps[0])} is missing; bring it, or set training.reflow_partial=True")


def _refuse_incomplete(folder, manifest, numbers, partial):
    missing = sorted(set(range(1, manifest["files"] + 1)) - set(numbers))
    state = f"{folder} has {len(numbers)} of its {manifest['files']} files"
    if partial:
        logger.info("%s", state)
    elif missing:
        raise InputError(
            f"{state}, {npz.file_name(missing[0])} is missing; run gen_reflow again, which makes what is not "
            "there, or set training.reflow_partial=True"
        )
    elif not manifest["complete"]:
        raise InputError(f"{state}, but was not completed; run gen_reflow again, or set training.reflow_partial=True")


def _refuse_unexpected(folder, manifest, expect):
    for name, wanted in expect.items():
        found = manifest.get(name)
        if name == "boundaries":
            same = len(found) == len(wanted) and np.allclose(found, wanted, rtol=0, atol=1e-6)
        else:
            same = found == (list(wanted) if isinstance(wanted, tuple) else wanted)
        # A set without a manifest cannot be asked for more than its files show.
        if not same and (found is not None or "format" in manifest):
            raise InputError(
                f"the pairs in {folder} were made with {name} = {found}, but this run has {wanted}; use the settings "
                "that they were made with, or make new pairs in another workdir"
            )


def _refuse_other_images(manifest, images):
    if images.identity != manifest["dataset"]:
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
        self._images = images_of_file(images, first, file.count, manifest["k"])
        self._how = {name: manifest[name] for name in ("centered", "dequantize", "dtype")}

    def rows(self, rows):
        """x1 of the given rows, bit for bit what was solved from.

        Raises:
          InputError: other bits come out, since something that makes them is not what it was.
        """
        chosen = (part[rows] for part in (self._images, self._flip, self._key, self._t1))
        x1 = pairplan.start_points(*chosen, **self._how)
        other = rows[npz.crc_of_rows(x1) != self._crc[rows]]
        if len(other):
            raise InputError(
                f"{self._path}: x1 of pair {other[0]}, which is not stored, is not rebuilt as it was: the images, the "
                "decoder of their files (TensorFlow Datasets, libjpeg) or NumPy's random numbers are others (here "
                f"NumPy {np.__version__}); read it with the versions it was made with, or make the pairs anew"
            )
        return x1


def images_of_file(images, first: int, count: int, k: int) -> UInt8[np.ndarray, "count h w c"]:
    """The images that a file's pairs start from; with k = 1 every pair starts from noise, and none is read."""
    if k == 1:
        return np.broadcast_to(np.uint8(0), (count, *images.image_shape))
    return images.read(first, count)


class _OpenPairs:
    """A file of the set, ready to be read."""

    def __init__(self, file, index, starts):
        self.file, self.index, self._starts = file, index, starts

    def read(self, name, rows, out, places):
        """out[places] = the file's rows of x0 or x1."""
        if name == "x1" and self._starts is not None:
            out[places] = self._starts.rows(rows)
        else:
            self.file.read_rows(name, rows, out, places)


class _Group:
    """Some open files of a set, their pairs shuffled together."""

    def __init__(self, pairs, places, seed):
        with contextlib.ExitStack() as opened:
            self._files = []
            self._readers = opened.enter_context(ThreadPoolExecutor(2, thread_name_prefix="pairs-rows"))
            for place in places:
                self._files.append(pairs.open_pairs(place))
                opened.callback(self._files[-1].file.close)
            self.close = opened.pop_all().close
        self._index = np.concatenate([part.index for part in self._files])
        self._firsts = np.cumsum([0] + [part.file.count for part in self._files])
        self._mixed = np.random.default_rng(seed).permutation(self._firsts[-1])

    def fill(self, batch, at, first, count):
        """Puts the group's shuffled pairs first..first+count-1 at the places from `at` on."""
        rows = self._mixed[first : first + count]
        batch["index"][at : at + count] = self._index[rows]
        owner = np.searchsorted(self._firsts, rows, side="right") - 1
        reads = []
        for number in np.unique(owner):
            mine = np.flatnonzero(owner == number)
            places = rows[mine] - self._firsts[number], at + mine
            for name in ("x0", "x1"):  # at the same time
                reads.append(self._readers.submit(self._read, number, name, batch[name], *places))
        for read in reads:
            read.result()

    def _read(self, number, name, out, rows, places):
        self._files[number].read(name, rows, out, places)


class _Stream:
    """The pairs of all epochs, one after another, as one endless sequence; any stretch of it opens few files."""

    def __init__(self, pairs, seed):
        self._pairs, self._seed = pairs, seed % 2**32
        self._groups = {}  # (epoch, group) -> its future; the one being read and the next
        self._opener = ThreadPoolExecutor(1, thread_name_prefix="pairs-open")
        self._order = functools.lru_cache(2)(self._order_of_epoch)  # only this epoch's and the next one's are asked for

    def read(self, first, count):
        """The pairs at positions first..first+count-1."""
        pairs = self._pairs
        batch = {name: np.empty((count, *pairs.image_shape), np.float32) for name in ("x0", "x1")}
        batch["index"] = np.empty(count, np.int32)
        done = 0
        while done < count:
            epoch, inside = divmod(first + done, len(pairs))
            ends = self._order(epoch)[1]
            group = int(np.searchsorted(ends, inside, side="right"))
            begin = ends[group - 1] if group else 0
            part = int(min(count - done, ends[group] - inside))
            self._group(epoch, group).fill(batch, done, inside - begin, part)
            done += part
        batch["t0"], batch["t1"] = pairs.boundaries[batch["index"] + 1], pairs.boundaries[batch["index"]]
        return batch

    def close(self):
        """Ends the thread and closes the files."""
        for key in list(self._groups):
            self._discard(key)
        self._opener.shutdown()

    def _order_of_epoch(self, epoch):
        """The groups of an epoch, as places of files, and the positions where they end."""
        order = np.random.default_rng([self._seed, epoch, 0, FILES]).permutation(len(self._pairs.counts))
        groups = [order[first : first + GROUP_FILES] for first in range(0, len(order), GROUP_FILES)]
        return groups, np.cumsum([self._pairs.counts[places].sum() for places in groups])

    def _group(self, epoch, group):
        """The group, opened, while the one after it is being opened."""
        after = (epoch, group + 1) if group + 1 < len(self._order(epoch)[0]) else (epoch + 1, 0)
        for key in set(self._groups) - {(epoch, group), after}:
            self._discard(key)
        for key in ((epoch, group), after):
            if key not in self._groups:
                places = self._order(key[0])[0][key[1]].tolist()
                self._groups[key] = self._opener.submit(_Group, self._pairs, places, [self._seed, *key, PAIRS])
        return self._groups[epoch, group].result()

    def _discard(self, key):
        future = self._groups.pop(key)
        if not future.cancel() and not future.exception():  # an error was raised when the group was read, if it was
            future.result().close()


def _made_ahead(stream, firsts, count):
    """The stretches of the stream that begin at `firsts`; a thread is always a few ahead."""
    with contextlib.closing(stream), ThreadPoolExecutor(1, thread_name_prefix="pairs-read") as reader:
        waiting = collections.deque()
        try:
            for first in firsts:
                waiting.append(reader.submit(stream.read, first, count))
                if len(waiting) > BATCHES_AHEAD:
                    yield waiting.popleft().result()
        finally:
            reader.shutdown(cancel_futures=True)
