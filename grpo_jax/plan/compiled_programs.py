"""The programs of a config, compiled for devices that may not be there.

In: a checked config and a `Topology`. Out: for each program that a step runs its peak
memory on a device, its operations, what it sends to other devices, and the least time
that the chip's peaks allow. They are the functions that `rl.py` and `sft.py` run, on
shapes in the place of arrays.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.algorithms.methods import METHODS
from grpo_jax.config import Config
from grpo_jax.distributed import sharding
from grpo_jax.errors import GrpoError
from grpo_jax.generation import kv_cache, reshard, sampler
from grpo_jax.models import lora
from grpo_jax.models.decoder import Decoder
from grpo_jax.plan import hlo_text, loop_trip_counts
from grpo_jax.plan.chips import Chip, Topology
from grpo_jax.plan.flops import flops
from grpo_jax.plan.loop_trip_counts import Lengths
from grpo_jax.training import setup, sft
from grpo_jax.training.compiled_steps import Layout, make_programs
from grpo_jax.training.optimizers import stage_optimizer
from grpo_jax.training.packing import Batch, Sample
from grpo_jax.training.run import policy


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program; bytes are those of one device, `flops` of all together."""

    name: str
    runs: int  # in a step
    peak_memory_bytes: float  # arguments included; NaN: the compiler ran out of memory
    held_bytes: float  # of the run's arrays that are not its arguments
    flops: float
    collective_bytes: float  # sent
    collectives: dict[str, float]  # the same by kind
    memory_traffic_bytes: float  # at least: parameters, state and caches
    trips: dict[str, float]  # how often its loops were assumed to run
    message: str = ""  # the compiler's, where it gave up

    @property
    def total_bytes(self) -> float:
        return self.peak_memory_bytes + self.held_bytes

    def seconds(self, chip: Chip, devices: int) -> float:
        """One run at the least: the slowest of three, as if it hid the other two."""
        return max(self.parts(chip, devices).values())

    def bound_by(self, chip: Chip, devices: int) -> str:
        parts = self.parts(chip, devices)
        return max(parts, key=lambda name: parts[name])

    def parts(self, chip: Chip, devices: int) -> dict[str, float]:
        return {
            "arithmetic": self.flops / devices / chip.flops,
            "memory": self.memory_traffic_bytes / chip.bandwidth,
            "links": self.collective_bytes / chip.links,
        }


@dataclasses.dataclass(frozen=True)
class Asked:
    """A program before it is compiled."""

    name: str
    trace: Callable[[], Any]
    mesh: jax.sharding.Mesh  # in use while it runs
    arguments: Any  # parameters or state that go in
    trips: dict[str, float] = dataclasses.field(default_factory=dict)
    traffic: float = 0.0  # bytes that pass the memory at least
    runs: int = 1
    own: bool = False  # the arguments are its own, not what the run keeps


Asks = tuple[list[Asked], Any]  # programs, and all arrays that a step keeps


def compile_all(
    config: Config,
    topology: Topology,
    lengths: Lengths,
    *,
    only: Sequence[str] = (),
    say: Callable[[str], None] = lambda name: None,
) -> list[Program]:
    """Every program of a step, or those named in `only`."""
    asked, resident = prepare(config, topology, lengths)
    found = []
    for one in asked:
        if only and one.name not in only:
            continue
        say(one.name)
        found.append(compile_one(one, resident, len(topology.devices)))
    if not found:
        names = ", ".join(one.name for one in asked)
        raise GrpoError(f"--only: {', '.join(only)}: the programs are {names}")
    return found


def prepare(config: Config, topology: Topology, lengths: Lengths) -> Asks:
    mesh = sharding.make_mesh(
        config.mesh.data,
        config.mesh.fsdp,
        config.mesh.tensor,
        devices=topology.devices,
    )
    stage = "sft" if config.method == "sft" else "rl"
    model = decoder(config)
    optimizer, _ = stage_optimizer(stage, config)
    state = setup.abstract_state(config, model, mesh, stage, optimizer)
    ask = sft_programs if stage == "sft" else rl_programs
    return ask(config, model, mesh, state, optimizer, lengths)


def decoder(config: Config) -> Decoder:
    """Of the sizes that the config states, else of the model that it names."""
    if not config.model.path or not config.model.vocab_size:
        return setup.make_model(config)[0]
    declared = setup.declared_config(config, config.model.vocab_size)
    return setup.make_decoder(config, declared)


