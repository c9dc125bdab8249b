"""Files of torch.save, read as untrusted input: nothing in them is executed, and every tensor is checked.

torch is imported only when a file is read.
"""

import contextlib
import os
import re
import zipfile
from typing import Any

import numpy as np
from etils import epath

from utils import InputError, damage_named, needed, open_plain

# bytearray(8 << 30) is the one call that PyTorch allows and that fills the memory. As pickles have it, uncompressed.
_BYTEARRAY = b"\nbytearray\n"


class _PlainDtype:
    """Stands in for `numpy.dtype` while unpickling: numbers only, no fields, no objects, no sizes to allocate."""

    def __init__(self, code, *_):
        if not re.fullmatch("[biuf][1248]", str(code)):
            raise ValueError(f"a NumPy scalar of type {code!r} is no number")
        self.dtype = np.dtype(code)

    def __setstate__(self, state):
        self.dtype = self.dtype.newbyteorder(state[1])


def _plain_scalar(dtype: _PlainDtype, raw: bytes) -> float:
    """Stands in for NumPy's unpickler of scalars: public checkpoints keep their learning rate as one."""
    return np.frombuffer(raw, dtype.dtype, count=1)[0].item()


class _Clipped:
    """A stream that is asked for no more bytes than it has: for a damaged length Python would allocate them first."""

    def __init__(self, stream):
        self._stream, self._size = stream, _size_of(stream)

    def read(self, size=-1):
        left = self._size - self._stream.tell()
        return self._stream.read(left if size < 0 else min(size, left))

    def __getattr__(self, name):
        return getattr(self._stream, name)


def _size_of(stream):
    """The bytes of a stream, which is at its beginning afterwards; `seek` itself returns nothing in a bucket."""
    stream.seek(0, os.SEEK_END)
    size = stream.tell()
    stream.seek(0)
    return size


def _overlapping_blocks(stream, overlap):
    """The bytes of the stream in blocks, each of which begins with the last `overlap` ones of the block before."""
    block = b""
    while content := stream.read(2**20):
        yield (block := block[-overlap:] + content)


def load(path: epath.Path):
    """What is in the file, its tensors mapped from disk rather than read where the file is a local archive.

    Raises:
      InputError: no such file, damaged, or with anything in it but tensors and plain numbers; one line.
    """
    torch = needed("torch", "a PyTorch checkpoint")

    if not path.is_file():
        raise InputError("there is no such file")
    stand_ins: list[Any] = [
        (_PlainDtype, "numpy.dtype"),
        (_plain_scalar, "numpy._core.multiarray.scalar"),
        (_plain_scalar, "numpy.core.multiarray.scalar"),
    ]
    local = os.path.exists(os.fspath(path))
    archive = _is_archive(path)
    with open_plain(path) as stream:
        if any(_BYTEARRAY in block for block in _overlapping_blocks(stream, len(_BYTEARRAY))):
            raise InputError("carries code ('builtins.bytearray'), which is never run")
    try:
        with open_plain(path) as stream, torch.serialization.safe_globals(stand_ins):
            source = os.fspath(path) if local and archive else _Clipped(stream)
            return torch.load(source, map_location="cpu", weights_only=True, mmap=local and archive)
    except Exception as error:  # a damaged pickle can raise anything
        if blocked := re.search(r"GLOBAL (\S+)", str(error)):
            raise InputError(f"carries code ({blocked[1]!r}), which is never run") from error
        raise InputError("is not a checkpoint that torch.save wrote, or is damaged or truncated") from error


def _is_archive(path) -> bool:
    """Whether the file is a zip archive (torch.save since 1.6), once it is known not to grow when it is read."""
    with open_plain(path) as stream:
        magic = stream.read(4)
        with damage_named("is a damaged archive"):
            is_zip = zipfile.is_zipfile(stream)
        if not is_zip:
            if magic == b"PK\x03\x04":
                raise InputError("is truncated: the archive's end is missing")
            return False
        with damage_named("is a damaged archive"):
            archive = zipfile.ZipFile(stream)
            members = archive.infolist()
            stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
            if not stored or sum(member.file_size for member in members) > _size_of(stream):
                raise ValueError("it is compressed, as torch.save writes none")
            # PyTorch looks at no checksum: one flipped bit would be another weight.
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"the checksum of {damaged} does not match")
    return True


@contextlib.contextmanager
def errors_named(what: str):
    """Puts `what` before the message of an InputError, and makes one of whatever else the block raises."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{what}: {error}") from error.__cause__
    except (OSError, ImportError, MemoryError):
        raise
    except Exception as error:
        # Whoever crafts a file chooses the objects in it, and tensors of odd kinds raise what they like at any touch.
        raise InputError(
            f"{what}: holds something that no training run saves ({type(error).__name__} while reading it); save it "
            "again from the trainer"
        ) from error


def dense(name: str, value: Any, shape: tuple[int, ...] | None = None) -> Any:
    """`value`, once it is known to be a tensor of floats of that shape which does not repeat what it has stored."""
    torch = needed("torch", "a PyTorch checkpoint")

    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.device.type != "cpu":
        raise InputError(f"{name} is not a tensor of plain numbers")
    if value.dtype not in (torch.float16, torch.float32, torch.float64):
        kind = str(value.dtype).removeprefix("torch.")
        raise InputError(f"{name} is not a tensor of float16, float32 or float64 but of {kind}")
    if shape is not None and tuple(value.shape) != shape:
        raise InputError(f"{name} has shape {tuple(value.shape)}, this configuration needs {shape}")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise InputError(f"{name} claims more numbers than the file holds")
    return value.detach()


def check_numbers(parts: dict[str, dict], size: int):
    """Raises InputError for tensors, by part and name, that a file of `size` bytes does not hold, or not finite ones.

    PyTorch's old format, which is no archive, names each storage with the size it claims, and reads only those that a
    list after them repeats. The others are memory that was asked for and never written to: it costs nothing, however
    much it is, until someone touches it, so the claims are added up first.
    """
    torch = needed("torch", "a PyTorch checkpoint")

    storages = [tensor.untyped_storage() for tensors in parts.values() for tensor in tensors.values()]
    if sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()) > size:
        raise InputError("claims more numbers than the file holds")
    for part, tensors in parts.items():
        for name, tensor in tensors.items():
            # As it will be kept: a 64-bit number may be too large for 32.
            if not torch.isfinite(tensor.float()).all():
                raise InputError(f"{part} of {name} has a number that is not finite")
            if part == "exp_avg_sq" and (tensor < 0).any():
                raise InputError(f"{part} of {name} has a negative number, which a mean of squares cannot be")
