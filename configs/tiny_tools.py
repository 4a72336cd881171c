"""Tool-integrated reasoning on a laptop: chain sums by programs, SFT and then GRPO.

    python train.py --config configs/tiny_tools.py

configs/tiny.py's task and model, but the solutions are programs with their outputs
("```python print(12+8-16) ```", "```output 4 ```", "#### 4"). In RL and in the
comparison the sandbox runs what the model writes, and the model goes on from what it
printed; it needs bubblewrap or Landlock.

Measured (accuracy in %, Instruct → RL; seed 0, n 300, ± 6 at most; one core of an Intel
Xeon, no accelerator, the versions of requirements.txt, 2026-11-25; 4 min 26 s in all):

| set | temperature 1 | greedy |
|---|---|---|
| tool-chain (in-domain) | 20.3 → 43.3 | 44.7 → 63.3 |
| tool-long | 10.3 → 4.3 | 27.0 → 8.0 |
| tool-words | 25.3 → 27.0 | 48.7 → 39.0 |

RL sees chains alone, and what it does not see gets worse, greedily.
"""

from grpo_jax.config import (
    Config,
    DataSettings,
    EvalSettings,
    ModelSettings,
    OptimizerSettings,
    SftSettings,
    ToolSettings,
)


def get_config() -> Config:
    return Config(
        name="tiny_tools",
        sft_steps=160,  # stopped early: there is something left for RL
        rl_steps=40,
        questions_per_step=32,
        group_size=8,
        max_new_tokens=48,  # of each generation: a program of four terms and its call
        learning_rate=1e-3,
        checkpoint_every=20,
        model=ModelSettings(layers=2, width=64, heads=4, ffn=192),
        data=DataSettings(
            train="sums/tool-chain",
            sft="sums/tool-chain+sums/tool-long+sums/tool-words",
            eval="sums/tool-chain+sums/tool-long+sums/tool-words",
            template="plain",
            instruction="none",
            max_prompt_tokens=48,
        ),
        tools=ToolSettings(generations=2, timeout=5.0),
        sft=SftSettings(
            learning_rate=2e-3,
            warmup_steps=20,
            batch_size=64,
            row_length=128,
            micro_rows=48,
        ),
        optimizer=OptimizerSettings(
            schedule="linear",
            warmup_steps=5,
            b2=0.99,
            micro_rows=16,
        ),
        eval=EvalSettings(questions=300, samples=1, batch=150),
    )
