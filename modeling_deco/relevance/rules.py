# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""How relevance goes through the layers of a model.

GAE (Chefer et al. 2021, arXiv 2103.15679) composed over the projector, after the R-GAE of the DeCo paper (arXiv
2405.20985). Each attention is weighted by the gradient of the answer token's score, `A = mean over heads of max(0,
gradient * attention)`. Relevance R starts as the identity, and each layer updates it by `R += A R`. The score is the
margin of the token's logit over the best other logit (contrastive explanations, arXiv 2202.10419): logits have a
meaning only relative to each other, and what raises all of them explains none of them.

The projector stands between the vision tower and the language model. Its type decides the rule:

- "avg_pool", "mlp": the pooling is linear and known, so its matrix is exact (`maps.token_matrix`). The MLP works on
  each token by itself and adds nothing.
- "qformer": GAE's rules for self-attention among the queries and for cross-attention from queries to patches.
- "resampler": the rule for self-attention over patches and latents together, of which only the latents are updated.
- "c_abstractor", "d_abstractor": gradient x input, because convolutions and sampled attention have no attention map.

A convolutional vision tower has no attention either. Its patches are the cells of its last feature map. Within the
window of a token, cells are weighted by gradient x input (as in Grad-CAM, arXiv 1610.02391), so a cell whose features
speak for the answer stands out from its window. A cell is shown where it is in the map; it sees pixels around it too.

A picture of several views has several maps (`views.py`). Each view goes through the vision tower by itself, so the
relevance of a map's patches goes back through the towers of its views, and comes to patches of the same views.
"""

import torch

from .forward import ForwardPass, MapTokens
from .maps import join_maps, token_matrix

POOLING = ("avg_pool", "mlp")
ABSTRACTORS = ("c_abstractor", "d_abstractor")


def explain_by_gae(run: ForwardPass, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute Text-to-Query `(num_queries,)` and Query-to-Patch `(num_queries, num_patches)` of one token."""
    call = run.projector
    attentions = [*run.tower, *call.attentions, *run.language]
    features = [call.image_features] if run.projector_type in ABSTRACTORS else []
    if run.feature_map is not None and run.projector_type in POOLING:
        features = [run.feature_map]
    gradients = torch.autograd.grad(run.margins[index], [*attentions, *features], retain_graph=True, allow_unused=True)
    maps = [_weigh(attention, gradient) for attention, gradient in zip(attentions, gradients, strict=False)]
    num_tower, num_language = len(run.tower), len(run.language)
    tower, projector, language = maps[:num_tower], maps[num_tower:-num_language], maps[-num_language:]
    projector, language = [layer[0] for layer in projector], [layer[0] for layer in language]

    position = torch.eye(language[0].shape[-1])[run.positions[index]]
    text_to_query = _propagate(position, language)[run.queries]
    query_to_patch = []
    for tokens in run.maps:
        if run.projector_type == "qformer":
            relevance = _qformer_relevance(projector, call.is_cross, _normalized_tower(tokens, tower))
        elif run.projector_type == "resampler":
            relevance = _through_tower(_resampler_relevance(projector), tokens, tower)
        elif run.projector_type in ABSTRACTORS:
            shares = _gradient_times_input(call.image_features, call.patch_features, gradients[-1])
            relevance = _through_tower(shares, tokens, tower)
        elif run.feature_map is not None:
            cells = _cell_relevance(run.feature_map, gradients[-1])[tokens.patches]
            relevance = _weigh_cells(token_matrix(tokens.token_map), cells)
        else:
            relevance = _through_tower(token_matrix(tokens.token_map), tokens, tower)
        query_to_patch.append(relevance)
    return text_to_query, join_maps(query_to_patch, run.token_maps)


def explain_by_attention(run: ForwardPass, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the baseline's Text-to-Query and Query-to-Patch of one token."""
    call = run.projector
    rows = [attention[0, :, run.positions[index]].float().mean(0).cpu() for attention in run.language]
    text_to_query = torch.stack(rows).mean(0)[run.queries]
    if run.projector_type in POOLING:
        return text_to_query, join_maps([token_matrix(token_map) for token_map in run.token_maps], run.token_maps)
    maps = [attention[0].float().mean(0).cpu() for attention in call.attentions]
    if run.projector_type == "qformer":
        maps = [attention_map for attention_map, cross in zip(maps, call.is_cross, strict=True) if cross]
    num_patches = len(run.maps[0].patches)
    return text_to_query, torch.stack(maps).mean(0)[:, :num_patches]


def _weigh(attention: torch.Tensor, gradient: torch.Tensor | None) -> torch.Tensor:
    """Multiply attention by gradient, clamp, then average over heads. Returns `(batch, rows, columns)`."""
    if gradient is None:  # the score does not depend on it
        return torch.zeros(len(attention), *attention.shape[-2:])
    return (attention.detach().float() * gradient.float()).clamp(min=0).mean(1).cpu()


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


def _through_tower(rows: torch.Tensor, tokens: MapTokens, tower: list[torch.Tensor]) -> torch.Tensor:
    """Relevance of a map's patches before the vision tower, from that behind it: `(rows, num_patches)`.

    Args:
        tower: a map `(num_views, tower_tokens, tower_tokens)` for each layer, none if the output is a feature map.
    """
    if not tower:
        return rows
    num_views, num_tower_tokens, _ = tower[0].shape
    reached = torch.zeros(len(rows), num_views * num_tower_tokens)
    reached[:, tokens.patches] = rows
    for view, columns in enumerate(reached.split(num_tower_tokens, dim=1)):
        touched = columns.any(1)  # a token of a stitched map looks at one tile, or at neighbours
        columns[touched] = _propagate(columns[touched], [layer[view] for layer in tower])
    return reached[:, tokens.patches]


def _normalized_tower(tokens: MapTokens, tower: list[torch.Tensor]) -> torch.Tensor:
    """GAE's normalized relevance `(num_patches, num_patches)` of a map's patches in the vision tower."""
    if not tower:
        return torch.eye(len(tokens.patches))
    identity = torch.eye(tower[0].shape[-1])
    views = [_normalize_rows(_propagate(identity, list(layers))) for layers in zip(*tower, strict=True)]
    return torch.block_diag(*views)[tokens.patches][:, tokens.patches]


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


def _cell_relevance(feature_map: torch.Tensor, gradient: torch.Tensor | None) -> torch.Tensor:
    """Gradient x input of each cell of the views' feature maps, clamped, `(num_views * rows * cols,)`."""
    if gradient is None:  # the score does not depend on the picture
        gradient = torch.zeros_like(feature_map)
    return (feature_map.detach().float() * gradient.float()).sum(1).clamp(min=0).flatten().cpu()


def _weigh_cells(shares: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """Shares of cells in tokens, weighted by the relevance of the cells. Rows sum to 1.

    A token of which no cell has relevance keeps the shares of the pooling.
    """
    weighted = _divide_by_sum(shares * cells)
    return torch.where(weighted.any(-1, keepdim=True), weighted, shares)


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
