"""What cloud targets share: TPU slices, rented machines, jobs without local files."""
