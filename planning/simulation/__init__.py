"""Simulations: whole requests for placement, decode steps for plans."""
