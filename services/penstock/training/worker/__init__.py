"""The process that runs one attempt of a job. It talks to the services over gRPC only."""
