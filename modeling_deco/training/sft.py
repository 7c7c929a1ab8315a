# /// script
# dependencies = ["modeling-deco[train]"]
# ///
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

import json
import shutil
import time
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from peft import PeftModel
from transformers import set_seed
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
from trl import ModelConfig, get_peft_config, get_quantization_config

from .. import DecoForConditionalGeneration, DecoProcessor
from ..chat_templates import CHAT_TEMPLATES, read_chat_template
from ..inference.loading import find_adapter, load_model
from ..utils.errors import first_names, one_line
from ..utils.image_processors import pad_to_square
from .data import load_data
from .plots import plot_training
from .trainer import INCOMPLETE, DecoSFTConfig, DecoSFTTrainer

BASE = "base"  # under output_dir: two backbones, joined, where what is trained is an adapter of them
SHUFFLE_BUFFER_SIZE = 1000  # rows of a streamed data set, images not decoded


@dataclass
class DecoArguments:
    """Model and data, beyond TRL's `ModelConfig`; neither has a default."""

    data_path: list[str] = field(metadata={"help": "Folders of modeling_deco.training.data, or Hub ids; joined."})
    eval_data_path: list[str] | None = field(
        default=None, metadata={"help": "The same, for evaluation (--eval_strategy, --eval_steps)."}
    )
    streaming: bool = field(default=False, metadata={"help": "Read data as it is needed; set --max_steps."})
    vision_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Vision tower to put before the language model --model_name_or_path, with a new projector."},
    )
    pooled_grid_size: int | None = field(
        default=None, metadata={"help": "Side of the model's own grid; default: 12, or the checkpoint's."}
    )
    projector_type: str | None = field(
        default=None,
        metadata={"help": "Of a new projector: avg_pool (the default), or what it is compared with; see DecoConfig."},
    )
    projector_config: str | None = field(
        default=None,
        metadata={"help": "Its sizes, as JSON: '{\"num_hidden_layers\": 2}'; default: the field's standard."},
    )
    chat_template: str | None = field(
        default=None,
        metadata={
            "help": f"{', '.join(CHAT_TEMPLATES)}, or the path of a Jinja file with marks around what is to be "
            f"learned. Default: the model's own."
        },
    )
    pad_images: bool = field(
        default=False, metadata={"help": "Pad images to a square before resizing, as LLaVA-1.5 was trained."}
    )
    merge_adapter: bool = field(default=False, metadata={"help": "Write output_dir/merged, adapter and model in one."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace the model and the checkpoints that output_dir holds."}
    )


def load(args: DecoArguments, model_args: ModelConfig) -> tuple[DecoForConditionalGeneration, DecoProcessor]:
    """The model that is trained, and its processor."""
    name, quantization_config = model_args.model_name_or_path, get_quantization_config(model_args)
    if name is None:
        raise ValueError("Name the model that is trained: --model_name_or_path.")
    grid = {} if args.pooled_grid_size is None else {"pooled_grid_size": args.pooled_grid_size}
    chat_template = None if args.chat_template is None else read_chat_template(args.chat_template)
    if args.vision_model_name_or_path is not None:
        if quantization_config is not None or model_args.model_revision != "main":
            raise ValueError(
                "Two backbones are joined as they are: train the projector first (stage 1), then quantize the result; "
                "for a --model_revision, download it and name its folder."
            )
        backbones = (args.vision_model_name_or_path, name)
        projector = {} if args.projector_type is None else {"projector_type": args.projector_type}
        if args.projector_config is not None:
            projector["projector_config"] = read_sizes(args.projector_config)
        model = DecoForConditionalGeneration.from_vision_text_pretrained(
            *backbones, dtype=model_args.dtype, **grid, **projector
        )
        if model_args.attn_implementation is not None:
            model.set_attn_implementation(model_args.attn_implementation)
        processor = DecoProcessor.from_vision_text_pretrained(*backbones, **grid, chat_template=chat_template)
    else:
        if args.projector_type is not None or args.projector_config is not None:
            raise ValueError(
                f"{name} has a projector, and --projector_type is of a new one, between two backbones; see "
                f"--vision_model_name_or_path."
            )
        if find_adapter(name, model_args.model_revision) is not None:
            raise ValueError(f"{name} is an adapter; merge it first (--merge_adapter true), and train on the result.")
        model = load_model(
            name,
            model_args.model_revision,
            dtype=model_args.dtype,
            attn_implementation=model_args.attn_implementation,
            quantization_config=quantization_config,
            **grid,
        )
        processor = DecoProcessor.from_pretrained(
            name, revision=model_args.model_revision, trust_remote_code=False, **grid
        )
    if chat_template is not None:
        processor.chat_template = chat_template
    if args.pad_images:
        processor.image_processor = pad_to_square(processor.image_processor)
    return model, processor


def read_sizes(projector_config: str) -> dict[str, int]:
    """The JSON of `--projector_config`."""
    try:
        sizes = json.loads(projector_config)
    except json.JSONDecodeError:
        sizes = None
    if not isinstance(sizes, dict):
        raise ValueError(
            f'--projector_config must be a JSON object, such as {{"num_hidden_layers": 2}}, got {projector_config!r}.'
        )
    return sizes


def merge_adapter(adapter_dir: str) -> None:
    """Write `adapter_dir/merged`: the model that the adapter was trained on, with the adapter in it."""
    processor = DecoProcessor.from_pretrained(adapter_dir, trust_remote_code=False)
    adapter = find_adapter(adapter_dir)
    model = load_model(adapter.base, adapter.base_revision, dtype="auto", pooled_grid_size=processor.pooled_grid_size)
    merged = PeftModel.from_pretrained(model, adapter_dir).merge_and_unload()
    merged.save_pretrained(Path(adapter_dir, "merged"))
    processor.save_pretrained(Path(adapter_dir, "merged"))


# --- the output folder -----------------------------------------------------------------------------------------------


def on_first_process(training_args: DecoSFTConfig, function: Callable[..., Any], *args) -> Any:
    """Call a function on one process alone; all get its result, or raise its error as a ValueError."""
    result = error = None
    if training_args.process_index == 0:
        try:
            result = function(*args)
        except (ValueError, OSError) as failure:
            error = one_line(failure)
    result, error = broadcast_object_list([result, error])
    if error is not None:
        raise ValueError(error)
    return result


def check_output_dir(args: "DecoArguments", training_args: DecoSFTConfig, model_args: ModelConfig) -> None:
    """Refuse an `output_dir` that has what the run reads, or a model or checkpoints that it would replace."""
    out = Path(training_args.output_dir)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--output_dir {out} is a file; name a folder.")
    read = {
        "--model_name_or_path": [model_args.model_name_or_path],
        "--vision_model_name_or_path": [args.vision_model_name_or_path],
        "--data_path": args.data_path,
        "--eval_data_path": args.eval_data_path or [],
    }
    written = [out.resolve(), *(path.resolve() for path in _results(out))]
    for option, names in read.items():
        for path in (Path(name).resolve() for name in names if name is not None):
            if path.exists() and (path in written or any(parent in written[1:] for parent in path.parents)):
                raise ValueError(f"--output_dir {out} has {option} {path} in it, which the run reads; name another.")
    found = sorted(path.name for path in _results(out))
    if found and not args.overwrite_output_dir and training_args.resume_from_checkpoint is None:
        shown = first_names(found)
        raise ValueError(
            f"--output_dir {out} has a model or checkpoints ({shown}): go on by --resume_from_checkpoint latest, "
            f"replace them by --overwrite_output_dir true, or name another folder."
        )
    if args.overwrite_output_dir and training_args.resume_from_checkpoint is not None:
        raise ValueError("--overwrite_output_dir removes what --resume_from_checkpoint goes on from; choose one.")


def _results(out: Path) -> list[Path]:
    """Models and checkpoints that earlier runs have left in a folder."""
    folders = [*out.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), *(out / name for name in (BASE, "merged", INCOMPLETE))]
    names = ("config.json", "adapter_config.json", "*.safetensors", "*.safetensors.index.json", "*.bin")
    files = [path for name in names for path in out.glob(name)]
    return [*(path for path in folders if path.is_dir()), *(path for path in files if path.is_file())]


