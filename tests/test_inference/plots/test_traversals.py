"""The figure of what each latent of a decoder does."""

import pytest
import torch

from inference.plots import traversal_figure
from zoo import LinearVAE


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LinearVAE(6, 3).double()


def test_each_row_moves_one_latent_alone(model):
    centre = torch.randn(3).double()
    axes = traversal_figure(model.decode, centre, reach=1.5, number=5, image=(2, 3)).axes
    assert len(axes) == 15
    for row in range(3):
        for column, offset in enumerate((-1.5, -0.75, 0.0, 0.75, 1.5)):
            z = centre.clone()
            z[row] += offset
            shown = torch.as_tensor(axes[5 * row + column].images[0].get_array().data)
            torch.testing.assert_close(shown.flatten(), model.decode(z.unsqueeze(0))[0].detach())
    assert {ax.images[0].get_clim() for ax in axes} == {axes[0].images[0].get_clim()}


def test_latents_have_reaches_of_their_own_and_images_colours():
    centre, reach = torch.full((3,), 0.2).double(), torch.tensor([0.5, 1.0, 2.0]).double()
    decode = lambda z: z.repeat_interleave(2, -1)  # noqa: E731  # (3, 1, 2): a latent is a colour
    axes = traversal_figure(decode, centre, reach=reach, number=3, image=(3, 1, 2), latents=[2, 0]).axes
    drawn = torch.stack([torch.as_tensor(ax.images[0].get_array().data) for ax in axes])  # (6, 1, 2, 3)
    expected = torch.tensor(
        [[0.2, 0.2, 0.0], [0.2, 0.2, 0.2], [0.2, 0.2, 1.0], [0.0, 0.2, 0.2], [0.2] * 3, [0.7, 0.2, 0.2]]
    )
    torch.testing.assert_close(drawn, expected.double()[:, None, None].expand(6, 1, 2, 3))
    assert [ax.get_xlabel() for ax in axes] == ["-2.00", "+0.00", "+2.00", "-0.50", "+0.00", "+0.50"]


def test_curves_stand_for_data_that_are_no_images(model):
    (ax,) = traversal_figure(model.decode, torch.zeros(3).double(), number=3, latents=[1]).axes
    ends = model.decode(torch.tensor([[0.0, -2.5, 0.0], [0.0, 2.5, 0.0]]).double()).detach()
    drawn = torch.stack([torch.as_tensor(line.get_ydata()) for line in ax.lines])
    torch.testing.assert_close(drawn[[0, -1]], ends)
    assert ax.get_title() == "$z_{2}$ by -2.5 to +2.5"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"centre": torch.zeros(1, 3)}, r"expected a centre of shape \(K,\)"),
        ({"latents": [3]}, r"latents of 0 to K - 1 .* got \(3,\), \[3\]"),
        ({"latents": []}, "expected a centre of shape"),
        ({"reach": 0.0}, "positive reach"),
        ({"reach": torch.ones(2)}, "positive reach, one or K"),
        ({"image": (2, 3, 1)}, "height and width of 6 pixels"),
        ({"reach": float("nan")}, "positive reach"),
        ({"number": 1}, "number"),
        ({"image": (2, 2)}, r"height and width of 6 pixels, got \(2, 2\)"),
        ({"image": (6,)}, "height and width of 6 pixels"),
    ],
)
def test_bad_arguments_are_named(model, changed, message):
    with pytest.raises(ValueError, match=message):
        traversal_figure(model.decode, **{"centre": torch.zeros(3).double(), **changed})
