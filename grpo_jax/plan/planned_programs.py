"""The programs of a step, as shapes and shardings: what `compiled_programs` compiles.

They are the functions that the loops of `training/` run, traced for devices that need
not be there.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.algorithms.methods import METHODS
from grpo_jax.config import Config
from grpo_jax.distributed import sharding
from grpo_jax.generation import reshard, rollout_shapes, sampler
from grpo_jax.generation.cache_attention import ROWS_PER_PRODUCT
from grpo_jax.models import lora
from grpo_jax.models.decoder import Decoder
from grpo_jax.plan import loop_trip_counts
from grpo_jax.plan.chips import Topology
from grpo_jax.plan.loop_trip_counts import MeanLengths
from grpo_jax.training import setup, sft
from grpo_jax.training.batch import Batch, Sample
from grpo_jax.training.objectives import sft_objective
from grpo_jax.training.optimizers import stage_optimizer
from grpo_jax.training.rl_programs import BatchLayout, make_programs
from grpo_jax.training.run import policy_params
from grpo_jax.training.train_step import make_step


@dataclasses.dataclass(frozen=True)
class PlannedProgram:
    """A program that is not compiled yet."""

    name: str
    trace: Callable[[], Any]
    mesh: jax.sharding.Mesh  # in use while it runs
    arguments: Any  # its parameters or state
    trips: dict[str, float] = dataclasses.field(default_factory=dict)
    memory_traffic_bytes: float = 0.0  # that it reads and writes, at least
    runs: int = 1
    owns_arguments: bool = False  # they are not among the arrays that the run keeps


def plan_programs(
    config: Config, topology: Topology, lengths: MeanLengths
) -> tuple[list[PlannedProgram], Any]:
    """Returns the programs of a step, and the shapes of all arrays that it keeps."""
    mesh = sharding.make_mesh(
        config.mesh.data,
        config.mesh.fsdp,
        config.mesh.tensor,
        devices=topology.devices,
    )
    stage = "sft" if config.method == "sft" else "rl"
    model = make_config_decoder(config)
    optimizer, _ = stage_optimizer(stage, config)
    state = setup.abstract_state(config, model, mesh, stage, optimizer)
    plan = plan_sft if stage == "sft" else plan_rl
    return plan(config, model, mesh, state, optimizer, lengths)


def make_config_decoder(config: Config) -> Decoder:
    """Returns the decoder of the config's sizes, or of the model that it names."""
    if not config.model.path or not config.model.vocab_size:
        return setup.make_model(config)[0]
    declared = setup.declared_config(config, config.model.vocab_size)
    return setup.make_decoder(config, declared)


def plan_rl(
    config: Config,
    model: Decoder,
    mesh: jax.sharding.Mesh,
    state: Any,
    optimizer: Any,
    lengths: MeanLengths,
) -> tuple[list[PlannedProgram], Any]:
    """Returns the programs of an RL step, and the arrays that the step keeps."""
    values, method = config.method_values(), METHODS[config.method]
    critic = method.coefficient == "critic"
    shardings = sharding.shardings(state, mesh)
    programs = make_programs(config, model, optimizer, shardings)
    layout = BatchLayout(config, mesh)
    passes = loop_trip_counts.pass_trip_counts(layout, config, lengths)
    traffic_bytes = passes["micro_batches"] * _gathered_bytes(model, state.params, mesh)
    reference = _reference_shapes(config, model, state, mesh)
    scored_batch = _packed_shapes(
        layout, Sample(tokens=[0, 0], mask=[0, 1], logps=[0.0] * 2)
    )
    update_batch = _packed_shapes(layout, _shortest_sample(config))
    per_token = jax.ShapeDtypeStruct(
        update_batch.tokens.shape, jnp.float32, sharding=update_batch.tokens.sharding
    )
    in_loss = values.get("kl_coef") if method.kl == "loss" else 0.0
    updates = values.get("updates_per_rollout", 1)
    update_batch = dataclasses.replace(
        update_batch,
        ref_logps=per_token if in_loss else None,
        old_logps=per_token if updates > 1 else None,
    )
    sampler = reference if method.source == "instruct" else state.params
    planned = plan_rollout(config, model, mesh, policy_params(sampler), lengths)

    def plan_pass(name, program, params, fetched=False):
        trace = functools.partial(program.trace, params, scored_batch)
        sizes: Any = dict(memory_traffic_bytes=2 * traffic_bytes)
        planned.append(
            PlannedProgram(
                name, trace, mesh, params, passes, owns_arguments=fetched, **sizes
            )
        )

    on_host = config.model.reference_memory == "host"
    if values.get("kl_coef"):
        reference_params = (
            lora.base_params(state.params) if reference is None else reference
        )
        plan_pass("reference", programs.score, reference_params, fetched=on_host)
    if updates > 1:
        plan_pass("old policy", programs.score, state.params)
    if critic:
        plan_pass("values", programs.value, state.params["value"])
    update = _plan_update(model, programs.update, state, update_batch, mesh, passes)
    update = dataclasses.replace(update, runs=updates)
    return [*planned, update], (state, None if on_host else reference)


