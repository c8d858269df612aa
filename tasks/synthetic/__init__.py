"""Synthetic shards, calibrated on real embeddings."""
