"""Small tokenizers, and folders that hold them, made on the spot."""

import json

import tokenizers
from tokenizers import decoders, models, pre_tokenizers


def byte_level() -> tokenizers.Tokenizer:
    """A byte-level BPE with a few merges and ChatML's special tokens."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("i", "n"), ("a", "s"), ("as", "s"), ("t", "h"), ("Ġ", "th"), ("Ċ", "Ċ")]
    tokens = dict.fromkeys([*special, *symbols, *(a + b for a, b in merges)])
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return tokenizer


def write_folder(folder, tokenizer, settings, **others):
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in {"tokenizer_config": settings, **others}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder
