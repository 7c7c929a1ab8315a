# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The pooling against a mean over windows written out by hand, and the projector taken alone."""

import math

import pytest
import torch
from transformers import LlavaConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from modeling_deco import AvgPoolProjector, pool_patch_grid

# (patch grid, pooled grid)
GRIDS = [
    ((6, 6), (3, 3)),  # divides
    ((24, 24), (12, 12)),  # DeCo's
    ((24, 24), (8, 8)),
    ((6, 6), (1, 1)),
    ((6, 6), (6, 1)),
    ((7, 7), (3, 3)),  # does not divide: windows overlap
    ((5, 5), (4, 4)),
    ((6, 6), (2, 3)),  # pooled grid not square
    ((4, 9), (2, 3)),  # patch grid not square
    ((9, 4), (2, 3)),
    ((5, 8), (3, 5)),
    ((1, 7), (1, 2)),
]


def windows(size: int, num_cells: int) -> list[range]:
    """The patches that each cell of one axis averages: from the floor of its start to the ceiling of its end."""
    return [
        range(math.floor(cell * size / num_cells), math.ceil((cell + 1) * size / num_cells))
        for cell in range(num_cells)
    ]


def mean_over_windows(patch_features, patch_grid, pooled_grid):
    num_images, _, hidden_size = patch_features.shape
    cells = []
    for window_rows in windows(patch_grid[0], pooled_grid[0]):
        for window_cols in windows(patch_grid[1], pooled_grid[1]):
            total = torch.zeros(num_images, hidden_size, dtype=patch_features.dtype)
            for row in window_rows:
                for col in window_cols:
                    total = total + patch_features[:, row * patch_grid[1] + col]
            cells.append(total / (len(window_rows) * len(window_cols)))
    return torch.stack(cells, dim=1)


def random_patches(patch_grid, num_images=2, hidden_size=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num_images, patch_grid[0] * patch_grid[1], hidden_size, generator=generator).to(dtype)


# --- pooling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("patch_grid", "pooled_grid"), GRIDS)
def test_pooling_is_the_mean_over_windows(patch_grid, pooled_grid):
    patches = random_patches(patch_grid)
    expected = mean_over_windows(patches, patch_grid, pooled_grid)
    torch.testing.assert_close(pool_patch_grid(patches, patch_grid, pooled_grid), expected)


@pytest.mark.parametrize(("patch_grid", "pooled_grid"), GRIDS)
def test_gradients_are_those_of_the_mean_over_windows(patch_grid, pooled_grid):
    patches = random_patches(patch_grid).requires_grad_()
    weight = random_patches(pooled_grid)
    (gradient,) = torch.autograd.grad((pool_patch_grid(patches, patch_grid, pooled_grid) * weight).sum(), patches)
    expected = mean_over_windows(patches, patch_grid, pooled_grid)
    (expected_gradient,) = torch.autograd.grad((expected * weight).sum(), patches)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("patch_grid", [(6, 6), (4, 9), (1, 1)])
def test_pooling_to_the_patch_grid_is_the_identity(patch_grid):
    patches = random_patches(patch_grid)
    assert pool_patch_grid(patches, patch_grid, patch_grid) is patches


@pytest.mark.parametrize(("patch_grid", "pooled_grid"), GRIDS)
def test_a_changed_patch_changes_the_cells_whose_windows_hold_it_and_no_other(patch_grid, pooled_grid):
    patches = random_patches(patch_grid, num_images=1)
    before = pool_patch_grid(patches, patch_grid, pooled_grid)
    for row in range(patch_grid[0]):
        for col in range(patch_grid[1]):
            changed = patches.clone()
            changed[0, row * patch_grid[1] + col] += 1
            found = (pool_patch_grid(changed, patch_grid, pooled_grid) != before).any(-1)[0].view(pooled_grid)
            rows = torch.tensor([row in window for window in windows(patch_grid[0], pooled_grid[0])])
            cols = torch.tensor([col in window for window in windows(patch_grid[1], pooled_grid[1])])
            assert torch.equal(found, rows[:, None] & cols)


@pytest.mark.parametrize("num_images", [1, 2])
@pytest.mark.parametrize(("patch_grid", "pooled_grid"), GRIDS)
def test_pooled_patches_are_contiguous(patch_grid, pooled_grid, num_images):
    assert pool_patch_grid(random_patches(patch_grid, num_images), patch_grid, pooled_grid).is_contiguous()


@pytest.mark.parametrize(("patch_grid", "pooled_grid"), [((6, 6), (3, 3)), ((7, 7), (3, 3)), ((4, 9), (2, 3))])
def test_pooling_in_bfloat16_is_the_rounded_mean(patch_grid, pooled_grid):
    patches = random_patches(patch_grid, dtype=torch.bfloat16)
    pooled = pool_patch_grid(patches, patch_grid, pooled_grid)
    assert pooled.dtype == torch.bfloat16
    torch.testing.assert_close(pooled, mean_over_windows(patches.double(), patch_grid, pooled_grid).bfloat16())


