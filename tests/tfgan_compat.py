"""Imports TF-GAN 2.1.0, which the distances are compared with, on TensorFlow 2.21, which lacks what its import needs.

TF-GAN's newest release derives some training classes from `tf.estimator` and `tf.compat.v1.estimator`, which TensorFlow
2.16 removed, so `import tensorflow_gan` fails there. Its evaluation functions need none of that. While TF-GAN is
imported, an empty class replaces the estimators; afterwards it is removed, so that TensorFlow is unchanged for others.
TF-GAN's own estimator classes stay unusable.
"""

import contextlib
import warnings
from types import ModuleType

from runtime import tensorflow_on_cpu


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
