"""Hugging Face model folders.

weights            loads a folder into parameters and saves parameters as a folder
config             converts config.json to ModelConfig and back
folders            finds a folder on disk or on the hub, and makes a new one
safetensors_files  reads slices of safetensors files and shards, and writes such files
peft_adapter       saves LoRA adapters as a PEFT folder
"""
