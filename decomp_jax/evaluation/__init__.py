"""What a trained network is used for: encode, search, query, report."""
