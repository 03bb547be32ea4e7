r"""Peaks on lines, followed from line to line.

A ridge that narrows is lost where it is thinner than a grid shows. On the line beside, where it is wider, its peak is
known: it leads to the next one, by the straight line through the last two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# Lines along which a peak is followed at most.
_STEPS = 20

# Where it is looked for, in its standard deviation on the line before.
_FAR = [2.0**k for k in range(2, -17, -1)]
ABOUT = [*(-t for t in _FAR), 0.0, *reversed(_FAR)]

# A line whose narrowest peak is wider than a neighbour's by this factor may have lost that one.
_WIDER = 4.0

# Lines that are passed over on the way to one with such a peak, at most: some were looked at before it was known.
_BACK = 8

# Peaks that are followed from one line.
_MOST = 8


def in_groups(group: Tensor, key: Tensor) -> Tensor:
    """The indices that sort by group, and within each by a key, (M,)."""
    order = key.argsort()
    return order[group[order].argsort(stable=True)]


class Maxima(NamedTuple):
    """Local maxima on lines, (P,) each: line, place, standard deviation, log density."""

    row: Tensor
    position: Tensor
    scale: Tensor
    height: Tensor

    def chosen(self, index: Tensor) -> Maxima:
        """Some of the maxima."""
        return Maxima(*(column[index] for column in self))

    def joined(self, *others: Maxima) -> Maxima:
        """These and others."""
        return Maxima(*(torch.cat(column) for column in zip(self, *others, strict=True)))


class Lines(NamedTuple):
    """Lines beside each other, and their peaks.

    Attributes:
        group: Which lines are beside each other, (L,).
        place: Where a line stands among them, (L,).
        position: Its highest peaks, (L, M), padded by NaN.
        scale: Their standard deviations, (L, M).
        held: How many they are, (L,).
        least: The least of their standard deviations, (L,).
    """

    group: Tensor
    place: Tensor
    position: Tensor
    scale: Tensor
    held: Tensor
    least: Tensor

    @classmethod
    def of(cls, group: Tensor, place: Tensor, peaks: Maxima) -> Lines:
        """The lines with the highest of their peaks."""
        order = in_groups(peaks.row, -peaks.height)
        row = peaks.row[order]
        count = torch.bincount(row, minlength=len(group))
        column = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
        kept = column < _MOST
        tables = [place.new_full((len(group), _MOST), torch.nan) for _ in range(2)]
        for table, values in zip(tables, (peaks.position, peaks.scale), strict=True):
            table[row[kept], column[kept]] = values[order][kept]
        count = count.clamp(max=_MOST)
        return cls(group, place, tables[0], tables[1], count, tables[1].nan_to_num(nan=torch.inf).amin(-1))

    def chosen(self, index: Tensor) -> Lines:
        """Some of the lines."""
        return Lines(*(column[index] for column in self))

    def ordered(self) -> Tensor:
        """The indices of the lines by group and place, (L,)."""
        return in_groups(self.group, self.place)

    def within(self, group: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The lines in order, and the first and the one after the last of them in each interval of a group, (C,)."""
        places, rank = torch.unique(torch.cat([self.place, low, high]), return_inverse=True)
        number, count = len(self.place), len(low)
        key = self.group * len(places) + rank[:number]
        order = key.argsort(stable=True)
        ends = [group * len(places) + part for part in rank[number:].split(count)]
        first = torch.searchsorted(key[order], ends[0], right=True)
        return order, first, torch.searchsorted(key[order], ends[1]).maximum(first)

    def lack(self, one: Tensor, other: Tensor) -> Tensor:
        """Whether lines are beside others of which each has a peak that they have not, by their indices."""
        fewer = (self.held[other] > self.held[one]) | (self.least[one] > _WIDER * self.least[other])
        return (self.group[one] == self.group[other]) & fewer

    def lacking(self) -> Tensor:
        """Lines that lack a peak that the next one has, on either side, (L,)."""
        order, found = self.ordered(), torch.zeros_like(self.group, dtype=torch.bool)
        for one, other in ((order[1:], order[:-1]), (order[:-1], order[1:])):
            found[one] |= self.lack(one, other)
        return found

    def joined(self, other: Lines | None) -> Lines:
        """These and others."""
        return self if other is None else Lines(*(torch.cat(pair) for pair in zip(self, other, strict=True)))


