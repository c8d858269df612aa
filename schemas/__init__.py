"""What things look like: contracts, settings, records."""
