"""The formats of Hugging Face folders and GGUF files: the parts behind `weights`.

config      config.json ⇄ ModelConfig
folders     finding a folder on disk or on the hub, making a new one
tensors     safetensors files, by name and without loading them
torch_bin   `.bin` files, without torch and without running what they hold
gguf_file   a GGUF file's header, and its tensors as they lie there
gguf_model  a GGUF file's weights, tokenizer and chat template
"""
