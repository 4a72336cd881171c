"""Says which questions of a config can teach its model, before anything is trained.

    python -m grpo_jax.census --config FILE [--workdir DIR] [--config.name=value …]

It samples `census_samples` outputs of `census_questions` questions of `data.train`, and
prints how many are never, sometimes or always right, how many outputs are cut off or
hold no answer, what share of groups will teach, and what follows from that. The model
is the work directory's Instruct model, or `model.path` before SFT. The folder `census`
of the work directory then holds teaching.jsonl, the questions that teach. The same
command goes on where it was stopped.
"""

from __future__ import annotations

from pathlib import Path

from grpo_jax import train
from grpo_jax.config import Config
from grpo_jax.errors import GrpoError, Preempted

USAGE = (
    "usage: python -m grpo_jax.census --config FILE [--workdir DIR] "
    "[--config.name=value …]"
)


def main(argv: list[str] | None = None) -> None:
    """Runs the command line `argv`, by default that of the process."""
    train.main(argv, usage=USAGE, work=take_census)


def take_census(config: Config, workdir: Path, *, accept_changes: bool = False) -> None:
    """Takes the census of a config's questions; arguments as for `train.train_run`.

    Raises:
      GrpoError: the config, the data or the work directory cannot be used, or there is
        no model yet.
    """
    from grpo_jax.distributed import processes
    from grpo_jax.training import setup
    from grpo_jax.training.run import stage_params
    from grpo_jax.training.run_census import FOLDER, check_census, run_census

    check_census(config)
    with train.start_run(config, workdir, accept_changes=accept_changes) as run:
        if config.sft_steps and run.is_finished("sft"):
            params, name = stage_params(run, "sft"), "the Instruct model"
        elif config.model.path:
            params = setup.initial_params(config, run.model, run.mesh)
            name = f"{config.model.path}, before SFT" if config.sft_steps else ""
        else:
            raise GrpoError(
                f"census: {workdir} has no Instruct model yet; train it first, or set "
                "config.census to have the run take the census after SFT"
            )
        if name:
            processes.print_once(f"census of {name}")
        try:
            run_census(run, params, workdir / FOLDER)
        except Preempted as stopped:
            processes.print_once(f"{stopped}; the same command goes on from there")


if __name__ == "__main__":
    main()
