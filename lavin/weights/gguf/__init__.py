"""A base model in one GGUF file, the format of llama.cpp: metadata, vocabulary and quantized tensors."""
