"""Numbers of a sampler with weights, against direct solves and closed forms."""

import dataclasses
import functools
import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import xla
from etils import epath
from exact_flows import (
    EULER,
    GAUSSIAN,
    ODE,
    SHAPE,
    UNEVEN,
    Explosive,
    Gaussian,
    direct,
    exact_end,
    sampler_of,
    velocity_fn,
)

import datasets
import evaluation
import models
import sampler
from metrics import distances, feature_networks, reference
from metrics.floor import floor
from metrics.straightness import straightness
from utils import InputError

DATA = datasets.DataOptions("digits", 8, 1)


def random_features(n, d, seed):
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def of_features(name, pool):
    return reference.of_features(feature_networks.FeatureNetwork(name, "1", raw_pixels), pool)


def test_distances_carry_the_name_of_their_network():
    real, fake = random_features(50, 6, 0), random_features(60, 6, 1)
    other = reference.feature_distances(of_features("digits_classifier", real), fake)
    assert set(other) == {f"{name}_digits_classifier" for name in ("fid", "kid", "kid_error")}
    plain = reference.feature_distances(of_features("inception", real), fake)
    assert plain == {name.removesuffix("_digits_classifier"): value for name, value in other.items()}
    assert plain["fid"] == evaluation.frechet_distance(real, fake)
    assert (plain["kid"], plain["kid_error"]) == distances.kernel_distance_and_error(real, fake)
    moments_alone = dataclasses.replace(of_features("inception", real), features=None)
    assert reference.feature_distances(moments_alone, fake) == {"fid": plain["fid"]}
    with pytest.raises(ValueError, match="6 and 5 features"):
        reference.feature_distances(moments_alone, fake[:, :5])


def raw_pixels(images):
    """A network on the host: the first three pixels and two constant classes."""
    return images.reshape(len(images), -1)[:, :3].astype(np.float32), np.zeros((len(images), 2), np.float32)


def raw_pixels_on_devices(images):
    return images.reshape(len(images), -1)[:, :3].astype(jax.numpy.float32), jax.numpy.zeros((len(images), 2))


@pytest.mark.parametrize("where", ["host", "devices"])
def test_quality_compares_exactly_the_samples_and_counts_their_cost(where):
    tested = sampler_of(Gaussian(), EULER)
    seen = []

    def network(images):
        seen.append(images)
        return raw_pixels(images)

    if where == "host":
        real = reference.of_features(feature_networks.FeatureNetwork("raw", "1", network), random_features(20, 3, 0))
    else:
        on_devices = feature_networks.device_network("raw", "1", raw_pixels_on_devices, "none")
        real = reference.of_features(on_devices, random_features(20, 3, 0))
    quality, shown = evaluation.sample_quality(tested, GAUSSIAN, 7, 4, real=real, centered=True)
    unit = np.clip((np.asarray(direct(tested, GAUSSIAN)(range(7)).x) + 1) / 2, 0, 1)
    levels = (255 * unit + np.float32(0.5)).astype(np.uint8)  # as a saved image has them
    np.testing.assert_array_equal(np.rint(255 * shown), levels)
    if where == "host":
        assert {images.dtype for images in seen} == {np.dtype(np.uint8)}
        np.testing.assert_array_equal(np.concatenate(seen)[:7], levels)
    fake = raw_pixels(levels)[0]
    assert quality["fid_raw"] == pytest.approx(evaluation.frechet_distance(real.features, fake), rel=1e-9)
    assert quality["kid_raw"] == pytest.approx(evaluation.kernel_distance(real.features, fake), rel=1e-9)
    assert quality["is_raw"] == pytest.approx(1)
    assert quality["nfe"] == 8


