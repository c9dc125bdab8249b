"""Every setting, its default and its meaning. The files in rf/ change what their data set needs, nothing else.

Override any of them on the command line: --config.<section>.<key>=<value>.
"""

import ml_collections


def is_given(path: str) -> bool:
    """Whether a path setting names something: 'none' and the empty string do not."""
    return path.lower() not in ("", "none")


def get_default_config() -> ml_collections.ConfigDict:
    """The whole configuration, for 32 x 32 colour images, with the public 1-RF settings for CIFAR-10."""
    config = ml_collections.ConfigDict()
    config.seed = 42  # noise, times, weights, shuffling: everything random in every stage follows from it
    config.recipe = "paper"  # its name, for tables: give it after the file's name, --config=FILE.py:NAME

    config.data = data = ml_collections.ConfigDict()
    data.dataset = "CIFAR10"  # digits | a key of datasets.TFDS_SETS: CIFAR10 | FASHION_MNIST | IMAGES | ...
    data.category = ""  # LSUN only: church_outdoor | bedroom | ...
    data.data_dir = "none"  # where TFDS keeps its data sets; 'none' is TFDS's own folder
    data.image_size = 32
    data.num_channels = 3
    data.centered = True  # the model's images are in [-1, 1]; False: [0, 1]
    data.random_flip = True  # mirror training images left to right, with probability 1/2
    data.uniform_dequantization = False  # add U[0, 1) to the 0..255 values, then divide by 256

    config.model = model = ml_collections.ConfigDict()
    model.rf_phase = 2  # 1: the first rectified flow; 2: pairs, k-SeqRF, distillation and their evaluation
    model.num_scales = 1000  # N, the steps of the fixed-grid samplers (sampling.method='pc')
    model.ema_rate = 0.999999
    model.variable_ema_rate = True  # cap the EMA rate by (1 + n) / (10 + n), n updates so far
    model.ema_rates = ()  # further EMA rates kept beside ema_rate; an evaluation picks one with eval.ema_rate
    model.name = "ncsnpp"
    model.nf = 128  # channels at full resolution
    model.ch_mult = (1, 2, 2, 2)  # channels of each resolution, in units of nf
    model.num_res_blocks = 4
    model.attn_resolutions = (16,)
    model.dropout = 0.15
    model.embedding_type = "positional"  # positional | fourier
    model.fourier_scale = 16
    model.conditional = True  # the network sees the time
    model.resblock_type = "biggan"  # biggan | ddpm
    model.resamp_with_conv = True
    model.fir = False  # resample with the kernel below instead of nearest neighbour and averaging
    model.fir_kernel = (1, 3, 3, 1)
    model.skip_rescale = True  # divide sums of two branches by sqrt(2)
    model.progressive = "none"  # none | output_skip | residual
    model.progressive_input = "none"  # none | input_skip | residual
    model.progressive_combine = "sum"  # sum | cat
    model.attention_type = "ddpm"
    model.normalization = "GroupNorm"
    model.nonlinearity = "swish"  # swish | elu | relu | lrelu
    model.init_scale = 0.0
    model.conv_size = 3
    model.scale_by_sigma = False
    model.sigma_min = 0.01  # sigma_min, sigma_max: only for scale_by_sigma's table and for imported checkpoints
    model.sigma_max = 50.0
    model.dtype = "float32"  # float32 | bfloat16: of the network's computation; weights and losses are float32 always
    model.remat = False  # recompute activations in the backward pass, for less memory on GPUs and TPUs

    config.training = training = ml_collections.ConfigDict()
    training.reflow_mode = "train_reflow"  # gen_reflow | train_reflow | train_distill, when rf_phase is 2
    training.reflow_t = 1  # k, the number of segments; an evaluation takes it from the checkpoint
    training.adaptive_interval = False  # SeqRF-Ada: boundaries from the teacher's curvature (in gen_reflow)
    training.batch_size = 512  # over all hosts and devices
    training.n_iters = 400_001  # weight updates in the whole run
    training.n_jitted_steps = 1  # updates in one compiled call
    training.profile = False  # write a JAX profiler trace of ten updates into the stage's folder `profile/`
    training.accumulate = 1  # parts of a batch that an update goes through one after another, for less memory
    training.log_freq = 50  # updates between two lines of loss
    training.snapshot_freq = 10_000  # updates between two kept checkpoints
    training.snapshot_freq_for_preemption = 1_000  # updates between two checkpoints kept only to resume from
    training.keep_snapshots = 0  # keep the latest so many of them; 0: all
    training.snapshot_sampling = True  # draw a sample grid at each kept checkpoint
    training.snapshot_fid_sample = 0  # samples for an FID at each kept checkpoint; 0: none
    training.nan_policy = "stop"  # on NaN or infinity: stop | skip (drop the update; 10 in a row stop the run)
    training.override_resume = False  # continue a workdir that was begun with other settings
    training.reduce_mean = True  # False: loss l2 is half the sum over pixels
    training.loss = "l2"  # l2 | huber | lpips_huber (lpips needs the two files below)
    training.lpips_path = "none"  # VGG16's weights in torchvision's format, vgg16-397923af.pth; never downloaded
    training.lpips_heads = "none"  # the linear heads of LPIPS, its own v0.1/vgg.pth
    training.t_distribution = "uniform"  # uniform | ushape | exponential | logitnormal: t in 1-RF, u in train_reflow
    training.t_shape = 4.0  # a of ushape's density a e^(a u) / (e^a - 1)
    training.distill_steps = 1  # m: distillation learns m Euler steps a segment, u in {1/m, ..., 1}
    training.on_policy = 0.0  # share of a distillation batch that starts from the EMA student's own states
    training.init_from_ema = False  # start from the source's EMA weights, its Adam moments at zero
    training.import_torch = "none"  # start from this PyTorch checkpoint
    training.import_flax = "none"  # start from this checkpoint: a run's folder or an exported file
    training.n_reflow_data = 1_000_000  # pairs to make, all segments together
    training.gen_reflow_size = 1_024  # images solved together on a host while making pairs; changes speed only
    training.reflow_file_size = 10_000  # pairs in a file
    training.reflow_dtype = "float32"  # float32 | float16, of the stored pairs
    training.reflow_store_noise = True  # False: rebuild x1 from image and key on reading; half the disk
    training.reflow_partial = False  # train on a pair set that is not complete
    training.reflow_pairs = "segments"  # gen_reflow: segments | trajectory (states at all boundaries, for on_policy)
    training.inverted_pairs = 0.0  # gen_reflow: share of pairs solved backwards from real points at a segment's end
    training.gen_worker = "1/1"  # 'i/n': make every n-th pair file, from the i-th

    config.optim = optim = ml_collections.ConfigDict()
    optim.lr = 2e-4
    optim.beta1 = 0.9
    optim.eps = 1e-8
    optim.warmup = 5_000  # updates of linear warm-up; 0: none
    optim.grad_clip = 1.0  # global norm; negative: off
    optim.schedule = "constant"  # constant | cosine (to 0 at n_iters), after the warm-up

    config.sampling = sampling = ml_collections.ConfigDict()
    sampling.method = "ode"  # ode: adaptive steps; pc: a fixed grid of model.num_scales steps
    sampling.tol = 1e-5  # rtol = atol of the adaptive solver
    sampling.solver = "dopri5"  # of method 'ode': dopri5 | tsit5 | bosh3 | heun | midpoint | ralston
    sampling.predictor = "rf_solver"  # of 'pc': rf_solver (Euler) | rf_solver_heun | rf_reinterpolate | a solver above
    sampling.error_norm = "batch"  # batch: one step size for a device's batch; sample: one for each image
    sampling.time_grid = "uniform"  # of method 'pc': uniform | adaptive, inside the segments

    config.eval = evaluate = ml_collections.ConfigDict()
    evaluate.reflow_mode = "eval_reflow"  # eval_reflow | eval_distill, when rf_phase is 2
    evaluate.batch_size = 1_024  # over all hosts and devices
    evaluate.num_samples = 50_000
    evaluate.begin_step = 0  # the checkpoints from this step ...
    evaluate.end_step = 1_000_000_000  # ... to this one ...
    evaluate.interval_step = 1  # ... at multiples of this after begin_step are evaluated
    evaluate.samplers = ""  # several in one process: ode;euler:1,2,4;heun:4, each into <eval_folder>_<sampler>/
    evaluate.ema_rate = 0.0  # evaluate the EMA of this rate: model.ema_rate (0) or one of model.ema_rates
    evaluate.teacher = "none"  # also measure the distance to this checkpoint's own samples of the same noises
    evaluate.segments = 0  # a 1-RF's sequential straightness is over this many; 0: training.reflow_t
    evaluate.save_trajectory = False  # keep one batch's trajectory and its times
    evaluate.straightness_samples = 1_024  # noises behind straightness and truncation error
    evaluate.inception_path = "none"  # a SavedModel folder; 'none': TF-GAN's handle on TF-Hub
    evaluate.feature_network = "auto"  # auto: Inception, for grey images a classifier of their labels | pixels: neither
    evaluate.feature_backend = "auto"  # what runs Inception: tensorflow (CPU) | jax (all devices) | auto
    evaluate.reference = "none"  # an npz file of reference statistics; 'none': made from the training images, cached
    evaluate.max_real = 0  # training images behind those; 0: all
    evaluate.precision_recall_samples = 10_000  # at most so many samples and images, time grows as n^2; 0: none
    evaluate.nearest_samples = 1_000  # samples whose nearest training images are searched; 0: none
    evaluate.floor = True  # also give the distances of test images, or of two halves of the reference (once, cached)

    config.sample = sample = ml_collections.ConfigDict()  # --mode=sample, of the checkpoint that an evaluation takes
    sample.count = 64
    sample.batch_size = 64  # solved together, over all local devices; sampler.load's default
    sample.interpolate = False  # also strips between pairs of noises
    sample.trajectory = False  # also the way from noise to image: an animated GIF and a strip
    sample.frames = 16  # of a strip and of the animation
    return config
