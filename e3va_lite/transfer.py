"""Copies to a device that nobody waits for."""

import torch
from torch import Tensor


def send(x: Tensor, device: torch.device) -> Tensor:
    """``x.to(device)``. A copy to CUDA goes through pinned memory: it takes its turn behind the work that the device
    has been given, and the program goes on meanwhile."""
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)
