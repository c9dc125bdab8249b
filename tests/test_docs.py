"""What the documentation names is there: links, sections, settings and files."""

import pathlib
import re
import subprocess

import pytest

from configs.default import get_default_config

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/method.md", "docs/recipes.md", "model_zoo/README.md"]


def sources() -> list[pathlib.Path]:
    """The text files that git tracks."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return [ROOT / name for name in names if name.endswith((".py", ".sh", ".md", ".toml")) and (ROOT / name).is_file()]


def anchors(page: pathlib.Path) -> set[str]:
    """The names under which GitHub links to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def is_setting(name: str) -> bool:
    """Whether section.key is in the default configuration."""
    section, _, key = name.partition(".")
    config = get_default_config()
    return name in config if not key else section in config and key in config[section]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text()):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES)
def test_settings_exist(page):
    text = (ROOT / page).read_text()
    sections = "|".join(key for key, value in get_default_config().items() if hasattr(value, "items"))
    named = set(re.findall(r"--config\.([\w.]+\w)", text)) | set(re.findall(rf"`((?:{sections})\.\w+)", text))
    others = {"sampling.solve", "sampling.SOLVERS", "sampling.PREDICTORS", "sampling.py", "model.safetensors"}
    assert not {name for name in named - others if not is_setting(name)}


@pytest.mark.parametrize("page", PAGES)
def test_files_exist(page):
    text = (ROOT / page).read_text()
    named = re.findall(r"(?<![\w/.])((?:configs|docs|models|pairs|scripts|tests|\.ci)/[\w/.-]*\w)", text)
    placeholders = ("configs/rf/FILE.py", "tests/test_")
    assert not [name for name in named if name not in placeholders and not (ROOT / name).exists()]


def test_code_cites_sections_of_the_method():
    text = (ROOT / "docs" / "method.md").read_text()
    sections = set(re.findall(r"^## (\d+)", text, flags=re.MULTILINE))
    for path in sources():
        cited = re.findall(r"method\.md`?,? sections? (\d+)(?: and (\d+))?", path.read_text())
        assert {number for pair in cited for number in pair if number} <= sections, path
