"""Generate pages, tables and figures from committed results."""
