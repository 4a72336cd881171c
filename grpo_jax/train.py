"""The command line of a run: flags → config → the stages that it names.

In: `--config FILE --workdir DIR --config.name=value …`. Out: a trained and evaluated
model in the work directory. Mistakes end with one line and exit code 1.

On several hosts the same command runs on each of them: a cluster that jax knows (TPU
pods, SLURM, Kubernetes, Open MPI) says by itself which process is which; elsewhere
--coordinator, --num_processes and --process_id do.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from grpo_jax.checks import validate
from grpo_jax.config import Config, flatten, unknown_field
from grpo_jax.errors import GrpoError, out_of_memory

USAGE = "usage: python train.py --config FILE [--workdir DIR] [--config.name=value …]"

_CONFIG = config_flags.DEFINE_config_file("config", None, "the run's config file")
_WORKDIR = flags.DEFINE_string("workdir", None, "where it writes (runs/<name>)")
_ACCEPT = flags.DEFINE_bool(
    "accept_changes", False, "go on although the config differs from the run's own"
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of process 0, where no cluster says it"
)
_PROCESSES = flags.DEFINE_integer("num_processes", None, "how many processes there are")
_NUMBER = flags.DEFINE_integer("process_id", None, "which of them this is, from 0")
_WAIT = flags.DEFINE_integer("wait", 300, "seconds for all processes to come", 1)
_HEARTBEAT = flags.DEFINE_integer(
    "heartbeat", 100, "seconds without a sign after which a process is lost", 1
)


def main(argv: list[str] | None = None) -> None:
    try:
        config = parse(sys.argv if argv is None else argv)
    except GrpoError as error:
        sys.exit(f"error: {error}")
    from grpo_jax import hosts

    processes = _COORDINATOR.value, _PROCESSES.value, _NUMBER.value
    limits = dict(wait=_WAIT.value, heartbeat=_HEARTBEAT.value)
    try:
        with hosts.together(*processes, **limits):
            run(config)
    except GrpoError as error:
        sys.exit(f"error: {error}")


def run(config: Config) -> None:
    """`train`, whose errors become one line."""
    try:
        workdir = folder(_WORKDIR.value or f"runs/{config.name}")
        train(config, workdir, accept_changes=_ACCEPT.value)
    except GrpoError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command goes on from the last checkpoint")
    except Exception as error:
        what = out_of_memory(error)
        if not what:
            raise
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
    return name in flatten(Config())


def train(config: Config, workdir: Path, *, accept_changes: bool = False) -> None:
    """Runs the stages: SFT, RL, comparison; each resumes where it stands."""
    start_cache()
    import jax

    from grpo_jax import comparison, hosts, rl, run, setup, sft, sharding, tables
    from grpo_jax.checkpoint import lock
    from grpo_jax.recorder import Recorder

    versions = {"jax": jax.__version__, "workdir": str(workdir)}
    hosts.agree("config", flatten(config) | versions)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    if mesh.size > 1:  # refused here, not at the first rollout
        sharding.regroup(mesh, config.mesh.decode_tensor or config.mesh.tensor)
    if config.model.path and config.model.vocab_size:  # a large model: say what it is
        hosts.say(setup.describe_state(config))
    model, tokenizer = setup.make_model(config)
    several = f" of {hosts.count()} processes" if hosts.count() > 1 else ""
    hosts.say(
        f"{config.name}: {setup.describe_size(model)} on {mesh.size} "
        f"{jax.default_backend()} device(s){several}, written to {workdir}"
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
                hosts.say(f"{stopped}; the same command goes on from there")
                return
    hosts.say(f"\n{tables.table(results)}\n\nwritten to {workdir}")


def start_cache() -> None:
    """Programs compiled once stay on disk for the next run."""
    import jax

    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if folder is None:
        home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(home / "grpo_jax" / "xla"))


if __name__ == "__main__":
    main()
