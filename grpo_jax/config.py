"""The config of a run: typed fields with defaults and bounds.

A config is a small Python file in configs/ whose `get_config()` returns a `Config`;
`--config.name=value` on the command line sets its fields. Each field states its choices
and bounds (`config_fields.py`), and `training/config_checks.py` checks combinations.
The training loops pass values on as keyword arguments; code below them takes no config.

A field of certain methods is None by default and then takes the method's own default
(`algorithms/methods.py`). Setting it for a method that does not use it is an error.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from grpo_jax.algorithms.methods import METHODS
from grpo_jax.arguments import LONGEST
from grpo_jax.config_fields import (
    COEFFICIENT,
    COUNT,
    ROWS,
    TOKENS,
    choice_field,
    number_field,
    suggest_name,
)
from grpo_jax.errors import GrpoError


@dataclass(slots=True, kw_only=True)
class ModelSettings:
    """The model: which weights, in which dtypes, with which adapters."""

    path: str = ""  # Hugging Face folder or hub name; "" makes a new model
    revision: str = ""  # of the hub name
    hint: str = ""  # what the error says if the folder is missing
    dtype: str = choice_field("float32", "bfloat16")  # of the computation
    param_dtype: str = choice_field("float32", "bfloat16")  # of the weights
    # Where π_ref and π_sft are kept.
    reference_memory: str = choice_field("device", "host")
    # Of the sampler's keys and values; "" is dtype.
    cache_dtype: str = choice_field("", "float32", "bfloat16")
    # What the backward pass recomputes of a layer, to save memory. matmuls: all but the
    # matrix products; ffn: all but the feed-forward's two widest; full: the layer;
    # offload: the layer, with its input kept in host memory.
    remat: str = choice_field("none", "matmuls", "ffn", "full", "offload")
    # r of LoRA's adapters (float32), which are then all that trains; 0 is none.
    lora_rank: int = number_field(0, 0, 2**16)
    # α: adapters are scaled by α/r.
    lora_alpha: float = number_field(16.0, above=0, most=COEFFICIENT)
    lora_targets: str = "q,k,v,o,gate,up,down"  # the projections with adapters
    # The sizes of a new model, or those that model.path is expected to have (0: any).
    vocab_size: int = number_field(0, 0, 2**24)  # a new model takes its tokenizer's
    layers: int = number_field(0, 0, 2**12)
    width: int = number_field(0, 0, 2**18)
    heads: int = number_field(0, 0, 2**12)
    kv_heads: int = number_field(0, 0, 2**12)  # 0: heads
    ffn: int = number_field(0, 0, 2**20)
    tied: bool = True  # of a new model


@dataclass(slots=True, kw_only=True)
class DataSettings:
    """The data sets, and how their questions become prompts."""

    dir: str = ""  # the folder of the original files; "" is $GRPO_JAX_DATA
    train: str = "gsm8k"  # the RL questions; "a+b" joins sets
    eval: str = "gsm8k"  # the sets of the comparison; "a+b" or "a,b" is two sets
    sft: str = ""  # worked examples for the Instruct stage
    in_domain: str = ""  # the sets that count as trained on; "" is `train`
    template: str = choice_field("chat", "deepseekmath", "plain")
    instruction: str = choice_field("cot", "tool", "none")
    # Longer questions are dropped and counted.
    max_prompt_tokens: int = number_field(512, 1, TOKENS)


@dataclass(slots=True, kw_only=True)
class SftSettings:
    """The Instruct stage (DeepSeekMath, section 3)."""

    learning_rate: float = number_field(5e-5, above=0, most=1)
    schedule: str = choice_field("constant", "linear", "cosine")
    warmup_steps: int = number_field(0, 0, COUNT)
    batch_size: int = number_field(256, 1, ROWS)  # examples a step
    # Rows a step of examples concatenated at random, as in the paper; 0: batch_size.
    batch_rows: int = number_field(0, 0, ROWS)
    row_length: int = number_field(4096, 2, TOKENS)  # tokens of a packed row
    # Longer examples are left out and counted; 0 refuses one that fits no row.
    max_tokens: int = number_field(0, 0, TOKENS)
    micro_rows: int = number_field(1, 1, ROWS)  # rows in memory at a time
    aggregate: str = choice_field("sequence_mean", "token_mean")


@dataclass(slots=True, kw_only=True)
class RewardSettings:
    """The reward functions."""

    # rule | format | model | module:function, comma-separated; "" is the method's own
    functions: str = ""
    weights: str = ""  # one each, comma-separated; "" is 1 each
    # Seconds for a batch; what is not graded by then counts as wrong.
    timeout: float = number_field(60.0, above=0, most=LONGEST)


@dataclass(slots=True, kw_only=True)
class ToolSettings:
    """Tool-integrated outputs, whose programs are run."""

    # Generations of an output, each of max_new_tokens, with programs run in between.
    # None is 2 if data.instruction is tool, else 0; with 0 nothing is run.
    generations: int | None = number_field(None, 0, 1000)
    timeout: float = number_field(10.0, above=0, most=LONGEST)  # seconds of a program
    # Outputs that are generated at a time; 0 is all.
    rows: int = number_field(0, 0, COUNT)


@dataclass(slots=True, kw_only=True)
class RewardModelSettings:
    """The reward model r_φ, its labels and its training (section 4.1)."""

    labels: str = ""  # a JSON-lines file of labelled steps; "" labels by Math-Shepherd
    questions: int = number_field(2048, 1, COUNT)  # whose outputs are labelled
    samples: int = number_field(1, 1, ROWS)  # outputs of each question
    completions: int = number_field(8, 1, ROWS)  # K, sampled from the end of each step
    soft: bool = False  # label: the share of right completions, not whether any is
    # Updates on the labels, again in each iteration.
    steps: int = number_field(500, 1, COUNT)
    batch_size: int = number_field(64, 1, ROWS)  # labelled outputs a step
    learning_rate: float = number_field(2e-5, above=0, most=1)


@dataclass(slots=True, kw_only=True)
class OptimizerSettings:
    """The optimiser and the batches of the RL stage; parts are shared by all stages."""

    # The schedule of the RL stage.
    schedule: str = choice_field("constant", "linear", "cosine")
    warmup_steps: int = number_field(0, 0, COUNT)
    b1: float = number_field(0.9, 0, below=1)
    b2: float = number_field(0.95, 0, below=1)
    weight_decay: float = number_field(0.0, 0, 10)
    max_grad_norm: float = number_field(1.0, above=0, most=1e9)
    master: bool = True  # float32 copies of bfloat16 weights, which the updates move
    micro_rows: int = number_field(1, 1, ROWS)  # packed rows in memory at a time
    # Tokens of a packed row; 0 fits the longest sample.
    row_length: int = number_field(0, 0, TOKENS)
    # How many row lengths may be compiled, down to half of row_length. Small batches
    # then have less padding.
    row_lengths: int = number_field(1, 1, 256)
    # Non-finite updates in a row before the run stops.
    max_skipped: int = number_field(5, 1, COUNT)
    # The largest mean gap between log-probabilities of sampler and trainer, in nats.
    max_sampling_gap: float = number_field(0.5, above=0, most=COEFFICIENT)


@dataclass(slots=True, kw_only=True)
class EvalSettings:
    """The evaluation during and after training."""

    questions: int = number_field(0, 0, COUNT)  # of each set; 0 is all
    # Completions a question at `temperature`; 0 measures greedy decoding only.
    samples: int = number_field(1, 0, ROWS)
    temperature: float = number_field(1.0, 0.01, 100)
    batch: int = number_field(64, 1, ROWS)  # the most completions decoded at a time
    # RL steps between evaluations of the first set; 0 is never.
    every: int = number_field(0, 0, COUNT)


@dataclass(slots=True, kw_only=True)
class MeshSettings:
    """How devices are divided among data, FSDP and tensor parallelism."""

    data: int = number_field(1, -1, ROWS)
    fsdp: int = number_field(-1, -1, ROWS)  # -1: all devices that the other two leave
    tensor: int = number_field(1, -1, ROWS)
    # Tensor parallelism while outputs are sampled; 0 is `tensor`.
    decode_tensor: int = number_field(0, 0, ROWS)
    # Outputs decoded at a time; 0 is a quarter, but at least 128 in each device group.
    slots: int = number_field(0, 0, ROWS)


@dataclass(slots=True, kw_only=True)
class Config:
    """All settings of a run; defaults are the paper's where it states them."""

    name: str = "run"  # the work directory is runs/<name>
    seed: int = number_field(0, 0, 2**32 - 1)
    method: str = choice_field(*METHODS, default="grpo")  # see algorithms/methods.py
    sft_steps: int = number_field(0, 0, COUNT)  # 0 starts RL from model.path
    rl_steps: int = number_field(0, 0, COUNT)
    questions_per_step: int = number_field(16, 1, ROWS)
    group_size: int = number_field(64, 1, ROWS)  # G
    max_new_tokens: int = number_field(1024, 1, TOKENS)
    learning_rate: float = number_field(1e-6, above=0, most=1)  # of the RL stage
    # Of the outputs that are trained on.
    temperature: float = number_field(1.0, 0.01, 100)
    # Fields of some methods; None is the method's own default.
    kl_coef: float | None = number_field(None, 0, COEFFICIENT)  # β
    clip_low: float | None = number_field(None, above=0, most=1)  # ε
    clip_high: float | None = number_field(None, above=0, most=COEFFICIENT)
    # Two-sided clip: the bound on ρ where Â < 0.
    delta: float | None = number_field(None, above=1, most=COEFFICIENT)
    kl_estimator: str | None = choice_field(
        "k1", "k2", "k3", "k3_unbiased", default=None
    )
    aggregate: str | None = choice_field(
        "sequence_mean", "token_mean", "constant", "sequence_sum", default=None
    )
    importance: str | None = choice_field("token", "sequence", default=None)
    surrogate: str | None = choice_field("clip", "cispo", default=None)
    advantage_scale: str | None = choice_field("group", "batch", "none", default=None)
    advantage_baseline: str | None = choice_field(
        "mean", "leave_one_out", "batch", default=None
    )
    # sum: rewards are summed, then normalised; each: normalised, then summed.
    reward_normalization: str | None = choice_field("sum", "each", default=None)
    updates_per_rollout: int | None = number_field(None, 1, 1000)  # μ
    # Updates by which the policy that samples may lag behind.
    max_staleness: int | None = choice_field(0, 1, default=None)
    entropy_coef: float | None = number_field(None, 0, COEFFICIENT)  # of a bonus
    # C of the weights min(π_old/π_sampler, C); None leaves the weights out.
    importance_cap: float | None = number_field(None, above=0, most=COEFFICIENT)
    mask_truncated: bool | None = None  # leave cut-off outputs out of the loss
    # How many tokens before the limit reduce the reward.
    overlong_buffer: int | None = number_field(None, 0, COUNT)
    # Further rollouts to replace tied groups.
    dynamic_sampling: int | None = number_field(None, 0, 1000)
    dpo_beta: float | None = number_field(None, above=0, most=COEFFICIENT)
    length_normalized: bool | None = None  # DPO's Δ: means over tokens, not sums
    gae_gamma: float | None = number_field(None, 0, 1)
    gae_lambda: float | None = number_field(None, 0, 1)
    value_clip: float | None = number_field(None, above=0, most=COEFFICIENT)
    value_learning_rate: float | None = number_field(None, above=0, most=1)
    iterations: int | None = number_field(None, 1, 1000)  # of iterative GRPO
    # Share of old labels in the reward model's next data.
    replay: float | None = number_field(None, 0, 1)
    # Before RL, sample outputs of the questions, and train on those that teach.
    census: bool = False
    census_questions: int = number_field(1024, 0, COUNT)  # of each set; 0 is all
    census_samples: int = number_field(8, 2, ROWS)  # outputs of each question
    checkpoint_every: int = number_field(50, 1, COUNT)
    checkpoints_kept: int = number_field(2, 1, COUNT)
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    sft: SftSettings = field(default_factory=SftSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    rewards: RewardSettings = field(default_factory=RewardSettings)
    tools: ToolSettings = field(default_factory=ToolSettings)
    reward_model: RewardModelSettings = field(default_factory=RewardModelSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    mesh: MeshSettings = field(default_factory=MeshSettings)

    def method_value(self, name: str) -> Any:
        """Returns the value of a method's field: as set, else the method's default."""
        value = getattr(self, name)
        return METHODS[self.method].fields[name] if value is None else value

    def method_values(self) -> dict[str, Any]:
        """Returns the values of all fields that the method reads."""
        return {name: self.method_value(name) for name in METHODS[self.method].fields}


def flatten_config(config: Any, prefix: str = "") -> dict[str, Any]:
    """Returns every field by its dotted name, such as {"model.path": …}."""
    flat: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten_config(value, f"{prefix}{f.name}.")
        else:
            flat[prefix + f.name] = value
    return flat


def tool_generations(config: Config) -> int:
    """Returns how many generations an output with tools has; 0 without tools.

    >>> data = DataSettings(instruction="tool")
    >>> tool_generations(Config()), tool_generations(Config(data=data))
    (0, 2)
    """
    if config.tools.generations is None:
        return 2 if config.data.instruction == "tool" else 0
    return config.tools.generations


def set_names(config: Config) -> list[str]:
    """Returns the names of the comparison's sets."""
    return _split(config.data.eval.replace("+", ","))


def reward_names(config: Config) -> list[str]:
    """Returns the names of the reward functions, or the method's default."""
    return _split(config.rewards.functions or METHODS[config.method].reward)


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def reward_weights(config: Config) -> list[float]:
    """Returns the weights of the reward functions, 1 each by default.

    Raises:
      GrpoError: a weight is not a finite number, or all of them are 0.
    """
    if not config.rewards.weights:
        return [1.0] * len(reward_names(config))
    try:
        weights = list(map(float, _split(config.rewards.weights)))
    except ValueError:
        raise GrpoError(
            f"config.rewards.weights: {config.rewards.weights!r} are not numbers"
        ) from None
    if not all(abs(weight) <= COEFFICIENT for weight in weights) or not any(weights):
        raise GrpoError(
            f"config.rewards.weights: {config.rewards.weights!r}: finite numbers are "
            f"needed, of {COEFFICIENT:g} at most and one of them not 0"
        )
    return weights


def lora_targets(config: Config) -> tuple[str, ...]:
    """Returns the names of the matrices with LoRA adapters, as in the parameters.

    Raises:
      GrpoError: a target is unknown, or LoRA's fields are set without a rank.
    """
    model, default = config.model, ModelSettings()
    if not model.lora_rank:
        for name in ("lora_alpha", "lora_targets"):
            if getattr(model, name) != getattr(default, name):
                raise GrpoError(
                    f"config.model.{name}: without adapters it would be ignored; set "
                    "model.lora_rank too, or leave it out"
                )
    where, known = "config.model.lora_targets", _split(default.lora_targets)
    names = [name.removesuffix("_proj") for name in _split(model.lora_targets)]
    for name in names:
        if name not in known:
            raise GrpoError(f"{where}: {name!r} is not one of {', '.join(known)}")
    if not names:
        raise GrpoError(f"{where}: empty; name one projection at least")
    return tuple(dict.fromkeys(f"{name}_proj" for name in names))


def from_dict(values: Mapping[str, Any], kind: type = Config, where: str = "") -> Any:
    """Returns a Config from nested dictionaries, as config.json holds it.

    Args:
      values: the fields.
      kind: the class to make: `Config` or one of its parts.
      where: the part's dotted prefix, for messages.

    Raises:
      GrpoError: a key is not a field.

    >>> from_dict({"group_sise": 8})
    Traceback (most recent call last):
    ...
    grpo_jax.errors.GrpoError: config.group_sise: no such field; did you mean...
    """
    hints = get_type_hints(kind)
    arguments: dict[str, Any] = {}
    if not isinstance(values, Mapping):
        raise GrpoError(f"config{where and '.' + where[:-1]}: not an object of fields")
    for name, value in values.items():
        if name not in hints:
            raise GrpoError(unknown_field(where + name))
        if dataclasses.is_dataclass(hints[name]):
            value = from_dict(value, hints[name], f"{where}{name}.")  # type: ignore
        arguments[name] = value
    return kind(**arguments)


def unknown_field(name: str) -> str:
    """Returns the message for an unknown field, with the one that was probably meant.

    >>> unknown_field("num_generations")
    'config.num_generations: no such field; did you mean config.group_size?'
    """
    name, known = " ".join(name.split()), list(flatten_config(Config()))
    inner = [field for field in known if field.startswith(f"{name}.")]
    if inner:
        return f"config.{name}: set one of its fields, such as config.{inner[0]}"
    return f"config.{name}: no such field{suggest_name(name, known)}"
