# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Replacement: the source distribution does not have the generation suite.

Each way to generate must give the tokens that full forward passes without a cache predict.
"""

import torch
from parameterized import parameterized
from tiny import randomize

from modeling_deco.modeling_deco import CACHE_NAME


class GenerationTesterMixin:
    max_new_tokens = 5

    def _model_and_inputs(self):
        """A model and two prompts of different length with an image each; the second is padded."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        config.text_config.eos_token_id = None  # no sequence ends early
        (model_class,) = self.all_generative_model_classes
        model = randomize(model_class(config))
        inputs = {name: value[:2] for name, value in inputs.items()}
        inputs["input_ids"][1] = inputs["input_ids"][1].roll(2)
        inputs["input_ids"][1, :2] = config.text_config.pad_token_id
        inputs["attention_mask"][1, :2] = 0
        return model, inputs

    def _generate(self, model, inputs, **kwargs):
        kwargs = {"max_new_tokens": self.max_new_tokens, "do_sample": False, **kwargs}
        # a generated placeholder would ask for an image or a video
        kwargs["bad_words_ids"] = [[token] for token in self.model_tester.placeholders]
        return model.generate(**inputs, **kwargs, return_dict_in_generate=True, output_scores=True, output_logits=True)

    def _logits(self, model, inputs, sequences):
        """`(batch, new tokens, vocabulary)`: what one forward pass over all of `sequences` predicts for its end."""
        repeats = len(sequences) // len(inputs["input_ids"])
        inputs = {name: value.repeat_interleave(repeats, 0) for name, value in inputs.items()}
        num_new_tokens = sequences.shape[1] - inputs["input_ids"].shape[1]
        new_mask = torch.ones(len(sequences), num_new_tokens, dtype=torch.long)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], new_mask], dim=1)
        if model.config.image_positions == "sequence":  # the other positions are computed in `forward`
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = model(**{**inputs, "input_ids": sequences}, use_cache=False).logits
        return logits[:, -num_new_tokens - 1 : -1]

    def _assert_greedy(self, model, inputs, sequences):
        logits = self._logits(model, inputs, sequences)
        logits[..., list(self.model_tester.placeholders)] = -torch.inf
        new_tokens = sequences[:, -logits.shape[1] :]
        assert new_tokens.tolist() == logits.argmax(-1).tolist()

    @parameterized.expand(
        [
            ("cache", {}),
            ("no_cache", {"use_cache": False}),
            ("static_cache", {"cache_implementation": "static"}),
            ("logits_of_all_positions", {"logits_to_keep": 0}),
        ]
    )
    def test_generate_greedily(self, name, kwargs):
        model, inputs = self._model_and_inputs()
        output = self._generate(model, inputs, **kwargs)
        assert output.sequences.shape[1] == inputs["input_ids"].shape[1] + self.max_new_tokens
        self._assert_greedy(model, inputs, output.sequences)
        expected = self._logits(model, inputs, output.sequences)
        torch.testing.assert_close(torch.stack(output.logits, dim=1), expected, atol=1e-4, rtol=1e-4)

    def test_generate_sample(self):
        model, inputs = self._model_and_inputs()
        output = self._generate(model, inputs, do_sample=True, num_return_sequences=3)
        assert len(output.sequences) == 3 * len(inputs["input_ids"])
        expected = self._logits(model, inputs, output.sequences)
        torch.testing.assert_close(torch.stack(output.logits, dim=1), expected, atol=1e-4, rtol=1e-4)

    @parameterized.expand([("search", False), ("sample", True)])
    def test_generate_beam(self, name, do_sample):
        model, inputs = self._model_and_inputs()
        output = self._generate(
            model, inputs, do_sample=do_sample, num_beams=3, num_return_sequences=2, length_penalty=0.0
        )
        logits = self._logits(model, inputs, output.sequences)
        new_tokens = output.sequences[:, -self.max_new_tokens :, None]
        log_probabilities = logits.log_softmax(-1).gather(-1, new_tokens).sum((1, 2))
        if not do_sample:  # where sampled, scores are of warped logits
            torch.testing.assert_close(output.sequences_scores, log_probabilities, atol=1e-4, rtol=1e-4)

    @parameterized.expand([("assistant", True), ("prompt_lookup", False)])
    def test_generate_assisted_decoding(self, name, with_assistant):
        model, inputs = self._model_and_inputs()
        inputs = {name: value[:1] for name, value in inputs.items()}  # it takes one prompt at a time
        kwargs = {"assistant_model": model} if with_assistant else {"prompt_lookup_num_tokens": 2}
        self._assert_greedy(model, inputs, self._generate(model, inputs, **kwargs).sequences)

    def test_generate_inputs_embeds(self):
        model, inputs = self._model_and_inputs()
        embeds = {**inputs, "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]).detach()}
        del embeds["input_ids"]
        for num_beams in (1, 2):
            expected = self._generate(model, inputs, num_beams=num_beams).sequences[:, -self.max_new_tokens :]
            assert self._generate(model, embeds, num_beams=num_beams).sequences.tolist() == expected.tolist()

    def test_generate_continued_with_its_cache(self):
        model, inputs = self._model_and_inputs()
        first = self._generate(model, inputs, max_new_tokens=2)
        new_mask = torch.ones(len(first.sequences), 2, dtype=torch.long)
        rest = {
            "input_ids": first.sequences,
            "attention_mask": torch.cat([inputs["attention_mask"], new_mask], dim=1),
            CACHE_NAME: first[CACHE_NAME],
        }
        output = self._generate(model, rest, max_new_tokens=self.max_new_tokens - 2)
        self._assert_greedy(model, inputs, output.sequences)

    def test_generate_without_inputs(self):
        model, _ = self._model_and_inputs()
        output = self._generate(model, {})
        assert output.sequences[:, 0].tolist() == [model.config.text_config.bos_token_id]

    def test_generate_text_only(self):
        model, inputs = self._model_and_inputs()
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        for token in self.model_tester.placeholders:
            inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == token, 5)
        self._assert_greedy(model, inputs, self._generate(model, inputs).sequences)

    def test_generate_outputs_of_each_step(self):
        model, inputs = self._model_and_inputs()
        model.set_attn_implementation("eager")
        output = self._generate(model, inputs, output_attentions=True, output_hidden_states=True)
        config, prompt_length = model.config.text_config, inputs["input_ids"].shape[1]
        for step in range(self.max_new_tokens):
            new, seen = (prompt_length, prompt_length) if step == 0 else (1, prompt_length + step)
            assert len(output.attentions[step]) == config.num_hidden_layers
            assert output.attentions[step][0].shape == (2, config.num_attention_heads, new, seen)
            assert len(output.hidden_states[step]) == config.num_hidden_layers + 1
            assert output.hidden_states[step][0].shape == (2, new, config.hidden_size)
        assert output[CACHE_NAME].get_seq_length() == prompt_length + self.max_new_tokens - 1
