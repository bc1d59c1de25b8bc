"""Flags, learning-rate schedules, run folders and trained models, which the commands share."""
