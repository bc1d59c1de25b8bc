"""The model: LLaMA with Mixture-of-Modality Adaptation (LaVIN, Luo et al. 2023, arXiv 2305.15023)."""
