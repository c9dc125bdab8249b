"""LSUN bedroom, 256 x 256, images in [0, 1] (not centered), through TFDS.

    python -c "import tensorflow_datasets as tfds; tfds.load('lsun/bedroom')"
    python main.py --config=configs/rf/lsun_bedroom_256_rf_continuous.py --workdir=runs/lsun_bedroom_256 \
        --mode=train --config.model.rf_phase=1

Source: the public PyTorch configuration bedroom_rf_gaussian.py (arXiv 2209.03003), whose checkpoint
--config.training.import_torch=CHECKPOINT reads. Its images are in [0, 1]: the network itself maps them by 2 x - 1.
What it costs: see ncsnpp_256.py. Time and result: not run here.
"""

import ml_collections

from configs.recipes import apply_recipe
from configs.rf.ncsnpp_256 import get_256_config


def get_config(recipe: str = "paper") -> ml_collections.ConfigDict:
    """The public network for LSUN bedroom; `recipe`: see configs/recipes.py."""
    config = get_256_config(sigma_max=378.0)
    config.data.update(dataset="LSUN", category="bedroom", centered=False)
    return apply_recipe(config, recipe)
