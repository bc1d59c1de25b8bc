"""Several runs one after another in one process, which reads their base model once."""
