"""Converts Hugging Face's config.json to a ModelConfig and back.

It reads Llama (DeepSeek's included), Mistral, Qwen2 and Qwen3, with RoPE under the old
or the new keys. Features that the decoder does not have are refused by key and value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from grpo_jax.errors import GrpoError, one_line
from grpo_jax.models.config import ModelConfig, RopeScaling

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# The defaults of transformers for keys that are missing, by architecture.
_COMMON = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,  # as many as heads
    "head_dim": None,  # hidden_size / heads
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
}
_QWEN = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "use_sliding_window": False,
    "max_window_layers": 28,
    "layer_types": None,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _COMMON,
    "mistral": _COMMON
    | {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": _COMMON | _QWEN,
    "qwen3": _COMMON | _QWEN | {"head_dim": 128},
}
# Larger values are taken for a mistake in the file.
_MOST = {
    "vocab_size": 10**8,
    "hidden_size": 10**6,
    "intermediate_size": 10**7,
    "num_hidden_layers": 10**4,
    "num_attention_heads": 10**5,
    "num_key_value_heads": 10**5,
    "head_dim": 10**5,
    "max_position_embeddings": 2**31 - 1,
    "sliding_window": 2**31 - 1,
    "max_window_layers": 10**9,
}


def config_from_hf(
    config: Mapping[str, Any], where: str = "config.json"
) -> ModelConfig:
    """Returns the ModelConfig of a config.json.

    Args:
      config: the dictionary of the file.
      where: the file's name, for errors.

    Raises:
      GrpoError: an architecture, activation or RoPE scaling is not supported, or a
        value has the wrong type or is out of range.

    >>> small = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}
    >>> config_from_hf(small).head_dim
    16
    >>> config_from_hf(small | {"rope_scaling": {"type": "yarn", "factor": 4.0}})
    Traceback (most recent call last):
    ...
    grpo_jax.errors.GrpoError: config.json: rope_scaling.rope_type='yarn' is not ...
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        refuse_value(where, "model_type", kind, f"{', '.join(ARCHITECTURES)} are")
    names = config.get("architectures") or [ARCHITECTURES[kind]]
    if names != [ARCHITECTURES[kind]]:
        refuse_value(where, "architectures", names, f"['{ARCHITECTURES[kind]}'] is")
    c = _DEFAULTS[kind] | {k: v for k, v in config.items() if v is not None}
    for key in ("sliding_window", "num_key_value_heads"):
        c[key] = config.get(key, c[key])  # null is a value here: no window; all heads
    if c["hidden_act"] not in ("silu", "swish"):
        refuse_value(where, "hidden_act", c["hidden_act"], "'silu' is")
    for key in ("quantization_config", "num_experts", "num_local_experts"):
        if c.get(key):
            refuse_value(where, key, c[key], "unquantised dense models are")
    for key in _MOST:
        if c.get(key) is not None:
            _check_whole(where, key, c[key], least=int(key != "max_window_layers"))
    for key, default in _DEFAULTS[kind].items():
        if isinstance(default, bool) and not isinstance(c[key], bool):
            refuse_value(where, key, c[key], "true and false are")
    _check_number(where, "rms_norm_eps", c["rms_norm_eps"], most=1)
    heads = c["num_attention_heads"]
    kv_heads = heads if c["num_key_value_heads"] is None else c["num_key_value_heads"]
    if heads % kv_heads:
        raise GrpoError(
            f"{where}: num_attention_heads={heads} is not a multiple of "
            f"num_key_value_heads={kv_heads}"
        )
    if c["head_dim"] is None and c["hidden_size"] % heads:
        raise GrpoError(
            f"{where}: hidden_size={c['hidden_size']} is not a multiple of "
            f"num_attention_heads={heads} and there is no head_dim"
        )
    head_dim = c["head_dim"] or c["hidden_size"] // heads
    if head_dim % 2:
        refuse_value(
            where, "head_dim", head_dim, "even ones are, whose halves RoPE turns"
        )
    theta, scaling = _rope(c, where)
    # Mistral's and Qwen2's code ignores attention_bias, whatever the file says.
    bias = c["attention_bias"] and kind in ("llama", "qwen3")
    return ModelConfig(
        vocab_size=c["vocab_size"],
        width=c["hidden_size"],
        layers=c["num_hidden_layers"],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=c["intermediate_size"],
        norm_eps=float(c["rms_norm_eps"]),
        rope_theta=theta,
        rope_scaling=scaling,
        tied=c["tie_word_embeddings"],
        qkv_bias=bias or kind == "qwen2",
        out_bias=bias,
        mlp_bias=c["mlp_bias"] and kind == "llama",
        qk_norm=kind == "qwen3",
        sliding_window=_window(c, kind, where),
        max_positions=c["max_position_embeddings"],
    )


def refuse_value(where: object, key: str, value: Any, instead: str) -> NoReturn:
    """Raises a GrpoError: the value of a key in a file is not supported.

    Args:
      where: the file.
      key: the key.
      value: its value.
      instead: what is supported, as the subject and verb of a sentence.
    """
    shown = one_line(repr(value))
    raise GrpoError(f"{where}: {key}={shown} is not supported; {instead}")


