"""Shared by everything: the error that users see, atomic and durable files on a disk or in a bucket."""

import argparse
import contextlib
import dataclasses
import errno
import importlib
import io
import itertools
import json
import lzma
import math
import os
import pathlib
import re
import struct
import sys
import tempfile
import threading
import tokenize
import types
import typing
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

import numpy as np
from etils import epath

MOST_JSON = 2**24  # bytes of a file
MOST_LEVELS = 50  # of lists and dicts in each other
SMALL_ARRAY = 2**24  # bytes; a larger one is ...
MOST_COMPRESSED = 32  # ... at most as many times larger than its file
ZIP_ERRORS = (
    zipfile.BadZipFile, ValueError, EOFError, KeyError, struct.error, zlib.error, lzma.LZMAError, RuntimeError,
    NotImplementedError, OverflowError,
)  # fmt: skip
_HEADER_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
# NumPy parses headers with `ast`, which in Python 3.11 is not thread-safe (SystemError: AST constructor recursion depth
# mismatch).
_PARSING_HEADER = threading.Lock()
_HEADER_ERRORS = (
    SyntaxError, TypeError, AttributeError, KeyError, ValueError, MemoryError, RecursionError, tokenize.TokenError,
)  # fmt: skip
UNSUPPORTED_LINK = (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.EXDEV, errno.ENOSYS)
# TensorFlow's errors that have a counterpart among those of a disk.
REMOTE_ERRORS = {"NotFoundError": (FileNotFoundError, errno.ENOENT), "PermissionDeniedError": (OSError, errno.EACCES)}
# Of a disk or a folder that is full, read-only, forbidden, no folder, or gone.
DISK_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR,
    errno.EEXIST, errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EREMOTEIO,
)  # fmt: skip
# Tensorstore's messages: of a disk with the error's number, of a bucket beginning with a status.
_STORE_NUMBER = re.compile(r"os_error_code='(\d+)'")
_STORE_STATUS = re.compile(
    r"(UNAVAILABLE|PERMISSION_DENIED|UNAUTHENTICATED|DEADLINE_EXCEEDED|ABORTED): |NOT_FOUND: .*(googleapis|gs:)"
)
# Where errors of Google's client come from, by which orbax asks for the layout of a bucket.
_CLIENT_MODULES = ("google.auth", "google.api_core", "google.cloud", "requests")
_NO_ACCESS = re.compile(r"response code 40[13]|PERMISSION_DENIED|UNAUTHENTICATED|^40[13] |credentials|does not have")
# In answers of Google, of curl by TensorFlow, of curl by tensorstore.
_REASON = re.compile(r'"message": "([^"]+)|error details: (.+)|attempts failed: ([^[]+)')
_ACCESS = (
    "give this machine credentials that may read, write and get the bucket (gcloud auth application-default login, or "
    "GOOGLE_APPLICATION_CREDENTIALS; roles/storage.admin)"
)


class InputError(ValueError):
    """Something that the user gave cannot work. The message is one line that names it and the remedy."""


