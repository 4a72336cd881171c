"""DeepSeekMath-RL 7B: GRPO on DeepSeekMath-Instruct 7B with the paper's settings.

    python train.py --config configs/7b.py --workdir FOLDER_ON_A_SHARED_DISK

Hardware: a TPU or GPU pod. Compiled for pods that are not there (`python -m
grpo_jax.plan --config configs/7b.py --topology v5p:4x4x4`) it takes 12 of 95 GiB a chip
on v5p:4x4x4, 8 of 16 on v5e:8x16, and with --config.mesh.slots=64 13 of 16 on v5e:4x4
(docs/pods.md). Not trained by this project yet: no result is claimed. On any machine
the command builds the whole state from shapes, prints its size, and says which file is
missing.

Weights: the hub's main revision holds .bin files only; the safetensors are in the
revision refs/pr/2. Or point `model.path` at a folder; `python -m grpo_jax.convert`
turns a folder of .bin files into safetensors.

The paper's: learning rate 1e-6, β 0.04, G 64, length 1024, batch 1024 (16 questions),
one update a rollout, chain-of-thought questions of GSM8K and MATH.
Where this differs, since the paper's own were never published or are not stated:
- questions: the training splits of GSM8K and MATH (14,973), not the 144K of the paper;
- reward: the rule (final answer equals the reference), not the trained reward model;
- clip ε 0.2, AdamW with b1 0.9, b2 0.95, no weight decay, gradient norm clipped at 1;
- 935 steps: one pass over the questions;
- samples at temperature 1; the group's std divides by G - 1 and has 1e-4 added.
"""

from grpo_jax.config import (
    Config,
    DataSettings,
    EvalSettings,
    MeshSettings,
    ModelSettings,
    OptimizerSettings,
)


def get_config() -> Config:
    return Config(
        name="7b",
        method="grpo",
        rl_steps=935,
        questions_per_step=16,
        group_size=64,
        max_new_tokens=1024,
        learning_rate=1e-6,
        checkpoint_every=20,
        model=ModelSettings(
            path="deepseek-ai/deepseek-math-7b-instruct",
            revision="refs/pr/2",
            dtype="bfloat16",
            param_dtype="float32",
            remat="full",
            vocab_size=102400,
            layers=30,
            width=4096,
            heads=32,
            ffn=11008,
            tied=False,
        ),
        data=DataSettings(
            train="gsm8k+math",
            eval="gsm8k+math+cmath+mgsm_zh",
            template="deepseekmath",
            max_prompt_tokens=1024,
        ),
        optimizer=OptimizerSettings(micro_rows=1),
        mesh=MeshSettings(decode_tensor=8, slots=1024),
        eval=EvalSettings(samples=1, batch=256),
    )
