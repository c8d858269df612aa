"""Files: the layout of a store, and how its files are written and read."""
