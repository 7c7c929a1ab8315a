# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Convert a LLaVA checkpoint to a DeCo checkpoint.

    python conversion/convert_llava_to_deco.py llava-hf/llava-1.5-7b-hf deco-7b

The arguments are those of `deco convert`; `--help` lists them.
"""

import sys

from modeling_deco.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "convert")
    main()
