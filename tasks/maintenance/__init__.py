"""Work on an existing store: forget, vacuum, verify, rollback."""
