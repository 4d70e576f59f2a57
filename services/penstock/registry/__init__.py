"""The registry: models, versions, aliases, deployments and the blobs of bundles."""
