"""Measurements, one module per kind."""
