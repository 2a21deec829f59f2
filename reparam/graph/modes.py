"""Modes of torch under which an operation runs."""

from torch import is_autocast_enabled, is_grad_enabled, is_inference_mode_enabled


def current_mode() -> tuple[bool, ...]:
    """Gradient and autocast modes that are on."""
    return (
        is_grad_enabled(),
        is_inference_mode_enabled(),
        is_autocast_enabled("cpu"),
        is_autocast_enabled("cuda"),
    )
