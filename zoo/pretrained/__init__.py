"""Trained pairs with their cards: what each is, how far its ELBO is from the evidence, and how that was checked."""

from zoo.pretrained.cards import Card, card
from zoo.pretrained.collection import Pretrained, load, load_card, pairs, save

__all__ = ["Card", "Pretrained", "card", "load", "load_card", "pairs", "save"]
