"""Writes a folder of small colour pictures to try docs/your_own_images.md on: scikit-learn's digits, tinted.

python -m scripts.make_example_pictures FOLDER [--count 500]
"""

import argparse
import pathlib
import sys

SIDE = 16  # pixels: each of a digit's 8 x 8 becomes four


def main(arguments: list[str] | None = None) -> int:
    """The script; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--count", type=int, default=500, help="of pictures, at most 1797")
    options = parser.parse_args(arguments)
    import numpy as np
    from PIL import Image

    import datasets

    images, labels = datasets.digits()
    tints = np.random.default_rng(0).uniform(0.4, 1, (10, 3))  # a colour for each digit
    options.folder.mkdir(parents=True, exist_ok=True)
    for number, (image, label) in enumerate(zip(images[: options.count], labels, strict=False)):
        picture = Image.fromarray(np.uint8(image * tints[label]))
        picture = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        picture.save(options.folder / f"{number:04d}_of_{label}.png")
    print(f"wrote {min(options.count, len(images))} pictures of {SIDE} x {SIDE} into {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
