"""What a run is told: typed fields, their defaults, and what is refused.

In: a small Python file in configs/ whose `get_config()` returns a `Config`, and
`--config.name=value` on the command line. Out: a checked `Config`; the loops hand its
values on as keyword arguments, and nothing below them knows it. `checks.py` refuses
what no run can start with.

Fields that belong to some methods are None and then take the method's own default
(`methods.py`); one that is set and that the method would ignore is refused.
"""

import dataclasses
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from grpo_jax.errors import GrpoError
from grpo_jax.methods import METHODS


@dataclass(slots=True, kw_only=True)
class ModelSettings:
    path: str = ""  # Hugging Face folder or hub name; "" makes a new model
    revision: str = ""  # of the hub name
    hint: str = ""  # what to do where the folder is missing
    dtype: str = "float32"  # of the computation: float32 | bfloat16
    param_dtype: str = "float32"  # of the weights
    reference_memory: str = "device"  # where π_ref and π_sft wait: device | host
    cache_dtype: str = ""  # of the sampler's keys and values; "" is dtype
    # What the backward pass recomputes of a layer, to save memory: none | matmuls (all
    # but the matrix products) | ffn (all but the feed-forward's two widest) | full |
    # offload (full, with the layer's input in host memory)
    remat: str = "none"
    lora_rank: int = 0  # r of LoRA's adapters (float32), which alone train; 0 is none
    lora_alpha: float = 16.0  # α: they are scaled by α/r
    lora_targets: str = "q,k,v,o,gate,up,down"  # the projections that have them
    # The sizes of a new model, or those that model.path is expected to have (0: any).
    vocab_size: int = 0  # a new model has its tokenizer's
    layers: int = 0
    width: int = 0
    heads: int = 0
    kv_heads: int = 0  # 0: heads
    ffn: int = 0
    tied: bool = True  # of a new model


@dataclass(slots=True, kw_only=True)
class DataSettings:
    dir: str = ""  # where the original files lie; "" is $GRPO_JAX_DATA
    train: str = "gsm8k"  # the RL questions; "a+b" joins sets
    eval: str = "gsm8k"  # the sets of the comparison; "a+b" or "a,b" is two of them
    sft: str = ""  # worked examples for the Instruct stage
    in_domain: str = ""  # which of `eval` RL trained on; "" is `train`
    template: str = "chat"  # chat | deepseekmath | plain
    instruction: str = "cot"  # cot | tool | none
    max_prompt_tokens: int = 512  # longer questions are dropped and counted


@dataclass(slots=True, kw_only=True)
class SftSettings:
    learning_rate: float = 5e-5
    schedule: str = "constant"  # constant | linear | cosine
    warmup_steps: int = 0
    batch_size: int = 256  # examples a step
    batch_rows: int = 0  # instead: rows of examples concatenated at random (the paper)
    row_length: int = 4096  # tokens of a packed row
    micro_rows: int = 1  # rows in memory at a time
    aggregate: str = "sequence_mean"  # sequence_mean | token_mean


@dataclass(slots=True, kw_only=True)
class RewardSettings:
    # rule | format | model | module:function, comma-separated; "" is the method's own
    functions: str = ""
    weights: str = ""  # one each, comma-separated; "" is 1 each
    timeout: float = 60.0  # seconds a batch; what is not back counts as wrong


@dataclass(slots=True, kw_only=True)
class ToolSettings:
    # Generations of an output, each of max_new_tokens, whose programs are run; None is
    # the paper's 2 where data.instruction is tool, else 0: nothing is run.
    generations: int | None = None
    timeout: float = 10.0  # seconds of a program
    rows: int = 0  # outputs whose keys and values are kept at a time; 0 is all


@dataclass(slots=True, kw_only=True)
class RewardModelSettings:
    labels: str = ""  # a JSON-lines file of labelled steps; "" makes Math-Shepherd's
    questions: int = 2048  # whose outputs are labelled
    samples: int = 1  # outputs of each question
    completions: int = 8  # K, sampled from the end of each step
    soft: bool = False  # the share of right completions, instead of whether any is
    steps: int = 500  # updates on the labels, again in each iteration
    batch_size: int = 64  # labelled outputs a step
    learning_rate: float = 2e-5


@dataclass(slots=True, kw_only=True)
class OptimizerSettings:
    schedule: str = "constant"  # of the RL stage
    warmup_steps: int = 0
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    master: bool = True  # float32 copies of bfloat16 weights, which the updates move
    micro_rows: int = 1  # packed rows in memory at a time
    row_length: int = 0  # tokens of a packed row; 0 fits the longest sample
    # Lengths that may be compiled, down to half of it: less padding in small steps.
    row_lengths: int = 1
    max_skipped: int = 5  # non-finite updates in a row before the run stops
    max_sampling_gap: float = 0.5  # nats between sampler and trainer, on average


@dataclass(slots=True, kw_only=True)
class EvalSettings:
    questions: int = 0  # of each set; 0 is all
    samples: int = 1  # completions a question at `temperature`; 0 leaves that out
    temperature: float = 1.0
    batch: int = 64  # completions decoded at a time, at most
    every: int = 0  # RL steps between evaluations of the first set; 0 is never


@dataclass(slots=True, kw_only=True)
class MeshSettings:
    data: int = 1
    fsdp: int = -1  # -1 is what the other two leave of the devices
    tensor: int = 1
    decode_tensor: int = 0  # the same while outputs are sampled; 0 is tensor
    slots: int = 0  # outputs decoded at a time; 0 is a quarter, at least 128 a group


