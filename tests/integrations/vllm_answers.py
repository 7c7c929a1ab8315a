# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""vLLM's greedy answers: `python vllm_answers.py REQUESTS ANSWERS`, in an environment that has vLLM.

Both are JSON files. REQUESTS holds `engine`, the arguments of `vllm.LLM`, and `batches`, lists of requests that are
answered together: a `prompt`, paths of `images` and, where it has any, `mm_processor_kwargs`. ANSWERS has the answer
to each request of each batch, `num_prompt_tokens` and `token_ids`, or in the place of a batch its error as text.
"""

import json
import sys
from pathlib import Path

from PIL import Image
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMClientError


def main(requests_file: str, answers_file: str) -> None:
    case = json.loads(Path(requests_file).read_text())
    llm = LLM(**case["engine"])
    image_token_id = llm.llm_engine.model_config.hf_config.image_token_id  # which transformers' generate suppresses
    greedy = SamplingParams(temperature=0.0, max_tokens=16, logit_bias={image_token_id: -100.0})
    answers = []
    for batch in case["batches"]:
        prompts = [
            {
                "prompt": request["prompt"],
                "multi_modal_data": {"image": [Image.open(path) for path in request["images"]]},
                "mm_processor_kwargs": request["mm_processor_kwargs"],
            }
            for request in batch
        ]
        try:
            outputs = llm.generate(prompts, greedy, use_tqdm=False)
        except (ValueError, VLLMClientError) as error:
            answers.append(str(error.__cause__ or error))
            continue
        answers.append(
            [
                {"num_prompt_tokens": len(output.prompt_token_ids), "token_ids": list(output.outputs[0].token_ids)}
                for output in outputs
            ]
        )
    Path(answers_file).write_text(json.dumps(answers))


if __name__ == "__main__":  # vLLM's processes import this module
    main(*sys.argv[1:])
