"""How a model is trained: its recipe, its loss, the one loop, and what watches over it."""
