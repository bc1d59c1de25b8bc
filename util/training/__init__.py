"""Parts of the training loop: gradient accumulation within GPU memory, the optimizer step, resuming."""
