"""What preflight looks at, a function each."""
