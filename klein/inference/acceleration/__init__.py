"""Faster ways to the same pictures; without this package klein draws eagerly."""
