"""Readers of other weight files: llama.cpp's GGUF and torch's .bin.

`grpo_jax.convert` turns these into Hugging Face folders.
"""
