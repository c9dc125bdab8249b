"""The table, the claims and the page of report, on figures written by the test."""

import contextlib
import html.parser
import io
import json
import shutil
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from report.__main__ import main

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
    """(exit status, stdout, stderr) of `python -m report ...`."""
    out, err, arguments = io.StringIO(), io.StringIO(), ["report", *options, str(workdir)]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), mock.patch("sys.argv", arguments):
        try:
            code = main()
        except SystemExit as end:
            print(end, file=sys.stderr)
            code = 1
    return code, out.getvalue(), err.getvalue()


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


def test_what_is_no_evaluation_is_left_out(workdir):
    write(workdir, "1rf_ode", nfe="many")
    write(workdir, "2seqrf_ode", model=["2-SeqRF"])
    (workdir / "1rf_euler_2" / "step_x").mkdir()
    (workdir / "1rf_euler_2" / "step_x" / "metrics.json").write_text("{}")
    (workdir / "2distill_euler_2" / "step_10" / "metrics.json").write_text("[1, 2")
    code, said, errors = report(workdir)
    assert code == 0
    assert errors.count("left out: ") == 4
    assert "ODE" not in said
    assert "2-SeqRF " in said


# --- the page ---------------------------------------------------------------------------------------------------------

HOSTILE = "<script>alert(1)</script>'\"><img src=x onerror=alert(1)> $\\frac$"


