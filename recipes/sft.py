# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Train DeCo with TRL, in every stage: what is trained, and how, is in the YAML file.

Stage 1, from a vision tower and a language model: a projector between them.

    accelerate launch recipes/sft.py --config recipes/configs/stage1.yaml --data_path blip558k --output_dir align \
        --vision_model_name_or_path openai/clip-vit-large-patch14-336 --model_name_or_path lmsys/vicuna-7b-v1.5

Stage 2, instruction tuning of the result, or of a converted LLaVA checkpoint: stage2_full, stage2_lora, stage2_qlora.

    accelerate launch recipes/sft.py --config recipes/configs/stage2_lora.yaml --data_path mix665k --output_dir tuned \
        --model_name_or_path align

`--data_path` is a folder that `python -m modeling_deco.training.data` writes, or any data set with `messages` and
`images`. `--resume_from_checkpoint latest` goes on where a run was killed, or begins. The result lies in `output_dir`;
with LoRA that is the adapter, and `--merge_adapter` writes the whole model to `output_dir/merged`. An `output_dir`
that has a model or checkpoints is refused without `--overwrite_output_dir true` or `--resume_from_checkpoint`.
"""

import logging

from trl import ModelConfig, TrlParser

from modeling_deco.training.sft import DecoArguments, main
from modeling_deco.training.trainer import DecoSFTConfig
from modeling_deco.utils.script import run

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    run("sft", lambda: main(*TrlParser((DecoArguments, DecoSFTConfig, ModelConfig)).parse_args_and_config()))
