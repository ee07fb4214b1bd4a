"""What a degradation field knows: images whose degradation is known, what is read off their fields, and the report."""
