"""scikit-learn's 1797 digits, 8 x 8 grey: the whole method in minutes on a laptop, without a download.

    bash scripts/quickstart.sh

runs every stage, in 8 to 10 minutes on 2 CPU cores; README.md shows the results. Source: chosen here.
"""

import ml_collections

from configs.default import get_default_config
from configs.recipes import apply_recipe


def get_config(recipe: str = "paper") -> ml_collections.ConfigDict:
    """A network of 195,000 parameters, 1400 updates of 1-RF; `recipe`: see configs/recipes.py."""
    config = get_default_config()
    config.data.update(dataset="digits", image_size=8, num_channels=1, random_flip=False)
    config.model.update(nf=16, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), dropout=0.0)
    config.rf.update(n_iters=1_400, ema_rate=0.999)
    config.reflow.update(n_iters=750, ema_rate=0.995)
    config.training.update(
        batch_size=64,
        n_jitted_steps=1,
        log_freq=100,
        snapshot_freq=1_400,
        snapshot_freq_for_preemption=500,
        n_reflow_data=4_096,
        gen_reflow_size=256,
        reflow_file_size=1_024,
    )
    config.optim.update(lr=1e-3, warmup=100)
    config.sampling.update(tol=1e-3)
    config.eval.update(batch_size=256, num_samples=2_048, straightness_samples=32)
    return apply_recipe(config, recipe)
