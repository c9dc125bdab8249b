"""One pair file, reflow_batch_<i>.npz: written whole or not at all, read row by row in constant memory.

The file is an ordinary npz whose members are stored, not compressed, so that a row lies at a known offset and one
`pread` fetches it. Rows are not mapped into memory: a disk error is then an exception and not the end of the process,
and what a reader holds does not depend on the size of the files.
"""

import contextlib
import dataclasses
import io
import itertools
import math
import os
import re
import struct
import threading
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from etils import epath
from isal import isal_zlib
from jaxtyping import Float, UInt32

from utils import InputError, is_local, os_errors

CRC_BLOCK = 2**20  # bytes read at a time for a checksum; they stay in a core's cache
# The start of an array in NumPy's format, for plain numbers. NumPy's own reader parses it with `ast`, which in Python
# 3.11 is not safe in several threads at once (SystemError: AST constructor recursion depth mismatch).
MAGIC = b"\x93NUMPY"
HEADER = re.compile(rb"\{'descr': '([<>|]\w+)', 'fortran_order': (True|False), 'shape': \(([\d, ]*)\), \} *\n")
LONGEST_HEADER = 1000
LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip member; the lengths of its name and of its extra field
FILE_NAME = re.compile(r"reflow_batch_(0|[1-9]\d*)\.npz")  # a number has one name
ZIP_ERRORS = (zipfile.BadZipFile, ValueError, EOFError, KeyError, struct.error, zlib.error, RuntimeError)
# What a file may hold: array -> (kind of its numbers, dimensions).
ARRAYS = {"x0": ("f", 4), "x1": ("f", 4), "t0": ("f", 1), "t1": ("f", 1)}
# In place of x1, when noise is not stored; x1_crc is the CRC-32 of each row of x1.
KEYED_ARRAYS = {"image": ("i", 1), "flip": ("b", 1), "key": ("u", 2), "x1_crc": ("u", 1)}


class BrokenFile(InputError):
    """A pair file is not what was written, or never was a pair file."""


class MissingFile(InputError):
    """A pair file is not there."""


def file_name(number: int) -> str:
    """The name of pair file `number` = 1, 2, ..."""
    return f"reflow_batch_{number}.npz"


