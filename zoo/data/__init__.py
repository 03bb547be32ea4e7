"""Data sets, their files and their preprocessing."""

from zoo.data.catalogue import dataset_names, named_dataset
from zoo.data.datasets import Dataset, digits, digits_logit, fashion_mnist, linear_gaussian, load_data, mnist
from zoo.data.ground_truth import MixedDataset, load_mixed, mixed, save_mixed
from zoo.data.preprocessing import Logit, Raw, Scaled
from zoo.data.sprite_images import draw_sources, render_sprites, sprite_pair, sprites

__all__ = [
    "Dataset",
    "Logit",
    "MixedDataset",
    "Raw",
    "Scaled",
    "dataset_names",
    "digits",
    "digits_logit",
    "draw_sources",
    "fashion_mnist",
    "linear_gaussian",
    "load_data",
    "load_mixed",
    "mixed",
    "mnist",
    "named_dataset",
    "render_sprites",
    "save_mixed",
    "sprite_pair",
    "sprites",
]
