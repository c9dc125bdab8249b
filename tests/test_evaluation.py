"""Distances against independent formulae; straightness and errors against direct solves and closed forms."""

import math
import time

import jax
import ml_collections
import numpy as np
import pytest
import scipy.linalg
import tensorflow as tf
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
from sklearn.metrics import pairwise_distances
from sklearn.neighbors import NearestNeighbors

import datasets
import evaluation
import features
import models
import sampler
import sampling
from tfgan_compat import tensorflow_gan
from utils import InputError


def random_features(n, d, seed, shift=0.0):
    """Correlated features of about unit size."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(d).normal(size=(d, d)) / math.sqrt(d)
    return (rng.normal(size=(n, d)) @ mix + shift).astype(np.float32)


def frechet_by_scipy(a, b):
    root = scipy.linalg.sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False)).real
    spread = np.cov(a, rowvar=False) + np.cov(b, rowvar=False) - 2 * root
    return np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(spread)


def test_frechet_distance_is_scipys():
    a, b = random_features(400, 12, 0), random_features(300, 12, 1, shift=0.3)
    assert evaluation.frechet_distance(a, b) == pytest.approx(frechet_by_scipy(a, b), rel=1e-6)


def test_frechet_distance_of_a_shift_and_of_a_set_with_itself():
    a = random_features(500, 5, 0)
    assert isinstance(evaluation.frechet_distance(a, a), float)
    assert evaluation.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert evaluation.frechet_distance(a, a + np.float32(0.5)) == pytest.approx(5 * 0.25, rel=1e-4)


def test_frechet_distance_with_fewer_samples_than_features():
    a, b = random_features(10, 30, 0), random_features(12, 30, 1)
    assert evaluation.frechet_distance(a, b) == pytest.approx(frechet_by_scipy(a, b), rel=1e-4)


def test_frechet_distance_is_fast():
    a, b = random_features(5000, 64, 0), random_features(5000, 64, 1)
    evaluation.frechet_distance(a, b)
    start = time.process_time()
    evaluation.frechet_distance(a, b)
    assert time.process_time() - start < 1


def mmd_by_loops(a, b):
    """The unbiased estimator as it is defined, one pair of samples after another."""
    a, b = a.astype(np.float64), b.astype(np.float64)

    def kernel(x, y):
        return (np.dot(x, y) / len(x) + 1) ** 3

    def within(x):
        return np.mean([kernel(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j])

    return within(a) + within(b) - 2 * np.mean([kernel(x, y) for x in a for y in b])


def jackknife_by_loops(a, b):
    """The standard error from the estimates without each sample in turn."""
    without_a = [mmd_by_loops(np.delete(a, i, axis=0), b) for i in range(len(a))]
    without_b = [mmd_by_loops(a, np.delete(b, i, axis=0)) for i in range(len(b))]
    return math.sqrt((len(a) - 1) * np.var(without_a) + (len(b) - 1) * np.var(without_b))


@pytest.mark.parametrize("block", [7, 256])
def test_kernel_distance_and_its_error_are_those_of_all_pairs(block, monkeypatch):
    monkeypatch.setattr(evaluation, "BLOCK", block)
    a, b = random_features(30, 8, 0), random_features(24, 8, 1, shift=0.2)
    distance, error = evaluation.kernel_distance_and_error(a, b)
    assert distance == pytest.approx(mmd_by_loops(a, b), rel=1e-10)
    assert error == pytest.approx(jackknife_by_loops(a, b), rel=1e-8)
    assert evaluation.kernel_distance(a, b) == distance


def test_kernel_distance_is_tf_gans_of_one_block():
    a, b = random_features(700, 16, 0), random_features(500, 16, 1, shift=0.2)
    metric = tensorflow_gan().eval.kernel_classifier_distance_from_activations
    single = float(metric(*map(tf.constant, (a.astype(np.float64), b.astype(np.float64))), max_block_size=1000))
    assert evaluation.kernel_distance(a, b) == pytest.approx(single, rel=1e-9)


def test_kernel_distance_is_unbiased_and_its_error_covers_the_truth():
    # With one feature the kernel is sum_j C(3, j) x^j y^j, so the distance is sum_j C(3, j) (difference of E x^j)^2.
    rng = np.random.default_rng(0)
    moments = [np.array([0, 1 / 3, 0]), np.array([0.4, 1 / 3 + 0.16, 0.4 + 0.064])]  # U(-1, 1), and moved by 0.4
    truth = np.sum(np.array([3, 3, 1]) * (moments[0] - moments[1]) ** 2)
    draws = [(rng.uniform(-1, 1, (60, 1)), rng.uniform(-0.6, 1.4, (90, 1))) for _ in range(300)]
    found, errors = np.transpose([evaluation.kernel_distance_and_error(a, b) for a, b in draws])
    assert abs(found.mean() - truth) < 3 * found.std() / math.sqrt(300)
    assert errors.mean() == pytest.approx(found.std(), rel=0.15)
    assert 0.92 <= np.mean(np.abs(found - truth) < 1.96 * errors) <= 0.98
    same = [(rng.uniform(-1, 1, (60, 1)), rng.uniform(-1, 1, (90, 1))) for _ in range(300)]
    found, errors = np.transpose([evaluation.kernel_distance_and_error(a, b) for a, b in same])
    assert found.min() < 0
    assert abs(found.mean()) < 3 * found.std() / math.sqrt(300)
    assert np.mean(errors**2) >= found.var()  # conservative where the statistic is degenerate


def test_kernel_distance_of_two_samples_has_no_error():
    a = random_features(2, 4, 0)
    assert np.isnan(evaluation.kernel_distance_and_error(a, random_features(5, 4, 1))[1])


def precision_recall_by_loops(real, fake, k):
    def radius(x, i):
        return sorted(np.linalg.norm(x[i] - x[j]) for j in range(len(x)) if j != i)[k - 1]

    def share(points, centres):
        radii = [radius(centres, i) for i in range(len(centres))]
        return np.mean([any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radii, strict=True)) for p in points])

    return share(fake, real), share(real, fake)


@pytest.mark.parametrize(("k", "block"), [(1, 16), (3, 7), (5, 256)])
def test_precision_and_recall_are_those_of_all_pairs(k, block, monkeypatch):
    monkeypatch.setattr(evaluation, "BLOCK", block)
    real, fake = random_features(50, 3, 0), 0.6 * random_features(40, 3, 1, shift=0.5)
    found = evaluation.precision_recall(real, fake, k)
    assert found == precision_recall_by_loops(real, fake, k)
    assert 0 < found[1] < found[0]  # the fakes are concentrated


def test_precision_and_recall_are_those_of_scikit_learns_neighbours():
    real, fake = random_features(900, 12, 0), 0.8 * random_features(600, 12, 1, shift=0.2)

    def share(points, centres):
        neighbours = NearestNeighbors(n_neighbors=4).fit(centres)  # each sample is its own first
        radii = neighbours.kneighbors(centres)[0][:, 3]
        return np.mean((pairwise_distances(points, centres) <= radii).any(axis=1))

    found = evaluation.precision_recall(real, fake)
    assert found == pytest.approx((share(fake, real), share(real, fake)), abs=1e-3)
    assert 0.05 < found[1] < found[0] < 0.99


def test_precision_and_recall_of_equal_and_of_distant_sets():
    real = random_features(60, 4, 0)
    assert evaluation.precision_recall(real, real[:40]) == (1, pytest.approx(1, abs=0.1))
    assert evaluation.precision_recall(real, real + np.float32(100)) == (0, 0)
    with pytest.raises(ValueError, match="60 and 3 samples have no 3-th nearest"):
        evaluation.precision_recall(real, real[:3])


def test_inception_score_is_the_formula():
    logits = 3 * np.random.default_rng(0).normal(size=(200, 10))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = np.exp(np.mean(np.sum(p * (np.log(p) - np.log(p.mean(0))), 1)))
    assert evaluation.inception_score(logits) == pytest.approx(expected, rel=1e-9)
    assert evaluation.inception_score(np.zeros((4, 10))) == pytest.approx(1)
    assert evaluation.inception_score(100 * np.eye(10)) == pytest.approx(10)


BAD = np.array([[0.0, 1.0], [np.nan, 0.0]])


@pytest.mark.parametrize("distance", [evaluation.frechet_distance, evaluation.kernel_distance])
@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.zeros((1, 2)), np.zeros((5, 2)), "first set must be .* two samples or more, got shape"),
        (np.zeros((5, 2)), np.zeros((0, 2)), "second set must be"),
        (np.zeros((5, 2)), BAD, "second set has values that are not finite"),
    ],
)
def test_invalid_sets_are_an_error(distance, a, b, message):
    with pytest.raises(ValueError, match=message):
        distance(a, b)


def test_sets_of_different_width_and_invalid_logits_are_an_error():
    with pytest.raises(ValueError, match="2 and 3 features"):
        evaluation._comparable(np.zeros((5, 2)), np.zeros((5, 3)))
    with pytest.raises(ValueError, match="logits has values that are not finite"):
        evaluation.inception_score(BAD)
    with pytest.raises(ValueError, match="logits must be"):
        evaluation.inception_score(np.zeros((1, 10)))


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
    error = evaluation.rms_to_reference(tested, GAUSSIAN, tested, GAUSSIAN, count=9, batch_size=4)
    runs = [direct(tested, GAUSSIAN)([n, n + 1]).x for n in range(0, 10, 2)]
    ends = exact_end(tested.noise(np.arange(10)))
    assert error == pytest.approx(np.sqrt(np.mean((np.concatenate(runs) - ends)[:9] ** 2)), rel=1e-3, abs=5e-6)
    assert error > (1e-2 if options is EULER else 0)


def test_rms_to_a_teacher_is_that_of_the_same_noises_in_closed_form():
    teacher_params = {"mean": GAUSSIAN["mean"] + np.float32(0.5), "spread": GAUSSIAN["spread"] * np.float32(1.2)}
    student, teacher = sampler_of(Gaussian(), ODE | {"tol": 1e-5}, UNEVEN), sampler_of(Gaussian(), EULER)
    found = evaluation.rms_to_reference(student, GAUSSIAN, teacher, teacher_params, count=6, batch_size=4)
    z = student.noise(np.arange(6))
    expected = np.sqrt(np.mean((exact_end(z) - exact_end(z, teacher_params)) ** 2))
    assert found == pytest.approx(expected, rel=1e-3)


def test_a_reference_solve_out_of_reach_is_an_error_with_the_remedy():
    tested = sampler_of(Explosive(), EULER | {"num_scales": 1})
    with pytest.raises(InputError, match=r"not finite with .*1e-06.*use a checkpoint that was trained longer"):
        evaluation.rms_to_reference(tested, {}, tested, {}, 2, 2)