def needed(module: str, what: str) -> Any:
    """The module, imported; scripts/requirements.sh --minimal leaves out some.

    Raises:
      InputError: it is not installed; `what` needs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise InputError(
            f"{what} needs {error.name}, which is not installed; run bash scripts/requirements.sh"
        ) from error


def is_local(path: epath.PathLike) -> bool:
    """Whether the path is on a mounted disk, rather than in an object store (gs://...)."""
    return "://" not in os.fspath(path)


def user_path(path: epath.PathLike) -> epath.Path:
    """A path that a user gave, with ~ as the home folder.

    Raises:
      InputError: one that the libraries below (orbax, tensorstore, epath) would take for a pattern.
    """
    path = epath.Path(path).expanduser()
    if pattern := sorted(set("[*?\\") & set(os.fspath(absolute(path)))):
        raise InputError(
            f"{os.fspath(path)}: checkpoints cannot be read from a path with {' or '.join(pattern)}; rename the folder"
        )
    return path


def absolute(path: epath.PathLike) -> epath.Path:
    """The absolute path; epath's own `absolute` would put a bucket's below the current folder."""
    path = epath.Path(path)
    return path.absolute() if is_local(path) else path


def local_path(text: str) -> pathlib.Path:
    """An argument of a script that works on mounted disks alone: pathlib would take a bucket for a folder `gs:`.

    Raises:
      argparse.ArgumentTypeError: the path is in a bucket.
    """
    if not is_local(text):
        raise argparse.ArgumentTypeError(f"{text} is in a bucket; give a folder on a disk and copy it from or to there")
    return pathlib.Path(text).expanduser()


@contextlib.contextmanager
def os_errors() -> Iterator[None]:
    """Converts TensorFlow's errors, which epath raises for gs:// paths, to the OSError that a disk would raise."""
    try:
        yield
    except Exception as error:
        if (converted := _remote_error(error)) is None:
            raise
        raise converted from error


def _remote_error(error: BaseException) -> OSError | None:
    """The OSError that stands for an error of TensorFlow; None: it is none."""
    tensorflow = sys.modules.get("tensorflow")  # imported by epath if a remote path has been used
    if tensorflow is None or not isinstance(error, tensorflow.errors.OpError):
        return None
    kind, number = REMOTE_ERRORS.get(type(error).__name__, (OSError, errno.EREMOTEIO))
    return kind(number, _bucket_reason(error))


def _bucket_reason(error: BaseException) -> str:
    """One line of a bucket's error."""
    text = str(error) or type(error).__name__
    reason = (found[found.lastindex or 0] if (found := _REASON.search(text)) else text.splitlines()[0])[:200].strip(
        " ."
    )
    return f"{reason}; {_ACCESS}" if _NO_ACCESS.search(text) else reason


def disk_error(error: BaseException | None) -> OSError | None:
    """The error of a disk or a bucket behind `error`, however wrapped (orbax's are tensorstore's); else None."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            return error
        if (remote := _remote_error(error)) is not None:
            return remote
        if type(error) is ValueError and (number := _STORE_NUMBER.search(str(error))):
            return OSError(int(number[1]), os.strerror(int(number[1])))
        is_store = type(error) is ValueError and _STORE_STATUS.match(str(error))
        if is_store or type(error).__module__.startswith(_CLIENT_MODULES):
            return OSError(errno.EREMOTEIO, _bucket_reason(error))
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def damage_named(what: str) -> Iterator[None]:
    """Turns whatever reading a damaged or foreign file raises inside the block into InputError, in one line.

    A bucket that cannot be reached or read stays the OSError of it: nothing is damaged.
    """
    try:
        yield
    except Exception as error:
        if (cause := disk_error(error)) is not None and cause.errno in (errno.EREMOTEIO, errno.EACCES):
            raise cause from error
        # orbax, tensorstore, safetensors, NumPy, zipfile and JSON raise exceptions of many types for damaged files.
        raise InputError(f"{what}: {reason_of(error)}") from error


def reason_of(error: BaseException) -> str:
    """The beginning of an error's first line; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def check_writable(*folders: epath.PathLike) -> None:
    """Makes the folders, and a small file in each, which is removed again: on a disk one without a name, if it can.

    Raises:
      InputError: a folder cannot be made or written.
    """
    for folder in map(epath.Path, folders):
        try:
            with os_errors():
                _check_bucket(folder)
                folder.mkdir(parents=True, exist_ok=True)
                if is_local(folder):
                    with tempfile.TemporaryFile(dir=folder) as unnamed:
                        unnamed.write(b"?")
                    continue
                probe = folder / f".writable.{uuid.uuid4().hex[:8]}.tmp"
                try:
                    probe.write_bytes(b"?")
                finally:
                    probe.unlink(missing_ok=True)
        except OSError as error:
            raise InputError(f"{folder} cannot be written: {error.strerror or error}; use another folder") from error


def _check_bucket(path: epath.Path):
    """TensorFlow looks for the parents of a folder in a bucket that does not exist, for ever."""
    bucket = "/".join(os.fspath(path).split("/")[:3])
    if not is_local(path) and not epath.Path(bucket).exists():
        raise FileNotFoundError(errno.ENOENT, f"there is no bucket {bucket}")


@contextlib.contextmanager
def atomic_path(path: epath.PathLike, *, overwrite: bool = True) -> Iterator[epath.Path]:
    """Yields a temporary path beside `path`; on success its file is renamed to `path`, on failure removed.

    A reader sees the old file or the whole new one. On a disk the new file is durable: its bytes are on the disk before
    it gets its name, so that a crash of the machine cannot leave an empty file.

    Args:
      path: local or remote; missing folders are made.
      overwrite: False: a file that exists is kept, also one that appears meanwhile. Where hard links are not supported
        (object stores) processes that write at the same moment may still replace each other's file.

    Raises:
      OSError: no space or no permission; no file is left behind.
    """
    path = epath.Path(path)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    with os_errors():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            if is_local(path):
                with temporary.open("rb") as file:
                    os.fsync(file.fileno())
            if overwrite:
                temporary.replace(path)
            else:
                _rename_to_new(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def remove_leftovers(folder: epath.PathLike) -> None:
    """Removes what killed writers of `atomic_path` left in a local folder, where nobody else writes now."""
    if is_local(folder):
        for path in pathlib.Path(folder).rglob(".*.tmp"):
            path.unlink(missing_ok=True)


def _rename_to_new(temporary, path):
    """Gives the file the name `path` unless that exists: a rename would replace it."""
    if is_local(path):
        try:
            return os.link(temporary, path)
        except FileExistsError:
            return None
        except OSError as error:
            if error.errno not in UNSUPPORTED_LINK:
                raise
    if not path.exists():
        temporary.replace(path)


@contextlib.contextmanager
def atomic_file(path: epath.PathLike, *, overwrite: bool = True) -> Iterator[IO[bytes]]:
    """Yields an open binary file that becomes `path` as in `atomic_path`; a remote one is kept in memory meanwhile."""
    with atomic_path(path, overwrite=overwrite) as temporary:
        if is_local(path):
            with temporary.open("wb") as file:
                yield file
        else:  # remote files can only be written front to back, which zip files are not
            buffer = io.BytesIO()
            yield buffer
            temporary.write_bytes(buffer.getvalue())


def write_arrays(path: epath.PathLike, *, overwrite: bool = True, **arrays: np.ndarray) -> None:
    """Writes an uncompressed .npz as `atomic_file`; its bytes depend on the arrays alone."""
    with atomic_file(path, overwrite=overwrite) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # an array named allow_pickle is not ours


def write_json(path: epath.PathLike, value: Any, *, overwrite: bool = True) -> None:
    """Writes JSON as `atomic_file`. NaN and infinity become null, which JSON has in their place."""

    def finite(entry: Any) -> Any:
        if isinstance(entry, dict):
            return {key: finite(item) for key, item in entry.items()}
        if isinstance(entry, (list, tuple)):
            return [finite(item) for item in entry]
        return None if isinstance(entry, float) and not math.isfinite(entry) else entry

    with atomic_file(path, overwrite=overwrite) as file:
        file.write((json.dumps(finite(value), indent=1) + "\n").encode())


# --- files that somebody else may have written ------------------------------------------------------------------------


def open_plain(path: epath.PathLike, *, buffered: bool = True) -> contextlib.AbstractContextManager[IO[bytes]]:
    """The file, open for reading; on a disk without Python's buffer, if asked for.

    Raises:
      InputError: a pipe or a device, which could be read for ever.
      OSError: it cannot be opened.
    """
    path = epath.Path(path).expanduser()
    if is_local(path) and path.exists() and not (os.path.isfile(path) or os.path.isdir(path)):
        raise InputError(f"{path} is no plain file, but a pipe or a device; give a file")
    return path.open("rb") if buffered or not is_local(path) else typing.cast(IO[bytes], io.FileIO(path))


def parse_json(content: str | bytes, kind: Any = Any, *, most: int = MOST_JSON) -> Any:
    """The value of a JSON text of the type `kind` (see `has_type`). NaN and infinity are null, as in `write_json`.

    Raises:
      ValueError, RecursionError: no JSON, another type, more than MOST_LEVELS levels or `most` bytes, or a number that
        64 bits do not hold.
    """
    if len(content) > most:
        raise ValueError(f"it has more than {most} bytes")
    whole, real = _number(int, 2.0**63), _number(float, math.inf)
    value = json.loads(content, parse_int=whole, parse_float=real, parse_constant=lambda name: None)
    level = [value]
    for _ in range(MOST_LEVELS):
        lists = (each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list))
        level = list(itertools.chain.from_iterable(lists))
    if level or not has_type(value, kind):
        raise ValueError(f"it is no {getattr(kind, '__name__', kind)} of at most {MOST_LEVELS} levels")
    return value


def _number(kind: type, limit: float) -> Callable[[str], Any]:
    """The reader of a number of JSON whose size is below `limit`."""

    def read(text: str) -> Any:
        if not abs(float(text)) < limit:  # of thousands of digits too
            raise ValueError(f"the number {text[:20]} is too large")
        return kind(text)

    return read


def has_type(value: Any, kind: Any) -> bool:
    """Whether a JSON value has the type `kind`.

    That is str, int, bool, float (or an int), None, a union, `dict[str, X]`, `list[X]`, `tuple[X, ...]` (a list, in
    JSON) or a TypedDict, which may have further entries.
    """
    if kind is Any:
        return True
    if typing.is_typeddict(kind):
        entries = typing.get_type_hints(kind).items()
        has_all = isinstance(value, dict) and kind.__required_keys__ <= value.keys()
        return has_all and all(has_type(value[name], entry) for name, entry in entries if name in value)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(has_type(value, each) for each in arguments)
    if origin is dict:
        return isinstance(value, dict) and all(has_type(item, arguments[1]) for item in value.values())
    if origin in (list, tuple):
        return isinstance(value, list) and all(has_type(item, arguments[0]) for item in value)
    return type(value) is (types.NoneType if kind is None else kind) or (kind is float and type(value) is int)


def read_json(path: epath.PathLike, kind: Any, default: Any = None, *, most: int = MOST_JSON) -> Any:
    """The content of a JSON file, as `parse_json`; `default` where there is no such file.

    Args:
      most: bytes that are read, at most; values take some thirty times as much memory.

    Raises:
      InputError: it is damaged, too large or no plain file.
      OSError: it is there and cannot be read: whoever took it for absent would write over it.
    """
    try:
        with os_errors(), open_plain(path) as file:
            content = file.read(most + 1)
    except (FileNotFoundError, NotADirectoryError):
        return default
    with damage_named(f"{path} is damaged; restore or remove it"):
        return parse_json(content, kind, most=most)


def valid_json(path: epath.PathLike, kind: Any, default: Any = None, *, most: int = MOST_JSON) -> Any:
    """As `read_json`, and `default` too where the file is damaged: for what is made again then, or can be left out."""
    try:
        return read_json(path, kind, default, most=most)
    except InputError:
        return default


@dataclasses.dataclass(frozen=True)
class ArrayMember:
    """An array in an .npz file, whose header has been read.

    Attributes:
      header: the length of NumPy's header, which is before the array's bytes.
      fortran: whether it is stored in Fortran's order.
    """

    info: zipfile.ZipInfo
    header: int
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype


def array_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> ArrayMember:
    """The header of an array.

    Raises:
      ValueError: it is damaged, has Python objects or another length than it states, or would fill the memory: it is
        compressed to less than 1 / MOST_COMPRESSED.
    """
    if info.file_size > max(SMALL_ARRAY, MOST_COMPRESSED * archive.start_dir):
        raise ValueError(f"its array {info.filename} is {MOST_COMPRESSED} times larger than the file")
    with archive.open(info) as stream:
        try:
            with _PARSING_HEADER:
                shape, fortran, dtype = _HEADER_READERS[np.lib.format.read_magic(stream)](stream)
        except _HEADER_ERRORS as error:
            raise ValueError(f"its array {info.filename} has an invalid header") from error
        header = stream.tell()
    if dtype.hasobject:
        raise ValueError(f"its array {info.filename} contains pickled Python objects, which are never loaded")
    if min(shape, default=0) < 0 or header + dtype.itemsize * math.prod(shape) != info.file_size:
        raise ValueError(f"its array {info.filename} does not have the length that its header states")
    return ArrayMember(info, header, shape, fortran, dtype)


def read_arrays(path: epath.PathLike, kinds: Mapping[str, tuple[str, int]] | None = None) -> dict[str, np.ndarray]:
    """Arrays of an .npz file, their checksums verified.

    Args:
      kinds: those that are read, where the file has them: name -> (a pattern of the dtype, such as "f[48]", and the
        number of dimensions); None: all.

    Raises:
      InputError: no .npz file, a damaged one, an array of another kind, or one that is compressed so much that a
        small file would fill the memory.
      OSError: it cannot be read.
    """
    with os_errors(), open_plain(path) as file, damage_named(f"{path} is damaged, or is no .npz file"):
        archive = zipfile.ZipFile(file)
        stored = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        names = stored if kinds is None else [name for name in kinds if name in stored]
        members = {name: array_member(archive, stored[name]) for name in names}
        for name, (pattern, dimensions) in (kinds or {}).items():
            if name in members:
                check_kind(name, members[name], pattern, dimensions)
        return {name: array_of(archive, member) for name, member in members.items()}


def check_kind(name: str, member: ArrayMember, pattern: str, dimensions: int) -> None:
    """Raises ValueError where an array has another dtype than the pattern or other dimensions."""
    if not re.fullmatch(pattern, member.dtype.str[1:]) or len(member.shape) != dimensions:
        raise ValueError(f"its array {name} is {member.dtype} {list(member.shape)}")


def array_of(archive: zipfile.ZipFile, member: ArrayMember) -> np.ndarray:
    """The array, its checksum verified, in this machine's byte order."""
    flat = np.frombuffer(archive.read(member.info), member.dtype, offset=member.header)
    array = flat.reshape(member.shape, order="F" if member.fortran else "C")
    return array.astype(member.dtype.newbyteorder("="), copy=False)
