"""Makes the features and statistics of a data set that evaluations compare samples with, and says what was done.

    python -m scripts.reference_stats --config=configs/rf/cifar10_rf_continuous.py [--to=FILE.npz] [--split=train]
    python -m scripts.reference_stats --config=configs/rf/fashion_mnist_14_rf_continuous.py --floor

An evaluation makes the same by itself on first use; this does it beforehand, in the same cache, and prints the record:
data set and version, split, count, preprocessing, network, hash. With --to it also writes a file, for another machine,
that `--config.eval.reference=FILE.npz` reads; its `mu` and `sigma` are those that other programs know.

--floor prints the FID and KID of the test images to the training images in the same features: as many test images as an
evaluation's samples (`eval.num_samples`), or all if there are fewer; a data set without test images has the distance of
two halves of its training images. Evaluations write the same numbers into their metrics.json.
"""

import json
import sys
from typing import Any

from absl import app, flags
from ml_collections import config_flags


def make(config: Any, split: str, to: str | None) -> dict[str, Any]:
    """The record of the features and statistics of `split`, made or read from the cache; written to the file `to`.

    Raises:
      InputError: no such data set or split, or no feature network.
      OSError: `to` cannot be written.
    """
    import datasets
    from jobs.builders import data_options, reference_options
    from metrics import reference

    data, options = data_options(config), reference_options(config)
    network, source = reference.feature_network(data, options), datasets.image_source(data, split)
    real = reference.of_images(network, source, config.eval.batch_size, split=split, max_real=options.max_real)
    if to:
        reference.write_file(to, real)
    return real.record


def floor_lines(config: Any) -> list[str]:
    """What --floor prints.

    Raises:
      InputError: no such data set or feature network, or neither test images nor features of training images.
    """
    from jobs.builders import data_options, reference_options
    from metrics.floor import floor
    from metrics.reference import real_data
    from utils import InputError

    data, batch_size = data_options(config), config.eval.batch_size
    real = real_data(data, reference_options(config), batch_size)
    found = floor(real, data, batch_size, config.eval.num_samples)
    if found is None:
        raise InputError("neither test images nor features of training images are at hand")
    against = f"{found.reference_samples} training images, {real.network.name}"
    title = f"{found.samples} images ({found.images}) against {against}:"
    return [title, *(f"  {name}: {distance:.4g}" for name, distance in found.distances.items())]


def main(argv: list[str]) -> None:
    """The script."""
    import runtime
    from utils import InputError

    options = flags.FLAGS
    try:
        with runtime.terminal_logging():
            lines = floor_lines(options.config) if options.floor else [_record_text(options)]
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    print("\n".join(lines))
    if options.to and not options.floor:
        print(f"written to {options.to}; compare with it: --config.eval.reference={options.to}")


def _record_text(options: Any) -> str:
    return json.dumps(make(options.config, options.split, options.to), indent=1)


if __name__ == "__main__":
    import runtime

    runtime.set_environment()
    config_flags.DEFINE_config_file("config", None, "The configuration file.")
    flags.DEFINE_string("split", "train", "The images: train, or another split that the data set has.")
    flags.DEFINE_string("to", None, "A file to write.")
    flags.DEFINE_bool("floor", False, "Print the distances of the data set's test images instead.")
    flags.mark_flag_as_required("config")
    app.run(main)
