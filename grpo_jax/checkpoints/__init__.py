"""Checkpoints of a run (`run_checkpoints`) and the model formats of others.

`huggingface` reads and writes model folders; `formats` reads GGUF and .bin files.
"""
