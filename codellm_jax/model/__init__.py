"""What is trained: the decoder, its attention and its loss. Knows no data, no gin and no mesh."""
