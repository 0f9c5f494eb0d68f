"""Code generated from `serving/api/proto`; `python -m serving.api.generate` writes it."""
