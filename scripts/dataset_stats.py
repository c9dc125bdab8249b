"""Makes the features and statistics of a data set that evaluations compare samples with, and says what was done.

    python scripts/dataset_stats.py --config=configs/rf/cifar10_rf_continuous.py [--to=FILE.npz] [--split=train]

An evaluation makes the same by itself on first use; this does it beforehand, in the same cache, and prints the record:
data set and version, split, count, preprocessing, network, hash. With --to it also writes a file, for another machine,
that `--config.eval.reference=FILE.npz` reads; its `mu` and `sigma` are those that other programs know.
"""

import json
import sys
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

CONFIG = config_flags.DEFINE_config_file("config", None, "The configuration file.")
SPLIT = flags.DEFINE_string("split", "train", "The images: train, or another split that the data set has.")
TO = flags.DEFINE_string("to", None, "A file to write.")


def main(argv: list[str]) -> None:
    """The script."""
    import datasets
    import real_data
    import run_lib
    import runtime
    from utils import InputError

    config = CONFIG.value
    options = run_lib.real_data_options(config)
    try:
        with runtime.terminal_logging():
            network = real_data.feature_network(config.data, options)
            source = datasets.image_source(config.data, SPLIT.value)
            size, limit = config.eval.batch_size, options.max_real
            real = real_data.of_images(network, source, size, split=SPLIT.value, max_real=limit)
            if TO.value:
                real_data.write_file(TO.value, real)
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    print(json.dumps(real.record, indent=1))
    if TO.value:
        print(f"written to {TO.value}; compare with it: --config.eval.reference={TO.value}")


if __name__ == "__main__":
    import runtime

    runtime.set_environment()
    flags.mark_flag_as_required("config")
    app.run(main)
