"""Distances against independent formulae, SciPy's, scikit-learn's and TF-GAN's."""

import math

import numpy as np
import pytest
import scipy.linalg
import tensorflow as tf
from sklearn.metrics import pairwise_distances
from sklearn.neighbors import NearestNeighbors

from metrics import distances
from metrics.tfgan import tensorflow_gan


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
    assert distances.frechet_distance(a, b) == pytest.approx(frechet_by_scipy(a, b), rel=1e-6)


def test_frechet_distance_of_a_shift_and_of_a_set_with_itself():
    a = random_features(500, 5, 0)
    assert isinstance(distances.frechet_distance(a, a), float)
    assert distances.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert distances.frechet_distance(a, a + np.float32(0.5)) == pytest.approx(5 * 0.25, rel=1e-4)


def frechet_by_singular_values(a, b):
    """tr (A B)^(1/2) of A = X'X and B = Y'Y is the sum of the singular values of XY', whatever their ranks."""
    x, y = ((z - z.mean(0)) / math.sqrt(len(z) - 1) for z in (a.astype(np.float64), b.astype(np.float64)))
    root = scipy.linalg.svdvals(x @ y.T).sum()
    return np.sum((a.mean(0, np.float64) - b.mean(0, np.float64)) ** 2) + np.sum(x**2) + np.sum(y**2) - 2 * root


@pytest.mark.parametrize(("n", "d"), [(10, 30), (150, 2048), (700, 500)])
def test_frechet_distance_of_covariances_without_inverse(n, d):
    a, b = random_features(n, d, 0), random_features(n + 20, d, 1, shift=0.1)
    a[:, 1] = a[:, 0]  # also where there are more samples than features
    b[:, 2] = 1
    assert distances.frechet_distance(a, b) == pytest.approx(frechet_by_singular_values(a, b), rel=1e-6)


def test_frechet_distance_and_score_are_tf_gans():
    a, b = random_features(600, 16, 0), random_features(500, 16, 1, shift=0.2)
    of_activations = tensorflow_gan().eval.frechet_classifier_distance_from_activations
    assert distances.frechet_distance(a, b) == pytest.approx(float(of_activations(a, b)), rel=1e-4)
    assert distances.inception_score(a) == pytest.approx(
        float(tensorflow_gan().eval.classifier_score_from_logits(a)), rel=1e-5
    )


def test_moments_do_not_depend_on_blocks_and_keep_their_digits():
    x = (1000 + random_features(1100, 5, 0)).astype(np.float32)
    found = distances.moments([x[:3], x[3:700], x[700:]])
    np.testing.assert_allclose(found.mean, x.mean(0, np.float64), rtol=1e-14)
    np.testing.assert_allclose(found.covariance, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-9)
    np.testing.assert_allclose(found.root @ found.root, found.covariance, atol=1e-12)
    with pytest.raises(ValueError, match="two samples or more, got 1"):
        distances.moments([x[:1]])


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
    monkeypatch.setattr(distances, "BLOCK", block)
    a, b = random_features(30, 8, 0), random_features(24, 8, 1, shift=0.2)
    distance, error = distances.kernel_distance_and_error(a, b)
    assert distance == pytest.approx(mmd_by_loops(a, b), rel=1e-10)
    assert error == pytest.approx(jackknife_by_loops(a, b), rel=1e-8)
    assert distances.kernel_distance(a, b) == distance
    again = distances.kernel_distance_and_error(a, b, sums_a=distances.kernel_sums(a))
    assert again == (distance, error)


def test_kernel_distance_is_tf_gans_of_one_block():
    a, b = random_features(700, 16, 0), random_features(500, 16, 1, shift=0.2)
    metric = tensorflow_gan().eval.kernel_classifier_distance_from_activations
    single = float(metric(*map(tf.constant, (a.astype(np.float64), b.astype(np.float64))), max_block_size=1000))
    assert distances.kernel_distance(a, b) == pytest.approx(single, rel=1e-9)


def test_kernel_distance_is_unbiased_and_its_error_covers_the_truth():
    # With one feature the kernel is sum_j C(3, j) x^j y^j, so the distance is sum_j C(3, j) (difference of E x^j)^2.
    rng = np.random.default_rng(0)
    moments = [np.array([0, 1 / 3, 0]), np.array([0.4, 1 / 3 + 0.16, 0.4 + 0.064])]  # U(-1, 1), and moved by 0.4
    truth = np.sum(np.array([3, 3, 1]) * (moments[0] - moments[1]) ** 2)
    draws = [(rng.uniform(-1, 1, (60, 1)), rng.uniform(-0.6, 1.4, (90, 1))) for _ in range(200)]
    found, errors = np.transpose([distances.kernel_distance_and_error(a, b) for a, b in draws])
    assert abs(found.mean() - truth) < 3 * found.std() / math.sqrt(200)
    assert errors.mean() == pytest.approx(found.std(), rel=0.15)
    assert 0.92 <= np.mean(np.abs(found - truth) < 1.96 * errors) <= 0.98
    same = [(rng.uniform(-1, 1, (60, 1)), rng.uniform(-1, 1, (90, 1))) for _ in range(200)]
    found, errors = np.transpose([distances.kernel_distance_and_error(a, b) for a, b in same])
    assert found.min() < 0
    assert abs(found.mean()) < 3 * found.std() / math.sqrt(200)
    assert np.mean(errors**2) >= found.var()  # conservative where the statistic is degenerate


