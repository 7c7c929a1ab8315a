# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""How relevance goes through the layers of a model.

GAE (Chefer et al. 2021, arXiv 2103.15679) composed over the projector, after the R-GAE of the DeCo paper (arXiv
2405.20985). Each attention is weighted by the gradient of the answer token's score, `A = mean over heads of max(0,
gradient * attention)`. Relevance R starts as the identity, and each layer updates it by `R += A R`. The score is the
margin of the token's logit over the best other logit (contrastive explanations, arXiv 2202.10419): logits have a
meaning only relative to each other, and what raises all of them explains none of them.

The projector stands between the vision tower and the language model. Its type decides the rule:

- "avg_pool", "mlp": the pooling is linear and known, so its matrix is exact. The MLP works on each token by itself and
  adds nothing.
- "qformer": GAE's rules for self-attention among the queries and for cross-attention from queries to patches.
- "resampler": the rule for self-attention over patches and latents together, of which only the latents are updated.
- "c_abstractor", "d_abstractor": gradient x input, because convolutions and sampled attention have no attention map.
"""

import torch

from ..projectors import pool_patch_grid
from .forward import ForwardPass, ProjectorCall

POOLING = ("avg_pool", "mlp")


def explain_by_gae(run: ForwardPass, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute Text-to-Query `(num_queries,)` and Query-to-Patch `(num_queries, num_patches)` of one token."""
    call = run.projector
    attentions = [*run.tower, *call.attentions, *run.language]
    *gradients, feature_gradient = torch.autograd.grad(
        run.margins[index], [*attentions, call.image_features], retain_graph=True, allow_unused=True
    )
    maps = [_weigh(attention, gradient) for attention, gradient in zip(attentions, gradients, strict=True)]
    num_tower, num_language = len(run.tower), len(run.language)
    tower, projector, language = maps[:num_tower], maps[num_tower:-num_language], maps[-num_language:]

    position = torch.eye(language[0].shape[-1])[run.positions[index]]
    text_to_query = _propagate(position, language)[run.queries]
    num_tower_tokens = tower[0].shape[-1]
    if run.projector_type == "qformer":
        tower_relevance = _normalize_rows(_propagate(torch.eye(num_tower_tokens), tower))
        return text_to_query, _qformer_relevance(projector, call.is_cross, tower_relevance[run.patches, run.patches])
    if run.projector_type in POOLING:
        query_to_patch = _pooling_matrix(call)
    elif run.projector_type == "resampler":
        query_to_patch = _resampler_relevance(projector)
    else:
        query_to_patch = _gradient_times_input(call.image_features, call.patch_features, feature_gradient)
    query_to_token = torch.zeros(len(query_to_patch), num_tower_tokens)
    query_to_token[:, run.patches] = query_to_patch
    return text_to_query, _propagate(query_to_token, tower)[:, run.patches]


def explain_by_attention(run: ForwardPass, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the baseline's Text-to-Query and Query-to-Patch of one token."""
    call = run.projector
    rows = [attention[0, :, run.positions[index]].float().mean(0).cpu() for attention in run.language]
    text_to_query = torch.stack(rows).mean(0)[run.queries]
    if run.projector_type in POOLING:
        return text_to_query, _pooling_matrix(call)
    maps = [attention[0].float().mean(0).cpu() for attention in call.attentions]
    if run.projector_type == "qformer":
        maps = [attention_map for attention_map, cross in zip(maps, call.is_cross, strict=True) if cross]
    num_patches = call.patch_features.shape[1]
    return text_to_query, torch.stack(maps).mean(0)[:, :num_patches]


def _weigh(attention: torch.Tensor, gradient: torch.Tensor | None) -> torch.Tensor:
    """Multiply attention by gradient, clamp, then average over heads. Returns `(rows, columns)`."""
    if gradient is None:  # the score does not depend on it
        return torch.zeros(attention.shape[-2:])
    return (attention.detach().float() * gradient.float()).clamp(min=0).mean(1)[0].cpu()


def _propagate(rows: torch.Tensor, maps: list[torch.Tensor]) -> torch.Tensor:
    """Compute `rows @ R` for the R that starts as the identity and that each layer updates by `R += A R`.

    It goes from the last layer to the first: a layer then costs `rows * tokens ** 2`, not `tokens ** 3`.
    """
    for attention_map in reversed(maps):
        rows = rows + rows @ attention_map
    return rows


def _normalize_rows(relevance: torch.Tensor) -> torch.Tensor:
    """GAE's normalization: scale each row of what was added to the identity to a sum of 1; zero rows stay zero."""
    identity = torch.eye(len(relevance))
    return _divide_by_sum(relevance - identity) + identity


def _divide_by_sum(rows: torch.Tensor) -> torch.Tensor:
    mass = rows.sum(-1, keepdim=True)
    return rows / mass.where(mass > 0, 1)


def _pooling_matrix(call: ProjectorCall) -> torch.Tensor:
    """Share of each patch in each pooled feature, `(num_queries, num_patches)`."""
    num_patches = call.patch_grid[0] * call.patch_grid[1]
    return pool_patch_grid(torch.eye(num_patches)[None], call.patch_grid, call.pooled_grid)[0]


def _qformer_relevance(maps: list[torch.Tensor], is_cross: list[bool], patch_relevance: torch.Tensor) -> torch.Tensor:
    num_queries = maps[0].shape[0]
    query_to_query = torch.eye(num_queries)
    query_to_patch = torch.zeros(num_queries, len(patch_relevance))
    for attention_map, cross in zip(maps, is_cross, strict=True):
        if cross:
            added = _normalize_rows(query_to_query).T @ attention_map @ patch_relevance
            query_to_patch = query_to_patch + added
        else:
            query_to_patch = query_to_patch + attention_map @ query_to_patch
            query_to_query = query_to_query + attention_map @ query_to_query
    return query_to_patch


def _resampler_relevance(maps: list[torch.Tensor]) -> torch.Tensor:
    num_queries, num_tokens = maps[0].shape
    num_patches = num_tokens - num_queries
    query_to_patch = torch.zeros(num_queries, num_patches)
    for attention_map in maps:
        to_patches, to_queries = attention_map.split([num_patches, num_queries], dim=1)
        query_to_patch = query_to_patch + to_patches + to_queries @ query_to_patch
    return query_to_patch


def _gradient_times_input(
    image_features: torch.Tensor, patch_features: torch.Tensor, feature_gradient: torch.Tensor
) -> torch.Tensor:
    """Share of each patch in the contribution of each query: `max(0, sum(patch * d(gradient . query) / d patch))`."""
    rows = []
    for query in range(image_features.shape[1]):
        weights = torch.zeros_like(image_features)
        weights[:, query] = feature_gradient[:, query]
        (gradient,) = torch.autograd.grad(image_features, patch_features, weights, retain_graph=True)
        rows.append((patch_features.detach().float() * gradient.float()).sum(-1)[0].clamp(min=0).cpu())
    return _divide_by_sum(torch.stack(rows))
