"""The training service: datasets, jobs, the worker that runs one, and the model families."""
