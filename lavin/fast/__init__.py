"""Faster replacements for parts of an unchanged model: fused and fp8 matrices, compiled layers, CUDA graphs of training."""
