"""How much memory a training has held."""

import sys

import torch


def peak_mib(device: torch.device) -> float:
    """Most MiB that were held at once: by tensors on a CUDA device since the last call, else by the process so far."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, KiB elsewhere
    return largest / (2**20 if sys.platform == "darwin" else 2**10)
