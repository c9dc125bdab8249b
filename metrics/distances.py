"""Distances between sets of features, in double precision (docs/method.md, section 11).

Sets are arrays [n, d] of any float type. They are converted block by block, so that beside them there is memory for a
few blocks and, of the Frechet distance, a few [d, d] matrices.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator

import numpy as np
import scipy.special
from jaxtyping import Float, Int, Real

BLOCK = 512  # rows of a set that are converted, or multiplied with as many others, at a time


# --- the Frechet distance ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Moments:
    """The mean and the covariance of a set of features."""

    mean: Float[np.ndarray, "d"]
    covariance: Float[np.ndarray, "d d"]

    @functools.cached_property
    def root(self) -> Float[np.ndarray, "d d"]:
        """The symmetric square root of the covariance, computed once."""
        values, vectors = np.linalg.eigh(self.covariance)
        return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


def moments(parts: Iterable[Float[np.ndarray, "_ d"]]) -> Moments:
    """The moments of all rows of the parts; the covariance has n - 1 in its denominator.

    Raises:
      ValueError: fewer than two rows.
    """
    count = 0
    shift, total, squares = (np.zeros(()),) * 3
    for block in parts:
        if not count:
            shift = block.mean(axis=0, dtype=np.float64)  # near the mean, so that no digits are lost below
        centered = block - shift
        total, squares, count = total + centered.sum(axis=0), squares + centered.T @ centered, count + len(block)
    if count < 2:
        raise ValueError(f"a covariance needs two samples or more, got {count}")
    mean = total / count
    return Moments(shift + mean, (squares - count * np.outer(mean, mean)) / (count - 1))


def frechet_distance_of_moments(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)), of normal distributions (Heusel et al.).

    The trace of the root is the sum of the square roots of the eigenvalues of root_a cov_b root_a, which is symmetric:
    exact enough where a covariance has no inverse. Only `a` needs its root, and keeps it.
    """
    eigenvalues = np.linalg.eigvalsh(a.root @ b.covariance @ a.root)
    mixed = np.sqrt(np.clip(eigenvalues, 0, None)).sum()
    distance = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance) + np.trace(b.covariance) - 2 * mixed
    return float(distance)


