"""Distributions that batch, trace and score in float64, their divergences and expectations."""
