"""The tokenizer: ids, special tokens, EOS ids, folders."""

import concurrent.futures
import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_folders import byte_level, write_folder
from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    processors,
)

from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.errors import GrpoError

ALPHABET = "0123456789+-=?. \n()abcdé答案"
CHATML = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def sentence_piece() -> tokenizers.Tokenizer:
    """As Llama 2 and Mistral: a space is put before every text, BOS first."""
    tokens = ["<unk>", "<s>", "</s>", "▁", "▁a", "\n", *"abcABCUserin:st\\oxd{}.,PlQ?"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


@pytest.fixture
def chatml(tmp_path):
    config = {
        "bos_token": "<|im_start|>",
        "eos_token": {"__type": "AddedToken", "content": "<|im_end|>"},
        "pad_token": "<|endoftext|>",
        "chat_template": CHATML,
    }
    return write_folder(tmp_path / "chatml", byte_level(), config)


def test_alphabet_gives_each_character_its_place():
    tokenizer = Tokenizer.from_alphabet("ab1a")
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_ids) == (0, 1, (2,))
    assert tokenizer.encode("1ba") == [5, 4, 3]
    assert tokenizer.vocab_size == 6
    assert not tokenizer.adds_bos


@given(st.text(ALPHABET, max_size=40))
def test_decode_undoes_encode(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


TOKENIZER = Tokenizer.from_alphabet(ALPHABET)


def test_decode_keeps_or_leaves_out_special_tokens():
    ids = [1, *TOKENIZER.encode("1+1"), TOKENIZER.eos_id]
    assert TOKENIZER.decode(ids) == "1+1"
    assert TOKENIZER.decode(ids, skip_special=False) == "<bos>1+1<eos>"


@pytest.mark.parametrize("make", [byte_level, sentence_piece])
@given(st.data())
def test_pieces_joined_are_the_text(make, data):
    """Of any ids: characters of several tokens, halves of them, words with a space."""
    inner = make()
    tokenizer = Tokenizer(inner, special={}, eos_ids=[2])
    chosen = st.lists(st.integers(0, inner.get_vocab_size() - 1), max_size=12)
    ids = data.draw(st.text(max_size=6).map(tokenizer.encode) | chosen)
    pieces = tokenizer.text_pieces(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special=False)


def test_a_character_of_several_tokens_stands_with_the_last():
    tokenizer = Tokenizer(byte_level(), special={}, eos_ids=[0])
    assert tokenizer.text_pieces(tokenizer.encode("th答 th")) == [
        "th",
        "",
        "",
        "答",
        " th",
    ]


def test_unknown_character_is_named():
    with pytest.raises(GrpoError, match="'z'"):
        TOKENIZER.encode("1+z")
    with pytest.raises(GrpoError, match="'ab' is not one character"):
        Tokenizer.from_alphabet(["a", "ab"])


def test_special_tokens_in_a_text_are_only_parsed_when_asked(chatml):
    tokenizer = Tokenizer.from_folder(chatml)
    text = "in<|im_end|>\n"
    parsed = tokenizer.encode(text, parse_special=True)
    assert parsed.count(2) == 1 and len(parsed) == 3
    plain = tokenizer.encode(text)
    assert 2 not in plain and 1 not in plain
    assert tokenizer.decode(plain) == text  # nothing is lost


@given(st.lists(st.sampled_from(["th", " th", "\n", "<|im_end|>", "x<|im_", "end|>"])))
def test_no_unparsed_text_makes_a_special_token(chunks):
    tokenizer = BYTES
    text = "".join(chunks)
    parts = [("<|im_start|>a\n", True), (text, False), ("<|im_end|>", True)]
    ids, offsets = tokenizer.encode_parts(parts)
    whole = "".join(part for part, _ in parts)
    assert [i for i in ids if i < 3] == [1, 2]
    assert tokenizer.decode(ids, skip_special=False) == whole
    # offsets are those of each token in the whole text
    assert offsets[0] == (0, 12) and offsets[-1] == (len(whole) - 10, len(whole))
    assert all(
        whole[a:b] == tokenizer.decode([i], skip_special=False)
        for i, (a, b) in zip(ids, offsets, strict=True)
    )


BYTES = Tokenizer(byte_level(), special={}, eos_ids=[2])


def test_parts_without_special_text_are_encoded_as_one_text():
    """ "\n\n" is one token also when a part ends between the two."""
    parts = [("<|im_start|>\n", True), ("\nin", False)]
    assert BYTES.encode_parts(parts)[0] == BYTES.encode(
        "<|im_start|>\n\nin", parse_special=True
    )


def test_eos_ids_from_the_files_of_a_folder(tmp_path):
    base = {"eos_token": "<|im_end|>"}
    folder = write_folder(
        tmp_path / "a", byte_level(), base, generation_config={"eos_token_id": [0, 2]}
    )
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.eos_ids == (2, 0) and tokenizer.eos_id == 2
    assert tokenizer.pad_id == 2 and tokenizer.bos_id is None
    folder = write_folder(tmp_path / "b", byte_level(), {}, config={"eos_token_id": 0})
    assert Tokenizer.from_folder(folder).eos_ids == (0,)
    folder = write_folder(
        tmp_path / "c", byte_level(), {}, special_tokens_map={"eos_token": "<|im_end|>"}
    )
    assert Tokenizer.from_folder(folder).eos_ids == (2,)


def test_an_end_that_no_file_calls_special_is_not_in_the_text(tmp_path):
    """<|EOT|> is listed as a word; an answer ends with it, a question cannot."""
    inner = byte_level()
    inner.add_tokens([AddedToken("<|EOT|>", rstrip=True, special=False)])
    (end,) = inner.encode("<|EOT|>").ids
    named, by_id = {"eos_token": "<|EOT|>"}, {"eos_token_id": end}
    folders = [
        write_folder(tmp_path / "named", inner, named),
        write_folder(tmp_path / "by_id", inner, {}, generation_config=by_id),
    ]
    for folder in folders:
        tokenizer = Tokenizer.from_folder(folder)
        answer = tokenizer.encode("#### 5")
        assert tokenizer.eos_ids == (end,)
        assert tokenizer.decode([*answer, end]) == "#### 5"
        assert tokenizer.decode([*answer, end], skip_special=False) == "#### 5<|EOT|>"
        assert end not in tokenizer.encode("1+1?<|EOT|>")
        # In a template's text it is the token, with the spaces that are its own.
        assert tokenizer.encode("<|EOT|>  5", parse_special=True) == [end, answer[-1]]
        tokenizer.save(tmp_path / "saved")
        again = Tokenizer.from_folder(tmp_path / "saved")
        assert again.decode([*answer, end]) == "#### 5"


def test_an_end_that_is_an_ordinary_token_is_not_in_the_text():
    tokenizer = Tokenizer(byte_level(), special={}, eos_ids=[BYTES.encode("\n")[0]])
    assert tokenizer.decode(tokenizer.encode("5\n")) == "5"
    assert tokenizer.encode("5\n5") == BYTES.encode("5\n5")


def test_a_named_token_that_was_never_added_is_special(tmp_path):
    """As transformers has it: "</s>" stands in the vocabulary alone."""
    inner = byte_level()
    vocabulary = json.loads(inner.to_str())
    vocabulary["model"]["vocab"]["</s>"] = end = inner.get_vocab_size()
    inner = tokenizers.Tokenizer.from_str(json.dumps(vocabulary))
    folder = write_folder(tmp_path / "a", inner, {"eos_token": "</s>"})
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode("5</s>", parse_special=True)[-1] == end
    assert end not in tokenizer.encode("5</s>")
    assert tokenizer.decode([*tokenizer.encode("5"), end]) == "5"


def test_folder_without_eos_is_refused(tmp_path):
    with pytest.raises(GrpoError, match="no EOS token.*add eos_token"):
        Tokenizer.from_folder(write_folder(tmp_path / "a", byte_level(), {}))
    config = {"eos_token": "<|eot|>"}
    with pytest.raises(GrpoError, match=r"eos_token '<\|eot\|>' is not in"):
        Tokenizer.from_folder(write_folder(tmp_path / "a", byte_level(), config))


def test_damaged_folders_are_refused_with_the_file(tmp_path):
    with pytest.raises(GrpoError, match="tokenizer.json: no such file"):
        Tokenizer.from_folder(tmp_path)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n"
    (tmp_path / "tokenizer.json").write_text(pointer)
    with pytest.raises(GrpoError, match="tokenizer.json: a git-LFS pointer"):
        Tokenizer.from_folder(tmp_path)
    folder = write_folder(tmp_path / "a", byte_level(), {"eos_token": "<|im_end|>"})
    (folder / "config.json").write_text("{")
    with pytest.raises(GrpoError, match="config.json: not valid JSON"):
        Tokenizer.from_folder(folder)


def test_vocabulary_must_fit_the_embedding():
    TOKENIZER.check_fits(TOKENIZER.vocab_size)
    with pytest.raises(GrpoError, match=f"embedding has {TOKENIZER.vocab_size - 1}"):
        TOKENIZER.check_fits(TOKENIZER.vocab_size - 1)


def test_truncation_in_the_file_is_switched_off(tmp_path):
    tokenizer = byte_level()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9)
    folder = write_folder(tmp_path / "a", tokenizer, {"eos_token": "<|im_end|>"})
    assert len(Tokenizer.from_folder(folder).encode("abcdefg")) == 7


