"""TF-GAN imports, works, and leaves TensorFlow as it was."""

import types

import pytest
import tfgan_compat


def test_tf_gan_imports_and_tensorflow_stays_without_estimators():
    import tensorflow as tf

    tfgan = tfgan_compat.tensorflow_gan()
    assert tfgan.__version__ == "2.1.0"
    assert not hasattr(tf, "estimator")
    assert not hasattr(tf.compat.v1, "estimator")
    assert tfgan_compat.tensorflow_gan() is tfgan
    assert float(tfgan.eval.classifier_score_from_logits([[0.0, 0.0], [0.0, 0.0]])) == pytest.approx(1)


def test_an_estimator_that_exists_is_not_replaced_and_failures_clean_up():
    whole, lacking = types.SimpleNamespace(estimator="real"), types.SimpleNamespace()
    with tfgan_compat._with_estimators(whole, lacking):
        assert whole.estimator == "real"
        assert isinstance(lacking.estimator.tpu.TPUEstimator, type)
    with pytest.raises(ImportError), tfgan_compat._with_estimators(whole, lacking):
        raise ImportError
    assert whole.estimator == "real"
    assert not hasattr(lacking, "estimator")
