"""Features of real images: all of them, once, kept, shared in a process, and read from files."""

import json

import numpy as np
import pytest

import datasets
from metrics import distances, feature_networks, reference
from utils import InputError

SHAPE = (4, 4, 3)
DATA = datasets.DataOptions("IMAGES", 4, 3)


def first_pixels(images):
    return images.reshape(len(images), -1)[:, :2].astype(np.float32), np.zeros((len(images), 2), np.float32)


def network(identity="1", function=first_pixels):
    return feature_networks.FeatureNetwork("first_pixels", identity, function, preprocessing="none")


@pytest.fixture(scope="module")
def source():
    return datasets.ArraySource("some 1.0", np.random.default_rng(0).integers(0, 256, (23, *SHAPE), np.uint8))


def test_features_are_those_of_all_images_and_computed_once(source, tmp_path):
    calls = []

    def counted(images):
        calls.append(len(images))
        return first_pixels(images)

    expected = first_pixels(source.read(0, 23))[0]
    for _ in range(2):
        found = reference.of_images(network(function=counted), source, 10, cache_dir=tmp_path)
        np.testing.assert_array_equal(found.features, expected)
        assert calls == [10, 10, 10]
    np.testing.assert_allclose(found.moments.mean, expected.mean(0, np.float64))
    np.testing.assert_allclose(found.moments.covariance, np.cov(expected.astype(float), rowvar=False))
    np.testing.assert_array_equal(found.kernel_sums, distances.kernel_sums(expected))
    record = {"data": "some 1.0", "split": "train", "images": 23, "network": "first_pixels", "network_identity": "1"}
    assert record.items() <= found.record.items()
    assert found.count == 23
    reference.of_images(network("2", counted), source, 10, cache_dir=tmp_path)
    others = datasets.ArraySource("others", source.read(0, 5))
    assert reference.of_images(network("1", counted), others, 10, cache_dir=tmp_path).count == 5
    some = reference.of_images(network("1", counted), source, 10, max_real=12, cache_dir=tmp_path)
    np.testing.assert_array_equal(some.features, expected[:12])
    assert some.identity != found.identity
    assert calls == [10] * 6 + [10] + [10, 10]


def test_many_images_all_count_for_the_moments_and_some_are_kept(source, tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "KEPT", 7)
    found = reference.of_images(network(), source, 10, cache_dir=tmp_path)
    expected = first_pixels(source.read(0, 23))[0]
    np.testing.assert_allclose(found.moments.covariance, np.cov(expected.astype(float), rowvar=False))
    np.testing.assert_array_equal(found.features, expected[[0, 3, 6, 9, 13, 16, 19]])
    np.testing.assert_array_equal(expected[found.numbers], found.features)
    assert (found.count, found.record["features_kept"]) == (23, 7)


