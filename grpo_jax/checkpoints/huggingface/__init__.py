"""Hugging Face model folders.

weights  loads a folder into parameters and saves parameters as a folder
config   converts config.json to ModelConfig and back
folders  finds a folder on disk or on the hub, and makes a new one
tensors  reads slices of safetensors files, and writes such files
adapter  saves LoRA adapters as a PEFT folder
"""
