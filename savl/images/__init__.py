"""Image files: reading, writing, formats, metadata, alpha and quantising. Nothing here knows of networks."""
