"""Where bytes come from: references, guarded fetching, the Hub, Civitai, a cache by content."""
