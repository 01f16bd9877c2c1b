"""A run, a study or a folder of runs as it stands now: as text in a terminal, and as a page that refreshes itself."""
