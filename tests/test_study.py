"""The study: its cells, their equal cost, its rows through kills, and its verdicts."""

import collections
import dataclasses
import json
import types

import jax
import numpy as np
import pytest
import scipy.stats
from tiny_run import export_file

import models
import sampler
from configs.rf.digits_rf_continuous import get_config
from metrics.distances import frechet_distance
from study import page as study_page
from study import rows as study_rows
from study import run as study_run
from study.cells import BENCHES, CALLS_PER_EXAMPLE, Cell, Recipe, all_cells
from study.models import Model, Models, PairSet

TINY = {"model.nf": 4, "model.ch_mult": (1,), "model.attn_resolutions": (), "model.ema_rate": 0.9}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A bench of tiny networks with an untrained teacher."""
    config = get_config()
    config.update_from_flattened_dict(TINY | {"training.reflow_t": 1})
    params = models.init_params(models.create_model(config), jax.random.key(0), (8, 8, 1))
    zeros = jax.tree.map(np.zeros_like, params)
    weights = models.Weights(params=params, ema_params=params, mu=zeros, nu=zeros, count=0, step=0)
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    export_file(path, weights, config)
    return dataclasses.replace(
        BENCHES["digits"],
        teacher=str(path),
        budget=60,
        reflow=4,
        batch_size=8,
        pairs={2: (16, "bosh3")},
        trajectories={2: 8},
        samples=32,
        compared=16,
        referenced=8,
        options=TINY,
    )


def test_cells_have_names_of_their_own_and_every_call_count_has_the_rival():
    cells = all_cells((0, 1, 2))
    assert len({cell.id for cell in cells}) == len(cells)
    for n in (2, 4, 8):
        for on_policy, seed in ((False, 2), (True, 2 if n == 4 else 0)):
            for recipe in (Recipe(1, m=n, on_policy=on_policy), Recipe(n, m=1, on_policy=on_policy)):
                assert Cell(recipe, n, seed) in cells


def test_every_question_is_on_cells_of_the_study():
    ids = {cell.id for cell in all_cells((0,))}
    for _, first, second, n in study_page.questions():
        assert {Cell(recipe, n, 0).id for recipe in (first, second)} <= ids


def test_a_row_costs_the_budget(bench, tmp_path, monkeypatch):
    cell, study = Cell(Recipe(2, m=1, on_policy=True), 2, 0), study_run.Study(bench, tmp_path / "a")
    monkeypatch.setattr(study_run, "_commit", lambda: "checked out meanwhile")
    row = study.row(cell)
    assert row["commit"] != "checked out meanwhile"
    update = bench.batch_size * (CALLS_PER_EXAMPLE + 0.5)  # (N - 1) / 2 calls of the student, N = 2
    assert bench.calls - update < row["network_calls"] <= bench.calls


def test_a_row_that_is_made_again_is_verified_by_its_metrics(bench, tmp_path, monkeypatch):
    cell, study = Cell(Recipe(0), 2, 0), study_run.Study(bench, tmp_path / "a")
    row = study.row(cell)
    monkeypatch.setattr(study_run, "read_rows", lambda: [row])
    assert study_run.verify(study, cell)
    row |= {"rms_to_teacher_1e-4": 0.1}
    assert not study_run.verify(study, cell)


def test_metrics_are_those_of_samples_to_the_data_and_to_exact_solves(bench, tmp_path):
    cell, study = Cell(Recipe(0), 4, 1, "heun"), study_run.Study(bench, tmp_path)
    metrics = study.metrics(cell, study.models.model(cell.recipe, cell.seed))
    assert metrics.keys() == {
        *(f"{name}_digits_classifier" for name in ("fid", "kid", "kid_error")),
        *("rms_to_teacher_1e-4", "truncation_error", "sequential_straightness_ode_1e-4"),
    }
    model, rms = sampler.load(bench.teacher), {}
    x = model.sample(bench.samples, seed=1, num_scales=2, predictor="rf_solver_heun")
    features, _ = study.real.network.features_and_logits((255 * x + 0.5).astype(np.uint8))
    assert metrics["fid_digits_classifier"] == pytest.approx(frechet_distance(study.real.features, features), rel=1e-6)
    heun = model.sampler(seed=1, num_scales=2, predictor="rf_solver_heun")
    for name, count, tol in (("rms_to_teacher_1e-4", 16, 1e-4), ("truncation_error", 8, 1e-6)):
        ends = [next(each.samples(model.params, count, count)) for each in (heun, model.sampler(seed=1, tol=tol))]
        rms[name] = np.sqrt(np.mean(np.square(ends[0] - ends[1])))
    assert {name: metrics[name] for name in rms} == pytest.approx(rms, rel=1e-4)


def test_a_scaled_budget_is_that_of_runs_in_a_folder_of_their_own(bench, tmp_path, monkeypatch):
    def distilled(models, recipe, seed):
        assert recipe == Recipe(2, m=1)
        return Model(models.workdir, recipe, calls=models.bench.calls)

    monkeypatch.setattr(Models, "_distilled", distilled)
    model = Models(bench, tmp_path).model(Recipe(2, m=1, scale=2.0), 0)
    assert (model.recipe.name, model.calls) == ("k2_m1_x2", 2 * bench.calls)
    assert model.checkpoint == tmp_path / "budget_x2"
    assert bench.scaled(2.0).pairs == {2: (32, "bosh3")}


def test_a_distillation_takes_the_seconds_of_its_own_part_of_the_reflow(bench, tmp_path, monkeypatch):
    spent = collections.Counter()

    def run(models, folder, name, seed, options, *, is_done):
        if not is_done:
            spent[name] += 1.0
            (folder / "2_rf" / "checkpoints" / str(options["training.n_iters"])).mkdir(parents=True)
        return spent[name]

    monkeypatch.setattr(Models, "run", run)
    monkeypatch.setattr(Models, "_pairs", lambda models, *_: PairSet(tmp_path / "pairs", 96, 10.0))
    made = Models(bench, tmp_path)
    whole = made.model(Recipe(2), 0)
    start = made._reflowed(Recipe(2, m=1), 0, whole=False)
    assert (start.updates, start.seconds) == (bench.reflow, 10 + 1)
    assert (whole.calls, whole.seconds) == (bench.calls, 10 + 2)


def test_a_run_that_is_stopped_keeps_its_seconds(bench, tmp_path, monkeypatch):
    def stopped(config, folder):
        raise KeyboardInterrupt

    monkeypatch.setattr("run_lib.train", stopped)
    made = Models(bench, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        made.run(tmp_path, "2_rf", 0, {}, is_done=False)
    assert made.run(tmp_path, "2_rf", 0, {}, is_done=True) > 0


def test_a_row_of_another_teacher_is_made_again_and_not_verified(bench, tmp_path, monkeypatch):
    def main(*arguments):
        monkeypatch.setattr("sys.argv", ["run.py", "digits", "--workdir", str(tmp_path), *arguments])
        study_run.main()

    monkeypatch.chdir(tmp_path)  # which the script leaves
    cell, made = "k4_m1/euler_4/seed_0", []
    rows = [{"bench": "digits", "cell": cell, "teacher": "0f"}]
    monkeypatch.setattr(study_run, "read_rows", lambda: rows)
    monkeypatch.setattr(study_run, "append_row", made.append)
    monkeypatch.setattr(study_run.Study, "real", types.SimpleNamespace(network=types.SimpleNamespace(identity="a")))
    monkeypatch.setattr(study_run.Study, "row", lambda study, cell: {"fid_pixels_8": 0.0, "cell": cell.id})
    main("--only", cell, "--teacher", bench.teacher)
    assert [row["cell"] for row in made] == [cell]
    with pytest.raises(SystemExit, match=r"error: no row of .* is of the cell 'k4_m1/euler_4/seed_0'"):
        main("--verify", cell, "--teacher", bench.teacher)
    rows[0]["teacher"] = Models(bench, tmp_path).teacher[1]
    main("--only", cell, "--teacher", bench.teacher)
    assert len(made) == 2  # by another feature network
    rows[0]["features"] = "a"
    main("--only", cell, "--teacher", bench.teacher)
    assert len(made) == 2


def test_the_page_trains_nothing_for_its_picture(bench, tmp_path, monkeypatch):
    cells = {("k2_m1", "euler", 2): [{"cell": Cell(Recipe(2, m=1), 2, 0).id}]}
    study_page.draw_samples(bench, cells, tmp_path, tmp_path / "samples.png")
    assert list(tmp_path.iterdir()) == []


def test_a_row_has_its_metrics_under_one_name_whatever_its_age():
    old = {"nfe": 4, "fid_a": 1.0, "kid_a_10000": 0.1, "kid_error_a_10000": 0.01, "truncation_error_1e-4": 0.2, "k": 1}
    new = {"nfe": 4, "fid_a": 1.0, "kid_a": 0.1, "kid_error_a": 0.01, "truncation_error": 0.2, "k": 1}
    for row in (old, new):
        assert list(study_rows.metrics_of(row).values()) == [1.0, 0.1, 0.01, 0.2]
        assert (study_rows.metric(row, "fid"), study_rows.metric(row, "truncation_error")) == (1.0, 0.2)


def test_every_stored_row_has_what_the_page_shows():
    for row in study_rows.read_rows():
        assert all(study_rows.metric(row, name) > 0 for name in ("fid", "rms", "truncation_error"))
        assert not {"fid", "kid", "truncation_error", "straightness", "rms_to_teacher"} & row.keys()


def test_rows_survive_a_line_cut_short(tmp_path):
    path = tmp_path / "study.jsonl"
    study_rows.append_row({"cell": "a"}, path)
    path.write_text(path.read_text() + '{"cell": "b", "fi')
    study_rows.append_row({"cell": "c"}, path)
    assert [row["cell"] for row in study_rows.read_rows(path)] == ["a", "c"]
    assert json.loads(path.read_text().splitlines()[-1]) == {"cell": "c"}


def test_a_verdict_is_a_paired_t_statistic_above_two_with_one_sign():
    rng = np.random.default_rng(0)
    settled = []
    for shift in np.linspace(-0.3, 0.3, 21):
        first, second = rng.normal(shift, 0.05, 3).tolist(), rng.normal(0, 0.05, 3).tolist()
        verdict = study_page.compare(
            *(
                [{"seed": seed, "fid_pixels_8": value} for seed, value in enumerate(values)]
                for values in (first, second)
            ),
            "fid",
        )
        one_sign = len(set(np.sign(np.subtract(first, second)))) == 1
        assert verdict.is_settled == (one_sign and abs(scipy.stats.ttest_rel(first, second).statistic) > 2)
        settled.append(verdict.word)
    assert {"better", "worse", "not settled"} <= set(settled)


def test_two_seeds_settle_nothing():
    first, second = ([{"seed": s, "fid_pixels_8": value + s / 100} for s in range(2)] for value in (1.0, 2.0))
    assert study_page.compare(first, second, "fid").word == "2 of 3 seeds"


def test_rows_are_compared_within_a_feature_network_and_the_latest_row_of_a_seed_counts():
    def rows(features, fid):
        return [{"seed": s, "features": features, "fid_pixels_8": fid + s} for s in range(3)]

    first, second = rows("a", 1.0) + rows("b", 2.0), rows("a", 5.0) + rows("c", 9.0)
    assert study_page.compare(first, second, "fid").differences == (-4.0, -4.0, -4.0)
    assert study_page.compare(first, rows("c", 1.0), "fid").word == "0 of 3 seeds"
    assert study_page.latest(first, "fid") == [2.0, 3.0, 4.0]
    distances = [[{"seed": 0, "features": name, "rms_to_teacher_1e-4": 1.0}] for name in ("a", "c")]
    assert study_page.compare(*distances, "rms").differences == (0.0,)


def test_every_line_of_a_picture_is_of_cells_of_the_study():
    planned = {(cell.recipe.name, cell.sampler, cell.nfe) for cell in all_cells((0,))}
    for series in (study_page.summary_series(), study_page.nfe_series(), study_page.cost_series()):
        for name, keys in series.items():
            assert len(planned & set(keys)) >= 2, name
