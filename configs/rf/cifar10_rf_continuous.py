"""CIFAR-10, 32 x 32, through TFDS.

    python -c "import tensorflow_datasets as tfds; tfds.load('cifar10')"
    python main.py --config=configs/rf/cifar10_rf_continuous.py --workdir=runs/cifar10 \
        --mode=train --config.model.rf_phase=1

Source: the public PyTorch configuration cifar10_rf_gaussian_ddpmpp.py (arXiv 2209.03003), whose checkpoint
--config.training.import_torch=CHECKPOINT reads: 61,804,419 parameters. The published training took 1,300,001 updates:
--config.training.n_iters=1300001.

Recommended batches on TPUs (train, evaluate): (512, 2048) on v3-8, (512, 1024) on v2-8. A million pairs take 25 GB.
Time and result: not run here; arXiv 2209.03003 reports FID 2.58 for its 1-RF, sampled by RK45 in 127 calls.
"""

import ml_collections

from configs.default import get_default_config
from configs.recipes import apply_recipe


def get_config(recipe: str = "paper") -> ml_collections.ConfigDict:
    """The public network for CIFAR-10: the defaults, at the published batch size; `recipe`: see configs/recipes.py."""
    config = get_default_config()
    config.training.update(batch_size=128)
    return apply_recipe(config, recipe)
