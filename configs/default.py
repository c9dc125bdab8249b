"""Every setting: its default, what it may be, its meaning, and whether a resumed run may change it.

Override any of them on the command line: --config.<section>.<key>=<value>. The files in rf/ change what their data set
needs, nothing else. The defaults are the public settings for CIFAR-10: 32 x 32 colour images.
"""

import ml_collections

import losses
import sampling
from configs.settings import Page, defaults, network, setting

TRAINING_MODES = ("gen_reflow", "train_reflow", "train_distill")

MOST_IMAGES = 2**17  # in a batch: a typing error beyond this would fill the memory, or wait for hours

page = Page()
page.seed = setting(42, least=0, most=2**31 - 2)  # everything random in every stage follows from it
page.tensorboard = setting(False, may_change=True)  # also write the numbers for TensorBoard, into `tensorboard/`
page.recipe = setting("paper")  # its name, for tables: give it after the file's name, --config=FILE.py:NAME

data = page.section("data")
data.dataset = setting("CIFAR10")  # digits | a key of datasets.TFDS_SETS: CIFAR10 | FASHION_MNIST | IMAGES | ...
data.category = setting("")  # LSUN only: church_outdoor | bedroom | ...
data.data_dir = setting("none", may_change=True)  # where TFDS keeps its data sets; 'none' is TFDS's own folder
data.image_size = setting(32)
data.num_channels = setting(3)
data.centered = setting(True)  # the model's images are in [-1, 1]; False: [0, 1]
data.random_flip = setting(True)  # mirror training images left to right, with probability 1/2
data.uniform_dequantization = setting(False)  # add U[0, 1) to the 0..255 values, then divide by 256

model = page.section("model")
model.rf_phase = setting(2, choices=(1, 2))  # 1: the first flow; 2: pairs, k-SeqRF, distillation
model.num_scales = setting(1000, least=1, most=100_000, may_change=True)  # N, the steps of sampling.method='pc'
model.ema_rate = setting(None, kind=float, least=0, most=1)  # of the weights; not set: the stage's own, see below
model.variable_ema_rate = setting(None, kind=bool)  # cap the rate by (1 + n) / (10 + n), n updates so far; likewise
model.ema_rates = setting(())  # further EMA rates kept beside ema_rate; an evaluation picks one with eval.ema_rate
model.name = network("name")
model.nf = network("nf")  # channels at full resolution
model.ch_mult = network("ch_mult")  # channels of each resolution, in units of nf
model.num_res_blocks = network("num_res_blocks")
model.attn_resolutions = network("attn_resolutions")
model.dropout = network("dropout", 0.15)
model.embedding_type = network("embedding_type")  # positional | fourier
model.fourier_scale = network("fourier_scale")
model.conditional = network("conditional")  # the network sees the time
model.resblock_type = network("resblock_type")  # biggan | ddpm
model.resamp_with_conv = network("resamp_with_conv")
model.fir = network("fir")  # resample with the kernel below instead of nearest neighbour and averaging
model.fir_kernel = network("fir_kernel")
model.skip_rescale = network("skip_rescale")  # divide sums of two branches by sqrt(2)
model.progressive = network("progressive")  # none | output_skip | residual
model.progressive_input = network("progressive_input")  # none | input_skip | residual
model.progressive_combine = network("progressive_combine")  # sum | cat
model.attention_type = network("attention_type")
model.normalization = network("normalization")
model.nonlinearity = network("nonlinearity")  # swish | elu | relu | lrelu
model.init_scale = network("init_scale")
model.conv_size = network("conv_size")
model.scale_by_sigma = network("scale_by_sigma")
model.sigma_min = network("sigma_min")  # these two: only for scale_by_sigma's table and for imported checkpoints
model.sigma_max = network("sigma_max")
model.dtype = network("dtype")  # float32 | bfloat16, of the computation; weights and losses are always float32
model.remat = network("remat")  # recompute activations in the backward pass, for less memory on GPUs and TPUs

