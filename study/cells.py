"""What the study compares: benches, recipes, cells, and what each costs in network calls.

A cell is one model sampled in one way, for one seed. A recipe says how its model is made from the teacher:

    pairs (k segments) -> reflow -> distillation to m Euler steps a segment, off or on policy.

Every recipe of a bench spends the same number of network calls, `Bench.budget`: 3 for each trained example (a forward
pass, and a backward pass of about two), 1 for each call of the teacher or the student outside of training: pairs,
trajectories, boundaries, the student's states of on-policy distillation.
"""

import dataclasses
from typing import Any

CALLS_PER_EXAMPLE = 3
NFES = (1, 2, 4, 8)
EXACT_TOL = 1e-4  # of the solves that stand for exact ones; it is in the names of metrics (study/rows.py)
# Recipe elements, each a change of the plain recipe (docs/recipes.md); those of the first group change the pairs.
PAIR_ELEMENTS: dict[str, dict[str, Any]] = {
    "inverted": {"training.inverted_pairs": 0.5},
    "exact": {"sampling.tol": 1e-3},  # ten times below the bench's
}
ELEMENTS: dict[str, dict[str, Any]] = {
    "huber": {"training.loss": "huber"},
    "ushape": {"training.t_distribution": "ushape"},
    "cosine": {"optim.schedule": "cosine"},
    "from_ema": {"training.init_from_ema": True},
}
BEST = ("huber", "cosine")  # configs/recipes.py


@dataclasses.dataclass(frozen=True)
class Bench:
    """A data set, a teacher, and the sizes of everything that is compared on it.

    Attributes:
      config: the configuration file.
      teacher: an exported 1-RF; every row carries its fingerprint.
      budget: network calls of every recipe, in updates of one batch.
      reflow: updates of reflow before a distillation.
      pairs: k -> (noises that the teacher solves, solver): fewer noises for more segments, whose pairs cost more calls
        a noise and are k times as many. Short segments take a solver of lower order, in fewer calls.
      trajectories: k -> noises of the trajectory set of on-policy distillation after reflow.
      direct_trajectories: the same where there are no pairs and no reflow.
      samples: behind FID and KID.
      compared: noises behind the distance to the teacher.
      referenced: noises behind the truncation error and straightness.
      options: settings of all runs.
      seeds: of what a verdict is given on.
      screening: whether what may be better is looked for too, with the first seed.
    """

    name: str
    config: str
    teacher: str
    budget: int = 1600
    reflow: int = 450
    tol: float = 1e-2
    batch_size: int = 64
    pairs: dict[int, tuple[int, str]] = dataclasses.field(
        default_factory=lambda: {1: (4096, "dopri5"), 2: (4096, "dopri5"), 4: (3072, "bosh3"), 8: (2048, "bosh3")}
    )
    trajectories: dict[int, int] = dataclasses.field(default_factory=lambda: {1: 1024, 2: 1024, 4: 768, 8: 512})
    direct_trajectories: dict[int, int] = dataclasses.field(
        default_factory=lambda: {1: 4096, 2: 4096, 4: 3072, 8: 2048}
    )
    samples: int = 4096
    compared: int = 512
    referenced: int = 64
    options: dict[str, Any] = dataclasses.field(
        default_factory=lambda: {
            "optim.lr": 1e-3,
            "optim.warmup": 20,
            "model.ema_rate": 0.99,
            "model.variable_ema_rate": False,
        }
    )
    seeds: tuple[int, ...] = (0, 1, 2)
    screening: bool = True

    @property
    def calls(self) -> int:
        """The budget in network calls."""
        return self.budget * self.batch_size * CALLS_PER_EXAMPLE

    def scaled(self, scale: float) -> "Bench":
        """The bench with `scale` times the budget, spent in the same parts."""
        return dataclasses.replace(
            self,
            budget=round(scale * self.budget),
            reflow=round(scale * self.reflow),
            pairs={k: (round(scale * noises), solver) for k, (noises, solver) in self.pairs.items()},
            trajectories={k: round(scale * noises) for k, noises in self.trajectories.items()},
            direct_trajectories={k: round(scale * noises) for k, noises in self.direct_trajectories.items()},
        )


