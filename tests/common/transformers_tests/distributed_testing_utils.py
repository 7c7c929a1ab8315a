# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Replacement: runs the ranks of a distributed test as processes on the CPU."""

import functools

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _get_distributed_device_type():
    return "cpu"


def _get_distributed_backend():
    return "gloo"


def _get_rank_device(rank):
    return torch.device("cpu")


def _set_rank_device(rank):
    """Nothing to choose on the CPU."""


def _start_rank_processes(function, args, nprocs):
    # forked from a server that has imported the libraries once: a spawned process takes seconds to import them
    mp.get_context("forkserver").set_forkserver_preload(["torch.distributed.fsdp", "transformers.testing_utils"])
    mp.start_processes(function, args=args, nprocs=nprocs, start_method="forkserver")


def _run_rank(rank, function, world_size, port, args):
    torch.set_num_threads(1)
    store = dist.TCPStore("localhost", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    try:
        function(rank, *args)
    finally:
        dist.destroy_process_group()


def run_distributed(world_size):
    """Decorate a function of a rank and arguments: calling it runs it in `world_size` processes."""

    def decorate(function):
        @functools.wraps(function)
        def run(*args):
            # this process keeps the store, and with it the port
            store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
            _start_rank_processes(_run_rank, (function, world_size, store.port, args), world_size)

        return run

    return decorate
