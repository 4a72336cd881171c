"""From nothing to a report on a laptop: chain sums by SFT, then by GRPO.

    python train.py --config configs/tiny.py

A decoder of 0.1 M parameters learns worked sums character by character. SFT sees four
variants; RL sees only the first, so the other three are out-of-domain for it:
chain ("12+8-16=?", 2 or 3 terms), long (4 terms), words ("Start with 12, add 8 …"),
zh ("从12开始加8减16等于几?"). Test problems are in no training set in any wording.

Measured (accuracy in %, temperature 1, Instruct → RL; n 1000, ± 3; 2 cores, CPU):

| set | seed 0 | seed 1 | seed 2 |
|---|---|---|---|
| chain | 48.7 → 66.4 | 32.7 → 51.2 | 28.5 → 44.4 |
| long | 13.3 → 3.6 | 12.9 → 14.1 | 9.2 → 10.2 |
| words | 47.9 → 55.6 | 32.5 → 41.6 | 29.3 → 34.4 |
| zh | 47.7 → 62.6 | 32.2 → 42.9 | 32.6 → 44.3 |

and greedy:

| set | seed 0 | seed 1 | seed 2 |
|---|---|---|---|
| chain | 62.8 → 71.9 | 45.4 → 64.5 | 43.1 → 59.0 |
| long | 20.6 → 3.2 | 20.6 → 18.9 | 15.7 → 16.5 |
| words | 55.0 → 63.8 | 38.4 → 57.3 | 42.8 → 46.6 |
| zh | 59.8 → 71.3 | 43.1 → 57.1 | 48.9 → 56.9 |
"""

from grpo_jax.config import (
    Config,
    DataSettings,
    EvalSettings,
    ModelSettings,
    OptimizerSettings,
    RewardModelSettings,
    SftSettings,
)


def get_config() -> Config:
    return Config(
        name="tiny",
        sft_steps=600,  # stopped early: an Instruct model that RL can still improve
        rl_steps=100,
        questions_per_step=64,
        group_size=8,
        max_new_tokens=36,  # the longest solution of four terms and its EOS
        learning_rate=1e-3,
        checkpoint_every=50,
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
            learning_rate=2e-3,
            warmup_steps=20,
            batch_size=64,
            row_length=64,
            micro_rows=48,
        ),
        optimizer=OptimizerSettings(
            schedule="linear",
            warmup_steps=10,
            b2=0.99,
            micro_rows=48,
            row_length=64,
        ),
        reward_model=RewardModelSettings(  # for the methods that have one
            questions=2048, completions=4, steps=200, learning_rate=2e-3
        ),
        eval=EvalSettings(questions=1000, samples=1, batch=500),
    )
