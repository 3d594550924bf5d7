"""Answers of a `samples` step ranked by people on a local page, by a reward or by a judge, into preference rows.

What is collected lies in <output>/rankings/<step folder's name>/, since a finished step's own folder never changes:
ratings.jsonl       every click, in order, append-only: the truth
preference.jsonl    made of people's rankings anew whenever the page ends: prompt, chosen, rejected; preference-<method>.jsonl of a method's
"""
