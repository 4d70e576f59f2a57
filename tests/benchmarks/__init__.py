"""How fast Penstock is, beside its references. `make help` lists the commands."""
