"""DeepSeekMath-Instruct 7B: SFT of DeepSeekMath-Base 7B with the paper's settings.

    python train.py --config configs/7b_sft.py --config.data.sft=instruct.jsonl

Hardware: as configs/7b.py. Not trained by this project yet: no result is claimed.

Data: any JSON-lines file with `question` and `solution`: chain of thought, programs
(```python blocks) or tool-integrated (```output blocks; what the tool wrote is masked
from the loss). The paper's 776K examples were never published.

The paper's: examples concatenated at random up to 4K tokens, batch 256, 500 steps,
constant learning rate 5e-5.
Where this differs: examples do not see each other across a row's borders; the loss is
the mean over all answer tokens of the batch; AdamW with b1 0.9, b2 0.95 and the
gradient norm clipped at 1 are not stated in the paper.
"""

from grpo_jax.config import (
    Config,
    DataSettings,
    EvalSettings,
    ModelSettings,
    SftSettings,
)


def get_config() -> Config:
    return Config(
        name="7b_sft",
        method="sft",
        sft_steps=500,
        max_new_tokens=1024,
        checkpoint_every=50,
        model=ModelSettings(
            path="deepseek-ai/deepseek-math-7b-base",
            revision="refs/pr/1",
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
            sft="instruct.jsonl",
            eval="gsm8k+math+cmath+mgsm_zh",
            template="deepseekmath",
            max_prompt_tokens=1024,
        ),
        sft=SftSettings(
            learning_rate=5e-5,
            batch_rows=256,
            row_length=4096,
            aggregate="token_mean",
        ),
        eval=EvalSettings(samples=1, batch=256),
    )
