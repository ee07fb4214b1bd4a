"""The report of `savl analyze`: how much a degradation field encodes about degradations, and how much about content."""