def rl_programs(
    config: Config,
    model: Decoder,
    mesh: jax.sharding.Mesh,
    state: Any,
    optimizer: Any,
    lengths: Lengths,
) -> Asks:
    own, method = config.own(), METHODS[config.method]
    critic = method.coefficient == "critic"
    shardings = sharding.shardings(state, mesh)
    programs = make_programs(config, model, optimizer, shardings)
    layout = Layout(config, mesh)
    passes = loop_trip_counts.of_pass(layout, config, lengths)
    weights = local_bytes(compute_params(model, state.params, mesh))
    whole = weights * mesh.shape["fsdp"]  # what a pass reads: gathered over fsdp
    batches = passes["micro_batches"]
    reference = reference_of(config, model, state, mesh)
    scored = abstract_batch(layout, Sample(tokens=[0, 0], mask=[0, 1], logps=[0.0] * 2))
    learnt = abstract_batch(layout, blank(config))
    extra = jax.ShapeDtypeStruct(
        learnt.tokens.shape, jnp.float32, sharding=learnt.tokens.sharding
    )
    in_loss = own.get("kl_coef") if method.kl == "loss" else 0.0
    updates = own.get("updates_per_rollout", 1)
    learnt = dataclasses.replace(
        learnt,
        ref_logps=extra if in_loss else None,
        old_logps=extra if updates > 1 else None,
    )
    sampler = reference if method.source == "instruct" else state.params
    asked = sampler_of(config, model, mesh, policy(sampler), lengths)

    def a_pass(name, program, params, fetched=False):
        trace = functools.partial(program.trace, params, scored)
        traffic = 2 * batches * whole
        asked.append(
            Asked(name, trace, mesh, params, passes, traffic=traffic, own=fetched)
        )

    on_host = config.model.reference_memory == "host"
    if own.get("kl_coef"):
        frozen = lora.base(state.params) if reference is None else reference
        a_pass("reference", programs.score, frozen, fetched=on_host)
    if updates > 1:
        a_pass("old policy", programs.score, state.params)
    if critic:
        a_pass("values", programs.value, state.params["value"])
    asked.append(
        Asked(
            "update",
            lambda: programs.update.trace(state, None, learnt),
            mesh,
            state,
            passes,
            traffic=6 * batches * whole + 2 * local_bytes(state),
            runs=updates,
        )
    )
    return asked, (state, None if on_host else reference)


