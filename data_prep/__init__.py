"""From scans and pictures to TFRecords; the only package that may import TensorFlow."""
