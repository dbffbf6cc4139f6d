"""What cloud targets share: TPU slices, rented machines, upload of code and data."""
