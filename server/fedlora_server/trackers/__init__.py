"""What watches a run: the operator's screen, and the picture that is left of it."""
