"""Chat templates in the essential forms that models use, each with its special tokens.

They are written for these tests; what matters is where each differs: what it trims,
where it puts a space, what it does with thoughts, which token ends a turn.
"""

from __future__ import annotations

import dataclasses

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from grpo_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Form:
    template: str
    bos: str | None
    eos: str  # the tokenizer's own
    end: str  # what ends an assistant's turn
    others: tuple[str, ...] = ()
    words: tuple[str, ...] = ()  # added to the vocabulary, but not special
    system: bool = True


CHATML = """{% for m in messages %}
<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""

LLAMA3 = """{% for m in messages %}
{{- bos_token if loop.first else '' }}
{{- '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\n\n' }}
{{- m.content | trim ~ '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""

GEMMA = """{{- bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}
{%- for m in messages %}
    {%- set role = 'model' if m.role == 'assistant' else m.role %}
    {{- '<start_of_turn>' ~ role ~ '\n' ~ m.content | trim ~ '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

# Thoughts stand in every last answer, empty ones where it has none.
QWEN3 = r"""{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- set text, thoughts = m.content, '' %}
        {%- if '</think>' in text %}
            {%- set parts = text.split('</think>') %}
            {%- set thoughts = parts[0].split('<think>')[-1].strip('\n') %}
            {%- set text = parts[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.last or thoughts %}
            {{- '<think>\n' ~ thoughts ~ '\n</think>\n\n' }}
        {%- endif %}
        {{- text ~ '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

# A space before the answer, none in the prompt; no special tokens but BOS and EOS.
DEEPSEEK = r"""{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == 'user' %}{{ 'User: ' ~ m.content ~ '\n\n' }}
    {%- elif m.role == 'assistant' %}{{ 'Assistant: ' ~ m.content ~ eos_token }}
    {%- else %}{{ m.content ~ '\n\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""

# Opens the thoughts for the model, and drops them from finished turns.
DEEPSEEK_R1 = r"""{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == 'system' %}{{ m.content }}
    {%- elif m.role == 'user' %}{{ '<｜User｜>' ~ m.content }}
    {%- else %}{{ '<｜Assistant｜>' ~ m.content.split('</think>')[-1] ~ eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"""

MISTRAL = r"""{{- bos_token }}
{%- if messages[0].role == 'system' %}
    {%- set before, rest = messages[0].content ~ '\n\n', messages[1:] %}
{%- else %}{% set before, rest = '', messages %}{% endif %}
{%- for m in rest %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('user and assistant must take turns') }}
    {%- elif m.role == 'user' %}
        {%- set first = loop.last or loop.index0 == rest | length - 2 %}
        {{- '[INST] ' ~ (before if first else '') ~ m.content ~ ' [/INST]' }}
    {%- else %}{{ ' ' ~ m.content | trim ~ eos_token }}{% endif %}
{%- endfor %}"""

# Says itself what is learned.
GENERATION = r"""{%- for m in messages %}
    {{- '<|im_start|>' ~ m.role ~ '\n' }}
    {%- if m.role == 'assistant' %}
        {{- '<think>\n\n</think>\n' }}
        {%- generation %}{{ m.content }}{% endgeneration %}
    {%- else %}{{ m.content }}{% endif %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

_CHATML = Form(CHATML, None, "<|im_end|>", "<|im_end|>", ("<|im_start|>",))
_THINKS = dataclasses.replace(_CHATML, words=("<think>", "</think>"))
FORMS = {
    "chatml": _CHATML,
    "llama3": Form(
        LLAMA3,
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        end="<|eot_id|>",
        others=("<|start_header_id|>", "<|end_header_id|>"),
    ),
    "gemma": Form(
        GEMMA,
        bos="<bos>",
        eos="<eos>",
        end="<end_of_turn>",
        others=("<start_of_turn>",),
        system=False,
    ),
    "qwen3": dataclasses.replace(_THINKS, template=QWEN3),
    "deepseek": Form(
        DEEPSEEK,
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
        end="<｜end▁of▁sentence｜>",
    ),
    "deepseek_r1": Form(
        DEEPSEEK_R1,
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
        end="<｜end▁of▁sentence｜>",
        others=("<｜User｜>", "<｜Assistant｜>"),
        words=("<think>", "</think>"),
    ),
    "mistral": Form(MISTRAL, bos="<s>", eos="</s>", end="</s>"),
    "generation": dataclasses.replace(_THINKS, template=GENERATION),
}


def byte_level(form: Form) -> tokenizers.Tokenizer:
    """A byte-level BPE with a few merges, lines split as today's models do, and the
    form's tokens."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("i", "n"), ("t", "h"), ("Ġ", "th"), ("Ċ", "Ċ"), (".", "Ċ"), ("Ġ", "Ġ")]
    tokens = dict.fromkeys([*symbols, *(a + b for a, b in merges)])
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    lines = tokenizers.Regex(r"\s*[\r\n]+|\s+(?!\S)| ?[^\s]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(lines, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    names = dict.fromkeys([form.bos or form.eos, form.eos, form.end, *form.others])
    tokenizer.add_special_tokens(list(names))
    tokenizer.add_tokens([AddedToken(w, normalized=False) for w in form.words])
    return tokenizer


def settings(form: Form) -> dict[str, str]:
    """tokenizer_config.json's special tokens."""
    bos = {"bos_token": form.bos} if form.bos else {}
    return {**bos, "eos_token": form.eos}


def make(form: Form) -> Tokenizer:
    inner = byte_level(form)
    eos_ids = [i for i in [inner.token_to_id(form.eos)] if i is not None]
    special, template = settings(form), form.template
    return Tokenizer(inner, special=special, eos_ids=eos_ids, chat_template=template)


def token(tokenizer: Tokenizer, text: str) -> int:
    found = tokenizer.token_id(text)
    assert found is not None
    return found


TOKENIZERS = {name: make(form) for name, form in FORMS.items()}
# system, question, solution
CHATS = {
    "plain": ("", "What is 1+1?", "It is \\boxed{2}."),
    "thoughts": ("", "What is 1+1?", "<think>\nOne and one.\n</think>\n\nIt is 2."),
    "spaces": ("Be brief. ", " 1+1? \n", "  \nIt is 2. \n\n"),
}
