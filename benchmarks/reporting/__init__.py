"""Pages, tables and figures made from committed results."""
