"""Models: load, save, read back, and the facts about each architecture. One of the two homes of `transformers`."""
