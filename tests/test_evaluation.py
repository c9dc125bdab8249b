"""Numbers of a sampler with weights, against direct solves and closed forms."""

import jax
import ml_collections
import numpy as np
import pytest
from exact_flows import (
    EULER,
    GAUSSIAN,
    ODE,
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
import features
import models
import sampler
import sampling
from utils import InputError


def random_features(n, d, seed):
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def test_distances_carry_the_name_of_their_network():
    real, fake = random_features(50, 6, 0), random_features(60, 6, 1)
    other = evaluation.feature_distances("digits_classifier", real, fake)
    assert set(other) == {f"{name}_digits_classifier" for name in ("fid", "kid", "kid_error")}
    plain = evaluation.feature_distances("inception", real, fake)
    assert plain == {name.removesuffix("_digits_classifier"): value for name, value in other.items()}
    assert plain["fid"] == evaluation.frechet_distance(real, fake)
    assert (plain["kid"], plain["kid_error"]) == evaluation.kernel_distance_and_error(real, fake)


def test_quality_compares_exactly_the_samples_and_counts_their_cost():
    tested = sampler_of(Gaussian(), EULER)
    seen = []

    def means(images):
        seen.append(images)
        return images.reshape(len(images), -1)[:, :3].astype(np.float32), np.zeros((len(images), 2), np.float32)

    real = features.DataFeatures(features.FeatureNetwork("means", "1", means), random_features(20, 3, 0))
    quality, shown = evaluation.sample_quality(tested, GAUSSIAN, 7, 4, real=real, centered=True)
    x = direct(tested, GAUSSIAN)(range(7)).x
    unit = np.clip((np.asarray(x) + 1) / 2, 0, 1)
    np.testing.assert_allclose(shown, unit[:4], atol=1e-5)
    np.testing.assert_allclose(np.concatenate(seen), 255 * unit, atol=0.51)
    fake = np.concatenate([means(images)[0] for images in tuple(seen)])  # `means` appends to `seen`
    assert quality["fid_means"] == evaluation.frechet_distance(real.features, fake)
    assert quality["is_means"] == pytest.approx(1)
    assert quality["nfe"] == 8


def test_the_floor_is_the_distance_of_test_images_in_the_same_features(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    splits = {name: rng.integers(0, 256, (n, 4, 4, 1), np.uint8) for name, n in (("train", 40), ("test", 30))}
    monkeypatch.setattr(datasets, "image_source", lambda data, split: datasets.ArraySource(split, splits[split]))

    def network(images):
        return images.reshape(len(images), -1)[:, :3].astype(np.float32), np.zeros((len(images), 2), np.float32)

    train = features.DataFeatures(features.FeatureNetwork("raw", "1", network), network(splits["train"])[0])
    for count in (30, 12):
        found, compared = evaluation.floor(train, ml_collections.ConfigDict(), 8, count, tmp_path)
        assert compared == count
        assert found == evaluation.feature_distances("raw", train.features, network(splits["test"][:count])[0])


# --- numbers of a sampler with weights --------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _any_model(monkeypatch):
    monkeypatch.setattr(models, "velocity_fn", velocity_fn)


@pytest.mark.parametrize("options", [EULER, ODE], ids=["euler", "ode"])
def test_trajectory_metrics_are_that_of_direct_solves(options):
    # 9 noises in batches of 4, two on each device: three whole batches.
    tested, measured = sampler_of(Gaussian(), options, UNEVEN), np.float32([1.0, 0.45, 0.0])
    metrics = evaluation.trajectory_metrics(tested, GAUSSIAN, measured, count=9, batch_size=4)
    solve, straightness = direct(tested, GAUSSIAN, save_trajectory=True), jax.jit(sampling.straightness)
    runs = [solve([n, n + 1]) for n in range(0, 12, 2)]
    each = [straightness(run.ts, run.xs, measured) for run in runs]
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
