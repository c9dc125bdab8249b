"""What import_torch.py and export_torch.py share: reading a configuration file, and ending in one line."""

import argparse
import runpy
import sys
from pathlib import Path


def parser(description: str) -> argparse.ArgumentParser:
    """A command line that shows `description` as it is written."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def exit_status(job, config_file: str) -> int:
    """Runs job(config); 0, or 2 after one line that says what was wrong with the input."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from utils import InputError

    try:
        job(_config(config_file, InputError))
    except (InputError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _config(config_file: str, refusal):
    try:
        return runpy.run_path(config_file)["get_config"]()
    except Exception as error:  # it is a program: it can raise anything
        raise refusal(f"cannot read the configuration {config_file}: {error!r}") from error
