"""Distributed tests on processes of the CPU."""

import os
import socket
import sys

import torch
import torch.distributed as dist
from torch.multiprocessing import spawn


def run_distributed(world_size):
    """`run_distributed(n)(function)(*args)` calls `function(rank, *args)` in n processes of one process group."""

    def start(function):
        def run(*args):
            with socket.socket() as sock:
                sock.bind(("localhost", 0))
                port = sock.getsockname()[1]
            _start_rank_processes(_run_rank, args=(world_size, port, function, args), nprocs=world_size)

        return run

    return start


def _run_rank(rank, world_size, port, function, args):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
    )
    dist.init_process_group(_get_distributed_backend())
    function(rank, *args)
    dist.destroy_process_group()


def _start_rank_processes(function, args, nprocs):
    spawn(_run_and_exit, args=(function, args), nprocs=nprocs)


def _run_and_exit(rank, function, args):
    function(rank, *args)
    sys.stdout.flush()
    # Now and then the threads of a process group that was used abort a process that ends in the ordinary way
    os._exit(0)


def _get_distributed_backend():
    return "gloo"


def _get_distributed_device_type():
    return "cpu"


def _get_rank_device(rank):
    return torch.device("cpu")


def _set_rank_device(rank):
    pass
