"""What scripts/own_images.sh does with a folder of pictures: python -m scripts.own_images FOLDER

Prints assignments for the shell, of what the environment does not give: SIZE (of the pictures), GREY, K (segments),
UPDATES (of the first flow), PAIRS, BATCH, TEST (share of test pictures), FEATURES (what is compared), LABELS.
"""

import os
import shlex
import statistics
import sys
from pathlib import Path

import jax

from scripts import pictures
from scripts.prepare_dataset import classes_of
from utils import InputError

LEAST = 8  # pictures: fewer leave nothing to compare with
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
    labels = len(classes_of(sides, folder))
    return {
        "SIZE": str(fitting[-1]),
        "GREY": "1" if modes <= set(GREY_MODES) else "",
        "K": "2",
        "UPDATES": str(20_000 if accelerator else 3_000),
        "PAIRS": str(16_384 if accelerator else 4_096),
        "BATCH": str(256 if accelerator else 64),
        "TEST": "0.1" if labels else "0",
        "FEATURES": "classifier" if labels else "pixels",
        "LABELS": str(labels),
    }


def main() -> int:
    """The script; returns its exit status: 0, or 2 after one line that says what is wrong with the folder."""
    try:
        found = choices(Path(sys.argv[1]), accelerator=jax.default_backend() != "cpu")
    except (InputError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    for name, value in found.items():
        print(f"{name}={shlex.quote(os.environ.get(name, value))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
