"""Experiments, a YAML file each, and what runs them."""
