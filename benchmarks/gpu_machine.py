"""What an accelerator's memory and link can do: the limits that our figures are held against."""

import statistics
import time
from collections.abc import Callable

import torch

_ROUNDS = 7


def seconds(device: torch.device, work: Callable[[], object], *, rounds: int = _ROUNDS) -> float:
    """Median seconds of `work`, from an idle device to an idle device. A first round is not counted."""
    took = []
    for _ in range(rounds + 1):
        wait(device)
        began = time.perf_counter()
        work()
        wait(device)
        took.append(time.perf_counter() - began)
    return statistics.median(took[1:])


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_bytes_per_s(device: torch.device, num_bytes: int) -> float:
    """Read and written by a copy of `num_bytes` within the device."""
    source, target = (torch.zeros(num_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * num_bytes / seconds(device, lambda: target.copy_(source))


def link_bytes_per_s(device: torch.device, num_bytes: int, *, to_device: bool) -> float:
    """Of one plain copy of `num_bytes` between pinned host memory and the device."""
    host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    on_device = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    source, target = (host, on_device) if to_device else (on_device, host)
    return num_bytes / seconds(device, lambda: target.copy_(source, non_blocking=True))