training = page.section("training")
training.reflow_mode = setting("train_reflow", choices=TRAINING_MODES, may_change=True)  # when rf_phase is 2
training.reflow_t = setting(1, least=1, most=65_536)  # k, the segments; an evaluation takes it from the checkpoint
training.adaptive_interval = setting(False)  # SeqRF-Ada: boundaries from the teacher's curvature (in gen_reflow)
training.batch_size = setting(512, least=1, most=MOST_IMAGES)  # over all hosts and devices
training.n_iters = setting(None, kind=int, least=1)  # updates in the whole run; not set: the stage's own, see below
training.n_jitted_steps = setting(1, least=1, may_change=True)  # updates in one compiled call
training.profile = setting(False, may_change=True)  # a JAX profiler trace of ten updates, in `profile/`
training.accumulate = setting(1, least=1)  # parts of a batch that an update goes through in turn, for less memory
training.log_freq = setting(50, least=1, may_change=True)  # updates between two lines of loss
training.snapshot_freq = setting(10_000, least=1, may_change=True)  # updates between two kept checkpoints
training.snapshot_freq_for_preemption = setting(1_000, least=1, may_change=True)  # ... kept to resume from
training.keep_snapshots = setting(0, least=0, may_change=True)  # number of most recent checkpoints to keep; 0: all
training.snapshot_sampling = setting(True, may_change=True)  # draw a sample grid at each kept checkpoint
training.snapshot_fid_sample = setting(0, least=2, or_zero=True, may_change=True)  # samples for its FID; 0: none
training.nan_policy = setting("stop", choices=("stop", "skip"), may_change=True)  # on NaN; 10 skipped in a row stop
training.override_resume = setting(False, may_change=True)  # continue a workdir that was begun with other settings
training.reduce_mean = setting(True)  # False: loss l2 is half the sum over pixels
training.loss = setting("l2", choices=losses.LOSS_NAMES)  # lpips_huber needs the two files below
training.lpips_path = setting("none", may_change=True)  # VGG16 of torchvision, vgg16-397923af.pth; never downloaded
training.lpips_heads = setting("none", may_change=True)  # the linear heads of LPIPS, its own v0.1/vgg.pth
training.t_distribution = setting("uniform", choices=tuple(losses.T_DISTRIBUTIONS))  # t or u
training.t_shape = setting(4.0, least=0.01, most=80)  # a of ushape's density a e^(a u) / (e^a - 1)
training.distill_steps = setting(1, least=1, most=9_999)  # m Euler steps a segment are learnt, u in {1/m, ..., 1}
training.on_policy = setting(0.0, least=0, most=1)  # share of a batch that starts from the EMA student's states
training.init_from_ema = setting(False)  # start from the source's EMA weights, its Adam moments at zero
training.import_torch = setting("none")  # start from this PyTorch checkpoint
training.import_flax = setting("none")  # start from this checkpoint: a run's folder or an exported file
training.n_reflow_data = setting(1_000_000, least=1, may_change=True)  # pairs to make, all segments together
training.gen_reflow_size = setting(1_024, least=1, most=MOST_IMAGES, may_change=True)  # solved together on a host
training.reflow_file_size = setting(10_000, least=1, may_change=True)  # pairs in a file
training.reflow_dtype = setting("float32", choices=("float32", "float16"), may_change=True)
training.reflow_store_noise = setting(True, may_change=True)  # False: x1 is rebuilt on reading, half the disk
training.reflow_partial = setting(False)  # train on a pair set that is not complete
training.reflow_pairs = setting("segments", choices=("segments", "trajectory"), may_change=True)  # of gen_reflow
training.inverted_pairs = setting(0.0, least=0, most=1, may_change=True)  # share solved backwards
training.gen_worker = setting("1/1", may_change=True)  # 'i/n': make every n-th pair file, from the i-th

rf = page.section("rf")  # what 1-RF takes where the settings above are not set
rf.n_iters = setting(400_001, least=1)
rf.ema_rate = setting(0.999999, least=0, most=1)
rf.variable_ema_rate = setting(True)

# What reflow and distillation take. A capped EMA rate would start again at n = 0 and forget the teacher's EMA.
reflow = page.section("reflow")
reflow.n_iters = setting(100_001, least=1)
reflow.ema_rate = setting(0.9999, least=0, most=1)
reflow.variable_ema_rate = setting(False)

