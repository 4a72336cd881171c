"""The tokenizer: text to token ids and back.

A `Tokenizer` comes from a Hugging Face folder with `tokenizer.json`, or from an
alphabet of characters. It also holds the ids that end a completion and the model's
chat template. It can save a folder that transformers opens with the same ids.

Special tokens (`<|im_end|>` …) are recognised only where a template wrote them. A
question therefore cannot end its own turn or open another one.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from grpo_jax.data.special_tokens import (
    end_of_turn_ids,
    flag_special,
    special_token_pattern,
)
from grpo_jax.data.tokenizer_files import (
    open_tokenizer,
    read_chat_template,
    read_optional_json,
    read_token_ids,
    special_token_texts,
)
from grpo_jax.errors import GrpoError, one_line
from grpo_jax.files import read_small_file

FILES = (  # the tokenizer's files in a Hugging Face folder
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "generation_config.json",  # lists all ids that end a completion
)
PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"  # of `Tokenizer.from_alphabet`


class Tokenizer:
    """Wraps a tokenizer of the `tokenizers` package and the ids that a sampler needs.

    Create one with `from_folder` or `from_alphabet`. Encoding is thread-safe.

    Attributes:
      eos_ids: all ids that end a completion.
      bos_id: the id of the BOS token, or None.
      pad_id: the id of the padding token; the EOS if there is none.
      adds_bos: whether a text that is not a chat starts with the BOS.
      vocab_size: the highest id plus 1.
      special_tokens: eos_token, bos_token … as text.
      special_pattern: matches the text of every special token.
      chat_template: the jinja2 source, or None.

    >>> tokenizer = Tokenizer.from_alphabet("0123456789+= ?")
    >>> tokenizer.encode("1+2")
    [4, 13, 5]
    >>> tokenizer.decode([4, 13, 5, tokenizer.eos_id])
    '1+2'
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        special: dict[str, str],
        eos_ids: Sequence[int],
        adds_bos: bool | None = None,
        chat_template: str | None = None,
        files: dict[str, bytes] | None = None,
    ):
        """Wraps a tokenizer; `from_folder` and `from_alphabet` fill in the arguments.

        Args:
          tokenizer: the tokenizer; its special tokens are flagged in place.
          special: eos_token, bos_token … as text.
          eos_ids: the ids that end a completion, the EOS of training first.
          adds_bos: whether a text starts with the BOS; by default as `tokenizer` does.
          chat_template: the jinja2 source.
          files: the original files by name, which `save` writes.
        """
        tokenizer.no_truncation()  # some files set it, and it loses text silently
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._files = files or {}
        self.special_tokens = special
        self.chat_template = chat_template
        # The time that chat templates see; the same for all prompts of a run.
        self.now = datetime.datetime.now()
        flag_special(tokenizer, special.values())
        flag_special(tokenizer, map(tokenizer.id_to_token, eos_ids), added_only=True)
        ends = [*eos_ids, *end_of_turn_ids(tokenizer, chat_template, special, self.now)]
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys(ends))
        self.bos_id: int | None = self.token_id(special.get("bos_token"))
        pad_id = self.token_id(special.get("pad_token"))
        self.pad_id: int = self.eos_id if pad_id is None else pad_id
        self.special_pattern = special_token_pattern(tokenizer)
        first = tokenizer.encode("").ids[:1]  # the special tokens that the file adds
        by_file = self.bos_id is not None and first == [self.bos_id]
        self.adds_bos: bool = by_file if adds_bos is None else adds_bos
        known = tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(known.values(), default=-1) + 1

    # -- making one ----------------------------------------------------------------

    @classmethod
    def from_alphabet(
        cls, characters: Iterable[str], *, chat_template: str | None = None
    ) -> Tokenizer:
        """Returns a tokenizer with one token per character.

        The ids 0, 1 and 2 are <pad>, <bos> and <eos>; the characters follow.

        Raises:
          GrpoError: an item of `characters` is not one character.
        """
        from tokenizers import Regex, decoders, models, pre_tokenizers

        tokens = dict.fromkeys([PAD, BOS, EOS, *characters])
        if long := [t for t in list(tokens)[3:] if len(t) != 1]:
            raise GrpoError(f"alphabet: {long[0]!r} is not one character")
        vocabulary = {token: i for i, token in enumerate(tokens)}
        tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        tokenizer.decoder = decoders.Fuse()
        tokenizer.add_special_tokens([PAD, BOS, EOS])
        return cls(
            tokenizer,
            special={"pad_token": PAD, "bos_token": BOS, "eos_token": EOS},
            eos_ids=[vocabulary[EOS]],
            chat_template=chat_template,
        )

    @classmethod
    def from_folder(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Returns the tokenizer of a Hugging Face folder.

        The ids that end a completion are, in this order: the eos_token, the ids in
        generation_config.json (or else in config.json), and the token that the chat
        template writes after an answer.

        Raises:
          GrpoError: tokenizer.json is missing or damaged, or there is no EOS.
        """
        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise GrpoError(
                f"{file}: no such file; get it from the model's page, or make it with "
                "transformers: AutoTokenizer.from_pretrained(…).save_pretrained(…)"
            )
        config = read_optional_json(folder / "tokenizer_config.json")
        special = special_token_texts(
            read_optional_json(folder / "special_tokens_map.json") | config
        )
        tokenizer = open_tokenizer(file)
        eos_ids: list[int] = []
        if name := special.get("eos_token"):
            if (eos_id := tokenizer.token_to_id(name)) is None:
                shown = one_line(repr(name))
                raise GrpoError(f"{folder}: its eos_token {shown} is not in {file}")
            eos_ids.append(eos_id)
        for source in (folder / "generation_config.json", folder / "config.json"):
            found = read_optional_json(source).get("eos_token_id")
            if found is not None:
                eos_ids += read_token_ids(source, "eos_token_id", found, tokenizer)
                break
        if not eos_ids:
            raise GrpoError(
                f"{folder}: no EOS token in tokenizer_config.json, config.json or "
                "generation_config.json; add eos_token to the first"
            )
        adds_bos = config.get("add_bos_token")
        if adds_bos not in (True, False, None):
            raise GrpoError(
                f"{folder / 'tokenizer_config.json'}: add_bos_token="
                f"{one_line(repr(adds_bos))} is not true or false"
            )
        present = [name for name in FILES if (folder / name).is_file()]
        return cls(
            tokenizer,
            special=special,
            eos_ids=eos_ids,
            adds_bos=adds_bos,
            chat_template=read_chat_template(folder, config),
            files={name: read_small_file(folder / name) for name in present},
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a folder that transformers and `from_folder` open with the same ids.

        A tokenizer from a folder is written with its original files, byte for byte.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in (self._files or self._generated_files()).items():
            (folder / name).write_bytes(content)

    def _generated_files(self) -> dict[str, bytes]:
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "add_bos_token": self.adds_bos,
            **self.special_tokens,
        }
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        return {
            "tokenizer.json": self._tokenizer.to_str(pretty=True).encode(),
            "tokenizer_config.json": json.dumps(config, indent=2).encode(),
            "special_tokens_map.json": json.dumps(self.special_tokens).encode(),
        }

    @functools.cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """A copy that encodes the text "<eos>" as five ordinary characters."""
        plain = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        plain.encode_special_tokens = True
        return plain

    # -- ids -----------------------------------------------------------------------

    @property
    def eos_id(self) -> int:
        """The id that ends an answer in training; all `eos_ids` end a completion."""
        return self.eos_ids[0]

    def token_id(self, token: str | None) -> int | None:
        """Returns the id of a token's text, or None if there is no such token."""
        return None if token is None else self._tokenizer.token_to_id(token)

    def check_fits(self, vocab_rows: int) -> None:
        """Checks that a model's embedding has a row for every id.

        Raises:
          GrpoError: `vocab_rows` is smaller than `vocab_size`.
        """
        if self.vocab_size > vocab_rows:
            raise GrpoError(
                f"tokenizer: its highest id is {self.vocab_size - 1}, and the model's "
                f"embedding has {vocab_rows} rows; take the tokenizer of this model"
            )

    # -- text to ids and back ------------------------------------------------------

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Returns the ids of a text.

        Args:
          text: the text.
          parse_special: parse special tokens in the text, as in a template's text.
            Otherwise they are ordinary characters.

        Raises:
          GrpoError: the text cannot be encoded.
        """
        return self.encode_parts([(text, parse_special)])[0]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Returns the text of token ids.

        Args:
          ids: the token ids.
          skip_special: leave out special tokens, and any of `eos_ids` at the end, even
            one that is not flagged as special.
        """
        ids = list(ids)
        while skip_special and ids and ids[-1] in self.eos_ids:
            ids.pop()
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special)

    def text_pieces(self, ids: Sequence[int]) -> list[str]:
        """Returns what each id adds to the text, special tokens included.

        The pieces joined are the text. A character of several ids belongs to the last
        of them; the others get "".

        >>> tokenizer = Tokenizer.from_alphabet("12+")
        >>> tokenizer.text_pieces([3, 5, 4, tokenizer.eos_id])
        ['1', '+', '2', '<eos>']
        """
        found, before, start, shown = [], 0, 0, ""
        for end in range(1, len(ids) + 1):
            # Decode after the previous piece, so that a word keeps its leading space.
            text = self.decode(ids[before:end], skip_special=False)
            cut = text.endswith("\ufffd") and end < len(ids)
            found.append("" if cut else text[len(shown) :])
            if not cut:
                before, start = start, end
                shown = self.decode(ids[before:end], skip_special=False)
        return found

    def token_texts(self) -> list[str]:
        """Returns what each id adds in the middle of a text; "" for special tokens.

        The list has `vocab_size` entries.

        >>> Tokenizer.from_alphabet("1+").token_texts()
        ['', '', '', '1', '+']
        """
        # Decode after another token, as some decoders drop a text's leading space.
        alone = ((i, self.decode([i])) for i in range(self.vocab_size))
        before, first = next(x for x in alone if x[1] and "\ufffd" not in x[1])
        rows = [[before, i] for i in range(self.vocab_size)]
        found = self._tokenizer.decode_batch(rows, skip_special_tokens=True)
        return [text[len(first) :] for text in found]

    def encode_parts(
        self, parts: Sequence[tuple[str, bool]]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Returns the ids of parts joined to one text, and each id's (start, end).

        If no unparsed part contains a special token's text, these are exactly the ids
        of the whole text.

        Args:
          parts: pairs of a text and whether special tokens are parsed in it.

        Raises:
          GrpoError: the text cannot be encoded.

        >>> tokenizer = Tokenizer.from_alphabet("<eos> 1")
        >>> tokenizer.encode_parts([("1", False), ("<eos>", True)])[0]
        [9, 2]
        >>> tokenizer.encode_parts([("1", False), ("<eos>", False)])[0]
        [9, 3, 4, 5, 6, 7]
        """
        text = "".join(part for part, _ in parts)
        spans: list[tuple[int, int]] = []  # of the special tokens to parse
        start = 0
        for part, parse in parts:
            if parse:
                for found in self.special_pattern.finditer(part):
                    spans.append((start + found.start(), start + found.end()))
            start += len(part)
        if spans == [found.span() for found in self.special_pattern.finditer(text)]:
            return self._run(self._tokenizer, text)
        # An unparsed part contains a special token's text, or two parts form one where
        # they meet. Split at the parsed special tokens, and encode the rest as plain.
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        position = 0
        for begin, end in [*spans, (len(text), len(text))]:
            plain, plain_offsets = self._run(self._plain, text[position:begin])
            ids += plain
            offsets += [(a + position, b + position) for a, b in plain_offsets]
            if (special := self.token_id(text[begin:end])) is not None:
                ids.append(special)
                offsets.append((begin, end))
            position = end
        return ids, offsets

    def _run(
        self, tokenizer: tokenizers.Tokenizer, text: str
    ) -> tuple[list[int], list[tuple[int, int]]]:
        try:
            encoding = tokenizer.encode(text, add_special_tokens=False)
        except Exception as error:
            known = self._tokenizer.get_vocab(with_added_tokens=True)
            unknown = next((c for c in text if c not in known), "")
            raise GrpoError(
                f"tokenizer: cannot encode {text[:40]!r}: character {unknown!r} is not "
                f"in it ({error})"
            ) from None
        return encoding.ids, encoding.offsets
