"""Converts a PyTorch checkpoint to an exported file of SeqRF: weights, EMA and Adam's moments.

    python scripts/import_torch.py checkpoint_8.pth cifar10_1rf.safetensors --config configs/rf/cifar10_rf_continuous.py

Afterwards --config.training.import_flax=cifar10_1rf.safetensors starts from it, without torch installed. Exit status 2
and one line if the checkpoint is not what the configuration describes.
"""

import sys

import conversion


def main(arguments=None) -> int:
    """The script; returns its exit status."""

    def convert(config, checkpoint, out):
        import checkpoints
        import models

        weights = models.import_torch(checkpoint, config)
        checkpoints.export_file(out, weights, config)
        return weights

    return conversion.run(__doc__, "the file that torch.save wrote", convert, arguments)


if __name__ == "__main__":
    sys.exit(main())
