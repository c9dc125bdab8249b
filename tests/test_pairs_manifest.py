"""manifest.json: what is accepted, what is refused, and who writes it."""

import dataclasses
import json
import shutil

import numpy as np
import pair_maker
import pytest
from pair_maker import arrays_of, digests

import reflow
import segments
from pairs import manifest as pairmanifest
from pairs.reader import PairSet
from utils import InputError


def test_contents_of_the_images_are_compared_where_both_have_a_digest(tmp_path):
    def plan(name, contents):
        made = pair_maker.plan(tmp_path / name)
        return dataclasses.replace(made, dataset=made.dataset + contents)

    pairmanifest.begin_manifest(plan("older", ""))
    pairmanifest.begin_manifest(plan("older", ", contents 0f"))  # half made before there were digests
    pairmanifest.begin_manifest(plan("newer", ", contents 0f"))
    with pytest.raises(
        InputError, match=r"pairs with dataset = .*contents 0f, but this run makes them with .*contents 1"
    ):
        pairmanifest.begin_manifest(plan("newer", ", contents 1e"))


def test_an_empty_folder_and_a_damaged_manifest_are_refused(copied_set, tmp_path):
    with pytest.raises(InputError, match=r"there are no pairs in .*gen_reflow"):
        PairSet(tmp_path / "nowhere")
    for number in (0, 16):
        stranger = shutil.copy(copied_set / "reflow_batch_1.npz", copied_set / f"reflow_batch_{number}.npz")
        with pytest.raises(InputError, match=rf"reflow_batch_{number}\.npz does not belong"):
            PairSet(copied_set)
        stranger.unlink()
    shutil.copy(copied_set / "reflow_batch_1.npz", copied_set / "reflow_batch_01.npz")
    assert len(PairSet(copied_set)) == 174  # that is no name of a pair file
    for text in ('{"complete": tr', "[]", '{"format": 1}'):
        (copied_set / "manifest.json").write_text(text)
        with pytest.raises(InputError, match=r"manifest\.json is"):
            PairSet(copied_set)


def test_a_path_that_is_not_a_folder_is_refused(copied_set):
    with pytest.raises(InputError, match=r"reflow_batch_1\.npz cannot be listed: .*Not a directory.*; give"):
        PairSet(copied_set / "reflow_batch_1.npz")
    with pytest.raises(InputError, match=r"reflow_batch_1\.npz cannot be listed"):
        pair_maker.generate(copied_set / "reflow_batch_1.npz")
    (copied_set / "manifest.json").unlink()
    (copied_set / "manifest.json").mkdir()
    with pytest.raises(InputError, match=r"manifest\.json cannot be read"):
        PairSet(copied_set)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("format", True), ("complete", "no"), ("k", "3"), ("k", 4), ("files", 16), ("files", None), ("pairs", 0),
        ("pairs", 1.5), ("file_size", 0), ("file_size", -12), ("boundaries", [1, "a", 0.3, 0]), ("boundaries", 1),
        ("boundaries", [1, 0.3, 0.6, 0]), ("boundaries", [1, 10**18, 0.3, 0]), ("boundaries", []),
        ("image_shape", [6, 5]), ("image_shape", [6, 5, "1"]), ("image_shape", [6, 5, 0]), ("dataset_size", 0),
        ("dtype", "int8"), ("dtype", 32), ("store_noise", None), ("centered", 1), ("tol", "small"), ("seed", []),
        ("contents", []), ("contents", {"reflow_batch_1.npz": 7}), ("contents", {"reflow_batch_1.npz": {"size": 7}}),
    ],
)  # fmt: skip
def test_a_manifest_with_an_invalid_value_is_refused(copied_set, name, value):
    manifest = json.loads((copied_set / "manifest.json").read_text()) | {name: value}
    (copied_set / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=rf"manifest\.json is damaged: its {name}.*restore a backup") as error:
        PairSet(copied_set)
    assert "\n" not in str(error.value)


