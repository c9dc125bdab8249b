"""ImageNet, 64 x 64, without labels, through TFDS (`downsampled_imagenet/64x64`).

    python -c "import tensorflow_datasets as tfds; tfds.load('downsampled_imagenet/64x64')"
    python main.py --config=configs/rf/imagenet_64_rf_continuous.py --workdir=runs/imagenet_64 \
        --mode=train --config.model.rf_phase=1

Source: the CelebA-64 network, as in arXiv 2402.06461; there is no public checkpoint of it. Time and result: not run
here.
"""

import ml_collections

from configs.rf import celeba_64_rf_continuous


def get_config(recipe: str = "paper") -> ml_collections.ConfigDict:
    """CelebA-64's settings on ImageNet; `recipe`: see configs/recipes.py."""
    config = celeba_64_rf_continuous.get_config(recipe)
    config.data.update(dataset="IMAGENET")
    return config
