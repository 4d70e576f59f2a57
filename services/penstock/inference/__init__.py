"""The inference service: serves what the registry deploys, over the Open Inference Protocol, with ONNX Runtime."""
