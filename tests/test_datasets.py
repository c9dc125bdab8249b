"""Images in: order, sharing, resumption, ranges, crops and the errors that users see."""

import dataclasses
import itertools

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds

import datasets
from distributed import Host
from utils import InputError

ONE_DEVICE = Host(index=0, count=1, local_devices=1)


def config(dataset="digits", image_size=8, num_channels=1, **changes):
    options = {"dataset": dataset, "image_size": image_size, "num_channels": num_channels, "centered": False}
    return datasets.DataOptions(**(options | changes))


def scaled(images, centered):
    """uint8 images in the model's range, in double precision."""
    return images / 127.5 - 1 if centered else images / 255


def stored(folder, name, images, num_shards=1, category=None, shape=(None, None, 3)):
    """Writes images as the prepared TFDS data set `name`, without loss."""
    tfds.dataset_builders.store_as_tfds_dataset(
        name=name,
        config=category,
        version="1.0.0",
        data_dir=folder,
        features=tfds.features.FeaturesDict(
            {"image": tfds.features.Image(shape=shape, encoding_format="png"), "label": tfds.features.Scalar(np.int64)}
        ),
        split_datasets={"train": [(i, {"image": image, "label": i}) for i, image in enumerate(images)]},
        download_config=tfds.download.DownloadConfig(num_shards=num_shards),
        disable_shuffling=True,
    )


def numbered_images(count, shape=(32, 32, 3)):
    """Images whose first value is their number and whose other values are random."""
    images = np.random.default_rng(count).integers(0, 256, (count, *shape), np.uint8)
    images[:, 0, 0, 0] = np.arange(count)
    return images


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory):
    """(configuration, images) of a CIFAR-10 with 13 images in 3 files."""
    folder = tmp_path_factory.mktemp("tfds")
    images = numbered_images(13)
    stored(folder, "cifar10", images, num_shards=3, shape=(32, 32, 3))
    assert len(list(folder.glob("cifar10/1.0.0/*tfrecord*"))) == 3
    return config("CIFAR10", 32, 3, data_dir=str(folder)), images


def updates(data, count, *, batch_size, n_jitted_steps=1, host=ONE_DEVICE, seed=0, start_step=0):
    """The first `count` batches of a host."""
    stream = datasets.train_batches(
        data, seed=seed, batch_size=batch_size, n_jitted_steps=n_jitted_steps, start_step=start_step, host=host
    )
    return [batch["image"] for batch in itertools.islice(stream, count)]


def order(data, count, **options):
    """Which images come in the first `count` examples, by their numbers."""
    return [round(batch.flat[0] * 255) for batch in updates(data, count, batch_size=1, **options)]


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    images, labels = datasets.digits()
    assert images.shape == (1797, 8, 8, 1)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(np.unique(images), [round(value * 255 / 16) for value in range(17)])
    np.testing.assert_array_equal(np.rint(images[..., 0] / 255 * 16), load_digits().images)
    np.testing.assert_array_equal(labels, load_digits().target)


@pytest.mark.parametrize("centered", [False, True])
def test_unscale_inverts_the_scaling_and_clips(centered):
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    x = scaled(images, centered).astype(np.float32)
    back = datasets.unscale(x, centered)
    np.testing.assert_allclose(back, images / 255, atol=1e-7)
    assert datasets.unscale(10 * x, centered).max() == 1
    assert datasets.unscale(x - 10, centered).min() == 0


@pytest.mark.parametrize("centered", [False, True])
def test_batches_are_scaled_images_of_the_data_set(centered):
    (batch,) = updates(config(centered=centered), 1, batch_size=50, n_jitted_steps=2)
    assert batch.dtype == np.float32
    assert batch.shape == (1, 2, 50, 8, 8, 1)
    levels = (batch + 1) * 127.5 if centered else batch * 255
    np.testing.assert_allclose(levels, np.rint(levels), atol=1e-4)
    known = {image.tobytes() for image in datasets.digits()[0]}
    assert all(image.tobytes() in known for image in np.rint(levels).astype(np.uint8).reshape(100, 8, 8, 1))


