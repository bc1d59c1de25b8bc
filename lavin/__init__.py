"""LaVIN: LLaMA with Mixture-of-Modality Adaptation (Luo et al. 2023, arXiv 2305.15023); this folder itself holds the model."""
