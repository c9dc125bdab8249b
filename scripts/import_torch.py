"""Turns a PyTorch checkpoint into one of ours: weights, EMA and Adam's moments.

    python scripts/import_torch.py checkpoint_8.pth cifar10_1rf.safetensors --config configs/rf/cifar10_rf_continuous.py

Afterwards --config.training.import_flax=cifar10_1rf.safetensors starts from it, without torch installed. Exit status 2
and one line if the checkpoint is not what the configuration describes.
"""

import sys

import conversion


def main(arguments=None) -> int:
    """The script; returns its exit status."""
    parser = conversion.parser(__doc__)
    parser.add_argument("checkpoint", help="the file that torch.save wrote")
    parser.add_argument("out", help="the file to write")
    parser.add_argument("--config", required=True, help="the configuration file of the checkpoint's network")
    options = parser.parse_args(arguments)

    def convert(config):
        import checkpoints
        import models

        weights = models.import_torch(options.checkpoint, config)
        checkpoints.export_file(options.out, weights, config)
        print(f"wrote {options.out}: step {weights.step}, Adam after {weights.count} updates")

    return conversion.exit_status(convert, options.config)


if __name__ == "__main__":
    sys.exit(main())
