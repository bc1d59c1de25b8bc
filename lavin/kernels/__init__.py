"""Custom operators: GPU kernels in Triton, each with a plain PyTorch twin that computes the same."""
