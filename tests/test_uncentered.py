"""Every stage on images in [0, 1] (`data.centered=False`), held against what noise and digits are there."""

import json

import numpy as np
import PIL.Image
import pytest

import datasets
import reflow
import run_lib
import segments
from configs.rf.digits_rf_continuous import get_config
from evaluation import frechet_distance
from jobs import inputs
from metrics import feature_networks
from utils import InputError

# E min(max(n, 0), 1) for n ~ N(0, 1): how bright noise is when it is shown as an image in [0, 1].
BRIGHTNESS_OF_NOISE = 0.3156


def config(phase=2, mode="train_reflow", **sections):
    """A job of a tiny network on digits in [0, 1] that hardly learns: its samples stay noise."""
    config = get_config()
    config.data.centered = False
    config.model.update(rf_phase=phase, nf=4, ch_mult=(1,), attn_resolutions=())
    config.training.update(
        reflow_mode=mode,
        reflow_t=2,
        batch_size=64,
        n_iters=4,
        log_freq=2,
        snapshot_freq=4,
        snapshot_freq_for_preemption=4,
        n_reflow_data=1024,
        reflow_file_size=1024,
    )
    config.optim.lr = 1e-6
    config.eval.update(batch_size=256, num_samples=512, straightness_samples=8, begin_step=4)
    config.model.num_scales = 2
    config.sampling.update(method="ode" if mode == "gen_reflow" else "pc", tol=1e-2)
    for section, values in sections.items():
        config[section].update(values)
    return config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A workdir with a 1-RF, its pairs and a reflow; a distillation has the same inputs as the reflow."""
    workdir = tmp_path_factory.mktemp("run")
    run_lib.train(config(phase=1), workdir)
    for mode in ("gen_reflow", "train_reflow"):
        run_lib.train(config(mode=mode), workdir)
    return workdir


def digits():
    return datasets.digits()[0].astype(np.float64) / 255


def test_the_first_flow_learns_from_images_in_the_unit_range(workdir):
    lines = json.loads((workdir / "1_rf/metrics.json").read_text())
    # A network that is 0 everywhere has the loss E |data - noise|^2 = E data^2 + 1.
    assert lines[0]["loss"] == pytest.approx(1 + np.mean(digits() ** 2), abs=0.1)


def test_pairs_start_from_noised_images_in_the_unit_range(workdir):
    pairs = reflow.PairSet(workdir / inputs.PAIRS)
    assert pairs.manifest["centered"] is False
    batch = next(pairs.batches(1024, seed=0))
    tau = segments.tau_of_t(0.5)
    starts = {segment: batch["x1"][batch["index"] == segment] for segment in (0, 1)}
    assert starts[0].mean() == pytest.approx(0, abs=0.03)
    assert starts[1].mean() == pytest.approx(tau * digits().mean(), abs=0.03)
    assert np.mean(starts[1] ** 2) == pytest.approx(tau**2 * np.mean(digits() ** 2) + (1 - tau) ** 2, abs=0.03)


def test_reflow_learns_the_teachers_velocity(workdir):
    lines = json.loads((workdir / "2_rf" / "metrics.json").read_text())
    assert [line["step"] for line in lines] == [2, 4]
    # The student starts as the teacher, whose velocities are nearly 0 and so nearly straight.
    assert all(0 <= line["loss"] < 0.01 for line in lines)


def brightness(picture):
    """The mean over the 64 images, 8 x 8, of an enlarged grid with one pixel of padding."""
    grid = np.asarray(PIL.Image.open(picture).convert("L"), np.float64) / 255
    zoom = len(grid) // 72
    return grid[::zoom, ::zoom].reshape(8, 9, 8, 9)[:, :8, :, :8].mean()


@pytest.mark.parametrize("stage", ["1_rf", "2_rf"])
def test_snapshots_show_the_unit_range(workdir, stage):
    assert brightness(workdir / stage / "samples/step_4.png") == pytest.approx(BRIGHTNESS_OF_NOISE, abs=0.03)


def test_evaluation_measures_and_shows_the_unit_range(workdir):
    run_lib.evaluate(config(), workdir, "eval")
    folder = workdir / "eval" / "step_4"
    assert brightness(folder / "samples.png") == pytest.approx(BRIGHTNESS_OF_NOISE, abs=0.03)
    found = json.loads((folder / "metrics.json").read_text())["fid_digits_classifier"]
    network = feature_networks.label_classifier(datasets.DataOptions(**config().data))
    noise = np.random.default_rng(0).normal(size=(2048, 8, 8, 1))
    real = network.features_and_logits(datasets.digits()[0])[0]
    unit, centered = (
        frechet_distance(real, network.features_and_logits(np.rint(255 * np.clip(shown, 0, 1)).astype(np.uint8))[0])
        for shown in (noise, (noise + 1) / 2)
    )
    assert abs(unit - centered) > 0.1 * unit
    assert abs(found - unit) < 0.25 * abs(found - centered)


def test_pairs_in_one_range_do_not_train_a_network_of_the_other(workdir):
    with pytest.raises(InputError, match="centered"):
        run_lib.train(config(data={"centered": True}, training={"n_iters": 6}), workdir)
