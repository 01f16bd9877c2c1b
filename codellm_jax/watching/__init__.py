"""The current state of a run, a study or a folder of runs, as text in a terminal and as a page that refreshes itself.
"""
