"""Communication between the processes of a training or evaluation.

Processes are started by ``torchrun``, one per device. Without it everything here is the plain case of one process.
"""

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from tqdm import tqdm

from ..errors import InputError

LAUNCHED = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}  # torchrun sets all of them
EVALUATION_HOURS = 12  # how long a process waits for the others: the slowest one's share of an evaluation


def start(device: torch.device) -> torch.device:
    """Join the processes that ``torchrun`` started, if it did; return this process's device."""
    if not os.environ.keys() >= LAUNCHED:
        return device
    if device.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise InputError(
                f"torchrun started more processes than this machine has devices ({torch.cuda.device_count()}): lower "
                "--nproc-per-node."
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # What is computed travels by NCCL, what is counted or written down by gloo.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=EVALUATION_HOURS))
    return device


def stop() -> None:
    """Leave the group of processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def mean(values: dict[str, float]) -> dict[str, float]:
    """The mean over all processes of each number; every process gives the same names and gets the same numbers."""
    if not dist.is_initialized():
        return values
    numbers = torch.tensor(list(values.values()), dtype=torch.float64)
    dist.all_reduce(numbers)
    return dict(zip(values, (numbers / world()).tolist(), strict=True))


def gather(records: list) -> list | None:
    """All processes' records, in the order of the processes, on process 0; None on the others."""
    if not dist.is_initialized():
        return records
    every = [None] * world() if rank() == 0 else None
    dist.gather_object(records, every)  # pickled, but only between our own processes
    return None if every is None else [record for part in every for record in part]


def say(text: str) -> None:
    """A line for whoever watches, on standard error, from the first process."""
    if rank() == 0:
        tqdm.write(text, file=sys.stderr)


def progress(*args, **options) -> tqdm:
    """A bar of tqdm, shown by the first process; that one may be silenced by TQDM_DISABLE."""
    return tqdm(*args, **options, **({"disable": True} if rank() > 0 else {}))
