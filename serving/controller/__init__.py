"""The control plane: membership, dispatch, journal, plans and reconfiguration."""
