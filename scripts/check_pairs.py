"""Checks every byte of a pair set: python -m scripts.check_pairs FOLDER [--repair].

Prints a line for each file that is broken, cannot be read or is missing. --repair removes the broken ones, so that
gen_reflow makes them again. The exit status is 0 if the set is whole, or was broken and is repaired as far as this
script can; else 1; 2 if there is no set to check.
"""

import argparse
import sys

import numpy as np
import tqdm
from etils import epath

from pairs import manifest as pairmanifest
from pairs import npz, reader
from utils import InputError, os_errors


def check_file(folder: epath.Path, manifest: dict | None, number: int) -> None:
    """Reads the whole pair file `number` and holds it against the manifest, if there is one.

    Raises:
      InputError: it cannot be read.
      BrokenFile: it is not what was written.
    """
    with npz.PairFile(folder / npz.file_name(number)) as file:
        file.check_crc()
        if manifest and file.states is None:
            reader.segment_of_pairs(file, np.asarray(manifest["boundaries"], np.float32))
    if manifest:
        pairmanifest.check_file(folder, manifest, number)


def problems(folder: epath.Path, manifest: dict | None, numbers: list[int]) -> dict[int, InputError]:
    """What is wrong with each file that is there; nothing for those that are whole."""
    found = {}
    for number in tqdm.tqdm(numbers, unit="file", leave=False):
        try:
            check_file(folder, manifest, number)
        except InputError as error:
            found[number] = error
    return found


def main() -> int:
    """The script; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=epath.Path)
    parser.add_argument("--repair", action="store_true", help="remove broken files")
    arguments = parser.parse_args()
    folder = arguments.folder
    try:
        manifest, numbers = pairmanifest.read_manifest(folder), npz.pair_file_numbers(folder)
    except InputError as error:
        print(error)
        return 2
    if not numbers and not manifest:
        print(f"there are no pairs in {folder}")
        return 2
    found = problems(folder, manifest, numbers)
    broken = [number for number, error in found.items() if isinstance(error, npz.BrokenFile)]
    last = manifest["files"] if manifest else 0
    missing = last - sum(1 <= number <= last for number in numbers)
    for problem in found.values():
        print(problem)
    if (first := pairmanifest.first_missing(numbers, 1, last)) is not None:
        print(f"{folder / npz.file_name(first)} is missing, the first of {missing}; gen_reflow makes them")
    completed = manifest is None or manifest["complete"]
    if not completed:
        print(f"{folder} was not completed; gen_reflow does that")
    whole = completed and not found and not missing
    print(f"{len(numbers) - len(found)} files are whole, {len(found)} are not, {missing} are missing")
    if not (arguments.repair and broken):
        return 0 if whole else 1
    if manifest is None:
        print("nothing is removed: without a manifest no run of gen_reflow could make these files again")
        return 1
    try:
        with os_errors():
            pairmanifest.reopen_set(folder, broken)
    except OSError as error:
        print(f"{folder} cannot be changed: {error}; repair it where it can be written")
        return 1
    print(f"removed {len(broken)} broken files; run gen_reflow again, which makes them")
    return 0 if len(broken) == len(found) else 1


if __name__ == "__main__":
    sys.exit(main())
