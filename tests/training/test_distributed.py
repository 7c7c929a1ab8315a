# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Two processes train what one process trains, with DDP and with FSDP2, on CPUs."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("trl")

import tiny_training
from tiny_training import arguments, conversation, launch, launch_on_cpus

pytestmark = [pytest.mark.slow, pytest.mark.enable_socket]  # processes talk over localhost

SETTINGS = {
    "max_steps": 4,
    "save_steps": 2,
    "learning_rate": 1e-3,
    "freeze": "vision_tower",
    "train_sampling_strategy": "sequential",
    "pooled_grid_sizes": [1, 2, 3],
}


def history(output_dir):
    state = json.loads((output_dir / "checkpoint-4" / "trainer_state.json").read_text())
    return [(log["loss"], log["grad_norm"]) for log in state["log_history"] if "loss" in log]


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A checkpoint, data whose second half of each step is text alone, and the run of one process on them."""
    root = tmp_path_factory.mktemp("distributed")
    checkpoint = tiny_training.save_checkpoint(root / "model")
    examples = [conversation(index, num_images=0 if index % 8 > 3 else 1 + index % 2) for index in range(32)]
    data = tiny_training.save_dataset(root / "data", examples)
    words = arguments(checkpoint, data, root / "one", per_device_train_batch_size=8, **SETTINGS)
    result = launch(words)
    assert result.returncode == 0, result.stderr
    return root, checkpoint, data


@pytest.mark.parametrize("config", ["ddp.yaml", "fsdp2.yaml"])
def test_two_processes_have_the_losses_and_the_checkpoint_of_one(config, case):
    root, checkpoint, data = case
    output_dir = root / config
    words = arguments(checkpoint, data, output_dir, per_device_train_batch_size=4, **SETTINGS)
    result = launch_on_cpus(words, config)  # in each step one process has images, and the other has none
    assert result.returncode == 0, result.stderr
    is_sharded = (output_dir / "checkpoint-4" / "optimizer.bin").exists()  # as accelerate writes FSDP's
    assert is_sharded == (config == "fsdp2.yaml")
    torch.testing.assert_close(
        torch.tensor(history(output_dir)), torch.tensor(history(root / "one")), atol=1e-5, rtol=1e-5
    )
    expected, found = (load_file(folder / "model.safetensors") for folder in (root / "one", output_dir))
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-5)

    resumed_dir = root / f"resumed-{config}"
    shutil.copytree(output_dir / "checkpoint-2", resumed_dir / "checkpoint-2")
    words = arguments(
        checkpoint, data, resumed_dir, per_device_train_batch_size=4,
        **SETTINGS, resume_from_checkpoint="latest",
    )  # fmt: skip
    result = launch_on_cpus(words, config)
    assert result.returncode == 0, result.stderr
    assert history(resumed_dir) == history(output_dir)
    resumed = load_file(resumed_dir / "model.safetensors")
    assert all(torch.equal(resumed[name], found[name]) for name in found)


def test_sharded_tied_embeddings_have_the_losses_of_one_process(case):
    root, _, data = case
    checkpoint = tiny_training.save_checkpoint(root / "tied", tied=True)
    for name, size in (("tied-one", 8), ("tied-fsdp2", 4)):
        words = arguments(checkpoint, data, root / name, per_device_train_batch_size=size, **SETTINGS)
        result = launch(words) if size == 8 else launch_on_cpus(words, "fsdp2.yaml")
        assert result.returncode == 0, result.stderr
    one, two = (torch.tensor(history(root / name)) for name in ("tied-one", "tied-fsdp2"))
    torch.testing.assert_close(two, one, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", ["ddp.yaml", "fsdp2.yaml"])
def test_two_processes_train_an_adapter_in_batches_of_one_modality(config, case):
    root, checkpoint, data = case
    template = root / "template.jinja"
    template.write_text(tiny_training.CHAT_TEMPLATE)
    output_dir = root / f"lora-{config}"
    words = arguments(
        checkpoint, data, output_dir, "stage2_lora.yaml", per_device_train_batch_size=2, max_steps=4, save_steps=4,
        chat_template=template, merge_adapter=True, dtype="bfloat16", bf16=True,
    )  # fmt: skip
    result = launch_on_cpus(words, config, mixed_precision="bf16")  # frozen in bfloat16, trained in float32
    assert result.returncode == 0, result.stderr
    assert len(history(output_dir)) == 4
    assert (output_dir / "adapter_model.safetensors").exists()
    merged = load_file(output_dir / "merged" / "model.safetensors")
    start = load_file(checkpoint / "model.safetensors")
    assert merged.keys() == start.keys()
    assert not torch.equal(
        merged["model.multi_modal_projector.linear_1.weight"], start["model.multi_modal_projector.linear_1.weight"]
    )
