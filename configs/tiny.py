"""From nothing to a report on a laptop: chain sums by SFT, then by GRPO.

    python train.py --config configs/tiny.py

A decoder of 0.1 M parameters learns worked sums character by character. SFT sees four
variants; RL sees only the first, so the other three are out-of-domain for it:
chain ("12+8-16=?", 2 or 3 terms), long (4 terms), words ("Start with 12, add 8 …"),
zh ("从12开始加8减16等于几?"). Test problems are in no training set in any wording.

Measured (accuracy in %, temperature 1, Instruct → RL; n 1000, ± 3; 2 cores, CPU):

| set | seed 0 | seed 1 | seed 2 |
|---|---|---|---|
| chain | 47.4 → 66.6 | 30.8 → 47.8 | 24.3 → 46.5 |
| long | 12.4 → 11.3 | 10.5 → 9.8 | 8.7 → 7.9 |
| words | 46.9 → 57.0 | 32.4 → 40.0 | 25.3 → 37.2 |
| zh | 49.3 → 60.0 | 33.3 → 41.3 | 30.1 → 39.6 |

and greedy:

| set | seed 0 | seed 1 | seed 2 |
|---|---|---|---|
| chain | 58.7 → 72.5 | 44.3 → 62.8 | 34.2 → 61.3 |
| long | 22.3 → 16.4 | 16.4 → 13.6 | 13.6 → 11.2 |
| words | 62.2 → 65.4 | 45.7 → 54.9 | 33.8 → 46.0 |
| zh | 61.3 → 68.6 | 43.4 → 56.8 | 36.7 → 47.1 |
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
