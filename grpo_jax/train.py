"""The training command: runs the stages that a config names.

    python train.py --config FILE --workdir DIR --config.name=value …

The work directory then holds a trained and evaluated model. User errors end with one
line and exit code 1. On several hosts, run the same command on each of them. JAX finds
the processes of TPU pods, SLURM, Kubernetes and Open MPI by itself; elsewhere, set
--coordinator, --num_processes and --process_id.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from grpo_jax.arguments import PROCESS_FLAGS
from grpo_jax.config import Config, flatten_config
from grpo_jax.errors import GrpoError, Preempted, errors_as_one_line
from grpo_jax.training.command_line import parse_config, print_help

if TYPE_CHECKING:
    from grpo_jax.training.run import Run

USAGE = "usage: python train.py --config FILE [--workdir DIR] [--config.name=value …]"

_WORKDIR = flags.DEFINE_string("workdir", None, "where it writes (runs/<name>)")
_ACCEPT = flags.DEFINE_bool(
    "accept_changes", False, "go on although the config differs from the run's own"
)
for _name, (_default, *_bounds, _text) in PROCESS_FLAGS.items():
    if _name == "coordinator":
        flags.DEFINE_string(_name, _default, _text)
    else:
        flags.DEFINE_integer(_name, _default, _text, *_bounds)


def main(
    argv: list[str] | None = None,
    *,
    usage: str = USAGE,
    work: Callable[..., None] | None = None,
) -> None:
    """Runs a command line.

    Args:
      argv: the program's name and its arguments; by default those of the process.
      usage: the command's own.
      work: what the command does, called as `train_run`; None is `train_run`.
    """
    argv = sys.argv if argv is None else argv
    print_help(argv, usage, ["workdir", "accept_changes", *PROCESS_FLAGS])
    with errors_as_one_line():
        config = parse_config(argv, usage)
        from grpo_jax.distributed import processes

        values: list[Any] = [flags.FLAGS[name].value for name in PROCESS_FLAGS]
        *address, wait, heartbeat = values
        with processes.connect_processes(*address, wait=wait, heartbeat=heartbeat):
            run_with_messages(config, work or train_run)


def run_with_messages(config: Config, work: Callable[..., None]) -> None:
    """Calls `work`; errors that a user can act on end the program with one line."""
    workdir = _WORKDIR.value or f"runs/{config.name}"
    disk = (
        "the last checkpoint stands. Make room there; the same command goes on from it"
    )
    try:
        with errors_as_one_line(workdir, disk=disk, memory=memory_advice(config)):
            work(config, work_folder(workdir), accept_changes=_ACCEPT.value)
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command goes on from the last checkpoint")


def work_folder(name: str) -> Path:
    """Returns the work directory as a path.

    Raises:
      GrpoError: it is a bucket, which has no locks and no renames.
    """
    if "://" in name:
        raise GrpoError(
            f"--workdir: {name}: name a folder, with several hosts one of a disk that "
            "all of them see; copy from there to a bucket"
        )
    return Path(name)


def memory_advice(config: Config) -> str:
    """Returns which fields to lower, with their values, when memory runs out."""
    rows = config.optimizer.micro_rows
    rollout = f"{config.questions_per_step} × {config.group_size} outputs"
    return (
        f"the last checkpoint stands. Lower optimizer.micro_rows ({rows}), "
        f"sft.micro_rows ({config.sft.micro_rows}), eval.batch ({config.eval.batch}) "
        f"or max_new_tokens ({config.max_new_tokens}; {rollout} a rollout), set "
        "model.remat, or use more devices"
    )


def train_run(config: Config, workdir: Path, *, accept_changes: bool = False) -> None:
    """Runs the stages SFT, RL and comparison; each resumes from its checkpoint.

    Args:
      config: the checked config.
      workdir: the work directory.
      accept_changes: continue although the config differs from the run's earlier one.

    Raises:
      GrpoError: the config, the data or the work directory cannot be used.
    """
    from grpo_jax.distributed import processes
    from grpo_jax.report.comparison import accuracy_table
    from grpo_jax.report.tables import to_markdown
    from grpo_jax.training import rl, run_comparison, setup, sft

    with start_run(config, workdir, accept_changes=accept_changes) as run:
        run_comparison.check_sets(run)
        with_rl = config.method != "sft" and config.rl_steps
        prepared = rl.prepare_rl(run) if with_rl else None
        with run.recorder:
            try:
                with_sft = config.sft_steps > 0
                start = lambda: setup.initial_params(config, run.model, run.mesh)  # noqa: E731
                instruct = (lambda: sft.train_sft(run, start)) if with_sft else start
                if prepared:
                    before, after = rl.train_rl(run, instruct, *prepared)
                    models = {"instruct": before, "rl": after}
                else:
                    models = {"instruct": instruct()}
                results = run_comparison.compare_run(run, models)
                run.recorder.write_report(last=True)
            except Preempted as stopped:
                processes.print_once(f"{stopped}; the same command goes on from there")
                return
    processes.print_once(
        f"\n{to_markdown(accuracy_table(results))}\n\nwritten to {workdir}"
    )


@contextlib.contextmanager
def start_run(config: Config, workdir: Path, *, accept_changes: bool) -> Iterator[Run]:
    """Opens a run: its mesh, its model without weights, and its locked work directory.

    Args: as for `train_run`.

    Raises:
      GrpoError: the config, the model or the work directory cannot be used.
    """
    set_up_process()
    import jax

    from grpo_jax.distributed import processes, sharding
    from grpo_jax.distributed.folder_lock import lock_folder
    from grpo_jax.generation.reshard import decoding_mesh
    from grpo_jax.training import setup
    from grpo_jax.training.metrics_writer import Recorder
    from grpo_jax.training.run import Run
    from grpo_jax.training.start_time import start_time
    from grpo_jax.training.work_directory import WorkDirectoryClaim

    versions = {"jax": jax.__version__, "workdir": str(workdir)}
    processes.check_equal("config", flatten_config(config) | versions)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    # Impossible settings fail here, not at the first rollout after the SFT stage.
    there = sharding.place_on_devices(0.0, jax.NamedSharding(mesh, sharding.P()))
    sharding.move_to_memory(there, config.model.reference_memory)
    if config.model.path and config.model.vocab_size:  # print a large model's size
        processes.print_once(setup.describe_state(config, mesh))
    setup.agree_on_files(config)
    model, tokenizer = setup.make_model(config)
    decoding_mesh(model, mesh)
    count = processes.process_count()
    several = f" of {count} processes" if count > 1 else ""
    processes.print_once(
        f"{config.name}: {setup.describe_size(model)} on {mesh.size} "
        f"{jax.default_backend()} device(s){several}, written to {workdir}"
    )
    with lock_folder(workdir), jax.set_mesh(mesh):
        again = not (workdir / "config.json").exists()  # an earlier start failed
        tokenizer.now = start_time(workdir, again=again)
        claim = WorkDirectoryClaim(
            config, workdir, tokenizer.now, accept_changes=accept_changes
        )
        claim.check()
        recorder = Recorder(workdir, config, claim.write)
        yield Run(config, workdir, mesh, model, tokenizer, recorder, claim)


def set_up_process() -> None:
    """Sets what a command needs of its process: a compilation cache, no warnings.

    Programs compiled once stay on disk for the next run. The threads of the tokenizers
    package and a later fork do not go together, so it gets none.
    """
    import jax

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if folder is None:
        home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(home / "grpo_jax" / "xla"))


if __name__ == "__main__":
    main()
