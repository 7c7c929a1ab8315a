# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Run a script with accelerate's FSDP on CPU processes: `python fsdp_on_cpu.py SCRIPT ARGS...`.

accelerate (1.15) reads the FSDP settings but ignores them if processes are on CPUs, though PyTorch's `fully_shard`
works there.
"""

import runpy
import sys

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

real_init = AcceleratorState.__init__


def init(self, *args, fsdp_plugin=None, **kwargs):
    real_init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = fsdp_plugin


AcceleratorState.__init__ = init
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
