"""A series is several runs, made one after another by one process, which reads their base model once."""
