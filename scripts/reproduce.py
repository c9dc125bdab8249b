"""Measures a figure again and compares: python -m scripts.reproduce EVAL_FOLDER/step_STEP/metrics.json

Runs what the file's entry "provenance" says in a fresh folder: the checkpoint, the settings, on as many devices. On the
same kind of machine with the same code and libraries every figure is the same to the last bit; where one is not, what
differs between then and now is listed, and the exit status is 1. It is 2, with one line, where nothing can be measured.
Time is not compared.
"""

import argparse
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import utils

NOT_FIGURES = ("step", "seconds_per_1000", "provenance", "settings")
COMPARED = (
    "commit", "dirty", "versions", "xla_flags", "device", "devices", "processes", "cpu", "weights", "pairs", "network",
)  # fmt: skip
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


def main() -> int:
    """The script; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metrics", type=utils.local_path, help="the metrics.json of a measured checkpoint")
    parser.add_argument("--to", type=utils.local_path, help="the folder to measure in; default: a new temporary one")
    parser.add_argument("--checkpoint", help="where the checkpoint is now, if it was moved")
    options = parser.parse_args()
    try:
        entry, again, folder = _measure(options)
    except utils.InputError as error:
        return _fail(error)
    except Exception as error:
        if (cause := utils.disk_error(error)) is None:
            raise
        return _fail(f"{cause.filename or options.metrics}: {cause.strerror}")
    return report(entry, again, folder)


def _fail(reason: Any) -> int:
    print(f"error: {' '.join(str(reason).split())}", file=sys.stderr)
    return 2


def _measure(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any], Path]:
    """(the entry, the one of now, the folder it is in). Raises InputError where nothing can be measured."""
    import runtime

    entry = utils.valid_json(options.metrics, Any, {})
    if not _is_recorded(entry):
        raise utils.InputError(
            f"{options.metrics} has no complete 'provenance' record: not an evaluation, or written by an older version"
        )
    folder = (options.to or Path(tempfile.mkdtemp(prefix="seqrf-reproduce-"))).absolute()
    if any(folder.glob("step_*")):  # which would not be measured again
        raise utils.InputError(f"{folder} holds results already; give --to a new folder")
    checkpoint = options.checkpoint and os.fspath(utils.absolute(options.checkpoint))
    _as_many_devices(entry["provenance"])
    runtime.set_environment(deterministic=DETERMINISTIC in str(entry["provenance"].get("xla_flags")))
    with runtime.terminal_logging():
        again = measure_again(entry, folder, checkpoint)
    if not again:
        raise utils.InputError(
            f"{checkpoint or 'the checkpoint'} is not of update {entry['step']}, as the figures are; give --checkpoint "
            f"RUN/STAGE/checkpoints/{entry['step']} (what was measured is in {folder})"
        )
    return entry, again, folder


def _is_recorded(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(record := entry.get("provenance"), dict):
        return False
    given = entry.get("step"), entry.get("settings"), record.get("config"), record.get("workdir"), record.get("folder")
    return all(isinstance(one, kind) for one, kind in zip(given, (int, dict, dict, str, str), strict=True))


def _as_many_devices(record: dict[str, Any]) -> None:
    """On a CPU as many virtual devices as then, unless XLA_FLAGS says otherwise: a batch is shared by the devices."""
    if record.get("device") == "cpu" and isinstance(devices := record.get("devices"), int) and 1 < devices <= 64:
        os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count={devices}")


def measure_again(entry: dict[str, Any], folder: Path, checkpoint: str | None) -> dict[str, Any]:
    """What metrics.json holds when the checkpoint of `entry` is evaluated again, into `folder`.

    Raises:
      InputError: the entry's settings, or what they name, cannot be read.
    """
    from etils import epath

    import run_lib
    from configs.saved import config_from

    record = entry["provenance"]
    config = config_from(record["config"])
    config.eval.update(begin_step=entry["step"], end_step=entry["step"], interval_step=1)
    if checkpoint:
        kind = "import_torch" if checkpoint.endswith((".pth", ".pt")) else "import_flax"
        config.training.update({"import_torch": "none", "import_flax": "none", kind: checkpoint})
    os.environ.setdefault("WANDB_MODE", "disabled")
    if os.path.isdir(record["folder"]):
        os.chdir(record["folder"])  # relative paths in the settings are meant from there
    workdir = epath.Path(record["workdir"])
    workdir = workdir if workdir.is_dir() else epath.Path(folder)  # on another machine
    run_lib.evaluate(config, workdir, os.fspath(folder))
    return utils.read_json(folder / f"step_{entry['step']}" / "metrics.json", dict[str, Any], {})


def report(before: dict[str, Any], again: dict[str, Any], folder: Path) -> int:
    """Prints every figure of both evaluations and, where one differs, what differs between them; the exit status."""
    from tracking import provenance

    names = [name for name in before if name not in NOT_FIGURES and isinstance(before[name], int | float | str)]
    differing = [name for name in names if before[name] != again.get(name)]
    for name in names:
        print(f"{name:34} {before[name]!s:24} {again.get(name)!s:24} {'DIFFERS' if name in differing else 'equal'}")
    print(f"\n{len(names) - len(differing)} of {len(names)} figures are equal to the last bit; measured in {folder}")
    recorded = [name for name in COMPARED if name in before["provenance"]]  # an older record lacks some
    then, now = ({name: entry["provenance"].get(name) for name in recorded} for entry in (before, again))
    changed = provenance.differences(then, now) | provenance.differences(before["settings"], again["settings"])
    for name, (first, second) in changed.items():
        print(f"  {name}: then {_short(first)}, now {_short(second)}")
    if differing and not changed:
        print("  no recorded difference explains this: the computation is nondeterministic, please report it")
    return int(bool(differing))


def _short(value: Any) -> str:
    return re.sub(r"\s+", " ", str(value))[:120]


if __name__ == "__main__":
    sys.exit(main())
