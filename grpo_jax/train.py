"""The command line of a run: flags → config → the stages that it names.

In: `--config FILE --workdir DIR --config.name=value …`. Out: a trained and evaluated
model in the work directory. Mistakes end with one line and exit code 1.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from grpo_jax.checks import validate
from grpo_jax.config import Config, unknown_field
from grpo_jax.errors import GrpoError

USAGE = "usage: python train.py --config FILE [--workdir DIR] [--config.name=value …]"

_CONFIG = config_flags.DEFINE_config_file("config", None, "the run's config file")
_WORKDIR = flags.DEFINE_string("workdir", None, "where it writes (runs/<name>)")
_ACCEPT = flags.DEFINE_bool(
    "accept_changes", False, "go on although the config differs from the run's own"
)


def main(argv: list[str] | None = None) -> None:
    try:
        config = parse(sys.argv if argv is None else argv)
    except GrpoError as error:
        sys.exit(f"error: {error}")
    try:
        workdir = folder(_WORKDIR.value or f"runs/{config.name}")
        train(config, workdir, accept_changes=_ACCEPT.value)
    except GrpoError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command goes on from the last checkpoint")
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        what = str(error).splitlines()[0]
        sys.exit(f"error: out of memory ({what}); {smaller(config)}")


def folder(name: str) -> Path:
    """The work directory; a bucket, without locks and renames, cannot be one."""
    if "://" in name:
        raise GrpoError(
            f"--workdir: {name}: name a folder, with several hosts one of a disk that "
            "all of them see; copy from there to a bucket"
        )
    return Path(name)


def smaller(config: Config) -> str:
    """What to turn down, with its value, where memory runs out."""
    rows = config.optimizer.micro_rows
    rollout = f"{config.questions_per_step} × {config.group_size} outputs"
    return (
        f"the last checkpoint stands. Lower optimizer.micro_rows ({rows}), "
        f"sft.micro_rows ({config.sft.micro_rows}), eval.batch ({config.eval.batch}) "
        f"or max_new_tokens ({config.max_new_tokens}; {rollout} a rollout), set "
        "model.remat, or use more devices"
    )


def parse(argv: list[str]) -> Config:
    """The checked config of a command line; every mistake is one line."""
    for flag, value in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, inline = flag.lstrip("-").partition("=")
        file = inline if equals else value
        if name == "config" and not Path(file.partition(":")[0]).is_file():
            raise GrpoError(f"--config: {file or 'nothing'}: no such file ({USAGE})")
    try:
        rest = flags.FLAGS(argv)[1:]
    except flags.Error as error:
        raise GrpoError(f"{str(error).splitlines()[0]} ({USAGE})") from None
    except (KeyError, AttributeError):
        for argument in argv[1:]:
            name = argument.lstrip("-").partition("=")[0]
            message = name.startswith("config.") and unknown_field(name[7:])
            if message and not _is_field(name[7:]):
                raise GrpoError(message) from None
        raise
    if _CONFIG.value is None:
        raise GrpoError(USAGE)
    if rest:
        raise GrpoError(f"{rest[0]!r}: what is this for? ({USAGE})")
    if not isinstance(_CONFIG.value, Config):
        raise GrpoError("--config: its get_config() must return a grpo_jax Config")
    return validate(_CONFIG.value)


def _is_field(name: str) -> bool:
    from grpo_jax.config import flatten

    return name in flatten(Config())


def train(config: Config, workdir: Path, *, accept_changes: bool = False) -> None:
    """Runs the stages: SFT, RL, comparison; each resumes where it stands."""
    start_cache()
    import jax

    from grpo_jax import comparison, rl, run, setup, sft, sharding, tables
    from grpo_jax.checkpoint import lock
    from grpo_jax.recorder import Recorder

    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    if mesh.size > 1:  # refused here, not at the first rollout
        sharding.regroup(mesh, config.mesh.decode_tensor or config.mesh.tensor)
    if config.model.path and config.model.vocab_size:  # a large model: say what it is
        print(setup.describe_state(config), flush=True)
    model, tokenizer = setup.make_model(config)
    print(
        f"{config.name}: {setup.describe_size(model)} on {mesh.size} "
        f"{jax.default_backend()} device(s), written to {workdir}",
        flush=True,
    )
    with lock(workdir), jax.set_mesh(mesh):
        run.claim(config, workdir, accept_changes=accept_changes)
        with Recorder(workdir, config) as recorder:
            here = run.Run(config, workdir, mesh, model, tokenizer, recorder)
            try:
                comparison.check_sets(here)
                with_rl = config.method != "sft" and config.rl_steps
                prepared = rl.prepare(here) if with_rl else None
                with_sft = config.sft_steps > 0
                start = lambda: setup.initial_params(config, model, mesh)  # noqa: E731
                instruct = (lambda: sft.train(here, start)) if with_sft else start
                if prepared:
                    before, after = rl.train(here, instruct, *prepared)
                    models = {"instruct": before, "rl": after}
                else:
                    models = {"instruct": instruct()}
                results = comparison.compare(here, models)
                recorder.write_report(last=True)
            except run.Preempted as stopped:
                print(f"{stopped}; the same command goes on from there")
                return
    print(f"\n{tables.table(results)}\n\nwritten to {workdir}")


def start_cache() -> None:
    """Programs compiled once stay on disk for the next run."""
    import jax

    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if folder is None:
        home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(home / "grpo_jax" / "xla"))


if __name__ == "__main__":
    main()
