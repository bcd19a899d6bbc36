"""Counts money. Knows neither Ray nor HTTP."""
