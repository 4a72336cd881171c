"""`plan` counts what programs really do, and says what does not fit."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from grpo_jax.distributed import sharding
from grpo_jax.errors import GrpoError
from grpo_jax.generation.rollout_shapes import rollout_shape
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.decoder import Decoder
from grpo_jax.models.logprobs import token_logprobs
from grpo_jax.plan import chips, hlo_text
from grpo_jax.plan.compiled_programs import CompiledProgram
from grpo_jax.plan.flops import count_flops
from grpo_jax.plan.loop_trip_counts import (
    MeanLengths,
    columns_per_turn,
    sampler_trip_counts,
)
from grpo_jax.plan.plan_table import format_plan, summarize_plan
from grpo_jax.training.batch import Sample
from grpo_jax.training.packing import pack
from grpo_jax.training.train_step import TrainState, make_grpo_step

ROOT = Path(__file__).parents[2]


# Operations


def test_the_operations_of_an_update_by_hand():
    """T 16, D 32, F 64, V 64, 3 layers: forward, again for the gradient, and backward
    twice as much; what down_proj gives is not computed again, as nothing needs it."""
    config = ModelConfig(
        vocab_size=64, width=32, layers=3, heads=4, kv_heads=4, head_dim=8, ffn=64
    )
    model, optimizer = Decoder(config, remat="full"), optax.sgd(1.0)
    params = jax.eval_shape(model.init, jax.random.key(0))
    state = jax.eval_shape(lambda p: TrainState.create(p, optimizer), params)
    sample = Sample(tokens=[1] * 17, mask=[0] + [1] * 16, advantages=1.0)
    step = make_grpo_step(model, optimizer, kl_coef=0.0)
    traced = step.trace(state, None, pack([sample], length=16))  # type: ignore
    layer = 2 * 16 * (4 * 32 * 32 + 3 * 32 * 64) + 4 * 16 * 16 * 32
    unembed, down = 2 * 16 * 32 * 64, 2 * 16 * 32 * 64
    a_micro_batch = 4 * (3 * layer + unembed) - 3 * down
    assert count_flops(traced.jaxpr, {"micro_batches": 5}) == 5 * a_micro_batch
    with pytest.raises(KeyError, match="micro_batches"):
        count_flops(traced.jaxpr)


def test_loops_branches_and_shards_count_as_often_as_they_run():
    x = jnp.ones((8, 8))
    product = 2 * 8**3

    def looped(x):
        return jax.lax.fori_loop(0, 3, lambda _, x: jnp.sin(x @ x), x)

    def endless(x):
        with jax.named_scope("turns"):
            return jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ x, x)

    def seldom(x):
        with jax.named_scope("blocks"):
            return branches(x)

    def branches(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    square = lambda x: x @ jnp.ones((8, 8))  # noqa: E731
    rows = jax.shard_map(square, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    count = lambda f, **trips: count_flops(jax.make_jaxpr(f)(x), trips)  # noqa: E731
    assert count(looped) == 3 * product
    assert count(endless, turns=7) == 7 * product
    assert count(branches) == count(seldom) == 2 * product
    assert count(seldom, blocks=0.25) == 0.25 * 2 * product
    assert count(rows) == product  # an eighth on each of eight devices
    assert count(jax.vmap(lambda row: row @ x)) == product


# Collectives


def compiled(f, mesh, *specs, out):
    arguments = [
        jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=NamedSharding(mesh, spec))
        for spec in specs
    ]
    mapped = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
    return str(jax.jit(mapped).lower(*arguments).compile().as_text())


def test_collectives_of_a_compiled_program_in_its_loops():
    """Of [64, 64] float32 over 8 devices in groups of 4 and 2; a loop of 5, one that
    only its scope's name tells the length of, and a branch that is seldom taken."""
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    whole = 64 * 64 * 4
    ring = [(i, (i + 1) % 4) for i in range(4)]

    def f(x):  # [16, 64]
        def body(x, _):
            return jax.lax.psum(x, "b") * 0.5, None

        x, _ = jax.lax.scan(body, x, length=5)
        with jax.named_scope("turns"):
            on = lambda x: jax.lax.ppermute(x, "a", ring)  # noqa: E731
            x = jax.lax.while_loop(lambda x: x[0, 0] < 1, on, x)
        with jax.named_scope("blocks"):
            x = jax.lax.cond(x[0, 0] > 2, on, lambda x: x, x)
        gathered = jax.lax.all_gather(x, "a", tiled=True)
        return jax.lax.psum_scatter(gathered * 2, "a", tiled=True)

    text = compiled(f, mesh, P("a"), out=P("a"))
    sent = hlo_text.collective_bytes(text, 8, {"turns": 7, "blocks": 0.25})
    assert sent["all-reduce"] == 5 * 2 * (1 / 2) * whole / 4
    assert sent["collective-permute"] == (7 + 0.25) * whole / 4
    always = hlo_text.collective_bytes(text, 8, {"turns": 7})
    assert always["collective-permute"] == (7 + 1) * whole / 4
    assert sent["all-gather"] == 3 / 4 * whole
    assert sent["reduce-scatter"] == 3 / 4 * whole
    with pytest.raises(KeyError, match="turns"):
        hlo_text.collective_bytes(text, 8)


