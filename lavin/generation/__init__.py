"""Answers from a trained model: KV cache, prefill and decoding, sampling, streaming, option scoring."""