def test_images_do_not_mix():
    patches = random_patches((6, 6), num_images=3)
    pooled = pool_patch_grid(patches, (6, 6), (4, 4))
    for image in range(3):
        assert torch.equal(pooled[image : image + 1], pool_patch_grid(patches[image : image + 1], (6, 6), (4, 4)))


@pytest.mark.parametrize(("pooled_grid", "message"), [((7, 6), "7 x 6"), ((6, 7), "6 x 7"), ((1, 7), "1 x 7")])
def test_a_grid_larger_than_the_patches_is_refused(pooled_grid, message):
    with pytest.raises(ValueError, match=f"{message} is larger than the 6 x 6 patches of the image"):
        pool_patch_grid(random_patches((6, 6)), (6, 6), pooled_grid)


def test_patches_that_do_not_fill_the_grid_are_refused():
    with pytest.raises(ValueError, match="37 patch features do not fill a grid of 6 x 6 = 36 patches"):
        pool_patch_grid(torch.zeros(1, 37, 5), (6, 6), (3, 3))


# --- the projector taken alone ---------------------------------------------------------------------------------------


def test_the_projector_has_the_parameters_of_llava():
    config = LlavaConfig(vision_config={"hidden_size": 24}, text_config={"model_type": "llama", "hidden_size": 64})
    ours = {name: value.shape for name, value in AvgPoolProjector(24, 64).state_dict().items()}
    assert ours == {name: value.shape for name, value in LlavaMultiModalProjector(config).state_dict().items()}


@pytest.mark.parametrize("grid", [1, 12, (2, 3)])
def test_the_grid_adds_no_state(grid):
    assert AvgPoolProjector(8, 12, grid).state_dict().keys() == AvgPoolProjector(8, 12, 3).state_dict().keys()


def test_the_projector_pools_before_the_mlp():
    projector = AvgPoolProjector(5, 12, pooled_grid_size=3).double()
    patches = random_patches((6, 6))
    pooled = mean_over_windows(patches, (6, 6), (3, 3))
    hidden = torch.nn.functional.gelu(pooled @ projector.linear_1.weight.T + projector.linear_1.bias)
    expected = hidden @ projector.linear_2.weight.T + projector.linear_2.bias
    torch.testing.assert_close(projector(patches), expected)


def test_the_grid_of_a_call_takes_the_place_of_the_default():
    projector = AvgPoolProjector(5, 12, pooled_grid_size=3).double()
    assert projector(random_patches((6, 6)), pooled_grid=(2, 4)).shape == (2, 8, 12)


def test_patches_that_are_not_square_need_their_grid():
    projector = AvgPoolProjector(5, 12, pooled_grid_size=(2, 3)).double()
    with pytest.raises(ValueError, match=r"40 patches are not square; pass patch_grid=\(rows, cols\)"):
        projector(random_patches((5, 8)))
    assert projector(random_patches((5, 8)), patch_grid=(5, 8)).shape == (2, 6, 12)


@pytest.mark.parametrize("num_layers", [1, 2, 4])
def test_the_mlp_has_the_layers_that_were_asked_for(num_layers):
    projector = AvgPoolProjector(5, 12, pooled_grid_size=3, num_layers=num_layers, bias=False)
    names = [f"linear_{index + 1}.weight" for index in range(num_layers)]
    assert list(projector.state_dict()) == names
    assert projector(random_patches((6, 6), dtype=torch.float32)).shape == (2, 9, 12)


def test_one_linear_layer_has_no_activation():
    projector = AvgPoolProjector(5, 12, pooled_grid_size=3, num_layers=1).double()
    patches = random_patches((6, 6))
    expected = mean_over_windows(patches, (6, 6), (3, 3)) @ projector.linear_1.weight.T + projector.linear_1.bias
    torch.testing.assert_close(projector(patches), expected)


def test_the_activation_is_the_one_asked_for():
    relu, gelu = AvgPoolProjector(5, 12, 3, hidden_act="relu"), AvgPoolProjector(5, 12, 3)
    gelu.load_state_dict(relu.state_dict())
    patches = random_patches((6, 6), dtype=torch.float32)
    hidden = relu.linear_1(pool_patch_grid(patches, (6, 6), (3, 3)))
    torch.testing.assert_close(relu(patches), relu.linear_2(hidden.clamp(min=0)))
    assert not torch.equal(relu(patches), gelu(patches))


@pytest.mark.parametrize("grid", [0, -1, True, 2.5, "3", (3,), (3, 3, 3), (3, 0), (3.0, 3), (True, 3), None])
def test_a_malformed_grid_is_refused(grid):
    with pytest.raises(ValueError, match=r"a positive int .* or two positive ints \[rows, cols\], got "):
        AvgPoolProjector(5, 12, pooled_grid_size=grid)


def test_gradients_reach_the_patches_and_every_parameter():
    projector = AvgPoolProjector(5, 12, pooled_grid_size=4).double()
    patches = random_patches((6, 6)).requires_grad_()
    projector(patches).square().sum().backward()
    assert (patches.grad != 0).any(-1).all()
    assert all(parameter.grad.abs().sum() > 0 for parameter in projector.parameters())


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match=r"projector_hidden_act='steep' is no activation of transformers"):
        AvgPoolProjector(8, 8, hidden_act="steep")
