"""Trajectory sets: the teacher's states of the same noise at all boundaries, for on-policy distillation.

`training.reflow_pairs=trajectory` makes them (docs/method.md, section 8), in files like those of a pair set.
"""

import functools
from typing import Any

import numpy as np
from etils import epath

from pairs import npz
from pairs.reader import FileSet, OpenFile, PairSet


class TrajectorySet(FileSet):
    """The trajectory set in a folder; see `FileSet`.

    Its batches are {"states": float32 [B, k + 1, H, W, C]}: states[:, 0] is the noise, states[:, i] the state of the
    teacher's ODE from there at boundary i.

    Args:
      folder: of the files, perhaps behind a symbolic link or on a read-only disk.
      partial: use the existing files of a set that is not complete.
      expect: entries that the manifest must have, such as {"k": 4, "teacher": "..."}.

    Raises:
      InputError: no trajectories, an incomplete or damaged set, or another one than expected.
    """

    reflow_pairs = "trajectory"

    def __init__(self, folder: epath.PathLike, partial: bool = False, expect: dict[str, Any] | None = None):
        super().__init__(folder, partial, expect)
        self.arrays = {"states": ((self.k + 1, *self.image_shape), np.float32)}

    def _opened(self, file: npz.PairFile, number: int) -> OpenFile:
        return OpenFile(file, {}, {"states": functools.partial(file.read_rows, "xs")})


def check_same_teacher(trajectories: TrajectorySet, pairs: PairSet) -> None:
    """Checks that pairs and trajectories can be used together: made by the same teacher, on the same segments.

    Raises:
      InputError: the first entry of the manifests that differs.
    """
    names = ("teacher", "boundaries", "image_shape", "centered")
    expect = {name: pairs.manifest[name] for name in names if name in pairs.manifest}
    trajectories.check_expected(expect, f"the pairs in {pairs.folder} with")
