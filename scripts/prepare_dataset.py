"""Prepares TFDS data sets from files on this machine, without the network.

    python -m scripts.prepare_dataset fashion_mnist --from FOLDER [--to DATA_DIR]
    python -m scripts.prepare_dataset images --from FOLDER --to DATA_DIR --size 256

fashion_mnist: FOLDER holds the four gzipped IDX files of Fashion-MNIST (Debian: apt-get install dataset-fashion-mnist
puts them in /usr/share/datasets/fashion-mnist). The result is the data set fashion_mnist 3.0.1 of TFDS, records and
order included, so that `tfds.load` and `data.dataset='FASHION_MNIST'` read it.

images: FOLDER is searched recursively for pictures, through links too. Each becomes the central square of an RGB image,
resized without aliasing to SIZE x SIZE and stored as PNG; `data.dataset='IMAGES'` reads them. The records and their
order depend only on the pictures and their paths below FOLDER.
- Skipped, named and counted: hidden files and folders, what Pillow cannot read, pictures of less than half of SIZE.
- Refused, so that nothing is written: pictures that would be stored wrongly. Greys of more than 8 bits in which no
  depth is written (32-bit integers; floats beyond [0, 1]; 16 bits of which the set leaves the upper three quarters
  empty) need --levels=LOW,HIGH, the values of all such pictures that become black and white. PostScript, and pictures
  of more pixels than Pillow takes for harmless, must be converted or moved.
- Transparent pictures are laid over --background (white). Of several frames or pages the first is taken, and named.

- Where all pictures lie in two or more folders of FOLDER, those are their labels.
- --grey stores one channel; --test 0.1 makes a split 'test' of a tenth; --crop none stores whole pictures, squeezed,
  --crop random another square than the central one.

DATA_DIR is what `--config.data.data_dir` names (default: TFDS's own folder). Exit status 2 and one line on wrong input.
"""

import argparse
import collections
import dataclasses
import gzip
import itertools
import math
import os
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import absl.logging
import numpy as np
import PIL.ImageColor
from jaxtyping import UInt8

import datasets
import runtime
import utils
from scripts import pictures
from utils import InputError

SIDE = 28  # pixels of a Fashion-MNIST image
# In the order of the labels.
CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
IDX_UINT8 = 0x0800  # first half of an IDX file's magic number; the last byte is the number of dimensions


