"""The queue and the worker of one GPU."""