def test_every_pass_has_every_image_once_in_an_order_of_its_own(cifar10):
    data, _ = cifar10
    places = order(data, 39)
    passes = [places[:13], places[13:26], places[26:]]
    assert all(sorted(one) == list(range(13)) for one in passes)
    assert len({tuple(one) for one in passes}) == 3
    assert places == order(data, 39)
    assert places[:13] != order(data, 13, seed=1)


@pytest.mark.parametrize("dataset", ["digits", "CIFAR10"])
def test_resuming_gives_the_same_batches(cifar10, dataset):
    data = config() if dataset == "digits" else cifar10[0]
    data = dataclasses.replace(data, random_flip=True, uniform_dequantization=True)
    batch_size = 300 if dataset == "digits" else 5
    whole = updates(data, 6, batch_size=batch_size, n_jitted_steps=2)
    for done in (1, 3, 5):
        rest = updates(data, 6 - done, batch_size=batch_size, n_jitted_steps=2, start_step=2 * done)
        np.testing.assert_array_equal(rest, whole[done:])


def test_every_pass_over_the_digits_has_every_image_once_in_an_order_of_its_own():
    passes = [[image.tobytes() for image in batch[0, 0]] for batch in updates(config(), 3, batch_size=1797)]
    known = sorted((image / np.float32(255)).tobytes() for image in datasets.digits()[0])
    assert all(sorted(one) == known for one in passes)
    assert len({tuple(one) for one in passes}) == 3


@pytest.mark.parametrize("dataset", ["digits", "CIFAR10"])
def test_the_stream_is_the_same_however_it_is_shared(cifar10, dataset):
    data = config() if dataset == "digits" else cifar10[0]
    data = dataclasses.replace(data, random_flip=True, uniform_dequantization=True)
    whole = np.concatenate([batch[0] for batch in updates(data, 4, batch_size=8)])
    hosts = [
        np.concatenate(updates(data, 2, batch_size=8, n_jitted_steps=2, host=Host(index, 2, 2)), axis=1)
        for index in range(2)
    ]
    assert hosts[0].shape == (2, 4, 2, *whole.shape[2:])
    devices = np.concatenate(hosts)  # [all devices, updates, images of a device, ...]
    np.testing.assert_array_equal(np.moveaxis(devices, 0, 1).reshape(whole.shape), whole)


def test_without_a_host_the_devices_of_this_process_share_the_batch():
    stream = datasets.train_batches(config(), seed=0, batch_size=6, n_jitted_steps=1)
    assert next(stream)["image"].shape == (2, 1, 3, 8, 8, 1)


def test_half_of_the_images_are_mirrored():
    plain, flipped = (
        updates(config(random_flip=flip), 1, batch_size=1000, n_jitted_steps=3)[0][0] for flip in (False, True)
    )
    same = (flipped == plain).all((-3, -2, -1))
    mirrored = (flipped == plain[:, :, :, ::-1]).all((-3, -2, -1))
    assert (same | mirrored).all()
    np.testing.assert_allclose(mirrored.mean(1), 0.5, atol=0.06)  # 4 standard deviations
    assert (mirrored[0] != mirrored[1]).any()


def test_dequantization_fills_each_level_evenly():
    plain = updates(config(), 1, batch_size=1000)[0]
    noisy = updates(config(uniform_dequantization=True), 1, batch_size=1000)[0]
    noise = noisy * 256 - np.rint(plain * 255)
    assert noisy.min() >= 0
    assert noisy.max() <= 1
    assert noise.min() >= -1e-4
    assert noise.max() <= 1 + 1e-4
    assert abs(noise.mean() - 0.5) < 4 * np.sqrt(1 / 12 / noise.size)
    assert abs(noise.var() - 1 / 12) < 2e-3
    centered = updates(config(uniform_dequantization=True, centered=True), 1, batch_size=1000)[0]
    np.testing.assert_allclose(centered, 2 * noisy - 1, atol=1e-6)


def test_reading_goes_in_order_over_files_and_round_the_end(cifar10):
    data, images = cifar10
    source = datasets.image_source(data)
    assert (source.size, source.image_shape) == (13, (32, 32, 3))
    assert source.name == "cifar10/1.0.0"
    np.testing.assert_array_equal(source.read(0, 13), images)
    for start, count in [(3, 7), (11, 5), (26, 1), (12, 30)]:
        np.testing.assert_array_equal(source.read(start, count), images[np.arange(start, start + count) % 13])
    assert source.read(4, 0).shape == (0, 32, 32, 3)
    with pytest.raises(ValueError, match="negative"):
        source.read(-1, 2)