BENCHES = {
    "fashion_mnist_14": Bench(
        name="fashion_mnist_14",
        config="configs/rf/fashion_mnist_14_rf_continuous.py",
        teacher="model_zoo/fashion_mnist_14_1rf",
    ),
    "digits": Bench(
        name="digits",
        config="configs/rf/digits_rf_continuous.py",
        teacher="model_zoo/digits_1rf",
        samples=2048,
        seeds=(0,),
        screening=False,
    ).scaled(0.5),
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is made.

    Attributes:
      k: segments; 0: the teacher itself.
      m: Euler steps a segment that it is distilled to; 0: reflow alone, with all of the budget.
      on_policy: the distillation starts from the student's own states.
      direct: distilled from the teacher, without a reflow stage.
      adaptive: SeqRF-Ada's boundaries.
      elements: of ELEMENTS and PAIR_ELEMENTS, in all stages.
      scale: of the budget, see `Bench.scaled`.
    """

    k: int
    m: int = 0
    on_policy: bool = False
    direct: bool = False
    adaptive: bool = False
    elements: tuple[str, ...] = ()
    scale: float = 1.0

    @property
    def name(self) -> str:
        """A short name: 'rf', 'k4', 'k4_ada_m1_on_policy', 'k1_m4+huber'."""
        if not self.k:
            return "rf"
        marks = {
            "ada": self.adaptive,
            f"m{self.m}": self.m,
            "on_policy": self.on_policy,
            "direct": self.direct,
            f"x{self.scale:g}": self.scale != 1,
        }
        return "_".join([f"k{self.k}", *(mark for mark, given in marks.items() if given)]) + "".join(
            f"+{element}" for element in self.elements
        )

    @property
    def model(self) -> str:
        """The model as the paper calls it."""
        if not self.k:
            return "1-RF"
        name = "2-RF" if self.k == 1 else f"{self.k}-SeqRF"  # plain reflow
        name += "-Ada" if self.adaptive else ""
        return name if not self.m else f"{name}-Distill" + (f" ({self.m} steps a segment)" if self.m > 1 else "")

    @property
    def pair_name(self) -> str:
        """Recipes of equal pair_name learn from the same pairs."""
        pairs = tuple(element for element in self.elements if element in PAIR_ELEMENTS)
        return Recipe(self.k, adaptive=self.adaptive, elements=pairs).name

    @property
    def reflow_name(self) -> str:
        """Recipes of equal reflow_name share their reflow stage."""
        return dataclasses.replace(self, m=0, on_policy=False, direct=False).name

    @property
    def distilled_on(self) -> str:
        """What its distillation reads: 'trajectory' on policy, else the pairs of its 'segments'."""
        return "trajectory" if self.on_policy else "segments"

    @property
    def calls_per_distilled_example(self) -> float:
        """Network calls: on policy also the student's on its way to one of N steps, (N - 1) / 2 on average."""
        return CALLS_PER_EXAMPLE + ((self.k * self.m - 1) / 2 if self.on_policy else 0)

    def options(self) -> dict[str, Any]:
        """The settings of its elements in every stage."""
        return {key: value for element in self.elements for key, value in (ELEMENTS | PAIR_ELEMENTS)[element].items()}


@dataclasses.dataclass(frozen=True)
class Cell:
    """A model sampled by `nfe` network calls: by 'euler', 'heun' (two calls a step) or 'adaptive' (Euler, its times
    placed where the flow bends)."""

    recipe: Recipe
    nfe: int
    seed: int
    sampler: str = "euler"

    @property
    def id(self) -> str:
        """The name of its row."""
        return f"{self.recipe.name}/{self.sampler}_{self.nfe}/seed_{self.seed}"


def all_cells(seeds: tuple[int, ...], *, screening: bool = True) -> list[Cell]:
    """Every cell of the study, the most telling first: a study that is stopped has answered something.

    What is a verdict is measured for all seeds, what only looks for something better (`screening`) for the first one.
    """
    verdicts = [_distilled(4), _teacher(), _distilled(2), _distilled(8)]
    verdicts += [_distilled(4, elements=elements) for elements in (("huber",), BEST)]
    verdicts += [_on_policy(4), _distilled(1)]
    screened = [_reflowed(), _elements(), _budgets(), _direct(), *(_distilled(n, elements=BEST) for n in (2, 8))]
    screened += [_on_policy(2), _on_policy(8), _others(), _distilled(4, on_policy=True, elements=("huber",))]
    groups = [(group, seeds) for group in verdicts] + [(group, seeds[:1]) for group in screened if screening]
    return list(
        dict.fromkeys(
            Cell(recipe, nfe, seed, sampler) for group, own in groups for seed in own for recipe, nfe, sampler in group
        )
    )


Entry = tuple[Recipe, int, str]


def _teacher() -> list[Entry]:
    samplers = [("euler", n) for n in NFES] + [(name, n) for name in ("heun", "adaptive") for n in NFES if n > 1]
    return [(Recipe(0), n, sampler) for sampler, n in samplers]


def _distilled(n: int, **changes: Any) -> list[Entry]:
    """At n calls: k-SeqRF-Distill with k = n, and plain reflow distilled to n steps, at the same cost."""
    return [(Recipe(k, m=n // k, **changes), n, "euler") for k in sorted({1, n})]


def _on_policy(n: int) -> list[Entry]:
    return _distilled(n, on_policy=True)


def _reflowed() -> list[Entry]:
    """Reflow alone, with all of the budget."""
    return [(Recipe(k), n, "euler") for k in (1, 2, 4, 8) for n in NFES if n >= k]


def _direct() -> list[Entry]:
    """Distilled from the teacher, without reflow: on its pairs, or on its trajectories, on policy."""
    plain = [(Recipe(4, m=1, direct=True), 4, "euler")]
    return plain + _distilled(4, direct=True, elements=BEST) + _distilled(4, direct=True, on_policy=True)


def _others() -> list[Entry]:
    """k between 1 and the calls; SeqRF-Ada."""
    entries = [
        (Recipe(k, m=n // k, on_policy=policy), n) for k, n in ((2, 4), (2, 8), (4, 8)) for policy in (False, True)
    ]
    entries += [(Recipe(4, adaptive=True), n) for n in (4, 8)]
    entries += [(Recipe(4, m=1, adaptive=True, on_policy=policy), 4) for policy in (False, True)]
    return [(recipe, n, "euler") for recipe, n in entries]


def _budgets() -> list[Entry]:
    """At 4 calls, with half and twice the budget."""
    recipes = [Recipe(k, m=4 // k, scale=scale) for scale in (0.5, 2.0) for k in (1, 4)]
    return [(recipe, 4, "euler") for recipe in recipes]


def _elements() -> list[Entry]:
    """Each element alone."""
    return [entry for name in (*ELEMENTS, *PAIR_ELEMENTS) for entry in _distilled(4, elements=(name,))]
