"""What every Penstock server shares: configuration, errors, interceptors, health, reflection, graceful drain."""
