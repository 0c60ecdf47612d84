"""TensorRT on the device: engines built, cached, checked and run there."""