def test_bos_follows_the_config_and_else_the_file(tmp_path):
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    folder = write_folder(tmp_path / "a", sentence_piece(), config)
    assert Tokenizer.from_folder(folder).adds_bos
    assert Tokenizer.from_folder(folder).encode("a") == [4]  # only when it is asked for
    folder = write_folder(
        tmp_path / "b", sentence_piece(), config | {"add_bos_token": False}
    )
    assert not Tokenizer.from_folder(folder).adds_bos


def test_chat_template_file_goes_before_the_config(chatml):
    assert Tokenizer.from_folder(chatml).chat_template == CHATML
    (chatml / "chat_template.jinja").write_text("other")
    assert Tokenizer.from_folder(chatml).chat_template == "other"
    (chatml / "chat_template.jinja").unlink()
    named = [
        {"name": "tool_use", "template": "t"},
        {"name": "default", "template": "d"},
    ]
    config = {"eos_token": "<|im_end|>", "chat_template": named}
    (chatml / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.from_folder(chatml).chat_template == "d"


def test_saved_folder_of_a_folder_is_the_same_bytes(chatml, tmp_path):
    (chatml / "generation_config.json").write_text('{ "eos_token_id":[2, 0] }')
    (chatml / "config.json").write_text('{"model_type": "llama"}')
    Tokenizer.from_folder(chatml).save(tmp_path / "out")
    copied = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert copied == {
        path.name: path.read_bytes()
        for path in chatml.iterdir()
        if path.name != "config.json"  # the model's: its exporter writes it
    }
    Tokenizer.from_folder(chatml).save(chatml)  # onto itself: nothing is lost
    assert Tokenizer.from_folder(chatml).eos_ids == (2, 0)


def test_saved_alphabet_opens_with_the_same_ids(tmp_path):
    tokenizer = Tokenizer.from_alphabet(ALPHABET, chat_template=CHATML)
    tokenizer.save(tmp_path)
    again = Tokenizer.from_folder(tmp_path)
    for text in ("1+1=?\n答案", "<eos> a é"[6:], " (2) "):
        assert again.encode(text) == tokenizer.encode(text)
    assert again.encode("<bos>1<eos>", parse_special=True) == [1, 4, 2]
    for name in ("eos_ids", "pad_id", "bos_id", "adds_bos", "vocab_size"):
        assert getattr(again, name) == getattr(tokenizer, name)
    assert again.chat_template == CHATML


def test_threads_encode_as_one_does(chatml):
    tokenizer = Tokenizer.from_folder(chatml)
    texts = [f"in the <|im_end|> {i}\n\nclass" for i in range(200)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        together = list(pool.map(tokenizer.encode, texts))
    assert together == [tokenizer.encode(text) for text in texts]
    assert [tokenizer.decode(ids) for ids in together] == texts


def test_transformers_opens_the_saved_alphabet(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer.from_alphabet(ALPHABET)
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "12 + 3 = ?\n答案 é"
    assert theirs(text)["input_ids"] == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text)) == text
    assert (theirs.pad_token_id, theirs.eos_token_id) == (0, 2)