def _check_whole(where: str, key: str, value: Any, least: int = 1) -> None:
    most = _MOST[key]
    if type(value) is not int or not least <= value <= most:
        raise GrpoError(
            f"{where}: {key}={one_line(repr(value))} is not a whole number from "
            f"{least} to {most}"
        )


def _check_number(where: str, key: str, value: Any, most: float = 1e12) -> None:
    if type(value) not in (int, float) or not 0 < value <= most:
        raise GrpoError(
            f"{where}: {key}={one_line(repr(value))} is not a number above 0 and at "
            f"most {most:g}"
        )


def _rope(c: Mapping[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """Returns RoPE's theta and scaling, from `rope_parameters` or the older keys."""
    group = "rope_parameters" if c.get("rope_parameters") else "rope_scaling"
    rope = c.get(group) or {}
    if not isinstance(rope, Mapping):
        refuse_value(where, group, rope, "an object with rope_type is")
    if any(isinstance(value, Mapping) for value in rope.values()):
        refuse_value(where, group, rope, "one RoPE for all layers is")
    theta = rope.get("rope_theta")
    theta = c["rope_theta"] if theta is None else theta
    _check_number(where, "rope_theta", theta)
    partial = rope.get("partial_rotary_factor") or c.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        refuse_value(where, "partial_rotary_factor", partial, "1.0 is")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return float(theta), None
    if kind not in ("linear", "llama3"):
        refuse_value(
            where, f"{group}.rope_type", kind, "'default', 'linear', 'llama3' are"
        )
    keys = ["factor"]
    if kind == "llama3":
        keys += ["low_freq_factor", "high_freq_factor"]
    for key in keys:
        _check_number(where, f"{group}.{key}", rope.get(key))
    if kind == "linear":
        return float(theta), RopeScaling(kind=kind, factor=float(rope["factor"]))
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    if not low < high:
        refuse_value(where, f"{group}.high_freq_factor", high, f"above {low} is")
    original = rope.get("original_max_position_embeddings")
    if original is None:
        original = c["max_position_embeddings"]
    key = f"{group}.original_max_position_embeddings"
    if type(original) is not int or not 1 <= original <= 2**31 - 1:
        refuse_value(where, key, original, "a whole number above 0 is")
    return float(theta), RopeScaling(
        kind=kind,
        factor=float(rope["factor"]),
        low_freq_factor=float(low),
        high_freq_factor=float(high),
        original_max_positions=original,
    )


def _window(c: Mapping[str, Any], kind: str, where: str) -> int | None:
    """Returns the sliding window of all layers or None; a mixture is refused."""
    if kind == "llama":
        return None
    if kind == "mistral":
        return c["sliding_window"]
    window = c["sliding_window"] if c["use_sliding_window"] else None
    layers, full = c["num_hidden_layers"], c["max_window_layers"]
    types = c["layer_types"] or [
        "sliding_attention" if window and i >= full else "full_attention"
        for i in range(layers)
    ]
    if not isinstance(types, list) or not all(isinstance(t, str) for t in types):
        refuse_value(where, "layer_types", types, "a list of names is")
    if len(types) != layers:
        raise GrpoError(
            f"{where}: layer_types names {len(types)} layers, "
            f"num_hidden_layers={layers}"
        )
    if set(types) == {"full_attention"}:
        return None
    if set(types) == {"sliding_attention"} and window:
        return window
    refuse_value(where, "layer_types", sorted(set(types)), "one kind for all layers is")


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Returns a config.json of this model for transformers 4.40 and later.

    Raises:
      GrpoError: no architecture of transformers has this combination.

    >>> config = ModelConfig(vocab_size=11, width=16, layers=2, heads=4, kv_heads=2,
    ...                      head_dim=4, ffn=32)
    >>> (config_to_hf(config)["architectures"],
    ...  config_from_hf(config_to_hf(config)) == config)
    (['LlamaForCausalLM'], True)
    """
    if config.qk_norm:
        kind = "qwen3"
    elif config.qkv_bias and not config.out_bias:
        kind = "qwen2"
    else:
        kind = "llama" if config.sliding_window is None else "mistral"
    scaling = config.rope_scaling
    rope: dict[str, Any] | None = None
    if scaling is not None:  # older releases read "type" and rope_scaling
        rope = dict(type=scaling.kind, rope_type=scaling.kind, factor=scaling.factor)
        if scaling.kind == "llama3":
            rope |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_positions,
            }
    out = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.ffn,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope,
        "tie_word_embeddings": config.tied,
    }
    if kind in ("llama", "qwen3"):
        out["attention_bias"] = config.qkv_bias
    if kind == "llama":
        out["mlp_bias"] = config.mlp_bias
    if kind == "mistral":
        out["sliding_window"] = config.sliding_window
    if kind in ("qwen2", "qwen3"):
        out["use_sliding_window"] = config.sliding_window is not None
        out["sliding_window"] = config.sliding_window
        out["max_window_layers"] = config.layers if config.sliding_window is None else 0
    if config_from_hf(out) != config:
        raise GrpoError(
            f"model: no architecture of transformers is a {kind} with {config}"
        )
    return out
