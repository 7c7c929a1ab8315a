# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
# The public names of modeling_deco. `__init__.py` reads this file and imports a module when one of its names is used.

import pathlib

from .configuration_deco import DecoConfig as DecoConfig
from .configuration_deco import num_image_tokens as num_image_tokens
from .inference.everyday import default_checkpoint as default_checkpoint
from .inference.everyday import everyday_checkpoint as everyday_checkpoint
from .modeling_deco import DecoForConditionalGeneration as DecoForConditionalGeneration
from .modeling_deco import DecoModel as DecoModel
from .modeling_deco import DecoPreTrainedModel as DecoPreTrainedModel
from .processing_deco import DecoProcessor as DecoProcessor
from .projectors import AvgPoolProjector as AvgPoolProjector
from .projectors import CAbstractorProjector as CAbstractorProjector
from .projectors import DAbstractorProjector as DAbstractorProjector
from .projectors import MlpProjector as MlpProjector
from .projectors import QFormerProjector as QFormerProjector
from .projectors import ResamplerProjector as ResamplerProjector
from .projectors import pool_patch_grid as pool_patch_grid
from .relevance import Relevance as Relevance
from .relevance import explain as explain
from .relevance import plot_relevance as plot_relevance

__version__: str
SHIPPED_CHECKPOINT: pathlib.Path
