"""What a run is told: typed fields, their defaults, and what is refused.

In: a small Python file in configs/ whose `get_config()` returns a `Config`, and
`--config.name=value` on the command line. Out: a checked `Config`; the loops hand its
values on as keyword arguments, and nothing below them knows it.

Fields that belong to one method are None and then take the method's own default
(`METHODS`); one that is set and that the method would ignore is refused.
"""

import dataclasses
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from grpo_jax.errors import GrpoError

# method → its own fields with the paper's values (DeepSeekMath, section 4.2)
METHODS: dict[str, dict[str, Any]] = {
    "sft": {},
    "grpo": {
        "kl_coef": 0.04,
        "clip_low": 0.2,
        "clip_high": None,  # the same as clip_low
        "delta": None,  # no bound on the other side
        "kl_estimator": "k3",
        "aggregate": "sequence_mean",
        "importance": "token",
        "surrogate": "clip",
        "advantage_scale": "group",
        "advantage_baseline": "mean",
        "updates_per_rollout": 1,
    },
}
OWN_FIELDS = tuple(METHODS["grpo"])


@dataclass(slots=True, kw_only=True)
class ModelSettings:
    path: str = ""  # Hugging Face folder or hub name; "" makes a new model
    revision: str = ""  # of the hub name
    hint: str = ""  # what to do where the folder is missing
    dtype: str = "float32"  # of the computation: float32 | bfloat16
    param_dtype: str = "float32"  # of the trained weights and the optimiser state
    remat: bool = False  # recompute layers in the backward pass: less memory
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
    functions: str = "rule"  # rule | format | module:function, comma-separated
    weights: str = "1.0"  # one each, comma-separated
    timeout: float = 60.0  # seconds a batch; what is not back counts as wrong


@dataclass(slots=True, kw_only=True)
class OptimizerSettings:
    schedule: str = "constant"  # of the RL stage
    warmup_steps: int = 0
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    micro_rows: int = 1  # packed rows in memory at a time
    row_length: int = 0  # tokens of a packed row; 0 fits the longest sample
    max_skipped: int = 5  # non-finite updates in a row before the run stops
    max_sampling_gap: float = 0.5  # nats between sampler and trainer, on average


@dataclass(slots=True, kw_only=True)
class EvalSettings:
    questions: int = 0  # of each set; 0 is all
    samples: int = 1  # completions a question at `temperature`; 0 leaves that out
    temperature: float = 1.0
    batch: int = 64  # completions decoded at a time
    every: int = 0  # RL steps between evaluations of the first set; 0 is never


@dataclass(slots=True, kw_only=True)
class MeshSettings:
    data: int = 1
    fsdp: int = -1  # -1 is what the other two leave of the devices
    tensor: int = 1


