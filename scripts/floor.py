"""Prints the floor of a data set: the FID and KID of its test images to its training images, in the same features.

    python scripts/floor.py --config=configs/rf/fashion_mnist_14_rf_continuous.py [--config.data.data_dir=FOLDER]

Samples cannot be expected to come closer. The test images are as many as an evaluation's samples
(`eval.num_samples`), or all if there are fewer; a data set without test images has the distance of two halves of its
training images. Evaluations write the same numbers into their metrics.json.
"""

import sys
from pathlib import Path

from absl import app
from ml_collections import config_flags

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

CONFIG = config_flags.DEFINE_config_file("config", None, "The configuration file.")


def main(argv: list[str]) -> None:
    """The script: one line for each distance."""
    import evaluation
    import runtime
    from jobs.parts import real_data_of
    from utils import InputError

    config = CONFIG.value
    try:
        with runtime.terminal_logging():
            real = real_data_of(config)
            floor = evaluation.floor(real, config.data, config.eval.batch_size, config.eval.num_samples)
    except InputError as error:
        sys.exit(f"error: {error}")
    if floor is None:
        sys.exit("error: neither test images nor features of training images are at hand")
    against = f"{floor.reference_samples} training images, {real.network.name}"
    print(f"{floor.samples} images ({floor.images}) against {against}:")
    for name, distance in floor.distances.items():
        print(f"  {name}: {distance:.4g}")


if __name__ == "__main__":
    import runtime

    runtime.set_environment()
    app.run(main)
