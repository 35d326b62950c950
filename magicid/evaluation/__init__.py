"""What a clip is measured by: networks that were never optimised against, and the table of their values."""
