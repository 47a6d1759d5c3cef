"""Token files, sample order, data sets of pretraining and instruction tuning, and n-gram baselines. No torch."""
