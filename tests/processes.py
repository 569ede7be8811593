"""Runs checks in several gloo processes on the CPU: one start of processes for many checks, the first failure stops them."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _work(rank: int, world: int, meeting: str, checks: Sequence[Callable], arguments: tuple) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    store = dist.FileStore(meeting, world)  # a port that is free now may be taken when the group begins
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    for check in checks:
        try:
            torch.manual_seed(0)
            check(*arguments)
        except Exception as error:
            raise AssertionError(f"{check.__name__} failed on process {rank} of {world}") from error
    dist.barrier()  # nobody leaves while another one still waits for its answer
    dist.destroy_process_group()
    leave()


def leave() -> None:
    """Ends this process without taking the interpreter down: a thread of gloo that still holds a tensor would release it
    meanwhile, wait for the interpreter, and abort the process ("terminate called without an active exception")."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run(world: int, checks: Sequence[Callable], *arguments) -> None:
    """Calls check(*arguments) for each check, one after the other, in `world` processes with a gloo group.

    Raises the first failure of any process.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_work, (world, f"{folder}/meeting", tuple(checks), arguments), world)
