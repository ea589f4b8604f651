"""Give a trained network away: weights, ONNX, and the model card that goes with each."""