def test_reading_the_digits():
    source = datasets.image_source(config())
    assert (source.name, source.size, source.image_shape) == ("digits", 1797, (8, 8, 1))
    images = datasets.digits()[0]
    np.testing.assert_array_equal(source.read(1790, 10), np.concatenate([images[1790:], images[:3]]))


def smooth_image(height, width):
    """Waves a few pixels long: a shift of half a pixel would show."""
    y, x, c = np.mgrid[:height, :width, :3]
    return np.rint(127.5 + 60 * np.sin(x / 4 + c) + 60 * np.cos(y / 5)).astype(np.uint8)


def resized(square, side):
    """Pillow's area-weighted bilinear resize, an independent implementation."""
    return np.asarray(PIL.Image.fromarray(square).resize((side, side), PIL.Image.Resampling.BILINEAR)).astype(int)


@pytest.mark.parametrize(
    ("dataset", "name", "category", "size", "crop"),
    [
        ("CELEBA", "celeb_a", None, (218, 178), np.s_[39:179, 19:159]),
        ("LSUN", "lsun", "church_outdoor", (61, 90), np.s_[:, 14:75]),
        ("LSUN", "lsun", "bedroom", (75, 60), np.s_[7:67, :]),
    ],
)
def test_photographs_are_cropped_and_resized(tmp_path, dataset, name, category, size, crop):
    image = smooth_image(*size)
    stored(tmp_path, name, [image], category=category)
    square = image[crop]
    full, small = (
        config(dataset, side, 3, category=category or "", data_dir=str(tmp_path)) for side in (len(square), 24)
    )
    np.testing.assert_array_equal(datasets.image_source(full).read(0, 1)[0], square)
    read = datasets.image_source(small).read(0, 1)[0]
    assert np.abs(read - resized(square, 24)).max() <= 1
    (batch,) = updates(small, 1, batch_size=1)
    np.testing.assert_allclose(batch[0, 0, 0], scaled(read, False), rtol=0, atol=1e-7)


def test_an_image_smaller_than_the_crop_is_named(tmp_path):
    stored(tmp_path, "celeb_a", [smooth_image(139, 178)])
    data = config("CELEBA", 64, 3, data_dir=str(tmp_path))
    with pytest.raises(InputError, match=r"celeb_a.*smaller than the 140 x 140 crop"):
        datasets.image_source(data).read(0, 1)
    with pytest.raises(InputError, match=r"celeb_a.*smaller than the 140 x 140 crop"):
        updates(data, 1, batch_size=1)


def test_a_damaged_file_is_one_line(tmp_path):
    stored(tmp_path, "cifar10", numbered_images(4), shape=(32, 32, 3))
    (file,) = tmp_path.glob("cifar10/1.0.0/*tfrecord*")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"cifar10/1\.0\.0 cannot be read: corrupted record at \d+$"):
        updates(config("CIFAR10", 32, 3, data_dir=str(tmp_path)), 1, batch_size=4)


@pytest.mark.parametrize(
    ("dataset", "category", "name"),
    [
        ("CIFAR10", "", "cifar10"),
        ("CELEBA", "", "celeb_a"),
        ("LSUN", "church_outdoor", "lsun/church_outdoor"),
        ("IMAGENET", "", "downsampled_imagenet/64x64"),
        ("CELEBAHQ", "", "celeb_a_hq/256"),
    ],
)
def test_a_missing_data_set_is_refused(tmp_path, dataset, category, name):
    with pytest.raises(InputError) as error:
        datasets.image_source(config(dataset, 32, 3, category=category, data_dir=str(tmp_path)))
    message = str(error.value)
    assert "\n" not in message
    assert f"{name} is not in data.data_dir = {tmp_path}" in message
    assert f"tfds.load('{name}', data_dir='{tmp_path}')" in message


@pytest.mark.parametrize(("dataset", "job"), [("FASHION_MNIST", "fashion_mnist"), ("IMAGES", "images")])
def test_what_the_script_prepares_is_said(tmp_path, dataset, job):
    with pytest.raises(InputError, match=rf"scripts\.prepare_dataset {job} --from FOLDER --to {tmp_path}") as error:
        datasets.image_source(config(dataset, 28, 1, data_dir=str(tmp_path)))
    assert "\n" not in str(error.value)


