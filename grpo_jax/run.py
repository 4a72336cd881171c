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
import numpy as np
import optax

from grpo_jax import lora, sharding
from grpo_jax.checkpoint import Checkpoints
from grpo_jax.config import Config, flatten, from_dict, lora_targets, to_json
from grpo_jax.errors import GrpoError
from grpo_jax.methods import METHODS
from grpo_jax.model import Decoder, ModelConfig, Params
from grpo_jax.recorder import Recorder, progress
from grpo_jax.reward_model.model import RewardModel
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
        number = {"init": 0, "sft": 1, "rl": 2, "eval": 3, "reward": 4, "critic": 5}[
            stage
        ]
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

    def begin(self, stage: str, params: Params) -> Params:
        """A stage's start: with LoRA, adapters of its own (`lora.begin`).

        The parameters given are used up: their buffers hold the new ones.
        """
        if not self.model.lora.rank:
            return params
        key = self.key("init", 1 + list(STAGES).index(stage))
        make = functools.partial(lora.begin, self.model.lora)
        shapes = jax.eval_shape(make, params, key)
        out = sharding.shardings(shapes, self.mesh)
        return jax.jit(make, out_shardings=out, donate_argnums=0)(params, key)

    def abstract_params(self, stage: str) -> Params:
        return abstract_params(self.config, self.model, stage)

    def abstract_state(
        self, stage: str, optimizer: optax.GradientTransformation
    ) -> TrainState:
        return abstract_state(self.config, self.model, self.mesh, stage, optimizer)

    def new_reward_model(self, key: jax.Array, params: Params) -> Params:
        """A reward model (or PPO's critic) that starts from a policy's trunk."""

        def init(params):
            base = lora.merge_lora(self.model.lora, params)
            return RewardModel(self.model).init(key, base)

        out = sharding.shardings(jax.eval_shape(init, params), self.mesh)
        return jax.jit(init, out_shardings=out)(params)

    # π_ref of iteration i, where the method iterates (section 4.1.4).

    def references(self, iteration: int) -> Checkpoints:
        return Checkpoints(self._reference_folder(iteration), every=1)

    def _reference_folder(self, iteration: int) -> Path:
        return self.workdir / "checkpoints" / f"reference-{iteration}"

    def has_reference(self, iteration: int) -> bool:
        if not self._reference_folder(iteration).is_dir():
            return False
        with self.references(iteration) as checkpoints:
            return bool(checkpoints.steps())

    def load_reference(self, iteration: int) -> Params:
        like = sharding.abstract(self.abstract_params("rl"), self.mesh)
        with self.references(iteration) as checkpoints:
            return checkpoints.restore(like)[1]

    def save_reference(self, iteration: int, params: Params) -> Params:
        with self.references(iteration) as checkpoints:
            checkpoints.save(iteration, params, {"seed": self.config.seed}, force=True)
        return params


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
    decoder = Decoder(model_config, settings.dtype, settings.remat, adapters_of(config))
    return decoder, tokenizer


def adapters_of(config: Config) -> lora.Lora:
    m = config.model
    return lora.Lora(rank=m.lora_rank, alpha=m.lora_alpha, targets=lora_targets(config))


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
    declared = declared_config(config, config.model.vocab_size)
    decoder = Decoder(declared, lora=adapters_of(config))
    stage = "sft" if config.method == "sft" else "rl"
    optimizer, _ = {"sft": sft, "rl": rl}[stage].optimizer(config)
    state = abstract_state(config, decoder, mesh, stage, optimizer)

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


def describe_size(model: Decoder) -> str:
    """How many parameters there are, and with LoRA how many of them are trained."""
    init = functools.partial(lora.begin, model.lora)
    key = jax.random.key(0)
    whole = jax.eval_shape(lambda key: init(model.init(key), key), key)
    trained, frozen = lora.split(whole)
    count, some = (
        sum(math.prod(x.shape) for x in jax.tree.leaves(tree)) / 1e6
        for tree in (whole, trained)
    )
    part = f", {some:.3g} M of them trained (LoRA)," if frozen else ""
    return f"{count:.1f} M parameters{part}"


def abstract_params(config: Config, model: Decoder, stage: str) -> Params:
    """The parameters that a stage trains, as shapes and dtypes."""
    dtype = config.model.param_dtype

    def policy(key):
        return lora.begin(model.lora, model.init(key, dtype), key)

    def reward_model(key):
        return RewardModel(model).init(key, model.init(key, dtype))

    key = jax.random.key(0)
    if stage.startswith("reward"):
        return jax.eval_shape(reward_model, key)
    params = jax.eval_shape(policy, key)
    if stage == "rl" and METHODS[config.method].coefficient == "critic":
        params["value"] = jax.eval_shape(reward_model, key)
    return params


def abstract_state(
    config: Config,
    model: Decoder,
    mesh: jax.sharding.Mesh,
    stage: str,
    optimizer: optax.GradientTransformation,
) -> TrainState:
    """A stage's training state as shapes, dtypes and shardings: nothing allocated."""
    create = functools.partial(TrainState.create, optimizer=optimizer)
    state = jax.eval_shape(create, abstract_params(config, model, stage))
    return sharding.abstract(state, mesh)


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
    *,
    steps: int,
    until: int | None = None,
) -> Params:
    """All steps of a stage from wherever it stands; returns its final parameters.

    make_body(state shardings) → body(step, state) → (state, metrics). `start_params`
    is called only where the stage has no checkpoint yet; they are donated. `until`
    stops it before its `steps` are done, to go on later.
    """
    abstract = run.abstract_state(stage, optimizer)
    shardings = sharding.shardings(abstract, run.mesh)
    end = steps if until is None else until
    with run.checkpoints(stage) as checkpoints:
        if checkpoints.steps():
            done, state, _ = checkpoints.restore(abstract)
            if until is None or done < end:
                print(f"{stage}: resumed at step {done} of {steps}")
        else:
            create = functools.partial(TrainState.create, optimizer=optimizer)
            create = jax.jit(create, out_shardings=shardings, donate_argnums=0)
            done, state = 0, create(start_params())
        run.recorder.forget_after(stage, done)
        if done >= end:
            return state.params
        body = make_body(shardings)
        with progress(stage, done, steps) as bar:
            for step in range(done, end):
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
                last = step + 1 == end
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
    run = open_run(Path(workdir))
    return run.model, stage_params(run, newest_stage(run)), run.tokenizer


def open_run(workdir: Path) -> Run:
    """A run that is there already, on all devices, to be read."""
    config = read_config(workdir)
    model, tokenizer = make_model(config)
    mesh = sharding.make_mesh(fsdp=-1)
    return Run(config, workdir, mesh, model, tokenizer, Recorder(workdir))


def load_adapters(workdir: str | Path) -> tuple[lora.Lora, list[Params], str]:
    """LoRA's settings, the adapters of each stage up to the newest, and model.path."""
    run = open_run(Path(workdir))
    if not run.model.lora.rank:
        raise GrpoError(f"{workdir}: the run has no adapters (model.lora_rank is 0)")
    names = list(STAGES)[: 1 + list(STAGES).index(newest_stage(run))]
    trained = [name for name in names if getattr(run.config, STAGES[name])]
    adapters = [lora.split(stage_params(run, name))[0] for name in trained]
    return run.model.lora, adapters, run.config.model.path


def policy(params: Params) -> Params:
    """What a stage trained, without PPO's critic."""
    return {name: x for name, x in params.items() if name != "value"}


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
        _, state, _ = checkpoints.restore(run.abstract_state(stage, optimizer))
    return policy(state.params)
