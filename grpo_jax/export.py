"""Writes a run's newest checkpoint as a Hugging Face folder.

    python -m grpo_jax.export --workdir DIR --out HF_FOLDER [--adapter]

The folder has config.json, safetensors and the tokenizer's files, which transformers
opens; LoRA's adapters are merged. With --adapter it has the adapters only, which PEFT
loads on top of the model that the run started from.
"""

from __future__ import annotations

from grpo_jax.arguments import ArgumentParser
from grpo_jax.checkpoints.huggingface.weights import save_pretrained
from grpo_jax.distributed import processes
from grpo_jax.errors import errors_as_one_line


def main(arguments: list[str] | None = None) -> None:
    """Runs the command with `arguments`, by default those of the process."""
    parser = ArgumentParser(
        prog="python -m grpo_jax.export",
        description="Writes a run's newest checkpoint as a Hugging Face folder.",
    )
    parser.add_argument("--workdir", required=True, help="a run's work directory")
    parser.add_argument("--out", required=True, help="the folder to write")
    parser.add_argument(
        "--adapter", action="store_true", help="write LoRA's adapters alone, for PEFT"
    )
    flags = parser.parse_args(arguments)
    from grpo_jax.checkpoints.huggingface.peft_adapter import save_adapter
    from grpo_jax.training import run

    with processes.connect_processes(), errors_as_one_line(flags.out):
        if flags.adapter:
            save_adapter(*run.load_adapters(flags.workdir), flags.out)
        else:
            model, params, tokenizer = run.load_run(flags.workdir)
            save_pretrained(model, params, flags.out, tokenizer=tokenizer)
        processes.print_once(f"{flags.out}: written from {flags.workdir}")


if __name__ == "__main__":
    main()
