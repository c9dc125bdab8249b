"""What scripts/own_images.sh does with a folder of pictures: python -m scripts.own_images FOLDER

Prints assignments for the shell, of what the environment does not give: SIZE (of the pictures), GREY, K (segments),
UPDATES (of the first flow), PAIRS, BATCH, TEST (share of test pictures), FEATURES (what is compared).
"""

import os
import shlex
import statistics
import sys
from pathlib import Path

import jax

import distributed
from scripts import pictures
from scripts.prepare_dataset import classes_of, is_test
from utils import InputError

LEAST = 8  # pictures: fewer leave nothing to compare with
TEST, LEAST_TEST, LEAST_TRAIN = 0.1, 10, 100  # share and pictures, for a classifier of the labels
SIZES = (8, 16, 32)
GREY_MODES = ("1", "L", "LA", *pictures.WIDE)


def choices(folder: Path, *, accelerator: bool) -> dict[str, str]:
    """The settings by name.

    Args:
      accelerator: whether there is a GPU or a TPU: larger pictures and more updates.

    Raises:
      InputError: the folder holds too few pictures, or too small ones.
    """
    sides, modes = {}, set()
    for path in pictures.files_below(folder)[0]:
        try:
            with pictures.opened(path) as picture:
                sides[path] = min(picture.size)
                modes.add(picture.mode)
        except pictures.Unusable:
            continue
    if len(sides) < LEAST:
        raise InputError(f"{folder} has {len(sides)} pictures; {LEAST} are needed, and hundreds to learn from")
    side = statistics.median(sides.values())
    fitting = [size for size in SIZES if size <= side and (accelerator or size <= 16)]
    if not fitting:
        raise InputError(f"half of the pictures in {folder} are less than {SIZES[0]} pixels wide or high")
    size = fitting[-1]
    large = [path for path, shorter in sides.items() if 2 * shorter >= size]  # the others are left out
    test = sum(is_test(path, folder, TEST) for path in large)
    is_labelled = bool(classes_of(large, folder)) and test >= LEAST_TEST and len(large) - test >= LEAST_TRAIN
    return {
        "SIZE": str(size),
        "GREY": "1" if modes <= set(GREY_MODES) else "",
        "K": "2",
        "UPDATES": str(20_000 if accelerator else 3_000),
        "PAIRS": str(16_384 if accelerator else 4_096),
        "BATCH": str(256 if accelerator else 64),
        "TEST": str(TEST) if is_labelled else "0",
        "FEATURES": "classifier" if is_labelled else "pixels",
    }


def main() -> int:
    """The script; returns its exit status: 0, or 2 after one line that says what is wrong with the folder."""
    try:
        distributed.check_devices()
        found = choices(Path(sys.argv[1]), accelerator=jax.default_backend() != "cpu")
    except (InputError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    for name, value in found.items():
        print(f"{name}={shlex.quote(os.environ.get(name, value))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
