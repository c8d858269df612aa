"""Where things lie, and how they are written so that nothing is lost."""
