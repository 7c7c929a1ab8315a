# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
# The public names of modeling_deco.training.answer.

from .answerer import Answered as Answered
from .answerer import Answerer as Answerer
from .engines import TransformersEngine as TransformersEngine
from .engines import VLLMEngine as VLLMEngine
from .run import answer_data as answer_data