class Page(html.parser.HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def samples(path, n, side=4):
    """A grid of n images, each of one grey level, as figures.draw_images lays it out."""
    columns = int(np.ceil(np.sqrt(n)))
    rows = int(np.ceil(n / columns))
    grid = np.full((rows * (side + 1), columns * (side + 1)), 255, np.uint8)
    for i in range(n):
        y, x = divmod(i, columns)
        grid[y * (side + 1) : y * (side + 1) + side, x * (side + 1) : x * (side + 1) + side] = i
    Image.fromarray(grid).save(path)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A workdir with every kind of file that the page shows, all its strings hostile."""
    workdir = tmp_path_factory.mktemp("run")
    record = {"command": f"python main.py --workdir={HOSTILE}", "commit": HOSTILE, "versions": {HOSTILE: HOSTILE}}
    for folder in FIGURES:
        settings = {"num_samples": 64, "network": HOSTILE, "weights": folder}
        floor = {"floor_fid_digits_classifier": 0.25, "floor_samples": 297, "floor_reference_samples": 1500}
        write(workdir, folder, settings=settings, provenance=record, rms_to_teacher=0.2, **floor)
        step = workdir / folder / "step_10"
        samples(step / "samples.png", 64)
        ts = np.linspace(1, 0, 9)
        np.savez(step / "straightness.npz", ts=ts, curve=np.ones(8), sequential_curve=np.zeros(8))
    write(workdir, "1rf_ode", step=5, settings={"num_samples": 64})
    odd = {"settings": settings | {"num_samples": HOSTILE}, "provenance": record | {"seconds": HOSTILE}}
    write(workdir, "2seqrf_ode", model=HOSTILE, sampler=HOSTILE, **odd)
    samples(workdir / "1rf_ode" / "step_10" / "trajectory.png", 4)
    for stage in ("1_rf", "2_rf"):
        (workdir / stage).mkdir()
        lines = [{"step": n, "loss": 1 / n, "gradient_norm": None, HOSTILE: HOSTILE} for n in (1, 2, 3)]
        (workdir / stage / "metrics.json").write_text(json.dumps(lines))
        (workdir / stage / "provenance.json").write_text(json.dumps(record | {"command": f"{stage} {HOSTILE}"}))
    pairs = workdir / "samples" / "reflow_batch"
    pairs.mkdir(parents=True)
    (pairs / "manifest.json").write_text(json.dumps({"k": 2, "boundaries": [1, 0.5, 0], "teacher": HOSTILE}))
    (workdir / "samples" / "metrics.json").write_text(json.dumps([{"step": 64, "pairs_per_second": 12.0}]))
    samples(workdir / "samples" / "pairs.png", 4)
    code, said, errors = report(workdir, "--html")
    assert code == 0, errors
    assert f"report: {workdir / 'report.html'}" in said
    return workdir


def test_the_page_needs_no_other_file_and_holds_everything(whole_run):
    text = (whole_run / "report.html").read_text()
    page = Page(text)
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert all(attributes["src"].startswith("data:image/png;base64,") and attributes["alt"] for attributes in images)
    # FID, RMS, checkpoints, straightness twice, the loss; a row of samples for each; one trajectory, the pairs.
    assert len(images) == 6 + len(FIGURES) + 2
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert {link.removeprefix("#") for link in links} == ids
    assert {"figures", "samples", "straightness", "training", "pairs", "measured", "commands"} == ids
    loading = {"src", "srcset", "href", "data", "poster", "action", "background", "formaction", "style"}
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "form", "base"}, tag
        assert not {name for name in attributes if name.startswith("on")}
        assert not loading & attributes.keys() or tag in ("img", "a")
    assert "url(" not in text
    assert "@import" not in text
    for shown in ("Floor of fid_digits_classifier: 0.25, of 297 real images against 1500", "pairs per second", "12"):
        assert shown in page.text


def test_strings_of_files_are_text(whole_run):
    text = (whole_run / "report.html").read_text()
    page = Page(text)
    assert "<script" not in text
    assert "<img src=x" not in text
    assert page.text.count(HOSTILE) >= 6  # model, sampler, commands, network, commit, versions, teacher
    assert "default-src 'none'" in next(a["content"] for t, a in page.tags if a.get("http-equiv"))


def test_a_column_of_samples_is_one_noise(whole_run):
    for folder in ("1rf_euler_2", "2distill_euler_2"):
        strip = np.asarray(Image.open(whole_run / "report" / f"samples_{folder}.png"))
        assert strip.shape == (5, 16 * 5, 3)
        np.testing.assert_array_equal(strip[0, ::5, 0], range(16))


def test_a_workdir_with_numbers_alone_is_a_page_too(workdir):
    (workdir / "explore.html").write_text("")
    assert report(workdir, "--html")[0] == 0
    page = Page((workdir / "report.html").read_text())
    assert [a["alt"] for t, a in page.tags if t == "img"] == [
        "fid_digits_classifier against NFE",
        "truncation error: RMS to the model's own exact sample",
    ]
    assert "explore.html" in [a["href"] for t, a in page.tags if t == "a"]


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROBE = """<script>addEventListener("load", () => {
  const broken = [...document.images].filter((image) => !image.naturalWidth).length;
  const {scrollWidth, clientWidth} = document.documentElement;
  parent.postMessage([innerWidth, scrollWidth - clientWidth, document.images.length, broken].join(" "), "*");
});</script>"""
FRAMES = """<body><script>addEventListener("message", ({data}) => document.body.append(` [${data}]`));</script>
<iframe width="390" height="800" src="probe.html"></iframe>
<iframe width="1280" height="800" src="probe.html"></iframe>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_chromium_shows_every_picture_and_nothing_is_wider_than_a_phone_or_a_desktop(whole_run, tmp_path):
    page = (whole_run / "report.html").read_text()
    policy = '<meta http-equiv="Content-Security-Policy"'
    assert policy in page
    (tmp_path / "probe.html").write_text(page.replace(policy, f"{PROBE}<meta name=no-policy"))
    (tmp_path / "frames.html").write_text(FRAMES)
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=10000", "--dump-dom", (tmp_path / "frames.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    pictures = len([tag for tag, _ in Page(page).tags if tag == "img"])
    assert f"[390 0 {pictures} 0]" in done.stdout
    assert f"[1280 0 {pictures} 0]" in done.stdout
