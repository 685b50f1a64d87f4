"""Nets on which folding, discovery and rewriting are tried."""
