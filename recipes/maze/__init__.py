"""The embedded task of mazes: a tiny language model that names its way cell by cell."""
