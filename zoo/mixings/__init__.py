"""Mixings: invertible maps from independent sources to data."""