def pair_file_numbers(folder) -> list[int]:
    """The numbers of the pair files in `folder`, ascending; none if there is no such folder.

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
class _Member:
    """An array in the file: its type, and where its bytes lie."""

    info: zipfile.ZipInfo
    dtype: np.dtype
    fortran: bool
    shape: tuple[int, ...]
    start: int  # of the member's bytes, NumPy's header included
    header: int  # bytes of NumPy's header

    @property
    def plain(self) -> bool:
        """Whether its rows lie one after another in the file."""
        return self.info.compress_type == zipfile.ZIP_STORED and not self.fortran

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape[1:])


class PairFile:
    """An open pair file, whose structure has been checked and whose arrays have not been read.

    Attributes:
      count: pairs in the file.
      image_shape: (H, W, C).
      stores_noise: whether x1 is in the file, rather than what rebuilds it.
      size: bytes of the file.
      crc32: the checksum of every array, as the file states it.

    Raises:
      MissingFile: there is no such file.
      InputError: it cannot be read.
      BrokenFile: it is not a pair file, is cut off, or carries Python objects, which are never loaded.
    """

    def __init__(self, path):
        self.path = epath.Path(path)
        self._loaded = {}  # whole arrays of a file that is compressed or not local
        self._one_place = threading.Lock()  # the open file is at one place at a time: whole arrays are read in turn
        self._opened = contextlib.ExitStack()  # epath's remote files are open only within a `with`
        try:
            with self._broken_unless_read():
                # Without Python's buffer: rows are read at their offsets, checksums in large blocks.
                file = io.FileIO(self.path) if is_local(path) else self.path.open("rb")
                self._file = self._opened.enter_context(file)
                self._read_structure()
        except BaseException:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        """Closes the file; its rows can no longer be read."""
        self._opened.close()

    def array(self, name: str) -> np.ndarray:
        """The whole array `name`, from a file of whatever layout; its checksum is verified on the way.

        Those of a compressed or remote file are kept until it is closed.
        """
        member = self._members[name]
        with self._one_place:
            if name in self._loaded:
                return self._loaded[name]
            with self._broken_unless_read(), zipfile.ZipFile(self._file) as archive:
                content = archive.read(member.info)
            flat = np.frombuffer(content, member.dtype, offset=member.header)
            array = flat.reshape(member.shape, order="F" if member.fortran else "C")
            if not self._by_row(member):
                self._loaded[name] = array
            return array

    def read_rows(self, name: str, rows: np.ndarray, out: np.ndarray, places: np.ndarray) -> None:
        """out[places] = the rows `rows` of array `name`, converted to the type of `out`; one read a row.

        The arrays of a compressed or remote file are loaded whole, see `array`.

        Raises:
          BrokenFile: the file has been cut off since it was opened.
          InputError: the disk does not give the bytes.
        """
        member = self._members[name]
        if not self._by_row(member):
            out[places] = self.array(name)[rows]
        elif out.dtype == member.dtype and out.flags.c_contiguous:
            self._pread(member, rows, out, places)
        else:
            stored = np.empty((len(rows), *member.shape[1:]), member.dtype)
            self._pread(member, rows, stored, np.arange(len(rows)))
            out[places] = stored

    def check_crc(self) -> None:
        """Reads the whole file and compares the checksum of every array.

        Raises:
          BrokenFile: an array is not what was written; the message names it.
        """
        local = [member for member in self._members.values() if self._by_row(member)]
        with ThreadPoolExecutor(len(ARRAYS)) as pool:  # x0 and x1 at the same time
            for member, crc in zip(local, pool.map(self._crc_of, local), strict=True):
                if crc != member.info.CRC:
                    raise self.broken(f"its array {member.info.filename} has changed since it was written (CRC error)")
        for name, member in self._members.items():
            if member not in local:
                self.array(name)

    def _by_row(self, member):
        """Whether single rows of the array can be read."""
        return member.plain and is_local(self.path)

    def _read_structure(self):
        with zipfile.ZipFile(self._file) as archive:
            stored = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            wanted = ARRAYS if "x1" in stored else {name: ARRAYS[name] for name in ("x0", "t0", "t1")} | KEYED_ARRAYS
            missing = [name for name in wanted if name not in stored]
            if missing:
                raise self.broken(f"it has no array {missing[0]}")
            self._members = {name: self._member(archive, stored[name]) for name in wanted}
        for name, (kind, dimensions) in wanted.items():
            member = self._members[name]
            if member.dtype.kind != kind or len(member.shape) != dimensions:
                raise self.broken(f"its array {name} is {member.dtype} {list(member.shape)}")
            if member.shape[0] != self._members["x0"].shape[0]:
                raise self.broken(f"x0 and {name} have different lengths")
        self.count, *shape = self._members["x0"].shape
        if not self.count:
            raise self.broken("it has no pairs")
        self.image_shape = tuple(shape)
        self.stores_noise = "x1" in wanted
        if self.stores_noise and self._members["x1"].shape != (self.count, *shape):
            raise self.broken("x0 and x1 have different shapes")
        self._file.seek(0, os.SEEK_END)
        self.size = self._file.tell()  # which `seek` itself does not return of a remote file
        self.crc32 = {name: member.info.CRC for name, member in self._members.items()}

    def _member(self, archive, info):
        with archive.open(info) as stream:
            dtype, fortran, shape = _array_header(stream)
            header = stream.tell()
        if dtype.hasobject:
            raise self.broken(f"its array {info.filename} carries pickled Python objects, which are never loaded")
        if header + dtype.itemsize * math.prod(shape) != info.file_size:
            raise self.broken(f"its array {info.filename} has a length that its header does not say")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise self.broken(f"its array {info.filename} is compressed in a way that NumPy does not use")
        self._file.seek(info.header_offset)
        name_length, extra_length = LOCAL_HEADER.unpack(self._file.read(LOCAL_HEADER.size))
        start = info.header_offset + LOCAL_HEADER.size + name_length + extra_length
        return _Member(info, dtype, fortran, shape, start, header)

    def _pread(self, member, rows, out, places):
        size = member.row_bytes
        flat = memoryview(out).cast("B")
        targets = [[flat[start : start + size]] for start in (places * size).tolist()]
        offsets = (member.start + member.header + rows.astype(np.int64) * size).tolist()
        try:
            got = map(os.preadv, itertools.repeat(self._file.fileno()), targets, offsets)
            if any(count != size for count in got):
                raise self.broken("it has been cut off since it was opened")
        except OSError as error:
            raise InputError(f"{self.path} cannot be read: {error}") from error

    def _crc_of(self, member):
        block = memoryview(bytearray(CRC_BLOCK))
        crc, place, end = 0, member.start, member.start + member.info.file_size
        with self._broken_unless_read():
            while place < end:
                got = os.preadv(self._file.fileno(), [block[: end - place]], place)
                if not got:
                    raise self.broken("it has been cut off since it was opened")
                crc, place = isal_zlib.crc32(block[:got], crc), place + got
        return crc

    def broken(self, reason):
        return BrokenFile(
            f"{self.path} is broken: {reason}; scripts/check_pairs.py --repair {self.path.parent} removes what is "
            "broken, gen_reflow makes it again"
        )

    @contextlib.contextmanager
    def _broken_unless_read(self):
        """Names the file in every way that reading it can fail."""
        try:
            with os_errors():
                yield
        except InputError:
            raise
        except FileNotFoundError:
            raise MissingFile(f"{self.path} is missing; run gen_reflow again, which makes what is not there") from None
        except OSError as error:
            raise InputError(f"{self.path} cannot be read: {error}") from error
        except ZIP_ERRORS as error:
            raise self.broken(str(error).splitlines()[0] if str(error) else type(error).__name__) from error


def _array_header(stream):
    """(dtype, whether in Fortran's order, shape) of the array in NumPy's format that the stream is at the start of."""
    start = stream.read(len(MAGIC) + 2)
    size = struct.Struct("<H" if start[-2:-1] == b"\1" else "<I")
    (length,) = size.unpack(stream.read(size.size))
    if not start.startswith(MAGIC) or length > LONGEST_HEADER:
        raise ValueError("it holds something that is not an array")
    match = HEADER.fullmatch(stream.read(length))
    if not match:
        raise ValueError("it holds an array that is not of plain numbers")
    return np.dtype(match[1].decode()), match[2] == b"True", tuple(int(n) for n in match[3].split(b",") if n.strip())
