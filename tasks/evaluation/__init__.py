"""Evaluation of a release: which rows are compared, identification, and pairs files."""
