"""What every entrypoint does, once."""