@pytest.mark.parametrize("scale", [1, 30])
def test_distances_of_2048_features_without_full_rank(scale):
    a, b = (scale * random_features(n, 2048, seed)[:, :1024] for n, seed in ((700, 0), (600, 1)))
    a, b = (np.concatenate([x, x + np.float32(0.1)], axis=1) for x in (a, 1.02 * b))
    x, y = a.astype(np.float64), b.astype(np.float64)
    within = [(np.sum(k) - np.trace(k)) / (len(k) * (len(k) - 1)) for k in ((z @ z.T / 2048 + 1) ** 3 for z in (x, y))]
    expected = sum(within) - 2 * np.mean((x @ y.T / 2048 + 1) ** 3)
    assert distances.kernel_distance(a, b) == pytest.approx(expected, rel=1e-4, abs=1e-12 * sum(within))
    apart = pairwise_distances(y, x)
    radii = [np.sort(pairwise_distances(z), axis=1)[:, 3] for z in (x, y)]
    shares = np.mean((apart <= radii[0]).any(1)), np.mean((apart <= radii[1][:, None]).any(0))
    assert distances.precision_recall(a, b) == pytest.approx(shares, abs=1e-9)


def test_kernel_distance_of_two_samples_has_no_error():
    a = random_features(2, 4, 0)
    assert np.isnan(distances.kernel_distance_and_error(a, random_features(5, 4, 1))[1])


def precision_recall_by_loops(real, fake, k):
    def radius(x, i):
        return sorted(np.linalg.norm(x[i] - x[j]) for j in range(len(x)) if j != i)[k - 1]

    def share(points, centres):
        radii = [radius(centres, i) for i in range(len(centres))]
        return np.mean([any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radii, strict=True)) for p in points])

    return share(fake, real), share(real, fake)


@pytest.mark.parametrize(("k", "block"), [(1, 16), (3, 7), (5, 256)])
def test_precision_and_recall_are_those_of_all_pairs(k, block, monkeypatch):
    monkeypatch.setattr(distances, "BLOCK", block)
    real, fake = random_features(50, 3, 0), 0.6 * random_features(40, 3, 1, shift=0.5)
    found = distances.precision_recall(real, fake, k)
    assert found == precision_recall_by_loops(real, fake, k)
    assert found == distances.precision_recall(real, fake, k, real_radii=distances.squared_radii(real, k))
    assert 0 < found[1] < found[0]  # the fakes are concentrated


def test_precision_and_recall_are_those_of_scikit_learns_neighbours():
    real, fake = random_features(900, 12, 0), 0.8 * random_features(600, 12, 1, shift=0.2)

    def share(points, centres):
        neighbours = NearestNeighbors(n_neighbors=4).fit(centres)  # each sample is its own first
        radii = neighbours.kneighbors(centres)[0][:, 3]
        return np.mean((pairwise_distances(points, centres) <= radii).any(axis=1))

    found = distances.precision_recall(real, fake)
    assert found == pytest.approx((share(fake, real), share(real, fake)), abs=1e-3)
    assert 0.05 < found[1] < found[0] < 0.99


def test_precision_and_recall_of_equal_and_of_distant_sets():
    real = random_features(60, 4, 0)
    assert distances.precision_recall(real, real[:40]) == (1, pytest.approx(1, abs=0.1))
    assert distances.precision_recall(real, real + np.float32(100)) == (0, 0)
    with pytest.raises(ValueError, match="60 and 3 samples have no 3-th nearest"):
        distances.precision_recall(real, real[:3])


def test_inception_score_is_the_formula():
    logits = 3 * np.random.default_rng(0).normal(size=(200, 10))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = np.exp(np.mean(np.sum(p * (np.log(p) - np.log(p.mean(0))), 1)))
    assert distances.inception_score(logits) == pytest.approx(expected, rel=1e-9)
    assert distances.inception_score(np.zeros((4, 10))) == pytest.approx(1)
    assert distances.inception_score(100 * np.eye(10)) == pytest.approx(10)


BAD = np.array([[0.0, 1.0], [np.nan, 0.0]])


@pytest.mark.parametrize("distance", [distances.frechet_distance, distances.kernel_distance])
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
        distances.check_comparable(np.zeros((5, 2)), np.zeros((5, 3)))
    with pytest.raises(ValueError, match="logits has values that are not finite"):
        distances.inception_score(BAD)
    with pytest.raises(ValueError, match="logits must be"):
        distances.inception_score(np.zeros((1, 10)))


@pytest.mark.parametrize("kind", [np.float32, np.uint8])
def test_nearest_is_the_nearest_of_all_blocks(kind):
    rng = np.random.default_rng(0)
    x, y = (rng.integers(0, 256, (n, 6)).astype(kind) for n in (40, 1300))
    y[700] = x[5]
    found, index = distances.nearest(x, [y[:500], y[500:900], y[900:]])
    expected, nearest = NearestNeighbors(n_neighbors=1).fit(y.astype(np.float64)).kneighbors(x.astype(np.float64))
    np.testing.assert_allclose(found, expected[:, 0], rtol=1e-6, atol=1e-5)
    np.testing.assert_array_equal(index, nearest[:, 0])
    assert (found[5], index[5]) == (pytest.approx(0, abs=1e-5), 700)
