"""CelebA, its central 140 x 140 resized to 64 x 64, through TFDS.

    python -c "import tensorflow_datasets as tfds; tfds.load('celeb_a')"
    python main.py --config=configs/rf/celeba_64_rf_continuous.py --workdir=runs/celeba_64 \
        --mode=train --config.model.rf_phase=1

Source: the network that the authors of SeqRF (arXiv 2402.06461) trained; there is no public checkpoint of it.
62,693,251 parameters. Time and result: not run here.
"""

import ml_collections

from configs.default import get_default_config
from configs.recipes import apply_recipe


def get_config(recipe: str = "paper") -> ml_collections.ConfigDict:
    """CIFAR-10's network with filtered resampling and a residual input pyramid; `recipe`: see configs/recipes.py."""
    config = get_default_config()
    config.data.update(dataset="CELEBA", image_size=64)
    config.model.update(fir=True, progressive_input="residual", dropout=0.1)
    config.rf.update(ema_rate=0.9999)
    config.training.update(batch_size=128, gen_reflow_size=512, reflow_file_size=4_096)
    config.eval.update(batch_size=512)
    return apply_recipe(config, recipe)
