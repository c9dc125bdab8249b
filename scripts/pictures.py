"""Reads the pictures of a folder as equal squares, and names every file that is not one of them.

    files, skipped = files_below(folder)
    facts = {path: facts_of(path, rendering) for path in files}  # each may raise Unusable or Refused
    refused = without_depth(facts)  # where this is empty, and nothing was Refused:
    square_picture(path, rendering)

Pillow decodes. What it would decode wrongly, or only by starting another program, is refused.
"""

import collections
import contextlib
import dataclasses
import os
import stat
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
from jaxtyping import UInt8

from utils import InputError

WIDE = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")  # Pillow's modes of more than 8 bits, all of one band
DEEP_COLOUR = ("RGB;16", "RGBA;16", "RGBa;16", "RGBX;16", "LA;16")  # 16 bits in the file; Pillow keeps the upper 8
# PNG writes its transparent colour in the values of the file, which are these factors from those that Pillow gives.
KEY_FACTORS = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}
POSTSCRIPT = (b"%!PS", b"\xc5\xd0\xd3\xc6")  # first bytes; Pillow would start Ghostscript
# What a file may be whose name has no suffix that Pillow knows: formats that cannot be mistaken for something else.
SIGNED_FORMATS = ["AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "TIFF", "WEBP"]
# Where no picture of a set is as bright as this part of 16 bits, 14 bits or fewer are in use.
PLAUSIBLE_PEAK = 0.25
NEW_SUBFILE_TYPE, BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT, DNG_VERSION = 254, 258, 262, 339, 50706  # tags of TIFF
UNKNOWN = "not a picture of a known format"
GIVE_LEVELS = "give the values of the set that are black and white as --levels=LOW,HIGH"
SAVE_AGAIN = "save it as an 8-bit PNG, or move it out of the folder"


class Unusable(InputError):
    """A file or folder that is not recorded: `kind`, by which such are counted, and details."""

    def __init__(self, kind: str, detail: object = "", path: Path | None = None):
        super().__init__(kind)
        self.kind, self.detail, self.path = kind, " ".join(str(detail).split()), path

    def __str__(self) -> str:
        detail = f" ({self.detail})" if self.detail else ""
        return f"{printable(self.path or Path())}: {self.kind}{detail}"


class Refused(Unusable):
    """A picture of which a data set would show something wrong, so that none is written; the detail is the remedy."""

    def __str__(self) -> str:
        return f"{printable(self.path or Path())}: {self.kind}; {self.detail}"


@dataclasses.dataclass(frozen=True)
class Rendering:
    """How pictures become arrays: the side, the colour behind transparency, `--levels`, `--grey` and `--crop`."""

    size: int
    background: tuple[int, int, int] = (255, 255, 255)
    levels: tuple[float, float] | None = None
    grey: bool = False
    crop: str = "centre"

    @property
    def channels(self) -> int:
        """1 of grey pictures, else 3."""
        return 1 if self.grey else 3


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a picture's header says and, where it has more than 8 bits, its values."""

    frames: int
    enlarged: bool
    transparent: bool
    depth: str = "known"  # or "grey" or "colour": of 16 bits, if all are in use
    peak: float = 1.0  # the highest value of more than 8 bits, as a part of the range from black to white
    clipped: bool = False  # there are values outside --levels


def printable(path: Path) -> str:
    """The path on one line: bytes that are not UTF-8 and control characters as escapes."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def record_key(path: Path) -> str | bytes:
    """The path as TFDS can hash it: as text or, where it is not UTF-8, as bytes."""
    name = path.as_posix()
    return os.fsencode(name) if any("\udc80" <= char <= "\udcff" for char in name) else name


def files_below(folder: Path) -> tuple[list[Path], list[Unusable]]:
    """(files, sorted; what else there is) of all folders below. Links are followed, and each folder is read once.

    Raises:
      OSError: the folder itself cannot be read.
    """
    os.listdir(folder)
    waiting, seen = collections.deque([folder]), set()
    files: list[Path] = []
    skipped: list[Unusable] = []
    while waiting:
        path = waiting.popleft()
        try:
            state = path.stat()
            if stat.S_ISREG(state.st_mode):
                files.append(path)
            elif not stat.S_ISDIR(state.st_mode):
                skipped.append(Unusable("neither a file nor a folder", path=path))
            elif (state.st_dev, state.st_ino) in seen:
                skipped.append(Unusable("a link to a folder that is read already", path=path))
            else:
                seen.add((state.st_dev, state.st_ino))
                skipped += _enqueued(sorted(path.iterdir()), waiting)
        except OSError as error:
            skipped.append(Unusable("cannot be opened", error.strerror, path))
    return sorted(files), skipped


def _enqueued(paths, waiting) -> list[Unusable]:
    """Adds the paths to `waiting` and returns the hidden ones. Links go last: a folder's own name is before theirs."""
    for path in paths:
        if not path.name.startswith("."):
            waiting.append(path) if path.is_symlink() else waiting.appendleft(path)
    return [Unusable("hidden", path=path) for path in paths if path.name.startswith(".")]


@contextlib.contextmanager
def opened(path: Path) -> Iterator[PIL.Image.Image]:
    """The file as Pillow opens it. What goes wrong then, and in the statements that use it, becomes `Unusable`.

    Raises:
      Unusable: not a picture; damaged; what the statements raise, with the path.
      Refused: PostScript; more pixels than Pillow takes for harmless.
    """
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
            if file.read(4) in POSTSCRIPT:
                raise Refused("PostScript, which needs another program", SAVE_AGAIN)
            known = path.suffix.lower() in PIL.Image.registered_extensions()
            with PIL.Image.open(file, formats=None if known else SIGNED_FORMATS) as picture:
                yield picture
    except Unusable as error:
        error.path = path
        raise
    except (PIL.Image.DecompressionBombWarning, PIL.Image.DecompressionBombError):
        limit = f"more than {PIL.Image.MAX_IMAGE_PIXELS} pixels"
        raise Refused(limit, "make it smaller, or move it out of the folder", path) from None
    except PIL.UnidentifiedImageError:
        raise Unusable(UNKNOWN, path=path) from None
    except Exception as error:  # the decoders of many formats raise what they like
        if isinstance(error, OSError) and error.strerror:  # of the system; Pillow's have only a message
            raise Unusable("cannot be opened", error.strerror, path) from None
        raise Unusable("damaged", str(error) or type(error).__name__, path) from None


def facts_of(path: Path, rendering: Rendering) -> Facts:
    """What must be known of a picture before a set is written.

    Raises:
      Unusable: as `opened`; a camera raw; less than half as wide or as high as wanted.
      Refused: as `opened`; Pillow would decode it wrongly; nothing says which of its values are black and white.
    """
    with opened(path) as picture:
        if picture.format == "TIFF":
            _check_tags(picture, path.suffix.lower())
        if picture.format == "FITS" and picture.mode in WIDE:
            raise Refused("FITS of more than 8 bits", SAVE_AGAIN)
        width, height = picture.size
        if 2 * min(width, height) < rendering.size:
            raise Unusable("too small", f"{width} x {height}: less than half of {rendering.size}")
        facts = Facts(
            # Those of PSD are layers, and Pillow opens the picture that they make.
            frames=1 if picture.format == "PSD" else getattr(picture, "n_frames", 1),
            enlarged=min(width, height) < rendering.size,
            transparent=picture.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in picture.info,
        )
        return dataclasses.replace(facts, **_value_facts(picture, rendering.levels))


def _check_tags(picture, suffix) -> None:
    """Raises what makes a TIFF something else than the picture that Pillow opens."""
    tags = picture.tag_v2
    other_name = suffix and suffix not in PIL.Image.registered_extensions()
    if other_name or DNG_VERSION in tags or tags.get(NEW_SUBFILE_TYPE, 0) & 1:
        raise Unusable(UNKNOWN, "as a camera raw it holds a TIFF, but its first picture is a preview")
    if picture.mode == "L" and tags.get(SAMPLE_FORMAT, (1,))[0] == 2:
        raise Refused("8 bits with a sign", SAVE_AGAIN)
    if picture.mode in WIDE and tags.get(PHOTOMETRIC) == 0:
        raise Refused("more than 8 bits of which 0 is white", SAVE_AGAIN)


def _value_facts(picture, chosen) -> dict:
    """The fields of `Facts` that depend on the values of a picture of more than 8 bits."""
    if str(_decoder_arguments(picture)[0]).startswith(DEEP_COLOUR):
        return {"depth": "colour", "peak": max(most for _, most in picture.convert("RGB").getextrema()) / 255}
    if picture.mode not in WIDE:
        return {}
    assumed, (low, high) = _black_and_white(picture, chosen)
    values = np.asarray(picture)
    least, most = float(values.min()), float(values.max())
    if not np.isfinite([least, most]).all():
        raise Refused("holds values that are no numbers", SAVE_AGAIN)
    if least < 0 and picture.format == "TIFF" and picture.tag_v2.get(SAMPLE_FORMAT, (1,))[0] == 1:
        raise Refused("holds whole numbers of 32 bits, which Pillow reads as negative", SAVE_AGAIN)
    outside = least < low or most > high
    if outside and chosen is None:
        raise Refused(f"holds floats from {least:g} to {most:g}", GIVE_LEVELS)
    peak = (most - low) / (high - low)
    return {"depth": "grey" if assumed else "known", "peak": peak, "clipped": outside}


def _decoder_arguments(picture) -> tuple:
    """The arguments of Pillow's decoder, of which the first mostly names how values lie in the file; before it runs."""
    arguments = picture.tile[0].args if picture.tile else None
    return arguments if isinstance(arguments, tuple) else (arguments,)


def _black_and_white(picture, chosen) -> tuple[bool, tuple[float, float]]:
    """(whether this is only assumed, the values of black and of white) of a picture in a mode of `WIDE`."""
    if picture.format == "TIFF" and picture.tag_v2.get(BITS_PER_SAMPLE) == (12,):
        return False, (0, 4095)
    pgm = picture.format == "PPM" and picture.mode == "I"
    if pgm and _decoder_arguments(picture)[1:] not in ((), (65535,)):
        return False, (0, 65535)  # Pillow has scaled it by the highest value that its header names
    if chosen is not None:
        return False, chosen
    if picture.mode == "I" and not pgm:
        raise Refused("holds whole numbers of which no depth is written", GIVE_LEVELS)
    return (False, (0, 1)) if picture.mode == "F" else (True, (0, 65535))


def notes(path: Path, facts: Facts) -> list[str]:
    """What to know of a picture that is recorded, a line each."""
    lines = [f"the first of {facts.frames} frames"] if facts.frames > 1 else []
    if facts.depth != "known" and facts.peak < PLAUSIBLE_PEAK:
        lines.append(f"dark if its 16 bits are all in use: nothing in it exceeds {facts.peak:.2%} of the range")
    return [f"{printable(path)}: {line}" for line in lines]


def without_depth(facts: dict[Path, Facts]) -> list[Refused]:
    """The greys, or colours, of 16 bits, if none of them is as bright as one of the set would be were all bits used."""
    greys = "give the highest value as --levels=0,HIGH: 0,4095 for 12 bits, 0,65535 if the pictures are dark"
    refused = []
    for depth, remedy in (("grey", greys), ("colour", "save all of them as 8-bit PNGs")):
        peaks = {path: found.peak for path, found in facts.items() if found.depth == depth}
        if (highest := max(peaks.values(), default=1)) < PLAUSIBLE_PEAK:
            reason = f"of 16 bits, but no {depth} of the set exceeds {highest:.2%} of the range"
            refused += [Refused(reason, remedy, path) for path in peaks]
    return refused


def square_picture(path: Path, rendering: Rendering) -> UInt8[np.ndarray, "size size channels"]:
    """A square of a picture, upright (EXIF), in RGB or grey, over the background, resized without aliasing.

    The central one, one at a place that follows from the file's name, or with `crop` "none" the whole, squeezed.

    Raises:
      Unusable: as `opened`; all of it is transparent.
    """
    with opened(path) as picture:
        rgb = _upright(picture, rendering)
    side, filtering = (rendering.size, rendering.size), PIL.Image.Resampling.LANCZOS
    if rendering.crop == "none":
        square = rgb.resize(side, filtering)
    else:
        place = np.random.default_rng(zlib.crc32(os.fsencode(path.name))).random(2)
        centre = (0.5, 0.5) if rendering.crop == "centre" else tuple(place.tolist())
        square = PIL.ImageOps.fit(rgb, side, filtering, centering=centre)
    array = np.asarray(square.convert("L") if rendering.grey else square)
    return array.reshape(rendering.size, rendering.size, rendering.channels)


def _upright(picture, rendering) -> PIL.Image.Image:
    """The picture in RGB and over the background, turned as EXIF says."""
    factor = KEY_FACTORS.get(_decoder_arguments(picture)[0], 1)
    levels = _black_and_white(picture, rendering.levels)[1] if picture.mode in WIDE else None
    upright = PIL.ImageOps.exif_transpose(picture)
    key = upright.info.get("transparency")  # of palettes bytes or an index, otherwise a value or three
    if factor != 1 and key is not None:
        upright.info["transparency"] = tuple(int(v * factor) for v in key) if isinstance(key, tuple) else key * factor
    if levels:
        upright = _eight_bits(upright, *levels)
    if not upright.has_transparency_data:
        return upright.convert("RGB")
    layer = (upright.convert("LA") if upright.mode == "La" else upright).convert("RGBA")
    if layer.getchannel("A").getextrema()[1] == 0:
        raise Unusable("all of it is transparent")
    return PIL.Image.alpha_composite(PIL.Image.new("RGBA", layer.size, rendering.background), layer).convert("RGB")


def _eight_bits(picture, low, high) -> PIL.Image.Image:
    """A picture in a mode of `WIDE` in shades from black at `low` to white at `high`; its key becomes an alpha."""
    values = np.asarray(picture)
    shares = np.clip((values - float(low)) / (high - low), 0, 1)
    grey = PIL.Image.fromarray(np.rint(255 * shares).astype(np.uint8))
    if (key := picture.info.get("transparency")) is None:
        return grey
    return PIL.Image.merge("LA", [grey, PIL.Image.fromarray(np.uint8(255 * (values != key)))])
