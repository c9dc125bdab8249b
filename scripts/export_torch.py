"""Turns one of our checkpoints (k = 1) into PyTorch's format, with EMA and Adam's moments.

    python scripts/export_torch.py out.pth --checkpoint runs/cifar10/1_rf --config configs/rf/cifar10_rf_continuous.py

--checkpoint is a run's folder, one of its stages or checkpoints, or a file that import_torch.py wrote. Exit status 2
and one line if it is not what the configuration describes.
"""

import sys

import conversion


def main(arguments=None) -> int:
    """The script; returns its exit status."""
    parser = conversion.parser(__doc__)
    parser.add_argument("out", help="the file to write")
    parser.add_argument("--checkpoint", required=True, help="a run's folder, or an exported file")
    parser.add_argument("--config", required=True, help="the configuration file of the checkpoint's network")
    options = parser.parse_args(arguments)

    def convert(config):
        import checkpoints
        import models

        weights = checkpoints.load_weights(options.checkpoint, config)
        models.export_torch(weights, config, options.out)
        print(f"wrote {options.out}: step {weights.step}, Adam after {weights.count} updates")

    return conversion.exit_status(convert, options.config)


if __name__ == "__main__":
    sys.exit(main())
