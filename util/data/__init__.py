"""Data: ScienceQA, instruction tuning and MME, their images, prompts, and the batches of a training run."""
