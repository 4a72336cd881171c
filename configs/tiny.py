"""From nothing to a report on a laptop: chain sums by SFT, then by GRPO.

    python train.py --config configs/tiny.py

A decoder of 0.1 M parameters learns worked sums character by character. SFT sees four
variants; RL sees only the first, so the other three are out-of-domain for it:
chain ("12+8-16=?", 2 or 3 terms), long (4 terms), words ("Start with 12, add 8 …"),
zh ("从12开始加8减16等于几?"). Test problems are in no training set in any wording.

Measured (accuracy in %, temperature 1, Instruct → RL; n 1000, ± 3; 2 cores, CPU):

| set | seed 0 | seed 1 | seed 2 |
|---|---|---|---|
| chain | 48.7 → 66.4 | 36.0 → 54.9 | 26.2 → 45.8 |
| long | 13.3 → 3.6 | 12.0 → 13.1 | 7.9 → 10.8 |
| words | 47.9 → 55.6 | 34.0 → 45.0 | 28.9 → 40.3 |
| zh | 47.7 → 62.6 | 33.8 → 44.6 | 32.6 → 45.3 |

and greedy:

| set | seed 0 | seed 1 | seed 2 |
|---|---|---|---|
| chain | 62.8 → 71.9 | 53.3 → 66.6 | 37.9 → 56.8 |
| long | 20.6 → 3.2 | 19.3 → 19.0 | 11.8 → 14.3 |
| words | 55.0 → 63.8 | 49.3 → 58.8 | 36.1 → 49.8 |
| zh | 59.8 → 71.3 | 51.6 → 63.0 | 41.2 → 56.0 |
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