@pytest.mark.parametrize("batch_size", [2, 5, 8, 64])
def test_samples_are_counted_once_whatever_the_batch(batch_size):
    network = feature_networks.device_network("raw", "1", raw_pixels_on_devices, "none")
    tested = sampler_of(Gaussian(), EULER)
    draw = functools.partial(evaluation.draw_samples, tested, GAUSSIAN, network=network, centered=True)
    samples, whole = draw(13, batch_size, kept_images=5), draw(13, 26)
    np.testing.assert_array_equal(samples.features, whole.features)
    assert (samples.features.shape, samples.logits.shape, samples.images.shape) == ((13, 3), (13, 2), (5, *SHAPE))
    np.testing.assert_array_equal(raw_pixels(whole.images)[0], whole.features)


def splits_of(monkeypatch, **counts):
    """Makes `datasets.image_source` that of random images with these splits; also returns them."""
    rng = np.random.default_rng(0)
    splits = {name: rng.integers(0, 256, (n, *SHAPE), np.uint8) for name, n in counts.items()}

    def image_source(data, split="train"):
        if split not in splits:
            raise InputError(split)
        return datasets.ArraySource(split, splits[split])

    monkeypatch.setattr(datasets, "image_source", image_source)
    return splits


def test_the_floor_is_the_distance_of_test_images_in_the_same_features_and_kept(tmp_path, monkeypatch):
    splits = splits_of(monkeypatch, train=40, test=30)
    network = feature_networks.FeatureNetwork("raw", "1", raw_pixels)
    real = reference.of_images(network, datasets.image_source(None), 8, cache_dir=tmp_path)
    for count in (30, 12):
        found = floor(real, DATA, 8, count, tmp_path)
        assert (found.images, found.samples, found.reference_samples) == ("test", count, 40)
        expected = reference.feature_distances(real, raw_pixels(splits["test"][:count])[0])
        assert found.distances == expected
        assert found.metrics() == {f"floor_{name}": value for name, value in expected.items()} | {
            "floor_samples": count,
            "floor_reference_samples": 40,
        }
    monkeypatch.setattr(reference, "feature_distances", None)  # not computed again, by another process either
    again = reference.of_images(network, datasets.image_source(None), 8, cache_dir=tmp_path)
    assert floor(again, DATA, 8, 12, tmp_path) == found


def test_without_test_images_the_floor_is_of_two_halves(tmp_path, monkeypatch):
    splits = splits_of(monkeypatch, train=41)
    network = feature_networks.FeatureNetwork("raw", "1", raw_pixels)
    real = reference.of_images(network, datasets.image_source(None), 8, cache_dir=tmp_path)
    found = floor(real, DATA, 8, None, tmp_path)
    assert (found.images, found.samples, found.reference_samples) == ("halves", 20, 21)
    order = np.random.default_rng(0).permutation(41)
    first, second = (raw_pixels(splits["train"][rows])[0] for rows in (order[:21], order[21:]))
    assert found.distances["fid_raw"] == pytest.approx(evaluation.frechet_distance(first, second), rel=1e-9)
    assert found.distances["kid_raw"] == pytest.approx(evaluation.kernel_distance(first, second), rel=1e-9)
    moments_alone = dataclasses.replace(real, features=None)
    assert floor(moments_alone, DATA, 8, None, tmp_path) is None


