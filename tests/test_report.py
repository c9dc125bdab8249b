"""The table and the claims of scripts/report.py, on figures written by the test."""

import json
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).resolve().parents[1] / "scripts" / "report.py"
FIGURES = {  # folder: (model, sampler, NFE, FID, sequential straightness)
    "1rf_ode": ("1-RF", "ODE", 38, 0.3, 3.0),
    "1rf_euler_2": ("1-RF", "Euler 2", 2, 4.0, 0.0),
    "2seqrf_ode": ("2-SeqRF", "ODE", 50, 0.4, 0.3),
    "2seqrf_euler_2": ("2-SeqRF", "Euler 2", 2, 0.6, 0.0),
    "2distill_euler_2": ("2-SeqRF-Distill", "Euler 2", 2, 0.5, 0.0),
}


def write(workdir, folder, step=10, **changed):
    model, sampler, nfe, fid, sequential = FIGURES[folder]
    entry = {"step": step, "model": model, "sampler": sampler, "nfe": nfe, "fid_digits_classifier": fid}
    entry |= {"straightness": 2.0, "sequential_straightness": sequential, "truncation_error": 0.1}
    path = workdir / folder / f"step_{step}" / "metrics.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entry | {"seconds_per_1000": 1.0} | changed))


def report(workdir, *options):
    done = subprocess.run([sys.executable, SCRIPT, *options, workdir], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def workdir(tmp_path):
    for folder in FIGURES:
        write(tmp_path, folder)
    return tmp_path


def test_the_last_step_of_every_folder_is_a_row_and_a_point(workdir):
    write(workdir, "1rf_ode", step=2, fid_digits_classifier=9.0)
    write(workdir, "2seqrf_ode", truncation_error=None)  # NaN in JSON
    code, said, errors = report(workdir)
    assert code == 0, errors
    table = (workdir / "report.md").read_text()
    assert table in said
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert rows[0][3] == "fid_digits_classifier"
    assert ["1-RF", "ODE", "38", "0.3", "2", "3", "0.1", "1"] in rows
    assert next(row for row in rows if row[:2] == ["2-SeqRF", "ODE"])[6] == "-"
    assert len(rows) == 2 + len(FIGURES)
    assert (workdir / "fid_against_nfe.png").stat().st_size > 1000


def test_the_claims_are_checked(workdir):
    code, said, _ = report(workdir, "--check")
    assert code == 0
    assert "fid_digits_classifier of 2-SeqRF / 1-RF, Euler 2: 0.150" in said
    assert "2-SeqRF-Distill / 2-SeqRF, Euler 2: 0.833" in said
    assert "1-RF, ODE: 0.100" in said


@pytest.mark.parametrize(
    ("folder", "changed"),
    [
        ("2seqrf_euler_2", {"fid_digits_classifier": 0.81}),
        ("2distill_euler_2", {"fid_digits_classifier": 0.61}),
        ("2seqrf_ode", {"sequential_straightness": 0.76}),
        ("2seqrf_ode", {"sequential_straightness": None}),
    ],
)
def test_a_ratio_above_its_bound_is_a_failure(workdir, folder, changed):
    write(workdir, folder, **changed)
    code, said, _ = report(workdir, "--check")
    assert code == 1
    assert said.count("MISSED") == 1


def test_an_empty_workdir_is_an_error(tmp_path):
    code, _, errors = report(tmp_path)
    assert code != 0
    assert errors.startswith("error: no <eval_folder>")
