"""The embedded task of search: a tiny language model that looks facts up and answers questions."""
