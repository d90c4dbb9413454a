"""What a sweep does: its grid of variants and seeds, its trials, the race among them, and their comparison."""
