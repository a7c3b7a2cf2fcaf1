"""How klein-nano was made: drawings, captions, text encoder, VAE, flow model, LoRAs, checker."""
