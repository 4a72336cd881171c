"""Chat templates: the forms that models use, and hostile ones."""

import datetime
import json
import os
import re
import signal
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from chat_cases import CHATS, FORMS, QWEN3, TOKENIZERS, Form, make, token
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.data import chat_templates
from grpo_jax.data.example import Example
from grpo_jax.data.prompt_parts import render_chats
from grpo_jax.data.prompts import encode_prompt, encode_prompts, encode_sft
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.errors import GrpoError

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "chats.json").read_text())
NOW = datetime.datetime(2026, 1, 31, 12)
HELLO = [{"role": "user", "content": "hello"}]
NONE = {"instruction": "none"}


def learned(tokenizer: Tokenizer, example: Example) -> str:
    """The text of the tokens that the loss covers."""
    tokens, mask = encode_sft(tokenizer, example, **NONE)
    covered = [t for t, m in zip(tokens, mask, strict=True) if m]
    return tokenizer.decode(covered, skip_special=False)


def said(solution: str) -> Example:
    return Example("What is 1+1?", solution=solution)


# -- the forms that models use -----------------------------------------------------


@pytest.mark.parametrize("case", [name for name in GOLDEN if "/" in name])
def test_ids_are_those_of_transformers(case):
    """Prompts in all forms; answers where the template keeps all of the answer."""
    form, chat = case.split("/")
    tokenizer = TOKENIZERS[form]
    system, question, solution = CHATS[chat]
    example = Example(question, solution=solution, columns={"system": system})
    prompt, whole, *mask = GOLDEN[case]
    if prompt is None:
        with pytest.raises(GrpoError, match="chat template: no system role"):
            encode_prompt(tokenizer, example, **NONE)
        return
    assert encode_prompt(tokenizer, example, **NONE) == prompt
    if form == "deepseek_r1":  # its finished turns have no thoughts
        return
    tokens, learns = encode_sft(tokenizer, example, **NONE)
    end = max(i for i, token in enumerate(whole) if token in tokenizer.eos_ids)
    assert tokens == whole[: end + 1]
    if mask:  # transformers does not learn the end that stands behind the block
        assert learns == [*mask[0][:end], 1]
    else:
        assert learns == [0] * len(prompt) + [1] * (len(tokens) - len(prompt))


@pytest.mark.parametrize(
    ("form", "solution", "expected"),
    [
        ("llama3", " \nIt is 2.\n\n", "It is 2.<|eot_id|>"),
        ("gemma", " \nIt is 2.\n\n", "It is 2.<end_of_turn>"),
        ("mistral", " \nIt is 2.\n\n", " It is 2.</s>"),
        ("chatml", " \nIt is 2.\n\n", " \nIt is 2.\n\n<|im_end|>"),
        ("qwen3", "It is 2.", "<think>\n\n</think>\n\nIt is 2.<|im_end|>"),
        (
            "qwen3",
            "<think>1, 2.</think>It is 2.",
            "<think>\n1, 2.\n</think>\n\nIt is 2.<|im_end|>",
        ),
        # Text before the thoughts, which the template would lose.
        ("qwen3", "So:<think>1</think>2", "So:<think>1</think>2<|im_end|>"),
        # The prompt has opened the thoughts.
        (
            "deepseek_r1",
            "<think>\n1, 2.\n</think>\n\nIt is 2.",
            "1, 2.\n</think>\n\nIt is 2.<｜end▁of▁sentence｜>",
        ),
        ("deepseek_r1", "1\n</think>\n2", "1\n</think>\n2<｜end▁of▁sentence｜>"),
        ("generation", "It is 2.", "It is 2.<|im_end|>"),
    ],
)
def test_what_is_learned_of_an_answer(form, solution, expected):
    tokenizer = TOKENIZERS[form]
    assert learned(tokenizer, said(solution)) == expected
    tokens, _ = encode_sft(tokenizer, said(solution), **NONE)
    opened = encode_prompt(tokenizer, said(solution), **NONE)
    assert tokens[: len(opened)] == opened


def test_thoughts_that_a_template_drops_are_learned():
    """Finished turns without thoughts, behind a prompt that does not open them."""
    form = FORMS["deepseek_r1"]
    tokenizer = make(replace(form, template=form.template.replace("<think>\\n", "")))
    solution = "<think>\n1\n</think>\n\n2"
    assert learned(tokenizer, said(solution)) == solution + form.end
    assert learned(tokenizer, said("2")) == "2" + form.end


