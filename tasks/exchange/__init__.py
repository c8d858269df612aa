"""In and out: embeddings of other programs as shards, and the features of a release in forms that others read."""
