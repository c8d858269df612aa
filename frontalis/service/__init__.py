"""The query service of `frontalis serve`: HTTP, batching, limits, and a page to search by hand.

Answers are made by `tasks.query`; nothing here imports Prefect.
"""
