"""What every test runs under: 8 forced CPU devices and a strict JAX.

A test of one device names it; meshes, shard_map and pmap find eight.
"""

import os

from xla_flags import xla_flags

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_given = os.environ.get("XLA_FLAGS", "")
_added = [flag for flag in xla_flags(8).split() if flag.partition("=")[0] not in _given]
os.environ["XLA_FLAGS"] = " ".join([_given, *_added]).strip()

import pathlib  # noqa: E402

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

# HYPOTHESIS_PROFILE=night tries 50 times as many examples, other ones each time.
hypothesis.settings.register_profile(
    "ci", max_examples=200, deadline=None, derandomize=True
)
hypothesis.settings.register_profile("night", max_examples=10_000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

jax.config.update("jax_numpy_rank_promotion", "raise")
# Compiling is most of what the tests cost: a second run takes half the time.
_CACHE = pathlib.Path(__file__).parents[1] / ".pytest_cache" / "jax"
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Frees a file's compiled programs, each of which holds memory maps.

    Linux allows 65,530 maps a process; without more, XLA's compiler aborts it.
    """
    yield
    jax.clear_caches()


@pytest.fixture
def x64():
    """float64 for one test; elsewhere float32, as in a run."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
    """The folder of real data sets that GRPO_JAX_DATA names; without it, a skip."""
    folder = os.environ.get("GRPO_JAX_DATA")
    if not folder:
        pytest.skip("GRPO_JAX_DATA is not set: it names a folder of real data sets")
    path = pathlib.Path(folder)
    if not path.is_dir():
        pytest.fail(f"GRPO_JAX_DATA={folder} is not a folder")
    return path
