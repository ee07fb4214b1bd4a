"""Studies of the degradation field: what it knows, what it forgets, and what the network makes of it."""