def test_labels_and_the_test_split_in_the_order_of_reading(tmp_path):
    features = tfds.features.FeaturesDict(
        {"image": tfds.features.Image(shape=(28, 28, 1)), "label": tfds.features.ClassLabel(num_classes=10)}
    )
    rows = {
        split: [(i, {"image": np.full((28, 28, 1), 10 * label, np.uint8), "label": label}) for i, label in labels]
        for split, labels in {"train": enumerate([3, 1, 4, 1, 5, 9, 2]), "test": enumerate([6, 5, 3])}.items()
    }
    tfds.dataset_builders.store_as_tfds_dataset(
        name="fashion_mnist", version="3.0.1", data_dir=tmp_path, features=features, split_datasets=rows
    )
    data = config("FASHION_MNIST", 14, 1, data_dir=str(tmp_path))
    for split, labels in {"train": [3, 1, 4, 1, 5, 9, 2], "test": [6, 5, 3]}.items():
        source = datasets.image_source(data, split)
        assert source.image_shape == (14, 14, 1)
        assert sorted(source.labels()) == sorted(labels)
        np.testing.assert_array_equal(source.read(0, source.size)[:, 7, 7, 0], 10 * source.labels())
    with pytest.raises(InputError, match="no images in a split 'validation'"):
        datasets.image_source(data, "validation")
    with pytest.raises(InputError, match=r"image_size = 32, but the images of fashion_mnist/3\.0\.1 are 28 x 28"):
        datasets.image_source(config("FASHION_MNIST", 32, 1, data_dir=str(tmp_path)))


def test_labels_of_the_digits_and_of_data_without_labels():
    np.testing.assert_array_equal(datasets.image_source(config()).labels(), datasets.digits()[1])
    with pytest.raises(InputError, match="no split 'test'"):
        datasets.image_source(config(), "test")
    with pytest.raises(InputError, match="noise has no labels"):
        datasets.ArraySource("noise", np.zeros((2, 4, 4, 1), np.uint8)).labels()


def test_a_missing_data_set_in_the_default_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    with pytest.raises(InputError, match=rf"{tmp_path}.*tfds\.load\('cifar10'\)"):
        datasets.image_source(config("CIFAR10", 32, 3))


def test_a_missing_file_is_named(tmp_path):
    stored(tmp_path, "cifar10", numbered_images(4), num_shards=2, shape=(32, 32, 3))
    file = sorted(tmp_path.glob("cifar10/1.0.0/*tfrecord*"))[1]
    file.unlink()
    with pytest.raises(InputError, match=file.name):
        datasets.image_source(config("CIFAR10", 32, 3, data_dir=str(tmp_path)))


def test_another_file_format_is_refused(tmp_path):
    stored(tmp_path, "cifar10", numbered_images(4), shape=(32, 32, 3))
    info = tmp_path / "cifar10/1.0.0/dataset_info.json"
    info.write_text(info.read_text().replace('"tfrecord"', '"array_record"'))
    with pytest.raises(InputError, match="stored as array_record, not tfrecord"):
        datasets.image_source(config("CIFAR10", 32, 3, data_dir=str(tmp_path)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "MNIST"}, "'MNIST' is not known; it can be digits, CIFAR10, FASHION_MNIST, CELEBA"),
        ({"dataset": "LSUN"}, "needs data.category"),
        ({"num_channels": 3}, "data.num_channels = 3, but the images of digits have 1"),
        ({"image_size": 16}, "data.image_size = 16, but the digits are 8 x 8"),
    ],
)
def test_wrong_settings_are_named(changes, message):
    with pytest.raises(InputError, match=message):
        datasets.image_source(config(**changes))


@pytest.mark.parametrize("batch_size", [0, 6])
def test_a_batch_that_the_devices_cannot_share_is_refused_before_reading(batch_size):
    with pytest.raises(InputError, match=f"batch_size = {batch_size} cannot be shared by 4 devices"):
        datasets.train_batches(config("none"), seed=0, batch_size=batch_size, n_jitted_steps=1, host=Host(0, 2, 2))
