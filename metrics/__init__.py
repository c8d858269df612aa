"""Verification, identification and their uncertainty, as pure functions over arrays."""
