"""Exported models, against safetensors' own reader, PyYAML and files that somebody made up."""

import dataclasses
import json
import os
import pathlib
import shutil
import struct

import jax
import numpy as np
import pytest
import safetensors
import yaml
from safetensors.numpy import load_file, save_file
from tiny_run import load_weights, network_config, random_weights

import models
import sampler
import sampling
from checkpointing import exported
from checkpointing.checkpoint import checkpoint_at
from checkpointing.metadata import make_metadata
from models.weights import fingerprint
from scripts import export
from utils import InputError

CONFIG = network_config(k=2)


@pytest.fixture(scope="module")
def weights():
    return random_weights(CONFIG, count=7, step=30)


def metadata(stage="2_rf", boundaries=(1, 0.7, 0)):
    return make_metadata(models.create_model(CONFIG), stage, boundaries, source="/home/me/1_rf", teacher="0f")


@pytest.fixture
def folder(tmp_path, weights):
    exported.write_folder(tmp_path / "model", weights, metadata(), samplers=[{"num_scales": 4}])
    return tmp_path / "model"


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, weights, value):
    spoiled = jax.tree.map(np.copy, weights.ema_params)
    jax.tree.leaves(spoiled)[3].flat[0] = value
    exported.write_folder(tmp_path, dataclasses.replace(weights, ema_params=spoiled), metadata())
    with pytest.raises(InputError, match=r"params/all_modules_.* has values that are not finite"):
        load_weights(tmp_path, CONFIG)


@pytest.mark.parametrize("name", ["", "model.safetensors"])
def test_the_ema_alone_is_loaded_as_raw_weights_with_zero_moments(folder, weights, name):
    loaded = load_weights(folder / name, CONFIG)
    same(loaded.params, weights.ema_params)
    same(loaded.ema_params, weights.ema_params)
    same((loaded.mu, loaded.nu), jax.tree.map(np.zeros_like, (weights.params, weights.params)))
    assert (loaded.step, loaded.count) == (30, 0)
    with safetensors.safe_open(folder / "model.safetensors", "np") as file:
        assert all(key.startswith("ema_params/") for key in file.keys())  # noqa: SIM118  it is no dict
    noted = checkpoint_at(folder / name).metadata
    assert (noted["stage"], noted["k"], noted["boundaries"], noted["teacher"]) == ("2_rf", 2, [1.0, 0.7, 0.0], "0f")


def test_a_full_folder_has_all_trees(tmp_path, weights):
    exported.write_folder(tmp_path, weights, metadata(), full=True)
    loaded = load_weights(tmp_path, CONFIG)
    same((loaded.params, loaded.mu, loaded.nu), (weights.params, weights.mu, weights.nu))
    assert loaded.count == 7


