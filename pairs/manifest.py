"""manifest.json: what a pair set is, beside its files; who may write into the set, and when it is complete.

The first worker claims the folder by writing the manifest of its plan. Whoever finds all files there completes it with
the size and checksums of every file.
"""

import dataclasses
import itertools
import math
from typing import Any

from etils import epath

import datasets
import segments
import utils
from pairs import npz
from pairs.plan import DEFAULTS, FORMAT, PairPlan
from utils import InputError

MANIFEST = "manifest.json"
MOST_MANIFEST = 2**28  # bytes: a complete set of a million files has 160 MB
# The entries of a manifest and their types; those of `DEFAULTS` may be missing.
ENTRIES = {"format": int, "complete": bool, "k": int, "files": int} | {
    field.name: field.type for field in dataclasses.fields(PairPlan) if field.name != "folder"
}


def read_manifest(folder: epath.PathLike) -> dict[str, Any] | None:
    """The manifest of the set in `folder`; None where there is no manifest.

    Raises:
      InputError: the manifest is damaged, or cannot be read.
    """
    path = epath.Path(folder) / MANIFEST
    remedy = "restore a backup, or remove the whole set and generate it again"
    try:
        manifest = utils.read_json(path, Any, most=MOST_MANIFEST)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    except InputError as error:
        raise InputError(f"{error} ({remedy})") from error
    if manifest is None:
        return None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{path} is not the manifest of a pair set of format {FORMAT}; use another workdir")
    if invalid := _invalid_entry(manifest):
        raise InputError(f"{path} is damaged: {invalid}; {remedy}")
    return manifest


def _invalid_entry(manifest):
    """The first entry that is missing or invalid, in words; None if there is none."""
    for name, kind in ENTRIES.items():
        if name not in manifest | DEFAULTS:
            return f"it has no {name}"
        if name in manifest and not utils.has_type(manifest[name], kind):
            return f"its {name} is {manifest[name]!r}"
    pairs, file_size = manifest["pairs"], manifest["file_size"]
    valid = {
        "boundaries": _are_boundaries(manifest["boundaries"]),
        "k": manifest["k"] == len(manifest["boundaries"]) - 1,
        "image_shape": len(manifest["image_shape"]) == 3 and min(manifest["image_shape"]) > 0,
        "pairs": pairs > 0,
        "file_size": file_size > 0,
        "files": manifest["files"] == math.ceil(pairs / max(file_size, 1)),
        "dataset_size": manifest["dataset_size"] > 0,
        "dtype": manifest["dtype"] in ("float32", "float16"),
        "inverted_pairs": 0 <= manifest.get("inverted_pairs", 0) <= 1,
        "reflow_pairs": manifest.get("reflow_pairs", "segments") in ("segments", "trajectory"),
        "contents": _are_contents(manifest.get("contents", {})),
    }
    return next((f"its {name} cannot be {manifest[name]!r}" for name, is_valid in valid.items() if not is_valid), None)


def _are_boundaries(times):
    try:
        segments.validate_boundaries(times)
    except (ValueError, OverflowError):
        return False
    return True


def _are_contents(contents):
    return isinstance(contents, dict) and all(
        isinstance(entry, dict) and entry.keys() == {"bytes", "crc32"} for entry in contents.values()
    )


def value_of(manifest: dict[str, Any], name: str) -> Any:
    """An entry of the manifest; where an older manifest lacks it, its default; None where it has neither."""
    return manifest.get(name, DEFAULTS.get(name))


def begin_manifest(plan: PairPlan, extra: dict[str, Any] | None = None) -> dict[str, Any]:
    """The manifest of the planned set; written with the entries `extra` unless the folder has one that agrees.

    Raises:
      InputError: the folder holds another set; the message names the first entry that differs.
    """
    manifest = _read_or_write(plan, extra or {})
    for name, wanted in (DEFAULTS | plan.definition()).items():
        found = value_of(manifest, name)
        if not (datasets.same_data(found, wanted) if name == "dataset" else found == wanted):
            raise InputError(
                f"{plan.folder} holds pairs with {name} = {found}, but this run makes them with {wanted}; use the same "
                "settings, or another workdir"
            )
    return manifest


