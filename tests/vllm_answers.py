# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""vLLM's greedy answers: `python vllm_answers.py REQUESTS ANSWERS`, in an environment that has vLLM.

Both are JSON files. REQUESTS holds `engine`, the arguments of `vllm.LLM`, and `batches`, lists of requests that are
answered together: a `prompt`, paths of `images` and, for a grid of its own, `mm_processor_kwargs`. ANSWERS has for
each batch either the token ids of each request or, where vLLM refuses one of them, its error as text.
"""

import json
import sys
from pathlib import Path

from PIL import Image
from vllm import LLM, SamplingParams


def main(requests_file: str, answers_file: str) -> None:
    case = json.loads(Path(requests_file).read_text())
    llm = LLM(**case["engine"])
    greedy = SamplingParams(temperature=0.0, max_tokens=16)
    answers = []
    for batch in case["batches"]:
        prompts = [
            {
                "prompt": request["prompt"],
                "multi_modal_data": {"image": [Image.open(path) for path in request["images"]]},
                "mm_processor_kwargs": request.get("mm_processor_kwargs", {}),
            }
            for request in batch
        ]
        try:
            outputs = llm.generate(prompts, greedy, use_tqdm=False)
        except (TypeError, ValueError) as error:  # the request's fault: the engine must answer the next batch
            answers.append(str(error))
            continue
        answers.append([list(output.outputs[0].token_ids) for output in outputs])
    Path(answers_file).write_text(json.dumps(answers))


if __name__ == "__main__":  # vLLM's processes import this module
    main(*sys.argv[1:])
