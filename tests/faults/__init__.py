"""Proofs that take too long for a test: bad inputs, faults of the machine, killed runs and killed searches."""
