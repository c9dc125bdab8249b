"""Prints the floor of a data set: the FID and KID of its test images to its training images, in the same features.

    python scripts/floor.py --config=configs/rf/fashion_mnist_14_rf_continuous.py [--config.data.data_dir=FOLDER]

Samples cannot be expected to come closer. The test images are as many as an evaluation's samples
(`eval.num_samples`), or all if there are fewer.
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
    import features
    import runtime
    from utils import InputError

    config = CONFIG.value
    data, batch_size = config.data, config.eval.batch_size
    try:
        with runtime.terminal_logging():
            real = features.data_features(data, config.eval.inception_path, batch_size)
            distances, count = evaluation.floor(real, data, batch_size, config.eval.num_samples)
    except InputError as error:
        sys.exit(f"error: {error}")
    print(f"{count} test images against {len(real.features)} training images, {real.network.name}:")
    for name, distance in distances.items():
        print(f"  {name}: {distance:.4g}")


if __name__ == "__main__":
    import runtime

    runtime.set_environment()
    app.run(main)
