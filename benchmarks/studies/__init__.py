"""Studies of the degradation field: the information it carries, and its effect on the network."""
