"""Programs beside training and scoring: they make data and a toy base, export a run, and check a machine."""
