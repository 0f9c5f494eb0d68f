"""Prefect flows: thin jobs around what the floors below compute."""
