"""Jinja templates of reports and model cards, and the filled cards of the reference runs."""
