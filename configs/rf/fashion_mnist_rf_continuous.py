"""Fashion-MNIST, 28 x 28 grey, through TFDS.

    python -m scripts.prepare_dataset fashion_mnist --from /usr/share/datasets/fashion-mnist
    python main.py --config=configs/rf/fashion_mnist_rf_continuous.py --mode=train --config.model.rf_phase=1 \
        --workdir=runs/fashion_mnist

Source: CIFAR-10's network with half the width and blocks; chosen here, not published anywhere. Not run here: it is
meant for one accelerator. The 14 x 14 configuration trains on a CPU.
"""

import ml_collections

from configs.default import get_default_config
from configs.recipes import apply_recipe


def get_config(recipe: str = "paper") -> ml_collections.ConfigDict:
    """A network of three resolutions for 28 x 28 images; `recipe`: see configs/recipes.py."""
    config = get_default_config()
    # Shoes point to the left in this data set: mirrored images are not in it.
    config.data.update(dataset="FASHION_MNIST", image_size=28, num_channels=1, random_flip=False)
    config.model.update(nf=64, ch_mult=(1, 2, 2), num_res_blocks=2, attn_resolutions=(14,), dropout=0.1)
    config.rf.update(n_iters=100_001, ema_rate=0.9999)
    config.training.update(batch_size=128, n_reflow_data=100_000)
    config.sampling.update(tol=1e-4)
    config.eval.update(batch_size=512, num_samples=10_000)
    return apply_recipe(config, recipe)
