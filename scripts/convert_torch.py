"""Converts between PyTorch checkpoints (.pth, .pt) and SeqRF's, with EMA and Adam's moments, by what OUT is called.

    python -m scripts.convert_torch checkpoint_8.pth cifar10_1rf.safetensors \
        --config configs/rf/cifar10_rf_continuous.py
    python -m scripts.convert_torch runs/cifar10/1_rf out.pth --config configs/rf/cifar10_rf_continuous.py

The first needs torch once; afterwards --config.training.import_flax=cifar10_1rf.safetensors starts from it without. The
second takes a run's folder, one of its stages or checkpoints, or an exported file, of k = 1. Exit status 2 and one line
if the checkpoint is not what the configuration describes.

A public one-step model (2-RF, distilled) was trained for the whole step z + v, Euler here takes z + 0.999 v
(docs/method.md, section 10).
"""

import argparse
import runpy
import sys
from typing import Any

TORCH_SUFFIXES = (".pth", ".pt")


def from_torch(config: Any, checkpoint: str, out: str) -> Any:
    """Writes the PyTorch file `checkpoint` as the exported file `out`; the `models.Weights` written."""
    import models
    from checkpointing import exported
    from checkpointing.metadata import make_metadata

    weights = models.import_torch(checkpoint, config)
    exported.write_file(out, weights, make_metadata(models.create_model(config), "exported", [1.0, 0.0]))
    return weights


def to_torch(config: Any, checkpoint: str, out: str) -> Any:
    """Writes SeqRF's `checkpoint` as the PyTorch file `out`; the `models.Weights` written."""
    import models
    from checkpointing.checkpoint import checkpoint_at

    source = checkpoint_at(checkpoint)
    # With as many heads as it has: PyTorch's format has room for one, which is what a refusal should say.
    weights = source.load(models.create_model(config).clone(heads=source.k))
    models.export_torch(weights, config, out)
    return weights


def main(arguments: list[str] | None = None) -> int:
    """The script; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="the file that torch.save wrote, or a run, a checkpoint, an exported file")
    parser.add_argument("out", help="the file to write: .pth or .pt for PyTorch's format, else an exported file")
    parser.add_argument("--config", required=True, help="the configuration file of the checkpoint's network")
    options = parser.parse_args(arguments)
    from utils import InputError

    convert = to_torch if options.out.endswith(TORCH_SUFFIXES) else from_torch
    try:
        weights = convert(_config(options.config), options.checkpoint, options.out)
    except (InputError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"wrote {options.out}: step {weights.step}, Adam after {weights.count} updates")
    return 0


def _config(config_file: str) -> Any:
    from utils import InputError

    try:
        return runpy.run_path(config_file)["get_config"]()
    except Exception as error:  # it is a program: it can raise anything
        raise InputError(f"cannot read the configuration {config_file}: {error!r}") from error


if __name__ == "__main__":
    sys.exit(main())
