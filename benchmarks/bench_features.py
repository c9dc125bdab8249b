"""Images per second through Inception by TensorFlow and as a JAX program, and whether both compute the same.

    python -m benchmarks.bench_features [--inception FOLDER] [--images 64] [--backends tensorflow,jax]

Without a folder it writes a SavedModel with Inception's interface and architecture and random weights (tf_keras's
InceptionV3 with 1008 classes). Exits with 1 if features or logits differ by more than 1e-5 of their largest value.
TensorFlow runs on the CPU, JAX on all local devices.
"""

import argparse
import pathlib
import sys
import tempfile
import time
from typing import Any

TOLERANCE = 1e-5


def save_random_inception(folder: pathlib.Path) -> None:
    """Writes a SavedModel that maps images to 'pool_3' and 'logits' as TF-GAN's does."""
    import runtime

    tf: Any = runtime.tensorflow_on_cpu()
    import tf_keras

    tf_keras.utils.set_random_seed(0)
    network = tf_keras.applications.InceptionV3(weights=None, classes=1008, classifier_activation=None)
    outputs = network.get_layer("avg_pool").output, network.output
    both = tf_keras.Model(network.input, outputs)

    class Inception(tf.Module):
        def __init__(self):
            self.network = both

        @tf.function(input_signature=[tf.TensorSpec([None, None, None, 3], tf.float32)])
        def __call__(self, images):
            pool, logits = self.network(images, training=False)
            return {"pool_3": pool[:, None, None], "logits": logits}

    tf.saved_model.save(Inception(), str(folder))


def measured(folder: str, backend: str, images):
    """(features, logits) and images/s, without loading and compiling, of which the seconds are printed."""
    from metrics import inception

    began = time.perf_counter()
    network = inception.inception(folder, backend)
    network.features_and_logits(images)
    ready = time.perf_counter()
    found = network.features_and_logits(images)
    rate = len(images) / (time.perf_counter() - ready)
    print(f"{backend}: {rate:.2f} images/s; loading, compiling and a first pass took {ready - began:.0f} s")
    return found


def main() -> int:
    """The script; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inception", help="folder of a SavedModel; default: random weights")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--backends", default="tensorflow,jax")
    options = parser.parse_args()
    import jax
    import numpy as np

    images = np.random.default_rng(0).integers(0, 256, (options.images, 32, 32, 3), np.uint8)
    print(f"{options.images} images of 32 x 32, {jax.local_device_count()} x {jax.devices()[0].device_kind}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.inception
        if folder is None:
            folder = scratch
            save_random_inception(pathlib.Path(scratch))
        found = [measured(folder, backend, images) for backend in options.backends.split(",")]
    if len(found) == 1:
        return 0
    worst = [float(np.abs(a - b).max() / np.abs(a).max()) for a, b in zip(*found, strict=True)]
    print(f"largest difference: features {worst[0]:.1e}, logits {worst[1]:.1e} of the largest (asked: {TOLERANCE:g})")
    return int(max(worst) > TOLERANCE)


if __name__ == "__main__":
    import runtime

    runtime.set_environment()
    sys.exit(main())
