"""Adapters: a few trained weights on a frozen base, through PEFT, kept as folders that PEFT opens."""
