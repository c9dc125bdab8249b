"""AFHQ-Cat, 256 x 256, from its folder of training pictures (afhq/train/cat).

    python -m scripts.prepare_dataset images --from afhq/train/cat --to DATA_DIR --size 256
    python main.py --config=configs/rf/afhq_cat_256_rf_continuous.py --workdir=runs/afhq_cat_256 \
        --mode=train --config.model.rf_phase=1 --config.data.data_dir=DATA_DIR

Source: the public PyTorch configuration afhq_cat_pytorch_rf_gaussian.py (arXiv 2209.03003), whose checkpoint
--config.training.import_torch=CHECKPOINT reads.
What it costs: see ncsnpp_256.py. Time and result: not run here.
"""

import ml_collections

from configs.recipes import apply_recipe
from configs.rf.ncsnpp_256 import get_256_config


def get_config(recipe: str = "paper") -> ml_collections.ConfigDict:
    """The public network for AFHQ-Cat; `recipe`: see configs/recipes.py."""
    config = get_256_config(sigma_max=378.0)
    config.data.update(dataset="IMAGES")
    return apply_recipe(config, recipe)
