# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0

# /// script
# dependencies = ["modeling-deco[train]"]
# ///
"""Train DeCo with TRL, in every stage. The YAML file says which parts are trained, and how.

Stage 1 joins a vision tower and a language model by a new projector, and trains the projector:

    accelerate launch recipes/sft.py --config recipes/configs/stage1.yaml --data_path blip558k --output_dir align \
        --vision_model_name_or_path openai/clip-vit-large-patch14-336 --model_name_or_path lmsys/vicuna-7b-v1.5

Stage 2 tunes the result, or a converted LLaVA checkpoint, on instructions (stage2_full, stage2_lora, stage2_qlora):

    accelerate launch recipes/sft.py --config recipes/configs/stage2_lora.yaml --data_path mix665k --output_dir tuned \
        --model_name_or_path align

Without labels (tune_without_labels), the data are the model's own answers at the full grid, and it learns them at
smaller grids. `--distill logits` has it learn its own probabilities there, too, in place of the words alone.

`--data_path` is a folder that `python -m modeling_deco.training.data` wrote, or any data set with `messages` and
`images`. The result is written to `output_dir`. With LoRA it is the adapter, and `--merge_adapter true` also writes
the whole model, to `output_dir/merged`. `--resume_from_checkpoint latest` continues a run that was killed, or begins
one. If `output_dir` has a model or checkpoints already, set that option or `--overwrite_output_dir true`.
"""

import logging
from pathlib import Path

from transformers import set_seed
from trl import ModelConfig, TrlParser

from modeling_deco.training import DecoArguments, DecoSFTConfig, DecoSFTTrainer
from modeling_deco.training.data import load_data, repeat_and_shuffle
from modeling_deco.training.models import (
    load_model_and_processor,
    merge_adapter,
    peft_config_of,
    save_joined_backbones,
)
from modeling_deco.training.output_dir import check_output_dir, clear_output_dir, find_checkpoint
from modeling_deco.training.plots import plot_training
from modeling_deco.utils.script import run


def main(args: DecoArguments, training_args: DecoSFTConfig, model_args: ModelConfig) -> DecoSFTTrainer:
    check_output_dir(args, training_args, model_args)

    # Dataset
    train_dataset = load_data(args.data_path, streaming=args.streaming, decode=False)
    if args.streaming:
        train_dataset = repeat_and_shuffle(train_dataset, training_args.order_seed)
    eval_dataset = None
    if args.eval_data_path is not None:
        eval_dataset = load_data(args.eval_data_path, streaming=args.streaming, decode=False)

    # Model
    set_seed(training_args.seed)  # a new projector is initialized before the trainer sets the seed
    if model_args.use_peft and args.vision_model_name_or_path is not None:
        args, model_args = save_joined_backbones(args, training_args, model_args)
    model, processor = load_model_and_processor(args, model_args)

    # Training
    trainer = DecoSFTTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
        peft_config=peft_config_of(model_args),
    )
    clear_output_dir(args, training_args)  # only now, when the run is known to be possible
    trainer.train(resume_from_checkpoint=find_checkpoint(training_args))

    # Save
    trainer.save_model()
    if trainer.is_world_process_zero():
        plot_training(trainer.state.log_history, Path(training_args.output_dir, "training.png"))
    if training_args.push_to_hub:
        trainer.push_to_hub()
    trainer.end_training()
    if args.merge_adapter and trainer.is_world_process_zero():
        merge_adapter(training_args.output_dir, args.image_positions)
    return trainer


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    parser = TrlParser((DecoArguments, DecoSFTConfig, ModelConfig))
    run("sft", lambda: main(*parser.parse_args_and_config()))
