"""Converts a checkpoint of SeqRF (k = 1) to PyTorch's format, with EMA and Adam's moments.

    python scripts/export_torch.py runs/cifar10/1_rf out.pth --config configs/rf/cifar10_rf_continuous.py

The checkpoint is a run's folder, one of its stages or checkpoints, or a file that import_torch.py wrote. Exit status 2
and one line if it is not what the configuration describes.
"""

import sys

import conversion


def main(arguments=None) -> int:
    """The script; returns its exit status."""

    def convert(config, checkpoint, out):
        import checkpoints
        import models

        # With as many heads as it has: PyTorch's format has room for one, which is what a refusal should say.
        config.training.reflow_t = checkpoints.read_metadata(checkpoint)["k"]
        weights = checkpoints.load_weights(checkpoint, config)
        models.export_torch(weights, config, out)
        return weights

    return conversion.run(__doc__, "a run's folder, one of its stages or checkpoints, or a file", convert, arguments)


if __name__ == "__main__":
    sys.exit(main())