def test_an_evaluation_finds_the_nearest_training_images_and_draws_them(tmp_path, monkeypatch):
    train = splits_of(monkeypatch, train=30)["train"]
    tested = sampler_of(Gaussian(), EULER)
    network = feature_networks.FeatureNetwork("raw", "1", raw_pixels)
    levels = evaluation.draw_samples(tested, GAUSSIAN, 6, 4, network=network, centered=True).images
    train[17] = levels[3]  # a memorised one
    real = reference.of_images(network, datasets.image_source(None), 8, cache_dir=tmp_path)
    protocol = evaluation.Protocol(
        num_samples=6,
        straightness_samples=2,
        batch_size=4,
        boundaries=np.float32([1, 0]),
        centered=True,
        precision_recall_samples=5,
        nearest_samples=5,
    )
    found = evaluation.evaluate_checkpoint(tested, GAUSSIAN, protocol, real, epath.Path(tmp_path / "step"), {})
    flat, others = (x.reshape(len(x), -1).astype(float) for x in (levels[:5], train))
    apart = np.sqrt(((flat[:, None] - others) ** 2).mean(-1)) / 255
    assert found["nearest_pixels"] == pytest.approx(apart.min(1).mean(), rel=1e-6)
    assert found["nearest_pixels_min"] == pytest.approx(0, abs=1e-6)
    apart = np.linalg.norm(flat[:, None, :3] - others[:, :3], axis=-1)
    assert found["nearest_features_raw"] == pytest.approx(apart.min(1).mean(), rel=1e-6)
    expected = evaluation.precision_recall(
        real.features[np.arange(5) * 30 // 5], raw_pixels(levels)[0][np.arange(5) * 6 // 5]
    )
    assert (found["precision_raw"], found["recall_raw"]) == expected
    assert (tmp_path / "step" / "nearest.png").stat().st_size > 1000
    assert "fid_tfgan" not in found
    judged = dataclasses.replace(real, network=dataclasses.replace(network, name="inception"))
    found = evaluation.evaluate_checkpoint(tested, GAUSSIAN, protocol, judged, epath.Path(tmp_path / "step"), {})
    assert found["fid_tfgan"] == pytest.approx(found["fid"], rel=1e-3)
    assert found["is_tfgan"] == pytest.approx(found["is"], rel=1e-3)
    pairs = evaluation._nearest(real, dataclasses.replace(samples_of(levels), features=raw_pixels(levels)[0]), 6)
    assert pairs["pixels"].images[3] == pairs["features"].images[3] == 17


def samples_of(levels):
    return evaluation.DrawnSamples(
        raw_pixels(levels)[0], np.zeros((len(levels), 2), np.float32), levels, sampler.Cost()
    )


# --- numbers of a sampler with weights --------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _any_model(monkeypatch):
    monkeypatch.setattr(models, "velocity_fn", velocity_fn)


@pytest.mark.parametrize("options", [EULER, ODE], ids=["euler", "ode"])
def test_trajectory_metrics_are_that_of_direct_solves(options):
    # 9 noises in batches of 4, two on each device: three whole batches.
    tested, measured = sampler_of(Gaussian(), options, UNEVEN), np.float32([1.0, 0.45, 0.0])
    metrics = evaluation.trajectory_metrics(tested, GAUSSIAN, measured, count=9, batch_size=4)
    solve, measure = direct(tested, GAUSSIAN, save_trajectory=True), jax.jit(straightness)
    runs = [solve([n, n + 1]) for n in range(0, 12, 2)]
    each = [measure(run.ts, run.xs, measured) for run in runs]
    assert metrics.straightness == pytest.approx(np.mean([one.total for one in each]), rel=1e-4)
    assert metrics.sequential_straightness == pytest.approx(np.mean([one.sequential for one in each]), rel=1e-4)
    np.testing.assert_allclose(metrics.curve, np.mean([one.curve for one in each], axis=0), rtol=2e-3, atol=1e-5)
    sequential = np.mean([one.sequential_curve for one in each], axis=0)
    np.testing.assert_allclose(metrics.sequential_curve, sequential, rtol=2e-3, atol=1e-5)
    np.testing.assert_array_equal(metrics.ts, runs[0].ts)


def test_trajectory_metrics_in_small_pieces_of_memory_are_the_same(monkeypatch):
    tested = sampler_of(Gaussian(), EULER, UNEVEN)
    whole = evaluation.trajectory_metrics(tested, GAUSSIAN, UNEVEN, count=8, batch_size=8)
    monkeypatch.setattr(sampler, "TRAJECTORY_BYTES", 1)
    pieces = evaluation.trajectory_metrics(tested, GAUSSIAN, UNEVEN, count=8, batch_size=8)
    assert pieces.straightness == pytest.approx(whole.straightness, rel=1e-5)


@pytest.mark.parametrize("options", [EULER, ODE], ids=["euler", "ode"])
def test_truncation_error_is_the_distance_to_the_closed_form(options):
    tested = sampler_of(Gaussian(), options, UNEVEN)
    reference = evaluation.reference_samples(tested, GAUSSIAN, 9, 4)
    error = evaluation.rms_to_reference(tested, GAUSSIAN, reference, batch_size=4)
    runs = [direct(tested, GAUSSIAN)([n, n + 1]).x for n in range(0, 10, 2)]
    ends = exact_end(tested.noise(np.arange(10)))
    assert error == pytest.approx(np.sqrt(np.mean((np.concatenate(runs) - ends)[:9] ** 2)), rel=1e-3, abs=5e-6)
    assert error > (1e-2 if options is EULER else 0)


def test_rms_to_a_teacher_is_that_of_the_same_noises_in_closed_form():
    teacher_params = {"mean": GAUSSIAN["mean"] + np.float32(0.5), "spread": GAUSSIAN["spread"] * np.float32(1.2)}
    student, teacher = sampler_of(Gaussian(), ODE | {"tol": 1e-5}, UNEVEN), sampler_of(Gaussian(), EULER)
    reference = evaluation.reference_samples(teacher, teacher_params, 6, 4)
    found = evaluation.rms_to_reference(student, GAUSSIAN, reference, batch_size=4)
    z = student.noise(np.arange(6))
    expected = np.sqrt(np.mean((exact_end(z) - exact_end(z, teacher_params)) ** 2))
    assert found == pytest.approx(expected, rel=1e-3)


def test_a_reference_solve_out_of_reach_is_an_error_with_the_remedy():
    tested = sampler_of(Explosive(), EULER | {"num_scales": 1})
    with pytest.raises(InputError, match=r"not finite with .*1e-06.*use a checkpoint that was trained longer"):
        evaluation.reference_samples(tested, {}, 2, 2)


def evaluated(folder, hosts, devices):
    """Runs tests/shared_evaluation.py in `hosts` processes of `devices` devices each; the metrics of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    script = pathlib.Path(__file__).with_name("shared_evaluation.py")
    environment = os.environ | {"XLA_FLAGS": xla.flags(devices), "PYTHONPATH": str(script.parents[1])}
    several = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(hosts)} if hosts > 1 else {}
    started = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder)],
            env=environment | several | ({"JAX_PROCESS_ID": str(index)} if several else {}),
        )
        for index in range(hosts)
    ]
    assert [process.wait(timeout=600) for process in started] == [0] * hosts
    return [json.loads((folder / f"metrics_{place}.json").read_text()) for place in range(hosts)]


def test_two_hosts_measure_what_one_measures_each_its_share(tmp_path):
    alone, *_ = evaluated(tmp_path / "one", 1, 2)
    first, second = evaluated(tmp_path / "two", 2, 1)
    assert first == second
    assert first.keys() == alone.keys()
    assert alone["own_images"] == 24  # whole batches of 8
    assert first["own_images"] == 12
    timed = ("seconds_per_1000", "own_images")
    for name, value in alone.items():
        if name not in timed:
            assert first[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    saved = [np.load(tmp_path / path) for path in ("one/samples_0.npz", "two/samples_0.npz", "two/samples_1.npz")]
    for other in saved[1:]:
        np.testing.assert_array_equal(other["images"], saved[0]["images"])
        np.testing.assert_allclose(other["features"], saved[0]["features"], atol=1e-6)
    assert {path.name for path in (tmp_path / "two/host_0").iterdir()} >= {
        "samples.png",
        "nearest.png",
        "straightness.npz",
    }
    assert not (tmp_path / "two/host_1").exists()  # the first one draws
