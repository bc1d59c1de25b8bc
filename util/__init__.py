"""What feeds and watches a run: data, prompts, schedules, scores, run folders."""
