"""Feature networks, their caches, and the errors that users see."""

import os
import socket
from pathlib import Path

import ml_collections
import numpy as np
import pytest
import tensorflow as tf
from tfgan_compat import tensorflow_gan

import datasets
import evaluation
import features
from utils import InputError

# ---- classifiers of labelled sets

DIGITS = ml_collections.ConfigDict({"dataset": "digits", "image_size": 8, "num_channels": 1})


@pytest.fixture(scope="module")
def classifier_cache(tmp_path_factory):
    """A cache folder that holds the trained classifier of the digits."""
    folder = tmp_path_factory.mktemp("cache")
    features.label_classifier(DIGITS, folder)
    return folder


def test_the_classifier_recognizes_digits_that_it_was_not_trained_on(classifier_cache):
    network = features.label_classifier(DIGITS, classifier_cache)
    _, test = features._shuffled_digits()
    found, logits = network.features_and_logits(test.images)
    assert network.name == "digits_classifier"
    assert found.shape == (297, 64)
    assert logits.shape == (297, 10)
    assert found.dtype == logits.dtype == np.float32
    accuracy = np.mean(logits.argmax(1) == test.labels)
    assert accuracy >= 0.97
    assert network.identity.endswith(f"test accuracy {accuracy:.4f}")
    assert (found.std(0) > 0.01).all()


def test_any_labelled_grey_set_has_a_classifier_of_its_test_accuracy(tmp_path, monkeypatch, caplog):
    images, labels = datasets.digits()
    images = np.kron(images, np.ones((1, 2, 2, 1), np.uint8))  # 16 x 16, read as a set with two splits
    split = {"train": slice(0, 1400), "test": slice(1400, None)}

    def source(data, name="train"):
        return datasets.ArraySource("zoomed", images[split[name]], labels[split[name]])

    monkeypatch.setattr(datasets, "image_source", source)
    zoomed = ml_collections.ConfigDict({"dataset": "ZOOMED", "image_size": 16, "num_channels": 1})
    with caplog.at_level("INFO", "seqrf"):
        network = features.feature_network(zoomed, "none", tmp_path)
    assert network.name == "zoomed_16_classifier"
    found, logits = network.features_and_logits(images[split["test"]])
    assert found.shape == (397, features.RECIPE.features)
    accuracy = np.mean(logits.argmax(1) == labels[split["test"]])
    assert accuracy >= 0.9
    assert f"zoomed_16_classifier, test accuracy {accuracy:.4f}" in caplog.text
    again = features.train_classifier(
        features.LabelClassifier(features.RECIPE.widths, features.RECIPE.features, 10),
        features.LabelledImages(images[split["train"]], labels[split["train"]]),
        features.RECIPE,
    )
    (path,) = tmp_path.glob("zoomed_16_classifier_*.npz")
    with np.load(path) as kept:
        np.testing.assert_array_equal(kept["Dense_1/kernel"], again["Dense_1"]["kernel"])


def test_the_classifiers_distance_grows_with_the_damage_to_the_images(classifier_cache):
    network = features.label_classifier(DIGITS, classifier_cache)
    images = datasets.digits()[0]
    noise = np.random.default_rng(0).normal(size=images.shape)
    real = network.features_and_logits(images)[0]
    distances = [
        evaluation.frechet_distance(
            real, network.features_and_logits(np.clip(images + scale * noise, 0, 255).astype(np.uint8))[0]
        )
        for scale in (0, 20, 60)
    ]
    assert abs(distances[0]) < 1e-6 < 10 * distances[1] < distances[2]


def test_the_classifier_does_not_depend_on_how_images_are_batched(classifier_cache):
    network = features.label_classifier(DIGITS, classifier_cache)
    images = datasets.digits()[0]
    whole = network.features_and_logits(images[:700])[0]
    parts = [network.features_and_logits(images[start:stop])[0] for start, stop in [(0, 3), (3, 600), (600, 700)]]
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-6)


def test_the_classifier_is_read_back_and_a_damaged_one_is_trained_again_to_the_same(classifier_cache, monkeypatch):
    (path,) = classifier_cache.glob("*")
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    network = features.label_classifier(DIGITS, classifier_cache)
    assert path.read_bytes() == whole
    monkeypatch.setattr(features, "train_classifier", None)
    again = features.label_classifier(DIGITS, classifier_cache)
    images = datasets.digits()[0][:20]
    for x, y in zip(again.features_and_logits(images), network.features_and_logits(images), strict=True):
        np.testing.assert_array_equal(x, y)


# ---- caches


def test_a_cache_file_damaged_anywhere_is_computed_again(tmp_path):
    path = features.epath.Path(tmp_path) / "cached.npz"
    arrays = {"a": np.arange(2, dtype=np.float32), "b/c": np.ones((1, 1))}

    def same(found):
        return set(found) == set(arrays) and all(np.array_equal(found[name], arrays[name]) for name in arrays)

    assert same(features._cached(path, lambda: arrays))
    whole = path.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 0xFF
        path.write_bytes(bytes(damaged))
        assert same(features._cached(path, lambda: arrays)), f"byte {position}"
    for length in range(0, len(whole), 50):
        path.write_bytes(whole[:length])
        assert same(features._cached(path, lambda: arrays)), f"cut to {length}"
        assert path.read_bytes() == whole


