"""Own colour pictures at 32 x 32: between the digits and the 62 million parameters of CIFAR-10's network.

    python -m scripts.prepare_dataset images --from FOLDER --to DATA_DIR --size 32
    python main.py --mode=train --config=configs/rf/small_32_rf_continuous.py --workdir=runs/small \
        --config.data.data_dir=DATA_DIR --config.model.rf_phase=1

`bash scripts/own_images.sh FOLDER` does all of it. Source: chosen here, not published anywhere.
"""

import ml_collections

from configs.default import get_default_config
from configs.recipes import apply_recipe


def get_config(recipe: str = "paper") -> ml_collections.ConfigDict:
    """A network of 711,000 parameters for pictures of 16 x 16 or 32 x 32; `recipe`: see configs/recipes.py."""
    config = get_default_config()
    config.data.update(dataset="IMAGES", image_size=32, num_channels=3, random_flip=True)
    config.model.update(nf=24, ch_mult=(1, 2, 2), num_res_blocks=1, attn_resolutions=(8,), dropout=0.0)
    config.rf.update(n_iters=20_000, ema_rate=0.999)
    config.reflow.update(n_iters=10_000, ema_rate=0.999)
    config.training.update(
        batch_size=64,
        log_freq=100,
        snapshot_freq=5_000,
        snapshot_freq_for_preemption=500,
        n_reflow_data=16_384,
        gen_reflow_size=256,
        reflow_file_size=4_096,
    )
    config.optim.update(lr=1e-3, warmup=200)
    config.sampling.update(tol=1e-3)
    config.eval.update(batch_size=256, num_samples=2_048, straightness_samples=64)
    return apply_recipe(config, recipe)
