"""Adaptive Gauss-Kronrod quadrature over the latents."""
