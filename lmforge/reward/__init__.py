"""The options of `reward`."""
