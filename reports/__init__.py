"""Release reports: records in, HTML and figures out."""
