"""Weights from elsewhere: HuggingFace directories, names of other releases, a model's own initialization rule."""
