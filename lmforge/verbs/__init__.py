"""What can be typed after `python -m lmforge`: one file a verb, its module docstring the help."""
