"""The online door: every published adapter behind one address, on Ray Serve."""
