"""The decoder, its attention and its loss; independent of data, gin and mesh."""
