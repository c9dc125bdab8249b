"""What import_torch.py and export_torch.py share: CHECKPOINT OUT --config FILE, and an end in one line."""

import argparse
import runpy
import sys
from pathlib import Path


def run(description: str, checkpoint: str, convert, arguments=None) -> int:
    """Converts what the command line names by convert(config, checkpoint, out) -> `models.Weights`.

    Args:
      description: shown by --help as it is written.
      checkpoint: what the first argument is.
      arguments: of the command line; None: this program's.

    Returns:
      The exit status: 0, or 2 after one line that says what was wrong with the input.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help=checkpoint)
    parser.add_argument("out", help="the file to write")
    parser.add_argument("--config", required=True, help="the configuration file of the checkpoint's network")
    options = parser.parse_args(arguments)
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from utils import InputError

    try:
        weights = convert(_config(options.config, InputError), options.checkpoint, options.out)
    except (InputError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"wrote {options.out}: step {weights.step}, Adam after {weights.count} updates")
    return 0


def _config(config_file: str, refusal):
    try:
        return runpy.run_path(config_file)["get_config"]()
    except Exception as error:  # it is a program: it can raise anything
        raise refusal(f"cannot read the configuration {config_file}: {error!r}") from error
