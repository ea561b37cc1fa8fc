"""distill: students from teachers."""
