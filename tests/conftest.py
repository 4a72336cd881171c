"""What every test runs under: 8 forced CPU devices and a strict JAX.

A test of one device names it; meshes, shard_map and pmap find eight.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_EIGHT = "--xla_force_host_platform_device_count=8"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_EIGHT}".strip()

import pathlib  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


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
