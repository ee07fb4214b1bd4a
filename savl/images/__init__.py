"""Image files: read and write them with their metadata. This package does not depend on networks.

`read.py` and `write.py` are the entry points; each format has modules for decoding and metadata of its own.
"""
