"""The SageMaker container: its entrypoint, its metric lines, and the build of its image."""
