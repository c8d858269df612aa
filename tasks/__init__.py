"""One stage of the work a file."""
