"""CelebA-HQ, 256 x 256, through TFDS (`celeb_a_hq/256`) or from a folder of pictures.

    python main.py --config=configs/rf/celebahq_256_rf_continuous.py --workdir=runs/celebahq_256 \
        --mode=train --config.model.rf_phase=1

TFDS prepares it from the file data256x256.tar in its folder of manual downloads. With a folder of pictures instead:

    python -m scripts.prepare_dataset images --from FOLDER --to DATA_DIR --size 256

and --config.data.dataset=IMAGES --config.data.data_dir=DATA_DIR.

Source: the public PyTorch configuration celeba_hq_pytorch_rf_gaussian.py (arXiv 2209.03003), whose checkpoint
--config.training.import_torch=CHECKPOINT reads.
What it costs: see ncsnpp_256.py. Time and result: not run here.
"""

import ml_collections

from configs.recipes import apply_recipe
from configs.rf.ncsnpp_256 import get_256_config


def get_config(recipe: str = "paper") -> ml_collections.ConfigDict:
    """The public network for CelebA-HQ; `recipe`: see configs/recipes.py."""
    config = get_256_config(sigma_max=378.0)
    config.data.update(dataset="CELEBAHQ")
    return apply_recipe(config, recipe)
