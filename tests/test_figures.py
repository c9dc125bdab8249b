"""Figures are written as PNG files."""

import numpy as np
from matplotlib import image

import adaptive
import figures


def test_partition_is_drawn(tmp_path):
    states = np.cumsum(np.random.default_rng(0).normal(size=(51, 3, 4)), axis=0)
    partition = adaptive.best_partition(adaptive.squared_distances([states]), 3)
    figures.draw_partition(tmp_path / "partition.png", partition)
    assert image.imread(tmp_path / "partition.png").std() > 0.01
    assert [path.name for path in tmp_path.iterdir()] == ["partition.png"]
