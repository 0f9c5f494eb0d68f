"""Pure decisions: which configuration, which device, which bytes, in which order, and until when."""
