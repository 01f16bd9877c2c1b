"""A study from its arms to its runs, and their training and evaluation one after the other."""
