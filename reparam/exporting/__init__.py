"""Write models for other runtimes, and check what was written."""