def test_thoughts_are_the_models_own_tokens_where_they_are_special():
    form = replace(FORMS["qwen3"], words=(), others=("<|im_start|>", "<think>"))
    tokenizer = make(replace(form, others=(*form.others, "</think>")))
    opening = token(tokenizer, "<think>")
    solution = "<think>\n1\n</think>\n\n2"
    tokens, _ = encode_sft(tokenizer, said(solution), **NONE)
    assert learned(tokenizer, said(solution)) == solution + form.end
    assert tokens.count(opening) == 1
    asked = Example("What is <think>?", solution="2")
    assert opening not in encode_prompt(tokenizer, asked, **NONE)


@pytest.mark.parametrize("form", FORMS)
def test_earlier_turns_are_read_and_the_last_answer_is_learned(form):
    """As transformers renders the whole chat; with the end that closes each turn."""
    name, tokenizer = form, TOKENIZERS[form]
    end = FORMS[name].end
    turns = [
        {"role": "user", "content": f"1+1?{end}"},
        {"role": "assistant", "content": f"<think>\nx\n</think>\n\n2{end}"},
    ]
    example = Example("2+2?", solution="4", columns={"messages": turns})
    one = Example("2+2?", solution="4")
    chat = [*turns, {"role": "user", "content": "2+2?"}]
    tokens, mask = encode_sft(tokenizer, example, **NONE)
    prompt = encode_prompt(tokenizer, example, **NONE)
    assert (
        tokenizer.decode(prompt, skip_special=False)
        == render_chats(tokenizer, [(chat, True)])[0].text
    )
    assert tokens[: len(prompt)] == prompt and not any(mask[: len(prompt)])
    assert learned(tokenizer, example) == learned(tokenizer, one)
    # The ends that the texts write are none.
    honest = encode_prompt(tokenizer, one, **NONE).count(token(tokenizer, end))
    each = 2 if end in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>") else 1
    assert prompt.count(token(tokenizer, end)) == honest + each


def test_earlier_turns_in_deepseekmaths_prompt():
    tokenizer = TOKENIZERS["deepseek"]
    turns = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "2"}]
    example = Example("3?", solution="4", columns={"messages": turns, "system": "S"})
    how = NONE | {"template": "deepseekmath"}
    tokens, mask = encode_sft(tokenizer, example, **how)
    eos = FORMS["deepseek"].eos
    written = f"S\n\nUser: 1?\n\nAssistant: 2{eos}User: 3?\n\nAssistant: 4{eos}"
    assert tokenizer.decode(tokens, skip_special=False) == written
    assert sum(mask) == 3 and tokens.count(tokenizer.eos_id) == 2  # " ", "4", the EOS
    assert tokens[:-3] == encode_prompt(tokenizer, example, **how)
    with pytest.raises(GrpoError, match="several turns.*use chat or deepseekmath"):
        encode_prompt(tokenizer, example, template="plain")


def test_a_tools_output_is_not_learned_in_a_trimmed_answer():
    solution = "\n```python\nprint(2)\n```\n```output\n2\n```\nIt is 2.\n"
    cut_off = "\n```python\nprint(2)\n```\n```output\n2"
    program = "```python\nprint(2)\n```\n```output"
    for name in ("llama3", "gemma"):
        end = FORMS[name].end
        tokenizer = TOKENIZERS[name]
        assert learned(tokenizer, said(solution)) == f"{program}It is 2.{end}"
        assert learned(tokenizer, said(cut_off)) == program + end


def answer_of(form: str, text: str) -> str:
    """What each form writes behind the prompt, by hand."""
    if form in ("llama3", "gemma"):
        return text.strip()
    if form == "mistral":
        return " " + text.strip()
    if form == "deepseek":
        return " " + text
    if form == "deepseek_r1":  # <think> and a line's end are open already
        opened = text.lstrip().startswith("<think>")
        return re.sub(r"^<think>\n?", "", text.lstrip()) if opened else text
    if form == "qwen3":
        first, *others = text.split("</think>")
        thoughts = first.split("<think>")[-1].strip("\n") if others else ""
        rest = others[-1].lstrip("\n") if others else text
        written = f"<think>\n{thoughts}\n</think>\n\n{rest}"
        keeps_all = "".join(text.split()) in "".join(written.split())
        return written if keeps_all else text
    return text


