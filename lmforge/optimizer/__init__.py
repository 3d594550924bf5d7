"""How weights move: optimizers and their learning-rate schedules."""
