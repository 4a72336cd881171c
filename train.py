"""Trains as a config says: Instruct by SFT, then RL by GRPO, then the comparison.

    python train.py --config configs/tiny.py [--workdir DIR] [--config.name=value …]

In: a config file. Out: the work directory (runs/<name>) with config.json,
metrics.jsonl, samples.jsonl, checkpoints/, results.json and report.html. The same
command again goes on where the run stopped.
"""

from grpo_jax.train import main

if __name__ == "__main__":
    main()
