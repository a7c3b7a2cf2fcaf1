"""From a result to what leaves: files, metadata, JSON, links."""
