"""A .gguf file of llama.cpp → what a Hugging Face folder holds.

In: GGUF of the architectures llama, qwen2 or qwen3, quantised or not, with a byte-level
BPE vocabulary. Out: config.json's dictionary, the tensors in float32, tokenizer.json
and its companions. Needs the package gguf.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from grpo_jax.errors import GrpoError
from grpo_jax.hf.config import ARCHITECTURES
from grpo_jax.hf.tensors import Source

# llama.cpp's names -> Hugging Face's; a layer's come after "blk.{i}."
_TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # tokenizer.ggml.token_type


def unpermute(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's order of q's and k's rows (rotary pairs side by side).

    >>> unpermute(np.array([0, 2, 1, 3]), heads=1).tolist()
    [0, 1, 2, 3]
    """
    pairs = matrix.reshape(heads, matrix.shape[0] // heads // 2, 2, *matrix.shape[1:])
    return pairs.swapaxes(1, 2).reshape(matrix.shape)


class GgufModel:
    """An open GGUF file; its methods give the parts of a Hugging Face folder."""

    def __init__(self, file: Path) -> None:
        try:
            import gguf
        except ImportError:
            raise GrpoError(
                f"{file}: the package gguf is needed to read it; pip install gguf"
            ) from None
        self.file = file
        try:
            self._reader = gguf.GGUFReader(file)
        except (OSError, ValueError, IndexError, KeyError) as error:
            raise GrpoError(f"{file}: not a whole GGUF file ({error})") from None
        self._dequantize = gguf.dequantize
        self._arch = "general"
        self._arch = self._get("ARCH.architecture")
        if self._arch not in ("llama", "qwen2", "qwen3"):
            self._refuse("general.architecture", self._arch, "llama, qwen2, qwen3 are")
        if self._get("tokenizer.ggml.model") != "gpt2":
            kind = self._get("tokenizer.ggml.model")
            self._refuse("tokenizer.ggml.model", kind, "gpt2 (byte-level BPE) is")

    def _get(self, key: str, *default: Any) -> Any:
        field = self._reader.get_field(key.replace("ARCH", self._arch, 1))
        if field is None and not default:
            raise GrpoError(f"{self.file}: the key {key} is missing")
        value = default[0] if field is None else field.contents()
        # eps and theta are float32: 1e-05 and not 9.999999747378752e-06
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def _refuse(self, key: str, value: Any, instead: str) -> NoReturn:
        raise GrpoError(f"{self.file}: {key}={value!r} is not supported; {instead}")

    def config(self) -> dict[str, Any]:
        """config.json."""
        names = {tensor.name for tensor in self._reader.tensors}
        if "rope_freqs.weight" in names:
            self._refuse("rope_freqs", "…", "convert from the model's safetensors")
        scaling = self._get("ARCH.rope.scaling.type", "none")
        if scaling not in ("none", "linear"):
            self._refuse("rope.scaling.type", scaling, "none and linear are")
        rope = None
        if scaling == "linear":
            rope = {"type": scaling, "factor": self._get("ARCH.rope.scaling.factor")}
        heads = self._get("ARCH.attention.head_count")
        width = self._get("ARCH.embedding_length")
        return {
            "architectures": [ARCHITECTURES[self._arch]],
            "model_type": self._arch,
            "vocab_size": len(self._get("tokenizer.ggml.tokens")),
            "hidden_size": width,
            "intermediate_size": self._get("ARCH.feed_forward_length"),
            "num_hidden_layers": self._get("ARCH.block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._get("ARCH.attention.head_count_kv", heads),
            "head_dim": self._get("ARCH.attention.key_length", width // heads),
            "hidden_act": "silu",
            "max_position_embeddings": self._get("ARCH.context_length"),
            "rms_norm_eps": self._get("ARCH.attention.layer_norm_rms_epsilon"),
            "rope_theta": self._get("ARCH.rope.freq_base", 10000.0),
            "rope_scaling": rope,
            "attention_bias": self._arch == "llama" and "blk.0.attn_q.bias" in names,
            "tie_word_embeddings": "output.weight" not in names,
            "torch_dtype": "float32",
            **self._token_ids(),
        }

    def generation_config(self) -> dict[str, Any]:
        """generation_config.json."""
        return {"_from_model_config": True, **self._token_ids()}

    def _token_ids(self) -> dict[str, Any]:
        eos = self._get("tokenizer.ggml.eos_token_id")
        ends = sorted({eos, self._get("tokenizer.ggml.eot_token_id", eos)})
        return {
            "bos_token_id": self._get("tokenizer.ggml.bos_token_id", None),
            "eos_token_id": ends if len(ends) > 1 else eos,
            "pad_token_id": self._get("tokenizer.ggml.padding_token_id", None),
        }

    def tensors(self) -> Iterator[tuple[str, Source]]:
        """The weights, dequantised to float32 one by one as they are read."""
        heads = {"attn_q": self._get("ARCH.attention.head_count")}
        heads["attn_k"] = self._get("ARCH.attention.head_count_kv", heads["attn_q"])
        for tensor in self._reader.tensors:
            stem, _, kind = tensor.name.rpartition(".")
            name = _TOP.get(stem)
            if stem.startswith("blk."):
                _, layer, stem = stem.split(".", 2)
                if stem in _LAYER:
                    name = f"model.layers.{layer}.{_LAYER[stem]}"
            if name is None or kind not in ("weight", "bias"):
                self._refuse("tensor", tensor.name, "only dense decoders are")
            permuted = heads.get(stem) if self._arch == "llama" else None

            def read(tensor=tensor, permuted=permuted) -> np.ndarray:
                array = self._dequantize(tensor.data, tensor.tensor_type)
                array = np.asarray(array, np.float32)
                return unpermute(array, permuted) if permuted else array

            shape = tuple(int(size) for size in reversed(tensor.shape))
            yield f"{name}.{kind}", Source(np.dtype(np.float32), shape, read)

    def tokenizer(self) -> Tokenizer:
        """tokenizer.json: byte-level BPE after the file's pre-tokenizer."""
        pre = self._get("tokenizer.ggml.pre", "default")
        tokens = self._get("tokenizer.ggml.tokens")
        types = self._get("tokenizer.ggml.token_type", [1] * len(tokens))
        kinds = list(zip(tokens, types, strict=True))
        vocab = {token: i for i, (token, kind) in enumerate(kinds) if kind != _UNUSED}
        merges = [tuple(m.split(" ")) for m in self._get("tokenizer.ggml.merges")]
        llama3 = pre == "llama-bpe"
        tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=llama3))
        if pre == "qwen2":
            tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = self._pre_tokenizer(pre)
        tokenizer.decoder = decoders.ByteLevel()
        for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
            tokenizer.add_tokens(
                [
                    AddedToken(token, normalized=False, special=special)
                    for token, its_kind in kinds
                    if its_kind == kind
                ]
            )
        if self._get("tokenizer.ggml.add_bos_token", llama3):
            bos = self._get("tokenizer.ggml.bos_token_id")
            tokenizer.post_processor = processors.TemplateProcessing(
                single=[tokens[bos], "$A"],
                pair=[tokens[bos], "$A", "$B"],
                special_tokens=[(tokens[bos], bos)],
            )
        return tokenizer

    def _pre_tokenizer(self, name: str) -> Any:
        """How text is cut before BPE."""
        words = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|NUMBER"
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        gpt2 = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
        numbers = {"llama-bpe": r"\p{N}{1,3}", "qwen2": r"\p{N}"}
        if name == "smollm":
            parts = [pre_tokenizers.Digits(individual_digits=True), *gpt2]
        elif name == "gpt-2":
            parts = gpt2
        elif name in numbers:
            pattern = Regex(words.replace("NUMBER", numbers[name]))
            parts = [
                pre_tokenizers.Split(pattern, "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        else:
            known = "smollm, gpt-2, llama-bpe and qwen2 are"
            self._refuse("tokenizer.ggml.pre", name, known)
        return pre_tokenizers.Sequence(parts)

    def tokenizer_config(self) -> dict[str, Any]:
        """tokenizer_config.json: the named special tokens and the chat template."""
        tokens = self._get("tokenizer.ggml.tokens")
        ids = {
            "bos_token": self._get("tokenizer.ggml.bos_token_id", None),
            "eos_token": self._get("tokenizer.ggml.eos_token_id"),
            "unk_token": self._get("tokenizer.ggml.unknown_token_id", None),
            "pad_token": self._get("tokenizer.ggml.padding_token_id", None),
        }
        template = self._get("tokenizer.chat_template", None)
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self._get("ARCH.context_length"),
            "clean_up_tokenization_spaces": False,
            **{name: tokens[i] for name, i in ids.items() if i is not None},
            **({"chat_template": template} if template else {}),
        }
