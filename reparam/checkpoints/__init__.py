"""Read checkpoints of any make, and save fused models."""