def test_a_cache_that_cannot_be_written_does_not_matter(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    path = features.epath.Path(tmp_path) / "file" / "cached.npz"
    assert features._cached(path, lambda: {"a": np.ones(1)})["a"] == 1


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("SEQRF_CACHE", raising=False)
    assert str(features.cache_folder()) == os.path.expanduser("~/.cache/seqrf")
    monkeypatch.setenv("SEQRF_CACHE", str(tmp_path))
    assert str(features.cache_folder()) == str(tmp_path)


def test_real_features_are_those_of_all_images_and_computed_once(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (23, 4, 4, 3), np.uint8)
    calls = []

    def means(batch):
        calls.append(len(batch))
        return batch.reshape(len(batch), -1)[:, :2].astype(np.float32), np.zeros((len(batch), 2), np.float32)

    network = features.FeatureNetwork("means", "means 1", means)
    source = datasets.ArraySource("some", images)
    expected = images.reshape(23, -1)[:, :2]
    for _ in range(2):
        np.testing.assert_array_equal(features.real_features(network, source, 10, tmp_path), expected)
        assert calls == [10, 10, 3]
    other = features.FeatureNetwork("means", "means 2", means)
    features.real_features(other, source, 10, tmp_path)
    features.real_features(network, datasets.ArraySource("others", images[:5]), 10, tmp_path)
    assert calls == [10, 10, 3, 10, 10, 3, 5]
    monkeypatch.setattr(features, "MAX_REAL", 12)
    np.testing.assert_array_equal(features.real_features(network, source, 10, tmp_path), expected[:12])


# ---- Inception


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


PHOTOGRAPHS = ml_collections.ConfigDict({"dataset": "CIFAR10", "num_channels": 3})


def test_inception_from_a_folder(tiny_inception):
    network = features.feature_network(PHOTOGRAPHS, tiny_inception)
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


def test_inceptions_identity_is_its_content(tiny_inception, tmp_path):
    tf.saved_model.save(HalfInception(), str(tmp_path))
    folders = [features.epath.Path(folder) for folder in (tiny_inception, tmp_path)]
    first, again, other = (features._digest(folders[i]) for i in (0, 0, 1))
    assert first == again != other


def test_a_folder_without_inception_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"eval\.inception_path = /nowhere holds no SavedModel"):
        features.feature_network(PHOTOGRAPHS, "/nowhere")
    tf.saved_model.save(HalfInception(), str(tmp_path / "half"))
    with pytest.raises(InputError, match="does not give pool_3"):
        features.inception(str(tmp_path / "half"))
    tf.saved_model.save(tf.Module(), str(tmp_path / "empty"))
    with pytest.raises(InputError, match="is not an Inception network"):
        features.inception(str(tmp_path / "empty"))
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/saved_model.pb").write_bytes(b"\x01\x02")
    with pytest.raises(InputError, match="is not an Inception network"):
        features.inception(str(tmp_path / "damaged"))


def test_the_handle_is_tf_gans():
    assert tensorflow_gan().eval.INCEPTION_TFHUB == features.INCEPTION_HANDLE
    assert tensorflow_gan().eval.INCEPTION_DEFAULT_IMAGE_SIZE == features.INCEPTION_SIZE


def test_inception_out_of_reach_is_an_error_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("TFHUB_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(features, "_answers", lambda url, seconds: False)
    with pytest.raises(InputError, match=r"cannot be reached.*--config\.eval\.inception_path=FOLDER") as error:
        features.feature_network(PHOTOGRAPHS, "none")
    assert "\n" not in str(error.value)


def test_a_failing_download_is_an_error_with_the_remedy(tmp_path, monkeypatch):
    import tensorflow_hub

    def fail(handle):
        raise OSError(f"no more of {handle}")

    monkeypatch.setenv("TFHUB_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(features, "_answers", lambda url, seconds: True)
    monkeypatch.setattr(tensorflow_hub, "resolve", fail)
    with pytest.raises(InputError, match=r"no more of https.*--config\.eval\.inception_path=FOLDER"):
        features.inception("none")


def test_inception_in_tf_hubs_cache_needs_no_network(tiny_inception, tmp_path, monkeypatch):
    monkeypatch.setenv("TFHUB_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(features, "_answers", lambda url, seconds: False)
    from tensorflow_hub import compressed_module_resolver

    name = Path(compressed_module_resolver._module_dir(features.INCEPTION_HANDLE)).name
    os.symlink(tiny_inception, tmp_path / name)
    assert features.inception("none").features_and_logits(np.zeros((2, 8, 8, 3), np.uint8))[0].shape == (2, 3)


def test_waiting_for_a_server_has_a_limit():
    with socket.socket() as silent:  # accepts connections and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        assert not features._answers(f"http://127.0.0.1:{silent.getsockname()[1]}/", 0.5)
    assert not features._answers("http://127.0.0.1:9/", 0.5)
