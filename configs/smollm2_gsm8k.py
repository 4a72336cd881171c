"""SmolLM2-135M on GSM8K: Instruct by SFT, then GRPO, on two cores and 8 GB.

    make smollm2
    python train.py --config configs/smollm2_gsm8k.py

SFT learns from GSM8K's shorter solutions (up to 160 tokens with the question). A census
then asks 2048 training questions eight times each, and GRPO trains on those that are
sometimes right. The comparison takes all of GSM8K's test set, and four sets that no
stage has seen.

Not trained to the end yet: no result is claimed.
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
        name="smollm2_gsm8k",
        sft_steps=155,  # one and a half epochs
        rl_steps=150,
        questions_per_step=8,
        group_size=8,
        max_new_tokens=160,
        learning_rate=3e-6,
        kl_coef=0.0,
        census=True,
        census_questions=2048,
        checkpoint_every=10,
        model=ModelSettings(
            path="models/smollm2-135m-instruct",
            hint="run `make smollm2` first",
            remat="ffn",  # on a CPU computing again is faster than keeping
        ),
        data=DataSettings(
            train="gsm8k",
            sft="gsm8k",
            eval="gsm8k+svamp+mawps+mgsm_en+gsm_hard",
            instruction="none",
            max_prompt_tokens=400,
        ),
        sft=SftSettings(
            learning_rate=2e-4,
            schedule="cosine",
            warmup_steps=10,
            batch_size=32,
            max_tokens=160,
            row_length=1024,
        ),
        optimizer=OptimizerSettings(
            warmup_steps=5, b2=0.99, micro_rows=1, row_length=1024, row_lengths=8
        ),
        eval=EvalSettings(samples=1, batch=128),
    )
