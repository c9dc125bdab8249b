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
from configs.rf.digits_rf_continuous import get_config
from study import page as study_page
from study import run as study_run
from study.cells import BENCHES, CALLS_PER_EXAMPLE, Cell, Recipe, all_cells

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


def test_a_row_costs_the_budget_and_comes_out_the_same_again(bench, tmp_path, monkeypatch):
    cell, runs = Cell(Recipe(2, m=1, on_policy=True), 2, 0), study_run.Study(bench, tmp_path / "a")
    monkeypatch.setattr(study_run, "_commit", lambda: "checked out meanwhile")
    row = runs.row(cell)
    assert row["commit"] != "checked out meanwhile"
    update = bench.batch_size * (CALLS_PER_EXAMPLE + 0.5)  # (N - 1) / 2 calls of the student, N = 2
    assert bench.calls - update < row["network_calls"] <= bench.calls
    again = study_run.Study(bench, tmp_path / "b").row(cell)
    assert {name: again[name] for name in study_run.FIGURES} == {name: row[name] for name in study_run.FIGURES}
    assert row["rms_to_teacher"] > 0


def test_a_scaled_budget_is_that_of_runs_in_a_folder_of_their_own(bench, tmp_path, monkeypatch):
    def distilled(runs, recipe, seed):
        assert recipe == Recipe(2, m=1)
        return study_run.Model(runs.workdir, recipe, calls=runs.bench.calls)

    monkeypatch.setattr(study_run.Study, "_distilled", distilled)
    model = study_run.Study(bench, tmp_path).model(Recipe(2, m=1, scale=2), 0)
    assert (model.recipe.name, model.calls) == ("k2_m1_x2", 2 * bench.calls)
    assert model.checkpoint == tmp_path / "budget_x2"
    assert bench.scaled(2).pairs == {2: (32, "bosh3")}


def test_a_distillation_takes_the_seconds_of_its_own_part_of_the_reflow(bench, tmp_path, monkeypatch):
    spent = collections.Counter()

    def run(runs, folder, name, seed, options, *, is_done):
        if not is_done:
            spent[name] += 1
            (folder / "2_rf" / "checkpoints" / str(options["training.n_iters"])).mkdir(parents=True)
        return spent[name]

    monkeypatch.setattr(study_run.Study, "run", run)
    monkeypatch.setattr(study_run.Study, "_pairs", lambda runs, *_: (tmp_path / "pairs", 96, 10))
    runs = study_run.Study(bench, tmp_path)
    whole = runs.model(Recipe(2), 0)
    start = runs._reflowed(Recipe(2, m=1), 0, whole=False)
    assert (start.updates, start.seconds) == (bench.reflow, 10 + 1)
    assert (whole.calls, whole.seconds) == (bench.calls, 10 + 2)


