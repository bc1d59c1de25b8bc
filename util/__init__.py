"""What the commands share: flags, learning-rate schedules, run folders, scores, loading of trained models."""
