"""The folders that steps hand to each other; one file a kind, with its reader and its writer."""
