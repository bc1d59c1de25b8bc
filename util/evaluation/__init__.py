"""Evaluation: the questions of ScienceQA and MME are answered, and the answers scored."""
