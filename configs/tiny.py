"""From nothing to a report on a laptop: chain sums by SFT, then by GRPO.

python train.py --config configs/tiny.py
"""

from grpo_jax.config import (
    Config,
    DataSettings,
    EvalSettings,
    ModelSettings,
    OptimizerSettings,
    SftSettings,
)


def get_config() -> Config:
    return Config(
        name="tiny",
        sft_steps=800,
        rl_steps=100,
        questions_per_step=64,
        group_size=8,
        max_new_tokens=36,  # the longest solution of four terms and its EOS
        learning_rate=1e-3,
        checkpoint_every=100,
        model=ModelSettings(layers=2, width=64, heads=4, ffn=192),
        data=DataSettings(
            train="sums/chain",
            sft="sums/chain+sums/long+sums/words+sums/zh",
            eval="sums/chain+sums/long+sums/words+sums/zh",
            template="plain",
            instruction="none",
            max_prompt_tokens=48,
        ),
        sft=SftSettings(
            learning_rate=3e-3,
            schedule="cosine",
            warmup_steps=20,
            batch_size=64,
            row_length=64,
            micro_rows=64,
        ),
        optimizer=OptimizerSettings(micro_rows=64, row_length=64),
        eval=EvalSettings(questions=1000, samples=1, batch=500),
    )
