"""What fits nowhere else: the error that users see, atomic files, image grids."""

import contextlib
import math
import uuid

import numpy as np
from etils import epath
from jaxtyping import Float


class InputError(ValueError):
    """Something that the user gave cannot work. The message is one line that names it and the remedy."""


@contextlib.contextmanager
def atomic_path(path):
    """Yields a temporary path beside `path`; on success it is renamed to `path`, on failure removed.

    A reader sees the old file or the whole new one, never a part, and a full disk leaves nothing behind.
    """
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def image_grid(images: Float[np.ndarray, "n h w c"], padding: int = 1) -> np.ndarray:
    """One picture, [rows (h + padding), columns (w + padding), 3] uint8, of n images in [0, 1], nearly square."""
    n, h, w, c = images.shape
    columns = math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    grid = np.ones((rows * (h + padding), columns * (w + padding), c), np.float32)
    for place, image in enumerate(np.asarray(images, np.float32)):
        y, x = divmod(place, columns)
        y, x = y * (h + padding), x * (w + padding)
        grid[y : y + h, x : x + w] = image
    grid = np.broadcast_to(grid, (*grid.shape[:2], 3)) if c == 1 else grid
    return (np.clip(grid, 0, 1) * 255 + 0.5).astype(np.uint8)
