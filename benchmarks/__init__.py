"""Speed and memory, measured against the published recipe on the same machine."""
