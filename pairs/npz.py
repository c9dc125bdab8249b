"""One file of pairs or trajectories, reflow_batch_<i>.npz (docs/method.md, section 9), read row by row.

The file is an ordinary npz whose members are stored, not compressed, so that a row lies at a known offset and one
`pread` fetches it. Rows are not mapped into memory: a disk error is then an exception rather than a signal that ends
the process, and a reader's memory does not depend on the size of the files.
"""

import contextlib
import dataclasses
import itertools
import math
import os
import re
import struct
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from etils import epath
from isal import isal_zlib
from jaxtyping import Float, Int, UInt32

import utils
from utils import InputError, is_local, os_errors

CRC_BLOCK = 2**20  # bytes read at a time for a checksum; they stay in a core's cache
LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip member; the lengths of its name and of its extra field
FILE_NAME = re.compile(r"reflow_batch_(0|[1-9]\d*)\.npz")  # without leading zeros: one name for a number
# The arrays of a file: name -> (kind of dtype, dimensions).
ARRAYS = {"x0": ("f", 4), "x1": ("f", 4), "t0": ("f", 1), "t1": ("f", 1)}
# In place of x1, when noise is not stored; x1_crc is the CRC-32 of each row of x1.
KEYED_ARRAYS = {name: ARRAYS[name] for name in ("x0", "t0", "t1")} | {
    "image": ("i", 1), "flip": ("b", 1), "key": ("u", 2), "x1_crc": ("u", 1),
}  # fmt: skip
TRAJECTORY_ARRAYS = {"xs": ("f", 5)}


class BrokenFile(InputError):
    """A pair file is damaged, or is not a pair file."""


class MissingFile(InputError):
    """A pair file does not exist."""


def file_name(number: int) -> str:
    """The name of pair file `number` = 1, 2, ..."""
    return f"reflow_batch_{number}.npz"


def pair_file_numbers(folder: epath.PathLike) -> list[int]:
    """The numbers of the pair files in `folder`, ascending; empty if the folder does not exist.

    Raises:
      InputError: it is not a folder, or cannot be listed.
    """
    folder = epath.Path(folder)
    try:
        with os_errors():
            names = [path.name for path in folder.iterdir()] if folder.exists() else []
    except OSError as error:
        raise InputError(f"{folder} cannot be listed: {error}; give the folder of a pair set") from error
    return sorted(int(match[1]) for name in names if (match := FILE_NAME.fullmatch(name)))


def crc_of_rows(x: Float[np.ndarray, "n h w c"]) -> UInt32[np.ndarray, "n"]:
    """The CRC-32 of the bytes of every image."""
    return np.array([isal_zlib.crc32(row) for row in np.ascontiguousarray(x)], np.uint32)


@dataclasses.dataclass(frozen=True)
class _Member(utils.ArrayMember):
    """An array in the file, and the offset of its bytes."""

    start: int  # offset of the member in the file, NumPy's header included
    by_row: bool  # whether single rows can be read: a local file, not compressed, in C order

    @property
    def row_bytes(self) -> int:
        """The size of a row in bytes."""
        return self.dtype.itemsize * math.prod(self.shape[1:])