def frechet_distance(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> float:
    """Frechet distance of the normal distributions with the features' means and covariances.

    With Inception's features the FID (Heusel et al., arXiv 1706.08500). Rounding can take the distance of equal sets a
    little below 0.

    Raises:
      ValueError: fewer than two samples, different widths, or values that are not finite.
    """
    check_comparable(a, b)
    return frechet_distance_of_moments(moments(blocks(a)), moments(blocks(b)))


def frechet_distance_to(a: Moments, b: Float[np.ndarray, "m e"]) -> float:
    """`frechet_distance` where of the first set the moments are known. Errors as there."""
    _check("the second set", b)
    if a.mean.size != b.shape[1]:
        raise ValueError(f"the sets have {a.mean.size} and {b.shape[1]} features; they must come from one network")
    return frechet_distance_of_moments(a, moments(blocks(b)))


# --- the kernel distance ----------------------------------------------------------------------------------------------


def kernel_distance(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> float:
    """Squared maximum mean discrepancy under the kernel (x.y/d + 1)^3; with Inception's features the KID.

    The U-statistic over all pairs (Gretton et al., JMLR 13, eq. 3; Binkowski et al., arXiv 1801.01401): unbiased, so
    around 0, and sometimes below, for equal distributions.

    Raises:
      ValueError: as `frechet_distance`.
    """
    return kernel_distance_and_error(a, b)[0]


def kernel_distance_and_error(
    a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"], *, sums_a: Float[np.ndarray, "n"] | None = None
) -> tuple[float, float]:
    """`kernel_distance` and its standard error by the jackknife, over the samples of both sets.

    The variance is the sum over both sets of (n - 1)/n sum_i (U_-i - mean U_-i)^2, U_-i the estimate without sample i
    (Efron and Stein, 1981). On average it is not too small; where the distributions are equal the statistic is
    degenerate, the variance too large and the statistic not normal. NaN where a set has two samples.

    Args:
      sums_a: `kernel_sums(a)`, where they are known.

    Raises:
      ValueError: as `frechet_distance`.
    """
    check_comparable(a, b)
    n, m = len(a), len(b)
    within_a = kernel_sums(a) if sums_a is None else sums_a
    within_b, (cross_a, cross_b) = kernel_sums(b), _cross_kernel_sums(a, b)

    def estimate(sum_a, sum_b, sum_cross, n: int, m: int):
        return sum_a / (n * (n - 1)) + sum_b / (m * (m - 1)) - 2 * sum_cross / (n * m)

    total_a, total_b, cross = within_a.sum(), within_b.sum(), cross_a.sum()
    distance = estimate(total_a, total_b, cross, n, m)
    if min(n, m) < 3:
        return float(distance), float("nan")
    without_a = estimate(total_a - 2 * within_a, total_b, cross - cross_a, n - 1, m)
    without_b = estimate(total_a, total_b - 2 * within_b, cross - cross_b, n, m - 1)
    variance = (n - 1) * np.var(without_a) + (m - 1) * np.var(without_b)
    return float(distance), float(np.sqrt(variance))


def kernel_sums(x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n"]:
    """For each sample the sum of its kernel values with all others, each value computed once."""
    sums = np.zeros(len(x))
    for rows in _spans(x):
        block = _lifted(x[rows])
        for columns in _spans(x, rows.start):
            kernel = _cubes(block, _lifted(x[columns]))
            sums[rows] += kernel.sum(axis=1)
            if columns == rows:
                sums[rows] -= kernel.diagonal()
            else:
                sums[columns] += kernel.sum(axis=0)
    return sums


def _cross_kernel_sums(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[n], [m] for each sample the sum of its kernel values with the other set."""
    sums_a, sums_b = np.zeros(len(a)), np.zeros(len(b))
    for rows in _spans(a):
        block = _lifted(a[rows])
        for columns in _spans(b):
            kernel = _cubes(block, _lifted(b[columns]))
            sums_a[rows] += kernel.sum(axis=1)
            sums_b[columns] += kernel.sum(axis=0)
    return sums_a, sums_b


def _lifted(x: np.ndarray) -> np.ndarray:
    """[n, d + 1] float64 such that the product of two rows is x.y/d + 1."""
    return np.concatenate([x / np.sqrt(np.float64(x.shape[1])), np.ones((len(x), 1))], axis=1)


def _cubes(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    product = a @ b.T
    cubes = product * product
    cubes *= product
    return cubes


# --- neighbours -------------------------------------------------------------------------------------------------------


def precision_recall(
    real: Float[np.ndarray, "n d"],
    fake: Float[np.ndarray, "m d"],
    k: int = 3,
    *,
    real_radii: Float[np.ndarray, "n"] | None = None,
) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al., arXiv 1904.06991).

    A set's manifold is the union of balls around its samples, each as wide as the distance to its k-th nearest
    neighbour. Precision is the share of `fake` on the manifold of `real`, recall that of `real` on the one of `fake`.

    Args:
      real_radii: `squared_radii(real, k)`, where they are known.

    Raises:
      ValueError: as `frechet_distance`, or a set of k samples or fewer.
    """
    check_comparable(real, fake)
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"sets of {len(real)} and {len(fake)} samples have no {k}-th nearest neighbours")
    real_radii = squared_radii(real, k) if real_radii is None else real_radii
    fake_radii = squared_radii(fake, k)
    is_precise, is_recalled = np.zeros(len(fake), bool), np.zeros(len(real), bool)
    for rows, distances in _squared_distances(fake, real):
        is_precise[rows] = (distances <= real_radii).any(axis=1)
        is_recalled |= (distances <= fake_radii[rows, None]).any(axis=0)
    return float(is_precise.mean()), float(is_recalled.mean())


def squared_radii(x: Float[np.ndarray, "n d"], k: int) -> Float[np.ndarray, "n"]:
    """The squared distance of each sample to the k-th nearest of the others."""
    radii = np.zeros(len(x))
    for rows, distances in _squared_distances(x, x):
        np.fill_diagonal(distances[:, rows], np.inf)  # itself
        radii[rows] = np.partition(distances, k - 1, axis=1)[:, k - 1]
    return radii


def _squared_distances(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields the matrix of squared distances, BLOCK rows of it at a time."""
    b = b.astype(np.float64)
    squares = np.einsum("md,md->m", b, b)
    for rows in _spans(a):
        block = a[rows].astype(np.float64)
        yield rows, np.einsum("nd,nd->n", block, block)[:, None] + squares - 2 * block @ b.T


def nearest(
    x: Real[np.ndarray, "n d"], others: Iterable[Real[np.ndarray, "_ d"]]
) -> tuple[Float[np.ndarray, "n"], Int[np.ndarray, "n"]]:
    """The Euclidean distance of each row of `x` to the nearest of all rows of `others`, and that row's number."""
    smallest, index, first = np.full(len(x), np.inf), np.zeros(len(x), int), 0
    for block in others:
        for rows, distances in _squared_distances(x, block):
            column = distances.argmin(axis=1)
            found = distances[np.arange(len(column)), column]
            closer = found < smallest[rows]
            smallest[rows][closer], index[rows][closer] = found[closer], first + column[closer]
        first += len(block)
    return np.sqrt(np.clip(smallest, 0, None)), index


# --- the Inception score ----------------------------------------------------------------------------------------------


def inception_score(logits: Float[np.ndarray, "n classes"]) -> float:
    """exp(E KL(p(y|x) || p(y))), from 1 to the number of classes (Salimans et al., arXiv 1606.03498).

    Raises:
      ValueError: fewer than two samples, or values that are not finite.
    """
    _check("logits", logits)
    negative_entropy, total = 0.0, np.zeros(logits.shape[1])
    for block in blocks(logits):
        log_p = scipy.special.log_softmax(block.astype(np.float64), axis=1)
        p = np.exp(log_p)
        negative_entropy += np.sum(p * log_p)
        total += p.sum(axis=0)
    mean = total / len(logits)
    return float(np.exp(negative_entropy / len(logits) + scipy.special.entr(mean).sum()))


# --- blocks and checks ------------------------------------------------------------------------------------------------


def _spans(x: np.ndarray, start: int = 0) -> Iterator[slice]:
    """The slices of BLOCK rows from `start`, a multiple of BLOCK, on."""
    return (slice(first, min(first + BLOCK, len(x))) for first in range(start, len(x), BLOCK))


def blocks(x: Real[np.ndarray, "n d"]) -> Iterator[Real[np.ndarray, "_ d"]]:
    """The rows of `x`, BLOCK at a time."""
    return (x[rows] for rows in _spans(x))


def _check(name: str, x: np.ndarray) -> None:
    """Raises ValueError where `x` is not [n >= 2, d] or not finite."""
    if x.ndim != 2 or x.shape[0] < 2 or x.shape[1] < 1:
        raise ValueError(f"{name} must be [n, d] with two samples or more, got shape {x.shape}")
    if not all(np.isfinite(block).all() for block in blocks(x)):
        raise ValueError(f"{name} has values that are not finite")


def check_comparable(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m e"]) -> None:
    """Raises ValueError where the two sets of features cannot be compared."""
    _check("the first set", a)
    _check("the second set", b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"the sets have {a.shape[1]} and {b.shape[1]} features; they must come from one network")