def test_groups_in_each_form_that_xla_writes():
    """Of 16 devices: newer versions name a mesh's axes, and parts of them."""
    forms = {
        "{{0,1,2,3},{4,5,6,7},{8,9,10,11},{12,13,14,15}}": 4,
        "[2,8]<=[16]": 8,
        "[8,2]<=[4,2,2]T(0,2,1)": 2,
        "{}": 16,
        "mesh['a'=4,'b'=4] {'b'}": 4,
        "mesh['a'=2,'b'=8] {'a','b'}": 16,
        "mesh['a'=2,'b'=8], device_ids=([8,2]T(1,0)) {'b':(2)4}": 4,
        "mesh['a'=8,'b'=2] {'a':(1)2,'b'}": 4,
    }
    for form, size in forms.items():
        sent = hlo_text.collective_bytes(gather(form), 16)
        assert sent == {"all-gather": 32 * (size - 1) / size}, form
    with pytest.raises(ValueError, match="not known"):
        hlo_text.collective_bytes(gather("other['a'=4] {'a'}"), 16)


def gather(groups: str) -> str:
    line = f"%x = f32[8]{{0}} all-gather(%y), replica_groups={groups}, dimensions={{0}}"
    return f"ENTRY main (y: f32[4]) -> f32[8] {{\n  {line}\n}}"


TPU_TEXT = """
body.1 (p: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %p = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p), index=1
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i, %two)
  %go = (bf16[8,128]{1,0:T(8,128)(2,1)}, bf16[8,128]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%x), channel_id=1, source_target_pairs={{0,1},{1,0}}
  %there = bf16[8,128]{1,0:T(8,128)(2,1)} collective-permute-done(%go)
  ROOT %t = (s32[]{:T(128)}, bf16[8,128]{1,0}) tuple(%next, %there)
}

condition.1 (p: (s32[], bf16[8,128])) -> pred[] {
  %p.1 = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %n = s32[]{:T(128)} constant(10)
  ROOT %less = pred[]{:T(512)} compare(%i.1, %n), direction=LT
}

ENTRY main (x: bf16[8,128]) -> bf16[128,128] {
  %x.1 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %zero = s32[]{:T(128)} constant(4)
  %start = (s32[]{:T(128)}, bf16[8,128]{1,0}) tuple(%zero, %x.1)
  %loop = (s32[]{:T(128)}, bf16[8,128]{1,0}) while(%start), condition=%condition.1, \
body=%body.1, metadata={op_name="jit(f)/while"}
  %y = bf16[8,128]{1,0} get-tuple-element(%loop), index=1
  ROOT %all = bf16[128,128]{1,0} all-gather(%y), replica_groups=[2,16]<=[32], \
dimensions={0}
}
"""