def test_another_set_in_the_folder_is_refused_by_the_first_difference(whole_set, tmp_path):
    before = digests(whole_set)
    for changes, line in (
        ({"seed": 8}, "seed = 7, but this run makes them with 8"),
        ({"teacher": "new"}, "teacher = known, but this run makes them with new"),
        ({"boundaries": segments.uniform_boundaries(2)}, "boundaries = "),
    ):
        with pytest.raises(InputError, match=line):
            pair_maker.generate(whole_set, **changes)
    assert digests(whole_set) == before
    shutil.copytree(whole_set, tmp_path / "p")
    (tmp_path / "p" / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"without a manifest\.json"):
        pair_maker.generate(tmp_path / "p")


def test_of_two_workers_that_begin_at_once_one_manifest_wins(tmp_path, monkeypatch):
    first, second = pair_maker.plan(tmp_path / "p"), pair_maker.plan(tmp_path / "p", boundaries=[1, 0.6, 0.3, 0])
    pairmanifest.begin_manifest(first)
    before = (tmp_path / "p" / "manifest.json").read_bytes()
    # The second looked before the first wrote.
    looks = iter([None])
    real = pairmanifest.read_manifest
    monkeypatch.setattr(pairmanifest, "read_manifest", lambda folder: next(looks, real(folder)))
    with pytest.raises(InputError, match="boundaries"):
        pairmanifest.begin_manifest(second)
    assert (tmp_path / "p" / "manifest.json").read_bytes() == before
    assert [path.name for path in (tmp_path / "p").iterdir()] == ["manifest.json"]


def test_of_two_divisions_found_at_once_the_first_is_taken_over(tmp_path):
    first = pair_maker.plan(tmp_path / "p", boundaries=[1, 0.7, 0.3, 0])
    second = pair_maker.plan(tmp_path / "p", boundaries=[1, 0.6, 0.3, 0])
    assert pairmanifest.claim_plan(first, {"adaptive": True, "cost_adaptive": 1.0}) == first
    assert pairmanifest.claim_plan(second, {"adaptive": True, "cost_adaptive": 2.0}) == first
    assert pairmanifest.read_manifest(tmp_path / "p")["cost_adaptive"] == 1
    params, other = {"one": np.float32(1)}, pair_maker.plan(tmp_path / "p", boundaries=[1, 0.5, 0])
    arguments = (pair_maker.Images(), pair_maker.make_velocity, params)
    assert reflow.generate(second, *arguments, batch_size=4, extra={"adaptive": True}, progress=False).complete
    assert set(arrays_of(tmp_path / "p")["t1"]) == set(np.float32([1, 0.7, 0.3]))
    for plan, extra in ((other, {"adaptive": True}), (second, {"adaptive": False}), (second, {})):
        with pytest.raises(InputError, match="boundaries"):
            pairmanifest.claim_plan(plan, extra)


def test_files_of_two_divisions_do_not_mix_where_a_manifest_was_replaced(tmp_path):
    folder = tmp_path / "p"
    other = pair_maker.plan(tmp_path / "q", boundaries=[1, 0.7, 0.3, 0])
    pairmanifest.begin_manifest(other)

    class Replaced(pair_maker.Images):  # as an object store does, which knows no links
        def read(self, start, count):
            shutil.copy(tmp_path / "q" / "manifest.json", folder)
            return super().read(start, count)

    with pytest.raises(InputError, match="boundaries"):
        pair_maker.generate(folder, images=Replaced())
    assert not list(folder.glob("*.npz"))


def test_extra_entries_stay_in_the_manifest(tmp_path):
    plan = pair_maker.plan(tmp_path / "p", pairs=3)
    params = {"one": np.float32(1)}
    costs = {"adaptive": True, "cost_uniform": 2.0, "cost_adaptive": 1.5}
    arguments = (plan, pair_maker.Images(), pair_maker.make_velocity, params)
    reflow.generate(*arguments, batch_size=4, extra=costs, progress=False)
    reflow.generate(*arguments, batch_size=4, progress=False)
    assert pairmanifest.read_manifest(plan.folder).items() >= costs.items()
