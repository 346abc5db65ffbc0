"""What the parts of GEAR take from the error and what they cost, as `bench` measures it."""