def claim_plan(plan: PairPlan, extra: dict[str, Any]) -> PairPlan:
    """The plan of the set in the folder: `plan`, or with the boundaries of the worker that was first.

    SeqRF-Ada's boundaries depend on the hardware in their last bits, and a set must have one kind: of workers that
    start at the same time the first decides, and the others take over its boundaries.

    Args:
      plan: of this worker.
      extra: as of `begin_manifest`; {"adaptive": True, ...} says that the boundaries are SeqRF-Ada's.

    Raises:
      InputError: the folder holds another set.
    """
    manifest = _read_or_write(plan, extra)
    if extra.get("adaptive") and manifest.get("adaptive") and manifest["k"] == plan.k:
        plan = dataclasses.replace(plan, boundaries=tuple(manifest["boundaries"]))
    begin_manifest(plan, extra)
    return plan


def _read_or_write(plan, extra):
    """The manifest in the folder; if there is none, this plan's is written, unless another worker is faster."""
    numbers = npz.pair_file_numbers(plan.folder)  # before the manifest, which another worker may be writing now
    manifest = read_manifest(plan.folder)
    if manifest is not None:
        return manifest
    if numbers:
        raise InputError(f"{plan.folder} holds pair files without a {MANIFEST}, another set; use another folder")
    utils.write_json(plan.folder / MANIFEST, {"complete": False} | plan.definition() | extra, overwrite=False)
    return read_manifest(plan.folder)


def first_missing(numbers: list[int], first: int, last: int) -> int | None:
    """The first number from `first` to `last` that is not among `numbers`; in as many steps as these are many."""
    return next(itertools.filterfalse(set(numbers).__contains__, range(first, last + 1)), None)


def missing_files(plan: PairPlan) -> list[int]:
    """The numbers of the planned files that do not exist."""
    existing = set(npz.pair_file_numbers(plan.folder))
    return [number for number in range(1, plan.files + 1) if number not in existing]


def check_file(folder: epath.Path, manifest: dict[str, Any], number: int) -> int:
    """The number of pairs in file `number`, whose size and structure are compared with the manifest.

    Raises:
      InputError: it is missing, cannot be read, or does not belong to the set.
      BrokenFile: it differs from the manifest.
    """
    with npz.PairFile(folder / npz.file_name(number)) as file:
        found = {"image_shape": list(file.image_shape), "store_noise": file.stores_noise}
        found["reflow_pairs"] = "segments" if file.states is None else "trajectory"
        if file.states is not None:
            found["k"] = file.states - 1
        wanted = {name: value_of(manifest, name) for name in found}
        if "file_size" in manifest:
            if not 1 <= number <= manifest["files"]:
                raise InputError(f"{file.path} does not belong to this set; remove it")
            found["pairs"] = file.count
            wanted["pairs"] = min(manifest["file_size"], manifest["pairs"] - (number - 1) * manifest["file_size"])
        found |= {"bytes": file.size, "crc32": file.crc32}
        wanted |= manifest.get("contents", {}).get(file.path.name, {})
        for name, value in wanted.items():
            if found[name] != value:
                raise file.broken(f"its {name} is {found[name]} where the manifest has {value}")
        return file.count


def reopen_set(folder: epath.PathLike, broken: list[int]) -> None:
    """Removes broken files and marks the set as not complete.

    In this order: after a kill between the two the files are missing, and are made again; the other way round they
    would be recorded as they are. What the manifest has recorded of the files that stay is kept, and they must agree
    with it when the set is completed again.
    """
    folder = epath.Path(folder)
    for number in broken:
        (folder / npz.file_name(number)).unlink(missing_ok=True)
    manifest: Any = read_manifest(folder)
    reopened = manifest | {"complete": False}
    if "contents" in manifest:
        names = set(map(npz.file_name, npz.pair_file_numbers(folder)))
        reopened["contents"] = {name: entry for name, entry in manifest["contents"].items() if name in names}
    if reopened != manifest:
        utils.write_json(folder / MANIFEST, reopened)


def complete_manifest(plan: PairPlan) -> bool:
    """Completes the manifest once every file exists; returns whether it is complete.

    It records the size and checksums of every file. Several hosts may do this at once: they write the same.

    Raises:
      BrokenFile: a file is damaged, or not the one that the manifest has recorded.
    """
    if missing_files(plan):
        return False
    manifest = begin_manifest(plan)
    contents = {}
    for number in range(1, plan.files + 1):
        with npz.PairFile(plan.path(number)) as file:
            contents[file.path.name] = found = {"bytes": file.size, "crc32": file.crc32}
            if manifest.get("contents", {}).get(file.path.name, found) != found:
                raise file.broken(f"its bytes and checksums are not those that {MANIFEST} has of it")
    completed = manifest | {"complete": True, "contents": contents}
    if completed != manifest:
        utils.write_json(plan.folder / MANIFEST, completed)
    return True
