"""TF-GAN imports, works, and leaves TensorFlow as it was."""

import sys
import types

import numpy as np
import pytest

from metrics import distances, tfgan


def test_tf_gan_imports_and_tensorflow_stays_without_estimators():
    import tensorflow as tf

    library = tfgan.tensorflow_gan()
    assert library.__version__ == "2.1.0"
    assert not hasattr(tf, "estimator")
    assert not hasattr(tf.compat.v1, "estimator")
    assert tfgan.tensorflow_gan() is library
    assert float(library.eval.classifier_score_from_logits([[0.0, 0.0], [0.0, 0.0]])) == pytest.approx(1)


def test_an_estimator_that_exists_is_not_replaced_and_failures_clean_up():
    whole, lacking = types.SimpleNamespace(estimator="real"), types.SimpleNamespace()
    with tfgan._with_estimators(whole, lacking):
        assert whole.estimator == "real"
        assert isinstance(lacking.estimator.tpu.TPUEstimator, type)
    with pytest.raises(ImportError), tfgan._with_estimators(whole, lacking):
        raise ImportError
    assert whole.estimator == "real"
    assert not hasattr(lacking, "estimator")


def features(seed, shift=0.0):
    return np.random.default_rng(seed).normal(shift, size=(200, 12)).astype(np.float32)


def test_tf_gans_numbers_stand_beside_ours_and_a_difference_is_a_warning(caplog):
    real, fake, logits = features(0), features(1, 0.3), features(2)
    own = {"fid": distances.frechet_distance(real, fake), "is": distances.inception_score(logits)}
    found = tfgan.beside(own, real, fake, logits)
    assert found.keys() == {"fid_tfgan", "is_tfgan"}
    assert found["fid_tfgan"] == pytest.approx(own["fid"], rel=1e-4)
    assert found["is_tfgan"] == pytest.approx(own["is"], rel=1e-4)
    assert not caplog.records
    tfgan.beside(own | {"fid": 1.002 * own["fid"]}, real, fake, logits)
    assert [record.message.partition(" is ")[0] for record in caplog.records] == ["fid"]


def test_without_tf_gan_an_evaluation_goes_on_with_one_warning(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "tensorflow_gan", None)
    assert tfgan.beside({"fid": 1.0, "is": 1.0}, features(0), features(1), features(2)) == {}
    assert len(caplog.records) == 1
    assert "left out" in caplog.text