def followed(
    group: Tensor, place: Tensor, peaks: Maxima, before: Lines | None, look: Callable[[Tensor, Tensor], Maxima]
) -> Maxima:
    """Peaks with those besides to which the peaks of neighbouring lines lead.

    Args:
        group: Which lines are beside each other, (L,).
        place: Where a line stands among them, (L,).
        peaks: Those that are known.
        before: Lines that are known from before.
        look: Finds peaks on lines (G,), between sorted points (G, T).
    """
    changed = torch.ones_like(group, dtype=torch.bool)
    for _ in range(_STEPS):
        lines = Lines.of(group, place, peaks)
        rows, centre, scale = _leads(lines.joined(before), len(group), changed)
        if len(rows) == 0:
            return peaks
        new = look(rows, centre.unsqueeze(-1) + scale.unsqueeze(-1) * scale.new_tensor(ABOUT))
        new = new.chosen(~_is_known(new, lines))
        changed = torch.zeros_like(changed)
        changed[new.row] = True
        if len(new.row) == 0:
            return peaks
        peaks = peaks.joined(_once(new))
    return peaks


def _leads(lines: Lines, num: int, changed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where peaks may be on the first lines that have fewer than a neighbour, or far wider ones.

    Returns:
        Line, place, and scale, (G,) each.
    """
    order = lines.ordered()
    fresh = torch.ones_like(order, dtype=torch.bool)
    fresh[:num] = changed
    found = []
    for ordered in (order, order.flip(0)):
        led = torch.zeros_like(fresh)
        for k in range(1, min(_BACK, len(order) - 1) + 1):
            own, at = ordered[k:], torch.arange(len(ordered) - k, device=ordered.device)
            beside = (own < num) & lines.lack(own, ordered[at]) & fresh[ordered[at]] & ~led[own]
            own, at = own[beside], at[beside]
            if len(own) == 0:
                continue
            led[own] = True
            near, here = ordered[at], lines.position[ordered[at]]
            ahead = here.clone()
            for j in range(_BACK, 0, -1):  # by the straight line through the next one that has the peak as well
                far = ordered[(at - j).clamp(min=0)]
                there = lines.position[far].unsqueeze(-2) - here.unsqueeze(-1)
                there = there.gather(-1, there.abs().nan_to_num(nan=torch.inf).argmin(-1, keepdim=True)).squeeze(-1)
                step = (lines.place[own] - lines.place[near]) / (lines.place[far] - lines.place[near])
                has = (at >= j) & (lines.group[far] == lines.group[near]) & ~lines.lack(far, near)
                ahead = torch.where(has.unsqueeze(-1), here + step.unsqueeze(-1) * there, ahead)
            for centre in (here, ahead):
                line, column = centre.isfinite().nonzero().unbind(-1)
                found.append((own[line], centre[line, column], lines.scale[near][line, column]))
    if not found:
        return order[:0], lines.place[:0], lines.place[:0]
    rows, centre, scale = (torch.cat(parts) for parts in zip(*found, strict=True))
    return rows, centre, scale


def _is_known(new: Maxima, lines: Lines) -> Tensor:
    """Which peaks are known, to within half of the standard deviation of the narrower one, (P,)."""
    narrower = torch.minimum(lines.scale[new.row], new.scale.unsqueeze(-1))
    return ((lines.position[new.row] - new.position.unsqueeze(-1)).abs() < 0.5 * narrower).any(-1)


def _once(peaks: Maxima) -> Maxima:
    """Peaks of which none is another again, to within its standard deviation."""
    peaks = peaks.chosen(in_groups(peaks.row, peaks.position))
    same = (peaks.row.diff() == 0) & (peaks.position.diff() < torch.minimum(peaks.scale[1:], peaks.scale[:-1]))
    return peaks.chosen(torch.cat([~same.new_zeros(1), ~same]))
