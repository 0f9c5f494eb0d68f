"""Where an instance learns that it will go: one module per source, all of them speaking `base`'s few words."""
