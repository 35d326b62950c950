"""The face world: a procedural world of cartoon faces in which identity, motion and place are known exactly."""
