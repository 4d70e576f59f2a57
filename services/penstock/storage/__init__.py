"""What the services that keep state share: their home, their blobs, their database."""