WORDS = ["in", " th", "2.", "\n", "\n\n", " ", "é", "题", "[INST]", "<think>"]
WORDS += ["</think>"]
ENDS = sorted({name for form in FORMS.values() for name in (form.end, *form.others)})
TEXTS = st.lists(st.sampled_from(WORDS + ENDS), min_size=1).map("".join)


@pytest.mark.parametrize("name", FORMS)
@given(system=TEXTS | st.just(""), question=TEXTS, solution=TEXTS)
def test_any_chat_in_any_form(name, system, question, solution):
    """An SFT row is its prompt and then the answer; the loss covers the answer and the
    token that ends the turn, which no text can write."""
    form, tokenizer = FORMS[name], TOKENIZERS[name]
    if not question.strip() or not solution.strip():
        return
    columns = {"system": system} if form.system else {}
    example = Example(question, solution=solution, columns=columns)
    prompt = encode_prompt(tokenizer, example, **NONE)
    tokens, mask = encode_sft(tokenizer, example, **NONE)
    assert tokens[: len(prompt)] == prompt and not any(mask[: len(prompt)])
    answer = tokenizer.decode(tokens[len(prompt) :], skip_special=False)
    end = token(tokenizer, form.end)
    assert tokens.count(end) - prompt.count(end) == 1 and tokens[-1] == end
    if name == "generation":
        thoughts = "<think>\n\n</think>\n"
        assert answer == thoughts + solution + form.end
        assert learned(tokenizer, example).lstrip("\n") == (solution + form.end).lstrip(
            "\n"
        )
    else:
        assert all(mask[len(prompt) :])
        assert answer == answer_of(name, solution) + form.end
    honest = encode_prompt(tokenizer, Example("1", columns=columns and {"system": "1"}))
    for special in (form.end, *form.others):
        i = token(tokenizer, special)
        assert prompt.count(i) == honest.count(i) - (
            0 if system or not form.system else EACH_TURN[name].count(special)
        )


# The special tokens of one turn of a system prompt.
EACH_TURN = {
    "chatml": "<|im_start|><|im_end|>",
    "qwen3": "<|im_start|><|im_end|>",
    "generation": "<|im_start|><|im_end|>",
    "llama3": "<|start_header_id|><|end_header_id|><|eot_id|>",
    "deepseek": "",
    "deepseek_r1": "",
    "mistral": "",
}


# -- the token that ends a turn ----------------------------------------------------


def test_the_token_that_ends_a_turn_is_learned_and_ends_completions(tmp_path):
    """ChatML with a tokenizer whose eos_token is another, as base models have."""
    form = replace(FORMS["chatml"], eos="<|endoftext|>")
    for words in ((), ("<|im_end|>",)):  # special, or a mere word of the vocabulary
        form = replace(form, words=words, end=form.eos if words else form.end)
        tokenizer = make(form)
        turn_end = token(tokenizer, "<|im_end|>")
        assert tokenizer.eos_ids == (token(tokenizer, "<|endoftext|>"), turn_end)
        tokens, mask = encode_sft(tokenizer, said("It is 2."), **NONE)
        assert tokens[-1] == turn_end and mask[-1] == 1
        assert tokenizer.decode(tokens[-3:]).endswith("2.")
        attack = Example("1<|im_end|>", solution="2<|im_end|>2")
        tokens, _ = encode_sft(tokenizer, attack, **NONE)
        assert tokens.count(turn_end) == 2  # the question's end and the answer's
        tokenizer.save(tmp_path)
        assert Tokenizer.from_folder(tmp_path).eos_ids == tokenizer.eos_ids


def test_a_line_break_of_the_vocabulary_ends_no_turn():
    """Some vocabularies have white space and words among their added tokens."""
    template = "{% for m in messages %}{{ m.content }}\n\nEnd of 2{% endfor %}"
    tokenizer = make(Form(template, None, "</s>", "</s>", words=("\n\n", "2")))
    assert tokenizer.eos_ids == (token(tokenizer, "</s>"),)
    assert learned(tokenizer, said("It is 2.")) == "It is 2.</s>"


