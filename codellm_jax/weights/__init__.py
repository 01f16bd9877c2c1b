"""Published weights: read into runs, and written from them."""
