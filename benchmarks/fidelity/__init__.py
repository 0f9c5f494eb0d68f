"""How well the simulation of a fleet predicts real runs of one."""
