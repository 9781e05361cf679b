"""The pipeline's stages, one thin script each, run by DVC as `python -m stages.<name>`."""
