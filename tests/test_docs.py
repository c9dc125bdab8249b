"""What the documentation names is there: links, sections, settings and files."""

import ast
import pathlib
import re
import subprocess

import pytest
from absl import flags
from ml_collections import config_flags

from configs.default import get_default_config
from configs.validation import check_config

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/method.md",
    "docs/recipes.md",
    "docs/choosing_k.md",
    "docs/commands.md",
    "docs/accelerators.md",
    "docs/your_own_images.md",
    "model_zoo/README.md",
]


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


def is_code(name: str) -> bool:
    """Whether module.name, such as `sampling.solve`, is named there, or the name is the module's file."""
    module, _, key = name.partition(".")
    file = ROOT / f"{module}.py"
    return file.exists() and (key == "py" or bool(re.search(rf"\b{key}\b", file.read_text())))


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
    assert not {name for name in named - {"model.safetensors"} if not is_setting(name) and not is_code(name)}


@pytest.mark.parametrize("page", sorted({*PAGES} - {"CHANGELOG.md"}))  # which names files of earlier versions too
def test_files_exist(page):
    text = (ROOT / page).read_text()
    packages = [path.parent.name for path in ROOT.glob("*/__init__.py")]
    folders = "|".join([*packages, "docs", "scripts", "tests", r"\.ci"])
    named = re.findall(rf"(?<![\w/.])((?:{folders})/[\w/.-]*\w)", text)
    placeholders = ("configs/rf/FILE.py", "tests/test_")
    assert not [name for name in named if name not in placeholders and not (ROOT / name).exists()]


def test_code_cites_sections_of_the_method():
    text = (ROOT / "docs" / "method.md").read_text()
    sections = set(re.findall(r"^## (\d+)", text, flags=re.MULTILINE))
    for path in sources():
        cited = re.findall(r"method\.md`?,? sections? (\d+)(?: and (\d+))?", path.read_text())
        assert {number for pair in cited for number in pair if number} <= sections, path


def main_commands(page: pathlib.Path) -> list[list[str]]:
    """The arguments of every main.py command in a page's shell blocks, as the shell passes them."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL)
    stubs = 'bash() { :; }; source() { :; }; mkdir() { :; }; ln() { :; }; python() { printf "%s\\n" "$*"; }\n'
    done = subprocess.run(["bash", "-euc", stubs + "".join(blocks)], capture_output=True, text=True, check=True)
    return [line.split() for line in done.stdout.splitlines() if line.startswith("main.py ")]


@pytest.mark.parametrize(
    ("page", "count", "dataset"), [("your_own_images.md", 7, "IMAGES"), ("commands.md", 14, "CIFAR10")]
)
def test_the_commands_of_a_page_are_accepted(page, count, dataset, monkeypatch):
    assert check_commands(main_commands(ROOT / "docs" / page), dataset, monkeypatch) == count


def check_commands(commands, dataset, monkeypatch):
    """How many commands of main.py there are, each of which has flags and settings that it accepts."""
    for command in commands:
        values = flags.FlagValues()
        config = config_flags.DEFINE_config_file("config", flag_values=values)
        flags.DEFINE_enum("mode", None, ["train", "eval", "sample"], "", flag_values=values)
        for name in ("workdir", "eval_folder"):
            flags.DEFINE_string(name, None, "", flag_values=values)
        monkeypatch.setattr("sys.argv", command)  # where ml_collections looks for the overrides
        assert values(command) == ["main.py"]  # nothing is left over
        check_config(values.config, values.mode)
        assert config.value.data.dataset == dataset
    return len(commands)


@pytest.mark.parametrize("page", ["README.md", "docs/your_own_images.md"])
def test_python_imports_what_there_is(page):
    text = (ROOT / page).read_text()
    programs = re.findall(r"```python\n(.*?)```|<<'PYTHON'\n(.*?)^PYTHON", text, flags=re.DOTALL | re.MULTILINE)
    assert programs
    for program in map("".join, programs):
        nodes = list(ast.walk(ast.parse(program)))
        lines = [ast.unparse(node) for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
        named: dict = {}
        exec("\n".join(lines), named)
        for node in nodes:
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in named:
                assert hasattr(named[node.value.id], node.attr), ast.unparse(node)


def test_the_commands_for_own_pictures_are_accepted(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    chosen = {"SIZE": 16, "GREY": "", "K": 2, "UPDATES": 40, "PAIRS": 64, "BATCH": 64, "TEST": 0, "FEATURES": "pixels"}
    (tmp_path / "run" / "chosen.sh").write_text("".join(f"{name}={value}\n" for name, value in chosen.items()))
    stubs = 'bash() { :; }; source() { [ "${1##*/}" != chosen.sh ] || builtin source "$1"; }; '
    stubs += 'python() { printf "%s\\n" "$*"; }; '
    script = (ROOT / "scripts" / "own_images.sh").read_text().replace('cd "$(dirname "${BASH_SOURCE[0]}")/.."', ":")
    command = ["bash", "-c", stubs + script, "own_images.sh", tmp_path / "pictures", tmp_path / "run"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("-m ")] == [
        "scripts.prepare_dataset",
        "report",
        "scripts.export",
    ]
    assert check_commands([line.split() for line in lines if line.startswith("main.py ")], "IMAGES", monkeypatch) == 7


def test_shell_scripts_are_well_formed():
    scripts = [path for path in (ROOT / "scripts").rglob("*") if path.suffix in (".sh", ".sbatch")]
    assert len(scripts) > 6
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)
