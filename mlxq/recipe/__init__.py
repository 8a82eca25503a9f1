"""Recipes: what a person asks for, read and checked."""
