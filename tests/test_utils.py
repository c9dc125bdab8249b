import errno

import numpy as np
import pytest

import utils


def test_atomic_path_leaves_the_old_file_or_the_whole_new_one(tmp_path):
    path = tmp_path / "a" / "file.txt"
    with utils.atomic_path(path) as temporary:
        temporary.write_text("first")
    full = OSError(errno.ENOSPC, "no space")

    def half_written():
        with utils.atomic_path(path) as temporary:
            temporary.write_text("half")
            raise full

    with pytest.raises(OSError, match="no space"):
        half_written()
    assert path.read_text() == "first"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("channels", [1, 3])
def test_image_grid_places_images_row_by_row(channels):
    images = np.arange(3, dtype=np.float32)[:, None, None, None] / 2 * np.ones((3, 4, 5, channels), np.float32)
    grid = utils.image_grid(images, padding=1)
    assert grid.shape == (2 * 5, 2 * 6, 3)
    assert grid.dtype == np.uint8
    assert grid[:4, :5].max() == 0
    assert np.all(grid[:4, 6:11] == 128)
    assert np.all(grid[5:9, :5] == 255)
