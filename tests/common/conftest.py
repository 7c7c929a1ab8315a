# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

collect_ignore = ["transformers_tests"]  # replacements of helper modules of the suites, not tests


def pytest_ignore_collect(collection_path, config):
    """Run the suites only on request, by `pytest tests/common`: they need minutes and a download."""
    asked_for = [Path(config.invocation_params.dir, argument.split("::")[0]).resolve() for argument in config.args]
    here = Path(__file__).parent
    return None if any(path == here or here in path.parents for path in asked_for) else True


def pytest_configure(config):
    for marker in (
        *("accelerate_tests", "flash_attn_test", "flash_attn_3_test", "flash_attn_4_test", "torch_compile_test"),
        *("is_fsdp_test", "is_tensor_parallel_test", "is_training_test"),
    ):
        config.addinivalue_line("markers", f"{marker}: of the suites of transformers")
