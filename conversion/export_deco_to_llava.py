# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Export a DeCo checkpoint as a LLaVA checkpoint of transformers.

    python conversion/export_deco_to_llava.py deco-7b llava-7b

The arguments are those of `deco export`; `--help` lists them.
"""

import sys

from modeling_deco.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "export")
    main()
