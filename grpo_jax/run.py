"""A run: its work directory, its mesh, its model, and the loop that stages share.

In: a checked config and a work directory. Out: everything a stage needs (`Run`); and
`run_stage`, which resumes, steps, records, saves and stops for SFT and RL alike.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from grpo_jax import sharding
from grpo_jax.checkpoint import Checkpoints
from grpo_jax.config import Config, flatten, from_dict, to_json
from grpo_jax.errors import GrpoError
from grpo_jax.model import Decoder, ModelConfig, Params
from grpo_jax.recorder import Recorder, progress
from grpo_jax.tokenizer import Tokenizer
from grpo_jax.update import TrainState

Body = Callable[[int, TrainState], tuple[TrainState, Mapping[str, Any]]]
STAGES = {"sft": "sft_steps", "rl": "rl_steps"}


class Preempted(Exception):
    """The run was asked to stop, and its state is saved."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What the stages of one run share."""

    config: Config
    workdir: Path
    mesh: jax.sharding.Mesh
    model: Decoder
    tokenizer: Tokenizer
    recorder: Recorder

    def key(self, stage: str, step: int) -> jax.Array:
        """The randomness of one step: of the seed, the stage and the step alone."""
        number = {"init": 0, "sft": 1, "rl": 2, "eval": 3}[stage]
        key = jax.random.fold_in(jax.random.key(self.config.seed), number)
        return jax.random.fold_in(key, step)

    @functools.cached_property
    def prompt_options(self) -> dict[str, str]:
        data = self.config.data
        return {"template": data.template, "instruction": data.instruction}

    def checkpoints(self, stage: str, *, clean: bool = True) -> Checkpoints:
        folder = self.workdir / "checkpoints" / stage
        every, keep = self.config.checkpoint_every, self.config.checkpoints_kept
        return Checkpoints(folder, every=every, keep=keep, clean=clean)

    def state_shardings(self, optimizer: optax.GradientTransformation) -> Any:
        return sharding.shardings(self.abstract_state(optimizer), self.mesh)

    def abstract_state(self, optimizer: optax.GradientTransformation) -> TrainState:
        dtype = self.config.model.param_dtype
        return abstract_state(self.model, optimizer, dtype, self.mesh)


def make_model(config: Config) -> tuple[Decoder, Tokenizer]:
    """The decoder and the tokenizer that a config names; no weights yet."""
    settings = config.model
    if settings.path:
        from grpo_jax import weights

        if settings.hint and not Path(settings.path).is_dir():
            raise GrpoError(
                f"config.model.path: {settings.path}: no such folder; {settings.hint}"
            )
        folder = weights.find_folder(settings.path, settings.revision or None)
        model_config = weights.model_config(folder)
        tokenizer = Tokenizer.from_folder(folder)
        for name in ("vocab_size", "layers", "width", "heads", "kv_heads", "ffn"):
            wanted, found = getattr(settings, name), getattr(model_config, name)
            if wanted and wanted != found:
                raise GrpoError(
                    f"config.model.{name}: {wanted}, but {settings.path} has {found}"
                )
    else:
        from grpo_jax import sums

        tokenizer = Tokenizer.from_alphabet(sums.ALPHABET)
        model_config = declared_config(config, tokenizer.vocab_size)
    tokenizer.check_fits(model_config.vocab_size)
    return Decoder(model_config, settings.dtype, settings.remat), tokenizer


def declared_config(config: Config, vocab_size: int) -> ModelConfig:
    """The architecture that the config itself states: Llama's."""
    m = config.model
    return ModelConfig(
        vocab_size=vocab_size,
        width=m.width,
        layers=m.layers,
        heads=m.heads,
        kv_heads=m.kv_heads or m.heads,
        head_dim=m.width // m.heads,
        ffn=m.ffn,
        tied=m.tied,
    )


def describe_state(config: Config) -> str:
    """One line on the whole training state, built from shapes alone."""
    from grpo_jax import rl, sft

    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    decoder = Decoder(declared_config(config, config.model.vocab_size))
    stage = rl if config.method == "grpo" else sft
    optimizer, _ = stage.optimizer(config)
    state = abstract_state(decoder, optimizer, config.model.param_dtype, mesh)

    def size(x, shape):
        return math.prod(shape) * np.dtype(x.dtype).itemsize

    leaves = jax.tree.leaves(state)
    whole = sum(size(x, x.shape) for x in leaves)
    local = sum(size(x, x.sharding.shard_shape(x.shape)) for x in leaves)
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(state.params))
    return (
        f"state: {count / 1e9:.2f} B parameters, {whole / 1e9:.1f} GB with the "
        f"optimiser's in {config.model.param_dtype}, {local / 1e9:.1f} GB on each of "
        f"{mesh.size} device(s)"
    )


def count_parameters(model: Decoder) -> int:
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))


def abstract_state(
    model: Decoder,
    optimizer: optax.GradientTransformation,
    dtype: str,
    mesh: jax.sharding.Mesh,
) -> TrainState:
    """The training state as shapes, dtypes and shardings; nothing is allocated."""
    params = jax.eval_shape(
        functools.partial(model.init, dtype=dtype), jax.random.key(0)
    )
    create = functools.partial(TrainState.create, optimizer=optimizer)
    return sharding.abstract(jax.eval_shape(create, params), mesh)