def test_a_tpus_loops_are_counted_from_their_conditions():
    """Its text has no trip counts: from 4 to 10 by 2 is three times."""
    sent = hlo_text.collective_bytes(TPU_TEXT, 32)
    assert sent == {
        "collective-permute": 3 * 8 * 128 * 2,
        "all-gather": 15 / 16 * 128 * 128 * 2,
    }


def test_the_output_matrix_and_its_gradient_travel_once():
    """However many chunks of logits there are: gathered twice, summed up once."""
    mesh = sharding.make_mesh(1, 8, 1)
    place = lambda *spec: NamedSharding(mesh, P(*spec))  # noqa: E731
    hidden = jax.ShapeDtypeStruct((8, 24, 64), jnp.float32, sharding=place("fsdp"))
    unembed = jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=place("fsdp"))
    targets = jax.ShapeDtypeStruct((8, 24), jnp.int32, sharding=place("fsdp"))

    def loss(hidden, unembed, targets):
        return token_logprobs(hidden, unembed, targets, chunk=4)[0].mean()

    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(loss, argnums=(0, 1)))
        text = str(step.lower(hidden, unembed, targets).compile().as_text())
    sent = sum(hlo_text.collective_bytes(text, 8).values())
    matrix = 64 * 128 * 4
    assert 7 / 8 * matrix < sent < 4 * matrix  # CPUs sum up by all-reduce


# Lengths


def test_turns_are_those_of_full_slots_and_then_of_the_longest_output():
    from small_runs import small_config

    config = small_config(
        {"questions_per_step": 16, "group_size": 64, "max_new_tokens": 1024}
    )
    lengths = MeanLengths.for_config(config, None, 256)
    whole = sampler_trip_counts(
        config, rollout_shape(16, 100, 64, groups=8, slots=1024), 8, lengths
    )
    assert whole["turns"] == 256 and whole["last_turns"] == (1024 - 256) / 2
    assert whole["blocks"] == 1 / 2
    assert columns_per_turn(1024, queue=False) == (7 / 2 + 1) * 128
    queued = sampler_trip_counts(
        config, rollout_shape(16, 100, 64, groups=8, slots=256), 8, lengths
    )
    assert queued["turns"] == 4 * 256 and queued["blocks"] == 1
    assert columns_per_turn(1024, queue=True) == (8 + 1) * 128


# What is shown


def program(**changes) -> CompiledProgram:
    values = dict(
        name="update",
        runs=2,
        peak_memory_bytes=6 * 2.0**30,
        held_bytes=3 * 2.0**30,
        flops=4 * 197e12,
        collective_bytes=0.5 * 200e9,
        collectives={"all-gather": 0.5 * 200e9},
        memory_traffic_bytes=0.25 * 819e9,
        trips={},
    )
    return CompiledProgram(**(values | changes))  # type: ignore


@pytest.fixture
def config():
    from small_runs import small_config

    return small_config({"rl_steps": 10})


TOPOLOGY = chips.Topology("v5e:2x2", chips.CHIPS["v5e"], [None] * 4)
ASSUMED = MeanLengths(16, 64)


def test_times_and_costs_by_hand(config):
    """4 chips at their peak need 1 s, links half of one; it runs twice a step."""
    found = summarize_plan(config, TOPOLOGY, [program()], ASSUMED, price=1.8)
    (row,) = found["programs"]
    assert row["seconds"] == 1.0 and row["bound_by"] == "arithmetic"
    assert row["total_bytes"] == 9 * 2**30 and row["fits"] and found["fits"]
    assert found["step_seconds"] == 2.0
    assert found["step_dollars"] == pytest.approx(2 / 3600 * 4 * 1.8)
    assert found["run_dollars"] == pytest.approx(10 * found["step_dollars"])
    slow = summarize_plan(
        config, TOPOLOGY, [program(collective_bytes=3 * 200e9)], ASSUMED
    )
    assert slow["programs"][0]["bound_by"] == "links"
    assert slow["step_seconds"] == 6.0


