"""Recipes: named sets of options, `--config=configs/rf/FILE.py:NAME`. Overrides on the command line win.

A recipe applies to every stage of a run: give the same name to each of its commands. What each option does is in
`configs/default.py`, its mathematics in docs/method.md, section 4.
"""

import types

import ml_collections

from configs.default import is_given
from utils import InputError


def _paper(config):
    """SeqRF as published (arXiv 2402.06461): the defaults."""


def _improved_reflow(config):
    """2-RF++ (Lee, Lin, Fanti, "Improving the Training of Rectified Flows", arXiv 2405.20320), for any k.

    U-shaped times, batch 512, inverted pairs (half of the pairs: real points carried back to the segment's start by the
    teacher), the loss LPIPS-Huber where `training.lpips_path` is given, else pseudo-Huber.

    Cost: an inverted pair takes as many network calls as a forward one; times and Huber cost nothing; LPIPS adds a pass
    of VGG16 forward and back for the examples of the last segment.
    Expect (the paper's abstract): at k = 1 and one network call on CIFAR-10 an FID up to 75 % below plain 2-RF's.
    The share of inverted pairs is a choice made here. Not run here.
    """
    training = config.training
    training.update(t_distribution="ushape", batch_size=512, inverted_pairs=0.5)
    training.loss = ml_collections.FieldReference(  # evaluated late: the path may come from the command line
        training.get_ref("lpips_path"),
        op=types.SimpleNamespace(fn=lambda path: "lpips_huber" if is_given(path) else "huber", args=()),
    )


def _on_policy(config):
    """k-SeqRF distilled on policy: every start is the student's own state, its target the teacher's of the same noise.

    `train_distill` then reads trajectories (`gen_reflow` with `training.reflow_pairs=trajectory`, which this recipe
    does not set, since `train_reflow` needs the ordinary pairs, made first).

    Cost: (N - 1)/2 network calls of the student for every example, N = m k, beside the 3 of an update (one forward, a
    backward of about two); a trajectory costs the teacher one whole solve for its k pairs, as k segment solves do.
    Expect: more distance to the teacher than ordinary distillation, and less FID for plain reflow alone. On
    Fashion-MNIST 14 x 14 at NFE 4, three seeds, equal cost (docs/choosing_k.md): FID of k = 1 lower by 0.11 +- 0.04, of
    k = 4 not settled; distance of k = 4 0.085 against 0.070. Not run here on photographs.
    """
    config.training.on_policy = 1.0


def _best(config):
    """What the study on Fashion-MNIST found (docs/choosing_k.md): k = the network calls you can afford, one step a
    segment, the pseudo-Huber loss and a cosine learning rate in both stages.

    Cost: none beside the paper's recipe; a stage's length (`training.n_iters`) is fixed when it begins.
    Expect: on Fashion-MNIST 14 x 14 at NFE 4, three seeds, equal cost: FID lower by 0.060 +- 0.008 than by the paper's
    recipe, the distance to the teacher's samples by 0.016 +- 0.005 (of 1.04 and 0.070). Not run here on photographs.
    """
    config.training.loss = "huber"
    config.optim.schedule = "cosine"


RECIPES = {"paper": _paper, "2rf++": _improved_reflow, "on_policy": _on_policy, "best": _best}


def apply_recipe(config: ml_collections.ConfigDict, name: str) -> ml_collections.ConfigDict:
    """`config` with the options of a recipe, in place.

    Raises:
      InputError: no recipe has that name.
    """
    if name not in RECIPES:
        raise InputError(f"unknown recipe {name!r}: use one of {', '.join(RECIPES)}")
    config.recipe = name
    RECIPES[name](config)
    return config
