"""Decides which attention masks a forward needs, without reading tensor values."""
