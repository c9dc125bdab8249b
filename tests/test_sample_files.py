"""--mode=sample on a tiny network, against `sampler.load`, SciPy's arcs and NumPy's interpolation."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.spatial
from PIL import Image
from tiny_run import network_config, random_weights, restore

import models
import run_lib
import sampler
import train_step
from checkpointing import exported, runs
from checkpointing.metadata import make_metadata
from jobs import sample
from utils import InputError


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A workdir with one checkpoint of a 1-RF."""
    folder = tmp_path_factory.mktemp("run")
    config = network_config()
    adam = train_step.optimizer(lr=1e-3, beta1=0.9, eps=1e-8, warmup=5, grad_clip=1.0)
    state = train_step.initial_state(random_weights(config), adam, step=5)
    kept = runs.RunCheckpoints(folder / "1_rf")
    kept.save(state, make_metadata(models.create_model(config), "1_rf", [1, 0]), keep=True)
    kept.close()
    return folder


def sample_config(**changes):
    config = network_config()
    config.model.rf_phase = 1
    config.sampling.update(method="pc", predictor="rf_solver")
    config.model.num_scales = 3
    config.sample.update(count=6, batch_size=4, **changes)
    return config


@pytest.fixture(scope="module")
def folder(workdir):
    """Everything that --mode=sample writes."""
    config = sample_config(interpolate=True, trajectory=True, frames=5)
    run_lib.sample(config, workdir, "drawn")
    return workdir / "drawn"


def test_samples_are_those_of_the_exported_model_bit_for_bit(workdir, folder):
    weights, metadata = restore(workdir)
    exported.write_folder(workdir / "exported", weights, metadata)
    for path in (workdir, workdir / "exported"):
        model = sampler.load(path, batch_size=4)
        images = model.sample(6, seed=42, num_scales=3)
        np.testing.assert_array_equal(np.load(folder / "samples.npz")["images"], images)
        assert json.loads((folder / "samples.json").read_text())["nfe"] == model.nfe


def test_what_was_sampled_is_said(workdir, folder):
    said = json.loads((folder / "samples.json").read_text())
    assert (said["seed"], said["count"], said["step"], said["sampler"]) == (42, 6, 5, "Euler 3")
    assert said["sampling"]["predictor"] == "rf_solver"
    assert said["sampling"]["num_scales"] == said["nfe"] == 3
    assert said["seconds_per_1000"] > 0
    assert said["checkpoint"].endswith("1_rf/checkpoints/5")


def test_single_images_are_the_samples(folder):
    images = np.load(folder / "samples.npz")["images"]
    names = sorted(path.name for path in (folder / "images").iterdir())
    assert names == [f"{i:06d}.png" for i in range(6)]
    for image, name in zip(images, names, strict=True):
        np.testing.assert_allclose(
            np.asarray(Image.open(folder / "images" / name)) / 255, image[..., 0], atol=0.502 / 255
        )
    assert Image.open(folder / "samples.png").width > 200


def test_strips_lead_from_one_sample_to_the_next(folder):
    strips = np.load(folder / "interpolation.npz")["images"]
    images = np.load(folder / "samples.npz")["images"]
    assert strips.shape == (sample.STRIPS, 5, 8, 8, 1)
    for strip in range(3):  # of the six samples
        np.testing.assert_allclose(strips[strip, [0, -1]], images[2 * strip : 2 * strip + 2], atol=1e-5)
    assert np.abs(strips[:, 2] - strips[:, 0]).max() > 0.05
    assert Image.open(folder / "interpolation.png").size[0] > Image.open(folder / "interpolation.png").size[1] / 2


def test_trajectories_lead_from_the_noise_to_the_sample(workdir, folder):
    kept = np.load(folder / "trajectory.npz")
    images = np.load(folder / "samples.npz")["images"]
    noise = np.asarray(sampler.load(workdir).sampler(seed=42).noise(np.arange(6)))
    np.testing.assert_allclose(kept["t"], [1, 0.75, 0.5, 0.25, 0])
    np.testing.assert_allclose(kept["images"][0], np.clip((noise + 1) / 2, 0, 1), atol=1e-6)
    np.testing.assert_allclose(kept["images"][-1], images, atol=1e-5)
    with Image.open(folder / "trajectory.gif") as picture:
        assert picture.n_frames == 5
        assert picture.info["loop"] == 0


def test_single_images_of_an_earlier_run_are_removed(workdir):
    run_lib.sample(sample_config(), workdir, "again")
    (workdir / "again" / "images" / "000009.png").touch()
    (workdir / "again" / "images" / "holiday.png").touch()
    run_lib.sample(sample_config(), workdir, "again")
    left = sorted(path.name for path in (workdir / "again" / "images").iterdir())
    assert left == [*(f"{i:06d}.png" for i in range(6)), "holiday.png"]


def test_settings_that_cannot_work_are_refused(workdir, tmp_path):
    config = sample_config(frames=1)
    with pytest.raises(InputError, match=r"sample\.frames=1: it must be from 2"):
        run_lib.sample(config, workdir, "refused")
    with pytest.raises(InputError, match="no checkpoint to evaluate"):
        run_lib.sample(sample_config(), tmp_path, "refused")
    for folder in ("samples", "2_rf/new", "2_distill_4", f"../{workdir.name}/1_rf", str(workdir / "1_rf")):
        with pytest.raises(InputError, match=rf"--eval_folder={folder}: other jobs write into"):
            run_lib.sample(sample_config(), workdir, folder)


def test_arcs_between_noises_are_scipys():
    a, b = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 2, 3, 1)), jnp.float32)
    share = jnp.array([0, 0.3, 1])
    found = np.asarray(sample.spherical(a, b, share))
    for i in range(3):
        unit = [np.float64(x[i]).ravel() / np.linalg.norm(np.float64(x[i])) for x in (a, b)]
        ends = (jnp.asarray(x.reshape(1, 2, 3, 1), jnp.float32) for x in unit)
        expected = scipy.spatial.geometric_slerp(*unit, [float(share[i])])[0]
        np.testing.assert_allclose(sample.spherical(*ends, share[i : i + 1]).ravel(), expected, atol=1e-5)
    np.testing.assert_array_equal(found[0], a[0])
    np.testing.assert_allclose(found[2], b[2], atol=1e-6)


def test_states_between_saved_ones_are_numpys():
    random = np.random.default_rng(0)
    ts = np.float32([1, 0.8, 0.5, 0.1, 0])
    xs = random.normal(size=(5, 2, 1, 2, 1)).astype(np.float32)
    times = np.array([1, 0.9, 0.5, 0.05, 0.0])
    expected = [np.interp(-times, -ts, column) for column in xs.reshape(5, -1).T]
    np.testing.assert_allclose(sample.states_at(ts, xs, times).reshape(5, -1), np.transpose(expected), atol=1e-6)