def sampler_of(
    config: Config,
    model: Decoder,
    mesh: jax.sharding.Mesh,
    params: Any,
    lengths: Lengths,
) -> list[Asked]:
    """The rollout of a step, as `generate` compiles it."""
    tensor = model.decode_tensor or mesh.shape["tensor"]
    layout = sharding.regroup(mesh, tensor) if mesh.size > 1 else None
    groups = sharding.rows_multiple(layout) if layout else 1
    shape = sampler.shape_of(
        config.questions_per_step,
        config.data.max_prompt_tokens,
        config.group_size,
        groups=groups,
        slots=config.mesh.slots or None,
    )
    sample = sampler.program(
        shape,
        spread=layout is not None,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        eos_id=(0,),
        stop=(),
        cache_dtype=config.model.cache_dtype or None,
        keep=False,
    )
    rows = sharding.batch_sharding(layout or mesh)
    tokens, mask = (
        jax.ShapeDtypeStruct((shape.prompts, shape.width), kind, sharding=rows)
        for kind in (jnp.int32, jnp.bool)
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    often = loop_trip_counts.of_sampler(config, shape, groups, lengths)
    c = model.config
    position = 2 * c.layers * c.kv_heads * c.head_dim / tensor  # keys and values
    position *= np.dtype(config.model.cache_dtype or model.dtype).itemsize
    outputs = shape.prompts // groups * shape.samples
    slots = min(shape.slots, outputs)
    columns = loop_trip_counts.columns(config.max_new_tokens, queue=slots < outputs)
    # A prompt is read once for several of its rows.
    cached = slots * (columns + shape.width / kv_cache.TOGETHER)
    asked = []
    if layout and not reshard.is_laid_out(model, params, layout):
        relay = reshard.relay(model, params, layout)
        trace = functools.partial(relay.trace, params)
        asked.append(Asked("weights to sample", trace, mesh, params))
        params = compute_params(model, params, layout)
    jitted: Any = sample.func
    turns = often["turns"] + often["last_turns"]
    asked.append(
        Asked(
            "rollout",
            functools.partial(
                jitted.trace, model, params, tokens, mask, key=key, **sample.keywords
            ),
            layout or mesh,
            params,
            often,
            traffic=turns * (local_bytes(params) + cached * position),
            own=bool(asked),
        )
    )
    return asked


def sft_programs(
    config: Config,
    model: Decoder,
    mesh: jax.sharding.Mesh,
    state: Any,
    optimizer: Any,
    lengths: Lengths,
) -> Asks:
    update = sft.make_update(config, model, optimizer, sharding.shardings(state, mesh))
    sample = Sample(tokens=[0, 0], mask=[0, 1])
    batch = abstract(sft.lay_out(config, mesh, [sample]), mesh)
    capacity = batch.tokens.shape[0]
    whole = local_bytes(compute_params(model, state.params, mesh)) * mesh.shape["fsdp"]
    asked = Asked(
        "update",
        lambda: update.trace(state, None, batch),
        mesh,
        state,
        {
            "micro_batches": capacity,
            "pairs": loop_trip_counts.pairs(
                config.sft.micro_rows, config.sft.row_length
            ),
        },
        traffic=6 * capacity * whole + 2 * local_bytes(state),
    )
    return [asked], state


def compile_one(asked: Asked, resident: Any, devices: int) -> Program:
    with jax.set_mesh(asked.mesh):
        traced = asked.trace()
        lowered = traced.lower()
        kept = 0.0 if asked.own else local_bytes(asked.arguments)
        held = local_bytes(resident) - kept
        operations = flops(traced.jaxpr, asked.trips)
        peak, message, sent = math.nan, "", {}
        try:
            compiled = lowered.compile()
        except Exception as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            message = out_of_memory(str(error))
        else:
            peak = float(compiled.memory_analysis().peak_memory_in_bytes)
            sent = hlo_text.collectives(compiled.as_text(), devices, asked.trips)
    return Program(
        name=asked.name,
        runs=asked.runs,
        peak_memory_bytes=peak,
        held_bytes=held,
        flops=operations,
        collective_bytes=sum(sent.values()),
        collectives=sent,
        memory_traffic_bytes=asked.traffic,
        trips=asked.trips,
        message=message,
    )


def out_of_memory(message: str) -> str:
    """The compiler's line on what it needed."""
    lines = [line.strip() for line in message.splitlines()]
    return next((x for x in lines if "hbm" in x.lower()), lines[0])[:200]


def blank(config: Config) -> Sample:
    """A sample with all that the method's credit gives one."""
    two = [0.0, 0.0]
    fields: Mapping[str, Any] = {
        "indicator": {"advantages": 0.0},
        "pairs": {"logps": two},
        "critic": {"logps": two, "advantages": two, "returns": two, "values": two},
    }.get(METHODS[config.method].coefficient, {"logps": two, "advantages": 0.0})
    return Sample(tokens=[0, 0], mask=[0, 1], prompt=1, **fields)


def abstract_batch(layout: Layout, sample: Sample) -> Batch:
    samples = [sample] * layout.together
    return abstract(layout.pack(samples), layout.mesh)


def abstract(batch: Batch, mesh: jax.sharding.Mesh) -> Batch:
    rows = sharding.batch_sharding(mesh, leading=1)
    whole = jax.sharding.NamedSharding(mesh, sharding.P())

    def of(x):
        place = rows if np.ndim(x) == 3 else whole
        return jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype, sharding=place)

    return jax.tree.map(of, batch)


def reference_of(config: Config, model: Decoder, state: Any, mesh) -> Any:
    """π_ref as the run holds it; None: the base of the state's own parameters."""
    if model.lora.rank and METHODS[config.method].source == "policy":
        return None
    return compute_params(model, policy(state.params), mesh)


def compute_params(model: Decoder, params: Any, mesh) -> Any:
    """The parameters in the dtype of the computation."""
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, model.dtype), params)
    return sharding.abstract(like, mesh)


def local_bytes(tree: Any) -> float:
    """What a device holds of a tree of shapes with shardings."""

    def of(x) -> float:
        shape = x.sharding.shard_shape(x.shape) if x.sharding else x.shape
        return math.prod(shape) * np.dtype(x.dtype).itemsize

    return float(sum(map(of, jax.tree.leaves(tree))))
