"""OpenAI's image routes: their fields in, their objects and events out."""
