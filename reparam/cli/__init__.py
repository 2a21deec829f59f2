"""The command line: ``reparam`` and ``python -m reparam``."""
