"""From TFRecords to batches on the device, without TensorFlow."""