optim = page.section("optim")
optim.lr = setting(2e-4, above=0)  # learning rate after the warm-up
optim.beta1 = setting(0.9, least=0, most=1)
optim.eps = setting(1e-8, least=0)
optim.warmup = setting(5_000, least=0)  # updates of linear warm-up; 0: none
optim.grad_clip = setting(1.0)  # global norm; negative: off
optim.schedule = setting("constant", choices=("constant", "cosine"))  # after the warm-up; cosine: to 0 at n_iters

solving = page.section("sampling")
solving.method = setting("ode", choices=sampling.METHODS)  # ode: adaptive; pc: model.num_scales fixed steps
solving.tol = setting(1e-5, least=1e-12)  # rtol = atol of the adaptive solver
solving.solver = setting("dopri5", choices=tuple(sampling.SOLVERS))  # of method 'ode'
solving.predictor = setting("rf_solver", choices=tuple(sampling.PREDICTORS))  # of 'pc'
solving.error_norm = setting("batch", choices=sampling.ERROR_NORMS)  # one step size for each
solving.time_grid = setting("uniform", choices=sampling.TIME_GRIDS)  # of 'pc', inside the segments

evaluate = page.section("eval")
evaluate.reflow_mode = setting("eval_reflow", choices=("eval_reflow", "eval_distill"))  # when rf_phase is 2
evaluate.batch_size = setting(1_024, least=1, most=MOST_IMAGES)  # over all hosts and devices
evaluate.num_samples = setting(50_000, least=2)
evaluate.begin_step = setting(0, least=0)  # the checkpoints from this step ...
evaluate.end_step = setting(1_000_000_000, least=0)  # ... to this one ...
evaluate.interval_step = setting(1, least=1)  # ... at multiples of this after begin_step are evaluated
evaluate.samplers = setting("")  # several in one process: ode;euler:1,2,4;heun:4, each into <eval_folder>_<sampler>/
evaluate.ema_rate = setting(0.0, least=0, most=1)  # the EMA evaluated, one of model.ema_rates; 0: ema_rate
evaluate.teacher = setting("none")  # also measure the distance to this checkpoint's own samples of the same noises
evaluate.segments = setting(0, least=0)  # a 1-RF's sequential straightness is over this many; 0: training.reflow_t
evaluate.save_trajectory = setting(False)  # keep one batch's trajectory and its times
evaluate.straightness_samples = setting(1_024, least=1)  # noises behind straightness and truncation error
evaluate.inception_path = setting("none")  # a SavedModel folder; 'none': TF-GAN's handle on TF-Hub
# auto: Inception, of grey images a classifier; classifier: of labelled colour images too; inception_v3: of published
# figures at 256 pixels and more
evaluate.feature_network = setting("auto", choices=("auto", "classifier", "inception_v3", "pixels"))
evaluate.feature_backend = setting("auto", choices=("auto", "tensorflow", "jax"))  # runs Inception
evaluate.reference = setting("none")  # an npz file of statistics; 'none': made from the training images
evaluate.max_real = setting(0, least=4, or_zero=True)  # training images behind those; 0: all
evaluate.precision_recall_samples = setting(10_000, least=4, or_zero=True)  # max. samples and images, O(n^2); 0: off
evaluate.nearest_samples = setting(1_000, least=0)  # samples whose nearest training images are searched; 0: none
evaluate.floor = setting(True)  # also the distances of test images, or of two halves of the reference

sample = page.section("sample")  # --mode=sample, of the checkpoint that an evaluation takes
sample.count = setting(64, least=1)
sample.batch_size = setting(64, least=1, most=MOST_IMAGES)  # solved together, on all local devices, as sampler.load
sample.interpolate = setting(False)  # also strips between pairs of noises
sample.trajectory = setting(False)  # also the way from noise to image: an animated GIF and a strip
sample.frames = setting(16, least=2, most=1_000)  # of a strip and of the animation

SETTINGS = page.settings


def get_default_config() -> ml_collections.ConfigDict:
    """The whole configuration, at its defaults."""
    return defaults(SETTINGS)


def is_given(path: str) -> bool:
    """Whether a path setting names something: 'none' and the empty string do not."""
    return path.lower() not in ("", "none")
