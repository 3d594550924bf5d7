"""The objectives that lmforge itself brings."""
