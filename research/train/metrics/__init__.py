"""What is measured while a run trains: step metrics, evaluation, throughput, traces."""
