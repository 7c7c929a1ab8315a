# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Replacement: the source distribution does not have the export suite."""

import torch


class ExportTesterMixin:
    def test_torch_export(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            model = model_class(config).eval()
            exported = torch.export.export(model, (), kwargs={**inputs, "use_cache": False})
            with torch.no_grad():
                outputs, expected = exported.module()(**inputs, use_cache=False), model(**inputs, use_cache=False)
            torch.testing.assert_close(outputs[0], expected[0])
