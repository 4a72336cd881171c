"""Converts a GGUF file of llama.cpp to the parts of a Hugging Face folder.

It reads the architectures llama, qwen2 and qwen3, quantised or not, with a byte-level
BPE vocabulary. The weights become float32. It needs the package gguf.
"""

from __future__ import annotations

import dataclasses
import re
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

from grpo_jax.checkpoints.formats.gguf_file import read_gguf
from grpo_jax.checkpoints.huggingface.config import ARCHITECTURES, refuse_value
from grpo_jax.checkpoints.huggingface.safetensors_files import StoredTensor
from grpo_jax.errors import GrpoError

# llama.cpp's names -> Hugging Face's; those of a layer follow "blk.{i}."
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


def undo_rotary_permutation(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's row order in q and k, where rotary pairs are adjacent.

    Args:
      matrix: [heads · head width, …], a weight or a bias.
      heads: number of heads of the matrix.

    >>> undo_rotary_permutation(np.array([0, 2, 1, 3]), heads=1).tolist()
    [0, 1, 2, 3]
    """
    pairs = matrix.reshape(heads, matrix.shape[0] // heads // 2, 2, *matrix.shape[1:])
    return pairs.swapaxes(1, 2).reshape(matrix.shape)


class GgufModel:
    """A GGUF file, whose methods return the parts of a Hugging Face folder.

    Raises:
      GrpoError: the file cannot be read, or holds something that is not supported. All
        methods raise it too.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._values, self._stored = read_gguf(file)
        self._arch = "general"
        self._arch = self._get("ARCH.architecture", str)
        if self._arch not in ("llama", "qwen2", "qwen3"):
            self._refuse("general.architecture", self._arch, "llama, qwen2, qwen3 are")
        kind = self._get("tokenizer.ggml.model", str)
        if kind != "gpt2":
            self._refuse("tokenizer.ggml.model", kind, "gpt2 (byte-level BPE) is")
        self._tokens = self._list("tokenizer.ggml.tokens", str)

    def _get(self, key: str, kind: type, *default: Any) -> Any:
        key = key.replace("ARCH", self._arch, 1)
        if key not in self._values:
            if not default:
                raise GrpoError(f"{self.file}: the key {key} is missing")
            return default[0]
        value = self._values[key]
        if type(value) is not kind:
            needed = f"{kind.__name__} is, not {type(value).__name__}"
            self._refuse(key, value, needed)
        # The shortest text of the float32: 1e-05 and not 9.999999747378752e-06.
        return float(str(np.float32(value))) if kind is float else value

    def _list(self, key: str, kind: type, *default: Any) -> list[Any]:
        values = self._get(key, list, *default)
        if any(type(value) is not kind for value in values):
            self._refuse(key, values, f"a list of {kind.__name__} is")
        return values

    def _token_id(self, key: str, *default: Any) -> Any:
        """Returns a special token's id, after checking that the token exists."""
        key = f"tokenizer.ggml.{key}_token_id"
        found, count = self._get(key, int, *default), len(self._tokens)
        if found is not None and not 0 <= found < count:
            self._refuse(key, found, f"an id below {count} is")
        return found

    def _refuse(self, key: str, value: Any, instead: str) -> NoReturn:
        refuse_value(self.file, key, value, instead)

    def config(self) -> dict[str, Any]:
        """Returns the dictionary of config.json."""
        names = self._stored
        if "rope_freqs.weight" in names:
            self._refuse("rope_freqs", "…", "convert from the model's safetensors")
        scaling = self._get("ARCH.rope.scaling.type", str, "none")
        if scaling not in ("none", "linear"):
            self._refuse("rope.scaling.type", scaling, "none and linear are")
        rope = None
        if scaling == "linear":
            factor = self._get("ARCH.rope.scaling.factor", float)
            rope = {"type": scaling, "factor": factor}
        heads = self._get("ARCH.attention.head_count", int)
        width = self._get("ARCH.embedding_length", int)
        kv_heads = self._get("ARCH.attention.head_count_kv", int, heads)
        head_dim = width // heads if heads > 0 else None
        return {
            "architectures": [ARCHITECTURES[self._arch]],
            "model_type": self._arch,
            "vocab_size": len(self._tokens),
            "hidden_size": width,
            "intermediate_size": self._get("ARCH.feed_forward_length", int),
            "num_hidden_layers": self._get("ARCH.block_count", int),
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": self._get("ARCH.attention.key_length", int, head_dim),
            "hidden_act": "silu",
            "max_position_embeddings": self._get("ARCH.context_length", int),
            "rms_norm_eps": self._get("ARCH.attention.layer_norm_rms_epsilon", float),
            "rope_theta": self._get("ARCH.rope.freq_base", float, 10000.0),
            "rope_scaling": rope,
            "attention_bias": self._arch == "llama" and "blk.0.attn_q.bias" in names,
            "tie_word_embeddings": "output.weight" not in names,
            "torch_dtype": "float32",
            **self._token_ids(),
        }

    def generation_config(self) -> dict[str, Any]:
        """Returns the dictionary of generation_config.json."""
        return {"_from_model_config": True, **self._token_ids()}

    def _token_ids(self) -> dict[str, Any]:
        eos = self._token_id("eos")
        ends = sorted({eos, self._token_id("eot", eos)})
        return {
            "bos_token_id": self._token_id("bos", None),
            "eos_token_id": ends if len(ends) > 1 else eos,
            "pad_token_id": self._token_id("padding", None),
        }

    def tensors(self) -> Iterator[tuple[str, StoredTensor]]:
        """Yields the weights under Hugging Face's names, dequantised when read."""
        heads = {"attn_q": self._get("ARCH.attention.head_count", int)}
        heads["attn_k"] = self._get(
            "ARCH.attention.head_count_kv", int, heads["attn_q"]
        )
        for its_name, stored in self._stored.items():
            stem, _, kind = its_name.rpartition(".")
            name = _TOP.get(stem)
            if layer := re.fullmatch(r"blk\.([0-9]+)\.([a-z_]+)", stem):
                stem = layer[2]
                if stem in _LAYER:
                    name = f"model.layers.{layer[1]}.{_LAYER[stem]}"
            if name is None or kind not in ("weight", "bias"):
                self._refuse("tensor", its_name, "only dense decoders are")
            if self._arch == "llama" and stem in heads:

                def read(index: Any, whole=stored.read, heads=heads[stem]):
                    return undo_rotary_permutation(whole(...), heads)[index]

                stored = dataclasses.replace(stored, read=read)
            yield f"{name}.{kind}", stored

    def tokenizer(self) -> Tokenizer:
        """Returns the tokenizer: the file's pre-tokenizer, then byte-level BPE."""
        pre = self._get("tokenizer.ggml.pre", str, "default")
        tokens = self._tokens
        types = self._list("tokenizer.ggml.token_type", int, [1] * len(tokens))
        if len(types) != len(tokens):
            needed = f"{len(tokens)} are, one for each token"
            self._refuse("tokenizer.ggml.token_type", f"{len(types)} types", needed)
        kinds = list(zip(tokens, types, strict=True))
        used = [(token, i) for i, (token, kind) in enumerate(kinds) if kind != _UNUSED]
        vocab = dict(used)
        if len(vocab) < len(used):
            twice = next(token for token, i in used if vocab[token] != i)
            self._refuse("tokenizer.ggml.tokens", twice, "each token once is")
        merges = []
        for merge in self._list("tokenizer.ggml.merges", str):
            left, space, right = merge.partition(" ")
            if not space or not {left, right, left + right} <= vocab.keys():
                self._refuse("tokenizer.ggml.merges", merge, "two tokens of one are")
            merges.append((left, right))
        llama3 = pre == "llama-bpe"
        tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=llama3))
        if pre == "qwen2":
            tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = self._pre_tokenizer(pre)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_tokens(
            [
                AddedToken(token, normalized=False, special=kind == _CONTROL)
                for token, kind in kinds
                if kind in (_CONTROL, _USER_DEFINED)
            ]
        )
        if self._get("tokenizer.ggml.add_bos_token", bool, llama3):
            bos = self._token_id("bos")
            tokenizer.post_processor = processors.TemplateProcessing(
                single=[tokens[bos], "$A"],
                pair=[tokens[bos], "$A", "$B"],
                special_tokens=[(tokens[bos], bos)],
            )
        return tokenizer

    def _pre_tokenizer(self, name: str) -> Any:
        """Returns the pre-tokenizer of this name, which splits text before BPE."""
        words = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|NUMBER"
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        numbers = {"llama-bpe": r"\p{N}{1,3}", "qwen2": r"\p{N}"}
        first = []
        if name == "smollm":
            first = [pre_tokenizers.Digits(individual_digits=True)]
        elif name in numbers:
            pattern = Regex(words.replace("NUMBER", numbers[name]))
            first = [pre_tokenizers.Split(pattern, "isolated")]
        elif name != "gpt-2":
            known = "smollm, gpt-2, llama-bpe and qwen2 are"
            self._refuse("tokenizer.ggml.pre", name, known)
        last = pre_tokenizers.ByteLevel(
            add_prefix_space=False, use_regex=name not in numbers
        )
        return pre_tokenizers.Sequence([*first, last])

    def tokenizer_config(self) -> dict[str, Any]:
        """Returns tokenizer_config.json, with special tokens and the chat template."""
        tokens = self._tokens
        ids = {
            "bos_token": self._token_id("bos", None),
            "eos_token": self._token_id("eos"),
            "unk_token": self._token_id("unknown", None),
            "pad_token": self._token_id("padding", None),
        }
        template = self._get("tokenizer.chat_template", str, None)
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self._get("ARCH.context_length", int),
            "clean_up_tokenization_spaces": False,
            **{name: tokens[i] for name, i in ids.items() if i is not None},
            **({"chat_template": template} if template else {}),
        }
