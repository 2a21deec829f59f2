"""Modes of torch under which an operation runs."""

import torch


def current_mode() -> tuple[bool, ...]:
    """Gradient and autocast modes that are on."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
    )
