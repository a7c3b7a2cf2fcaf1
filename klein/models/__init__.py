"""What is known of each model, where its weights are, and what this machine can do with them."""
