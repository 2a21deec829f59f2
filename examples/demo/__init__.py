"""What `examples/repvgg.py` is made of."""
