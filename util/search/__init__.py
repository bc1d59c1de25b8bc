"""A hyperparameter search draws, trains, scores and prunes trials, and confirms the best ones with fresh seeds."""
