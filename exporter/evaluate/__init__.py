"""What a student lost against its teacher: measured, gated, signed into the bundle."""
