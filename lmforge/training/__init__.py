"""The training loop: one optimizer step per Lightning step, losses as pure functions, and a state to resume from."""
