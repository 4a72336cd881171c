"""Qwen2.5-0.5B-Instruct on GSM8K by GRPO with LoRA adapters, on one GPU or TPU chip.

    python -m grpo_jax.census --config configs/qwen25_gsm8k.py    # minutes, first
    python train.py --config configs/qwen25_gsm8k.py

Not trained by this project yet: no result is claimed. What to expect, by others: Qwen
reports 49.6 % of GSM8K for this model; verl's table (docs/algo/baseline.md in its
repository) has 54.3 after GRPO with adapters of rank 32 and 56.7 after PPO, and for
Qwen2.5-1.5B-Instruct 77.9 after GRPO with adapters. For the 1.5B model, give
--config.model.path=Qwen/Qwen2.5-1.5B-Instruct --config.model.layers=28
--config.model.width=1536 --config.model.heads=12 --config.model.ffn=8960.

A step is 512 outputs of 64 questions. Weights are bfloat16 and frozen; the adapters are
float32. π_ref is the model without its adapters, so there is no second copy.
"""

from grpo_jax.config import (
    Config,
    DataSettings,
    EvalSettings,
    ModelSettings,
    OptimizerSettings,
)


def get_config() -> Config:
    return Config(
        name="qwen25_gsm8k",
        rl_steps=116,  # one pass over the 7473 questions
        questions_per_step=64,
        group_size=8,
        max_new_tokens=512,
        learning_rate=2e-5,
        kl_coef=0.001,
        checkpoint_every=10,
        model=ModelSettings(
            path="Qwen/Qwen2.5-0.5B-Instruct",
            dtype="bfloat16",
            param_dtype="bfloat16",
            remat="ffn",
            lora_rank=32,
            lora_alpha=32,
            vocab_size=151936,
            layers=24,
            width=896,
            heads=14,
            kv_heads=2,
            ffn=4864,
        ),
        data=DataSettings(train="gsm8k", eval="gsm8k+svamp+mgsm_en"),
        optimizer=OptimizerSettings(warmup_steps=5, row_length=2048, row_lengths=4),
        eval=EvalSettings(samples=1, batch=256),
    )
