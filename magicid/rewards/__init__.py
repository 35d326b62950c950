"""The three rewards of a clip: identity (R_id), motion (R_dy), prompt following (R_sem); raw, and 1..10 to show."""
