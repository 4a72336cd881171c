"""Training data: questions with answers, and the token ids made from them.

datasets          `load_dataset` opens sets; `Batches` is the order of their rows
registry          the known sets: file, address, SHA-256, parser
parsers           from the rows of files to examples
prepared_sets     downloads the files and prepares them with TFDS
chain_sums        the procedural task of the demo
example           `Example`, which all of these yield
prompts           encodes prompts, and SFT rows with their loss masks
prompt_parts      templates and instructions; `sft_answers` the answer of an SFT row
chat_templates    renders a model's own template, in `chat_template_worker`
few_shot_prompts  worked examples for base models
tokenizer         text to token ids and back; `special_tokens`, `tokenizer_files`
brackets          splits text at brackets, finds \\boxed{…}
"""
