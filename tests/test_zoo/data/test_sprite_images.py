"""The sprite renderer against slow rasterisers, and the data set with its factors."""

import colorsys
import math

import numpy as np
import pytest
import torch

from guides import MeanField
from inference import ima_contrast
from zoo import IMAVAE, draw_sources, render_sprites, sprite_pair, sprites
from zoo.data.sprite_images import RANGES

SPRITES = [
    (0.5, 0.5, 0.3, 0.0, 0.0),
    (0.4, 0.6, 0.25, 0.2, 0.5),
    (0.7, 0.3, 0.2, 0.55, -0.7),
    (0.5, 0.45, 0.4, 0.9, 2.0),
]


def corners(x, y, radius, angle):
    """Corners (right, down) of the triangle, the first straight up for angle zero, the others clockwise."""
    turns = [angle + 2 * math.pi * i / 3 for i in range(3)]
    return [(x + radius * math.sin(t), y - radius * math.cos(t)) for t in turns]


def distance_inside(p, a, b):
    """Signed distance of p from the line through a and b, positive on the right of a to b as seen on the screen."""
    length = math.hypot(b[0] - a[0], b[1] - a[1])
    return ((b[0] - a[0]) * (p[1] - a[1]) - (b[1] - a[1]) * (p[0] - a[0])) / length


def rasterise(sprite, size, softness):
    """Pixel by pixel, from the corners: distances to the three sides, and the standard library's colours."""
    x, y, radius, hue, angle = sprite
    a, b, c = corners(x, y, radius, angle)
    image = np.zeros((3, size, size))
    for row in range(size):
        for column in range(size):
            p = ((column + 0.5) / size, (row + 0.5) / size)
            cover = 1.0
            for side in ((a, b), (b, c), (c, a)):
                cover /= 1 + math.exp(-distance_inside(p, *side) / softness)
            image[:, row, column] = np.array(colorsys.hsv_to_rgb(hue, 1, 1)) * cover
    return image


@pytest.mark.parametrize("sprite", SPRITES)
def test_images_are_those_of_a_slow_rasteriser(sprite):
    got = render_sprites(torch.tensor(sprite, dtype=torch.float64), size=20, softness=0.03).reshape(3, 20, 20)
    np.testing.assert_allclose(got.numpy(), rasterise(sprite, 20, 0.03), atol=1e-13)


@pytest.mark.parametrize("sprite", SPRITES)
def test_a_hard_edge_covers_the_area_of_the_triangle(sprite):
    size = 200
    image = render_sprites(torch.tensor(sprite, dtype=torch.float64), size=size, softness=1e-5).reshape(3, size, size)
    radius, rgb = sprite[2], torch.tensor(colorsys.hsv_to_rgb(sprite[3], 1, 1), dtype=torch.float64)
    # A pixel counts wrongly only if a side crosses it: at most a pixel's diagonal along the circumference.
    error = 3 * math.sqrt(3) * radius * math.sqrt(2) / size
    area = 3 * math.sqrt(3) / 4 * radius**2
    assert float((image.mean((1, 2)) - area * rgb).abs().max()) < error
    assert float(image.amax()) <= 1.0
    assert float(image.amin()) >= 0.0


def test_the_triangle_without_an_angle_points_up():
    flat = torch.tensor(SPRITES[0][:4], dtype=torch.float64)
    upright = torch.cat([flat, flat.new_zeros(1)])
    assert torch.equal(render_sprites(flat, size=32), render_sprites(upright, size=32))
    rows = render_sprites(flat, size=32).reshape(3, 32, 32)[0]
    width = (rows > 0.5).sum(1)
    assert width[10] < width[15] < width[18]  # from the corner down to the side


def test_the_picture_moves_and_grows_with_its_factors():
    def moments(factors):
        images = render_sprites(factors, size=32).reshape(-1, 3, 32, 32).sum(1)
        mass = images.sum((1, 2))
        place = (torch.arange(32).double() + 0.5) / 32
        return (images.sum(1) @ place) / mass, (images.sum(2) @ place) / mass, mass

    base = torch.tensor([0.5, 0.5, 0.2, 0.0], dtype=torch.float64).repeat(9, 1)
    for k, (low, high) in enumerate(RANGES[:3]):
        factors = base.clone()
        factors[:, k] = torch.linspace(low, high, 9, dtype=torch.float64)
        assert bool((moments(factors)[k].diff() > 0).all())
    factors = base.clone()
    factors[:, 0] = torch.linspace(0.4, 0.6, 9, dtype=torch.float64)
    # By the symmetry of the triangle, up to what the soft edge loses at the border of the image.
    torch.testing.assert_close(moments(factors)[0], factors[:, 0], atol=1e-4, rtol=0)


def test_gradients_are_right_in_every_factor_and_batch_shape():
    factors = torch.tensor([[SPRITES[1], SPRITES[2]]], dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda f: render_sprites(f, size=6, softness=0.05), factors)
    assert render_sprites(factors, size=6).shape == (1, 2, 108)
    sources = torch.rand(7, 4).double()
    low, high = torch.tensor(RANGES[:4], dtype=torch.float64).T
    assert torch.equal(draw_sources(sources, size=8), render_sprites(low + (high - low) * sources, size=8))


def test_the_factors_make_the_images_and_have_the_stated_prior():
    num = 4000
    data = sprites(num, size=8, a=2.0, b=3.0, test_size=1000, dtype=torch.float64)
    z = torch.cat([data.truth["z"], data.truth["z_test"]])
    assert (len(data.train), len(data.test)) == (3000, 1000)
    assert torch.equal(draw_sources(data.truth["z_test"], size=8), data.test)
    variance = 2 * 3 / (5**2 * 6)
    assert float((z.mean(0) - 0.4).abs().max()) < 4 * math.sqrt(variance / num)
    assert float((z.T.corrcoef() - torch.eye(4)).abs().max()) < 4 / math.sqrt(num)
    again = sprites(num, size=8, a=2.0, b=3.0, test_size=1000, dtype=torch.float64)
    assert torch.equal(again.train, data.train)
    assert sprites(5, size=8, num_factors=5).truth["z"].shape == (5, 5)


def test_the_factors_are_nearly_independent_mechanisms():
    # x and y by the mirror symmetry; hue and size only share the brightness of a colour.
    z = sprites(40, size=32).truth["z"].double()
    contrast = float(ima_contrast(lambda s: draw_sources(s, size=32), z))
    assert 0 <= contrast < 0.1


def test_the_convolutional_pair_fits_the_images_and_the_latents():
    data = sprites(20, size=16)
    model, guide = sprite_pair(data.train, size=16, latent_dim=4, channels=(4, 8))
    assert isinstance(model, IMAVAE)
    assert isinstance(guide, MeanField)
    distribution = guide.posterior(data.train)
    assert distribution.event_shape == (4,)
    assert model(data.train).shape == data.train.shape
    assert bool(((distribution.mean > 0) & (distribution.mean < 1)).all())
    torch.testing.assert_close(model.standardise.shift, data.train.mean(0))


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"expected factors of shape \(..., 4\) or \(..., 5\), got \(2, 3\)"):
        render_sprites(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="expected a positive softness, got 0"):
        render_sprites(torch.zeros(2, 4), softness=0)
    with pytest.raises(ValueError, match="expected test_size below num and 4 or 5 factors, got 5, 5 and 4"):
        sprites(5, test_size=5)
