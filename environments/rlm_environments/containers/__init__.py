"""What the container environments share: engine, image, profile, posture."""