def remove_results(out: Path) -> None:
    """Remove the results of earlier runs, which could be mistaken for this run's: checkpoints, an adapter."""
    for path in _results(out):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def save_base(args: DecoArguments, model_args: ModelConfig, base: Path) -> None:
    """Join two backbones and write the result, the base model of an adapter."""
    if base.is_dir():  # of a run that is resumed
        return
    staged = base.with_name(INCOMPLETE) / BASE
    shutil.rmtree(staged, ignore_errors=True)
    model, processor = load(args, model_args)
    model.save_pretrained(staged)
    processor.save_pretrained(staged)
    staged.rename(base)


def main(args: DecoArguments, training_args: DecoSFTConfig, model_args: ModelConfig) -> DecoSFTTrainer:
    """Train, save, plot; returns the trainer."""
    joins = args.vision_model_name_or_path is not None
    if model_args.use_peft and args.pooled_grid_size is not None and not (args.merge_adapter or joins):
        raise ValueError(
            "An adapter keeps its model's grid: with --pooled_grid_size, set --merge_adapter true as well."
        )
    out = Path(training_args.output_dir)
    on_first_process(training_args, check_output_dir, args, training_args, model_args)
    train_dataset = load_data(args.data_path, streaming=args.streaming, decode=False)
    if args.streaming:  # one endless pass, of which Trainer knows how much a resumed run has seen
        seed = training_args.seed if training_args.data_seed is None else training_args.data_seed
        train_dataset = train_dataset.repeat(None).shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER_SIZE)
    eval_dataset = None
    if args.eval_data_path is not None:
        eval_dataset = load_data(args.eval_data_path, streaming=args.streaming, decode=False)
    set_seed(training_args.seed)  # a new projector is drawn before the trainer does so
    if model_args.use_peft and joins:
        if training_args.push_to_hub or is_deepspeed_zero3_enabled():
            raise ValueError(
                "LoRA on two backbones is of a model that is on this disk alone, and joined by one process: train the "
                "projector first (stage 1), or leave out --push_to_hub and ZeRO-3."
            )
        if args.overwrite_output_dir:
            on_first_process(training_args, remove_results, out)
        base = (out / BASE).resolve()
        on_first_process(training_args, save_base, args, model_args, base)
        args, model_args = copy(args), copy(model_args)
        args.vision_model_name_or_path = args.projector_type = args.projector_config = args.pooled_grid_size = None
        args.pad_images, model_args.model_name_or_path = False, str(base)
    model, processor = load(args, model_args)
    peft_config = get_peft_config(model_args)
    if peft_config is not None:
        peft_config.revision = model_args.model_revision  # is saved with the adapter, which is of that model
    trainer = DecoSFTTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
        peft_config=peft_config,
    )
    if args.overwrite_output_dir and not (model_args.use_peft and joins):
        on_first_process(training_args, remove_results, out)
    checkpoint = training_args.resume_from_checkpoint
    if checkpoint == "latest":
        # what the first process finds, or processes without a shared disk would begin at different steps
        checkpoint = on_first_process(training_args, lambda: get_last_checkpoint(out) if out.is_dir() else None)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    if trainer.is_world_process_zero():
        plot_training(trainer.state.log_history, out / "training.png")
    if training_args.push_to_hub:
        trainer.push_to_hub()
    trainer.accelerator.end_training()
    if training_args.world_size > 1:
        # Gloo's thread needs the GIL to free its last work, and the group's destructor waits for that thread with the
        # GIL held (torch 2.13): a run that ends at once may never end.
        time.sleep(0.5)
    if args.merge_adapter and trainer.is_world_process_zero():  # alone: the other processes are done
        merge_adapter(training_args.output_dir)
    return trainer
