"""Posterior families; any of them serves any model with a latent site ``"z"``."""
