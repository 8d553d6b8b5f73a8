"""Programs of the command `vidssl` that are not entry points of Accelerate."""
