"""Makes the features and statistics of a data set that evaluations compare samples with, and says what was done.

    python scripts/dataset_stats.py --config=configs/rf/cifar10_rf_continuous.py [--to=FILE.npz] [--split=train]

An evaluation makes the same by itself on first use; this does it beforehand, in the same cache, and prints the record:
data set and version, split, count, preprocessing, network, hash. With --to it also writes a file, for another machine,
that `--config.eval.reference=FILE.npz` reads; its `mu` and `sigma` are those that other programs know.
"""

import json
import sys
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import config_flags

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def make(config: Any, split: str, to: str | None) -> dict[str, Any]:
    """The record of the features and statistics of `split`, made or read from the cache; written to the file `to`.

    Raises:
      InputError: no such data set or split, or no feature network.
      OSError: `to` cannot be written.
    """
    import datasets
    import real_data
    from jobs.parts import real_data_options

    options = real_data_options(config)
    network, source = real_data.feature_network(config.data, options), datasets.image_source(config.data, split)
    real = real_data.of_images(network, source, config.eval.batch_size, split=split, max_real=options.max_real)
    if to:
        real_data.write_file(to, real)
    return real.record


def main(argv: list[str]) -> None:
    """The script."""
    import runtime
    from utils import InputError

    options = flags.FLAGS
    try:
        with runtime.terminal_logging():
            record = make(options.config, options.split, options.to)
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    print(json.dumps(record, indent=1))
    if options.to:
        print(f"written to {options.to}; compare with it: --config.eval.reference={options.to}")


if __name__ == "__main__":
    import runtime

    runtime.set_environment()
    config_flags.DEFINE_config_file("config", None, "The configuration file.")
    flags.DEFINE_string("split", "train", "The images: train, or another split that the data set has.")
    flags.DEFINE_string("to", None, "A file to write.")
    flags.mark_flag_as_required("config")
    app.run(main)