def plan_rollout(
    config: Config,
    model: Decoder,
    mesh: jax.sharding.Mesh,
    params: Any,
    lengths: MeanLengths,
) -> list[PlannedProgram]:
    """Returns the rollout of an RL step, and the transfer of its weights before it."""
    tensor = model.decode_tensor or mesh.shape["tensor"]
    layout = reshard.decoding_mesh(model, mesh) if mesh.size > 1 else None
    groups = sharding.rows_multiple(layout) if layout else 1
    shape = rollout_shapes.rollout_shape(
        config.questions_per_step,
        config.data.max_prompt_tokens,
        config.group_size,
        groups=groups,
        slots=config.mesh.slots or None,
    )
    rollout = sampler.make_sampler(
        shape,
        spread=layout is not None,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        eos_id=(0,),
        cache_dtype=config.model.cache_dtype or None,
    )
    rows = sharding.batch_sharding(layout or mesh)
    tokens, mask = (
        jax.ShapeDtypeStruct((shape.prompts, shape.width), kind, sharding=rows)
        for kind in (jnp.int32, jnp.bool)
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    trips = loop_trip_counts.sampler_trip_counts(config, shape, groups, lengths)
    c = model.config
    position_bytes = 2 * c.layers * c.kv_heads * c.head_dim / tensor  # keys and values
    position_bytes *= np.dtype(config.model.cache_dtype or model.dtype).itemsize
    outputs = shape.prompts // groups * shape.samples
    slots = min(shape.slots, outputs)
    columns = loop_trip_counts.columns_per_turn(
        config.max_new_tokens, queue=slots < outputs
    )
    # A prompt is read once for several of its rows.
    cached = slots * (columns + shape.width / ROWS_PER_PRODUCT)
    planned = []
    if layout and not reshard.is_resharded(model, params, layout):
        resharding = reshard.make_resharding(model, params, layout)
        trace = functools.partial(resharding.trace, params)
        planned.append(PlannedProgram("weights to sample", trace, mesh, params))
        params = _compute_shapes(model, params, layout)
    jitted: Any = rollout.func
    turns = trips["turns"] + trips["last_turns"]
    planned.append(
        PlannedProgram(
            "rollout",
            functools.partial(
                jitted.trace, model, params, tokens, mask, key=key, **rollout.keywords
            ),
            layout or mesh,
            params,
            trips,
            memory_traffic_bytes=turns
            * (bytes_per_device(params) + cached * position_bytes),
            owns_arguments=bool(planned),
        )
    )
    return planned


def plan_sft(
    config: Config,
    model: Decoder,
    mesh: jax.sharding.Mesh,
    state: Any,
    optimizer: Any,
    lengths: MeanLengths,
) -> tuple[list[PlannedProgram], Any]:
    """Returns the update of an SFT step, and the state that the step keeps."""
    objective = sft_objective(model, aggregate=config.sft.aggregate)
    shardings = sharding.shardings(state, mesh)
    update: Any = make_step(objective, optimizer, state_shardings=shardings)
    sample = Sample(tokens=[0, 0], mask=[0, 1])
    batch = _batch_shapes(sft.pack_sft_batch(config, mesh, [sample]), mesh)
    capacity = batch.tokens.shape[0]
    pairs = loop_trip_counts.block_pairs(config.sft.micro_rows, config.sft.row_length)
    trips = {"micro_batches": capacity, "pairs": pairs}
    return [_plan_update(model, update, state, batch, mesh, trips)], state


def _plan_update(
    model: Decoder,
    update: Any,
    state: Any,
    batch: Batch,
    mesh: jax.sharding.Mesh,
    trips: dict[str, float],
) -> PlannedProgram:
    """Returns the update of a stage: three passes over the batch, and a new state."""
    passes = trips["micro_batches"] * _gathered_bytes(model, state.params, mesh)
    return PlannedProgram(
        "update",
        lambda: update.trace(state, None, batch),
        mesh,
        state,
        trips,
        memory_traffic_bytes=6 * passes + 2 * bytes_per_device(state),
    )


def _gathered_bytes(model: Decoder, params: Any, mesh: jax.sharding.Mesh) -> float:
    """Returns the bytes of weights, gathered over "fsdp", that a pass reads."""
    shapes = _compute_shapes(model, params, mesh)
    return bytes_per_device(shapes) * mesh.shape["fsdp"]


def _shortest_sample(config: Config) -> Sample:
    """Returns a sample of two tokens, with the fields that the method fills in."""
    two = [0.0, 0.0]
    fields: Mapping[str, Any] = {
        "indicator": {"advantages": 0.0},
        "pairs": {"logps": two},
        "critic": {"logps": two, "advantages": two, "returns": two, "values": two},
    }.get(METHODS[config.method].coefficient, {"logps": two, "advantages": 0.0})
    return Sample(tokens=[0, 0], mask=[0, 1], prompt=1, **fields)


def _packed_shapes(layout: BatchLayout, sample: Sample) -> Batch:
    samples = [sample] * layout.together
    return _batch_shapes(layout.pack(samples), layout.mesh)


def _batch_shapes(batch: Batch, mesh: jax.sharding.Mesh) -> Batch:
    def abstract_array(x, place):
        return jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype, sharding=place)

    return jax.tree.map(abstract_array, batch, sharding.packed_shardings(batch, mesh))


def _reference_shapes(config: Config, model: Decoder, state: Any, mesh) -> Any:
    """Returns the shapes of π_ref; None if it is the base of a LoRA policy."""
    if model.lora.rank and METHODS[config.method].source == "policy":
        return None
    return _compute_shapes(model, policy_params(state.params), mesh)


def _compute_shapes(model: Decoder, params: Any, mesh) -> Any:
    """Returns the shapes of the parameters in the dtype of the computation."""
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, model.dtype), params)
    return sharding.abstract_arrays(like, mesh)


def bytes_per_device(tree: Any) -> float:
    """Returns the bytes of a tree of sharded shapes that one device holds."""

    def local_bytes(x) -> float:
        shape = x.sharding.shard_shape(x.shape) if x.sharding else x.shape
        return math.prod(shape) * np.dtype(x.dtype).itemsize

    return float(sum(map(local_bytes, jax.tree.leaves(tree))))