class PairFile:
    """An open pair file, whose structure has been checked and whose arrays have not been read.

    Attributes:
      count: pairs, or trajectories, in the file.
      image_shape: (H, W, C).
      states: of each trajectory, k + 1; None for pairs.
      stores_noise: whether x1 is in the file, rather than the keys to rebuild it.
      size: of the file in bytes.
      crc32: the checksum of every array according to the file.

    Raises:
      MissingFile: the file does not exist.
      InputError: it cannot be read.
      BrokenFile: it is not a pair file, is truncated, or contains pickled Python objects, which are never loaded.
    """

    def __init__(self, path: epath.PathLike):
        self.path = epath.Path(path)
        self._loaded = {}  # whole arrays of a file that is compressed or not local
        self._file_position = threading.Lock()  # shared by all who read whole arrays
        with contextlib.ExitStack() as opened, self._named_errors():  # epath's remote files are open within a `with`
            # Without Python's buffer: rows are read at their offsets, checksums in large blocks.
            self._file = opened.enter_context(utils.open_plain(self.path, buffered=False))
            self._read_structure()
            self._opened = opened.pop_all()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        """Closes the file; its rows can no longer be read."""
        self._opened.close()

    def array(self, name: str) -> np.ndarray:
        """The whole array `name`, its checksum verified; of a compressed or remote file it is cached until closed."""
        member = self._members[name]
        with self._file_position:
            if name in self._loaded:
                return self._loaded[name]
            with self._named_errors(), zipfile.ZipFile(self._file) as archive:
                array = utils.array_of(archive, member)
            if not member.by_row:
                self._loaded[name] = array
            return array

    def read_rows(self, name: str, rows: Int[np.ndarray, "m"], out: np.ndarray, out_rows: Int[np.ndarray, "m"]) -> None:
        """out[out_rows] = the rows `rows` of array `name`, converted to the dtype of `out`; one read per row.

        The arrays of a compressed or remote file are loaded whole, see `array`.

        Raises:
          BrokenFile: the file was truncated while open.
          InputError: the disk cannot be read.
        """
        member = self._members[name]
        if not member.by_row:
            out[out_rows] = self.array(name)[rows]
        elif out.dtype == member.dtype and out.flags.c_contiguous:
            self._pread(member, rows, out, out_rows)
        else:
            stored = np.empty((len(rows), *member.shape[1:]), member.dtype)
            self._pread(member, rows, stored, np.arange(len(rows)))
            out[out_rows] = stored

    def check_crc(self) -> None:
        """Reads the whole file and compares the checksum of every array.

        Raises:
          BrokenFile: an array has changed; the message names it.
        """
        local = [member for member in self._members.values() if member.by_row]
        with ThreadPoolExecutor(len(ARRAYS)) as pool:  # x0 and x1 at the same time
            for member, crc in zip(local, pool.map(self._crc_of, local), strict=True):
                if crc != member.info.CRC:
                    raise self.broken(f"its array {member.info.filename} has changed since it was written (CRC error)")
        for name, member in self._members.items():
            if not member.by_row:
                self.array(name)

    def _read_structure(self):
        with zipfile.ZipFile(self._file) as archive:
            stored = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            wanted = TRAJECTORY_ARRAYS if "xs" in stored else ARRAYS if "x1" in stored else KEYED_ARRAYS
            missing = [name for name in wanted if name not in stored]
            if missing:
                raise self.broken(f"it has no array {missing[0]}")
            self._members = {name: self._member(archive, stored[name]) for name in wanted}
        first = self._members[next(iter(wanted))]  # x0 or xs
        for name, (kind, dimensions) in wanted.items():
            member = self._members[name]
            utils.check_kind(name, member, f"{kind}.*", dimensions)
            if member.shape[0] != first.shape[0] or (name == "x1" and member.shape != first.shape):
                raise self.broken(f"x0 and {name} have different shapes")
        self.count, self.image_shape = first.shape[0], first.shape[-3:]
        if not self.count:
            raise self.broken("it has no pairs")
        self.states = first.shape[1] if "xs" in wanted else None
        self.stores_noise = wanted is not KEYED_ARRAYS
        self._file.seek(0, os.SEEK_END)
        self.size = self._file.tell()  # which `seek` itself does not return of a remote file
        self.crc32 = {name: member.info.CRC for name, member in self._members.items()}

    def _member(self, archive, info):
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise self.broken(f"its array {info.filename} has an unknown compression")
        read = utils.array_member(archive, info)
        self._file.seek(info.header_offset)
        name_length, extra_length = LOCAL_HEADER.unpack(self._file.read(LOCAL_HEADER.size))
        start = info.header_offset + LOCAL_HEADER.size + name_length + extra_length
        by_row = info.compress_type == zipfile.ZIP_STORED and not read.fortran and is_local(self.path)
        return _Member(**vars(read), start=start, by_row=by_row)

    def _pread(self, member, rows, out, out_rows):
        size = member.row_bytes
        flat = memoryview(out).cast("B")
        targets = [[flat[start : start + size]] for start in (out_rows * size).tolist()]
        offsets = (member.start + member.header + rows.astype(np.int64) * size).tolist()
        try:
            got = map(os.preadv, itertools.repeat(self._file.fileno()), targets, offsets)
            if any(count != size for count in got):
                raise self.broken("it was truncated while open")
        except OSError as error:
            raise InputError(f"{self.path} cannot be read: {error}") from error

    def _crc_of(self, member):
        block = memoryview(bytearray(CRC_BLOCK))
        crc, offset, end = 0, member.start, member.start + member.info.file_size
        with self._named_errors():
            while offset < end:
                got = os.preadv(self._file.fileno(), [block[: end - offset]], offset)
                if not got:
                    raise self.broken("it was truncated while open")
                crc, offset = isal_zlib.crc32(block[:got], crc), offset + got
        return crc

    def broken(self, reason: str) -> BrokenFile:
        """The error for this file, with its name and the remedy."""
        return BrokenFile(
            f"{self.path} is broken: {reason}; scripts/check_pairs.py --repair {self.path.parent} removes broken "
            "files, gen_reflow makes them again"
        )

    @contextlib.contextmanager
    def _named_errors(self):
        """Converts every error of reading to one that names the file."""
        try:
            with os_errors():
                yield
        except InputError:
            raise
        except FileNotFoundError:
            raise MissingFile(f"{self.path} is missing; run gen_reflow again, which makes missing files") from None
        except OSError as error:
            raise InputError(f"{self.path} cannot be read: {error}") from error
        except utils.ZIP_ERRORS as error:
            raise self.broken(utils.reason_of(error)) from error
