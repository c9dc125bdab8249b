"""Prepares TFDS data sets from files on this machine, without the network.

    python -m scripts.prepare_dataset fashion_mnist --from FOLDER [--to DATA_DIR]
    python -m scripts.prepare_dataset images --from FOLDER --to DATA_DIR --size 256

fashion_mnist: FOLDER holds the four gzipped IDX files of Fashion-MNIST (Debian: apt-get install dataset-fashion-mnist
puts them in /usr/share/datasets/fashion-mnist). The result is the data set fashion_mnist 3.0.1 of TFDS, records and
order included, so that `tfds.load` and `data.dataset='FASHION_MNIST'` read it.

images: FOLDER is searched recursively for pictures. Each becomes the central square of an RGB image, resized without
aliasing to SIZE x SIZE and stored as PNG; `data.dataset='IMAGES'` reads them. The records and their order depend only
on the pictures and their paths below FOLDER. Files that are not readable pictures are named and skipped.

DATA_DIR is what `--config.data.data_dir` names (default: TFDS's own folder). Exit status 2 and one line on wrong input.
"""

import argparse
import gzip
import itertools
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import absl.logging
import numpy as np
from jaxtyping import UInt8

import runtime
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
    return _write("fashion_mnist", "3.0.1", features, splits, data_dir)


def square_picture(path: Path, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The central square of a picture, upright (EXIF), RGB, resized without aliasing.

    Raises:
      InputError: the file is not a readable picture.
    """
    import PIL.Image
    import PIL.ImageOps

    try:
        with PIL.Image.open(path) as picture:
            upright = PIL.ImageOps.exif_transpose(picture).convert("RGB")
    except Exception as error:  # the decoders of many formats raise what they like
        raise InputError(f"{path}: {' '.join(str(error).split()) or type(error).__name__}") from None
    return np.asarray(PIL.ImageOps.fit(upright, (size, size), PIL.Image.Resampling.LANCZOS))


def picture_records(folder: Path, size: int) -> Iterator[tuple[str, dict]]:
    """(path below `folder`, {"image"}) of every readable picture, sorted; the others are named on stderr."""
    import PIL.Image
    import tqdm

    suffixes = PIL.Image.registered_extensions()
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
    for path in tqdm.tqdm(paths, "reading pictures", disable=None):
        try:
            image = square_picture(path, size)
        except InputError as error:
            tqdm.tqdm.write(f"skipped: {error}", file=sys.stderr)  # clears TFDS's progress bars first
            continue
        yield path.relative_to(folder).as_posix(), {"image": image}


def prepare_images(folder: Path, data_dir: str, size: int) -> str:
    """Writes the pictures of `folder` as the data set images 1.0.0 in `data_dir`; returns its folder.

    Raises:
      InputError: no readable picture; the data set is already there.
    """
    import tensorflow_datasets as tfds

    records = picture_records(folder, size)
    first = next(records, None)
    if first is None:
        raise InputError(f"there is no readable picture in {folder}")
    features = tfds.features.FeaturesDict({"image": tfds.features.Image(shape=(size, size, 3), encoding_format="png")})
    return _write("images", "1.0.0", features, {"train": itertools.chain([first], records)}, data_dir)


def _write(name, version, features, splits, data_dir) -> str:
    """Writes a TFDS data set, under another name until it is complete."""
    runtime.tensorflow_on_cpu()
    import tensorflow_datasets as tfds

    data_dir = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
    if (data_dir / name / version).exists():
        raise InputError(f"{data_dir / name / version} exists; remove it to prepare the data set again")
    builder = tfds.dataset_builders.store_as_tfds_dataset(
        name=name, version=version, features=features, split_datasets=splits, data_dir=data_dir
    )
    return str(builder.data_dir)


def main(arguments: list[str] | None = None) -> int:
    """The script; returns its exit status: 0, or 2 after one line that says what was wrong with the input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = parser.add_subparsers(dest="job", required=True)
    fashion_mnist, images = jobs.add_parser("fashion_mnist"), jobs.add_parser("images")
    for job in (fashion_mnist, images):
        job.add_argument("--from", dest="folder", required=True, type=Path, help="folder to read")
        job.add_argument("--to", dest="data_dir", required=job is images, help="TFDS folder to write in")
    images.add_argument("--size", type=int, required=True, help="side of the stored images, in pixels")
    options = parser.parse_args(arguments)
    runtime.set_environment()
    absl.logging.set_verbosity(absl.logging.ERROR)  # TFDS warns that what it is about to write is not there yet
    try:
        if not options.folder.is_dir():
            raise InputError(f"{options.folder} is not a folder")
        if options.job == "images":
            if options.size < 1:
                raise InputError(f"--size {options.size}: use at least 1")
            written = prepare_images(options.folder, options.data_dir, options.size)
        else:
            written = prepare_fashion_mnist(options.folder, options.data_dir)
    except (InputError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"wrote {written}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
