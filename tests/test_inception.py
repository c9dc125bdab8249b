"""Inception from a folder or TF-Hub, run by TensorFlow and by JAX, and the errors that users see."""

import dataclasses
import os
import re
import socket
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorflow as tf

import datasets
from metrics import inception, reference
from metrics.tfgan import tensorflow_gan
from utils import InputError


class TinyInception(tf.Module):
    """Answers as TF-GAN's Inception does: per-channel means for 'pool_3', the mean of all for each of 5 'logits'."""

    @tf.function(input_signature=[tf.TensorSpec([None, None, None, 3], tf.float32)])
    def __call__(self, images):
        pool = tf.reduce_mean(images, [1, 2], keepdims=True)
        size = tf.cast(tf.shape(images)[1], tf.float32)
        return {"pool_3": pool, "logits": tf.repeat(tf.reduce_mean(pool, [3])[:, 0], 5, axis=1) * size / 299}


class HalfInception(tf.Module):
    @tf.function(input_signature=[tf.TensorSpec([None, None, None, 3], tf.float32)])
    def __call__(self, images):
        return {"logits": tf.reduce_mean(images, [1, 2])}


@pytest.fixture(scope="module")
def tiny_inception(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inception")
    tf.saved_model.save(TinyInception(), str(folder))
    return str(folder)


PHOTOGRAPHS = datasets.DataOptions("CIFAR10", 32, 3)


@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_inception_from_a_folder(tiny_inception, backend):
    network = inception.inception(tiny_inception, backend)
    assert network.name == "inception"
    images = np.zeros((70, 8, 8, 3), np.uint8)
    images[:, :, :, 1] = 255
    images[-1] = np.random.default_rng(0).integers(0, 256, (8, 8, 3))
    found, logits = network.features_and_logits(images)
    assert found.shape == (70, 3)
    assert logits.shape == (70, 5)
    assert found.dtype == logits.dtype == np.float32
    np.testing.assert_allclose(found[:-1], np.tile([-1, 1, -1], (69, 1)), atol=1e-6)
    np.testing.assert_allclose(found[-1], images[-1].mean((0, 1)) / 127.5 - 1, atol=0.05)
    np.testing.assert_allclose(logits[:, 0], found.mean(1), atol=1e-6)  # its images were 299 pixels high


class FeatureVector(tf.Module):
    """As TF-Hub's feature vectors: the features by themselves."""

    @tf.function(input_signature=[tf.TensorSpec([None, None, None, 3], tf.float32)])
    def __call__(self, images):
        size = tf.cast(tf.shape(images)[1], tf.float32)
        return tf.concat([tf.reduce_mean(images, [1, 2]), tf.fill([tf.shape(images)[0], 1], size)], axis=1)


@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_inception_v3_is_given_images_as_they_are_and_has_no_classes(tmp_path, backend, tiny_inception):
    tf.saved_model.save(FeatureVector(), str(tmp_path))
    options = reference.Options(str(tmp_path), backend, network="inception_v3")
    network = reference.feature_network(PHOTOGRAPHS, options)
    assert (network.name, network.suffix, network.preprocessing) == (
        "inception_v3",
        "_inception_v3",
        "scaled to [0, 1]",
    )
    images = np.random.default_rng(0).integers(0, 256, (70, 40, 40, 3), np.uint8)
    found, logits = network.features_and_logits(images)
    np.testing.assert_allclose(found[:, :3], images.mean((1, 2)) / 255, rtol=1e-5)
    assert set(found[:, 3]) == {40}  # not resized
    assert logits.shape == (70, 1)
    with pytest.raises(InputError, match=r"is not an Inception network: it gives .* its features alone"):
        reference.feature_network(PHOTOGRAPHS, dataclasses.replace(options, inception_path=tiny_inception))


def test_inceptions_identity_is_its_content(tiny_inception, tmp_path):
    tf.saved_model.save(HalfInception(), str(tmp_path))
    folders = [inception.epath.Path(folder) for folder in (tiny_inception, tmp_path)]
    first, again, other = (inception._digest(folders[i]) for i in (0, 0, 1))
    assert first == again != other


def test_a_folder_without_inception_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"eval\.inception_path = /nowhere holds no SavedModel"):
        reference.feature_network(PHOTOGRAPHS, reference.Options(inception_path="/nowhere"))
    tf.saved_model.save(HalfInception(), str(tmp_path / "half"))
    with pytest.raises(InputError, match="does not give pool_3"):
        inception.inception(str(tmp_path / "half"))
    tf.saved_model.save(tf.Module(), str(tmp_path / "empty"))
    with pytest.raises(InputError, match="is not an Inception network"):
        inception.inception(str(tmp_path / "empty"))
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/saved_model.pb").write_bytes(b"\x01\x02")
    with pytest.raises(InputError, match="is not an Inception network"):
        inception.inception(str(tmp_path / "damaged"))


def test_the_handle_is_tf_gans():
    assert inception.TFGAN.handle == tensorflow_gan().eval.INCEPTION_TFHUB
    assert inception.TFGAN.size == tensorflow_gan().eval.INCEPTION_DEFAULT_IMAGE_SIZE


