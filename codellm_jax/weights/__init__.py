"""Published weights: their configurations and tensors, read into runs and written out of them."""