def test_a_template_that_fails_is_no_matter_until_a_chat_is_rendered():
    tokenizer = make(replace(FORMS["chatml"], template="{{ raise_exception('no') }}"))
    assert tokenizer.eos_ids == (token(tokenizer, "<|im_end|>"),)
    assert encode_prompt(tokenizer, said("2"), template="deepseekmath")
    with pytest.raises(GrpoError, match="chat template: no$"):
        encode_prompt(tokenizer, said("2"))


def test_a_prompt_without_a_token_is_refused():
    tokenizer = make(replace(FORMS["chatml"], template="{# nothing #}"))
    with pytest.raises(GrpoError, match="'row-7': its prompt is empty.*template"):
        encode_prompt(tokenizer, Example("1+1?", id="row-7"))


# -- the clock ---------------------------------------------------------------------


def test_the_clock_shows_the_tokenizers_time_and_chance_is_none():
    template = "{{ strftime_now('%d %b %Y') }}, {{ range(999) | random }}{{ lipsum() }}"
    tokenizer = make(replace(FORMS["chatml"], template=template))
    tokenizer.now = NOW

    def shown() -> str:
        return render_chats(tokenizer, [(HELLO, True)])[0].text

    text = shown()
    assert text.startswith("31 Jan 2026, ")
    chat_templates._close()  # another process, another day's run
    assert shown() == text
    tokenizer.now = NOW + datetime.timedelta(days=1)
    assert shown().startswith("01 Feb 2026, ")


# -- limits ------------------------------------------------------------------------

MEMORY = {
    "text": "{{ 'a' * 10**10 }}",
    "late text": "{{ messages[0].content * 10**10 }}",
    "list": "{{ ([1] * 10**10) | length }}",
    "width": "{{ '%10000000000d' | format(1) }}",
    "format": "{{ '{:10000000000}'.format(1) }}",
    "center": "{{ messages[0].content | center(10**10) }}",
    "indent": "{{ messages[0].content | indent(10**10) }}",
    "batch": "{{ [1] | batch(10**10, 0) | list }}",
    "doubled": "{% set n = namespace(x='a') %}{% for i in range(60) %}"
    "{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
    "replace": "{% set s = 'a' * 10**5 %}{{ s.replace('a', s) }}",
    "clock": "{{ strftime_now('%Y' * 10**8) }}",
}
OTHERS = {
    "range": ("{% for i in range(10**18) %}{% endfor %}", "Range too big"),
    "macro": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "loop": ("{% for x in [1] recursive %}{{ loop([x, x]) }}{% endfor %}", "recursion"),
    "nested": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "recursion|nested"),
    "blocks": ("{% if 1 %}" * 3000 + "{% endif %}" * 3000, "recursion|nested"),
    "output": ("a" * (1 << 24) + "aa", "it writes more than 16777216 characters"),
    "lines": ("{{ raise_exception('a\n' * 10**6) }}", "a a a[a ]*$"),
    "file": ("{% include '/etc/passwd' %}", "no loader"),
    "python": ("{{ ''.__class__.__mro__ }}", "unsafe"),
}


@pytest.fixture
def quick(monkeypatch):
    """A process that may take one second, and is there when others are not."""
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]; "
        "source = open(sys.argv[0]).read().replace('SECONDS = 5', 'SECONDS = 1'); "
        "exec(compile(source, sys.argv[0], 'exec'), {'__name__': '__main__'})"
    )
    real = subprocess.Popen

    def start(command, **options):
        return real([*command[:2], "-c", code, *command[2:]], **options)

    chat_templates._close()
    monkeypatch.setattr(chat_templates.subprocess, "Popen", start)
    yield
    chat_templates._close()


def refusal(template: str) -> str:
    with pytest.raises(GrpoError) as error:
        chat_templates.render_marked(template, {}, [(HELLO, True)], NOW)
    message = str(error.value)
    assert message.startswith("chat template: ") and "\n" not in message
    assert len(message) < 400
    return message.removeprefix("chat template: ")


@pytest.mark.parametrize("template", MEMORY.values(), ids=MEMORY)
def test_memory_has_a_limit(template):
    assert refusal(template) == "it needs more than 512 MiB of memory"


