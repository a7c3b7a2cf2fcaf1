"""LoRA files: what they are, where they come from and which layers they change; no torch here."""
