"""Keys and values of what the frozen decoder has read: segments, prefix tree, transformers caches."""
