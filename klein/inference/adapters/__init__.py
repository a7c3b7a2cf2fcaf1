"""LoRAs on a transformer: the change each makes, merged into the weights."""
