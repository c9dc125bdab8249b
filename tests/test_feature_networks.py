"""Classifiers as feature networks, networks on devices, and the files in which results are cached."""

import os

import jax
import numpy as np
import pytest
from etils import epath

import datasets
import distributed
import evaluation
import runtime
from metrics import feature_networks, reference

# ---- classifiers of labelled sets

DIGITS = datasets.DataOptions("digits", 8, 1)


@pytest.fixture(scope="module")
def classifier_cache(tmp_path_factory):
    """A cache folder that holds a trained classifier of the digits, the only one there is."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_networks, "KEPT_CLASSIFIERS", folder / "none")
        feature_networks.label_classifier(DIGITS, folder)
        yield folder


def test_the_kept_classifier_is_taken_before_one_is_trained_and_is_told_by_its_weights(tmp_path, monkeypatch):
    kept = feature_networks.label_classifier(DIGITS, tmp_path)
    assert not list(tmp_path.iterdir())
    _, test = feature_networks._shuffled_digits()
    assert np.mean(kept.features_and_logits(test.images)[1].argmax(1) == test.labels) >= 0.97
    (path,) = feature_networks.KEPT_CLASSIFIERS.glob("digits_*")
    with np.load(path) as arrays:
        others = {name: arrays[name] for name in arrays["names"]}
    others["Dense_0/bias"] = others["Dense_0/bias"] + np.float32(1e-6)
    feature_networks.write_arrays(epath.Path(tmp_path / path.name), names=np.array(list(others)), **others)
    monkeypatch.setattr(feature_networks, "KEPT_CLASSIFIERS", tmp_path)
    assert feature_networks.label_classifier(DIGITS).identity != kept.identity


def test_the_classifier_recognizes_digits_that_it_was_not_trained_on(classifier_cache):
    network = feature_networks.label_classifier(DIGITS, classifier_cache)
    _, test = feature_networks._shuffled_digits()
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
    zoomed = datasets.DataOptions("ZOOMED", 16, 1)
    with caplog.at_level("INFO", "seqrf"):
        network = reference.feature_network(zoomed, reference.Options(), tmp_path)
    assert network.name == "zoomed_16_classifier"
    found, logits = network.features_and_logits(images[split["test"]])
    assert found.shape == (397, feature_networks.RECIPE.features)
    accuracy = np.mean(logits.argmax(1) == labels[split["test"]])
    assert accuracy >= 0.9
    assert f"zoomed_16_classifier, test accuracy {accuracy:.4f}" in caplog.text
    again = feature_networks.train_classifier(
        feature_networks.LabelClassifier(feature_networks.RECIPE.widths, feature_networks.RECIPE.features, 10),
        feature_networks.LabelledImages(images[split["train"]], labels[split["train"]]),
        feature_networks.RECIPE,
    )
    (path,) = tmp_path.glob("zoomed_16_classifier_*.npz")
    with np.load(path) as kept:
        np.testing.assert_array_equal(kept["Dense_1/kernel"], again["Dense_1"]["kernel"])


def test_the_classifiers_distance_grows_with_the_damage_to_the_images(classifier_cache):
    network = feature_networks.label_classifier(DIGITS, classifier_cache)
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
    network = feature_networks.label_classifier(DIGITS, classifier_cache)
    images = datasets.digits()[0]
    whole = network.features_and_logits(images[:700])[0]
    parts = [network.features_and_logits(images[start:stop])[0] for start, stop in [(0, 3), (3, 600), (600, 700)]]
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-6)


def test_the_classifier_is_read_back_and_a_damaged_one_is_trained_again_to_the_same(classifier_cache, monkeypatch):
    (path,) = classifier_cache.glob("*")
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    network = feature_networks.label_classifier(DIGITS, classifier_cache)
    assert path.read_bytes() == whole
    monkeypatch.setattr(feature_networks, "train_classifier", None)
    again = feature_networks.label_classifier(DIGITS, classifier_cache)
    images = datasets.digits()[0][:20]
    for x, y in zip(again.features_and_logits(images), network.features_and_logits(images), strict=True):
        np.testing.assert_array_equal(x, y)


# ---- caches


def test_a_cache_file_damaged_anywhere_is_computed_again(tmp_path):
    path = tmp_path / "cached.npz"
    arrays = {"a": np.arange(2, dtype=np.float32), "b/c": np.ones((1, 1))}

    def same(found):
        return set(found) == set(arrays) and all(np.array_equal(found[name], arrays[name]) for name in arrays)

    assert same(feature_networks.cached(path.name, lambda: arrays, tmp_path))
    whole = path.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 0xFF
        path.write_bytes(bytes(damaged))
        assert same(feature_networks.cached(path.name, lambda: arrays, tmp_path)), f"byte {position}"
    for length in range(0, len(whole), 50):
        path.write_bytes(whole[:length])
        assert same(feature_networks.cached(path.name, lambda: arrays, tmp_path)), f"cut to {length}"
        assert path.read_bytes() == whole


def test_a_cache_that_cannot_be_written_does_not_matter(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    assert feature_networks.cached("cached.npz", lambda: {"a": np.ones(1)}, tmp_path / "file")["a"] == 1


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("SEQRF_CACHE", raising=False)
    assert str(runtime.cache_folder()) == os.path.expanduser("~/.cache/seqrf")
    monkeypatch.setenv("SEQRF_CACHE", str(tmp_path))
    assert str(runtime.cache_folder()) == str(tmp_path)


def test_networks_on_devices_take_any_number_of_images_and_leave_them_there():
    def apply(images):
        flat = images.reshape(len(images), -1).astype(jax.numpy.float32)
        return flat[:, :2], flat[:, 2:5]

    network = feature_networks.device_network("some", "1", apply, "none")
    images = np.random.default_rng(0).integers(0, 256, (7, 2, 3, 1), np.uint8)
    for count in (1, 6, 7):
        found, logits = network.features_and_logits(images[:count])
        np.testing.assert_array_equal(found, images.reshape(7, -1)[:count, :2])
        np.testing.assert_array_equal(logits, images.reshape(7, -1)[:count, 2:5])
    on_devices = distributed.map_devices(lambda x: x)(images[:6].reshape(2, 3, 2, 3, 1))
    found, logits = network.on_devices(on_devices)
    assert {part.device for part in found.addressable_shards} == set(jax.local_devices())
    for x, y in zip(network.measure(on_devices), network.features_and_logits(images[:6]), strict=True):
        np.testing.assert_array_equal(x, y)


# ---- pixels


def test_pixels_are_the_means_of_fields_on_every_device():
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    network = reference.feature_network(datasets.DataOptions("IMAGES", 32, 3), reference.Options(network="pixels"))
    found, logits = network.features_and_logits(images)
    means = np.asarray(images, np.float64).reshape(5, 8, 4, 8, 4, 3).mean(axis=(2, 4)) / 255
    assert found.shape == (5, 192)
    np.testing.assert_allclose(found, means.reshape(5, -1), atol=1e-6)
    even = network.features_and_logits(np.full((2, 28, 28, 3), 51, np.uint8))[0]  # 3.5 pixels a field
    np.testing.assert_allclose(even, 0.2, atol=1e-6)
    assert evaluation.inception_score(logits) == pytest.approx(1)
    assert network.name == "pixels_8"
