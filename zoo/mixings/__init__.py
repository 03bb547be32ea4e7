"""Mixings: invertible maps from independent sources to data."""

from zoo.mixings.base import Composition, Inverted, LinearMixing, Mixing
from zoo.mixings.conformal import ComplexExp, ComplexPower, Moebius, Polar
from zoo.mixings.elementwise import AffineCoupling, NormalToLaplace, NormalToUniform, SmoothLeakyReLU
from zoo.mixings.random_maps import (
    affine_coupling_flow,
    column_orthogonal,
    moebius,
    orthogonal,
    orthogonal_mlp,
    shear,
    triangular_mlp,
    unit_determinant,
)
from zoo.mixings.spurious import Darmois, gaussian_darmois, rotated_gaussian

__all__ = [
    "AffineCoupling",
    "ComplexExp",
    "ComplexPower",
    "Composition",
    "Darmois",
    "Inverted",
    "LinearMixing",
    "Mixing",
    "Moebius",
    "NormalToLaplace",
    "NormalToUniform",
    "Polar",
    "SmoothLeakyReLU",
    "affine_coupling_flow",
    "column_orthogonal",
    "gaussian_darmois",
    "moebius",
    "orthogonal",
    "orthogonal_mlp",
    "rotated_gaussian",
    "shear",
    "triangular_mlp",
    "unit_determinant",
]
