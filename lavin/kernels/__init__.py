"""Custom operators: GPU kernels in Triton, each with a reference implementation in PyTorch."""
