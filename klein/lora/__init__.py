"""What a LoRA is, told from its name and its file's header, without torch."""
