"""Where rows come from: sources that each write a `corpus` of text, chat and preference rows."""
