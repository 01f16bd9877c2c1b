"""A study read back: its runs, the paper's figures and conclusions, tables, plots and pages."""
