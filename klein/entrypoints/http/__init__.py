"""The HTTP routes beside BentoML's own."""