def test_a_process_has_one_object_for_one_configuration(source, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "image_source", lambda data: source)
    monkeypatch.setattr(reference, "feature_network", lambda *_: network())
    first = reference.real_data(DATA, reference.Options(), 10, tmp_path)
    assert reference.real_data(datasets.DataOptions("IMAGES", 4, 3), reference.Options(), 10, tmp_path) is first
    assert reference.real_data(DATA, reference.Options(max_real=5), 10, tmp_path).count == 5
    neighbours, radii = first.neighbourhood(9)
    np.testing.assert_array_equal(neighbours, first.features[np.arange(9) * 23 // 9])
    np.testing.assert_array_equal(radii, distances.squared_radii(neighbours, 3))
    assert first.neighbourhood(9)[1] is radii
    np.testing.assert_array_equal(first.images, source.read(0, 23))
    monkeypatch.setattr(reference, "PIXEL_BYTES", 23 * 48 - 1)
    assert reference.of_images(network(), source, 10, cache_dir=tmp_path).images is None


# ---- files


@pytest.fixture
def written(source, tmp_path):
    real = reference.of_images(network(), source, 10, cache_dir=tmp_path / "cache")
    reference.write_file(tmp_path / "real.npz", real)
    return tmp_path / "real.npz", real


def test_a_file_gives_the_same_distances(written):
    path, real = written
    read = reference.read_file(path, network(), DATA)
    np.testing.assert_array_equal(read.features, real.features)
    np.testing.assert_array_equal(read.moments.covariance, real.moments.covariance)
    np.testing.assert_array_equal(read.kernel_sums, real.kernel_sums)
    assert read.count == 23
    assert read.identity["file"] == "real.npz"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"network_identity": "2"}, "has network_identity 1, but this evaluation 2"),
        ({"image_size": 8}, r"has image_shape \[4, 4, 3\], but this evaluation \[8, 8, 3\]"),
        ({"levels": "0 to 1"}, "has levels 0 to 1, but this evaluation uint8, 0 to 255"),
    ],
)
def test_a_file_for_other_features_or_images_is_refused(written, other, message):
    path, _ = written
    used, data = (
        network(other.get("network_identity", "1")),
        datasets.DataOptions("IMAGES", other.get("image_size", 4), 3),
    )
    if "levels" in other:
        arrays = dict(np.load(path))
        record = json.loads(str(arrays["record"])) | {"levels": other["levels"]}
        np.savez(path, **arrays | {"record": np.array(json.dumps(record))})
    with pytest.raises(InputError, match=f"{message}.*make it again with scripts/reference_stats.py"):
        reference.read_file(path, used, data)


def test_files_of_other_programs(tmp_path, caplog):
    pool = np.random.default_rng(0).normal(size=(30, 2)).astype(np.float32)
    mu, sigma = pool.mean(0, np.float64), np.cov(pool.astype(float), rowvar=False)
    np.savez(tmp_path / "moments.npz", mu=mu, sigma=sigma)
    np.savez_compressed(tmp_path / "features.npz", pool_3=pool, logits=pool)
    moments, whole = (
        reference.read_file(tmp_path / f"{name}.npz", network(), DATA) for name in ("moments", "features")
    )
    assert "does not say which network" in caplog.text
    assert (moments.features, moments.count) == (None, None)
    assert whole.count == 30
    fake = pool[:20] + np.float32(0.5)
    assert distances.frechet_distance_to(moments.moments, fake) == pytest.approx(distances.frechet_distance(pool, fake))
    assert distances.frechet_distance_to(whole.moments, fake) == pytest.approx(distances.frechet_distance(pool, fake))
    np.testing.assert_array_equal(whole.kernel_sums, distances.kernel_sums(pool))


NAN = np.full((2, 2), np.nan)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(2)}, "has neither mu and sigma nor pool_3"),
        ({"images": np.zeros((3, 2))}, "has neither mu and sigma nor pool_3"),
        ({"mu": np.zeros(2), "sigma": np.zeros((2, 3))}, "of a wrong shape"),
        ({"mu": np.zeros(2), "sigma": NAN}, "not finite"),
        ({"pool_3": np.zeros((1, 2))}, "of a wrong shape"),
        ({"pool_3": np.zeros((9, 2), object)}, "is damaged, or is no .npz file"),
        ({"pool_3": np.zeros((9, 3))}, "is of 3 features, but first_pixels has 2"),
        ({"mu": np.zeros(5), "sigma": np.eye(5)}, "is of 5 features"),
    ],
)
def test_files_that_are_no_statistics_are_refused(arrays, message, tmp_path):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(InputError, match=message) as error:
        reference.read_file(tmp_path / "bad.npz", network(), DATA)
    assert "\n" not in str(error.value)


def test_missing_and_damaged_files_are_refused(written, tmp_path):
    with pytest.raises(InputError, match=r"eval\.reference: .*No such file or directory.*none\.npz"):
        reference.read_file(tmp_path / "none.npz", network(), DATA)
    path, _ = written
    whole = path.read_bytes()
    for damaged in (whole[:-200], whole[:300] + b"?" + whole[301:], b"text"):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"is damaged, or is no \.npz file"):
            reference.read_file(path, network(), DATA)
