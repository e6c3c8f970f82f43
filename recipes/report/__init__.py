"""Reports of runs: tables, pictures, one page."""