def read_idx(path: Path, dimensions: int) -> UInt8[np.ndarray, "..."]:
    """The array in a gzipped IDX file of unsigned bytes (big-endian: magic number, sizes, values).

    Raises:
      InputError: missing, not gzip, truncated, or not such a file.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:  # gzip.BadGzipFile is an OSError
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read {path}: {reason}") from None
    header = np.frombuffer(content[: 4 * (1 + dimensions)], ">u4") if len(content) >= 4 * (1 + dimensions) else [0]
    if header[0] != IDX_UINT8 + dimensions:
        raise InputError(f"{path} is not an IDX file of unsigned bytes with {dimensions} dimension(s)")
    shape, values = [int(size) for size in header[1:]], len(content) - 4 * (1 + dimensions)
    if values != np.prod(shape, dtype=object):
        raise InputError(f"{path} holds {values} values, but its header says {' x '.join(map(str, shape))}")
    return np.frombuffer(content, np.uint8, offset=4 * (1 + dimensions)).reshape(shape)


def fashion_mnist_split(folder: Path, prefix: str) -> list[tuple[int, dict]]:
    """(index, {"image", "label"}) of the files `prefix`-{images-idx3,labels-idx1}-ubyte.gz; prefix: train or t10k.

    Raises:
      InputError: as `read_idx`; or the two files do not fit together or to Fashion-MNIST.
    """
    images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz", 3)
    labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", 1)
    if images.shape != (len(labels), SIDE, SIDE) or not len(labels):
        raise InputError(
            f"{folder}: {prefix} has images {' x '.join(map(str, images.shape))} and {len(labels)} labels; "
            f"Fashion-MNIST has one label for each {SIDE} x {SIDE} image"
        )
    if labels.max() >= len(CLASSES):
        raise InputError(f"{folder}: {prefix} has a label {labels.max()}; Fashion-MNIST's are 0 to {len(CLASSES) - 1}")
    return [
        (index, {"image": image[..., None], "label": int(label)})
        for index, (image, label) in enumerate(zip(images, labels, strict=True))
    ]


def prepare_fashion_mnist(folder: Path, data_dir: str | None) -> str:
    """Writes the data set fashion_mnist 3.0.1, as TFDS's own preparation would; returns its folder.

    Raises:
      InputError: as `fashion_mnist_split`; the data set is already there.
    """
    import tensorflow_datasets as tfds

    splits = {"train": fashion_mnist_split(folder, "train"), "test": fashion_mnist_split(folder, "t10k")}
    features = tfds.features.FeaturesDict(
        {"image": tfds.features.Image(shape=(SIDE, SIDE, 1)), "label": tfds.features.ClassLabel(names=CLASSES)}
    )
    return str(_write("fashion_mnist", "3.0.1", features, splits, data_dir).data_dir)


def classes_of(paths: Iterable[Path], folder: Path) -> list[str]:
    """The names of the folders of `folder` if all pictures lie in two or more of them, sorted; else none."""
    parts = [path.relative_to(folder).parts for path in paths]
    names = sorted({pictures.printable(Path(first)) for first, *_ in parts})
    return names if len(names) > 1 and all(len(each) > 1 for each in parts) else []


def is_test(path: Path, folder: Path, share: float) -> bool:
    """Whether a picture is in the split 'test', which `share` of all are; it follows from its path alone."""
    return zlib.crc32(os.fsencode(path.relative_to(folder).as_posix())) < share * 2**32


def picture_records(
    paths: list[Path], folder: Path, rendering: pictures.Rendering, classes: list[str], skipped: list
) -> Iterator[tuple]:
    """(key, {"image"}, with "label" where there are classes) of every picture that can be decoded.

    The others are named on stderr and join `skipped`.
    """
    import tqdm

    for path in tqdm.tqdm(paths, "reading pictures", disable=None):
        try:
            image = pictures.square_picture(path, rendering)
        except pictures.Unusable as error:
            _say(f"skipped: {error}")
            skipped.append(error)
            continue
        place = path.relative_to(folder)
        label = {"label": classes.index(pictures.printable(Path(place.parts[0])))} if classes else {}
        yield pictures.record_key(place), {"image": image} | label


def survey(folder: Path, rendering: pictures.Rendering) -> tuple[dict[Path, pictures.Facts], list[pictures.Unusable]]:
    """(facts of every picture below `folder`, all that is skipped so far), after naming both kinds on stderr.

    Raises:
      InputError: a picture is refused; it is the first one, and they are counted.
    """
    import tqdm

    files, skipped = pictures.files_below(folder)
    facts: dict[Path, pictures.Facts] = {}
    refused: list[pictures.Unusable] = []
    for path in tqdm.tqdm(files, "checking pictures", disable=None):
        try:
            facts[path] = pictures.facts_of(path, rendering)
        except pictures.Unusable as error:
            (refused if isinstance(error, pictures.Refused) else skipped).append(error)
    refused += pictures.without_depth(facts)
    if refused:
        raise InputError(f"{refused[0]}" + (f" ({len(refused)} pictures are refused)" if len(refused) > 1 else ""))
    for left_out in skipped:
        _say(f"skipped: {left_out}")
    for path, found in facts.items():
        for line in pictures.notes(path, found):
            _say(f"note: {line}")
    return facts, skipped


def prepare_images(folder: Path, data_dir: str, rendering: pictures.Rendering, test_share: float = 0.0) -> str:
    """Writes the pictures of `folder` as the data set images 1.0.0 in `data_dir`; returns its folder and the counts.

    Args:
      test_share: of the pictures that become the split 'test'.

    Raises:
      InputError: as `survey`; no readable picture; the data set is already there.
    """
    _check_free("images", "1.0.0", Path(data_dir).expanduser())
    facts, skipped = survey(folder, rendering)
    classes, splits = classes_of(facts, folder), {}
    for name in ("train", "test") if test_share else ("train",):
        chosen = [path for path in facts if is_test(path, folder, test_share) == (name == "test")]
        records = picture_records(chosen, folder, rendering, classes, skipped)
        if (first := next(records, None)) is None:
            split = f" for the split {name!r}" if test_share else ""
            raise InputError(f"there is no readable picture in {folder}{split}; {_skipped_counts(skipped)}")
        splits[name] = itertools.chain([first], records)
    builder = _write("images", "1.0.0", _picture_features(rendering, classes), splits, data_dir)
    files = {name: builder.info.splits[name].filepaths for name in splits}
    digests = {name: datasets.digest_contents(written) for name, written in files.items()}
    utils.write_json(Path(builder.data_dir) / datasets.CONTENTS, digests)
    paths = {error.path for error in skipped}
    recorded = {path.relative_to(folder): found for path, found in facts.items() if path not in paths}
    labelled = [f"labels: {', '.join(classes)}"] if classes else []
    return "\n".join([str(builder.data_dir), _picture_counts(recorded), _skipped_counts(skipped), *labelled])


def _picture_features(rendering: pictures.Rendering, classes: list[str]):
    import tensorflow_datasets as tfds

    shape = (rendering.size, rendering.size, rendering.channels)
    image = {"image": tfds.features.Image(shape=shape, encoding_format="png")}
    label = {"label": tfds.features.ClassLabel(names=classes)} if classes else {}
    return tfds.features.FeaturesDict(image | label)


def _picture_counts(facts: dict[Path, pictures.Facts]) -> str:
    """A line: how many pictures were recorded, and how many of them otherwise than they are, each with an example."""
    kinds = {
        "smaller than --size and enlarged": lambda found: found.enlarged,
        "with transparency, laid over --background": lambda found: found.transparent,
        "the first of several frames": lambda found: found.frames > 1,
        "with values outside --levels": lambda found: found.clipped,
        "of more than 8 bits and dark": lambda found: found.peak < pictures.PLAUSIBLE_PEAK,
    }
    line = f"recorded {len(facts)}"
    for kind, applies in kinds.items():
        if paths := [path for path, found in facts.items() if applies(found)]:
            line += f", {len(paths)} {kind} (such as {pictures.printable(paths[0])})"
    return line


def _skipped_counts(skipped: list[pictures.Unusable]) -> str:
    """A line: how many files were skipped, by kind, and what would make pictures of them."""
    kinds = collections.Counter(error.kind for error in skipped)
    line = f"skipped {len(skipped)}" + "".join(f", {count} {kind}" for kind, count in sorted(kinds.items()))
    convert = "; save pictures in HEIC, JPEG XL, OpenEXR or a camera's raw format as PNG to have them recorded"
    return line + (convert if pictures.UNKNOWN in kinds else "")


def _say(line: str) -> None:
    """Writes a line to stderr, clear of progress bars."""
    import tqdm

    tqdm.tqdm.write(line, file=sys.stderr)


def _check_free(name, version, data_dir) -> None:
    """Raises InputError if the data set is already there."""
    if (data_dir / name / version).exists():
        raise InputError(f"{data_dir / name / version} exists; remove it to prepare the data set again")


def _write(name, version, features, splits, data_dir):
    """The builder of a new TFDS data set, written under another name until it is complete."""
    runtime.tensorflow_on_cpu()
    import tensorflow_datasets as tfds

    data_dir = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
    _check_free(name, version, data_dir)
    builder = tfds.dataset_builders.store_as_tfds_dataset(
        name=name, version=version, features=features, split_datasets=splits, data_dir=data_dir
    )
    return builder


def chosen_rendering(options: argparse.Namespace) -> pictures.Rendering:
    """How the options say that pictures become arrays.

    Raises:
      InputError: no size, colour or scale.
    """
    if options.size < 1:
        raise InputError(f"--size {options.size}: use at least 1")
    try:
        red, green, blue, alpha = (*PIL.ImageColor.getrgb(options.background), 255)[:4]
    except ValueError:
        alpha = 0
    if alpha != 255:
        raise InputError(f"--background {options.background}: use an opaque colour, by its name or as #rrggbb")
    rendering = pictures.Rendering(options.size, (red, green, blue), grey=options.grey, crop=options.crop)
    if options.levels is None:
        return rendering
    try:
        low, high = map(float, options.levels.split(","))
    except ValueError:
        low = high = math.nan
    if not (low < high and math.isfinite(high - low)):
        raise InputError(f"--levels {options.levels}: use two numbers, of which the first is lower, such as 0,4095")
    return dataclasses.replace(rendering, levels=(low, high))


def main(arguments: list[str] | None = None) -> int:
    """The script; returns its exit status: 0, or 2 after one line that says what was wrong with the input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = parser.add_subparsers(dest="job", required=True)
    fashion_mnist, images = jobs.add_parser("fashion_mnist"), jobs.add_parser("images")
    for job in (fashion_mnist, images):
        job.add_argument("--from", dest="folder", required=True, type=Path, help="folder to read")
        job.add_argument("--to", dest="data_dir", required=job is images, help="TFDS folder to write in")
    images.add_argument("--size", type=int, required=True, help="side of the stored images, in pixels")
    images.add_argument("--background", default="white", help="colour behind transparent pictures: a name or #rrggbb")
    images.add_argument("--levels", metavar="LOW,HIGH", help="values that are black and white in greys beyond 8 bits")
    images.add_argument("--grey", action="store_true", help="store grey pictures, of one channel")
    images.add_argument("--crop", choices=["centre", "none", "random"], default="centre")
    images.add_argument("--test", type=float, default=0.0, metavar="SHARE", help="share of the split 'test', 0 to 0.9")
    options = parser.parse_args(arguments)
    runtime.set_environment()
    absl.logging.set_verbosity(absl.logging.ERROR)  # TFDS warns that what it is about to write is not there yet
    try:
        if not options.folder.is_dir():
            raise InputError(f"{options.folder} is not a folder")
        if options.job == "images":
            if not 0 <= options.test <= 0.9:
                raise InputError(f"--test {options.test}: use a share from 0 to 0.9")
            rendering = chosen_rendering(options)
            written = prepare_images(options.folder, options.data_dir, rendering, options.test)
        else:
            written = prepare_fashion_mnist(options.folder, options.data_dir)
    except (InputError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"wrote {written}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
