"""A run's programs for TPU slices that are not there, of every kind of mesh."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from abstract_meshes import mesh_of
from small_runs import small_config

from grpo_jax.errors import GrpoError
from grpo_jax.generation.sampler import generate_tokens, generate_tokens_on_mesh
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder
from grpo_jax.plan import chips
from grpo_jax.plan.compiled_programs import compile_programs
from grpo_jax.plan.loop_trip_counts import MeanLengths

CONFIG = ModelConfig(
    vocab_size=64, width=64, layers=1, heads=4, kv_heads=4, head_dim=16, ffn=64
)
OPTIONS: Any = dict(samples=4, max_new_tokens=8, eos_id=(0,))


def lowered(sizes: tuple[int, int, int], length: int, *, spread: bool) -> str:
    """The sampler's program, as a TPU's compiler is given it; that takes no TPU."""
    model = Decoder(CONFIG, dtype="bfloat16")
    shape = jax.ShapeDtypeStruct
    params = jax.eval_shape(model.init, jax.random.key(0))
    key = jax.eval_shape(lambda: jax.random.key(0))
    prompts = shape((8, length), jnp.int32), shape((8, length), jnp.bool)
    with jax.sharding.use_abstract_mesh(mesh_of("tpu", *sizes)):
        sample = functools.partial(
            generate_tokens_on_mesh if spread else generate_tokens, model
        )
        traced = jax.jit(functools.partial(sample, **OPTIONS)).trace(
            params, *prompts, key=key
        )
        return traced.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize(
    "sizes, spread",
    [
        ((8, 1, 1), True),  # what `decode_tensor` 0 and `tensor` 1 give
        ((1, 8, 1), True),
        ((2, 1, 4), True),
        ((1, 1, 4), True),
        ((8, 1, 1), False),  # `keep=True`: all devices have one cache
        ((2, 2, 2), False),
        ((1, 1, 1), True),
        ((1, 1, 1), False),
    ],
    ids=str,
)
def test_the_sampler_calls_the_kernel_on_every_mesh(sizes, spread):
    """From a bucket of 128 tokens on, with the device's own heads."""
    text = lowered(sizes, 128, spread=spread)
    (call,) = [line for line in text.splitlines() if "tpu_custom_call" in line]
    assert f"tensor<{4 // sizes[2]}x128x16xbf16>" in call
    assert "tpu_custom_call" not in lowered(sizes, 96, spread=spread)


DEFAULT: dict[str, Any] = {}
MESHES: dict[str, dict[str, Any]] = {
    "data 2, tensor 2": {"mesh.data": 2, "mesh.tensor": 2},
    "tensor 2, decode_tensor 1": {"mesh.tensor": 2, "mesh.decode_tensor": 1},
    "decode_tensor 4": {"mesh.decode_tensor": 4, "model.heads": 4},
    "decode_tensor 2, 6 heads": {
        "mesh.decode_tensor": 2,
        "model.heads": 6,
        "model.kv_heads": 2,
        "model.width": 96,
    },
}


def compile_for(slice_name: str, settings: dict[str, Any], *names: str) -> None:
    pytest.importorskip("libtpu", reason="libtpu, TPUs' compiler, is not installed")
    sizes = {"model.width": 128, "model.ffn": 128, "model.dtype": "bfloat16"}
    lengths = {"data.max_prompt_tokens": 128, "optimizer.row_length": 256}
    config = small_config({**sizes, **lengths, "optimizer.micro_rows": 1, **settings})
    topology = chips.get_topology(slice_name)
    found = compile_programs(
        config, topology, MeanLengths.for_config(config, None, None), only=names
    )
    assert {program.name for program in found} == set(names)
    assert all(program.peak_memory_bytes > 0 for program in found)


def test_a_slice_compiles_every_program_of_a_step_by_default():
    names = ("weights to sample", "rollout", "reference", "update")
    compile_for("v5e:2x4", DEFAULT, *names)


def test_another_generation_compiles_the_rollout_by_default():
    compile_for("v5p:2x2x1", DEFAULT, "rollout")


@pytest.mark.parametrize("mesh", MESHES)
def test_a_slice_compiles_the_rollout_of_other_meshes(mesh):
    compile_for("v5e:2x4", MESHES[mesh], "rollout")


@pytest.mark.parametrize("heads, works", [(2, 2), (6, 2)])
def test_heads_that_a_group_cannot_share_are_refused(heads, works):
    """Before the compiler sees them: it would abort the process."""
    sizes = {"model.heads": heads, "model.kv_heads": 2, "model.width": 16 * heads}
    message = f"mesh.decode_tensor: 4 does not .* heads, {heads}, .* set it to {works}$"
    with pytest.raises(GrpoError, match=message):
        compile_for("v5e:2x4", {**sizes, "mesh.decode_tensor": 4}, "rollout")


def test_a_slice_compiles_reference_and_update_of_matrices_split_twice():
    compile_for("v6e:2x4", MESHES["data 2, tensor 2"], "reference", "update")
