"""Compare two models on one input, and say why they differ."""
