"""People judge: a static page that hides which clip is whose, and what its answers come to."""