@dataclass(slots=True, kw_only=True)
class Config:
    name: str = "run"  # the work directory is runs/<name>
    seed: int = 0
    method: str = "grpo"  # a row of methods.py
    sft_steps: int = 0  # the Instruct stage; 0 starts from model.path
    rl_steps: int = 0
    questions_per_step: int = 16
    group_size: int = 64  # G
    max_new_tokens: int = 1024
    learning_rate: float = 1e-6  # of the RL stage
    temperature: float = 1.0  # of the samples that are trained on
    # Fields of some methods; None is the method's own default.
    kl_coef: float | None = None  # β
    clip_low: float | None = None  # ε
    clip_high: float | None = None
    delta: float | None = None  # two-sided clip: the bound on ρ where Â < 0
    kl_estimator: str | None = None  # k1 | k2 | k3 | k3_unbiased
    aggregate: str | None = None  # sequence_mean | token_mean | constant
    importance: str | None = None  # token | sequence
    surrogate: str | None = None  # clip | cispo
    advantage_scale: str | None = None  # group | batch | none
    advantage_baseline: str | None = None  # mean | leave_one_out | batch
    reward_normalization: str | None = None  # sum | each: summed first or normalised
    updates_per_rollout: int | None = None  # μ
    max_staleness: int | None = None  # 0 | 1: updates that π_sampler may lag π_old
    entropy_coef: float | None = None  # of an entropy bonus
    importance_cap: float | None = None  # C: weights min(π_old/π_sampler, C)
    mask_truncated: bool | None = None  # outputs that were cut off teach nothing
    overlong_buffer: int | None = None  # last tokens before the limit that cost reward
    dynamic_sampling: int | None = None  # further rollouts to replace tied groups
    dpo_beta: float | None = None
    length_normalized: bool | None = None  # DPO's Δ of means over tokens, not of sums
    gae_gamma: float | None = None
    gae_lambda: float | None = None
    value_clip: float | None = None
    value_learning_rate: float | None = None
    iterations: int | None = None  # of iterative GRPO
    replay: float | None = None  # share of old labels in the reward model's next data
    checkpoint_every: int = 50
    checkpoints_kept: int = 2
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    sft: SftSettings = field(default_factory=SftSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    rewards: RewardSettings = field(default_factory=RewardSettings)
    tools: ToolSettings = field(default_factory=ToolSettings)
    reward_model: RewardModelSettings = field(default_factory=RewardModelSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    mesh: MeshSettings = field(default_factory=MeshSettings)

    def of_method(self, name: str) -> Any:
        """A method's own field: as set, else the method's default."""
        value = getattr(self, name)
        return METHODS[self.method].fields[name] if value is None else value

    def own(self) -> dict[str, Any]:
        """All of the method's own fields."""
        return {name: self.of_method(name) for name in METHODS[self.method].fields}


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """{"model.path": …}: every field by its dotted name."""
    flat: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{f.name}.")
        else:
            flat[prefix + f.name] = value
    return flat


def generations(config: Config) -> int:
    """How many generations an output has, with its programs run; 0: no tools.

    >>> asked = DataSettings(instruction="tool")
    >>> generations(Config()), generations(Config(data=asked))
    (0, 2)
    """
    if config.tools.generations is None:
        return 2 if config.data.instruction == "tool" else 0
    return config.tools.generations


def reward_names(config: Config) -> list[str]:
    names = config.rewards.functions or METHODS[config.method].reward
    return [n.strip() for n in names.split(",") if n.strip()]


def reward_weights(config: Config) -> list[float]:
    if not config.rewards.weights:
        return [1.0] * len(reward_names(config))
    try:
        return [float(w) for w in config.rewards.weights.split(",") if w.strip()]
    except ValueError:
        raise GrpoError(
            f"config.rewards.weights: {config.rewards.weights!r} are not numbers"
        ) from None


def lora_targets(config: Config) -> tuple[str, ...]:
    """The matrices with adapters, as the parameters name them."""
    model, default = config.model, ModelSettings()
    if not model.lora_rank:
        for name in ("lora_alpha", "lora_targets"):
            if getattr(model, name) != getattr(default, name):
                raise GrpoError(
                    f"config.model.{name}: without adapters it would be ignored; set "
                    "model.lora_rank too, or leave it out"
                )
    names = [n.strip() for n in model.lora_targets.split(",") if n.strip()]
    known = default.lora_targets.split(",")
    for name in names:
        if name.removesuffix("_proj") not in known:
            raise GrpoError(
                f"config.model.lora_targets: {name!r} is not one of {', '.join(known)}"
            )
    if not names:
        raise GrpoError(
            "config.model.lora_targets: empty; name one projection at least"
        )
    return tuple(dict.fromkeys(f"{name.removesuffix('_proj')}_proj" for name in names))


def to_json(config: Config) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2, ensure_ascii=False) + "\n"


def from_dict(values: Mapping[str, Any], kind: type = Config, where: str = "") -> Any:
    """A Config from nested dictionaries, as config.json holds it; unknown keys refused.

    >>> from_dict({"group_sise": 8})
    Traceback (most recent call last):
    ...
    grpo_jax.errors.GrpoError: config.group_sise: no such field; did you mean...
    """
    hints = get_type_hints(kind)
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if name not in hints:
            raise GrpoError(unknown_field(where + name, kind, where))
        if dataclasses.is_dataclass(hints[name]):
            value = from_dict(value, hints[name], f"{where}{name}.")  # type: ignore
        arguments[name] = value
    return kind(**arguments)


def unknown_field(name: str, kind: type = Config, where: str = "") -> str:
    """The one line that refuses an unknown key, with the nearest one."""
    known = (
        list(flatten(kind()))
        if not where
        else [f.name for f in dataclasses.fields(kind)]
    )
    last = name.removeprefix(where)
    near = difflib.get_close_matches(last, known, 1, 0.4)
    hint = f"; did you mean config.{where}{near[0]}?" if near else ""
    return f"config.{name}: no such field{hint}"