def test_what_does_not_fit_is_said(config):
    large = program(peak_memory_bytes=14 * 2.0**30)
    refused = program(
        name="rollout", peak_memory_bytes=float("nan"), message="needs 20G of hbm"
    )
    found = summarize_plan(
        config, TOPOLOGY, [large, refused], ASSUMED, smallest="v5e:2x4"
    )
    assert not found["fits"] and [p["fits"] for p in found["programs"]] == [False] * 2
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    text = format_plan(found)
    assert "does not fit on v5e:2x2, 4 chips of 16 GiB" in text
    assert "rollout × 2  too large" in text and "needs 20G of hbm" in text
    assert "106% !" in text and "the smallest that it fits on: v5e:2x4" in text


@pytest.mark.parametrize(
    "name, message",
    [
        ("v9:2x2", "give v5e, v5p, v6e:SHAPE, or here"),
        ("v5e:2x2x2", "v5e has two sizes, as v5e:2x2"),
        ("v5p:4x", "v5p has three sizes"),
    ],
)
def test_a_wrong_topology_is_refused(name, message):
    with pytest.raises(GrpoError, match=message):
        chips.get_topology(name)


def test_without_libtpu_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(GrpoError, match=r"pip install 'jax\[tpu\]'") as error:
        chips.get_topology("v5p:4x4x4")
    assert "\n" not in str(error.value)


def run(*arguments: str):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-m", "grpo_jax.plan", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment
    )


SMALL = ("--config.model.layers=1", "--config.model.width=16", "--config.model.heads=2")


def test_the_command_compiles_the_programs_of_a_run():
    """Its JSON, of tiny.py on the 8 devices that the tests force."""
    done = run("--config=configs/tiny.py", "--topology=here", "--json", *SMALL)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    programs = {p["name"]: p for p in found["programs"]}
    names = ["weights to sample", "rollout", "reference", "update"]
    assert list(programs) == names
    assert found["devices"] == 8 and "fits" not in found
    for p in programs.values():
        assert p["peak_memory_bytes"] > 0 and p["collective_bytes"] > 0
        assert (p["flops"] > 0) == (p["name"] != "weights to sample")
    # Forward alone; forward and backward.
    ratio = programs["update"]["flops"] / programs["reference"]["flops"]
    assert 2.9 < ratio < 4.1


def test_mistakes_of_the_command_are_one_line():
    for arguments, message in (
        (["--config=configs/tiny.py"], "--topology: name a pod"),
        (["--config=none.py", "--topology=here"], "no such file"),
    ):
        done = run(*arguments)
        assert done.returncode == 1 and done.stdout == ""
        assert message in done.stderr and done.stderr.count("\n") == 1


def test_a_tpu_pod_that_is_not_there():
    pytest.importorskip("libtpu", reason="libtpu, TPUs' compiler, is not installed")
    done = run(
        "--config=configs/tiny.py",
        "--topology=v5e:2x2",
        "--json",
        "--nosmallest",
        "--only=update",
        *SMALL,
    )
    assert done.returncode == 0, done.stderr
    (update,) = json.loads(done.stdout)["programs"]
    assert update["fits"] and 0 < update["seconds"] < 1


def test_the_seven_billion_parameters_by_hand():
    """83 GB of float32 weights and moments; 7b.py spreads them evenly over 64 chips."""
    import runpy

    from grpo_jax.plan.planned_programs import bytes_per_device, plan_programs

    config = runpy.run_path(str(ROOT / "configs/7b.py"))["get_config"]()
    devices = jax.devices() * 8  # shapes alone: each may stand for eight
    topology = chips.Topology("64", None, np.array(devices, object).tolist())
    _, resident = plan_programs(config, topology, MeanLengths(128, 512))
    weights = 30 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 2 * 102400 * 4096
    # float32 weights and two moments, and the reference in bfloat16
    assert bytes_per_device(resident) == pytest.approx(
        (3 * 4 + 2) * weights / 64, rel=0.01
    )
