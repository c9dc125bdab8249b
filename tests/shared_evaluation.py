"""The evaluation of a flow in closed form by the devices of one or of two processes, for tests/test_evaluation.py.

    python tests/shared_evaluation.py FOLDER

writes the metrics and the seconds of every process, as JSON; the pictures are the first one's.
"""

import sys

import jax
import numpy as np
from etils import epath
from exact_flows import EULER, GAUSSIAN, SHAPE, UNEVEN, Gaussian, sampler_of, velocity_fn

import datasets
import distributed
import evaluation
import models
import utils
from metrics import feature_networks, reference
from metrics.floor import floor


def pixels(images):
    """Eight features and two classes of images on the devices."""
    flat = images.reshape(len(images), -1).astype(jax.numpy.float32) / 255
    return jax.numpy.concatenate([flat, flat**2], axis=1), flat[:, :2]


def main(folder: str) -> None:
    """Evaluates 21 samples in batches of 8 against 37 images in batches of 8."""
    distributed.start_hosts()
    models.velocity_fn = velocity_fn
    folder, place = epath.Path(folder), jax.process_index()
    rng = np.random.default_rng(0)
    splits = {name: rng.integers(0, 256, (n, *SHAPE), np.uint8) for name, n in (("train", 37), ("test", 13))}
    datasets.image_source = lambda data, split="train": datasets.ArraySource(split, splits[split])
    network = feature_networks.device_network("pixels", "1", pixels, "none")
    cache = folder / f"cache_{place}"  # hosts that share no disk
    real = reference.of_images(network, datasets.image_source(None), 8, cache_dir=cache)
    assert real.count == len(real.features) == 37
    protocol = evaluation.Protocol(
        num_samples=21,
        straightness_samples=8,
        batch_size=8,
        boundaries=UNEVEN,
        centered=True,
        precision_recall_samples=20,
        nearest_samples=7,
        floor=floor(real, datasets.DataOptions("digits", 8, 1), 8, None, cache),
    )
    sampler = sampler_of(Gaussian(), EULER, UNEVEN)
    exact = evaluation.reference_samples(sampler, GAUSSIAN, 8, 8)
    references = {"truncation_error": lambda: exact}
    found = evaluation.evaluate_checkpoint(sampler, GAUSSIAN, protocol, real, folder / f"host_{place}", references)
    samples = evaluation.draw_samples(sampler, GAUSSIAN, 21, 8, network=network, centered=True, kept_images=21)
    utils.write_arrays(folder / f"samples_{place}.npz", features=samples.features, images=samples.images)
    utils.write_json(folder / f"metrics_{place}.json", found | {"own_images": samples.cost.images})
    assert distributed.agreed(place == 0)
    distributed.sync("end")


if __name__ == "__main__":
    main(*sys.argv[1:])
