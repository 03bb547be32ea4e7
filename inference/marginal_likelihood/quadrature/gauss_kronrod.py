r"""The Gauss rules of 5 and 7 points, and the Kronrod rules of 11 and 15 that extend them, on (-1, 1).

References:
    Piessens, de Doncker-Kapenga, Ueberhuber, Kahaner, "QUADPACK", 1983.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Nodes and weights of the 15-point Kronrod rule from the outside in, and of the 7-point Gauss rule on every second.
_NODES = (
    0.991455371120812639206854697526329,
    0.949107912342758524526189684047851,
    0.864864423359769072789712788640926,
    0.741531185599394439863864773280788,
    0.586087235467691130294144691258166,
    0.405845151377397166906606412076961,
    0.207784955007898467600689403773245,
)
_KRONROD = (
    0.022935322010529224963732008058970,
    0.063092092629978553290700663189204,
    0.104790010322250183839876322541518,
    0.140653259715525918745189590510238,
    0.169004726639267902826583426598550,
    0.190350578064785409913256402421014,
    0.204432940075298892414161999234649,
    0.209482141084727828012999174891714,
)
_GAUSS = (
    0.129484966168869693270611432679082,
    0.279705391489276667901467771423780,
    0.381830050505118944950369775488975,
    0.417959183673469387755102040816327,
)

# The same of 11 and 5 points.
_FEW_NODES = (
    0.984085360094842464496172934636139,
    0.906179845938663992797626878299393,
    0.754166726570849220440817166946116,
    0.538469310105683091036314420700209,
    0.279630413161783193413466522748977,
)
_FEW_KRONROD = (
    0.0425820367510818328645094508476701,
    0.115233316622473394024626845880574,
    0.186800796556492657467800026878486,
    0.241040339228647586699942611223262,
    0.272849801912558922340993264484456,
    0.282987417857491213204255601371106,
)
_FEW_GAUSS = (
    0.236926885056189087514264040719917,
    0.478628670499366468041291514835638,
    0.568888888888888888888888888888889,
)

# The least tolerance that the rules of few points serve: on half a Gaussian they differ by 5e-4.
_FEW = 1e-3


def rule(like: Tensor, tolerance: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes on (-1, 1) from left to right, Kronrod's weights and Gauss's, (15,) each, or (11,) at loose tolerances."""
    rules = (_FEW_NODES, _FEW_KRONROD, _FEW_GAUSS) if tolerance >= _FEW else (_NODES, _KRONROD, _GAUSS)
    outer, kronrod, coarse = map(like.new_tensor, rules)
    gauss = like.new_zeros(len(kronrod))
    gauss[1::2] = coarse

    def mirrored(half: Tensor) -> Tensor:
        return torch.cat([half, half[:-1].flip(0)])

    return torch.cat([-outer, like.new_zeros(1), outer.flip(0)]), mirrored(kronrod), mirrored(gauss)


def at_edges(nodes: Tensor) -> Tensor:
    """Weights of the values at nodes (T,) on (-1, 1) in their polynomial's values at -1 and 1, (T, 2)."""
    apart = nodes.unsqueeze(-1) - nodes
    apart.fill_diagonal_(1.0)
    ends = torch.stack([-nodes.new_ones(()), nodes.new_ones(())])
    return (ends - nodes.unsqueeze(-1)).prod(0) / ((ends - nodes.unsqueeze(-1)) * apart.prod(-1, keepdim=True))
