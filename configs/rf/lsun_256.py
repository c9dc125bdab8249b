"""What the two 256 x 256 configurations share."""

from configs.default import get_default_config


def get_lsun_config(category: str):
    """The public 1-RF settings for 256 x 256 images: 65,574,549 parameters, 128 of them fixed Fourier frequencies."""
    config = get_default_config()
    config.data.update(dataset="LSUN", category=category, image_size=256)
    config.model.update(
        ch_mult=(1, 1, 2, 2, 2, 2, 2),
        num_res_blocks=2,
        dropout=0.0,
        ema_rate=0.999,
        embedding_type="fourier",
        fir=True,
        progressive="output_skip",
        progressive_input="input_skip",
        scale_by_sigma=True,
        sigma_max=378.0,
    )
    config.training.update(batch_size=64, gen_reflow_size=128, reflow_file_size=1_024)
    config.eval.update(batch_size=256)
    return config
