"""Shape checking for every test, two devices on one CPU, and nothing that reaches a network."""

import fcntl
import os
import pathlib
import shutil

import xla

# Before jax starts: two devices on one CPU, so that work shared by devices really is.
os.environ.setdefault("XLA_FLAGS", xla.flags(2))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Programs are compiled once for all workers, processes and repetitions of the suite. (pytest's folder ignores itself.)
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".pytest_cache" / "programs")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Programs are compiled with few optimizations, which halves the suite; benchmarks have all that users get.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import pytest
from jaxtyping import install_import_hook

# Every module and package at the top level but main, which only reads flags.
ROOT = pathlib.Path(__file__).parents[1]
MODULES = [path.stem for path in ROOT.glob("*.py") if path.stem != "main"]
PACKAGES = [path.parent.name for path in ROOT.glob("*/__init__.py")]

# The jaxtyping annotations of these modules are checked at every call made in a test.
install_import_hook(MODULES + PACKAGES, "typechecker.checked")


# Modules that take a minute or more come first, so that no worker is left with one of them at the end.
SLOWEST = ["test_run_lib", "test_main", "test_uncentered", "test_sampling_scipy", "test_study", "test_torch_checkpoint"]


def pytest_collection_modifyitems(items):
    """Orders the modules; the tests of each stay in their order."""
    items.sort(key=lambda item: SLOWEST.index(item.path.stem) if item.path.stem in SLOWEST else len(SLOWEST))


@pytest.fixture(autouse=True, scope="module")
def _compiled_programs_released():
    """Releases what the tests of a module have compiled: that of the whole suite takes many gigabytes."""
    yield
    import jax

    jax.clear_caches()


@pytest.fixture(scope="session")
def whole_set(tmp_path_factory):
    """The folder of the set of `pair_maker.plan`, 60 pairs in 5 files; not to be changed."""
    return _generated(tmp_path_factory)


@pytest.fixture(scope="session")
def large_set(tmp_path_factory):
    """The folder of a set of 174 pairs in 15 files, the last one shorter; not to be changed."""
    return _generated(tmp_path_factory, pairs=174)


@pytest.fixture
def copied_set(large_set, tmp_path):
    """A copy of `large_set`, to be damaged."""
    return shutil.copytree(large_set, tmp_path / "p")


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A workdir where every training stage has run (`tiny_run`), once for all workers; not to be changed."""
    import tiny_run

    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "trained"
    with open(f"{folder}.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.fstat(lock.fileno()).st_size:
            tiny_run.train_stages(folder)
            lock.write("done")
    return folder


def _generated(tmp_path_factory, **changes):
    import pair_maker

    folder = tmp_path_factory.mktemp("pairs") / "reflow_batch"
    pair_maker.generate(folder, **changes)
    return folder