def test_inception_out_of_reach_is_an_error_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("TFHUB_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(inception, "_answers", lambda url, seconds: False)
    with pytest.raises(InputError, match=r"cannot be reached.*--config\.eval\.inception_path=FOLDER") as error:
        reference.feature_network(PHOTOGRAPHS, reference.Options())
    assert "\n" not in str(error.value)


def test_a_failing_download_is_an_error_with_the_remedy(tmp_path, monkeypatch):
    import tensorflow_hub

    def fail(handle):
        raise OSError(f"no more of {handle}")

    monkeypatch.setenv("TFHUB_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(inception, "_answers", lambda url, seconds: True)
    monkeypatch.setattr(tensorflow_hub, "resolve", fail)
    with pytest.raises(InputError, match=r"no more of https.*--config\.eval\.inception_path=FOLDER"):
        inception.inception("none")


def test_inception_in_tf_hubs_cache_needs_no_network(tiny_inception, tmp_path, monkeypatch):
    monkeypatch.setenv("TFHUB_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(inception, "_answers", lambda url, seconds: False)
    from tensorflow_hub import compressed_module_resolver

    name = Path(compressed_module_resolver._module_dir(inception.TFGAN.handle)).name
    os.symlink(tiny_inception, tmp_path / name)
    assert inception.inception("none").features_and_logits(np.zeros((2, 8, 8, 3), np.uint8))[0].shape == (2, 3)


def test_waiting_for_a_server_has_a_limit():
    with socket.socket() as silent:  # accepts connections and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        assert not inception._answers(f"http://127.0.0.1:{silent.getsockname()[1]}/", 0.5)
    assert not inception._answers("http://127.0.0.1:9/", 0.5)


# ---- as a JAX program


class SmallInception(tf.Module):
    """The layers of Inception with random weights: convolutions, normalisation, pools, branches, 1008 classes."""

    def __init__(self):
        rng = np.random.default_rng(0)

        def weights(*shape):
            return tf.Variable((rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1]))).astype(np.float32))

        self.stem, self.wide, self.tall, self.dense = (
            weights(3, 3, 3, 8),
            weights(1, 5, 8, 8),
            weights(5, 1, 8, 8),
            weights(16, 1008),
        )
        self.mean, self.offset = weights(8), weights(8)

    @tf.function(input_signature=[tf.TensorSpec([None, None, None, 3], tf.float32)])
    def __call__(self, images):
        x = tf.nn.conv2d(images, self.stem, 4, "VALID")
        x = tf.nn.relu(tf.nn.batch_normalization(x, self.mean, 0.5, self.offset, None, 1e-3))
        x = tf.nn.max_pool2d(x, 3, 2, "VALID")
        branches = [
            tf.nn.conv2d(x, self.wide, 1, "SAME"),
            tf.nn.conv2d(tf.nn.avg_pool2d(x, 3, 1, "SAME"), self.tall, 1, "SAME"),
        ]
        pool = tf.reduce_mean(tf.nn.relu(tf.concat(branches, 3)), [1, 2], keepdims=True)
        return {"pool_3": pool, "logits": tf.matmul(pool[:, 0, 0], self.dense)}


@pytest.fixture(scope="module")
def small_inception(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small_inception")
    tf.saved_model.save(SmallInception(), str(folder))
    return str(folder)


def test_both_backends_compute_the_same_features(small_inception, monkeypatch):
    monkeypatch.setattr(inception, "BATCH", 4)
    on_host, on_devices = (inception.inception(small_inception, backend) for backend in ("tensorflow", "jax"))
    assert on_host.identity != on_devices.identity
    assert on_host.on_devices is None
    assert inception.inception(small_inception).on_devices is None  # auto: these devices are CPUs
    for images in (  # more than a batch on each of two devices, and one image
        np.random.default_rng(0).integers(0, 256, (11, 32, 32, 3), np.uint8),
        np.random.default_rng(1).integers(0, 256, (1, 256, 256, 3), np.uint8),
    ):
        for x, y in zip(on_host.features_and_logits(images), on_devices.features_and_logits(images), strict=True):
            np.testing.assert_allclose(y, x, rtol=1e-5, atol=1e-5 * np.abs(x).max())
    assert x.shape == (1, 1008)


def test_the_jax_program_has_whole_precision_and_belongs_to_no_platform(small_inception, caplog):
    model = inception._load(inception.epath.Path(small_inception))
    text = inception.portable_program(model, (2, 299, 299, 3)).mlir_module()
    products = [line for line in text.splitlines() if re.search(r"stablehlo\.(convolution|dot)", line)]
    assert len(products) == 4
    assert all(line.count("HIGHEST") == 2 for line in products), products
    assert "custom_call" not in text
    assert not caplog.text
    assert {name.split(".")[0] for name in re.findall(r"= \"?(\w+\.\w+)", text)} == {"stablehlo"}
    image = jax.ShapeDtypeStruct((2, 32, 32, 3), np.uint8)
    for platform in ("cuda", "tpu"):
        lowered = jax.export.export(jax.jit(inception.jax_function(model)), platforms=[platform])(image)
        text = lowered.mlir_module()
        products = [line for line in text.splitlines() if re.search(r"stablehlo\.(convolution|dot)", line)]
        assert products
        assert all(line.count("HIGHEST") == 2 for line in products)
    assert tf.config.experimental.tensor_float_32_execution_enabled()  # for others it is as it was
