"""Running a plan: a store of steps by digest, a runner that skips what is done, and what it shows."""
