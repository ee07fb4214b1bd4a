"""What savl promises of speed and memory, measured. Run from the root of a checkout; see README.md here."""
