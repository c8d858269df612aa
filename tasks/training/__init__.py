"""Training of one checkpoint: rows, fit, selection, model card."""
