"""A package and what was measured of it, in words, tables, plots and a page."""
