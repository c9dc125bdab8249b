"""The page of report/explore.py, rendered from a tiny model and read back as a browser would."""

import base64
import html.parser
import io
import json

import numpy as np
import pytest
from PIL import Image
from test_exported import metadata
from tiny_run import network_config, random_weights

import sampler
from checkpointing import exported
from report import explore


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A 2-SeqRF with random weights."""
    weights = random_weights(network_config(k=2))
    path = tmp_path_factory.mktemp("model")
    exported.write_folder(path, weights, metadata())
    return path


class Elements(html.parser.HTMLParser):
    """The scripts of a page, and every attribute that can name a resource."""

    def __init__(self):
        super().__init__()
        self.scripts, self.resources, self.in_script = [], [], False

    def handle_starttag(self, tag, attrs):
        self.resources += [value for name, value in attrs if name in ("src", "href")]
        if tag == "script":
            self.scripts.append("")
            self.in_script = True

    def handle_endtag(self, tag):
        self.in_script = self.in_script and tag != "script"

    def handle_data(self, data):
        if self.in_script:
            self.scripts[-1] += data


def parsed(text):
    elements = Elements()
    elements.feed(text)
    return elements


def test_the_page_holds_every_frame_of_every_model(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("SEQRF_CACHE", str(tmp_path / "cache"))
    out, name = tmp_path / "page.html", "</script><b>'&two"
    assert explore.main([f"{name}={folder}", "-o", str(out), "--steps", "1,3", "--count", "4", "--tol", "1e-2"]) == 0
    elements = parsed(out.read_text())
    assert len(elements.scripts) == 2
    assert elements.resources == []
    data = json.loads(elements.scripts[0])
    (model,) = data["models"]
    assert model["name"] == name
    assert data["steps"] == ["1", "3", "adaptive"]
    few, three, adaptive = model["runs"]
    assert few is None  # of two segments
    assert three["nfe"] == "3"
    assert adaptive["rms"] is None
    assert int(adaptive["nfe"]) > 10
    sprite = Image.open(io.BytesIO(base64.b64decode(three["sprite"].partition(",")[2])))
    shown = np.asarray(sprite, np.float32).reshape(len(data["times"]), 8, 4, 8).swapaxes(1, 2) / 255
    loaded = sampler.load(folder)
    np.testing.assert_allclose(shown[-1], loaded.sample(4, num_scales=3)[..., 0], atol=0.51 / 255)
    noise = np.asarray(loaded.sampler().noise(np.arange(4)))[..., 0]
    np.testing.assert_allclose(shown[0], np.clip((noise + 1) / 2, 0, 1), atol=0.51 / 255)


def test_what_cannot_be_shown_is_refused_in_one_line(folder, tmp_path, capsys):
    assert explore.main([str(tmp_path / "nothing")]) == 2
    error = capsys.readouterr().err
    assert "no checkpoint at" in error
    assert error.count("\n") == 1
