"""Priors of the latents."""
