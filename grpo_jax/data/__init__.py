"""Training data: questions with answers, and the token ids made from them.
Holds the datasets, their parsers, the tokenizer, chat templates and prompts."""
