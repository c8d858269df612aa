"""Queries: a release opened for searching, the search with its options, and the answers of the command line."""

from tasks.query.answers import QueryAnswer, answer

__all__ = ["QueryAnswer", "answer"]
