"""klein serves FLUX.2-klein with LoRAs: one engine, three doors (BentoML, RunPod, command line)."""

__version__ = "0.1.0"
