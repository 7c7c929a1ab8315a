# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The order of samples: batches of similar length that are all images or all text."""

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback
from transformers.trainer_pt_utils import get_length_grouped_indices  # private, seen in transformers 5.19 to 5.24


class ModalityLengthSampler(Sampler[int]):
    """Random batches of similar length, each with images or without (after LLaVA, llava/train/llava_trainer.py).

    The batch with the longest sample comes first, so that a lack of memory shows at once. Samples that do not fill a
    batch of their modality come last, in mixed batches. The order depends on the seed and the epoch alone.

    Args:
        lengths: of the samples, in tokens.
        has_images: for each sample, whether it has images.
        batch_size: samples of a step, over all processes and accumulated batches.
        seed: of the order.
    """

    def __init__(self, lengths, has_images, batch_size: int, seed: int):
        self.lengths = lengths
        self.has_images = np.array(has_images)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def __len__(self):
        return len(self.lengths)

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        batches, rest = [], []
        for is_multimodal in (True, False):
            samples = np.flatnonzero(self.has_images == is_multimodal).tolist()
            if samples:
                lengths = [self.lengths[sample] for sample in samples]
                order = get_length_grouped_indices(lengths, self.batch_size, generator=generator)
                samples = [samples[position] for position in order]
            num_full = len(samples) // self.batch_size * self.batch_size
            batches += [samples[start : start + self.batch_size] for start in range(0, num_full, self.batch_size)]
            rest += samples[num_full:]
        batches = [batches[position] for position in torch.randperm(len(batches), generator=generator).tolist()]
        longest = [max(self.lengths[sample] for sample in batch) for batch in batches]
        if batches:
            batches.insert(0, batches.pop(int(np.argmax(longest))))
        yield from (sample for batch in [*batches, rest] for sample in batch)


class SetEpoch(TrainerCallback):
    """Sets the sampler's epoch; neither accelerate nor Trainer does so after a resume on several processes."""

    def __init__(self, sampler: ModalityLengthSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.epoch = int(state.epoch or 0)
