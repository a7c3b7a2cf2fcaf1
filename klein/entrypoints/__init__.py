"""Protocols in, protocols out."""