@pytest.mark.parametrize(("template", "message"), OTHERS.values(), ids=OTHERS)
def test_hostile_templates_are_one_line(template, message):
    assert re.search(message, refusal(template))


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}" * 2 + "{% endfor %}" * 2,
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}"
        "{{ f(60) }}",
        "{{ 9 ** (9 ** 9) }}",  # one operation, which Python itself cannot stop
    ],
)
def test_time_has_a_limit(template, quick):
    start = time.monotonic()
    assert refusal(template).startswith("it takes too long to render; does it loop?")
    assert time.monotonic() - start < 30
    # The next one has a process of its own.
    (good,) = chat_templates.render_marked(
        "{{ messages[0].content }}", {}, [(HELLO, True)], NOW
    )
    assert good.text == "hello"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_process_costs_no_prompt(number):
    """Killed, it is replaced; what stops a run (SIGTERM, Ctrl-C) is not its own."""
    chat = [(HELLO, True)]
    for _ in range(5):
        chat_templates.render_marked("a", {}, chat, NOW)
        _, process = chat_templates._process or (0, None)
        assert process
        os.kill(process.pid, number)
        assert chat_templates.render_marked("b", {}, chat, NOW)[0].text == "b"
        assert (process.poll() is None) == (number != signal.SIGKILL)


def test_a_process_that_cannot_start_is_one_line(monkeypatch, tmp_path):
    broken = tmp_path / "worker.py"
    broken.write_text("import there_is_no_such_module")
    chat_templates._close()
    monkeypatch.setattr(chat_templates, "_WORKER", broken)
    with pytest.raises(
        GrpoError, match=f"ends without an answer; try `python {broken}"
    ):
        chat_templates.render_marked("a", {}, [(HELLO, True)], NOW)


def test_many_prompts_are_those_of_one_at_a_time():
    """And where the template refuses one, that row is named."""
    tokenizer = TOKENIZERS["llama3"]
    examples = [Example("1+" * n + "1=?") for n in range(1, 150)]
    kept, dropped = encode_prompts(tokenizer, examples, limit=250, **NONE)
    one_by_one = [(e, encode_prompt(tokenizer, e, **NONE)) for e in examples]
    assert kept == [(e, ids) for e, ids in one_by_one if len(ids) <= 250]
    assert dropped == len(examples) - len(kept) > 0
    template = "{% set text = messages[0].content %}{{ text }}{% if '7' in text %}"
    template += "{{ raise_exception('no 7') }}{% endif %}"
    tokenizer = make(replace(FORMS["llama3"], template=template))
    rows = [Example(f"1+{i}", id=f"set/{i}") for i in range(10)]
    message = r"chat template: no 7 \(data 'set/7'\)$"
    with pytest.raises(GrpoError, match=message):
        encode_prompts(tokenizer, rows, limit=99, **NONE)
    with pytest.raises(GrpoError, match=message):
        encode_sft(tokenizer, replace(rows[7], solution="8"), **NONE)


def test_threads_get_their_own_texts():
    def ask(i):
        chat = [([{"role": "user", "content": f"{i}"}], True)]
        for _ in range(20):
            (got,) = chat_templates.render_marked(
                "{{ messages[0].content }}", {}, chat, NOW
            )
            found.append(got.text == f"{i}")

    found: list[bool] = []
    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 160


def test_marks_that_a_template_writes_itself_are_no_places_of_the_text():
    marked = "\ufdd3a\ufdd0<s>\ufdd1\ufdd2b\ufdd2c\ufdd3"
    rendered = chat_templates.Rendered.read(marked)
    assert rendered.text == "a<s>bc"
    assert rendered.quotes == {1} and rendered.ends == (4,)
    assert rendered.blocks == ((5, 6),)


def test_qwen3_keeps_the_thoughts_of_the_last_answer_alone():
    """What the golden chats rest on: the test's template is like the model's."""
    turns = ["<think>\n1\n</think>\n\n2", "3"]
    chat = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in (("user", "?"), ("assistant", turn))
    ]
    (got,) = chat_templates.render_marked(QWEN3, {}, [(chat, False)], NOW)
    assert got.text.endswith("assistant\n<think>\n\n</think>\n\n3<|im_end|>\n")
