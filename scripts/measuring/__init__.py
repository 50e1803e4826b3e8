"""What is inside the small model: half-lives, drafts, faults, recall. scripts/measure_tiny.py is the command."""
