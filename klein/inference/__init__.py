"""The model at work: the only package that imports torch and diffusers."""
