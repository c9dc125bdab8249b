"""What the pictures show, read back from their PNG files."""

import numpy as np
import pytest
from matplotlib import image
from PIL import Image

import adaptive
from report import plots as report_plots
from tracking import plots


def drawn(path):
    """The picture, the only file in its folder, as [height, width, channels]."""
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    pixels = image.imread(path)
    assert pixels.std() > 0.01
    return pixels


@pytest.mark.parametrize("channels", [1, 3])
def test_image_grid_places_images_row_by_row(channels):
    images = np.arange(3, dtype=np.float32)[:, None, None, None] / 2 * np.ones((3, 4, 5, channels), np.float32)
    grid = plots.image_grid(images, padding=1)
    assert grid.shape == (2 * 5, 2 * 6, 3)
    assert grid.dtype == np.uint8
    assert grid[:4, :5].max() == 0
    assert np.all(grid[:4, 6:11] == 128)
    assert np.all(grid[5:9, :5] == 255)


def test_small_images_are_enlarged_without_blur(tmp_path):
    images = np.random.default_rng(0).random((4, 8, 8, 1), np.float32)
    plots.draw_images(tmp_path / "grid.png", images)
    shown = np.asarray(Image.open(tmp_path / "grid.png"))
    grid = plots.image_grid(images)
    zoom = shown.shape[0] // grid.shape[0]
    assert zoom == 512 // 18
    np.testing.assert_array_equal(shown, np.repeat(np.repeat(grid, zoom, axis=0), zoom, axis=1))


def test_curves_are_labelled_with_their_integrals(tmp_path, monkeypatch):
    labels = []
    save = plots.save_figure
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: (labels.extend(figure.axes), save(figure, path)))
    ts, curve = np.float32([1, 0.5, 0.2, 0]), np.float32([1, 2, 4])
    plots.draw_straightness(tmp_path / "straightness.png", ts, {"straightness": curve}, np.float32([1, 0.5, 0]))
    assert [text.get_text() for text in labels[0].get_legend().get_texts()] == ["straightness: 1.9"]
    drawn(tmp_path / "straightness.png")


def test_trajectories_show_their_states_from_noise_to_data(tmp_path, monkeypatch):
    axes = []
    save = plots.save_figure
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: (axes.extend(figure.axes), save(figure, path)))
    ts = np.linspace(1, 0, 20, dtype=np.float32)
    xs = np.broadcast_to(ts[:, None, None, None, None], (20, 3, 4, 4, 1))
    plots.draw_trajectories(tmp_path / "trajectory.png", ts, xs, lambda x: x, count=2)
    tiles = axes[0].images[0].get_array()
    assert tiles.shape == (2 * 5, 10 * 5, 3)
    np.testing.assert_allclose(tiles[0, ::5, 0], ts[np.linspace(0, 19, 10).astype(int)], atol=0.01)
    assert len(axes[1].lines) == 2
    drawn(tmp_path / "trajectory.png")


def test_pairs_have_a_row_for_each_segment(tmp_path):
    x = np.random.default_rng(0).random((12, 4, 4, 1), np.float32)
    segment = np.repeat(np.arange(3), 4)
    plots.draw_pairs(tmp_path / "pairs.png", x, x, segment, (1.0, 0.6, 0.3, 0.0), lambda x: x)
    height, width, _ = drawn(tmp_path / "pairs.png").shape
    assert height == pytest.approx(width * 12 / 8, rel=0.01)


def test_losses_and_distances_are_drawn(tmp_path):
    for name in ("loss", "quality"):
        (tmp_path / name).mkdir()
    plots.draw_loss(tmp_path / "loss" / "loss.png", [1, 2, 3], [0.5, 0.3, None])
    drawn(tmp_path / "loss" / "loss.png")
    curves = {"1-RF $\\frac$": ([1, 2], [3.0, 1.0]), "ODE": ([30], [0.5])}  # dollars are no formula
    report_plots.draw_quality(tmp_path / "quality" / "fid.png", curves, "fid", floor=0.3)
    drawn(tmp_path / "quality" / "fid.png")


def test_histories_and_straightness_of_several_models_are_drawn(tmp_path, monkeypatch):
    axes = []
    save = plots.save_figure
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: (axes.extend(figure.axes), save(figure, path)))
    for name in ("history", "curve"):
        (tmp_path / name).mkdir()
    histories = {"1_rf": [{"step": 1, "loss": 0.5}, {"step": 2, "loss": None}, {"step": 3}], "2_rf": [{"step": 1}]}
    report_plots.draw_history(tmp_path / "history" / "loss.png", histories, "loss")
    drawn(tmp_path / "history" / "loss.png")
    assert [line.get_label() for line in axes[0].lines] == ["1_rf"]
    np.testing.assert_array_equal(axes[0].lines[0].get_ydata(), [0.5, np.nan])
    models = {"1-RF": {"ts": np.array([1, 0.5, 0.2, 0]), "curve": np.array([1, 2, 4.0])}}
    report_plots.draw_straightness_of_models(tmp_path / "curve" / "curve.png", models, "curve")
    drawn(tmp_path / "curve" / "curve.png")
    assert [text.get_text() for text in axes[1].get_legend().get_texts()] == ["1-RF: 1.9"]


def test_partition_is_drawn(tmp_path):
    states = np.cumsum(np.random.default_rng(0).normal(size=(51, 3, 4)), axis=0)
    partition = adaptive.best_partition(adaptive.squared_distances([states]), 3)
    plots.draw_partition(tmp_path / "partition.png", partition)
    drawn(tmp_path / "partition.png")
