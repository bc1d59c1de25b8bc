"""Weight files: LLaMA and ViT checkpoints of several formats, adapters, quantization and tensor parallelism."""
