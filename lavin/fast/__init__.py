"""Faster replacements for parts of the model: fused and fp8 matrices, compiled layers, CUDA graphs."""
