"""How fast converted graphs run, beside tf2onnx's own graphs and TensorFlow."""