def initial_params(run: Run) -> Params:
    """The weights of model.path, or fresh ones of the seed, laid out on the mesh."""
    settings = run.config.model
    if settings.path:
        from grpo_jax import weights

        _, params = weights.load_pretrained(
            settings.path,
            dtype=settings.param_dtype,
            revision=settings.revision or None,
            mesh=run.mesh,
        )
        return params
    init = functools.partial(run.model.init, dtype=settings.param_dtype)
    shapes = jax.eval_shape(init, jax.random.key(0))
    make = jax.jit(init, out_shardings=sharding.shardings(shapes, run.mesh))
    return make(run.key("init", 0))


def claim(config: Config, workdir: Path, *, accept_changes: bool) -> None:
    """Write config.json, or refuse if the directory's differs (fault 8)."""
    file = workdir / "config.json"
    if file.exists() and not accept_changes:
        before, now = flatten(read_config(workdir)), flatten(config)
        changed = [k for k in now if before[k] != now[k] and not is_harmless(k)]
        if changed:
            shown = ", ".join(f"{k} {before[k]!r} → {now[k]!r}" for k in changed[:8])
            raise GrpoError(
                f"{file}: this run was started with another config ({shown}); take "
                "another --workdir, or add --accept_changes"
            )
    fresh = file.with_suffix(".tmp")
    fresh.write_text(to_json(config), encoding="utf-8")
    fresh.replace(file)


def is_harmless(name: str) -> bool:
    """Whether a field may change between two starts of the same run."""
    return name.startswith(("mesh.", "checkpoint")) or name == "data.dir"


def read_config(workdir: Path) -> Config:
    file = workdir / "config.json"
    try:
        return from_dict(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise GrpoError(f"{file}: no such file; is this a work directory?") from None
    except json.JSONDecodeError as error:
        raise GrpoError(f"{file}: not valid JSON ({error})") from None


def run_stage(
    run: Run,
    stage: str,
    optimizer: optax.GradientTransformation,
    start_params: Callable[[], Params],
    make_body: Callable[[Any], Body],
) -> Params:
    """All steps of a stage from wherever it stands; returns its final parameters.

    make_body(state shardings) → body(step, state) → (state, metrics). `start_params`
    is called only where the stage has no checkpoint yet; they are not donated.
    """
    steps = getattr(run.config, STAGES[stage])
    shardings = run.state_shardings(optimizer)
    with run.checkpoints(stage) as checkpoints:
        if checkpoints.steps():
            done, state, _ = checkpoints.restore(run.abstract_state(optimizer))
            print(f"{stage}: resumed at step {done} of {steps}")
        else:
            create = functools.partial(TrainState.create, optimizer=optimizer)
            params = jax.tree.map(jnp.copy, start_params())
            done, state = 0, jax.jit(create, out_shardings=shardings)(params)
        run.recorder.forget_after(stage, done)
        if done >= steps:
            return state.params
        body = make_body(shardings)
        with progress(stage, done, steps) as bar:
            for step in range(done, steps):
                begin = time.perf_counter()
                state, metrics = body(step, state)
                seconds = time.perf_counter() - begin
                _stop_if_broken(run, stage, step, state)
                run.recorder.write(stage, step + 1, {**metrics, "step_time": seconds})
                bar.set_postfix_str(_headline(metrics), refresh=False)
                bar.update()
                metadata = {"stage": stage, "seed": run.config.seed}
                if checkpoints.preempted(step + 1):
                    checkpoints.save(step + 1, state, metadata, force=True)
                    raise Preempted(f"{stage}: stopped after step {step + 1}")
                last = step + 1 == steps
                checkpoints.save(step + 1, state, metadata, force=last)
        return state.params


def _headline(metrics: Mapping[str, Any]) -> str:
    shown = {"loss": "loss", "reward": "reward", "kl": "kl", "entropy": "entropy"}
    return " ".join(
        f"{label} {float(metrics[name]):.3f}"
        for name, label in shown.items()
        if name in metrics
    )


def _stop_if_broken(run: Run, stage: str, step: int, state: TrainState) -> None:
    limit = run.config.optimizer.max_skipped
    if int(state.skipped) >= limit:
        raise GrpoError(
            f"{stage}: step {step + 1}: the gradient was not finite {limit} times in a "
            "row (optimizer.max_skipped); the last checkpoint stands. Lower the "
            "learning rate, or compute in float32"
        )


def load_run(workdir: str | Path) -> tuple[Decoder, Params, Tokenizer]:
    """The newest model of a work directory: RL's if there is one, else SFT's."""
    workdir = Path(workdir)
    config = read_config(workdir)
    model, tokenizer = make_model(config)
    mesh = sharding.make_mesh(fsdp=-1)
    run = Run(config, workdir, mesh, model, tokenizer, Recorder(workdir))
    return model, stage_params(run, newest_stage(run)), tokenizer


def newest_stage(run: Run) -> str:
    for stage in reversed(STAGES):
        if (run.workdir / "checkpoints" / stage).is_dir():
            with run.checkpoints(stage, clean=False) as checkpoints:
                if checkpoints.steps():
                    return stage
    raise GrpoError(f"{run.workdir}: it holds no finished checkpoint")


def stage_params(run: Run, stage: str) -> Params:
    """The parameters of a stage's newest checkpoint."""
    from grpo_jax import rl, sft

    optimizer, _ = {"sft": sft, "rl": rl}[stage].optimizer(run.config)
    with run.checkpoints(stage, clean=False) as checkpoints:
        _, state, _ = checkpoints.restore(run.abstract_state(optimizer))
    return state.params
