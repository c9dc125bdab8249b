"""How the PyTorch networks of the family name, order and lay out their weights.

All of it follows from the names in the Flax parameter tree, whatever the configuration.
"""

import dataclasses

import numpy as np

from models.factory import weight_shapes
from models.ncsnpp import NCSNpp

# PyTorch numbers parameters in the order they were made, which inside a module is this one.
PART_ORDER = (
    "GroupNorm_0", "Conv_0", "Conv2d_0", "Dense_0", "GroupNorm_1", "Conv_1", "Conv_2",
    "NIN_0", "NIN_1", "NIN_2", "NIN_3",
)  # fmt: skip
LEAF_ORDER = ("W", "weight", "b", "bias")
LEAF_NAMES = {"kernel": "weight", "scale": "weight", "head_kernel": "weight", "head_bias": "bias"}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One weight of a one-head network.

    Attributes:
      path: in the Flax parameter tree.
      flax_shape: its shape there.
      idle: nothing depends on it, so that PyTorch never has a gradient, nor Adam moments, for it.
    """

    path: tuple[str, ...]
    flax_shape: tuple[int, ...]
    idle: bool = False

    @property
    def leaf(self) -> str:
        """PyTorch's name of the weight inside its module."""
        return LEAF_NAMES.get(self.path[-1], self.path[-1])

    @property
    def name(self) -> str:
        """The key in PyTorch's state dict, without the `module.` prefix."""
        return ".".join([self.path[0].replace("all_modules_", "all_modules."), *self.path[1:-1], self.leaf])

    @property
    def order(self) -> tuple[int, int, int]:
        """Sorts entries into PyTorch's order."""
        part = PART_ORDER.index(self.path[1]) if len(self.path) == 3 else 0
        return int(self.path[0].removeprefix("all_modules_")), part, LEAF_ORDER.index(self.leaf)

    @property
    def trainable(self) -> bool:
        """False for the fixed Fourier frequencies, the only weight named W that is a module's own."""
        return len(self.path) == 3 or self.leaf != "W"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in PyTorch."""
        shape = self.flax_shape[1:] if self._headed else self.flax_shape
        return (shape[-1], shape[-2], *shape[:-2]) if self._is_kernel else shape

    @property
    def _headed(self) -> bool:
        return self.path[-1].startswith("head_")

    @property
    def _is_kernel(self) -> bool:
        return self.path[-1].endswith("kernel")

    def to_flax(self, array: np.ndarray) -> np.ndarray:
        """A copy in Flax's layout: [out, in, ...] becomes [..., in, out], time-embedding weights get a head axis."""
        if self._is_kernel:
            array = np.moveaxis(array, (0, 1), (-1, -2))
        return np.array(array[None] if self._headed else array, np.float32, order="C")

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `to_flax`, copied as well."""
        array = array[0] if self._headed else array
        if self._is_kernel:
            array = np.moveaxis(array, (-1, -2), (0, 1))
        return np.array(array, np.float32, order="C")


Entries = tuple[Entry, ...]


def entries_of(model: NCSNpp) -> Entries:
    """Every weight of `model`, taken with one head, in PyTorch's order. Shapes only: nothing is allocated."""
    entries = [
        Entry(path, shape, idle="Dense_0" in path and not model.conditional)
        for path, shape in weight_shapes(model.clone(heads=1)).items()
    ]
    return tuple(sorted(entries, key=lambda entry: entry.order))
