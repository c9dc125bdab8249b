"""FID and Inception score as TF-GAN computes them, which published figures are of; and the import of TF-GAN 2.1.0.

TensorFlow 2.21 lacks what that import needs. TF-GAN's newest release derives some training classes from `tf.estimator`
and `tf.compat.v1.estimator`, which TensorFlow 2.16 removed, so `import tensorflow_gan` fails there. Its evaluation
functions need none of that. While TF-GAN is imported, an empty class replaces the estimators; afterwards it is removed,
so that TensorFlow is unchanged for others. TF-GAN's own estimator classes stay unusable.
"""

import contextlib
import logging
import warnings
from types import ModuleType

import numpy as np
from jaxtyping import Float

from runtime import tensorflow_on_cpu

logger = logging.getLogger("seqrf")

LARGEST_DIFFERENCE = 1e-3  # relative, of our own numbers from TF-GAN's


class _Estimators(type):
    """Makes every attribute of a class the class itself: `tf.estimator.tpu.TPUEstimator` is then a class to inherit."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return cls


class _NoEstimator(metaclass=_Estimators):
    """Replaces the removed estimators and all their parts; it has no function."""


@contextlib.contextmanager
def _with_estimators(*modules):
    """Inside the block each of the modules that lacks `estimator` has `_NoEstimator` for it."""
    lacking = [module for module in modules if not hasattr(module, "estimator")]
    for module in lacking:
        module.estimator = _NoEstimator
    try:
        yield
    finally:
        for module in lacking:
            del module.estimator


def tensorflow_gan() -> ModuleType:
    """The module `tensorflow_gan`, imported on first use (seconds), with TensorFlow kept off the GPU."""
    tf = tensorflow_on_cpu()
    # By this name, which TF-GAN's own imports use too: the first use of it replaces the attribute tf.compat.v1.
    import tensorflow.compat.v1 as tf1

    tf.get_logger().setLevel("ERROR")  # TF-GAN calls functions that TensorFlow deprecates, at length, on the terminal
    with _with_estimators(tf, tf1), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it and TF-Hub import what setuptools deprecates; setuptools is pinned
        import tensorflow_gan as tfgan
    return tfgan


def beside(
    own: dict[str, float],
    real: Float[np.ndarray, "m d"],
    fake: Float[np.ndarray, "n d"],
    logits: Float[np.ndarray, "n classes"],
) -> dict[str, float]:
    """{'fid_tfgan', 'is_tfgan'} of the features that our own {'fid', 'is'} are of, which a warning compares them with.

    Empty, after a warning, where TF-GAN cannot be imported.
    """
    try:
        metrics = tensorflow_gan().eval
    except ImportError as error:
        logger.warning("TF-GAN's own FID and IS are left out, it cannot be imported: %s", error)
        return {}
    found = {
        "fid": float(metrics.frechet_classifier_distance_from_activations(real, fake)),
        "is": float(metrics.classifier_score_from_logits(logits)),
    }
    for name, theirs in found.items():
        if not abs(own[name] - theirs) <= LARGEST_DIFFERENCE * abs(theirs):
            logger.warning("%s is %.6g here and %.6g by TF-GAN, of the same features", name, own[name], theirs)
    return {f"{name}_tfgan": value for name, value in found.items()}
