# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The processor of a converted checkpoint: image processor, tokenizer and chat template."""

import logging
import math

from ..chat_templates import complete_chat_template
from ..inference.folders import check_processor
from ..llava import check_image_processor, check_image_token, choose_video_token, has_processor
from ..processing_deco import DecoProcessor, arguments_of_config
from ..utils.child_process import run_within_limits
from ..utils.errors import as_input_errors
from .chat_template import choose_chat_template, load_chat_template, named_chat_template
from .checkpoints import EMBEDDINGS, LlavaCheckpoint
from .image_processor import load_image_processor
from .tokenizer import load_tokenizer

logger = logging.getLogger(__name__)


def build_processor(checkpoint: LlavaCheckpoint, chat_template: str | None) -> tuple[DecoProcessor | None, str | None]:
    """The processor and the origin of its chat template. The ids of the tokenizer are set in the config."""
    config, source = checkpoint.config, checkpoint.sources["source"]
    if checkpoint.format == "llava-hf" and not has_processor(source.folder):
        logger.warning(
            f"{source.name} has no tokenizer or no image processor, so the converted folder has no processor. Add the "
            f"files to the source and convert again, or save a DecoProcessor to the converted folder."
        )
        num_rows = config.text_config.vocab_size
        config.video_token_id = choose_video_token(None, checkpoint.video_token_id, num_rows, source.name)
        return None, None
    tokenizer = load_tokenizer(checkpoint.tokenizer.folder, checkpoint.extra_tokens)
    image_processor = load_image_processor(checkpoint.image_processor.folder, checkpoint.image_aspect_ratio, config)
    if checkpoint.format == "llava-hf":
        with as_input_errors():
            check_image_token(tokenizer, config.image_token_id, source.name)
    with as_input_errors():
        check_image_processor(image_processor, config, source.name)
        config.video_token_id = choose_video_token(tokenizer, checkpoint.video_token_id, math.inf, source.name)
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    num_rows = checkpoint.tensors[EMBEDDINGS[0]].shape[0]
    if len(tokenizer) > num_rows:
        num_rows = math.ceil(len(tokenizer) / 64) * 64
    config.image_token_id, config.text_config.vocab_size = image_token_id, num_rows
    config.text_config.pad_token_id = tokenizer.pad_token_id
    use_im_start_end = "<im_start>" in checkpoint.extra_tokens
    if chat_template is not None:
        template, origin = named_chat_template(chat_template, use_im_start_end), chat_template
    else:
        loaded = load_chat_template(checkpoint.tokenizer.folder, tokenizer)

        def choose() -> tuple[str, str]:
            chosen, origin = choose_chat_template(loaded, tokenizer, config.text_config.model_type, use_im_start_end)
            return complete_chat_template(chosen, **tokenizer.special_tokens_map), origin

        with as_input_errors():
            run_within_limits(choose, f"The chat template of {source.name}")
        template, origin = choose()
    tokenizer.chat_template = template  # it may replace several named templates
    processor = DecoProcessor(image_processor, tokenizer, chat_template=template, **arguments_of_config(config))
    with as_input_errors():
        check_processor(processor, source.name)
    return processor, origin
