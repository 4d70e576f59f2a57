"""`penstock demo`: the whole way from rows to answers, on real data, over gRPC."""
