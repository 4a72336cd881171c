"""`from grpo_jax import grpo_loss` in other JAX code: jax alone, and no delay.

Each check runs in its own interpreter, where everything but jax's own needs is blocked.
"""

import os
import pathlib
import statistics
import subprocess
import sys

import jax
import pytest

import grpo_jax

PACKAGE = pathlib.Path(grpo_jax.__file__).parents[1]

# What is found: the standard library, jax with what it needs itself, the package.
ISOLATE = """
import sys
from importlib.machinery import PathFinder
ALLOWED = {"jax", "jaxlib", "numpy", "ml_dtypes", "opt_einsum", "scipy", "grpo_jax"}
class Only:
    @staticmethod
    def find_spec(name, path=None, target=None):
        top = name.partition(".")[0]
        standard = top in sys.stdlib_module_names or top.startswith("_sysconfigdata")
        if top in ALLOWED or standard:
            return PathFinder.find_spec(name, path, target)
sys.meta_path = [Only if f is PathFinder else f for f in sys.meta_path]
"""

USE = """
from grpo_jax import grpo_loss, group_advantages, token_logprobs, sft_loss
import jax, jax.numpy as jnp
hidden, unembed = jnp.ones((4, 3, 2)), jnp.zeros((2, 8))
logps, entropy = token_logprobs(hidden, unembed, jnp.zeros((4, 3), int))
a = group_advantages(jnp.array([1.0, 0.0, 0.0, 0.0]), 4)
mask = jnp.ones((4, 3), bool)
f = lambda x: grpo_loss(x, a, mask, ref_logps=logps)[0]
g = jax.grad(f)(logps)
from grpo_jax import dpo_loss, gae, gradient_coefficient, ppo_loss, value_loss
advantages, returns = gae(logps, logps, mask)
ppo_loss(logps, logps, advantages, mask), value_loss(logps, logps, returns, mask)
dpo_loss(logps, logps, logps, logps, mask, mask), gradient_coefficient("sft", g, mask)
print(float(g[0, 0]), float(sft_loss(logps, mask)[0]))
"""


def python(code):
    """Run code with the package and jax on the path, and no site or user folders."""
    folders = [str(PACKAGE), str(pathlib.Path(jax.__file__).parents[1])]
    code = f"import sys; sys.path[:0] = {folders!r}\n{code}"
    environment = {"JAX_PLATFORMS": "cpu", "PATH": os.environ.get("PATH", "")}
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_losses_need_jax_alone():
    slope, loss = map(float, python(ISOLATE + USE).split())
    # Â = (1 - 1/4) / (1/2 + 1e-4) at ρ = 1, over three tokens and four outputs
    assert slope == pytest.approx(-0.75 / (0.5 + 1e-4) / 12, rel=1e-5)
    assert loss == pytest.approx(2.0794415, rel=1e-5)  # log 8


def test_the_block_blocks():
    """Or the test above would pass with everything importable."""
    check = "try:\n    import flax\nexcept ImportError as e:\n    print(e)"
    assert python(ISOLATE + check).strip() == "No module named 'flax'"


def test_importing_adds_little_to_jax():
    code = """
import time
import jax, jax.numpy
start = time.process_time()
import grpo_jax
from grpo_jax import grpo_loss, group_advantages, token_logprobs, sft_loss
print(time.process_time() - start)
heavy = ("flax", "optax", "orbax", "jaxtyping", "tensorflow_datasets", "grain")
print(*[name for name in heavy if name in sys.modules])
"""
    seconds = []
    for _ in range(3):
        first, _, loaded = python(code).partition("\n")
        seconds.append(float(first))
        assert not loaded.strip(), f"loaded with the losses: {loaded}"
    assert statistics.median(seconds) < 0.3


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        grpo_jax.no_such_name  # noqa: B018
