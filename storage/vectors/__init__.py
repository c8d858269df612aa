"""FAISS indexes: build, search, files, recall."""
