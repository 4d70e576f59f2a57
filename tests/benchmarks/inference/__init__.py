"""`make bench`: the inference service beside its references, every ratio measured within one run."""
