"""Settings of a run, and what makes them valid."""