@dataclass(slots=True, kw_only=True)
class Config:
    name: str = "run"  # the work directory is runs/<name>
    seed: int = 0
    method: str = "grpo"  # sft | grpo
    sft_steps: int = 0  # the Instruct stage; 0 starts from model.path
    rl_steps: int = 0
    questions_per_step: int = 16
    group_size: int = 64  # G
    max_new_tokens: int = 1024
    learning_rate: float = 1e-6  # of the RL stage
    temperature: float = 1.0  # of the samples that are trained on
    kl_coef: float | None = None  # β
    clip_low: float | None = None  # ε
    clip_high: float | None = None
    delta: float | None = None
    kl_estimator: str | None = None
    aggregate: str | None = None
    importance: str | None = None
    surrogate: str | None = None
    advantage_scale: str | None = None
    advantage_baseline: str | None = None
    updates_per_rollout: int | None = None  # μ
    checkpoint_every: int = 50
    checkpoints_kept: int = 2
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    sft: SftSettings = field(default_factory=SftSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    rewards: RewardSettings = field(default_factory=RewardSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    mesh: MeshSettings = field(default_factory=MeshSettings)

    def of_method(self, name: str) -> Any:
        """A method's own field: as set, else the method's default."""
        value = getattr(self, name)
        return METHODS[self.method][name] if value is None else value


_CHOICES = {
    "method": tuple(METHODS),
    "kl_estimator": ("k1", "k2", "k3", "k3_unbiased"),
    "aggregate": ("sequence_mean", "token_mean", "constant"),
    "importance": ("token", "sequence"),
    "surrogate": ("clip", "cispo"),
    "advantage_scale": ("group", "batch", "none"),
    "advantage_baseline": ("mean", "leave_one_out"),
    "model.dtype": ("float32", "bfloat16"),
    "model.param_dtype": ("float32", "bfloat16"),
    "data.template": ("chat", "deepseekmath", "plain"),
    "data.instruction": ("cot", "tool", "none"),
    "sft.schedule": ("constant", "linear", "cosine"),
    "sft.aggregate": ("sequence_mean", "token_mean"),
    "optimizer.schedule": ("constant", "linear", "cosine"),
}
# name → the least value allowed, and whether that value itself is
_BOUNDS: dict[str, tuple[float, bool]] = {
    "sft_steps": (0, True),
    "rl_steps": (0, True),
    "questions_per_step": (1, True),
    "group_size": (1, True),
    "max_new_tokens": (1, True),
    "learning_rate": (0, False),
    "temperature": (0, False),
    "kl_coef": (0, True),
    "clip_low": (0, False),
    "clip_high": (0, False),
    "delta": (1, False),
    "updates_per_rollout": (1, True),
    "checkpoint_every": (1, True),
    "checkpoints_kept": (1, True),
    "model.vocab_size": (0, True),
    "model.layers": (0, True),
    "model.width": (0, True),
    "model.heads": (0, True),
    "model.kv_heads": (0, True),
    "model.ffn": (0, True),
    "data.max_prompt_tokens": (1, True),
    "sft.learning_rate": (0, False),
    "sft.warmup_steps": (0, True),
    "sft.batch_size": (1, True),
    "sft.batch_rows": (0, True),
    "sft.row_length": (2, True),
    "sft.micro_rows": (1, True),
    "optimizer.warmup_steps": (0, True),
    "optimizer.b1": (0, True),
    "optimizer.b2": (0, True),
    "optimizer.weight_decay": (0, True),
    "optimizer.max_grad_norm": (0, False),
    "optimizer.micro_rows": (1, True),
    "optimizer.row_length": (0, True),
    "optimizer.max_skipped": (1, True),
    "optimizer.max_sampling_gap": (0, False),
    "rewards.timeout": (0, False),
    "eval.questions": (0, True),
    "eval.samples": (0, True),
    "eval.temperature": (0, False),
    "eval.batch": (1, True),
    "eval.every": (0, True),
}


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


def validate(config: Config) -> Config:
    """The config itself, if a run can start with it.

    >>> validate(Config(group_size=1))
    Traceback (most recent call last):
    ...
    grpo_jax.errors.GrpoError: config.group_size: 1 output a question has no group...
    """
    flat = flatten(config)
    for name, value in flat.items():
        if isinstance(value, float) and value != value:
            raise GrpoError(f"config.{name}: NaN is not a value")
    for name, choices in _CHOICES.items():
        if flat[name] is not None and flat[name] not in choices:
            near = difflib.get_close_matches(str(flat[name]), choices, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            known = ", ".join(choices)
            raise GrpoError(
                f"config.{name}: {flat[name]!r} is not one of {known}{hint}"
            )
    for name, (least, allowed) in _BOUNDS.items():
        value = flat[name]
        if value is not None and (value < least or (value == least and not allowed)):
            bound = f"{least} or more" if allowed else f"above {least}"
            raise GrpoError(
                f"config.{name}: {value} is out of range; {bound} is needed"
            )
    for name in OWN_FIELDS:
        if flat[name] is not None and name not in METHODS[config.method]:
            raise GrpoError(
                f"config.{name}: method {config.method} would ignore it; leave it out"
            )
    if config.method == "grpo":
        _validate_grpo(config)
    if config.sft_steps and not config.data.sft:
        raise GrpoError("config.data.sft: sft_steps is set; name the worked examples")
    if not config.model.path:
        for name in ("layers", "width", "heads", "ffn"):
            if not flat[f"model.{name}"]:
                raise GrpoError(
                    f"config.model.{name}: 0; a new model needs it (or set model.path)"
                )
        if config.model.width % (2 * config.model.heads):
            raise GrpoError(
                f"config.model.width: {config.model.width} is not a multiple of twice "
                f"the heads, {config.model.heads}"
            )
    if not config.sft_steps and not config.model.path:
        raise GrpoError(
            "config.sft_steps: 0, so RL would start from random weights; set it, or "
            "model.path"
        )
    names, weights = reward_names(config), reward_weights(config)
    if len(names) != len(weights):
        raise GrpoError(
            f"config.rewards.weights: {len(weights)} for {len(names)} functions"
        )
    return config


def _validate_grpo(config: Config) -> None:
    if config.group_size < 2:
        raise GrpoError(
            f"config.group_size: {config.group_size} output a question has no group to "
            "be compared with; 2 or more"
        )
    if config.of_method("surrogate") == "cispo" and config.clip_high is None:
        raise GrpoError("config.clip_high: surrogate cispo needs it, the ratio's bound")


def reward_names(config: Config) -> list[str]:
    return [n.strip() for n in config.rewards.functions.split(",") if n.strip()]


def reward_weights(config: Config) -> list[float]:
    try:
        return [float(w) for w in config.rewards.weights.split(",") if w.strip()]
    except ValueError:
        raise GrpoError(
            f"config.rewards.weights: {config.rewards.weights!r} are not numbers"
        ) from None


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
