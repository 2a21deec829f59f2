"""The parts of `train_imagenet.py`: one idea per module."""
