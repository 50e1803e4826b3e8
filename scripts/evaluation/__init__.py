"""What scripts/eval.py is made of: problems and prompts, scores, cells of the matrix, their agreement, the report."""
