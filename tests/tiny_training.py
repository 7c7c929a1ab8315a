# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""A tiny DeCo checkpoint, a data set of conversations, and runs of the recipes on them."""

import gc
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import tiny
from datasets import Dataset
from transformers import AutoModel, AutoModelForCausalLM, CLIPVisionConfig, LlamaConfig
from trl import ModelConfig, TrlParser

from modeling_deco import DecoConfig, DecoForConditionalGeneration
from modeling_deco.training import DecoArguments, DecoSFTConfig
from modeling_deco.training.data.columns import FEATURES

RECIPES = Path(__file__).parents[1] / "recipes"
CONFIGS = RECIPES / "configs"
ACCELERATE_CONFIGS = RECIPES / "accelerate_configs"


def load_script(name: str) -> ModuleType:
    """A recipe as a module, whose `main` can be called."""
    spec = importlib.util.spec_from_file_location(f"recipe_{Path(name).stem}", RECIPES / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sft = load_script("sft.py")
sft.plot_training = lambda *args: None  # takes longer than a short run; a test of the plot sets it again
gc.freeze()  # accelerate collects garbage after each run, which takes longer than the run if it looks at all imports

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- set content = message['content'] -%}
{%- set parts = [{'type': 'text', 'text': content}] if content is string else content -%}
{{- message['role'] + ' : ' -}}
{%- if message['role'] == 'assistant' -%}
{% generation %}
{%- for part in parts -%}{{- part['text'] + ' ' -}}{%- endfor -%}{{- eos_token + ' ' -}}
{% endgeneration %}
{%- else -%}
{%- for part in parts -%}
{{- '<' + part['type'] + '>' if part['type'] in ('image', 'video') else part['text'] + ' ' -}}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'assistant : ' -}}{%- endif -%}
"""
ANSWERS = ("a red cat .", "the blue dog .", "two .", "the cat is blue .")


def build_processor(**kwargs):
    return tiny.build_processor(chat_template=CHAT_TEMPLATE, **kwargs)


def conversation(index: int, num_images: int = 1, num_turns: int = 1) -> dict:
    """An example as `modeling_deco.training.data` writes it."""
    messages = []
    for turn in range(num_turns):
        shown = [{"type": "image", "text": None}] * num_images if turn == 0 else []
        question = "what is this ?" if turn == 0 else "is the cat red ?"
        messages += [
            {"role": "user", "content": [*shown, {"type": "text", "text": question}]},
            {"role": "assistant", "content": [{"type": "text", "text": ANSWERS[(index + turn) % len(ANSWERS)]}]},
        ]
    images = [tiny.picture(10 * index + number) for number in range(num_images)]
    return {"id": f"sample-{index}", "images": images, "messages": messages}


def conversations(number: int = 24) -> list[dict]:
    """One image, two, and none in turn; one or two questions."""
    return [conversation(index, num_images=(1, 2, 0)[index % 3], num_turns=1 + index % 2) for index in range(number)]


def build_dataset(examples=None) -> Dataset:
    return Dataset.from_list(conversations() if examples is None else examples, features=FEATURES)


def save_dataset(folder: Path, examples=None) -> Path:
    """A folder that `load_dataset` opens."""
    (folder / "data").mkdir(parents=True)
    build_dataset(examples).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    return folder


def save_checkpoint(
    folder: Path, hidden_size: int | None = None, tied: bool = False, vision: str = "clip", **fields
) -> Path:
    """A random model. bitsandbytes wants widths of at least 64 on some CPUs."""
    sizes = {} if hidden_size is None else {"hidden_size": hidden_size, "intermediate_size": 2 * hidden_size}
    text_config = {**tiny.TEXT_CONFIGS["llama"], **sizes, "tie_word_embeddings": tied}
    config = DecoConfig(
        vision_config=(tiny.VISION_CONFIGS | tiny.FEATURE_MAP_CONFIGS)[vision],
        text_config=text_config,
        image_token_id=tiny.IMAGE_TOKEN_ID,
        pooled_grid_size=3,
        **fields,
    )
    model = tiny.randomize(DecoForConditionalGeneration(config))
    if vision in tiny.FEATURE_MAP_CONFIGS:
        tiny.calibrate(model.model.vision_tower)
    model.save_pretrained(folder)
    build_processor().save_pretrained(folder)
    return folder


def save_family(folder: Path, family: str, **fields) -> Path:
    """A random model with the views and videos of a family of LLaVA."""
    model = tiny.build_family(family, **fields)
    model.save_pretrained(folder)
    processor = tiny.build_family_processor(model.config)
    processor.chat_template = CHAT_TEMPLATE
    processor.save_pretrained(folder)
    return folder


def view_conversation(seed: int, sizes=(), videos=(), num_turns: int = 1) -> dict:
    """A conversation about pictures of these sizes, and about videos of so many frames."""
    sample = conversation(seed, num_images=0, num_turns=num_turns)
    shown = [{"type": "image", "text": None} for _ in sizes] + [{"type": "video", "text": None} for _ in videos]
    sample["messages"][0]["content"] = shown + sample["messages"][0]["content"]
    sample["images"] = [tiny.picture(seed + number, *size) for number, size in enumerate(sizes)]
    sample["videos"] = [[tiny.picture(100 * seed + frame, 40, 50) for frame in range(number)] for number in videos]
    return sample


def save_backbones(folder: Path) -> tuple[Path, Path]:
    """Folders of a vision tower and of a language model."""

    def config_of(kind, values):
        return kind(**{name: value for name, value in values.items() if name != "model_type"})

    vision, text = folder / "vision", folder / "text"
    AutoModel.from_config(config_of(CLIPVisionConfig, tiny.VISION_CONFIGS["clip"])).save_pretrained(vision)
    tiny.build_image_processor().save_pretrained(vision)
    AutoModelForCausalLM.from_config(config_of(LlamaConfig, tiny.TEXT_CONFIGS["llama"])).save_pretrained(text)
    tiny.build_tokenizer(with_image_token=False).save_pretrained(text)
    return vision, text


def arguments(model: Path, data: Path, output_dir: Path, config: str | None = None, **kwargs) -> list[str]:
    """The command line of a short run on CPU in float32."""
    settings = {
        "model_name_or_path": model,
        "data_path": data,
        "output_dir": output_dir,
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "warmup_steps": 0,
        "logging_steps": 1,
        "dataloader_num_workers": 0,
        "dataset_num_proc": 1,
        "use_cpu": True,
        "bf16": False,
        "dtype": "float32",
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "steps" if "save_steps" in kwargs else "no",
    } | kwargs
    words = [] if config is None else ["--config", str(CONFIGS / config)]
    for name, value in settings.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def parse(words: list[str]):
    return TrlParser((DecoArguments, DecoSFTConfig, ModelConfig)).parse_args_and_config(words)


def run(model: Path, data: Path, output_dir: Path, config: str | None = None, **kwargs):
    """Run the recipe in this process; returns its trainer."""
    return sft.main(*parse(arguments(model, data, output_dir, config, **kwargs)))


def launch(
    words: list[str], launcher=(sys.executable,), timeout: float = 600, extra_environment=None, script: str = "sft.py"
) -> subprocess.CompletedProcess:
    """Run a recipe's script in its own process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CI": "1"} | (extra_environment or {})
    script = RECIPES / script
    return subprocess.run(
        [*launcher, str(script), *words], env=environment, capture_output=True, text=True, timeout=timeout
    )


def launch_on_cpus(
    words: list[str], config: str, mixed_precision: str = "no", num_processes: int = 2, script: str = "sft.py"
) -> subprocess.CompletedProcess:
    """Run the script as `accelerate launch --config_file` would, in CPU processes that talk over gloo.

    accelerate itself starts several processes for GPUs alone, so its reading of the file is handed to torchrun.
    """
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    command = ["--config_file", str(ACCELERATE_CONFIGS / config), "--num_processes", str(num_processes), "unused"]
    parsed, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    environment = prepare_multi_gpu_env(parsed)
    environment |= {"ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": mixed_precision}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    if parsed.use_fsdp:
        launcher.append(str(Path(__file__).with_name("fsdp_on_cpu.py")))
    return launch(words, launcher, extra_environment=environment, script=script)