def test_a_run_that_is_stopped_keeps_its_seconds(bench, tmp_path, monkeypatch):
    def stopped(config, folder):
        raise KeyboardInterrupt

    monkeypatch.setattr("run_lib.train", stopped)
    runs = study_run.Study(bench, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        runs.run(tmp_path, "2_rf", 0, {}, is_done=False)
    assert runs.run(tmp_path, "2_rf", 0, {}, is_done=True) > 0


def test_a_row_of_another_teacher_is_made_again_and_not_verified(bench, tmp_path, monkeypatch):
    def main(*arguments):
        monkeypatch.setattr("sys.argv", ["study.py", "digits", "--workdir", str(tmp_path), *arguments])
        study_run.main()

    monkeypatch.chdir(tmp_path)  # which the script leaves
    cell, made = "k4_m1/euler_4/seed_0", []
    rows = [{"bench": "digits", "cell": cell, "teacher": "0f"}]
    monkeypatch.setattr(study_run, "read_rows", lambda: rows)
    monkeypatch.setattr(study_run, "append_row", made.append)
    monkeypatch.setattr(study_run.Study, "real", types.SimpleNamespace(network=types.SimpleNamespace(identity="a")))
    monkeypatch.setattr(
        study_run.Study, "row", lambda runs, cell: dict.fromkeys(study_run.FIGURES, 0.0) | {"cell": cell.id}
    )
    main("--only", cell, "--teacher", bench.teacher)
    assert [row["cell"] for row in made] == [cell]
    with pytest.raises(SystemExit, match=r"error: no row of .* is of the cell 'k4_m1/euler_4/seed_0'"):
        main("--verify", cell, "--teacher", bench.teacher)
    rows[0]["teacher"] = study_run.Study(bench, tmp_path).teacher[1]
    main("--only", cell, "--teacher", bench.teacher)
    assert len(made) == 2  # by another feature network
    rows[0]["features"] = "a"
    main("--only", cell, "--teacher", bench.teacher)
    assert len(made) == 2


def test_the_page_trains_nothing_for_its_picture(bench, tmp_path, monkeypatch):
    cells = {("k2_m1", "euler", 2): [{"cell": Cell(Recipe(2, m=1), 2, 0).id}]}
    study_page.draw_samples(bench, cells, tmp_path, tmp_path / "samples.png")
    assert list(tmp_path.iterdir()) == []


def test_rows_survive_a_line_cut_short(tmp_path):
    path = tmp_path / "study.jsonl"
    study_run.append_row({"cell": "a"}, path)
    path.write_text(path.read_text() + '{"cell": "b", "fi')
    study_run.append_row({"cell": "c"}, path)
    assert [row["cell"] for row in study_run.read_rows(path)] == ["a", "c"]
    assert json.loads(path.read_text().splitlines()[-1]) == {"cell": "c"}


def test_a_verdict_is_a_paired_t_statistic_above_two_with_one_sign():
    rng = np.random.default_rng(0)
    settled = []
    for shift in np.linspace(-0.3, 0.3, 21):
        first, second = rng.normal(shift, 0.05, 3), rng.normal(0, 0.05, 3)
        verdict = study_page.compare(
            *([{"seed": seed, "fid": value} for seed, value in enumerate(values)] for values in (first, second)), "fid"
        )
        one_sign = len(set(np.sign(first - second))) == 1
        assert verdict.is_settled == (one_sign and abs(scipy.stats.ttest_rel(first, second).statistic) > 2)
        settled.append(verdict.word)
    assert {"better", "worse", "not settled"} <= set(settled)


def test_two_seeds_settle_nothing():
    first, second = ([{"seed": s, "fid": value + s / 100} for s in range(2)] for value in (1.0, 2.0))
    assert study_page.compare(first, second, "fid").word == "2 of 3 seeds"


def test_rows_are_compared_within_a_feature_network_and_the_latest_row_of_a_seed_counts():
    def rows(features, fid):
        return [{"seed": s, "features": features, "fid": fid + s} for s in range(3)]

    first, second = rows("a", 1.0) + rows("b", 2.0), rows("a", 5.0) + rows("c", 9.0)
    assert study_page.compare(first, second, "fid").differences == (-4.0, -4.0, -4.0)
    assert study_page.compare(first, rows("c", 1.0), "fid").word == "0 of 3 seeds"
    assert study_page.latest(first, "fid") == [2.0, 3.0, 4.0]
    distances = [[{"seed": 0, "features": name, "rms_to_teacher": 1.0}] for name in ("a", "c")]
    assert study_page.compare(*distances, "rms_to_teacher").differences == (0.0,)


def test_every_line_of_a_figure_is_of_cells_of_the_study():
    planned = {(cell.recipe.name, cell.sampler, cell.nfe) for cell in all_cells((0,))}
    for series in (study_page.summary_series(), study_page.nfe_series(), study_page.cost_series()):
        for name, keys in series.items():
            assert len(planned & set(keys)) >= 2, name
