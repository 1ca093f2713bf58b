"""Training a model: recipe, objective, loop, monitoring, a run's folder, and finding earlier runs."""
