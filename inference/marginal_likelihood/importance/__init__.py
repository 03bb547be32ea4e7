"""Importance sampling and what builds on it: PSIS, defensive and adaptive mixtures, bridge sampling."""