def test_the_folder_says_what_it_is(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["image_shape"] == [8, 8, 1]
    assert config["data_range"] == [-1.0, 1.0]
    assert config["boundaries"] == [1.0, 0.7, 0.0]
    assert config["samplers"] == [{"num_scales": 4}]
    assert config["model"]["nf"] == 4
    assert config["clock"]["eps"] == 1e-3


def rewritten(path, change=lambda arrays: None, **entries):
    """The exported file with its arrays changed, and entries of its metadata replaced (k__name: of section k)."""
    with path.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    description = json.loads(header["__metadata__"]["seqrf"])
    for name, value in entries.items():
        *sections, key = name.split("__")
        place = description
        for section in sections:
            place = place[section]
        place[key] = value
    arrays = load_file(path)
    change(arrays)
    save_file(arrays, path, {"seqrf": json.dumps(description)})
    (path.parent / "config.json").unlink(missing_ok=True)


KEY = "ema_params/all_modules_0/head_bias"
HEADER = struct.Struct("<Q")
SPOILT = {
    "missing array": (lambda f: rewritten(f, lambda a: a.pop(KEY)), "head_bias has shape none: it is missing"),
    "shape": (lambda f: rewritten(f, lambda a: a.update({KEY: a[KEY][:, :3].copy()})), r"has shape \(2, 3\)"),
    "dtype": (lambda f: rewritten(f, lambda a: a.update({KEY: a[KEY].astype(np.int32)})), "dtype int32"),
    "path": (lambda f: rewritten(f, lambda a: a.update({"ema_params/../../x": a[KEY]})), r"\.\./x has shape"),
    "two places": (lambda f: rewritten(f, lambda a: a.update({"ema_params": a[KEY]})), "not a file that SeqRF"),
    "half": (lambda f: f.write_bytes(f.read_bytes()[:5000]), "not a file that SeqRF"),
    "huge header": (lambda f: f.write_bytes(HEADER.pack(1 << 62) + b"{}"), "not a file that SeqRF"),
    "deep header": (lambda f: f.write_bytes(HEADER.pack(10**6) + b"[" * 10**6), "not a file that SeqRF"),
    "foreign": (lambda f: save_file({"a": np.zeros(3)}, f), "not a file that SeqRF"),
    "image size": (lambda f: rewritten(f, data__image_size=65_536), "images of 65536 x 65536"),
    "blocks": (lambda f: rewritten(f, model__num_res_blocks=1_000), "1000 residual blocks"),
    "channels": (lambda f: rewritten(f, model__nf=65_536), "has shape|corrupt"),
    "segments": (lambda f: rewritten(f, k=10**9), "k = 1000000000 and 3 boundaries"),
    "infinity": (lambda f: rewritten(f, boundaries=[1, 1e999, 0]), "its metadata has boundaries"),
    "text": (lambda f: rewritten(f, boundaries=["1", "x", "0"]), "not a file that SeqRF"),
    "steps": (lambda f: rewritten(f, step=10**300), "the number 1000.* is too large"),
    "updates": (lambda f: rewritten(f, step=2**31), "its metadata has step = 2147483648"),
    "setting": (lambda f: rewritten(f, model={"a.b": 1}), "has shape"),
    "no image size": (lambda f: rewritten(f, data={"num_channels": 1}), "not a file that SeqRF"),
    "source": (lambda f: rewritten(f, source=5), "its metadata has source = 5"),
    "another config": (
        lambda f: f.with_name("config.json").write_text(json.dumps({"k": 10**18})),
        "config.json has stage = None",
    ),
    "no JSON": (lambda f: f.with_name("config.json").write_text("{"), "config.json is damaged"),
    "long config": (lambda f: f.with_name("config.json").write_text(" " * 2**25), "it has more than 16777216 bytes"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_damaged_or_malicious_folder_is_refused_in_one_line(folder, name):
    spoil, message = SPOILT[name]
    spoil(folder / "model.safetensors")
    with pytest.raises(InputError, match=message) as refused:
        sampler.load(folder)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_what_is_no_plain_file_is_not_opened(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)  # reading it would wait for ever
    for path in (folder, folder / "model.safetensors"):
        with pytest.raises(InputError, match="is no plain file"):
            sampler.load(path)


def test_links_as_a_hubs_cache_makes_them_are_followed(folder, tmp_path, weights):
    (tmp_path / "snapshot").mkdir()
    for file in folder.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    same(load_weights(tmp_path / "snapshot", CONFIG).params, weights.ema_params)


def test_a_loaded_model_samples_the_noises_of_its_seed_and_counts_calls(folder, weights):
    model = sampler.load(folder, batch_size=4)
    np.testing.assert_array_equal(model.boundaries, np.float32([1, 0.7, 0]))
    assert model.image_shape == (8, 8, 1)
    images = model.sample(6, seed=3, num_scales=4)
    assert model.nfe == 4
    assert images.shape == (6, 8, 8, 1)
    noise = dataclasses.replace(model.network, seed=3).noise(np.arange(6))
    velocity = models.velocity_fn(models.create_model(CONFIG), weights.ema_params)
    x = sampling.solve(velocity, noise, [1, 0.7, 0], method="pc", predictor="rf_solver", num_scales=4).x
    np.testing.assert_allclose(images, np.clip((x + 1) / 2, 0, 1), atol=1e-5)
    programs = len(model.network.programs._compiled)
    assert not np.array_equal(model.sample(6, seed=4, num_scales=4), images)
    np.testing.assert_array_equal(model.sample(6, seed=3, num_scales=4), images)
    assert len(model.network.programs._compiled) == programs == 1


def test_arguments_that_cannot_work_are_named(folder):
    model = sampler.load(folder)
    for arguments, message in (
        ({"count": 0}, "count = 0"),
        ({"count": 1, "seed": -1}, "seed = -1"),
        ({"count": 1, "num_scales": 1}, "at least 2, one a segment"),
        ({"count": 1, "num_scales": 4, "tol": 1e-3}, "not both"),
        ({"count": 1, "tol": 0.0}, "tol = 0.0"),
        ({"count": 1, "predictor": "euler"}, "use one of rf_solver"),
    ):
        with pytest.raises(InputError, match=message):
            model.sample(**arguments)
    with pytest.raises(InputError, match="batch_size = 0"):
        sampler.load(folder, batch_size=0)


MODEL_ZOO = pathlib.Path(__file__).parents[1] / "model_zoo"  # with a folder of classifiers


@pytest.mark.parametrize("path", sorted(p.parent for p in MODEL_ZOO.glob("*/config.json")), ids=lambda p: p.name)
def test_shipped_models_load_and_are_small(path):
    model = sampler.load(path)
    assert sum(file.stat().st_size for file in path.iterdir()) < 8e6
    assert {file.name for file in path.iterdir()} == {"README.md", "config.json", "model.safetensors", "samples.png"}
    recommended = json.loads((path / "config.json").read_text())["samplers"]
    for options in recommended:
        model.sampler(**options)  # raises for one that cannot work
    assert recommended
    if path.name.endswith(("_distill", "_distill_4")):  # by itself it takes the steps that it was distilled to
        assert model.sampler().options.num_scales == recommended[0]["num_scales"]


# --- scripts/export.py ------------------------------------------------------------------------------------------------


def measurement(fingerprint, num_samples=2048):
    settings = {"weights": fingerprint, "num_samples": num_samples, "data": "digits"}
    values = {"fid_digits_classifier": 0.46, "nfe": 2.0, "straightness": 5.5, "truncation_error": None}
    return json.dumps({"sampler": "Euler 2", **values, "settings": settings})


def test_the_script_writes_a_folder_for_a_hub_with_the_metrics_of_these_weights(folder, tmp_path, weights, capsys):
    for name, measured in {"euler": fingerprint(weights.ema_params), "other": "00"}.items():
        step = tmp_path / name / "step_30"
        step.mkdir(parents=True)
        (step / "metrics.json").write_text(measurement(measured))
    out = tmp_path / "out" / "two"
    arguments = [str(folder), str(out), "--name", "Two", "--command", "bash train.sh", "--images", "4"]
    assert export.main(arguments) == 0
    assert "1 evaluations" in capsys.readouterr().out
    assert {entry.name for entry in out.iterdir()} == {"README.md", "config.json", "model.safetensors", "samples.png"}
    _, front, text = (out / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["license"] == "apache-2.0"
    assert yaml.safe_load(front)["library_name"] == "seqrf"
    assert "| Euler 2 | 2 | 0.46 | 5.5 | - | - |" in text
    assert "2048 samples and the digits data" in text
    assert "bash train.sh" in text
    assert "/home/me" not in (out / "config.json").read_text() + text
    assert export.main([str(folder), str(out), "--images", "0"]) == 0  # again
    shutil.rmtree(out)
    out.mkdir()
    (out / ".model.safetensors.0f0f0f0f.tmp").write_bytes(b"{")  # what a kill left
    assert export.main([str(folder), str(out), "--images", "0"]) == 0
    assert not list(out.glob(".*"))


def test_a_card_has_a_table_for_each_way_of_measuring():
    tables = export.metrics_tables([json.loads(measurement("0f", count)) for count in (2048, 16, 2048)])
    large, small = tables.split("between 2048 samples")
    assert (large.count("| Euler 2 |"), small.count("| Euler 2 |")) == (2, 1)
    assert "between 16 samples" in small


def test_where_a_model_started_from_is_named_without_the_machines_path():
    names = {
        "/home/me/k4/2_rf/checkpoints/450": "k4/2_rf, step 450",
        "2_rf/checkpoints/450": "2_rf, step 450",
        "model_zoo/digits_1rf/model.safetensors": "digits_1rf",
        "/home/me/one.pth": "one.pth",
        "random": "random",
        "": "",
    }
    for source, name in names.items():
        assert export.source_name(source) == name
        assert export.source_name(name) == name  # of an exported model that is exported again


def test_the_script_refuses_in_one_line(folder, tmp_path, capsys):
    (tmp_path / "metrics.json").write_text(measurement("00"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    for arguments, message in (
        ([str(tmp_path / "nothing"), str(tmp_path / "out")], "no checkpoint at"),
        ([str(folder), str(tmp_path / "full")], "holds something else"),
        ([str(folder), str(tmp_path / "out"), "--metrics", str(tmp_path / "metrics.json")], "no metrics.json of these"),
    ):
        assert export.main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["run", "out"])
def test_the_script_takes_no_bucket_for_a_folder(folder, tmp_path, place, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = {"run": str(folder), "out": "out"} | {place: "gs://bucket/x"}
    with pytest.raises(SystemExit, match="2"):
        export.main(list(arguments.values()))
    assert f"argument {place}: gs://bucket/x is in a bucket" in capsys.readouterr().err
    assert list(tmp_path.glob("gs*")) == []


def test_an_error_while_the_network_is_traced_is_no_damage(folder, monkeypatch):
    def fail(network):
        raise RuntimeError("traced")

    monkeypatch.setattr(models, "weight_shapes", fail)
    with pytest.raises(RuntimeError, match=r"^traced$"):
        load_weights(folder, CONFIG)


def test_a_bucket_that_cannot_be_reached_is_no_damage():
    with pytest.raises(OSError, match="refused"), exported.damage_named("gs://bucket/x: corrupt"):
        raise ValueError("UNAVAILABLE: Error reading gs://bucket/x: refused")
    with pytest.raises(InputError, match="corrupt: truncated"), exported.damage_named("gs://bucket/x: corrupt"):
        raise ValueError("truncated")
