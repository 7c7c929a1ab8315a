# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Timing of functions, the environment of a measurement, and its report."""

import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles

import torch


def environment(device: str | torch.device, *libraries: str) -> dict[str, str | int]:
    """The environment of a measurement: the name of the device, the numbers of CPUs and threads, and versions.

    Args:
        device: the device that runs the model.
        libraries: distributions to list with torch and transformers.
    """
    on_gpu = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", *libraries)},
    }


def command() -> str:
    """The command that runs: a module of a package by its name, a script relative to the folder above its own."""
    script, *options = sys.argv
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and spec.name.startswith("modeling_deco."):
        return shlex.join(["python", "-m", spec.name.removesuffix(".__main__"), *options])
    return shlex.join(["python", "/".join(Path(script).parts[-2:]), *options])


def cpu_name() -> str:
    """Name of the processor, or the architecture if the system does not give the name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def time_interleaved(
    runs: dict[str, Callable[[], object]], repeats: int, device="cpu", clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Time functions in rounds, so that other load on the machine affects all of them alike.

    Each round calls every function once, and starts with another function than the round before. The first round is a
    warm-up.

    Args:
        clock: its seconds are counted.

    Returns:
        For each name the seconds of `repeats` rounds.
    """
    names = list(runs)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round in range(repeats + 1):
        for name in names[round % len(names) :] + names[: round % len(names)]:
            elapsed = seconds(runs[name], device, clock)
            if round > 0:
                times[name].append(elapsed)
    return times


def seconds(function: Callable[[], object], device="cpu", clock: Callable[[], float] = time.perf_counter) -> float:
    """Time of a call, until the device has finished."""
    synchronize(device)
    began = clock()
    function()
    synchronize(device)
    return clock() - began


def synchronize(device) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def spread(values: list[float]) -> dict[str, float]:
    """`median`, and the quartiles `low` and `high`, to four digits."""
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {name: float(f"{value:.4g}") for name, value in (("median", median(values)), ("low", low), ("high", high))}


def peak_resident_bytes() -> int:
    """The most memory that this process has held (Linux). getrusage's figure would be the parent's at first."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")))


def write_report(report: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
