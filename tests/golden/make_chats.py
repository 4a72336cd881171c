"""Makes tests/golden/chats.json: the chats of tests/chat_cases.py by transformers.

    pip install transformers==5.24.0 jinja2==3.1.6
    PYTHONPATH=tests/helpers:. python tests/golden/make_chats.py

For each form and chat: the ids of `apply_chat_template` of the prompt, and of the
prompt with the answer (null where the template raises), and where the template has
{% generation %} the mask of the assistant's tokens.
"""

import json
import tempfile
from pathlib import Path

import chat_cases  # type: ignore
import transformers  # type: ignore


def ids(tokenizer, messages, **how):
    try:
        return tokenizer.apply_chat_template(messages, return_dict=False, **how)
    except Exception as error:
        assert "system" in str(error), error
        return None


def main() -> None:
    golden: dict = {"transformers": transformers.__version__}
    for name, form in chat_cases.FORMS.items():
        with tempfile.TemporaryDirectory() as folder:
            chat_cases.byte_level(form).save(f"{folder}/tokenizer.json")
            config = chat_cases.settings(form) | {"chat_template": form.template}
            Path(folder, "tokenizer_config.json").write_text(json.dumps(config))
            tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        for chat, (system, question, solution) in chat_cases.CHATS.items():
            head = [{"role": "system", "content": system}] if system else []
            messages = [*head, {"role": "user", "content": question}]
            prompt = ids(tokenizer, messages, add_generation_prompt=True)
            messages.append({"role": "assistant", "content": solution})
            golden[f"{name}/{chat}"] = [prompt, ids(tokenizer, messages)]
            if "endgeneration" in form.template:
                told = tokenizer.apply_chat_template(
                    messages, return_dict=True, return_assistant_tokens_mask=True
                )
                golden[f"{name}/{chat}"].append(told["assistant_masks"])
    lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in golden.items()]
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    Path(__file__).with_name("chats.json").write_text(text)


if __name__ == "__main__":
    main()
