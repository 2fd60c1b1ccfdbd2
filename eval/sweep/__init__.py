"""Sweeps: many ways to sample a model, measured on the same noise."""
